"""What every script needs and no reader wants to read five times: the command line made from a dataclass, device and
dtype, deterministic batches, the run folder with its log, and checkpoints that survive a kill at any moment.

The algorithms and their training loops are not here: they are the lesson, and stay whole in their own file.

A run folder holds  config.json  every setting, and what the run was built from
                    log.jsonl    one JSON object a line
                    checkpoint.pt, checkpoint.prev.pt   while training: weights, optimizer, step
                    model.pt     the finished model (weights, architecture, tokenizer fingerprint)
                    tokenizer.tiktoken
"""
from __future__ import annotations

import argparse
import ctypes
import dataclasses
import hashlib
import inspect
import json
import lzma
import math
import os
import platform
import re
import signal
import sys
import time
import typing
from pathlib import Path
from typing import Any, Callable, Iterator, NoReturn

ROOT = Path(__file__).resolve().parent

try:  # glibc hands the memory of every large tensor back to the system when it is freed, and the next tensor is paged in
    # again 4 kB at a time; keeping it makes a training step on a CPU faster (results/bench has both figures)
    _libc = ctypes.CDLL("libc.so.6")
    _libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
    _libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too
except (OSError, AttributeError):
    pass  # not glibc

import torch  # noqa: E402  (after mallopt)


def fail(message: str) -> NoReturn:
    """Stop with one clear line on stderr and exit status 1."""
    raise SystemExit(f"error: {message}")


# ---- settings: a dataclass becomes the command line ------------------------------------------------------------------

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


# ---- files -----------------------------------------------------------------------------------------------------------

def atomic_write(path: str | Path, content: bytes | Callable[[Any], None], keep: Path | None = None) -> None:
    """Write a file so that a reader, or a kill at any moment, sees the old file or the new one and nothing between.

    Args:
        content: the bytes, or a function that writes them to an open binary file.
        keep: where the file that was there before is moved to, just before the new one takes its place.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # on a full disk, torch.save makes a RuntimeError out of the OSError
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        fail(f"{path}: cannot be written ({reason.strerror})")
    finally:
        temporary.unlink(missing_ok=True) if temporary.parent.is_dir() else None


def write_json(path: str | Path, value: Any) -> None:
    atomic_write(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        fail(f"{path}: no such file")
    except ValueError as error:
        fail(f"{path}: not JSON ({error})")


def write_jsonl(path: str | Path, rows: typing.Iterable[dict]) -> None:
    """One JSON object a line, UTF-8, readable as it is."""
    def write(file: typing.BinaryIO) -> None:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    atomic_write(path, write)


def read_jsonl(path: str | Path, fields: dict[str, type | tuple[type, ...]]) -> list[dict]:
    """Rows of a JSON-lines file (or .xz), each checked: `fields` maps the names a row must have to the types they may have.

    Raises SystemExit with file, line and field: a missing file or key, a wrong type (null too), bad UTF-8 or JSON, no row.
    """
    rows = []
    try:
        with (lzma.open if Path(path).suffix == ".xz" else open)(path, "rb") as file:
            lines = file.read().split(b"\n")
    except (OSError, EOFError, lzma.LZMAError) as error:
        fail(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            fail(f"{path}, line {number}: not UTF-8 (byte {error.start + 1} of the line)")
        except (ValueError, RecursionError) as error:
            fail(f"{path}, line {number}: not JSON ({error})")
        if not isinstance(row, dict):
            fail(f"{path}, line {number}: expected a JSON object with {', '.join(fields)}")
        for name, kind in fields.items():
            if name not in row:
                fail(f"{path}, line {number}: no field {name!r} (found: {', '.join(row) or 'none'})")
            if not isinstance(row[name], kind):
                names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
                fail(f"{path}, line {number}: field {name!r} is {json.dumps(row[name])[:40]}, expected {names}")
        rows.append({**row, "line": number})
    if not rows:
        fail(f"{path}: empty, expected one JSON object a line with {', '.join(fields)}")
    return rows


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(state: dict[str, torch.Tensor]) -> str:
    """16 hex digits of a model's weights: whatever is cached from a model is tied to it by this."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- device, numbers, batches ----------------------------------------------------------------------------------------

def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(dtype: str) -> torch.autocast:
    """bf16 autocast where asked for; 'auto' means bf16 on CUDA and fp32 on a CPU. No fp16, so no GradScaler."""
    kind = device().type
    return torch.autocast(kind, torch.bfloat16, enabled=dtype == "bfloat16" or (dtype == "auto" and kind == "cuda"))


def generator(seed: int, *stream: int) -> torch.Generator:
    """A private random stream on the CPU: (seed, stream...) name it, so drawing from one never disturbs another."""
    mixed = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed[:7], "big"))


def batches(lengths: torch.Tensor, batch_size: int, seed: int, pool: int = 16) -> Iterator[torch.Tensor]:
    """Endless batches of row numbers, (batch_size,) each, reshuffled every epoch.

    Rows of similar length go together (sorted inside a pool of `pool` batches, then the batches are shuffled), because
    padding is work thrown away: a third of it on `reviews`. Each epoch's order depends on (seed, epoch) alone, so a run
    that resumes at step k sees what it would have seen. The rows that do not fill a last batch wait for another epoch.
    """
    n = len(lengths)
    if n == 0:
        fail("no rows to train on")
    batch_size = min(batch_size, n)
    epoch = 0
    while True:
        draw = generator(seed, epoch)
        order = torch.randperm(n, generator=draw)[:n - n % batch_size]
        cut = []
        for chunk in order.split(batch_size * pool):
            cut += chunk[lengths[chunk].argsort(stable=True)].split(batch_size)
        for i in torch.randperm(len(cut), generator=draw).tolist():
            yield cut[i]
        epoch += 1


def pad(rows: list[list[int]] | list[torch.Tensor], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad rows of ids: tokens (B, longest) and lengths (B,), both int64."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), value)
    for i, row in enumerate(rows):
        tokens[i, :len(row)] = torch.as_tensor(row)
    return tokens, lengths


def warmup_cosine(step: int, steps: int, warmup: int, floor: float = 0.1) -> float:
    """Learning-rate factor: linear from 1/warmup to 1, then half a cosine down to `floor` after the last step."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def adamw(model: torch.nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW that decays matrices only, not biases, LayerNorm gains or embeddings of positions."""
    decay = [p for n, p in model.named_parameters() if p.dim() == 2 and "wpe" not in n]
    rest = [p for n, p in model.named_parameters() if not (p.dim() == 2 and "wpe" not in n)]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def runs_folder(dataset: str, preset: str) -> Path:
    """Where the runs of a dataset and preset go: runs/reviews, runs/imdb, runs/imdb-gpu."""
    return Path("runs") / (dataset if preset == "cpu" else f"{dataset}-{preset}")


# ---- the run folder --------------------------------------------------------------------------------------------------

def save_checkpoint(path: Path, state: dict) -> None:
    """Temporary file, fsync, rename; the previous checkpoint stays beside it as NAME.prev.pt."""
    atomic_write(path, lambda file: torch.save(state, file), keep=path.with_suffix(".prev.pt"))


def load_checkpoint(path: Path) -> dict | None:
    """The newest checkpoint that can be read: `path`, or the previous one if that is damaged. None if there is neither.

    weights_only=True: a checkpoint can hold tensors and plain values, and loading it can run no code.
    """
    damaged = []
    for candidate in (path, path.with_suffix(".prev.pt")):
        if not candidate.exists():
            continue
        try:
            state = torch.load(candidate, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds for a damaged file
            damaged.append(f"{candidate} ({type(error).__name__})")
            continue
        if damaged:
            print(f"damaged checkpoint: {damaged[0]}; using {candidate}", file=sys.stderr)
        return state
    if damaged:
        fail("no checkpoint can be read: " + ", ".join(damaged))
    return None


def describe_machine() -> dict[str, Any]:
    """What a result depends on besides its settings."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"torch": torch.__version__, "device": name, "threads": torch.get_num_threads(), "python": sys.version.split()[0]}


class Run:
    """A run folder: settings in, log lines and checkpoints out. It holds no training code.

    Args:
        config: the script's dataclass, written to config.json; `resume` and `out` in it do not count as settings.
        model, optimizers: restored from the newest checkpoint where config.resume is set.
        built_from: fingerprints of what the run is made from (weights, data); compared like settings.

    A folder whose config.json differs stops with the names of the settings that differ, and so does an unfinished run
    that was not asked to resume: nothing is overwritten that somebody may still want.
    """
    # what changes nothing in a result but its rounding
    IGNORED = ("resume", "out", "checkpoint_every", "evaluate_every", "dtype", "compile", "micro_batch_size")

    def __init__(self, config: Any, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer],
                 built_from: dict):
        self.folder, self.model, self.optimizers, self.config = Path(config.out), model, optimizers, config
        self.checkpoint_path, self.step, self.started = self.folder / "checkpoint.pt", 0, time.time()
        settings = {**dataclasses.asdict(config), "built_from": built_from}
        check_folder(config, built_from)
        write_json(self.folder / "config.json", {**settings, "machine": describe_machine()})
        rows = []
        if config.resume and (state := load_checkpoint(self.checkpoint_path)):
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step = state["step"]
            self.started -= state.get("seconds", 0)
            print(f"resuming {self.folder} at step {self.step}")
            if (self.folder / "log.jsonl").exists():  # rows after the checkpoint will be written again
                text = (self.folder / "log.jsonl").read_text().splitlines()
                rows = [line for line in text if line.endswith("}") and json.loads(line)["step"] < self.step]
        atomic_write(self.folder / "log.jsonl", "".join(row + "\n" for row in rows).encode())
        self.rows = [json.loads(row) for row in rows]
        self._log = open(self.folder / "log.jsonl", "ab", buffering=0)
        self._saved = time.time()
        self._interrupted = False
        if hasattr(signal, "SIGINT") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: Any) -> None:
        self._interrupted = True  # acted on between steps, when weights and optimizer agree
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once

    def log(self, **values: Any) -> None:
        """One JSON line; every script passes step=."""
        self.rows.append(values)
        try:
            self._log.write((json.dumps(values) + "\n").encode())
        except OSError as error:
            fail(f"{self.folder / 'log.jsonl'}: cannot be written ({error.strerror})")

    def check_finite(self, step: int, rows: torch.Tensor, **parts: float) -> None:
        """Stop before the optimizer sees a NaN or an infinity; the last good checkpoint stays as it is."""
        if not all(math.isfinite(value) for value in parts.values()):
            values = ", ".join(f"{name} = {value}" for name, value in parts.items())
            fail(f"step {step}: {values}; rows {rows.tolist()}. The last good checkpoint, if any, is in {self.folder}")

    def checkpoint(self, step: int) -> None:
        """After `step` steps are done: save if it is time to, and stop here if Ctrl-C was pressed."""
        if self._interrupted or time.time() - self._saved >= self.config.checkpoint_every:
            save_checkpoint(self.checkpoint_path, {"model": self.model.state_dict(), "step": step, "seconds": self.seconds(),
                                                   "optimizers": [o.state_dict() for o in self.optimizers]})
            self._saved = time.time()
            if self._interrupted:
                print(f"\nstopped after step {step}; go on with --resume", file=sys.stderr)
                raise SystemExit(130)

    def seconds(self) -> float:
        """Of training: of all the parts of a run that was resumed, without what was spent on evaluating on the way."""
        return round(time.time() - self.started, 1)

    def finish(self, model: torch.nn.Module | None = None, **extra: Any) -> None:
        """Write model.pt (weights and what describes them) and drop the checkpoints, which it replaces.

        Args:
            model: the one to keep, where more was trained than what is kept (PPO's value network is not).
        """
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._log.close()
        weights = {name: tensor.cpu() for name, tensor in (model or self.model).state_dict().items()}
        atomic_write(self.folder / "model.pt", lambda file: torch.save({"model": weights, **extra}, file))
        for path in (self.checkpoint_path, self.checkpoint_path.with_suffix(".prev.pt"),
                     *self.folder.glob(".*.tmp")):  # these, a kill in the middle of a write has left
            path.unlink(missing_ok=True)
        if self._interrupted:  # pressed after the last step: the model is safe, what comes after it need not be done
            raise KeyboardInterrupt


def check_folder(config: Any, built_from: dict | None = None) -> None:
    """Stop if config.out cannot take this run: made with other settings, unfinished and not to be resumed, not writable.

    Changes nothing, so every script asks before it builds what the run needs, which can take hours; Run asks again when
    it is known what the run is built from.
    """
    folder = Path(config.out)
    settings = dataclasses.asdict(config) | ({"built_from": built_from} if built_from else {})
    compare_settings(folder, settings, "give another folder with --out, or delete this one")
    if any((folder / name).exists() for name in ("checkpoint.pt", "checkpoint.prev.pt")) and not config.resume:
        fail(f"{folder} holds an unfinished run: go on with --resume, or delete the folder")
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        fail(f"{folder}: cannot be written ({there} is {'not writable' if there.is_dir() else 'not a folder'})")


def finished(config: Any, built_from: dict | None = None) -> bool:
    """Whether config.out holds a finished run of exactly these settings; other settings stop with what differs."""
    folder = Path(config.out)
    settings = dataclasses.asdict(config) | ({"built_from": built_from} if built_from else {})
    compare_settings(folder, settings, "name the one to use explicitly (--sft FOLDER), or delete it")
    return (folder / "model.pt").exists()


def compare_settings(folder: Path, settings: dict, advice: str) -> None:
    """Stop with the names of the settings in which what lies in `folder` differs from what is wanted now."""
    if not (folder / "config.json").exists():
        return
    old = read_json(folder / "config.json")
    new = json.loads(json.dumps(settings))
    differ = [f"{name} was {old.get(name)!r}, now {new[name]!r}" for name in new
              if name not in Run.IGNORED and old.get(name) != new[name]]
    if differ:
        fail(f"{folder} was made with other settings: {'; '.join(differ)}: {advice}")
