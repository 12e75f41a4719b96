"""Figures: matplotlib, imported only where one is drawn, without a display."""
from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from common.files import atomic_write


@contextmanager
def figure(path: str | Path,
           columns: int = 1,
           width: float = 5.5,
           height: float = 4.2,
           formats: tuple[str, ...] = ("png", ),
           rows: int = 1,
           **subplots) -> Iterator:
    """with figure(path, 2) as (figure, axes): ... draws, and writes the file when all is drawn.

    Args:
        path: of the first format; the others go beside it.
        columns: axes, side by side; a single one is not in a list.
        width, height: of one of them, in inches.
        rows: of axes; those of all rows are in one list.
        subplots: further arguments of plt.subplots.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    drawn, axes = plt.subplots(rows,
                               columns,
                               figsize=(columns * width, rows * height),
                               layout="constrained",
                               **subplots)
    try:
        yield drawn, axes.ravel() if rows > 1 else axes
        for kind in formats:
            target = Path(path).with_suffix(f".{kind}")
            atomic_write(target, lambda file: drawn.savefig(file, format=kind, dpi=150))
    finally:
        plt.close(drawn)


def plain(text: str) -> str:
    """A name as it is, also where it has a dollar sign, which matplotlib would take for
    mathematics."""
    return text.replace("$", r"\$")
