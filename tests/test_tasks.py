"""A task is one folder: one is added in a temporary clone, and the scripts run on it. And what a task must say of itself."""
import json

import pytest

import clone
from common import settings, tasks

INIT = '''"""Colours: a text is as good as it is red."""
from common.tasks import Preset, Task


def gold_reward(text):
    return min(1.0, text.count("red") / 4)


TASK = Task(labels="bt", label_scale=5.0, gold_reward=gold_reward, presets={"cpu": Preset(
    pair_prompts=20, pair_samples=4, bank_prompts=6, bank_samples=8, evaluate_every={"sft": 5, "dpo": 5, "ppo": 5, "reinforce": 5},
    settings={"sft": dict(n_layer=1, n_head=2, n_embd=32, block_size=24, steps=60, batch_size=8, warmup=5, lr=2e-2),
              "dpo": dict(batch_size=8, warmup=2, lr=7e-4)})})
'''
PREPARE = '''import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.files import write_jsonl
from common.tasks import publish
from common.tokenizer import train_bpe

OUT = Path(__file__).resolve().parent / "prepared"


def prepare(out=OUT):
    def write(folder):
        rng = random.Random(0)
        lines = [" ".join(rng.choices(["red", "green", "blue"], k=rng.randint(4, 9))) for _ in range(300)]
        train_bpe(lines, 280).save(folder / "tokenizer.tiktoken")
        prompts = [{"prompt": f"{i % 97} {line.split()[0]}"} for i, line in enumerate(lines)]
        for name, rows in {"train": [{"text": line} for line in lines[:250]], "test": [{"text": line} for line in lines[250:]],
                           "prompts_train": prompts[:80], "prompts_test": prompts[80:90]}.items():
            write_jsonl(folder / f"{name}.jsonl", rows)
        return {"rows": 300}
    return publish(out, "colours", write)


if __name__ == "__main__":
    prepare()
'''


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A clone with one task more, and a working folder."""
    root = clone.make(tmp_path_factory.mktemp("clone"))
    (root / "data/colours").mkdir()
    (root / "data/colours/__init__.py").write_text(INIT)
    (root / "data/colours/prepare.py").write_text(PREPARE)
    return root, tmp_path_factory.mktemp("work")


def test_a_task_is_one_folder(colours):
    """python dpo.py --dataset colours, with nothing but that folder: data, SFT, pairs, bank, DPO, in the task's own settings; and
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
        expected = [min(1.0, (row["prompt"] + text).count("red") / 4) for text in row["responses"]]
        assert row["rewards"] == pytest.approx(expected, abs=1e-6)


def test_a_reward_that_was_edited_is_noticed(colours):
    """The first thing that a researcher changes: from red to blue. Nothing that was made with the old one passes for new."""
    root, work = colours
    path = root / "data/colours/__init__.py"
    path.write_text(INIT.replace('"red"', '"blue"'))
    process = clone.start(root, "dpo", "--dataset", "colours", "--beta", "0.2", cwd=work)
    _, errors = process.communicate(timeout=120)
    path.write_text(INIT)
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
            assert {"sft", "dpo", "ppo", "reinforce"} <= preset.evaluate_every.keys()
