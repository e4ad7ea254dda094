"""Settings that every experiment has, checked once."""

import dataclasses
import math
import numbers
from typing import Any, ClassVar, Literal

import numpy as np
from cyclopts import Parameter

from ..precision import DTYPES
from ..solve import checked_tolerances


# Larger counts don't fit jax's 32-bit integers, larger seeds are cut to 32 bits there.
LARGEST_COUNT = 2**31 - 1
LARGEST_SEED = 2**32 - 1


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How the draws are run. Units stand beside each field.

    **Raises:** `ValueError` for any value out of range.
    """

    # Whether the experiment's last solver hovers where a run should come to rest.
    hovers: ClassVar[bool] = True

    draws: int = 256
    "Draws per row of the table."
    batch: int = 64
    "Draws run at once: bounds memory, changes no draw."
    seed: int = 0
    "Draw i of a row depends on the seed, the row and i only."
    tolerance: float = 1e-3
    "Stopping speed where no rule stops a run; the solver works at a thousandth."
    rtol: float | None = None
    "The solver's tolerance per step, relative to the size of the point."
    horizon: float = math.inf
    "Flow time at which a run is stopped."
    max_steps: int = 4096
    "Steps per solver before the next one takes over."
    dtype: Literal["float64", "float32", "mixed"] = "float64"
    "Arithmetic; mixed: runs in float32, verdicts in float64."
    device: Literal["cpu", "gpu", "tpu"] | None = None
    "Where to run; by default jax's own choice."

    def __post_init__(self):
        for name in ("draws", "batch", "max_steps"):
            whole_number(self, name, least=1, most=LARGEST_COUNT)
        whole_number(self, "seed", least=0, most=LARGEST_SEED)
        for name in ("tolerance", "horizon"):
            positive(self, name, infinite=name == "horizon")
        if self.rtol is not None:
            positive(self, "rtol")
        one_of(self, "dtype", DTYPES)
        if self.device is not None:
            one_of(self, "device", ("cpu", "gpu", "tpu"))
        # What `integrate` would refuse, before anything is computed.
        runs = np.dtype("float32" if self.dtype == "mixed" else self.dtype)
        checked_tolerances(self.tolerance, self.rtol, runs, hovers=self.hovers)


def whole_number(config: object, name: str, *, least: int, most: int) -> None:
    """Checks one field of a config, or each entry if its default is a tuple."""
    for value in _values(config, name):
        if not _is_a(numbers.Integral, value):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
        if not least <= value <= most:
            bound = f">= {least}" if value < least else f"<= {most}"
            raise ValueError(f"{name} must be {bound}, got {value}")


def positive(config: object, name: str, *, infinite: bool = False) -> None:
    """Checks one field of a config, or each entry if its default is a tuple."""
    for value in _values(config, name):
        if not _is_a(numbers.Real, value):
            raise ValueError(f"{name} must be a number > 0, got {value!r}")
        if not value > 0 or (math.isinf(value) and not infinite):
            finite = "" if infinite else "finite "
            raise ValueError(f"{name} must be a {finite}number > 0, got {value}")


def one_of(config: object, name: str, allowed: tuple[str, ...]) -> None:
    """Checks one field of a config."""
    value = getattr(config, name)
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(allowed)}")


def _is_a(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _values(config: object, name: str) -> tuple[Any, ...]:
    value = getattr(config, name)
    many = isinstance(value, (tuple, list))
    if many != isinstance(getattr(type(config), name), tuple):
        expected = "one value" if many else "a list of values"
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    if many and not value:
        raise ValueError(f"{name} is empty: give at least one value")
    return tuple(value) if many else (value,)
