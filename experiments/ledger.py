"""Mistakes that are carried along: where DAgger pays for a language model, and where it does not.

    response   - -1  + 0  + 1  - 0  ...     moves, and after each the sum of all moves so far
    slip       a number is replaced by another one, at random: 1 in 100 that a student writes
    teacher    the grammar. After any text it knows the right number: the sum of the moves, whatever
               numbers were written before

    cloning    learns from the teacher's texts, which have no slips
    DAgger     half of its texts are the teacher's, the others those of the student as it then is,
               slips included; the teacher says what should have come at every place

    python experiments/ledger.py    # 3 seeds; ten minutes of one core

In the teacher's texts a number is the one before it plus or minus 1. Who learns that carries each
slip along to the end: after k numbers a share of 1 - (1 - slip)^k has one, so the error grows with
the length, the T^2 of dagger.py. To mend it the moves have to be counted again from the start.
DAgger's labels say so, and cloning's never do. But counting is harder to learn than adding 1.

Expected: cloning's error grows along its own text, DAgger's does not; with few labels DAgger pays
more for learning the harder rule than it saves. The first came out, the second only where nothing
slips (results/distill). If DAgger's error grew as cloning's does, the theory would be of no use
here.

The student is a GPT of two layers and some 29,000 weights; both methods get equally many labelled
texts and equally many steps. `experiments/distill.py` has the same on film reviews, where nothing
is carried along and DAgger buys nothing.

Differs from DAgger (Ross et al. 2011, Algorithm 3.1): a text has one author, half of the labels are
for the first round, training goes on from the last round's weights, and the last student is
returned.

Writes  runs/ledger/ : results.jsonl, figure.png

Symbols: T numbers of a text; error, the probability that the student gives to all but the right
number.
"""
from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, for the imports below

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import sft
from common import fail
from common.figures import figure
from common.files import check_writable, write_jsonl
from common.settings import (
    parse, require, require_numbers, run_folder, settings)
from common.statistics import mean_se, values
from common.training import generator, set_lr, warmup_cosine
from model import GPT, Cache, GPTConfig

METHODS = ("cloning", "DAgger")
T = 24  # numbers of a text
BOS, DOWN, UP = 0, 1, 2  # tokens; the number i is token ZERO + i
ZERO = 3 + T
VOCABULARY = ZERO + T + 1
BATCH_SIZE = 64  # texts a step
WARMUP = 50  # steps
WEIGHT_DECAY = 0.1
MEASURED = 4000  # texts of a student whose errors are counted


@settings
class Config:
    # ---- the algorithm
    labels: int = 4000  # Labelled texts, the most; a quarter and a sixteenth are tried, too.
    iterations: int = 5  # Rounds of DAgger; the first has half of the labels.
    steps: int = 2000  # Optimizer steps, in all rounds together.
    lr: float = 4e-3  # Peak learning rate.

    # ---- the experiment
    slip: float = 0.01  # Probability that a number which a student writes is replaced.
    seeds: int = 3  # Students of each method, over which standard errors are computed.
    seed: int = 0  # First seed: of the initial weights and of the texts.
    out: str = ""  # Folder for rows and figure, if not one named by the settings.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="labels iterations steps lr seeds", from_0="slip seed")
        require(self.slip < 1, f"--slip {self.slip:g}: must be below 1")
        require(2 <= self.seeds <= 1000, f"--seeds {self.seeds}: must be from 2 to 1000")
        require(self.steps >= self.iterations, f"--steps {self.steps}: must be at least one for "
                f"each of the {self.iterations} rounds")
        least = 16 * 2 * self.iterations
        require(least <= self.labels <= 10**6, f"--labels {self.labels}: must be from {least} to "
                f"10^6, for {self.iterations} rounds with a sixteenth of them")
        self.out = self.out or run_folder(self, "ledger")


# ---- the teacher ---------------------------------------------------------------------------------

def right_numbers(tokens: torch.Tensor) -> torch.Tensor:
    """The right token (n, T) at each number of texts (n, 1 + 2 T): the sum of the moves before it.
    A token that should be a move and is none moves nothing."""
    moves = tokens[:, 1::2]
    return ZERO + ((moves == UP).long() - (moves == DOWN).long()).cumsum(1)


def label(tokens: torch.Tensor) -> torch.Tensor:
    """What the teacher would write at each place of texts (n, 1 + 2 T): probabilities
    (n, 2 T, vocabulary)."""
    probs = torch.zeros(len(tokens), 2 * T, VOCABULARY)
    probs[:, 0::2, [DOWN, UP]] = 0.5
    probs[:, 1::2] = F.one_hot(right_numbers(tokens), VOCABULARY).float()
    return probs


def teacher_writes(n: int, draw: torch.Generator) -> torch.Tensor:
    """Texts (n, 1 + 2 T) without a slip."""
    tokens = torch.full((n, 1 + 2 * T), BOS)
    tokens[:, 1::2] = torch.randint(DOWN, UP + 1, (n, T), generator=draw)
    tokens[:, 2::2] = right_numbers(tokens)
    return tokens


# ---- the student ---------------------------------------------------------------------------------

@torch.no_grad()
def student_writes(student: GPT, n: int, slip: float, draw: torch.Generator) -> torch.Tensor:
    """Texts (n, 1 + 2 T) sampled from the student. Each number may slip, and what comes after it
    sees what was written."""
    tokens = torch.full((n, 1 + 2 * T), BOS)
    cache = Cache(student.config, n, 1 + 2 * T, torch.float32, torch.device("cpu"))
    for place in range(2 * T):
        hidden = student.hidden(tokens[:, place:place + 1], cache)[:, -1]
        probs = F.linear(hidden, student.wte.weight).softmax(1)
        token = torch.multinomial(probs, 1, generator=draw).squeeze(1)
        if place % 2:  # a number
            slips = torch.rand(n, generator=draw) < slip
            another = torch.randint(ZERO - T, VOCABULARY, (n,), generator=draw)
            token = torch.where(slips, another, token)
        tokens[:, place + 1] = token
    return tokens


def train(config: Config, method: str, labels: int, seed: int) -> GPT:
    """Train one student on so many labelled texts."""
    torch.manual_seed(seed)
    student = GPT(GPTConfig(VOCABULARY, 1 + 2 * T, n_layer=2, n_head=2, n_embd=32))
    optimizers = sft.optimizers_for(student, config.lr, WEIGHT_DECAY)
    later = labels // 2 // max(1, config.iterations - 1)  # texts of each later round
    texts = torch.empty(0, 1 + 2 * T, dtype=torch.long)  # D
    for i in range(config.iterations):
        # 1) the teacher writes in the first round; then the student, if the method is DAgger
        size = later if i else labels - later * (config.iterations - 1)
        draw = generator(seed, 2, i)
        if method == "cloning" or i == 0:
            written = teacher_writes(size, draw)
        else:
            written = student_writes(student, size, config.slip, draw)

        # 2) these texts are added to those of all earlier rounds
        first = config.steps * len(texts) // labels
        texts = torch.cat([texts, written])
        end = config.steps * len(texts) // labels

        # 3) train on all of them, from where the last round ended
        for step in range(first, end):
            draw = generator(seed, 1, step)
            batch = texts[torch.randint(len(texts), (BATCH_SIZE,), generator=draw)]
            # the mean over places of KL(teacher || student), up to the teacher's own entropy
            loss = F.cross_entropy(student(batch[:, :-1]).flatten(0, 1), label(batch).flatten(0, 1))
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0).item()
            if not math.isfinite(grad_norm + loss.item()):
                fail(f"step {step}: loss {loss.item()}, gradient norm {grad_norm}: not finite; is "
                     f"--lr {config.lr} too large?")
            set_lr(optimizers, config.lr * warmup_cosine(step, config.steps, WARMUP))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return student


@torch.no_grad()
def errors(student: GPT, tokens: torch.Tensor) -> np.ndarray:
    """The student's mean error (T,) at each number, when it goes on from texts (n, 1 + 2 T)."""
    total = torch.zeros(T, dtype=torch.float64)
    for part in tokens.split(500):
        probs = student(part[:, :-1])[:, 1::2].softmax(2)  # (n, T, vocabulary)
        right = probs.gather(2, right_numbers(part)[:, :, None]).squeeze(2)
        total += (1 - right).double().sum(0)
    return (total / len(tokens)).numpy()


# ---- the experiment ------------------------------------------------------------------------------

def sizes(config: Config) -> list[int]:
    """The numbers of labelled texts that are tried."""
    return [config.labels // 16, config.labels // 4, config.labels]


def print_table(rows: list[dict], config: Config) -> None:
    """The errors of all students."""
    print(f"\nerror at a number, in %; {config.seeds} seeds\n")
    print(f"{'labelled texts':24}{'first 6 numbers':>18}{'last 6':>18}{'all':>18}"
          f"{'of a text by the teacher':>28}")
    for labels in sizes(config):
        for method in METHODS:
            own = 100 * np.array(values(rows, "own", method=method, labels=labels))  # (seeds, T)
            taught = 100 * np.array(values(rows, "teachers", method=method, labels=labels))
            line = f"{labels:>7,}  {method:15}"
            for part in (own[:, :6], own[:, -6:], own):
                mean, error = mean_se(part.mean(1))
                line += f"{mean:10.2f} ± {error:5.2f}"
            mean, error = mean_se(taught.mean(1))
            print(f"{line}{mean:20.2f} ± {error:5.2f}")


def draw(rows: list[dict], config: Config, path: Path) -> None:
    """Error along the text with the most labels; error against the number of labels."""
    numbers = np.arange(1, T + 1)
    with figure(path, 2, width=5) as (_, (along, by_labels)):
        for method in METHODS:
            own = np.array(values(rows, "own", method=method, labels=config.labels))
            mean, error = mean_se(own, axis=0)
            line, = along.plot(numbers, mean, label=f"{method}, own texts")
            along.fill_between(numbers, mean - error, mean + error, alpha=0.2)
            taught = np.mean(values(rows, "teachers", method=method, labels=config.labels), 0)
            along.plot(numbers, taught, "--", color=line.get_color(),
                       label=f"{method}, the teacher's texts")
            means = [mean_se(np.mean(values(rows, "own", method=method, labels=labels), 1))
                     for labels in sizes(config)]
            mean, error = np.array(means).T
            by_labels.errorbar(sizes(config), mean, error, fmt="o-", capsize=3, label=method)
        along.plot(numbers, 1 - (1 - config.slip)**(numbers - 1), ":", color="black",
                   label="no slip is ever mended")
        along.set(xlabel="number of the text", ylabel="error",
                  title=f"{config.labels:,} labelled texts")
        by_labels.set(xscale="log", yscale="log", xlabel="labelled texts", ylabel="mean error",
                      title="own texts")
        by_labels.set_xticks(sizes(config), [f"{labels:,}" for labels in sizes(config)])
        by_labels.minorticks_off()
        for axis in (along, by_labels):
            axis.legend(fontsize=8)


def main(config: Config) -> None:
    """Train all students, measure them, write the rows and the figure, and print the table."""
    folder = Path(config.out)
    check_writable(folder)
    rows = []
    for seed in tqdm(range(config.seed, config.seed + config.seeds), "seeds"):
        for labels in sizes(config):
            for method in METHODS:
                student = train(config, method, labels, seed)
                own = student_writes(student, MEASURED, config.slip, generator(seed, 3))
                teachers = teacher_writes(MEASURED, generator(seed, 4))
                rows.append({"method": method, "labels": labels, "seed": seed,
                             "own": [round(float(x), 6) for x in errors(student, own)],
                             "teachers": [round(float(x), 6) for x in errors(student, teachers)]})
    write_jsonl(folder / "results.jsonl", rows)
    draw(rows, config, folder / "figure.png")
    print_table(rows, config)
    print(f"\nrows and figure  ->  {folder}")


if __name__ == "__main__":
    main(parse(Config, __doc__))
