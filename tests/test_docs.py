"""What the pages promise: every command that they print can be typed, every file, function and test that they name exists.

The numbers of the pages are compared with their rows in test_results.py.
"""
import argparse
import ast
import functools
import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from common import processes
from common.settings import parse
from test_own_data import write_the_pages_folder

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted({ROOT / "README.md", ROOT / "tests" / "README.md", *(ROOT / "docs").rglob("*.md"),
                *(ROOT / "results").rglob("*.md"), *(ROOT / "data").rglob("README.md")})
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
README, CLAIMS = TEXT[ROOT / "README.md"], TEXT.get(ROOT / "docs" / "claims.md", "")
RAN = (ROOT / ".ci" / "run").read_text().splitlines()
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

# What is too long for .ci/run, or needs a network, is run by a test at a small size: `NAME.py --flag` by test_NAME.py, which
# has that flag; data/TASK/prepare.py and `--dataset TASK` by test_TASK.py. These are run in another file:
SMALL = {
    "experiments/bench.py": "test_frontier.py",
    "experiments/agreement.py": "test_tldr.py",
}
READERS = {"FOLDER": "test_own_data.py", "qa": "test_own_data.py", "colours": "test_tasks.py"}  # --dataset of the reader's own


# ---- the commands ----------------------------------------------------------------------------------------------------

def commands_of(text: str) -> list[str]:
    """The lines of ```sh blocks and of indented blocks that call something of ours, joined where they end in a backslash,
    without comments, VAR=value in front, srun, and the pipe behind."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.S | re.M)
    indented = re.findall(r"^    .*", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), flags=re.M)
    script = re.sub(r"\\\n\s*", "", "\n".join(blocks + indented))
    for name, value in re.findall(r"\bfor (\w+) in (\S+?)[ ;]", script):  # a loop: its first round
        script = script.replace(f"${name}", value.strip('"'))
    lines = script.replace(" && ", "\n").splitlines()
    lines = [re.sub(r"^\s*(\w+=\S* )*(srun )?", "", re.split(r"\s+#|\s[|>&]", line)[0]).strip() for line in lines]
    return [line for line in lines if re.match(r"(python3?|torchrun|pytest|pip) |pytest$", line)]


def typed_inline(text: str) -> list[str]:
    """`python SCRIPT ...` and `pytest ...` in backticks, without those that are cut short by an ellipsis."""
    found = re.findall(r"(?<!`)`((?:python|torchrun|pytest) [^`]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    return [command for command in found if "..." not in command and "…" not in command and "SCRIPT" not in command]


class Parsed(Exception):
    """A script's own parser has accepted the command line; what would follow is not run."""


def check_script(script: str, words: list[str], monkeypatch) -> None:
    """The script exists, and its own parser takes these words. Nothing is run."""
    assert (ROOT / script).is_file(), f"{script}: there is no such script"
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if "--dataset" in words and words[(at := words.index("--dataset")) + 1] in READERS:
        words = words[:at] + words[at + 2:]
    if hasattr(module, "Config"):
        parse(module.Config, "", words)
        return
    plain = argparse.ArgumentParser.parse_args

    def stop(self, *given):
        plain(self, *given)
        raise Parsed
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def check_pytest(words: list[str]) -> None:
    """The files exist, and -k names a test in them."""
    files = [word for word in words if word.startswith("tests/")]
    assert all((ROOT / file.split("::")[0]).exists() for file in files), words
    for name in re.findall(r"\w+", words[words.index("-k") + 1]) if "-k" in words else []:
        found = [file for file in files or ["tests"] if any(name in test for test in names_of_tests(file))]
        assert found or name in ("or", "and", "not"), f"pytest -k {name}: no such test"


def names_of_tests(path: str) -> list[str]:
    """The names of the tests in a file of tests/, or in all of them."""
    files = [ROOT / path] if path.endswith(".py") else (ROOT / "tests").glob("test_*.py")
    return [name for file in files for name in names_in(file) if name.startswith("test_")]


def check_command(command: str, monkeypatch) -> None:
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "pytest"]:
        words = words[2:]
    if words[0] == "pytest":
        check_pytest(words[1:])
    elif words[0] == "torchrun":
        monkeypatch.setattr(processes, "WORLD", 2)  # --shard wants several
        start = next(i for i, word in enumerate(words) if word.endswith(".py"))
        check_script(words[start], words[start + 1:], monkeypatch)
    elif words[0] == "python":
        assert words[1] != "-c" and words[1] != "-m", command
        check_script(words[1], words[2:], monkeypatch)


@every_page
def test_every_command_can_be_typed(page, monkeypatch, tmp_path):
    """A command about the folder qa/ is typed where that folder is; the page about it has the script that writes it."""
    monkeypatch.chdir(tmp_path)
    write_the_pages_folder()
    monkeypatch.chdir(ROOT)
    for command in dict.fromkeys(commands_of(TEXT[page]) + typed_inline(TEXT[page])):
        with monkeypatch.context() as patch:
            if "--dataset qa" in command:
                patch.chdir(tmp_path)
            try:
                check_command(command, patch)
            except SystemExit as error:
                pytest.fail(f"{command}: {error}")


def run_small(command: str) -> bool:
    """A test runs what this command does, at a small size: the file that is named above has the script and its flags, where
    .ci/run has not."""
    script, *words = shlex.split(command)[1:]
    stem = Path(script).stem if Path(script).stem != "prepare" else Path(script).parent.name
    rule = SMALL.get(script, f"test_{stem}.py")
    found = mentions(rule, stem)
    for flag, value in zip(words, [*words[1:], ""]):
        if flag == "--dataset":
            found &= mentions(rule, value) or mentions(READERS.get(value, f"test_{value}.py"), stem)
        elif flag.startswith("--") and not any(line.startswith(f"python {script} ") and flag in line.split() for line in RAN):
            found &= mentions(rule, flag[2:].replace("-", "[-_]"))
    return found


def mentions(test: str, word: str) -> bool:
    path = ROOT / "tests" / test
    return path.exists() and re.search(rf"\b{word}\b", path.read_text(encoding="utf-8")) is not None


SHORT_PAGES = [page for page in PAGES if page == ROOT / "README.md" or page.parent == ROOT / "docs" / "course"]


@pytest.mark.parametrize("page", SHORT_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_run(page):
    """On the first page and in the course: by .ci/run word for word, or small by a test."""
    for command in dict.fromkeys(commands_of(TEXT[page]) + typed_inline(TEXT[page])):
        if not command.startswith("python "):
            assert command.startswith(("torchrun ", "pytest")) or command.replace("pip install", "pip install -q") in RAN, command
        else:
            assert command in RAN or run_small(command), command


# ---- files, functions, links -----------------------------------------------------------------------------------------

@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """Every function, class, method, setting and constant that a file defines."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return frozenset(found)


SOURCES = [path for folder in ("", "common", "data", "experiments", "tests") for path in
           ((ROOT / folder).rglob("*.py") if folder in ("data", "tests") else (ROOT / folder).glob("*.py"))]


def sources(name: str) -> list[Path]:
    """Our files that a page may mean by dpo.py, dpo, common/rewards.py, test_dpo.py."""
    parts = Path(name).with_suffix(".py").parts
    return [path for path in SOURCES if path.parts[-len(parts):] == parts]


def named(text: str) -> list[tuple[str, str]]:
    """(file, name) of each `dpo.py: dpo_loss`, `dpo.py:dpo_loss`, `dpo.dpo_loss` and `dpo_loss` in [`dpo.py`](dpo.py), and
    (file, "") of each `dpo.py`. FILE.py is a file of the reader's, and so is what a command has as file.py:function."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    found = re.findall(r"`([\w/]+\.py)(?:: ?([A-Za-z_]\w*))?(?:\(\))?`", text)
    found += [(file, name) for name, file in re.findall(r"`(\w+)(?:\(\))?` in \[`?([\w/]+\.py)`?\]", text)]
    for module, name in re.findall(r"`(\w+)\.([A-Za-z_]\w*)(?:\(.*?\))?`", text):
        if sources(module) and name not in ("py", "pt", "md", "csv", "png", "svg", "txt", "json", "jsonl", "yml", "Config"):
            found.append((f"{module}.py", name))
    return [(file, name) for file, name in found if not Path(file).stem.isupper() and f" {file}:" not in text
            and Path(file).parent.name not in READERS]


@every_page
def test_every_file_and_function_exists(page):
    for file, name in named(TEXT[page]):
        places = sources(file)
        assert places, f"`{file}`: there is no such file"
        assert not name or any(name in names_in(place) for place in places), f"`{file}: {name}`: there is no such name"


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), flags=re.M)
    slugs: list[str] = []
    for title in titles:
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower()).replace(" ", "-")
        slugs.append(slug + (f"-{slugs.count(slug)}" if slug in slugs else ""))
    return set(slugs) | set(re.findall(r"<a (?:name|id)=\"([^\"]+)\"", text))


@every_page
def test_every_link_leads_somewhere(page):
    text = re.sub(r"^```.*?^```|`[^`\n]*`(?!\])", "", TEXT[page], flags=re.S | re.M)
    targets = re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    for target in targets:
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{target}: there is no such file"
        if anchor and place.suffix == ".md":
            assert anchor in anchors(TEXT.get(place) or place.read_text(encoding="utf-8")), f"{target}: no such heading"


def test_the_tests_named_beside_the_known_bugs_exist():
    """tests/README.md: each `name` after "test_FILE:" is a test of that file."""
    found = re.findall(r"(test_\w+): (`[^|;.]*`)", TEXT[ROOT / "tests" / "README.md"])
    assert len(found) > 40
    for module, names in found:
        for name in re.findall(r"`([a-z]\w+)`", names):
            assert f"test_{name}" in names_in(ROOT / "tests" / f"{module}.py"), (module, name)


def test_every_root_file_is_in_the_table():
    """But for what the reader has put there: those files have no card that names their own command."""
    for path in ROOT.glob("*.py"):
        if f"python {path.name}" in path.read_text(encoding="utf-8") or path.name == "model.py":
            assert f"[`{path.name}`]" in README, path.name


# ---- the pages themselves --------------------------------------------------------------------------------------------

def test_the_first_page_is_short():
    assert len(README.splitlines()) <= 220
    assert len(README) <= 14_000


@every_page
def test_every_folded_answer_is_closed(page):
    """<details> and </details> take turns; a <summary> is in each."""
    tags = re.findall(r"</?details>", re.sub(r"`[^`\n]*`", "", TEXT[page]))
    assert tags == ["<details>", "</details>"] * (len(tags) // 2), page
    assert len(re.findall(r"<summary>.*?</summary>", TEXT[page], flags=re.S)) == len(tags) // 2


def test_the_claims_are_counted():
    """docs/claims.md: each of 136 once, in order; its first lines count them; who says yes says how."""
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in CLAIMS.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row[0]) for row in rows] == list(range(1, 137))
    counts = {"yes": 0, "partly": 0, "not yet": 0}
    for number, claim, where, command, shown, what in rows:
        answer = shown.replace("*", "").split(":")[0]
        counts[answer] += 1
        assert claim and where and what, number
        assert command.count("`") >= 2 or answer != "yes", f"{number}: yes, but no command"
    assert len(counts) == 3
    said = re.search(r"(\d+) yes, (\d+) partly, (\d+) not yet", CLAIMS)
    assert [int(number) for number in said.groups()] == list(counts.values())


def test_the_numbers_of_the_claims_are_those_of_the_results():
    """Each `x ± y` in docs/claims.md stands in a page of results/, which test_results.py compares with its rows."""
    results = "\n".join(text for page, text in TEXT.items() if ROOT / "results" in page.parents)
    for number in set(re.findall(r"[\d.]+%? ± [\d.]+", CLAIMS)):
        assert re.search(rf"(?<![\d.]){re.escape(number.rstrip('.'))}(?![\d.]*\d)", results), number
