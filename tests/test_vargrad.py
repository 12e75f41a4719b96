"""vargrad.py: its loss and gradient by enumeration, that it is REINFORCE's on new responses, and that the script arrives."""
import itertools
import math

import pytest
import torch

import clone
import data.reviews
import evaluate
import vargrad
from common.run import load_run
from conftest import log_of, smaller
from model import Samples
from reinforce import leave_one_out
from toy import gradient, logprobs_of, share_of_what_can_be_gained
from common.memory import Memory
from vargrad import group_rows, variance_loss


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No figure, which takes matplotlib a second, and 4 responses of the reference to each of 3 test prompts."""
    monkeypatch.setattr(evaluate, "draw_run", lambda *args: None)
    monkeypatch.setattr(data.reviews, "TASK", smaller(data.reviews.TASK, bank_prompts=3, bank_samples=4))


# ---- the loss --------------------------------------------------------------------------------------------------------

def test_the_loss_by_hand():
    """Two prompts with three responses each: residuals 1, 3, 8 (mean 4, squares 9 + 1 + 16 = 26) and 0, 0, 6 (24)."""
    scores, log_ratios = torch.tensor([1.0, 2, 4, 0.5, 1, 3]), torch.tensor([1.0, 1, 0, 1, 2, 0])
    assert variance_loss(scores, log_ratios, 0.5, 3).tolist() == [0.5 * 26 / 2, 0.5 * 24 / 2]


def test_it_is_0_at_the_optimum_whatever_the_responses(tables):
    """Any responses, any number of each: at pi_ref exp(r / beta) / Z the residual is log Z for all of them."""
    _, ref, r = tables
    ref_logprobs = logprobs_of(ref).sum(1)
    best = ref_logprobs + r / 0.7 - torch.logsumexp(ref_logprobs + r / 0.7, 0)
    for rows in itertools.combinations_with_replacement(range(7), 4):
        rows = list(rows)
        loss = variance_loss(r[rows], (best - ref_logprobs)[rows], 0.7, 4)
        assert loss.item() == pytest.approx(0, abs=1e-24)


@pytest.mark.parametrize("samples", [2, 3])
def test_on_any_responses_its_gradient_is_that_of_reinforce(tables, samples):
    """Of every tuple of responses, not only on average: - beta grad L = mean of (return - mean of the others) grad log pi."""
    table, ref, r = tables
    table.requires_grad_()
    logprobs, ref_logprobs, beta = logprobs_of(table).sum(1), logprobs_of(ref).sum(1), 0.7
    returns = r - beta * (logprobs - ref_logprobs).detach()
    for rows in itertools.product(range(7), repeat=samples):
        rows = list(rows)
        loss = variance_loss(r[rows], (logprobs - ref_logprobs)[rows], beta, samples)
        wanted = gradient((leave_one_out(returns[rows], samples) * logprobs[rows]).mean(), table)
        torch.testing.assert_close(-beta * gradient(loss.sum(), table), wanted)


def test_with_two_responses_it_is_rebel(tables):
    """1/4 ((score_1 - score_2) / beta - (log-ratio_1 - log-ratio_2))^2: REBEL's loss (Gao et al. 2024) with eta = 1 / beta,
    but for the factor and with the reference in place of the last policy."""
    table, ref, r = tables
    log_ratios = logprobs_of(table).sum(1) - logprobs_of(ref).sum(1)
    for i, j in itertools.product(range(7), repeat=2):
        wanted = 0.25 * ((r[i] - r[j]) / 0.7 - (log_ratios[i] - log_ratios[j])) ** 2
        torch.testing.assert_close(variance_loss(r[[i, j]], log_ratios[[i, j]], 0.7, 2)[0], wanted)


@pytest.mark.parametrize("drawn_by", ["the reference", "each response alike"])
def test_the_minimum_is_the_optimum_under_any_distribution(tables, drawn_by):
    """Minimised over responses that the policy never drew (all triples, by their chance): pi* to 1e-6. A table of logits can be
    any distribution over these seven responses that is one over tokens, and pi* is one."""
    _, ref, r = tables
    ref_logprobs, beta = logprobs_of(ref).sum(1), 0.7
    chance = ref_logprobs.exp() if drawn_by == "the reference" else torch.full((7,), 1 / 7, dtype=torch.double)
    triples = torch.tensor(list(itertools.product(range(7), repeat=3)))
    weight = chance[triples].prod(1)
    table = ref.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([table], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        log_ratios = logprobs_of(table).sum(1) - ref_logprobs
        loss = (weight * variance_loss(r[triples].flatten(), log_ratios[triples].flatten(), beta, 3)).sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    best = torch.softmax(ref_logprobs + r / beta, 0)
    torch.testing.assert_close(logprobs_of(table).sum(1).exp().detach(), best, rtol=0, atol=1e-6)


def test_groups_are_neighbours():
    assert group_rows(torch.tensor([2, 0]), 3).tolist() == [6, 7, 8, 0, 1, 2]


def test_the_memory_gives_back_what_was_written():
    """Rows as long as the longest that is asked for, prompts and responses as they were sampled; a checkpoint has all of it."""
    memory = Memory(4, 6)
    first = Samples(torch.tensor([[1, 5, 9], [1, 7, 0]]), torch.tensor([1, 1]), torch.tensor([3, 2]), None)
    memory.write(2, first, torch.tensor([0.5, -1.0]), torch.tensor([-3.0, -4.0]))
    tokens, prompt_lengths, lengths = memory.inputs(torch.tensor([3, 2]))
    assert (tokens.tolist(), prompt_lengths.tolist(), lengths.tolist()) == ([[1, 7, 0], [1, 5, 9]], [1, 1], [2, 3])
    assert memory.scores.tolist() == [0, 0, 0.5, -1] and memory.ref_logprobs.tolist() == [0, 0, -3, -4]
    assert set(memory.state_dict()) == {"tokens", "prompt_lengths", "lengths", "scores", "ref_logprobs"}


# ---- the script ------------------------------------------------------------------------------------------------------

GIVEN = "--sft runs/sft --reward rewards.py:letters --steps 3 --batch-size 24 --samples 3 --warmup 1 --beta 0.5 --lr 1e-2 "


@pytest.fixture
def small_run(toy, tmp_path):
    """run(argv, script) trains, and returns the rows of the updates and the run folder."""
    def run(argv, script="vargrad"):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        assert clone.run_here(*toy, script, *(GIVEN + argv).split(), "--out", out) == 0
        return [row for row in log_of(out) if "scores" in row], out
    return run


def test_without_replay_the_script_is_reinforce(small_run):
    """The same responses, gradients and policy, to rounding."""
    ours, folder = small_run("--replay 0")
    theirs, other = small_run("", "reinforce")
    for row, wanted in zip(ours, theirs, strict=True):
        for name in ("scores", "kl", "objective", "grad_norm", "entropy", "length"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-4), name
    tokens = torch.randint(256, (50, 8), generator=torch.Generator().manual_seed(0))
    logits = [load_run(one)[0](tokens) for one in (folder, other)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-3)


def test_the_script_reaches_the_optimum(small_run, toy):
    """99% of what can be gained of E[r] - beta KL over the reference, every expectation a sum over all responses."""
    log, folder = small_run("--batch-size 240 --samples 4 --lr 2e-2 --warmup 10 --sft short/sft --steps 60 --replay 2 "
                            "--micro-batch-size 240")
    assert share_of_what_can_be_gained(log, folder, toy[1]) > 0.99
    assert log[-1]["loss"] < 0.2 * log[0]["loss"]


def test_every_response_is_remembered(small_run, toy, monkeypatch):
    """Drawn in three updates: 72 rows, whose log pi_ref is that of the reference."""
    made = []
    monkeypatch.setattr(vargrad, "Memory", lambda *sizes: made.append(Memory(*sizes)) or made[-1])
    log, _ = small_run("--replay 1")
    memory = made[0].state_dict()
    lengths = memory["lengths"] - memory["prompt_lengths"]
    assert len(lengths) == 72 and (lengths > 0).all()
    assert lengths[24:48].float().mean().item() == pytest.approx(log[1]["length"])
    ref, _ = load_run(toy[1] / "runs/sft")
    for i in (0, 30, 71):
        n, p = memory["lengths"][i], memory["prompt_lengths"][i]
        row = memory["tokens"][i, :n].long()
        logprobs = ref(row[None])[0].log_softmax(1)
        wanted = sum(logprobs[t - 1, row[t]].item() for t in range(p, n))
        assert memory["ref_logprobs"][i].item() == pytest.approx(wanted, abs=1e-4)
    assert "replay_loss" not in log[0] and math.isfinite(log[1]["replay_loss"])
