"""A pendulum that hangs, with a motor too weak to lift it: what preference_rl.py, pebble.py and
dppo.py learn to swing up. Its physics, features of its states, and two ways to plan: with the
physics known, on a grid, and from stored transitions alone. NumPy only."""
from __future__ import annotations

from functools import partial
from typing import Callable

import numpy as np

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


class Grid:
    """The pendulum as a Markov decision process on N x N states. A step ends between four of them,
    and leads to each with a probability that falls with its distance.

    Attributes:
        states: (N * N, 2).
        next, weight: (N * N, torques, 4) where a step leads, and how likely.
    """

    def __init__(self, N: int = 51):
        self.N = N
        angle = np.linspace(-np.pi, np.pi, N, endpoint=False)
        speed = np.linspace(-SPEED, SPEED, N)
        self.states = np.stack(np.meshgrid(angle, speed, indexing="ij"), -1).reshape(-1, 2)
        self.next, self.weight = self.corners(move(self.states[:, None], TORQUES))

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

    def plan(self, reward: np.ndarray, V: np.ndarray | None = None,
             gamma: float = 0.97) -> np.ndarray:
        """Values (N * N,) of the optimal policy, by value iteration.

        Args:
            reward: (N * N,) of a step from each state.
            V: (N * N,) where to start; zeros without it.
        """
        if V is None:
            V = np.zeros(len(reward))
        scale = np.ptp(reward) + 1e-12
        for _ in range(2000):
            old = V
            of_actions = (V[self.next] * self.weight).sum(-1)  # (N * N, torques)
            V = reward + gamma * of_actions.max(1)
            if np.abs(V - old).max() < 1e-3 * scale:
                break
        return V

    def act(self, V: np.ndarray, state: np.ndarray) -> np.ndarray:
        """The torques (n,) that lead from states (n, 2) to the highest values."""
        corner, weight = self.corners(move(state[:, None], TORQUES))
        return TORQUES[(V[corner] * weight).sum(-1).argmax(1)]

    def plan_from(self, states: np.ndarray, actions: np.ndarray, rewards: np.ndarray,
                  ends: np.ndarray, Q: np.ndarray | None = None,
                  gamma: float = 0.97) -> np.ndarray:
        """Values (N * N, torques) of the best policy that stored steps show, without the physics:
        fitted Q iteration (Ernst et al. 2005), with the grid as its averager (Gordon 1995).

            Q(g, a) <- weighted mean, over steps with action a near g, of r + gamma max_b Q(s', b)

        What was never tried near a grid state counts as the mean reward for ever, so a constant
        added to all rewards changes nothing.

        Args:
            states, ends: (n, 2) where a step began and where it led.
            actions: (n,) numbers of TORQUES.
            rewards: (n,) of the states.
            Q: (N * N, torques) where to start; the mean reward for ever without it.
        """
        corner, weight = self.corners(states)  # (n, 4)
        place = (corner * len(TORQUES) + actions[:, None]).ravel()  # in Q, as one row
        size = self.N**2 * len(TORQUES)
        near = np.bincount(place, weight.ravel(), size)  # how much was seen near (g, a)
        end_corner, end_weight = self.corners(ends)
        usual = rewards.mean() / (1 - gamma)
        few = 0.01  # of a step, with the usual value
        if Q is None:
            Q = np.full((self.N**2, len(TORQUES)), usual)
        scale = np.ptp(rewards) + 1e-12
        for _ in range(500):
            old = Q
            target = rewards + gamma * (Q.max(1)[end_corner] * end_weight).sum(1)  # (n,)
            total = np.bincount(place, (weight * target[:, None]).ravel(), size)
            Q = ((total + few * usual) / (near + few)).reshape(old.shape)
            if np.abs(Q - old).max() < 1e-2 * scale:
                break
        return Q

    def act_on(self, Q: np.ndarray, state: np.ndarray) -> np.ndarray:
        """The torques (n,) of the highest values Q (N * N, torques) in states (n, 2)."""
        corner, weight = self.corners(state)
        return TORQUES[(Q[corner] * weight[..., None]).sum(1).argmax(1)]


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
    held = rng.choice(TORQUES, n)  # the random action of each episode
    at_random = rng.random(n) < explore  # whether it is in force
    states, torques = [state], []
    for _ in range(STEPS):
        again = rng.random(n) < 1 / hold
        held = np.where(again, rng.choice(TORQUES, n), held)
        at_random = np.where(again, rng.random(n) < explore, at_random)
        torque = held if policy is None else np.where(at_random, held, policy(state))
        state = move(state, torque)
        states.append(state)
        torques.append(torque)
    return np.stack(states, 1), np.stack(torques, 1)


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
