"""Real posts of Reddit with their authors' TL;DR. The gold reward is ROUGE-L against the author's
own summary.

It is a stand-in: nobody has read the responses. ROUGE-L counts words that come in the order of one
reference out of the many good ones, sees neither a false statement nor a missing "not", and people
agree with it little more often than with a coin (experiments/agreement.py measures how often).
Every table says so: gold_name. Where prepare.py finds 10,000 human comparisons or more, a reward
model of them takes its place (common/pipeline.py).
"""
from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from common import fail, tasks
from common.files import read_jsonl
from common.tasks import Preset, Task


def words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def rouge_l(reference: list[str], candidate: list[str]) -> float:
    """F1 of the longest common subsequence of two lists of words, 0 to 1 (Lin 2004; as the package
    rouge-score has it, without stemming)."""
    # row[j]: length of the longest common subsequence with candidate[:j]
    row = [0] * (len(candidate) + 1)
    for word in reference:
        diagonal = 0
        for j, other in enumerate(candidate, 1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    # 2PR / (P + R), with P = lcs / |c| and R = lcs / |r|
    return 2 * row[-1] / max(1, len(reference) + len(candidate))


@cache
def references(folder: Path) -> dict[str, list[str]]:
    """Words of the author's summary, by prompt, of every file of a prepared folder that has any;
    read once."""
    tasks.prepared("tldr")
    paths = [folder / f"{name}.jsonl" for name in ("train", "valid", "test", "articles")]
    return {row["prompt"]: words(row["text"]) for path in paths if path.exists()
            for row in read_jsonl(path, {"prompt": str, "text": str})}


def gold_reward(text: str) -> float:
    """ROUGE-L, 0 to 1, of all that follows the first "TL;DR:", against the author's summary of the
    post before it."""
    post, mark, response = text.partition("TL;DR:")
    folder = tasks.ROOT / "data" / "tldr" / "prepared"
    if (reference := references(folder).get(post + mark)) is None:
        fail(f"no author's summary in {folder} for the prompt {post[:60]!r}...: ROUGE-L needs a "
             "prompt that is from there")
    return rouge_l(reference, words(response))


TASK = Task(
    labels="argmax",
    label_scale=5.0,
    gold_reward=gold_reward,
    gold_name="ROUGE-L against the author's TL;DR (a stand-in for human judgement)",
    real=True,
    presets={
        "cpu": Preset(
            pair_prompts=1000, pair_samples=4,
            bank_prompts=128, bank_samples=64,
            evaluate_every={"sft": 100, "dpo": 100, "ppo": 10, "reinforce": 10, "vargrad": 10,
                            "expert_iteration": 50, "conditioning": 50},
            minutes={"sft pretrain": 40, "sft": 4, "pairs": 5, "bank": 5, "reward_model": 10},
            settings={
                # 2,000 summaries are too few to learn English from: one pass over all posts first
                "sft pretrain": dict(n_layer=4, n_head=4, n_embd=256, block_size=320, steps=1900,
                                     lr=3e-3, warmup=200),
                "sft": dict(block_size=320, steps=140, lr=1e-3, warmup=20),  # 2 passes
                "sft chosen": dict(steps=170, lr=3e-4),
                "dpo": dict(lr=5e-5),
                "ppo": dict(lr=5e-5, batch_size=64, steps=25),
                "reinforce": dict(lr=5e-5, batch_size=64, steps=25),
                "winrate": dict(prompts=128, best_of=4),
            }),
    })
