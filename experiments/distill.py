"""On-policy distillation: a small GPT learns from a larger one, on its own samples. That is DAgger
for language models: a state is a prompt with the response so far, an action is a token.

    L(theta) = E_{y ~ D} mean_t KL( teacher(. | x, y_<t) || student(. | x, y_<t) )

    cloning      D holds samples of the teacher
    on-policy    D holds samples of the teacher in the first round, and of the student as it then is
                 in every later one      (Ross et al. 2011, Algorithm 3.1; Agarwal et al. 2024, GKD)

    python experiments/distill.py              # `reviews`, 3 seeds; 7 minutes of one core

The teacher is the SFT policy, the student a GPT of half its channels and a quarter of its weights.
A label is the teacher's whole distribution over the next token. Both methods see equally many
labelled responses and take equally many steps.

What is measured is KL(student || teacher) at every token of the student's own responses: does the
student drift to where it errs more, the further it writes? By the chain rule the sum over a
response's tokens is the KL of whole responses.

Differs from DAgger: a response has one author; training goes on from the last round's weights, and
a batch comes from one of the rounds so far; the last student is returned, without validation. The
loss is KL(teacher || student), and what is measured is the KL the other way round.

Reads   the SFT policy and the bank (made if they are missing), the task's prompts
Writes  runs/<dataset>/distill.../ : results.jsonl, figure.png
"""
from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, for the imports below

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
import sft
from common import fail, pipeline, tasks
from common.figures import figure
from common.files import check_writable, write_jsonl
from common.settings import (
    parse, require, require_numbers, run_folder, settings)
from common.statistics import mean_se
from common.training import (
    Device, device, generator, set_lr, use_device, warmup_cosine)
from model import GPT, GPTConfig, Samples, generate, response_mask

METHODS = ("cloning", "on-policy")
BATCH_SIZE = 32  # responses a step
WARMUP = 50  # steps
WEIGHT_DECAY = 0.1
SHOWN = 60  # tokens of a response whose KL is kept


@settings
class Config:
    dataset: str = "reviews"  # Task: a folder of data/.
    preset: str = "cpu"  # Kind of machine that the task's sizes are meant for.
    sft: str = ""  # Run folder of the teacher, if not runs/<dataset>/sft.

    # ---- the algorithm
    responses: int = 8000  # Responses that the teacher labels, in all rounds together.
    iterations: int = 4  # Rounds of sampling and training.
    steps: int = 800  # Optimizer steps, in all rounds together.
    lr: float = 4e-3  # Peak learning rate.

    # ---- the experiment
    seeds: int = 3  # Students of each method, over which standard errors are computed.
    seed: int = 0  # First seed: of the initial weights and of the samples.
    device: Device = "auto"  # Where it is computed; auto = CUDA where there is one, else the CPU.
    out: str = ""  # Folder for rows and figure, if not distill, with the settings that are no
    # defaults, beside the teacher.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="responses iterations steps lr seeds", from_0="seed")
        require(self.responses <= 10**6, f"--responses {self.responses}: must be at most 10^6")
        require(2 <= self.seeds <= 1000, f"--seeds {self.seeds}: must be from 2 to 1000")
        for name in ("responses", "steps"):
            value = getattr(self, name)
            require(value >= self.iterations, f"--{name} {value}: must be at least one for each of "
                    f"the {self.iterations} rounds")
        self.out = self.out or run_folder(self, "distill")


# ---- the student ---------------------------------------------------------------------------------

def student_of(teacher: GPTConfig, seed: int) -> GPT:
    """A GPT of half the teacher's channels and heads, with random weights."""
    torch.manual_seed(seed)
    heads = max(1, teacher.n_head // 2)
    sizes = dataclasses.replace(teacher, n_embd=teacher.n_embd // 2, n_head=heads)
    return GPT(sizes).to(device())


def on_device(samples: Samples, rows: torch.Tensor) -> Samples:
    """Some of the responses, on the device."""
    return Samples(samples.tokens[rows].to(device()), samples.prompt_lengths[rows].to(device()),
                   samples.lengths[rows].to(device()), None)


def response_logits(model: GPT, samples: Samples) -> torch.Tensor:
    """Logits (N, V), fp32, of the N response tokens, row after row."""
    mask = response_mask(samples.prompt_lengths, samples.lengths)
    rows, r = mask.nonzero(as_tuple=True)  # (N,) each
    place = samples.prompt_lengths[rows] + r  # where in its row the token stands
    hidden = model.hidden(samples.tokens[:, :int(samples.lengths.max())])  # (B, T, C)
    return F.linear(hidden[rows, place - 1], model.wte.weight).float()


def distill(config: Config, start: pipeline.Start, method: str, seed: int) -> GPT:
    """Train one student."""
    teacher, tokenizer = start.ref, start.tokenizer
    student = student_of(teacher.config, seed)
    optimizers = sft.optimizers_for(student, config.lr, WEIGHT_DECAY)
    prompts = tasks.prompts(config.dataset, "train")
    prompt_ids = [[tokenizer.bos] + ids for ids in tokenizer.encode_batch(prompts)]
    per_round = config.responses // config.iterations
    rounds: list[Samples] = []  # D
    bar = tqdm(total=config.steps, desc=f"{method}, seed {seed}")
    for i in range(config.iterations):
        # 1) the teacher writes in the first round; then the student, if it is to learn on-policy
        author = teacher if method == "cloning" or i == 0 else student
        draw = generator(seed, 2, i)
        rows = torch.randint(len(prompts), (per_round,), generator=draw).tolist()
        written = generate(author, [prompt_ids[row] for row in rows], teacher.config.block_size,
                           tokenizer.eos, tokenizer.pad, draw)

        # 2) these responses are added to those of all earlier rounds; their labels, a whole
        #    distribution for each token, are computed where they are used
        rounds.append(written)

        # 3) train on all of them, from where the last round ended
        first = config.steps * i // config.iterations
        end = config.steps * (i + 1) // config.iterations
        for step in range(first, end):
            draw = generator(seed, 1, step)
            source = rounds[int(torch.randint(len(rounds), (), generator=draw))]
            batch = on_device(source, torch.randint(per_round, (BATCH_SIZE,), generator=draw))
            with torch.no_grad():
                label = F.softmax(response_logits(teacher, batch), 1)  # (N, V)

            # the mean over tokens of KL(teacher || student), up to the teacher's own entropy
            loss = F.cross_entropy(response_logits(student, batch), label)
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0).item()
            if not math.isfinite(grad_norm + loss.item()):
                fail(f"step {step}: loss {loss.item()}, gradient norm {grad_norm}: not finite; is "
                     f"--lr {config.lr} too large?")
            set_lr(optimizers, config.lr * warmup_cosine(step, config.steps, WARMUP))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            bar.update()
    bar.close()
    return student


# ---- how far is it from the teacher? -------------------------------------------------------------

@torch.no_grad()
def kl_by_position(student: GPT, teacher: GPT, samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    """KL(student || teacher) at every position of the student's own responses, in nats.

    Returns:
        its mean over the responses that have this token, (R,); the share of those that have it,
        (R,). The sum of share times mean is the KL of whole responses.
    """
    mask = response_mask(samples.prompt_lengths, samples.lengths)  # (B, R)
    total = torch.zeros(mask.shape[1], dtype=torch.float64)
    for rows in torch.arange(len(mask)).split(64):
        part = on_device(samples, rows)
        log_p = F.log_softmax(response_logits(student, part), 1)  # (N, V)
        log_q = F.log_softmax(response_logits(teacher, part), 1)
        kl = (log_p.exp() * (log_p - log_q)).sum(1)  # (N,)
        _, position = response_mask(part.prompt_lengths, part.lengths).nonzero(as_tuple=True)
        total.index_add_(0, position.cpu(), kl.cpu().double())
    count = mask.sum(0)
    return (total / count).numpy(), (count / len(mask)).numpy()


def measure(student: GPT, start: pipeline.Start, seed: int) -> dict:
    """KL to the teacher and gold reward, on the student's own responses to test prompts."""
    tokenizer, prompts = start.tokenizer, start.bank.prompts
    policy = evaluate.sample_policy(student, start.ref, tokenizer, prompts, start.gold, samples=4)
    prompt_ids = [[tokenizer.bos] + ids for ids in tokenizer.encode_batch(prompts)]
    own = generate(student, prompt_ids * 8, student.config.block_size, tokenizer.eos, tokenizer.pad,
                   generator(seed, 3))
    kl, alive = kl_by_position(student, start.ref, own)
    return {"kl": float((kl * alive).sum()), "kl_sampled": policy.kl.mean().item(),
            "reward": policy.rewards.mean().item(),
            "teacher_reward": start.bank.rewards.mean().item(),
            "kl_by_position": [round(float(x), 5) for x in kl[:SHOWN]],
            "alive": [round(float(x), 5) for x in alive[:SHOWN]]}


# ---- the experiment ------------------------------------------------------------------------------

def print_table(rows: list[dict], config: Config) -> None:
    print("\nKL(student || teacher) on the student's own responses, nats; "
          f"{config.responses} labelled responses, {config.seeds} seeds\n")
    print(f"{'':10}{'a response':>18}{'at tokens 1-10':>18}{'at 21-30':>18}{'gold reward':>18}"
          f"   (teacher {rows[0]['teacher_reward']:.3f})")
    for method in METHODS:
        of_method = [row for row in rows if row["method"] == method]
        columns = [[row["kl"] for row in of_method],
                   [np.mean(row["kl_by_position"][:10]) for row in of_method],
                   [np.mean(row["kl_by_position"][20:30]) for row in of_method],
                   [row["reward"] for row in of_method]]
        line = f"{method:10}"
        for column in columns:
            mean, error = mean_se(column)
            line += f"{mean:10.3f} ± {error:.3f}"
        print(line)


def draw(rows: list[dict], path: Path) -> None:
    """KL at every position of the student's own responses, and summed up to it."""
    with figure(path, 2, width=5) as (_, axes):
        for method in METHODS:
            of_method = [row for row in rows if row["method"] == method]
            # as far as a tenth of every student's responses go
            size = min(int((np.array(row["alive"]) > 0.1).sum()) for row in of_method)
            kl = np.array([row["kl_by_position"][:size] for row in of_method])  # (seeds, size)
            alive = np.array([row["alive"][:size] for row in of_method])
            tokens = range(1, size + 1)
            for axis, values in zip(axes, (kl, (kl * alive).cumsum(1))):
                mean, error = mean_se(values, axis=0)
                axis.plot(tokens, mean, label=method)
                axis.fill_between(tokens, mean - error, mean + error, alpha=0.2)
        axes[0].set(ylabel=r"KL(student $\|$ teacher), nats", title="at the token")
        axes[1].set(title="of the response so far")
        for axis in axes:
            axis.set(xlabel="token of the student's own response")
            axis.legend()


def main(config: Config) -> None:
    """Train all students, measure them, write the rows and the figure, and print the table."""
    use_device(config.device)
    folder = Path(config.out)
    check_writable(folder)
    pipeline.require_gold(config.dataset)
    teacher = pipeline.sft_policy(config.sft, config.dataset, config.preset)
    start = pipeline.load(teacher, config.dataset, config.preset)
    start.ref.requires_grad_(False)
    start.gold = pipeline.gold_reward(start)
    start.bank = pipeline.sample_bank(start)

    rows = []
    for seed in range(config.seed, config.seed + config.seeds):
        for method in METHODS:
            student = distill(config, start, method, seed)
            rows.append({"method": method, "seed": seed, "responses": config.responses,
                         **measure(student, start, seed)})
    write_jsonl(folder / "results.jsonl", rows)
    draw(rows, folder / "figure.png")
    print_table(rows, config)
    print(f"\nrows and figure  ->  {folder}")


if __name__ == "__main__":
    main(parse(Config, __doc__))
