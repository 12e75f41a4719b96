"""experiments/clicks.py: the users against enumeration, quality and measures by hand, no preference
where there is nothing to prefer, the command."""
import itertools
import json
import math
import os

import numpy as np
import pytest

from common import ROOT
from common.interleaving import METHODS, score
from common.settings import parse
from experiments import clicks

GRADES = np.array([4, 0, 2, 1, 3, 4])


def near(found, expected, atol=1e-9):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def rng(seed=0):
    return np.random.default_rng(seed)


def chance_of(pattern, grades, user):
    """P(these clicks): read on from the top, place by place."""
    p_click, p_leave, p_leave_anyway = clicks.USERS[user]
    reads, left = 1.0, 0.0  # P(the clicks so far, and reading on), P(the same, and gone)
    for clicked, grade in zip(pattern, grades):
        p = p_click[grade] if clicked else 1 - p_click[grade]
        leave = p_leave[grade] if clicked else p_leave_anyway
        left = (0.0 if clicked else left) + reads * p * leave
        reads *= p * (1 - leave)
    return reads + left


PATTERNS = np.array(list(itertools.product([False, True], repeat=6)))


@pytest.mark.parametrize("user", clicks.USERS)
def test_users_click_as_by_enumeration(user):
    M = 200_000
    exact = np.array([chance_of(pattern, GRADES, user) for pattern in PATTERNS])
    near(exact.sum(), 1)
    found = clicks.click(np.tile(GRADES, (M, 1)), user, rng())
    counts = np.bincount(found @ (2**np.arange(6)[::-1]), minlength=64) / M
    assert (np.abs(counts - exact) <= 5 * np.sqrt(exact * (1 - exact) / M) + 1e-12).all()


def test_only_who_leaves_for_a_click_makes_clicks_depend_on_it():
    """A navigational user who found grade 4 on top leaves with 0.9. One who leaves anyway reads
    place k with 0.7^(k - 1). One who never leaves clicks equally often in every order."""
    def click_rates(user, grades):
        chances = [chance_of(pattern, grades, user) for pattern in PATTERNS]
        return np.array(chances) @ PATTERNS

    near(click_rates("navigational", GRADES)[1], (1 - 0.95 * 0.9) * 0.05)
    p_click = np.array(clicks.LOOKS_FOR_ONE)[GRADES]
    near(click_rates("leaves anyway", GRADES), p_click * 0.7**np.arange(6))
    near(click_rates("never leaves", GRADES), p_click)
    near(click_rates("random", GRADES), click_rates("random", GRADES[::-1]))


# ---- rankers -------------------------------------------------------------------------------------

def test_ndcg_by_hand():
    """Gains 15, 0, 3, 1, 7, 15 with discounts 1 / log2(place + 1)."""
    discount = [1 / math.log2(place + 1) for place in range(1, 7)]
    gains = [15, 0, 3, 1, 7, 15]
    best = sum(gain * d for gain, d in zip(sorted(gains, reverse=True), discount))
    as_it_is = sum(gain * d for gain, d in zip(gains, discount))
    order = np.array([[0, 1, 2, 3, 4, 5], [0, 5, 4, 2, 3, 1]])
    near(clicks.ndcg(np.tile(GRADES, (2, 1)), order), [as_it_is / best, 1])
    near(clicks.ndcg(np.zeros((1, 6), int), order[:1]), [1])


def test_rankers_are_permutations_the_best_first():
    grades, orders, quality = clicks.make_rankers(300, rng())
    assert grades.min() == 0 and grades.max() == 4
    assert (np.sort(orders, 2) == np.arange(6)).all()
    near(quality, [clicks.ndcg(grades, order).mean() for order in orders])
    assert (np.diff(quality) < 0).all() and quality[0] > 0.95 and quality[-1] < 0.85


# ---- impressions ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def world():
    grades, orders, _ = clicks.make_rankers(7, rng(3))
    return grades, orders


@pytest.mark.parametrize("method", METHODS)
def test_lists_are_of_the_queries_own_results(world, method):
    """Each list belongs to one query: its grades are those of the results, place by place, which
    the ranks in both rankings tell; all queries are alike."""
    grades, (a, b, *_) = world
    shown, shown_grades = clicks.all_lists(method, a, b, grades)
    start = 0
    for query in range(7):
        place_in_a = {result: place for place, result in enumerate(a[query].tolist())}
        length = len(clicks.lists_of(method, tuple(place_in_a[r] for r in b[query].tolist())).items)
        own = slice(start, start + length)
        near(shown.probability[own].sum(), 1 / 7)
        near(shown_grades[own], grades[query][a[query]][shown.rank_a[own] - 1])
        near(shown_grades[own], grades[query][b[query]][shown.rank_b[own] - 1])
        start += length
    assert start == len(shown.probability)


@pytest.mark.parametrize("method", METHODS)
def test_the_mean_score_is_the_sum_over_all_lists_and_clicks(world, method):
    grades, (a, *_, b) = world
    lists = clicks.all_lists(method, a[:2], b[:2], grades[:2])
    shown, shown_grades = lists
    mean = square = 0.0
    for pattern in PATTERNS:
        scores = score(method, np.tile(pattern, (len(shown.items), 1)), shown)
        p = shown.probability * [chance_of(pattern, own, "navigational") for own in shown_grades]
        mean, square = mean + p @ scores, square + p @ scores**2
    found = clicks.interleaved(method, lists, "navigational", 60_000, rng())
    assert abs(found.mean() - mean) < 4.5 * math.sqrt((square - mean**2) / 60_000)
    assert abs(found.std() - math.sqrt(square - mean**2)) < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_a_ranker_against_itself_or_random_clicks_say_nothing(world, method):
    """But for balanced interleaving, which prefers somebody if clicks are random."""
    grades, (a, *_, b) = world
    itself = clicks.interleaved(method, clicks.all_lists(method, a, a, grades), "navigational",
                                20_000, rng())
    assert abs(itself.mean()) <= 4.5 * itself.std() / math.sqrt(20_000)
    lists = clicks.all_lists(method, a, b, grades)
    found = clicks.interleaved(method, lists, "random", 100_000, rng())
    z = found.mean() / found.std() * math.sqrt(100_000)
    assert (abs(z) > 10) if method == "balanced" else (abs(z) < 4.5)


def test_absolute_measures_by_hand(world, monkeypatch):
    """A user who clicks on grade 4, always and only, and stays: count, first place, top."""
    monkeypatch.setitem(clicks.USERS, "sure", ([0, 0, 0, 0, 1], [0] * 5, 0))
    order = np.array([[1, 0, 2, 3, 4, 5], [1, 2, 3, 4, 0, 5], [0, 1, 2, 3, 4, 5]])
    grades = np.stack([GRADES, GRADES, np.array([1, 1, 1, 1, 1, 1])])
    found = clicks.absolute(order, grades, "sure", 3000, rng())
    triples = set(zip(*(found[name] for name in clicks.ABSOLUTE)))
    assert triples == {(2, 1 / 2, 0), (2, 1 / 5, 0), (0, 0, 0)}
    top = clicks.absolute(np.arange(6)[None], GRADES[None], "sure", 10, rng())
    assert set(zip(*(top[name] for name in clicks.ABSOLUTE))) == {(2, 1, 1)}


def test_shares_and_impressions_needed_by_hand(monkeypatch):
    near(clicks.share_right(np.array([1, 0.1, -0.1, 0])), 5 / 8)
    near(clicks.cut(np.arange(7.0), 3), [1, 4])
    monkeypatch.setattr(clicks, "SIZES", (10, 100, 1000))
    near(clicks.impressions_needed([0.6, 0.8, 1.0]), 10**2.5)
    near(clicks.impressions_needed([0.6, 0.9, 1.0]), 100)
    near(clicks.impressions_needed([0.95, 0.99, 1.0]), 10)
    assert clicks.impressions_needed([0.5, 0.6, 0.7]) is None
    near(clicks.geometric([1, 100]), 10)


# ---- the command ---------------------------------------------------------------------------------

def test_the_committed_rows_are_those_of_the_command():
    """The rankers of every seed, and the first pair of the first: the random numbers of a pair come
    in the order of methods and users."""
    text = (ROOT / "results/dueling/clicks/results.jsonl").read_text()
    committed = [json.loads(line) for line in text.splitlines()]
    quality = {row["seed"]: row["quality"] for row in committed if "quality" in row}
    assert list(quality) == list(range(10))
    for seed, found in quality.items():
        near(found, clicks.make_rankers(100, rng(seed))[2])
    numbers = rng()
    grades, orders, _ = clicks.make_rankers(100, numbers)
    for method in ("balanced", "team-draft"):
        lists = clicks.all_lists(method, orders[0], orders[1], grades)
        for user in clicks.USERS:
            scores = clicks.interleaved(method, lists, user, 50_000, numbers)
            if (method, user) == ("team-draft", "navigational"):
                preference = next(row["preference"] for row in committed if "preference" in row)
                near(preference[0][1], 0.5 + scores.mean() / 2)
                return


def test_the_command_at_a_small_size(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clicks, "SIZES", (10, 30, 100))
    flags = "--queries 3 --impressions 200 --horizon 100 --seeds 2".split()
    clicks.main(parse(clicks.Config, clicks.__doc__, flags))
    shown = capsys.readouterr().out
    folder = tmp_path / "runs/clicks-queries3-impressions200-horizon100-seeds2"
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for user in clicks.USERS:
        for method in (*METHODS, *clicks.ABSOLUTE):
            own = [row for row in rows if row.get("user") == user and row["method"] == method]
            assert [row["seed"] for row in own] == [0, 1]
            assert all(0 <= row[f"right_{n}"] <= 1 for row in own for n in (10, 30, 100))
            assert method in shown
    preference = np.array(next(row["preference"] for row in rows if "preference" in row))
    near(preference + preference.T, 1)
    assert (folder / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("flags, expected", [
    ("--queries 0", "--queries 0: must be > 0"), ("--queries 1001", "must be at most 1000"),
    ("--impressions 19999", "--impressions 19999: must be from 20000 to 10^6"),
    ("--horizon 99", "must be from 100 to 10^6"),
    ("--seeds 1", "--seeds 1: must be from 2 to 1000"),
    ("--seed -1", "--seed -1: must be >= 0"), ("--out x/y", "x/y: cannot be written")])
def test_bad_flags_are_one_line_at_once(flags, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text("a file")
    monkeypatch.setattr(clicks, "compare", None)  # nothing is run
    with pytest.raises(SystemExit) as stop:
        clicks.main(parse(clicks.Config, clicks.__doc__, flags.split()))
    assert expected in stop.value.code and len(stop.value.code.splitlines()) == 1
    assert os.listdir() == ["x"]
