"""A copy of the repository with a small dataset of its own, for tests that run whole scripts.

The scripts in it are the repository's, byte by byte; only data/reviews/prepared/ is smaller, so that a stage takes a
second, and so that nothing a test damages is anybody's data.
"""
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate
from common import files, settings, tasks
from data.reviews.grammar import gold_reward, sample_review
from common.tokenizer import train_bpe

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("sft", "reward_model", "classifier", "dpo", "expert_iteration", "conditioning", "vargrad", "reinforce", "ppo", "evaluate", "sample")
TINY = "--n-layer 1 --n-embd 32 --n-head 2 --batch-size 8 --steps 80 --warmup 5 --lr 2e-2".split()  # an SFT policy,
SFT = [*TINY, "--out", "runs/reviews/sft"]  # where the other scripts look for it


def make(root: Path) -> Path:
    """The copy, at `root`: the scripts, data/, and 300 reviews with a tokenizer of 400."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("experiments/*.py"), *ROOT.glob("data/*.py"),
                 *ROOT.glob("data/*/*.py")]:
        target = root / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)

    prepare(root)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A copy for the tests of one file."""
    return make(tmp_path_factory.mktemp("clone"))


def prepare(root: Path, labels: bool = True) -> None:
    """data/reviews/prepared/ of the copy: 300 documents, with labels as the gold classifier needs them."""
    def write(folder: Path) -> dict:
        rng = random.Random(1)
        texts = [sample_review(rng)[0] for _ in range(420)]
        prompts = list(dict.fromkeys(" ".join(text.split()[:4]) for text in texts))
        train_bpe(texts[:300], 400).save(folder / "tokenizer.tiktoken")
        documents = [{"text": text, **({"label": int(gold_reward(text) > 0.5)} if labels else {})} for text in texts]
        for name, rows in {"train": documents[:300], "test": documents[300:340],
                           "prompts_train": [{"prompt": prompt} for prompt in prompts[:60]],
                           "prompts_test": [{"prompt": prompt} for prompt in prompts[60:68]]}.items():
            files.write_jsonl(folder / f"{name}.jsonl", rows)
        return {}

    tasks.publish(root / "data" / "reviews" / "prepared", "reviews", write)


def environment() -> dict[str, str]:
    """As many threads as here: another number of them adds in another order, and the weights differ in the last bit."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": ""}


def start(root: Path, script: str, *argv: str, cwd: Path) -> subprocess.Popen:
    """A script of the copy as a process of its own."""
    return subprocess.Popen([sys.executable, root / f"{script}.py", *map(str, argv)], cwd=cwd, env=environment(), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run_here(root: Path, cwd: Path, script: str, *argv: str, draw: bool = False) -> int | str | None:
    """A script in this process, which spares it the two seconds that importing torch takes, and the one of its figure.

    Returns what the script exits with: 0, a status, or the message that a real process writes to stderr before status 1.
    """
    module = importlib.import_module(script.replace("/", "."))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "ROOT", root)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(sys, "excepthook", sys.excepthook)
        if not draw:
            patch.setattr(evaluate, "draw_run", lambda path, *_: path.write_bytes(b""))
        patch.chdir(cwd)
        try:
            if script in ("evaluate", "sample"):
                module.main([*map(str, argv)])
            else:
                config = settings.parse(module.Config, module.__doc__, [*map(str, argv)])
                module.main(config) if hasattr(module, "main") else module.train(config)
        except SystemExit as stop:
            return stop.code
    return 0


def write_pairs(path: Path, count: int = 24, seed: int = 2) -> Path:
    """A pairs file as somebody might bring it: two endings of the same opening words."""
    rng = random.Random(seed)
    rows = []
    while len(rows) < count:
        (first, _), (second, _) = sample_review(rng), sample_review(rng)
        prompt = " ".join(first.split()[:4])
        rows.append({"prompt": prompt, "chosen": first[len(prompt):][:60], "rejected": " " + second[:50]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
