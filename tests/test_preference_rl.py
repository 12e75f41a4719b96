"""preference_rl.py: the model against bt.py and finite differences, what a question is worth by
enumeration, the pendulum and its planner against algebra, and both experiments in small.
"""
import json
import math
import subprocess
import sys

import numpy as np
import pytest

import bt
import clone
import preference_rl as prl
from common import pendulum
from common.settings import parse


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def grid():
    return prl.Grid()


def anywhere(rng, *shape):
    """States (*shape, 2) drawn from the whole space."""
    return rng.uniform([-np.pi, -8], [np.pi, 8], (*shape, 2))


# ---- the model -----------------------------------------------------------------------------------

def test_preferences_over_segments_are_the_papers_formula(rng):
    """exp(sum of rewards) over the sum of both, step by step, and the person answers with just this
    frequency."""
    segments = prl.episodes(prl.Grid(3), None, 2, 1.0, rng)[:, :15]
    w = rng.normal(size=108)
    total = [sum(prl.bumps(state) @ w for state in segment) for segment in segments]
    by_formula = math.exp(total[0]) / (math.exp(total[0]) + math.exp(total[1]))
    question = prl.bumps(segments[0]).sum(0) - prl.bumps(segments[1]).sum(0)
    assert prl.sigmoid(question @ w) == pytest.approx(by_formula, abs=1e-12)
    answers = prl.ask(np.tile(question, (20_000, 1)), w, rng)
    assert set(answers) == {0.0, 1.0} and answers.mean() == pytest.approx(by_formula, abs=0.015)


def test_segments_of_one_step_with_a_feature_for_each_item_are_bradley_terry(rng):
    wins = bt.simulate(np.array([1.0, 0.3, -0.2, -1.1]), 200, rng)
    pairs = [(i, j) for i in range(4) for j in range(4) for _ in range(int(wins[i, j]))]
    questions = np.array([np.eye(4)[i] - np.eye(4)[j] for i, j in pairs])
    mode, covariance = prl.fit_reward(questions, np.ones(len(pairs)), 2.0)
    items = bt.fit(wins, prior=2.0)
    assert np.allclose(mode, items.strengths, atol=1e-8)
    centre = np.eye(4) - 0.25
    assert np.allclose(centre @ covariance @ centre, items.covariance, atol=1e-8)
    # the same answers with the sides exchanged, from another start
    other, _ = prl.fit_reward(-questions[::-1], np.zeros(len(pairs)), 2.0, rng.normal(size=4))
    assert np.allclose(other, mode, atol=1e-8)


def test_mode_and_covariance_against_finite_differences(rng):
    questions, answers = rng.normal(size=(30, 3)), rng.choice([0, 0.5, 1], 30)

    def loss(w):
        total = sum(x * x for x in w) / (2 * 1.5**2)
        for question, answer in zip(questions, answers):
            p = 1 / (1 + math.exp(-sum(a * b for a, b in zip(question, w))))
            total -= answer * math.log(p) + (1 - answer) * math.log(1 - p)
        return total

    w, covariance = prl.fit_reward(questions, answers, 1.5)
    e = np.eye(3) * 1e-4
    assert all(abs(loss(w + a) - loss(w - a)) / 2e-4 < 1e-6 for a in e)
    H = [[(loss(w + a + b) - loss(w + a - b) - loss(w - a + b) + loss(w - a - b)) / 4e-8
          for a in e] for b in e]
    assert np.allclose(np.linalg.inv(H), covariance, rtol=1e-4)


def test_without_answers_the_prior_is_all_we_know():
    mode, covariance = prl.fit_reward(np.zeros((0, 5)), np.zeros(0), 3.0)
    assert not mode.any() and np.allclose(covariance, 9 * np.eye(5))


def test_a_constant_added_to_every_step_can_neither_be_learned_nor_matter(rng, grid):
    """Segments have one length: the features of both sum to it. And the policy of a r + b, a > 0,
    is that of r."""
    Phi = prl.bumps(anywhere(rng, 50, 20)).sum(1)
    assert np.allclose(Phi.sum(1), 20)
    assert np.allclose((Phi[:25] - Phi[25:]) @ np.full(108, 3.7), 0, atol=1e-12)
    r, states = prl.true_reward(grid.states), anywhere(rng, 300)
    plain, scaled, shifted = (grid.act(grid.plan(a * r + b), states)
                              for a, b in ((1, 0), (0.05, 0), (1, 2)))
    assert np.array_equal(plain, scaled)
    assert (plain == shifted).mean() > 0.98  # ties within the tolerance


# ---- what a question is worth --------------------------------------------------------------------

def test_information_is_the_mutual_information_by_enumeration(rng):
    p = rng.random((7, 3))  # 7 equally likely weights, 3 questions
    for q in range(3):
        expected = 0.0
        for i in range(7):
            for answer in (p[i, q], 1 - p[i, q]):
                marginal = p[:, q].mean() if answer == p[i, q] else 1 - p[:, q].mean()
                expected += answer / 7 * math.log(answer / marginal)
        assert prl.information(p)[q] == pytest.approx(expected, abs=1e-12)


def test_a_question_about_two_alike_removes_half_and_tells_nothing():
    """The flaw of volume removal: p = 1/2 whatever w is. A question that splits the weights in two
    certain halves: ln 2."""
    alike, telling = np.full((4, 1), 0.5), np.array([[0.0], [0.0], [1.0], [1.0]])
    assert prl.volume(alike)[0] == prl.volume(telling)[0] == 0.5
    assert prl.information(alike)[0] == pytest.approx(0, abs=1e-12)
    assert prl.information(telling)[0] == pytest.approx(math.log(2), abs=1e-12)
    known = np.full((4, 1), 0.9)  # all weights agree: only the person's noise is left
    assert prl.information(known)[0] == pytest.approx(0, abs=1e-12)
    assert prl.volume(known)[0] == pytest.approx(0.1)


def test_the_question_that_is_chosen_is_about_what_is_not_known(rng):
    """Certain of the first weight, not of the second: ask about the second. By chance: the first of
    the pool."""
    pool, w = np.array([[1.0, 0], [0, 0], [0, 1.0], [3.0, 0]]), np.array([1.0, 0])
    covariance = np.diag([1e-6, 4.0])
    assert prl.choose(prl.information, pool, w, covariance, rng) == 2
    assert prl.choose(prl.WORTH["random"], pool, w, covariance, rng) == 0


# ---- the pendulum --------------------------------------------------------------------------------

def test_the_pendulum_falls_from_the_top_and_swings_at_the_bottom(rng):
    """And knows no left or right."""
    assert np.array_equal(pendulum.move(np.zeros(2), 0.0), np.zeros(2))  # exactly on top it stays
    state = np.array([0.01, 0.0])
    for _ in range(20):
        state = pendulum.move(state, np.float64(0))
    assert abs(state[0]) > 0.5
    states, torque = rng.uniform([-3, -7], [3, 7], (100, 2)), rng.choice(pendulum.TORQUES, 100)
    assert np.allclose(pendulum.move(-states, -torque), -pendulum.move(states, torque), atol=1e-12)
    ends = pendulum.move(anywhere(rng, 1000), np.float64(3))
    assert (np.abs(ends[:, 0]) <= np.pi).all() and (np.abs(ends[:, 1]) <= pendulum.SPEED).all()
    hanging = np.array([[np.pi, 0.0]])
    for _ in range(prl.STEPS):  # the motor alone, always one way, does not lift it
        hanging = pendulum.move(hanging, np.full(1, 3.0))
        assert abs(hanging[0, 0]) > np.pi / 3


def test_corners_are_a_distribution_with_the_state_as_its_mean(rng, grid):
    states = anywhere(rng, 500)
    corner, weight = grid.corners(states)
    assert np.allclose(weight.sum(1), 1) and (weight >= 0).all()
    speed = (grid.states[corner, 1] * weight).sum(1)
    assert np.allclose(speed, states[:, 1])
    angle = (np.exp(1j * grid.states[corner, 0]) * weight).sum(1)  # the angle goes round
    assert (np.abs(np.angle(angle / np.exp(1j * states[:, 0]))) < 1e-3).all()
    corner, weight = grid.corners(grid.states)
    own = corner[np.arange(len(corner)), weight.argmax(1)]
    assert np.array_equal(own, np.arange(len(grid.states))) and np.allclose(weight.max(1), 1)


def test_the_plan_is_the_optimal_policy():
    """Policy iteration with exact linear algebra, begun at the plan, ends at values that are as
    near to it as the stopping rule promises."""
    small, gamma = prl.Grid(11), 0.97
    r = prl.true_reward(small.states)
    planned = V = small.plan(r)
    n = len(r)
    rows = np.arange(n)
    for _ in range(50):
        greedy = (V[small.next] * small.weight).sum(-1).argmax(1)
        P = np.zeros((n, n))
        np.add.at(P, (rows[:, None], small.next[rows, greedy]), small.weight[rows, greedy])
        exact = np.linalg.solve(np.eye(n) - gamma * P, r)
        if np.allclose(exact, V, atol=1e-9):
            break
        V = exact
    else:
        pytest.fail("policy iteration does not end")
    assert np.abs(planned - V).max() < 1e-3 * np.ptp(r) * gamma / (1 - gamma) * 1.01


def test_planned_on_the_true_reward_it_stands_and_at_random_it_does_not(grid):
    V = grid.plan(prl.true_reward(grid.states))
    best = prl.episodes(grid, V, 20, 0.0, np.random.default_rng(0))
    assert (np.abs(best[:, -20:, 0]) < 0.3).all()
    assert prl.true_reward(best).sum(1).mean() > 65
    chance = prl.episodes(grid, None, 20, 1.0, np.random.default_rng(0))
    assert prl.true_reward(chance).sum(1).mean() < 25
    assert (np.abs(chance[:, 0, 0]) > 2).all()


def test_exploration_is_as_frequent_as_it_says(grid):
    V = grid.plan(prl.true_reward(grid.states))
    for share in (0.0, 0.3):
        seen = prl.episodes(grid, V, 300, share, np.random.default_rng(1))
        before, after = seen[:, :-1].reshape(-1, 2), seen[:, 1:].reshape(-1, 2)
        planned = (pendulum.move(before, grid.act(V, before)) == after).all(1).mean()
        # a third of the random actions are what was planned
        assert planned == pytest.approx(1 - share * 2 / 3, abs=0.03)


# ---- the experiments -----------------------------------------------------------------------------

def test_answers_are_counted_to_where_the_mean_stays_above_the_goal():
    def rows(*returns):
        return [{"answers": 10 * i, "return": value + noise}
                for i, value in enumerate(returns) for noise in (-1, 1)]
    assert prl.answers_needed(rows(0, 5, 3, 6, 7), 4) == 30
    assert prl.answers_needed(rows(5, 6), 4) == 0
    assert prl.answers_needed(rows(0, 5, 3), 4) == math.inf


def test_good_questions_need_fewer_answers():
    """The paper's claim in the large: after 40 answers the angle is smaller than after 40 random
    ones, for most people."""
    config = prl.Config(answers=40)
    rows = [row for seed in range(8) for row in prl.asking_well(config, seed)]
    informed, random = (np.array(prl.values(rows, "degrees", way=way, answers=40))
                        for way in ("information", "random"))
    assert (informed < random).mean() >= 0.75 and informed.mean() < 0.6 * random.mean()


def test_a_pendulum_learns_to_stand_from_60_answers_and_from_a_coin_it_does_not(grid):
    top = prl.true_return(grid, grid.plan(prl.true_reward(grid.states)), 0)
    rows, learned = prl.backflips(prl.Config(rounds=6), 0, grid, "information")
    assert [row["answers"] for row in rows] == [0, 10, 20, 30, 40, 50, 60]
    assert rows[0]["return"] < 20 and rows[-1]["return"] > 0.9 * top
    assert len(learned) == len(grid.states)
    coin, _ = prl.backflips(prl.Config(rounds=2, rationality=0.0), 0, grid, "random")
    assert coin[-1]["near_certain"] == 0 and coin[-1]["return"] < 0.9 * top
    # a scale at which the answers say which, but not by how much
    sharp, _ = prl.backflips(prl.Config(rounds=1, questions=40, rationality=100.0), 0, grid,
                             "random")
    assert sharp[-1]["near_certain"] > 0.8


def test_two_runs_are_alike_and_leave_rows_and_a_figure(tmp_path):
    """And they need numpy only."""
    program = ("import sys, preference_rl; sys.argv[1:1] = '--answers 4 --rounds 2 --questions 3 "
               "--seeds 2 --out'.split()\n"
               "preference_rl.main(preference_rl.parse(preference_rl.Config, ''))\n"
               "assert 'torch' not in sys.modules")
    results = []
    for name in ("a", "b"):
        if name == "a":
            done = subprocess.run([sys.executable, "-c", program, tmp_path / name], cwd=clone.ROOT,
                                  text=True, capture_output=True, env=clone.environment())
            assert done.returncode == 0, done.stderr
        else:
            prl.main(prl.Config(answers=4, rounds=2, questions=3, seeds=2,
                                out=str(tmp_path / name)))
        written = (tmp_path / name / "results.jsonl").read_text().splitlines()
        results.append([json.loads(line) for line in written])
    assert results[0] == results[1]
    assert {(row["experiment"], row["way"]) for row in results[0]} == {
        *(("asking", way) for way in prl.WORTH),
        *(("backflips", way) for way in ("random", "information", "true reward"))}
    assert (tmp_path / "a" / "figure.png").stat().st_size > 20_000


@pytest.mark.parametrize("arguments", [
    "--seeds 1", "--seeds 1001", "--seeds 1000000000000000000000000000000", "--rounds 0",
    "--rounds 1001", "--questions 1001", "--answers 0", "--answers 10001", "--answers x",
    "--rationality -1", "--rationality nan", "--seed -1"])
def test_a_bad_setting_is_one_line(arguments):
    with pytest.raises(SystemExit) as stopped:
        parse(prl.Config, "", arguments.split())
    message = str(stopped.value)
    assert message.startswith("error: ") and arguments.split()[0] in message
    assert "\n" not in message


def test_a_folder_that_cannot_be_written_stops_it_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="^error: .*file/below: cannot be written"):
        prl.main(prl.Config(out=str(tmp_path / "file/below")))
