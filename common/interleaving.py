"""Interleaving: one comparison of two rankings A and B, from clicks on a list made of both.

    balanced        read both rankings from the top in turn (Joachims 2003)
                    score = sign(clicks on A[:k] - clicks on B[:k]),  k: how far the nearer of the
                    two has to be read to reach the lowest clicked item
    team-draft      two captains draft from their rankings; in each round a coin says who begins
                    (Radlinski, Kurup and Joachims 2008)
                    score = sign(clicks on A's team - clicks on B's team)
    probabilistic   a coin picks a ranking, which draws one of the items left, P ~ 1 / rank^3
                    (Hofmann, Whiteson and de Rijke 2011)
                    score = E sign(clicks on A's team - clicks on B's team), over all teams that may
                    have made this list
    optimised       lists whose next item is always the first of A or of B that is left, drawn so
                    that a random click scores 0 at every place (Radlinski and Craswell 2013)
                    score = sum over clicks of 1 / rank in A - 1 / rank in B

A score above 0 speaks for A. Over many impressions the mean score of balanced and team-draft is
twice Delta = (A's wins + ties / 2) / impressions - 1/2 of Chapelle et al. 2012.

Rankings are complete: both have the same n items, and all are shown. Every list that may be shown
is written out, with its probability: nothing here is random.

Differs from Radlinski and Craswell: of all fair probabilities they take those that are the most
sensitive for a model of the users, we the most even ones (largest entropy). NumPy only.
"""
from __future__ import annotations

import itertools
import math
from typing import NamedTuple, Sequence

import numpy as np

from common.statistics import newton

METHODS = ("balanced", "team-draft", "probabilistic", "optimised")
# there are at most 2 lists, 2^(n / 2), n! and 2^(n - 1)
MOST_ITEMS = {"balanced": 1000, "team-draft": 30, "probabilistic": 8, "optimised": 16}


class Shown(NamedTuple):
    """The L lists that users may see, each with its n items from the top."""
    probability: np.ndarray  # (L,)
    items: np.ndarray  # (L, n)
    rank_a: np.ndarray  # (L, n) of the item in A, from 1
    rank_b: np.ndarray  # (L, n)
    team: np.ndarray  # (L, n) who drafted the item: 1 is A, -1 is B, 0 where there are no teams


def interleave(method: str, a: Sequence[int], b: Sequence[int]) -> Shown:
    """The lists that a method may show for two rankings of the items 0 .. n - 1, the best first."""
    a, b = list(a), list(b)
    teams = None
    if method == "balanced":
        lists = balanced_lists(a, b)
    elif method == "team-draft":
        lists, teams = team_draft_lists(a, b)
    elif method == "probabilistic":
        lists = list(itertools.permutations(a))
    elif method == "optimised":
        lists = allowed_lists(a, b)
    items = np.array(lists)  # (L, n)
    rank_a, rank_b = np.argsort(a)[items] + 1, np.argsort(b)[items] + 1

    probability = np.full(len(lists), 1 / len(lists))
    if method == "probabilistic":
        probability = ((softmax_choice(rank_a) + softmax_choice(rank_b)) / 2).prod(1)
    elif method == "optimised":
        probability = fair_probabilities(1 / rank_a - 1 / rank_b)
    team = np.zeros_like(items) if teams is None else np.array(teams)
    return Shown(probability, items, rank_a, rank_b, team)


# ---- the lists -----------------------------------------------------------------------------------

def balanced_lists(a: list[int], b: list[int]) -> list[list[int]]:
    """Two lists, because a coin says which ranking is read first (Joachims 2003)."""
    lists = []
    for a_begins in (True, False):
        shown, read_a, read_b = [], 0, 0  # how far each ranking has been read
        while len(shown) < len(a):
            if read_a < read_b or (read_a == read_b and a_begins):
                item = a[read_a]
                read_a += 1
            else:
                item = b[read_b]
                read_b += 1
            if item not in shown:
                shown.append(item)
        lists.append(shown)
    return lists


def team_draft_lists(a: list[int], b: list[int]) -> tuple[list[list[int]], list[list[int]]]:
    """A list for all that the coins may say, and its teams (Radlinski et al. 2008, Algorithm 2)."""
    drafts = [([], [])]  # the items drafted so far, and the team of each
    for _ in range(0, len(a), 2):  # a round: each captain drafts once, in an order set by a coin
        longer = []
        for items, team in drafts:
            for order in ((1, -1), (-1, 1)):
                new_items, new_team = list(items), list(team)
                for captain in order:
                    ranking = a if captain == 1 else b
                    left = [item for item in ranking if item not in new_items]
                    if left:
                        new_items.append(left[0])
                        new_team.append(captain)
                longer.append((new_items, new_team))
        drafts = longer
    return [items for items, _ in drafts], [team for _, team in drafts]


def allowed_lists(a: list[int], b: list[int]) -> list[list[int]]:
    """Lists whose next item is always the first of A or of B that is left."""
    lists = [[]]
    for _ in a:
        longer = []
        for shown in lists:
            next_a = next(item for item in a if item not in shown)
            next_b = next(item for item in b if item not in shown)
            longer.append([*shown, next_a])
            if next_b != next_a:
                longer.append([*shown, next_b])
        lists = longer
    return lists


def softmax_choice(rank: np.ndarray) -> np.ndarray:
    """How likely a ranking draws each item of a list, once those above it are gone.

    Args:
        rank: (L, n) of the items in this ranking; P ~ rank^-3 (Hofmann et al. 2011, tau = 3).
    """
    weight = rank**-3.0
    left = weight[:, ::-1].cumsum(1)[:, ::-1]  # (L, n) of the item and of all below it
    return weight / left


def fair_probabilities(credit: np.ndarray) -> np.ndarray:
    """Probabilities (L,) of lists by which the expected credit is 0 at every place; of all these
    the most even ones.

    They have the form p ~ exp(credit @ x). The expected credit is the gradient of log sum exp
    (credit @ x), so x is the minimum.

    Args:
        credit: (L, n) of the item at each place of each list.
    """
    if not credit.any():  # the rankings are the same, so there is one list
        return np.full(len(credit), 1 / len(credit))
    basis, size, _ = np.linalg.svd(credit, full_matrices=False)
    basis = basis[:, size > 1e-9]  # (L, <= n - 1): a list's credits sum to 0

    def log_sum_exp(x: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        weight = np.exp(basis @ x)
        p = weight / weight.sum()
        mean = p @ basis
        return math.log(weight.sum()), mean, (basis.T * p) @ basis - np.outer(mean, mean)

    x = newton(log_sum_exp, np.zeros(basis.shape[1]), 1e-12)[0]
    weight = np.exp(basis @ x)
    return weight / weight.sum()


# ---- what clicks say -----------------------------------------------------------------------------

def score(method: str, clicks: np.ndarray, shown: Shown) -> np.ndarray:
    """What clicks (L, n; bool) on lists say (L,): above 0 for A, below 0 for B."""
    if method == "balanced":
        return balanced_score(clicks, shown.rank_a, shown.rank_b)
    if method == "team-draft":
        return np.sign((clicks * shown.team).sum(1))
    if method == "probabilistic":
        return probabilistic_score(clicks, shown.rank_a, shown.rank_b)
    return (clicks * (1 / shown.rank_a - 1 / shown.rank_b)).sum(1)  # optimised


def balanced_score(clicks: np.ndarray, rank_a: np.ndarray, rank_b: np.ndarray) -> np.ndarray:
    """Which ranking has more of the clicks in its first k; all arguments are (L, n)."""
    L, n = clicks.shape
    lowest = n - 1 - clicks[:, ::-1].argmax(1)  # (L,) place of the lowest click
    k = np.minimum(rank_a, rank_b)[np.arange(L), lowest][:, None]
    return np.sign((clicks & (rank_a <= k)).sum(1) - (clicks & (rank_b <= k)).sum(1))


def probabilistic_score(clicks: np.ndarray, rank_a: np.ndarray, rank_b: np.ndarray) -> np.ndarray:
    """The expected sign over all teams; all arguments are (L, n).

    For a given list the team of one item tells nothing about that of another. So A's lead is a
    random walk, with a step for every click.
    """
    L, n = clicks.shape
    choice_a, choice_b = softmax_choice(rank_a), softmax_choice(rank_b)
    up = choice_a / (choice_a + choice_b)  # (L, n) P(A drafted the item)
    lead = np.zeros((L, 2 * n + 1))  # P(lead = -n .. n)
    lead[:, n] = 1
    for place in range(n):
        p = up[:, place, None]
        moved = p * np.roll(lead, 1, 1) + (1 - p) * np.roll(lead, -1, 1)
        lead = np.where(clicks[:, place, None], moved, lead)
    return lead[:, n + 1:].sum(1) - lead[:, :n].sum(1)


# ---- somebody who clicks without looking ---------------------------------------------------------

def one_click(method: str, a: Sequence[int], b: Sequence[int]) -> tuple[Shown, np.ndarray]:
    """The lists, and the score (L, n) of a single click at each place of them."""
    shown = interleave(method, a, b)
    L, n = shown.items.shape
    scores = np.zeros((L, n))
    for place in range(n):
        clicks = np.zeros((L, n), dtype=bool)
        clicks[:, place] = True
        scores[:, place] = score(method, clicks, shown)
    return shown, scores


def item_credit(method: str, a: Sequence[int], b: Sequence[int]) -> np.ndarray:
    """The expected score (n,) of a single click on each of the items 0 .. n - 1."""
    shown, scores = one_click(method, a, b)
    weighted = shown.probability[:, None] * scores
    return np.bincount(shown.items.ravel(), weighted.ravel())


def random_click(method: str, a: Sequence, b: Sequence) -> tuple[float, float, float]:
    """Probabilities (A wins, B wins, tie) of one click, at any place alike.

    Such a click knows nothing, so the first two should be equal. (Optimised interleaving is fair in
    another way: the mean score is 0.)

    Args:
        a, b: two rankings of the same items, the best first.
    Raises ValueError for an unknown method, other items, an item twice, none, or too many.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: must be one of {', '.join(METHODS)}")
    a, b = list(a), list(b)
    once = all(a.count(item) == 1 == b.count(item) for item in a)
    if not a or len(a) != len(b) or not once:
        raise ValueError("two rankings need the same items, at least one, and each of them once")
    if len(a) > MOST_ITEMS[method]:
        raise ValueError(f"{method}: {len(a)} items, at most {MOST_ITEMS[method]}")
    shown, scores = one_click(method, range(len(a)), [a.index(item) for item in b])
    if method == "probabilistic":  # the score is P(A's team) - P(B's team)
        a_wins, b_wins = (1 + scores) / 2, (1 - scores) / 2
    else:
        a_wins, b_wins = scores > 1e-12, scores < -1e-12
    a_wins, b_wins = (float(shown.probability @ wins.mean(1)) for wins in (a_wins, b_wins))
    return a_wins, b_wins, max(0.0, 1 - a_wins - b_wins)
