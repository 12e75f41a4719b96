"""Proximal Policy Optimization with a KL penalty: RLHF as it was first done, sample, score, and
push.

    maximise  E_{x, y ~ pi_theta} [ r(x, y) ] - beta KL( pi_theta(.|x) || pi_ref(.|x) )
                                                                     (Rafailov et al. 2023, Eq. 3)

The response is an episode, each token an action. The KL is paid token by token, the score comes
with the last token:

    rewards_t = - beta (log pi_theta(y_t|x,y_<t) - log pi_ref(y_t|x,y_<t)) + [t is last] score(x, y)
    advantages_t = sum_k lam^k delta_{t+k},  delta_t = rewards_t + V_{t+1} - V_t
                                                                     (Schulman et al. 2016, Eq. 16)
    L = - E min( ratio A, clip(ratio, 1 - eps, 1 + eps) A ),  ratio = pi_theta / pi_old
                                                                     (Schulman et al. 2017, Eq. 7)

Its optimum is the same as DPO's: pi_ref(y|x) exp(r(x, y) / beta) / Z(x), Eq. 4 of the DPO paper.

    python ppo.py                              # on a reward model of the pairs; some 3 minutes
    python ppo.py --reward gold                # PPO-GT: the task's own reward
    python ppo.py --reward FILE.py:function    # yours: (prompts, responses), texts -> numbers
    python ppo.py --reward runs/reviews/dpo-beta0.3-seed0    # DPO's implicit reward
    python ppo.py --reward gold --target-kl 1  # beta adapts until the KL is 1 nat

Differs from Ziegler et al. (2019) and Stiennon et al. (2020): lam = 1 for 0.95, and two passes over
a batch for four (`python experiments/frontier.py --grid ablation` shows what that costs or buys);
temperature 1, because the KL must be that of the policy that is sampled; the score lies on the
<eos>, not one place behind it; policy and value network have an optimizer and a gradient norm each,
so no coefficient weighs their losses; gradients are clipped; Adam's epsilon is 1e-8; a warm-up, in
which the value network learns first; a tiny model, and so a larger learning rate. Scores are
shifted and scaled to mean 0 and standard deviation 1 on responses of the reference, whatever the
reward: beta means the same for all of them.

Symbols: scores (B,), rewards (B, R) with the KL penalty in them, values V, logprobs (new),
old_logprobs, ref_logprobs.

Reads   the SFT policy, the reward model (both trained if they are missing),
        data/<dataset>/prepared/prompts_train.jsonl
Writes  runs/<dataset>/ppo...-seed<seed>/ : log.jsonl, model.pt, evaluation.json, samples.jsonl,
        figure.png
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
from common import fail, pipeline, tasks
from common.processes import add_gradients, mine, share
from common.rewards import Reward
from common.run import Run
from common.settings import (parse, require, require_numbers, require_processes, run_folder,
                             settings)
from common.sharding import shard
from common.training import (Device, Dtype, Mean, adamw, autocast, batches, check_steps, device,
                             generator, set_lr, similar_lengths, warn_of_collapse)
from model import GPT, Samples, ScalarModel, generate, response_logprobs, response_mask

PROMPTS, RESPONSES, ROLLOUT, MINIBATCHES = 1, 2, 3, 4  # random streams of this script


@settings
class Config:
    dataset: str = "reviews"  # Task: a folder of data/, or one of your own files.
    preset: str = "cpu"  # Kind of machine that the task's sizes are meant for.

    # ---- what is maximised
    reward: str = "model"  # Reward: model = learned from the pairs, gold = the task's own (PPO-GT),
    # the run folder of a reward model or of a policy (DPO's implicit reward), or FILE.py:function.
    beta: float = 0.1  # KL coefficient, in standard deviations of the score per nat; at first,
    # where --target-kl adapts it.
    target_kl: float = 0.0  # KL per response, in nats, that beta adapts to; 0 = beta stays as it
    # is.
    horizon: int = 2000  # Time constant of the KL controller, in responses: larger = slower.
    missing_eos_penalty: float = 0.0  # Taken off the score of a response that has no <eos>.

    # ---- what it starts from
    prompts: int = 0  # Prompts of the reward model's pairs, six each; 0 = the task's number.
    pairs_seed: int = 0  # Seed of the reward model and its pairs: prompts, responses, labels.
    sft: str = ""  # Run folder of the SFT policy, if not runs/<dataset>/sft.

    # ---- PPO
    steps: int = 50  # Updates, each on a batch of new responses.
    batch_size: int = 256  # Responses per update.
    samples: int = 1  # Responses to each prompt among them.
    epochs: int = 2  # Passes over a batch.
    minibatches: int = 1  # Optimizer steps per pass.
    lam: float = 1.0  # GAE's lambda: 1 = Monte Carlo returns, 0 = one step and then the value
    # network.
    clip: float = 0.2  # Clip range of the ratio: beyond 1 +- clip a token earns nothing more.
    value_clip: float = 0.2  # Clip range of the value update, as in PPO2.

    # ---- optimisation
    micro_batch_size: int = 64  # Responses per forward pass, of similar length. Same gradient.
    lr: float = 5e-4  # Learning rate of the policy after the warm-up, falling linearly to 0.
    warmup: int = 10  # Updates of linear warm-up of --lr, after those of --value-warmup.
    value_warmup: int = 0  # Updates at the start in which the value network alone learns, from
    # responses of the reference.
    value_lr: float = 2e-3  # Learning rate of the value network, falling linearly to 0; no warm-up.
    max_grad_norm: float = 1.0  # Norm at which gradients are clipped, each network by itself.
    seed: int = 0  # Seed of prompts, responses and minibatches.
    dtype: Dtype = "auto"  # Number format of matrix products; auto = bfloat16 on CUDA.
    device: Device = "auto"  # Where it is computed; auto = CUDA where there is one, else the CPU.
    compile: bool = False  # Use torch.compile on the networks.
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
            above_0="beta horizon steps batch_size samples epochs minibatches micro_batch_size "
            "clip value_clip lr value_lr warmup max_grad_norm",
            from_0="target_kl prompts pairs_seed missing_eos_penalty value_warmup seed "
            "evaluate_every bank_samples checkpoint_every")
        require(self.value_warmup < self.steps,
                f"--value-warmup {self.value_warmup}: must be less than --steps {self.steps}")
        require(0 <= self.lam <= 1, f"--lam {self.lam}: must be in [0, 1]")
        require(self.batch_size % self.samples == 0,
                f"--batch-size {self.batch_size}: must be a multiple of --samples {self.samples}")
        require(self.batch_size >= self.minibatches,
                f"--minibatches {self.minibatches}: more than --batch-size {self.batch_size}")
        adapts = self.target_kl > 0
        require(adapts or self.horizon == Config.horizon, "--horizon: needs --target-kl")
        require(not adapts or 5 * self.horizon > self.batch_size,
                f"--horizon {self.horizon}: must be more than a fifth of --batch-size "
                f"{self.batch_size}")
        require(self.reward == "model" or not self.prompts, "--prompts: needs --reward model")
        require(self.reward == "model" or not self.pairs_seed, "--pairs-seed: needs --reward model")
        name = {"model": "ppo", "gold": "ppo-gt"}.get(self.reward, "ppo")
        held_by = "target_kl" if adapts else "beta"
        never = ("reward",) if self.reward == "gold" else ()
        self.out = self.out or run_folder(self, name, always=(held_by, "seed"), never=never)


# ---- the mathematics: B responses, R positions; everything outside `mask` is 0 -------------------


def compute_rewards(scores: torch.Tensor, logprobs: torch.Tensor, ref_logprobs: torch.Tensor,
                    mask: torch.Tensor, beta: float) -> torch.Tensor:
    """Rewards (B, R): the KL penalty on every token, the score (B,) on the last one, which is the
    <eos> if there is one."""
    rewards = -beta * (logprobs - ref_logprobs) * mask
    last = mask.sum(1) - 1  # (B,)
    rewards[torch.arange(len(scores)), last] += scores
    return rewards


def compute_gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float,
                lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimates and returns (B, R). values[:, t] is V(prompt and the response
    before token t).

    Backwards: A_t = delta_t + gamma lam A_{t+1}. After the last token there is no value: the
    episode has ended. Here gamma is always 1: with any other, what is maximised is not Eq. 3.
    """
    advantages = torch.zeros_like(rewards)
    next_advantage, next_value = 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * mask


def whiten(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1 over the mask."""
    mean = x[mask].mean()
    return (x - mean) / (x[mask].var(correction=0) + 1e-8).sqrt() * mask


def policy_loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor,
                mask: torch.Tensor, clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped surrogate of every token, and the ratio pi / pi_old, (B, R) each.

    Where ratio = 1, on the first step on a batch, its gradient is REINFORCE's: -A grad log pi.
    """
    ratio = (logprobs - old_logprobs).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.min(unclipped, clipped) * mask, ratio


def value_loss(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor,
               mask: torch.Tensor, clip: float) -> torch.Tensor:
    """Half the squared error of every token's value, (B, R); a value further than `clip` from the
    old one earns nothing."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2) * mask


def adapted(beta: float, kl: float, target_kl: float, horizon: float, episodes: int) -> float:
    """The next beta: beta (1 + clip(kl / target - 1, -0.2, 0.2) episodes / horizon).

    Ziegler et al. 2019, section 2.2.
    """
    error = min(max(kl / target_kl - 1, -0.2), 0.2)
    return beta * (1 + error * episodes / horizon)


def response_values(model: ScalarModel, tokens: torch.Tensor, prompt_lengths: torch.Tensor,
                    lengths: torch.Tensor) -> torch.Tensor:
    """V (B, R) before each response token: position t - 1, where the policy too chooses token t; 0
    where there is none."""
    mask = response_mask(prompt_lengths, lengths)
    longest = int(lengths.max())
    places = prompt_lengths[:, None] - 1 + torch.arange(mask.shape[1], device=mask.device)  # (B, R)
    return model(tokens[:, :longest]).gather(1, places.clamp(max=longest - 1)) * mask


def value_network(start: pipeline.Start, reward: Reward, seed: int) -> ScalarModel:
    """V starts as the reward model; without one, as the SFT policy with a head of zeros."""
    if reward.model is not None:
        return copy.deepcopy(reward.model)
    network = ScalarModel.from_policy(start.ref, start.ref.config.block_size, seed)
    nn.init.zeros_(network.head.weight)
    return network


def train(config: Config) -> Path:
    """Build what is missing, train, evaluate, and return the run folder."""
    # ---- 1) the reference policy, the reward, the prompts ----------------------------------------
    start = pipeline.start(config)
    ref = start.ref.requires_grad_(False)
    tokenizer = start.tokenizer
    reward = start.reward
    prompts = tasks.prompts(config.dataset, "train")  # texts
    prompt_ids = [[tokenizer.bos] + ids for ids in tokenizer.encode_batch(prompts)]
    episodes = min(config.batch_size, len(prompts) * config.samples)  # responses in a batch
    if episodes < config.minibatches:
        fail(f"--minibatches {config.minibatches}: more than the responses to {len(prompts)} "
             "prompts")

    def roll_out(policy: GPT, rows: list[int],
                 draw: torch.Generator) -> tuple[Samples, list[str], torch.Tensor]:
        """A response to the prompt of every row, its text, and its score as the reward gives it,
        (B,)."""
        with autocast(config.dtype):
            samples = generate(policy, [prompt_ids[i] for i in rows], ref.config.block_size,
                               tokenizer.eos, tokenizer.pad, draw)
        responses = [tokenizer.decode(ids) for ids in samples.response_ids()]
        return samples, responses, reward([prompts[i] for i in rows], responses, samples)

    # ---- 2) policy and value network, each with its optimizer ------------------------------------
    policy = copy.deepcopy(ref).requires_grad_(True)
    value = value_network(start, reward, config.seed)
    networks = nn.ModuleDict({"policy": policy, "value": value}).to(device()).train()
    if config.shard:
        shard(policy, value, ref)
    policy_optimizer = adamw(policy, config.lr, 0.0, (0.9, 0.95))
    value_optimizer = adamw(value, config.value_lr, 0.0, (0.9, 0.95))
    check_steps(config.steps, config.warmup)
    # beta changes while it trains, and scores are counted from where the reference's lie: a
    # checkpoint holds them, too
    state = {"beta": config.beta, "score_mean": 0.0, "score_std": 1.0}
    run = Run(config, networks, [policy_optimizer, value_optimizer], built_from(start, reward),
              config.steps, state)
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
    values_of = torch.compile(response_values) if config.compile else response_values

    # ---- 3) train --------------------------------------------------------------------------------
    held_by = f"target {config.target_kl:g} nats" if config.target_kl else f"beta {config.beta:g}"
    name = f"PPO on {config.reward}, {held_by}"
    bar = tqdm(range(run.step, config.steps), name, config.steps, initial=run.step)
    for step in bar:
        if config.evaluate_every and step % config.evaluate_every == 0:
            evaluate.log_evaluation(run, step, policy, start)
        to_go = 1 - step / config.steps  # both learning rates fall linearly to 0
        # the policy stands still at first: steered by a critic that knows nothing it goes astray
        policy_steps = max(0, step + 1 - config.value_warmup)
        lr = config.lr * min(1, policy_steps / config.warmup) * to_go
        set_lr([policy_optimizer], lr)
        set_lr([value_optimizer], config.value_lr * to_go)

        # 3a) roll out: sample responses and score them
        rows = next(batch_iterator).repeat_interleave(config.samples)  # (B,) numbers of prompts
        samples, responses, raw_scores = roll_out(policy, rows.tolist(),
                                                  generator(config.seed, ROLLOUT, step))
        tokens = samples.tokens.to(device())  # (B, T)
        prompt_lengths = samples.prompt_lengths.to(device())
        lengths = samples.lengths.to(device())
        mask = response_mask(prompt_lengths, lengths)  # (B, R)
        B = len(rows)
        ended = tokens[torch.arange(B), lengths - 1] == tokenizer.eos  # or it was cut at the block
        # in standard deviations of the reference's scores: beta means the same for every reward
        scores = ((raw_scores - state["score_mean"]) / state["score_std"]).float().to(device())
        scores = scores - config.missing_eos_penalty * ~ended

        # 3b) log-probabilities under policy and reference, and values, before any update: with the
        # functions and (for one minibatch) the shapes of the update, so that its first ratio is
        # exactly 1
        old_logprobs = torch.zeros(mask.shape, device=device())  # (B, R)
        ref_logprobs = torch.zeros(mask.shape, device=device())
        old_values = torch.zeros(mask.shape, device=device())
        with torch.no_grad(), autocast(config.dtype):
            for part in similar_lengths(mine(torch.arange(B, device=device())), lengths,
                                        config.micro_batch_size):
                inputs = tokens[part], prompt_lengths[part], lengths[part]
                R = int((lengths[part] - prompt_lengths[part]).max())  # the longest of this part
                old_logprobs[part, :R] = logprobs_of(policy, *inputs)
                ref_logprobs[part, :R] = logprobs_of(ref, *inputs)
                old_values[part, :R] = values_of(value, *inputs)
        share(old_logprobs, ref_logprobs, old_values)  # of several processes: all rows for everyone

        # 3c) rewards and advantages
        beta = state["beta"]
        rewards = compute_rewards(scores, old_logprobs, ref_logprobs, mask, beta)
        advantages, returns = compute_gae(rewards, old_values, mask, 1.0, config.lam)
        advantages = whiten(advantages, mask)  # after the returns, which are in units of the reward

        # 3d) several passes over the batch
        metrics = Mean()
        shuffle = generator(config.seed, MINIBATCHES, step)
        minibatches = []
        for _ in range(config.epochs):
            order = torch.randperm(B, generator=shuffle)
            minibatches += order.tensor_split(config.minibatches)
        for minibatch in minibatches:
            minibatch = minibatch.sort().values.to(device())
            response_tokens = int(mask[minibatch].sum())
            losses = Mean()
            for part in similar_lengths(mine(minibatch), lengths, config.micro_batch_size):
                inputs = tokens[part], prompt_lengths[part], lengths[part]
                R = int((lengths[part] - prompt_lengths[part]).max())
                seen = mask[part, :R]
                with autocast(config.dtype):
                    logprobs = logprobs_of(policy, *inputs)  # (b, R)
                    values = values_of(value, *inputs)

                # the two networks share no weights: the sum of their losses trains each on its own
                policy_losses, ratio = policy_loss(logprobs, old_logprobs[part, :R],
                                                   advantages[part, :R], seen, config.clip)
                value_losses = value_loss(values, old_values[part, :R], returns[part, :R], seen,
                                          config.value_clip)
                # divided by the whole minibatch: micro-batches add up to the mean over its tokens
                ((policy_losses.sum() + value_losses.sum()) / response_tokens).backward()

                losses.add(loss=policy_losses[seen], value_loss=value_losses[seen])
                ratio = ratio[seen].detach()  # (tokens of this part,)
                metrics.add(ratio=ratio,
                            ratio_square=ratio.square(),
                            approx_kl=0.5 * ratio.log().square(),
                            clip_fraction=((ratio - 1).abs() > config.clip).float(),
                            loss=policy_losses[seen],
                            value_loss=value_losses[seen])

            add_gradients(policy, value)  # of several processes, each with its share of the rows
            clip_grad_norm = torch.nn.utils.clip_grad_norm_
            grad_norm = clip_grad_norm(policy.parameters(), config.max_grad_norm).item()
            value_grad_norm = clip_grad_norm(value.parameters(), config.max_grad_norm).item()
            run.check_finite(step, rows[minibatch.cpu()], **losses.values(),
                             grad_norm=grad_norm + value_grad_norm, score=scores.mean().item())
            for optimizer in (policy_optimizer, value_optimizer):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        # 3e) log; beta adapts
        kl = (old_logprobs - ref_logprobs).sum(1)  # (B,) nats per response, as it was sampled
        found = metrics.values()
        row = {
            "step": step,
            "beta": beta,
            "scores": scores.mean().item(),
            "raw_scores": raw_scores.mean().item(),
            "kl": kl.mean().item(),
            "kl_se": (kl.std(correction=min(1, B - 1)) / math.sqrt(B)).item(),
            "entropy": -old_logprobs.sum(1).mean().item(),
            "length": mask.sum(1).float().mean().item(),
            "eos_rate": ended.float().mean().item(),
            "distinct": len(set(responses)) / B,
        }
        row["objective"] = row["scores"] - beta * row["kl"]
        row["ratio_std"] = math.sqrt(max(0.0, found.pop("ratio_square") - found["ratio"] ** 2))
        unexplained = (returns - old_values)[mask].var(correction=0)
        total = returns[mask].var(correction=0).clamp(min=1e-8)
        row["explained_variance"] = 1 - (unexplained / total).item()
        run.log(**row, **found, grad_norm=grad_norm, lr=lr)
        warn_of_collapse(run, step, responses)
        if config.target_kl and policy_steps:
            state["beta"] = adapted(beta, row["kl"], config.target_kl, config.horizon, B)
        bar.set_postfix_str(f"score {row['raw_scores']:.3f}, KL {row['kl']:.2f}, beta {beta:.3f}")
        run.checkpoint(step + 1)

    if config.evaluate_every:
        evaluate.log_evaluation(run, config.steps, policy, start)

    # ---- 4) gold reward and KL on test prompts, samples, figure; printed when all of it is written
    drawn = config.steps * episodes
    result = {"step": config.steps, "seconds": run.seconds(), "samples": drawn,
              "reward_calls": drawn}
    run.log(**result)
    end = end_beta(config, state["score_std"]) if reward is start.measure else None
    report = evaluate.report(run, name, policy.eval(), start, end, result)
    curves = {
        "score, in standard deviations of the reference's": evaluate.logged(run.rows, "scores"),
        "KL to the reference, nats per response": evaluate.logged(run.rows, "kl"),
        "beta": evaluate.logged(run.rows, "beta"),
    }
    evaluate.draw_run(run.folder / "figure.png", "PPO on training prompts", curves, report)
    run.finish(policy, tokenizer)
    report.show()
    print(f"\nfigure, log, samples and model  ->  {run.folder}")
    return run.folder


def built_from(start: pipeline.Start, reward: Reward) -> dict[str, str]:
    """What a run is made from: with other weights, or another reward under the same name, it is
    another run."""
    return {"policy": start.policy_id, "reward": reward.id}


def end_beta(config: Config, score_std: float) -> float | None:
    """The beta at which the optimum of the reward is where this run must end, if theory says so:
    beta is in standard deviations of the score. What adapts beta or adds to the reward has another
    end."""
    if config.target_kl or config.missing_eos_penalty:
        return None
    return config.beta * score_std


if __name__ == "__main__":
    train(parse(Config, __doc__))
