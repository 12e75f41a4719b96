"""What a baseline and clipping buy, where it matters: three questions of lecture 8's quiz as curves.

    python experiments/ablation.py --quick     # one seed, fewer step sizes: 12 minutes of one core
    python experiments/ablation.py             # three seeds: an hour

All of it maximises the gold reward; beta is 0.15, as in `frontier.py --grid ablation`, which asks
what each part of PPO buys at the usual step size. What was expected, before anything was run:

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
3. "Clipping prevents destruction."  The learning rate times 1, 2, 4, ... for REINFORCE (one pass
   over a batch), for PPO with four passes, and for the same without clipping. The last is the first
   to end above the regret of the policy it started from; clipping helps until a single step, which
   it cannot bound, goes too far: then all three die. "A step can make the policy worse": the
   largest rise of regret from one update to the next.

Every run is a plain command, printed as it starts; after Ctrl-C the same command goes on.

Reads   the SFT policy and the bank (made if they are missing)
Writes  runs/<dataset>/ablation/ : the runs, results.jsonl, table.md, figure.png
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, for the imports below

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import math
from typing import Callable, Literal, NamedTuple

import torch

from common import pipeline, tasks
from common.figures import figure
from common.files import atomic_write, check_writable, read_json_object, write_jsonl
from common.run import check_folder, load_run
from common.settings import (changed, parse, require, require_numbers, run_folder, settings, typed)
from common.statistics import mean_se
from common.training import Device, adamw, device, generator, similar_lengths, use_device
from experiments.frontier import number
from experiments.grids import Method, plan_run
from experiments.sweep import STOPPED, PlannedRun, finished_log, run_all, with_sources
from model import GPT, Samples, ScalarModel, generate, response_logprobs, response_mask
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
TIMES = (1, 2, 4, 8, 16, 32)  # of the usual learning rate
QUICK_TIMES = (1, 4, 16)
TRAINED = "leave-one-out"  # whose policy the variance is measured at, after its updates

BATCHES = 64  # independent estimates of the gradient
BATCH = 32  # responses in each
SAMPLES = 4  # responses to a prompt
SHIFT = 5.0  # added to every score
FITTED = 4096  # responses that the value network learns from


@settings
class Config:
    dataset: str = "reviews"  # Task: a folder of data/.
    preset: str = "cpu"  # Kind of machine that the task's sizes are meant for.
    sft: str = ""  # Run folder of the SFT policy, if not runs/<dataset>/sft.

    # ---- what is run
    quick: bool = False  # Run one seed of half of the step sizes.
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
    """B responses of a policy, at most R tokens each; on the device."""
    samples: Samples
    mask: torch.Tensor  # (B, R)
    scores: torch.Tensor  # (B,) in standard deviations of the reference's
    logprobs: torch.Tensor  # (B, R)
    ref_logprobs: torch.Tensor  # (B, R)


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
    # as in reinforce.py; the bank has more responses of the reference
    raw_scores = start.gold(asked, responses, samples)
    scores = (raw_scores - start.bank.rewards.mean()) / start.bank.rewards.std()

    samples = Samples(*(x.to(device()) for x in samples[:3]), None)
    mask = response_mask(samples.prompt_lengths, samples.lengths)
    logprobs, ref_logprobs = (torch.zeros(mask.shape, device=device()) for _ in range(2))
    for part in similar_lengths(torch.arange(count, device=device()), samples.lengths, 64):
        inputs = [x[part] for x in samples[:3]]
        R = int((inputs[2] - inputs[1]).max())  # the longest of this part
        logprobs[part, :R] = response_logprobs(policy, *inputs)
        ref_logprobs[part, :R] = response_logprobs(start.ref, *inputs)
    return Rollout(samples, mask, scores.float().to(device()), logprobs, ref_logprobs)


def returns_of(rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """The return of every response, (B,), and what is still to come before each token, (B, R)."""
    kl = (rollout.logprobs - rollout.ref_logprobs).sum(1)
    rewards = compute_rewards(rollout.scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask,
                              BETA)
    to_come, _ = compute_gae(rewards, torch.zeros_like(rewards), rollout.mask, 1.0, 1.0)
    return rollout.scores - BETA * kl, to_come


def fit_values(rollout: Rollout, start: pipeline.Start) -> ScalarModel:
    """A value network, as ppo.py starts it, that has learned the returns of these responses: four
    passes, batches of 64."""
    network = value_network(start, start.gold, 0).to(device())
    optimizer = adamw(network, 1e-3, 0.0, (0.9, 0.95))
    _, to_come = returns_of(rollout)
    draw = generator(0, "value network")
    for _ in range(4):
        for rows in torch.randperm(len(to_come), generator=draw).to(device()).split(64):
            values = response_values(network, *(x[rows] for x in rollout.samples[:3]))
            R = values.shape[1]
            loss = (values - to_come[rows, :R])[rollout.mask[rows, :R]].square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return network.requires_grad_(False)


def advantages_of(returns: torch.Tensor, to_come: torch.Tensor, values: torch.Tensor,
                  constant: float, samples: int) -> dict[str, torch.Tensor]:
    """What each token's grad log pi is multiplied by with each baseline; (B, 1) where that is the
    same for all tokens of a response, else (B, R).

    Args:
        returns: (B,) the `samples` responses to a prompt are neighbours.
        to_come: (B, R) returns from each token on.
        values: (B, R) the value network's estimates of them.
        constant: an estimate of the mean return, from other responses.
    """
    return {
        "none": returns[:, None],
        f"none, scores + {SHIFT:g}": returns[:, None] + SHIFT,
        "constant": returns[:, None] - constant,
        "leave-one-out": leave_one_out(returns, samples)[:, None],
        "value network": to_come - values,  # PPO's, with lam = 1
    }


def gradient(logprobs: torch.Tensor, advantages: torch.Tensor,
             parameters: list[torch.Tensor]) -> torch.Tensor:
    """The mean over responses of sum_t advantage_t grad log pi(y_t|x, y_<t), flat: (P,)."""
    value = (advantages * logprobs).sum() / len(logprobs)
    parts = torch.autograd.grad(value, parameters, retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


def noise_and_signal(products: torch.Tensor) -> tuple[float, float]:
    """trace of the covariance of an estimate, and |its mean|^2, without bias.

    Args:
        products: (M, M) inner products of M independent estimates.
    """
    M = len(products)
    own, total = products.trace().item(), products.sum().item()
    noise = (own - total / M) / (M - 1)
    return noise, total / M**2 - noise / M


def jackknife(statistic: Callable[[torch.Tensor], float], M: int) -> tuple[float, float]:
    """A statistic of M independent measurements and its standard error, from leaving out each of
    them in turn (Efron & Stein 1981). It gets the numbers of those that count."""
    every = torch.arange(M)
    without = torch.tensor([statistic(every[every != m]) for m in range(M)], dtype=torch.float64)
    return statistic(every), math.sqrt((M - 1) * without.var(correction=0).item())


def variances(name: str, policy: GPT, start: pipeline.Start) -> list[dict]:
    """A row for each baseline: the variance of the gradient at this policy, of one response."""
    print(f"the variance of the gradient: {name}", flush=True)
    policy.requires_grad_(True)
    parameters = list(policy.parameters())
    first = roll_out(policy, start, FITTED, generator(0, name, "fit"))
    network, constant = fit_values(first, start), returns_of(first)[0].mean().item()
    found: dict[str, list[torch.Tensor]] = {}  # baseline -> its estimates
    all_returns, all_to_come, all_left = [], [], []
    for batch in range(BATCHES):
        rollout = roll_out(policy, start, BATCH, generator(0, name, batch))
        returns, to_come = returns_of(rollout)
        values = response_values(network, *rollout.samples[:3])
        logprobs = response_logprobs(policy, *rollout.samples[:3])
        for baseline, advantages in advantages_of(returns, to_come, values, constant,
                                                  SAMPLES).items():
            estimate = gradient(logprobs, advantages, parameters)
            found.setdefault(baseline, []).append(estimate)
        all_returns.append(returns)
        all_to_come.append(to_come[rollout.mask])
        all_left.append((to_come - values)[rollout.mask])
    returns, to_come, left = map(torch.cat, (all_returns, all_to_come, all_left))
    explained = 1 - (left.var() / to_come.var()).item()

    products = {}
    for baseline in list(found):
        estimates = torch.stack(found.pop(baseline))  # (M, P)
        products[baseline] = (estimates @ estimates.T).double().cpu()

    def noise(baseline: str, some: torch.Tensor) -> float:
        return BATCH * noise_and_signal(products[baseline][some][:, some])[0]

    def signal(some: torch.Tensor) -> float:  # every baseline has the same mean
        return noise_and_signal(products["constant"][some][:, some])[1]

    rows = []
    for baseline in products:
        row = {"part": "variance", "policy": name, "baseline": baseline}
        for quantity, statistic in {
            "variance": lambda some: noise(baseline, some),
            "ratio": lambda some: noise(baseline, some) / noise("constant", some),
            "responses": lambda some: noise(baseline, some) / signal(some),
        }.items():
            row[quantity], row[f"{quantity}_se"] = jackknife(statistic, BATCHES)
        rows.append({**row, "return_mean": returns.mean().item(),
                     "return_std": returns.std().item(), "explained_variance": explained})
    return rows


# ---- 2) and 3) the runs --------------------------------------------------------------------------

def plan(config: Config) -> list[PlannedRun]:
    """Every run of both parts; the first seed comes first."""
    commands = [(name, command, 1) for name, command in BASELINES.items()]
    for times in QUICK_TIMES if config.quick else TIMES:
        commands += [(name, f"{command} --lr x{times}", times) for name, command in STEPS.items()]
    runs = []
    for seed in range(1 if config.quick else config.seeds):
        for name, command, times in commands:
            run = plan_run(config, name, Method([command]), command, seed)
            runs.append(run._replace(setting=str(times)))
    return runs


def measured(run: PlannedRun) -> dict:
    """The row of a finished run: regret, in nats, of its evaluations and of its every update."""
    log = finished_log(run)
    table = read_json_object(Path(run.config.out) / "evaluation.json", "table")["table"]
    # pi* at this run's beta, in units of the gold reward
    [optimum] = [row for row in table.values() if row["kind"] == "limit"]
    log_z = optimum["reward"] / optimum["beta"] - optimum["kl"]  # J(pi*) / beta
    evaluations = [row for row in log if "eval_reward" in row]
    regret = [log_z - row["eval_reward"] / optimum["beta"] + row["eval_kl"] for row in evaluations]
    # on training prompts, from the responses of each batch
    objective = [row["objective"] / run.config.beta for row in log if "objective" in row]
    rise = max(before - after for before, after in zip(objective, objective[1:]))
    return {"part": "baseline" if run.method in BASELINES else "step size",
            "method": run.method, "times": int(run.setting), "lr": run.config.lr, "seed": run.seed,
            "command": typed(run.config), "step": [row["step"] for row in evaluations],
            "regret": regret, "reward": evaluations[-1]["eval_reward"],
            "kl": evaluations[-1]["eval_kl"], "largest_rise": rise, "seconds": log[-1]["seconds"]}


def over_seeds(rows: list[dict], part: str, method: str, times: int) -> list[dict]:
    return [row for row in rows if row["part"] == part
            and (row["method"], row["times"]) == (method, times)]


def times_of(rows: list[dict]) -> list[int]:
    return sorted({row["times"] for row in rows if row["part"] == "step size"})


# ---- table and figure ----------------------------------------------------------------------------

def markdown(rows: list[dict]) -> str:
    """Three tables: the variances, the regret with each baseline, the regret at each step size."""
    text = ("Variance of the gradient from one response (trace of the covariance), and the "
            "responses that make\nthe noise as large as the gradient:\n\n"
            "| | | variance | over the constant's | responses |\n|---|---|---|---|---|\n")
    for row in rows:
        if row["part"] == "variance":
            text += (f"| {row['policy']} | {row['baseline']} "
                     f"| {number(row['variance'], row['variance_se'], ',.0f')} "
                     f"| {number(row['ratio'], row['ratio_se'], '.2f')} "
                     f"| {number(row['responses'], row['responses_se'], ',.0f')} |\n")

    def cell(found: list[dict], value: Callable[[dict], float], form: str) -> str:
        return number(*mean_se([value(row) for row in found]), form)

    text += ("\nRegret after 100 updates of 64 responses:\n\n"
             "| | regret, nats | gold reward | KL, nats |\n|---|---|---|---|\n")
    for method in BASELINES:
        own = over_seeds(rows, "baseline", method, 1)
        text += (f"| {method} | {cell(own, lambda row: row['regret'][-1], '.2f')} "
                 f"| {cell(own, lambda row: row['reward'], '.3f')} "
                 f"| {cell(own, lambda row: row['kl'], '.2f')} |\n")

    times = times_of(rows)
    head = "| | " + " | ".join(f"x{x}" for x in times) + " |\n" + "|---" * (1 + len(times)) + "|\n"
    for title, value in {
        "Regret at the end, nats, by learning rate": lambda row: row["regret"][-1],
        "Largest rise of the regret from one update to the next, nats":
            lambda row: row["largest_rise"],
    }.items():
        text += f"\n{title}; the SFT policy's is {start_regret(rows):.2f}:\n\n{head}"
        for method in STEPS:
            cells = [cell(over_seeds(rows, "step size", method, x), value, ".1f") for x in times]
            text += f"| {method} | " + " | ".join(cells) + " |\n"
    return text


def start_regret(rows: list[dict]) -> float:
    """The regret of the SFT policy, from which every run starts."""
    return mean_se([row["regret"][0] for row in rows if "regret" in row])[0]


def draw(rows: list[dict], path: Path) -> None:
    """The three questions, side by side."""
    with figure(path, 3, width=5) as (_, axes):
        # 1) bars: the variance with each baseline, at each policy
        found = [row for row in rows if row["part"] == "variance"]
        policies = list(dict.fromkeys(row["policy"] for row in found))
        baselines = list(dict.fromkeys(row["baseline"] for row in found))
        for i, policy in enumerate(policies):
            own = [row for row in found if row["policy"] == policy]
            axes[0].bar([place + 0.4 * i for place in range(len(own))],
                        [row["variance"] for row in own], 0.4,
                        yerr=[row["variance_se"] for row in own], label=policy)
        axes[0].set(yscale="log", ylabel="variance of the gradient from one response",
                    title="a baseline reduces variance")
        axes[0].set_xticks([place + 0.2 for place in range(len(baselines))], baselines, rotation=20)
        axes[0].legend()

        # 2) regret over the updates, with each baseline
        for method in BASELINES:
            own = over_seeds(rows, "baseline", method, 1)
            mean, error = mean_se([row["regret"] for row in own], axis=0)
            axes[1].plot(own[0]["step"], mean, "o-", markersize=3, label=method)
            axes[1].fill_between(own[0]["step"], mean - error, mean + error, alpha=0.2)
        axes[1].set(yscale="log", xlabel="updates of 64 responses", title="and so regret")

        # 3) regret at the end, and the worst update, over the step size
        times = times_of(rows)
        for i, method in enumerate(STEPS):
            own = [over_seeds(rows, "step size", method, x) for x in times]
            mean, error = mean_se([[row["regret"][-1] for row in found] for found in own], axis=1)
            axes[2].errorbar(times, mean, error, fmt="o-", markersize=4, color=f"C{i}",
                             label=method)
            rise = [mean_se([row["largest_rise"] for row in found])[0] for found in own]
            axes[2].plot(times, rise, ":", color=f"C{i}")
        axes[2].set(xscale="log", yscale="log", xlabel="learning rate, times the usual one",
                    title="at the end; dotted: the worst update's rise")
        axes[2].set_xticks(times, [f"x{x}" for x in times])
        axes[2].minorticks_off()
        for axis in axes[1:]:
            axis.axhline(start_regret(rows), color="black", linestyle="--", linewidth=1,
                         label="the SFT policy")
            axis.set(ylabel=r"regret KL$(\pi \,\|\, \pi^*)$, nats per response")
            axis.legend(fontsize=8)


# ---- main ----------------------------------------------------------------------------------------

def main(config: Config) -> None:
    """Build what is missing, run what is not finished, measure, and write rows, table and figure."""
    use_device(config.device)
    folder = Path(config.out)
    check_writable(folder)
    pipeline.require_gold(config.dataset)
    planned = plan(config)
    for run in planned:
        check_folder(run.config)
    sft = pipeline.sft_policy(config.sft, config.dataset, config.preset, config.dtype)
    start = pipeline.load(sft, config.dataset, config.preset, config.dtype)
    start.ref.requires_grad_(False)
    start.gold = pipeline.gold_reward(start)
    start.bank = pipeline.sample_bank(start)

    runs, stopped = run_all(with_sources(planned, start), folder, config.workers)
    if stopped:
        sys.exit(STOPPED)

    trained = next(run.config for run in runs if run.method == TRAINED)
    rows = variances("SFT", load_run(sft)[0], start)
    rows += variances(f"after {trained.steps} updates", load_run(trained.out)[0], start)
    rows += [measured(run) for run in runs]
    text = markdown(rows)
    write_jsonl(folder / "results.jsonl", rows)
    atomic_write(folder / "table.md", text.encode())
    draw(rows, folder / "figure.png")
    print(f"\n{text}\nrows, table and figure  ->  {folder}")


if __name__ == "__main__":
    main(parse(Config, __doc__))
