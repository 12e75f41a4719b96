"""Direct Preference Optimization: learn a policy from preference pairs, with no reward model and no sampling.

    L(theta) = - E_{(x, y_w, y_l)} log sigmoid( beta log pi_theta(y_w|x)/pi_ref(y_w|x)
                                              - beta log pi_theta(y_l|x)/pi_ref(y_l|x) )      (Rafailov et al. 2023, Eq. 7)

It is the Bradley-Terry likelihood of the pairs under the implicit reward r(x, y) = beta log pi_theta(y|x)/pi_ref(y|x). If
the pairs do come from a Bradley-Terry model with reward r*, its optimum is pi_ref(y|x) exp(r*(x, y) / beta) / Z(x), Eq. 4.

    python dpo.py --beta 0.1                     # `reviews`, from nothing: under 2 minutes on 2 cores, half of one the next time
    python dpo.py --dataset imdb --beta 0.1      # the paper's sentiment task, about two hours on 2 cores
    python dpo.py --loss unlikelihood --alpha 0.5        # the paper's baseline: -log pi(y_w|x) + alpha log pi(y_l|x)
    python dpo.py --pairs FILE.jsonl             # your own pairs: {"prompt", "chosen", "rejected"}

Reads   the SFT policy (trained if it is missing); the pairs (sampled from it and labelled, if they are missing)
Writes  runs/<dataset>/dpo-beta<beta>-seed<seed>/ : log.jsonl, model.pt, evaluation.json, samples.jsonl, figure.png

Differs from the paper: AdamW for RMSprop, tiny models and so a larger learning rate; reference log-probabilities are
computed once, before training; on `reviews` the labels are drawn from the Bradley-Terry model instead of being free of
noise, because then the theory says where DPO must end (--labels argmax gives the paper's).

Symbols: chosen = y_w, rejected = y_l, reward = the implicit one above, logprobs are sums over the response's tokens.
"""
from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
import reward_model
import sft
from common.files import atomic_write, sha256
from common.run import Run, check_folder
from common.settings import parse, require, require_numbers, runs_folder
from common.training import adamw, autocast, batches, device, fingerprint, pad
from common.pairs import default_labels, encode_pairs, ensure_pairs, label_scale, read_pairs
from common.tokenizer import Tokenizer
from common.run import load_run
from model import response_logprobs, summed_logprobs


@dataclass
class Config:
    dataset: str = "reviews"  # a folder of data/
    preset: str = "cpu"  # defaults for a machine: cpu, or gpu (imdb)
    beta: float = 0.1  # weight of the KL to the reference: small = far from it, large = close to it
    label_smoothing: float = 0.0  # the chance that a label is wrong, if you believe so (cDPO); below 0.5
    loss: Literal["dpo", "unlikelihood"] = "dpo"  # unlikelihood: the paper's baseline, without a reference; ignores beta
    alpha: float = 0.5  # weight of the rejected response in the unlikelihood loss
    labels: Literal["bt", "argmax"] = "bt"  # who wins: drawn from Bradley-Terry, or always the better (the paper, IMDb)
    prompts: int = 0  # prompts to sample the pairs for, six pairs each; 0 = as many as the preset says
    pairs: str = ""  # your own pairs, a JSON-lines file, in place of sampled ones
    sft: str = ""  # run folder of the SFT policy, if not runs/<dataset>/sft
    out: str = ""  # run folder, if not dpo-beta<beta>-seed<seed> beside the SFT policy
    epochs: float = 1.0  # passes over the pairs; the paper makes one
    batch_size: int = 32  # pairs a step
    micro_batch_size: int = 0  # pairs a forward pass, if memory is short; 0 = all at once; same gradient
    lr: float = 2e-4  # learning rate after the warm-up, then falling linearly to 0
    warmup: int = 15  # steps of linear warm-up
    max_grad_norm: float = 1.0  # gradient clipping
    seed: int = 0  # order of the pairs
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products; auto = bfloat16 on CUDA only
    compile: bool = False  # torch.compile the model
    evaluate_every: int = 0  # steps between evaluations on the test prompts; 0 = only at the end
    checkpoint_every: float = 60.0  # seconds between checkpoints
    resume: bool = False  # go on from the last checkpoint

    PRESETS: ClassVar[dict] = {("posts", "cpu"): dict(lr=1e-4),
                               ("tldr", "cpu"): dict(labels="argmax", lr=5e-5),
                               ("imdb", "cpu"): dict(labels="argmax", lr=3e-5, warmup=50),
                               ("imdb", "gpu"): dict(labels="argmax", lr=5e-5, warmup=150, batch_size=64)}

    def __post_init__(self) -> None:
        require_numbers(self, above_0="beta epochs batch_size lr warmup max_grad_norm",
                        from_0="alpha prompts micro_batch_size seed evaluate_every checkpoint_every")
        require(0 <= self.label_smoothing < 0.5, f"--label-smoothing {self.label_smoothing}: must be in [0, 0.5)")
        base = Path(self.sft).parent if self.sft else runs_folder(self.dataset, self.preset)
        require(self.loss == "dpo" or not self.label_smoothing, "--label-smoothing: needs --loss dpo")
        require(self.loss == "unlikelihood" or self.alpha == Config.alpha, "--alpha: needs --loss unlikelihood")
        require(not (self.prompts and self.pairs), "--prompts: not with --pairs")
        labels = "-own" if self.pairs else f"-{self.labels}" if self.labels != default_labels(self.dataset) else ""
        labels += f"-{self.prompts}" if self.prompts else ""
        weight = f"beta{self.beta:g}" if self.loss == "dpo" else f"alpha{self.alpha:g}"
        self.out = self.out or str(base / f"{self.loss}{labels}-{weight}-seed{self.seed}")


def dpo_loss(chosen_logprobs: torch.Tensor, rejected_logprobs: torch.Tensor, ref_chosen_logprobs: torch.Tensor,
             ref_rejected_logprobs: torch.Tensor, beta: float,
             label_smoothing: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The DPO loss of each pair, Eq. 7; with label smoothing, conservative DPO (Mitchell 2023).

    Args:
        *_logprobs: (B,) log pi(y|x), *summed* over the response's tokens, in nats. A mean would divide beta by the length.
        beta: weight of the KL to the reference, > 0.
        label_smoothing: the chance that chosen and rejected are the wrong way round.
    Returns:
        losses (B,); chosen_rewards and rejected_rewards (B,), the implicit rewards, without gradient.

    Its gradient is -beta sigmoid(rejected_reward - chosen_reward) [grad log pi(y_w) - grad log pi(y_l)], below Eq. 7: a pair
    weighs as much as the implicit reward gets it wrong. At pi_theta = pi_ref the loss is ln 2 and the weight 1/2.
    """
    chosen_rewards = beta * (chosen_logprobs - ref_chosen_logprobs)
    rejected_rewards = beta * (rejected_logprobs - ref_rejected_logprobs)
    margin = chosen_rewards - rejected_rewards
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def unlikelihood_loss(chosen_logprobs: torch.Tensor, rejected_logprobs: torch.Tensor, alpha: float) -> torch.Tensor:
    """-log pi(y_w|x) + alpha log pi(y_l|x) of each pair, (B,): the paper's Unlikelihood baseline (sections 6, C.3).

    No reference and no sigmoid: nothing stops the second term, which has no lower bound.
    """
    return -chosen_logprobs + alpha * rejected_logprobs


def train(config: Config) -> Path:
    """Build what is missing, train, evaluate, and return the run folder."""
    # ---- 1) the reference policy, the gold reward and the pairs ------------------------------------------------------
    check_folder(config)
    own_pairs = read_pairs(config.pairs) if config.pairs else []
    sft_folder = sft.ensure(config.sft, config.dataset, config.preset, config.dtype)
    base = sft_folder.parent
    ref, meta = load_run(sft_folder)
    tokenizer = Tokenizer.load(sft_folder / "tokenizer.tiktoken")
    evaluate.check_same_task(sft_folder, meta, {"dataset": config.dataset, "tokenizer": tokenizer.fingerprint})
    weights = fingerprint(ref.state_dict())
    pairs = encode_pairs(own_pairs, tokenizer, ref.config.block_size, config.pairs) if own_pairs else []
    gold = reward_model.ensure_gold(sft_folder, config.dataset, config.preset, config.dtype)
    path = config.pairs or ensure_pairs(base, config.dataset, config.preset, config.labels, ref, tokenizer, weights, gold,
                                        config.prompts)
    bank = evaluate.ensure_bank(base, config.dataset, config.preset, ref, tokenizer, weights, gold)
    pairs = pairs or encode_pairs(read_pairs(path), tokenizer, ref.config.block_size, path)
    held = len(pairs) // 20  # the last pairs measure the implicit reward; their prompts (but one) are not trained on
    # one row holds a chosen response, and the row `len(pairs)` further on its rejected one
    tokens, lengths = pad([p.prompt + p.chosen for p in pairs] + [p.prompt + p.rejected for p in pairs], tokenizer.pad)
    prompt_lengths = torch.tensor([len(p.prompt) for p in pairs] * 2)

    # ---- 2) reference log-probabilities, once: of these weights and these pairs, for every beta and seed --------------
    cache = base / "ref-logprobs" / f"{weights}-{sha256(path)[:16]}-{device().type}-{config.dtype}.pt"
    try:
        ref_logprobs = torch.load(cache, weights_only=True)
    except Exception:  # not there, or damaged, of which torch.load knows many kinds
        ref_logprobs = summed_logprobs(ref, tokens, prompt_lengths, lengths, config.dtype)
        atomic_write(cache, lambda file: torch.save(ref_logprobs, file))

    # ---- 3) the policy starts as a copy of the reference -------------------------------------------------------------
    policy = copy.deepcopy(ref).train()
    optimizer = adamw(policy, config.lr, weight_decay=0.0, betas=(0.9, 0.95))
    run = Run(config, policy, [optimizer], built_from={"sft": weights, "pairs": sha256(path)})
    train_pairs = len(pairs) - held
    steps = max(1, round(config.epochs * train_pairs / config.batch_size))
    order = batches(torch.maximum(*lengths.view(2, -1))[:train_pairs], config.batch_size, config.seed)
    for _ in range(run.step):
        next(order)
    forward = torch.compile(response_logprobs) if config.compile else response_logprobs

    def logprobs_of(batch: torch.Tensor) -> torch.Tensor:
        """(2, B) log pi(y|x): chosen, rejected, in one forward pass."""
        rows = torch.cat([batch, batch + len(pairs)])
        with autocast(config.dtype):
            return forward(policy, *(x[rows].to(device()) for x in (tokens, prompt_lengths, lengths))).sum(1).view(2, -1)

    # ---- 4) train ----------------------------------------------------------------------------------------------------
    dpo = config.loss == "dpo"
    name = f"DPO beta {config.beta:g}" if dpo else f"Unlikelihood alpha {config.alpha:g}"
    bar = tqdm(range(run.step, steps), f"{name}, {train_pairs} pairs", steps, initial=run.step)
    for step in bar:
        if config.evaluate_every and step % config.evaluate_every == 0:
            evaluate.along(run, step, policy, ref, tokenizer, bank, gold)
        for group in optimizer.param_groups:  # linear warm-up, then linear to 0
            group["lr"] = config.lr * min((step + 1) / config.warmup, 1 - step / steps)
        batch = next(order)
        parts = []
        for rows in batch.split(config.micro_batch_size or len(batch)):
            ref_chosen, ref_rejected = (ref_logprobs[r].to(device()) for r in (rows, rows + len(pairs)))
            chosen, rejected = logprobs_of(rows)
            losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta,
                                                                config.label_smoothing)
            if not dpo:
                losses = unlikelihood_loss(chosen, rejected, config.alpha)
            (losses.sum() / len(batch)).backward()
            parts.append(torch.stack([losses.detach(), (chosen_rewards > rejected_rewards).float(), chosen_rewards,
                                      rejected_rewards, chosen.detach(), rejected.detach()]))
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm).item()
        names = ("loss", "accuracy", "chosen_reward", "rejected_reward", "chosen_logprobs", "rejected_logprobs")
        values = dict(zip(names, torch.cat(parts, 1).mean(1).tolist()))  # means over the pairs, however they were split
        run.check_finite(step, batch, **values, grad_norm=grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.log(step=step, **values, margin=values["chosen_reward"] - values["rejected_reward"], grad_norm=grad_norm,
                lr=optimizer.param_groups[0]["lr"])
        if step % 10 == 0:
            bar.set_postfix_str(f"loss {values['loss']:.3f}, accuracy {values['accuracy']:.2f}")
        run.checkpoint(step + 1)

    if config.evaluate_every:
        evaluate.along(run, steps, policy, ref, tokenizer, bank, gold)

    # ---- 5) held-out pairs, gold reward and KL on test prompts, samples, figure --------------------------------------
    policy.eval()
    result = {"step": steps, "seconds": run.seconds()}
    if held:
        rows = torch.arange(train_pairs, len(pairs))
        logprobs = torch.stack([summed_logprobs(policy, tokens[r], prompt_lengths[r], lengths[r], config.dtype)
                                for r in (rows, rows + len(pairs))])
        losses, chosen_rewards, rejected_rewards = dpo_loss(*logprobs, *ref_logprobs.view(2, -1)[:, rows], config.beta)
        losses = losses if dpo else unlikelihood_loss(*logprobs, config.alpha)
        result |= {"held_out_loss": losses.mean().item(),
                   "held_out_accuracy": (chosen_rewards > rejected_rewards).float().mean().item()}
    run.log(**result)
    tokenizer.save(run.folder / "tokenizer.tiktoken")
    run.finish(kind="GPT", architecture=asdict(policy.config), dataset=config.dataset, tokenizer=tokenizer.fingerprint)
    scale = label_scale(config.dataset, config.preset) if dpo and config.labels == "bt" and not config.pairs else None
    rows = evaluate.report(run.folder, name, policy, ref, tokenizer, bank, gold, config.beta / scale if scale else None, result)
    draw(run.rows, name, bank, rows, run.folder / "figure.png")
    print(f"\nfigure, log, samples and model  ->  {run.folder}")
    return run.folder


def draw(log: list[dict], name: str, bank: evaluate.Bank, rows: dict[str, dict], path: Path) -> None:
    """Loss and accuracy of the implicit reward; gold reward against KL with the optimal curve."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    log = [row for row in log if "loss" in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    smooth = max(1, len(log) // 40)
    for key, color in (("loss", "tab:blue"), ("accuracy", "tab:orange")):
        values = torch.tensor([row[key] for row in log])
        left.plot(values.unfold(0, smooth, 1).mean(1), color=color, label=f"{key} (mean of {smooth} steps)")
    if name.startswith("DPO"):
        left.axhline(0.6931, color="tab:blue", linestyle=":", linewidth=1, label="ln 2, the loss at the start")
    left.set(xlabel="step", title=f"{name} on the pairs")
    left.legend(fontsize=8)
    evaluate.draw_frontier(right, bank, rows)
    right.set_title("test prompts: gold reward against KL")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    train(parse(Config, __doc__))
