"""frontier.py: what is read off a path, the table of a bank whose optimum is known, what is run, and a whole sweep that is
killed, interrupted and started again.
"""
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import clone
import dpo
import evaluate
from experiments import frontier
import ppo
from experiments import sweep
from clone import root  # noqa: F401  (a fixture)
from common.files import read_jsonl
from common.settings import parse
from experiments.frontier import best_at, by_run, markdown, plan, reward_at, table
from experiments.sweep import Planned, mean_se
from test_faults import messages, tree, wait_for


# ---- what is read off the runs ---------------------------------------------------------------------------------------

def path(*points):
    return [{"kl": kl, "reward": reward} for kl, reward in points]


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
    assert mean_se([1.0, 2.0, 3.0, 4.0]) == (2.5, pytest.approx(math.sqrt(5 / 3) / 2))
    assert mean_se([2.0])[0] == 2 and math.isnan(mean_se([2.0])[1])
    runs = {"lr 1": {0: path((0, 0.5), (2, 0.8)), 1: path((0, 0.5), (2, 0.6))},  # at 1: 0.65 and 0.55
            "lr 2": {0: path((0, 0.5), (2, 1.0)), 1: path((0, 0.5), (2, 0.3))},  # at 1: 0.75 and 0.4
            "lr 3": {0: path((0, 0.5), (2, 1.0)), 1: path((0, 0.5), (0.9, 1.0))}}  # the second seed is never at 1
    assert best_at(runs, 1) == (pytest.approx(0.6), pytest.approx(0.05), "lr 1")
    assert best_at(runs, 0.5)[2] == "lr 3" and best_at(runs, 3) is None


def test_between_settings_the_line_through_their_ends_counts():
    """From the reference through the ends by KL, seed by seed: at 2 nats 0.8 and 0.7, which no run's own path has. Runs at
    another learning rate are no part of it."""
    runs = {"beta 1": {0: path((0, 0.5), (3, 0.4), (1, 0.7)), 1: path((0, 0.5), (1, 0.6))},
            "beta 0.1": {0: path((0, 0.5), (2.5, 0.5), (3, 0.9)), 1: path((0, 0.5), (2.5, 0.5), (3, 0.8))},
            "beta 0.1, lr 1": {0: path((0, 0.5), (2, 0.1)), 1: path((0, 0.5), (2, 0.1))}}
    assert best_at(runs, 2) == (pytest.approx(0.75), pytest.approx(0.05), "between settings")
    assert best_at(runs, 0.5) == (pytest.approx(0.575), pytest.approx(0.025), "between settings")


# ---- the table -------------------------------------------------------------------------------------------------------

def rows_of(method, setting, seed, points, **more):
    return [{"method": method, "setting": setting, "seed": seed, "step": step, "kl": kl, "reward": reward, "length": 9.0,
             "seconds": 60.0, "samples": 0, "reward_calls": 0, **more} for step, (kl, reward) in enumerate(points)]


@pytest.fixture(scope="module")
def bank():
    """256 responses to each of 200 prompts, with uniform rewards; the optimal curve ends between 2 and 4 nats."""
    rewards = torch.rand(200, 256, generator=torch.Generator().manual_seed(0))
    return evaluate.Bank([""] * 200, rewards, torch.full(rewards.shape, 9), [])


def test_shares_and_errors(bank):
    """The optimum's own points have the share 1 at every KL, points half as far above the reference a half; two seeds around
    them have half of their difference as standard error. Beyond the curve's end a share is an upper bound."""
    curve, ref = evaluate.frontier(bank.rewards), bank.rewards.mean().item()
    points = [(p["kl"], p["reward"]) for p in curve]
    moved = lambda x: [(kl, r + x) for kl, r in [*points, (9.0, points[-1][1])]]  # noqa: E731
    rows = rows_of("exact", "x", 0, points) + rows_of("half", "x", 0, [(kl, (r + ref) / 2) for kl, r in points])
    exact, half, two, _ = table(rows + rows_of("two", "x", 0, moved(0.01)) + rows_of("two", "x", 1, moved(-0.03)), bank)
    for name, kl in (("at 1", 1), ("at 2", 2), ("at 4", 4), ("at 8", 8)):
        reward, known = evaluate.optimal_reward(curve, kl)
        assert (name in exact) == (name in half) == two[name]["known"] == known == (kl < 4)
        if known:
            assert exact[name]["share"] == pytest.approx(1) and half[name]["share"] == pytest.approx(0.5)
            assert exact[name]["reward"] == pytest.approx(reward) and math.isnan(exact[name]["se"])
        assert (two[name]["reward"], two[name]["se"]) == (pytest.approx(reward - 0.01), pytest.approx(0.02))
        share, error = 1 - 0.01 / (reward - ref), 0.02 / (reward - ref)
        assert (two[name]["share"], two[name]["share_se"]) == (pytest.approx(share), pytest.approx(error))


def test_best_of_n_stands_at_the_largest_n_whose_bound_fits(bank):
    """log n - (n-1)/n is 0.958 at 6, 1.089 at 7, 1.997 at 19 and 2.046 at 20; 4 nats need more than a quarter of the bank. The
    best of n uniform rewards is n / (n + 1), and hardly less than the optimum."""
    *_, best = table(rows_of("any", "x", 0, [(0.0, 0.5), (1.0, 0.6)]), bank)
    for name, n in (("at 1", 6), ("at 2", 19)):
        assert best[name]["setting"] == f"n = {n}" and abs(best[name]["reward"] - n / (n + 1)) < 4 * best[name]["se"] < 0.01
        assert best[name]["share"] == pytest.approx(0.97, abs=0.04)
    assert not {"at 4", "at 8", "reward"} & best.keys()


def test_the_largest_reward_is_of_the_setting_that_ends_best(bank):
    """Its mean over seeds, with KL, length and cost of the same runs; not the best evaluation on the way."""
    rows = [row for setting, seed, end, more in (
        ("low", 0, (2.0, 0.6), {}), ("low", 1, (2.0, 0.7), {}),
        ("high", 0, (3.0, 0.8), dict(seconds=10.0, samples=512, reward_calls=99, length=20.0)),
        ("high", 1, (5.0, 0.7), dict(seconds=30.0, samples=512, reward_calls=99, length=22.0)))
            for row in rows_of("m", setting, seed, [(0.0, 0.5), (1.0, 0.99), end], **more)]
    line, _ = table(rows, bank)
    expected = dict(reward=0.75, reward_se=0.05, kl=4, kl_se=1, length=21, seconds=20, samples=512, reward_calls=99)
    assert line["setting"] == "high" and {name: line[name] for name in expected} == pytest.approx(expected)
    share, known = evaluate.share_of_optimum(evaluate.frontier(bank.rewards), 0.75, 4.0, bank.rewards.mean().item())
    assert line["end"]["share"] == pytest.approx(share) and line["end"]["known"] == known  # at the KL where it ends


def test_the_table_in_markdown_and_the_papers_claim(bank):
    """As many cells in every line, numbers with their errors; DPO - PPO with the error of both."""
    rows = [row for method, higher in (("DPO", 0.0), ("PPO", 0.05)) for seed, x in ((0, -0.03), (1, 0.03))
            for row in rows_of(method, "beta 1", seed, [(0.0, 0.5 + higher + x), (3.0, 0.8 + higher + x)])]
    lines = table(rows, bank)
    text = markdown(lines, bank).splitlines()
    assert len(text) == 2 + 3 + 1 and len({line.count("|") for line in text}) == 1
    assert text[2].startswith(f"| DPO | 0.600 ± 0.030 ({lines[0]['at 1']['share']:.0%} ± ")
    end = lines[0]["end"]
    assert (f" | 0.800 ± 0.030 (beta 1) | 3.00 ± 0.00 ({'' if end['known'] else '≤ '}{end['share']:.0%} ± "
            f"{100 * end['share_se']:.0f}) | 9.0 | 60 | 0 | 0 |") in text[2]
    assert text[-1].startswith("| **optimum** | ") and text[-1].count("≥") == 2  # at 4 and 8 nats
    assert frontier.compare(lines) == "DPO - PPO at 1 nats: -0.050 ± 0.042\nDPO - PPO at 2 nats: -0.050 ± 0.042\n"


@pytest.mark.parametrize("grid", [grid for grid in frontier.GRIDS if grid != "paper"])
def test_every_grid_can_be_drawn(grid, bank, tmp_path):
    """All its methods, two seeds of each, DPO at two learning rates. (The paper's is drawn at the end of a sweep, below.)"""
    rows = [row for method in frontier.GRIDS[grid] for seed in (0, 1) for lr in (1e-4, 1e-3)
            for row in rows_of(method, f"lr {lr}", seed, [(0.1, 0.5), (2.0 + seed, 0.75)], beta=0.5, lr=lr, last=True)]
    frontier.draw(rows, bank, "reviews", tmp_path)
    assert (tmp_path / "frontier.png").stat().st_size > 20_000 and (tmp_path / "frontier.svg").stat().st_size > 20_000


# ---- what is run -----------------------------------------------------------------------------------------------------

def planned(*args, **settings):
    config = frontier.Config(*args, **settings)
    return plan(config, Path(config.out).parent)


@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
@pytest.mark.parametrize("task", [("reviews", "cpu"), ("imdb", "cpu"), ("imdb", "gpu")], ids=" ".join)
@pytest.mark.parametrize("grid", frontier.GRIDS)
def test_the_command_that_is_printed_is_the_run_that_is_planned(grid, task, quick):
    """Typed into a shell it gives the very Config, default for default; and no two runs share a folder or a name."""
    runs = planned(*task, grid=grid, quick=quick, seeds=2)
    for run in runs:
        script, *flags = run.command()
        assert script == f"{run.script}.py" and (clone.ROOT / script).exists()
        assert parse(importlib.import_module(run.script).Config, "", flags) == run.config
        assert run.config.resume and run.config.evaluate_every
        assert (run.config.dataset, run.config.preset, run.config.seed) == (*task, run.seed)
    assert len({run.config.out for run in runs}) == len({run[:3] for run in runs}) == len(runs) > 0


def test_the_grid_holds_the_papers():
    """Section 6.1 of the DPO paper, three seeds of each; --quick is one seed of some of it, in another folder."""
    runs, few = planned(), planned(quick=True)
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


@pytest.mark.parametrize("grid", frontier.GRIDS)
def test_a_sweep_can_be_stopped_anywhere(grid):
    """The first seed first, of it the runs of --quick; then every method is served before one gets its next setting."""
    runs, few = planned(grid=grid), planned(grid=grid, quick=True)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert [run[:3] for run in runs[:len(few)]] == [run[:3] for run in few]
    rest = [run.method for run in runs[len(few):] if run.seed == 0]
    for stop in range(len(rest)):
        started = {method: rest[:stop].count(method) for method in rest if rest[:stop].count(method) < rest.count(method)}
        assert max(started.values()) - min(started.values()) <= 1


def test_every_method_starts_from_the_policy_that_is_named():
    """--sft mine/policy: Preferred-FT, too, and the pairs are those beside it."""
    for run in planned(sft="mine/policy"):
        assert (run.config.init if run.script == "sft" else run.config.sft) == "mine/policy", run.method
        assert run.script != "sft" or run.config.pairs == "mine/pairs-bt/pairs.jsonl"
        assert Path(run.config.out).parent == Path("mine/frontier")


# ---- processes -------------------------------------------------------------------------------------------------------

STUB = """
import os, pathlib, signal, sys, time
seed, out = (sys.argv[sys.argv.index(flag) + 1] if flag in sys.argv else "0" for flag in ("--seed", "--out"))
folder = pathlib.Path(out)
folder.mkdir(parents=True)
def stop(*_):
    (folder / "stopped").touch()
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
print("threads", os.environ["OMP_NUM_THREADS"], flush=True)
(folder / "began").touch()
while seed == "1" and not list(folder.parent.glob("0/began")):
    time.sleep(0.01)
if seed == "1":
    sys.exit("step 7\\rerror: it is broken")
time.sleep(60 if seed == "0" else 0.3)
(folder / "ended").touch()
"""


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """stubs(*seeds): runs of a script that takes no time to start. Seed 0 takes for ever, seed 1 fails, the others end."""
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    return lambda *seeds: [Planned("DPO", "x", seed, "stub", dpo.Config(out=str(tmp_path / f"runs/{seed}"), seed=seed))
                           for seed in seeds]


def test_as_many_runs_at_a_time_as_there_are_workers(stubs, tmp_path, capsys):
    """Two of five at a time, with one thread each; every command is printed, and what a run prints is in a file."""
    sweep.run_all(stubs(2, 3, 4, 5, 6), 2, tmp_path, "")
    times = sorted((p.stat().st_mtime_ns, 1 if p.name == "began" else -1) for p in tmp_path.glob("runs/*/*"))
    running = [sum(change for _, change in times[:i + 1]) for i in range(len(times))]
    assert len(times) == 10 and max(running) == 2 and running[-1] == 0
    assert [(tmp_path / f"output/{seed}.txt").read_text() for seed in (2, 6)] == ["threads 1\n"] * 2
    shown = capsys.readouterr().out
    assert shown.startswith("5 runs, 0 of them there; 2 at a time\n") and shown.count("python stub.py --out ") == 5
    assert f"0 min] python stub.py --out {tmp_path / 'runs/6'} --seed 6\n" in shown


def test_a_run_that_fails_stops_the_sweep_in_one_line(stubs, tmp_path):
    """With the command and the last line that it said; the run beside it may save itself first, the next is not begun."""
    with pytest.raises(SystemExit) as stop:
        sweep.run_all(stubs(0, 1, 2), 2, tmp_path, "")
    assert str(stop.value) == (f"error: python stub.py --out {tmp_path / 'runs/1'} --seed 1: error: it is broken "
                               f"(all of it: {tmp_path / 'output/1.txt'})")
    assert sorted(os.listdir(tmp_path / "runs/0")) == ["began", "stopped"] and not (tmp_path / "runs/2").exists()


# ---- a whole sweep ---------------------------------------------------------------------------------------------------

# one tiny run a method; with --checkpoint-every 0 there is a checkpoint whenever it is stopped
SFT = dict(steps=24, batch_size=8, warmup=2, checkpoint_every=0.0)
DPO = dict(epochs=0.5, batch_size=8, warmup=2, checkpoint_every=0.0)
PPO = dict(target_kl=1, steps=6, batch_size=16, checkpoint_every=0.0)
SMALL = {"Preferred-FT": ("sft", SFT), "DPO": ("dpo", dict(**DPO, lr=4.0)), "PPO-GT": ("ppo", dict(**PPO, reward="gold")),
         "Unlikelihood": ("dpo", dict(**DPO, loss="unlikelihood")), "PPO": ("ppo", PPO)}
EVERY = {"sft": 12, "dpo": 30, "ppo": 4}  # steps between evaluations
SWEEP = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
import common.settings
from experiments import frontier
small, every = map(json.loads, sys.argv[2:4])
frontier.EVERY = {(False, script): steps for script, steps in every.items()}
frontier.GRIDS["paper"] = {method: (importlib.import_module(script), [settings], [settings])
                           for method, (script, settings) in small.items()}
frontier.main(common.settings.parse(frontier.Config, "", sys.argv[4:]))
"""
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


def run_sweep(root: Path, cwd: Path, popen=Here) -> int | str | None:
    """The sweep of SMALL in this process; 0, or the message that it stops with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "ROOT", root)
        patch.setattr(subprocess, "Popen", popen)
        patch.setattr(time, "sleep", lambda _: None)
        patch.setattr(dpo, "draw", lambda *_: None)  # a second of matplotlib each
        patch.setattr(ppo, "draw_run", lambda *_: None)
        patch.setattr(frontier, "EVERY", {(False, script): steps for script, steps in EVERY.items()})
        patch.setitem(frontier.GRIDS, "paper", {method: (importlib.import_module(script), [settings], [settings])
                                                for method, (script, settings) in SMALL.items()})
        return clone.run_here(root, cwd, "experiments/frontier", *ARGUMENTS)


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory) -> Path:
    """A working folder with an SFT policy, all that the runs share, and a sweep that nothing disturbed."""
    cwd = tmp_path_factory.mktemp("alone")
    assert clone.run_here(root, cwd, "sft", *clone.TINY) == 0
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
    assert list(by_run(rows)) == list(SMALL) and steps["Preferred-FT"] == [0, 12, 24] and steps["PPO"] == [0, 4, 6]
    assert [row["step"] for row in rows if row["last"]] == [found[-1] for found in steps.values()]
    assert {row["method"]: (row["samples"], row["reward_calls"]) for row in rows}["PPO-GT"] == (96, 96)
    assert {row["lr"] for row in rows if row["method"] == "DPO"} == {4 * dpo.Config().lr}
    text = (alone / SWEPT / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in text[2:9]] == [f"| {name}" for name in (*SMALL, "best of n", "**optimum**")]
    assert (alone / SWEPT / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (alone / SWEPT / "frontier.svg").read_text()[:500]


def test_what_is_finished_is_not_run_again(root, alone):
    """A second start makes rows and table of what is there, the same as before, and touches nothing else."""
    made = ("results.jsonl", "table.md", "frontier.png", "frontier.svg")
    rest = lambda: {name: file for name, file in tree(alone).items() if not name.endswith(made)}  # noqa: E731
    before, rows, text = rest(), results(alone), (alone / SWEPT / "table.md").read_bytes()
    assert run_sweep(root, alone, popen=nothing) == 0
    assert (rest(), results(alone), (alone / SWEPT / "table.md").read_bytes()) == (before, rows, text)


def test_runs_of_other_settings_or_of_another_policy_stop_the_sweep(root, alone, fresh):
    """By name, in one line, with rows, table and figure as they were; other settings before anything else is run."""
    shutil.copytree(alone / SWEPT, fresh / SWEPT)
    config = next((fresh / SWEPT).glob("ppo-gt*")) / "config.json"
    settings, name = json.loads(config.read_text()), f"error: {config.parent.relative_to(fresh)} was made "
    for changed, expected in (({"built_from": {**settings["built_from"], "sft": "another"}}, f"{name}from another SFT policy"),
                              ({"batch_size": 99}, f"{name}with other settings: batch_size was 99, now 16: ")):
        config.write_text(json.dumps({**settings, **changed}))
        if "batch_size" in changed:
            shutil.rmtree(next((fresh / SWEPT).glob("unlikelihood*")))
        before = tree(fresh / SWEPT)
        said = run_sweep(root, fresh, popen=nothing)
        assert isinstance(said, str) and said.startswith(expected) and "\n" not in said
        assert tree(fresh / SWEPT) == before


def processes_of(root: Path) -> list[bytes]:
    """Command lines of all processes that run a script of this copy."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(line.read_bytes())
        except OSError:
            pass  # it has just ended
    return [line for line in found if str(root).encode() in line]


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc, and only Linux ends a child with its parent")
def test_a_sweep_that_is_killed_and_interrupted_ends_where_one_that_was_left_alone_ends(root, alone, fresh):
    """As real processes: kill -9 in the middle of a run and then Ctrl-C in the middle of another leave no run behind; the third
    start finishes, with the rows of the undisturbed sweep, digit by digit."""
    folder, small = fresh / SWEPT, {method: SMALL[method] for method in ("Preferred-FT", "PPO-GT")}

    def start() -> subprocess.Popen:
        command = [sys.executable, "-c", SWEEP, root, json.dumps(small), json.dumps(EVERY), *ARGUMENTS]
        return subprocess.Popen(command, cwd=fresh, env=clone.environment(), text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)

    def done() -> int:
        return len(list(folder.glob("*/model.pt")))

    def underway() -> list[Path]:
        return [path for path in folder.glob("*/checkpoint.pt") if not path.with_name("model.pt").exists()]

    for stop, moment, runs in ((signal.SIGKILL, underway, 0), (signal.SIGINT, lambda: done() and underway(), 1)):
        process = start()
        wait_for(moment, process)
        assert len(processes_of(root)) >= 2
        process.send_signal(stop)
        output, errors = process.communicate(timeout=60)
        end = time.monotonic() + 5  # the kernel takes a moment
        while (left := processes_of(root)) and time.monotonic() < end:
            time.sleep(0.01)
        assert not left and done() == runs == len(list(folder.glob("results.jsonl")))  # and none has run on to its end
    assert process.returncode == 130 and not errors, errors  # what is finished has its table
    assert "stopped: table and figure are of the 1 of 2 runs that are finished" in output
    assert results(fresh) == [row for row in results(alone) if row["method"] == "Preferred-FT"]

    process = start()
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and not errors, errors
    assert output.startswith("2 runs, 1 of them there; 1 at a time\n")
    assert results(fresh) == [row for row in results(alone) if row["method"] in small]
