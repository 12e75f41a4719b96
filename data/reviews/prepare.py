"""Prepare `reviews`: film reviews written by the grammar in grammar.py. No download, the same files on every machine.

    python data/reviews/prepare.py        # 5 seconds; dpo.py calls it when the folder is missing

Written to data/reviews/prepared/:
    train.jsonl          20,000 rows {"text"}
    test.jsonl            1,000 rows {"text"}, none of them in train
    prompts_train.jsonl  20,000 rows {"prompt"}: the first 2 to 8 words of further reviews, all distinct
    prompts_test.jsonl      512 rows {"prompt"}: the same, none of them in prompts_train
    tokenizer.tiktoken   byte-level BPE of 1,024 tokens, learned on train.jsonl
    meta.json            seed, counts, the grammar's entropy (nats a review), checksums
"""
from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root, for the imports below

from common.files import write_jsonl
from common.settings import Parser
from common.tasks import check_prepared, publish
from data.reviews.grammar import sample_review
from common.tokenizer import train_bpe

OUT = Path(__file__).resolve().parent / "prepared"
TRAIN, TEST, PROMPTS_TRAIN, PROMPTS_TEST, VOCAB_SIZE, SEED = 20_000, 1_000, 20_000, 512, 1024, 0


def first_words(text: str, rng: random.Random) -> str:
    """The first 2 to 8 words of a review, as a prompt."""
    return " ".join(text.split(" ")[:rng.randint(2, 8)])


def prepare(out: Path = OUT) -> dict:
    """Write the folder and return its meta."""
    if meta := check_prepared(out):
        print(f"{out} is there and complete")
        return meta
    print("writing the reviews ...")

    def write(folder: Path) -> dict:
        rng = random.Random(SEED)
        reviews, logprobs = zip(*(sample_review(rng) for _ in range(TRAIN)))
        seen, test = set(reviews), {}
        while len(test) < TEST:
            text, logprob = sample_review(rng)
            if text not in seen:
                test[text] = logprob
        prompts: dict[str, None] = {}  # in order of first appearance
        while len(prompts) < PROMPTS_TRAIN + PROMPTS_TEST:
            prompts[first_words(sample_review(rng)[0], rng)] = None
        test_prompts, train_prompts = list(prompts)[:PROMPTS_TEST], list(prompts)[PROMPTS_TEST:]
        tokenizer = train_bpe(reviews, VOCAB_SIZE)
        tokenizer.save(folder / "tokenizer.tiktoken")
        for name, rows in {"train": [{"text": text} for text in reviews], "test": [{"text": text} for text in test],
                           "prompts_train": [{"prompt": prompt} for prompt in train_prompts],
                           "prompts_test": [{"prompt": prompt} for prompt in test_prompts]}.items():
            write_jsonl(folder / f"{name}.jsonl", rows)
        return {"seed": SEED, "vocab_size": tokenizer.vocab_size,
                "rows": {"train": TRAIN, "test": TEST, "prompts_train": PROMPTS_TRAIN, "prompts_test": PROMPTS_TEST},
                "entropy_nats_per_review": round(-sum(logprobs) / TRAIN, 3),
                "test_nats_per_review": round(-sum(test.values()) / TEST, 3)}  # what no model can beat on test.jsonl

    return publish(out, "reviews", write)


if __name__ == "__main__":
    parser = Parser(description="Prepare the reviews written by a grammar.")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to make (default: %(default)s)")
    prepare(**vars(parser.parse_args()))
