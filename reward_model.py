"""The reward model of RLHF: which of two responses is the better one, as a score for each.

    L(phi) = - E_{(x, y_w, y_l)} log sigmoid( r_phi(x, y_w) - r_phi(x, y_l) )
                                                                     (Rafailov et al. 2023, Eq. 2)

It is bt.py's model with a network for the strengths: what it learns on some texts, it says of
others.

    python reward_model.py                       # on the pairs of `reviews`; a minute on 2 cores
    python reward_model.py --pairs FILE.jsonl    # your own pairs: {"prompt", "chosen", "rejected"}
    python reward_model.py --dataset FOLDER      # your own pairs and texts, see common/own_data.py

Reads   the SFT policy, which the network starts from; the pairs (both made if they are missing)
Writes  runs/<dataset>/reward-model.../ : config.json, log.jsonl, model.pt, tokenizer.tiktoken

The score is read at the response's last token. The loss depends on differences of scores alone, so
their mean means nothing; but PPO weighs scores against the KL, so their scale does. Both are set at
the end: scores have mean 0 and standard deviation 1 on the responses of the SFT policy (Stiennon et
al. 2020).

Symbols: chosen = y_w, rejected = y_l, scores = r_phi(x, y).
"""
from __future__ import annotations

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import pipeline
from common.files import sha256
from common.pairs import pair_tensors
from common.processes import add_gradients, mine
from common.rewards import all_scores
from common.run import Run
from common.settings import (parse, require, require_numbers, require_processes, run_folder,
                             settings)
from common.sharding import shard
from common.training import (Device, Dtype, Mean, adamw, autocast, batches, check_steps, device,
                             half_ties, set_lr, warmup_cosine)
from model import ScalarModel


@settings
class Config:
    dataset: str = "reviews"  # Task: a folder of data/, or one of your own files.
    preset: str = "cpu"  # Kind of machine that the task's sizes are meant for.

    # ---- what it learns from
    labels: Literal["bt", "argmax"] = "bt"  # Who wins: by Bradley-Terry, or the better.
    prompts: int = 0  # Prompts to sample pairs for, six pairs each; 0 = the task's number.
    pairs_seed: int = 0  # Seed of the pairs: which prompts, which responses, which labels.
    pairs: str = ""  # A JSON-lines file of your own pairs, in place of sampled ones.
    sft: str = ""  # Run folder of the SFT policy, if not runs/<dataset>/sft.
    block_size: int = 0  # Tokens of prompt and response; 0 = as many as the SFT policy has.

    # ---- optimisation
    epochs: float = 1.0  # Passes over the pairs.
    batch_size: int = 32  # Pairs per step.
    micro_batch_size: int = 0  # Pairs per forward pass if memory is short; 0 = all. Same gradient.
    lr: float = 5e-4  # Peak learning rate.
    warmup: int = 20  # Steps of linear warm-up; then a cosine down to a tenth of the rate.
    weight_decay: float = 0.01  # Weight decay of matrices.
    max_grad_norm: float = 1.0  # Norm at which gradients are clipped.
    seed: int = 0  # Seed of the initial head and of the order of the pairs.
    dtype: Dtype = "auto"  # Number format of matrix products; auto = bfloat16 on CUDA.
    device: Device = "auto"  # Where it is computed; auto = CUDA where there is one, else the CPU.
    compile: bool = False  # Use torch.compile on the model.
    shard: bool = False  # Share the weights, too, between the processes of torchrun (FSDP2).

    # ---- the run
    out: str = ""  # Run folder, if not one named by the settings, beside the SFT policy.
    checkpoint_every: float = 60.0  # Seconds between checkpoints.
    resume: bool = False  # Go on from the last checkpoint.

    def __post_init__(self) -> None:
        require_processes(self)
        require_numbers(
            self,
            above_0="epochs batch_size lr warmup max_grad_norm",
            from_0="prompts pairs_seed block_size micro_batch_size weight_decay seed "
            "checkpoint_every")
        require(self.block_size == 0 or self.block_size > 2,
                f"--block-size {self.block_size}: must be 0 or > 2")
        require(not (self.prompts and self.pairs), "--prompts: not with --pairs")
        require(not (self.pairs_seed and self.pairs), "--pairs-seed: not with --pairs")
        self.out = self.out or run_folder(self, "reward-model")


def reward_loss(chosen_scores: torch.Tensor, rejected_scores: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry negative log-likelihood of each pair, Eq. 2: -log sigmoid(chosen - rejected).
    All (B,)."""
    return -F.logsigmoid(chosen_scores - rejected_scores)


def train(config: Config) -> Path:
    """Train on pairs, measure on held-out ones, and return the run folder."""
    # ---- 1) the SFT policy and the pairs ---------------------------------------------------------
    start = pipeline.start(config, bank=False)
    # (2, N, ...): chosen and rejected responses of N pairs
    pairs = pair_tensors(start.pairs, start.tokenizer.pad)
    # numbers of pairs; no prompt is in both
    train_rows, held_rows = start.split()

    # ---- 2) the network starts from the policy, with a random head -------------------------------
    block_size = config.block_size or start.ref.config.block_size
    model = ScalarModel.from_policy(start.ref, block_size, config.seed).to(device()).train()
    if config.shard:
        shard(model)
    optimizer = adamw(model, config.lr, config.weight_decay, betas=(0.9, 0.95))
    steps = max(1, round(config.epochs * max(1, len(train_rows) // config.batch_size)))
    check_steps(steps, config.warmup)
    run = Run(config, model, [optimizer], built_from(config, start), steps)
    # (N,) pairs of similar length go together, which saves padding
    longer = pairs.lengths.amax(0)[train_rows]
    batch_iterator = batches(longer, config.batch_size, config.seed, start=run.step)
    score = torch.compile(model.score) if config.compile else model.score

    def scores_of(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of the chosen and of the rejected responses, (b,) each, from one forward pass of 2
        b rows."""
        lengths = pairs.lengths[:, rows].flatten()
        tokens = pairs.tokens[:, rows].flatten(0, 1)[:, :int(lengths.max())]  # (2 b, T)
        with autocast(config.dtype):
            chosen, rejected = score(tokens.to(device()), lengths.to(device())).view(2, -1)
        return chosen, rejected

    # ---- 3) train --------------------------------------------------------------------------------
    bar = tqdm(range(run.step, steps),
               f"reward model on {len(train_rows)} pairs",
               steps,
               initial=run.step)
    for step in bar:
        lr = config.lr * warmup_cosine(step, steps, config.warmup)
        set_lr([optimizer], lr)

        batch = train_rows[next(batch_iterator)]  # (B,) numbers of pairs
        metrics = Mean()
        for rows in mine(batch).split(config.micro_batch_size or len(batch)):
            chosen_scores, rejected_scores = scores_of(rows)
            losses = reward_loss(chosen_scores, rejected_scores)
            # divided by the whole batch, so that micro-batches add up to the gradient of its mean
            (losses.sum() / len(batch)).backward()
            metrics.add(loss=losses, accuracy=half_ties(chosen_scores, rejected_scores))

        add_gradients(model)  # of several processes, each with its share of the rows
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
        values = metrics.values()
        run.check_finite(step, batch, **values, grad_norm=grad_norm)  # stop before a NaN spreads
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        run.log(step=step, **values, grad_norm=grad_norm, lr=lr)
        if step % 10 == 0:
            bar.set_postfix_str(f"loss {values['loss']:.3f}, accuracy {values['accuracy']:.2f}")
        run.checkpoint(step + 1)

    # ---- 4) normalise the scores, and measure on held-out pairs ----------------------------------
    model.eval()
    scores = all_scores(model, pairs.tokens.flatten(0, 1), pairs.lengths.flatten(), config.dtype)
    # of the SFT policy's responses, which the pairs are made of
    model.mean.fill_(scores.mean().item())
    # equal scores have no scale
    model.std.fill_(scores.std().item() if scores.std() > 1e-6 else 1.0)
    result = {"step": steps, "seconds": run.seconds()}
    if len(held_rows):
        result |= pair_accuracy(*scores.view(2, -1)[:, held_rows])
    run.log(**result)
    run.finish(model, start.tokenizer)
    for name, value in result.items():
        print(f"{name.replace('_', ' '):36} {value:.4g}")
    if not len(held_rows):
        print("no pair is held out: there are too few of them, or of their prompts")
    print_scored(start, held_rows.tolist()[:3], scores.view(2, -1), model)
    print(f"  ->  {run.folder}")
    return run.folder


def pair_accuracy(chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, float]:
    """How often the chosen response scores higher, in all and by the model's confidence:
    sigmoid(|margin|) in thirds of 0.5 to 1. A calibrated model is right 58, 75 and 92% of the time
    at the middle of the three."""
    right = half_ties(chosen, rejected)
    confidence = torch.sigmoid((chosen - rejected).abs())
    result = {
        "held_out_accuracy": right.mean().item(),
        "held_out_loss": reward_loss(chosen, rejected).mean().item()
    }
    for low, high in ((0.5, 0.667), (0.667, 0.833), (0.833, 1.01)):
        inside = (confidence >= low) & (confidence < high)
        if inside.any():
            span = f"{low:.2f}_to_{min(high, 1):.2f}"
            result[f"accuracy_at_confidence_{span}"] = right[inside].mean().item()
            result[f"share_at_confidence_{span}"] = inside.float().mean().item()
    return result


def print_scored(start: pipeline.Start, rows: list[int], scores: torch.Tensor,
                 model: ScalarModel) -> None:
    """A few held-out pairs as texts, with their scores (2, N), shifted and scaled as they are
    used."""
    scores = (scores - model.mean.cpu()) / model.std.cpu()
    for i in rows:
        pair = start.pairs[i]
        print(f"\nprompt          {start.tokenizer.decode(pair.prompt)!r}")
        for side, name in enumerate(("chosen", "rejected")):
            text = start.tokenizer.decode(pair[1 + side]).strip()
            print(f"  {name:8} {scores[side, i]:+.2f}  {text}")


def built_from(config: Config, start: pipeline.Start | None = None) -> dict[str, str]:
    """What a run is made from: with other weights or other pairs under the same names it is another
    run."""
    if start is None:  # asked before it is trained: is the one that is there still the right one?
        sft = pipeline.sft_policy(config.sft, config.dataset, config.preset, config.dtype)
        start = pipeline.load(sft, config.dataset, config.preset, config.dtype)
        if own := pipeline.own_pairs_file(config):
            start.pairs_id = sha256(own)
        else:
            start.gold = pipeline.gold_reward(start)
            start.pairs_id = sha256(pipeline.sampled_pairs(start, config.labels, config.prompts,
                                                           config.pairs_seed))
    return {"policy": start.policy_id, "pairs": start.pairs_id}


if __name__ == "__main__":
    train(parse(Config, __doc__))
