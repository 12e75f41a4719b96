"""The post grammar and its gold reward: cases scored by hand, what a policy might try, and what the posts are like."""

import hashlib
import json
import random
import re
import time

import pytest

import clone
from common import tasks
import sft
from common.files import read_json, read_jsonl, write_jsonl
from data.posts import grammar, prepare
from data.posts.grammar import BUDGET, FACTS, TABLES, gold_reward, read_facts, sample_post
from common.tokenizer import Tokenizer, train_bpe

POST = ("SUBREDDIT: r/family\n\nTITLE: I need advice\n\nPOST: It rained for three days and my shoes got wet. This is about my "
        "sister Anna. Yesterday Anna drove off in my car at night. So we did not speak for a month. Leo from work says that I "
        "think too much. And now the rent is due on Friday. Should I say sorry first?\n\nTL;DR:")
IDEAL = " My sister Anna took my car, we stopped talking and rent is due. Should I apologize?"


def reward(summary: str) -> float:
    return gold_reward(POST + summary)


def mean(rewards) -> float:
    rewards = list(rewards)
    return sum(rewards) / len(rewards)


def ideal(post: str) -> str:
    """The five facts of a post, all short, and nothing else."""
    facts = dict(fact for fact in read_facts(post) if fact[0] in FACTS)
    return " " + ". ".join([f"{facts['who']} {facts['did']}", *(facts[kind] for kind in FACTS[2:])])


@pytest.fixture(scope="module")
def posts():
    rng = random.Random(1)
    return [sample_post(rng) for _ in range(1500)]


# ---- The reward. ----

def test_what_a_text_states():
    assert read_facts(POST) == {("who", "my sister anna"), ("name", "anna"), ("did", "took my car"),
                                ("followed", "we stopped talking"), ("problem", "rent is due"),
                                ("question", "should I apologize"), ("aside", "it was raining"), ("name", "leo")}
    assert read_facts("MY  BOSS\nTom TOOK my car, with Tommy and my boss") == {("who", "my boss tom"), ("did", "took my car")}
    assert read_facts("I took my cart. Should I suet? rent is duet, took my, annas") == set()


@pytest.mark.parametrize("summary, expected", [
    (IDEAL, 1.0),
    (" Anna, my sister Anna, DROVE OFF IN MY CAR AT NIGHT! Rent is due!", 3 / 5),               # a long form, any case
    (" My sister took my car and rent is due. Should I apologize?", 3 / 5),                     # nameless
    (" Anna took my car and rent is due. Should I apologize?", 3 / 5),                          # known, but who is she?
    (" Leo took my car. It was raining.", 1 / 5),                                               # in the post: no invention
    (" My sister Anna took my car and I yelled.", 1 / 5),                                       # 2 kept, 1 invented
    (" My sister Leo took my car and rent is due.", 1 / 5),                                     # not this sister
    (" My sister Tom took my car and rent is due.", 1 / 5),                                     # nobody knows Tom
    (" Tom and my sister Anna took my car.", 1 / 5),
    (" I had pizza and my sister Anna took my car.", 1 / 5),                                    # an aside of another post
    (" I yelled, my mother cried. Should I apologize?", 0.0),                                   # 1 kept, 2 invented
    (" My sister Anna took my car" + ", and" * 16, 2 / 5),                                      # 22 words
    (" My sister Anna took my car" + ", and" * 38, 2 / 5 / 4),
    ("", 0.0), (" ", 0.0), ("?!", 0.0), ("\ufffd\x00", 0.0), (" I need advice.", 0.0)])
def test_scored_by_hand(summary, expected):
    assert reward(summary) == pytest.approx(expected)


def test_docstring_examples():
    examples = re.findall(r"^    (\d\.\d\d)  (.*)", grammar.__doc__, re.MULTILINE)
    assert len(examples) == 3
    for expected, summary in examples:
        assert reward(" " + summary) == pytest.approx(float(expected))


def test_reward_of_any_string():
    for text in ("", "TL;DR:", IDEAL, "TL;DR:" + IDEAL, POST, POST.replace("TL;DR:", "") + IDEAL):
        assert gold_reward(text) == 0.0
    assert gold_reward(POST + " TL;DR: " + IDEAL) == pytest.approx(1.0)  # a response can not become the post


def test_reward_is_fast(posts):
    start = time.perf_counter()
    for post, summary in posts:
        gold_reward(post + summary)
    assert len(posts) / (time.perf_counter() - start) > 1000  # summaries a second; far below what is usual


# ---- What a policy might try. ----

def test_the_facts_alone_earn_everything(posts):
    for post, _ in posts:
        assert gold_reward(post + ideal(post)) == 1.0


def test_repeating_gains_nothing():
    for n in range(1, 10):
        assert reward(IDEAL * n) <= reward(IDEAL) and reward(" My sister Anna took my car." * n) <= 2 / 5
        assert reward(" Rent is due, the rent is due on Friday, I have to pay the rent this week." * n) <= 1 / 5


def test_listing_the_tables_gains_nothing(posts):
    shorts = {kind: " " + ", ".join(entry[0] for entry in table) for kind, table in TABLES.items()}
    for post, summary in posts[:200]:
        assert all(gold_reward(post + text) == 0.0 for text in [*shorts.values(), "".join(shorts.values())])
        assert gold_reward(post + summary + shorts["question"]) == 0.0


def test_guessing_gains_nothing():
    """A second answer beside the right one takes away what the right one gave; two wrong ones take more."""
    assert reward(" My sister Anna took my car. Should I apologize? Should I sue?") == pytest.approx(2 / 5)
    assert reward(" My sister Anna took my car. Should I sue? Am I wrong?") == 0.0
    assert reward(" My sister Anna, my sister Emma took my car.") == pytest.approx(1 / 5)


def test_saying_the_same_to_every_post_gains_nothing(posts):
    summaries = [summary for _, summary in posts[-20:]] + [" " + form for table in TABLES.values() for form, *_ in table]
    assert max(mean(gold_reward(post + summary) for post, _ in posts[:60]) for summary in summaries) < 0.03


def test_names_alone_earn_a_fifth(posts):
    people = [[form for kind, form in read_facts(post) if kind in ("who", "name")] for post, _ in posts]
    assert max(gold_reward(post + " " + ", ".join(names)) for (post, _), names in zip(posts, people)) == pytest.approx(1 / 5)


def test_copying_the_post_earns_little(posts):
    """The whole of it keeps all five facts, in far too many words; its first words have two facts or so."""
    bodies = [post.split("POST: ")[1].removesuffix("\n\nTL;DR:") for post, _ in posts]
    assert mean(gold_reward(post + " " + body) for (post, _), body in zip(posts, bodies)) < 0.2
    assert max(gold_reward(post + " " + body) for (post, _), body in zip(posts, bodies)) < 0.5
    starts = [" ".join(body.split()[:BUDGET]) for body in bodies]
    assert mean(gold_reward(post + " " + start) for (post, _), start in zip(posts, starts)) < 0.4


def test_words_glued_together_are_counted_or_not_read():
    long = IDEAL.replace("due.", "due, I do not know what to do about any of it.")
    assert reward(long) == pytest.approx((22 / 27) ** 2)
    for glue in (",", "-", ".", "/", "...", "\n", "\u2014"):
        assert reward(re.sub(r"[,.]? ", glue, long)) <= reward(long)
    for glue in ("", "_", "x", "\u00e9"):
        assert reward(long.replace(" ", glue)) == 0.0


def test_what_the_docstring_says_can_be_exploited():
    assert reward(" Never my sister Anna took my car.") == pytest.approx(2 / 5)
    assert reward(" rent is due we stopped talking should I apologize my sister Anna took my car") == 1.0
    assert reward(IDEAL + " A goat ate it.") == 1.0


# ---- The tables. ----

def test_no_form_states_anything_else():
    """Alone and behind its lead each form is read as itself, so no form hides in another entry's; no two are the same."""
    forms = [(kind, entry[0], form) for kind, table in TABLES.items() for entry in table for form in entry]
    assert len({form.lower() for *_, form in forms}) == len(forms) == len(grammar.MEANING)
    for kind, short, form in forms:
        assert {fact for start in range(len(form.split())) for fact in read_facts(" ".join(form.split()[start:]))} == {
            (kind, short)}, form
        assert re.fullmatch(r"[A-Za-z' ]+", form)
    assert all(len(table) == 24 and min(map(len, table)) >= 2 for table in TABLES.values())


def test_what_stands_around_the_facts_states_none():
    for text in (grammar.SUBREDDITS, grammar.TITLES, grammar.WHO_DID, grammar.WHEN, grammar.THEN, grammar.PROBLEM_FIRST,
                 grammar.PROBLEM_LAST, grammar.OPENERS, grammar.CLOSERS, grammar.BYSTANDERS_TEXT):
        assert read_facts(text) == set()


# ---- The writer. ----

def test_a_post_states_five_facts_and_its_summary_invents_nothing(posts):
    for post, summary in posts:
        assert sorted(kind for kind, _ in read_facts(post) if kind in FACTS) == sorted(FACTS)
        assert 0 <= sum(kind == "aside" for kind, _ in read_facts(post)) <= 6
        assert read_facts(summary) <= read_facts(post) | {("name", w) for w in post.lower().replace(".", "").split()}


def test_posts_read_like_posts(posts):
    for post, summary in posts:
        assert re.fullmatch(r"SUBREDDIT: r/[a-z]+\n\nTITLE: [A-Z][^\n]+\n\nPOST: [A-Z][^\n]+[.?]\n\nTL;DR:", post)
        assert re.fullmatch(r" [A-Z][^\n]+[.?]", summary)
        for text in (post, summary):
            assert not re.search(r"\[|\]|  |\bi\b|[.?] [a-z]|[.,?][.,?]|\b[Aa] [aeiou]", text), text


def test_same_seed_same_posts():
    draws = [[sample_post(rng) for _ in range(20)] for rng in map(random.Random, (3, 3, 4))]
    assert draws[0] == draws[1] != draws[2]


def test_lengths(posts):
    """Posts of 60 to 200 tokens, which leave room in the block for any summary here."""
    tokenizer = train_bpe([post + summary for post, summary in posts], prepare.VOCAB_SIZE)
    asked, told = ([len(ids) for ids in tokenizer.encode_batch(texts)] for texts in zip(*posts))
    assert 60 <= min(asked) < 80 and 130 < max(asked) <= 200
    block_size = sft.Config(dataset="posts").block_size
    assert max(asked) + max(told) + 2 <= block_size and 2 * max(told) < block_size


def test_distribution_of_rewards(posts):
    """References leave something to gain: most miss a fact, some ramble."""
    rewards = [gold_reward(post + summary) for post, summary in posts]
    assert 0.66 < mean(rewards) < 0.74
    assert 0.15 < mean((r - mean(rewards)) ** 2 for r in rewards) ** 0.5 < 0.25
    assert 0.08 < mean(r == 1.0 for r in rewards) < 0.3 and min(rewards) > 0.1
    assert mean(len(re.findall(r"\w+", summary)) > BUDGET for _, summary in posts) > 0.15


# ---- The prepared folder. ----

def test_prepare_is_deterministic_and_leaks_nothing(tmp_path, monkeypatch):
    sizes = dict(TRAIN=300, TEST=40, PROMPTS_TRAIN=300, PROMPTS_TEST=30, VOCAB_SIZE=400)
    for name, value in sizes.items():
        monkeypatch.setattr(prepare, name, value)
    metas = [prepare.prepare(tmp_path / name) for name in "ab"]
    assert metas[0] == metas[1] == prepare.prepare(tmp_path / "a") == tasks.check_prepared(tmp_path / "a")
    rows = {name: [json.loads(line) for line in (tmp_path / "a" / f"{name}.jsonl").read_text().splitlines()]
            for name in metas[0]["rows"]}
    assert {name: len(part) for name, part in rows.items()} == metas[0]["rows"] == {
        name: sizes[name.upper()] for name in rows}
    seen = [row["prompt"] for part in rows.values() for row in part]
    assert len(set(seen)) == len(seen) == 670
    assert all(set(row) == ({"prompt"} if "prompts" in name else {"prompt", "text"}) for name in rows for row in rows[name])
    assert metas[0]["test_reward"] == pytest.approx(mean(gold_reward(r["prompt"] + r["text"]) for r in rows["test"]), abs=1e-4)
    tokenizer = Tokenizer.load(tmp_path / "a" / "tokenizer.tiktoken")
    assert tokenizer.decode(tokenizer.encode(POST)) == POST
    digest = hashlib.sha256((tmp_path / "b" / "train.jsonl").read_bytes()).hexdigest()
    assert digest == metas[0]["sha256"]["train.jsonl"]


def test_the_pipeline_runs_on_posts(tmp_path):
    """SFT, pairs, DPO and PPO as for any other task, on a small data set: the responses are scored as the grammar says."""
    root, folder = clone.make(tmp_path / "clone"), tmp_path / "clone/data/posts/prepared"
    rng = random.Random(3)
    posts = [sample_post(rng) for _ in range(80)]

    def write(folder):
        train_bpe([post + summary for post, summary in posts], 500).save(folder / "tokenizer.tiktoken")
        rows = [{"prompt": post, "text": summary} for post, summary in posts]
        for name, part in {"train": rows[:60], "test": rows[60:70], "prompts_train": rows[:12],
                           "prompts_test": rows[70:74]}.items():
            write_jsonl(folder / f"{name}.jsonl", part)
        return {}

    tasks.publish(folder, "posts", write)
    runs, task = tmp_path / "runs/posts", ["--dataset", "posts"]
    assert clone.run_here(root, tmp_path, "sft", *task, *clone.TINY, "--block-size", "288", "--out", "runs/posts/sft") == 0
    assert clone.run_here(root, tmp_path, "dpo", *task, "--sft", "runs/posts/sft", "--prompts", "10", "--batch-size", "8") == 0
    assert clone.run_here(root, tmp_path, "ppo", *task, "--sft", "runs/posts/sft", "--reward", "gold", "--steps", "1",
                          "--batch-size", "8") == 0
    pairs = read_jsonl(runs / "pairs-bt-10/pairs.jsonl", {"prompt": str, "chosen": str, "rejected": str})
    assert {pair["prompt"] for pair in pairs} <= {post for post, _ in posts[:12]}
    for pair in pairs:
        for kind in ("chosen", "rejected"):
            assert pair[f"{kind}_reward"] == pytest.approx(gold_reward(pair["prompt"] + pair[kind]), abs=1e-4)
    for run in ("dpo-beta0.1-seed0-prompts10-batchsize8", "ppo-gt-beta0.1-seed0-steps1-batchsize8"):
        table = read_json(runs / run / "evaluation.json")["table"]
        assert 0 <= table["SFT"]["reward"] <= 1 and len(table) > 3
