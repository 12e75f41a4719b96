"""Demonstrations, labels, comparisons, scores: which costs a person least, for one task? The figure
that the lectures draw by hand, with numbers.

    python experiments/effort.py     # a pendulum learns to stand; a minute and a half on one core

    demonstrations    the person swings it up; each step is copied (cloning, as in dagger.py)
    labels            the person says which torque is right in states that the learner visited
                      (DAgger, as in dagger.py)
    comparisons       which of two segments is better, the pair drawn at random, or chosen for
                      information (preference_rl.py: backflips)
    scores            how good is this segment? By a calibrated person, and by one whose mood drifts
                      (experiments/scores.py has these people)

What one of them costs is an assumption, and the order depends on it. Three are drawn:
    decisions     each costs 1: a step that is demonstrated, a label, a comparison, a score
    in real time  a demonstration lasts as long as it does, 0.1 s a step; a label takes 2 s; to
                  watch a segment takes 2 s, to say which of two is better 1 s, to find a number 3 s
    slow motion   the same, but nobody can swing a pendulum up in real time: ten times slower

Expected: in real time demonstrations are cheapest, because a step costs next to nothing; counted in
decisions comparisons and scores are, because each is about 20 steps or 40. It would be wrong if one
order held under all three assumptions: then the lectures' axis would need no unit.

It is not quite one task for all: who learns a reward plans with the physics known, who copies does
not need them. The demonstrator is the best policy and never errs.

Writes  runs/effort/ : results.jsonl, figure.png
"""
from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, for the imports below

import common  # noqa: F401  first, so that Ctrl-C while numpy is imported is one line, too

import numpy as np
from tqdm import tqdm

import preference_rl
from common.figures import figure
from common.files import check_writable, write_jsonl
from common.pendulum import (
    STEPS, TORQUES, Grid, bumps, episodes, roll_out, true_reward)
from common.settings import (
    parse, require, require_numbers, run_folder, settings)
from common.statistics import mean_se, values
from preference_rl import EXPLORE, SEGMENT, true_return

LABELS = 40  # of a round of DAgger
SCORES = 10  # of a round
LOOK = math.pi**2 / 6  # variance of what is perceived of a segment, as in scores.py
DRIFT = 0.5  # of the drifting person's mood, a score
WAYS = ("demonstrations", "labels", "comparisons, random", "comparisons, chosen",
        "scores, calibrated", "scores, drifting")

# what a demonstrated step, a label, a comparison and a score cost: assumptions, all of them
COSTS = {
    "decisions": {"demonstrations": 1, "labels": 1, "comparisons": 1, "scores": 1},
    "seconds, in real time": {"demonstrations": 0.1, "labels": 2, "comparisons": 5, "scores": 5},
    "seconds, slow motion": {"demonstrations": 1, "labels": 2, "comparisons": 5, "scores": 5},
}


@settings
class Config:
    demonstrations: int = 20  # Episodes that are demonstrated, of 100 steps each.
    rounds: int = 12  # Rounds of labels, of comparisons and of scores.
    seeds: int = 10  # Repetitions, over which standard errors are computed.
    seed: int = 0  # First seed.
    out: str = ""  # Folder for rows and figure, if not one named by the settings.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="demonstrations rounds seeds", from_0="seed")
        for name, most in (("demonstrations", 10_000), ("rounds", 1000)):
            value = getattr(self, name)
            require(value <= most, f"--{name} {value}: must be at most {most}")
        require(2 <= self.seeds <= 1000, f"--seeds {self.seeds}: must be from 2 to 1000")
        self.out = self.out or run_folder(self, "effort")


# ---- copying -------------------------------------------------------------------------------------

def copy(states: np.ndarray, torques: np.ndarray) -> np.ndarray:
    """Weights (d,) of a policy that gives these torques (n,) in these states (n, 2): ridge
    regression on bumps."""
    phi = bumps(states)
    return np.linalg.solve(phi.T @ phi + 1e-2 * np.eye(phi.shape[1]), phi.T @ torques)


def copied(theta: np.ndarray, state: np.ndarray) -> np.ndarray:
    """The torques (n,) of such a policy in states (n, 2)."""
    return np.clip(bumps(state) @ theta, TORQUES[0], TORQUES[-1])


def return_of(theta: np.ndarray, seed: int) -> float:
    states, _ = roll_out(partial(copied, theta), 50, 0.0, np.random.default_rng([seed, 4]))
    return float(true_reward(states[:, :STEPS]).sum(1).mean())


def demonstrations(config: Config, grid: Grid, best_V: np.ndarray, seed: int) -> list[dict]:
    """Return after 1, 2, 5, 10, ... demonstrated episodes; an answer is a step."""
    rng = np.random.default_rng([seed, 5])
    states, torques = roll_out(partial(grid.act, best_V), config.demonstrations, 0.0, rng)
    counts = [n for n in (1, 2, 5, 10, 20, 50, 100) if n < config.demonstrations]
    rows = []
    for n in counts + [config.demonstrations]:
        theta = copy(states[:n, :STEPS].reshape(-1, 2), torques[:n].ravel())
        rows.append({"answers": n * STEPS, "return": return_of(theta, seed)})
    return rows


def labels(config: Config, grid: Grid, best_V: np.ndarray, seed: int) -> list[dict]:
    """DAgger: return after every round of labels. The expert acts in the first round alone."""
    rng = np.random.default_rng([seed, 6])
    states, torques = np.empty((0, 2)), np.empty(0)
    policy = partial(grid.act, best_V)
    rows = []
    for _ in range(config.rounds):
        visited, _ = roll_out(policy, 10, 0.0, rng)
        visited = visited[:, :STEPS].reshape(-1, 2)
        asked = visited[rng.choice(len(visited), LABELS, replace=False)]
        states = np.concatenate([states, asked])
        torques = np.concatenate([torques, grid.act(best_V, asked)])
        theta = copy(states, torques)
        policy = partial(copied, theta)
        rows.append({"answers": len(torques), "return": return_of(theta, seed)})
    return rows


# ---- learning a reward ---------------------------------------------------------------------------

def comparisons(config: Config, grid: Grid, way: str, seed: int) -> list[dict]:
    """preference_rl.py's second experiment: ten answers a round."""
    rows, _ = preference_rl.backflips(preference_rl.Config(rounds=config.rounds), seed, grid, way)
    return [{"answers": row["answers"], "return": row["return"]} for row in rows]


def scores(config: Config, grid: Grid, drift: float, seed: int) -> list[dict]:
    """The same loop with scores of single segments, and a linear regression."""
    rng = np.random.default_rng([seed, 7])
    rationality = preference_rl.Config().rationality
    phi = bumps(grid.states)
    Phi, given = np.empty((0, phi.shape[1])), np.empty(0)
    V, mood = None, 0.0
    rows = [{"answers": 0, "return": true_return(grid, V, seed)}]
    for k in range(config.rounds):
        states = episodes(grid, V, 40, EXPLORE if k else 1.0, rng)
        segments = states.reshape(-1, SEGMENT, 2)
        for segment in segments[rng.integers(0, len(segments), SCORES)]:
            mood += drift * rng.normal()
            perceived = rationality * true_reward(segment).sum() + rng.gumbel() - np.euler_gamma
            Phi = np.vstack([Phi, bumps(segment).sum(0)])
            given = np.append(given, perceived + mood)

        # the mode of w, with the prior N(0, 1) of preference_rl.py, and an intercept
        centred = Phi - Phi.mean(0)
        w = np.linalg.solve(centred.T @ centred + LOOK * np.eye(phi.shape[1]),
                            centred.T @ (given - given.mean()))
        V = grid.plan(phi @ w, V)
        rows.append({"answers": len(given), "return": true_return(grid, V, seed)})
    return rows


# ---- the experiment ------------------------------------------------------------------------------

def one_seed(config: Config, grid: Grid, best_V: np.ndarray, seed: int) -> list[dict]:
    """The return of every way against its number of answers; of the best policy; of random ones."""
    found = {
        "demonstrations": demonstrations(config, grid, best_V, seed),
        "labels": labels(config, grid, best_V, seed),
        "comparisons, random": comparisons(config, grid, "random", seed),
        "comparisons, chosen": comparisons(config, grid, "information", seed),
        "scores, calibrated": scores(config, grid, 0.0, seed),
        "scores, drifting": scores(config, grid, DRIFT, seed),
        "true reward": [{"answers": 0, "return": true_return(grid, best_V, seed)}],
        "random actions": [{"answers": 0, "return": true_return(grid, None, seed)}],
    }
    return [{"way": way, "seed": seed, **row} for way, rows in found.items() for row in rows]


def cost(way: str, unit: str) -> float:
    """Of one answer."""
    return COSTS[unit][way.split(",")[0]]


def needed(rows: list[dict], way: str, share: float) -> float:
    """After how many answers the mean return stays above this share of the way from random actions
    to the true reward's policy; inf: it does not."""
    low, high = (np.mean(values(rows, "return", way=end))
                 for end in ("random actions", "true reward"))
    found = math.inf
    for count in sorted(set(values(rows, "answers", way=way)), reverse=True):
        if np.mean(values(rows, "return", way=way, answers=count)) < low + share * (high - low):
            break
        found = count
    return found


def print_table(rows: list[dict], config: Config) -> None:
    top, error = mean_se(values(rows, "return", way="true reward"))
    print("\nwhat 75% and 90% of the way from random actions to the true reward's policy "
          f"({top:.1f} ± {error:.1f}) cost, mean of {config.seeds} seeds\n")
    print(f"{'':22}" + "".join(f"{unit:>24}" for unit in COSTS) + f"{'return in the end':>22}")
    for way in WAYS:
        last = max(values(rows, "answers", way=way))
        line = f"{way:22}"
        for unit in COSTS:
            parts = []
            for share in (0.75, 0.9):
                answers = needed(rows, way, share)
                above = "" if answers < math.inf else "> "
                parts.append(f"{above}{min(answers, last) * cost(way, unit):.0f}")
            line += f"{parts[0]:>12}{parts[1]:>12}"
        mean, error = mean_se(values(rows, "return", way=way, answers=last))
        print(f"{line}{mean:14.1f} ± {error:.1f}")


def draw(rows: list[dict], path: Path) -> None:
    """Return against effort, for three ideas of what effort is."""
    with figure(path, len(COSTS), width=4.6, height=4, sharey=True) as (_, axes):
        top = np.mean(values(rows, "return", way="true reward"))
        for axis, unit in zip(axes, COSTS):
            for way in WAYS:
                counts = sorted(set(values(rows, "answers", way=way)) - {0})
                table = [values(rows, "return", way=way, answers=n) for n in counts]
                mean, error = mean_se(np.array(table))
                effort = np.array(counts) * cost(way, unit)
                axis.plot(effort, mean, "o-", markersize=3, label=way)
                axis.fill_between(effort, mean - error, mean + error, alpha=0.2)
            axis.axhline(top, color="black", linestyle="--", label="planned on the true reward")
            axis.set(xscale="log", xlabel=f"human effort: {unit}", title=unit)
        axes[0].set(ylabel="true return")
        axes[0].legend(fontsize=7)


def main(config: Config) -> None:
    """Run all ways, write rows and figure, and print the table."""
    folder = Path(config.out)
    check_writable(folder)
    grid = Grid()
    best_V = grid.plan(true_reward(grid.states))
    rows = []
    for seed in tqdm(range(config.seed, config.seed + config.seeds), "seeds"):
        rows += one_seed(config, grid, best_V, seed)
    write_jsonl(folder / "results.jsonl", rows)
    draw(rows, folder / "figure.png")
    print_table(rows, config)
    print(f"\nrows and figure  ->  {folder}")


if __name__ == "__main__":
    main(parse(Config, __doc__))
