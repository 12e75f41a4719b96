"""What several files need and no lesson depends on.

    settings.py     a dataclass becomes the command line
    files.py        files written atomically, and read with one-line errors
    training.py     device, dtype, batches, optimizers
    run.py          the run folder: settings, log, checkpoints, resume
    pairs.py, tokenizer.py, comparisons.py, tasks.py, gpt2.py
"""
from __future__ import annotations

from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]


def fail(message: str) -> NoReturn:
    """Stop with one clear line on stderr and exit status 1."""
    raise SystemExit(f"error: {message}")
