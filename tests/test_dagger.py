"""dagger.py: both loops against Algorithm 3.1 line by line, the bridge against a Markov chain and
its rules step by step, the track against geometry, ridge regression against least squares, and each
result in small.
"""
import json
import math
import subprocess
import sys

import numpy as np
import pytest

import clone
import dagger
from common.settings import parse
from dagger import (ACTIONS, PLANKS, SPOTS, STRAIGHT_ON, WIDTHS, Bridge, Config, Driver, Track,
                    dagger_on_bridge, dagger_on_track, expected_cost, mixture, ridge)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def road():
    return Track()


def error(p, n):
    """Four standard errors of a frequency."""
    return 4 * math.sqrt(p * (1 - p) / n)


# ---- the algorithm -------------------------------------------------------------------------------

def test_it_needs_numpy_only():
    """Neither torch nor another algorithm file is loaded."""
    program = "import dagger, sys; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], cwd=clone.ROOT, text=True, check=True,
                           capture_output=True, env=clone.environment()).stdout.split()
    scripts = {path.stem for path in clone.ROOT.glob("*.py")} - {"dagger"}
    assert "dagger" in found and not ({"torch", "matplotlib"} | scripts) & set(found)


def test_the_experts_share_falls_as_scheduled():
    for n in (1, 2, 7, 10):
        linear, first = (dagger.schedule(Config(iterations=n, schedule=s), "DAgger")
                         for s in ("linear", "first"))
        assert np.allclose(linear, np.linspace(1, 0, n), atol=1e-15)
        assert first == [1.0] + [0.0] * (n - 1)
        assert dagger.schedule(Config(iterations=n), "cloning") == [1.0]
    assert Config().schedule == "linear" and Config(task="track").schedule == "first"


def test_the_mixture_acts_at_its_rate_at_every_state_anew(rng):
    n = 40_000
    own, experts = np.zeros(n), np.ones(n)
    assert np.array_equal(mixture(own, experts, 0.0, rng), own)
    assert np.array_equal(mixture(own, experts, 1.0, rng), experts)
    a, b = (mixture(own, experts, 0.3, rng) for _ in range(2))
    assert abs(a.mean() - 0.3) < error(0.3, n) and abs(b.mean() - 0.3) < error(0.3, n)
    assert abs((a * b).mean() - 0.09) < error(0.09, n)  # from call to call
    assert abs((a[1:] * a[:-1]).mean() - 0.09) < error(0.09, n)  # and from state to state


def recorded_bridge(monkeypatch, probs, labels):
    """What the loop returned, and all that it did: who acted, what was learned from, what came of
    it, and the validations."""
    acted, learned, validated = [], [], []
    roll_out, learn = Bridge.roll_out, Bridge.learn

    def spy_roll_out(self, table, prob, walkers, T, shallow=False):
        states = roll_out(self, table, prob, walkers, T, shallow)
        acted.append((table, prob, states))
        return states

    def spy_learn(self, states, actions):
        table = learn(self, states, actions)
        learned.append((states, actions, table))
        return table

    def spy_validate(self, table, T):
        validated.append((table, costs[len(learned) - 1 - len(validated)]))
        return validated[-1][1]

    monkeypatch.setattr(Bridge, "roll_out", spy_roll_out)
    monkeypatch.setattr(Bridge, "learn", spy_learn)
    monkeypatch.setattr(Bridge, "time_in_water", spy_validate)
    world, costs = Bridge(1), [3.0, 1.0, 1.0]
    best = dagger_on_bridge(world, probs, 40, labels)
    return best, world.guess, acted, learned, validated, lambda states: world.right[states]


def recorded_track(monkeypatch, probs, labels):
    """The same of the track."""
    acted, learned, validated = [], [], []
    drive, fit = Track.drive, dagger.ridge

    def spy_drive(self, driver, cars, T, prob, rng):
        states, views = drive(self, driver, cars, T, prob, rng)
        acted.append((driver, prob, views))
        return states, views

    def spy_ridge(views, steering, rng):
        driver = fit(views, steering, rng)
        learned.append((views, steering, driver))
        return driver

    def spy_validate(self, driver, rng):
        validated.append((driver, costs[len(learned) - 1 - len(validated)]))
        return validated[-1][1]

    monkeypatch.setattr(Track, "drive", spy_drive)
    monkeypatch.setattr(dagger, "ridge", spy_ridge)
    monkeypatch.setattr(Track, "time_off", spy_validate)
    road, costs = Track(), [3.0, 1.0, 1.0]
    best = dagger_on_track(road, probs, labels, np.random.default_rng(0))
    return best, STRAIGHT_ON, acted, learned, validated, road.expert


@pytest.mark.parametrize("recorded", [recorded_bridge, recorded_track])
def test_every_round_asks_where_it_went_and_learns_from_all_rounds(recorded, monkeypatch):
    """Algorithm 3.1 line by line: who acts, who is asked where, what is learned from; it is the
    learners that are validated, and not the mixtures."""
    probs = [1.0, 0.4, 0.0]
    best, first, acted, learned, validated, expert = recorded(monkeypatch, probs, 300)
    learners = [learner for _, _, learner in learned]
    assert [prob for _, prob, _ in acted] == probs
    assert all(who is pi for (who, _, _), pi in zip(acted, [first, *learners[:2]], strict=True))
    for i, (states, labels, _) in enumerate(learned, 1):  # 100 of each round so far
        visited = [seen.reshape(-1, *states.shape[1:])[:100] for _, _, seen in acted[:i]]
        assert np.array_equal(states, np.concatenate(visited))
        assert np.array_equal(labels, expert(states))
    assert all(who is pi for (who, _), pi in zip(validated, learners[::-1], strict=True))


@pytest.mark.parametrize("recorded", [recorded_bridge, recorded_track])
def test_of_equals_the_latest_is_returned_and_one_round_is_cloning(recorded, monkeypatch):
    best, _, _, learned, _, _ = recorded(monkeypatch, [1.0, 0.0, 0.0], 300)  # costs 3, 1, 1
    assert best is learned[2][2]
    with pytest.MonkeyPatch.context() as patch:
        best, _, acted, learned, validated, _ = recorded(patch, [1.0], 300)
    assert len(learned) == 1 and best is learned[0][2] and not validated
    assert [prob for _, prob, _ in acted] == [1.0] and len(learned[0][0]) == 300


# ---- the bridge ----------------------------------------------------------------------------------

def partly_wrong(world, planks, spots):
    """A table with this share of planks and of spots wrong."""
    wrong = np.concatenate([np.arange(PLANKS) < planks * PLANKS, np.arange(SPOTS) < spots * SPOTS])
    return np.where(wrong, (world.right + 1) % ACTIONS, world.right)


@pytest.mark.parametrize("shallow", [False, True])
def test_a_walk_follows_the_rules_step_by_step(shallow):
    """The right action leads to a plank, also from the water; the wrong one into the water, where
    it keeps you on the spot, unless the water is shallow."""
    world, happened = Bridge(3), set()
    table = partly_wrong(world, 0.3, 0.5)
    for walk in world.roll_out(table, 0.0, 100, 40, shallow):
        assert walk[0] < PLANKS
        for state, after in zip(walk, walk[1:]):
            wet, right = state >= PLANKS, table[state] == world.right[state]
            if right or wet and shallow:
                assert after < PLANKS
            elif wet:
                assert after == state
            else:
                assert PLANKS <= after < PLANKS + SPOTS
            happened.add((wet, right))
    assert len(happened) == 4


def test_the_expert_never_falls_and_asked_now_and_then_it_mends_falls():
    """Whatever the table knows. Of a learner that is always wrong a mixture falls, stays and
    returns at the expert's rate."""
    world = Bridge(0)
    wrong = partly_wrong(world, 1.0, 1.0)
    assert (world.roll_out(wrong, 1.0, 200, 100) < PLANKS).all()
    wet = world.roll_out(wrong, 0.7, 2000, 60) >= PLANKS
    for before in (False, True):
        now = ~wet[:, 1:-1][wet[:, :-2] == before]
        again = now & ~wet[:, 2:][wet[:, :-2] == before]
        assert abs(now.mean() - 0.7) < error(0.7, now.size)
        assert abs(again.mean() - 0.49) < error(0.49, again.size)


def test_a_table_knows_what_it_was_shown_and_guesses_elsewhere(rng):
    """And the guess is one among the actions."""
    world = Bridge(1)
    states = rng.integers(0, PLANKS + SPOTS, 2000)
    table, shown = world.learn(states, world.expert(states)), set(states.tolist())
    for s in range(PLANKS + SPOTS):
        assert table[s] == (world.right[s] if s in shown else world.guess[s])
    wrong = [table[s] != world.right[s] for s in range(PLANKS + SPOTS)]
    on_planks, in_water = world.errors(table)
    assert on_planks == pytest.approx(sum(wrong[:PLANKS]) / PLANKS)
    assert in_water == pytest.approx(sum(wrong[PLANKS:]) / SPOTS)
    assert abs(world.errors(world.guess)[0] - 1 + 1 / ACTIONS) < error(1 / ACTIONS, PLANKS)


def test_expected_cost_is_that_of_the_markov_chain():
    """Powers of its matrix; with no way back sum_t 1 - (1 - epsilon)^t, t = 0 .. T - 1, since a
    walk begins on a plank."""
    for epsilon, stuck, T in ((0.1, 0.3, 1), (0.02, 0.0, 50), (0.3, 0.9, 37), (1.0, 0.5, 10),
                              (0.0, 1.0, 9), (0.01, 1.0, 200)):
        chain = np.array([[1 - epsilon, epsilon * (1 - stuck), epsilon * stuck],
                          [1, 0, 0],
                          [0, 0, 1]])
        by_powers = sum(np.linalg.matrix_power(chain, t)[0, 1:].sum() for t in range(T))
        assert expected_cost(epsilon, stuck, T) == pytest.approx(by_powers, rel=1e-12, abs=1e-15)
        never_back = sum(1 - (1 - epsilon)**t for t in range(T))
        assert expected_cost(epsilon, 1.0, T) == pytest.approx(never_back, rel=1e-12, abs=1e-12)


def test_expected_cost_is_that_of_walks():
    world, T = Bridge(5), 60
    for planks, spots, shallow in ((0.02, 0.3, False), (0.1, 0.0, False), (0.005, 1.0, False),
                                   (0.1, 1.0, True)):
        table = partly_wrong(world, planks, spots)
        cost = (world.roll_out(table, 0.0, 4000, T, shallow) >= PLANKS).sum(1)
        epsilon, stuck = world.errors(table)
        expected = expected_cost(epsilon, 0.0 if shallow else stuck, T)
        assert abs(cost.mean() - expected) < 4 * cost.std() / math.sqrt(len(cost))


def test_the_cost_is_within_the_theorems_and_of_their_order(rng):
    """At most epsilon T^2, and epsilon T where each fall is mended in a step. For small epsilon
    half of it, and all of it."""
    for epsilon, stuck, T in zip(10 ** rng.uniform(-6, 0, 300), rng.random(300),
                                 rng.integers(1, 300, 300)):
        assert 0 <= expected_cost(epsilon, stuck, T) <= epsilon * T**2
        assert expected_cost(epsilon, 0.0, T) <= epsilon * T
    assert expected_cost(1e-8, 1.0, 1000) == pytest.approx(1e-8 * 1000 * 999 / 2, rel=1e-4)
    assert expected_cost(1e-8, 0.0, 1000) == pytest.approx(1e-8 * 999, rel=1e-4)


def test_the_slope_is_the_exponent():
    """Exactly, without noise. With noise the least-squares slope of the logs of the means, and the
    interval mostly holds it."""
    T, seeds = np.array([4, 8, 16, 32, 64]), np.array([0.5, 1.0, 3.0])
    held = 0
    for p in (1.0, 2.0):
        exact = dagger.slope(list(T), np.outer(T**p, seeds), 0)
        assert exact == pytest.approx((p, p, p), abs=1e-9)
        for k in range(6):
            noise = np.random.default_rng(k).lognormal(0, 0.5, (5, 20))
            costs = 0.01 * T[:, None] ** p * noise
            found, low, high = dagger.slope(list(T), costs, k)
            x, y = (z - z.mean() for z in (np.log(T), np.log(costs.mean(1))))
            assert found == pytest.approx((x @ y) / (x @ x), abs=1e-9)
            assert low < found < high < low + 0.8
            held += low < p < high
    assert held >= 10


SMALL = {"horizon": 128, "labels": 15_360, "seeds": 3}


@pytest.fixture(scope="module")
def small():
    return dagger.bridge(Config(**SMALL))


def test_cloning_pays_by_the_square_of_the_horizon_and_dagger_in_proportion(small):
    """The result. Shallow water shows that it is the lasting fall which costs T^2: cloning pays
    there as DAgger does."""
    slopes = {row["method"]: row["slope"] for row in small if "slope" in row}
    assert 1.9 < slopes["cloning"] < 2.1
    assert 0.9 < slopes["DAgger"] < 1.2 and 0.9 < slopes["cloning, shallow"] < 1.2
    rows = [row for row in small if "cost" in row]
    cloning, daggers = (np.mean(dagger.values(rows, "cost", method=m, horizon=128, labels=15_360))
                        for m in ("cloning", "DAgger"))
    assert cloning > 10 * daggers
    for row in rows:
        power = 1 if row["method"] == "cloning, shallow" else 2
        assert row["cost"] <= row["epsilon"] * row["horizon"] ** power
        if row["method"] == "cloning":  # nobody showed it what to do in the water
            world = Bridge(row["seed"], row["horizon"])
            assert row["stuck"] == world.errors(world.guess)[1]
    difference = np.array([row["rolled_out_cost"] - row["cost"] for row in rows])
    assert abs(difference.sum()) < 4 * np.sqrt((difference**2).sum())


def test_the_expert_is_asked_as_often_as_the_rows_say(monkeypatch):
    """Also where a round is no multiple of the horizon: 127 labels are two walkers of 64 steps less
    a step, not one walker."""
    asked, expert = [], Bridge.expert

    def counted(self, states):
        asked.append(states.size)
        return expert(self, states)
    monkeypatch.setattr(Bridge, "expert", counted)
    for probs, labels in (([1.0], 1270), ([1.0, 0.5] + 8 * [0.0], 1270)):
        asked.clear()
        dagger_on_bridge(Bridge(0), probs, 64, labels)
        assert asked == [labels // len(probs)] * len(probs) and sum(asked) == labels


def test_with_the_schedule_first_the_early_labels_are_spent_in_the_water(monkeypatch):
    """The first walks of a learner's own end there; with the linear schedule the expert brings it
    back."""
    wet, expert = [], Bridge.expert

    def spy(self, states):
        wet.append((states >= PLANKS).mean())
        return expert(self, states)
    monkeypatch.setattr(Bridge, "expert", spy)
    for name in ("first", "linear"):
        probs = dagger.schedule(Config(schedule=name), "DAgger")
        dagger_on_bridge(Bridge(0, 256), probs, 256, 30_720)
    assert len(wet) == 20 and wet[0] == wet[10] == 0
    assert min(wet[1:3]) > 0.9 and max(wet[11:]) < 0.1


def test_two_runs_are_alike_and_leave_rows_and_a_figure(small, tmp_path):
    flags = [x for name, value in SMALL.items() for x in ("--" + name, str(value))]
    done = subprocess.run([sys.executable, clone.ROOT / "dagger.py", *flags], cwd=tmp_path,
                          text=True, capture_output=True, env=clone.environment())
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
    folder = tmp_path / Config(**SMALL).out  # named by what is no default
    assert folder.name.startswith("dagger-bridge-") and len(SMALL) == folder.name.count("-") - 1
    assert sorted(path.name for path in folder.iterdir()) == ["figure.png", "results.jsonl"]
    written = (folder / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == small
    assert (folder / "figure.png").stat().st_size > 20_000


# ---- the track -----------------------------------------------------------------------------------

class AlwaysSteers(Driver):
    """A driver that steers by 100, whatever it sees."""

    def steer(self, views):
        return np.full(len(views), 100.0)


def test_the_driver_sees_where_it_is_and_the_bends_ahead(road):
    """The road runs counter-clockwise round the origin, so that left is inside. A bend is a mean
    over 11 points of how far the road turns at them for each length. Whole turns of the car do not
    show."""
    def bend(i):
        j, k = i % 600, (i + 1) % 600
        turned = math.remainder(road.heading[k] - road.heading[j], math.tau)
        return turned / math.dist(road.centre[j], road.centre[k])

    at, d = np.arange(0, 600, 7), 0.4
    h = road.heading[at]
    bends = [[np.mean([bend(i + k + shift) for shift in range(-5, 6)]) for k in (0, 8, 16, 24)]
             for i in at]
    inside = np.hypot(*road.centre[at].T)
    for side in (0, d, -d):
        place = road.centre[at] + side * np.stack([-np.sin(h), np.cos(h)], 1)
        for whole in (0, 4, -3):
            seen = road.see(np.column_stack([place, h + 0.2 + math.tau * whole]))
            assert np.allclose(seen[:, 0], side) and np.allclose(seen[:, 1], 0.2)
            assert np.allclose(seen[:, 2:], bends)
        assert not side or ((np.hypot(*place.T) < inside) == (side > 0)).all()


def test_cars_start_in_the_middle_keep_their_speed_and_are_steered_in_gusts(road, rng):
    """A learner that steers by 100 tells who acted: a share of steps, and the rest is the expert's
    steering and the gusts."""
    states, views = road.drive(AlwaysSteers(*STRAIGHT_ON), 300, 40, 0.6, rng)
    assert np.allclose(views[:, 0, :2], 0)
    assert all(np.array_equal(views[:, t], road.see(states[:, t])) for t in range(40))
    assert np.allclose(np.hypot(*np.diff(states[..., :2], axis=1).T), 0.2)
    steering = (np.diff(states[..., 2], axis=1) / 0.1).ravel()
    learners = steering > 50
    right = road.expert(views[:, :-1].reshape(-1, 6))
    gusts = steering - np.where(learners, 100, right)
    n = gusts.size
    assert abs(learners.mean() - 0.4) < error(0.4, n)
    assert abs(gusts.mean()) < 4 * 0.3 / math.sqrt(n)
    assert abs(gusts.std() / 0.3 - 1) < 4 / math.sqrt(2 * n)


def test_the_expert_stays_on_the_road_for_a_lap_and_straight_on_leaves_it(road, rng):
    states, views = road.drive(STRAIGHT_ON, 20, road.lap, 1.0, rng)
    assert (np.abs(views[..., 0]) < road.half_width).all()
    angle = np.unwrap(np.arctan2(states[..., 1], states[..., 0]), axis=1)
    assert np.allclose(angle[:, -1] - angle[:, 0], math.tau, rtol=0.05)
    _, views = road.drive(STRAIGHT_ON, 20, road.lap, 0.0, rng)
    assert (np.abs(views[..., 0]) > road.half_width).any(1).all()


def driven(road, cars, T, prob, rng):
    """Views (cars * T, 6)."""
    return road.drive(STRAIGHT_ON, cars, T, prob, rng)[1].reshape(-1, 6)


def test_ridge_is_least_squares_on_bumps(road, rng):
    """Of the system with sqrt(0.01) I under it, the bumps computed one by one."""
    shown = np.concatenate([driven(road, 3, 20, prob, rng) for prob in (1.0, 0.3)])
    steering = road.expert(shown)
    driver = ridge(shown, steering, np.random.default_rng(4), 30)
    centres = shown[np.random.default_rng(4).choice(120, 30, replace=False)]

    def phi(views):
        return np.array([[math.exp(-sum(((a - b) / w) ** 2 for a, b, w in zip(v, c, WIDTHS)) / 2)
                          for c in centres] for v in views])
    system = np.vstack([phi(shown), 0.1 * np.eye(30)])
    weights = np.linalg.lstsq(system, np.append(steering, np.zeros(30)), rcond=None)[0]
    views = driven(road, 2, 15, 0.5, rng)
    assert np.allclose(driver.steer(views), phi(views) @ weights, atol=1e-8)


def test_ridge_knows_what_it_was_shown_and_steers_straight_on_elsewhere(road, rng):
    """Views far apart each have a bump of their own: the weight that minimises
    (y - w)^2 + 0.01 w^2 is y / 1.01. Along the road it steers as the expert does, the better the
    more bumps there are."""
    views, steering = 10 * np.arange(8)[:, None] * np.ones(6), rng.normal(size=8)
    driver = ridge(views, steering, rng)
    assert np.allclose(driver.steer(views), steering / 1.01, atol=1e-12)
    assert np.allclose(driver.steer(views + 5), 0, atol=1e-12)
    assert not STRAIGHT_ON.steer(views).any()
    shown, new = (driven(road, 8, road.lap, 1.0, rng) for _ in range(2))
    right = road.expert(new)
    wrong = []
    for bumps in (25, 100, 400):
        copy = ridge(shown, road.expert(shown), rng, bumps)
        wrong.append((copy.steer(new) - right).std() / right.std())
    assert wrong[0] > wrong[1] > wrong[2] and wrong[2] < 0.15


def test_where_the_copy_leaves_the_road_dagger_brings_it_back(road):
    """The result: as many labels for both; the expert shows nothing but the middle of the road,
    DAgger what to do at its edges."""
    laps = {}
    for method in ("cloning", "DAgger"):
        _, views = dagger.track_run(Config(task="track"), road, method, 1480, 0)
        assert np.array_equal(road.is_off(views), np.abs(views[..., 0]) > 1)
        laps[method] = 1 - road.is_off(views).any(1).mean()
    assert laps["DAgger"] > 0.9 and laps["cloning"] < 0.7


def test_the_track_leaves_rows_and_a_figure(tmp_path):
    dagger.main(Config(task="track", labels=20, iterations=2, seeds=2, out=str(tmp_path)))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {(row["labels"], row["method"], row["seed"]) for row in rows} == {
        (labels, method, seed) for labels in (20, 40)  # with 10 there would be less than 10 a round
        for method in ("cloning", "DAgger") for seed in (0, 1)}
    assert (tmp_path / "figure.png").stat().st_size > 20_000


# ---- settings ------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments", [
    "--horizon 0", "--horizon 63", "--horizon 100001", "--horizon 64 --task track",
    "--labels 2559", "--labels -1", "--labels 79 --task track", "--labels 1000001",
    "--labels 100001 --task track", "--labels 1000000000000", "--iterations -1",
    "--iterations 4000", "--iterations 10001 --task track", "--seeds 1", "--seeds 1001",
    "--seed x", "--seed -1", "--task boat", "--schedule cosine"])
def test_a_bad_setting_is_one_line(arguments):
    """One of 63's halves is a horizon of 1, at which there is nothing to lose: the log of that cost
    would make the slope 5. What would fill the memory is refused, too."""
    with pytest.raises(SystemExit) as stopped:
        parse(Config, "", arguments.split())
    message = str(stopped.value)
    assert message.startswith("error: ") and arguments.split()[0] in message
    assert "\n" not in message


def test_a_folder_that_cannot_be_written_stops_it_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="^error: .*file/below: cannot be written"):
        dagger.main(Config(out=str(tmp_path / "file/below")))


def test_the_least_and_the_largest_settings_are_accepted():
    for arguments in ("--horizon 64", "--labels 2560", "--labels 80 --task track",
                      "--labels 1000000 --horizon 100000", "--seeds 1000",
                      "--labels 100000 --task track"):
        parse(Config, "", arguments.split())
