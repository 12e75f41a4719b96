"""common/track.py: the planner's car against the road's own, its grid, and what it is worth."""
from functools import partial

import numpy as np
import pytest

from common import track


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_without_gusts_the_planners_car_goes_where_the_car_goes(rng, monkeypatch):
    """Up to how the bend changes within a step, and to the points of which the road is made."""
    monkeypatch.setattr(track.Road, "gust", 0.0)
    state = track.ROAD.start(300, rng)
    steering = rng.choice(track.STEERINGS, 300)
    seen = track.sees(track.ROAD.move(state, steering, rng))
    expected = track.Grid(3).move(track.sees(state), steering)
    assert np.abs(seen - expected)[:, :2].mean(0) == pytest.approx([0, 0], abs=0.03)


def test_corners_are_eight_around_a_state_and_their_mean_is_the_state(rng):
    grid = track.Grid(21)
    state = rng.uniform([-2, -3, track.BENDS[0]], [2, 2.5, track.BENDS[1]], (200, 3))
    state[:, 1] = np.minimum(state[:, 1], grid.states[:, 1].max())
    corner, weight = grid.corners(state)
    assert corner.shape == (200, 8) and np.allclose(weight.sum(1), 1) and (weight >= 0).all()
    assert np.allclose((grid.states[corner] * weight[..., None]).sum(1), state)
    around, weight = grid.corners(np.array([[0.0, np.pi - 1e-9, 0.0]]))  # the angle goes round
    assert (weight * (grid.states[around][..., 1] == -np.pi)).sum() == pytest.approx(1, abs=1e-6)


def test_the_middle_is_worth_1_and_the_edge_nothing():
    views = np.array([[0, 0.3, 0], [0.5, 0, 0], [-0.5, 0, 0], [1, 0, 0], [7, 0, 0.0]])
    assert np.allclose(track.true_reward(views), [1, 0.5, 0.5, 0, 0])
    assert track.bumps(views).shape == (5, 147) and np.allclose(track.bumps(views).sum(1), 1)
    assert np.array_equal(track.bumps(views + [[100, 0, 0]])[0], track.bumps(views + [[200, 0, 0]])[0])


def test_the_plan_stays_in_the_middle_and_random_steering_does_not(rng):
    grid = track.Grid(41)
    V = grid.plan(track.true_reward(grid.states))
    views, steerings = track.roll_out(partial(grid.act, V), 20, 0.0, rng)
    assert views.shape == (20, track.STEPS + 1, 3) and steerings.shape == (20, track.STEPS)
    assert track.true_reward(views).mean() > 0.97
    views, _ = track.roll_out(None, 20, 0.0, rng)
    assert (np.abs(views[..., 0]).max(1) > 1).all()
