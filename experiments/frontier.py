"""Gold reward against KL: every method of the DPO paper's Figure 2 (left), and the exact optimum.

    python experiments/frontier.py --quick             # one seed of a few settings: 10 minutes
    python experiments/frontier.py                     # `reviews`, all of it: an hour and a half
    python experiments/frontier.py --dataset imdb      # the paper's task: hours, in pieces
    python experiments/frontier.py --grid why          # what keeps each method from the optimum
    python experiments/frontier.py --grid ablation     # what each part of PPO buys
    python experiments/frontier.py --grid FILE.json    # methods of your own: docs/your_own.md
    python experiments/frontier.py --draw RUN ...      # with these finished runs; nothing is run

(Times are for 2 cores, from nothing.) Every run is a plain command, which is printed as it starts.
Stop it whenever you like: Ctrl-C leaves table and figure of what is finished, and the same command
goes on from there. --print lists what is still to do, for several machines (experiments/sweep.py).

Every policy is evaluated along its training, on held-out prompts. A run's evaluations, joined by
lines, are its *path*. A method's reward at a given KL is read from the path of every run, where the
path last crosses that KL, and averaged over seeds; the best setting counts. For each seed, the line
from the reference through the ends of the settings (in order of KL) counts as one more setting.
Standard errors are over seeds.

The best setting is chosen on the prompts that it is reported on, so each method looks better by
about one standard error. Of a method with one setting the table has the end of its runs only. A
line of the figure is the best that a method reached at a KL or below it, so it never falls.

Reads   what the scripts need, built if it is missing
Writes  runs/<dataset>/frontier/ (or frontier-why/, frontier-FILE/, ...): the runs, results.jsonl
        (one row for each evaluation), table.md, frontier.png, frontier.svg
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, for the imports below

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import math
import statistics
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Literal, NamedTuple

import evaluate
from common import fail, pipeline
from common.figures import figure
from common.files import atomic_write, check_writable, read_json_object, write_jsonl
from common.run import check_folder
from common.settings import (changed, defaults_of, parse, require, require_numbers, runs_folder,
                             runs_of, settings)
from common.statistics import mean_se
from common.training import Device, use_device
from experiments.grids import GRIDS, drawn_run, methods_of, plan
from experiments.sweep import (STOPPED, PlannedRun, finished_log, is_finished, print_commands,
                               run_all, with_sources)

KLS = (1.0, 2.0, 4.0, 8.0)  # nats at which the table reads every method


@settings
class Config:
    dataset: str = "reviews"  # Task: a folder of data/.
    preset: str = "cpu"  # Kind of machine that the task's sizes are meant for.

    # ---- what is run
    grid: str = "paper"  # paper = every method of the paper's figure; why = what keeps each from
    # the optimum; ablation = what each part of PPO buys; or FILE.json: {method: [command, ...]}.
    draw: tuple[str, ...] = ()  # Run nothing: draw these finished runs beside those of the grid.
    quick: bool = False  # Run one seed of a few settings.
    seeds: int = 3  # Runs of every setting.
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

Paths = dict[str, dict[int, list[dict]]]  # setting -> seed -> the evaluations of one run, in order


def collect(runs: list[PlannedRun]) -> list[dict]:
    """One row for each evaluation of every run: what was run, and what was measured."""
    rows = []
    for run in runs:
        config = run.config
        choice = [name for name in ("dataset", "preset", "on") if hasattr(config, name)]
        usual = defaults_of(type(config), **{name: getattr(config, name) for name in choice})["lr"]
        log = finished_log(run)
        end = log[-1]
        evaluations = [row for row in log if "eval_reward" in row] or [at_the_end(run)]
        for evaluation in evaluations:
            measured = {name.removeprefix("eval_"): value for name, value in evaluation.items()
                        if name.startswith("eval_")}
            rows.append({"method": run.method,
                         "setting": run.setting,
                         "seed": run.seed,
                         "step": evaluation["step"],
                         **measured,
                         "beta": getattr(config, "beta", None),
                         "lr": config.lr,
                         "lr_factor": config.lr / usual,
                         "last": evaluation["step"] == end["step"],
                         "seconds": end["seconds"],
                         "samples": end.get("samples", 0),
                         "reward_calls": end.get("reward_calls", 0)})
    return rows


def at_the_end(run: PlannedRun) -> dict:
    """The evaluation at the end of a run that was not evaluated on its way."""
    path = Path(run.config.out) / "evaluation.json"
    evaluation = read_json_object(path, "step", "name", "table")
    row = evaluation["table"][evaluation["name"]]
    return {"step": evaluation["step"],
            **{f"eval_{name}": value for name, value in row.items()
               if name.removesuffix("_se") in ("reward", "kl", "length")}}


def with_lr_factor(rows: list[dict]) -> list[dict]:
    """Rows as `collect` makes them now. Those of older sweeps have no lr_factor: there, the usual
    learning rate of a method is the one that most of its settings have."""
    lrs = {(row["method"], row["setting"]): row.get("lr") for row in rows}
    usual = {}
    for method in {method for method, _ in lrs}:
        own = [lr for (name, _), lr in lrs.items() if name == method]
        usual[method] = Counter(own).most_common(1)[0][0]
    return [{"lr_factor": row["lr"] / usual[row["method"]], **row} for row in rows]


def by_method(rows: list[dict]) -> dict[str, Paths]:
    """The paths of every run of each method."""
    found: dict[str, Paths] = {}
    for row in with_lr_factor(rows):
        seeds = found.setdefault(row["method"], {}).setdefault(row["setting"], {})
        seeds.setdefault(row["seed"], []).append(row)
    return found


def reward_at(path: list[dict], kl: float) -> float | None:
    """The reward of one run where it last crossed this KL, on the line between the evaluations
    before and after that; None if it never did."""
    for a, b in reversed(list(zip(path, path[1:]))):
        low, high = sorted((a["kl"], b["kl"]))
        if low <= kl <= high and low < high:
            return a["reward"] + (b["reward"] - a["reward"]) * (kl - a["kl"]) / (b["kl"] - a["kl"])
    return None


class Best(NamedTuple):
    """The best setting of a method at some KL."""
    reward: float  # mean over seeds
    se: float  # its standard error; nan for one seed
    setting: str


def best_at(paths: Paths, kl: float) -> Best | None:
    """The best at this KL of all settings whose every seed got there, the line between them too."""
    candidates = {**paths, "between settings": between_settings(paths)}
    found = []
    for setting, seeds in candidates.items():
        rewards = [reward_at(path, kl) for path in seeds.values()]
        if rewards and None not in rewards:
            found.append(Best(*mean_se(rewards), setting))
    return max(found, key=lambda best: best.reward, default=None)


def between_settings(paths: Paths) -> dict[int, list[dict]]:
    """For each seed the line from the reference through the ends of the runs, in order of their KL.

    Runs with another learning rate than the usual one are left out: their ends lie elsewhere.
    """
    points: dict[int, list[dict]] = {}
    for seeds in paths.values():
        for seed, path in seeds.items():
            if path[0]["lr_factor"] == 1:
                points.setdefault(seed, [path[0]]).append(path[-1])
    return {seed: sorted(own, key=lambda row: row["kl"]) for seed, own in points.items()}


def envelope(paths: Paths, kls: list[float]) -> list[tuple[float, Best]]:
    """The best that a method reached at each KL or below it, up to the largest KL that it reached.

    It cannot fall. Read at exactly a KL, the best reward goes up and down with the settings that
    happen to cross there, which is not what the method can do with that much KL.
    """
    line: list[tuple[float, Best]] = []
    for kl in kls:
        best = best_at(paths, kl)
        if best is None:
            continue
        if line and line[-1][1].reward > best.reward:
            best = line[-1][1]
        line.append((kl, best))
    return line


# ---- the table -----------------------------------------------------------------------------------

@dataclass
class Cell:
    """A reward at a KL, and what share that is of the gain that the optimum has there."""
    reward: float
    se: float
    share: float
    share_se: float
    known: bool  # False: the optimum at this KL is known from below only, and the share from above


@dataclass
class Line:
    """A line of the table."""
    kind: Literal["method", "best of n"]
    name: str
    at: dict[float, Cell]  # KL -> the reward there, for a method with several settings
    # of the setting that ends with the largest reward; best of n has none
    setting: str = ""
    end: Cell | None = None
    kl: float = 0.0
    kl_se: float = 0.0
    length: float = 0.0  # tokens of a response
    seconds: float = 0.0  # of one run; the median over seeds, as a machine may sleep for a while
    samples: float = 0.0  # responses that one run draws
    reward_calls: float = 0.0


class Scale:
    """The optimal curve of a bank, by which rewards are measured."""

    def __init__(self, bank: evaluate.Bank):
        self.curve = evaluate.optimal_curve(bank.rewards)
        self.reference = bank.rewards.mean().item()  # reward of the reference policy

    def cell(self, kl: float, reward: float, se: float) -> Cell:
        best, known = evaluate.optimal_reward(self.curve, kl)
        gain = max(best - self.reference, 1e-9)
        return Cell(reward, se, (reward - self.reference) / gain, se / gain, known)


def table(rows: list[dict], bank: evaluate.Bank) -> list[Line]:
    """A line for each method, and one for best of n."""
    scale = Scale(bank)
    lines = [method_line(method, paths, scale) for method, paths in by_method(rows).items()]
    return [*lines, best_of_n_line(bank, scale)]


def method_line(method: str, paths: Paths, scale: Scale) -> Line:
    """Reward and share of the optimum at each of KLS, and where the setting that ends best ends."""
    line = Line("method", method, {})
    if len(paths) > 1:  # a single setting passes KLs for which it was not made
        for kl in KLS:
            if best := best_at(paths, kl):
                line.at[kl] = scale.cell(kl, best.reward, best.se)

    ends = {setting: [path[-1] for path in seeds.values()] for setting, seeds in paths.items()}

    def over_seeds(setting: str, name: str) -> tuple[float, float]:
        return mean_se([row[name] for row in ends[setting]])

    line.setting = max(ends, key=lambda setting: over_seeds(setting, "reward")[0])
    line.kl, line.kl_se = over_seeds(line.setting, "kl")
    line.end = scale.cell(line.kl, *over_seeds(line.setting, "reward"))
    line.seconds = statistics.median(row["seconds"] for row in ends[line.setting])
    for name in ("length", "samples", "reward_calls"):
        setattr(line, name, over_seeds(line.setting, name)[0])
    return line


def best_of_n_line(bank: evaluate.Bank, scale: Scale) -> Line:
    """Best of n at each KL, with the largest n whose KL is known to be no larger."""
    line = Line("best of n", "best of n", {})
    largest = bank.rewards.shape[1] // 4  # of more, a bank says too little
    for kl in KLS:
        fit = [n for n in range(1, largest + 1) if evaluate.best_of_n_kl(n) <= kl]
        if fit and fit[-1] < largest:
            weights = evaluate.best_of_n_weights(bank.rewards, fit[-1])
            per_prompt = (weights * bank.rewards).sum(1)
            line.at[kl] = scale.cell(kl, *mean_se(per_prompt))
    return line


def markdown(lines: list[Line], bank: evaluate.Bank) -> str:
    """The table as it stands in results/<dataset>/README.md. Where no method has several settings
    there are no columns for the KLs, and so no line for best of n."""
    kls = KLS if any(line.at for line in lines if line.kind == "method") else ()
    head = [*(f"at {kl:g} nat{'s' if kl > 1 else ''}" for kl in kls),
            "largest reward", "its KL", "length", "seconds", "sampled", "scored"]
    text = "| | " + " | ".join(head) + " |\n" + "|---" * (1 + len(head)) + "|\n"
    for line in lines:
        at = [f"{number(line.at[kl].reward, line.at[kl].se, '.3f')} {share(line.at[kl])}"
              if kl in line.at else "" for kl in kls]
        if line.kind == "method":
            end = line.end
            text += "| " + " | ".join(
                [line.name, *at,
                 f"{number(end.reward, end.se, '.3f')} ({line.setting})",
                 f"{number(line.kl, line.kl_se, '.2f')} {share(end)}",
                 f"{line.length:.1f}", f"{line.seconds:.0f}",
                 f"{line.samples:.0f}", f"{line.reward_calls:.0f}"]) + " |\n"
        elif kls:
            text += "| " + " | ".join([line.name, *at]) + " | | | | | | |\n"

    curve = evaluate.optimal_curve(bank.rewards)
    optimum = ["**optimum**"]
    for kl in kls:
        reward, known = evaluate.optimal_reward(curve, kl)
        optimum.append(f"{'' if known else '≥ '}{reward:.3f}")
    optimum += [f"{curve[-1]['reward']:.3f}", f"{curve[-1]['kl']:.2f}"]
    return text + "| " + " | ".join(optimum) + " | | | | |\n"


def plus_minus(error: float, form: str) -> str:
    """" ± 0.005"; one seed has no error."""
    return "" if math.isnan(error) else f" ± {error:{form}}"


def number(value: float, error: float, form: str) -> str:
    """0.739 ± 0.005"""
    return f"{value:{form}}{plus_minus(error, form)}"


def share(cell: Cell) -> str:
    """(62% ± 2), or (≤ 75% ± 1) where the optimum is known from below only."""
    bound = "" if cell.known else "≤ "
    return f"({bound}{cell.share:.0%}{plus_minus(100 * cell.share_se, '.0f')})"


def compare(lines: list[Line]) -> str:
    """What the paper claims, DPO above PPO and PPO-GT at every KL, as differences with errors.

    Only methods with several settings have a reward at a KL.
    """
    at = {line.name: line.at for line in lines if line.kind == "method"}
    text = ""
    for other in ("PPO", "PPO-GT"):
        for kl in KLS:
            if kl in at.get("DPO", {}) and kl in at.get(other, {}):
                a, b = at["DPO"][kl], at[other][kl]
                error = plus_minus(math.hypot(a.se, b.se), ".3f")
                text += f"DPO - {other} at {kl:g} nats: {a.reward - b.reward:+.3f}{error}\n"
    return text


# ---- the figure ----------------------------------------------------------------------------------

def draw(rows: list[dict], bank: evaluate.Bank, dataset: str, folder: Path) -> None:
    """Left: the KLs where the optimum lives. Middle: all of them. Right: what DPO's learning rate
    does, if it was varied. Every evaluation is a point."""
    methods = by_method(rows)
    rates = learning_rates(rows)
    widths = (5, 5, 3) if rates else (5, 5)
    each = 1.3 * sum(widths) / len(widths)  # inches
    with figure(folder / "frontier.png", len(widths), each, 5.2, ("png", "svg"),
                width_ratios=widths) as (_, axes):
        for axis, limit in zip(axes, (4.0, 1.05 * max(row["kl"] for row in rows))):
            draw_bounds(axis, bank, limit)
            for i, (method, paths) in enumerate(methods.items()):
                draw_method(axis, method, paths, f"C{i}", limit)
            axis.set(xlabel=r"KL$(\pi \,\|\, \pi_{ref})$, nats per response",
                     xlim=(-0.02 * limit, limit))
        axes[0].set(ylabel="gold reward", title=f"{dataset}: where the optimum lives")
        axes[1].set(title="all evaluations")
        axes[1].legend(loc="lower right")
        if rates:
            draw_learning_rates(axes[2], rates)


def draw_bounds(axis, bank: evaluate.Bank, limit: float) -> None:
    """The optimum as far as the bank shows it, then the largest reward there is; and best of n."""
    curve = evaluate.optimal_curve(bank.rewards)
    axis.plot([p["kl"] for p in curve], [p["reward"] for p in curve], color="black", linewidth=2,
              label=r"optimum $\pi_{ref}\, e^{r/\beta} / Z$")
    axis.plot([curve[-1]["kl"], limit], [1, 1], ":", color="black", linewidth=1)
    kls, rewards = [], []
    for n in (1, 2, 4, 8, 16, 32, 64):
        if n <= bank.rewards.shape[1] // 4:
            weights = evaluate.best_of_n_weights(bank.rewards, n)
            kls.append(evaluate.best_of_n_kl(n))
            rewards.append((weights * bank.rewards).sum(1).mean().item())
    axis.plot(kls, rewards, "o--", color="gray", markersize=4, label="best of n (bound on its KL)")


def draw_method(axis, method: str, paths: Paths, color: str, limit: float) -> None:
    """Every evaluation; and the best setting as a line, with its standard error around it. Of a
    method with one setting the path of every seed, and a square where they end on average."""
    runs = [path for seeds in paths.values() for path in seeds.values()]
    for path in runs:
        axis.plot([row["kl"] for row in path], [row["reward"] for row in path], ".", color=color,
                  markersize=3, alpha=0.35)
    if len(paths) == 1:
        for path in runs:
            axis.plot([row["kl"] for row in path], [row["reward"] for row in path], color=color,
                      linewidth=0.6)
        kl, kl_se = mean_se([path[-1]["kl"] for path in runs])
        reward, reward_se = mean_se([path[-1]["reward"] for path in runs])
        axis.errorbar(kl, reward, reward_se, kl_se, "s", color=color, markersize=7,
                      markeredgecolor="black", label=method)
        return
    line = envelope(paths, [limit * i / 100 for i in range(101)])
    kls = [kl for kl, _ in line]
    axis.plot(kls, [best.reward for _, best in line], color=color, linewidth=1.6,
              label=f"{method}, best setting")
    low = [best.reward - best.se for _, best in line]  # nan for one seed: nothing is filled
    high = [best.reward + best.se for _, best in line]
    axis.fill_between(kls, low, high, color=color, alpha=0.2, linewidth=0)


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
    lines = table(rows, bank)
    text = markdown(lines, bank)
    if bank.gold != evaluate.Bank.gold:
        text += f"\nGold reward: {bank.gold}.\n"
    if differences := compare(lines):
        text += f"\n{differences}"
    write_jsonl(folder / "results.jsonl", rows)
    atomic_write(folder / "table.md", text.encode())
    draw(rows, bank, config.dataset, folder)
    print(f"\n{text}\nrows, table and figure  ->  {folder}")
    if stopped:
        sys.exit(STOPPED)


if __name__ == "__main__":
    main(parse(Config, __doc__))
