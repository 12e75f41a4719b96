"""Preference pairs: the file format, its checks, how pairs are sampled and labelled, and which are
held out.

A row is {"prompt", "chosen", "rejected"}, text; further keys are allowed. A response is its
prompt's literal continuation (with its leading space). The built-in tasks write the same format,
with the ids that were sampled beside the texts ("chosen_ids", "rejected_ids"). The other forms of
the Hugging Face preference format become this one when they are read:
    no "prompt"       it is the beginning that both texts share, up to its last "\\n\\nAssistant:"
                      (Anthropic's HH), or else up to where the word begins in which they part
    message lists     [{"role", "content"}, ...] for chosen and rejected, and for prompt where there
                      is one; a message of the user is written as "\\n\\nHuman: ...", others as
                      "\\n\\nAssistant: ..." or "\\n\\nSystem: ..."; a prompt ends with
                      "\\n\\nAssistant:"
"""
from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Callable, Literal, NamedTuple

import torch
from tqdm import tqdm

from common import fail, short
from common.files import check_field, read_jsonl
from common.tokenizer import Tokenizer
from common.training import autocast, generator, pad
from model import GPT, Samples, generate

SEED = 1000  # of the samples and labels of the pairs
TURN = "\n\nAssistant:"
ROLES = {"system": "\n\nSystem:", "user": "\n\nHuman:", "assistant": TURN}  # how each is written


# ---- reading -------------------------------------------------------------------------------------

class Pair(NamedTuple):
    prompt: list[int]  # with <bos>
    chosen: list[int]  # with <eos>, unless the response fills the block: then it was cut there
    rejected: list[int]


def read_pairs(path: str | Path) -> list[dict]:
    """The rows of a pairs file; each remembers its line number. Stops with file, line and field at
    the first bad row."""
    if not Path(path).exists():
        fail(f"{path}: no such pairs file")
    rows = read_jsonl(path, {"chosen": (str, list), "rejected": (str, list)})
    for row in rows:
        where = f"{path}, line {row['line']}"
        if type(row["chosen"]) is not type(row["rejected"]):
            fail(f"{where}: one of 'chosen' and 'rejected' is a text, expected two texts or two "
                 "lists of messages")
        if isinstance(row["chosen"], list):
            row |= render_messages(row, where)
        elif "prompt" not in row:
            row |= split_off_prompt(row["chosen"], row["rejected"], where)
        for name in ("prompt", "chosen", "rejected"):
            check_field(row, name, str, where)
            if not row[name] and name != "prompt":
                fail(f"{where}: field {name!r} is empty, expected a response")
    return rows


def split_off_prompt(chosen: str, rejected: str, where: str) -> dict[str, str]:
    """prompt, chosen and rejected of two texts that begin with the same, unnamed prompt."""
    prompt = os.path.commonprefix([chosen, rejected])
    turn = prompt.rfind(TURN)
    if turn >= 0:
        prompt = prompt[:turn + len(TURN)]
    # the texts part inside a word, or one of them ends here: it is the responses' first word
    elif not (chosen[len(prompt):len(prompt) + 1].isspace()
              and rejected[len(prompt):len(prompt) + 1].isspace()):
        prompt = prompt[:re.search(r"\s*\S*\Z", prompt).start()]
    if not prompt:
        fail(f"{where}: no field 'prompt', expected one, or 'chosen' and 'rejected' that begin "
             "with the same words")
    return {"prompt": prompt, "chosen": chosen[len(prompt):], "rejected": rejected[len(prompt):]}


def render_messages(row: dict, where: str) -> dict[str, str]:
    """prompt, chosen and rejected of two lists of messages, as texts.

    The lists may begin with the messages of the prompt, whether these are there by themselves or
    not. What both share is the prompt, except for each one's last message.
    """
    before = row.get("prompt", [])
    if isinstance(before, str):
        before = [{"role": "user", "content": before}]
    sides = {"prompt": before, "chosen": row["chosen"], "rejected": row["rejected"]}
    for name, messages in sides.items():
        for message in messages if isinstance(messages, list) else [messages]:
            if not (isinstance(message, dict) and isinstance(message.get("content"), str)
                    and message.get("role") in [*ROLES]):  # a role that is a list has no hash
                fail(f"{where}: field {name!r} has {short(json.dumps(message), 40)} in it, "
                     f"expected messages with a 'role' ({', '.join(ROLES)}) and a text as "
                     "'content'")
    texts = {}
    for name in ("chosen", "rejected"):
        messages = sides[name]
        if messages[:len(before)] != before:
            messages = before + messages
        texts[name] = [f"{ROLES[m['role']]} {m['content']}" for m in messages]
    chosen, rejected = texts["chosen"], texts["rejected"]
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    for name, messages in texts.items():
        if not (messages and messages[shared].startswith(TURN)):
            fail(f"{where}: field {name!r}: expected a message of the assistant's behind the "
                 f"prompt, which has {shared} messages")
    prompt = "".join(chosen[:shared]) + TURN
    return {"prompt": prompt, "chosen": "".join(chosen)[len(prompt):],
            "rejected": "".join(rejected)[len(prompt):]}


def encode_pairs(rows: list[dict], tokenizer: Tokenizer, block_size: int,
                 path: str | Path) -> list[Pair]:
    """Ids of the pairs. Prompt and response are encoded separately and joined.

    Identical pairs are dropped and counted: their loss is ln 2 with gradient zero, but Adam divides
    rounding noise by rounding noise and would still move the weights.

    Raises SystemExit with file and lines if prompt and response do not fit into block_size: cutting
    a response would change what was preferred.
    """
    pairs, identical, misfits = [], 0, []
    encoded = {
        name: tokenizer.encode_batch([row[name] for row in rows])
        for name in ("prompt", "chosen", "rejected")
    }
    for i, row in enumerate(rows):
        where = f"{path}, line {row['line']}"
        prompt = [tokenizer.bos] + encoded["prompt"][i]
        room = block_size - len(prompt)
        responses = []
        for name in ("chosen", "rejected"):
            # sampled here: the very tokens, of which the text may have others
            if f"{name}_ids" in row:
                ids = sampled_ids(row[f"{name}_ids"], row[name], tokenizer,
                                  f"{where}: field '{name}_ids'")
                length = len(ids)
            else:
                length = len(encoded[name][i])
                ids = (encoded[name][i] + [tokenizer.eos])[:room]
            if length > room:
                misfits.append((row["line"], f"{name!r} does not fit: prompt {len(prompt)} and "
                                f"response {length} tokens, block size {block_size}"))
            responses.append(ids)
        if row["chosen"] == row["rejected"]:
            identical += 1
        else:
            pairs.append(Pair(prompt, *responses))
    if misfits:
        others = [str(line) for line in dict(misfits)][1:]
        more = f"; nor do {len(others)} other lines: {short(', '.join(others))}" if others else ""
        fail(f"{path}, line {misfits[0][0]}: {misfits[0][1]}{more}")
    if identical:
        print(f"{path}: dropped {identical} of {len(rows)} pairs whose two responses are identical")
    if not pairs:
        fail(f"{path}: no pair with two different responses")
    return pairs


def sampled_ids(ids: object, text: str, tokenizer: Tokenizer, where: str) -> list[int]:
    """The ids of a sampled response, after a check that they say what the text beside them says."""
    if not isinstance(ids, list) or not all(
            type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids):
        fail(f"{where}: expected a list of ids below {tokenizer.vocab_size}")
    special = {tokenizer.pad, tokenizer.bos, tokenizer.eos}
    if special & set(ids[:-1]) or (special - {tokenizer.eos}) & set(ids[-1:]):
        fail(f"{where}: has a pad, <bos> or <eos> in it; an <eos> may stand at the end and "
             "nowhere else")
    if tokenizer.decode(ids) != text:
        fail(f"{where} does not decode to the text beside it (another tokenizer, or an edited "
             "text): leave the field out")
    return ids


# ---- as tensors, and held out --------------------------------------------------------------------

class PairTensors(NamedTuple):
    """N pairs, right-padded. The first axis is the response: 0 is chosen, 1 is rejected."""
    tokens: torch.Tensor  # (2, N, T) prompt and response
    prompt_lengths: torch.Tensor  # (2, N)
    lengths: torch.Tensor  # (2, N) of prompt and response


def pair_tensors(pairs: list[Pair], pad_id: int) -> PairTensors:
    rows = [pair.prompt + pair.chosen
            for pair in pairs] + [pair.prompt + pair.rejected for pair in pairs]
    tokens, lengths = pad(rows, pad_id)
    prompt_lengths = torch.tensor([len(pair.prompt) for pair in pairs])
    return PairTensors(tokens.view(2, len(pairs), -1), prompt_lengths.expand(2, -1),
                       lengths.view(2, -1))


def split(pairs: list[Pair], draw: bool,
          share: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the pairs to train on, and of those held out: all pairs of some prompts, a
    twentieth of the pairs.

    No prompt is on both sides, or what was learned of it by heart would count as understood.

    Args:
        draw: the prompts that are held out are drawn at random, as a file of somebody's may be
            sorted. Otherwise they are the last ones: pairs that were sampled here come in a random
            order of prompts.
        share: one pair in so many is held out; more of the fewer pairs in a folder of the user's.
    """
    prompts = [tuple(pair.prompt) for pair in pairs]
    order = list(dict.fromkeys(prompts))
    if draw:
        drawn = torch.randperm(len(order), generator=generator(SEED, "held out"))
        order = [order[i] for i in drawn.tolist()]
    counts = Counter(prompts)
    held: set[tuple[int, ...]] = set()
    wanted = len(pairs) // share
    while wanted > 0 and len(held) < len(order) - 1:
        prompt = order[-1 - len(held)]
        held.add(prompt)
        wanted -= counts[prompt]
    is_held = torch.tensor([prompt in held for prompt in prompts])
    return (~is_held).nonzero().squeeze(1), is_held.nonzero().squeeze(1)


# ---- sampling and labelling ----------------------------------------------------------------------

def label_pairs(rewards: torch.Tensor, labels: Literal["bt", "argmax"], scale: float,
                draw: torch.Generator) -> list[tuple[int, int, int]]:
    """All pairs of the samples of each prompt, labelled.

    Args:
        rewards: (prompts, samples) gold rewards.
        labels: "bt" draws the winner from the Bradley-Terry model, p(a beats b) = sigmoid(scale
            (r_a - r_b)): then `scale * r` is the reward that made the preferences, and pi_ref
            exp(scale r / beta) / Z is where DPO must end. "argmax" lets the better one always win,
            as in the paper's IMDb experiment; equal rewards make no pair.
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


def sampled_responses(model: GPT, tokenizer: Tokenizer, prompts: list[str], samples: int,
                      seed: int, dtype: str = "auto", max_length: int = 0,
                      temperature: float = 1.0,
                      description: str = "sampling") -> tuple[list[Samples], list[str]]:
    """`samples` responses to every prompt, row after row, as ids (with log-probabilities) and as
    text."""
    ids = [[tokenizer.bos] + row for row in tokenizer.encode_batch(prompts) for _ in range(samples)]
    room = max_length or model.config.block_size
    if (longest := max(map(len, ids))) >= room:
        fail(f"no room for a response: a prompt has {longest} tokens, the block size is {room}")
    draw = generator(seed)
    parts = []
    with tqdm(total=len(ids), desc=description, unit=" responses") as bar:
        for start in range(0, len(ids), 1024):
            with autocast(dtype):
                parts.append(
                    generate(model,
                             ids[start:start + 1024],
                             room,
                             tokenizer.eos,
                             tokenizer.pad,
                             draw,
                             temperature,
                             return_logprobs=True))
            bar.update(len(parts[-1].tokens))
    texts = [tokenizer.decode(ids) for part in parts for ids in part.response_ids()]
    return parts, texts


def sample_pairs(
        model: GPT, tokenizer: Tokenizer, prompts: list[str], samples: int,
        labels: Literal["bt", "argmax"], scale: float,
        gold: Callable[[list[str], list[str]], torch.Tensor],
        seed: int = SEED) -> tuple[list[dict], int, float]:
    """Sample responses to every prompt, and label all pairs of those of one prompt by their gold
    reward.

    Beside its text a response has its ids, with the <eos> that ended it or without: a text can be
    written with other tokens than BPE would choose, and a small model trained on varied text does
    so in a quarter of its long responses.

    Returns:
        rows of a pairs file; how many pairs were left out, because a response is empty, has a pad
        or <bos> in it (of a policy that has hardly been trained), or both are the same; how often a
        label agrees with the gold order, ties counting half.
    """
    description = f"pairs: {samples} responses to {len(prompts)} prompts"
    parts, texts = sampled_responses(model, tokenizer, prompts, samples, seed,
                                     description=description)
    rewards = gold([prompt for prompt in prompts for _ in range(samples)], texts)
    ids = [row for part in parts for row in part.response_ids()]
    special = {tokenizer.pad, tokenizer.bos}  # a policy that is hardly trained may sample them
    is_text = [text != "" and not special & set(row) for text, row in zip(texts, ids)]
    rows, left_out, agree = [], 0, 0.0
    for i, a, b in label_pairs(rewards.view(-1, samples), labels, scale, generator(seed, 2)):
        a, b = i * samples + a, i * samples + b
        if not (is_text[a] and is_text[b]) or texts[a] == texts[b]:
            left_out += 1
            continue
        agree += float(rewards[a] > rewards[b]) + 0.5 * float(rewards[a] == rewards[b])
        rows.append({"prompt": prompts[i], "chosen": texts[a], "rejected": texts[b],
                     "chosen_reward": round(rewards[a].item(), 4),
                     "rejected_reward": round(rewards[b].item(), 4),
                     "chosen_ids": ids[a], "rejected_ids": ids[b]})
    return rows, left_out, agree / max(1, len(rows))
