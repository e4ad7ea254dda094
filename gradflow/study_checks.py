"""Do the parts of a study fit, and is each draw what its key and number make it?"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from .arguments import checked_arguments
from .checks import Certificate, check_descent, check_initializer, Checking
from .precision import converted, precision
from .solution import RESULTS, Solution
from .store.arrays import arrays_of, is_member
from .store.folder import Store
from .study import run_study, Study
from .types import Key


# Of what is computed in another order, relative.
ORDER = 1e-6
# Draws of the small studies that are compared, and the size of their batches.
FEW, MORE, BATCH = 3, 5, 2


@checked_arguments
def check_inspection(
    inspect: Callable[[Solution], Any],
    descend: Callable[[Any], Solution],
    initialize: Callable[[Key], Any],
    key: Key,
) -> Certificate:
    """Certifies an inspection on a few runs: its finding is numbers and truth values,
    of the same shapes for each run, depends on the solution only, and is the same when
    compiled and in a batch."""
    with precision("float64"):
        inspect, descend, initialize = (
            converted(f, "float64") for f in (inspect, descend, initialize)
        )
        checking = Checking(inspect)
        found: list[Any] = []

        def runs():
            run = lambda i: descend(initialize(jr.fold_in(key, i)))
            found.append(eqx.filter_jit(jax.vmap(run))(jnp.arange(FEW)))
            return 0.0

        if not checking.add(
            *("there are runs to inspect", runs, 0.0), "see gf.check_descent"
        ):
            return checking.certificate()
        row = lambda i: jax.tree.map(lambda leaf: leaf[i], found[0])
        findings: list[dict[str, np.ndarray]] = []

        def numbers():
            findings.extend(_numbers(inspect(row(i))) for i in range(FEW))
            return 0.0

        if not checking.add(
            *("a finding is numbers and truth values", numbers, 0.0),
            "return arrays, or a dict or eqx.Module of arrays",
        ):
            return checking.certificate()
        if not checking.add(
            "each finding has the same shapes",
            lambda: _same_shapes(findings),
            0.0,
            "count or mask instead of picking, e.g. jnp.where(flags, values, 0)",
        ):
            return checking.certificate()
        checking.add(
            "one solution has one finding",
            lambda: apart(findings[0], _numbers(inspect(row(0)))),
            0.0,
            "it must not draw random numbers or remember earlier runs",
        )

        def batch():
            # As a study does it: compiled, one after the other.
            inspected = eqx.filter_jit(lambda many: jax.lax.map(inspect, many))
            together = _numbers(inspected(found[0]))
            return max(
                apart(one, {k: np.asarray(leaf[i]) for k, leaf in together.items()})
                for i, one in enumerate(findings)
            )

        checking.add(
            "a batch has the findings of its solutions",
            batch,
            ORDER,
            "it must work under jax.jit: no Python ifs on numbers, no float()",
        )
        return checking.certificate()


@checked_arguments
def check_study(study: Study, key: Key) -> Certificate:
    """Certifies a study with a few draws: its parts fit, each is sound by itself (see
    `check_initializer`, `check_descent`, `check_inspection`), draw i depends on the
    key and i only, and a store gives back what it was given. What is checked later
    needs what is checked earlier."""
    checking = Checking(study)
    if not checking.add(
        *("its parts fit", lambda: _fits(study, key), 0.0), "mend that part"
    ):
        return checking.certificate()
    parts = {
        "initialize": check_initializer(study.initialize, key),
        "descend": check_descent(study.descend, study.initialize, key),
        "inspect": check_inspection(
            study.inspect, study.descend, study.initialize, key
        ),
    }
    for name, certificate in parts.items():
        for check in certificate.checks:
            identity = f"{name} ({certificate.of}), {check.identity}"
            checking.keep(dataclasses.replace(check, identity=identity))
    if not checking.certificate().sound:
        return checking.certificate()
    drawn: list[dict[str, np.ndarray]] = []

    def draws(count: int, batch: int, store: Store | None = None):
        few = dataclasses.replace(study, draws=count, batch=batch)
        outcome = run_study(few, key, progress=False, store=store)
        leaves = jax.tree.leaves((outcome.solution, outcome.finding))
        return {str(place): leaf for place, leaf in enumerate(leaves)}

    def company():
        drawn.append(draws(MORE, BATCH))
        first = {name: leaf[:FEW] for name, leaf in drawn[0].items()}
        return max(apart(first, draws(FEW, BATCH)), apart(drawn[0], draws(MORE, MORE)))

    if checking.add(
        *("draw i depends on the key and i only", company, ORDER),
        "nothing may depend on how many draws there are, on the batch, or on what was "
        "computed before",
    ):
        checking.add(
            "a store gives back its draws",
            lambda: apart(drawn[0], _stored(lambda store: draws(MORE, BATCH, store))),
            0.0,
            "use arrays of usual types",
        )
    return checking.certificate()


def check_fit(study: Study, key: Key) -> None:
    """Checks that the parts of a study fit each other, by their shapes: nothing is
    computed. To be called within `precision`.

    **Raises:** `ValueError` that names the part.
    """
    point = _shapes("initialize", study.initialize, key)
    if not jax.tree.leaves(point):
        raise ValueError("initialize gives no arrays")
    solution = _shapes("descend", study.descend, point)
    if not isinstance(solution, Solution):
        raise ValueError(
            f"descend gives {type(solution).__name__}, not a gradflow.Solution"
        )
    result = solution.result
    if not is_member(result) or result._enumeration is not RESULTS:
        raise ValueError(
            "the result of descend must be a member of gradflow.RESULTS, got "
            f"{type(result).__name__}"
        )
    finding = _shapes("inspect", study.inspect, solution)
    leaves = jax.tree_util.tree_leaves_with_path(finding)
    if not leaves:
        raise ValueError("inspect gives no arrays")
    names = set()
    for path, leaf in leaves:
        # As a store names them.
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in names:
            raise ValueError(f"inspect gives two arrays that are both named {name}")
        names.add(name)
        if not _is_number(leaf):
            raise ValueError(
                f"inspect gives an array of {leaf.dtype}: take real numbers or truth "
                "values"
            )


def apart(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """The largest difference of arrays of the same names, relative to the largest
    number; infinite where shapes, words, whole numbers, or which are finite differ."""
    if one.keys() != other.keys():
        return np.inf
    largest = scale = 0.0
    for name, array in one.items():
        there = other[name]
        if (array.shape, array.dtype.kind) != (there.shape, there.dtype.kind):
            return np.inf
        if array.dtype.kind != "f":
            if not np.array_equal(array, there):
                return np.inf
            continue
        finite = np.isfinite(array)
        if not np.array_equal(array[~finite], there[~finite], equal_nan=True):
            return np.inf
        if finite.any():
            gap = np.abs(array[finite] - there[finite])
            # NaN there makes the difference NaN, which is no agreement.
            largest = max(float(np.max(gap)), largest, key=_nan_last)
            scale = max(float(np.max(np.abs(array[finite]))), scale)
    return largest / (scale or 1.0)


def _nan_last(number: float) -> float:
    return np.inf if np.isnan(number) else number


def _fits(study: Study, key: Key) -> float:
    with precision("float64"):
        check_fit(converted(study, "float64"), key)
    return 0.0


def _shapes(part: str, function: Callable[[Any], Any], given: Any) -> Any:
    try:
        return jax.eval_shape(function, given)
    except Exception as error:
        text = " ".join(str(error).split()) or "no message"
        raise ValueError(
            f"{part} raised {type(error).__name__}: {text[:200]}"
        ) from error


def _is_number(leaf: Any) -> bool:
    kinds = (jnp.bool_, jnp.integer, jnp.floating)
    return any(jnp.issubdtype(leaf.dtype, kind) for kind in kinds)


def _numbers(finding: Any) -> dict[str, np.ndarray]:
    """The arrays of a finding by their paths.

    **Raises:** `TypeError` for anything else in it.
    """
    leaves, _ = jax.tree.flatten(finding)
    if not leaves:
        raise TypeError("it has no arrays")
    for leaf in leaves:
        if not eqx.is_array_like(leaf):
            raise TypeError(f"it has a {type(leaf).__name__}")
        if not _is_number(jnp.asarray(leaf)):
            raise TypeError(f"it has an array of {jnp.asarray(leaf).dtype}")
    return arrays_of(None, jax.tree.map(jnp.asarray, finding))


def _same_shapes(findings: list[dict[str, np.ndarray]]) -> float:
    first, *others = findings
    for draw, other in enumerate(others, start=1):
        if first.keys() != other.keys():
            name = min(first.keys() ^ other.keys())
            raise ValueError(f"only some runs have {name}")
        for name, array in first.items():
            if array.shape != other[name].shape:
                raise ValueError(
                    f"{name} is of shape {array.shape} for draw 0 and of shape "
                    f"{other[name].shape} for draw {draw}"
                )
    return 0.0


def _stored(draws: Callable[[Store], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder, Store(folder) as store:
        return draws(store)
