"""Where an explicit method crawls: its step beside the field's fastest mode."""

from typing import Any, cast

import diffrax
import numpy as np


# Tsit5 is stable to h * rho = 3.5 along the negative axis; at its limit the control of
# steps holds it around 3, and where accuracy is the limit it is mostly below 2.
CRAWLING = 2.5
# Explicit steps at the limit that are borne before a stabilised method takes over.
# Beginning anew costs it some, and most short plateaus are over by then.
PATIENCE = 20
# And the share of all steps that they are: a run that crawls now and then, at one
# plateau after the other, is done sooner as it is.
MOSTLY = 0.6


def ahead(solver: diffrax.AbstractSolver) -> np.ndarray:
    r"""Factors of the slopes in the distance between the last two stages, both of which
    are at the step's end (as those of Tsit5).

    With $h\rho \approx |h (f(Y_s) - f(Y_{s-1}))| / |Y_s - Y_{s-1}|$ the step is seen in
    units of the field's fastest mode.

    *Reference:* Hairer, Wanner, *Solving ODEs II*, IV.2.
    """
    *_, before, last = cast(Any, solver).tableau.a_lower
    factors = np.zeros(len(last) + 1)
    factors[: len(last)] = last
    factors[: len(before)] -= before
    return factors
