"""label.py: answers from a pipe and from a terminal, nothing lost, nothing asked twice; how often they agree with the gold
reward, and what they are worth."""
import io
import json
import math
import os
import sys

import pytest
import torch

import evaluate
import label
from common import files
from common.pairs import encode_pairs
from common.run import load_run
from common.tokenizer import Tokenizer
from model import ScalarModel


@pytest.fixture
def type_in(small_reviews, sft_run, tmp_path, monkeypatch, capsys):
    """type_in("l r u"): answers from a pipe, a line each; what was printed."""
    def run(keys: str, **settings) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{key}\n" for key in keys.split())))
        label.main(label.Config(**{"sft": str(sft_run), "out": str(tmp_path / "labels-me"), **settings}))
        return capsys.readouterr().out
    return run


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def question(prompt: str, left: str, left_reward: float, right: str, right_reward: float) -> dict:
    """The left response is the chosen one."""
    return {"prompt": prompt, "chosen": left, "rejected": right, "chosen_reward": left_reward, "rejected_reward": right_reward,
            "chosen_ids": [1], "rejected_ids": [2]}


def asked(count: int, seed: int = 0) -> list[dict]:
    """Questions with gold rewards uniform in [0, 1]."""
    rewards = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)).tolist()
    return [question(f"p{i}", f" a{i}", a, f" b{i}", b) for i, (a, b) in enumerate(rewards)]


# ---- answers ---------------------------------------------------------------------------------------------------------

def test_answers_become_pairs(type_in, tmp_path, sft_run):
    """Left and right make a pair of the tokens that were sampled; a tie and a skip are kept, and make none."""
    said = type_in("l r t s l u r q l")
    assert "python dpo.py --beta 0.5 --pairs " in said and "--epochs 4 --batch-size 8 --warmup 5" in said
    labels, pairs = (rows_of(tmp_path / "labels-me" / f"{name}.jsonl") for name in ("labels", "pairs"))
    assert [row["answer"] for row in labels] == ["left", "right", "tie", "skip", "right"]
    assert [row["prompt"] for row in pairs] == [labels[i]["prompt"] for i in (0, 1, 4)]
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [
        (labels[0]["left"], labels[0]["right"]), *((labels[i]["right"], labels[i]["left"]) for i in (1, 4))]
    encoded = encode_pairs([{**row, "line": 1} for row in pairs], Tokenizer.load(sft_run / "tokenizer.tiktoken"), 112, "")
    assert [(pair.chosen, pair.rejected) for pair in encoded] == [(row["chosen_ids"], row["rejected_ids"]) for row in pairs]


def test_what_is_asked(type_in, tmp_path, sft_run):
    """One pair of each prompt, none that is held out, and each has the gold rewards of its responses."""
    said = type_in("l " * 100)
    labels = rows_of(tmp_path / "labels-me/labels.jsonl")
    assert "no more questions" in said and len({row["prompt"] for row in labels}) == len(labels)
    built_in = rows_of(sft_run.parent / "pairs-bt/pairs.jsonl")
    prompts = list(dict.fromkeys(row["prompt"] for row in built_in))
    assert {row["prompt"] for row in labels} == set(prompts[:len(labels)])
    first_held, *more = (sum(row["prompt"] == prompt for row in built_in) for prompt in prompts[len(labels):])
    assert sum(more) < len(built_in) // 20 <= first_held + sum(more)
    gold = {(row["prompt"], row[name]): row[f"{name}_reward"] for row in built_in for name in ("chosen", "rejected")}
    for row in rows_of(tmp_path / "labels-me/pairs.jsonl"):
        assert [row["chosen_reward"], row["rejected_reward"]] == [gold[row["prompt"], row[x]] for x in ("chosen", "rejected")]


def test_stopped_and_continued(type_in, tmp_path):
    """In parts, with a second look at an answer of the part before, or in one go: the same files."""
    type_in("l r t q")
    type_in("u s r")
    type_in("l")
    parts = [(tmp_path / "labels-me" / name).read_bytes() for name in ("labels.jsonl", "pairs.jsonl")]
    type_in("l r s r l", out=str(tmp_path / "at-once"))
    assert parts == [(tmp_path / "at-once" / name).read_bytes() for name in ("labels.jsonl", "pairs.jsonl")]
    type_in("u u u u u u")
    assert {path.name for path in (tmp_path / "labels-me").iterdir()} == {"config.json"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, OSError])
def test_every_answer_is_kept_at_once(stop, type_in, tmp_path, monkeypatch):
    """Whatever happens while the third question is on the screen: both answers are on disk."""
    def keys():
        yield from "lr"
        assert len(rows_of(tmp_path / "labels-me/labels.jsonl")) == 2
        raise stop
    typed = keys()
    monkeypatch.setattr(label, "read_key", lambda: next(typed))
    with pytest.raises(stop):
        type_in("")
    assert len(rows_of(tmp_path / "labels-me/pairs.jsonl")) == 2


def test_the_side_tells_nothing():
    """In a pairs file the chosen response is the first: on the screen it is the left one half of the time."""
    rows = [{"prompt": str(i), **{f"{name}{more}": value for name in ("chosen", "rejected") for more, value in (
        ("", name), ("_ids", [i]), ("_reward", 0.5))}} for i in range(4000)]
    left = [asked["chosen"] == "chosen" for asked in label.questions(rows)]
    assert abs(sum(left) / 4000 - 0.5) < 3 * 0.5 / math.sqrt(4000)
    assert [asked["prompt"] for asked in label.questions(rows)] != [row["prompt"] for row in rows]
    assert label.questions(rows) == label.questions(rows)


def test_control_characters_are_shown_as_such(capsys, monkeypatch):
    """A model of bytes may write an escape sequence, which would clear the screen."""
    monkeypatch.setenv("COLUMNS", "80")
    label.show(1, 2, question("a\x1b[2Jb", " c\r\x07", 0, " two\nlines", 0))
    said = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in said) and "a\ufffd[2Jb" in said
    assert "... two\n        lines\n" in said and max(map(len, said.splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "1")
    label.show(1, 2, asked(1)[0])


# ---- the terminal ----------------------------------------------------------------------------------------------------

def test_a_key_without_enter(monkeypatch):
    """On a real terminal (a pseudo one): each key at once, arrows for left and right, other special keys mean nothing, and the
    terminal is afterwards as it was."""
    termios, pty = pytest.importorskip("termios"), pytest.importorskip("pty")
    master, slave = pty.openpty()
    with os.fdopen(slave, "r") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        before = termios.tcgetattr(slave)
        for typed, key in ((b"l", "l"), (b"R", "r"), (b"\x1b[D", "l"), (b"\x1b[C", "r"), (b"\x1bOQ", " "), (b"\x04", "")):
            os.write(master, typed)
            assert label.read_key() == key
            assert termios.tcgetattr(slave) == before
        os.write(master, b"ltq")
        assert [label.read_key() for _ in range(3)] == ["l", "t", "q"]
    os.close(master)


def test_no_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert label.read_key() == ""
    monkeypatch.setattr(sys, "stdin", io.StringIO("L\n\nq"))
    assert [label.read_key() for _ in range(4)] == ["l", " ", "q", ""]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    assert label.read_key() == "?"


# ---- what is refused -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("damage, expected", [
    (lambda lines: lines[:1] + [lines[1][:40]], "labels.jsonl, line 2: not JSON"),
    (lambda lines: lines[:1] + [lines[1].replace("right", "up").replace('"up":', '"right":')],
     "labels.jsonl, line 2: answer 'up', expected one of left, right, tie, skip"),
    (lambda lines: lines[1:], "labels.jsonl, line 1: is not question 1: a line was edited, moved or removed"),
    (lambda lines: [lines[0].replace('"prompt": "', '"prompt": "x')], "labels.jsonl, line 1: is not question 1"),
    (lambda lines: ['{"prompt": "x"}'], "labels.jsonl, line 1: no field 'left'"),
    (lambda lines: [lines[0].replace('"left"}', "null}")], "labels.jsonl, line 1: field 'answer' is null, expected str"),
    (lambda lines: [""], "labels.jsonl: empty"),
])
def test_a_damaged_file(damage, expected, type_in, tmp_path):
    type_in("l r")
    path = tmp_path / "labels-me/labels.jsonl"
    path.write_text("\n".join(damage(path.read_text().splitlines())) + "\n")
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(SystemExit, match="^error: ") as stop:
        type_in("l")
    assert expected in str(stop.value) and "\n" not in str(stop.value)
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def test_more_answers_than_questions(tmp_path):
    files.write_jsonl(path := tmp_path / "labels.jsonl",
                      [{"prompt": f"p{i}", "left": f" a{i}", "right": f" b{i}", "answer": "tie"} for i in range(3)])
    assert label.read_answers(path, asked(3)) == ["tie"] * 3
    with pytest.raises(SystemExit, match="line 3: is not question 3"):
        label.read_answers(path, asked(2))


def test_refused(type_in, tmp_path, sft_run):
    with pytest.raises(SystemExit, match="^error: --name a/b: expected letters"):
        label.Config(name="a/b")
    with pytest.raises(SystemExit, match="^error: .*nothing to report, no pair has been answered there"):
        type_in("", report=True)
    assert not (tmp_path / "labels-me").exists()
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(SystemExit, match="unfinished: no finished run there"):
        type_in("l", sft=str(tmp_path / "unfinished"))
    with pytest.raises(SystemExit, match="'w' is no answer, expected one of l left"):
        type_in("l w l")  # the first answer is kept
    config = json.loads((tmp_path / "labels-me/config.json").read_text())
    config["built_from"]["policy"] = "another"
    files.write_json(tmp_path / "labels-me/config.json", config)
    with pytest.raises(SystemExit, match="policy was 'another', now '.*: give another --name"):
        type_in("l")
    assert len(rows_of(tmp_path / "labels-me/labels.jsonl")) == 1


# ---- how often they are right ----------------------------------------------------------------------------------------

def test_agreement_by_hand(capsys):
    """Five pairs: three right, one wrong, one of equal gold rewards: 3.5 of 5. At p = 4.5 / 7, sqrt(p (1 - p) / 7) = 0.1811."""
    rows = [{"chosen_reward": a, "rejected_reward": b} for a, b in ((0.9, 0.1), (0.8, 0.2), (0.5, 0.4), (0.1, 0.6), (0.3, 0.3))]
    assert label.agreement(rows) == pytest.approx((0.7, math.sqrt(4.5 * 2.5 / 7**3)))
    assert label.agreement(rows[:3]) == pytest.approx((1, math.sqrt(4 / 5**3)))  # not 0
    questions = [question("p", "a", left, "b", right) for left, right in ((0.9, 0.1), (0.2, 0.8), (0.5, 0.5), (0.1, 0.6))]
    label.show_agreement(questions, ["left", "right", "tie", "left"])
    said = capsys.readouterr().out
    assert "4 answers: 3 pairs, 1 ties, 0 skipped" in said and "67% +- 22%" in said
    assert "0.70 where you agree" in said and "0.50 where you do not" in said and "left one       67% +- 29%" in said


def test_scale_of_a_labeller():
    """All pairs differ by 1/2: agreement = sigmoid(scale / 2), so scale = 2 log(a / (1 - a)). A coin has scale 0; who is wrong
    more often than right a negative one."""
    questions = [question("", "", 0.25, "", 0.75)] * 5
    for right in (0.5, 0.78, 0.9, 0.3):
        assert label.scale_of(questions, right) == pytest.approx(2 * math.log(right / (1 - right)), abs=1e-9)
    assert label.scale_of(questions, 1.0) >= 50 and label.scale_of(questions, 0.0) <= -50


@pytest.mark.parametrize("right", [0.6, 0.8])
def test_simulated_labellers_are_right_as_often(right):
    questions = asked(4000)
    rows = label.simulated_pairs(questions, label.scale_of(questions, right), 4000, seed=1)
    assert len({row["prompt"] for row in rows}) == 4000
    assert label.agreement(rows)[0] == pytest.approx(right, abs=4 * math.sqrt(right * (1 - right) / 4000))
    # fifty more are fifty more, and another labeller is asked other questions
    assert label.simulated_pairs(questions, 5.0, 100, 1)[:50] == label.simulated_pairs(questions, 5.0, 50, 1)
    assert {row["prompt"] for row in rows[:50]} != {r["prompt"] for r in label.simulated_pairs(questions, 5.0, 50, 2)}


# ---- what they are worth ---------------------------------------------------------------------------------------------

def test_report(type_in, tmp_path, sft_run, monkeypatch):
    """Trained on the very pairs, measured on pairs that nobody was asked about; kept until an answer changes."""
    monkeypatch.setattr(label, "SIMULATED", 2)
    monkeypatch.setattr(label, "MORE", 8)
    monkeypatch.setattr(evaluate, "draw_run", lambda path, *_: path.write_bytes(b""))
    calls, trained = [], label.trained
    kept = {*(sft_run.parent / "ref-logprobs").glob("*")}

    def spy(config, start, held, rows, folder, seed=0):
        calls.append((held, rows, folder, seed))
        return trained(config, start, held, rows, folder, seed)
    monkeypatch.setattr(label, "trained", spy)
    assert "what they are worth: from 8 pairs on" in type_in("l r n q")
    said = type_in("l r l r t l l n")
    folder = tmp_path / "labels-me/8-pairs"
    assert sorted(path.name for path in folder.iterdir()) == ["dpo", "pairs.jsonl", "reward-model", "worth.json"]
    assert (folder / "pairs.jsonl").read_bytes() == (tmp_path / "labels-me/pairs.jsonl").read_bytes()
    assert [len(rows) for _, rows, _, _ in calls] == [8, 8, 16, 8, 16] and [seed for *_, seed in calls] == [0, 0, 0, 1, 1]
    assert calls[1][1] == calls[2][1][:8]
    assert {*(sft_run.parent / "ref-logprobs").glob("*")} <= kept  # other tests may have left some there

    # accuracy of the reward model, pair by pair; each prompt weighs the same
    model, tokenizer = load_run(folder / "reward-model", ScalarModel)[0], Tokenizer.load(sft_run / "tokenizer.tiktoken")
    held, right = calls[0][0], {}
    assert not {row["prompt"] for row in held} & {row["prompt"] for row in rows_of(tmp_path / "labels-me/labels.jsonl")}
    for row in held:
        prompt = [tokenizer.bos, *tokenizer.encode(row["prompt"])]
        with torch.no_grad():
            chosen, rejected = (model.score(torch.tensor([ids]), torch.tensor([len(ids)])).item() for ids in (
                prompt + row["chosen_ids"], prompt + row["rejected_ids"]))
        right.setdefault(row["prompt"], []).append((chosen > rejected) == (row["chosen_reward"] > row["rejected_reward"]))
    found = json.loads((folder / "worth.json").read_text())
    assert found["you"]["accuracy"] == pytest.approx(sum(sum(x) / len(x) for x in right.values()) / len(right))
    table = json.loads((folder / "dpo/evaluation.json").read_text())["table"]
    assert found["you"]["reward"] == table["DPO beta 0.5"]["reward"] and found["you"]["kl"] == table["DPO beta 0.5"]["kl"]

    # the words: differences of labellers of the same seed
    before, after = found["simulated"]
    gains = [b["reward"] - a["reward"] for a, b in zip(before, after)]
    mean, error = sum(gains) / 2, abs(gains[0] - gains[1]) / 2
    assert f"8 more would buy:\n  DPO           {mean:+.3f} +- {error:.3f} gold reward" in said
    assert ("your 8 pairs buy DPO" in said) and all(len(line) <= 80 for line in said.splitlines() if "+-" in line)

    calls.clear()
    assert type_in("", report=True).split("pairs   reward")[1].strip() in said
    assert not calls
    model_was = (folder / "reward-model/model.pt").read_bytes()
    type_in("u r n")  # another answer to the last question: nothing of before is shown
    assert len(calls) == 5 and (folder / "reward-model/model.pt").read_bytes() != model_was


def test_what_cannot_be_told_from_nothing_is_called_so():
    assert label.verdict(0.31, 0.1) == label.verdict(-0.31, 0.1) == ""
    assert label.verdict(0.29, 0.1) == ": not to be told from nothing"
