"""REINFORCE: the simplest RLHF. Sample responses, and make each one likelier by as much as it was
better than expected.

    maximise  J = E_{x, y ~ pi_theta} [ r(x, y) ] - beta KL( pi_theta(.|x) || pi_ref(.|x) )
                                                                     (Rafailov et al. 2023, Eq. 3)

    returns(x, y) = score(x, y) - beta (log pi_theta(y|x) - log pi_ref(y|x))
    grad J = E [ (returns(x, y) - baseline(x)) grad log pi_theta(y|x) ]              (Williams 1992)

Any baseline that does not depend on y leaves the expectation as it is, because E[grad log pi(y|x)]
= 0, and makes the estimate less noisy. Here it is the mean of the other responses to the same
prompt (leave-one-out: Kool et al. 2019, Ahmadian et al. 2024), so there is no value network;
`--baseline none` shows what it buys.

    python reinforce.py                                # on a reward model trained on the pairs
    python reinforce.py --reward gold                  # the task's own reward; some two minutes
    python reinforce.py --reward gold --baseline none  # the same gradient on average, more noise
    python reinforce.py --reward FILE.py:function      # yours, as in ppo.py

The response is one action here, where ppo.py makes an action of each token. PPO adds a value
network, several steps on each batch, and the clipping that these need. The KL's own gradient needs
no further term: that of log pi_theta in the returns is zero in expectation.

Scores are shifted and scaled to mean 0 and standard deviation 1 on responses of the reference,
whatever the reward.

Symbols: scores (B,), kl (B,) log pi - log pi_ref of each response, returns (B,), advantages (B,) =
returns - baseline.

Reads   the SFT policy, the reward model (both trained if they are missing),
        data/<dataset>/prepared/prompts_train.jsonl
Writes  runs/<dataset>/reinforce...-seed<seed>/ : log.jsonl, model.pt, evaluation.json,
        samples.jsonl, figure.png
"""
from __future__ import annotations

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import copy
import math
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import evaluate
from common import pipeline, tasks
from common.processes import add_gradients, mine, share
from common.rewards import Reward
from common.run import Run
from common.settings import (parse, require, require_numbers, require_processes, run_folder,
                             settings)
from common.sharding import shard
from common.training import (Device, Dtype, Mean, adamw, autocast, batches, check_steps, device,
                             generator, set_lr, similar_lengths, warn_of_collapse)
from model import GPT, Samples, generate, response_logprobs, response_mask

PROMPTS, RESPONSES, ROLLOUT = 1, 2, 3  # random streams of this script


@settings
class Config:
    dataset: str = "reviews"  # Task: a folder of data/, or one of your own files.
    preset: str = "cpu"  # Kind of machine that the task's sizes are meant for.

    # ---- what is maximised
    reward: str = "model"  # Reward: model = learned from the pairs, gold = the task's own, the run
    # folder of a reward model or of a policy (its implicit reward), or FILE.py:function.
    beta: float = 0.1  # KL coefficient, in standard deviations of the score per nat.
    baseline: Literal["leave-one-out", "none"] = "leave-one-out"  # What a response is compared
    # with: the mean of the prompt's other responses, or nothing.

    # ---- what it starts from
    prompts: int = 0  # Prompts of the reward model's pairs, six each; 0 = the task's number.
    pairs_seed: int = 0  # Seed of the reward model and its pairs: prompts, responses, labels.
    sft: str = ""  # Run folder of the SFT policy, if not runs/<dataset>/sft.

    # ---- optimisation
    steps: int = 50  # Updates, each on a batch of new responses.
    batch_size: int = 256  # Responses per update.
    samples: int = 4  # Responses to each prompt among them.
    micro_batch_size: int = 64  # Responses per forward pass, of similar length. Same gradient.
    lr: float = 5e-4  # Learning rate after the warm-up, from where it falls linearly to 0.
    warmup: int = 10  # Updates of linear warm-up.
    max_grad_norm: float = 1.0  # Norm at which gradients are clipped.
    seed: int = 0  # Seed of prompts and responses.
    dtype: Dtype = "auto"  # Number format of matrix products; auto = bfloat16 on CUDA.
    device: Device = "auto"  # Where it is computed; auto = CUDA where there is one, else the CPU.
    compile: bool = False  # Use torch.compile on the model.
    shard: bool = False  # Share the weights, too, between the processes of torchrun (FSDP2).

    # ---- the run
    out: str = ""  # Run folder, if not one named by the settings, beside the SFT policy.
    evaluate_every: int = 0  # Updates between evaluations on the test prompts; 0 = only at the end.
    bank_samples: int = 0  # Reference responses per test prompt, for the optimum; 0 = the task's.
    checkpoint_every: float = 60.0  # Seconds between checkpoints.
    resume: bool = False  # Go on from the last checkpoint.

    def __post_init__(self) -> None:
        require_processes(self)
        require_numbers(
            self,
            above_0="beta steps batch_size samples micro_batch_size lr warmup max_grad_norm",
            from_0="prompts pairs_seed seed evaluate_every bank_samples checkpoint_every")
        require(self.batch_size % self.samples == 0,
                f"--batch-size {self.batch_size}: must be a multiple of --samples {self.samples}")
        require(self.baseline == "none" or self.samples > 1,
                "--baseline leave-one-out: needs --samples 2 or more")
        require(self.reward == "model" or not self.prompts, "--prompts: needs --reward model")
        require(self.reward == "model" or not self.pairs_seed, "--pairs-seed: needs --reward model")
        name = {"model": "reinforce", "gold": "reinforce-gt"}.get(self.reward, "reinforce")
        never = ("reward",) if self.reward == "gold" else ()
        self.out = self.out or run_folder(self, name, always=("beta", "seed"), never=never)


def leave_one_out(returns: torch.Tensor, samples: int) -> torch.Tensor:
    """Each response's return less the mean return of the other `samples` - 1 responses to its
    prompt, (B,).

    Args:
        returns: (B,) the responses to a prompt are neighbours.
    """
    groups = returns.view(-1, samples)  # (prompts, samples)
    mean_of_others = (groups.sum(1, keepdim=True) - groups) / (samples - 1)
    return (groups - mean_of_others).flatten()


def train(config: Config) -> Path:
    """Build what is missing, train, evaluate, and return the run folder."""
    # ---- 1) the reference policy, the reward, the prompts ----------------------------------------
    start = pipeline.start(config)
    ref = start.ref.requires_grad_(False)
    tokenizer = start.tokenizer
    reward = start.reward
    prompts = tasks.prompts(config.dataset, "train")  # texts
    prompt_ids = [[tokenizer.bos] + ids for ids in tokenizer.encode_batch(prompts)]

    def roll_out(policy: GPT, rows: list[int],
                 draw: torch.Generator) -> tuple[Samples, list[str], torch.Tensor]:
        """A response to the prompt of every row, its text, and its score as the reward gives it,
        (B,)."""
        with autocast(config.dtype):
            samples = generate(policy, [prompt_ids[i] for i in rows], ref.config.block_size,
                               tokenizer.eos, tokenizer.pad, draw, return_logprobs=True)
        responses = [tokenizer.decode(ids) for ids in samples.response_ids()]
        return samples, responses, reward([prompts[i] for i in rows], responses, samples)

    # ---- 2) the policy starts as a copy of the reference -----------------------------------------
    policy = copy.deepcopy(ref).requires_grad_(True).train()
    if config.shard:
        shard(policy, ref)
    optimizer = adamw(policy, config.lr, 0.0, (0.9, 0.95))
    check_steps(config.steps, config.warmup)
    state = {"score_mean": 0.0, "score_std": 1.0}  # of the reference's scores
    run = Run(config, policy, [optimizer], built_from(start, reward), config.steps, state)
    if run.step == 0:
        order = torch.randperm(len(prompts), generator=generator(config.seed, PROMPTS))
        rows = order.repeat(512 // len(prompts) + 1)[:512].tolist()
        _, _, reference_scores = roll_out(ref, rows, generator(config.seed, RESPONSES))
        std = reference_scores.double().std(correction=0).item()
        state["score_mean"] = reference_scores.double().mean().item()
        state["score_std"] = std if std > 1e-6 else 1.0
    prompt_lengths = torch.tensor([len(ids) for ids in prompt_ids])
    prompts_per_batch = config.batch_size // config.samples
    batch_iterator = batches(prompt_lengths, prompts_per_batch, config.seed, run.step, pool=1)
    logprobs_of = torch.compile(response_logprobs) if config.compile else response_logprobs

    # ---- 3) train --------------------------------------------------------------------------------
    name = f"REINFORCE on {config.reward}, beta {config.beta:g}"
    bar = tqdm(range(run.step, config.steps), name, config.steps, initial=run.step)
    for step in bar:
        if config.evaluate_every and step % config.evaluate_every == 0:
            evaluate.log_evaluation(run, step, policy, start)
        lr = config.lr * min(1, (step + 1) / config.warmup) * (1 - step / config.steps)
        set_lr([optimizer], lr)

        # 3a) roll out: sample responses and score them
        rows = next(batch_iterator).repeat_interleave(config.samples)  # (B,) numbers of prompts
        samples, responses, raw_scores = roll_out(policy, rows.tolist(),
                                                  generator(config.seed, ROLLOUT, step))
        tokens = samples.tokens.to(device())  # (B, T)
        prompt_lengths = samples.prompt_lengths.to(device())
        lengths = samples.lengths.to(device())
        mask = response_mask(prompt_lengths, lengths)  # (B, R)
        B = len(rows)
        of_mine = mine(torch.arange(B, device=device()))  # all rows, if there is one process
        # in standard deviations of the reference's scores: beta means the same for every reward
        scores = ((raw_scores - state["score_mean"]) / state["score_std"]).float().to(device())

        # 3b) what each response earned: its score, less beta for every nat that it is likelier than
        # under the reference
        ref_logprobs = torch.zeros(B, device=device())  # log pi_ref(y|x)
        with torch.no_grad(), autocast(config.dtype):
            for part in similar_lengths(of_mine, lengths, config.micro_batch_size):
                inputs = tokens[part], prompt_lengths[part], lengths[part]
                ref_logprobs[part] = logprobs_of(ref, *inputs).sum(1)
        share(ref_logprobs)  # of several processes: all rows for everyone
        kl = samples.logprobs.to(device()).sum(1) - ref_logprobs  # (B,) log pi as it was sampled
        returns = scores - config.beta * kl
        advantages = returns
        if config.baseline == "leave-one-out":
            advantages = leave_one_out(returns, config.samples)

        # 3c) one step along  E[ advantage grad log pi(y|x) ]
        response_tokens = int(mask.sum())
        metrics = Mean()
        for part in similar_lengths(of_mine, lengths, config.micro_batch_size):
            with autocast(config.dtype):
                inputs = tokens[part], prompt_lengths[part], lengths[part]
                logprobs = logprobs_of(policy, *inputs).sum(1)  # (b,) log pi(y|x)
            losses = -advantages[part] * logprobs
            # divided by the tokens of the batch, as in ppo.py: a factor that Adam does not see
            (losses.sum() / response_tokens).backward()
            metrics.add(loss=losses)

        add_gradients(policy)  # of several processes, each with its share of the rows
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm).item()
        values = metrics.values()
        run.check_finite(step, rows, **values, grad_norm=grad_norm, score=scores.mean().item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # 3d) log
        ended = tokens[torch.arange(B), lengths - 1] == tokenizer.eos
        row = {
            "step": step,
            "scores": scores.mean().item(),
            "raw_scores": raw_scores.mean().item(),
            "kl": kl.mean().item(),
            "kl_se": (kl.std(correction=min(1, B - 1)) / math.sqrt(B)).item(),
            "objective": returns.mean().item(),
            "advantage_std": advantages.std(correction=0).item(),
            "entropy": -samples.logprobs.sum(1).mean().item(),
            "length": mask.sum(1).float().mean().item(),
            "eos_rate": ended.float().mean().item(),
            "distinct": len(set(responses)) / B,
        }
        run.log(**row, **values, grad_norm=grad_norm, lr=lr)
        warn_of_collapse(run, step, responses)
        bar.set_postfix_str(f"score {row['raw_scores']:.3f}, KL {row['kl']:.2f}")
        run.checkpoint(step + 1)

    if config.evaluate_every:
        evaluate.log_evaluation(run, config.steps, policy, start)

    # ---- 4) gold reward and KL on test prompts, samples, figure; printed when all of it is written
    drawn = config.steps * min(config.batch_size, len(prompts) * config.samples)
    result = {"step": config.steps, "seconds": run.seconds(), "samples": drawn,
              "reward_calls": drawn}
    run.log(**result)
    # of the reward that is measured, theory says where it ends (beta is in its standard deviations)
    end_beta = config.beta * state["score_std"] if reward is start.measure else None
    report = evaluate.report(run, name, policy.eval(), start, end_beta, result)
    curves = {
        "score, in standard deviations of the reference's": evaluate.logged(run.rows, "scores"),
        "KL to the reference, nats per response": evaluate.logged(run.rows, "kl"),
    }
    evaluate.draw_run(run.folder / "figure.png", "REINFORCE on training prompts", curves, report)
    run.finish(policy, tokenizer)
    report.show()
    print(f"\nfigure, log, samples and model  ->  {run.folder}")
    return run.folder


def built_from(start: pipeline.Start, reward: Reward) -> dict[str, str]:
    """What a run is made from: with other weights, or another reward under the same name, it is
    another run."""
    return {"policy": start.policy_id, "reward": reward.id}


if __name__ == "__main__":
    train(parse(Config, __doc__))
