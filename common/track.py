"""A car on a winding road, in gusts: where dagger.py and dppo.py drive. The road; and for dppo.py
what pendulum.py has for the pendulum: features, a reward, a grid to plan on. NumPy only."""
from __future__ import annotations

from functools import partial
from typing import Callable

import numpy as np

from common.grid import Planner, play


class Road:
    """A closed road, and cars on it. The action is how fast a car turns, in radians a second.

    A state is (x, y, heading). A view is what the driver sees of it: distance from the middle of
    the road (left is positive), angle to the road, and how much the road bends at four places
    ahead.
    """
    points = 600  # of the middle line
    half_width = 1.0
    speed = 2.0  # lengths a second
    step = 0.1  # seconds
    gust = 0.3  # standard deviation of what the wind adds to the steering

    def __init__(self) -> None:
        angle = np.linspace(0, 2 * np.pi, self.points, endpoint=False)
        radius = 10 + 2.2 * np.sin(3 * angle) + 1.2 * np.cos(5 * angle + 1)
        self.centre = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)  # (points, 2)
        ahead = np.roll(self.centre, -1, 0) - self.centre
        length = np.hypot(*ahead.T)
        self.heading = np.arctan2(ahead[:, 1], ahead[:, 0])  # (points,) of the road

        # how fast the road turns, in radians a length, as a mean over 11 points
        bend = self.turn(np.roll(self.heading, -1) - self.heading) / length
        around = np.concatenate([bend[-5:], bend, bend[:5]])
        self.bend = np.convolve(around, np.full(11, 1 / 11), "valid")  # (points,)
        self.lap = round(length.sum() / self.speed / self.step)  # steps

    @staticmethod
    def turn(angle: np.ndarray) -> np.ndarray:
        """An angle in [-pi, pi): whole turns do not count."""
        return (angle + np.pi) % (2 * np.pi) - np.pi

    def see(self, state: np.ndarray) -> np.ndarray:
        """Views (n, 6) of states (n, 3)."""
        nearest = ((state[:, None, :2] - self.centre) ** 2).sum(2).argmin(1)  # point of the road
        road = self.heading[nearest]
        offset = state[:, :2] - self.centre[nearest]
        aside = np.cos(road) * offset[:, 1] - np.sin(road) * offset[:, 0]
        bends = [self.bend[(nearest + k) % self.points] for k in (0, 8, 16, 24)]
        return np.column_stack([aside, self.turn(state[:, 2] - road), *bends])

    @staticmethod
    def expert(views: np.ndarray) -> np.ndarray:
        """Steers with the bend, back to the middle, and along the road; (n, 6) -> (n,)."""
        aside, angle, bend = views[:, 0], views[:, 1], views[:, 3]
        return np.clip(2 * bend - 1.5 * np.arctan(1.5 * aside) - 3 * angle, -4, 4)

    def start(self, cars: int, rng: np.random.Generator) -> np.ndarray:
        """States (cars, 3) in the middle of the road, anywhere along it."""
        start = rng.integers(0, self.points, cars)
        return np.column_stack([self.centre[start], self.heading[start]])

    def move(self, state: np.ndarray, steering: np.ndarray,
             rng: np.random.Generator) -> np.ndarray:
        """The states (n, 3) after a step with a steering (n,), in gusts."""
        steering = steering + self.gust * rng.normal(size=len(state))
        heading = state[:, 2] + self.step * steering
        direction = np.column_stack([np.cos(heading), np.sin(heading)])
        position = state[:, :2] + self.step * self.speed * direction
        return np.column_stack([position, heading])

    def is_off(self, views: np.ndarray) -> np.ndarray:
        """Whether the car has left the road, for every view."""
        return np.abs(views[..., 0]) > self.half_width


# ---- a state for a planner: (distance from the middle, angle to the road, bend of the road) ------

ROAD = Road()
STEERINGS = np.array([-4.0, -2.0, 0.0, 2.0, 4.0])  # radians a second
STEPS = 100  # of an episode, ten seconds, a quarter of a lap
ASIDE = 2.0  # the grid ends here; who is farther off is off
BENDS = (-0.8, 0.4)  # of the road, from the least to the most, in radians a length


def sees(state: np.ndarray) -> np.ndarray:
    """(n, 3) of a car's states (n, 3): the first three of its view."""
    return ROAD.see(state)[:, :3]


def true_reward(view: np.ndarray) -> np.ndarray:
    """What the person wants of a step: the middle of the road (1); 0 at its edge and beyond."""
    return np.maximum(0, 1 - np.abs(view[..., 0]) / ROAD.half_width)


class Grid(Planner):
    """The car on N x N x 4 states; a step ends between eight of them. To the planner there are no
    gusts, and the road bends on as it does."""
    actions = STEERINGS

    def __init__(self, N: int = 31):
        self.N = N
        aside = np.linspace(-ASIDE, ASIDE, N)
        angle = np.linspace(-np.pi, np.pi, N, endpoint=False)
        bend = np.linspace(*BENDS, 4)
        self.states = np.stack(np.meshgrid(aside, angle, bend, indexing="ij"), -1).reshape(-1, 3)
        self.next, self.weight = self.corners(self.move(self.states[:, None], STEERINGS))

    def move(self, state: np.ndarray, action: np.ndarray) -> np.ndarray:
        """The state (..., 3) after a step."""
        aside, angle, bend = np.moveaxis(state, -1, 0)
        angle = angle + ROAD.step * (action - ROAD.speed * bend)
        aside = aside + ROAD.step * ROAD.speed * np.sin(angle)
        aside, angle, bend = np.broadcast_arrays(aside, ROAD.turn(angle), bend)
        return np.stack([aside, angle, bend], -1)

    def corners(self, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The eight grid states around a state (..., 3), as numbers (..., 8), and their weights
        (..., 8), of sum 1."""
        x = (np.clip(state[..., 0], -ASIDE, ASIDE) + ASIDE) / (2 * ASIDE) * (self.N - 1)
        y = (state[..., 1] + np.pi) / (2 * np.pi) * self.N
        z = (np.clip(state[..., 2], *BENDS) - BENDS[0]) / np.ptp(BENDS) * 3
        i = np.minimum(np.floor(x).astype(int), self.N - 2)
        j = np.floor(y).astype(int)
        k = np.minimum(np.floor(z).astype(int), 2)
        x, y, z = x - i, y - j, z - k  # within the cell, in [0, 1]
        numbers, weights = [], []
        for a, of_x in ((0, 1 - x), (1, x)):
            for b, of_y in ((0, 1 - y), (1, y)):  # the angle goes round
                for c, of_z in ((0, 1 - z), (1, z)):
                    numbers.append(((i + a) * self.N + (j + b) % self.N) * 4 + k + c)
                    weights.append(of_x * of_y * of_z)
        return np.stack(numbers, -1), np.stack(weights, -1)


def roll_out(policy: Callable[[np.ndarray], np.ndarray] | None, n: int, explore: float,
             rng: np.random.Generator, hold: float = 5) -> tuple[np.ndarray, np.ndarray]:
    """States (n, STEPS + 1, 3) and steerings (n, STEPS) of n episodes that begin in the middle of
    the road, along it. See grid.py: play."""
    move = partial(ROAD.move, rng=rng)
    return play(ROAD.start(n, rng), move, sees, policy, STEERINGS, STEPS, explore, rng, hold)


def bumps(state: np.ndarray) -> np.ndarray:
    """Features (..., 147) of states (..., 3): 7 x 7 x 3 normal bumps over distance, angle and bend,
    scaled to sum 1; beyond the last of them it is as at the last."""
    phi = np.ones((*state.shape[:-1], 1))
    for i, (low, high, count) in enumerate(((-1.5, 1.5, 7), (-1.2, 1.2, 7), (*BENDS, 3))):
        middle, apart = np.linspace(low, high, count, retstep=True)
        x = np.clip(state[..., i, None], low, high)
        of_one = np.exp(-0.5 * ((x - middle) / (0.7 * apart)) ** 2)  # (..., count)
        phi = (phi[..., :, None] * of_one[..., None, :]).reshape(*state.shape[:-1], -1)
    return phi / phi.sum(-1, keepdims=True)
