"""Reward conditioning: a control token in front of each response says how good it is; then the
policy is asked for a good one. Next-token prediction is all it takes.

    --on pairs: binary reward conditioning (Keskar et al. 2019; AlpacaFarm, Dubois et al. 2023)
    L = - log pi(y_w | liked, x) - log pi(y_l | disliked, x)
    optimum: pi(y | liked, x) = pi_ref(y|x) P(y wins | x) / P(a response wins | x)      (Bayes)

That is also what Preferred-FT ends at (sft.py --on chosen, "binary FeedME"), which learns y_w
alone. Where labels have no noise it is best of 2: no number of pairs moves either of them further
than log 2 - 1/2 = 0.193 nats.

    --on samples: Quark (Lu et al. 2022, Eq. 2)
    L = sum_t - log pi(y_t | q, x, y_<t) + kappa KL( pi_ref(.|x, y_<t) || pi(.|q, x, y_<t) )

The policy writes responses; the control token q of each is the quantile of its score among all that
were ever written; the next are written behind the best one. With one quantile it learns all that it
wrote, whatever the score.

    python conditioning.py                                      # on the pairs; a minute
    python conditioning.py --on samples                         # Quark, on a reward model
    python conditioning.py --on samples --reward gold           # ... on the task's own reward
    python conditioning.py --on samples --reward FILE.py:function

A control token stands where <bos> stands else: it is <bos> plus a vector of its own, which is 0 at
first, so that behind each of them the policy begins as the reference. At the end the best one's
vector is added to the embedding of the first position, and what is kept is a policy like any other.

Reads   the SFT policy, and the pairs or the reward model (made if they are missing),
        data/<dataset>/prepared/prompts_train.jsonl
Writes  runs/<dataset>/conditioning-seed<seed>.../ (or quark-...): log.jsonl, model.pt,
        evaluation.json, samples.jsonl, figure.png

Differs from the papers: tiny models, and so a larger learning rate. AlpacaFarm's Quark learns from
the best quantile alone and forgets earlier rounds.

Symbols: scores (N,) of all that was written, quantiles (N,) 0 .. K - 1, of which K - 1 is the best.
"""
from __future__ import annotations

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import copy
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Literal

import torch
import torch.nn as nn
from tqdm import tqdm

import evaluate
from common import pipeline, tasks
from common.memory import Memory
from common.pairs import pair_tensors, read_pairs
from common.processes import add_gradients, mine
from common.run import Run
from common.settings import parse, require, require_numbers, run_folder, settings
from common.training import (Device, Dtype, Mean, adamw, autocast, batches, check_steps, device,
                             generator, half_ties, set_lr)
from model import GPT, Samples, generate, response_logprobs

PROMPTS, ROLLOUT = 1, 3  # random streams, called as in reinforce.py


@settings
class Config:
    dataset: str = "reviews"  # Task: a folder of data/, or one of your own files.
    preset: str = "cpu"  # Kind of machine that the task's sizes are meant for.

    # ---- what it learns from
    on: Literal["pairs", "samples"] = "pairs"  # What it learns from: the pairs, behind "liked" and
    # "disliked"; or what it writes itself, behind the quantile of its score (Quark).
    prompts: int = 0  # Prompts of the pairs, six each; 0 = the task's number.
    pairs_seed: int = 0  # Seed of the pairs (of --reward model, too): prompts, responses, labels.
    sft: str = ""  # Run folder of the SFT policy, if not runs/<dataset>/sft.

    # ---- Quark
    reward: str = "model"  # Reward: model = learned from the pairs, gold = the task's own, the run
    # folder of a reward model, or FILE.py:function.
    samples: int = 4  # Responses to each prompt.
    rounds: int = 3  # How often it writes, and learns from all that it wrote.
    round_prompts: int = 1600  # Prompts of a round, drawn anew for each.
    quantiles: int = 5  # Control tokens.
    kappa: float = 0.05  # Weight of the KL to the reference.

    # ---- optimisation
    epochs: float = 1.0  # Passes over the pairs, or over as many responses as a round writes.
    batch_size: int = 32  # Responses per step.
    micro_batch_size: int = 0  # Responses per forward pass if memory is short; 0 = all.
    lr: float = 5e-4  # Learning rate after the warm-up, from where it falls linearly to 0.
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
            above_0="samples rounds round_prompts quantiles epochs batch_size lr warmup "
            "max_grad_norm",
            from_0="kappa prompts pairs_seed micro_batch_size seed evaluate_every bank_samples "
            "checkpoint_every")
        for name in ("reward", "samples", "rounds", "round_prompts", "quantiles", "kappa"):
            require(self.on == "samples" or getattr(self, name) == getattr(Config, name),
                    f"--{name.replace('_', '-')}: needs --on samples")
        require(self.reward == "model" or not self.prompts, "--prompts: needs --reward model")
        require(self.reward == "model" or not self.pairs_seed, "--pairs-seed: needs --reward model")
        gold = self.reward == "gold"
        name = {"pairs": "conditioning", "samples": "quark-gt" if gold else "quark"}[self.on]
        self.out = self.out or run_folder(self, name, always=("seed",),
                                          never=("reward",) if gold else ())


# ---- control tokens ------------------------------------------------------------------------------

# of a control token's vector: all of Adam's steps are of one size, and this one begins at 0
SCALE = 20.0


class ControlledEmbedding(nn.Embedding):
    """Token embeddings with K more ids, V ... V + K - 1, for the control tokens. The output head,
    which has the same weights, does not have these: no response can contain one."""

    def __init__(self, wte: nn.Embedding, bos: int, K: int):
        super().__init__(*wte.weight.shape, _weight=wte.weight.detach().clone())
        self.bos = bos
        self.controls = nn.Parameter(torch.zeros(K, wte.embedding_dim))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, T) to (B, T, C)."""
        number = tokens - self.num_embeddings  # of the control token; below 0 for any other
        is_control = number >= 0
        plain = super().forward(tokens.where(~is_control, self.bos))
        return plain + SCALE * self.controls[number.clamp(min=0)] * is_control[..., None]


@contextmanager
def behind_the_best(policy: GPT) -> Iterator[None]:
    """with behind_the_best(policy): <bos> is the best control token, also for those who know
    nothing of control tokens. It stands first, so the first position has the vector instead."""
    first = policy.wpe.weight.data[0]
    before = first.clone()
    first += SCALE * policy.wte.controls.data[-1]
    yield
    first.copy_(before)


def without_controls(policy: GPT) -> GPT:
    """The policy behind the best control token, as any other file knows policies."""
    policy.wpe.weight.data[0] += SCALE * policy.wte.controls.data[-1]
    policy.wte = nn.Embedding.from_pretrained(policy.wte.weight.detach(), freeze=False)
    return policy


# ---- the losses ----------------------------------------------------------------------------------

def quantiles_of(scores: torch.Tensor, K: int) -> torch.Tensor:
    """In which of K equal parts of all scores each lies, (N,): 0 has the smallest, K - 1 the
    largest. Equal scores are told apart by their place: a part has N / K of them, whatever ties."""
    rank = torch.empty(len(scores), dtype=torch.long)
    rank[scores.argsort(stable=True)] = torch.arange(len(scores))
    return rank * K // len(scores)


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


def train(config: Config) -> Path:
    """Build what is missing, train, evaluate, and return the run folder."""
    # ---- 1) the reference policy, the pairs or the reward, the prompts ---------------------------
    quark = config.on == "samples"
    start = pipeline.start(config, reward_is_used=quark)
    ref = start.ref.requires_grad_(False)
    tokenizer = start.tokenizer
    prompts = tasks.prompts(config.dataset, "train")  # texts
    prompt_ids = [[tokenizer.bos] + ids for ids in tokenizer.encode_batch(prompts)]
    V = ref.config.vocab_size  # the first control token's id

    # ---- 2) the policy starts as a copy of the reference, behind each control token --------------
    policy = copy.deepcopy(ref).requires_grad_(True).train()
    policy.wte = ControlledEmbedding(policy.wte, tokenizer.bos, config.quantiles if quark else 2)
    if quark:
        rows_of_round = config.round_prompts * config.samples
        memory = Memory(config.rounds * rows_of_round, ref.config.block_size)
    else:
        memory = memory_of_pairs(config, start)
        rows_of_round = len(memory.lengths)
    networks = nn.ModuleDict({"policy": policy, "memory": memory}).to(device())
    optimizer = adamw(policy, config.lr, 0.0, (0.9, 0.95))
    steps_of_round = max(1, round(config.epochs * rows_of_round / config.batch_size))
    steps = steps_of_round * (config.rounds if quark else 1)
    check_steps(steps, config.warmup)
    run = Run(config, networks, [optimizer], built_from(config, start), steps)

    # ---- 3) train --------------------------------------------------------------------------------
    name = "conditioning"
    if quark:
        name = f"Quark on {config.reward}, rounds {config.rounds}"
    bar = tqdm(range(run.step, steps), name, steps, initial=run.step)
    for step in bar:
        if config.evaluate_every and step % config.evaluate_every == 0:
            with behind_the_best(policy):
                evaluate.log_evaluation(run, step, policy, start)
        lr = config.lr * min(1, (step + 1) / config.warmup) * (1 - step / steps)
        set_lr([optimizer], lr)

        # 3a) Quark begins a round: write responses behind the best token, and rank all there are
        number = step // steps_of_round  # of the round
        written = (number + 1) * rows_of_round  # responses in the memory
        if quark and step % steps_of_round == 0:
            order = torch.randperm(len(prompts), generator=generator(config.seed, PROMPTS, number))
            order = order.repeat(config.round_prompts // len(prompts) + 1)[:config.round_prompts]
            rows = order.repeat_interleave(config.samples).tolist()  # numbers of prompts
            with behind_the_best(policy), autocast(config.dtype):
                samples = generate(policy, [prompt_ids[i] for i in rows], ref.config.block_size,
                                   tokenizer.eos, tokenizer.pad,
                                   generator(config.seed, ROLLOUT, number))
            responses = [tokenizer.decode(ids) for ids in samples.response_ids()]
            scores = start.reward([prompts[i] for i in rows], responses, samples)
            memory.write(number * rows_of_round, samples, scores)
            quantiles = quantiles_of(memory.scores[:written].cpu(), config.quantiles)
            memory.tokens[:written, 0] = (V + quantiles).to(memory.tokens)
            run.log(step=step, round=number, scores=scores.mean().item(),
                    distinct=len(set(responses)) / len(rows))
        if step % steps_of_round == 0 or step == run.step:
            lengths = memory.lengths[:written].cpu()
            batch_iterator = batches(lengths, config.batch_size, config.seed, step)

        # 3b) a step of next-token prediction, each response behind its control token
        batch = next(batch_iterator)  # (B,) numbers of responses
        response_tokens = int((memory.lengths - memory.prompt_lengths)[batch].sum())
        metrics = Mean()
        for part in mine(batch).split(config.micro_batch_size or len(batch)):
            inputs = memory.inputs(part)
            with autocast(config.dtype):
                if quark:
                    losses, kl = quark_losses(policy, ref, *inputs, tokenizer.bos, config.kappa)
                else:
                    losses = -response_logprobs(policy, *inputs).sum(1)  # (b,)
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
    policy = without_controls(policy)
    if config.evaluate_every:
        evaluate.log_evaluation(run, steps, policy, start)

    # ---- 5) gold reward and KL on test prompts, samples, figure; printed when all of it is written
    drawn = config.rounds * rows_of_round if quark else 0
    result = {"step": steps, "seconds": run.seconds(), "samples": drawn, "reward_calls": drawn}
    run.log(**result)
    report = evaluate.report(run, name, policy.eval(), start, None, result)
    if not quark and start.bank.rewards is not None:
        weights = preferred_weights(win_probs(start))
        report.rows["limit of this run in theory"] = evaluate.limit_row(start.bank, weights)
    curves = {"loss, nats per response": evaluate.smoothed(run.rows, "loss")}
    evaluate.draw_run(run.folder / "figure.png", name, curves, report)
    run.finish(policy, tokenizer)
    report.show()
    print(f"\nfigure, log, samples and model  ->  {run.folder}")
    return run.folder


def memory_of_pairs(config: Config, start: pipeline.Start) -> Memory:
    """The responses of the pairs, each behind "liked" or "disliked": sampled, or the user's."""
    labels = tasks.load(config.dataset).labels
    path = tasks.own_pairs(config.dataset) or pipeline.sampled_pairs(start, labels, config.prompts,
                                                                     config.pairs_seed)
    pipeline.use_pairs(start, read_pairs(path), Path(path))
    pairs = pair_tensors(start.pairs, start.tokenizer.pad)  # (2, N, ...): chosen, rejected
    tokens = pairs.tokens.clone()
    tokens[0, :, 0] = start.ref.config.vocab_size + 1  # liked
    tokens[1, :, 0] = start.ref.config.vocab_size  # disliked
    N = pairs.lengths.numel()
    memory = Memory(N, tokens.shape[2])
    memory.write(0, Samples(tokens.flatten(0, 1), pairs.prompt_lengths.flatten(),
                            pairs.lengths.flatten(), None), torch.zeros(N))
    return memory


def win_probs(start: pipeline.Start) -> torch.Tensor:
    """P(response i is preferred to response j) by the labels of the task, (M, N, N)."""
    task = tasks.load(start.dataset)
    difference = start.bank.rewards[:, :, None] - start.bank.rewards[:, None, :]
    if task.labels == "argmax":
        return half_ties(difference, torch.zeros(1))
    return torch.sigmoid(task.label_scale * difference)


def built_from(config: Config, start: pipeline.Start) -> dict[str, str]:
    """What a run is made from: with other weights, pairs, or another reward under the same name, it
    is another run."""
    if config.on == "pairs":
        return {"policy": start.policy_id, "pairs": start.pairs_id}
    return {"policy": start.policy_id, "reward": start.reward.id}


if __name__ == "__main__":
    train(parse(Config, __doc__))
