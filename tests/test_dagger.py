"""dagger.py: the algorithm with stubs that keep a record, the bridge against a Markov chain and its rules step by step, the
track against geometry, ridge regression against least squares, distillation against enumeration, and each result in small.
"""
import functools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clone
import dagger
from common import tasks
import evaluate
from clone import root  # noqa: F401  (a fixture)
from common.settings import parse
from common.training import generator
from conftest import every_response, naive_logprobs, tiny_gpt
from dagger import A, M, W, Bridge, Config, Track, expected_cost, mixture
from common.run import load_run
from model import generate, response_logprobs


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def error(p, n):
    """Four standard errors of a frequency."""
    return 4 * math.sqrt(p * (1 - p) / n)


# ---- the algorithm ---------------------------------------------------------------------------------------------------

def test_the_experts_share_falls_as_scheduled():
    for n, prob in ((1, 1.0), (2, 0.7), (7, 1.0), (10, 0.3)):
        linear, exponential, first = (Config(iterations=n, schedule=s, expert_prob=prob).expert_probs()
                                      for s in ("linear", "exponential", "first"))
        assert np.allclose(linear, prob * np.linspace(1, 0, n), atol=1e-15)
        assert exponential[0] == prob and all(b == a / 2 for a, b in zip(exponential, exponential[1:]))
        assert first == [prob] + [0.0] * (n - 1)
    assert Config().schedule == "linear" and Config(task="track").schedule == Config(task="distill").schedule == "first"


@pytest.mark.parametrize("width", [None, 3])
def test_the_mixture_acts_at_its_rate_at_every_state_anew(width, rng):
    """One draw a state, whatever an action consists of, and none that depends on the one before."""
    n = 40_000
    own, experts = np.zeros((n, width) if width else n), np.ones((n, width) if width else n)
    assert np.array_equal(mixture(own, experts, 0.0, rng), own) and np.array_equal(mixture(own, experts, 1.0, rng), experts)
    a, b = (mixture(own, experts, 0.3, rng).reshape(n, -1) for _ in range(2))
    assert a.shape == (n, width or 1) and set(a.ravel()) == {0.0, 1.0} and (a == a[:, :1]).all()
    a, b = a[:, 0], b[:, 0]
    assert abs(a.mean() - 0.3) < error(0.3, n) and abs(b.mean() - 0.3) < error(0.3, n)
    assert abs((a * b).mean() - 0.09) < error(0.09, n) and abs((a[1:] * a[:-1]).mean() - 0.09) < error(0.09, n)


def recorded(probs, costs):
    """A run of dagger() whose learners are "pi1", "pi2", ..., and all that it asked for."""
    seen = {"rolled": [], "asked": [], "data": [], "from": [], "costed": []}

    def roll_out(learner, prob):
        seen["rolled"].append((learner, prob))
        return [f"state {len(seen['rolled'])}{x}" for x in "ab"]

    def expert(states):
        seen["asked"].append(states)
        return ["right in " + state for state in states]

    def learn(D, learner):
        seen["data"].append(list(D))
        seen["from"].append(learner)
        return f"pi{len(D) + 1}"

    def cost(learner):
        seen["costed"].append(learner)
        return costs[learner]
    return dagger.dagger(probs, roll_out, expert, learn, cost, "pi1"), seen


def test_every_round_asks_where_it_went_and_learns_from_all_rounds():
    """Algorithm 3.1 line by line: who acts, who is asked, what is learned from; the validated are learners, not mixtures."""
    best, seen = recorded([1.0, 0.4, 0.0], {"pi2": 3.0, "pi3": 1.0, "pi4": 2.0})
    assert best == "pi3"
    assert seen["rolled"] == [("pi1", 1.0), ("pi2", 0.4), ("pi3", 0.0)] and seen["from"] == ["pi1", "pi2", "pi3"]
    rounds = [[f"state {i}a", f"state {i}b"] for i in (1, 2, 3)]
    assert seen["asked"] == rounds
    labelled = [(states, ["right in " + state for state in states]) for states in rounds]
    assert seen["data"] == [labelled[:1], labelled[:2], labelled]
    assert sorted(seen["costed"]) == ["pi2", "pi3", "pi4"]


def test_of_equals_the_latest_is_returned_and_one_round_is_cloning():
    assert recorded([1, 0, 0], {"pi2": 1.0, "pi3": 1.0, "pi4": 2.0})[0] == "pi3"
    assert recorded([1, 0, 0], {"pi2": 1.0, "pi3": 1.0, "pi4": 1.0})[0] == "pi4"
    best, seen = recorded([1.0], {})
    assert best == "pi2" and seen["rolled"] == [("pi1", 1.0)] and seen["costed"] == []


# ---- bridge ----------------------------------------------------------------------------------------------------------

def partly_wrong(world, planks, spots):
    """A table with this share of planks and of spots wrong."""
    wrong = np.concatenate([np.arange(M) < planks * M, np.arange(W) < spots * W])
    return np.where(wrong, (world.right + 1) % A, world.right)


@pytest.mark.parametrize("shallow", [False, True])
def test_a_walk_follows_the_rules_step_by_step(shallow):
    """The right action leads to a plank, also from the water; the wrong one into the water, where it keeps you on the spot,
    unless the water is shallow."""
    world, happened = Bridge(3), set()
    table = partly_wrong(world, 0.3, 0.5)
    for walk in world.roll_out(table, 0.0, 100, 40, shallow):
        assert walk[0] < M
        for state, after in zip(walk, walk[1:]):
            wet, right = state >= M, table[state] == world.right[state]
            if right or wet and shallow:
                assert after < M
            elif wet:
                assert after == state
            else:
                assert M <= after < M + W
            happened.add((wet, right))
    assert len(happened) == 4


def test_the_expert_never_falls_and_asked_now_and_then_it_mends_falls():
    """Whatever the table knows. Of a learner that is always wrong a mixture falls, stays and returns at the expert's rate."""
    world = Bridge(0)
    wrong = partly_wrong(world, 1.0, 1.0)
    assert (world.roll_out(wrong, 1.0, 200, 100) < M).all()
    wet = world.roll_out(wrong, 0.7, 2000, 60) >= M
    for before in (False, True):
        now = ~wet[:, 1:-1][wet[:, :-2] == before]
        again = (now & ~wet[:, 2:][wet[:, :-2] == before])
        assert abs(now.mean() - 0.7) < error(0.7, now.size) and abs(again.mean() - 0.49) < error(0.49, again.size)


def test_a_table_knows_what_it_was_shown_and_guesses_elsewhere():
    """And in a run of DAgger it was shown the right action wherever anybody was, in the water, too."""
    world, shown, wet = Bridge(1), {}, []

    def learn(D, learner):
        table = world.learn(D, learner)
        for state, action in zip(D[-1][0].ravel(), D[-1][1].ravel()):
            assert action == world.right[state]
            shown[state] = action
        wet.append((D[-1][0] >= M).any())
        assert all(table[s] == shown.get(s, world.guess[s]) for s in range(M + W))
        wrong = [table[s] != world.right[s] for s in range(M + W)]
        assert world.errors(table) == (pytest.approx(sum(wrong[:M]) / M), pytest.approx(sum(wrong[M:]) / W))
        return table
    dagger.dagger([1.0, 0.5, 0.0], lambda table, prob: world.roll_out(table, prob, 5, 40), lambda s: world.right[s], learn,
                  lambda table: 0.0, world.guess)
    assert wet == [False, True, True]
    assert abs(world.errors(world.guess)[0] - 1 + 1 / A) < error(1 / A, M)  # a guess among A


def test_expected_cost_is_that_of_the_markov_chain():
    """Powers of its matrix; with no way back sum_t 1 - (1 - epsilon)^t, t = 0 .. T - 1, since a walk begins on a plank."""
    for epsilon, stuck, T in ((0.1, 0.3, 1), (0.02, 0.0, 50), (0.3, 0.9, 37), (1.0, 0.5, 10), (0.0, 1.0, 9), (0.01, 1.0, 200)):
        P = np.array([[1 - epsilon, epsilon * (1 - stuck), epsilon * stuck], [1, 0, 0], [0, 0, 1]])
        by_powers = sum(np.linalg.matrix_power(P, t)[0, 1:].sum() for t in range(T))
        assert expected_cost(epsilon, stuck, T) == pytest.approx(by_powers, rel=1e-12, abs=1e-15)
        never_back = sum(1 - (1 - epsilon)**t for t in range(T))
        assert expected_cost(epsilon, 1.0, T) == pytest.approx(never_back, rel=1e-12, abs=1e-12)


def test_expected_cost_is_that_of_walks():
    world, T = Bridge(5), 60
    for planks, spots, shallow in ((0.02, 0.3, False), (0.1, 0.0, False), (0.005, 1.0, False), (0.1, 1.0, True)):
        table = partly_wrong(world, planks, spots)
        cost = (world.roll_out(table, 0.0, 4000, T, shallow) >= M).sum(1)
        epsilon, stuck = world.errors(table)
        assert abs(cost.mean() - expected_cost(epsilon, 0.0 if shallow else stuck, T)) < 4 * cost.std() / math.sqrt(len(cost))


def test_the_cost_is_within_the_theorems_and_of_their_order(rng):
    """At most epsilon T^2, and epsilon T where every fall is mended in a step. For small epsilon half of it, and all of it."""
    for epsilon, stuck, T in zip(10 ** rng.uniform(-6, 0, 300), rng.random(300), rng.integers(1, 300, 300)):
        assert 0 <= expected_cost(epsilon, stuck, T) <= epsilon * T**2
        assert expected_cost(epsilon, 0.0, T) <= epsilon * T
    assert expected_cost(1e-8, 1.0, 1000) == pytest.approx(1e-8 * 1000 * 999 / 2, rel=1e-4)
    assert expected_cost(1e-8, 0.0, 1000) == pytest.approx(1e-8 * 999, rel=1e-4)


def test_the_slope_is_the_exponent():
    """Exactly, without noise. With noise the least-squares slope of the logs of the means, and the interval mostly holds it."""
    T, seeds = np.array([4, 8, 16, 32, 64]), np.array([0.5, 1.0, 3.0])
    held = 0
    for p in (1.0, 2.0):
        assert dagger.slope(list(T), np.outer(T**p, seeds), 0) == pytest.approx((p, p, p), abs=1e-9)
        for k in range(6):
            costs = 0.01 * T[:, None] ** p * np.random.default_rng(k).lognormal(0, 0.5, (5, 20))
            found, low, high = dagger.slope(list(T), costs, k)
            x, y = (z - z.mean() for z in (np.log(T), np.log(costs.mean(1))))
            assert found == pytest.approx((x @ y) / (x @ x), abs=1e-9) and low < found < high < low + 0.8
            held += low < p < high
    assert held >= 10


SMALL = {"horizon": 128, "labels": 15_360, "seeds": 3}


@pytest.fixture(scope="module")
def small():
    return dagger.bridge(Config(**SMALL))


def test_cloning_pays_by_the_square_of_the_horizon_and_dagger_in_proportion(small):
    """The result. Shallow water shows that it is the lasting fall which costs T^2: cloning pays there as DAgger does."""
    slopes = {row["method"]: row["slope"] for row in small if "slope" in row}
    assert 1.9 < slopes["cloning"] < 2.1 and 0.9 < slopes["DAgger"] < 1.2 and 0.9 < slopes["cloning, shallow"] < 1.2
    rows = [row for row in small if "cost" in row]
    at = {m: np.mean([r["cost"] for r in rows if (r["method"], r["horizon"], r["labels"]) == (m, 128, 15_360)]) for m in slopes}
    assert at["cloning"] > 10 * at["DAgger"]
    assert {row["horizon"] for row in rows} == {4, 8, 16, 32, 64, 128} and {row["seed"] for row in rows} == {0, 1, 2}
    for row in rows:
        assert row["cost"] <= row["epsilon"] * row["horizon"] ** (1 if row["method"] == "cloning, shallow" else 2)
        if row["method"] == "cloning":  # nobody showed it what to do in the water
            world = Bridge(row["seed"], row["horizon"])
            assert row["stuck"] == world.errors(world.guess)[1]
    difference = np.array([row["rolled_out_cost"] - row["cost"] for row in rows])
    assert abs(difference.sum()) < 4 * np.sqrt((difference**2).sum())


def test_the_expert_is_asked_as_often_as_the_rows_say(monkeypatch):
    """Also where a round is no multiple of the horizon: 127 labels are two walkers of 64 steps less a step, not one walker."""
    original, asked = dagger.dagger, []

    def counted(probs, roll_out, expert, *rest):
        asked.append(0)

        def expert_(states):
            asked[-1] += states.size
            return expert(states)
        return original(probs, roll_out, expert_, *rest)
    monkeypatch.setattr(dagger, "dagger", counted)
    rows = dagger.bridge(Config(horizon=64, labels=1270, seeds=2))
    assert asked == [row["labels"] - row["labels"] % 10 * (row["method"] == "DAgger") for row in rows if "cost" in row]


def test_two_runs_are_alike_and_leave_rows_and_a_figure(small, tmp_path):
    settings = [x for name, value in SMALL.items() for x in ("--" + name, str(value))]
    done = subprocess.run([sys.executable, clone.ROOT / "dagger.py", *settings], cwd=tmp_path, text=True, capture_output=True,
                          env=clone.environment())
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
    folder = tmp_path / "runs/dagger-bridge"
    assert sorted(path.name for path in folder.iterdir()) == ["figure.png", "results.jsonl"]
    assert [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()] == small
    assert (folder / "figure.png").stat().st_size > 20_000


# ---- track -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def road():
    return Track()


def straight_on(seen):
    return np.zeros(len(seen))


def test_the_driver_sees_where_it_is_and_the_bends_ahead(road):
    """The road runs counter-clockwise round the origin, so that left is inside. A bend is a mean over 11 points of how far the
    road turns at them for each length. Whole turns of the car do not show."""
    at, d = np.arange(0, 600, 7), 0.4
    h = road.heading[at]
    bends = [[np.mean([math.remainder(road.heading[(j + 1) % 600] - road.heading[j % 600], math.tau)
                       / math.dist(road.centre[j % 600], road.centre[(j + 1) % 600]) for j in range(i + k - 5, i + k + 6)])
              for k in (0, 8, 16, 24)] for i in at]
    for side in (0, d, -d):
        place = road.centre[at] + side * np.stack([-np.sin(h), np.cos(h)], 1)
        for whole in (0, 4, -3):
            seen = road.see(np.column_stack([place, h + 0.2 + math.tau * whole]))
            assert np.allclose(seen[:, 0], side) and np.allclose(seen[:, 1], 0.2) and np.allclose(seen[:, 2:], bends)
        assert not side or ((np.hypot(*place.T) < np.hypot(*road.centre[at].T)) == (side > 0)).all()


def test_cars_start_in_the_middle_keep_their_speed_and_are_steered_in_gusts(road, rng):
    """A learner that steers by 100 tells who acted: a share of steps, and the rest is the expert's steering and the gusts."""
    states, views = road.drive(lambda seen: np.full(len(seen), 100.0), 300, 40, 0.6, rng)
    assert states.shape == (300, 40, 3) and views.shape == (300, 40, 6)
    assert np.allclose(views[:, 0, :2], 0) and all(np.array_equal(views[:, t], road.see(states[:, t])) for t in range(40))
    assert np.allclose(np.hypot(*np.diff(states[..., :2], axis=1).T), 0.2)
    steering = np.diff(states[..., 2], axis=1) / 0.1
    learners = steering > 50
    gusts = steering - np.where(learners, 100, road.expert(views[:, :-1]))
    assert abs(learners.mean() - 0.4) < error(0.4, learners.size)
    assert abs(gusts.mean()) < 4 * 0.3 / math.sqrt(gusts.size) and abs(gusts.std() / 0.3 - 1) < 4 / math.sqrt(2 * gusts.size)


def test_the_expert_stays_on_the_road_for_a_lap_and_straight_on_leaves_it(road, rng):
    states, views = road.drive(straight_on, 20, road.lap, 1.0, rng)
    assert (np.abs(views[..., 0]) < road.half_width).all()
    angle = np.unwrap(np.arctan2(states[..., 1], states[..., 0]), axis=1)
    assert np.allclose(angle[:, -1] - angle[:, 0], math.tau, rtol=0.05)
    assert (np.abs(road.drive(straight_on, 20, road.lap, 0.0, rng)[1][..., 0]) > road.half_width).any(1).all()


def test_ridge_is_least_squares_on_bumps(road, rng):
    """Of the system with sqrt(0.01) I under it, the bumps computed one by one, of two rounds with rows of cars and steps."""
    D = [(views, road.expert(views)) for views in (road.drive(straight_on, 3, 20, p, rng)[1] for p in (1.0, 0.3))]
    shown, steering = np.concatenate([v.reshape(-1, 6) for v, _ in D]), np.concatenate([s.reshape(-1) for _, s in D])
    policy = dagger.ridge(D, np.random.default_rng(4), 30)
    centres = shown[np.random.default_rng(4).choice(120, 30, replace=False)]

    def phi(views):
        return np.array([[math.exp(-sum(((a - b) / w) ** 2 for a, b, w in zip(v, c, dagger.WIDTHS)) / 2) for c in centres]
                         for v in views])
    weights = np.linalg.lstsq(np.vstack([phi(shown), 0.1 * np.eye(30)]), np.append(steering, np.zeros(30)), rcond=None)[0]
    views = road.drive(straight_on, 2, 15, 0.5, rng)[1].reshape(-1, 6)
    assert np.allclose(policy(views), phi(views) @ weights, atol=1e-8)


def test_ridge_knows_what_it_was_shown_and_steers_straight_on_elsewhere(road, rng):
    """Views far apart each have a bump of their own: the weight that minimises (y - w)^2 + 0.01 w^2 is y / 1.01. Along the road
    it steers as the expert does, the better the more bumps there are."""
    views, steering = 10 * np.arange(8)[:, None] * np.ones(6), rng.normal(size=8)
    policy = dagger.ridge([(views, steering)], rng)
    assert np.allclose(policy(views), steering / 1.01, atol=1e-12) and np.allclose(policy(views + 5), 0, atol=1e-12)
    shown, new = (road.drive(straight_on, 8, road.lap, 1.0, rng)[1] for _ in range(2))
    right = road.expert(new.reshape(-1, 6))
    wrong = [(dagger.ridge([(shown, road.expert(shown))], rng, n)(new.reshape(-1, 6)) - right).std() / right.std()
             for n in (25, 100, 400)]
    assert wrong[0] > wrong[1] > wrong[2] and wrong[2] < 0.15


def test_where_the_copy_leaves_the_road_dagger_brings_it_back(road):
    """As many labels for both; the expert shows nothing but the middle of the road, DAgger what to do at its edges."""
    laps = {}
    for method in ("cloning", "DAgger"):
        policy = road.train(Config(task="track"), method, 1480, np.random.default_rng(0))
        views = road.drive(policy, 20, road.lap, 0.0, np.random.default_rng(1))[1]
        assert np.array_equal(road.off(views), np.abs(views[..., 0]) > 1)
        laps[method] = 1 - road.off(views).any(1).mean()
    assert laps["DAgger"] > 0.9 and laps["cloning"] < 0.7


# ---- distill ---------------------------------------------------------------------------------------------------------

def sampled(model, count, seed=0):
    """Responses to two prompts of different lengths, of at most 2 and 3 tokens; <eos> is 0."""
    return generate(model, [[1], [2, 1]] * count, 4, 0, 0, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pair():
    return tiny_gpt(4, 4, seed=0), tiny_gpt(4, 4, seed=1)


def test_token_logits_are_those_that_sampling_and_scoring_use(pair):
    samples = sampled(pair[0], 20)
    logprobs, row = F.log_softmax(dagger.token_logits(pair[1], samples), 1), 0
    scored = response_logprobs(pair[1], *samples[:3])
    for i, (tokens, start, end) in enumerate(zip(*(x.tolist() for x in samples[:3]))):
        own = logprobs[row:row + end - start].gather(1, torch.tensor(tokens[start:end])[:, None]).squeeze(1)
        torch.testing.assert_close(own, scored[i, :end - start])
        torch.testing.assert_close(own, naive_logprobs(pair[1], tokens[:start], tokens[start:end]))
        row += end - start
    assert row == len(logprobs) and len(set((samples.lengths - samples.prompt_lengths).tolist())) == 3


def test_kl_by_position_is_the_loop_over_responses_and_tokens(pair):
    """More rows than go through the models at once; a policy is at no distance from itself."""
    student, teacher = pair
    samples, found = sampled(student, 45), {}
    for tokens, start, end in zip(*(x.tolist() for x in samples[:3])):
        p, q = (torch.log_softmax(model(torch.tensor([tokens[:end]]))[0].double(), -1) for model in pair)
        for t in range(start, end):
            found.setdefault(t - start, []).append(sum((p[t - 1].exp() * (p[t - 1] - q[t - 1])).tolist()))
    kl, alive = dagger.kl_by_position(student, teacher, samples)
    assert kl == pytest.approx([np.mean(found[r]) for r in sorted(found)], rel=1e-4)
    assert alive == pytest.approx([len(found[r]) / 90 for r in sorted(found)])
    assert not dagger.kl_by_position(student, student, samples)[0].any()


def test_summed_over_positions_it_is_the_kl_of_whole_responses(pair):
    """The chain rule, against the sum over all responses; and no other way round."""
    student, teacher = pair

    def exact(p, q):
        total = 0.0
        for prompt in ([1], [2, 1]):
            for response in every_response(4, 4 - len(prompt), 0):
                log_p, log_q = (naive_logprobs(model, prompt, response).sum().item() for model in (p, q))
                total += math.exp(log_p) * (log_p - log_q) / 2
        return total
    with torch.no_grad():
        forwards, backwards = exact(student, teacher), exact(teacher, student)
    parts = np.array([np.dot(*dagger.kl_by_position(student, teacher, sampled(student, 100, seed))) for seed in range(20)])
    standard_error = parts.std(ddof=1) / math.sqrt(20)
    assert abs(parts.mean() - forwards) < 4 * standard_error < 0.2 * abs(forwards - backwards)


def test_a_student_has_half_the_channels_and_a_quarter_of_the_matrices():
    teacher = tiny_gpt(11, 12, 3, 4, 16)
    student, again, other = (dagger.student_of(teacher.config, seed) for seed in (0, 0, 1))
    assert vars(student.config) == {**vars(teacher.config), "n_embd": 8, "n_head": 2}
    sizes = [sum(p.numel() for p in model.h.parameters() if p.dim() == 2) for model in (teacher, student)]
    assert sizes[0] == 4 * sizes[1] > 0
    assert torch.equal(student.wte.weight, again.wte.weight) and not torch.equal(student.wte.weight, other.wte.weight)


@pytest.fixture(scope="module")
def sft(root, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("runs")
    assert clone.run_here(root, folder, "sft", *clone.TINY, "--out", "sft") == 0
    return folder / "sft"


def test_distillation_asks_about_the_teachers_samples_or_about_the_students_own(
        root, sft, tmp_path, gradients, monkeypatch):  # noqa: F811
    """Channels tell who sampled: cloning's responses are all the teacher's (32), DAgger's the student's (16) from the second
    round on. The first step's gradient is that of the cross-entropy to the teacher's distributions, token by token. And with
    the progress bars switched off (TQDM_DISABLE=1) the steps are as many."""
    drawn, kls, sample_policy = [], [], evaluate.sample_policy

    def spy(model, *args):
        drawn.append((model.config.n_embd, generate(model, *args)))
        return drawn[-1][1]
    monkeypatch.setattr(dagger, "generate", spy)
    monkeypatch.setattr(evaluate, "sample_policy", lambda *a, **k: (kls.append(p := sample_policy(*a, **k)), p)[1])
    monkeypatch.setattr(dagger, "tqdm", functools.partial(dagger.tqdm, disable=True))
    monkeypatch.setattr(tasks, "ROOT", root)
    monkeypatch.setitem(evaluate.SIZES, ("reviews", "cpu"), (8, 4))
    dagger.main(Config(task="distill", sft=str(sft), labels=16, iterations=2, steps=6, seeds=2, out=str(tmp_path)))

    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert [(row["method"], row["seed"]) for row in rows] == [("cloning", 0), ("DAgger", 0), ("cloning", 1), ("DAgger", 1)]
    sampled_by = [(32, 8), (32, 8), (16, 64)], [(32, 8), (16, 8), (16, 64)]  # two rounds, and then to be judged
    assert [(width, len(samples.tokens)) for width, samples in drawn] == [*sampled_by[0], *sampled_by[1]] * 2
    assert torch.equal(drawn[0][1].tokens, drawn[3][1].tokens) and not torch.equal(drawn[0][1].tokens, drawn[6][1].tokens)
    for row, kl in zip(rows, (policy.kl for policy in kls), strict=True):
        assert row["labels"] == 16 and row["kl_sampled"] == pytest.approx(kl.mean().item(), rel=1e-5)
        assert abs(row["kl"] - row["kl_sampled"]) < 4 * kl.std() * math.sqrt(1 / kl.numel() + 1 / 64)

    teacher, draw = load_run(sft)[0], generator(0, 1, 0)
    student, losses = dagger.student_of(teacher.config, 0), []
    torch.randint(1, (), generator=draw)  # which round: there is one
    for i in torch.randint(8, (32,), generator=draw).tolist():
        tokens, start, end = (x[i] for x in drawn[0][1][:3])
        p, q = (model(tokens[None, :end])[0, start - 1:end - 1].log_softmax(-1) for model in (student, teacher))
        losses += [-(q[t].exp() * p[t]).sum() for t in range(len(p))]
    torch.stack(losses).mean().backward()
    for own, found in zip(student.parameters(), gradients[0], strict=True):
        torch.testing.assert_close(found, own.grad, rtol=1e-3, atol=1e-6)
    assert len(gradients) == 4 * 6


# ---- settings --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments", [
    "--horizon 0", "--horizon 63", "--expert-prob 1.1", "--expert-prob -0.1", "--expert-prob nan", "--labels 2559",
    "--labels -1", "--labels 79 --task track", "--labels 3 --task distill", "--task boat", "--schedule cosine", "--steps 10",
    "--lr 0.1", "--sft x", "--steps 0 --task distill", "--lr nan --task distill", "--schedule linear --task distill",
    "--expert-prob 0.5 --task distill", "--horizon 64 --task track", "--seeds 1", "--iterations -1", "--seed x"])
def test_a_bad_setting_is_one_line(arguments):
    """One of 63's halves is a horizon of 1, at which there is nothing to lose: the log of that cost would make the slope 5."""
    with pytest.raises(SystemExit) as stopped:
        parse(Config, "", arguments.split())
    message = str(stopped.value)
    assert message.startswith("error: ") and arguments.split()[0] in message and "\n" not in message


def test_the_least_settings_are_accepted():
    for arguments in ("--horizon 64", "--labels 2560", "--labels 80 --task track", "--labels 4 --task distill"):
        parse(Config, "", arguments.split())
