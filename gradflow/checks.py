"""Is what you bring what a study takes it for? Identities, measured, and in words."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PyTree

from .arguments import checked_arguments
from .manifolds.base import AbstractManifold
from .models.base import AbstractEnergy
from .precision import converted, precision
from .solution import Solution
from .types import Key


# Of central differences in float64, relative to the length of the derivative.
SLOPE = 1e-6
# Of what is equal but for rounding, relative.
ROUNDING = 1e-9
DIRECTIONS = 3
Point = PyTree[Float[Array, "..."]]


class Check(eqx.Module):
    """One identity: what must hold, by how much it fails (relative), and how much of
    that is rounding."""

    identity: str
    error: float
    limit: float
    advice: str

    @property
    def holds(self) -> bool:
        return self.error <= self.limit  # NaN does not

    def __str__(self) -> str:
        if self.holds:
            return f"{self.identity}: yes, to {self.error:.1e}"
        size = "" if np.isinf(self.error) else f", it is off by {self.error:.1e}"
        return f"{self.identity}: no{size} (allowed {self.limit:.0e}); {self.advice}"


class Certificate(eqx.Module):
    """The checks of one object. `sound`: all hold. As text, a line each."""

    of: str
    checks: tuple[Check, ...]

    @property
    def sound(self) -> bool:
        return all(check.holds for check in self.checks)

    def require(self) -> None:
        """**Raises:** `ValueError` with the first identity that fails."""
        for check in self.checks:
            if not check.holds:
                raise ValueError(f"{self.of}: {check}")

    def __str__(self) -> str:
        return "\n".join(f"{self.of}: {check}" for check in self.checks)


class Checking:
    """Collects checks; what raises is a check that fails."""

    def __init__(self, of: Any):
        self._name = type(of).__name__ if isinstance(of, eqx.Module) else _name(of)
        self._checks: list[Check] = []

    def add(
        self, identity: str, measure: Callable[[], Any], limit: float, advice: str
    ) -> bool:
        """Whether it holds."""
        try:
            error = float(measure())
        except Exception as raised:
            text = " ".join(str(raised).split()) or "no message"
            error, advice = np.inf, f"it raised {type(raised).__name__}: {text[:200]}"
        self._checks.append(Check(identity, error, limit, advice))
        return self._checks[-1].holds

    def keep(self, check: Check) -> None:
        """Adds a check that was made elsewhere."""
        self._checks.append(check)

    def certificate(self) -> Certificate:
        return Certificate(self._name, tuple(self._checks))


@checked_arguments
def check_energy(energy: AbstractEnergy, point: Point, key: Key) -> Certificate:
    """Certifies an energy at a point: a finite number, the same each time and when
    compiled, whose `differential` is its derivative."""
    with precision("float64"):
        energy, point = converted(energy, "float64"), converted(point, "float64")
        flat, restore = jax.flatten_util.ravel_pytree(point)
        value = lambda at: energy(restore(at))
        checking = Checking(energy)

        def finite():
            found = np.asarray(value(flat))
            if found.shape != () or found.dtype.kind != "f":
                raise ValueError(
                    f"it gives {found.dtype} of shape {found.shape}, not one number"
                )
            return 0.0 if np.isfinite(found) else np.nan

        if not checking.add(
            *("E is one finite number", finite, 0.0),
            "start where it is finite, or mend the formula",
        ):
            return checking.certificate()
        checking.add(
            "E is a function of the point only",
            lambda: _apart(value(flat), eqx.filter_jit(value)(flat), value(flat)),
            ROUNDING,
            "it must not draw random numbers or change what it is made of",
        )
        checking.add(
            "differential is the derivative of E",
            lambda: _slope_error(energy, value, restore, flat, key),
            SLOPE,
            "leave differential to automatic differentiation, and look for "
            "stop_gradient, rounding or steps in the formula",
        )
        return checking.certificate()


@checked_arguments
def check_manifold(
    manifold: AbstractManifold, energy: AbstractEnergy, point: Point, key: Key
) -> Certificate:
    """Certifies a manifold at one of its points, with any energy on it: a chart that
    stays on it, a metric, and the gradient that belongs to that metric."""
    with precision("float64"):
        manifold, energy = converted(manifold, "float64"), converted(energy, "float64")
        point = converted(point, "float64")
        ravel = lambda tree: jax.flatten_util.ravel_pytree(tree)[0]
        size = 1 + float(jnp.linalg.norm(ravel(point)))
        checking = Checking(manifold)
        checking.add(
            "the point is on the manifold",
            lambda: manifold.defect(point) / size,
            ROUNDING,
            "give another point, or mend defect",
        )

        def origin():
            chart, dimension = manifold.chart(point)
            return _apart(ravel(point), ravel(chart(jnp.zeros(dimension))))

        if not checking.add(
            *("chart takes 0 to the point", origin, ROUNDING), "mend chart"
        ):
            return checking.certificate()
        chart, dimension = manifold.chart(point)
        keys = jr.split(key, 4)
        steps = [jr.normal(k, (dimension,)) / dimension**0.5 for k in keys]
        checking.add(
            "chart stays on the manifold",
            lambda: max(manifold.defect(chart(0.1 * step)) for step in steps) / size,
            ROUNDING,
            "mend chart, or defect",
        )
        zero = jnp.zeros(dimension)
        tangents = [jax.jvp(chart, (zero,), (step,))[1] for step in steps]
        inner = lambda u, v: float(manifold.inner(point, u, v))
        lengths = lambda: [inner(u, u) for u in tangents]
        checking.add(
            "the metric is positive",
            lambda: 0.0 if min(lengths()) > 0 else np.inf,
            0.0,
            "inner(point, u, u) must be > 0 for tangents u that are not 0",
        )
        checking.add(
            "the metric is symmetric",
            lambda: max(
                abs(inner(u, v) - inner(v, u)) / max(lengths())
                for u in tangents
                for v in tangents
            ),
            ROUNDING,
            "inner(point, u, v) must be inner(point, v, u)",
        )

        def riesz():
            differential = energy.differential(point)
            gradient = manifold.gradient(point, differential)
            size = inner(gradient, gradient) ** 0.5
            errors = [
                abs(inner(gradient, v) - float(ravel(differential) @ ravel(v)))
                / (size * inner(v, v) ** 0.5)
                for v in tangents
            ]
            return max(errors)

        checking.add(
            "g(gradient, v) is dE(v) for tangents v",
            riesz,
            ROUNDING,
            "gradient must raise the index by the metric that inner is",
        )
        return checking.certificate()


@checked_arguments
def check_initializer(initialize: Callable[[Key], Any], key: Key) -> Certificate:
    """Certifies a start: finite floating arrays that depend on the key, and on nothing
    else, and are the same in a batch."""
    with precision("float64"):
        initialize = converted(initialize, "float64")
        keys = [jr.fold_in(key, draw) for draw in range(3)]
        one = lambda key: _finite_leaves(initialize(key))
        checking = Checking(initialize)
        if not checking.add(
            "a point is finite floating arrays",
            lambda: one(keys[0]) and 0.0,
            0.0,
            "return arrays of floating numbers",
        ):
            return checking.certificate()
        checking.add(
            "one key gives one point",
            lambda: _apart(one(keys[0]), one(keys[0])),
            0.0,
            "take all randomness from the key",
        )
        checking.add(
            "another key gives another point",
            lambda: 0.0 if _apart(one(keys[0]), one(keys[1])) > 0 else np.inf,
            0.0,
            "use the key; a study of one start needs one draw",
        )
        checking.add(
            "a batch has the points of its keys",
            lambda: _apart_in_batch(initialize, jnp.stack(keys)),
            ROUNDING,
            "it must work under jax.vmap",
        )
        return checking.certificate()


@checked_arguments
def check_descent(
    descend: Callable[[Any], Solution],
    initialize: Callable[[Key], Any],
    key: Key,
    energy: AbstractEnergy | None = None,
) -> Certificate:
    """Certifies a descent from a few starts: it returns a `Solution`, which depends on
    the start only and is the same in a batch; with `energy`, that it says the energy
    of its end and does not climb."""
    with precision("float64"):
        descend, initialize = (converted(f, "float64") for f in (descend, initialize))
        energy = converted(energy, "float64")
        points = jax.vmap(lambda i: initialize(jr.fold_in(key, i)))(jnp.arange(3))
        first = jax.tree.map(lambda leaf: leaf[0], points)
        checking = Checking(descend)
        found: list[Solution] = []

        def returns():
            solution = descend(first)
            if not isinstance(solution, Solution):
                raise TypeError(f"it gives {type(solution).__name__}, not a Solution")
            given, end = (jax.tree.structure(p) for p in (first, solution.point))
            if given != end:
                raise TypeError("its point is not of the structure of the start")
            found.append(solution)
            return 0.0

        if not checking.add(
            *("it returns a Solution", returns, 0.0), "return gf.Solution(...)"
        ):
            return checking.certificate()
        again = lambda: descend(first)
        checking.add(
            "one start has one end",
            lambda: _apart(found[0].point, again().point),
            0.0,
            "it must not draw random numbers or remember earlier runs",
        )
        checking.add(
            "a batch has the ends of its starts",
            lambda: _apart_in_batch(lambda start: descend(start).point, points),
            1e-6,
            "it must work under jax.vmap: no Python ifs on numbers",
        )
        if energy is not None:
            start, end = (energy(p) for p in (first, found[0].point))
            checking.add(
                "Solution.energy is the energy of its point",
                lambda: _apart(end, found[0].energy),
                ROUNDING,
                "return the energy at the end",
            )
            checking.add(
                "the energy did not rise",
                lambda: max(0.0, float((end - start) / (1 + abs(start)))),
                ROUNDING,
                "smaller steps",
            )
        return checking.certificate()


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _finite_leaves(point: Any) -> list[np.ndarray]:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(point)]
    if not leaves:
        raise TypeError("it has no arrays")
    for leaf in leaves:
        if leaf.dtype.kind != "f":
            raise TypeError(f"it has an array of {leaf.dtype}")
        if not np.all(np.isfinite(leaf)):
            raise ValueError("it has numbers that are not finite")
    return leaves


def _apart(*trees: Any) -> float:
    """The largest difference from the first, relative to its size."""
    first, *others = [
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in trees
    ]
    scale = float(np.max(np.abs(first))) or 1.0
    return max(float(np.max(np.abs(first - other))) for other in others) / scale


def _apart_in_batch(function: Callable[[Any], Any], inputs: Any) -> float:
    batch = jax.vmap(function)(inputs)
    count = jax.tree.leaves(batch)[0].shape[0]
    row = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)
    return max(_apart(function(row(inputs, i)), row(batch, i)) for i in range(count))


def _slope_error(energy, value, restore, flat, key) -> float:
    """How far the differential is from central differences with the best of several
    steps, in the worst of several directions."""
    differential, _ = jax.flatten_util.ravel_pytree(energy.differential(restore(flat)))
    scale = 1 + float(jnp.max(jnp.abs(flat)))
    steps = scale * 2.0 ** -np.arange(6, 20)
    length = float(jnp.linalg.norm(differential))
    directions = list(jr.normal(key, (DIRECTIONS, flat.size)))
    worst = 0.0
    for direction in directions + [differential] * (length > 0):
        direction /= jnp.linalg.norm(direction)
        slopes = np.array(
            [
                (value(flat + h * direction) - value(flat - h * direction)) / (2 * h)
                for h in steps
            ]
        )
        # The step at which two extrapolations agree best, whatever is claimed.
        slopes = (4 * slopes[1:] - slopes[:-1]) / 3
        best = slopes[1:][np.argmin(np.abs(np.diff(slopes)))]
        error = abs(best - float(differential @ direction))
        size = max(length, abs(float(best)))
        # At a critical point: relative to the energy.
        size = size or 1 + abs(float(value(flat)))
        worst = max(worst, float(error) / size)
    return worst
