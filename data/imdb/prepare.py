"""Prepare the Large Movie Review Dataset (IMDb) for the sentiment task: clean, de-duplicate, tokenizer, prompts.

    python data/imdb/prepare.py                                    # downloads the archive (84 MB) first
    python data/imdb/prepare.py --archive aclImdb_v1.tar.gz        # or reads a copy that you have

Source: Maas, Daly, Pham, Huang, Ng and Potts, "Learning Word Vectors for Sentiment Analysis", ACL 2011,
https://ai.stanford.edu/~amaas/data/sentiment/ -- 25,000 labelled reviews to train on, 25,000 to test on, 50,000 without
a label. It has exact copies, also across these parts. They go, so that nothing in test was trained on.

Written to data/imdb/prepared/ (25 seconds on 2 CPU cores, and 130 MB):
    train.jsonl          72,787 rows {"text", "label"}: 24,902 labelled (1 positive, 0 negative), 47,885 with null
    valid.jsonl           1,000 rows {"text"}: held out from the unlabelled reviews, for choosing settings
    test.jsonl           24,676 rows {"text", "label"}: shares no text with train or valid
    prompts_train.jsonl  20,000 rows {"prompt"}: the first 2 to 8 tokens of reviews in train, all distinct
    prompts_test.jsonl    2,000 rows {"prompt"}: the same of reviews in test, none of them in prompts_train
    tokenizer.tiktoken   byte-level BPE of 4,096 tokens, learned on 20,000 rows of train.jsonl
    meta.json            seed, counts, what was dropped and why, checksums

Dropped: 98 copies inside train, 201 inside test, 495 inside unlabelled; 123 test texts that are in train; 354 and 266
unlabelled texts that are in train and in test. As raw files it is 96, 199 and 493 inside, and 24,678 left for test: in
each part two more reviews are copies but for white space and line breaks.
"""

import lzma
import random
import re
import sys
import tarfile
import time
import zlib
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root, for the imports below

from common import fail
from common.files import sha256, write_jsonl
from common.settings import Parser
from common.tasks import check_prepared, download, publish
from common.tokenizer import Tokenizer, train_bpe

URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
MD5 = "7c2ac02c03563afcf9b574c7e56c153a"
OUT = Path(__file__).resolve().parent / "prepared"
MEMBER = re.compile(r"(?:\./)?aclImdb/(train/pos|train/neg|train/unsup|test/pos|test/neg)/(\d+)_\d+\.txt")
EXPECTED = ("expected the Large Movie Review Dataset as .tar.gz or .tar.xz, with "
            "aclImdb/{train,test}/{pos,neg}/ID_STARS.txt and aclImdb/train/unsup/ID_0.txt")
PARTS = {"train": {"train/neg": 0, "train/pos": 1}, "test": {"test/neg": 0, "test/pos": 1},
         "unsup": {"train/unsup": None}}  # part: its folders and their label
NUM_VALID, NUM_BPE, NUM_PROMPTS_TRAIN, NUM_PROMPTS_TEST = 1_000, 20_000, 20_000, 2_000  # rows
MIN_K, MAX_K = 2, 8  # prompt length, tokens


# ---- getting and reading the archive ---------------------------------------------------------------------------------

def read_archive(path: Path) -> dict[str, list[dict]]:
    """{"train" | "test" | "unsup": cleaned rows {"text", "label"}}, ordered by label and number, not as in the archive.

    Members are read in memory, never unpacked to disk, so their paths can do no harm.
    """
    folders: dict[str, dict[int, str]] = {folder: {} for part in PARTS.values() for folder in part}
    try:
        bar = tqdm(desc=path.name, total=path.stat().st_size, unit="B", unit_scale=True, disable=None)
        with bar, path.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:*") as archive:
            for member in archive:
                match = MEMBER.fullmatch(member.name)
                if match and member.isfile():
                    text = archive.extractfile(member).read().decode("utf-8")
                    folders[match[1]][int(match[2])] = clean(text)
                bar.update(raw.tell() - bar.n)
            while archive.fileobj.read(1 << 20):  # on to the end, where the compressed file has its checksum
                pass
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {path} ({type(error).__name__}); {EXPECTED}")
    for folder, texts in folders.items():
        if not texts:
            fail(f"{path} holds nothing in aclImdb/{folder}; {EXPECTED}")
    return {part: [{"text": text, "label": label} for folder, label in sources.items()
                   for _, text in sorted(folders[folder].items())] for part, sources in PARTS.items()}


# ---- cleaning, de-duplication, prompts -------------------------------------------------------------------------------

def clean(text: str) -> str:
    """One line of text: HTML line breaks and runs of white space become a single space."""
    # A space and not a newline: the breaks say how the page was laid out, not what was said. As text they would cost
    # tokens, teach the model to write HTML, and part copies that differ only in layout.
    return " ".join(re.sub(r"(?:<[bB][rR] ?/?>)+", " ", text).split())


def drop_copies(rows: list[dict]) -> tuple[list[dict], int, int]:
    """(first row of each text, number of later copies dropped, number of rows dropped as their labels disagree)."""
    labels: dict[str, set] = {}
    for row in rows:
        labels.setdefault(row["text"], set()).add(row["label"])
    agreed = [row for row in rows if len(labels[row["text"]]) == 1]  # with both labels, neither is to be trusted
    first = list({row["text"]: row for row in agreed}.values())  # in the order in which each text first appears
    return first, len(agreed) - len(first), len(rows) - len(agreed)


def deduplicate(parts: dict[str, list[dict]]) -> tuple[dict[str, list[dict]], dict[str, int]]:
    """The parts without copies, and how many rows were dropped by kind.

    Inside each part first, then across: test loses what is in train, unsup loses what is in train or test.
    """
    kept, dropped = {}, {}
    for part, rows in parts.items():
        kept[part], dropped[f"copies_in_{part}"], dropped[f"conflicting_labels_in_{part}"] = drop_copies(rows)
    for part, other in ("test", "train"), ("unsup", "train"), ("unsup", "test"):
        texts = {row["text"] for row in parts[other]}  # as read: what was dropped there must not come back here
        before = len(kept[part])
        kept[part] = [row for row in kept[part] if row["text"] not in texts]
        dropped[f"{part}_also_in_{other}"] = before - len(kept[part])
    return kept, dropped


def cut_prompt(text: str, k: int, tokenizer: Tokenizer) -> str | None:
    """The first `k` tokens of `text`, or the nearest number in MIN_K..MAX_K (the fewer of two) that ends with a word
    and where prompt and rest, encoded separately, give the tokens of the whole text. None if there is no such number.
    """
    tokens = tokenizer.encode(text)
    for n in sorted(range(MIN_K, MAX_K + 1), key=lambda n: (abs(n - k), n)):
        prompt = tokenizer.decode(tokens[:n])
        rest = text[len(prompt):]
        if (text.startswith(prompt) and rest.startswith(" ")  # not inside a character, not inside a word
                and tokenizer.encode(prompt) == tokens[:n] and tokenizer.encode(rest) == tokens[n:]):
            return prompt
    return None


def cut_prompts(rows: list[dict], count: int, tokenizer: Tokenizer, seed: int, exclude: list[dict] = ()) -> list[dict]:
    """Up to `count` distinct rows {"prompt"}, none in `exclude`, at most one from each of `rows`, in their order."""
    rng, prompts = random.Random(seed), []
    seen = {None, *(row["prompt"] for row in exclude)}  # None: no prompt could be cut
    for row in rows:
        prompt = cut_prompt(row["text"], rng.randint(MIN_K, MAX_K), tokenizer)
        if prompt not in seen:
            prompts.append({"prompt": prompt})
            seen.add(prompt)
        if len(prompts) == count:
            break
    return prompts


# ---- the whole -------------------------------------------------------------------------------------------------------

def prepare(archive: Path | None = None, out: Path = OUT, vocab_size: int = 4096, seed: int = 0) -> dict:
    """Make the folder `out` from `archive` (None: download it), or find it complete; returns its meta.json."""
    # 1. is it there already?
    if vocab_size < 259:
        fail(f"--vocab-size {vocab_size} is too small: 256 bytes and 3 special tokens are 259 alone")
    meta = check_prepared(out)
    if meta is not None:
        for key, wanted in ("vocab_size", vocab_size), ("seed", seed):
            if meta[key] != wanted:
                fail(f"{out} was made with {key} {meta[key]}, not {wanted}: remove it, or choose another --out")
        print(f"{out} is complete: nothing to do")
        return meta
    started = time.time()
    report = lambda line: print(f"{time.time() - started:6.1f} s  {line}", flush=True)  # noqa: E731

    # 2. get the archive, read it, drop the copies
    if archive is None:
        out.parent.mkdir(parents=True, exist_ok=True)
        archive = download(URL, out.parent / URL.rsplit("/", 1)[1], "give a copy with --archive FILE", MD5)
    parts, dropped = deduplicate(read_archive(archive))
    report("kept " + ", ".join(f"{len(rows):,} {part}" for part, rows in parts.items()))
    report("dropped " + ", ".join(f"{number:,} {kind}" for kind, number in dropped.items() if number))

    # 3. split: valid comes from the unlabelled reviews, so that no label is lost
    rng = random.Random(seed)
    rng.shuffle(parts["unsup"])
    num_valid = min(NUM_VALID, len(parts["unsup"]) // 2)
    valid = [{"text": row["text"]} for row in parts["unsup"][:num_valid]]
    train, test = parts["train"] + parts["unsup"][num_valid:], parts["test"]
    rng.shuffle(train)
    rng.shuffle(test)

    # 4. tokenizer: train is shuffled, so its start is a sample; learned on all of it, the text is 0.02 % shorter
    tokenizer = train_bpe([row["text"] for row in train[:NUM_BPE]], vocab_size)
    texts = [row["text"] for row in valid]
    bytes_per_token = len("".join(texts).encode()) / sum(map(len, tokenizer.encode_batch(texts)))
    report(f"tokenizer of {tokenizer.vocab_size:,} tokens: {bytes_per_token:.3f} bytes per token on valid")

    # 5. prompts: test first, so that train gives way where both have the same prompt
    prompts_test = cut_prompts(test, NUM_PROMPTS_TEST, tokenizer, seed)
    prompts_train = cut_prompts(train, NUM_PROMPTS_TRAIN, tokenizer, seed, exclude=prompts_test)
    report(f"{len(prompts_train):,} prompts from train, {len(prompts_test):,} from test")

    # 6. write all of it or nothing
    rows = {"train": train, "valid": valid, "test": test, "prompts_train": prompts_train, "prompts_test": prompts_test}

    def write(folder: Path) -> dict:
        for name, content in rows.items():
            write_jsonl(folder / f"{name}.jsonl", content)
        tokenizer.save(folder / "tokenizer.tiktoken")
        return {"seed": seed, "vocab_size": vocab_size, "bytes_per_token": round(bytes_per_token, 4),
                "rows": {name: len(content) for name, content in rows.items()}, "dropped": dropped,
                "archive": {"name": archive.name, "sha256": sha256(archive)}}

    meta = publish(out, "imdb", write)
    report(f"wrote {out}")
    return meta


if __name__ == "__main__":
    parser = Parser(description="Prepare the Large Movie Review Dataset (IMDb).")
    parser.add_argument("--archive", type=Path, help="aclImdb_v1.tar.gz, or the same tree as .tar.xz; else downloaded")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to make (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens (default: %(default)s)")
    prepare(**vars(parser.parse_args()))
