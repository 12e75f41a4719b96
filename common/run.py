"""The run folder: settings in, log and checkpoints out, safe against a kill at any moment.

A run folder holds  config.json  every setting, and what the run was built from
                    log.jsonl    one JSON object a line
                    checkpoint.pt, checkpoint.prev.pt   while training: weights, optimizer, step
                    model.pt     the finished model (weights, architecture, tokenizer fingerprint)
                    tokenizer.tiktoken
"""
from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from common import fail
from common.files import atomic_write, read_json, write_json
from common.training import device
from model import GPT, GPTConfig


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


def load_run(folder: str | Path, kind: type = GPT) -> tuple[nn.Module, dict]:
    """The model of a finished run (in eval mode, on the device) and what was saved with it.

    Raises SystemExit if the run is missing, unfinished, damaged, or of another kind (a reward model for a policy).
    """
    path = Path(folder) / "model.pt"
    if not path.exists():
        fail(f"{folder}: no finished run there (no model.pt)" + (
            "; it was stopped: go on with --resume" if (Path(folder) / "checkpoint.pt").exists() else ""))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["kind"] == kind.__name__:
            model = kind(GPTConfig(**state["architecture"]))
            model.load_state_dict(state.pop("model"))
    except Exception as error:  # torch.load raises many kinds for a damaged file
        fail(f"{path}: cannot be read ({type(error).__name__})")
    if state["kind"] != kind.__name__:
        fail(f"{path} holds a {state['kind']}, expected a {kind.__name__}")
    if bad := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        fail(f"{path}: {bad[0]} is not finite")
    return model.to(device()).eval(), state
