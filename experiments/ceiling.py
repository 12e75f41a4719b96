"""What a reward model allows: the best policy for it, measured by the gold reward. No policy is
trained.

    pi(y|x) = pi_ref(y|x) exp(score(x, y) / beta) / Z(x)      what PPO on this reward model aims at

The bank's responses, weighed by exp(score / beta), give that policy's gold reward and its KL. PPO
that does everything right ends there: what lies between it and the optimum of the gold reward, the
pairs and the reward model have lost.

    python experiments/ceiling.py                # `reviews`: some 10 minutes of one core

Three reward models of the same pairs, for three draws of the pairs: a single pass at half the
learning rate, reward_model.py as it is, and Bradley-Terry on counts of words and of neighbouring
words (bigrams), which is what a network must beat.

Accuracy and loss are over pairs of the bank, each side weighed with the chance that the annotator
prefers it: no noise of labels is in them.

Reads   the SFT policy, the bank, pairs and reward models (made if they are missing)
Writes  runs/<dataset>/ceiling/ : results.jsonl, table.md
"""
from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, for the imports below

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import torch
import torch.nn.functional as F

import evaluate
import reward_model
from common import fail, pipeline, rewards, tasks
from common.files import atomic_write, check_writable, write_jsonl
from common.pairs import Pair
from common.settings import parse, require_numbers, runs_folder, settings
from common.statistics import mean_se
from common.training import Device, Dtype
from experiments.frontier import as_table, in_nats, number

KLS = (1.0, 2.0, 3.0)  # nats
RARE = 3  # a word or bigram that is in fewer responses is not counted
L2 = 30.0  # weight of the squared weights, chosen among 10, 30, 100 on other prompts


@settings
class Config:
    dataset: str = "reviews"  # Task: a folder of data/ with an exact gold reward.
    preset: str = "cpu"  # Kind of machine that the task's sizes are meant for.
    sft: str = ""  # Run folder of the SFT policy, if not runs/<dataset>/sft.
    seeds: int = 3  # Draws of the pairs, over which standard errors are computed.
    dtype: Dtype = "auto"  # Number format of matrix products; auto = bfloat16 on CUDA.
    device: Device = "auto"  # Where it is computed; auto = CUDA where there is one, else the CPU.
    out: str = ""  # Folder of the experiment, if not ceiling beside the SFT policy.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="seeds")
        self.out = self.out or str(runs_folder(self.dataset, self.preset) / "ceiling")


# ---- Bradley-Terry on bigrams --------------------------------------------------------------------

def counts(prompt: list[int], response: list[int]) -> Counter:
    """How often each token, and each pair of neighbours, is in a response; the last token of the
    prompt is the first one's neighbour."""
    return Counter(response) + Counter(zip([prompt[-1], *response], response))


def matrix(rows: list[Counter], columns: dict) -> torch.Tensor:
    """Counts as a sparse matrix (N, features)."""
    found = [(i, columns[key], float(number)) for i, row in enumerate(rows)
             for key, number in row.items() if key in columns]
    i, j, numbers = zip(*found)
    return torch.sparse_coo_tensor(torch.tensor([i, j]), torch.tensor(numbers, dtype=torch.double),
                                   (len(rows), len(columns)), check_invariants=False)


def fit_bigrams(pairs: list[Pair]) -> tuple[torch.Tensor, dict]:
    """Weights of score = sum of weights, by maximum likelihood of the pairs (Eq. 2 of the DPO
    paper) less L2 / 2 |weights|^2, which has one maximum; and the column of each feature."""
    chosen = [counts(pair.prompt, pair.chosen) for pair in pairs]
    rejected = [counts(pair.prompt, pair.rejected) for pair in pairs]
    responses = Counter(key for row in chosen + rejected for key in row)
    columns = {key: i for i, key in enumerate(key for key, n in responses.items() if n >= RARE)}
    differences = matrix(chosen, columns) - matrix(rejected, columns)
    weights = torch.zeros(len(columns), dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        margins = torch.sparse.mm(differences, weights[:, None]).squeeze(1)
        loss = -F.logsigmoid(margins).sum() + L2 / 2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach(), columns


# ---- what is measured ----------------------------------------------------------------------------

def agreement(scores: torch.Tensor, gold: torch.Tensor, scale: float) -> tuple[float, float]:
    """Expected accuracy and loss of a reward model on the labels of pairs of responses, each
    response in one pair.

    Args:
        scores, gold: (M, N) of the same responses.
        scale: P(a beats b) = sigmoid(scale (gold_a - gold_b)).
    """
    margin = scores[:, 0::2] - scores[:, 1::2]
    chance = torch.sigmoid(scale * (gold[:, 0::2] - gold[:, 1::2]))  # that the first one wins
    right = torch.where(margin > 0, chance, 1 - chance)
    loss = -chance * F.logsigmoid(margin) - (1 - chance) * F.logsigmoid(-margin)
    return right.mean().item(), loss.mean().item()


def ceiling(scores: torch.Tensor, gold: torch.Tensor, kl: float) -> float:
    """Gold reward of pi_ref exp(score / beta) / Z at the beta where it is `kl` nats from pi_ref.

    Args:
        scores, gold: (M, N) of a bank's responses.
    """
    beta = evaluate.beta_at(scores, kl, evaluate.optimal_curve(scores))
    return (evaluate.optimal_weights(scores, beta) * gold).sum(1).mean().item()


def main(config: Config) -> None:
    """Fit the reward models, measure them, and write rows and table."""
    # ---- 1) what all of them share ---------------------------------------------------------------
    check_writable(config.out)
    task = tasks.load(config.dataset)
    if task.gold_reward is None or task.labels != "bt":
        fail(f"--dataset {config.dataset}: has no exact gold reward, or no Bradley-Terry labels")
    rows = []
    for seed in range(config.seeds):
        shared = dict(dataset=config.dataset, preset=config.preset, sft=config.sft,
                      dtype=config.dtype, device=config.device, pairs_seed=seed, seed=seed,
                      resume=True)
        usual = reward_model.Config(**shared)
        start = pipeline.start(usual)
        bank = start.bank
        M, N = bank.rewards.shape
        gold = bank.rewards.double()

        # ---- 2) the scores of the bank's responses, by each model --------------------------------
        folders = {"network, one pass": reward_model.Config(**shared, epochs=1.0, lr=5e-4),
                   "network": usual}
        prompts = [prompt for prompt in bank.prompts for _ in range(N)]
        texts = [text for responses in bank.responses for text in responses]
        scores = {"the labels' own": task.label_scale * gold}
        for name, run in folders.items():
            model = rewards.learned_reward(pipeline.stage(run), start.task,
                                           start.ref.config.block_size, config.dtype)
            # not scaled: their differences are log-odds
            std = model.model.std.item()
            scores[name] = std * model(prompts, texts).double().view(M, N)
        train_rows, _ = start.split()
        weights, columns = fit_bigrams([start.pairs[i] for i in train_rows.tolist()])
        encoded = [([start.tokenizer.bos, *prompt], [*text, start.tokenizer.eos])
                   for prompt, text in zip(start.tokenizer.encode_batch(prompts),
                                           start.tokenizer.encode_batch(texts))]
        features = matrix([counts(*one) for one in encoded], columns)
        scores["bigrams"] = torch.sparse.mm(features, weights[:, None]).view(M, N)

        # ---- 3) what it is worth -----------------------------------------------------------------
        curve, reference = evaluate.optimal_curve(bank.rewards), gold.mean().item()
        for name, own in scores.items():
            accuracy, loss = agreement(own, gold, task.label_scale)
            row = {"model": name, "seed": seed, "accuracy": accuracy, "loss": loss}
            for kl in KLS:
                reward = ceiling(own, gold, kl)
                row[f"reward_at_{kl:g}"] = reward
                row[f"share_at_{kl:g}"] = evaluate.share_of_optimum(curve, reward, kl,
                                                                    reference)[0]
            rows.append(row)
            print(f"seed {seed}  {name:18} accuracy {accuracy:.3f}  loss {loss:.3f}  share at 2 "
                  f"nats {row['share_at_2']:.1%}", flush=True)

    folder = Path(config.out)
    write_jsonl(folder / "results.jsonl", rows)
    text = table(rows)
    atomic_write(folder / "table.md", text.encode())
    print(f"\n{text}\nrows and table  ->  {folder}")


def table(rows: list[dict]) -> str:
    """A line for each model: means over the draws of the pairs, with standard errors."""
    lines = [["", "accuracy, %", "loss", *(f"at {in_nats(kl)}" for kl in KLS)]]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        cells = [number(*mean_se([100 * row["accuracy"] for row in own]), ".1f"),
                 number(*mean_se([row["loss"] for row in own]), ".3f")]
        for kl in KLS:
            reward = number(*mean_se([row[f"reward_at_{kl:g}"] for row in own]), ".3f")
            share, _ = mean_se([row[f"share_at_{kl:g}"] for row in own])
            cells.append(f"{reward} ({share:.0%})")
        lines.append([name, *cells])
    return as_table(lines)


if __name__ == "__main__":
    main(parse(Config, __doc__))
