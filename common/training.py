"""What every training loop uses: device and dtype, random streams, batches, learning rates,
optimizers, running means."""
from __future__ import annotations

import ctypes
import hashlib
import math
import sys
from typing import Any, Iterator, Literal

# glibc hands the memory of every large tensor back to the system when it is freed, and the next
# tensor is paged in again, 4 kB at a time. Keeping it makes a training step on a CPU faster
# (results/bench has both figures).
try:
    _libc = ctypes.CDLL("libc.so.6")
    _libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
    _libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too
except (OSError, AttributeError):
    pass  # not glibc

import torch  # noqa: E402  (after mallopt)

from tqdm import tqdm

from common import fail
from common.processes import LOCAL_RANK, WORLD, share


Dtype = Literal["auto", "float32", "bfloat16"]  # of matrix products; weights are fp32
Device = Literal["auto", "cpu", "cuda", "mps"]
asked_for: Device = "auto"  # by --device


# ---- numbers and random streams ------------------------------------------------------------------

def fingerprint(state: dict[str, torch.Tensor]) -> str:
    """16 hex digits of a model's weights: whatever is cached from a model is tied to it by this."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(
            torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def use_device(name: Device) -> None:
    """What --device says, for this process and for all that it builds. Stops if it is not there."""
    global asked_for
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if name in there and not there[name]():
        fail(f"--device {name}: torch {torch.__version__} finds none on this machine")
    asked_for = name
    if WORLD > 1 and device().type == "cuda" and LOCAL_RANK >= torch.cuda.device_count():
        fail(f"more processes on this machine than its {torch.cuda.device_count()} GPUs; "
             "--device cpu needs none")


def device() -> torch.device:
    """The one that was asked for; auto is CUDA where there is one, else the CPU. An Apple GPU (mps)
    is used only if it is asked for: all of this was written for it, and never run on it."""
    if asked_for != "auto":
        return torch.device(asked_for)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(dtype: str) -> torch.autocast:
    """bf16 autocast where asked for; 'auto' means bf16 on CUDA and fp32 elsewhere. No fp16, so no
    GradScaler."""
    kind = device().type
    return torch.autocast(kind,
                          torch.bfloat16,
                          enabled=dtype == "bfloat16" or (dtype == "auto" and kind == "cuda"))


def generator(seed: int, *stream: int | str) -> torch.Generator:
    """A private random stream on the CPU: (seed, stream...) name it, so drawing from one never
    disturbs another.

    Streams are named by words, generator(seed, "split"). The numbers that some scripts use name
    those that were there before: with other names they would draw other samples, and the committed
    results could not be made again.
    """
    mixed = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed[:7], "big"))


# ---- batches -------------------------------------------------------------------------------------


def batches(lengths: torch.Tensor,
            batch_size: int,
            seed: int,
            start: int = 0,
            pool: int = 16) -> Iterator[torch.Tensor]:
    """Endless batches of row numbers, (batch_size,) each, reshuffled every epoch; the first `start`
    of them left out.

    Rows of similar length go together (sorted inside a pool of `pool` batches, then the batches are
    shuffled), because padding is work thrown away: a third of it on `reviews`. Each epoch's order
    depends on (seed, epoch) alone, so a run that resumes at step k sees what it would have seen.
    The rows that do not fill a last batch wait for another epoch.
    """
    n = len(lengths)
    if n == 0:
        fail("no rows to train on")
    batch_size = min(batch_size, n)
    epoch = start // (n // batch_size)
    start %= n // batch_size
    while True:
        draw = generator(seed, epoch)
        order = torch.randperm(n, generator=draw)[:n - n % batch_size]
        cut = []
        for chunk in order.split(batch_size * pool):
            cut += chunk[lengths[chunk].argsort(stable=True)].split(batch_size)
        for i in torch.randperm(len(cut), generator=draw).tolist()[start:]:
            yield cut[i]
        epoch, start = epoch + 1, 0


def similar_lengths(rows: torch.Tensor, lengths: torch.Tensor,
                    size: int) -> tuple[torch.Tensor, ...]:
    """Rows in parts of at most `size`, those of similar length together, so that little is computed
    on pads."""
    return rows[lengths[rows].argsort(stable=True)].split(size) if len(rows) else ()


def pad(rows: list[list[int]] | list[torch.Tensor],
        value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad rows of ids: tokens (B, longest) and lengths (B,), both int64."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), value)
    for i, row in enumerate(rows):
        tokens[i, :len(row)] = torch.as_tensor(row)
    return tokens, lengths


# ---- learning rates and optimizers ---------------------------------------------------------------

def warmup_linear(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear from 1/warmup to 1, and linear to 0 at the end."""
    return min((step + 1) / warmup, 1 - step / steps)


def warmup_cosine(step: int, steps: int, warmup: int, floor: float = 0.1) -> float:
    """Learning-rate factor: linear from 1/warmup to 1, then half a cosine down to `floor` after the
    last step."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi *
                                                     (step - warmup) / max(1, steps - warmup)))


def set_lr(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def check_steps(steps: int, warmup: int) -> None:
    """Say so where training will be over before the learning rate has reached its peak."""
    if steps < warmup:
        print(f"warning: {steps} steps are fewer than the warm-up of {warmup}: hardly anything "
              "will be learned; more data, a larger --epochs, a smaller --batch-size or --warmup",
              file=sys.stderr)


def adamw(model: torch.nn.Module, lr: float, weight_decay: float,
          betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW that decays matrices only, not biases, LayerNorm gains or embeddings of positions."""
    named = list(model.named_parameters())
    decay = [p for name, p in named if p.dim() == 2 and "wpe" not in name]
    rest = [p for name, p in named if not (p.dim() == 2 and "wpe" not in name)]
    groups = [{"params": decay, "weight_decay": weight_decay},
              {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


# ---- what a step reports -------------------------------------------------------------------------

class Mean:
    """Means of named values over all that was added: metrics.add(loss=losses) per micro-batch,
    metrics.values() per step.

    Sums stay on the device until they are asked for, so that adding does not wait for it.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, int] = {}

    def add(self, **values: torch.Tensor) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().sum(dtype=torch.float32)
            self.counts[name] = self.counts.get(name, 0) + value.numel()

    def values(self) -> dict[str, float]:
        """The means; of several processes, over the rows of all of them."""
        names = list(self.sums)
        sums = torch.stack([torch.as_tensor(self.sums[name]) for name in names])
        counts = torch.tensor([float(self.counts[name]) for name in names], device=sums.device)
        share(sums, counts)
        return dict(zip(names, (sums / counts).tolist()))


def half_ties(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1 where a > b, 1/2 where they are equal, else 0: accuracy of a comparison. So before training
    it is a half."""
    return (a > b).float() + 0.5 * (a == b).float()


def warn_of_collapse(run: Any, step: int, responses: list[str]) -> None:
    """Name, once, what has gone wrong for sure: a policy that has collapsed, a KL that cannot be.

    Args:
        run: whose last logged row is that of this step, with kl, kl_se, eos_rate and distinct.
        responses: of this step.
    """
    rows = [row for row in run.rows if "kl" in row]
    first, last, recent = rows[0], rows[-1], rows[-10:]
    kl = sum(row["kl"] for row in recent) / len(recent)
    error = math.sqrt(sum(row["kl_se"] ** 2 for row in recent)) / len(recent)
    different = len(set(responses))
    found = {}
    if different <= 0.1 * first["distinct"] * len(responses):
        found["collapse"] = (f"the policy has collapsed: {different} different responses among "
                             f"{len(responses)}")
    if last["eos_rate"] == 0 and first["eos_rate"] > 0.5:
        found["endless"] = "the policy has collapsed: no response ends"
    if kl < -3 * error and kl < -1e-3:
        found["kl"] = (f"the KL is negative, {kl:.3g} +- {error:.2g} over {len(recent)} updates: "
                       "the responses do not come from the distribution that is scored")
    for name, message in found.items():
        if not any(row.get("warning") == name for row in run.rows):
            run.log(step=step, warning=name, message=message)
            tqdm.write(f"warning: step {step}: {message}", file=sys.stderr)
