"""data/tldr: reading, dropping, splitting, ROUGE-L, agreement with people, and the pipeline, on small archives made here."""
import functools
import http.server
import json
import lzma
import os
import random
import re
import threading
from pathlib import Path

import pytest
import torch

import clone
from common import pipeline, tasks
from common.files import read_json, read_jsonl, write_json, write_jsonl
from common.rewards import exact_reward, pair_scores
from common.run import load_run, save_tensors
from common.tokenizer import Tokenizer, train_bpe
from common.training import fingerprint
from conftest import skip_without_loopback, smaller
from data import tldr
from data.posts.grammar import sample_post
from data.tldr import prepare as tldr_prepare
from experiments import agreement
from model import GPTConfig, ScalarModel

PROMPT, PAIR = {"prompt": str}, {"prompt": str, "chosen": str, "rejected": str}


def post(number: int, **changes: str) -> dict:
    """A row as OpenAI's files have it, other words for every number."""
    prompt, summary = sample_post(random.Random(number))
    subreddit, title, text = re.fullmatch(r"SUBREDDIT: r/(.*)\n\nTITLE: (.*)\n\nPOST: (.*)\n\nTL;DR:", prompt).groups()
    return {"id": f"t3_{number}", "subreddit": subreddit, "title": title, "post": f"{number}. {text}",
            "summary": summary.strip(), **changes}


def comparison(row: dict, texts: tuple[str, str], choice: int, worker: str = "w", split: str = "valid2", ref: int = 2) -> dict:
    return {"info": {name: row[name] for name in ("id", "post", "title", "subreddit")}, "split": split, "worker": worker,
            "summaries": [{"text": text, "policy": "ref" if i == ref else "sup", "note": None} for i, text in enumerate(texts)],
            "choice": choice, "batch": "batch1", "extra": {"confidence": 7}}


TEST, VALID, TRAIN = ([post(i) for i in numbers] for numbers in (range(100, 112), range(200, 208), range(300, 340)))
COMPARED = [post(i) for i in range(400, 420)]
LONG = " ".join(f"word{n}" for n in range(200))
PLANTED = {  # what must go, beside what stays
    "test": [TEST[0] | {"id": "t3_other"}, TEST[1] | {"post": "The same id."}, post(1, summary="  "), post(2, post=LONG)],
    "valid": [TEST[2], post(3, title="TL;DR in the title")],
    "train": [TRAIN[0], TEST[3] | {"id": "t3_more"}, VALID[0], post(4, post="It ends. Tldr: it ends."),
              post(5, post=LONG + " in train"), post(6, summary=LONG), next(
                  row for row in COMPARED if tldr_prepare.split_comparisons([row | {"split": "valid1"}])[1])],
}
UNSUMMARISED = [post(500), post(501), TRAIN[1], TEST[4], post(500)]
DROPPED = {
    "test": {"empty_field": 1, "tldr_inside": 0, "copies_inside": 2, "held_out_elsewhere": 0, "prompt_too_long": 1,
             "summary_too_long": 0},
    "valid": {"empty_field": 0, "tldr_inside": 1, "copies_inside": 0, "held_out_elsewhere": 1, "prompt_too_long": 0,
              "summary_too_long": 0},
    "train": {"empty_field": 0, "tldr_inside": 1, "copies_inside": 1, "held_out_elsewhere": 3, "prompt_too_long": 1,
              "summary_too_long": 1},
    "unsummarised": {"empty_field": 0, "tldr_inside": 0, "copies_inside": 1, "held_out_elsewhere": 2},
}


def make_archive(folder: Path, xz: bool = False) -> Path:
    """The posts above, ten articles, and two comparisons of each of COMPARED."""
    def lines(rows: list[dict]) -> bytes:
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "comparisons").mkdir(parents=True)
    unsummarised = [{name: row[name] for name in ("id", "subreddit", "title", "post")} for row in UNSUMMARISED]
    for name, rows in {"train": TRAIN + PLANTED["train"], "valid": VALID + PLANTED["valid"], "test": TEST + PLANTED["test"],
                       "posts_without_tldr": unsummarised}.items():
        path = folder / f"{name}.jsonl{'.xz' if xz else ''}"
        path.write_bytes(lzma.compress(lines(rows)) if xz else lines(rows))
    pairs = [comparison(row, (" " + row["summary"], " Another one."), 0, ref=0) for row in COMPARED]
    pairs += [comparison(row, (" I am a summary.", " Another one."), i % 2, "v") for i, row in enumerate(COMPARED)]
    (folder / "comparisons" / "batch1.json").write_bytes(lines(pairs + [comparison(post(7), (" Same.", " Same. "), 0)]))
    (folder / "comparisons" / "cnndm1.json").write_text("of articles, not of posts: is not read")
    write_jsonl(folder / "articles.jsonl", [{"article": f"News number {i} came.  It was good. {'Then more came. ' * 200}",
                                             "highlights": f"News {i} .\nGood news ."} for i in range(10)])
    return folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return make_archive(tmp_path_factory.mktemp("archive") / "tldr")


@pytest.fixture(scope="module")
def root(tmp_path_factory, archive) -> Path:
    """A copy of the repository with this archive prepared in it."""
    root = clone.make(tmp_path_factory.mktemp("clone"))
    tldr_prepare.prepare(archive, root / "data/tldr/prepared", archive / "articles.jsonl", vocab_size=900)
    return root


@pytest.fixture
def prepared(root, monkeypatch) -> Path:
    monkeypatch.setattr(tasks, "ROOT", root)
    return root / "data/tldr/prepared"


@pytest.fixture
def error():
    def message_of(function, *args, **kwargs) -> str:
        with pytest.raises(SystemExit) as stop:
            function(*args, **kwargs)
        assert "\n" not in stop.value.code and stop.value.code.startswith("error: ")
        return stop.value.code
    return message_of


# ---- preparing -------------------------------------------------------------------------------------------------------

def test_white_space_is_cleaned_and_nothing_else():
    assert tldr_prepare.clean(" A\r\nb \t\n\n\n \n c\u00a0 d.\r") == "A\nb\n\nc d."
    assert tldr_prepare.clean("*Na\u00efve* &gt; 1\n\n- x") == "*Na\u00efve* &gt; 1\n\n- x"


@pytest.mark.parametrize("text, found", [("tl;dr: x", True), ("(TLDR)", True), ("TL; DR", True), ("tl:dr", True),
                                         ("subtldrop", False), ("a tl dress", False)])
def test_what_counts_as_a_tldr(text, found):
    assert bool(tldr_prepare.HAS_TLDR.search(text)) == found


def test_files_and_counts(prepared, archive):
    meta = read_json(prepared / "meta.json")
    assert {part: meta["dropped"][part] for part in DROPPED} == DROPPED
    files = {name: read_jsonl(prepared / f"{name}.jsonl", {}) for name in meta["rows"]}
    assert {name: len(rows) for name, rows in files.items()} == meta["rows"]
    assert {part: meta["rows"][part] for part in ("test", "valid", "train", "pretrain", "articles")} == {
        "test": 12, "valid": 8, "train": 40, "pretrain": 44, "articles": 10}
    assert set(meta["sources"]) == {"train.jsonl", "valid.jsonl", "test.jsonl", "posts_without_tldr.jsonl", "batch1.json",
                                    "articles.jsonl"}
    for part in "train", "test":
        assert [row["prompt"] for row in files[f"prompts_{part}"]] == [row["prompt"] for row in files[part]]

    # whole posts, in the paper's format, and the response with its space
    originals = {tldr_prepare.prompt_of(row): " " + row["summary"] for row in TEST + VALID + TRAIN}
    for part in "train", "valid", "test":
        assert all(originals[row["prompt"]] == row["text"] for row in files[part])
    row = TEST[0]
    assert (f"SUBREDDIT: r/{row['subreddit']}\n\nTITLE: {row['title']}\n\nPOST: {row['post']}\n\nTL;DR:"
            in {row["prompt"] for row in files["test"]})
    texts = {row["text"] for row in files["pretrain"]}
    assert {row["prompt"] + row["text"] for row in files["train"]} < texts  # and those too long for it
    assert {tldr_prepare.prompt_of(row).removesuffix("\n\nTL;DR:") for row in UNSUMMARISED[:2]} < texts
    assert sum(LONG in text for text in texts) == 2

    # no post in two files, where one of them is held out
    def posts(*names):
        return {re.search("POST: (.*?)(\n\nTL;DR:|$)", row.get("prompt") or row["text"], re.DOTALL)[1]
                for name in names for row in files[name]}
    seen = posts("train", "pretrain", "comparisons_train")
    assert not posts("test") & (seen | posts("valid")) and not posts("valid") & seen
    assert posts("comparisons_test") and not posts("comparisons_test") & seen

    # nothing is longer than it may be
    tokenizer = Tokenizer.load(prepared / "tokenizer.tiktoken")
    for part in "train", "valid", "test", "articles":
        assert max(len(tokenizer.encode(row["prompt"])) for row in files[part]) + 1 <= tldr_prepare.MAX_PROMPT
    for part in "train", "valid", "test":
        assert max(len(tokenizer.encode(row["text"])) for row in files[part]) + 1 <= tldr_prepare.MAX_SUMMARY


def test_comparisons_are_pairs_with_what_is_known_of_them(prepared):
    train, test = (read_jsonl(prepared / f"comparisons_{part}.jsonl", PAIR | {"id": str, "worker": str, "confidence": int})
                   for part in ("train", "test"))
    assert len(train) + len(test) == 2 * len(COMPARED) and len(test) > 2  # the identical one is dropped
    assert not {row["id"] for row in train} & {row["id"] for row in test}
    known = {row["id"]: row["summary"] for row in COMPARED}
    for row in train + test:
        assert row["reference"] == known[row["id"]]  # from the comparison that has it as one of the two
        if row["worker"] == "w":
            assert (row["chosen"], row["rejected"]) == (" " + known[row["id"]], " Another one.")
        else:
            assert {row["chosen"], row["rejected"]} == {" I am a summary.", " Another one."}


def test_the_authors_split_wins_over_the_hash():
    rows = [{"id": str(i), "post": f"post {i}", "split": split} for i, split in enumerate(["train"] * 9 + ["valid1", "valid2"])]
    rows.append(rows[10] | {"split": "train"})  # a post on both sides: test has it
    train, test = tldr_prepare.split_comparisons(rows)
    assert train == rows[:9] and test == rows[9:]
    parts = [tldr_prepare.split_comparisons([{"id": f"t3_{i}", "post": f"{i}", "split": "valid1"} for i in range(n)])
             for n in (1000, 500)]
    assert 150 < len(parts[0][1]) < 250
    assert [row for row in parts[0][1] if int(row["post"]) < 500] == parts[1][1]  # other posts change nothing


def test_the_same_bytes_from_xz_and_no_work_twice(prepared, tmp_path, capsys, error):
    meta = read_json(prepared / "meta.json")
    again = make_archive(tmp_path / "xz", xz=True)
    out = tmp_path / "out"
    assert tldr_prepare.prepare(again, out, again / "articles.jsonl", vocab_size=900)["sha256"] == meta["sha256"]
    capsys.readouterr()
    assert tldr_prepare.prepare(tmp_path / "is not opened", out, vocab_size=900)["rows"] == meta["rows"]
    assert capsys.readouterr().out == f"{out} is complete: nothing to do\n"
    assert "max_prompt 256, not 512" in error(tldr_prepare.prepare, again, out, max_prompt=512, vocab_size=900)
    assert "--max-prompt 1" in error(tldr_prepare.prepare, again, tmp_path / "new", max_prompt=1)
    assert not (tmp_path / "new").exists()


def test_what_is_optional_may_be_missing(archive, tmp_path):
    for part in "train", "valid", "test":
        (tmp_path / f"{part}.jsonl").write_bytes((archive / f"{part}.jsonl").read_bytes())
    rows = tldr_prepare.prepare(tmp_path, tmp_path / "out", vocab_size=900)["rows"]
    assert set(rows) == {"train", "valid", "test", "pretrain", "prompts_train", "prompts_test"}
    assert rows["pretrain"] == rows["train"] + 2 == 43  # two are too long; nothing is held out for comparisons


BAD = [
    ("train.jsonl", {"id": "t3_1", "subreddit": "x", "title": "y", "post": "z"}, "no field 'summary'"),
    ("valid.jsonl", {"id": "t3_1", "subreddit": "x", "title": "y", "post": None, "summary": "s"}, "field 'post' is null"),
    ("posts_without_tldr.jsonl", {"subreddit": "x", "title": "y", "post": "z"}, "no field 'id'"),
    ("comparisons/batch1.json", {"info": {}, "summaries": [], "choice": 0}, "0 summaries and choice 0, expected two"),
    ("comparisons/batch1.json", comparison(post(8), ("a", "b"), 2), "choice 2, expected two summaries and choice 0 or 1"),
    ("comparisons/batch1.json", comparison(post(8), ("a", None), 0), "field 'summaries[].text' is None, expected text"),
    ("comparisons/batch1.json", comparison(post(8, title=3), ("a", "b"), 0), "field 'info.title' is 3, expected text"),
    ("comparisons/batch1.json", {"summaries": [], "choice": 0}, "no field 'info'"),
]


@pytest.mark.parametrize("name, row, reason", BAD)
def test_a_bad_row_is_named_with_file_and_line(tmp_path, error, name, row, reason):
    folder = make_archive(tmp_path / "tldr")
    path = folder / name
    path.write_text(path.read_text().splitlines()[0] + "\n" + json.dumps(row) + "\n")
    message = error(tldr_prepare.prepare, folder, tmp_path / "out")
    assert f"{path}, line 2: " in message and reason in message
    assert not (tmp_path / "out").exists()


def test_bad_folders_and_files(tmp_path, error):
    assert "neither train.jsonl nor train.jsonl.xz" in error(tldr_prepare.prepare, tmp_path, tmp_path / "out")
    folder = make_archive(tmp_path / "tldr", xz=True)
    path = folder / "test.jsonl.xz"
    for content in (path.read_bytes()[:-40], b"no xz"):
        path.write_bytes(content)
        assert f"{path}: cannot be read" in error(tldr_prepare.prepare, folder, tmp_path / "out")


def test_an_article_ends_with_a_whole_sentence():
    tokenizer = train_bpe([], 259)  # bytes only: a token is a character
    article = "Rain fell.\n\nMr. J. Hill, No. 7 of the \"U.S.,\" said: \"It rained.\" 5 cats came. And then it was over."
    whole = tldr_prepare.cut_article(article, tokenizer, 500)
    assert whole == ('SUBREDDIT: r/news\n\nTITLE: Rain fell.\n\nPOST: Mr. J. Hill, No. 7 of the "U.S.," said: "It rained." 5 '
                     "cats came. And then it was over.\n\nTL;DR:")
    assert tldr_prepare.cut_article(article, tokenizer, len(whole) + 1) == whole  # <bos> is the one more
    shorter = whole.replace(" And then it was over.", "")
    assert tldr_prepare.cut_article(article, tokenizer, len(whole)) == shorter
    assert tldr_prepare.cut_article(article, tokenizer, 90) is None and tldr_prepare.cut_article("One.", tokenizer, 99) is None


def test_prepare_downloads_beside_the_output(archive, tmp_path, monkeypatch, error):
    """The files lie on a server on 127.0.0.1 as OpenAI has them."""
    skip_without_loopback()
    site = tmp_path / "site"
    for path in archive.rglob("*.json*"):
        part = "dataset" if path.suffix == ".json" else "datasets/tldr_3_filtered"
        target = site / part / path.relative_to(archive)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.HTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=site))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        monkeypatch.setattr(tldr_prepare, "URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(tldr_prepare, "BATCHES", ["batch1"])
        monkeypatch.setattr(tldr_prepare, "POSTS", {"train": 47, "valid": 10, "test": 17})
        out = tmp_path / "new" / "prepared"
        message = error(tldr_prepare.prepare, None, out, vocab_size=900)
        assert "test.jsonl has 16 rows, expected 17" in message and "--archive FOLDER" in message and not out.exists()
        monkeypatch.setitem(tldr_prepare.POSTS, "test", 16)
        assert tldr_prepare.prepare(None, out, vocab_size=900)["dropped"]["test"] == DROPPED["test"]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_real_archive():
    if "PREFERENCE_DATA" not in os.environ:
        pytest.skip("PREFERENCE_DATA (a folder with tldr/*.jsonl.xz) is not set")
    parts, comparisons, paths = tldr_prepare.read_archive(Path(os.environ["PREFERENCE_DATA"], "tldr"))
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 8_920, "valid": 540, "test": 782,
                                                                 "unsummarised": 52_699}
    assert len(comparisons) == 1_273 and len(paths) == 6
    train, test = tldr_prepare.split_comparisons(comparisons)
    assert not tldr_prepare.keys(train) & tldr_prepare.keys(test) and (len(train), len(test)) == (1_055, 218)
    kept, dropped = tldr_prepare.usable(parts["train"])
    assert dropped == {"empty_field": 0, "tldr_inside": 11}
    kept, dropped = tldr_prepare.drop_copies(kept, tldr_prepare.keys(parts["test"] + parts["valid"]))
    assert dropped == {"copies_inside": 4, "held_out_elsewhere": 0} and len(kept) == 8_905


# ---- the gold reward -------------------------------------------------------------------------------------------------

ROUGE = [  # reference, candidate, F1
    ("police killed the gunman", "police kill the gunman", 3 / 4),  # these three: Lin 2004, section 3.1
    ("police killed the gunman", "the gunman kill police", 2 / 4),
    ("police killed the gunman", "the gunman police killed", 2 / 4),
    ("testing one two", "testing one", 4 / 5),  # these four: the tests of rouge-score 0.1.2
    ("testing one two", "testing two", 4 / 5),
    ("first something", "text first", 1 / 2),
    ("testing one two", "", 0),
    ("", "", 0),
    ("The cat's 2 toys!", "the CAT s 2-toys", 1),
    ("a b c d e f", "b a d c f e", 1 / 2),  # by hand: a c e, of six and six
    ("a a b", "a b b a", 4 / 7),  # by hand: a b, of three and four
]


@pytest.mark.parametrize("reference, candidate, expected", ROUGE)
def test_rouge_l_is_as_published_and_by_hand(reference, candidate, expected):
    assert tldr.rouge_l(tldr.words(reference), tldr.words(candidate)) == pytest.approx(expected)


def test_rouge_l_is_that_of_the_package():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    rng = random.Random(0)
    texts = [sample_post(rng)[1] for _ in range(60)] + ["", "Na\u00efve \u0130 \u212a 3rd!", "''--..", "a_b c\tD\n\ne"]
    for _ in range(500):
        a, b = rng.choice(texts), rng.choice(texts)
        assert tldr.rouge_l(tldr.words(a), tldr.words(b)) == pytest.approx(scorer.score(a, b)["rougeL"].fmeasure, abs=1e-12)


def test_gold_reward(prepared, error):
    for name in "train", "valid", "test", "articles":
        for row in read_jsonl(prepared / f"{name}.jsonl", {"prompt": str, "text": str}):
            assert tldr.gold_reward(row["prompt"] + row["text"]) == 1
            assert tldr.gold_reward(row["prompt"]) == 0
    rewards = exact_reward("tldr")([row["prompt"]] * 2, [" News. TL;DR: news!", " Good!"])
    number = len(tldr.words(row["text"]))
    assert rewards.tolist() == pytest.approx([4 / (number + 4), 2 / (number + 1)])
    message = error(tldr.gold_reward, "SUBREDDIT: r/x\n\nTITLE: y\n\nPOST: unknown\n\nTL;DR: z")
    assert "no author's summary" in message and "unknown" in message
    assert "stand-in" in tldr.TASK.gold_name


# ---- agreement -----------------------------------------------------------------------------------

def test_agreement_by_hand():
    row = {"prompt": "", "worker": "w", "reference": "the cat sat"}
    cat = {"chosen": " the cat", "rejected": " a dog ran"}
    dog = {"chosen": " a dog ran", "rejected": " the cat"}
    rows = [row | cat | {"id": "1"},  # ROUGE-L: right; the longer one: wrong
            row | dog | {"id": "1", "worker": "v"},  # wrong; right
            row | cat | {"id": "1", "worker": "u"},  # right; wrong
            row | {"id": "2", "chosen": " the cat sat", "rejected": " a dog"},  # not asked; right
            row | {"id": "3", "chosen": " x y", "rejected": " z z"},  # both 0; as long
            row | {"id": "4", "chosen": " x y", "rejected": " z", "reference": None}]  # unknown; right
    assert agreement.by_rouge(rows) == [("1", 1), ("1", 0), ("1", 1), ("3", 0.5)]
    assert agreement.by_length(rows) == [
        ("1", 0), ("1", 1), ("1", 0), ("2", 1), ("3", 0.5), ("4", 1)]
    assert sorted(agreement.between_people(rows)) == [("1", 0), ("1", 0), ("1", 1)]
    [line] = agreement.table({"ROUGE-L": agreement.by_rouge(rows), "nobody": []})
    assert line == {"name": "ROUGE-L", "agreement": 2.5 / 4, "interval": (0.5, 2 / 3),
                    "comparisons": 4, "posts": 2}


def test_interval_draws_posts_and_covers():
    """50 fair coins: mean +- 1.96 standard errors. Each of them ten times over says nothing more."""
    coins = [(str(i), float(i % 2)) for i in range(50)]
    for times in 1, 10:
        low, high = agreement.interval(coins * times)
        assert low == pytest.approx(0.5 - 1.96 * 0.5 / 50 ** 0.5, abs=0.025)
        assert high == pytest.approx(1 - low, abs=0.025)


@pytest.fixture
def reward_model_run(tmp_path):
    """run(dataset): the folder of a finished reward model of that task, with random weights."""
    def run(dataset: str) -> Path:
        folder = tmp_path / dataset
        tokenizer = train_bpe(["the cat sat on a dog"], 270)
        tokenizer.save(folder / "tokenizer.tiktoken")
        torch.manual_seed(0)
        model = ScalarModel(GPTConfig(tokenizer.vocab_size, 24, 1, 1, 8))
        save_tensors(folder / "model.pt", {
            "model": model.state_dict(), "kind": "ScalarModel", "dataset": dataset,
            "architecture": vars(model.config), "tokenizer": tokenizer.fingerprint})
        write_json(folder / "config.json", {})
        return folder
    return run


def test_a_reward_models_choice(reward_model_run):
    """The response to which it gives the higher score at the last token, by the slow way."""
    folder = reward_model_run("tldr")
    rows = [{"id": str(i), "prompt": "on", "chosen": f" cat{i}", "rejected": f" dog{9 - i}"}
            for i in range(10)]
    model, _ = load_run(folder, ScalarModel)
    tokenizer = Tokenizer.load(folder / "tokenizer.tiktoken")

    def score(row, name):
        tokens = tokenizer.encode(row["prompt"]) + tokenizer.encode(row[name])
        return model(torch.tensor([[tokenizer.bos, *tokens, tokenizer.eos]]))[0, -1].item()
    expected = [(row["id"], float(score(row, "chosen") > score(row, "rejected"))) for row in rows]
    assert agreement.by_reward_model(folder, rows) == expected
    assert {agreed for _, agreed in expected} == {0, 1}


def test_agreements_mistakes_are_one_line(reward_model_run, tmp_path, error):
    """A folder without a run, a reward model of another task, and data that is not there."""
    assert "no finished run there" in error(agreement.main, [str(tmp_path)])
    assert "no finished run there" in error(agreement.main, [str(tmp_path / "nothing")])
    message = error(agreement.by_reward_model, reward_model_run("posts"), [])
    assert "was trained with dataset 'posts', expected 'tldr'" in message
    assert "prepare.py makes it" in error(agreement.main, [], tmp_path / "prepared")


# ---- the whole pipeline ----------------------------------------------------------------------------------------------

def test_the_pipeline_runs_on_tldr(root, prepared, tmp_path, monkeypatch, capsys, error):
    """dpo.py alone, then a reward model on the human comparisons and its agreement with them: SFT starts from the pretrained
    model, which is trained first, and every response has the reward that ROUGE-L gives it."""
    tiny = dict(block_size=512, batch_size=8, steps=2, warmup=1)
    settings = {"sft pretrain": dict(n_layer=1, n_embd=16, n_head=2, **tiny), "sft": tiny}
    monkeypatch.setattr(tldr, "TASK", smaller(tldr.TASK, bank_prompts=4, bank_samples=8, settings=settings))
    task = ["--dataset", "tldr"]
    assert clone.run_here(root, tmp_path, "dpo", *task, "--prompts", "4", "--batch-size", "8") == 0
    runs = tmp_path / "runs/tldr"
    pretrained = fingerprint(load_run(runs / "pretrained")[0].state_dict())
    assert read_json(runs / "sft/config.json")["built_from"]["init"] == pretrained
    assert read_json(runs / "dpo-beta0.1-seed0-prompts4-batchsize8/config.json")["labels"] == "argmax"
    for row in read_jsonl(runs / "pairs-argmax-4/pairs.jsonl", PAIR | {"chosen_reward": float, "rejected_reward": float}):
        assert row["chosen_reward"] > row["rejected_reward"]
        assert row["chosen_reward"] == pytest.approx(tldr.gold_reward(row["prompt"] + row["chosen"]), abs=1e-4)
    assert clone.run_here(root, tmp_path, "reward_model", *task, "--pairs", prepared / "comparisons_train.jsonl",
                          "--block-size", "640", "--batch-size", "8", "--out", "runs/tldr/reward-model") == 0
    capsys.readouterr()
    lines = agreement.main([str(runs / "reward-model")], prepared)
    shown = capsys.readouterr().out
    assert [row["name"].partition(",")[0] for row in lines][-1] == str(runs / "reward-model") and "73 to 77%" in shown
    assert all(0 <= row["interval"][0] <= row["agreement"] <= row["interval"][1] <= 1 for row in lines)
    # with enough comparisons a model of them is the gold reward, and ROUGE-L no longer
    monkeypatch.chdir(tmp_path)
    start = pipeline.load(Path("runs/tldr/sft"), "tldr", "cpu")
    assert pipeline.gold_reward(start).name == tldr.TASK.gold_name
    monkeypatch.setattr(pipeline, "MIN_COMPARISONS", 2)
    gold = pipeline.gold_reward(start)
    assert "trained on pairs" in gold.name and gold.id != exact_reward("tldr").id
    assert read_json(runs / "gold/config.json")["pairs"] == str(prepared / "comparisons_train.jsonl")
    model, tokenizer = load_run(runs / "gold", ScalarModel)[0], Tokenizer.load(runs / "gold/tokenizer.tiktoken")
    rows = read_jsonl(prepared / "comparisons_test.jsonl", PAIR)
    for row, reward in zip(rows, gold([r["prompt"] for r in rows], [r["chosen"] for r in rows]).tolist()):
        ids = [tokenizer.bos, *tokenizer.encode(row["prompt"]), *tokenizer.encode(row["chosen"]), tokenizer.eos]
        assert reward == pytest.approx(torch.sigmoid(model(torch.tensor([ids]))[0, -1]).item(), abs=1e-5)
    assert "no finished run" in error(agreement.main, [str(tmp_path)], prepared)
    monkeypatch.setattr(model.config, "block_size", 40)
    assert "tokens, the block size of the reward model is 40" in error(pair_scores, model, tokenizer,
                                                                       [row["prompt"]], [row["chosen"]])
    assert "no pretrain.jsonl" in clone.run_here(root, tmp_path, "sft", "--on", "pretrain")
