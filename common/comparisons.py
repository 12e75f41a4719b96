"""A CSV file of comparisons or rankings, read and checked: what bt.py fits.

    left,right,outcome[,weight]     outcome: left, right or tie
    winner,loser[,weight]
    ranking,position,item           one row a place; position 1 is the best

Other columns are ignored. A row counts as often as its weight says, once without one.
"""
from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import NamedTuple

from common import fail

KINDS = [("left", "right", "outcome"), ("winner", "loser"), ("ranking", "position", "item")]
OUTCOMES = ("left", "right", "tie")


class Comparisons(NamedTuple):
    names: list[str]  # of the items, in order of appearance
    left: list[int]  # an item of each comparison; that of the winner, where the file has no sides
    right: list[int]
    outcome: list[str]  # left, right or tie
    weight: list[float]


class Rankings(NamedTuple):
    names: list[str]
    rankings: list[list[int]]  # items, best first


def read_comparisons(path: str) -> Comparisons | Rankings:
    """The file's rows; a mistake stops with file, line, field and what was expected."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        fail(f"{path}: cannot be read ({error.strerror})")
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
    if not rows:
        fail(f"{path}: is empty")
    (where, columns), *rows = rows
    kind = next((kind for kind in KINDS if set(kind) <= set(columns)), None)
    if kind is None:
        fail(f"{where}: expected the columns {' or '.join(','.join(kind) for kind in KINDS)}, found {','.join(columns)!r}")
    if not rows:
        fail(f"{path}: has no row under its columns")

    index: dict[str, int] = {}  # item -> its number
    places: dict[str, dict[int, int]] = {}  # ranking -> position -> item
    compared = []
    for where, cells in rows:
        row = dict(zip(columns, cells))
        for name in (*kind, "weight") if kind is not KINDS[2] else kind:
            if name in columns and not row.get(name):
                fail(f"{where}: {name} is missing")
        if kind is KINDS[2]:
            if not row["position"].isdecimal():
                fail(f"{where}: position {row['position']!r}, expected a whole number, 1 for the best")
            ranking, position = places.setdefault(row["ranking"], {}), int(row["position"])
            item = index.setdefault(row["item"], len(index))
            if position in ranking:
                fail(f"{where}: ranking {row['ranking']!r} has a position {position} already")
            if item in ranking.values():
                fail(f"{where}: ranking {row['ranking']!r} has {row['item']!r} already")
            ranking[position] = item
            continue
        left, right = (index.setdefault(row[name], len(index)) for name in kind[:2])
        outcome, weight = row.get("outcome", "left") if kind is KINDS[0] else "left", row.get("weight", "1")
        if left == right:
            fail(f"{where}: {row[kind[0]]!r} is compared with itself")
        if outcome not in OUTCOMES:
            fail(f"{where}: outcome {outcome!r}, expected left, right or tie")
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf:
            fail(f"{where}: weight {weight!r}, expected a number that is not negative")
        compared.append((left, right, outcome, number))
    if len(index) < 2:
        fail(f"{path}: has only one item, {next(iter(index))!r}")
    if places:
        return Rankings(list(index), [[ranking[position] for position in sorted(ranking)] for ranking in places.values()])
    return Comparisons(list(index), *map(list, zip(*compared)))
