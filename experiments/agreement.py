"""Whom do people agree with? ROUGE-L, the longer summary, other people, and reward models.

    python experiments/agreement.py                  # the first three, on the human comparisons
    python experiments/agreement.py runs/tldr/reward-model-human ...       # and finished reward
                                                     # models; data/tldr/prepare.py has the command

Two annotators of Stiennon et al. (2020) agree with each other in 73 to 77% of comparisons, so no
scorer can be much better than that at telling what the next one will choose.

Reads   data/tldr/prepared/comparisons_train.jsonl and comparisons_test.jsonl. Reward models are
        measured on the latter alone, which shares no post with the former. The intervals are 95%
        bootstrap intervals that draw whole posts, as comparisons of one post depend on each other.
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import argparse
import random
from itertools import combinations
from typing import NamedTuple

from common import ROOT, fail
from common.files import read_jsonl
from common.rewards import pair_scores
from common.run import check_same_task, load_run
from common.settings import Parser, stop_like_ctrl_c
from common.tasks import check_prepared
from common.tokenizer import Tokenizer
from data.tldr import rouge_l, words
from model import ScalarModel


class Outcome(NamedTuple):
    """Of one comparison."""
    post: str  # id; comparisons of one post depend on each other
    agreed: float  # 1 agreed, 0 disagreed, 1/2 could not tell


Rows = list[dict]  # comparisons: {"prompt", "chosen", "rejected", "id", "worker", "reference"}


# ---- who chooses ---------------------------------------------------------------------------------

def compare(chosen: float, rejected: float) -> float:
    """Whether these two scores agree with the person who chose; equal ones could not tell."""
    return 1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0


def by_rouge(rows: Rows) -> list[Outcome]:
    """ROUGE-L's choice where the author's summary is known and is not itself one of the two."""
    found = []
    for row in rows:
        reference = row["reference"]
        if reference and reference not in (row["chosen"].strip(), row["rejected"].strip()):
            chosen = rouge_l(words(reference), words(row["chosen"]))
            rejected = rouge_l(words(reference), words(row["rejected"]))
            found.append(Outcome(row["id"], compare(chosen, rejected)))
    return found


def by_length(rows: Rows) -> list[Outcome]:
    """The choice of whoever always takes the summary of more words."""
    return [Outcome(row["id"], compare(len(row["chosen"].split()), len(row["rejected"].split())))
            for row in rows]


def between_people(rows: Rows) -> list[Outcome]:
    """Every two people who judged the same two summaries of a post: whether they chose the same."""
    judged: dict[tuple, dict[str, str]] = {}  # post and two summaries -> person -> the chosen one
    for row in rows:
        if row["worker"]:
            key = (row["id"], *sorted((row["chosen"], row["rejected"])))
            judged.setdefault(key, {})[row["worker"]] = row["chosen"]
    return [Outcome(key[0], float(a == b))
            for key, choices in judged.items() for a, b in combinations(choices.values(), 2)]


def by_reward_model(folder: Path, rows: Rows) -> list[Outcome]:
    """The choice of a finished reward model."""
    model, meta = load_run(folder, ScalarModel)
    check_same_task(folder, meta, {"dataset": "tldr"})
    tokenizer = Tokenizer.load(folder / "tokenizer.tiktoken")
    prompts = [row["prompt"] for row in rows]
    chosen = pair_scores(model, tokenizer, prompts, [row["chosen"] for row in rows]).tolist()
    rejected = pair_scores(model, tokenizer, prompts, [row["rejected"] for row in rows]).tolist()
    return [Outcome(row["id"], compare(*scores)) for row, *scores in zip(rows, chosen, rejected)]


# ---- how often -----------------------------------------------------------------------------------

def interval(outcomes: list[Outcome], draws: int = 2000) -> tuple[float, float]:
    """95% of the bootstrap's means: as many posts as there are, drawn with replacement, each with
    all its comparisons."""
    posts: dict[str, list[float]] = {}
    for post, agreed in outcomes:
        posts.setdefault(post, []).append(agreed)
    sums = [(sum(values), len(values)) for values in posts.values()]
    rng = random.Random(0)
    means = []
    for _ in range(draws):
        drawn = rng.choices(sums, k=len(sums))
        means.append(sum(total for total, _ in drawn) / sum(count for _, count in drawn))
    means.sort()
    return means[round(0.025 * draws)], means[round(0.975 * draws) - 1]


def table(named: dict[str, list[Outcome]]) -> list[dict]:
    """A row each of what has outcomes: name, agreement, its interval, comparisons, posts."""
    return [{"name": name, "agreement": sum(agreed for _, agreed in outcomes) / len(outcomes),
             "interval": interval(outcomes), "comparisons": len(outcomes),
             "posts": len({post for post, _ in outcomes})}
            for name, outcomes in named.items() if outcomes]


def show(rows: list[dict]) -> str:
    """The table for the screen."""
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'chooses as a person did':{width}}  agreement  95% interval   comparisons  posts"]
    for row in rows:
        low, high = row["interval"]
        lines.append(f"{row['name']:{width}}  {row['agreement']:9.1%}  {low:.1%} to {high:.1%}  "
                     f"{row['comparisons']:11,}  {row['posts']:5,}")
    return "\n".join([*lines, "people with people in Stiennon et al. (2020): 73 to 77%"])


def read_comparisons(folder: Path) -> tuple[Rows, Rows]:
    """Those to train on and those to test on."""
    if not check_prepared(folder):
        fail(f"{folder}: not there; python {folder.parent}/prepare.py makes it")
    fields = {"prompt": str, "chosen": str, "rejected": str, "id": str,
              "worker": (str, type(None)), "reference": (str, type(None))}
    test = folder / "comparisons_test.jsonl"
    if not test.exists():
        fail(f"{test}: no comparisons there; data/tldr/prepare.py writes them where the archive "
             "has some")
    return read_jsonl(folder / "comparisons_train.jsonl", fields), read_jsonl(test, fields)


def main(runs: list[str], folder: Path = ROOT / "data" / "tldr" / "prepared") -> list[dict]:
    """Print the table, and return its rows."""
    for run in runs:
        if not (Path(run) / "model.pt").exists():
            fail(f"{run}: no finished run there (no model.pt)")
    train, test = read_comparisons(folder)
    everything = train + test
    named = {"ROUGE-L, all": by_rouge(everything), "ROUGE-L, test": by_rouge(test),
             "the longer one, all": by_length(everything), "the longer one, test": by_length(test),
             "another person, all": between_people(everything)}
    for run in runs:
        named[f"{run}, test"] = by_reward_model(Path(run), test)
    rows = table(named)
    print(show(rows))
    return rows


if __name__ == "__main__":
    stop_like_ctrl_c()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="*", help="folders of finished reward models")
    main(parser.parse_args().run)
