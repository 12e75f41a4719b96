"""Direct Preference Optimization: a policy from preference pairs, without a reward model and
without sampling.

    L(theta) = - E_{(x, y_w, y_l)} log sigmoid( beta log pi_theta(y_w|x)/pi_ref(y_w|x)
                                              - beta log pi_theta(y_l|x)/pi_ref(y_l|x) )     (Eq. 7)

(Rafailov et al. 2023.) It is the Bradley-Terry likelihood of the pairs under the implicit reward
r(x, y) = beta log pi_theta(y|x)/pi_ref(y|x). If the pairs do come from a Bradley-Terry model with
reward r*, its optimum is pi_ref(y|x) exp(r*(x, y) / beta) / Z(x), Eq. 4.

Length-regularised DPO (Park et al. 2024) adds alpha (|y_w| - |y_l|) inside the sigmoid. What length
explains of the labels the policy need not, and the optimum is that of r* - alpha |y|.

    python dpo.py --beta 0.1                  # two to three minutes from nothing, then 40 seconds
    python dpo.py --dataset imdb --beta 0.1   # the paper's sentiment task, two hours on 2 cores
    python dpo.py --length-alpha 0.02         # where labels like long responses; |y| in tokens
    python dpo.py --loss ipo                  # a squared loss, whose margins stay bounded
    python dpo.py --loss unlikelihood         # the paper's baseline, without a reference
    python dpo.py --loss FILE.py:function     # a loss of your own: see docs/your_own.md
    python dpo.py --pairs FILE.jsonl          # your own pairs: {"prompt", "chosen", "rejected"}
    python dpo.py --dataset FOLDER            # your own pairs and texts, see common/own_data.py

Reads   the SFT policy (trained if it is missing); the pairs (sampled from it and labelled, if they
        are missing)
Writes  runs/<dataset>/dpo-beta<beta>-seed<seed>.../ : log.jsonl, model.pt, evaluation.json,
        samples.jsonl, figure.png

Differs from the paper: AdamW for RMSprop, tiny models and so a larger learning rate; reference
log-probabilities are computed once, before training; on `reviews` the labels are drawn from the
Bradley-Terry model instead of being free of noise, because then the theory says where DPO must end
(--labels argmax gives the paper's).

Symbols: chosen = y_w, rejected = y_l, reward = the implicit one above, logprobs are sums over the
response's tokens.
"""
from __future__ import annotations

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import copy
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
from common import pipeline, tasks
from common.files import sha256
from common.pairs import pair_tensors
from common.processes import add_gradients, mine
from common.run import Run
from common.settings import (parse, require, require_numbers, require_processes, run_folder,
                             settings)
from common.sharding import shard
from common.training import (Device, Dtype, Mean, adamw, autocast, batches, check_steps, device,
                             half_ties, set_lr, warmup_linear)
from common.user_code import Loss, own_loss
from model import response_logprobs, summed_logprobs

# --loss -> the method's name in tables
LOSSES = {"dpo": "DPO", "ipo": "IPO", "unlikelihood": "Unlikelihood"}


@settings
class Config:
    dataset: str = "reviews"  # Task: a folder of data/, or one of your own files.
    preset: str = "cpu"  # Kind of machine that the task's sizes are meant for.

    # ---- the loss
    loss: str = "dpo"  # Which: dpo, ipo, unlikelihood (the paper's baseline, without a reference)
    # or FILE.py:function of yours.
    beta: float = 0.1  # Weight of the KL to the reference: small = far from it.
    label_smoothing: float = 0.0  # Chance that a label is wrong (conservative DPO); below 0.5.
    length_alpha: float = 0.0  # How much the labels like a token more of length, in log-odds.
    alpha: float = 0.5  # Weight of the rejected response in the unlikelihood loss.

    # ---- what it learns from
    labels: Literal["bt", "argmax"] = "bt"  # Who wins: by Bradley-Terry, or the better.
    prompts: int = 0  # Prompts to sample pairs for, six pairs each; 0 = the task's number.
    pairs_seed: int = 0  # Seed of the pairs: which prompts, which responses, which labels.
    pairs: str = ""  # A JSON-lines file of your own pairs, in place of sampled ones.
    sft: str = ""  # Run folder of the SFT policy, if not runs/<dataset>/sft.

    # ---- optimisation
    epochs: float = 1.0  # Passes over the pairs; the paper makes one.
    batch_size: int = 32  # Pairs per step.
    micro_batch_size: int = 0  # Pairs per forward pass if memory is short; 0 = all. Same gradient.
    lr: float = 2e-4  # Learning rate after the warm-up, from where it falls linearly to 0.
    warmup: int = 15  # Steps of linear warm-up.
    max_grad_norm: float = 1.0  # Norm at which gradients are clipped.
    seed: int = 0  # Seed of the order of the pairs.
    dtype: Dtype = "auto"  # Number format of matrix products; auto = bfloat16 on CUDA.
    device: Device = "auto"  # Where it is computed; auto = CUDA where there is one, else the CPU.
    compile: bool = False  # Use torch.compile on the model.
    shard: bool = False  # Share the weights, too, between the processes of torchrun (FSDP2).

    # ---- the run
    out: str = ""  # Run folder, if not one named by the settings, beside the SFT policy.
    evaluate_every: int = 0  # Steps between evaluations on the test prompts; 0 = only at the end.
    bank_samples: int = 0  # Reference responses per test prompt, for the optimum; 0 = the task's.
    checkpoint_every: float = 60.0  # Seconds between checkpoints.
    resume: bool = False  # Go on from the last checkpoint.

    def __post_init__(self) -> None:
        require_processes(self)
        require_numbers(
            self,
            above_0="beta epochs batch_size lr warmup max_grad_norm",
            from_0="alpha length_alpha prompts pairs_seed micro_batch_size seed evaluate_every "
            "bank_samples checkpoint_every")
        unlikelihood = self.loss == "unlikelihood"
        require(self.loss in LOSSES or ".py:" in self.loss,
                f"--loss {self.loss!r}: expected {', '.join(LOSSES)} or FILE.py:function")
        require(0 <= self.label_smoothing < 0.5,
                f"--label-smoothing {self.label_smoothing}: must be in [0, 0.5)")
        require(self.loss == "dpo" or not self.label_smoothing,
                "--label-smoothing: needs --loss dpo")
        require(self.loss == "dpo" or not self.length_alpha, "--length-alpha: needs --loss dpo")
        require(not unlikelihood or self.beta == Config.beta,
                "--beta: not with --loss unlikelihood, which has none")
        require(unlikelihood or self.alpha == Config.alpha, "--alpha: needs --loss unlikelihood")
        require(not (self.prompts and self.pairs), "--prompts: not with --pairs")
        require(not (self.pairs_seed and self.pairs), "--pairs-seed: not with --pairs")
        self.out = self.out or run_folder(
            self,
            self.loss if self.loss in LOSSES else "dpo",
            always=("alpha" if unlikelihood else "beta", "seed"),
            never=("loss",) if self.loss in LOSSES else ())


def dpo_loss(chosen_logprobs: torch.Tensor,
             rejected_logprobs: torch.Tensor,
             ref_chosen_logprobs: torch.Tensor,
             ref_rejected_logprobs: torch.Tensor,
             beta: float,
             label_smoothing: float = 0.0,
             length_alpha: float = 0.0,
             chosen_lengths: torch.Tensor | None = None,
             rejected_lengths: torch.Tensor | None = None
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The DPO loss of each pair, Eq. 7; with label smoothing, conservative DPO (Mitchell 2023);
    with a length alpha, length-regularised DPO (Park et al. 2024, Eq. 9).

    Args:
        *_logprobs: (B,) log pi(y|x), *summed* over the response's tokens, in nats. A mean would
            divide beta by the length.
        beta: weight of the KL to the reference, > 0.
        label_smoothing: the chance that chosen and rejected are the wrong way round.
        length_alpha: log-odds of being chosen for a token more; *_lengths are then (B,) tokens.
    Returns:
        losses (B,); chosen_rewards and rejected_rewards (B,), the implicit rewards, without
        gradient.

    Its gradient, below Eq. 7, is
        -beta sigmoid(rejected_reward - chosen_reward) [grad log pi(y_w) - grad log pi(y_l)]
    so a pair weighs as much as the implicit reward gets it wrong. At pi_theta = pi_ref the loss is
    ln 2 and the weight 1/2.
    """
    chosen_rewards = beta * (chosen_logprobs - ref_chosen_logprobs)
    rejected_rewards = beta * (rejected_logprobs - ref_rejected_logprobs)
    margin = chosen_rewards - rejected_rewards
    if length_alpha:  # plus: who wins by length needs less reward to win
        margin = margin + length_alpha * (chosen_lengths - rejected_lengths)
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def ipo_loss(chosen_logprobs: torch.Tensor, rejected_logprobs: torch.Tensor,
             ref_chosen_logprobs: torch.Tensor, ref_rejected_logprobs: torch.Tensor,
             beta: float) -> torch.Tensor:
    """(h - 1 / (2 beta))^2 of each pair, (B,), where h is the log pi/pi_ref of the chosen response
    less that of the rejected: IPO (Azar et al. 2023, Eq. 17, whose tau is our beta).

    A square in place of the sigmoid: h has a target. Where labels have no noise, DPO's h grows
    for ever and IPO's does not: of a pair that is always won it is 1 / (2 beta), of one that is won
    with probability p it is (2 p - 1) / (2 beta).
    """
    h = (chosen_logprobs - ref_chosen_logprobs) - (rejected_logprobs - ref_rejected_logprobs)
    return (h - 1 / (2 * beta)).square()


def unlikelihood_loss(chosen_logprobs: torch.Tensor, rejected_logprobs: torch.Tensor,
                      alpha: float) -> torch.Tensor:
    """-log pi(y_w|x) + alpha log pi(y_l|x) of each pair, (B,): the paper's Unlikelihood baseline
    (sections 6, C.3).

    No reference and no sigmoid: nothing stops the second term, which has no lower bound.
    """
    return -chosen_logprobs + alpha * rejected_logprobs


def losses_of(
        config: Config, chosen_logprobs: torch.Tensor, rejected_logprobs: torch.Tensor,
        ref_chosen_logprobs: torch.Tensor, ref_rejected_logprobs: torch.Tensor,
        lengths: torch.Tensor,
        own: Loss | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss that --loss names, and the implicit rewards, (B,) each: in training and on held-out
    pairs alike.

    Args:
        lengths: (2, B) tokens of the chosen and of the rejected response.
        own: that loss, if --loss is FILE.py:function.
    """
    logprobs = (chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    losses, chosen_rewards, rejected_rewards = dpo_loss(*logprobs, config.beta,
                                                        config.label_smoothing,
                                                        config.length_alpha, *lengths)
    if config.loss == "ipo":
        losses = ipo_loss(*logprobs, config.beta)
    elif config.loss == "unlikelihood":
        losses = unlikelihood_loss(chosen_logprobs, rejected_logprobs, config.alpha)
    elif own:
        losses = own(chosen_logprobs - ref_chosen_logprobs,
                     rejected_logprobs - ref_rejected_logprobs, config.beta, *lengths)
    return losses, chosen_rewards, rejected_rewards


def train(config: Config) -> Path:
    """Build what is missing, train, evaluate, and return the run folder."""
    # ---- 1) the reference policy, the pairs, and what the policy will be measured with -----------
    own = None if config.loss in LOSSES else own_loss(config.loss)  # tried before all else
    start = pipeline.start(config)
    pairs = pair_tensors(start.pairs, start.tokenizer.pad)  # (2, N, ...): chosen, rejected
    train_rows, held_rows = start.split()  # numbers of pairs; no prompt is in both
    ref_logprobs = pipeline.reference_logprobs(start, pairs)  # (2, N), once: it does not change
    response_lengths = (pairs.lengths - pairs.prompt_lengths).to(device())  # (2, N) tokens

    # ---- 2) the policy starts as a copy of the reference -----------------------------------------
    policy = copy.deepcopy(start.ref).train()
    if config.shard:
        shard(policy, start.ref)
    optimizer = adamw(policy, config.lr, weight_decay=0.0, betas=(0.9, 0.95))
    steps = max(1, round(config.epochs * len(train_rows) / config.batch_size))
    check_steps(steps, config.warmup)
    run = Run(config, policy, [optimizer], built_from(config, start), steps)
    longer = pairs.lengths.amax(0)[train_rows]  # similar lengths go together and save padding
    batch_iterator = batches(longer, config.batch_size, config.seed, start=run.step)
    forward = torch.compile(response_logprobs) if config.compile else response_logprobs

    def logprobs_of(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log pi(y|x) of the chosen and of the rejected responses, (b,) each, from one forward pass
        of 2 b rows."""
        tokens = pairs.tokens[:, rows].flatten(0, 1).to(device())  # (2 b, T)
        prompt_lengths = pairs.prompt_lengths[:, rows].flatten().to(device())
        lengths = pairs.lengths[:, rows].flatten().to(device())
        with autocast(config.dtype):
            logprobs = forward(policy, tokens, prompt_lengths, lengths)  # (2 b, R), one per token
        chosen, rejected = logprobs.sum(1).view(2, -1)
        return chosen, rejected

    # ---- 3) train --------------------------------------------------------------------------------
    weight = f"beta {config.beta:g}"
    if config.loss == "unlikelihood":
        weight = f"alpha {config.alpha:g}"
    if config.length_alpha:
        weight += f", length alpha {config.length_alpha:g}"
    name = f"{LOSSES.get(config.loss, Path(config.loss).name)} {weight}"
    bar = tqdm(range(run.step, steps), f"{name}, {len(train_rows)} pairs", steps, initial=run.step)
    for step in bar:
        if config.evaluate_every and step % config.evaluate_every == 0:
            evaluate.log_evaluation(run, step, policy, start)
        lr = config.lr * warmup_linear(step, steps, config.warmup)
        set_lr([optimizer], lr)

        batch = train_rows[next(batch_iterator)]  # (B,) numbers of pairs
        metrics = Mean()
        for rows in mine(batch).split(config.micro_batch_size or len(batch)):
            chosen_logprobs, rejected_logprobs = logprobs_of(rows)
            lengths = response_lengths[:, rows]
            losses, chosen_rewards, rejected_rewards = losses_of(
                config, chosen_logprobs, rejected_logprobs, *ref_logprobs[:, rows], lengths, own)
            # divided by the whole batch, so that micro-batches add up to the gradient of its mean
            (losses.sum() / len(batch)).backward()
            metrics.add(loss=losses, accuracy=half_ties(chosen_rewards, rejected_rewards),
                        chosen_reward=chosen_rewards, rejected_reward=rejected_rewards,
                        margin=chosen_rewards - rejected_rewards,
                        chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs)
            if config.length_alpha:  # the sizes of beta's margin and of alpha's: which one rules?
                length_margins = config.length_alpha * (lengths[0] - lengths[1])
                metrics.add(margin_size=(chosen_rewards - rejected_rewards).abs(),
                            length_margin_size=length_margins.abs())

        add_gradients(policy)  # of several processes, each with its share of the rows
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm).item()
        values = metrics.values()
        run.check_finite(step, batch, **values, grad_norm=grad_norm)  # stop before a NaN spreads
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        run.log(step=step, **values, grad_norm=grad_norm, lr=lr)
        if step % 10 == 0:
            bar.set_postfix_str(f"loss {values['loss']:.3f}, accuracy {values['accuracy']:.2f}")
        run.checkpoint(step + 1)

    if config.evaluate_every:
        evaluate.log_evaluation(run, steps, policy, start)

    # ---- 4) held-out pairs: is the implicit reward right about labels that it has not seen? ------
    policy.eval()
    result = {"step": steps, "seconds": run.seconds()}
    if len(held_rows):
        held_logprobs = []
        for side in range(2):  # chosen, rejected
            tokens, prompt_lengths, lengths = (x[side, held_rows] for x in pairs)
            held_logprobs.append(
                summed_logprobs(policy, tokens, prompt_lengths, lengths, config.dtype))
        losses, chosen_rewards, rejected_rewards = losses_of(
            config, *held_logprobs, *ref_logprobs[:, held_rows].cpu(),
            response_lengths[:, held_rows].cpu(), own)
        result["held_out_loss"] = losses.mean().item()
        result["held_out_accuracy"] = half_ties(chosen_rewards, rejected_rewards).mean().item()
        result["held_out_margin"] = (chosen_rewards - rejected_rewards).mean().item()
    run.log(**result)

    # ---- 5) gold reward and KL on test prompts, samples, figure; printed when all of it is written
    end = None if start.own_pairs else end_beta(config)
    report = evaluate.report(run, name, policy, start, end, result)
    curves = {key: evaluate.smoothed(run.rows, key) for key in ("loss", "accuracy")}
    ln_2 = None
    if config.loss == "dpo" and not config.length_alpha:
        ln_2 = (0.6931, "ln 2, the loss at the start")
    evaluate.draw_run(run.folder / "figure.png", f"{name} on the pairs", curves, report, ln_2)
    run.finish(policy, start.tokenizer)
    report.show()
    print(f"\nfigure, log, samples and model  ->  {run.folder}")
    return run.folder


def built_from(config: Config, start: pipeline.Start) -> dict[str, str]:
    """What a run is made from: with other weights, pairs or code of a loss under the same names it
    is another run."""
    made_from = {"policy": start.policy_id, "pairs": start.pairs_id}
    if config.loss not in LOSSES:
        made_from["loss"] = sha256(config.loss.rpartition(":")[0])
    return made_from


def end_beta(config: Config) -> float | None:
    """The beta of the optimum at which this run must end with endless pairs, if theory says so.

    Labels of the Bradley-Terry model with reward s r have their optimum at
    pi_ref exp(s r / beta) / Z: that of r at beta / s. Labels without noise have none, label
    smoothing assumes a noise that these labels do not have, and with a length alpha it is the
    optimum of another reward, s r - alpha |y|.
    """
    altered = config.label_smoothing or config.length_alpha
    if config.loss != "dpo" or config.labels != "bt" or altered:
        return None
    return config.beta / tasks.load(config.dataset).label_scale


if __name__ == "__main__":
    train(parse(Config, __doc__))
