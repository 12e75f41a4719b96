"""Preferences over stored segments: a predictor that sees a segment as a whole (Preference
Transformer), and a policy that is learned from preferences directly, without a reward (DPPO).

    P(1 over 2) = sigmoid(f(1) - f(2)),  f = T sum_t w_t r_t        (Kim et al. 2023, Eq. 5)
        Markov sum     r_t = a . phi(s_t),                  w_t = 1 / T      (preference_rl.py)
        + history      r_t also depends on what was before: + psi(s_t) . M . mean_{u<t} psi(s_u)
        + weights      w_t = softmax_t(b . phi(s_t)): what counts in this segment

    L(pi) = -E log sigmoid((lambda d(pi, loser) - d(pi, winner)) / temperature)    (An et al. 2023)
        d(pi, segment) = mean_t |pi(s_t) - a_t| / range: how far pi is from what was done there

    python dppo.py                # episodes of a pendulum, stored for good; a minute on one core
    python dppo.py --task track   # 2) on a winding road

1) Held-out accuracy of the predictors, for three teachers: one adds up what each moment is worth,
   one judges a segment by its best moment, one by an order of events (left before right).
2) True return of policies that were learned from the same stored episodes and answers; once from
   pairs of segments, which begin anywhere, and once from pairs of whole episodes, which all begin
   with the pendulum hanging.

With lambda = 0 DPPO's loss falls with d(pi, winner) alone: it is cloning of the winners. It is a
cousin of DPO (dpo.py), with minus the distance for log pi(y|x) / pi_ref(y|x). And DPO compares two
responses to one prompt. Whether two segments begin alike is the same question: if they do not, the
loser may have lost by where it began, and what it did there may have been right.

Differs from the papers: attention to the past is linear, so that what has no weights w_t is a
logistic regression and is fitted exactly; the preferences of pairs that nobody was asked about come
from the Markov sum; a policy is m tanh(theta . phi(s)), with m the largest action, and all
pairs are in every step. On the track only 2) is run.

Symbols: a segment has T = 20 steps, two seconds; phi(s) (108,) and psi(s) (12,), features
of a state; on the track phi(s) (147,).

Writes  runs/dppo/ or runs/dppo-track/ : results.jsonl, figure.png
"""
from __future__ import annotations

import common  # noqa: F401  first, so that Ctrl-C while numpy is imported is one line, too

from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Callable, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from common import fail, pendulum, track
from common.figures import figure
from common.files import check_writable, write_jsonl
from common.grid import Planner
from common.pendulum import STEPS, bumps, true_reward
from common.settings import parse, require, require_numbers, run_folder, settings
from common.statistics import fit_logistic, mean_se, sigmoid, values

SEGMENT = 20  # steps of a segment, two seconds
EXPLORE = (1.0, 0.6, 0.2)  # share of random steps of the three players who made the episodes
PRIOR = 1.0  # standard deviation of a weight before any answer
SPREAD = 3.0  # standard deviation of a teacher's strengths: how consistent the answers are
WORLDS = {"pendulum": pendulum, "track": track}  # with the same functions
MODELS = ("Markov sum", "+ history", "+ weights", "+ both")


@settings
class Config:
    task: Literal["pendulum", "track"] = "pendulum"  # Task: a pendulum to swing up, or a
    # winding road.

    # ---- the data
    episodes: int = 120  # Episodes that are stored; a third each of a good, a fair and a random
    # player.
    judged: int = 400  # Answers of each teacher, for the predictors.
    answers: int = 100  # Answers of the teacher who adds up, for the policies.

    # ---- DPPO
    temperature: float = 0.1  # Divides the distances.
    pairs: int = 5000  # Pairs, of all that are stored, whose preference is predicted.
    steps: int = 200  # Steps of gradient descent for a policy.

    # ---- the experiment
    seeds: int = 20  # Repetitions, each with segments and answers of its own.
    seed: int = 0  # First seed.
    out: str = ""  # Folder for rows and figure, if not one named by the settings.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="episodes judged answers temperature pairs steps seeds",
                        from_0="seed")
        for name, most in (("episodes", 3000), ("judged", 5000), ("answers", 5000),
                           ("pairs", 10**6), ("steps", 10**5)):
            value = getattr(self, name)
            require(value <= most, f"--{name} {value}: must be at most {most}")
        require(self.episodes >= 6, f"--episodes {self.episodes}: must be at least 6")
        require(2 <= self.seeds <= 1000, f"--seeds {self.seeds}: must be from 2 to 1000")
        name = "dppo" if self.task == "pendulum" else "dppo-track"
        self.out = self.out or run_folder(self, name, never=("task",))


# ---- stored segments, and teachers ---------------------------------------------------------------

def stored(world: ModuleType, n: int, grid: Planner, V: np.ndarray, rng: np.random.Generator
           ) -> tuple[np.ndarray, np.ndarray]:
    """States (n, STEPS + 1, k) and actions (n, STEPS) of episodes, n // 3 of each player. V: values
    of the best policy."""
    parts = [world.roll_out(partial(grid.act, V), n // 3, explore, rng) for explore in EXPLORE]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def segments(states: np.ndarray) -> np.ndarray:
    """Episodes (n, STEPS, ...) cut into segments (n * STEPS / SEGMENT, SEGMENT, ...)."""
    return states.reshape(-1, SEGMENT, *states.shape[2:])


def adds_up(states: np.ndarray) -> np.ndarray:
    """What each moment is worth, added up; (n, T, 2) -> (n,)."""
    return true_reward(states).sum(1)


def best_moment(states: np.ndarray) -> np.ndarray:
    """A segment is as good as its best moment."""
    return true_reward(states).max(1)


def left_first(states: np.ndarray) -> np.ndarray:
    """1 where the pendulum is at the left (a quarter of the circle) before it is at the right, -1
    where it is the other way round, 0 where it is not at both."""
    T = states.shape[1]
    when = []
    for middle in (np.pi / 2, -np.pi / 2):
        there = np.abs(states[..., 0] - middle) < np.pi / 4  # (n, T)
        when.append(np.where(there.any(1), there.argmax(1), T))
    left, right = when
    return np.where((left < T) & (right < T), np.sign(right - left), 0).astype(float)


TEACHERS = {"adds up": adds_up, "best moment": best_moment, "left first": left_first}


def consistent(strengths: np.ndarray) -> np.ndarray:
    """Strengths of the standard deviation SPREAD: every teacher is equally consistent."""
    return strengths * SPREAD / max(strengths.std(), 1e-12)


def ask(strengths: np.ndarray, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (n, 2) of random pairs, and the teacher's answers (n,), by Bradley-Terry."""
    pairs = rng.integers(0, len(strengths), (n, 2))
    p = sigmoid(strengths[pairs[:, 0]] - strengths[pairs[:, 1]])
    return pairs, (rng.random(n) < p).astype(float)


def accuracy(scores: np.ndarray, strengths: np.ndarray, rng: np.random.Generator) -> float:
    """Share of random pairs, of those that the teacher does not like equally, whose order is
    right."""
    first, second = rng.integers(0, len(scores), (2, 10_000))
    differ = strengths[first] != strengths[second]
    if not differ.any():
        fail("--episodes: too few, a teacher likes all held-out segments equally")
    right = (scores[first] > scores[second]) == (strengths[first] > strengths[second])
    return float(right[differ].mean())


# ---- the predictor -------------------------------------------------------------------------------

def angles(states: np.ndarray) -> np.ndarray:
    """psi (..., 12): normal bumps over the angle, of sum 1."""
    middle = np.linspace(-np.pi, np.pi, 12, endpoint=False)
    psi = np.exp((np.cos(states[..., :1] - middle) - 1) / 0.4**2)
    return psi / psi.sum(-1, keepdims=True)


def with_history(states: np.ndarray) -> np.ndarray:
    """(n, T, 108 + 144): phi(s_t), and psi(s_t) times the mean of psi(s_u) over u < t, each times
    each; 0 at t = 0, before which nothing was."""
    psi = angles(states)  # (n, T, 12)
    before = np.zeros_like(psi)
    before[:, 1:] = psi.cumsum(1)[:, :-1] / np.arange(1, psi.shape[1])[:, None]
    products = psi[..., :, None] * before[..., None, :]
    return np.concatenate([bumps(states), products.reshape(*psi.shape[:2], 144)], -1)


class Predictor(NamedTuple):
    """f(segment) = T sum_t w_t a . x_t."""
    model: str
    a: np.ndarray  # weights of r_t
    b: np.ndarray  # (108,) weights of log w_t, up to a constant; 0: all steps count alike

    def inputs(self, states: np.ndarray) -> np.ndarray:
        """x (n, T, d), of which r_t is a weighted sum."""
        return with_history(states) if self.model in ("+ history", "+ both") else bumps(states)

    def score(self, states: np.ndarray) -> np.ndarray:
        """f (n,) of segments (n, T, 2)."""
        f, _, _ = weighted(self.inputs(states) @ self.a, bumps(states) @ self.b)
        return f


def weighted(r: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """f (n,) = T sum_t w_t r_t with w = softmax_t(z), and its derivatives by r and z, (n, T)."""
    T = r.shape[1]
    w = np.exp(z - z.max(1, keepdims=True))
    w /= w.sum(1, keepdims=True)
    mean = (w * r).sum(1, keepdims=True)
    return T * mean[:, 0], T * w, T * w * (r - mean)


def fit(model: str, states: np.ndarray, pairs: np.ndarray, answers: np.ndarray) -> Predictor:
    """The predictor of highest posterior probability: exactly, where all steps count alike; by
    gradient descent from there, where they have weights.

    Args:
        states: (n, T, 2) segments.
        pairs: (m, 2) numbers of segments. answers: (m,) 1 the first was preferred, 0 the second.
    """
    x = Predictor(model, np.empty(0), np.empty(0)).inputs(states)  # (n, T, d)
    Phi = x.sum(1)
    questions = Phi[pairs[:, 0]] - Phi[pairs[:, 1]]
    a = fit_logistic(questions, answers, PRIOR)
    phi = bumps(states)
    b = np.zeros(phi.shape[-1])
    if model in ("+ weights", "+ both"):
        both = adam(partial(weights_gradient, x, phi, pairs, answers), np.append(a, b), 100)
        a, b = both[:len(a)], both[len(a):]
    return Predictor(model, a, b)


def weights_gradient(x: np.ndarray, phi: np.ndarray, pairs: np.ndarray, answers: np.ndarray,
                     both: np.ndarray) -> np.ndarray:
    """Gradient by (a, b) of the negative log posterior, a mean over the answers."""
    a, b = both[:x.shape[-1]], both[x.shape[-1]:]
    f, by_r, by_z = weighted(x @ a, phi @ b)
    error = sigmoid(f[pairs[:, 0]] - f[pairs[:, 1]]) - answers  # (m,)
    by_f = np.bincount(pairs[:, 0], error, len(f)) - np.bincount(pairs[:, 1], error, len(f))
    of_a = np.einsum("nt,ntd->d", by_f[:, None] * by_r, x)
    of_b = np.einsum("nt,ntd->d", by_f[:, None] * by_z, phi)
    return np.append(of_a, of_b) / len(answers) + both / (PRIOR**2 * len(answers))


def adam(gradient: Callable[[np.ndarray], np.ndarray], x: np.ndarray, steps: int,
         lr: float = 0.1) -> np.ndarray:
    """Gradient descent by Adam (Kingma and Ba 2015), with a rate that falls to 0."""
    m, v = np.zeros((2, len(x)))
    for step in range(steps):
        g = gradient(x)
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        m_hat, v_hat = m / (1 - 0.9**(step + 1)), v / (1 - 0.999**(step + 1))
        x = x - lr * (1 - step / steps) * m_hat / (np.sqrt(v_hat) + 1e-8)
    return x


# ---- the policy ----------------------------------------------------------------------------------

def act(theta: np.ndarray, world: ModuleType, most: float, state: np.ndarray) -> np.ndarray:
    """The policy: actions (n,) in states (n, k), of which `most` is the largest."""
    return most * np.tanh(world.bumps(state) @ theta)


def distances(theta: np.ndarray, phi: np.ndarray, actions: np.ndarray, most: float
              ) -> tuple[np.ndarray, np.ndarray]:
    """d(pi, segment) (n,) in [0, 1], for phi (n, T, d) and actions (n, T), of which `most` is the
    largest; and what its gradient by theta is made of: the sum over steps of this (n, T) times
    phi."""
    bent = np.tanh(phi @ theta)
    away = most * bent - actions
    size = 2 * most * phi.shape[1]
    return np.abs(away).sum(1) / size, np.sign(away) * most * (1 - bent**2) / size


def clone(phi: np.ndarray, actions: np.ndarray, most: float, steps: int) -> np.ndarray:
    """The policy nearest to segments: it minimises the mean of d."""
    def gradient(theta: np.ndarray) -> np.ndarray:
        _, by_step = distances(theta, phi, actions, most)
        return np.einsum("nt,ntd->d", by_step, phi) / len(phi)
    return adam(gradient, np.zeros(phi.shape[-1]), steps)


def dppo_loss(d_winner: np.ndarray, d_loser: np.ndarray, lam: float, temperature: float
              ) -> tuple[float, np.ndarray, np.ndarray]:
    """-mean log sigmoid((lam d_loser - d_winner) / temperature), and its derivatives by both (n,),
    winner first."""
    logits = (lam * d_loser - d_winner) / temperature
    slope = sigmoid(-logits) / (temperature * len(logits))  # of the loss, falling, by the logit
    return float(np.logaddexp(0, -logits).mean()), slope, -lam * slope


def dppo(phi: np.ndarray, actions: np.ndarray, most: float, winners: np.ndarray,
         losers: np.ndarray, lam: float, temperature: float, steps: int) -> np.ndarray:
    """The policy that is near to winners (m,) and far from losers (m,), numbers of segments."""
    def gradient(theta: np.ndarray) -> np.ndarray:
        d, by_step = distances(theta, phi, actions, most)
        _, by_winner, by_loser = dppo_loss(d[winners], d[losers], lam, temperature)
        by_d = np.bincount(winners, by_winner, len(d)) + np.bincount(losers, by_loser, len(d))
        return np.einsum("nt,ntd->d", by_d[:, None] * by_step, phi)
    return adam(gradient, np.zeros(phi.shape[-1]), steps)


# ---- the experiment ------------------------------------------------------------------------------

def predictors(config: Config, grid: Planner, V: np.ndarray, seed: int) -> list[dict]:
    """Held-out accuracy of every model, for every teacher; on the pendulum."""
    rng = np.random.default_rng([seed, 1])
    states, _ = stored(pendulum, config.episodes, grid, V, rng)
    others, _ = stored(pendulum, config.episodes, grid, V, rng)  # nobody was asked about these
    seen, held_out = segments(states[:, :STEPS]), segments(others[:, :STEPS])
    rows = []
    for name, teacher in TEACHERS.items():
        pairs, answers = ask(consistent(teacher(seen)), config.judged, rng)
        asked, numbers = np.unique(pairs, return_inverse=True)  # only these enter the fit
        for model in MODELS:
            predictor = fit(model, seen[asked], numbers.reshape(pairs.shape), answers)
            right = accuracy(predictor.score(held_out), teacher(held_out),
                             np.random.default_rng([seed, 2]))
            rows.append({"experiment": "predictor", "teacher": name, "model": model, "seed": seed,
                         "accuracy": right})
    return rows


def true_return(world: ModuleType, policy: Callable[[np.ndarray], np.ndarray], seed: int) -> float:
    """Mean of 50 episodes."""
    states, _ = world.roll_out(policy, 50, 0.0, np.random.default_rng([seed, 4]))
    return float(world.true_reward(states[:, :STEPS]).sum(1).mean())


def policies(config: Config, grid: Planner, V: np.ndarray, seed: int) -> list[dict]:
    """True return of every way from the stored episodes and the answers to a policy."""
    world = WORLDS[config.task]
    most = grid.actions[-1]
    rng = np.random.default_rng([seed, 3])
    states, actions = stored(world, config.episodes, grid, V, rng)
    begins = states[:, :STEPS]
    rewards = world.true_reward(begins)  # (n, STEPS), which only the teacher knows
    rows = []
    for what in ("segments", "episodes"):
        # 1) the teacher answers questions about some of what is stored
        cut = segments if what == "segments" else np.asarray
        phi, done = world.bumps(cut(begins)), cut(actions)  # (n, T, d), (n, T)
        pairs, answers = ask(consistent(cut(rewards).sum(1)), config.answers, rng)
        asked = pairs[np.arange(len(pairs)), np.where(answers == 1, 0, 1)]  # the preferred ones

        # 2) a reward, the Markov sum; it answers all other questions
        Phi = phi.sum(1)
        w = fit_logistic(Phi[pairs[:, 0]] - Phi[pairs[:, 1]], answers, PRIOR)
        f = Phi @ w
        first, second = rng.integers(0, len(f), (2, config.pairs))
        winners, losers = (np.where(f[first] > f[second], *two) for two in
                           ((first, second), (second, first)))

        # 3) policies, from nothing but what is stored
        learned = {"cloning of all": clone(phi, done, most, config.steps),
                   "cloning of asked winners": clone(phi[asked], done[asked], most, config.steps)}
        for lam in (0.0, 0.5, 1.0):
            learned[f"DPPO, lambda {lam:g}"] = dppo(phi, done, most, winners, losers, lam,
                                                    config.temperature, config.steps)
        ways = {name: partial(act, theta, world, most) for name, theta in learned.items()}

        # 4) a plan for the reward: from the stored steps, or with the physics known
        places = begins.reshape(-1, begins.shape[-1])
        ends = states[:, 1:].reshape(places.shape)
        numbers = np.searchsorted(grid.actions, actions.ravel())
        Q = grid.plan_from(places, numbers, world.bumps(places) @ w, ends)
        ways["reward, plan from the stored steps"] = partial(grid.act_on, Q)
        learned_V = grid.plan(world.bumps(grid.states) @ w)
        ways["reward, plan with the physics"] = partial(grid.act, learned_V)
        for name, policy in ways.items():
            rows.append({"experiment": "policy", "pairs": what, "way": name, "seed": seed,
                         "return": true_return(world, policy, seed)})
    rows.append({"experiment": "policy", "pairs": "none", "way": "the stored episodes",
                 "seed": seed, "return": float(rewards.sum(1).mean())})
    return rows


def print_tables(rows: list[dict], config: Config) -> None:
    if config.task == "pendulum":
        print_accuracy(rows, config)
    mean, _ = mean_se(values(rows, "return", way="the stored episodes"))
    print(f"\n2) true return after {config.answers} answers about pairs of ...; the stored "
          f"episodes have {mean:.1f}\n")
    print(f"{'':36}{'segments':>14}{'episodes':>14}")
    for way in ways_of(rows):
        line = f"{way:36}"
        for what in ("segments", "episodes"):
            mean, error = mean_se(values(rows, "return", way=way, pairs=what))
            line += f"{mean:8.1f} ± {error:3.1f}"
        print(line)


def print_accuracy(rows: list[dict], config: Config) -> None:
    print(f"\n1) right about the order of held-out pairs, %, after {config.judged} answers; "
          f"mean of {config.seeds} seeds\n")
    print(f"{'teacher':14}" + "".join(f"{model:>16}" for model in MODELS))
    for teacher in TEACHERS:
        line = f"{teacher:14}"
        for model in MODELS:
            right = values(rows, "accuracy", teacher=teacher, model=model)
            mean, error = mean_se(100 * np.array(right))
            line += f"{mean:10.1f} ± {error:3.1f}"
        print(line)


def ways_of(rows: list[dict]) -> list[str]:
    """The ways to a policy, in order."""
    return list(dict.fromkeys(values(rows, "way", experiment="policy", pairs="segments")))


def draw(rows: list[dict], path: Path) -> None:
    """Accuracy of every model for every teacher; return of every way to a policy."""
    kinds = ("segments", "episodes")
    accuracies = values(rows, "accuracy")  # none of the track
    with figure(path, 2 if accuracies else 1, width=6, height=4) as (_, axes):
        axes = np.atleast_1d(axes)
        if accuracies:
            bars(axes[0], list(TEACHERS), MODELS,
                 [[values(rows, "accuracy", teacher=teacher, model=model) for teacher in TEACHERS]
                  for model in MODELS])
            axes[0].set(ylabel="right about held-out pairs", ylim=(0.5, 1),
                        title="who sees what counts?")
        last, ways = axes[-1], ways_of(rows)
        bars(last, ways, kinds, [[values(rows, "return", way=way, pairs=what) for way in ways]
                                 for what in kinds])
        last.axhline(np.mean(values(rows, "return", way="the stored episodes")), color="black",
                     linestyle=":", label="the stored episodes")
        last.set(ylabel="true return", title="pairs that begin anywhere, or alike")
        last.tick_params(axis="x", labelrotation=25)
        for label in last.get_xticklabels():
            label.set(ha="right", fontsize=8)
        for axis in axes:
            axis.legend(fontsize=8)


def bars(axis, groups: list[str], names: tuple[str, ...], table: list[list[list[float]]]) -> None:
    """Mean and standard error of table[name][group], as bars side by side."""
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        mean, error = mean_se(np.array(table[i]))
        places = np.arange(len(groups)) + (i - (len(names) - 1) / 2) * width
        axis.bar(places, mean, width, yerr=error, label=name, capsize=2)
    axis.set_xticks(range(len(groups)), groups)


def main(config: Config) -> None:
    """Run the experiments, write rows and figure, and print the tables."""
    folder = Path(config.out)
    check_writable(folder)
    world = WORLDS[config.task]
    grid = world.Grid(41)
    V = grid.plan(world.true_reward(grid.states))
    rows = []
    for seed in tqdm(range(config.seed, config.seed + config.seeds), "seeds"):
        if config.task == "pendulum":
            rows += predictors(config, grid, V, seed)
        rows += policies(config, grid, V, seed)
    write_jsonl(folder / "results.jsonl", rows)
    draw(rows, folder / "figure.png")
    print_tables(rows, config)
    print(f"\nrows and figure  ->  {folder}")


if __name__ == "__main__":
    main(parse(Config, __doc__))
