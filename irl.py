"""Inverse reinforcement learning: an expert shows what to do; what does it want?

    maximise the causal entropy of pi,  subject to  mu(pi) = mu_E           (Ziebart et al. 2010)
        Q_t(s, a) = r(s, a) + E[V_t+1(s')]       V_t(s) = log sum_a exp Q_t(s, a)
        pi_t(a | s) = exp(Q_t(s, a) - V_t(s))    r(s, a) = w . phi(s, a)
    loss(w) = E[V_0(s_0)] - w . mu_E             gradient  mu(pi_w) - mu_E: features are matched

mu(pi) = E[sum over t < T of phi(s_t, a_t)], mu_E its mean over the demonstrations. Whoever matches
mu_E is as good as the expert for every reward that is linear in phi, whatever w is: the values
differ by w . (mu - mu_E) (Abbeel and Ng 2004).

    python irl.py       # who follows when the ice has melted, or a tree bars the way? 1 minute

1) Which rewards explain a policy? Infinitely many: 0, a R + c for a > 0, R + Phi(s') - Phi(s). All
   those for which no action is better than the policy's own, each a linear inequality in R: a cone
   (Ng and Russell 2000). What the methods add is a reason to choose one of them.
2) A walker who wants to reach a hut, and a lake in between, frozen, with holes. On ice a step may
   slip. Four learners see the same demonstrations:
       cloning      does in each square what the expert did most often; anything where it was never
       projection   Abbeel and Ng's: a mixture of policies that matches mu_E
       max-ent      plans on the reward that the loss above learns: one weight for each kind of ground
       max-ent, a weight a square      the same, not told that two squares are of the same kind
   The expert is optimal, or acts by the soft policy of its reward. Then the world changes.

With two paths of known ends max-ent is Bradley-Terry: P(path 1) = sigmoid(r_1 - r_2), the model of
bt.py. Among paths that only the actions choose it is P(path) = pi_ref(path) exp(r(path)) / Z with a
uniform pi_ref, which with r / beta for r is the optimum of RLHF (ppo.py, dpo.py).

Differs from the papers: horizons are finite, so that nothing is discounted; a normal prior on w,
without which an expert that never errs would have infinite weights; Newton's method.

Symbols: S states, A actions, d features, T horizon; rewards (S, A), features (S, A, d), transitions
(S, A, S): P(s' | s, a); policies (T, S, A); start (S,).

Writes  runs/irl/ : results.jsonl, figure.png
"""
from __future__ import annotations

import common  # noqa: F401  first, so that Ctrl-C while numpy is imported is one line, too

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common.figures import figure
from common.files import check_writable, write_jsonl
from common.settings import parse, require, require_numbers, run_folder, settings
from common.statistics import mean_se, newton

Plans = list[tuple[float, np.ndarray]]  # (share, rewards (S, A)) of the policies of a mixture


@settings
class Config:
    # ---- the world
    slip: float = 0.5  # Probability that a step on ice goes in a random direction.
    horizon: int = 20  # Steps of a demonstration.

    # ---- the expert
    demonstrations: int = 100  # The most that a learner sees.
    rationality: float = 1.0  # Of the noisy expert: the scale of the true reward in its soft policy.

    # ---- max-ent
    prior: float = 3.0  # Standard deviation of each weight before any demonstration.

    # ---- the experiment
    seeds: int = 20  # Repetitions, over which errors are computed.
    seed: int = 0  # First seed.
    out: str = ""  # Folder for rows and figure, if not one named by the settings.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="horizon demonstrations rationality prior seeds",
                        from_0="slip seed")
        require(self.slip <= 1, f"--slip {self.slip}: must be at most 1")
        for name, most in (("horizon", 1000), ("demonstrations", 10**5), ("rationality", 1000),
                           ("prior", 1000)):
            value = getattr(self, name)
            require(value <= most, f"--{name} {value}: must be at most {most}")
        require(2 <= self.seeds <= 1000, f"--seeds {self.seeds}: must be from 2 to 1000")
        self.out = self.out or run_folder(self, "irl")


# ---- planning ------------------------------------------------------------------------------------

def check(rewards: np.ndarray, transitions: np.ndarray, horizon: int) -> None:
    """Raises ValueError unless these are rewards (S, A), transitions (S, A, S) and a horizon."""
    if np.ndim(rewards) != 2 or np.shape(transitions) != (*np.shape(rewards), len(rewards)):
        raise ValueError("expected rewards (S, A) and transitions (S, A, S), found "
                         f"{np.shape(rewards)} and {np.shape(transitions)}")
    if not np.isfinite(rewards).all():
        raise ValueError("rewards must be finite")
    if not (np.min(transitions) >= 0 and np.allclose(np.sum(transitions, 2), 1)):
        raise ValueError("transitions must be >= 0 and of sum 1 over the next states")
    if horizon != int(horizon) or horizon < 1:
        raise ValueError(f"horizon {horizon}: must be a whole number from 1")


def soft_values(rewards: np.ndarray, transitions: np.ndarray,
                horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """The policy (T, S, A) of maximum causal entropy, and its V_0 (S,): return plus entropy."""
    check(rewards, transitions, horizon)
    policy = np.empty((horizon, *np.shape(rewards)))
    V = np.zeros(len(rewards))  # after the last step
    for t in reversed(range(horizon)):
        Q = rewards + transitions @ V  # (S, A)
        top = Q.max(1, keepdims=True)  # taken out, so that exp cannot overflow
        odds = np.exp(Q - top)
        total = odds.sum(1, keepdims=True)
        policy[t] = odds / total
        V = (top + np.log(total))[:, 0]
    return policy, V


def soft_policy(rewards: np.ndarray, transitions: np.ndarray, horizon: int) -> np.ndarray:
    """P(action) (horizon, S, A) for rewards (S, A) and transitions (S, A, S), of maximum causal
    entropy: the soft Bellman equations of the card. Raises ValueError on other shapes."""
    return soft_values(rewards, transitions, horizon)[0]


def best_policy(rewards: np.ndarray, transitions: np.ndarray, horizon: int) -> np.ndarray:
    """The optimal policy (T, S, A); actions that are equally good are equally likely."""
    check(rewards, transitions, horizon)
    policy = np.empty((horizon, *np.shape(rewards)))
    V = np.zeros(len(rewards))
    for t in reversed(range(horizon)):
        Q = rewards + transitions @ V
        V = Q.max(1)
        best = Q >= V[:, None] - 1e-9 * (1 + np.abs(V).max())
        policy[t] = best / best.sum(1, keepdims=True)
    return policy


def is_optimal(policy: np.ndarray, rewards: np.ndarray, transitions: np.ndarray) -> bool:
    """Whether no other action is better, at any step and in any state, than those that the policy
    takes: Q(s, pi(s)) >= Q(s, a) with the policy's own Q, linear in R (Ng and Russell 2000, Eq. 4,
    for a finite horizon).

    Args:
        rewards: (S, A), or (T, S, A) where each step has its own.
    """
    rewards = np.broadcast_to(rewards, policy.shape)
    V = np.zeros(policy.shape[1])
    for t in reversed(range(len(policy))):
        Q = rewards[t] + transitions @ V
        short = Q.max(1, keepdims=True) - Q
        if (short[policy[t] > 0] > 1e-8 * (1 + np.abs(Q).max())).any():
            return False
        V = (policy[t] * Q).sum(1)
    return True


def visits(policy: np.ndarray, transitions: np.ndarray, start: np.ndarray) -> np.ndarray:
    """P(s_t = s, a_t = a), (T, S, A), by a pass forward."""
    chance = np.empty(policy.shape)
    states = start
    for t, actions in enumerate(policy):
        chance[t] = states[:, None] * actions
        states = np.tensordot(chance[t], transitions, 2)  # summed over s and a
    return chance


def expected(what: np.ndarray, policy: np.ndarray, transitions: np.ndarray,
             start: np.ndarray) -> np.ndarray | float:
    """E[sum over t of what(s_t, a_t)]: the value for rewards (S, A), mu for features (S, A, d)."""
    return np.tensordot(visits(policy, transitions, start).sum(0), what, 2)


# ---- learners ------------------------------------------------------------------------------------

def cloning(states: np.ndarray, actions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """In each state the action that the expert took most often; any, where it never was.

    Args:
        states, actions: (n, T), the demonstrations.
        shape: (T, S, A) of the policy that is returned.
    """
    counts = np.zeros(shape[1:])
    np.add.at(counts, (states, actions), 1)
    best = counts == counts.max(1, keepdims=True)
    return np.broadcast_to(best / best.sum(1, keepdims=True), shape)


def projection(features: np.ndarray, transitions: np.ndarray, horizon: int, start: np.ndarray,
               mu_E: np.ndarray, rounds: int = 50) -> Plans:
    """Abbeel and Ng (2004, section 3.1): the point nearest to mu_E that mixtures of policies reach,
    by going again and again as near as possible on the way to the best policy for what is missing.

    Returns the share and the rewards of each policy in the mixture.
    """
    rewards = np.zeros(features.shape[:2])  # the first policy: every action is as good
    mu_bar = expected(features, best_policy(rewards, transitions, horizon), transitions, start)
    plans = [(1.0, rewards)]
    for _ in range(rounds):
        # 1) the reward for which the mixture falls short of the expert by most
        w = mu_E - mu_bar
        if np.linalg.norm(w) < 1e-6:
            break
        rewards = features @ (w / np.linalg.norm(w))
        # 2) the best policy for it
        mu = expected(features, best_policy(rewards, transitions, horizon), transitions, start)
        # 3) the point between it and the mixture that is nearest to the expert
        toward = mu - mu_bar
        if w @ toward < 1e-9:
            break  # no policy is nearer
        step = min(1.0, (w @ toward) / (toward @ toward))
        mu_bar = mu_bar + step * toward
        plans = [(share * (1 - step), old) for share, old in plans] + [(step, rewards)]
    return plans


def max_ent_loss(w: np.ndarray, features: np.ndarray, transitions: np.ndarray, horizon: int,
                 start: np.ndarray, mu_E: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """E[V_0] - w . mu_E, which is convex in w, its gradient (d,) and its Hessian (d, d).

    The gradient is mu(pi_w) - mu_E. The Hessian is how far the features still to come vary with the
    action: the sum over t of E[Cov over a ~ pi_t of E[phi_t + ... + phi_T-1 | s_t, a]].
    """
    policy, V = soft_values(features @ w, transitions, horizon)
    chance = visits(policy, transitions, start)
    gradient = np.tensordot(chance.sum(0), features, 2) - mu_E
    hessian = np.zeros((len(w), len(w)))
    ahead = np.zeros((len(start), len(w)))  # E[features from here on | s]
    for t in reversed(range(horizon)):
        to_come = features + transitions @ ahead  # (S, A, d)
        ahead = (policy[t][..., None] * to_come).sum(1)  # (S, d)
        apart = (to_come - ahead[:, None]).reshape(-1, len(w))
        hessian += apart.T @ (chance[t].reshape(-1, 1) * apart)
    return start @ V - w @ mu_E, gradient, hessian


def max_ent(features: np.ndarray, transitions: np.ndarray, horizon: int, start: np.ndarray,
            mu_E: np.ndarray, n: float = 1, prior: float = math.inf) -> np.ndarray:
    """The weights (d,) that n demonstrations with mean features mu_E make most likely, each weight
    with a normal prior of this standard deviation. Raises ArithmeticError where there are none:
    without a prior and with features that no soft policy has."""
    weight_decay = 1 / (n * prior**2)

    def objective(w: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        loss, gradient, hessian = max_ent_loss(w, features, transitions, horizon, start, mu_E)
        return (loss + weight_decay * (w @ w) / 2, gradient + weight_decay * w,
                hessian + weight_decay * np.eye(len(w)))
    return newton(objective, np.zeros(len(mu_E)), 1e-8)[0]


# ---- the world -----------------------------------------------------------------------------------

MAP = (".........",
       ".o~~o~~o.",
       "..~~~~~.G",
       ".o~~o~~o.",
       "mmmmmmmmm")
TREE = (0, 4)  # where it falls
KINDS = {"hut": "G", "hole": "o", "mud": "m", "ice": "~"}  # the features; grass has none
WEIGHTS = np.array([1.0, -3.0, -0.5, 0.0])  # of a step on each, for the expert
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # north, east, south, west


class World(NamedTuple):
    """A map as a Markov decision process. States are its squares, row by row."""
    transitions: np.ndarray  # (S, A, S)
    kinds: np.ndarray  # (S, A, 4) features: one for each kind of ground
    squares: np.ndarray  # (S, A, S) features: one for each square
    start: np.ndarray  # (S,) of the demonstrations: any square
    west: np.ndarray  # (S,) of the walkers that a learner is measured by: the lake is before them

    @property
    def rewards(self) -> np.ndarray:
        """What the expert wants, (S, A). The learners never see it."""
        return self.kinds @ WEIGHTS


def make_world(slip: float, tree: bool = False) -> World:
    """The map, with a step on ice in a random direction with probability `slip`. Trees and the edge
    stop a step: the walker stays."""
    rows = [list(row) for row in MAP]
    if tree:
        rows[TREE[0]][TREE[1]] = "#"
    height, width = len(rows), len(rows[0])
    ground = np.array(rows).ravel()  # (S,)
    S, A = len(ground), len(MOVES)
    leads = np.empty((S, A), int)  # where a step would end without slipping
    for s in range(S):
        for a, (down, right) in enumerate(MOVES):
            y, x = s // width + down, s % width + right
            inside = 0 <= y < height and 0 <= x < width
            leads[s, a] = y * width + x if inside and rows[y][x] != "#" else s

    sure = np.eye(S)[leads]  # (S, A, S)
    lost = np.broadcast_to(sure.mean(1, keepdims=True), sure.shape)
    slips = slip * (ground == "~")[:, None, None]
    transitions = (1 - slips) * sure + slips * lost
    kinds = np.stack([ground == letter for letter in KINDS.values()], 1).astype(float)
    west = np.arange(S) % width < 2
    return World(transitions, np.repeat(kinds[:, None], A, 1),
                 np.repeat(np.eye(S)[:, None], A, 1), np.full(S, 1 / S), west / west.sum())


def demonstrate(policy: np.ndarray, world: World, n: int,
                rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """States (n, T) and actions (n, T) of an expert that starts on random squares."""
    def draw(chances: np.ndarray) -> np.ndarray:
        """One of the columns for each row of probabilities (n, columns)."""
        return (chances.cumsum(1) > rng.random((len(chances), 1))).argmax(1)

    state = draw(np.repeat(world.start[None], n, 0))
    states, actions = [], []
    for of_step in policy:
        action = draw(of_step[state])
        states.append(state)
        actions.append(action)
        state = draw(world.transitions[state, action])
    return np.stack(states, 1), np.stack(actions, 1)


# ---- 1) which rewards explain a policy -----------------------------------------------------------

def ambiguity(config: Config) -> list[dict]:
    """Rewards under which the expert's policy is optimal, and some under which it is not."""
    world, T = make_world(config.slip), config.horizon
    rng = np.random.default_rng(config.seed)
    R, P = world.rewards, world.transitions
    policy = best_policy(R, P, T)
    phi = rng.normal(size=len(R))  # a potential
    shaped = np.repeat((R + P @ phi - phi[:, None])[None], T, 0)
    ends_at_0 = shaped.copy()
    ends_at_0[-1] = R - phi[:, None]
    rewards = {"R": R, "0": 0 * R, "2 R + 3": 2 * R + 3, "-R": -R,
               "R + Phi(s') - Phi(s), Phi = 0 after the last step": ends_at_0,
               "R + Phi(s') - Phi(s) at every step": shaped}
    rows = [{"reward": name, "optimal": is_optimal(policy, reward, P)}
            for name, reward in rewards.items()]
    drawn = [is_optimal(policy, rng.normal(size=R.shape), P) for _ in range(1000)]
    return rows + [{"reward": "1000 random rewards", "optimal": sum(drawn)}]


# ---- 2) who follows ------------------------------------------------------------------------------

METHODS = ("cloning", "projection", "max-ent", "max-ent, a weight a square")
EXPERTS = ("optimal", "noisy")
WORLDS = ("as shown", "the ice has melted", "a tree has fallen")


def learn(config: Config, world: World, states: np.ndarray,
          actions: np.ndarray) -> tuple[dict[str, Plans], np.ndarray]:
    """What each method that learns a reward makes of demonstrations (n, T) in this world; and the
    weights (4,) of max-ent."""
    P, T, n = world.transitions, config.horizon, len(states)
    start = np.bincount(states[:, 0], minlength=len(P)) / n  # where the demonstrations began
    mu_E = world.kinds[states, actions].sum((0, 1)) / n
    w = max_ent(world.kinds, P, T, start, mu_E, n, config.prior)
    mu_squares = world.squares[states, actions].sum((0, 1)) / n
    w_squares = max_ent(world.squares, P, T, start, mu_squares, n, config.prior)
    plans = {"projection": projection(world.kinds, P, T, start, mu_E),
             "max-ent": [(1.0, world.kinds @ w)],
             "max-ent, a weight a square": [(1.0, world.squares @ w_squares)]}
    return plans, w


def worth(policy: np.ndarray, world: World) -> float:
    """The policy's value for walkers from the west, as a share of the way from random actions (0)
    to the optimal policy of this world (1)."""
    best = best_policy(world.rewards, world.transitions, len(policy))
    uniform = np.full_like(best, 1 / len(MOVES))
    low, high, value = [expected(world.rewards, one, world.transitions, world.west)
                        for one in (uniform, best, policy)]
    return float((value - low) / (high - low))


def demonstrations(config: Config, expert: str,
                   seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The expert's policy, and states and actions (n, T) of all its demonstrations."""
    world, T = make_world(config.slip), config.horizon
    if expert == "optimal":
        policy = best_policy(world.rewards, world.transitions, T)
    else:
        policy = soft_policy(config.rationality * world.rewards, world.transitions, T)
    rng = np.random.default_rng(seed)
    return policy, *demonstrate(policy, world, config.demonstrations, rng)


def experiment(config: Config, expert: str, seed: int) -> list[dict]:
    """What each method's policy is worth after so many demonstrations, in the world that was shown
    and after a change."""
    shown = make_world(config.slip)
    worlds = dict(zip(WORLDS, (shown, make_world(0.0), make_world(config.slip, tree=True))))
    policy, states, actions = demonstrations(config, expert, seed)
    rows = []
    for n in counts(config):
        plans, w = learn(config, shown, states[:n], actions[:n])
        where = {"expert": expert, "demonstrations": n, "seed": seed}
        rows.append({**where, "weights": dict(zip(KINDS, w.tolist()))})
        for name, world in worlds.items():
            shares = {"expert": worth(policy, world)}  # who goes on as before
            shares["cloning"] = worth(cloning(states[:n], actions[:n], policy.shape), world)
            for method, mixture in plans.items():  # which plan anew, on the rewards they learned
                shares[method] = sum(
                    part * worth(best_policy(rewards, world.transitions, config.horizon), world)
                    for part, rewards in mixture)
            for method, share in shares.items():
                rows.append({**where, "world": name, "method": method, "share": share})
    return rows


def counts(config: Config) -> list[int]:
    """Numbers of demonstrations after which the learners are measured."""
    return [n for n in (1, 3, 10, 30) if n < config.demonstrations] + [config.demonstrations]


# ---- the command ---------------------------------------------------------------------------------

def main(config: Config) -> None:
    """Run both parts, write their rows and the figure, and print the tables."""
    folder = Path(config.out)
    check_writable(folder)
    rows = ambiguity(config)
    print("1) Is the expert's policy optimal for this reward?\n")
    for row in rows:
        answer = {True: "yes", False: "no"}.get(row["optimal"], row["optimal"])
        print(f"{row['reward']:56}{answer}")

    for seed in tqdm(range(config.seed, config.seed + config.seeds), "demonstrations"):
        for expert in EXPERTS:
            rows += experiment(config, expert, seed)
    write_jsonl(folder / "results.jsonl", rows)
    draw(rows, config, folder / "figure.png")
    print("\n2) Value for walkers from the west, mean of "
          f"{config.seeds} seeds: random actions 0%, the optimal policy 100%")
    for expert in EXPERTS:
        for world in WORLDS:
            print_table(rows, config, expert, world)
    print_weights(rows, config)
    print(f"\nrows and figure  ->  {folder}")


def values(rows: list[dict], name: str, **where: object) -> list:
    """A field of the rows that have it, and whose other fields are as `where` says."""
    return [row[name] for row in rows if name in row and where.items() <= row.items()]


def print_table(rows: list[dict], config: Config, expert: str, world: str) -> None:
    """Mean and standard error of every method's share, after so many demonstrations."""
    print(f"\n{expert + ' expert, ' + world:42}" + "".join(f"{n:>14}" for n in counts(config)))
    for method in ("expert", *METHODS):
        line = f"{'the expert itself' if method == 'expert' else method:42}"
        for n in counts(config):
            mean, error = mean_se(values(rows, "share", expert=expert, world=world, method=method,
                                         demonstrations=n))
            line += f"{mean:8.1%} ± {error:4.1%}"
        print(line)


def print_weights(rows: list[dict], config: Config) -> None:
    """What max-ent has learned from all demonstrations, beside the truth."""
    print(f"\n{'weights, all demonstrations':42}" + "".join(f"{kind:>16}" for kind in KINDS))
    print(f"{'the expert':42}" + "".join(f"{w:16.2f}" for w in WEIGHTS))
    for expert in EXPERTS:
        line = f"{'max-ent, ' + expert + ' expert':42}"
        found = values(rows, "weights", expert=expert, demonstrations=config.demonstrations)
        for kind in KINDS:
            mean, error = mean_se([weights[kind] for weights in found])
            line += f"{mean:9.2f} ± {error:4.2f}"
        print(line)


def draw(rows: list[dict], config: Config, path: Path) -> None:
    """The true reward of each square and the learned one; worth against demonstrations."""
    panels = [("optimal", world) for world in WORLDS] + [("noisy", "as shown")]
    with figure(path, 6, width=3.9, height=3.9) as (_, (true, learned, *curves)):
        world = make_world(config.slip)
        _, states, actions = demonstrations(config, "noisy", config.seed)
        plans, _ = learn(config, world, states, actions)
        (_, of_squares), = plans["max-ent, a weight a square"]
        for axis, rewards, title in ((true, world.rewards, "what the expert wants"),
                                     (learned, of_squares, f"learned, {len(states)} "
                                      "demonstrations\nof the noisy expert, a weight a square")):
            axis.imshow(rewards[:, 0].reshape(len(MAP), -1), cmap="RdYlGn", vmin=-4, vmax=4)
            for y, line in enumerate(MAP):
                for x, letter in enumerate(line):
                    axis.text(x, y, letter, ha="center", va="center")
            axis.set(xticks=[], yticks=[], title=title)

        for axis, (expert, name) in zip(curves, panels):
            for method in METHODS:
                draw_means(axis, rows, config, expert, name, method)
            own = np.mean(values(rows, "share", expert=expert, world=name, method="expert"))
            axis.axhline(own, color="black", linestyle="--", label="the expert, as before")
            axis.set(xscale="log", xlabel="demonstrations", ylim=(-0.05, 1.05),
                     title=f"{expert} expert,\n{name}")
        curves[0].set_ylabel("value, from random (0) to optimal (1)")
        curves[0].legend(fontsize=8)


def draw_means(axis, rows: list[dict], config: Config, expert: str, world: str,
               method: str) -> None:
    """Mean and standard error over seeds of a method's share, against the demonstrations."""
    table = [values(rows, "share", expert=expert, world=world, method=method, demonstrations=n)
             for n in counts(config)]
    mean, error = mean_se(np.array(table))  # of (counts, seeds)
    axis.errorbar(counts(config), mean, error, fmt="o-", capsize=3, markersize=4, label=method)


if __name__ == "__main__":
    main(parse(Config, __doc__))
