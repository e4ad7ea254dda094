"""The few names of types used everywhere."""

from typing import Any, TypeVar

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .arguments import checked_arguments


Scalar = Float[Array, ""]
Key = PRNGKeyArray

# A point: any PyTree of floating arrays, usually an `equinox.Module`.
P = TypeVar("P")


@checked_arguments
def names_of(enumeration: type[eqx.Enumeration], items: Any) -> np.ndarray:
    """The names of `items` of `enumeration` (an array of them, of any shape).

    Names are what may be stored: the numbers behind them change with the library.
    """
    # Equinox offers no public way to list the members.
    members: dict[str, Any] = enumeration._name_to_item  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(items, type(next(iter(members.values())))):
        raise ValueError(
            f"items must be members of {enumeration.__name__}, got "
            f"{type(items).__name__}"
        )
    numbers = np.array([int(member._value) for member in members.values()])
    order = np.argsort(numbers)
    names = np.array(list(members), dtype=object)[order]
    found = names[np.searchsorted(numbers[order], np.asarray(items._value))]
    return np.asarray(found, dtype=object)
