"""common/interleaving.py: lists and scores against slow formulas of the papers, by enumeration;
what a random click says."""
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

import dueling
from common import interleaving
from common.interleaving import (
    METHODS, interleave, item_credit, one_click, random_click, score, softmax_choice)

LECTURE_A, LECTURE_B = [1, 2, 3, 4, 5, 6], [4, 1, 2, 3, 5, 6]
LECTURE_PLACES = [3, 0, 1, 2, 4, 5]  # B's items by their place in A
SMALL = [b for n in (1, 2, 3, 4) for b in itertools.permutations(range(n))]
SOME = [*SMALL, (4, 2, 0, 3, 1), (1, 2, 3, 4, 0), (2, 4, 1, 0, 3), (0, 3, 2, 1, 4)]


def near(found, expected, atol=1e-12):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def all_clicks(n):
    """Every set of clicked places, as a row of booleans (2^n, n)."""
    return np.array(list(itertools.product([False, True], repeat=n)))


def scores_of(method, shown, row):
    """The scores (2^n,) of all clicks on one of the lists."""
    clicks = all_clicks(shown.items.shape[1])
    repeated = interleaving.Shown(*(np.repeat(field[row:row + 1], len(clicks), 0)
                                    for field in shown))
    return score(method, clicks, repeated)


def distribution(shown):
    """Probability of every list, with teams where there are any; lists that are alike are added."""
    found = {}
    for p, items, team in zip(shown.probability, shown.items, shown.team):
        key = (*items.tolist(), *team.tolist())
        found[key] = found.get(key, 0) + p
    return found


# ---- the lists -----------------------------------------------------------------------------------

def balanced_by_the_paper(a, b, a_begins):
    """Joachims 2003: of every list's top, the ranking's first k_a and k_b items, with k_a = k_b or
    k_a = k_b + 1 (A begins). So take turns, and skip what is there."""
    shown, turns = [], []
    for pair in zip(a, b):
        turns += pair if a_begins else pair[::-1]
    for item in turns:
        if item not in shown:
            shown.append(item)
    return shown


@pytest.mark.parametrize("b", SOME, ids=str)
def test_balanced_lists_take_turns(b):
    a = list(range(len(b)))
    shown = interleave("balanced", a, b)
    near(shown.probability, [0.5, 0.5])
    assert shown.items.tolist() == [balanced_by_the_paper(a, b, True),
                                    balanced_by_the_paper(a, b, False)]


def drafts_by_the_paper(a, b, items=(), team=(), p=Fraction(1)):
    """Radlinski et al. 2008: the team with fewer players drafts its best; a coin, where equal."""
    if len(items) == len(a):
        return {(*items, *team): p}
    lead = sum(team)  # of A
    found = {}
    for captain, chance in ((1, lead < 0 or lead == 0), (-1, lead > 0 or lead == 0)):
        if chance:
            best = next(item for item in (a if captain == 1 else b) if item not in items)
            rest = drafts_by_the_paper(a, b, (*items, best), (*team, captain),
                                       p / 2 if lead == 0 else p)
            for key, value in rest.items():
                found[key] = found.get(key, 0) + value
    return found


@pytest.mark.parametrize("b", SOME, ids=str)
def test_team_draft_lists_are_all_that_the_coins_may_say(b):
    a = list(range(len(b)))
    expected = drafts_by_the_paper(a, b)
    found = distribution(interleave("team-draft", a, b))
    assert found.keys() == expected.keys()
    near([found[key] for key in expected], [float(p) for p in expected.values()])


def softmax_by_the_paper(ranking, left):
    """Hofmann et al. 2011, Equation 1, over the items that are left."""
    weight = {item: 1 / (ranking.index(item) + 1)**3 for item in left}
    return {item: value / sum(weight.values()) for item, value in weight.items()}


def draws_by_the_paper(a, b, items=(), team=(), p=1.0):
    """P(list and teams): a coin picks the ranking that draws the next item."""
    if len(items) == len(a):
        return {(items, team): p}
    left, found = [item for item in a if item not in items], {}
    for captain, ranking in ((1, a), (-1, b)):
        for item, chance in softmax_by_the_paper(ranking, left).items():
            found |= draws_by_the_paper(a, b, (*items, item), (*team, captain), p * chance / 2)
    return found


@pytest.mark.parametrize("b", SMALL, ids=str)
def test_probabilistic_lists_and_scores_are_sums_over_all_teams(b):
    a, b = list(range(len(b))), list(b)
    joint = draws_by_the_paper(a, b)
    shown = interleave("probabilistic", a, b)
    for row, items in enumerate(shown.items.tolist()):
        own = {team: p for (drawn, team), p in joint.items() if list(drawn) == items}
        near(shown.probability[row], sum(own.values()))
        expected = [sum(p * np.sign(np.dot(clicks, team)) for team, p in own.items())
                    / sum(own.values()) for clicks in all_clicks(len(a))]
        near(scores_of("probabilistic", shown, row), expected)


def test_a_softmax_by_hand():
    """Three items: 1, 1/8 and 1/27, in 216ths 216, 27 and 8; then the last is all that is left."""
    near(softmax_choice(np.array([[1, 2, 3], [3, 1, 2]])),
         [[216 / 251, 27 / 35, 1], [8 / 251, 216 / 243, 1]])


@pytest.mark.parametrize("b", SOME, ids=str)
def test_optimised_lists_are_unions_of_two_tops_and_fair_at_every_place(b):
    """A list is allowed if each of its tops is A[:i] and B[:j] together, for some i and j."""
    n = len(b)
    a = list(range(n))
    shown = interleave("optimised", a, b)
    unions = [set(a[:i]) | set(b[:j]) for i in range(n + 1) for j in range(n + 1)]
    allowed = {items for items in itertools.permutations(a)
               if all(set(items[:depth]) in unions for depth in range(n))}
    assert set(map(tuple, shown.items.tolist())) == allowed and len(shown.items) == len(allowed)
    credit = 1 / shown.rank_a - 1 / shown.rank_b
    near(shown.probability @ credit, np.zeros(n), 1e-11)
    near(shown.probability.sum(), 1)
    assert (shown.probability > 0).all()
    # the most even: log p is linear in the constraints (Lagrange)
    constraints = np.column_stack([np.ones(len(credit)), credit])
    log_p = np.log(shown.probability)
    near(constraints @ np.linalg.lstsq(constraints, log_p, rcond=1e-10)[0], log_p, 1e-8)


def test_optimised_probabilities_by_hand():
    """Four lists, by where YouTube stands: it counts -3/4, the items above +1/2, +1/6 and +1/12.
    On top: 1/2 (1 - p) = 3/4 p, p = 2/5. In each place below, what is left must balance, too."""
    shown = interleave("optimised", range(6), LECTURE_PLACES)
    found = {items.index(3): p for items, p in zip(shown.items.tolist(), shown.probability)}
    assert sorted(found) == [0, 1, 2, 3]
    near([found[place] for place in range(4)], [2 / 5, 18 / 55, 19 / 110, 1 / 10])


# ---- what clicks say -----------------------------------------------------------------------------

def balanced_by_reading_on(items, clicked, a, b):
    """Radlinski et al. 2008: read both rankings on, one more item each, until the lowest clicked
    item is in one of them; then count."""
    if not clicked:
        return 0
    lowest = max(clicked, key=items.index)
    k = 1
    while lowest not in a[:k] and lowest not in b[:k]:
        k += 1
    return np.sign(len(clicked & set(a[:k])) - len(clicked & set(b[:k])))


@pytest.mark.parametrize("b", SOME, ids=str)
def test_balanced_scores_count_down_to_the_lowest_click(b):
    a = list(range(len(b)))
    shown = interleave("balanced", a, b)
    for row, items in enumerate(shown.items.tolist()):
        expected = [balanced_by_reading_on(items, {items[i] for i in np.flatnonzero(clicks)}, a, b)
                    for clicks in all_clicks(len(b))]
        near(scores_of("balanced", shown, row), expected)


@pytest.mark.parametrize("b", SOME, ids=str)
def test_team_draft_and_optimised_scores_add_up(b):
    a = list(range(len(b)))
    for method in ("team-draft", "optimised"):
        shown = interleave(method, a, b)
        for row, (items, team) in enumerate(zip(shown.items.tolist(), shown.team.tolist())):
            expected = []
            for clicks in all_clicks(len(b)):
                places = np.flatnonzero(clicks)
                if method == "team-draft":
                    expected.append(np.sign(sum(team[i] for i in places)))
                else:
                    expected.append(sum(1 / (a.index(items[i]) + 1) - 1 / (b.index(items[i]) + 1)
                                        for i in places))
            near(scores_of(method, shown, row), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("b", SOME, ids=str)
def test_clicks_on_places_say_nothing_unless_balanced(b, method):
    """Whatever places are clicked, and however often each: what was clicked without looking at the
    items scores 0 in the mean. Balanced interleaving fails on two exchanged items of three."""
    shown = interleave(method, range(len(b)), b)
    mean = sum(p * scores_of(method, shown, row) for row, p in enumerate(shown.probability))
    if method != "balanced":
        near(mean, np.zeros(2**len(b)), 1e-10)
    elif b == (1, 2, 0):
        assert np.abs(mean).max() > 0.4


@pytest.mark.parametrize("method", METHODS)
def test_the_other_way_round_everything_has_the_other_sign(method):
    b = (2, 4, 1, 0, 3)
    back = np.argsort(b).tolist()  # the same two rankings with B's names
    there, here = item_credit(method, range(5), b), item_credit(method, range(5), back)
    near(there[list(b)], -here, 1e-10)
    first, second = random_click(method, range(5), b), random_click(method, b, range(5))
    near(first, (second[1], second[0], second[2]))


# ---- a click of somebody who does not look -------------------------------------------------------

HALF, THIRD, SIXTH, QUARTER = 1 / 2, 1 / 3, 1 / 6, 1 / 4


@pytest.mark.parametrize("method, a, b, expected", [
    ("balanced", LECTURE_A, LECTURE_B, (HALF, SIXTH, THIRD)),
    ("balanced", LECTURE_B, LECTURE_A, (SIXTH, HALF, THIRD)),
    ("balanced", "abcd", "bcda", (QUARTER, 3 / 4, 0)),
    ("team-draft", LECTURE_A, LECTURE_B, (HALF, HALF, 0)),
    ("team-draft", "abcd", "bcda", (HALF, HALF, 0)),
    ("team-draft", "abc", "cab", (HALF, HALF, 0)),
    ("probabilistic", LECTURE_A, LECTURE_B, (HALF, HALF, 0)),
    ("optimised", LECTURE_A, LECTURE_B, (HALF, SIXTH, THIRD)),
    ("balanced", "abc", "abc", (0, 0, 1)), ("team-draft", "abc", "abc", (HALF, HALF, 0)),
    ("probabilistic", "abc", "abc", (HALF, HALF, 0)), ("optimised", "abc", "abc", (0, 0, 1)),
    ("balanced", ["x"], ["x"], (0, 0, 1)), ("team-draft", ["x"], ["x"], (HALF, HALF, 0))])
def test_a_random_click_by_hand(method, a, b, expected):
    a_wins, b_wins, ties = random_click(method, a, b)
    near((a_wins, b_wins, ties), expected)
    assert dueling.random_click is random_click
    if method in ("balanced", "team-draft"):  # the mean score is twice Delta
        shown, scores = one_click(method, range(len(a)), [list(a).index(item) for item in b])
        near(shown.probability @ scores.mean(1), 2 * (a_wins + ties / 2 - 1 / 2))


def test_a_random_click_on_longer_lists():
    """Team-draft: by symmetry, as each coin may as well have fallen the other way. Balanced: the
    mean over both lists and all places."""
    b = [3, 9, 0, 7, 1, 8, 2, 6, 5, 4]
    near(random_click("team-draft", range(10), b), (HALF, HALF, 0))
    counts = {1: 0, -1: 0, 0: 0}
    for a_begins in (True, False):
        items = balanced_by_the_paper(list(range(10)), b, a_begins)
        for item in items:
            counts[int(balanced_by_reading_on(items, {item}, list(range(10)), b))] += 1
    near(random_click("balanced", range(10), b), [counts[who] / 20 for who in (1, -1, 0)])
    assert random_click("balanced", range(100), range(100)) == (0, 0, 1)


def test_team_draft_is_blind_to_two_items_of_the_lecture():
    """It shows two different lists only. A click on the first item is A's, one on YouTube is B's;
    all others are the same in the mean, although A has two of them higher than B."""
    shown = interleave("team-draft", range(6), LECTURE_PLACES)
    assert {tuple(items) for items in shown.items.tolist()} == {(0, 3, 1, 2, 4, 5),
                                                                 (3, 0, 1, 2, 4, 5)}
    near(item_credit("team-draft", range(6), LECTURE_PLACES), [1, 0, 0, -1, 0, 0])
    near(item_credit("balanced", range(6), LECTURE_PLACES), [1, 1, 1, -1, 0, 0])
    near(item_credit("optimised", range(6), LECTURE_PLACES),
         [1 / 2, 1 / 6, 1 / 12, -3 / 4, 0, 0])
    probabilistic = item_credit("probabilistic", range(6), LECTURE_PLACES)
    assert (probabilistic[:3] > 0.1).all() and probabilistic[3] < -0.5  # it sees both
    near(one_click("team-draft", range(6), LECTURE_PLACES)[0].probability, np.full(8, 1 / 8))


@pytest.mark.parametrize("method, a, b, expected", [
    ("interleaved", "ab", "ba", "method 'interleaved': must be one of balanced, team-draft"),
    (None, "ab", "ba", "method None"), ("balanced", "ab", "ac", "the same items"),
    ("balanced", "aab", "aab", "each of them once"), ("team-draft", "ab", "abc", "the same items"),
    ("team-draft", "aa", "ab", "each of them once"), ("balanced", [], [], "at least one"),
    ("balanced", "abb", "aab", "each of them once"),
    ("team-draft", range(31), range(31), "31 items, at most 30"),
    ("probabilistic", range(9), range(9), "9 items, at most 8")])
def test_bad_rankings_are_one_clear_error(method, a, b, expected):
    with pytest.raises(ValueError) as error:
        random_click(method, a, b)
    assert expected in str(error.value) and len(str(error.value).splitlines()) == 1


def test_the_numbers_of_lists():
    """2; 2^rounds; n!; and at most 2^(n - 1), for a ranking and its reverse."""
    b = [5, 4, 3, 2, 1, 0]
    assert [len(interleave(method, range(6), b).items) for method in METHODS] == [
        2, 2**3, math.factorial(6), 2**5]
