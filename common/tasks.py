"""Tasks: what the scripts need to know of one, and its prepared data.

A task is a folder of data/. Its __init__.py holds TASK: the gold reward, and every size and setting
that the task has of its own. Its prepare.py has prepare(out=FOLDER), which makes the folder
data/<task>/prepared/. Nothing else names a task. A folder of your own files is a task, too, see
common/own_data.py.

A prepared folder holds, all of it text that a person can read:
    train, test (and valid) .jsonl    documents, {"text"}; "prompt" beside it where the text answers
                                      one; "label" where a classifier is the gold reward
    prompts_train, prompts_test       {"prompt"}
    pretrain.jsonl                    {"text"}, to be read before train.jsonl can be learned
    comparisons_train, ..._test       {"prompt", "chosen", "rejected"} of people, where some are
    tokenizer.tiktoken                byte-level BPE learned on train.jsonl
    meta.json                         counts, seeds, and the sha256 of every file above
"""
from __future__ import annotations

import hashlib
import http.client
import importlib
import os
import shutil
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Literal

from tqdm import tqdm

from common import ROOT, fail
from common.files import is_running, read_json_object, read_jsonl, sha256, write_json
from common.processes import one_writes


# ---- what a task is ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Preset:
    """Sizes of a task on one kind of machine, and the settings of the scripts that differ from
    their Config there."""
    pair_prompts: int  # training prompts that pairs are sampled for
    pair_samples: int  # responses to each of them; every two of these make a pair
    bank_prompts: int  # test prompts on which every policy is evaluated
    bank_samples: int  # responses of the reference to each of them, from which the optimum is
    # computed
    evaluate_every: dict[str, int]  # script -> training steps between two evaluations in
    # experiments/frontier.py
    settings: dict[str, dict[str, Any]]  # "dpo" -> its settings; "sft chosen" -> those of sft.py
    # --on chosen alone
    minutes: dict[str, float] = field(default_factory=dict)  # stage -> about how long it takes, to
    # be said before it does


@dataclass(frozen=True)
class Task:
    """A task. Every response continues its prompt literally, so a text is prompt + response."""
    labels: Literal["bt", "argmax"]  # who wins a sampled pair by default: see label_pairs in
    # common/pairs.py
    label_scale: float  # of the Bradley-Terry labels: P(a beats b) = sigmoid(label_scale (r_a -
    # r_b))
    presets: dict[str, Preset]  # "cpu", and other kinds of machine
    gold_reward: Callable[[str], float] | None = None  # text -> [0, 1]; None: a classifier of the
    # labelled documents
    gold_name: str = "exact, as the task defines it"  # what the gold reward is, for the tables that
    # report it
    real: bool = False  # its texts are other people's words: samples that are kept name a prompt by
    # its id
    folder: Path | None = None  # of the user's own files; such a task has no gold reward


def is_own(dataset: str) -> bool:
    """Whether --dataset names a folder of the user's files: a path with a slash, or a folder that
    is no task."""
    if "/" in dataset or os.sep in dataset:
        return True
    is_task = (ROOT / "data" / dataset / "prepare.py").exists()
    return dataset != "" and not is_task and Path(dataset).is_dir()


def own_pairs(dataset: str) -> str:
    """The pairs file of a folder of the user's; "" where the task's pairs are sampled."""
    if not is_own(dataset):
        return ""
    path = Path(dataset) / "pairs.jsonl"
    if not path.exists():
        fail(f"--dataset {dataset}: no pairs.jsonl in it to learn from; or give --pairs FILE")
    return str(path)


def load(dataset: str) -> Task:
    """The TASK of a folder of data/, or of the user's own; one that is not there stops with those
    that are."""
    if is_own(dataset):
        return importlib.import_module("common.own_data").task(Path(dataset))
    folder = ROOT / "data" / dataset
    if not (folder / "prepare.py").exists():
        known = sorted(path.parent.name for path in (ROOT / "data").glob("*/prepare.py"))
        fail(f"--dataset {dataset}: there is no data/{dataset}/prepare.py (known: "
             f"{', '.join(known)}), and no folder of that name")
    task = getattr(importlib.import_module(f"data.{dataset}"), "TASK", None)
    if not isinstance(task, Task):
        fail(f"data/{dataset}/__init__.py: no TASK there; see common/tasks.py")
    return task


def load_preset(dataset: str, preset: str) -> Preset:
    presets = load(dataset).presets
    if preset not in presets:
        where = dataset if is_own(dataset) else f"data/{dataset}"
        fail(f"--preset {preset}: {where} has no such preset (known: {', '.join(presets)})")
    return presets[preset]


def settings_of(dataset: str, preset: str, script: str, on: str = "") -> dict[str, Any]:
    """What a task says of a script's settings, and of those of its --on."""
    settings = load_preset(dataset, preset).settings
    return settings.get(script, {}) | settings.get(f"{script} {on}", {})


def prompts(dataset: str, part: Literal["train", "test"]) -> list[str]:
    """The prompts of a task, as texts."""
    return [
        row["prompt"]
        for row in read_jsonl(prepared(dataset) / f"prompts_{part}.jsonl", {"prompt": str})
    ]


def prompt_id(prompt: str) -> str:
    """What stands for a prompt where its text may not be repeated: the first 12 hex digits of its
    SHA-256."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:12]


# ---- prepared data -------------------------------------------------------------------------------

def publish(folder: Path, task: str, write: Callable[[Path], dict]) -> dict:
    """Let `write(temporary folder)` make the files and return their meta; then rename the folder
    into place.

    Whoever looks sees a complete folder or none. Returns the meta with the checksums added.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):  # of processes that were killed
        if left == temporary or not is_running(int(left.name.split(".")[-2])):
            shutil.rmtree(left, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        meta = {"task": task, **write(temporary)}
        meta["sha256"] = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
        write_json(temporary / "meta.json", meta)
        os.replace(temporary, folder)
        return meta
    except OSError as error:
        fail(f"{folder}: cannot be written ({error.strerror})")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_prepared(folder: Path) -> dict | None:
    """The folder's meta if it is there and whole, None if it is not there; a damaged file stops
    with its name."""
    if not folder.exists():
        return None
    meta = read_json_object(folder / "meta.json", "sha256")
    for name, digest in meta["sha256"].items():
        if not (folder / name).exists():
            fail(f"{folder / name} is missing: delete {folder} and prepare it again")
        if sha256(folder / name) != digest:
            fail(f"{folder / name} differs from its checksum in meta.json: delete {folder} and "
                 "prepare it again")
    return meta


def prepared(dataset: str) -> Path:
    """The prepared folder of a dataset, checked; data/<dataset>/prepare.py makes it if it is
    missing, or that of a folder of the user's is made of the files in it."""
    load(dataset)
    if is_own(dataset):
        with one_writes() as writer:
            if writer:
                importlib.import_module("common.own_data").prepare(Path(dataset))
        return Path(dataset) / "prepared"
    folder = ROOT / "data" / dataset / "prepared"
    if not check_prepared(folder):
        print(f"building what is missing: python data/{dataset}/prepare.py")
        with one_writes() as writer:
            if writer:
                importlib.import_module(f"data.{dataset}.prepare").prepare(out=folder)
    return folder


def data_id(folder: Path, *names: str) -> str:
    """16 hex digits of files of a prepared folder: what was made of them is tied to their content
    by this."""
    digests = read_json_object(folder / "meta.json", "sha256")["sha256"]
    return hashlib.sha256(" ".join(digests[name] for name in names).encode()).hexdigest()[:16]


def download(url: str, target: Path, otherwise: str, md5: str | None = None) -> Path:
    """Fetch `url` to `target` by way of `target`.part, which is continued if an earlier run left
    one.

    Args:
        otherwise: what to do where there is no network, as the error says it.
        md5: the checksum expected; a file with another is removed.
    """
    if target.exists():  # only ever renamed to this name after its checksum was right
        return target
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0  # bytes
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            # 206 Partial Content; a server that ignores Range says 200 and sends it all
            if response.status != 206:
                have = 0
            # bytes, if the server tells
            size = None if response.length is None else have + response.length
            bar = tqdm(desc=target.name,
                       initial=have,
                       total=size,
                       unit="B",
                       unit_scale=True,
                       disable=None)
            with bar, part.open("ab" if have else "wb") as file:
                while block := response.read(1 << 16):
                    have += file.write(block)
                    bar.update(len(block))
            # http.client does not tell a lost connection from the end
            if size is not None and have < size:
                raise ConnectionError(f"connection lost after {have:,} of {size:,} bytes")
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        # 416 Range Not Satisfiable: nothing is left to send, so the part is complete, or wrong: the
        # checksum will tell
        if getattr(error, "code", None) != 416:
            fail(f"could not fetch {url} ({error}); run again to resume, or {otherwise}")
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if md5 and found != md5:
        part.unlink()  # resuming would never mend it
        fail(f"{url} has md5 {found}, expected {md5}; removed it: run again, or {otherwise}")
    os.replace(part, target)
    return target
