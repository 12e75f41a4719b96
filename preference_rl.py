"""Preferences over what someone does, not over what a thing is: which of two trajectories is better? One learns the reward
of a step from answers about whole segments (Christiano et al. 2017), one acts on it, and one asks again.

    P(tau1 preferred to tau2) = exp sum_t r(s1_t) / (exp sum_t r(s1_t) + exp sum_t r(s2_t))            (their Eq. 1)

It is bt.py's model with a trajectory's sum of rewards for the strength. With r(s) = w . phi(s) that sum is w . Phi, Phi the
features summed over the segment, so the fit is a logistic regression on Phi1 - Phi2, and what is still open about w is nearly
normal: N(w_hat, H^-1), H the curvature of the loss at its minimum (Laplace).

    python preference_rl.py      # a pendulum learns to stand up from answers alone; a minute on 2 cores

1) Asking well. Someone knows what they want of a pendulum: a weight for each of four things (up, slow, smooth, clockwise).
   How many answers until we know it, too? The question is drawn from 500 pairs of segments:
       random        any
       volume        the one whose answer, even the less telling, removes most of w  (Sadigh et al. 2017, Eq. 10)
       information   the one whose answer tells most about w, in nats                (Biyik et al. 2019)
   Volume has a flaw that the second paper names: two segments that are alike can be answered either way, which "removes half".
2) Backflips. The pendulum hangs; its motor is too weak to lift it, so it must swing. We see its states, never its reward,
   and ask about pairs of segments of two seconds that the present policy, with some exploration, has made. Questions and policy
   take turns: roll out, ask, fit, plan. How many bits until it stands?

Differs from the papers: a normal approximation in place of MCMC (1) and of an ensemble of networks (2); the policy is the
optimal one of the learned reward, by value iteration on a grid: what it loses is then the reward's fault alone.

Writes  runs/preference-rl/ : results.jsonl, figure.png
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, ClassVar

import numpy as np

from common import fail
from common.files import write_jsonl
from common.settings import parse, require, require_numbers

Array = np.ndarray


@dataclass
class Config:
    answers: int = 60  # questions about the four weights
    rounds: int = 12  # of roll out, ask, fit, plan
    questions: int = 10  # a round
    segment: int = 20  # steps of a segment; a step is 0.1 s
    rationality: float = 0.5  # of who compares segments: scale of the true rewards in their answers; 0 = a coin is thrown
    explore: float = 0.2  # share of random actions in what is asked about
    seeds: int = 10  # people asked; their answers, and what is rolled out
    seed: int = 0  # the first
    out: str = "runs/preference-rl"  # folder of rows and figure

    PRESETS: ClassVar[dict] = {}

    def __post_init__(self) -> None:
        require_numbers(self, above_0="answers rounds questions segment", from_0="rationality seed")
        require(self.seeds > 1, f"--seeds {self.seeds}: must be > 1")
        require(0 <= self.explore <= 1, f"--explore {self.explore}: must be in [0, 1]")
        require(self.segment <= STEPS, f"--segment {self.segment}: must be at most {STEPS}, the steps of an episode")


# ---- the model: P(1 preferred to 2) = sigmoid(w . (Phi1 - Phi2)), w ~ N(0, prior^2) -------------------------------------

def sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))


def fit_reward(D: Array, mu: Array, prior: float, w: Array | None = None) -> tuple[Array, Array]:
    """Posterior mode and covariance of the weights, by Newton's method.

    Args:
        D: (n, d) differences Phi1 - Phi2 of the features of each pair.
        mu: (n,) answers: 1 the first was preferred, 0 the second, 1/2 neither.
        w: (d,) where to start.
    """
    w = np.zeros(D.shape[1]) if w is None else w

    def loss(w: Array) -> float:
        x = D @ w
        return (np.logaddexp(0, x) - mu * x).sum() + (w @ w) / (2 * prior**2)

    for _ in range(100):
        p = sigmoid(D @ w)
        gradient = D.T @ (p - mu) + w / prior**2
        H = D.T @ ((p * (1 - p))[:, None] * D) + np.eye(len(w)) / prior**2
        if np.abs(gradient).max() < 1e-8:
            break
        step, size = np.linalg.solve(H, gradient), 1.0
        while loss(w - size * step) > loss(w) + 1e-10 and size > 1e-6:
            size /= 2
        w = w - size * step
    return w, np.linalg.inv(H)


def entropy(p: Array) -> Array:
    """Of an answer with probability p, nats."""
    return -(p * np.log(np.maximum(p, 1e-300)) + (1 - p) * np.log(np.maximum(1 - p, 1e-300)))


def by_chance(p: Array) -> Array:
    return np.zeros(p.shape[1])


def volume(p: Array) -> Array:
    """What the less telling answer removes of the distribution of w, for each question: min over answers of E[1 - P(answer)].

    p: (draws of w, questions) probabilities of the first answer.
    """
    return np.minimum(p.mean(0), 1 - p.mean(0))


def information(p: Array) -> Array:
    """Mutual information of w and the answer, nats: the entropy of the answer less the part that is the person's own noise."""
    return entropy(p.mean(0)) - entropy(p).mean(0)


WAYS = {"random": by_chance, "volume": volume, "information": information}


def choose(way: Callable[[Array], Array], D: Array, w: Array, covariance: Array, rng: np.random.Generator) -> int:
    """The question (row of D) with the highest value; the first of those that are alike."""
    draws = rng.multivariate_normal(w, covariance, 200, method="cholesky")
    return int(way(sigmoid(draws @ D.T)).argmax())


def ask(D: Array, w: Array, rng: np.random.Generator) -> Array:
    """The person's answers to the questions D, who has the weights w."""
    return (rng.random(len(D)) < sigmoid(D @ w)).astype(float)


# ---- the pendulum: angle 0 is up, a motor weaker than gravity -------------------------------------------------------------

TORQUES, STEPS, SPEED = np.array([-3.0, 0.0, 3.0]), 100, 8.0  # gravity pulls with up to 10


def move(state: Array, torque: Array) -> Array:
    """One step of 0.1 s: state (..., 2), angle in [-pi, pi) and speed, at most SPEED."""
    angle, speed = state[..., 0], state[..., 1]
    for _ in range(2):
        speed = np.clip(speed + (10 * np.sin(angle) + torque) * 0.05, -SPEED, SPEED)
        angle = angle + speed * 0.05
    return np.stack([(angle + np.pi) % (2 * np.pi) - np.pi, speed], -1)


def true_reward(state: Array) -> Array:
    """What the person wants of a step: up (1), and still. The learner never sees it."""
    return (1 + np.cos(state[..., 0])) / 2 - 0.01 * state[..., 1] ** 2


class Grid:
    """The pendulum as a Markov decision process on N x N states: a step leads to the four corners around where it ends."""

    def __init__(self, N: int = 51):
        self.N = N
        angle, speed = np.linspace(-np.pi, np.pi, N, endpoint=False), np.linspace(-SPEED, SPEED, N)
        self.states = np.stack(np.meshgrid(angle, speed, indexing="ij"), -1).reshape(-1, 2)
        self.next, self.weight = self.corners(move(self.states[:, None], TORQUES))

    def corners(self, state: Array) -> tuple[Array, Array]:
        """The four states around `state` (..., 2), and how near it is to each: (..., 4) numbers, (..., 4) weights of sum 1."""
        x, y = (state[..., 0] + np.pi) / (2 * np.pi) * self.N, (state[..., 1] + SPEED) / (2 * SPEED) * (self.N - 1)
        i, j = np.floor(x).astype(int), np.minimum(np.floor(y).astype(int), self.N - 2)
        x, y = x - i, y - j
        low, high = i % self.N * self.N, (i + 1) % self.N * self.N  # the angle goes round
        return (np.stack([low + j, low + j + 1, high + j, high + j + 1], -1),
                np.stack([(1 - x) * (1 - y), (1 - x) * y, x * (1 - y), x * y], -1))

    def plan(self, reward: Array, V: Array | None = None, gamma: float = 0.97) -> Array:
        """Values (N * N,) of the optimal policy for the reward (N * N,) of a step, by value iteration from V."""
        V = np.zeros(len(reward)) if V is None else V
        scale = np.ptp(reward) + 1e-12
        for _ in range(2000):
            old, V = V, reward + gamma * (V[self.next] * self.weight).sum(-1).max(1)
            if np.abs(V - old).max() < 1e-3 * scale:
                break
        return V

    def act(self, V: Array, state: Array) -> Array:
        """The torques (n,) that lead to the highest values."""
        corner, weight = self.corners(move(state[:, None], TORQUES))
        return TORQUES[(V[corner] * weight).sum(-1).argmax(1)]


def episodes(grid: Grid, V: Array | None, n: int, explore: float, rng: np.random.Generator) -> Array:
    """States (n, STEPS, 2) from hanging nearly still; without V all actions are random, held for half a second on average."""
    state = np.stack([np.pi + 0.2 * rng.normal(size=n), 0.2 * rng.normal(size=n)], -1)
    state[:, 0] = (state[:, 0] + np.pi) % (2 * np.pi) - np.pi
    seen, held, at_random = [], rng.choice(TORQUES, n), rng.random(n) < explore
    for _ in range(STEPS):
        seen.append(state)
        again = rng.random(n) < 0.2
        held = np.where(again, rng.choice(TORQUES, n), held)
        at_random = np.where(again, rng.random(n) < explore, at_random)
        state = move(state, held if V is None else np.where(at_random, held, grid.act(V, state)))
    return np.stack(seen, 1)


def bumps(state: Array) -> Array:
    """Features of a state for a reward of any shape: 12 x 9 normal bumps over angle and speed, of sum 1. (..., 108)"""
    angle, speed = np.linspace(-np.pi, np.pi, 12, endpoint=False), np.linspace(-SPEED, SPEED, 9)
    a = np.exp((np.cos(state[..., :1] - angle) - 1) / 0.4**2)
    b = np.exp(-0.5 * ((state[..., 1:] - speed) / 1.5) ** 2)
    phi = (a[..., :, None] * b[..., None, :]).reshape(*state.shape[:-1], -1)
    return phi / phi.sum(-1, keepdims=True)


# ---- 1) asking well --------------------------------------------------------------------------------------------------

def asking_well(config: Config, seed: int) -> list[dict]:
    """The angle, in degrees, between the person's weights and ours after every answer, for each way to ask."""
    rng = np.random.default_rng([seed, 1])
    grid = Grid(3)  # not planned on
    state = episodes(grid, None, 400, 1.0, rng)[:, rng.integers(0, STEPS - config.segment + 1):][:, :config.segment]
    speed = state[..., 1]
    Phi = np.stack([np.cos(state[..., 0]).sum(1), -(speed**2).sum(1), -np.abs(np.diff(speed, axis=1)).sum(1), speed.sum(1)], 1)
    Phi /= Phi.std(0)
    w = rng.normal(size=Phi.shape[1])
    w *= 3 / np.linalg.norm(w)
    rows = []
    for name, way in WAYS.items():
        rng = np.random.default_rng([seed, 2])
        D, mu, mode, covariance = np.zeros((0, len(w))), np.zeros(0), np.zeros(len(w)), 9 * np.eye(len(w))
        for n in range(1, config.answers + 1):
            pool = Phi[rng.integers(0, len(Phi), 500)] - Phi[rng.integers(0, len(Phi), 500)]
            question = pool[choose(way, pool, mode, covariance, rng)]
            D, mu = np.vstack([D, question]), np.append(mu, ask(question[None], w, rng))
            mode, covariance = fit_reward(D, mu, 3.0, mode)
            cosine = mode @ w / max(np.linalg.norm(mode) * np.linalg.norm(w), 1e-12)  # 0 while nothing is known
            rows.append({"experiment": "asking", "way": name, "seed": seed, "answers": n,
                         "degrees": math.degrees(math.acos(min(1, max(-1, cosine))))})
    return rows


# ---- 2) backflips ----------------------------------------------------------------------------------------------------

def backflips(config: Config, seed: int, grid: Grid, way: str) -> tuple[list[dict], Array]:
    """True return (mean of 50 episodes) after every round, and the reward learned in the end, on the grid."""
    rng, phi = np.random.default_rng([seed, 3]), bumps(grid.states)
    V, w, covariance = None, np.zeros(phi.shape[1]), np.eye(phi.shape[1])
    D, mu, certain, rows = np.zeros((0, len(w))), np.zeros(0), [], []
    for k in range(config.rounds + 1):
        value = true_reward(episodes(grid, V, 50, float(V is None), np.random.default_rng([seed, 4]))).sum(1).mean()
        rows.append({"experiment": "backflips", "way": way, "seed": seed, "answers": len(mu), "return": value,
                     "near_certain": float(np.mean(certain or [0]))})
        if k == config.rounds:
            return rows, phi @ w

        # ---- roll out, and cut into segments
        seen = episodes(grid, V, 40, config.explore if k else 1.0, rng)
        segments = seen[:, :STEPS // config.segment * config.segment].reshape(-1, config.segment, 2)
        Phi, R = bumps(segments).sum(1), config.rationality * true_reward(segments).sum(1)

        # ---- ask, one question after the other: each answer counts for the next
        for _ in range(config.questions):
            first, second = rng.integers(0, len(Phi), (2, 500))
            pool = Phi[first] - Phi[second]
            i = choose(WAYS[way], pool, w, covariance, rng)
            p = sigmoid(R[first[i]] - R[second[i]])
            certain.append(abs(p - 0.5) > 0.45)
            D, mu = np.vstack([D, pool[i]]), np.append(mu, float(rng.random() < p))
            w, covariance = fit_reward(D, mu, 1.0, w)

        # ---- plan on what was learned
        V = grid.plan(phi @ w, V)


def bits(rows: list[dict], goal: float) -> float:
    """Answers after which the mean return over seeds stays above the goal."""
    answers = sorted({row["answers"] for row in rows})
    mean = [np.mean([row["return"] for row in rows if row["answers"] == n]) for n in answers]
    below = [i for i, value in enumerate(mean) if value < goal]
    return math.inf if below and below[-1] == len(mean) - 1 else answers[below[-1] + 1 if below else 0]


def main(config: Config) -> None:
    """Both experiments, their tables and their figure."""
    seeds, rows = range(config.seed, config.seed + config.seeds), []

    def at(way: str, experiment: str, n: int, what: str) -> tuple[float, float]:
        values = [row[what] for row in rows if (row["experiment"], row["way"], row["answers"]) == (experiment, way, n)]
        return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))

    for seed in seeds:
        rows += asking_well(config, seed)
    shown = [n for n in (5, 10, 20, 40, 60) if n < config.answers] + [config.answers]
    print(f"1) asking well: degrees between the person's weights and ours, mean of {config.seeds} people\n\nanswers     "
          + "".join(f"{n:>14}" for n in shown))
    for way in WAYS:
        print(f"{way:12}" + "".join("{:8.1f} ± {:3.1f}".format(*at(way, "asking", n, "degrees")) for n in shown))

    grid, learned = Grid(), {}
    best = grid.plan(true_reward(grid.states))
    for seed in seeds:
        true = true_reward(episodes(grid, best, 50, 0.0, np.random.default_rng([seed, 4]))).sum(1).mean()
        rows.append({"experiment": "backflips", "way": "true reward", "seed": seed, "answers": 0, "return": true})
        for way in ("random", "information"):
            found, learned[way] = backflips(config, seed, grid, way)
            rows += found
    top = at("true reward", "backflips", 0, "return")
    total = config.rounds * config.questions
    shown = [config.questions * k for k in range(0, config.rounds + 1, max(1, config.rounds // 6))]
    print(f"\n2) backflips: return of {STEPS} steps, mean of {config.seeds} people; with the true reward {top[0]:.1f} ± "
          f"{top[1]:.1f}\n\nanswers     " + "".join(f"{n:>14}" for n in shown))
    for way in learned:
        print(f"{way:12}" + "".join("{:8.1f} ± {:3.1f}".format(*at(way, "backflips", n, "return")) for n in shown))
    for way in learned:
        own = [row for row in rows if row["way"] == way and row["experiment"] == "backflips"]
        start = at(way, "backflips", 0, "return")[0]
        need = bits(own, start + 0.9 * (top[0] - start))
        print(f"{way}: 90% of the way from random actions to the true reward's policy after "
              + (f"{need} answers" if need < math.inf else f"more than {total} answers")
              + f"; {at(way, 'backflips', total, 'near_certain')[0]:.0%} of the answers were more than 95% certain")
    folder = Path(config.out)
    write_jsonl(folder / "results.jsonl", rows)
    draw(rows, learned["information"], grid, top[0], folder / "figure.png")
    print(f"\nrows and figure  ->  {folder}")


def draw(rows: list[dict], learned: Array, grid: Grid, top: float, path: Path) -> None:
    """Error against answers; return against answers; the true reward and the learned one."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 4, figsize=(18, 4), layout="constrained", width_ratios=(4, 4, 3, 3))
    for axis, experiment, what in ((axes[0], "asking", "degrees"), (axes[1], "backflips", "return")):
        for way in dict.fromkeys(row["way"] for row in rows if row["experiment"] == experiment and row["way"] != "true reward"):
            own = [row for row in rows if (row["experiment"], row["way"]) == (experiment, way)]
            x = sorted({row["answers"] for row in own})
            y = np.array([[row[what] for row in own if row["answers"] == n] for n in x])
            error = y.std(1, ddof=1) / math.sqrt(y.shape[1])
            axis.plot(x, y.mean(1), label=way)
            axis.fill_between(x, y.mean(1) - error, y.mean(1) + error, alpha=0.2)
    axes[1].axhline(top, color="black", linestyle="--", label="planned on the true reward")
    axes[0].set(xlabel="answers", ylabel="degrees", title="asking well: angle to the person's weights", yscale="log")
    axes[1].set(xlabel="answers", ylabel="return", title="a pendulum that learns to stand from answers")
    for axis, reward, title in ((axes[2], true_reward(grid.states), "true reward"), (axes[3], learned, "learned, one person")):
        axis.imshow(reward.reshape(grid.N, grid.N).T, origin="lower", aspect="auto", extent=(-np.pi, np.pi, -SPEED, SPEED))
        axis.set(xlabel="angle (0: up)", ylabel="speed", title=title)
    for axis in axes[:2]:
        axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main(parse(Config, __doc__))
