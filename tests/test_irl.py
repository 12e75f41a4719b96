"""irl.py: the soft policy against enumeration of all paths, the loss against finite differences,
the learners against closed forms, the map against its rules, and the result in small.
"""
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest

import clone
import irl
from common.settings import parse
from irl import (MAP, MOVES, Config, best_policy, cloning, expected, is_optimal, make_world,
                 max_ent, max_ent_loss, projection, soft_policy, soft_values, visits)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def grid3(slip=0.0):
    """Transitions (9, 4, 9) of a 3 x 3 grid; with probability slip a step goes anywhere."""
    sure = np.zeros((9, 4, 9))
    for s in range(9):
        for a, (down, right) in enumerate(MOVES):
            y, x = np.clip([s // 3 + down, s % 3 + right], 0, 2)
            sure[s, a, 3 * y + x] = 1
    return (1 - slip) * sure + slip * sure.mean(1, keepdims=True)


def paths(rewards, transitions, horizon, start):
    """Every path from `start`: its states and actions, the chance of its luck, and its return.
    Where the last step leads is no part of it."""
    found = []

    def go_on(state, path, luck, gained):
        for action in range(rewards.shape[1]):
            longer = (*path, (state, action))
            total = gained + rewards[state, action]
            if len(longer) == horizon:
                found.append((longer, luck, total))
                continue
            for after in np.flatnonzero(transitions[state, action]):
                go_on(after, longer, luck * transitions[state, action, after], total)
    go_on(start, (), 1.0, 0.0)
    return found


def at(state, S=9):
    return np.eye(S)[state]


# ---- the soft policy -----------------------------------------------------------------------------

def test_it_needs_numpy_only():
    """Neither torch nor another algorithm file is loaded."""
    program = "import irl, sys; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], cwd=clone.ROOT, text=True, check=True,
                           capture_output=True, env=clone.environment()).stdout.split()
    scripts = {path.stem for path in clone.ROOT.glob("*.py")} - {"irl"}
    assert "irl" in found and not ({"torch", "matplotlib"} | scripts) & set(found)


def test_without_chance_a_path_is_as_likely_as_exp_of_its_return(rng):
    """All 4^5 paths on a 3 x 3 grid: P(path) = exp(r) / Z, which is pi_ref exp(r / beta) / Z with a
    uniform pi_ref and beta = 1; and so for another beta."""
    rewards, P = rng.normal(size=(9, 4)), grid3()
    for beta in (1.0, 0.3):
        policy = soft_policy(rewards / beta, P, 5)
        found = paths(rewards, P, 5, 4)
        assert len(found) == 4**5
        returns = np.array([total for _, _, total in found])
        pi_ref = np.full(len(found), 1 / len(found))
        tilted = pi_ref * np.exp(returns / beta)
        own = [math.prod(policy[t, s, a] for t, (s, a) in enumerate(path))
               for path, _, _ in found]
        assert np.allclose(own, tilted / tilted.sum(), atol=1e-12)


def test_with_chance_it_has_the_highest_return_plus_causal_entropy(rng):
    """V_0 is that sum, over all paths; and no other policy has more."""
    rewards, P = rng.normal(size=(9, 4)), grid3(0.3)
    policy, V = soft_values(rewards, P, 3)
    found = paths(rewards, P, 3, 4)

    def score(policy):
        total = 0.0
        for path, luck, gained in found:
            chosen = math.prod(policy[t, s, a] for t, (s, a) in enumerate(path))
            total += luck * chosen * (gained - math.log(chosen))
        return total
    assert score(policy) == pytest.approx(V[4], abs=1e-12)
    for _ in range(20):
        other = policy * rng.lognormal(0, 0.2, policy.shape)
        assert score(other / other.sum(2, keepdims=True)) < V[4]


def test_visits_and_expectations_are_sums_over_all_paths(rng):
    rewards, P = rng.normal(size=(9, 4)), grid3(0.3)
    policy = soft_policy(rewards, P, 3)
    by_hand, value = np.zeros((3, 9, 4)), 0.0
    for path, luck, gained in paths(rewards, P, 3, 4):
        chance = luck * math.prod(policy[t, s, a] for t, (s, a) in enumerate(path))
        value += chance * gained
        for t, (s, a) in enumerate(path):
            by_hand[t, s, a] += chance
    assert np.allclose(visits(policy, P, at(4)), by_hand, atol=1e-12)
    assert expected(rewards, policy, P, at(4)) == pytest.approx(value, abs=1e-12)


# safe is worth 1; risky leads to 0 or 2, by luck. States: the choice, what is worth 1, 0 and 2.
GAMBLE = np.zeros((4, 2, 4))
GAMBLE[0, 0, 1] = 1
GAMBLE[0, 1, [2, 3]] = 0.5
GAMBLE[1:] = np.eye(4)[1:, None]
WORTH = np.repeat([[0.0], [1.0], [0.0], [2.0]], 2, 1)


def test_it_does_not_count_on_good_luck():
    """Causal: both choices are worth 1, so P(risky) = 1/2. Plain maximum entropy weighs a path by
    its luck times exp(return): P(risky) = 0.6068, and of the risky paths 0.8808 end well, where
    chance has 0.5."""
    assert soft_policy(WORTH, GAMBLE, 2)[0, 0] == pytest.approx([0.5, 0.5], abs=1e-12)
    weights = {}
    for path, luck, gained in paths(WORTH, GAMBLE, 2, 0):
        key = path[0][1], path[1][0]
        weights[key] = weights.get(key, 0) + luck * math.exp(gained) / 2  # for both last actions
    risky = weights[1, 2] + weights[1, 3]
    assert risky / (risky + weights[0, 1]) == pytest.approx(0.6068, abs=5e-5)
    assert weights[1, 3] / risky == pytest.approx(0.8808, abs=5e-5)


def test_with_two_paths_it_is_bradley_terry():
    """P(path 1) = sigmoid(r_1 - r_2). The weight that fits k of n choices is their log-odds."""
    P = np.ones((1, 2, 1))
    for r_1, r_2 in ((0.3, -1.2), (2.0, 2.0), (-700.0, 700.0)):
        own = soft_policy(np.array([[r_1, r_2]]), P, 1)[0, 0, 0]
        assert own == pytest.approx(0.5 * (1 + math.tanh((r_1 - r_2) / 2)), abs=1e-12)
    features = np.array([[[1.0], [0.0]]])  # of the first path: it is chosen
    w = max_ent(features, P, 1, np.ones(1), np.array([7 / 10]))
    assert w == pytest.approx([math.log(7 / 3)], abs=1e-7)


@pytest.mark.parametrize("scale", [0, 1, 1e4, -1e4, 1e8])
def test_rewards_of_any_size_give_probabilities(rng, scale):
    policy = soft_policy(scale * rng.normal(size=(9, 4)), grid3(0.3), 50)
    assert policy.shape == (50, 9, 4) and (policy >= 0).all()
    assert np.allclose(policy.sum(2), 1, atol=1e-12)


def test_it_becomes_the_optimal_policy_as_rewards_grow_and_a_constant_changes_nothing(rng):
    """With state 8 out of reach: it is nobody's next state."""
    P = grid3(0.3)
    P[:, :, 7] += P[:, :, 8]
    P[:, :, 8] = 0
    rewards = rng.normal(size=(9, 4))
    assert np.allclose(soft_policy(1e6 * rewards, P, 6), best_policy(rewards, P, 6), atol=1e-9)
    assert np.allclose(soft_policy(rewards + 5, P, 6), soft_policy(rewards, P, 6), atol=1e-12)
    assert np.allclose(soft_policy(np.zeros((9, 4)), P, 6), 0.25)


def test_the_best_policy_is_the_best_of_all(rng):
    """On three states and two actions, all 2^9 policies of three steps; and equal actions are
    equally likely."""
    rewards = rng.normal(size=(3, 2))
    P = rng.dirichlet(np.ones(3), (3, 2))
    values = [expected(rewards, np.eye(2)[np.reshape(choice, (3, 3))], P, np.ones(3) / 3)
              for choice in itertools.product((0, 1), repeat=9)]
    best = best_policy(rewards, P, 3)
    assert expected(rewards, best, P, np.ones(3) / 3) == pytest.approx(max(values), abs=1e-12)
    assert np.array_equal(best_policy(np.zeros((3, 2)), P, 3), np.full((3, 3, 2), 0.5))


def test_actions_that_differ_by_rounding_are_equally_good():
    """From state 0 by 1, 2, 3 or by 4, 5, 6: 0.1 + (0.2 + 0.3) and 0.3 + (0.2 + 0.1) are not the
    same number."""
    after = np.array([[1, 4], [2, 2], [3, 3], [3, 3], [5, 5], [6, 6], [6, 6]])
    rewards = np.array([0, 0.1, 0.2, 0.3, 0.3, 0.2, 0.1])[:, None].repeat(2, 1)
    assert 0.1 + (0.2 + 0.3) != 0.3 + (0.2 + 0.1)
    assert best_policy(rewards, np.eye(7)[after], 4)[0, 0].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("rewards, transitions, horizon, said", [
    (np.zeros(9), grid3(), 3, "expected rewards"),
    (np.zeros((9, 3)), grid3(), 3, r"found \(9, 3\) and \(9, 4, 9\)"),
    (np.zeros((9, 4)), grid3()[:, :, :8], 3, "expected rewards"),
    (np.zeros((9, 4)), grid3() / 2, 3, "sum 1"),
    (np.zeros((9, 4)), 2 * grid3() - grid3(1.0), 3, "probabilities"),
    (np.zeros((9, 4)), np.where(grid3() > 0, np.nan, 0), 3, "probabilities"),
    (np.full((9, 4), np.nan), grid3(), 3, "finite"),
    (np.full((9, 4), -np.inf), grid3(), 3, "finite"),
    (np.full((9, 4), 1e308), grid3(), 3, "finite"),
    (np.zeros((9, 4)), grid3(), 0, "horizon 0"),
    (np.zeros((9, 4)), grid3(), 2.5, "horizon 2.5")])
def test_what_is_no_decision_process_is_refused(rewards, transitions, horizon, said):
    for plan in (soft_policy, best_policy):
        with pytest.raises(ValueError, match=said):
            plan(rewards, transitions, horizon)


# ---- maximum entropy -----------------------------------------------------------------------------

@pytest.fixture
def task(rng):
    """Features (9, 4, 3), transitions, start (9,), and mu of a policy that is not soft."""
    features, P = rng.normal(size=(9, 4, 3)), grid3(0.3)
    start = rng.dirichlet(np.ones(9))
    policy = rng.dirichlet(np.ones(4), (6, 9))
    return features, P, start, expected(features, policy, P, start)


def test_gradient_and_hessian_are_finite_differences(task, rng):
    features, P, start, mu_E = task
    w, h = rng.normal(size=3), 1e-5

    def at_w(w):
        return max_ent_loss(w, features, P, 6, start, mu_E)
    loss, gradient, hessian = at_w(w)
    up, down = ([at_w(w + sign * h * axis) for axis in np.eye(3)] for sign in (1, -1))
    assert np.allclose(gradient, [(u[0] - d[0]) / (2 * h) for u, d in zip(up, down)], atol=1e-8)
    assert np.allclose(hessian, [(u[1] - d[1]) / (2 * h) for u, d in zip(up, down)], atol=1e-7)
    mu = expected(features, soft_policy(features @ w, P, 6), P, start)
    assert np.allclose(gradient, mu - mu_E, atol=1e-12)
    assert np.linalg.eigvalsh(hessian).min() > 0


def test_at_the_minimum_features_match_and_no_policy_that_matches_has_more_entropy(task):
    """The dual of the card: the loss there is the causal entropy itself."""
    features, P, start, mu_E = task
    w = max_ent(features, P, 6, start, mu_E)
    policy = soft_policy(features @ w, P, 6)
    assert np.abs(expected(features, policy, P, start) - mu_E).max() < 1e-6
    chance = visits(policy, P, start)
    entropy = -(chance * np.log(policy)).sum()
    assert max_ent_loss(w, features, P, 6, start, mu_E)[0] == pytest.approx(entropy, abs=1e-7)


def test_the_weights_of_a_soft_expert_are_found(task, rng):
    features, P, start, _ = task
    true = rng.normal(size=3)
    mu_E = expected(features, soft_policy(features @ true, P, 6), P, start)
    assert max_ent(features, P, 6, start, mu_E) == pytest.approx(true, abs=1e-6)


def test_the_prior_pulls_to_0_by_its_own_gradient_and_fades(task):
    """n (mu(pi_w) - mu_E) + w / prior^2 = 0."""
    features, P, start, mu_E = task
    free = max_ent(features, P, 6, start, mu_E)
    w = max_ent(features, P, 6, start, mu_E, n=4, prior=0.5)
    gap = expected(features, soft_policy(features @ w, P, 6), P, start) - mu_E
    assert np.allclose(4 * gap + w / 0.5**2, 0, atol=1e-6)
    assert np.linalg.norm(w) < np.linalg.norm(free)
    assert np.allclose(max_ent(features, P, 6, start, mu_E, n=10**9, prior=0.5), free, atol=1e-5)


def test_features_that_no_policy_has_are_an_error_without_a_prior(task):
    features, P, start, _ = task
    with pytest.raises((ArithmeticError, ValueError, np.linalg.LinAlgError)):
        max_ent(features, P, 6, start, np.full(3, 100.0))
    assert np.isfinite(max_ent(features, P, 6, start, np.full(3, 100.0), prior=1)).all()


# ---- projection and cloning ----------------------------------------------------------------------

def test_projection_comes_nearer_to_what_policies_can_reach(task, rng):
    """And so it is as good as the expert for every reward: |w . (mu - mu_E)| <= |w| |mu - mu_E|."""
    features, P, start, mu_E = task
    gaps = []
    for rounds in (0, 1, 10, 100):
        mixture = projection(features, P, 6, start, mu_E, rounds)
        shares = [share for share, _ in mixture]
        assert sum(shares) == pytest.approx(1) and min(shares) >= 0 and len(shares) <= rounds + 1
        mu = sum(share * expected(features, best_policy(rewards, P, 6), P, start)
                 for share, rewards in mixture)
        gaps.append(np.linalg.norm(mu - mu_E))
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3] and gaps[3] < 0.02 * gaps[0]
    for w in rng.normal(size=(20, 3)):
        assert abs(w @ (mu - mu_E)) <= np.linalg.norm(w) * gaps[-1]


def test_the_first_steps_of_projection_by_hand(task):
    """Uniform; then the best policy for what is missing, with the share that is nearest."""
    features, P, start, mu_E = task
    (share_0, nothing), (share_1, rewards) = projection(features, P, 6, start, mu_E, 1)
    mu_0 = expected(features, np.full((6, 9, 4), 0.25), P, start)
    mu_1 = expected(features, best_policy(features @ (mu_E - mu_0), P, 6), P, start)
    assert not nothing.any()
    assert np.allclose(rewards, features @ (mu_E - mu_0) / np.linalg.norm(mu_E - mu_0))
    grid = np.linspace(0, 1, 100_001)
    far = np.linalg.norm(mu_0 + grid[:, None] * (mu_1 - mu_0) - mu_E, axis=1)
    assert share_1 == pytest.approx(grid[far.argmin()], abs=2e-5)
    assert share_0 == pytest.approx(1 - share_1)


def test_projection_stops_where_nothing_is_missing_and_goes_no_further_than_a_policy(task):
    """The second target lies far beyond the best policy for it, which then has the whole share."""
    features, P, start, mu_E = task
    beyond = projection(features, P, 6, start, 100 * mu_E, 30)
    shares = [share for share, _ in beyond]
    assert min(shares) >= 0 and sum(shares) == pytest.approx(1)
    assert projection(features, P, 6, start, 100 * mu_E, 1)[1][0] == 1
    uniform = expected(features, np.full((6, 9, 4), 0.25), P, start)
    assert len(projection(features, P, 6, start, uniform)) == 1


def test_cloning_counts():
    """State 0: twice action 1, once 0. State 1: one each. State 2: never."""
    states, actions = np.array([[0, 0, 1], [0, 1, 3]]), np.array([[1, 0, 0], [1, 1, 0]])
    policy = cloning(states, actions, (7, 4, 2))
    assert policy.shape == (7, 4, 2)
    for t in range(7):
        assert policy[t].tolist() == [[0, 1], [0.5, 0.5], [0.5, 0.5], [1, 0]]


# ---- which rewards explain a policy --------------------------------------------------------------

def test_a_policy_is_optimal_where_no_policy_is_better(rng):
    """A policy with one mistake, at a random step and state, is not; and loses value from there."""
    P, rewards = grid3(0.3), rng.normal(size=(9, 4))
    best = best_policy(rewards, P, 4)
    assert is_optimal(best, rewards, P)
    for _ in range(30):
        t, s = rng.integers(4), rng.integers(9)
        wrong = best.copy()
        wrong[t, s] = at((best[t, s].argmax() + rng.integers(1, 4)) % 4, 4)
        assert not is_optimal(wrong, rewards, P)
        loss = expected(rewards, best[t:], P, at(s)) - expected(rewards, wrong[t:], P, at(s))
        assert loss > 1e-6


def test_the_rewards_of_a_policy_are_ng_and_russells_cone(rng):
    """(P_own - P_a) (I - gamma P_own)^-1 R >= 0 for every a, with a discount and a policy that
    never changes. Here a step ends it all with probability 1 - gamma, and the last one pays for all
    that would follow. Sums of two rewards in the cone are in it, too."""
    S, A, gamma = 3, 2, 0.8
    P, own = rng.dirichlet(np.ones(S), (S, A)), np.array([0, 1, 1])
    P_own = P[np.arange(S), own]
    with_end = np.zeros((S + 1, A, S + 1))
    with_end[:S, :, :S], with_end[:S, :, S], with_end[S, :, S] = gamma * P, 1 - gamma, 1
    policy = np.repeat(np.eye(A)[np.append(own, 0)][None], 3, 0)

    def explains(R):
        V = np.linalg.solve(np.eye(S) - gamma * P_own, R)
        of_steps = np.repeat(np.append(R, 0.0)[None, :, None], 3, 0).repeat(A, 2)
        of_steps[-1, :S] += gamma * P @ V
        found = is_optimal(policy, of_steps, with_end)
        assert found == all(((P_own - P[:, a]) @ V >= 0).all() for a in range(A))
        return found
    rewards = rng.normal(size=(400, S))
    inside = rewards[[explains(R) for R in rewards]]
    assert 10 < len(inside) < 200
    assert all(explains(R + 3 * other) for R, other in zip(inside, inside[::-1]))


def test_the_ambiguity_that_the_command_prints():
    """With Phi = 0 after the last step the same actions are best; with another Phi, others are."""
    rows = irl.ambiguity(Config(seed=3))
    assert [row.get("optimal") for row in rows] == [True, True, True, False, True, False, None]
    assert rows[-1]["optimal_for"] == 0


# ---- the map -------------------------------------------------------------------------------------

@pytest.mark.parametrize("slip, tree", [(0.5, False), (0.0, False), (0.5, True)])
def test_steps_on_the_map(slip, tree):
    """Every square and action by hand: on ice a random direction with probability slip; edge and
    tree stop a step."""
    world = make_world(slip, tree)
    height, width = len(MAP), len(MAP[0])
    for y in range(height):
        for x in range(width):
            ends = []
            for down, right in MOVES:
                to = y + down, x + right
                free = 0 <= to[0] < height and 0 <= to[1] < width and not (tree and to == irl.TREE)
                ends.append(to if free else (y, x))
            s = y * width + x
            for a, end in enumerate(ends):
                chance = np.zeros((height, width))
                lost = slip if MAP[y][x] == "~" and not (tree and (y, x) == irl.TREE) else 0
                chance[end] += 1 - lost
                for other in ends:
                    chance[other] += lost / 4
                assert np.allclose(world.transitions[s, a], chance.ravel())
            letter = "#" if tree and (y, x) == irl.TREE else MAP[y][x]
            reward = {"G": 1.0, "o": -3.0, "m": -0.5}.get(letter, 0.0)
            assert (world.rewards[s] == reward).all() and (world.squares[s].argmax(1) == s).all()
            assert world.kinds[s].sum() == (4 if letter in "Gom~" else 0)
            assert world.west[s] == (1 / 10 if x < 2 else 0) and world.start[s] == 1 / 45


def test_demonstrations_are_draws_from_the_policy_and_the_world():
    """Features of 4,000 of them are within four standard errors of what is expected."""
    world, config = make_world(0.5), Config(demonstrations=4000)
    policy, states, actions = irl.demonstrate(config, world, "noisy", 0)
    assert np.array_equal(policy, soft_policy(world.rewards, world.transitions, 20))
    assert (world.transitions[states[:, :-1], actions[:, :-1], states[:, 1:]] > 0).all()
    of_each = world.kinds[states, actions].sum(1)
    error = of_each.std(0) / math.sqrt(4000)
    mu = expected(world.kinds, policy, world.transitions, world.start)
    assert (np.abs(of_each.mean(0) - mu) < 4 * error).all()
    best, _, actions = irl.demonstrate(Config(), world, "optimal", 1)
    assert np.array_equal(best, best_policy(world.rewards, world.transitions, 20))
    _, again, _ = irl.demonstrate(Config(demonstrations=10), world, "optimal", 1)
    assert len(again) == 10 and len(actions) == 100


def test_worth_is_0_at_random_and_1_at_the_best():
    world = make_world(0.5)
    best = best_policy(world.rewards, world.transitions, 20)
    random = np.full((20, 45, 4), 0.25)
    assert irl.worth(random, world) == pytest.approx(0)
    assert irl.worth(best, world) == pytest.approx(1)
    assert 0.8 < irl.worth(best, make_world(0.0)) < 0.9  # it goes round a lake that it could cross
    assert 0.7 < irl.worth(best, make_world(0.5, tree=True)) < 0.8


# ---- the result ----------------------------------------------------------------------------------

SMALL = {"demonstrations": 3, "seeds": 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The command as a shell runs it: its folder, its rows and what it prints."""
    work = tmp_path_factory.mktemp("work")
    flags = [x for name, value in SMALL.items() for x in ("--" + name, str(value))]
    done = subprocess.run([sys.executable, clone.ROOT / "irl.py", *flags], cwd=work, text=True,
                          capture_output=True, env=clone.environment())
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
    folder = work / Config(**SMALL).out
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return folder, rows, done.stdout


def test_a_run_leaves_rows_and_a_figure_and_prints_every_mean(small):
    folder, rows, printed = small
    assert sorted(path.name for path in folder.iterdir()) == ["figure.png", "results.jsonl"]
    assert (folder / "figure.png").stat().st_size > 50_000
    config = Config(**SMALL)
    assert irl.counts(config) == [1, 3]
    assert irl.counts(Config(demonstrations=70)) == [1, 3, 10, 30, 70]
    assert rows[:7] == irl.ambiguity(config)
    worlds = [row for row in rows if "world" in row]
    assert len(worlds) == 2 * 2 * 2 * 3 and len(rows) == 7 + len(worlds) + 2 * 2 * 2
    for expert in irl.EXPERTS:
        for world in irl.WORLDS:
            for method in irl.METHODS:
                two = irl.values(rows, method, expert=expert, world=world, demonstrations=3)
                assert len(two) == 2
                error = abs(two[0] - two[1]) / 2
                assert f"{100 * np.mean(two):.1f} ± {100 * error:.1f}" in printed


def test_a_run_can_be_had_again(small):
    """The rows of a seed do not depend on the seeds before it."""
    _, rows, _ = small
    for row in irl.experiment(Config(**SMALL), "noisy", 1):
        assert row in [{name: pytest.approx(value, abs=1e-6) if isinstance(value, float) else value
                        for name, value in one.items()} for one in rows]


def test_the_rewards_that_max_ent_learns_are_followed_where_cloning_fails(monkeypatch):
    """The result, with 30 demonstrations: after a change the four weights are near the optimum, and
    the copy is as far from it as its expert."""
    monkeypatch.setattr(irl, "counts", lambda _: [30])
    rows = irl.experiment(Config(), "optimal", 0) + irl.experiment(Config(), "noisy", 0)
    for world, expert_itself in ((irl.WORLDS[1], 0.851), (irl.WORLDS[2], 0.744)):
        one, = [row for row in rows if row.get("world") == world and row["expert"] == "optimal"]
        assert one["the expert itself"] == pytest.approx(expert_itself, abs=5e-4)
        assert one["max-ent"] > 0.95 > expert_itself + 0.03 > one["cloning"]
    one, = [row for row in rows if row.get("world") == "as shown" and row["expert"] == "noisy"]
    assert one["max-ent"] > 0.95 > 0.6 > one["cloning"]


def test_a_reward_that_explains_the_old_world_may_lead_astray_in_the_new_one():
    """A weight a square, seed 1: some square of ice seems better than the hut. As long as it is
    slippery nobody can stay there, and the plan is a good one; once it has melted the walker
    stays."""
    config, shown, melted = Config(), make_world(0.5), make_world(0.0)
    _, states, actions = irl.demonstrate(config, shown, "optimal", 1)
    (_, rewards), = irl.learn(config, shown, states, actions)["max-ent, a weight a square"]
    ground = np.array(list("".join(MAP)))
    assert rewards[ground == "~"].max() > rewards[ground == "G"].max()
    assert irl.worth(best_policy(rewards, shown.transitions, 20), shown) > 0.98
    plan = best_policy(rewards, melted.transitions, 20)
    steps = visits(plan, melted.transitions, melted.west).sum((0, 2))
    assert steps[ground == "~"].sum() > 13 and steps[ground == "G"].sum() == 0


def test_the_noisy_experts_commonest_actions_are_not_the_best_ones():
    """Why cloning them stops at 0.54: they are best for a walker who will go on making mistakes."""
    world = make_world(0.5)
    policy = soft_policy(world.rewards, world.transitions, 20)
    often = visits(policy, world.transitions, world.start).sum(0)
    commonest = np.repeat((often == often.max(1, keepdims=True))[None], 20, 0)
    own = irl.worth(commonest / commonest.sum(2, keepdims=True), world)
    assert own == pytest.approx(0.537, abs=5e-4)


# ---- settings ------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments", [
    "--slip -0.1", "--slip 1.1", "--slip nan", "--horizon 4", "--horizon 201", "--horizon 7.5",
    "--demonstrations 0", "--demonstrations 10001", "--rationality 0", "--rationality 101",
    "--prior 0", "--prior 101", "--prior inf", "--seeds 1", "--seeds 1001", "--seed -1"])
def test_a_bad_setting_is_one_line(arguments):
    with pytest.raises(SystemExit) as stopped:
        parse(Config, "", arguments.split())
    message = str(stopped.value)
    assert message.startswith("error: ") and arguments.split()[0] in message and "\n" not in message


@pytest.mark.parametrize("arguments", [
    "--slip 0 --rationality 100", "--slip 1 --horizon 5", "--prior 100 --horizon 8",
    "--prior 0.01 --rationality 0.001"])
def test_the_least_and_the_largest_settings_work(arguments):
    config = parse(Config, "", ["--demonstrations", "1", *arguments.split()])
    for expert in irl.EXPERTS:
        for row in irl.experiment(config, expert, 0):
            assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))


def test_a_fit_that_does_not_end_is_one_line(monkeypatch):
    def never(*_):
        raise ArithmeticError("Newton's method has not converged")
    monkeypatch.setattr(irl, "newton", never)
    said = "^error: --prior 3.0: Newton's method has not converged; try a smaller one$"
    with pytest.raises(SystemExit, match=said):
        irl.experiment(Config(), "noisy", 0)


def test_a_folder_that_cannot_be_written_stops_it_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="^error: .*file/below: cannot be written"):
        irl.main(Config(out=str(tmp_path / "file/below")))
