"""scaling.py: the sets of pairs, accuracy and its standard error, the table, and a small sweep that goes on where it was."""
import math
import random
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import reward_model
from experiments import scaling
import sft
from common.files import read_jsonl, write_jsonl
from common.settings import parse
from common.training import generator
from common.pairs import read_pairs
from data.reviews.grammar import gold_reward
from common.tokenizer import Tokenizer
from common.run import load_run
from model import ScalarModel
from experiments.scaling import accuracy, doublings, markdown, measure, over_seeds, plan, split, subset
from experiments.sweep import is_there


# ---- sets of pairs ---------------------------------------------------------------------------------------------------

def rows_of(*sizes):
    """Pairs of prompts "0", "1", ...: as many as `sizes` says, the prompts mixed."""
    rows = [{"prompt": str(i), "chosen": f"{i} {j}", "rejected": "no"} for i, size in enumerate(sizes) for j in range(size)]
    random.Random(0).shuffle(rows)
    return rows


def names(rows):
    return [row["chosen"] for row in rows]


def test_sets_are_nested_and_of_whole_prompts():
    """A set begins with every smaller one of its seed, and has all pairs of each of its prompts, at most one prompt more than
    the count asked for; another seed has other prompts."""
    rows = rows_of(*([1, 6, 3, 2] * 25))
    pool, held = split(rows, 10, [])
    size = {pairs[0]["prompt"]: len(pairs) for pairs in pool}
    for seed in (0, 1):
        smaller = []
        for count in (1, 20, 100, 150, sum(size.values())):
            found = subset(pool, count, seed)
            assert count <= len(found) < count + 6 and names(found)[:len(smaller)] == names(smaller)
            assert all(sum(row["prompt"] == prompt for row in found) == size[prompt]
                       for prompt in {row["prompt"] for row in found})
            smaller = found
        assert len(found) == sum(size.values()) == len(set(names(found)))
    assert names(subset(pool, 20, 0)) != names(subset(pool, 20, 1))


def test_no_prompt_is_on_both_sides():
    """The last prompts to appear are held out with all their pairs, or the prompts of a file of their own, which then leave
    the others; identical responses are no pair."""
    rows = rows_of(3, 3, 3, 3, 3) + [{"prompt": "0", "chosen": "same", "rejected": "same"}]
    order = list(dict.fromkeys(row["prompt"] for row in rows))
    for held_out, test in ((2, []), (9, [row for row in rows if row["prompt"] in order[3:]] + rows_of(0, 0, 0, 0, 0, 2))):
        pool, held = split(rows, held_out, test)
        assert [pairs[0]["prompt"] for pairs in pool] == order[:3]
        assert {pairs[0]["prompt"] for pairs in held} == {*order[3:], *(["5"] if test else [])}
        assert all(len({row["prompt"] for row in pairs}) == 1 for pairs in pool + held)
        assert sorted(names(sum(pool + held, []))) == sorted(names(rows_of(3, 3, 3, 3, 3, 2 if test else 0)))


# ---- accuracy and its error ------------------------------------------------------------------------------------------

def test_accuracy_by_hand():
    """Right, wrong and a tie of one prompt, right of another: 2.5 of 4; residuals -0.375 and 0.375 a prompt."""
    assert accuracy(torch.tensor([2.0, -1, 0, 0.1]), torch.tensor([7, 7, 7, 9])) == (
        0.625, pytest.approx(math.sqrt(2 / 1 * 2 * 0.375**2) / 4))
    assert math.isnan(accuracy(torch.tensor([1.0, -1]), torch.tensor([3, 3]))[1])  # one prompt has no error


def test_the_error_is_that_of_a_ratio_of_sums():
    """The definition, prompt by prompt; and what a bootstrap over 300 prompts of unequal size gives, within a tenth."""
    draw = generator(0)
    sizes = torch.randint(1, 8, (300,), generator=draw)
    prompts = torch.repeat_interleave(torch.arange(300), sizes)
    margins = torch.randn(len(prompts), generator=draw) + torch.randn(300, generator=draw)[prompts] + 0.5
    margins[::17] = 0
    mean, error = accuracy(margins, prompts)
    right = defaultdict(list)
    for prompt, margin in zip(prompts.tolist(), margins.tolist()):
        right[prompt].append(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0)
    total = sum(map(sum, right.values())) / len(prompts)
    residuals = [sum(own) - total * len(own) for own in right.values()]
    assert (mean, error) == (pytest.approx(total), pytest.approx(
        math.sqrt(sum(e * e for e in residuals) * 300 / 299) / len(prompts)))
    sums = torch.tensor([[sum(own), len(own)] for own in right.values()])
    drawn = sums[torch.randint(300, (2000, 300), generator=draw)].sum(1)
    assert (drawn[:, 0] / drawn[:, 1]).std().item() == pytest.approx(error, rel=0.1)
    assert error > 1.2 * accuracy(margins, torch.arange(len(margins)))[1]  # than if all pairs were independent


def test_identical_pairs_of_a_prompt_count_once():
    """Six copies of every pair say no more than one: the same error, that of a mean over prompts."""
    margins = torch.randn(50, generator=generator(1))
    once = accuracy(margins, torch.arange(50))
    six = accuracy(margins.repeat_interleave(6), torch.arange(50).repeat_interleave(6))
    assert once == pytest.approx(six)
    assert once[1] == pytest.approx((margins > 0).double().std().item() / math.sqrt(50))


def test_the_true_reward_scores_the_ceiling_and_a_constant_one_half():
    """The first has the labels' agreement with the gold order (equal rewards count half), and all of the gold order; the
    second half of both, exactly; the true reward turned round what is left."""
    draw = generator(2)
    gold = torch.randint(-3, 4, (600,), generator=draw) / 5
    prompts = torch.arange(100).repeat_interleave(6)
    true = measure(7 * gold, gold, prompts)
    assert true["accuracy"] == true["ceiling"] == pytest.approx(((gold > 0).sum() + 0.5 * (gold == 0).sum()).item() / 600)
    assert true["accuracy_se"] == true["ceiling_se"] and (true["gold_accuracy"], true["gold_accuracy_se"]) == (1, 0)
    constant = measure(torch.zeros(600), gold, prompts)
    assert [constant[name] for name in ("accuracy", "accuracy_se", "gold_accuracy", "gold_accuracy_se")] == [0.5, 0, 0.5, 0]
    turned = measure(-gold, gold, prompts)
    assert (turned["accuracy"], turned["gold_accuracy"]) == (pytest.approx(1 - true["ceiling"]), 0)
    assert measure(gold, None, prompts).keys() == {"accuracy", "accuracy_se"}


# ---- the table -------------------------------------------------------------------------------------------------------

def row(size, count, seed, accuracy, error=0.03, **more):
    parameters = {"1x8": 1000, "2x8": 4000}[size]
    return {"size": size, "parameters": parameters, "count": count, "pairs": count, "seed": seed, "accuracy": accuracy,
            "accuracy_se": error, **more}


def test_an_interval_has_prompts_and_seeds():
    """Two seeds 0.08 apart: 0.04 over seeds, 0.03 over prompts, 0.05 together; one seed has that over prompts."""
    assert over_seeds([row("1x8", 9, 0, 0.6), row("1x8", 9, 1, 0.68)], "accuracy") == (pytest.approx(0.64), pytest.approx(0.05))
    assert over_seeds([row("1x8", 9, 0, 0.6)], "accuracy") == (0.6, 0.03)


def test_what_doubling_adds():
    """An accuracy of 0.5 + 0.01 log2 pairs + 0.02 log2 parameters gives both back; one count says nothing of pairs."""
    rows = [row(size, count, seed, 0.5 + 0.01 * math.log2(count) + 0.02 * math.log2(p) + 0.1 * seed)
            for size, p in (("1x8", 1000), ("2x8", 4000)) for count in (64, 512) for seed in (0, 1)]
    found = doublings(rows)
    assert found == {"pairs": (pytest.approx(0.01), pytest.approx(0, abs=1e-9)),
                     "parameters": (pytest.approx(0.02), pytest.approx(0, abs=1e-9))}
    assert doublings([r for r in rows if r["count"] == 64]) == {}


def test_the_table():
    """A line a size, small ones first, a cell a count, empty where nothing is finished, and the ceiling."""
    gold = dict(gold_accuracy=0.75, gold_accuracy_se=0.01, ceiling=0.8, ceiling_se=0.02)
    text = markdown([row("2x8", 1000, 0, 0.7, **gold), row("1x8", 1000, 0, 0.65, **gold), row("1x8", 300, 0, 0.6, **gold)])
    labels, order, *_ = text.split("\n\n")
    assert labels.splitlines()[0] == "| right about the labels, % | parameters | 300 pairs | 1,000 pairs |"
    assert labels.splitlines()[2:] == ["| 1x8 | 1,000 | 60.0 ± 3.0 | 65.0 ± 3.0 |", "| 2x8 | 4,000 |  | 70.0 ± 3.0 |",
                                       "| **the true reward** |  | 80.0 ± 2.0 | 80.0 ± 2.0 |"]
    assert order.splitlines()[-1] == "| 2x8 | 4,000 |  | 75.0 ± 1.0 |"
    assert "gold" not in markdown([row("1x8", 300, 0, 0.6)]) and "true" not in markdown([row("1x8", 300, 0, 0.6)])


def test_the_figure_without_a_true_reward(tmp_path):
    """Chance and what people agree on take the ceiling's place; one size and one count are enough."""
    for name, dataset, rows in (("a", "tldr", [row("1x8", 300, 0, 0.6), row("1x8", 900, 0, 0.7), row("2x8", 300, 0, 0.7)]),
                                ("b", "reviews", [row("1x8", 300, 0, 0.6)])):
        (tmp_path / name).mkdir()
        scaling.draw(rows, dataset, tmp_path / name)
        assert (tmp_path / name / "scaling.png").stat().st_size > 15_000


# ---- a small sweep ---------------------------------------------------------------------------------------------------

@pytest.fixture
def pairs(tmp_path):
    """120 pairs of 40 prompts of the small task, labelled by the gold reward, which stands beside them."""
    rng, rows = random.Random(3), []
    for i in range(120):
        a, b = (" " + " ".join(rng.choices("a superb dull film plot good bad".split(), k=6)) + "." for _ in range(2))
        rejected, chosen = sorted((a, b), key=gold_reward)
        rows.append({"prompt": f"Film {i // 3} was", "chosen": chosen, "rejected": rejected,
                     "chosen_reward": gold_reward(chosen), "rejected_reward": gold_reward(rejected)})
    write_jsonl(tmp_path / "mine.jsonl", rows)
    return tmp_path / "mine.jsonl"


@pytest.fixture
def sweep(small_reviews, sft_run, pairs, tmp_path, monkeypatch):
    """sweep(*flags, stop=n): the rows of a sweep of two sizes and two counts, whose runs are trained in this process; Ctrl-C
    comes after n of them. sweep.trained has the names of the runs that were trained."""
    trained: list[str] = []
    base = shutil.copytree(sft_run, tmp_path / "runs" / "sft").parent
    monkeypatch.setitem(sft.Config.PRESETS, ("reviews", "cpu"), dict(steps=5, batch_size=8))

    def start(*flags, stop=99):
        def run_all(planned, workers, folder, weights):
            for run in [run for run in planned if not is_there(run, weights)]:
                if len(trained) >= stop:
                    raise KeyboardInterrupt
                reward_model.train(run.config)
                trained.append(Path(run.config.out).name)

        monkeypatch.setattr(scaling, "run_all", run_all)
        config = parse(scaling.Config, "", [
            "--dataset", "reviews", "--sft", str(base / "sft"), "--pairs", str(pairs), "--held-out", "20", "--counts", "12,500",
            "--sizes", "1x16,1x32", "--seeds", "1", "--min-steps", "5", *flags])
        scaling.main(config)
        return read_jsonl(Path(config.out) / "results.jsonl", {"accuracy": float})
    start.trained, start.folder = trained, base / "scaling"
    return start


def test_a_sweep_stops_and_goes_on(sweep, capsys):
    """Ctrl-C leaves rows, table and figure of what is finished. Started again it trains the others, then nothing; one more
    seed, that seed alone; other settings stop and are named, and so does another SFT policy."""
    with pytest.raises(SystemExit, match="130"):
        sweep(stop=1)
    names = ["1x16-12-seed0", "1x32-12-seed0", "1x16-60-seed0", "1x32-60-seed0"]
    assert len((sweep.folder / "results.jsonl").read_text().splitlines()) == 1 and sweep.trained == names[:1]
    rows = sweep()
    assert sweep.trained == names and [f"{row['size']}-{row['count']}-seed{row['seed']}" for row in rows] == names
    assert "60 pairs of 20 prompts to train on, 60 pairs of 20 held out" in (shown := capsys.readouterr().out)
    assert (sweep.folder / "table.md").read_text() in shown and (sweep.folder / "scaling.png").stat().st_size > 20_000
    before = {path: path.stat().st_mtime_ns for path in sweep.folder.glob("*-seed*/*")}
    assert sweep() == rows and sweep.trained == names
    assert before == {path: path.stat().st_mtime_ns for path in sweep.folder.glob("*-seed*/*")}
    assert sweep("--seeds", "2")[:4] == rows and sweep.trained[4:] == [name.replace("seed0", "seed1") for name in names]
    with pytest.raises(SystemExit, match="other settings: lr was 0.001, now 0.1: give another folder"):
        sweep("--lr", "0.1")
    torch.save({**(saved := torch.load(sweep.folder.parent / "sft/model.pt")),
                "model": {name: value + 1 for name, value in saved["model"].items()}}, sweep.folder.parent / "sft/model.pt")
    with pytest.raises(SystemExit, match="was made from another SFT policy"):
        sweep()


def test_what_a_row_says(sweep, pairs):
    """The accuracies of a model that scores each response by itself, the loss on the scale it was trained on, the ceiling of
    noise-free labels, and the sizes; trained on the file's other prompts."""
    *_, found = sweep()
    folder, held = sweep.folder / "1x32-60-seed0", read_pairs(pairs)[-60:]
    model, tokenizer = load_run(folder, ScalarModel)[0], Tokenizer.load(folder / "tokenizer.tiktoken")

    def score(row, name):
        ids = [tokenizer.bos] + tokenizer.encode(row["prompt"]) + tokenizer.encode(row[name]) + [tokenizer.eos]
        return model(torch.tensor([ids]))[0, -1].item()
    margins = [score(row, "chosen") - score(row, "rejected") for row in held]
    ties = [row["chosen_reward"] == row["rejected_reward"] for row in held]
    right = [margin > 0 for margin, tie in zip(margins, ties) if not tie]
    losses = [math.log1p(math.exp(-margin * model.std.item())) for margin in margins]
    assert found["accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 60)
    assert found["gold_accuracy"] == pytest.approx(sum(right) / len(right))
    assert found["ceiling"] == pytest.approx((60 - sum(ties) / 2) / 60)
    assert found["held_out_loss"] == pytest.approx(sum(losses) / 60, rel=1e-3)
    assert (found["count"], found["pairs"], found["held_out_pairs"], found["layers"], found["channels"]) == (60, 60, 60, 1, 32)
    assert found["parameters"] == sum(p.numel() for p in model.parameters()) and found["steps"] == 5
    trained = {row["prompt"] for row in read_pairs(sweep.folder / "pairs" / "60-seed0.jsonl")}
    assert len(trained) == 20 and not trained & {row["prompt"] for row in held}


def test_quick_and_human_comparisons(sweep, pairs, tmp_path):
    """One seed of the first and the last size, in another folder; pairs without rewards, and a file of held-out ones, of which
    one has a prompt of the others: nothing is said of a gold order, and that prompt is not trained on."""
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in read_pairs(pairs)]
    write_jsonl(tmp_path / "train.jsonl", rows[:90])
    write_jsonl(tmp_path / "test.jsonl", rows[87:])
    found = sweep("--quick", "--pairs", str(tmp_path / "train.jsonl"), "--test", str(tmp_path / "test.jsonl"),
                  "--counts", "500", "--seeds", "3", "--sizes", "1x16,9x99,1x32")
    assert sweep.trained == ["1x16-87-seed0", "1x32-87-seed0"] and not sweep.folder.exists()
    assert all((row["pairs"], row["held_out_pairs"]) == (87, 33) and "ceiling" not in row for row in found)


def test_the_commands_that_are_printed_are_the_runs(tmp_path):
    """Typed into a shell each gives the very Config. 285 pairs are 8 batches, so 50 steps are 6.25 passes; 2,850 are 89."""
    config = parse(scaling.Config, "", ["--out", str(tmp_path)])
    assert config.dataset == "posts" and config.sizes  # unlike the other scripts' reviews
    runs = plan(config, {"1x32": Path("a/sft-1x32"), "2x64": Path("a/sft")},
                {(seed, count): (tmp_path / f"{count}.jsonl", count) for seed in (0, 1) for count in (300, 3000)})
    for run in runs:
        assert parse(reward_model.Config, "", run.command()[1:]) == run.config
        assert run.config.epochs == {"300": 50 / 8, "3000": 1.0}[run.setting]
    assert len({run.config.out for run in runs}) == len(runs) == 8


# ---- mistakes --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, line", [
    (["--counts", "300,"], "--counts 300,: expected numbers, 300,1000"), (["--counts", "0"], "--counts 0: expected numbers"),
    (["--sizes", "2"], "--sizes 2: expected layers x channels, 1x32,2x128"), (["--sizes", "1x8,"], "--sizes 1x8,: expected"),
    (["--test", "x.jsonl"], "--test: needs --pairs"), (["--seeds", "0"], "--seeds 0"), (["--lr", "nan"], "--lr nan"),
    (["--pairs", "no.jsonl"], "no.jsonl: no such pairs file"),
    (["--held-out", "40"], "40 prompts are held out, which leaves 0"),
    (["--test", "MINE"], "40 prompts are held out, which leaves 0"),
    (["--block-size", "9"], "mine.jsonl, line 1: 'chosen' does not fit"), (["--sizes", "0x8"], "--n-layer 0")])
def test_a_mistake_is_one_line(sweep, pairs, flags, line):
    with pytest.raises(SystemExit) as stopped:
        sweep(*(str(pairs) if flag == "MINE" else flag for flag in flags), *(["--pairs", ""] if "x.jsonl" in flags else []))
    assert str(stopped.value).startswith("error: ") and line in str(stopped.value) and "\n" not in str(stopped.value)
    assert not sweep.trained
