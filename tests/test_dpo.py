"""dpo.py: the loss in closed form, where DPO ends and why, and the training loop against formulas written out here.

The central test is `test_all_roads_lead_to_the_same_policy`.
"""
import json
import math
import re
import shutil

import pytest
import torch

import clone
import dpo
import evaluate
from common.files import sha256
from common.training import adamw, batches, half_ties, pad
from conftest import every_response, log_of, naive_logprobs, tiny_gpt
from common import pipeline
from common.pairs import encode_pairs, read_pairs, split
from common.tokenizer import Tokenizer
from derive import (all_pairs, log_partition, minimise, objective, optimum, policy_by_ascent, policy_by_dpo, preference,
                    reward_by_bradley_terry)
from dpo import dpo_loss, ipo_loss, unlikelihood_loss
from common.run import load_run
from common.settings import parse
from model import response_logprobs, summed_logprobs
from ppo import compute_gae, compute_rewards, policy_loss

BETAS = [0.05, 0.1, 1.0, 5.0]


def random_logprobs(seed=0, n=50):
    draw = torch.Generator().manual_seed(seed)
    return [(-50 * torch.rand(n, generator=draw, dtype=torch.double)).requires_grad_() for _ in range(4)]


# ---- the loss --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_at_the_reference_the_loss_is_ln_2(label_smoothing):
    chosen, rejected = random_logprobs()[:2]
    losses, *rewards = dpo_loss(chosen, rejected, chosen, rejected, 0.1, label_smoothing)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), rtol=0, atol=1e-15)
    assert all((r == 0).all() and not r.requires_grad for r in rewards)


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_is_the_papers(beta):
    """-beta sigmoid(r_l - r_w) for the chosen log-probability, the opposite for the rejected one (below Eq. 7)."""
    chosen, rejected, ref_chosen, ref_rejected = random_logprobs()
    losses, *_ = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
    found = torch.autograd.grad(losses.sum(), (chosen, rejected))
    r_w, r_l = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    weight = beta / (1 + torch.exp(r_w - r_l))
    torch.testing.assert_close(found, (-weight, weight), rtol=1e-12, atol=1e-300)


def test_implicit_rewards_and_loss_by_hand():
    """beta = 2: rewards 2 (-3 - -4) = 2 and 2 (-5 - -4.5) = -1, margin 3, loss log(1 + e^-3)."""
    losses, chosen, rejected = dpo_loss(*(torch.tensor([x]) for x in (-3.0, -5.0, -4.0, -4.5)), beta=2.0)
    assert (chosen.item(), rejected.item()) == (2, -1)
    assert losses.item() == pytest.approx(math.log(1 + math.exp(-3)))


def test_large_margins_neither_overflow_nor_vanish():
    chosen = torch.tensor([4000.0, -4000.0], requires_grad=True)
    losses, *_ = dpo_loss(chosen, torch.zeros(2), torch.zeros(2), torch.zeros(2), 1.0)
    losses.sum().backward()
    assert losses.tolist() == [0, 4000] and chosen.grad.tolist() == [0, -1]


@pytest.mark.parametrize("e", [0.01, 0.1, 0.3])
def test_label_smoothing_is_least_at_the_log_odds_of_a_right_label(e):
    """(1-e) L(m) + e L(-m) is least where sigmoid(m) = 1 - e, and there it is the entropy of a label."""
    margin = torch.linspace(-8, 8, 4001, dtype=torch.double)
    zero = torch.zeros_like(margin)
    losses, *_ = dpo_loss(margin, zero, zero, zero, 1.0, e)
    torch.testing.assert_close(losses, (1 - e) * torch.log1p(torch.exp(-margin)) + e * torch.log1p(torch.exp(margin)))
    best = torch.tensor([math.log((1 - e) / e)], dtype=torch.double, requires_grad=True)
    loss, *_ = dpo_loss(best, zero[:1], zero[:1], zero[:1], 1.0, e)
    loss.sum().backward()
    assert abs(best.grad.item()) < 1e-15
    assert loss.item() == pytest.approx(-(1 - e) * math.log(1 - e) - e * math.log(e), abs=1e-14) and (losses >= loss).all()


def test_unlikelihood_by_hand_and_its_gradient():
    """alpha = 0.5: 3 - 2.5 and 2 - 20. The gradient is -1 for the chosen log-probability and alpha for the rejected one,
    however far the pair has been learned: no sigmoid stops it."""
    assert unlikelihood_loss(torch.tensor([-3.0, -2.0]), torch.tensor([-5.0, -40.0]), 0.5).tolist() == [0.5, -18]
    chosen, rejected, *_ = random_logprobs()
    found = torch.autograd.grad(unlikelihood_loss(chosen, rejected, 0.3).sum(), (chosen, rejected))
    torch.testing.assert_close(found, (torch.full_like(chosen, -1), torch.full_like(chosen, 0.3)), rtol=0, atol=0)


@pytest.mark.parametrize("beta", BETAS)
def test_ipo_by_hand_and_its_gradient(beta):
    """h = (-3 + 4) - (-5 + 4.5) = 1.5. The gradient is 2 (h - 1 / (2 beta)) for the chosen log-probability, the opposite for
    the rejected one; at h = 1 / (2 beta) it changes its sign, where DPO's still makes the margin larger."""
    by_hand = ipo_loss(*(torch.tensor([x], dtype=torch.double) for x in (-3.0, -5.0, -4.0, -4.5)), beta)
    assert by_hand.item() == pytest.approx((1.5 - 1 / (2 * beta)) ** 2)
    chosen, rejected, ref_chosen, ref_rejected = random_logprobs()
    weight = 2 * (chosen - ref_chosen - rejected + ref_rejected - 0.5 / beta)
    found = torch.autograd.grad(ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta).sum(), (chosen, rejected))
    torch.testing.assert_close(found, (weight, -weight), rtol=1e-12, atol=1e-12)
    h = (torch.tensor([0.9, 1.0, 1.1], dtype=torch.double) / (2 * beta)).requires_grad_()
    zero = torch.zeros(3, dtype=torch.double)
    assert torch.autograd.grad(ipo_loss(h, zero, zero, zero, beta).sum(), h)[0].sign().tolist() == [-1, 0, 1]
    assert torch.autograd.grad(dpo_loss(h, zero, zero, zero, beta)[0].sum(), h)[0].sign().tolist() == [-1, -1, -1]


def test_length_alpha_by_hand_and_its_gradient():
    """beta = 2: margin 3 as above; 0.5 (7 - 5) is one more, so the loss is log(1 + e^-4): a longer winner needs less reward.
    The rewards that come back are beta's alone. The weight of a pair is sigmoid of minus both margins."""
    pair = [torch.tensor([x], dtype=torch.double) for x in (-3.0, -5.0, -4.0, -4.5)]
    lengths = dict(chosen_lengths=torch.tensor([7]), rejected_lengths=torch.tensor([5]))
    loss, chosen, rejected = dpo_loss(*pair, beta=2.0, length_alpha=0.5, **lengths)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-4))) and (chosen.item(), rejected.item()) == (2, -1)
    logprobs, tokens = random_logprobs(), torch.randint(1, 60, (2, 50), generator=torch.Generator().manual_seed(1))
    losses, r_w, r_l = dpo_loss(*logprobs, 0.1, 0.0, 0.02, *tokens)
    found = torch.autograd.grad(losses.sum(), logprobs[:2])
    weight = 0.1 / (1 + torch.exp(r_w - r_l + 0.02 * (tokens[0] - tokens[1])))
    torch.testing.assert_close(found, (-weight, weight), rtol=1e-12, atol=1e-300)
    with_lengths, without = dpo_loss(*logprobs, 0.1, 0.0, 0.0, *tokens), dpo_loss(*logprobs, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(with_lengths, without))  # alpha 0 is DPO, bit by bit


# ---- where it ends: everything enumerated ----------------------------------------------------------------------------

PROMPTS, RESPONSES = 2, 6


@pytest.fixture(params=[0, 1])
def world(request):
    """log pi_ref (2, 6), the reward r (2, 6), and the chance that a Bradley-Terry annotator prefers A to B (2, 30)."""
    draw = torch.Generator().manual_seed(request.param)
    ref, r = torch.randn(2, PROMPTS, RESPONSES, generator=draw, dtype=torch.double)
    return ref.log_softmax(1), r, preference(r)


def ppo_policy(ref, r, beta):
    """log pi (2, 6) by PPO's own rewards, advantages and clipped loss, four steps on every batch. A response is one token; a
    batch has each as often as the old policy gives it, and values are exact. Steps are natural gradients, as above."""
    theta, one_token = ref.clone(), torch.ones(PROMPTS * RESPONSES, 1, dtype=torch.bool)
    for _ in range(400):
        old = theta.log_softmax(1)
        rewards = compute_rewards(r.flatten(), old.view(-1, 1), ref.view(-1, 1), one_token, beta)
        values = (old.exp() * rewards.view_as(old)).sum(1, keepdim=True).expand_as(old).reshape(-1, 1)
        advantages, _ = compute_gae(rewards, values, one_token, 1.0, 0.95)
        for _ in range(4):
            theta.requires_grad_()
            logprobs = theta.log_softmax(1)
            losses, _ = policy_loss(logprobs.view(-1, 1), old.view(-1, 1), advantages, one_token, 0.2)
            gradient = torch.autograd.grad((old.exp() * losses.view_as(old)).sum(), theta)[0]
            theta = (theta - 0.25 / beta * gradient / logprobs.exp()).detach()
    return theta.log_softmax(1)


@pytest.mark.parametrize("beta", BETAS)
def test_all_roads_lead_to_the_same_policy(world, beta):
    """DPO on Bradley-Terry pairs; a reward model fitted to them and then optimised; gradient ascent of E[r] - beta KL with
    the true reward; PPO with the true reward, and with the fitted one: all end at pi_ref exp(r / beta) / Z."""
    ref, r, wins = world
    expected, best = optimum(ref, r, beta), beta * log_partition(ref, r, beta).squeeze(1)
    fitted = reward_by_bradley_terry(wins, RESPONSES)
    for logprobs in (policy_by_dpo(ref, wins, beta),
                     optimum(ref, fitted, beta),
                     policy_by_ascent(ref, fitted, beta),
                     policy_by_ascent(ref, r, beta),
                     ppo_policy(ref, fitted, beta),
                     ppo_policy(ref, r, beta)):
        torch.testing.assert_close(logprobs.exp(), expected.exp(), rtol=0, atol=1e-6)
        torch.testing.assert_close(objective(logprobs, ref, r, beta), best, rtol=0, atol=1e-9)
        # Eq. 5: there the implicit reward is the true one, but for a constant a prompt
        implicit = beta * (logprobs - ref)
        torch.testing.assert_close(implicit - implicit[:, :1], r - r[:, :1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.01, 0.1])
@pytest.mark.parametrize("beta", BETAS)
def test_length_alpha_ends_at_the_optimum_of_the_reward_less_alpha_a_token(world, beta, alpha):
    """pi_ref exp((r - alpha |y|) / beta) / Z. And where the labels follow r + alpha |y|, at pi_ref exp(r / beta) / Z: what
    the judge likes of length is taken out."""
    ref, r, _ = world
    tokens = torch.tensor([1.0, 2, 2, 5, 9, 4], dtype=torch.double).expand_as(r)
    A, B = all_pairs(RESPONSES)
    for labels_follow, expected in ((r, optimum(ref, r - alpha * tokens, beta)), (r + alpha * tokens, optimum(ref, r, beta))):
        wins = preference(labels_follow)

        def loss(logits):
            logprobs = logits.log_softmax(-1)
            losses, *_ = dpo_loss(logprobs[:, A], logprobs[:, B], ref[:, A], ref[:, B], beta, 0.0, alpha,
                                  tokens[:, A], tokens[:, B])
            return (wins * losses).mean()
        torch.testing.assert_close(minimise(loss, ref).softmax(1), expected.exp(), rtol=0, atol=1e-6)


def policy_by_ipo(ref, wins, beta):
    """log pi (..., responses) with the least IPO loss over all ordered pairs, A before B with the chance `wins`."""
    A, B = all_pairs(ref.shape[-1])

    def loss(logits):
        logprobs = logits.log_softmax(-1)
        return (wins * ipo_loss(logprobs[..., A], logprobs[..., B], ref[..., A], ref[..., B], beta)).mean() * beta**2
    return minimise(loss, ref).log_softmax(-1)


@pytest.mark.parametrize("labels", ["bt", "argmax"])
@pytest.mark.parametrize("beta", BETAS)
def test_ipo_ends_at_the_reference_times_exp_of_how_often_a_response_wins(world, labels, beta):
    """Derived: p (h - c)^2 + (1 - p) (-h - c)^2 with c = 1 / (2 beta) is (h - (2 p - 1) c)^2 and a constant. With h = u_a - u_b
    the sum over all pairs is least where u_a is the mean over b of (2 p - 1) c: pi = pi_ref exp(P / beta) / Z, where P is how
    often a wins over one drawn evenly, itself with 1/2. So margins are below 1 / beta, with labels that have no noise, too:
    there P is a response's rank, and neighbours are 1 / (6 beta) apart. DPO's have no bound: a larger margin is less loss."""
    ref, r, wins = world
    A, B = all_pairs(RESPONSES)
    if labels == "argmax":
        wins = (r[:, A] > r[:, B]).double()
    P = (0.5 + wins.view(PROMPTS, RESPONSES, RESPONSES - 1).sum(2)) / RESPONSES
    found = policy_by_ipo(ref, wins, beta)
    torch.testing.assert_close(found, (ref + P / beta).log_softmax(1), rtol=0, atol=1e-8)
    ratios = found - ref
    assert (ratios[:, A] - ratios[:, B]).max() < 1 / beta
    if labels == "argmax":
        steps = ratios.sort(1).values.diff(dim=1)
        torch.testing.assert_close(steps, torch.full_like(steps, 1 / (RESPONSES * beta)), rtol=1e-6, atol=1e-8)
        zero = torch.zeros(1)
        dpo_losses = [(wins * dpo_loss(k * ratios[:, A], k * ratios[:, B], zero, zero, beta)[0]).mean() for k in (1, 2, 4, 8)]
        assert dpo_losses == sorted(dpo_losses, reverse=True) and dpo_losses[-1] < dpo_losses[0]


@pytest.mark.parametrize("p", [0.5, 0.7, 1.0])
def test_ipo_of_one_pair_has_the_margin_of_its_label(p):
    """(2 p - 1) / (2 beta), which is 0 for a coin and at most 1 / (2 beta)."""
    ref, beta = torch.tensor([0.3, 0.7], dtype=torch.double).log(), 0.2
    ratios = policy_by_ipo(ref, torch.tensor([p, 1 - p], dtype=torch.double), beta) - ref
    assert (ratios[0] - ratios[1]).item() == pytest.approx((2 * p - 1) / (2 * beta), abs=1e-9)


def test_the_fitted_reward_is_the_true_one_up_to_a_constant(world):
    _, r, wins = world
    fitted = reward_by_bradley_terry(wins, RESPONSES)
    torch.testing.assert_close(fitted, r - r.mean(1, keepdim=True), rtol=0, atol=1e-9)


def test_no_policy_is_better_than_the_closed_form(world):
    ref, r, _ = world
    expected, best = optimum(ref, r, 0.5), 0.5 * log_partition(ref, r, 0.5).squeeze(1)
    for scale in (1e-3, 0.1, 1.0):
        for _ in range(50):
            other = (expected + scale * torch.randn_like(r)).log_softmax(1)
            assert (objective(other, ref, r, 0.5) < best).all()


def test_a_gpt_gets_there_too():
    """The same on a real network: the 40 responses of at most 3 tokens that a GPT over 4 tokens can give, scored by
    response_logprobs, and the expected loss over all their pairs."""
    responses = list(every_response(vocab=4, length=3, eos=2))
    tokens, lengths = pad([[1] + r for r in responses], 0)
    scored = lambda model: response_logprobs(model, tokens, torch.ones(40, dtype=torch.long), lengths).sum(1)  # noqa: E731
    policy = tiny_gpt(vocab_size=4, block_size=4, n_embd=16, seed=1).double()
    r = torch.linspace(-1, 1, 40).double()[torch.arange(40) * 7 % 40]
    ref = scored(policy).detach()
    assert ref.exp().sum().item() == pytest.approx(1, abs=1e-6)
    a, b = (~torch.eye(40, dtype=torch.bool)).nonzero(as_tuple=True)
    preferred, beta = torch.sigmoid(r[a] - r[b]), 0.5
    expected = (ref + r / beta).log_softmax(0)
    distance = lambda logprobs: (expected.exp() * (expected - logprobs)).sum().item()  # noqa: E731  KL(pi* || pi), nats
    start = distance(ref)
    optimizer = torch.optim.LBFGS(policy.parameters(), max_iter=300, line_search_fn="strong_wolfe", tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        logprobs = scored(policy)
        loss = (preferred * dpo_loss(logprobs[a], logprobs[b], ref[a], ref[b], beta)[0]).mean()
        loss.backward()
        return loss
    optimizer.step(closure)
    assert distance(scored(policy).detach()) < 1e-6 < 0.5 < start


def test_an_identical_pair_teaches_nothing_but_adam_moves_all_the_same():
    """Its loss is ln 2 whatever the policy, its gradient zero up to rounding; Adam divides rounding noise by rounding noise.
    So encode_pairs drops such pairs."""
    policy, row = tiny_gpt(n_embd=32, size=0.2), [1, 4, 5, 6, 7, 8, 2]
    tokens, prompt_lengths, lengths = torch.tensor([row, row]), torch.tensor([3, 3]), torch.tensor([7, 7])
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    chosen, rejected = response_logprobs(policy, tokens, prompt_lengths, lengths).sum(1)
    losses, *_ = dpo_loss(chosen, rejected, torch.tensor(-9.0), torch.tensor(-9.0), 0.1)
    losses.backward()
    assert losses.item() == pytest.approx(math.log(2), abs=1e-7)
    assert 0 < max(p.grad.abs().max().item() for p in policy.parameters()) < 1e-7
    adamw(policy, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.95)).step()
    assert max((p - before[name]).abs().max().item() for name, p in policy.named_parameters()) > 1e-5


def test_an_identical_pair_teaches_unlikelihood_unless_alpha_is_1():
    """The gradient is (alpha - 1) grad log pi of the response that both are, and nothing but rounding where alpha = 1."""
    policy, row = tiny_gpt(n_embd=32, size=0.2), [1, 4, 5, 6, 7, 8, 2]
    tokens, prompt_lengths, lengths = torch.tensor([row, row]), torch.tensor([3, 3]), torch.tensor([7, 7])
    own = torch.autograd.grad(naive_logprobs(policy, row[:3], row[3:]).sum(), policy.parameters())
    for alpha in (0.0, 0.5, 1.0):
        chosen, rejected = response_logprobs(policy, tokens, prompt_lengths, lengths).sum(1)
        found = torch.autograd.grad(unlikelihood_loss(chosen, rejected, alpha), policy.parameters())
        torch.testing.assert_close(found, tuple((alpha - 1) * g for g in own), rtol=1e-4, atol=1e-6)


# ---- the training loop -----------------------------------------------------------------------------------------------

@pytest.fixture
def small_run(sft_run, pairs_file, small_reviews, tmp_path, monkeypatch):
    """run(**settings) trains on 76 pairs, 12 a step, and returns the rows of the log and the run folder."""
    monkeypatch.setattr(evaluate, "draw_run", lambda *args: None)  # a second of matplotlib

    def run(**settings):
        out = str(tmp_path / f"run{len(list(tmp_path.iterdir()))}")
        folder = dpo.train(dpo.Config(**{**dict(sft=str(sft_run), pairs=str(pairs_file), out=out, batch_size=12, warmup=1),
                                         **settings}))
        return log_of(folder), folder
    return run


def test_first_step_is_the_definition(small_run, sft_run, pairs_file, gradients):
    """Loss ln 2, no reward, no accuracy yet; and the gradient is that of the mean over pairs of Eq. 7, written out with one
    unpadded row at a time and log-probabilities *summed* over tokens. Whether 12 pairs run at once or as 5, 5 and 2."""
    policy, _ = load_run(sft_run)
    tokenizer = Tokenizer.load(sft_run / "tokenizer.tiktoken")
    pairs = encode_pairs(read_pairs(pairs_file), tokenizer, policy.config.block_size, pairs_file)
    longest = torch.tensor([len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs])
    rows, held = split(pairs, draw=True)
    assert len(rows) == 76 and len(held) == 4
    batch = rows[next(batches(longest[rows], 12, seed=3))]
    loss, sums = 0.0, []
    for i in batch.tolist():
        chosen, rejected = (naive_logprobs(policy, pairs[i].prompt, r).sum() for r in (pairs[i].chosen, pairs[i].rejected))
        margin = 0.3 * ((chosen - chosen.detach()) - (rejected - rejected.detach()))
        loss = loss - torch.log(torch.sigmoid(margin)) / 12
        sums.append([chosen.item(), rejected.item()])
    loss.backward()
    expected = [p.grad for p in policy.parameters()]
    for micro_batch_size in (0, 5):
        gradients.clear()
        rows, _ = small_run(beta=0.3, seed=3, micro_batch_size=micro_batch_size)
        torch.testing.assert_close(gradients[0], expected, rtol=1e-4, atol=2e-5)
        first = rows[0]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert first["chosen_reward"] == pytest.approx(0, abs=1e-5) and first["margin"] == pytest.approx(0, abs=1e-5)
        logged = [first["chosen_logprobs"], first["rejected_logprobs"]]
        assert logged == pytest.approx(torch.tensor(sums).mean(0).tolist(), abs=1e-3)
        assert first["grad_norm"] == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in expected)), rel=1e-4)


def test_first_step_of_unlikelihood_is_the_definition(small_run, sft_run, pairs_file, gradients):
    """The mean over 12 pairs of -log pi(y_w|x) + alpha log pi(y_l|x), one unpadded row at a time, whether 12 run at once or as
    5, 5 and 2; and the table names the method."""
    policy, _ = load_run(sft_run)
    tokenizer = Tokenizer.load(sft_run / "tokenizer.tiktoken")
    pairs = encode_pairs(read_pairs(pairs_file), tokenizer, policy.config.block_size, pairs_file)
    longest = torch.tensor([len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs])
    loss = 0.0
    rows, _ = split(pairs, draw=True)
    for i in rows[next(batches(longest[rows], 12, seed=3))].tolist():
        chosen, rejected = (naive_logprobs(policy, pairs[i].prompt, r).sum() for r in (pairs[i].chosen, pairs[i].rejected))
        loss = loss + (-chosen + 0.3 * rejected) / 12
    loss.backward()
    for micro_batch_size in (0, 5):
        gradients.clear()
        rows, folder = small_run(loss="unlikelihood", alpha=0.3, seed=3, micro_batch_size=micro_batch_size)
        torch.testing.assert_close(gradients[0], [p.grad for p in policy.parameters()], rtol=1e-4, atol=2e-4)
        assert rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert "Unlikelihood alpha 0.3" in json.loads((folder / "evaluation.json").read_text())["table"]


OWN = """import torch.nn.functional as F
def dpo(chosen_ratios, rejected_ratios, beta, chosen_lengths, rejected_lengths):
    return -F.logsigmoid(beta * chosen_ratios - beta * rejected_ratios)
def ipo(chosen_ratios, rejected_ratios, beta, *lengths):
    chosen_ratios -= rejected_ratios
    return (chosen_ratios - 1 / (2 * beta)).square()
def lengths(chosen_ratios, rejected_ratios, beta, chosen_lengths, rejected_lengths):
    return 0 * chosen_ratios + 0 * rejected_ratios + chosen_lengths + 1000 * rejected_lengths
"""


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_a_loss_of_ones_own_is_trained_and_held_out_like_a_built_in_one(loss, small_run, tmp_path):
    """The same formula in a file of the user's: the same losses, held-out loss and weights, whatever it does with its tensors;
    and the table names the function."""
    (tmp_path / "own.py").write_text(OWN)
    settings = dict(beta=0.3, micro_batch_size=5, lr=1e-3)
    rows, folder = small_run(loss=loss, **settings)
    own, own_folder = small_run(loss=f"{tmp_path / 'own.py'}:{loss}", **settings)
    for a, b in zip(rows, own, strict=True):
        a.pop("seconds", None), b.pop("seconds", None)
        assert b == pytest.approx(a, rel=1e-5)
    a, b = (load_run(run)[0].state_dict() for run in (folder, own_folder))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    table = json.loads((own_folder / "evaluation.json").read_text())["table"]
    assert f"own.py:{loss} beta 0.3" in table and "limit of this run in theory" not in table


def test_a_loss_of_ones_own_gets_the_tokens_of_the_responses(small_run, sft_run, pairs_file, tmp_path):
    """Without the prompt, and with the end of the text."""
    (tmp_path / "own.py").write_text(OWN)
    rows, _ = small_run(loss=f"{tmp_path / 'own.py'}:lengths", seed=3)
    tokenizer = Tokenizer.load(sft_run / "tokenizer.tiktoken")
    pairs = encode_pairs(read_pairs(pairs_file), tokenizer, load_run(sft_run)[0].config.block_size, pairs_file)
    found = lambda rows: sum(len(pairs[i].chosen) + 1000 * len(pairs[i].rejected) for i in rows) / len(rows)  # noqa: E731
    train, held = split(pairs, draw=True)
    longest = torch.tensor([len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs])
    assert rows[0]["loss"] == pytest.approx(found(train[next(batches(longest[train], 12, seed=3))].tolist()), rel=1e-6)
    assert rows[-1]["held_out_loss"] == pytest.approx(found(held.tolist()), rel=1e-6)
    assert read_pairs(pairs_file)[0]["chosen"] and pairs[0].chosen[-1] == tokenizer.eos


def test_the_loss_of_the_page_can_be_trained(small_run, tmp_path):
    """docs: "A loss of your own in ten lines"."""
    page = next(text for text in (path.read_text() for path in (clone.ROOT / "docs").rglob("*.md"))
                if "## A loss of your own" in text).split("## A loss of your own")[1]
    (tmp_path / "mine.py").write_text(re.search(r"```python\n(.*?)```", page, re.S)[1])
    rows, _ = small_run(loss=f"{tmp_path / 'mine.py'}:per_token", beta=4.0, lr=1e-3, epochs=2)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and rows[-2]["loss"] < rows[0]["loss"]
    assert dpo.Config(loss="mine.py:per_token", beta=4.0).out in page


def test_unlikelihood_has_no_reference_and_no_beta(small_run, sft_run, tmp_path, monkeypatch):
    """Noise in place of the reference's log-probabilities: other implicit rewards in the log, but the same losses and the
    same weights, bit by bit. Another alpha is another policy, and DPO's reference does count. A beta would be ignored."""
    with pytest.raises(SystemExit, match="--beta: not with --loss unlikelihood"):
        dpo.Config(loss="unlikelihood", beta=5.0)
    def end(**settings):
        rows, folder = small_run(**settings)
        return ([row["loss"] for row in rows[:-1]], sha256(folder / "model.pt")), rows[-2]["margin"]
    plain, margin = end(loss="unlikelihood")
    found = [end(loss="unlikelihood", alpha=0.2), end()]
    draw, noisy = torch.Generator().manual_seed(0), dict(sft=str(shutil.copytree(sft_run, tmp_path / "noisy/sft")))
    monkeypatch.setattr(pipeline, "summed_logprobs", lambda _, tokens, *__: -50 * torch.rand(len(tokens), generator=draw))
    found += [end(loss="unlikelihood", **noisy), end(**noisy)]
    assert [f[0] == plain for f in found] == [False, False, True, False] and found[1][0] != found[3][0]
    assert found[2][1] != margin


def test_length_alpha_in_training(small_run, pairs_file):
    """At the first step beta's margins are 0 and the loss is that of alpha's alone; the log has the sizes of both. Held-out
    pairs have the same loss. Without alpha the log has neither, and the theory's limit is the plain one."""
    rows, folder = small_run(length_alpha=0.3, batch_size=76, lr=1e-12)
    pairs = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    tokenizer = Tokenizer.load(pipeline.sft_policy(json.loads((folder / "config.json").read_text())["sft"], "reviews", "cpu")
                               / "tokenizer.tiktoken")
    length = torch.tensor([[len(tokenizer.encode(pair[name])) for name in ("chosen", "rejected")] for pair in pairs])
    margins = 0.3 * (length[:, 0] - length[:, 1])
    train, held = split(encode_pairs(read_pairs(pairs_file), tokenizer, 96, pairs_file), draw=True)
    assert rows[0]["margin_size"] == pytest.approx(0, abs=1e-5)
    assert rows[0]["length_margin_size"] == pytest.approx(margins[train].abs().mean().item(), rel=1e-5)
    for row, name, some in ((rows[0], "loss", train), (rows[-1], "held_out_loss", held)):
        assert row[name] == pytest.approx(-torch.nn.functional.logsigmoid(margins[some]).mean().item(), rel=1e-4)
    assert "DPO beta 0.1, length alpha 0.3" in json.loads((folder / "evaluation.json").read_text())["table"]
    assert not {"margin_size", "length_margin_size"} & {*small_run()[0][0]}
    assert dpo.end_beta(dpo.Config()) == 0.1 / 5 and dpo.end_beta(dpo.Config(length_alpha=0.01)) is None
    assert dpo.Config(length_alpha=0.01).out.endswith("dpo-beta0.1-seed0-lengthalpha0.01")


@pytest.mark.parametrize("flags, says", [
    (["--length-alpha", "-0.1"], "--length-alpha -0.1: must be >= 0"),
    (["--length-alpha", "nan"], "--length-alpha nan: must be >= 0"),
    (["--length-alpha", "0.1", "--loss", "ipo"], "--length-alpha: needs --loss dpo"),
    (["--length-alpha", "0.1", "--loss", "unlikelihood"], "--length-alpha: needs --loss dpo")])
def test_a_length_alpha_that_means_nothing_is_refused(flags, says):
    with pytest.raises(SystemExit) as stop:
        parse(dpo.Config, "", flags)
    assert says in str(stop.value)


def test_before_training_the_accuracy_is_a_half(small_run):
    """Every margin is 0 up to rounding; one that is exactly 0 is half right. As wrong it was 0.19 at the first step."""
    rows, _ = small_run(lr=1e-12, epochs=3)
    assert 0.2 < sum(row["accuracy"] for row in rows[:-1]) / len(rows[:-1]) < 0.8
    chosen = torch.tensor([1.0, 2.0, 3.0])
    assert half_ties(chosen, torch.tensor([1.0, 1.0, 4.0])).tolist() == [0.5, 1.0, 0.0]


def test_micro_batches_change_nothing_and_accuracy_is_a_mean_over_pairs(small_run):
    """Four epochs with 12 pairs at once, and as 5, 5, 2; another state of torch's own random stream changes nothing either."""
    torch.manual_seed(1)
    whole, _ = small_run(epochs=4, lr=1e-3)
    torch.manual_seed(2)
    split, _ = small_run(epochs=4, lr=1e-3, micro_batch_size=5)
    assert len(whole) == len(split) == 26  # 76 pairs in batches of 12, four times: 25 steps; and the last row
    for step, (a, b) in enumerate(zip(whole[:-1], split[:-1])):
        for name in ("loss", "margin", "chosen_reward", "chosen_logprobs", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-3), name
        assert round(24 * b["accuracy"]) / 24 == pytest.approx(b["accuracy"], abs=1e-6)  # a tie counts half
        if step:  # before the first update every margin is 0, give or take rounding, and so has no sign to agree on
            assert a["accuracy"] == pytest.approx(b["accuracy"], abs=1 / 12 + 1e-6)
    assert whole[-2]["accuracy"] > 0.9 and whole[-2]["loss"] < 0.6  # it learns these pairs by heart


def test_reference_logprobs_stay_with_their_rows(small_run, sft_run):
    """With a learning rate of almost zero the policy stays the reference: if the log-probabilities computed once belong to
    their rows, every batch of every shuffled epoch has loss ln 2. And the reference is not written to."""
    before = sha256(sft_run / "model.pt")
    rows, folder = small_run(epochs=2, lr=1e-12, beta=1.0, micro_batch_size=7)
    for row in rows[:-1]:
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert abs(row["chosen_reward"]) < 1e-4 and abs(row["rejected_reward"]) < 1e-4
    assert rows[-1]["held_out_loss"] == pytest.approx(math.log(2), abs=1e-5)
    _, moved = small_run(epochs=1, lr=1e-2, beta=1.0)
    assert sha256(sft_run / "model.pt") == before
    kl = [json.loads((run / "evaluation.json").read_text())["table"]["DPO beta 1"]["kl"] for run in (folder, moved)]
    assert kl[0] == pytest.approx(0, abs=1e-4) and kl[1] > 1  # one policy is where it started, the other has left


def test_reference_logprobs_are_kept_of_these_weights_pairs_and_dtype(small_run, sft_run, pairs_file, tmp_path, monkeypatch):
    """The second run of the same pairs does not compute them again and ends with the same weights; pairs in another order, or
    bf16, get a file of their own, and with a learning rate of almost zero every loss is ln 2 with each of them."""
    own, computed, original = dict(sft=str(shutil.copytree(sft_run, tmp_path / "own/sft"))), [], summed_logprobs
    for module in dpo, pipeline:
        monkeypatch.setattr(module, "summed_logprobs", lambda *args: computed.append(len(args[1])) or original(*args))
    kept = lambda: sorted((tmp_path / "own/ref-logprobs").iterdir())  # noqa: E731
    first, again = (small_run(**own)[1] for _ in range(2))
    assert computed == [160, 4, 4, 4, 4] and len(kept()) == 1  # all 80 pairs once, and each time those that are held out
    assert sha256(first / "model.pt") == sha256(again / "model.pt")
    (tmp_path / "turned.jsonl").write_text("\n".join(reversed(pairs_file.read_text().splitlines())))
    for files, more in ((2, dict(pairs=str(tmp_path / "turned.jsonl"))), (3, dict(dtype="bfloat16")), (3, {})):
        rows, _ = small_run(**own, **more, lr=1e-12)
        assert len(kept()) == files
        assert all(row["loss"] == pytest.approx(math.log(2), abs=1e-5 if "dtype" not in more else 0.02) for row in rows[:-1])


def test_damaged_reference_logprobs_are_computed_again_or_named_in_one_line(small_run, sft_run, tmp_path):
    """As every other file that a run reads: no traceback, and no training on what is left of it."""
    own = dict(sft=str(shutil.copytree(sft_run, tmp_path / "own/sft")))
    _, alone = small_run(**own)
    kept, = (tmp_path / "own/ref-logprobs").iterdir()
    for damage in (kept.read_bytes()[:300], b""):
        kept.write_bytes(damage)
        try:
            assert sha256(small_run(**own)[1] / "model.pt") == sha256(alone / "model.pt")
        except SystemExit as stop:
            assert str(stop).startswith("error: ") and kept.name in str(stop) and "\n" not in str(stop)


def test_precomputed_reference_logprobs_are_those_of_the_definition_and_draw_nothing(sft_run, pairs_file):
    ref, _ = load_run(sft_run)
    tokenizer = Tokenizer.load(sft_run / "tokenizer.tiktoken")
    pairs = encode_pairs(read_pairs(pairs_file), tokenizer, ref.config.block_size, pairs_file)[:20]
    rows = [(p.prompt, r) for p in pairs for r in (p.chosen, p.rejected)]
    tokens, lengths = pad([p + r for p, r in rows], tokenizer.pad)
    state = torch.get_rng_state()
    found = summed_logprobs(ref, tokens, torch.tensor([len(p) for p, _ in rows]), lengths, batch_size=7)
    assert torch.equal(torch.get_rng_state(), state) and not found.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(found, torch.stack([naive_logprobs(ref, *row).sum() for row in rows]), rtol=1e-5, atol=1e-3)
