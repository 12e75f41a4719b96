"""Comparisons of items: files of them, counts of them, and the winners of a preference matrix.

A CSV file has these columns, and others, which are ignored:

    left,right,outcome[,weight]     outcome: left, right or tie
    winner,loser[,weight]
    ranking,position,item           one row a place; position 1 is the best

A row counts as often as its weight says, once without one. NumPy only.
"""
from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np

from common import fail, short
from common.figures import figure, plain
from common.files import atomic_write

KINDS = [("left", "right", "outcome"), ("winner", "loser"), ("ranking", "position", "item")]
OUTCOMES = ("left", "right", "tie")
NUMBER = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
MAX_ITEMS = 5000  # a fit needs a dozen matrices of items x items, 200 MB each at this size


# ---- reading -------------------------------------------------------------------------------------

class Comparisons(NamedTuple):
    names: list[str]  # of the items, in order of appearance
    left: list[int]  # an item of each comparison; the winner, where the file has no sides
    right: list[int]
    outcome: list[str]  # left, right or tie
    weight: list[float]

    def counts(self) -> list[np.ndarray]:
        """How often the item of the row, on the left, won, lost and tied, (K, K) each."""
        left, right, outcome, weight = (np.array(column) for column in self[1:])
        K = len(self.names)
        return [count(left[outcome == o], right[outcome == o], K, weight[outcome == o])
                for o in OUTCOMES]

    def wins(self) -> np.ndarray:
        """How often i beat j, (K, K), on either side, with a tie as half a win."""
        wins, losses, ties = self.counts()
        return wins + losses.T + (ties + ties.T) / 2


class Rankings(NamedTuple):
    names: list[str]
    rankings: list[list[int]]  # items, best first


def read_comparisons(path: str) -> Comparisons | Rankings:
    """The file's rows; a mistake stops with file, line, field and what was expected."""
    rows = read_csv(path)
    if not rows:
        fail(f"{path}: is empty")
    (where, columns), *rows = rows
    kind = next((kind for kind in KINDS if set(kind) <= set(columns)), None)
    if kind is None:
        expected = " or ".join(",".join(kind) for kind in KINDS)
        fail(f"{where}: expected the columns {expected}, found {short(','.join(columns))!r}")
    for name in columns:
        if name and columns.count(name) > 1:
            fail(f"{where}: the column {short(name)!r} is there twice")
    if not rows:
        fail(f"{path}: has no row under its columns")
    for where, cells in rows:
        if any(cells[len(columns):]):
            fail(f"{where}: has {len(cells)} cells under {len(columns)} columns (a number with a "
                 "comma in it?)")
    rows = [(where, dict(zip(columns, cells))) for where, cells in rows]
    needed = [*kind, "weight"] if "weight" in columns and kind != KINDS[2] else kind
    for where, row in rows:
        for name in needed:
            if not row.get(name):
                fail(f"{where}: {name} is missing")
    data = rankings_of(rows) if kind == KINDS[2] else comparisons_of(rows, kind)
    if len(data.names) < 2:
        fail(f"{path}: has only one item, {short(data.names[0])!r}")
    if kind != KINDS[2] and not any(data.weight):
        fail(f"{path}: has no weight above 0")
    if len(data.names) > MAX_ITEMS:
        fail(f"{path}: has {len(data.names)} items; more than {MAX_ITEMS} need too much memory")
    return data


def read_csv(path: str) -> list[tuple[str, list[str]]]:
    """Where each row stands and its cells, without blanks around them; empty rows are left out."""
    try:
        raw = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
        fail(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fail(f"{path}, line {error.object[:error.start].count(10) + 1}: not UTF-8")
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    rows = []
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append((f"{path}, line {reader.line_num}", [cell.strip() for cell in row]))
    except csv.Error as error:
        fail(f"{path}, line {reader.line_num}: {error}")
    return rows


def rankings_of(rows: list[tuple[str, dict[str, str]]]) -> Rankings:
    index: dict[str, int] = {}  # item -> its number
    places: dict[str, dict[int, int]] = {}  # ranking -> position -> item
    for where, row in rows:
        if not re.fullmatch("0*[1-9][0-9]{0,8}", row["position"]):
            fail(f"{where}: position {short(row['position'], 40)!r}, expected a whole number from "
                 "1 (the best) to 999999999")
        position = int(row["position"])
        ranking = places.setdefault(row["ranking"], {})
        item = index.setdefault(row["item"], len(index))
        if position in ranking:
            fail(f"{where}: ranking {short(row['ranking'])!r} has a position {position} already")
        if item in ranking.values():
            fail(f"{where}: ranking {short(row['ranking'])!r} has {short(row['item'])!r} already")
        ranking[position] = item
    rankings = [[ranking[position] for position in sorted(ranking)] for ranking in places.values()]
    return Rankings(list(index), rankings)


def comparisons_of(rows: list[tuple[str, dict[str, str]]], kind: tuple[str, ...]) -> Comparisons:
    index: dict[str, int] = {}  # item -> its number
    compared = []
    for where, row in rows:
        left, right = (index.setdefault(row[name], len(index)) for name in kind[:2])
        if left == right:
            fail(f"{where}: {short(row[kind[0]])!r} is compared with itself")
        outcome = row["outcome"] if kind == KINDS[0] else "left"
        if outcome not in OUTCOMES:
            fail(f"{where}: outcome {short(outcome)!r}, expected left, right or tie")
        weight = row.get("weight", "1")
        if not NUMBER.fullmatch(weight) or float(weight) > 1e12:
            fail(f"{where}: weight {short(weight, 40)!r}, expected a number from 0 to 10^12")
        compared.append((left, right, outcome, float(weight)))
    return Comparisons(list(index), *map(list, zip(*compared)))


# ---- writing a leaderboard -----------------------------------------------------------------------

def write_csv(path: Path, rows: list[list]) -> None:
    """A CSV file, written whole or not at all."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    atomic_write(path, text.getvalue().encode())


def write_leaderboard(folder: Path, rows: list[dict], P: np.ndarray) -> None:
    """leaderboard.csv, probabilities.csv and figure.png.

    Args:
        rows: what leaderboard.csv has of each item, best first.
        P: (K, K) how likely the item of the row is to beat that of the column, in the same order.
    """
    table = [list(rows[0])]
    for row in rows:
        numbers = [f"{row[key]:z.6f}" for key in ("strength", "error", "low", "high")]
        table.append([row["rank"], row["item"], *numbers, row["best_rank"], row["worst_rank"],
                      f"{row['comparisons']:.15g}"])
    write_csv(folder / "leaderboard.csv", table)
    matrix = [["", *(row["item"] for row in rows)]]
    for row, probabilities in zip(rows, P):
        matrix.append([row["item"], *(f"{p:.6f}" for p in probabilities)])
    write_csv(folder / "probabilities.csv", matrix)
    draw_strengths(folder / "figure.png", rows)


def print_leaderboard(rows: list[dict], P: np.ndarray, counted: str) -> None:
    """The same for the terminal; P only where 12 items or fewer leave room for it.

    Args:
        counted: what the last column counts, comparisons or rankings.
    """
    width = max(4, *(len(row["item"]) for row in rows))
    print(f"\nrank  {'item':{width}}  strength    s.e.        95%        ranks  {counted}")
    for row in rows:
        numbers = f"{row['strength']:z8.4f}  {row['error']:6.4f}"
        interval = f"{row['low']:z6.2f} to {row['high']:z5.2f}"
        ranks = f"{row['best_rank']} to {row['worst_rank']}"
        print(f"{row['rank']:4}  {row['item']:{width}}  {numbers}  {interval}  {ranks:>8}  "
              f"{row['comparisons']:.15g}")
    if len(rows) <= 12:
        heads = "".join(f"{row['item'][:7]:>8}" for row in rows)
        print(f"\nP(row beats column):\n{'':{width}}{heads}")
        for i, row in enumerate(rows):
            cells = [f"{p:8.3f}" for p in P[i]]
            cells[i] = "       -"
            print(f"{row['item']:{width}}{''.join(cells)}")


def draw_strengths(path: Path, rows: list[dict]) -> None:
    """Strengths with their intervals, the best on top; of longer tables the best 100."""
    rows = rows[:100]
    strengths, low, high = (np.array([row[key] for row in rows])
                            for key in ("strength", "low", "high"))
    # no bar is negative, though an interval of the bootstrap need not hold the estimate
    bars = np.stack([strengths - low, high - strengths]).clip(0)
    place = -np.arange(len(rows))
    with figure(path, width=7, height=1.2 + 0.22 * len(rows)) as (_, axis):
        axis.errorbar(strengths, place, xerr=bars, fmt="o", capsize=3)
        axis.set_yticks(place, [plain(row["item"]) for row in rows])
        axis.set(xlabel="strength, with 95% intervals")


# ---- counting ------------------------------------------------------------------------------------

def count(winners: Sequence[int], losers: Sequence[int], K: int,
          weights: Sequence[float] | None = None) -> np.ndarray:
    """A list of comparisons as a matrix (K, K): how often the row's item beat the column's."""
    pairs = np.asarray(winners) * K + np.asarray(losers)
    return np.bincount(pairs, weights, K * K).reshape(K, K).astype(float)


# ---- winners of a preference matrix P, (K, K): P[i, j] is how likely i is to be preferred to j ---

# rock beats scissors beats paper beats rock, 80% each
CYCLE = np.array([[0.5, 0.8, 0.2],
                  [0.2, 0.5, 0.8],
                  [0.8, 0.2, 0.5]])
# A beats all three narrowly; B loses to A and beats the other two by far
DISAGREE = np.array([[0.5, 0.51, 0.51, 0.51],
                     [0.49, 0.5, 0.95, 0.95],
                     [0.49, 0.05, 0.5, 0.5],
                     [0.49, 0.05, 0.5, 0.5]])
# A beats rock, scissors and paper, but loses to E, which loses to all three: no Condorcet winner;
# A is the Copeland winner
UPSET = np.array([[0.5, 0.7, 0.7, 0.7, 0.3],
                  [0.3, 0.5, 0.7, 0.3, 0.7],
                  [0.3, 0.3, 0.5, 0.7, 0.7],
                  [0.3, 0.7, 0.3, 0.5, 0.7],
                  [0.7, 0.3, 0.3, 0.3, 0.5]])


def condorcet(P: np.ndarray) -> int | None:
    """The item that is preferred to every other one; there may be none."""
    beats = (P > 0.5) | np.eye(len(P), dtype=bool)
    winners = np.flatnonzero(beats.all(1))
    return int(winners[0]) if len(winners) else None


def copeland_scores(P: np.ndarray) -> np.ndarray:
    """Victories less defeats of each item, (K,)."""
    score = np.sign(P - 0.5)
    np.fill_diagonal(score, 0)
    return score.sum(1)


def copeland(P: np.ndarray) -> list[int]:
    """The items with the most victories less defeats."""
    score = copeland_scores(P)
    return np.flatnonzero(score == score.max()).tolist()


def borda(P: np.ndarray) -> list[int]:
    """The items with the highest expected score against another item drawn at random."""
    score = np.where(np.eye(len(P), dtype=bool), 0, P).sum(1)
    return np.flatnonzero(np.isclose(score, score.max(), rtol=0, atol=1e-12)).tolist()


def winners(P: np.ndarray, names: Sequence[str]) -> str:
    """The three as a line of text."""
    best = condorcet(P)
    return (f"Condorcet {'none' if best is None else names[best]}; "
            f"Copeland {', '.join(names[i] for i in copeland(P))}; "
            f"Borda {', '.join(names[i] for i in borda(P))}")
