"""dueling.py: winners and bandits by hand, where every duel is sure; regret; arms without a
Condorcet winner; the command."""
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

import dueling
from common import ROOT
from common.comparisons import (
    CYCLE, DISAGREE, UPSET, borda, condorcet, copeland, copeland_scores, winners)
from common.interleaving import METHODS
from common.settings import parse

STRENGTHS = np.array([0, -1, -1.5, -2])
EASY = 1 / (1 + np.exp(STRENGTHS[None, :] - STRENGTHS[:, None]))  # arm 0 is the best
SURE = np.where(np.eye(3), 0.5, np.triu(np.ones((3, 3))))  # a lower number always wins
COST = np.array([[((EASY[0, i] - 0.5) + (EASY[0, j] - 0.5)) / 2 for j in range(4)]
                 for i in range(4)])


def near(found, expected, atol=1e-9):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def rng(seed=0):
    return np.random.default_rng(seed)


# ---- winners -------------------------------------------------------------------------------------

EVEN = np.full((3, 3), 0.5)
# 0: one victory and two even; 1: two victories and a defeat, which is as good for Copeland
TWO_COPELAND = np.array([[0.5, 0.6, 0.5, 0.5], [0.4, 0.5, 0.9, 0.9], [0.5, 0.1, 0.5, 0.5],
                         [0.5, 0.1, 0.5, 0.5]])


@pytest.mark.parametrize("P, by_condorcet, by_copeland, by_borda, text", [
    (CYCLE, None, [0, 1, 2], [0, 1, 2], "Condorcet none; Copeland A, B, C; Borda A, B, C"),
    (DISAGREE, 0, [0], [1], "Condorcet A; Copeland A; Borda B"),
    (EVEN, None, [0, 1, 2], [0, 1, 2], "Condorcet none; Copeland A, B, C; Borda A, B, C"),
    (TWO_COPELAND, None, [0, 1], [1], "Condorcet none; Copeland A, B; Borda B"),
    (UPSET, None, [0], [0], "Condorcet none; Copeland A; Borda A"),
    (EASY, 0, [0], [0], "Condorcet A; Copeland A; Borda A")])
def test_winners_by_hand(P, by_condorcet, by_copeland, by_borda, text):
    near(P + P.T, 1)
    assert (condorcet(P), copeland(P), borda(P)) == (by_condorcet, by_copeland, by_borda)
    assert winners(P, "ABCD") == text


# ---- regret --------------------------------------------------------------------------------------

@pytest.mark.parametrize("bandit", dueling.BANDITS.values())
def test_a_step_costs_what_some_pair_costs_and_a_seed_repeats_it(bandit):
    curves, again, other = (bandit(EASY, 400, 3, rng(seed)) for seed in (0, 0, 1))
    assert curves.shape == (3, 400)
    assert (curves == again).all() and (curves != other).any() and (curves[0] != curves[1]).any()
    steps = np.diff(curves, axis=1, prepend=0)
    assert (steps > -1e-12).all()
    assert (np.abs(steps[..., None] - COST.ravel()).min(-1) < 1e-9).all()


def test_gaps_by_hand():
    """To the Condorcet winner: what it wins by. Otherwise shares of the others that are defeated:
    in UPSET the winner 3 of 4, each of the cycle 2, and the one that beats the winner 1."""
    near(dueling.gaps(EASY), EASY[0] - 0.5)
    near(dueling.gaps(DISAGREE), [0, 0.01, 0.01, 0.01])
    assert copeland_scores(UPSET).tolist() == [2, 0, 0, 0, -2]
    near(dueling.gaps(UPSET), [0, 0.25, 0.25, 0.25, 0.5])
    near(dueling.gaps(CYCLE), [0, 0, 0])  # all three are winners
    gap = dueling.gaps(UPSET)
    assert dueling.regret_of(gap, 0, 0) == 0  # the best against itself
    near(dueling.regret_of(gap, np.array([0, 4]), np.array([1, 4])), [0.125, 0.5])


def test_the_regret_bound_by_hand():
    """P = 3/4: a meeting costs (1/4 + 0) / 2 and says 1/4 log 1/2 + 3/4 log 3/2 = 0.1308 nats. Of
    three arms, arm 2 may lose to arm 1 instead, which costs (1/4 + 1/4) / 2 and says all the more:
    0.1 log 0.2 + 0.9 log 1.8 = 0.3681 nats."""
    two = np.array([[0.5, 0.75], [0.25, 0.5]])
    assert dueling.regret_bound(two) == pytest.approx(0.125 / 0.13081204, rel=1e-7)
    three = np.array([[0.5, 0.75, 0.75], [0.25, 0.5, 0.9], [0.25, 0.1, 0.5]])
    expected = 0.125 / 0.13081204 + 0.25 / 0.36806420
    assert dueling.regret_bound(three) == pytest.approx(expected, rel=1e-7)


def test_the_arms_are_bradley_terry_items_the_best_first():
    """log odds of three arms add up, which is what a scalar strength means."""
    P = dueling.bradley_terry_arms(6, rng())
    odds = np.log(P / (1 - P))
    near(odds[0, 1] + odds[1, 5], odds[0, 5])
    near(P + P.T, 1)
    assert (np.diff(P[0]) > 0).all() and condorcet(P) == 0


# ---- bandits -------------------------------------------------------------------------------------

def test_uniform_pays_the_mean_over_all_pairs():
    found = dueling.uniform(EASY, 2000, 50, rng())[:, -1].mean() / 2000
    assert abs(found - COST.mean()) < 4 * COST.std() / math.sqrt(2000 * 50)


def test_the_interleaved_filter_by_hand_where_every_duel_is_sure():
    """A mean of 0 or 1 is sure when sqrt(4 log(T K^2) / n) < 1/2: n rounds. A duel costs 1/4 with
    the best arm, 1/2 without. Candidate 0 meets both for n rounds: n / 2. Candidate 1: 3 n / 4,
    then 0 is alone. Candidate 2: 3 n / 4, and 0 and 1: n."""
    n = math.floor(16 * math.log(2000 * 9)) + 1
    curves = dueling.interleaved_filter(SURE, 2000, 60, rng())
    assert set((curves[:, -1] / n).round(9)) == {0.5, 0.75, 1.0}
    first = curves[curves[:, -1] == n / 2][0]
    assert first[2 * n - 1] == n / 2 and first[2 * n - 2] < n / 2  # and nothing more


def test_the_interleaved_filter_meets_all_in_turn_and_ends_with_the_best():
    steps = np.diff(dueling.interleaved_filter(EASY, 20_000, 20, rng()), axis=1, prepend=0)
    costs, candidates = np.array([sorted(np.delete(COST[i], i)) for i in range(4)]), set()
    for run in steps:
        # nobody can be sure yet: each meets the candidate once a round, in the same order
        rounds = run[:300].reshape(100, 3)
        near(rounds, rounds[:1].repeat(100, 0))
        candidate = np.abs(costs - np.sort(rounds[0])).max(1).argmin()
        near(np.sort(rounds[0]), costs[candidate])
        candidates.add(int(candidate))
    assert candidates == {0, 1, 2, 3}  # any arm may be the first
    assert (np.abs(steps[:, -1000:]).max(1) < 1e-9).mean() >= 0.95


def test_rucb_by_hand_where_every_duel_is_sure():
    """Two arms: they meet while the loser's bound, sqrt(0.51 log t / n), is at least 1/2; otherwise
    0 meets itself."""
    n, expected = 0, []
    for t in range(1, 2001):
        n += n == 0 or math.sqrt(0.51 * math.log(t) / n) >= 0.5
        expected.append(n / 4)
    near(dueling.rucb(SURE[:2, :2], 2000, 5, rng()), [expected] * 5)


def test_rucb_grows_like_the_logarithm():
    T, bound = 10_000, dueling.regret_bound(EASY)
    mean = dueling.rucb(EASY, T, 20, rng()).mean(0)
    assert bound / 2 < (mean[-1] - mean[T // 10 - 1]) / math.log(10) < 4 * bound
    assert mean[-1] - mean[T // 2 - 1] < COST.mean() * T / 2 / 50


def double_thompson_by_the_paper(P, T, rng):
    """Wu and Liu 2016, Algorithm 1, with its loops, for one run; i and j are as there."""
    K, gap = len(P), dueling.gaps(P)
    B = np.zeros((K, K))  # how often i beat j
    regret = []
    for t in range(1, T + 1):
        u, l = np.full((K, K), 0.5), np.full((K, K), 0.5)
        for i in range(K):
            for j in range(K):
                n = B[i, j] + B[j, i]
                if i != j:
                    width = math.sqrt(0.51 * math.log(t) / n) if n else math.inf
                    u[i, j] = B[i, j] / n + width if n else 1
                    l[i, j] = B[i, j] / n - width if n else 0
        # phase 1: the first candidate
        upper_score = [sum(u[i, j] > 0.5 for j in range(K) if j != i) / (K - 1) for i in range(K)]
        theta = np.zeros((K, K))
        for i in range(K):
            for j in range(i + 1, K):
                theta[i, j] = rng.beta(B[i, j] + 1, B[j, i] + 1)
                theta[j, i] = 1 - theta[i, j]
        best = {}
        for i in range(K):
            tie = rng.random()
            if upper_score[i] == max(upper_score):
                best[i] = sum(theta[i, j] > 0.5 for j in range(K) if j != i) + tie
        first = max(best, key=best.get)
        # phase 2: the second candidate
        rivals = {}
        for i in range(K):
            drawn = rng.beta(B[i, first] + 1, B[first, i] + 1)
            if l[i, first] <= 0.5:
                rivals[i] = 0.5 if i == first else drawn
        second = max(rivals, key=rivals.get)
        # compare
        if rng.random() < P[first, second]:
            B[first, second] += 1
        else:
            B[second, first] += 1
        regret.append((gap[first] + gap[second]) / 2)
    return np.cumsum(regret)


@pytest.mark.parametrize("P", [UPSET, EASY, DISAGREE], ids=["upset", "easy", "disagree"])
def test_double_thompson_is_the_papers_algorithm(P):
    """The same random numbers in the same order give the same run."""
    for seed in range(3):
        near(dueling.double_thompson(P, 400, 1, rng(seed))[0],
             double_thompson_by_the_paper(P, 400, rng(seed)))


def test_the_first_step_of_double_thompson_by_hand():
    """Nothing is known, so the first arm is any of the four. The second has the largest of three
    uniform draws, or is the first again, if all are below 1/2: 1/8. Otherwise it is any other."""
    costs = dueling.double_thompson(EASY, 1, 20_000, rng())[:, 0]
    for i in range(4):
        for j in range(i, 4):
            p = 1 / 4 * 1 / 8 if i == j else 2 * 1 / 4 * 7 / 8 / 3
            found = (np.abs(costs - COST[i, j]) < 1e-9).mean()
            same = [(k, m) for k in range(4) for m in range(k, 4)
                    if abs(COST[k, m] - COST[i, j]) < 1e-9]
            assert same == [(i, j)]
            assert abs(found - p) < 4.5 * math.sqrt(p * (1 - p) / 20_000)


def test_double_thompson_grows_like_the_logarithm():
    T, bound = 10_000, dueling.regret_bound(EASY)
    mean = dueling.double_thompson(EASY, T, 20, rng()).mean(0)
    assert bound / 3 < (mean[-1] - mean[T // 10 - 1]) / math.log(10) < 3 * bound
    assert mean[-1] - mean[T // 2 - 1] < COST.mean() * T / 2 / 50


def test_without_a_condorcet_winner_only_double_thompson_finds_the_copeland_winner():
    """Each arm of UPSET is surely beaten by another, so in the end RUCB has no candidate, and takes
    any arm: it goes on paying most of what random pairs pay. In a bare cycle all are winners."""
    T, random_pair = 6000, dueling.gaps(UPSET).mean()
    second_half = [bandit(UPSET, T, 10, rng())[:, [T // 2, -1]] @ [-1, 1] / (T / 2)
                   for bandit in (dueling.rucb, dueling.double_thompson)]
    assert second_half[0].min() > 0.7 * random_pair
    assert second_half[1].mean() < 0.1 * random_pair and second_half[1].max() < 0.3 * random_pair
    assert dueling.double_thompson(CYCLE, 500, 5, rng()).max() == 0


# ---- the command ---------------------------------------------------------------------------------

def test_the_committed_rows_are_those_of_the_command():
    """Each bandit has random numbers of its own; the last 27,000 comparisons of RUCB and double
    Thompson sampling, which take most of the command's time, are left out."""
    committed = [json.loads(line)
                 for line in (ROOT / "results/dueling/results.jsonl").read_text().splitlines()]
    for found, row in zip(committed, dueling.clicks_on_the_lecture()):
        assert found["method"] == row["method"] and list(found["credit"]) == dueling.LECTURE
        near(list(found["credit"].values()), list(row["credit"].values()))
        near([found[name] for name in ("a_wins", "b_wins", "ties")],
             [row[name] for name in ("a_wins", "b_wins", "ties")])
    problems = {"Bradley-Terry": dueling.bradley_terry_arms(8, rng()), "no Condorcet winner": UPSET}

    def regret(problem, bandit):
        return [row["regret"] for row in committed if row.get("problem") == problem
                and row["bandit"] == bandit and "step" in row]

    for problem, P in problems.items():
        for number, (name, bandit) in enumerate(dueling.BANDITS.items()):
            if number < 2:
                curve = bandit(P, 30_000, 20, np.random.default_rng([0, number]))
                near(regret(problem, name), curve[:, [299, 2999, 29_999]].mean(0), 1e-6)
            else:
                curve = bandit(P, 300, 20, np.random.default_rng([0, number]))
                near(regret(problem, name)[0], curve[:, 299].mean(0), 1e-6)
    slopes = {row["bandit"]: row for row in committed if "slope" in row}
    assert list(slopes) == ["RUCB", "double Thompson"]
    for name, row in slopes.items():
        ends = regret("Bradley-Terry", name)
        near(row["bound"], dueling.regret_bound(problems["Bradley-Terry"]))
        near(row["slope"], (ends[2] - ends[1]) / math.log(10))


def test_the_command_writes_before_it_prints(tmp_path):
    """A reader who goes away after a line, as in `| head -1`, loses nothing."""
    argv = "--arms 3 --horizon 200 --runs 2".split()
    process = subprocess.Popen([sys.executable, "-u", ROOT / "dueling.py", *argv], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("rock beats scissors")
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.wait(timeout=60)
    folder = tmp_path / "runs/dueling-arms3-horizon200-runs2"
    lines = (folder / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["method"] for row in rows[:4]] == list(METHODS)
    assert [(row["problem"], row["bandit"], row["step"]) for row in rows[4:-2]] == [
        (problem, name, step) for problem in ("Bradley-Terry", "no Condorcet winner")
        for name in dueling.BANDITS for step in (2, 20, 200)]
    assert (folder / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("flags, expected", [
    ("--arms 1", "--arms 1: must be from 2 to 200"), ("--arms 201", "must be from 2 to 200"),
    ("--horizon 99", "--horizon 99: must be from 100 to 10^6"),
    ("--horizon 1000001", "must be from 100 to 10^6"),
    ("--runs 1", "--runs 1: must be from 2 to 100"), ("--runs 101", "must be from 2 to 100"),
    ("--arms 1000000000000", "must be below 10^9"), ("--seed -1", "--seed -1: must be >= 0"),
    ("--dataset imdb", "unrecognized arguments: --dataset imdb"),
    ("--out x/y", "x/y: cannot be written")])
def test_bad_flags_are_one_line_at_once(flags, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text("a file")
    monkeypatch.setattr(dueling, "rucb", None)  # nothing is run
    with pytest.raises(SystemExit) as stop:
        dueling.main(parse(dueling.Config, dueling.__doc__, flags.split()))
    assert expected in stop.value.code and len(stop.value.code.splitlines()) == 1
    assert os.listdir() == ["x"]
