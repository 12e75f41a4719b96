"""PEBBLE and SURF: more from few answers. What an agent can do before it asks, what must happen to
its memory when the reward changes, and what unanswered questions can add.

    before the first question    r(s) = log |s - kNN_k(s)|         (PEBBLE, Lee et al. 2021, Eq. 5)
    whenever the reward changes  r_i <- w . phi(s_i)    for every step i in memory     (Algorithm 2)
    unanswered questions         if P(1 over 2) > tau, it is as if 1 had been preferred; the same
                                 for 2                             (SURF, Park et al. 2022, Eq. 4)
    crops                        a question about two segments, again with both cut to a random
                                 shorter length, and the same answer           (SURF, Algorithm 1)

    python pebble.py     # a pendulum that does not know its physics; 90 s on one core

It is the loop of preference_rl.py, with an agent that does not know the physics. It keeps its steps
in a ring buffer, each with the reward that was believed when it was made, and plans from them alone
(fitted Q iteration). So it must have been at the top to plan a way there, and to ask about it; and
rewards of an old w are wrong, unless they are computed again. What each part buys, and where it
buys nothing: results/preference-rl.

Differs from the papers: linear rewards, fitted exactly; one reward in place of three, random
questions in place of the ensemble's disagreement (preference_rl.py has better ones); fitted Q on a
grid for soft actor-critic; and the same number of steps with and without pre-exploration, which are
random actions where there is none.

Symbols: phi(s) (d,) features of a state; w (d,) weights; Phi, phi summed over a segment.

Writes  runs/pebble/ : results.jsonl, figure.png
"""
from __future__ import annotations

import common  # noqa: F401  first, so that Ctrl-C while numpy is imported is one line, too

from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
from tqdm import tqdm

from common.figures import figure
from common.files import check_writable, write_jsonl
from common.pendulum import SPEED, STEPS, TORQUES, Grid, bumps, roll_out, true_reward
from common.settings import parse, require, require_numbers, run_folder, settings
from common.statistics import fit_logistic, mean_se, sigmoid, values

SEGMENT = 20  # steps of a segment, two seconds
EPISODES = 10  # of a round
EXPLORE = 0.4  # share of the steps that are random
NEIGHBOUR = 5  # k of the k-th nearest neighbour
PRIOR = 1.0  # standard deviation of a weight before any answer


@settings
class Config:
    # ---- before the first question
    before: int = 4  # Rounds of exploration, of 10 episodes each.
    hold: float = 1.0  # For how many steps a random action is held, on average; with 5, random
    # actions alone swing the pendulum up.

    # ---- questions
    rounds: int = 15  # Rounds of ask, fit, relabel, plan, roll out.
    questions: int = 4  # Questions in a round.
    capacity: int = 80  # Episodes that the ring buffer holds.
    rationality: float = 0.5  # How consistent the simulated person is: the scale of the true reward
    # in their answers; 0 = random answers.

    # ---- SURF
    tau: float = 0.99  # How sure the reward must be of an answer to give it itself.
    unanswered: int = 4  # Questions that it may answer itself, for each that the person answers.
    crops: int = 8  # Random cuts of every question, each with an equal share of its weight.

    # ---- the experiment
    seeds: int = 20  # Simulated people, each with answers and episodes of their own.
    seed: int = 0  # First seed.
    out: str = ""  # Folder for rows and figure, if not one named by the settings.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="before rounds questions capacity unanswered crops seeds",
                        from_0="rationality seed")
        for name in ("before", "rounds", "questions", "capacity", "unanswered", "crops"):
            value = getattr(self, name)
            require(value <= 1000, f"--{name} {value}: must be at most 1000")
        require(1 <= self.hold <= STEPS, f"--hold {self.hold}: must be from 1 to {STEPS}")
        require(self.capacity >= EPISODES,
                f"--capacity {self.capacity}: must be at least {EPISODES}, the episodes of a round")
        require(0.5 < self.tau < 1, f"--tau {self.tau}: must be between 0.5 and 1")
        require(2 <= self.seeds <= 1000, f"--seeds {self.seeds}: must be from 2 to 1000")
        self.out = self.out or run_folder(self, "pebble")


class Method(NamedTuple):
    """What is switched on."""
    explore: bool = False  # pre-exploration by state entropy
    relabel: str = "never"  # which steps in memory get the new reward: never, to index, all
    pseudo: bool = False
    crop: bool = False


METHODS = {
    "neither": Method(),
    "pre-exploration": Method(explore=True),
    "relabelling": Method(relabel="all"),
    "PEBBLE": Method(explore=True, relabel="all"),
    "PEBBLE's bug": Method(explore=True, relabel="to index"),
    "+ pseudo-labels": Method(explore=True, relabel="all", pseudo=True),
    "+ crops": Method(explore=True, relabel="all", crop=True),
    "SURF": Method(explore=True, relabel="all", pseudo=True, crop=True),
}


# ---- memory --------------------------------------------------------------------------------------

class Buffer:
    """A ring of steps: when it is full, the next overwrites the oldest.

    Attributes:
        states, ends: (capacity, 2) where a step began, and where it led.
        actions: (capacity,) numbers of TORQUES.
        rewards: (capacity,) as they were given last.
        index: where the next step is written.
    """

    def __init__(self, capacity: int):
        self.states, self.ends = np.zeros((2, capacity, 2))
        self.actions, self.rewards = np.zeros(capacity, int), np.zeros(capacity)
        self.index, self.full = 0, False

    def __len__(self) -> int:
        return len(self.rewards) if self.full else self.index

    def add(self, states: np.ndarray, torques: np.ndarray,
            reward: Callable[[np.ndarray], np.ndarray]) -> None:
        """Store episodes: states (n, STEPS + 1, 2) and torques (n, STEPS); the reward of each step
        is what is believed now."""
        begins = states[:, :-1].reshape(-1, 2)
        places = (self.index + np.arange(len(begins))) % len(self.rewards)
        self.states[places] = begins
        self.ends[places] = states[:, 1:].reshape(-1, 2)
        self.actions[places] = np.searchsorted(TORQUES, torques.ravel())
        self.rewards[places] = reward(begins)
        self.full = self.full or self.index + len(begins) >= len(self.rewards)
        self.index = (self.index + len(begins)) % len(self.rewards)

    def relabel(self, reward: Callable[[np.ndarray], np.ndarray], which: str) -> None:
        """Give the steps in memory the reward that is believed now: all of them. "to index" is what
        PEBBLE's released code does (BPref issue 7): once the ring has wrapped, those behind the
        index keep their old one."""
        count = {"never": 0, "to index": self.index, "all": len(self)}[which]
        self.rewards[:count] = reward(self.states[:count])

    def plan(self, grid: Grid, rewards: np.ndarray, Q: np.ndarray | None = None) -> np.ndarray:
        """Values (N * N, torques) of the best policy that the steps in memory show, for rewards of
        theirs; Q is where to start."""
        n = len(self)
        return grid.plan_from(self.states[:n], self.actions[:n], rewards[:n], self.ends[:n], Q)

    def segments(self) -> np.ndarray:
        """All that is in memory as segments (n, SEGMENT, 2). Episodes are whole multiples."""
        return self.states[:len(self)].reshape(-1, SEGMENT, 2)


# ---- before the first question -------------------------------------------------------------------

def novelty(states: np.ndarray, others: np.ndarray, k: int) -> np.ndarray:
    """log of the distance from states (n, 2) to the k-th nearest of others (m, 2), (n,). Its mean
    is an estimate of the entropy of where one was, up to constants (Eq. 4)."""
    places = []
    for angle, speed in (states.T, others.T):  # the angle goes round
        places.append(np.stack([np.cos(angle), np.sin(angle), speed / SPEED], 1))
    squares = [(place**2).sum(1) for place in places]
    apart = squares[0][:, None] + squares[1] - 2 * places[0] @ places[1].T  # (n, m)
    kth = np.partition(apart, k - 1, axis=1)[:, k - 1]
    return 0.5 * np.log(np.maximum(kth, 1e-8))


def seen(states: np.ndarray) -> float:
    """Share of 12 x 12 cells of angle and speed in which one of the states (n, 2) is."""
    angle = np.clip((states[:, 0] + np.pi) / (2 * np.pi) * 12, 0, 11).astype(int)
    speed = np.clip((states[:, 1] + SPEED) / (2 * SPEED) * 12, 0, 11).astype(int)
    return len(set(zip(angle, speed))) / 144


# ---- the reward ----------------------------------------------------------------------------------

def crops(pairs: np.ndarray, answers: np.ndarray, count: int,
          rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cut both segments of each pair (n, 2, SEGMENT, d) to one random length, each where chance
    wants: questions (n * count, d) and their answers (n * count,)."""
    questions = []
    for _ in range(count):
        for first, second in pairs:
            length = rng.integers(SEGMENT // 2, SEGMENT + 1)
            begin = rng.integers(0, SEGMENT - length + 1, 2)
            cut = [segment[at:at + length].sum(0) for segment, at in zip((first, second), begin)]
            questions.append(cut[0] - cut[1])
    return np.array(questions), np.tile(answers, count)


def confident(questions: np.ndarray, w: np.ndarray, tau: float) -> tuple[np.ndarray, np.ndarray]:
    """Of which questions (n, d) w is sure enough, (n,) bool; and what it would answer, (n,)."""
    p = sigmoid(questions @ w)
    return np.maximum(p, 1 - p) > tau, (p > 0.5).astype(float)


def learn(config: Config, method: Method, pairs: np.ndarray, answers: np.ndarray,
          unanswered: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The reward's weights (d,) from pairs (n, 2, SEGMENT, d) with answers (n,), and from questions
    (m, d) without."""
    questions = pairs[:, 0].sum(1) - pairs[:, 1].sum(1)
    weights = np.ones(len(answers))
    if method.crop:
        questions, answers = crops(pairs, answers, config.crops, rng)
        weights = np.full(len(answers), 1 / config.crops)
    w = fit_logistic(questions, answers, PRIOR, weights)
    if method.pseudo:
        sure, own = confident(unanswered, w, config.tau)
        questions = np.vstack([questions, unanswered[sure]])
        answers = np.append(answers, own[sure])
        weights = np.append(weights, np.ones(sure.sum()))  # lambda = 1
        w = fit_logistic(questions, answers, PRIOR, weights)
    return w


# ---- the algorithm -------------------------------------------------------------------------------

def explore(config: Config, method: Method, grid: Grid, rng: np.random.Generator
            ) -> tuple[Buffer, Callable | None, np.ndarray | None]:
    """What is in memory before the first question; the policy and values that ended there."""
    buffer = Buffer(config.capacity * STEPS)
    policy, Q = None, None  # the first acts at random
    for _ in range(config.before):
        states, torques = roll_out(policy, EPISODES, EXPLORE, rng, config.hold)
        buffer.add(states, torques, no_reward)
        if method.explore:
            # go where it is not as crowded as elsewhere; 1000 of the states show where that is
            begins = buffer.states[:len(buffer)]
            others = begins[rng.integers(0, len(begins), 1000)]
            Q = buffer.plan(grid, novelty(begins, others, NEIGHBOUR), Q)
            policy = partial(grid.act_on, Q)
    return buffer, policy, Q


def no_reward(states: np.ndarray) -> np.ndarray:
    """What is believed before the first answer."""
    return np.zeros(len(states))


def pebble(config: Config, method: Method, grid: Grid, seed: int) -> list[dict]:
    """The true return after every round, what the memory has seen, and how often pseudo-labels are
    right."""
    rng = np.random.default_rng([seed, 1])
    w = np.zeros(bumps(np.zeros(2)).shape[-1])

    def reward(states: np.ndarray) -> np.ndarray:
        return bumps(states) @ w  # of the latest w

    # 1) explore before the first question
    buffer, policy, Q = explore(config, method, grid, rng)

    pairs, answers = np.zeros((0, 2, SEGMENT, len(w))), np.zeros(0)
    unanswered, truth = np.zeros((0, len(w))), np.zeros(0)
    rows = [measure(config, seed, answers, policy, buffer, w, unanswered, truth)]
    for _ in range(config.rounds):
        # 2) ask about segments in memory; some questions remain without an answer
        segments = buffer.segments()  # (n, SEGMENT, 2)
        strengths = config.rationality * true_reward(segments).sum(1)  # (n,) the person's own
        first, second = rng.integers(0, len(segments), (2, config.questions))
        p = sigmoid(strengths[first] - strengths[second])
        pairs = np.concatenate([pairs, bumps(segments[np.stack([first, second], 1)])])
        answers = np.append(answers, rng.random(config.questions) < p)
        first, second = rng.integers(0, len(segments), (2, config.questions * config.unanswered))
        more = bumps(segments[first]).sum(1) - bumps(segments[second]).sum(1)
        unanswered = np.vstack([unanswered, more])
        truth = np.append(truth, strengths[first] > strengths[second])

        # 3) fit the reward to all answers so far
        w = learn(config, method, pairs, answers, unanswered, np.random.default_rng([seed, 2]))

        # 4) give the steps in memory the new reward, and plan from them
        buffer.relabel(reward, method.relabel)
        Q = buffer.plan(grid, buffer.rewards, Q)
        policy = partial(grid.act_on, Q)
        rows.append(measure(config, seed, answers, policy, buffer, w, unanswered, truth))

        # 5) act
        states, torques = roll_out(policy, EPISODES, EXPLORE, rng, config.hold)
        buffer.add(states, torques, reward)
    return rows


def measure(config: Config, seed: int, answers: np.ndarray, policy: Callable | None,
            buffer: Buffer, w: np.ndarray, unanswered: np.ndarray, truth: np.ndarray) -> dict:
    """How good is it? The true return of 50 episodes; the share of places in memory; how often a
    pseudo-label is right, and which share of the questions gets one."""
    rng = np.random.default_rng([seed, 3])
    states, _ = roll_out(policy, 50, 0.0, rng, config.hold)
    sure, own = confident(unanswered, w, config.tau)
    right = float((own == truth)[sure].mean()) if sure.any() else None
    return {"seed": seed, "answers": len(answers), "seen": seen(buffer.states[:len(buffer)]),
            "return": float(true_reward(states[:, :STEPS]).sum(1).mean()),
            "pseudo_right": right, "pseudo_share": float(sure.mean()) if len(sure) else 0.0}


# ---- the experiment ------------------------------------------------------------------------------

def mean_return(rows: list[dict], method: str) -> np.ndarray:
    """Of every person (seeds,), the mean true return after the first, second, ... round of answers:
    high if it is good early, and stays so."""
    counts = sorted(set(values(rows, "answers", method=method)) - {0})
    return np.mean([values(rows, "return", method=method, answers=n) for n in counts], 0)


# what each mechanism buys: one method less another
EFFECTS = {
    "pre-exploration, with relabelling": ("PEBBLE", "relabelling"),
    "pre-exploration, without": ("pre-exploration", "neither"),
    "relabelling, with pre-exploration": ("PEBBLE", "pre-exploration"),
    "relabelling, without": ("relabelling", "neither"),
    "relabelling to the index alone": ("PEBBLE's bug", "PEBBLE"),
    "pseudo-labels": ("+ pseudo-labels", "PEBBLE"),
    "crops": ("+ crops", "PEBBLE"),
    "both": ("SURF", "PEBBLE"),
}


def print_tables(rows: list[dict], config: Config) -> None:
    counts = sorted(set(values(rows, "answers")))
    shown = counts[::max(1, len(counts) // 5)]
    print(f"\ntrue return of {STEPS} steps after so many answers, mean of {config.seeds} people; "
          f"places seen before the first\n")
    print(f"{'answers':16}" + "".join(f"{count:>13}" for count in shown) + "    places")
    for method in METHODS:
        line = f"{method:16}"
        for count in shown:
            mean, error = mean_se(values(rows, "return", method=method, answers=count))
            line += f"{mean:7.1f} ± {error:3.1f}"
        places = np.mean(values(rows, "seen", method=method, answers=0))
        print(f"{line}{places:10.0%}")
    print("\nwhat each mechanism adds to the mean return of all rounds, over the same people\n")
    for effect, (one, other) in EFFECTS.items():
        mean, error = mean_se(mean_return(rows, one) - mean_return(rows, other))
        print(f"{effect:36}{mean:+6.1f} ± {error:.1f}")
    for method in ("+ pseudo-labels", "SURF"):
        share = np.mean(values(rows, "pseudo_share", method=method, answers=counts[-1]))
        right = values(rows, "pseudo_right", method=method, answers=counts[-1])
        if right:
            print(f"{method}: in the end {share:.0%} of the unanswered questions have a "
                  f"pseudo-label, and {np.mean(right):.1%} of those are right")


def draw(rows: list[dict], seen_before: dict[str, np.ndarray], path: Path) -> None:
    """Return against answers for PEBBLE's parts and for SURF's; where one was before the first
    question."""
    parts = ("neither", "pre-exploration", "relabelling", "PEBBLE's bug", "PEBBLE")
    surf = ("PEBBLE", "+ pseudo-labels", "+ crops", "SURF")
    colors = {method: f"C{i}" for i, method in enumerate(METHODS)}
    with figure(path, 2, width=5.5, height=3.8, rows=2) as (_, (left, right, *maps)):
        for axis, methods, title in ((left, parts, "PEBBLE's parts"),
                                     (right, surf, "SURF's parts")):
            for method in methods:
                counts = sorted(set(values(rows, "answers", method=method)))
                table = [values(rows, "return", method=method, answers=n) for n in counts]
                mean, error = mean_se(np.array(table))
                axis.plot(counts, mean, label=method, color=colors[method])
                axis.fill_between(counts, mean - error, mean + error, alpha=0.2,
                                  color=colors[method])
            axis.set(xlabel="answers", ylabel="true return", title=title, ylim=(0, 72))
            axis.legend(fontsize=8)
        for axis, (title, states) in zip(maps, seen_before.items()):
            axis.plot(states[:, 0], states[:, 1], ".", markersize=1)
            axis.set(xlabel="angle (0: up)", ylabel="speed", title=title, xlim=(-np.pi, np.pi),
                     ylim=(-SPEED, SPEED))


def main(config: Config) -> None:
    """Run all methods, write rows and figure, and print the tables."""
    folder = Path(config.out)
    check_writable(folder)
    grid = Grid(41)
    rows = []
    for seed in tqdm(range(config.seed, config.seed + config.seeds), "people"):
        for name, method in METHODS.items():
            rows += [{"method": name, **row} for row in pebble(config, method, grid, seed)]
    write_jsonl(folder / "results.jsonl", rows)

    seen_before = {}
    for title, method in (("random actions", "neither"), ("state entropy", "PEBBLE")):
        rng = np.random.default_rng([config.seed, 1])
        buffer, _, _ = explore(config, METHODS[method], grid, rng)
        seen_before[f"before asking: {title}"] = buffer.states[:len(buffer)]
    draw(rows, seen_before, folder / "figure.png")
    print_tables(rows, config)
    print(f"\nrows and figure  ->  {folder}")


if __name__ == "__main__":
    main(parse(Config, __doc__))
