"""Several processes, one run: torchrun --nproc-per-node 2 dpo.py --beta 0.1

Every process has the whole model and takes its share of each batch's rows. That is exact, because
every loss here is a sum over rows divided by a count of the *whole* batch: the gradients of the
shares add up to the gradient that one process would have (all_reduce), and every process then takes
the same step. Responses are drawn from one uniform number per row and position, so they are the
same texts however many processes draw them. What differs is the order in which numbers are added:
a run with two processes is that with one up to rounding.

    rows = mine(rows)             # every WORLD-th row: the share of this process
    add_gradients(policy)         # after backward: the sum over all processes
    share(logprobs)               # rows that are not mine were 0: now everybody has all of them

All processes go through the same lines and take the same decisions. Only the first writes files and
prints; the others wait for it (`with one_writes()`), so that all see the same files. With one
process all of this does nothing.
"""
from __future__ import annotations

import atexit
import io
import os
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import Iterator

from common import fail

RANK = int(os.environ.get("RANK", 0))  # number of this process, as torchrun gives it
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # how many there are
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # its number on this machine
_writing = False  # this process is inside of one_writes()
sharded = False  # --shard: see sharding.py

if WORLD > 1:  # bt.py and dagger.py write files and need no torch
    import torch
    import torch.distributed as dist


def join() -> None:
    """Meet the other processes that torchrun has started, if it has."""
    if WORLD == 1 or dist.is_initialized():
        return
    if LOCAL_RANK < torch.cuda.device_count():
        torch.cuda.set_device(LOCAL_RANK)
    if RANK > 0:
        sys.stdout, sys.stderr = open(os.devnull, "w"), LastWords()
    # gloo for tensors on the CPU, nccl for those on GPUs; the first process may prepare data for
    # long while the others wait
    dist.init_process_group(timeout=timedelta(hours=2))
    atexit.register(dist.destroy_process_group)


class LastWords(io.TextIOBase):
    """stderr of a process that is not the first: nothing but what it dies of. That comes a moment
    late: mostly the first one dies of it, too, and then torchrun ends the others at once."""
    dying = False

    def write(self, text: str) -> int:
        if not self.dying and text.startswith(("error:", "Traceback")):
            self.dying = True
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which torchrun ends us
            time.sleep(5)
            text = f"process {RANK}: {text}"
        return sys.__stderr__.write(text) if self.dying else len(text)


def mine(rows: torch.Tensor) -> torch.Tensor:
    """The share of this process of a batch: every WORLD-th row.

    Raises SystemExit if a process would get none; with --shard also if not all get as many, for all
    must then make the same number of passes.
    """
    if len(rows) < WORLD or (sharded and len(rows) % WORLD):
        fail(f"{len(rows)} rows cannot be shared by {WORLD} processes"
             + (" equally, as --shard needs" if sharded else ""))
    return rows[RANK::WORLD]


def share(*tensors: torch.Tensor) -> None:
    """Add up each tensor over all processes, in place."""
    if WORLD > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def add_gradients(*models: torch.nn.Module) -> None:
    """Every parameter's gradient becomes the sum over all processes."""
    if WORLD == 1:
        return
    # those of --shard are added up already
    parameters = [p for model in models for p in model.parameters()
                  if p.requires_grad and not hasattr(p, "full_tensor")]
    if not parameters:
        return
    # one message, not one for each parameter
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(part.view_as(p))


def agree(number: int) -> int:
    """The largest of what the processes say, so that they all do the same."""
    if WORLD == 1:
        return number
    largest = torch.tensor(int(number))
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


@contextmanager
def one_writes() -> Iterator[bool]:
    """with one_writes() as writer: if writer: ...  The first writes while no other reads."""
    global _writing
    if WORLD == 1 or _writing:
        yield RANK == 0
        return
    _writing = True
    dist.barrier()
    try:
        yield RANK == 0
        dist.barrier()
    finally:
        _writing = False
