"""reinforce.py: the baseline and its gradient by enumeration, one update from the definition, and that the script arrives."""
import copy
import itertools
import math
import statistics

import pytest
import torch

import clone
import data.reviews
import evaluate
import reinforce
from common.run import load_run
from common.tokenizer import Tokenizer
from conftest import log_of, naive_logprobs, smaller
from model import ScalarModel
from reinforce import leave_one_out
from toy import exact_kl, gradient, logprobs_of, rows_of, share_of_what_can_be_gained


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No figure, which takes matplotlib a second, and 4 responses of the reference to each of 3 test prompts."""
    monkeypatch.setattr(evaluate, "draw_run", lambda *args: None)
    monkeypatch.setattr(data.reviews, "TASK", smaller(data.reviews.TASK, bank_prompts=3, bank_samples=4))


# ---- the baseline ----------------------------------------------------------------------------------------------------

def test_leave_one_out_by_hand():
    """Returns 1, 5, 9 of a prompt's three samples, 2, 2, 8 of another's: each less the mean of the two beside it."""
    returns = torch.tensor([1.0, 5, 9, 2, 2, 8])
    assert leave_one_out(returns, 3).tolist() == [1 - 7, 5 - 5, 9 - 3, 2 - 5, 2 - 5, 8 - 2]


def estimates(tables, samples: int, baseline: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient estimate of every tuple of `samples` responses, (tuples, 9); how likely each is; and the exact gradient of
    E[r] - beta KL, by autograd."""
    table, ref, r = tables
    table.requires_grad_()
    logprobs, ref_logprobs = logprobs_of(table).sum(1), logprobs_of(ref).sum(1)  # log pi(y), (7,)
    scores = torch.stack([gradient(one, table).flatten() for one in logprobs])  # grad log pi(y)
    p = logprobs.exp().detach()
    returns = r - 0.7 * (logprobs.detach() - ref_logprobs)
    tuples = torch.tensor(list(itertools.product(range(7), repeat=samples)))
    taken = returns[tuples]
    advantages = leave_one_out(taken.flatten(), samples).view(taken.shape) if baseline else taken
    found = (advantages[..., None] * scores[tuples]).mean(1)
    exact = gradient((logprobs.exp() * r).sum() - 0.7 * exact_kl(table, ref), table).flatten()
    return found, p[tuples].prod(1), exact


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("samples", [2, 3])
def test_the_estimate_is_unbiased(samples, baseline, tables):
    """Averaged over all tuples of responses it is the exact gradient, with the baseline and without; the KL needs no term of its
    own, as grad log pi is zero in expectation."""
    found, weight, exact = estimates(tables, samples, baseline)
    torch.testing.assert_close((weight[:, None] * found).sum(0), exact)


def test_a_baseline_takes_noise_away(tables):
    """Far from reward 0 it is what makes the method work: the variance without one grows with the square of the shift."""
    table, ref, r = tables

    def variance(shift: float, baseline: bool) -> float:
        found, weight, exact = estimates((table, ref, r + shift), 3, baseline)
        return (weight * (found - exact).square().sum(1)).sum().item()

    assert variance(10.0, True) == pytest.approx(variance(0.0, True))  # the baseline does not see it
    assert variance(10.0, False) > 10 * variance(10.0, True)


# ---- the script ------------------------------------------------------------------------------------------------------

GIVEN = "--sft runs/sft --reward rewards.py:letters --steps 1 --batch-size 24 --warmup 1 "


@pytest.fixture
def small_run(toy, tmp_path):
    """run(argv) trains, one update of 24 responses by default, and returns the rows of the updates and the run folder."""
    def run(argv):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        assert clone.run_here(*toy, "reinforce", *(GIVEN + argv).split(), "--out", out) == 0
        return [row for row in log_of(out) if "scores" in row], out
    return run


def test_the_script_reaches_the_optimum(small_run, toy):
    """99% of what can be gained of E[r] - beta KL over the reference, every expectation a sum over all responses."""
    log, folder = small_run("--batch-size 480 --samples 4 --lr 2e-2 --warmup 10 --sft short/sft --steps 150 --beta 0.5 "
                            "--micro-batch-size 480")
    assert share_of_what_can_be_gained(log, folder, toy[1]) > 0.99


@pytest.mark.parametrize("baseline", ["leave-one-out", "none"])
def test_the_second_update_is_the_definition(baseline, small_run, gradients, toy, monkeypatch):
    """Its gradient from one unpadded row at a time: scores shifted and scaled by the reference's, less beta times the
    log-ratio; less the mean of the other samples; times log pi(y|x). Whether 24 responses run at once or 5 at a time."""
    beta, drawn, sample = 0.3, [], reinforce.generate
    (ref, _), (judge, _) = load_run(toy[1] / "runs/sft"), load_run(toy[1] / "runs/reward-model", ScalarModel)
    monkeypatch.setattr(reinforce, "generate", lambda policy, *rest, **more: drawn.append(
        (copy.deepcopy(policy), sample(policy, *rest, **more))) or drawn[-1][1])
    for at_once in (64, 5):
        drawn.clear(), gradients.clear()
        log, _ = small_run(f"--reward runs/reward-model --steps 2 --lr 1e-2 --samples 3 --beta {beta} --baseline {baseline} "
                           f"--micro-batch-size {at_once}")
        (_, of_reference), _, (policy, samples) = drawn
        read = lambda prompt, response: judge(torch.tensor([prompt + response]))[0, -1].item()  # noqa: E731
        base = [read(*row) for row in rows_of(of_reference)]
        policy.requires_grad_(True).zero_grad()
        logprobs, returns = [], []
        for prompt, response in rows_of(samples):
            logprobs.append(naive_logprobs(policy, prompt, response).sum())
            kl = (logprobs[-1] - naive_logprobs(ref, prompt, response).sum()).item()
            returns.append((read(prompt, response) - statistics.fmean(base)) / statistics.pstdev(base) - beta * kl)
        loss = 0.0
        for i, logprob in enumerate(logprobs):
            others = [returns[j] for j in range(i - i % 3, i - i % 3 + 3) if j != i]
            loss = loss - (returns[i] - (statistics.fmean(others) if baseline != "none" else 0)) * logprob
        (loss / sum(len(response) for _, response in rows_of(samples))).backward()
        assert abs(kl) > 1e-3 and len(gradients) == 2
        torch.testing.assert_close(gradients[-1], [p.grad for p in policy.parameters()], rtol=1e-3, atol=2e-5)
        assert log[1]["objective"] == pytest.approx(statistics.fmean(returns), abs=1e-4)


def test_the_run_starts_at_the_reference(small_run):
    """Before the first update the KL is 0 within rounding; every column is a number, also where a batch is one response."""
    log, _ = small_run("--steps 3 --samples 3")
    assert abs(log[0]["kl"]) < 1e-4 < abs(log[2]["kl"])
    log, _ = small_run("--steps 3 --samples 1 --batch-size 1 --baseline none")
    assert all(math.isfinite(value) for row in log for value in row.values())


def test_shift_and_scale_of_a_reward_change_nothing(small_run):
    """f, f + 10 and 3 f + 10 train the same policy: scores are counted from the reference's mean, in its deviations."""
    runs = [small_run(f"--reward rewards.py:{name} --steps 3 --samples 3") for name in ("letters", "ten_more", "three_times")]
    tokens = torch.randint(256, (50, 8), generator=torch.Generator().manual_seed(0))
    logits = [load_run(folder)[0](tokens) for _, folder in runs]
    for found in logits[1:]:
        torch.testing.assert_close(found, logits[0], rtol=0, atol=1e-4)


def test_the_policy_ends_responses_where_that_pays(small_run, toy):
    """A reward of minus one a letter: responses get shorter, and their scores rise."""
    (toy[1] / "short.py").write_text("def f(prompts, responses):\n    return [-float(len(r)) for r in responses]\n")
    log, folder = small_run("--reward short.py:f --steps 12 --samples 4 --batch-size 64 --lr 1e-2 --beta 0.02")
    assert log[-1]["length"] < log[0]["length"] - 0.5 and log[-1]["raw_scores"] > log[0]["raw_scores"] + 0.5
    assert Tokenizer.load(folder / "tokenizer.tiktoken").eos == 258
