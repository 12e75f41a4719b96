"""Settings: a dataclass becomes the command line, takes the defaults of its task, and names the run
folder.

    @settings
    class Config:
        dataset: str = "reviews"  # Task: a folder of data/.

        # ---- optimisation
        lr: float = 2e-4  # Learning rate after the warm-up.

    train(parse(Config, __doc__))    # --lr 1e-4; the comments are the lines of --help

A task has settings of its own (data/<task>/__init__.py). They are the defaults wherever a Config is
made, on the command
line or in Python: Config(dataset="imdb") has imdb's learning rate.
"""
from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import os
import re
import shlex
import signal
import sys
import typing
from pathlib import Path
from typing import Any, NoReturn

from common import ROOT, fail, processes, tasks

# these change nothing in a result but its rounding: they name no folder, and a run may go on with
# others
ROUNDING_ONLY = ("resume", "out", "checkpoint_every", "evaluate_every", "dtype", "device",
                 "compile", "shard", "micro_batch_size")


# ---- a dataclass with the defaults of its task ---------------------------------------------------

def settings(cls: type) -> type:
    """@dataclass, but a field that is not given takes the task's and preset's default where they
    have one."""
    cls = dataclasses.dataclass(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    plain_init = cls.__init__

    @functools.wraps(plain_init)
    def init(self: Any, *values: Any, **given: Any) -> None:
        given |= dict(zip(names, values))
        if "dataset" in given and tasks.is_own(given["dataset"]):
            given["dataset"] = own_name(given["dataset"])  # qa/ and ./qa are qa
        plain_init(self, **{**task_defaults(cls, given), **given})

    cls.__init__ = init
    return cls


def task_defaults(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    """What the task says of this script's settings. `given` may name dataset, preset and on; else
    the class does."""
    own = {field.name: field.default for field in dataclasses.fields(cls)} | given
    if "dataset" not in own or "preset" not in own:
        return {}
    labels = {"labels": tasks.load(own["dataset"]).labels} if "labels" in own else {}
    return labels | tasks.settings_of(own["dataset"], own["preset"],
                                      script_of(cls).stem, own.get("on", ""))


def script_of(cls: type) -> Path:
    """The file that a Config stands in, seen from the repository's root: dpo.py,
    experiments/frontier.py."""
    path = Path(inspect.getsourcefile(cls)).resolve()
    return path.relative_to(ROOT) if ROOT in path.parents else Path(path.name)


def defaults_of(cls: type, **given: Any) -> dict[str, Any]:
    """Every field's default, for the dataset, preset and kind of data among `given`."""
    return {field.name: field.default
            for field in dataclasses.fields(cls)} | task_defaults(cls, given) | given


def changed(config: Any) -> dict[str, Any]:
    """The settings that a user would have to type: those that differ from the defaults of their
    task and preset."""
    choice = {
        name: getattr(config, name)
        for name in ("dataset", "preset", "on") if hasattr(config, name)
    }
    default = defaults_of(type(config), **choice)
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
            if field.name in choice and choice[field.name] != field.default
            or field.name not in choice and getattr(config, field.name) != default[field.name]}


def command(config: Any) -> list[str]:
    """The words of the command that makes this run: ["dpo.py", "--beta", "0.5", "--out", ...]."""
    words = [str(script_of(type(config)))]
    for name, value in changed(config).items():
        words += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    return words


def typed(config: Any) -> str:
    """The same as a line for the terminal, without what a script fills in by itself."""
    words = shlex.join(command(config))
    return "python " + re.sub(r" --(out \S+|resume)(?= |$)", "", words)


def differences(config: Any) -> str:
    """The settings that differ from what the file of the script says, whether a user or the task
    changed them."""
    plain = {field.name: field.default for field in dataclasses.fields(config)}
    found = [f"{name} {value}" for name, value in dataclasses.asdict(config).items()
             if name not in ("out", "resume") and value != plain[name]]
    return ", ".join(found)


# ---- folders -------------------------------------------------------------------------------------

def runs_folder(dataset: str, preset: str) -> Path:
    """Where the runs of a dataset and preset go: runs/reviews, runs/imdb-gpu; runs/my-qa for the
    folder my/qa."""
    name = label("", dataset)[1:] if tasks.is_own(dataset) else dataset
    return Path("runs") / (name if preset == "cpu" else f"{name}-{preset}")


def own_name(dataset: str) -> str:
    """The one name of a folder of the user's files, so that a run is found again by it."""
    name = os.path.normpath(dataset)
    return name if tasks.is_own(name) else os.path.join(".", name)


def runs_of(sft: str | Path) -> Path:
    """Where what is made of an SFT policy goes: beside runs/reviews/sft, but inside a folder of
    another name.

    Bank and pairs are samples of one policy. Two policies side by side must not share them.
    """
    return Path(sft).parent if Path(sft).name == "sft" else Path(sft)


def run_folder(config: Any, name: str, always: tuple[str, ...] = (),
               never: tuple[str, ...] = ()) -> str:
    """The folder of a run: `name`, the settings that always tell it apart, and every other one that
    is no default.

    So another experiment is another folder: dpo-beta0.1-seed0, dpo-beta0.1-seed0-lr0.0001.
    """
    base = Path("runs")
    if getattr(config, "sft", ""):
        base = runs_of(config.sft)
    elif hasattr(config, "dataset"):
        base = runs_folder(config.dataset, config.preset)
    hidden = (*ROUNDING_ONLY, "dataset", "preset", "on", "sft", *always, *never)
    parts = [name] + [label(key, getattr(config, key)) for key in always]
    parts += [label(key, value) for key, value in changed(config).items() if key not in hidden]
    return str(base / "-".join(parts)[:200])


def label(name: str, value: Any) -> str:
    """A setting as part of a folder's name: beta0.1, targetkl3, labels-argmax, pairs-mine-pairs."""
    name = name.replace("_", "")
    if value is True:
        return name
    if isinstance(value, (int, float)):
        return f"{name}{value:g}"
    value = re.sub(r"\.(jsonl|csv)$", "", str(value))
    return f"{name}-" + re.sub(r"[^\w.]+", "-", value).strip("-.")


# ---- the command line ----------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line on stderr without the usage in front."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see --help)")


@functools.cache
def field_notes(cls: type) -> dict[str, tuple[str, str]]:
    """Heading and comment of each field, as the source has them: they are the groups and lines of
    --help.

    A comment may go on below its field; "# ---- optimisation" above a field begins a group.
    """
    notes: dict[str, tuple[str, str]] = {}
    heading, name = "", None
    for line in inspect.getsource(cls).splitlines():
        if title := re.match(r"\s+# ---- (.+?)\s*-*$", line):
            heading, name = title[1], None
        elif field := re.match(r"\s+(\w+): [^#]*?(?:#\s*(.*))?$", line):
            name = field[1]
            notes[name] = (heading, field[2] or "")
        elif (more := re.match(r"\s+#\s*(.*)$", line)) and name:
            notes[name] = (heading, f"{notes[name][1]} {more[1]}")
        else:
            name = None
    return notes


def parse(cls: type, description: str, argv: list[str] | None = None) -> Any:
    """Fill the dataclass `cls` from the command line: one flag a field, its comment as help, its
    type checked.

    The defaults shown are those of --dataset and --preset. Unknown flags, wrong types and values
    that the dataclass's own __post_init__ refuses stop with one line.
    """
    if argv is None:
        argv = sys.argv[1:]
        stop_like_ctrl_c()
        processes.join()
    first = Parser(add_help=False, allow_abbrev=False)
    for name in {"dataset", "preset", "on"} & {field.name for field in dataclasses.fields(cls)}:
        first.add_argument(f"--{name}", default=argparse.SUPPRESS)
    defaults = defaults_of(cls, **vars(first.parse_known_args(argv)[0]))

    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    types, notes, groups = typing.get_type_hints(cls), field_notes(cls), {"": parser}
    for field in dataclasses.fields(cls):
        kind = types[field.name]
        flag = "--" + field.name.replace("_", "-")
        heading, reason = notes[field.name]
        group = groups.setdefault(heading, None) or parser.add_argument_group(heading)
        groups[heading] = group
        default = defaults[field.name] if defaults[field.name] not in ("", ()) else "none"
        how: dict[str, Any] = {
            "default": argparse.SUPPRESS, "help": f"{reason} [{default}]".replace("%", "%%")
        }
        if kind is bool:
            group.add_argument(flag, action="store_true", **how)
        elif typing.get_origin(kind) is typing.Literal:
            group.add_argument(flag, choices=typing.get_args(kind), **how)
        elif typing.get_origin(kind) is tuple:
            group.add_argument(flag, nargs="+", metavar="RUN", **how)
        else:
            group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), **how)
    return cls(**vars(parser.parse_args(argv)))


def stop_like_ctrl_c() -> None:
    """SIGTERM, by which a scheduler or a shutdown ends a process, is Ctrl-C: one line, and a
    checkpoint while training. So is Windows' SIGBREAK, by which a sweep stops its runs."""
    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt
    for name in ("SIGTERM", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, interrupt)


# ---- checks for Config.__post_init__ -------------------------------------------------------------

def require(condition: bool, message: str) -> None:
    """A value out of range stops with one line."""
    if not condition:
        fail(message)


def require_processes(config: Any) -> None:
    """--shard needs processes to share with."""
    require(not config.shard or processes.WORLD > 1,
            "--shard: needs several processes: torchrun --nproc-per-node 2 ...")
    require(not (config.shard and config.compile), "--shard: not with --compile")


def require_numbers(config: Any, above_0: str, from_0: str = "") -> None:
    """The fields named in `above_0` are > 0, those in `from_0` >= 0; NaN, infinity and absurd sizes
    are refused."""
    for names, sign in ((above_0, ">"), (from_0, ">=")):
        for name in names.split():
            value = getattr(config, name)
            require(0 < value < 2**63 or (value == 0 and sign == ">="),
                    f"--{name.replace('_', '-')} {value}: must be {sign} 0 and finite")
            require(not isinstance(value, int) or value < 10**9 or name == "seed",
                    f"--{name.replace('_', '-')} {value}: must be below 10^9")
