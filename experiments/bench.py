"""How fast is a step? A JSON line each for the SFT, reward-model and DPO step, generation, a PPO
update, Bradley-Terry fits and DAgger; and what padding costs where prompts are of many lengths.

    python experiments/bench.py                                  # all of them
    python experiments/bench.py --only ppo --batch 64
    python experiments/bench.py --only dpo --processes 2         # and as torchrun runs it
    python experiments/bench.py --only dpo --layers 6 --heads 6 --embd 384 --dtype bfloat16

Every step is the whole of it (forward, loss, backward, gradient clipping, optimizer), on random
tokens of one length, with the functions that the scripts train with.

    ms_median, ms_p10   milliseconds of a step: the median, and the tenth percentile
    tokens_per_s        positions through the model. DPO and the reward model have two responses in
                        a pair; generation and PPO count new tokens only. A PPO update samples
                        `batch` responses, scores them with policy, reference, reward model and
                        value network, and makes four passes over them.
    peak_share          the step's floating-point operations, over what this machine's best matrix
                        product does in that time and dtype. The head is counted at every position,
                        although only responses need it.
    other_cpu           cores that other processes kept busy meanwhile. A line with more than 0.1
                        says nothing.
    real_share          (padding) share of the computed positions that hold a token
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, for the imports below

import common  # first, so that Ctrl-C while torch is imported is one line, too

import dataclasses
import json
import math
import os
import statistics
import subprocess
import time
from typing import Any, Callable, Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn

import bt
import dagger
from common.processes import WORLD, add_gradients, agree, mine, share
from common.settings import changed, command, parse, require, require_numbers, settings
from common.training import adamw, autocast, batches, device, pad
from dpo import dpo_loss
from model import GPT, GPTConfig, ScalarModel, generate, response_logprobs, response_mask
from ppo import compute_gae, compute_rewards, policy_loss, response_values, value_loss, whiten
from reward_model import reward_loss
from sft import optimizers_for

NO_EOS = -1  # an <eos> that is never sampled: every response has its full length
PPO_PASSES = 4
Bench = Literal["all", "sft", "reward_model", "dpo", "generate", "ppo", "padding", "bt", "dagger"]
OWN_SIZES = ("padding", "bt", "dagger")  # those that --threads changes, and no other setting

@settings
class Config:
    only: Bench = "all"  # Run one of them.

    # ---- the model
    layers: int = 4  # Blocks.
    heads: int = 4  # Attention heads.
    embd: int = 128  # Channels.
    vocab: int = 4096  # Tokens of the vocabulary.

    # ---- a step
    batch: int = 16  # Pairs, or rows.
    prompt: int = 16  # Tokens of a prompt.
    comp: int = 48  # Tokens of a response.

    # ---- how it is measured
    steps: int = 60  # Timed steps, after five that are not; a tenth for generation and PPO.
    threads: int = 0  # CPU threads; 0 = as many as torch takes.
    processes: int = 1  # Time the step once more with its rows shared by so many processes, which
    # also share the threads.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # Number format of matrix products;
    # auto = bfloat16 on CUDA.
    compile: bool = False  # Use torch.compile on the models.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="layers heads embd vocab batch prompt comp steps processes",
                        from_0="threads")
        require(self.embd % self.heads == 0,
                f"--embd {self.embd}: must be a multiple of --heads {self.heads}")
        require(self.batch % self.processes == 0,
                f"--batch {self.batch}: must be a multiple of --processes {self.processes}")
        for name in changed(self):
            require(self.only not in OWN_SIZES or name in ("only", "threads"),
                    f"--{name}: not with --only {self.only}, which has sizes of its own")


# ---- measuring -----------------------------------------------------------------------------------

def synchronize() -> None:
    """Wait for the GPU, which works while Python goes on."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def busy_seconds() -> float:
    """CPU seconds that all processes of this machine have used; 0 where no file tells."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
    except OSError:
        return 0.0
    idle, waiting_for_disk = ticks[3], ticks[4]
    return (sum(ticks) - idle - waiting_for_disk) / os.sysconf("SC_CLK_TCK")


def measure(work: Callable[[], object], steps: int, warmup: int) -> dict[str, float]:
    """Median and tenth-percentile milliseconds of work(), and the cores that others used."""
    for _ in range(warmup):
        work()
    synchronize()
    times = []
    start, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
    for _ in range(steps):
        begin = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - begin)
    seconds = time.perf_counter() - start
    ours = torch.tensor(time.process_time() - own)
    share(ours)  # of all processes
    others = busy_seconds() - busy - ours.item()
    return {"ms_median": 1e3 * statistics.median(times),
            "ms_p10": 1e3 * sorted(times)[len(times) // 10],
            "other_cpu": max(0.0, others / seconds)}


def matmul_peak(dtype: str) -> float:
    """The machine's best matrix product of three sizes, in operations per second."""
    bfloat16 = dtype == "bfloat16" or (dtype == "auto" and device().type == "cuda")
    best = 0.0
    for n in (1024, 2048, 4096):
        a = torch.randn(n, n, device=device(), dtype=torch.bfloat16 if bfloat16 else torch.float32)
        b = torch.randn_like(a)
        seconds = measure(lambda: a @ b, steps=5, warmup=2)["ms_p10"] / 1e3
        best = max(best, 2 * n**3 / seconds)
    return best


def show(bench: str, measured: dict[str, float], **more: Any) -> None:
    """One JSON line."""
    rounded = {name: round(value, 2) for name, value in measured.items()}
    line = {"bench": bench, **rounded, **more, "threads": torch.get_num_threads(),
            "processes": WORLD}
    print(json.dumps(line), flush=True)


# ---- the steps of the language models ------------------------------------------------------------

class Rows(NamedTuple):
    """2 B random rows of one length. Row B + i has the prompt of row i, as in a pair."""
    tokens: torch.Tensor  # (2 B, T)
    prompt_lengths: torch.Tensor  # (2 B,)
    lengths: torch.Tensor  # (2 B,)

    def first(self, n: int) -> Rows:
        return Rows(self.tokens[:n], self.prompt_lengths[:n], self.lengths[:n])


class Timed(NamedTuple):
    """A step, and how much it is."""
    step: Callable[[], object]
    tokens: int  # positions that count
    flop: float  # floating-point operations
    unit: str = "rows"  # what --batch is a number of
    slow: bool = False  # a tenth of the steps is enough


def random_rows(config: Config, share: int = 1) -> Rows:
    """Of a batch; or, of a batch that so many processes share, those of one process."""
    B, T = config.batch // share, config.prompt + config.comp
    tokens = torch.randint(0, config.vocab, (2 * B, T), device=device())
    tokens[B:, :config.prompt] = tokens[:B, :config.prompt]
    prompt_lengths = torch.full((2 * B,), config.prompt, device=device())
    return Rows(tokens, prompt_lengths, torch.full((2 * B,), T, device=device()))


def new(kind: type, config: Config) -> nn.Module:
    """A GPT or ScalarModel of random weights."""
    T = config.prompt + config.comp
    sizes = GPTConfig(config.vocab, T, config.layers, config.heads, config.embd)
    return kind(sizes).to(device())


def operations(config: Config) -> tuple[float, float]:
    """Of a forward pass, for each position: those of the blocks, and those of the head."""
    T = config.prompt + config.comp
    matrices = 2 * 12 * config.layers * config.embd**2
    attention = 2 * config.layers * T * config.embd  # each position sees half of T on average
    return matrices + attention, 2 * config.vocab * config.embd


def compiled(function: Callable, config: Config) -> Callable:
    return torch.compile(function) if config.compile else function


def training_step(config: Config, model: nn.Module, optimizers: list[torch.optim.Optimizer],
                  loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Forward, backward, clipping and optimizer, as in every training loop."""
    def step() -> None:
        with autocast(config.dtype):
            value = loss()
        value.backward()
        add_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return step


def adamw_of(model: nn.Module) -> torch.optim.Optimizer:
    return adamw(model, 1e-4, 0.0, (0.9, 0.95))


def sft(config: Config) -> Timed:
    rows = random_rows(config, WORLD).first(config.batch // WORLD)
    model = new(GPT, config)
    logprobs_of = compiled(response_logprobs, config)

    def loss() -> torch.Tensor:
        return -logprobs_of(model, *rows).sum() / (config.batch * config.comp)

    blocks, head = operations(config)
    return Timed(training_step(config, model, optimizers_for(model, 1e-4, 0.1), loss),
                 tokens=WORLD * rows.tokens.numel(),
                 flop=3 * rows.tokens.numel() * (blocks + head))  # backward is twice forward


def reward_model(config: Config) -> Timed:
    rows = random_rows(config, WORLD)
    model = new(ScalarModel, config)
    score = compiled(model.score, config)

    def loss() -> torch.Tensor:
        chosen, rejected = score(rows.tokens, rows.lengths).view(2, -1)
        return reward_loss(chosen, rejected).mean()

    blocks, _ = operations(config)
    return Timed(training_step(config, model, [adamw_of(model)], loss),
                 tokens=WORLD * rows.tokens.numel(),
                 flop=3 * rows.tokens.numel() * blocks,
                 unit="pairs")


def dpo(config: Config) -> Timed:
    rows = random_rows(config, WORLD)
    model = new(GPT, config)
    logprobs_of = compiled(response_logprobs, config)
    # those of the reference are computed before training
    reference = torch.full((2, config.batch // WORLD), -8.0 * config.comp, device=device())

    def loss() -> torch.Tensor:
        chosen, rejected = logprobs_of(model, *rows).sum(1).view(2, -1)
        return dpo_loss(chosen, rejected, reference[0], reference[1], beta=0.1)[0].mean()

    blocks, head = operations(config)
    return Timed(training_step(config, model, [adamw_of(model)], loss),
                 tokens=WORLD * rows.tokens.numel(),
                 flop=3 * rows.tokens.numel() * (blocks + head),
                 unit="pairs")


def sampling(config: Config) -> Timed:
    prompts = random_rows(config).first(config.batch).tokens[:, :config.prompt].tolist()
    model = new(GPT, config).eval()
    draw = torch.Generator().manual_seed(0)

    def step() -> None:
        with autocast(config.dtype):
            generate(model, prompts, model.config.block_size, NO_EOS, 0, draw)

    blocks, head = operations(config)
    positions = config.batch * (config.prompt + config.comp)
    return Timed(step, config.batch * config.comp, positions * (blocks + head), slow=True)


def ppo(config: Config) -> Timed:
    """An update as ppo.py makes it: sample, score, several passes over the batch."""
    prompts = random_rows(config).first(config.batch).tokens[:, :config.prompt].tolist()
    policy, ref = new(GPT, config), new(GPT, config)
    value, reward = new(ScalarModel, config), new(ScalarModel, config)
    optimizers = {policy: adamw_of(policy), value: adamw_of(value)}
    logprobs_of = compiled(response_logprobs, config)
    values_of = compiled(response_values, config)
    score = compiled(reward.score, config)
    draw = torch.Generator().manual_seed(0)

    def step() -> None:
        # roll out, and score with all four networks
        with torch.no_grad(), autocast(config.dtype):
            samples = generate(policy, prompts, policy.config.block_size, NO_EOS, 0, draw)
            of_mine = mine(torch.arange(config.batch))
            inputs = Rows(samples.tokens[of_mine].to(device()),
                          samples.prompt_lengths[of_mine].to(device()),
                          samples.lengths[of_mine].to(device()))
            old_logprobs = logprobs_of(policy, *inputs)
            ref_logprobs = logprobs_of(ref, *inputs)
            old_values = values_of(value, *inputs)
            scores = score(inputs.tokens, inputs.lengths)

        # advantages
        mask = response_mask(inputs.prompt_lengths, inputs.lengths)
        rewards = compute_rewards(scores, old_logprobs, ref_logprobs, mask, beta=0.05)
        advantages, returns = compute_gae(rewards, old_values, mask, gamma=1.0, lam=0.95)
        advantages = whiten(advantages, mask)

        # passes over the batch
        for _ in range(PPO_PASSES):
            with autocast(config.dtype):
                logprobs = logprobs_of(policy, *inputs)
                values = values_of(value, *inputs)
            policy_losses, _ = policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2)
            value_losses = value_loss(values, old_values, returns, mask, clip=0.2)
            ((policy_losses.sum() + value_losses.sum()) / mask.sum()).backward()
            add_gradients(*optimizers)
            for network, optimizer in optimizers.items():
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0).item()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    blocks, head = operations(config)
    positions = config.batch * (config.prompt + config.comp)
    sampled_and_scored = 5 * blocks + 3 * head
    trained = PPO_PASSES * 3 * (2 * blocks + head)
    return Timed(step, config.batch * config.comp, positions * (sampled_and_scored + trained),
                 unit="episodes", slow=True)


STEPS = {"sft": sft, "reward_model": reward_model, "dpo": dpo, "generate": sampling, "ppo": ppo}


def time_step(name: str, config: Config, peak: float) -> None:
    """Build a bench, time it, and show its line."""
    torch.manual_seed(0)
    bench = STEPS[name](config)
    if bench.slow:
        measured = measure(bench.step, max(5, config.steps // 10), warmup=2)
    else:
        measured = measure(bench.step, config.steps, warmup=5)
    per_second = 1e3 / measured["ms_median"]
    sizes = {key: getattr(config, key) for key in ("layers", "heads", "embd", "vocab", "batch",
                                                   "prompt", "comp", "dtype", "compile")}
    show(name, measured, **{
        "tokens_per_s": round(bench.tokens * per_second),
        f"{bench.unit}_per_s": round(config.batch * per_second, 1),
        "peak_share": round(bench.flop * per_second / peak, 3),
        "peak_gflops": round(peak / 1e9)}, **sizes, torch=torch.__version__)


# ---- what padding costs --------------------------------------------------------------------------

PADDED = GPTConfig(vocab_size=1024, block_size=224, n_layer=2, n_head=4, n_embd=128)
PADDED_EOS = 1023
RESPONSE = 28  # tokens on average


def padding() -> None:
    """Rows as `posts` has them: prompts of 72 to 148 tokens, responses of about 28. Training on
    batches of similar lengths and on random ones; sampling to these prompts, and to as many of one
    length."""
    torch.manual_seed(0)
    model = padded_model()
    draw = torch.Generator().manual_seed(0)
    prompt_lengths = torch.randint(72, 149, (4096,), generator=draw)
    lengths = prompt_lengths + torch.randint(12, 45, (4096,), generator=draw)
    rows = Rows(pad([torch.ones(n, dtype=torch.long) for n in lengths.tolist()], 0)[0],
                prompt_lengths, lengths)

    similar = batches(lengths, 32, seed=0)
    time_padded_training("train on batches of similar lengths", model, rows, lambda: next(similar))
    time_padded_training("train on batches of random", model, rows,
                         lambda: torch.randperm(4096, generator=draw)[:32])
    time_padded_sampling("sample from prompts of 72 to 148 tokens", model,
                         prompt_lengths[:1024].tolist(), draw)
    time_padded_sampling("sample from prompts of 110 tokens", model, [110] * 1024, draw)


def padded_model() -> GPT:
    """The same logits at every position, which end a response with probability 1 / RESPONSE."""
    model = GPT(PADDED).to(device())
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        model.wte.weight.zero_()
        others = PADDED.vocab_size - 1
        model.wte.weight[PADDED_EOS] = math.log(others / (RESPONSE - 1)) / PADDED.n_embd
    return model


class Positions:
    """How many positions were computed, and how many of them held a token, in all calls."""

    def __init__(self) -> None:
        self.real, self.computed, self.calls = 0, 0, 0

    def show(self, work: str, measured: dict[str, float]) -> None:
        per_call = self.real / self.calls
        show("padding", {**measured}, work=work, real_share=round(self.real / self.computed, 3),
             real_tokens_per_s=round(1e3 * per_call / measured["ms_median"]),
             torch=torch.__version__)


def time_padded_training(work: str, model: GPT, rows: Rows,
                         next_batch: Callable[[], torch.Tensor]) -> None:
    seen = Positions()

    def step() -> None:
        batch = next_batch()
        part = Rows(*(column[batch].to(device()) for column in rows))
        response_logprobs(model, *part).sum().backward()
        seen.real += int(part.lengths.sum())
        seen.computed += len(batch) * int(part.lengths.max())
        seen.calls += 1

    seen.show(work, measure(step, steps=40, warmup=3))


def time_padded_sampling(work: str, model: GPT, prompt_lengths: list[int],
                         draw: torch.Generator) -> None:
    prompts = [[1] * n for n in prompt_lengths]
    seen = Positions()
    hidden = model.hidden

    def counted(tokens: torch.Tensor, *cache: Any) -> torch.Tensor:
        seen.computed += tokens.numel()
        return hidden(tokens, *cache)

    def step() -> None:
        samples = generate(model, prompts, PADDED.block_size, PADDED_EOS, 0, draw)
        seen.real += int((samples.lengths - 1).sum())  # nothing is computed from the last token
        seen.calls += 1

    model.hidden = counted
    seen.show(work, measure(step, steps=3, warmup=1))
    del model.hidden


# ---- without a language model --------------------------------------------------------------------

def bradley_terry() -> None:
    """From two lists, winners and losers, to strengths with their covariance; and 1,000 bootstrap
    resamples of the smaller one."""
    for items, comparisons in ((100, 100_000), (1000, 1_000_000)):
        winners, losers = simulated_comparisons(items, comparisons)
        measured = measure(lambda: bt.fit(bt.count(winners, losers, items)), steps=10, warmup=1)
        if items == 100:
            wins = bt.count(winners, losers, items)
            bootstrap = measure(lambda: bt.bootstrap(wins, resamples=1000), steps=1, warmup=0)
            measured["bootstrap_s"] = bootstrap["ms_median"] / 1e3
        show("bt", measured, items=items, comparisons=comparisons)


def simulated_comparisons(items: int, comparisons: int) -> tuple[list[int], list[int]]:
    """Winners and losers, drawn from a Bradley-Terry model with normal strengths."""
    rng = np.random.default_rng(0)
    strengths = rng.normal(size=items)
    left = rng.integers(0, items, comparisons)
    right = (left + rng.integers(1, items, comparisons)) % items  # another item
    left_wins = rng.random(comparisons) < 1 / (1 + np.exp(strengths[right] - strengths[left]))
    return np.where(left_wins, left, right).tolist(), np.where(left_wins, right, left).tolist()


def imitation() -> None:
    """DAgger's whole loop: roll out, label, aggregate, train, validate."""
    road = dagger.Track()
    # name -> what is run, its labels, and the steps of the validation: rounds x drivers x steps
    tasks = {"bridge": (bridge_once, 30_720, 10 * 200 * 256),
             "track": (lambda: track_once(road), 2960, 8 * 10 * road.lap)}
    for name, (work, labels, validation) in tasks.items():
        measured = measure(work, steps=5, warmup=1)
        per_second = 1e3 / measured["ms_median"]
        show("dagger", measured, task=name, labels_per_s=round(labels * per_second),
             steps_per_s=round((labels + validation) * per_second))


def bridge_once() -> None:
    expert_probs = dagger.schedule(dagger.Config(), "DAgger")
    dagger.dagger_on_bridge(dagger.Bridge(0), expert_probs, 256, 30_720)


def track_once(road: dagger.Track) -> None:
    expert_probs = dagger.schedule(dagger.Config(task="track"), "DAgger")
    dagger.dagger_on_track(road, expert_probs, 2960, np.random.default_rng(0))


# ---- main ----------------------------------------------------------------------------------------

def in_processes(config: Config) -> int:
    """The same bench by torchrun, with the threads shared out; its exit status."""
    threads = max(1, torch.get_num_threads() // config.processes)
    script, *flags = command(dataclasses.replace(config, threads=threads))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return subprocess.call([sys.executable, *launcher, str(config.processes),
                            str(common.ROOT / script), *flags])



def main(config: Config) -> None:
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.processes > 1 and WORLD == 1:
        main(dataclasses.replace(config, processes=1))
        raise SystemExit(in_processes(config))
    others = {"padding": padding, "bt": bradley_terry, "dagger": imitation}
    names = [*STEPS, *others] if config.only == "all" else [config.only]
    if WORLD > 1:
        names = [name for name in names if name in STEPS]
    peak = matmul_peak(config.dtype) if set(names) & set(STEPS) else 0.0
    for name in names:
        if name in STEPS:
            time_step(name, config, peak)
        else:
            others[name]()


if __name__ == "__main__":
    main(parse(Config, __doc__))
    if WORLD > 1:
        # in one run of five torch aborted while these processes were torn down, all measured and
        # printed: they end together, and at once
        agree(0)
        sys.stdout.flush()
        os._exit(0)
