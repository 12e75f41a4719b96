"""dppo.py: the predictor against the plain model of preference_rl.py and finite differences, the
order of events by hand, DPPO's loss against its formula and its limits, the experiment in small.
"""
import json
import math

import numpy as np
import pytest

import dppo
import preference_rl as prl
from common import pendulum
from common.pendulum import STEPS, TORQUES, Grid, bumps, roll_out, true_reward
from common.settings import parse


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def some(rng, n=40, T=dppo.SEGMENT):
    """States (n, T, 2) of segments, pairs and answers about them."""
    states = np.concatenate([roll_out(None, n, 1.0, rng)[0][:, 30:30 + T]])
    pairs = rng.integers(0, n, (60, 2))
    return states, pairs, rng.choice([0.0, 1.0], 60)


# ---- teachers ------------------------------------------------------------------------------------

def test_the_teachers_by_hand():
    angles = np.array([[0.1, 1.5, 0.0, -1.5], [-1.5, 0.0, 1.5, 1.5], [1.5, 1.6, 0.0, 0.1],
                       [0.0, 0.1, 0.0, 0.1], [1.5, -1.5, 1.5, 1.5]])
    states = np.stack([angles, np.zeros_like(angles)], -1)
    assert dppo.left_first(states).tolist() == [1, -1, 0, 0, 1]
    # the mirror image has the other order
    assert np.array_equal(dppo.left_first(-states), -dppo.left_first(states))
    assert np.allclose(dppo.best_moment(states), (1 + np.cos(np.abs(angles).min(1))) / 2)
    assert np.allclose(dppo.adds_up(states), ((1 + np.cos(angles)) / 2).sum(1))


def test_who_likes_all_segments_equally_is_refused(rng):
    assert not dppo.consistent(np.zeros(5)).any()
    with pytest.raises(SystemExit, match="^error: --episodes: too few"):
        dppo.accuracy(rng.random(5), np.zeros(5), rng)


def test_asking_and_counting_what_is_right(rng):
    """A teacher's answers are Bradley-Terry; a score in the same order is always right, one in the
    other never."""
    strengths = np.array([0.0, 1.0, 1.0, 2.5])
    pairs, answers = dppo.ask(strengths, 40_000, rng)
    here = (pairs == [3, 1]).all(1)
    assert answers[here].mean() == pytest.approx(1 / (1 + math.exp(-1.5)), abs=0.03)
    assert dppo.accuracy(3 * strengths, strengths, rng) == 1
    assert dppo.accuracy(-strengths, strengths, rng) == 0


def test_no_markov_sum_can_tell_an_order():
    """Two segments with the same states in another order have the same sum for any reward; the
    history tells them apart."""
    forth = np.stack([np.linspace(1.5, -1.5, dppo.SEGMENT), np.full(dppo.SEGMENT, -1.5)], -1)[None]
    back = forth[:, ::-1]
    assert dppo.left_first(forth) == 1 and dppo.left_first(back) == -1
    assert np.allclose(bumps(forth).sum(1), bumps(back).sum(1))
    apart = dppo.with_history(forth).sum(1) - dppo.with_history(back).sum(1)
    assert np.abs(apart).max() > 0.5


# ---- the predictor -------------------------------------------------------------------------------

def test_with_equal_weights_and_no_history_it_is_preference_rls_model(rng):
    states, pairs, answers = some(rng)
    found = dppo.fit("Markov sum", states, pairs, answers)
    Phi = bumps(states).sum(1)
    w, _ = prl.fit_reward(Phi[pairs[:, 0]] - Phi[pairs[:, 1]], answers, dppo.PRIOR)
    assert np.allclose(found.a, w, atol=1e-6) and not found.b.any()
    assert np.allclose(found.score(states), Phi @ w, atol=1e-6)
    # b = 0 is w_t = 1 / T, whatever else the model could do
    assert np.allclose(dppo.Predictor("+ weights", found.a, np.zeros(108)).score(states), Phi @ w)


def test_the_history_is_the_mean_of_what_was_before(rng):
    states = some(rng, 3)[0]
    x = dppo.with_history(states)
    psi = dppo.angles(states)
    assert not x[:, 0, 108:].any()  # nothing was before
    t = 7
    for i in range(12):
        for j in range(12):
            expected = psi[1, t, i] * np.mean([psi[1, u, j] for u in range(t)])
            assert x[1, t, 108 + 12 * i + j] == pytest.approx(expected, abs=1e-12)
    # it is causal: the future changes nothing before it
    other = states.copy()
    other[:, t + 1:] = 0.3
    assert np.allclose(dppo.with_history(other)[:, :t + 1], x[:, :t + 1])


def test_the_gradients_are_those_of_the_posterior(rng):
    states, pairs, answers = some(rng, 10)
    x, phi = dppo.with_history(states), bumps(states)
    both = 0.3 * rng.normal(size=x.shape[-1] + 108)

    def loss(both):
        a, b = both[:x.shape[-1]], both[x.shape[-1]:]
        total = 0.0
        f = []
        for segment, features in zip(x, phi):
            w = np.exp(features @ b)
            w = w / w.sum()
            f.append(len(segment) * sum(w_t * (x_t @ a) for w_t, x_t in zip(w, segment)))
        for (i, j), answer in zip(pairs, answers):
            p = 1 / (1 + math.exp(f[j] - f[i]))
            total -= answer * math.log(p) + (1 - answer) * math.log(1 - p)
        return (total + both @ both / (2 * dppo.PRIOR**2)) / len(answers)

    gradient = dppo.weights_gradient(x, phi, pairs, answers, both)
    for _ in range(3):
        way = rng.normal(size=len(both))
        slope = (loss(both + 1e-5 * way) - loss(both - 1e-5 * way)) / 2e-5
        assert slope == pytest.approx(gradient @ way, rel=1e-5, abs=1e-7)


def test_only_the_history_sees_an_order_and_it_costs_little_where_there_is_none():
    """Held-out accuracy, one seed: far apart for the third teacher, near for the first."""
    grid = Grid(41)
    V = grid.plan(true_reward(grid.states))
    rng = np.random.default_rng(5)
    states = dppo.segments(dppo.stored(pendulum, 90, grid, V, rng)[0][:, :STEPS])
    held_out = dppo.segments(dppo.stored(pendulum, 90, grid, V, rng)[0][:, :STEPS])
    gains = []
    for teacher in (dppo.adds_up, dppo.left_first):
        pairs, answers = dppo.ask(dppo.consistent(teacher(states)), 400, rng)
        plain, history = (dppo.accuracy(
            dppo.fit(model, states, pairs, answers).score(held_out), teacher(held_out),
            np.random.default_rng(1)) for model in ("Markov sum", "+ history"))
        gains.append(history - plain)
    assert gains[1] > 0.03 > abs(gains[0])


# ---- the policy ----------------------------------------------------------------------------------

def test_distances_and_their_gradient(rng):
    states = some(rng, 6)[0]
    phi, torques = bumps(states), rng.choice(TORQUES, states.shape[:2])
    theta = rng.normal(size=108)
    d, by_step = dppo.distances(theta, phi, torques, 3.0)
    for i in range(6):
        by_hand = [abs(3 * math.tanh(phi[i, t] @ theta) - torques[i, t])
                   for t in range(len(phi[i]))]
        assert d[i] == pytest.approx(np.mean(by_hand) / 6)
    way = rng.normal(size=108)
    ahead, behind = (dppo.distances(theta + e * way, phi, torques, 3.0)[0] for e in (1e-6, -1e-6))
    slope = np.einsum("nt,ntd,d->n", by_step, phi, way)
    assert np.allclose((ahead - behind) / 2e-6, slope, atol=1e-6)
    own = 3 * np.tanh(phi @ theta)  # a policy is at no distance from itself
    assert not dppo.distances(theta, phi, own, 3.0)[0].any()


def test_the_loss_is_the_papers_and_with_lambda_0_losers_do_not_count(rng):
    winner, loser = rng.random((2, 50))
    for lam in (0.0, 0.5, 1.0):
        loss, by_winner, by_loser = dppo.dppo_loss(winner, loser, lam, 0.1)
        p = [math.exp(-w / 0.1) / (math.exp(-w / 0.1) + math.exp(-lam * l / 0.1))
             for w, l in zip(winner, loser)]
        assert loss == pytest.approx(-np.mean(np.log(p)))
        e = 1e-6 * rng.normal(size=(2, 50))
        ahead = dppo.dppo_loss(winner + e[0], loser + e[1], lam, 0.1)[0]
        behind = dppo.dppo_loss(winner - e[0], loser - e[1], lam, 0.1)[0]
        assert (ahead - behind) / 2 == pytest.approx(by_winner @ e[0] + by_loser @ e[1], rel=1e-4)
        assert (by_winner > 0).all() and (by_loser <= 0).all() and by_loser.any() == (lam > 0)


def test_with_lambda_0_and_a_high_temperature_it_is_cloning_of_the_winners(rng):
    """log sigmoid is then linear: the gradient is that of the mean distance to the winners, divided
    by 2 temperature, which Adam does not see."""
    states, _, _ = some(rng, 8)
    phi, torques = bumps(states), rng.choice(TORQUES, states.shape[:2])
    winners, losers = np.array([0, 1, 2, 0]), np.array([4, 5, 6, 7])
    _, by_winner, by_loser = dppo.dppo_loss(rng.random(4), rng.random(4), 0.0, 1e4)
    assert np.allclose(by_winner * 2 * 1e4 * 4, 1, atol=1e-3) and not by_loser.any()
    direct = dppo.dppo(phi, torques, 3.0, winners, losers, 0.0, 10.0, 60)
    copied = dppo.clone(phi[winners], torques[winners], 3.0, 60)
    away = [dppo.distances(theta, phi, torques, 3.0)[0] for theta in (direct, copied)]
    assert away[0][winners].mean() == pytest.approx(away[1][winners].mean(), rel=0.01)
    assert away[0][winners].mean() < 0.9 * away[0][losers].mean()


def test_adam_finds_the_minimum_of_a_bowl():
    target = np.array([1.0, -2.0, 0.5])
    assert np.allclose(dppo.adam(lambda x: x - target, np.zeros(3), 400), target, atol=1e-2)


# ---- the experiment ------------------------------------------------------------------------------

def test_two_runs_are_alike_and_leave_rows_and_a_figure(tmp_path):
    results = []
    for name in ("a", "b"):
        out = tmp_path / name
        dppo.main(dppo.Config(episodes=6, judged=20, answers=10, temperature=0.2, pairs=50, steps=2,
                              seeds=2, out=str(out)))
        results.append([json.loads(line) for line in (out / "results.jsonl").open()])
        assert (out / "figure.png").stat().st_size > 20_000
    assert results[0] == results[1]
    of_policies = [row for row in results[0] if row["experiment"] == "policy"]
    assert len(results[0]) - len(of_policies) == 2 * len(dppo.TEACHERS) * len(dppo.MODELS)
    assert {row["pairs"] for row in of_policies} == {"segments", "episodes", "none"}


@pytest.mark.parametrize("arguments", [
    "--seeds 1", "--seeds 1001", "--episodes 5", "--episodes 3001", "--judged 0", "--answers 0",
    "--answers 5001", "--temperature 0", "--temperature nan", "--pairs 0", "--pairs 1000001",
    "--steps 0", "--seed -1"])
def test_a_bad_setting_is_one_line(arguments):
    with pytest.raises(SystemExit) as stopped:
        parse(dppo.Config, "", arguments.split())
    message = str(stopped.value)
    assert message.startswith("error: ") and arguments.split()[0] in message
    assert "\n" not in message
