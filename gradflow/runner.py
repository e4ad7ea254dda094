"""The draws of one study: initialized, descended, inspected."""

import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np

from .ensemble import descend
from .iterate import Iterator
from .precision import converted
from .solve import Integrator
from .store.arrays import fingerprint
from .types import Key


# What of some draws' solution and finding is held in memory.
Keep = Callable[[Any, Any], tuple[Any, Any]]


class Runner:
    """One study in one arithmetic on some devices of this process.

    `draws` is to be called within `precision`. What it compiles it keeps: a runner is
    called for many parts of a study.
    """

    def __init__(self, study: Any, key: Key, dtype: str, devices: Sequence[Any]):
        self.inspected = converted(study, "float64" if dtype == "mixed" else dtype)
        self.study = self.inspected
        if dtype == "mixed":
            self.study = eqx.tree_at(
                lambda s: s.initialize,
                converted(study, "float32"),
                _Rounded(self.inspected.initialize),
            )
        self.key, self.dtype, self.devices = key, dtype, devices
        self.seconds = {"first batches": 0.0, "other batches": 0.0}
        self._compiled: set[str] = set()

    def draws(
        self,
        rows: Sequence[range],
        whole: int,
        done: Callable[[Any], None],
        keep: "Keep | None" = None,
        most: int | None = None,
    ) -> tuple[Any, Any]:
        """The solutions and the findings of some parts of the draws, one after the
        other, with leading axes.

        `whole`, `most`: the draws of a part that is not cut short, and of the longest
        call, so that equal programs run all parts of a study. `done` is called with
        findings as they come, and only what `keep` returns of them is held.
        """
        parts = []
        for solution in self._descended(rows, whole, most):
            if self.dtype == "mixed":
                solution = converted(solution, "float64")
            inspect = partial(_inspect, self.inspected.inspect)
            finding = self._in_batches("inspect", inspect, solution, whole)
            done(finding)
            part = solution, finding
            parts.append(part if keep is None else keep(*part))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    def fields(self) -> dict[str, Any]:
        """What a store compares with the study that it has."""
        return {"dtype": self.dtype, **fingerprint(self.inspected, self.key)}

    def like(self) -> tuple[Any, Any]:
        """Shapes of one draw's solution and finding."""
        # The function of one point has the structure of its ensemble.
        initialize, descend = self.study.initialize, self.study.descend

        def one(key):
            solution = descend(initialize(key))
            return solution, self.inspected.inspect(solution)

        return eqx.filter_eval_shape(one, self.key)

    def _descended(
        self, rows: Sequence[range], whole: int, most: int | None
    ) -> Generator[Any, None, None]:
        study = self.study
        if not isinstance(study.descend, (Integrator, Iterator)):
            begin = partial(_initialize, study.initialize, self.key)
            run = partial(_descend, study.descend)
            draws = np.concatenate([np.asarray(part) for part in rows])
            for first in range(0, draws.size, study.batch):
                some = draws[first : first + study.batch]
                points = self._in_batches("initialize", begin, some, whole)
                yield self._in_batches("descend", run, points, whole)
            return
        began = time.perf_counter()
        for solution, _ in descend(
            study.descend,
            study.initialize,
            self.key,
            rows,
            study.batch,
            self.devices,
            whole=whole,
            most=most,
        ):
            self._took("descend", began)
            yield solution
            began = time.perf_counter()

    def _in_batches(self, stage: str, function, inputs, whole: int):
        """`function` of some draws, a batch at a time, as numpy arrays."""
        count = jax.tree.leaves(inputs)[0].shape[0]
        # A short batch repeats its last draw: one shape, one compilation.
        size = min(self.study.batch, whole)
        results = []
        for start in range(0, count, size):
            began = time.perf_counter()
            few = min(size, count - start)
            rows = np.minimum(np.arange(start, start + size), start + few - 1)
            batch = jax.tree.map(lambda leaf: leaf[rows], inputs)  # noqa: B023
            result = jax.device_get(function(batch))
            results.append(
                jax.tree.map(lambda leaf: np.array(leaf[:few]), result)  # noqa: B023
            )
            self._took(stage, began)
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *results)

    def _took(self, stage: str, began: float) -> None:
        first = stage not in self._compiled
        self._compiled.add(stage)
        kind = "first batches" if first else "other batches"
        self.seconds[kind] += time.perf_counter() - began


class _Rounded(eqx.Module):
    """Starts of another initializer, in float32."""

    initialize: Callable[[Key], Any]

    def __call__(self, key):
        return converted(self.initialize(key), "float32")


@eqx.filter_jit
def _initialize(initialize, key, draws):
    return jax.vmap(lambda draw: initialize(jr.fold_in(key, draw)))(draws)


@eqx.filter_jit
def _descend(descend, points):
    return jax.vmap(descend)(points)


@eqx.filter_jit
def _inspect(inspect, solutions):
    # One after the other: most verdicts are cheap and skip the Hessian, which vmap
    # would form for all.
    return jax.lax.map(inspect, solutions)
