"""Prepare Reddit posts with their authors' TL;DR: clean, de-duplicate, tokenizer, prompts, human comparisons.

    python data/tldr/prepare.py                        # downloads OpenAI's set first: a gigabyte
    python data/tldr/prepare.py --archive FOLDER       # or reads a copy, or posts of your own, that FOLDER has:
        train.jsonl, valid.jsonl, test.jsonl           {"id", "subreddit", "title", "post", "summary"}; or .jsonl.xz
        posts_without_tldr.jsonl                       optional: {"id", "subreddit", "title", "post"}, for pretraining alone
        comparisons/*.json                             optional: human comparisons, as OpenAI published them
    python data/tldr/prepare.py --articles FILE        # and {"article", "highlights"}: prompts of another kind (CNN/DailyMail)

Source: Stiennon, Ouyang, Wu, Ziegler, Lowe, Voss, Radford, Amodei and Christiano, "Learning to summarize from human
feedback", NeurIPS 2020, https://github.com/openai/summarize-from-feedback -- 116,722 posts to train on, 6,447 and 6,553 held
out, a selection of the Webis TL;DR corpus (Voelske, Potthast, Syed and Stein 2017); 64,832 comparisons, as it counts them.

Written to data/tldr/prepared/:
    pretrain.jsonl       {"text"}: documents to learn English from: the posts without a summary, and all posts of train
                         with their prompt and summary, those that are too long for train.jsonl, too
    train.jsonl, valid.jsonl, test.jsonl   {"prompt", "text"}: a post, as the paper writes it, and its author's summary
    prompts_train.jsonl, prompts_test.jsonl   {"prompt"}: those of train and test
    comparisons_train.jsonl, comparisons_test.jsonl   {"prompt", "chosen", "rejected"}, as pairs everywhere, and "id",
                         "worker", "confidence" (1 to 9, or null) and "reference" (the author's summary, or null)
    articles.jsonl       {"prompt", "text"}: an article as if it were a post of r/news, and its highlights
    tokenizer.tiktoken   byte-level BPE of 4,096 tokens, learned on 20,000 rows of pretrain.jsonl
    meta.json            settings, counts, what was dropped and why, checksums

Dropped and counted: posts with a field empty; with a TL;DR in the post or title, which would answer the question; copies,
by id or by text, where test wins over valid, valid over train, and all three, as well as comparisons_test, over what is
only trained on; prompts of more than 256 tokens (--max-prompt) and summaries of more than 63, each with <bos> or <eos>.
Nothing is cut, but for the articles: they end with the last whole sentence that leaves the prompt short enough.
A comparison may have 512 tokens of prompt and 128 of summary, so that this takes all of them:

    python reward_model.py --dataset tldr --block-size 640 --out runs/tldr/reward-model-human \\
        --pairs data/tldr/prepared/comparisons_train.jsonl
"""
from __future__ import annotations

import hashlib
import random
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root, for the imports below

from common import fail
from common.files import read_jsonl, sha256, write_jsonl
from common.settings import Parser
from common.tasks import check_prepared, download, publish
from common.tokenizer import Tokenizer, train_bpe

URL = "https://openaipublic.blob.core.windows.net/summarize-from-feedback"
# No checksum of these files is published. What is known of them is checked: that every row is whole and has the fields
# and types it must have, and how many posts there are (Stiennon et al. 2020, section 3.1: 123,169 = 116,722 + 6,447).
POSTS = {"train": 116_722, "valid": 6_447, "test": 6_553}
BATCHES = [f"batch{n}" for n in (*range(3, 21), 22)]  # of the comparisons, those of TL;DR posts; there is no batch21
OUT = Path(__file__).resolve().parent / "prepared"
NUM_BPE = 20_000  # documents
MAX_PROMPT, MAX_SUMMARY = 256, 64  # tokens, <bos> and <eos> among them
MAX_COMPARISON_PROMPT, MAX_COMPARISON_SUMMARY = 512, 128  # the same; the paper's posts have up to 512 of GPT-2's tokens
FIELDS = {"id": str, "subreddit": str, "title": str, "post": str}
HAS_TLDR = re.compile(r"\btl\W{0,2}dr\b", re.IGNORECASE)
# where a sentence ends and the next begins, though not behind an initial or a title
SENTENCE = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"'\u201d)]))(?<![A-Z]\.)(?<!Mr\.|Ms\.|Dr\.|St\.|vs\.|No\.)"
                      r"(?<!Mrs\.|Sen\.|Gov\.|Rep\.|Gen\.)\s+(?=[\"'\u201c(]?[A-Z0-9])")


# ---- getting and reading the posts and comparisons -------------------------------------------------------------------

def fetch(folder: Path) -> Path:
    """OpenAI's files in a folder of the form that --archive takes; what is there already is not fetched again."""
    otherwise = "give a copy with --archive FOLDER"
    for part in POSTS:
        download(f"{URL}/datasets/tldr_3_filtered/{part}.jsonl", folder / f"{part}.jsonl", otherwise)
    for batch in BATCHES:
        download(f"{URL}/dataset/comparisons/{batch}.json", folder / "comparisons" / f"{batch}.json", otherwise)
    for part, expected in POSTS.items():
        with (folder / f"{part}.jsonl").open("rb") as file:
            found = sum(bool(line.strip()) for line in file)
        if found != expected:
            fail(f"{folder / part}.jsonl has {found:,} rows, expected {expected:,}: remove it and run again, or {otherwise}")
    return folder


def clean(text: str) -> str:
    """Paragraphs stay; what else there is of white space says nothing and costs tokens: single spaces, none at the ends of
    lines, and at most one empty line in a row."""
    text = re.sub(r"[^\S\n]+", " ", text.replace("\r\n", "\n").replace("\r", "\n"))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()


def prompt_of(row: dict) -> str:
    """The post as Stiennon et al. (2020) show it to the model; the summary follows, with a space in front."""
    return f"SUBREDDIT: r/{row['subreddit']}\n\nTITLE: {row['title']}\n\nPOST: {row['post']}\n\nTL;DR:"


def read_posts(path: Path, more: dict[str, type]) -> list[dict]:
    """Cleaned rows of FIELDS and `more`; a title is one line."""
    rows = [{name: clean(row[name]) for name in (*FIELDS, *more)} for row in read_jsonl(path, FIELDS | more)]
    return [row | {"title": " ".join(row["title"].split())} for row in rows]


def read_comparisons(path: Path) -> list[dict]:
    """Cleaned rows {**FIELDS, "chosen", "rejected", "worker", "confidence", "split", "reference"} of a batch: the last is
    None where neither of the two summaries is the author's. Stops with file, line and field at the first bad row."""
    found = []
    for row in read_jsonl(path, {"info": dict, "summaries": list, "choice": int}):
        def need(holder: object, name: str, field: str) -> str:
            value = holder.get(name) if isinstance(holder, dict) else None
            if not isinstance(value, str):
                fail(f"{path}, line {row['line']}: field {field!r} is {value!r}, expected text")
            return clean(value)

        if len(row["summaries"]) != 2 or row["choice"] not in (0, 1):
            fail(f"{path}, line {row['line']}: {len(row['summaries'])} summaries and choice {row['choice']}, expected two "
                 "summaries and choice 0 or 1")
        texts = [need(summary, "text", "summaries[].text") for summary in row["summaries"]]
        by_author = [text for text, summary in zip(texts, row["summaries"]) if summary.get("policy") == "ref"]
        extra = row.get("extra")
        post = {name: need(row["info"], name, f"info.{name}") for name in FIELDS}
        found.append({**post, "title": " ".join(post["title"].split()), "chosen": texts[row["choice"]],
                      "rejected": texts[1 - row["choice"]], "reference": (by_author or [None])[0],
                      "worker": row.get("worker"), "split": row.get("split"),
                      "confidence": extra.get("confidence") if isinstance(extra, dict) else None})
    return found


def read_archive(folder: Path) -> tuple[dict[str, list[dict]], list[dict], list[Path]]:
    """The posts of train, valid, test and unsummarised, the comparisons, and the files that they were read from."""
    parts, paths = {}, []
    for part, name in {**{part: part for part in POSTS}, "unsummarised": "posts_without_tldr"}.items():
        path = next((path for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.xz") if path.exists()), None)
        if path is None and part in POSTS:
            fail(f"{folder} has neither {name}.jsonl nor {name}.jsonl.xz, expected train, valid and test")
        parts[part] = read_posts(path, {"summary": str} if part in POSTS else {}) if path else []
        paths += [path] if path else []
    batches = [path for path in sorted(folder.glob("comparisons/*.json")) if "cnndm" not in path.name]  # no posts, those
    return parts, [row for path in batches for row in read_comparisons(path)], paths + batches


# ---- dropping and splitting ------------------------------------------------------------------------------------------

def usable(rows: list[dict]) -> tuple[list[dict], dict[str, int]]:
    """The rows without an empty field and without a TL;DR in post or title, and how many were dropped."""
    whole = [row for row in rows if all(row.values())]
    kept = [row for row in whole if not HAS_TLDR.search(f"{row['title']}\n{row['post']}")]
    return kept, {"empty_field": len(rows) - len(whole), "tldr_inside": len(whole) - len(kept)}


def keys(rows: list[dict]) -> set[str]:
    """What makes two posts the same: the id or the text, either of them."""
    return {key for row in rows for key in (row["id"], row["post"])}


def drop_copies(rows: list[dict], held: set[str]) -> tuple[list[dict], dict[str, int]]:
    """The rows whose post is not in `held`, each post once, and how many were dropped."""
    apart = [row for row in rows if not held & {row["id"], row["post"]}]
    kept, seen = [], set()
    for row in apart:
        if not seen & {row["id"], row["post"]}:
            kept.append(row)
        seen |= {row["id"], row["post"]}
    return kept, {"copies_inside": len(apart) - len(kept), "held_out_elsewhere": len(rows) - len(apart)}


def split_comparisons(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Comparisons to train on and to test on; a post that is in both stays in test alone.

    By the authors' split if it is there; a part of their batches, all of them held out, is split 4 : 1 by a hash of the id.
    """
    if any(row["split"] == "train" for row in rows):
        test = [row for row in rows if row["split"] != "train"]
    else:
        test = [row for row in rows if hashlib.sha256(row["id"].encode()).digest()[0] % 5 == 0]
    held = keys(test)
    test = [row for row in rows if held & {row["id"], row["post"]}]
    held = keys(test)
    return [row for row in rows if not held & {row["id"], row["post"]}], test


def drop_long(rows: list[dict], names: list[str], tokenizer: Tokenizer, max_prompt: int,
              max_summary: int) -> tuple[list[dict], dict[str, int]]:
    """The rows whose prompt and summaries, the fields `names`, fit, and how many were dropped."""
    fits = [len(ids) < max_prompt for ids in tokenizer.encode_batch([row["prompt"] for row in rows])]
    short = [row for row, fit in zip(rows, fits) if fit]
    encoded = [tokenizer.encode_batch([row[name] for row in short]) for name in names]
    kept = [row for row, *ids in zip(short, *encoded) if max(map(len, ids)) < max_summary]
    return kept, {"prompt_too_long": len(rows) - len(short), "summary_too_long": len(short) - len(kept)}


def cut_article(article: str, tokenizer: Tokenizer, max_prompt: int) -> str | None:
    """An article as a post of r/news: its first sentence is the title, as the rows have no headline and the policies have
    never seen a prompt without a title; the others are the post, as many as fit. None if not even one does."""
    title, *sentences = SENTENCE.split(" ".join(article.split()))
    prompt = None
    for end in range(1, len(sentences) + 1):
        longer = prompt_of({"subreddit": "news", "title": title, "post": " ".join(sentences[:end])})
        if len(tokenizer.encode(longer)) >= max_prompt:
            break
        prompt = longer
    return prompt


# ---- the whole -------------------------------------------------------------------------------------------------------

def prepare(archive: Path | None = None, out: Path = OUT, articles: Path | None = None, max_prompt: int = MAX_PROMPT,
            vocab_size: int = 4096, seed: int = 0) -> dict:
    """Make the folder `out` from `archive` (None: download it), or find it complete; returns its meta.json."""
    # 1. is it there already?
    if vocab_size < 259:
        fail(f"--vocab-size {vocab_size} is too small: 256 bytes and 3 special tokens are 259 alone")
    if max_prompt < 2:
        fail(f"--max-prompt {max_prompt}: must be at least 2 tokens, one of them <bos>")
    if meta := check_prepared(out):
        for key, wanted in ("vocab_size", vocab_size), ("max_prompt", max_prompt), ("seed", seed):
            if meta[key] != wanted:
                fail(f"{out} was made with {key} {meta[key]}, not {wanted}: remove it, or choose another --out")
        print(f"{out} is complete: nothing to do")
        return meta
    started = time.time()
    report = lambda line: print(f"{time.time() - started:6.1f} s  {line}", flush=True)  # noqa: E731

    # 2. get the posts, read them, drop what cannot be used and the copies
    parts, comparisons, sources = read_archive(archive or fetch(out.parent / "openai"))
    news = read_jsonl(articles, {"article": str, "highlights": str}) if articles else []
    report("read " + ", ".join(f"{len(rows):,} {name}" for name, rows in
                               {**parts, "comparisons": comparisons, "articles": news}.items()))
    written = {row["id"]: row["summary"] for part in POSTS for row in parts[part]}  # the author's summary of each post
    written |= {row["id"]: row["reference"] for row in comparisons if row["reference"]}
    compared = dict(zip(("comparisons_train", "comparisons_test"), split_comparisons(comparisons)))
    dropped, held = {}, set()
    for part in "test", "valid", "train", "unsummarised":  # the first to have a post keeps it
        parts[part], dropped[part] = usable(parts[part])
        parts[part], copies = drop_copies(parts[part], held)
        dropped[part] |= copies
        held |= keys(parts[part]) | (keys(compared["comparisons_test"]) if part == "valid" else set())
    held_out = keys(parts["test"]) | keys(parts["valid"])
    apart = [row for row in compared["comparisons_train"] if not held_out & {row["id"], row["post"]}]
    dropped["comparisons_train"] = {"held_out_elsewhere": len(compared["comparisons_train"]) - len(apart)}
    compared["comparisons_train"] = apart

    # 3. the tokenizer, learned on documents to train on: a shuffled start of them is a sample
    rng = random.Random(seed)
    files = {part: [{"prompt": prompt_of(row), "text": " " + row["summary"]} for row in parts[part]] for part in POSTS}
    pretrain = [{"text": prompt_of(row).removesuffix("\n\nTL;DR:")} for row in parts["unsummarised"]]
    pretrain += [{"text": row["prompt"] + row["text"]} for row in files["train"]]
    for rows in pretrain, *files.values():
        rng.shuffle(rows)
    tokenizer = train_bpe([row["text"] for row in pretrain[:NUM_BPE]], vocab_size)
    report(f"tokenizer of {tokenizer.vocab_size:,} tokens")

    # 4. what is too long, now that it can be counted
    for part in POSTS:
        files[part], long = drop_long(files[part], ["text"], tokenizer, max_prompt, MAX_SUMMARY)
        dropped[part] |= long
    texts = [row["prompt"] + row["text"] for row in files["valid"]]
    if not texts or not files["train"] or not files["test"]:
        fail(f"no post is left in train, valid or test: {dropped}")
    bytes_per_token = len("".join(texts).encode()) / sum(map(len, tokenizer.encode_batch(texts)))
    files["pretrain"] = pretrain
    for part in "train", "test":
        files[f"prompts_{part}"] = [{"prompt": row["prompt"]} for row in files[part]]
    for part, rows in compared.items() if comparisons else ():
        pairs = [{"prompt": prompt_of(row), "chosen": " " + row["chosen"], "rejected": " " + row["rejected"], "id": row["id"],
                  "worker": row["worker"], "confidence": row["confidence"], "reference": written.get(row["id"])}
                 for row in rows if row["chosen"] and row["rejected"] and row["chosen"] != row["rejected"]]
        files[part], long = drop_long(pairs, ["chosen", "rejected"], tokenizer, MAX_COMPARISON_PROMPT, MAX_COMPARISON_SUMMARY)
        dropped[part] = {**dropped.get(part, {}), "empty_or_identical": len(rows) - len(pairs), **long}
        rng.shuffle(files[part])
    if articles:
        cut = {cut_article(row["article"], tokenizer, max_prompt): " ".join(row["highlights"].split()) for row in news
               if not HAS_TLDR.search(row["article"])}
        files["articles"] = [{"prompt": prompt, "text": " " + text} for prompt, text in cut.items() if prompt and text]
        dropped["articles"] = {"tldr_inside_copy_or_too_long": len(news) - len(files["articles"])}
    for name, rows in files.items():
        reasons = ", ".join(f"{number:,} {kind}" for kind, number in dropped.get(name, {}).items() if number)
        report(f"{name}: {len(rows):,} rows" + (f"; dropped {reasons}" if reasons else ""))
    reasons = ", ".join(f"{number:,} {kind}" for kind, number in dropped["unsummarised"].items() if number)
    report(f"{len(parts['unsummarised']):,} of pretrain have no summary" + (f"; dropped {reasons}" if reasons else ""))

    # 5. write all of it or nothing
    def write(folder: Path) -> dict:
        for name, rows in files.items():
            write_jsonl(folder / f"{name}.jsonl", rows)
        tokenizer.save(folder / "tokenizer.tiktoken")
        return {"seed": seed, "vocab_size": vocab_size, "max_prompt": max_prompt, "bytes_per_token": round(bytes_per_token, 4),
                "rows": {name: len(rows) for name, rows in files.items()}, "dropped": dropped,
                "sources": {path.name: sha256(path) for path in sources + ([articles] if articles else [])}}

    meta = publish(out, "tldr", write)
    report(f"wrote {out}")
    return meta


if __name__ == "__main__":
    parser = Parser(description="Prepare Reddit posts with their authors' TL;DR.")
    parser.add_argument("--archive", type=Path, help="folder with train, valid and test .jsonl or .jsonl.xz; else downloaded")
    parser.add_argument("--articles", type=Path, help="articles with highlights, .jsonl or .jsonl.xz: other prompts to test on")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to make (default: %(default)s)")
    parser.add_argument("--max-prompt", type=int, default=MAX_PROMPT, help="tokens, <bos> counted (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens (default: %(default)s)")
    prepare(**vars(parser.parse_args()))
