"""A task is one folder: one is added in a temporary clone, and the scripts run on it. And what a task must say of itself."""
import json
import re

import pytest

import clone
from common import settings, tasks

PAGE = (clone.ROOT / "docs" / "your_own.md").read_text(encoding="utf-8")
INIT, PREPARE = re.findall(r"`data/colours/\w+.py`:\n\n```python\n(.*?)```", PAGE, flags=re.S)  # the page's own example
SMALLER = {  # and what is smaller here
    "pair_prompts=600, pair_samples=4, bank_prompts=64, bank_samples=64":
        "pair_prompts=20, pair_samples=4, bank_prompts=6, bank_samples=8",
    "dict(steps=200, block_size=48)})":
        'dict(n_layer=1, n_head=2, n_embd=32, block_size=48, steps=60, batch_size=8, warmup=5, lr=2e-2), '
        '"dpo": dict(batch_size=8, warmup=2, lr=7e-4)})',
    "range(3000)": "range(600)",
}


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A clone with one task more, and a working folder."""
    root = clone.make(tmp_path_factory.mktemp("clone"))
    (root / "data/colours").mkdir(exist_ok=True)  # where somebody has typed the page
    init, prepare = INIT, PREPARE
    for whole, small in SMALLER.items():
        assert (init + prepare).count(whole) == 1, whole
        init, prepare = init.replace(whole, small), prepare.replace(whole, small)
    (root / "data/colours/__init__.py").write_text(init)
    (root / "data/colours/prepare.py").write_text(prepare)
    return root, tmp_path_factory.mktemp("work")


def share_of_red(text):
    named = re.findall(r"\b(?:red|orange|yellow|green|blue|violet|grey|brown)\b", text.replace(".", " "))
    return sum(colour == "red" for colour in named) / len(named) if named else 0.0


def test_a_task_is_one_folder(colours):
    """The page's example: python dpo.py --dataset colours, with nothing but that folder: data, SFT, pairs, bank, DPO, in the task's own settings; and
    the gold reward of the table is the folder's."""
    root, work = colours
    process = clone.start(root, "dpo", "--dataset", "colours", cwd=work)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "building what is missing: python data/colours/prepare.py" in out
    assert "building what is missing: python sft.py --dataset colours" in out
    config = json.loads((work / "runs/colours/dpo-beta0.1-seed0/config.json").read_text())
    assert (config["lr"], config["batch_size"], config["labels"]) == (7e-4, 8, "bt")
    for line in (work / "runs/colours/bank/bank.jsonl").read_text().splitlines():
        row = json.loads(line)
        expected = [share_of_red(row["prompt"] + text) for text in row["responses"]]
        assert row["rewards"] == pytest.approx(expected, abs=1e-6)


def test_a_reward_that_was_edited_is_noticed(colours):
    """The first thing that a researcher changes: from red to blue. Nothing that was made with the old one passes for new."""
    root, work = colours
    path = root / "data/colours/__init__.py"
    before = path.read_text()
    path.write_text(before.replace('"red"', '"blue"'))
    process = clone.start(root, "dpo", "--dataset", "colours", "--beta", "0.2", cwd=work)
    _, errors = process.communicate(timeout=120)
    path.write_text(before)
    assert process.returncode == 1 and "pairs-bt was made with other settings: gold was" in errors


@pytest.mark.parametrize("content, said", [
    ("", "data/half/__init__.py: no TASK there"), ("TASK = 5\n", "data/half/__init__.py: no TASK there")])
def test_a_folder_without_a_task_is_named(content, said, monkeypatch, tmp_path):
    """There is no fallback to another task's sizes."""
    (tmp_path / "data/half").mkdir(parents=True)
    (tmp_path / "data/half/prepare.py").write_text("")
    monkeypatch.setattr(tasks, "ROOT", tmp_path)
    module = type("half", (), {"TASK": 5} if content else {})
    monkeypatch.setattr(tasks.importlib, "import_module", lambda name: module)
    with pytest.raises(SystemExit, match=said):
        tasks.load("half")


def test_a_preset_lacks_nothing():
    """A size that is forgotten stops where the task is written, and is not another task's."""
    with pytest.raises(TypeError, match="bank_prompts"):
        tasks.Preset(pair_prompts=1, pair_samples=2, bank_samples=1, evaluate_every={}, settings={})
    for name in sorted(path.parent.name for path in (settings.ROOT / "data").glob("*/prepare.py")):
        for preset in tasks.load(name).presets.values():
            assert {"sft", "dpo", "ppo", "reinforce", "vargrad", "expert_iteration", "conditioning"} <= preset.evaluate_every.keys()
