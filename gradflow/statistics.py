"""What counted draws say of probabilities: exact intervals."""

from typing import Any

import equinox as eqx
import numpy as np


class Fraction(eqx.Module):
    """How often, of how many, and what that says.

    - `low`, `high`: the exact (Clopper-Pearson) 95 % interval of the probability.
    - `outer_low`, `outer_high`: its least lower and greatest upper end when the
      undecided draws, counted both ways, are allowed for.
    """

    count: int
    draws: int
    undecided: int
    low: float
    high: float
    outer_low: float
    outer_high: float

    @property
    def estimate(self) -> float:
        return self.count / self.draws

    def __str__(self) -> str:
        text = (
            f"{self.count} of {self.draws}, 95 % interval "
            f"[{self.low:.4f}, {self.high:.4f}]"
        )
        if self.undecided:
            text += (
                f", [{self.outer_low:.4f}, {self.outer_high:.4f}] with "
                f"{self.undecided} undecided"
            )
        return text


def fraction(flags: Any, undecided: Any = None) -> Fraction:
    """The `Fraction` of draws for which `flags` is true.

    `undecided` marks draws (not among the flags) whose answer is open; they stay in
    the denominator.

    **Raises:** `ValueError` for no draws, for anything but truth values, or for a
    draw that is both flagged and undecided.

    *Reference:* Clopper, Pearson (1934); `scipy.stats.binomtest`.
    """
    flags = _truths("flags", flags)
    unknown = (
        np.zeros_like(flags) if undecided is None else _truths("undecided", undecided)
    )
    if unknown.shape != flags.shape:
        raise ValueError(
            f"flags has {flags.size} draws and undecided {unknown.size}: both must "
            "be of the same draws"
        )
    if np.any(flags & unknown):
        raise ValueError("a draw is both in flags and undecided: it can only be one")
    count, left, draws = int(flags.sum()), int(unknown.sum()), flags.size
    low, high = clopper_pearson(count, draws)
    return Fraction(
        count,
        draws,
        left,
        low,
        high,
        low,
        clopper_pearson(count + left, draws)[1],
    )


def clopper_pearson(count: int, draws: int) -> tuple[float, float]:
    """The exact 95 % interval for the probability of `count` out of `draws`."""
    # Imported late: scipy.stats costs half a second.
    from scipy.stats import binomtest

    interval = binomtest(count, draws).proportion_ci(0.95, method="exact")
    return float(interval.low), float(interval.high)


def _truths(name, values):
    try:
        values = np.asarray(values)
    except ValueError:  # ragged
        values = np.asarray(values, dtype=object)
    if values.dtype != bool or values.ndim != 1 or values.size == 0:
        raise ValueError(
            f"{name} must be a list of at least one truth value, one per draw, got "
            f"{values.dtype} of shape {values.shape}"
        )
    return values
