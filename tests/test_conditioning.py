"""conditioning.py: where it ends, by enumeration; Quark's loss by its slow definition; and that the script goes there."""
import copy
import itertools
import json
import math

import pytest
import torch

import clone
import conditioning
import data.reviews
import evaluate
from common.run import load_run
from common.tokenizer import Tokenizer
from conditioning import (ControlledEmbedding, behind_the_best, preferred_weights, quantiles_of, quark_losses,
                          without_controls)
from conftest import log_of, naive_logprobs, smaller, tiny_gpt
from toy import PROBS, REWARD, best_of_n


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No figure, which takes matplotlib a second, and 4 responses of the reference to each of 3 test prompts."""
    monkeypatch.setattr(evaluate, "draw_run", lambda *args: None)
    monkeypatch.setattr(data.reviews, "TASK", smaller(data.reviews.TASK, bank_prompts=3, bank_samples=4))


# ---- conditioning and Preferred-FT -----------------------------------------------------------------------------------

def fitted(rows, weights, tables):
    """Tables of logits that minimise sum of weights * -log pi(response | table): rows of (table, response)."""
    logits = torch.zeros(tables, len(PROBS), dtype=torch.double, requires_grad=True)
    table, response = torch.tensor(rows).T
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -(weights * logits.log_softmax(1)[table, response]).sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    return logits.detach().softmax(1)


@pytest.mark.parametrize("scale", [1.0, 5.0, math.inf])
def test_conditioning_and_preferred_ft_have_one_target(scale):
    """Of all pairs, as often as they are drawn and won: the table behind "liked", the table of the chosen responses alone, and
    pi_ref(y) P(y wins) / P(win) are the same, though the first also learns what was disliked."""
    wins = torch.sigmoid(scale * (REWARD[:, None] - REWARD)).nan_to_num(0.5)
    rows, weights = [], []
    for i, j in itertools.product(range(7), repeat=2):
        rows += [(1, i), (0, j)]  # i wins: liked; j loses: disliked
        weights += 2 * [(PROBS[i] * PROBS[j] * wins[i, j]).item()]
    both = fitted(rows, torch.tensor(weights), 2)
    chosen = fitted([(0, i) for _, i in rows[::2]], torch.tensor(weights[::2]), 1)
    target = 2 * PROBS * (wins * PROBS).sum(1)
    torch.testing.assert_close(both[1], target, rtol=0, atol=1e-7)
    torch.testing.assert_close(chosen[0], target, rtol=0, atol=1e-7)
    torch.testing.assert_close(both[0], 2 * PROBS * (wins.T * PROBS).sum(1), rtol=0, atol=1e-7)
    if scale == math.inf:
        torch.testing.assert_close(target, best_of_n(PROBS, 2), rtol=0, atol=1e-12)


def kl(weights):
    """Of a policy that draws response i of N equally likely ones with probability weights[i]: by the row of the table."""
    M, N = weights.shape
    bank = evaluate.Bank(["x"] * M, torch.zeros(M, N), torch.ones(M, N), [[""] * N] * M)
    return torch.tensor(evaluate.limit_row(bank, weights)["kl"])


def test_without_noise_the_target_is_best_of_2_and_0193_nats_away():
    rewards = torch.rand(3, 400, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    wins = (rewards[:, :, None] > rewards[:, None, :]).double()
    weights = preferred_weights(wins)
    torch.testing.assert_close(weights, evaluate.best_of_n_weights(rewards, 2))
    assert kl(weights).mean().item() == pytest.approx(math.log(2) - 0.5, abs=2e-3)
    assert evaluate.best_of_n_kl(2) == pytest.approx(0.193, abs=5e-4)


def test_labels_that_say_nothing_leave_the_reference():
    weights = preferred_weights(torch.full((2, 5, 5), 0.5))
    torch.testing.assert_close(weights, torch.full((2, 5), 0.2, dtype=torch.double))
    assert kl(weights).abs().max() < 1e-12


# ---- control tokens, Quark -------------------------------------------------------------------------------------------

def test_quantiles_by_hand():
    scores = torch.tensor([0.3, 9.0, 0.1, 0.1, 5.0, 0.2])
    assert quantiles_of(scores, 3).tolist() == [1, 2, 0, 0, 2, 1]
    assert quantiles_of(scores, 1).tolist() == [0] * 6
    assert torch.bincount(quantiles_of(torch.zeros(10), 5)).tolist() == [2] * 5


def controlled(model, K=2, bos=1, seed=5):
    """A copy of the model with K control tokens, of vectors far from 0."""
    model = copy.deepcopy(model)
    model.wte = ControlledEmbedding(model.wte, bos, K)
    model.wte.controls.data = 0.1 * torch.randn(K, 8, generator=torch.Generator().manual_seed(seed))
    return model


def test_a_control_token_is_bos_and_a_vector():
    """0 at first: the reference; and no response can contain one, as the head has as many outputs as before."""
    plain, V = tiny_gpt(), 11
    model = controlled(plain)
    for number in (0, 1):
        hidden = copy.deepcopy(plain)
        hidden.wpe.weight.data[0] += conditioning.SCALE * model.wte.controls.data[number]
        torch.testing.assert_close(model(torch.tensor([[V + number, 5, 6]])), hidden(torch.tensor([[1, 5, 6]])))
    assert model(torch.tensor([[V, 5]])).shape == (1, 2, V)
    model.wte.controls.data.zero_()
    torch.testing.assert_close(model(torch.tensor([[V, 5, 6]])), plain(torch.tensor([[1, 5, 6]])))


def test_behind_the_best():
    """Inside, <bos> is the last control token to all who read it; outside, nothing has changed. What is kept stays so."""
    model, V = controlled(tiny_gpt()), 11
    wanted, before = model(torch.tensor([[V + 1, 5, 6]])), model(torch.tensor([[1, 5, 6]]))
    with behind_the_best(model):
        torch.testing.assert_close(model(torch.tensor([[1, 5, 6]])), wanted)
    assert torch.equal(model(torch.tensor([[1, 5, 6]])), before)
    kept = without_controls(model)
    torch.testing.assert_close(kept(torch.tensor([[1, 5, 6]])), wanted)
    assert kept.state_dict().keys() == tiny_gpt().state_dict().keys()


def test_quarks_loss_by_its_definition():
    """Token by token: -log pi of what was written, and kappa sum_v pi_ref(v) log pi_ref(v) / pi(v), on unpadded rows."""
    policy, ref, bos, kappa = controlled(tiny_gpt(seed=1)), tiny_gpt(seed=2), 1, 0.3
    rows = [([11, 4], [5, 6, 2]), ([12, 4, 3], [7, 2])]
    tokens = torch.tensor([[11, 4, 5, 6, 2], [12, 4, 3, 7, 2]])
    losses, kl = quark_losses(policy, ref, tokens, torch.tensor([2, 3]), torch.tensor([5, 5]), bos, kappa)
    for i, (prompt, response) in enumerate(rows):
        wanted = 0.0
        for t in range(len(response)):
            before = prompt[1:] + response[:t]
            p = ref(torch.tensor([[bos] + before]))[0, -1].softmax(0)
            q = policy(torch.tensor([[prompt[0]] + before]))[0, -1].softmax(0)
            wanted += sum(p[v] * (p[v] / q[v]).log() for v in range(11)).item()
        assert kl[i].item() == pytest.approx(wanted, rel=1e-4)
        plain = -naive_logprobs(policy, prompt, response).sum().item()
        assert losses[i].item() == pytest.approx(plain + kappa * wanted, rel=1e-4)


def test_at_the_start_quark_is_the_reference():
    """Control tokens without a vector yet: no KL, and with kappa its gradient is that of next-token prediction alone."""
    policy, ref, bos = controlled(tiny_gpt()), tiny_gpt(), 1
    policy.wte.controls.data.zero_()
    inputs = torch.tensor([[12, 4, 5, 6, 2]]), torch.tensor([2]), torch.tensor([5])
    gradients = []
    for kappa in (0.0, 5.0):
        losses, kl = quark_losses(policy, ref, *inputs, bos, kappa)
        assert kl.item() == pytest.approx(0, abs=1e-6)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(losses.sum(), [*policy.parameters()])]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


# ---- the script ------------------------------------------------------------------------------------------------------

GIVEN = "--sft short/sft --warmup 1 --lr 1e-2 "


@pytest.fixture
def small_run(toy, tmp_path):
    """run(argv) trains, and returns the log and the run folder."""
    def run(argv):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        assert clone.run_here(*toy, "conditioning", *(GIVEN + argv).split(), "--out", out) == 0
        return log_of(out), out
    return run


def test_quark_with_one_quantile_learns_what_it_wrote(small_run, toy):
    """No response is better than another, so the policy stays near the reference; with five quantiles it does not."""
    gain = {}
    for quantiles in (1, 5):
        log, _ = small_run(f"--on samples --reward rewards.py:letters --quantiles {quantiles} --rounds 3 --epochs 4 --kappa 0.01 "
                           "--round-prompts 400 --batch-size 200")
        scores = [row["scores"] for row in log if "round" in row]
        gain[quantiles] = scores[-1] - scores[0]  # each of 1,600 responses: an error of 0.03
    assert abs(gain[1]) < 0.1 and gain[5] > 0.15


def test_what_is_kept_prefers_what_was_liked(small_run, toy, monkeypatch):
    """From <bos> on, without a control token."""
    pairs = toy[1] / "pairs.jsonl"
    monkeypatch.setattr(conditioning.pipeline, "sampled_pairs", lambda *args: pairs)
    _, folder = small_run("--epochs 30 --lr 1e-2 --sft runs/sft --batch-size 20")
    policy, ref = load_run(folder)[0], load_run(toy[1] / "runs/sft")[0]
    tokenizer = Tokenizer.load(folder / "tokenizer.tiktoken")
    wins = {}
    for row in map(json.loads, pairs.read_text().splitlines()):
        wins.setdefault(row["chosen"], 0)
        wins[row["chosen"]] += 1
        wins.setdefault(row["rejected"], 0)
    best, worst = max(wins, key=wins.get), min(wins, key=wins.get)

    def margin(model):
        return sum(sign * naive_logprobs(model, [tokenizer.bos, *tokenizer.encode("a")],
                                         [*tokenizer.encode(text), tokenizer.eos]).sum().item()
                   for sign, text in ((1, best), (-1, worst)))
    assert margin(policy) > margin(ref) + 1
