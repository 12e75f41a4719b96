"""data/imdb/prepare.py: reading, cleaning, de-duplication, prompts and download, on small archives made here."""
import hashlib
import http.server
import io
import os
import random
import re
import tarfile
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

import clone
from common.files import read_json, read_jsonl
from data.imdb import prepare as imdb
from data.reviews.grammar import gold_reward, sample_review
from common.tokenizer import Tokenizer, train_bpe
from conftest import skip_without_loopback

# The planted copies: 1 in train, 2 in test, 1 in unsup, 1 text in train and test, 2 in train and unsup, 1 in test and
# unsup, and one text in train with both labels. Some copies are equal only after cleaning.
FILES = {
    "train/pos": ["A fine film.", "A fine<br /><br />film.", "In train and test.", "Love or hate it.", "In both, one."],
    "train/neg": ["A dull film.", "Love or hate it.", "In both, two."],
    "test/pos": ["A new film.", "A new  film.", "A new film.", "In train and test."],
    "test/neg": ["An old film.", "In test and unsup."],
    "train/unsup": ["In both, one.", "In both,<br />two.", "In test and unsup.", "No label.", "No label. ",
                    *(f"The unlabelled film number {n} was seen by nobody." for n in range(8))],
}
DROPPED = {
    "copies_in_train": 1, "conflicting_labels_in_train": 2, "copies_in_test": 2, "conflicting_labels_in_test": 0,
    "copies_in_unsup": 1, "conflicting_labels_in_unsup": 0,
    "test_also_in_train": 1, "unsup_also_in_train": 2, "unsup_also_in_test": 1,
}


def make_archive(path: Path, files: dict[str, list[str]] = FILES, root: str = "aclImdb") -> Path:
    with tarfile.open(path, "w:" + path.suffix[1:]) as archive:
        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(f"{root}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        add("README", b"about the data")
        add("train/labeledBow.feat", b"9 0:9 1:1")
        add("../../escape.txt", b"must be ignored")
        for folder, texts in files.items():
            for i, text in reversed(list(enumerate(texts))):  # the order in the archive must not matter
                add(f"{folder}/{i}_{9 if 'pos' in folder else 0}.txt", text.encode())
    return path


def noise(files: int) -> list[str]:
    """Texts that do not compress, so that a cut or a flipped byte falls inside them."""
    rng = random.Random(0)
    return ["".join(chr(rng.randint(33, 126)) for _ in range(500)) for _ in range(files)]


@pytest.fixture
def error():
    """A function that runs another, expects it to stop with one line, and returns that line."""
    def catch(function, *args) -> str:
        with pytest.raises(SystemExit) as stop:
            function(*args)
        message = str(stop.value.code)
        assert message.startswith("error: ") and "\n" not in message
        return message
    return catch


# ---- cleaning and de-duplication -------------------------------------------------------------------------------------

@pytest.mark.parametrize("raw, clean", [
    ("one<br /><br />two", "one two"),
    ("one.<br />\n <br/>two <BR>three", "one. two three"),
    ("  tab\tand\r\nline ", "tab and line"),
    ("a < b and <i>c</i>", "a < b and <i>c</i>"),
    ("caf\u00e9\u00a0\u4e2d", "caf\u00e9 \u4e2d"),
])
def test_clean(raw, clean):
    assert imdb.clean(raw) == clean
    assert imdb.clean(clean) == clean


@pytest.mark.parametrize("suffix", ["gz", "xz"])
def test_read_and_deduplicate(tmp_path, suffix):
    parts = imdb.read_archive(make_archive(tmp_path / f"imdb.tar.{suffix}"))
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 8, "test": 6, "unsup": 13}
    assert parts["train"][0] == {"text": "A dull film.", "label": 0}
    assert [path.name for path in tmp_path.iterdir()] == [f"imdb.tar.{suffix}"]  # nothing unpacked
    kept, dropped = imdb.deduplicate(parts)
    assert dropped == DROPPED
    assert kept["train"] == [{"text": text, "label": label} for text, label in [
        ("A dull film.", 0), ("In both, two.", 0),
        ("A fine film.", 1), ("In train and test.", 1), ("In both, one.", 1)]]
    assert kept["test"] == [{"text": text, "label": label} for text, label in [
        ("An old film.", 0), ("In test and unsup.", 0), ("A new film.", 1)]]
    assert [row["text"] for row in kept["unsup"]] == ["No label.", *FILES["train/unsup"][5:]]


def test_text_dropped_from_train_stays_out_of_test():
    both = [{"text": "x", "label": 0}, {"text": "x", "label": 1}]
    kept, dropped = imdb.deduplicate({"train": both, "test": both[:1], "unsup": [{"text": "x", "label": None}]})
    assert kept == {"train": [], "test": [], "unsup": []}
    assert dropped["conflicting_labels_in_train"] == 2 and dropped["test_also_in_train"] == 1


# ---- prompts ---------------------------------------------------------------------------------------------------------

TEXTS = [
    "I have to say that this film wasn't what I had expected of it at all.",
    "Na\u00efve caf\u00e9 clich\u00e9s, \u4e2d\u6587\u7535\u5f71 and \U0001f3ac emoji fill the whole running time.",
    "Unbelievably overlong, pseudo-psychological nonsense -- and I've seen some!",
    "10/10 for John O'Brien's 1st film, said Mr. B. ... maybe 8/10?",
]


def test_prompt_and_rest_encode_to_the_tokens_of_the_text():
    tokenizer = train_bpe(TEXTS, 300)
    cuts = 0
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        for k in range(2, 9):
            prompt = imdb.cut_prompt(text, k, tokenizer)
            if prompt is None:
                continue
            cuts += 1
            rest = text[len(prompt):]
            assert prompt + rest == text and rest.startswith(" ")
            assert tokenizer.encode(prompt) + tokenizer.encode(rest) == tokens
            assert 2 <= len(tokenizer.encode(prompt)) <= 8
    assert cuts > 0


def test_prompt_takes_the_nearest_length_that_ends_a_word():
    tokenizer = train_bpe([], 259)  # bytes only: a token is a character
    assert [imdb.cut_prompt("abc defg hij", k, tokenizer) for k in range(2, 9)] == ["abc"] * 4 + ["abc defg"] * 3
    assert imdb.cut_prompt("abcdefghijk lm", 5, tokenizer) is None  # no word ends in the first 8 tokens
    assert imdb.cut_prompt("ab", 2, tokenizer) is None  # nothing would be left to continue with
    assert imdb.cut_prompt("\u4e2d\u6587\u7535\u5f71 x", 4, tokenizer) is None  # ends at 12; 4 is inside a character


def test_prompts_are_distinct_and_leave_out_others():
    tokenizer = train_bpe([], 259)
    rows = [{"text": text} for text in ["abc def", "abc xyz", "abcdefghijk", "qrs tuv", "hij klm"]]
    first = imdb.cut_prompts(rows, 2, tokenizer, seed=0)
    assert first == [{"prompt": prompt} for prompt in ("abc", "qrs")]
    assert imdb.cut_prompts(rows, 9, tokenizer, seed=0, exclude=first) == [{"prompt": "hij"}]


# ---- the whole -------------------------------------------------------------------------------------------------------

def test_prepare(tmp_path, capsys, error):
    archive, out = make_archive(tmp_path / "imdb.tar.gz"), tmp_path / "new" / "prepared"
    meta = imdb.prepare(archive, out, vocab_size=300)
    assert meta["dropped"] == DROPPED
    assert meta["rows"] | {"prompts_train": 0, "prompts_test": 0} == {
        "train": 10, "valid": 4, "test": 3, "prompts_train": 0, "prompts_test": 0}
    assert meta["archive"]["sha256"] == hashlib.sha256(archive.read_bytes()).hexdigest()
    assert meta == read_json(out / "meta.json")
    assert {"meta.json", *meta["sha256"]} == {path.name for path in out.iterdir()}
    assert [path.name for path in out.parent.iterdir()] == ["prepared"]

    train = read_jsonl(out / "train.jsonl", {"text": str, "label": (int, type(None))})
    valid = read_jsonl(out / "valid.jsonl", {"text": str})
    test = read_jsonl(out / "test.jsonl", {"text": str, "label": int})
    texts = [{row["text"] for row in rows} for rows in (train, valid, test)]
    assert [len(part) for part in texts] == [10, 4, 3] and len(set.union(*texts)) == 17
    assert sorted(str(row["label"]) for row in train) == ["0"] * 2 + ["1"] * 3 + ["None"] * 5
    prompts_train, prompts_test = ({row["prompt"] for row in read_jsonl(out / f"prompts_{part}.jsonl", {"prompt": str})}
                                   for part in ("train", "test"))
    assert all(any(text.startswith(prompt + " ") for text in texts[0]) for prompt in prompts_train)
    assert all(any(text.startswith(prompt + " ") for text in texts[2]) for prompt in prompts_test)
    assert len(prompts_train) == meta["rows"]["prompts_train"] and not prompts_train & prompts_test
    assert Tokenizer.load(out / "tokenizer.tiktoken").vocab_size == 300

    capsys.readouterr()  # again: no work; other settings: one line that names the difference
    assert imdb.prepare(tmp_path / "is not opened", out, vocab_size=300) == meta
    assert capsys.readouterr().out == f"{out} is complete: nothing to do\n"
    assert "vocab_size 300, not 301" in error(imdb.prepare, archive, out, 301)
    assert "too small" in error(imdb.prepare, archive, tmp_path / "small", 258)

    again = imdb.prepare(make_archive(tmp_path / "imdb.tar.xz"), tmp_path / "again", vocab_size=300)
    assert again["sha256"] == meta["sha256"]  # the same bytes from either archive
    (out / "valid.jsonl").write_text("")
    assert "valid.jsonl" in error(imdb.prepare, archive, out, 300)


def test_bad_archives_stop_with_one_line_and_leave_nothing(tmp_path, error):
    for suffix in "gz", "xz":
        whole = make_archive(tmp_path / f"whole.tar.{suffix}", {**FILES, "test/neg": noise(40)}).read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for name, content in ("cut", whole[:len(whole) // 2]), ("end", whole[:-4]), ("flipped", bytes(flipped)):
            path = tmp_path / f"{name}.tar.{suffix}"
            path.write_bytes(content)
            message = error(imdb.prepare, path, tmp_path / "out", 300)
            assert str(path) in message and "expected the Large Movie Review Dataset" in message
    (tmp_path / "text.tar.gz").write_text("no archive at all")
    for path in (tmp_path / "text.tar.gz", tmp_path / "missing.tar.gz", tmp_path,
                 make_archive(tmp_path / "other.tar.gz", root="otherImdb"),
                 make_archive(tmp_path / "part.tar.gz", {"train/pos": ["x"], "train/neg": ["y"]})):
        message = error(imdb.prepare, path, tmp_path / "out", 300)
        assert str(path) in message and "expected the Large Movie Review Dataset" in message
    assert "aclImdb/test/neg" in message
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_real_archive(monkeypatch):
    if "PREFERENCE_DATA" not in os.environ:
        pytest.skip("PREFERENCE_DATA (a folder with imdb/aclImdb_v1.tar.xz) is not set")
    clean = imdb.clean
    monkeypatch.setattr(imdb, "clean", lambda text: text)
    raw = imdb.read_archive(Path(os.environ["PREFERENCE_DATA"], "imdb", "aclImdb_v1.tar.xz"))
    assert {part: len(rows) for part, rows in raw.items()} == {"train": 25_000, "test": 25_000, "unsup": 50_000}

    def counts(parts: dict) -> tuple[list[int], list[int]]:
        kept, dropped = imdb.deduplicate(parts)
        return [len(rows) for rows in kept.values()], [number for number in dropped.values() if number]

    # kept of train, test, unsup; copies inside each; test in train, unsup in train, unsup in test
    assert counts(raw) == ([24_904, 24_678, 48_887], [96, 199, 493, 123, 354, 266])
    cleaned = {part: [{**row, "text": clean(row["text"])} for row in rows] for part, rows in raw.items()}
    assert counts(cleaned) == ([24_902, 24_676, 48_885], [98, 201, 495, 123, 354, 266])


WAY = "give a copy with --archive FILE"


# ---- download --------------------------------------------------------------------------------------------------------

CONTENT = random.Random(1).randbytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


@contextmanager
def serve(ranges: bool = True, drop_after: int | None = None):
    """A file server on 127.0.0.1: gives its URL and the list of (Range header, status) that it saw.

    `ranges`: whether it honours Range; `drop_after`: bytes after which it closes the connection.
    """
    skip_without_loopback()
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted, status, start = self.headers["Range"], 200, 0
            if self.path != "/imdb.tar.gz":
                status = 404
            elif wanted and ranges:
                start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
                status = 206 if start < len(CONTENT) else 416
            seen.append((wanted, status))
            body = CONTENT[start:] if status < 400 else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:drop_after])

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/imdb.tar.gz", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "imdb.tar.gz"


@pytest.fixture
def part(tmp_path):
    return tmp_path / "imdb.tar.gz.part"


def test_download_fresh_then_reused(target, part):
    with serve() as (url, seen):
        assert imdb.download(url, target, WAY, MD5) == target
        assert target.read_bytes() == CONTENT and not part.exists()
        imdb.download(url, target, WAY, MD5)
    assert seen == [(None, 200)]


@pytest.mark.parametrize("ranges, status", [(True, 206), (False, 200)])
def test_download_resumes_or_starts_over(target, part, ranges, status):
    part.write_bytes(CONTENT[:100_000])
    with serve(ranges) as (url, seen):
        imdb.download(url, target, WAY, MD5)
    assert seen == [("bytes=100000-", status)]
    assert target.read_bytes() == CONTENT and not part.exists()


def test_download_lost_connection_keeps_the_part(target, part, error):
    with serve(drop_after=200_000) as (url, _):
        message = error(imdb.download, url, target, WAY, MD5)
        assert url in message and "--archive FILE" in message and "200,000 of 300,000 bytes" in message
        assert part.read_bytes() == CONTENT[:200_000] and not target.exists()
        imdb.download(url, target, WAY, MD5)
    assert target.read_bytes() == CONTENT


def test_download_complete_part(target, part, error):
    part.write_bytes(CONTENT)
    with serve() as (url, seen):
        imdb.download(url, target, WAY, MD5)
        assert target.read_bytes() == CONTENT
        target.unlink()
        part.write_bytes(CONTENT + b"too much")  # nothing that a server could add
        assert "expected " + MD5 in error(imdb.download, url, target, WAY, MD5)
    assert [status for _, status in seen] == [416, 416]
    assert not part.exists() and not target.exists()


@pytest.mark.parametrize("start", [b"", b"not the start of this file"])
def test_download_wrong_checksum_is_removed(target, part, error, start):
    part.write_bytes(start)
    with serve() as (url, _):
        message = error(imdb.download, url, target, WAY, MD5 if start else "0" * 32)
    assert url in message and "expected" in message and "--archive FILE" in message
    assert not part.exists() and not target.exists()


def test_download_without_a_server(target, part, error):
    part.write_bytes(CONTENT[:10])
    with serve() as (url, _):
        assert "404" in error(imdb.download, url.replace("imdb.tar", "other.tar"), target, WAY, MD5)
    message = error(imdb.download, url, target, WAY, MD5)  # nobody listens there any more
    assert url in message and "--archive FILE" in message
    assert part.read_bytes() == CONTENT[:10] and not target.exists()


def test_prepare_downloads_beside_the_output(tmp_path, monkeypatch):
    content = make_archive(tmp_path / "imdb.tar.gz").read_bytes()
    monkeypatch.setitem(globals(), "CONTENT", content)
    monkeypatch.setattr(imdb, "MD5", hashlib.md5(content).hexdigest())
    with serve() as (url, _):
        monkeypatch.setattr(imdb, "URL", url)
        assert imdb.prepare(None, tmp_path / "new" / "prepared", vocab_size=300)["dropped"] == DROPPED
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["imdb.tar.gz", "prepared"]


# ---- the whole pipeline ----------------------------------------------------------------------------------------------

def test_the_whole_imdb_pipeline(tmp_path):
    """prepare.py --archive, then dpo.py --dataset imdb, as a process, on an archive of 400 small reviews: SFT, the gold
    classifier, pairs, DPO and the evaluation all find what the stage before them left."""
    root = clone.make(tmp_path / "clone")
    rng = random.Random(0)
    reviews = [sample_review(rng)[0] for _ in range(400)]
    files = {folder: [] for folder in FILES}
    for i, text in enumerate(reviews):
        label = "pos" if gold_reward(text) > 0.5 else "neg"
        files["train/unsup" if i % 4 == 0 else f"{'test' if i % 4 == 1 else 'train'}/{label}"].append(text)
    archive = make_archive(tmp_path / "small.tar.gz", files)
    sft = "--dataset imdb --out runs/imdb/sft".split() + clone.TINY

    def run(script, *argv):
        process = clone.start(root, script, *argv, cwd=tmp_path)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out

    run("data/imdb/prepare", "--archive", archive, "--vocab-size", 400)
    assert clone.run_here(root, tmp_path, "sft", *sft) == 0
    task = root / "data/imdb/__init__.py"
    task.write_text(task.read_text().replace("pair_prompts=4000", "pair_prompts=20").replace(
        "bank_prompts=256, bank_samples=64", "bank_prompts=8, bank_samples=8"))
    out = run("dpo", "--dataset", "imdb", "--sft", "runs/imdb/sft", "--beta", 0.1)
    assert "test accuracy 100 words" in out and "DPO beta 0.1" in out and "optimum" in out
    table = read_json(tmp_path / "runs/imdb/dpo-beta0.1-seed0/evaluation.json")["table"]
    assert 0 < table["SFT"]["reward"] < 1 and table["DPO beta 0.1"]["kl"] > -0.5
    assert "limit of this run in theory" not in table  # the labels are the paper's, without noise: the theory has no end here
    samples = read_jsonl(tmp_path / "runs/imdb/dpo-beta0.1-seed0/samples.jsonl", {"task": str, "id": str, "after": str})
    assert not any("prompt" in row for row in samples)  # other people's words: a row names its prompt by an id
    rows = read_jsonl(tmp_path / "runs/imdb/pairs-argmax/pairs.jsonl", {"chosen_reward": float, "rejected_reward": float})
    assert all(row["chosen_reward"] >= row["rejected_reward"] for row in rows)
