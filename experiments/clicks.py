"""Which of two rankers is better, from clicks: interleaving against A/B tests, and a winner of six.

    python experiments/clicks.py       # 10 seeds; a minute and a half

Six rankers order six results for each query. The truth is known: a result has a grade from 0 to 4,
and a ranker sees it with noise, less noise for a better ranker. Its quality is its mean NDCG over
the queries. Simulated users read from the top, click, and may leave after a click (dependent click
model, Guo et al. 2009; the probabilities are those of Hofmann et al. 2011):

    navigational    looks for one good result: leaves after most clicks on one
    informational   looks for more: clicks more often, leaves less often
    leaves anyway   clicks as the navigational user does, but leaves after each result with
                    probability 0.3, whether it was clicked or not
    never leaves    the same clicks, and always reads on
    random          clicks and leaves without looking at the result

An experiment of n impressions compares two rankers. Interleaving (common/interleaving.py) shows n
lists made of both, and the sign of the mean score names the better one. An A/B test shows n / 2
people one ranking and n / 2 the other, and compares the means of an absolute measure. What counts
is the share of experiments that name the ranker with the higher quality, over all 15 pairs.

Expected: interleaving needs a tenth of the impressions or less, because in it each user compares.
The random user must leave every share near 50%. Iizuka et al. 2023 find that the advantage comes
from users who leave depending on the relevance, so it should vanish where they leave anyway and
where they never leave. (Neither is what comes out: results/dueling has the table.)

The outcome then goes to the bandits of dueling.py: P[i, j] = 1/2 + mean score / 2 for team-draft
interleaving and the navigational user (a tie is decided by a coin), so a comparison is one
interleaved impression, and the winner among six rankers is looked for while people search.

Writes  runs/clicks/ : results.jsonl, figure.png

Symbols: n impressions of an experiment; Q queries; 6 results a query; score above 0 for the first.
"""
from __future__ import annotations

import functools
import itertools
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, for the imports below

import common  # noqa: F401  first, so that Ctrl-C while numpy is imported is one line, too

import numpy as np
from tqdm import tqdm

from common.comparisons import winners
from common.figures import figure
from common.files import check_writable, write_jsonl
from common.interleaving import METHODS, Shown, interleave, score
from common.settings import (
    parse, require, require_numbers, run_folder, settings)
from common.statistics import mean_se
from dueling import BANDITS

RESULTS = 6  # of a query
NOISE = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0)  # of the rankers, in grades
PAIRS = list(itertools.combinations(range(len(NOISE)), 2))
SIZES = (10, 30, 100, 300, 1000, 3000, 10_000)  # impressions of an experiment
ABSOLUTE = ("A/B, clicks", "A/B, reciprocal rank", "A/B, first result")

# for grades 0 to 4: P(click | grade), P(leave | grade, clicked), P(leave | not clicked)
LOOKS_FOR_ONE = [0.05, 0.3, 0.5, 0.7, 0.95]
USERS = {"navigational": (LOOKS_FOR_ONE, [0.2, 0.3, 0.5, 0.7, 0.9], 0.0),
         "informational": ([0.4, 0.6, 0.7, 0.8, 0.9], [0.1, 0.2, 0.3, 0.4, 0.5], 0.0),
         "leaves anyway": (LOOKS_FOR_ONE, [0.3] * 5, 0.3),
         "never leaves": (LOOKS_FOR_ONE, [0.0] * 5, 0.0),
         "random": ([0.5] * 5, [0.5] * 5, 0.0)}


@settings
class Config:
    queries: int = 100  # Queries of a seed, each with six results.
    impressions: int = 50_000  # Impressions simulated for each pair, user and method; they are cut
    # into experiments of 10 to 10,000.
    horizon: int = 10_000  # Comparisons in each run of a bandit.
    seeds: int = 10  # Repetitions with other grades, rankers and clicks.
    seed: int = 0  # First seed.
    out: str = ""  # Folder for rows and figure, if not one named by the settings.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="queries impressions horizon seeds", from_0="seed")
        require(self.queries <= 1000, f"--queries {self.queries}: must be at most 1000")
        least = 2 * SIZES[-1]
        require(least <= self.impressions <= 10**6,
                f"--impressions {self.impressions}: must be from {least} to 10^6")
        require(100 <= self.horizon <= 10**6, f"--horizon {self.horizon}: must be from 100 to 10^6")
        require(2 <= self.seeds <= 1000, f"--seeds {self.seeds}: must be from 2 to 1000")
        self.out = self.out or run_folder(self, "clicks")


# ---- rankers and users ---------------------------------------------------------------------------

def make_rankers(Q: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Six rankers, the best first.

    Returns:
        grades: (Q, 6) of the results.
        orders: (6, Q, 6) the results in the order of each ranker, the first on top.
        quality: (6,) mean NDCG.
    """
    grades = rng.integers(0, 5, (Q, RESULTS))
    seen = grades + np.array(NOISE)[:, None, None] * rng.normal(size=(len(NOISE), Q, RESULTS))
    orders = np.argsort(-seen, axis=2)
    quality = np.array([ndcg(grades, order).mean() for order in orders])
    best_first = np.argsort(-quality)
    return grades, orders[best_first], quality[best_first]


def ndcg(grades: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Discounted cumulative gain of each query's order, as a share of the best possible: (Q,).

    A query without any good result counts 1 in every order.
    """
    discount = 1 / np.log2(np.arange(RESULTS) + 2)
    gain = 2.0**grades - 1
    found = np.take_along_axis(gain, order, 1) @ discount
    best = -np.sort(-gain, 1) @ discount
    return np.where(best > 0, found / np.maximum(best, 1e-12), 1.0)


def click(grades: np.ndarray, user: str, rng: np.random.Generator) -> np.ndarray:
    """Clicks (M, 6) on lists whose results have these grades (M, 6)."""
    p_click, p_leave, p_leave_anyway = USERS[user]
    attracted = rng.random(grades.shape) < np.array(p_click)[grades]
    p = np.where(attracted, np.array(p_leave)[grades], p_leave_anyway)
    leaves = rng.random(grades.shape) < p  # having read this place
    left_above = leaves.cumsum(1) - leaves > 0
    return attracted & ~left_above


# ---- impressions ---------------------------------------------------------------------------------

@functools.cache
def lists_of(method: str, b: tuple[int, ...]) -> Shown:
    """interleave(), for results that are named by their place in A; of b there are 6! only."""
    return interleave(method, range(RESULTS), b)


def all_lists(method: str, a: np.ndarray, b: np.ndarray,
              grades: np.ndarray) -> tuple[Shown, np.ndarray]:
    """Every list of every query for two rankers (Q, 6), all queries alike; and grades (L, 6)."""
    parts, shown_grades = [], []
    for own_a, own_b, own_grades in zip(a, b, grades):
        place_in_a = np.argsort(own_a)
        shown = lists_of(method, tuple(place_in_a[own_b].tolist()))
        parts.append(shown)
        shown_grades.append(own_grades[own_a][shown.items])
    together = Shown(*(np.concatenate(field) for field in zip(*parts)))
    together = together._replace(probability=together.probability / len(a))
    return together, np.concatenate(shown_grades)


def interleaved(method: str, lists: tuple[Shown, np.ndarray], user: str, M: int,
                rng: np.random.Generator) -> np.ndarray:
    """The scores (M,) of M impressions."""
    shown, grades = lists
    cumulative = shown.probability.cumsum()
    drawn = np.searchsorted(cumulative / cumulative[-1], rng.random(M), side="right")
    clicks = click(grades[drawn], user, rng)
    return score(method, clicks, Shown(*(field[drawn] for field in shown)))


def absolute(order: np.ndarray, grades: np.ndarray, user: str, M: int,
             rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The absolute measures (M,) of M impressions of one ranker's lists."""
    ranked = np.take_along_axis(grades, order, 1)  # (Q, 6)
    clicks = click(ranked[rng.integers(0, len(ranked), M)], user, rng)
    first = clicks.argmax(1) + 1
    return {"A/B, clicks": clicks.sum(1).astype(float),
            "A/B, reciprocal rank": np.where(clicks.any(1), 1 / first, 0.0),
            "A/B, first result": clicks[:, 0].astype(float)}


def share_right(means: np.ndarray) -> float:
    """Share of experiments whose mean is above 0; one that is exactly 0 says either by a coin."""
    return float((means > 1e-12).mean() + (np.abs(means) <= 1e-12).mean() / 2)


def cut(values: np.ndarray, n: int) -> np.ndarray:
    """Means of values (M,) over experiments of n: (M // n,)."""
    return values[:len(values) // n * n].reshape(-1, n).mean(1)


# ---- the experiment ------------------------------------------------------------------------------

def compare(config: Config, seed: int) -> tuple[list[dict], np.ndarray]:
    """Share of experiments that name the better ranker, for every user, method and size.

    Returns the rows, and the mean score P (6, 6) of team-draft and navigational as a preference.
    """
    M = config.impressions
    rng = np.random.default_rng(seed)
    grades, orders, quality = make_rankers(config.queries, rng)
    preference = np.full((len(NOISE), len(NOISE)), 0.5)
    shares = {}  # (user, method, size) -> a share for each pair
    deltas = {}  # (user, method) -> the mean score of each pair
    for i, j in PAIRS:  # i is the better one
        for method in METHODS:
            lists = all_lists(method, orders[i], orders[j], grades)
            for user in USERS:
                scores = interleaved(method, lists, user, M, rng)
                deltas.setdefault((user, method), []).append(scores.mean())
                for n in SIZES:
                    shares.setdefault((user, method, n), []).append(share_right(cut(scores, n)))
                if (user, method) == ("navigational", "team-draft"):
                    preference[i, j] = 0.5 + scores.mean() / 2
                    preference[j, i] = 1 - preference[i, j]
        for user in USERS:
            of_i, of_j = (absolute(orders[k], grades, user, M // 2, rng) for k in (i, j))
            for measure in ABSOLUTE:
                deltas.setdefault((user, measure), []).append(
                    of_i[measure].mean() - of_j[measure].mean())
                for n in SIZES:
                    means = cut(of_i[measure], n // 2) - cut(of_j[measure], n // 2)
                    shares.setdefault((user, measure, n), []).append(share_right(means))

    rows = [{"seed": seed, "quality": quality.tolist()}]
    for (user, method), means in deltas.items():
        row = {"seed": seed, "user": user, "method": method, "score": float(np.mean(means)),
               "absolute_score": float(np.abs(means).mean()),
               "right_in_the_long_run": float(np.mean(np.array(means) > 0))}
        for n in SIZES:
            row[f"right_{n}"] = float(np.mean(shares[user, method, n]))
        row["needed"] = impressions_needed([row[f"right_{n}"] for n in SIZES])
        rows.append(row)
    return rows, preference


def impressions_needed(shares: list[float]) -> float | None:
    """Impressions until 90% of the experiments are right, interpolated in log n; None if never."""
    for k in range(1, len(SIZES)):
        if shares[k] >= 0.9:
            part = max(0.0, (0.9 - shares[k - 1]) / (shares[k] - shares[k - 1]))
            return float(SIZES[k - 1] * (SIZES[k] / SIZES[k - 1])**part)
    return None


def find_winner(preference: np.ndarray, config: Config) -> tuple[list[dict], dict]:
    """The bandits among the six rankers: rows, and the curves of their regret."""
    T, curves, rows = config.horizon, {}, []
    for number, (name, bandit) in enumerate(BANDITS.items()):
        regret = bandit(preference, T, 20, np.random.default_rng([config.seed, number]))
        curves[name] = regret
        late = regret[:, -1] - regret[:, -1 - T // 10]  # what the last tenth costs
        for step in (T // 100, T // 10, T):
            mean, error = mean_se(regret[:, step - 1])
            rows.append({"bandit": name, "step": step, "regret": mean, "regret_se": error})
        rows.append({"bandit": name, "late_regret": float(late.mean() / (T // 10))})
    return rows, curves


def main(config: Config) -> None:
    """Run, write, draw and print."""
    check_writable(config.out)
    rows, preference = [], None
    for seed in tqdm(range(config.seed, config.seed + config.seeds), "clicks"):
        own, found = compare(config, seed)
        rows += own
        preference = found if preference is None else preference
    rows.append({"preference": preference.tolist()})
    bandit_rows, curves = find_winner(preference, config)
    rows += bandit_rows
    write_jsonl(Path(config.out) / "results.jsonl", rows)
    draw(rows, curves, Path(config.out) / "figure.png")
    print_table(rows, config)
    print(f"\n{len(preference)} rankers, navigational user, team-draft: "
          + winners(preference, [str(i) for i in range(len(preference))]))
    print("P(row beats column):")
    for row in preference:
        print("  " + "".join(f"{p:8.3f}" for p in row))
    T = config.horizon
    print("mean regret of 20 runs after   "
          + "".join(f"{step:>14}" for step in (T // 100, T // 10, T)))
    for name in BANDITS:
        cells = [f"{row['regret']:.1f} ± {row['regret_se']:.1f}" for row in bandit_rows
                 if row["bandit"] == name and "step" in row]
        print(f"  {name:28}" + "".join(f"{cell:>14}" for cell in cells))
    print(f"\nrows and figure  ->  {config.out}", flush=True)


def of(rows: list[dict], name: str, user: str, method: str) -> list[float]:
    """A field for every seed."""
    return [row[name] for row in rows if row.get("user") == user and row["method"] == method]


def print_table(rows: list[dict], config: Config) -> None:
    """Share right against impressions, for every user and method."""
    print(f"\nshare of experiments that name the better ranker, in %; 15 pairs, mean of "
          f"{config.seeds} seeds")
    for user in USERS:
        print(f"\n{user + ', impressions':24}" + "".join(f"{n:>10}" for n in SIZES)
              + "   90% after")
        for method in (*METHODS, *ABSOLUTE):
            line = ""
            for n in SIZES:
                mean, error = mean_se(of(rows, f"right_{n}", user, method))
                line += f"{f'{100 * mean:.0f} ± {100 * error:.0f}':>10}"
            needed = of(rows, "needed", user, method)
            shown = "never" if None in needed else f"{geometric(needed):.0f}"
            print(f"  {method:22}{line}{shown:>12}")


def geometric(values: list[float]) -> float:
    """The geometric mean."""
    return float(np.exp(np.log(values).mean()))


def draw(rows: list[dict], curves: dict[str, np.ndarray], path: Path) -> None:
    """Share right against impressions for three users; the bandits' regret."""
    with figure(path, 2, width=4.6, rows=2) as (_, (*axes, last)):
        for axis, user in zip(axes, ("navigational", "leaves anyway", "never leaves")):
            for method in (*METHODS, *ABSOLUTE):
                shares = np.array([of(rows, f"right_{n}", user, method) for n in SIZES])
                mean, error = mean_se(shares)
                line = "o-" if method in METHODS else "s--"
                axis.errorbar(SIZES, mean, 1.96 * error, fmt=line, markersize=4, capsize=2,
                              label=method)
            axis.axhline(0.9, color="gray", linewidth=0.8)
            axis.set(xscale="log", xlabel="impressions", ylabel="names the better ranker",
                     title=f"user: {user}")
        axes[0].legend(fontsize=8)
        for name, regret in curves.items():
            steps = np.unique(np.logspace(1, math.log10(regret.shape[1]), 200).astype(int))
            mean, error = mean_se(regret[:, steps - 1], axis=0)
            last.plot(steps, mean, label=name)
            last.fill_between(steps, mean - error, mean + error, alpha=0.2)
        last.set(xscale="log", yscale="log", xlabel="interleaved impressions", ylabel="regret",
                 title="a winner among six rankers")
        last.legend(fontsize=8)


if __name__ == "__main__":
    main(parse(Config, __doc__))
