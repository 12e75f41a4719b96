"""Reward-model scaling (Stiennon et al. 2020, Figure 6): accuracy on held-out pairs against the
number of pairs and the size of the model, on a task whose true reward, and so the best possible
accuracy, is known.

    python experiments/scaling.py           # `posts`: 45 reward models, 75 minutes on one core
    python experiments/scaling.py --quick   # one seed of two sizes, up to 3,000 pairs: five minutes
                                            # on one core, once SFT is trained
    python experiments/scaling.py --pairs FILE --test FILE --dataset tldr      # human comparisons

Every model starts from an SFT policy of its own size, and is a plain `python reward_model.py ...`
that experiments/sweep.py runs (--print lists what is still to do, for several machines). All are
judged by the same held-out pairs, of whose prompts no model has seen any. A set of pairs has whole
prompts, which each seed draws anew; within a seed the larger set begins with the smaller one. (Of
each set reward_model.py keeps a twentieth to itself.) Small sets are passed over several times:
--min-steps.

Accuracy is how often the chosen response has the higher score; equal scores count half. It is
measured twice. Against the labels, which are noisy: the true reward's own accuracy there is the
ceiling, which is drawn. And against the order of the gold reward, where the true reward is always
right; pairs of equal reward are left out.

A prompt is one observation, however many pairs it has. An interval adds the variance over prompts
to that over seeds. The models are judged by the same pairs, so a difference between two of them is
more certain than their intervals say.

Reads   the SFT policy and its pairs, both built if they are missing; or your pairs
Writes  runs/<dataset>/scaling.../ : the sets, the runs, results.jsonl (a row for each run),
        table.md, scaling.png. Other --sizes, --counts or --seeds add runs to the same folder; the
        table is of those that were asked for last.
        runs/<dataset>/sft-.../ : SFT policies of other sizes
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import math
import re
from contextlib import redirect_stdout
from typing import Any, Literal

import numpy as np
import torch

import reward_model
import sft
from common import fail, pipeline, tasks
from common.figures import figure
from common.files import (atomic_write, check_writable, read_json_object, read_jsonl, sha256,
                          write_json, write_jsonl)
from common.pairs import Pair, encode_pairs, pair_tensors, read_pairs, split
from common.rewards import all_scores
from common.run import compare_settings, load_run
from common.settings import changed, parse, require, require_numbers, run_folder, runs_of, settings
from common.statistics import mean_se
from common.tokenizer import Tokenizer
from common.training import Device, generator, half_ties, use_device
from experiments.sweep import STOPPED, PlannedRun, print_commands, run_all
from model import ScalarModel

PEOPLE = (0.73, 0.77)  # how often two people prefer the same summary (Stiennon et al., section 3.3)

Pairs = list[dict]  # rows of a pairs file


@settings
class Config:
    dataset: str = "posts"  # Task: a folder of data/.
    preset: str = "cpu"  # Kind of machine that the task's sizes are meant for.

    # ---- the pairs
    prompts: int = 6400  # Prompts to sample pairs for, six pairs each.
    pairs: str = ""  # A JSON-lines file of your own pairs, in place of sampled ones.
    held_out: int = 1000  # Prompts that are held out with all their pairs: the last ones.
    test: str = ""  # With --pairs: a file of held-out pairs, in place of the last prompts.

    # ---- what is compared
    counts: str = "300,1000,3000,10000,30000"  # Numbers of pairs to train on; at most all.
    sizes: str = ""  # Layers x channels of the models, 1x32,2x128; none = the SFT policy's alone.
    seeds: int = 3  # Runs of each size and count; a seed draws the prompts, the head and the order.
    quick: bool = False  # Compare less: one seed, up to 3,000 pairs, the first and the last size,
    # on the pairs that dpo.py has.

    # ---- optimisation
    epochs: float = 1.0  # Passes over the pairs, at least.
    min_steps: int = 50  # Optimizer steps, at least.
    lr: float = 1e-3  # Peak learning rate.
    block_size: int = 0  # Tokens of prompt and response; 0 = as many as the SFT policy has.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # Number format of matrix products;
    # auto = bfloat16 on CUDA.
    device: Device = "auto"  # Where it is computed; auto = CUDA where there is one, else the CPU.

    # ---- the runs
    sft: str = ""  # Run folder of the SFT policy, if not runs/<dataset>/sft.
    out: str = ""  # Folder of sets, runs and results, if not scaling with the settings that are no
    # defaults.
    workers: int = 0  # Runs side by side; 0 = one for each core, or one on CUDA.
    print: bool = False  # Run nothing: print the commands that are still to do, one a line.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="prompts held_out epochs lr seeds",
                        from_0="min_steps block_size workers")
        require(not self.test or bool(self.pairs), "--test: needs --pairs")
        require(bool(re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.counts)),
                f"--counts {self.counts}: expected numbers, 300,1000")
        size = r"[1-9]\d*x[1-9]\d*"
        require(bool(re.fullmatch(f"({size}(,{size})*)?", self.sizes)),
                f"--sizes {self.sizes}: expected layers x channels, 1x32,2x128")
        # a flag that would be ignored is refused
        for other, ignored in (("pairs", ["prompts"]), ("test", ["held_out"]),
                               ("print", ["workers"]),
                               ("quick", ["prompts", "counts", "sizes", "seeds"])):
            for name in ignored if getattr(self, other) else []:
                flag = "--" + name.replace("_", "-")
                require(name not in changed(self), f"{flag}: not with --{other}")
        self.out = self.out or run_folder(self, "scaling",
                                          never=("workers", "print", "counts", "sizes", "seeds"))
        if self.quick:  # after the folder has its name: that is made of what was typed
            sizes = self.sizes.split(",")
            self.prompts = 0  # as many as the task says
            self.counts = "300,1000,3000"
            self.sizes = ",".join(dict.fromkeys([sizes[0], sizes[-1]]))
            self.seeds = 1


# ---- sets of pairs -------------------------------------------------------------------------------

def hold_out(rows: Pairs, held_out: int, test: Pairs) -> tuple[list[Pairs], list[Pairs]]:
    """The pairs to train on and the held-out pairs, a list a prompt; no prompt is in both.

    Two identical responses are no pair.

    Args:
        held_out: so many prompts, the last in `rows`, are held out, if there are no `test` rows.
    """
    pool, held = by_prompt(rows), by_prompt(test)
    if not test:
        held = {prompt: pool[prompt] for prompt in list(pool)[-held_out:]}
    return [pairs for prompt, pairs in pool.items() if prompt not in held], list(held.values())


def by_prompt(rows: Pairs) -> dict[str, Pairs]:
    found: dict[str, Pairs] = {}
    for row in rows:
        if row["chosen"] != row["rejected"]:
            found.setdefault(row["prompt"], []).append(row)
    return found


def subset(pool: list[Pairs], count: int, seed: int) -> Pairs:
    """`count` pairs or a few more: all those of the first prompts, in an order that depends on the
    seed alone. So the pairs of a larger count begin with those of a smaller one."""
    rows: Pairs = []
    for i in torch.randperm(len(pool), generator=generator(seed, 11)).tolist():
        if len(rows) >= count:
            break
        rows += pool[i]
    return rows


def trained_on(rows: Pairs) -> int:
    """How many of these pairs reward_model.py trains on: the others it holds out itself."""
    numbers = {prompt: i for i, prompt in enumerate(by_prompt(rows))}
    pairs = [Pair([numbers[row["prompt"]]], [], []) for row in rows]  # only prompts matter to split
    return len(split(pairs, draw=True)[0])


# ---- measures ------------------------------------------------------------------------------------

def accuracy(margins: torch.Tensor, prompts: torch.Tensor) -> tuple[float, float]:
    """How often the chosen response scores higher, and its standard error over prompts.

    Args:
        margins: (N,) score of the chosen less that of the rejected response; 0 counts half.
        prompts: (N,) number of each pair's prompt. Pairs of one prompt share responses. With e_p
            the sum of (right - accuracy) over the pairs of prompt p, the variance is
            P / (P - 1) sum_p e_p^2 / N^2: that of a ratio of sums over P prompts.
    """
    right = half_ties(margins, torch.zeros_like(margins)).double()
    which = torch.unique(prompts, return_inverse=True)[1]
    P = int(which.max()) + 1
    errors = torch.zeros(P, dtype=torch.float64).index_add(0, which, right - right.mean())
    if P == 1:
        return right.mean().item(), math.nan
    return right.mean().item(), math.sqrt(errors.square().sum() * P / (P - 1)) / len(margins)


def measure(margins: torch.Tensor, gold: torch.Tensor | None,
            prompts: torch.Tensor) -> dict[str, float]:
    """Accuracy on the labels. Where gold rewards are known and not all equal also that on their
    order, and the ceiling: the true reward's own accuracy on the labels.

    Args:
        margins: (N,) of the model's scores, chosen less rejected.
        gold: (N,) of the gold rewards.
        prompts: (N,) number of each pair's prompt.
    """
    found = {"accuracy": accuracy(margins, prompts)}
    if gold is not None and gold.any():
        ordered = gold != 0
        agreement = margins * gold.sign()  # positive where both order the pair alike
        found["gold_accuracy"] = accuracy(agreement[ordered], prompts[ordered])
        found["ceiling"] = accuracy(gold, prompts)
    row = {}
    for name, (mean, error) in found.items():
        row |= {name: mean, f"{name}_se": error}
    return row


def over_seeds(rows: list[dict], name: str = "accuracy") -> tuple[float, float]:
    """Mean over the runs of one size and count, and its standard error over prompts and seeds."""
    mean, seeds = mean_se([row[name] for row in rows])
    prompts = sum(row[f"{name}_se"] ** 2 for row in rows) / len(rows)  # a variance
    return mean, math.sqrt(prompts + (0 if math.isnan(seeds) else seeds**2))


def doublings(rows: list[dict]) -> dict[str, tuple[float, float]]:
    """What twice the pairs and twice the parameters add to the accuracy: least squares on both
    logarithms, seed by seed; mean and standard error over seeds. Empty where one does not vary."""
    slopes = []  # of pairs and of parameters, for every seed
    for seed in sorted({row["seed"] for row in rows}):
        own = [row for row in rows if row["seed"] == seed]
        x = np.array([[1, math.log2(row["pairs"]), math.log2(row["parameters"])] for row in own])
        y = np.array([row["accuracy"] for row in own])
        if np.linalg.matrix_rank(x) == 3:
            slopes.append(np.linalg.lstsq(x, y, rcond=None)[0][1:])
    if not slopes:
        return {}
    means, errors = mean_se(slopes, axis=0)
    return dict(zip(("pairs", "parameters"), zip(means.tolist(), errors.tolist())))


# ---- the runs ------------------------------------------------------------------------------------

def make_policy(config: Config, start: pipeline.Start, size: str) -> Path:
    """An SFT policy of this size: that of `start`, or one that is trained if it is missing."""
    layers, channels = map(int, size.split("x"))
    own = start.ref.config
    if (layers, channels) == (own.n_layer, own.n_embd):
        return start.sft
    heads = max(n for n in range(1, max(1, channels // 32) + 1) if channels % n == 0)
    # what starts from a policy of the user's goes beside it, as everywhere
    out = str(runs_of(start.sft) / f"sft-{size}") if config.sft else ""
    return pipeline.stage(sft.Config(
        dataset=config.dataset, preset=config.preset, n_layer=layers, n_embd=channels, n_head=heads,
        block_size=own.block_size, dtype=config.dtype, out=out, resume=True))


def check_sizes(config: Config, start: pipeline.Start) -> list[str]:
    """The sizes to compare. Where SFT starts from a pretrained model there is only that one's."""
    own = f"{start.ref.config.n_layer}x{start.ref.config.n_embd}"
    sizes = config.sizes.split(",") if config.sizes else [own]
    pretrained = "sft pretrain" in tasks.load_preset(config.dataset, config.preset).settings
    if pretrained and sizes != [own]:
        fail(f"--sizes {config.sizes}: SFT of data/{config.dataset} starts from a pretrained model "
             f"of {own}, so there is no other size")
    return sizes


def plan(config: Config, policies: dict[str, Path],
         sets: dict[tuple[int, int], tuple[Path, int]]) -> list[PlannedRun]:
    """Every run, in the order of the sets.

    Args:
        policies: size -> run folder of its SFT policy.
        sets: (seed, count) -> the file, and how many of its pairs are trained on.
    """
    planned = []
    for (seed, count), (path, pairs) in sets.items():
        for size, policy in policies.items():
            run = reward_model.Config(
                dataset=config.dataset, preset=config.preset, pairs=str(path), sft=str(policy),
                seed=seed, lr=config.lr, block_size=config.block_size, dtype=config.dtype,
                device=config.device, resume=True,
                out=str(Path(config.out) / f"{size}-{count}-seed{seed}"))
            steps_per_epoch = max(1, pairs // run.batch_size)
            run.epochs = max(config.epochs, config.min_steps / steps_per_epoch)
            planned.append(PlannedRun(size, str(count), seed, run))
    return planned


def result(run: PlannedRun, held: list[Pairs], path: str | Path) -> dict[str, Any]:
    """The row of a finished run, which is kept in its folder as evaluation.json.

    Args:
        held: the held-out pairs of each prompt, rows of the file `path`.
    """
    folder = Path(run.config.out)
    if (folder / "evaluation.json").exists():
        return read_json_object(folder / "evaluation.json")
    model, _ = load_run(folder, ScalarModel)
    tokenizer = Tokenizer.load(folder / "tokenizer.tiktoken")
    rows = [row for pairs in held for row in pairs]
    encoded = encode_pairs(rows, tokenizer, model.config.block_size, path)
    pairs = pair_tensors(encoded, tokenizer.pad)  # (2, N, T): chosen and rejected
    scores = all_scores(model, pairs.tokens.flatten(0, 1), pairs.lengths.flatten(),
                        run.config.dtype)
    chosen, rejected = scores.view(2, -1) * model.std.cpu()  # on the scale of the training loss

    gold = None
    if all({"chosen_reward", "rejected_reward"} <= row.keys() for row in rows):
        gold = torch.tensor([row["chosen_reward"] - row["rejected_reward"] for row in rows])
    prompts = torch.tensor([i for i, own in enumerate(held) for _ in own])
    log = read_jsonl(folder / "log.jsonl", {"step": int})
    row = {"size": run.method, "layers": model.config.n_layer, "channels": model.config.n_embd,
           "parameters": sum(p.numel() for p in model.parameters()), "count": int(run.setting),
           "pairs": len(read_pairs(run.config.pairs)), "seed": run.seed,
           **measure(chosen - rejected, gold, prompts),
           "held_out_loss": reward_model.reward_loss(chosen, rejected).mean().item(),
           "held_out_pairs": len(rows), "steps": log[-1]["step"], "seconds": log[-1]["seconds"]}
    write_json(folder / "evaluation.json", row)
    return row


# ---- table and figure ----------------------------------------------------------------------------

def by_cell(rows: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """(size, count) -> the runs of all seeds; small ones first."""
    cells: dict[tuple[str, int], list[dict]] = {}
    for row in sorted(rows, key=lambda row: (row["parameters"], row["count"], row["seed"])):
        cells.setdefault((row["size"], row["count"]), []).append(row)
    return cells


def markdown(rows: list[dict]) -> str:
    """Accuracy on the labels and, where it is known, on the gold order: a line a size, a column a
    count, an empty cell where no run is finished."""
    text = table(rows, "accuracy", "right about the labels")
    if "ceiling" in rows[0]:
        ceiling = percent(rows[0]["ceiling"], rows[0]["ceiling_se"])
        counts = {row["count"] for row in rows}
        text += "| **the true reward** | " + f" | {ceiling}" * len(counts) + " |\n"
    if "gold_accuracy" in rows[0]:
        text += "\n" + table(rows, "gold_accuracy", "right about the gold order")
    text += "\n"
    for name, (slope, error) in doublings(rows).items():
        interval = "" if math.isnan(error) else f" ± {100 * error:.2f}"
        text += f"Twice the {name}: {100 * slope:+.2f}{interval} points\n"
    return text


def table(rows: list[dict], name: str, title: str) -> str:
    """Head and lines of one of the two."""
    cells = by_cell(rows)
    counts = sorted({count for _, count in cells})
    columns = [f"{title}, %", "parameters", *(f"{count:,} pairs" for count in counts)]
    text = "| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|\n"
    parameters = {own[0]["size"]: own[0]["parameters"] for own in cells.values()}
    for size in parameters:
        values = [percent(*over_seeds(cells[size, count], name)) if (size, count) in cells else ""
                  for count in counts]
        text += f"| {size} | {parameters[size]:,} | " + " | ".join(values) + " |\n"
    return text


def percent(mean: float, error: float) -> str:
    return f"{100 * mean:.1f} ± {100 * error:.1f}"


def draw(rows: list[dict], dataset: str, folder: Path) -> None:
    """Accuracy on the labels. Left: against pairs, a line a size. Right: against parameters, a line
    a count."""
    with figure(folder / "scaling.png", 2, height=4.8, sharey=True) as (_, (left, right)):
        for axis, x, tick, line in ((left, "pairs", "count", "parameters"),
                                    (right, "parameters", "parameters", "count")):
            draw_lines(axis, rows, x, line)
            draw_marks(axis, rows[0], dataset)
            ticks = sorted({row[tick] for row in rows})
            axis.set(xscale="log", xlabel=x)
            axis.set_xticks(ticks, [f"{value:,}" for value in ticks])
            axis.minorticks_off()
            axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.92), reverse=True)
        left.set(ylabel="accuracy on held-out pairs", title=f"{dataset}: more pairs")
        right.set(title="larger models")


def draw_lines(axis, rows: list[dict], x: str, line: str) -> None:
    """Accuracy against the field `x`, a line for each value of the field `line`."""
    import matplotlib.pyplot as plt
    values = sorted({row[line] for row in rows})
    for i, value in enumerate(values):
        cells = [own for own in by_cell(rows).values() if own[0][line] == value]
        means, errors = zip(*(over_seeds(own) for own in cells))
        shade = 0.85 - 0.85 * i / max(1, len(values) - 1)
        axis.errorbar([mean_se([row[x] for row in own])[0] for own in cells], means, errors,
                      fmt="o-", markersize=4, capsize=2, color=plt.get_cmap("viridis")(shade),
                      label=f"{value:,} {'pairs' if line == 'count' else line}")


def draw_marks(axis, row: dict, dataset: str) -> None:
    """Chance, and what can be reached at best: the true reward, or another person."""
    marks = [(0.5, 0.5, "chance")]
    if "ceiling" in row:
        marks.append((row["ceiling"], row["ceiling"], "the true reward"))
    elif dataset == "tldr":
        marks.append((*PEOPLE, "agreement between people"))
    for low, high, name in marks:
        if high > low:
            axis.axhspan(low, high, color="gray", alpha=0.3)
        else:
            axis.axhline(low, color="black", linestyle=":")
        axis.text(0.99, high, name, transform=axis.get_yaxis_transform(), ha="right", va="bottom",
                  fontsize=8)


# ---- main ----------------------------------------------------------------------------------------

def write_sets(config: Config, pool: list[Pairs]) -> dict[tuple[int, int], tuple[Path, int]]:
    """A file for each seed and count: (seed, count) -> the file, and its pairs that are trained on.

    Seed by seed, small sets first: so the runs can be stopped anywhere.
    """
    total = sum(map(len, pool))
    sets = {}
    for seed in range(config.seeds):
        for count in sorted({min(int(count), total) for count in config.counts.split(",")}):
            rows = subset(pool, count, seed)
            file = Path(config.out) / "pairs" / f"{count}-seed{seed}.jsonl"
            if not file.exists():
                write_jsonl(file, ({name: row[name] for name in row if name != "line"}
                                   for row in rows))
            sets[seed, count] = file, trained_on(rows)
    return sets


def build(config: Config) -> tuple[list[PlannedRun], list[Pairs], str]:
    """What all runs share, built if it is missing, and the runs.

    Returns:
        the runs; the held-out pairs of each prompt; the file that these stand in.
    """
    # ---- 1) what can be wrong with the settings shows before hours are spent ---------------------
    use_device(config.device)
    folder = Path(config.out)
    check_writable(folder)
    if not config.pairs:
        pipeline.require_gold(config.dataset)
    rows = read_pairs(config.pairs) if config.pairs else []
    test = read_pairs(config.test) if config.test else []
    made_of = {name: getattr(config, name) for name in (
        "dataset", "preset", "prompts", "held_out", "epochs", "min_steps", "lr", "block_size")}
    advice = "give another folder with --out, or delete this one"
    compare_settings(folder, made_of, None, advice)

    # ---- 2) the SFT policy, and the pairs --------------------------------------------------------
    start = pipeline.load(
        pipeline.sft_policy(config.sft, config.dataset, config.preset, config.dtype),
        config.dataset, config.preset, config.dtype)
    sizes = check_sizes(config, start)
    path = config.pairs
    if not path:
        start.gold = pipeline.gold_reward(start)
        path = str(pipeline.sampled_pairs(start, tasks.load(config.dataset).labels, config.prompts))
        rows = read_pairs(path)
    pool, held = hold_out(rows, config.held_out, test)
    if not pool or not held:
        fail(f"{config.test or path}: {len(held)} prompts are held out, which leaves {len(pool)} "
             "to train on")
    block_size = config.block_size or start.ref.config.block_size
    for file, part in ((path, pool), (config.test or path, held)):
        # a pair that does not fit stops here, with its line
        encode_pairs([row for pairs in part for row in pairs], start.tokenizer, block_size, file)
    built_from = {"policy": start.policy_id, "pairs": sha256(path),
                  "test": sha256(config.test) if test else ""}
    compare_settings(folder, made_of, built_from, advice)
    write_json(folder / "config.json", {**made_of, "built_from": built_from})
    print(f"{sum(map(len, pool)):,} pairs of {len(pool):,} prompts to train on, "
          f"{sum(map(len, held)):,} pairs of {len(held):,} held out")

    # ---- 3) what is to be run --------------------------------------------------------------------
    policies = {size: make_policy(config, start, size) for size in sizes}
    planned = plan(config, policies, write_sets(config, pool))
    planned = [run._replace(built_from=reward_model.built_from(run.config)) for run in planned]
    return planned, held, config.test or path


def main(config: Config) -> None:
    """Build what is missing, run what is not finished, and write rows, table and figure."""
    # ---- 1) what all runs share; with --print, stdout is for the commands alone ------------------
    with redirect_stdout(sys.stderr if config.print else sys.stdout):
        planned, held, held_file = build(config)
    if config.print:
        return print_commands(planned)

    # ---- 2) the runs -----------------------------------------------------------------------------
    folder = Path(config.out)
    finished, stopped = run_all(planned, folder, config.workers)
    if not finished:
        sys.exit(STOPPED)

    # ---- 3) all files first, then the screen -----------------------------------------------------
    results = [result(run, held, held_file) for run in finished]
    text = markdown(results)
    write_jsonl(folder / "results.jsonl", results)
    atomic_write(folder / "table.md", text.encode())
    draw(results, config.dataset, folder)
    print(f"\n{text}rows, table and figure  ->  {folder}")
    if stopped:
        sys.exit(STOPPED)


if __name__ == "__main__":
    main(parse(Config, __doc__))
