"""--device: which one is used, what is said where it is not there, and that nothing is computed on it that an Apple GPU
cannot do. No such GPU is here, so the CPU plays one: DEVICE is a second CPU, "cpu:0", whose tensors are `OnDevice`.
"""
import functools
import json
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

import classifier
import clone
import sft
from common import pipeline, settings, training
from common.run import load_tensors
from common.training import autocast, device
from experiments import frontier, winrate

DEVICE = torch.device("cpu:0")
SCRIPTS = ("sft", "reward_model", "classifier", "dpo", "expert_iteration", "conditioning", "vargrad", "reinforce", "ppo")
TO_CPU = (torch.Tensor.cpu, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy)


# ---- which one -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cuda, mps, auto", [(True, True, "cuda"), (True, False, "cuda"), (False, True, "cpu"),
                                             (False, False, "cpu")])
def test_auto_is_cuda_or_the_cpu_and_the_others_must_be_there(cuda, mps, auto, monkeypatch):
    """An Apple GPU is used only if asked for, and bf16 only if asked for there, too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    for name, there in (("auto", True), ("cpu", True), ("cuda", cuda), ("mps", mps)):
        if there:
            training.use_device(name)
            assert device().type == (auto if name == "auto" else name)
        else:
            with pytest.raises(SystemExit, match=f"^error: --device {name}: torch .* finds none on this machine$"):
                training.use_device(name)
    if mps:
        training.use_device("mps")
        assert not autocast("auto")._enabled and autocast("bfloat16")._enabled


@pytest.mark.parametrize("script", [*SCRIPTS, *(f"experiments/{name}" for name in ("frontier", "winrate", "scaling", "distill", "ablation"))])
@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_one_line_before_anything_is_built(script, name, root, tmp_path):
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is there")
    said = clone.run_here(root, tmp_path, script, "--device", name)
    assert said == f"error: --device {name}: torch {torch.__version__} finds none on this machine"
    assert list(tmp_path.iterdir()) == []


def test_a_device_names_no_folder_and_makes_no_other_run(root, tmp_path, capsys):
    """What was begun on one goes on, or is found finished, on another. And what a script builds first is computed there, too,
    which the command that is printed says."""
    for config in (sft.Config, frontier.Config, winrate.Config):
        assert config(device="mps").out == config().out
    assert clone.run_here(root, tmp_path, "sft", *clone.SFT) == 0
    command = "reinforce --sft runs/reviews/sft --steps 1 --batch-size 8 --warmup 1 --bank-samples 8 --resume".split()
    assert clone.run_here(root, tmp_path, *command, "--device", "cpu") == 0
    assert "building what is missing: python reward_model.py --sft runs/reviews/sft --device cpu" in capsys.readouterr().out
    made = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("runs/reviews/*/config.json")}
    assert made["sft"]["device"] == "auto" and made["reward-model"]["device"] == "cpu"
    assert clone.run_here(root, tmp_path, *command) == 0
    assert "building" not in capsys.readouterr().out


@pytest.mark.parametrize("experiment", [frontier, winrate])
def test_the_runs_of_a_sweep_are_told(experiment):
    for run in experiment.plan(experiment.Config(device="cpu")):
        assert "--device cpu" in settings.typed(run.config)


# ---- what is computed there ------------------------------------------------------------------------------------------

class Refused(Exception):
    """float64 on DEVICE."""


class OnDevice(torch.Tensor):
    """A tensor on DEVICE. Like an Apple GPU that refuses float64; what is computed from one is on it, too, up to .cpu()."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__:
            return DEVICE
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func in TO_CPU:
            return tree_map_only(OnDevice, lambda tensor: tensor.as_subclass(torch.Tensor), result)
        return tree_map_only(OnDevice, checked, result)

    def __deepcopy__(self, _):
        return self.detach().clone()


def checked(tensor: OnDevice) -> OnDevice:
    with torch._C.DisableTorchFunctionSubclass():
        if tensor.dtype == torch.float64:
            raise Refused
    return tensor


class Moves(TorchFunctionMode):
    """x.to(DEVICE) and torch.zeros(..., device=DEVICE) give tensors on it. `count` is how many."""
    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        asked = [kwargs.get("device"), *(args[1:] if func is torch.Tensor.to else ())]
        if any(isinstance(where, torch.device) and where == DEVICE for where in asked):
            self.count += 1
            return tree_map_only(torch.Tensor, lambda tensor: checked(tensor.as_subclass(OnDevice)), result)
        return result


def test_the_device_that_is_played_here_refuses_float64():
    """Or the test below would say nothing."""
    with Moves():
        for wrong in (lambda: torch.zeros(2, device=DEVICE).double(), lambda: torch.zeros(2, dtype=torch.float64).to(DEVICE),
                      lambda: torch.zeros(2, device=DEVICE) + torch.zeros(2, dtype=torch.float64),
                      lambda: torch.ones(2).to(DEVICE).sum(dtype=torch.float64),
                      lambda: torch.zeros(2, dtype=torch.float64, device=torch.ones(2).to(DEVICE).device)):
            with pytest.raises(Refused):
                wrong()
        assert torch.zeros(2).to(DEVICE).cpu().double().dtype == torch.float64
        assert type(torch.zeros(2).to(DEVICE).mean() * 2) is OnDevice


ARGUMENTS = {
    "sft": [*clone.TINY[:-6], "--steps", "3", "--warmup", "1"],
    "reward_model": ["--sft", "runs/reviews/sft", "--pairs", "pairs.jsonl", "--batch-size", "8"],
    "classifier": ["--dataset", "reviews", "--sft", "runs/reviews/sft", "--batch-size", "8", "--epochs", "0.3", "--warmup", "1"],
    "dpo": ["--sft", "runs/reviews/sft", "--pairs", "pairs.jsonl", "--batch-size", "8", "--bank-samples", "8"],
    "expert_iteration": ["--sft", "runs/reviews/sft", "--reward", "own.py:f", "--batch-size", "8", "--rounds", "2",
                         "--round-prompts", "6", "--samples", "2", "--bank-samples", "8"],
    "conditioning": ["--sft", "runs/reviews/sft", "--reward", "own.py:f", "--batch-size", "8", "--on", "samples", "--rounds", "2",
                     "--round-prompts", "6", "--samples", "2", "--bank-samples", "8"],
    "reinforce": ["--sft", "runs/reviews/sft", "--reward", "own.py:f", "--batch-size", "8", "--steps", "2", "--bank-samples", "8"],
    "vargrad": ["--sft", "runs/reviews/sft", "--reward", "own.py:f", "--batch-size", "8", "--samples", "4", "--steps", "2",
                "--bank-samples", "8"],
    "ppo": ["--sft", "runs/reviews/sft", "--reward", "runs/reviews/reward", "--batch-size", "8", "--steps", "2", "--bank-samples", "8"],
}


@pytest.fixture(scope="module")
def work(root, tmp_path_factory) -> Path:
    """An SFT policy, a reward model of it, pairs, and a reward that gives float64."""
    work = tmp_path_factory.mktemp("work")
    clone.write_pairs(work / "pairs.jsonl")
    (work / "own.py").write_text("import numpy\ndef f(prompts, responses):\n    return numpy.array([len(r) / 7 for r in responses])\n")
    assert clone.run_here(root, work, "sft", *clone.SFT) == 0
    assert clone.run_here(root, work, "reward_model", *ARGUMENTS["reward_model"], "--out", "runs/reviews/reward") == 0
    return work


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_on_the_device_is_float64(script, root, work, monkeypatch):
    """Whole runs: sampling, training, evaluation. And the weights are bit for bit those of a CPU that is called by its name."""
    run = functools.partial(clone.run_here, root, work, script, *ARGUMENTS[script])
    assert run("--out", f"runs/reviews/{script}-cpu") == 0
    monkeypatch.setattr(training, "asked_for", DEVICE)
    for module in sft, classifier, pipeline:
        monkeypatch.setattr(module, "use_device", lambda _: None)
    with Moves() as moves:
        assert run("--out", f"runs/reviews/{script}-device") == 0
    assert moves.count > 10
    a, b = (load_tensors(work / f"runs/reviews/{script}-{name}/model.pt")["model"] for name in ("cpu", "device"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
