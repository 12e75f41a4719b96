"""Reward models: the pairwise (Bradley-Terry) model of RLHF, and the gold sentiment classifier, the same network with
another loss.

    pairs:   L(phi) = - E_{(x, y_w, y_l)} log sigmoid( r_phi(x, y_w) - r_phi(x, y_l) )        (Rafailov et al. 2023, Eq. 2)
    labels:  L(phi) = - E_{(text, z)} mean_t log p_phi(z | text_<=t),  p_phi(positive | text_<=t) = sigmoid(r_phi(text_<=t))

    python reward_model.py                              # on the pairs of `reviews`; 20 s on 2 cores
    python reward_model.py --dataset imdb --on labels   # the gold classifier; about 15 minutes on 2 cores

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

import data
import evaluate
import sft
from common import (Run, adamw, autocast, batches, defaults, device, finished, fingerprint, generator, pad, parse,
                    read_jsonl, require, runs_folder, sha256, warmup_cosine)
from data.pairs import encode_pairs, ensure_pairs, read_pairs
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig, ScalarModel, load_run


@dataclass
class Config:
    dataset: str = "reviews"  # a folder of data/
    preset: str = "cpu"  # defaults for a machine: cpu, or gpu (imdb)
    on: Literal["pairs", "labels"] = "pairs"  # pairwise reward model, or gold classifier of labelled documents
    labels: Literal["bt", "argmax"] = "bt"  # which sampled pairs: winners drawn from Bradley-Terry, or always the better
    pairs: str = ""  # your own pairs, a JSON-lines file, in place of sampled ones
    sft: str = ""  # run folder of the SFT policy, if not runs/<dataset>/sft
    out: str = ""  # run folder, if not reward-model (or gold) beside the SFT policy
    block_size: int = 0  # --on labels: tokens of a window; 0 = that of the SFT policy
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

    PRESETS: ClassVar[dict] = {("imdb", "cpu"): dict(labels="argmax"), ("imdb", "gpu"): dict(labels="argmax", lr=1e-4)}
    GOLD: ClassVar[dict] = {("imdb", "cpu"): dict(block_size=160, epochs=4.0, lr=3e-4, warmup=100, weight_decay=0.1),
                            ("imdb", "gpu"): dict(block_size=256, epochs=4.0, lr=1e-4, warmup=200, weight_decay=0.1)}

    def __post_init__(self) -> None:
        require(self.lr > 0 and self.epochs > 0, "--lr and --epochs must be > 0")
        require(min(self.batch_size, self.warmup) > 0, "--batch-size and --warmup must be > 0")
        require(self.block_size >= 0, "--block-size must be >= 0")
        base = Path(self.sft).parent if self.sft else runs_folder(self.dataset, self.preset)
        self.out = self.out or str(base / ("reward-model" if self.on == "pairs" else "gold"))


def reward_loss(chosen_scores: torch.Tensor, rejected_scores: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry negative log-likelihood of each pair, Eq. 2: -log sigmoid(chosen - rejected). All (B,)."""
    return -F.logsigmoid(chosen_scores - rejected_scores)
