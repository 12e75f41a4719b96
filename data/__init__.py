"""Prepared datasets: what every data/<task>/prepare.py writes and every script reads.

A prepared folder (data/<task>/prepared/) holds, all of it text that a person can read:
    train.jsonl, test.jsonl (and valid.jsonl)   documents, {"text"}; "label" where the gold classifier needs one
    prompts_train.jsonl, prompts_test.jsonl     {"prompt"}
    tokenizer.tiktoken                          byte-level BPE learned on train.jsonl
    meta.json                                   counts, seeds, and the sha256 of every file above
"""
from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path
from typing import Callable

from common import ROOT, fail, read_json, sha256, write_json


def publish(folder: Path, task: str, write: Callable[[Path], dict]) -> dict:
    """Let `write(temporary folder)` make the files and return their meta; then rename the folder into place.

    Whoever looks sees a complete folder or none. Returns the meta with the checksums added.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
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
    """The folder's meta if it is there and whole, None if it is not there; a damaged file stops with its name."""
    if not folder.exists():
        return None
    meta = read_json(folder / "meta.json")
    for name, digest in meta["sha256"].items():
        if not (folder / name).exists():
            fail(f"{folder / name} is missing: delete {folder} and prepare it again")
        if sha256(folder / name) != digest:
            fail(f"{folder / name} differs from its checksum in meta.json: delete {folder} and prepare it again")
    return meta


def ensure(dataset: str) -> Path:
    """The prepared folder of a dataset; data/<dataset>/prepare.py makes it if it is missing."""
    folder = ROOT / "data" / dataset / "prepared"
    if not (ROOT / "data" / dataset / "prepare.py").exists():
        known = sorted(path.parent.name for path in (ROOT / "data").glob("*/prepare.py"))
        fail(f"--dataset {dataset}: there is no data/{dataset}/prepare.py (known: {', '.join(known)})")
    if not (folder / "meta.json").exists():
        importlib.import_module(f"data.{dataset}.prepare").prepare(out=folder)
    return folder
