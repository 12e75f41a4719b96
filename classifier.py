"""The gold reward of a task that has labels: a sentiment classifier, the same network as a reward
model with another loss.

    L(phi) = - E_{(text, z)} mean_t log p_phi(z | text_<=t)
    p_phi(positive | text_<=t) = sigmoid(r_phi(text_<=t))

The loss is taken after every token: the classifier will score texts that are as short as the policy
writes, and every
prefix of a review is such a text. Half of the windows start at the beginning of a review, the
others anywhere.

    python classifier.py --dataset imdb    # half an hour on 2 cores; 85% right after 100 words

Reads   the SFT policy, which the network starts from (trained if it is missing); the labelled
        documents of the dataset
Writes  runs/<dataset>/gold/ : config.json, log.jsonl, model.pt, tokenizer.tiktoken

Differs from the paper, whose gold reward is a classifier that somebody else had trained on the same
reviews.
"""
from __future__ import annotations

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import fail, pipeline, tasks
from common.files import read_jsonl
from common.processes import add_gradients, mine
from common.rewards import classifier_logits
from common.run import Run, check_folder
from common.settings import parse, require, require_numbers, runs_folder, runs_of, settings
from common.tokenizer import Tokenizer
from common.training import (Device, Dtype, Mean, adamw, autocast, batches, check_steps, device,
                             generator, pad, set_lr, warmup_cosine, use_device)
from model import ScalarModel


@settings
class Config:
    dataset: str = "imdb"  # Task: a folder of data/ whose documents have labels.
    preset: str = "cpu"  # Kind of machine that the task's sizes are meant for.
    sft: str = ""  # Run folder of the SFT policy, if not runs/<dataset>/sft.
    block_size: int = 0  # Tokens of a window of a document; 0 = as many as the SFT policy has.

    # ---- optimisation
    epochs: float = 3.0  # Passes over the labelled documents.
    batch_size: int = 32  # Documents per step.
    micro_batch_size: int = 0  # Documents per forward pass if memory is short; 0 = all.
    lr: float = 3e-4  # Peak learning rate.
    warmup: int = 100  # Steps of linear warm-up; then a cosine down to a tenth of the rate.
    weight_decay: float = 0.1  # Weight decay of matrices.
    max_grad_norm: float = 1.0  # Norm at which gradients are clipped.
    seed: int = 0  # Seed of the head, of the order of the documents and of their windows.
    dtype: Dtype = "auto"  # Number format of matrix products; auto = bfloat16 on CUDA.
    device: Device = "auto"  # Where it is computed; auto = CUDA where there is one, else the CPU.
    compile: bool = False  # Use torch.compile on the model.

    # ---- the run
    out: str = ""  # Run folder, if not gold beside the SFT policy, where every run looks for it.
    checkpoint_every: float = 60.0  # Seconds between checkpoints.
    resume: bool = False  # Go on from the last checkpoint.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="epochs batch_size lr warmup max_grad_norm",
                        from_0="block_size micro_batch_size weight_decay seed checkpoint_every")
        require(self.block_size == 0 or self.block_size > 2,
                f"--block-size {self.block_size}: must be 0 or > 2")
        base = runs_of(self.sft) if self.sft else runs_folder(self.dataset, self.preset)
        self.out = self.out or str(base / "gold")


def windows(ids: list[list[int]], size: int, bos: int, draw: torch.Generator) -> list[list[int]]:
    """One window of at most `size` tokens of each document, <bos> first: half from its start, half
    from anywhere."""
    numbers = torch.rand(len(ids), 2, generator=draw)
    cut = []
    for row, (kind, place) in zip(ids, numbers.tolist()):
        start = int(place * max(0, len(row) - size // 2)) if kind < 0.5 else 0
        cut.append([bos] + row[start:start + size - 1])
    return cut


def prefix_loss(logits: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the label after every token of a window, averaged over its tokens: (B,).

    Args: logits (B, T) for "positive" after each position; labels (B,) 1 or 0; lengths (B,) of the
        windows.
    """
    seen = torch.arange(logits.shape[1], device=logits.device) < lengths[:, None]  # (B, T)
    targets = labels[:, None].expand_as(logits)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (losses * seen).sum(1) / seen.sum(1)


def train(config: Config) -> Path:
    """Train on labelled documents, measure on held-out and on test ones, and return the run
    folder."""
    # ---- 1) labelled documents and the SFT policy ------------------------------------------------
    use_device(config.device)
    check_folder(config)
    folder = tasks.prepared(config.dataset)
    documents = labelled(folder / "train.jsonl")
    sft = pipeline.sft_policy(config.sft, config.dataset, config.preset, config.dtype)
    start = pipeline.load(sft, config.dataset, config.preset, config.dtype)
    tokenizer = start.tokenizer
    ids = tokenizer.encode_batch([row["text"] for row in documents])
    labels = torch.tensor([float(row["label"]) for row in documents])
    train_count = len(ids) - len(ids) // 20  # the last twentieth is held out

    # ---- 2) the network starts from the policy, with a random head -------------------------------
    block_size = config.block_size or start.ref.config.block_size
    model = ScalarModel.from_policy(start.ref, block_size, config.seed).to(device()).train()
    optimizer = adamw(model, config.lr, config.weight_decay, betas=(0.9, 0.95))
    steps = max(1, round(config.epochs * max(1, train_count // config.batch_size)))
    check_steps(steps, config.warmup)
    run = Run(config, model, [optimizer], built_from(config, start), steps)
    sizes = torch.tensor([min(len(row), block_size) for row in ids[:train_count]])
    batch_iterator = batches(sizes, config.batch_size, config.seed, start=run.step)
    forward = torch.compile(model) if config.compile else model

    # ---- 3) train --------------------------------------------------------------------------------
    bar = tqdm(range(run.step, steps),
               f"classifier on {train_count} documents",
               steps,
               initial=run.step)
    for step in bar:
        lr = config.lr * warmup_cosine(step, steps, config.warmup)
        set_lr([optimizer], lr)

        batch = next(batch_iterator)  # (B,) numbers of documents
        # of this step alone, so that a resumed run draws the same windows
        draw = generator(config.seed, 7, step)
        metrics = Mean()
        drawn = windows([ids[i] for i in batch.tolist()], block_size, tokenizer.bos, draw)
        for part in mine(torch.arange(len(batch))).split(config.micro_batch_size or len(batch)):
            tokens, lengths = pad([drawn[i] for i in part.tolist()], tokenizer.pad)
            lengths, targets = lengths.to(device()), labels[batch[part]].to(device())
            with autocast(config.dtype):
                logits = forward(tokens.to(device()))  # (b, T), after every token
            losses = prefix_loss(logits, targets, lengths)
            # divided by the whole batch, so that micro-batches add up to the gradient of its mean
            (losses.sum() / len(batch)).backward()
            last = logits[torch.arange(len(part), device=device()), lengths - 1]
            metrics.add(loss=losses, accuracy=((last > 0) == (targets > 0.5)).float())

        add_gradients(model)  # of several processes, each with its share of the rows
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
        values = metrics.values()
        # before the optimizer sees a NaN
        run.check_finite(step, batch, **values, grad_norm=grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        run.log(step=step, **values, grad_norm=grad_norm, lr=lr)
        if step % 10 == 0:
            bar.set_postfix_str(f"loss {values['loss']:.3f}, accuracy {values['accuracy']:.2f}")
        run.checkpoint(step + 1)

    # ---- 4) accuracy, also on texts cut to the lengths that a policy writes ----------------------
    model.eval()
    held_out = documents[train_count:]
    result = {
        "step": steps,
        "seconds": run.seconds(),
        "held_out_accuracy": truncated_accuracy(model, tokenizer, held_out, None, config.dtype)
    }
    test = read_jsonl(folder / "test.jsonl", {"text": str, "label": int})
    for words in (50, 100, 200, None):
        name = f"test_accuracy_{words}_words" if words else "test_accuracy_whole"
        result[name] = truncated_accuracy(model, tokenizer, test, words, config.dtype)
    run.log(**result)
    run.finish(model, tokenizer)
    for name, value in result.items():
        print(f"{name.replace('_', ' '):32} {value:.4g}")
    print(f"  ->  {run.folder}")
    return run.folder


def labelled(path: Path) -> list[dict]:
    """The documents that have a label, 1 or 0."""
    documents = [row for row in read_jsonl(path, {"text": str}) if row.get("label") is not None]
    if not documents:
        fail(f"no row of {path} has a label: a classifier needs labelled documents")
    return documents


def truncated_accuracy(model: ScalarModel, tokenizer: Tokenizer, rows: list[dict],
                       words: int | None, dtype: str) -> float:
    """Accuracy of the classifier on the first `words` words of each text, or on the whole of it."""
    texts = [" ".join(row["text"].split()[:words]) for row in rows]
    logits = classifier_logits(model, tokenizer, texts, dtype)
    labels = torch.tensor([row["label"] for row in rows])
    return ((logits > 0) == (labels > 0.5)).float().mean().item()


def built_from(config: Config, start: pipeline.Start | None = None) -> dict[str, str]:
    """What a run is made from: with other weights or other documents it is another run."""
    if start is None:
        sft = pipeline.sft_policy(config.sft, config.dataset, config.preset, config.dtype)
        start = pipeline.load(sft, config.dataset, config.preset, config.dtype)
    return {
        "policy": start.policy_id, "documents": tasks.data_id(tasks.prepared(config.dataset),
                                                              "train.jsonl")
    }


if __name__ == "__main__":
    train(parse(Config, __doc__))
