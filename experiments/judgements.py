"""Win rates of models from judgements of yours, raw and length-controlled.

    logit P(win) = a_model + b log( (words + 1) / (words of the reference + 1) )

    python experiments/judgements.py --data FILE.jsonl     # some seconds

FILE has a row for each judgement, of one model's response to one instruction against a reference's:

    {"model": "mine", "instruction": "Why is ...", "win": 0.8, "words": 212, "words_reference": 180}

`win` is how much the judge prefers the model's response, from 0 to 1. An instruction is any text
that names it. A model need not have a judgement of every instruction.

Length-controlled is the win rate with responses as long as the reference's: sigmoid(a_model), as in
experiments/winrate.py, by maximum likelihood over all judgements together. Standard errors are over
instructions: of the raw rate that of a mean, of the other a bootstrap.

AlpacaEval 2 (Dubois et al. 2024) asks the same question of another regression. It has the bounded
tanh(difference of lengths / its standard deviation) in place of our logarithm; a slope for each
model in place of one for all; and a term for how hard each instruction is, which we do not have.
On 57 models that it publishes the judgements of, ours is near its own (results/length).

With one slope for all, a model that is short where it is good is treated as if it were short by
chance; and a response that is long because the question needs it counts as merely long.
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, for the imports below

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import torch

from common import fail
from common.files import read_jsonl
from common.settings import parse, require, settings
from common.statistics import mean_se
from common.training import generator
from experiments.frontier import as_table, number
from experiments.winrate import length_controlled

FIELDS = {"model": str, "instruction": str, "win": (int, float), "words": (int, float),
          "words_reference": (int, float)}


@settings
class Config:
    data: str = ""  # A JSON-lines file of judgements.
    draws: int = 100  # Draws of the bootstrap over instructions.

    def __post_init__(self) -> None:
        require(2 <= self.draws <= 10_000, f"--draws {self.draws}: must be from 2 to 10,000")
        require(self.data != "", "--data: expected a JSON-lines file of judgements")


def read_judgements(path: str) -> list[dict]:
    """The rows of the file; a number out of range, or a judgement that is there twice, stops with
    its line."""
    rows = read_jsonl(path, FIELDS)
    seen = set()
    for row in rows:
        where = f"{path}, line {row['line']}"
        if not 0 <= row["win"] <= 1:  # not NaN either
            fail(f"{where}: field 'win' is {row['win']:g}, expected 0 to 1")
        for name in ("words", "words_reference"):
            if not 0 <= row[name] < 1e9:
                fail(f"{where}: field {name!r} is {row[name]:g}, expected 0 or more")
        key = (row["model"], row["instruction"])
        if key in seen:
            fail(f"{where}: a second judgement of model {row['model']!r} on the same instruction")
        seen.add(key)
    return rows


def as_matrices(rows: list[dict]) -> tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor]:
    """The K models, and of them on M instructions win, log ratio of words and whether there is a
    judgement, (K, M) each."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    instructions = list(dict.fromkeys(row["instruction"] for row in rows))
    row_of = {model: k for k, model in enumerate(models)}
    column_of = {instruction: m for m, instruction in enumerate(instructions)}
    win, log_ratio = torch.zeros(2, len(models), len(instructions), dtype=torch.double)
    judged = torch.zeros(win.shape, dtype=torch.bool)
    for row in rows:
        place = row_of[row["model"]], column_of[row["instruction"]]
        win[place] = row["win"]
        words = torch.tensor([row["words"] + 1, row["words_reference"] + 1], dtype=torch.double)
        log_ratio[place] = (words[0] / words[1]).log()
        judged[place] = True
    return models, win, log_ratio, judged


def rates(rows: list[dict], draws: int) -> list[dict]:
    """A row for each model, the best length-controlled one first."""
    models, win, log_ratio, judged = as_matrices(rows)
    controlled = length_controlled(win, log_ratio, judged)
    stream, drawn = generator(0), []
    for _ in range(draws):
        columns = torch.randint(win.shape[1], (win.shape[1],), generator=stream)
        drawn.append(length_controlled(win[:, columns], log_ratio[:, columns], judged[:, columns]))
    errors = torch.stack(drawn).std(0)
    found = []
    for k, model in enumerate(models):
        mean, error = mean_se(win[k, judged[k]].numpy())
        found.append({"model": model, "judgements": int(judged[k].sum()), "win_rate": mean,
                      "win_rate_se": error, "length_controlled": controlled[k].item(),
                      "length_controlled_se": errors[k].item(),
                      "length_ratio": log_ratio[k, judged[k]].mean().exp().item()})
    return sorted(found, key=lambda row: -row["length_controlled"])


def table(rows: list[dict]) -> str:
    """In %; the ratio of words is a geometric mean."""
    lines = [["model", "judgements", "words / reference's", "win rate, %", "length-controlled, %"]]
    for row in rows:
        cells = [row["model"], f"{row['judgements']:,}", f"{row['length_ratio']:.2f}"]
        for name in ("win_rate", "length_controlled"):
            cells.append(number(100 * row[name], 100 * row[f"{name}_se"], ".1f"))
        lines.append(cells)
    return as_table(lines)


def main(config: Config) -> None:
    """Print the table."""
    print(table(rates(read_judgements(config.data), config.draws)))


if __name__ == "__main__":
    main(parse(Config, __doc__))
