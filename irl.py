"""Inverse reinforcement learning: an expert shows what to do; what does it want?

    maximise the causal entropy of pi,  subject to  mu(pi) = mu_E           (Ziebart et al. 2010)
        Q_t(s, a) = r(s, a) + E[V_t+1(s')]        V_t(s) = log sum_a exp Q_t(s, a)
        pi_t(a | s) = exp(Q_t(s, a) - V_t(s))     r(s, a) = w . phi(s, a)
    loss(w) = E[V_0(s_0)] - w . mu_E              gradient  mu(pi_w) - mu_E: features are matched

mu(pi) = E[sum over t < T of phi(s_t, a_t)], and mu_E is its mean over the demonstrations. Who
matches mu_E is as good as the expert for every reward that is linear in phi, because the values
differ by w . (mu - mu_E), whatever w is (Abbeel and Ng 2004).

    python irl.py       # who can follow when the ice has melted, or a tree bars the way? 1 minute

1) Which rewards explain a policy? All for which no action is better than the policy's own. Each of
   these is a linear inequality in R, so the rewards are a cone (Ng and Russell 2000, Theorem 3). In
   it are 0, a R + c with a > 0, and R + Phi(s') - Phi(s): infinitely many. With a horizon, Phi has
   to be 0 after the last step, or the walker hurries to where Phi is high; and + c changes nothing
   only because no trajectory can end early.
2) A walker wants to reach a hut. Before it lies a frozen lake with holes; on ice a step may slip.
       cloning      does in each square what the expert did most often; anything where it never was
       projection   a mixture of policies that matches mu_E (Abbeel and Ng 2004, section 3.1)
       max-ent      plans on the reward that the loss above learns, a weight for each kind of ground
       max-ent, a weight a square      the same, but it must find out what each square is worth
   The expert is optimal, or noisy: the soft policy of its reward. Then the world changes.

With two paths max-ent is Bradley-Terry: P(path 1) = sigmoid(r_1 - r_2), the model of bt.py. Where
actions alone choose the path, P(path) = pi_ref(path) exp(r(path)) / Z with a uniform pi_ref, and
with r / beta for r that is the optimum of RLHF, which ppo.py and dpo.py look for. Where chance
plays a part, weighing paths like that counts on good luck: hence E[V] above, not log E[exp V].

Differs from the papers: a finite horizon in place of a discount; Newton's method; and a normal
prior on w, without which the weights of an expert that never errs would be infinite.

Symbols: S states, A actions, d features, T horizon; rewards (S, A), features (S, A, d), transitions
P(s' | s, a) (S, A, S), policies (T, S, A), start (S,) of probabilities.

Writes  runs/irl/ : results.jsonl, figure.png
"""
from __future__ import annotations

import common  # noqa: F401  first, so that Ctrl-C while numpy is imported is one line, too

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common import fail
from common.figures import figure
from common.files import check_writable, write_jsonl
from common.settings import parse, require, require_numbers, run_folder, settings
from common.statistics import mean_se, newton, values

Mixture = list[tuple[float, np.ndarray]]  # share of each policy, and rewards it is best for


@settings
class Config:
    # ---- the world
    slip: float = 0.5  # Probability that a step on ice goes in a random direction.
    horizon: int = 20  # Steps of a demonstration.

    # ---- the expert and the learners
    demonstrations: int = 100  # The most that a learner sees; 1, 3, 10 and 30 are tried, too.
    rationality: float = 1.0  # Scale of the true reward in the noisy expert's soft policy.
    prior: float = 3.0  # Standard deviation of each of max-ent's weights before any demonstration.

    # ---- the experiment
    seeds: int = 20  # Repetitions, over which errors are computed.
    seed: int = 0  # First seed.
    out: str = ""  # Folder for rows and figure, if not one named by the settings.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="horizon demonstrations rationality prior seeds",
                        from_0="slip seed")
        require(self.slip <= 1, f"--slip {self.slip}: must be at most 1")
        require(5 <= self.horizon <= 200, f"--horizon {self.horizon}: must be from 5 to 200")
        require(2 <= self.seeds <= 1000, f"--seeds {self.seeds}: must be from 2 to 1000")
        for name, most in (("demonstrations", 10_000), ("rationality", 100), ("prior", 100)):
            value = getattr(self, name)
            require(value <= most, f"--{name} {value}: must be at most {most}")
        self.out = self.out or run_folder(self, "irl")


# ---- planning ------------------------------------------------------------------------------------

def check(rewards: np.ndarray, transitions: np.ndarray, horizon: int) -> None:
    """Raises ValueError unless these are rewards (S, A), transitions (S, A, S) and a horizon."""
    shape = np.shape(rewards)
    if len(shape) != 2 or np.shape(transitions) != (*shape, shape[0]):
        raise ValueError("expected rewards (S, A) and transitions (S, A, S), found "
                         f"{shape} and {np.shape(transitions)}")
    if not isinstance(horizon, (int, np.integer)) or horizon < 1:
        raise ValueError(f"horizon {horizon}: must be a whole number from 1")
    if not math.isfinite(float(np.abs(rewards).max()) * horizon):
        raise ValueError("rewards must be finite, and so must their sum over the horizon")
    if not (np.min(transitions) >= 0 and np.allclose(np.sum(transitions, 2), 1)):
        raise ValueError("transitions must be probabilities, of sum 1 over the next states")


def soft_values(rewards: np.ndarray, transitions: np.ndarray,
                horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """soft_policy, and its V_0 (S,): the expected return plus the entropy of the actions."""
    check(rewards, transitions, horizon)
    policy = np.empty((horizon, *np.shape(rewards)))
    V = np.zeros(len(rewards))  # after the last step
    for t in reversed(range(horizon)):
        Q = rewards + np.matmul(transitions, V)  # (S, A)
        top = Q.max(1, keepdims=True)  # taken out, so that exp cannot overflow
        odds = np.exp(Q - top)
        total = odds.sum(1, keepdims=True)
        policy[t] = odds / total
        V = (top + np.log(total))[:, 0]
    return policy, V


def soft_policy(rewards: np.ndarray, transitions: np.ndarray, horizon: int) -> np.ndarray:
    """P(action) (horizon, S, A) for rewards (S, A) and transitions (S, A, S), by the soft Bellman
    equations of the card. Raises ValueError for other shapes, and for what is no probability."""
    return soft_values(rewards, transitions, horizon)[0]


def best_policy(rewards: np.ndarray, transitions: np.ndarray, horizon: int) -> np.ndarray:
    """The optimal policy (T, S, A); actions that are equally good are equally likely."""
    check(rewards, transitions, horizon)
    policy = np.empty((horizon, *np.shape(rewards)))
    V = np.zeros(len(rewards))
    for t in reversed(range(horizon)):
        Q = rewards + transitions @ V
        V = Q.max(1)
        best = Q >= V[:, None] - 1e-9 * np.abs(Q).max()
        policy[t] = best / best.sum(1, keepdims=True)
    return policy


def is_optimal(policy: np.ndarray, rewards: np.ndarray, transitions: np.ndarray) -> bool:
    """Whether in no state and at no step another action is better than those that the policy takes:
    Q(s, pi(s)) >= Q(s, a), where Q is the policy's own and so linear in the rewards.

    Args:
        rewards: (S, A), or (T, S, A) where they change from step to step.
    """
    rewards = np.broadcast_to(rewards, policy.shape)
    V = np.zeros(policy.shape[1])
    for t in reversed(range(len(policy))):
        Q = rewards[t] + transitions @ V
        loss = Q.max(1, keepdims=True) - Q
        if (loss[policy[t] > 0] > 1e-8 * np.abs(Q).max()).any():
            return False
        V = (policy[t] * Q).sum(1)
    return True


def visits(policy: np.ndarray, transitions: np.ndarray, start: np.ndarray) -> np.ndarray:
    """P(s_t = s, a_t = a), (T, S, A), by a pass forward."""
    chance = np.empty(policy.shape)
    states = start
    for t, actions in enumerate(policy):
        chance[t] = states[:, None] * actions
        states = chance[t].ravel() @ transitions.reshape(-1, len(start))  # summed over s and a
    return chance


def expected(what: np.ndarray, policy: np.ndarray, transitions: np.ndarray,
             start: np.ndarray) -> np.ndarray:
    """E[sum over t of what(s_t, a_t)]: the value for rewards (S, A), mu for features (S, A, d)."""
    return np.tensordot(visits(policy, transitions, start).sum(0), what, 2)


# ---- learning from demonstrations ----------------------------------------------------------------

def cloning(states: np.ndarray, actions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A policy of this shape, (T, S, A): in each state the action that the expert took most often
    in its demonstrations, states and actions (n, T); any action where it never was."""
    counts = np.zeros(shape[1:])
    np.add.at(counts, (states, actions), 1)
    best = counts == counts.max(1, keepdims=True)
    return np.broadcast_to(best / best.sum(1, keepdims=True), shape)


def projection(features: np.ndarray, transitions: np.ndarray, horizon: int, start: np.ndarray,
               mu_E: np.ndarray, rounds: int = 100) -> Mixture:
    """A mixture of policies with features mu_bar near mu_E, found by going again and again from
    mu_bar towards the policy that is best for what is missing, as far as it helps."""
    rewards = np.zeros(features.shape[:2])  # the first policy: every action is as good
    mu_bar = expected(features, best_policy(rewards, transitions, horizon), transitions, start)
    mixture = [(1.0, rewards)]
    for _ in range(rounds):
        # 1) the reward by which the mixture falls short of the expert most
        w = mu_E - mu_bar
        if np.linalg.norm(w) < 1e-6:
            break  # as good as the expert, whatever it wants
        rewards = features @ (w / np.linalg.norm(w))
        # 2) the policy that is best for it
        mu = expected(features, best_policy(rewards, transitions, horizon), transitions, start)
        # 3) the point nearest to the expert between the mixture and this policy
        toward = mu - mu_bar
        if w @ toward < 1e-9:
            break  # no policy brings it nearer
        step = min(1.0, float(w @ toward / (toward @ toward)))
        mu_bar = mu_bar + step * toward
        mixture = [(share * (1 - step), old) for share, old in mixture] + [(step, rewards)]
    return mixture


def max_ent_loss(w: np.ndarray, features: np.ndarray, transitions: np.ndarray, horizon: int,
                 start: np.ndarray, mu_E: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """E[V_0] - w . mu_E, its gradient (d,) and its Hessian (d, d): how far the features that are
    still to come vary with the action, summed over the steps. No variance is negative: the loss is
    convex."""
    policy, V = soft_values(features @ w, transitions, horizon)
    chance = visits(policy, transitions, start)
    gradient = np.tensordot(chance.sum(0), features, 2) - mu_E
    hessian = np.zeros((len(w), len(w)))
    ahead = np.zeros((len(start), len(w)))  # E[features from here on | s]
    for t in reversed(range(horizon)):
        to_come = features + transitions @ ahead  # E[features from here on | s, a], (S, A, d)
        ahead = (policy[t][..., None] * to_come).sum(1)
        apart = (to_come - ahead[:, None]).reshape(-1, len(w))  # (S * A, d)
        hessian += apart.T @ (chance[t].reshape(-1, 1) * apart)
    return start @ V - w @ mu_E, gradient, hessian


def max_ent(features: np.ndarray, transitions: np.ndarray, horizon: int, start: np.ndarray,
            mu_E: np.ndarray, n: float = 1, prior: float = math.inf) -> np.ndarray:
    """The weights (d,) with the lowest loss on n demonstrations of mean features mu_E, plus that of
    a normal prior with this standard deviation. Raises ArithmeticError if there are none: without a
    prior, where no soft policy has these features."""
    decay = 1 / (n * prior**2)

    def objective(w: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        loss, gradient, hessian = max_ent_loss(w, features, transitions, horizon, start, mu_E)
        return loss + decay / 2 * (w @ w), gradient + decay * w, hessian + decay * np.eye(len(w))
    return newton(objective, np.zeros(len(mu_E)), 1e-8)[0]


# ---- the world -----------------------------------------------------------------------------------

MAP = (".........",
       ".o~~o~~o.",
       "..~~~~~.G",
       ".o~~o~~o.",
       "mmmmmmmmm")
TREE = (0, 4)  # where one falls: row and column
KINDS = {"hut": "G", "hole": "o", "mud": "m", "ice": "~"}  # the features; grass has none
WEIGHTS = np.array([1.0, -3.0, -0.5, 0.0])  # what the expert wants: rewards of a step on each
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # north, east, south, west


class World(NamedTuple):
    """The map as a Markov decision process. Its states are the squares, row by row."""
    transitions: np.ndarray  # (S, A, S)
    kinds: np.ndarray  # (S, A, 4) features: which kind of ground
    squares: np.ndarray  # (S, A, S) features: which square
    rewards: np.ndarray  # (S, A) the true ones; no learner sees them
    start: np.ndarray  # (S,) of demonstrations: any square
    west: np.ndarray  # (S,) where a learner is measured: the western columns, before the lake


def make_world(slip: float, tree: bool = False) -> World:
    """A step on ice goes in a random direction with probability `slip`. The edge and a fallen tree
    stop a step: the walker stays."""
    ground = np.array([list(row) for row in MAP])
    if tree:
        ground[TREE] = "#"
    height, width = ground.shape
    S, A = ground.size, len(MOVES)
    sure = np.zeros((S, A, S))  # where a step leads without slipping
    for s in range(S):
        for a, (down, right) in enumerate(MOVES):
            y, x = s // width + down, s % width + right
            stopped = not (0 <= y < height and 0 <= x < width) or ground[y, x] == "#"
            sure[s, a, s if stopped else y * width + x] = 1

    slips = slip * (ground.ravel() == "~")[:, None, None]
    transitions = (1 - slips) * sure + slips * sure.mean(1, keepdims=True)
    kinds = np.stack([ground.ravel() == letter for letter in KINDS.values()], 1).astype(float)
    kinds = np.repeat(kinds[:, None], A, 1)
    west = (np.arange(S) % width < 2) / (2 * height)
    return World(transitions, kinds, np.repeat(np.eye(S)[:, None], A, 1), kinds @ WEIGHTS,
                 np.full(S, 1 / S), west)


def draw_each(chances: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One of the columns for each row of probabilities (n, columns)."""
    return (chances.cumsum(1) > rng.random((len(chances), 1))).argmax(1)


def demonstrate(config: Config, world: World, expert: str,
                seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The expert's policy, and the states and actions (n, T) that it shows."""
    if expert == "optimal":
        policy = best_policy(world.rewards, world.transitions, config.horizon)
    else:
        policy = soft_policy(config.rationality * world.rewards, world.transitions, config.horizon)
    rng = np.random.default_rng(seed)
    state = draw_each(np.repeat(world.start[None], config.demonstrations, 0), rng)
    states, actions = [], []
    for of_step in policy:
        action = draw_each(of_step[state], rng)
        states.append(state)
        actions.append(action)
        state = draw_each(world.transitions[state, action], rng)
    return policy, np.stack(states, 1), np.stack(actions, 1)


# ---- 1) which rewards explain a policy -----------------------------------------------------------

def ambiguity(config: Config) -> list[dict]:
    """For some rewards, whether the expert's policy is optimal; of random ones, for how many."""
    world = make_world(config.slip)
    R, P = world.rewards, world.transitions
    policy = best_policy(R, P, config.horizon)
    rng = np.random.default_rng(config.seed)
    phi = rng.normal(size=len(R))
    shaped = np.repeat((R + P @ phi - phi[:, None])[None], config.horizon, 0)
    phi_ends_at_0 = shaped.copy()
    phi_ends_at_0[-1] = R - phi[:, None]
    rewards = {"R, the true one": R, "0": 0 * R, "2 R + 3": 2 * R + 3, "-R": -R,
               "R + Phi(s') - Phi(s), Phi = 0 after the last step": phi_ends_at_0,
               "R + Phi(s') - Phi(s), the same Phi to the end": shaped}
    rows = [{"reward": name, "optimal": is_optimal(policy, reward, P)}
            for name, reward in rewards.items()]
    drawn = [is_optimal(policy, rng.normal(size=R.shape), P) for _ in range(1000)]
    return rows + [{"reward": "1000 random ones", "optimal_for": sum(drawn)}]


# ---- 2) who can follow ---------------------------------------------------------------------------

EXPERTS = ("optimal", "noisy")
METHODS = ("cloning", "projection", "max-ent", "max-ent, a weight a square")
WORLDS = ("as shown", "the ice has melted", "a tree has fallen")


def learn(config: Config, world: World, states: np.ndarray,
          actions: np.ndarray) -> dict[str, Mixture]:
    """The rewards that each method finds behind demonstrations (n, T)."""
    P, T, n = world.transitions, config.horizon, len(states)
    start = np.bincount(states[:, 0], minlength=len(P)) / n  # where these demonstrations began
    mu_kinds = world.kinds[states, actions].sum((0, 1)) / n
    mu_squares = world.squares[states, actions].sum((0, 1)) / n
    try:
        w = max_ent(world.kinds, P, T, start, mu_kinds, n, config.prior)
        w_squares = max_ent(world.squares, P, T, start, mu_squares, n, config.prior)
    except ArithmeticError as error:
        fail(f"--prior {config.prior}: {error}; try a smaller one")
    return {"projection": projection(world.kinds, P, T, start, mu_kinds),
            "max-ent": [(1.0, world.kinds @ w)],
            "max-ent, a weight a square": [(1.0, world.squares @ w_squares)]}


def worth(policy: np.ndarray, world: World) -> float:
    """The policy's value for walkers from the west: 0 that of random actions, 1 the best."""
    best = best_policy(world.rewards, world.transitions, len(policy))
    random = np.full(best.shape, 1 / len(MOVES))
    low, high, value = [expected(world.rewards, one, world.transitions, world.west)
                        for one in (random, best, policy)]
    return float((value - low) / (high - low))


def counts(config: Config) -> list[int]:
    """Numbers of demonstrations with which the learners are measured."""
    return [n for n in (1, 3, 10, 30) if n < config.demonstrations] + [config.demonstrations]


def experiment(config: Config, expert: str, seed: int) -> list[dict]:
    """What each method is worth in the world that was shown, and in two that have changed."""
    shown = make_world(config.slip)
    worlds = dict(zip(WORLDS, (shown, make_world(0.0), make_world(config.slip, tree=True))))
    policy, states, actions = demonstrate(config, shown, expert, seed)
    rows = []
    for n in counts(config):
        where = {"expert": expert, "demonstrations": n, "seed": seed}
        copy = cloning(states[:n], actions[:n], policy.shape)
        learned = learn(config, shown, states[:n], actions[:n])
        (_, rewards), = learned["max-ent"]
        squares = ["".join(MAP).index(letter) for letter in KINDS.values()]  # one of each kind
        rows.append({**where, **dict(zip(KINDS, rewards[squares, 0].tolist()))})
        for name, world in worlds.items():
            found = {"the expert itself": worth(policy, world), "cloning": worth(copy, world)}
            for method, mixture in learned.items():
                found[method] = 0.0
                for share, rewards in mixture:  # learned in the world shown, planned on in this one
                    plan = best_policy(rewards, world.transitions, config.horizon)
                    found[method] += share * worth(plan, world)
            rows.append({**where, "world": name, **found})
    return rows


# ---- the command ---------------------------------------------------------------------------------

def main(config: Config) -> None:
    """Run both parts, write their rows and the figure, and print the tables."""
    folder = Path(config.out)
    check_writable(folder)
    rows = ambiguity(config)
    print("1) Is the expert's policy optimal for this reward?\n")
    for row in rows:
        said = row.get("optimal_for", "yes" if row.get("optimal") else "no")
        print(f"   {row['reward']:52}{said}")
    for seed in tqdm(range(config.seed, config.seed + config.seeds), "experts"):
        for expert in EXPERTS:
            rows += experiment(config, expert, seed)
    write_jsonl(folder / "results.jsonl", rows)
    draw(rows, config, folder / "figure.png")

    print("\n2) value in % (random actions 0, the best policy 100) after so many demonstrations, "
          f"{config.seeds} seeds")
    for expert in EXPERTS:
        for world in WORLDS:
            print()
            print_line(f"{expert} expert, {world}", [str(n) for n in counts(config)])
            for method in ("the expert itself", *METHODS):
                means, errors = means_of(rows, config, expert, world, method)
                print_line(method, [f"{100 * mean:.1f} ± {100 * error:.1f}"
                                    for mean, error in zip(means, errors)])
    print()
    print_line(f"weights, {config.demonstrations} demonstrations", list(KINDS))
    print_line("the expert's own", [f"{w:.2f}" for w in WEIGHTS])
    for expert in EXPERTS:
        found = [mean_se(values(rows, kind, expert=expert, demonstrations=config.demonstrations))
                 for kind in KINDS]
        cells = [f"{mean:.2f} ± {error:.2f}" for mean, error in found]
        print_line(f"max-ent, {expert} expert", cells)
    print(f"\nrows and figure  ->  {folder}")


def means_of(rows: list[dict], config: Config, expert: str, world: str,
             method: str) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard errors of a method's share, with each number of demonstrations."""
    return mean_se(np.array([values(rows, method, expert=expert, world=world, demonstrations=n)
                             for n in counts(config)]))


def print_line(label: str, cells: list[str]) -> None:
    """A row of a table."""
    print(f"{label:34}" + "".join(f"{cell:>14}" for cell in cells))


def draw(rows: list[dict], config: Config, path: Path) -> None:
    """The reward learned for each square; what each method is worth, against demonstrations."""
    panels = [("optimal", world) for world in WORLDS] + [("noisy", "as shown")]
    with figure(path, 3, width=4, height=4, rows=2) as (_, axes):
        world = make_world(config.slip)
        for axis, expert in zip(axes[:2], EXPERTS):
            _, states, actions = demonstrate(config, world, expert, config.seed)
            (_, rewards), = learn(config, world, states, actions)["max-ent, a weight a square"]
            top = np.abs(rewards).max()
            axis.imshow(rewards[:, 0].reshape(len(MAP), -1), cmap="RdYlGn", vmin=-top, vmax=top)
            for y, line in enumerate(MAP):
                for x, letter in enumerate(line):
                    axis.text(x, y, letter, ha="center", va="center")
            axis.set(xticks=[], yticks=[], title=f"learned from the {expert} expert,\n"
                     "a weight a square (green: good)")
        for axis, (expert, name) in zip(axes[2:], panels):
            for method in METHODS:
                means, errors = means_of(rows, config, expert, name, method)
                axis.errorbar(counts(config), means, errors, fmt="o-", capsize=3, label=method)
            own, _ = means_of(rows, config, expert, name, "the expert itself")
            axis.axhline(own[0], color="black", linestyle="--", label="the expert, as before")
            axis.set(xscale="log", xlabel="demonstrations", ylim=(-0.05, 1.05),
                     title=f"{expert} expert,\n{name}")
        for axis in (axes[2], axes[3]):
            axis.set_ylabel("value: random actions 0, the best 1")
        axes[2].legend()


if __name__ == "__main__":
    main(parse(Config, __doc__))
