"""Expert iteration: the policy writes several responses to each prompt, imitates the best of them,
and does it again. And two relatives that also need nothing but next-token prediction.

    y_1 ... y_n ~ pi_k(.|x),   y* = argmax_i r(x, y_i),   pi_{k+1} = argmax_pi E log pi(y*|x)

(Anthony et al. 2017; for language models: RAFT of Dong et al. 2023, ReST of Gulcehre et al. 2023.)
There is no KL penalty, and none is needed: with endless responses a round ends at best of n of the
policy before it, so k rounds end at best of n^k, whose KL is at most log n^k - (n^k - 1) / n^k.

--method conditioning: reward conditioning. Every response of the pairs is learned behind a control
token that says whether it was liked; the policy is then used behind "liked" (Keskar et al. 2019).

    L = - log pi(y_w | liked, x) - log pi(y_l | disliked, x)
    optimum: pi(y | liked, x) = pi_ref(y|x) P(y wins | x) / P(a response wins | x)      (Bayes)

This is also what sft.py --on chosen (Preferred-FT, "binary FeedME") ends at. Where labels have no
noise it is best of 2: no number of pairs moves either further than log 2 - 1/2 = 0.193 nats.

--method quark: the policy's own responses behind one of K control tokens, by the quantile of their
score among all that were drawn; the next are drawn behind the best one (Lu et al. 2022, Eq. 2).

    L = sum_t - log pi(y_t | q, x, y_<t) + kappa KL( pi_ref(.|x, y_<t) || pi(.|q, x, y_<t) )

    python expert_iteration.py                           # on a reward model of the pairs
    python expert_iteration.py --reward gold             # the task's own reward
    python expert_iteration.py --reward FILE.py:function # yours, as in ppo.py
    python expert_iteration.py --method conditioning
    python expert_iteration.py --method quark

A control token stands where <bos> stands else. It starts as a copy of <bos>, so that at first all
are the reference, and at the end the best one takes <bos>'s place: what is kept is a policy like
any other.

Reads   the SFT policy, the reward model or the pairs (made if they are missing),
        data/<dataset>/prepared/prompts_train.jsonl
Writes  runs/<dataset>/expert-iteration...-seed<seed>/ (or conditioning..., quark...): log.jsonl,
        model.pt, evaluation.json, samples.jsonl, figure.png

Differs from the papers: they start from models of billions of parameters and train each round for
epochs with a learning rate of its own; here one rate falls over all rounds. AlpacaFarm's Quark
learns from the best quantile alone, and forgets earlier rounds.

Symbols: scores (B,), quantiles (N,) 0 .. K - 1, of which K - 1 has the largest scores.
"""
from __future__ import annotations

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import copy
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
from common import fail, pipeline, tasks
from common.pairs import pair_tensors, read_pairs
from common.processes import add_gradients, mine
from common.run import Run
from common.settings import parse, require, require_numbers, run_folder, settings
from common.tokenizer import Tokenizer
from common.training import (Device, Dtype, Mean, adamw, autocast, batches, check_steps, device,
                             generator, set_lr)
from model import GPT, generate, response_logprobs, response_mask

PROMPTS, ROLLOUT = 1, 3  # random streams of this script
METHODS = {"best": "expert iteration", "conditioning": "conditioning", "quark": "Quark"}


@settings
class Config:
    dataset: str = "reviews"  # Task: a folder of data/, or one of your own files.
    preset: str = "cpu"  # Kind of machine that the task's sizes are meant for.

    # ---- what is imitated
    method: Literal["best", "conditioning", "quark"] = "best"  # What is learned from: the best of n
    # (expert iteration), the pairs behind control tokens, or the samples behind control tokens.
    reward: str = "model"  # Reward: model = learned from the pairs, gold = the task's own, the run
    # folder of a reward model, or FILE.py:function. Conditioning needs none.
    samples: int = 4  # Responses to each prompt of a round: the n of best of n.
    quantiles: int = 5  # Control tokens of Quark; with one it learns what it wrote, all of it.
    kappa: float = 0.05  # Weight of Quark's KL to the reference.

    # ---- what it starts from
    prompts: int = 0  # Prompts of the pairs, six each; 0 = the task's number.
    pairs_seed: int = 0  # Seed of the pairs, and of their reward model.
    sft: str = ""  # Run folder of the SFT policy, if not runs/<dataset>/sft.

    # ---- optimisation
    rounds: int = 3  # How often it samples, and learns from what it wrote.
    round_prompts: int = 1600  # Prompts of a round, drawn anew for each.
    epochs: float = 3.0  # Passes over what a round learns from.
    batch_size: int = 32  # Responses per step.
    micro_batch_size: int = 0  # Responses per forward pass if memory is short; 0 = all.
    lr: float = 3e-4  # Learning rate after the warm-up, from where it falls linearly to 0.
    warmup: int = 10  # Steps of linear warm-up.
    max_grad_norm: float = 1.0  # Norm at which gradients are clipped.
    seed: int = 0  # Seed of prompts, responses and order.
    dtype: Dtype = "auto"  # Number format of matrix products; auto = bfloat16 on CUDA.
    device: Device = "auto"  # Where it is computed; auto = CUDA where there is one, else the CPU.

    # ---- the run
    out: str = ""  # Run folder, if not one named by the settings, beside the SFT policy.
    evaluate_every: int = 0  # Steps between evaluations on the test prompts; 0 = only at the end.
    bank_samples: int = 0  # Reference responses per test prompt, for the optimum; 0 = the task's.
    checkpoint_every: float = 60.0  # Seconds between checkpoints.
    resume: bool = False  # Go on from the last checkpoint.

    def __post_init__(self) -> None:
        require_numbers(
            self,
            above_0="samples quantiles rounds round_prompts epochs batch_size lr warmup "
            "max_grad_norm",
            from_0="kappa prompts pairs_seed micro_batch_size seed evaluate_every bank_samples "
            "checkpoint_every")
        if self.method == "conditioning":
            for flag in ("reward", "samples", "rounds", "round_prompts"):
                require(getattr(self, flag) == getattr(Config, flag),
                        f"--{flag.replace('_', '-')}: not with --method conditioning, which learns "
                        "from the pairs")
            self.rounds = 1
        require(self.quantiles <= len(FREE_BYTES),
                f"--quantiles {self.quantiles}: at most {len(FREE_BYTES)}")
        for flag in ("quantiles", "kappa"):
            require(self.method == "quark" or getattr(self, flag) == getattr(Config, flag),
                    f"--{flag}: needs --method quark")
        learned = self.reward == "model"
        require(learned or not self.prompts, "--prompts: needs --reward model")
        require(learned or not self.pairs_seed, "--pairs-seed: needs --reward model")
        name = "expert-iteration" if self.method == "best" else self.method
        gold = self.reward == "gold"
        self.out = self.out or run_folder(self, name + ("-gt" if gold else ""), always=("seed",),
                                          never=("method", "reward") if gold else ("method",))


# ---- what is learned from ------------------------------------------------------------------------

def best_of(scores: torch.Tensor, samples: int) -> torch.Tensor:
    """The row of the best response to each prompt, (B / samples,); of equal scores the first.

    Args:
        scores: (B,) the responses to a prompt are neighbours.
    """
    groups = scores.view(-1, samples)  # (prompts, samples)
    return groups.argmax(1) + samples * torch.arange(len(groups))


def quantiles_of(scores: torch.Tensor, K: int) -> torch.Tensor:
    """In which of K equal parts of all scores each lies, (N,): 0 has the smallest, K - 1 the
    largest. Equal scores are told apart by their place: a part has N / K of them, whatever ties."""
    rank = torch.empty(len(scores), dtype=torch.long)
    rank[scores.argsort(stable=True)] = torch.arange(len(scores))
    return rank * K // len(scores)


def preferred_weights(win_probs: torch.Tensor) -> torch.Tensor:
    """P(y wins) / sum of P(y' wins) over a prompt's responses, (M, N): what conditioning and
    Preferred-FT end at, on responses that the reference drew.

    Args:
        win_probs: (M, N, N) P(response i is preferred to response j).
    """
    N = win_probs.shape[1]
    others = ~torch.eye(N, dtype=torch.bool)
    wins = (win_probs.double() * others).sum(2)  # (M, N) expected, against each of the others once
    return wins / wins.sum(1, keepdim=True)


def kl_of_weights(weights: torch.Tensor) -> torch.Tensor:
    """KL of a policy that draws response i of N equally likely ones with probability weights[i],
    (M,) nats: sum_i w_i log(N w_i)."""
    return torch.special.xlogy(weights, weights * weights.shape[1]).sum(1)


# ---- control tokens ------------------------------------------------------------------------------

FREE_BYTES = range(0xF8, 0x100)  # no text has them: UTF-8 does not use them


def control_tokens(tokenizer: Tokenizer, count: int) -> list[int]:
    """Ids of tokens that no text is encoded to; the last one is the best."""
    if tokenizer.bos == tokenizer.eos:
        fail("--method: control tokens need a vocabulary in which <bos> is not <eos>")
    return [tokenizer.ranks[bytes([byte])] for byte in FREE_BYTES[:count]]


@contextmanager
def begun_with(policy: GPT, token: int, bos: int) -> Iterator[None]:
    """with begun_with(...): <bos> is read as a control token, so that all who know nothing of
    control tokens see the policy behind it."""
    embeddings = policy.wte.weight.data
    embeddings[[token, bos]] = embeddings[[bos, token]]
    yield
    embeddings[[token, bos]] = embeddings[[bos, token]]


def quark_losses(policy: GPT, ref: GPT, tokens: torch.Tensor, prompt_lengths: torch.Tensor,
                 lengths: torch.Tensor, bos: int,
                 kappa: float) -> tuple[torch.Tensor, torch.Tensor]:
    """-log pi(y|q, x) + kappa KL of each response, and that KL, (b,) each: exact, over the whole
    vocabulary, summed over the response's tokens (Lu et al. 2022, Eq. 2).

    Args:
        tokens: (b, T) control token, prompt, response; the reference sees <bos> in place of the
            first.
    """
    targets = tokens[:, 1:]
    place = torch.arange(1, tokens.shape[1], device=tokens.device)
    mask = (prompt_lengths[:, None] <= place) & (place < lengths[:, None])  # (b, T - 1)
    logprobs = policy(tokens)[:, :-1].float().log_softmax(2)  # (b, T - 1, V)
    with torch.no_grad():
        plain = tokens.clone()
        plain[:, 0] = bos
        ref_logprobs = ref(plain)[:, :-1].float().log_softmax(2)
    kl = (ref_logprobs.exp() * (ref_logprobs - logprobs)).sum(2)  # (b, T - 1)
    kl = (kl * mask).sum(1)
    logprobs = logprobs.gather(2, targets[:, :, None]).squeeze(2)
    return -(logprobs * mask).sum(1) + kappa * kl, kl.detach()


class Rows(nn.Module):
    """The responses that are learned from. A module, so that a checkpoint holds them: a run that is
    stopped goes on with what it wrote."""

    def __init__(self, rows: int, positions: int):
        super().__init__()
        for name, values in {
                "tokens": torch.zeros(rows, positions, dtype=torch.int32),
                "prompt_lengths": torch.zeros(rows, dtype=torch.int32),
                "lengths": torch.zeros(rows, dtype=torch.int32),
                "scores": torch.zeros(rows),
        }.items():
            self.register_buffer(name, values)

    def write(self, start: int, tokens: torch.Tensor, prompt_lengths: torch.Tensor,
              lengths: torch.Tensor, scores: torch.Tensor) -> None:
        """Put responses into the rows from `start` on."""
        end = start + len(tokens)
        self.tokens[start:end, :tokens.shape[1]] = tokens
        self.prompt_lengths[start:end] = prompt_lengths
        self.lengths[start:end] = lengths
        self.scores[start:end] = scores

    def inputs(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens (b, T), prompt lengths and lengths (b,) of some rows."""
        lengths = self.lengths[rows].long()
        tokens = self.tokens[rows, :int(lengths.max())].long()
        return tokens, self.prompt_lengths[rows].long(), lengths


def train(config: Config) -> Path:
    """Build what is missing, train, evaluate, and return the run folder."""
    # ---- 1) the reference policy, the reward or the pairs, the prompts ---------------------------
    conditioning, quark = config.method == "conditioning", config.method == "quark"
    start = pipeline.start(config, reward_is_used=not conditioning)
    ref = start.ref.requires_grad_(False)
    tokenizer = start.tokenizer
    prompts = tasks.prompts(config.dataset, "train")  # texts
    prompt_ids = tokenizer.encode_batch(prompts)
    pairs = pairs_of(config, start) if conditioning else None
    B = config.round_prompts * config.samples  # responses of a round
    learned_from = config.round_prompts  # rows of a round: the best response to each prompt
    if conditioning:
        learned_from = pairs.lengths.numel()
    elif quark:
        learned_from = B
    count = config.rounds * learned_from if quark else learned_from  # Quark forgets nothing

    # ---- 2) the policy starts as a copy of the reference, and so do its control tokens -----------
    policy = copy.deepcopy(ref).requires_grad_(True).train()
    best = tokenizer.bos  # the first token of what is drawn
    if conditioning or quark:
        controls = torch.tensor(control_tokens(tokenizer, 2 if conditioning else config.quantiles))
        best = int(controls[-1])
        policy.wte.weight.data[controls] = policy.wte.weight[tokenizer.bos].detach().clone()
    rows = Rows(count, ref.config.block_size)
    networks = nn.ModuleDict({"policy": policy, "rows": rows}).to(device())
    optimizer = adamw(policy, config.lr, 0.0, (0.9, 0.95))
    steps_of_round = max(1, round(config.epochs * learned_from / config.batch_size))
    steps = config.rounds * steps_of_round
    check_steps(steps, config.warmup)
    run = Run(config, networks, [optimizer], built_from(config, start), steps)

    # ---- 3) train --------------------------------------------------------------------------------
    name = named(config)
    bar = tqdm(range(run.step, steps), name, steps, initial=run.step)
    for step in bar:
        if config.evaluate_every and step % config.evaluate_every == 0:
            with begun_with(policy, best, tokenizer.bos):
                evaluate.log_evaluation(run, step, policy, start)
        lr = config.lr * min(1, (step + 1) / config.warmup) * (1 - step / steps)
        set_lr([optimizer], lr)

        # 3a) a round begins: what is learned from in it
        number = step // steps_of_round  # of the round
        if step % steps_of_round == 0 and conditioning:
            first = controls[[1, 0]].repeat_interleave(learned_from // 2)  # liked, disliked
            tokens = pairs.tokens.flatten(0, 1).clone()
            tokens[:, 0] = first
            rows.write(0, tokens, pairs.prompt_lengths.flatten(), pairs.lengths.flatten(),
                       torch.zeros(learned_from))
        elif step % steps_of_round == 0:
            order = torch.randperm(len(prompts), generator=generator(config.seed, PROMPTS, number))
            order = order.repeat(config.round_prompts // len(prompts) + 1)[:config.round_prompts]
            chosen = order.repeat_interleave(config.samples).tolist()  # (B,) numbers of prompts
            with autocast(config.dtype):
                samples = generate(policy, [[best] + prompt_ids[i] for i in chosen],
                                   ref.config.block_size, tokenizer.eos, tokenizer.pad,
                                   generator(config.seed, ROLLOUT, number))
            samples.tokens[:, 0] = tokenizer.bos  # what reads them knows no control tokens
            responses = [tokenizer.decode(ids) for ids in samples.response_ids()]
            scores = start.reward([prompts[i] for i in chosen], responses, samples)  # (B,)
            kept = torch.arange(B) if quark else best_of(scores, config.samples)
            rows.write(number * B if quark else 0, samples.tokens[kept],
                       samples.prompt_lengths[kept], samples.lengths[kept], scores[kept])
            if quark:
                end = (number + 1) * B
                quantiles = quantiles_of(rows.scores[:end].cpu(), config.quantiles)
                rows.tokens[:end, 0] = controls[quantiles].to(rows.tokens)
            run.log(step=step, round=number, scores=scores.mean().item(),
                    kept_scores=scores[kept].mean().item(), distinct=len(set(responses)) / B)
        if step % steps_of_round == 0 or step == run.step:
            end = (number + 1) * B if quark else learned_from
            batch_iterator = batches(rows.lengths[:end].cpu(), config.batch_size, config.seed, step)

        # 3b) a step of next-token prediction on the responses
        batch = next(batch_iterator)
        response_tokens = int((rows.lengths - rows.prompt_lengths)[batch].sum())
        metrics = Mean()
        for part in mine(batch).split(config.micro_batch_size or len(batch)):
            with autocast(config.dtype):
                if quark:
                    losses, kl = quark_losses(policy, ref, *rows.inputs(part), tokenizer.bos,
                                              config.kappa)
                else:
                    losses = -response_logprobs(policy, *rows.inputs(part)).sum(1)  # (b,)
            # divided by the whole batch's tokens: micro-batches add up to the mean over these
            (losses.sum() / response_tokens).backward()
            metrics.add(loss=losses)
            if quark:
                metrics.add(kl=kl)

        add_gradients(policy)  # of several processes, each with its share of the rows
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm).item()
        values = metrics.values()
        run.check_finite(step, batch, **values, grad_norm=grad_norm)  # stop before a NaN spreads
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        run.log(step=step, **values, grad_norm=grad_norm, lr=lr)
        if step % 10 == 0:
            bar.set_postfix_str(f"loss {values['loss']:.2f} nats")
        run.checkpoint(step + 1)

    # ---- 4) behind the best token it is a policy like any other ----------------------------------
    policy.wte.weight.data[tokenizer.bos] = policy.wte.weight[best].detach().clone()
    if config.evaluate_every:
        evaluate.log_evaluation(run, steps, policy, start)

    # ---- 5) gold reward and KL on test prompts, samples, figure; printed when all of it is written
    drawn = 0 if conditioning else config.rounds * B
    result = {"step": steps, "seconds": run.seconds(), "samples": drawn, "reward_calls": drawn}
    run.log(**result)
    report = evaluate.report(run, name, policy.eval(), start, None, result)
    if limit := limit_of(config, start):
        report.rows["limit of this run in theory"] = limit
    curves = {"loss, nats per response": evaluate.smoothed(run.rows, "loss")}
    evaluate.draw_run(run.folder / "figure.png", name, curves, report)
    run.finish(policy, tokenizer)
    report.show()
    print(f"\nfigure, log, samples and model  ->  {run.folder}")
    return run.folder


def pairs_of(config: Config, start: pipeline.Start):
    """The pairs that conditioning learns from: PairTensors, of the user's or sampled here."""
    path = tasks.own_pairs(config.dataset)
    labels = tasks.load(config.dataset).labels
    path = path or pipeline.sampled_pairs(start, labels, config.prompts, config.pairs_seed)
    pipeline.use_pairs(start, read_pairs(path), Path(path))
    return pair_tensors(start.pairs, start.tokenizer.pad)


def limit_of(config: Config, start: pipeline.Start) -> dict | None:
    """Where theory says that the method ends with endless responses and an unrestricted model: a
    row for the table, from the bank. Quark's is not known in closed form."""
    bank = start.bank
    if config.method == "quark" or bank.rewards is None or start.measured_by:
        return None
    M, N = bank.rewards.shape
    if config.method == "conditioning":
        task = tasks.load(config.dataset)
        difference = bank.rewards[:, :, None] - bank.rewards[:, None, :]
        weights = preferred_weights(torch.sigmoid(task.label_scale * difference)
                                    if task.labels == "bt" else (difference > 0) + 0.5 *
                                    (difference == 0))
    elif config.samples**config.rounds < N:
        prompts = [prompt for prompt in bank.prompts for _ in range(N)]
        texts = [text for responses in bank.responses for text in responses]
        scores = start.reward(prompts, texts).view(M, N)
        weights = evaluate.best_of_n_weights(scores, config.samples**config.rounds)
    else:
        return None  # more responses than the bank has
    row = evaluate.bank_row("limit", bank, weights, kl_of_weights(weights))
    return row | {"share": None, "share_known": True}


def named(config: Config) -> str:
    """The method as tables call it."""
    if config.method == "conditioning":
        return "conditioning"
    if config.method == "quark":
        return f"Quark on {config.reward}, {config.rounds} rounds"
    return f"best of {config.samples} on {config.reward}, {config.rounds} rounds"


def built_from(config: Config, start: pipeline.Start) -> dict[str, str]:
    """What a run is made from: with other weights, pairs, or another reward under the same name, it
    is another run."""
    if config.method == "conditioning":
        return {"policy": start.policy_id, "pairs": start.pairs_id}
    return {"policy": start.policy_id, "reward": start.reward.id}


if __name__ == "__main__":
    train(parse(Config, __doc__))
