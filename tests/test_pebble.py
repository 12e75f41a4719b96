"""pebble.py: the ring buffer and the bug of the released code, the entropy of where one was, crops
and pseudo-labels by hand and by algebra, planning from stored steps, and the experiment in small.
"""
import json
from functools import partial

import numpy as np
import pytest

import pebble
import preference_rl as prl
from common import pendulum
from common.pendulum import STEPS, TORQUES, Grid, bumps
from common.settings import parse


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def filled(rng, capacity, episodes):
    """A buffer of `capacity` episodes, after so many were written."""
    buffer = pebble.Buffer(capacity * STEPS)
    for _ in range(episodes):
        states, torques = pendulum.roll_out(None, 1, 1.0, rng)
        buffer.add(states, torques, pebble.no_reward)
    return buffer


# ---- memory --------------------------------------------------------------------------------------

def test_a_ring_holds_the_latest_steps_and_where_they_led(rng):
    buffer = pebble.Buffer(3 * STEPS)
    written = [pendulum.roll_out(None, 1, 1.0, rng) for _ in range(5)]
    for k, (states, torques) in enumerate(written):
        buffer.add(states, torques, pebble.no_reward)
        assert len(buffer) == min(k + 1, 3) * STEPS
    assert buffer.index == 2 * STEPS
    for place, k in enumerate((3, 4, 2)):
        states, torques = written[k]
        part = slice(place * STEPS, (place + 1) * STEPS)
        assert np.array_equal(buffer.states[part], states[0, :-1])
        assert np.array_equal(buffer.ends[part], states[0, 1:])
        assert np.array_equal(TORQUES[buffer.actions[part]], torques[0])
    ends = pendulum.move(buffer.states, TORQUES[buffer.actions])
    assert np.allclose(ends, buffer.ends, atol=1e-12)
    segments = buffer.segments()  # none goes across two episodes
    assert np.allclose(pendulum.move(segments[:, :-1], TORQUES[buffer.actions].reshape(
        -1, pebble.SEGMENT)[:, :-1]), segments[:, 1:], atol=1e-12)


@pytest.mark.parametrize("capacity, episodes", [(3, 2), (3, 3), (3, 4), (3, 7), (20, 1)])
def test_every_step_is_relabelled_also_after_the_ring_has_wrapped(rng, capacity, episodes):
    """BPref issue 7: only those before the write index were. After a multiple of the capacity that
    is not one."""
    buffer = filled(rng, capacity, episodes)
    buffer.relabel(pendulum.true_reward, "all")
    n = len(buffer)
    assert np.array_equal(buffer.rewards[:n], pendulum.true_reward(buffer.states[:n]))
    assert not buffer.rewards[n:].any()

    buggy = filled(np.random.default_rng(0), capacity, episodes)
    buggy.relabel(pendulum.true_reward, "to index")
    wrapped = episodes >= capacity
    assert buggy.rewards.any() == (episodes % capacity > 0)
    assert np.array_equal(buggy.rewards, buffer.rewards) == (not wrapped)
    never = filled(np.random.default_rng(0), capacity, episodes)
    never.relabel(pendulum.true_reward, "never")
    assert not never.rewards.any()


# ---- before the first question -------------------------------------------------------------------

def test_novelty_is_the_log_of_the_distance_to_the_kth_nearest(rng):
    states = rng.uniform([-np.pi, -8], [np.pi, 8], (40, 2))
    for k in (1, 3):
        found = pebble.novelty(states[:5], states[5:], k)
        for i in range(5):
            apart = sorted(np.sqrt((np.cos(states[i, 0]) - np.cos(one[0]))**2
                                   + (np.sin(states[i, 0]) - np.sin(one[0]))**2
                                   + (states[i, 1] / 8 - one[1] / 8)**2) for one in states[5:])
            assert found[i] == pytest.approx(np.log(apart[k - 1]), abs=1e-9)
    around = np.array([[np.pi - 1e-3, 0.0], [-np.pi + 1e-3, 0.0]])  # the angle goes round
    assert pebble.novelty(around[:1], around[1:], 1)[0] == pytest.approx(np.log(2e-3), abs=1e-3)


def test_its_mean_ranks_distributions_by_their_entropy(rng):
    """Twice the width is log 2 more, for every k (here in speed alone)."""
    narrow = np.stack([np.zeros(400), rng.uniform(-2, 2, 400)], 1)
    wide = narrow * [1, 2]
    means = [pebble.novelty(states, states, 6).mean() for states in (narrow, wide)]
    assert means[1] - means[0] == pytest.approx(np.log(2), abs=1e-6)


def test_exploration_by_entropy_sees_more_than_random_actions():
    config, grid = pebble.Config(), Grid(41)
    seen = {}
    for name in ("neither", "PEBBLE"):
        buffer, _, _ = pebble.explore(config, pebble.METHODS[name], grid, np.random.default_rng(7))
        assert len(buffer) == config.before * pebble.EPISODES * STEPS and not buffer.rewards.any()
        seen[name] = pebble.seen(buffer.states[:len(buffer)])
    assert seen["PEBBLE"] > 1.4 * seen["neither"]


# ---- the reward ----------------------------------------------------------------------------------

def test_the_fit_is_that_of_preference_rl(rng):
    questions, answers = rng.normal(size=(30, 4)), rng.choice([0.0, 1.0], 30)
    mode, _ = prl.fit_reward(questions, answers, pebble.PRIOR)
    assert np.allclose(pebble.fit_logistic(questions, answers, pebble.PRIOR), mode, atol=1e-6)
    # a weight of 2 is the same question twice
    twice = pebble.fit_logistic(np.vstack([questions, questions[:5]]),
                                np.append(answers, answers[:5]), pebble.PRIOR)
    weights = np.where(np.arange(30) < 5, 2.0, 1.0)
    assert np.allclose(pebble.fit_logistic(questions, answers, pebble.PRIOR, weights), twice, atol=1e-6)


def test_crops_keep_the_answer_and_cut_both_segments_to_one_length(rng):
    """A feature that is 1 in every step counts the steps: it cancels. One that is the step's number
    says where a crop began."""
    T = pebble.SEGMENT
    pairs = np.stack([np.ones((6, 2, T)), np.tile(np.arange(T), (6, 2, 1))], -1)  # (6, 2, T, 2)
    answers = np.array([1.0, 0, 1, 1, 0, 0])
    questions, kept = pebble.crops(pairs, answers, 300, rng)
    assert questions.shape == (1800, 2) and np.array_equal(kept.reshape(300, 6)[7], answers)
    assert not questions[:, 0].any()
    # |begin1 - begin2| * length, with length from T / 2 to T and begins that leave room
    possible = {apart * length for length in range(T // 2, T + 1)
                for apart in range(T - length + 1)}
    assert {abs(round(x)) for x in questions[:, 1]} <= possible
    assert questions[:, 1].mean() == pytest.approx(0, abs=3)
    whole = np.ones((4, 2, T, 3)) * rng.normal(size=(4, 2, 1, 3))  # alike in all steps
    cut, _ = pebble.crops(whole, np.ones(4), 1, rng)
    full = (whole[:, 0] - whole[:, 1]).sum(1)
    ratio = cut / full
    assert np.allclose(ratio, ratio[:, :1]) and (np.abs(ratio - 0.75) < 0.25 + 1e-9).all()


def test_a_pseudo_label_is_given_where_the_reward_is_sure_and_moves_it_little(rng):
    """With tau = 0.99 the gradient of such an answer is below 0.01 of the question."""
    questions, w = rng.normal(size=(500, 3)) * 3, np.array([1.0, -2.0, 0.5])
    sure, own = pebble.confident(questions, w, 0.99)
    logits = questions @ w
    assert np.array_equal(sure, np.abs(logits) > np.log(99)) and 50 < sure.sum() < 450
    assert np.array_equal(own, (logits > 0).astype(float))
    p = pebble.sigmoid(logits)
    assert np.abs(p - own)[sure].max() < 0.01


# ---- planning from stored steps ------------------------------------------------------------------

def test_planned_from_every_step_of_the_grid_it_is_the_plan():
    """If each grid state was tried with each torque, fitted Q iteration is value iteration."""
    grid = Grid(15)
    states = np.repeat(grid.states, len(TORQUES), 0)
    actions = np.tile(np.arange(len(TORQUES)), len(grid.states))
    reward = pendulum.true_reward(states)
    ends = pendulum.move(states, TORQUES[actions])
    # a hundred of each, so that what is never tried does not count
    Q = grid.plan_from(np.tile(states, (100, 1)), np.tile(actions, 100), np.tile(reward, 100),
                       np.tile(ends, (100, 1)))
    V = grid.plan(pendulum.true_reward(grid.states))
    stopped = 0.01 * np.ptp(reward) * 0.97 / 0.03  # what the stopping rule promises
    assert np.abs(Q.max(1) - V).max() < 1.2 * stopped
    assert (Q.argmax(1) == (V[grid.next] * grid.weight).sum(-1).argmax(1)).mean() > 0.95


def test_a_constant_or_a_scale_changes_no_plan_from_stored_steps(rng):
    grid, buffer = Grid(21), filled(rng, 5, 5)
    reward = pendulum.true_reward(buffer.states)
    where = rng.uniform([-np.pi, -8], [np.pi, 8], (300, 2))
    plain, shifted, scaled = (grid.act_on(buffer.plan(grid, r), where)
                              for r in (reward, reward + 5, reward * 0.1))
    assert (plain == shifted).mean() > 0.97 and (plain == scaled).mean() > 0.97


def test_planned_from_good_and_random_steps_it_swings_up(rng):
    fine, grid = Grid(), Grid(41)
    V = fine.plan(pendulum.true_reward(fine.states))
    buffer = pebble.Buffer(60 * STEPS)
    buffer.add(*pendulum.roll_out(partial(fine.act, V), 60, 0.5, rng), pendulum.true_reward)
    Q = buffer.plan(grid, buffer.rewards)
    states, _ = pendulum.roll_out(partial(grid.act_on, Q), 20, 0.0, rng)
    assert pendulum.true_reward(states[:, :STEPS]).sum(1).mean() > 60


# ---- the experiment ------------------------------------------------------------------------------

def test_two_runs_are_alike_and_leave_rows_and_a_figure(tmp_path):
    results = []
    for name in ("a", "b"):
        out = tmp_path / name
        pebble.main(pebble.Config(before=1, rounds=2, questions=2, capacity=20, crops=2, seeds=2,
                                  out=str(out)))
        results.append([json.loads(line) for line in (out / "results.jsonl").open()])
        assert (out / "figure.png").stat().st_size > 20_000
    assert results[0] == results[1] and len(results[0]) == 2 * 3 * len(pebble.METHODS)
    first = [row["return"] for row in results[0] if row["answers"] == 0 and row["seed"] == 0]
    assert len(set(first)) == 2  # with and without pre-exploration: no other part is at work yet
    assert bumps(np.zeros((0, 2))).shape == (0, 108)


@pytest.mark.parametrize("arguments", [
    "--seeds 1", "--seeds 1001", "--rounds 0", "--rounds 1001", "--questions 0", "--before 0",
    "--capacity 9", "--crops 0", "--tau 0.5", "--tau 1", "--tau nan", "--hold 0.5", "--hold nan",
    "--rationality -1", "--seed -1", "--unanswered 0"])
def test_a_bad_setting_is_one_line(arguments):
    with pytest.raises(SystemExit) as stopped:
        parse(pebble.Config, "", arguments.split())
    message = str(stopped.value)
    assert message.startswith("error: ") and arguments.split()[0] in message
    assert "\n" not in message
