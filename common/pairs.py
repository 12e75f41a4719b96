"""Preference pairs: the file format, its checks, and how pairs are sampled and labelled.

A row is {"prompt", "chosen", "rejected"}, text, as in the Hugging Face preference format; further keys are allowed. A
response is the prompt's literal continuation (with its leading space). The built-in tasks write the same format, with the
ids that were sampled beside the texts ("chosen_ids", "rejected_ids").
"""
from __future__ import annotations

import math
from pathlib import Path
from typing import Callable, Literal, NamedTuple

import torch
from tqdm import tqdm

from common import tasks
from common import fail
from common.files import read_jsonl, write_json, write_jsonl
from common.run import compare_settings
from common.training import autocast, generator
from common.tokenizer import Tokenizer
from model import GPT, Samples, generate


class Pair(NamedTuple):
    prompt: list[int]  # with <bos>
    chosen: list[int]  # with <eos>, unless the response fills the block: then it was cut there
    rejected: list[int]


def read_pairs(path: str | Path) -> list[dict]:
    """The rows of a pairs file; each remembers its line number. Stops with file, line and field at the first bad row."""
    if not Path(path).exists():
        fail(f"{path}: no such pairs file")
    rows = read_jsonl(path, {"prompt": str, "chosen": str, "rejected": str})
    for row in rows:
        for name in ("chosen", "rejected"):
            if not row[name]:
                fail(f"{path}, line {row['line']}: field {name!r} is empty, expected a response")
    return rows


def encode_pairs(rows: list[dict], tokenizer: Tokenizer, block_size: int, path: str | Path) -> list[Pair]:
    """Ids of the pairs. Prompt and response are encoded separately and joined.

    Identical pairs are dropped and counted: their loss is ln 2 with gradient zero, but Adam divides rounding noise by
    rounding noise and would still move the weights.

    Raises SystemExit with file and line if prompt and response do not fit into block_size: cutting a response would
    change what was preferred.
    """
    pairs, identical = [], 0
    encoded = {name: tokenizer.encode_batch([row[name] for row in rows]) for name in ("prompt", "chosen", "rejected")}
    for i, row in enumerate(rows):
        prompt, responses = [tokenizer.bos] + encoded["prompt"][i], []
        room = block_size - len(prompt)
        for name in ("chosen", "rejected"):
            ids, where = encoded[name][i], f"{path}, line {row['line']}"
            if f"{name}_ids" in row:  # sampled here: the very tokens, of which the text may have others
                ids = sampled_ids(row[f"{name}_ids"], row[name], tokenizer, f"{where}: field '{name}_ids'")
            if len(ids) > room:
                fail(f"{where}: {name!r} does not fit: prompt {len(prompt)} and response {len(ids)} tokens, "
                     f"block size {block_size}")
            responses.append(ids if f"{name}_ids" in row else (ids + [tokenizer.eos])[:room])
        if row["chosen"] == row["rejected"]:
            identical += 1
            continue
        pairs.append(Pair(prompt, *responses))
    if identical:
        print(f"{path}: dropped {identical} of {len(rows)} pairs whose two responses are identical")
    if not pairs:
        fail(f"{path}: no pair with two different responses")
    return pairs


def sampled_ids(ids: object, text: str, tokenizer: Tokenizer, where: str) -> list[int]:
    """The ids of a sampled response, after a check that they say what the text beside them says."""
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids):
        fail(f"{where}: expected a list of ids below {tokenizer.vocab_size}")
    if tokenizer.decode(ids) != text:
        fail(f"{where} does not decode to the text beside it (another tokenizer, or an edited text): leave the field out")
    return ids


def label_pairs(rewards: torch.Tensor, labels: Literal["bt", "argmax"], scale: float,
                draw: torch.Generator) -> list[tuple[int, int, int]]:
    """All pairs of the samples of each prompt, labelled.

    Args:
        rewards: (prompts, samples) gold rewards.
        labels: "bt" draws the winner from the Bradley-Terry model, p(a beats b) = sigmoid(scale (r_a - r_b)): then
            `scale * r` is the reward that made the preferences, and pi_ref exp(scale r / beta) / Z is where DPO must end.
            "argmax" lets the better one always win, as in the paper's IMDb experiment; equal rewards make no pair.
    Returns:
        (prompt, chosen sample, rejected sample) indices.
    """
    pairs = []
    n = rewards.shape[1]
    uniform = torch.rand(len(rewards), n, n, generator=draw)
    for i, row in enumerate(rewards.tolist()):
        for a in range(n):
            for b in range(a + 1, n):
                if labels == "bt":
                    first_wins = uniform[i, a, b] < 1 / (1 + math.exp(-scale * (row[a] - row[b])))
                elif row[a] == row[b]:
                    continue
                else:
                    first_wins = row[a] > row[b]
                pairs.append((i, a, b) if first_wins else (i, b, a))
    return pairs


# (dataset, preset): prompts to sample for, samples of each, and the scale of the Bradley-Terry labels, with which
# they agree with the gold order 75 to 80% of the time, as human annotators do
SIZES = {("reviews", "cpu"): dict(prompts=1600, samples=4, scale=5.0),
         ("posts", "cpu"): dict(prompts=1600, samples=4, scale=5.0),
         ("tldr", "cpu"): dict(prompts=1000, samples=4, scale=5.0),
         ("imdb", "cpu"): dict(prompts=4000, samples=4, scale=5.0),
         ("imdb", "gpu"): dict(prompts=20000, samples=4, scale=5.0)}


def label_scale(dataset: str, preset: str) -> float:
    return SIZES.get((dataset, preset), SIZES["reviews", "cpu"])["scale"]


def default_labels(dataset: str) -> str:
    """Who wins if nobody says: the better response where the reward is free of noise and so is the paper's own experiment."""
    return "argmax" if dataset in ("imdb", "tldr") else "bt"


SEED = 1000  # of the samples and labels


def sampled_responses(model: GPT, tokenizer: Tokenizer, prompts: list[str], samples: int, seed: int, dtype: str = "auto",
                      max_length: int = 0, temperature: float = 1.0,
                      description: str = "sampling") -> tuple[list[Samples], list[str]]:
    """`samples` responses to every prompt, row after row, as ids (with log-probabilities) and as text."""
    ids = [[tokenizer.bos] + row for row in tokenizer.encode_batch(prompts) for _ in range(samples)]
    draw, parts = generator(seed), []
    with tqdm(total=len(ids), desc=description, unit=" responses") as bar:
        for start in range(0, len(ids), 1024):
            with autocast(dtype):
                parts.append(generate(model, ids[start:start + 1024], max_length or model.config.block_size, tokenizer.eos,
                                      tokenizer.pad, draw, temperature, return_logprobs=True))
            bar.update(len(parts[-1].tokens))
    texts = [tokenizer.decode(row[p:n]) for part in parts
             for row, p, n in zip(part.tokens.tolist(), part.prompt_lengths.tolist(), part.lengths.tolist())]
    return parts, texts


def ensure_pairs(base: Path, dataset: str, preset: str, labels: str, model: GPT, tokenizer: Tokenizer, weights: str,
                 gold: Callable[[list[str], list[str]], torch.Tensor], count: int = 0) -> Path:
    """The pairs file of a runs folder; sampled from `model`, labelled by `gold` and written if it is missing.

    Beside its text a response has its ids, with the <eos> that ended it or without: a text can be written with other
    tokens than BPE would choose, and a small model trained on varied text does so in a quarter of its long responses.

    Args:
        count: prompts to sample for, if not as many as SIZES says; then the folder's name has the number.
    """
    size = dict(SIZES.get((dataset, preset), SIZES["reviews", "cpu"]))
    size["prompts"] = count or size["prompts"]
    folder = base / (f"pairs-{labels}-{count}" if count else f"pairs-{labels}")
    settings = {"dataset": dataset, "labels": labels, **size, "seed": SEED, "policy": weights}
    compare_settings(folder, settings, f"delete {folder} to make the pairs again")
    path = folder / "pairs.jsonl"
    if path.exists():
        return path
    prompts = [row["prompt"] for row in read_jsonl(tasks.ensure(dataset) / "prompts_train.jsonl", {"prompt": str})]
    if size["prompts"] > len(prompts) and count:
        fail(f"--prompts {count}: data/{dataset} has {len(prompts)} training prompts")
    prompts = [prompts[i] for i in torch.randperm(len(prompts), generator=generator(SEED, 1))[:size["prompts"]].tolist()]
    parts, texts = sampled_responses(model, tokenizer, prompts, size["samples"], SEED,
                                     description=f"pairs: {size['samples']} responses to {len(prompts)} prompts")
    repeated = [prompt for prompt in prompts for _ in range(size["samples"])]
    rewards = gold(repeated, texts)
    sampled = [row[p:n] for part in parts
               for row, p, n in zip(part.tokens.tolist(), part.prompt_lengths.tolist(), part.lengths.tolist())]
    rows, agree, lost, n = [], 0.0, 0, size["samples"]
    for i, a, b in label_pairs(rewards.view(-1, n), labels, size["scale"], generator(SEED, 2)):
        a, b = i * n + a, i * n + b
        if not (texts[a] and texts[b]) or texts[a] == texts[b]:
            lost += 1
            continue
        agree += float(rewards[a] > rewards[b]) + 0.5 * float(rewards[a] == rewards[b])
        rows.append({"prompt": prompts[i], "chosen": texts[a], "rejected": texts[b],
                     "chosen_reward": round(rewards[a].item(), 4), "rejected_reward": round(rewards[b].item(), 4),
                     "chosen_ids": sampled[a], "rejected_ids": sampled[b]})
    if not rows:
        fail(f"{folder}: no two responses to a prompt differ: train the SFT policy for longer")
    write_json(folder / "config.json", {**settings, "pairs": len(rows), "left_out": lost,  # before the pairs: without
                                        "labels_agree_with_gold": round(agree / len(rows), 4)})  # it they pass for any
    write_jsonl(path, rows)
    print(f"{len(rows)} pairs ({lost} left out: identical or empty), labels agree with the gold order "
          f"{agree / len(rows):.1%}  ->  {path}")
    return path
