"""How much memory does a run take, and what do several devices cost? Computed; --measure checks it.

    python experiments/memory.py                  # the tables of docs/machines.md
    python experiments/memory.py --measure dpo    # one JSON line: computed beside measured, on a
                                                  # CPU; ten seconds

A run has phases, and needs as much as the largest of them:

    start      all networks, whole on every device, with --shard, too
    training   weights, gradients, optimizer state; and, whichever is larger, what backward needs of
               a micro-batch or the one message in which gradients are added up
    scoring    log-probabilities of SCORED rows at once, without gradient
    sampling   the cache of keys and values of SAMPLED rows, over all devices

Gradients are there from the second micro-batch of a step on; a step of one takes less.

Left out: the CUDA context, its libraries and NCCL; holes in the allocator; tokens, masks and all
else of a few bytes a position; Muon's products of one matrix; buffers of FSDP2, and that a weight
may not divide evenly.

Symbols, as in model.py: C channels, L layers, V vocabulary, T positions of a row.
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, for the imports below

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import json
from dataclasses import asdict
from typing import Callable, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from common.settings import changed, parse, require, require_numbers, settings
from common.training import adamw, autocast
from dpo import dpo_loss
from model import (GPT, GPTConfig, ScalarModel, at_once, generate, response_logprobs, response_mask,
                   summed_logprobs)
from ppo import policy_loss, response_values, value_loss

# at most, and fewer where a row takes much: model.at_once
SCORED = 256  # rows that summed_logprobs takes at once, on each device
SAMPLED = 1024  # rows that generate takes at once, shared by the devices
TRAINED = 16  # rows of a micro-batch in the tables, on each device: 8 pairs of DPO
PROMPT = 16  # of their tokens

MODELS = {
    "`reviews`": GPTConfig(1024, 80, 2, 4, 128),
    "GPT-2 124M": GPTConfig(50257, 256, 12, 12, 768),
    "GPT-2 355M": GPTConfig(50257, 256, 24, 16, 1024),
    "GPT-2 774M": GPTConfig(50257, 256, 36, 20, 1280),
    "GPT-2 1.5B": GPTConfig(50257, 256, 48, 25, 1600),
    "7B-like": GPTConfig(50257, 256, 32, 32, 4096),
}
CARDS = (16, 24, 80, 141)  # GB of a device
ALGORITHMS = ("sft", "dpo", "ppo")
Measured = Literal["none", "dpo", "ppo", "scoring", "sampling"]


@settings
class Config:
    measure: Measured = "none"  # Measure this phase, in place of printing the tables.

    # ---- the model that is measured
    layers: int = 5  # Blocks.
    heads: int = 6  # Attention heads.
    embd: int = 384  # Channels.
    vocab: int = 4096  # Tokens of the vocabulary.
    dtype: Literal["float32", "bfloat16"] = "float32"  # Number format of matrix products.

    # ---- the rows
    rows: int = 16  # Rows at once; a step of DPO or PPO has two such micro-batches.
    prompt: int = 16  # Tokens of a prompt.
    comp: int = 48  # Tokens of a response.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="layers heads embd vocab rows prompt comp")
        require(self.rows % 2 == 0, f"--rows {self.rows}: must be even, as DPO has pairs")
        require(self.measure != "none" or not changed(self), "sizes: need --measure")


# ---- memory --------------------------------------------------------------------------------------

def parameters(config: GPTConfig) -> dict[str, int]:
    """Parameters of a GPT: matrices of the blocks, their biases and LayerNorms, and the rest."""
    L, C = config.n_layer, config.n_embd
    return {
        "matrices": 12 * L * C * C,  # attention 3 + 1, MLP 4 + 4
        "vectors": 13 * L * C,  # biases 3 + 1 + 4 + 1, two LayerNorms of 2
        "rest": (config.vocab_size + config.block_size + 2) * C,  # embeddings, the last LayerNorm
    }


def optimizer_bytes(config: GPTConfig, algorithm: str) -> int:
    """Two moments of 4 bytes for AdamW, and 4 bytes a tensor for its count of steps; one momentum
    for what Muon trains in sft.py, the blocks' matrices. PPO's value network has C + 1 more."""
    count = parameters(config)
    total = sum(count.values())
    tensors = 12 * config.n_layer + 4
    if algorithm == "sft":
        return 8 * total - 4 * count["matrices"] + 4 * (tensors - 4 * config.n_layer)
    if algorithm == "dpo":
        return 8 * total + 4 * tensors
    return 8 * (2 * total + config.n_embd + 1) + 4 * (2 * tensors + 2)


def memory(config: GPTConfig, algorithm: str, devices: int = 1, shard: bool = False,
           rows: int = TRAINED, prompt: int = PROMPT, bfloat16: bool = True, scored: int = 0,
           sampled: int = 0) -> dict[str, float]:
    """Bytes on each device. Every row has block_size tokens, `prompt` of them the prompt's.

    Args:
        algorithm: sft, dpo, ppo.
        devices: data parallel; with `shard` each keeps a part of weights, gradients and states.
        rows: of a micro-batch, on each device.
        bfloat16: autocast, as on CUDA. Weights, gradients and states are fp32 all the same.
        scored, sampled: rows that are scored at once on a device, and sampled at once on all; 0 =
            as many as model.py takes.
    """
    count = parameters(config)
    total = sum(count.values())
    L, C, V, T = config.n_layer, config.n_embd, config.vocab_size, config.block_size
    scored = scored or at_once(SCORED, 2 * 4 * V * (T - prompt))
    sampled = sampled or at_once(SAMPLED, 2 * 4 * L * C * T)
    trained = {"sft": 1, "dpo": 1, "ppo": 2}[algorithm]  # networks; PPO's value network is one
    frozen = {"sft": 0, "dpo": 1, "ppo": 2}[algorithm]  # the reference; PPO's reward model
    part = devices if shard else 1  # what is sharded is divided by it
    whole = 1 if algorithm == "ppo" else 0  # networks that --shard leaves whole: the reward model
    found = {
        "weights": 4 * total * ((trained + frozen - whole) / part + whole),
        "gradients": 4 * total * trained / part,
        "optimizer": optimizer_bytes(config, algorithm) / part,
        "message": 4 * total * trained if devices > 1 and not shard else 0,
        # matrices in bfloat16, whole, which autocast keeps from forward to backward
        "casts": 2 * (count["matrices"] + V * C) if bfloat16 else 0,
        # FSDP2, while it trains: weights and gradients of what is no block; weights of two blocks
        # (the next one is fetched early), gradients of one
        "gathered": 4 * (2 * count["rest"] * trained + 3 * (total - count["rest"]) / L)
        if shard else 0,
    }
    # kept for backward, bytes for each position and layer: the inputs of two LayerNorms and what
    # these give (C each), queries, keys and values (3 C), what attention gives (C), the MLP's 4 C
    # before and after GELU. In bfloat16 only the LayerNorms' inputs have 4 bytes.
    kept = (2 * 4 + 14 * 2) * C if bfloat16 else 16 * 4 * C
    found["activations"] = rows * T * (L * kept + 4 * C)
    responses = rows * (T - prompt)  # tokens that the head is run on
    found["logits"] = 4 * V * responses  # fp32, one copy
    # backward begins with three copies of the logits, or with the gradients of the last block's
    # MLP: C of its output, 4 C before and after GELU
    first = rows * T * (4 + 8 * (2 if bfloat16 else 4)) * C
    found["backward"] = found["activations"] + max(3 * found["logits"], first)
    if algorithm == "ppo":  # the value network goes first; the policy's softmax has kept one copy
        found["casts"] *= 2
        found["backward"] = max(found["backward"],
                                2 * found["activations"] + found["logits"] + first)
    found["backward"] += found["casts"]

    base = found["weights"] + found["optimizer"]
    one = 4 * total if shard else 0  # to score or sample, --shard gathers one network
    cast = found["casts"] / trained
    block = (26 if bfloat16 else 40) * C  # without gradient: input, LayerNorm, the MLP's two
    each = sampled / devices  # rows that this device samples
    cache = each * T * 2 * L * C * (2 if bfloat16 else 4)
    found["start"] = 4 * total * (trained + frozen)
    found["training"] = base + found["gradients"] + max(found["message"],
                                                        found["backward"] + found["gathered"])
    found["scoring"] = base + one + cast + scored * max(T * block, 2 * 4 * V * (T - prompt))
    # beside the cache: the prompts; or three copies of the logits of one position; or, as soon as a
    # tenth of the rows has ended, a copy of the others
    found["sampling"] = base + one + cast + cache + max(each * prompt * block, each * 3 * 4 * V,
                                                        0.9 * cache)
    found["peak"] = max(found[phase] for phase in ("start", "training", "scoring", "sampling"))
    return found


def largest(algorithm: str, gigabytes: float, devices: int, shard: bool) -> str:
    """The largest of MODELS whose peak fits into a device of so many GB (1e9 bytes)."""
    fits = [name for name, config in MODELS.items()
            if memory(config, algorithm, devices, shard)["peak"] <= 1e9 * gigabytes]
    return fits[-1] if fits else "none"


# ---- time ----------------------------------------------------------------------------------------

def efficiency(count: float, devices: int, tokens: float, peak: float = 989e12,
               utilisation: float = 0.4, node: int = 8, within: float = 450e9,
               between: float = 50e9) -> dict[str, float]:
    """Share of the time that data-parallel devices compute, when nothing hides the all-reduce.

    step = 6 count tokens / (peak utilisation); the gradients are 4 bytes a parameter. Rings:
    inside a node, 2 (k-1)/k bytes / within; then every device all-reduces its k-th of them with its
    peers in the other m - 1 nodes, 2 (m-1)/m bytes / k / between. No latency, no congestion.

    Args:
        count: of parameters.
        tokens: of a device's share of a batch.
        peak: operations per second; H100 and H200 SXM, dense bfloat16.
        within, between: bytes per second and direction: NVLink, and one 400 Gb/s InfiniBand port
            for each device.
    Returns:
        step and reduce, in seconds; efficiency = step / (step + reduce).
    """
    k = min(node, devices)
    m = devices / k
    message = 4 * count
    step = 6 * count * tokens / (peak * utilisation)
    reduce = 2 * (k - 1) / k * message / within + 2 * (m - 1) / m * message / k / between
    return {"step": step, "reduce": reduce, "efficiency": step / (step + reduce)}


# ---- tables --------------------------------------------------------------------------------------

def digits(size: float) -> str:
    """Bytes with three digits: 13.1 MB, 1.99 GB."""
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB")
    return f"{float(f'{size / unit:.3g}'):g} {name}"


def table(header: str, rows: list[list[str]]) -> str:
    ruler = "|---" * (header.count("|") + 1) + "|"
    return "\n".join([f"| {header} |", ruler, *(f"| {' | '.join(row)} |" for row in rows)])


def memory_table() -> str:
    rows = []
    for name, config in MODELS.items():
        for algorithm in ("dpo", "ppo"):
            one = memory(config, algorithm)
            eight = memory(config, algorithm, devices=8)
            shared = memory(config, algorithm, devices=8, shard=True)
            cells = [one["weights"], one["gradients"], one["optimizer"], eight["message"],
                     one["activations"], one["logits"], one["training"], shared["training"],
                     one["scoring"], shared["scoring"], one["sampling"], shared["sampling"]]
            rows.append([name, algorithm, *map(digits, cells)])
    return table("model | | weights | gradients | optimizer | message | activations | logits | "
                 "training | 8, shard | scoring | 8, shard | sampling | 8, shard", rows)


def fits_table() -> str:
    """In a cell: the largest model whose every phase fits."""
    rows = []
    for algorithm in ("dpo", "ppo"):
        for devices, shard in ((1, False), (8, True)):
            cells = [largest(algorithm, card, devices, shard) for card in CARDS]
            rows.append([algorithm, "8, shard" if shard else "1", *cells])
    return table(" | devices | " + " | ".join(f"{card} GB" for card in CARDS), rows)


def efficiency_table() -> str:
    rows = []
    for name, count, tokens in (("124M", 124e6, 4096), ("774M", 774e6, 4096), ("7B", 7e9, 4096),
                                ("7B", 7e9, 512), ("7B", 7e9, 32768)):
        found = [efficiency(count, devices, tokens) for devices in (8, 64, 512)]
        rows.append([name, f"{tokens:,}", f"{1e3 * found[0]['step']:,.1f} ms"]
                    + [f"{1e3 * one['reduce']:.1f} ms, {one['efficiency']:.0%}" for one in found])
    return table("parameters | tokens a device | step | 8 devices | 64 | 512", rows)


# ---- measuring -----------------------------------------------------------------------------------

def peak_of(work: Callable[[], object]) -> int:
    """The most bytes of tensors that were there at one time while work() ran, by what torch's
    allocator for the CPU reports. Nothing may be there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    changes = [event.nbytes() for event in found.profiler.kineto_results.events()
               if event.name() == "[memory]"]
    present = peak = 0
    for change in changes:
        present += change
        peak = max(peak, present)
    return peak


def random_rows(config: Config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    T = config.prompt + config.comp
    return (torch.randint(0, config.vocab, (config.rows, T)),
            torch.full((config.rows,), config.prompt), torch.full((config.rows,), T))


def measured_dpo(config: Config, sizes: GPTConfig) -> None:
    policy, ref = GPT(sizes), GPT(sizes)
    optimizer = adamw(policy, 1e-4, 0.0, (0.9, 0.95))
    rows = random_rows(config)
    ref_logprobs = summed_logprobs(ref, *rows, config.dtype).view(2, -1)
    for _ in range(2):  # the second step has the optimizer's states
        for _ in range(2):  # micro-batches
            with autocast(config.dtype):
                logprobs = response_logprobs(policy, *rows).sum(1).view(2, -1)
            dpo_loss(*logprobs, *ref_logprobs, beta=0.1)[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def measured_ppo(config: Config, sizes: GPTConfig) -> None:
    policy, ref = GPT(sizes), GPT(sizes)
    value, reward = ScalarModel(sizes), ScalarModel(sizes)
    optimizers = [adamw(network, 1e-4, 0.0, (0.9, 0.95)) for network in (policy, value)]
    rows = random_rows(config)
    mask = response_mask(*rows[1:])
    with torch.no_grad():
        old_logprobs, old_values = response_logprobs(policy, *rows), response_values(value, *rows)
        rewards = response_logprobs(ref, *rows) + reward.score(rows[0], rows[2])[:, None]
    for _ in range(2):
        for _ in range(2):
            with autocast(config.dtype):
                logprobs, values = response_logprobs(policy, *rows), response_values(value, *rows)
            policy_losses, _ = policy_loss(logprobs, old_logprobs, rewards, mask, clip=0.2)
            value_losses = value_loss(values, old_values, rewards, mask, clip=0.2)
            (policy_losses.mean() + value_losses.mean()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def measured_scoring(config: Config, sizes: GPTConfig) -> None:
    summed_logprobs(GPT(sizes), *random_rows(config), config.dtype, config.rows)


def measured_sampling(config: Config, sizes: GPTConfig) -> None:
    """Token 0 ends a response, so that rows leave the cache."""
    prompts = random_rows(config)[0][:, :config.prompt].tolist()
    draw = torch.Generator().manual_seed(0)
    with autocast(config.dtype):
        generate(GPT(sizes).eval(), prompts, sizes.block_size, 0, 0, draw, chunk=config.rows)


MEASURED = {"dpo": measured_dpo, "ppo": measured_ppo, "scoring": measured_scoring,
            "sampling": measured_sampling}


def measure(config: Config) -> dict[str, object]:
    """Computed beside measured bytes of a phase, on the CPU. Scoring and sampling are measured
    with one GPT and no optimizer: sft's, less its states."""
    torch.manual_seed(0)
    sizes = GPTConfig(config.vocab, config.prompt + config.comp, config.layers, config.heads,
                      config.embd)
    found = memory(sizes, config.measure if config.measure in ALGORITHMS else "sft",
                   rows=config.rows, prompt=config.prompt, scored=config.rows, sampled=config.rows,
                   bfloat16=config.dtype == "bfloat16")
    if config.measure in ALGORITHMS:
        computed = found["training"]
    else:
        computed = found[config.measure] - found["optimizer"]
    measured = peak_of(lambda: MEASURED[config.measure](config, sizes))
    return {**asdict(config), "parameters": sum(parameters(sizes).values()),
            "computed": round(computed), "measured": measured,
            "ratio": round(computed / measured, 3), "torch": torch.__version__}


def main(config: Config) -> None:
    if config.measure == "none":
        print("\n\n".join([memory_table(), fits_table(), efficiency_table()]))
    else:
        torch.set_num_threads(1)
        print(json.dumps(measure(config)), flush=True)


if __name__ == "__main__":
    main(parse(Config, __doc__))
