"""What a baseline and clipping buy, where it matters: three claims of lecture 8's quiz as curves.

    python experiments/ablation.py --quick     # one seed, two step sizes: 10 minutes of one core
    python experiments/ablation.py             # three seeds: 45 minutes

All of it maximises the gold reward; beta is 0.15, as in `frontier.py --grid ablation`, which asks
what each part of PPO buys at the usual step size. What was expected (results/reviews/ablation
says what came of it):

1. "A baseline reduces variance."  Of the estimate from one response,

        (score - beta (log pi - log pi_ref) - baseline) grad log pi(y|x),

   the trace of the covariance, at the SFT policy and at one that was trained. At the SFT policy no
   baseline is as good as the best constant, because the scripts count scores from the reference's
   mean. With 5 (standard deviations) added to every score it has 1 + 5^2 = 26 times the variance,
   and no other baseline sees a difference. After training it has 1 + (mean / std of the return)^2
   times as much. Leave-one-out of K = 4 costs 1 + 1/(K - 1) = 4/3 of the constant: the mean of
   three others is noisy, too. A value network takes away about what it explains of the returns.
2. In nats of regret, (J(pi*) - J(pi)) / beta = KL(pi || pi*): less variance, less regret, where
   batches are small (64 responses, for the usual 256).
3. "Clipping prevents destruction."  The learning rate times 1/2 to 16, for REINFORCE (one pass over
   a batch), for PPO with four passes, and for the same without clipping. The last is the first to
   end above the regret of the policy it started from; clipping helps until a single step, which it
   cannot bound, goes too far: then all three die. "A step can make the policy worse": the largest
   rise of regret from one update to the next (some 2 nats of it are the noise of two batches).

Every run is a plain command, printed as it starts; after Ctrl-C the same command goes on.

Reads   the SFT policy and the bank (made if they are missing)
Writes  runs/<dataset>/ablation/ : the runs, variance.jsonl, results.jsonl (the runs),
        table.md, figure.png
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, for the imports below

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import math
from typing import Callable, Literal, NamedTuple

import numpy as np
import torch

from common import pipeline, tasks
from common.figures import figure
from common.files import atomic_write, check_writable, read_json_object, write_jsonl
from common.run import check_folder, load_run
from common.settings import (changed, parse, require, require_numbers, run_folder, settings, typed)
from common.statistics import mean_se
from common.training import Device, adamw, device, generator, set_lr, use_device
from experiments.frontier import as_table, number
from experiments.grids import Method, plan_run
from experiments.sweep import STOPPED, PlannedRun, finished_log, run_all, with_sources
from model import GPT, ScalarModel, generate, response_logprobs, response_mask
from ppo import compute_gae, compute_rewards, response_values, value_network
from reinforce import leave_one_out

BETA = 0.15  # in standard deviations of the score per nat
GOLD = f"--reward gold --beta {BETA}"
SMALL = f"{GOLD} --batch-size 64 --steps 100 --evaluate-every 10"
BASELINES = {
    "no baseline": f"reinforce.py {SMALL} --baseline none",
    "leave-one-out": f"reinforce.py {SMALL}",
    "value network": f"ppo.py {SMALL} --epochs 1",
}
SHORT = f"{GOLD} --batch-size 128 --steps 25 --warmup 5 --evaluate-every 25"
STEPS = {
    "REINFORCE, one pass": f"reinforce.py {SHORT}",
    "four passes, not clipped": f"ppo.py {SHORT} --epochs 4 --clip 1e6 --value-clip 1e6",
    "PPO: four passes, clipped": f"ppo.py {SHORT} --epochs 4",
}
SIZES = ("x0.5", "x1", "x2", "x4", "x8", "x16")  # of the usual learning rate
QUICK_SIZES = ("x1", "x4")
TRAINED = "leave-one-out"  # whose policy the variance is measured at, after its updates

BATCHES = 64  # independent estimates of the gradient
BATCH = 32  # responses in each
SAMPLES = 4  # responses to a prompt
SHIFT = 5.0  # added to every score
FITTED = 64  # batches of 64 that the value network learns from


@settings
class Config:
    dataset: str = "reviews"  # Task: a folder of data/.
    preset: str = "cpu"  # Kind of machine that the task's sizes are meant for.
    sft: str = ""  # Run folder of the SFT policy, if not runs/<dataset>/sft.

    # ---- what is run
    quick: bool = False  # Run one seed of two step sizes.
    seeds: int = 3  # Runs of every setting.

    # ---- how it is run
    workers: int = 0  # Runs at a time; 0 = one for each core, or one on CUDA.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # Number format of matrix products of
    # the runs; auto = bfloat16 on CUDA. Variances are measured in float32.
    device: Device = "auto"  # Where it is computed; auto = CUDA where there is one, else the CPU.
    out: str = ""  # Folder of the runs, if not ablation beside the SFT policy.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="seeds", from_0="workers")
        require(not self.quick or "seeds" not in changed(self),
                "--seeds: not with --quick, which runs one seed")
        self.out = self.out or run_folder(self, "ablation", never=("seeds", "workers"))


# ---- 1) the variance of the gradient -------------------------------------------------------------

class Rollout(NamedTuple):
    """B responses of a policy, of at most R tokens; on the device."""
    inputs: tuple[torch.Tensor, ...]  # tokens, prompt_lengths, lengths
    mask: torch.Tensor  # (B, R)
    returns: torch.Tensor  # (B, R) from each token on; from the first: score - beta log ratio


@torch.no_grad()
def roll_out(policy: GPT, start: pipeline.Start, count: int, draw: torch.Generator) -> Rollout:
    """`SAMPLES` responses to each of count / SAMPLES training prompts; those to a prompt are
    neighbours."""
    tokenizer, prompts = start.tokenizer, tasks.prompts(start.dataset, "train")
    rows = torch.randint(len(prompts), (count // SAMPLES,), generator=draw)
    asked = [prompts[i] for i in rows.repeat_interleave(SAMPLES).tolist()]
    prompt_ids = [[tokenizer.bos] + ids for ids in tokenizer.encode_batch(asked)]
    samples = generate(policy, prompt_ids, policy.config.block_size, tokenizer.eos, tokenizer.pad,
                       draw)
    responses = [tokenizer.decode(ids) for ids in samples.response_ids()]
    raw_scores = start.gold(asked, responses, samples)
    # in standard deviations of the reference's, as in reinforce.py
    scores = (raw_scores - start.bank.rewards.mean()) / start.bank.rewards.std()

    inputs = tuple(x.to(device()) for x in samples[:3])
    mask = response_mask(*inputs[1:])
    rewards = compute_rewards(scores.float().to(device()), response_logprobs(policy, *inputs),
                              response_logprobs(start.ref, *inputs), mask, BETA)
    returns, _ = compute_gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
    return Rollout(inputs, mask, returns)


def fit_values(rollouts: list[Rollout], start: pipeline.Start) -> ScalarModel:
    """A value network, as ppo.py starts it, after four passes over these responses."""
    network = value_network(start, start.gold, 0).to(device())
    optimizer = adamw(network, 2e-3, 0.0, (0.9, 0.95))  # as in ppo.py
    for i in range(4):
        for j in torch.randperm(len(rollouts), generator=generator(0, "fit", i)).tolist():
            inputs, mask, returns = rollouts[j]
            (response_values(network, *inputs) - returns)[mask].square().mean().backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        set_lr([optimizer], 2e-3 * (1 - (i + 1) / 4))
    return network.requires_grad_(False)


def advantages_of(returns: torch.Tensor, values: torch.Tensor, constant: float,
                  samples: int) -> dict[str, torch.Tensor]:
    """What grad log pi is multiplied by with each baseline: (B, R) of each token, or (B, 1) where
    it is the same for all tokens of a response.

    Args:
        returns: (B, R) from each token on; the `samples` responses to a prompt are neighbours.
        values: (B, R) the value network's estimates of them.
        constant: an estimate of the mean return, from other responses.
    """
    whole = returns[:, 0]
    return {
        "none": whole[:, None],
        f"none, scores + {SHIFT:g}": whole[:, None] + SHIFT,
        "constant": whole[:, None] - constant,
        "leave-one-out": leave_one_out(whole, samples)[:, None],
        "value network": returns - values,  # PPO's, with lam = 1
    }


def gradient(logprobs: torch.Tensor, advantages: torch.Tensor,
             parameters: list[torch.Tensor]) -> torch.Tensor:
    """The mean over responses of sum_t advantage_t grad log pi(y_t|x, y_<t), flat: (P,)."""
    value = (advantages * logprobs).sum() / len(logprobs)
    parts = torch.autograd.grad(value, parameters, retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


def noise_and_signal(products: np.ndarray) -> tuple[float, float]:
    """The trace of the covariance of an estimate, and |its mean|^2, without bias.

    Args:
        products: (M, M) inner products of M independent estimates.
    """
    M = len(products)
    own, total = products.trace(), products.sum()
    noise = (own - total / M) / (M - 1)
    return noise, total / M**2 - noise / M


def jackknife(statistics: Callable[[np.ndarray], np.ndarray], M: int) -> tuple:
    """Statistics of M independent measurements and their standard errors, from leaving out each
    measurement in turn (Efron & Stein 1981). `statistics` gets the numbers of those that count."""
    every = np.arange(M)
    without = np.array([statistics(np.delete(every, m)) for m in every])
    return statistics(every), math.sqrt(M - 1) * without.std(0)


def variances(name: str, policy: GPT, start: pipeline.Start) -> list[dict]:
    """A row for each baseline: the variance at this policy of the gradient from one response."""
    print(f"the variance of the gradient at the policy {name}", flush=True)
    fitted = [roll_out(policy, start, 64, generator(0, name, "fit", i)) for i in range(FITTED)]
    network = fit_values(fitted, start)
    first = torch.cat([rollout.returns[:, 0] for rollout in fitted])  # of whole responses
    constant = first.mean().item()

    parameters = list(policy.requires_grad_(True).parameters())
    estimates: dict[str, list[torch.Tensor]] = {}  # baseline -> M gradients
    returns, left = [], []
    for batch in range(BATCHES):
        inputs, mask, own = roll_out(policy, start, BATCH, generator(0, name, batch))
        values = response_values(network, *inputs)
        logprobs = response_logprobs(policy, *inputs)
        for baseline, advantages in advantages_of(own, values, constant, SAMPLES).items():
            estimate = gradient(logprobs, advantages, parameters)
            estimates.setdefault(baseline, []).append(estimate)
        returns.append(own[mask])
        left.append((own - values)[mask])
    explained = 1 - (torch.cat(left).var() / torch.cat(returns).var()).item()

    products = {}
    for baseline in list(estimates):
        stacked = torch.stack(estimates.pop(baseline))  # (M, P)
        products[baseline] = (stacked @ stacked.T).double().cpu().numpy()
    rows = []
    for baseline in products:
        def statistics(some: np.ndarray) -> np.ndarray:
            """Variance, over that with the constant, over |mean|^2: all have the same mean."""
            noise, _ = noise_and_signal(products[baseline][np.ix_(some, some)])
            usual, signal = noise_and_signal(products["constant"][np.ix_(some, some)])
            return BATCH * np.array([noise, noise / (BATCH * usual), noise / signal])

        row = {"policy": name, "baseline": baseline, "return_mean": constant,
               "return_std": first.std().item(), "explained_variance": explained}
        for quantity, value, error in zip(("variance", "ratio", "responses"),
                                          *jackknife(statistics, BATCHES)):
            row |= {quantity: float(value), f"{quantity}_se": float(error)}
        rows.append(row)
    return rows


# ---- 2) and 3) the runs --------------------------------------------------------------------------

def plan(config: Config) -> list[PlannedRun]:
    """Every run of both parts, the first seed first. A run's setting is its step size."""
    commands = [(method, "x1", command) for method, command in BASELINES.items()]
    for size in QUICK_SIZES if config.quick else SIZES:
        commands += [(method, size, f"{command} --lr {size}") for method, command in STEPS.items()]
    return [plan_run(config, method, Method([command]), command, seed)._replace(setting=size)
            for seed in range(1 if config.quick else config.seeds)
            for method, size, command in commands]


def measured(run: PlannedRun) -> dict:
    """The row of a finished run: the regret of its evaluations, and its largest rise."""
    log = finished_log(run)
    table = read_json_object(Path(run.config.out) / "evaluation.json", "table")["table"]
    # pi* at the beta of this run, in units of the gold reward
    [optimum] = [row for row in table.values() if row["kind"] == "limit"]
    log_z = optimum["reward"] / optimum["beta"] - optimum["kl"]  # J(pi*) / beta
    evaluations = [row for row in log if "eval_reward" in row]
    # J / beta at every update, of the responses that it learned from
    objective = [row["objective"] / run.config.beta for row in log if "objective" in row]
    regret = [log_z - row["eval_reward"] / optimum["beta"] + row["eval_kl"] for row in evaluations]
    return {"method": run.method, "setting": run.setting, "seed": run.seed,
            "command": typed(run.config), "seconds": log[-1]["seconds"],
            "step": [row["step"] for row in evaluations], "regret": regret, "end": regret[-1],
            "reward": [row["eval_reward"] for row in evaluations],
            "kl": [row["eval_kl"] for row in evaluations],
            "largest_rise": max(a - b for a, b in zip(objective, objective[1:]))}


# ---- table and figure ----------------------------------------------------------------------------

def over_seeds(rows: list[dict], method: str, setting: str, name: str) -> tuple:
    """Mean and standard error; of evaluations, at each of them."""
    return mean_se([row[name] for row in rows
                    if (row["method"], row["setting"]) == (method, setting)], axis=0)


def sizes_of(rows: list[dict]) -> list[str]:
    """The step sizes, from the smallest on."""
    return list(dict.fromkeys(row["setting"] for row in rows if row["method"] in STEPS))


def markdown(noise: list[dict], runs: list[dict]) -> str:
    """Three tables; in the first, how many responses make the noise as small as the gradient."""
    lines = [[row["policy"], row["baseline"]] +
             [number(row[name], row[f"{name}_se"], form) for name, form in
              (("variance", ".0f"), ("ratio", ".2f"), ("responses", ".0f"))] for row in noise]
    text = as_table([["policy", "baseline", "variance", "over the constant's",
                      "responses for noise = gradient"], *lines])

    lines = [[method] + [number(*(x[-1] for x in over_seeds(runs, method, "x1", name)), form)
                         for name, form in (("regret", ".2f"), ("reward", ".3f"), ("kl", ".2f"))]
             for method in BASELINES]
    text += "\n" + as_table([["baseline", "regret, nats", "gold reward", "KL, nats"], *lines])

    sizes = sizes_of(runs)
    for name, title in (("end", "regret at the end, nats"), ("largest_rise", "its largest rise")):
        lines = [[method] + [number(*over_seeds(runs, method, size, name), ".1f") for size in sizes]
                 for method in STEPS]
        text += "\n" + as_table([[title, *sizes], *lines])
    return text + f"\nThe SFT policy's regret is {of_sft(runs):.2f} nats.\n"


def of_sft(runs: list[dict]) -> float:
    """The regret of the policy from which every run starts."""
    return mean_se([row["regret"][0] for row in runs])[0]


def draw(noise: list[dict], runs: list[dict], path: Path) -> None:
    """The three questions, side by side."""
    from matplotlib.ticker import LogFormatter
    with figure(path, 3, width=5) as (_, axes):
        baselines = list(dict.fromkeys(row["baseline"] for row in noise))
        policies = list(dict.fromkeys(row["policy"] for row in noise))
        for i, policy in enumerate(policies):
            own = [row for row in noise if row["policy"] == policy]
            axes[0].bar([place + 0.4 * i for place in range(len(own))],
                        [row["variance"] for row in own], 0.4,
                        yerr=[row["variance_se"] for row in own], label=policy)
        axes[0].set_xticks([place + 0.2 for place in range(len(baselines))],
                           [baseline.replace(", ", ",\n") for baseline in baselines], fontsize=8)
        axes[0].set(yscale="log", ylabel="variance of the gradient from one response",
                    title="does a baseline reduce variance?")

        steps = runs[0]["step"]
        for method in BASELINES:
            mean, error = over_seeds(runs, method, "x1", "regret")
            axes[1].plot(steps, mean, "o-", markersize=3, label=method)
            axes[1].fill_between(steps, mean - error, mean + error, alpha=0.2)
        axes[1].set(xlabel="updates of 64 responses", title="and regret?")

        sizes = sizes_of(runs)
        for i, method in enumerate(STEPS):
            mean, error = zip(*(over_seeds(runs, method, size, "end") for size in sizes))
            axes[2].errorbar(sizes, mean, error, fmt="o-", color=f"C{i}", markersize=4,
                             label=method)
            rise = [over_seeds(runs, method, size, "largest_rise")[0] for size in sizes]
            axes[2].plot(sizes, rise, ":", color=f"C{i}")
        axes[2].set(xlabel="learning rate, times the usual one",
                    title="does clipping prevent destruction?\n(dotted: the worst update's rise)")
        for axis in axes[1:]:
            axis.axhline(of_sft(runs), color="black", linestyle="--", linewidth=1,
                         label="SFT policy")
            axis.set(yscale="log", ylabel=r"regret: KL$(\pi \,\|\, \pi^*)$, nats per response")
            axis.yaxis.set_major_formatter(LogFormatter())  # 20 in place of 2 x 10^1
            axis.yaxis.set_minor_formatter(LogFormatter())
        for axis in axes:
            axis.legend(fontsize=8)


# ---- main ----------------------------------------------------------------------------------------

def main(config: Config) -> None:
    """Run what is not finished, measure, and write rows, table and figure."""
    use_device(config.device)
    folder = Path(config.out)
    check_writable(folder)
    pipeline.require_gold(config.dataset)
    planned = plan(config)
    for run in planned:
        check_folder(run.config)
    sft = pipeline.sft_policy(config.sft, config.dataset, config.preset, config.dtype)
    start = pipeline.load(sft, config.dataset, config.preset, config.dtype)
    start.gold = pipeline.gold_reward(start)
    start.bank = pipeline.sample_bank(start)

    done, stopped = run_all(with_sources(planned, start), folder, config.workers)
    if stopped:
        sys.exit(STOPPED)

    trained = next(run.config for run in done if run.method == TRAINED)
    noise = variances("SFT", load_run(sft)[0], start)
    noise += variances(f"after {trained.steps} updates", load_run(trained.out)[0], start)
    runs = [measured(run) for run in done]
    text = markdown(noise, runs)
    write_jsonl(folder / "variance.jsonl", noise)
    write_jsonl(folder / "results.jsonl", runs)
    atomic_write(folder / "table.md", text.encode())
    draw(noise, runs, folder / "figure.png")
    print(f"\n{text}\nrows, table and figure  ->  {folder}")


if __name__ == "__main__":
    main(parse(Config, __doc__))
