"""scaling.py: the sets of pairs, accuracy and its standard error, the table, and a small sweep that
goes on where it was.
"""
import json
import math
import random
import shlex
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import data.reviews
import reward_model
from common import pipeline
from common.files import read_json_object, read_jsonl, write_jsonl
from common.pairs import read_pairs
from common.run import load_run
from common.settings import command, parse
from common.tokenizer import Tokenizer
from common.training import generator
from conftest import ROOT, smaller
from data.reviews.grammar import gold_reward
from experiments import scaling
from experiments.scaling import (accuracy, doublings, hold_out, markdown, measure, over_seeds, plan,
                                 subset, trained_on)
from experiments.sweep import is_finished
from model import ScalarModel


# ---- sets of pairs -------------------------------------------------------------------------------

def rows_of(*sizes):
    """Pairs of prompts "0", "1", ...: as many as `sizes` says, the prompts mixed."""
    rows = [{"prompt": str(i), "chosen": f"{i} {j}", "rejected": "no"}
            for i, size in enumerate(sizes) for j in range(size)]
    random.Random(0).shuffle(rows)
    return rows


def names(rows):
    return [row["chosen"] for row in rows]


def test_sets_are_nested_and_of_whole_prompts():
    """A set begins with every smaller one of its seed, and has all pairs of each of its prompts, at
    most one prompt more than the count asked for; another seed has other prompts."""
    pool, held = hold_out(rows_of(*([1, 6, 3, 2] * 25)), 10, [])
    size = {pairs[0]["prompt"]: len(pairs) for pairs in pool}
    for seed in (0, 1):
        smaller = []
        for count in (1, 20, 100, 150, sum(size.values())):
            found = subset(pool, count, seed)
            assert count <= len(found) < count + 6
            assert names(found)[:len(smaller)] == names(smaller)
            for prompt in {row["prompt"] for row in found}:
                assert sum(row["prompt"] == prompt for row in found) == size[prompt]
            smaller = found
        assert len(found) == sum(size.values()) == len(set(names(found)))
    assert names(subset(pool, 20, 0)) != names(subset(pool, 20, 1))


def test_no_prompt_is_on_both_sides():
    """The last prompts to appear are held out with all their pairs, or the prompts of a file of
    their own, which then leave the others; identical responses are no pair."""
    rows = rows_of(3, 3, 3, 3, 3) + [{"prompt": "0", "chosen": "same", "rejected": "same"}]
    order = list(dict.fromkeys(row["prompt"] for row in rows))
    other = [row for row in rows if row["prompt"] in order[3:]] + rows_of(0, 0, 0, 0, 0, 2)
    for held_out, test, extra in ((2, [], 0), (9, other, 2)):
        pool, held = hold_out(rows, held_out, test)
        assert [pairs[0]["prompt"] for pairs in pool] == order[:3]
        assert {pairs[0]["prompt"] for pairs in held} == {*order[3:], *(["5"] if test else [])}
        assert all(len({row["prompt"] for row in pairs}) == 1 for pairs in pool + held)
        everything = rows_of(3, 3, 3, 3, 3, extra)
        assert sorted(names(sum(pool + held, []))) == sorted(names(everything))


# ---- accuracy and its error ----------------------------------------------------------------------

def test_accuracy_by_hand():
    """Right, wrong and a tie of one prompt, right of another: 2.5 of 4, residuals +- 0.375."""
    assert accuracy(torch.tensor([2.0, -1, 0, 0.1]), torch.tensor([7, 7, 7, 9])) == (
        0.625, pytest.approx(math.sqrt(2 / 1 * 2 * 0.375**2) / 4))
    one_prompt = accuracy(torch.tensor([1.0, -1]), torch.tensor([3, 3]))
    assert one_prompt[0] == 0.5 and math.isnan(one_prompt[1])


def test_the_error_is_that_of_a_ratio_of_sums():
    """The definition, prompt by prompt; and what a bootstrap over 300 prompts of unequal size
    gives, within a tenth."""
    draw = generator(0)
    sizes = torch.randint(1, 8, (300,), generator=draw)
    prompts = torch.repeat_interleave(torch.arange(300), sizes)
    margins = torch.randn(len(prompts), generator=draw) + 0.5
    margins += torch.randn(300, generator=draw)[prompts]
    margins[::17] = 0
    mean, error = accuracy(margins, prompts)

    right = defaultdict(list)
    for prompt, margin in zip(prompts.tolist(), margins.tolist()):
        right[prompt].append(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0)
    total = sum(map(sum, right.values())) / len(prompts)
    residuals = [sum(own) - total * len(own) for own in right.values()]
    variance = sum(e * e for e in residuals) * 300 / 299
    assert (mean, error) == pytest.approx((total, math.sqrt(variance) / len(prompts)))
    sums = torch.tensor([[sum(own), len(own)] for own in right.values()])
    drawn = sums[torch.randint(300, (2000, 300), generator=draw)].sum(1)
    assert (drawn[:, 0] / drawn[:, 1]).std().item() == pytest.approx(error, rel=0.1)
    independent = accuracy(margins, torch.arange(len(margins)))[1]
    assert error > 1.2 * independent


def test_identical_pairs_of_a_prompt_count_once():
    """Six copies of every pair say no more than one: the error is that of a mean over prompts."""
    margins = torch.randn(50, generator=generator(1))
    once = accuracy(margins, torch.arange(50))
    six = accuracy(margins.repeat_interleave(6), torch.arange(50).repeat_interleave(6))
    assert once == pytest.approx(six)
    assert once[1] == pytest.approx((margins > 0).double().std().item() / math.sqrt(50))


def test_the_true_reward_scores_the_ceiling_and_a_constant_one_half():
    """The first has the labels' agreement with the gold order (equal rewards count half), and all
    of the gold order; the second half of both; the true reward turned round what is left."""
    draw = generator(2)
    gold = torch.randint(-3, 4, (600,), generator=draw) / 5
    prompts = torch.arange(100).repeat_interleave(6)
    true = measure(7 * gold, gold, prompts)
    agreement = ((gold > 0).sum() + 0.5 * (gold == 0).sum()).item() / 600
    assert true["accuracy"] == true["ceiling"] == pytest.approx(agreement)
    assert true["accuracy_se"] == true["ceiling_se"]
    assert (true["gold_accuracy"], true["gold_accuracy_se"]) == (1, 0)
    constant = measure(torch.zeros(600), gold, prompts)
    assert (constant["accuracy"], constant["accuracy_se"]) == (0.5, 0)
    assert (constant["gold_accuracy"], constant["gold_accuracy_se"]) == (0.5, 0)
    turned = measure(-gold, gold, prompts)
    assert turned["accuracy"] == pytest.approx(1 - true["ceiling"])
    assert turned["gold_accuracy"] == 0
    for says_nothing in (None, torch.zeros(600)):
        assert measure(gold, says_nothing, prompts).keys() == {"accuracy", "accuracy_se"}


# ---- the table -----------------------------------------------------------------------------------

def row(size, count, seed, accuracy, error=0.03, **more):
    parameters = {"1x8": 1000, "2x8": 4000}[size]
    return {"size": size, "parameters": parameters, "count": count, "pairs": count, "seed": seed,
            "accuracy": accuracy, "accuracy_se": error, **more}


def test_an_interval_has_prompts_and_seeds():
    """Two seeds 0.08 apart: 0.04 over seeds, 0.03 over prompts, 0.05 together; one seed has that
    over prompts."""
    two = [row("1x8", 9, 0, 0.6), row("1x8", 9, 1, 0.68)]
    assert over_seeds(two, "accuracy") == pytest.approx((0.64, 0.05))
    assert over_seeds(two[:1], "accuracy") == (0.6, 0.03)


def test_what_doubling_adds():
    """An accuracy of 0.5 + 0.01 log2 pairs + 0.02 log2 parameters gives both back; one count says
    nothing of pairs."""
    rows = [row(size, count, seed,
                0.5 + 0.01 * math.log2(count) + 0.02 * math.log2(parameters) + 0.1 * seed)
            for size, parameters in (("1x8", 1000), ("2x8", 4000))
            for count in (64, 512) for seed in (0, 1)]
    found = doublings(rows)
    assert found["pairs"] == pytest.approx((0.01, 0), abs=1e-9)
    assert found["parameters"] == pytest.approx((0.02, 0), abs=1e-9)
    assert doublings([r for r in rows if r["count"] == 64]) == {}


def test_the_table():
    """A line a size, small ones first, a cell a count, empty where nothing is finished, and the
    ceiling."""
    gold = dict(gold_accuracy=0.75, gold_accuracy_se=0.01, ceiling=0.8, ceiling_se=0.02)
    text = markdown([row("2x8", 1000, 0, 0.7, **gold), row("1x8", 1000, 0, 0.65, **gold),
                     row("1x8", 300, 0, 0.6, **gold)])
    labels, order, *_ = text.split("\n\n")
    assert labels.splitlines() == [
        "| right about the labels, % | parameters | 300 pairs | 1,000 pairs |",
        "|---|---|---|---|",
        "| 1x8 | 1,000 | 60.0 ± 3.0 | 65.0 ± 3.0 |",
        "| 2x8 | 4,000 |  | 70.0 ± 3.0 |",
        "| **the true reward** |  | 80.0 ± 2.0 | 80.0 ± 2.0 |"]
    assert order.splitlines()[-1] == "| 2x8 | 4,000 |  | 75.0 ± 1.0 |"
    alone = markdown([row("1x8", 300, 0, 0.6)])
    assert "gold" not in alone and "true" not in alone


def test_the_committed_table_is_that_of_the_committed_rows():
    folder = ROOT / "results" / "posts" / "scaling"
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert markdown(rows) == (folder / "table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("dataset, rows", [
    ("tldr", [row("1x8", 300, 0, 0.6), row("1x8", 900, 0, 0.7), row("2x8", 300, 0, 0.7)]),
    ("reviews", [row("1x8", 300, 0, 0.6)])])
def test_the_figure_without_a_true_reward(tmp_path, dataset, rows):
    """Chance and what people agree on take its place; one size and one count are enough."""
    scaling.draw(rows, dataset, tmp_path)
    assert (tmp_path / "scaling.png").stat().st_size > 15_000


# ---- a small sweep -------------------------------------------------------------------------------

@pytest.fixture
def pairs(tmp_path):
    """120 pairs of 40 prompts of the small task, labelled by the gold reward."""
    rng, rows = random.Random(3), []
    for i in range(120):
        a, b = (" " + " ".join(rng.choices("a superb dull film plot good bad".split(), k=6)) + "."
                for _ in range(2))
        rejected, chosen = sorted((a, b), key=gold_reward)
        rewards = {"chosen_reward": gold_reward(chosen), "rejected_reward": gold_reward(rejected)}
        rows.append({"prompt": f"Film {i // 3} was", "chosen": chosen, "rejected": rejected,
                     **rewards})
    write_jsonl(tmp_path / "mine.jsonl", rows)
    return tmp_path / "mine.jsonl"


@pytest.fixture
def sweep(small_reviews, sft_run, pairs, tmp_path, monkeypatch):
    """sweep(*flags, stop=n): the rows of a sweep of two sizes and two counts, whose runs are
    trained in this process; Ctrl-C comes after n of them. sweep.trained has the names of all."""
    trained: list[str] = []
    base = shutil.copytree(sft_run, tmp_path / "runs" / "sft").parent
    monkeypatch.chdir(tmp_path)
    small = smaller(data.reviews.TASK, settings={"sft": dict(steps=5, batch_size=8)})
    monkeypatch.setattr(data.reviews, "TASK", small)

    def start(*flags, stop=99):
        def run_all(planned, folder, workers):
            for run in planned:
                if not is_finished(run):
                    if len(trained) >= stop:
                        return planned[:stop], True
                    reward_model.train(run.config)
                    trained.append(Path(run.config.out).name)
            return planned, False

        monkeypatch.setattr(scaling, "run_all", run_all)
        given = {"--sft": "runs/sft", "--out": "runs/scaling", "--pairs": str(pairs),
                 "--held-out": "20", "--counts": "12,500", "--sizes": "1x16,1x32", "--seeds": "1",
                 "--min-steps": "5", "--dataset": "reviews"}
        given |= dict(zip(flags[::2], flags[1::2]))  # None: without this flag; "": it has no value
        argv = [word for flag, value in given.items() if value is not None
                for word in (flag, value) if word]
        config = parse(scaling.Config, "", argv)
        scaling.main(config)
        if config.print:
            return []
        return read_jsonl(Path(config.out) / "results.jsonl", {"accuracy": float})
    start.trained, start.folder = trained, base / "scaling"
    return start


NAMES = ["1x16-12-seed0", "1x32-12-seed0", "1x16-60-seed0", "1x32-60-seed0"]


def test_a_sweep_stops_and_goes_on(sweep, capsys):
    """Ctrl-C leaves rows, table and figure of what is finished. Started again it trains the others,
    then nothing; one more seed, that seed alone. Other settings and another policy are named."""
    with pytest.raises(SystemExit, match="130"):
        sweep(stop=0)
    assert not (sweep.folder / "table.md").exists()
    with pytest.raises(SystemExit, match="130"):
        sweep(stop=1)
    assert len(read_jsonl(sweep.folder / "results.jsonl", {})) == 1 and sweep.trained == NAMES[:1]

    rows = sweep()
    assert sweep.trained == NAMES
    assert all(row["steps"] == 5 for row in rows)
    assert (sweep.folder.parent / "sft-1x16/model.pt").exists()  # beside the user's policy
    assert [f"{row['size']}-{row['count']}-seed{row['seed']}" for row in rows] == NAMES
    shown = capsys.readouterr().out
    assert "60 pairs of 20 prompts to train on, 60 pairs of 20 held out" in shown
    assert (sweep.folder / "table.md").read_text() in shown
    assert (sweep.folder / "scaling.png").stat().st_size > 20_000

    before = {path: path.stat().st_mtime_ns for path in sweep.folder.glob("*-seed*/*")}
    assert sweep() == rows and sweep.trained == NAMES
    assert before == {path: path.stat().st_mtime_ns for path in sweep.folder.glob("*-seed*/*")}
    assert sweep("--seeds", "2")[:4] == rows
    assert sweep.trained[4:] == [name.replace("seed0", "seed1") for name in NAMES]

    with pytest.raises(SystemExit, match="lr was 0.001, now 0.1: give another folder with --out"):
        sweep("--lr", "0.1")
    made = read_json_object(sweep.folder / "config.json")
    made["built_from"]["policy"] = "another"
    (sweep.folder / "config.json").write_text(json.dumps(made))
    with pytest.raises(SystemExit, match="policy was 'another', now"):
        sweep()


def test_the_printed_commands_make_what_the_sweep_makes(sweep, capsys):
    """stdout has them alone. Another start finds the runs finished, and makes the same rows."""
    sweep("--print", "")
    said = capsys.readouterr()
    assert "60 pairs of 20 prompts to train on" in said.err and not sweep.trained
    for line in said.out.splitlines():
        python, script, *flags = shlex.split(line)
        assert (python, Path(script).name) == (sys.executable, "reward_model.py")
        reward_model.train(parse(reward_model.Config, "", flags))
    rows = [{**row, "seconds": 0} for row in sweep()]
    assert not sweep.trained
    shutil.rmtree(sweep.folder)
    assert [{**row, "seconds": 0} for row in sweep()] == rows and sweep.trained == NAMES


def test_what_a_row_says(sweep, pairs):
    """The accuracies of a model that scores each response by itself, the loss on the scale it was
    trained on, the ceiling of noise-free labels, and the sizes; trained on the other prompts."""
    *_, found = sweep()
    folder, held = sweep.folder / "1x32-60-seed0", read_pairs(pairs)[-60:]
    model, _ = load_run(folder, ScalarModel)
    tokenizer = Tokenizer.load(folder / "tokenizer.tiktoken")

    def score(row, name):
        prompt, response = tokenizer.encode(row["prompt"]), tokenizer.encode(row[name])
        tokens = torch.tensor([[tokenizer.bos, *prompt, *response, tokenizer.eos]])
        return model(tokens)[0, -1].item()
    margins = [score(row, "chosen") - score(row, "rejected") for row in held]
    ties = [row["chosen_reward"] == row["rejected_reward"] for row in held]
    right = [margin > 0 for margin, tie in zip(margins, ties) if not tie]
    losses = [math.log1p(math.exp(-margin * model.std.item())) for margin in margins]
    assert found["accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 60)
    assert found["gold_accuracy"] == pytest.approx(sum(right) / len(right))
    assert found["ceiling"] == pytest.approx((60 - sum(ties) / 2) / 60)
    assert found["held_out_loss"] == pytest.approx(sum(losses) / 60, rel=1e-3)
    assert (found["count"], found["pairs"], found["held_out_pairs"]) == (60, 60, 60)
    assert (found["layers"], found["channels"], found["steps"]) == (1, 32, 5)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    trained = {row["prompt"] for row in read_pairs(sweep.folder / "pairs" / "60-seed0.jsonl")}
    assert len(trained) == 20 and not trained & {row["prompt"] for row in held}


def test_steps_are_counted_without_the_prompts_that_are_held_out():
    """reward_model.py holds out whole prompts: of 40 pairs, 3 a prompt, it trains on 37, not 38."""
    rows = [{"prompt": str(i // 3), "chosen": "a", "rejected": "b"} for i in range(40)]
    assert trained_on(rows) == 37


def test_policies_of_other_sizes_are_those_of_sft(sweep, small_reviews, tmp_path):
    """Beside a policy of the user's, as above; else where `python sft.py --n-layer 1 ...` puts them."""
    shutil.copytree(tmp_path / "runs/sft", tmp_path / "runs/reviews/sft")
    start = pipeline.load(Path("runs/reviews/sft"), "reviews", "cpu")
    policy = scaling.make_policy(scaling.Config(dataset="reviews"), start, "1x40")
    assert str(policy) == "runs/reviews/sft-nlayer1-nhead1-nembd40-blocksize112"
    model, _ = load_run(policy)
    assert (model.config.n_layer, model.config.n_embd, model.config.n_head) == (1, 40, 1)


def test_a_pretrained_model_has_one_size(sweep, monkeypatch):
    """SFT of such a task starts from it, whatever the size that is asked for."""
    start = pipeline.load(Path("runs/sft"), "reviews", "cpu")
    config = scaling.Config(dataset="reviews", sizes="1x32,1x64")
    assert scaling.check_sizes(config, start) == ["1x32", "1x64"]
    pretrained = smaller(data.reviews.TASK, settings={"sft pretrain": {}})
    monkeypatch.setattr(data.reviews, "TASK", pretrained)
    with pytest.raises(SystemExit, match="--sizes 1x32,1x64: .* pretrained model of 1x32"):
        scaling.check_sizes(config, start)


def test_quick_and_human_comparisons(sweep, pairs, tmp_path, monkeypatch):
    """One seed of the first and the last size. Pairs without rewards, and a file of held-out ones,
    of which one has a prompt of the others: nothing is said of a gold order, and that prompt is not
    trained on."""
    sizes = {**data.reviews.TASK.presets["cpu"].settings, "scaling": dict(sizes="1x16,9x99,1x32")}
    monkeypatch.setattr(data.reviews, "TASK", smaller(data.reviews.TASK, settings=sizes))
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")}
            for row in read_pairs(pairs)]
    write_jsonl(tmp_path / "train.jsonl", rows[:90])
    write_jsonl(tmp_path / "test.jsonl", rows[87:])
    found = sweep("--quick", "", "--pairs", "train.jsonl", "--test", "test.jsonl", "--counts", None,
                  "--seeds", None, "--sizes", None, "--held-out", None)
    assert sweep.trained == ["1x16-87-seed0", "1x32-87-seed0"]
    assert all((row["pairs"], row["held_out_pairs"]) == (87, 33) for row in found)
    assert not any("ceiling" in row for row in found)


def test_the_commands_that_are_printed_are_the_runs(tmp_path):
    """Typed into a shell each gives the very Config. 285 pairs are 8 batches, so 50 steps are 6.25
    passes; 2,850 are 89."""
    config = parse(scaling.Config, "", ["--out", str(tmp_path)])
    assert config.dataset == "posts" and config.sizes  # unlike the other scripts' reviews
    sets = {(seed, count): (tmp_path / f"{count}.jsonl", count * 95 // 100)
            for seed in (0, 1) for count in (300, 3000)}
    runs = plan(config, {"1x32": Path("a/sft-1x32"), "2x64": Path("a/sft")}, sets)
    for run in runs:
        assert parse(reward_model.Config, "", command(run.config)[1:]) == run.config
        assert run.config.epochs == {"300": 50 / 8, "3000": 1.0}[run.setting]
    assert len({run.config.out for run in runs}) == len(runs) == 8


def test_the_folder_is_named_by_what_makes_the_runs():
    """More seeds, sizes and counts add to a sweep; another learning rate is another one."""
    def out(*argv):
        return parse(scaling.Config, "", [*argv]).out
    more = ("--seeds", "1", "--sizes", "1x32", "--counts", "9", "--workers", "1")
    assert out("--print") == out()
    assert out(*more) == out() == "runs/posts/scaling"
    assert out("--quick") == "runs/posts/scaling-quick"
    assert out("--lr", "0.1", "--pairs", "a/b.jsonl") == "runs/posts/scaling-pairs-a-b-lr0.1"


# ---- mistakes ------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, line", [
    (["--counts", "300,"], "--counts 300,: expected numbers, 300,1000"),
    (["--counts", "0"], "--counts 0: expected numbers"),
    (["--sizes", "2"], "--sizes 2: expected layers x channels, 1x32,2x128"),
    (["--sizes", "1x8,"], "--sizes 1x8,: expected"), (["--sizes", "0x8"], "--sizes 0x8: expected"),
    (["--seeds", "0"], "--seeds 0"), (["--lr", "nan"], "--lr nan"),
    (["--seeds", "1000000000000"], "--seeds 1000000000000: must be below"),
    (["--pairs", None, "--test", "x.jsonl"], "--test: needs --pairs"),
    (["--print", "", "--workers", "2"], "--workers: not with --print"),
    (["--pairs", "no.jsonl"], "no.jsonl: no such pairs file"),
    (["--prompts", "9"], "--prompts: not with --pairs"),
    (["--test", "mine.jsonl"], "--held-out: not with --test"),
    (["--quick", ""], "--counts: not with --quick"),
    (["--quick", "", "--counts", None], "--sizes: not with --quick"),
    (["--quick", "", "--counts", None, "--sizes", None], "--seeds: not with --quick"),
    (["--quick", "", "--pairs", None, "--prompts", "9"], "--prompts: not with --quick"),
    (["--held-out", "40"], "40 prompts are held out, which leaves 0"),
    (["--test", "mine.jsonl", "--held-out", None], "40 prompts are held out, which leaves 0"),
    (["--out", "mine.jsonl/x"], "mine.jsonl/x: cannot be written"),
    (["--block-size", "9"], "mine.jsonl, line 1: 'chosen' does not fit")])
def test_a_mistake_is_one_line(sweep, pairs, flags, line):
    with pytest.raises(SystemExit) as stopped:
        sweep(*flags)
    said = str(stopped.value)
    assert said.startswith("error: ") and line in said and "\n" not in said
    assert not sweep.trained and not (pairs.parent / "runs/sft-1x16").exists()
