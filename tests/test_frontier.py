"""frontier.py and sweep.py: what is read off a path, the table, the figure, what is run, and a whole sweep that is killed,
interrupted and started again. And bench.py: every line of it, at a tiny size.
"""
import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import clone
import dpo
import evaluate
from common import pipeline
from common.files import read_jsonl
from common.settings import parse, stop_like_ctrl_c
from common.statistics import mean_se
from experiments import bench, frontier, sweep
from experiments.frontier import best_at, by_method, envelope, markdown, plan, reward_at, table
from experiments.grids import Method
from experiments.sweep import PlannedRun
from test_faults import tree, wait_for

COMMITTED = clone.ROOT / "results"


# ---- what is read off the runs ---------------------------------------------------------------------------------------

def path(*points, lr_factor=1):
    return [{"kl": kl, "reward": reward, "lr_factor": lr_factor} for kl, reward in points]


@pytest.mark.parametrize("points, kl, reward", [
    ([(0, 0.5), (2, 0.7)], 1, 0.6), ([(0, 0.5), (2, 0.7)], 2, 0.7), ([(0, 0.5), (2, 0.7)], 0, 0.5),
    ([(0, 0.5), (2, 0.7)], 2.1, None), ([(0.1, 0.5), (2, 0.7)], 0, None), ([(1, 0.5)], 1, None), ([], 1, None),
    ([(0, 0.5), (2, 0.7), (1, 0.6), (4, 0.9)], 1.5, 0.65),  # crossed three times: upwards at last
    ([(0, 0.5), (4, 0.9), (2, 0.4)], 3, 0.65),  # and downwards
    ([(0, 0.5), (4, 0.9), (2, 0.4)], 1, 0.6),  # crossed once, early
    ([(0, 0.5), (2, 0.7), (2, 0.9)], 1, 0.6)])
def test_a_path_is_read_where_it_last_crosses(points, kl, reward):
    """Linearly between the two evaluations; a KL that was never passed has no reward."""
    assert reward_at(path(*points), kl) == (None if reward is None else pytest.approx(reward))


def test_the_best_setting_is_the_best_mean_of_those_that_all_seeds_brought_there():
    """With the standard error over seeds, which one seed does not have."""
    assert math.isnan(mean_se([2.0])[1])
    runs = {"one": {0: path((0, 0.5), (2, 0.8), lr_factor=4), 1: path((0, 0.5), (2, 0.6), lr_factor=4)},  # 0.65, 0.55 at 1
            "two": {0: path((0, 0.5), (2, 1.0), lr_factor=4), 1: path((0, 0.5), (2, 0.3), lr_factor=4)},  # 0.75, 0.4 at 1
            "three": {0: path((0, 0.5), (2, 1.0), lr_factor=4), 1: path((0, 0.5), (0.9, 1.0), lr_factor=4)}}  # never at 1
    assert best_at(runs, 1) == (pytest.approx(0.6), pytest.approx(0.05), "one")
    assert best_at(runs, 0.5).setting == "three" and best_at(runs, 3) is None


def test_between_settings_the_line_through_their_ends_counts():
    """From the reference through the ends by KL, seed by seed: at 2 nats 0.8 and 0.7, which no run's own path has. Runs at
    another learning rate are no part of it, whatever they are called."""
    runs = {"beta 1": {0: path((0, 0.5), (3, 0.4), (1, 0.7)), 1: path((0, 0.5), (1, 0.6))},
            "beta 0.1, lr 1": {0: path((0, 0.5), (2.5, 0.5), (3, 0.9)), 1: path((0, 0.5), (2.5, 0.5), (3, 0.8))},
            "beta 0.1, faster": {0: path((0, 0.5), (2, 0.1), lr_factor=4), 1: path((0, 0.5), (2, 0.1), lr_factor=4)}}
    assert best_at(runs, 2) == (pytest.approx(0.75), pytest.approx(0.05), "between settings")
    assert best_at(runs, 0.5) == (pytest.approx(0.575), pytest.approx(0.025), "between settings")


def test_committed_rows_have_no_lr_factor_and_can_be_read():
    """There the usual learning rate is the one that most settings of a method have."""
    rows = [json.loads(line) for line in (COMMITTED / "reviews/frontier/results.jsonl").read_text().splitlines()]
    assert "lr_factor" not in rows[0]
    factors = {(row["method"], row["setting"]): row["lr_factor"]
               for paths in by_method(rows).values() for seeds in paths.values() for run in seeds.values() for row in run}
    assert {setting: factor for (_, setting), factor in factors.items() if factor != 1} == {
        "beta 0.1, lr 5e-05": pytest.approx(0.25), "beta 0.1, lr 0.0008": pytest.approx(4),
        "beta 1, lr 5e-05": pytest.approx(0.25), "beta 1, lr 0.0008": pytest.approx(4)}
    again = frontier.with_lr_factor([{**row, "lr_factor": 7.0} for row in rows])  # rows that say it are believed
    assert {row["lr_factor"] for row in again} == {7.0}


def test_the_line_of_the_figure_never_falls():
    """At 3 nats only a bad setting passes, at 8 a good one: the line stays where it was at 2, error and all, and then rises."""
    runs = {"good": {0: path((0, 0.5), (2, 0.8), lr_factor=4), 1: path((0, 0.5), (2, 0.9), lr_factor=4)},
            "bad": {seed: path((0, 0.5), (5, 0.6), (8, 1.0), lr_factor=4) for seed in (0, 1)}}
    line = dict(envelope(runs, [0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 9.0]))
    assert list(line) == [0.0, 1.0, 2.0, 3.0, 5.0, 8.0]  # nothing was seen at 9
    assert line[3.0] == line[5.0] == line[2.0] == (pytest.approx(0.85), pytest.approx(0.05), "good")
    assert line[8.0].reward == 1 and best_at(runs, 5).reward == pytest.approx(0.6)


# ---- the table -------------------------------------------------------------------------------------------------------

def rows_of(method, setting, seed, points, **more):
    return [{"method": method, "setting": setting, "seed": seed, "step": step, "kl": kl, "reward": reward, "length": 9.0,
             "seconds": 60.0, "samples": 0, "reward_calls": 0, "lr": 1e-3, **more} for step, (kl, reward) in enumerate(points)]


@pytest.fixture(scope="module")
def bank():
    """256 responses to each of 200 prompts, with uniform rewards; the optimal curve ends between 2 and 4 nats."""
    rewards = torch.rand(200, 256, generator=torch.Generator().manual_seed(0))
    return evaluate.Bank([""] * 200, rewards, torch.full(rewards.shape, 9), [])


def test_shares_and_errors(bank):
    """The optimum's own points have the share 1 at every KL, points half as far above the reference a half; two seeds around
    them have half of their difference as standard error. Beyond the curve's end a share is an upper bound."""
    curve, ref = evaluate.optimal_curve(bank.rewards), bank.rewards.mean().item()
    points = [(p["kl"], p["reward"]) for p in curve]
    moved = lambda x: [(kl, r + x) for kl, r in [*points, (9.0, points[-1][1])]]  # noqa: E731
    halfway = [(kl, (r + ref) / 2) for kl, r in points]
    rows = []
    for setting in ("x", "y"):  # both the same, as one setting alone is not read at these KLs
        rows += rows_of("exact", setting, 0, points) + rows_of("half", setting, 0, halfway)
        rows += rows_of("two", setting, 0, moved(0.01)) + rows_of("two", setting, 1, moved(-0.03))
    exact, half, two, _ = table(rows, bank)
    for kl in frontier.KLS:
        reward, known = evaluate.optimal_reward(curve, kl)
        assert (kl in exact.at) == (kl in half.at) == two.at[kl].known == known == (kl < 4)
        if known:
            assert exact.at[kl].share == pytest.approx(1) and half.at[kl].share == pytest.approx(0.5)
            assert exact.at[kl].reward == pytest.approx(reward) and math.isnan(exact.at[kl].se)
        assert (two.at[kl].reward, two.at[kl].se) == (pytest.approx(reward - 0.01), pytest.approx(0.02))
        share, error = 1 - 0.01 / (reward - ref), 0.02 / (reward - ref)
        assert (two.at[kl].share, two.at[kl].share_se) == (pytest.approx(share), pytest.approx(error))


def test_best_of_n_stands_at_the_largest_n_whose_bound_fits(bank):
    """log n - (n-1)/n is 0.958 at 6, 1.089 at 7, 1.997 at 19 and 2.046 at 20; 4 nats need more than a quarter of the bank. The
    best of n uniform rewards is n / (n + 1), and hardly less than the optimum."""
    *_, best = table(rows_of("any", "x", 0, [(0.0, 0.5), (1.0, 0.6)]), bank)
    assert best.kind == "best of n" and list(best.at) == [1, 2]
    for kl, n in ((1, 6), (2, 19)):
        assert abs(best.at[kl].reward - n / (n + 1)) < 4 * best.at[kl].se < 0.01
        assert best.at[kl].share == pytest.approx(0.97, abs=0.04)


def test_the_largest_reward_is_of_the_setting_that_ends_best(bank):
    """Its mean over seeds, with KL, length and cost of the same runs; not the best evaluation on the way. Of the seconds it is
    the median: a machine that slept through one run made that run's method look four times as slow as it is."""
    cost = dict(samples=512, reward_calls=99)
    rows = [row for setting, seed, end, more in (
        ("low", 0, (2.0, 0.6), {}), ("low", 1, (2.0, 0.7), {}), ("low", 2, (2.0, 0.65), {}),
        ("high", 0, (3.0, 0.8), dict(**cost, seconds=10.0, length=20.0)),
        ("high", 1, (5.0, 0.7), dict(**cost, seconds=30.0, length=22.0)),
        ("high", 2, (4.0, 0.75), dict(**cost, seconds=1038.0, length=21.0)))
            for row in rows_of("m", setting, seed, [(0.0, 0.5), (1.0, 0.99), end], **more)]
    line, _ = table(rows, bank)
    assert (line.kind, line.name, line.setting, line.seconds) == ("method", "m", "high", 30)
    expected = dict(kl=4, kl_se=1 / math.sqrt(3), length=21, samples=512, reward_calls=99)
    assert {name: getattr(line, name) for name in expected} == pytest.approx(expected)
    assert (line.end.reward, line.end.se) == (pytest.approx(0.75), pytest.approx(0.05 / math.sqrt(3)))
    ref = bank.rewards.mean().item()
    share, known = evaluate.share_of_optimum(evaluate.optimal_curve(bank.rewards), 0.75, 4.0, ref)
    assert (line.end.share, line.end.known) == (pytest.approx(share), known)  # at the KL where it ends


def two_settings(method, higher):
    """Rows of two seeds of two settings; the better one rises from 0.5 to 0.8 at 3 nats, and all by `higher`."""
    return [row for seed, x in ((0, higher - 0.03), (1, higher + 0.03)) for setting, end in (("beta 1", 0.8), ("beta 9", 0.6))
            for row in rows_of(method, setting, seed, [(0.0, 0.5 + x), (3.0, end + x)])]


def test_the_table_in_markdown_and_the_papers_claim(bank):
    """As many cells in every line, numbers with their errors; DPO - PPO with the error of both."""
    lines = table(two_settings("DPO", 0.0) + two_settings("PPO", 0.05), bank)
    text = markdown(lines, bank).splitlines()
    assert len(text) == 2 + 3 + 1 and len({line.count("|") for line in text}) == 1
    assert text[2].startswith(f"| DPO | 0.600 ± 0.030 ({lines[0].at[1].share:.0%} ± ")
    end = lines[0].end
    assert (f" | 0.800 ± 0.030 (beta 1) | 3.00 ± 0.00 ({'' if end.known else '≤ '}{end.share:.0%} ± "
            f"{100 * end.share_se:.0f}) | 9.0 | 60 | 0 | 0 |") in text[2]
    assert text[-1].startswith("| **optimum** | ") and text[-1].count("≥") == 2  # at 4 and 8 nats
    assert frontier.compare(lines) == "DPO - PPO at 1 nats: -0.050 ± 0.042\nDPO - PPO at 2 nats: -0.050 ± 0.042\n"


def test_a_method_with_one_setting_is_not_read_on_its_way(bank):
    """A run that ends at 3 nats passes 1 nat far below what a run made for 1 nat has. In the table it has its end alone, and
    DPO is compared with nothing. Where all methods are like this there are no columns for the KLs."""
    one = [row for seed in (0, 1) for row in rows_of("PPO", "beta 1", seed, [(0.0, 0.5), (3.0, 0.8)])]
    lines = table(two_settings("DPO", 0.0) + one, bank)
    assert list(lines[0].at) == [1, 2] and not lines[1].at and frontier.compare(lines) == ""
    text = markdown(lines, bank).splitlines()
    assert text[3].startswith("| PPO |  |  |  |  | 0.800 ± 0.000 (beta 1) | ") and "at 1 nat " in text[0]
    text = markdown(table(one, bank), bank).splitlines()
    assert text[0] == "| | largest reward | its KL | length | seconds | sampled | scored |"
    assert [line.split(" | ")[0] for line in text[2:]] == ["| PPO", "| **optimum**"]
    assert len({line.count("|") for line in text}) == 1


@pytest.mark.parametrize("grid", ["reviews/frontier", "reviews/frontier-why", "reviews/frontier-ablation", "imdb/frontier"])
def test_the_committed_table_is_that_of_the_committed_rows(grid, bank):
    """Up to the shares, which need the bank. (This bank is another.)"""
    rows = [json.loads(line) for line in (COMMITTED / grid / "results.jsonl").read_text().splitlines()]
    lines = table(rows, bank)
    text, comparison = markdown(lines, bank), frontier.compare(lines)
    methods = dict.fromkeys(row["method"] for row in rows)
    numbers = lambda text: [[cell.split(" (")[0] for cell in line.split(" | ")] for line in text.splitlines()  # noqa: E731
                            if line.startswith(tuple(f"| {method} |" for method in methods))]
    committed = (COMMITTED / grid / "table.md").read_text()
    assert numbers(text) == numbers(committed) and len(numbers(text)) == len(methods)
    assert committed.endswith(comparison) and ("DPO -" in committed) == bool(comparison)


@pytest.mark.parametrize("grid", frontier.GRIDS)
def test_every_grid_can_be_drawn(grid, bank, tmp_path):
    """All its methods, two seeds of each, DPO at two learning rates."""
    rows = [row for method in frontier.GRIDS[grid] for seed in (0, 1) for lr in (1e-4, 1e-3)
            for row in rows_of(method, f"lr {lr}", seed, [(0.1, 0.5), (2.0 + seed, 0.75)], beta=0.5, lr=lr, last=True)]
    frontier.draw(rows, bank, "reviews", tmp_path)
    assert (tmp_path / "frontier.png").stat().st_size > 20_000
    assert "<svg" in (tmp_path / "frontier.svg").read_text()[:500]


# ---- what is run -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
@pytest.mark.parametrize("task", [("reviews", "cpu"), ("imdb", "cpu"), ("imdb", "gpu")], ids=" ".join)
@pytest.mark.parametrize("grid", frontier.GRIDS)
def test_the_command_that_is_printed_is_the_run_that_is_planned(grid, task, quick):
    """Typed into a shell it gives the very Config, default for default; and no two runs share a folder or a name."""
    config = frontier.Config(*task, grid=grid, quick=quick)
    runs = plan(config)
    for run in runs:
        script, *flags = sweep.command(run.config)
        module = importlib.import_module(script.removesuffix(".py"))
        assert parse(module.Config, "", flags) == run.config
        typed = sweep.typed(run.config).split()
        assert typed[:2] == ["python", script] and not {"--out", "--resume"} & set(typed)
        assert run.config.resume and run.config.evaluate_every
        assert (run.config.dataset, run.config.preset, run.config.seed) == (*task, run.seed)
    assert len({run.config.out for run in runs}) == len({run[:3] for run in runs}) == len(runs) > 0
    assert len(runs) == sum(method.quick if quick else len(method.commands) for method in frontier.GRIDS[grid].values()) * (
        1 if quick else config.seeds)


def test_the_grid_holds_the_papers():
    """Section 6.1 of the DPO paper, three seeds of each; --quick is one seed of some of it, in another folder."""
    runs, few = plan(frontier.Config()), plan(frontier.Config(quick=True))
    for method, field, fixed, papers in (
            ("DPO", "beta", dict(loss="dpo", lr=dpo.Config().lr), {0.05, 0.1, 1, 5}),
            ("Unlikelihood", "alpha", dict(loss="unlikelihood"), {0.05, 0.1, 0.5, 1}),
            ("PPO", "target_kl", dict(reward="model"), {3, 6, 9, 12}),
            ("PPO-GT", "target_kl", dict(reward="gold"), {3, 6, 9, 12}),
            ("Preferred-FT", "on", {}, {"chosen"})):
        own = [run for run in runs if run.method == method]
        assert {getattr(run.config, field) for run in own if vars(run.config).items() >= fixed.items()} >= papers
        assert {run[1:3] for run in own} == {(run.setting, seed) for run in own for seed in (0, 1, 2)}
        assert any(run.method == method for run in few)
    assert {run[:3] for run in few} < {run[:3] for run in runs} and {run.seed for run in few} == {0}
    assert not {run.config.out for run in few} & {run.config.out for run in runs}


def test_settings_are_called_as_in_the_committed_rows():
    """So that old rows and new ones can stand in one table. REINFORCE without a baseline is newer than the rows."""
    for grid, folder in (("paper", "frontier"), ("why", "frontier-why"), ("ablation", "frontier-ablation")):
        rows = [json.loads(line) for line in (COMMITTED / "reviews" / folder / "results.jsonl").read_text().splitlines()]
        runs = [run for run in plan(frontier.Config(grid=grid)) if run.method != "REINFORCE, no baseline"]
        assert {(row["method"], row["setting"], row["seed"]) for row in rows} == {run[:3] for run in runs}
        lrs = {(row["method"], row["setting"]): row["lr"] for row in rows}
        assert all(run.config.lr == pytest.approx(lrs[run[:2]]) for run in runs)


def test_reinforce_is_its_own_script_and_ten_times_the_pairs_are_the_tasks():
    """reinforce.py where there is no value network, and prompts as a multiple of what the task says."""
    runs = {run.method: run.config for run in plan(frontier.Config(grid="ablation", seeds=1))}
    baselines = {method: config.baseline for method, config in runs.items() if sweep.command(config)[0] == "reinforce.py"}
    assert baselines == {"REINFORCE, no baseline": "none", "REINFORCE, leave-one-out": "leave-one-out"}
    assert all(config.reward == "gold" and config.beta == 0.15 for config in runs.values())
    why = {run.method: run.config for run in plan(frontier.Config(grid="why", seeds=1))}
    assert why["DPO, 10x pairs"].prompts == why["PPO, 10x pairs"].prompts == 16_000 and why["DPO"].prompts == 0


def test_a_folder_is_named_by_all_settings(monkeypatch):
    """A change of the grid is another folder, and never a run that is there with other settings."""
    def folder(flags):
        monkeypatch.setitem(frontier.GRIDS, "paper", {"DPO, new": Method([f"dpo.py {flags}"])})
        return Path(plan(frontier.Config(seeds=1))[0].config.out)

    assert folder("--beta 0.1") == Path("runs/reviews/frontier/dpo-new-beta0.1-seed0")
    assert folder("--label-smoothing 0.2 --beta 0.1").name == "dpo-new-labelsmoothing0.2-beta0.1-seed0"
    assert folder("--beta 0.1 --prompts x10").name == "dpo-new-beta0.1-prompts16000-seed0"
    assert folder("--evaluate-every 7 --beta=0.1") == folder("--beta 0.1")  # this changes no result


def grid_file(folder, methods) -> str:
    (folder / "own.json").write_text(methods if isinstance(methods, str) else json.dumps(methods))
    (folder / "mine.py").write_text("def f(c, r, beta, *lengths):\n    return (1 - c + r) ** 2\n")
    return str(folder / "own.json")


def test_a_grid_of_ones_own(tmp_path, monkeypatch):
    """A method is a list of commands as one types them; a setting is called by what its method's commands do not have in common,
    and by beta. x4 is four times what the task says. --quick runs the first of each method."""
    monkeypatch.chdir(tmp_path)
    grid_file(tmp_path, {"Mine, I": ["dpo.py --loss mine.py:f --beta 0.5"], "Identity": [
        "dpo.py --loss ipo --beta 0.03", "python dpo.py --beta=0.1 --loss ipo --lr x4 --evaluate-every 9"]})
    config = parse(frontier.Config, "", "--grid own.json --seeds 2 --sft a/policy".split())
    runs = plan(config)
    assert [run[:3] for run in runs[:3]] == [("Mine, I", "beta 0.5", 0), ("Identity", "beta 0.03", 0),
                                             ("Identity", "beta 0.1, lr 0.0008", 0)]
    assert [run.seed for run in runs] == [0, 0, 0, 1, 1, 1]
    assert [run.config.loss for run in runs[:3]] == ["mine.py:f", "ipo", "ipo"] and runs[2].config.lr == 4 * dpo.Config().lr
    assert {run.config.sft for run in runs} == {"a/policy"}
    assert runs[2].config.evaluate_every == 9 != runs[1].config.evaluate_every
    assert [Path(run.config.out) for run in runs[:3]] == [Path("a/policy/frontier-own") / name for name in (
        "mine-i-loss-mine.py-f-beta0.5-seed0", "identity-loss-ipo-beta0.03-seed0", "identity-beta0.1-loss-ipo-lr0.0008-seed0")]
    few = plan(parse(frontier.Config, "", ["--grid", "own.json", "--quick"]))
    assert [run[:3] for run in few] == [run[:3] for run in runs[:2]]


def test_the_grid_of_the_page_can_be_planned(tmp_path, monkeypatch):
    """docs: "On the frontier", with the loss of the section above it; and the runs that it draws are called as it says."""
    pages = [path.read_text() for path in (clone.ROOT / "docs").rglob("*.md")]
    page = next(text for text in pages if "## On the frontier" in text)
    section = page.split("## On the frontier")[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "methods.json").write_text(re.search(r"```json\n(.*?)```", section, re.S)[1])
    (tmp_path / "mine.py").write_text(re.search(r"```python\n(.*?)```", page.split("## A loss of your own")[1], re.S)[1])
    flags = shlex.split(re.search(r"frontier.py (--grid .*)", section)[1])
    runs = plan(parse(frontier.Config, "", flags))
    assert [(run.method, run.setting) for run in runs] == [
        ("DPO", "beta 0.1"), ("IPO", "beta 0.03"), ("per token", "beta 4"), ("DPO", "beta 1"), ("IPO", "beta 0.1"),
        ("IPO", "beta 0.1, lr 0.0008")]
    assert Path(runs[0].config.out).parent.name == "frontier-methods" and "frontier-methods/" in section
    assert all(dpo.Config(loss="ipo", beta=beta).out in section for beta in (0.03, 0.1))


@pytest.mark.parametrize("methods, line", [
    ("{", ": not JSON ("), ('{"a": [], "a": []}', ": not JSON (the key 'a' is there twice)"), ([1], ": expected a JSON object"), ({}, ": no method in it"),
    ({"a": "dpo.py"}, ", a: expected a list"),
    ({"a": []}, ", a: expected a list of commands"), ({"a": [["dpo.py"]]}, ", a: expected a list of commands"),
    ({"a": ["dpo.py"], "b": ["dpo.py --beta '1"]}, """, b, "dpo.py --beta '1": No closing quotation"""),
    ({"a": ["bt.py"]}, ", a, 'bt.py': 'bt.py': expected one of sft.py, dpo.py, reinforce.py, ppo.py, vargrad.py"),
    ({"a": [""]}, ", a, '': '': expected one of"),
    ({"a": ["dpo.py --bet 1"]}, ", a, 'dpo.py --bet 1': unrecognized arguments: --bet"),
    ({"a": ["dpo.py", "dpo.py --beta -1"]}, ", a, 'dpo.py --beta -1': --beta -1.0: must be > 0"),
    ({"a": ["dpo.py --beta 1 2"]}, ", a, 'dpo.py --beta 1 2': argument --beta: invalid float value"),
    ({"a": ["dpo.py new --beta 1"]}, ", a, 'dpo.py new --beta 1': unrecognized arguments: "),
    ({"a": ["dpo.py --lr xx"]}, ", a, 'dpo.py --lr xx': argument --lr: invalid float value: 'xx'"),
    ({"a": ["dpo.py --help"]}, ", a, 'dpo.py --help': --help: is the same for all runs"),
    ({"a": ["dpo.py --seed 3"]}, ", a, 'dpo.py --seed 3': --seed: is the same for all runs, and given to the sweep"),
    ({"a": ["dpo.py --loss ipoo"]}, ", a, 'dpo.py --loss ipoo': --loss 'ipoo': expected dpo, ipo, unlikelihood or FILE.py"),
    ({"a": ["ppo.py --reward mine.py:g"]}, ", a, 'ppo.py --reward mine.py:g': --reward mine.py:g: mine.py has no function 'g'"),
    ({"a": ["dpo.py --pairs none.jsonl"]}, ", a, 'dpo.py --pairs none.jsonl': none.jsonl: no such pairs file"),
    ({"a": ["dpo.py --loss mine.py:g"]}, ", a, 'dpo.py --loss mine.py:g': --loss mine.py:g: mine.py has no function 'g'"),
    ({"a": ["sft.py"]}, ", a, 'sft.py': --evaluate-every: needs --on chosen"),
    ({"A b": ["ppo.py"], "a-b": ["ppo.py"]}, ", a-b, 'ppo.py': another command has the same settings")])
def test_a_mistake_in_a_grid_names_file_method_and_command(methods, line, tmp_path, root, monkeypatch):
    grid_file(tmp_path, methods)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = tree(tmp_path)
    said = clone.run_here(root, tmp_path, "experiments/frontier", "--grid", "own.json")
    assert isinstance(said, str) and said.removeprefix("error: ").removeprefix("--grid ").startswith("own.json" + line), said
    assert "\n" not in said and tree(tmp_path) == before


@pytest.mark.parametrize("grid", frontier.GRIDS)
def test_a_sweep_can_be_stopped_anywhere(grid):
    """The first seed first, of it the runs of --quick; then every method is served before one gets its next setting."""
    runs, few = plan(frontier.Config(grid=grid)), plan(frontier.Config(grid=grid, quick=True))
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert [run[:3] for run in runs[:len(few)]] == [run[:3] for run in few]
    rest = [run.method for run in runs[len(few):] if run.seed == 0]
    for stop in range(len(rest)):
        started = {method: rest[:stop].count(method) for method in rest if rest[:stop].count(method) < rest.count(method)}
        assert max(started.values()) - min(started.values()) <= 1


def test_every_method_starts_from_the_policy_that_is_named():
    """--sft mine/policy: Preferred-FT, too; and the sweep is in its folder, where its pairs and its bank are."""
    for run in plan(frontier.Config(sft="mine/policy", seeds=1)):
        assert (run.config.init if run.method == "Preferred-FT" else run.config.sft) == "mine/policy", run.method
        assert Path(run.config.out).parent == Path("mine/policy/frontier")
    assert frontier.Config(sft="runs/imdb/sft", grid="why").out == str(Path("runs/imdb/frontier-why"))


@pytest.mark.parametrize("flags, line", [
    ("--quick --seeds 2", "--seeds: not with --quick, which runs one seed"),
    ("--seeds 0", "--seeds 0: must be > 0"), ("--workers -1", "--workers -1: must be >= 0"),
    ("--dataset nope", "--dataset nope: there is no data/nope"),
    ("--print --workers 2", "--workers: not with --print, which runs nothing"),
    ("--preset gpu", "--preset gpu: data/reviews has no such preset"), ("--grid nope.json", "nope.json: no such file"),
    ("--grid nope", "--grid nope: expected paper, why, ablation or FILE.json"), ("--grid why.json", "--grid why.json: expected"),
    ("--draw run --print", "--draw: not with --print"), ("--draw run", "--draw run: no finished run there (no model.pt)"),
    ("--out afile/output", "afile/output: cannot be written (")])
def test_a_mistake_is_one_line_before_anything_is_built(flags, line, root, tmp_path):
    """A folder that cannot be written is no news for the end of an hour."""
    (tmp_path / "afile").touch()
    said = clone.run_here(root, tmp_path, "experiments/frontier", *flags.split())
    assert isinstance(said, str) and said.startswith(f"error: {line}") and "\n" not in said
    assert os.listdir(tmp_path) == ["afile"]


# ---- processes -------------------------------------------------------------------------------------------------------

STUB = """
import json, os, pathlib, signal, sys, time
seed, out = (sys.argv[sys.argv.index(flag) + 1] if flag in sys.argv else "0" for flag in ("--seed", "--out"))
folder = pathlib.Path(out)
folder.mkdir(parents=True)
print("threads", os.environ["OMP_NUM_THREADS"], "hears Ctrl-C", callable(signal.getsignal(signal.SIGINT)), flush=True)
def stop(*_):
    (folder / "stopped").touch()
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
(folder / "began").touch()
while seed == "1" and not list(folder.parent.glob("0/began")):
    time.sleep(0.01)
if seed == "1":
    sys.exit("step 7\\rerror: it is broken")
time.sleep(60 if seed == "0" else 0.3)
(folder / "config.json").write_text(json.dumps({"seed": int(seed)}))
(folder / "log.jsonl").write_text('{"step": 9, "seconds": 1.0}')
(folder / "model.pt").write_text("weights")
(folder / "ended").touch()
"""


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """stubs(*seeds): runs of a script that takes no time to start. Seed 0 takes for ever, seed 1 fails, the others end."""
    (tmp_path / "dpo.py").write_text(STUB)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    return lambda *seeds: [PlannedRun("DPO", "x", seed, dpo.Config(out=str(tmp_path / f"runs/{seed}"), seed=seed))
                           for seed in seeds]


def test_as_many_runs_at_a_time_as_there_are_workers(stubs, tmp_path, capsys):
    """Two of five at a time, with one thread each; every command is printed, and what a run prints is in a file. They can hear
    Ctrl-C even where a shell script has started the sweep in the background, with Ctrl-C ignored."""
    runs = stubs(2, 3, 4, 5, 6)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert sweep.run_all(runs, tmp_path, 2) == (runs, False)
    change = {"began": 1, "ended": -1}
    times = sorted((file.stat().st_mtime_ns, change[name]) for name in change for file in tmp_path.glob(f"runs/*/{name}"))
    running = [sum(change for _, change in times[:i + 1]) for i in range(len(times))]
    assert len(times) == 10 and max(running) == 2 and running[-1] == 0
    assert [(tmp_path / f"output/{seed}.txt").read_text() for seed in (2, 6)] == ["threads 1 hears Ctrl-C True\n"] * 2
    shown = capsys.readouterr().out
    assert shown.startswith("5 runs, 0 of them finished; 2 at a time\n") and shown.count("] python dpo.py --seed ") == 5
    assert "[5/5, 0 min] python dpo.py --seed 6\n" in shown
    sweep.run_all(runs, tmp_path)
    workers = 1 if torch.cuda.is_available() else os.cpu_count()
    assert capsys.readouterr().out == f"5 runs, 5 of them finished; {workers} at a time\n"


def test_a_run_that_fails_stops_the_sweep_in_one_line(stubs, tmp_path):
    """With the command and the last line that it said; the run beside it may save itself first, the next is not begun."""
    with pytest.raises(SystemExit) as stop:
        sweep.run_all(stubs(0, 1, 2), tmp_path, 2)
    assert str(stop.value) == (f"error: python dpo.py --seed 1: error: it is broken (all of it: {tmp_path / 'output/1.txt'})")
    assert sorted(os.listdir(tmp_path / "runs/0")) == ["began", "stopped"] and not (tmp_path / "runs/2").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_finished_comes_back_when_the_sweep_is_stopped(number, stubs, tmp_path, capsys):
    """The runs that are not may save themselves first."""
    def stopped(runs):
        began = tmp_path / f"runs/{runs[-1].seed}/began"

        def press() -> None:
            while not began.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), number)
        thread = threading.Thread(target=press)
        thread.start()
        try:
            return sweep.run_all(runs, tmp_path, 1)
        finally:
            thread.join()

    stop_like_ctrl_c()
    assert stopped(stubs(0)) == ([], True)
    assert sorted(os.listdir(tmp_path / "runs/0")) == ["began", "stopped"]
    shutil.rmtree(tmp_path / "runs/0")
    runs = stubs(2, 0)
    assert stopped(runs) == (runs[:1], True)
    assert sorted(os.listdir(tmp_path / "runs/0")) == ["began", "stopped"]
    assert "\nstopped: 1 of 2 runs are finished; the same command goes on with the others\n" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="SIGUSR1 plays Ctrl-Break")
def test_runs_stop_on_windows_too(stubs, tmp_path, monkeypatch):
    """There a run is in a process group of its own, and Ctrl-Break stops it. Here SIGUSR1 plays Ctrl-Break, and Popen must be
    asked for nothing that Windows has not."""
    (tmp_path / "dpo.py").write_text(STUB.replace("signal.signal(signal.SIGINT", "signal.signal(signal.SIGUSR1"))
    popen, asked = subprocess.Popen, []

    def windows_popen(command, *, stdin, stdout, stderr, env, creationflags):
        asked.append(creationflags)
        return popen(command, stdin=stdin, stdout=stdout, stderr=stderr, env=env)
    monkeypatch.setattr(sweep, "WINDOWS", True)
    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0x200, raising=False)
    monkeypatch.setattr(signal, "CTRL_BREAK_EVENT", signal.SIGUSR1, raising=False)
    monkeypatch.setattr(subprocess, "Popen", windows_popen)
    with pytest.raises(SystemExit, match="error: it is broken"):
        sweep.run_all(stubs(0, 1), tmp_path, 2)
    assert asked == [0x200, 0x200] and sorted(os.listdir(tmp_path / "runs/0")) == ["began", "stopped"]


# ---- a whole sweep ---------------------------------------------------------------------------------------------------

# one tiny run a method; with --checkpoint-every 0 there is a checkpoint whenever it is stopped
TINY = "--batch-size 8 --warmup 2 --checkpoint-every 0 --evaluate-every"
DPO, PPO = f"dpo.py --epochs 0.5 {TINY} 30", f"ppo.py --target-kl 1 --steps 6 {TINY} 6 --batch-size 16"
SMALL = {"Preferred-FT": f"sft.py --on chosen --steps 24 {TINY} 12", "DPO": f"{DPO} --lr x4", "PPO-GT": f"{PPO} --reward gold",
         "Unlikelihood": f"{DPO} --loss unlikelihood", "PPO": PPO}
ARGUMENTS = "--sft runs/reviews/sft --seeds 1 --workers 1".split()
SWEPT = Path("runs/reviews/frontier")


class Here:
    """In place of subprocess.Popen: the script runs in this process, which spares it the import of torch."""

    def __init__(self, command, **_):
        self.returncode = clone.run_here(Path(command[1]).parent, Path.cwd(), Path(command[1]).stem, *command[2:])

    def poll(self) -> int:
        return self.returncode


def nothing(*_, **__):
    pytest.fail("a run was started")


def run_sweep(root: Path, cwd: Path, popen=Here, small=SMALL, arguments=ARGUMENTS) -> int | str | None:
    """A sweep of these methods in this process; 0, or the message that it stops with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "ROOT", root)
        patch.setattr(subprocess, "Popen", popen)
        patch.setattr(time, "sleep", lambda _: None)
        patch.setitem(frontier.GRIDS, "paper", {name: Method([command]) for name, command in small.items()})
        return clone.run_here(root, cwd, "experiments/frontier", *arguments)


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory) -> Path:
    """A working folder with an SFT policy, all that the runs share, and a sweep that nothing disturbed."""
    cwd = tmp_path_factory.mktemp("alone")
    # trained for so long that it samples no <bos> and no pad, which no pair may have in it
    assert clone.run_here(root, cwd, "sft", *clone.SFT, "--steps", "200", "--block-size", "40") == 0
    assert run_sweep(root, cwd) == 0
    return cwd


@pytest.fixture
def fresh(alone, tmp_path) -> Path:
    """The same without the sweep."""
    shutil.copytree(alone / "runs/reviews", tmp_path / "runs/reviews", ignore=shutil.ignore_patterns("frontier"))
    return tmp_path


def results(cwd: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in ("seconds", "line")}
            for row in read_jsonl(cwd / SWEPT / "results.jsonl", {"method": str, "seconds": float})]


def test_a_sweep_leaves_tidy_rows_a_table_and_a_figure(alone):
    """One row an evaluation: every quantity a number, the first at the reference, the last marked."""
    rows = results(alone)
    for row in rows:
        assert row.keys() >= {"method", "setting", "last", "beta"} and row["setting"] and row["seed"] == 0
        assert all(math.isfinite(row[name]) for name in ("step", "reward", "reward_se", "kl", "kl_se", "length", "length_se",
                                                         "lr", "lr_factor", "samples", "reward_calls")), row
        assert 0 <= row["reward"] <= 1 and row["length"] > 0 and (row["step"] or abs(row["kl"]) < 1e-4)
    steps = {method: [row["step"] for row in rows if row["method"] == method] for method in SMALL}
    assert list(by_method(rows)) == list(SMALL) and steps["Preferred-FT"] == [0, 12, 24] and steps["PPO"] == [0, 6]
    assert [row["step"] for row in rows if row["last"]] == [found[-1] for found in steps.values()]
    assert {row["method"]: (row["samples"], row["reward_calls"]) for row in rows}["PPO-GT"] == (96, 96)
    assert {(row["lr"], row["lr_factor"]) for row in rows if row["method"] == "DPO"} == {(4 * dpo.Config().lr, 4)}
    assert {row["lr_factor"] for row in rows if row["method"] != "DPO"} == {1}
    text = (alone / SWEPT / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in text[2:]] == [f"| {name}" for name in (*SMALL, "**optimum**")]
    assert (alone / SWEPT / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_finished_is_not_run_again(root, alone):
    """A second start makes rows and table of what is there, the same as before, and touches nothing else."""
    made = ("results.jsonl", "table.md", "frontier.png", "frontier.svg")
    rest = lambda: {name: file for name, file in tree(alone).items() if not name.endswith(made)}  # noqa: E731
    before, rows, text = rest(), results(alone), (alone / SWEPT / "table.md").read_bytes()
    assert run_sweep(root, alone, popen=nothing) == 0
    assert (rest(), results(alone), (alone / SWEPT / "table.md").read_bytes()) == (before, rows, text)


def test_the_printed_commands_make_what_the_sweep_makes(root, alone, tmp_path, capsys):
    """From an SFT policy alone: pairs, bank and reward model are built, and stdout has a command for each run and nothing else.
    One by one, in any order, these end with the rows of the sweep; what is finished is not printed again."""
    shutil.copytree(alone / "runs/reviews/sft", tmp_path / "runs/reviews/sft")
    arguments = [*ARGUMENTS[:-2], "--print"]

    def printed() -> list[list[str]]:
        capsys.readouterr()
        assert run_sweep(root, tmp_path, popen=nothing, arguments=arguments) == 0
        return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]

    def execute(python, script, *flags):
        assert (python, Path(script).parent) == (sys.executable, root)
        assert clone.run_here(root, tmp_path, Path(script).stem, *flags) == 0

    commands = printed()
    assert len(commands) == len(SMALL) and {"--out", "--resume"} < set(commands[0])
    shared = {name: file for name, file in tree(tmp_path).items() if str(SWEPT) not in name}
    assert any("reward-model" in name for name in shared) and any("pairs-bt" in name for name in shared)
    execute(*commands.pop())
    assert printed() == commands
    for command in reversed(commands):
        execute(*command)
    assert printed() == [] and run_sweep(root, tmp_path, popen=nothing) == 0
    assert results(tmp_path) == results(alone)


@pytest.fixture(scope="module")
def own_runs(root, alone, tmp_path_factory) -> list[Path]:
    """IPO with two betas, of which one was evaluated on its way."""
    cwd, runs = tmp_path_factory.mktemp("own"), []
    for flags in ("--beta 0.1", "--beta 0.2 --evaluate-every 8"):
        runs.append(cwd / f"ipo-{flags[2:].split(' --')[0].replace(' ', '')}-seed0")
        small = "--loss ipo --batch-size 16 --warmup 2 --epochs 0.5"
        assert clone.run_here(root, cwd, "dpo", "--sft", alone / "runs/reviews/sft", *small.split(), *flags.split(),
                              "--out", runs[-1]) == 0
    return runs


def test_finished_runs_are_drawn_beside_those_of_the_grid(root, alone, fresh, own_runs):
    """As one more method, with two settings: one point where the run has its evaluation alone, a path where it has more. Nothing
    is run, of a sweep that has one run missing, too; and without --draw the picture is as it was."""
    shutil.copytree(alone / SWEPT, fresh / SWEPT)
    shutil.rmtree(next((fresh / SWEPT).glob("ppo-targetkl*")))
    before, reward_models = results(fresh), [*(fresh / "runs/reviews").glob("reward-model*")]
    for folder in reward_models:  # not built for a run that is not there
        shutil.rmtree(folder)
    assert run_sweep(root, fresh, popen=nothing, arguments=[*ARGUMENTS, "--draw", *map(str, own_runs)]) == 0
    rows = results(fresh)
    assert [row for row in rows if row["method"] != "ipo"] == [row for row in before if row["method"] != "PPO"]
    one, *path = [row for row in rows if row["method"] == "ipo"]
    evaluation = json.loads((own_runs[0] / "evaluation.json").read_text())
    expected = evaluation["table"]["IPO beta 0.1"]
    assert [one[name] for name in ("kl", "reward", "reward_se", "length", "step")] == [
        expected["kl"], expected["reward"], expected["reward_se"], expected["length"], evaluation["step"]]
    assert one["last"] and one["setting"] == "beta 0.1" and {row["setting"] for row in path} == {"beta 0.2"}
    logged = [row for row in read_jsonl(own_runs[1] / "log.jsonl", {"step": int}) if "eval_kl" in row]
    assert [(row["step"], row["kl"]) for row in path] == [(row["step"], row["eval_kl"]) for row in logged] and len(path) > 2
    assert "\n| ipo | " in (fresh / SWEPT / "table.md").read_text() and "ipo" in (fresh / SWEPT / "frontier.svg").read_text()
    assert not [*(fresh / "runs/reviews").glob("reward-model*")] and reward_models


def test_runs_that_cannot_be_drawn(root, alone, fresh, own_runs, monkeypatch):
    """Of another kind, of another SFT policy, or one run twice: named before the bank is opened, with the picture as it was."""
    monkeypatch.setattr(pipeline, "sample_bank", nothing)
    shutil.copytree(own_runs[0], fresh / "other")
    config = json.loads((fresh / "other/config.json").read_text())
    for change, line in ((dict(script="reward_model.py"), "a run of reward_model.py, expected one of sft.py, dpo.py, "),
                         (dict(built_from={"policy": "another"}), "its SFT policy is not that in runs/reviews/sft")):
        (fresh / "other/config.json").write_text(json.dumps({**config, **change}))
        said = run_sweep(root, fresh, popen=nothing, arguments=[*ARGUMENTS, "--draw", "other"])
        assert isinstance(said, str) and said.startswith(f"error: --draw other: {line}") and "\n" not in said
    said = run_sweep(root, fresh, popen=nothing, arguments=[*ARGUMENTS, "--draw", *map(str, 2 * own_runs[:1])])
    assert said == f"error: --draw {own_runs[0]}: ipo, beta 0.1, seed 0 is there twice"
    assert not (fresh / SWEPT).exists()


def test_a_sweep_of_a_grid_of_ones_own(root, alone, fresh, monkeypatch):
    """A loss of the user's and IPO end in one table; and when the loss's file has changed, its runs are other ones."""
    grid_file(fresh, {"mine": [f"{DPO} --loss mine.py:f"], "IPO": [f"{DPO} --loss ipo --beta 0.3"]})
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert run_sweep(root, fresh, arguments=[*ARGUMENTS, "--grid", "own.json"]) == 0
    rows = read_jsonl(fresh / "runs/reviews/frontier-own/results.jsonl", {"method": str, "setting": str})
    assert {(row["method"], row["setting"]) for row in rows} == {("mine", "default"), ("IPO", "beta 0.3")}
    (fresh / "mine.py").write_text("def f(c, r, beta, *lengths):\n    return (2 - c + r) ** 2\n")
    said = run_sweep(root, fresh, popen=nothing, arguments=[*ARGUMENTS, "--grid", "own.json"])
    assert said.startswith("error: runs/reviews/frontier-own/mine-") and "was made with other settings: loss was '" in said


def test_runs_of_other_settings_stop_the_sweep_before_anything_is_built(root, alone, fresh, monkeypatch):
    """By name, in one line."""
    shutil.copytree(alone / SWEPT, fresh / SWEPT)
    config = next((fresh / SWEPT).glob("ppo-gt*")) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "batch_size": 99}))
    monkeypatch.setattr(pipeline, "sft_policy", nothing)
    said = run_sweep(root, fresh, popen=nothing)
    name = config.parent.relative_to(fresh)
    assert said.startswith(f"error: {name} was made with other settings: batch_size was 99, now 16: ") and "\n" not in said


def test_runs_that_were_made_from_something_else_stop_the_sweep(root, alone, fresh):
    """Another SFT policy, other pairs, another reward model, and the gold reward, too: by name, in one line, with rows, table
    and figure as they were."""
    shutil.copytree(alone / SWEPT, fresh / SWEPT)
    for run, source in (("dpo", "policy"), ("unlikelihood", "pairs"), ("preferred-ft", "init"), ("preferred-ft", "pairs"),
                        ("ppo-targetkl", "reward"), ("ppo-gt", "reward")):
        config = next((fresh / SWEPT).glob(f"{run}*")) / "config.json"
        text = config.read_text()
        saved = json.loads(text)
        config.write_text(json.dumps({**saved, "built_from": {**saved["built_from"], source: "another"}}))
        before = tree(fresh / SWEPT)
        said = run_sweep(root, fresh, popen=nothing)
        expected = f"error: {config.parent.relative_to(fresh)} was made with other settings: {source} was 'another', now "
        assert isinstance(said, str) and said.startswith(expected) and "\n" not in said
        assert tree(fresh / SWEPT) == before
        config.write_text(text)


@pytest.mark.parametrize("damage, line", [
    ("empty model", "{}/model.pt: is empty"), ("no config", "{}: a model without config.json"),
    ("log without its last row", "{}/log.jsonl: its last row is missing"), ("no log", "{}/log.jsonl: its last row is missing")])
def test_a_finished_run_that_is_damaged_is_named(damage, line, root, alone, fresh):
    """In one line, before what is still to do is run."""
    shutil.copytree(alone / SWEPT, fresh / SWEPT)
    shutil.rmtree(next((fresh / SWEPT).glob("unlikelihood*")))
    folder = next((fresh / SWEPT).glob("dpo*"))
    if damage == "empty model":
        (folder / "model.pt").write_bytes(b"")
    elif damage == "no config":
        (folder / "config.json").unlink()
    else:
        lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
        (folder / "log.jsonl").write_text("".join(lines[:-1]) if damage != "no log" else "")
    said = run_sweep(root, fresh, popen=nothing)
    assert said.startswith("error: " + line.format(folder.relative_to(fresh))) and "\n" not in said


def processes_of(root: Path) -> list[bytes]:
    """Command lines of all processes that run a script of this copy."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(line.read_bytes())
        except OSError:
            pass  # it has just ended
    return [line for line in found if str(root).encode() in line]


KILLED = """
import sys
from pathlib import Path
import dpo
from common.settings import stop_like_ctrl_c
from experiments import sweep
stop_like_ctrl_c()
sweep.ROOT = folder = Path(sys.argv[1])
runs = [sweep.PlannedRun("DPO", "x", seed, dpo.Config(out=str(folder / f"runs/{seed}"), seed=seed)) for seed in (2, 0)]
sys.exit(sweep.STOPPED if sweep.run_all(runs, folder, 1)[1] else 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc, and only Linux ends a child with its parent")
@pytest.mark.parametrize("name, status, left", [("SIGKILL", -9, ["began"]), ("SIGINT", sweep.STOPPED, ["began", "stopped"])])
def test_a_sweep_that_is_killed_or_interrupted_leaves_no_run_behind(name, status, left, stubs, tmp_path):
    """As a real process: kill -9, or Ctrl-C, in the middle of its second run. That a run goes on where it was stopped, and a
    sweep with what is finished, is tested above and in test_faults.py."""
    stubs()
    process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], cwd=clone.ROOT, env=clone.environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for((tmp_path / "runs/0/began").exists, process)
    assert len(processes_of(tmp_path)) == 2
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    end = time.monotonic() + 5  # the kernel takes a moment
    while processes_of(tmp_path) and time.monotonic() < end:
        time.sleep(0.01)
    assert not processes_of(tmp_path) and process.returncode == status and not errors
    assert sorted(os.listdir(tmp_path / "runs/0")) == left and (tmp_path / "runs/2/ended").exists()


# ---- bench.py --------------------------------------------------------------------------------------------------------

SMALL_STEP = "--layers 1 --heads 2 --embd 8 --vocab 50 --batch 4 --prompt 3 --comp 5 --steps 1".split()


@pytest.fixture
def once(monkeypatch):
    """Everything is done once, and the machine's peak is known."""
    measure = bench.measure
    monkeypatch.setattr(bench, "measure", lambda work, steps, warmup: measure(work, 1, 0))
    monkeypatch.setattr(bench, "matmul_peak", lambda dtype: 1e9)


def shown(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name, unit, tokens", [("sft", "rows", 32), ("reward_model", "pairs", 64), ("dpo", "pairs", 64),
                                                ("generate", "rows", 20), ("ppo", "episodes", 20)])
def test_every_step_can_be_timed(name, unit, tokens, once, capsys):
    """With the positions that it says it has: 4 rows of 8 tokens, two of them in a pair; 4 responses of 5."""
    bench.main(parse(bench.Config, "", ["--only", name, *SMALL_STEP]))
    line, = shown(capsys)
    assert line["bench"] == name and line["ms_median"] > 0 and line["torch"] == torch.__version__
    assert line["tokens_per_s"] / line[f"{unit}_per_s"] == pytest.approx(tokens / 4, rel=0.02)


def test_what_padding_costs(once, capsys):
    """Lengths 5 and 10: three quarters of the positions hold a token. And two responses that end where they can."""
    rows = bench.Rows(torch.ones(2, 10, dtype=torch.long), torch.tensor([3, 3]), torch.tensor([5, 10]))
    model = bench.padded_model()
    bench.time_padded_training("train", model, rows, lambda: torch.arange(2))
    bench.time_padded_sampling("sample", model, [200, 201], torch.Generator().manual_seed(0))
    train, sample = shown(capsys)
    assert (train["work"], train["real_share"]) == ("train", 0.75) and 0.8 < sample["real_share"] <= 1
    logits = model(torch.ones(1, 1, dtype=torch.long))
    assert logits.softmax(-1)[0, 0, bench.PADDED_EOS].item() == pytest.approx(1 / bench.RESPONSE, rel=1e-4)


def test_what_needs_no_language_model_can_be_timed(once, monkeypatch, capsys):
    monkeypatch.setattr(bench, "simulated_comparisons", lambda items, n: ([*range(items)], [*range(1, items), 0]))
    monkeypatch.setattr(bench.bt, "bootstrap", lambda *_, **__: None)
    bench.bradley_terry()
    bench.imitation()
    assert [(line["bench"], line.get("items"), line.get("task")) for line in shown(capsys)] == [
        ("bt", 100, None), ("bt", 1000, None), ("dagger", None, "bridge"), ("dagger", None, "track")]


@pytest.mark.parametrize("flags, line", [
    ("--layers 0", "--layers 0: must be > 0"), ("--heads -1", "--heads -1: must be > 0"), ("--embd 1000000000000", "--embd "),
    ("--vocab -1", "--vocab -1: must be > 0"), ("--steps 0", "--steps 0: must be > 0"), ("--threads -1", "--threads -1: must"),
    ("--embd 30", "--embd 30: must be a multiple of --heads 4"), ("--batch many", "argument --batch: invalid int value"),
    ("--only bt --layers 2", "--layers: not with --only bt, which has sizes of its own"), ("--nope", "unrecognized arguments")])
def test_a_size_that_cannot_be_is_one_line_without_the_usage(flags, line, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(bench.Config, "", flags.split())
    assert str(stop.value).startswith(f"error: {line}") and "\n" not in str(stop.value)
    assert capsys.readouterr() == ("", "")
