"""Gold reward against KL: every method of the DPO paper's Figure 2 (left), and the exact optimum.

    python experiments/frontier.py --quick             # one seed of a few settings: 10 minutes
    python experiments/frontier.py                     # `reviews`, all of it: an hour and a half
    python experiments/frontier.py --dataset imdb      # the paper's task: hours, in pieces
    python experiments/frontier.py --grid why          # what keeps each method from the optimum
    python experiments/frontier.py --grid ablation     # what each part of PPO buys
    python experiments/frontier.py --grid best         # each method with its best settings
    python experiments/frontier.py --grid FILE.json    # methods of your own: docs/your_own.md
    python experiments/frontier.py --draw RUN ...      # with these finished runs; nothing is run

(Times are for 2 cores, from nothing.) Every run is a plain command, which is printed as it starts.
Stop it whenever you like: Ctrl-C leaves table and figure of what is finished, and the same command
goes on from there. --print lists what is still to do, for several machines (experiments/sweep.py).

Every policy is evaluated along its training, on held-out prompts. What counts is where the runs of
a setting end: mean KL and mean reward over seeds, each of which draws pairs, labels, reward model
and run anew. The table has policies that ran: of the settings that no mixture of others beats, the
one that ends nearest to each of a few KLs, and the one with the largest reward. They are chosen on
the prompts that they are reported on.

At exactly the same KL methods are compared by interpolation, on the upper concave hull of the ends
and the reference. Its points lie between two policies: whoever draws each response from one of the
two, by chance, has just that mean reward, and at most that mean KL, as KL is convex. So it is never
above what policies that ran can have; it may be too low. It is read between a method's ends only.

Standard errors: the deviation between seeds, pooled over all settings of a method, as three seeds
of one say little; never below the error of the evaluations themselves.

Reads   what the scripts need, built if it is missing
Writes  runs/<dataset>/frontier/ (or frontier-why/, frontier-FILE/, ...): the runs, results.jsonl
        (one row for each evaluation), curve.jsonl (reference, best of n, optimum), table.md,
        frontier.png, frontier.svg
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, for the imports below

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import math
import statistics
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

import evaluate
from common import fail, pipeline
from common.figures import figure
from common.files import atomic_write, check_writable, read_json_object, write_jsonl
from common.run import check_folder
from common.settings import (changed, parse, require, require_numbers, runs_folder, runs_of,
                             settings)
from common.statistics import mean_se
from common.training import Device, use_device
from experiments.grids import GRIDS, drawn_run, methods_of, plan
from experiments.sweep import (STOPPED, PlannedRun, finished_log, is_finished, print_commands,
                               run_all, with_sources)

KLS = (1.0, 2.0, 4.0, 8.0)  # nats near which the table shows policies that ran
NEAR = 1.3  # the largest ratio of two KLs that are still near
BETWEEN = (0.5, 1.0, 2.0, 3.0, 4.0, 8.0)  # nats at which methods are compared, interpolated


@settings
class Config:
    dataset: str = "reviews"  # Task: a folder of data/.
    preset: str = "cpu"  # Kind of machine that the task's sizes are meant for.

    # ---- what is run
    grid: str = "paper"  # paper = every method of the paper's figure; why = what keeps each from
    # the optimum; ablation = what each part of PPO buys; best = each with its best settings; or
    # FILE.json: {method: [command, ...]}.
    draw: tuple[str, ...] = ()  # Run nothing: draw these finished runs beside those of the grid.
    quick: bool = False  # Run one seed of a few settings.
    seeds: int = 3  # Runs of every setting, each with pairs and reward model of its own.
    sft: str = ""  # Run folder of the SFT policy, if not runs/<dataset>/sft.

    # ---- how it is run
    workers: int = 0  # Runs at a time; 0 = one for each core, or one on CUDA.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # Number format of matrix products;
    # auto = bfloat16 on CUDA.
    device: Device = "auto"  # Where it is computed; auto = CUDA where there is one, else the CPU.
    print: bool = False  # Run nothing: print the commands that are still to do, one a line.
    out: str = ""  # Folder of the sweep, if not frontier beside the SFT policy.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="seeds", from_0="workers")
        require(not self.quick or "seeds" not in changed(self),
                "--seeds: not with --quick, which runs one seed")
        require(not self.print or "workers" not in changed(self),
                "--workers: not with --print, which runs nothing")
        require(not self.print or not self.draw, "--draw: not with --print")
        own = Path(self.grid).stem
        require(self.grid in GRIDS or self.grid.endswith(".json") and own not in (*GRIDS, "quick"),
                f"--grid {self.grid}: expected {', '.join(GRIDS)} or FILE.json of another name")
        base = runs_of(self.sft) if self.sft else runs_folder(self.dataset, self.preset)
        name = "frontier" if self.grid == "paper" else f"frontier-{own}"
        self.out = self.out or str(base / (f"{name}-quick" if self.quick else name))


# ---- what the runs have measured -----------------------------------------------------------------

def collect(runs: list[PlannedRun]) -> list[dict]:
    """One row for each evaluation of every run: what was run, and what was measured."""
    rows = []
    for run in runs:
        log = finished_log(run)
        end, evaluations = log[-1], [row for row in log if "eval_reward" in row]
        on_the_way = [row for row in evaluations if row["step"] < end["step"]]
        for evaluation in [*on_the_way, at_the_end(run, evaluations)]:
            measured = {name.removeprefix("eval_"): value for name, value in evaluation.items()
                        if name.startswith("eval_")}
            rows.append({"method": run.method,
                         "setting": run.setting,
                         "seed": run.seed,
                         "step": evaluation["step"],
                         **measured,
                         "beta": getattr(run.config, "beta", None),
                         "lr": run.config.lr,
                         "last": evaluation["step"] == end["step"],
                         "seconds": end["seconds"],
                         "samples": end.get("samples", 0),
                         "reward_calls": end.get("reward_calls", 0)})
    return rows


def at_the_end(run: PlannedRun, evaluations: list[dict]) -> dict:
    """The evaluation at the end of a run, with the means of every prompt. Preferred-FT has written
    no evaluation.json: the last one of its log."""
    path = Path(run.config.out) / "evaluation.json"
    if evaluations and not path.exists():
        return evaluations[-1]
    evaluation = read_json_object(path, "step", "name", "table")
    row = evaluation["table"][evaluation["name"]] | {"per_prompt": evaluation.get("per_prompt")}
    measured = ("reward", "kl", "length", "kl_to_optimum", "per_prompt")
    return {"step": evaluation["step"], **{f"eval_{name}": value for name, value in row.items()
                                           if name.removesuffix("_se") in measured
                                           and value is not None}}


@dataclass
class End:
    """Where the runs of a setting end."""
    setting: str
    rows: list[dict]  # the last evaluation of every seed

    @cached_property
    def kl(self) -> float:
        return statistics.mean(row["kl"] for row in self.rows)

    @cached_property
    def reward(self) -> float:
        return statistics.mean(row["reward"] for row in self.rows)

    @cached_property
    def per_prompt(self) -> np.ndarray | None:
        """Its reward on each prompt (M,), mean over seeds; None where rows do not say it."""
        if not all("per_prompt" in row for row in self.rows):
            return None
        return np.mean([row["per_prompt"]["reward"] for row in self.rows], axis=0)


@dataclass
class Method:
    """What was measured of a method."""
    name: str
    rows: list[dict]
    reference: End  # a row of its own, at a KL of 0

    @cached_property
    def ends(self) -> list[End]:
        found: dict[str, list[dict]] = {}
        for row in self.rows:
            if row["last"]:
                found.setdefault(row["setting"], []).append(row)
        return [End(setting, rows) for setting, rows in found.items()]

    @cached_property
    def error_of_seeds(self) -> float:
        """What an end's reward varies by with the seeds: their standard deviation, pooled over all
        settings, / sqrt(seeds). 0 for one seed, of which nobody knows."""
        squares = sum((row["reward"] - end.reward) ** 2 for end in self.ends for row in end.rows)
        counts = [len(end.rows) for end in self.ends]
        return math.sqrt(squares / max(1, sum(counts) - len(counts)) / min(counts))

    @cached_property
    def error(self) -> float:
        """The standard error of an end's reward: that of the seeds, but not below what the
        evaluations of so many runs have by themselves."""
        own = statistics.mean(row["reward_se"] ** 2 for end in self.ends for row in end.rows)
        return max(self.error_of_seeds, math.sqrt(own / min(len(end.rows) for end in self.ends)))

    @cached_property
    def hull(self) -> list[End]:
        """The ends on the upper concave hull of all ends and the reference, from that on."""
        kept = [self.reference]
        for c in sorted(self.ends, key=lambda end: end.kl):
            while len(kept) > 1:
                a, b = kept[-2:]
                if (b.reward - a.reward) * (c.kl - a.kl) > (c.reward - a.reward) * (b.kl - a.kl):
                    break  # b is above the line from a to c
                kept.pop()
            if c.kl > kept[-1].kl:
                kept.append(c)
        return kept

    def near(self, kl: float) -> End | None:
        """The end on the hull that is nearest to this KL, if one is near."""
        ratios = {max(end.kl / kl, kl / end.kl): end for end in self.hull[1:]}
        return ratios[min(ratios)] if ratios and min(ratios) <= NEAR else None

    def between(self, kl: float) -> list[tuple[float, End]]:
        """The neighbours on the hull, with their weights: a mixture of two policies with at most
        this KL. None below and none beyond the method's own ends."""
        if kl < min(end.kl for end in self.ends):
            return []
        for a, b in zip(self.hull, self.hull[1:]):
            if a.kl <= kl <= b.kl:
                part = (kl - a.kl) / (b.kl - a.kl)
                return [(weight, end) for weight, end in ((1 - part, a), (part, b)) if weight]
        return []


def mixed_reward(mixture: list[tuple[float, End]]) -> float:
    return sum(weight * end.reward for weight, end in mixture)


def difference(one: Method, other: Method, kl: float) -> tuple[float, float] | None:
    """Reward of one method less that of another at this KL, with its standard error; None where one
    of them has no ends on both sides.

    Where the rows have the means of every prompt, the two are paired: an easy prompt is easy for
    both. The error over prompts of the difference then holds what these prompts and responses have
    by chance, but not what training has: its seeds are averaged out. So the errors of both methods'
    seeds are added, in quadrature.
    """
    a, b = one.between(kl), other.between(kl)
    if not a or not b:
        return None
    value = mixed_reward(a) - mixed_reward(b)
    parts = [*a, *((-weight, end) for weight, end in b)]
    if any(end.per_prompt is None for _, end in parts):
        return value, math.hypot(one.error, other.error)
    per_prompt = sum(weight * end.per_prompt for weight, end in parts)
    return value, math.hypot(mean_se(per_prompt)[1], one.error_of_seeds, other.error_of_seeds)


# ---- what policies are measured by ---------------------------------------------------------------

def curve_of(bank: evaluate.Bank) -> list[dict]:
    """The reference, best of n and the optimum, as rows: all that is read off the bank."""
    M, N = bank.rewards.shape
    rows = [{"curve": "reference", "kl": 0.0, "reward": bank.rewards.mean().item(), "prompts": M,
             "responses": N, "per_prompt": {"reward": bank.rewards.mean(1).tolist()}}]
    for n in range(1, N // 4 + 1):  # of more, a bank says too little
        weights = evaluate.best_of_n_weights(bank.rewards, n)
        reward, error = mean_se((weights * bank.rewards).sum(1))
        rows.append({"curve": "best of n", "n": n, "kl": evaluate.best_of_n_kl(n),
                     "reward": reward, "reward_se": error})
    return rows + [{"curve": "optimum", **point} for point in evaluate.optimal_curve(bank.rewards)]


class Scale:
    """By what a reward at a KL is measured: the rows of curve.jsonl."""

    def __init__(self, curve: list[dict]):
        self.optimum = [row for row in curve if row["curve"] == "optimum"]
        self.best_of_n = [row for row in curve if row["curve"] == "best of n"]
        self.reference = End("reference", [row for row in curve if row["curve"] == "reference"])

    def methods(self, rows: list[dict]) -> dict[str, Method]:
        """The methods of these rows, by name."""
        found: dict[str, list[dict]] = {}
        for row in rows:
            found.setdefault(row["method"], []).append(row)
        return {name: Method(name, own, self.reference) for name, own in found.items()}

    def share(self, reward: float, kl: float) -> str:
        """The share of the optimum: 68%, or ≤ 75% where the optimum is known from below only."""
        share, known = evaluate.share_of_optimum(self.optimum, reward, kl, self.reference.reward)
        return f"{'' if known else '≤ '}{share:.0%}"

    def both(self, reward: float, kl: float) -> str:
        """(68%; 41%): share of the optimum and KL efficiency, as far as that is known."""
        efficiency = evaluate.kl_efficiency(self.optimum, reward, kl)
        return f"({self.share(reward, kl)}{'' if efficiency is None else f'; {efficiency:.0%}'})"

    def best_at(self, kl: float) -> str:
        """Best of n, at its own KL, with the largest n whose KL is known to be no larger than this;
        if the bank has it."""
        end = max(self.best_of_n, key=lambda row: (row["kl"] <= kl, row["n"]))
        if end is self.best_of_n[-1]:
            return ""
        reward = number(end["reward"], end["reward_se"], ".3f")
        return f"{reward} at ≤ {end['kl']:.2f} ({self.share(end['reward'], end['kl'])})"

    def optimum_at(self, kl: float) -> str:
        reward, known = evaluate.optimal_reward(self.optimum, kl)
        return f"{'' if known else '≥ '}{reward:.3f}"


# ---- the table -----------------------------------------------------------------------------------

def markdown(rows: list[dict], scale: Scale) -> str:
    """The tables as they stand in results/<dataset>/README.md. Where no method has several settings
    there are no columns for the KLs, and nothing to interpolate."""
    methods = scale.methods(rows)
    several = {name: method for name, method in methods.items() if len(method.ends) > 1}
    kls = KLS if several else ()
    lines = [["", *(f"near {in_nats(kl)}" for kl in kls), "largest reward", "its KL", "length",
              "seconds", "sampled", "scored"]]
    for method in methods.values():
        near = [method.near(kl) for kl in kls]
        cells = [f"{number(end.reward, method.error, '.3f')} at {end.kl:.2f} "
                 f"{scale.both(end.reward, end.kl)}" if end else "" for end in near]
        best = max(method.ends, key=lambda end: end.reward)
        kl = number(*mean_se([row["kl"] for row in best.rows]), ".2f")
        lines.append([method.name, *cells,
                      f"{number(best.reward, method.error, '.3f')} ({best.setting})",
                      f"{kl} {scale.both(best.reward, best.kl)}", *costs(best)])
    if kls:
        lines.append(["best of n", *(scale.best_at(kl) for kl in kls), *[""] * 6])
    end = scale.optimum[-1]
    lines.append(["**optimum**", *(f"{scale.optimum_at(kl)} at {kl:g}" for kl in kls),
                  f"{end['reward']:.3f}", f"{end['kl']:.2f}", *[""] * 4])
    text = ("Where runs end: gold reward, its KL, and in brackets the share of the optimum and the "
            "KL efficiency.\n\n" + as_table(lines))
    if not several:
        return text

    # ---- at exactly a KL
    lines = [["", *(in_nats(kl) for kl in BETWEEN)]]
    for method in several.values():
        mixtures = [(kl, method.between(kl)) for kl in BETWEEN]
        lines.append([method.name, *(
            f"{number(mixed_reward(mixture), method.error, '.3f')} "
            f"({scale.share(mixed_reward(mixture), kl)})" if mixture else ""
            for kl, mixture in mixtures)])
    for other in ("PPO", "PPO-GT"):
        if {"DPO", other} <= several.keys():
            found = [difference(several["DPO"], several[other], kl) for kl in BETWEEN]
            texts = [f"{d[0]:+.3f}{plus_minus(d[1], '.3f')}" if d else "" for d in found]
            lines.append([f"DPO − {other}", *(text.replace("-", "−") for text in texts)])
    lines.append(["**optimum**", *(scale.optimum_at(kl) for kl in BETWEEN)])
    return text + ("\nAt exactly these KLs, interpolated between two policies that ran: what a "
                   "mixture of the two has.\n\n" + as_table(lines))


def as_table(lines: list[list[str]]) -> str:
    """A head and its rows in markdown."""
    head, *others = ["| " + " | ".join(cells) + " |\n" for cells in lines]
    return head + "|---" * len(lines[0]) + "|\n" + "".join(others)


def in_nats(kl: float) -> str:
    return f"{kl:g} nat{'s' if kl != 1 else ''}"


def costs(end: End) -> list[str]:
    """Tokens of a response; seconds (the median: a machine may sleep for a while), responses drawn
    and calls of the reward of one run."""
    seconds = statistics.median(row["seconds"] for row in end.rows)
    length, samples, calls = (statistics.mean(row[name] for row in end.rows)
                              for name in ("length", "samples", "reward_calls"))
    return [f"{length:.1f}", f"{seconds:.0f}", f"{samples:.0f}", f"{calls:.0f}"]


def plus_minus(error: float, form: str) -> str:
    """" ± 0.005"; the KL of one seed has no error."""
    return "" if math.isnan(error) else f" ± {error:{form}}"


def number(value: float, error: float, form: str) -> str:
    """0.739 ± 0.005"""
    return f"{value:{form}}{plus_minus(error, form)}"


# ---- the figure ----------------------------------------------------------------------------------

def draw(rows: list[dict], scale: Scale, dataset: str, folder: Path) -> None:
    """Left: the KLs where the optimum lives. Middle: all of them. Right: what DPO's learning rate
    does, if it was varied. Every evaluation is a dot, every setting's end a marker."""
    rates = learning_rates(rows)
    widths = (5, 5, 3) if rates else (5, 5)
    each = 1.3 * sum(widths) / len(widths)  # inches
    with figure(folder / "frontier.png", len(widths), each, 5.2, ("png", "svg"),
                width_ratios=widths) as (_, axes):
        for axis, limit in zip(axes, (4.0, 1.05 * max(row["kl"] for row in rows))):
            draw_bounds(axis, scale, limit)
            for i, method in enumerate(scale.methods(rows).values()):
                draw_method(axis, method, f"C{i}")
            axis.set(xlabel=r"KL$(\pi \,\|\, \pi_{ref})$, nats per response",
                     xlim=(-0.02 * limit, limit))
        axes[0].set(ylabel="gold reward", title=f"{dataset}: where the optimum lives")
        axes[1].set(title="all evaluations")
        axes[1].legend(loc="lower right")
        if rates:
            draw_learning_rates(axes[2], rates)


def draw_bounds(axis, scale: Scale, limit: float) -> None:
    """The optimum as far as the bank shows it, then the largest reward there is; and best of n."""
    axis.plot([row["kl"] for row in scale.optimum], [row["reward"] for row in scale.optimum],
              color="black", linewidth=2, label=r"optimum $\pi_{ref}\, e^{r/\beta} / Z$")
    axis.plot([scale.optimum[-1]["kl"], limit], [1, 1], ":", color="black", linewidth=1)
    best = [row for row in scale.best_of_n if row["n"] in (1, 2, 4, 8, 16, 32, 64)]
    axis.plot([row["kl"] for row in best], [row["reward"] for row in best], "o--", color="gray",
              markersize=4, label="best of n (bound on its KL)")


def draw_method(axis, method: Method, color: str) -> None:
    """Every evaluation as a dot, the settings' ends as markers with their errors, and the line
    between them that mixtures reach; nothing is read below the first of them."""
    axis.plot([row["kl"] for row in method.rows], [row["reward"] for row in method.rows], ".",
              color=color, markersize=3, alpha=0.25)
    if len(method.ends) > 1:
        axis.plot([end.kl for end in method.hull[1:]], [end.reward for end in method.hull[1:]],
                  color=color, linewidth=1.4)
    axis.errorbar([end.kl for end in method.ends], [end.reward for end in method.ends],
                  method.error, fmt="s", color=color, markersize=6, markeredgecolor="black",
                  markeredgewidth=0.6, capsize=2, label=method.name)


def learning_rates(rows: list[dict]) -> dict[float, dict[float, float]]:
    """beta -> learning rate -> the KL at which DPO's runs end, for each beta with several rates."""
    kls: dict[float, dict[float, list[float]]] = {}
    for row in rows:
        if row["method"] == "DPO" and row["last"]:
            kls.setdefault(row["beta"], {}).setdefault(row["lr"], []).append(row["kl"])
    return {beta: {lr: mean_se(own)[0] for lr, own in sorted(by_lr.items())}
            for beta, by_lr in sorted(kls.items()) if len(by_lr) > 1}


def draw_learning_rates(axis, rates: dict[float, dict[float, float]]) -> None:
    from matplotlib.ticker import NullFormatter
    for beta, by_lr in rates.items():
        axis.plot(list(by_lr), list(by_lr.values()), "o-", label=f"beta {beta:g}")
    axis.set(xscale="log", yscale="log", xlabel="learning rate",
             ylabel="KL at the end, nats per response",
             title="DPO: the learning rate moves the KL, too")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.legend()


# ---- main ----------------------------------------------------------------------------------------

def build(config: Config) -> tuple[evaluate.Bank, list[PlannedRun], list[PlannedRun]]:
    """What all runs share, the runs of the grid, and those to draw beside them; mistakes are named
    before any of it is built."""
    use_device(config.device)
    check_writable(config.out)
    pipeline.require_gold(config.dataset)
    planned = plan(config)
    for run in planned:
        check_folder(run.config)
    drawn = [drawn_run(folder) for folder in config.draw]
    if drawn:
        planned = [run for run in planned if is_finished(run)]
    for run in drawn:
        if [other[:3] for other in [*planned, *drawn]].count(run[:3]) > 1:
            fail(f"--draw {run.config.out}: {run.method}, {run.setting}, seed {run.seed} is there "
                 "twice")
    sft_folder = pipeline.sft_policy(config.sft, config.dataset, config.preset, config.dtype)
    start = pipeline.load(sft_folder, config.dataset, config.preset, config.dtype)
    for run in drawn:
        if start.policy_id not in run.built_from.values():
            fail(f"--draw {run.config.out}: its SFT policy is not that in {start.sft}")
    start.gold = pipeline.gold_reward(start)
    bank = pipeline.sample_bank(start)
    return bank, with_sources(planned, start), drawn


def main(config: Config) -> None:
    """Build what is missing, run what is not finished, and write rows, table and figure."""
    # ---- 1) what all runs share; with --print, stdout is for the commands alone ------------------
    with redirect_stdout(sys.stderr if config.print else sys.stdout):
        bank, planned, drawn = build(config)
    if config.print:
        return print_commands(planned)

    # ---- 2) the runs -----------------------------------------------------------------------------
    folder = Path(config.out)
    runs, stopped = run_all(planned, folder, config.workers)
    if stopped and not runs:
        sys.exit(STOPPED)

    # ---- 3) rows, table, figure; printed when all of it is written -------------------------------
    methods = list(methods_of(config.grid))
    rows = collect([*sorted(runs, key=lambda run: methods.index(run.method)), *drawn])
    curve = curve_of(bank)
    text = markdown(rows, Scale(curve))
    if bank.gold != evaluate.Bank.gold:
        text += f"\nGold reward: {bank.gold}.\n"
    write_jsonl(folder / "results.jsonl", rows)
    write_jsonl(folder / "curve.jsonl", curve)
    atomic_write(folder / "table.md", text.encode())
    draw(rows, Scale(curve), config.dataset, folder)
    print(f"\n{text}\nrows, table and figure  ->  {folder}")
    if stopped:
        sys.exit(STOPPED)


if __name__ == "__main__":
    main(parse(Config, __doc__))
