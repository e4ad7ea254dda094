"""Arguments of the wrong kind are refused in a sentence: by their annotations.

`checked_arguments` does that for a function, `checked_fields` for a class. Which values
are allowed is checked where it is known why. Loads no jax: reports and figures need
none.
"""

import collections.abc
import dataclasses
import functools
import inspect
import numbers
import operator
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np


F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
    Path: "a path",
    type(None): "None",
}


def checked_arguments(function: F) -> F:
    """The function, which refuses arguments that its annotations do not allow.

    **Raises:** `ValueError` that names the argument.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # Python says what is missing
        hints = _hints(function)
        for name, value in given.items():
            if name in hints:
                several = (
                    signature.parameters[name].kind == inspect.Parameter.VAR_POSITIONAL
                )
                for item in value if several else (value,):
                    check(name, item, hints[name])
        return function(*args, **kwargs)

    return typing.cast(F, call)


def checked_fields(module: C) -> C:
    """The `eqx.Module`, which refuses fields that its annotations do not allow, before
    its own `__check_init__` sees them.

    **Raises:** `ValueError` that names the field.
    """
    own = vars(module).get("__check_init__")

    def __check_init__(self):
        check_all_fields(self)
        if own is not None:
            own(self)

    module.__check_init__ = __check_init__
    return module


def check_all_fields(instance: Any) -> None:
    """Checks the fields of a dataclass by their annotations.

    **Raises:** `ValueError` that names the field.
    """
    hints = _hints(type(instance))
    for field in dataclasses.fields(instance):
        if field.init and field.name in hints and hasattr(instance, field.name):
            check(field.name, getattr(instance, field.name), hints[field.name])


def check(name: str, value: Any, hint: Any) -> None:
    """**Raises:** `ValueError` if the hint does not allow the value."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    # Of any length: tuple[int, ...], list[int].
    many = inner[1:] == (...,) or (len(inner) == 1 and origin in (list, Sequence))
    if many and fits(value, origin):
        for i, item in enumerate(value):
            check(f"{name}[{i}]", item, inner[0])
    elif not fits(value, hint):
        raise ValueError(f"{name} must be {_words(hint)}, got {_described(value)}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a type hint allows a value. NumPy's arrays stand for jax's, and whole
    numbers for real ones."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, (TypeVar, str)):
        return True
    if hint is None:
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, item) for item in inner)
    if origin is Literal:
        return any(type(value) is type(item) and value == item for item in inner)
    if _is_tree(hint):
        leaves = sys.modules["jax"].tree.leaves(value)
        return bool(leaves) and all(fits(leaf, hint.leaftype) for leaf in leaves)
    if _is_array(hint):
        return _fits_array(value, hint)
    if origin is collections.abc.Callable:
        return callable(value)
    if origin is type:
        return isinstance(value, type)
    kind = origin or hint
    if not isinstance(kind, type) or _is_enumeration(kind):
        return True
    if kind is float:
        return _is_number(value, numbers.Real)
    if kind is int:
        return _is_number(value, numbers.Integral)
    if kind is bool:
        return isinstance(value, (bool, np.bool_))
    if kind in (tuple, list, Sequence):
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            return False
        if not inner:
            return True
        if kind is tuple and inner[-1] is not ...:
            pairs = zip(value, inner, strict=False)
            return len(value) == len(inner) and all(fits(v, t) for v, t in pairs)
        return all(fits(item, inner[0]) for item in value)
    return isinstance(value, kind)


def check_range(
    name: str, value: Any, *, least: float = 0.0, open_end: bool = True
) -> None:
    """Refuses a number that is not finite, or not above `least` (`open_end`) or not at
    least that; `None` and what is traced pass.

    **Raises:** `ValueError`.
    """
    if value is None or _is_of_jax(value, "core.Tracer", "ShapeDtypeStruct"):
        return
    check(name, value, float)
    number = float(value)
    if not (number > least if open_end else number >= least):
        sign = ">" if open_end else ">="
        raise ValueError(f"{name} must be {sign} {least:g}, got {number}")
    if not np.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """**Raises:** `ValueError` for anything but a whole number of at least `least`;
    `None` passes."""
    if value is not None:
        check(name, value, int)
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")


def check_one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """**Raises:** `ValueError` for any other value."""
    if value not in allowed:
        listed = ", ".join(map(str, allowed))
        raise ValueError(f"{name}={value!r} must be one of {listed}")


def check_shape(name: str, array: Any, shape: tuple[int, ...]) -> None:
    """**Raises:** `ValueError` for another shape."""
    if np.shape(array) != shape:
        raise ValueError(f"{name} has shape {np.shape(array)}: it must be {shape}")


def check_sides(name: str, array: Any) -> None:
    """**Raises:** `ValueError` for an array without entries."""
    if 0 in np.shape(array):
        raise ValueError(f"{name} has shape {np.shape(array)}: give at least one entry")


def _is_number(value: Any, kind: type) -> bool:
    if isinstance(value, np.ndarray) or _is_of_jax(value, "Array"):
        letters = "iu" if kind is numbers.Integral else "iuf"
        return value.ndim == 0 and value.dtype.kind in letters
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_of_jax(value: Any, *names: str) -> bool:
    """Whether it is of these classes: where jax is not loaded nothing is."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(
        value, tuple(operator.attrgetter(name)(jax) for name in names)
    )


def _is_enumeration(kind: type) -> bool:
    equinox = sys.modules.get("equinox")
    return equinox is not None and issubclass(kind, equinox.Enumeration)


def _is_array(hint: Any) -> bool:
    return hasattr(hint, "dim_str") and hasattr(hint, "dtypes")


def _is_tree(hint: Any) -> bool:
    return hasattr(hint, "leaftype")


def _fits_array(value: Any, hint: Any) -> bool:
    if _is_of_jax(value, "Array"):
        # jaxtyping knows jax's arrays from numpy's.
        return isinstance(value, hint.dtype[sys.modules["jax"].Array, hint.dim_str])
    if isinstance(value, (np.ndarray, np.generic)):
        return isinstance(value, hint.dtype[type(value), hint.dim_str])
    if _is_of_jax(value, "ShapeDtypeStruct"):  # of a function that is not run
        return True
    single = hint.dim_str == "" and hint.dtype.__name__ in ("Float", "Int", "Num")
    return single and _is_number(value, numbers.Real)


@functools.cache
def _hints(thing: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(thing)
    except (NameError, TypeError):  # of names known to type checkers only
        return {}


def _words(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if any(_is_array(item) and "key" in str(item).lower() for item in inner):
            return "a key such as jax.random.key(0)"
        words = [_words(item) for item in inner]
        # "a number or an array of real numbers" says the same twice.
        return " or ".join(dict.fromkeys(words))
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if _is_tree(hint):
        return "a point made of real arrays"
    if _is_array(hint):
        kind = {"Bool": "truth values", "Int": "whole numbers"}
        of = kind.get(hint.dtype.__name__, "real numbers")
        axes = hint.dim_str.split()
        if not axes:
            return "one of the " + of if of == "truth values" else "a number"
        return f"an array of {of} with {len(axes)} ax{'e' if len(axes) > 1 else 'i'}s"
    if origin is collections.abc.Callable:
        return "a function"
    kind = origin or hint
    if kind in WORDS:
        return WORDS[kind]
    if kind in (tuple, list, Sequence):
        return f"a list, each item {_words(inner[0])}" if inner else "a list"
    if kind in (dict, Mapping):
        return "a dict"
    name = getattr(kind, "__name__", str(kind)).removeprefix("Abstract")
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray) or _is_of_jax(value, "Array"):
        return f"an array of {value.dtype} of shape {value.shape}"
    if value is None or isinstance(value, (str, int, float, complex)):
        text = repr(value)
        return text if len(text) < 60 else f"{text[:60]}..."
    if isinstance(value, (tuple, list)) and len(text := repr(value)) < 60:
        return " ".join(text.split())
    return type(value).__name__
