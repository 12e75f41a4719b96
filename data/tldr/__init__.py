"""Real posts of Reddit with their authors' TL;DR. The gold reward is ROUGE-L against the author's own summary.

It is a stand-in: nobody has read the responses. ROUGE-L counts words that come in the order of one reference out of the
many good ones, sees neither a false statement nor a missing "not", and people agree with it little more often than with a
coin (experiments/agreement.py measures how often). Say so wherever it is reported: REWARD_NAME.
"""
from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from common import tasks
from common import fail
from common.files import read_jsonl

REWARD_NAME = "ROUGE-L against the author's TL;DR (a stand-in for human judgement)"


def words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def rouge_l(reference: list[str], candidate: list[str]) -> float:
    """F1 of the longest common subsequence of two lists of words, 0 to 1 (Lin 2004; as the package rouge-score has it,
    without stemming)."""
    row = [0] * (len(candidate) + 1)  # row[j]: length of the longest common subsequence with candidate[:j]
    for word in reference:
        diagonal = 0
        for j, other in enumerate(candidate, 1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return 2 * row[-1] / max(1, len(reference) + len(candidate))  # 2PR / (P + R), with P = lcs / |c| and R = lcs / |r|


@cache
def references(folder: Path) -> dict[str, list[str]]:
    """Words of the author's summary, by prompt, of every file of a prepared folder that has any; read once."""
    tasks.ensure("tldr")
    paths = [folder / f"{name}.jsonl" for name in ("train", "valid", "test", "articles")]
    return {row["prompt"]: words(row["text"]) for path in paths if path.exists()
            for row in read_jsonl(path, {"prompt": str, "text": str})}


def gold_reward(text: str) -> float:
    """ROUGE-L, 0 to 1, of all that follows the first "TL;DR:", against the author's summary of the post before it."""
    post, mark, response = text.partition("TL;DR:")
    folder = tasks.ROOT / "data" / "tldr" / "prepared"
    if (reference := references(folder).get(post + mark)) is None:
        fail(f"no author's summary in {folder} for the prompt {post[:60]!r}...: ROUGE-L needs a prompt that is from there")
    return rouge_l(reference, words(response))
