"""bt.py: fits against naive likelihoods, closed forms and published tables; intervals, winners, dueling bandits, CSV files."""
import csv
import itertools
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import bt
import clone
from common.settings import parse
from common.comparisons import Comparisons, Rankings, read_comparisons

# Ragged: pairs that met often, once, on one side only, or not at all
WINS = np.array([[0, 7, 3, 0, 12], [4, 0, 9, 2, 0], [1, 8, 0, 5, 6], [0, 3, 2, 0, 1], [5, 0, 4, 6, 0]])
LOSSES = np.array([[0, 2, 5, 1, 0], [3, 0, 0, 0, 4], [6, 1, 0, 2, 3], [0, 0, 7, 0, 2], [4, 1, 0, 3, 0]])
TIES = np.array([[0, 3, 0, 1, 2], [0, 0, 4, 0, 1], [2, 2, 0, 0, 0], [1, 0, 3, 0, 5], [0, 1, 1, 0, 0]])
PAIRS = [(i, j) for i, j in itertools.permutations(range(5), 2) for _ in range(WINS[i, j])]
RANKINGS, WEIGHTS = [[0, 1, 2, 3, 4], [3, 1], [4, 0, 3], [2, 4, 1, 0], [1, 2, 0], [3, 2], [4]], [1, 2, 0.5, 3, 1, 1, 7]
# choix 0.4.2 on PAIRS: opt_pairwise(5, PAIRS, alpha=0, method="Newton-CG", tol=1e-14); its ilsr_pairwise has the same digits
CHOIX = [0.7779398435, -0.0314643386, 0.0330074529, -0.7721400709, -0.0073428869]

# American League East, 1987: games that the team of the row won and lost at home against that of the column
TEAMS = ["Baltimore", "Boston", "Cleveland", "Detroit", "Milwaukee", "New York", "Toronto"]
WON, LOST = (np.array([[*map(int, row)] for row in rows.split()]) for rows in (
    "0131221 6052543 2403243 4660344 6644044 6445302 6444220", "0645546 0025123 4203534 3010332 0123032 1321305 0323540"))
BASEBALL = {False: "0.0000 1.1077 0.6839 1.4364 1.5814 1.2476 1.2945", True: "0.0000 1.1438 0.7047 1.4754 1.6196 1.2813 1.3271"}


def near(found, expected, atol=1e-9, rtol=0):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


def naive(x, wins, losses, ties, home, davidson):
    """(how often, log P) of each outcome of each pair on either side; exp(x) are the papers' parameters."""
    strength, theta, nu = x[:len(wins)].exp(), x[len(wins)].exp() if home else 1.0, x[-1].exp() if davidson else 0.0
    counts, logs = [], []
    for i, j in itertools.permutations(range(len(wins)), 2):
        left, right = theta * strength[i], strength[j]
        total = left + right + nu * torch.sqrt(left * right)
        p, q = left / total, right / total
        counts += [wins[i, j], losses[i, j], ties[i, j]]
        logs += [p.log(), q.log(), (1 - p - q).log() if davidson else (p.log() + q.log()) / 2]
    return torch.tensor(np.array(counts), dtype=torch.double), torch.stack(logs)


def naive_loss(x, *model):
    counts, logs = naive(torch.as_tensor(x), *model)
    return -(counts * logs).sum()


def naive_ranking_loss(r, rankings, weights):
    """Plackett-Luce, place by place: the next one against all that are left."""
    return -sum(w * (r[ranking[k]] - sum(r[item].exp() for item in ranking[k:]).log())
                for w, ranking in zip(weights, rankings) for k in range(len(ranking)))


def check_maximum(loss, x, covariance, prior, logs=None):
    """Loss and prior are least at x, by the gradient and all around; the covariance is their inverse curvature, without the
    shift of all 5 strengths; where (how often, log P) is given, with the sum of its squared gradients in the middle."""
    objective = lambda x: loss(x) + ((x[:5] ** 2).sum() / (2 * prior**2) if prior else 0)  # noqa: E731
    assert torch.autograd.functional.jacobian(objective, x).abs().max() < 1e-6
    assert all(objective(x + step) > objective(x) for step in [*1e-3 * torch.eye(len(x)), *-1e-3 * torch.eye(len(x))])
    centre = np.eye(len(x))
    centre[:5, :5] -= 1 / 5
    C = centre @ np.linalg.pinv(torch.autograd.functional.hessian(objective, x).numpy(), rcond=1e-10, hermitian=True) @ centre
    if logs:
        J = torch.autograd.functional.jacobian(lambda x: logs(x)[1], x).numpy()
        C = C @ sum(n * np.outer(g, g) for n, g in zip(logs(x)[0].numpy(), J)) @ C
    near(covariance, C, rtol=1e-7)


# ---- the fit ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prior", [0, 0.7])
@pytest.mark.parametrize("sandwich", [False, True])
@pytest.mark.parametrize("home, davidson", [(False, False), (True, False), (False, True), (True, True)])
def test_the_fit_is_the_maximum_of_the_naive_likelihood(home, davidson, sandwich, prior):
    """All pairs in a loop, the formulas in the papers' parameters, derivatives by autograd; the loss is of the data alone."""
    model = (WINS, LOSSES, TIES, home, davidson)
    found = bt.fit(WINS, LOSSES, TIES, home=home, davidson=davidson, prior=prior, sandwich=sandwich)
    x = torch.tensor([*found.strengths, *[found.home] * home, *[found.log_nu] * davidson], dtype=torch.double)
    check_maximum(lambda x: naive_loss(x, *model), x, found.covariance, prior, sandwich and (lambda x: naive(x, *model)))
    assert (found.home != 0) == home and math.isfinite(found.log_nu) == davidson
    assert found.loss == pytest.approx(naive_loss(x, *model).item(), rel=1e-12)


@pytest.mark.parametrize("prior", [0, 0.7])
def test_strengths_of_rankings_are_the_maximum_of_the_naive_likelihood(prior):
    found = bt.fit_rankings(RANKINGS, 5, WEIGHTS, prior=prior)
    r = torch.tensor(found.strengths)
    check_maximum(lambda r: naive_ranking_loss(r, RANKINGS, WEIGHTS), r, found.covariance, prior)
    assert found.loss == pytest.approx(naive_ranking_loss(r, RANKINGS, WEIGHTS).item(), rel=1e-12)


def test_newton_is_the_oldest_algorithm_rankings_of_two_and_what_choix_found():
    found, ranked = bt.fit(WINS), bt.fit_rankings(PAIRS, 5)
    near(found.strengths, bt.mm(WINS), 1e-8)
    near(found.strengths, CHOIX, 1e-9)
    near(found.strengths, ranked.strengths)
    near(found.covariance, ranked.covariance)


@pytest.mark.parametrize("package", ["choix", "evalica"])
def test_the_fit_is_that_of_another_package(package):
    other = pytest.importorskip(package)
    if package == "choix":
        r = other.opt_pairwise(5, PAIRS, alpha=0, tol=1e-12)
    else:
        r = np.log(other.bradley_terry(*map(list, zip(*PAIRS)), [other.Winner.X] * len(PAIRS), tolerance=1e-12, limit=10_000)
                   .scores.sort_index().to_numpy())
    near(bt.fit(WINS).strengths, r - r.mean(), 1e-6)


def test_two_items_have_a_closed_form():
    """As many free numbers as outcomes: the fitted probabilities are the frequencies."""
    pair = lambda a, b: np.array([[0, a], [b, 0]])  # noqa: E731
    r = math.log(7 / 3) / 2
    near(bt.fit(pair(7, 3)).strengths, [r, -r])
    near(bt.fit(pair(6, 2), ties=pair(1, 1)).strengths, [r, -r])  # a tie is half a win for each
    near(np.ptp(bt.fit(pair(6, 0), ties=pair(2, 0)).strengths), math.log(7 / 1))  # also the only thing that 1 ever won
    near(bt.fit(pair(7, 3)).errors(0), [0, math.sqrt(1 / 7 + 1 / 3)])  # of log odds
    found = bt.fit(pair(8, 5), pair(2, 3), home=True)
    first, second = math.log(8 / 2), math.log(5 / 3)  # r_0 - r_1 + home, r_1 - r_0 + home
    near([found.strengths[0], found.home], [(first - second) / 4, (first + second) / 2])
    found = bt.fit(pair(6, 2), ties=pair(1, 3), davidson=True)
    near([found.strengths[0], found.log_nu], [math.log(6 / 2) / 2, math.log(4 / math.sqrt(6 * 2))])
    near(found.probabilities(), [[0.5, 8 / 12], [4 / 12, 0.5]])


def test_only_differences_mean_anything_but_their_scale_does():
    found = bt.fit(WINS)
    assert abs(found.strengths.mean()) < 1e-15
    near(found._replace(strengths=found.strengths + 10).probabilities(), found.probabilities(), 1e-14)
    loss = lambda r: naive_loss(r, WINS, 0 * WINS, 0 * WINS, False, False).item()  # noqa: E731
    assert loss(found.strengths + 10) == pytest.approx(found.loss, rel=1e-12) and loss(2 * found.strengths) > found.loss + 1


def test_order_sides_and_labels_do_not_matter():
    """Items in another order; wins told as losses of the other side, where home changes its sign; ties as halves."""
    order, how = np.array([3, 0, 4, 1, 2]), dict(home=True, davidson=True)
    found, mixed = (bt.fit(*(x[np.ix_(o, o)] for x in (WINS, LOSSES, TIES)), **how) for o in (np.arange(5), order))
    near([mixed.strengths, mixed.errors()], [found.strengths[order], found.errors()[order]])
    swapped = bt.fit(LOSSES.T, WINS.T, TIES.T, **how)
    near([*swapped.strengths, swapped.home, swapped.log_nu], [*found.strengths, -found.home, found.log_nu])
    near(bt.fit(0 * WINS, WINS).strengths, bt.fit(WINS.T).strengths)
    near(bt.fit(WINS, ties=TIES).strengths, bt.fit(WINS + TIES / 2 + TIES.T / 2).strengths)


def test_count_is_a_loop():
    rng, expected = np.random.default_rng(0), np.zeros((2, 6, 6))
    winners, losers, weights = rng.integers(0, 6, 200), rng.integers(0, 6, 200), rng.random(200)
    for i, j, w in zip(winners, losers, weights):
        expected[:, i, j] += 1, w
    near([bt.count(winners, losers, 6), bt.count(winners, losers, 6, weights)], expected, 1e-12)


# ---- published tables ------------------------------------------------------------------------------------------------

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


def test_baseball_1987_has_the_published_coefficients():
    """Agresti, Categorical Data Analysis (2002), p. 438."""
    plain, found = bt.fit(WON, LOST), bt.fit(WON, LOST, home=True)
    assert published(plain.strengths - plain.strengths[0]) == BASEBALL[False]
    assert published(plain.errors(reference=0)) == "0.0000 0.3339 0.3319 0.3396 0.3433 0.3359 0.3367"
    assert published(found.strengths - found.strengths[0]) == BASEBALL[True]
    assert published([found.home, math.sqrt(found.covariance[-1, -1])]) == "0.3023 0.1309"


def test_baseball_1987_on_the_command_line(tmp_path):
    write_rows(tmp_path / "x.csv", "left,right,outcome,weight", (
        (TEAMS[i], TEAMS[j], outcome, counts[i, j]) for outcome, counts in (("left", WON), ("right", LOST))
        for i, j in itertools.permutations(range(7), 2)))
    process = clone.start(clone.ROOT, "bt", "--data", "x.csv", "--home", "--reference", "Baltimore", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "the left side's advantage: 0.3023, s.e. 0.1309" in out
    with open(tmp_path / "runs/bt/leaderboard.csv", newline="") as file:
        table = {row["item"]: row for row in csv.DictReader(file)}
    assert published(table[team]["strength"] for team in TEAMS) == BASEBALL[True]
    assert [*table] == "Milwaukee,Detroit,Toronto,New York,Boston,Cleveland,Baltimore".split(",")  # best first
    for row in table.values():
        low, strength, high, error = (float(row[name]) for name in ("low", "strength", "high", "error"))
        near([low, high], [strength - 1.96 * error, strength + 1.96 * error], 3e-6)
        assert row["comparisons"] == "78"  # 13 games with each of 6


def test_the_table_above_is_that_of_the_file():
    rows = data_file("baseball_1987.csv")
    assert len(rows) == 42 and WON.sum() + LOST.sum() == 273
    for row in rows:
        at = TEAMS.index(row["home.team"]), TEAMS.index(row["away.team"])
        assert (WON[at], LOST[at]) == (int(row["home.wins"]), int(row["away.wins"]))


def test_nascar_2002_has_the_published_strengths(tmp_path):
    """Hunter (2004). The file stops with who never won; without them, again and again, 83 drivers are left."""
    rows, removed, found = data_file("nascar_2002.csv"), [], None
    while found is None:
        write_rows(tmp_path / "x.csv", "ranking,position,item", (
            (row["race"], row["position"], row["driver"]) for row in rows if row["driver"] not in removed))
        names, rankings = read_comparisons(str(tmp_path / "x.csv"))
        try:
            found = bt.fit_rankings(rankings, len(names), names=names)
        except bt.NoMaximum as error:
            removed += re.search("these items never won against any of the others: (.*);", str(error))[1].split(", ")
    assert {name.split()[-1] for name in removed} == {"Hedlesky", "Renfrow", "Hillenburg", "Bradberry"}
    assert (len(rankings), len(names)) == (36, 83)
    r = dict(zip(names, found.strengths - found.strengths[names.index("Austin Cameron")]))
    assert published((r[name] for name in ("PJ Jones", "Scott Pruett", "Mark Martin")), 2) == "4.15 3.62 2.08"


# ---- does the answer exist? ------------------------------------------------------------------------------------------

def ring(names):
    return " ".join(a + b for a, b in zip(names, names[1:] + names[0]))


@pytest.mark.parametrize("text, expected", [  # "AB BA": A beat B, and B beat A
    ("AB AC AD " + ring("BCD"), "never lost to any of the others: A;"),
    (ring("ABC") + " AD BE DE ED", "never won against any of the others: D, E;"),
    ("AB BA " + ring("CDE"), "never compared with the others: A, B;"),
    ("AB BC CD", "never lost to any of the others: A;"),  # a path of one way
    ("AB BA BD " + ring("CDE"), "never lost to any of the others: A, B;"),  # two groups, one comparison between them
    (ring("ABCDEFGHIJKL") + " AM " + ring("MNOPQRSTUVWXYZ"), "to any of the others: A, B, C, D, E, F, G, H, I, J and 2 more;")])
def test_who_is_to_blame_for_infinite_strengths(text, expected):
    """Told by name, for wins, losses and rankings alike; a prior makes all of them finite."""
    names = "".join(sorted({*text} - {" "}))
    pairs = [[names.index(name) for name in pair] for pair in text.split()]
    wins = bt.count(*zip(*pairs), len(names))
    for fit in (lambda **how: bt.fit(wins, **how), lambda **how: bt.fit(0 * wins, wins.T, **how),
                lambda **how: bt.fit_rankings(pairs, len(names), **how)):
        with pytest.raises(bt.NoMaximum, match=expected):
            fit(names=names)
        found = fit(prior=2.0)
        assert np.isfinite(found.strengths).all() and np.isfinite(found.errors()).all() and np.ptp(found.strengths) < 10


def test_a_maximum_exists_where_every_group_lost_to_the_others():
    """Ford (1957), by enumeration of the groups: of 300 small tournaments some have one and some do not."""
    rng, seen = np.random.default_rng(0), []
    for _ in range(300):
        wins = rng.integers(1, 4, (4, 4)) * (rng.random((4, 4)) < 0.4) * (1 - np.eye(4))
        seen.append(all(any(wins[j, i] for i in group for j in range(4) if j not in group)
                        for size in (1, 2, 3) for group in itertools.combinations(range(4), size)))
        if seen[-1]:
            near(bt.fit(wins).strengths, bt.mm(wins), 1e-8)
        else:
            with pytest.raises(bt.NoMaximum, match="^these items"):
                bt.fit(wins)
    assert 50 < sum(seen) < 250


def test_a_long_way_from_first_to_last_is_no_infinity():
    """A chain: each wins 99 of 100 against the next, so it is log 99 stronger. The ends are 32 apart, and all is finite."""
    wins = np.diag([99] * 7, 1) + np.diag([1] * 7, -1)
    near(-np.diff(bt.fit(wins).strengths), math.log(99))


def sides(first, second=0):
    """Counts of item 0 on the left against 1 on the right, and the other way round; or of two groups of items."""
    return np.kron([[0, 1], [0, 0]], first) + np.kron([[0, 0], [1, 0]], np.ones_like(first) * second)


@pytest.mark.parametrize("wins, losses, ties, how", [
    (sides(4, 4), 0, 0, dict(home=True)),  # only the left side wins
    (sides(5, 3), sides(0, 2), 0, dict(home=True)),  # 0 never lost on the left: r_0 - r_1 + home is infinite
    (sides(5), sides(3), 0, dict(home=True)),  # 0 is always on the left: its strength or the side's?
    (sides([[3, 2], [4, 5]]), sides([[1, 2], [3, 1]]), 0, dict(home=True)),  # so for two against two
    (sides(5, 2), sides(3, 1), 0, dict(davidson=True)),  # no ties
    (0 * WINS, 0, TIES, dict(davidson=True)),  # nothing but ties
    (sides(5), 0, sides(2), dict(davidson=True))])  # 0 never lost: it and nu are infinite
def test_an_advantage_or_ties_that_cannot_be_told_are_an_error(wins, losses, ties, how):
    with pytest.raises(bt.NoMaximum):
        bt.fit(wins, losses, ties, **how)


def test_a_prior_is_between_nothing_and_the_data():
    assert np.abs(bt.fit(WINS, prior=1e-4).strengths).max() < 1e-6
    near(bt.fit(WINS, prior=1e4).strengths, bt.fit(WINS).strengths, 1e-7)
    for prior in (1, 10, 100):  # of a winner of all 5 comparisons: where the slopes of likelihood and prior meet
        r = bt.fit(sides(5), prior=prior).strengths[0]
        assert 5 / (1 + math.exp(2 * r)) == pytest.approx(r / prior**2, rel=1e-5)
    assert (bt.fit_rankings([[0], [1]], 2, prior=1.0).strengths == 0).all()  # rankings of one item each say nothing


# ---- how sure? -------------------------------------------------------------------------------------------------------

def test_intervals_hold_the_truth_as_often_as_they_say():
    r, rng, inside = np.array([1.0, 0.4, 0, -0.5, -0.9]), np.random.default_rng(0), []
    for _ in range(400):
        wins = bt.simulate(r, 500, rng)
        assert wins.sum() == 500 and not wins.diagonal().any()
        found = bt.fit(wins)
        inside.append(np.abs(found.strengths - r) < 1.96 * found.errors())
    assert np.abs(np.mean(inside, 0) - 0.95).max() < 3 * math.sqrt(0.95 * 0.05 / 400)


def test_three_kinds_of_errors_agree_where_the_model_is_right():
    wins = bt.simulate(np.array([1.0, 0.2, -0.3, -0.9]), 20_000, np.random.default_rng(0))
    fisher, draws = bt.fit(wins).errors(), bt.bootstrap(wins, resamples=1000)
    assert draws.shape == (1000, 4)
    near(bt.fit(wins, sandwich=True).errors(), fisher, 0, rtol=0.1)
    near(draws.std(0), fisher, 0, rtol=0.1)
    near(draws.mean(0), bt.fit(wins).strengths, 5 * fisher.max() / math.sqrt(1000))


def test_ties_are_less_noisy_than_wins_and_the_sandwich_knows():
    """5 wins each, 30 ties: for Fisher 40 scores of variance 1/4, in truth 10 of 1/4 and 30 of 0, so a quarter of Fisher's
    variance. The bootstrap agrees."""
    wins, ties = sides(5, 5), sides(30)
    fisher, sandwich = (bt.fit(wins, ties=ties, sandwich=how).errors(0)[1] for how in (False, True))
    near([fisher, sandwich], [math.sqrt(4 / 40), math.sqrt(4 / 40) / 2])
    draws = bt.bootstrap(wins, ties=ties, resamples=500)
    assert (draws[:, 1] - draws[:, 0]).std() == pytest.approx(sandwich, rel=0.1)


def test_a_resample_without_a_maximum_is_left_out():
    """2 wins of 3: all three of a resample go to one side with probability (8 + 1) / 27."""
    rows = bt.bootstrap(sides(2, 1), resamples=500)
    assert abs(len(rows) / 500 - 18 / 27) < 4 * math.sqrt(18 / 27 * 9 / 27 / 500)
    near(np.abs(rows), math.log(2) / 2)


def test_the_error_of_a_difference_is_the_same_from_any_zero():
    """With the reference at 0 there is nothing to shift: the plain inverse of the information of the others."""
    found, n, H = bt.fit(WINS), WINS + WINS.T, np.zeros((5, 5))
    for i, j in itertools.combinations(range(5), 2):
        e = np.eye(5)[i] - np.eye(5)[j]
        H += n[i, j] / (2 + 2 * math.cosh(found.strengths[i] - found.strengths[j])) * np.outer(e, e)
    for reference in range(5):
        others, C = [i for i in range(5) if i != reference], found.covariance
        near(found.errors(reference)[others], np.sqrt(np.linalg.inv(H[np.ix_(others, others)]).diagonal()))
        assert found.errors(reference)[reference] == 0
        near(found.errors(reference)**2, [C[i, i] + C[reference, reference] - 2 * C[i, reference] for i in range(5)])


def test_rank_intervals_by_hand():
    """40 draws, of which 1 is within the 2.5% at an end and 2 are not."""
    usual, other = [3.0, 2.0, 1.0], [1.5, 1.0, 2.0]  # ranks 1, 2, 3 and 2, 3, 1
    for count, expected in ((1, [[1, 2, 3], [1, 2, 3]]), (2, [[1, 2, 1], [2, 3, 3]])):
        assert np.array(bt.rank_intervals(np.array([usual] * (40 - count) + [other] * count))).tolist() == expected


# ---- winners ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("P, condorcet, copeland, borda", [
    (bt.CYCLE, None, [0, 1, 2], [0, 1, 2]),
    (bt.DISAGREE, 0, [0], [1]),
    (np.full((3, 3), 0.5), None, [0, 1, 2], [0, 1, 2]),
    (np.array([[0.5, 0.6, 0.5, 0.5], [0.4, 0.5, 0.9, 0.9], [0.5, 0.1, 0.5, 0.5], [0.5, 0.1, 0.5, 0.5]]),
     None, [0, 1], [1])])  # one victory and two even are as good as two victories and a defeat
def test_winners_by_hand(P, condorcet, copeland, borda):
    assert (bt.condorcet(P), bt.copeland(P), bt.borda(P)) == (condorcet, copeland, borda)


def test_bradley_terry_sees_no_cycle_and_sides_with_borda():
    assert (bt.fit(bt.CYCLE).strengths == 0).all() and (bt.fit(bt.CYCLE).probabilities() == 0.5).all()
    assert bt.fit(bt.DISAGREE).strengths.argmax() == 1
    rng = np.random.default_rng(0)
    for _ in range(50):  # all pairs met 20 times: strengths are in the order of the wins
        upper = np.triu(rng.integers(1, 20, (5, 5)), 1)
        wins = upper + np.tril(20 - upper.T, -1)
        found = bt.fit(wins).strengths
        assert (np.diff(found[wins.sum(1).argsort()]) > -1e-9).all()
        assert bt.borda(wins / 20) == np.flatnonzero(found > found.max() - 1e-9).tolist()


# ---- dueling bandits -------------------------------------------------------------------------------------------------

EASY = 1 / (1 + np.exp(-np.subtract.outer([0, -1, -1.5, -2], [0, -1, -1.5, -2])))  # arm 0 is the best
SURE = np.where(np.eye(3), 0.5, np.triu(np.ones((3, 3))))  # a lower number always wins
COST = np.array([[((EASY[0, i] - 0.5) + (EASY[0, j] - 0.5)) / 2 for j in range(4)] for i in range(4)])


@pytest.mark.parametrize("algorithm", [bt.uniform_explorer, bt.interleaved_filter, bt.rucb])
def test_a_step_costs_what_some_pair_costs_and_a_seed_repeats_it(algorithm):
    curves, again, other = (algorithm(EASY, 400, 3, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert curves.shape == (3, 400) and (curves == again).all() and (curves != other).any() and (curves[0] != curves[1]).any()
    steps = np.diff(curves, axis=1, prepend=0)
    assert (steps > -1e-12).all() and (np.abs(steps[..., None] - COST.ravel()).min(-1) < 1e-9).all()
    assert bt.regret_of(EASY, 0, 0) == 0  # the best against itself


def test_the_uniform_explorer_pays_the_mean_over_all_pairs():
    found = bt.uniform_explorer(EASY, 2000, 50, np.random.default_rng(0))[:, -1].mean() / 2000
    assert abs(found - COST.mean()) < 4 * COST.std() / math.sqrt(2000 * 50)


def test_the_interleaved_filter_by_hand_where_every_duel_is_sure():
    """A mean of 0 or 1 is sure when sqrt(4 log(T K^2) / n) < 1/2: n rounds. A duel costs 1/4 with the best arm, 1/2 without.
    Candidate 0 meets both for n rounds: n / 2. Candidate 1: 3 n / 4, then 0 is alone. Candidate 2: 3 n / 4, and 0 and 1: n."""
    n = math.floor(16 * math.log(2000 * 9)) + 1
    curves = bt.interleaved_filter(SURE, 2000, 60, np.random.default_rng(0))
    assert set((curves[:, -1] / n).round(9)) == {0.5, 0.75, 1.0}
    first = curves[curves[:, -1] == n / 2][0]
    assert first[2 * n - 1] == n / 2 and first[2 * n - 2] < n / 2  # and nothing more


def test_the_interleaved_filter_meets_all_in_turn_and_ends_with_the_best():
    steps = np.diff(bt.interleaved_filter(EASY, 20_000, 20, np.random.default_rng(0)), axis=1, prepend=0)
    costs, candidates = np.array([sorted(np.delete(COST[i], i)) for i in range(4)]), set()
    for run in steps:
        rounds = run[:300].reshape(100, 3)  # nobody can be sure yet: each meets the candidate once a round, in the same order
        near(rounds, rounds[:1].repeat(100, 0))
        candidate = np.abs(costs - np.sort(rounds[0])).max(1).argmin()
        near(np.sort(rounds[0]), costs[candidate])
        candidates.add(int(candidate))
    assert candidates == {0, 1, 2, 3}  # any arm may be the first
    assert (np.abs(steps[:, -1000:]).max(1) < 1e-9).mean() >= 0.95


def test_rucb_by_hand_where_every_duel_is_sure():
    """Two arms: they meet while the loser's bound, sqrt(0.51 log t / n), is at least 1/2; otherwise 0 meets itself."""
    n, expected = 0, []
    for t in range(1, 2001):
        n += n == 0 or math.sqrt(0.51 * math.log(t) / n) >= 0.5
        expected.append(n / 4)
    near(bt.rucb(SURE[:2, :2], 2000, 5, np.random.default_rng(0)), [expected] * 5)


def test_rucb_grows_like_the_logarithm():
    T, bound = 10_000, bt.regret_bound(EASY)
    mean = bt.rucb(EASY, T, 20, np.random.default_rng(0)).mean(0)
    assert bound / 2 < (mean[-1] - mean[T // 10 - 1]) / math.log(10) < 4 * bound
    assert mean[-1] - mean[T // 2 - 1] < COST.mean() * T / 2 / 50


def test_the_regret_bound_by_hand():
    """P = 3/4: a meeting costs (1/4 + 0) / 2 and says 1/4 log 1/2 + 3/4 log 3/2 = 0.1308 nats. Of three arms, arm 2 may lose to
    arm 1 instead, which costs (1/4 + 1/4) / 2 and says all the more: 0.1 log 0.2 + 0.9 log 1.8 = 0.3681 nats."""
    assert bt.regret_bound(np.array([[0.5, 0.75], [0.25, 0.5]])) == pytest.approx(0.125 / 0.13081204, rel=1e-7)
    P = np.array([[0.5, 0.75, 0.75], [0.25, 0.5, 0.9], [0.25, 0.1, 0.5]])
    assert bt.regret_bound(P) == pytest.approx(0.125 / 0.13081204 + 0.25 / 0.36806420, rel=1e-7)


# ---- files -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def refused(tmp_path, monkeypatch):
    """refused(x, flags): the one line with which bt.py stops, where x.csv has that content; nothing is written."""
    def run(content: bytes, flags: str) -> str:
        monkeypatch.chdir(tmp_path)
        Path("x.csv").write_bytes(content)
        Path("rankings.csv").write_text("ranking,position,item\n1,1,a\n1,2,b\n2,1,b\n2,2,a\n")
        with pytest.raises(SystemExit) as stop:
            bt.main(parse(bt.Config, bt.__doc__, flags.split()))
        said = stop.value.code
        assert isinstance(said, str) and said.startswith("error: ") and len(said.splitlines()) == 1, said
        assert sorted(os.listdir()) == ["rankings.csv", "x.csv"]
        return said
    return run


@pytest.mark.parametrize("content, expected", [
    (b"left,right,outcome\na,b,left\na,b,draw\n", ", line 3: outcome 'draw', expected left, right or tie"),  # not a tie
    (b"winner,loser\na,b\n\nb,b\n", ", line 4: 'b' is compared with itself"),
    (b"left,right\na,b\n", ", line 1: expected the columns left,right,outcome or winner,loser or ranking,position,item"),
    (b'"left\nright",outcome\na,b\n', "expected the columns"),  # a line break inside quotes; the message is one line
    *((f"winner,loser,weight\na,b,{w}\n".encode(), f", line 2: weight '{w}', expected") for w in ("-1", "nan", "inf", "x")),
    (b"winner,loser,weight\na,b,\n", ", line 2: weight is missing"), (b"winner,loser\na\n", ", line 2: loser is missing"),
    (b"left,right,outcome\na,,left\n", ", line 2: right is missing"),
    (b"", ": is empty"), (b"\n \n", ": is empty"), (b"winner,loser\n", ": has no row under its columns"),
    (b"ranking,position,item\n1,1,a\n2,1,a\n", ": has only one item, 'a'"),
    (b"winner,loser\na,b\n\xff,b\n", ", line 3: not UTF-8"),
    (b"\xef\xbb\xbfwinner,loser\na,b\n\xff,b\n", ", line 3: not UTF-8"),  # the same behind a byte order mark
    (b'winner,loser\na,b\n"a,b\n', ", line 3: unexpected end of data"), (b'winner,loser\n"a"c,b\n', ", line 2: "),
    (b"ranking,position,item\n1,1,a\n1,1,b\n", ", line 3: ranking '1' has a position 1 already"),
    (b"ranking,position,item\n1,1,a\n1,2,a\n", ", line 3: ranking '1' has 'a' already"),
    (b"ranking,position,item\n1,first,a\n", ", line 2: position 'first', expected a whole number"),
    (b"winner,loser\na,b\n", ": these items never lost to any of the others: a;")])
def test_a_mistake_in_a_file_is_one_line_that_says_where(content, expected, refused):
    said = refused(content, "--data x.csv")
    assert said.startswith("error: x.csv") and expected in said


@pytest.mark.parametrize("flags, expected", [
    ("--home", "need --data"), ("--prior 1", "need --data"), ("--reference a", "need --data"),
    ("--data x.csv --resamples 10", "--resamples: needs --errors bootstrap"), ("--prior nan", "--prior nan: must be >= 0"),
    ("--seed -1", "--seed -1: must be >= 0"), ("--items 1", "--items 1: must be > 1"), ("--horizon 99", "must be >= 100"),
    ("--data x.csv --ties never", "invalid choice: 'never'"), ("--data y.csv", "y.csv: cannot be read"),
    ("--data x.csv --reference c", "--reference c: x.csv has no such item"),
    ("--data x.csv --home", "x.csv: "),  # the winner is the left side: always
    *((f"--data rankings.csv {flag}", "not for rankings") for flag in ("--home", "--ties davidson", "--errors sandwich")),
    ("--data x.csv --errors bootstrap", "of 1000 resamples have no maximum; use --prior")])
def test_flags_that_do_not_go_together_are_one_line(flags, expected, refused):
    assert expected in refused(b"winner,loser\na,b\nb,a\n", flags)


def test_what_a_spreadsheet_writes_is_read(tmp_path):
    """A byte order mark, CRLF, blank lines, spaces, quotes, other columns, in any order."""
    path = tmp_path / "x.csv"
    path.write_bytes('\ufeffnote,right, left,outcome\r\n\r\nx,"B, the 2nd", Ä ,tie\r\n,C,Ä,right\r\n \r\n'.encode())
    assert read_comparisons(str(path)) == Comparisons(["Ä", "B, the 2nd", "C"], [0, 0], [1, 2], ["tie", "right"], [1, 1])
    path.write_bytes(b"position,item,ranking\n2,a,x\n1,b,y\n1,b,x\n10,c,x\n")
    assert read_comparisons(str(path)) == Rankings(["a", "b", "c"], [[1, 0, 2], [1]])


def test_a_weight_is_a_repetition(tmp_path, monkeypatch):
    """The same tables, byte for byte."""
    monkeypatch.chdir(tmp_path)
    rows = [("a", "b", "left", 3), ("b", "a", "left", 1), ("b", "c", "tie", 4), ("c", "a", "right", 2), ("a", "c", "right", 1)]
    write_rows("once.csv", "left,right,outcome,weight", rows)
    write_rows("often.csv", "left,right,outcome", (row[:3] for row in rows for _ in range(row[3])))
    for name in ("once", "often"):
        bt.main(bt.Config(data=f"{name}.csv", ties="davidson", out=name))
    for table in ("leaderboard.csv", "probabilities.csv"):
        assert Path("once", table).read_bytes() == Path("often", table).read_bytes()
