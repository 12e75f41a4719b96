"""Do comparisons tell more than scores? A simulated person answers in both ways: which answers tell
more about what the person wants?

    what is perceived of a segment    v = w . Phi + G,  G ~ Gumbel(0, 1), drawn anew at every look
    a comparison                      is v1 > v2?   so P = sigmoid(w . (Phi1 - Phi2)), Bradley-Terry
    a score                           scale_n(v)    in the n-th answer, on the person's own scale

A comparison is nothing but the order of two scores that would be given at the same moment. So from
a person whose scale stays what it is, a score must tell more. What a comparison has is that the
scale cancels: whatever increasing function it is, the order of v1 and v2 is the same.

    python experiments/scores.py     # some seconds

Five people, who all perceive alike:
    calibrated       scale_n(v) = v
    drifting         v + mood_n: the mood is a random walk, of DRIFT a step
    hard to please   v squeezed into whole numbers from 0 to 10: an average segment gets a 1
    crowd            v + zero_n: each answer is somebody else's, who has another zero, of sd ZERO
    all three        drifting, hard to please, and a crowd
What is learned is the weights w, four numbers; the error is the angle to the person's own, to which
the unit of a scale does not matter, and its zero is fitted.
    comparisons       logistic regression on Phi1 - Phi2 (preference_rl.py: fit_reward)
    scores            ridge regression on Phi, and an intercept
    differences       ridge regression of each score less the one before on the same of Phi: what
                      drifts slowly is nearly gone, and so is half of the information
    orders            logistic regression on whether a score is above the one before: scores as
                      comparisons, so that any increasing scale that stays cancels

Expected. A calibrated score has the information Cov(Phi) / Var(G) on the weights, a comparison
E[p (1 - p) (Phi1 - Phi2)(Phi1 - Phi2)^T]; so a score is worth several comparisons (`worth` counts
them). A mood of DRIFT a step adds DRIFT^2 n / 6 to the variance of n scores about their mean. So
the error of scores stops falling, and comparisons overtake near

    n = 6 Var(G) (worth - 1) / DRIFT^2

This would be wrong if they never overtook, or if scores of the calibrated person were not ahead.

Assumes that one look is as noisy for both questions, and that each is one answer; but a comparison
shows two segments. Nobody real has answered: which of the people is like you is not known here.

Writes  runs/scores/ : results.jsonl, figure.png
"""
from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, for the imports below

import common  # noqa: F401  first, so that Ctrl-C while numpy is imported is one line, too

import numpy as np
from tqdm import tqdm

from common.figures import figure
from common.files import check_writable, write_jsonl
from common.pendulum import STEPS, Grid, episodes
from common.settings import (
    parse, require, require_numbers, run_folder, settings)
from common.statistics import mean_se, sigmoid, values
from preference_rl import SEGMENT, fit_reward, four_features

PEOPLE = ("calibrated", "drifting", "hard to please", "crowd", "all three")
ANSWERS = ("comparisons", "scores", "differences", "orders")
COUNTS = (5, 10, 20, 40, 80, 160, 320)
DRIFTS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0)  # of a mood, a step; tried with AFTER answers
AFTER = 80
LOOK = math.pi**2 / 6  # variance of G, the noise of a look
ZERO = 3.0  # standard deviation of a zero in a crowd, as large as that of what is perceived
PRIOR = 3.0  # standard deviation of a weight before any answer


@settings
class Config:
    drift: float = 0.5  # Standard deviation of a step of the drifting person's mood; the strengths
    # of segments have one of about 3.
    seeds: int = 50  # Simulated people of each kind.
    seed: int = 0  # First seed.
    out: str = ""  # Folder for rows and figure, if not one named by the settings.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="seeds", from_0="drift seed")
        require(self.drift <= 100, f"--drift {self.drift}: must be at most 100")
        require(2 <= self.seeds <= 1000, f"--seeds {self.seeds}: must be from 2 to 1000")
        self.out = self.out or run_folder(self, "scores")


# ---- the person ----------------------------------------------------------------------------------

def look(strengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What is perceived of segments: their strength and the noise of a look, of mean 0."""
    return strengths + rng.gumbel(size=strengths.shape) - np.euler_gamma


def scale(person: str, v: np.ndarray, drift: float, rng: np.random.Generator) -> np.ndarray:
    """The scores (n,) that a person gives, one after the other, to what is perceived, v (n,)."""
    mood = drift * rng.normal(size=len(v)).cumsum()
    zero = ZERO * rng.normal(size=len(v))
    if person in ("drifting", "all three"):
        v = v + mood
    if person in ("crowd", "all three"):
        v = v + zero
    if person in ("hard to please", "all three"):
        v = np.round(10 * sigmoid((v - 3) / 1.5))  # a segment of average strength gets a 1
    return v


# ---- what is learned from the answers ------------------------------------------------------------

def ridge(Phi: np.ndarray, y: np.ndarray, noise: float) -> np.ndarray:
    """Weights (d,) of y (n,) on Phi (n, d): the mode if y has this variance about Phi . w, and each
    weight that of the prior."""
    d = Phi.shape[1]
    return np.linalg.solve(Phi.T @ Phi + noise / PRIOR**2 * np.eye(d), Phi.T @ y)


def learn(answers: str, Phi: np.ndarray, v: np.ndarray, person: str, drift: float,
          rng: np.random.Generator) -> np.ndarray:
    """The weights (d,) learned from n answers of one kind.

    Args:
        Phi: (2, n, d) features of two segments for each answer; a score is about the first.
        v: (2, n) what is perceived of them.
    """
    if answers == "comparisons":
        w, _ = fit_reward(Phi[0] - Phi[1], (v[0] > v[1]).astype(float), PRIOR)
        return w
    scores = scale(person, v[0], drift, rng)
    if answers == "scores":
        return ridge(Phi[0] - Phi[0].mean(0), scores - scores.mean(), LOOK)
    steps, changes = np.diff(Phi[0], axis=0), np.diff(scores)
    if answers == "differences":
        return ridge(steps, changes, 2 * LOOK)
    above = (np.sign(changes) + 1) / 2  # 1/2 where both scores are the same
    return fit_reward(steps, above, PRIOR)[0]


def angle(w: np.ndarray, true_w: np.ndarray) -> float:
    """Between learned and true weights, in degrees."""
    lengths = np.linalg.norm(w) * np.linalg.norm(true_w)
    cosine = w @ true_w / max(lengths, 1e-12)  # 0 where nothing is learned
    return math.degrees(math.acos(min(1, max(-1, cosine))))


def worth(Phi: np.ndarray, w: np.ndarray, rng: np.random.Generator) -> float:
    """How many comparisons tell as much as one calibrated score, about the direction of w, when n
    is large: the ratio of the variances that the two kinds of answer leave there.

    Args:
        Phi: (n, d) features of segments; two of them drawn at random are a comparison.
    """
    differences = Phi[rng.integers(0, len(Phi), 20_000)] - Phi[rng.integers(0, len(Phi), 20_000)]
    p = sigmoid(differences @ w)
    of_comparison = differences.T @ ((p * (1 - p))[:, None] * differences) / len(p)
    of_score = np.cov(Phi.T) / LOOK
    across = np.eye(len(w)) - np.outer(w, w) / (w @ w)  # an angle does not see the length of w
    left = [np.trace(across @ np.linalg.inv(H) @ across) for H in (of_comparison, of_score)]
    return float(left[0] / left[1])


# ---- the experiment ------------------------------------------------------------------------------

def one_person(config: Config, seed: int) -> list[dict]:
    """The error after every number of answers, and for every drift; what a score is worth."""
    rng = np.random.default_rng([seed, 1])
    states = episodes(Grid(3), None, 400, 1.0, rng)  # random actions; the grid is not planned on
    begin = rng.integers(0, STEPS - SEGMENT + 1)
    segments = four_features(states[:, begin:begin + SEGMENT])  # (400, 4), each of variance 1
    segments -= segments.mean(0)  # an average segment has the strength 0
    true_w = rng.normal(size=segments.shape[1])
    true_w *= 3 / np.linalg.norm(true_w)
    n = max(COUNTS)
    Phi = segments[rng.integers(0, len(segments), (2, n))]
    v = look(Phi @ true_w, rng)  # all people and both questions have the same looks

    runs = [(person, config.drift, count) for person in PEOPLE for count in COUNTS]
    runs += [("drifting", drift, AFTER) for drift in DRIFTS]
    rows = []
    for person, drift, count in dict.fromkeys(runs):
        row = {"person": person, "drift": drift, "seed": seed, "answers": count}
        for kind in ANSWERS:
            w = learn(kind, Phi[:, :count], v[:, :count], person, drift,
                      np.random.default_rng([seed, 2]))
            row[kind] = round(angle(w, true_w), 3)  # degrees
        rows.append(row)
    return rows + [{"seed": seed, "worth": worth(segments, true_w, rng)}]


def overtakes(rows: list[dict], **where: object) -> int | None:
    """The smallest number of answers from which on comparisons have the smaller mean error."""
    found = None
    for count in reversed(COUNTS):
        ours, theirs = (np.mean(values(rows, kind, answers=count, **where))
                        for kind in ("comparisons", "scores"))
        if ours > theirs:
            break
        found = count
    return found


def print_tables(rows: list[dict], config: Config) -> None:
    print(f"\ndegrees between the person's weights and ours, mean of {config.seeds} people\n")
    print(f"{'answers':31}" + "".join(f"{count:>13}" for count in COUNTS))
    for person in PEOPLE:
        for kind in ANSWERS:
            line = f"{person:16}{kind:15}"
            for count in COUNTS:
                mean, error = mean_se(values(rows, kind, person=person, answers=count,
                                             drift=config.drift))
                line += f"{mean:7.1f} ± {error:3.1f}"
            print(line)
    print(f"\nthe drifting person after {AFTER} answers, by the step of the mood\n")
    print(f"{'step':31}" + "".join(f"{drift:>13g}" for drift in DRIFTS))
    for kind in ANSWERS:
        line = f"{'':16}{kind:15}"
        for drift in DRIFTS:
            mean, error = mean_se(values(rows, kind, person="drifting", answers=AFTER,
                                         drift=drift))
            line += f"{mean:7.1f} ± {error:3.1f}"
        print(line)

    theory, error = mean_se(values(rows, "worth"))
    n = max(COUNTS)
    squares = [np.mean(np.square(values(rows, kind, person="calibrated", answers=n,
                                        drift=config.drift))) for kind in ANSWERS]
    print(f"\na calibrated score is worth {theory:.1f} ± {error:.1f} comparisons in theory, "
          f"{squares[0] / squares[1]:.1f} after {n} answers")
    if config.drift:
        expected = 6 * LOOK * (theory - 1) / config.drift**2
        found = overtakes(rows, person="drifting", drift=config.drift)
        print(f"the drifting person's comparisons overtake the scores after {expected:.0f} answers "
              f"in theory; they are ahead from {found or 'nowhere'} on")


def draw(rows: list[dict], config: Config, path: Path) -> None:
    """Error against answers for every person, and against the drift."""
    with figure(path, 3, width=4, height=3.5, rows=2, sharey=True) as (_, axes):
        for axis, person in zip(axes, PEOPLE):
            for kind in ANSWERS:
                draw_means(axis, rows, "answers", COUNTS, kind, person=person, drift=config.drift)
            axis.set(xscale="log", xlabel="answers", title=person)
            axis.set_xticks(COUNTS, COUNTS)
            axis.minorticks_off()
        for kind in ANSWERS:
            draw_means(axes[-1], rows, "drift", DRIFTS, kind, person="drifting", answers=AFTER)
        axes[-1].set(xlabel="step of the mood", title=f"drifting, {AFTER} answers")
        axes[0].set(yscale="log")
        for axis in axes[::3]:
            axis.set(ylabel="degrees to the person's weights")
        axes[0].set_yticks([3, 5, 10, 20, 40, 80], [3, 5, 10, 20, 40, 80])
        axes[0].minorticks_off()
        axes[0].legend()


def draw_means(axis, rows: list[dict], over: str, places: tuple, kind: str,
               **where: object) -> None:
    """Mean and standard error over people of the angle, against another field."""
    table = [values(rows, kind, **where, **{over: at}) for at in places]
    mean, error = mean_se(np.array(table))
    axis.plot(places, mean, label=kind)
    axis.fill_between(places, mean - error, mean + error, alpha=0.2)


def main(config: Config) -> None:
    """Ask all people, write rows and figure, and print the tables."""
    folder = Path(config.out)
    check_writable(folder)
    rows = []
    for seed in tqdm(range(config.seed, config.seed + config.seeds), "people"):
        rows += one_person(config, seed)
    write_jsonl(folder / "results.jsonl", rows)
    draw(rows, config, folder / "figure.png")
    print_tables(rows, config)
    print(f"\nrows and figure  ->  {folder}")


if __name__ == "__main__":
    main(parse(Config, __doc__))
