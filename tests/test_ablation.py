"""experiments/ablation.py: the variance of the gradient against enumeration on a tabular policy, its error against closed
forms, the regret against KL(pi || pi*); and a small run of all of it.
"""
import importlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from common import pipeline
from common.run import load_run
from common.settings import command, parse, script_of
from common.training import generator
from conftest import naive_logprobs
from data.reviews.grammar import gold_reward
from experiments import ablation
from experiments.ablation import (Config, advantages_of, fit_values, gradient, jackknife, measured, noise_and_signal, plan,
                                  roll_out)
from ppo import compute_gae, compute_rewards, response_values
from toy import RESPONSES, THERE, exact_kl, logprobs_of
from toy import gradient as gradient_of

BETA = 0.7


# ---- the variance ----------------------------------------------------------------------------------------------------

@pytest.fixture
def world(tables):
    """estimates(K): how likely each tuple of K responses is, and what each baseline makes of it, (7^K, 9), by the functions of
    the script. And the exact gradient of E[r] - beta KL; log pi's gradients (7, 9), probabilities and returns."""
    table, ref, r = tables
    table.requires_grad_()
    logprobs, p = logprobs_of(table), logprobs_of(table).sum(1).exp().detach()
    rewards = compute_rewards(r, logprobs.detach(), logprobs_of(ref), THERE, BETA)
    returns, _ = compute_gae(rewards, torch.zeros_like(rewards), THERE, 1.0, 1.0)
    values = 0.3 * torch.tensor([[1.0, -1 - response[0]] for response in RESPONSES]) * THERE  # of what came before the token
    mean = (p * returns[:, 0]).sum().item()

    def estimates(K):
        found = {}
        tuples = [list(rows) for rows in itertools.product(range(7), repeat=K)]
        for rows in tuples:
            for baseline, advantages in advantages_of(returns[rows], values[rows], mean, K).items():
                found.setdefault(baseline, []).append(gradient(logprobs[rows], advantages, [table]))
        return p[torch.tensor(tuples)].prod(1), {baseline: torch.stack(own) for baseline, own in found.items()}
    exact = gradient_of((logprobs.sum(1).exp() * r).sum() - BETA * exact_kl(table, ref), table).flatten()
    scores = torch.stack([gradient_of(one, table).flatten() for one in logprobs.sum(1)])
    return estimates, exact, scores, p, returns[:, 0]


@pytest.mark.parametrize("K", [2, 3])
def test_no_baseline_moves_the_mean_and_the_variances_are_as_predicted(K, world):
    """With R the return, s = grad log pi and |g|^2 the gradient's square, a response has the variance E[(R - b)^2 |s|^2] -
    |g|^2 with a constant b, and leave-one-out (Var(R) E|s|^2 + |g|^2) / (K - 1) more than b = E[R]: a factor of
    1 + 1/(K - 1), if (R - b)^2 and |s|^2 are independent."""
    estimates, exact, scores, p, R = world
    weight, found = estimates(K)
    assert list(found) == ["none", "none, scores + 5", "constant", "leave-one-out", "value network"]
    variance = {}
    for baseline, own in found.items():
        torch.testing.assert_close((weight[:, None] * own).sum(0), exact)
        variance[baseline] = K * (weight * (own - exact).square().sum(1)).sum().item()
    mean, signal, size = (p * R).sum(), exact.square().sum(), scores.square().sum(1)

    def with_constant(b):
        return ((p * (R - b)**2 * size).sum() - signal).item()
    assert variance["none"] == pytest.approx(with_constant(0)) and variance["constant"] == pytest.approx(with_constant(mean))
    assert variance["none, scores + 5"] == pytest.approx(with_constant(-5))
    more = ((p * (R - mean)**2).sum() * (p * size).sum() + signal).item() / (K - 1)
    assert variance["leave-one-out"] == pytest.approx(with_constant(mean) + more)


@pytest.mark.parametrize("M", [2, 3])
def test_noise_and_signal_are_unbiased(M, world):
    """Averaged over all M-tuples of estimates."""
    weight, found = world[0](2)
    weight, own = weight[::3] / weight[::3].sum(), found["leave-one-out"][::3]  # 17 of them, so that M-tuples are few
    mean = (weight[:, None] * own).sum(0)
    products, expected = (own @ own.T).numpy(), np.zeros(2)
    for rows in itertools.product(range(len(own)), repeat=M):
        expected += weight[list(rows)].prod().item() * np.array(noise_and_signal(products[np.ix_(rows, rows)]))
    assert expected == pytest.approx([(weight * (own - mean).square().sum(1)).sum().item(), mean.square().sum().item()])


def test_the_error_of_a_mean_and_of_a_ratio_by_leaving_out_one():
    """Of a mean it is std / sqrt(M); of a ratio of means what the delta method says, within a few percent for 200 pairs."""
    x, y = np.random.default_rng(0).normal([[2.0], [5.0]], 1, (2, 200)) + np.random.default_rng(1).normal(0, 1, 200)
    value, error = jackknife(lambda some: np.array([x[some].mean(), x[some].mean() / y[some].mean()]), 200)
    ratio = x.mean() / y.mean()
    assert value == pytest.approx([x.mean(), ratio])
    assert error[0] == pytest.approx(x.std(ddof=1) / math.sqrt(200))
    assert error[1] == pytest.approx((x - ratio * y).std(ddof=1) / y.mean() / math.sqrt(200), rel=0.03)


# ---- regret ----------------------------------------------------------------------------------------------------------

def test_regret_is_the_kl_to_the_optimum(tables, tmp_path):
    """A finished run whose evaluations are exact: of the reference at first, of the policy at the end."""
    (table, ref, r), beta = tables, 0.4
    log_p, log_ref = (logprobs_of(x).sum(1) for x in (table, ref))
    log_optimum = (log_ref + r / beta).log_softmax(0)

    def row(log_pi):
        return {"reward": (log_pi.exp() * r).sum().item(), "kl": (log_pi.exp() * (log_pi - log_ref)).sum().item()}
    log = [{"step": step, **{f"eval_{name}": value for name, value in row(log_pi).items()}}
           for step, log_pi in ((0, log_ref), (3, log_p))]
    log += [{"step": step, "objective": value} for step, value in enumerate((0.0, 0.3, 0.06, 0.2))]
    log += [{"step": 4, "seconds": 1.0}]
    run = plan(Config(quick=True, out=str(tmp_path)))[0]
    (folder := Path(run.config.out)).mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    limit = {"kind": "limit", "beta": beta, **row(log_optimum)}
    (folder / "evaluation.json").write_text(json.dumps({"table": {"SFT": {"kind": "reference"}, "limit": limit}}))
    found = measured(run)
    assert found["regret"] == pytest.approx([(q.exp() * (q - log_optimum)).sum().item() for q in (log_ref, log_p)])
    assert found["end"] == found["regret"][1] and found["step"] == [0, 3]
    assert found["largest_rise"] == pytest.approx(0.24 / ablation.BETA)  # in nats


# ---- with a language model -------------------------------------------------------------------------------------------

@pytest.fixture
def start(small_reviews, sft_run):
    start = pipeline.load(sft_run, "reviews", "cpu")
    start.gold, start.bank = pipeline.gold_reward(start), None
    start.bank = pipeline.sample_bank(start)
    return start


def test_a_rollout_by_its_definition(start):
    """Each return from one unpadded row at a time: the score in standard deviations of the bank's, less beta for each nat from
    the token on. Four responses to a prompt are neighbours."""
    policy = load_run(start.sft)[0]
    with torch.no_grad():
        policy.wpe.weight += 0.1 * torch.randn(policy.wpe.weight.shape, generator=torch.Generator().manual_seed(0))
        (tokens, prompt_lengths, lengths), mask, returns = roll_out(policy, start, 8, generator(0, "test"))
        for i, (row, begin, end) in enumerate(zip(tokens.tolist(), prompt_lengths.tolist(), lengths.tolist())):
            prompt, response = row[:begin], row[begin:end]
            score = gold_reward(start.tokenizer.decode(row[1:end])) - start.bank.rewards.mean().item()
            kl = naive_logprobs(policy, prompt, response) - naive_logprobs(start.ref, prompt, response)
            expected = score / start.bank.rewards.std().item() - ablation.BETA * kl.flip(0).cumsum(0).flip(0)
            torch.testing.assert_close(returns[i, :end - begin], expected, atol=1e-4, rtol=1e-4)
            assert mask[i].sum() == end - begin and prompt == tokens[i - i % 4, :begin].tolist()
    assert len(set(map(tuple, tokens.tolist()))) == 8


def test_the_value_network_learns_the_returns(start):
    """Returns that are -1 and 2 after two different prompts: it tells them apart."""
    rollout = roll_out(start.ref, start, 8, generator(0, "test"))
    sides = torch.tensor([-1.0] * 4 + [2.0] * 4)[:, None]
    assert rollout.inputs[0][0, :4].tolist() != rollout.inputs[0][4, :4].tolist()
    rollout = rollout._replace(returns=sides * rollout.mask)
    network = fit_values([rollout] * 30, start)
    assert ((response_values(network, *rollout.inputs) - rollout.returns)[rollout.mask].abs() < 0.5).all()


TINY = f"{ablation.GOLD} --warmup 1 --micro-batch-size 8"


def test_a_small_run(small_reviews, sft_run, tmp_path, monkeypatch, capsys):
    """Rows, tables and figure of a quick run; the variance is measured at the SFT policy and at that of the leave-one-out run.
    All runs start from one policy, and so from one regret."""
    sample_policy = evaluate.sample_policy
    monkeypatch.setattr(evaluate, "sample_policy", lambda *args: sample_policy(*args[:5], 2))  # responses to a prompt
    monkeypatch.setattr(evaluate, "draw_run", lambda *_: None)
    for name, value in {"BATCHES": 4, "BATCH": 8, "FITTED": 2, "QUICK_SIZES": ("x1", "x4")}.items():
        monkeypatch.setattr(ablation, name, value)
    for group in ("BASELINES", "STEPS"):
        monkeypatch.setattr(ablation, group, {
            method: line.replace(ablation.SMALL, f"{TINY} --batch-size 8 --steps 2 --evaluate-every 1")
            .replace(ablation.SHORT, f"{TINY} --batch-size 8 --steps 3 --evaluate-every 3")
            for method, line in getattr(ablation, group).items()})

    def run_here(planned, folder, workers):
        assert folder == tmp_path and all(run.built_from for run in planned)
        for run in planned:
            importlib.import_module(script_of(type(run.config)).stem).train(run.config)
        return planned, False
    measured_at, variances = [], ablation.variances
    monkeypatch.setattr(ablation, "run_all", run_here)
    monkeypatch.setattr(ablation, "variances", lambda name, policy, start: measured_at.append(
        [p.detach().clone() for p in policy.parameters()]) or variances(name, policy, start))
    ablation.main(Config(quick=True, sft=str(sft_run), out=str(tmp_path)))

    noise, runs = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
                   for name in ("variance", "results"))
    assert [(row["policy"], row["baseline"]) for row in noise] == [
        (policy, baseline) for policy in ("SFT", "after 2 updates")
        for baseline in ("none", "none, scores + 5", "constant", "leave-one-out", "value network")]
    for i, row in enumerate(noise):
        constant = noise[i - i % 5 + 2]
        assert row["ratio"] == pytest.approx(row["variance"] / constant["variance"])
        assert row["responses"] / constant["responses"] == pytest.approx(row["ratio"])
    for policy, folder in zip(measured_at, (sft_run, next(tmp_path.glob("leave-one-out*"))), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(policy, load_run(folder)[0].parameters(), strict=True))

    assert [(row["method"], row["setting"]) for row in runs] == [
        *((method, "x1") for method in ablation.BASELINES),
        *((method, size) for size in ("x1", "x4") for method in ablation.STEPS)]
    for row in runs:
        assert row["regret"][0] == pytest.approx(runs[0]["regret"][0], abs=1e-4)
        assert row["step"] == ([0, 1, 2] if row["method"] in ablation.BASELINES else [0, 3])
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out and f"| no baseline | {runs[0]['end']:.2f} | {runs[0]['reward'][-1]:.3f} |" in text
    assert "| regret at the end, nats | x1 | x4 |" in text and ablation.sizes_of(runs) == ["x1", "x4"]
    assert (tmp_path / "figure.png").stat().st_size > 20_000


# ---- what is run -----------------------------------------------------------------------------------------------------

def test_three_seeds_of_each_baseline_and_of_each_step_size():
    """A step size changes the learning rate of the policy and nothing else."""
    runs = plan(Config())
    assert len(runs) == 3 * (3 + 3 * 6) and len(plan(Config(quick=True))) == 3 + 3 * 2
    for run in runs:
        usual = next(other for other in runs if (other.method, other.setting, other.seed) == (run.method, "x1", run.seed))
        a, b = (vars(other.config) | {"out": ""} for other in (run, usual))
        assert a.pop("lr") == pytest.approx(float(run.setting[1:]) * b.pop("lr")) and a == b
        assert parse(type(run.config), "", command(run.config)[1:]) == run.config


@pytest.mark.parametrize("argv, line", [
    ("--seeds 0", "--seeds 0: must be > 0 and finite"), ("--workers -1", "--workers -1: must be >= 0 and finite"),
    ("--quick --seeds 2", "--seeds: not with --quick, which runs one seed")])
def test_a_bad_setting_is_one_line(argv, line):
    with pytest.raises(SystemExit, match=f"^error: {line}$"):
        parse(Config, "", argv.split())
