"""Expert iteration: the policy writes several responses to each prompt, imitates the best of them,
and does it again. No reward model's gradient, no KL penalty: next-token prediction is all it takes.

    y_1 ... y_n ~ pi_k(.|x),   y* = argmax_i r(x, y_i),   pi_{k+1} = argmax_pi E log pi(y*|x)

(Anthony et al. 2017; for language models: RAFT of Dong et al. 2023, ReST of Gulcehre et al. 2023.)
With endless responses a round ends at best of n of the policy before it, so k rounds end at best of
n^k of the reference, whose KL is at most log n^k - (n^k - 1) / n^k: that is what stands in the
place of a KL penalty.

    python expert_iteration.py                            # on a reward model of the pairs
    python expert_iteration.py --reward gold              # the task's own reward; two minutes
    python expert_iteration.py --samples 16 --rounds 1    # as in AlpacaFarm (Dubois et al. 2023)
    python expert_iteration.py --reward FILE.py:function  # yours, as in ppo.py

Preferred-FT (sft.py --on chosen) imitates what people preferred; this what a reward prefers.

Reads   the SFT policy, the reward model (both trained if they are missing),
        data/<dataset>/prepared/prompts_train.jsonl
Writes  runs/<dataset>/expert-iteration...-seed<seed>/ : log.jsonl, model.pt, evaluation.json,
        samples.jsonl, figure.png

Differs from the papers: tiny models and so a larger learning rate, which falls over all rounds; a
round goes on from the policy before it, where AlpacaFarm has one round and ReST begins again.

Symbols: samples = n, rounds = k, scores (B,) of all responses of a round.
"""
from __future__ import annotations

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import copy
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

import evaluate
from common import pipeline, tasks
from common.memory import Memory
from common.processes import add_gradients, mine
from common.run import Run
from common.settings import parse, require, require_numbers, run_folder, settings
from common.training import (Device, Dtype, Mean, adamw, autocast, batches, check_steps, device,
                             generator, set_lr)
from model import Samples, generate, response_logprobs

PROMPTS, ROLLOUT = 1, 3  # random streams, called as in reinforce.py


@settings
class Config:
    dataset: str = "reviews"  # Task: a folder of data/, or one of your own files.
    preset: str = "cpu"  # Kind of machine that the task's sizes are meant for.

    # ---- what is imitated
    reward: str = "model"  # Reward: model = learned from the pairs, gold = the task's own, the run
    # folder of a reward model, or FILE.py:function.
    samples: int = 4  # Responses to each prompt, of which the best is imitated.
    rounds: int = 3  # How often it samples, and imitates the best.
    round_prompts: int = 1600  # Prompts of a round, drawn anew for each.

    # ---- what it starts from
    prompts: int = 0  # Prompts of the reward model's pairs, six each; 0 = the task's number.
    pairs_seed: int = 0  # Seed of the reward model and its pairs: prompts, responses, labels.
    sft: str = ""  # Run folder of the SFT policy, if not runs/<dataset>/sft.

    # ---- optimisation
    epochs: float = 3.0  # Passes over the best responses of a round.
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
            above_0="samples rounds round_prompts epochs batch_size lr warmup max_grad_norm",
            from_0="prompts pairs_seed micro_batch_size seed evaluate_every bank_samples "
            "checkpoint_every")
        require(self.reward == "model" or not self.prompts, "--prompts: needs --reward model")
        require(self.reward == "model" or not self.pairs_seed, "--pairs-seed: needs --reward model")
        gold = self.reward == "gold"
        self.out = self.out or run_folder(self, "expert-iteration" + ("-gt" if gold else ""),
                                          always=("seed",), never=("reward",) if gold else ())


def best_of(scores: torch.Tensor, samples: int) -> torch.Tensor:
    """The row of the best response to each prompt, (B / samples,); of equal scores the first.

    Args:
        scores: (B,) the responses to a prompt are neighbours.
    """
    groups = scores.view(-1, samples)  # (prompts, samples)
    return groups.argmax(1) + samples * torch.arange(len(groups))


def train(config: Config) -> Path:
    """Build what is missing, train, evaluate, and return the run folder."""
    # ---- 1) the reference policy, the reward, the prompts ----------------------------------------
    start = pipeline.start(config)
    tokenizer = start.tokenizer
    prompts = tasks.prompts(config.dataset, "train")  # texts
    prompt_ids = [[tokenizer.bos] + ids for ids in tokenizer.encode_batch(prompts)]

    # ---- 2) the policy starts as a copy of the reference; nothing is written yet -----------------
    policy = copy.deepcopy(start.ref).train()
    best = Memory(config.round_prompts, policy.config.block_size)  # responses of this round
    networks = nn.ModuleDict({"policy": policy, "best": best}).to(device())
    optimizer = adamw(policy, config.lr, 0.0, (0.9, 0.95))
    steps_of_round = max(1, round(config.epochs * config.round_prompts / config.batch_size))
    steps = config.rounds * steps_of_round
    check_steps(steps, config.warmup)
    run = Run(config, networks, [optimizer], built_from(start), steps)

    # ---- 3) train --------------------------------------------------------------------------------
    name = f"best of {config.samples} on {config.reward}, rounds {config.rounds}"
    bar = tqdm(range(run.step, steps), name, steps, initial=run.step)
    for step in bar:
        if config.evaluate_every and step % config.evaluate_every == 0:
            evaluate.log_evaluation(run, step, policy, start)
        lr = config.lr * min(1, (step + 1) / config.warmup) * (1 - step / steps)
        set_lr([optimizer], lr)

        # 3a) a round begins: write several responses to each prompt, and keep the best
        if step % steps_of_round == 0:
            number = step // steps_of_round  # of the round
            order = torch.randperm(len(prompts), generator=generator(config.seed, PROMPTS, number))
            order = order.repeat(config.round_prompts // len(prompts) + 1)[:config.round_prompts]
            rows = order.repeat_interleave(config.samples).tolist()  # (B,) numbers of prompts
            with autocast(config.dtype):
                samples = generate(policy, [prompt_ids[i] for i in rows], policy.config.block_size,
                                   tokenizer.eos, tokenizer.pad,
                                   generator(config.seed, ROLLOUT, number))
            responses = [tokenizer.decode(ids) for ids in samples.response_ids()]
            scores = start.reward([prompts[i] for i in rows], responses, samples)  # (B,)
            kept = best_of(scores, config.samples)  # (round_prompts,) of these rows
            best.write(0, Samples(samples.tokens[kept], samples.prompt_lengths[kept],
                                  samples.lengths[kept], None), scores[kept])
            run.log(step=step, round=number, scores=scores.mean().item(),
                    best_scores=scores[kept].mean().item(),
                    distinct=len(set(responses)) / len(rows))
        if step % steps_of_round == 0 or step == run.step:
            batch_iterator = batches(best.lengths.cpu(), config.batch_size, config.seed, step)

        # 3b) a step of next-token prediction on the best ones
        batch = next(batch_iterator)  # (B,) numbers of responses
        response_tokens = int((best.lengths - best.prompt_lengths)[batch].sum())
        metrics = Mean()
        for part in mine(batch).split(config.micro_batch_size or len(batch)):
            with autocast(config.dtype):
                losses = -response_logprobs(policy, *best.inputs(part)).sum(1)  # (b,)
            # divided by the whole batch's tokens: micro-batches add up to the mean over these
            (losses.sum() / response_tokens).backward()
            metrics.add(loss=losses)

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

    if config.evaluate_every:
        evaluate.log_evaluation(run, steps, policy, start)

    # ---- 4) gold reward and KL on test prompts, samples, figure; printed when all of it is written
    drawn = steps // steps_of_round * config.round_prompts * config.samples
    result = {"step": steps, "seconds": run.seconds(), "samples": drawn, "reward_calls": drawn}
    run.log(**result)
    report = evaluate.report(run, name, policy.eval(), start, None, result)
    if limit := limit_of(config, start):
        report.rows["limit of this run in theory"] = limit
    curves = {"loss, nats per response": evaluate.smoothed(run.rows, "loss")}
    evaluate.draw_run(run.folder / "figure.png", "imitating the best responses", curves, report)
    run.finish(policy, tokenizer)
    report.show()
    print(f"\nfigure, log, samples and model  ->  {run.folder}")
    return run.folder


def limit_of(config: Config, start: pipeline.Start) -> dict | None:
    """Best of n^k by the reward that the run has: a row for the table, from the bank; None where
    that has too few responses for it."""
    bank = start.bank
    n = config.samples**config.rounds
    if bank.rewards is None or n >= bank.rewards.shape[1]:
        return None
    N = bank.rewards.shape[1]
    texts = [text for responses in bank.responses for text in responses]
    scores = start.reward([prompt for prompt in bank.prompts for _ in range(N)], texts).view(-1, N)
    weights = evaluate.best_of_n_weights(scores, n)
    return evaluate.limit_row(bank, weights)


def built_from(start: pipeline.Start) -> dict[str, str]:
    """What a run is made from: with other weights, or another reward under the same name, it is
    another run."""
    return {"policy": start.policy_id, "reward": start.reward.id}


if __name__ == "__main__":
    train(parse(Config, __doc__))
