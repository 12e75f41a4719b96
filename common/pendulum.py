"""A pendulum that hangs, with a motor too weak to lift it: what preference_rl.py, pebble.py and
dppo.py learn to swing up. Its physics, features of its states, and a grid to plan on (grid.py).
NumPy only."""
from __future__ import annotations

from functools import partial
from typing import Callable

import numpy as np

from common.grid import Planner, play

# ---- angle 0 is up; the motor is weaker than gravity ---------------------------------------------

TORQUES = np.array([-3.0, 0.0, 3.0])  # gravity pulls with up to 10
SPEED = 8.0  # the highest, in radians a second
STEPS = 100  # of an episode; a step is 0.1 s


def move(state: np.ndarray, torque: np.ndarray) -> np.ndarray:
    """The state after a step: (..., 2), angle in [-pi, pi) and speed in [-SPEED, SPEED]."""
    angle, speed = state[..., 0], state[..., 1]
    for _ in range(2):
        speed = np.clip(speed + (10 * np.sin(angle) + torque) * 0.05, -SPEED, SPEED)
        angle = angle + speed * 0.05
    return np.stack([(angle + np.pi) % (2 * np.pi) - np.pi, speed], -1)


def true_reward(state: np.ndarray) -> np.ndarray:
    """What the person wants of a step: up (1), and still. The learner never sees it."""
    return (1 + np.cos(state[..., 0])) / 2 - 0.01 * state[..., 1] ** 2


class Grid(Planner):
    """The pendulum on N x N states; a step ends between four of them."""
    actions = TORQUES

    def __init__(self, N: int = 51):
        self.N = N
        angle = np.linspace(-np.pi, np.pi, N, endpoint=False)
        speed = np.linspace(-SPEED, SPEED, N)
        self.states = np.stack(np.meshgrid(angle, speed, indexing="ij"), -1).reshape(-1, 2)
        self.next, self.weight = self.corners(self.move(self.states[:, None], TORQUES))

    move = staticmethod(move)

    def corners(self, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The four grid states around a state (..., 2), as numbers (..., 4), and their weights
        (..., 4), of sum 1."""
        x = (state[..., 0] + np.pi) / (2 * np.pi) * self.N  # in steps of the grid
        y = (state[..., 1] + SPEED) / (2 * SPEED) * (self.N - 1)
        i = np.floor(x).astype(int)
        j = np.minimum(np.floor(y).astype(int), self.N - 2)
        x, y = x - i, y - j  # within the cell, in [0, 1]
        low = i % self.N * self.N  # the angle goes round
        high = (i + 1) % self.N * self.N
        numbers = np.stack([low + j, low + j + 1, high + j, high + j + 1], -1)
        weights = np.stack([(1 - x) * (1 - y), (1 - x) * y, x * (1 - y), x * y], -1)
        return numbers, weights


def roll_out(policy: Callable[[np.ndarray], np.ndarray] | None, n: int, explore: float,
             rng: np.random.Generator, hold: float = 5) -> tuple[np.ndarray, np.ndarray]:
    """States (n, STEPS + 1, 2) and torques (n, STEPS) of n episodes that begin with the pendulum
    hanging, nearly still.

    Args:
        policy: states (n, 2) -> torques (n,); without it every action is random.
        explore: share of the steps with a random action.
        hold: for how many steps a random action is held on average.
    """
    angle = np.pi + 0.2 * rng.normal(size=n)
    speed = 0.2 * rng.normal(size=n)
    state = np.stack([(angle + np.pi) % (2 * np.pi) - np.pi, speed], -1)
    return play(state, move, as_it_is, policy, TORQUES, STEPS, explore, rng, hold)


def as_it_is(state: np.ndarray) -> np.ndarray:
    """All of the state is seen."""
    return state


def episodes(grid: Grid, V: np.ndarray | None, n: int, explore: float,
             rng: np.random.Generator) -> np.ndarray:
    """States (n, STEPS, 2) of n episodes of the policy that is greedy for the values V (N * N,);
    without them every action is random."""
    policy = None if V is None else partial(grid.act, V)
    states, _ = roll_out(policy, n, explore, rng)
    return states[:, :STEPS]


def bumps(state: np.ndarray) -> np.ndarray:
    """Features (..., 108) of states (..., 2), for a reward of any shape: 12 x 9 normal bumps over
    angle and speed, scaled to sum 1."""
    angle = np.linspace(-np.pi, np.pi, 12, endpoint=False)
    speed = np.linspace(-SPEED, SPEED, 9)
    of_angle = np.exp((np.cos(state[..., :1] - angle) - 1) / 0.4**2)  # (..., 12)
    of_speed = np.exp(-0.5 * ((state[..., 1:] - speed) / 1.5) ** 2)  # (..., 9)
    phi = of_angle[..., :, None] * of_speed[..., None, :]
    phi = phi.reshape(*state.shape[:-1], angle.size * speed.size)
    return phi / phi.sum(-1, keepdims=True)
