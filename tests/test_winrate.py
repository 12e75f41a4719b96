"""winrate.py: the judge is fair, best of n is what order statistics say, length is controlled for,
lengths are the text's, and a whole small figure, which is drawn once.
"""
import dataclasses
import importlib
import itertools
import json
import math
import random
import shlex
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import clone
import data.posts
import evaluate
from common import pipeline, tasks
from common.files import read_jsonl, write_jsonl
from common.rewards import Reward
from common.run import load_run
from common.settings import parse, script_of, typed
from common.tokenizer import Tokenizer, train_bpe
from common.training import generator
from conftest import smaller, tiny_gpt
from data.posts.grammar import sample_post
from experiments import samples, sweep, winrate
from experiments.winrate import (Contest, PromptSet, best_of_n, gold_judge, length_controlled,
                                 mean_and_error, powers_up_to, summarise, user_judge, wins, words)
from model import generate

PROMPTS = ["p"] * 4
A, B = ["a", "bb", "ccc", "d"], ["x", "b", "cccc", "d"]


def by_length(prompts, responses):
    return torch.tensor([float(len(r)) for r in responses])


# ---- the judge -----------------------------------------------------------------------------------

def moody(prompts, first, second):
    """Likes the first place, and some texts, and is not consistent."""
    liked = [sum(map(ord, a + b + b)) % 7 / 7 for a, b in zip(first, second)]
    return 0.3 + 0.6 * torch.tensor(liked, dtype=torch.float64)


def test_both_orders_make_any_judge_symmetric():
    for judge in (moody, gold_judge(by_length), lambda p, a, b: torch.ones(len(a))):
        both = wins(judge, PROMPTS, A, B) + wins(judge, PROMPTS, B, A)
        assert torch.allclose(both, torch.ones(4, dtype=torch.float64))
        assert wins(judge, PROMPTS, A, A).tolist() == [0.5] * 4
    likes_the_first_place = lambda p, a, b: torch.ones(len(a))  # noqa: E731
    assert wins(likes_the_first_place, PROMPTS, A, B).tolist() == [0.5] * 4


def test_the_gold_judge_counts_a_tie_half():
    judge = gold_judge(by_length)
    assert judge(PROMPTS, A, B).tolist() == [0.5, 1, 0, 0.5] == wins(judge, PROMPTS, A, B).tolist()


def test_a_policy_against_itself_wins_half_of_the_time():
    model, prompts = tiny_gpt(block_size=24), [[1, i % 7 + 3] for i in range(400)]

    def texts(seed):
        drawn = generate(model, prompts, 24, 2, 0, generator(seed))
        return ["x" * int(n) for n in drawn.lengths - drawn.prompt_lengths]

    win = torch.stack([wins(gold_judge(by_length), ["p"] * 400, texts(seed), texts(seed + 10))
                       for seed in range(3)])
    mean, error = mean_and_error(win)
    assert 0.005 < error < 0.03 and abs(mean - 0.5) < 3 * error


def test_where_nothing_can_win_over_the_reference_the_opponent_is_sft():
    texts = PromptSet("test prompts", ["p", "q"], ["a", "b"], (0.0,), True)
    likeness = Reward("", "", lambda prompts, texts, _=None: torch.ones(2))
    quality = Reward("", "", lambda prompts, texts, _=None: torch.tensor([1.0, 0.7]))
    for gold, flags, opponent in ((likeness, {}, "sft"), (quality, {}, "reference"),
                                  (likeness, {"against": "reference"}, "reference"),
                                  (likeness, {"judge": "FILE.py:f"}, "reference")):
        assert winrate.choose_opponent(winrate.Config(**flags), gold, texts) == opponent


JUDGES = """
import sys
def shorter(prompts, first, second):
    return [0.5 + 0.5 * (len(a) < len(b)) - 0.5 * (len(a) > len(b)) for a, b in zip(first, second)]
def sure(prompts, first, second):
    return [2.0] * len(first)
def two(prompts, first):
    return [0.5] * len(first)
def stops(prompts, first, second):
    sys.exit(0)
def nothing(prompts, first, second):
    pass
"""


def test_a_judge_of_ones_own(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGES)
    shorter = user_judge(f"{tmp_path}/judge.py:shorter")
    assert wins(shorter, PROMPTS, A, B).tolist() == [0.5, 0, 1, 0.5]
    with pytest.raises(SystemExit, match="judge.py:sure: returned 2, expected a probability"):
        user_judge(f"{tmp_path}/judge.py:sure")(PROMPTS, A, B)
    with pytest.raises(SystemExit, match="--judge 'gold': expected FILE.py:function"):
        user_judge("gold")


# ---- best of n -----------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    draw = generator(1)
    scores, values = torch.rand(3, 6, generator=draw), torch.rand(3, 6, generator=draw)
    slow = [sum(v[max(chosen, key=s.__getitem__)].item()
                for chosen in itertools.combinations(range(6), n)) / math.comb(6, n)
            for s, v in zip(scores, values)]
    assert best_of_n(scores, values.double(), n).tolist() == pytest.approx(slow, abs=1e-6)


def test_best_of_n_wins_as_order_statistics_say():
    """Chosen by the judge's own reward, the best of n wins unless all n lose:
    1 - C(losers, n) / C(N, n), which is 1 - (1 - p)^n for many responses. Chosen by a coin, it wins
    as often as one."""
    rewards = torch.rand(1, 64, generator=generator(2))
    win = (rewards > 0.8).double()
    losers, before = int(64 - win.sum()), -1.0
    for n in (1, 2, 4, 8, 16, 32, 64):
        rate = best_of_n(rewards, win, n).item()
        assert rate == pytest.approx(1 - math.comb(losers, n) / math.comb(64, n), abs=1e-9)
        assert rate > before
        before = rate
    rewards = torch.rand(2000, 32, generator=generator(3))
    win = (rewards > 0.8).double()
    for n in (2, 8):
        assert best_of_n(rewards, win, n).mean().item() == pytest.approx(1 - 0.8**n, abs=0.01)
        coin = torch.rand(rewards.shape, generator=generator(4))
        assert best_of_n(coin, win, n).mean().item() == pytest.approx(0.2, abs=0.02)


def test_ties_go_to_either():
    """A score that sees nothing chooses no better than a coin, in whatever order they come."""
    values = (torch.arange(64) < 32).double().expand(2000, 64)
    mean = best_of_n(torch.zeros(2000, 64), values, 8).mean().item()
    assert mean == pytest.approx(0.5, abs=0.01)


def test_every_largest_n_has_its_points():
    """Of 3, no power of two, there is a point at every temperature, and so no hole in the table."""
    assert powers_up_to(128)[-2:] == [64, 128] and powers_up_to(100)[-2:] == [64, 100]
    assert powers_up_to(1) == [1] and powers_up_to(3) == [1, 2, 3]
    texts = PromptSet("test prompts", PROMPTS, B, (0.0, 0.5, 1.0), True)
    gold = Reward("length", "id", lambda prompts, responses, _=None: by_length(prompts, responses))
    contest = Contest(texts, B, gold_judge(gold), gold)
    points = []
    for t in texts.temperatures:
        samples = 3 if t else 1
        drawn = [{"responses": [a, a + "x", "y"][:samples], "scores": [1.0, 0.0, 2.0][:samples],
                  "gold": [len(a), len(a) + 1, 1][:samples]} for a in A]
        points += [contest.point("SFT", t, [A, A]), *contest.best_of_n(t, [drawn, drawn], 3)]
    rows = summarise(points)
    table = winrate.markdown(rows, {"test prompts": 1.0}, "length", "B")
    assert "\n| best of 3 | " in table and "\n| best of 3 by the gold reward | " in table
    assert "|  |" not in table
    by_n = {row["n"]: row["win_rate"] for row in rows
            if row["method"] == "best of n by the gold reward" and row["temperature"] == 1}
    # the longest are "ax" > "x", "bbx" > "b", "cccx" = "cccc" and "dx" > "d"
    assert list(by_n) == [1, 2, 3] and by_n[3] == (1 + 1 + 0.5 + 1) / 4


# ---- length and errors ---------------------------------------------------------------------------

def test_length_control_finds_the_rates_at_equal_length():
    """Wins drawn from the model: three policies of known quality; the best writes long texts."""
    draw = generator(5)
    quality, slope = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), 2.0
    noise = torch.randn(3, 4000, generator=draw, dtype=torch.float64)
    x = 0.3 * noise + torch.tensor([[-0.2], [0.0], [0.7]])
    win = torch.rand(3, 4000, generator=draw) < torch.sigmoid(quality[:, None] + slope * x)
    controlled = length_controlled(win, x)
    assert torch.allclose(controlled, torch.sigmoid(quality), atol=0.03)
    assert win.double().mean(1)[2] > controlled[2] + 0.1  # what it owes to its length


def test_length_control_is_the_maximum_of_the_likelihood():
    """By Newton's method on derivatives that torch takes."""
    draw = generator(6)
    win = torch.rand(2, 30, generator=draw).double()
    x = torch.randn(2, 30, generator=draw).double()

    def loss(parameters):
        p = torch.sigmoid(parameters[:2, None] + parameters[2] * x)
        tie = torch.sigmoid(parameters[:2])
        return (-(win * p.log() + (1 - win) * (1 - p).log()).sum()
                - (0.5 * tie.log() + 0.5 * (1 - tie).log()).sum())
    best = torch.zeros(3, dtype=torch.float64)
    for _ in range(20):
        gradient = torch.autograd.functional.jacobian(loss, best)
        best -= torch.linalg.solve(torch.autograd.functional.hessian(loss, best), gradient)
    assert gradient.abs().max() < 1e-9
    assert torch.allclose(length_controlled(win, x), torch.sigmoid(best[:2]), atol=1e-6)


def test_length_control_without_anything_to_control():
    """Texts as long as the reference: the win rate itself (and the one tie)."""
    win = torch.tensor([[1.0] * 30 + [0.0] * 9, [1.0] * 39])
    controlled = length_controlled(win, torch.zeros(2, 39))
    assert controlled.tolist() == pytest.approx([30.5 / 40, 39.5 / 40])


@pytest.mark.parametrize("size", [1e-3, 1.0, 10.0])
def test_length_control_where_length_alone_decides(size):
    """A judge that takes the longer text, and nothing else. The likelihood rises with the slope for
    ever, so a plain Newton's method ends nowhere; at equal length there is no winner."""
    x = size * torch.randn(3, 200, generator=generator(9))
    assert length_controlled((x > 0).double(), x).tolist() == pytest.approx([0.5] * 3, abs=0.2)


def test_errors_over_prompts_and_seeds():
    x = torch.rand(3, 50, generator=generator(7), dtype=torch.float64)
    prompts = x.mean(0).std().item() / 50**0.5
    seeds = x.mean(1).std().item() / 3**0.5
    assert mean_and_error(x) == pytest.approx((x.mean().item(), math.hypot(prompts, seeds)))
    one_seed = mean_and_error(x[:1])
    assert one_seed == pytest.approx((x[0].mean().item(), x[0].std().item() / 50**0.5))


def test_summarise_bootstraps_the_length_controlled_rate():
    """Two seeds, no length effect: its error is that of the win rate."""
    draw = generator(8)
    win = (torch.rand(2, 200, generator=draw) < 0.7).double()
    x = 0.1 * torch.randn(2, 200, generator=draw)
    (row,) = summarise([winrate.Point("t", "m", 1.0, 1, win, win + 5, x)])
    assert row["win_rate"] == pytest.approx(win.mean().item(), abs=1e-4)
    assert row["length_controlled"] == pytest.approx(row["win_rate"], abs=0.01)
    assert row["length_controlled_se"] == pytest.approx(row["win_rate_se"], rel=0.3)


def test_words_are_those_of_the_text():
    assert words(["", " a b.", "one,two  three\n"]).tolist() == [0, 2, 2]


def test_a_cell_that_was_not_measured_is_empty():
    row = {"texts": "t", "n": 1, "win_rate": 0.5, "win_rate_se": 0.1, "length_controlled": 0.4,
           "length_controlled_se": 0.1, "words": 9.0}
    rows = [row | {"method": method, "temperature": t}
            for method, t in (("SFT", 0.0), ("SFT", 1.0), ("DPO", 1.0))]
    assert winrate.markdown(rows, {"t": 9.0, "not yet": 9.0}, "", "").splitlines()[-2:] == [
        "| DPO |  | 50 ± 10 (40 ± 10; 9.0) |", ""]


# ---- a small figure ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Path]:
    """A copy of the repository with a few posts, and a working folder with a small SFT policy."""
    root = clone.make(tmp_path_factory.mktemp("winrate") / "clone")
    work = tmp_path_factory.mktemp("work")
    rng = random.Random(3)
    posts = sorted((sample_post(rng) for _ in range(400)), key=lambda post: len(post[0]))[:80]
    rng.shuffle(posts)

    def write(folder):
        tokenizer = train_bpe([post + summary for post, summary in posts], 500)
        tokenizer.save(folder / "tokenizer.tiktoken")
        rows = [{"prompt": post, "text": summary} for post, summary in posts]
        for name, part in {"train": rows[:60], "test": rows[60:70], "prompts_train": rows[:12],
                           "prompts_test": rows[70:74], "articles": rows[74:80]}.items():
            write_jsonl(folder / f"{name}.jsonl", part)
        return {}

    tasks.publish(root / "data/posts/prepared", "posts", write)
    with small_sizes():
        assert clone.run_here(root, work, "sft", "--dataset", "posts") == 0
    return root, work


def letters(text: str) -> float:
    """A reward for policies that know next to nothing: different letters of the summary."""
    return len(set(text.partition("TL;DR:")[2])) / 31


@contextmanager
def small_sizes():
    """Sizes under which every stage takes a second."""
    tiny = dict(n_layer=1, n_embd=32, n_head=2, batch_size=8, steps=60, warmup=5, lr=2e-2,
                block_size=176)  # the short posts, with room for 40 tokens of summary
    task = smaller(data.posts.TASK, pair_prompts=6, bank_prompts=4, bank_samples=8, settings={
        "sft": tiny, "sft chosen": dict(steps=2), "dpo": dict(batch_size=8),
        "ppo": dict(batch_size=4, steps=1)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.posts, "TASK", dataclasses.replace(task, gold_reward=letters))
        patch.setattr(evaluate, "draw_run", lambda *_: None)
        yield patch


def train_here(planned, folder, workers):
    """sweep.run_all without processes."""
    for run in planned:
        if not (Path(run.config.out) / "model.pt").exists():
            importlib.import_module(script_of(type(run.config)).stem).train(run.config)
    return planned, False


def none_left(planned, folder, workers):
    assert all(sweep.is_finished(run) for run in planned)
    return planned, False


SIZES = ("--seeds", "2", "--prompts", "8", "--best-of", "4")
FOLDER = "runs/posts/winrate-prompts8-bestof4-seeds2"


def run(small, *argv, run_all=none_left, sizes=SIZES, patches=()):
    """What the script exits with."""
    root, work = small
    with small_sizes() as patch:
        patch.setattr(winrate, "run_all", run_all)
        for target, name, value in patches:
            patch.setattr(target, name, value, raising=False)
        return clone.run_here(root, work, "experiments/winrate", *sizes, *argv)


@pytest.fixture(scope="module")
def whole(small) -> Path:
    assert run(small, run_all=train_here) == 0
    return small[1] / FOLDER


@pytest.fixture
def references(small) -> dict[str, str]:
    rows = read_jsonl(small[0] / "data/posts/prepared/test.jsonl", {"prompt": str, "text": str})
    return {row["prompt"]: row["text"] for row in rows}


def drawn_by(whole, pattern) -> list[dict]:
    return [row for path in sorted(whole.parent.glob(f"winrate-responses/{pattern}"))
            for row in read_jsonl(path, {"prompt": str, "responses": list})]


def judged(prompt, response, reference) -> float:
    """1, 1/2 or 0, by the gold reward of this file."""
    ours, theirs = letters(prompt + response), letters(prompt + reference)
    return float(ours > theirs) + 0.5 * (ours == theirs)


def test_the_whole_figure(whole, references):
    """A row for every method and temperature, on both sets of prompts; best of n rises with n under
    the gold reward."""
    rows = read_jsonl(whole / "results.jsonl", {"method": str})
    at = {(row["texts"], row["method"], row["temperature"], row["n"]): row for row in rows}
    for texts, temperatures in (("test prompts", winrate.TEMPERATURES),
                                ("news articles", winrate.FAR_TEMPERATURES)):
        for method, t in itertools.product(("SFT", "Preferred-FT", "DPO", "PPO"), temperatures):
            row = at[texts, method, t, 1]
            assert 0 <= row["win_rate"] <= 1 and row["win_rate_se"] >= 0
            assert row["win_rate"] == pytest.approx(sum(row["win_rate_of_seeds"]) / 2, abs=1e-4)
    one = at["test prompts", "best of n", 1.0, 1]  # the mean over all responses, judged one by one
    drawn = drawn_by(whole, "test-prompts-best-t1-*.jsonl")
    values = [judged(row["prompt"], text, references[row["prompt"]])
              for row in drawn for text in row["responses"]]
    assert one["win_rate"] == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert len(values) == 2 * 8 * 4 and 0.5 in values
    by_n = [at["test prompts", "best of n by the gold reward", 1.0, n]["win_rate"]
            for n in (1, 2, 4)]
    assert by_n == sorted(by_n) and by_n[0] < by_n[-1]
    assert one["win_rate"] == by_n[0]  # of one there is nothing to choose
    greedy = at["test prompts", "SFT", 0.0, 1]
    assert at["test prompts", "best of n", 0.0, 4]["win_rate"] == greedy["win_rate"]
    table = (whole / "table.md").read_text()
    assert "judged by the gold reward (exact, as the task defines it)" in table
    assert "| best of 4 by the gold reward |" in table and "On news articles" in table
    assert (whole / "winrate.png").stat().st_size > 10_000


def test_the_runs_are_those_of_the_plain_commands(whole):
    """Each in the folder, and with the settings, that the command a user would type gives it."""
    names = ("preferred-ft", "preferred-ft-seed1", "dpo-beta0.1-seed0", "dpo-beta0.1-seed1",
             "ppo-beta0.1-seed0", "ppo-beta0.1-seed1")
    assert all((whole.parent / name / "model.pt").exists() for name in names)
    planned = winrate.plan(parse(winrate.Config, "", ["--seeds", "2"]))
    lines = [typed(run.config) for run in planned if run.seed == 1]
    assert lines == ["python sft.py --dataset posts --on chosen --seed 1",
                     "python dpo.py --dataset posts --seed 1",
                     "python ppo.py --dataset posts --seed 1"]
    for line, run in zip(lines, planned[3:]):
        config = parse(type(run.config), "", line.split()[2:])
        assert dataclasses.replace(config, resume=True) == run.config


def test_a_point_is_what_its_responses_say(whole, references):
    """Win rate and words of SFT at T = 0.5, from the texts in the file, one by one."""
    row = next(r for r in read_jsonl(whole / "results.jsonl", {"method": str})
               if (r["texts"], r["method"], r["temperature"]) == ("test prompts", "SFT", 0.5))
    drawn = drawn_by(whole, "test-prompts-sft-t0.5-seed*.jsonl")
    rates = [judged(r["prompt"], r["responses"][0], references[r["prompt"]]) for r in drawn]
    lengths = [len(r["responses"][0].split()) for r in drawn]
    assert len(rates) == 16 and 0 < sum(rates) < 16
    assert row["win_rate"] == pytest.approx(sum(rates) / 16, abs=1e-4)
    assert row["words"] == pytest.approx(sum(lengths) / 16, abs=1e-4)


def test_temperature_0_is_greedy(whole, small):
    """Each token is the most likely one, by the slow way; and there is one draw for every seed."""
    drawn = drawn_by(whole, "test-prompts-sft-t0-*.jsonl")
    assert len(drawn) == 8
    sft_folder = small[1] / "runs/posts/sft"
    policy, _ = load_run(sft_folder)
    tokenizer = Tokenizer.load(sft_folder / "tokenizer.tiktoken")
    for row in drawn[:2]:
        ids = [tokenizer.bos] + tokenizer.encode(row["prompt"])
        begin = len(ids)
        while len(ids) < policy.config.block_size and ids[-1] != tokenizer.eos:
            ids.append(int(policy(torch.tensor([ids]))[0, -1].argmax()))
        assert tokenizer.decode(ids[begin:]) == row["responses"][0]


# ---- samples -------------------------------------------------------------------------------------

def test_samples_have_the_words_and_their_scores(whole, capsys):
    fields = {"task": str, "prompt": str, "reference": str, "SFT": str, "DPO": str}
    rows = read_jsonl(whole / "samples.jsonl", fields)
    assert [row["texts"] for row in rows] == ["test prompts"] * 8 + ["news articles"] * 6
    drawn = drawn_by(whole, "test-prompts-sft-t0-*.jsonl")
    for row, greedy in zip(rows[:8], drawn, strict=True):
        assert (row["prompt"], row["SFT"]) == (greedy["prompt"], greedy["responses"][0])
        score = letters(row["prompt"] + row["SFT"])
        assert row["SFT score"] == pytest.approx(score, abs=1e-4)
    samples.main(str(whole / "samples.jsonl"), 1)
    shown = capsys.readouterr().out
    assert all(rows[0][name].strip() in shown for name in ("prompt", "reference", "SFT", "DPO"))


def test_samples_of_a_real_task_hold_ids(monkeypatch):
    """Nobody's words but our policies': the prompt by its id, and no reference."""
    monkeypatch.setattr(data.posts, "TASK", dataclasses.replace(data.posts.TASK, real=True))
    texts = PromptSet("test prompts", ["somebody's post"], ["somebody's summary"], (0.0,), True)
    nothing = torch.zeros(1, 1)
    points = [winrate.Point("test prompts", method, 0.0, 1, nothing, nothing, nothing, [" ours"])
              for method in ("SFT", "best of n")]
    gold = Reward("", "", lambda prompts, responses, _=None: torch.tensor([0.123456]))
    (row,) = winrate.sample_rows("posts", texts, points, gold)
    name = tasks.prompt_id("somebody's post")
    assert row == {"task": "posts", "texts": "test prompts", "id": name,
                   "SFT": " ours", "SFT score": 0.1235}
    shown = samples.show(row, {name: {"prompt": "somebody's post", "text": " a summary"}})
    assert shown.splitlines()[0] == "somebody's post" and "a summary" in shown and "ours" in shown


@pytest.mark.parametrize("row", [
    {"prompt": "p", "before": " x", "before_reward": 0.5, "after": " y"},
    {"texts": "t", "prompt": "p", "reference": " r", "SFT": " x"}])
def test_samples_that_hold_their_prompts_need_no_data(row, tmp_path, capsys):
    """Rows of the offline tasks, also as they were before they named their task."""
    path = tmp_path / "samples.jsonl"
    write_jsonl(path, [row])
    samples.main(str(path), 3)
    assert capsys.readouterr().out.splitlines()[:2] == ["", "p"]
    write_jsonl(path, [{"DPO": " x"}])
    with pytest.raises(SystemExit, match="neither a 'prompt' nor the 'task' and 'id' of one"):
        samples.main(str(path), 3)


# ---- what is reused, and what is not -------------------------------------------------------------

def not_sampled(*_, **__):
    pytest.fail("sampled again")


AGAIN = [(winrate, "sampled_responses", not_sampled)]


def test_a_second_run_draws_and_trains_nothing(whole, small):
    before = {path: path.read_bytes() for path in [*whole.rglob("*.jsonl"), whole / "table.md"]}
    assert run(small, patches=AGAIN) == 0
    assert {path: path.read_bytes() for path in before} == before


def test_the_printed_commands_make_what_is_missing(whole, small, tmp_path, capsys):
    """stdout has them alone, and the rows are those of the sweep that ran all by itself."""
    root, work = small
    shutil.copytree(work, tmp_path / "work")
    for name in ("dpo", "ppo"):
        shutil.rmtree(next((tmp_path / "work/runs/posts").glob(f"{name}-*seed1")))
    copy = root, tmp_path / "work"
    capsys.readouterr()
    assert run(copy, "--print", run_all=not_sampled) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [Path(line.split()[1]).name for line in lines] == ["dpo.py", "ppo.py"]
    with small_sizes():
        for line in lines:
            _, script, *flags = shlex.split(line)
            assert clone.run_here(*copy, Path(script).stem, *flags) == 0
    assert run(copy) == 0
    rows = (tmp_path / "work" / FOLDER / "results.jsonl").read_text()
    assert rows == (whole / "results.jsonl").read_text()


def test_over_sft_and_by_a_judge_of_ones_own(whole, small):
    """SFT at T = 0 ties with itself; a judge who likes the first place sees ties alone. Each has a
    folder of its own, and nothing is sampled again. A judge that was edited is named."""
    before = (whole / "results.jsonl").read_bytes()
    judge = small[1] / "judge.py"
    judge.write_text("def first(prompts, first, second):\n    return [1.0] * len(first)\n")
    for flags, name in ((["--against", "sft"], "winrate-against-sft-prompts8-bestof4-seeds2"),
                        (["--judge", "judge.py:first"],
                         "winrate-judge-judge.py-first-prompts8-bestof4-seeds2"),
                        (["--seeds", "1"], "winrate-prompts8-bestof4-seeds1")):
        assert run(small, *flags, patches=AGAIN) == 0
        rows = read_jsonl(whole.parent / name / "results.jsonl", {"win_rate": float})
        assert (name.endswith("seeds1") or
                (rows[0]["win_rate"], rows[0]["win_rate_se"]) == (0.5, 0.0))
        assert "judge" not in name or {row["win_rate"] for row in rows} == {0.5}
    assert (whole / "results.jsonl").read_bytes() == before
    judge.write_text("def first(prompts, first, second):\n    return [0.5] * len(first)\n")
    said = run(small, "--judge", "judge.py:first")
    assert said.startswith("error: ") and "judge was" in said and "\n" not in said


@pytest.mark.parametrize("name", ["policy", "gold", "reward_model"])
def test_results_of_another_policy_or_reward_are_not_overwritten(whole, small, name):
    folder = small[1] / f"of-another-{name}"
    folder.mkdir()
    made = json.loads((whole / "config.json").read_text())
    made["built_from"][name] = "another"
    (folder / "config.json").write_text(json.dumps(made))
    said = run(small, "--out", str(folder))
    assert f"made with other settings: {name} was 'another', now" in said and "\n" not in said
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_another_number_of_prompts_in_the_same_folder_is_named(whole, small):
    said = run(small, "--out", str(whole), "--prompts", "4")
    assert "prompts was 8, now 4: give another folder with --out" in said


class Constant:
    """A reward model that gives everything the same score."""

    def __init__(self, value):
        self.value = value

    def score(self, tokens, lengths):
        return torch.full((len(tokens),), self.value)


def test_scores_are_of_the_rewards_that_gave_them(small, tmp_path):
    """A new gold reward or reward model never finds what was scored by an old one."""
    start = pipeline.load(small[1] / "runs/posts/sft", "posts", "cpu")
    start.folder = tmp_path

    def scored(gold, score):
        start.gold = Reward("", f"gold {gold}", lambda *_: torch.full((2,), gold))
        reward = Reward("", f"model {score}", None, Constant(score))
        (row,) = winrate.respond(start, "any", start.ref, ["POST:"], 1.0, 0, 2, reward)
        return row["gold"], row["scores"]
    for gold, score in ((0.0, 1.0), (0.0, 2.0), (0.5, 2.0), (0.0, 1.0)):
        assert scored(gold, score) == ([gold] * 2, [score] * 2)
    assert len(list(tmp_path.rglob("*.jsonl"))) == 3


# ---- Ctrl-C, and mistakes ------------------------------------------------------------------------

def test_ctrl_c_leaves_what_is_finished(whole, small, capsys):
    """While training, the runs. While sampling, the points so far. The same command goes on."""
    folder = small[1] / "stopped"
    sizes = ("--seeds", "2", "--prompts", "6", "--best-of", "2", "--out", str(folder))
    assert run(small, run_all=lambda planned, *_: (planned[:1], True), sizes=sizes) == 130
    assert not (folder / "table.md").exists()

    calls, draw = [], winrate.sampled_responses

    def interrupted(*values, **named):
        calls.append(named)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return draw(*values, **named)
    assert run(small, sizes=sizes, patches=[(winrate, "sampled_responses", interrupted)]) == 130
    rows = read_jsonl(folder / "results.jsonl", {"method": str})
    assert [(row["method"], row["temperature"]) for row in rows] == [("SFT", 0.0), ("SFT", 0.25)]
    assert "| SFT | " in (folder / "table.md").read_text() and (folder / "winrate.png").exists()
    shown = capsys.readouterr().out
    assert "stopped: this is of the 2 points" in shown and "--resume" not in shown
    assert run(small, sizes=sizes) == 0
    assert len(read_jsonl(folder / "results.jsonl", {"method": str})) == 4 * 7 + 2 * 6


def test_all_files_are_written_before_anything_is_printed(whole, small):
    def broken(*_):
        raise BrokenPipeError
    folder = small[1] / "unprinted"
    with pytest.raises(BrokenPipeError):
        run(small, "--out", str(folder), patches=[(winrate, "print", broken)])
    files = {path.name for path in folder.iterdir()}
    assert files == {"config.json", "results.jsonl", "table.md", "samples.jsonl", "winrate.png"}


@pytest.mark.parametrize("argv, message", [
    (["--judge", "nobody"], "--judge 'nobody': expected FILE.py:function"),
    (["--judge", "judges.py:missing"], "judges.py has no function 'missing'"),
    (["--judge", "judges.py:sure"], "judges.py:sure: returned 2, expected a probability"),
    (["--judge", "judges.py:two"], "two() takes 2 positional arguments but 3 were given"),
    (["--judge", "judges.py:stops"], "SystemExit"),
    (["--judge", "judges.py:nothing"], "NoneType"),
    (["--out", "judges.py"], "judges.py: cannot be written"),
    (["--out", "judges.py/x"], "judges.py/x: cannot be written"),
    (["--dataset", "reviews"], "--dataset reviews: its documents answer no prompts"),
    (["--best-of", "0"], "--best-of 0: must be > 0"),
    (["--prompts", "1"], "--prompts 1: expected 2 or more"),
    (["--seeds", "1000000000000"], "--seeds 1000000000000: must be below"),
    (["--quick", "--prompts", "9"], "--prompts: not with --quick"),
    (["--quick", "--best-of", "9"], "--best-of: not with --quick"),
    (["--quick", "--seeds", "2"], "--seeds: not with --quick"),
    (["--print", "--workers", "2"], "--workers: not with --print, which runs nothing")])
def test_a_mistake_is_one_line_before_anything_is_built(small, tmp_path, argv, message):
    (tmp_path / "judges.py").write_text(JUDGES)
    said = run((small[0], tmp_path), *argv, sizes=(), run_all=train_here)
    assert message in said and said.startswith("error: ") and "\n" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["judges.py"]


def test_quick_is_named_by_what_is_typed():
    config = parse(winrate.Config, "", ["--quick"])
    assert config.out == "runs/posts/winrate-quick"
    assert (config.seeds, config.prompts, config.best_of) == (1, 64, 16)
    assert parse(winrate.Config, "", ["--quick", "--dataset", "tldr"]).best_of == 4
    for more in (["--workers", "1"], ["--print"]):
        assert parse(winrate.Config, "", more).out == "runs/posts/winrate"
