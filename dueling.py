"""Dueling bandits: which two items to compare next, when every comparison has a price.

    In step t choose two of K arms, l and m; l wins with probability P[l, m], which nobody tells.
    regret(T) = sum over t <= T of (gap(l_t) + gap(m_t)) / 2,  gap(i) = P[best, i] - 1/2

The regret is what it costs to show people anything but the best arm twice (Yue et al. 2012; with
this 1/2 in Komiyama et al. 2015). The answers come as preferences, because people tell which of two
rankings or texts they like better, and not how much they like one.

What is best, if P is any matrix with P[i, j] + P[j, i] = 1?

    Condorcet winner   preferred to every other arm; there may be none (rock, scissors, paper)
    Copeland winner    most victories less defeats, where i defeats j if P[i, j] > 1/2
    Borda winner       preferred most often to another arm drawn at random: highest mean of P

The bandits below need a Condorcet winner. With Bradley-Terry's P = sigmoid(r_i - r_j), which the
command uses, all three are the arm with the highest strength r.

    uniform              two arms at random: regret grows like T
    interleaved filter   a candidate meets all others until they are surely worse (Yue et al. 2012)
    RUCB                 relative upper confidence bound (Zoghi et al. 2014): regret like log T
    lower bound          no consistent algorithm is below c log T for ever (Komiyama et al. 2015)

    python dueling.py                      # 8 arms, 20 runs of 30,000 comparisons each; 10 s

Writes  runs/dueling/ : results.jsonl, figure.png

Symbols: P preferences (K, K); T steps; the arms are numbered so that arm 0 is the best.
"""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from common.comparisons import CYCLE, DISAGREE, winners
from common.figures import figure
from common.files import check_writable, write_jsonl
from common.settings import parse, require, require_numbers, run_folder, settings
from common.statistics import mean_se


@settings
class Config:
    arms: int = 8  # Number of arms.
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


def regret_of(P: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """What each comparison costs: nothing only if the best arm, number 0, meets itself."""
    return (P[0, left] + P[0, right]) / 2 - 0.5


def regret_bound(P: np.ndarray) -> float:
    """The constant c of the lower bound c log T on the regret (Komiyama et al. 2015, Theorem 1).

    To be sure that an arm is not the best, it has to lose often enough to some arm that beats it:
    log T / KL(P[arm, rival] || 1/2) times. The cheapest rival counts.
    """
    bound = 0.0
    for arm in range(1, len(P)):
        costs = []
        for rival in np.flatnonzero(P[arm] < 0.5):
            p = P[arm, rival]
            kl = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
            costs.append(regret_of(P, arm, rival) / kl)
        bound += min(costs)
    return bound


# ---- the bandits: each returns the regret so far of every run, (runs, T) -------------------------

def uniform(P: np.ndarray, T: int, runs: int, rng: np.random.Generator) -> np.ndarray:
    """Two arms at random in every step."""
    left, right = rng.integers(0, len(P), (2, runs, T))
    return regret_of(P, left, right).cumsum(1)


def interleaved_filter(P: np.ndarray, T: int, runs: int, rng: np.random.Generator) -> np.ndarray:
    """Interleaved Filter 2 (Yue et al. 2012, Algorithm 2): explore first, then commit.

    The candidate meets all others in turn. Those that are surely worse are dropped. One that is
    surely better takes its place, and all that the old candidate seemed to beat are dropped, too.
    Sure means that 1/2 is outside of the mean +- sqrt(4 log(1 / delta) / n), delta = 1 / (T K^2).
    """
    K = len(P)
    regret = np.zeros((runs, T))
    for run in regret:
        candidate, *rest = rng.permutation(K).tolist()
        t = 0
        while rest and t < T:
            others, rest = np.array(rest), []
            wins, n = np.zeros(len(others)), 0  # of the candidate, in n rounds
            while len(others) and t < T:
                # 1) a round: the candidate meets each of the others once
                run[t:t + len(others)] = regret_of(P, candidate, others)[:T - t]
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
        run[t:] = regret_of(P, candidate, candidate)  # nobody is left: it meets itself
    return regret.cumsum(1)


def rucb(P: np.ndarray, T: int, runs: int, rng: np.random.Generator,
         alpha: float = 0.51) -> np.ndarray:
    """Relative upper confidence bound (Zoghi et al. 2014, Algorithm 1), all runs side by side.

    An arm that may still be the best meets the rival that may beat it most clearly.
    """
    K = len(P)
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
        regret[:, t] = regret_of(P, first, second)
    return regret.cumsum(1)


BANDITS = {"uniform": uniform, "interleaved filter": interleaved_filter, "RUCB": rucb}


# ---- the command ---------------------------------------------------------------------------------

def main(config: Config) -> None:
    """Run the bandits on Bradley-Terry arms; write, draw and print their mean regret."""
    check_writable(config.out)
    T = config.horizon
    P = bradley_terry_arms(config.arms, np.random.default_rng(config.seed))
    curves, rows = {}, []
    for number, (name, bandit) in enumerate(BANDITS.items()):
        # a stream of random numbers for each bandit, so that none depends on the others
        curves[name] = bandit(P, T, config.runs, np.random.default_rng([config.seed, number]))
        for step in (T // 100, T // 10, T):
            mean, error = mean_se(curves[name][:, step - 1])
            rows.append({"bandit": name, "step": step, "regret": mean, "regret_se": error})
    # of RUCB, the last bandit, over the last decade
    slope = (rows[-1]["regret"] - rows[-2]["regret"]) / math.log(10)
    rows.append({"bandit": "RUCB", "slope": slope, "bound": regret_bound(P)})
    write_jsonl(Path(config.out) / "results.jsonl", rows)
    draw(Path(config.out) / "figure.png", curves, regret_bound(P))

    print("rock beats scissors beats paper beats rock, 80% each: "
          + winners(CYCLE, ["rock", "scissors", "paper"]))
    print(f"A beats all narrowly, B beats all but A by far: {winners(DISAGREE, 'ABCD')}")
    print(f"\n{config.arms} Bradley-Terry arms: {winners(P, [str(i) for i in range(config.arms)])}")
    print(f"\nmean regret of {config.runs} runs after   "
          + "".join(f"{step:>16}" for step in (T // 100, T // 10, T)))
    for name in BANDITS:
        cells = [f"{row['regret']:.0f} ± {row['regret_se']:.0f}" for row in rows
                 if row["bandit"] == name and "step" in row]
        print(f"  {name:28}" + "".join(f"{cell:>16}" for cell in cells))
    print(f"\nFrom {T // 10} to {T} comparisons RUCB's regret grows like {slope:.1f} log T; in the "
          f"long run no\nalgorithm does better than {regret_bound(P):.1f} log T "
          "(Komiyama et al. 2015).")
    print(f"\nrows and figure  ->  {config.out}", flush=True)


def draw(path: Path, curves: dict[str, np.ndarray], bound: float) -> None:
    """Mean regret and its standard error against the number of comparisons."""
    T = curves["RUCB"].shape[1]
    steps = np.unique(np.logspace(1, math.log10(T), 200).astype(int))
    with figure(path, width=6.5) as (_, axis):
        for name, regret in curves.items():
            mean, error = mean_se(regret[:, steps - 1], axis=0)
            axis.plot(steps, mean, label=name)
            axis.fill_between(steps, mean - error, mean + error, alpha=0.2)
        axis.plot(steps, bound * np.log(steps), "--", color="black",
                  label=r"lower bound $c\,\log T$, for large $T$")
        axis.set(xscale="log", yscale="log", xlabel="comparisons T", ylabel="regret",
                 title="dueling bandits")
        axis.legend()


if __name__ == "__main__":
    main(parse(Config, __doc__))
