"""Worlds whose states are few numbers: two ways to plan on a grid, with the physics known and from
stored transitions alone, and episodes with held random actions. NumPy only."""
from __future__ import annotations

from typing import Callable

import numpy as np


class Planner:
    """A world as a Markov decision process on G states. A step ends between some of them, and leads
    to each with a probability that falls with its distance.

    Attributes, which a world gives in __init__:
        actions: (actions,) numbers that can be done, in rising order.
        states: (G, k).
        next, weight: (G, actions, K) where a step leads, and how likely.
    """

    def move(self, state: np.ndarray, action: np.ndarray) -> np.ndarray:
        """The state (..., k) after a step."""
        raise NotImplementedError

    def corners(self, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The K grid states around a state (..., k), as numbers (..., K), and their weights
        (..., K), of sum 1."""
        raise NotImplementedError

    def plan(self, reward: np.ndarray, V: np.ndarray | None = None,
             gamma: float = 0.97) -> np.ndarray:
        """Values (G,) of the optimal policy, by value iteration.

        Args:
            reward: (G,) of a step from each state.
            V: (G,) where to start; zeros without it.
        """
        if V is None:
            V = np.zeros(len(reward))
        scale = np.ptp(reward) + 1e-12
        for _ in range(2000):
            old = V
            of_actions = (V[self.next] * self.weight).sum(-1)  # (G, actions)
            V = reward + gamma * of_actions.max(1)
            if np.abs(V - old).max() < 1e-3 * scale:
                break
        return V

    def act(self, V: np.ndarray, state: np.ndarray) -> np.ndarray:
        """The actions (n,) that lead from states (n, k) to the highest values."""
        corner, weight = self.corners(self.move(state[:, None], self.actions))
        return self.actions[(V[corner] * weight).sum(-1).argmax(1)]

    def plan_from(self, states: np.ndarray, actions: np.ndarray, rewards: np.ndarray,
                  ends: np.ndarray, Q: np.ndarray | None = None,
                  gamma: float = 0.97) -> np.ndarray:
        """Values (G, actions) of the best policy that stored steps show, without the physics:
        fitted Q iteration (Ernst et al. 2005), with the grid as its averager (Gordon 1995).

            Q(g, a) <- weighted mean, over steps with action a near g, of r + gamma max_b Q(s', b)

        What was never tried near a grid state counts as the mean reward for ever, so a constant
        added to all rewards changes nothing.

        Args:
            states, ends: (n, k) where a step began and where it led.
            actions: (n,) numbers of self.actions.
            rewards: (n,) of the states.
            Q: (G, actions) where to start; the mean reward for ever without it.
        """
        corner, weight = self.corners(states)  # (n, K)
        place = (corner * len(self.actions) + actions[:, None]).ravel()  # in Q, as one row
        size = len(self.states) * len(self.actions)
        near = np.bincount(place, weight.ravel(), size)  # how much was seen near (g, a)
        end_corner, end_weight = self.corners(ends)
        usual = rewards.mean() / (1 - gamma)
        few = 0.01  # of a step, with the usual value
        if Q is None:
            Q = np.full((len(self.states), len(self.actions)), usual)
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
        """The actions (n,) of the highest values Q (G, actions) in states (n, k)."""
        corner, weight = self.corners(state)
        return self.actions[(Q[corner] * weight[..., None]).sum(1).argmax(1)]


def play(world_state: np.ndarray, move: Callable[[np.ndarray, np.ndarray], np.ndarray],
         see: Callable[[np.ndarray], np.ndarray],
         policy: Callable[[np.ndarray], np.ndarray] | None, actions: np.ndarray, steps: int,
         explore: float, rng: np.random.Generator, hold: float) -> tuple[np.ndarray, np.ndarray]:
    """What is seen (n, steps + 1, k) and done (n, steps) in n episodes.

    Args:
        world_state: (n, ...) where they begin.
        move: world states, actions (n,) -> world states after a step.
        see: world states -> what a policy sees of them (n, k).
        policy: (n, k) -> actions (n,); without it every action is random.
        actions: (actions,) from which the random ones are drawn.
        explore: share of the steps with a random action.
        hold: for how many steps a random action is held on average.
    """
    n = len(world_state)
    held = rng.choice(actions, n)  # the random action of each episode
    at_random = rng.random(n) < explore  # whether it is in force
    seen, done = [see(world_state)], []
    for _ in range(steps):
        again = rng.random(n) < 1 / hold
        held = np.where(again, rng.choice(actions, n), held)
        at_random = np.where(again, rng.random(n) < explore, at_random)
        action = held if policy is None else np.where(at_random, held, policy(seen[-1]))
        world_state = move(world_state, action)
        seen.append(see(world_state))
        done.append(action)
    return np.stack(seen, 1), np.stack(done, 1)
