"""What every training loop uses: device and dtype, random streams, batches, optimizers."""
from __future__ import annotations

import ctypes
import hashlib
import math
from typing import Iterator

try:  # glibc hands the memory of every large tensor back to the system when it is freed, and the next tensor is paged in
    # again 4 kB at a time; keeping it makes a training step on a CPU faster (results/bench has both figures)
    _libc = ctypes.CDLL("libc.so.6")
    _libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
    _libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too
except (OSError, AttributeError):
    pass  # not glibc

import torch  # noqa: E402  (after mallopt)

from common import fail  # noqa: E402


def fingerprint(state: dict[str, torch.Tensor]) -> str:
    """16 hex digits of a model's weights: whatever is cached from a model is tied to it by this."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(dtype: str) -> torch.autocast:
    """bf16 autocast where asked for; 'auto' means bf16 on CUDA and fp32 on a CPU. No fp16, so no GradScaler."""
    kind = device().type
    return torch.autocast(kind, torch.bfloat16, enabled=dtype == "bfloat16" or (dtype == "auto" and kind == "cuda"))


def generator(seed: int, *stream: int) -> torch.Generator:
    """A private random stream on the CPU: (seed, stream...) name it, so drawing from one never disturbs another."""
    mixed = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed[:7], "big"))


def batches(lengths: torch.Tensor, batch_size: int, seed: int, pool: int = 16) -> Iterator[torch.Tensor]:
    """Endless batches of row numbers, (batch_size,) each, reshuffled every epoch.

    Rows of similar length go together (sorted inside a pool of `pool` batches, then the batches are shuffled), because
    padding is work thrown away: a third of it on `reviews`. Each epoch's order depends on (seed, epoch) alone, so a run
    that resumes at step k sees what it would have seen. The rows that do not fill a last batch wait for another epoch.
    """
    n = len(lengths)
    if n == 0:
        fail("no rows to train on")
    batch_size = min(batch_size, n)
    epoch = 0
    while True:
        draw = generator(seed, epoch)
        order = torch.randperm(n, generator=draw)[:n - n % batch_size]
        cut = []
        for chunk in order.split(batch_size * pool):
            cut += chunk[lengths[chunk].argsort(stable=True)].split(batch_size)
        for i in torch.randperm(len(cut), generator=draw).tolist():
            yield cut[i]
        epoch += 1


def pad(rows: list[list[int]] | list[torch.Tensor], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad rows of ids: tokens (B, longest) and lengths (B,), both int64."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), value)
    for i, row in enumerate(rows):
        tokens[i, :len(row)] = torch.as_tensor(row)
    return tokens, lengths


def warmup_cosine(step: int, steps: int, warmup: int, floor: float = 0.1) -> float:
    """Learning-rate factor: linear from 1/warmup to 1, then half a cosine down to `floor` after the last step."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def adamw(model: torch.nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW that decays matrices only, not biases, LayerNorm gains or embeddings of positions."""
    decay = [p for n, p in model.named_parameters() if p.dim() == 2 and "wpe" not in n]
    rest = [p for n, p in model.named_parameters() if not (p.dim() == 2 and "wpe" not in n)]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
