"""Means with their standard errors, and Newton's method. NumPy only."""
from __future__ import annotations

import math
from typing import Callable, Sequence

import numpy as np

# x -> value, gradient, Hessian
Objective = Callable[[np.ndarray], tuple[float, np.ndarray, np.ndarray]]


def mean_se(values: Sequence | np.ndarray, axis: int = -1) -> tuple:
    """Mean along an axis and its standard error, std / sqrt(n) with n - 1 in the variance; nan
    where n is 1.

    Returns two floats for one row of values, two arrays otherwise.
    """
    x = np.asarray(values, dtype=np.float64)
    n = x.shape[axis]
    mean = x.mean(axis)
    error = x.std(axis, ddof=1) / math.sqrt(n) if n > 1 else np.full_like(mean, math.nan)
    return (float(mean), float(error)) if x.ndim == 1 else (mean, error)


def newton(objective: Objective, x: np.ndarray, tolerance: float,
           steps: int = 200) -> tuple[np.ndarray, float, np.ndarray, np.ndarray]:
    """The minimum of a strictly convex function, by Newton's method with step halving.

    Returns its place, and value, gradient and Hessian there.
    Raises ArithmeticError if |gradient| is not below `tolerance` after so many steps: there may be
    no minimum.
    """
    value, gradient, hessian = objective(x)
    for _ in range(steps):
        if np.abs(gradient).max() <= tolerance:
            return x, value, gradient, hessian
        step = np.linalg.solve(hessian, gradient)
        size = 1.0  # halved until the value falls; near the minimum its last digits cannot tell
        new = objective(x - step)
        while not new[0] <= value + 1e-12 * abs(value) and size > 1e-6:
            size /= 2
            new = objective(x - size * step)
        x = x - size * step
        value, gradient, hessian = new
    raise ArithmeticError(
        f"Newton's method has not converged: gradient {np.abs(gradient).max():.3g}")
