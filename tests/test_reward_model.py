"""reward_model.py: the Bradley-Terry loss, measures worked out by hand, small runs."""
import math
import random

import pytest
import torch

import reward_model
from common.files import write_jsonl
from common.pairs import encode_pairs, read_pairs, split
from common.rewards import all_scores
from common.run import load_run
from common.tokenizer import Tokenizer
from common.training import batches, generator, pad
from conftest import log_of, tiny_gpt
from model import ScalarModel
from reward_model import pair_accuracy, reward_loss

# ---- the loss --------------------------------------------------------------------------------------------------------

def test_loss_is_the_bradley_terry_likelihood():
    """-log of exp(w) / (exp(w) + exp(l)); the gradient is the chance that the model gave to the other order."""
    w, l = torch.randn(2, 100, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    w.requires_grad_()
    losses = reward_loss(w, l)
    torch.testing.assert_close(losses, -torch.log(w.exp() / (w.exp() + l.exp())), rtol=1e-12, atol=1e-12)
    losses.sum().backward()
    torch.testing.assert_close(w.grad, -l.exp() / (w.exp() + l.exp()).detach(), rtol=1e-12, atol=1e-12)
    assert reward_loss(torch.tensor(0.0), torch.tensor(0.0)).item() == pytest.approx(math.log(2))
    assert reward_loss(torch.tensor(-1000.0), torch.tensor(1000.0)).item() == 2000  # no overflow


def test_a_shift_of_all_scores_changes_nothing():
    w, l = torch.randn(2, 100, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(reward_loss(w + 7, l + 7), reward_loss(w, l), rtol=1e-12, atol=1e-14)


def test_scores_come_back_from_their_own_comparisons():
    """20,000 comparisons drawn from known scores of 5 items: their maximum-likelihood scores are the known ones within 4
    standard errors (from the Fisher information), up to a constant."""
    true, draw = torch.tensor([-1.0, -0.3, 0.0, 0.4, 1.2]).double(), torch.Generator().manual_seed(2)
    a, b = torch.randint(5, (2, 20_000), generator=draw)
    a, b = a[a != b], b[a != b]
    first = torch.rand(len(a), generator=draw) < torch.sigmoid(true[a] - true[b])
    winner, loser = a.where(first, b), b.where(first, a)
    found = torch.zeros(5, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([found], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure():
        optimizer.zero_grad()
        loss = reward_loss(found[winner], found[loser]).sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    information = torch.autograd.functional.hessian(lambda x: reward_loss(x[winner], x[loser]).sum(), found.detach())
    errors = torch.linalg.pinv(information, rtol=1e-9, hermitian=True).diagonal().sqrt()
    found = found.detach() - found.detach().mean()
    assert ((found - (true - true.mean())).abs() < 4 * errors).all() and errors.max() < 0.03


# ---- measures --------------------------------------------------------------------------------------------------------

def test_pair_accuracy_by_hand():
    """Margins 0.2, -0.4 (confidence 0.55 and 0.60), 1 (0.73), 3 and -2 (0.95 and 0.88): right, wrong, right, right, wrong."""
    margins = torch.tensor([0.2, -0.4, 1.0, 3.0, -2.0])
    found = pair_accuracy(margins + 5, torch.full((5,), 5.0))
    assert found["held_out_accuracy"] == pytest.approx(3 / 5)
    assert found["held_out_loss"] == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins.tolist()) / 5, rel=1e-5)
    thirds = [(found[f"accuracy_at_confidence_{third}"], found[f"share_at_confidence_{third}"])
              for third in ("0.50_to_0.67", "0.67_to_0.83", "0.83_to_1.00")]
    assert thirds == [(0.5, pytest.approx(0.4)), (1.0, pytest.approx(0.2)), (0.5, pytest.approx(0.4))]
    assert not any("0.67_to_0.83" in name for name in pair_accuracy(margins[:2], torch.zeros(2)))  # nothing inside, no number


def test_a_calibrated_model_is_right_as_often_as_it_says():
    """Labels drawn from the model's own probabilities: accuracy in each third is the mean confidence there."""
    margin = 3 * torch.randn(100_000, generator=generator(0))
    flipped = torch.rand(100_000, generator=generator(1)) > torch.sigmoid(margin)
    found = pair_accuracy(torch.where(flipped, -margin, margin), torch.zeros(100_000))
    confidence = torch.sigmoid(margin.abs())
    for low, high, third in ((0.5, 0.667, "0.50_to_0.67"), (0.667, 0.833, "0.67_to_0.83"), (0.833, 1.01, "0.83_to_1.00")):
        inside = confidence[(confidence >= low) & (confidence < high)]
        error = math.sqrt(0.25 / len(inside))
        assert abs(found[f"accuracy_at_confidence_{third}"] - inside.mean().item()) < 4 * error


# ---- what the network is given ---------------------------------------------------------------------------------------

def test_the_network_starts_from_the_policy():
    policy = tiny_gpt()
    for block_size in (12, 8, 20):
        model = ScalarModel.from_policy(policy, block_size, seed=0).eval()
        tokens = torch.tensor([[1, 4, 4, 10, 0, 7, 3]])
        assert torch.equal(model.gpt.hidden(tokens), policy.hidden(tokens))
        assert model.gpt.wpe.weight.shape[0] == block_size
    with torch.no_grad():
        model.gpt.wte.weight += 1  # a copy: training it leaves the policy as it is
    assert not torch.equal(model.gpt.wte.weight, policy.wte.weight)
    assert torch.equal(policy.wte.weight, tiny_gpt().wte.weight)


# ---- small runs ------------------------------------------------------------------------------------------------------

def run_on_pairs(sft_run, pairs, out, **settings):
    folder = reward_model.train(reward_model.Config(**{**dict(sft=str(sft_run), pairs=str(pairs), out=str(out), batch_size=12,
                                                              warmup=1), **settings}))
    return log_of(folder), folder


@pytest.mark.parametrize("micro_batch_size", [0, 5])
def test_first_step_on_pairs_is_the_definition(sft_run, pairs_file, tmp_path, gradients, micro_batch_size):
    """Loss, accuracy and gradient of the mean over 12 pairs, every row scored by itself and unpadded, the score read at its last
    token (<eos>); whether they run at once or as 5, 5 and 2."""
    policy, _ = load_run(sft_run)
    tokenizer = Tokenizer.load(sft_run / "tokenizer.tiktoken")
    pairs = encode_pairs(read_pairs(pairs_file), tokenizer, policy.config.block_size, pairs_file)
    longest = torch.tensor([len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs])
    rows, _ = split(pairs, draw=True)
    batch = rows[next(batches(longest[rows], 12, seed=0))].tolist()
    model = ScalarModel.from_policy(policy, policy.config.block_size, seed=0)
    margins = torch.stack([model(torch.tensor([pairs[i].prompt + pairs[i].chosen]))[0, -1]
                           - model(torch.tensor([pairs[i].prompt + pairs[i].rejected]))[0, -1] for i in batch])
    loss = torch.log(1 + torch.exp(-margins)).mean()
    loss.backward()
    log, _ = run_on_pairs(sft_run, pairs_file, tmp_path / "rm", micro_batch_size=micro_batch_size)
    assert log[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert log[0]["accuracy"] == pytest.approx((margins > 0).float().mean().item())
    torch.testing.assert_close(gradients[0], [p.grad for p in model.parameters()], rtol=1e-3, atol=1e-4)


def test_separable_pairs_are_learned_and_scores_are_normalised(sft_run, tmp_path):
    """Chosen responses are "good", rejected ones "bad": held-out pairs are told apart. As loaded, the model gives the
    reference responses, that is all of the file's, mean 0 and standard deviation 1."""
    rng, path = random.Random(0), tmp_path / "pairs.jsonl"
    noun = lambda: rng.choice("film plot cast story music score ending script".split())  # noqa: E731
    write_jsonl(path, ({"prompt": f"The {noun()} of this {noun()} was", "chosen": f" good, the {noun()} too.",
                        "rejected": f" bad, the {noun()} too."} for _ in range(400)))
    log, folder = run_on_pairs(sft_run, path, tmp_path / "rm", lr=3e-3, epochs=2)
    assert log[-1]["held_out_accuracy"] > 0.95 and log[-1]["held_out_loss"] < 0.2
    model, _ = load_run(folder, ScalarModel)
    tokenizer = Tokenizer.load(folder / "tokenizer.tiktoken")
    pairs = encode_pairs(read_pairs(path), tokenizer, model.config.block_size, path)
    tokens, lengths = pad([p.prompt + r for p in pairs for r in (p.chosen, p.rejected)], tokenizer.pad)
    scores = all_scores(model, tokens, lengths, "float32")
    assert (scores.mean().item(), scores.std().item()) == (pytest.approx(0, abs=1e-4), pytest.approx(1, abs=1e-4))
    chosen, rejected = scores.view(-1, 2).T
    assert (chosen > rejected).float().mean() > 0.95
    one_by_one = torch.stack([model(torch.tensor([p.prompt + p.chosen]))[0, -1] for p in pairs[:5]])
    torch.testing.assert_close(one_by_one, chosen[:5], rtol=0, atol=1e-4)  # in the order they were given, padding unseen


def test_equal_scores_have_no_scale_and_divide_nothing(sft_run, pairs_file, tmp_path, monkeypatch):
    """A head that says 0 of everything: the standard deviation of the scores is 0, and what PPO would get must be finite."""
    original = ScalarModel.from_policy.__func__

    def flat(cls, *args):
        model = original(cls, *args)
        torch.nn.init.zeros_(model.head.weight)
        return model
    monkeypatch.setattr(ScalarModel, "from_policy", classmethod(flat))
    _, folder = run_on_pairs(sft_run, pairs_file, tmp_path / "rm", lr=1e-30)
    model, _ = load_run(folder, ScalarModel)
    assert model.std == 1 and model.score(torch.tensor([[1, 2, 3]]), torch.tensor([3])).isfinite().all()


def test_what_was_trained_on_is_not_called_held_out(sft_run, tmp_path, capsys):
    """Pairs of one prompt: none can be held out, so no accuracy is told."""
    write_jsonl(path := tmp_path / "pairs.jsonl",
                ({"prompt": "This film", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(30)))
    log, _ = run_on_pairs(sft_run, path, tmp_path / "rm")
    said = capsys.readouterr().out
    assert "no pair is held out" in said and "accuracy" not in said and set(log[-1]) == {"step", "seconds"}
