"""Reward overoptimisation (Gao et al. 2022): a policy is trained on a proxy, a reward model of few
noisy pairs; how does the gold reward fare the harder the proxy is maximised?

    d        = sqrt( KL(policy || reference) )                      the distance travelled
    R_bon(d) = d (alpha - beta d)                                   best of n,  Gao et al., Eq. 1
    R_rl(d)  = d (alpha - beta log d)                               RL,         Gao et al., Eq. 1

    python experiments/overoptimization.py           # `reviews`; an hour and a half of one core
    python experiments/overoptimization.py --quick   # one seed, fewer runs: ten minutes

Three ways of maximising a proxy, each with gold and proxy against d:

    best of n    n = 1 to 256 of the bank's responses, chosen by a reward model. Nothing is trained:
                 order statistics of the 256 give the mean over all draws of n.
    PPO          on a reward model of 1,000 pairs, without a KL penalty (--beta 1e-6, next to
                 none) and with two, every 5 updates
    DPO          five betas, every 25 steps. Its proxy is its own implicit reward, whose mean on its
                 own responses is beta KL (plus beta log Z): it cannot fall.

R is the log-odds of the mean gold reward, less those of the reference. The gold reward of a task
lies in [0, 1] and saturates, its log-odds do not; and R falls exactly where the mean gold reward
falls. Both forms, and a quadratic in the KL as a control, are fitted to the nearer half of the
distances and judged on the other half.

Expected: the curves rise, and with few pairs they fall again; more pairs move the peak up and to
the right; PPO travels further than best of n for the same gold reward; a KL penalty stops earlier
on the same curve. Found (results/overoptimization): PPO without a penalty falls nearly to where it
began, best of n does not fall, DPO has less the smaller its beta is below 0.1; a penalty of 0.2 is
better than stopping early; the forms are not told apart.

Differs from Gao et al.: labels are noisy, as people's are; the proxy has the size of the policy or
less; gold is exact; the KL of best of n is the bound log n - (n - 1) / n.

Reads   the SFT policy, the pairs, the bank (made if they are missing)
Writes  runs/<dataset>/overoptimization/ : the runs, results.jsonl, figure.png, table.md

Symbols: proxy, in standard deviations of its scores on the reference's responses; count, pairs that
a proxy learned from; member, one of four reward models that differ in their seed alone.
"""
from __future__ import annotations

import dataclasses
import math
import sys
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, for the imports below

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import numpy as np
import torch

import dpo
import evaluate
import ppo
import reward_model
from common import pipeline, rewards, tasks
from common.figures import figure
from common.files import atomic_write, check_writable, read_jsonl, write_jsonl
from common.pairs import read_pairs
from common.run import load_tensors, save_tensors
from common.settings import (
    parse, require, require_numbers, runs_folder, runs_of, settings)
from common.statistics import mean_se
from common.training import Device, Dtype, use_device
from experiments import scaling
from experiments.frontier import as_table, number
from experiments.sweep import (
    STOPPED, PlannedRun, finished_log, is_finished, print_commands, run_all, with_sources)

FREE = 1e-6  # the KL penalty of PPO that has none: ppo.py wants it above 0
MIN_STEPS = 50  # optimizer steps of a reward model, at least, as in scaling.py
FORMS = ("best-of-n", "rl", "quadratic")
MEMBERS = 4  # reward models of an ensemble
NS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # of best of n


@settings
class Config:
    dataset: str = "reviews"  # Task: a folder of data/ with an exact gold reward.
    preset: str = "cpu"  # Kind of machine that the task's sizes are meant for.
    sft: str = ""  # Run folder of the SFT policy, if not runs/<dataset>/sft.

    # ---- what is compared
    small: str = "1x32"  # Layers x channels of the smaller reward models; the others have the
    # policy's.
    counts: str = "300,1000,3000"  # Pairs that reward models learn from, beside all of them.
    weak: int = 1000  # Pairs of the proxy of the ensembles and of PPO with a penalty; in --counts.
    penalties: str = "0.05,0.2"  # PPO's KL penalties beside none.
    betas: str = "0.01,0.03,0.1,0.3,1"  # DPO's betas.
    prompts: int = 0  # Bank prompts that best of n is measured on, the first ones; 0 = all of them.
    seeds: int = 3  # Reward models of each kind; a seed draws pairs, labels, head and order.
    policy_seeds: int = 3  # Seeds with PPO and DPO runs; 0 = best of n alone.
    also: str = ""  # Rows of experiments/frontier.py (a results.jsonl), whose DPO and PPO are taken
    # beside the runs of this experiment.
    quick: bool = False  # Compare less: one seed, 32 prompts, no penalties, two of DPO's betas.

    # ---- the runs
    dtype: Dtype = "auto"  # Number format of matrix products; auto = bfloat16 on CUDA.
    device: Device = "auto"  # Where it is computed; auto = CUDA where there is one, else the CPU.
    workers: int = 0  # Runs side by side; 0 = one for each core, or one on CUDA.
    out: str = ""  # Folder of the experiment, if not overoptimization beside the SFT policy.
    print: bool = False  # Run nothing: print the commands that can be run now, one a line.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="weak seeds", from_0="prompts policy_seeds workers")
        require(str(self.weak) in self.counts.split(","),
                f"--weak {self.weak}: must be one of --counts {self.counts}")
        require(self.policy_seeds <= self.seeds, f"--policy-seeds {self.policy_seeds}: must be at "
                f"most --seeds {self.seeds}")
        if self.quick:
            betas = self.betas.split(",")
            self.seeds, self.policy_seeds, self.penalties = 1, min(1, self.policy_seeds), ""
            self.betas = ",".join(dict.fromkeys([betas[0], betas[-1]]))
            self.prompts = self.prompts or 32
        base = runs_of(self.sft) if self.sft else runs_folder(self.dataset, self.preset)
        self.out = self.out or str(base / "overoptimization")


# ---- the mathematics -----------------------------------------------------------------------------

def basis(distance: np.ndarray, form: str) -> np.ndarray:
    """The two functions (n, 2) that alpha and beta weigh.

    best-of-n: d (alpha - beta d);  rl: d (alpha - beta log d);  quadratic: KL (alpha - beta KL).
    """
    d = np.asarray(distance, dtype=np.float64)
    if form == "best-of-n":
        return np.stack([d, -d**2], 1)
    if form == "rl":  # d log d is 0 at 0
        return np.stack([d, -d * np.log(np.maximum(d, 1e-300))], 1)
    return np.stack([d**2, -d**4], 1)


def fit(distance: np.ndarray, gold: np.ndarray, form: str) -> tuple[float, float]:
    """alpha and beta by least squares.

    Args:
        distance: (n,) square roots of KLs in nats.
        gold: (n,) gains over the reference.
        form: best-of-n, rl or quadratic.
    """
    alpha, beta = np.linalg.lstsq(basis(distance, form), np.asarray(gold), rcond=None)[0]
    return float(alpha), float(beta)


def held_out_error(distance: np.ndarray, gold: np.ndarray, form: str) -> float:
    """Root mean square error on the further half of the distances, fitted on the nearer half.

    nan where the nearer half has fewer than three points: then there is nothing to predict from.
    """
    distance, gold = np.asarray(distance), np.asarray(gold)
    near = distance <= distance.max() / 2
    if (near & (distance > 0)).sum() < 3:
        return math.nan
    predicted = basis(distance[~near], form) @ fit(distance[near], gold[near], form)
    return float(np.sqrt(np.mean((predicted - gold[~near])**2)))


def log_odds(mean: np.ndarray) -> np.ndarray:
    """log p / (1 - p) of a mean gold reward in [0, 1]."""
    p = np.clip(np.asarray(mean, dtype=np.float64), 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))


def fall(gold: np.ndarray) -> float:
    """How far the mean gold reward at the end lies below its peak.

    The peak is looked for on one half of the prompts and measured on the other, both ways round:
    so that noise alone makes no fall, and the value may be negative.

    Args:
        gold: (n, M) mean gold reward of each point of a curve and each prompt.
    """
    halves = gold[:, 0::2].mean(1), gold[:, 1::2].mean(1)
    falls = [other[one.argmax()] - other[-1] for one, other in (halves, halves[::-1])]
    return float(np.mean(falls))


def order_accuracy(scores: torch.Tensor, gold: torch.Tensor) -> float:
    """How often two neighbours among the N responses, (M, N), are in the order of their gold
    rewards; those of equal gold are left out."""
    margins = (scores[:, 0::2] - scores[:, 1::2]) * (gold[:, 0::2] - gold[:, 1::2]).sign()
    return (margins[gold[:, 0::2] != gold[:, 1::2]] > 0).double().mean().item()


def best_of_n(scores: torch.Tensor, gold: torch.Tensor, ns: list[int]) -> dict:
    """Gold reward (n, M) and proxy (n,) of the best of each n of the bank's responses.

    Args:
        scores, gold: (M, N) of the same responses. The best are those with the highest scores.
    """
    weights = [evaluate.best_of_n_weights(scores, n) for n in ns]
    return {"gold": np.stack([(w * gold.double()).sum(1).numpy() for w in weights]),
            "proxy": [(w * scores.double()).sum(1).mean().item() for w in weights]}


# ---- the runs ------------------------------------------------------------------------------------

def reward_models(config: Config, start: pipeline.Start) -> list[PlannedRun]:
    """A reward model of each size, count and seed, and the other members of the ensembles. Method:
    its size; setting: its count; beyond the first a member's number is in its name."""
    own = f"{start.ref.config.n_layer}x{start.ref.config.n_embd}"
    sizes = {own: start.sft, config.small: scaling.make_policy(config, start, config.small)}
    planned = []
    shared = dict(dataset=config.dataset, preset=config.preset, dtype=config.dtype, resume=True)
    for seed in range(config.seeds):
        every = pipeline.sampled_pairs(start, tasks.load(config.dataset).labels, 0, seed)
        pool = list(scaling.by_prompt(read_pairs(every)).values())
        for count in map(int, config.counts.split(",")):
            file = Path(config.out) / "pairs" / f"{count}-seed{seed}.jsonl"
            rows = scaling.subset(pool, count, seed)
            if not file.exists():
                write_jsonl(file, ({name: row[name] for name in row if name != "line"}
                                   for row in rows))
            for size, policy in sizes.items():
                for member in range(MEMBERS if (size, count) == (own, config.weak) else 1):
                    name = f"{size}-{count}-seed{seed}" + (f"-member{member}" if member else "")
                    run = reward_model.Config(**shared, pairs=str(file), sft=str(policy),
                                              seed=seed + 1000 * member,
                                              out=str(Path(config.out) / name))
                    steps = max(1, scaling.trained_on(rows) // run.batch_size)
                    run.epochs = max(run.epochs, MIN_STEPS / steps)
                    planned.append(PlannedRun(size, str(count), seed, run))
        # the one that ppo.py would train: it is there already, more often than not
        run = reward_model.Config(**shared, sft=config.sft, pairs_seed=seed, seed=seed)
        planned.append(PlannedRun(own, "all", seed, run))
    return [run._replace(built_from=reward_model.built_from(run.config)) for run in planned]


def policies(config: Config, proxies: list[PlannedRun]) -> list[PlannedRun]:
    """PPO on the weak proxy, without a penalty and with some, and DPO on all pairs."""
    planned = []
    folder = Path(config.out)
    penalties = [float(beta) for beta in config.penalties.split(",") if beta]
    shared = dict(dataset=config.dataset, preset=config.preset, sft=config.sft,
                  dtype=config.dtype, resume=True)
    for seed in range(config.policy_seeds):
        proxy = next(run.config.out for run in proxies if run.method == proxies[0].method
                     and (run.setting, run.seed) == (str(config.weak), seed))
        for beta in [FREE, *penalties]:
            run = ppo.Config(**shared, reward=proxy, beta=beta, seed=seed, evaluate_every=5,
                             out=str(folder / f"ppo-{config.weak}-beta{beta:g}-seed{seed}"))
            planned.append(PlannedRun("PPO", f"{config.weak}, beta {beta:g}", seed, run))
        for beta in [float(beta) for beta in config.betas.split(",") if beta]:
            run = dpo.Config(**shared, beta=beta, pairs_seed=seed, seed=seed, evaluate_every=25,
                             out=str(folder / f"dpo-beta{beta:g}-seed{seed}"))
            planned.append(PlannedRun("DPO", f"beta {beta:g}", seed, run))
    return planned


# ---- what is measured ----------------------------------------------------------------------------

def first_prompts(bank: evaluate.Bank, prompts: int) -> evaluate.Bank:
    """The bank of its first prompts; 0 = all of them."""
    rows = slice(prompts or None)
    return dataclasses.replace(bank, prompts=bank.prompts[rows], rewards=bank.rewards[rows],
                               lengths=bank.lengths[rows], responses=bank.responses[rows])


def bank_scores(run: PlannedRun, start: pipeline.Start) -> torch.Tensor:
    """Scores (M, N) of the bank's responses, kept in the run's folder."""
    path = Path(run.config.out) / "bank-scores.pt"
    made_of = f"{start.policy_id} {start.bank.lengths.shape} {run.built_from}"
    try:
        kept = load_tensors(path)
        if kept["made_of"] == made_of:
            return kept["scores"]
    except (ValueError, KeyError):  # none there yet, or damaged
        pass
    print(f"scoring the bank: {run.config.out}", flush=True)
    M, N = start.bank.lengths.shape
    model = rewards.learned_reward(run.config.out, start.task, start.ref.config.block_size,
                                   run.config.dtype)
    texts = [text for responses in start.bank.responses for text in responses]
    scores = model([prompt for prompt in start.bank.prompts for _ in range(N)], texts).view(M, N)
    save_tensors(path, {"made_of": made_of, "scores": scores})
    return scores


def searched(name: str, seed: int, scores: torch.Tensor, bank: evaluate.Bank,
             **more: object) -> dict:
    """The row of best of n by these scores: a value for each n, so far as the bank goes."""
    N = scores.shape[1]
    ns = [n for n in NS if n <= N]
    found = best_of_n(scores, bank.rewards, ns)
    return {"method": "best of n", "setting": name, "seed": seed, **more, "n": ns,
            "gold_accuracy": order_accuracy(scores, bank.rewards),
            "distance": [math.sqrt(evaluate.best_of_n_kl(n)) for n in ns],
            "reward": found["gold"].mean(1).tolist(),
            "reward_se": mean_se(found["gold"], axis=1)[1].tolist(),
            "proxy": found["proxy"], "fall": fall(found["gold"])}


def searches(config: Config, proxies: list[PlannedRun], start: pipeline.Start) -> list[dict]:
    """Best of n by every proxy, by the gold reward itself, and by the ensembles of four."""
    bank = start.bank
    rows = [searched("gold", 0, bank.rewards, bank)]
    ensembles: dict[int, list[torch.Tensor]] = {}  # seed -> scores of its members
    for run in proxies:
        scores, name = bank_scores(run, start), f"{run.method}, {run.setting}"
        if (run.method, run.setting) == (proxies[0].method, str(config.weak)):
            ensembles.setdefault(run.seed, []).append(scores)
            name += f", member {len(ensembles[run.seed])}"
        rows.append(searched(name, run.seed, scores, bank, size=run.method, count=run.setting))
    for seed, members in ensembles.items():
        together = torch.stack(members)  # (4, M, N), each in standard deviations of its own
        rows.append(searched("mean of 4", seed, together.mean(0), bank))
        rows.append(searched("minimum of 4", seed, together.amin(0), bank))
    return rows


def along(method: str, setting: str, seed: int, found: list[dict], proxy: list) -> dict:
    """The row of a policy: a value for each evaluation along its way.

    Args:
        found: the evaluations, with kl, reward and reward_se.
        proxy: what is maximised, at each of them; None where it is not known.
    """
    rewards = [row["reward"] for row in found]
    return {"method": method, "setting": setting, "seed": seed,
            "distance": [math.sqrt(max(0.0, row["kl"])) for row in found], "reward": rewards,
            "reward_se": [row["reward_se"] for row in found], "proxy": proxy,
            "fall": max(rewards) - rewards[-1]}  # with noise in it: the largest of several


def trained(run: PlannedRun) -> dict:
    """The row of a PPO or DPO run of this experiment."""
    log = finished_log(run)
    found = [{name.removeprefix("eval_"): row[name] for name in row}
             for row in log if "eval_kl" in row]
    # PPO's is of the same policy, on 256 responses to training prompts; the last one draws none
    by_step = {row["step"]: row["raw_scores"] for row in log if "raw_scores" in row}
    proxy = [by_step.get(row["step"]) if run.method == "PPO" else run.config.beta * row["kl"]
             for row in found]
    return along(run.method, run.setting, run.seed, found, proxy)


def from_frontier(path: str) -> list[dict]:
    """The rows of the DPO and PPO runs of experiments/frontier.py, whose results.jsonl has their
    evaluations one by one. PPO's proxy is not in it."""
    runs: dict[tuple, list[dict]] = {}
    for row in read_jsonl(path, {"method": str, "setting": str, "seed": int, "kl": float}):
        if row["method"] in ("DPO", "PPO"):
            runs.setdefault((row["method"], row["setting"], row["seed"]), []).append(row)
    rows = []
    for (method, setting, seed), found in runs.items():
        if method == "PPO":
            rows.append(along(method, f"all, {setting}", seed, found, [None] * len(found)))
        else:
            proxy = [row["beta"] * row["kl"] for row in found]
            rows.append(along(method, setting, seed, found, proxy))
    return rows


def gain(row: dict) -> np.ndarray:
    """R of each point of a curve: log-odds of its gold reward less those of its first point, which
    is the reference."""
    return log_odds(row["reward"]) - log_odds(row["reward"][0])


# ---- table and figure ----------------------------------------------------------------------------

def by_setting(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """(method, setting) -> the rows of all seeds; the members of an ensemble are one setting."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        found.setdefault((row["method"], row["setting"].split(", member")[0]), []).append(row)
    return found


def table(rows: list[dict]) -> str:
    """A line for each kind of curve: means over seeds, with standard errors."""
    lines = [["", "gold reward, best", "at d", "at the end", "at d", "fall",
              "error of d (α − β d)", "of d (α − β log d)", "of KL (α − β KL)"]]
    for (method, setting), own in by_setting(rows).items():
        best = [int(np.argmax(row["reward"])) for row in own]
        columns = [([row["reward"][i] for row, i in zip(own, best)], ".3f"),
                   ([row["distance"][i] for row, i in zip(own, best)], ".2f"),
                   ([row["reward"][-1] for row in own], ".3f"),
                   ([row["distance"][-1] for row in own], ".2f"),
                   ([row["fall"] for row in own], ".3f")]
        for form in FORMS:
            columns.append(([held_out_error(row["distance"], gain(row), form) for row in own],
                            ".2f"))
        lines.append([f"{method}: {setting}",
                      *("" if np.isnan(values).any() else number(*mean_se(values), form)
                        for values, form in columns)])
    return as_table(lines)


def draw(rows: list[dict], config: Config, path: Path) -> None:
    """Above the gold reward over the distance, below the proxy: best of n, PPO and DPO."""
    import matplotlib.pyplot as plt
    methods = ("best of n", "PPO", "DPO")
    with figure(path, 3, width=4.6, height=3.6, rows=2, sharex="col") as (_, axes):
        for column, method in enumerate(methods):
            gold, proxy = axes[column], axes[column + 3]
            own = {setting: found for (kind, setting), found in by_setting(rows).items()
                   if kind == method}
            for i, (setting, found) in enumerate(own.items()):
                color = plt.get_cmap("viridis")(0.9 * i / max(1, len(own) - 1))
                if method == "best of n":  # one line for all seeds, which have the same distances
                    found = [{name: np.mean([row[name] for row in found], 0)
                              for name in ("distance", "reward", "proxy")}]
                for j, row in enumerate(found):
                    style = dict(color=color, linewidth=1.2, marker=".", markersize=3)
                    gold.plot(row["distance"], row["reward"], **style,
                              label=setting if j == 0 else None)
                    measured = [(d, p) for d, p in zip(row["distance"], row["proxy"])
                                if p is not None]
                    if measured and setting != "gold":
                        proxy.plot(*zip(*measured), **style)
            gold.set(title=method, ylabel="gold reward")
            proxy.set(xlabel=r"$d = \sqrt{KL}$", ylabel="proxy")
            if own:
                gold.legend(fontsize=6)


# ---- main ----------------------------------------------------------------------------------------

def main(config: Config) -> None:
    """Build what is missing, run what is not finished, and write rows, table and figure."""
    # ---- 1) what all runs share; with --print, stdout is for the commands alone ------------------
    use_device(config.device)
    folder = Path(config.out)
    check_writable(folder)
    pipeline.require_gold(config.dataset)
    with redirect_stdout(sys.stderr if config.print else sys.stdout):
        start = pipeline.load(
            pipeline.sft_policy(config.sft, config.dataset, config.preset, config.dtype),
            config.dataset, config.preset, config.dtype)
        start.gold = pipeline.gold_reward(start)
        start.bank = first_prompts(pipeline.sample_bank(start), config.prompts)
        proxies = reward_models(config, start)
    if config.print and not all(is_finished(run) for run in proxies):
        return print_commands(proxies)

    # ---- 2) the proxies, and then the policies that maximise them --------------------------------
    proxies, stopped = run_all(proxies, folder, config.workers)
    if stopped:
        sys.exit(STOPPED)
    planned = with_sources(policies(config, proxies), start)
    if config.print:
        return print_commands(planned)
    finished, stopped = run_all(planned, folder, config.workers)

    # ---- 3) all files first, then the screen -----------------------------------------------------
    rows = searches(config, proxies, start) + [trained(run) for run in finished]
    if config.also:
        rows += from_frontier(config.also)
    write_jsonl(folder / "results.jsonl", rows)
    draw(rows, config, folder / "figure.png")
    text = table(rows)
    atomic_write(folder / "table.md", text.encode())
    print(f"\n{text}\nrows, table and figure  ->  {folder}")
    if stopped:
        sys.exit(STOPPED)


if __name__ == "__main__":
    main(parse(Config, __doc__))
