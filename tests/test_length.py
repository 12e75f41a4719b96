"""experiments/length.py: the labels and the balance by counting, the theory by enumeration, R^2 and slope in closed form; a
small run."""
import json
import math
import shutil

import numpy as np
import pytest
import torch

import data.reviews
import dpo
import evaluate
from common.pairs import read_pairs
from common.settings import command, parse
from conftest import smaller
from experiments import length
from experiments.length import (Config, balanced, differences, explained, find_bias, mean_error, relabelled, share_of_longer,
                                shorter_than_beta)


def rows_of(gold, tokens):
    """Pairs of these differences; the rejected response has 20 tokens."""
    return [{"line": i + 1, "prompt": "p", "chosen": "a" * (20 + d), "rejected": "b" * 20, "chosen_reward": g,
             "rejected_reward": 0.0, "chosen_ids": [5] * (20 + d), "rejected_ids": [6] * 20}
            for i, (g, d) in enumerate(zip(gold, tokens))]


@pytest.fixture(scope="module")
def rows():
    draw = np.random.default_rng(0)
    return rows_of(draw.normal(0, 0.3, 8000).tolist(), draw.integers(-15, 16, 8000).tolist())


# ---- labels ----------------------------------------------------------------------------------------------------------

def test_the_share_of_the_longer_by_hand():
    """Of two pairs that differ in length the longer response wins with sigmoid(2 * 0.5 + 0.1 * 3) and sigmoid(-2 * 1 + 0.1 * 4);
    the third pair does not count."""
    expected = (1 / (1 + math.exp(-1.3)) + 1 / (1 + math.exp(1.6))) / 2
    assert share_of_longer(rows_of([0.5, 1.0, 0.7], [3, -4, 0]), 2.0, 0.1) == pytest.approx(expected)


def test_lambda_has_the_share_that_was_asked_for(rows):
    for share in (0.53, 0.57, 0.7):
        bias = find_bias(rows, 5.0, share)
        assert bias == round(bias, 3) and share_of_longer(rows, 5.0, bias) == pytest.approx(share, abs=2e-3)
        _, tokens = differences(relabelled(rows, 5.0, bias, 0))
        assert (tokens > 0).sum() / (tokens != 0).sum() == pytest.approx(share, abs=0.02)
    with pytest.raises(SystemExit, match="no preference for length"):
        find_bias(rows_of([0.1, 0.2], [1, -1]), 5.0, 0.99999)


def test_labels_are_drawn_anew_and_the_rest_of_a_pair_goes_along(rows):
    """Whoever wins: text, tokens and reward stay together. As often as the model says, whatever the old label was. A bias
    changes labels to the longer response and no others."""
    drawn, plain = relabelled(rows, 5.0, 0.05, 3), relabelled(rows, 5.0, 0.0, 3)
    assert relabelled(rows, 5.0, 0.05, 3) == drawn != relabelled(rows, 5.0, 0.05, 4)
    for old, new, unbiased in zip(rows, drawn, plain):
        assert "line" not in new
        sides = [[(row[side], row[side + "_reward"], row[side + "_ids"]) for side in ("chosen", "rejected")]
                 for row in (old, new, unbiased)]
        assert sorted(sides[0]) == sorted(sides[1]) == sorted(sides[2])
        assert sides[1] == sides[2] or len(new["chosen_ids"]) > len(new["rejected_ids"])
    gold, tokens = differences(rows)
    stays = np.array([new["chosen"] == old["chosen"] for old, new in zip(rows, drawn)])
    chance = 1 / (1 + np.exp(-(5 * gold + 0.05 * tokens)))
    for part in (chance < 0.2, (chance > 0.4) & (chance < 0.6), chance > 0.9):
        assert stays[part].mean() == pytest.approx(chance[part].mean(), abs=0.02)


def test_balanced_pairs_have_no_favourite_at_any_length(rows):
    drawn = relabelled(rows, 5.0, 0.05, 0)
    kept = balanced(drawn)
    before, after = differences(drawn)[1], differences(kept)[1]
    for size in range(16):
        fewer = min((before == size).sum(), (before == -size).sum())
        assert (after == size).sum() == (after == -size).sum() == fewer  # as many as possible
    assert [row for row in drawn if any(row is one for one in kept[:50])] == kept[:50]  # in their order


# ---- theory ----------------------------------------------------------------------------------------------------------

def test_a_small_step_gains_reward_by_its_variance_and_length_by_lambda_less_alpha():
    """pi_ref exp((s r + (lambda - alpha) |y|) / beta) / Z, where reward and length are independent: by enumeration, at large
    beta. So along beta the ratio of both gains is fixed, and alpha changes the one of length alone."""
    r, tokens = (x.flatten() for x in np.meshgrid([0.1, 0.4, 0.9], [10.0, 30, 35, 60]))
    ref = np.outer([0.5, 0.3, 0.1, 0.1], [0.2, 0.5, 0.3]).ravel()
    s, bias, beta = 5.0, 0.05, 1e4
    mean = lambda x, p: (p * x).sum()  # noqa: E731
    variance = lambda x: mean(x * x, ref) - mean(x, ref)**2  # noqa: E731
    for alpha in (0.0, 0.05, 0.2):
        p = ref * np.exp((s * r + (bias - alpha) * tokens) / beta)
        p /= p.sum()
        assert beta * (mean(r, p) - mean(r, ref)) == pytest.approx(s * variance(r), rel=1e-2)
        assert beta * (mean(tokens, p) - mean(tokens, ref)) == pytest.approx((bias - alpha) * variance(tokens), rel=1e-2,
                                                                      abs=1e-6)


def test_the_log_ratio_of_its_own_responses_grows_with_length_without_any_taste_for_it():
    """Tokens drawn from p, by the reference from q, and lengths of the same law for both: the slope is KL(p || q) > 0 a token on
    the policy's own responses and -KL(q || p) on the reference's. So a slope on its own responses is no taste for length."""
    p, q = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, 60, (500, 8), generator=draw)
    for drawn_from, expected in ((p, (p * (p / q).log()).sum()), (q, -(q * (q / p).log()).sum())):
        ratios = torch.stack([(p / q).log()[torch.multinomial(drawn_from, n, True, generator=draw)].sum()
                              for n in tokens.flatten().tolist()]).view(tokens.shape)
        r2, slope = explained(tokens, ratios)
        assert slope == pytest.approx(expected.item(), abs=0.03) and r2 > 0.3


# ---- what is measured ------------------------------------------------------------------------------------------------

def test_r2_and_slope_do_not_see_what_is_the_same_for_a_prompt():
    draw = torch.Generator().manual_seed(0)
    x, of_prompt = torch.randint(5, 70, (40, 4), generator=draw), 100 * torch.randn(40, 1, generator=draw)
    assert explained(x, 0.3 * x + of_prompt) == pytest.approx((1, 0.3), abs=1e-5)
    noisy = 0.3 * x + 4 * torch.randn(40, 4, generator=draw)
    inside = [(v - v.mean(1, keepdim=True)).flatten().double().numpy() for v in (x.double(), noisy)]
    expected = np.corrcoef(*inside)[0, 1]**2, np.polyfit(*inside, 1)[0]
    assert explained(x, noisy + of_prompt) == pytest.approx(expected, abs=1e-5)
    assert explained(x, of_prompt.expand(40, 4)) == (0, 0) == explained(torch.ones(40, 4), noisy)
    pair = explained(torch.tensor([[30, 20], [11, 15]]), torch.tensor([[1.0, 0.0], [0.0, 0.5]]))
    assert pair[1] == pytest.approx((10 * 1 + 4 * 0.5) / (100 + 16))  # through 0, on differences


def test_how_much_shorter_at_the_same_gold_reward_by_hand():
    """The line of beta has length 40 at 0.5, 44 at 0.6 and 50 at 0.8: 47 at 0.7. Beyond its end it stays at 50."""
    rows = [{"method": name, "seed": 0, "reward": r, "length": n} for name, r, n in (
        ("SFT", 0.5, 40.0), ("DPO", 0.8, 50.0), ("larger beta", 0.6, 44.0), ("length alpha", 0.7, 35.0), ("no bias", 0.9, 45.0))]
    shorter_than_beta(rows)
    assert [row["shorter"] for row in rows] == pytest.approx([0, 0, 0, 12, 5])


def test_an_error_is_never_below_that_of_the_evaluation():
    assert mean_error([{"a": 1.0, "a_se": 0.5}, {"a": 1.0, "a_se": 0.4}], "a") == (1.0, 0.5)
    assert mean_error([{"a": 0.0, "a_se": 0.1}, {"a": 2.0, "a_se": 0.1}], "a") == (1.0, 1.0)
    assert mean_error([{"a": 1.0, "a_se": 0.5}], "a") == (1.0, 0.5) and math.isnan(mean_error([{"a": 1.0}], "a")[1])


# ---- the command -----------------------------------------------------------------------------------------------------

@pytest.fixture
def small(small_reviews, sft_run, tmp_path, monkeypatch):
    """The flags of a run with 8 prompts to learn from, in a folder of its own."""
    monkeypatch.setattr(data.reviews, "TASK", smaller(data.reviews.TASK, pair_prompts=12, pair_samples=4, bank_prompts=4,
                                                      bank_samples=16))
    monkeypatch.setattr(length, "UNSEEN", 4)
    monkeypatch.setattr(evaluate, "draw_run", lambda *_: None)
    shutil.copytree(sft_run, tmp_path / "runs/sft")
    return ["--sft", str(tmp_path / "runs/sft"), "--prompts", "8"]


def test_a_small_run(small, tmp_path, monkeypatch, capsys):
    """Every setting of two seeds; no run sees a prompt that it is measured on; rows and table agree."""
    monkeypatch.setattr(length, "ALPHAS", (1.0,))
    monkeypatch.setattr(length, "BETAS", (1.0,))

    def run_here(planned, folder, workers):
        for run in planned:
            dpo.train(run.config)
        return planned, False
    monkeypatch.setattr(length, "run_all", run_here)
    length.main(parse(Config, "", [*small, "--seeds", "2", "--share", "0.7"]))
    out = tmp_path / "runs" / "length-share0.7-prompts8-seeds2"
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    methods = ["DPO", "length alpha", "larger beta", "balanced pairs", "no bias"]
    assert [(row["seed"], row["method"]) for row in rows] == [(0, "SFT"), (1, "SFT")] + [
        (seed, method) for seed in (0, 1) for method in methods]
    for seed in (0, 1):
        texts = {name: read_pairs(out / f"pairs-{name}-seed{seed}.jsonl")
                 for name in ("unseen", "biased", "unbiased", "balanced")}
        prompts = {name: {row["prompt"] for row in found} for name, found in texts.items()}
        assert prompts["unseen"] and not prompts["unseen"] & prompts["biased"] and prompts["biased"] == prompts["unbiased"]
        assert len(texts["balanced"]) <= len(texts["biased"]) == rows[2 + 5 * seed]["pairs"]
    alpha, beta = rows[3], rows[4]
    assert alpha["alpha"] == alpha["lambda"] > 0 and (alpha["beta"], beta["beta"], beta["alpha"]) == (0.1, 1, 0)
    text = (out / "table.md").read_text()
    assert text in capsys.readouterr().out and text == length.table(rows)
    mean = sum(row["length"] for row in rows if row["method"] == "no bias") / 2
    assert f" {mean:.1f} ± " in next(line for line in text.splitlines() if line.startswith("| no bias"))
    assert (out / "figure.png").stat().st_size > 20_000


def test_print_lists_the_commands_of_a_quick_run(small, monkeypatch, capsys):
    config = parse(Config, "", [*small[:2], "--quick", "--print"])
    config.prompts = 8
    length.main(config)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and all("dpo.py" in line and "--pairs" in line for line in lines)
    assert sum("--length-alpha" in line for line in lines) == 5
    run = dpo.Config(length_alpha=0.05, pairs="x.jsonl")
    assert parse(dpo.Config, "", command(run)[1:]) == run


@pytest.mark.parametrize("flags, says", [
    (["--share", "0.5"], "--share 0.5: must be between 0.5 and 0.8"), (["--share", "nan"], "--share nan"),
    (["--quick", "--seeds", "2"], "--seeds: not with --quick"), (["--print", "--workers", "2"], "--workers: not with --print"),
    (["--prompts", "0"], "--prompts 0: must be > 0")])
def test_what_cannot_be_run_is_said(flags, says, tmp_path):
    with pytest.raises(SystemExit) as stop:
        parse(Config, length.__doc__, [*flags, "--out", str(tmp_path)])
    assert says in str(stop.value)


@pytest.mark.parametrize("flags, says", [
    (["--prompts", "1501"], "--prompts 1501: must be at most 1500"), (["--dataset", "imdb"], "has no exact gold reward")])
def test_a_task_that_does_not_fit_is_said_before_anything_is_built(flags, says, tmp_path):
    with pytest.raises(SystemExit) as stop:
        length.main(parse(Config, length.__doc__, [*flags, "--out", str(tmp_path)]))
    assert says in str(stop.value) and not list(tmp_path.iterdir())
