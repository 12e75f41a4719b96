"""VarGrad: DPO's idea with scores in place of comparisons. At the optimum the score of a response,
less beta times its log-ratio, is one number for all responses to a prompt. So make it one.

    maximise  E_{x, y ~ pi_theta} [ r(x, y) ] - beta KL( pi_theta(.|x) || pi_ref(.|x) )
                                                                     (Rafailov et al. 2023, Eq. 3)
    at its optimum  log pi*(y|x) / pi_ref(y|x) = score(x, y) / beta - log Z(x)              (Eq. 4)

    residual(y) = score(x, y) / beta - log pi_theta(y|x) / pi_ref(y|x)
    L(x) = 1/2 Var_y [ residual(y) ]  over responses y to x
                                                    (the log-variance loss of Richter et al. 2020)

Z(x) is unknown, but the same for all responses to x: a variance does not see it. So

  - L is 0 at pi* wherever the responses come from. Earlier responses stay valid data, and every
    update learns from some of all that were ever drawn, too (as in Bartoldson et al. 2025). A
    policy gradient needs responses of the policy as it is now, and PPO a clip where they are not.
  - On any responses the gradient of beta L is that of REINFORCE with the leave-one-out baseline:
    `python vargrad.py --replay 0` is reinforce.py.
  - With two responses L = 1/4 ((score_1 - score_2) / beta - difference of their log-ratios)^2, the
    loss of REBEL (Gao et al. 2024). DPO has a comparison where this has two scores, and the
    logistic function where this has the square.

    python vargrad.py                              # on a reward model of the pairs
    python vargrad.py --reward gold                # the task's own reward; some 3 minutes
    python vargrad.py --reward FILE.py:function    # yours, as in ppo.py

Scores are shifted and scaled to mean 0 and standard deviation 1 on responses of the reference,
whatever the reward.

Symbols: scores (B,), log_ratios (B,) log pi - log pi_ref of each response, residuals (B,).

Reads   the SFT policy, the reward model (both trained if they are missing),
        data/<dataset>/prepared/prompts_train.jsonl
Writes  runs/<dataset>/vargrad...-seed<seed>/ : log.jsonl, model.pt, evaluation.json,
        samples.jsonl, figure.png
"""
from __future__ import annotations

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import copy
import math
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

import evaluate
from common import pipeline, tasks
from common.memory import Memory
from common.processes import WORLD, add_gradients, mine, share
from common.rewards import Reward
from common.run import Run
from common.settings import (parse, require, require_numbers, require_processes, run_folder,
                             settings)
from common.sharding import shard
from common.training import (Device, Dtype, Mean, adamw, autocast, batches, check_steps, device,
                             generator, set_lr, similar_lengths, warn_of_collapse)
from model import GPT, Samples, generate, response_logprobs

# random streams: those of reinforce.py, so that --replay 0 draws what it draws
PROMPTS, RESPONSES, ROLLOUT = 1, 2, 3


@settings
class Config:
    dataset: str = "reviews"  # Task: a folder of data/, or one of your own files.
    preset: str = "cpu"  # Kind of machine that the task's sizes are meant for.

    # ---- what is maximised
    reward: str = "model"  # Reward: model = learned from the pairs, gold = the task's own, the run
    # folder of a reward model or of a policy (its implicit reward), or FILE.py:function.
    beta: float = 0.1  # KL coefficient, in standard deviations of the score per nat.

    # ---- what it starts from
    prompts: int = 0  # Prompts of the reward model's pairs, six each; 0 = the task's number.
    pairs_seed: int = 0  # Seed of the reward model and its pairs: prompts, responses, labels.
    sft: str = ""  # Run folder of the SFT policy, if not runs/<dataset>/sft.

    # ---- optimisation
    steps: int = 50  # Updates, each on a batch of new responses and on batches of earlier ones.
    batch_size: int = 256  # Responses of a batch.
    samples: int = 16  # Responses to each prompt among them.
    replay: int = 3  # Batches of earlier responses in an update, an optimizer step each.
    micro_batch_size: int = 64  # Responses per forward pass, of similar length. Same gradient.
    lr: float = 5e-4  # Learning rate after the warm-up, from where it falls linearly to 0.
    warmup: int = 10  # Updates of linear warm-up.
    max_grad_norm: float = 1.0  # Norm at which gradients are clipped.
    seed: int = 0  # Seed of prompts, responses and of which earlier ones are used again.
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
            from_0="replay prompts pairs_seed seed evaluate_every bank_samples checkpoint_every")
        require(self.samples > 1, "--samples: a variance needs 2 responses or more to a prompt")
        require(self.batch_size % self.samples == 0,
                f"--batch-size {self.batch_size}: must be a multiple of --samples {self.samples}")
        require(self.batch_size // self.samples >= WORLD,
                f"--samples {self.samples}: a batch has fewer prompts than there are processes")
        require(self.reward == "model" or not self.prompts, "--prompts: needs --reward model")
        require(self.reward == "model" or not self.pairs_seed, "--pairs-seed: needs --reward model")
        name = {"model": "vargrad", "gold": "vargrad-gt"}.get(self.reward, "vargrad")
        never = ("reward",) if self.reward == "gold" else ()
        self.out = self.out or run_folder(self, name, always=("beta", "seed"), never=never)


def variance_loss(scores: torch.Tensor, log_ratios: torch.Tensor, beta: float,
                  samples: int) -> torch.Tensor:
    """Half the variance of score / beta - log pi/pi_ref among each prompt's `samples` responses,
    (B / samples,) nats squared.

    Args:
        scores, log_ratios: (B,) the responses to a prompt are neighbours.
    """
    residuals = (scores / beta - log_ratios).view(-1, samples)  # (prompts, samples)
    return 0.5 * residuals.var(1)


def group_rows(groups: torch.Tensor, samples: int) -> torch.Tensor:
    """The rows of some groups, (len(groups) samples,): those of a group are neighbours."""
    return (groups[:, None] * samples + torch.arange(samples, device=groups.device)).flatten()


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

    # ---- 2) the policy starts as a copy of the reference; nothing is remembered yet --------------
    K = config.samples
    G = min(config.batch_size // K, len(prompts))  # prompts of a batch: groups of K responses
    B = G * K
    policy = copy.deepcopy(ref).requires_grad_(True).train()
    memory = Memory(config.steps * B, ref.config.block_size)
    if config.shard:
        shard(policy, ref)
    networks = nn.ModuleDict({"policy": policy, "memory": memory}).to(device())
    optimizer = adamw(policy, config.lr, 0.0, (0.9, 0.95))
    check_steps(config.steps, config.warmup)
    state = {"score_mean": 0.0, "score_std": 1.0}  # of the reference's scores
    run = Run(config, networks, [optimizer], built_from(start, reward), config.steps, state)
    if run.step == 0:
        order = torch.randperm(len(prompts), generator=generator(config.seed, PROMPTS))
        rows = order.repeat(512 // len(prompts) + 1)[:512].tolist()
        _, _, reference_scores = roll_out(ref, rows, generator(config.seed, RESPONSES))
        std = reference_scores.double().std(correction=0).item()
        state["score_mean"] = reference_scores.double().mean().item()
        state["score_std"] = std if std > 1e-6 else 1.0
    prompt_lengths = torch.tensor([len(ids) for ids in prompt_ids])
    batch_iterator = batches(prompt_lengths, G, config.seed, run.step, pool=1)
    logprobs_of = torch.compile(response_logprobs) if config.compile else response_logprobs

    # ---- 3) train --------------------------------------------------------------------------------
    name = f"VarGrad on {config.reward}, beta {config.beta:g}"
    bar = tqdm(range(run.step, config.steps), name, config.steps, initial=run.step)
    for step in bar:
        if config.evaluate_every and step % config.evaluate_every == 0:
            evaluate.log_evaluation(run, step, policy, start)
        lr = config.lr * min(1, (step + 1) / config.warmup) * (1 - step / config.steps)
        set_lr([optimizer], lr)

        # 3a) roll out: sample responses and score them
        rows = next(batch_iterator).repeat_interleave(K)  # (B,) numbers of prompts
        samples, responses, raw_scores = roll_out(policy, rows.tolist(),
                                                  generator(config.seed, ROLLOUT, step))
        # in standard deviations of the reference's scores: beta means the same for every reward
        scores = ((raw_scores - state["score_mean"]) / state["score_std"]).float()

        # 3b) remember them, with log pi_ref(y|x)
        lengths = samples.lengths.to(device())
        ref_logprobs = torch.zeros(B, device=device())
        with torch.no_grad(), autocast(config.dtype):
            for part in similar_lengths(mine(torch.arange(B, device=device())), lengths,
                                        config.micro_batch_size):
                ref_logprobs[part] = logprobs_of(ref, samples.tokens.to(device())[part],
                                                 samples.prompt_lengths.to(device())[part],
                                                 lengths[part]).sum(1)
        share(ref_logprobs)  # of several processes: all rows for everyone
        memory.write(step * B, samples, scores, ref_logprobs)

        # 3c) a step on the new batch, then steps on groups from all that is remembered: the loss is
        # 0 at the optimum whatever policy drew them. The first update has nothing earlier.
        fresh = torch.arange(step * G, (step + 1) * G, device=device())  # numbers of groups
        draw = generator(config.seed, "replay", step)
        steps_of_update = [fresh] + [
            torch.randint((step + 1) * G, (G,), generator=draw).to(device())
            for _ in range(config.replay if step else 0)
        ]
        longest = memory.lengths.view(-1, K).amax(1)  # of each group
        losses_of_update = []
        for groups in steps_of_update:
            rows_of_step = group_rows(groups, K)
            tokens_of_step = (memory.lengths - memory.prompt_lengths)[rows_of_step].sum()
            metrics = Mean()
            for part in similar_lengths(mine(groups), longest,
                                        max(1, config.micro_batch_size // K)):
                of_part = group_rows(part, K)
                with autocast(config.dtype):
                    logprobs = logprobs_of(policy, *memory.inputs(of_part)).sum(1)  # (b,)
                losses = variance_loss(memory.scores[of_part],
                                       logprobs - memory.ref_logprobs[of_part], config.beta, K)
                # beta K / tokens: its gradient on a new batch is that of reinforce.py
                (config.beta * K * losses.sum() / tokens_of_step).backward()
                metrics.add(loss=losses)

            add_gradients(policy)  # of several processes, each with its share of the rows
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(),
                                                       config.max_grad_norm).item()
            losses_of_update.append(metrics.values()["loss"])
            run.check_finite(step, rows, loss=losses_of_update[-1], grad_norm=grad_norm,
                             score=scores.mean().item())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        # 3d) log
        kl = samples.logprobs.sum(1) - ref_logprobs.cpu()  # (B,) log pi as it was sampled
        ended = samples.tokens[torch.arange(B), samples.lengths - 1] == tokenizer.eos
        row = {
            "step": step,
            "scores": scores.mean().item(),
            "raw_scores": raw_scores.mean().item(),
            "kl": kl.mean().item(),
            "kl_se": (kl.std(correction=min(1, B - 1)) / math.sqrt(B)).item(),
            "objective": (scores - config.beta * kl).mean().item(),
            "loss": losses_of_update[0],
            "entropy": -samples.logprobs.sum(1).mean().item(),
            "length": (samples.lengths - samples.prompt_lengths).float().mean().item(),
            "eos_rate": ended.float().mean().item(),
            "distinct": len(set(responses)) / B,
        }
        if len(losses_of_update) > 1:  # of the last batch of earlier responses
            row["replay_loss"] = losses_of_update[-1]
        run.log(**row, grad_norm=grad_norm, lr=lr)
        warn_of_collapse(run, step, responses)
        bar.set_postfix_str(f"score {row['raw_scores']:.3f}, KL {row['kl']:.2f}")
        run.checkpoint(step + 1)

    if config.evaluate_every:
        evaluate.log_evaluation(run, config.steps, policy, start)

    # ---- 4) gold reward and KL on test prompts, samples, figure; printed when all of it is written
    result = {"step": config.steps, "seconds": run.seconds(), "samples": config.steps * B,
              "reward_calls": config.steps * B}
    run.log(**result)
    # of the reward that is measured, theory says where it ends (beta is in its standard deviations)
    end_beta = config.beta * state["score_std"] if reward is start.measure else None
    report = evaluate.report(run, name, policy.eval(), start, end_beta, result)
    curves = {
        "score, in standard deviations of the reference's": evaluate.logged(run.rows, "scores"),
        "KL to the reference, nats per response": evaluate.logged(run.rows, "kl"),
    }
    evaluate.draw_run(run.folder / "figure.png", "VarGrad on training prompts", curves, report)
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
