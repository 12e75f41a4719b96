"""Pairs of film reviews that ask a reward something: of many kinds, and the gold reward says which
of the two is better. experiments/rewardbench.py says what each kind is.

Responses of one prompt make pairs, or a response and itself with one word changed; the grammar says
which words may stand in whose place.
"""
from __future__ import annotations

import math
import re
from operator import attrgetter
from typing import Any, Callable, NamedTuple

import torch

from common import tasks
from common.files import read_jsonl
from common.pairs import sampled_responses
from common.pipeline import Start
from common.training import generator
from data.reviews.grammar import FEELINGS, TOPICS
from model import GPT

GAP = 0.05  # gold reward; two responses that are nearer to each other make no pair
LABELLER = 2.0  # scale of the other labeller; that of the pairs which are learned from is 5


class Text(NamedTuple):
    """A response that somebody wrote."""
    text: str
    ids: list[int] | None  # as they were sampled; None: whatever the tokenizer makes of the text
    reward: float  # gold


Written = dict[str, list[Text]]  # prompt -> responses


def anything(chosen: Text, rejected: Text) -> bool:
    """Any pair will do."""
    return True


def shorter(chosen: Text, rejected: Text) -> bool:
    """The better one is shorter by a fifth or more."""
    return len(chosen.ids) <= 0.8 * len(rejected.ids)


def longer(chosen: Text, rejected: Text) -> bool:
    """The better one is longer, the other shorter than it by a fifth or more."""
    return len(rejected.ids) <= 0.8 * len(chosen.ids)


def write(start: Start, author: GPT, prompts: list[str], samples: int, seed: int,
          temperature: float = 1.0) -> Written:
    """Responses of a policy, with their gold rewards. What is empty or has a pad or <bos> in it is
    no text."""
    parts, texts = sampled_responses(author, start.tokenizer, prompts, samples, seed,
                                     temperature=temperature)
    rows = [ids for part in parts for ids in part.response_ids()]
    gold = start.gold([prompt for prompt in prompts for _ in range(samples)], texts).tolist()
    special = {start.tokenizer.pad, start.tokenizer.bos}
    return {prompt: [Text(texts[k], rows[k], gold[k])
                     for k in range(i * samples, (i + 1) * samples)
                     if texts[k] and not special & set(rows[k])]
            for i, prompt in enumerate(prompts)}


def draw_pairs(written: Written, count: int, draw: torch.Generator,
               accept: Callable[[Text, Text], bool] = anything) -> list[dict]:
    """Rows of a pairs file: two responses to one prompt, the better one by gold as the chosen one.

    Every prompt gives a pair, then every prompt a second one, until there are `count`.

    Args:
        accept: of (chosen, rejected); only such a pair is drawn.
    """
    found = []  # of each prompt, its pairs in a random order
    for prompt, texts in written.items():
        own = [(a, b) for a in texts for b in texts if a.reward - b.reward >= GAP and accept(a, b)]
        found.append([(prompt, *own[i]) for i in torch.randperm(len(own), generator=draw).tolist()])
    rounds = [own[i] for i in range(max(map(len, found), default=0)) for own in found
              if i < len(own)]
    return [pair_row(*pair) for pair in rounds[:count]]


def pair_row(prompt: str, chosen: Text, rejected: Text) -> dict:
    """A row of a pairs file, and by how much gold reward the chosen one is better: "gap"."""
    row = {"prompt": prompt, "chosen": chosen.text, "rejected": rejected.text,
           "gap": chosen.reward - rejected.reward}
    if chosen.ids is not None and rejected.ids is not None:
        row |= {"chosen_ids": chosen.ids, "rejected_ids": rejected.ids}
    return row


# word -> the words that the grammar uses in its place for the opposite
OPPOSITE: dict[str, set[str]] = {}
for sides in [FEELINGS, *(adjectives for _, adjectives, _ in TOPICS.values() if adjectives)]:
    good, bad = (side.split("|") for side in sides)
    for own, others in ((good, bad), (bad, good)):
        for word in own:
            OPPOSITE.setdefault(word, set()).update(others)


def negations(text: str) -> list[str]:
    """The text with one negation more or less, at each place where the grammar may have one."""
    found = []
    for match in re.finditer(r"\b(was|were)(n't| not| never| hardly| far from)?\b", text):
        instead = match[1] if match[2] else match[1] + "n't"
        found.append(text[:match.start()] + instead + text[match.end():])
    for match in re.finditer(r"\bwould( not)? recommend\b", text):
        instead = "would recommend" if match[1] else "would not recommend"
        found.append(text[:match.start()] + instead + text[match.end():])
    return found


def swaps(text: str) -> list[str]:
    """The text with one word of sentiment changed to one that speaks for the opposite."""
    return [text[:match.start()] + word + text[match.end():]
            for match in re.finditer(r"[a-z]+", text)
            for word in sorted(OPPOSITE.get(match[0], ()))]


def edited(start: Start, written: Written, edits: Callable[[str], list[str]],
           count: int, draw: torch.Generator) -> list[dict]:
    """Pairs of a response and itself with one word changed; a response is in one pair."""
    rows = []
    for prompt, texts in written.items():
        for original in texts:
            others = edits(original.text)
            if others and fits(start, prompt, original.text, *others):
                other = others[int(torch.randint(len(others), (), generator=draw))]
                twin = Text(other, None, start.gold([prompt], [other]).item())
                rows += draw_pairs({prompt: [original, twin]}, 1, draw)
    return [rows[i] for i in torch.randperm(len(rows), generator=draw).tolist()[:count]]


def fits(start: Start, prompt: str, *texts: str) -> bool:
    """Whether the longest of these responses has room behind the prompt."""
    longest = max(len(ids) for ids in start.tokenizer.encode_batch(list(texts)))
    return len(start.tokenizer.encode(prompt)) + longest + 2 <= start.ref.config.block_size


def relabelled(rows: list[dict], scale: float, draw: torch.Generator) -> list[dict]:
    """The same pairs, labelled by P(a beats b) = sigmoid(scale (r_a - r_b))."""
    turned = []
    for row, u in zip(rows, torch.rand(len(rows), generator=draw).tolist()):
        if u >= 1 / (1 + math.exp(-scale * row["gap"])):
            swap = {"chosen": "rejected", "rejected": "chosen", "chosen_ids": "rejected_ids",
                    "rejected_ids": "chosen_ids"}
            row = {swap.get(name, name): value for name, value in row.items()}
            row["gap"] = -row["gap"]
        turned.append(row)
    return turned


def longer_prompts(dataset: str) -> list[str]:
    """Test reviews up to the middle of their second sentence, where an opinion is on its way."""
    found = []
    for row in read_jsonl(tasks.prepared(dataset) / "test.jsonl", {"text": str}):
        first, second, *_ = row["text"].split(". ")
        words = second.split()
        found.append(f"{first}. {' '.join(words[:max(1, len(words) // 2)])}")
    return list(dict.fromkeys(found))


def kinds_of_pairs(start: Start, count: int, seed: int, authors: dict[str, GPT],
                   best: torch.Tensor) -> dict[str, list[dict]]:
    """Kind of pair -> rows of a pairs file.

    Args:
        authors: whose responses are asked about: "of DPO" -> the policy.
        best: (M, N) the reward model's scores of the bank's responses.
    """
    prompts = tasks.prompts(start.dataset, "test")
    other_prompts = longer_prompts(start.dataset)[:len(prompts)]
    ref, base = start.ref, 10_000 * (seed + 1)
    many = write(start, ref, prompts, 16, base)
    by_reward = attrgetter("reward")
    extremes = {prompt: [max(texts, key=by_reward), min(texts, key=by_reward)]
                for prompt, texts in many.items() if texts}
    written = {
        "in distribution": (many, anything),
        "easy": (extremes, anything),
        "shorter is better": (many, shorter),
        "longer is better": (many, longer),
        **{name: (write(start, author, prompts, 3, base + 2), anything)
           for name, author in authors.items()},
        "best of 64": (best_of_64(start.bank, best.tolist()), anything),
        "temperature 1.5": (write(start, ref, prompts, 3, base + 3, temperature=1.5), anything),
        "other prompts": (write(start, ref, other_prompts, 3, base + 4), anything),
    }
    draw = generator(seed, "rewardbench")
    rows = {name: draw_pairs(texts, count, draw, accept)
            for name, (texts, accept) in written.items()}
    rows["negation"] = edited(start, many, negations, count, draw)
    rows["another word"] = edited(start, many, swaps, count, draw)
    rows["another labeller"] = relabelled(rows["in distribution"], LABELLER, draw)
    return {name: own for name, own in rows.items() if own}


def best_of_64(bank: Any, scores: list[list[float]]) -> Written:
    """Of each 64 responses of the bank the one with the highest score."""
    found: Written = {}
    for prompt, texts, gold, own in zip(bank.prompts, bank.responses, bank.rewards.tolist(),
                                        scores):
        groups = [range(i, min(i + 64, len(texts))) for i in range(0, len(texts), 64)]
        tops = [max(group, key=own.__getitem__) for group in groups]
        found[prompt] = [Text(texts[i], None, gold[i]) for i in tops]
    return found
