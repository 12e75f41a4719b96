"""reward_model.py: the Bradley-Terry loss, what the classifier is trained on, measures worked out by hand, small runs."""
import json
import math
import random

import pytest
import torch

from common import tasks
import evaluate
import reward_model
from common.files import write_jsonl
from common.training import batches, generator, pad
from conftest import log_of, tiny_gpt
from common.pairs import encode_pairs, read_pairs
from common.tokenizer import Tokenizer
from evaluate import all_scores
from common.run import load_run
from model import ScalarModel
from reward_model import pair_accuracy, reward_loss, scalar_model, truncated_accuracy, windows

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

def test_windows_are_pieces_of_the_text_half_of_them_from_its_start():
    ids = [list(range(100, 100 + n)) for n in (3, 9, 10, 11, 60)] * 400
    cut = windows(ids, 10, bos=1, epoch_seed=generator(0))
    starts = []
    for row, window in zip(ids, cut):
        assert window[0] == 1 and 2 <= len(window) <= 10
        start = window[1] - 100
        assert window[1:] == row[start:start + 9]
        starts.append(start)
    assert all(len(window) == min(len(row), 9) + 1 for row, window, start in zip(ids, cut, starts) if start == 0)
    long = torch.tensor(starts[4::5])  # of 60 tokens: any start from 0 to 54 in half of the cases
    assert abs((long == 0).double().mean().item() - (0.5 + 0.5 / 55)) < 4 * math.sqrt(0.25 / 400)
    assert long.max() > 45 and abs(long[long > 0].double().mean().item() - 27.5) < 4 * 55 / math.sqrt(12 * 200)


def test_the_network_starts_from_the_policy():
    policy = tiny_gpt()
    for block_size in (12, 8, 20):
        model = scalar_model(policy, block_size, seed=0).eval()
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
    batch = next(batches(longest[:76], 12, seed=0)).tolist()
    model = scalar_model(policy, policy.config.block_size, seed=0)
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


@pytest.fixture
def labelled(small_reviews, tmp_path, monkeypatch):
    """A task whose documents have labels: reviews, positive or not by the gold reward; every third has none."""
    folder = tmp_path / "data"
    for name, count in (("train", 900), ("test", 100)):
        rows = [json.loads(line) for line in (small_reviews / f"{name}.jsonl").read_text().splitlines()[:count]]
        labels = [int(evaluate.gold_reward("reviews", tmp_path)([""], [row["text"]]).item() > 0.5) for row in rows]
        write_jsonl(folder / f"{name}.jsonl", ({**row, "label": label if name == "test" or i % 3 else None}
                                               for i, (row, label) in enumerate(zip(rows, labels))))
    monkeypatch.setattr(tasks, "ensure", lambda dataset: folder)
    return folder


def test_the_classifier_is_trained_on_every_prefix(sft_run, labelled, tmp_path, gradients):
    """The first loss is, for each document, the mean over the tokens of its window of -log p(label | text so far), where every
    prefix is scored by itself; then the mean over documents. At once or in micro-batches."""
    policy, _ = load_run(sft_run)
    tokenizer = Tokenizer.load(sft_run / "tokenizer.tiktoken")
    rows = [row for row in map(json.loads, (labelled / "train.jsonl").read_text().splitlines()) if row["label"] is not None]
    ids = [tokenizer.encode(row["text"]) for row in rows]
    n = len(rows) - len(rows) // 20
    batch = next(batches(torch.tensor([min(len(row), 40) for row in ids[:n]]), 12, seed=0)).tolist()
    model, expected, right = scalar_model(policy, 40, seed=0), 0.0, 0
    for i, window in zip(batch, windows([ids[i] for i in batch], 40, tokenizer.bos, generator(0, 7, 0))):
        sign = 1 if rows[i]["label"] else -1
        scores = torch.cat([model.score(torch.tensor([window[:t]]), torch.tensor([t])) for t in range(1, len(window) + 1)])
        expected = expected + torch.log(1 + torch.exp(-sign * scores)).mean() / 12
        right += sign * scores[-1].item() > 0
    expected.backward()
    for micro_batch_size in (0, 5):
        gradients.clear()
        folder = reward_model.train(reward_model.Config(
            sft=str(sft_run), on="labels", out=str(tmp_path / f"gold{micro_batch_size}"), batch_size=12, block_size=40,
            epochs=0.05, warmup=1, micro_batch_size=micro_batch_size))
        first = log_of(folder)[0]
        assert (first["loss"], first["accuracy"]) == (pytest.approx(expected.item(), abs=1e-5), pytest.approx(right / 12))
        torch.testing.assert_close(gradients[0], [p.grad for p in model.parameters()], rtol=1e-3, atol=1e-5)


def test_accuracy_of_truncated_texts(sft_run, monkeypatch):
    """The first `words` words are what is judged; a stand-in classifier says positive where it sees "good"."""
    monkeypatch.setattr(evaluate, "classifier_logits",
                        lambda model, tokenizer, texts, dtype: torch.tensor([1.0 if "good" in text else -1.0 for text in texts]))
    rows = [{"text": "a good film", "label": 1}, {"text": "at the end good", "label": 1}, {"text": "no", "label": 0},
            {"text": "not\nso  good", "label": 0}]
    found = [truncated_accuracy(None, None, rows, words, "auto") for words in (1, 2, 3, None)]
    assert found == [0.5, 0.75, 0.5, 0.75]
