"""The whole suite runs without network, and so do the processes it starts: whatever would leave this machine raises.

Tiny models are made here, too.
"""
import dataclasses
import itertools
import json
import os
import random
import runpy
import signal
import socket
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # everything here is tiny; see pytest.ini
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # expectations are computed on the CPU, so the code under test is run there, too

os.fsync = lambda file: None  # there is no power cut here, and thousands of small files would wait for the disk

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

OFFLINE = ROOT / "tests" / "offline"  # a sitecustomize.py, which the processes that tests start find by PYTHONPATH
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")]))
runpy.run_path(str(OFFLINE / "sitecustomize.py"))

import data.reviews  # noqa: E402  (after the path is set)
import evaluate
import sft
from common import tasks, training
from common.files import write_jsonl
from common.tokenizer import train_bpe
from data.reviews.grammar import gold_reward, sample_review
from model import GPT, GPTConfig


LONG = ["test_processes", "test_faults", "test_frontier", "test_cli", "test_ppo", "test_imdb", "test_evaluate", "test_tldr"]


def pytest_collection_modifyitems(items) -> None:
    """The files that take longest first: each is run by one process, and neither should wait for the other's last one. Those
    with processes of their own wait for them now and then, and meanwhile the other process has something to do."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True)
def signals():
    """Ctrl-C and SIGTERM do what they usually do, here and in what a test starts: a shell that starts pytest in the
    background ignores SIGINT, and a training that a test has broken off leaves its own handlers."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


draw_progress = evaluate.draw_progress


@pytest.fixture(autouse=True)
def no_figure_on_the_way(monkeypatch):
    """A figure at every evaluation takes a third of a second; `draw_progress` above draws it all the same."""
    monkeypatch.setattr(evaluate, "draw_progress", lambda *_: None)


@pytest.fixture(autouse=True)
def any_device(monkeypatch):
    """--device of one test is not that of the next."""
    monkeypatch.setattr(training, "asked_for", "auto")


# ---- tiny models -----------------------------------------------------------------------------------------------------

def tiny_gpt(vocab_size: int = 11, block_size: int = 12, n_layer: int = 2, n_head: int = 2, n_embd: int = 8, seed: int = 0,
             size: float = 0.5) -> GPT:
    """A small GPT with every parameter drawn from N(0, size^2), gains around 1: far from uniform, nothing zero."""
    model = GPT(GPTConfig(vocab_size, block_size, n_layer, n_head, n_embd))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=draw) + (".ln_" in name and "weight" in name))
    return model.eval()


def naive_logprobs(model: torch.nn.Module, prompt: list[int], response: list[int]) -> torch.Tensor:
    """log pi(token | all before it) of each response token, (R,): the definition, one unpadded row, the whole softmax."""
    table = torch.log_softmax(model(torch.tensor([prompt + response]))[0], -1)
    return torch.stack([table[len(prompt) + r - 1, token] for r, token in enumerate(response)])


def every_response(vocab, length, eos):
    """All responses of at most `length` tokens that can be sampled: they end at the first eos, or are cut at `length`."""
    others = [v for v in range(vocab) if v != eos]
    for n in range(length):
        yield from ([*start, eos] for start in itertools.product(others, repeat=n))
    yield from map(list, itertools.product(others, repeat=length))


# ---- a small task and a small policy, from which tiny runs start -----------------------------------------------------

def smaller(task: tasks.Task, **sizes) -> tasks.Task:
    """A task with other sizes in its preset for a CPU; those of the bank by default: 8 prompts, 16 responses each."""
    sizes = dict(bank_prompts=8, bank_samples=16) | sizes
    return dataclasses.replace(task, presets={"cpu": dataclasses.replace(task.presets["cpu"], **sizes)})


@pytest.fixture(scope="session")
def small_reviews_folder(tmp_path_factory) -> Path:
    """What data/reviews/prepare.py writes, with fewer rows and tokens: 4,000 reviews, 768 tokens."""
    folder = tmp_path_factory.mktemp("data") / "prepared"

    def write(folder: Path) -> dict:
        rng = random.Random(1)
        texts = [sample_review(rng)[0] for _ in range(4264)]
        prompts = [{"prompt": " ".join(text.split()[:4])} for text in texts[4200:]]
        for name, rows in {"train": [{"text": text} for text in texts[:4000]],
                           "test": [{"text": text} for text in texts[4000:4200]],
                           "prompts_train": prompts[:56], "prompts_test": prompts}.items():
            write_jsonl(folder / f"{name}.jsonl", rows)
        train_bpe(texts[:4000], 768).save(folder / "tokenizer.tiktoken")
        return {}

    tasks.publish(folder, "reviews", write)
    return folder


@pytest.fixture
def small_reviews(small_reviews_folder, monkeypatch) -> Path:
    """The scripts find the small task in place of `reviews`, and evaluate on 8 prompts, 16 responses of the reference each."""
    monkeypatch.setattr(tasks, "prepared", lambda dataset: small_reviews_folder)
    monkeypatch.setattr(data.reviews, "TASK", smaller(data.reviews.TASK))
    return small_reviews_folder


@pytest.fixture(scope="session")
def sft_run(small_reviews_folder, tmp_path_factory) -> Path:
    """The folder of a finished SFT run on it: one layer of 32 channels, 40 steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "prepared", lambda dataset: small_reviews_folder)
        return sft.train(sft.Config(out=str(tmp_path_factory.mktemp("runs") / "sft"), n_layer=1, n_head=2, n_embd=32,
                                    block_size=112, steps=40, batch_size=16, warmup=5, lr=2e-2))


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory) -> Path:
    """80 pairs: the opening of a review and the rest of two, of which the one with the higher gold reward is chosen."""
    rng, rows = random.Random(2), []
    for _ in range(80):
        (opening, a), (_, b) = (sample_review(rng)[0].split(". ", 1) for _ in range(2))
        rejected, chosen = sorted((" " + a, " " + b), key=gold_reward)
        rows.append({"prompt": opening + ".", "chosen": chosen, "rejected": rejected})
    write_jsonl(path := tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)
    return path


@pytest.fixture
def gradients(monkeypatch) -> list[list[torch.Tensor]]:
    """Filled, while a script trains, with every step's gradients as they are before clipping."""
    steps, clip = [], torch.nn.utils.clip_grad_norm_

    def spy(parameters, limit):
        parameters = list(parameters)
        steps.append([p.grad.clone() for p in parameters])
        return clip(parameters, limit)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    return steps


def skip_without_loopback() -> None:
    """For tests that start a server on 127.0.0.1: a container may have no network at all, not even this one."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        pytest.skip(f"127.0.0.1 cannot be reached here: {error}")


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


# ---- fixtures that are defined beside what they need ------------------------------------------------------------------

from clone import root  # noqa: F401
from toy import tables, toy  # noqa: F401
