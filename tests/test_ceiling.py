"""experiments/ceiling.py: Bradley-Terry on bigrams against a known truth, its measures by hand, and a small run."""
import json
import math
import random
import shutil

import pytest
import torch

import data.reviews
import evaluate
from common.pairs import Pair
from conftest import smaller
from experiments import ceiling
from experiments.ceiling import Config, agreement, counts, fit_bigrams, matrix


def test_counts_by_hand():
    """Prompt ... 7, response 5 7 5: the tokens, and 7-5, 5-7, 7-5."""
    assert counts([1, 7], [5, 7, 5]) == {5: 2, 7: 1, (7, 5): 2, (5, 7): 1}


def test_bigrams_find_the_weights_that_made_the_labels():
    """One token counts +2, another -1, and a bigram +1.5 beyond its tokens: 20,000 labels give them back."""
    rng, pairs = random.Random(0), []
    worth = {3: 2.0, 4: -1.0, (4, 3): 1.5}

    def score(response):
        return sum(worth.get(key, 0.0) * number for key, number in counts([0], response).items())
    for _ in range(20_000):
        a, b = ([rng.randrange(1, 6) for _ in range(4)] for _ in range(2))
        a_wins = rng.random() < 1 / (1 + math.exp(score(b) - score(a)))
        pairs.append(Pair([0], *((a, b) if a_wins else (b, a))))
    weights, columns = fit_bigrams(pairs)
    found = matrix([counts([0], [3, 1, 1, 1]), counts([0], [4, 1, 1, 1]), counts([0], [1, 4, 3, 1]), counts([0], [1, 1, 1, 1])], columns)
    scores = torch.sparse.mm(found, weights[:, None]).squeeze(1)
    assert (scores[:3] - scores[3]).tolist() == pytest.approx([2.0, -1.0, 2.5], abs=0.3)


def test_agreement_by_hand():
    """Two pairs: the better one preferred with sigmoid(5 * 0.2) = 0.731 and scored higher by 1; equal ones, by 0."""
    gold = torch.tensor([[0.7, 0.5, 0.4, 0.4]], dtype=torch.double)
    scores = torch.tensor([[2.0, 1.0, 3.0, 3.0]], dtype=torch.double)
    p = 1 / (1 + math.exp(-1))
    accuracy, loss = agreement(scores, gold, 5.0)
    assert accuracy == pytest.approx((p + 0.5) / 2)
    assert loss == pytest.approx((-p * math.log(p) - (1 - p) * math.log(1 - p) + math.log(2)) / 2)


def test_the_ceiling_of_the_gold_reward_is_the_optimum():
    """And of any increasing line through it; a reward that knows nothing buys nothing."""
    draw = torch.Generator().manual_seed(0)
    gold = torch.rand(8, 400, generator=draw, dtype=torch.double)
    curve = evaluate.optimal_curve(gold)
    best, known = evaluate.optimal_reward(curve, 1.0)
    assert known and ceiling.ceiling(gold, gold, 1.0) == pytest.approx(best, abs=2e-3)
    assert ceiling.ceiling(3 * gold - 7, gold, 1.0) == pytest.approx(best, abs=2e-3)
    noise = torch.rand(8, 400, generator=draw, dtype=torch.double)
    assert ceiling.ceiling(noise, gold, 1.0) == pytest.approx(gold.mean().item(), abs=0.03)


def test_a_small_run(small_reviews, sft_run, tmp_path, monkeypatch, capsys):
    """Two draws of the pairs, three models each and the labels' own reward, which is the best of them; rows and table agree."""
    monkeypatch.setattr(data.reviews, "TASK", smaller(data.reviews.TASK, pair_prompts=40, pair_samples=4, bank_prompts=4,
                                                      bank_samples=64))
    monkeypatch.setattr(ceiling, "KLS", (0.2, 2.0))
    shutil.copytree(sft_run, tmp_path / "runs/sft")  # its neighbours, pairs and bank, are another size's
    ceiling.main(Config(sft=str(tmp_path / "runs/sft"), seeds=2, out=str(tmp_path)))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["model"]) for row in rows] == [
        (seed, name) for seed in range(2) for name in ("the labels' own", "network, one pass", "network", "bigrams")]
    for row in rows:
        own = rows[4 * row["seed"]]
        assert row["accuracy"] <= own["accuracy"] + 1e-9 and row["loss"] >= own["loss"] - 1e-9
        assert row["reward_at_0.2"] <= own["reward_at_0.2"] + 1e-9
        assert own["share_at_0.2"] == pytest.approx(1, abs=0.02)
    assert rows[1]["accuracy"] != rows[5]["accuracy"]
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert f"| bigrams | {50 * (rows[3]['accuracy'] + rows[7]['accuracy']):.1f} ± " in table
