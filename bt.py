"""Bradley-Terry: from "this one is better" to a number for each item.

    P(i beats j) = exp(r_i) / (exp(r_i) + exp(r_j)) = sigmoid(r_i - r_j)   (Bradley and Terry 1952)
    loss(r) = - sum over comparisons of log P(winner beats loser)

It is the model under reward_model.py and dpo.py, here with nothing around it, and a tool that
ranks your own comparisons.

    python bt.py                           # simulated items, fitted beside the truth; 4 s
    python bt.py --data FILE.csv           # a leaderboard of your comparisons
    python bt.py --data FILE.csv --home --reference Baltimore    # the left side has an advantage

FILE.csv has the columns left,right,outcome (left, right or tie) or winner,loser, and a weight if
you like; or the columns ranking,position,item, one row a place.

The general fit also knows ties and sides. With d = r_left - r_right + home, nu >= 0 and
Z = exp(d/2) + exp(-d/2) + nu,

    P(left wins) = exp(d/2) / Z,   P(tie) = nu / Z,   P(right wins) = exp(-d/2) / Z  (Davidson 1970)

With nu = 0 this is sigmoid(d), and a tie then counts as half a win for each side. The loss is
convex in (r, home, log nu), so Newton's method finds its minimum, if it has one. It has none if an
item never lost (its strength would be infinite) or if two groups of items never met (they have no
common scale). That is an error here, unless --prior gives the strengths a normal prior.

Only differences of strengths mean anything: a constant added to all of them changes no probability.
They are shown with mean 0, or as differences from --reference. Their scale does mean something:
strengths that are twice as large are another model.

Symbols: r strengths (K,); wins[i, j] how often i beat j, with i on the left if sides matter;
losses[i, j] how often i, on the left, lost to j; ties[i, j]. Intervals are 95% intervals.

Writes  runs/bt/             results.jsonl, figure.png
        runs/bt-data-FILE/   leaderboard.csv, probabilities.csv, figure.png
"""
from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Literal, NamedTuple, Sequence

import numpy as np

from common import fail
from common.comparisons import (CYCLE, DISAGREE, Comparisons, Rankings, count, print_leaderboard,
                                read_comparisons, winners, write_leaderboard)
from common.figures import figure
from common.files import check_writable, write_jsonl
from common.settings import parse, require, require_numbers, run_folder, settings
from common.statistics import Objective, newton


@settings
class Config:
    # ---- your comparisons
    data: str = ""  # CSV file of comparisons or rankings; without one, items are simulated.
    home: bool = False  # Fit an advantage of the left side.
    ties: Literal["half", "davidson"] = "half"  # A tie is half a win for each side, or an outcome
    # with a parameter of its own (Davidson's model).
    prior: float = 0.0  # Standard deviation of a normal prior on the strengths; 0 = no prior.
    reference: str = ""  # Item whose strength is 0; without one, the mean of all items is 0.

    # ---- error bars
    errors: Literal["fisher", "sandwich", "bootstrap"] = "fisher"  # Standard errors: from the
    # model's curvature (fisher), valid also if the model is wrong (sandwich), or from comparisons
    # drawn again (bootstrap).
    resamples: int = 1000  # Number of bootstrap samples.

    # ---- the simulation
    items: int = 8  # Number of simulated items.
    comparisons: int = 1000  # Number of simulated comparisons.

    # ---- the run
    seed: int = 0  # Seed of the simulation, of the bootstrap and of the draws for the ranks.
    out: str = ""  # Folder for tables and figure, if not one named by the settings.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="resamples items comparisons", from_0="prior seed")
        require(2 <= self.items <= 1000, f"--items {self.items}: must be from 2 to 1000")
        require(self.comparisons <= 10**7, f"--comparisons {self.comparisons}: must be <= 10^7")
        require(self.resamples <= 10**5, f"--resamples {self.resamples}: must be <= 10^5")
        require(not 0 < self.prior < 1e-6, f"--prior {self.prior}: must be 0 or at least 1e-6")
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        for name in ("home", "ties", "prior", "reference", "errors"):
            require(self.data != "" or name not in changed, f"--{name}: needs --data")
        for name in ("items", "comparisons"):
            require(self.data == "" or name not in changed, f"--{name}: not with --data")
        require(self.errors == "bootstrap" or "resamples" not in changed,
                "--resamples: needs --errors bootstrap")
        self.out = self.out or run_folder(self, "bt")


# ---- Bradley-Terry -------------------------------------------------------------------------------

def sigmoid(d: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-d)), without overflow."""
    return np.exp(-np.logaddexp(0, -d))


def neg_log_likelihood(r: np.ndarray, wins: np.ndarray) -> float:
    """The sum over all comparisons of -log sigmoid(r_winner - r_loser), in nats."""
    return (wins * np.logaddexp(0, r[None, :] - r[:, None])).sum()


def gradient(r: np.ndarray, wins: np.ndarray) -> np.ndarray:
    """Its gradient, (K,): the surprise at an item's defeats less the surprise at its victories."""
    surprise = wins * sigmoid(r[None, :] - r[:, None])  # wins_ij (1 - P(i beats j))
    return surprise.sum(0) - surprise.sum(1)


def hessian(r: np.ndarray, wins: np.ndarray) -> np.ndarray:
    """Its Hessian, (K, K): the Laplacian of the graph whose edges weigh n_ij p_ij (1 - p_ij)."""
    p = sigmoid(r[:, None] - r[None, :])
    edges = (wins + wins.T) * p * (1 - p)
    return np.diag(edges.sum(1)) - edges


def fit_bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Maximum-likelihood strengths, (K,) with mean 0, by Newton's method with step halving."""
    check_connected(wins > 0)  # is there a maximum at all?
    r = np.zeros(len(wins))
    for _ in range(200):
        # the constant makes the Hessian invertible: the likelihood does not depend on the mean of r
        step = np.linalg.solve(hessian(r, wins) + wins.mean(), gradient(r, wins))
        while neg_log_likelihood(r - step, wins) > neg_log_likelihood(r, wins):
            step /= 2
        r = r - step
        if np.abs(step).max() < 1e-9:
            return r - r.mean()
    raise NoMaximum("Newton's method has not converged")


# ---- the general fit: ties, an advantage of the left side, a prior -------------------------------

class NoMaximum(ValueError):
    """The likelihood has no maximum: a strength would be infinite, or has no common scale."""


HINT = "; more comparisons, or --prior, would give them a finite strength"


class Fit(NamedTuple):
    strengths: np.ndarray  # (K,) r, mean 0
    covariance: np.ndarray  # of (r less its mean, home, log nu), without those that were not fitted
    loss: float  # negative log-likelihood of all comparisons, nats
    home: float = 0.0  # added to the strength of the left side
    log_nu: float = -math.inf  # of Davidson's model; -inf: no ties

    def probabilities(self) -> np.ndarray:
        """P(i beats j), (K, K), where nobody is at home and a tie counts as half a win."""
        d = self.strengths[:, None] - self.strengths[None, :]
        left, tie, _ = outcome_probabilities(d, math.exp(self.log_nu))
        return left + tie / 2

    def standard_errors(self, reference: int | None = None) -> np.ndarray:
        """Of the strengths, (K,), or of their differences from the strength of `reference`."""
        K = len(self.strengths)
        C = self.covariance[:K, :K]
        variance = C.diagonal()
        if reference is not None:
            variance = variance + C[reference, reference] - 2 * C[reference]
        return np.sqrt(variance.clip(0))


def outcome_probabilities(d: np.ndarray,
                          nu: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P(left wins), P(tie), P(right wins) for d = r_left - r_right + home, each of d's shape."""
    weaker = np.exp(-np.abs(d))  # everything is divided by exp(|d| / 2), so that nothing overflows
    tie = nu * np.sqrt(weaker) if nu else np.zeros_like(d)
    stronger = 1 / (1 + weaker + tie)
    weaker *= stronger
    return np.where(d > 0, stronger, weaker), tie * stronger, np.where(d > 0, weaker, stronger)


def general_likelihood(x: np.ndarray, wins: np.ndarray, losses: np.ndarray,
                       ties: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Negative log-likelihood of x = (r, home, log nu), (K + 2,), its gradient and its Hessian.

    With log nu = -inf, a tie counts as half a win for each side.
    """
    r, home, log_nu = x[:-2], x[-2], x[-1]
    n = wins + losses + ties
    net = (wins - losses) / 2  # what the left side scored beyond 1/2 a comparison
    d = r[:, None] - r[None, :] + home
    left, tie, right = outcome_probabilities(d, math.exp(log_nu))
    log_Z = np.abs(d) / 2 - np.log(np.maximum(left, right))
    loss = (n * log_Z - net * d).sum()
    if math.isfinite(log_nu):
        loss -= ties.sum() * log_nu

    # derivatives in d and in log nu: again the surprise, and a variance
    mean = (left - right) / 2  # expected net score; that of a victory is 1/2
    by_d = losses * (left + tie / 2) - wins * (right + tie / 2) + ties * mean
    n_tie = n * tie
    slope = np.append(by_d.sum(1) - by_d.sum(0), [by_d.sum(), (n_tie - ties).sum()])
    by_d_d = n * left * right + n_tie * (left + right) / 4
    return loss, slope, chain_rule(by_d_d, -n_tie * mean, n_tie * (left + right))


def chain_rule(dd: np.ndarray, dt: np.ndarray, tt: np.ndarray) -> np.ndarray:
    """Second derivatives in each pair's d and t = log nu become those in (r, home, log nu).

    Args:
        dd, dt, tt: (K, K). As d = r_i - r_j + home, the dd of a pair goes to four places of r.
    """
    K = len(dd)
    H = np.empty((K + 2, K + 2))
    H[:K, :K] = np.diag(dd.sum(0) + dd.sum(1)) - dd - dd.T
    H[:K, K] = H[K, :K] = dd.sum(1) - dd.sum(0)
    H[:K, K + 1] = H[K + 1, :K] = dt.sum(1) - dt.sum(0)
    H[K:, K:] = [[dd.sum(), dt.sum()], [dt.sum(), tt.sum()]]
    return H


def fit(wins: np.ndarray, losses: np.ndarray | float = 0, ties: np.ndarray | float = 0, *,
        home: bool = False, davidson: bool = False, prior: float = 0.0, sandwich: bool = False,
        names: Sequence[str] | None = None, start: Fit | None = None) -> Fit:
    """Maximum-likelihood strengths; with a prior, the posterior mode.

    Args:
        wins, losses, ties: (K, K), with the item on the left in the row. Where sides do not matter
            `wins` is enough: wins[i, j] is how often i beat j.
        davidson: fit nu, too; otherwise a tie is half a win for each.
        prior: standard deviation of a normal prior on the strengths; 0 = none.
        sandwich: give the covariance that holds even if the model is wrong.
        start: where Newton's method starts, if something near the answer is known.
    Raises:
        NoMaximum, with the items that are to blame.
    """
    K = len(wins)
    losses = np.broadcast_to(np.asarray(losses, float), (K, K))
    ties = np.broadcast_to(np.asarray(ties, float), (K, K))
    n = wins + losses + ties
    if davidson and (ties.sum() == 0 or ties.sum() == n.sum()):
        raise NoMaximum("Davidson's model needs ties and decisions; here "
                        f"{ties.sum():g} of {n.sum():g} comparisons are ties")
    if not prior:
        check_connected(wins + losses.T + ties + ties.T > 0, names)

    x = np.zeros(K + 2)  # r, home, log nu
    x[-1] = 0.0 if davidson else -math.inf
    if start:
        x[:] = *start.strengths, start.home, start.log_nu
    fitted = np.array([True] * K + [home, davidson])
    precision = 1 / prior**2 if prior else 0.0

    def objective(free: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Minus log of likelihood times prior, where the fitted entries of x are `free`."""
        x[fitted] = free
        r = x[:K]
        loss, slope, curvature = general_likelihood(x, wins, losses, ties)
        loss += precision * (r**2).sum() / 2
        slope[:K] += precision * r
        curvature[range(K), range(K)] += precision
        curvature[:K, :K] += n.mean()  # makes it invertible, as in fit_bradley_terry
        if not (home or davidson):
            return loss, slope[:K], curvature[:K, :K]  # no copies
        return loss, slope[fitted], curvature[np.ix_(fitted, fitted)]

    if home and np.linalg.cond(objective(x[fitted])[2]) > 1e14:
        raise NoMaximum("the comparisons cannot tell the strengths from the left side's advantage")
    games = max(1, (n.sum(0) + n.sum(1)).max())  # of the item with the most comparisons
    x[fitted], loss, covariance = minimise(objective, x[fitted], K, 1e-10 * games)
    if sandwich:
        middle = squared_scores(x, wins, losses, ties)[np.ix_(fitted, fitted)]
        covariance = covariance @ middle @ covariance
    r = x[:K]
    return Fit(r - r.mean(), covariance, loss - precision * (r**2).sum() / 2, x[K], x[K + 1])


def minimise(objective: Objective, x: np.ndarray, K: int,
             tolerance: float) -> tuple[np.ndarray, float, np.ndarray]:
    """The minimum x, its value, and the inverse Hessian there, for x[:K] less its mean."""
    try:
        with np.errstate(all="ignore"):
            # until the gradient is small ...
            x, loss, slope, curvature = newton(objective, x, tolerance)
            for _ in range(30):  # ... and the steps are, too: counts may be of very different sizes
                step = np.linalg.solve(curvature, slope)
                if np.abs(step).max() < 1e-8:
                    break
                x = x - step
                loss, slope, curvature = objective(x)
            C = np.linalg.inv(curvature)
    except (np.linalg.LinAlgError, ArithmeticError):
        step = np.full_like(x, np.inf)
    if not np.abs(step).max() < 1e-2:  # it goes on for ever: the minimum is at infinity
        raise NoMaximum("the fit did not converge: the likelihood has no maximum, or hardly one"
                        + HINT)
    C[:K] -= C[:K].mean(0)
    C[:, :K] -= C[:, :K].mean(1, keepdims=True)
    return x, loss, C


# ---- Plackett-Luce: rankings of any length -------------------------------------------------------

def fit_plackett_luce(rankings: Sequence[Sequence[int]], K: int, *, prior: float = 0.0,
                      names: Sequence[str] | None = None) -> Fit:
    """Strengths of K items from rankings, each a list of items, best first.

    A ranking is a sequence of choices, so its probability is a product over places: exp(r of the
    item there) / sum of exp(r) over the items that are left (Luce 1959, Plackett 1975). Rankings of
    two items are Bradley-Terry comparisons.
    """
    beats = np.zeros((K, K), bool)
    chosen, available = [], []  # for each choice the item, and which items were left
    for ranking in rankings:
        left = np.isin(np.arange(K), ranking)
        for item in ranking[:-1]:  # the last place is no choice
            chosen.append(item)
            available.append(left.copy())
            left[item] = False
            beats[item] |= left
    if not prior:
        check_connected(beats, names)
    chosen = np.array(chosen, int)  # (N,)
    available = np.array(available, bool).reshape(-1, K)  # (N, K)
    times_chosen = np.bincount(chosen, minlength=K)
    precision = 1 / prior**2 if prior else 0.0

    def objective(r: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        logits = np.where(available, r, -np.inf)
        log_Z = np.logaddexp.reduce(logits, axis=1)  # (N,)
        p = np.exp(logits - log_Z[:, None])  # (N, K): P(the choice is this item)
        loss = (log_Z - r[chosen]).sum() + precision * (r**2).sum() / 2
        slope = p.sum(0) - times_chosen + precision * r
        curvature = np.diag(p.sum(0) + precision) - p.T @ p
        return loss, slope, curvature + len(chosen) / K**2  # invertible, as in fit_bradley_terry

    r, loss, covariance = minimise(objective, np.zeros(K), K, 1e-10 * max(1, len(chosen)))
    return Fit(r - r.mean(), covariance, loss - precision * (r**2).sum() / 2)


# ---- identifiability -----------------------------------------------------------------------------

def reachable(beats: np.ndarray, start: int) -> np.ndarray:
    """(K,) bool: `start`, the items that it beat, those that these beat, and so on."""
    seen = np.zeros(len(beats), bool)
    new = np.arange(len(beats)) == start
    while new.any():
        seen |= new
        new = beats[new].any(0) & ~seen
    return seen


def unbeaten_group(beats: np.ndarray) -> np.ndarray:
    """(K,) bool: a group of items of which none ever lost to an item outside of the group."""
    item = 0
    while True:
        above = reachable(beats.T, item)  # those that beat it, directly or through others
        strictly_above = above & ~reachable(beats, item)
        if not strictly_above.any():
            return above
        item = np.flatnonzero(strictly_above)[0]


def check_connected(beats: np.ndarray, names: Sequence[str] | None = None) -> None:
    """Raise NoMaximum unless a path of "beats" leads from each item to every other (Ford 1957)."""
    if reachable(beats, 0).all() and reachable(beats.T, 0).all():
        return
    group = reachable(beats | beats.T, 0)  # who met the first item, or those who met it, and so on
    if not group.all():
        group = min(group, ~group, key=np.count_nonzero)
        verb = "were never compared with the others"
    else:
        top, bottom = unbeaten_group(beats), unbeaten_group(beats.T)
        group = min(top, bottom, key=np.count_nonzero)
        verb = ("never lost to" if group is top else "never won against") + " any of the others"
    blamed = [names[i] if names else str(i) for i in np.flatnonzero(group)]
    more = f" and {len(blamed) - 10} more" if len(blamed) > 10 else ""
    raise NoMaximum(f"these items {verb}: {', '.join(blamed[:10])}{more}{HINT}")


# ---- uncertainty ---------------------------------------------------------------------------------

def squared_scores(x: np.ndarray, wins: np.ndarray, losses: np.ndarray,
                   ties: np.ndarray) -> np.ndarray:
    """Sum over comparisons of g g^T, (K + 2, K + 2), with g the gradient of log P(outcome).

    It is the middle of the sandwich H^-1 (sum of g g^T) H^-1. Where the model is right its
    expectation is the Hessian H, and what is left is H^-1 (Huber 1967, White 1982).
    """
    d = x[:-2, None] - x[None, :-2] + x[-2]
    left, tie, right = outcome_probabilities(d, math.exp(x[-1]))
    dd, dt, tt = np.zeros((3, *d.shape))
    for counts, score, tied in ((wins, 0.5, 0), (ties, 0, 1), (losses, -0.5, 0)):
        by_d = score - (left - right) / 2
        by_log_nu = tied - tie
        dd += counts * by_d**2
        dt += counts * by_d * by_log_nu
        tt += counts * by_log_nu**2
    return chain_rule(dd, dt, tt)


def bootstrap(wins: np.ndarray, losses: np.ndarray | float = 0, ties: np.ndarray | float = 0, *,
              resamples: int, seed: int = 0, **options) -> np.ndarray:
    """Strengths, (resamples, K), of as many comparisons drawn again from these.

    A sample without a maximum is left out: there are then fewer rows. `options` are those of fit.
    """
    K = len(wins)
    rng = np.random.default_rng(seed)
    counts = np.stack([np.broadcast_to(np.asarray(x, float), (K, K)) for x in (wins, losses, ties)])
    cells = np.flatnonzero(counts)
    probability = counts.flat[cells] / counts.sum()
    whole = fit(*counts, **options)
    strengths = []
    for _ in range(resamples):
        again = np.zeros_like(counts)
        again.flat[cells] = rng.multinomial(round(counts.sum()), probability)
        try:
            strengths.append(fit(*again, **options, start=whole).strengths)
        except NoMaximum:
            continue
    return np.array(strengths).reshape(-1, K)


def rank_intervals(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best and worst rank, (K,) each, 1 = the first, that hold 95% of the draws (n, K) of r."""
    ranks = (-draws).argsort(1).argsort(1) + 1
    best = np.quantile(ranks, 0.025, axis=0, method="higher")
    worst = np.quantile(ranks, 0.975, axis=0, method="lower")
    return best.astype(int), worst.astype(int)


def draws_of(fitted: Fit, rng: np.random.Generator) -> np.ndarray:
    """Draws (10,000, K) from the normal distribution that fit and covariance describe."""
    C = fitted.covariance[:len(fitted.strengths), :len(fitted.strengths)]
    return rng.multivariate_normal(fitted.strengths, C, 10_000, "ignore", method="eigh")


# ---- a leaderboard of your comparisons -----------------------------------------------------------

def leaderboard(config: Config) -> None:
    """Fit the comparisons of --data; write and print strengths, intervals and probabilities."""
    # ---- 1) read and fit
    data = read_comparisons(config.data)
    names, K = data.names, len(data.names)
    if config.reference and config.reference not in names:
        fail(f"--reference {config.reference}: {config.data} has no such item")
    reference = names.index(config.reference) if config.reference else None
    if isinstance(data, Rankings):
        if config.home or config.ties != "half" or config.errors != "fisher":
            fail("--home, --ties, --errors: are for comparisons, not for rankings")
        fitted = fit_plackett_luce(data.rankings, K, prior=config.prior, names=names)
        n = np.bincount(np.concatenate(data.rankings), minlength=K)  # rankings that an item is in
        title, counted = f"{len(data.rankings)} rankings of {K} items", "rankings"
    else:
        options = dict(home=config.home, davidson=config.ties == "davidson", prior=config.prior)
        fitted = fit(*data.counts(), **options, names=names, sandwich=config.errors == "sandwich")
        wins = data.wins()
        n = (wins + wins.T).sum(1)  # comparisons that an item is in
        title, counted = f"{n.sum() / 2:.15g} comparisons of {K} items", "comparisons"

    # ---- 2) intervals of the strengths, and of the ranks
    if config.errors == "bootstrap":
        if any(weight % 1 for weight in data.weight):
            fail("--errors bootstrap: needs weights that are whole numbers, to draw so many again")
        draws = bootstrap(*data.counts(), resamples=config.resamples, seed=config.seed, **options)
        missing = f"{config.resamples - len(draws)} of {config.resamples} resamples have no maximum"
        if len(draws) < 0.9 * config.resamples:
            fail(f"--errors bootstrap: {missing}; use --prior")
        if len(draws) < config.resamples:
            title += f"\n{missing} and are left out"
    else:
        draws = draws_of(fitted, np.random.default_rng(config.seed))
    errors, low, high = intervals(config.errors, fitted, draws, reference)
    best, worst = rank_intervals(draws)

    # ---- 3) write the files, and print only then: a terminal may be a pipe that is closed early
    order = (-fitted.strengths).argsort(kind="stable")  # best first
    zero = 0 if reference is None else fitted.strengths[reference]
    rows = [{"rank": rank, "item": names[i], "strength": fitted.strengths[i] - zero,
             "error": errors[i], "low": low[i], "high": high[i], "best_rank": best[i],
             "worst_rank": worst[i], "comparisons": n[i]} for rank, i in enumerate(order, 1)]
    P = fitted.probabilities()
    write_leaderboard(Path(config.out), rows, P[np.ix_(order, order)])
    print(title)
    print_leaderboard(rows, P[np.ix_(order, order)], counted)
    print_parameters(config, fitted)
    print(f"\nwinners of the model: {winners(P, names)}")
    if isinstance(data, Comparisons):
        met = wins + wins.T
        observed = np.where(met > 0, wins / np.where(met > 0, met, 1), 0.5)
        print(f"winners as observed, pairs that never met even: {winners(observed, names)}")
    print(f"\ntable, probabilities and figure  ->  {config.out}", flush=True)


def intervals(kind: str, fitted: Fit, draws: np.ndarray,
              reference: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Standard errors and both ends of the intervals, (K,) each, with `reference` at 0."""
    if kind == "bootstrap":
        shown = draws if reference is None else draws - draws[:, [reference]]
        low, high = np.quantile(shown, [0.025, 0.975], axis=0)
        return shown.std(0), low, high
    zero = 0 if reference is None else fitted.strengths[reference]
    errors = fitted.standard_errors(reference)
    return errors, fitted.strengths - zero - 1.96 * errors, fitted.strengths - zero + 1.96 * errors


def print_parameters(config: Config, fitted: Fit) -> None:
    """What was fitted beside the strengths, and the loss."""
    errors = np.sqrt(fitted.covariance.diagonal())
    if config.home:
        error = errors[len(fitted.strengths)]
        print(f"\nthe left side's advantage: {fitted.home:.4f}, s.e. {error:.4f}")
    if config.ties == "davidson":
        nu = math.exp(fitted.log_nu)
        print(f"\nties: log nu = {fitted.log_nu:.4f}, s.e. {errors[-1]:.4f}; "
              f"between equals {nu / (2 + nu):.1%} are ties")
    print(f"\nnegative log-likelihood {fitted.loss:.3f}")


# ---- a simulation --------------------------------------------------------------------------------

def simulate(r: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Wins (K, K) of n comparisons of pairs drawn at random."""
    K = len(r)
    left = rng.integers(0, K, n)
    right = (left + rng.integers(1, K, n)) % K  # any other item
    left_wins = rng.random(n) < sigmoid(r[left] - r[right])
    return count(np.where(left_wins, left, right), np.where(left_wins, right, left), K)


def rms_error(r: np.ndarray, n: int, rng: np.random.Generator) -> float:
    """Error of a strength after n comparisons: root mean square over items and 50 simulations.

    Simulations without a maximum are left out; nan if these are most of them.
    """
    squares = []
    for _ in range(50):
        try:
            squares.append(((fit(simulate(r, n, rng)).strengths - r) ** 2).mean())
        except NoMaximum:
            continue
    return math.sqrt(np.mean(squares)) if len(squares) > 25 else math.nan


def demonstrate(config: Config) -> None:
    """Fit simulated comparisons; show errors, shift and scale, and what strengths cannot say."""
    # ---- 1) fit simulated comparisons
    K = config.items
    rng = np.random.default_rng(config.seed)
    r = np.sort(rng.normal(size=K))[::-1]
    r -= r.mean()
    wins = simulate(r, config.comparisons, rng)
    try:
        fitted = fit(wins)
    except NoMaximum:
        fail(f"--comparisons {config.comparisons}: too few for {K} items; some never won or lost")
    errors = fitted.standard_errors()
    best, worst = rank_intervals(draws_of(fitted, rng))

    # ---- 2) the error falls as 1 / sqrt(number of comparisons)
    sizes = [int(300 * 10 ** (k / 2)) for k in range(6)]
    rms = [rms_error(r, n, rng) for n in sizes]

    # ---- 3) write, then print
    rows = [{"item": i, "true": r[i], "fitted": fitted.strengths[i], "error": errors[i]}
            for i in range(K)]
    rows += [{"comparisons": n, "rms_error": error} for n, error in zip(sizes, rms)
             if math.isfinite(error)]
    write_jsonl(Path(config.out) / "results.jsonl", rows)
    draw_simulation(Path(config.out) / "figure.png", r, fitted, np.array(sizes), np.array(rms))

    print(f"{config.comparisons} comparisons of {K} items\n")
    print("item     true   fitted  95% interval     ranks")
    for i in range(K):
        low, high = fitted.strengths[i] - 1.96 * errors[i], fitted.strengths[i] + 1.96 * errors[i]
        print(f"{i:4} {r[i]:8.3f} {fitted.strengths[i]:8.3f}  {low:6.3f} to {high:6.3f}  "
              f"{best[i]} to {worst[i]}")
    print(f"\nwinners: {winners(fitted.probabilities(), [str(i) for i in range(K)])}")
    print(f"negative log-likelihood {neg_log_likelihood(fitted.strengths, wins):.3f}; "
          f"all strengths + 10: {neg_log_likelihood(fitted.strengths + 10, wins):.3f}; "
          f"all strengths * 2: {neg_log_likelihood(fitted.strengths * 2, wins):.3f}")

    print("\ncomparisons  error of a strength (root mean square over 50 simulations)  "
          "times sqrt(comparisons)")
    for n, error in zip(sizes, rms):
        print(f"{n:11}  {error:<60.4f}  {error * math.sqrt(n):.2f}")

    print("\nrock beats scissors beats paper beats rock, 80% each: "
          + winners(CYCLE, ["rock", "scissors", "paper"]))
    print("  Bradley-Terry: strengths "
          + ", ".join(f"{x:.3f}" for x in fit_bradley_terry(CYCLE) + 0.0)
          + ": 50% for every pair. No scalar reward can express a cycle.")
    print(f"A beats all narrowly, B beats all but A by far: {winners(DISAGREE, 'ABCD')}")
    first = "ABCD"[fit_bradley_terry(DISAGREE).argmax()]
    print(f"  Bradley-Terry puts {first} first, as Borda does: "
          "each item has as many wins as its strength predicts")
    print(f"\nrows and figure  ->  {config.out}", flush=True)


def draw_simulation(path: Path, r: np.ndarray, fitted: Fit, sizes: np.ndarray,
                    rms: np.ndarray) -> None:
    """True against fitted strengths; their error against the number of comparisons."""
    with figure(path, columns=2) as (_, axes):
        axes[0].errorbar(r, fitted.strengths, 1.96 * fitted.standard_errors(), fmt="o", capsize=3)
        axes[0].axline((0, 0), slope=1, color="black", linewidth=1)
        axes[0].set(xlabel="true strength", ylabel="fitted strength, 95% intervals",
                    title="Bradley-Terry")
        axes[1].loglog(sizes, rms, "o-", label="measured")
        axes[1].loglog(sizes, rms[-1] * np.sqrt(sizes[-1] / sizes), "--", color="black",
                       label=r"$1/\sqrt{N}$")
        axes[1].set(xlabel="comparisons N", ylabel="error of a strength", title="more data")
        axes[1].legend()


def main(config: Config) -> None:
    check_writable(config.out)
    if not config.data:
        demonstrate(config)
        return
    try:
        leaderboard(config)
    except NoMaximum as error:
        fail(f"{config.data}: {error}")


if __name__ == "__main__":
    main(parse(Config, __doc__))
