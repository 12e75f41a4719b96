"""experiments/overoptimization.py: the fits where the answer is known, best of n by enumeration, and a small run."""
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import data.reviews
import evaluate
from common import pipeline
from common.settings import parse
from conftest import smaller
from experiments import overoptimization as over
from experiments.overoptimization import Config, best_of_n, fall, fit, held_out_error, log_odds, order_accuracy

DISTANCES = np.array([math.sqrt(evaluate.best_of_n_kl(n)) for n in over.NS])


def expected_maximum(n):
    """Of n standard normals: the integral of x n phi(x) Phi(x)^(n-1)."""
    x = np.linspace(-9, 9, 200_001)
    phi = np.exp(-x**2 / 2) / math.sqrt(2 * math.pi)
    below = np.cumsum(phi) * (x[1] - x[0])
    return float((x * n * phi * below**(n - 1)).sum() * (x[1] - x[0]))


def peak(alpha: float, beta: float, form: str) -> float:
    """The distance at which a fitted curve is highest; infinity where it never falls."""
    if beta <= 0 or alpha <= 0 and form != "rl":
        return math.inf
    if form == "best-of-n":
        return alpha / (2 * beta)
    if form == "rl":
        return math.exp(min(700, alpha / beta - 1))
    return math.sqrt(alpha / (2 * beta))


# ---- the fits --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form, curve, highest", [
    ("best-of-n", lambda d: d * (1.5 - 0.4 * d), 1.5 / 0.8),
    ("rl", lambda d: d * (1.5 - 0.9 * np.log(d)), math.exp(1.5 / 0.9 - 1)),
    ("quadratic", lambda d: d**2 * (1.5 - 0.4 * d**2), math.sqrt(1.5 / 0.8))])
def test_a_hump_is_found_again(form, curve, highest):
    """Both coefficients, the peak, and no error on the further half; the other forms err there."""
    d = np.linspace(0.1, 4, 40)
    alpha, beta = fit(d, curve(d), form)
    assert (alpha, beta) == pytest.approx((1.5, 0.9 if form == "rl" else 0.4), abs=1e-9)
    assert peak(alpha, beta, form) == pytest.approx(highest)
    fine = np.linspace(0.01, 6, 60_000)
    assert fine[curve(fine).argmax()] == pytest.approx(highest, abs=1e-3)
    errors = {form: held_out_error(d, curve(d), form) for form in over.FORMS}
    assert errors.pop(form) < 1e-9 and min(errors.values()) > 0.1


def test_goodhart_with_gaussians_has_no_hump():
    """Proxy = gold + noise, both standard normal: the gold reward of the best of 16 is E max / sqrt 2 = 1.2488 (Gao et al.,
    regressional Goodhart). It rises for ever, and the fit says so: its peak is far beyond n = 10^9. With a proxy whose error
    grows in its own tail the same fit finds the hump."""
    proxy = np.array([expected_maximum(n) for n in over.NS])
    gold = proxy / math.sqrt(2)
    assert gold[over.NS.index(16)] == pytest.approx(1.2488, abs=5e-5)
    beyond = math.sqrt(evaluate.best_of_n_kl(10**9))
    assert peak(*fit(DISTANCES, gold, "best-of-n"), "best-of-n") > beyond
    near = DISTANCES <= DISTANCES[-1] / 2  # the nearer half alone says it, too
    assert peak(*fit(DISTANCES[near], gold[near], "best-of-n"), "best-of-n") > beyond

    humped = gold - 0.25 * gold**2  # its best is gold = 2, just below the best of 256
    assert peak(*fit(DISTANCES, humped, "best-of-n"), "best-of-n") == pytest.approx(DISTANCES[humped.argmax()], rel=0.15)
    assert held_out_error(DISTANCES, humped, "best-of-n") < 0.05


def test_the_bank_of_that_toy():
    """The same from 256 samples a prompt, by order statistics: unbiased, so 1,000 prompts come within their error."""
    draw = torch.Generator().manual_seed(0)
    gold, noise = torch.randn(2, 1000, 256, generator=draw)
    found = best_of_n(gold + noise, gold, [1, 16])
    mean, error = over.mean_se(found["gold"][1])
    assert abs(mean - 1.2488) < 3 * error < 0.12
    assert found["proxy"][1] == pytest.approx(1.7661 * math.sqrt(2), abs=0.05)
    assert found["gold"][0] == pytest.approx(gold.double().mean(1).numpy())


def test_best_of_n_by_enumeration():
    """All sets of 3 of 7 responses."""
    draw = torch.Generator().manual_seed(1)
    scores, gold = torch.randn(2, 2, 7, generator=draw)
    found = best_of_n(scores, gold, [3])
    for row in range(2):
        best = [max(some, key=lambda i: scores[row, i]) for some in itertools.combinations(range(7), 3)]
        assert found["gold"][0, row] == pytest.approx(gold[row, best].double().mean().item(), abs=1e-6)


def test_too_few_points_predict_nothing_and_a_rising_curve_has_no_peak():
    assert math.isnan(held_out_error(np.array([0, 1, 2, 3, 4]), np.zeros(5), "rl"))
    d = np.linspace(0.1, 2, 9)
    assert peak(*fit(d, d + d**2, "best-of-n"), "best-of-n") == math.inf
    assert fit([0, 1, 2, 4], [0, 1, 2, 4], "rl") == pytest.approx((1, 0))  # d log d is 0 at 0


# ---- falls, orders, log-odds -----------------------------------------------------------------------------------------

def test_noise_alone_makes_no_fall():
    """A flat curve of 12 points: the largest less the last is above 0, the fall is not on average; a true one is measured."""
    rng = np.random.default_rng(0)
    curves = rng.normal(size=(400, 12, 64))
    falls, naive = [fall(curve) for curve in curves], [curve.mean(1).max() - curve[-1].mean() for curve in curves]
    mean, error = over.mean_se(falls)
    assert abs(mean) < 3 * error and np.mean(naive) > 10 * error
    hump = np.array([0, 1, 2, 0.5])[:, None] + rng.normal(size=(4, 64)) / 20
    assert fall(hump) == pytest.approx(1.5, abs=0.05)


def test_order_and_log_odds_by_hand():
    gold = torch.tensor([[0.1, 0.9, 0.4, 0.4, 0.2, 0.7]])
    assert order_accuracy(torch.tensor([[0.0, 1, 0, 5, 3, 2]]), gold) == 0.5  # right, a tie, wrong
    assert log_odds([0.5, 0.9]) == pytest.approx([0, math.log(9)])
    row = {"reward": [0.5, 0.9, 0.8]}
    assert over.gain(row) == pytest.approx([0, math.log(9), math.log(4)])
    assert over.gain(row).argmax() == np.argmax(row["reward"])


# ---- the command -----------------------------------------------------------------------------------------------------

def test_a_small_run(small_reviews, sft_run, tmp_path, monkeypatch, capsys):
    """Two seeds of two sizes, one of PPO and DPO; rows, table and figure agree, and a second start trains nothing."""
    settings = {"sft": dict(steps=5, batch_size=8), "reward_model": dict(epochs=1.0, warmup=2)}
    monkeypatch.setattr(data.reviews, "TASK", smaller(data.reviews.TASK, pair_prompts=40, pair_samples=4, bank_prompts=4,
                                                      bank_samples=16, settings=settings))
    monkeypatch.setattr(over, "MIN_STEPS", 3)
    monkeypatch.setattr(over, "MEMBERS", 2)
    monkeypatch.setattr(over.ppo.Config, "steps", 2)
    trained = []

    def run_all(planned, folder, workers):
        for run in planned:
            if not over.is_finished(run):
                pipeline.stage(run.config)
                trained.append(Path(run.config.out).name)
        return planned, False
    monkeypatch.setattr(over, "run_all", run_all)
    shutil.copytree(sft_run, tmp_path / "runs/sft")
    flags = ["--sft", str(tmp_path / "runs/sft"), "--small", "1x16", "--counts", "30,60", "--weak", "30", "--seeds", "2",
             "--policy-seeds", "0", "--prompts", "3"]
    config = parse(Config, over.__doc__, flags)
    over.main(config)
    assert len(trained) == 2 * (2 + 1 + 2 + 1)  # the weak one with a second member, the small one, the next count, all pairs
    folder = tmp_path / "runs/overoptimization"
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert rows[0]["setting"] == "gold" and rows[0]["gold_accuracy"] == 1
    for row in rows:
        assert row["n"] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16] and row["distance"][0] == 0
        assert row["reward"][0] == pytest.approx(rows[0]["reward"][0]) and all(np.array(row["reward"]) <= rows[0]["reward"])
        assert row["proxy"] == sorted(row["proxy"])
    mean = [row for row in rows if row["setting"] == "mean of 4"]
    assert [row["seed"] for row in mean] == [0, 1] and mean[0]["reward"] != mean[1]["reward"]
    text = (folder / "table.md").read_text()
    assert text == over.table(rows) and text in capsys.readouterr().out
    assert (folder / "figure.png").stat().st_size > 20_000
    before = len(trained)
    over.main(config)
    assert len(trained) == before
    assert rows == [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_the_quick_form_compares_less():
    """--quick: one seed and two betas in the same folder, so that the whole goes on with its runs."""
    quick, usual = (parse(Config, over.__doc__, flags) for flags in (["--quick"], []))
    assert (quick.seeds, quick.policy_seeds, quick.betas, quick.penalties, quick.prompts) == (1, 1, "0.01,1", "", 32)
    assert quick.out == usual.out and usual.seeds == 3


def test_the_policies_that_are_planned(tmp_path):
    """PPO on the weak proxy of its seed, free and held; DPO from the pairs of its seed; none for an empty list."""
    proxies = [over.PlannedRun("2x8", count, seed, over.reward_model.Config(out=f"{count}-{seed}"))
               for seed in (0, 1) for count in ("300", "1000", "all")]
    config = Config(policy_seeds=2, penalties="0.2", betas="0.1", out=str(tmp_path))
    found = over.policies(config, proxies)
    assert [(run.method, run.setting, run.seed) for run in found] == [
        (method, setting, seed) for seed in (0, 1)
        for method, setting in (("PPO", "1000, beta 1e-06"), ("PPO", "1000, beta 0.2"), ("DPO", "beta 0.1"))]
    assert [run.config.reward for run in found if run.method == "PPO"] == ["1000-0", "1000-0", "1000-1", "1000-1"]
    assert found[-1].config.pairs_seed == found[-1].config.seed == 1
    assert len(over.policies(Config(policy_seeds=1, penalties="", betas="", out=str(tmp_path)), proxies)) == 1


def test_what_a_policys_row_says(tmp_path):
    """Gold and KL of every evaluation; PPO's proxy is that of the same step, DPO's is beta KL."""
    log = [{"step": 0, "eval_reward": 0.5, "eval_reward_se": 0.01, "eval_kl": -1e-9, "eval_length": 9},
           {"step": 0, "raw_scores": 0.1}, {"step": 1, "raw_scores": 0.7},
           {"step": 2, "eval_reward": 0.8, "eval_reward_se": 0.01, "eval_kl": 4.0, "eval_length": 9},
           {"step": 2, "raw_scores": 1.5},
           {"step": 3, "eval_reward": 0.7, "eval_reward_se": 0.01, "eval_kl": 9.0, "eval_length": 9}, {"step": 3, "seconds": 1}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    run = over.PlannedRun("PPO", "30, beta 0.1", 0, over.ppo.Config(out=str(tmp_path)))
    found = over.trained(run)
    assert found["distance"] == [0, 2, 3] and found["reward"] == [0.5, 0.8, 0.7]
    assert found["proxy"] == [0.1, 1.5, None] and found["fall"] == pytest.approx(0.1)
    run = over.PlannedRun("DPO", "beta 0.1", 0, over.dpo.Config(beta=0.1, out=str(tmp_path)))
    assert over.trained(run)["proxy"] == pytest.approx([0, 0.4, 0.9], abs=1e-9)


@pytest.mark.parametrize("flags, says", [(["--weak", "500"], "--weak 500: must be one of --counts"),
                                         (["--policy-seeds", "4"], "--policy-seeds 4: must be at most"),
                                         (["--seeds", "0"], "--seeds 0: must be > 0")])
def test_what_cannot_be_run_is_said(flags, says):
    with pytest.raises(SystemExit, match=says):
        parse(Config, over.__doc__, flags)


def test_the_rows_of_the_frontier_are_read():
    """A curve of each DPO and PPO run; the other methods are left out."""
    rows = over.from_frontier("results/reviews/frontier-best/results.jsonl")
    assert {(row["method"], row["setting"]) for row in rows if row["seed"] == 2} == {
        ("DPO", "beta 1"), ("DPO", "beta 0.5"), ("DPO", "beta 0.3"), ("DPO", "beta 0.1"), ("DPO", "beta 1, epochs 3"),
        ("PPO", "all, beta 0.6"), ("PPO", "all, beta 0.3"), ("PPO", "all, beta 0.15")}
    dpo = next(row for row in rows if row["method"] == "DPO" and row["setting"] == "beta 0.5")
    assert len(dpo["reward"]) == 13 and dpo["proxy"] == pytest.approx([0.5 * d**2 for d in dpo["distance"]])
