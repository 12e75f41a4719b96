"""tamer.py and common/tetris.py: the board against one that drops pieces cell by cell and against
the logs of real games, features by hand and by a slow count, both learners against algebra, TAMER's
loop step by step, the two that learn alone on problems with a known answer, logs, the terminal.
"""
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import clone
import tamer
from common.settings import parse
from common.tetris import (COUNTS, EL_TETRIS, HEIGHT, PIECES, WIDTH, best, board_features, board_of,
                           candidates, clear, el_tetris, empty, heights, outcome, picture, play,
                           read_log)
from tamer import Config, GradientStep, Ridge, SimulatedTrainer

DATA = Path(os.environ.get("PREFERENCE_DATA", "/nonexistent")) / "tetris"
needs_logs = pytest.mark.skipif(not DATA.is_dir(), reason="PREFERENCE_DATA has no tetris/*.log.xz")
LOGS = {"z130": (52, 952, 125), "z135": (6, 754, 35), "z137": (3, 761, 13), "z157": (2, 750, 5)}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_it_needs_numpy_only():
    """Neither torch nor another algorithm file is loaded."""
    program = "import tamer, sys; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], cwd=clone.ROOT, text=True, check=True,
                           capture_output=True, env=clone.environment()).stdout.split()
    scripts = {path.stem for path in clone.ROOT.glob("*.py")} - {"tamer"}
    assert "tamer" in found and not ({"torch", "matplotlib"} | scripts) & set(found)


# ---- a slow board --------------------------------------------------------------------------------
# The cells of each piece, (x, y) with y upwards, written down again; a turn is (x, y) -> (-y, x)

CELLS = {"I": {(0, 0), (1, 0), (2, 0), (3, 0)}, "O": {(0, 0), (1, 0), (0, 1), (1, 1)},
         "T": {(0, 0), (1, 0), (2, 0), (1, 1)}, "S": {(0, 0), (1, 0), (1, 1), (2, 1)},
         "Z": {(0, 1), (1, 1), (1, 0), (2, 0)}, "L": {(0, 0), (0, 1), (0, 2), (1, 0)},
         "J": {(0, 0), (1, 0), (1, 1), (1, 2)}}


def slow_rotations(name):
    cells, found = CELLS[name], []
    for _ in range(4):
        left, low = min(x for x, _ in cells), min(y for _, y in cells)
        cells = {(x - left, y - low) for x, y in cells}
        if cells not in found:
            found.append(cells)
        cells = {(-y, x) for x, y in cells}
    return found


def slow_placements(filled, name):
    """(cells after, lines, lowest row, rows taken) of every placement; filled: a set of (x, y)."""
    found = []
    for shape in slow_rotations(name):
        for column in range(WIDTH - max(x for x, _ in shape)):
            y = HEIGHT + 4
            while y > 0 and not {(x + column, y - 1 + dy) for x, dy in shape} & filled:
                y -= 1  # falls by one row
            piece = {(x + column, y + dy) for x, dy in shape}
            if max(row for _, row in piece) >= HEIGHT:
                continue
            rows = [{x for x, at in filled | piece if at == row} for row in range(HEIGHT)]
            left = [row for row in rows if len(row) < WIDTH]
            after = {(x, row) for row, xs in enumerate(left) for x in xs}
            tall = 1 + max(dy for _, dy in shape)
            found.append((frozenset(after), HEIGHT - len(left), y, tall))
    return found


def cells_of(board):
    return frozenset((x, y) for x in range(WIDTH) for y in range(HEIGHT + 4) if board[x] >> y & 1)


def boards_of_play(rng, count=12):
    """Boards as they occur, by random play and by good play."""
    boards = []
    for weights in (0 * EL_TETRIS, EL_TETRIS):
        board = empty()
        while len(boards) < count * (1 + weights.any()):
            boards.append(board[0])
            tried = candidates(board, rng.integers(0, 7, 1))
            chosen, = best(el_tetris(tried) @ weights, tried.game, 1, rng)
            board = tried.after[[chosen]] if chosen >= 0 else empty()
    return np.array(boards)


def test_every_placement_is_that_of_a_board_that_drops_cell_by_cell(rng):
    for board in boards_of_play(rng):
        for number, name in enumerate(PIECES):
            tried = candidates(board[None], np.array([number]))
            found = sorted(zip(map(sorted, map(cells_of, tried.after)), tried.lines.tolist(),
                               tried.row.tolist(), tried.tall.tolist()))
            expected = [(sorted(after), *rest) for after, *rest in
                        slow_placements(cells_of(board), name)]
            assert found == sorted(expected), name


def test_games_side_by_side_are_as_one_by_one(rng):
    boards, pieces = boards_of_play(rng, 30), rng.integers(0, 7, 60)
    together = candidates(boards, pieces)
    alone = [candidates(boards[[i]], pieces[[i]]) for i in range(60)]
    assert together.game.tolist() == [i for i in range(60) for _ in alone[i].game]
    for name in ("landed", "after", "lines", "row", "tall"):
        expected = np.concatenate([getattr(one, name) for one in alone])
        assert np.array_equal(getattr(together, name), expected), name


def test_an_empty_board_has_9_17_or_34_placements():
    assert dict(zip(PIECES, COUNTS.tolist())) == dict(I=17, O=9, T=34, S=17, Z=17, L=34, J=34)


# ---- known boards --------------------------------------------------------------------------------

WELL = """
#########.
#########.
#########.
#########.
##.#######
"""


def test_four_lines_at_once():
    tried = candidates(board_of(WELL)[None], np.array([0]))
    assert sorted(tried.lines.tolist()) == [0] * 16 + [4]
    after = tried.after[tried.lines.argmax()]
    assert np.array_equal(after, board_of("##.#######"))


def test_rows_fall_as_they_are_and_fill_no_hole():
    """Full are the second and the fourth row. What was above moves down as it is: naive gravity."""
    before = board_of("#.........\n##########\n.########.\n##########\n#########.")
    after, lines = clear(before[None])
    assert lines.tolist() == [2]
    assert np.array_equal(after[0], board_of("#.........\n.########.\n#########."))
    assert np.array_equal(clear(empty(3))[0], empty(3))


def test_a_piece_is_not_slid_under_an_overhang():
    """A gap with a roof: nothing gets in, wherever it is dropped."""
    before = board_of("####......\n#.........")
    tried = candidates(before[None], np.array([0]))
    assert ((tried.after[:, 1:4] & 1) == 0).all()


def test_a_game_is_over_where_nothing_fits():
    full = np.full((1, WIDTH), (1 << HEIGHT) - 1 - 1)  # the lowest row is empty, all else filled
    full[0, 0] = 0
    assert len(candidates(full, np.array([1])).game) == 0  # two columns wide
    assert candidates(full, np.array([0])).row.tolist() == [0]  # upright, in the only free column
    high = board_of("\n".join(["#........."] * 18))
    tried = candidates(high[None], np.array([0]))
    assert len(tried.game) == COUNTS[0] - 1  # only upright on the pile is too high: 18 + 4
    lines = play(outcome, np.zeros((50, 47)), 500, np.random.default_rng(0))
    assert lines.max() < 5  # a random player is soon dead


def test_cells_are_neither_lost_nor_made(rng):
    trace = []
    lines = play(el_tetris, np.tile(EL_TETRIS, (5, 1)), 200, rng, trace)
    assert len(trace) == 200 and sum(cleared for _, _, cleared in trace).tolist() == lines.tolist()
    left = np.bitwise_count(trace[-1][1]).sum(1)
    assert np.array_equal(left, 4 * 200 - 10 * lines)
    assert (lines > 70).all()  # a good player's board is nearly empty: 80 less what lies there


def test_a_picture_shows_what_is_new():
    before = board_of("##........")
    after = before | board_of("..####....")
    assert picture(after, before).endswith("|####[][][][] . . . .|")
    assert len(picture(after, before).split("\n")) == HEIGHT


def test_a_hundred_thousand_placements_a_second(rng):
    """Of processor time, with their 46 features, one game at a time; side by side it is more."""
    tried, started = 0, time.process_time()
    board = empty()
    for _ in range(1000):
        one = candidates(board, rng.integers(0, 7, 1))
        board_features(one.after)
        tried += len(one.game)
    assert tried / (time.process_time() - started) > 100_000


# ---- features ------------------------------------------------------------------------------------

def test_the_46_features_by_hand():
    board = board_of("""
        ..#.......
        ..#.#....#
        #.#.#...##
        #.####..#.""")
    h = [2, 0, 4, 1, 3, 1, 0, 0, 2, 3]
    assert heights(board[None])[0].tolist() == h
    wells = [0, 2, 0, 2, 0, 0, 0, 0, 0, 0]
    differences = [2, 4, 3, 2, 2, 1, 0, 2, 1]
    plain = [*h, 4, *differences, 1, max(wells), sum(wells)]
    squares = [value**2 / (100 if i < 11 else 1) for i, value in enumerate(plain)]
    assert np.allclose(board_features(board[None])[0], plain + squares, atol=1e-12)
    edge = board_of("#########.\n#########.\n.########.")  # a wall is a neighbour that is not lower
    assert board_features(edge[None])[0, 20:23].tolist() == [1, 3, 3]
    assert not board_features(empty()).any()


def slow_el_tetris(filled, row, tall, lines):
    """Cell by cell, as words say it."""
    def at(x, y):
        return x < 0 or x >= WIDTH or y < 0 or (x, y) in filled
    along = sum(at(x, y) != at(x - 1, y) for y in range(HEIGHT) for x in range(WIDTH + 1))
    up = sum(at(x, y) != at(x, y - 1) for x in range(WIDTH) for y in range(HEIGHT))
    holes = sum(not at(x, y) and any(at(x, z) for z in range(y, HEIGHT))
                for x in range(WIDTH) for y in range(HEIGHT))
    wells = 0
    for x in range(WIDTH):
        for y in range(HEIGHT):
            if not at(x, y) and at(x - 1, y) and at(x + 1, y):
                while not at(x, y):
                    wells, y = wells + 1, y - 1
    return [row + (tall - 1) / 2, lines, along, up, holes, wells]


def test_el_tetris_features_are_those_of_a_slow_count(rng):
    boards = boards_of_play(rng, 10)
    tried = candidates(boards, rng.integers(0, 7, len(boards)))
    expected = [slow_el_tetris(cells_of(after), *rest)
                for after, *rest in zip(tried.after, tried.row, tried.tall, tried.lines)]
    assert np.array_equal(el_tetris(tried), expected)


def test_the_best_is_chosen_and_equals_are_drawn():
    values, game = np.array([1.0, 3.0, 3.0, 5.0, 2.0, 2.0]), np.array([0, 0, 0, 2, 2, 3])
    seen = np.array([best(values, game, 5, np.random.default_rng(k)) for k in range(400)])
    assert (seen[:, 1] == -1).all() and (seen[:, 4] == -1).all()  # no placement
    assert (seen[:, 2] == 3).all() and (seen[:, 3] == 5).all()
    assert set(seen[:, 0]) == {1, 2} and 140 < (seen[:, 0] == 1).sum() < 260


# ---- the learners --------------------------------------------------------------------------------

def labelled(rng, n=60):
    return rng.normal(size=(n, 46)), rng.choice([-1.0, 1.0], n)


def test_a_step_is_down_the_squared_error(rng):
    learner = GradientStep(alpha=0.01)
    learner.weights, learner.bias = rng.normal(size=46), 0.3
    (x, _), (h, _) = labelled(rng, 2)

    def error(weights, bias):
        return (h - weights @ x - bias)**2 / 2
    start, bias = learner.weights, learner.bias
    learner.learn(x, h)
    moved = (learner.weights - start) / -0.01
    for k in range(46):
        d = 1e-6 * np.eye(46)[k]
        slope = (error(start + d, bias) - error(start - d, bias)) / 2e-6
        assert moved[k] == pytest.approx(slope, abs=1e-6)
    slope = (error(start, bias + 1e-6) - error(start, bias - 1e-6)) / 2e-6
    assert (learner.bias - bias) / -0.01 == pytest.approx(slope, abs=1e-6)


def test_ridge_is_least_squares_with_a_penalty(rng):
    x, h = labelled(rng)
    learner = Ridge(penalty=3.0)
    for one, label in zip(x, h):
        learner.learn(one, label)
    rows = np.vstack([np.column_stack([x, np.ones(60)]), np.sqrt(3.0) * np.eye(47)])
    expected = np.linalg.lstsq(rows, np.append(h, np.zeros(47)), rcond=None)[0]
    assert np.allclose(learner.weights, expected[:-1], atol=1e-9)


def test_tiny_steps_are_ridge_with_a_penalty_of_one_over_alpha(rng):
    """Both are alpha * sum of h x, up to alpha^2."""
    x, h = labelled(rng)
    for alpha in (1e-5, 1e-6):
        step, ridge = GradientStep(alpha), Ridge(1 / alpha)
        for one, label in zip(x, h):
            step.learn(one, label)
            ridge.learn(one, label)
        summed = alpha * (h @ x)
        assert np.abs(step.weights - summed).max() < 1e5 * alpha**2
        assert np.abs(ridge.weights - summed).max() < 1e5 * alpha**2


# ---- the trainer ---------------------------------------------------------------------------------

def test_the_trainer_praises_the_best_tenth(rng):
    board = board_of(WELL)[None]
    tried = candidates(board, np.array([0]))
    values = el_tetris(tried) @ EL_TETRIS
    trainer = SimulatedTrainer("best tenth", 0.0, 0.0, False, rng)
    order = values.argsort()[::-1]  # 17 placements: the first two are the best tenth
    assert [trainer.says(board, tried, i) for i in order[:2]] == [1, 1]
    assert {trainer.says(board, tried, i) for i in order[2:]} == {-1}
    assert tried.lines[order[0]] == 4


def test_the_trainers_errors_and_silence_come_at_their_rates(rng):
    board = board_of(WELL)[None]
    tried = candidates(board, np.array([0]))
    chosen = (el_tetris(tried) @ EL_TETRIS).argmax()
    trainer = SimulatedTrainer("best tenth", 0.3, 0.5, False, rng)
    said = np.array([trainer.says(board, tried, chosen) for _ in range(3000)])
    assert abs((said == 0).mean() - 0.5) < 0.04
    assert abs((said[said != 0] == -1).mean() - 0.3) < 0.05


def test_shuffled_answers_know_nothing_of_the_placement(rng):
    board = board_of(WELL)[None]
    tried = candidates(board, np.array([0]))
    order = (el_tetris(tried) @ EL_TETRIS).argsort()
    trainer = SimulatedTrainer("best tenth", 0.0, 0.0, True, rng)
    said = np.array([trainer.says(board, tried, order[-1 if i % 2 else 0]) for i in range(2000)])
    assert abs((said[1::2] == 1).mean() - 0.5) < 0.06 and abs((said[::2] == 1).mean() - 0.5) < 0.06


def test_a_standard_that_moves_asks_for_more(rng):
    board = board_of(WELL)[None]
    tried = candidates(board, np.array([0]))
    order = (el_tetris(tried) @ EL_TETRIS).argsort()
    trainer = SimulatedTrainer("moving", 0.0, 0.0, False, rng)
    middling = order[10]  # ten of 17 are worse: 0.59
    assert trainer.says(board, tried, middling) == 1
    for _ in range(50):
        assert trainer.says(board, tried, order[-1]) == 1
    assert trainer.says(board, tried, middling) == -1


# ---- TAMER ---------------------------------------------------------------------------------------

class Recorder:
    """A trainer and a learner that keep what they are given."""

    def __init__(self, rng):
        self.rng, self.weights = rng, rng.normal(size=46)
        self.events = []

    def says(self, board, tried, chosen):
        h = int(self.rng.integers(-1, 2))
        self.events.append(("says", board[0], tried, chosen, h))
        return h

    def learn(self, x, h):
        self.events.append(("learn", x, h))
        self.weights = self.rng.normal(size=46)


def test_a_label_goes_to_the_placement_that_was_seen_and_silence_teaches_nothing(rng):
    both = Recorder(rng)
    tamer.tamer(both, both, 3, 25, np.random.default_rng(1))
    before = None
    assert len(both.events) > 60
    for event, following in zip(both.events, [*both.events[1:], None]):
        if event[0] == "learn":
            continue
        _, board, tried, chosen, h = event
        x = board_features(tried.after[[chosen]])[0] - board_features(board[None])[0]
        if h:
            assert following[0] == "learn" and following[2] == h
            assert np.allclose(following[1], x, atol=1e-12)
        else:
            assert following is None or following[0] == "says"
        if before is not None and board.any():  # what is shown next lies on what was shown
            assert np.array_equal(board, before)
        before = tried.after[chosen]


def test_the_next_placement_is_chosen_before_the_trainer_speaks(rng):
    """What is said while a piece falls cannot change where it falls."""
    both = Recorder(rng)
    chosen_by = []
    rank = tamer.best

    def spy(values, game, games, stream):
        chosen_by.append(len(both.events))
        return rank(values, game, games, stream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tamer, "best", spy)
        tamer.tamer(both, both, 1, 3, rng)
    assert chosen_by[:2] == [0, 0]  # two choices before the first word
    assert both.events[0][0] == "says"


def test_it_learns_within_three_games_and_not_from_shuffled_answers():
    def third(wrong, shuffled):
        lines = []
        for seed in range(3):
            rng = np.random.default_rng(seed)
            trainer = SimulatedTrainer("best tenth", wrong, 0.5, shuffled, rng)
            lines.append(tamer.tamer(GradientStep(), trainer, 3, 200, rng)[2])
        return np.mean(lines)
    assert third(0.0, False) > 50 and third(0.0, True) < 25


# ---- those that learn alone ----------------------------------------------------------------------

def test_cross_entropy_finds_what_its_games_reward(monkeypatch, rng):
    """Lines are the nearness to a target; the first generation is N(0, 100), whatever it brings."""
    target, drawn = np.linspace(-20, 20, 47), []

    def near(features, weights, pieces, rng):
        drawn.append(weights)
        return -((weights - target)**2).sum(1)
    monkeypatch.setattr(tamer, "play", near)
    curve, mean = tamer.cross_entropy(60, 500, rng)
    assert len(curve) == 60 and all(weights.shape == (100, 47) for weights in drawn)
    assert abs(drawn[0].mean()) < 0.6 and abs(drawn[0].std() - 10) < 0.5
    elite = drawn[0][np.argsort(near(None, drawn[0], 0, rng))[-10:]]
    assert abs(drawn[1].mean(0) - elite.mean(0)).mean() < 2
    expected = np.sqrt(elite.var(0) + 5)
    assert np.abs(drawn[1].std(0) / expected - 1).mean() < 0.1
    assert np.abs(mean - target).max() < 3


def test_policy_iteration_finds_the_discounted_lines(monkeypatch, rng):
    """With a feature for each board, the value of a board is what follows it: 2 boards in one game,
    3 in the other, and nothing after a lost game."""
    def trace_of(features, weights, pieces, rng, trace):
        players.append(weights[0])
        trace += [(np.array([0, 1]), np.array([[0], [3]]), np.array([9, 9])),
                  (np.array([0, 1]), np.array([[1], [4]]), np.array([1, 2])),
                  (np.array([1]), np.array([[2]]), np.array([4]))]
        return np.array([1.0, 6.0])
    players = []
    monkeypatch.setattr(tamer, "play", trace_of)
    monkeypatch.setattr(tamer, "with_constant", lambda boards: np.eye(47)[boards[:, 0]])
    monkeypatch.setattr(tamer, "PENALTY", 1e-9)
    curve, weights = tamer.policy_iteration(2, 500, rng)
    g = tamer.DISCOUNT
    value = np.array([1, 0, 0, 2 + g * 4, 4])
    assert curve == [3.5, 3.5] and not players[0].any() and np.array_equal(players[1], weights)
    assert weights[0] == 1 and np.allclose(weights[1:6], g * value, atol=1e-6)


# ---- the logs ------------------------------------------------------------------------------------

SETTINGS = "(;featClass=FeatGen_Tetris;and=more)"


def log_row(filled=(), piece=6, presses="", tail="10, 20"):
    cells = ["7" if i in filled else "0" for i in range(200)]
    return (f"[{', '.join(cells)}, 1, {piece}, 0, 3, -1, {tail}]:[]:[2, 4, 4]:[]:0.0:[{presses}]"
            ":true:12.5")


GOOD = [SETTINGS, log_row(), log_row((195, 196), 3, "{1.0 @ 11.5}, {-1.0 @ 11.6}, {-1.0 @ 11.7}"),
        "[]:[]:[]:[]:0.0:[{1.0 @ 12.5}]:true:12.6", "", log_row(), "", "finished", ""]


def test_a_log_is_read(tmp_path):
    path = tmp_path / "one.log"
    path.write_text("\n".join(GOOD))
    (first, second), last = read_log(path)
    assert not first.board.any() and first.h == 0 and list(PIECES)[first.piece] == "L"
    assert np.array_equal(second.board, board_of(".....##..."))
    assert second.h == -1 and list(PIECES)[second.piece] == "Z" and len(last) == 1


@pytest.mark.parametrize("line, text, said", [
    (0, "(;featClass=FeatGen_Mario)", "line 1: expected settings that begin with"),
    (1, log_row()[:-300], "line 2: expected [200 cells"),
    (1, log_row(tail="10, 22"), "line 2: expected [200 cells"),
    (1, log_row(piece=7), "line 2: expected [200 cells"),
    (2, log_row(presses="{up @ 3}"), "line 3: expected [200 cells"),
    (5, "nonsense", "line 6: expected [200 cells"),
])
def test_a_broken_log_is_one_line(line, text, said, tmp_path):
    path = tmp_path / "one.log"
    path.write_text("\n".join([*GOOD[:line], text, *GOOD[line + 1:]]))
    with pytest.raises(SystemExit) as stopped:
        tamer.main(parse(Config, "", ["--replay", str(path)]))
    assert str(stopped.value).startswith(f"error: {path}, {said}")
    assert "\n" not in str(stopped.value)


def test_a_log_that_is_not_there_or_empty_is_one_line(tmp_path):
    (tmp_path / "empty.log").write_text(SETTINGS)
    (tmp_path / "cut.log.xz").write_bytes(b"\xfd7zXZ\x00")
    for name, said in (("none.log", "cannot be read"), ("empty.log", "no game in it"),
                       ("cut.log.xz", "cannot be read")):
        with pytest.raises(SystemExit, match=f"^error: .*{name}: {said}"):
            read_log(tmp_path / name)


def test_presses_are_credited_to_the_placement_before_the_falling_one(tmp_path):
    boards = [board_of(row) for row in ("..........", "##........", "####......", "######....")]
    from common.tetris import Seen
    game = [Seen(board, 0, h) for board, h in zip(boards, (0.0, 5.0, 7.0, 9.0))]
    learned = []

    class Keep:
        def learn(self, x, h):
            learned.append((x[:10].tolist(), h))
    tamer.learn_from_log(Keep(), [game], late=1)
    first, second = [1.0] * 2 + [0.0] * 8, [0.0] * 2 + [1.0] * 2 + [0.0] * 6
    assert learned == [(first, 7.0), (second, 9.0)]
    learned.clear()
    tamer.learn_from_log(Keep(), [game], late=0)
    assert [h for _, h in learned] == [5.0, 7.0, 9.0] and learned[0][0] == first


@needs_logs
@pytest.mark.parametrize("name", LOGS)
def test_real_games_obey_this_boards_rules(name):
    """Each placement of a log is one of ours, but where a piece was slid under an overhang: in the
    new board there is something above it (or a row was cleared, and the piece cannot be told)."""
    path, = DATA.glob(f"tetris{name}-*")
    games, rows, slid = LOGS[name]
    log, found = read_log(path), 0
    assert len(log) == games and sum(map(len, log)) == rows
    for game in log:
        for seen, following in zip(game, game[1:]):
            tried = candidates(seen.board[None], np.array([seen.piece]))
            if not (tried.after == following.board).all(1).any():
                found += 1
                new = following.board & ~seen.board
                cleared = np.bitwise_count(following.board).sum() != 4 + np.bitwise_count(
                    seen.board).sum()
                assert cleared or any(old >> low.bit_length() for old, low in
                                      zip(seen.board.tolist(), new.tolist()) if low), (name, found)
    assert found == slid


@needs_logs
def test_the_log_of_a_good_trainer_teaches_only_with_its_credit_one_placement_late():
    path, = DATA.glob("tetrisz137-*")
    lines = []
    for late in (1, 0):
        learner = GradientStep()
        tamer.learn_from_log(learner, read_log(path), late)
        weights = np.tile(np.append(0.0, learner.weights), (10, 1))
        lines.append(play(outcome, weights, 300, np.random.default_rng(0)).mean())
    assert lines[0] > 80 and lines[1] < 10


@needs_logs
def test_replay(tmp_path, monkeypatch, capsys):
    path, = DATA.glob("tetrisz130-*")
    monkeypatch.chdir(tmp_path)
    tamer.main(parse(Config, "", ["--replay", str(path), "--long", "500"]))
    shown = capsys.readouterr().out
    assert "52 games, 952 placements, 67 praised, 106 blamed" in shown
    file, = Path("runs/tamer-long500").iterdir()
    assert file.name == "replay-tetrisz130-2-0.06.jsonl"
    for row in map(json.loads, file.open()):
        assert len(row["lines"]) == 30 and row["log"] == path.name
        assert f"{row['learner']:38}" in shown


# ---- the terminal --------------------------------------------------------------------------------

def on_a_terminal(tmp_path, *keys):
    """tamer.py --human in a pseudo-terminal; each of the keys is typed when a board is shown. What
    it showed, its exit status, and the terminal's settings before and after."""
    termios, pty = pytest.importorskip("termios"), pytest.importorskip("pty")
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    process = subprocess.Popen([sys.executable, clone.ROOT / "tamer.py", "--human", "--seconds",
                                "5", "--long", "200"], cwd=tmp_path, stdin=slave, stdout=slave,
                               stderr=slave, env=clone.environment(), start_new_session=True)
    shown, typed, deadline = "", 0, time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([master], [], [], 0.2)[0]:
            shown += os.read(master, 65536).decode()
        elif process.poll() is not None:
            break
        if typed < len(keys) and shown.count("q quit") > typed:
            if keys[typed] == "ctrl-c":
                assert not termios.tcgetattr(slave)[3] & termios.ICANON
                process.send_signal(signal.SIGINT)
            else:
                os.write(master, keys[typed].encode())
            typed += 1
    process.wait(10)
    after = termios.tcgetattr(slave)
    os.close(master)
    os.close(slave)
    return shown, process.returncode, before, after


def test_a_person_trains_at_a_terminal(tmp_path):
    shown, status, before, after = on_a_terminal(tmp_path, *"+m-zz?q")
    assert status == 0 and before == after
    assert "You said good 2 times, and bad 3 times. Alone it now clears" in shown
    assert "[]" in shown and "good 2   bad 2" in shown
    assert os.listdir(tmp_path) == []


def test_ctrl_c_leaves_the_terminal_as_it_was(tmp_path):
    shown, status, before, after = on_a_terminal(tmp_path, "+", "ctrl-c")
    assert status != 0 and before == after and "Traceback" not in shown and "stopped" in shown


def test_without_a_terminal_it_says_so_in_one_line(tmp_path):
    done = subprocess.run([sys.executable, clone.ROOT / "tamer.py", "--human"], cwd=tmp_path,
                          input="+", text=True, capture_output=True, env=clone.environment())
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == "error: --human: needs a terminal, in which keys can be read one by one\n"


# ---- the command ---------------------------------------------------------------------------------

def test_the_command_in_small(tmp_path):
    """--pieces --games --generations --silent --long --seeds --seed --out in small."""
    flags = ("--pieces 40 --games 3 --generations 2 --long 60 --seeds 2 --silent 0.2 --seed 3 "
             "--out there").split()
    done = subprocess.run([sys.executable, clone.ROOT / "tamer.py", *flags], cwd=tmp_path,
                          text=True, capture_output=True, env=clone.environment())
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "there")) == ["figure.png", "results.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "there/results.jsonl").open()]
    assert len(rows) == 2 * (16 + 3) and {row["seed"] for row in rows} == {3, 4}
    for row in rows:
        assert len(row["lines"]) == {"TAMER": 3, "random player": 1}.get(row["method"], 2)
        assert 0 <= max(row["lines"]) <= 16 and 0 <= row["long"] <= 24  # 2.5 pieces a line
    for name in ("random player", "TAMER", "TAMER, ridge", "policy iteration", "cross-entropy"):
        assert re.search(rf"^{name} +[\d.]+ ± [\d.]+ +[\d.]+ ± [\d.]+ +\d+ +\d+ ± \d+$",
                         done.stdout, flags=re.M), name
    assert "65.89" in done.stdout and "answers shuffled" in done.stdout


def test_peak_and_third_game():
    alone = [{"games": 100, "lines": [0.0, 4.0, 2.0], "long": 7},
             {"games": 100, "lines": [1.0, 6.0, 2.0], "long": 9}]
    found = tamer.summary(alone)
    assert found["third"] == (0.5, 0.5) and found["peak"] == (5.0, 1.0) and found["games"] == 200
    people = [{"games": 1, "lines": [9.0, 1.0, 5.0], "long": 7}] * 2
    found = tamer.summary(people)
    assert found["third"] == (5.0, 0.0) and found["peak"] == (9.0, 0.0) and found["games"] == 1


@pytest.mark.parametrize("arguments", [
    "--pieces 19", "--pieces 5001", "--games 2", "--games 101", "--generations 0",
    "--generations 101", "--silent 1", "--silent -0.1", "--silent nan", "--long 10",
    "--long 1000001", "--seeds 1", "--seeds 101", "--seed -1", "--seconds 0", "--human --replay x"])
def test_a_bad_setting_is_one_line(arguments):
    with pytest.raises(SystemExit) as stopped:
        parse(Config, "", arguments.split())
    message = str(stopped.value)
    assert message.startswith("error: ") and arguments.split()[0] in message
    assert "\n" not in message


def test_a_folder_that_cannot_be_written_stops_it_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="^error: .*file/below: cannot be written"):
        tamer.main(Config(out=str(tmp_path / "file/below")))
