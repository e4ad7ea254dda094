"""Solutions and findings as named arrays, and what a study is made of as text."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from ..solution import RESULTS
from ..types import Key, names_of


# The class of the members of all enumerations, which equinox does not export.
MEMBER = type(RESULTS.rule_met)


def arrays_of(solution: Any, finding: Any) -> dict[str, np.ndarray]:
    """Each leaf by its path, such as solution.stats.steps. Members of enumerations
    become their names: the numbers behind them change with the library."""
    leaves, _ = _flattened({"solution": solution, "finding": finding})
    arrays = {}
    for name, leaf in leaves.items():
        arrays[name] = _names(leaf) if is_member(leaf) else np.asarray(leaf)
    return arrays


def _names(members: Any) -> np.ndarray:
    """Their names, as wide as the longest of them."""
    # Few differ, and to make text of many Python strings is slow.
    different, places = np.unique(members._value, return_inverse=True)
    few = eqx.tree_at(lambda item: item._value, members, different)
    names = names_of(members._enumeration, few).astype("S")
    return np.asarray(names[places]).reshape(np.shape(members._value))


def outcome_from(like: Any, arrays: dict[str, np.ndarray]) -> tuple[Any, Any]:
    """The solution and the finding of such arrays. `like`: a pair of the same structure
    (of anything).

    **Raises:** `ValueError` if an array or a name of an enumeration is not known.
    """
    solution, finding = like
    leaves, structure = _flattened({"solution": solution, "finding": finding})
    unknown = leaves.keys() - arrays.keys()
    if unknown:
        raise ValueError(
            f"the stored draws have no {min(unknown)}: they were made by another "
            "gradflow or another study; use a new folder"
        )
    filled = []
    for name, leaf in leaves.items():
        array = arrays[name]
        if is_member(leaf):
            array = _members(name, leaf._enumeration, array)
            array = eqx.tree_at(lambda item: item._value, leaf, array)
        filled.append(array)
    tree = jax.tree.unflatten(structure, filled)
    return tree["solution"], tree["finding"]


def _members(name: str, enumeration: Any, names: np.ndarray) -> np.ndarray:
    known = {key.encode(): item._value for key, item in _items(enumeration).items()}
    different, places = np.unique(names, return_inverse=True)
    for stored in different:
        if stored not in known:
            raise ValueError(
                f"the stored draws have {name}={bytes(stored).decode()}, which this "
                "gradflow does not know: use that which made them"
            )
    values = np.array([known[stored] for stored in different], dtype=np.int32)
    return values[places].reshape(names.shape)


def _items(enumeration: Any) -> dict[str, Any]:
    # Equinox offers no public way to list the members.
    return enumeration._name_to_item


def is_member(leaf: Any) -> bool:
    """Whether it is one member of an enumeration, or many of one."""
    return isinstance(leaf, MEMBER)


def _flattened(tree: Any) -> tuple[dict[str, Any], Any]:
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_member)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in pairs
    }
    return named, structure


def fingerprint(study: Any, key: Key) -> dict[str, Any]:
    """What a study is made of, as far as it can be told: its key, its code as lines of
    text, and a summary of each of its arrays."""
    names = ("initialize", "descend", "inspect")
    parts = {name: getattr(study, name) for name in names}
    leaves, _ = _flattened(eqx.filter(parts, eqx.is_array_like))
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return {
        "key": np.asarray(jr.key_data(key) if typed else key),
        # Without addresses, which are others in the next process.
        "code": re.sub(r" at 0x[0-9a-f]+", "", eqx.tree_pformat(parts)).splitlines(),
        "batch": study.batch,
        "arrays": {name: summary(leaf) for name, leaf in leaves.items()},
    }


def summary(leaf: Any) -> dict[str, Any]:
    """An array's type and shape, its norm, and its product with a fixed vector."""
    array = np.asarray(leaf._value if is_member(leaf) else leaf)
    if array.dtype.kind not in "biuf":
        return {"of": str(array.dtype), "shape": array.shape, "norm": 0.0} | {
            "direction": 0.0
        }
    flat = array.astype(np.float64).ravel()
    return {
        "of": str(array.dtype),
        "shape": array.shape,
        "norm": float(np.linalg.norm(flat)),
        "direction": float(flat @ np.cos(np.arange(flat.size))),
    }
