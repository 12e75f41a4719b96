"""With whom do people agree? ROUGE-L, the longer summary, other people, reward models: on the human comparisons.

    python experiments/agreement.py                                # the first three
    python experiments/agreement.py runs/tldr/reward-model-human ...     # and reward models, finished runs (see prepare.py)

Two annotators of Stiennon et al. (2020) agree with each other in 73 to 77% of comparisons, so
no scorer can be much better than that at telling what the next one will choose.

Reads   data/tldr/prepared/comparisons_train.jsonl and comparisons_test.jsonl. Reward models are measured on the latter
        alone, which shares no post with the former. The intervals are 95% bootstrap intervals that draw whole posts, as
        comparisons of one post are not independent of each other.
"""
from __future__ import annotations

import argparse
import random
import sys
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, for the imports below

from common import ROOT, fail  # noqa: E402
from common.files import read_jsonl  # noqa: E402
from common.settings import Parser  # noqa: E402
from common.tasks import check_prepared  # noqa: E402
from data.tldr import rouge_l, words  # noqa: E402
from common.tokenizer import Tokenizer  # noqa: E402
from evaluate import pair_scores  # noqa: E402
from common.run import load_run  # noqa: E402
from model import ScalarModel  # noqa: E402

Outcomes = list[tuple[str, float]]  # of each comparison: id of its post; 1 agreed, 0 disagreed, 1/2 could not tell


def outcome(chosen: float, rejected: float) -> float:
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def by_rouge(rows: list[dict]) -> Outcomes:
    """ROUGE-L's choice where the author's summary is known and is not itself one of the two."""
    found = []
    for row in rows:
        if row["reference"] and row["reference"] not in (row["chosen"].strip(), row["rejected"].strip()):
            reference = words(row["reference"])
            found.append((row["id"], outcome(*(rouge_l(reference, words(row[name])) for name in ("chosen", "rejected")))))
    return found


def by_length(rows: list[dict]) -> Outcomes:
    """The choice of whoever always takes the summary of more words."""
    return [(row["id"], outcome(len(row["chosen"].split()), len(row["rejected"].split()))) for row in rows]


def between_people(rows: list[dict]) -> Outcomes:
    """Every two people who judged the same two summaries of a post: whether they chose the same."""
    judged: dict[tuple, dict[str, str]] = {}
    for row in rows:
        if row["worker"]:
            judged.setdefault((row["id"], *sorted((row["chosen"], row["rejected"]))), {})[row["worker"]] = row["chosen"]
    return [(key[0], float(a == b)) for key, choices in judged.items() for a, b in combinations(choices.values(), 2)]


def by_reward_model(folder: Path, rows: list[dict]) -> Outcomes:
    """The choice of a finished reward model."""
    model, _ = load_run(folder, ScalarModel)
    tokenizer = Tokenizer.load(folder / "tokenizer.tiktoken")
    chosen, rejected = (pair_scores(model, tokenizer, [row["prompt"] for row in rows], [row[name] for row in rows]).tolist()
                        for name in ("chosen", "rejected"))
    return [(row["id"], outcome(*scores)) for row, *scores in zip(rows, chosen, rejected)]


def interval(outcomes: Outcomes, draws: int = 2000) -> tuple[float, float]:
    """95% of the bootstrap's means: as many posts as there are, drawn with replacement, each with all its comparisons."""
    posts: dict[str, list[float]] = {}
    for post, value in outcomes:
        posts.setdefault(post, []).append(value)
    sums, rng = [(sum(values), len(values)) for values in posts.values()], random.Random(0)
    means = []
    for _ in range(draws):
        drawn = rng.choices(sums, k=len(sums))
        means.append(sum(total for total, _ in drawn) / sum(count for _, count in drawn))
    return sorted(means)[round(0.025 * draws)], sorted(means)[round(0.975 * draws) - 1]


def table(named: dict[str, Outcomes]) -> list[dict]:
    """A row each of what there is an outcome of: name, agreement, its interval, comparisons, posts."""
    return [{"name": name, "agreement": sum(value for _, value in outcomes) / len(outcomes), "interval": interval(outcomes),
             "comparisons": len(outcomes), "posts": len({post for post, _ in outcomes})}
            for name, outcomes in named.items() if outcomes]


def main(runs: list[str], folder: Path = ROOT / "data" / "tldr" / "prepared") -> list[dict]:
    """Print the table, and return its rows."""
    for run in runs:
        if not (Path(run) / "model.pt").exists():
            fail(f"{run}: no finished run there (no model.pt)")
    check_prepared(folder)
    fields = {"prompt": str, "chosen": str, "rejected": str, "id": str, "worker": (str, type(None)),
              "reference": (str, type(None))}
    path = folder / "comparisons_test.jsonl"
    if not path.exists():
        fail(f"{path}: no comparisons there; data/tldr/prepare.py writes them where the archive has some")
    test = read_jsonl(path, fields)
    every = read_jsonl(folder / "comparisons_train.jsonl", fields) + test
    named = {"ROUGE-L, all": by_rouge(every), "ROUGE-L, test": by_rouge(test), "the longer one, all": by_length(every),
             "the longer one, test": by_length(test), "another person, all": between_people(every)}
    named |= {f"{run}, test": by_reward_model(Path(run), test) for run in runs}
    rows = table(named)
    width = max(len(row["name"]) for row in rows)
    print(f"{'chooses as a person did':{width}}  agreement  95% interval   comparisons  posts")
    for row in rows:
        low, high = row["interval"]
        print(f"{row['name']:{width}}  {row['agreement']:9.1%}  {low:.1%} to {high:.1%}  {row['comparisons']:11,}  "
              f"{row['posts']:5,}")
    print("people with people in Stiennon et al. (2020): 73 to 77%")
    return rows


if __name__ == "__main__":
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="*", help="folders of finished reward models")
    main(parser.parse_args().run)
