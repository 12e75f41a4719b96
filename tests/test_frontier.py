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
import toy
from common import pipeline
from common.files import read_jsonl
from common.settings import parse, stop_like_ctrl_c
from experiments import bench, frontier, sweep
from experiments.frontier import plan
from experiments.grids import Method
from experiments.sweep import PlannedRun
from test_faults import tree, wait_for
from toy import tables  # noqa: F401  a fixture

COMMITTED = clone.ROOT / "results"


# ---- what is read off the runs ---------------------------------------------------------------------------------------

def rows_of(method, setting, seed, points, **more):
    return [{"method": method, "setting": setting, "seed": seed, "step": step, "kl": kl, "reward": reward, "reward_se": 0.0,
             "length": 9.0, "seconds": 60.0, "samples": 0, "reward_calls": 0, "lr": 1e-3, "last": step == len(points) - 1,
             **more}
            for step, (kl, reward) in enumerate(points)]


def method_of(ends, ref=0.5, **more):
    """A method by where its settings end: name -> (KL, reward) of each seed."""
    reference = frontier.End("reference", [{"kl": 0.0, "reward": ref}])
    return frontier.Method("m", [row for setting, seeds in ends.items() for seed, point in enumerate(seeds)
                                 for row in rows_of("m", setting, seed, [(0.0, ref), (0.1, 9.9), point], **more)], reference)


def test_the_hull_of_known_points():
    """Of a square with a point inside and one below; what was on the way counts for nothing, a reward that falls does."""
    found = method_of({"below": [(1.5, 0.6)], "c": [(4.0, 0.9)], "a": [(1.0, 0.8)], "late": [(6.0, 0.7)],
                       "inside": [(2.5, 0.84)]})
    assert [end.setting for end in found.hull] == ["reference", "a", "c", "late"]
    assert [end.setting for end in method_of({"a": [(1.0, 0.6)], "line": [(2.0, 0.7)]}).hull] == ["reference", "line"]
    twice = method_of({"low": [(2.0, 0.6)], "high": [(2.0, 0.7)], "nowhere": [(-0.01, 0.4)]})
    assert [end.setting for end in twice.hull] == ["reference", "high"]
    of_two_seeds = method_of({"a": [(1.0, 0.5), (2.0, 0.7)]}).hull[1]
    assert (of_two_seeds.kl, of_two_seeds.reward) == (1.5, pytest.approx(0.6))


def test_between_two_ends_the_reward_is_linear():
    """At an end it is the end's. Below the first end and beyond the last nothing is read, though the hull begins at 0."""
    found = method_of({"a": [(1.0, 0.8)], "b": [(3.0, 0.9)], "low": [(0.5, 0.5)]})
    for kl, reward in ((1.0, 0.8), (1.5, 0.825), (2.0, 0.85), (3.0, 0.9), (0.5, 0.65), (0.75, 0.725)):
        assert frontier.mixed_reward(found.between(kl)) == pytest.approx(reward)
        assert sum(weight for weight, _ in found.between(kl)) == pytest.approx(1)
    assert found.between(0.49) == found.between(3.01) == []
    assert [end.setting for _, end in found.between(0.7)] == ["reference", "a"]


def test_what_is_interpolated_a_mixture_of_policies_reaches(tables):
    """All of it enumerated, on seven responses: the reference, and two optima, so that all three lie on the hull. The mixture
    that is read at a KL has just that reward and no larger KL, and is no better than the optimum there."""
    _, ref_table, r = tables
    ref = toy.logprobs_of(ref_table).sum(1).exp()

    def optimum(beta):
        pi = ref * torch.exp(r / beta)
        return pi / pi.sum()

    def kl_of(q):
        return (q * (q / ref).log()).sum().item()
    policies = {"reference": ref, "near": optimum(3.0), "far": optimum(0.5)}
    ends = {name: [(kl_of(pi), (pi * r).sum().item())] for name, pi in policies.items() if name != "reference"}
    found = method_of(ends, ref=(ref * r).sum().item())
    low, high = ends["near"][0][0], ends["far"][0][0]
    for kl in (low, *(low + (high - low) * i / 8 for i in range(1, 8)), high):
        mixture = found.between(kl)
        mixed = sum(weight * policies[end.setting] for weight, end in mixture)
        assert frontier.mixed_reward(mixture) == pytest.approx((mixed * r).sum().item())
        assert kl_of(mixed) <= kl + 1e-12 and mixed.sum() == pytest.approx(1)
        betas = torch.logspace(2, -1, 2000).tolist()
        best = min((abs(kl_of(optimum(beta)) - kl), (optimum(beta) * r).sum().item()) for beta in betas)[1]
        assert frontier.mixed_reward(mixture) <= best + 1e-3


def test_errors_are_pooled_over_the_settings_by_hand():
    """Deviations of 0.1 and 0.1 about one mean, of 0.2, 0 and 0.2 about another: 0.1 in 3 degrees of freedom; the fewest seeds
    are 2. Never less than the evaluations have; of one seed it is theirs alone."""
    ends = {"two": [(1.0, 0.6), (1.0, 0.8)], "three": [(2.0, 0.7), (2.0, 0.9), (2.0, 1.1)]}
    found = method_of(ends)
    assert found.error == found.error_of_seeds == pytest.approx(math.sqrt(0.1 / 3 / 2))
    assert method_of(ends, reward_se=0.3).error == pytest.approx(0.3 / math.sqrt(2))
    one = method_of({"a": [(1.0, 0.6)], "b": [(2.0, 0.9)]}, reward_se=0.02)
    assert (one.error_of_seeds, one.error) == (0, pytest.approx(0.02))
    draw = torch.Generator().manual_seed(0)  # 400 settings of 3 seeds: what the mean of three scatters by
    many = method_of({str(i): [(1.0, x) for x in torch.randn(3, generator=draw).tolist()] for i in range(400)})
    assert many.error == pytest.approx(1 / math.sqrt(3), rel=0.05)


def test_a_difference_is_paired_where_the_rows_have_their_prompts():
    """Two methods that both rise and fall with the prompts: their difference is 0.1 and 0.3 on two prompts at the first end, 0
    at the second. Without the prompts the errors of both add up."""
    def paired(shift, seeds=0.0):
        a, b = ([{"reward": [low + x, high + x]} for x in (-seeds, seeds)] for low, high in ((0.1, 0.9), (0.2, 1.0)))
        if shift:
            a = [{"reward": [0.2 + x, 1.2 + x]} for x in (-seeds, seeds)]
        rows = []
        for setting, kl, per_prompt in (("a", 1.0, a), ("b", 3.0, b)):
            for seed, own in enumerate(per_prompt):
                reward = sum(own["reward"]) / 2
                rows += rows_of("m", setting, seed, [(0.0, 0.4), (kl, reward)], per_prompt=own, reward_se=0.4)
        return frontier.Method("m", rows, frontier.End("reference", [{"kl": 0.0, "reward": 0.4}]))
    one, other = paired(True), paired(False)
    assert frontier.difference(one, other, 1.0) == (pytest.approx(0.2), pytest.approx(0.1))  # 0.1 and 0.3: an error of 0.1
    assert frontier.difference(one, other, 2.0) == (pytest.approx(0.1), pytest.approx(0.05))
    assert frontier.difference(one, other, 3.5) is frontier.difference(one, other, 0.9) is None
    value, error = frontier.difference(paired(True, 0.05), other, 1.0)  # two seeds that differ by 0.1: 0.05 on the mean
    assert (value, error) == (pytest.approx(0.2), pytest.approx(math.hypot(0.1, 0.05)))
    for row in one.rows:
        del row["per_prompt"]
    old = frontier.Method("m", one.rows, one.reference)
    assert frontier.difference(old, other, 1.0) == (pytest.approx(0.2), pytest.approx(0.4))  # 0.4 / sqrt(2), twice


def test_near_a_kl_stands_the_nearest_end_that_no_mixture_beats():
    found = method_of({"a": [(0.8, 0.7)], "beaten": [(1.0, 0.6)], "b": [(1.5, 0.8)]})
    assert [found.near(kl) and found.near(kl).setting for kl in (0.6, 0.62, 1.0, 1.2, 1.9, 2.0)] == [
        None, "a", "a", "b", "b", None]
    assert method_of({"worse than the reference": [(1.0, 0.4)], "and again": [(-0.1, 0.6)]}, ref=0.5).near(1.0).reward == 0.4


# ---- the table -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bank():
    """256 responses to each of 200 prompts, with uniform rewards; the optimal curve ends between 2 and 4 nats."""
    rewards = torch.rand(200, 256, generator=torch.Generator().manual_seed(0))
    return evaluate.Bank([""] * 200, rewards, torch.full(rewards.shape, 9), [])


@pytest.fixture(scope="module")
def scale(bank):
    return frontier.Scale(frontier.curve_of(bank))


def test_the_curve_is_all_that_is_read_off_the_bank(bank, scale):
    """The reference with each prompt, best of n up to a quarter of the bank (of uniform rewards n / (n + 1)), the optimum."""
    reference, = scale.reference.rows
    assert reference["reward"] == pytest.approx(bank.rewards.mean().item())
    assert reference["per_prompt"]["reward"] == pytest.approx(bank.rewards.mean(1).tolist(), abs=1e-5)
    assert [row["n"] for row in scale.best_of_n] == list(range(1, 65))
    assert all(abs(row["reward"] - row["n"] / (row["n"] + 1)) < 4 * row["reward_se"] for row in scale.best_of_n)
    assert [row["beta"] for row in scale.optimum] == [point["beta"] for point in evaluate.optimal_curve(bank.rewards)]
    assert json.loads(json.dumps(frontier.curve_of(bank))) == frontier.curve_of(bank)


def test_the_optimum_has_all_of_itself(scale):
    """Share and efficiency of the curve's own points are 100%; with twice the KL the efficiency is a half. Beyond its end
    the share is an upper bound, and what no point of the curve has needs a KL that nobody knows."""
    for point in scale.optimum[20::5]:
        assert scale.both(point["reward"], point["kl"]) == "(100%; 100%)"
    middle, end = scale.optimum[20], scale.optimum[-1]
    assert scale.both(middle["reward"], 2 * middle["kl"]).endswith("; 50%)")
    half = (scale.reference.reward + end["reward"]) / 2
    assert scale.share(half, 9.0) == "≤ 50%" and scale.share(half, end["kl"]) == "50%"
    assert scale.both(end["reward"] + 0.001, 9.0) == "(≤ 100%)" and scale.both(scale.reference.reward, 1.0) == "(0%)"


def test_best_of_n_stands_at_its_own_kl(scale):
    """log n - (n-1)/n is 0.958 at 6, 1.089 at 7, 1.997 at 19 and 2.046 at 20; 4 nats need more than a quarter of the bank. Read
    there it is the optimum within a few hundredths; read at 1 nat, six of them would seem to be less."""
    assert [scale.best_at(kl).split(" (")[0].split(" at ")[-1] for kl in frontier.KLS] == ["≤ 0.96", "≤ 2.00", "", ""]
    text = frontier.markdown(two_settings("DPO", 0.0), scale).splitlines()
    cells = next(line for line in text if line.startswith("| best of n")).split(" | ")
    six = scale.best_of_n[5]
    assert cells[1] == f"{six['reward']:.3f} ± {six['reward_se']:.3f} at ≤ 0.96 ({scale.share(six['reward'], six['kl'])})"
    assert evaluate.share_of_optimum(scale.optimum, six["reward"], six["kl"], 0.5)[0] > evaluate.share_of_optimum(
        scale.optimum, six["reward"], 1.0, 0.5)[0]


def test_the_largest_reward_is_of_the_setting_that_ends_best(scale):
    """Its mean over seeds, with KL, length and cost of the same runs; not the best evaluation on the way. Of the seconds it is
    the median: a machine that slept through one run made that run's method look four times as slow as it is."""
    cost = dict(samples=512, reward_calls=99)
    rows = [row for setting, seed, end, more in (
        ("low", 0, (2.0, 0.6), {}), ("low", 1, (2.0, 0.7), {}), ("low", 2, (2.0, 0.65), {}),
        ("high", 0, (3.0, 0.8), dict(**cost, seconds=10.0, length=20.0)),
        ("high", 1, (5.0, 0.7), dict(**cost, seconds=30.0, length=22.0)),
        ("high", 2, (4.0, 0.75), dict(**cost, seconds=1038.0, length=21.0)))
            for row in rows_of("m", setting, seed, [(0.0, 0.5), (1.0, 0.99), end], **more)]
    line = next(line for line in frontier.markdown(rows, scale).splitlines() if line.startswith("| m"))
    error = f"{0.05 / math.sqrt(3):.3f}"
    assert line.endswith(f"| 0.750 ± {error} (high) | 4.00 ± 0.58 {scale.both(0.75, 4.0)} | 21.0 | 30 | 512 | 99 |")


def two_settings(method, higher):
    """Rows of two seeds of two settings, which end at 1 nat and at 3, and all by `higher`."""
    ends = ("beta 1", 3.0, 0.8), ("beta 9", 1.0, 0.65)
    return [row for seed, x in ((0, higher - 0.03), (1, higher + 0.03)) for setting, kl, end in ends
            for row in rows_of(method, setting, seed, [(0.0, 0.5), (0.5, 0.9), (kl, end + x)])]


def test_the_table_in_markdown_and_the_papers_claim(scale):
    """Policies that ran first, then what is interpolated, and says so; as many cells in every line. DPO - PPO with the error of
    both, 0.03 each: two seeds that are 0.06 apart."""
    rows = two_settings("DPO", 0.0) + two_settings("PPO", 0.05)
    policies, between = frontier.markdown(rows, scale).split("\nAt exactly these KLs, ")
    head, *text = policies.split("\n\n")[1].splitlines()
    assert len({line.count("|") for line in (head, *text)}) == 1
    assert head.startswith("|  | near 1 nat | near 2 nats | near 4 nats |")
    assert text[1] == (f"| DPO | 0.650 ± 0.030 at 1.00 {scale.both(0.65, 1.0)} |  |  |  | 0.800 ± 0.030 (beta 1) | "
                       f"3.00 ± 0.00 {scale.both(0.8, 3.0)} | 9.0 | 60 | 0 | 0 |")
    assert text[-1].startswith("| **optimum** | ") and text[-1].count("≥") == 2  # at 4 and 8 nats
    assert between.startswith("interpolated between two policies that ran")
    head, _, dpo_line, ppo_line, difference, optimum = between.split("\n\n")[1].splitlines()
    assert head == "|  | 0.5 nats | 1 nat | 2 nats | 3 nats | 4 nats | 8 nats |"
    assert dpo_line.startswith(f"| DPO |  | 0.650 ± 0.030 ({scale.share(0.65, 1)}) | 0.725 ± 0.030 (")
    assert dpo_line.endswith(") |  |  |")
    assert difference == "| DPO − PPO |  | −0.050 ± 0.042 | −0.050 ± 0.042 | −0.050 ± 0.042 |  |  |"
    assert len({line.count("|") for line in (head, dpo_line, ppo_line, difference, optimum)}) == 1


def test_a_method_with_one_setting_is_not_interpolated(scale):
    """Its end stands near its KL, and no line to it from the reference is read. Where all methods are like this there are no
    columns for the KLs."""
    one = [row for seed in (0, 1) for row in rows_of("PPO", "beta 1", seed, [(0.0, 0.5), (2.1, 0.8)])]
    text = frontier.markdown(two_settings("DPO", 0.0) + one, scale)
    assert f"\n| PPO |  | 0.800 ± 0.000 at 2.10 {scale.both(0.8, 2.1)} |  |  | 0.800 ± 0.000 (beta 1) | " in text
    assert text.count("| PPO |") == 1 and "DPO −" not in text
    text = frontier.markdown(one, scale).splitlines()
    assert text[2] == "|  | largest reward | its KL | length | seconds | sampled | scored |"
    assert [line.split(" | ")[0] for line in text[4:]] == ["| PPO", "| **optimum**"]
    assert len({line.count("|") for line in text[2:]}) == 1


@pytest.mark.parametrize("grid", frontier.GRIDS)
def test_every_grid_can_be_drawn(grid, scale, tmp_path):
    """All its methods, two seeds of each, DPO at two learning rates."""
    rows = [row for method in frontier.GRIDS[grid] for seed in (0, 1) for lr in (1e-4, 1e-3)
            for row in rows_of(method, f"lr {lr}", seed, [(0.1, 0.5), (2.0 + seed, 0.75)], beta=0.5, lr=lr)]
    frontier.draw(rows, scale, "reviews", tmp_path)
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
        learns_from_pairs = getattr(run.config, "reward", "model") == "model"  # then a seed draws them, too
        assert getattr(run.config, "pairs_seed", 0) == (run.seed if learns_from_pairs else 0)
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
    ({"a": ["bt.py"]}, ", a, 'bt.py': 'bt.py': expected one of sft.py, dpo.py, reinforce.py, ppo.py, vargrad.py, expert_iteration.py, conditioning.py"),
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
    ("--grid nope", "--grid nope: expected paper, why, ablation, best or FILE.json"), ("--grid why.json", "--grid why.json: expected"),
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
                                                         "lr", "samples", "reward_calls")), row
        assert 0 <= row["reward"] <= 1 and row["length"] > 0 and (row["step"] or abs(row["kl"]) < 1e-4)
    steps = {method: [row["step"] for row in rows if row["method"] == method] for method in SMALL}
    assert list(dict.fromkeys(row["method"] for row in rows)) == list(SMALL) and steps["Preferred-FT"] == [0, 12, 24] and steps["PPO"] == [0, 6]
    assert [row["step"] for row in rows if row["last"]] == [found[-1] for found in steps.values()]
    assert {row["method"]: (row["samples"], row["reward_calls"]) for row in rows}["PPO-GT"] == (96, 96)
    assert {row["lr"] for row in rows if row["method"] == "DPO"} == {4 * dpo.Config().lr}
    for row in rows:  # with the prompts of the end, but for Preferred-FT, which keeps none
        assert ("per_prompt" in row) == (row["last"] and row["method"] != "Preferred-FT")
        if "per_prompt" in row:
            means = [sum(row["per_prompt"][name]) / len(row["per_prompt"][name]) for name in ("reward", "kl")]
            assert means == pytest.approx([row["reward"], row["kl"]], abs=1e-5)
    curve = read_jsonl(alone / SWEPT / "curve.jsonl", {"curve": str})
    assert list(dict.fromkeys(row["curve"] for row in curve)) == ["reference", "best of n", "optimum"]
    text = (alone / SWEPT / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in text[4:]] == [f"| {name}" for name in (*SMALL, "**optimum**")]
    assert (alone / SWEPT / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_finished_is_not_run_again(root, alone):
    """A second start makes rows and table of what is there, the same as before, and touches nothing else."""
    made = ("results.jsonl", "curve.jsonl", "table.md", "frontier.png", "frontier.svg")
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
    assert [(row["step"], row["kl"]) for row in path[:-1]] == [(row["step"], row["eval_kl"]) for row in logged[:-1]] != []
    evaluation = json.loads((own_runs[1] / "evaluation.json").read_text())  # at the end that of more responses
    assert (path[-1]["step"], path[-1]["kl"]) == (logged[-1]["step"], evaluation["table"]["IPO beta 0.2"]["kl"])
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
