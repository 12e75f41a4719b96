"""Tetris: 10 columns, 20 rows, seven pieces, each as likely as the next. NumPy only.

A board is ten integers, one a column: bit r is set where row r (0 is the bottom) is filled. Then a
drop is a shift, a full row is what all ten columns have in common, and a height is the number of
bits; and all placements of a piece, or those of a hundred games, are tried in one go.

A placement is a rotation and a column, from which the piece is dropped straight down: nothing is
slid under an overhang. A game ends when the next piece has no placement that stays on the board.
"""
from __future__ import annotations

import re
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

from common import fail
from common.files import read_lines

WIDTH, HEIGHT = 10, 20
EVERY_ROW = (1 << HEIGHT) - 1
PIECES = {  # each as it falls, top row first, and the number of different rotations
    "I": (("####", ), 2),
    "O": (("##", "##"), 1),
    "T": ((".#.", "###"), 4),
    "S": ((".##", "##."), 2),
    "Z": (("##.", ".##"), 2),
    "L": (("#.", "#.", "##"), 4),
    "J": ((".#", ".#", "##"), 4),
}
NOWHERE = 99  # the lowest cell of a piece in a column that it does not cover


class Placements(NamedTuple):
    """All placements, of all pieces: n = 162. Those of piece p are first[p] to first[p + 1] - 1."""
    first: np.ndarray  # (8,)
    cells: np.ndarray  # (n, 10) the piece on the floor, as columns
    lowest: np.ndarray  # (n, 10) its lowest row in each column; NOWHERE where it has none
    tall: np.ndarray  # (n,) rows that it takes


def all_placements() -> Placements:
    """Every rotation of every piece at every column where it is inside of the walls."""
    first, cells, lowest, tall = [0], [], [], []
    for rows, rotations in PIECES.values():
        shape = np.array([[cell == "#" for cell in row] for row in rows])[::-1]  # bottom row first
        for _ in range(rotations):
            rows_taken, columns_taken = shape.shape
            for column in range(WIDTH - columns_taken + 1):
                placed = np.zeros(WIDTH, int)
                placed[column:column + columns_taken] = (1 << np.arange(rows_taken)) @ shape
                cells.append(placed)
                bottom = np.full(WIDTH, NOWHERE)
                bottom[column:column + columns_taken] = shape.argmax(0)
                lowest.append(bottom)
                tall.append(rows_taken)
            shape = np.rot90(shape)
        first.append(len(cells))
    return Placements(np.array(first), np.array(cells), np.array(lowest), np.array(tall))


PLACEMENTS = all_placements()
COUNTS = np.diff(PLACEMENTS.first)  # of placements of each piece


class Candidates(NamedTuple):
    """Placements tried, those that stay on the board: m of them, of one or several games."""
    game: np.ndarray  # (m,) which game; the placements of a game stand together
    landed: np.ndarray  # (m, 10) board with the piece on it
    after: np.ndarray  # (m, 10) the same without its full rows
    lines: np.ndarray  # (m,) rows that were cleared
    row: np.ndarray  # (m,) where the lowest cell of the piece came to lie
    tall: np.ndarray  # (m,) rows that the piece takes


def heights(boards: np.ndarray) -> np.ndarray:
    """(m, 10) boards -> (m, 10) heights of the columns: the number of bits up to the highest."""
    return np.frexp(boards)[1]


def candidates(boards: np.ndarray, pieces: np.ndarray) -> Candidates:
    """All placements of each game's piece. boards: (n, 10), pieces: (n,) numbers 0 to 6."""
    counts = COUNTS[pieces]
    game = np.repeat(np.arange(len(boards)), counts)
    start = np.repeat(PLACEMENTS.first[pieces] - counts.cumsum() + counts, counts)
    placement = start + np.arange(len(game))

    tall = PLACEMENTS.tall[placement]
    row = (heights(boards)[game] - PLACEMENTS.lowest[placement]).max(1)
    inside = row + tall <= HEIGHT
    if not inside.all():
        game, placement, row, tall = game[inside], placement[inside], row[inside], tall[inside]
    landed = boards[game] | (PLACEMENTS.cells[placement] << row[:, None])
    after, lines = clear(landed)
    return Candidates(game, landed, after, lines, row, tall)


def clear(boards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boards without their full rows, and how many there were: (m, 10) and (m,)."""
    full = np.bitwise_and.reduce(boards, 1)  # (m,) bits: which rows are full
    lines = np.bitwise_count(full).astype(int)
    if not lines.any():
        return boards, lines
    boards = boards.copy()
    while (some := np.flatnonzero(full)).size:
        # take out the lowest full row of each board that has one: what is above it moves down
        below = (full[some] & -full[some]) - 1
        boards[some] = without_row(boards[some], below[:, None])
        full[some] = without_row(full[some], below)
    return boards, lines


def without_row(bits: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Bits without the one above those in `below`."""
    return (bits & below) | ((bits >> 1) & ~below)


# ---- features: what a player looks at ------------------------------------------------------------

Features = Callable[[Candidates], np.ndarray]


def board_features(boards: np.ndarray) -> np.ndarray:
    """The 46 features of Knox and Stone (2008): (m, 10) -> (m, 46).

    Ten heights, the highest, nine differences between neighbours, holes (empty cells under a filled
    one), the deepest well, the wells' depths together; and the squares of these 23, those of
    heights divided by 100. A well is as deep as the lower one of its neighbours is higher; a wall
    is a neighbour that is not lower.
    """
    h = heights(boards)  # (m, 10)
    high = h.max(1, keepdims=True)
    differences = np.abs(np.diff(h, axis=1))
    holes = (h - np.bitwise_count(boards)).sum(1, keepdims=True)

    walled = np.full((len(boards), WIDTH + 2), HEIGHT)
    walled[:, 1:-1] = h
    wells = np.maximum(np.minimum(walled[:, :-2], walled[:, 2:]) - h, 0)
    deepest, together = wells.max(1, keepdims=True), wells.sum(1, keepdims=True)
    plain = np.concatenate([h, high, differences, holes, deepest, together], 1).astype(float)

    squares = plain**2
    squares[:, :WIDTH + 1] /= 100
    return np.concatenate([plain, squares], 1)


def outcome(tried: Candidates) -> np.ndarray:
    """The rows that a placement clears, and the 46 features of the board after it: (m, 47)."""
    return np.column_stack([tried.lines, board_features(tried.after)])


def el_tetris(tried: Candidates) -> np.ndarray:
    """The six features of El-Tetris, a controller that clears hundreds of thousands of lines:
    (m, 6). Its order is that of EL_TETRIS.

    Landing height, to the middle of the piece; rows cleared; and of the board after it: changes
    between filled and empty along the rows (walls are filled) and up the columns (so is the floor),
    holes, and the wells' depths, of which each adds 1 + 2 + ... + depth.
    """
    boards = tried.after
    walled = np.full((len(boards), WIDTH + 2), EVERY_ROW)
    walled[:, 1:-1] = boards
    left, right = walled[:, :-2], walled[:, 2:]

    along_rows = np.bitwise_count(walled[:, :-1] ^ walled[:, 1:]).sum(1)
    up_columns = np.bitwise_count(boards ^ ((boards << 1 | 1) & EVERY_ROW)).sum(1)
    holes = (heights(boards) - np.bitwise_count(boards)).sum(1)
    deep = left & right & ~boards  # empty between two filled cells
    wells = np.zeros(len(boards))
    while deep.any():
        wells += np.bitwise_count(deep).sum(1)
        deep = (deep >> 1) & ~boards  # and the empty cells under it
    return np.stack([tried.row + (tried.tall - 1) / 2, tried.lines, along_rows, up_columns, holes,
                     wells], 1)


EL_TETRIS = np.array([-4.500158825, 3.418126810, -3.217888287,
                      -9.348695305, -7.899265427, -3.385597225])


# ---- playing -------------------------------------------------------------------------------------

def empty(games: int = 1) -> np.ndarray:
    """(games, 10) boards without a piece."""
    return np.zeros((games, WIDTH), int)


def best(values: np.ndarray, game: np.ndarray, games: int, rng: np.random.Generator) -> np.ndarray:
    """The place of the highest value of each game, among equals at random; -1 where it has none.

    values, game: (m,); the placements of a game stand together.
    """
    order = rng.permutation(len(values))
    order = order[np.argsort(values[order], kind="stable")]  # the best last
    chosen = np.full(games, -1)
    chosen[game[order]] = order  # what is written last stays
    return chosen


def play(features: Features, weights: np.ndarray, pieces: int, rng: np.random.Generator,
         trace: list | None = None) -> np.ndarray:
    """Lines cleared by greedy players, one a game, side by side: (games,).

    Args:
        features: of a placement: (m, k).
        weights: (games, k) of each player; all zeros is the one that plays at random.
        pieces: after which a game is stopped.
        trace: gets of every step the games that went on, (n,), their boards and the lines cleared.
    """
    lines = np.zeros(len(weights), int)
    playing = np.arange(len(weights))  # the games that are not over
    boards = empty(len(weights))
    for _ in range(pieces):
        tried = candidates(boards, rng.integers(0, len(PIECES), len(playing)))
        values = np.einsum("mk,mk->m", features(tried), weights[playing[tried.game]])
        chosen = best(values, tried.game, len(playing), rng)
        playing, chosen = playing[chosen >= 0], chosen[chosen >= 0]
        if not len(playing):
            break
        boards = tried.after[chosen]
        lines[playing] += tried.lines[chosen]
        if trace is not None:
            trace.append((playing, boards, tried.lines[chosen]))
    return lines


def picture(board: np.ndarray, before: np.ndarray) -> str:
    """A board (10,) as text, top row first; [] is what it has and `before` has not."""
    lines = []
    for row in range(HEIGHT - 1, -1, -1):
        line = ""
        for column, old in zip(board >> row & 1, before >> row & 1):
            line += " ." if not column else "##" if old else "[]"
        lines.append(f"|{line}|")
    return "\n".join(lines)


def board_of(text: str) -> np.ndarray:
    """(10,) board of a picture of its lowest rows, top row first: "." is empty, all else filled."""
    rows = text.split()[::-1]
    filled = np.array([[cell != "." for cell in row] for row in rows])
    return (1 << np.arange(len(rows))) @ filled


# ---- logs of people who trained a player ---------------------------------------------------------

class Seen(NamedTuple):
    """A row of a log: what the trainer saw when a piece began to fall."""
    board: np.ndarray  # (10,)
    piece: int  # that began to fall
    h: float  # key presses, +1 and -1, summed, while the piece before it fell


LOG_PIECES = "IOTZSJL"  # the numbers 0 to 6 of the logs
LOG_ROW = re.compile(r"\[([\d, -]+)\]:\[\]:\[[\d, ]*\]:\[\]:[\d.]+:\[([^]]*)\]:"
                     r"(?:true|false):[\d.]+")
LOG_EXPECTED = ("expected [200 cells, 1, piece, rotation, x, y, 10, 20]:[]:[moves]:[]:lines:"
                "[{+1 or -1 @ time}, ...]:true:time")


def read_log(path: str | Path) -> list[list[Seen]]:
    """The games of a log of tamerproject's Tetris, .log or .log.xz.

    Raises SystemExit with file and line where something else is found.
    """
    first, *lines = [line.decode("latin-1").strip() for line in read_lines(path)]
    if not first.startswith("(;featClass=FeatGen_Tetris"):
        fail(f"{path}, line 1: expected settings that begin with (;featClass=FeatGen_Tetris")
    games: list[list[Seen]] = [[]]
    for number, line in enumerate(lines, 2):
        if line in ("", "finished") or line.startswith("[]:[]:"):  # a game is over
            games.append([])
            continue
        found = LOG_ROW.fullmatch(line)
        numbers = [int(cell) for cell in found[1].split(",")] if found else []
        if len(numbers) != 207 or numbers[205:] != [WIDTH, HEIGHT] or not 0 <= numbers[201] <= 6:
            fail(f"{path}, line {number}: {LOG_EXPECTED}")
        cells = np.array(numbers[:200]).reshape(HEIGHT, WIDTH)[::-1] != 0  # the bottom row first
        presses = [float(value) for value in re.findall(r"{(-?1\.0) @ [\d.]+}", found[2])]
        if len(presses) != found[2].count("{"):
            fail(f"{path}, line {number}: {LOG_EXPECTED}")
        piece = list(PIECES).index(LOG_PIECES[numbers[201]])
        games[-1].append(Seen((1 << np.arange(HEIGHT)) @ cells, piece, sum(presses)))
    games = [game for game in games if game]
    if not games:
        fail(f"{path}: no game in it; {LOG_EXPECTED}")
    return games
