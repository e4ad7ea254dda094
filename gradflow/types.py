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
    if not isinstance(items, type(next(iter(enumeration._name_to_item.values())))):
        raise ValueError(
            f"items must be members of {enumeration.__name__}, got "
            f"{type(items).__name__}"
        )
    members = enumeration._name_to_item  # pyright: ignore[reportAttributeAccessIssue]
    matches = {name: np.asarray(items == member) for name, member in members.items()}
    names = np.full(next(iter(matches.values())).shape, "", dtype=object)
    for name, mask in matches.items():
        names[mask] = name
    return names
