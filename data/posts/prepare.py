"""Prepare `posts`: forum posts with summaries, written by the grammar in grammar.py. No download, the same files anywhere.

    python data/posts/prepare.py        # 5 seconds; dpo.py calls it when the folder is missing

Written to data/posts/prepared/:
    train.jsonl          20,000 rows {"prompt", "text"}: a post and its reference summary; the loss counts the summary
    test.jsonl            1,000 rows {"prompt", "text"}
    prompts_train.jsonl  20,000 rows {"prompt"}: further posts
    prompts_test.jsonl      512 rows {"prompt"}: the same; no post is in two of the four files
    tokenizer.tiktoken   byte-level BPE of 1,024 tokens, learned on train.jsonl
    meta.json            seed, counts, mean gold reward of the reference summaries in test.jsonl, checksums
"""
from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root, for the imports below

from common.files import write_jsonl
from common.settings import Parser
from common.tasks import check_prepared, publish
from data.posts.grammar import gold_reward, sample_post
from common.tokenizer import train_bpe

OUT = Path(__file__).resolve().parent / "prepared"
TRAIN, TEST, PROMPTS_TRAIN, PROMPTS_TEST, VOCAB_SIZE, SEED = 20_000, 1_000, 20_000, 512, 1024, 0


def prepare(out: Path = OUT) -> dict:
    """Write the folder and return its meta."""
    if meta := check_prepared(out):
        print(f"{out} is there and complete")
        return meta
    print("writing the posts ...")

    def write(folder: Path) -> dict:
        rng, posts = random.Random(SEED), {}
        while len(posts) < TRAIN + TEST + PROMPTS_TRAIN + PROMPTS_TEST:
            post, summary = sample_post(rng)
            posts.setdefault(post, summary)  # every post once, so that no file has one of another's
        rows = [{"prompt": post, "text": summary} for post, summary in posts.items()]
        train, test, prompts = rows[:TRAIN], rows[TRAIN:TRAIN + TEST], [{"prompt": post} for post in posts][TRAIN + TEST:]
        tokenizer = train_bpe([row["prompt"] + row["text"] for row in train], VOCAB_SIZE)
        tokenizer.save(folder / "tokenizer.tiktoken")
        for name, part in {"train": train, "test": test, "prompts_train": prompts[:PROMPTS_TRAIN],
                           "prompts_test": prompts[PROMPTS_TRAIN:]}.items():
            write_jsonl(folder / f"{name}.jsonl", part)
        return {"seed": SEED, "vocab_size": tokenizer.vocab_size,
                "rows": {"train": TRAIN, "test": TEST, "prompts_train": PROMPTS_TRAIN, "prompts_test": PROMPTS_TEST},
                "test_reward": round(sum(gold_reward(row["prompt"] + row["text"]) for row in test) / TEST, 4)}

    return publish(out, "posts", write)


if __name__ == "__main__":
    parser = Parser(description="Prepare the posts and summaries written by a grammar.")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to make (default: %(default)s)")
    prepare(**vars(parser.parse_args()))
