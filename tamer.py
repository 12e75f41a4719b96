"""TAMER: rewards from a trainer at the keyboard, who says "good" or "bad" while the learner plays.

    h_t in {+1, -1, nothing}     what the trainer says of the placement before      (the label)
    x_t = f(board after) - f(board before)                                         (46 features)
    Hhat(x) = w x + b            predicts what the trainer would say
    w <- w + alpha (h_t - Hhat(x_t)) x_t                                  (Knox and Stone 2008)
    act: the placement with the highest Hhat

Here gamma is 0: nothing is summed over the future, because the trainer has already looked there.
"Bad" of a placement means that it will cost lines later; it is nearer to an advantage than to a
reward (MacGlashan et al. 2017). What a trainer says is a label, and learning from it regression.

    python tamer.py                  # TAMER beside methods that learn alone; a minute or two
    python tamer.py --human          # you are the trainer: + and - while it plays; q ends
    python tamer.py --replay FILE    # learn from a log of a person's key presses; half a minute

The trainer of the first command is simulated: it judges by the weights of El-Tetris, a known good
player, says +1 where the placement is among the best tenth of all that the piece has and -1
elsewhere, is silent half of the time, and wrong as often as the table says. Beside it:

    random player
    policy iteration   100 games; value of a board by least squares (LSTD, Bradtke and Barto 1996)
                       and greedy on it; 100 more games, and so on
    cross-entropy      100 random weights play a game each; the ten best make the next Gaussian, and
                       some noise is added to its variance (Szita and Lorincz 2006)
Neither changes anything before its 100th game: at game 3 they play as they began.

Differs from the papers: alpha is the step of the authors' later program, 0.000005 / 47. As that is
tiny, w is nearly alpha * sum of h x: ridge regression with a penalty of 1 / alpha. The table has
ridge regression with a penalty of 10 as well. Pieces drop straight down (nothing is slid under an
overhang), and a game ends only where a piece fits nowhere. Policy iteration is by least squares,
with the same features; in the lecture's table it is Bertsekas and Ioffe's.

Symbols: h, label; x (46,), change of the features; a game ends after --pieces at the latest, and a
line takes 2.5 of them, so no game here has more than 0.4 * --pieces lines.

Writes  runs/tamer/ : results.jsonl, figure.png; with --replay replay-<log>.jsonl
"""
from __future__ import annotations

import common  # noqa: F401  first, so that Ctrl-C while numpy is imported is one line, too

import os
import select
import sys
from pathlib import Path

try:
    import termios
    import tty
except ImportError:  # Windows, where keys cannot be read while the game goes on
    termios = None

import numpy as np
from tqdm import tqdm

from common import fail
from common.figures import figure
from common.files import check_writable, write_jsonl
from common.settings import parse, require, require_numbers, run_folder, settings
from common.statistics import mean_se
from common.tetris import (EL_TETRIS, PIECES, Candidates, best, board_features, candidates,
                           el_tetris, empty, outcome, picture, play, read_log)

FEATURES = 46
STEP = 0.000005 / 47  # alpha
GAMES = 100  # of a generation, and of an iteration of policy iteration
ELITE = 10  # candidates that make the next generation
DISCOUNT, PENALTY = 0.99, 10.0  # of policy iteration
WRONG = (0.0, 0.1, 0.3, 0.5)  # shares of a trainer's answers
PUBLISHED = {  # the table of Lecture 8: lines at game 3, at the peak, games to the peak
    "TAMER": ("65.89", "65.89", "3"),
    "RRL-KBR": ("5", "50", "120"),
    "policy iteration": ("~0", "3183", "1500"),
    "genetic algorithm": ("~0", "586,103", "3000"),
    "cross-entropy + RL": ("~0", "348,895", "5000"),
}


@settings
class Config:
    # ---- the experiment
    pieces: int = 500  # Pieces after which a game is stopped while something learns.
    games: int = 5  # Games that TAMER is trained for.
    generations: int = 12  # Generations of cross-entropy and of policy iteration, 100 games each.
    silent: float = 0.5  # Share of the placements of which the simulated trainer says nothing.
    long: int = 10_000  # Pieces after which a game of a finished player is stopped.
    seeds: int = 4  # Repetitions, over which standard errors are computed.
    seed: int = 0  # First seed.

    # ---- people
    human: bool = False  # Be the trainer: + or m is good, - or z is bad, q ends.
    seconds: float = 1.5  # How long a person may look at each placement.
    replay: str = ""  # Log of a person's training (tamerproject, .log or .log.xz) to learn from.
    out: str = ""  # Folder for rows and figure, if not one named by the settings.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="pieces games generations long seeds seconds",
                        from_0="seed silent")
        require(20 <= self.pieces <= 5000, f"--pieces {self.pieces}: must be from 20 to 5000")
        require(3 <= self.games <= 100, f"--games {self.games}: must be from 3 to 100")
        require(self.generations <= 100,
                f"--generations {self.generations}: must be from 1 to 100")
        require(self.silent < 1, f"--silent {self.silent:g}: must be from 0 to below 1")
        require(20 <= self.long <= 10**6, f"--long {self.long}: must be from 20 to 10^6")
        require(2 <= self.seeds <= 100, f"--seeds {self.seeds}: must be from 2 to 100")
        require(not (self.human and self.replay), "--human: not with --replay")
        self.out = self.out or run_folder(self, "tamer", never=("human", "seconds", "replay"))


# ---- the learner: a regression of what the trainer says ------------------------------------------

class GradientStep:
    """A step of size alpha at every label (Knox and Stone 2008)."""

    def __init__(self, alpha: float = STEP):
        self.alpha = alpha
        self.weights = np.zeros(FEATURES)
        self.bias = 0.0

    def learn(self, x: np.ndarray, h: float) -> None:
        error = h - (self.weights @ x + self.bias)
        self.weights = self.weights + self.alpha * error * x
        self.bias += self.alpha * error


class Ridge:
    """The weights that fit all labels so far best: least squares with a penalty on w and b."""

    def __init__(self, penalty: float = 10.0):
        self.moments = penalty * np.eye(FEATURES + 1)  # penalty I + sum of x x'
        self.labelled = np.zeros(FEATURES + 1)  # sum of h x
        self.weights = np.zeros(FEATURES)

    def learn(self, x: np.ndarray, h: float) -> None:
        x = np.append(x, 1.0)
        self.moments += np.outer(x, x)
        self.labelled += h * x
        self.weights = np.linalg.solve(self.moments, self.labelled)[:-1]


LEARNERS = {"step": GradientStep, "ridge": Ridge}


# ---- the trainer ---------------------------------------------------------------------------------

class SimulatedTrainer:
    """Says +1, -1 or nothing (0) of a placement, by comparing it with the others of its piece.

    Args:
        standard: "best tenth", or "moving": +1 where a larger share of the others is worse than it
            lately was. The latter asks for more as the learner improves.
        wrong: how often it says the opposite; 0.5 tells nothing.
        shuffled: it says of each placement what it would have said of one before, drawn at random.
    """

    def __init__(self, standard: str, wrong: float, silent: float, shuffled: bool,
                 rng: np.random.Generator):
        self.standard, self.wrong, self.silent = standard, wrong, silent
        self.shuffled, self.rng = shuffled, rng
        self.lately = 0.5  # a running mean of the share of placements that are worse
        self.meant: list[int] = []

    def says(self, board: np.ndarray, tried: Candidates, chosen: int) -> int:
        if self.rng.random() < self.silent:
            return 0
        values = el_tetris(tried) @ EL_TETRIS
        if self.standard == "best tenth":
            good = (values > values[chosen]).mean() < 0.1
        else:
            worse = (values < values[chosen]).mean()
            good = worse >= self.lately
            self.lately += 0.1 * (worse - self.lately)
        self.meant.append(1 if good else -1)
        h = self.rng.choice(self.meant) if self.shuffled else self.meant[-1]
        return -h if self.rng.random() < self.wrong else h


# ---- TAMER ---------------------------------------------------------------------------------------

def tamer(learner, trainer, games: int, pieces: int, rng: np.random.Generator) -> list[int]:
    """Train a learner for some games. Returns the lines of each."""
    lines = []
    for _ in range(games):
        board = empty()
        shown = None  # the placement that the trainer is looking at
        lines.append(0)
        for _ in range(pieces):
            # 1) all placements of the next piece, and how each changes the features
            tried = candidates(board, rng.integers(0, len(PIECES), 1))
            x = board_features(tried.after) - board_features(board)
            # 2) the one that the trainer would like best; among equals at random
            chosen, = best(x @ learner.weights, tried.game, 1, rng)
            if chosen < 0:
                break  # no place for it: the game is over
            # 3) while it falls, the trainer speaks: of the placement before, which can be seen
            if shown is not None:
                h = trainer.says(*shown)
                # 4) a regression with one more label; silence is none
                if h:
                    learner.learn(x_shown, h)
            shown, x_shown = (board, tried, chosen), x[chosen]
            board = tried.after[[chosen]]
            lines[-1] += int(tried.lines[chosen])
    return lines


# ---- those that learn alone ----------------------------------------------------------------------

def cross_entropy(generations: int, pieces: int,
                  rng: np.random.Generator) -> tuple[list[float], np.ndarray]:
    """Szita and Lorincz 2006, with decreasing noise. Returns the mean lines of each generation, and
    the mean of the last Gaussian: (47,) weights."""
    mean = np.zeros(1 + FEATURES)
    variance = np.full(1 + FEATURES, 100.0)
    curve = []
    for generation in range(generations):
        # 1) every candidate plays one game
        weights = mean + np.sqrt(variance) * rng.normal(size=(GAMES, 1 + FEATURES))
        lines = play(outcome, weights, pieces, rng)
        # 2) a Gaussian is fitted to the best, and made wider
        elite = weights[np.argsort(lines)[-ELITE:]]
        mean = elite.mean(0)
        variance = elite.var(0) + max(5 - generation / 10, 0)
        curve.append(float(lines.mean()))
    return curve, mean


def policy_iteration(iterations: int, pieces: int,
                     rng: np.random.Generator) -> tuple[list[float], np.ndarray]:
    """Least-squares policy iteration. Returns the mean lines of each iteration, and (47,) weights.

    The value of a board, V = v f(board) + c, is what the next placements clear, discounted. It
    solves sum_t f_t (f_t - gamma f_{t+1})' v = sum_t f_t lines_{t+1}, over the boards of the games
    that the last player has played.
    """
    weights = np.zeros(1 + FEATURES)  # of the lines now, and of the features of the board after it
    curve = []
    for _ in range(iterations):
        # 1) the player plays
        trace: list = []
        lines = play(outcome, np.tile(weights, (GAMES, 1)), pieces, rng, trace)
        curve.append(float(lines.mean()))
        # 2) its value, by least squares
        A = PENALTY * np.eye(FEATURES + 1)
        b = np.zeros(FEATURES + 1)
        for t, (playing, boards, _) in enumerate(trace):
            if t + 1 == pieces:
                break  # these games were stopped, and not lost
            f = with_constant(boards)
            f_next, gained = np.zeros_like(f), np.zeros(len(f))  # of a lost game: nothing
            if t + 1 < len(trace):
                still, next_boards, cleared = trace[t + 1]
                at = np.searchsorted(playing, still)
                f_next[at], gained[at] = with_constant(next_boards), cleared
            A += f.T @ (f - DISCOUNT * f_next)
            b += f.T @ gained
        v = np.linalg.solve(A, b)[:-1]
        # 3) the next player: greedy on lines + gamma V
        weights = np.append(1.0, DISCOUNT * v)
    return curve, weights


def with_constant(boards: np.ndarray) -> np.ndarray:
    """(n, 47): the 46 features of a board, and 1."""
    return np.column_stack([board_features(boards), np.ones(len(boards))])


# ---- the experiment ------------------------------------------------------------------------------

MAIN = {"learner": "step", "standard": "best tenth", "wrong": 0.1, "shuffled": False}
CONTROLS = {"step": {}, "ridge, penalty 10": {"learner": "ridge"},
            "step, a standard that moves": {"standard": "moving"},
            "step, answers shuffled": {"shuffled": True}}
ALONE = {"policy iteration": policy_iteration, "cross-entropy": cross_entropy}


def conditions() -> list[dict]:
    """TAMER as in the table, and its controls."""
    return [MAIN | control | {"wrong": wrong} for control in CONTROLS.values() for wrong in WRONG]


def experiment(config: Config) -> list[dict]:
    """A row of each method and seed: the lines of its games, and of its finished player."""
    rows, finished = [], []
    for seed in tqdm(range(config.seed, config.seed + config.seeds), "seeds"):
        for number, condition in enumerate(conditions()):
            rng = np.random.default_rng([seed, 0, number])
            trainer = SimulatedTrainer(condition["standard"], condition["wrong"], config.silent,
                                       condition["shuffled"], rng)
            learner = LEARNERS[condition["learner"]]()
            lines = tamer(learner, trainer, config.games, config.pieces, rng)
            rows.append({"method": "TAMER", **condition, "seed": seed, "games": 1, "lines": lines})
            finished.append(np.append(0.0, learner.weights))

        rng = np.random.default_rng([seed, 1])
        nobody = np.zeros((GAMES, 1 + FEATURES))  # all placements are alike
        lines = [float(play(outcome, nobody, config.pieces, rng).mean())]
        rows.append({"method": "random player", "seed": seed, "games": GAMES, "lines": lines})
        finished.append(nobody[0])
        for number, (method, learn) in enumerate(ALONE.items(), 2):
            rng = np.random.default_rng([seed, number])
            lines, weights = learn(config.generations, config.pieces, rng)
            rows.append({"method": method, "seed": seed, "games": GAMES, "lines": lines})
            finished.append(weights)

    # all finished players play one long game, side by side
    lines = play(outcome, np.array(finished), config.long, np.random.default_rng([config.seed, 9]))
    for row, long in zip(rows, lines.tolist()):
        row["long"] = long
    return rows


def select_rows(rows: list[dict], **where: object) -> list[dict]:
    """The rows whose fields are as `where` says."""
    return [row for row in rows if where.items() <= row.items()]


def summary(rows: list[dict]) -> dict:
    """Lines at game 3, at the peak of the mean curve, games to it, and in long games, with errors.

    Methods that learn alone have a mean of 100 games a point: game 3 is among the first.
    """
    curves = np.array([row["lines"] for row in rows], float)  # (seeds, points)
    games = rows[0]["games"]
    third = 2 if games == 1 else 0
    peak = int(curves.mean(0).argmax())
    return {"third": mean_se(curves[:, third]), "peak": mean_se(curves[:, peak]),
            "games": (peak + 1) * games, "long": mean_se([row["long"] for row in rows])}


def table(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of every line of the first table."""
    wheres = {"random player": {"method": "random player"},
              "TAMER": MAIN, "TAMER, ridge": MAIN | {"learner": "ridge"},
              "policy iteration": {"method": "policy iteration"},
              "cross-entropy": {"method": "cross-entropy"}}
    return {name: select_rows(rows, **where) for name, where in wheres.items()}


def by_errors(rows: list[dict], condition: dict) -> list[tuple[float, float]]:
    """TAMER's lines at game 3 with their standard errors, for every share of wrong answers."""
    return [summary(select_rows(rows, **MAIN | condition | {"wrong": wrong}))["third"]
            for wrong in WRONG]


def print_tables(rows: list[dict], config: Config) -> None:
    """Both tables: the methods, and what a trainer's errors cost."""
    print(f"\nlines a game, mean of {config.seeds} seeds; games of up to {config.pieces} pieces, "
          f"finished players' of up to {config.long:,}\n")
    heads = ("at game 3", "at the peak", "games to it", "finished")
    print(f"{'':22}" + "".join(f"{head:>16}" for head in heads))
    for name, of_method in table(rows).items():
        found = summary(of_method)
        cells = [f"{mean:.1f} ± {error:.1f}" for mean, error in (found["third"], found["peak"])]
        cells += [str(found["games"]), "{:.0f} ± {:.0f}".format(*found["long"])]
        print(f"{name:22}" + "".join(f"{cell:>16}" for cell in cells))
    print("Lecture 8, a person as trainer, no limit of pieces:")
    for name, cells in PUBLISHED.items():
        print(f"  {name:20}" + "".join(f"{cell:>16}" for cell in cells))

    print("\nTAMER at game 3, by the share of the trainer's answers that are wrong\n")
    print(f"{'':28}" + "".join(f"{f'{wrong:.0%}':>16}" for wrong in WRONG))
    for name, condition in CONTROLS.items():
        cells = [f"{mean:.1f} ± {error:.1f}" for mean, error in by_errors(rows, condition)]
        print(f"{name:28}" + "".join(f"{cell:>16}" for cell in cells))


def draw(rows: list[dict], config: Config, path: Path) -> None:
    """Lines against games of all methods; TAMER's games by the trainer's errors."""
    with figure(path, 2, width=6) as (_, (methods, errors)):
        for name, of_method in table(rows).items():
            mean, error = mean_se(np.array([row["lines"] for row in of_method], float), axis=0)
            x = of_method[0]["games"] * np.arange(1, len(mean) + 1)
            methods.errorbar(x, mean, error, fmt="o-", capsize=3, markersize=4, label=name)
        methods.plot(3, 65.89, "k*", markersize=10, label="TAMER, a person (Lecture 8)")
        most = 0.4 * config.pieces
        methods.axhline(most, color="grey", linestyle=":", label=f"most in {config.pieces} pieces")
        methods.set(xscale="log", yscale="log", ylim=(0.03, 2 * most), xlabel="games",
                    ylabel="lines a game", title="a trainer, and learning alone")
        methods.legend(fontsize=7)
        for name, condition in CONTROLS.items():
            mean, error = np.array(by_errors(rows, condition)).T
            errors.errorbar(100 * np.array(WRONG), mean, error, fmt="o-", capsize=3, markersize=4,
                            label=name)
        errors.set(xlabel="% of the trainer's answers that are wrong", ylabel="lines at game 3",
                   title="what a trainer's errors cost")
        errors.legend(fontsize=8)


# ---- people --------------------------------------------------------------------------------------

def replay(config: Config) -> None:
    """Learn from the key presses of a log, and play 30 games with what was learned."""
    games = read_log(config.replay)
    check_writable(config.out)
    seen = [one for game in games for one in game]
    print(f"{config.replay}: {len(games)} games, {len(seen)} placements, "
          f"{sum(one.h > 0 for one in seen)} praised, {sum(one.h < 0 for one in seen)} blamed")
    print(f"\nlines, mean of 30 games of up to {config.long:,} pieces")
    rows = []
    for name, learner, late in (("step, label to the placement before", GradientStep(), 1),
                                ("step, label to the falling piece", GradientStep(), 0),
                                ("ridge, label to the placement before", Ridge(), 1)):
        learn_from_log(learner, games, late)
        lines = play_alone(learner, config)
        rows.append({"log": Path(config.replay).name, "learner": name, "lines": lines.tolist()})
        print("  {:36}{:10.2f} ± {:.2f}".format(name, *mean_se(lines)))
    log = Path(config.replay).name.removesuffix(".xz").removesuffix(".log")
    write_jsonl(Path(config.out) / f"replay-{log}.jsonl", rows)
    print(f"\nrows  ->  {config.out}")


def play_alone(learner, config: Config) -> np.ndarray:
    """Lines of 30 games of a finished learner: (30,)."""
    weights = np.tile(np.append(0.0, learner.weights), (30, 1))
    return play(outcome, weights, config.long, np.random.default_rng(config.seed))


def learn_from_log(learner, games: list[list], late: int) -> None:
    """A label for every placement of the games; 0 for silence, as in the settings of the logs.

    What was pressed while piece t fell belongs to the placement of piece t - late.
    """
    for game in games:
        f = board_features(np.array([seen.board for seen in game]))
        for t in range(late, len(game) - 1):
            learner.learn(f[t + 1 - late] - f[t - late], game[t + 1].h)


class Person:
    """A trainer at the terminal: + or m says good, - or z bad, q ends. In `with`, each key counts
    at once and unseen; after it, also after Ctrl-C, the terminal is as it was."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.said = {1: 0, -1: 0}
        self.lines = 0
        if termios is None or sys.stdin is None or not sys.stdin.isatty():
            fail("--human: needs a terminal, in which keys can be read one by one")

    def __enter__(self) -> Person:
        self.before = termios.tcgetattr(sys.stdin)
        tty.setcbreak(sys.stdin, termios.TCSADRAIN)
        return self

    def __exit__(self, *_: object) -> None:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self.before)

    def says(self, board: np.ndarray, tried: Candidates, chosen: int) -> int:
        """Shows a placement, and waits for a key. Raises EOFError at q, and if there is no more."""
        self.lines += int(tried.lines[chosen])
        print("\x1b[H\x1b[2J" + picture(tried.landed[chosen], board[0]), flush=True)
        print(f"lines {self.lines}   good {self.said[1]}   bad {self.said[-1]}      "
              "+ good   - bad   q quit", flush=True)
        if not select.select([sys.stdin], [], [], self.seconds)[0]:
            return 0
        key = os.read(sys.stdin.fileno(), 1).decode("latin-1").lower()
        if key in ("", "q", "\x04"):
            raise EOFError
        h = {"+": 1, "m": 1, "-": -1, "z": -1}.get(key, 0)
        if h:
            self.said[h] += 1
        return h


def human(config: Config) -> None:
    """Train by hand, and let the learner play alone afterwards."""
    learner = GradientStep()
    with Person(config.seconds) as person:
        try:
            tamer(learner, person, config.games, config.pieces, np.random.default_rng(config.seed))
        except EOFError:
            pass  # the person has had enough
    print("It plays 30 games alone ...", flush=True)
    lines = play_alone(learner, config)
    print(f"You said good {person.said[1]} times, and bad {person.said[-1]} times. Alone it now "
          "clears {:.1f} ± {:.1f} lines a game.".format(*mean_se(lines)))


def main(config: Config) -> None:
    """Learn from a log or from you; or compare, write, draw and print."""
    if config.replay:
        return replay(config)
    if config.human:
        return human(config)
    folder = Path(config.out)
    check_writable(folder)
    rows = experiment(config)
    write_jsonl(folder / "results.jsonl", rows)
    draw(rows, config, folder / "figure.png")
    print_tables(rows, config)
    print(f"\nrows and figure  ->  {folder}")


if __name__ == "__main__":
    main(parse(Config, __doc__))
