"""How good is a policy? Gold reward, KL to the reference, share of the optimum, best-of-n, win rates, samples.

    python evaluate.py runs/reviews/dpo-beta0.1-seed0 [RUN ...]     # compares any finished policies, half a minute

Every method here maximises  E[r(x, y)] - beta KL(pi || pi_ref)  (Rafailov et al. 2023, Eq. 3), whose optimum is known:

    pi*(y|x) = pi_ref(y|x) exp(r(x,y) / beta) / Z(x)                                     (Eq. 4)

so the best reward that any policy can have at a given KL can be drawn. The *bank*: N responses a prompt, sampled once
from pi_ref, with their gold rewards. Weighing them by w_i = exp(r_i / beta) / sum_j exp(r_j / beta) gives, prompt by
prompt, reward = sum_i w_i r_i and KL = reward / beta - log mean_i exp(r_i / beta). The curve stops where the effective
sample size 1 / sum_i w_i^2 is too small to be trusted: N samples cannot show a KL above log N.

KL is in nats per response, summed over its tokens, estimated on the policy's own samples at temperature 1:
log pi(y|x) - log pi_ref(y|x), whose mean is KL(pi || pi_ref). Its standard error counts prompts, not samples.

Reads   finished runs, data/<dataset>/prepared/prompts_test.jsonl
Writes  the bank beside the SFT run; evaluation.json into each run folder
"""
from __future__ import annotations

import argparse
import hashlib
import importlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch

from common import fail
from common.files import read_json, read_jsonl, write_json, write_jsonl
from common.run import Run, compare_settings
from common.settings import Parser
from common.training import autocast, device, fingerprint, pad
from common.tasks import ensure as ensure_data
from common.pairs import sampled_responses
from common.tokenizer import Tokenizer
from common.run import load_run
from model import GPT, ScalarModel, summed_logprobs

# (dataset, preset): test prompts, and bank responses for each
SIZES = {("reviews", "cpu"): (128, 256), ("posts", "cpu"): (128, 64), ("tldr", "cpu"): (128, 64), ("imdb", "cpu"): (256, 64),
         ("imdb", "gpu"): (512, 256)}
SAMPLES = 4  # responses a prompt of the policy that is evaluated
BANK_SEED, EVAL_SEED = 2000, 3000
MIN_ESS = 5.0  # the optimal curve stops where fewer samples than this carry the weight

GoldReward = Callable[[list[str], list[str]], torch.Tensor]  # prompts, responses (texts) -> (B,) in [0, 1]


# ---- the optimum and best-of-n, from the bank ------------------------------------------------------------------------

def optimal_weights(rewards: torch.Tensor, beta: float) -> torch.Tensor:
    """w_i = exp(r_i / beta) / sum_j exp(r_j / beta) for each prompt: pi* on the bank. rewards, weights: (M, N). Eq. 4."""
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

    The response of rank k from below (1..N) wins if the other n - 1 come from the k - 1 below it: C(k-1, n-1) / C(N, n).
    """
    N = rewards.shape[1]
    chance = torch.tensor([math.comb(k, n - 1) / math.comb(N, n) for k in range(N)], dtype=torch.float64)
    return torch.empty(rewards.shape, dtype=torch.float64).scatter_(1, rewards.argsort(1), chance.expand(len(rewards), N))


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n: an upper bound on KL(best-of-n || pi_ref), in nats (Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n


def frontier(rewards: torch.Tensor, points: int = 60) -> list[dict[str, float]]:
    """The optimal curve: beta, kl, reward and effective sample size, by falling beta, as far as the bank carries it."""
    curve = []
    for beta in torch.logspace(1.5, -3, points, dtype=torch.float64).tolist():
        weights = optimal_weights(rewards, beta)
        ess = effective_sample_size(weights).mean().item()
        if curve and ess < MIN_ESS:
            break
        curve.append({"beta": beta, "kl": optimal_kl(rewards, beta).mean().item(),
                      "reward": (weights * rewards).sum(1).mean().item(), "ess": ess})
    return curve


def optimal_reward(curve: list[dict[str, float]], kl: float) -> tuple[float, bool]:
    """The optimal reward at this KL, interpolated on the curve; False if the KL lies beyond its end (then a lower bound)."""
    if kl <= curve[0]["kl"]:
        return curve[0]["reward"], True
    for a, b in zip(curve, curve[1:]):
        if kl <= b["kl"]:
            return a["reward"] + (b["reward"] - a["reward"]) * (kl - a["kl"]) / (b["kl"] - a["kl"]), True
    return curve[-1]["reward"], False


def share_of_optimum(curve: list[dict[str, float]], reward: float, kl: float, ref_reward: float) -> tuple[float, bool]:
    """(reward - reward of pi_ref) / (optimal reward at the same KL - reward of pi_ref); False: an upper bound, because the
    optimal reward at this KL is only known to be at least that of the curve's end."""
    best, known = optimal_reward(curve, kl)
    return (reward - ref_reward) / max(best - ref_reward, 1e-9), known


def mean_and_error(per_prompt: torch.Tensor) -> tuple[float, float]:
    """Mean over prompts (M,) and its standard error."""
    return per_prompt.mean().item(), (per_prompt.std() / math.sqrt(len(per_prompt))).item()


# ---- gold reward -----------------------------------------------------------------------------------------------------

def has_exact_reward(dataset: str) -> bool:
    return hasattr(importlib.import_module(f"data.{dataset}"), "gold_reward")


def gold_reward(dataset: str, base: Path) -> GoldReward:
    """The task's gold reward: the model in base/gold if there is one, else the exact reward that the task defines.

    A model of pairs gives sigmoid(score of prompt, response and <eos>), a classifier of labels P(positive).
    """
    folder = base / "gold"
    if has_exact_reward(dataset) and not (folder / "model.pt").exists():
        exact = importlib.import_module(f"data.{dataset}").gold_reward
        return lambda prompts, responses: torch.tensor([exact(p + r) for p, r in zip(prompts, responses)])
    model, _ = load_run(folder, ScalarModel)
    tokenizer = Tokenizer.load(folder / "tokenizer.tiktoken")
    if read_json(folder / "config.json")["on"] == "pairs":
        return lambda prompts, responses: torch.sigmoid(pair_scores(model, tokenizer, prompts, responses))
    return lambda prompts, responses: torch.sigmoid(
        classifier_logits(model, tokenizer, [p + r for p, r in zip(prompts, responses)])).cpu()


def reward_name(dataset: str, base: Path) -> str:
    """What the gold reward is, for a table that reports it."""
    if (base / "gold" / "model.pt").exists():
        return f"the model in {base / 'gold'}, trained on {read_json(base / 'gold' / 'config.json')['on']}"
    return getattr(importlib.import_module(f"data.{dataset}"), "REWARD_NAME", "exact, as the task defines it")


def pair_scores(model: ScalarModel, tokenizer: Tokenizer, prompts: list[str], responses: list[str]) -> torch.Tensor:
    """A pairwise reward model's score of each response, (B,), encoded as in training: <bos> prompt response <eos>."""
    encoded = zip(*map(tokenizer.encode_batch, (prompts, responses)))
    tokens, lengths = pad([[tokenizer.bos] + prompt + response + [tokenizer.eos] for prompt, response in encoded], tokenizer.pad)
    if int(lengths.max()) > model.config.block_size:
        fail(f"a prompt and response have {int(lengths.max())} tokens, the block size of the reward model is "
             f"{model.config.block_size}")
    return all_scores(model, tokens, lengths)


def all_scores(model: ScalarModel, tokens: torch.Tensor, lengths: torch.Tensor, dtype: str = "auto") -> torch.Tensor:
    """The score of every row, (N,), without gradient. Equal rows (a response is in several pairs) are scored once."""
    different, where = torch.unique(torch.cat([tokens, lengths[:, None]], 1), dim=0, return_inverse=True)
    tokens, lengths = different[:, :-1], different[:, -1]
    scores = torch.empty(len(tokens))
    with torch.no_grad():
        for rows in lengths.argsort(stable=True).split(256):
            with autocast(dtype):
                scores[rows] = model.score(tokens[rows, :int(lengths[rows].max())].to(device()),
                                           lengths[rows].to(device())).cpu()
    return scores[where]


@torch.no_grad()
def classifier_logits(model: ScalarModel, tokenizer: Tokenizer, texts: list[str], dtype: str = "auto") -> torch.Tensor:
    """log-odds of "positive", (B,). A text longer than the block is cut into windows, whose log-odds are averaged by length."""
    size, windows, owner = model.config.block_size - 1, [], []
    for i, ids in enumerate(tokenizer.encode_batch(texts)):
        for start in range(0, max(len(ids), 1), size):
            windows.append([tokenizer.bos] + ids[start:start + size])
            owner.append(i)
    lengths = torch.tensor([len(w) for w in windows])
    logits = torch.zeros(len(windows))
    for rows in lengths.argsort(stable=True).split(256):
        tokens = torch.full((len(rows), int(lengths[rows].max())), tokenizer.pad)
        for j, i in enumerate(rows.tolist()):
            tokens[j, :lengths[i]] = torch.tensor(windows[i])
        with autocast(dtype):
            logits[rows] = model.score(tokens.to(device()), lengths[rows].to(device())).cpu()
    owner, weight = torch.tensor(owner), lengths.float()
    return (torch.zeros(len(texts)).index_add(0, owner, logits * weight)
            / torch.zeros(len(texts)).index_add(0, owner, weight))


# ---- the bank, and a policy's samples --------------------------------------------------------------------------------

@dataclass
class Bank:
    prompts: list[str]
    rewards: torch.Tensor  # (M, N) gold rewards of pi_ref's responses
    lengths: torch.Tensor  # (M, N) tokens of the responses, EOS counted
    responses: list[list[str]]
    gold: str = "exact, as the task defines it"  # what `rewards` are, in words


def ensure_bank(base: Path, dataset: str, preset: str, ref: GPT, tokenizer: Tokenizer, weights: str,
                gold: GoldReward) -> Bank:
    """The bank of a runs folder, sampled from the reference policy if it is missing; bank.jsonl has a row a prompt."""
    M, N = SIZES.get((dataset, preset), SIZES["reviews", "cpu"])
    folder = base / "bank"
    settings = {"dataset": dataset, "prompts": M, "responses": N, "seed": BANK_SEED, "policy": weights}
    compare_settings(folder, settings, f"delete {folder} to sample the bank again")
    path = folder / "bank.jsonl"
    if not path.exists():
        write_json(folder / "config.json", settings)  # first: a bank without its settings would pass for any other
        prompts = test_prompts(dataset)[:M]
        parts, texts = sampled_responses(ref, tokenizer, prompts, N, BANK_SEED,
                                         description=f"bank: {N} responses to {len(prompts)} test prompts")
        rewards = gold([p for p in prompts for _ in range(N)], texts).view(-1, N).tolist()
        lengths = torch.cat([part.lengths - part.prompt_lengths for part in parts]).view(-1, N).tolist()
        write_jsonl(path, ({"prompt": prompt, "rewards": [round(r, 6) for r in rewards[i]], "lengths": lengths[i],
                            "responses": texts[i * N:(i + 1) * N]} for i, prompt in enumerate(prompts)))
    rows = read_jsonl(path, {"prompt": str, "rewards": list, "lengths": list, "responses": list})
    return Bank([row["prompt"] for row in rows], torch.tensor([row["rewards"] for row in rows]),
                torch.tensor([row["lengths"] for row in rows]), [row["responses"] for row in rows], reward_name(dataset, base))


def prompt_id(prompt: str) -> str:
    """What stands for a prompt where its text may not be repeated: the first 12 hex digits of its SHA-256."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:12]


def test_prompts(dataset: str) -> list[str]:
    return [row["prompt"] for row in read_jsonl(ensure_data(dataset) / "prompts_test.jsonl", {"prompt": str})]


@dataclass
class Policy:
    """What a policy did on the bank's prompts; every tensor (M, samples)."""
    rewards: torch.Tensor
    kl: torch.Tensor  # log pi(y|x) - log pi_ref(y|x) of the policy's own samples, nats
    lengths: torch.Tensor
    responses: list[list[str]]


def sample_policy(policy: GPT, ref: GPT, tokenizer: Tokenizer, prompts: list[str], gold: GoldReward,
                  samples: int = SAMPLES, seed: int = EVAL_SEED) -> Policy:
    """Sample the policy and score its responses under itself, the reference and the gold reward."""
    length = min(policy.config.block_size, ref.config.block_size)
    parts, texts = sampled_responses(policy, tokenizer, prompts, samples, seed, max_length=length, description="evaluating")
    kl = torch.cat([part.logprobs.sum(1) - summed_logprobs(ref, *part[:3]) for part in parts])
    rewards = gold([prompt for prompt in prompts for _ in range(samples)], texts)
    lengths = torch.cat([part.lengths - part.prompt_lengths for part in parts])
    return Policy(rewards.view(-1, samples), kl.view(-1, samples), lengths.view(-1, samples),
                  [texts[i:i + samples] for i in range(0, len(texts), samples)])


def measure(policy: GPT, ref: GPT, tokenizer: Tokenizer, bank: Bank, gold: GoldReward) -> dict:
    """Gold reward, KL and length of a policy on the bank's prompts, each with its standard error; some 512 responses."""
    sampled = sample_policy(policy, ref, tokenizer, bank.prompts, gold, samples=max(1, 512 // len(bank.prompts)))
    return row(sampled.rewards.mean(1), sampled.kl.mean(1), sampled.lengths.float().mean(1))


def along(run: Run, step: int, *measured) -> None:
    """Log what `measure` finds after `step` steps of training, as eval_reward, eval_kl, ...; its time is not the method's."""
    started = time.time()
    run.log(step=step, **{f"eval_{name}": value for name, value in measure(*measured).items()})
    run.started += time.time() - started


# ---- the table -------------------------------------------------------------------------------------------------------

def summary(bank: Bank, policies: dict[str, Policy], end_beta: float | None = None) -> dict[str, dict]:
    """The rows of the results table, by name: reward, KL, share of the optimum, response length, with standard errors.

    Args:
        policies: name -> what sample_policy returned.
        end_beta: the beta at which the gold reward's optimum is where the run must end in theory, if there is one.
    """
    curve, ref_reward = frontier(bank.rewards), bank.rewards.mean().item()
    rows = {"SFT": row(bank.rewards.mean(1), torch.zeros(len(bank.rewards)), bank.lengths.float().mean(1))}
    for name, policy in policies.items():
        rows[name] = row(policy.rewards.mean(1), policy.kl.mean(1), policy.lengths.float().mean(1))
        rows[name]["win_rate_over_sft"] = win_rate(policy.rewards, bank.rewards)
    for n in (2, 4, 16):
        if n < bank.rewards.shape[1]:
            weights = best_of_n_weights(bank.rewards, n)
            rows[f"best of {n}"] = bank_row(bank, weights, torch.full((len(bank.rewards),), best_of_n_kl(n)))
    betas = {}
    for name in policies:
        within = optimal_reward(curve, rows[name]["kl"])[1]
        betas[f"optimum at the KL of {name}" if within else f"optimum, up to where {bank.rewards.shape[1]} samples show it"] = (
            beta_at(bank.rewards, rows[name]["kl"], curve))
    if end_beta:
        betas["optimum, where theory ends"] = end_beta
    for name, beta in betas.items():
        weights = optimal_weights(bank.rewards, beta)
        rows[name] = bank_row(bank, weights, optimal_kl(bank.rewards, beta)) | {
            "beta": beta, "effective_sample_size": effective_sample_size(weights).mean().item()}
    for value in rows.values():
        value["share"], value["share_known"] = share_of_optimum(curve, value["reward"], value["kl"], ref_reward)
        # next to the reference there is hardly anything to gain, and a share of it would be noise divided by noise
        if optimal_reward(curve, value["kl"])[0] - ref_reward < 3 * rows["SFT"]["reward_se"]:
            value["share"] = None
    return rows


def row(reward: torch.Tensor, kl: torch.Tensor, length: torch.Tensor) -> dict:
    """A table row from per-prompt means (M,): each quantity with its standard error."""
    (r, r_se), (k, k_se), (n, n_se) = map(mean_and_error, (reward, kl, length))
    return {"reward": r, "reward_se": r_se, "kl": k, "kl_se": k_se, "length": n, "length_se": n_se}


def bank_row(bank: Bank, weights: torch.Tensor, kl: torch.Tensor) -> dict:
    return row((weights * bank.rewards).sum(1), kl, (weights * bank.lengths).sum(1))


def beta_at(rewards: torch.Tensor, kl: float, curve: list[dict[str, float]]) -> float:
    """The beta whose optimum has this KL, by bisection on log beta; at most as far as the curve goes."""
    low, high = math.log(curve[-1]["beta"]), math.log(curve[0]["beta"])
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if optimal_kl(rewards, math.exp(middle)).mean() > kl else (low, middle)
    return math.exp(high)


def win_rate(a: torch.Tensor, b: torch.Tensor) -> float:
    """How often a response of one policy has a higher gold reward than one of another to the same prompt; ties count half.

    a (M, N_a), b (M, N_b): all N_a N_b comparisons of each prompt.
    """
    difference = a[:, :, None] - b[:, None, :]
    return ((difference > 0).float() + 0.5 * (difference == 0).float()).mean().item()


def report(folder: Path, name: str, policy: GPT, ref: GPT, tokenizer: Tokenizer, bank: Bank, gold: GoldReward,
           end_beta: float | None, result: dict) -> dict[str, dict]:
    """What every method ends with: the table and some samples, printed, and evaluation.json and samples.jsonl, written.

    Returns the table's rows.
    """
    sampled = sample_policy(policy, ref, tokenizer, bank.prompts, gold)
    rows = summary(bank, {name: sampled}, end_beta)
    print_table(rows, bank.gold)
    print_samples(bank, sampled)
    write_json(folder / "evaluation.json", {**result, "name": name, "gold": bank.gold, "table": rows})
    write_jsonl(folder / "samples.jsonl", ({"prompt": prompt, "before": before[0], "before_reward": r0, "after": after[0],
                                            "after_reward": r1} for prompt, before, r0, after, r1 in
                                           zip(bank.prompts, bank.responses, bank.rewards[:, 0].tolist(),
                                               sampled.responses, sampled.rewards[:, 0].tolist())))
    return rows


def print_table(rows: dict[str, dict], gold: str) -> None:
    width = max(map(len, rows))
    print(f"\n{'':{width}}  {'gold reward':>15}  {'KL, nats':>14}  {'of optimum':>10}  {'length':>12}  {'wins vs SFT':>11}")
    for name, r in rows.items():
        share = "" if r["share"] is None else f"{'' if r['share_known'] else '<= '}{r['share']:.0%}"
        wins = f"{r['win_rate_over_sft']:.0%}" if "win_rate_over_sft" in r else ""
        kl = f"{r['kl']:.2f} +- {r['kl_se']:.2f}" if not name.startswith("best") else f"<= {r['kl']:.2f}"
        print(f"{name:{width}}  {r['reward']:.3f} +- {r['reward_se']:.3f}  {kl:>14}  {share:>10}  "
              f"{r['length']:5.1f} +- {r['length_se']:.1f}  {wins:>11}")
    print(f"gold reward: {gold}")


def print_samples(bank: Bank, policy: Policy, count: int = 3) -> None:
    """The first responses of SFT and of the policy to the first prompts, with their gold rewards."""
    for i in range(min(count, len(bank.prompts))):
        print(f"\nprompt      {bank.prompts[i]!r}")
        print(f"  before {bank.rewards[i, 0]:.2f}  {bank.responses[i][0].strip()}")
        print(f"  after  {policy.rewards[i, 0]:.2f}  {policy.responses[i][0].strip()}")


def draw_frontier(axis, bank: Bank, rows: dict[str, dict]) -> None:
    """Gold reward against KL: the optimal curve, best-of-n, and every policy with its standard errors."""
    curve = frontier(bank.rewards)
    axis.plot([p["kl"] for p in curve], [p["reward"] for p in curve], color="black", label=r"optimum $\pi^*_\beta$")
    best = [(r["kl"], r["reward"]) for name, r in rows.items() if name.startswith("best of")]
    axis.plot(*zip(*best), "o:", color="tab:gray", label="best of 2, 4, 16 (KL bound)")
    for name, r in rows.items():
        if name.startswith(("best of", "optimum at", "optimum, up")):
            continue
        if name.startswith("optimum"):
            axis.plot(r["kl"], r["reward"], "*", color="black", markersize=12, label="where theory ends")
        else:
            axis.errorbar(r["kl"], r["reward"], r["reward_se"], r["kl_se"], fmt="o", capsize=2, label=name)
    axis.set(xlabel=r"KL$(\pi \,\|\, \pi_{ref})$, nats per response", ylabel="gold reward")
    axis.legend(loc="lower right", fontsize=8)


def main(runs: list[str]) -> None:
    """Evaluate finished policies of one task, side by side."""
    for run in runs:
        if not (Path(run) / "model.pt").exists():
            fail(f"{run}: no finished run there (no model.pt)")
    settings = [read_json(Path(run) / "config.json") for run in runs]
    sfts = {Path(s.get("sft") or Path(run).parent / "sft").resolve() for s, run in zip(settings, runs)}
    if len(sfts) > 1:
        fail(f"these runs have different references ({', '.join(map(str, sorted(sfts)))}): evaluate them apart")
    sft, dataset, preset = sfts.pop(), settings[0]["dataset"], settings[0]["preset"]
    ref, meta = load_run(sft)
    tokenizer = Tokenizer.load(sft / "tokenizer.tiktoken")
    check_same_task(sft, meta, {"dataset": dataset, "tokenizer": tokenizer.fingerprint})
    names = [Path(run).name for run in runs]
    loaded = dict(zip(runs if len(set(names)) < len(names) else names, map(load_run, runs)))
    for name, (_, other) in loaded.items():
        check_same_task(name, other, meta)
    gold = gold_reward(dataset, sft.parent)
    bank = ensure_bank(sft.parent, dataset, preset, ref, tokenizer, fingerprint(ref.state_dict()), gold)
    policies = {name: sample_policy(policy, ref, tokenizer, bank.prompts, gold) for name, (policy, _) in loaded.items()}
    rows = summary(bank, policies)
    print_table(rows, bank.gold)
    for i, (a, policy_a) in enumerate(policies.items()):
        for b, policy_b in list(policies.items())[i + 1:]:
            print(f"{a} wins over {b}: {win_rate(policy_a.rewards, policy_b.rewards):.1%} of comparisons")
    for run in runs:
        path = Path(run) / "evaluation.json"  # what training wrote there stays
        write_json(path, {**(read_json(path) if path.exists() else {}), "compared": rows})


def check_same_task(run: str | Path, meta: dict, expected: dict) -> None:
    """A checkpoint of another vocabulary or dataset stops here, with both named."""
    for name in sorted({"tokenizer", "dataset"} & set(expected)):
        if meta[name] != expected[name]:
            fail(f"{run} was trained with {name} {meta[name]!r}, expected {expected[name]!r}")


if __name__ == "__main__":
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", help="folders of finished runs: sft, dpo, ...")
    main(parser.parse_args().run)
