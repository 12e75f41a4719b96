"""Reward models: the pairwise (Bradley-Terry) model of RLHF, and the gold sentiment classifier, the same network with
another loss.

    pairs:   L(phi) = - E_{(x, y_w, y_l)} log sigmoid( r_phi(x, y_w) - r_phi(x, y_l) )        (Rafailov et al. 2023, Eq. 2)
    labels:  L(phi) = - E_{(text, z)} mean_t log p_phi(z | text_<=t),  p_phi(positive | text_<=t) = sigmoid(r_phi(text_<=t))

    python reward_model.py                              # on the pairs of `reviews`; 20 s on 2 cores
    python reward_model.py --dataset imdb --on labels   # the gold classifier; about half an hour on 2 cores

Reads   the SFT policy, which the network starts from; the pairs, or the labelled documents of the dataset
Writes  runs/<dataset>/reward-model/ or runs/<dataset>/gold/ : config.json, log.jsonl, model.pt, tokenizer.tiktoken

The pairwise score is read at the response's last token, and shifted and scaled to mean 0 and standard deviation 1 on the
responses of the SFT policy (Stiennon et al. 2020): the loss cannot see a shift, PPO can see a scale.

The classifier's loss is taken after every token: it will score texts that are as short as the policy writes, and every
prefix of a review is such a text. Half of the windows start at the beginning of a review, the others anywhere.
"""
from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import tasks
import evaluate
import sft
from common import fail
from common.files import read_jsonl, sha256
from common.run import Run, check_folder, finished
from common.settings import defaults, parse, require, require_numbers, runs_folder
from common.training import adamw, autocast, batches, device, fingerprint, generator, pad, warmup_cosine
from common.pairs import encode_pairs, ensure_pairs, read_pairs
from common.tokenizer import Tokenizer
from common.run import load_run
from model import GPT, GPTConfig, ScalarModel


@dataclass
class Config:
    dataset: str = "reviews"  # a folder of data/
    preset: str = "cpu"  # defaults for a machine: cpu, or gpu (imdb)
    on: Literal["pairs", "labels"] = "pairs"  # pairwise reward model, or gold classifier of labelled documents
    labels: Literal["bt", "argmax"] = "bt"  # which sampled pairs: winners drawn from Bradley-Terry, or always the better
    prompts: int = 0  # prompts to sample the pairs for, six pairs each; 0 = as many as the preset says
    pairs: str = ""  # your own pairs, a JSON-lines file, in place of sampled ones
    sft: str = ""  # run folder of the SFT policy, if not runs/<dataset>/sft
    out: str = ""  # run folder, if not reward-model (or gold) beside the SFT policy
    block_size: int = 0  # tokens of a window (--on labels) or of prompt and response; 0 = that of the SFT policy
    epochs: float = 1.0  # passes over the pairs or labelled documents
    batch_size: int = 32  # pairs or documents a step
    micro_batch_size: int = 0  # rows a forward pass, if memory is short; 0 = all at once; same gradient
    lr: float = 5e-4  # peak learning rate
    warmup: int = 20  # steps of linear warm-up, then a cosine to a tenth
    weight_decay: float = 0.01  # AdamW, on matrices only
    max_grad_norm: float = 1.0  # gradient clipping
    seed: int = 0  # initial head and order of the rows
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products; auto = bfloat16 on CUDA only
    compile: bool = False  # torch.compile the model
    checkpoint_every: float = 60.0  # seconds between checkpoints
    resume: bool = False  # go on from the last checkpoint

    PRESETS: ClassVar[dict] = {
        ("tldr", "cpu"): dict(labels="argmax"),
        ("imdb", "cpu"): dict(labels="argmax"),
        ("imdb", "gpu"): dict(labels="argmax", lr=1e-4),
        ("imdb", "cpu", "labels"): dict(block_size=160, epochs=3.0, lr=3e-4, warmup=100, weight_decay=0.1),
        ("imdb", "gpu", "labels"): dict(block_size=256, epochs=4.0, lr=1e-4, warmup=200, weight_decay=0.1),
    }

    def __post_init__(self) -> None:
        require_numbers(self, above_0="epochs batch_size lr warmup max_grad_norm",
                        from_0="prompts block_size micro_batch_size weight_decay seed checkpoint_every")
        require(self.block_size == 0 or self.block_size > 2, f"--block-size {self.block_size}: must be 0 or > 2")
        require(self.on == "pairs" or not self.pairs, "--pairs: needs --on pairs")
        require(self.on == "pairs" and not self.pairs or not self.prompts, "--prompts: needs --on pairs, without --pairs")
        base = Path(self.sft).parent if self.sft else runs_folder(self.dataset, self.preset)
        size = f"-{self.prompts}" if self.prompts else ""
        self.out = self.out or str(base / (f"reward-model{size}" if self.on == "pairs" else "gold"))


def reward_loss(chosen_scores: torch.Tensor, rejected_scores: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry negative log-likelihood of each pair, Eq. 2: -log sigmoid(chosen - rejected). All (B,)."""
    return -F.logsigmoid(chosen_scores - rejected_scores)


def windows(ids: list[list[int]], size: int, bos: int, epoch_seed: torch.Generator) -> list[list[int]]:
    """One window of at most `size` tokens of each document, <bos> first: half from its start, half from anywhere."""
    draw = torch.rand(len(ids), 2, generator=epoch_seed)
    cut = []
    for row, (kind, place) in zip(ids, draw.tolist()):
        start = int(place * max(0, len(row) - size // 2)) if kind < 0.5 else 0
        cut.append([bos] + row[start:start + size - 1])
    return cut


def scalar_model(policy: GPT, block_size: int, seed: int) -> ScalarModel:
    """A scalar model that starts from the policy's weights; positions beyond the policy's start at random."""
    torch.manual_seed(seed)
    model = ScalarModel(GPTConfig(**{**asdict(policy.config), "block_size": block_size}))
    state = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    positions = model.gpt.wpe.weight.detach().clone()
    shared = min(block_size, policy.config.block_size)
    positions[:shared] = state["wpe.weight"][:shared]
    model.gpt.load_state_dict({**state, "wpe.weight": positions})
    return model


def train(config: Config) -> Path:
    """Train on pairs or on labels, measure on held-out rows, and return the run folder."""
    # ---- 1) the SFT policy, and rows of ids --------------------------------------------------------------------------
    check_folder(config)
    own_pairs = read_pairs(config.pairs) if config.pairs else []
    if config.on == "labels":
        path = tasks.ensure(config.dataset) / "train.jsonl"
        documents = [row for row in read_jsonl(path, {"text": str}) if row.get("label") is not None]
        if not documents:
            fail(f"--on labels: no row of {path} has a label")
    sft_folder = sft.ensure(config.sft, config.dataset, config.preset, config.dtype)
    policy, meta = load_run(sft_folder)
    tokenizer = Tokenizer.load(sft_folder / "tokenizer.tiktoken")
    evaluate.check_same_task(sft_folder, meta, {"dataset": config.dataset, "tokenizer": tokenizer.fingerprint})
    weights = fingerprint(policy.state_dict())
    block_size = config.block_size or policy.config.block_size
    if config.on == "pairs":
        gold = None if config.pairs else ensure_gold(sft_folder, config.dataset, config.preset, config.dtype)
        path = config.pairs or ensure_pairs(sft_folder.parent, config.dataset, config.preset, config.labels, policy,
                                            tokenizer, weights, gold, config.prompts)
        pairs = encode_pairs(own_pairs or read_pairs(path), tokenizer, block_size, path)
        n, held = len(pairs), len(pairs) // 20  # the last pairs; their prompts (but one) are not trained on
        tokens, lengths = pad([p.prompt + p.chosen for p in pairs] + [p.prompt + p.rejected for p in pairs], tokenizer.pad)
        sizes = torch.maximum(*lengths.view(2, -1))[:n - held]
    else:
        ids = tokenizer.encode_batch([row["text"] for row in documents])
        labels = torch.tensor([float(row["label"]) for row in documents])
        n, held = len(ids), len(ids) // 20
        sizes = torch.tensor([min(len(row), block_size) for row in ids[:n - held]])

    # ---- 2) the network starts from the policy -----------------------------------------------------------------------
    model = scalar_model(policy, block_size, config.seed).to(device()).train()
    optimizer = adamw(model, config.lr, config.weight_decay, betas=(0.9, 0.95))
    run = Run(config, model, [optimizer], built_from={"sft": weights, "data": sha256(path)})
    steps_per_epoch = max(1, (n - held) // config.batch_size)
    steps = max(1, round(config.epochs * steps_per_epoch))
    order = batches(sizes, config.batch_size, config.seed)
    for _ in range(run.step):
        next(order)
    score = torch.compile(model.score) if config.compile else model.score
    scores_everywhere = torch.compile(model) if config.compile else model

    # ---- 3) train ----------------------------------------------------------------------------------------------------
    name = "reward model" if config.on == "pairs" else "gold classifier"
    bar = tqdm(range(run.step, steps), f"{name} on {n - held} {config.on}", steps, initial=run.step)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * warmup_cosine(step, steps, config.warmup)
        batch = next(order)
        parts = []
        draw = generator(config.seed, 7, step)
        for rows in batch.split(config.micro_batch_size or len(batch)):
            if config.on == "pairs":
                both = torch.cat([rows, rows + n])
                with autocast(config.dtype):
                    chosen, rejected = score(tokens[both, :int(lengths[both].max())].to(device()),
                                             lengths[both].to(device())).view(2, -1)
                losses, right = reward_loss(chosen, rejected), chosen > rejected
            else:
                window, size = pad(windows([ids[i] for i in rows.tolist()], block_size, tokenizer.bos, draw), tokenizer.pad)
                with autocast(config.dtype):
                    logits = scores_everywhere(window.to(device()))
                seen = (torch.arange(window.shape[1]) < size[:, None]).to(device())
                target = labels[rows].to(device())[:, None].expand_as(logits)
                losses = (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * seen).sum(1) / seen.sum(1)
                right = (logits[torch.arange(len(rows)), size - 1] > 0) == (target[:, 0] > 0.5)
            (losses.sum() / len(batch)).backward()
            parts.append(torch.stack([losses.detach(), right.float()]))
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
        loss, accuracy = torch.cat(parts, 1).mean(1).tolist()
        run.check_finite(step, batch, loss=loss, grad_norm=grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.log(step=step, loss=loss, accuracy=accuracy, grad_norm=grad_norm, lr=optimizer.param_groups[0]["lr"])
        if step % 10 == 0:
            bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.2f}")
        run.checkpoint(step + 1)

    # ---- 4) held-out rows, normalisation -----------------------------------------------------------------------------
    model.eval()
    if config.on == "pairs":
        scores = evaluate.all_scores(model, tokens, lengths, config.dtype)
        model.mean.fill_(scores.mean().item())  # of the SFT policy's responses, which the pairs are made of
        model.std.fill_(scores.std().item())
        result = pair_accuracy(*scores.view(2, -1)[:, n - held:] if held else scores.view(2, -1))
    else:
        result = {"held_out_accuracy": truncated_accuracy(model, tokenizer, documents[n - held:], None, config.dtype)}
        test = read_jsonl(path.parent / "test.jsonl", {"text": str, "label": int})
        for words in (50, 100, 200, None):
            name = f"test_accuracy_{words}_words" if words else "test_accuracy_whole"
            result[name] = truncated_accuracy(model, tokenizer, test, words, config.dtype)
    run.log(step=steps, seconds=run.seconds(), **result)
    tokenizer.save(run.folder / "tokenizer.tiktoken")
    run.finish(kind="ScalarModel", architecture=asdict(model.config), dataset=config.dataset, tokenizer=tokenizer.fingerprint)
    print("\n".join(f"{name.replace('_', ' '):32} {value:.4f}" for name, value in result.items()) + f"\n  ->  {run.folder}")
    return run.folder


def pair_accuracy(chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, float]:
    """How often the chosen response scores higher, in all and by the model's confidence: sigmoid(|margin|) in thirds of
    0.5 to 1. A calibrated model is right 58, 75 and 92% of the time at the middle of the three."""
    right, confidence = (chosen > rejected).float(), torch.sigmoid((chosen - rejected).abs())
    result = {"held_out_accuracy": right.mean().item(), "held_out_loss": reward_loss(chosen, rejected).mean().item()}
    for low, high in ((0.5, 0.667), (0.667, 0.833), (0.833, 1.01)):
        inside = (confidence >= low) & (confidence < high)
        if inside.any():
            result[f"accuracy_at_confidence_{low:.2f}_to_{min(high, 1):.2f}"] = right[inside].mean().item()
            result[f"share_at_confidence_{low:.2f}_to_{min(high, 1):.2f}"] = inside.float().mean().item()
    return result


def truncated_accuracy(model: ScalarModel, tokenizer: Tokenizer, rows: list[dict], words: int | None, dtype: str) -> float:
    """Accuracy of the classifier on the first `words` words of each text, or on the whole of it."""
    texts = [" ".join(row["text"].split()[:words]) for row in rows]
    logits = evaluate.classifier_logits(model, tokenizer, texts, dtype)
    return ((logits > 0) == (torch.tensor([row["label"] for row in rows]) > 0.5)).float().mean().item()


MIN_COMPARISONS = 10_000  # fewer human comparisons than these make no judge


def ensure_gold(sft_folder: Path, dataset: str, preset: str, dtype: str = "auto") -> evaluate.GoldReward:
    """The task's gold reward. Where that is a model it is trained if it is missing: a classifier of the labelled documents,
    or a reward model of the human comparisons where the dataset has enough of them (its own reward is a stand-in then)."""
    comparisons = tasks.ensure(dataset) / "comparisons_train.jsonl"
    human = comparisons.exists() and len(read_pairs(comparisons)) >= MIN_COMPARISONS
    if human or not evaluate.has_exact_reward(dataset):
        # 640: the longest prompt and summary that data/tldr/prepare.py lets pass
        source = (dict(pairs=str(comparisons), block_size=640, out=str(sft_folder.parent / "gold")) if human
                  else dict(on="labels"))
        config = defaults(Config, dataset, preset, sft=str(sft_folder), dtype=dtype, resume=True, **source)
        if not finished(config):
            train(config)
    return evaluate.gold_reward(dataset, sft_folder.parent)


if __name__ == "__main__":
    train(parse(Config, __doc__))
