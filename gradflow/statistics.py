"""What counted draws say of probabilities: exact intervals, and comparisons.

Two kinds of interval. That of Clopper and Pearson is for a number of draws that was
chosen beforehand. A confidence sequence holds at all numbers of draws at once, so that
one may look after every draw and stop when one likes; it is wider. Undecided draws are
counted both ways: the outer interval is that of whatever they are.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import equinox as eqx
import numpy as np

from .arguments import checked_arguments


LEVEL = 0.95


class Fraction(eqx.Module):
    """How often, of how many, and what that says.

    - `low`, `high`: the exact 95 % interval of the probability: of Clopper and Pearson,
      or `sequential`, of a confidence sequence.
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
    sequential: bool = False

    @property
    def estimate(self) -> float:
        return self.count / self.draws

    def __str__(self) -> str:
        places = self._places()
        interval = lambda low, high: f"[{low:.{places}f}, {high:.{places}f}]"
        text = (
            f"{self.count} of {self.draws}, 95 % interval "
            f"{interval(self.low, self.high)}"
        )
        if self.undecided:
            outer = interval(self.outer_low, self.outer_high)
            text += f", {outer} with {self.undecided} undecided"
        return text

    def _places(self) -> int:
        """Digits of limits: of many draws they come so near 1 that four say 1."""
        return max(4, len(str(self.draws)))

    def in_words(self, what: str) -> str:
        """A sentence on how likely `what` is; where none (or all) of the draws were, a
        limit from one side."""
        most = self.count + self.undecided
        if most == 0 or self.count == self.draws:
            limit = self.outer_high if most == 0 else self.outer_low
            if not self.sequential:
                # All of the 5 % on one side.
                limit = zero_limit(self.draws)
                limit = limit if most == 0 else 1 - limit
            none, side = ("none", "<=") if most == 0 else ("each", ">=")
            digits = 4 if most == 0 else self._places()
            return (
                f"{none} of {self.draws} draws: {what} has probability {side} "
                f"{limit:.{digits}g} with 95 % confidence"
            )
        text = (
            f"{self.count} of {self.draws} draws: {what} has probability "
            f"{self.outer_low:.4g} to {self.outer_high:.4g} with 95 % confidence"
        )
        if self.undecided:
            text += f", whatever the {self.undecided} undecided draws are"
        return text


@checked_arguments
def fraction(
    flags: Any, undecided: Any = None, *, sequential: bool = False
) -> Fraction:
    """The `Fraction` of draws for which `flags` is true.

    `undecided` marks draws (not among the flags) whose answer is open; they stay in
    the denominator. `sequential`: the number of draws was not chosen beforehand.

    **Raises:** `ValueError` for no draws, for anything but truth values, or for a
    draw that is both flagged and undecided.

    *Reference:* Clopper, Pearson (1934); `scipy.stats.binomtest`; for `sequential` see
    `confidence_sequence`.
    """
    flags, unknown = _flags("flags", flags, undecided)
    return counted(
        int(flags.sum()), flags.size, int(unknown.sum()), sequential=sequential
    )


def counted(
    count: int, draws: int, undecided: int = 0, *, sequential: bool = False
) -> Fraction:
    """The `Fraction` of counts."""
    interval = confidence_sequence if sequential else clopper_pearson
    low, high = interval(count, draws)
    outer = interval(count + undecided, draws)[1] if undecided else high
    return Fraction(count, draws, undecided, low, high, low, outer, sequential)


def clopper_pearson(
    count: int, draws: int, level: float = LEVEL
) -> tuple[float, float]:
    """The exact interval for the probability of `count` out of `draws`.

    **Raises:** `ValueError` for a count that is not in 0 to draws.
    """
    from scipy.special import betaincinv

    if not 0 <= count <= draws or draws < 1:
        raise ValueError(f"count={count} must be in 0 to draws={draws}, draws >= 1")
    tail, misses = (1 - level) / 2, draws - count
    low = 0.0 if count == 0 else betaincinv(count, misses + 1, tail)
    # By its complement, for ends near 1 too.
    high = 1.0 if misses == 0 else 1 - betaincinv(misses, count + 1, tail)
    return float(low), float(high)


def zero_limit(draws: int, level: float = LEVEL) -> float:
    """The largest probability of which none in so many draws is no surprise: about
    3 / draws."""
    return -math.expm1(math.log1p(-level) / draws)


def confidence_sequence(
    count: int, draws: int, level: float = LEVEL
) -> tuple[float, float]:
    r"""An interval that holds at all numbers of draws at once.

    With probability `level` the true p is in the intervals after 1, 2, 3, ... draws, in
    all of them; so it is in the last one by whatever rule one stopped. It is the set of
    p with $B(s + 1/2, n - s + 1/2) / B(1/2, 1/2) < p^s (1 - p)^{n-s} / \alpha$: the
    ratio of the two sides is a martingale of mean 1 under p, and exceeds $1/\alpha$
    ever with probability $\alpha$ at most.

    *Reference:* Ville (1939); Robbins (1970); the mixture is that of Krichevsky and
    Trofimov (1981).
    """
    from scipy.optimize import brentq
    from scipy.special import betaln, xlog1py, xlogy

    if not 0 <= count <= draws or draws < 1:
        raise ValueError(f"count={count} must be in 0 to draws={draws}, draws >= 1")
    hits, misses = count, draws - count
    least = betaln(hits + 0.5, misses + 0.5) - betaln(0.5, 0.5) + math.log1p(-level)

    def above(p):
        return float(xlogy(hits, p) + xlog1py(misses, -p) - least)

    # Concave, and positive at its maximum: one root on each side.
    at = count / draws
    solve = partial(cast(Any, brentq), above, xtol=1e-15)
    low = 0.0 if count == 0 else solve(0.0, at)
    high = 1.0 if count == draws else solve(at, 1.0)
    return low, high


class Paired(eqx.Module):
    """Two settings on the same draws.

    - `only_first`, `only_second`: the draws flagged under one setting only; what is
      flagged under both, or neither, says nothing of a difference.
    - `p_value`: how surprising the two counts are if the settings flag alike (exact
      McNemar test: a fair coin for each draw that differs). `outer_p_value`: the
      largest for any answers of undecided draws.
    - `low`, `high`: an interval of at least 95 % for the difference of the two
      probabilities, first minus second, whatever the undecided draws are.
    """

    both: int
    only_first: int
    only_second: int
    neither: int
    undecided: int
    p_value: float
    outer_p_value: float
    low: float
    high: float

    @property
    def draws(self) -> int:
        seen = self.both + self.only_first + self.only_second + self.neither
        return seen + self.undecided

    def __str__(self) -> str:
        text = (
            f"of {self.draws} draws {self.only_first} only the first way, "
            f"{self.only_second} only the second: difference "
            f"[{self.low:.4f}, {self.high:.4f}], p = {self.p_value:.3g}"
        )
        if self.undecided:
            text += (
                f", at most {self.outer_p_value:.3g} for any answer of "
                f"{self.undecided} undecided"
            )
        return text


def paired(
    first: Any,
    second: Any,
    undecided_first: Any = None,
    undecided_second: Any = None,
) -> Paired:
    """Compares two settings on the same draws: flags of the i-th draw side by side.

    **Raises:** `ValueError` for flags that are not of the same draws, and as
    `fraction`.

    *Reference:* McNemar (1947), in its exact form.
    """
    one, open_one = _flags("first", first, undecided_first, "undecided_first")
    other, open_other = _flags("second", second, undecided_second, "undecided_second")
    if one.size != other.size:
        raise ValueError(
            f"first has {one.size} draws and second {other.size}: both must be of the "
            "same draws"
        )
    known = ~open_one & ~open_other
    a = int((known & one & ~other).sum())
    b = int((known & ~one & other).sum())
    # What an undecided draw may turn out to be.
    may_a = int((~known & (one | open_one) & (~other)).sum())
    may_b = int((~known & (other | open_other) & (~one)).sum())
    half = 1 - (1 - LEVEL) / 2
    low_a, high_a = (clopper_pearson(n, one.size, half) for n in (a, a + may_a))
    low_b, high_b = (clopper_pearson(n, one.size, half) for n in (b, b + may_b))
    return Paired(
        both=int((known & one & other).sum()),
        only_first=a,
        only_second=b,
        neither=int((known & ~one & ~other).sum()),
        undecided=int((~known).sum()),
        p_value=_coin(a, b),
        outer_p_value=_largest_p(a, b, may_a, may_b),
        # Each discordant probability at 97.5 %, so both at 95 %.
        low=low_a[0] - high_b[1],
        high=high_a[1] - low_b[0],
    )


def _coin(heads: int, tails: int) -> float:
    from scipy.stats import binomtest

    if heads + tails == 0:
        return 1.0
    return float(binomtest(heads, heads + tails).pvalue)


def _largest_p(a: int, b: int, may_a: int, may_b: int) -> float:
    """The largest p-value of a in [a, a + may_a], b in [b, b + may_b]: where they are
    as equal as can be."""
    if a > b:
        return _coin(a, min(a, b + may_b))
    return _coin(min(b, a + may_a), b)


@checked_arguments
def strata(
    labels: Sequence[Any] | np.ndarray, flags: Any, undecided: Any = None
) -> dict[Any, Any]:
    """The `Fraction` within each stratum: draws of equal label, such as the rank or the
    sign of the start. Each interval is of 95 % by itself.

    **Raises:** `ValueError` for labels that are not one per draw, and as `fraction`.
    """
    marks, unknown = _flags("flags", flags, undecided)
    if len(labels) != marks.size:
        raise ValueError(
            f"labels has {len(labels)} entries for {marks.size} draws: give one for "
            "each"
        )
    groups: dict[Any, list[int]] = {}
    for draw, label in enumerate(labels):
        label = label.item() if isinstance(label, np.generic) else label
        groups.setdefault(label, []).append(draw)
    return {
        label: fraction(marks[groups[label]], unknown[groups[label]])
        for label in sorted(groups, key=lambda label: (str(type(label)), label))
    }


def _flags(
    name: str, flags: Any, undecided: Any, other: str = "undecided"
) -> tuple[np.ndarray, np.ndarray]:
    flags = _truths(name, flags)
    unknown = np.zeros_like(flags) if undecided is None else _truths(other, undecided)
    if unknown.shape != flags.shape:
        raise ValueError(
            f"{name} has {flags.size} draws and undecided {unknown.size}: both must "
            "be of the same draws"
        )
    if np.any(flags & unknown):
        raise ValueError(f"a draw is both in {name} and undecided: it can only be one")
    return flags, unknown


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
