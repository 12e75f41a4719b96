"""The figure that was never released: gold reward against KL for every method of the DPO paper's Figure 2 (left), with the
exact optimum above them.

    python experiments/frontier.py --quick                 # one seed of a few settings; 10 minutes on 2 cores, from nothing
    python experiments/frontier.py                         # `reviews`: the whole grid, 3 seeds; an hour and a half on 2 cores
    python experiments/frontier.py --dataset imdb          # the paper's task; hours on a CPU, in pieces: stop it and start it again

Every run is a plain command (`python dpo.py ...`) in a process of its own (sweep.py). Ctrl-C leaves table and figure of what
is finished.

Every policy is evaluated along its training on held-out prompts. A method's reward at a given KL: each run's points are
joined to a path, the path is read where it last crosses that KL, seeds are averaged, and the best setting counts; the line
through the settings' ends counts as one, too. The standard error is over seeds. Choosing the best of several settings on the
prompts it is reported for flatters each method by about a standard error; every method has several.

Reads   what the scripts need, all built if it is missing
Writes  runs/<dataset>/frontier/ : the runs, results.jsonl (one row an evaluation), table.md, frontier.png, frontier.svg
"""
from __future__ import annotations

import math
import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, for the imports below

import dpo
import evaluate
import ppo
import reward_model
import sft
from common.files import atomic_write, read_jsonl, write_jsonl
from common.run import finished
from common.settings import defaults, parse, require_numbers, runs_folder
from common.training import device, fingerprint
from common.pairs import ensure_pairs
from common.tokenizer import Tokenizer
from common.run import load_run
from experiments.sweep import Planned, mean_se, run_all

# steps between evaluations: (imdb or tldr, script)
EVERY = {(False, "sft"): 25, (False, "dpo"): 25, (False, "ppo"): 5, (True, "sft"): 100, (True, "dpo"): 100, (True, "ppo"): 10}
NAMED = ("alpha", "beta", "lr", "target_kl")  # what tells the settings of one method apart
KLS = (1.0, 2.0, 4.0, 8.0)  # nats at which the table reads every method


@dataclass
class Config:
    dataset: str = "reviews"  # a folder of data/
    preset: str = "cpu"  # defaults for a machine: cpu, or gpu (imdb)
    grid: Literal["paper", "why", "ablation"] = "paper"  # paper: every method; why: what keeps each from the optimum;
    # ablation: what each part of PPO buys
    quick: bool = False  # one seed of a few settings
    seeds: int = 3  # runs of every setting
    workers: int = 0  # runs side by side; 0 = one for each core, or one on CUDA
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products; auto = bfloat16 on CUDA only
    sft: str = ""  # run folder of the SFT policy, if not runs/<dataset>/sft
    out: str = ""  # folder of the sweep, if not frontier beside the SFT policy

    PRESETS: ClassVar[dict] = {("imdb", "cpu"): dict(seeds=1), ("imdb", "gpu"): dict(seeds=3)}

    def __post_init__(self) -> None:
        require_numbers(self, above_0="seeds", from_0="workers")
        base = Path(self.sft).parent if self.sft else runs_folder(self.dataset, self.preset)
        name = "frontier" if self.grid == "paper" else f"frontier-{self.grid}"
        self.out = self.out or str(base / (f"{name}-quick" if self.quick else name))


# The paper's grid (section 6.1): beta of DPO, alpha of Unlikelihood, target KL of PPO; extended downwards, to where the
# optimum lives. DPO's learning rate moves the KL as much as beta does, so it is in the grid, too, as multiples of the
# preset's. PPO's first beta is near the one that gives its target in the end. What stands last is what --quick runs.
PPO_TARGETS = [dict(target_kl=k, beta=round(0.4 / k**0.7, 3)) for k in (1, 2, 3, 6, 9, 12)]
PAPER = {
    "Preferred-FT": (sft, [dict()], [dict()]),
    "Unlikelihood": (dpo, [dict(loss="unlikelihood", alpha=a) for a in (0.05, 0.1, 0.5, 1.0)],
                     [dict(loss="unlikelihood", alpha=0.5)]),
    "DPO": (dpo, [*(dict(beta=b) for b in (0.05, 0.1, 0.3, 1.0, 5.0)),
                  *(dict(beta=b, lr=x) for b in (0.1, 1.0) for x in (0.25, 4.0))],
            [dict(beta=b) for b in (0.1, 1.0)]),
    "PPO": (ppo, [dict(reward="model", **t) for t in PPO_TARGETS], [dict(reward="model", **t) for t in PPO_TARGETS[2:3]]),
    "PPO-GT": (ppo, [dict(reward="gold", **t) for t in PPO_TARGETS], [dict(reward="gold", **t) for t in PPO_TARGETS[2:3]]),
}
# Why the others fall short of PPO-GT: one difference at a time. More pairs; labels without noise; the same pairs through a
# reward model, so that the responses are the policy's own.
MORE = 16_000  # prompts, ten times as many as the preset's
WHY = {
    "DPO": (dpo, [dict(beta=0.5)], [dict(beta=0.5)]),
    "DPO, 10x pairs": (dpo, [dict(beta=0.5, prompts=MORE, evaluate_every=250)], []),
    "DPO, noise-free labels": (dpo, [dict(beta=0.5, labels="argmax")], [dict(beta=0.5, labels="argmax")]),
    "PPO": (ppo, [dict(beta=0.15)], [dict(beta=0.15)]),
    "PPO, 10x pairs": (ppo, [dict(beta=0.15, prompts=MORE)], []),
    "PPO-GT": (ppo, [dict(beta=0.15, reward="gold")], [dict(beta=0.15, reward="gold")]),
}
# What each part of PPO buys, on the gold reward: from REINFORCE with a baseline, one part after the other.
GT = dict(beta=0.15, reward="gold")
ABLATION = {
    "REINFORCE, leave-one-out": (ppo, [dict(**GT, advantages="leave-one-out", samples=4, epochs=1)], []),
    "REINFORCE, value network": (ppo, [dict(**GT, epochs=1)], []),
    "PPO": (ppo, [GT], [GT]),
    "PPO, no clipping": (ppo, [dict(**GT, clip=1e6, value_clip=1e6)], []),
    "PPO, lam 0.95": (ppo, [dict(**GT, lam=0.95)], []),
    "PPO, 4 epochs": (ppo, [dict(**GT, epochs=4)], []),
}
GRIDS = {"paper": PAPER, "why": WHY, "ablation": ABLATION}


def plan(config: Config, base: Path) -> list[Planned]:
    """Every run of the sweep, in an order that can be stopped anywhere: the first seed first, of it what --quick runs, and
    then a setting of each method in turn."""
    methods = GRIDS[config.grid].items()
    order = [(method, module, settings) for method, (module, _, quick) in methods for settings in quick]
    if not config.quick:
        left = [[(method, module, settings) for settings in whole if settings not in quick]
                for method, (module, whole, quick) in methods]
        order += [one for turn in zip_longest(*left) for one in turn if one]
    planned = []
    for seed in range(1 if config.quick else config.seeds):
        for method, module, settings in order:
            if "lr" in settings:
                settings = settings | {"lr": settings["lr"] * defaults(module.Config, config.dataset, config.preset).lr}
            setting = ", ".join(f"{name.replace('_', ' ')} {settings[name]:g}" for name in NAMED if name in settings
                                and not (name == "beta" and "target_kl" in settings)) or "default"
            folder = Path(config.out) / f"{method}-{setting}-seed{seed}".lower().replace(", ", "-").replace(" ", "")
            pairs = defaults(dpo.Config, config.dataset, config.preset).labels
            more = dict(sft=config.sft) if module is not sft else dict(
                on="chosen", init=config.sft or str(base / "sft"), pairs=str(base / f"pairs-{pairs}" / "pairs.jsonl"))
            settings = {"evaluate_every": EVERY[config.dataset in ("imdb", "tldr"), module.__name__], **settings, **more,
                        "seed": seed, "dtype": config.dtype, "resume": True, "out": str(folder)}
            planned.append(Planned(method, setting, seed, module.__name__,
                                   defaults(module.Config, config.dataset, config.preset, **settings)))
    return planned


# ---- what came of it ---------------------------------------------------------------------------------------------------

def collect(planned: list[Planned]) -> list[dict]:
    """One row an evaluation of every run: method, setting, seed, step, and what was measured."""
    rows = []
    for run in planned:
        log = read_jsonl(Path(run.config.out) / "log.jsonl", {"step": int})
        cost = next(row for row in reversed(log) if "seconds" in row)
        rows += [{"method": run.method, "setting": run.setting, "seed": run.seed, "step": row["step"],
                  **{name.removeprefix("eval_"): value for name, value in row.items() if name.startswith("eval_")},
                  **{name: getattr(run.config, name, None) for name in ("beta", "lr")},
                  "last": row["step"] == cost["step"], "seconds": cost["seconds"], "samples": cost.get("samples", 0),
                  "reward_calls": cost.get("reward_calls", 0)} for row in log if "eval_reward" in row]
    return rows


def reward_at(path: list[dict], kl: float) -> float | None:
    """The reward of one run at this KL: on the line between the two evaluations between which it was last crossed."""
    for a, b in reversed(list(zip(path, path[1:]))):
        if min(a["kl"], b["kl"]) <= kl <= max(a["kl"], b["kl"]) and a["kl"] != b["kl"]:
            return a["reward"] + (b["reward"] - a["reward"]) * (kl - a["kl"]) / (b["kl"] - a["kl"])
    return None


def best_at(runs: dict[str, dict[int, list[dict]]], kl: float) -> tuple[float, float, str] | None:
    """Reward at this KL, its standard error over seeds, and the setting: the best of those whose every seed got there.

    Beside the settings' own paths there is, for each seed, the line from the reference through the settings' ends.
    """
    found, ends = [], {}
    for paths in (paths for setting, paths in runs.items() if "lr" not in setting):
        for seed, path in paths.items():
            ends.setdefault(seed, [path[0]]).append(path[-1])
    between = {seed: sorted(rows, key=lambda row: row["kl"]) for seed, rows in ends.items()}
    for setting, paths in [*runs.items(), ("between settings", between)]:
        values = [reward_at(path, kl) for path in paths.values()]
        if values and None not in values:
            found.append((*mean_se(values), setting))
    return max(found, default=None)


def by_run(rows: list[dict]) -> dict[str, dict[str, dict[int, list[dict]]]]:
    """rows[method][setting][seed] = the evaluations of one run, in order."""
    runs: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        runs[row["method"]][row["setting"]][row["seed"]].append(row)
    return runs


def table(rows: list[dict], bank: evaluate.Bank) -> list[dict]:
    """A row a method: reward and share of the optimum at each of KLS and at the end of the setting with the largest reward,
    whose length and cost it gives, too."""
    curve, ref_reward = evaluate.frontier(bank.rewards), bank.rewards.mean().item()
    lines = []

    def at(kl: float, reward: float, error: float, setting: str) -> dict[str, Any]:
        best, known = evaluate.optimal_reward(curve, kl)
        gain = max(best - ref_reward, 1e-9)
        return {"reward": reward, "se": error, "setting": setting, "share": (reward - ref_reward) / gain,
                "share_se": error / gain, "known": known}

    for method, runs in by_run(rows).items():
        line: dict[str, Any] = {"method": method}
        for kl in KLS:
            if best := best_at(runs, kl):
                line[f"at {kl:g}"] = at(kl, *best)
        ends = {setting: [path[-1] for path in paths.values()] for setting, paths in runs.items()}
        setting = max(ends, key=lambda s: mean_se([row["reward"] for row in ends[s]])[0])
        for name in ("reward", "kl", "length", "seconds", "samples", "reward_calls"):
            line[name], line[f"{name}_se"] = mean_se([row[name] for row in ends[setting]])
        lines.append(line | {"setting": setting, "end": at(line["kl"], line["reward"], line["reward_se"], setting)})
    # best of n: the reward at a KL no larger than its bound, which the bank gives for every n
    N = bank.rewards.shape[1]
    line = {"method": "best of n"}
    for kl in KLS:
        n = max((n for n in range(1, N // 4 + 1) if evaluate.best_of_n_kl(n) <= kl), default=1)
        if n < N // 4:
            per_prompt = (evaluate.best_of_n_weights(bank.rewards, n) * bank.rewards).sum(1)
            line[f"at {kl:g}"] = at(kl, *evaluate.mean_and_error(per_prompt), f"n = {n}")
    return lines + [line]


def markdown(lines: list[dict], bank: evaluate.Bank) -> str:
    """The table as it stands in the README."""
    def number(value: float, error: float, form: str) -> str:
        return f"{value:{form}}" + ("" if math.isnan(error) else f" ± {error:{form}}")

    def share(at: dict) -> str:
        error = "" if math.isnan(at["share_se"]) else f" ± {100 * at['share_se']:.0f}"
        return f"({'' if at['known'] else '≤ '}{at['share']:.0%}{error})"

    def cell(line: dict, kl: float) -> str:
        at = line.get(f"at {kl:g}")
        return f"{number(at['reward'], at['se'], '.3f')} {share(at)}" if at else ""

    curve = evaluate.frontier(bank.rewards)
    optimum = [evaluate.optimal_reward(curve, kl) for kl in KLS]
    text = ("| | " + " | ".join(f"at {kl:g} nat{'s' if kl > 1 else ''}" for kl in KLS)
            + " | largest reward | its KL | length | seconds | sampled | scored |\n" + "|---" * (len(KLS) + 7) + "|\n")
    for line in lines:
        text += f"| {line['method']} | " + " | ".join(cell(line, kl) for kl in KLS)
        if "reward" in line:
            text += (f" | {number(line['reward'], line['reward_se'], '.3f')} ({line['setting']}) | "
                     f"{number(line['kl'], line['kl_se'], '.2f')} {share(line['end'])} | {line['length']:.1f} | {line['seconds']:.0f} | "
                     f"{line['samples']:.0f} | {line['reward_calls']:.0f} |\n")
        else:
            text += " | | | | | | |\n"
    text += "| **optimum** | " + " | ".join(f"{'' if known else '≥ '}{reward:.3f}" for reward, known in optimum)
    return text + f" | {curve[-1]['reward']:.3f} | {curve[-1]['kl']:.2f} | | | | |\n"


def compare(lines: list[dict]) -> str:
    """The paper's claim, DPO above PPO and PPO-GT at every KL, beside what was measured: the difference and its error."""
    at = {line["method"]: line for line in lines}
    text = ""
    for other in ("PPO", "PPO-GT"):
        for kl in KLS:
            a, b = (at.get(method, {}).get(f"at {kl:g}") for method in ("DPO", other))
            if a and b:
                error = math.hypot(a["se"], b["se"])
                text += (f"DPO - {other} at {kl:g} nats: {a['reward'] - b['reward']:+.3f}"
                         + ("" if math.isnan(error) else f" ± {error:.3f}") + "\n")
    return text


def draw(rows: list[dict], bank: evaluate.Bank, dataset: str, folder: Path) -> None:
    """Left: the KLs where the optimum lives. Right: all of them. Every evaluation is a point, a method's best a line; of a
    method with one setting the end is a square."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    curve, runs = evaluate.frontier(bank.rewards), by_run(rows)
    colors = {method: plt.get_cmap("tab10")(i % 10) for i, method in enumerate(runs)}
    ends = defaultdict(lambda: defaultdict(list))  # beta -> learning rate -> the KLs at which DPO's runs end
    for row in rows:
        if row["method"] == "DPO" and row["last"]:
            ends[row["beta"]][row["lr"]].append(row["kl"])
    ends = {beta: by_lr for beta, by_lr in sorted(ends.items()) if len(by_lr) > 1}
    widths = (5, 5, 3) if ends else (5, 5)
    figure, axes = plt.subplots(1, len(widths), figsize=(1.3 * sum(widths), 5.2), layout="constrained", width_ratios=widths)
    best = [(evaluate.best_of_n_kl(n), (evaluate.best_of_n_weights(bank.rewards, n) * bank.rewards).sum(1).mean().item())
            for n in (1, 2, 4, 8, 16, 32, 64) if n <= bank.rewards.shape[1] // 4]
    for axis, limit in zip(axes[:2], (4.0, 1.05 * max(row["kl"] for row in rows))):
        axis.plot([p["kl"] for p in curve], [p["reward"] for p in curve], color="black", linewidth=2,
                  label=r"optimum $\pi_{ref}\, e^{r/\beta} / Z$")
        axis.plot([curve[-1]["kl"], limit], [1, 1], ":", color="black", linewidth=1)
        axis.plot(*zip(*best), "o--", color="gray", markersize=4, label="best of n (bound on its KL)")
        for method, settings in runs.items():
            points = [row for row in rows if row["method"] == method]
            axis.plot([p["kl"] for p in points], [p["reward"] for p in points], ".", color=colors[method], markersize=3,
                      alpha=0.35)
            if len(settings) == 1:  # no best of several: where each seed went, and where they ended
                paths = next(iter(settings.values())).values()
                for path in paths:
                    axis.plot([p["kl"] for p in path], [p["reward"] for p in path], color=colors[method], linewidth=0.6)
                (x, dx), (y, dy) = (mean_se([path[-1][name] for path in paths]) for name in ("kl", "reward"))
                axis.errorbar(x, y, dy, dx, "s", color=colors[method], markersize=7, markeredgecolor="black", label=method)
                continue
            grid = [limit * i / 100 for i in range(101)]
            line = [(kl, *found[:2]) for kl in grid if (found := best_at(settings, kl))]
            if line:
                kl, reward, error = (torch.tensor(x) for x in zip(*line))
                axis.plot(kl, reward, color=colors[method], linewidth=1.6, label=method)
                if not error.isnan().any():
                    axis.fill_between(kl, reward - error, reward + error, color=colors[method], alpha=0.2, linewidth=0)
        axis.set(xlabel=r"KL$(\pi \,\|\, \pi_{ref})$, nats per response", xlim=(-0.02 * limit, limit))
    axes[0].set(ylabel="gold reward", title=f"{dataset}: where the optimum lives")
    axes[1].set(title="all evaluations")
    axes[1].legend(loc="lower right")
    for beta, by_lr in ends.items():
        axes[2].plot(*zip(*((lr, sum(kls) / len(kls)) for lr, kls in sorted(by_lr.items()))), "o-", label=f"beta {beta:g}")
    if ends:
        axes[2].set(xscale="log", yscale="log", xlabel="learning rate", ylabel="KL at the end, nats per response",
                    title="DPO: the learning rate moves the KL, too")
        axes[2].xaxis.set_minor_formatter(plt.NullFormatter())
        axes[2].legend()
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"frontier.{suffix}", dpi=150)
    plt.close(figure)


def main(config: Config) -> None:
    """Build what is missing, run what is not finished, and write rows, table and figure."""
    # ---- 1) what all runs share, so that no two of them build it at once -----------------------------------------------
    sft_folder = sft.ensure(config.sft, config.dataset, config.preset, config.dtype)
    base = sft_folder.parent
    planned = plan(config, base)
    ref, _ = load_run(sft_folder)
    tokenizer, weights = Tokenizer.load(sft_folder / "tokenizer.tiktoken"), fingerprint(ref.state_dict())
    gold = reward_model.ensure_gold(sft_folder, config.dataset, config.preset, config.dtype)
    for run in planned:
        if run.script != "ppo":
            labels = getattr(run.config, "labels", defaults(dpo.Config, config.dataset, config.preset).labels)
            ensure_pairs(base, config.dataset, config.preset, labels, ref, tokenizer, weights, gold,
                         getattr(run.config, "prompts", 0))
        elif run.config.reward == "model":
            ppo.learned_reward(run.config)
    bank = evaluate.ensure_bank(base, config.dataset, config.preset, ref, tokenizer, weights, gold)

    # ---- 2) the runs -------------------------------------------------------------------------------------------------
    folder = Path(config.out)
    stopped = False
    try:
        run_all(planned, config.workers or (1 if device().type == "cuda" else os.cpu_count() or 1), folder, weights)
    except KeyboardInterrupt:  # hours of work may be there
        there = [run for run in planned if finished(run.config)]
        if not there:
            raise
        print(f"\nstopped: table and figure are of the {len(there)} of {len(planned)} runs that are finished")
        planned, stopped = there, True

    # ---- 3) rows, table, figure --------------------------------------------------------------------------------------
    methods = list(GRIDS[config.grid])
    rows = collect(sorted(planned, key=lambda run: methods.index(run.method)))
    write_jsonl(folder / "results.jsonl", rows)
    lines = table(rows, bank)
    text = markdown(lines, bank)
    text += f"\nGold reward: {bank.gold}.\n" if bank.gold != evaluate.Bank.gold else ""
    atomic_write(folder / "table.md", (text + "\n" + compare(lines)).encode())
    print(f"\n{text}\n{compare(lines)}")
    draw(rows, bank, config.dataset, folder)
    print(f"rows, table and figure  ->  {folder}")
    if stopped:
        sys.exit(130)


if __name__ == "__main__":
    main(parse(Config, __doc__))
