"""Is DPO's implicit reward as good a reward model as an explicit one? Pairs where it is known which
response is better, of the kind that the models were trained on and of other kinds.

    explicit     r_phi(x, y), a network with a scalar head           reward_model.py
    implicit     beta log pi(y|x)/pi_ref(y|x), hidden in a policy    dpo.py
    right about a pair if r(x, chosen) > r(x, rejected); a tie counts half, as a coin would do

    python experiments/rewardbench.py            # 3 seeds, resumable; two hours of one core
    python experiments/rewardbench.py --quick    # one seed, 3 betas, no PPO on DPO; 8 minutes
    python experiments/rewardbench.py --data FILE.json --run runs/reviews/reward-model

The last one asks any finished run about pairs in the form that LLMBar is published in: a list of
{"input", "output_1", "output_2", "label"}, where label 1 or 2 is the better output. FILE may be a
folder of such files.

What is asked of `reviews`, in pairs of responses to test prompts; the gold reward says which one is
better, and for the last kind it only draws the label:

    in distribution           two responses of the SFT policy
    easy                      the best of 16 of them against the worst
    shorter, longer is better two of 16 that differ in length by a fifth or more
    negation, another word    a response, and itself with one word changed
    of DPO, of PPO            two responses of that policy
    best of 64                two responses, each the best of 64 by the reward model
    temperature 1.5           two responses of the SFT policy, drawn hotter
    other prompts             the prompt goes on into the review's opinions
    another labeller          "in distribution", labelled by one whose preferences are less firm

A seed redraws what is learned from (prompts, responses, labels) and what is asked. Errors come from
a bootstrap over prompts, and over seeds. All models of a seed learn from the same pairs. The usual
reward model passes over them three times, DPO once: so there is a reward model of one pass, and a
DPO of three.

The second question: is it better to let PPO maximise DPO's implicit reward? In theory that cannot
help: of all policies at the KL of pi, the best one for r = beta log pi/pi_ref is pi itself.

Expected: the implicit reward is right less often, by 2 to 5 points in distribution, and by most on
responses of DPO's own policy. Falsified if it is no worse on every kind of pair but the first.

Differs from RewardBench (Lambert et al. 2024): its pairs are of chat, safety and reasoning, ours of
film reviews whose reward is exact. `score` is how it adds its sections up.

Reads   the SFT policy, bank, pairs and reward models (made if they are missing)
Writes  runs/reviews/rewardbench/ : results.jsonl, policies.jsonl, table.md, figure.png
"""
from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, for the imports below

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

from typing import Any

import numpy as np
import torch

import dpo
import ppo
import reward_model
from common import fail, pipeline
from common.figures import figure
from common.files import (
    atomic_write, check_field, check_writable, read_json, read_json_object, write_jsonl)
from common.pairs import encode_pairs, pair_tensors
from common.rewards import all_scores
from common.run import load_run
from common.settings import (
    changed, parse, require, require_numbers, runs_folder, settings)
from common.statistics import mean_se, values
from common.tokenizer import Tokenizer
from common.training import Device, half_ties, pad, use_device
from data.reviews.probes import kinds_of_pairs
from evaluate import reference_of
from experiments.ceiling import ceiling
from experiments.frontier import as_table, number
from experiments.scaling import over_seeds
from experiments.sweep import (
    STOPPED, PlannedRun, is_finished, print_commands, run_all, with_sources)
from model import Samples, ScalarModel, summed_logprobs

BETAS = (3.0, 1.0, 0.3, 0.1, 0.03)
QUICK_BETAS = (1.0, 0.3, 0.1)
EXPLICIT, ONE_PASS = "reward model", "reward model, one pass"
TEACHER = "DPO, beta 0.3"  # whose implicit reward PPO maximises
PPO = {"target 2 nats": dict(target_kl=2.0), "beta 0.5": dict(beta=0.5)}  # how its KL is held
PPO_AUTHOR = "PPO, target 2 nats"  # whose responses are asked about
DRAWN = 64  # responses of the bank to each prompt, from which the best policies are computed
KLS = (1.0, 2.0)  # nats of these


@settings
class Config:
    # ---- what is asked
    pairs: int = 500  # Pairs of each kind, the most.
    data: str = ""  # Pairs in LLMBar's form, a file or a folder of files, to ask --run about alone.
    run: str = ""  # Finished run to ask about --data: a reward model, or a policy with a beta.

    # ---- what is run
    quick: bool = False  # Run one seed of three betas, without the variants.
    seeds: int = 3  # Draws of the pairs that all models learn from.
    print: bool = False  # Print the runs that can be started now as commands, and run nothing.

    # ---- how it is run
    workers: int = 0  # Runs at a time; 0 = one for each core, or one on CUDA.
    device: Device = "auto"  # Where it is computed; auto = CUDA where there is one, else the CPU.
    out: str = ""  # Folder of rows, table and figure, if not runs/reviews/rewardbench.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="pairs seeds", from_0="workers")
        require(not self.quick or "seeds" not in changed(self),
                "--seeds: not with --quick, which runs one seed")
        require(bool(self.data) == bool(self.run), "--data and --run: one needs the other")
        self.out = self.out or str(runs_folder("reviews", "cpu") / "rewardbench")


def score(chat: float, chat_hard: float, safety: float, reasoning: float,
          prior_sets: float) -> float:
    """RewardBench's score of a model, from its accuracies in the five sections: their mean, in
    which the prior sets weigh a half."""
    return (chat + chat_hard + safety + reasoning + 0.5 * prior_sets) / 4.5


# ---- the runs of a seed --------------------------------------------------------------------------

def explicit_models(seed: int) -> dict[str, reward_model.Config]:
    """The usual reward model, and one that passes over the pairs once, as DPO does."""
    shared = dict(pairs_seed=seed, seed=seed, resume=True)
    return {EXPLICIT: reward_model.Config(**shared),
            ONE_PASS: reward_model.Config(**shared, epochs=1.0, lr=5e-4)}


def policies(seed: int, quick: bool) -> dict[str, Any]:
    """What else learns from the same pairs."""
    shared = dict(pairs_seed=seed, seed=seed, resume=True)
    runs: dict[str, Any] = {f"DPO, beta {beta:g}": dpo.Config(**shared, beta=beta)
                            for beta in (QUICK_BETAS if quick else BETAS)}
    runs[PPO_AUTHOR] = ppo.Config(**shared, **PPO["target 2 nats"])
    if not quick:
        runs["PPO, beta 0.5"] = ppo.Config(**shared, **PPO["beta 0.5"])
        runs["cDPO, beta 0.1"] = dpo.Config(**shared, beta=0.1, label_smoothing=0.2)
        runs["IPO, beta 0.1"] = dpo.Config(**shared, beta=0.1, loss="ipo")
        runs["DPO, beta 0.3, three passes"] = dpo.Config(**shared, beta=0.3, epochs=3.0)
    return runs


def ppo_on_dpo(seed: int) -> dict[str, ppo.Config]:
    """PPO on the implicit reward of a DPO run, its KL held in two ways."""
    teacher = policies(seed, quick=True)[TEACHER].out
    shared = dict(reward=teacher, seed=seed, resume=True)
    return {f"PPO on DPO's reward, {how}": ppo.Config(**shared, **held)
            for how, held in PPO.items()}


# ---- who is right? -------------------------------------------------------------------------------

def opinions(start: pipeline.Start, rows: list[dict], explicit: dict[str, Path],
             implicit: dict[str, Path]) -> dict[str, torch.Tensor]:
    """Column -> what it thinks of every response, (2, N): chosen, rejected.

    Args:
        explicit, implicit: column -> run folder of a reward model, of a policy.
    """
    numbered = [{**row, "line": i} for i, row in enumerate(rows)]
    encoded = encode_pairs(numbered, start.tokenizer, start.ref.config.block_size, "the pairs")
    pairs = pair_tensors(encoded, start.tokenizer.pad)
    inputs = pairs.tokens.flatten(0, 1), pairs.prompt_lengths.flatten(), pairs.lengths.flatten()
    lengths = (inputs[2] - inputs[1]).float()
    found = {name: all_scores(load_run(folder, ScalarModel)[0], inputs[0], inputs[2])
             for name, folder in explicit.items()}
    ref_logprobs = summed_logprobs(start.ref, *inputs)
    for name, folder in implicit.items():
        logprobs = summed_logprobs(load_run(folder)[0], *inputs)
        found[name] = logprobs - ref_logprobs  # beta, which is positive, changes no order
        if name == "DPO, beta 0.1":
            found["its log pi(y|x), no reference"] = logprobs
            found["its mean log pi of a token"] = logprobs / lengths
    found["the longer one"] = lengths
    gaps = torch.tensor([row["gap"] for row in rows])
    found["gold"] = torch.stack([gaps, -gaps]).flatten()
    return {name: scores.view(2, -1) for name, scores in found.items()}


def bootstrap(right: np.ndarray, prompts: list[str], draws: int = 1000) -> tuple[float, float]:
    """The mean of right (N,), and its standard error over the prompts, drawn anew with all of
    their pairs."""
    _, owner = np.unique(prompts, return_inverse=True)
    sums, counts = np.bincount(owner, right), np.bincount(owner)
    often = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)),
                                                 draws)  # (draws, prompts)
    return float(right.mean()), float((often @ sums / (often @ counts)).std(ddof=1))


def measure(pairs: dict[str, list[dict]], thinks: dict[str, torch.Tensor],
            seed: int) -> list[dict]:
    """A row for each kind of pair and column: how often it is right, alone and less the two reward
    models, pair by pair."""
    rows, first = [], 0
    for kind, own in pairs.items():
        here = slice(first, first + len(own))
        first += len(own)
        prompts = [row["prompt"] for row in own]
        right = {column: half_ties(*scores[:, here]).numpy() for column, scores in thinks.items()}
        for column, mine in right.items():
            row = {"pairs": kind, "column": column, "seed": seed, "count": len(own),
                   "prompts": len(set(prompts))}
            row["accuracy"], row["accuracy_se"] = bootstrap(mine, prompts)
            for name, other in (("less", EXPLICIT), ("less_one_pass", ONE_PASS)):
                row[name], row[f"{name}_se"] = bootstrap(mine - right[other], prompts)
            rows.append(row)
    return rows


# ---- what is it worth to an optimiser? -----------------------------------------------------------

def optimised(start: pipeline.Start, seed: int, explicit: dict[str, Path],
              implicit: dict[str, Path]) -> list[dict]:
    """Gold reward and KL of every trained policy; and for three rewards the gold reward of the best
    policy for it, pi_ref exp(reward / beta) / Z, at a KL of some nats."""
    bank, rows = start.bank, []
    prompts = [prompt for prompt in bank.prompts for _ in range(DRAWN)]
    texts = [text for responses in bank.responses for text in responses[:DRAWN]]
    gold = bank.rewards[:, :DRAWN].double()
    for name, folder in {**explicit, **implicit}.items():
        row: dict[str, Any] = {"run": name, "seed": seed}
        if name in implicit:
            evaluation = read_json_object(folder / "evaluation.json", "table", "name", "per_prompt")
            own = evaluation["table"][evaluation["name"]]
            row |= {key: own[key] for key in ("reward", "reward_se", "kl", "kl_se", "share")}
            row["rewards"] = evaluation["per_prompt"]["reward"]
        if name in (EXPLICIT, ONE_PASS, TEACHER):
            own = pipeline.reward_of_run(folder, start)(prompts, texts).double().view(gold.shape)
            row |= {f"best_at_{kl:g}": ceiling(own, gold, kl) for kl in KLS}
        rows.append(row)
    row = {"run": "gold", "seed": seed}
    rows.append(row | {f"best_at_{kl:g}": ceiling(gold, gold, kl) for kl in KLS})
    return rows


# ---- table and figure ----------------------------------------------------------------------------

def cell(rows: list[dict], kind: str, column: str, name: str = "accuracy") -> tuple[float, float]:
    """Percent, with the standard error over seeds and prompts; nan where no run is finished."""
    own = [row for row in rows if (row["pairs"], row["column"]) == (kind, column)]
    mean, error = over_seeds(own, name) if own else (np.nan, np.nan)
    return 100 * mean, 100 * error


def difference(points: float, error: float) -> str:
    """With its sign: +0.7 ± 2.2."""
    return f"{points:+.1f} ± {error:.1f}"


def markdown(rows: list[dict], results: list[dict]) -> str:
    """Who is right, less the usual reward model and less that of one pass, pair by pair; and what
    the rewards are worth to an optimiser."""
    kinds = list(dict.fromkeys(row["pairs"] for row in rows))
    columns = list(dict.fromkeys(row["column"] for row in rows))
    of_dpo = [f"DPO, beta {beta:g}" for beta in BETAS if f"DPO, beta {beta:g}" in columns]
    others = [name for name in columns if name not in (EXPLICIT, ONE_PASS, "gold", *of_dpo)]
    text = ""
    for title, name, alone, part in (
            ("right, in %; then points less the reward model", "less", ["gold", EXPLICIT],
             [ONE_PASS, *of_dpo]),
            ("points less the reward model of one pass", "less_one_pass", [], of_dpo),
            ("points less the reward model", "less", [], others)):
        lines = [[kind, *(number(*cell(rows, kind, column), ".1f") for column in alone),
                  *(difference(*cell(rows, kind, column, name)) for column in part)]
                 for kind in kinds]
        text += as_table([[title, *alone, *part], *lines]) + "\n"
    lines = []
    for name in dict.fromkeys(row["run"] for row in results):
        own = [row for row in results if row["run"] == name]
        line = [name, "", "", ""]
        if "kl" in own[0]:
            line[1:] = [number(*over_seeds(own, "reward"), ".3f"),
                        number(*over_seeds(own, "kl"), ".2f"),
                        f"{np.mean([row['share'] or np.nan for row in own]):.0%}"]
        for kl in KLS:
            best = values(own, f"best_at_{kl:g}")
            line.append(number(*mean_se(best), ".3f") if best else "")
        lines.append(line)
    head = ["", "gold reward", "KL, nats", "of the optimum", *(f"best at {kl:g}" for kl in KLS)]
    return text + as_table([head, *lines])


def draw(rows: list[dict], results: list[dict], path: Path) -> None:
    """Implicit less explicit for every kind of pair; against beta; what the rewards are worth."""
    kinds = list(dict.fromkeys(row["pairs"] for row in rows))
    columns = {row["column"] for row in rows}
    betas = [beta for beta in BETAS if f"DPO, beta {beta:g}" in columns]
    with figure(path, 3, width=5.2, height=4.6) as (_, (bars, curve, frontier)):
        for i, name in enumerate((ONE_PASS, "DPO, beta 1", "DPO, beta 0.3", "DPO, beta 0.1")):
            means, errors = zip(*(cell(rows, kind, name, "less") for kind in kinds))
            bars.errorbar(means, np.arange(len(kinds)) + 0.15 * (i - 1.5), xerr=errors, fmt="o",
                          markersize=4, color="gray" if i == 0 else f"C{i - 1}", label=name)
        bars.axvline(0, color="black", linewidth=1)
        bars.set_yticks(range(len(kinds)), kinds)
        bars.invert_yaxis()
        bars.set(xlabel="right more often than the reward model, points")
        for kind in ("in distribution", "of DPO", "negation", "another word", "other prompts"):
            means, errors = zip(*(cell(rows, kind, f"DPO, beta {beta:g}", "less")
                                  for beta in betas))
            curve.errorbar(betas, means, errors, fmt="o-", markersize=4, capsize=2, label=kind)
        curve.axhline(0, color="black", linewidth=1)
        curve.set(xscale="log", xlabel="beta of DPO", ylabel="points above the reward model")
        of_dpo = [[row for row in results if row["run"] == f"DPO, beta {beta:g}"] for beta in betas]
        frontier.plot([np.mean([row["kl"] for row in own]) for own in of_dpo],
                      [np.mean([row["reward"] for row in own]) for own in of_dpo], "o-",
                      label="DPO, five betas")
        for name in dict.fromkeys(row["run"] for row in results if row["run"].startswith("PPO")):
            own = [row for row in results if row["run"] == name]
            (x, x_error), (y, error) = over_seeds(own, "kl"), over_seeds(own, "reward")
            frontier.errorbar(x, y, error, x_error, fmt="D", markersize=4, capsize=2, label=name)
        for name in (EXPLICIT, TEACHER, "gold"):
            best = [np.mean(values(results, f"best_at_{kl:g}", run=name)) for kl in KLS]
            frontier.plot(KLS, best, "x:", label=f"best policy for: {name}")
        frontier.set(xlabel="KL to the reference, nats", ylabel="gold reward", xscale="log")
        for axis in (bars, curve, frontier):
            axis.legend(fontsize=7)


# ---- pairs of somebody else's --------------------------------------------------------------------

def read_judged(path: Path) -> list[dict]:
    """LLMBar's form: a JSON list of {"input", "output_1", "output_2", "label"}."""
    found = read_json(path)
    if not isinstance(found, list) or not found:
        fail(f"{path}: expected a list of pairs")
    rows = []
    for i, row in enumerate(found, 1):
        where = f"{path}, pair {i}"
        if not isinstance(row, dict):
            fail(f"{where}: expected an object with input, output_1, output_2 and label")
        for name in ("input", "output_1", "output_2"):
            check_field(row, name, str, where)
        if row.get("label") not in (1, 2):
            fail(f"{where}: field 'label' is {row.get('label')!r}, expected 1 or 2")
        rows.append({"prompt": row["input"], "chosen": row[f"output_{row['label']}"],
                     "rejected": row[f"output_{3 - row['label']}"]})
    return rows


def fitted(tokenizer: Tokenizer, prompt: str, response: str,
           block_size: int) -> tuple[list[int], list[int]]:
    """Ids of a prompt and a response that fit into the block together: of a prompt that is too long
    the end is kept, half a block at least; of a response the beginning, without <eos>."""
    prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(response) + [tokenizer.eos]
    room = max(block_size // 2, block_size - 1 - len(ids))  # for the prompt, behind <bos>
    prompt_ids = [tokenizer.bos] + prompt_ids[-min(room, block_size - 2):]
    return prompt_ids, ids[:block_size - len(prompt_ids)]


def judge(config: Config) -> None:
    """Print how often --run is right about --data, file by file."""
    data, folder = Path(config.data), Path(config.run)
    files = sorted(data.glob("*.json")) if data.is_dir() else [data]
    if not files:
        fail(f"--data {data}: no .json file in it")
    judged = {path.stem: read_judged(path) for path in files}
    settings_of_run = read_json_object(folder / "config.json", "dataset", "preset")
    reference = reference_of(config.run, settings_of_run)
    start = pipeline.load(reference, settings_of_run["dataset"], settings_of_run["preset"])
    reward, total = pipeline.reward_of_run(folder, start), []
    print(f"{reward.name}: pairs that it is right about, ties counting half")
    for name, rows in judged.items():
        both = [fitted(start.tokenizer, row["prompt"], row[side], start.ref.config.block_size)
                for side in ("chosen", "rejected") for row in rows]
        tokens, lengths = pad([prompt + ids for prompt, ids in both], start.tokenizer.pad)
        samples = Samples(tokens, torch.tensor([len(prompt) for prompt, _ in both]), lengths, None)
        right = half_ties(*reward([], [], samples).view(2, -1))
        total += right.tolist()
        cut = sum(ids[-1] != start.tokenizer.eos for _, ids in both)
        print(f"{name:12} {right.mean():6.1%} of {len(rows):4} pairs; "
              f"{cut} of {2 * len(rows)} responses were cut to fit the block")
    print(f"{'all':12} {np.mean(total):6.1%} +- {0.5 / len(total)**0.5:.1%}: the error of a coin")


# ---- main ----------------------------------------------------------------------------------------

def build(config: Config) -> tuple[pipeline.Start, list[PlannedRun]]:
    """What all runs share, built if it is missing, and the runs but for PPO on DPO's reward."""
    start = pipeline.load(pipeline.sft_policy("", "reviews", "cpu"), "reviews", "cpu")
    start.gold = pipeline.gold_reward(start)
    start.bank = pipeline.sample_bank(start)
    planned = []
    for seed in range(1 if config.quick else config.seeds):
        for run in explicit_models(seed).values():
            pipeline.stage(run)
        planned += [PlannedRun(name, "", seed, run)
                    for name, run in policies(seed, config.quick).items()]
    return start, with_sources(planned, start)


def on_dpo(config: Config, start: pipeline.Start) -> list[PlannedRun]:
    """PPO on DPO's reward, which can be planned once that DPO is finished."""
    planned = [PlannedRun(name, "", seed, run)
               for seed in range(0 if config.quick else config.seeds)
               for name, run in ppo_on_dpo(seed).items()]
    return with_sources(planned, start)


def report(config: Config, start: pipeline.Start, done: list[PlannedRun]) -> str:
    """Ask every finished run, write rows, table and figure, and return the table."""
    rows, results = [], []
    for seed in sorted({run.seed for run in done}):
        explicit = {name: Path(run.out) for name, run in explicit_models(seed).items()}
        implicit = {run.method: Path(run.config.out) for run in done if run.seed == seed}
        texts = [text for responses in start.bank.responses for text in responses]
        repeated = [prompt for prompt in start.bank.prompts for _ in start.bank.responses[0]]
        best = pipeline.reward_of_run(explicit[EXPLICIT], start)(repeated, texts)
        authors = {f"of {name}": load_run(implicit[run])[0]
                   for name, run in (("DPO", "DPO, beta 0.1"), ("PPO", PPO_AUTHOR))
                   if run in implicit}
        best = best.view(len(start.bank.prompts), -1)
        pairs = kinds_of_pairs(start, config.pairs, seed, authors, best)
        thinks = opinions(start, [row for own in pairs.values() for row in own], explicit, implicit)
        rows += measure(pairs, thinks, seed)
        results += optimised(start, seed, explicit, implicit)
    folder = Path(config.out)
    text = markdown(rows, results)
    write_jsonl(folder / "results.jsonl", rows)
    write_jsonl(folder / "policies.jsonl", results)
    atomic_write(folder / "table.md", text.encode())
    draw(rows, results, folder / "figure.png")
    return text


def main(config: Config) -> None:
    """Build what is missing, run what is not finished, and ask."""
    use_device(config.device)
    if config.data:
        return judge(config)
    folder = Path(config.out)
    check_writable(folder)
    with redirect_stdout(sys.stderr if config.print else sys.stdout):
        start, planned = build(config)
    if config.print:
        if all(is_finished(run) for run in planned):
            planned += on_dpo(config, start)
        return print_commands(planned)
    done, stopped = run_all(planned, folder, config.workers)
    if not stopped:
        more, stopped = run_all(on_dpo(config, start), folder, config.workers)
        done += more
    if not done:
        sys.exit(STOPPED)
    print(f"\n{report(config, start, done)}\nrows, table and figure  ->  {folder}")
    if stopped:
        sys.exit(STOPPED)


if __name__ == "__main__":
    main(parse(Config, __doc__))
