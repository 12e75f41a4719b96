"""Preferences over behaviour: which of two trajectories is better? The reward of a step is learned
from answers about whole segments, the agent acts on it, and new questions are asked.

    P(segment 1 is preferred) = exp sum_t r(s1_t) / (exp sum_t r(s1_t) + exp sum_t r(s2_t))
                                                             (Christiano et al. 2017, Eq. 1)

It is the Bradley-Terry model of bt.py; the strength of a segment is the sum of its rewards. With
r(s) = w . phi(s) that sum is w . Phi, where Phi are the features summed over the segment. So the
fit is a logistic regression on Phi1 - Phi2, and what is still unknown about w is close to normal:
N(w_hat, H^-1), with H the curvature of the loss at its minimum w_hat (Laplace's approximation).

    python preference_rl.py     # a pendulum learns to stand up from answers alone; 40 s

1) Asking well. A person wants four things of a pendulum, each with a weight: up, slow, smooth,
   clockwise. How many answers until we know the weights? Each question is one of 500 random pairs
   of segments:
       random        any of them
       volume        the one that rules out most of the weights that are still possible, whichever
                     of its two answers comes (Sadigh et al. 2017, Eq. 10)
       information   the one whose answer is expected to tell most about w (Biyik et al. 2019)
   The second paper names the flaw of volume: the answer to a question about two segments that are
   alike is a coin toss, which "removes half" and tells nothing.
2) Backflips. The pendulum (common/pendulum.py) hangs, and its motor is too weak to lift it, so it
   must swing. We see its states, never its reward. We ask about pairs of two-second segments that
   the present policy has made, with some exploration. Roll out, ask, fit, plan; and again. How many
   answers until it stands?

Differs from the papers: the normal approximation replaces MCMC (1) and an ensemble of networks (2);
the policy is the optimal one for the learned reward, found by value iteration on a grid, so that
whatever it loses is the fault of the learned reward.

Symbols: a question is the vector Phi1 - Phi2, (d,); an answer is 1 if the first segment was
preferred, and 0 if the second was; w (d,), the weights of the reward.

Writes  runs/preference-rl/ : results.jsonl, figure.png
"""
from __future__ import annotations

import common  # noqa: F401  first, so that Ctrl-C while numpy is imported is one line, too

import math
from pathlib import Path
from typing import Callable

import numpy as np
from tqdm import tqdm

from common.figures import figure
from common.files import check_writable, write_jsonl
from common.pendulum import SPEED, STEPS, Grid, bumps, episodes, true_reward
from common.settings import parse, require, require_numbers, run_folder, settings
from common.statistics import mean_se, sigmoid, values

SEGMENT = 20  # steps of a segment, two seconds; an episode is five of them
POOL = 500  # pairs of segments from which a question is chosen
EXPLORE = 0.2  # share of the steps that are random, in the episodes that we ask about


@settings
class Config:
    # ---- asking well
    answers: int = 60  # Questions about the four weights.

    # ---- backflips
    rounds: int = 12  # Rounds of roll out, ask, fit, plan.
    questions: int = 10  # Questions in a round.
    rationality: float = 0.5  # How consistent the simulated person is: the scale of the true reward
    # in their answers; 0 = random answers.

    # ---- the experiment
    seeds: int = 10  # Simulated people, each with answers and episodes of their own.
    seed: int = 0  # First seed.
    out: str = ""  # Folder for rows and figure, if not one named by the settings.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="answers rounds questions seeds", from_0="rationality seed")
        for name, most in (("answers", 10_000), ("rounds", 1000), ("questions", 1000)):
            value = getattr(self, name)
            require(value <= most, f"--{name} {value}: must be at most {most}")
        require(2 <= self.seeds <= 1000, f"--seeds {self.seeds}: must be from 2 to 1000")
        self.out = self.out or run_folder(self, "preference-rl")


# ---- the model: P(first is preferred) = sigmoid(w . (Phi1 - Phi2)), w ~ N(0, prior^2) ------------

def fit_reward(questions: np.ndarray, answers: np.ndarray, prior: float,
               w: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mode (d,) and covariance (d, d) of the weights, by Newton's method.

    Args:
        questions: (n, d) Phi1 - Phi2 of every pair.
        answers: (n,) 1 the first was preferred, 0 the second, 1/2 neither.
        prior: standard deviation of each weight before any answer.
        w: (d,) where to start; zeros without it.
    """
    if w is None:
        w = np.zeros(questions.shape[1])

    def loss(w: np.ndarray) -> float:
        """-log likelihood - log prior, up to a constant."""
        logits = questions @ w
        return (np.logaddexp(0, logits) - answers * logits).sum() + (w @ w) / (2 * prior**2)

    for _ in range(100):
        p = sigmoid(questions @ w)
        gradient = questions.T @ (p - answers) + w / prior**2
        noise = (p * (1 - p))[:, None]  # the variance of each answer
        hessian = questions.T @ (noise * questions) + np.eye(len(w)) / prior**2
        if np.abs(gradient).max() < 1e-8:
            break
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while loss(w - size * step) > loss(w) + 1e-10 and size > 1e-6:
            size /= 2  # too far: the loss has risen
        w = w - size * step
    return w, np.linalg.inv(hessian)


def ask(questions: np.ndarray, w: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The answers (n,) to questions (n, d) of a person who has the weights w."""
    return (rng.random(len(questions)) < sigmoid(questions @ w)).astype(float)


# ---- which question to ask -----------------------------------------------------------------------

def entropy(p: np.ndarray) -> np.ndarray:
    """Of an answer that is 1 with probability p, in nats."""
    first = p * np.log(np.maximum(p, 1e-300))
    second = (1 - p) * np.log(np.maximum(1 - p, 1e-300))
    return -(first + second)


def any_question(p: np.ndarray) -> np.ndarray:
    """No question is better than another: the first of the pool, which is in random order."""
    return np.zeros(p.shape[1])


def volume(p: np.ndarray) -> np.ndarray:
    """Expected volume removed from the distribution of w, by whichever answer removes less:
    the minimum over both answers of E[1 - P(answer)]."""
    return np.minimum(p.mean(0), 1 - p.mean(0))


def information(p: np.ndarray) -> np.ndarray:
    """Mutual information of w and the answer, in nats: the entropy of the answer, less the part of
    it that is the person's own noise."""
    return entropy(p.mean(0)) - entropy(p).mean(0)


# What each question is worth, (questions,), from p (draws, questions): the probability that the
# first segment is preferred, for weights drawn from what we know of w.
WORTH = {"random": any_question, "volume": volume, "information": information}


def choose(worth: Callable[[np.ndarray], np.ndarray], pool: np.ndarray, w: np.ndarray,
           covariance: np.ndarray, rng: np.random.Generator) -> int:
    """Number of the question in the pool (n, d) that is worth most; the first of those alike."""
    draws = rng.multivariate_normal(w, covariance, 200, method="cholesky")  # (200, d)
    p = sigmoid(draws @ pool.T)  # (200, n)
    return int(worth(p).argmax())


# ---- 1) asking well ------------------------------------------------------------------------------

def four_features(states: np.ndarray) -> np.ndarray:
    """Phi (n, 4) of segments (n, T, 2): up, slow, smooth and clockwise, each of variance 1."""
    angle, speed = states[..., 0], states[..., 1]
    up = np.cos(angle).sum(1)
    slow = -(speed**2).sum(1)
    smooth = -np.abs(np.diff(speed, axis=1)).sum(1)
    clockwise = speed.sum(1)
    Phi = np.stack([up, slow, smooth, clockwise], 1)
    return Phi / Phi.std(0)


def asking_well(config: Config, seed: int) -> list[dict]:
    """The angle between the person's weights and ours after every answer, for each way to ask."""
    rng = np.random.default_rng([seed, 1])
    states = episodes(Grid(3), None, 400, 1.0, rng)  # random actions; the grid is not planned on
    begin = rng.integers(0, STEPS - SEGMENT + 1)
    Phi = four_features(states[:, begin:begin + SEGMENT])
    true_w = rng.normal(size=Phi.shape[1])
    true_w *= 3 / np.linalg.norm(true_w)

    rows = []
    for way, worth in WORTH.items():
        rng = np.random.default_rng([seed, 2])  # the same pools and the same luck for every way
        questions, answers = np.zeros((0, len(true_w))), np.zeros(0)
        w, covariance = np.zeros(len(true_w)), 9 * np.eye(len(true_w))  # the prior
        for count in range(1, config.answers + 1):
            # 1) choose the question from a pool of pairs
            first = rng.integers(0, len(Phi), POOL)
            second = rng.integers(0, len(Phi), POOL)
            pool = Phi[first] - Phi[second]
            question = pool[choose(worth, pool, w, covariance, rng)]
            # 2) the person answers
            questions = np.vstack([questions, question])
            answers = np.append(answers, ask(question[None], true_w, rng))
            # 3) what we know now
            w, covariance = fit_reward(questions, answers, 3.0, w)
            lengths = np.linalg.norm(w) * np.linalg.norm(true_w)
            cosine = w @ true_w / max(lengths, 1e-12)  # 0 while nothing is known
            degrees = math.degrees(math.acos(min(1, max(-1, cosine))))
            rows.append({"experiment": "asking", "way": way, "seed": seed, "answers": count,
                         "degrees": degrees})
    return rows


# ---- 2) backflips --------------------------------------------------------------------------------

def true_return(grid: Grid, V: np.ndarray | None, seed: int) -> float:
    """Mean true return of 50 episodes of the policy that is greedy for V, or of random actions."""
    explore = 1.0 if V is None else 0.0
    states = episodes(grid, V, 50, explore, np.random.default_rng([seed, 4]))
    return true_reward(states).sum(1).mean()


def backflips(config: Config, seed: int, grid: Grid, way: str) -> tuple[list[dict], np.ndarray]:
    """The true return after every round, and the reward (N * N,) that was learned in the end."""
    rng = np.random.default_rng([seed, 3])
    phi = bumps(grid.states)  # (N * N, d)
    d = phi.shape[1]
    w, covariance = np.zeros(d), np.eye(d)  # the prior
    questions, answers = np.zeros((0, d)), np.zeros(0)
    near_certain = []  # of every answer: was the person more than 95% certain?
    V = None  # the first policy acts at random
    rows = []
    for k in range(config.rounds + 1):
        # 1) how good is the policy?
        rows.append({"experiment": "backflips", "way": way, "seed": seed, "answers": len(answers),
                     "return": true_return(grid, V, seed),
                     "near_certain": float(np.mean(near_certain or [0]))})
        if k == config.rounds:
            break

        # 2) roll it out with some exploration, and cut the episodes into segments
        states = episodes(grid, V, 40, EXPLORE if k else 1.0, rng)
        segments = states.reshape(-1, SEGMENT, 2)  # (n, SEGMENT, 2)
        Phi = bumps(segments).sum(1)  # (n, d)
        strengths = config.rationality * true_reward(segments).sum(1)  # (n,) the person's own

        # 3) ask, one question after the other, so that each answer counts for the next question
        for _ in range(config.questions):
            first, second = rng.integers(0, len(Phi), (2, POOL))
            pool = Phi[first] - Phi[second]
            i = choose(WORTH[way], pool, w, covariance, rng)
            p = sigmoid(strengths[first[i]] - strengths[second[i]])
            near_certain.append(abs(p - 0.5) > 0.45)
            questions = np.vstack([questions, pool[i]])
            answers = np.append(answers, float(rng.random() < p))
            w, covariance = fit_reward(questions, answers, 1.0, w)

        # 4) plan on the reward that was learned
        V = grid.plan(phi @ w, V)
    return rows, phi @ w


def answers_needed(rows: list[dict], goal: float) -> float:
    """After how many answers the mean return over seeds stays above the goal; inf: it does not."""
    needed = math.inf
    for count in sorted({row["answers"] for row in rows}, reverse=True):
        if np.mean([row["return"] for row in rows if row["answers"] == count]) < goal:
            break
        needed = count
    return needed


# ---- both experiments ----------------------------------------------------------------------------

def main(config: Config) -> None:
    """Run both experiments, write their rows and their figure, and print their tables."""
    folder = Path(config.out)
    check_writable(folder)
    seeds = range(config.seed, config.seed + config.seeds)
    rows = []
    for seed in tqdm(seeds, "asking well"):
        rows += asking_well(config, seed)

    grid = Grid()
    best_V = grid.plan(true_reward(grid.states))
    for seed in tqdm(seeds, "backflips"):
        rows.append({"experiment": "backflips", "way": "true reward", "seed": seed, "answers": 0,
                     "return": true_return(grid, best_V, seed)})
        for way in ("random", "information"):
            of_way, learned = backflips(config, seed, grid, way)  # the last one is drawn
            rows += of_way

    write_jsonl(folder / "results.jsonl", rows)
    draw(rows, learned, grid, folder / "figure.png")
    print_asking(rows, config)
    print_backflips(rows, config)
    print(f"\nrows and figure  ->  {folder}")


def print_table(rows: list[dict], name: str, ways: list[str], counts: list[int],
                **where: object) -> None:
    """Mean and standard error over people of a field, after so many answers."""
    print(f"{'answers':12}" + "".join(f"{count:>14}" for count in counts))
    for way in ways:
        line = f"{way:12}"
        for count in counts:
            mean, error = mean_se(values(rows, name, way=way, answers=count, **where))
            line += f"{mean:8.1f} ± {error:3.1f}"
        print(line)


def print_asking(rows: list[dict], config: Config) -> None:
    counts = [n for n in (5, 10, 20, 40, 60) if n < config.answers] + [config.answers]
    print("\n1) asking well: degrees between the person's weights and ours, mean of "
          f"{config.seeds} people\n")
    print_table(rows, "degrees", list(WORTH), counts, experiment="asking")


def print_backflips(rows: list[dict], config: Config) -> None:
    total = config.rounds * config.questions
    every = config.questions * max(1, config.rounds // 6)
    top, error = mean_se(values(rows, "return", way="true reward"))
    print(f"\n2) backflips: return of {STEPS} steps, mean of {config.seeds} people; with the true "
          f"reward {top:.1f} ± {error:.1f}\n")
    ways = ["random", "information"]
    print_table(rows, "return", ways, list(range(0, total + 1, every)), experiment="backflips")
    print()
    for way in ways:
        of_way = [row for row in rows if row["experiment"] == "backflips" and row["way"] == way]
        start = np.mean(values(of_way, "return", answers=0))
        needed = answers_needed(of_way, start + 0.9 * (top - start))
        after = f"{needed} answers" if needed < math.inf else f"more than {total} answers"
        certain = np.mean(values(of_way, "near_certain", answers=total))
        print(f"{way}: 90% of the way from random actions to the true reward's policy after "
              f"{after}; {certain:.0%} of the answers were more than 95% certain")


def draw(rows: list[dict], learned: np.ndarray, grid: Grid, path: Path) -> None:
    """Error against answers; return against answers; the true reward, and the one learned from
    questions that were chosen for information, of the last seed."""
    ratios = (4, 4, 3, 3)
    with figure(path, 4, width=4.5, height=4, width_ratios=ratios) as (_, axes):
        by_degrees, by_return, *rewards = axes
        for way in WORTH:
            draw_means(by_degrees, rows, "degrees", experiment="asking", way=way)
        for way in ("random", "information"):
            draw_means(by_return, rows, "return", experiment="backflips", way=way)
        top = np.mean(values(rows, "return", way="true reward"))
        by_return.axhline(top, color="black", linestyle="--", label="planned on the true reward")
        by_degrees.set(xlabel="answers", ylabel="degrees", yscale="log",
                       title="asking well: angle to the person's weights")
        by_return.set(xlabel="answers", ylabel="return",
                      title="a pendulum that learns to stand from answers")
        by_degrees.legend()
        by_return.legend()

        true = true_reward(grid.states)
        for axis, reward, title in zip(rewards, (true, learned),
                                       ("true reward", "learned, one person")):
            axis.imshow(reward.reshape(grid.N, grid.N).T, origin="lower", aspect="auto",
                        extent=(-np.pi, np.pi, -SPEED, SPEED))
            axis.set(xlabel="angle (0: up)", ylabel="speed", title=title)


def draw_means(axis, rows: list[dict], name: str, experiment: str, way: str) -> None:
    """Mean and standard error over people of a field, against the answers."""
    counts = sorted(set(values(rows, "answers", experiment=experiment, way=way)))
    table = [values(rows, name, experiment=experiment, way=way, answers=n) for n in counts]
    mean, error = mean_se(np.array(table))  # of (counts, people)
    axis.plot(counts, mean, label=way)
    axis.fill_between(counts, mean - error, mean + error, alpha=0.2)


if __name__ == "__main__":
    main(parse(Config, __doc__))
