"""Bradley-Terry: from "this one is better" to a number for each item. It is the model under reward_model.py and dpo.py,
here with nothing around it; a tool for ranking your own comparisons; and what to do when each comparison has a price.

    P(i beats j) = exp(r_i) / (exp(r_i) + exp(r_j)) = sigmoid(r_i - r_j)                     (Bradley and Terry 1952)
    loss(r) = - sum over comparisons of  mu log P(i beats j) + (1 - mu) log P(j beats i),  mu = 1, 1/2 (a tie) or 0

    python bt.py                                    # simulated items, and dueling bandits; 15 s
    python bt.py --data FILE.csv                    # a leaderboard of your comparisons
    python bt.py --data FILE.csv --home --reference Baltimore       # with an advantage of the left side

FILE.csv has the columns left,right,outcome (left, right or tie) or winner,loser, and a weight if you like; or the columns
ranking,position,item, one row a place: rankings of any length (Plackett 1975, Luce 1959: each place is a choice among those
that are left, r again its logit, and two items make it Bradley-Terry).

One likelihood serves all comparisons. With d = r_i - r_j + home, nu >= 0 and Z = exp(d/2) + exp(-d/2) + nu,

    P(left wins) = exp(d/2) / Z,  P(tie) = nu / Z,  P(right wins) = exp(-d/2) / Z              (Davidson 1970)

which is sigmoid(d) for nu = 0; a tie then counts as half a win for each. It is concave in (r, home, log nu), so Newton's method
finds the maximum, if there is one: an item that never lost has no finite strength, and two groups that never met no common
scale. That is an error here, unless --prior says what to believe without data (strengths normal with this standard deviation).

Only differences of strengths mean anything: adding a constant to all changes no probability, so they are shown with mean 0, or
as differences from --reference. Their scale does mean something: twice the strengths are another model.

Symbols: r strengths (K,); wins[i, j] how often i (on the left, if sides matter) beat j; losses[i, j] how often it, on the
left, lost to j; ties[i, j]. The error bars are 95% intervals.

Writes  runs/bt/ : leaderboard.csv, probabilities.csv, figure.png with --data; results.jsonl, figure.png without
"""
from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, ClassVar, Literal, NamedTuple, Sequence

import numpy as np

from common import fail
from common.files import atomic_write, write_jsonl
from common.settings import parse, require, require_numbers
from common.comparisons import OUTCOMES, Rankings, read_comparisons

Matrix = np.ndarray


@dataclass
class Config:
    data: str = ""  # CSV file of comparisons or rankings; none = a simulation
    home: bool = False  # fit an advantage of the left side
    ties: Literal["half", "davidson"] = "half"  # a tie is half a win for each, or an outcome with a parameter of its own
    prior: float = 0.0  # standard deviation of a normal prior on the strengths; 0 = none
    errors: Literal["fisher", "sandwich", "bootstrap"] = "fisher"  # intervals: from the model's curvature; valid also where the
    # model is wrong (ties as half wins are less noisy than wins); or from comparisons drawn again
    resamples: int = 1000  # of --errors bootstrap
    reference: str = ""  # item whose strength is 0; none = the mean is
    items: int = 8  # of the simulation
    comparisons: int = 1000  # of the simulation
    horizon: int = 30_000  # comparisons of each dueling bandit
    seed: int = 0  # of what is drawn: the simulation, --errors bootstrap, the draws for the ranks
    out: str = "runs/bt"  # folder of tables and figure

    PRESETS: ClassVar[dict] = {}

    def __post_init__(self) -> None:
        require_numbers(self, above_0="resamples comparisons", from_0="prior seed")
        require(self.items > 1, f"--items {self.items}: must be > 1")
        require(self.horizon >= 100, f"--horizon {self.horizon}: must be >= 100")
        require(bool(self.data) or not (self.home or self.reference or self.prior), "--home, --reference, --prior: need --data")
        require(bool(self.data) or self.ties == "half" and self.errors == "fisher", "--ties, --errors: need --data")
        require(self.errors == "bootstrap" or self.resamples == Config.resamples, "--resamples: needs --errors bootstrap")


# ---- the model and its fit -------------------------------------------------------------------------------------------

class NoMaximum(ValueError):
    """The likelihood has no maximum: some strength would be infinite, or has no common scale with the others."""


class Fit(NamedTuple):
    strengths: Matrix  # (K,) r, mean 0
    covariance: Matrix  # of (r, home, log nu), of those that were fitted; of r less its mean
    loss: float  # negative log-likelihood of all comparisons, nats
    home: float = 0.0  # added to the left side's r
    log_nu: float = -math.inf  # of Davidson's model; -inf: no ties

    def probabilities(self) -> Matrix:
        """P(i beats j), (K, K), a tie counted as half a win; on neutral ground."""
        left, tie, _ = outcomes(self.strengths[:, None] - self.strengths, math.exp(self.log_nu))
        return left + tie / 2

    def errors(self, reference: int | None = None) -> Matrix:
        """Standard errors (K,) of the strengths, or of their differences from that of `reference`."""
        c = self.covariance[:len(self.strengths), :len(self.strengths)]
        variance = c.diagonal() if reference is None else c.diagonal() + c[reference, reference] - 2 * c[reference]
        return np.sqrt(variance.clip(0))


def count(winners: Sequence[int], losers: Sequence[int], K: int, weights: Sequence[float] | None = None) -> Matrix:
    """The matrix of wins (K, K) of a list of comparisons. Everything below works on it, so a long list costs nothing."""
    pairs = np.asarray(winners) * K + np.asarray(losers)
    return np.bincount(pairs, weights, K * K).reshape(K, K).astype(float)


def outcomes(d: Matrix, nu: float) -> tuple[Matrix, Matrix, Matrix]:
    """P(left wins), P(tie), P(right wins) for d = r_left - r_right + home."""
    lower = np.exp(-np.abs(d))  # all divided by exp(|d| / 2), so that nothing overflows
    tie = nu * np.sqrt(lower) if nu else np.float64(0)
    higher = 1 / (1 + lower + tie)
    lower *= higher
    return np.where(d > 0, higher, lower), tie * higher, np.where(d > 0, lower, higher)


def fit(wins: Matrix, losses: Matrix | float = 0, ties: Matrix | float = 0, *, home: bool = False, davidson: bool = False,
        prior: float = 0.0, sandwich: bool = False, names: Sequence[str] | None = None, start: Matrix | None = None) -> Fit:
    """Maximum-likelihood strengths by Newton's method; the posterior mode with a prior.

    Args:
        wins, losses, ties: (K, K), the item on the left in the row. Without sides `wins` is enough: wins[i, j], i beat j.
        davidson: fit nu, too; otherwise a tie is half a win for each.
        sandwich: covariance H^-1 (sum of squared gradients) H^-1 in place of H^-1.
        start: (r, home, log nu) to start from, of those that are fitted.
    Raises:
        NoMaximum, with the items that are to blame.
    """
    K, names = len(wins), names or [str(i) for i in range(len(wins))]
    losses, ties = (np.broadcast_to(np.asarray(x, float), (K, K)) for x in (losses, ties))
    n, net, n_ties = wins + losses + ties, (wins - losses) / 2, ties.sum()  # net: what it scored beyond half of n
    if davidson and (n_ties == 0 or n_ties == n.sum()):
        raise NoMaximum(f"Davidson's model needs ties and decisions; here {n_ties:g} of {n.sum():g} comparisons are ties")
    if not prior:
        check_connected(wins + losses.T + ties + ties.T > 0, names)
    fitted = np.array([True] * K + [home, davidson])
    precision = np.zeros(K + 2)
    precision[:K] = 1 / prior**2 if prior else 0

    def unpack(x: Matrix) -> Matrix:
        full = np.zeros(K + 2)
        full[-1] = -math.inf
        full[fitted] = x
        return full

    def assemble(dd: Matrix, dt: Matrix, tt: Matrix) -> Matrix:
        """Sum over cells of what is (dd, dt; dt, tt) in (d, log nu), in terms of (r, home, log nu): d = r_i - r_j + home."""
        H = np.empty((K + 2, K + 2))
        H[:K, :K] = -dd - dd.T
        H[np.arange(K), np.arange(K)] = dd.sum(0) + dd.sum(1) - 2 * dd.diagonal()
        H[:K, K] = H[K, :K] = dd.sum(1) - dd.sum(0)
        H[:K, -1] = H[-1, :K] = dt.sum(1) - dt.sum(0)
        H[K, K], H[K, -1], H[-1, K], H[-1, -1] = dd.sum(), dt.sum(), dt.sum(), tt.sum()
        return H[np.ix_(fitted, fitted)]

    def objective(x: Matrix) -> tuple[float, Matrix, Matrix]:
        full = unpack(x)
        d = full[:K, None] - full[:K] + full[K]
        left, tie, right = outcomes(d, math.exp(full[-1]))
        half = (left - right) / 2  # the expected score beyond 1/2
        # sum of n log Z - net d - ties log nu, where log Z = |d| / 2 - log P of the likelier side
        loss = (n * (np.abs(d) / 2 - np.log(np.maximum(left, right))) - net * d).sum() - (n_ties * full[-1] if davidson else 0)
        loss += (precision[:K] * full[:K] ** 2).sum() / 2
        G = n * half - net  # the derivative in d: expected less observed score
        gradient = np.concatenate([G.sum(1) - G.sum(0) + precision[:K] * full[:K], [G.sum(), (n * tie).sum() - n_ties]])
        H = assemble(n * ((left + right) / 4 - half**2), -n * half * tie, n * tie * (1 - tie))
        return loss, gradient[fitted], H + np.diag(precision[fitted])

    per_item = (n.sum(0) + n.sum(1)).max()
    start = np.zeros(fitted.sum()) if start is None else start
    if home and np.linalg.cond(without_gauge(objective(start)[2], K)) > 1e14:
        raise NoMaximum("the comparisons cannot tell the strengths from the left side's advantage")
    x, loss, H = newton(objective, start, K, 1e-10 * max(1, per_item))
    full = unpack(x)
    covariance = inverse(H, K)
    if sandwich:
        d = full[:K, None] - full[:K] + full[K]
        left, tie, right = outcomes(d, math.exp(full[-1]))
        half = (left - right) / 2
        squares = [c * np.stack([(s - half) ** 2, (s - half) * (t - tie), (t - tie) ** 2])
                   for c, s, t in ((wins, 0.5, 0), (ties, 0, 1), (losses, -0.5, 0))]
        covariance = covariance @ assemble(*sum(squares)) @ covariance
    loss -= (precision[:K] * full[:K] ** 2).sum() / 2
    return Fit(full[:K] - full[:K].mean(), covariance, loss, full[K], full[-1])


def newton(objective: Callable, x: Matrix, K: int, tolerance: float) -> tuple[Matrix, float, Matrix]:
    """Minimise a convex function of which the first K arguments may be shifted together, until |gradient| <= tolerance.

    Args:
        objective: x -> value, gradient, Hessian.
    Returns:
        x, value and Hessian at the minimum.
    """
    value, gradient, H = objective(x)
    for _ in range(200):
        step = np.linalg.solve(without_gauge(H, K), gradient)
        if np.abs(gradient).max() <= tolerance:
            if np.abs(step).max() > 1e-2:  # flat, and yet a long way to go: there is no end to it
                break
            return x, value, H
        size = 1.0  # halved until the value falls; near the minimum its last digits cannot tell
        while not (new := objective(x - size * step))[0] <= value + 1e-12 * abs(value) and size > 1e-6:
            size /= 2
        x, (value, gradient, H) = x - size * step, new
    raise NoMaximum("the fit did not converge: the likelihood has no maximum, or hardly one" + HINT)


def without_gauge(H: Matrix, K: int) -> Matrix:
    """A Hessian that does not see a shift of the first K arguments, made to see it, so that it can be inverted."""
    shift = np.arange(len(H)) < K
    return H + np.outer(shift, shift) * H.trace() / K**2


def inverse(H: Matrix, K: int) -> Matrix:
    """The inverse of such a Hessian for arguments with mean 0."""
    C = np.linalg.inv(without_gauge(H, K))
    C[:K] -= C[:K].mean(0)
    C[:, :K] -= C[:, :K].mean(1, keepdims=True)
    return C


def mm(wins: Matrix, iterations: int = 10_000, tolerance: float = 1e-12) -> Matrix:
    """The same strengths by the oldest algorithm, which fits in a line (Zermelo 1929; Hunter 2004, Eq. 3).

    exp(r_i) <- wins of i / sum_j n_ij / (exp(r_i) + exp(r_j)): each step raises the likelihood, by less and less.
    """
    check_connected(wins > 0, [str(i) for i in range(len(wins))])
    n, strength = wins + wins.T, np.ones(len(wins))
    for _ in range(iterations):
        old, strength = strength, wins.sum(1) / (n / (strength[:, None] + strength)).sum(1)
        strength /= np.exp(np.log(strength).mean())
        if np.abs(np.log(strength / old)).max() < tolerance:
            break
    return np.log(strength)


# ---- does the answer exist? ------------------------------------------------------------------------------------------

HINT = "; more comparisons, or --prior, would give them a finite strength"


def reached(beats: Matrix, start: int) -> Matrix:
    """(K,) bool: the items that `start` beats, those that these beat, and so on; itself, too."""
    seen = np.zeros(len(beats), bool)
    new = np.arange(len(beats)) == start
    while new.any():
        seen |= new
        new = beats[new].any(0) & ~seen
    return seen


def check_connected(beats: Matrix, names: Sequence[str]) -> None:
    """Raise NoMaximum unless from each item a path of "beats" leads to every other (Ford 1957)."""
    if reached(beats, 0).all() and reached(beats.T, 0).all():
        return

    def listed(group: Matrix) -> str:
        some = [names[i] for i in np.flatnonzero(group)]
        return ", ".join(some[:10]) + (f" and {len(some) - 10} more" if len(some) > 10 else "")

    group = reached(beats | beats.T, 0)
    if not group.all():
        smaller = min(group, ~group, key=np.count_nonzero)
        raise NoMaximum(f"these items were never compared with the others: {listed(smaller)}" + HINT)
    everyone = np.stack([reached(beats, i) for i in range(len(beats))])  # [i, j]: i beats j, directly or not
    together = everyone & everyone.T
    top = next(group for i, group in enumerate(together) if not (everyone[:, i] & ~group).any())
    bottom = next(group for i, group in enumerate(together) if not (everyone[i] & ~group).any())
    smaller, verb = min(((top, "never lost to"), (bottom, "never won against")), key=lambda found: found[0].sum())
    raise NoMaximum(f"these items {verb} any of the others: {listed(smaller)}" + HINT)


# ---- how sure? -------------------------------------------------------------------------------------------------------

def bootstrap(wins: Matrix, losses: Matrix | float = 0, ties: Matrix | float = 0, *, resamples: int, seed: int = 0,
              **options) -> Matrix:
    """Strengths (resamples', K) of as many comparisons drawn again from these, on counts; `options` as for fit.

    A sample without a maximum is left out: there are then fewer rows than `resamples`.
    """
    K, rng, rows = len(wins), np.random.default_rng(seed), []
    counts = np.stack([np.broadcast_to(np.asarray(x, float), (K, K)) for x in (wins, losses, ties)])
    whole = fit(*counts, **options)
    start = np.concatenate([whole.strengths, [whole.home] * bool(options.get("home")),
                            [whole.log_nu] * bool(options.get("davidson"))])
    cells, probability = np.flatnonzero(counts), counts[counts > 0] / counts.sum()
    for _ in range(resamples):
        again = np.zeros(counts.size)
        again[cells] = rng.multinomial(round(counts.sum()), probability)
        try:
            rows.append(fit(*again.reshape(counts.shape), **options, start=start).strengths)
        except NoMaximum:
            continue
    return np.array(rows).reshape(-1, K)


def rank_intervals(draws: Matrix) -> tuple[Matrix, Matrix]:
    """The lowest and the highest rank (1 = best), (K,) each, that hold 95% of the draws (n, K) of the strengths."""
    ranks = (-draws).argsort(1).argsort(1) + 1
    return tuple(np.quantile(ranks, q, axis=0, method=how) for q, how in ((0.025, "higher"), (0.975, "lower")))


# ---- rankings of any length ------------------------------------------------------------------------------------------

def fit_rankings(rankings: Sequence[Sequence[int]], K: int, weights: Sequence[float] | None = None, *, prior: float = 0.0,
                 names: Sequence[str] | None = None) -> Fit:
    """Plackett-Luce strengths of rankings, best first: P(ranking) = prod_k exp(r_k) / sum of exp(r) over those still left."""
    beats = np.zeros((K, K), bool)
    chosen, left, weight = [], [], []
    for row, w in zip(rankings, np.ones(len(rankings)) if weights is None else weights):
        for place in range(len(row) - 1):
            beats[row[place], row[place + 1:]] = True
            chosen.append(row[place])
            left.append(np.isin(np.arange(K), row[place:]))
            weight.append(w)
    if not prior:
        check_connected(beats, names or [str(i) for i in range(K)])
    chosen, left, weight = np.array(chosen, int), np.array(left).reshape(-1, K), np.array(weight)
    placed = np.bincount(chosen, weight, K)
    precision = 1 / prior**2 if prior else 0.0

    def objective(r: Matrix) -> tuple[float, Matrix, Matrix]:
        logits = np.where(left, r, -np.inf)
        highest = logits.max(1, keepdims=True)
        p = np.exp(logits - highest)
        total = p.sum(1, keepdims=True)
        p /= total
        loss = (weight * ((np.log(total) + highest)[:, 0] - r[chosen])).sum() + precision * (r**2).sum() / 2
        expected = weight @ p
        return loss, expected - placed + precision * r, np.diag(expected + precision) - p.T @ (weight[:, None] * p)

    r, loss, H = newton(objective, np.zeros(K), K, 1e-10 * max(1, weight.sum()))
    return Fit(r - r.mean(), inverse(H, K), loss - precision * (r**2).sum() / 2)


# ---- winners of any preference matrix P, (K, K): P[i, j] is how likely i is to be preferred to j ----------------------------

def condorcet(P: Matrix) -> int | None:
    """The item that is preferred to every other one; there may be none."""
    better = (P > 0.5) | np.eye(len(P), dtype=bool)
    return next(iter(np.flatnonzero(better.all(1)).tolist()), None)


def copeland(P: Matrix) -> list[int]:
    """The items with the most victories less defeats."""
    score = np.sign(P - 0.5)
    np.fill_diagonal(score, 0)
    score = score.sum(1)
    return np.flatnonzero(score == score.max()).tolist()


def borda(P: Matrix) -> list[int]:
    """The items with the highest expected score against another item drawn at random: the mean of P."""
    score = np.where(np.eye(len(P), dtype=bool), 0, P).sum(1)
    return np.flatnonzero(np.isclose(score, score.max(), rtol=0, atol=1e-12)).tolist()


# ---- dueling bandits: choosing what to compare (Yue et al. 2012) -------------------------------------------------------------
#
# In each of T steps two arms are compared; the answer is drawn from P. Arm 0 is the best. The (strong) regret of a comparison
# is (P[0, left] + P[0, right]) / 2 - 1/2: none only if the best arm meets itself. Each returns its sum so far, (runs, T).

def regret_of(P: Matrix, left: Matrix, right: Matrix) -> Matrix:
    return (P[0, left] + P[0, right]) / 2 - 0.5


def uniform_explorer(P: Matrix, T: int, runs: int, rng: np.random.Generator) -> Matrix:
    """Two arms at random, always: linear regret."""
    return regret_of(P, *rng.integers(0, len(P), (2, runs, T))).cumsum(1)


def interleaved_filter(P: Matrix, T: int, runs: int, rng: np.random.Generator) -> Matrix:
    """Interleaved Filter (Yue et al. 2012, algorithm 2): a candidate meets all others in turn, until each is surely worse.

    An arm that surely beats the candidate takes its place, and those that the old one seemed to beat go with it. In the end
    the candidate meets itself. Sure means outside of sqrt(4 log(1/delta) / n), delta = 1 / (T K^2).
    """
    K, regret = len(P), np.zeros((runs, T))
    for run in regret:
        t, (candidate, *rest) = 0, rng.permutation(K).tolist()
        while rest and t < T:
            others, scores, n = np.array(rest), np.zeros(len(rest)), 0
            while len(others) and t < T:
                run[t:t + len(others)] = regret_of(P, candidate, others)[:T - t]
                t, n = t + len(others), n + 1
                scores += rng.random(len(others)) < P[candidate, others]
                radius = math.sqrt(4 * math.log(T * K**2) / n)
                worse, better = scores / n - radius > 0.5, scores / n + radius < 0.5
                if better.any():
                    successor = others[better][0]
                    rest = others[(scores / n <= 0.5) & (others != successor)].tolist()
                    candidate = int(successor)
                    break
                others, scores = others[~worse], scores[~worse]
            else:
                rest = []
        run[t:] = regret_of(P, candidate, candidate)
    return regret.cumsum(1)


def rucb(P: Matrix, T: int, runs: int, rng: np.random.Generator, alpha: float = 0.51) -> Matrix:
    """Relative upper confidence bound (Zoghi et al. 2014, algorithm 1): an arm that may yet be the best meets its strongest
    possible rival. All runs side by side."""
    K, row, arms = len(P), np.arange(runs), np.arange(len(P))
    wins, regret = np.zeros((runs, K, K)), np.zeros((runs, T))
    favourite = np.full(runs, -1)  # the arm that alone could be the best, while it still could; -1: none
    for t in range(T):
        n = wins + wins.transpose(0, 2, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            upper = np.where(n > 0, wins / n + np.sqrt(alpha * math.log(t + 1) / n), 2)
        upper[:, arms, arms] = 0.5
        could = (upper >= 0.5).all(2)
        alone = could.sum(1) == 1
        favourite = np.where(alone, could.argmax(1), np.where(could[row, favourite] & (favourite >= 0), favourite, -1))
        keep = (favourite >= 0) & (alone | (rng.random(runs) < 0.5))
        other = could & (arms != favourite[:, None])
        first = np.where(keep, favourite, (rng.random((runs, K)) + other).argmax(1))  # of none that could: any
        rival = upper[row, :, first] + 1e-9 * rng.random((runs, K))
        rival[row, first] -= 1e-8  # of rivals that are alike, not itself
        second = rival.argmax(1)
        won = rng.random(runs) < P[first, second]
        wins[row, np.where(won, first, second), np.where(won, second, first)] += 1
        regret[:, t] = regret_of(P, first, second)
    return regret.cumsum(1)


def regret_bound(P: Matrix) -> float:
    """What no algorithm can stay under for long: regret / log T (Komiyama et al. 2015, theorem 1, arm 0 the best).

    To know that an arm is not the best it must lose often enough to some arm that beats it; the cheapest such arm counts.
    """
    bound = 0.0
    for i in range(1, len(P)):
        rivals = [j for j in range(len(P)) if P[i, j] < 0.5]
        bound += min(regret_of(P, i, j) / (P[i, j] * math.log(2 * P[i, j]) + P[j, i] * math.log(2 * P[j, i])) for j in rivals)
    return bound


# ---- your comparisons ------------------------------------------------------------------------------------------------

def leaderboard(config: Config) -> None:
    """Fit the comparisons of --data; print and write strengths, intervals, probabilities and winners."""
    data = read_comparisons(config.data)
    names, K = data.names, len(data.names)
    if config.reference and config.reference not in names:
        fail(f"--reference {config.reference}: {config.data} has no such item")
    reference = names.index(config.reference) if config.reference else None
    options = dict(prior=config.prior, names=names)
    if isinstance(data, Rankings):
        if config.home or config.ties != "half" or config.errors != "fisher":
            fail("--home, --ties, --errors: are for comparisons, not for rankings")
        fitted, observed = fit_rankings(data.rankings, K, **options), None
        n = np.bincount(np.concatenate(data.rankings), minlength=K)
        print(f"{len(data.rankings)} rankings of {K} items")
    else:
        options |= dict(home=config.home, davidson=config.ties == "davidson")
        left, right, outcome, weight = (np.array(column) for column in data[1:])
        counts = [count(left[outcome == o], right[outcome == o], K, weight[outcome == o]) for o in OUTCOMES]
        wins, losses, ties = counts
        fitted = fit(*counts, **options, sandwich=config.errors == "sandwich")
        scored = wins + losses.T + (ties + ties.T) / 2
        met = scored + scored.T
        n, observed = met.sum(1), np.where(met > 0, scored / np.where(met > 0, met, 1), 0.5)
        print(f"{n.sum() / 2:g} comparisons of {K} items")

    # ---- strengths, their intervals, and what those say of the ranks
    r, errors = fitted.strengths, fitted.errors(reference)
    if config.errors == "bootstrap":
        draws = bootstrap(*counts, resamples=config.resamples, seed=config.seed, **options)
        without = f"{config.resamples - len(draws)} of {config.resamples} resamples have no maximum"
        if len(draws) < 0.9 * config.resamples:
            fail(f"--errors bootstrap: {without}; use --prior")
        if len(draws) < config.resamples:
            print(f"{without} and are left out")
        shown = draws - (0 if reference is None else draws[:, [reference]])
        errors = shown.std(0)
        low, high = np.quantile(shown, [0.025, 0.975], axis=0)
    else:
        shift = 0 if reference is None else r[reference]
        low, high = r - shift - 1.96 * errors, r - shift + 1.96 * errors
        draws = np.random.default_rng(config.seed).multivariate_normal(r, fitted.covariance[:K, :K], 10_000, method="eigh")
    best, worst = rank_intervals(draws)
    order = (-r).argsort(kind="stable")
    strengths = r - (0 if reference is None else r[reference])
    P = fitted.probabilities()

    width = max(4, *map(len, names))
    print(f"\nrank  {'item':{width}}  strength    s.e.        95%        ranks  "
          + ("ranked" if observed is None else "comparisons"))
    for place, i in enumerate(order, 1):
        print(f"{place:4}  {names[i]:{width}}  {strengths[i]:8.4f}  {errors[i]:6.4f}  {low[i]:6.2f} to {high[i]:5.2f}  "
              f"{f'{best[i]:.0f} to {worst[i]:.0f}':>8}  {n[i]:g}")
    if config.home:
        print(f"\nthe left side's advantage: {fitted.home:.4f}, s.e. {math.sqrt(fitted.covariance[K, K]):.4f}")
    if config.ties == "davidson":
        print(f"\nties: log nu = {fitted.log_nu:.4f}, s.e. {math.sqrt(fitted.covariance[-1, -1]):.4f}; between equals "
              f"{math.exp(fitted.log_nu) / (2 + math.exp(fitted.log_nu)):.1%} are ties")
    print(f"\nnegative log-likelihood {fitted.loss:.3f}")
    if K <= 12:
        print("\nP(row beats column):\n" + " " * width + "".join(f"{names[j][:7]:>8}" for j in order))
        for i in order:
            print(f"{names[i]:{width}}" + "".join("       -" if i == j else f"{P[i, j]:8.3f}" for j in order))
    for kind, matrix in (("of the model", P), ("as observed, pairs that never met even", observed)):
        if matrix is not None:
            print(f"\nwinners {kind}: {winners(matrix, names)}")

    folder = Path(config.out)
    table = [["rank", "item", "strength", "error", "low", "high", "best_rank", "worst_rank", "comparisons"]]
    table += [[k, names[i], *(f"{x[i]:.6f}" for x in (strengths, errors, low, high)), int(best[i]), int(worst[i]), f"{n[i]:g}"]
              for k, i in enumerate(order, 1)]
    write_csv(folder / "leaderboard.csv", table)
    write_csv(folder / "probabilities.csv", [["", *(names[j] for j in order)],
                                             *([names[i], *(f"{P[i, j]:.6f}" for j in order)] for i in order)])
    draw_strengths(folder / "figure.png", [names[i] for i in order], strengths[order], low[order], high[order])
    print(f"\ntable, probabilities and figure  ->  {folder}")


def mean_se(x: Matrix) -> tuple[Matrix, Matrix]:
    """Mean over the runs (rows) and its standard error."""
    return x.mean(0), x.std(0, ddof=1) / math.sqrt(len(x))


def winners(P: Matrix, names: Sequence[str]) -> str:
    best = condorcet(P)
    return (f"Condorcet {'none' if best is None else names[best]}; Copeland {', '.join(names[i] for i in copeland(P))}; "
            f"Borda {', '.join(names[i] for i in borda(P))}")


def write_csv(path: Path, rows: list[list]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    atomic_write(path, text.getvalue().encode())


def draw_strengths(path: Path, names: list[str], strengths: Matrix, low: Matrix, high: Matrix) -> None:
    """Strengths with their intervals, the best on top."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.22 * len(names)), layout="constrained")
    place = -np.arange(len(names))
    axis.errorbar(strengths, place, xerr=[strengths - low, high - strengths], fmt="o", capsize=3)
    axis.set_yticks(place, names)
    axis.set(xlabel="strength, with 95% intervals")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- a simulation ----------------------------------------------------------------------------------------------------

def simulate(r: Matrix, n: int, rng: np.random.Generator) -> Matrix:
    """Wins (K, K) of n comparisons of pairs drawn at random."""
    left = rng.integers(0, len(r), n)
    right = (left + rng.integers(1, len(r), n)) % len(r)
    won = rng.random(n) < outcomes(r[left] - r[right], 0)[0]
    return count(np.where(won, left, right), np.where(won, right, left), len(r))


CYCLE = np.array([[0.5, 0.8, 0.2], [0.2, 0.5, 0.8], [0.8, 0.2, 0.5]])  # rock, scissors, paper
# A beats all three narrowly; B loses to A and beats the others by far
DISAGREE = np.array([[0.5, 0.51, 0.51, 0.51], [0.49, 0.5, 0.95, 0.95], [0.49, 0.05, 0.5, 0.5], [0.49, 0.05, 0.5, 0.5]])


def demonstrate(config: Config) -> None:
    """True and fitted strengths, the error against the number of comparisons, what no strengths can say, and the bandits."""
    rng, rows = np.random.default_rng(config.seed), []
    K = config.items
    r = np.sort(rng.normal(size=K))[::-1]
    r -= r.mean()
    wins = simulate(r, config.comparisons, rng)
    try:
        fitted = fit(wins)
    except NoMaximum as error:
        fail(f"--comparisons {config.comparisons}: too few for {K} items: {error}")
    errors = fitted.errors()
    best, worst = rank_intervals(rng.multivariate_normal(fitted.strengths, fitted.covariance, 10_000, method="eigh"))
    print(f"{config.comparisons} comparisons of {K} items\n\nitem     true   fitted  95% interval     ranks")
    for i in range(K):
        print(f"{i:4} {r[i]:8.3f} {fitted.strengths[i]:8.3f}  {fitted.strengths[i] - 1.96 * errors[i]:6.3f} to "
              f"{fitted.strengths[i] + 1.96 * errors[i]:6.3f}  {best[i]:.0f} to {worst[i]:.0f}")
        rows.append({"item": i, "true": r[i], "fitted": fitted.strengths[i], "error": errors[i]})
    print(f"\nwinners: {winners(fitted.probabilities(), [str(i) for i in range(K)])}")

    def loss(r: Matrix) -> float:
        return -(wins * np.log(outcomes(r[:, None] - r, 0)[0])).sum()
    print(f"negative log-likelihood {loss(fitted.strengths):.3f}; all strengths + 10: {loss(fitted.strengths + 10):.3f}; "
          f"all strengths * 2: {loss(fitted.strengths * 2):.3f}\n")

    print("comparisons  error of a strength (root mean square over 50 simulations)  times sqrt(comparisons)")
    sizes = [int(300 * 10 ** (k / 2)) for k in range(6)]
    rms = []
    for n in sizes:
        squares = []
        while len(squares) < 50:
            try:
                squares.append(((fit(simulate(r, n, rng)).strengths - r) ** 2).mean())
            except NoMaximum:  # of few comparisons; they say less than those that are counted
                continue
        rms.append(math.sqrt(np.mean(squares)))
        rows.append({"comparisons": n, "rms_error": rms[-1]})
        print(f"{n:11}  {rms[-1]:.4f} {rms[-1] * math.sqrt(n):60.2f}")

    flat = fit(CYCLE).strengths
    print(f"\nrock beats scissors beats paper beats rock, {CYCLE[0, 1]:.0%} each: "
          f"{winners(CYCLE, ['rock', 'scissors', 'paper'])}\n  Bradley-Terry: strengths "
          f"{', '.join(f'{x:.3f}' for x in flat + 0.0)}: 50% for every pair. No scalar reward can say it.\n"
          f"A beats all narrowly, B beats all but A by far: {winners(DISAGREE, 'ABCD')}\n"
          f"  Bradley-Terry puts {'ABCD'[fit(DISAGREE).strengths.argmax()]} first, as Borda does: "
          "each item has as many wins as its strength predicts")

    print(f"\ndueling bandits, {K} arms, {config.horizon} comparisons, mean regret of 20 runs:")
    P = fit(np.where(np.eye(K), 0, outcomes(r[:, None] - r, 0)[0])).probabilities()
    curves = {}
    for name, algorithm in (("uniform", uniform_explorer), ("interleaved filter", interleaved_filter), ("RUCB", rucb)):
        curves[name] = algorithm(P, config.horizon, 20, rng)
        at = np.array([config.horizon // 100, config.horizon // 10, config.horizon])
        found = [{"bandit": name, "step": int(t), "regret": mean, "regret_se": error}
                 for t, mean, error in zip(at, *mean_se(curves[name][:, at - 1]))]
        rows += found
        print(f"  {name:20}"
              + ",  ".join(f"{row['regret']:.0f} ± {row['regret_se']:.0f} after {row['step']}" for row in found))
    slope = (found[2]["regret"] - found[1]["regret"]) / math.log(10)
    print(f"  RUCB's regret grows by {slope:.1f} log T over the last decade; no algorithm can stay under "
          f"{regret_bound(P):.1f} log T (Komiyama et al. 2015)")
    rows.append({"bandit": "RUCB", "slope": slope, "bound": regret_bound(P)})

    folder = Path(config.out)
    write_jsonl(folder / "results.jsonl",
                [{key: float(x) if isinstance(x, np.floating) else x for key, x in row.items()} for row in rows])
    draw_simulation(folder / "figure.png", r, fitted, sizes, rms, curves, regret_bound(P))
    print(f"\nrows and figure  ->  {folder}")


def draw_simulation(path: Path, r: Matrix, fitted: Fit, sizes: list[int], rms: list[float], curves: dict[str, Matrix],
                    bound: float) -> None:
    """True against fitted strengths; their error against the number of comparisons; the bandits' regret."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    axes[0].errorbar(r, fitted.strengths, 1.96 * fitted.errors(), fmt="o", capsize=3)
    axes[0].axline((0, 0), slope=1, color="black", linewidth=1)
    axes[0].set(xlabel="true strength", ylabel="fitted strength, 95% intervals", title="Bradley-Terry")
    axes[1].loglog(sizes, rms, "o-", label="measured")
    axes[1].loglog(sizes, rms[-1] * np.sqrt(sizes[-1] / np.array(sizes)), "--", color="black", label=r"$1/\sqrt{N}$")
    axes[1].set(xlabel="comparisons N", ylabel="error of a strength", title="more data")
    axes[1].legend()
    steps = np.unique(np.logspace(1, math.log10(curves["RUCB"].shape[1]), 200).astype(int))
    for name, regret in curves.items():
        mean, error = mean_se(regret[:, steps - 1])
        axes[2].plot(steps, mean, label=name)
        axes[2].fill_between(steps, mean - error, mean + error, alpha=0.2)
    axes[2].plot(steps, bound * np.log(steps), "--", color="black", label=r"lower bound $\cdot\,\log T$")
    axes[2].set(xscale="log", yscale="log", xlabel="comparisons", ylabel="regret", title="dueling bandits")
    axes[2].legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(config: Config) -> None:
    try:
        leaderboard(config) if config.data else demonstrate(config)
    except NoMaximum as error:
        fail(f"{config.data}: {error}")


if __name__ == "__main__":
    main(parse(Config, __doc__))
