"""Settings: a dataclass becomes the command line."""
from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import typing
from pathlib import Path
from typing import Any, NoReturn

from common import fail


def comments(cls: type) -> dict[str, str]:
    """The comment behind (or above the continuation of) each field, which is also its line in --help."""
    found: dict[str, str] = {}
    name = None
    for line in inspect.getsource(cls).splitlines():
        if field := re.match(r"\s+(\w+): [^#]*?(?:#\s*(.*))?$", line):
            name = field[1]
            found[name] = field[2] or ""
        elif (more := re.match(r"\s+#\s*(.*)$", line)) and name:
            found[name] += " " + more[1]
        else:
            name = None
    return found


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line on stderr without the usage in front."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see --help)")


def _one_line_on_ctrl_c(kind: type, error: BaseException, trace: Any) -> None:
    """Ctrl-C where no Run is there to catch it (while data is read, samples are drawn) prints no traceback either."""
    print("\nstopped", file=sys.stderr) if kind is KeyboardInterrupt else sys.__excepthook__(kind, error, trace)


def defaults(cls: type, dataset: str, preset: str = "cpu", **settings: Any) -> Any:
    """An instance of the Config `cls` with the defaults of this dataset and preset (cls.PRESETS), then `settings`."""
    return cls(**{**preset_of(cls, dataset, preset, settings.get("on", "")), "dataset": dataset, "preset": preset, **settings})


def preset_of(cls: type, dataset: str, preset: str, on: str = "") -> dict[str, Any]:
    """Defaults that differ from the dataclass's own: those of (dataset, preset), then those of (dataset, preset, on)."""
    return {**cls.PRESETS.get((dataset, preset), {}), **cls.PRESETS.get((dataset, preset, on), {})}


def parse(cls: type, description: str, argv: list[str] | None = None) -> Any:
    """Fill the dataclass `cls` from the command line: one flag a field, its comment as help, its type checked.

    The defaults shown and used are those of --dataset and --preset. Unknown flags, wrong types and values that the
    dataclass's own __post_init__ refuses stop with one line.
    """
    argv = sys.argv[1:] if argv is None else argv
    sys.excepthook = _one_line_on_ctrl_c
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default=getattr(cls, "dataset", ""))
    first.add_argument("--preset", default="cpu")
    first.add_argument("--on", default="")
    chosen = vars(first.parse_known_args(argv)[0])
    special = preset_of(cls, **chosen)
    if not special and chosen["preset"] != "cpu":
        fail(f"--preset {chosen['preset']}: there is no such preset for --dataset {chosen['dataset']} (known: "
             + ", ".join(f"{key[0]} {key[1]}" for key in cls.PRESETS if len(key) == 2) + ")")
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    types, reasons = typing.get_type_hints(cls), comments(cls)
    for field in dataclasses.fields(cls):
        kind, flag = types[field.name], "--" + field.name.replace("_", "-")
        default = special.get(field.name, chosen.get(field.name) or field.default)
        text = f"{reasons[field.name]} [{default if default != '' else 'none'}]".replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action="store_true", default=default, help=text)
        elif typing.get_origin(kind) is typing.Literal:
            parser.add_argument(flag, choices=typing.get_args(kind), default=default, help=text)
        else:
            parser.add_argument(flag, type=kind, default=default, metavar=kind.__name__.upper(), help=text)
    return cls(**vars(parser.parse_args(argv)))


def require(condition: bool, message: str) -> None:
    """For Config.__post_init__: a value out of range stops with one line."""
    if not condition:
        fail(message)


def require_numbers(config: Any, above_0: str, from_0: str) -> None:
    """For Config.__post_init__: the fields named in `above_0` are > 0, those in `from_0` >= 0, all of them finite.

    A nan is in no range, an infinity in none that ends.
    """
    for names, sign in ((above_0, ">"), (from_0, ">=")):
        for name in names.split():
            value = getattr(config, name)
            require(0 < value < 2**63 or (value == 0 and sign == ">="),
                    f"--{name.replace('_', '-')} {value}: must be {sign} 0 and finite")


def runs_folder(dataset: str, preset: str) -> Path:
    """Where the runs of a dataset and preset go: runs/reviews, runs/imdb, runs/imdb-gpu."""
    return Path("runs") / (dataset if preset == "cpu" else f"{dataset}-{preset}")
