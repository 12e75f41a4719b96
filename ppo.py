"""Proximal Policy Optimization with a KL penalty: RLHF as it was first done, sample, score, and push.

    maximise  E_{x, y ~ pi_theta} [ r(x, y) ] - beta KL( pi_theta(.|x) || pi_ref(.|x) )       (Rafailov et al. 2023, Eq. 3)

The response is an episode, each token an action. The KL is paid token by token, the score comes with the last token:

    rewards_t = - beta (log pi_theta(y_t|x,y_<t) - log pi_ref(y_t|x,y_<t)) + [t is the last token] score(x, y)
    advantages_t = sum_k (gamma lam)^k delta_{t+k},  delta_t = rewards_t + gamma V_{t+1} - V_t  (Schulman et al. 2016, Eq. 16)
    L = - E min( ratio A, clip(ratio, 1 - eps, 1 + eps) A ),  ratio = pi_theta / pi_old         (Schulman et al. 2017, Eq. 7)

Its optimum is the same as DPO's: pi_ref(y|x) exp(r(x, y) / beta) / Z(x), Eq. 4 of the DPO paper.

    python ppo.py                                # on a reward model trained on the pairs; 3 minutes on 2 cores from nothing
    python ppo.py --reward gold                  # PPO-GT: the task's own reward
    python ppo.py --reward FILE.py:function      # yours: function(prompts, responses), two lists of texts -> list of numbers
    python ppo.py --reward gold --target-kl 1    # beta adapts until the KL is 1 nat
    python ppo.py --advantages leave-one-out --samples 4 --epochs 1       # REINFORCE; the baseline: the mean of the others

Differs from Ziegler et al. (2019) and Stiennon et al. (2020): lam = 1 for 0.95, and two passes over a batch for four (`python
frontier.py --grid ablation` shows what that costs or buys); temperature 1, because the KL must be that of the policy that is
sampled; the score lies on the <eos>, not one place behind it; policy and value network have an optimizer and a gradient norm
each, so no coefficient weighs their losses; gradients are clipped; Adam's epsilon is 1e-8; a warm-up, in which the value
network learns first; a tiny model, and so a larger learning rate. Scores are shifted and scaled to mean 0 and standard
deviation 1 on responses of the reference, whatever the reward: beta means the same for all of them.

Symbols: scores (B,), rewards (B, R) with the KL penalty in them, values V, logprobs (new), old_logprobs, ref_logprobs.

Reads   the SFT policy, the reward model (both trained if they are missing), data/<dataset>/prepared/prompts_train.jsonl
Writes  runs/<dataset>/ppo...-seed<seed>/ : log.jsonl, model.pt, evaluation.json, samples.jsonl, figure.png
"""
from __future__ import annotations

import copy
import importlib.util
import math
import numbers
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, ClassVar, Literal

import torch
import torch.nn as nn
from tqdm import tqdm

from common import tasks
import evaluate
import reward_model
import sft
from common import fail
from common.files import read_jsonl, sha256
from common.run import Run, check_folder, finished
from common.settings import defaults, parse, require, require_numbers, runs_folder
from common.training import adamw, autocast, batches, device, fingerprint, generator
from common.tokenizer import Tokenizer
from common.run import load_run
from model import GPT, Samples, ScalarModel, generate, response_logprobs, response_mask


@dataclass
class Config:
    dataset: str = "reviews"  # a folder of data/
    preset: str = "cpu"  # defaults for a machine: cpu, or gpu (imdb)
    reward: str = "model"  # model = the one learned from the pairs, gold = the task's own (PPO-GT), the run folder of a
    # reward model, or FILE.py:function
    beta: float = 0.1  # weight of the KL, in scores (standard deviation 1 on the reference) a nat; the first, if it adapts
    target_kl: float = 0.0  # nats a response to which beta adapts; 0 = beta stays as it is
    horizon: int = 2000  # episodes in which beta changes by as much as the KL is off, at most a fifth (Ziegler et al. 2019)
    missing_eos_penalty: float = 0.0  # taken off the score of a response that has no <eos>
    prompts: int = 0  # prompts to sample the pairs of the reward model for, six pairs each; 0 = as many as the preset says
    sft: str = ""  # run folder of the SFT policy, if not runs/<dataset>/sft
    out: str = ""  # run folder, if not ppo-... beside the SFT policy
    steps: int = 50  # updates: a batch of new responses each
    batch_size: int = 256  # responses an update
    samples: int = 1  # responses to each prompt among them
    epochs: int = 2  # passes over a batch
    minibatches: int = 1  # optimizer steps a pass
    micro_batch_size: int = 64  # responses a forward pass, of similar length; same gradient
    advantages: Literal["gae", "leave-one-out"] = "gae"  # by a value network, or against the prompt's other responses (RLOO)
    gamma: float = 1.0  # discount: none, a token later is as good
    lam: float = 1.0  # of GAE: 1 = Monte Carlo returns, 0 = one step and the value network
    clip: float = 0.2  # eps: a ratio beyond 1 +- eps earns nothing more
    value_clip: float = 0.2  # the value may move as far from the old one before its error stops counting
    lr: float = 5e-4  # learning rate of the policy, falling linearly to 0
    warmup: int = 10  # updates over which the learning rate of the policy grows, while the value network learns
    value_lr: float = 2e-3  # of the value network, likewise
    max_grad_norm: float = 1.0  # gradient clipping, each network by itself
    seed: int = 0  # prompts, responses, minibatches
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products; auto = bfloat16 on CUDA only
    compile: bool = False  # torch.compile the networks
    evaluate_every: int = 0  # updates between evaluations on the test prompts; 0 = only at the end
    checkpoint_every: float = 60.0  # seconds between checkpoints
    resume: bool = False  # go on from the last checkpoint

    PRESETS: ClassVar[dict] = {("posts", "cpu"): dict(lr=2e-4, batch_size=128),
                               ("tldr", "cpu"): dict(lr=5e-5, batch_size=64, steps=25),
                               ("imdb", "cpu"): dict(lr=1e-4, batch_size=128, steps=60),
                               ("imdb", "gpu"): dict(lr=5e-5, batch_size=512, steps=200)}

    def __post_init__(self) -> None:
        require_numbers(self, above_0="beta horizon steps batch_size samples epochs minibatches micro_batch_size clip "
                        "value_clip lr value_lr warmup max_grad_norm",
                        from_0="target_kl prompts missing_eos_penalty seed evaluate_every checkpoint_every")
        for name in ("gamma", "lam"):
            require(0 <= getattr(self, name) <= 1, f"--{name} {getattr(self, name)}: must be in [0, 1]")
            require(self.advantages == "gae" or getattr(self, name) == getattr(Config, name),
                    f"--{name}: needs --advantages gae")
        require(self.batch_size % self.samples == 0,
                f"--batch-size {self.batch_size}: must be a multiple of --samples {self.samples}")
        require(self.batch_size >= self.minibatches,
                f"--minibatches {self.minibatches}: more than --batch-size {self.batch_size}")
        require(not self.target_kl or 5 * self.horizon > self.batch_size,
                f"--horizon {self.horizon}: must be more than a fifth of --batch-size {self.batch_size}")
        require(self.reward == "model" or not self.prompts, "--prompts: needs --reward model")
        require(self.advantages == "gae" or self.samples > 1, "--advantages leave-one-out: needs --samples 2 or more")
        base = Path(self.sft).parent if self.sft else runs_folder(self.dataset, self.preset)
        other = "-" + self.reward.rpartition(":")[2].replace("/", "-")
        kind = {"model": f"-{self.prompts}" if self.prompts else "", "gold": "-gt"}.get(self.reward, other)
        leash = f"kl{self.target_kl:g}" if self.target_kl else f"beta{self.beta:g}"
        name = "ppo" if self.advantages == "gae" else "rloo"
        self.out = self.out or str(base / f"{name}{kind}-{leash}-seed{self.seed}")


# ---- the mathematics: B responses, R positions; everything outside `mask` is 0 -----------------------------------------

def compute_rewards(scores: torch.Tensor, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor,
                    beta: float) -> torch.Tensor:
    """Rewards (B, R): the KL penalty on every token, the score (B,) on the last one, which is the <eos> if there is one."""
    rewards = -beta * (logprobs - ref_logprobs) * mask
    rewards[torch.arange(len(scores)), mask.sum(1) - 1] += scores
    return rewards


def compute_gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float,
                lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimates and returns (B, R). values[:, t] is V(prompt and the response before token t).

    Backwards: A_t = delta_t + gamma lam A_{t+1}. After the last token there is no value: the episode has ended.
    """
    advantages, last, after = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * after - values[:, t]
        last = (delta + gamma * lam * last) * mask[:, t]
        after = values[:, t] * mask[:, t]
        advantages[:, t] = last
    return advantages, (advantages + values) * mask


def leave_one_out(rewards: torch.Tensor, mask: torch.Tensor, samples: int) -> torch.Tensor:
    """Advantages (B, R) of REINFORCE with a leave-one-out baseline (Kool et al. 2019; Ahmadian et al. 2024).

    The response's total reward less the mean of the other `samples` - 1 responses' to its prompt, which are neighbours in
    the batch; the same for all its tokens.
    """
    total = rewards.sum(1).view(-1, samples)
    others = (total.sum(1, keepdim=True) - total) / (samples - 1)
    return (total - others).view(-1, 1) * mask


def whiten(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1 over the mask."""
    mean = x[mask].mean()
    return (x - mean) / (x[mask].var(correction=0) + 1e-8).sqrt() * mask


def policy_loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
                clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped surrogate of every token, and the ratio pi / pi_old, (B, R) each.

    Where ratio = 1, on the first step on a batch, its gradient is REINFORCE's: -A grad log pi.
    """
    ratio = (logprobs - old_logprobs).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages) * mask, ratio


def value_loss(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor,
               clip: float) -> torch.Tensor:
    """Half the squared error of every token's value, (B, R); a value further than `clip` from the old one earns nothing."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2) * mask


def adapted(beta: float, kl: float, target_kl: float, horizon: float, episodes: int) -> float:
    """The next beta: beta (1 + clip(kl / target - 1, -0.2, 0.2) episodes / horizon)  (Ziegler et al. 2019, section 2.2)."""
    return beta * (1 + min(max(kl / target_kl - 1, -0.2), 0.2) * episodes / horizon)


def response_values(model: ScalarModel, tokens: torch.Tensor, prompt_lengths: torch.Tensor,
                    lengths: torch.Tensor) -> torch.Tensor:
    """V (B, R) before each response token: position t - 1, where the policy too chooses token t; 0 where there is none."""
    mask = response_mask(prompt_lengths, lengths)
    at = (prompt_lengths[:, None] - 1 + torch.arange(mask.shape[1], device=mask.device)).clamp(max=int(lengths.max()) - 1)
    return model(tokens[:, :int(lengths.max())]).gather(1, at) * mask


# ---- what is maximised -----------------------------------------------------------------------------------------------

Scorer = Callable[[Samples, list[str], list[str]], torch.Tensor]  # samples, texts of prompts and responses -> (B,) scores


def user_function(name: str, flag: str = "--reward") -> Callable[..., torch.Tensor]:
    """FILE.py:function, called with lists of texts; a result that is not one finite number a text stops with one line."""
    path, _, attribute = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        fail(f"{flag} {name}: expected "
             + ("model, gold, the folder of a reward model's run, or " if flag == "--reward" else "") + "FILE.py:function")
    spec = importlib.util.spec_from_file_location("user_function", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        fail(f"{flag} {name}: {path} cannot be loaded ({type(error).__name__}: {error})")
    function = getattr(module, attribute, None)
    if not callable(function):
        fail(f"{flag} {name}: {path} has no function {attribute!r}")

    def checked(*texts: list[str]) -> torch.Tensor:
        try:
            values = function(*texts)
            values = list(values.tolist() if hasattr(values, "tolist") else values)
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            fail(f"{flag} {name}: {type(error).__name__}: {' '.join(str(error).split())} ({at.filename}, line {at.lineno})")
        if len(values) != len(texts[-1]):
            fail(f"{flag} {name}: returned {len(values)} numbers for {len(texts[-1])} responses")
        for i, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not torch.tensor(float(value)).isfinite():
                fail(f"{flag} {name}: returned {value!r} for response {i} ({texts[-1][i][:40]!r}), expected a finite number")
        return torch.tensor(values, dtype=torch.float32)

    return checked


def learned_reward(config: Config) -> Path:
    """The run of the reward model on the pairs; trained if it is missing."""
    settings = defaults(reward_model.Config, config.dataset, config.preset, prompts=config.prompts, sft=config.sft,
                        dtype=config.dtype, resume=True)
    return Path(settings.out) if finished(settings) else reward_model.train(settings)


def find_reward(config: Config, gold: evaluate.GoldReward, task: dict,
                block_size: int) -> tuple[Scorer, ScalarModel | None, str]:
    """The scorer that --reward names, the reward model if it is one, and what tells this reward from another one."""
    if config.reward in ("model", "gold") or Path(config.reward).is_dir():
        if config.reward == "gold":
            return lambda samples, prompts, responses: gold(prompts, responses), None, "gold"
        folder = learned_reward(config) if config.reward == "model" else Path(config.reward)
        model, meta = load_run(folder, ScalarModel)
        evaluate.check_same_task(folder, meta, task)
        if model.config.block_size < block_size:
            fail(f"--reward {folder}: its block size is {model.config.block_size}, that of the policy {block_size}")

        def score(samples: Samples, prompts: list[str], responses: list[str]) -> torch.Tensor:
            return evaluate.all_scores(model, samples.tokens, samples.lengths, config.dtype)
        return score, model, fingerprint(model.state_dict())
    user = user_function(config.reward)
    return lambda samples, prompts, responses: user(prompts, responses), None, sha256(config.reward.rpartition(":")[0])


def train(config: Config) -> Path:
    """Build what is missing, train, evaluate, and return the run folder."""
    # ---- 1) the reference policy, the reward, the prompts ------------------------------------------------------------
    check_folder(config)
    if config.reward not in ("model", "gold") and not Path(config.reward).is_dir():
        tried = [row["prompt"] for row in read_jsonl(tasks.ensure(config.dataset) / "prompts_train.jsonl", {"prompt": str})][:2]
        user_function(config.reward)(tried, [" a response"] * len(tried))  # before an hour of training
    sft_folder = sft.ensure(config.sft, config.dataset, config.preset, config.dtype)
    base = sft_folder.parent
    ref, meta = load_run(sft_folder)
    ref.requires_grad_(False)
    tokenizer = Tokenizer.load(sft_folder / "tokenizer.tiktoken")
    task = {"dataset": config.dataset, "tokenizer": tokenizer.fingerprint}
    evaluate.check_same_task(sft_folder, meta, task)
    weights = fingerprint(ref.state_dict())
    gold = reward_model.ensure_gold(sft_folder, config.dataset, config.preset, config.dtype)
    scorer, learned, reward_id = find_reward(config, gold, task, ref.config.block_size)
    bank = evaluate.ensure_bank(base, config.dataset, config.preset, ref, tokenizer, weights, gold)
    texts = [row["prompt"] for row in read_jsonl(tasks.ensure(config.dataset) / "prompts_train.jsonl", {"prompt": str})]
    prompts = [[tokenizer.bos] + ids for ids in tokenizer.encode_batch(texts)]
    block_size = ref.config.block_size
    if min(config.batch_size, len(prompts) * config.samples) < config.minibatches:
        fail(f"--minibatches {config.minibatches}: more than the responses to {len(prompts)} prompts")

    def roll_out(model: GPT, rows: list[int], draw: torch.Generator) -> tuple[Samples, list[str], torch.Tensor]:
        """A response to the prompt of every row, its text, and its score as the reward gives it."""
        with autocast(config.dtype):
            samples = generate(model, [prompts[i] for i in rows], block_size, tokenizer.eos, tokenizer.pad, draw)
        responses = [tokenizer.decode(row[p:n]) for row, p, n in
                     zip(samples.tokens.tolist(), samples.prompt_lengths.tolist(), samples.lengths.tolist())]
        return samples, responses, scorer(samples, [texts[i] for i in rows], responses)

    # ---- 2) policy and value network, each with its optimizer --------------------------------------------------------
    networks = nn.ModuleDict({"policy": copy.deepcopy(ref).requires_grad_(True)})
    if config.advantages == "gae":  # starts as the reward model; without one, as the SFT policy with a head of zeros
        networks["value"] = copy.deepcopy(learned) if learned else reward_model.scalar_model(ref, block_size, config.seed)
        if not learned:
            nn.init.zeros_(networks["value"].head.weight)
    policy, value = networks.to(device()).train()["policy"], networks["value"] if config.advantages == "gae" else None
    # part of the state, so that a checkpoint holds them: beta, and what makes scores of the reference 0 +- 1
    for name, number in (("beta", config.beta), ("score_mean", 0.0), ("score_std", 1.0)):
        networks.register_buffer(name, torch.tensor(number, dtype=torch.float64))
    optimizers = [adamw(network, lr, 0.0, (0.9, 0.95)) for network, lr in zip(networks.values(), (config.lr, config.value_lr))]
    run = Run(config, networks, optimizers, built_from={"sft": weights, "reward": reward_id})
    if run.step == 0:
        rows = torch.randperm(len(prompts), generator=generator(config.seed, 1)).repeat(512 // len(prompts) + 1)[:512]
        scores = roll_out(ref, rows.tolist(), generator(config.seed, 2))[2].double()
        networks.score_mean.fill_(scores.mean())
        networks.score_std.fill_(scores.std(correction=0) if scores.std(correction=0) > 1e-6 else 1.0)
    order = batches(torch.tensor([len(p) for p in prompts]), config.batch_size // config.samples, config.seed, pool=1)
    for _ in range(run.step):
        next(order)
    logprobs_of = torch.compile(response_logprobs) if config.compile else response_logprobs
    values_of = torch.compile(response_values) if config.compile else response_values

    method = "PPO" if value else "REINFORCE" if config.epochs * config.minibatches == 1 else "PPO, leave-one-out"
    leash = f"target {config.target_kl:g} nats" if config.target_kl else f"beta {config.beta:g}"
    name = f"{method} on {config.reward}, {leash}"
    bar = tqdm(range(run.step, config.steps), name, config.steps, initial=run.step)
    for step in bar:
        if config.evaluate_every and step % config.evaluate_every == 0:
            evaluate.along(run, step, policy, ref, tokenizer, bank, gold)
        for optimizer, lr in zip(optimizers, (config.lr * min(1, (step + 1) / config.warmup), config.value_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / config.steps)

        # ---- 3) roll out: sample responses and score them ------------------------------------------------------------
        rows = next(order).repeat_interleave(config.samples)
        samples, responses, raw = roll_out(policy, rows.tolist(), generator(config.seed, 3, step))
        tokens, prompt_lengths, lengths, _ = (x if x is None else x.to(device()) for x in samples)
        ended = tokens[torch.arange(len(rows)), lengths - 1] == tokenizer.eos
        scores = ((raw.to(device()) - networks.score_mean) / networks.score_std).float() - config.missing_eos_penalty * ~ended

        # ---- 4) log-probabilities under policy and reference, values -------------------------------------------------
        mask = response_mask(prompt_lengths, lengths)

        def chunks(rows: torch.Tensor) -> list[torch.Tensor]:
            """Rows of similar length together, so that little is computed on pads."""
            return rows[lengths[rows].argsort(stable=True)].split(config.micro_batch_size)

        everywhere = torch.arange(len(rows), device=device())
        old_logprobs, ref_logprobs, values = (torch.zeros(mask.shape, device=device()) for _ in range(3))
        with torch.no_grad(), autocast(config.dtype):
            for c in chunks(everywhere):  # the same function and shapes as in the update: its first ratio is exactly 1
                row = (tokens[c], prompt_lengths[c], lengths[c])
                R = int((lengths[c] - prompt_lengths[c]).max())
                old_logprobs[c, :R] = logprobs_of(policy, *row)
                ref_logprobs[c, :R] = logprobs_of(ref, *row)
                if value:
                    values[c, :R] = values_of(value, *row)

        # ---- 5) rewards and advantages -------------------------------------------------------------------------------
        beta = networks.beta.item()
        rewards = compute_rewards(scores, old_logprobs, ref_logprobs, mask, beta)
        if value:
            advantages, returns = compute_gae(rewards, values, mask, config.gamma, config.lam)
            advantages = whiten(advantages, mask)
        else:
            advantages = leave_one_out(rewards, mask, config.samples)

        # ---- 6) several passes over the batch ------------------------------------------------------------------------
        stats = []
        draw = generator(config.seed, 4, step)
        for _ in range(config.epochs):
            for part in torch.randperm(len(rows), generator=draw).to(device()).tensor_split(config.minibatches):
                part, sums = part.sort().values, torch.zeros(6, device=device())
                count = int(mask[part].sum())
                for c in chunks(part):
                    R = int((lengths[c] - prompt_lengths[c]).max())
                    m, row = mask[c, :R], (tokens[c], prompt_lengths[c], lengths[c])
                    with autocast(config.dtype):
                        logprobs = logprobs_of(policy, *row)
                        new_values = values_of(value, *row) if value else None
                    losses, ratio = policy_loss(logprobs, old_logprobs[c, :R], advantages[c, :R], m, config.clip)
                    errors = (value_loss(new_values, values[c, :R], returns[c, :R], m, config.value_clip) if value
                              else torch.zeros_like(losses))
                    ((losses.sum() + errors.sum()) / count).backward()
                    with torch.no_grad():
                        change, ratio = (logprobs - old_logprobs[c, :R])[m], ratio[m]
                        sums += torch.stack([losses.sum(), errors.sum(), 0.5 * change.square().sum(),
                                             ((ratio - 1).abs() > config.clip).sum(), ratio.sum(), ratio.square().sum()])
                norms = [torch.nn.utils.clip_grad_norm_(network.parameters(), config.max_grad_norm).item()
                         for network in networks.values()]
                stats.append(sums / count)
                run.check_finite(step, rows[part.cpu()], loss=stats[-1][0].item(), value_loss=stats[-1][1].item(),
                                 grad_norm=sum(norms), score=scores.mean().item())
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

        # ---- 7) log; beta adapts -------------------------------------------------------------------------------------
        per_response = {"scores": scores, "raw_scores": raw, "kl": (old_logprobs - ref_logprobs).sum(1),
                        "entropy": -old_logprobs.sum(1), "length": mask.sum(1).float(), "eos_rate": ended.float()}
        row = {"step": step, "beta": beta, **{key: x.mean().item() for key, x in per_response.items()}}
        row |= {"kl_se": (per_response["kl"].std(correction=min(1, len(rows) - 1)) / math.sqrt(len(rows))).item(),
                "objective": row["scores"] - beta * row["kl"], "distinct": len(set(responses)) / len(responses)}
        names = ("loss", "value_loss", "approx_kl", "clip_fraction", "ratio", "ratio_square")
        row |= dict(zip(names, torch.stack(stats).mean(0).tolist()))  # means over tokens, then over all minibatches
        row["ratio_std"] = math.sqrt(max(0, row.pop("ratio_square") - row["ratio"] ** 2))
        if value:
            error, total = ((x[mask].var(correction=0)) for x in (returns - values, returns))
            row["explained_variance"] = 1 - (error / total.clamp(min=1e-8)).item()
        else:
            del row["value_loss"]
        run.log(**row, grad_norm=norms[0], lr=optimizers[0].param_groups[0]["lr"])
        warn(run, step, responses, row["eos_rate"])
        if config.target_kl:
            networks.beta.fill_(adapted(beta, row["kl"], config.target_kl, config.horizon, len(rows)))
        bar.set_postfix_str(f"score {row['raw_scores']:.3f}, KL {row['kl']:.2f}, beta {beta:.3f}")
        run.checkpoint(step + 1)
    if config.evaluate_every:
        evaluate.along(run, config.steps, policy, ref, tokenizer, bank, gold)

    # ---- 8) gold reward and KL on test prompts, samples, figure --------------------------------------------------------
    episodes = config.steps * min(config.batch_size, len(prompts) * config.samples)
    result = {"step": config.steps, "seconds": run.seconds(), "samples": episodes, "reward_calls": episodes}
    run.log(**result)
    tokenizer.save(run.folder / "tokenizer.tiktoken")
    run.finish(policy, kind="GPT", architecture=asdict(policy.config), dataset=config.dataset, tokenizer=tokenizer.fingerprint)
    end_beta = config.beta * networks.score_std.item() if config.reward == "gold" and not config.target_kl else None
    table = evaluate.report(run.folder, name, policy.eval(), ref, tokenizer, bank, gold, end_beta, result)
    draw_run(run.rows, bank, table, run.folder / "figure.png")
    print(f"\nfigure, log, samples and model  ->  {run.folder}")
    return run.folder


def warn(run: Run, step: int, responses: list[str], eos_rate: float) -> None:
    """Name, once, what has gone wrong for sure: a policy that has collapsed, a KL that cannot be."""
    recent = [row for row in run.rows if "kl" in row][-10:]
    kl, error = (sum(row["kl"] for row in recent) / len(recent),
                 math.sqrt(sum(row["kl_se"] ** 2 for row in recent)) / len(recent))
    first = next(row for row in run.rows if "eos_rate" in row)
    found = {"collapse": f"the policy has collapsed: {len(set(responses))} different responses among {len(responses)}"
             if len(set(responses)) <= 0.1 * first["distinct"] * len(responses) else "",
             "endless": "the policy has collapsed: no response ends" if eos_rate == 0 and first["eos_rate"] > 0.5 else "",
             "kl": f"the KL is negative, {kl:.3g} +- {error:.2g} over {len(recent)} updates: the responses do not come from "
             "the distribution that is scored" if kl < -3 * error and kl < -1e-3 else ""}
    for name, message in found.items():
        if message and not any(row.get("warning") == name for row in run.rows):
            run.log(step=step, warning=name, message=message)
            tqdm.write(f"warning: step {step}: {message}", file=sys.stderr)


def draw_run(log: list[dict], bank: evaluate.Bank, rows: dict[str, dict], path: Path) -> None:
    """Score and KL during training; gold reward against KL with the optimal curve."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    log = [row for row in log if "scores" in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    steps = [row["step"] for row in log]
    for name, color, label in (("scores", "tab:blue", "score, in standard deviations of the reference's"),
                               ("kl", "tab:orange", "KL to the reference, nats a response"),
                               ("beta", "tab:gray", "beta")):
        left.plot(steps, [row[name] for row in log], color=color, label=label)
    left.set(xlabel="update", title="PPO on training prompts")
    left.legend(fontsize=8)
    evaluate.draw_frontier(right, bank, rows)
    right.set_title("test prompts: gold reward against KL")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    train(parse(Config, __doc__))
