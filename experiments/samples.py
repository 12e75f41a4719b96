"""Print committed samples beside the texts that they answer.

    python experiments/samples.py results/posts/winrate/samples.jsonl       # the first three rows
    python experiments/samples.py results/tldr/winrate/samples.jsonl        # if you have the data
    python experiments/samples.py results/imdb/samples.jsonl --rows 20

Other people's words are not in this repository. A row of samples of a real task holds the `id` of
its prompt (the first 12 hex digits of the SHA-256 of its text), what our own policies wrote, and
the scores. The prompt, and the reference where there is one, are looked up in
data/<task>/prepared/, which data/<task>/prepare.py makes. The other tasks are grammars of ours:
their rows hold the prompt itself.

Reads   the samples, data/<task>/prepared/*.jsonl
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root

import argparse

from common import ROOT, fail
from common.files import read_jsonl
from common.settings import Parser, stop_like_ctrl_c
from common.tasks import check_prepared, prompt_id

ABOUT = ("task", "texts", "id", "line", "prompt", "reference")  # of a row: not a method's words


def originals(folder: Path) -> dict[str, dict]:
    """Every row of a prepared folder that has a prompt, by that prompt's id.

    A prompt may be in several files, and have its reference ("text") in one of them alone.
    """
    if not check_prepared(folder):
        fail(f"{folder}: not there, and with it the prompts; "
             f"python {folder.parent}/prepare.py makes it")
    found: dict[str, dict] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in read_jsonl(path, {}):
            if isinstance(row.get("prompt"), str):
                name = prompt_id(row["prompt"])
                found[name] = {**row, **found.get(name, {})}
    return found


def show(sample: dict, known: dict[str, dict]) -> str:
    """A row of samples as lines for the screen: prompt, reference, and each method's words.

    Args:
        known: id of a prompt -> a row with "prompt", and "text" where there is a reference.
    """
    name = sample.get("id", "")
    original = known.get(name, {})
    prompt = sample.get("prompt") or original.get("prompt")
    reference = sample.get("reference") or original.get("text")
    lines = [prompt or f"[{name}: no such prompt in this copy of the data]"]
    if reference:
        lines.append(f"{'reference':18} {reference.strip()}")
    for key, value in sample.items():
        if key not in ABOUT:
            lines.append(f"{key:18} {value.strip() if isinstance(value, str) else value}")
    return "\n".join(lines)


def main(path: str, rows: int) -> None:
    """Print the first rows of a samples file, each beside its prompt and reference."""
    if rows < 1:
        fail(f"--rows {rows}: must be > 0")
    samples = read_jsonl(path, {})[:rows]
    known: dict[str, dict] = {}
    for task in dict.fromkeys(row.get("task") for row in samples if "prompt" not in row):
        if not isinstance(task, str):
            fail(f"{path}: a row with neither a 'prompt' nor the 'task' and 'id' of one")
        known |= originals(ROOT / "data" / task / "prepared")
    for sample in samples:
        print("\n" + show(sample, known))


if __name__ == "__main__":
    stop_like_ctrl_c()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="FILE", help="a samples.jsonl")
    parser.add_argument("--rows", type=int, default=3, help="how many to print [3]")
    main(**vars(parser.parse_args()))
