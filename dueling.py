"""Dueling bandits: which two items to compare next, when every comparison has a price.

    In step t choose two of K arms, l and m; l wins with probability P[l, m], which nobody tells.
    regret(T) = sum over t <= T of (gap(l_t) + gap(m_t)) / 2

The regret is what it costs to show people anything but the best arm twice (Yue et al. 2012; with
this 1/2 in Komiyama et al. 2015). The answers come as preferences, because people tell which of two
rankings or texts they like better, and not how much they like one. How clicks tell it of two
rankings is in common/interleaving.py; this command prints what a click says of the lecture's two
lists. experiments/clicks.py has users who click, and the bandits choose among six rankers there.

What is best, if P is any matrix with P[i, j] + P[j, i] = 1, and what is the gap to it?

    Condorcet winner   preferred to every other arm; there may be none (rock, scissors, paper)
                       gap(i) = P[winner, i] - 1/2
    Copeland winner    most victories less defeats, where i defeats j if P[i, j] > 1/2
                       gap(i) = share of the others that the winner defeats, less that of i; used
                       where there is no Condorcet winner (Wu and Liu 2016)
    Borda winner       preferred most often to another arm drawn at random: highest mean of P

With Bradley-Terry's P = sigmoid(r_i - r_j) all three are the arm with the highest strength r.

    uniform              two arms at random: regret grows like T
    interleaved filter   a candidate meets all others until they are surely worse (Yue et al. 2012)
    RUCB                 relative upper confidence bound (Zoghi et al. 2014): regret like log T
    double Thompson      the most victories in a P drawn from what is believed, against the arm that
                         beats it most in another (Wu and Liu 2016): regret like log T, and no
                         Condorcet winner is needed
    lower bound          no consistent algorithm is below c log T for ever (Komiyama et al. 2015)

    python dueling.py    # 8 arms with a Condorcet winner and 5 without, 20 runs of 30,000
                         # comparisons each; 20 s

Writes  runs/dueling/ : results.jsonl, figure.png

Symbols: P preferences (K, K); T steps; arm 0 is the best.
"""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from common.comparisons import (
    CYCLE, DISAGREE, UPSET, condorcet, copeland_scores, winners)
from common.figures import figure
from common.files import check_writable, write_jsonl
from common.interleaving import METHODS, item_credit, random_click
from common.settings import parse, require, require_numbers, run_folder, settings
from common.statistics import mean_se


@settings
class Config:
    arms: int = 8  # Number of arms of the Bradley-Terry problem.
    horizon: int = 30_000  # Comparisons in each run of a bandit.
    runs: int = 20  # Independent runs of each bandit; the regret shown is their mean.
    seed: int = 0  # Seed of the arms and of the bandits.
    out: str = ""  # Folder for rows and figure, if not one named by the settings.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="arms horizon runs", from_0="seed")
        require(2 <= self.arms <= 200, f"--arms {self.arms}: must be from 2 to 200")
        require(100 <= self.horizon <= 10**6, f"--horizon {self.horizon}: must be from 100 to 10^6")
        require(2 <= self.runs <= 100, f"--runs {self.runs}: must be from 2 to 100")
        self.out = self.out or run_folder(self, "dueling")


# ---- the problem ---------------------------------------------------------------------------------

def bradley_terry_arms(K: int, rng: np.random.Generator) -> np.ndarray:
    """P (K, K) of arms whose strengths are drawn from N(0, 1), the best arm first."""
    r = np.sort(rng.normal(size=K))[::-1]
    return 1 / (1 + np.exp(r[None, :] - r[:, None]))


def gaps(P: np.ndarray) -> np.ndarray:
    """How far each arm is from the Condorcet winner, or else from the Copeland winner: (K,)."""
    best = condorcet(P)
    if best is not None:
        return P[best] - 0.5
    score = copeland_scores(P)
    return (score.max() - score) / (2 * (len(P) - 1))


def regret_of(gap: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """What each comparison costs: nothing only if a best arm meets a best arm."""
    return (gap[left] + gap[right]) / 2


def regret_bound(P: np.ndarray) -> float:
    """The constant c of the lower bound c log T on the regret (Komiyama et al. 2015, Theorem 1), if
    arm 0 is the Condorcet winner.

    To be sure that an arm is not the best, it has to lose often enough to some arm that beats it:
    log T / KL(P[arm, rival] || 1/2) times. The cheapest rival counts.
    """
    gap, bound = gaps(P), 0.0
    for arm in range(1, len(P)):
        costs = []
        for rival in np.flatnonzero(P[arm] < 0.5):
            p = P[arm, rival]
            kl = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
            costs.append(regret_of(gap, arm, rival) / kl)
        bound += min(costs)
    return bound


# ---- the bandits: each returns the regret so far of every run, (runs, T) -------------------------

def uniform(P: np.ndarray, T: int, runs: int, rng: np.random.Generator) -> np.ndarray:
    """Two arms at random in every step."""
    left, right = rng.integers(0, len(P), (2, runs, T))
    return regret_of(gaps(P), left, right).cumsum(1)


def interleaved_filter(P: np.ndarray, T: int, runs: int, rng: np.random.Generator) -> np.ndarray:
    """Interleaved Filter 2 (Yue et al. 2012, Algorithm 2): explore first, then commit.

    The candidate meets all others in turn. Those that are surely worse are dropped. One that is
    surely better takes its place, and all that the old candidate seemed to beat are dropped, too.
    Sure means that 1/2 is outside of the mean +- sqrt(4 log(1 / delta) / n), delta = 1 / (T K^2).
    """
    K, gap = len(P), gaps(P)
    regret = np.zeros((runs, T))
    for run in regret:
        candidate, *rest = rng.permutation(K).tolist()
        t = 0
        while rest and t < T:
            others, rest = np.array(rest), []
            wins, n = np.zeros(len(others)), 0  # of the candidate, in n rounds
            while len(others) and t < T:
                # 1) a round: the candidate meets each of the others once
                run[t:t + len(others)] = regret_of(gap, candidate, others)[:T - t]
                wins += rng.random(len(others)) < P[candidate, others]
                n += 1
                t += len(others)

                # 2) what is sure by now?
                mean = wins / n
                radius = math.sqrt(4 * math.log(T * K**2) / n)
                better = mean + radius < 0.5  # than the candidate
                worse = mean - radius > 0.5
                if better.any():
                    successor = int(others[better][0])
                    rest = others[(mean <= 0.5) & (others != successor)].tolist()
                    candidate = successor
                    break
                others, wins = others[~worse], wins[~worse]
        run[t:] = regret_of(gap, candidate, candidate)  # nobody is left: it meets itself
    return regret.cumsum(1)


def rucb(P: np.ndarray, T: int, runs: int, rng: np.random.Generator,
         alpha: float = 0.51) -> np.ndarray:
    """Relative upper confidence bound (Zoghi et al. 2014, Algorithm 1), all runs side by side.

    An arm that may still be the best meets the rival that may beat it most clearly.
    """
    K, gap = len(P), gaps(P)
    run, arms = np.arange(runs), np.arange(K)
    wins = np.zeros((runs, K, K))
    regret = np.zeros((runs, T))
    leader = np.full(runs, -1)  # the arm that was last the only candidate, while it is one; or -1
    for t in range(T):
        # 1) upper confidence bounds of P; 2 where two arms have never met
        n = wins + wins.transpose(0, 2, 1)  # (runs, K, K)
        with np.errstate(divide="ignore", invalid="ignore"):
            bonus = np.sqrt(alpha * math.log(t + 1) / n)
            upper = np.where(n > 0, wins / n + bonus, 2)
        upper[:, arms, arms] = 0.5

        # 2) candidates: arms that may be preferred to every other one
        candidate = (upper >= 0.5).all(2)  # (runs, K)
        alone = candidate.sum(1) == 1
        leader = np.where((leader >= 0) & candidate[run, leader], leader, -1)
        leader = np.where(alone, candidate.argmax(1), leader)

        # 3) the first arm: the leader half of the time, and always if there is no other candidate;
        #    otherwise one of the other candidates, or any arm if there is none
        keep = (leader >= 0) & (alone | (rng.random(runs) < 0.5))
        others = candidate & (arms != leader[:, None])
        drawn = (rng.random((runs, K)) + others).argmax(1)
        first = np.where(keep, leader, drawn)

        # 4) the second arm: the one with the highest bound against the first; ties are broken at
        #    random, and never in favour of the first arm itself
        bound = upper[run, :, first] + 1e-9 * rng.random((runs, K))
        bound[run, first] -= 1e-8
        second = bound.argmax(1)

        # 5) the comparison
        first_wins = rng.random(runs) < P[first, second]
        winner = np.where(first_wins, first, second)
        loser = np.where(first_wins, second, first)
        wins[run, winner, loser] += 1
        regret[:, t] = regret_of(gap, first, second)
    return regret.cumsum(1)


def double_thompson(P: np.ndarray, T: int, runs: int, rng: np.random.Generator,
                    alpha: float = 0.51) -> np.ndarray:
    """Double Thompson sampling (Wu and Liu 2016, Algorithm 1), all runs side by side.

    An arm that seems to defeat most of the others meets the rival that seems to be best at it.
    """
    K, gap = len(P), gaps(P)
    run, arms = np.arange(runs), np.arange(K)
    above, below = np.triu_indices(K, 1)  # every pair of two arms, once
    wins = np.zeros((runs, K, K))
    regret = np.zeros((runs, T))
    for t in range(T):
        # 1) confidence bounds of P; nothing is known of two arms that have never met
        n = wins + wins.transpose(0, 2, 1)  # (runs, K, K)
        with np.errstate(divide="ignore", invalid="ignore"):
            bonus = np.sqrt(alpha * math.log(t + 1) / n)
            upper = np.where(n > 0, wins / n + bonus, 1)
            lower = np.where(n > 0, wins / n - bonus, 0)
        upper[:, arms, arms] = lower[:, arms, arms] = 0.5

        # 2) candidates: arms that may defeat as many others as any arm may
        most = (upper > 0.5).sum(2)  # (runs, K)
        candidate = most == most.max(1, keepdims=True)

        # 3) the first arm: the candidate with the most victories in a P drawn from what is believed
        drawn = rng.beta(1 + wins[:, above, below], 1 + wins[:, below, above])  # (runs, pairs)
        victories = np.zeros((runs, K, K))
        victories[:, above, below] = drawn > 0.5
        victories[:, below, above] = drawn < 0.5
        ties = rng.random((runs, K))  # below 1, so they only decide where victories are equal
        first = np.where(candidate, victories.sum(2) + ties, -1).argmax(1)

        # 4) the second arm: the most likely to beat the first, in another P that is drawn, of those
        #    that are not sure to beat it: against them there is nothing left to learn
        against = rng.beta(1 + wins[run, :, first], 1 + wins[run, first])  # (runs, K)
        against[run, first] = 0.5
        second = np.where(lower[run, :, first] <= 0.5, against, -1).argmax(1)

        # 5) the comparison
        first_wins = rng.random(runs) < P[first, second]
        winner = np.where(first_wins, first, second)
        loser = np.where(first_wins, second, first)
        wins[run, winner, loser] += 1
        regret[:, t] = regret_of(gap, first, second)
    return regret.cumsum(1)


BANDITS = {"uniform": uniform, "interleaved filter": interleaved_filter, "RUCB": rucb,
           "double Thompson": double_thompson}


# ---- the command ---------------------------------------------------------------------------------

# six results of a search, in the order of ranking A; B moves the fourth to the front
LECTURE = ["Purdue", "San Jose", "Info.sjsu", "YouTube", "Yue", "Brown"]
LECTURE_B = ["YouTube", "Purdue", "San Jose", "Info.sjsu", "Yue", "Brown"]


def main(config: Config) -> None:
    """What a click says of the lecture's lists; then the bandits: write, draw and print."""
    check_writable(config.out)
    T = config.horizon
    arms = bradley_terry_arms(config.arms, np.random.default_rng(config.seed))
    problems = {"Bradley-Terry": arms, "no Condorcet winner": UPSET}
    rows = clicks_on_the_lecture()
    curves = {}
    for problem, P in problems.items():
        for number, (name, bandit) in enumerate(BANDITS.items()):
            # a stream of random numbers for each bandit, so that none depends on the others
            regret = bandit(P, T, config.runs, np.random.default_rng([config.seed, number]))
            curves[problem, name] = regret
            for step in (T // 100, T // 10, T):
                mean, error = mean_se(regret[:, step - 1])
                rows.append({"problem": problem, "bandit": name, "step": step, "regret": mean,
                             "regret_se": error})
    bound = regret_bound(arms)
    slopes = {}  # over the last decade
    for name in ("RUCB", "double Thompson"):
        regret = curves["Bradley-Terry", name].mean(0)
        slopes[name] = float(regret[T - 1] - regret[T // 10 - 1]) / math.log(10)
        rows.append({"problem": "Bradley-Terry", "bandit": name, "slope": slopes[name],
                     "bound": bound})
    write_jsonl(Path(config.out) / "results.jsonl", rows)
    draw(Path(config.out) / "figure.png", curves, bound)

    print("rock beats scissors beats paper beats rock, 80% each: "
          + winners(CYCLE, ["rock", "scissors", "paper"]))
    print(f"A beats all narrowly, B beats all but A by far: {winners(DISAGREE, 'ABCD')}")
    print_clicks(rows)
    for problem, P in problems.items():
        print(f"\n{len(P)} arms, {problem}: {winners(P, [str(i) for i in range(len(P))])}")
        print(f"mean regret of {config.runs} runs after   "
              + "".join(f"{step:>16}" for step in (T // 100, T // 10, T)))
        for name in BANDITS:
            cells = [f"{row['regret']:.0f} ± {row['regret_se']:.0f}" for row in rows
                     if row.get("problem") == problem and row["bandit"] == name and "step" in row]
            print(f"  {name:28}" + "".join(f"{cell:>16}" for cell in cells))
        if problem == "Bradley-Terry":
            print(f"From {T // 10} to {T} comparisons RUCB's regret grows like "
                  f"{slopes['RUCB']:.1f} log T, double Thompson's like\n"
                  f"{slopes['double Thompson']:.1f} log T; in the long run no algorithm does "
                  f"better than {bound:.1f} log T (Komiyama et al. 2015).")
    print(f"\nrows and figure  ->  {config.out}", flush=True)


def clicks_on_the_lecture() -> list[dict]:
    """What one click says of the lecture's two lists: a row for every method."""
    b = [LECTURE.index(item) for item in LECTURE_B]
    rows = []
    for method in METHODS:
        a_wins, b_wins, ties = random_click(method, LECTURE, LECTURE_B)
        credit = item_credit(method, range(len(b)), b)
        rows.append({"method": method, "a_wins": a_wins, "b_wins": b_wins, "ties": ties,
                     "credit": dict(zip(LECTURE, credit.tolist()))})
    return rows


def print_clicks(rows: list[dict]) -> None:
    """The lecture's lists: what a random click says, and what a click on each item counts."""
    print("\nTwo rankings: B is A with the fourth item, YouTube, moved to the front. "
          "A click anywhere, and its mean\nscore on each item (above 0 for A):\n")
    print(" " * 15 + "A wins  B wins     tie  " + "".join(f"{item:>10}" for item in LECTURE))
    for row in rows:
        if "method" in row:
            chances = "".join(f"{row[key]:8.3f}" for key in ("a_wins", "b_wins", "ties"))
            credits = "".join(f"{round(row['credit'][item], 9):+10.2f}" for item in LECTURE)
            print(f"{row['method']:13}{chances}  {credits}")


def draw(path: Path, curves: dict[tuple[str, str], np.ndarray], bound: float) -> None:
    """Mean regret and its standard error against the number of comparisons, for each problem."""
    titles = {"Bradley-Terry": "arms with a Condorcet winner (Bradley-Terry)",
              "no Condorcet winner": "no Condorcet winner"}
    with figure(path, 2, width=5.5) as (_, axes):
        for axis, (problem, title) in zip(axes, titles.items()):
            for name in BANDITS:
                regret = curves[problem, name]
                steps = np.unique(np.logspace(1, math.log10(regret.shape[1]), 200).astype(int))
                mean, error = mean_se(regret[:, steps - 1], axis=0)
                axis.plot(steps, mean, label=name)
                axis.fill_between(steps, mean - error, mean + error, alpha=0.2)
            axis.set(xscale="log", yscale="log", xlabel="comparisons T", ylabel="regret",
                     title=title)
        axes[0].plot(steps, bound * np.log(steps), "--", color="black",
                     label=r"lower bound $c\,\log T$, for large $T$")
        axes[0].legend(fontsize=8)


if __name__ == "__main__":
    main(parse(Config, __doc__))
