"""Kills, full disks, damaged files, NaNs: what a run survives, and what it refuses to go on with.

Weights are compared bit by bit: a run that was stopped and went on must end where one that was left alone ends.
"""
import contextlib
import dataclasses
import errno
import io
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import classifier
import clone
import data.reviews
import conditioning
import dpo
import expert_iteration
import ppo
import reinforce
import reward_model
import sft
import vargrad
from common import files, pipeline, rewards, run as run_module, tasks
from common.run import Run, load_checkpoint, save_checkpoint, save_tensors
from common.tokenizer import Tokenizer
from conftest import skip_without_loopback

SEED = random.randrange(10**6)  # of the moments of the kills: another one every time, and shown where a test fails
STAGES = {"sft": clone.TINY,
          "reward_model": "--sft {work}/runs/reviews/sft --pairs {work}/pairs.jsonl --batch-size 4 --epochs 12 --warmup 5".split(),
          "classifier": "--dataset reviews --sft {work}/runs/reviews/sft --batch-size 8 --epochs 2 --warmup 5".split(),
          "dpo": "--sft {work}/runs/reviews/sft --pairs {work}/pairs.jsonl --batch-size 4 --epochs 12 --bank-samples 8".split(),
          "ppo": "--sft {work}/runs/reviews/sft --reward gold --bank-samples 8 --batch-size 8 --steps 16 --minibatches 2 --warmup 3 --lr 5e-3 "
                 "--target-kl 0.5 --horizon 20".split(),
          "reinforce": "--sft {work}/runs/reviews/sft --reward gold --bank-samples 8 --batch-size 8 --steps 16 --warmup 3 --lr 5e-3".split(),
          "vargrad": "--sft {work}/runs/reviews/sft --reward gold --bank-samples 8 --batch-size 8 --samples 4 --steps 16 --replay 1 "
                     "--warmup 3 --lr 5e-3".split(),
          "expert_iteration": "--sft {work}/runs/reviews/sft --reward gold --bank-samples 8 --batch-size 8 --rounds 2 --round-prompts 16 "
                              "--samples 2 --warmup 3".split(),
          "conditioning": "--sft {work}/runs/reviews/sft --reward gold --bank-samples 8 --batch-size 8 --rounds 2 --round-prompts 16 "
                          "--samples 2 --on samples --warmup 3".split()}
EVERY_STEP = ("--checkpoint-every", "0")


@pytest.fixture(scope="module")
def work(root, tmp_path_factory) -> Path:
    """A folder with a finished SFT run and a pairs file, and runs of the other stages that nothing disturbed."""
    work = tmp_path_factory.mktemp("work")
    clone.write_pairs(work / "pairs.jsonl")
    for stage in STAGES:
        assert run(root, work, stage, *arguments(stage, work), "--out", f"runs/reviews/{stage}") == 0
    return work


def arguments(stage: str, work: Path) -> list[str]:
    return [word.format(work=work) for word in STAGES[stage]]


def run(root: Path, cwd: Path, stage: str, *argv: str) -> int | str | None:
    return clone.run_here(root, cwd, stage, *argv)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)["model"]


def same_weights(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def log(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def last_step(folder: Path) -> int:
    """The last step in the log, -1 before there is one. Not every step need be logged."""
    path = folder / "log.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else -1


def wait_for(condition, process: subprocess.Popen, seconds: float = 60) -> None:
    """Until the condition holds; a process that ends first, or takes a minute, fails the test."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"it ended too early: {process.communicate()}"
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.001)


def stop_at(number: int, process: subprocess.Popen, folder: Path, step: int) -> tuple[int, str]:
    """Send the signal once the log has come to `step` and a checkpoint is there; exit status and stderr."""
    wait_for(lambda: last_step(folder) >= step and (folder / "checkpoint.pt").exists(), process)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def messages(errors: str) -> list[str]:
    """The lines of stderr that are not progress bars (those write \\r)."""
    return [line.strip() for line in errors.splitlines() if line.strip() and "it/s" not in line and "%|" not in line]


# ---- kills and Ctrl-C ------------------------------------------------------------------------------------------------

def test_killed_and_resumed_ends_where_an_undisturbed_run_ends(root, work, tmp_path):
    """kill -9 at a random step, then --resume: weights, optimizer, step and order of the rows all return, and PPO's value
    network, beta that adapts, and what scores are counted from. The other scripts go on after a NaN, below."""
    folder, at, stage = tmp_path / "run", random.Random(SEED).randint(3, 12), "ppo"
    command = [*arguments(stage, work), "--out", folder]
    process = clone.start(root, stage, *command, *EVERY_STEP, cwd=tmp_path)
    assert stop_at(signal.SIGKILL, process, folder, at)[0] == -signal.SIGKILL, f"seed {SEED}"
    assert not (folder / "model.pt").exists()
    assert run(root, tmp_path, stage, *command, "--resume") == 0
    assert same_weights(folder, work / "runs/reviews" / stage), f"seed {SEED}, killed near step {at}"
    assert log(folder) == log(work / "runs/reviews" / stage), "each step once, with the same numbers"
    assert not list(folder.glob("checkpoint*")) and not list(folder.glob(".*")), "what a kill leaves is cleared at the end"


@pytest.mark.parametrize("stage, number, status", [("dpo", signal.SIGINT, 130), ("sft", signal.SIGTERM, 143)])
def test_ctrl_c_saves_and_says_how_to_go_on(stage, number, status, root, work, tmp_path):
    """Ctrl-C, and SIGTERM by which a scheduler ends a job, lose nothing: the step in hand is finished and saved, though no
    checkpoint was due for an hour. The exit status says which signal it was."""
    folder = tmp_path / "run"
    command = [*arguments(stage, work), "--out", folder]
    process = clone.start(root, stage, *command, "--checkpoint-every", "3600", cwd=tmp_path)
    wait_for(lambda: last_step(folder) >= 3, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    said = messages(errors)
    assert len(said) == 1 and "--resume" in said[0], errors
    done = load_checkpoint(folder / "checkpoint.pt")["step"]
    assert said[0] == f"stopped after step {done}; go on with --resume" and done > last_step(folder)
    assert run(root, tmp_path, stage, *command, "--resume") == 0
    assert same_weights(folder, work / "runs/reviews" / stage) and log(folder) == log(work / "runs/reviews" / stage)


LIKE_WINDOWS = """
import os, runpy, signal, sys
signal.SIGBREAK = signal.SIGUSR1
sys.modules["fcntl"] = None
del os.statvfs, os.ST_RDONLY
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="SIGUSR1 plays Ctrl-Break")
def test_ctrl_break_is_ctrl_c_where_unix_is_missing(root, work, tmp_path):
    """As on Windows, where a sweep stops its runs with SIGBREAK, and there are no locks and no statvfs: played with SIGUSR1."""
    folder = tmp_path / "run"
    command = [*arguments("dpo", work), "--out", folder]
    program = [sys.executable, "-c", LIKE_WINDOWS, root / "dpo.py", *map(str, command), "--checkpoint-every", "3600"]
    process = subprocess.Popen(program, cwd=tmp_path, env=clone.environment(), text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    wait_for(lambda: last_step(folder) >= 3, process)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    said = messages(errors)
    assert process.returncode == 130 and len(said) == 1 and said[0].startswith("stopped after step"), errors
    assert run(root, tmp_path, "dpo", *command, "--resume") == 0
    assert same_weights(folder, work / "runs/reviews/dpo") and log(folder) == log(work / "runs/reviews/dpo")


def test_a_run_that_is_stopped_while_it_is_evaluated_goes_on_there(root, work, tmp_path):
    """After the last step there is a checkpoint: what is left is the evaluation, and no step is trained again. No traceback
    and one line, where no Run is there to catch the signal."""
    shutil.copytree(work / "runs/reviews/sft", tmp_path / "runs/sft")
    command = ["--sft", "runs/sft", "--pairs", work / "pairs.jsonl", "--out", "runs/dpo", "--batch-size", "4", "--warmup", "1"]
    process = clone.start(root, "dpo", *command, cwd=tmp_path)
    folder = tmp_path / "runs/dpo"
    wait_for(lambda: (folder / "checkpoint.pt").exists() and last_row(folder).get("held_out_loss"), process)  # sampling begins
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT) and messages(errors) == ["stopped"], errors
    assert not (folder / "model.pt").exists()
    trained = log(folder)
    assert run(root, tmp_path, "dpo", *command) == "error: runs/dpo holds an unfinished run: go on with --resume, or delete the folder"
    assert run(root, tmp_path, "dpo", *command, "--resume") == 0
    assert log(folder) == trained and (folder / "evaluation.json").exists() and (folder / "model.pt").exists()


def last_row(folder: Path) -> dict:
    path = folder / "log.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1]) if lines else {}


@pytest.mark.parametrize("script", ["dpo", "bt", "experiments/frontier", "evaluate"])
def test_ctrl_c_while_importing_prints_no_traceback(script, root, tmp_path):
    """Nearly all of a script's first second is the import of torch. Python itself, before our first line, is not ours."""
    program = (f"import sys, os, signal, runpy\nsys.argv = [{str(root / script)!r} + '.py', '--help']\n"
               f"sys.modules['__main__'].__file__ = sys.argv[0]\nsys.path.insert(0, {str(root)!r})\n"
               "import common\nos.kill(os.getpid(), signal.SIGINT)\nimport torch\n")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=clone.environment())
    assert done.returncode in (130, -signal.SIGINT) and done.stderr == "\nstopped\n", done.stderr


def test_the_second_of_two_processes_in_a_folder_stops(root, work, tmp_path, monkeypatch):
    """The first has the folder until it ends; one that was killed has nothing."""
    command = [*clone.TINY, "--steps", "3000", "--out", "run", *EVERY_STEP]
    with clone.start(root, "sft", *command, cwd=tmp_path) as first:
        wait_for(lambda: (tmp_path / "run/checkpoint.pt").exists() and last_step(tmp_path / "run") >= 0, first)
        said = [run(root, tmp_path, "sft", *command, *more) for more in ([], ["--resume"])]
        first.kill()
    assert all(line.startswith("error: ") and "\n" not in line for line in said)
    assert "another process is writing there" in said[0] or "holds an unfinished run" in said[0]
    assert "another process is writing there" in said[1]
    before = load_checkpoint(tmp_path / "run/checkpoint.pt")["step"]
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_checkpoint", stop)
        with pytest.raises(Stopped, match=str(before + 1)):
            run(root, tmp_path, "sft", *command, "--resume")


class Stopped(Exception):
    """A run that a test breaks off."""


def stop(_: Path, state: dict) -> None:
    """In place of save_checkpoint."""
    raise Stopped(state["step"])


@pytest.mark.parametrize("stage", STAGES)
def test_another_seed_is_another_result(stage, root, work, tmp_path):
    """That one seed is one result is part of the tests that stop a run and go on."""
    assert run(root, tmp_path, stage, *arguments(stage, work), "--out", "other", "--seed", "1") == 0
    assert not same_weights(tmp_path / "other", work / "runs/reviews" / stage)


# ---- checkpoint files ------------------------------------------------------------------------------------------------

def interrupted_sft(root: Path, work: Path, tmp_path: Path, monkeypatch, steps: int = 9) -> tuple[Path, list]:
    """An SFT run that stopped after `steps` steps, with a checkpoint of each; and the command that goes on with it."""
    count, save = 0, save_checkpoint

    def save_some(path, state):
        nonlocal count
        save(path, state)
        count += 1
        if count == steps:
            raise Stopped

    command = [*arguments("sft", work), "--out", "run", *EVERY_STEP]
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_checkpoint", save_some)
        with pytest.raises(Stopped):
            clone.run_here(root, tmp_path, "sft", *command)
    return tmp_path / "run", [*command, "--resume"]


@pytest.fixture(scope="module")
def stopped_at_25(root, work, tmp_path_factory) -> tuple[Path, list]:
    """Such a run, and that command; to be copied."""
    with pytest.MonkeyPatch.context() as patch:
        return interrupted_sft(root, work, tmp_path_factory.mktemp("stopped"), patch, steps=25)


def test_the_checkpoint_before_is_kept(tmp_path):
    """save_checkpoint leaves two files: the newest, and the one before it."""
    path = tmp_path / "checkpoint.pt"
    assert load_checkpoint(path) is None
    for step in range(4):
        save_checkpoint(path, {"step": step})
        assert load_checkpoint(path) == {"step": step}
    assert load_checkpoint(tmp_path / "checkpoint.prev.pt") == {"step": 2}
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.prev.pt", "checkpoint.pt"]
    path.unlink()  # a kill between the two renames of a save leaves only the one before
    assert load_checkpoint(path) == {"step": 2}


def flipped(content: bytes) -> bytes:
    """One bit of a weight is another one; torch.load does not notice."""
    middle = len(content) // 2
    changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]
    assert isinstance(torch.load(io.BytesIO(changed), weights_only=True), dict)
    return changed


def other_state(_: bytes) -> bytes:
    file = io.BytesIO()
    torch.save({"x": 1}, file)
    return file.getvalue()


DAMAGES = {"half": lambda b: b[:len(b) // 2], "empty": lambda b: b"", "zeroed": lambda b: b[:200] + bytes(300) + b[500:],
           "text": lambda b: b"not a checkpoint", "one bit": flipped, "other keys": other_state}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    for step in range(2):
        save_checkpoint(path, {"step": step, "weights": torch.randn(1000)})
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert load_checkpoint(path, "step", "weights")["step"] == 0
    said = capsys.readouterr().err
    assert f"damaged checkpoint: {path} (" in said and f"using {path.with_suffix('.prev.pt')}" in said and said.count("\n") == 1


def test_a_damaged_checkpoint_costs_one_step_not_the_run(root, work, tmp_path, monkeypatch, capsys):
    """The resumed run still ends bit by bit where it would have."""
    folder, resume = interrupted_sft(root, work, tmp_path, monkeypatch)
    newest = folder / "checkpoint.pt"
    newest.write_bytes(flipped(newest.read_bytes()))
    assert clone.run_here(root, tmp_path, "sft", *resume) == 0
    assert "at step 8" in capsys.readouterr().out
    assert same_weights(folder, work / "runs/reviews/sft") and log(folder) == log(work / "runs/reviews/sft")


def test_two_damaged_checkpoints_stop_in_one_line(root, work, tmp_path, monkeypatch):
    """Starting again from step 0 would throw a run away that may still be rescued by hand."""
    folder, resume = interrupted_sft(root, work, tmp_path, monkeypatch)
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        (folder / name).write_bytes(b"nothing")
    before = tree(folder)
    said = clone.run_here(root, tmp_path, "sft", *resume)
    assert said.startswith("error: no checkpoint can be read") and said.count("\n") == 0
    assert "checkpoint.pt" in said and "checkpoint.prev.pt" in said
    assert without(tree(folder), "config.json") == without(before, "config.json")


def tree(folder: Path) -> dict[str, tuple[bytes, int] | None]:
    """Every file and folder below, with its bytes and time of change: what 'nothing was touched' means."""
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
            for path in sorted(folder.rglob("*"))}


def without(files: dict, name: str) -> dict:
    return {path: value for path, value in files.items() if path != name}


def test_a_flipped_byte_in_a_model_is_noticed(root, work, tmp_path):
    """It would train another policy, with nothing to tell by."""
    shutil.copytree(work / "runs/reviews/sft", tmp_path / "sft")
    path = tmp_path / "sft/model.pt"
    path.write_bytes(flipped(path.read_bytes()))
    said = run(root, tmp_path, "dpo", "--sft", "sft", "--pairs", work / "pairs.jsonl", "--out", "new")
    assert said == "error: sft/model.pt: cannot be read (its checksum does not fit)"


@pytest.fixture
def resumable(stopped_at_25, tmp_path) -> tuple[Path, list]:
    """A copy of it, as ./run."""
    folder = shutil.copytree(stopped_at_25[0], tmp_path / "run")
    assert [row["step"] for row in log(folder)] == [0, 10, 20]
    return folder, stopped_at_25[1]


def change_checkpoint(folder: Path, **changes) -> None:
    state = run_module.load_tensors(folder / "checkpoint.pt")
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        save_tensors(folder / name, {**state, **changes})


BAD_STATES = {  # what has happened to the folder of a stopped run: what is said
    "no log": (lambda f: (f / "log.jsonl").unlink(), "has 0 of the 3 rows before step 25"),
    "log of NUL": (lambda f: (f / "log.jsonl").write_bytes(bytes(300)), "has 0 of the 3 rows before step 25"),
    "log cut": (lambda f: (f / "log.jsonl").write_text("".join((f / "log.jsonl").read_text().splitlines(True)[:2])), "has 2 of the 3"),
    "log damaged": (lambda f: (f / "log.jsonl").write_bytes((f / "log.jsonl").read_bytes()[:60] + b"\xff}\n{"), "of the 3 rows"),
    "log a folder": (lambda f: ((f / "log.jsonl").unlink(), (f / "log.jsonl").mkdir()), "log.jsonl: cannot be read"),
    "no config": (lambda f: (f / "config.json").unlink(), "a checkpoint without config.json"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: expected a JSON object, found list"),
    "config null": (lambda f: (f / "config.json").write_text("null"), "config.json: expected a JSON object, found NoneType"),
    "config nested": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json: not JSON"),
    "step beyond": (lambda f: change_checkpoint(f, step=10**6), "is of step 1000000, and this run has 80"),
    "other shapes": (lambda f: change_checkpoint(f, model={"wte.weight": torch.zeros(2, 2)}), "is of another model ("),
    "an optimizer less": (lambda f: change_checkpoint(f, optimizers=[]), "is of another model (")}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_folder_that_is_not_as_it_was_left_stops_in_one_line(case, root, resumable, tmp_path):
    """Nothing is taken as it is, and nothing more is lost: the run can still be rescued by hand."""
    folder, resume = resumable
    damage, expected = BAD_STATES[case]
    damage(folder)
    before = tree(folder)
    said = clone.run_here(root, tmp_path, "sft", *resume)
    assert isinstance(said, str) and said.startswith("error: ") and expected in said and "\n" not in said, said
    assert tree(folder) == before


def test_rows_after_the_checkpoint_are_logged_again_and_what_is_broken_there_does_not_matter(root, work, resumable, tmp_path):
    folder, resume = resumable
    with (folder / "log.jsonl").open("ab") as file:
        file.write(b'{"step": 30, "loss": 9}\ngarbage}\n{"step": 4')
    assert clone.run_here(root, tmp_path, "sft", *resume) == 0
    assert log(folder) == log(work / "runs/reviews/sft") and same_weights(folder, work / "runs/reviews/sft")


def test_a_run_that_begins_anew_is_unfinished_until_it_has_ended(root, work, tmp_path, monkeypatch):
    """The same command twice: an old model.pt beside a new log would pass for a finished run."""
    command = [*arguments("dpo", work), "--out", "run"]
    assert run(root, tmp_path, "dpo", *command) == 0
    def stop(*_, **__):
        raise Stopped
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "losses_of", stop)
        with pytest.raises(Stopped):
            run(root, tmp_path, "dpo", *command)
    assert not (tmp_path / "run/model.pt").exists() and not (tmp_path / "run/evaluation.json").exists()


def test_a_setting_that_an_old_run_does_not_know_had_its_default(root, work, tmp_path):
    """A new field in a Config must not make every finished run unusable; another value of it is another run."""
    shutil.copytree(work / "runs/reviews/dpo", tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    del config["label_smoothing"]
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    command = [*arguments("dpo", work), "--out", "run"]
    assert "label_smoothing was 0.0, now 0.1" in run(root, tmp_path, "dpo", *command, "--label-smoothing", "0.1")
    assert run(root, tmp_path, "dpo", *command) == 0


@pytest.mark.parametrize("out", ["a\0b", "x" * 300, "a/" + "y" * 300, "\ud800"], ids=["NUL", "long", "long below", "surrogate"])
def test_a_name_that_no_folder_can_have_is_refused(out, root, tmp_path):
    said = clone.run_here(root, tmp_path, "sft", "--out", out)
    assert said.startswith("error: ") and "no name for a folder" in said and "\n" not in said and len(said) < 400
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_is_cleared(tmp_path):
    """Temporary files of processes that are gone; those of one that runs stay."""
    left = tmp_path / ".bank.jsonl.999999999.tmp"
    ours = tmp_path / f".bank.jsonl.{os.getppid()}.tmp"
    for path in (left, ours):
        path.write_text("half")
    files.write_json(tmp_path / "bank.jsonl", {})
    assert sorted(os.listdir(tmp_path)) == [ours.name, "bank.jsonl"]
    folder = tmp_path / ".prepared.999999999.tmp"
    folder.mkdir()
    tasks.publish(tmp_path / "prepared", "x", lambda temporary: {"n": (temporary / "train.jsonl").write_text("{}\n")})
    assert not folder.exists() and (tmp_path / "prepared").exists()


def test_output_that_nobody_reads_costs_nothing(root, work, tmp_path):
    """python dpo.py | head -1: the evaluation is written before a line of it is printed, and there is no traceback."""
    command = [sys.executable, str(root / "dpo.py"), *arguments("dpo", work), "--out", "run"]
    done = subprocess.run(["bash", "-c", '"$@" 2>err | head -1', "bash", *command], cwd=tmp_path, env=clone.environment())
    said = messages((tmp_path / "err").read_text())
    assert done.returncode == 0 and not [line for line in said if "Traceback" in line or "Error" in line], said
    assert {"evaluation.json", "samples.jsonl", "figure.png", "model.pt"} <= set(os.listdir(tmp_path / "run"))


@pytest.mark.parametrize("where", ["fsync", "rename"])
def test_a_failing_write_leaves_the_old_file(where, tmp_path, monkeypatch):
    """No space at the last moment: one line, the old file as it was, and no half of a new one."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync" if where == "fsync" else "replace", full)
        with pytest.raises(SystemExit, match=r"^error: .*checkpoint.pt: cannot be written \(No space left on device\)$"):
            save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("room", [700, 5_000, 40_100, 40_900])
def test_a_disk_that_fills_up_while_torch_saves(room, tmp_path):
    """The real thing, by the limit on the size of a file: torch makes a RuntimeError of it that tells nobody anything."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(SystemExit, match=r"cannot be written \(File too large\)$"):
            save_checkpoint(path, {"step": 2, "weights": torch.ones(10_000)})  # 40,000 bytes and some
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_disk_that_fills_up_while_the_log_is_written(root, work, tmp_path):
    """The log is written at every step, so it is what fails first: one line, and the checkpoint before it is whole."""
    command = f"{sys.executable} {root / 'dpo.py'} --sft {work / 'runs/reviews/sft'} --pairs {work / 'pairs.jsonl'} --out run"
    done = subprocess.run(["bash", "-c", f"ulimit -f 8; exec {command} --bank-samples 8 --batch-size 1 --epochs 4"],  # 8 kB a file
                          cwd=tmp_path, capture_output=True, text=True, env=clone.environment())
    assert done.returncode == 1 and messages(done.stderr) == ["error: run/log.jsonl: cannot be written (File too large)"]
    assert not (tmp_path / "run/model.pt").exists()


KILL_WHILE_SAVING = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from common.run import load_checkpoint, save_checkpoint
torch.set_num_threads(1)  # a fork does not copy the other threads, and a child that waits for them never wakes up
when, parent = random.Random(int(sys.argv[2])), os.getpid()
for kill in range(12):
    path = Path(f"kill-{kill}/checkpoint.pt")
    child = os.fork()
    step = 0
    while child == 0 and os.getppid() == parent:  # not for ever, if the test itself is killed
        save_checkpoint(path, {"step": step, "weights": torch.full((200_000,), float(step))})
        step += 1
    if child == 0:
        os._exit(0)
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end
    time.sleep(when.uniform(0, 0.03))  # not to wait for anything: the moment of the kill
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    state = load_checkpoint(path)
    assert state["weights"].eq(state["step"]).all() and len(state["weights"]) == 200_000
print("loaded after every kill")
"""


def test_kill_in_the_middle_of_saving(tmp_path):
    """A process that does nothing but save is killed 12 times at random moments: what is there loads, and is whole."""
    done = subprocess.run([sys.executable, "-c", KILL_WHILE_SAVING, clone.ROOT, str(SEED)], cwd=tmp_path, text=True,
                          capture_output=True, env=clone.environment())
    assert done.stdout == "loaded after every kill\n" and not done.stderr, f"seed {SEED}: {done.stderr}"


# ---- files that would run code ---------------------------------------------------------------------------------------

class Trap:
    """Unpickling it creates a file: what any program could be in its place."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return io.open, (str(self.marker), "w")


@pytest.mark.parametrize("packed", ["pickle", "torch"])
def test_no_file_we_load_runs_code(packed, root, work, tmp_path, monkeypatch, capsys):
    """Weights come from strangers. Wherever a .pt is read, a trap in it stays shut and one line says it is not readable."""
    marker = tmp_path / "the trap was sprung"

    def set_trap(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"model": Trap(marker), "step": Trap(marker), "architecture": Trap(marker), "kind": "GPT"}
        path.write_bytes(pickle.dumps(content, protocol=2)) if packed == "pickle" else torch.save(content, path)

    set_trap(tmp_path / "trap.pt")
    with contextlib.suppress(RuntimeError):
        torch.load(tmp_path / "trap.pt", weights_only=False)
    assert marker.exists(), "the trap works"
    marker.unlink()

    folder, resume = interrupted_sft(root, work, tmp_path, monkeypatch, steps=2)
    set_trap(folder / "checkpoint.pt")
    assert clone.run_here(root, tmp_path, "sft", *resume) == 0  # from the one before
    assert "damaged checkpoint" in capsys.readouterr().err and not marker.exists()

    shutil.copytree(work / "runs/reviews/sft", tmp_path / "runs/reviews/sft")
    set_trap(tmp_path / "runs/reviews/sft/model.pt")
    shutil.copytree(work / "runs/reviews/dpo", tmp_path / "runs/reviews/dpo")
    set_trap(tmp_path / "runs/reviews/dpo/model.pt")
    set_trap(tmp_path / "runs/imdb/gold/model.pt")
    for attempt in (lambda: clone.run_here(root, tmp_path, "sft", "--init", "runs/reviews/sft", "--out", "new"),
                    lambda: clone.run_here(root, tmp_path, "dpo", "--sft", "runs/reviews/sft", "--out", "new"),
                    lambda: clone.run_here(root, tmp_path, "reward_model", "--sft", "runs/reviews/sft", "--out", "new"),
                    lambda: clone.run_here(root, tmp_path, "ppo", "--sft", "runs/reviews/sft", "--out", "new"),
                    lambda: clone.run_here(root, tmp_path, "ppo", "--sft", work / "runs/reviews/sft", "--out", "new",
                                           "--reward", "runs/imdb/gold"),
                    lambda: clone.run_here(root, tmp_path, "evaluate", "runs/reviews/dpo")):
        said = attempt()
        assert said.startswith("error: ") and "\n" not in said and not marker.exists(), said
    (tmp_path / "runs/imdb/gold/config.json").write_text("{}")
    with pytest.raises(SystemExit, match="cannot be read"):
        rewards.gold_model(tmp_path / "runs/imdb/gold")
    assert not marker.exists() and not (tmp_path / "new").exists()


# ---- NaN -------------------------------------------------------------------------------------------------------------

LOSSES = {"sft": (sft, "response_logprobs", "loss = nan"), "reward_model": (reward_model, "reward_loss", "loss = nan"),
          "dpo": (dpo, "dpo_loss", "chosen_reward = nan"), "ppo": (ppo, "compute_rewards", "value_loss = nan"),
          "reinforce": (reinforce, "leave_one_out", "loss = nan"), "vargrad": (vargrad, "variance_loss", "loss = nan"),
          "expert_iteration": (expert_iteration, "response_logprobs", "loss = nan"),
          "conditioning": (conditioning, "quark_losses", "kl = nan"),
          "classifier": (classifier, "prefix_loss", "loss = nan")}


@pytest.mark.parametrize("stage", LOSSES)
def test_a_nan_stops_the_run_and_spares_the_checkpoint(stage, root, work, tmp_path, monkeypatch):
    """The message names step, rows and every part; the last good checkpoint keeps its bytes, and the run can go on."""
    module, name, part = LOSSES[stage]
    original, calls, saved = getattr(module, name), 0, {}
    folder = tmp_path / "run"

    def poisoned(*inputs, **keywords):
        nonlocal calls
        result = original(*inputs, **keywords)
        calls += 1
        if calls <= (11 if stage == "vargrad" else 6):  # from its second update on it has two batches
            return result
        saved.update({path.name: path.read_bytes() for path in folder.glob("*.pt")})
        return tuple(x * float("nan") for x in result) if isinstance(result, tuple) else result * float("nan")

    command = [*arguments(stage, work), "--out", folder, *EVERY_STEP]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, poisoned)
        said = run(root, tmp_path, stage, *command)
    assert said.startswith("error: step 6: loss = nan") and part in said and "grad_norm = nan" in said and "rows [" in said
    assert "\n" not in said
    assert set(saved) == {"checkpoint.pt", "checkpoint.prev.pt"}
    assert {path.name: path.read_bytes() for path in folder.glob("*.pt")} == saved
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "Ctrl-C is no longer the run's"
    assert run(root, tmp_path, stage, *command, "--resume") == 0
    assert same_weights(folder, work / "runs/reviews" / stage) and log(folder) == log(work / "runs/reviews" / stage)


def test_one_nan_in_the_weights_stops_the_run(root, work, tmp_path):
    """A damaged policy: one NaN in the embedding, and nothing is sampled from it or trained on it."""
    shutil.copytree(work / "runs/reviews/sft", tmp_path / "poisoned/sft")
    state = torch.load(tmp_path / "poisoned/sft/model.pt", weights_only=True)
    del state["checksum"]
    state["model"]["wte.weight"][100, 0] = float("nan")
    torch.save(state, tmp_path / "poisoned/sft/model.pt")
    for stage, argv in (("dpo", ["--sft", "poisoned/sft", "--pairs", work / "pairs.jsonl"]), ("ppo", ["--sft", "poisoned/sft"]),
                        ("sft", ["--init", "poisoned/sft", "--steps", "20"])):
        said = run(root, tmp_path, stage, *argv, "--out", stage)
        assert said == "error: poisoned/sft/model.pt: wte.weight is not finite"
        assert not (tmp_path / stage).exists()


def test_an_infinity_counts_as_well():
    """inf - inf is the NaN of the next step."""
    run = object.__new__(Run)
    run.folder, run._handlers = Path("runs/x"), {}
    run.check_finite(3, torch.tensor([5, 6]), loss=1.0)
    with pytest.raises(SystemExit, match=r"step 3: loss = 1.0, grad_norm = inf; rows \[5, 6\]"):
        run.check_finite(3, torch.tensor([5, 6]), loss=1.0, grad_norm=float("inf"))


# ---- what the stages build for one another ---------------------------------------------------------------------------

def test_a_prepared_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    """A preparation that fails half-way leaves nothing behind; a killed one leaves no folder of that name."""
    folder = tmp_path / "prepared"

    def fails(temporary):
        (temporary / "train.jsonl").write_text("{}\n")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(SystemExit, match=r"^error: .*prepared: cannot be written \(No space left on device\)$"):
        tasks.publish(folder, "x", fails)
    assert os.listdir(tmp_path) == []

    left = tmp_path / f".prepared.{os.getpid()}.tmp"  # as kill -9 leaves it; in a container, the next process has its id
    left.mkdir()
    (left / "half.jsonl").write_text("{")
    assert tasks.check_prepared(folder) is None
    tasks.publish(folder, "x", lambda temporary: {"n": (temporary / "train.jsonl").write_text("{}\n")})
    assert sorted(os.listdir(folder)) == ["meta.json", "train.jsonl"] and os.listdir(tmp_path) == ["prepared"]
    assert tasks.check_prepared(folder)["n"] == 3


def test_kill_in_the_middle_of_preparing(tmp_path):
    """kill -9 while the files are written: whoever looks for the folder finds none, and prepares it again."""
    program = ("import sys; sys.path.insert(0, sys.argv[1]); from common import tasks; from pathlib import Path\n"
               "def write(folder):\n"
               "    (folder / 'train.jsonl').write_text('half'); print('writing', flush=True)\n"
               "    while True: pass\n"
               "tasks.publish(Path('prepared'), 'x', write)")
    with subprocess.Popen([sys.executable, "-c", program, clone.ROOT], cwd=tmp_path, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        process.kill()
    assert tasks.check_prepared(tmp_path / "prepared") is None


@pytest.mark.parametrize("damage", ["cut", "gone", "no meta"])
def test_a_damaged_prepared_file_is_named(damage, root, tmp_path):
    """A train.jsonl cut at a line would train a worse model in silence: its checksum is checked by whoever reads it."""
    shutil.copytree(root, tmp_path / "clone")
    prepared = tmp_path / "clone/data/reviews/prepared"
    victim = prepared / ("meta.json" if damage == "no meta" else "train.jsonl")
    victim.write_text("".join(victim.read_text().splitlines(True)[:-5])) if damage == "cut" else victim.unlink()
    said = clone.run_here(tmp_path / "clone", tmp_path, "sft", *clone.TINY)
    assert said.startswith(f"error: {victim}") and "\n" not in said
    assert os.listdir(tmp_path) == ["clone"]


def test_pairs_and_bank_say_what_they_were_made_of_before_they_exist(root, work, tmp_path, monkeypatch):
    """A kill between the file and its settings must not leave pairs or a bank that would pass for those of any policy."""
    shutil.copytree(work / "runs/reviews/sft", tmp_path / "runs/reviews/sft")
    for name in ("pairs-bt", "bank"):
        def killed(path, rows):
            if path.parent.name == name:
                raise Stopped
            files.write_jsonl(path, rows)
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "write_jsonl", killed)
            with pytest.raises(Stopped):
                clone.run_here(root, tmp_path, "dpo", "--sft", "runs/reviews/sft", *EVERY_STEP)
        assert os.listdir(tmp_path / "runs/reviews" / name) == ["config.json"]
    shutil.rmtree(tmp_path / "runs/reviews/sft")
    assert clone.run_here(root, tmp_path, "sft", *clone.TINY, "--seed", "7", "--out", "runs/reviews/sft") == 0
    said = clone.run_here(root, tmp_path, "dpo", "--sft", "runs/reviews/sft", "--out", "runs/reviews/new")
    assert "pairs-bt was made with other settings: policy was" in said and "delete runs/reviews/pairs-bt" in said


def tiny_task(**settings):
    """The task `reviews` whose SFT policy is tiny."""
    tiny = dict(n_layer=1, n_embd=32, n_head=2, batch_size=8, steps=60, warmup=5, lr=2e-2) | settings
    preset = dataclasses.replace(data.reviews.TASK.presets["cpu"], settings={"sft": tiny}, pair_prompts=40, bank_samples=8)
    return dataclasses.replace(data.reviews.TASK, presets={"cpu": preset})


def test_a_fresh_clone_builds_what_it_lacks_once(root, tmp_path, monkeypatch, capsys):
    """dpo.py alone makes the SFT policy, the pairs and the bank, and ppo.py the reward model, too, each said as the command that
    a user would type; the next run finds them; other settings stop by name."""
    monkeypatch.setattr(data.reviews, "TASK", tiny_task())
    assert clone.run_here(root, tmp_path, "dpo") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("building what is missing: ")]
    assert [line.split(": ")[1].split("   (")[0] for line in said] == ["python sft.py", "pairs", "the bank"]
    assert all(" (about " in line for line in said)
    runs = tmp_path / "runs/reviews"
    assert sorted(os.listdir(runs)) == ["bank", "dpo-beta0.1-seed0", "pairs-bt", "ref-logprobs", "sft"]
    before = {name: tree(runs / name) for name in ("sft", "pairs-bt", "bank", "ref-logprobs")}
    assert clone.run_here(root, tmp_path, "dpo", "--beta", "0.5") == 0
    assert {name: tree(runs / name) for name in before} == before
    small = ["--steps", "2", "--batch-size", "8", "--warmup", "1"]
    assert clone.run_here(root, tmp_path, "ppo", *small) == 0  # lacks the reward model only
    assert {"ppo-beta0.1-seed0-batchsize8-steps2-warmup1", "reward-model"} < set(os.listdir(runs)) or "reward-model" in os.listdir(runs)
    before["reward-model"] = tree(runs / "reward-model")
    assert clone.run_here(root, tmp_path, "reinforce", *small) == 0
    assert {name: tree(runs / name) for name in before} == before
    capsys.readouterr()
    monkeypatch.setattr(data.reviews, "TASK", tiny_task(lr=3e-2))
    said = clone.run_here(root, tmp_path, "dpo", "--beta", "0.2")
    assert said == ("error: runs/reviews/sft was made with other settings: lr was 0.02, now 0.03: delete runs/reviews/sft to "
                    "make it again")
    assert {name: tree(runs / name) for name in before} == before


def test_nothing_that_is_reused_is_stale(root, tmp_path, monkeypatch):
    """Documents prepared again, a gold reward that was edited, a policy or pairs that were made anew: each is noticed by what
    was made of it, and named. Without that, policies were measured by one reward against a bank of another."""
    monkeypatch.setattr(data.reviews, "TASK", tiny_task())
    small = ["--steps", "2", "--batch-size", "8", "--warmup", "1", "--resume"]
    assert clone.run_here(root, tmp_path, "ppo", *small) == 0
    runs = tmp_path / "runs/reviews"

    def blue(text: str) -> float:
        return float("blue" in text)
    with monkeypatch.context() as patch:  # the reward is the first thing that a researcher edits
        patch.setattr(data.reviews, "TASK", dataclasses.replace(tiny_task(), gold_reward=blue))
        said = clone.run_here(root, tmp_path, "dpo")
        assert "pairs-bt was made with other settings: gold was" in said
        shutil.move(runs / "pairs-bt", tmp_path / "pairs")
        said = clone.run_here(root, tmp_path, "dpo")
        assert "bank was made with other settings: gold was" in said
        shutil.rmtree(runs / "pairs-bt")
        shutil.move(tmp_path / "pairs", runs / "pairs-bt")

    pairs = runs / "pairs-bt/pairs.jsonl"  # another file of as many rows: the reward model is of the old one
    rows = pairs.read_text().splitlines(True)
    pairs.write_text("".join(rows[1:] + rows[:1]))
    assert "reward-model was made with other settings: pairs was" in clone.run_here(root, tmp_path, "ppo", *small, "--seed", "1")
    pairs.write_text("".join(rows))

    shutil.copytree(root, tmp_path / "clone", ignore=lambda *_: ["prepared"])
    clone.prepare(tmp_path / "clone", labels=False)  # other documents under the same name
    said = clone.run_here(tmp_path / "clone", tmp_path, "dpo")
    assert "sft was made with other settings: documents was" in said

    config = json.loads((runs / "sft/config.json").read_text())
    del config["built_from"]  # of an earlier version, which did not say
    (runs / "sft/config.json").write_text(json.dumps(config))
    assert "runs/reviews/sft was made with other settings: it does not say which documents" in clone.run_here(root, tmp_path, "dpo")


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_model_pt_is_written_last(stage, root, work, tmp_path, monkeypatch):
    """model.pt says that a run is finished, so all that a finished run needs is there before it: kill it in between."""
    def killed(*_):
        raise Stopped
    monkeypatch.setattr(Tokenizer, "save", killed)
    with pytest.raises(Stopped):
        run(root, tmp_path, stage, *arguments(stage, work), "--out", "run")
    assert not (tmp_path / "run/model.pt").exists()


def test_preferred_ft_knows_what_it_was_built_from(root, work, tmp_path):
    """sft.py --on chosen over another policy or other pairs of the same number is another run, and is stopped by name."""
    shutil.copytree(work / "runs/reviews/sft", tmp_path / "sft")
    pairs = clone.write_pairs(tmp_path / "pairs.jsonl")
    command = ["--on", "chosen", "--init", "sft", "--pairs", "pairs.jsonl", "--out", "pft", "--steps", "5", "--warmup", "1"]
    assert clone.run_here(root, tmp_path, "sft", *command) == 0
    assert clone.run_here(root, tmp_path, "sft", *command) == 0
    clone.write_pairs(pairs, seed=3)
    assert "pairs was" in clone.run_here(root, tmp_path, "sft", *command)


# ---- no network ------------------------------------------------------------------------------------------------------

OUTSIDE = """
import socket
for name in ("connect", "connect_ex"):
    try:
        print(getattr(socket.socket(), name)(("192.0.2.1", 80)))  # TEST-NET: an address that nobody has
    except OSError as error:
        print(error)
for look_up in (lambda: socket.create_connection(("example.org", 80), 1), lambda: socket.getaddrinfo("example.org", 80),
                lambda: socket.gethostbyname("example.org"),
                lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"", ("192.0.2.1", 53))):
    try:
        print(look_up())
    except OSError as error:
        print(error)
"""


def test_the_suite_has_no_network(capsys):
    """Neither these tests nor the processes they start can reach or look up another machine; this one they can."""
    exec(OUTSIDE, {})
    here = capsys.readouterr().out
    there = subprocess.run([sys.executable, "-c", OUTSIDE], capture_output=True, text=True, env=clone.environment()).stdout
    assert here == there and len(here.splitlines()) == 6
    assert all(line.startswith("the tests run without network, but something ") for line in here.splitlines()), here
    skip_without_loopback()
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()  # no guard stands in its way
