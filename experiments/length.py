"""Length: a judge who likes long responses a little, and DPO that goes for length. Does a larger
beta help, or length-regularised DPO (Park et al. 2024)?

    label        P(a beats b) = sigmoid( s (r_a - r_b) + lambda (|a| - |b|) )    r gold, |a| tokens
    DPO ends at  pi_ref exp( (s r + (lambda - alpha) |y|) / beta ) / Z           with endless pairs

    python experiments/length.py             # `reviews`, 3 seeds of 11 runs: half an hour of a core
    python experiments/length.py --quick     # one seed, fewer pairs: some minutes
    python experiments/length.py --print     # the runs that are still to do, as commands

The gold reward knows nothing of length. lambda is the one at which the longer response is expected
to be chosen in 57% of the pairs. Runs of dpo.py on these pairs: plain, at five --length-alpha, at
three larger betas; on a part of the pairs in which at every difference of length the longer one
wins half of the time; and on pairs with labels of the gold reward alone.

Expected, from the limit: alpha = lambda ends where labels without a bias end, a smaller alpha goes
for length, a larger one against it. For a small step (large beta) the gain in gold reward is
s Var(r) / beta and that in length (lambda - alpha) Var(|y|) / beta: beta changes both alike, alpha
the length alone, so alpha is no early stopping. On pairs the implicit reward rises by lambda -
alpha for a token more. What would say otherwise: a larger beta that is as good as an alpha and as
short; or length that explains no more of the implicit reward on the policy's own responses than on
pairs, where Park et al. found the opposite.

Differs from Park et al.: the bias is known, as is the gold reward; their pairs are people's.

Reads   the SFT policy, the bank, and the task's pairs, whose labels are drawn anew
Writes  runs/<dataset>/length.../ : pairs-*.jsonl, runs/, results.jsonl, table.md, figure.png

Symbols: alpha, lambda in log-odds per token; a token is one of the response, its end counted.
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, for the imports below

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

from contextlib import redirect_stdout

import numpy as np
import torch

import dpo
import evaluate
from common import fail, pipeline, tasks
from common.figures import figure
from common.files import atomic_write, check_writable, write_jsonl
from common.pairs import pair_tensors, read_pairs
from common.run import load_run
from common.settings import (
    changed, parse, require, require_numbers, run_folder, settings)
from common.statistics import mean_se, sigmoid, values
from common.training import Device, Dtype, generator, use_device
from experiments.frontier import as_table, plus_minus
from experiments.sweep import (
    STOPPED, PlannedRun, print_commands, run_all, with_sources)
from model import GPT, summed_logprobs

BETA = 0.1
ALPHAS = (0.5, 1.0, 2.0, 4.0, 8.0)  # in lambdas
BETAS = (0.2, 0.5, 1.0)
UNSEEN = 100  # prompts whose pairs no run learns from


@settings
class Config:
    dataset: str = "reviews"  # Task: a folder of data/ with an exact gold reward.
    preset: str = "cpu"  # Kind of machine that the task's sizes are meant for.

    # ---- the pairs
    share: float = 0.57  # How often the longer response is to be chosen.
    prompts: int = 800  # Prompts to learn from, six pairs each.

    # ---- the runs
    seeds: int = 3  # Draws of the pairs, their labels and the order in training.
    quick: bool = False  # One seed of 200 prompts.
    sft: str = ""  # Run folder of the SFT policy, if not runs/<dataset>/sft.
    out: str = ""  # Folder of the results, if not length with the settings that are no defaults.
    workers: int = 0  # Runs side by side; 0 = one for each core, or one on CUDA.
    dtype: Dtype = "auto"  # Number format of matrix products; auto = bfloat16 on CUDA.
    device: Device = "auto"  # Where it is computed; auto = CUDA where there is one, else the CPU.
    print: bool = False  # Run nothing: print the commands that are still to do, one a line.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="prompts seeds", from_0="workers")
        require(0.5 < self.share < 0.8, f"--share {self.share:g}: must be between 0.5 and 0.8")
        for name in ("prompts", "seeds") if self.quick else ():
            require(name not in changed(self), f"--{name}: not with --quick, which says how many")
        require(not self.print or not self.workers,
                "--workers: not with --print, which runs nothing")
        self.out = self.out or run_folder(self, "length", never=("workers", "print"))
        if self.quick:  # after the folder has its name: that is made of what was typed
            self.prompts, self.seeds = 200, 1


# ---- the pairs -----------------------------------------------------------------------------------

def differences(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Chosen less rejected of each row: gold reward, and tokens."""
    gold = [row["chosen_reward"] - row["rejected_reward"] for row in rows]
    tokens = [len(row["chosen_ids"]) - len(row["rejected_ids"]) for row in rows]
    return np.array(gold), np.array(tokens)


def share_of_longer(rows: list[dict], scale: float, bias: float) -> float:
    """How often the longer response is expected to be chosen; pairs of equal length do not count.
    """
    gold, tokens = differences(rows)
    first_wins = sigmoid(scale * gold + bias * tokens)
    longer_wins = np.where(tokens > 0, first_wins, 1 - first_wins)
    return float(longer_wins[tokens != 0].mean())


def find_bias(rows: list[dict], scale: float, share: float) -> float:
    """The lambda at which the longer response is expected to be chosen this often, to three
    digits behind the point, by bisection."""
    low, high = 0.0, 10.0
    if not share_of_longer(rows, scale, low) < share < share_of_longer(rows, scale, high):
        fail(f"--share {share:g}: no preference for length, from 0 to {high:g} a token, has it")
    for _ in range(40):
        middle = (low + high) / 2
        if share_of_longer(rows, scale, middle) < share:
            low = middle
        else:
            high = middle
    return round(high, 3)


def relabelled(rows: list[dict], scale: float, bias: float, seed: int) -> list[dict]:
    """The same pairs with labels of a judge who likes a token more by `bias`. With the same seed
    the same random numbers decide, whatever the bias."""
    gold, tokens = differences(rows)
    uniform = torch.rand(len(rows), generator=generator(seed, "length"), dtype=torch.double).numpy()
    stays = uniform < sigmoid(scale * gold + bias * tokens)
    new = []
    for row, same in zip(rows, stays):
        row = {name: value for name, value in row.items() if name != "line"}
        if not same:
            for name in ("", "_reward", "_ids"):
                chosen, rejected = row["chosen" + name], row["rejected" + name]
                row["chosen" + name], row["rejected" + name] = rejected, chosen
        new.append(row)
    return new


def balanced(rows: list[dict]) -> list[dict]:
    """As many of the rows as possible, the first ones, so that at every difference of length the
    longer response wins as often as the shorter one."""
    _, tokens = differences(rows)
    left = {}
    for size in set(np.abs(tokens).tolist()):
        left[size] = left[-size] = min((tokens == size).sum(), (tokens == -size).sum())
    kept = []
    for row, difference in zip(rows, tokens.tolist()):
        if left[difference] > 0:
            left[difference] -= 1 if difference else 0
            kept.append(row)
    return kept


# ---- the runs ------------------------------------------------------------------------------------

def pairs_file(config: Config, name: str, seed: int) -> Path:
    """Where the pairs of a seed are: biased, balanced, unbiased or unseen."""
    return Path(config.out) / f"pairs-{name}-seed{seed}.jsonl"


def plan(config: Config, files: list[dict[str, Path]], bias: float) -> list[PlannedRun]:
    """All runs, those of a seed together. `files`: of each seed, the pairs by name."""
    planned = []
    for seed, pairs in enumerate(files):
        kinds = [("DPO", "biased", BETA, 0.0)]
        kinds += [("length alpha", "biased", BETA, round(k * bias, 6)) for k in ALPHAS]
        kinds += [("larger beta", "biased", beta, 0.0) for beta in BETAS]
        kinds += [("balanced pairs", "balanced", BETA, 0.0), ("no bias", "unbiased", BETA, 0.0)]
        for method, name, beta, alpha in kinds:
            folder = f"{name}-beta{beta:g}-alpha{alpha:g}-seed{seed}"
            run = dpo.Config(dataset=config.dataset, preset=config.preset, sft=config.sft,
                             beta=beta, length_alpha=alpha, pairs=str(pairs[name]), seed=seed,
                             dtype=config.dtype, device=config.device, resume=True,
                             out=str(Path(config.out) / "runs" / folder))
            planned.append(PlannedRun(method, f"beta {beta:g}, alpha {alpha:g}", seed, run))
    return planned


def build(config: Config) -> tuple[pipeline.Start, list[PlannedRun], float]:
    """SFT policy, gold reward and bank; the runs, whose pairs are written; lambda."""
    use_device(config.device)
    folder = Path(config.out)
    check_writable(folder)
    pipeline.require_gold(config.dataset)
    task = tasks.load(config.dataset)
    if task.gold_reward is None or task.labels != "bt":
        fail(f"--dataset {config.dataset}: has no exact gold reward, or no Bradley-Terry labels")
    preset = tasks.load_preset(config.dataset, config.preset)
    if config.prompts > preset.pair_prompts - UNSEEN:
        fail(f"--prompts {config.prompts}: must be at most {preset.pair_prompts - UNSEEN}, as "
             f"{UNSEEN} of the task's {preset.pair_prompts} are for measuring")
    sft = pipeline.sft_policy(config.sft, config.dataset, config.preset, config.dtype)
    start = pipeline.load(sft, config.dataset, config.preset, config.dtype)
    start.gold = pipeline.gold_reward(start)
    start.bank = pipeline.sample_bank(start)

    files, bias = [], 0.0
    for seed in range(config.seeds):
        rows = read_pairs(pipeline.sampled_pairs(start, "bt", seed=seed))
        prompts = list(dict.fromkeys(row["prompt"] for row in rows))
        learned, unseen = {*prompts[:config.prompts]}, {*prompts[-UNSEEN:]}
        kinds = {"unseen": [row for row in rows if row["prompt"] in unseen]}
        rows = [row for row in rows if row["prompt"] in learned]
        if seed == 0:
            bias = find_bias(rows, task.label_scale, config.share)
        kinds["unbiased"] = relabelled(rows, task.label_scale, 0.0, seed)
        kinds["biased"] = relabelled(rows, task.label_scale, bias, seed)
        kinds["balanced"] = balanced(kinds["biased"])
        files.append({name: pairs_file(config, name, seed) for name in kinds})
        for name, path in files[-1].items():
            write_jsonl(path, kinds[name])
    return start, with_sources(plan(config, files, bias), start), bias


# ---- what is measured ----------------------------------------------------------------------------

def explained(lengths: torch.Tensor, rewards: torch.Tensor) -> tuple[float, float]:
    """The share of the rewards' variance that length explains (R^2), and the slope for a token
    more: by least squares on what is left of both without the mean of each prompt, of which an
    implicit reward says nothing.

    Args:
        lengths, rewards: (M, N) of N responses to each of M prompts.
    """
    x = lengths.double() - lengths.double().mean(1, keepdim=True)
    y = rewards.double() - rewards.double().mean(1, keepdim=True)
    xx, xy, yy = (x * x).sum().item(), (x * y).sum().item(), (y * y).sum().item()
    if not xx or not yy:
        return 0.0, 0.0
    return xy * xy / (xx * yy), xy / xx


def on_pairs(policy: GPT, start: pipeline.Start, path: Path, beta: float) -> tuple[float, float]:
    """R^2 and slope of the implicit reward on a file of pairs, the reference's responses."""
    pipeline.use_pairs(start, read_pairs(path), path)
    pairs = pair_tensors(start.pairs, start.tokenizer.pad)
    ref_logprobs = pipeline.reference_logprobs(start, pairs).cpu()  # (2, N)
    flat = [tensor.flatten(0, 1) for tensor in pairs]  # tokens, prompt lengths, lengths
    logprobs = summed_logprobs(policy, *flat, start.dtype).view(2, -1)
    lengths = pairs.lengths - pairs.prompt_lengths
    return explained(lengths.T, beta * (logprobs - ref_logprobs).T)


def measure(run: PlannedRun, start: pipeline.Start, unseen: Path, bias: float) -> dict:
    """A row: gold reward, KL and length on the bank's prompts; what length explains."""
    policy, _ = load_run(run.config.out)
    sampled = evaluate.sample_policy(policy, start.ref, start.tokenizer, start.bank.prompts,
                                     start.gold)
    row = {"method": run.method, "seed": run.seed, "beta": run.config.beta,
           "alpha": run.config.length_alpha, "lambda": bias}
    rows = read_pairs(run.config.pairs)
    _, tokens = differences(rows)
    row |= {"pairs": len(rows), "longer_chosen": float((tokens > 0).sum() / (tokens != 0).sum())}
    row |= evaluate.policy_row(sampled)
    row["r2_pairs"], row["slope_pairs"] = on_pairs(policy, start, unseen, run.config.beta)
    row["r2_own"], row["slope_own"] = explained(sampled.lengths, run.config.beta * sampled.kl)
    return row


def shorter_than_beta(rows: list[dict]) -> None:
    """Give each row "shorter": by how many tokens its responses are shorter than those of the beta
    that has as much gold reward without alpha, on the line from SFT through the runs at falling
    beta; where none has as much, than at the line's end."""
    for seed in {row["seed"] for row in rows}:
        own = [row for row in rows if row["seed"] == seed]
        line = [row for row in own if row["method"] in ("SFT", "larger beta", "DPO")]
        line.sort(key=lambda row: row["reward"])
        for row in own:
            length = np.interp(row["reward"], values(line, "reward"), values(line, "length"))
            row["shorter"] = float(length) - row["length"]


# ---- table and figure ----------------------------------------------------------------------------

def settings_of(rows: list[dict]) -> list[list[dict]]:
    """The rows of each setting together, one a seed, in the order of the runs."""
    keys = dict.fromkeys((row["method"], row["beta"], row["alpha"]) for row in rows)
    return [[row for row in rows if (row["method"], row["beta"], row["alpha"]) == key]
            for key in keys]


def mean_error(rows: list[dict], name: str) -> tuple[float, float]:
    """Mean over seeds, and the standard error over seeds or that of the evaluation over prompts,
    whichever is larger: all seeds are evaluated on the same prompts."""
    mean, error = mean_se(values(rows, name))
    for of_prompts in values(rows, f"{name}_se"):
        error = max(of_prompts, error)  # NaN, of a single seed, is never the larger one
    return mean, error


COLUMNS = {"reward": ("gold reward", ".3f", 1), "kl": ("KL, nats", ".2f", 1),
           "length": ("length", ".1f", 1), "shorter": ("shorter than by beta", "+.1f", 1),
           "r2_pairs": ("R² on pairs, %", ".0f", 100), "r2_own": ("R² on its own, %", ".0f", 100),
           "slope_pairs": ("slope on pairs", "+.3f", 1),
           "slope_own": ("slope on its own", "+.3f", 1)}


def table(rows: list[dict]) -> str:
    """A line for each setting: means over seeds with their errors, and the slope of the limit."""
    heads = [head for head, _, _ in COLUMNS.values()]
    lines = [["", "β", "α / λ", *heads, "slope in theory"]]
    for own in settings_of(rows):
        first = own[0]
        trained = first["method"] != "SFT"
        cells = [first["method"], f"{first['beta']:g}" if trained else "",
                 f"{first['alpha'] / first['lambda']:g}" if trained else ""]
        for name, (_, form, unit) in COLUMNS.items():
            if trained or name in ("reward", "kl", "length"):
                mean, error = mean_error(own, name)
                cells.append(f"{unit * mean:{form}}{plus_minus(unit * error, form.strip('+'))}")
            else:
                cells.append("")
        liked = first["lambda"] if first["method"] not in ("balanced pairs", "no bias") else 0.0
        lines.append([*cells, f"{liked - first['alpha']:+.3f}" if trained else ""])
    return as_table(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Gold reward over length, on beta's line and on alpha's; then R^2 and slope over alpha."""
    groups = settings_of(rows)
    lines = {"β, without α": ("SFT", "larger beta", "DPO"),
             "α, at β = 0.1": ("DPO", "length alpha"),
             "balanced pairs": ("balanced pairs",), "no bias": ("no bias",)}
    with figure(path, 3, width=4.6) as (_, axes):
        for name, methods in lines.items():
            line = [own for own in groups if own[0]["method"] in methods]
            line.sort(key=lambda own: (own[0]["alpha"], own[0]["reward"]))
            x, x_errors = zip(*[mean_error(own, "length") for own in line])
            y, y_errors = zip(*[mean_error(own, "reward") for own in line])
            axes[0].errorbar(x, y, y_errors, x_errors, fmt="o-", capsize=2, label=name)
            for own, *place in zip(line, x, y):
                first = own[0]
                text = {"SFT": "SFT", "length alpha": f"{first['alpha'] / first['lambda']:g} λ",
                        "larger beta": f"{first['beta']:g}", "DPO": f"{first['beta']:g}"}
                axes[0].annotate(text.get(first["method"], ""), place, xytext=(4, -11),
                                 textcoords="offset points", fontsize=8)
        axes[0].set(xlabel="length, tokens", ylabel="gold reward")

        alphas = [own for own in groups if own[0]["method"] in ("DPO", "length alpha")]
        x = [own[0]["alpha"] / own[0]["lambda"] for own in alphas]
        for axis, name in zip(axes[1:], ("r2", "slope")):
            for of, label in (("pairs", "pairs"), ("own", "the policy's own responses")):
                mean, errors = zip(*[mean_error(own, f"{name}_{of}") for own in alphas])
                axis.errorbar(x, mean, errors, fmt="o-", capsize=2, label=label)
        axes[1].set(title="implicit reward: explained by length", xlabel="α / λ", ylabel="R²")
        theory = [own[0]["lambda"] - own[0]["alpha"] for own in alphas]
        axes[2].plot(x, theory, "k:", label="theory, λ - α")
        axes[2].set(title="implicit reward: for a token more", xlabel="α / λ", ylabel="slope")
        for axis in axes:
            axis.legend(fontsize=8)


def main(config: Config) -> None:
    """Label the pairs, run what is not finished, measure, and write rows, table and figure."""
    with redirect_stdout(sys.stderr if config.print else sys.stdout):
        start, planned, bias = build(config)
    if config.print:
        return print_commands(planned)
    folder = Path(config.out)
    done, stopped = run_all(planned, folder, config.workers)
    if stopped:
        sys.exit(STOPPED)

    bank = start.bank
    of_sft = evaluate.table_row("reference", bank.rewards.mean(1), torch.zeros(len(bank.prompts)),
                                bank.lengths.float().mean(1))
    rows = [{"method": "SFT", "seed": seed, "beta": 0.0, "alpha": 0.0, "lambda": bias, **of_sft}
            for seed in range(config.seeds)]
    for run in done:
        unseen = pairs_file(config, "unseen", run.seed)
        rows.append(measure(run, start, unseen, bias))
    shorter_than_beta(rows)
    text = table(rows)
    write_jsonl(folder / "results.jsonl", rows)
    atomic_write(folder / "table.md", text.encode())
    draw(rows, folder / "figure.png")
    longer = np.mean([row["longer_chosen"] for row in rows if row["method"] == "DPO"])
    print(f"\nlambda = {bias:g}; the longer response is chosen in {longer:.1%} of the pairs\n\n"
          f"{text}\nrows, table and figure  ->  {folder}")


if __name__ == "__main__":
    main(parse(Config, __doc__))
