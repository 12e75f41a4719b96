"""Other people's sentences are not in this repository: every committed file of a real task is read for them."""
import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from common.files import read_jsonl
from experiments import samples

ROOT = Path(__file__).resolve().parents[1]
REAL = ("imdb", "tldr")  # tasks whose texts are somebody's
OWN = {"before", "after", "SFT", "Preferred-FT", "DPO", "PPO", "REINFORCE"}  # fields that hold a policy's words
PLAIN = {"task", "id", "texts"}
DATA = Path(os.environ.get("PREFERENCE_DATA", "")) / "tldr"
WORDS = 12  # so many words in a row that stand in somebody's post too are a quotation


def committed() -> list[Path]:
    """Every committed file, or every file there is where this is no checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split("\0")[:-1] or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.*")]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


@pytest.mark.parametrize("path", [path for task in REAL for path in (ROOT / "results" / task).rglob("*.jsonl")],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_rows_of_a_real_task_hold_ids_own_words_and_numbers(path):
    """Any text in a row is a short name of ours (a method, a setting, a warning) or a policy's own words."""
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert not {"prompt", "reference", "post", "title", "text", "summary", "chosen", "rejected"} & set(row)
        for name, value in row.items():
            if isinstance(value, str) and name not in OWN:
                assert len(value.split()) <= 8 or name == "message", (name, value)
        if path.name.startswith("samples"):
            assert {"task", "id"} <= set(row) and len(row["id"]) == 12
            assert all(name in OWN | PLAIN or isinstance(value, (int, float)) for name, value in row.items())


def shingles(text: str, length: int = WORDS, step: int = 1) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i:i + length]) for i in range(0, len(words) - length + 1, step)}


@pytest.mark.skipif(not DATA.is_dir(), reason="PREFERENCE_DATA names no folder with tldr/")
def test_no_committed_file_quotes_a_post():
    """No twelve words in a row of a post, title or summary stand in any committed text file."""
    ours: dict[tuple[str, ...], Path] = {}
    halves = set()  # for speed: wherever twelve words in a row are the same, so is one of the text's 1st, 2nd, 3rd, ... six
    for path in committed():
        if path.suffix in (".md", ".jsonl", ".json", ".txt", ".py"):
            text = path.read_text(encoding="utf-8").replace("\\n", " ").replace('\\"', '"')
            ours |= dict.fromkeys(shingles(text), path)
            halves |= shingles(text, WORDS // 2)
    for path in DATA.glob("*.jsonl.xz"):
        for row in read_jsonl(path, {"post": str, "title": str}):
            for field in ("post", "title", "summary"):
                text = row.get(field) or ""
                if halves.isdisjoint(shingles(text, WORDS // 2, WORDS // 2)):
                    continue
                quoted = shingles(text) & ours.keys()
                # what a policy repeats of a post it was asked to summarise it has learned to say; a file of ours must not
                quoted = {words for words in quoted if "samples" not in ours[words].name}
                assert not quoted, (ours[next(iter(quoted))], " ".join(next(iter(quoted))))


def test_the_command_prints_samples_beside_their_texts(tmp_path, monkeypatch, capsys):
    """The text of a prompt is found by its id in the prepared folder; one that is not there is said to be missing."""
    prompt = "POST: my dog sings\n\nTL;DR:"
    name = hashlib.sha256(prompt.encode()).hexdigest()[:12]
    prepared = tmp_path / "data/tldr/prepared"
    prepared.mkdir(parents=True)
    (prepared / "test.jsonl").write_text(json.dumps({"prompt": prompt, "text": " it sings"}) + "\n")
    (prepared / "meta.json").write_text('{"sha256": {}}')
    rows = [{"task": "tldr", "id": name, "DPO": " a dog", "DPO score": 0.5}, {"task": "tldr", "id": 12 * "0", "DPO": " no"}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(samples, "ROOT", tmp_path)
    samples.main(str(tmp_path / "samples.jsonl"), 2)
    shown = capsys.readouterr().out
    assert prompt in shown and "it sings" in shown and "a dog" in shown and "0.5" in shown
    assert "[000000000000: no such prompt" in shown
    with pytest.raises(SystemExit, match="prepare.py makes it"):
        samples.originals(tmp_path / "data/imdb/prepared")
