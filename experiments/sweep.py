r"""Run many commands of this repository, a few at a time, and go on with them after any stop.

    planned = with_sources(planned, start)
    done, stopped = run_all(planned, folder)    # python dpo.py --beta 0.1, python ppo.py, ...

Every run is a plain command in a process of its own, printed as it starts. On a CPU there is
one run for each core, with one thread each, which is faster than one run at a time on all of them.

A run that is finished is not run again, and one that was stopped goes on from its checkpoint. One
that was made with other settings, or from another SFT policy, other pairs or another reward, stops
the sweep by name before anything is run.

Ctrl-C (or SIGTERM) lets every run write its checkpoint. What is finished by then comes back, so
that a script can make its table and figure of that, and end with exit status STOPPED.

Several machines that share a disk: --print lists the runs that are still to do as commands, one a
line, once all that they share is built. Run them in any order, from the same folder; the next start
of the experiment finds them finished, and makes its table. Here on 8 cores of one machine; a SLURM
array takes a line a task.

    python experiments/frontier.py --print > runs.txt
    OMP_NUM_THREADS=1 xargs -d '\n' -P 8 -n 1 sh -c < runs.txt
    python experiments/frontier.py
"""
from __future__ import annotations

import ctypes
import dataclasses
import importlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

import dpo
import sft
from common import ROOT, fail, pipeline, short, tasks
from common.files import sha256
from common.processes import WORLD
from common.run import finished, read_log
from common.settings import command, script_of, typed
from common.training import device

STOPPED = 130  # exit status of a sweep that Ctrl-C has stopped, as a shell shows it
WINDOWS = sys.platform == "win32"


# ---- what is to be run ---------------------------------------------------------------------------

class PlannedRun(NamedTuple):
    """One run of a sweep: what its rows are called, and what is run."""
    method: str  # "DPO"
    setting: str  # "beta 0.1", which tells it from the other runs of its method
    seed: int
    config: Any  # Config of the script, with resume=True and its folder in `out`
    built_from: dict[str, str] = {}  # what it must be made from, as far as it is known: see Run


def is_finished(run: PlannedRun) -> bool:
    """Whether a run is finished. One of other settings, or made from something else, stops here."""
    if not finished(run.config, run.built_from):
        return False
    finished_log(run)
    return True


def finished_log(run: PlannedRun) -> list[dict]:
    """The log of a finished run, whose last row holds what the run has cost."""
    path = Path(run.config.out) / "log.jsonl"
    rows = read_log(path)
    if not rows or "seconds" not in rows[-1]:
        fail(f"{path}: its last row is missing; delete {path.parent} to run it again")
    return rows


def with_sources(planned: list[PlannedRun], start: pipeline.Start) -> list[PlannedRun]:
    """The same runs, each with the fingerprints of what it must be made from.

    Pairs and reward models that are missing are built here, so that no two runs build one at once.
    """
    known: dict[tuple, dict[str, str]] = {}
    runs = []
    for run in planned:
        # all runs of a script that have these settings in common learn from the same things
        learns_from = [getattr(run.config, name, "")
                       for name in ("labels", "prompts", "pairs_seed", "pairs", "reward", "loss")]
        key = (type(run.config), *learns_from)
        if key not in known:
            known[key] = sources(run.config, start)
        runs.append(run._replace(built_from=known[key]))
    return runs


def sources(config: Any, start: pipeline.Start) -> dict[str, str]:
    """What a run with this Config must be made from, as its script will write it down."""
    if isinstance(config, sft.Config):
        pairs = config.pairs or pipeline.sampled_pairs(start, tasks.load(start.dataset).labels,
                                                       seed=config.pairs_seed)
        return sft.built_from(config, str(pairs))
    if isinstance(config, dpo.Config):
        pairs = config.pairs or pipeline.sampled_pairs(start, config.labels, config.prompts,
                                                       config.pairs_seed)
        return dpo.built_from(config, dataclasses.replace(start, pairs_id=sha256(pairs)))
    reward = pipeline.reward(config, start)
    return importlib.import_module(script_of(type(config)).stem).built_from(start, reward)


def print_commands(planned: list[PlannedRun]) -> None:
    """What is not finished, as lines for a shell; nothing else goes to stdout."""
    waiting = [run for run in planned if not is_finished(run)]
    print(f"{len(planned)} runs, {len(planned) - len(waiting)} of them finished", file=sys.stderr)
    for run in waiting:
        print(shlex.join(words(run)))


def words(run: PlannedRun) -> list[str]:
    """The words of the run's whole command: Python, script, every flag."""
    script, *flags = command(run.config)
    return [sys.executable, str(ROOT / script), *flags]


# ---- running -------------------------------------------------------------------------------------

def run_all(planned: list[PlannedRun], folder: Path,
            workers: int = 0) -> tuple[list[PlannedRun], bool]:
    """Run what is not finished.

    Args:
        folder: of the sweep. What the runs print goes to its folder output/.
        workers: runs at a time; 0 = one for each core, or one on a GPU.
    Returns:
        The runs that are finished, in the order planned; and whether the sweep was stopped.
    Raises:
        SystemExit where a run has failed, with its command and the last line that it printed.
    """
    if WORLD > 1:
        fail("a sweep starts processes by itself, one for each core: start it without torchrun")
    if not workers:
        workers = os.cpu_count() or 1 if device().type == "cpu" else 1
    waiting = [run for run in planned if not is_finished(run)]
    print(f"{len(planned)} runs, {len(planned) - len(waiting)} of them finished; "
          f"{workers} at a time", flush=True)
    try:
        run_waiting(waiting, len(planned), folder, workers)
    except KeyboardInterrupt:
        done = [run for run in planned if is_finished(run)]
        print(f"\nstopped: {len(done)} of {len(planned)} runs are finished; "
              "the same command goes on with the others")
        return done, True
    return planned, False


def run_waiting(waiting: list[PlannedRun], total: int, folder: Path, workers: int) -> None:
    """Start the runs in their order, `workers` at a time, until all have ended."""
    threads = 1 if device().type == "cpu" and workers > 1 else torch.get_num_threads()
    running: dict[subprocess.Popen, PlannedRun] = {}
    number = total - len(waiting)  # of the run that was started last
    started = time.time()
    waiting = waiting.copy()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                run = waiting.pop(0)
                number += 1
                minutes = (time.time() - started) / 60
                print(f"[{number}/{total}, {minutes:.0f} min] {typed(run.config)}", flush=True)
                running[start(run, folder, threads)] = run
            time.sleep(0.2)
            for process in list(running):
                if process.poll() is not None:
                    check_end(running.pop(process), process.returncode, folder)
    finally:
        stop(list(running))  # none is left, unless one has failed or Ctrl-C was pressed


def start(run: PlannedRun, folder: Path, threads: int) -> subprocess.Popen:
    """The run's command as a process that Ctrl-C on the terminal does not reach: the sweep gets it,
    and passes it on."""
    if WINDOWS:
        alone: dict[str, Any] = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    else:
        alone = {"start_new_session": True, "preexec_fn": in_the_child}
    output = output_of(run, folder)
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "wb") as file:
        return subprocess.Popen(
            words(run),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            # UTF-8: a sample may hold any character, and Windows would write it to a file as cp1252
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8"},
            **alone)


def in_the_child() -> None:
    """Between fork and exec: the run listens to Ctrl-C, and on Linux it dies with the sweep."""
    # a shell script's `command &` ignores Ctrl-C, and its children would, too
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # if the sweep is killed, its runs must not go on, or the next sweep would start them twice
    try:
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        pass


def output_of(run: PlannedRun, folder: Path) -> Path:
    """The file for what a run prints."""
    return folder / "output" / f"{Path(run.config.out).name}.txt"


def check_end(run: PlannedRun, status: int, folder: Path) -> None:
    """A run that failed stops the sweep with its command and the last line that it printed."""
    if status == 0:
        return
    output = output_of(run, folder)
    text = output.read_text("utf-8", errors="replace").replace("\r", "\n")  # progress bars write \r
    lines = text.strip().splitlines()
    said = short(lines[-1]) if lines else f"exit status {status}"
    fail(f"{typed(run.config)}: {said} (all of it: {output})")


def stop(processes: list[subprocess.Popen]) -> None:
    """Ctrl-C for every run, which then writes its checkpoint; wait until they have ended. On
    Windows it is Ctrl-Break: a process group of its own does not hear Ctrl-C."""
    for process in processes:
        process.send_signal(signal.CTRL_BREAK_EVENT if WINDOWS else signal.SIGINT)
    for process in processes:
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:  # it hangs; its last checkpoint is there
            process.kill()
