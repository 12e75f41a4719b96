"""Rows and their means with standard errors, logistic regression, Newton's method. NumPy only."""
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


def values(rows: list[dict], name: str, **where: object) -> list:
    """A field of the rows that have it (and not None), and whose other fields are as `where`
    says."""
    return [row[name] for row in rows
            if row.get(name) is not None and where.items() <= row.items()]


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


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


def fit_logistic(questions: np.ndarray, answers: np.ndarray, prior: float,
                 weights: np.ndarray | None = None) -> np.ndarray:
    """The mode w (d,) of P(w | answers), where P(answer 1) = sigmoid(question . w) and w is normal.

    Args:
        questions: (n, d); for Bradley-Terry the features of one segment less those of the other.
        answers: (n,) 1 the first was preferred, 0 the second.
        prior: standard deviation of each weight before any answer.
        weights: (n,) how much each answer counts; 1 without them.
    """
    weights = np.ones(len(answers)) if weights is None else weights

    def loss(w: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        logits = questions @ w
        p = sigmoid(logits)
        value = weights @ (np.logaddexp(0, logits) - answers * logits) + w @ w / (2 * prior**2)
        gradient = questions.T @ (weights * (p - answers)) + w / prior**2
        noise = (weights * p * (1 - p))[:, None]  # the variance of each answer
        return value, gradient, questions.T @ (noise * questions) + np.eye(len(w)) / prior**2

    return newton(loss, np.zeros(questions.shape[1]), 1e-6)[0]
