"""Prepared datasets: what every data/<task>/prepare.py writes and every script reads.

A prepared folder (data/<task>/prepared/) holds, all of it text that a person can read:
    train.jsonl, test.jsonl (and valid.jsonl)   documents, {"text"}; "label" where the gold classifier needs one
    prompts_train.jsonl, prompts_test.jsonl     {"prompt"}
    pretrain.jsonl                              {"text"}, where a model must read more before it can learn train.jsonl
    tokenizer.tiktoken                          byte-level BPE learned on train.jsonl
    meta.json                                   counts, seeds, and the sha256 of every file above
"""
from __future__ import annotations

import hashlib
import http.client
import importlib
import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Callable

from tqdm import tqdm

from common import ROOT, fail
from common.files import read_json, sha256, write_json


def publish(folder: Path, task: str, write: Callable[[Path], dict]) -> dict:
    """Let `write(temporary folder)` make the files and return their meta; then rename the folder into place.

    Whoever looks sees a complete folder or none. Returns the meta with the checksums added.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had our number
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
    """The prepared folder of a dataset, checked; data/<dataset>/prepare.py makes it if it is missing."""
    folder = ROOT / "data" / dataset / "prepared"
    if not (ROOT / "data" / dataset / "prepare.py").exists():
        known = sorted(path.parent.name for path in (ROOT / "data").glob("*/prepare.py"))
        fail(f"--dataset {dataset}: there is no data/{dataset}/prepare.py (known: {', '.join(known)})")
    if not check_prepared(folder):
        importlib.import_module(f"data.{dataset}.prepare").prepare(out=folder)
    return folder


def download(url: str, target: Path, otherwise: str, md5: str | None = None) -> Path:
    """Fetch `url` to `target` by way of `target`.part, which is continued if an earlier run left one.

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
            if response.status != 206:  # 206 Partial Content; a server that ignores Range says 200 and sends it all
                have = 0
            size = None if response.length is None else have + response.length  # bytes, if the server tells
            bar = tqdm(desc=target.name, initial=have, total=size, unit="B", unit_scale=True, disable=None)
            with bar, part.open("ab" if have else "wb") as file:
                while block := response.read(1 << 16):
                    have += file.write(block)
                    bar.update(len(block))
            if size is not None and have < size:  # http.client does not tell a lost connection from the end
                raise ConnectionError(f"connection lost after {have:,} of {size:,} bytes")
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        # 416 Range Not Satisfiable: nothing is left to send, so the part is complete, or wrong: the checksum will tell
        if getattr(error, "code", None) != 416:
            fail(f"could not fetch {url} ({error}); run again to resume, or {otherwise}")
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if md5 and found != md5:
        part.unlink()  # resuming would never mend it
        fail(f"{url} has md5 {found}, expected {md5}; removed it: run again, or {otherwise}")
    os.replace(part, target)
    return target
