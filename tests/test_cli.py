"""The command line: what is refused, in how many words and how early, and what --help promises.

Every refusal is one line "error: ..." on stderr, exit status 1, no traceback, and not a byte changed on disk. It comes
before anything is built: a mistake in the last file that a run reads must not cost the hours of the stages before it.
"""
import ast
import dataclasses
import functools
import importlib
import inspect
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bt
import classifier
import clone
import dagger
import dpo
import ppo
import preference_rl
import reinforce
import reward_model
import sft
from common import files, pipeline, settings
from common.rewards import user_function
from common.run import load_checkpoint, load_run
from common.tokenizer import Tokenizer
from common.training import fingerprint
from experiments import frontier, scaling, winrate
from test_faults import tree

ALGORITHMS = {"sft": sft, "reward_model": reward_model, "dpo": dpo, "reinforce": reinforce, "ppo": ppo}
CONFIGS = {**ALGORITHMS, "classifier": classifier, "bt": bt, "preference_rl": preference_rl, "dagger": dagger,
           "experiments/frontier": frontier, "experiments/scaling": scaling, "experiments/winrate": winrate}
for name in ("vargrad", "expert_iteration", "conditioning", "derive", "dueling", "irl", "tamer", "pebble", "dppo", "label",
             "experiments/quiz", "experiments/distill", "experiments/ablation",
             "experiments/ceiling", "experiments/bench", "experiments/memory", "experiments/clicks", "experiments/ledger",
             "experiments/scores", "experiments/effort", "experiments/length", "experiments/judgements",
             "experiments/overoptimization", "experiments/rewardbench"):
    CONFIGS[name] = importlib.import_module(name.replace("/", "."))
SOURCES = [path for pattern in ("*.py", "common/*.py", "experiments/*.py", "data/*.py", "data/*/*.py")
           for path in clone.ROOT.glob(pattern)]
ROW = {"prompt": "The film was", "chosen": " good.", "rejected": " bad."}


@pytest.fixture(scope="module")
def work(root, tmp_path_factory) -> Path:
    """A working folder with one finished run of each kind, and everything that can be wrong with one."""
    work = tmp_path_factory.mktemp("work")
    runs = work / "runs/reviews"
    clone.write_pairs(work / "pairs.jsonl")
    run = functools.partial(clone.run_here, root, work)
    policy = ["--sft", "runs/reviews/sft"]
    assert run("sft", *clone.SFT) == 0
    assert run("reward_model", *policy, "--pairs", "pairs.jsonl", "--out", "runs/reviews/reward-model") == 0
    assert run("dpo", *policy, "--pairs", "pairs.jsonl", "--out", "runs/reviews/dpo", draw=True) == 0
    for script in "ppo", "reinforce":
        assert run(script, *policy, "--reward", "gold", "--steps", "2", "--batch-size", "8", "--warmup", "1",
                   "--out", f"runs/reviews/{script}") == 0

    def altered(name: str, change) -> None:
        shutil.copytree(runs / "sft", runs / name)
        state = torch.load(runs / name / "model.pt", weights_only=True)
        state.pop("checksum")
        change(state, runs / name)
        torch.save(state, runs / name / "model.pt")

    altered("other-task", lambda state, _: state.update(dataset="imdb"))
    altered("other-tokenizer", lambda _, folder: other_tokenizer(folder))
    altered("unfinished", lambda state, folder: torch.save(state, folder / "checkpoint.pt"))
    (runs / "unfinished/model.pt").unlink()
    shutil.copytree(runs / "sft", runs / "truncated")
    (runs / "truncated/model.pt").write_bytes((runs / "sft/model.pt").read_bytes()[:5000])
    shutil.copytree(runs / "sft", runs / "no-tokenizer")
    (runs / "no-tokenizer/tokenizer.tiktoken").write_text("nothing\n")
    shutil.copytree(runs / "reward-model", runs / "short-reward")
    state = torch.load(runs / "reward-model/model.pt", weights_only=True)
    state.pop("checksum")
    state["model"]["gpt.wpe.weight"] = state["model"]["gpt.wpe.weight"][:20].clone()
    state["architecture"]["block_size"] = 20
    torch.save(state, runs / "short-reward/model.pt")
    shutil.copytree(runs / "dpo", work / "runs/imdb/dpo")
    (work / "runs/imdb/dpo/config.json").write_text(json.dumps({"dataset": "imdb", "preset": "cpu", "sft": "runs/imdb/sft"}))
    (work / "a file").write_text("")
    return work


def other_tokenizer(folder: Path) -> None:
    """As many tokens, but two have changed places: every shape fits, every text means something else."""
    lines = (folder / "tokenizer.tiktoken").read_text().splitlines()
    words = [line.split()[0] for line in lines[300:302]]
    lines[300:302] = [f"{words[1]} 300", f"{words[0]} 301"]
    (folder / "tokenizer.tiktoken").write_text("\n".join(lines) + "\n")
    Tokenizer.load(folder / "tokenizer.tiktoken")


@pytest.fixture
def refused(root, work):
    """refused(script, *argv): the one line it stops with, after which the disk is as it was before."""
    def run(script: str, *argv: str) -> str:
        before = [tree(work), tree(root)]
        said = clone.run_here(root, work, script, *argv)
        assert isinstance(said, str) and said.startswith("error: ") and "\n" not in said, said
        assert [tree(work), tree(root)] == before, "something was written"
        return said
    return run


# ---- flags and numbers -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, expected", [
    (["--nope", "1"], "unrecognized arguments: --nope 1"),
    (["--bet", "1"], "unrecognized arguments"),  # no abbreviations: --lr must not become --lr-something one day
    (["--seed", "one"], "argument --seed: invalid int value: 'one'"),
    (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
    (["--seed"], "argument --seed: expected one argument"),
    (["--preset", "gpu"], "--preset gpu: data/reviews has no such preset (known: cpu)"),
    (["--dataset", "nope"], "--dataset nope: there is no data/nope/prepare.py (known: imdb, posts, reviews, tldr)"),
    (["--out", "a file"], "a file: cannot be written ("),
    (["--out", "a file/below"], "a file/below: cannot be written ("),
    (["--out", "a file/far/below"], "is not a folder)"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
@pytest.mark.parametrize("script", ALGORITHMS)
def test_mistakes_on_the_command_line(script, argv, expected, refused):
    assert expected in refused(script, *argv)


NUMBERS = [(script, field.name, value) for script, module in CONFIGS.items() for field in dataclasses.fields(module.Config)
           for value in {"float": ("nan", "inf", "-1"), "int": ("-1",)}.get(field.type, ())]


@pytest.mark.parametrize("script, name, value", NUMBERS)
def test_every_number_has_a_range(script, name, value):
    """nan passes every `if x <= 0`, and inf trains a model of NaNs: no number of any Config takes them, nor a -1."""
    flag = "--" + name.replace("_", "-")
    with pytest.raises(SystemExit, match=f"^error: {flag} .*: must be "):
        settings.parse(CONFIGS[script].Config, "", [flag, value])


@pytest.mark.parametrize("argv, expected", [
    (["--beta", "0"], "--beta 0.0: must be > 0"), (["--beta", "-0.1"], "--beta -0.1: must be > 0"),
    (["--label-smoothing", "0.5"], "--label-smoothing 0.5: must be in [0, 0.5)"),
    (["--lr", "0"], "--lr 0.0: must be > 0"), (["--batch-size", "0"], "--batch-size 0: must be > 0"),
    (["--epochs", "0"], "--epochs 0.0: must be > 0"), (["--warmup", "0"], "--warmup 0: must be > 0"),
    (["--seed", "1" + 30 * "0"], "must be >= 0 and finite")])
def test_ranges_of_dpo(argv, expected, refused):
    assert expected in refused("dpo", *argv)


@pytest.mark.parametrize("argv, expected", [
    (["--beta", "0"], "--beta 0.0: must be > 0"), (["--target-kl", "-1"], "--target-kl -1.0: must be >= 0"),
    (["--gamma", "1.01"], "unrecognized arguments: --gamma"), (["--lam", "-0.1"], "--lam -0.1: must be in [0, 1]"),
    (["--clip", "0"], "--clip 0.0: must be > 0"), (["--value-clip", "0"], "--value-clip 0.0: must be > 0"),
    (["--warmup", "0"], "--warmup 0: must be > 0"), (["--epochs", "0"], "--epochs 0: must be > 0"),
    (["--batch-size", "12", "--samples", "5"], "--batch-size 12: must be a multiple of --samples 5"),
    (["--batch-size", "4", "--samples", "8"], "--batch-size 4: must be a multiple of --samples 8"),
    (["--batch-size", "4", "--minibatches", "5"], "--minibatches 5: more than --batch-size 4"),
    (["--minibatches", "61", "--reward", "gold", "--sft", "runs/reviews/sft", "--out", "new-ppo"], "--minibatches 61: "),
    (["--prompts", "50", "--reward", "gold"], "--prompts: needs --reward model"),
    (["--pairs-seed", "1", "--reward", "gold"], "--pairs-seed: needs --reward model"), (["--pairs-seed", "-1"], "must be >= 0"),
    (["--horizon", "10"], "--horizon: needs --target-kl"),
    # the change of beta in a batch is at most a fifth of batch / horizon: from 1 on, beta would be 0 or negative
    (["--horizon", "10", "--batch-size", "64", "--target-kl", "1"], "--horizon 10: ")])
def test_ranges_of_ppo(argv, expected, refused):
    """Of 60 prompts a batch is at most 60, which cannot be cut into 61."""
    assert expected in refused("ppo", *argv)


def test_ranges_elsewhere(refused):
    assert "--baseline leave-one-out: needs --samples 2 or more" in refused("reinforce", "--samples", "1")
    assert "--batch-size 10: must be a multiple of --samples 4" in refused("reinforce", "--batch-size", "10")
    for flag, value in (("--n-layer", 10**12), ("--n-embd", 10**12), ("--block-size", 10**12), ("--block-size", 10**30)):
        assert f"{flag} {value}: must be " in refused("sft", flag, str(value))
    assert "n_embd 30 is not a multiple of n_head 4" in refused("sft", "--n-embd", "30", "--out", "new")
    assert "--block-size 2: must be > 2" in refused("sft", "--block-size", "2")
    assert "--block-size 1: must be 0 or > 2" in refused("reward_model", "--block-size", "1")
    for setting in dict(lr=0.0), dict(steps=0), dict(n_layer=0), dict(n_embd=0):  # from Python as well as from flags
        with pytest.raises(SystemExit, match="must be > 0"):
            sft.Config(**setting)


def test_a_flag_that_would_be_ignored_is_refused(refused):
    """--pairs without --on chosen would train on documents for an hour, and never open the file."""
    assert "--pairs: needs --on chosen" in refused("sft", "--pairs", "pairs.jsonl")
    assert "--beta: not with --loss unlikelihood" in refused("dpo", "--loss", "unlikelihood", "--beta", "1")
    assert "--prompts: not with --pairs" in refused("reward_model", "--prompts", "5", "--pairs", "pairs.jsonl")
    for script in ("reward_model", "dpo"):
        assert "--pairs-seed: not with --pairs" in refused(script, "--pairs-seed", "5", "--pairs", "pairs.jsonl")
    assert "--pairs-seed: needs --on chosen" in refused("sft", "--pairs-seed", "5")
    for script in ("reinforce", "vargrad"):
        assert "--pairs-seed: needs --reward model" in refused(script, "--pairs-seed", "5", "--reward", "gold")
    assert "--evaluate-every: needs --on chosen" in refused("sft", "--evaluate-every", "5")


# ---- pairs -----------------------------------------------------------------------------------------------------------

def lines(*rows) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


BAD_PAIRS = {  # content of the file: what the message says behind its name
    "no key": (lines(ROW, {"prompt": "a", "chosen": "b"}), ", line 2: no field 'rejected' (found: prompt, chosen)"),
    "null": (lines(ROW, ROW, {**ROW, "chosen": None}), ", line 3: field 'chosen' is null, expected str"),
    "number": (lines({**ROW, "prompt": 5}), ", line 1: field 'prompt' is 5, expected str"),
    "list": (lines({**ROW, "prompt": [{"role": "user"}]}), ", line 1: field 'prompt' is [{"),
    "bad UTF-8": (lines(ROW, b'{"prompt": "\xff"}'), ", line 2: not UTF-8 (byte 13 of the line)"),
    "bad JSON": (lines(ROW, b"", b'{"prompt": "a",}'), ", line 3: not JSON ("),  # empty lines are skipped, and counted
    "nested": (lines(b"[" * 100_000), ", line 1: not JSON ("),
    "a key twice": (b'{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}\n', ", line 1: not JSON (the key 'chosen' is"),
    "half a surrogate": (b'{"prompt": "a", "chosen": "b\\ud800", "rejected": "c"}\n', ", line 1: field 'chosen' has half a"),
    "array": (lines(["a", "b"]), ", line 1: expected a JSON object with chosen, rejected"),
    "whole file": (json.dumps([ROW], indent=1).encode(), ", line 1: not JSON ("),
    "empty response": (lines(ROW, {**ROW, "rejected": ""}), ", line 2: field 'rejected' is empty"),
    "empty file": (b"", ": empty, expected"),
    "blank file": (b"\n \n", ": empty, expected")}


@pytest.mark.parametrize("script", ["dpo", "reward_model", "sft"])
@pytest.mark.parametrize("case", BAD_PAIRS)
def test_bad_pairs_are_refused_before_anything_is_trained(case, script, root, tmp_path):
    """File, line and field are named; and no SFT policy was trained first, though none is there yet."""
    content, expected = BAD_PAIRS[case]
    (tmp_path / "bad.jsonl").write_bytes(content)
    said = clone.run_here(root, tmp_path, script, "--pairs", "bad.jsonl", *(["--on", "chosen"] if script == "sft" else []))
    assert said.startswith("error: bad.jsonl" + expected) and "\n" not in said, said
    assert os.listdir(tmp_path) == ["bad.jsonl"]


@pytest.mark.parametrize("script", ["dpo", "reward_model", "sft"])
def test_pairs_that_are_not_there(script, refused):
    chosen = ["--out", "new", *(["--on", "chosen"] if script == "sft" else [])]
    assert "nope.jsonl: no such pairs file" in refused(script, "--pairs", "nope.jsonl", *chosen)
    assert "runs: cannot be read (Is a directory)" in refused(script, "--pairs", "runs", *chosen)


@pytest.mark.parametrize("script", ["dpo", "reward_model"])
@pytest.mark.parametrize("rows, expected", [
    ([ROW, {**ROW, "chosen": " good" * 200}], ", line 2: 'chosen' does not fit: prompt "),
    ([ROW, ROW, {**ROW, "prompt": "a film " * 200}], ", line 3: 'chosen' does not fit: prompt "),
    ([{**ROW, "rejected": ROW["chosen"]}] * 3, ": no pair with two different responses"),
], ids=["long response", "long prompt", "identical"])
def test_pairs_that_the_policy_cannot_use(rows, expected, script, work, refused):
    """These need its tokenizer and block size, so they are found once it is there; still nothing is written."""
    (work / "unusable.jsonl").write_bytes(lines(*rows))
    said = refused(script, "--sft", "runs/reviews/sft", "--out", "new", "--pairs", "unusable.jsonl")
    assert said.startswith("error: unusable.jsonl" + expected)


def test_pairs_are_fitted_before_the_gold_classifier_is_trained(refused, work, monkeypatch):
    """On imdb that is the longest stage of all."""
    (work / "unusable.jsonl").write_bytes(lines(ROW, {**ROW, "chosen": " good" * 200}))
    monkeypatch.setattr(pipeline, "gold_reward", lambda *_: pytest.fail("too early"))
    assert "unusable.jsonl, line 2: 'chosen' does not fit" in refused(
        "dpo", "--sft", "runs/reviews/sft", "--out", "new", "--pairs", "unusable.jsonl")


def test_pairs_that_look_odd_and_are_legal(root, work, tmp_path, capsys):
    """An empty prompt (<bos> stands before it), further keys, any script, CRLF, no last newline; identical ones are counted."""
    rows = [{**ROW, "prompt": ""}, {**ROW, "id": 7}, {**ROW, "chosen": " 很好 🎬", "rejected": "\u0000\u2028"},
            {**ROW, "chosen": ROW["rejected"]}]
    (tmp_path / "odd.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(*rows).replace(b"\n", b"\r\n")[:-2])  # as Notepad saves
    for script in "dpo", "reward_model":
        assert clone.run_here(root, tmp_path, script, "--sft", work / "runs/reviews/sft", "--out", script,
                              "--pairs", "odd.jsonl") == 0
        assert "odd.jsonl: dropped 1 of 4 pairs whose two responses are identical" in capsys.readouterr().out
    (tmp_path / "one.jsonl").write_bytes(lines(ROW))
    policy = work / "runs/reviews/sft"
    assert clone.run_here(root, tmp_path, "dpo", "--sft", policy, "--out", "one", "--pairs", "one.jsonl") == 0
    assert "one.jsonl: one pair, expected at least two" in clone.run_here(
        root, tmp_path, "sft", "--on", "chosen", "--init", policy, "--pairs", "one.jsonl")


# ---- runs that do not belong -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("run, expected", [
    ("nope", "runs/reviews/nope: no finished run there (no model.pt)"),
    ("reward-model", "model.pt holds a ScalarModel, expected a GPT"),
    ("other-task", "runs/reviews/other-task was trained with dataset 'imdb', expected 'reviews'"),
    ("other-tokenizer", "runs/reviews/other-tokenizer was trained with tokenizer '"),
    ("unfinished", "runs/reviews/unfinished: no finished run there (no model.pt); it was stopped: go on with --resume"),
    ("truncated", "runs/reviews/truncated/model.pt: cannot be read ("),
    ("no-tokenizer", "runs/reviews/no-tokenizer/tokenizer.tiktoken: not a tokenizer file")])
@pytest.mark.parametrize("script", ["dpo", "ppo", "reward_model", "sft"])
def test_a_policy_that_cannot_be_started_from(script, run, expected, refused):
    """Another kind, task or vocabulary, unfinished or damaged: it says which, and what it expected."""
    if script == "sft":
        if run == "other-task":
            return  # supervised training may take a policy of one dataset to another
        expected = "--init runs/reviews/nope: no finished run, no folder" if run == "nope" else expected
    assert expected in refused(script, "--init" if script == "sft" else "--sft", f"runs/reviews/{run}", "--out", "new")


def test_an_init_that_is_no_checkpoint(refused):
    """Neither a run nor a GPT-2 checkpoint nor a name that could be downloaded."""
    assert "runs: expected the files config.json and model.safetensors" in refused("sft", "--init", "runs", "--out", "new")
    assert "not one of gpt2, " in refused("sft", "--init", "gpt5", "--out", "new")


@pytest.mark.parametrize("script", ALGORITHMS)
def test_a_run_folder_that_is_taken(script, root, work, tmp_path):
    """Other settings are named, one by one; an unfinished run needs --resume; and both are said before work is done."""
    folder = tmp_path / "taken"
    source = {"sft": "sft", "reward_model": "reward-model", "dpo": "dpo",
              "ppo": "ppo", "reinforce": "reinforce"}[script]
    shutil.copytree(work / "runs/reviews" / source, folder)
    settings = json.loads((folder / "config.json").read_text())
    same = [word for name, value in settings.items()
            if name not in ("built_from", "machine", "script", "out", "sft") and value not in ("", False)
            for word in ("--" + name.replace("_", "-"), str(value))] + ["--out", "taken"]
    policy = [] if script == "sft" else ["--sft", "nowhere"]  # whoever opens it before the folder is checked will fail there
    if script != "sft":
        shutil.copyfile(work / "pairs.jsonl", tmp_path / "pairs.jsonl")
        settings["sft"] = "nowhere"
        (folder / "config.json").write_text(json.dumps(settings))
    before = tree(folder)
    said = clone.run_here(root, tmp_path, script, *same, *policy, "--seed", "5", "--lr", "0.5")
    assert said.startswith("error: taken was made with other settings: ") and "\n" not in said
    assert f"lr was {settings['lr']}, now 0.5; seed was 0, now 5: give another folder with --out" in said
    shutil.copyfile(folder / "model.pt", folder / "checkpoint.prev.pt")
    said = clone.run_here(root, tmp_path, script, *same, *policy)
    assert said == "error: taken holds an unfinished run: go on with --resume, or delete the folder"
    (folder / "checkpoint.prev.pt").unlink()
    assert tree(folder) == before


def test_the_run_folder_is_looked_at_before_data_is_prepared(root, tmp_path):
    """Preparing may be a download: a folder that cannot be written is refused before that."""
    shutil.copytree(root, tmp_path / "clone", ignore=lambda *_: ["prepared"])
    (tmp_path / "a file").write_text("")
    assert "cannot be written" in clone.run_here(tmp_path / "clone", tmp_path, "sft", "--out", "a file/below")
    assert not list((tmp_path / "clone").rglob("*.jsonl"))


def test_a_run_built_from_something_else(root, work, tmp_path):
    """The same flags, but the pairs file has changed since: not the same run."""
    pairs = clone.write_pairs(tmp_path / "pairs.jsonl")
    command = ["--sft", work / "runs/reviews/sft", "--pairs", "pairs.jsonl", "--out", "run"]
    for script in "dpo", "reward_model":
        clone.write_pairs(pairs)
        assert clone.run_here(root, tmp_path, script, *command) == 0
        before = tree(tmp_path / "run")
        clone.write_pairs(pairs, seed=9)
        assert "run was made with other settings: pairs was" in clone.run_here(root, tmp_path, script, *command)
        assert tree(tmp_path / "run") == before
        shutil.rmtree(tmp_path / "run")


def test_labels_where_there_are_none(root, tmp_path):
    """The gold classifier needs labelled documents; that is found before the SFT policy is trained for it."""
    shutil.copytree(root, tmp_path / "clone", ignore=lambda *_: ["prepared"])
    clone.prepare(tmp_path / "clone", labels=False)
    said = clone.run_here(tmp_path / "clone", tmp_path, "classifier", "--dataset", "reviews")
    assert said.startswith("error: no row of ") and "has a label" in said and os.listdir(tmp_path) == ["clone"]


@pytest.mark.parametrize("runs, expected", [
    (["runs/reviews/nope"], "runs/reviews/nope: no finished run there (no model.pt)"),
    (["runs/reviews/dpo", "runs/reviews/nope"], "runs/reviews/nope: no finished run there"),
    (["runs/reviews/unfinished"], "runs/reviews/unfinished: no finished run there"),
    (["runs/reviews/reward-model"], "model.pt holds a ScalarModel, expected a GPT"),
    (["runs/reviews/truncated"], "runs/reviews/truncated/model.pt: cannot be read ("),
    (["runs/reviews/other-task"], "other-task was trained with dataset 'imdb', expected 'reviews'"),
    (["runs/reviews/dpo", "runs/imdb/dpo"], "these runs have different references ("),
    (["runs/imdb/dpo"], "runs/imdb/sft: no finished run there"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_runs_that_cannot_be_evaluated(runs, expected, refused):
    """Found before the bank is sampled, which is the expensive part."""
    assert expected in refused("evaluate", *runs)


@pytest.mark.parametrize("argv, expected", [
    ("nope", "runs/reviews/nope: no finished run there (no model.pt)"),
    ("dpo unfinished", "unfinished: no finished run there (no model.pt); it was stopped: go on with --resume"),
    ("dpo truncated", "runs/reviews/truncated/model.pt: cannot be read ("),
    ("dpo reward-model", "model.pt holds a ScalarModel, expected a GPT"),
    ("dpo --sft runs/reviews/reward-model", "model.pt holds a ScalarModel, expected a GPT"),
    ("dpo other-task", "other-task was trained with dataset 'imdb', expected 'reviews'"),
    ("dpo other-task --sft runs/reviews/sft", "other-task was trained with dataset 'imdb', expected 'reviews'"),
    ("dpo runs/imdb/dpo", "these runs have different references ("),
    ("dpo --sft runs/reviews/other-tokenizer", "other-tokenizer was trained with tokenizer '"),
    ("dpo --n 0", "--n 0: must be > 0"), ("dpo --temperature nan", "--temperature nan: must be >= 0"),
    ("dpo --temperature -1", "--temperature -1.0: must be >= 0"), ("dpo --temperature 1e-40", "must be 0 or at least 0.01"),
    ("dpo --temperature 0 --n 2", "--n 2: at temperature 0 all responses are the same"),
    ("dpo --seed -1", "--seed -1: must be >= 0"), ("dpo --optimum 0", "--optimum 0.0: must be > 0"),
    ("dpo --optimum inf", "--optimum inf: must be > 0 and finite"),
    ("dpo --prompt " + 90 * "film,", "--prompt: no room for a response: prompt "),
    ("dpo --prompt \udcff", "--prompt: not UTF-8"),
    ("sft --score pairs.jsonl", "model.pt holds a GPT, expected a ScalarModel"),
    ("reward-model --score nope.jsonl", "nope.jsonl: cannot be read (No such file"),
    ("reward-model --score pairs.jsonl", "pairs.jsonl, line 1: no field 'response'"),
    ("reward-model --score pairs.jsonl --n 2", "--n: not with --score"),
    ("reward-model sft --score pairs.jsonl", "--score: takes one run, got 2"),
    ("reward-model --export new", "model.pt holds a ScalarModel, expected a GPT"),
    ("sft dpo --export new", "--export: takes one run, got 2"), ("sft --export runs", "runs: is there and not empty"),
    ("sft --export new --prompt a", "--prompt: not with --export"),
    ("sft --export pairs.jsonl", "pairs.jsonl: is there and not"),
    ("sft --export pairs.jsonl/new", "pairs.jsonl is not a folder"),
    ("no-tokenizer --export new", "no-tokenizer/tokenizer.tiktoken: not a tokenizer file"),
    ("other-tokenizer --export new", "other-tokenizer was trained with tokenizer '")])
def test_what_cannot_be_sampled_scored_or_exported(argv, expected, work, refused):
    """Runs stand first; those without a folder are of runs/reviews."""
    words = argv.split(" ")
    flags = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    runs = [run if "/" in run else f"runs/reviews/{run}" for run in words[:flags]]
    assert expected in refused("sample", *runs, *words[flags:])


def test_evaluate_takes_the_reference_that_the_run_was_trained_from(root, work, tmp_path, capsys):
    """Not the folder called sft beside it, where --sft named another one; and two runs of one name are two rows."""
    shutil.copytree(work / "runs/reviews/sft", tmp_path / "mine/policy")
    assert clone.run_here(root, tmp_path, "sft", *clone.TINY, "--seed", "3", "--out", "mine/sft") == 0
    for out in "a/run", "b/run":
        assert clone.run_here(root, tmp_path, "dpo", "--sft", "mine/policy", "--pairs", work / "pairs.jsonl", "--out", out) == 0
    capsys.readouterr()
    assert clone.run_here(root, tmp_path, "evaluate", "a/run", tmp_path / "b/run") == 0
    table = capsys.readouterr().out
    assert "a/run " in table and "b/run " in table
    policy, _ = load_run(tmp_path / "mine/policy")
    bank = json.loads((tmp_path / "mine/policy/bank/config.json").read_text())
    assert bank["built_from"]["policy"] == fingerprint(policy.state_dict())
    assert {"SFT", "a/run"} <= json.loads((tmp_path / "a/run/evaluation.json").read_text())["compared"].keys()
    other_tokenizer(tmp_path / "mine/policy")
    assert "policy was trained with tokenizer '" in clone.run_here(root, tmp_path, "evaluate", "a/run")


# ---- a reward of one's own -------------------------------------------------------------------------------------------

def own(folder: Path, body: str) -> str:
    """own.py:f of a file in this folder whose function f, on the second line, has this body, from the third on."""
    (folder / "own.py").write_text(f"import torch\ndef f(prompts, responses):\n    {body}\n")
    return f"{folder / 'own.py'}:f"


@pytest.mark.parametrize("body", ["return [1, -0.5]", "return (1.0, -0.5)", "return torch.tensor([1.0, -0.5]).double()",
                                  "return torch.tensor([1.0, -0.5]).numpy()", "return list(torch.tensor([1.0, -0.5]).numpy())",
                                  "return (x for x in (1, -0.5))"])
def test_what_a_reward_may_return(body, tmp_path):
    reward = user_function(own(tmp_path, body), "--reward")(["a", "b"], ["c", "d"])
    assert reward.tolist() == [1, -0.5] and reward.dtype == torch.float32


BAD_RETURNS = {  # body of the function: what is said behind its name
    "return [1.0]": "returned 1 numbers for 2 responses", "return [1.0] * 3": "returned 3 numbers for 2 responses",
    "return [1.0, None]": "returned None for response 1 ('d'), expected a finite number",
    "return ['1', 1]": "returned '1' for response 0 ('c'), expected a finite number",
    "return [1.0, float('nan')]": "returned nan for response 1", "return [float('inf'), 1]": "returned inf for response 0",
    "return [1.0, 1e300]": "returned 1e+300 for response 1",  # too large for fp32
    "return [True, False]": "returned True for response 0", "return torch.ones(2, 1)": "returned [1.0] for response 0",
    "pass": "TypeError: 'NoneType' object is not iterable", "return 0.5": "", "return torch.tensor(0.5)": "",
    "return [10**400] * 2": "returned 1000000000000", "import itertools; return itertools.repeat(1.0)": "returned more than 2",
    "import sys; sys.exit(0)": "SystemExit: 0 ({file}, line 3)", "raise BaseException('no')": "BaseException: no ({file}, line 3)",
    "raise GeneratorExit": "GeneratorExit ({file}, line 3)", "raise ValueError('x' * 100_000)": "ValueError: xxx",
    "prompts.clear(); responses.clear(); return []": "returned 0 numbers for 2 responses ({file}, line 2)",
    "return [1.0 / 0] * 2": "ZeroDivisionError: float division by zero ({file}, line 3)",
    "raise ValueError('a line\\nand another')": "ValueError: a line"}


@pytest.mark.parametrize("body", BAD_RETURNS)
def test_a_reward_that_returns_no_numbers(body, tmp_path):
    """One line says what came back, or what was raised and where. True is no number."""
    name = own(tmp_path, body)
    with pytest.raises(SystemExit) as stop:
        user_function(name, "--reward")(["a", "b"], ["c", "d"])
    said = str(stop.value)
    assert said.startswith(f"error: --reward {name}: ") and "\n" not in said and len(said) < 500, said
    assert BAD_RETURNS[body].replace("{file}", str(tmp_path / "own.py")) in said.removeprefix(f"error: --reward {name}"), said


def test_a_reward_may_do_with_its_lists_what_it_likes(tmp_path):
    """They are copies: one that was reversed in place gave every score to another response."""
    texts = [["a", "b"], ["c", "dd"]]
    name = own(tmp_path, "responses.reverse(); return [float(len(r)) for r in responses[::-1]]")
    assert user_function(name, "--reward")(*texts).tolist() == [1, 2] and texts == [["a", "b"], ["c", "dd"]]


def test_a_reward_file_is_a_module_like_any_other(tmp_path):
    """Dataclasses under postponed annotations, pickle, and imports of a file beside it work; our own modules win by name."""
    (tmp_path / "helper_beside.py").write_text("BONUS = 2.0\n")
    (tmp_path / "model.py").write_text("raise ValueError('not this one')\n")
    (tmp_path / "own.py").write_text(
        "from __future__ import annotations\nimport pickle\nfrom dataclasses import dataclass\nimport helper_beside\nimport model\n"
        "@dataclass\nclass Weight:\n    value: float = helper_beside.BONUS\n"
        "def f(prompts, responses):\n    w = pickle.loads(pickle.dumps(Weight()))\n    return [w.value * len(r) for r in responses]\n")
    assert user_function(f"{tmp_path / 'own.py'}:f", "--reward")(["a"], ["bcd"]).tolist() == [6.0]


BAD_REWARDS = {  # what is given: what is said behind it
    "nope": "expected model, gold, the folder of a reward model's run, or FILE.py:function", "": "expected model, gold",
    "nope.py:f": "expected model, gold", "own.py": "expected model, gold", "words.txt:f": "expected model, gold",
    "own.py:g": "own.py has no function 'g'", "own.py:number": "own.py has no function 'number'",
    "broken.py:f": "broken.py cannot be loaded (SyntaxError: ",
    "wishful.py:f": "wishful.py cannot be loaded (ModuleNotFoundError: No module named 'nothing_of_this_name'; wishful.py, line 1)",
    "own.py:one": "returned 1 numbers for ", "own.py:nothing": "returned None for response 0",
    "own.py:undefined": "NameError: name 'scores' is not defined (own.py, line 4)", "own.py:alone": "own.py, line 5)",
    "leaves.py:f": "leaves.py cannot be loaded (SystemExit: 3; leaves.py, line 2)"}


@pytest.mark.parametrize("name", BAD_REWARDS)
def test_a_bad_reward_is_refused_before_anything_is_trained(name, root, tmp_path, monkeypatch):
    """Where no SFT policy is there yet, none is trained for it: a function is tried before. And nothing is written."""
    monkeypatch.setattr(sft, "train", lambda config: pytest.fail("too early"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for file, text in {"own.py": "number = 1\none = lambda p, r: [1.0]\nnothing = lambda p, r: [None] * len(r)\n"
                       "undefined = lambda p, r: scores(r)\ndef alone():\n    return []\n",
                       "leaves.py": "import sys\nsys.exit(3)\n", "broken.py": "def f(:\n", "words.txt": "a\n",
                       "wishful.py": "import nothing_of_this_name\n"}.items():
        (tmp_path / file).write_text(text)
    before = tree(tmp_path)
    said = clone.run_here(root, tmp_path, "ppo", "--reward", name)
    shown = repr(name) if "expected" in BAD_REWARDS[name] else name
    assert said.startswith(f"error: --reward {shown}: ") and BAD_REWARDS[name] in said and "\n" not in said, said
    assert tree(tmp_path) == before


def test_a_reward_that_fails_later_stops_the_run(root, work, tmp_path):
    """Such as one whose service is gone after a while: one line, and no model."""
    name = own(tmp_path, "calls.append(0)\n    return [1.0 if len(calls) < 5 else None] * len(responses)\ncalls = []")
    said = clone.run_here(root, tmp_path, "ppo", "--sft", work / "runs/reviews/sft", "--reward", name, "--batch-size", "8",
                          "--out", "run")
    assert said.startswith(f"error: --reward {name}: returned None for response 0 (") and "\n" not in said
    assert load_checkpoint(tmp_path / "run/checkpoint.pt") is None and not (tmp_path / "run/model.pt").exists()


def test_a_reward_whose_file_has_changed_is_another_one(root, work, tmp_path):
    """As with a pairs file: to go on with it, or to pass for its result, would be to mix two rewards under one name."""
    command = ["ppo", "--sft", work / "runs/reviews/sft", "--steps", "1", "--batch-size", "8", "--out", "run", "--reward"]
    assert clone.run_here(root, tmp_path, *command, own(tmp_path, "return [float(len(r)) for r in responses]")) == 0
    before = tree(tmp_path / "run")
    said = clone.run_here(root, tmp_path, *command, own(tmp_path, "return [-float(len(r)) for r in responses]"))
    assert isinstance(said, str) and "run was made with other settings: reward was" in said
    assert tree(tmp_path / "run") == before


# ---- a loss of one's own ---------------------------------------------------------------------------------------------

BAD_LOSSES = {  # body of the function, on line 3: what is said behind its name
    "return (c - r).mean()": "returned shape () for 8 pairs, expected (8,) (own.py, line 2)",
    "return (c - r)[1:]": "returned shape (7,) for 8 pairs", "return (c - r)[:, None]": "returned shape (8, 1) for 8 pairs",
    "return [0.0] * 8": "returned [0.0, 0.0, ", "pass": "returned None, expected a tensor of 8 losses (own.py, line 2)",
    "return (c - r).detach()": "returned losses without a gradient to the ratios", "return c < r": "returned losses without",
    "return (c - r) / 0": "returned nan for pair 0, expected a finite number (own.py, line 2)",
    "return (c - r).log()": "returned -inf for pair 0",
    "return (c - r).abs().sqrt()": "its gradient is not finite where the ratios are 0.00, 0.00 (own.py, line 2)",
    "return torch.ones(8, requires_grad=True)": "returned losses without a gradient to the ratios",
    "return c - s": "NameError: name 's' is not defined (own.py, line 3)", "raise SystemExit": "SystemExit (own.py, line 3)",
    "return c @ torch.ones(3)": "RuntimeError: "}
BAD_LOSS_NAMES = {
    "nope": "--loss 'nope': expected dpo, ipo, unlikelihood or FILE.py:function", "": "--loss '': expected dpo, ipo",
    "own.py": "--loss 'own.py': expected dpo, ipo", "nope.py:f": "--loss 'nope.py:f': expected dpo, ipo",
    "own.py:g": "--loss own.py:g: own.py has no function 'g'", "own.py:torch": "own.py has no function 'torch'",
    "broken.py:f": "--loss broken.py:f: broken.py cannot be loaded (SyntaxError: "}


@pytest.mark.parametrize("case", [*BAD_LOSSES, *BAD_LOSS_NAMES])
def test_a_bad_loss_is_refused_before_anything_is_trained(case, root, tmp_path, monkeypatch):
    """Where no SFT policy is there yet, none is trained for it. One line names the user's own file and line."""
    monkeypatch.setattr(sft, "train", lambda config: pytest.fail("too early"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    body = case if case in BAD_LOSSES else "return c - r"
    (tmp_path / "own.py").write_text(f"import torch\ndef f(c, r, beta, c_lengths, r_lengths):\n    {body}\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    before = tree(tmp_path)
    said = clone.run_here(root, tmp_path, "dpo", "--loss", "own.py:f" if case in BAD_LOSSES else case)
    expected = f"--loss own.py:f: {BAD_LOSSES[case]}" if case in BAD_LOSSES else BAD_LOSS_NAMES[case]
    assert said.startswith("error: --loss ") and expected in said and "\n" not in said and len(said) < 400, said
    assert tree(tmp_path) == before


def test_a_loss_whose_file_has_changed_is_another_one(root, work, tmp_path, capsys):
    """As with a reward's. The run is called by the function's name, in its folder and its table; and a loss that becomes wrong
    on the way stops with one line, and no model."""
    def train(formula, *more):
        (tmp_path / "own.py").write_text(f"def f(c, r, beta, *lengths):\n    return {formula}\n")
        return clone.run_here(root, tmp_path, "dpo", "--sft", work / "runs/reviews/sft", "--pairs", work / "pairs.jsonl",
                              "--loss", "own.py:f", *more)
    assert train("(1 - c + r) ** 2", "--out", "run") == 0 and "\nown.py:f beta 0.1 " in capsys.readouterr().out
    before = tree(tmp_path / "run")
    said = train("(2 - c + r) ** 2", "--out", "run")
    assert said.startswith("error: run was made with other settings: loss was '") and tree(tmp_path / "run") == before
    said = train("c - r if len(c) == 8 else c / 0", "--out", "new")
    assert said.startswith("error: --loss own.py:f: returned nan for pair 0, expected")
    assert not (tmp_path / "new/model.pt").exists()
    assert dpo.Config(loss="a/own.py:f").out == "runs/reviews/dpo-beta0.1-seed0-loss-a-own.py-f"
    assert dpo.Config(loss="ipo", beta=1.0).out == "runs/reviews/ipo-beta1-seed0"


@pytest.mark.parametrize("run, expected", [
    ("sft", "model.pt holds a GPT, expected a ScalarModel"), ("unfinished", "no finished run there (no model.pt)"),
    ("truncated", "model.pt: cannot be read ("), ("other-task", "model.pt holds a GPT"), ("nope", "expected model, gold"),
    ("short-reward", "block")])
def test_a_reward_model_that_cannot_be_used(run, expected, refused):
    """Of another kind, unfinished, damaged, or with room for fewer tokens than the policy writes."""
    said = refused("ppo", "--sft", "runs/reviews/sft", "--out", "new", "--reward", f"runs/reviews/{run}")
    assert f"runs/reviews/{run}" in said and expected in said


# ---- real processes --------------------------------------------------------------------------------------------------

def test_a_real_process_says_one_line_and_exits_1_at_once(root, tmp_path):
    """As a shell sees it: nothing on stdout, one line on stderr, status 1; and nearly all of its processor time is the
    import of torch, so it is compared with that."""
    resource = pytest.importorskip("resource")

    def processor_time() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    times = [processor_time()]
    process = clone.start(root, "dpo", "--nope", cwd=tmp_path)
    expected = "error: unrecognized arguments: --nope (see --help)\n"
    assert (*process.communicate(timeout=60), process.returncode) == ("", expected, 1)
    times.append(processor_time())
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    times.append(processor_time())
    assert os.listdir(tmp_path) == []
    assert times[1] - times[0] < 1.5 * (times[2] - times[1])


def test_import_draws_in_no_library_that_only_some_runs_need():
    """--help and every mistake wait for the imports, so figures and GPT-2 weights are imported where they are used."""
    program = ("import sys, sft, reward_model, classifier, dpo, expert_iteration, conditioning, vargrad, reinforce, ppo, evaluate, sample, bt, dueling, preference_rl, dagger\n"
               "import irl, tamer, pebble, dppo\n"
               "from experiments import frontier, winrate, scaling\n"
               "print(*{name.split('.')[0] for name in sys.modules})")
    modules = subprocess.run([sys.executable, "-c", program], cwd=clone.ROOT, capture_output=True, text=True, check=True,
                             env=clone.environment()).stdout.split()
    assert "torch" in modules and not {"matplotlib", "transformers", "safetensors", "pandas", "datasets", "PIL"} & set(modules)


# ---- --help ----------------------------------------------------------------------------------------------------------

def packed(text: str) -> str:
    """Without white space: argparse breaks lines anywhere, also behind a hyphen."""
    return "".join(text.split())


@pytest.mark.parametrize("script", ALGORITHMS)
@pytest.mark.parametrize("dataset", ["reviews", "imdb"])
def test_help_shows_every_flag_with_reason_and_default(script, dataset, capsys):
    """The defaults shown are those of the dataset asked about, because they are the ones that will be used."""
    config = ALGORITHMS[script].Config
    with pytest.raises(SystemExit) as stop:
        settings.parse(config, ALGORITHMS[script].__doc__, ["--dataset", dataset, "--help"])
    assert stop.value.code == 0
    shown, reasons = packed(capsys.readouterr().out), {name: text for name, (_, text) in settings.field_notes(config).items()}
    assert packed(ALGORITHMS[script].__doc__.splitlines()[0]) in shown
    for field in dataclasses.fields(config):
        default = settings.defaults_of(config, dataset=dataset)[field.name]
        assert len(reasons[field.name]) > 3, f"{field.name} has no reason"
        flag, text = field.name.replace("_", "-"), f"{reasons[field.name]}[{default if default != '' else 'none'}]"
        assert re.search(rf"--{flag}(STR|INT|FLOAT|{{[\w,-]+}})?{re.escape(packed(text))}", shown), field.name


@pytest.mark.parametrize("prepare", [*clone.ROOT.glob("data/*/prepare.py")], ids=lambda path: path.parent.name)
def test_the_scripts_can_prepare_every_dataset(prepare):
    """tasks.ensure calls prepare(out=FOLDER): on a fresh clone that is the first thing that happens."""
    inspect.signature(importlib.import_module(f"data.{prepare.parent.name}.prepare").prepare).bind(out=Path())


@pytest.mark.parametrize("script", [*clone.SCRIPTS, "bt", "dueling", "preference_rl", "dagger", "irl", "tamer", "pebble", "dppo", "label",
                                    "experiments/distill", "experiments/bench", "experiments/memory", "experiments/frontier",
                                    "experiments/winrate", "experiments/scaling", "experiments/agreement",
                                    "experiments/samples", "experiments/ablation", "experiments/clicks", "experiments/ledger",
                                    "experiments/scores", "experiments/effort", "experiments/length",
                                    "experiments/judgements", "experiments/overoptimization", "experiments/rewardbench", "data/reviews/prepare",
                                    "data/imdb/prepare", "data/tldr/prepare"])
def test_help_of_every_script_exits_0_and_does_nothing(script, root, tmp_path, monkeypatch, capsys):
    """Asking what a script does must not do it."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.chdir(tmp_path)
    before = tree(root)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(root / f"{script}.py"), run_name="__main__")
    shown = capsys.readouterr()
    assert stop.value.code == 0 and shown.out.startswith("usage: ") and not shown.err
    assert os.listdir(tmp_path) == [] and tree(root) == before


# ---- the source itself -----------------------------------------------------------------------------------------------

def reads(path: Path) -> set[str]:
    """Fields that a file reads as config.NAME or self.NAME; a range check of require(...) is not a use."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
            return
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and (
                getattr(node.value, "id", "") in ("config", "self") or getattr(node.value, "attr", "") == "config"):
            found.add(node.attr)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and len(node.args) > 1:
            found.add(getattr(node.args[1], "value", ""))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


@pytest.mark.parametrize("script", CONFIGS)
def test_no_dead_flags(script):
    """A flag that nothing reads is the commonest defect of this field's code: it is set, believed and ignored. What a script
    starts from is read by the pipeline, and where it writes by the run folder."""
    fields = {field.name for field in dataclasses.fields(CONFIGS[script].Config)}
    shared = reads(clone.ROOT / "common/run.py") & {"resume", "out", "checkpoint_every"}
    for name in ("common/pipeline.py", "experiments/grids.py"):
        if Path(name).stem in (clone.ROOT / f"{script}.py").read_text():
            shared |= reads(clone.ROOT / name)
    assert fields - reads(clone.ROOT / f"{script}.py") - shared == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(clone.ROOT)))
def test_source_loads_nothing_that_can_run_code(path):
    """No pickle but torch's with weights_only=True, no NumPy object arrays, no eval, no exec, no shell."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(
            node, ast.ImportFrom) else []
        assert {name.split(".")[0] for name in names}.isdisjoint({"pickle", "dill", "joblib", "marshal", "shelve", "yaml"})
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        called = ast.unparse(node.func)
        assert called not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), node.lineno
        assert not keywords.get("shell"), node.lineno
        if called.endswith("torch.load"):
            assert keywords.get("weights_only") is True, f"line {node.lineno}"
        if called in ("np.load", "numpy.load"):
            assert keywords.get("allow_pickle") is False, f"line {node.lineno}"


# ---- own pairs -------------------------------------------------------------------------------------------------------

def test_own_pairs_end_to_end(root, work):
    """python dpo.py --pairs FILE: a policy, an evaluation with its table, samples before and after, and a figure."""
    folder = work / "runs/reviews/dpo"
    assert sorted(os.listdir(folder)) == ["config.json", "evaluation.json", "figure.png", "log.jsonl", "model.pt",
                                          "samples.jsonl", "tokenizer.tiktoken"]
    table = json.loads((folder / "evaluation.json").read_text())["table"]
    assert {"SFT", "DPO beta 0.1", "best of 16"} <= set(table)
    assert {"reward", "reward_se", "kl", "kl_se", "length", "share"} <= set(table["DPO beta 0.1"])
    samples = files.read_jsonl(folder / "samples.jsonl", {"prompt": str, "before": str, "after": str, "before_reward": float,
                                                           "after_reward": float})
    assert len(samples) == 8
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_pairs_we_write_can_be_given_back(root, work, tmp_path, monkeypatch):
    """The pipeline's pairs.jsonl through --pairs are the same pairs, token by token; and Preferred-FT finds them by itself."""
    shutil.copytree(work / "runs/reviews/sft", tmp_path / "runs/reviews/sft")
    begun, start = [], pipeline.start
    monkeypatch.setattr(pipeline, "start", lambda *args, **more: begun.append(start(*args, **more)) or begun[-1])
    command = ["dpo", "--sft", "runs/reviews/sft", "--batch-size", "4"]
    assert clone.run_here(root, tmp_path, *command) == 0
    assert clone.run_here(root, tmp_path, *command, "--pairs", "runs/reviews/pairs-bt/pairs.jsonl") == 0
    assert begun[0].pairs == begun[1].pairs and len(begun[0].pairs) > 100
    said = clone.run_here(root, tmp_path, "sft", "--on", "chosen", "--steps", "3", "--warmup", "1", "--init", "runs/reviews/sft")
    assert said == 0 and (tmp_path / "runs/reviews/preferred-ft-init-runs-reviews-sft-steps3-warmup1/model.pt").exists()
