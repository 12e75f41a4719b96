"""ppo.py: its mathematics against loops, by hand and by enumeration; then the script, on words of the letters a to d.

Where to look first: `test_the_script_reaches_the_optimum`. There a response is at most two tokens, so the optimum of what
PPO maximises, and what the trained policy has of it, are sums over all 66,823 responses. That DPO, exact policy gradients
and PPO's loss end at the same policy is in test_dpo.py: `test_all_roads_lead_to_the_same_policy`.
"""
import copy
import math
import statistics
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import clone
import data.reviews
import evaluate
import ppo
from common import tasks
from common.files import sha256
from common.rewards import user_function
from common.run import load_checkpoint, load_run
from common.tokenizer import Tokenizer
from common.training import pad, warn_of_collapse
from conftest import log_of, naive_logprobs, smaller, tiny_gpt
from model import GPTConfig, ScalarModel
from ppo import adapted, compute_gae, compute_rewards, policy_loss, response_values, value_loss, whiten
from toy import STATE, THERE, TOKEN, exact_kl, gradient, logprobs_of, rows_of, share_of_what_can_be_gained, worlds


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No figure, which takes matplotlib a second, and 4 responses of the reference to each of 3 test prompts."""
    monkeypatch.setattr(evaluate, "draw_run", lambda *args: None)
    monkeypatch.setattr(data.reviews, "TASK", smaller(data.reviews.TASK, bank_prompts=3, bank_samples=4))


SIZES = [5, 1, 3, 5, 2, 4]  # of six responses, in 5 positions
MASK = torch.arange(5) < torch.tensor(SIZES)[:, None]


def ragged(seed: int, beyond: float = 0.0) -> torch.Tensor:
    """(6, 5) random numbers; `beyond` the end of a row."""
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.double).masked_fill(~MASK, beyond)


# ---- rewards and advantages ------------------------------------------------------------------------------------------

def test_the_score_comes_with_the_last_token_and_the_kl_with_every_one():
    """Row by row; what a row is paid in all is its score less beta times the log-ratio of its response."""
    scores, logprobs, ref_logprobs = torch.arange(6).double() + 1, ragged(1), ragged(2)
    rewards = compute_rewards(scores, logprobs, ref_logprobs, MASK, 0.3)
    for b, n in enumerate(SIZES):
        for t in range(5):
            kl = logprobs[b, t].item() - ref_logprobs[b, t].item() if t < n else 0.0
            assert rewards[b, t].item() == pytest.approx(-0.3 * kl + (b + 1 if t == n - 1 else 0), abs=1e-14)
    torch.testing.assert_close(rewards.sum(1), scores - 0.3 * (logprobs - ref_logprobs).sum(1))


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (1.0, 0.0), (0.9, 1.0), (0.0, 0.5)])
@pytest.mark.parametrize("beyond", [0.0, 1e30])  # what stands behind the end of a row
def test_gae_is_the_definition(gamma, lam, beyond):
    """A_t = sum_k (gamma lam)^k delta_{t+k} by two loops; a row ends at its end, whatever stands behind it."""
    rewards, values = ragged(1, beyond), ragged(2, -2 * beyond)
    expected = torch.zeros(6, 5, dtype=torch.double)
    for b, n in enumerate(SIZES):
        v = [*values[b, :n].tolist(), 0.0]
        delta = [rewards[b, t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected[b, t] = sum((gamma * lam) ** k * delta[t + k] for k in range(n - t))
    advantages, returns = compute_gae(rewards, values, MASK, gamma, lam)
    torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(returns, (expected + values).masked_fill(~MASK, 0), rtol=1e-12, atol=1e-14)


def test_gae_between_monte_carlo_and_one_step_by_hand():
    """gamma = 1/2. lam = 1: what comes after, discounted: 1 + 2/2 + 4/4 = 3, 2 + 4/2 = 4, 4. lam = 0: r + V_{t+1}/2."""
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[10.0, 20.0, 30.0]])
    whole = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = compute_gae(rewards, values, whole, 0.5, 1.0)
    assert returns.tolist() == [[3, 4, 4]] and advantages.tolist() == [[-7, -16, -26]]
    advantages, returns = compute_gae(rewards, values, whole, 0.5, 0.0)
    assert returns.tolist() == [[11, 17, 4]] and advantages.tolist() == [[1, -3, -26]]


def test_whitening_sees_the_mask_only():
    """Mean 0 and variance 1 of the tokens there are; what is behind the end neither counts nor stays."""
    x = 3 * ragged(1) + 7
    found = whiten(x.masked_fill(~MASK, 1e6), MASK)
    real = [x[b, t].item() for b, n in enumerate(SIZES) for t in range(n)]
    mean, std = statistics.fmean(real), statistics.pstdev(real)
    torch.testing.assert_close(found, ((x - mean) / std).masked_fill(~MASK, 0), rtol=1e-8, atol=1e-8)
    one = whiten(torch.tensor([[5.0, 9.0]]), torch.tensor([[True, False]]))
    assert one.tolist() == [[0, 0]], "a single token has no spread, and no NaN"


# ---- losses and the controller ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("advantage, ratio, gradient", [
    (2.0, 1.3, 0.0), (2.0, 0.7, -1.4), (-2.0, 1.3, 2.6), (-2.0, 0.7, 0.0),  # only what would go further is stopped
    (2.0, 1.1, -2.2), (2.0, 0.9, -1.8), (-2.0, 1.1, 2.2), (-2.0, 0.9, 1.8), (2.0, 1.0, -2.0), (-2.0, 1.0, 2.0)])
def test_which_side_is_clipped(advantage, ratio, gradient):
    """The gradient to log pi is -A ratio, REINFORCE's -A at ratio 1; nothing once A has carried the ratio beyond 1 +- eps."""
    old = torch.tensor([[-3.0]], dtype=torch.double)
    logprobs = (old + math.log(ratio)).requires_grad_()
    losses, found = policy_loss(logprobs, old, torch.tensor([[advantage]]).double(), torch.tensor([[True]]), 0.2)
    losses.sum().backward()
    assert found.item() == pytest.approx(ratio) and logprobs.grad.item() == pytest.approx(gradient, abs=1e-12)
    assert losses.item() == pytest.approx(-min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage))


def test_value_loss_by_hand():
    """Old value 0, clip 0.2, the return 1 or -1: a value of 0.5 counts as 0.2 on the way to 1, and in full away from -1."""
    values = torch.tensor([0.1, 0.5, 0.5, -0.5, -0.5, 9.0], requires_grad=True)
    returns = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 0.0])
    mask = torch.tensor([True] * 5 + [False])
    losses = value_loss(values, torch.zeros(6), returns, mask, 0.2)
    losses.sum().backward()
    torch.testing.assert_close(losses.detach(), torch.tensor([0.405, 0.32, 1.125, 1.125, 0.32, 0.0]))
    torch.testing.assert_close(values.grad, torch.tensor([-0.9, 0.0, 1.5, -1.5, 0.0, 0.0]))


def test_beta_follows_the_kl():
    """100 episodes of a horizon of 200 are half the way; an error beyond 20% counts as 20%; at the target nothing changes."""
    assert [adapted(0.1, kl, 2.0, 200, 100) for kl in (2.0, 2.2, 20.0, 1.8, 0.0, -5.0)] == pytest.approx(
        [0.1, 0.105, 0.11, 0.095, 0.09, 0.09])


@pytest.mark.parametrize("pad_id", [0, 2, 10])
def test_a_value_has_seen_all_before_its_token_and_nothing_else(pad_id):
    """V_t is the scalar at the end of prompt + response[:t], computed from that row alone, cut there; padding, also with the
    id of <eos> (2), changes nothing, nor does the row beside it."""
    model = ScalarModel(GPTConfig(11, 12, 2, 2, 8))
    model.gpt.load_state_dict(tiny_gpt().state_dict())
    rows = [([1, 4], [5, 6, 7, 2]), ([1], [3, 2]), ([1, 5, 2, 8, 9, 3, 4], [7, 7, 7, 7, 7]), ([1, 9], [2])]
    tokens, lengths = pad([p + r for p, r in rows], pad_id)
    found = response_values(model, tokens, torch.tensor([len(p) for p, _ in rows]), lengths)
    expected = torch.zeros(4, 5)
    for b, (prompt, response) in enumerate(rows):
        for t in range(len(response)):
            expected[b, t] = model(torch.tensor([prompt + response[:t]]))[0, -1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    alone = response_values(model, tokens[:2, :6], torch.tensor([2, 1]), lengths[:2])
    torch.testing.assert_close(found[:2, :4], alone, rtol=0, atol=1e-5)


# ---- everything enumerated --------------------------------------------------------------------------------------------

def test_the_sampled_kl_and_its_gradient(tables):
    """What ppo.py sums and pays for, log pi - log pi_ref of the sampled tokens (k1, in the reward), is the KL on average, in
    this direction, and so is its gradient. In the loss the same k1 has none, and k3 has that of the other KL."""
    table, ref, _ = tables
    table.requires_grad_()
    logprobs, ref_logprobs = logprobs_of(table), logprobs_of(ref)
    p, exact = logprobs.sum(1).exp(), exact_kl(table, ref)
    assert p.sum().item() == pytest.approx(1) and abs(exact - exact_kl(ref, table)).item() > 1e-3
    weight, old = p.detach(), logprobs.detach()
    rewards = compute_rewards(torch.zeros(7).double(), old, ref_logprobs, THERE, beta=1.0)
    torch.testing.assert_close(-(weight * rewards.sum(1)).sum(), exact.detach())
    advantages = rewards.sum(1, keepdim=True) * THERE  # of the whole response, for each of its tokens
    losses, _ = policy_loss(logprobs, old, advantages, THERE, 0.2)
    torch.testing.assert_close(gradient((weight * losses.sum(1)).sum(), table), gradient(exact, table))

    k1 = (logprobs - ref_logprobs).sum(1)
    k3 = (-k1).exp() - 1 + k1
    torch.testing.assert_close((weight * k3).sum(), exact)  # as a number k3 is right
    assert abs((weight * k1 ** 2 / 2).sum() - exact).item() > 1e-3  # k2 is not
    assert gradient((weight * k1).sum(), table).abs().max() < 1e-12
    torch.testing.assert_close(gradient((weight * k3).sum(), table), gradient(exact_kl(ref, table), table))
    assert (gradient(exact_kl(ref, table), table) - gradient(exact, table)).abs().max() > 1e-2


def test_any_value_network_is_a_baseline(tables):
    """lam = 1 and values that know what came before a token, and nothing of it, leave the expected gradient as it is: any
    numbers will do. Values read one position later do not."""
    table, ref, r = tables
    table.requires_grad_()
    logprobs, ref_logprobs, guesses = logprobs_of(table), logprobs_of(ref), torch.tensor([0.3, -2.0, 5.0]).double()
    p = logprobs.sum(1).exp()
    rewards = compute_rewards(r, logprobs.detach(), ref_logprobs, THERE, 0.7)
    exact = gradient((p * r).sum() - 0.7 * exact_kl(table, ref), table)
    for values, same in ((guesses[STATE], True), (guesses[TOKEN], False)):
        advantages, _ = compute_gae(rewards, values * THERE, THERE, 1.0, 1.0)
        losses, _ = policy_loss(logprobs, logprobs.detach(), advantages, THERE, 0.2)
        found = gradient(-(p.detach() * losses.sum(1)).sum(), table)
        assert torch.allclose(found, exact, rtol=0, atol=1e-10) == same


# ---- the script ------------------------------------------------------------------------------------------------------

GIVEN = "--sft runs/sft --reward rewards.py:letters --steps 1 --batch-size 24 --warmup 1 "


@pytest.fixture
def small_run(toy, tmp_path):
    """run(argv) trains, one update of 24 responses by default, and returns the rows of the updates and the run folder."""
    def run(argv):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        assert clone.run_here(*toy, "ppo", *(GIVEN + argv).split(), "--out", out) == 0
        return [row for row in log_of(out) if "scores" in row], out
    return run


@pytest.fixture
def seen(monkeypatch):
    """Filled, while ppo.py trains: name of a function -> (arguments, result) of every call, networks as they were then."""
    calls = defaultdict(list)

    def spy(name, original):
        def call(*given, **keywords):
            result = original(*given, **keywords)
            calls[name].append(([copy.deepcopy(x) if isinstance(x, torch.nn.Module) else x for x in given], result))
            return result
        return call
    for name in ("generate", "compute_rewards", "compute_gae", "response_values", "policy_loss"):
        monkeypatch.setattr(ppo, name, spy(name, getattr(ppo, name)))
    return calls


def test_the_script_reaches_the_optimum(small_run, toy):
    """99% of what can be gained of E[r] - beta KL over the reference, every expectation a sum over all responses. Seeds 0 to 2
    get 99.7, 99.9 and 99.8%."""
    log, folder = small_run("--batch-size 240 --samples 2 --epochs 4 --lr 1e-2 --warmup 15 --sft short/sft --steps 60 "
                            "--beta 0.5 --value-lr 1e-2 --micro-batch-size 480")
    assert share_of_what_can_be_gained(log, folder, toy[1]) > 0.99


def test_responses_are_drawn_from_the_softmax_that_is_scored(small_run, toy):
    """Before the first update their mean reward is the reference's, and their mean surprise its entropy, both known exactly; a
    temperature of 0.9 would lower the entropy by five standard errors."""
    log, _ = small_run("--sft short/sft --batch-size 10800 --samples 90 --epochs 1 --micro-batch-size 3600")
    world = worlds(toy[1], load_run(toy[1] / "short/sft")[0])
    for name, number in (("entropy", lambda ref, r: -ref), ("raw_scores", lambda ref, r: r)):
        mean, square = (sum((ref.exp() * number(ref, r) ** k).sum().item() for ref, r in world) / 3 for k in (1, 2))
        assert log[0][name] == pytest.approx(mean, abs=4 * math.sqrt((square - mean ** 2) / 10800))


def test_the_second_update_is_the_definition(small_run, seen, gradients, toy):
    """Its gradients from one unpadded row at a time: scores shifted and scaled by the reference's, less the penalty of a
    response without <eos>; the KL; GAE by loops, whitened after the returns are taken; all that as a mean over tokens.
    Whether 24 responses run at once or 5 at a time."""
    beta, lam = 0.3, 0.9
    eos = Tokenizer.load(toy[1] / "runs/sft/tokenizer.tiktoken").eos
    (ref, _), (judge, _) = load_run(toy[1] / "runs/sft"), load_run(toy[1] / "runs/reward-model", ScalarModel)
    for at_once in (64, 5):
        seen.clear(), gradients.clear()
        small_run(f"--reward runs/reward-model --steps 2 --epochs 1 --lr 1e-2 --samples 3 --missing-eos-penalty 0.7 "
                  f"--beta {beta} --lam {lam} --micro-batch-size {at_once}")
        (_, of_reference), _, ((policy, *_), samples) = seen["generate"]
        read = lambda prompt, response: judge(torch.tensor([prompt + response]))[0, -1].item()  # noqa: E731
        base = [read(*row) for row in rows_of(of_reference)]
        value = seen["response_values"][-1][0][0]  # as it was before the update
        policy.zero_grad(), value.zero_grad()
        scored = []
        for prompt, response in rows_of(samples):
            logprobs = naive_logprobs(policy, prompt, response)
            kl = (logprobs - naive_logprobs(ref, prompt, response)).tolist()
            score = (read(prompt, response) - statistics.fmean(base)) / statistics.pstdev(base) - 0.7 * (response[-1] != eos)
            rewards = [-beta * x + score * (t == len(kl) - 1) for t, x in enumerate(kl)]
            values = value(torch.tensor([prompt + response]))[0, len(prompt) - 1:-1]
            v = [*values.tolist(), 0.0]
            delta = [rewards[t] + v[t + 1] - v[t] for t in range(len(kl))]
            scored.append((logprobs, values, [sum(lam ** (k - t) * delta[k] for k in range(t, len(kl)))
                                              for t in range(len(kl))]))
        tokens = [a for *_, advantage in scored for a in advantage]
        loss = 0.0
        for logprobs, values, advantage in scored:
            loss = loss + 0.5 * (values - values.detach() - torch.tensor(advantage)).square().sum()
            advantage = [(a - statistics.fmean(tokens)) / statistics.pstdev(tokens) for a in advantage]
            loss = loss - (torch.tensor(advantage) * logprobs).sum()
        (loss / len(tokens)).backward()
        assert max(abs(x) for x in kl) > 1e-3 and len(gradients) == 4
        for network, found in zip((policy, value), gradients[-2:]):
            torch.testing.assert_close(found, [p.grad for p in network.parameters()], rtol=1e-3, atol=2e-5)


def test_a_batch_starts_at_ratio_1_and_the_run_at_the_reference(small_run):
    """One step a batch: to the bit, every ratio is 1 and nothing is clipped, and before the first update the KL is 0."""
    log, _ = small_run("--steps 3 --epochs 1 --samples 3 --micro-batch-size 5")
    for row in log:
        assert (row["ratio"], row["ratio_std"], row["approx_kl"], row["clip_fraction"]) == (1, 0, 0, 0)
    assert (log[0]["kl"], log[0]["kl_se"]) == (0, 0) and log[2]["kl"] != 0
    log, _ = small_run("--epochs 3 --samples 3")
    assert log[0]["approx_kl"] > 0 and log[0]["ratio_std"] > 0  # the second and third passes over a batch


def test_what_is_logged_is_a_mean_over_responses_or_over_tokens(small_run, seen, toy):
    """Every column of the second update from what the functions were given, by loops that never see a pad."""
    log, folder = small_run("--steps 2 --epochs 2 --minibatches 2 --missing-eos-penalty 0.7 --lr 3e-2")
    row, tokenizer = log[1], Tokenizer.load(folder / "tokenizer.tiktoken")
    samples = rows_of(seen["generate"][2][1])
    (scores, old, ref, mask, _), _ = seen["compute_rewards"][1]
    (_, values, *_), (_, returns) = seen["compute_gae"][1]
    assert {len(response) for _, response in samples} != {mask.shape[1]}
    per_token = lambda x: [[x[b, t].item() for t in range(len(ids))] for b, (_, ids) in enumerate(samples)]  # noqa: E731
    flat = lambda x: [number for numbers in per_token(x) for number in numbers]  # noqa: E731
    kl = [sum(a) - sum(b) for a, b in zip(per_token(old), per_token(ref))]
    texts = [tokenizer.decode(response) for _, response in samples]
    raw = user_function(f"{toy[1] / 'rewards.py'}:letters", "--reward")([tokenizer.decode(prompt) for prompt, _ in samples], texts).tolist()
    mean, var = statistics.fmean, statistics.variance
    expected = {
        "scores": mean(scores.tolist()), "raw_scores": mean(raw), "kl": mean(kl), "kl_se": math.sqrt(var(kl) / 24),
        "objective": mean(s - 0.1 * k for s, k in zip(scores.tolist(), kl)), "entropy": mean(-sum(x) for x in per_token(old)),
        "length": mean(len(response) for _, response in samples), "distinct": len(set(texts)) / 24,
        "eos_rate": mean(tokenizer.eos in response for _, response in samples),
        "explained_variance": 1 - var([r - v for r, v in zip(flat(returns), flat(values))]) / var(flat(returns))}
    steps, parts = defaultdict(list), seen["policy_loss"][-4:]  # two passes, two optimizer steps each: all their tokens
    for (new, before, _, there, _), (losses, _) in parts:
        where = [(b, t) for b, n in enumerate(there.sum(1).tolist()) for t in range(n)]
        change = [(new[at] - before[at]).item() for at in where]
        steps["approx_kl"] += [x * x / 2 for x in change]
        steps["ratio"] += [math.exp(x) for x in change]
        steps["clip_fraction"] += [abs(math.exp(x) - 1) > 0.2 for x in change]
        steps["loss"] += [losses[at].item() for at in where]
    for name, value in {**expected, **{name: mean(values) for name, values in steps.items()}}.items():
        assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert 0 < row["eos_rate"] < 1 and min(change) < -0.3 and max(change) > 0.3
    halves = [sorted(given[1].sum(1).tolist()) for given, _ in parts]  # each pass has every response once, in other halves
    assert halves[0] != halves[2] and sorted(halves[0] + halves[1]) == sorted(halves[2] + halves[3])
    assert sorted(halves[0] + halves[1]) == pytest.approx(sorted(old.sum(1).tolist()), abs=1e-5)


def test_micro_batches_change_nothing(small_run, gradients):
    """The gradients of two passes with two steps each, 2 responses at a time or all 12."""
    found = []
    for size in (2, 64):
        gradients.clear()
        small_run(f"--epochs 2 --minibatches 2 --samples 3 --micro-batch-size {size} --lr 1e-4 --value-lr 1e-4")
        found.append(copy.copy(gradients))
    assert len(found[0]) == len(found[1]) == 8
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_shift_and_scale_of_a_reward_change_nothing(small_run):
    """f, f + 10 and 3 f + 10 train the same policy: scores are counted from the reference's mean, in its deviations."""
    runs = [small_run(f"--reward rewards.py:{name} --steps 3 --samples 3") for name in
            ("letters", "ten_more", "three_times")]
    tokens = torch.randint(256, (50, 8), generator=torch.Generator().manual_seed(0))
    logits = [load_run(folder)[0](tokens) for _, folder in runs]
    for (log, _), found in zip(runs[1:], logits[1:]):
        torch.testing.assert_close(found, logits[0], rtol=0, atol=1e-5)
        assert log[2]["scores"] == pytest.approx(runs[0][0][2]["scores"], rel=1e-5)


@pytest.mark.parametrize("prompts", [3, 120])
def test_scores_of_the_reference_are_0_and_1(prompts, small_run, seen, monkeypatch):
    """In mean and deviation, on its own 192 responses, however few prompts there are."""
    every = tasks.prompts
    monkeypatch.setattr(tasks, "prompts", lambda *args: every(*args)[:prompts])
    small_run(f"--batch-size 192 --samples {64 if prompts == 3 else 2} --epochs 1")
    scores = seen["compute_rewards"][0][0][0]
    assert abs(scores.mean().item()) < 0.35 and scores.std().item() == pytest.approx(1, abs=0.35)


def test_the_penalty_for_a_missing_eos_looks_at_the_response_alone(small_run, seen, monkeypatch):
    """Not at the prompt, which may hold the id of <eos>, nor at the pads, which may have it."""
    sample, eos = ppo.generate, []

    def marked(model, prompts, length, end, *rest):
        samples = sample(model, prompts, length, end, *rest)
        eos[:] = [end]
        samples.tokens[::2, 0] = end
        samples.tokens[torch.arange(samples.tokens.shape[1]) >= samples.lengths[:, None]] = end
        return samples
    monkeypatch.setattr(ppo, "generate", marked)
    for penalty in (0, 5):
        small_run(f"--missing-eos-penalty {penalty}")
    (plain, *_), (less, *_) = (given for given, _ in seen["compute_rewards"])
    last = [ids[-1] for ids in (response for _, response in rows_of(seen["generate"][1][1]))]
    assert 0 < sum(token == eos[0] for token in last) < 24
    torch.testing.assert_close(plain - less, torch.tensor([0.0 if token == eos[0] else 5.0 for token in last]))


def test_beta_adapts_to_the_kl_that_is_paid_for(small_run, seen):
    """The rows alone say it: each beta from the last and from the KL beside it; and that is the beta and the KL of the
    rewards."""
    log, _ = small_run("--steps 6 --target-kl 0.05 --horizon 60 --beta 0.2 --lr 3e-3")
    for row, after in zip(log, log[1:]):
        change = min(max(row["kl"] / 0.05 - 1, -0.2), 0.2) * 24 / 60
        assert after["beta"] == pytest.approx(row["beta"] * (1 + change), rel=1e-12)
    for row, ((_, logprobs, ref_logprobs, _, beta), _) in zip(log, seen["compute_rewards"]):
        assert row["beta"] == beta and row["kl"] == pytest.approx((logprobs - ref_logprobs).sum(1).mean().item(), abs=1e-6)
    assert {row["beta"] < 0.2 for row in log[1:]} == {True, False} or log[-1]["beta"] != log[1]["beta"]


def test_one_response_a_batch_is_legal(small_run):
    """It has no spread: no column of the log may become a NaN by that, which is not even JSON."""
    log, _ = small_run("--batch-size 1 --steps 3")
    assert all(math.isfinite(value) for row in log for value in row.values())


def test_learning_rates(small_run, monkeypatch):
    """The policy's grows over the warm-up and falls in a line to 0; the value network's only falls, though it is as large."""
    made, make = [], ppo.adamw
    monkeypatch.setattr(ppo, "adamw", lambda *args: made.append(make(*args)) or made[-1])
    log, _ = small_run("--steps 5 --warmup 10 --lr 1e-3 --value-lr 1e-3")
    assert [row["lr"] for row in log] == pytest.approx([1e-3 * (1 - k / 5) * (k + 1) / 10 for k in range(5)])
    assert [{group["lr"] for group in optimizer.param_groups} for optimizer in made] == [{log[4]["lr"]}, {1e-3 * (1 - 4 / 5)}]


def test_the_value_network_learns_first(small_run):
    """In the first three updates the policy is the reference, so beta has nothing to adapt to; the values learn what its
    responses are worth. Then the policy's own warm-up begins."""
    log, _ = small_run("--steps 8 --value-warmup 3 --warmup 2 --lr 1e-2 --value-lr 3e-2 --epochs 4 --target-kl 0.5 --horizon 100 "
                       "--batch-size 120")
    assert [row["lr"] for row in log] == pytest.approx([0, 0, 0, *(1e-2 * min(1, i / 2) * (1 - (i + 2) / 8) for i in range(1, 6))])
    for row in log[:4]:  # update 3 draws from the policy before its first step
        assert abs(row["kl"]) < 1e-4 and row["beta"] == log[0]["beta"]
    assert abs(log[4]["kl"]) > 1e-3 and log[4]["beta"] != log[3]["beta"]
    assert log[3]["explained_variance"] > log[0]["explained_variance"] + 0.1


def test_the_reference_is_not_trained_and_the_value_network_not_kept(small_run, toy, monkeypatch):
    """Neither its file nor the network in memory; model.pt has the names and shapes of the SFT policy, and other numbers."""
    seen, report = [], evaluate.report
    monkeypatch.setattr(evaluate, "report", lambda *args: seen.append(args[3].ref) or report(*args))
    before = sha256(toy[1] / "runs/sft/model.pt")
    _, folder = small_run("--steps 2 --lr 1e-2")
    ref, policy = (torch.load(path / "model.pt", weights_only=True) for path in (toy[1] / "runs/sft", folder))
    assert sha256(toy[1] / "runs/sft/model.pt") == before
    assert all(torch.equal(x, ref["model"][name]) for name, x in seen[0].state_dict().items())
    assert policy["kind"] == "GPT" and {k: v.shape for k, v in policy["model"].items()} == {k: v.shape for k, v in
                                                                                            ref["model"].items()}
    assert not any(torch.equal(x, ref["model"][name]) for name, x in policy["model"].items())


# ---- what goes wrong -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("network", ["policy", "value"])
def test_a_nan_in_a_network_stops_the_run(network, toy, tmp_path, monkeypatch):
    """At the step it is met, with that step's number; the checkpoint before it is whole."""
    sample, calls = ppo.generate, []

    def poisoned(model, *rest):
        calls.append(model)
        if network == "policy" and len(calls) == 4:  # the reference's samples are the first, step 2's the fourth
            with torch.no_grad():
                model.wpe.weight[1, 0] = float("nan")
        return sample(model, *rest)
    monkeypatch.setattr(ppo, "generate", poisoned)
    if network == "value":
        start = ppo.value_network
        monkeypatch.setattr(ppo, "value_network", lambda *args: torch.nn.init.constant_(
            (model := start(*args)).head.bias, float("nan")) is None or model)
    said = clone.run_here(*toy, "ppo", *(GIVEN + f"--steps 4 --checkpoint-every 0 --out {tmp_path / 'run'}").split())
    step = 2 if network == "policy" else 0
    assert said.startswith(f"error: step {step}: loss = nan") and "value_loss = nan" in said and "\n" not in said
    assert not (tmp_path / "run/model.pt").exists()
    state = load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert state is None if network == "value" else all(x.isfinite().all() for x in state["model"].values())


def warned(rows: list[dict], responses: list[str], eos_rate: float, capsys) -> list[str]:
    """The warnings that two updates in a row give: each is logged once and said once."""
    run = SimpleNamespace(rows=rows, log=lambda **values: rows.append(values))
    rows[-1]["eos_rate"] = eos_rate
    for step in (7, 8):
        warn_of_collapse(run, step, responses)
    found = [row for row in rows if "warning" in row]
    said = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert said == [f"warning: step 7: {row['message']}" for row in found] and all(row["step"] == 7 for row in found)
    return [row["warning"] for row in found]


def test_what_is_warned_of(capsys):
    """All responses alike, none that ends where they did, a KL below 0 for many updates by more than its error: and nothing
    that a healthy run shows."""
    different, alike = [str(i) for i in range(32)], ["same"] * 32

    def rows(kl, error=0.1, eos_rate=0.9):
        return [{"step": i, "kl": k, "kl_se": error, "eos_rate": eos_rate, "distinct": 1.0} for i, k in enumerate(kl)]
    assert warned(rows([0.0] * 3), different, 0.9, capsys) == []
    assert warned(rows([0.0] * 3), alike, 0.9, capsys) == ["collapse"]
    assert warned(rows([0.0] * 3), different, 0.0, capsys) == ["endless"]
    assert warned(rows([0.0] * 3, eos_rate=0.2), different, 0.0, capsys) == []  # few ever did
    assert warned(rows([0.5] * 9 + [-0.2]), different, 0.9, capsys) == []  # one estimate may fall below 0
    assert warned(rows([-0.05] * 3), different, 0.9, capsys) == []  # 0.05 +- 0.06
    assert warned(rows([0.5] * 5 + [-0.3] * 10), different, 0.9, capsys) == ["kl"]
    assert sorted(warned(rows([-0.3] * 10), alike, 0.0, capsys)) == ["collapse", "endless", "kl"]


def test_few_answers_from_the_start_are_no_collapse(capsys):
    """Where the reference gives 4 different answers among 100 (yes, no, ...), so may the policy."""
    rows = [{"step": i, "kl": 0.5, "kl_se": 0.1, "eos_rate": 1.0, "distinct": 0.04} for i in range(3)]
    assert warned(rows, ["yes", "no", "both", "neither"] * 25, 1.0, capsys) == []


@pytest.mark.parametrize("temperature, name, message", [
    (0.0, "collapse", "the policy has collapsed: 1 different responses among 64"), (3.0, "kl", "the KL is negative, -")])
def test_a_warning_is_in_the_log_and_on_stderr(temperature, name, message, small_run, monkeypatch, capsys):
    """A policy that says one thing, because from its second update on it is sampled at temperature 0; and one that is scored
    at another temperature than it is sampled with, whose KL seems to be below 0."""
    sample, calls = ppo.generate, []
    monkeypatch.setattr(ppo, "generate", lambda *args: calls.append(0) or sample(
        *args, temperature=temperature if len(calls) > 2 else 1.0))
    _, folder = small_run("--steps 12 --batch-size 64 --samples 64 --lr 1e-2")
    row, = (row for row in log_of(folder) if row.get("warning") == name)
    assert row["message"].startswith(message)
    assert capsys.readouterr().err.count(f"warning: step {row['step']}: {message}") == 1
