"""Print committed samples beside the texts that they answer, for whoever has the data.

    python experiments/samples.py results/tldr/winrate/samples.jsonl            # the first three rows
    python experiments/samples.py results/imdb/samples.jsonl --rows 20

Other people's words are not in this repository. A row of samples of a real task holds the `id` of its prompt (the first 12
hex digits of the SHA-256 of its text), what our own policies wrote, and the scores. The prompt, and the reference where
there is one, are looked up in data/<task>/prepared/, which data/<task>/prepare.py makes.

Reads   the samples, data/<task>/prepared/*.jsonl
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, for the imports below

from common import ROOT, fail  # noqa: E402
from common.files import read_jsonl  # noqa: E402
from common.settings import Parser  # noqa: E402
from common.tasks import check_prepared  # noqa: E402
from evaluate import prompt_id  # noqa: E402


def originals(folder: Path) -> dict[str, dict]:
    """Every row of a prepared folder that has a prompt, by the id of that prompt; one with a reference text wins."""
    if not check_prepared(folder):
        fail(f"{folder}: not there, and with it the prompts; python {folder.parent}/prepare.py makes it")
    found: dict[str, dict] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in read_jsonl(path, {}):
            if isinstance(row.get("prompt"), str):
                found[prompt_id(row["prompt"])] = {**row, **found.get(prompt_id(row["prompt"]), {})}
    return found


def main(path: str, rows: int) -> None:
    """Print the first rows of a samples file, each beside its prompt and reference."""
    samples = read_jsonl(path, {"task": str, "id": str})
    known = originals(ROOT / "data" / samples[0]["task"] / "prepared")
    for sample in samples[:rows]:
        original = known.get(sample["id"])
        print("\n" + (original["prompt"] if original else f"[{sample['id']}: no such prompt in this copy of the data]"))
        if original and "text" in original:
            print(f"{'reference':16} {original['text'].strip()}")
        for name, value in sample.items():
            if name not in ("task", "id", "line", "texts"):
                print(f"{name:16} {value.strip() if isinstance(value, str) else value}")


if __name__ == "__main__":
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="FILE", help="a samples.jsonl of a real task")
    parser.add_argument("--rows", type=int, default=3, help="how many to print [3]")
    main(**vars(parser.parse_args()))
