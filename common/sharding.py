"""--shard: where a model and its optimizer no longer fit one device.

Every process keeps a WORLD-th of each weight, and so of its gradient and its optimizer's state. The
weights of a block are gathered when it is run and forgotten again, forwards and backwards, and the
gradients are added up on the way: FSDP2, torch's fully_shard (Zhao et al. 2023). The numbers are
those of a run without --shard, up to rounding.
"""
from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator

import torch
import torch.nn as nn

from common import processes


def shard(*models: nn.Module) -> None:
    """Leave each process its part of the weights; to be called before the optimizer is made."""
    from torch.distributed import init_device_mesh  # importing these takes a second
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    processes.sharded = True
    mesh = init_device_mesh(next(models[0].parameters()).device.type, (processes.WORLD, ))
    for model in models:
        for block in getattr(model, "gpt", model).h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for name in ("hidden", "score"):  # what is called besides forward
            if hasattr(model, name):
                register_fsdp_forward_method(model, name)
        for part in gathered_parts(model):
            part.set_gradient_divide_factor(1.0)  # a sum, as without --shard, not a mean
            part.set_force_sum_reduction_for_comms(True)


def gathered_parts(model: nn.Module) -> list[nn.Module]:
    """What is gathered at once: the blocks, and the rest."""
    return [part for part in model.modules() if hasattr(part, "unshard")]


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """with whole(model): the weights stay gathered. For sampling, where the processes make
    different numbers of passes and cannot meet in each."""
    parts = gathered_parts(model) if processes.sharded else []
    for part in parts:
        part.set_reshard_after_forward(False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(part is not model)
        part.reshard()


def whole_state(state: Any) -> Any:
    """A state_dict with every tensor gathered, on the CPU if it was sharded. All must call it."""
    if isinstance(state, dict):
        return {name: whole_state(value) for name, value in state.items()}
    if isinstance(state, list):
        return [whole_state(value) for value in state]
    if hasattr(state, "full_tensor"):  # a DTensor
        return state.full_tensor().cpu()
    return state


def load_state(model: nn.Module, optimizers: list, saved: dict) -> None:
    """The reverse: each process takes its part. Of several optimizers each has its parameters in
    the order in which its state_dict counts them."""
    def part(full: Any, like: torch.Tensor) -> Any:
        if not hasattr(like, "full_tensor") or getattr(full, "shape", None) != like.shape:
            return full
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(full.to(like.device), like.device_mesh, like.placements)

    current = model.state_dict()
    model.load_state_dict({name: part(full, current.get(name, full))
                           for name, full in saved["model"].items()})
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, of_one in state["state"].items():
            for name, full in of_one.items():
                of_one[name] = part(full, parameters[index])
        optimizer.load_state_dict(state)
