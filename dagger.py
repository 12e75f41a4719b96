"""Imitation: copying an expert, why small mistakes compound, and DAgger, which mends them.

    D <- {};  pi_1 <- any policy                 (Ross, Gordon and Bagnell 2011, Algorithm 3.1)
    for i = 1 .. N:
        pi <- expert_prob_i * expert + (1 - expert_prob_i) * pi_i
        sample T-step trajectories with pi       who acts is drawn anew at every step
        D <- D + {(s, expert(s))}                for every visited state s, whoever acted there
        train pi_{i+1} on D
    return the best pi_i on validation

Behaviour cloning is the first round alone: the expert acts, and the learner copies it.

    python dagger.py                # a bridge over water: cost against horizon, T^2 and T; 15 s
    python dagger.py --task track   # a car on a winding road: who stays on it; two minutes

Say the learner errs with probability epsilon in the states that the expert visits. After one
mistake it may be in states that the expert never visits, and err for the rest of the T steps. So
cloning costs up to epsilon T^2 more than the expert (Ross and Bagnell 2010, Theorem 2.1). DAgger
trains the learner in the states that the learner itself visits. Where a mistake can be mended at a
cost of u, it pays at most u epsilon T + O(1) (Ross et al. 2011, Theorem 2.2): choosing policies
against the states that they cause is online learning, and training on all data so far is
follow-the-leader, which has no regret.

bridge   PLANKS planks; one of ACTIONS actions is right on each. A wrong one drops you into the
         water, at one of SPOTS spots, each with one action that brings you back. A step in the
         water costs 1. The expert never falls, so it never shows what to do in the water: here
         the T^2 is real. The learner is a table that knows what it was shown and guesses the rest.
         In shallow water every action brings you back: there cloning, too, costs epsilon T.
track    A car at constant speed, in gusts; the action is the steering. The learner sees its place
         on the road and the bends ahead. It copies the steering by ridge regression on normal
         bumps around 100 of the views that it was shown; far from all of them it steers straight.

Both methods ask the expert about equally many states, because an expert's time is what costs.

Symbols: T, the horizon, steps of a trajectory; epsilon, the learner's error rate on planks; cost,
summed over T steps; labels, the number of states that the expert was asked about.

Writes  runs/dagger-<task>/ : results.jsonl, figure.png
"""
from __future__ import annotations

import common  # noqa: F401  first, so that Ctrl-C while numpy is imported is one line, too

import math
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from common.figures import figure
from common.files import check_writable, write_jsonl
from common.settings import parse, require, require_numbers, run_folder, settings
from common.statistics import mean_se, values
from common.track import Road

LABELS = {"bridge": 30_720, "track": 2960}
MOST_LABELS = {"bridge": 10**6, "track": 10**5}  # what fits into a small machine's memory
ITERATIONS = {"bridge": 10, "track": 8}
SCHEDULE = {"bridge": "linear", "track": "first"}


@settings
class Config:
    task: Literal["bridge", "track"] = "bridge"  # Task: the bridge over water, or the winding road.

    # ---- the algorithm
    labels: int = 0  # States that the expert is asked about, in all rounds together; 0 = 30,720 for
    # the bridge and 2,960 for the track. Both are also run with fewer, and the track with twice as
    # many.
    iterations: int = 0  # Rounds of DAgger; 0 = 10 for the bridge and 8 for the track.
    schedule: Literal["auto", "linear", "first"] = "auto"  # How often the expert acts: its
    # probability falls from 1 to 0 in equal steps (linear), or it acts in the first round alone
    # (first); auto = linear for the bridge, first for the track.

    # ---- the experiment
    horizon: int = 256  # Longest horizon of the bridge, in steps; the five others are its halves.
    seeds: int = 20  # Repetitions, over which intervals are computed.
    seed: int = 0  # First seed.
    out: str = ""  # Folder for rows and figure, if not one named by the settings.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="horizon seeds", from_0="labels iterations seed")
        require(64 <= self.horizon <= 10**5, f"--horizon {self.horizon}: must be from 64 to 10^5")
        require(2 <= self.seeds <= 1000, f"--seeds {self.seeds}: must be from 2 to 1000")
        require(self.task == "bridge" or self.horizon == Config.horizon,
                "--horizon: needs --task bridge")
        self.out = self.out or run_folder(self, f"dagger-{self.task}", never=("task", ))
        if self.schedule == "auto":
            self.schedule = SCHEDULE[self.task]
        self.labels = self.labels or LABELS[self.task]
        self.iterations = self.iterations or ITERATIONS[self.task]

        of_a_round = self.horizon if self.task == "bridge" else 10  # labels, at least
        least, most = of_a_round * self.iterations, MOST_LABELS[self.task]
        require(least <= most, f"--iterations {self.iterations}: must be at most "
                f"{most // of_a_round}, of {of_a_round} labels or more each")
        require(least <= self.labels <= most,
                f"--labels {self.labels}: must be from {least} to {most} for --iterations "
                f"{self.iterations}")


# ---- the mixture ---------------------------------------------------------------------------------

def schedule(config: Config, method: str) -> list[float]:
    """expert_prob_i of every round. Cloning has one round, in which the expert acts."""
    if method != "DAgger":
        return [1.0]
    if config.schedule == "first":
        return [1.0] + [0.0] * (config.iterations - 1)
    last = max(1, config.iterations - 1)
    return [1 - i / last for i in range(config.iterations)]


def mixture(own: np.ndarray, experts: np.ndarray, expert_prob: float,
            rng: np.random.Generator) -> np.ndarray:
    """The expert's action with probability expert_prob, else the learner's own; drawn at every
    state anew. own, experts: (n,) actions."""
    expert_acts = rng.random(len(own)) < expert_prob
    return np.where(expert_acts, experts, own)


# ---- the bridge ----------------------------------------------------------------------------------

PLANKS = 4000
SPOTS = 20
ACTIONS = 4
METHODS = ("cloning", "DAgger", "cloning, shallow")


class Bridge:
    """A bridge, and the water under it. States 0 .. PLANKS - 1 are planks, the SPOTS states after
    them are in the water.

    Attributes:
        right: (PLANKS + SPOTS,) the right action in each state.
        guess: (PLANKS + SPOTS,) what a learner does that has seen nothing.
    """

    def __init__(self, seed: int, stream: int = 0):
        self.rng = np.random.default_rng([seed, stream])
        self.right, self.guess = self.rng.integers(0, ACTIONS, (2, PLANKS + SPOTS))

    def roll_out(self, table: np.ndarray, expert_prob: float, walkers: int, T: int,
                 shallow: bool = False) -> np.ndarray:
        """States (walkers, T) visited by the mixture of the expert and a learner's table."""
        state = self.rng.integers(0, PLANKS, walkers)
        visited = []
        for _ in range(T):
            visited.append(state)
            action = mixture(table[state], self.right[state], expert_prob, self.rng)
            next_plank = self.rng.integers(0, PLANKS, walkers)
            next_spot = self.rng.integers(PLANKS, PLANKS + SPOTS, walkers)

            wet = state >= PLANKS
            to_plank = (action == self.right[state]) | (wet & shallow)
            to_water = np.where(wet, state, next_spot)  # who is in the water stays on the spot
            state = np.where(to_plank, next_plank, to_water)
        return np.stack(visited, 1)

    def expert(self, states: np.ndarray) -> np.ndarray:
        """What the expert does in these states."""
        return self.right[states]

    def learn(self, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """The table that makes no mistake on D: what was shown, and the guess elsewhere."""
        table = self.guess.copy()
        table[states] = actions
        return table

    def time_in_water(self, table: np.ndarray, T: int) -> float:
        """Share of the steps that a table spends in the water, on 200 walks: for validation."""
        return (self.roll_out(table, 0.0, 200, T) >= PLANKS).mean()

    def errors(self, table: np.ndarray) -> tuple[float, float]:
        """Share of the planks, and of the spots in the water, where the table is wrong."""
        wrong = table != self.right
        return wrong[:PLANKS].mean(), wrong[PLANKS:].mean()


def dagger_on_bridge(world: Bridge, expert_probs: list[float], T: int, labels: int,
                     shallow: bool = False) -> np.ndarray:
    """The table that DAgger returns after so many labels. With expert_probs [1.0] it is cloning."""
    per_round = labels // len(expert_probs)  # states to label
    walkers = math.ceil(per_round / T)
    states, actions = np.empty(0, int), np.empty(0, int)  # D, empty
    table = world.guess  # pi_1: it has seen nothing
    learners = []
    for expert_prob in expert_probs:
        # 1) the mixture of expert and learner acts for T steps
        visited = world.roll_out(table, expert_prob, walkers, T, shallow).ravel()[:per_round]
        # 2) the expert says what it does in every visited state, whoever acted there
        answers = world.expert(visited)
        # 3) these labels are added to those of all earlier rounds
        states = np.concatenate([states, visited])
        actions = np.concatenate([actions, answers])
        # 4) the next learner is trained on all of them
        table = world.learn(states, actions)
        learners.append(table)
    if len(learners) == 1:
        return table
    # 5) the best learner on validation; the latest, where several are alike
    learners.reverse()
    costs = [world.time_in_water(learner, T) for learner in learners]
    return learners[np.argmin(costs)]


def expected_cost(epsilon: float, stuck: float, T: int) -> float:
    """Expected steps in the water among T, exactly, for a table that falls from a plank with
    probability epsilon, into a spot from which it never comes back with probability `stuck`.

    For stuck = 1 it is the sum over t < T of 1 - (1 - epsilon)^t, about epsilon T^2 / 2.
    """
    on_plank = 1.0  # probabilities of the three kinds of place where a walker can be
    leaving = 0.0  # in the water, and back on a plank in the next step
    lost = 0.0  # in the water for good
    cost = 0.0
    for _ in range(T):
        cost += leaving + lost
        falls = on_plank * epsilon
        on_plank = on_plank * (1 - epsilon) + leaving
        leaving = falls * (1 - stuck)
        lost = lost + falls * stuck
    return cost


# ---- the bridge: the experiment ------------------------------------------------------------------

def bridge(config: Config) -> list[dict]:
    """Cost against horizon with equally many labels, and against labels at one horizon."""
    horizons = [config.horizon // 2**k for k in range(5, -1, -1)]
    runs = [(method, T, config.labels) for T in horizons for method in METHODS]
    half = horizons[-2]
    for labels in (config.labels // 8, config.labels // 4, config.labels // 2):
        if labels >= config.iterations * half:
            runs += [("cloning", half, labels), ("DAgger", half, labels)]

    rows = []
    for method, T, labels in tqdm(runs, "bridge"):
        for seed in range(config.seed, config.seed + config.seeds):
            rows.append(bridge_run(config, method, T, labels, seed))

    for method in METHODS:
        costs = [values(rows, "cost", method=method, horizon=T, labels=config.labels)
                 for T in horizons]
        exponent, low, high = slope(horizons, np.array(costs), config.seed)
        rows.append({"task": "bridge", "method": method, "slope": exponent, "slope_low": low,
                     "slope_high": high})
    return rows


def bridge_run(config: Config, method: str, T: int, labels: int, seed: int) -> dict:
    """Train one learner, and measure its table."""
    world = Bridge(seed, T)
    shallow = method == "cloning, shallow"
    table = dagger_on_bridge(world, schedule(config, method), T, labels, shallow)
    epsilon, stuck = world.errors(table)
    cost = expected_cost(epsilon, 0.0 if shallow else stuck, T)
    wet = world.roll_out(table, 0.0, 200, T, shallow) >= PLANKS
    return {"task": "bridge", "method": method, "horizon": T, "labels": labels, "seed": seed,
            "epsilon": epsilon, "stuck": stuck, "cost": cost,
            "rolled_out_cost": float(wet.sum(1).mean())}


def slope(horizons: list[int], costs: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Slope of the log of the mean cost in log T, with its 95% bootstrap interval over seeds.

    Args:
        costs: (horizons, seeds).
    """
    rng = np.random.default_rng(seed)
    log_T = np.log(horizons)

    def fitted(costs: np.ndarray) -> float:
        log_costs = np.log(np.maximum(costs.mean(1), 1e-12))
        return float(np.polyfit(log_T, log_costs, 1)[0])

    seeds = costs.shape[1]
    resampled = [fitted(costs[:, rng.integers(0, seeds, seeds)]) for _ in range(1000)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return fitted(costs), float(low), float(high)


def print_bridge(rows: list[dict], config: Config) -> None:
    """Cost and error rate of every method at every horizon."""
    horizons = sorted(set(values(rows, "horizon")))
    print(f"\nsteps in the water among T, {config.labels} labels, mean of {config.seeds} seeds\n")
    print(" " * 18 + "".join(f"{f'T = {T}':>18}" for T in horizons)
          + "    slope of log cost in log T")
    for method in METHODS:
        line = f"{method:18}"
        for T in horizons:
            mean, error = mean_se(
                values(rows, "cost", method=method, horizon=T, labels=config.labels))
            line += f"{mean:10.4f} ± {error:.4f}"
        fit = next(row for row in rows if row["method"] == method and "slope" in row)
        print(f"{line}    {fit['slope']:.2f} ({fit['slope_low']:.2f} to {fit['slope_high']:.2f})")
    for method in ("cloning", "DAgger"):
        line = f"{'epsilon, ' + method:18}"
        for T in horizons:
            epsilon = values(rows, "epsilon", method=method, horizon=T, labels=config.labels)
            line += f"{np.mean(epsilon):18.5f}"
        print(line)
    print("The expert's cost is 0. Theory: at most epsilon T^2; at most epsilon T where every fall "
          "is mended in one step.")


def draw_bridge(rows: list[dict], config: Config, path: Path) -> None:
    """Cost against horizon with the bounds; cost against labels; who is in the water when."""
    half = config.horizon // 2
    with figure(path, 4, width=5) as (_, (by_horizon, by_labels, *walks)):
        for method in METHODS:
            exponent, = values(rows, "slope", method=method)
            name = f"{method}: slope {exponent:.2f}"
            color = draw_means(by_horizon, rows, "horizon", "cost", name, method=method,
                               labels=config.labels)
            if method == "cloning, shallow":
                continue
            power = 2 if method == "cloning" else 1
            horizons = sorted(set(values(rows, "horizon", method=method)))
            bound = [T**power * np.mean(values(rows, "epsilon", method=method, horizon=T,
                                               labels=config.labels)) for T in horizons]
            name = r"bound $\epsilon T^2$" if power == 2 else r"bound $\epsilon T$"
            by_horizon.plot(horizons, bound, ":", color=color, label=name)
            draw_means(by_labels, rows, "labels", "cost", method, method=method, horizon=half)
        by_horizon.set(yscale="log", xlabel="horizon T", ylabel="steps in the water",
                       title=f"{config.labels:,} labels")
        by_labels.set(yscale="log", xlabel="labels", ylabel="steps in the water",
                      title=f"horizon {half}: what an expert's effort buys")
        by_horizon.legend(fontsize=8)
        by_labels.legend(fontsize=8)

        few = config.labels // 4
        for axis, method in zip(walks, ("cloning", "DAgger")):
            world = Bridge(config.seed, config.horizon)
            table = dagger_on_bridge(world, schedule(config, method), config.horizon, few)
            wet = world.roll_out(table, 0.0, 100, config.horizon) >= PLANKS
            axis.imshow(wet, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xlabel="step", ylabel="walker",
                     title=f"{method}, {few:,} labels: in the water (blue)")


def draw_means(axis, rows: list[dict], over: str, name: str, label: str, **where: object) -> str:
    """Mean of a field over seeds against another field, with 95% intervals; returns its color."""
    x = sorted(set(values(rows, over, **where)))
    mean, error = mean_se(np.array([values(rows, name, **where, **{over: at}) for at in x]))
    line = axis.errorbar(x, mean, 1.96 * error, fmt="o-", capsize=3, markersize=4, label=label)[0]
    axis.set_xscale("log")
    axis.set_xticks(x, [f"{at:,}" for at in x])
    axis.minorticks_off()
    return line.get_color()


# ---- the track -----------------------------------------------------------------------------------

class Track(Road):
    """The road of common/track.py, with learners who drive on it."""

    def drive(self, driver: Driver, cars: int, T: int, expert_prob: float,
              rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """States (cars, T, 3) and views (cars, T, 6) of the mixture of expert and driver.

        The cars start in the middle of the road, anywhere along it.
        """
        state = self.start(cars, rng)
        states, views = [], []
        for _ in range(T):
            view = self.see(state)
            states.append(state)
            views.append(view)
            steering = mixture(driver.steer(view), self.expert(view), expert_prob, rng)
            state = self.move(state, steering, rng)
        return np.stack(states, 1), np.stack(views, 1)

    def time_off(self, driver: Driver, rng: np.random.Generator) -> float:
        """Share of the steps that a driver is off the road, on 10 laps: for validation."""
        _, views = self.drive(driver, 10, self.lap, 0.0, rng)
        return self.is_off(views).mean()


WIDTHS = np.array([0.5, 0.3, 0.2, 0.2, 0.2, 0.2])  # of the bumps, in the units of a view


class Driver(NamedTuple):
    """A learner of the track: a weighted sum of normal bumps. Far from all of them it is 0."""
    centres: np.ndarray  # (bumps, 6) views, in units of WIDTHS
    weights: np.ndarray  # (bumps,)

    def features(self, views: np.ndarray) -> np.ndarray:
        """(n, bumps): exp(-|view - centre|^2 / 2), for views (n, 6) in units of WIDTHS."""
        squares = ((views**2).sum(1)[:, None] + (self.centres**2).sum(1)
                   - 2 * views @ self.centres.T)
        return np.exp(-np.maximum(squares, 0) / 2)

    def steer(self, views: np.ndarray) -> np.ndarray:
        """The steering (n,) for views (n, 6)."""
        return self.features(views / WIDTHS) @ self.weights


STRAIGHT_ON = Driver(np.empty((0, 6)), np.empty(0))  # it has no bumps


def ridge(views: np.ndarray, steering: np.ndarray, rng: np.random.Generator,
          bumps: int = 100) -> Driver:
    """Ridge regression of steering (n,) on bumps around some of the views (n, 6)."""
    views = views / WIDTHS
    centres = views[rng.choice(len(views), min(bumps, len(views)), replace=False)]
    phi = Driver(centres, np.zeros(len(centres))).features(views)  # (n, bumps)
    weights = np.linalg.solve(phi.T @ phi + 1e-2 * np.eye(len(centres)), phi.T @ steering)
    return Driver(centres, weights)


def dagger_on_track(road: Track, expert_probs: list[float], labels: int,
                    rng: np.random.Generator) -> Driver:
    """The driver that DAgger returns after so many labels. With expert_probs [1.0] it is cloning.

    The same five steps as on the bridge.
    """
    per_round = labels // len(expert_probs)  # views to label
    T = min(per_round, road.lap)
    cars = math.ceil(per_round / T)
    views, steering = np.empty((0, 6)), np.empty(0)  # D, empty
    driver = STRAIGHT_ON  # pi_1
    learners = []
    for expert_prob in expert_probs:
        # 1) the mixture of expert and learner drives for T steps
        _, seen = road.drive(driver, cars, T, expert_prob, rng)  # (cars, T, 6)
        seen = seen.reshape(-1, 6)[:per_round]
        # 2) the expert says how it would steer, whoever drove there
        answers = road.expert(seen)
        # 3) these labels are added to those of all earlier rounds
        views = np.concatenate([views, seen])
        steering = np.concatenate([steering, answers])
        # 4) the next learner is trained on all of them
        driver = ridge(views, steering, rng)
        learners.append(driver)
    if len(learners) == 1:
        return driver
    # 5) the best learner on validation; the latest, where several are alike
    learners.reverse()
    costs = [road.time_off(learner, rng) for learner in learners]
    return learners[np.argmin(costs)]


# ---- the track: the experiment -------------------------------------------------------------------

def track(config: Config) -> list[dict]:
    """Laps without leaving the road, against the number of labels."""
    road = Track()
    sizes = [config.labels // 4, config.labels // 2, config.labels, config.labels * 2]
    sizes = [labels for labels in sizes if labels >= 10 * config.iterations]
    rows = []
    for labels in tqdm(sizes, "track"):
        for seed in range(config.seed, config.seed + config.seeds):
            for method in ("cloning", "DAgger"):
                _, views = track_run(config, road, method, labels, seed)
                off = road.is_off(views)  # (cars, steps of a lap)
                rows.append({"task": "track", "method": method, "labels": labels, "seed": seed,
                             "laps": float(1 - off.any(1).mean()), "time_off": float(off.mean())})
    return rows


def track_run(config: Config, road: Track, method: str, labels: int,
              seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Train one driver, and let it drive 20 laps: states (20, T, 3) and views (20, T, 6)."""
    rng = np.random.default_rng([seed, labels])
    driver = dagger_on_track(road, schedule(config, method), labels, rng)
    return road.drive(driver, 20, road.lap, 0.0, np.random.default_rng([seed, 1]))


def print_track(rows: list[dict], config: Config) -> None:
    """Laps on the road of both methods, for every number of labels."""
    sizes = sorted(set(values(rows, "labels")))
    print(f"\nlaps without leaving the road, mean of {config.seeds} seeds; the expert leaves it on "
          "none\n")
    print(f"{'labels':12}" + "".join(f"{labels:>16}" for labels in sizes))
    for method in ("cloning", "DAgger"):
        line = f"{method:12}"
        for labels in sizes:
            mean, error = mean_se(values(rows, "laps", method=method, labels=labels))
            line += f"{mean:10.0%} ± {error:3.0%}"
        print(line)


def draw_track(rows: list[dict], config: Config, path: Path) -> None:
    """The lines that both methods drive, and their laps against the labels."""
    road = Track()
    left = np.stack([-np.sin(road.heading), np.cos(road.heading)], 1) * road.half_width
    edges = [road.centre + left, road.centre - left]
    with figure(path, 3, width=5) as (_, (*maps, laps)):
        for axis, method in zip(maps, ("cloning", "DAgger")):
            for edge in edges:
                closed = np.vstack([edge, edge[:1]])
                axis.plot(closed[:, 0], closed[:, 1], color="black", linewidth=0.8)
            states, _ = track_run(config, road, method, config.labels, config.seed)
            for line in states[:8]:
                axis.plot(line[:, 0], line[:, 1], linewidth=0.8)
            axis.set(aspect="equal", xlim=(-17, 17), ylim=(-17, 17),
                     title=f"{method}, {config.labels:,} labels")
            draw_means(laps, rows, "labels", "laps", method, method=method)
        laps.set(xlabel="labels", ylabel="laps on the road", ylim=(0, 1.05))
        laps.legend()


def main(config: Config) -> None:
    """Run a task, write its rows and its figure, and print its table."""
    folder = Path(config.out)
    check_writable(folder)
    rows_file, figure_file = folder / "results.jsonl", folder / "figure.png"
    if config.task == "bridge":
        rows = bridge(config)
        write_jsonl(rows_file, rows)
        draw_bridge(rows, config, figure_file)
        print_bridge(rows, config)
    else:
        rows = track(config)
        write_jsonl(rows_file, rows)
        draw_track(rows, config, figure_file)
        print_track(rows, config)
    print(f"\nrows and figure  ->  {folder}")


if __name__ == "__main__":
    main(parse(Config, __doc__))
