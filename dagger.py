"""Imitation: copying an expert, why small errors compound, and DAgger, the cure. Training a language model on its own samples
with a teacher's labels (on-policy distillation) is the same cure, and the third task here.

    D <- {};  pi_1 any policy                                                  (Ross, Gordon and Bagnell 2011, Algorithm 3.1)
    for i = 1 .. N:
        pi = expert_prob_i * expert + (1 - expert_prob_i) * pi_i               the mixture acts, drawn anew at every step
        sample T-step trajectories with pi
        D <- D + {(s, expert(s))} for every state visited, whoever acted there
        train pi_{i+1} on D
    return the best pi_i on validation

Cloning is its first round alone: the expert acts, the learner copies. If it errs with probability epsilon in the states that
the expert visits, it may leave them at any of T steps and then pay for all that are left: its cost is at most epsilon T^2 above
the expert's (Ross and Bagnell 2010, Theorem 2.1), and there are tasks where it is of that order. DAgger's learner is trained
where it goes itself; if a mistake can be mended at a cost of u it pays at most u epsilon T + O(1) (Ross et al. 2011, Theorem
2.2), since choosing policies against the states that they cause is online learning, and training on all data so far is
follow-the-leader, which has no regret.

    python dagger.py                   # a bridge that can be fallen off: cost against horizon, T^2 and T; 20 s
    python dagger.py --task track      # a car on a winding road: who stays on it, and for how many labels; two minutes
    python dagger.py --task distill    # a small GPT learns from a larger one, on its samples or its own; 7 minutes of a core

bridge    M planks, one of A actions is right on each; the wrong one and you are in the water, at one of W spots, each with one
          action that brings you back. A step in the water costs 1. The expert knows all right actions and never falls. The
          learner is a table: it knows what it has seen, and guesses the rest. Built so that the T^2 is real: the expert never
          shows what to do in the water. Beside it the same bridge over shallow water, which you leave by yourself: there
          cloning, too, costs epsilon T.
track     steering only, at constant speed, in gusts. The learner sees where it is on the road and the bends ahead, and copies
          the steering by ridge regression on 100 bumps around states it was shown; far from all of them it steers straight on.
distill   expert = the SFT policy of `reviews`, learner = a GPT of a quarter of its size, an action is a token. Every label is
          the expert's whole distribution. Cloning is trained on the expert's samples, DAgger on its own from the second round
          on, from where the last round ended; the last learner is returned, without validation.

Symbols: epsilon, the learner's error rate under the distribution that it was trained on; cost, summed over T steps; labels, the
number of states that the expert was asked about, which is the effort of a human expert. Intervals are over seeds.

Writes  runs/dagger-<task>/ : results.jsonl, figure.png
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import tasks
import evaluate
import reward_model
import sft
from common import fail
from common.files import read_jsonl, write_jsonl
from common.settings import parse, require, require_numbers
from common.training import device, fingerprint, generator, warmup_cosine
from common.tokenizer import Tokenizer
from common.run import load_run
from model import GPT, GPTConfig, Samples, generate, response_mask

Array = np.ndarray
LABELS = {"bridge": 30_720, "track": 8 * 370, "distill": 8000}  # of the whole run: states, states, responses


@dataclass
class Config:
    task: Literal["bridge", "track", "distill"] = "bridge"
    horizon: int = 256  # bridge: the longest; the others are halves of it, six in all
    labels: int = 0  # states the expert is asked about in all (distill: responses); 0 = the task's own number
    iterations: int = 0  # rounds of DAgger; 0 = 10 (bridge), 8 (track), 4 (distill)
    schedule: Literal["", "linear", "exponential", "first"] = ""  # expert_prob falls to 0 in equal steps, by halves, or after
    # the first round; none = linear (bridge), first (track, distill)
    expert_prob: float = 1.0  # share of the expert's actions in the first round
    seeds: int = 0  # 0 = 20, or 3 of distill
    seed: int = 0  # the first
    sft: str = ""  # distill: run folder of the teacher, if not runs/reviews/sft
    steps: int = 800  # distill: optimizer steps of each method, on 32 responses each
    lr: float = 4e-3  # distill: peak learning rate
    out: str = ""  # folder of rows and figure, if not runs/dagger-<task>

    PRESETS: ClassVar[dict] = {}

    def __post_init__(self) -> None:
        require_numbers(self, above_0="steps lr", from_0="labels iterations seeds seed")
        require(0 <= self.expert_prob <= 1, f"--expert-prob {self.expert_prob}: must be in [0, 1]")
        require(self.horizon >= 64, f"--horizon {self.horizon}: must be >= 64")
        distill = self.task == "distill"
        require(distill or not self.sft and self.steps == Config.steps and self.lr == Config.lr,
                "--sft, --steps, --lr: need --task distill")
        require(self.task == "bridge" or self.horizon == Config.horizon, "--horizon: needs --task bridge")
        require(self.expert_prob == 1 or not distill, "--expert-prob: not for --task distill, where the expert begins")
        require(self.schedule in ("", "first") or not distill, "--schedule: distill has first only: a response has one author")
        self.schedule = self.schedule or ("linear" if self.task == "bridge" else "first")
        self.labels = self.labels or LABELS[self.task]
        self.iterations = self.iterations or {"bridge": 10, "track": 8, "distill": 4}[self.task]
        self.seeds = self.seeds or (3 if distill else 20)
        self.out = self.out or f"runs/dagger-{self.task}"
        require(self.seeds > 1, f"--seeds {self.seeds}: must be > 1")
        least = self.iterations * {"bridge": self.horizon, "track": 10, "distill": 1}[self.task]
        require(self.labels >= least, f"--labels {self.labels}: {self.iterations} rounds need {least} or more")

    def expert_probs(self) -> list[float]:
        """expert_prob_i of every round."""
        n = self.iterations
        share = {"linear": [1 - i / max(1, n - 1) for i in range(n)], "exponential": [0.5**i for i in range(n)],
                 "first": [1.0] + [0.0] * (n - 1)}[self.schedule]
        return [self.expert_prob * x for x in share]


# ---- the algorithm ---------------------------------------------------------------------------------------------------

def dagger(expert_probs: list[float], roll_out: Callable, expert: Callable, learn: Callable, cost: Callable,
           learner: Any) -> Any:
    """Dataset Aggregation; with expert_probs = [1] it is cloning.

    Args:
        roll_out: (learner, expert_prob) -> states visited by the mixture.
        expert: states -> what the expert does there.
        learn: [(states, labels), ...], learner -> the next learner.
        cost: learner -> its cost on validation.
        learner: pi_1, any policy.
    """
    D, learners = [], []
    for expert_prob in expert_probs:
        states = roll_out(learner, expert_prob)
        D.append((states, expert(states)))
        learner = learn(D, learner)
        learners.append(learner)
    return min(reversed(learners), key=cost) if len(learners) > 1 else learner  # the latest of those that are alike


def mixture(own: Array, experts: Array, expert_prob: float, rng: np.random.Generator) -> Array:
    """The action of the expert with probability expert_prob, of the learner otherwise; at every state anew."""
    return np.where((rng.random(len(own)) < expert_prob).reshape(-1, *[1] * (own.ndim - 1)), experts, own)


# ---- bridge: states 0 .. M - 1 are planks, M .. M + W - 1 spots in the water -------------------------------------------------

M, W, A = 4000, 20, 4


class Bridge:
    """The bridge of one seed: which action is right where, and what a learner does that has seen nothing."""

    def __init__(self, seed: int, stream: int = 0):
        self.rng = np.random.default_rng([seed, stream])
        self.right, self.guess = self.rng.integers(0, A, (2, M + W))

    def roll_out(self, table: Array, expert_prob: float, n: int, T: int, shallow: bool = False) -> Array:
        """States (n, T) of n walkers."""
        state, seen = self.rng.integers(0, M, n), []
        for _ in range(T):
            seen.append(state)
            action = mixture(table[state], self.right[state], expert_prob, self.rng)
            plank, spot, wet = self.rng.integers(0, M, n), self.rng.integers(M, M + W, n), state >= M
            back = (action == self.right[state]) | (wet & shallow)
            state = np.where(back, plank, np.where(wet, state, spot))
        return np.stack(seen, 1)

    def learn(self, D: list[tuple[Array, Array]], _: Array) -> Array:
        """The empirical risk minimiser of a table: what was shown, and the guess elsewhere."""
        table = self.guess.copy()
        for states, actions in D:
            table[states] = actions
        return table

    def train(self, config: Config, method: str, T: int, labels: int) -> Array:
        """The table that cloning or DAgger ends with after so many labels."""
        probs = config.expert_probs() if method == "DAgger" else [1.0]
        each, shallow = labels // len(probs), method == "cloning, shallow"
        return dagger(probs, lambda table, prob: self.roll_out(table, prob, -(-each // T), T, shallow).ravel()[:each],
                      lambda states: self.right[states], self.learn,
                      lambda table: (self.roll_out(table, 0.0, 200, T) >= M).mean(), self.guess)

    def errors(self, table: Array) -> tuple[float, float]:
        """Share of planks, and of spots in the water, where the table is wrong."""
        wrong = table != self.right
        return wrong[:M].mean(), wrong[M:].mean()


def expected_cost(epsilon: float, stuck: float, T: int) -> float:
    """Expected steps in the water among T, exactly: a table falls with probability epsilon at a plank, and never comes back
    from a share `stuck` of the spots. For stuck = 1 it is sum over t < T of 1 - (1 - epsilon)^t, about epsilon T^2 / 2."""
    on, wet, lost, cost = 1.0, 0.0, 0.0, 0.0  # probabilities: on a plank, about to leave the water, in it for good
    for _ in range(T):
        cost += wet + lost
        on, wet, lost = on * (1 - epsilon) + wet, on * epsilon * (1 - stuck), lost + on * epsilon * stuck
    return cost


def bridge(config: Config) -> list[dict]:
    """Cost against horizon at equal labels, and against labels at one horizon."""
    rows = []

    def run(method: str, T: int, labels: int, seed: int) -> dict:
        world, shallow = Bridge(seed, T), method == "cloning, shallow"
        table = world.train(config, method, T, labels)
        epsilon, stuck = world.errors(table)
        visited = world.roll_out(table, 0.0, 200, T, shallow)
        return {"task": "bridge", "method": method, "horizon": T, "labels": labels, "seed": seed, "epsilon": epsilon,
                "stuck": stuck, "cost": expected_cost(epsilon, 0.0 if shallow else stuck, T),
                "rolled_out_cost": float((visited >= M).sum(1).mean())}

    horizons = [config.horizon // 2**k for k in range(5, -1, -1)]
    jobs = [(method, T, config.labels) for T in horizons for method in ("cloning", "DAgger", "cloning, shallow")]
    jobs += [(method, horizons[-2], labels) for labels in (config.labels // 8, config.labels // 4, config.labels // 2)
             for method in ("cloning", "DAgger") if labels >= config.iterations * horizons[-2]]
    for job in tqdm(jobs, "bridge"):
        rows += [run(*job, config.seed + k) for k in range(config.seeds)]

    own = [row for row in rows if row["labels"] == config.labels]
    print(f"\nsteps in the water among T, {config.labels} labels, mean of {config.seeds} seeds\n\n"
          f"{'':18}" + "".join(f"{f'T = {T}':>18}" for T in horizons) + "    slope of log cost in log T")
    for method in ("cloning", "DAgger", "cloning, shallow"):
        costs = np.array([[row["cost"] for row in own if (row["method"], row["horizon"]) == (method, T)] for T in horizons])
        mean, low, high = slope(horizons, costs, config.seed)
        rows.append({"task": "bridge", "method": method, "slope": mean, "slope_low": low, "slope_high": high})
        print(f"{method:18}" + "".join(f"{x.mean():10.4f} ± {x.std(ddof=1) / math.sqrt(len(x)):.4f}" for x in costs)
              + f"    {mean:.2f} ({low:.2f} to {high:.2f})")
    for method in ("cloning", "DAgger"):
        epsilon = [np.mean([row["epsilon"] for row in own if (row["method"], row["horizon"]) == (method, T)]) for T in horizons]
        print(f"{'epsilon, ' + method:18}" + "".join(f"{x:18.5f}" for x in epsilon))
    print("The expert's cost is 0. Cloning is bounded by epsilon T^2, DAgger here by epsilon T: each fall is mended in a step.")
    return rows


def slope(horizons: list[int], costs: Array, seed: int) -> tuple[float, float, float]:
    """Slope of the log of the mean cost in log T, with its 95% bootstrap interval over seeds. costs: (horizons, seeds)."""
    rng, x = np.random.default_rng(seed), np.log(horizons)

    def fitted(costs: Array) -> float:
        return float(np.polyfit(x, np.log(np.maximum(costs.mean(1), 1e-12)), 1)[0])
    again = [fitted(costs[:, rng.integers(0, costs.shape[1], costs.shape[1])]) for _ in range(1000)]
    return fitted(costs), *(float(q) for q in np.quantile(again, [0.025, 0.975]))


# ---- track: states (x, y, heading) -------------------------------------------------------------------------------------

class Track:
    """A closed road of width 2, driven at 2 lengths a second; the driver steers, by radians a second."""
    points, speed, step, half_width, gust = 600, 2.0, 0.1, 1.0, 0.3

    def __init__(self) -> None:
        angle = np.linspace(0, 2 * np.pi, self.points, endpoint=False)
        radius = 10 + 2.2 * np.sin(3 * angle) + 1.2 * np.cos(5 * angle + 1)
        self.centre = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
        ahead = np.roll(self.centre, -1, 0) - self.centre
        length = np.hypot(*ahead.T)
        self.heading = np.arctan2(ahead[:, 1], ahead[:, 0])
        bend = self.turn(np.roll(self.heading, -1) - self.heading) / length
        self.bend = np.convolve(np.concatenate([bend[-5:], bend, bend[:5]]), np.full(11, 1 / 11), "valid")
        self.lap = round(length.sum() / self.speed / self.step)  # steps

    @staticmethod
    def turn(angle: Array) -> Array:
        return (angle + np.pi) % (2 * np.pi) - np.pi

    def see(self, state: Array) -> Array:
        """What the driver sees, (n, 6): distance from the middle (left is positive), angle to the road, four bends ahead."""
        at = ((state[:, None, :2] - self.centre) ** 2).sum(2).argmin(1)
        off = state[:, :2] - self.centre[at]
        aside = np.cos(self.heading[at]) * off[:, 1] - np.sin(self.heading[at]) * off[:, 0]
        bends = [self.bend[(at + k) % self.points] for k in (0, 8, 16, 24)]
        return np.column_stack([aside, self.turn(state[:, 2] - self.heading[at]), *bends])

    @staticmethod
    def expert(seen: Array) -> Array:
        """Steers with the bend, back to the middle, and along the road; (..., 6) -> (...)."""
        return np.clip(2 * seen[..., 3] - 1.5 * np.arctan(1.5 * seen[..., 0]) - 3 * seen[..., 1], -4, 4)

    def drive(self, policy: Callable[[Array], Array], n: int, T: int, expert_prob: float,
              rng: np.random.Generator) -> tuple[Array, Array]:
        """States (n, T, 3) and what was seen (n, T, 6) of n cars that start anywhere in the middle of the road."""
        at = rng.integers(0, self.points, n)
        state, states, views = np.column_stack([self.centre[at], self.heading[at]]), [], []
        for _ in range(T):
            seen = self.see(state)
            states.append(state)
            views.append(seen)
            steering = mixture(policy(seen), self.expert(seen), expert_prob, rng) + self.gust * rng.normal(size=n)
            heading = state[:, 2] + self.step * steering
            ahead = np.column_stack([np.cos(heading), np.sin(heading)])
            state = np.column_stack([state[:, :2] + self.step * self.speed * ahead, heading])
        return np.stack(states, 1), np.stack(views, 1)


    def train(self, config: Config, method: str, labels: int, rng: np.random.Generator) -> Callable[[Array], Array]:
        """The policy that cloning or DAgger ends with after so many labels; on validation, the least time off the road."""
        probs = config.expert_probs() if method == "DAgger" else [1.0]
        each = labels // len(probs)
        T = min(each, self.lap)
        return dagger(probs, lambda policy, prob: self.drive(policy, -(-each // T), T, prob, rng)[1].reshape(-1, 6)[:each],
                      self.expert, lambda D, _: ridge(D, rng),
                      lambda policy: self.off(self.drive(policy, 10, self.lap, 0.0, rng)[1]).mean(),
                      lambda seen: np.zeros(len(seen)))

    def off(self, seen: Array) -> Array:
        """Whether the car has left the road, for every view."""
        return np.abs(seen[..., 0]) > self.half_width


def ridge(D: list[tuple[Array, Array]], rng: np.random.Generator, bumps: int = 100) -> Callable[[Array], Array]:
    """A policy from (views, steering): ridge regression on normal bumps around some of the views; 0 far from all of them."""
    views = np.concatenate([views.reshape(-1, 6) for views, _ in D]) / WIDTHS
    steering = np.concatenate([steering.ravel() for _, steering in D])
    centres = views[rng.choice(len(views), min(bumps, len(views)), replace=False)]

    def features(views: Array) -> Array:
        squares = (views**2).sum(1)[:, None] + (centres**2).sum(1) - 2 * views @ centres.T
        return np.exp(-np.maximum(squares, 0) / 2)
    phi = features(views)
    weights = np.linalg.solve(phi.T @ phi + 1e-2 * np.eye(len(centres)), phi.T @ steering)
    return lambda seen: features(seen / WIDTHS) @ weights


WIDTHS = np.array([0.5, 0.3, 0.2, 0.2, 0.2, 0.2])  # of the bumps, in the units of what is seen


def track(config: Config) -> tuple[list[dict], Track, dict[str, Array]]:
    """Laps without leaving the road against the number of labels, and the lines driven."""
    road, rows, lines = Track(), [], {}
    sizes = [config.labels // 4, config.labels // 2, config.labels, config.labels * 2]
    for labels in tqdm([n for n in sizes if n >= 10 * config.iterations], "track"):
        for seed in range(config.seed, config.seed + config.seeds):
            for method in ("cloning", "DAgger"):
                policy = road.train(config, method, labels, np.random.default_rng([seed, labels]))
                states, views = road.drive(policy, 20, road.lap, 0.0, np.random.default_rng([seed, 1]))
                off = road.off(views)
                rows.append({"task": "track", "method": method, "labels": labels, "seed": seed,
                             "laps": float(1 - off.any(1).mean()), "time_off": float(off.mean())})
                if labels == config.labels and seed == config.seed:
                    lines[method] = states[:8]
    sizes = sorted({row["labels"] for row in rows})
    print(f"\nlaps without leaving the road, mean of {config.seeds} seeds; the expert's are all\n\n{'labels':12}"
          + "".join(f"{n:>16}" for n in sizes))
    for method in ("cloning", "DAgger"):
        laps = [np.array([row["laps"] for row in rows if (row["method"], row["labels"]) == (method, n)]) for n in sizes]
        print(f"{method:12}" + "".join(f"{x.mean():10.0%} ± {x.std(ddof=1) / math.sqrt(len(x)):3.0%}" for x in laps))
    return rows, road, lines


# ---- distill: a state is a prompt and the response so far ------------------------------------------------------------

class Distilled(NamedTuple):
    method: str
    kl: Array  # (positions,) KL(student || teacher) at each token of the student's own responses, nats
    alive: Array  # (positions,) share of its responses that have this token


def student_of(teacher: GPTConfig, seed: int) -> GPT:
    """A GPT of half the teacher's channels: a quarter of its weights."""
    torch.manual_seed(seed)
    half = {"n_embd": teacher.n_embd // 2, "n_head": max(1, teacher.n_head // 2)}
    return GPT(GPTConfig(**{**vars(teacher), **half})).to(device())


def token_logits(model: GPT, rows: Samples) -> torch.Tensor:
    """Logits (N, vocabulary) of every response token, row after row."""
    mask = response_mask(rows.prompt_lengths, rows.lengths)
    i, r = mask.nonzero(as_tuple=True)
    hidden = model.hidden(rows.tokens[:, :int(rows.lengths.max())])
    return F.linear(hidden[i, rows.prompt_lengths[i] + r - 1], model.wte.weight).float()


def kl_by_position(student: GPT, teacher: GPT, samples: Samples) -> tuple[Array, Array]:
    """Mean KL(student || teacher) at every position of the student's responses, and the share of them that get there.

    The sum over positions of share times KL is KL(student || teacher) of whole responses: the chain rule.
    """
    mask = response_mask(samples.prompt_lengths, samples.lengths)
    total = torch.zeros(mask.shape[1], dtype=torch.float64)
    with torch.no_grad():
        for rows in torch.arange(len(mask)).split(64):
            part = Samples(*(x[rows].to(device()) for x in samples[:3]), None)
            p, q = (F.log_softmax(token_logits(model, part), 1) for model in (student, teacher))
            _, r = response_mask(part.prompt_lengths, part.lengths).nonzero(as_tuple=True)
            total.index_add_(0, r.cpu(), (p.exp() * (p - q)).sum(1).double().cpu())
    count = mask.sum(0)
    return (total / count).numpy(), (count / len(mask)).numpy()


def distill(config: Config) -> tuple[list[dict], list[Distilled]]:
    """A student trained on the teacher's samples, and one trained on its own; the teacher is asked equally often."""
    folder = sft.ensure(config.sft, "reviews", "cpu")
    teacher, meta = load_run(folder)
    teacher = teacher.to(device()).eval().requires_grad_(False)
    tokenizer = Tokenizer.load(folder / "tokenizer.tiktoken")
    evaluate.check_same_task(folder, meta, {"dataset": "reviews", "tokenizer": tokenizer.fingerprint})
    gold = reward_model.ensure_gold(folder, "reviews", "cpu")
    bank = evaluate.ensure_bank(folder.parent, "reviews", "cpu", teacher, tokenizer, fingerprint(teacher.state_dict()), gold)
    texts = [row["prompt"] for row in read_jsonl(tasks.ensure("reviews") / "prompts_train.jsonl", {"prompt": str})]
    prompts = [[tokenizer.bos] + ids for ids in tokenizer.encode_batch(texts)]
    block_size, each = teacher.config.block_size, config.labels // config.iterations

    def roll_out(model: GPT, *stream: int) -> Samples:
        draw = generator(*stream)
        rows = torch.randint(len(prompts), (each,), generator=draw).tolist()
        return generate(model, [prompts[i] for i in rows], block_size, tokenizer.eos, tokenizer.pad, draw)

    rows, curves = [], []
    for seed in range(config.seed, config.seed + config.seeds):
        for method in ("cloning", "DAgger"):
            student = student_of(teacher.config, seed)
            optimizers = sft.optimizers_for(student, config.lr, 0.1)
            bar = tqdm(total=config.steps, desc=f"{method}, seed {seed}")

            def learn(D: list, student: GPT) -> GPT:
                """Steps on all responses so far towards the teacher's distributions; goes on from the weights there are."""
                done = config.steps * (len(D) - 1) // config.iterations
                for step in range(done, config.steps * len(D) // config.iterations):
                    draw = generator(seed, 1, step)
                    samples = D[int(torch.randint(len(D), (), generator=draw))][0]  # of one round, any of them
                    chosen = torch.randint(each, (32,), generator=draw)
                    part = Samples(*(x[chosen].to(device()) for x in samples[:3]), None)
                    with torch.no_grad():
                        label = F.softmax(token_logits(teacher, part), 1)
                    loss = F.cross_entropy(token_logits(student.train(), part), label)
                    loss.backward()
                    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0).item()
                    if not math.isfinite(norm + loss.item()):
                        fail(f"step {step}: loss {loss.item()}, gradient norm {norm}: not finite; --lr {config.lr} too large?")
                    for optimizer in optimizers:
                        for group in optimizer.param_groups:
                            group["lr"] = config.lr * warmup_cosine(step, config.steps, 50)
                        optimizer.step()
                        optimizer.zero_grad(set_to_none=True)
                    bar.update()
                return student

            rounds = iter(range(config.iterations))
            probs = config.expert_probs() if method == "DAgger" else [1.0] * config.iterations
            dagger(probs, lambda model, prob: roll_out(teacher if prob else model.eval(), seed, 2, next(rounds)),
                   lambda _: None, learn, lambda _: 0.0, student)  # labels, 1,000 numbers a token, are made where used
            bar.close()

            # ---- on the student's own responses to test prompts
            policy = evaluate.sample_policy(student.eval(), teacher, tokenizer, bank.prompts, gold, samples=4)
            test = [[tokenizer.bos] + ids for ids in tokenizer.encode_batch(bank.prompts)] * 8
            own = generate(student, test, block_size, tokenizer.eos, tokenizer.pad, generator(seed, 3))
            kl, alive = kl_by_position(student, teacher, own)
            curves.append(Distilled(method, kl, alive))
            rows.append({"task": "distill", "method": method, "seed": seed, "labels": config.labels,
                         "kl": float((kl * alive).sum()), "kl_sampled": policy.kl.mean().item(),
                         "reward": policy.rewards.mean().item(), "teacher_reward": bank.rewards.mean().item(),
                         "kl_by_position": [round(float(x), 5) for x in kl[:60]],
                         "alive": [round(float(x), 5) for x in alive[:60]]})
    print(f"\nKL(student || teacher) on the student's own responses, nats; {config.labels} labelled responses, {config.seeds} "
          f"seeds\n\n{'':10}{'a response':>18}{'at tokens 1-10':>18}{'at 21-30':>18}{'gold reward':>18}   (teacher "
          f"{rows[0]['teacher_reward']:.3f})")
    for method in ("cloning", "DAgger"):
        own = [row for row in rows if row["method"] == method]
        early, late = ([np.mean(row["kl_by_position"][a:b]) for row in own] for a, b in ((0, 10), (20, 30)))
        columns = [[row["kl"] for row in own], early, late, [row["reward"] for row in own]]
        print(f"{method:10}" + "".join(f"{np.mean(x):10.3f} ± {np.std(x, ddof=1) / math.sqrt(len(x)):.3f}" for x in columns))
    return rows, curves


# ---- figures -----------------------------------------------------------------------------------------------------------

def figure_of(width: int) -> tuple:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(1, width, figsize=(5 * width, 4.2), layout="constrained")


def mean_se(x: Array) -> tuple[Array, Array]:
    """Mean over seeds (the last axis) and its standard error."""
    return x.mean(-1), x.std(-1, ddof=1) / math.sqrt(x.shape[-1])


def draw_bridge(rows: list[dict], config: Config, path: Path) -> None:
    """Cost against horizon with the bounds, cost against labels, and who is in the water when."""
    figure, axes = figure_of(4)
    runs = [row for row in rows if "cost" in row]
    slopes = {row["method"]: row["slope"] for row in rows if "slope" in row}
    half = config.horizon // 2
    for axis, over, fixed in ((axes[0], "horizon", ("labels", config.labels)), (axes[1], "labels", ("horizon", half))):
        for method in slopes if over == "horizon" else ("cloning", "DAgger"):
            own = [row for row in runs if row["method"] == method and row[fixed[0]] == fixed[1]]
            x = np.array(sorted({row[over] for row in own}))
            mean, error = mean_se(np.array([[row["cost"] for row in own if row[over] == n] for n in x]))
            label = f"{method}: slope {slopes[method]:.2f}" if over == "horizon" else method
            line = axis.errorbar(x, mean, 1.96 * error, fmt="o-", capsize=3, markersize=4, label=label)[0]
            if over == "horizon" and method in ("cloning", "DAgger"):
                epsilon = np.mean([row["epsilon"] for row in own])
                axis.plot(x, epsilon * x ** (2.0 if method == "cloning" else 1.0), ":", color=line.get_color(),
                          label=r"bound $\epsilon T^2$" if method == "cloning" else r"bound $\epsilon T$")
        axis.set(xscale="log", yscale="log", xlabel=over, ylabel="steps in the water")
        axis.legend(fontsize=8)
    axes[0].set_title(f"{config.labels} labels")
    axes[1].set_title(f"horizon {half}: what an expert's effort buys")
    for axis, method in zip(axes[2:], ("cloning", "DAgger")):
        world = Bridge(config.seed, config.horizon)
        table = world.train(config, method, config.horizon, config.labels // 4)
        seen = world.roll_out(table, 0.0, 100, config.horizon)
        axis.imshow(seen >= M, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axis.set(xlabel="step", ylabel="walker", title=f"{method}, {config.labels // 4} labels: in the water (blue)")
    figure.savefig(path, dpi=150)


def draw_track(rows: list[dict], road: Track, lines: dict[str, Array], path: Path) -> None:
    """The lines driven, and laps against labels."""
    figure, axes = figure_of(3)
    side = np.stack([-np.sin(road.heading), np.cos(road.heading)], 1) * road.half_width
    for axis, (method, states) in zip(axes, lines.items()):
        for edge in (road.centre + side, road.centre - side):
            axis.plot(*np.vstack([edge, edge[:1]]).T, color="black", linewidth=0.8)
        for state in states:
            axis.plot(state[:, 0], state[:, 1], linewidth=0.8)
        axis.set(aspect="equal", xlim=(-17, 17), ylim=(-17, 17), title=method)
    for method in lines:
        own = [row for row in rows if row["method"] == method]
        x = sorted({row["labels"] for row in own})
        mean, error = mean_se(np.array([[row["laps"] for row in own if row["labels"] == n] for n in x]))
        axes[-1].errorbar(x, mean, 1.96 * error, fmt="o-", capsize=3, label=method)
    axes[-1].set(xscale="log", xlabel="labels", ylabel="laps on the road", ylim=(0, 1.05))
    axes[-1].legend()
    figure.savefig(path, dpi=150)


def draw_distill(rows: list[dict], curves: list[Distilled], path: Path) -> None:
    """KL at every position of the student's own responses, and summed up to it."""
    figure, axes = figure_of(2)
    for method in dict.fromkeys(curve.method for curve in curves):
        own = [curve for curve in curves if curve.method == method]
        size = min(min(int((curve.alive > 0.1).sum()) for curve in own), 60)
        for axis, values in zip(axes, ([c.kl[:size] for c in own], [(c.kl * c.alive)[:size].cumsum() for c in own])):
            mean, error = mean_se(np.stack(values, 1))
            axis.plot(range(1, size + 1), mean, label=method)
            axis.fill_between(range(1, size + 1), mean - error, mean + error, alpha=0.2)
            axis.set(xlabel="token of the student's own response")
            axis.legend()
    axes[0].set(ylabel=r"KL(student $\|$ teacher), nats", title="at the token")
    axes[1].set(title="of the response so far")
    figure.savefig(path, dpi=150)


def main(config: Config) -> None:
    folder = Path(config.out)
    rows, *drawn = {"bridge": lambda c: (bridge(c), c), "track": track, "distill": distill}[config.task](config)
    write_jsonl(folder / "results.jsonl", rows)
    {"bridge": draw_bridge, "track": draw_track, "distill": draw_distill}[config.task](rows, *drawn, folder / "figure.png")
    print(f"\nrows and figure  ->  {folder}")


if __name__ == "__main__":
    main(parse(Config, __doc__))
