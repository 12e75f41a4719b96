"""experiments/bugs.py: every bug fits today's code, a sign is read from a log by hand, the committed table is that of the
committed rows, and one bug from planting to its row."""
import json
import re

import pytest

import clone
from common import ROOT
from conftest import log_of
from experiments import bugs
from experiments.bugs import BUGS, COMMANDS, WHERE, Config, planted, readings

RESULTS = ROOT / "results" / "bugs"


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_every_bug_fits_todays_code(bug):
    """Its text is in the file once, what comes out is Python and is not what was there, and its row of tests/README.md names
    the place where it was seen."""
    text = (ROOT / bug.file).read_text(encoding="utf-8")
    assert text.count(bug.old) == 1
    changed = planted(bug)
    assert compile(changed, bug.file, "exec").co_code is not None and changed != text
    assert bug.method in COMMANDS and bug.sign[0] in WHERE
    if bug.row:
        table = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
        assert bug.seen in re.search(rf"^\| {bug.row} \|.*", table, flags=re.M)[0]


def test_names_are_those_of_one_exhibit_each():
    names = [bug.name for bug in BUGS]
    assert len(set(names)) == len(names) >= 12
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in names)  # a folder, and a heading that can be linked to


def test_a_text_that_is_not_there_once_is_one_line(tmp_path, monkeypatch):
    """Whoever changes the code hears of it before anything is built, by the name of the bug."""
    bug = BUGS[0]._replace(name="twice", file="a.py", old="x = 1", new="x = 2")
    monkeypatch.setattr(bugs, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("x = 1\n")
    assert planted(bug) == "x = 2\n"
    monkeypatch.setattr(bugs, "BUGS", [bug])
    for text, times in (("y = 1", 0), ("x = 1; x = 1", 2)):
        (tmp_path / "a.py").write_text(text)
        with pytest.raises(SystemExit, match=f"^error: twice: .* occurs {times} times in a.py, expected once: x = 1$"):
            bugs.main(Config(out=str(tmp_path / "out")))


def test_a_diff_is_what_changed():
    bug = BUGS[0]._replace(old="    a = 1\n    b = 2", new="    a = 1\n    b = 3\n    c = 4")
    assert bugs.diff(bug).splitlines() == [" a = 1", "-b = 2", "+b = 3", "+c = 4"]


def test_signs_by_hand():
    """Ten steps whose loss is 10, 9, ..., 1: the last fifth are two. What is logged between steps or at the end is no step."""
    log = [{"step": i, "loss": 10.0 - i, "grad_norm": 1.0} for i in range(10)]
    log.insert(5, {"step": 5, "warning": "kl"})
    log.append({"step": 10, "held_out_accuracy": 0.25})
    found = readings(log, {"reward": 0.5, "kl": -3.0, "kind": "policy"})
    assert set(found) == set(WHERE)
    assert [found[where]["loss"] for where in ("first", "least", "late")] == [10, 1, 1.5]
    assert found["end"]["held_out_accuracy"] == 0.25 and found["reported"] == {"reward": 0.5, "kl": -3}


def test_an_unknown_bug_is_one_line_with_the_known_ones():
    with pytest.raises(SystemExit, match="^error: --only nope: no such bug .known: mean, "):
        Config(only="nope")
    with pytest.raises(SystemExit, match="^error: --seeds 0"):
        Config(seeds=0)


# ---- one bug, from planting to its row -------------------------------------------------------------------------------

def test_a_planted_bug_is_run_and_measured_without_it(root, tmp_path, monkeypatch, capfd):
    """The mean of log-probabilities: the first loss is ln 2, the run itself reports a KL far below 0, as it takes the mean for
    the sum, and the code without the bug measures that of the policy. What has a row is not run again; another bug under the
    same name is; the code and the data that it started from are as they were."""
    assert clone.run_here(root, root, "sft", *clone.SFT) == 0
    monkeypatch.setitem(COMMANDS, "DPO", "dpo.py --batch-size 64 --lr 2e-3 --warmup 2")
    before = {path: path.read_bytes() for path in [*ROOT.glob("*.py"), *root.glob("data/reviews/prepared/*")]}
    out, measure, ran = tmp_path / "bugs", bugs.measure, []
    table = {"reward": 0.5, "kl": 1.0, "share": 0.5, "share_known": True}
    signs = {"late": {"loss": 0.6}, "reported": {"kl": 1.0}}

    def only_the_bug(folder, method, seed, start, device):
        ran.append(folder.name)
        return {**table, "signs": signs} if folder.name == "none-dpo" else measure(folder, method, seed, start, device)

    def museum() -> str:
        argv = ["--only", "mean", "--seeds", "1", "--sft", root / "runs/reviews/sft", "--out", out]
        assert clone.run_here(root, tmp_path, "experiments/bugs", *argv) == 0
        return capfd.readouterr().out

    monkeypatch.setattr(bugs, "measure", only_the_bug)
    said = museum()
    assert "+logprobs = logprobs / mask.sum(1)[rows]" in said and f"rows and table  ->  {out}" in said
    clean, row = (json.loads(line) for line in (out / "results.jsonl").read_text().splitlines())
    assert (clean["bug"], row["bug"], row["seed"]) == ("", "mean", 0)
    assert row["signs"]["first"]["loss"] == pytest.approx(0.693147, abs=1e-6)
    losses = [step["loss"] for step in log_of(out / "mean" / "seed0") if "loss" in step]
    assert len(losses) == 5 and row["signs"]["late"]["loss"] == losses[-1]  # 360 pairs in batches of 64
    assert row["signs"]["reported"]["kl"] < -5 and row["kl"] > 0
    assert all(path.read_bytes() == content for path, content in before.items())

    assert museum().split("\n\n")[-1] == said.split("\n\n")[-1] and ran == ["none-dpo", "mean"]
    monkeypatch.setattr(bugs, "measure", lambda *args: ran.append("again") or {**table, "signs": signs})
    monkeypatch.setattr(bugs, "BUGS", [bug._replace(new=bug.new + " ") for bug in BUGS])
    museum()
    assert ran == ["none-dpo", "mean", "again"]
    assert len((out / "results.jsonl").read_text().splitlines()) == 2  # the row of the bug as it was is gone


# ---- the page --------------------------------------------------------------------------------------------------------

def test_the_page_has_the_table_of_the_committed_rows_and_every_exhibit():
    page = (RESULTS / "README.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (RESULTS / "results.jsonl").read_text().splitlines()]
    assert bugs.markdown(rows) in page
    for bug in BUGS:
        assert bugs.exhibit(bug) in page, bug.name
        assert any(row["bug"] == bug.name for row in rows)


def test_the_course_has_the_bugs_of_the_museum():
    """Its diffs, made by hand with the file's own indentation, give the files that the museum plants; what is to be expected of
    its command is the table of the rows with seed 0."""
    page = (ROOT / "docs" / "course" / "6-silent-bugs.md").read_text(encoding="utf-8")
    files = {bug.file: (ROOT / bug.file).read_text(encoding="utf-8") for bug in BUGS}
    every = {planted(bug): bug.name for bug in BUGS}
    shown = set()
    for text in re.findall(r"```diff\n(.*?)```", page, flags=re.S):
        old, new = ("".join(line[1:] + "\n" for line in text.splitlines() if line[0] in signs) for signs in (" -", " +"))
        found = [every[source.replace(old, new)] for source in files.values() if source.count(old) == 1]
        assert len(found) == 1 and f"`{found[0]}`" in page, text
        shown.add(found[0])
    assert len(shown) >= 6
    rows = [json.loads(line) for line in (RESULTS / "results.jsonl").read_text().splitlines()]
    both = [row for row in rows if row["method"] == "DPO" and row["bug"] in ("", "mean") and row["seed"] == 0]
    assert bugs.markdown(both) in page
