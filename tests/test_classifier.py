"""classifier.py: what it is trained on, its loss and gradient, and how its accuracy is counted."""
import json
import math

import pytest
import torch

import classifier
from classifier import truncated_accuracy, windows
from common import tasks
from common.files import write_jsonl
from common.run import load_run
from common.tokenizer import Tokenizer
from common.training import batches, generator
from conftest import log_of
from data.reviews.grammar import gold_reward
from model import ScalarModel


def test_windows_are_pieces_of_the_text_half_of_them_from_its_start():
    ids = [list(range(100, 100 + n)) for n in (3, 9, 10, 11, 60)] * 400
    cut = windows(ids, 10, bos=1, draw=generator(0))
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


@pytest.fixture
def labelled(small_reviews, tmp_path, monkeypatch):
    """A task whose documents have labels: reviews, positive or not by the gold reward; every third has none."""
    folder = tmp_path / "data"

    def write(folder):
        for name, count in (("train", 900), ("test", 100)):
            rows = [json.loads(line) for line in (small_reviews / f"{name}.jsonl").read_text().splitlines()[:count]]
            labels = [int(gold_reward(row["text"]) > 0.5) for row in rows]
            write_jsonl(folder / f"{name}.jsonl", ({**row, "label": label if name == "test" or i % 3 else None}
                                                   for i, (row, label) in enumerate(zip(rows, labels))))
        return {}
    tasks.publish(folder, "reviews", write)
    monkeypatch.setattr(tasks, "prepared", lambda dataset: folder)
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
    model, expected, right = ScalarModel.from_policy(policy, 40, seed=0), 0.0, 0
    for i, window in zip(batch, windows([ids[i] for i in batch], 40, tokenizer.bos, generator(0, 7, 0))):
        sign = 1 if rows[i]["label"] else -1
        scores = torch.cat([model.score(torch.tensor([window[:t]]), torch.tensor([t])) for t in range(1, len(window) + 1)])
        expected = expected + torch.log(1 + torch.exp(-sign * scores)).mean() / 12
        right += sign * scores[-1].item() > 0
    expected.backward()
    for micro_batch_size in (0, 5):
        gradients.clear()
        folder = classifier.train(classifier.Config(
            dataset="reviews", sft=str(sft_run), out=str(tmp_path / f"gold{micro_batch_size}"), batch_size=12, block_size=40,
            epochs=0.05, warmup=1, micro_batch_size=micro_batch_size))
        first = log_of(folder)[0]
        assert (first["loss"], first["accuracy"]) == (pytest.approx(expected.item(), abs=1e-5), pytest.approx(right / 12))
        torch.testing.assert_close(gradients[0], [p.grad for p in model.parameters()], rtol=1e-3, atol=1e-5)


def test_accuracy_of_truncated_texts(sft_run, monkeypatch):
    """The first `words` words are what is judged; a stand-in classifier says positive where it sees "good"."""
    monkeypatch.setattr(classifier, "classifier_logits",
                        lambda model, tokenizer, texts, dtype: torch.tensor([1.0 if "good" in text else -1.0 for text in texts]))
    rows = [{"text": "a good film", "label": 1}, {"text": "at the end good", "label": 1}, {"text": "no", "label": 0},
            {"text": "not\nso  good", "label": 0}]
    found = [truncated_accuracy(None, None, rows, words, "auto") for words in (1, 2, 3, None)]
    assert found == [0.5, 0.75, 0.5, 0.75]
