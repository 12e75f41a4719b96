"""The run folder: settings in, log and checkpoints out, safe against a kill at any moment.

A run folder holds  config.json     every setting, what the run was built from, and the machine
                    log.jsonl       one JSON object a line
                    checkpoint.pt, checkpoint.prev.pt   while training: weights, optimizers, step
                    tokenizer.tiktoken, evaluation.json, samples.jsonl, figure.png
                    model.pt        the finished model, written last: where it is, all of the run is

The training loop is not here: it stays whole in its script, which calls log, check_finite and
checkpoint at every step.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import torch
import torch.nn as nn

from common import fail, settings, short
from common.files import (atomic_write, check_writable, delete, lock, read_json_object, unlock,
                          write_json)
from common.processes import RANK, agree
from common.sharding import load_state, whole_state
from common.training import device
from model import GPT, GPTConfig

# what a shell shows of a process that a signal has ended
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
if hasattr(signal, "SIGBREAK"):  # Windows
    STATUS[signal.SIGBREAK] = 130


# ---- tensors on disk -----------------------------------------------------------------------------

def digest(value: Any) -> str:
    """SHA-256 of tensors and plain values, in any nesting of dicts and lists: one flipped bit is
    another digest."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(repr((tuple(value.shape), value.dtype)).encode())
            found.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
        elif isinstance(value, dict):
            for name, item in value.items():
                found.update(repr(name).encode())
                add(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            found.update(repr(value).encode())

    add(value)
    return found.hexdigest()


def save_tensors(path: Path, state: dict, keep: Path | None = None) -> None:
    """A dict of tensors and plain values, with a checksum; the file that was there goes to
    `keep`."""
    state = {**state, "checksum": digest(state)}
    atomic_write(path, lambda file: torch.save(state, file), keep)


def load_tensors(path: Path) -> dict:
    """What save_tensors wrote. weights_only=True: such a file holds tensors and plain values, and
    can run no code.

    Raises ValueError if the file is damaged; torch.load itself checks only a part of it.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise ValueError(type(error).__name__) from error
    if not isinstance(state, dict):
        raise ValueError(f"a {type(state).__name__}")
    checksum = state.pop("checksum", None)
    if checksum is not None and checksum != digest(state):
        raise ValueError("its checksum does not fit")
    return state


def save_checkpoint(path: Path, state: dict) -> None:
    """Temporary file, fsync, rename; the previous checkpoint stays beside it as NAME.prev.pt."""
    save_tensors(path, state, keep=path.with_suffix(".prev.pt"))


def load_checkpoint(path: Path, *needed: str) -> dict | None:
    """The newest checkpoint that is whole and has all that is `needed`: `path`, or the previous one
    if that is damaged. None if there is neither."""
    damaged = []
    for candidate in (path, path.with_suffix(".prev.pt")):
        if not candidate.exists():
            continue
        try:
            state = load_tensors(candidate)
            if missing := set(needed) - state.keys():
                raise ValueError(f"no {min(missing)!r} in it")
        except ValueError as error:
            damaged.append(f"{candidate} ({error})")
            continue
        if damaged:
            print(f"damaged checkpoint: {damaged[0]}; using {candidate}", file=sys.stderr)
        return state
    if damaged:
        fail("no checkpoint can be read: " + ", ".join(damaged))
    return None


# ---- the run -------------------------------------------------------------------------------------

def describe_machine() -> dict[str, Any]:
    """What a result depends on besides its settings."""
    name = platform.processor() or platform.machine()
    if device().type == "cuda":
        name = torch.cuda.get_device_name()
    return {
        "torch": torch.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0]
    }


class Run:
    """A run folder that is being written. It holds no training code.

    Args:
        config: the script's dataclass, written to config.json.
        model, optimizers: restored from the newest checkpoint where config.resume is set.
        built_from: what the run is made from (weights, data, reward), as fingerprints; compared
            like settings.
        steps: training steps in all. After the last one there is always a checkpoint, from which a
            run that is stopped while it is evaluated goes on.
        state: further numbers that training changes (PPO's beta); saved and restored with the
            weights.

    A folder whose config.json differs stops with the names of the settings that differ, and so does
    an unfinished run that was not asked to resume: nothing is overwritten that somebody may still
    want.
    """

    def __init__(self,
                 config: Any,
                 model: nn.Module,
                 optimizers: list[torch.optim.Optimizer],
                 built_from: dict[str, Any],
                 steps: int,
                 state: dict[str, float] | None = None):
        self.config, self.model, self.optimizers, self.steps = config, model, optimizers, steps
        self.folder, self.state = Path(config.out), state or {}
        self.checkpoint_path = self.folder / "checkpoint.pt"
        self.step, self.rows, self.started = 0, [], time.time()
        self._stop = 0  # the signal that asked us to stop
        self._handlers: dict[int, Any] = {}  # of the signals, before this run took them
        check_folder(config, built_from)
        self.folder.mkdir(parents=True, exist_ok=True)
        lock(self.folder)
        if config.resume:
            self._restore()
        if self.step == 0:  # a run that begins anew is unfinished until it has ended
            delete(self.folder / name for name in ("model.pt", "evaluation.json"))
        write_json(self.folder / "config.json",
                   {"script": str(settings.script_of(type(config))), **dataclasses.asdict(config),
                    "built_from": built_from, "machine": describe_machine()})
        atomic_write(self.folder / "log.jsonl",
                     "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        # of several processes only the first writes
        log = self.folder / "log.jsonl" if RANK == 0 else os.devnull
        self._log = open(log, "ab", buffering=0)
        self._saved = time.time()
        if self.step < steps:
            self._catch_signals()
        if different := settings.differences(config):
            print(f"{settings.script_of(type(config))} with {different}")

    def _restore(self) -> None:
        """Weights, optimizers, state and log as they were at the newest checkpoint, if there is
        one."""
        saved = load_checkpoint(self.checkpoint_path, "model", "optimizers", "state", "step",
                                "seconds", "rows")
        if saved is None:
            return
        if not (self.folder / "config.json").exists():
            fail(f"{self.folder}: a checkpoint without config.json; with which settings it was "
                 "made is not known")
        if not 0 < saved["step"] <= self.steps:
            fail(f"{self.checkpoint_path}: is of step {saved['step']}, and this run has "
                 f"{self.steps}")
        try:
            load_state(self.model, self.optimizers, saved)
        except (RuntimeError, ValueError, KeyError) as error:
            fail(f"{self.checkpoint_path}: is of another model ({short(error)})")
        self.state.update(saved["state"])
        self.step = saved["step"]
        self.started -= saved["seconds"]
        # what came later will be logged again
        self.rows = read_log(self.folder / "log.jsonl", before=self.step)
        if len(self.rows) != saved["rows"]:
            fail(f"{self.folder / 'log.jsonl'}: has {len(self.rows)} of the {saved['rows']} rows "
                 f"before step {self.step}")
        print(f"resuming {self.folder} at step {self.step}")

    def _catch_signals(self) -> None:
        """Ctrl-C and SIGTERM wait for the step in hand, so that weights and optimizer agree in the
        checkpoint."""
        for number in STATUS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._interrupt)

    def _release_signals(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _interrupt(self, number: int, _: Any) -> None:
        self._stop = number
        self._release_signals()  # a second Ctrl-C stops at once

    def log(self, **values: Any) -> None:
        """One JSON line; every script passes step=."""
        self.rows.append(values)
        try:
            self._log.write((json.dumps(values) + "\n").encode())
        except OSError as error:
            fail(f"{self.folder / 'log.jsonl'}: cannot be written ({error.strerror})")

    def check_finite(self, step: int, rows: torch.Tensor, **values: float) -> None:
        """Stop before the optimizer sees a NaN or an infinity; the last good checkpoint stays as it
        is."""
        if not all(math.isfinite(value) for value in values.values()):
            self._release_signals()  # this run can no longer answer them
            named = ", ".join(f"{name} = {value}" for name, value in values.items())
            fail(f"step {step}: {named}; rows {rows.tolist()}. The last good checkpoint, if any, "
                 f"is in {self.folder}")

    def checkpoint(self, step: int) -> None:
        """After `step` steps are done: save if it is time to or if it was the last, and stop here
        if asked to."""
        last = step == self.steps
        due = time.time() - self._saved >= self.config.checkpoint_every
        self._stop, due = agree(self._stop), agree(due)
        if self._stop or last or due:
            if RANK == 0:
                os.fsync(self._log.fileno())
            save_checkpoint(
                self.checkpoint_path, {
                    "model": whole_state(self.model.state_dict()),
                    "optimizers": whole_state([o.state_dict() for o in self.optimizers]),
                    "state": self.state,
                    "step": step,
                    "seconds": self.seconds(),
                    "rows": len(self.rows)
                })
            self._saved = time.time()
        if self._stop:
            again = "go on with --resume"
            if self.config.resume:
                again = "run the same command again to go on"
            print(f"\nstopped after step {step}; {again}", file=sys.stderr)
            raise SystemExit(STATUS[self._stop])
        if last:
            self._release_signals()  # nothing that is still to do could be lost

    def seconds(self) -> float:
        """Of training: of all the parts of a run that was resumed, without what was spent on
        evaluating on the way."""
        return round(time.time() - self.started, 1)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside takes no time of the method's own."""
        started = time.time()
        yield
        self.started += time.time() - started

    def finish(self, model: nn.Module, tokenizer: Any) -> None:
        """The end: tokenizer, then model.pt (weights and what describes them), and the checkpoints
        go.

        Args:
            model: the one to keep; PPO trains a value network, too, which is not.
        """
        self._log.close()
        tokenizer.save(self.folder / "tokenizer.tiktoken")
        weights = whole_state(model.state_dict())
        weights = {name: tensor.cpu() for name, tensor in weights.items()}
        save_tensors(
            self.folder / "model.pt", {
                "model": weights,
                "kind": type(model).__name__,
                "architecture": dataclasses.asdict(model.config),
                "dataset": self.config.dataset,
                "tokenizer": tokenizer.fingerprint
            })
        delete([self.checkpoint_path, self.checkpoint_path.with_suffix(".prev.pt"),
                *self.folder.glob(".*.tmp")])
        unlock(self.folder)


def read_log(path: Path, before: float = math.inf) -> list[dict]:
    """The rows of a log.jsonl whose step is less than `before`; it ends at the first line that is
    no such row."""
    rows: list[dict] = []
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        fail(f"{path}: cannot be read ({error.strerror})")
    for line in lines:
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, TypeError, KeyError):
            break
        if step < before:
            rows.append(row)
    return rows


# ---- folders that are there ----------------------------------------------------------------------

def check_folder(config: Any, built_from: dict | None = None,
                 advice: str = "give another folder with --out, or delete this one") -> None:
    """Stop if config.out cannot take this run: made with other settings, unfinished and not to be
    resumed, not writable.

    Changes nothing, so every script asks before it builds what the run needs, which can take hours;
    Run asks again when it is known what the run is built from. `advice` says what to do about other
    settings.
    """
    check_writable(config.out)
    folder = Path(config.out)
    compare_settings(folder, config, built_from, advice)
    if any((folder / name).exists()
           for name in ("checkpoint.pt", "checkpoint.prev.pt")) and not config.resume:
        fail(f"{folder} holds an unfinished run: go on with --resume, or delete the folder")


def finished(config: Any, built_from: dict | None = None) -> bool:
    """Whether config.out holds a finished run of these settings, made from this; another one stops
    with what differs."""
    folder = Path(config.out)
    model = folder / "model.pt"
    compare_settings(folder, config, built_from, f"delete {folder} to make it again")
    if model.exists() and not (folder / "config.json").exists():
        fail(f"{folder}: a model without config.json; with which settings it was made is not known")
    if model.exists() and not model.stat().st_size:
        fail(f"{model}: is empty; delete {folder}")
    return model.exists()


def compare_settings(folder: Path, config: Any, built_from: dict | None, advice: str) -> None:
    """Stop with the names of the settings in which what lies in `folder` differs from what is
    wanted now.

    Args:
        config: a Config, or a dict for what has none (pairs, the bank). A setting that an old
            config.json lacks had its default then: the field is newer than the run.
        built_from: what it must be made from. What an old config.json does not say of that is not
            known.
    """
    path = folder / "config.json"
    if not path.exists():
        return
    old = read_json_object(path)
    if dataclasses.is_dataclass(config):
        choice = {name: getattr(config, name)
                  for name in ("dataset", "preset", "on") if hasattr(config, name)}
        default = settings.defaults_of(type(config), **choice)
        config = dataclasses.asdict(config)
    else:
        default = {}
    differ = []
    made_from = old.get("built_from") if isinstance(old.get("built_from"), dict) else {}
    for name, value in json.loads(json.dumps(config)).items():
        before = old.get(name, default.get(name))
        if name == "sft" and "policy" in made_from:
            continue  # which policy it was is known, wherever it lay: "" is runs/<dataset>/sft
        if name not in settings.ROUNDING_ONLY and before != value:
            differ.append(f"{name} was {before!r}, now {value!r}")
    for name, value in (built_from or {}).items():
        if name not in made_from:
            differ.append(f"it does not say which {name} it was made from")
        elif made_from[name] != value:
            differ.append(f"{name} was {made_from[name]!r}, now {value!r}")
    if differ:
        fail(f"{folder} was made with other settings: {'; '.join(differ)}: {advice}")


def load_run(folder: str | Path, kind: type = GPT) -> tuple[nn.Module, dict]:
    """The model of a finished run (in eval mode, on the device) and what was saved with it.

    Raises SystemExit if the run is missing, unfinished, damaged, or of another kind (a reward model
    for a policy).
    """
    path = Path(folder) / "model.pt"
    if not path.exists():
        unfinished = "; it was stopped: go on with --resume" if (Path(folder) /
                                                                 "checkpoint.pt").exists() else ""
        fail(f"{folder}: no finished run there (no model.pt){unfinished}")
    if not (Path(folder) / "config.json").exists():
        fail(f"{folder}: a model without config.json; with which settings it was made is not known")
    try:
        state = load_tensors(path)
    except ValueError as error:
        fail(f"{path}: cannot be read ({error})")
    if missing := [
            name for name in ("model", "kind", "architecture", "dataset", "tokenizer")
            if name not in state
    ]:
        fail(f"{path}: cannot be read (no {missing[0]!r} in it)")
    if state["kind"] != kind.__name__:
        fail(f"{path} holds a {state['kind']}, expected a {kind.__name__}")
    try:
        model = kind(GPTConfig(**state["architecture"]))
        model.load_state_dict(state.pop("model"))
    except (TypeError, RuntimeError, AttributeError) as error:
        fail(f"{path}: cannot be read ({short(error)})")
    if bad := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        fail(f"{path}: {bad[0]} is not finite")
    return model.to(device()).eval(), state


def check_same_task(run: str | Path, meta: dict, expected: dict) -> None:
    """A model of another vocabulary or dataset stops here, with both named."""
    for name in sorted({"tokenizer", "dataset"} & set(expected)):
        if meta[name] != expected[name]:
            fail(f"{run} was trained with {name} {meta[name]!r}, expected {expected[name]!r}")
