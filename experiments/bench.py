"""How fast is a step? One JSON line each for the SFT, reward-model and DPO step, for generation, for a PPO update, for
Bradley-Terry fits and for DAgger; and what padding costs where prompts are long and of many lengths.

    python experiments/bench.py                                                       # all eight, the size of the table in results/bench
    python experiments/bench.py --only ppo --batch 64
    python experiments/bench.py --only dpo --layers 6 --heads 6 --embd 384 --dtype bfloat16

Every step is the whole of it: forward, loss, backward, gradient clipping, optimizer, on random tokens of fixed length,
with the functions that the scripts train with. A token is one position of one sequence through the model: a DPO or
reward-model step has 2 * batch * (prompt + comp) of them, an SFT step batch * (prompt + comp), generation batch * comp new
ones. A PPO update samples `batch` responses, scores them, and makes four passes over them, with separate networks for
policy, reference, reward and value; its tokens are the new ones. `peak_share` is the nominal floating-point work (the head
counted at every position, although only responses need it) over the machine's matrix-product peak, measured here in the
same dtype. In `padding`, `real_share` is the share of the computed positions that hold a token. `other_cpu` is how many cores
other processes kept busy meanwhile: a line with more than 0.1 says nothing.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path
import sys
import os
import statistics
import time
from typing import Callable

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, for the imports below

import bt
import dagger
from common.training import adamw, autocast, batches, device, pad
from dpo import dpo_loss
from model import GPT, GPTConfig, ScalarModel, generate, response_logprobs, response_mask
from ppo import compute_gae, compute_rewards, policy_loss, response_values, value_loss, whiten
from reward_model import reward_loss
from sft import optimizers_for


BENCHES = ["sft", "reward_model", "dpo", "generate", "ppo", "padding", "bt", "dagger"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=BENCHES, help="one of them")
    for name, value, text in (("layers", 4, "blocks"), ("heads", 4, "attention heads"), ("embd", 128, "channels"),
                              ("vocab", 4096, "size of the vocabulary"), ("batch", 16, "pairs, or rows"),
                              ("prompt", 16, "tokens of a prompt"), ("comp", 48, "tokens of a response"),
                              ("steps", 60, "timed steps, after 5 that are not; a tenth for generation and PPO"),
                              ("threads", torch.get_num_threads(), "CPU threads")):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} [{value}]")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto = bfloat16 on CUDA only")
    parser.add_argument("--compile", action="store_true", help="torch.compile the training steps")
    return parser.parse_args()


def synchronize() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def busy_seconds() -> float:
    """CPU seconds that all processes of this machine have used; 0 where the system does not tell."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(x) for x in file.readline().split()[1:9]]
    except OSError:
        return 0.0
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def measure(work: Callable[[], object], steps: int, warmup: int) -> dict[str, float]:
    """Median and tenth-percentile milliseconds of work(), and the cores that others used meanwhile."""
    for _ in range(warmup):
        work()
    synchronize()
    times, start, busy, own = [], time.perf_counter(), busy_seconds(), time.process_time()
    for _ in range(steps):
        begin = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - begin)
    other = (busy_seconds() - busy - (time.process_time() - own)) / (time.perf_counter() - start)
    return {"ms_median": statistics.median(times) * 1e3, "ms_p10": sorted(times)[len(times) // 10] * 1e3,
            "other_cpu": max(0.0, other)}


def matmul_peak(dtype: str) -> float:
    """The machine's best matrix product, FLOP/s, over three sizes, in the dtype that the models run in."""
    kind = torch.bfloat16 if dtype == "bfloat16" or (dtype == "auto" and device().type == "cuda") else torch.float32
    best = 0.0
    for n in (1024, 2048, 4096):
        a, b = torch.randn(n, n, device=device()).to(kind), torch.randn(n, n, device=device()).to(kind)
        best = max(best, 2 * n**3 / measure(lambda: a @ b, 5, 2)["ms_p10"] * 1e3)
    return best


def bradley_terry() -> None:
    """From two lists, winners and losers, to strengths and their covariance; and 1,000 bootstrap resamples of the first."""
    for items, comparisons in ((100, 100_000), (1000, 1_000_000)):
        rng = np.random.default_rng(0)
        r, left = rng.normal(size=items), rng.integers(0, items, comparisons)
        right = (left + rng.integers(1, items, comparisons)) % items
        won = rng.random(comparisons) < 1 / (1 + np.exp(r[right] - r[left]))
        winners, losers = np.where(won, left, right).tolist(), np.where(won, right, left).tolist()
        result = measure(lambda: bt.fit(bt.count(winners, losers, items)), 10, 1)
        if items == 100:
            wins = bt.count(winners, losers, items)
            result["bootstrap_s"] = measure(lambda: bt.bootstrap(wins, resamples=1000), 1, 0)["ms_median"] / 1e3
        print(json.dumps({"bench": "bt", **{k: round(v, 2) for k, v in result.items()}, "items": items,
                          "comparisons": comparisons, "threads": torch.get_num_threads()}), flush=True)


def imitation() -> None:
    """DAgger whole: roll out, label, aggregate, train, validate. Labels a second, and environment steps (validation, too)."""
    road, on_road = dagger.Track(), dagger.Config(task="track")
    tasks = {"bridge": (lambda: dagger.Bridge(0).train(dagger.Config(), "DAgger", 256, 30_720), 30_720, 10 * 200 * 256),
             "track": (lambda: road.train(on_road, "DAgger", 2960, np.random.default_rng(0)), 2960, 8 * 10 * road.lap)}
    for name, (work, labels, validation) in tasks.items():
        result = measure(work, 5, 1)
        per_second = 1e3 / result["ms_median"]
        print(json.dumps({"bench": "dagger", "task": name, **{k: round(v, 2) for k, v in result.items()},
                          "labels_per_s": round(labels * per_second), "steps_per_s": round((labels + validation) * per_second),
                          "threads": torch.get_num_threads()}), flush=True)


def padding() -> None:
    """Rows as `posts` has them: prompts of 72 to 148 tokens, responses of about 28, a GPT of 2 layers and 128 channels.

    Training on batches of similar length and on random ones; sampling prompts of these lengths and of their mean length.
    """
    draw, eos = torch.Generator().manual_seed(0), 1023
    model = GPT(GPTConfig(1024, 224, 2, 4, 128)).to(device())
    with torch.no_grad():  # the same logits everywhere, which end a response with probability 1/28
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        model.wte.weight.zero_()[eos] = float(np.log(1023 / 27)) / 128
    n_prompts, n_rows = torch.randint(72, 149, (4096,), generator=draw), torch.randint(12, 45, (4096,), generator=draw)
    n_rows += n_prompts
    tokens = pad([torch.ones(n, dtype=torch.long) for n in n_rows.tolist()], 0)[0]
    by_length = batches(n_rows, 32, 0)
    orders = {"similar lengths": lambda: next(by_length), "random": lambda: torch.randperm(4096, generator=draw)[:32]}
    for name, order in orders.items():
        real, computed = [], []

        def step() -> None:
            rows = order()
            real.append(int(n_rows[rows].sum()))
            computed.append(len(rows) * int(n_rows[rows].max()))
            response_logprobs(model, *(x[rows].to(device()) for x in (tokens, n_prompts, n_rows))).sum().backward()
        report_padding("train on batches of " + name, measure(step, 40, 3), sum(real), sum(computed), len(real))
    for name, sizes in (("72 to 148 tokens", n_prompts[:1024]), ("110 tokens", torch.full((1024,), 110))):
        prompts, hidden, real, computed = [[1] * n for n in sizes.tolist()], model.hidden, [], []
        model.hidden = lambda x, *rest: computed.append(x.numel()) or hidden(x, *rest)

        def sample() -> None:
            real.append(int((generate(model, prompts, 224, eos, 0, draw).lengths - 1).sum()))
        report_padding("sample from prompts of " + name, measure(sample, 3, 1), sum(real), sum(computed), len(real))
        del model.hidden


def report_padding(work: str, result: dict[str, float], real: int, computed: int, calls: int) -> None:
    """`real` tokens among `computed` positions in all the `calls`, of which `measure` timed some."""
    print(json.dumps({"bench": "padding", "work": work, **{k: round(v, 2) for k, v in result.items()},
                      "real_share": round(real / computed, 3),
                      "real_tokens_per_s": round(real / calls * 1e3 / result["ms_median"]),
                      "threads": torch.get_num_threads(), "torch": torch.__version__}), flush=True)


def main(a: argparse.Namespace) -> None:
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    T = a.prompt + a.comp
    config = GPTConfig(a.vocab, T, a.layers, a.heads, a.embd)
    # multiplications and additions of a forward pass, a token: matrices, head, and attention over half of T on average
    flop = 2 * (12 * a.layers * a.embd**2) + 2 * a.layers * T * a.embd
    head = 2 * a.vocab * a.embd
    peak = matmul_peak(a.dtype)
    rows = torch.randint(0, a.vocab, (2 * a.batch, T), device=device())
    rows[a.batch:, :a.prompt] = rows[:a.batch, :a.prompt]  # chosen and rejected share their prompt
    prompt_lengths, lengths = (torch.full((2 * a.batch,), n, device=device()) for n in (a.prompt, T))
    reference = torch.full((2, a.batch), -a.comp * 8.0, device=device())

    def step(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], loss: Callable) -> None:
        with autocast(a.dtype):
            value = loss(model)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    logprobs = torch.compile(response_logprobs) if a.compile else response_logprobs
    score = torch.compile(ScalarModel.score) if a.compile else ScalarModel.score
    values_of = torch.compile(response_values) if a.compile else response_values

    def sft_loss(model: GPT) -> torch.Tensor:
        half = slice(0, a.batch)
        return -logprobs(model, rows[half], prompt_lengths[half], lengths[half]).sum() / (a.batch * a.comp)

    def dpo(model: GPT) -> torch.Tensor:
        return dpo_loss(*logprobs(model, rows, prompt_lengths, lengths).sum(1).view(2, -1), *reference, 0.1)[0].mean()

    def pairwise(model: ScalarModel) -> torch.Tensor:
        return reward_loss(*score(model, rows, lengths).view(2, -1)).mean()

    def ppo(policy: GPT, ref: GPT, value: ScalarModel, reward: ScalarModel, optimizers: list[torch.optim.Optimizer],
            prompts: list[list[int]], draw: torch.Generator) -> None:
        """One update as ppo.py makes it: roll out, score, four passes over the batch."""
        with torch.no_grad(), autocast(a.dtype):
            samples = generate(policy, prompts, T, -1, 0, draw)  # -1: no EOS, every response has full length
            row = [x.to(device()) for x in samples[:3]]
            mask = response_mask(row[1], row[2])
            old, before, values = logprobs(policy, *row), logprobs(ref, *row), values_of(value, *row)
            scores = score(reward, row[0], row[2])
        advantages, returns = compute_gae(compute_rewards(scores, old, before, mask, 0.05), values, mask, 1.0, 0.95)
        advantages = whiten(advantages, mask)
        for _ in range(4):
            with autocast(a.dtype):
                new, new_values = logprobs(policy, *row), values_of(value, *row)
            losses = policy_loss(new, old, advantages, mask, 0.2)[0] + value_loss(new_values, values, returns, mask, 0.2)
            (losses.sum() / mask.sum()).backward()
            for network, optimizer in zip((policy, value), optimizers):
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0).item()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    benches = {"sft": (GPT, sft_loss, 1, head), "reward_model": (ScalarModel, pairwise, 2, 0), "dpo": (GPT, dpo, 2, head)}
    units = {"dpo": "pairs_per_s", "reward_model": "pairs_per_s", "ppo": "episodes_per_s"}
    for name in [a.only] if a.only else BENCHES:
        if name in ("padding", "bt", "dagger"):
            {"padding": padding, "bt": bradley_terry, "dagger": imitation}[name]()
            continue
        if name == "generate":
            model, draw = GPT(config).to(device()).eval(), torch.Generator().manual_seed(0)
            prompts = rows[:a.batch, :a.prompt].tolist()
            with autocast(a.dtype):
                result = measure(lambda: generate(model, prompts, T, -1, 0, draw), max(5, a.steps // 10), 2)  # -1: no EOS
            tokens, work = a.batch * a.comp, a.batch * T * (flop + head)
        elif name == "ppo":
            networks = [kind(config).to(device()) for kind in (GPT, GPT, ScalarModel, ScalarModel)]
            optimizers = [adamw(network, 1e-4, 0.0, (0.9, 0.95)) for network in networks[::2]]
            draw = torch.Generator().manual_seed(0)
            prompts = rows[:a.batch, :a.prompt].tolist()
            result = measure(lambda: ppo(*networks, optimizers, prompts, draw), max(5, a.steps // 10), 2)
            # sampled once, scored by four networks, four passes of forward and backward of two
            tokens, work = a.batch * a.comp, a.batch * T * (5 * flop + 3 * head + 12 * (2 * flop + head))
        else:
            kind, loss, sequences, head_flop = benches[name]
            model = kind(config).to(device())
            optimizers = optimizers_for(model, 1e-4, 0.1) if name == "sft" else [adamw(model, 1e-4, 0.0, (0.9, 0.95))]
            result = measure(lambda: step(model, optimizers, loss), a.steps, 5)
            tokens = sequences * a.batch * T
            work = 3 * tokens * (flop + head_flop)
        per_second = 1e3 / result["ms_median"]
        line = {"bench": name, **{k: round(v, 2) for k, v in result.items()}, "tokens_per_s": round(tokens * per_second),
                units.get(name, "rows_per_s"): round(a.batch * per_second, 1),
                "peak_share": round(work * per_second / peak, 3), "peak_gflops": round(peak / 1e9),
                "layers": a.layers, "heads": a.heads, "embd": a.embd, "vocab": a.vocab, "batch": a.batch, "prompt": a.prompt,
                "comp": a.comp, "dtype": a.dtype, "compile": a.compile, "threads": a.threads, "torch": torch.__version__}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(arguments())
