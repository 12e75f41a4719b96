"""expert_iteration.py: where its rounds end, by enumeration; and that the script goes there."""
import itertools

import pytest
import torch

import clone
import data.reviews
import evaluate
from common.run import load_run
from conftest import log_of, smaller
from expert_iteration import best_of
from toy import PROBS, REWARD, best_of_n, worlds


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No figure, which takes matplotlib a second, and 4 responses of the reference to each of 3 test prompts."""
    monkeypatch.setattr(evaluate, "draw_run", lambda *args: None)
    monkeypatch.setattr(data.reviews, "TASK", smaller(data.reviews.TASK, bank_prompts=3, bank_samples=4))


def test_the_best_of_each_prompt_by_hand():
    scores = torch.tensor([0.1, 0.7, 0.3, 5.0, 5.0, -1.0])
    assert best_of(scores, 3).tolist() == [1, 3] and best_of(scores, 1).tolist() == list(range(6))


def kept_by(probs, samples):
    """How often each response is kept, over all tuples that may be drawn."""
    kept = torch.zeros(len(probs), dtype=torch.double)
    for drawn in itertools.product(range(len(probs)), repeat=samples):
        kept[drawn[int(best_of(REWARD[list(drawn)], samples))]] += probs[list(drawn)].prod()
    return kept


@pytest.mark.parametrize("rounds, samples", [(1, 2), (1, 4), (2, 2), (3, 2), (2, 3)])
def test_rounds_of_best_of_n_end_at_best_of_n_to_their_number(rounds, samples):
    """What is kept of endless responses is what a table learns to draw; then again from there: best of samples^rounds."""
    probs = PROBS
    for _ in range(rounds):
        probs = kept_by(probs, samples)
    torch.testing.assert_close(probs, best_of_n(PROBS, samples ** rounds), rtol=1e-12, atol=1e-14)
    assert (probs * (probs / PROBS).log()).sum() < evaluate.best_of_n_kl(samples ** rounds)


def test_what_is_kept_is_what_the_bank_says():
    """evaluate.best_of_n_weights draws without replacement: every subset of six responses, once."""
    rewards = REWARD[[0, 1, 2, 4, 5]]
    for n in (2, 3):
        kept = torch.zeros(5, dtype=torch.double)
        subsets = list(itertools.combinations(range(5), n))
        for subset in subsets:
            kept[subset[int(best_of(rewards[list(subset)], n))]] += 1 / len(subsets)
        torch.testing.assert_close(kept, evaluate.best_of_n_weights(rewards[None], n)[0])


# ---- the script ------------------------------------------------------------------------------------------------------

GIVEN = "--sft short/sft --warmup 1 --lr 1e-2 "


@pytest.fixture
def small_run(toy, tmp_path):
    """run(argv) trains, and returns the log and the run folder."""
    def run(argv):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        assert clone.run_here(*toy, "expert_iteration", *(GIVEN + argv).split(), "--out", out) == 0
        return log_of(out), out
    return run


def missing(folder, work, n):
    """Of the distance from the reference to best of n, in nats, what the policy still lacks: KL(best of n || policy) over
    KL(best of n || reference), every response of every prompt summed."""
    far, left = 0.0, 0.0
    for ref, policy, r in worlds(work, load_run(work / "short/sft")[0], load_run(folder)[0]):
        target = best_of_n(ref.exp(), n, r)
        far += torch.special.xlogy(target, target / ref.exp()).sum().item()
        left += torch.special.xlogy(target, target / policy.exp()).sum().item()
    return left / far


def test_the_script_goes_towards_best_of_n(small_run, toy):
    """Two rounds of best of 3: more than half of the way to best of 9, in a few steps."""
    log, folder = small_run("--reward rewards.py:letters --rounds 2 --samples 3 --round-prompts 3000 --batch-size 300 "
                            "--epochs 4")
    assert missing(folder, toy[1], 9) < 0.5
    began = [row for row in log if "round" in row]
    assert [row["round"] for row in began] == [0, 1]
    # what it drew in the second round is about as good as what it had kept in the first
    assert began[0]["scores"] + 0.3 < began[1]["scores"] < began[0]["best_scores"] + 0.1
