"""winrate.py: the judge is fair, best of n is what order statistics say, length is controlled for, lengths are the text's, and
a whole small figure, which is drawn once.
"""
import itertools
import json
import math
import random
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import clone
import data.posts
import dpo
import evaluate
import ppo
import sft
from experiments import sweep
from experiments import winrate
from common import tasks
from common.files import read_jsonl, write_jsonl
from common.training import generator
from conftest import tiny_gpt
from common import pairs
from data.posts.grammar import sample_post
from common.tokenizer import Tokenizer, train_bpe
from model import generate
from test_frontier import Here, nothing
from experiments.winrate import best_of_n, errors, gold_judge, length_controlled, summarise, user_judge, wins, words

PROMPTS = ["p"] * 4
A, B = ["a", "bb", "ccc", "d"], ["x", "b", "cccc", "d"]


def by_length(prompts, responses):
    return torch.tensor([float(len(r)) for r in responses])


# ---- the judge -------------------------------------------------------------------------------------------------------

def moody(prompts, first, second):
    """Likes the first place, and some texts, and is not consistent."""
    return torch.tensor([0.3 + 0.6 * (sum(map(ord, a + b + b)) % 7) / 7 for a, b in zip(first, second)], dtype=torch.float64)


def test_both_orders_make_any_judge_symmetric():
    for judge in (moody, gold_judge(by_length), lambda p, a, b: torch.ones(len(a))):
        assert torch.allclose(wins(judge, PROMPTS, A, B) + wins(judge, PROMPTS, B, A), torch.ones(4, dtype=torch.float64))
        assert torch.equal(wins(judge, PROMPTS, A, A).double(), torch.full((4,), 0.5, dtype=torch.float64))
    assert wins(lambda p, a, b: torch.ones(len(a)), PROMPTS, A, B).tolist() == [0.5] * 4  # the first place, and nothing else


def test_the_gold_judge_counts_a_tie_half():
    judge = gold_judge(by_length)
    assert judge(PROMPTS, A, B).tolist() == [0.5, 1, 0, 0.5] == wins(judge, PROMPTS, A, B).tolist()


def test_a_policy_against_itself_wins_half_of_the_time():
    model, prompts = tiny_gpt(block_size=24), [[1, i % 7 + 3] for i in range(400)]

    def texts(seed):
        samples = generate(model, prompts, 24, 2, 0, generator(seed))
        return ["x" * int(n) for n in samples.lengths - samples.prompt_lengths]

    win = torch.stack([wins(gold_judge(by_length), ["p"] * 400, texts(seed), texts(seed + 10)) for seed in range(3)])
    mean, error = errors(win)
    assert 0.005 < error < 0.03 and abs(mean - 0.5) < 3 * error


def test_a_judge_of_ones_own(tmp_path):
    (tmp_path / "judge.py").write_text("def shorter(prompts, first, second):\n"
                                       "    return [0.5 + 0.5 * (len(a) < len(b)) - 0.5 * (len(a) > len(b))\n"
                                       "            for a, b in zip(first, second)]\n"
                                       "def sure(prompts, first, second):\n    return [2] * len(first)\n")
    assert wins(user_judge(f"{tmp_path}/judge.py:shorter"), PROMPTS, A, B).tolist() == [0.5, 0, 1, 0.5]
    with pytest.raises(SystemExit, match="--judge .*judge.py:sure: returned 2, expected a probability, 0 to 1"):
        user_judge(f"{tmp_path}/judge.py:sure")(PROMPTS, A, B)
    with pytest.raises(SystemExit, match="--judge gold: expected FILE.py:function"):
        user_judge("gold")


# ---- best of n -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    draw = generator(1)
    scores, values = torch.rand(3, 6, generator=draw), torch.rand(3, 6, generator=draw)
    slow = [sum(v[max(chosen, key=s.__getitem__)].item() for chosen in itertools.combinations(range(6), n)) / math.comb(6, n)
            for s, v in zip(scores, values)]
    assert torch.allclose(best_of_n(scores, values.double(), n), torch.tensor(slow, dtype=torch.float64), atol=1e-6)


def test_best_of_n_wins_as_order_statistics_say():
    """Chosen by the judge's own reward, the best of n wins unless all n lose: 1 - C(losers, n) / C(N, n), 1 - (1 - p)^n for
    many responses; chosen by a coin, it wins as often as one."""
    rewards = torch.rand(1, 64, generator=generator(2))
    win = (rewards > 0.8).double()
    losers, before = int(64 - win.sum()), -1.0
    for n in (1, 2, 4, 8, 16, 32, 64):
        rate = best_of_n(rewards, win, n).item()
        assert rate == pytest.approx(1 - math.comb(losers, n) / math.comb(64, n), abs=1e-9) and rate > before
        before = rate
    rewards = torch.rand(2000, 32, generator=generator(3))
    for n in (2, 8):
        assert best_of_n(rewards, (rewards > 0.8).double(), n).mean().item() == pytest.approx(1 - 0.8**n, abs=0.01)
        coin = torch.rand(rewards.shape, generator=generator(4))
        assert best_of_n(coin, (rewards > 0.8).double(), n).mean().item() == pytest.approx(0.2, abs=0.02)


def test_ties_go_to_either():
    """A score that sees nothing chooses no better than a coin, whatever the order of the responses."""
    values = (torch.arange(64) < 32).double().expand(2000, 64)
    assert best_of_n(torch.zeros(2000, 64), values, 8).mean().item() == pytest.approx(0.5, abs=0.01)


# ---- length and errors -----------------------------------------------------------------------------------------------

def test_length_control_finds_the_rates_at_equal_length():
    """Wins drawn from the model: three policies of known quality, of which the best writes long texts."""
    draw = generator(5)
    quality, slope = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), 2.0
    x = torch.randn(3, 4000, generator=draw, dtype=torch.float64) * 0.3 + torch.tensor([[-0.2], [0.0], [0.7]])
    win = (torch.rand(3, 4000, generator=draw) < torch.sigmoid(quality[:, None] + slope * x)).double()
    controlled = length_controlled(win, x)
    assert torch.allclose(controlled, torch.sigmoid(quality), atol=0.03)
    assert win.mean(1)[2] > controlled[2] + 0.1  # what it owes to its length


def test_length_control_is_the_maximum_of_the_likelihood():
    draw = generator(6)
    win, x = torch.rand(2, 30, generator=draw).double(), torch.randn(2, 30, generator=draw).double()
    a, b = torch.zeros(2, dtype=torch.float64, requires_grad=True), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([a, b], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        p = torch.sigmoid(a[:, None] + b * x)
        tie = torch.sigmoid(a)
        value = (-(win * p.log() + (1 - win) * (1 - p).log()).sum()
                 - (0.5 * tie.log() + 0.5 * (1 - tie).log()).sum())
        value.backward()
        return value
    optimizer.step(loss)
    assert torch.allclose(length_controlled(win, x), torch.sigmoid(a.detach()), atol=1e-6)


def test_length_control_without_anything_to_control():
    """Texts as long as the reference: the win rate itself (and the one tie); one that always wins stays below 1."""
    win = torch.tensor([[1.0] * 30 + [0.0] * 9, [1.0] * 39])
    assert length_controlled(win, torch.zeros(2, 39)).tolist() == pytest.approx([30.5 / 40, 39.5 / 40])


def test_errors_over_prompts_and_seeds():
    x = torch.rand(3, 50, generator=generator(7), dtype=torch.float64)
    prompts, seeds = x.mean(0).numpy().std(ddof=1) / 50**0.5, x.mean(1).numpy().std(ddof=1) / 3**0.5
    assert errors(x) == (pytest.approx(x.mean().item()), pytest.approx((prompts**2 + seeds**2) ** 0.5))
    assert errors(x[:1])[1] == pytest.approx(x[0].numpy().std(ddof=1) / 50**0.5)  # one seed says nothing of seeds


def test_words_are_those_of_the_text():
    assert words(["", " a b.", "one,two  three\n"]).tolist() == [0, 2, 2]


# ---- responses -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Path]:
    """A copy of the repository with a few posts, and a working folder with a small SFT policy."""
    root, work = clone.make(tmp_path_factory.mktemp("winrate") / "clone"), tmp_path_factory.mktemp("work")
    rng = random.Random(3)
    posts = [sample_post(rng) for _ in range(80)]

    def write(folder):
        train_bpe([post + summary for post, summary in posts], 500).save(folder / "tokenizer.tiktoken")
        rows = [{"prompt": post, "text": summary} for post, summary in posts]
        for name, part in {"train": rows[:60], "test": rows[60:70], "prompts_train": rows[:12], "prompts_test": rows[70:74],
                           "articles": rows[74:80]}.items():
            write_jsonl(folder / f"{name}.jsonl", part)
        return {}

    tasks.publish(root / "data/posts/prepared", "posts", write)
    with small_sizes():
        assert clone.run_here(root, work, "sft", "--dataset", "posts") == 0
    return root, work


def letters(text: str) -> float:
    """A reward for policies that know next to nothing: different letters of the summary. The references have 16 or so."""
    return len(set(text.partition("TL;DR:")[2])) / 31


@contextmanager
def small_sizes():
    """Presets under which every stage takes a second."""
    patch = pytest.MonkeyPatch()
    tiny = dict(n_layer=1, n_embd=32, n_head=2, batch_size=8, steps=60, warmup=5, lr=2e-2, block_size=288)
    patch.setattr(sft.Config, "PRESETS", {("posts", "cpu"): tiny, ("posts", "cpu", "chosen"): dict(steps=2)})
    patch.setattr(dpo.Config, "PRESETS", {("posts", "cpu"): dict(batch_size=8)})
    patch.setattr(ppo.Config, "PRESETS", {("posts", "cpu"): dict(batch_size=4, steps=1)})
    patch.setitem(pairs.SIZES, ("posts", "cpu"), dict(prompts=6, samples=4, scale=5.0))
    patch.setitem(evaluate.SIZES, ("posts", "cpu"), (4, 8))
    patch.setattr(data.posts, "gold_reward", letters)
    patch.setattr(dpo, "draw", lambda *_: None)
    patch.setattr(ppo, "draw_run", lambda *_: None)
    yield patch
    patch.undo()


def run(small, *argv: str, popen=Here):
    root, work = small
    with small_sizes() as patch:
        patch.setattr(sweep, "ROOT", root)
        patch.setattr(subprocess, "Popen", popen)
        patch.setattr(time, "sleep", lambda _: None)
        return clone.run_here(root, work, "experiments/winrate", "--seeds", "2", "--prompts", "8", "--best-of", "4", *argv)


@pytest.fixture(scope="module")
def whole(small) -> Path:
    assert run(small) == 0
    return small[1] / "runs/posts/winrate"


def test_the_whole_figure(whole, small):
    """A row for every method and temperature, on both sets of prompts; best of n rises with n under the gold reward."""
    rows = read_jsonl(whole / "results.jsonl", {"method": str})
    at = {(row["texts"], row["method"], row["temperature"], row["n"]): row for row in rows}
    for texts, temperatures in (("test prompts", winrate.TEMPERATURES), ("news articles", winrate.FAR_TEMPERATURES)):
        for method in ("SFT", "Preferred-FT", "DPO", "PPO"):
            for t in temperatures:
                row = at[texts, method, t, 1]
                assert 0 <= row["win_rate"] <= 1 and row["win_rate_se"] >= 0 and len(row["win_rate_of_seeds"]) == 2
                assert row["win_rate"] == pytest.approx(sum(row["win_rate_of_seeds"]) / 2, abs=1e-4)
    one = at["test prompts", "best of n", 1.0, 1]  # the mean over all responses, judged one by one, ties and all
    references = {row["prompt"]: row["text"] for row in read_jsonl(small[0] / "data/posts/prepared/test.jsonl", {"text": str})}
    judged = [(letters(row["prompt"] + text), letters(row["prompt"] + references[row["prompt"]]))
              for path in whole.glob("responses/test-prompts-best-t1-*.jsonl")
              for row in read_jsonl(path, {"responses": list}) for text in row["responses"]]
    assert one["win_rate"] == pytest.approx(sum((a > b) + 0.5 * (a == b) for a, b in judged) / len(judged), abs=1e-5)
    assert len(judged) == 2 * 8 * 4 and any(a == b for a, b in judged)
    by_n = [at["test prompts", "best of n by the gold reward", 1.0, n]["win_rate"] for n in (1, 2, 4)]
    assert by_n == sorted(by_n) and by_n[0] < by_n[-1]
    assert at["test prompts", "best of n", 1.0, 1]["win_rate"] == by_n[0]  # of one there is nothing to choose
    assert at["test prompts", "best of n", 0.0, 4]["win_rate"] == at["test prompts", "SFT", 0.0, 1]["win_rate"]
    table = (whole / "table.md").read_text()
    assert "judged by the gold reward (exact, as the task defines it)" in table and "| best of 4 by the gold reward |" in table and "On news articles" in table
    assert (whole / "winrate.png").stat().st_size > 10_000
    samples = read_jsonl(whole / "samples.jsonl", {"texts": str, "prompt": str, "reference": str, "SFT": str, "DPO": str})
    assert [row["texts"] for row in samples] == ["test prompts"] * 8 + ["news articles"] * 6


def test_a_point_is_what_its_responses_say(whole, small):
    """Win rate and words of SFT at T = 0.5, from the texts in the file, one by one."""
    references = {row["prompt"]: row["text"] for row in
                  read_jsonl(small[0] / "data/posts/prepared/test.jsonl", {"prompt": str, "text": str})}
    row = next(r for r in read_jsonl(whole / "results.jsonl", {"method": str})
               if (r["texts"], r["method"], r["temperature"]) == ("test prompts", "SFT", 0.5))
    rates, lengths = [], []
    for path in sorted(whole.glob("responses/test-prompts-sft-t0.5-seed*.jsonl")):
        for line in path.read_text().splitlines():
            drawn = json.loads(line)
            texts = drawn["responses"][0], references[drawn["prompt"]]
            ours, theirs = (letters(drawn["prompt"] + text) for text in texts)
            rates.append(float(ours > theirs) + 0.5 * (ours == theirs))
            lengths.append(len(drawn["responses"][0].split()))
    assert len(rates) == 16 and 0 < sum(rates) < 16
    assert row["win_rate"] == pytest.approx(sum(rates) / 16, abs=1e-4)
    assert row["words"] == pytest.approx(sum(lengths) / 16, abs=1e-4)


def test_temperature_0_is_greedy_and_deterministic(whole, small):
    """The same texts for every seed, and each token the most likely one, by the slow way."""
    ours = [path for path in whole.glob("responses/test-prompts-sft-t0-seed*.jsonl")]
    assert len(ours) == 2
    first, second = ([row["responses"] for row in read_jsonl(path, {"responses": list})] for path in ours)
    assert first == second
    sft_folder = small[1] / "runs/posts/sft"
    policy, _ = winrate.load_run(sft_folder)
    tokenizer = Tokenizer.load(sft_folder / "tokenizer.tiktoken")
    for row in read_jsonl(ours[0], {"prompt": str, "responses": list})[:2]:
        ids = [tokenizer.bos] + tokenizer.encode(row["prompt"])
        start = len(ids)
        while len(ids) < policy.config.block_size and ids[-1] != tokenizer.eos:
            ids.append(int(policy(torch.tensor([ids]))[0, -1].argmax()))
        assert tokenizer.decode(ids[start:]) == row["responses"][0]


def test_a_second_run_draws_and_trains_nothing(whole, small, monkeypatch):
    before = {path: path.read_bytes() for path in [*whole.rglob("*.jsonl"), whole / "table.md"]}
    monkeypatch.setattr(winrate, "sampled_responses", lambda *_, **__: pytest.fail("sampled again"))
    assert run(small, popen=nothing) == 0
    assert {path: path.read_bytes() for path in before} == before


def test_over_sft_and_by_a_judge_of_ones_own(whole, small):
    """SFT at T = 0 ties with itself; a judge who likes the first place sees a tie everywhere."""
    judge = small[1] / "judge.py"
    judge.write_text("def first(prompts, first, second):\n    return [1.0] * len(first)\n")
    for name in ("over-sft", "own-judge"):  # the same responses
        shutil.copytree(whole / "responses", small[1] / "runs/posts" / name / "responses")
    assert run(small, "--against", "sft", "--out", "runs/posts/over-sft", popen=nothing) == 0
    row = read_jsonl(small[1] / "runs/posts/over-sft/results.jsonl", {"method": str})[0]
    assert (row["method"], row["temperature"], row["win_rate"], row["win_rate_se"]) == ("SFT", 0.0, 0.5, 0.0)
    assert run(small, "--judge", f"{judge}:first", "--out", "runs/posts/own-judge", popen=nothing) == 0
    assert {row["win_rate"] for row in read_jsonl(small[1] / "runs/posts/own-judge/results.jsonl", {"method": str})} == {0.5}


@pytest.mark.parametrize("argv, message", [
    (["--prompts", "4"], "prompts was 8, now 4"), (["--best-of", "0"], "--best-of 0: must be > 0"),
    (["--judge", "nobody"], "--judge nobody: expected FILE.py:function")])
def test_other_settings_and_bad_ones_stop_in_one_line(whole, small, argv, message):
    said = run(small, *argv, popen=nothing)
    assert message in said and said.startswith("error: ") and "\n" not in said


def test_summarise_bootstraps_the_length_controlled_rate():
    """Two seeds, no length effect: its error is that of the win rate."""
    draw = generator(8)
    win = (torch.rand(2, 200, generator=draw) < 0.7).double()
    x = 0.1 * torch.randn(2, 200, generator=draw)
    (row,) = summarise([winrate.Point("t", "m", 1.0, 1, win, win + 5, x)])
    assert row["win_rate"] == pytest.approx(win.mean().item(), abs=1e-4)
    assert row["length_controlled"] == pytest.approx(row["win_rate"], abs=0.01)
    assert row["length_controlled_se"] == pytest.approx(row["win_rate_se"], rel=0.3)
