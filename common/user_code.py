"""FILE.py:function, code of the user's: loaded, called, and where it is wrong its own file and line
are named."""
from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from typing import Any, Callable

import torch

from common import fail, short

Loss = Callable[..., torch.Tensor]


# ---- any function --------------------------------------------------------------------------------

def load_function(name: str, flag: str, others: str = "") -> tuple[Callable, str]:
    """The function that FILE.py:function names, and the path of its file.

    Args:
        others: what else the flag takes, for the message about a name that is no such file.
    """
    path, _, attribute = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        fail(f"{flag} {name!r}: expected {others}FILE.py:function")
    function = getattr(load_module(path, f"{flag} {name}"), attribute, None)
    if not callable(function):
        fail(f"{flag} {name}: {path} has no function {attribute!r}")
    return function, path


def load_module(path: str, what: str) -> Any:
    """A Python file as a module. Files beside it can be imported, and dataclasses and pickle find
    it by its name."""
    name = "user_" + hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    beside = str(Path(path).resolve().parent)
    if beside not in sys.path:
        # behind ours: a model.py of theirs must not take the place of our own
        sys.path.append(beside)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        place = f", line {error.lineno}" if isinstance(
            error, SyntaxError) else f"; {blamed(error, path, None)}"
        fail(f"{what}: {path} cannot be loaded ({described(error)}{place})")
    return module


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {short(error)}" if str(error) else type(error).__name__


def blamed(error: BaseException | None, path: str, function: Any) -> str:
    """File and line of the user's code: where it raised, or else where the function begins."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    own = [frame for frame in frames if Path(frame.filename).resolve() == Path(path).resolve()]
    if own:
        return f"{path}, line {own[-1].lineno}"
    code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
    return f"{path}, line {code.co_firstlineno}" if code else path


# ---- a loss --------------------------------------------------------------------------------------

def own_loss(name: str) -> Loss:
    """--loss FILE.py:function, tried once: what is wrong with it shows before any training.

    The function is called as
        function(chosen_ratios, rejected_ratios, beta, chosen_lengths, rejected_lengths)
    with (B,) log pi(y|x)/pi_ref(y|x) of the responses in nats, (B,) their tokens, and --beta; it
    returns the loss of each pair, (B,), of which the mean over the batch is minimised.
    """
    function, path = load_function(name, "--loss", "dpo, ipo, unlikelihood, or ")

    def wrong(what: str, error: BaseException | None = None) -> None:
        fail(f"--loss {name}: {what} ({blamed(error, path, function)})")

    def loss(chosen_ratios: torch.Tensor, *others: Any) -> torch.Tensor:
        try:
            losses = function(chosen_ratios, *others)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit, too: it is not the end of the run
            wrong(described(error), error)
        count = len(chosen_ratios)
        if not isinstance(losses, torch.Tensor):
            wrong(f"returned {short(repr(losses), 40)}, expected a tensor of {count} losses")
        if losses.shape != (count,):
            wrong(f"returned shape {tuple(losses.shape)} for {count} pairs, expected ({count},)")
        if not losses.isfinite().all():
            i = int((~losses.isfinite()).nonzero()[0])
            wrong(f"returned {losses[i].item()} for pair {i}, expected a finite number")
        if chosen_ratios.requires_grad and not losses.requires_grad:
            wrong("returned losses without a gradient to the ratios")
        return losses

    # one pair at the start of training, where both ratios are 0, and seven anywhere
    draw = torch.Generator().manual_seed(0)
    ratios = 5 * torch.randn(2, 8, generator=draw)
    ratios[:, 0] = 0
    ratios.requires_grad_()
    lengths = torch.randint(1, 50, (2, 8), generator=draw)
    losses = loss(ratios[0].clone(), ratios[1].clone(), 0.1, *lengths)
    try:
        gradient, = torch.autograd.grad(losses.sum(), ratios, allow_unused=True)
    except RuntimeError as error:
        wrong(described(error), error)
    if gradient is None:
        wrong("returned losses without a gradient to the ratios")
    if not gradient.isfinite().all():
        i = int((~gradient.isfinite()).any(0).nonzero()[0])
        at = ", ".join(f"{ratio:.2f}" for ratio in ratios[:, i].tolist())
        wrong(f"its gradient is not finite where the ratios are {at}")
    return loss
