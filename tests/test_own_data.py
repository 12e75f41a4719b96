"""common/own_data.py and the forms of a pairs file: a folder of somebody's own files becomes a task, from SFT to a report about
their data; and what is wrong with such a folder is said in one line."""
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch

import clone
import dpo
import evaluate
from common import own_data, settings, tasks
from common.pairs import Pair, read_pairs, split
from common.tokenizer import Tokenizer

SMALL = "--n-layer 1 --n-embd 32 --n-head 2 --steps 120 --warmup 5 --lr 2e-2".split()
REWARD = "def short(prompts, responses):\n    return [-10.0 * len(response) for response in responses]\n"


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions(count: int, seed: int = 0) -> list[dict]:
    """Sums with a short and a long answer; the short one is preferred. Sorted by the question, as files often are."""
    sums = sorted(random.Random(seed).sample(list(itertools.product(range(2, 40), repeat=2)), count))
    return [{"prompt": f"What is {a} + {b}?", "chosen": f" {a + b}.", "rejected": f" I think it is {a + b}."} for a, b in sums]


@pytest.fixture(scope="module")
def qa(root, tmp_path_factory) -> Path:
    """A working folder: 60 pairs and answers of both kinds in qa/, an SFT policy of them, and a reward in reward.py."""
    work, rows = tmp_path_factory.mktemp("work"), questions(60)
    jsonl(work / "qa/pairs.jsonl", rows)
    jsonl(work / "qa/texts.jsonl", [{"prompt": row["prompt"], "text": row[name]} for row in questions(60, seed=1)
                                    for name in ("chosen", "rejected")])
    (work / "reward.py").write_text(REWARD)
    assert clone.run_here(root, work, "sft", "--dataset", "qa", *SMALL, "--out", "runs/qa/sft") == 0
    return work


# ---- the forms of a pairs file ---------------------------------------------------------------------------------------

def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


H, A, S = "\n\nHuman: ", "\n\nAssistant:", "\n\nSystem: "
TALK = [user("Hi"), assistant("Hello"), user("2 + 2?")]
TALK_TEXT = H + "Hi" + A + " Hello" + H + "2 + 2?" + A
FORMS = {  # a row as it stands in the file: prompt, chosen and rejected as texts
    "plain": ({"prompt": "Q", "chosen": " a", "rejected": "b"}, ("Q", " a", "b")),
    "hh": ({"chosen": H + "Hi" + A + " I can.", "rejected": H + "Hi" + A + " I can not."}, (H + "Hi" + A, " I can.", " I can not.")),
    "hh, two turns": ({"chosen": TALK_TEXT + " 4", "rejected": TALK_TEXT + " 5"}, (TALK_TEXT, " 4", " 5")),
    "hh, parted early": ({"chosen": H + "Hi" + A + " A" + H + "x" + A + " 1", "rejected": H + "Hi" + A + " B" + H + "y" + A + " 2"},
                         (H + "Hi" + A, " A" + H + "x" + A + " 1", " B" + H + "y" + A + " 2")),
    "inside a word": ({"chosen": "Sky is blue.", "rejected": "Sky is black."}, ("Sky is", " blue.", " black.")),
    "at a space": ({"chosen": "A: \nyes", "rejected": "A: no"}, ("A:", " \nyes", " no")),
    "one ends": ({"chosen": "Q? A: yes", "rejected": "Q? A: yes, sir"}, ("Q? A:", " yes", " yes, sir")),
    "two words": ({"chosen": "Q: one", "rejected": "Q:\ttwo"}, ("Q:", " one", "\ttwo")),
    "messages": ({"prompt": TALK, "chosen": [assistant("4")], "rejected": [assistant("5")]}, (TALK_TEXT, " 4", " 5")),
    "messages, no prompt": ({"chosen": TALK + [assistant("4")], "rejected": TALK + [assistant("5")]}, (TALK_TEXT, " 4", " 5")),
    "messages, prompt twice": ({"prompt": "Q", "chosen": [user("Q"), assistant("4")], "rejected": [user("Q"), assistant("5")]},
                               (H + "Q" + A, " 4", " 5")),
    "messages, text prompt": ({"prompt": "Q", "chosen": [assistant("4")], "rejected": [assistant("5")]}, (H + "Q" + A, " 4", " 5")),
    "system": ({"prompt": [{"role": "system", "content": "Be brief."}, user("Q")], "chosen": [assistant("4")],
                "rejected": [assistant("5")]}, (S + "Be brief." + H + "Q" + A, " 4", " 5")),
    "equal messages": ({"chosen": [user("Q"), assistant("4")], "rejected": [user("Q"), assistant("4")]}, (H + "Q" + A, " 4", " 4")),
    "one goes on": ({"chosen": [user("Q"), assistant("4"), user("Sure?"), assistant("Yes")], "rejected": [user("Q"), assistant("4")]},
                    (H + "Q" + A, " 4" + H + "Sure?" + A + " Yes", " 4"))}


def test_every_form_becomes_prompt_chosen_and_rejected(tmp_path):
    """Rows written by hand; nothing of the text is lost, and further keys stay."""
    found = read_pairs(jsonl(tmp_path / "pairs.jsonl", [{**row, "score": i} for i, (row, _) in enumerate(FORMS.values())]))
    for i, (name, (row, expected)) in enumerate(FORMS.items()):
        assert tuple(found[i][key] for key in ("prompt", "chosen", "rejected")) == expected, name
        assert found[i]["score"] == i and found[i]["line"] == i + 1
        for side in ("chosen", "rejected"):
            if isinstance(row[side], str) and "prompt" not in row:
                assert found[i]["prompt"] + found[i][side] == row[side]


@pytest.mark.parametrize("row, said", [
    ({"chosen": "a", "rejected": "b"}, "no field 'prompt', expected one, or 'chosen' and 'rejected' that begin with the same"),
    ({"chosen": "", "rejected": ""}, "no field 'prompt', expected one"),
    ({"chosen": [user("Q"), assistant("4")], "rejected": "5"}, "one of 'chosen' and 'rejected' is a text, expected two texts"),
    ({"prompt": [user("Q")], "chosen": " 4", "rejected": " 5"}, "field 'prompt' is [{\"role\""),
    ({"prompt": "Q", "chosen": [], "rejected": [assistant("5")]}, "field 'chosen': expected a message of the assistant's"),
    ({"chosen": [user("Q")], "rejected": [user("P")]}, "field 'chosen': expected a message of the assistant's behind the prompt"),
    ({"chosen": [{"role": "judge", "content": "x"}], "rejected": [assistant("5")]}, "field 'chosen' has {\"role\": \"judge\""),
    ({"chosen": [{"role": "user"}], "rejected": [assistant("5")]}, "field 'chosen' has {\"role\": \"user\"} in it, expected mess"),
    ({"prompt": 5, "chosen": [assistant("4")], "rejected": [assistant("5")]}, "field 'prompt' has 5 in it, expected messages"),
    ({"chosen": [{"role": ["user"], "content": "Q"}], "rejected": [assistant("5")]}, "field 'chosen' has {\"role\": [\"user\"]"),
    ({"chosen": [user("Q"), assistant("\ud800")], "rejected": [user("Q"), assistant("5")]}, "field 'chosen' has half a surrogate"),
    ({"prompt": "Q", "chosen": "", "rejected": "a"}, "field 'chosen' is empty, expected a response"),
    ({"prompt": "Q", "chosen": " 4"}, "no field 'rejected' (found: prompt, chosen)"),
    ({"prompt": None, "chosen": " 4", "rejected": " 5"}, "field 'prompt' is null, expected str")])
def test_a_bad_row_stops_with_file_line_and_field(row, said, tmp_path):
    path = jsonl(tmp_path / "pairs.jsonl", [FORMS["plain"][0], row])
    with pytest.raises(SystemExit) as stop:
        read_pairs(path)
    assert str(stop.value).startswith(f"error: {path}, line 2: {said}") and "\n" not in str(stop.value)


def test_anthropics_rows_load_as_they_are():
    """All of harmless-base/test.jsonl.gz: every prompt ends with the last turn's name, and no response
    goes on to another one of the human's."""
    path = Path(os.environ.get("PREFERENCE_DATA", ""), "hh/harmless-base/test.jsonl.gz")
    if not os.environ.get("PREFERENCE_DATA") or not path.exists():
        pytest.skip("PREFERENCE_DATA (a folder with hh/harmless-base/test.jsonl.gz) is not set")
    rows = read_pairs(path)
    assert len(rows) == 2312
    assert all(row["prompt"].startswith(H.rstrip()) and row["prompt"].endswith(A) for row in rows)
    assert not any(H.rstrip() in row["chosen"] + row["rejected"] for row in rows)
    assert sum(A in row["chosen"] + row["rejected"] for row in rows) == 5  # five texts have it
    assert all(row[side].startswith(" ") for row in rows for side in ("chosen", "rejected"))


# ---- what is prepared ------------------------------------------------------------------------------------------------

def test_sft_never_sees_what_dpo_holds_out(tmp_path, monkeypatch):
    """Pairs alone: the documents are the chosen responses of exactly the pairs that dpo.py trains on, the prompts theirs; the
    tokenizer has read nothing else. A tenth is held out, drawn from the whole of a sorted file."""
    monkeypatch.chdir(tmp_path)
    rows = questions(100)
    rows.insert(7, {**rows[7], "rejected": rows[7]["chosen"]})  # dpo.py drops it, so it must not shift the split
    jsonl(tmp_path / "qa/pairs.jsonl", rows)
    folder = tasks.prepared("qa")
    read = lambda name: [json.loads(line) for line in (folder / name).read_text().splitlines()]  # noqa: E731
    different = [row for row in rows if row["chosen"] != row["rejected"]]
    train, held = split([Pair(list(row["prompt"].encode()), [], []) for row in different], draw=True, share=10)
    assert len(train) == 90 and len(held) == 10 and held.float().std() > 15
    assert read("train.jsonl") == [{"prompt": different[i]["prompt"], "text": different[i]["chosen"]} for i in train.tolist()]
    for name, numbers in (("prompts_train", train), ("prompts_test", held)):
        assert read(f"{name}.jsonl") == [{"prompt": different[i]["prompt"]} for i in numbers.tolist()]
    tokenizer = Tokenizer.load(folder / "tokenizer.tiktoken")
    longest = max(len(tokenizer.encode(r["prompt"])) + len(tokenizer.encode(r["rejected"])) + 2 for r in rows)
    assert longest <= tasks.load("qa").presets["cpu"].settings["sft"]["block_size"] <= max(longest, 60) + 8


def test_texts_and_prompts_of_their_own(tmp_path, monkeypatch, capsys):
    """Text files in order, documents between blank lines, Windows' line ends; a document or prompt that is there twice counts
    once. Without prompts the first words of the documents are."""
    monkeypatch.chdir(tmp_path)
    Path("poems").mkdir()
    verses = [f"The {word} is red\nand so am I {i}." for i, word in enumerate("rose sky sea fox barn sun moon ink jam cup".split() * 3)]
    Path("poems/b.txt").write_bytes("\r\n \r\n\r\n".join(verses[10:]).replace("\n", "\r\n").encode())
    Path("poems/a.txt").write_text("\n\n".join(verses[:10] + verses[:2]) + "\n")
    assert own_data.read_texts(sorted(Path("poems").glob("*.txt"))) == [{"text": v} for v in verses[:10] + verses[:2] + verses[10:]]
    folder = tasks.prepared("poems")
    assert "poems: dropped 2 of 32 documents that are there twice" in capsys.readouterr().out
    texts = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
             for name in ("train", "test", "prompts_train", "prompts_test")}
    found = [row["text"] for name in ("train", "test") for row in texts[name]]
    assert sorted(found) == sorted(verses) and len(texts["test"]) == 3
    prompts = [row["prompt"] for name in ("prompts_train", "prompts_test") for row in texts[name]]
    assert len(set(prompts)) == len(prompts) and all(any(v.startswith(p + " ") for v in verses) for p in prompts)
    jsonl(Path("poems/prompts.jsonl"), [{"prompt": "My love"}] * 2)
    with pytest.raises(SystemExit, match="poems/prompts.jsonl: is new since poems/prepared was made: delete poems/prepared"):
        tasks.prepared("poems")
    os.rename("poems/prepared", "before")
    tasks.prepared("poems")
    assert "dropped 1 of 2 prompts" in capsys.readouterr().out
    assert tasks.prompts("poems", "train") == tasks.prompts("poems", "test") == ["My love"]  # a single prompt is both
    assert (folder / "train.jsonl").read_bytes() == Path("before/train.jsonl").read_bytes()
    Path("poems/a.txt").write_text("another")
    with pytest.raises(SystemExit, match="poems/a.txt: has changed since"):
        settings.defaults_of(dpo.Config, dataset="poems")
    Path("poems/a.txt").unlink()
    with pytest.raises(SystemExit, match="poems/a.txt: is gone since"):
        tasks.load("poems")


@pytest.mark.parametrize("count", [20, 60, 300, 1500, 5000, 100_000])
def test_few_pairs_are_enough_steps_and_many_are_read_once(count):
    """Never fewer steps than the warm-up (a silent no-op), a warm-up of a tenth, at most ten passes."""
    found = own_data.on_pairs(count)
    steps = found["epochs"] * count / found["batch_size"]
    assert 1 <= found["warmup"] <= steps / 9 and 1 <= found["epochs"] <= 10
    assert steps >= 45 or found["epochs"] == 10
    assert count < 2000 or found["epochs"] == 1


def test_one_folder_has_one_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "qa/pairs.jsonl", questions(30))
    (tmp_path / "reviews").mkdir()
    for name in ("qa", "qa/", "./qa", "./x/../qa//"):
        config = dpo.Config(dataset=name)
        assert (config.dataset, config.out) == ("qa", "runs/qa/dpo-beta0.1-seed0")
    assert dpo.Config(dataset=str(tmp_path / "qa")).out.startswith("runs/" + "-".join(tmp_path.parts[1:]))
    assert not tasks.is_own("reviews") and settings.own_name("./reviews") == "./reviews"
    assert not (tmp_path / "qa/prepared").exists()  # to ask for settings writes nothing


def texts(count):
    return [{"text": f"A text of number {i}."} for i in range(count)]


@pytest.mark.parametrize("files, script, argv, said", [
    (None, "dpo", [], "--dataset my/qa: no such folder"),
    ({}, "sft", [], "my/qa: expected texts.jsonl, .txt files or pairs.jsonl (found: nothing)"),
    ({"pair.jsonl": questions(30)}, "sft", [], "my/qa: expected texts.jsonl, .txt files or pairs.jsonl (found: pair.jsonl)"),
    ({"prompts.jsonl": [{"prompt": "a"}]}, "sft", [], "my/qa: expected texts.jsonl, .txt files or pairs.jsonl (found: prompts"),
    ({"texts.jsonl": texts(3)}, "sft", [], "my/qa: 3 documents, expected at least 20, as a tenth is held out"),
    ({"a.txt": b"one\n\ntwo\n"}, "sft", [], "my/qa (blank lines separate documents): 2 documents, expected at le"),
    ({"a.txt": b""}, "sft", [], "my/qa (blank lines separate documents): 0 documents, exp"),
    ({"texts.jsonl": texts(30), "a.txt": b"x"}, "sft", [], "my/qa: has texts.jsonl and a.txt, expected one of the two"),
    ({"a.txt": b"one\n\x89PNG\xff\x00"}, "sft", [], "my/qa/a.txt, line 2: not UTF-8 (byte 1 of the line)"),
    ({"a.txt": b"one\ntwo\x00\n"}, "sft", [], "my/qa/a.txt, line 2: has a NUL byte in it"),
    ({"texts.jsonl": [*texts(30), {"text": " "}]}, "sft", [], "my/qa/texts.jsonl, line 31: field 'text' is empty"),
    ({"texts.jsonl": [*texts(30), {"text": "a", "prompt": 5}]}, "sft", [], "my/qa/texts.jsonl, line 31: field 'prompt' is 5, exp"),
    ({"texts.jsonl": [*texts(30), {"text": "a", "prompt": "\ud800"}]}, "sft", [], "my/qa/texts.jsonl, line 31: field 'prompt' has half"),
    ({"texts.jsonl": [{"txt": "a"}]}, "sft", [], "my/qa/texts.jsonl, line 1: no field 'text' (found: txt)"),
    ({"texts.jsonl": [{"text": f"word{i}"} for i in range(30)]}, "sft", [], "my/qa: no document has two words, of which"),
    ({"pairs.jsonl": questions(5)}, "dpo", [], "my/qa/pairs.jsonl: 5 pairs of two different responses, expected"),
    ({"pairs.jsonl": [{**row, "rejected": row["chosen"]} for row in questions(30)]}, "dpo", [], "my/qa/pairs.jsonl: 0 pairs of two different"),
    ({"pairs.jsonl": [*questions(30), {"chosen": "a", "rejected": "b"}]}, "dpo", [], "my/qa/pairs.jsonl, line 31: no field 'pro"),
    ({"pairs.jsonl": [*questions(30), {**questions(1)[0], "chosen": " é" * 2000}]}, "dpo", [],
     "my/qa/pairs.jsonl, line 31: 'chosen' does not fit: prompt "),
    ({"texts.jsonl": texts(30), "prompts.jsonl": [{"prompt": "é" * 3000}]}, "sft", [], "my/qa: a prompt needs a block of 60"),
    ({"texts.jsonl": texts(30)}, "dpo", [], "--dataset my/qa: no pairs.jsonl in it to learn from; or give --pairs FILE"),
    ({"texts.jsonl": texts(30)}, "ppo", [], "--dataset my/qa: no pairs.jsonl in it to learn from"),
    ({"pairs.jsonl": questions(30)}, "ppo", ["--reward", "gold"], "--dataset my/qa: a folder of your own files has no gold reward"),
    ({"pairs.jsonl": questions(30)}, "dpo", ["--prompts", "5"], "--prompts: no pairs are sampled for a folder of your own files"),
    ({"pairs.jsonl": questions(30)}, "ppo", ["--pairs-seed", "5"], "--pairs-seed: no pairs are sampled for a folder of your own"),
    ({"pairs.jsonl": questions(30)}, "sft", ["--on", "chosen", "--pairs-seed", "5"], "--pairs-seed: no pairs are sampled for a"),
    ({"pairs.jsonl": questions(30)}, "dpo", ["--labels", "argmax"], "--labels: pairs of your own are labelled"),
    ({"pairs.jsonl": questions(30)}, "dpo", ["--preset", "gpu"], "--preset gpu: my/qa has no such preset (known: cpu)"),
], ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_a_folder_that_cannot_be_used_stops_before_anything_is_written(files, script, argv, said, root, tmp_path):
    (tmp_path / "my").mkdir()
    if files is not None:
        (tmp_path / "my/qa").mkdir()
        for name, content in files.items():
            path = tmp_path / "my/qa" / name
            path.write_bytes(content) if isinstance(content, bytes) else jsonl(path, content)
    found = clone.run_here(root, tmp_path, script, "--dataset", "my/qa", *argv)
    assert isinstance(found, str) and found.startswith(f"error: {said}") and "\n" not in found, found
    assert {path.name for path in tmp_path.rglob("*")} == {"my", *([] if files is None else ["qa", *files])}


# ---- from the files to the report ------------------------------------------------------------------------------------

def run(root, qa, script, *argv):
    said = clone.run_here(root, qa, script, "--dataset", "qa", "--sft", "runs/qa/sft", *argv)
    assert said == 0, said


def test_sft_shows_what_it_says_to_their_prompts(root, qa, capsys):
    assert clone.run_here(root, qa, "sft", "--dataset", "qa", *SMALL, "--steps", "20", "--out", "runs/qa/short") == 0
    said = capsys.readouterr().out
    held = [json.loads(line)["prompt"] for line in (qa / "qa/prepared/prompts_test.jsonl").read_text().splitlines()]
    assert len(held) == 6 and all(f"prompt    {prompt!r}\n  sample  " in said for prompt in held[:3])
    assert "held-out loss: " in said


def test_dpo_ends_in_a_report_about_their_pairs(root, qa, capsys):
    """Held-out loss, accuracy and margin, KL and samples of their prompts; the words gold and optimum do not occur."""
    run(root, qa, "dpo", "--lr", "2e-3", "--out", "runs/qa/dpo")
    said, folder = capsys.readouterr().out, qa / "runs/qa/dpo"
    result = json.loads((folder / "evaluation.json").read_text())
    assert (f"6 held-out pairs of qa/pairs.jsonl: accuracy {result['held_out_accuracy']:.3f}, loss {result['held_out_loss']:.3f}, "
            f"implicit reward of chosen less rejected {result['held_out_margin']:+.3f}") in said
    assert result["held_out_accuracy"] == 1 and result["held_out_loss"] < 0.4  # short against long is easily learned
    # log sigmoid is concave: the mean loss is at least the loss of the mean margin
    assert result["held_out_loss"] >= math.log(1 + math.exp(-result["held_out_margin"])) - 1e-6
    assert "gold" not in said and "optimum" not in said
    assert list(result["table"]) == ["SFT", "DPO beta 0.1"] and result["table"]["DPO beta 0.1"]["kl"] > 0.1
    assert "reward" not in result["table"]["SFT"] and f"{result['table']['DPO beta 0.1']['kl']:6.2f} +- " in said
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in samples] == tasks_prompts(qa) and set(samples[0]) == {"task", "prompt", "before", "after"}
    shown = [f"prompt      {row['prompt']!r}\n  before {row['before'].strip()}\n  after  {row['after'].strip()}" for row in samples[:3]]
    assert all(text in said for text in shown)
    assert sum("I think" in row["before"] for row in samples) > sum("I think" in row["after"] for row in samples)


def tasks_prompts(qa):
    return [json.loads(line)["prompt"] for line in (qa / "qa/prepared/prompts_test.jsonl").read_text().splitlines()]


def test_a_policy_of_their_pairs_talks(root, qa, capsys):
    """Beside each response stands its log-ratio alone, and there is no optimum to show."""
    shutil.copytree(qa / "runs/qa/sft", qa / "runs/qa/policy")
    runs = ["runs/qa/sft", "runs/qa/policy"]
    assert clone.run_here(root, qa, "sample", *runs, "--prompt", "What is 3 + 4?", "--n", "2") == 0
    said = capsys.readouterr().out
    assert "gold" not in said and len(re.findall(r"^ [12] +\+0\.00  sft ", said, flags=re.M)) == 2
    assert clone.run_here(root, qa, "sample", *runs, "--prompt", "Q", "--optimum", "1") == \
        "error: --optimum: the task has no gold reward"


@pytest.mark.parametrize("script", ["label", *(f"experiments/{name}" for name in (
    "frontier", "distill", "ablation", "scaling", "winrate"))])
def test_what_measures_a_gold_reward_refuses_their_folder(script, root, tmp_path):
    """Before it trains an SFT policy for that."""
    jsonl(tmp_path / "qa/pairs.jsonl", questions(30))
    assert clone.run_here(root, tmp_path, script, "--dataset", "qa") == \
        "error: --dataset qa: a folder of your own files has no gold reward"
    assert {path.name for path in tmp_path.rglob("*")} == {"qa", "pairs.jsonl"}


def test_a_reward_model_of_their_pairs_and_ppo_on_it(root, qa, capsys):
    """The reward model shows a few scored pairs; PPO trains it if it is missing, and reports its mean score before and after."""
    run(root, qa, "ppo", "--steps", "2", "--warmup", "1", "--out", "runs/qa/ppo")
    said = capsys.readouterr().out
    assert "building what is missing: python reward_model.py --dataset qa --sft runs/qa/sft" in said
    held = {row["prompt"]: row for row in questions(60)}
    pairs = [prompt for prompt in tasks_prompts(qa) if f"prompt          {prompt!r}\n  chosen   " in said]
    assert len(pairs) == 3 and all(held[prompt]["rejected"].strip() in said for prompt in pairs)
    assert "reward: the reward model in runs/qa/reward-model" in said and "gold" not in said
    table = json.loads((qa / "runs/qa/ppo/evaluation.json").read_text())["table"]
    assert {"SFT", "PPO on model, beta 0.1", "best of 4"} <= set(table)
    bank = [json.loads(line) for line in (qa / "runs/qa/bank/bank.jsonl").read_text().splitlines()]
    scores = clone_scores(qa, bank)
    assert table["SFT"]["reward"] == pytest.approx(scores.mean().item(), abs=1e-4)


def clone_scores(qa, bank) -> torch.Tensor:
    """The reward model's score of every response of the bank, one row at a time."""
    from common.run import load_run
    from model import ScalarModel
    model, _ = load_run(qa / "runs/qa/reward-model", ScalarModel)
    tokenizer = Tokenizer.load(qa / "runs/qa/sft/tokenizer.tiktoken")
    scores = []
    with torch.no_grad():
        for row in bank[:6]:
            for text in row["responses"]:
                ids = [tokenizer.bos, *tokenizer.encode(row["prompt"]), *tokenizer.encode(text), tokenizer.eos]
                ids = ids[:model.config.block_size]
                scores.append(model.score(torch.tensor([ids]), torch.tensor([len(ids)])).item())
    return torch.tensor(scores).view(len(bank), -1)


@pytest.mark.parametrize("script", ["ppo", "reinforce", "vargrad"])
@pytest.mark.parametrize("dataset", ["qa", "reviews"])
def test_the_table_is_of_their_reward(script, dataset, root, qa, capsys):
    """On a folder of theirs and on a built-in task: SFT, best of n and the optimum of a reward of another unit, against sums over
    the bank's responses and over all subsets of 4 of the 8."""
    policy = f"runs/{dataset}/sft"
    if dataset == "reviews" and not (qa / policy).exists():
        assert clone.run_here(root, qa, "sft", *clone.SFT) == 0
    said = clone.run_here(root, qa, script, "--dataset", dataset, "--sft", policy, "--reward", "reward.py:short", "--steps", "2",
                          "--batch-size", "16", "--samples", "4", "--warmup", "1", "--bank-samples", "8", "--lr", "1e-3",
                          "--out", f"runs/{dataset}/{script}-own")
    assert said == 0, said
    result = json.loads((qa / f"runs/{dataset}/{script}-own/evaluation.json").read_text())
    table, printed = result["table"], capsys.readouterr().out
    assert result["gold"] == "reward.py:short" and "reward: reward.py:short\n" in printed and "gold reward" not in printed
    bank = [json.loads(line) for line in (qa / f"runs/{dataset}/bank-8/bank.jsonl").read_text().splitlines()]
    rewards = [[-10.0 * len(text) for text in row["responses"]] for row in bank]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    assert table["SFT"]["reward"] == pytest.approx(mean([mean(row) for row in rewards]), rel=1e-5)
    best = [mean([max(four) for four in itertools.combinations(row, 4)]) for row in rewards]
    assert table["best of 4"]["reward"] == pytest.approx(mean(best), rel=1e-5)
    optimum = next(row for row in table.values() if row["kind"] == "optimum")
    beta, reward, kl = optimum["beta"], [], []
    for row in rewards:
        top = max(row)
        weights = [math.exp((r - top) / beta) for r in row]
        weights = [w / sum(weights) for w in weights]
        reward.append(sum(w * r for w, r in zip(weights, row)))
        kl.append(sum(w * math.log(8 * w) for w in weights if w))  # against the uniform weights of the reference
    assert optimum["reward"] == pytest.approx(mean(reward), rel=1e-4) and optimum["kl"] == pytest.approx(mean(kl), abs=1e-4)
    limit = table["limit of this run in theory"]["beta"]
    assert 0.1 < limit < 0.1 * 10 * 60  # beta 0.1, in standard deviations of lengths times 10


def test_the_optimal_curve_has_the_unit_of_the_reward():
    """r and 100 r - 7: the same KLs, and rewards that are shifted and scaled as r is. Rewards that are all equal have a curve, too."""
    rewards = torch.rand(10, 32, generator=torch.Generator().manual_seed(0)).double()
    curve, other = evaluate.optimal_curve(rewards), evaluate.optimal_curve(100 * rewards - 7)
    assert [p["kl"] for p in other] == pytest.approx([p["kl"] for p in curve])
    assert [p["reward"] for p in other] == pytest.approx([100 * p["reward"] - 7 for p in curve])
    assert all(p["kl"] == pytest.approx(0, abs=1e-9) for p in evaluate.optimal_curve(torch.full((10, 32), 0.3)))


def test_pairs_of_their_own_on_a_task_of_ours(root, qa, capsys):
    """The report begins with their held-out pairs and with samples of their prompts, and says whose the gold reward is."""
    if not (qa / "runs/reviews/sft").exists():
        assert clone.run_here(root, qa, "sft", *clone.SFT) == 0
    clone.write_pairs(qa / "films.jsonl", 40)
    capsys.readouterr()
    assert clone.run_here(root, qa, "dpo", "--sft", "runs/reviews/sft", "--pairs", "films.jsonl", "--out", "runs/reviews/dpo") == 0
    said = capsys.readouterr().out
    result = json.loads((qa / "runs/reviews/dpo/evaluation.json").read_text())
    assert f"2 held-out pairs of films.jsonl: accuracy {result['held_out_accuracy']:.3f}" in said
    prompts = {json.loads(line)["prompt"] for line in (qa / "films.jsonl").read_text().splitlines()}
    before, after = said.split("Of the task's own prompts, which these pairs need not be about:")
    shown = [line for line in before.splitlines() if line.startswith("prompt    ")]
    assert len(shown) == 2 and all(eval(line[10:], {}) in prompts for line in shown)
    assert "gold reward" in after and "prompt" not in after.replace("prompts", "")


# ---- what the page about it prints -----------------------------------------------------------------------------------

PAGE = next(path for path in sorted((clone.ROOT / "docs").rglob("*.md")) if "### From nothing to a DPO policy" in path.read_text())


def test_the_pages_folder_and_tables(tmp_path, monkeypatch, capsys):
    """Its script writes 300 pairs and 2,000 texts; its tables are those of the committed runs of its two commands."""
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    write_the_pages_folder()
    assert len(read_pairs("qa/pairs.jsonl")) == 300 and len(own_data.read_texts([Path("qa/texts.jsonl")])) == 2000
    for name in ("dpo", "ppo"):
        run = json.loads((clone.ROOT / f"results/own_data/{name}.json").read_text())
        evaluate.print_table(run["table"], run["gold"], "reward")
        assert capsys.readouterr().out.strip("\n") in page
        if name == "dpo":
            assert (f"accuracy {run['held_out_accuracy']:.3f}, loss {run['held_out_loss']:.3f}, implicit reward of chosen less "
                    f"rejected {run['held_out_margin']:+.3f}") in page


def write_the_pages_folder() -> None:
    """qa/ in the current folder, by the page's own script."""
    page = PAGE.read_text(encoding="utf-8")
    script = next(block for block in re.findall(r"^```python\n(.*?)^```", page, flags=re.S | re.M) if "qa/pairs.jsonl" in block)
    Path("make_qa.py").write_text(script)
    runpy.run_path("make_qa.py")
