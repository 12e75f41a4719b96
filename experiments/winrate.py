"""How often does a summary win over the reference, at which sampling temperature? Figure 2 (right)
of the DPO paper (Rafailov et al. 2023), and its table on texts of another kind.

    python experiments/winrate.py                 # `posts`, 3 seeds of every method: about an hour
                                                  # on 2 cores
    python experiments/winrate.py --quick         # one seed, fewer prompts and temperatures
    python experiments/winrate.py --dataset tldr  # real posts, and news articles, which the
                                                  # policies were not trained on
    python experiments/winrate.py --print         # the runs that are still to do, as commands for
                                                  # several machines (experiments/sweep.py)
    python experiments/winrate.py --judge FILE.py:function       # your judge: function(prompts,
                                                  # first, second) gives P(first is the better one)

The judge is the task's gold reward unless you give another: the text with the higher reward wins,
and a tie is half a win. A judge may prefer whichever text it is shown first. So it is asked in both
orders, and a text wins over itself half of the time, whatever the judge:

    win = (P(a beats b) + 1 - P(b beats a)) / 2

Best of n draws N responses from SFT at each temperature and takes the best of n of them. There are
two: the best by the reward model that PPO learns from, as in the paper, and the best by the gold
reward, which no method knows. Their difference is what the reward model loses.

Long summaries win more often. The *length-controlled* win rate is the one at the length of the
opponent (Stiennon et al. 2020, appendix F). It is read at equal lengths off a logistic regression,

    logit P(win) = a_policy,temperature + b log(words / words of the opponent)

experiments/judgements.py does the same with judgements of yours, and says how it differs from what
AlpacaEval 2 does.

Standard errors are those over prompts and over seeds (of training and of sampling), in quadrature.

Reads   the SFT policy, pairs, reward model, and a run of each method for each seed. What is missing
        is built by the plain commands, where these put it: the runs of seed 1 are
        `python sft.py --on chosen --seed 1`, `python dpo.py --seed 1` and `python ppo.py --seed 1`.
Writes  runs/<dataset>/winrate.../ : results.jsonl (a row for each point of the figure), table.md,
        samples.jsonl, winrate.png
        runs/<dataset>/winrate-responses/ : what was sampled. Another judge finds it there.
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import hashlib
import json
import math
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Callable, Iterator, Literal, NamedTuple, Sequence

import numpy as np
import torch

import dpo
import evaluate
import ppo
import sft
from common import fail, pipeline, tasks
from common.figures import figure, plain
from common.files import atomic_write, check_writable, read_jsonl, sha256, write_json, write_jsonl
from common.pairs import sampled_responses
from common.rewards import Reward, all_scores, user_function
from common.run import compare_settings, finished, load_run
from common.settings import changed, parse, require, require_numbers, run_folder, settings
from common.statistics import mean_se, newton
from common.training import Device, fingerprint, use_device
from experiments.samples import show
from experiments.sweep import STOPPED, PlannedRun, print_commands, run_all, with_sources
from model import GPT

TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
QUICK_TEMPERATURES = (0.0, 0.5, 1.0)
FAR_TEMPERATURES = (0.0, 0.25)  # on texts of another kind, as in the paper
SEED = 4000  # of the responses
PENALTY = 1e-8  # on the slope of the regression: finite also where length alone decides


class Method(NamedTuple):
    kind: Literal["reference", "trained", "best of n"]
    label: str  # in table and figure; {n} is the largest n
    chooses_by: Literal["", "scores", "gold"] = ""  # best of n: the reward model's, or the gold
    line: str = "-"  # in the figure


METHODS = {
    "SFT": Method("reference", "SFT"),
    "Preferred-FT": Method("trained", "Preferred-FT"),
    "DPO": Method("trained", "DPO"),
    "PPO": Method("trained", "PPO"),
    "best of n": Method("best of n", "best of {n}", "scores"),
    "best of n by the gold reward": Method(
        "best of n", "best of {n} by the gold reward", "gold", "--"),
}

# prompts, first texts, second texts (B each) -> (B,) P(the first is the better one)
Judge = Callable[[list[str], list[str], list[str]], torch.Tensor]


@settings
class Config:
    dataset: str = "posts"  # Task: a folder of data/ whose documents answer prompts.
    preset: str = "cpu"  # Kind of machine that the task's sizes are meant for.

    # ---- who wins
    judge: str = ""  # A judge of yours, FILE.py:function, in place of the gold reward.
    against: Literal["auto", "reference", "sft"] = "auto"  # What a summary must win over: the
    # reference, or SFT's at temperature 0; auto = SFT's where the gold reward is likeness to the
    # reference, over which nothing can win.

    # ---- how much is measured
    prompts: int = 256  # Test prompts.
    best_of: int = 128  # The largest n of best of n: so many responses are drawn to each prompt.
    seeds: int = 3  # Runs of every method.
    quick: bool = False  # Measure less: one seed, 64 prompts, three temperatures, best of 16.

    # ---- the runs
    sft: str = ""  # Run folder of the SFT policy, if not runs/<dataset>/sft.
    out: str = ""  # Folder of the results, if not winrate with the settings that are no defaults.
    workers: int = 0  # Runs side by side; 0 = one for each core, or one on CUDA.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # Number format of matrix products;
    # auto = bfloat16 on CUDA.
    device: Device = "auto"  # Where it is computed; auto = CUDA where there is one, else the CPU.
    print: bool = False  # Run nothing: print the commands that are still to do, one a line.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="prompts best_of seeds", from_0="workers")
        require(self.prompts > 1, "--prompts 1: expected 2 or more, or there is no standard error")
        if self.quick:
            for name in ("prompts", "best_of", "seeds"):
                flag = "--" + name.replace("_", "-")
                require(name not in changed(self), f"{flag}: not with --quick, which says how many")
        require(not self.print or "workers" not in changed(self),
                "--workers: not with --print, which runs nothing")
        self.out = self.out or run_folder(self, "winrate", never=("workers", "print"))
        if self.quick:  # after the folder has its name: that is made of what was typed
            self.seeds = 1
            self.prompts = min(64, self.prompts)
            self.best_of = min(16, self.best_of)


# ---- judging -------------------------------------------------------------------------------------

def half_ties(difference: torch.Tensor) -> torch.Tensor:
    """1 where the first reward is the higher one, 1/2 where both are equal, else 0."""
    return (difference > 0).double() + 0.5 * (difference == 0).double()


def gold_judge(gold: evaluate.GoldReward) -> Judge:
    """The text with the higher gold reward wins."""
    def judge(prompts: list[str], first: list[str], second: list[str]) -> torch.Tensor:
        return half_ties(gold(prompts, first) - gold(prompts, second))
    return judge


def user_judge(name: str) -> Judge:
    """FILE.py:function as a judge; an answer that is no probability stops with one line."""
    function = user_function(name, "--judge")

    def judge(prompts: list[str], first: list[str], second: list[str]) -> torch.Tensor:
        answers = function(prompts, first, second).double()
        for answer in answers.tolist():
            if not 0 <= answer <= 1:
                fail(f"--judge {name}: returned {answer:g}, expected a probability, 0 to 1")
        return answers
    return judge


def wins(judge: Judge, prompts: list[str], a: list[str], b: list[str]) -> torch.Tensor:
    """How far each text of `a` wins over that of `b`, (B,) in [0, 1], asked in both orders."""
    return (judge(prompts, a, b).double() + 1 - judge(prompts, b, a).double()) / 2


# ---- best of n, and the control for length -------------------------------------------------------

def powers_up_to(largest: int) -> list[int]:
    """1, 2, 4, ... and `largest` itself, which may be any number."""
    powers = [2**i for i in range(largest.bit_length())]
    return powers if powers[-1] == largest else [*powers, largest]


def best_of_n(scores: torch.Tensor, values: torch.Tensor, n: int) -> torch.Tensor:
    """The mean value of the response with the highest score among n of the N responses, (M,).

    It is the mean over all ways to draw n of the N, so it uses every response and no draw adds
    noise. Of equal scores a coin decides which is the higher one.

    Args:
        scores, values: (M, N), of N responses to each of M prompts.
    """
    order = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    weights = evaluate.best_of_n_weights(scores.gather(1, order), n)
    return (weights * values.gather(1, order)).sum(1)


def length_controlled(win: torch.Tensor, log_ratio: torch.Tensor,
                      judged: torch.Tensor | None = None) -> torch.Tensor:
    """The win rate that each policy would have with texts as long as the opponents', (K,).

    logit P(win) = a_k + b log_ratio, one b for all policies, by maximum likelihood; read at
    log_ratio 0. A policy that always wins would have an infinite a_k, so each is given one tie
    at log_ratio 0.

    Args:
        win: (K, M) wins of K policies on M prompts, 0 to 1.
        log_ratio: (K, M) log(words / words of the opponent).
        judged: (K, M) False where there is no judgement; None: all are there.
    """
    K = len(win)
    y = torch.cat([win.double(), torch.full((K, 1), 0.5)], 1).numpy()  # (K, M + 1)
    x = torch.cat([log_ratio.double(), torch.zeros(K, 1)], 1).numpy()
    x = x / max(np.abs(x).max(), 1e-9)  # its scale changes b, and nothing else
    counts = np.ones(y.shape)
    if judged is not None:
        counts[:, :-1] = judged.numpy()

    def neg_log_likelihood(parameters: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Its value, gradient and Hessian at (a_1, ..., a_K, b)."""
        a, b = parameters[:K], parameters[K]
        logit = a[:, None] + b * x
        p = np.exp(-np.logaddexp(0, -logit))  # sigmoid(logit)
        value = (counts * (np.logaddexp(0, logit) - y * logit)).sum() + PENALTY * b * b / 2
        error = counts * (p - y)
        gradient = np.append(error.sum(1), (error * x).sum() + PENALTY * b)
        variance = counts * p * (1 - p)
        hessian = np.diag(np.append(variance.sum(1), (variance * x * x).sum() + PENALTY))
        hessian[K, :K] = hessian[:K, K] = (variance * x).sum(1)
        return value, gradient, hessian

    parameters, *_ = newton(neg_log_likelihood, np.zeros(K + 1), tolerance=1e-8)
    return torch.sigmoid(torch.from_numpy(parameters[:K]))


def words(texts: list[str]) -> torch.Tensor:
    """How many words each text has, (B,)."""
    return torch.tensor([float(len(text.split())) for text in texts])


# ---- prompts, and the responses to them ----------------------------------------------------------

class PromptSet(NamedTuple):
    """Prompts, the summaries that were written to them, and where policies are measured on them."""
    name: str
    prompts: list[str]
    references: list[str]
    temperatures: tuple[float, ...]
    best_of_n: bool  # whether best of n is measured, too


def prompt_sets(config: Config) -> list[PromptSet]:
    """The test prompts of the task, and its news articles where it has any."""
    temperatures, far_temperatures = TEMPERATURES, FAR_TEMPERATURES
    if config.quick:
        temperatures = QUICK_TEMPERATURES
        far_temperatures = FAR_TEMPERATURES[:1]
    folder = tasks.prepared(config.dataset)
    sets = [read_prompts(config, "test prompts", folder / "test.jsonl", temperatures, True)]
    if (folder / "articles.jsonl").exists():
        sets.append(read_prompts(config, "news articles", folder / "articles.jsonl",
                                 far_temperatures, False))
    return sets


def read_prompts(config: Config, name: str, path: Path, temperatures: tuple[float, ...],
                 best_of_n: bool) -> PromptSet:
    rows = read_jsonl(path, {"text": str})[:config.prompts]
    if not all(isinstance(row.get("prompt"), str) for row in rows):
        fail(f"--dataset {config.dataset}: its documents answer no prompts, so there is nothing to "
             "win over")
    return PromptSet(name, [row["prompt"] for row in rows], [row["text"] for row in rows],
                     temperatures, best_of_n)


def respond(start: pipeline.Start, name: str, policy: GPT, prompts: list[str], temperature: float,
            seed: int, samples: int = 1, reward: Reward | None = None) -> list[dict]:
    """A policy's responses, {"prompt", "responses"} for each prompt: drawn once, and kept.

    The file is named by a digest of what the rows depend on: weights, prompts, seed, and rewards.
    So nothing that was drawn from other weights, or scored by another reward, is ever read.

    Args:
        reward: of a reward model. The rows then have "scores", which the responses have by it,
            and "gold", their gold rewards.
    """
    seed = seed if temperature else 0  # at temperature 0 nothing is left to chance
    made_of = [fingerprint(policy.state_dict()), prompts, temperature, SEED + seed, samples]
    if reward:
        made_of += [start.gold.id, reward.id]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    file = f"{name}-T{temperature:g}-seed{seed}-{digest}.jsonl".lower().replace(" ", "-")
    path = start.folder / "winrate-responses" / file

    if not path.exists():
        parts, texts = sampled_responses(
            policy, start.tokenizer, prompts, samples, SEED + seed, start.dtype,
            temperature=temperature, description=f"{name}, T = {temperature:g}, seed {seed}")
        rows = [{"prompt": prompt, "responses": texts[i * samples:(i + 1) * samples]}
                for i, prompt in enumerate(prompts)]
        if reward:
            gold = start.gold([prompt for prompt in prompts for _ in range(samples)], texts)
            scores = torch.cat([all_scores(reward.model, part.tokens, part.lengths, start.dtype)
                                for part in parts])
            for row, *values in zip(rows, gold.view(-1, samples), scores.view(-1, samples)):
                # not rounded: rewards that are equal are a tie, and no others
                row["gold"], row["scores"] = (value.tolist() for value in values)
        write_jsonl(path, rows)

    rows = read_jsonl(path, {"prompt": str, "responses": list})
    if [row["prompt"] for row in rows] != prompts:
        fail(f"{path}: is damaged; delete it to draw the responses again")
    return rows


def single(rows: list[dict]) -> list[str]:
    """The texts, where one response to each prompt was drawn."""
    return [row["responses"][0] for row in rows]


# ---- the points of the figure --------------------------------------------------------------------

class Point(NamedTuple):
    """A method at a temperature, on one set of prompts; tensors are (seeds, M)."""
    texts: str  # name of the set of prompts
    method: str
    temperature: float
    n: int  # of best of n, else 1
    win: torch.Tensor
    words: torch.Tensor
    log_ratio: torch.Tensor  # log(words / words of the opponent)
    shown: Sequence[str] = ()  # the responses of the first seed


@dataclass
class Contest:
    """A set of prompts, the texts that a response must win over, and the judge."""
    texts: PromptSet
    opponents: list[str]
    judge: Judge
    gold: Reward | None = None  # the gold reward, if that is what the judge goes by

    def log_ratio(self, count: torch.Tensor) -> torch.Tensor:
        """log(words / words of the opponent), with one word more in both: a text may be empty."""
        return ((count + 1) / (words(self.opponents) + 1)).log()

    def point(self, method: str, temperature: float, drawn: list[list[str]], n: int = 1) -> Point:
        """Of one response to each prompt, for every seed."""
        count = torch.stack([words(responses) for responses in drawn])
        win = torch.stack([wins(self.judge, self.texts.prompts, responses, self.opponents)
                           for responses in drawn])
        return Point(self.texts.name, method, temperature, n, win, count, self.log_ratio(count),
                     drawn[0])

    def best_of_n(self, temperature: float, drawn: list[list[dict]], largest: int) -> list[Point]:
        """Of the scored rows of `respond`, for every seed: at temperature 1 for every n.

        This takes the gold rewards of all N responses. Another judge would have to be asked about
        each of them, which is more than most can be asked: it judges the reward model's choice
        among all N, and nothing else.
        """
        if self.gold is None:
            chosen = [[row["responses"][int(np.argmax(row["scores"]))] for row in rows]
                      for rows in drawn]
            return [self.point("best of n", temperature, chosen, largest)]

        to_beat = self.gold(self.texts.prompts, self.opponents)[:, None]  # (M, 1)
        won, length = [], []  # (M, N) of every seed; N is 1 at temperature 0
        for rows in drawn:
            won.append(half_ties(torch.tensor([row["gold"] for row in rows]) - to_beat))
            length.append(torch.stack([words(row["responses"]) for row in rows]))
        points = []
        for name, method in METHODS.items():
            if method.kind != "best of n":
                continue
            by = [torch.tensor([row[method.chooses_by] for row in rows]) for rows in drawn]
            for n in powers_up_to(largest) if temperature == 1 else [largest]:
                n_of_N = min(n, by[0].shape[1])
                win = torch.stack([best_of_n(x, y, n_of_N) for x, y in zip(by, won)])
                count = torch.stack([best_of_n(x, y, n_of_N) for x, y in zip(by, length)])
                points.append(Point(self.texts.name, name, temperature, n, win, count,
                                    self.log_ratio(count)))
        return points


def measure(start: pipeline.Start, contest: Contest, policies: dict[str, list[GPT]],
            reward: Reward, largest: int) -> Iterator[Point]:
    """The points of one set of prompts, one by one, so that Ctrl-C leaves those that are there.

    Args:
        policies: method -> its policy of every seed.
        reward: of the reward model by which best of n chooses.
        largest: the largest n.
    """
    texts = contest.texts
    for method, of_seeds in policies.items():
        for temperature in texts.temperatures:
            drawn = [respond(start, f"{texts.name}-{method}", policy, texts.prompts, temperature,
                             seed) for seed, policy in enumerate(of_seeds)]
            yield contest.point(method, temperature, [single(rows) for rows in drawn])
    if texts.best_of_n:
        for temperature in texts.temperatures:
            samples = largest if temperature else 1  # at temperature 0 they would all be the same
            drawn = [respond(start, f"{texts.name}-best", start.ref, texts.prompts, temperature,
                             seed, samples, reward) for seed in range(len(policies["SFT"]))]
            yield from contest.best_of_n(temperature, drawn, largest)


# ---- results -------------------------------------------------------------------------------------

def in_quadrature(over_prompts: float, over_seeds: float) -> float:
    """Both standard errors together; one seed has none over seeds."""
    return over_prompts if math.isnan(over_seeds) else math.hypot(over_prompts, over_seeds)


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Mean of (seeds, M) values, and its standard error over prompts and over seeds."""
    mean, over_prompts = mean_se(values.mean(0))
    _, over_seeds = mean_se(values.mean(1))
    return mean, in_quadrature(over_prompts, over_seeds)


def controlled_rates(group: list[Point], draws: int = 100) -> list[tuple[float, float]]:
    """Length-controlled win rate of each point of a set of prompts, and its standard error."""
    win = torch.stack([point.win for point in group])  # (K, S, M)
    log_ratio = torch.stack([point.log_ratio for point in group])
    K, S, M = win.shape
    of_seeds = torch.stack([length_controlled(win[:, s], log_ratio[:, s]) for s in range(S)], 1)
    means, over_seeds = mean_se(of_seeds, axis=1)  # (K,)
    stream = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(draws):  # bootstrap over prompts
        rows = torch.randint(M, (M,), generator=stream)
        drawn.append(length_controlled(win[:, :, rows].reshape(K, -1),
                                       log_ratio[:, :, rows].reshape(K, -1)))
    over_prompts = torch.stack(drawn).std(0).tolist()
    return [(means[k].item(), in_quadrature(over_prompts[k], over_seeds[k])) for k in range(K)]


def summarise(points: list[Point]) -> list[dict]:
    """A row for each point: win rate, length-controlled one and words, with standard errors."""
    rows = []
    for texts in dict.fromkeys(point.texts for point in points):
        group = [point for point in points if point.texts == texts]
        for point, controlled in zip(group, controlled_rates(group)):
            row = {"texts": texts, "method": point.method, "n": point.n,
                   "temperature": point.temperature}
            for name, (mean, error) in {"win_rate": mean_and_error(point.win),
                                        "length_controlled": controlled,
                                        "words": mean_and_error(point.words)}.items():
                row |= {name: round(mean, 5), f"{name}_se": round(error, 5)}
            rows.append({**row, "win_rate_of_seeds": point.win.mean(1).tolist(),
                         "prompts": point.win.shape[1]})
    return rows


def sample_rows(dataset: str, texts: PromptSet, points: list[Point], gold: Reward) -> list[dict]:
    """samples.jsonl: what each policy wrote at temperature 0, and its gold reward.

    Prompt and reference of a real task are somebody's words: an id stands for both, by which
    experiments/samples.py finds them again.
    """
    greedy = {point.method: point.shown for point in points if point.texts == texts.name
              and point.temperature == 0 and METHODS[point.method].kind != "best of n"}
    scores = {method: gold(texts.prompts, shown).tolist() for method, shown in greedy.items()}
    rows = []
    for i, (prompt, reference) in enumerate(zip(texts.prompts, texts.references)):
        row = {"task": dataset, "texts": texts.name}
        if tasks.load(dataset).real:
            row |= {"id": tasks.prompt_id(prompt)}
        else:
            row |= {"prompt": prompt, "reference": reference}
        for method, shown in greedy.items():
            row |= {method: shown[i], f"{method} score": round(scores[method][i], 4)}
        rows.append(row)
    return rows if greedy else []


def curve(rows: list[dict], method: str, largest: int) -> dict[float, dict]:
    """temperature -> the row of a method; for best of n the one with the largest n."""
    n = largest if METHODS[method].kind == "best of n" else 1
    found = [row for row in rows if row["method"] == method and row["n"] == n]
    return {row["temperature"]: row for row in sorted(found, key=lambda row: row["temperature"])}


def markdown(rows: list[dict], opponent_words: dict[str, float], judged_by: str,
             against: str) -> str:
    """A table for each set of prompts: a line a method, a column a temperature. What was not
    measured is an empty cell.

    Args:
        opponent_words: set of prompts -> mean words of the texts that a response must win over.
    """
    text = ""
    for name, mean_words in opponent_words.items():
        group = [row for row in rows if row["texts"] == name]
        if not group:
            continue
        temperatures = sorted({row["temperature"] for row in group})
        largest = max(row["n"] for row in group)
        text += (f"On {name}: win rate in % over {against} ({mean_words:.1f} words), judged by "
                 f"{judged_by}; in brackets the length-controlled one and the mean words.\n\n")
        text += "| | " + " | ".join(f"T = {t:g}" for t in temperatures) + " |\n"
        text += "|---" * (len(temperatures) + 1) + "|\n"
        for method in dict.fromkeys(row["method"] for row in group):
            found = curve(group, method, largest)
            cells = [cell(found[t]) if t in found else "" for t in temperatures]
            text += f"| {METHODS[method].label.format(n=largest)} | " + " | ".join(cells) + " |\n"
        text += "\n"
    return text


def cell(row: dict) -> str:
    """A cell of the table: 77 ± 2 (79 ± 2; 16.6)."""
    rate = f"{100 * row['win_rate']:.0f} ± {100 * row['win_rate_se']:.0f}"
    controlled = f"{100 * row['length_controlled']:.0f} ± {100 * row['length_controlled_se']:.0f}"
    return f"{rate} ({controlled}; {row['words']:.1f})"


def draw(rows: list[dict], opponent_words: float, title: str, path: Path) -> None:
    """Win rate, length-controlled win rate and words against temperature; win rate against n.

    Args:
        rows: of one set of prompts.
    """
    largest = max(row["n"] for row in rows)
    with figure(path, 4, width=4.25) as (drawn, axes):
        for i, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
            method = METHODS[name]
            style = dict(color=f"C{i}", linestyle=method.line, marker="o", markersize=4, capsize=2,
                         label=method.label.format(n=largest))
            found = curve(rows, name, largest).values()
            for axis, quantity in zip(axes, ("win_rate", "length_controlled", "words")):
                plot(axis, found, "temperature", quantity, style)
            if method.kind == "best of n":
                by_n = [row for row in rows if row["method"] == name and row["temperature"] == 1]
                plot(axes[3], by_n, "n", "win_rate", style)

        for axis, text in zip(axes, ("win rate", "length-controlled win rate",
                                     "words of a summary", "win rate of best of n at T = 1")):
            axis.set(title=text, xlabel="sampling temperature")
        for axis in (axes[0], axes[1], axes[3]):
            axis.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
            axis.set_ylim(0, 1)
        axes[0].legend(fontsize=8)
        axes[2].axhline(opponent_words, color="black", linewidth=0.8, linestyle=":")
        axes[3].set(xlabel="n")
        axes[3].set_xscale("log", base=2)
        drawn.suptitle(plain(title))


def plot(axis, rows: Sequence[dict], x: str, y: str, style: dict) -> None:
    """A line through the rows, with standard errors."""
    axis.errorbar([row[x] for row in rows], [row[y] for row in rows],
                  [row[f"{y}_se"] for row in rows], **style)


# ---- main ----------------------------------------------------------------------------------------

def plan(config: Config) -> list[PlannedRun]:
    """A run of every method for every seed: those of the plain commands, where these put them."""
    shared = dict(dataset=config.dataset, preset=config.preset, dtype=config.dtype,
                  device=config.device, resume=True)
    planned = []
    for seed in range(config.seeds):
        configs = {"Preferred-FT": sft.Config(**shared, on="chosen", init=config.sft, seed=seed),
                   "DPO": dpo.Config(**shared, sft=config.sft, seed=seed),
                   "PPO": ppo.Config(**shared, sft=config.sft, seed=seed)}
        planned += [PlannedRun(method, "default", seed, run) for method, run in configs.items()]
    return planned


def build(config: Config) -> tuple[pipeline.Start, Reward]:
    """The SFT policy with its gold reward and bank, and the reward model that PPO learns from."""
    folder = pipeline.sft_policy(config.sft, config.dataset, config.preset, config.dtype)
    start = pipeline.load(folder, config.dataset, config.preset, config.dtype)
    start.gold = pipeline.gold_reward(start)
    start.bank = pipeline.sample_bank(start)
    of_ppo = ppo.Config(dataset=config.dataset, preset=config.preset, sft=config.sft,
                        dtype=config.dtype)
    return start, pipeline.reward(of_ppo, start)


def choose_opponent(config: Config, gold: Reward, texts: PromptSet) -> str:
    """What --against names. auto is SFT where no text can have a higher reward than the reference,
    and nothing else judges."""
    if config.against != "auto":
        return config.against
    is_likeness = bool((gold(texts.prompts, texts.references) > 0.9999).all())
    return "sft" if is_likeness and not config.judge else "reference"


def write_results(config: Config, contests: list[Contest], points: list[Point], against: str,
                  gold: Reward) -> str:
    """Write rows, table, samples and figure, and return what to print of them."""
    folder = Path(config.out)
    rows = summarise(points)
    samples = []
    for contest in contests:
        samples += sample_rows(config.dataset, contest.texts, points, gold)
    opponent_words = {contest.texts.name: words(contest.opponents).mean().item()
                      for contest in contests}
    judged_by = config.judge or f"the gold reward ({gold.name})"
    over = {"reference": "the reference summaries", "sft": "SFT at T = 0"}[against]
    table = markdown(rows, opponent_words, judged_by, over)
    write_jsonl(folder / "results.jsonl", rows)
    write_jsonl(folder / "samples.jsonl", samples)
    atomic_write(folder / "table.md", table.encode())
    texts = contests[0].texts
    draw([row for row in rows if row["texts"] == texts.name], opponent_words[texts.name],
         f"{config.dataset}: over {over}, judged by {judged_by}", folder / "winrate.png")

    known = {tasks.prompt_id(prompt): {"prompt": prompt, "text": reference}
             for prompt, reference in zip(texts.prompts, texts.references)}
    shown = [show(row, known) for row in samples[:3]]
    return "\n\n".join([*shown, table]) + f"rows, table, samples and figure  ->  {folder}"


def main(config: Config) -> None:
    """Build what is missing, run what is not finished, sample, judge, and write the results."""
    # ---- 1) what can be wrong with the settings shows before hours are spent ---------------------
    use_device(config.device)
    folder = Path(config.out)
    check_writable(folder)
    pipeline.require_gold(config.dataset)
    own_judge = user_judge(config.judge) if config.judge else None
    # with --print, stdout is for the commands alone
    messages = sys.stderr if config.print else sys.stdout
    with redirect_stdout(messages):
        sets = prompt_sets(config)
    if own_judge:
        references = sets[0].references[:2]
        wins(own_judge, sets[0].prompts[:2], references, references[::-1])
    made_of = {name: getattr(config, name) for name in (
        "dataset", "preset", "judge", "against", "prompts", "best_of", "seeds", "quick")}
    advice = "give another folder with --out, or delete this one"
    compare_settings(folder, made_of, None, advice)
    planned = plan(config)
    for run in planned:
        finished(run.config)  # one of other settings stops here, by name

    # ---- 2) what all runs share, and the runs ----------------------------------------------------
    with redirect_stdout(messages):
        start, reward = build(config)
        built_from = {"policy": start.policy_id, "gold": start.gold.id, "reward_model": reward.id}
        if config.judge:
            built_from["judge"] = sha256(config.judge.rpartition(":")[0])
        compare_settings(folder, made_of, built_from, advice)
        write_json(folder / "config.json", {**made_of, "built_from": built_from})
        planned = with_sources(planned, start)
    if config.print:
        return print_commands(planned)
    _, stopped = run_all(planned, folder, config.workers)
    if stopped:  # what follows would take longer than anybody waits after Ctrl-C
        sys.exit(STOPPED)

    # ---- 3) responses at every temperature, and how often they win -------------------------------
    policies = {"SFT": [start.ref] * config.seeds}
    for run in planned:
        policies.setdefault(run.method, []).append(load_run(run.config.out)[0])
    against = choose_opponent(config, start.gold, sets[0])
    contests, points = [], []
    try:
        for texts in sets:
            opponents = texts.references
            if against == "sft":
                opponents = single(respond(start, f"{texts.name}-SFT", start.ref, texts.prompts,
                                           temperature=0.0, seed=0))
            contests.append(Contest(texts, opponents, own_judge or gold_judge(start.gold),
                                    None if own_judge else start.gold))
            for point in measure(start, contests[-1], policies, reward, config.best_of):
                points.append(point)
    except KeyboardInterrupt:
        stopped = True
        if not points:
            raise

    # ---- 4) all files first, then the screen -----------------------------------------------------
    print(write_results(config, contests, points, against, start.gold))
    if stopped:
        print(f"stopped: this is of the {len(points)} points that were measured; the same command "
              "goes on with the others")
        sys.exit(STOPPED)


if __name__ == "__main__":
    main(parse(Config, __doc__))
