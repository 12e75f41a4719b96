"""experiments/ledger.py: the teacher's labels against counting, sampling and errors against loops; a small run."""
import json

import numpy as np
import pytest
import torch

from common.settings import parse
from common.training import generator
from experiments import ledger
from experiments.ledger import (BOS, DOWN, T, UP, VOCABULARY, ZERO, Config, errors, label, right_numbers, student_writes,
                                teacher_writes, train)
from model import GPT, GPTConfig


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    student = GPT(GPTConfig(VOCABULARY, 1 + 2 * T, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        student.wte.weight.mul_(100)  # far from uniform
    return student


def any_texts(n):
    """Tokens of all kinds at all places."""
    texts = torch.randint(VOCABULARY, (n, 1 + 2 * T), generator=torch.Generator().manual_seed(1))
    texts[:, 0] = BOS
    return texts


# ---- the teacher -----------------------------------------------------------------------------------------------------

def test_a_label_is_what_counting_the_moves_gives():
    """After any text, also one whose numbers are wrong or in which a number stands for a move."""
    texts = any_texts(50)
    probs = label(texts)
    assert torch.equal(probs.sum(2), torch.ones(50, 2 * T))
    for text, of_text in zip(texts.tolist(), probs):
        position = 0
        for place in range(2 * T):
            if place % 2 == 0:
                assert of_text[place, DOWN] == of_text[place, UP] == 0.5
                position += {DOWN: -1, UP: 1}.get(text[place + 1], 0)
            else:
                assert of_text[place, ZERO + position] == 1


def test_the_teacher_never_slips():
    texts = teacher_writes(500, generator(0))
    assert torch.equal(texts[:, 2::2], right_numbers(texts))
    assert abs((texts[:, 1::2] == UP).float().mean() - 0.5) < 0.02
    assert texts.max() < VOCABULARY and texts[:, 2::2].min() > UP  # the numbers -T to T have tokens of their own


# ---- the student -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_a_student_writes_what_its_softmax_says_of_all_that_was_written(student):
    """Against the loop without a cache; slips are read back by the model, too."""
    slip = 0.3
    written = student_writes(student, 20, slip, generator(5))
    draw, texts, slipped = generator(5), torch.full((20, 1), BOS), 0
    for place in range(2 * T):
        token = torch.multinomial(student(texts)[:, -1].softmax(1), 1, generator=draw).squeeze(1)
        if place % 2:
            slips = torch.rand(20, generator=draw) < slip
            another = torch.randint(ZERO - T, VOCABULARY, (20, ), generator=draw)
            token = torch.where(slips, another, token)
            slipped += int(slips.sum())
        texts = torch.cat([texts, token[:, None]], 1)
    assert torch.equal(written, texts)
    assert abs(slipped / (20 * T) - slip) < 0.07


@torch.no_grad()
def test_the_error_is_what_is_not_given_to_the_right_number(student):
    texts = any_texts(7)
    total = np.zeros(T)
    for text in texts:
        probs = student(text[None, :-1])[0].softmax(1)
        position = 0
        for k in range(T):
            move = int(text[1 + 2 * k])
            position += (move == UP) - (move == DOWN)
            total[k] += 1 - float(probs[2 * k + 1, ZERO + position])
    np.testing.assert_allclose(errors(student, texts), total / 7, atol=1e-6)


def test_who_is_never_read_back_learns_as_cloning_does():
    """DAgger with a single round is cloning; with two it is not."""
    config = {"labels": 64, "steps": 2, "out": "unused"}
    alone = [train(Config(iterations=1, **config), method, 64, 0).wte.weight for method in ledger.METHODS]
    assert torch.equal(*alone)
    cloning, dagger = [train(Config(iterations=2, **config), method, 64, 0).wte.weight for method in ledger.METHODS]
    assert not torch.equal(cloning, dagger)


# ---- the command -----------------------------------------------------------------------------------------------------

def test_a_small_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ledger, "MEASURED", 200)
    out = tmp_path / "ledger"
    ledger.main(parse(Config, ledger.__doc__, ["--labels", "320", "--steps", "10", "--seeds", "2", "--iterations", "3",
                                                 "--out", str(out)]))
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["labels"], row["method"]) for row in rows] == [
        (seed, labels, method) for seed in (0, 1) for labels in (20, 80, 320) for method in ledger.METHODS]
    # the first move decides between two numbers; a student that has learned next to nothing is wrong at the last one
    assert all(len(row["own"]) == len(row["teachers"]) == T and row["own"][-1] > 0.5 for row in rows)
    mean = 100 * np.mean([row["own"] for row in rows if row["labels"] == 320 and row["method"] == "DAgger"])
    assert f"{mean:.2f}" in capsys.readouterr().out
    assert (out / "figure.png").stat().st_size > 0


@pytest.mark.parametrize("flags, says", [(["--labels", "159"], "--labels 159: must be from 160"), (["--slip", "1"], "--slip 1"),
                                         (["--steps", "3"], "--steps 3: must be at least one")])
def test_what_cannot_be_run_is_said(flags, says, tmp_path):
    with pytest.raises(SystemExit) as stop:
        parse(Config, ledger.__doc__, [*flags, "--out", str(tmp_path)])
    assert says in str(stop.value)
