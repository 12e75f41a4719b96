"""Reward-model scaling (Stiennon et al. 2020, Figure 6): accuracy on held-out pairs against the number of preference pairs
and the size of the model, on a task whose true reward, and so the best possible accuracy, is known.

    python experiments/scaling.py                      # `posts`: 45 reward models; from nothing some 75 minutes of one core
    python experiments/scaling.py --quick              # one seed of two sizes, up to 3,000 pairs; five minutes of one core, plus SFT
    python experiments/scaling.py --pairs FILE --test FILE --dataset tldr     # human comparisons, as far as they reach

Every model starts from an SFT policy of its own size and is a plain `python reward_model.py ...`, run as sweep.py does: one
for each core, a finished one never again. All are judged by the same held-out pairs, of whose prompts no model has seen any.
A set of pairs has whole prompts, which each seed draws anew; within a seed the larger set begins with the smaller. (Of each
set reward_model.py keeps the last twentieth to itself.) Small sets are passed over several times: --min-steps.

Accuracy is how often the chosen response scores higher, equal scores counting half: against the labels, which are noisy, and
against the order of the gold reward, where pairs of equal reward are left out. The true reward has 1 in the second; what it
has in the first is the ceiling, which is drawn. A prompt is one observation, however many pairs it has. An interval adds the
variance over prompts to that over seeds; models, as they are judged by the same pairs, differ more surely than it says.

Reads   what reward_model.py needs, all built if it is missing
Writes  runs/<dataset>/scaling/ : the sets, the runs, results.jsonl (one row a run), table.md, scaling.png
"""
from __future__ import annotations

import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, for the imports below

import evaluate
import reward_model
import sft
from common import fail
from common.files import atomic_write, read_json, read_jsonl, sha256, write_json, write_jsonl
from common.run import compare_settings, finished
from common.settings import defaults, parse, require, require_numbers, runs_folder
from common.training import device, fingerprint, generator, pad
from common.pairs import encode_pairs, ensure_pairs, read_pairs
from common.tokenizer import Tokenizer
from common.run import load_run
from model import GPTConfig, ScalarModel
from experiments.sweep import Planned, mean_se, run_all

PEOPLE = (0.73, 0.77)  # how often two people prefer the same summary (Stiennon et al. 2020, section 3.3)


@dataclass
class Config:
    dataset: str = "posts"  # a folder of data/
    preset: str = "cpu"  # defaults for a machine
    pairs: str = ""  # your own pairs, a JSON-lines file, in place of sampled ones
    test: str = ""  # with --pairs: a file of held-out pairs, in place of the last prompts of the other
    prompts: int = 6400  # prompts to sample pairs for, six pairs each
    held_out: int = 1000  # so many prompts, the last, are held out
    counts: str = "300,1000,3000,10000,30000"  # pairs to train on; a count beyond what is there is all there is
    sizes: str = ""  # layers x channels of the models: 1x32,2x128; if not that of the SFT policy alone
    epochs: float = 1.0  # passes over the pairs, at least
    min_steps: int = 50  # optimizer steps, at least
    lr: float = 1e-3  # peak learning rate
    block_size: int = 0  # tokens of prompt and response; 0 = as many as the SFT policy has
    seeds: int = 3  # runs of every size and count; a seed draws the prompts, the initial head and the order
    quick: bool = False  # one seed, counts up to 3,000, the first and the last size; the pairs that dpo.py has
    workers: int = 0  # runs side by side; 0 = one for each core, or one on CUDA
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products; auto = bfloat16 on CUDA only
    sft: str = ""  # run folder of the SFT policy, if not runs/<dataset>/sft; those of the other sizes go beside it
    out: str = ""  # folder of the sweep, if not scaling beside the SFT policy

    PRESETS: ClassVar[dict] = {("posts", "cpu"): dict(sizes="1x32,2x64,2x128")}

    def __post_init__(self) -> None:
        require_numbers(self, above_0="prompts held_out epochs lr seeds", from_0="min_steps block_size workers")
        require(not self.test or bool(self.pairs), "--test: needs --pairs")
        require(bool(re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.counts)), f"--counts {self.counts}: expected numbers, 300,1000")
        require(bool(re.fullmatch(r"(\d+x\d+(,\d+x\d+)*)?", self.sizes)),
                f"--sizes {self.sizes}: expected layers x channels, 1x32,2x128")
        base = Path(self.sft).parent if self.sft else runs_folder(self.dataset, self.preset)
        self.out = self.out or str(base / ("scaling-quick" if self.quick else "scaling"))


# ---- sets of pairs -----------------------------------------------------------------------------------------------------

def split(rows: list[dict], held_out: int, test: list[dict]) -> tuple[list[list[dict]], list[list[dict]]]:
    """The pairs to train on and the held-out pairs, a list a prompt; no prompt is in both. Identical responses are no pair.

    Args:
        held_out: so many prompts, the last in `rows`, are held out, if there are no `test` rows.
    """
    pool, held = {}, {}
    for part, some in ((pool, rows), (held, test)):
        for row in some:
            if row["chosen"] != row["rejected"]:
                part.setdefault(row["prompt"], []).append(row)
    held = held if test else {prompt: pool[prompt] for prompt in list(pool)[-held_out:]}
    return [pairs for prompt, pairs in pool.items() if prompt not in held], list(held.values())


def subset(pool: list[list[dict]], count: int, seed: int) -> list[dict]:
    """`count` pairs or a few more: all those of the first prompts, in an order that depends on the seed alone. So the pairs
    of a larger count begin with those of a smaller one."""
    rows: list[dict] = []
    for i in torch.randperm(len(pool), generator=generator(seed, 11)).tolist():
        if len(rows) >= count:
            break
        rows += pool[i]
    return rows


# ---- measures ----------------------------------------------------------------------------------------------------------

def accuracy(margins: torch.Tensor, prompts: torch.Tensor) -> tuple[float, float]:
    """How often the chosen response scores higher, and its standard error over prompts.

    Args:
        margins: (N,) score of the chosen less that of the rejected response; 0 counts half.
        prompts: (N,) number of each pair's prompt. Pairs of one prompt share responses. With e_p the sum of right - accuracy
            over those of prompt p, the variance is P / (P - 1) sum_p e_p^2 / N^2: that of a ratio of sums over P prompts.
    """
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    which = torch.unique(prompts, return_inverse=True)[1]
    errors = torch.zeros(int(which.max()) + 1, dtype=torch.float64).index_add(0, which, right - right.mean())
    P = len(errors)
    return right.mean().item(), math.sqrt(errors.square().sum() * P / (P - 1)) / len(margins) if P > 1 else math.nan


def measure(margins: torch.Tensor, gold: torch.Tensor | None, prompts: torch.Tensor) -> dict[str, float]:
    """Accuracy on the labels; where gold rewards are known, that on their order, and the true reward's on the labels.

    Args: margins of the model and of the gold reward, chosen less rejected, and the number of each pair's prompt; all (N,).
    """
    found = {"accuracy": accuracy(margins, prompts)}
    if gold is not None:
        ordered = gold != 0
        found["gold_accuracy"] = accuracy((margins * gold.sign())[ordered], prompts[ordered])
        found["ceiling"] = accuracy(gold, prompts)
    return {name + end: value for name, pair in found.items() for end, value in zip(("", "_se"), pair)}


def over_seeds(rows: list[dict], name: str = "accuracy") -> tuple[float, float]:
    """Mean over the runs of one size and count, and its standard error, of prompts and of seeds."""
    mean, seeds = mean_se([row[name] for row in rows])
    prompts = sum(row[f"{name}_se"] ** 2 for row in rows) / len(rows)
    return mean, math.sqrt(prompts + (0 if math.isnan(seeds) else seeds**2))


def doublings(rows: list[dict]) -> dict[str, tuple[float, float]]:
    """What twice the pairs and twice the parameters add to the accuracy: least squares on both logarithms, seed by seed; mean
    and standard error over seeds. Empty where one of them does not vary."""
    slopes = []
    for seed in sorted({row["seed"] for row in rows}):
        own = [row for row in rows if row["seed"] == seed]
        x = torch.tensor([[1, math.log2(row["pairs"]), math.log2(row["parameters"])] for row in own], dtype=torch.float64)
        if torch.linalg.matrix_rank(x) == 3:
            y = torch.tensor([row["accuracy"] for row in own], dtype=torch.float64)
            slopes.append(torch.linalg.lstsq(x, y[:, None]).solution[1:, 0].tolist())
    return {name: mean_se(list(values)) for name, values in zip(("pairs", "parameters"), zip(*slopes))}


# ---- the runs ----------------------------------------------------------------------------------------------------------

def ensure_policy(config: Config, sft_folder: Path, own: GPTConfig, size: str) -> Path:
    """An SFT policy of this size: that in `sft_folder`, whose size is `own`, or one beside it, trained if it is missing."""
    layers, channels = map(int, size.split("x"))
    if (layers, channels) == (own.n_layer, own.n_embd):
        return sft_folder
    policy = defaults(sft.Config, config.dataset, config.preset, n_layer=layers, n_embd=channels, n_head=max(1, channels // 32),
                      block_size=own.block_size, dtype=config.dtype, resume=True, out=str(sft_folder.parent / f"sft-{size}"))
    return Path(policy.out) if finished(policy) else sft.train(policy)


def plan(config: Config, policies: dict[str, Path], sets: dict[tuple[int, int], tuple[Path, int]]) -> list[Planned]:
    """Every run, in the order of the sets.

    Args:
        policies: size -> run folder of its SFT policy.
        sets: (seed, count) -> the file, and how many pairs it has.
    """
    planned = []
    for (seed, count), (path, pairs) in sets.items():
        for size, policy in policies.items():
            run = defaults(reward_model.Config, config.dataset, config.preset, pairs=str(path), sft=str(policy), seed=seed,
                           lr=config.lr, block_size=config.block_size, dtype=config.dtype, resume=True,
                           out=str(Path(config.out) / f"{size}-{count}-seed{seed}"))
            run.epochs = max(config.epochs, config.min_steps / max(1, (pairs - pairs // 20) // run.batch_size))
            planned.append(Planned(size, str(count), seed, "reward_model", run))
    return planned


def result(run: Planned, held: list[list[dict]], path: str | Path) -> dict[str, Any]:
    """The row of a finished run, which is kept in its folder as evaluation.json. `held` is what `split` found in `path`."""
    folder = Path(run.config.out)
    if (folder / "evaluation.json").exists():
        return read_json(folder / "evaluation.json")
    model, _ = load_run(folder, ScalarModel)
    tokenizer, rows = Tokenizer.load(folder / "tokenizer.tiktoken"), [row for pairs in held for row in pairs]
    pairs = encode_pairs(rows, tokenizer, model.config.block_size, path)
    both = pad([p.prompt + p.chosen for p in pairs] + [p.prompt + p.rejected for p in pairs], tokenizer.pad)
    chosen, rejected = evaluate.all_scores(model, *both, run.config.dtype).view(2, -1) * model.std.cpu()  # the loss's scale
    known = all({"chosen_reward", "rejected_reward"} <= row.keys() for row in rows)
    gold = torch.tensor([row["chosen_reward"] - row["rejected_reward"] for row in rows]) if known else None
    log = read_jsonl(folder / "log.jsonl", {"step": int})
    row = {"size": run.method, "layers": model.config.n_layer, "channels": model.config.n_embd,
           "parameters": sum(p.numel() for p in model.parameters()), "count": int(run.setting),
           "pairs": len(read_pairs(run.config.pairs)), "seed": run.seed,
           **measure(chosen - rejected, gold, torch.tensor([i for i, own in enumerate(held) for _ in own])),
           "held_out_loss": reward_model.reward_loss(chosen, rejected).mean().item(), "held_out_pairs": len(rows),
           "steps": log[-1]["step"], "seconds": log[-1]["seconds"]}
    write_json(folder / "evaluation.json", row)
    return row


# ---- table and figure --------------------------------------------------------------------------------------------------

def by_cell(rows: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """(size, count) -> the runs of all seeds; small ones first."""
    cells: dict[tuple[str, int], list[dict]] = {}
    for row in sorted(rows, key=lambda row: (row["parameters"], row["count"], row["seed"])):
        cells.setdefault((row["size"], row["count"]), []).append(row)
    return cells


def markdown(rows: list[dict]) -> str:
    """Accuracy on the labels and, where it is known, on the gold order: a line a size, a column a count."""
    cells, text = by_cell(rows), ""
    counts = sorted({count for _, count in cells})
    for name, title in (("accuracy", "right about the labels"), ("gold_accuracy", "right about the gold order")):
        if name not in rows[0]:
            continue
        text += f"| {title}, % | parameters | " + " | ".join(f"{count:,} pairs" for count in counts)
        text += " |\n" + "|---" * (len(counts) + 2) + "|\n"
        for size, parameters in {row["size"]: row["parameters"] for own in cells.values() for row in own}.items():
            values = [over_seeds(cells[size, count], name) if (size, count) in cells else None for count in counts]
            text += f"| {size} | {parameters:,} | " + " | ".join(
                f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}" if value else "" for value in values) + " |\n"
        if name == "accuracy" and "ceiling" in rows[0]:
            ceiling = f"{100 * rows[0]['ceiling']:.1f} ± {100 * rows[0]['ceiling_se']:.1f}"
            text += "| **the true reward** | " + f" | {ceiling}" * len(counts) + " |\n"
        text += "\n"
    for name, (slope, error) in doublings(rows).items():
        text += f"Twice the {name}: {100 * slope:+.2f}{'' if math.isnan(error) else f' ± {100 * error:.2f}'} points\n"
    return text


def draw(rows: list[dict], dataset: str, folder: Path) -> None:
    """Accuracy on the labels. Left: against pairs, a line a size. Right: against parameters, a line a count."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", sharey=True)
    cells = by_cell(rows)
    for column, (axis, x) in enumerate(zip(axes, ("pairs", "parameters"))):
        lines = list(dict.fromkeys(key[column] for key in (cells if column == 0 else sorted(cells, key=lambda key: key[1]))))
        for i, line in enumerate(lines):
            own = [cell for key, cell in cells.items() if key[column] == line]
            points = zip(*((mean_se([row[x] for row in cell])[0], *over_seeds(cell)) for cell in own))
            label = f"{own[0][0]['parameters']:,} parameters" if column == 0 else f"{line:,} pairs"
            color = plt.get_cmap("viridis")(0.85 - 0.85 * i / max(1, len(lines) - 1))
            axis.errorbar(*points, fmt="o-", markersize=4, capsize=2, color=color, label=label)
        marks = [(0.5, 0.5, "chance")]
        if "ceiling" in rows[0]:
            marks += [(rows[0]["ceiling"], rows[0]["ceiling"], "the true reward")]
        elif dataset == "tldr":
            marks += [(*PEOPLE, "agreement between people")]
        for low, high, name in marks:
            axis.axhspan(low, high, color="gray", alpha=0.3) if high > low else axis.axhline(low, color="black", linestyle=":")
            axis.text(0.99, high, name, transform=axis.get_yaxis_transform(), ha="right", va="bottom", fontsize=8)
        axis.set(xscale="log", xlabel=x)
        ticks = {row["count" if column == 0 else x]: None for row in rows}
        axis.set_xticks(list(ticks), [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.92), reverse=True)
    axes[0].set(ylabel="accuracy on held-out pairs", title=f"{dataset}: more pairs")
    axes[1].set(title="larger models")
    figure.savefig(folder / "scaling.png", dpi=150)
    plt.close(figure)


def main(config: Config) -> None:
    """Build what is missing, run what is not finished, and write rows, table and figure."""
    # ---- 1) sets of pairs ----------------------------------------------------------------------------------------------
    folder, path = Path(config.out), Path(config.pairs)
    rows, test = (read_pairs(file) if file else [] for file in (config.pairs, config.test))  # before hours are spent
    sft_folder = sft.ensure(config.sft, config.dataset, config.preset, config.dtype)
    policy, _ = load_run(sft_folder)
    tokenizer = Tokenizer.load(sft_folder / "tokenizer.tiktoken")
    if not rows:
        gold = reward_model.ensure_gold(sft_folder, config.dataset, config.preset, config.dtype)
        path = ensure_pairs(sft_folder.parent, config.dataset, config.preset, "bt", policy, tokenizer,
                            fingerprint(policy.state_dict()), gold, 0 if config.quick else config.prompts)
        rows = read_pairs(path)
    pool, held = split(rows, config.held_out, test)
    if not pool or not held:
        fail(f"{config.test or path}: {len(held)} prompts are held out, which leaves {len(pool)} to train on")
    for file, part in ((path, pool), (config.test or path, held)):  # a pair that does not fit stops here, with its line
        encode_pairs([row for pairs in part for row in pairs], tokenizer, config.block_size or policy.config.block_size, file)
    settings = {name: getattr(config, name) for name in ("dataset", "preset", "epochs", "min_steps", "lr", "block_size")}
    settings |= {"pairs": sha256(path), "test": sha256(config.test) if test else "", "held_out": len(held)}
    compare_settings(folder, settings, "give another folder with --out, or delete this one")
    write_json(folder / "config.json", settings)
    total, sets = sum(map(len, pool)), {}
    print(f"{total:,} pairs of {len(pool):,} prompts to train on, {sum(map(len, held)):,} pairs of {len(held):,} held out")
    counts = sorted({min(int(count), total) for count in config.counts.split(",")})
    for seed in range(1 if config.quick else config.seeds):  # seed by seed, small sets first: it can be stopped anywhere
        for count in counts if not config.quick else [count for count in counts if count <= 3000] or counts[:1]:
            own, file = subset(pool, count, seed), folder / "pairs" / f"{count}-seed{seed}.jsonl"
            if not file.exists():
                write_jsonl(file, ({name: value for name, value in row.items() if name != "line"} for row in own))
            sets[seed, count] = file, len(own)

    # ---- 2) policies, and the runs -------------------------------------------------------------------------------------
    sizes = config.sizes.split(",") if config.sizes else [f"{policy.config.n_layer}x{policy.config.n_embd}"]
    policies = {size: ensure_policy(config, sft_folder, policy.config, size)
                for size in (sizes if not config.quick else [sizes[0], sizes[-1]])}
    weights = {str(start): fingerprint(load_run(start)[0].state_dict()) for start in policies.values()}
    planned, stopped = plan(config, policies, sets), False
    try:
        run_all(planned, config.workers or (1 if device().type == "cuda" else os.cpu_count() or 1), folder, weights)
    except KeyboardInterrupt:
        planned, stopped = [run for run in planned if finished(run.config)], True
        if not planned:
            raise
        print(f"\nstopped: table and figure are of the {len(planned)} runs that are finished")

    # ---- 3) rows, table, figure ----------------------------------------------------------------------------------------
    results = [result(run, held, config.test or path) for run in planned]
    write_jsonl(folder / "results.jsonl", results)
    text = markdown(results)
    atomic_write(folder / "table.md", text.encode())
    print(f"\n{text}")
    draw(results, config.dataset, folder)
    print(f"rows, table and figure  ->  {folder}")
    if stopped:
        sys.exit(130)


if __name__ == "__main__":
    main(parse(Config, __doc__))
