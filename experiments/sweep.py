"""Run many commands of this repository, a few at a time, so that a sweep can be stopped and started again at any moment.

Every run is a plain command (`python dpo.py ...`), printed as it starts, in a process of its own: on a CPU one for each
core with one thread each, which is faster than one run on all of them. A run that is finished is not run again, one that
was stopped goes on from its checkpoint, one that was made with other settings stops the sweep and is named.
"""
from __future__ import annotations

import ctypes
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common import ROOT, fail
from common.files import read_json
from common.run import finished
from common.settings import defaults
from common.training import device


class Planned(NamedTuple):
    method: str
    setting: str  # "beta 0.1"
    seed: int
    script: str
    config: Any  # the script's Config

    def command(self) -> list[str]:
        """What a user would type: the settings that differ from the defaults of this dataset and preset."""
        on = {"on": self.config.on} if hasattr(self.config, "on") else {}
        default, flags = defaults(type(self.config), self.config.dataset, self.config.preset, **on), []
        for field in fields(self.config):
            value = getattr(self.config, field.name)
            named = field.name in ("on", "out", "dataset", "preset")  # the default depends on these, or is made of others
            if value != (field.default if named else getattr(default, field.name)):
                flags += ["--" + field.name.replace("_", "-")] + ([] if value is True else [str(value)])
        return [f"{self.script}.py", *flags]


def die_with_parent() -> None:
    """In a child, on Linux: a sweep that is killed must not leave runs behind that its next start would run into."""
    try:
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        pass


def is_there(run: Planned, weights: str | dict[str, str]) -> bool:
    """Whether the run is finished. One with other settings, or from another SFT policy, stops the sweep before it starts.

    Args:
        weights: fingerprint of the SFT policy; or of each, by its folder, where the runs start from several.
    """
    if isinstance(weights, dict):
        weights = weights[run.config.sft]
    path = Path(run.config.out) / "config.json"
    built_from = read_json(path)["built_from"] if path.exists() else {"sft": weights}
    if built_from.get("sft", built_from.get("init")) != weights:
        fail(f"{path.parent} was made from another SFT policy: delete it")
    return finished(run.config)


def run_all(planned: list[Planned], workers: int, folder: Path, weights: str | dict[str, str]) -> None:
    """Run what is not finished, `workers` at a time. Ctrl-C lets every run write its checkpoint first."""
    left = [p for p in planned if not is_there(p, weights)]
    threads = 1 if device().type == "cpu" and workers > 1 else torch.get_num_threads()
    running: dict[subprocess.Popen, tuple[Planned, Path]] = {}
    started, total = time.time(), len(left)
    print(f"{len(planned)} runs, {len(planned) - total} of them there; {workers} at a time")
    try:
        while left or running:
            while left and len(running) < workers:
                run, output = left[0], folder / "output" / f"{Path(left[0].config.out).name}.txt"
                output.parent.mkdir(parents=True, exist_ok=True)
                print(f"[{len(planned) - len(left) + 1}/{len(planned)}, {(time.time() - started) / 60:.0f} min] python "
                      + shlex.join(run.command()), flush=True)
                with open(output, "wb") as file:
                    process = subprocess.Popen([sys.executable, ROOT / run.command()[0], *run.command()[1:]], stdout=file,
                                               stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                                               env={**os.environ, "OMP_NUM_THREADS": str(threads)}, preexec_fn=die_with_parent)
                running[process] = left.pop(0), output
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                run, output = running.pop(process)
                if process.returncode:
                    lines = output.read_text(errors="replace").replace("\r", "\n").strip().splitlines()
                    said = lines[-1] if lines else f"exit status {process.returncode}"
                    fail(f"python {shlex.join(run.command())}: {said} (all of it: {output})")
    finally:  # a run that failed, or Ctrl-C: the others write their checkpoints and stop
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:  # a shell may have told it to ignore Ctrl-C; its last checkpoint is there
                process.kill()


def mean_se(values: list[float]) -> tuple[float, float]:
    """Mean and standard error over seeds; one seed has no error."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), (x.std() / math.sqrt(len(x))).item() if len(x) > 1 else math.nan
