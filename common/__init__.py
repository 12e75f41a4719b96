"""What several files need and no lesson depends on.

    settings.py     a dataclass becomes the command line; what a run folder is called
    pipeline.py     what a script starts from (data, policy, pairs, bank); built where it is missing
    training.py     device, dtype, random streams, batches, optimizers, running means
    processes.py    several processes, one run: who takes which rows, who writes
    sharding.py     --shard: where a model no longer fits one device
    run.py          the run folder: settings, log, checkpoints, resume; finished models
    memory.py       the responses that a policy has written
    rewards.py      gold, learned, FILE.py:function: one interface
    user_code.py    FILE.py:function: how it is loaded, and how its mistakes are named
    tasks.py        what a task is, and its prepared data
    own_data.py     a folder of your own files as a task
    pairs.py        preference pairs: the file, its checks, sampling and labels
    tokenizer.py    byte-level BPE
    gpt2.py         GPT-2 checkpoints in and out
    comparisons.py  CSV files of comparisons and rankings
    interleaving.py one list made of two rankings, and what clicks on it say
    tetris.py       the board of tamer.py, its features, logs of people
    pendulum.py     what preference_rl.py, pebble.py and dppo.py learn to swing up
    grid.py         two ways to plan in a world of few numbers, and episodes in it
    track.py        the road of dagger.py and dppo.py
    files.py        files that are written whole or not at all
    statistics.py, figures.py

Nothing here imports a script; pipeline.py calls them, inside its functions. Importing this package
imports no torch.
"""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]


def fail(message: str) -> NoReturn:
    """Stop with one clear line on stderr and exit status 1."""
    raise SystemExit(f"error: {message}")


def short(text: object, limit: int = 200) -> str:
    """A text as part of an error line: on one line, and not longer than that."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[:limit] + " ..."


if sys.version_info < (3, 11):
    fail(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}")


def _one_line(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """In place of a traceback, where the user or the machine stopped us and the code has no
    fault."""
    text = str(error)
    if kind is KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
    elif kind is BrokenPipeError:
        # `| head` has closed the pipe: nothing is left to say, and nobody to say it to
        sys.stdout = None
    elif issubclass(kind, MemoryError) or (kind is RuntimeError and "memory" in text) or (
            kind in (RuntimeError, ValueError) and
        ("too big" in text or "overflow" in text or "exceeded" in text)):
        print(f"error: not enough memory for these settings ({short(text)})", file=sys.stderr)
    elif kind is OSError and trace is not None and not error.filename:
        print(f"error: cannot write ({error.strerror})", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# Only for a script of this repository: who imports these files into a program of their own keeps
# their own hook. It is set here, by the first import of every script, so that Ctrl-C while torch is
# imported prints no traceback either.
_main = getattr(sys.modules.get("__main__"), "__file__", None)
if _main and ROOT in Path(_main).resolve().parents:
    sys.excepthook = _one_line
