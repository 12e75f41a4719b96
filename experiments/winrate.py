"""How often does a summary win over the reference, at which sampling temperature? Figure 2 (right) of the DPO paper (Rafailov
et al. 2023), and its table on texts of another kind.

    python experiments/winrate.py                        # `posts`: SFT, Preferred-FT, DPO, PPO and best of n, 3 seeds; an hour on 2 cores
    python experiments/winrate.py --quick                # one seed, fewer prompts and temperatures
    python experiments/winrate.py --dataset tldr         # real posts, and news articles with the policies unchanged
    python experiments/winrate.py --judge FILE.py:function     # yours: function(prompts, first, second) -> P(first is the better one)

The judge is the task's gold reward unless another is given: the higher one wins, a tie is half a win. A judge that may like
the first or the second place is asked in both orders: win = (P(a beats b) + 1 - P(b beats a)) / 2, so that a text wins over
itself half of the time, whatever the judge.

Best of n draws N responses from SFT at each temperature and takes the best of n of them: by the reward model that PPO has,
as in the paper, and by the gold reward, which no method has and which shows what the reward model loses.

Long summaries win more often. The *length-controlled* win rate is what is left of it at the reference's length: one
logistic regression, logit P(win) = a_policy,temperature + b log(words / words of the reference), read at a ratio of 1
(Stiennon et al. 2020, appendix F). Lengths are words of the text.

Standard errors are those over prompts and over seeds (of training and of sampling), added in quadrature.

Reads   what the methods need, all built if it is missing; their runs are those of the plain commands, and reused
Writes  runs/<dataset>/winrate/ : responses/, results.jsonl (a row a point of the figure), table.md, samples.jsonl, winrate.png
"""
from __future__ import annotations

import math
import sys
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, ClassVar, Literal, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, for the imports below

import dpo
import evaluate
import ppo
import reward_model
import sft
from common import fail
from common.files import atomic_write, read_jsonl, write_json, write_jsonl
from common.run import compare_settings
from common.settings import defaults, parse, require_numbers, runs_folder
from common.training import device, fingerprint
from common.tasks import ensure as ensure_data
from common.pairs import ensure_pairs, sampled_responses
from common.tokenizer import Tokenizer
from common.run import load_run
from model import GPT, ScalarModel
from experiments.sweep import Planned, mean_se, run_all

TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
FAR_TEMPERATURES = (0.0, 0.25)  # on texts of another kind, as in the paper
METHODS = {"Preferred-FT": sft, "DPO": dpo, "PPO": ppo}
SEED = 4000  # of the responses

Judge = Callable[[list[str], list[str], list[str]], torch.Tensor]  # prompts, first, second (B texts each) -> (B,) P(first wins)


@dataclass
class Config:
    dataset: str = "posts"  # posts, or tldr
    preset: str = "cpu"  # defaults for a machine
    against: Literal["auto", "reference", "sft"] = "auto"  # what a summary must win over: the reference, or SFT's at T = 0;
    # auto = SFT's where the gold reward is likeness to the reference, over which nothing can win
    judge: str = ""  # FILE.py:function, in place of the gold reward
    prompts: int = 256  # test prompts
    best_of: int = 128  # responses that best of n draws to each prompt, at most
    seeds: int = 3  # runs of every method
    quick: bool = False  # one seed, 64 prompts, 3 temperatures, best of 16
    workers: int = 0  # runs side by side; 0 = one for each core, or one on CUDA
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products; auto = bfloat16 on CUDA only
    sft: str = ""  # run folder of the SFT policy, if not runs/<dataset>/sft
    out: str = ""  # folder of the results, if not winrate beside the SFT policy

    PRESETS: ClassVar[dict] = {("tldr", "cpu"): dict(prompts=128, best_of=4)}

    def __post_init__(self) -> None:
        require_numbers(self, above_0="prompts best_of seeds", from_0="workers")
        if self.quick:
            self.seeds, self.prompts, self.best_of = 1, min(64, self.prompts), min(16, self.best_of)
        base = Path(self.sft).parent if self.sft else runs_folder(self.dataset, self.preset)
        self.out = self.out or str(base / ("winrate-quick" if self.quick else "winrate"))


# ---- judging ---------------------------------------------------------------------------------------------------------

def gold_judge(gold: evaluate.GoldReward) -> Judge:
    """Who has the higher gold reward; 1/2 for a tie."""
    def judge(prompts: list[str], first: list[str], second: list[str]) -> torch.Tensor:
        difference = gold(prompts, first) - gold(prompts, second)
        return (difference > 0).double() + 0.5 * (difference == 0).double()
    return judge


def user_judge(name: str) -> Judge:
    """FILE.py:function as a judge; what is no probability stops with one line."""
    function = ppo.user_function(name, "--judge")

    def judge(prompts: list[str], first: list[str], second: list[str]) -> torch.Tensor:
        answers = function(prompts, first, second).double()
        if len(bad := ((answers < 0) | (answers > 1)).nonzero()):
            fail(f"--judge {name}: returned {answers[bad[0, 0]].item():g}, expected a probability, 0 to 1")
        return answers
    return judge


def wins(judge: Judge, prompts: list[str], a: list[str], b: list[str]) -> torch.Tensor:
    """How far each text of `a` wins over that of `b`, (B,) in [0, 1], asked in both orders."""
    return (judge(prompts, a, b).double() + 1 - judge(prompts, b, a).double()) / 2


def best_of_n(scores: torch.Tensor, values: torch.Tensor, n: int) -> torch.Tensor:
    """The mean value of the one with the highest score among n of the N responses to each prompt, (M,); both (M, N).

    Over all ways to draw n of N, so it uses every response and has no error but that of the N. Ties go to either at random.
    """
    order = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    weights = evaluate.best_of_n_weights(scores.gather(1, order), n)
    return (weights * values.gather(1, order)).sum(1)


def length_controlled(win: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """The win rate of each policy if its texts were as long as the reference's, (K,).

    logit P(win) = a_k + b log_ratio, one b for all, by maximum likelihood (Newton); read at log_ratio 0. A policy that
    always wins would have an infinite a_k, so each is given one tie at log_ratio 0.

    Args:
        win: (K, M) wins of K policies on M prompts, 0 to 1.
        log_ratio: (K, M) log(words / words of the reference).
    """
    K = len(win)
    win, x = (torch.cat([values.double(), torch.full((K, 1), tie)], 1) for values, tie in ((win, 0.5), (log_ratio, 0.0)))
    parameters = torch.zeros(K + 1, dtype=torch.float64)  # a_1 ... a_K, b

    def likelihood(parameters: torch.Tensor) -> torch.Tensor:
        z = parameters[:K, None] + parameters[K] * x
        return (win * z - torch.nn.functional.softplus(z)).sum()

    for _ in range(50):
        p = torch.sigmoid(parameters[:K, None] + parameters[K] * x)
        gradient = torch.cat([(win - p).sum(1), ((win - p) * x).sum()[None]])
        variance = p * (1 - p)
        hessian = torch.diag(torch.cat([variance.sum(1), (variance * x * x).sum()[None] + 1e-9]))
        hessian[:K, K] = hessian[K, :K] = (variance * x).sum(1)
        step = torch.linalg.solve(hessian, gradient)
        while likelihood(parameters + step) < likelihood(parameters) and step.abs().max() > 1e-4:  # it may overshoot
            step = step / 2
        parameters = parameters + step
        if step.abs().max() < 1e-9:
            break
    return torch.sigmoid(parameters[:K])


def words(texts: list[str]) -> torch.Tensor:
    return torch.tensor([float(len(text.split())) for text in texts])


# ---- responses: drawn once, and kept ------------------------------------------------------------------------------------

class Texts(NamedTuple):
    prompts: list[str]
    references: list[str]


def read_texts(path: Path, count: int) -> Texts:
    rows = read_jsonl(path, {"prompt": str, "text": str})[:count]
    return Texts([row["prompt"] for row in rows], [row["text"] for row in rows])


def respond(folder: Path, name: str, policy: GPT, tokenizer: Tokenizer, prompts: list[str], temperature: float, seed: int,
            samples: int = 1, rewards: tuple[evaluate.GoldReward, ScalarModel] | None = None,
            dtype: str = "auto") -> list[dict]:
    """Rows {"prompt", "responses", "seed"} of a policy at a temperature, drawn if they are not there.

    Args:
        rewards: the gold reward and a reward model, whose scores the rows then have, too: "gold" and "scores".
    """
    file = f"{name}-T{temperature:g}-seed{seed}-{fingerprint(policy.state_dict())}.jsonl"  # other weights, other file
    path = folder / "responses" / file.lower().replace(" ", "-")
    if not path.exists():
        parts, texts = sampled_responses(policy, tokenizer, prompts, samples, SEED + seed, dtype, temperature=temperature,
                                         description=f"{name}, T = {temperature:g}, seed {seed}")
        rows = [{"prompt": prompt, "responses": texts[i * samples:(i + 1) * samples], "seed": seed}
                for i, prompt in enumerate(prompts)]
        if rewards:
            gold, model = rewards
            values = {"gold": gold([p for p in prompts for _ in range(samples)], texts),
                      "scores": torch.cat([evaluate.all_scores(model, part.tokens, part.lengths, dtype) for part in parts])}
            for key, value in values.items():
                for row, numbers in zip(rows, value.view(-1, samples).tolist()):
                    row[key] = numbers  # not rounded: equal rewards are a tie
        write_jsonl(path, rows)
    return read_jsonl(path, {"prompt": str, "responses": list, "seed": int})


def first(rows: list[dict]) -> list[str]:
    return [row["responses"][0] for row in rows]


# ---- what came of it ---------------------------------------------------------------------------------------------------

class Point(NamedTuple):
    """A policy at a temperature, on one set of prompts; tensors are (seeds, M)."""
    texts: str
    method: str
    temperature: float
    n: int  # of best of n, else 1
    win: torch.Tensor
    words: torch.Tensor
    log_ratio: torch.Tensor


@dataclass
class Judged:
    """One set of prompts, what a text must win over, and the judge."""
    name: str
    prompts: list[str]
    opponents: list[str]
    judge: Judge

    def log_ratio(self, count: torch.Tensor) -> torch.Tensor:
        """log(words / words of the opponent), with a word added to both: an empty text is one, too."""
        return ((count + 1) / (words(self.opponents) + 1)).log()

    def point(self, method: str, temperature: float, drawn: list[list[str]], n: int = 1) -> Point:
        """Of one response to each prompt, for every seed."""
        count = torch.stack([words(responses) for responses in drawn])
        win = torch.stack([wins(self.judge, self.prompts, responses, self.opponents) for responses in drawn])
        return Point(self.name, method, temperature, n, win, count, self.log_ratio(count))

    def best_of_n(self, temperature: float, rows: list[list[dict]], largest: int,
                  gold: evaluate.GoldReward | None) -> list[Point]:
        """Of the rows of `respond` for every seed. At temperature 0 the N responses are one and the same.

        With gold = None another judge decides; it is asked about the reward model's choice among all N and nothing else, as
        N times as many questions are more than most judges can be asked.
        """
        numbers = {key: torch.tensor([[row[key] for row in seed] for seed in rows]) for key in ("gold", "scores")}  # (S, M, N)
        if gold is None:
            chosen = [[row["responses"][i] for row, i in zip(seed, best.tolist())]
                      for seed, best in zip(rows, numbers["scores"].argmax(2))]
            return [self.point("best of n", temperature, chosen, largest)]
        count = torch.stack([torch.stack([words(row["responses"]) for row in seed]) for seed in rows])
        difference = numbers["gold"] - gold(self.prompts, self.opponents)[None, :, None]
        win = (difference > 0).double() + 0.5 * (difference == 0).double()
        points = []
        for method, key in (("best of n", "scores"), ("best of n by the gold reward", "gold")):
            for n in [2**i for i in range(largest.bit_length()) if 2**i == largest or temperature == 1]:
                rate, length = (torch.stack([best_of_n(s, v, min(n, s.shape[1])) for s, v in zip(numbers[key], values)])
                                for values in (win, count))
                points.append(Point(self.name, method, temperature, n, rate, length, self.log_ratio(length)))
        return points


def errors(per_seed_and_prompt: torch.Tensor) -> tuple[float, float]:
    """Mean of (seeds, M), and its standard error over prompts and over seeds, added in quadrature."""
    mean, over_prompts = evaluate.mean_and_error(per_seed_and_prompt.mean(0))
    over_seeds = mean_se(per_seed_and_prompt.mean(1).tolist())[1]
    return mean, math.hypot(over_prompts, 0.0 if math.isnan(over_seeds) else over_seeds)


def summarise(points: list[Point], draws: int = 100) -> list[dict]:
    """A row a point: win rate, length-controlled win rate and words, each with its standard error."""
    rows = []
    for texts in dict.fromkeys(point.texts for point in points):
        group = [point for point in points if point.texts == texts]
        win, log_ratio = (torch.stack([getattr(point, name) for point in group]) for name in ("win", "log_ratio"))  # (K, S, M)
        K, S, M = win.shape
        controlled = torch.stack([length_controlled(win[:, s], log_ratio[:, s]) for s in range(S)], 1)  # (K, S)
        draw = torch.Generator().manual_seed(0)
        again = []
        for _ in range(draws):  # bootstrap over prompts
            chosen = torch.randint(M, (M,), generator=draw)
            again.append(length_controlled(win[:, :, chosen].reshape(K, -1), log_ratio[:, :, chosen].reshape(K, -1)))
        over_prompts = torch.stack(again).std(0)
        for k, point in enumerate(group):
            over_seeds = mean_se(controlled[k].tolist())[1]
            rate, rate_se = errors(point.win)
            length, length_se = errors(point.words)
            rows.append({"texts": texts, "method": point.method, "n": point.n, "temperature": point.temperature,
                         "win_rate": rate, "win_rate_se": rate_se, "length_controlled": controlled[k].mean().item(),
                         "length_controlled_se": math.hypot(over_prompts[k], 0.0 if math.isnan(over_seeds) else over_seeds),
                         "words": length, "words_se": length_se, "win_rate_of_seeds": point.win.mean(1).tolist(),
                         "prompts": M})
    return [{key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()} for row in rows]


def markdown(rows: list[dict], references: dict[str, float], judge: str, against: str) -> str:
    """A table for each set of prompts: win rate, length-controlled win rate and words at every temperature."""
    text = ""
    for name, length in references.items():
        group = [row for row in rows if row["texts"] == name]
        temperatures = sorted({row["temperature"] for row in group})
        largest = max(row["n"] for row in group)
        text += (f"On {name}: win rate in % over {against} ({length:.1f} words), judged by {judge}; in brackets the "
                 f"length-controlled one and the mean words.\n\n| | " + " | ".join(f"T = {t:g}" for t in temperatures) + " |\n"
                 + "|---" * (len(temperatures) + 1) + "|\n")
        for method in dict.fromkeys(row["method"] for row in group):
            at = {row["temperature"]: row for row in group if row["method"] == method and row["n"] in (1, largest)
                  and (row["n"] == largest or not method.startswith("best"))}
            cells = [f"{100 * r['win_rate']:.0f} ± {100 * r['win_rate_se']:.0f} ({100 * r['length_controlled']:.0f} ± "
                     f"{100 * r['length_controlled_se']:.0f}; {r['words']:.1f})" for r in map(at.get, temperatures)]
            label = method.replace("best of n", f"best of {largest}")
            text += f"| {label} | " + " | ".join(cells) + " |\n"
        text += "\n"
    return text


def draw(rows: list[dict], references: dict[str, float], title: str, path: Path) -> None:
    """Win rate, length-controlled win rate and words against temperature; win rate against n at T = 1."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    name = next(iter(references))
    rows = [row for row in rows if row["texts"] == name]
    largest = max(row["n"] for row in rows)
    figure, axes = plt.subplots(1, 4, figsize=(17, 4.2), layout="constrained")
    for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        best = method.startswith("best")
        at = sorted((row for row in rows if row["method"] == method and row["n"] == (largest if best else 1)),
                    key=lambda row: row["temperature"])
        style = dict(color=f"C{i}", linestyle="--" if "gold" in method else "-", marker="o", markersize=4, capsize=2,
                     label=method.replace("best of n", f"best of {largest}"))
        by_n = sorted((row for row in rows if row["method"] == method and row["temperature"] == 1), key=lambda row: row["n"])
        for axis, line, x, y in ((axes[0], at, "temperature", "win_rate"), (axes[1], at, "temperature", "length_controlled"),
                                 (axes[2], at, "temperature", "words"), (axes[3], by_n if best else [], "n", "win_rate")):
            if line:
                axis.errorbar([row[x] for row in line], [row[y] for row in line], [row[f"{y}_se"] for row in line],
                              **style | ({"label": method} if axis is axes[3] else {}))
    above = "win rate", "length-controlled win rate", "words of a summary", "win rate of best of n at T = 1"
    for axis, text in zip(axes, above):
        axis.set(title=text, xlabel="sampling temperature" if axis is not axes[3] else "n")
        if axis is not axes[2]:
            axis.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
            axis.set_ylim(0, 1)
    axes[2].axhline(references[name], color="black", linewidth=0.8, linestyle=":")
    figure.suptitle(title)
    axes[3].set_xscale("log", base=2)
    axes[3].legend(fontsize=8)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- the whole -------------------------------------------------------------------------------------------------------

def main(config: Config) -> None:
    # ---- 1) SFT, the gold reward, and what all runs share ------------------------------------------------------------
    judge = user_judge(config.judge) if config.judge else None
    sft_folder = sft.ensure(config.sft, config.dataset, config.preset, config.dtype)
    base, folder = sft_folder.parent, Path(config.out)
    ref, _ = load_run(sft_folder)
    tokenizer, weights = Tokenizer.load(sft_folder / "tokenizer.tiktoken"), fingerprint(ref.state_dict())
    settings = {"dataset": config.dataset, "prompts": config.prompts, "best_of": config.best_of, "policy": weights}
    compare_settings(folder, settings, "give another folder with --out, or delete this one")
    gold = reward_model.ensure_gold(sft_folder, config.dataset, config.preset, config.dtype)
    labels = defaults(dpo.Config, config.dataset, config.preset).labels
    pairs = ensure_pairs(base, config.dataset, config.preset, labels, ref, tokenizer, weights, gold)
    evaluate.ensure_bank(base, config.dataset, config.preset, ref, tokenizer, weights, gold)
    model, _ = load_run(ppo.learned_reward(defaults(ppo.Config, config.dataset, config.preset, sft=config.sft,
                                                    dtype=config.dtype)), ScalarModel)

    # ---- 2) the runs of every method: those of the plain commands ----------------------------------------------------
    planned = []
    for seed in range(config.seeds):
        for method, module in METHODS.items():
            more = dict(sft=config.sft) if module is not sft else dict(
                on="chosen", init=str(sft_folder), pairs=str(pairs), out=str(base / f"preferred-ft-seed{seed}"))
            planned.append(Planned(method, "default", seed, module.__name__, defaults(
                module.Config, config.dataset, config.preset, seed=seed, dtype=config.dtype, resume=True, **more)))
    write_json(folder / "config.json", settings)
    run_all(planned, config.workers or (1 if device().type == "cuda" else os.cpu_count() or 1), folder, weights)

    # ---- 3) responses at every temperature, and who wins -------------------------------------------------------------
    prepared = ensure_data(config.dataset)
    sets = {"test prompts": (read_texts(prepared / "test.jsonl", config.prompts), TEMPERATURES)}
    if (prepared / "articles.jsonl").exists():
        sets["news articles"] = read_texts(prepared / "articles.jsonl", config.prompts), FAR_TEMPERATURES
    policies = {"SFT": [ref] * config.seeds}
    policies |= {method: [load_run(run.config.out)[0] for run in planned if run.method == method] for method in METHODS}
    points, samples, references = [], [], {}
    for name, (texts, temperatures) in sets.items():
        temperatures = [t for t in temperatures if not config.quick or t in (0.0, 0.5, 1.0)]
        opponents, against = texts.references, config.against
        if against == "auto":
            likeness = not config.judge and bool((gold(*texts) > 0.9999).all())
            against = "sft" if likeness else "reference"
        if against == "sft":
            opponents = first(respond(folder, f"{name}-SFT", ref, tokenizer, texts.prompts, 0.0, 0, dtype=config.dtype))
        references[name] = words(opponents).mean().item()
        judged = Judged(name, texts.prompts, opponents, judge or gold_judge(gold))
        greedy = {}
        for method in policies:
            for t in temperatures:
                drawn = [first(respond(folder, f"{name}-{method}", policy, tokenizer, texts.prompts, t, seed,
                                       dtype=config.dtype)) for seed, policy in enumerate(policies[method])]
                points.append(judged.point(method, t, drawn))
                if t == 0:
                    greedy[method] = drawn[0]
        samples += [{"texts": name, "prompt": prompt, "reference": reference, **{m: greedy[m][i] for m in greedy}}
                    for i, (prompt, reference) in enumerate(zip(*texts))]
        for t in temperatures if name == "test prompts" else []:
            rows = [respond(folder, f"{name}-best", ref, tokenizer, texts.prompts, t, seed, config.best_of if t else 1,
                            (gold, model), config.dtype) for seed in range(config.seeds)]
            points += judged.best_of_n(t, rows, config.best_of, None if config.judge else gold)

    # ---- 4) rows, table, samples, figure -----------------------------------------------------------------------------
    rows = summarise(points)
    judged_by = config.judge or f"the gold reward ({evaluate.reward_name(config.dataset, base)})"
    against = {"reference": "the reference summaries", "sft": "SFT at T = 0"}[against]
    text = markdown(rows, references, judged_by, against)
    write_jsonl(folder / "results.jsonl", rows)
    write_jsonl(folder / "samples.jsonl", samples)
    atomic_write(folder / "table.md", text.encode())
    draw(rows, references, f"{config.dataset}: over {against}, judged by {judged_by}", folder / "winrate.png")
    for row in samples[:3]:
        print("\n" + "\n".join(f"{key:12} {value.strip()}" for key, value in row.items() if key != "texts"))
    print(f"\n{text}rows, table, samples and figure  ->  {folder}")


if __name__ == "__main__":
    main(parse(Config, __doc__))
