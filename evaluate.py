"""How good is a policy? Gold reward, KL to the reference, share of the optimum, best-of-n, win
rates, samples.

    python evaluate.py RUN [RUN ...]    # compares finished policies of one task; some seconds
    python evaluate.py RUN --reward FILE.py:function    # by a reward of yours

Every method here maximises  E[r(x, y)] - beta KL(pi || pi_ref)  (Rafailov et al. 2023, Eq. 3),
whose optimum is known:

    pi*(y|x) = pi_ref(y|x) exp(r(x,y) / beta) / Z(x)                                     (Eq. 4)

so the best reward that any policy can have at a given KL can be drawn. The *bank*: N responses a
prompt, sampled once from pi_ref, with their gold rewards. Weighing them by w_i = exp(r_i / beta) /
sum_j exp(r_j / beta) gives, prompt by prompt, reward = sum_i w_i r_i and KL = reward / beta - log
mean_i exp(r_i / beta). The curve stops where the effective sample size 1 / sum_i w_i^2 is too small
to be trusted: N samples cannot show a KL above log N.

KL is in nats per response, summed over its tokens, estimated on the policy's own samples at
temperature 1: log pi(y|x) - log pi_ref(y|x), whose mean is KL(pi || pi_ref). Its standard error
counts prompts, not samples.

Two numbers say how much is missing. *Efficiency*: the KL that the optimum needs for the same
reward, over the KL that was spent. *Regret*: J(pi*) - J(pi) = beta KL(pi || pi*), where J is the
objective above; known where the policy's own beta is.

Reads   finished runs, data/<dataset>/prepared/prompts_test.jsonl
Writes  the bank beside the SFT run; evaluation.json into each run folder
"""
from __future__ import annotations

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, get_args

import torch

from common import fail, pipeline, rewards, tasks
from common.figures import figure
from common.files import read_json_object, write_json, write_jsonl
from common.pairs import sampled_responses
from common.processes import RANK, join
from common.run import Run, check_same_task, load_run
from common.settings import Parser, stop_like_ctrl_c
from common.tokenizer import Tokenizer
from common.training import Device, use_device
from model import GPT, summed_logprobs

SAMPLES = 4  # responses a prompt of the policy that is evaluated
EVAL_SEED = 3000
MIN_ESS = 5.0  # the optimal curve stops where fewer samples than this carry the weight
BEST_OF = (2, 4, 16)  # the n of best of n in the tables

# prompts, responses (texts) -> (B,) in [0, 1]
GoldReward = Callable[[list[str], list[str]], torch.Tensor]


# ---- the optimum and best-of-n, from the bank ----------------------------------------------------

def optimal_weights(rewards: torch.Tensor, beta: float) -> torch.Tensor:
    """w_i = exp(r_i / beta) / sum_j exp(r_j / beta) for each prompt: pi* on the bank. rewards,
    weights: (M, N). Eq. 4."""
    return torch.softmax(rewards.double() / beta, dim=1)


def optimal_kl(rewards: torch.Tensor, beta: float) -> torch.Tensor:
    """KL(pi* || pi_ref) of each prompt, (M,) nats: reward / beta - log mean exp(r / beta)."""
    r = rewards.double() / beta
    return (optimal_weights(rewards, beta) * r).sum(1) - (r.logsumexp(1) - math.log(r.shape[1]))


def effective_sample_size(weights: torch.Tensor) -> torch.Tensor:
    """1 / sum w^2 of each prompt, (M,)."""
    return 1 / weights.square().sum(1)


def best_of_n_weights(rewards: torch.Tensor, n: int) -> torch.Tensor:
    """The chance of each bank response to be the best of n drawn without replacement, (M, N).

    The response of rank k from below (1..N) wins if the other n - 1 come from the k - 1 below it:
    C(k-1, n-1) / C(N, n).
    """
    N = rewards.shape[1]
    chance = torch.tensor([math.comb(k, n - 1) / math.comb(N, n) for k in range(N)],
                          dtype=torch.float64)
    weights = torch.empty(rewards.shape, dtype=torch.float64)
    return weights.scatter_(1, rewards.argsort(1), chance.expand(len(rewards), N))


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n: an upper bound on KL(best-of-n || pi_ref), in nats (Beirami et al.
    2024)."""
    return math.log(n) - (n - 1) / n


def optimal_curve(rewards: torch.Tensor, points: int = 60) -> list[dict[str, float]]:
    """The best reward at each KL: beta, kl, reward and effective sample size, by falling beta, as
    far as the bank goes."""
    curve: list[dict[str, float]] = []
    # a unit for rewards of any size, and 1 for most that lie in [0, 1]: a power of ten, so that one
    # grid of betas serves all of them
    std = rewards.double().std().item() or 1.0
    unit = 10.0 ** math.ceil(math.log10(std))
    for beta in (unit * torch.logspace(1.5, -3, points, dtype=torch.float64)).tolist():
        weights = optimal_weights(rewards, beta)
        ess = effective_sample_size(weights).mean().item()
        if curve and ess < MIN_ESS:
            break
        curve.append({"beta": beta, "kl": optimal_kl(rewards, beta).mean().item(),
                      "reward": (weights * rewards).sum(1).mean().item(), "ess": ess})
    return curve


def optimal_reward(curve: list[dict[str, float]], kl: float) -> tuple[float, bool]:
    """The optimal reward at this KL, interpolated on the curve; False if the KL lies beyond its end
    (then a lower bound)."""
    if kl <= curve[0]["kl"]:
        return curve[0]["reward"], True
    for a, b in zip(curve, curve[1:]):
        if kl <= b["kl"]:
            return a["reward"] + (b["reward"] - a["reward"]) * (kl - a["kl"]) / (b["kl"] -
                                                                                 a["kl"]), True
    return curve[-1]["reward"], False


def share_of_optimum(curve: list[dict[str, float]], reward: float, kl: float,
                     ref_reward: float) -> tuple[float, bool]:
    """(reward - reward of pi_ref) / (optimal reward at the same KL - reward of pi_ref); False: an
    upper bound, because the optimal reward at this KL is only known to be at least that of the
    curve's end."""
    best, known = optimal_reward(curve, kl)
    return (reward - ref_reward) / max(best - ref_reward, 1e-9), known


def kl_needed(curve: list[dict[str, float]], reward: float) -> float | None:
    """The KL at which the optimum has this reward, in nats, interpolated on the curve; None where
    the curve does not go: beyond its end, or no better than the reference."""
    for a, b in zip(curve, curve[1:]):
        if a["reward"] < reward <= b["reward"]:
            part = (reward - a["reward"]) / (b["reward"] - a["reward"])
            return a["kl"] + part * (b["kl"] - a["kl"])
    return None


def kl_efficiency(curve: list[dict[str, float]], reward: float, kl: float) -> float | None:
    """The KL that the optimum needs for this reward, over the KL that was spent on it. Unlike the
    share of the optimum it does not rise by itself where the reward saturates."""
    needed = kl_needed(curve, reward)
    return None if needed is None or kl <= 0 else needed / kl


def regret(bank_rewards: torch.Tensor, rewards: torch.Tensor, kl: torch.Tensor,
           beta: float) -> torch.Tensor:
    """J(pi*) - J(pi) = beta KL(pi || pi*) of each prompt, (M,), where J = reward - beta KL.

    J(pi*) = beta log mean exp(r / beta). The identity is exact: it is Eq. 4 put into J.

    Args:
        bank_rewards: (M, N) of the reference's responses.
        rewards, kl: (M,) means of the policy.
    """
    best = (bank_rewards.double() / beta).logsumexp(1) - math.log(bank_rewards.shape[1])
    return beta * best - (rewards - beta * kl)


def beta_at(rewards: torch.Tensor, kl: float, curve: list[dict[str, float]]) -> float:
    """The beta whose optimum has this KL, by bisection on log beta; at most as far as the curve
    goes."""
    low, high = math.log(curve[-1]["beta"]), math.log(curve[0]["beta"])
    for _ in range(40):
        middle = (low + high) / 2
        if optimal_kl(rewards, math.exp(middle)).mean() > kl:
            low = middle
        else:
            high = middle
    return math.exp(high)


def win_rate(a: torch.Tensor, b: torch.Tensor) -> float:
    """How often a response of one policy has a higher gold reward than one of another to the same
    prompt; ties count half.

    a (M, N_a), b (M, N_b): all N_a N_b comparisons of each prompt. Rewards are compared to six
    digits, which is what a bank
    keeps of them: an equal reward must not win by its seventh.
    """
    difference = a.round(decimals=6)[:, :, None] - b.round(decimals=6)[:, None, :]
    return ((difference > 0).float() + 0.5 * (difference == 0).float()).mean().item()


# ---- the bank, and a policy's samples ------------------------------------------------------------

@dataclass
class Bank:
    """Responses of the reference to the test prompts: M prompts, N responses each."""
    prompts: list[str]
    rewards: torch.Tensor | None  # (M, N) their gold rewards, or what is maximised in its place
    lengths: torch.Tensor  # (M, N) their tokens, EOS counted
    responses: list[list[str]]
    gold: str = "exact, as the task defines it"  # what that reward is, in words
    column: str = "gold reward"  # what it is called in the table


@dataclass
class PolicySamples:
    """What a policy did on the bank's prompts; every tensor (M, samples)."""
    rewards: torch.Tensor | None  # gold rewards, or those of start.measure; None without any
    kl: torch.Tensor  # log pi(y|x) - log pi_ref(y|x) of the policy's own samples, nats
    lengths: torch.Tensor  # tokens of the responses, EOS counted
    responses: list[list[str]]


def sample_policy(policy: GPT, ref: GPT, tokenizer: Tokenizer, prompts: list[str],
                  gold: GoldReward | None, samples: int = SAMPLES,
                  seed: int = EVAL_SEED) -> PolicySamples:
    """Sample the policy and score its responses under itself, the reference and the gold reward."""
    max_length = min(policy.config.block_size, ref.config.block_size)
    parts, texts = sampled_responses(policy,
                                     tokenizer,
                                     prompts,
                                     samples,
                                     seed,
                                     max_length=max_length,
                                     description="evaluating")
    kl = torch.cat([
        part.logprobs.sum(1) - summed_logprobs(ref, part.tokens, part.prompt_lengths, part.lengths)
        for part in parts
    ])
    rewards = None
    if gold:
        rewards = gold([prompt for prompt in prompts for _ in range(samples)],
                       texts).view(-1, samples)
    lengths = torch.cat([part.lengths - part.prompt_lengths for part in parts])
    responses = [texts[i:i + samples] for i in range(0, len(texts), samples)]
    return PolicySamples(rewards, kl.view(-1, samples), lengths.view(-1, samples), responses)


def log_evaluation(run: Run, step: int, policy: GPT, start: pipeline.Start) -> None:
    """Log gold reward, KL and length after `step` steps of training, as eval_reward, eval_kl, ...:
    some 512 responses."""
    with run.paused():
        prompts = start.bank.prompts
        sampled = sample_policy(policy, start.ref, start.tokenizer, prompts, start.measure,
                                max(1, 512 // len(prompts)))
        row = policy_row(sampled)
        run.log(step=step,
                **{f"eval_{name}": value
                   for name, value in row.items() if name != "kind"})
        if RANK == 0:
            draw_progress(run, start.bank)


# ---- the table -----------------------------------------------------------------------------------

def table_row(kind: str, reward: torch.Tensor | None, kl: torch.Tensor, length: torch.Tensor,
              regret: torch.Tensor | None = None) -> dict:
    """A row of the table from per-prompt means (M,): each quantity that there is, with its standard
    error.

    Args:
        kind: what the row is of: reference, policy, best of n, optimum (at a policy's KL) or limit
            (of a run, in theory).
    """
    row: dict = {"kind": kind}
    for name, values in (("reward", reward), ("kl", kl), ("length", length),
                         ("regret", regret)):
        if values is not None:
            row[name] = values.mean().item()
            std = values.std(correction=min(1, len(values) - 1))  # a single prompt has no error
            row[f"{name}_se"] = (std / math.sqrt(len(values))).item()
    return row


def policy_row(sampled: PolicySamples, bank: Bank | None = None,
               end_beta: float | None = None) -> dict:
    """The row of a policy, from its samples; with its regret, if the beta at which it must end is
    known."""
    rewards = None if sampled.rewards is None else sampled.rewards.mean(1)
    kl, length = sampled.kl.mean(1), sampled.lengths.float().mean(1)
    if not end_beta:
        return table_row("policy", rewards, kl, length)
    row = table_row("policy", rewards, kl, length, regret(bank.rewards, rewards, kl, end_beta))
    return row | {"beta": end_beta, "kl_to_optimum": row["regret"] / end_beta}


def bank_row(kind: str, bank: Bank, weights: torch.Tensor, kl: torch.Tensor) -> dict:
    """The same of the bank's responses, weighed by `weights` (M, N)."""
    return table_row(kind, (weights * bank.rewards).sum(1), kl, (weights * bank.lengths).sum(1))


def limit_row(bank: Bank, weights: torch.Tensor) -> dict:
    """The row of where a method ends in theory, if that is the bank's responses weighed by
    `weights` (M, N): of N equally likely ones its KL is sum_i w_i log(N w_i)."""
    kl = torch.special.xlogy(weights, weights * weights.shape[1]).sum(1)
    return bank_row("limit", bank, weights, kl) | {"share": None, "share_known": True}


def summary(bank: Bank,
            policies: dict[str, PolicySamples],
            end_beta: float | None = None) -> dict[str, dict]:
    """The rows of the results table, by name: reward, KL, share of the optimum, KL efficiency,
    response length, with standard errors; and the regret, where the policy's own beta is known.

    Args:
        policies: name -> what sample_policy returned.
        end_beta: the beta at which the gold reward's optimum is where the run must end in theory,
            if there is one: the policies' own.
    """
    M, N = bank.lengths.shape
    lengths = bank.lengths.float().mean(1)
    if bank.rewards is None:  # nothing to be the best of
        return {"SFT": table_row("reference", None, torch.zeros(M), lengths),
                **{name: policy_row(policy) for name, policy in policies.items()}}
    curve = optimal_curve(bank.rewards)
    ref_reward = bank.rewards.mean().item()
    rows = {"SFT": table_row("reference", bank.rewards.mean(1), torch.zeros(M), lengths)}
    for name, policy in policies.items():
        rows[name] = policy_row(policy, bank, end_beta)
        rows[name]["win_rate_over_sft"] = win_rate(policy.rewards, bank.rewards)
    for n in BEST_OF:
        if n < N:
            bound = torch.full((M,), best_of_n_kl(n))
            rows[f"best of {n}"] = bank_row("best of n", bank, best_of_n_weights(bank.rewards, n),
                                            bound)

    betas = {}  # the name of a row -> its kind, and the beta of its optimum
    for name in policies:
        kl = rows[name]["kl"]
        within = optimal_reward(curve, kl)[1]
        title = f"optimum at the KL of {name}"
        if not within:
            title = "optimum (largest KL known)"
        betas[title] = ("optimum", beta_at(bank.rewards, kl, curve))
    if end_beta:
        betas["limit of this run in theory"] = ("limit", end_beta)
    for name, (kind, beta) in betas.items():
        weights = optimal_weights(bank.rewards, beta)
        rows[name] = bank_row(kind, bank, weights, optimal_kl(bank.rewards, beta))
        rows[name] |= {
            "beta": beta, "effective_sample_size": effective_sample_size(weights).mean().item()
        }

    for row in rows.values():
        gain = optimal_reward(curve, row["kl"])[0] - ref_reward
        row["share"], row["share_known"] = share_of_optimum(curve, row["reward"], row["kl"],
                                                            ref_reward)
        # next to the reference there is hardly anything to gain, and a share of it would be noise
        # divided by noise
        if gain < 3 * math.hypot(rows["SFT"]["reward_se"], row["reward_se"]):
            row["share"] = None
        if row["kind"] == "policy":
            efficiency = kl_efficiency(curve, row["reward"], row["kl"])
            row["kl_efficiency"] = None if row["share"] is None else efficiency
    return rows


def print_table(rows: dict[str, dict], gold: str, column: str = "gold reward") -> None:
    width = max(map(len, rows))
    if not any("reward" in row for row in rows.values()):
        print(f"\n{'':{width}}  {'KL, nats':>14}  {'length':>12}")
        for name, row in rows.items():
            print(f"{name:{width}}  {row['kl']:6.2f} +- {row['kl_se']:4.2f}  "
                  f"{row['length']:5.1f} +- {row['length_se']:3.1f}")
        return
    print(f"\n{'':{width}}  {column:>15}  {'KL, nats':>14}  {'of optimum':>10}  "
          f"{'efficiency':>10}  {'length':>6}  {'wins vs SFT':>11}")
    for name, row in rows.items():
        reward = f"{row['reward']:.3f} +- {row['reward_se']:.3f}"
        kl = f"{row['kl']:.2f} +- {row['kl_se']:.2f}"
        if row["kind"] == "best of n":  # a bound
            kl = f"<= {row['kl']:.2f}"
        at_most = "" if row["share_known"] else "<= "
        share = "" if row["share"] is None else f"{at_most}{row['share']:.0%}"
        if at_most and row["share"] and row["share"] > 1:  # a bound that says nothing
            share = ""
        used = row.get("kl_efficiency")
        efficiency = "" if used is None else f"{used:.0%}"
        wins = f"{row['win_rate_over_sft']:.0%}" if "win_rate_over_sft" in row else ""
        print(f"{name:{width}}  {reward:>15}  {kl:>14}  {share:>10}  {efficiency:>10}  "
              f"{row['length']:6.1f}  {wins:>11}")
    for name, row in rows.items():
        if "regret" in row:
            error = row["regret_se"] / row["beta"]
            print(f"{name} is {row['kl_to_optimum']:.2f} +- {error:.2f} nats from its limit in "
                  "theory: KL(policy || limit)")
    print(f"{column}: {gold}")


# ---- what every run ends with --------------------------------------------------------------------

SHOWN = 3  # prompts whose responses are printed


@dataclass
class Report:
    """What was measured of a finished policy: the table, and its samples beside the reference's."""
    name: str
    bank: Bank
    rows: dict[str, dict]
    sampled: PolicySamples
    pairs: str = ""  # how it does on the user's own held-out pairs, in a line
    # of the user's held-out pairs, where the bank's prompts are the task's: prompt, and what SFT
    # and the policy say
    examples: list[tuple[str, str, str]] = field(default_factory=list)

    def show(self) -> None:
        """Print the table, and the first responses of SFT and of the policy to the first prompts
        with their rewards; what there is of the user's own pairs comes first."""
        if self.pairs:
            print(f"\n{self.pairs}")
        for prompt, before, after in self.examples:
            print(f"\nprompt    {prompt!r}\n  before  {before.strip()}\n  after   {after.strip()}")
        if self.examples:
            print("\nOf the task's own prompts, which these pairs need not be about:")
        print_table(self.rows, self.bank.gold, self.bank.column)
        for i in range(0 if self.examples else min(SHOWN, len(self.bank.prompts))):
            before, after = "", ""  # their rewards, if there are any
            if self.bank.rewards is not None:
                before = f"{self.bank.rewards[i, 0]:.2f}  "
                after = f"{self.sampled.rewards[i, 0]:.2f}  "
            print(f"\nprompt      {self.bank.prompts[i]!r}")
            print(f"  before {before}{self.bank.responses[i][0].strip()}")
            print(f"  after  {after}{self.sampled.responses[i][0].strip()}")


def show_samples(model: GPT, tokenizer: Tokenizer, prompts: list[str]) -> None:
    """Print a response to each of the first prompts that leave room for one."""
    fits = [prompt for prompt in prompts
            if len(tokenizer.encode(prompt)) + 1 < model.config.block_size][:SHOWN]
    for prompt, text in zip(fits, sampled_responses(model, tokenizer, fits, 1, EVAL_SEED)[1]):
        print(f"\nprompt    {prompt!r}\n  sample  {text.strip()}")


def of_own_pairs(policy: GPT, start: pipeline.Start, result: dict) -> dict:
    """What a Report says of the user's held-out pairs.

    Args:
        result: with held_out_accuracy, held_out_loss and held_out_margin, if any are held out.
    """
    numbers = start.split()[1].tolist() if start.own_pairs else []
    if not numbers:
        return {}
    line = (f"{len(numbers)} held-out pairs of {start.pairs_file}: accuracy "
            f"{result['held_out_accuracy']:.3f}, loss {result['held_out_loss']:.3f}, implicit "
            f"reward of chosen less rejected {result['held_out_margin']:+.3f}")
    if tasks.is_own(start.dataset):  # the bank's prompts are theirs
        return {"pairs": line}
    held = dict.fromkeys(start.tokenizer.decode(start.pairs[i].prompt) for i in numbers)
    prompts = list(held)[:SHOWN]
    before, after = (sampled_responses(model, start.tokenizer, prompts, 1, EVAL_SEED)[1]
                     for model in (start.ref, policy))
    return {"pairs": line, "examples": list(zip(prompts, before, after))}


def report(run: Run, name: str, policy: GPT, start: pipeline.Start, end_beta: float | None,
           result: dict) -> Report:
    """Measure a trained policy, and write evaluation.json and samples.jsonl into its folder.
    Nothing is printed yet: that comes last, when all is written."""
    sampled = sample_policy(policy, start.ref, start.tokenizer, start.bank.prompts, start.measure)
    rows = summary(start.bank, {name: sampled}, end_beta)
    scored = sampled.rewards is not None
    # so that two methods can be compared prompt by prompt
    measured = {"reward": sampled.rewards, "kl": sampled.kl} if scored else {"kl": sampled.kl}
    per_prompt = {key: [round(mean, 5) for mean in values.mean(1).tolist()]
                  for key, values in measured.items()}
    write_json(run.folder / "evaluation.json", {**result, "name": name, "gold": start.bank.gold,
                                                "table": rows, "per_prompt": per_prompt})
    samples = []
    real = tasks.load(start.dataset).real
    for i, prompt in enumerate(start.bank.prompts):
        samples.append({
            "task": start.dataset,
            **({"id": tasks.prompt_id(prompt)} if real else {"prompt": prompt}),
            "before": start.bank.responses[i][0],
            **({"before_reward": start.bank.rewards[i, 0].item()} if scored else {}),
            "after": sampled.responses[i][0],
            **({"after_reward": sampled.rewards[i, 0].item()} if scored else {})
        })
    write_jsonl(run.folder / "samples.jsonl", samples)
    return Report(name, start.bank, rows, sampled, **of_own_pairs(policy, start, result))


def draw_run(path: Path,
             title: str,
             curves: dict[str, tuple[list[float], list[float]]],
             report: Report,
             level: tuple[float, str] | None = None) -> None:
    """figure.png of a run. Left: named curves (x, y) over the training steps. Right, if there is a
    reward: it against the KL, with the optimum.

    Args:
        level: a height to mark on the left, and what it is.
    """
    scored = report.bank.rewards is not None
    with figure(path, 2 if scored else 1) as (_, axes):
        left = axes[0] if scored else axes
        for name, (steps, values) in curves.items():
            left.plot(steps, values, label=name)
        if level:
            left.axhline(level[0], color="black", linestyle=":", linewidth=1, label=level[1])
        left.set(xlabel="step", title=title)
        left.legend(fontsize=8)
        if scored:
            draw_frontier(axes[1], report.bank, report.rows)
            axes[1].set_title(f"test prompts: {report.bank.column} against KL")


def draw_progress(run: Run, bank: Bank) -> None:
    """figure.png of a run that is still training: its evaluations so far below the optimum, or,
    where there is no reward, the KL over the steps. Drawn again with every evaluation."""
    with figure(run.folder / "figure.png") as (_, axis):
        if bank.rewards is None:
            axis.plot(*logged(run.rows, "eval_kl"), "o-")
            axis.set(xlabel="step", ylabel="KL to the reference, nats per response")
        else:
            path = logged(run.rows, "eval_kl")[1], logged(run.rows, "eval_reward")[1]
            axis.plot(*path, "o-", color="tab:red", label="this run so far")
            draw_frontier(axis, bank, {})
        axis.set_title(f"after {run.rows[-1]['step']} steps")


def logged(rows: list[dict], name: str) -> tuple[list[float], list[float]]:
    """A logged value over the steps."""
    rows = [row for row in rows if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]


def smoothed(rows: list[dict], name: str) -> tuple[list[float], list[float]]:
    """A logged value over the steps, as a moving mean over a fortieth of them."""
    steps, values = logged(rows, name)
    window = max(1, len(values) // 40)
    return steps[window - 1:], torch.tensor(values).unfold(0, window, 1).mean(1).tolist()


def draw_frontier(axis, bank: Bank, rows: dict[str, dict]) -> None:
    """Gold reward against KL: the optimal curve, best-of-n, and every policy with its standard
    errors."""
    curve = optimal_curve(bank.rewards)
    axis.plot([p["kl"] for p in curve], [p["reward"] for p in curve],
              color="black",
              label=r"optimum $\pi^*_\beta$")
    best = [row for row in rows.values() if row["kind"] == "best of n"]
    if best:
        axis.plot([row["kl"] for row in best], [row["reward"] for row in best], "o:",
                  color="tab:gray", label="best of 2, 4, 16 (KL bound)")
    for name, row in rows.items():
        if row["kind"] in ("reference", "policy"):
            axis.errorbar(row["kl"],
                          row["reward"],
                          row["reward_se"],
                          row["kl_se"],
                          fmt="o",
                          capsize=2,
                          label=name)
        elif row["kind"] == "limit":
            axis.plot(row["kl"], row["reward"], "*", color="black", markersize=12, label=name)
    axis.set(xlabel=r"KL$(\pi \,\|\, \pi_{ref})$, nats per response", ylabel=bank.column)
    axis.legend(loc="lower right", fontsize=8)


# ---- several finished policies, side by side -----------------------------------------------------

def main(runs: list[str], reward: str = "") -> None:
    """Evaluate finished policies of one task, and print how often each wins over each other.

    Args:
        reward: FILE.py:function, or the folder of a run (a reward model, or a policy for its
            implicit reward), in place of the gold one.
    """
    for run in runs:
        if not (Path(run) / "model.pt").exists():
            fail(f"{run}: no finished run there (no model.pt)")
    configs = [read_json_object(Path(run) / "config.json", "dataset", "preset") for run in runs]
    references = {reference_of(run, config).resolve() for run, config in zip(runs, configs)}
    if len(references) > 1:
        fail(f"these runs have different references ({', '.join(map(str, sorted(references)))}): "
             "evaluate them apart")
    start = pipeline.load(references.pop(), configs[0]["dataset"], configs[0]["preset"])

    names = [Path(run).name for run in runs]
    names = runs if len(set(names)) < len(names) else names
    policies = {}
    for name, run in zip(names, runs):
        policies[name], meta = load_run(run)
        check_same_task(run, meta,
                        {"dataset": start.dataset, "tokenizer": start.tokenizer.fingerprint})
    if not tasks.is_own(start.dataset):
        start.gold = pipeline.gold_reward(start)
    if reward and rewards.is_own(reward):
        start.measured_by = rewards.own_reward(reward)
    elif reward:
        start.measured_by = pipeline.reward_of_run(reward, start)
    start.bank = pipeline.measured_bank(start)
    sampled = {
        name: sample_policy(policy, start.ref, start.tokenizer, start.bank.prompts, start.measure)
        for name, policy in policies.items()
    }

    rows = summary(start.bank, sampled)
    for run in runs:
        path = Path(run) / "evaluation.json"  # what training wrote there stays
        write_json(path, (read_json_object(path) if path.exists() else {}) | {"compared": rows})
    print_table(rows, start.bank.gold, start.bank.column)
    for i, a in enumerate(names if start.measure else []):
        for b in names[i + 1:]:
            print(f"{a} wins over {b}: {win_rate(sampled[a].rewards, sampled[b].rewards):.1%} of "
                  "comparisons")


def reference_of(run: str, config: dict) -> Path:
    """The SFT policy that a run was trained from: the one it names, or else the folder "sft" beside
    it."""
    if config.get("sft"):
        return Path(config["sft"])
    # Preferred-FT is trained from its --init
    chosen = config.get("on") == "chosen" and config.get("init")
    return Path(config["init"]) if chosen else Path(run).parent / "sft"


if __name__ == "__main__":
    stop_like_ctrl_c()
    join()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", help="folders of finished runs: sft, dpo, ...")
    parser.add_argument("--reward", default="",
                        help="FILE.py:function or a reward model's run, in place of the gold one")
    parser.add_argument("--device", choices=get_args(Device), default="auto",
                        help="where it is computed; auto = CUDA where there is one, else the CPU")
    given = parser.parse_args()
    use_device(given.device)
    main(given.run, given.reward)
