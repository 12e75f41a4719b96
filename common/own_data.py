"""A task made of your own files: --dataset FOLDER, a path with a slash or an existing folder.

    texts.jsonl      {"text"}, or {"prompt", "text"}: what the SFT policy learns to write; in its
                     place any number of .txt files, whose documents are separated by blank lines
    pairs.jsonl      preference pairs, in any form that common/pairs.py reads; without texts, the
                     SFT policy learns to write their chosen responses
    prompts.jsonl    {"prompt"}: what the policies answer; without it the pairs' prompts, or the
                     first words of the texts

One of texts and pairs must be there. A tenth of everything is held out, drawn at random: texts,
prompts, and all pairs of some prompts, which SFT does not see either. The prepared form, as every
task has one, goes to FOLDER/prepared/ and is tied to the files by their checksums.

Such a task has no gold reward. Its sizes come from how much there is to learn from: few pairs are
read several times in small batches, so that 300 are enough for some 60 steps.
"""
from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from common import fail, short
from common.files import (check_field, read_json_object, read_jsonl, read_lines, sha256,
                          write_jsonl)
from common.pairs import SEED, Pair, encode_pairs, read_pairs, split
from common.tasks import Preset, Task, check_prepared, publish
from common.tokenizer import Tokenizer, train_bpe
from common.training import generator

SHARE = 10  # one in so many is held out
FEWEST = 20  # documents or pairs; with fewer, hardly any could be held out
LARGEST_BLOCK = 1024  # tokens of prompt and response
LONGEST_DOCUMENT = 256  # tokens; a longer one is cut there
ROOM = 32  # tokens for a response to a prompt, at least
MIN_STEPS = 60  # of training on pairs, by reading few of them several times
MAX_EPOCHS = 10
MANY_PAIRS = 2000  # for which the settings of the built-in tasks will do


@dataclass(frozen=True)
class Contents:
    """What is made of the files of a folder."""
    files: dict[str, list[dict]]  # name in the prepared folder -> its rows
    tokenizer: Tokenizer
    sizes: dict[str, int]  # what the settings depend on
    left_out: list[str]  # what was dropped, a line each


# ---- reading -------------------------------------------------------------------------------------

def files_of(folder: Path) -> list[Path]:
    """The user's files that are read, at least one; what cannot be read together stops."""
    if not folder.is_dir():
        fail(f"--dataset {folder}: no such folder")
    texts = sorted(folder.glob("*.txt"))
    found = [folder / name for name in ("texts.jsonl", "pairs.jsonl", "prompts.jsonl")
             if (folder / name).exists()]
    if texts and folder / "texts.jsonl" in found:
        fail(f"{folder}: has texts.jsonl and {texts[0].name}, expected one of the two")
    if not texts and not {folder / "texts.jsonl", folder / "pairs.jsonl"} & set(found):
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        fail(f"{folder}: expected texts.jsonl, .txt files or pairs.jsonl (found: {there})")
    return found + texts


def read_text_file(path: Path) -> list[dict]:
    """The documents of a text file, which blank lines separate."""
    documents: list[list[str]] = [[]]
    for number, line in enumerate(read_lines(path), 1):
        try:
            text = line.decode("utf-8").rstrip()
        except UnicodeDecodeError as error:
            fail(f"{path}, line {number}: not UTF-8 (byte {error.start + 1} of the line)")
        if "\0" in text:
            fail(f"{path}, line {number}: has a NUL byte in it, expected text")
        if text:
            documents[-1].append(text)
        elif documents[-1]:
            documents.append([])
    return [{"text": "\n".join(lines)} for lines in documents if lines]


def read_texts(files: list[Path]) -> list[dict]:
    """{"text"}, and "prompt" where there is one, of all documents."""
    rows = []
    for path in files:
        if path.suffix == ".txt":
            rows += read_text_file(path)
        elif path.name == "texts.jsonl":
            for row in read_jsonl(path, {"text": str}):
                where = f"{path}, line {row['line']}"
                if not row["text"].strip():
                    fail(f"{where}: field 'text' is empty, expected a document")
                if "prompt" in row:
                    check_field(row, "prompt", str, where)
                rows.append({key: row[key] for key in ("prompt", "text") if key in row})
    return rows


def without_repeats(rows: list[dict], what: str, left_out: list[str]) -> list[dict]:
    """One that is there twice could be learned and held out; how many were dropped is noted."""
    different = list({tuple(row.items()): row for row in rows}.values())
    if len(different) < len(rows):
        left_out.append(f"dropped {len(rows) - len(different)} of {len(rows)} {what} that are "
                        "there twice")
    return different


def drawn(rows: list[dict], what: str) -> tuple[list[dict], list[dict]]:
    """Rows to train on, and a tenth that is held out, at most 1,000; a single row is both."""
    order = torch.randperm(len(rows), generator=generator(SEED, what)).tolist()
    held = min(1000, max(1, len(rows) // SHARE))
    return [rows[i] for i in sorted(order[held:])] or rows, [rows[i] for i in sorted(order[:held])]


def first_words(rows: list[dict]) -> list[dict]:
    """The prompts of the documents, or else their first one to eight words."""
    rng, prompts = random.Random(SEED), []
    for row in rows:
        words = row["text"].split(" ")
        if "prompt" in row:
            prompts.append({"prompt": row["prompt"]})
        elif len(words) > 1:
            prompts.append({"prompt": " ".join(words[:rng.randint(1, min(8, len(words) - 1))])})
    return prompts


def split_pairs(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """The rows that dpo.py and reward_model.py will train on, and those that they will hold out:
    what is held out there must not be learned by heart before. Both drop pairs of equal responses.
    """
    if not rows:
        return [], []
    texts = [Pair(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    train, held = split(texts, draw=True, share=SHARE)
    return [rows[i] for i in train.tolist()], [rows[i] for i in held.tolist()]


def require_enough(rows: list[dict], what: str, place: str) -> None:
    if len(rows) < FEWEST:
        fail(f"{place}: {len(rows)} {what}, expected at least {FEWEST}, as a tenth is held out")


def block_for(documents: list[dict], pairs: list[Pair], prompts: list[str],
              tokenizer: Tokenizer) -> int:
    """Tokens of prompt and response that there must be room for: whole pairs, documents up to
    LONGEST_DOCUMENT, and ROOM to answer any prompt."""
    texts = [row.get("prompt", "") + row["text"] for row in documents]
    of_texts = 2 + max(map(len, tokenizer.encode_batch(texts)))  # <bos> and <eos>
    of_prompts = 1 + max(map(len, tokenizer.encode_batch(prompts)))
    of_pairs = [len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    largest = max([min(of_texts, LONGEST_DOCUMENT), of_prompts + ROOM, *of_pairs])
    return -(-largest // 8) * 8


@functools.lru_cache(maxsize=4)
def contents(folder: Path, _: tuple) -> Contents:
    """All that is made of a folder's files; nothing of it is written yet. The second argument tells
    their state: files in another state are read again."""
    files, left_out = files_of(folder), []
    texts = without_repeats(read_texts(files), "documents", left_out)
    pairs_file, prompts_file = folder / "pairs.jsonl", folder / "prompts.jsonl"
    pairs = []
    if pairs_file in files:
        pairs = [row for row in read_pairs(pairs_file) if row["chosen"] != row["rejected"]]
        require_enough(pairs, "pairs of two different responses", str(pairs_file))
    if {*files} - {pairs_file, prompts_file}:
        blank = "" if folder / "texts.jsonl" in files else " (blank lines separate documents)"
        require_enough(texts, "documents", f"{folder}{blank}")

    train_pairs, test_pairs = split_pairs(pairs)
    if texts:
        train, test = drawn(texts, "documents")
    else:
        train, test = (without_repeats([{"prompt": row["prompt"], "text": row["chosen"]}
                                        for row in rows], "chosen responses", left_out)
                       for rows in (train_pairs, test_pairs or train_pairs))
    if prompts_file in files:
        rows = [{"prompt": row["prompt"]} for row in read_jsonl(prompts_file, {"prompt": str})]
        prompts = drawn(without_repeats(rows, "prompts", left_out), "prompts")
    elif pairs:
        prompts = tuple([{"prompt": prompt} for prompt in dict.fromkeys(r["prompt"] for r in rows)]
                        for rows in (train_pairs, test_pairs or train_pairs))
    else:
        rows = without_repeats(first_words(train + test), "prompts", [])
        if not rows:
            fail(f"{folder}: no document has two words, of which the first could be a prompt: "
                 "expected a prompts.jsonl")
        prompts = drawn(rows, "prompts")

    learned = [row.get("prompt", "") + row["text"] for row in train]
    if texts:
        learned += [row["prompt"] + row["chosen"] for row in train_pairs]
    size = sum(len(text.encode()) for text in learned)  # bytes
    tokenizer = train_bpe(learned, min(4096, max(320, size // 64)))
    encoded = encode_pairs(pairs, tokenizer, LARGEST_BLOCK, pairs_file) if pairs else []
    asked = [row.get("prompt", "") for part in (*prompts, train, test) for row in part]
    block = block_for(train + test, encoded, asked, tokenizer)
    if block > LARGEST_BLOCK:
        fail(f"{folder}: a prompt needs a block of {block} tokens to be answered, expected at most "
             f"{LARGEST_BLOCK}: {short(max(asked, key=len), 40)!r}")
    rows = {"train": train, "test": test, "prompts_train": prompts[0], "prompts_test": prompts[1]}
    return Contents({f"{name}.jsonl": part for name, part in rows.items()}, tokenizer,
                    {**{name: len(part) for name, part in rows.items()},
                     "pairs_train": len(train_pairs), "pairs_test": len(test_pairs),
                     "block_size": block}, left_out)


def state_of(path: Path) -> tuple:
    """What changes when a file is written."""
    return path, path.stat().st_size, path.stat().st_mtime_ns


def read(folder: Path) -> Contents:
    return contents(folder, tuple(state_of(path) for path in files_of(folder)))


@functools.lru_cache
def checksum(path: Path, *_: int) -> str:
    """A file's sha256; settings are asked for many times in a run, and files may be large."""
    return sha256(path)


# ---- the task, and its prepared folder -----------------------------------------------------------

def on_pairs(pairs: int) -> dict:
    """Settings of a script that learns from so many pairs."""
    batch_size = 32 if pairs >= MANY_PAIRS else 16
    epochs = min(MAX_EPOCHS, max(1, round(MIN_STEPS * batch_size / pairs)))
    return dict(batch_size=batch_size, epochs=float(epochs),
                warmup=max(1, round(epochs * pairs / batch_size / 10)))  # a tenth of the steps


def task(folder: Path) -> Task:
    """The TASK of a folder, from the sizes of what is prepared, or of what would be."""
    meta = check_sources(folder)
    sizes = meta["sizes"] if meta else read(folder).sizes
    # a batch of responses has several to a prompt where there are few prompts
    samples = 1
    while samples < 64 and samples * sizes["prompts_train"] < 128:
        samples *= 2
    pairs = on_pairs(sizes["pairs_train"]) if sizes["pairs_train"] else {}
    # eight passes: with twenty, a few hundred documents are learned by heart
    steps = min(2000, max(100, sizes["train"] * 8 // 32))
    return Task(labels="bt", label_scale=1.0, gold_reward=None, folder=folder, presets={
        "cpu": Preset(
            pair_prompts=0, pair_samples=0,
            bank_prompts=min(64, sizes["prompts_test"]), bank_samples=64,
            evaluate_every={"sft": 25, "dpo": 10, "ppo": 5, "reinforce": 5},
            settings={
                "sft": dict(block_size=sizes["block_size"], steps=steps, warmup=steps // 10),
                "sft chosen": dict(steps=max(MIN_STEPS, sizes["pairs_train"] // 32), lr=5e-4,
                                   warmup=MIN_STEPS // 10),
                # gentler than the built-in tasks': an SFT policy of so few texts soon falls apart
                "dpo": pairs | (dict(lr=1e-4) if sizes["pairs_train"] < MANY_PAIRS else {}),
                "reward_model": pairs,
                "ppo": dict(batch_size=128, samples=samples),
                "reinforce": dict(batch_size=128, samples=max(4, samples)),
            }),
    })


def check_sources(folder: Path) -> dict | None:
    """The prepared folder's meta, None if it is not there; files that have changed since stop by
    name."""
    prepared = folder / "prepared"
    if not prepared.exists():
        return None
    meta = read_json_object(prepared / "meta.json", "sources", "sizes")
    now = {path.name: path for path in files_of(folder)}
    for name in sorted(now.keys() | meta["sources"].keys()):
        if name not in now or checksum(*state_of(now[name])) != meta["sources"].get(name):
            how = ("is new" if name not in meta["sources"] else
                   "has changed" if name in now else "is gone")
            fail(f"{folder / name}: {how} since {prepared} was made: delete {prepared} to prepare "
                 "it again; runs whose data or settings are others then will say so")
    return meta


def prepare(folder: Path) -> Path:
    """The prepared folder of the user's files, made if it is missing."""
    prepared = folder / "prepared"
    if not check_prepared(prepared):
        made = read(folder)

        def write(target: Path) -> dict:
            for name, rows in made.files.items():
                write_jsonl(target / name, rows)
            made.tokenizer.save(target / "tokenizer.tiktoken")
            sources = {path.name: sha256(path) for path in files_of(folder)}
            return {"sources": sources, "sizes": made.sizes,
                    "vocab_size": made.tokenizer.vocab_size}

        for line in made.left_out:
            print(f"{folder}: {line}")
        publish(prepared, str(folder), write)
        sizes = made.sizes
        print(f"{folder}: {sizes['train']} documents to learn from and {sizes['test']} held out, "
              f"{sizes['pairs_train']} pairs and {sizes['pairs_test']}, {sizes['prompts_train']} "
              f"prompts and {sizes['prompts_test']}; {made.tokenizer.vocab_size} tokens, at most "
              f"{sizes['block_size']} a text  ->  {prepared}")
    return prepared
