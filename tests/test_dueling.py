"""dueling.py: winners and bandits by hand, where every duel is sure; regret; the command."""
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

import dueling
from common import ROOT
from common.comparisons import CYCLE, DISAGREE, borda, condorcet, copeland, winners
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
    assert dueling.regret_of(EASY, 0, 0) == 0  # the best against itself


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


# ---- the command ---------------------------------------------------------------------------------

def test_the_committed_rows_are_those_of_the_command():
    """Each bandit has random numbers of its own; RUCB's last 27,000 comparisons, which take half of
    the command's time, are left out."""
    committed = [json.loads(line)
                 for line in (ROOT / "results/dueling/results.jsonl").read_text().splitlines()]
    P = dueling.bradley_terry_arms(8, rng())
    curve = dueling.rucb(P, 3000, 20, np.random.default_rng([0, 2]))
    assert [row["bandit"] for row in committed[6:8]] == ["RUCB", "RUCB"]
    near([row["regret"] for row in committed[6:8]], curve[:, [299, 2999]].mean(0), 1e-6)
    filtered = dueling.interleaved_filter(P, 30_000, 20, np.random.default_rng([0, 1]))
    near([row["regret"] for row in committed[3:6]], filtered[:, [299, 2999, 29_999]].mean(0), 1e-6)
    near(committed[9]["bound"], dueling.regret_bound(P))
    near(committed[9]["slope"], (committed[8]["regret"] - committed[7]["regret"]) / math.log(10))


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
    assert [(row["bandit"], row["step"]) for row in rows[:-1]] == [
        (name, step) for name in ("uniform", "interleaved filter", "RUCB") for step in (2, 20, 200)]
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
