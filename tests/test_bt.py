"""bt.py: fits against naive likelihoods, closed forms, published tables; intervals; CSV files."""
import csv
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bt
from common import ROOT
from common.comparisons import (CYCLE, DISAGREE, Comparisons, Rankings, borda, count,
                                read_comparisons)
from common.settings import parse

# Ragged: pairs that met often, once, on one side only, or not at all
WINS = np.array([[0, 7, 3, 0, 12], [4, 0, 9, 2, 0], [1, 8, 0, 5, 6], [0, 3, 2, 0, 1],
                 [5, 0, 4, 6, 0]])
LOSSES = np.array([[0, 2, 5, 1, 0], [3, 0, 0, 0, 4], [6, 1, 0, 2, 3], [0, 0, 7, 0, 2],
                   [4, 1, 0, 3, 0]])
TIES = np.array([[0, 3, 0, 1, 2], [0, 0, 4, 0, 1], [2, 2, 0, 0, 0], [1, 0, 3, 0, 5],
                 [0, 1, 1, 0, 0]])
PAIRS = [(i, j) for i, j in itertools.permutations(range(5), 2) for _ in range(WINS[i, j])]
RANKINGS = [[0, 1, 2, 3, 4], [3, 1], [3, 1], [4, 0, 3], [2, 4, 1, 0], [1, 2, 0], [3, 2], [4]]
# choix 0.4.2 on PAIRS: opt_pairwise(5, PAIRS, alpha=0, method="Newton-CG", tol=1e-14); its
# ilsr_pairwise has the same digits
CHOIX = [0.7779398435, -0.0314643386, 0.0330074529, -0.7721400709, -0.0073428869]

# American League East, 1987: games that the team of the row won and lost at home against that of
# the column
TEAMS = ["Baltimore", "Boston", "Cleveland", "Detroit", "Milwaukee", "New York", "Toronto"]
WON, LOST = (np.array([[*map(int, row)] for row in rows.split()]) for rows in (
    "0131221 6052543 2403243 4660344 6644044 6445302 6444220",
    "0645546 0025123 4203534 3010332 0123032 1321305 0323540"))
BASEBALL = "0.0000 1.1077 0.6839 1.4364 1.5814 1.2476 1.2945"
BASEBALL_AT_HOME = "0.0000 1.1438 0.7047 1.4754 1.6196 1.2813 1.3271"


def near(found, expected, atol=1e-9, rtol=0):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


# ---- the plain model -----------------------------------------------------------------------------

def test_loss_gradient_and_hessian_are_the_definition_and_its_derivatives():
    """A loop over comparisons as in choix's opt.py, differentiated by autograd."""
    r = torch.tensor([0.3, -0.5, 1.1, 0.2, -0.7], dtype=torch.double)

    def loss(r):
        return sum(torch.log(1 + torch.exp(-(r[i] - r[j]))) for i, j in PAIRS)
    near(bt.neg_log_likelihood(r.numpy(), WINS), loss(r))
    near(bt.gradient(r.numpy(), WINS), torch.autograd.functional.jacobian(loss, r))
    near(bt.hessian(r.numpy(), WINS), torch.autograd.functional.hessian(loss, r))


def test_far_apart_strengths_overflow_nowhere():
    r = np.array([1000.0, -1000.0])
    near(bt.sigmoid(np.array([-2000.0, 0, 2000])), [0, 0.5, 1])
    assert bt.neg_log_likelihood(r, np.array([[0, 1], [1, 0]])) == 2000
    near(bt.gradient(r, np.array([[0, 1], [1, 0]])), [1, -1])


def minorise_maximise(wins):
    """The same strengths by the oldest algorithm (Zermelo 1929; Hunter 2004, Eq. 3).

    exp(r_i) <- wins of i / sum_j n_ij / (exp(r_i) + exp(r_j)); each step raises the likelihood.
    """
    n, strength = wins + wins.T, np.ones(len(wins))
    for _ in range(10_000):
        old = strength
        strength = wins.sum(1) / (n / (strength[:, None] + strength)).sum(1)
        strength /= np.exp(np.log(strength).mean())
        if np.abs(np.log(strength / old)).max() < 1e-12:
            break
    return np.log(strength)


def test_the_plain_and_the_general_fit_are_the_oldest_algorithm_and_what_choix_found():
    found, ranked = bt.fit(WINS), bt.fit_plackett_luce(PAIRS, 5)
    near(bt.fit_bradley_terry(WINS), CHOIX)
    near(minorise_maximise(WINS), CHOIX, 1e-8)
    near(found.strengths, bt.fit_bradley_terry(WINS), 1e-12)
    near(ranked.strengths, found.strengths)
    near(ranked.covariance, found.covariance)
    near(found.loss, bt.neg_log_likelihood(found.strengths, WINS))
    near(found.covariance, np.linalg.pinv(bt.hessian(found.strengths, WINS)), 1e-8)


@pytest.mark.parametrize("package", ["choix", "evalica"])
def test_the_fit_is_that_of_another_package(package):
    other = pytest.importorskip(package)
    if package == "choix":
        r = other.opt_pairwise(5, PAIRS, alpha=0, tol=1e-12)
    else:
        winners, losers = map(list, zip(*PAIRS))
        scores = other.bradley_terry(winners, losers, [other.Winner.X] * len(PAIRS),
                                     tolerance=1e-12, limit=10_000).scores
        r = np.log(scores.sort_index().to_numpy())
    near(bt.fit_bradley_terry(WINS), r - r.mean(), 1e-6)


# ---- the general fit -----------------------------------------------------------------------------

def naive(x, wins, losses, ties, home, davidson):
    """(how often, log P) of each outcome of each pair; exp(x) are the papers' parameters."""
    strength = x[:len(wins)].exp()
    theta = x[len(wins)].exp() if home else 1.0
    nu = x[-1].exp() if davidson else 0.0
    counts, logs = [], []
    for i, j in itertools.permutations(range(len(wins)), 2):
        left, right = theta * strength[i], strength[j]
        total = left + right + nu * torch.sqrt(left * right)
        p, q = left / total, right / total
        tie = (1 - p - q).log() if davidson else (p.log() + q.log()) / 2
        counts += [wins[i, j], losses[i, j], ties[i, j]]
        logs += [p.log(), q.log(), tie]
    return torch.tensor(np.array(counts), dtype=torch.double), torch.stack(logs)


def naive_loss(x, *model):
    counts, logs = naive(torch.as_tensor(x), *model)
    return -(counts * logs).sum()


def naive_ranking_loss(r):
    """Plackett-Luce, place by place: the next one against all that are left."""
    return -sum(r[ranking[k]] - sum(r[item].exp() for item in ranking[k:]).log()
                for ranking in RANKINGS for k in range(len(ranking)))


def check_maximum(loss, x, covariance, prior, logs=None):
    """Loss and prior are least at x, by the gradient and all around; the covariance is their
    inverse curvature, without the shift of all 5 strengths; where (how often, log P) is given,
    with the sum of its squared gradients in the middle."""
    def objective(x):
        return loss(x) + ((x[:5] ** 2).sum() / (2 * prior**2) if prior else 0)
    assert torch.autograd.functional.jacobian(objective, x).abs().max() < 1e-6
    for step in 1e-3 * torch.eye(len(x)):
        assert objective(x + step) > objective(x) and objective(x - step) > objective(x)
    centre = np.eye(len(x))
    centre[:5, :5] -= 1 / 5
    curvature = torch.autograd.functional.hessian(objective, x).numpy()
    C = centre @ np.linalg.pinv(curvature, rcond=1e-10, hermitian=True) @ centre
    if logs:
        J = torch.autograd.functional.jacobian(lambda x: logs(x)[1], x).numpy()
        C = C @ sum(n * np.outer(g, g) for n, g in zip(logs(x)[0].numpy(), J)) @ C
    near(covariance, C, rtol=1e-7)


@pytest.mark.parametrize("prior", [0, 0.7])
@pytest.mark.parametrize("sandwich", [False, True])
@pytest.mark.parametrize("home", [False, True])
@pytest.mark.parametrize("davidson", [False, True])
def test_the_fit_is_the_maximum_of_the_naive_likelihood(home, davidson, sandwich, prior):
    """All pairs in a loop, the formulas in the papers' parameters, derivatives by autograd; the
    loss is of the data alone."""
    model = (WINS, LOSSES, TIES, home, davidson)
    found = bt.fit(WINS, LOSSES, TIES, home=home, davidson=davidson, prior=prior, sandwich=sandwich)
    x = torch.tensor([*found.strengths, *[found.home] * home, *[found.log_nu] * davidson],
                     dtype=torch.double)
    check_maximum(lambda x: naive_loss(x, *model), x, found.covariance, prior,
                  sandwich and (lambda x: naive(x, *model)))
    assert (found.home != 0) == home and math.isfinite(found.log_nu) == davidson
    assert found.loss == pytest.approx(naive_loss(x, *model).item(), rel=1e-12)


@pytest.mark.parametrize("prior", [0, 0.7])
def test_strengths_of_rankings_are_the_maximum_of_the_naive_likelihood(prior):
    found = bt.fit_plackett_luce(RANKINGS, 5, prior=prior)
    r = torch.tensor(found.strengths)
    check_maximum(naive_ranking_loss, r, found.covariance, prior)
    assert found.loss == pytest.approx(naive_ranking_loss(r).item(), rel=1e-12)


def pair(a, b):
    """Item 0 won a times, item 1 b times."""
    return np.array([[0, a], [b, 0]])


def test_two_items_have_a_closed_form():
    """As many free numbers as outcomes: the fitted probabilities are the frequencies."""
    r = math.log(7 / 3) / 2
    near(bt.fit_bradley_terry(pair(7, 3)), [r, -r])
    near(bt.fit(pair(7, 3)).strengths, [r, -r])
    near(bt.fit(pair(6, 2), ties=pair(1, 1)).strengths, [r, -r])  # a tie is half a win for each
    near(np.ptp(bt.fit(pair(6, 0), ties=pair(2, 0)).strengths), math.log(7 / 1))
    near(bt.fit(pair(7, 3)).standard_errors(0), [0, math.sqrt(1 / 7 + 1 / 3)])  # of log odds
    found = bt.fit(pair(8, 5), pair(2, 3), home=True)
    first, second = math.log(8 / 2), math.log(5 / 3)  # r_0 - r_1 + home, r_1 - r_0 + home
    near([found.strengths[0], found.home], [(first - second) / 4, (first + second) / 2])
    found = bt.fit(pair(6, 2), ties=pair(1, 3), davidson=True)
    near([found.strengths[0], found.log_nu],
         [math.log(6 / 2) / 2, math.log(4 / math.sqrt(6 * 2))])
    near(found.probabilities(), [[0.5, 8 / 12], [4 / 12, 0.5]])


def test_only_differences_mean_anything_but_their_scale_does():
    found = bt.fit(WINS)
    assert abs(found.strengths.mean()) < 1e-15
    shifted = found._replace(strengths=found.strengths + 10)
    near(shifted.probabilities(), found.probabilities(), 1e-14)
    assert bt.neg_log_likelihood(shifted.strengths, WINS) == pytest.approx(found.loss, rel=1e-12)
    assert bt.neg_log_likelihood(2 * found.strengths, WINS) > found.loss + 1


def test_order_sides_and_labels_do_not_matter():
    """Items in another order; wins told as losses of the other side, where home changes its sign;
    ties as halves."""
    order, how = np.array([3, 0, 4, 1, 2]), dict(home=True, davidson=True)
    found = bt.fit(WINS, LOSSES, TIES, **how)
    mixed = bt.fit(*(x[np.ix_(order, order)] for x in (WINS, LOSSES, TIES)), **how)
    near(mixed.strengths, found.strengths[order])
    near(mixed.standard_errors(), found.standard_errors()[order])
    swapped = bt.fit(LOSSES.T, WINS.T, TIES.T, **how)
    near([*swapped.strengths, swapped.home, swapped.log_nu],
         [*found.strengths, -found.home, found.log_nu])
    near(bt.fit(0 * WINS, WINS).strengths, bt.fit(WINS.T).strengths)
    near(bt.fit(WINS, ties=TIES).strengths, bt.fit(WINS + TIES / 2 + TIES.T / 2).strengths)


def test_bradley_terry_sees_no_cycle_and_sides_with_borda():
    assert (bt.fit_bradley_terry(CYCLE) == 0).all()
    assert (bt.fit(CYCLE).probabilities() == 0.5).all()
    assert bt.fit_bradley_terry(DISAGREE).argmax() == 1
    rng = np.random.default_rng(0)
    for _ in range(50):  # all pairs met 20 times: strengths are in the order of the wins
        upper = np.triu(rng.integers(1, 20, (5, 5)), 1)
        wins = upper + np.tril(20 - upper.T, -1)
        found = bt.fit_bradley_terry(wins)
        assert (np.diff(found[wins.sum(1).argsort()]) > -1e-9).all()
        assert borda(wins / 20) == np.flatnonzero(found > found.max() - 1e-9).tolist()


# ---- published tables ----------------------------------------------------------------------------

def published(numbers, digits=4):
    return " ".join(f"{float(x):.{digits}f}" for x in numbers)


def data_file(name):
    if "PREFERENCE_DATA" not in os.environ:
        pytest.skip(f"PREFERENCE_DATA (a folder with bradley_terry/{name}) is not set")
    with open(Path(os.environ["PREFERENCE_DATA"], "bradley_terry", name), newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path, columns, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns.split(","), *rows])


def run(*argv, cwd, **options):
    """bt.py as a process of its own: its exit status, and what it says on either stream."""
    process = subprocess.run([sys.executable, ROOT / "bt.py", *argv], cwd=cwd, capture_output=True,
                             text=True, timeout=120, **options)
    return process.returncode, process.stdout, process.stderr


def test_baseball_1987_has_the_published_coefficients():
    """Agresti, Categorical Data Analysis (2002), p. 438."""
    plain, found = bt.fit(WON, LOST), bt.fit(WON, LOST, home=True)
    assert published(plain.strengths - plain.strengths[0]) == BASEBALL
    assert (published(plain.standard_errors(reference=0))
            == "0.0000 0.3339 0.3319 0.3396 0.3433 0.3359 0.3367")
    assert published(found.strengths - found.strengths[0]) == BASEBALL_AT_HOME
    assert published([found.home, math.sqrt(found.covariance[-1, -1])]) == "0.3023 0.1309"
    neutral = bt.fit_bradley_terry(WON + LOST.T)
    assert published(neutral - neutral[0]) == BASEBALL


def test_baseball_1987_on_the_command_line(tmp_path):
    write_rows(tmp_path / "x.csv", "left,right,outcome,weight", (
        (TEAMS[i], TEAMS[j], outcome, counts[i, j])
        for outcome, counts in (("left", WON), ("right", LOST))
        for i, j in itertools.permutations(range(7), 2)))
    code, out, err = run("--data", "x.csv", "--home", "--reference", "Baltimore", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "the left side's advantage: 0.3023, s.e. 0.1309" in out
    folder = tmp_path / "runs/bt-data-x-home-reference-Baltimore"
    with open(folder / "leaderboard.csv", newline="") as file:
        table = {row["item"]: row for row in csv.DictReader(file)}
    assert published(table[team]["strength"] for team in TEAMS) == BASEBALL_AT_HOME
    best_first = "Milwaukee,Detroit,Toronto,New York,Boston,Cleveland,Baltimore"
    assert [*table] == best_first.split(",")
    for row in table.values():
        low, strength, high, error = (float(row[name])
                                      for name in ("low", "strength", "high", "error"))
        near([low, high], [strength - 1.96 * error, strength + 1.96 * error], 3e-6)
        assert row["comparisons"] == "78"  # 13 games with each of 6


def test_the_table_above_is_that_of_the_file():
    rows = data_file("baseball_1987.csv")
    assert len(rows) == 42 and WON.sum() + LOST.sum() == 273
    for row in rows:
        at = TEAMS.index(row["home.team"]), TEAMS.index(row["away.team"])
        assert (WON[at], LOST[at]) == (int(row["home.wins"]), int(row["away.wins"]))


def test_nascar_2002_has_the_published_strengths(tmp_path):
    """Hunter (2004). The file stops with who never won; without them, again and again, 83 drivers
    are left."""
    rows, removed, found = data_file("nascar_2002.csv"), [], None
    while found is None:
        write_rows(tmp_path / "x.csv", "ranking,position,item", (
            (row["race"], row["position"], row["driver"])
            for row in rows if row["driver"] not in removed))
        names, rankings = read_comparisons(str(tmp_path / "x.csv"))
        try:
            found = bt.fit_plackett_luce(rankings, len(names), names=names)
        except bt.NoMaximum as error:
            listed = re.search("these items never won against any of the others: (.*);", str(error))
            removed += listed[1].split(", ")
    assert {name.split()[-1] for name in removed} == {"Hedlesky", "Renfrow", "Hillenburg",
                                                      "Bradberry"}
    assert (len(rankings), len(names)) == (36, 83)
    r = dict(zip(names, found.strengths - found.strengths[names.index("Austin Cameron")]))
    three = (r[name] for name in ("PJ Jones", "Scott Pruett", "Mark Martin"))
    assert published(three, 2) == "4.15 3.62 2.08"


# ---- identifiability -----------------------------------------------------------------------------

def ring(names):
    return " ".join(a + b for a, b in zip(names, names[1:] + names[0]))


@pytest.mark.parametrize("text, expected", [  # "AB BA": A beat B, and B beat A
    ("AB AC AD " + ring("BCD"), "never lost to any of the others: A;"),
    (ring("ABC") + " AD BE DE ED", "never won against any of the others: D, E;"),
    ("AB BA " + ring("CDE"), "never compared with the others: A, B;"),
    ("AB BC CD", "never lost to any of the others: A;"),  # a path of one way
    ("AB BA BD " + ring("CDE"), "never lost to any of the others: A, B;"),  # one game between them
    (ring("ABCDEFGHIJKL") + " AM " + ring("MNOPQRSTUVWXYZ"),
     "to any of the others: A, B, C, D, E, F, G, H, I, J and 2 more;")])
def test_who_is_to_blame_for_infinite_strengths(text, expected):
    """Told by name, for wins, losses and rankings alike; a prior makes all of them finite."""
    names = "".join(sorted({*text} - {" "}))
    pairs = [[names.index(name) for name in pair] for pair in text.split()]
    wins = count(*zip(*pairs), len(names))
    for fit in (lambda **how: bt.fit(wins, **how), lambda **how: bt.fit(0 * wins, wins.T, **how),
                lambda **how: bt.fit_plackett_luce(pairs, len(names), **how)):
        with pytest.raises(bt.NoMaximum, match=expected):
            fit(names=names)
        found = fit(prior=2.0)
        assert np.isfinite(found.standard_errors()).all() and np.ptp(found.strengths) < 10


def test_a_maximum_exists_where_every_group_lost_to_the_others():
    """Ford (1957), by enumeration of the groups: of 300 small tournaments some have one and some
    do not."""
    rng, seen = np.random.default_rng(0), []
    for _ in range(300):
        wins = rng.integers(1, 4, (4, 4)) * (rng.random((4, 4)) < 0.4) * (1 - np.eye(4))
        groups = (group for size in (1, 2, 3) for group in itertools.combinations(range(4), size))
        seen.append(all(wins[[j for j in range(4) if j not in group]][:, group].any()
                        for group in groups))
        if seen[-1]:
            near(bt.fit_bradley_terry(wins), minorise_maximise(wins), 1e-8)
            near(bt.fit(wins).strengths, bt.fit_bradley_terry(wins), 1e-8)
        else:
            for fit in (bt.fit, bt.fit_bradley_terry):
                with pytest.raises(bt.NoMaximum, match="^these items"):
                    fit(wins)
    assert 50 < sum(seen) < 250


def test_a_long_way_from_first_to_last_is_no_infinity():
    """A chain: each wins 99 of 100 against the next, so it is log 99 stronger. The ends are 32
    apart, and all is finite."""
    wins = np.diag([99] * 7, 1) + np.diag([1] * 7, -1)
    near(-np.diff(bt.fit(wins).strengths), math.log(99))
    near(-np.diff(bt.fit_bradley_terry(wins)), math.log(99))


def test_weights_of_very_different_sizes():
    """Where the rows of the matrix differ by 10^12, every difference of strengths is still right; a
    prior beside them, too. Beyond what a double holds it is an error, and no LinAlgError."""
    wins = np.array([[0, 1e12, 0], [2e12, 0, 3], [0, 1, 0]])
    found = bt.fit(wins)
    near(np.diff(found.strengths), [math.log(2), -math.log(3)], 1e-6)
    near(found.standard_errors(1)[2], math.sqrt(1 / 3 + 1), 1e-3)
    r = bt.fit(wins, prior=1.0).strengths
    near(r[1] - r[0], math.log(2), 1e-6)
    near(3 * bt.sigmoid(r[2] - r[1]) - bt.sigmoid(r[1] - r[2]), -r[2], 1e-3)  # the slopes for C
    far = bt.fit(pair(1e12, 1))
    near(np.ptp(far.strengths), math.log(1e12), 1e-6)
    with pytest.raises(bt.NoMaximum, match="did not converge"):
        bt.fit(np.array([[0, 1e18, 0], [1, 0, 1e-9], [0, 1e-9, 0]]))


def sides(first, second=0):
    """Counts of item 0 on the left against 1 on the right, and the other way round; or of two
    groups of items."""
    return (np.kron([[0, 1], [0, 0]], first)
            + np.kron([[0, 0], [1, 0]], np.ones_like(first) * second))


@pytest.mark.parametrize("wins, losses, ties, how", [
    (sides(4, 4), 0, 0, "home"),  # only the left side wins
    (sides(5, 3), sides(0, 2), 0, "home"),  # 0 never lost on the left: r_0 - r_1 + home is infinite
    (sides(5), sides(3), 0, "home"),  # 0 is always on the left: its strength or the side's?
    (sides([[3, 2], [4, 5]]), sides([[1, 2], [3, 1]]), 0, "home"),  # so for two against two
    (sides(5, 2), sides(3, 1), 0, "davidson"),  # no ties
    (0 * WINS, 0, TIES, "davidson"),  # nothing but ties
    (sides(5), 0, sides(2), "davidson")])  # 0 never lost: it and nu are infinite
def test_an_advantage_or_ties_that_cannot_be_told_are_an_error(wins, losses, ties, how):
    with pytest.raises(bt.NoMaximum):
        bt.fit(wins, losses, ties, **{how: True})


def test_a_prior_is_between_nothing_and_the_data():
    assert np.abs(bt.fit(WINS, prior=1e-4).strengths).max() < 1e-6
    near(bt.fit(WINS, prior=1e4).strengths, bt.fit(WINS).strengths, 1e-7)
    for prior in (1, 10, 100, 1e5):  # of a winner of all 5: where the slopes of both meet
        r = bt.fit(sides(5), prior=prior).strengths[0]
        assert 5 / (1 + math.exp(2 * r)) == pytest.approx(r / prior**2, rel=1e-5)
    one_each = bt.fit_plackett_luce([[0], [1]], 2, prior=1.0)
    assert (one_each.strengths == 0).all()  # rankings of one item each say nothing


# ---- uncertainty ---------------------------------------------------------------------------------

def test_intervals_hold_the_truth_as_often_as_they_say():
    r, rng, inside = np.array([1.0, 0.4, 0, -0.5, -0.9]), np.random.default_rng(0), []
    for _ in range(400):
        wins = bt.simulate(r, 500, rng)
        assert wins.sum() == 500 and not wins.diagonal().any()
        found = bt.fit(wins)
        inside.append(np.abs(found.strengths - r) < 1.96 * found.standard_errors())
    assert np.abs(np.mean(inside, 0) - 0.95).max() < 3 * math.sqrt(0.95 * 0.05 / 400)


def test_three_kinds_of_errors_agree_where_the_model_is_right():
    wins = bt.simulate(np.array([1.0, 0.2, -0.3, -0.9]), 20_000, np.random.default_rng(0))
    fisher, draws = bt.fit(wins).standard_errors(), bt.bootstrap(wins, resamples=500)
    assert draws.shape == (500, 4)
    near(bt.fit(wins, sandwich=True).standard_errors(), fisher, 0, rtol=0.1)
    near(draws.std(0), fisher, 0, rtol=0.1)
    near(draws.mean(0), bt.fit(wins).strengths, 5 * fisher.max() / math.sqrt(500))


def test_ties_are_less_noisy_than_wins_and_the_sandwich_knows():
    """5 wins each, 30 ties: for Fisher 40 scores of variance 1/4, in truth 10 of 1/4 and 30 of 0,
    so a quarter of Fisher's variance. The bootstrap agrees."""
    wins, ties = sides(5, 5), sides(30)
    fisher = bt.fit(wins, ties=ties).standard_errors(0)[1]
    sandwich = bt.fit(wins, ties=ties, sandwich=True).standard_errors(0)[1]
    near([fisher, sandwich], [math.sqrt(4 / 40), math.sqrt(4 / 40) / 2])
    draws = bt.bootstrap(wins, ties=ties, resamples=500)
    assert (draws[:, 1] - draws[:, 0]).std() == pytest.approx(sandwich, rel=0.1)


def test_a_resample_without_a_maximum_is_left_out():
    """2 wins of 3: all three of a resample go to one side with probability (8 + 1) / 27."""
    rows = bt.bootstrap(sides(2, 1), resamples=500)
    assert abs(len(rows) / 500 - 18 / 27) < 4 * math.sqrt(18 / 27 * 9 / 27 / 500)
    near(np.abs(rows), math.log(2) / 2)


def test_the_error_of_a_difference_is_the_same_from_any_zero():
    """With the reference at 0 there is nothing to shift: the plain inverse of the information of
    the others."""
    found = bt.fit(WINS)
    H, C = bt.hessian(found.strengths, WINS), found.covariance
    for reference in range(5):
        others = [i for i in range(5) if i != reference]
        errors = found.standard_errors(reference)
        near(errors[others], np.sqrt(np.linalg.inv(H[np.ix_(others, others)]).diagonal()))
        assert errors[reference] == 0
        near(errors**2, [C[i, i] + C[reference, reference] - 2 * C[i, reference] for i in range(5)])


def test_rank_intervals_by_hand():
    """40 draws, of which 1 is within the 2.5% at an end and 2 are not."""
    usual, other = [3.0, 2.0, 1.0], [1.5, 1.0, 2.0]  # ranks 1, 2, 3 and 2, 3, 1
    for n, expected in ((1, [[1, 2, 3], [1, 2, 3]]), (2, [[1, 2, 1], [2, 3, 3]])):
        draws = np.array([usual] * (40 - n) + [other] * n)
        assert np.array(bt.rank_intervals(draws)).tolist() == expected


# ---- the simulation ------------------------------------------------------------------------------

def test_the_committed_rows_are_those_of_the_command(tmp_path):
    """Up to the rounding of another machine's linear algebra; also where the reader of its output
    goes away after a line, as in `| head -1`."""
    process = subprocess.Popen([sys.executable, "-u", ROOT / "bt.py"], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "1000 comparisons of 8 items\n"
    process.stdout.close()
    process.stderr.read()
    process.wait(timeout=120)
    numbers = re.compile(r"-?\d+\.?\d*(?:e-\d+)?")
    found, committed = (numbers.findall((folder / "results.jsonl").read_text())
                        for folder in (tmp_path / "runs/bt", ROOT / "results/bt"))
    near([float(x) for x in found], [float(x) for x in committed], 1e-12)
    assert (tmp_path / "runs/bt/figure.png").stat().st_size > 10_000


def test_an_error_of_too_few_comparisons_is_nan_and_no_endless_loop():
    assert math.isnan(bt.rms_error(np.zeros(30), 40, np.random.default_rng(0)))


@pytest.mark.parametrize("module", ["bt", "dueling"])
def test_numpy_is_enough_and_no_other_algorithm_is_imported(module):
    program = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", program]
    modules = set(subprocess.check_output(command, cwd=ROOT, text=True).split())
    assert "numpy" in modules and not {"torch", "matplotlib", "scipy", "data"} & modules
    assert {path.stem for path in ROOT.glob("*.py")} & modules == {module}


# ---- files ---------------------------------------------------------------------------------------

@pytest.fixture
def refused(tmp_path, monkeypatch):
    """refused(x, flags): the one line with which bt.py stops, where x.csv has that content; nothing
    is written."""
    def run(content: bytes, flags: str) -> str:
        monkeypatch.chdir(tmp_path)
        Path("x.csv").write_bytes(content)
        Path("rankings.csv").write_text("ranking,position,item\n1,1,a\n1,2,b\n2,1,b\n2,2,a\n")
        with pytest.raises(SystemExit) as stop:
            bt.main(parse(bt.Config, bt.__doc__, flags.split()))
        said = stop.value.code
        assert isinstance(said, str) and said.startswith("error: "), said
        assert len(said.splitlines()) == 1 and len(said) < 400, said
        assert sorted(os.listdir()) == ["rankings.csv", "x.csv"]
        return said
    return run


def weights(*weights):
    """Files with such a weight, and how they are refused."""
    return [(f"winner,loser,weight\na,b,{w}\n".encode(), f", line 2: weight '{w[:40]}")
            for w in weights]


def positions(*positions):
    return [(f"ranking,position,item\n1,{p},a\n".encode(), f", line 2: position '{p[:40]}")
            for p in positions]


@pytest.mark.parametrize("content, expected", [
    (b"left,right,outcome\na,b,left\na,b,draw\n",
     ", line 3: outcome 'draw', expected left, right or tie"),
    (b"winner,loser\na,b\n\nb,b\n", ", line 4: 'b' is compared with itself"),
    (b"left,right\na,b\n", ", line 1: expected the columns left,right,outcome or winner,loser or "
                           "ranking,position,item"),
    (b'"left\nright",outcome\na,b\n', "expected the columns"),  # a line break inside quotes
    *weights("-1", "nan", "inf", "x", "1_000", "1e13", "1e400", "9" * 5000, "0x10"),
    (b"winner,loser,weight\na,b,1,5\n", ", line 2: has 4 cells under 3 columns"),  # decimal comma
    (b"winner,loser,winner\na,b,c\n", ", line 1: the column 'winner' is there twice"),
    (b"winner,loser,weight\na,b,\n", ", line 2: weight is missing"),
    (b"winner,loser,weight\na,b,0\nb,a,0\n", ": has no weight above 0"),
    (b"winner,loser\na\n", ", line 2: loser is missing"),
    (b"left,right,outcome\na,,left\n", ", line 2: right is missing"),
    (b"", ": is empty"), (b"\n \n", ": is empty"),
    (b"winner,loser\n", ": has no row under its columns"),
    (b"winner,loser\na,b\n\xff,b\n", ", line 3: not UTF-8"),
    (b"\xef\xbb\xbfwinner,loser\na,b\n\xff,b\n", ", line 3: not UTF-8"),  # a byte order mark
    (b'winner,loser\na,b\n"a,b\n', ", line 3: unexpected end of data"),
    (b'winner,loser\n"a"c,b\n', ", line 2: "),
    (b"ranking,position,item\n1,1,a\n2,1,a\n", ": has only one item, 'a'"),
    (b"ranking,position,item\n1,1,a\n1,1,b\n", ", line 3: ranking '1' has a position 1 already"),
    (b"ranking,position,item\n1,1,a\n1,2,a\n", ", line 3: ranking '1' has 'a' already"),
    *positions("first", "0", "-1", "1.5", "1" * 5000, "1_0"),
    (b"ranking,position,item\n" + b"".join(b"1,%d,i%d\n" % (k, k) for k in range(1, 5002)),
     ": has 5001 items; more than 5000 need too much memory"),
    (b"winner,loser\na,b\n", ": these items never lost to any of the others: a;")])
def test_a_mistake_in_a_file_is_one_line_that_says_where(content, expected, refused):
    said = refused(content, "--data x.csv")
    assert said.startswith("error: x.csv") and expected in said


@pytest.mark.parametrize("flags, expected", [
    ("--home", "--home: needs --data"), ("--prior 1", "--prior: needs --data"),
    ("--reference a", "--reference: needs --data"), ("--ties davidson", "--ties: needs --data"),
    ("--errors bootstrap", "--errors: needs --data"),
    ("--data x.csv --items 9", "--items: not with --data"),
    ("--data x.csv --comparisons 9", "--comparisons: not with --data"),
    ("--data x.csv --resamples 10", "--resamples: needs --errors bootstrap"),
    ("--data x.csv --errors bootstrap --resamples 1000000", "--resamples 1000000: must be <= 10^5"),
    ("--data x.csv --prior nan", "--prior nan: must be >= 0"),
    ("--data x.csv --prior 1e-300", "--prior 1e-300: must be 0 or at least 1e-6"),
    ("--seed -1", "--seed -1: must be >= 0"), ("--items 1", "--items 1: must be from 2 to 1000"),
    ("--items 1001", "--items 1001: must be from 2 to 1000"),
    ("--comparisons 10000001", "--comparisons 10000001: must be <= 10^7"),
    ("--comparisons 5", "--comparisons 5: too few for 8 items"),
    ("--preset gpu", "unrecognized arguments: --preset gpu"),
    ("--dataset imdb", "unrecognized arguments: --dataset imdb"),
    ("--horizon 100", "unrecognized arguments: --horizon 100"),
    ("--data x.csv --ties never", "invalid choice: 'never'"),
    ("--data y.csv", "y.csv: cannot be read"),
    ("--data y.csv --out x.csv/out", "x.csv/out: cannot be written"),  # before anything is read
    ("--data x.csv --reference c", "--reference c: x.csv has no such item"),
    ("--data x.csv --home", "x.csv: "),  # the winner is the left side: always
    ("--data rankings.csv --home", "not for rankings"),
    ("--data rankings.csv --ties davidson", "not for rankings"),
    ("--data rankings.csv --errors sandwich", "not for rankings"),
    ("--data x.csv --errors bootstrap", "of 1000 resamples have no maximum; use --prior")])
def test_flags_that_do_not_go_together_are_one_line(flags, expected, refused):
    assert expected in refused(b"winner,loser\na,b\nb,a\n", flags)


def test_a_bootstrap_draws_whole_comparisons(refused):
    said = refused(b"winner,loser,weight\na,b,0.1\nb,a,0.1\n", "--data x.csv --errors bootstrap")
    assert "needs weights that are whole numbers" in said


def test_what_a_spreadsheet_writes_is_read(tmp_path):
    """A byte order mark, CRLF, blank lines, spaces, quotes, other columns and empty ones, in any
    order."""
    path = tmp_path / "x.csv"
    path.write_bytes('\ufeffnote,right, left,outcome,,\r\n\r\nx,"B, the 2nd", Ä ,tie,,\r\n'
                     ',C,Ä,right\r\n \r\n'.encode())
    assert read_comparisons(str(path)) == Comparisons(
        ["Ä", "B, the 2nd", "C"], [0, 0], [1, 2], ["tie", "right"], [1, 1])
    path.write_bytes(b"position,item,ranking\n2,a,x\n1,b,y\n1,b,x\n010,c,x\n")
    assert read_comparisons(str(path)) == Rankings(["a", "b", "c"], [[1, 0, 2], [1]])


def test_a_weight_is_a_repetition(tmp_path, monkeypatch):
    """The same tables, byte for byte; for the matrix of wins of either side, too."""
    monkeypatch.chdir(tmp_path)
    rows = [("a", "b", "left", 3), ("b", "a", "left", 1), ("b", "c", "tie", 4),
            ("c", "a", "right", 2), ("a", "c", "right", 1)]
    write_rows("once.csv", "left,right,outcome,weight", rows)
    write_rows("often.csv", "left,right,outcome", (row[:3] for row in rows for _ in range(row[3])))
    for name in ("once", "often"):
        near(read_comparisons(f"{name}.csv").wins(), [[0, 3, 2], [1, 0, 2], [1, 2, 0]])
        bt.main(bt.Config(data=f"{name}.csv", ties="davidson", out=name))
    for table in ("leaderboard.csv", "probabilities.csv"):
        assert Path("once", table).read_bytes() == Path("often", table).read_bytes()


def test_any_name_of_an_item_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["$\\foo{$", "a_b^c", "", "$"]
    write_rows("x.csv", "winner,loser", [(a or "%", b or "%") for a, b in
                                         itertools.permutations(names, 2)])
    bt.main(bt.Config(data="x.csv", out="out"))
    assert Path("out/figure.png").stat().st_size > 5000


def test_a_full_disk_is_one_line_that_names_the_figure(tmp_path):
    resource = pytest.importorskip("resource")
    (tmp_path / "x.csv").write_text("winner,loser\na,b\nb,a\n")
    code, _, err = run("--data", "x.csv", cwd=tmp_path, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (4096, 4096)))
    assert code == 1
    assert err == "error: runs/bt-data-x/figure.png: cannot be written (File too large)\n"
    tables = ["leaderboard.csv", "probabilities.csv"]
    assert sorted(os.listdir(tmp_path / "runs/bt-data-x")) == tables


def test_a_terminal_that_takes_nothing_is_one_line_and_the_tables_are_there(tmp_path):
    (tmp_path / "x.csv").write_text("winner,loser\na,b\nb,a\n")
    with open("/dev/full", "w") as full:
        process = subprocess.run([sys.executable, ROOT / "bt.py", "--data", "x.csv"], cwd=tmp_path,
                                 stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert process.stderr.splitlines()[0] == "error: cannot write (No space left on device)"
    assert "Traceback" not in process.stderr
    assert len(os.listdir(tmp_path / "runs/bt-data-x")) == 3
