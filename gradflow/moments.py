"""Second moments: the only way data enter an energy.

| on paper | in code | meaning |
|---|---|---|
| $X X^\\top / n$ | `xx` | second moment of the inputs, one sample per column of X |
| $X Y^\\top / n$ | `xy` | second moment of inputs and targets |
| $Y Y^\\top / n$ | `yy` | second moment of the targets |
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from .arguments import check, check_whole
from .spectrum import cutoff, eigh_descending, psd_power


def _device(array: Any) -> Any:
    # numpy arrays become floating arrays of the current default precision; everything
    # else (tracers, shapes, None) is what a transformation put there and stays.
    numbers = isinstance(array, np.ndarray) and array.dtype.kind in "biufc"
    return jnp.asarray(array) if numbers else array


class Moments(eqx.Module):
    r"""The second moments of $n$ pairs $(x_i, y_i)$, divided by $n$:
    $\frac1n \sum_i x_i x_i^\top$, $\frac1n \sum_i x_i y_i^\top$ and
    $\frac1n \sum_i y_i y_i^\top$.

    Inverses are pseudo-inverses: eigenvalues of `xx` below
    [`gradflow.spectrum.cutoff`][] times the largest count as zero, so directions in
    which the inputs never move (constant pixels) are left alone.

    **Arguments:**

    - `count`: $n$, the number of samples.
    - `autoencoding`: whether the targets are the inputs, $y_i = x_i$.
    """

    xx: Float[Array, "x x"] = eqx.field(converter=_device)
    xy: Float[Array, "x y"] = eqx.field(converter=_device)
    yy: Float[Array, "y y"] = eqx.field(converter=_device)
    count: int = eqx.field(static=True)
    autoencoding: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        check_whole("count", self.count)
        check("autoencoding", self.autoencoding, bool)
        moments = {"xx": self.xx, "xy": self.xy, "yy": self.yy}
        for name, moment in moments.items():
            if isinstance(moment, (str, dict, np.ndarray)) or type(moment) is object:
                raise ValueError(f"{name} is {type(moment).__name__}: give a matrix")
        if not all(isinstance(moment, jax.Array) for moment in moments.values()):
            return  # A structure in the shape of moments, made by a transformation.
        for name, moment in moments.items():
            if moment.ndim != 2:
                raise ValueError(f"{name} has shape {moment.shape}: give a matrix")
            if not jnp.issubdtype(moment.dtype, jnp.floating):
                raise ValueError(f"{name} has dtype {moment.dtype}: give real numbers")
            rows, columns = moment.shape
            if name != "xy" and rows != columns:
                raise ValueError(f"{name} has shape {moment.shape}: it must be square")
        expected = (len(self.xx), len(self.yy))
        if self.xy.shape != expected:
            raise ValueError(
                f"xy has shape {self.xy.shape}: with xx {self.xx.shape} and yy "
                f"{self.yy.shape} it must have shape {expected}"
            )
        if self.autoencoding and self.xy.shape != self.xx.shape[:1] * 2:
            raise ValueError(
                f"autoencoding=True with xx {self.xx.shape} and yy {self.yy.shape}: "
                "the targets are the inputs, so pass the same moment three times"
            )
        if any(isinstance(moment, Tracer) for moment in moments.values()):
            return  # The values are known only when the compiled program runs.
        for name, moment in moments.items():
            _check_values(name, np.asarray(moment))
        others = [m for m in (self.xy, self.yy) if m is not self.xx]
        if self.autoencoding and not all(jnp.array_equal(self.xx, m) for m in others):
            raise ValueError(
                "autoencoding=True but xx, xy and yy differ: the targets are the "
                "inputs, so pass the same moment three times"
            )

    @classmethod
    def from_data(cls, x: Any, y: Any = None, *, center: bool = False) -> "Moments":
        """The moments of arrays whose rows are samples.

        Sums are taken on the host in float64, a block of rows at a time, so memory-
        mapped files larger than memory will do.

        **Arguments:**

        - `x`: inputs, an array (numpy, memory-mapped, jax) of shape `(samples, x)`.
        - `y`: targets, of shape `(samples, y)`; without it the targets are the inputs.
        - `center`: whether to subtract the mean of each column first.

        **Raises:** a `ValueError` for data that aren't two non-zero matrices of finite
        real numbers with as many rows as each other.
        """
        sums = _Sums(center)
        sums.add(*_rows(x, y, ""), "")
        return cls(*sums.moments(), autoencoding=y is None)

    @classmethod
    def from_batches(cls, batches: Iterable[Any], *, center: bool = False) -> "Moments":
        """The moments of any number of samples, given in blocks of rows.

        **Arguments:**

        - `batches`: an iterable of arrays `x`, or of pairs `(x, y)`; each batch is
            forgotten before the next is asked for.
        - `center`: whether to subtract the mean over all batches first.

        **Raises:** as `from_data`; rows are then counted over all batches.
        """
        if not isinstance(batches, Iterable):
            raise ValueError(
                f"batches is a {type(batches).__name__}: give an iterable of arrays x "
                "or of pairs (x, y)"
            )
        sums = _Sums(center)
        paired = False
        for index, batch in enumerate(batches):
            where = f" in batch {index}"
            pair = isinstance(batch, tuple | list)
            if pair and len(batch) != 2:
                raise ValueError(
                    f"batch {index} is a {type(batch).__name__} of length {len(batch)}:"
                    " give an array x or a pair (x, y)"
                )
            if index > 0 and pair != paired:
                raise ValueError(
                    f"batch {index} has {'a' if pair else 'no'} y and the batches "
                    f"before it have {'none' if pair else 'one'}: "
                    "give all batches as x or all as (x, y)"
                )
            paired = pair
            x, y = batch if pair else (batch, None)
            sums.add(*_rows(x, y, where), where)
        if sums.count == 0:
            raise ValueError(
                "batches is empty: give at least one block of rows (an iterator that "
                "was used up before has none left)"
            )
        return cls(*sums.moments(), autoencoding=not paired)

    def rank(self, *, rtol: float = 1e-12) -> int:
        """The numerical rank of `xx`; needs concrete values, so not under `jit`."""
        values = self._eigenvalues()
        kept = values > cutoff(len(values), self.xx.dtype, rtol) * values[-1]
        return int(np.sum(kept & (values > 0)))

    def condition_number(self) -> float:
        """The largest over the smallest eigenvalue of `xx`, infinite if `xx` is
        numerically singular; needs concrete values, so not under `jit`."""
        values = self._eigenvalues()
        singular = self.rank() < len(values)
        return float("inf") if singular else float(values[-1] / values[0])

    def principal(self) -> tuple[Float[Array, " x"], Float[Array, "x x"]]:
        """Eigenvalues of `xx`, largest first, and the principal directions of the
        inputs as columns."""
        return eigh_descending(self.xx)

    def whitening(self) -> Float[Array, "x x"]:
        r"""$\Sigma_{xx}^{-1/2}$, on the support of `xx`."""
        return psd_power(self.xx, -0.5)

    def regression(self) -> Float[Array, "y x"]:
        r"""$\Sigma_{yx} \Sigma_{xx}^+$, the matrix of the best linear map from inputs
        to targets (of those, the one of least norm)."""
        whitening = self.whitening()
        return (self.xy.T @ whitening) @ whitening

    def conditional(self) -> Float[Array, "y y"]:
        r"""$\Sigma_{yy} - \Sigma_{yx} \Sigma_{xx}^+ \Sigma_{xy}$, what the best linear
        map leaves of the targets; for centred Gaussian data, their covariance given the
        inputs."""
        explained = self.xy.T @ self.whitening()
        return self.yy - explained @ explained.T

    def restrict(self, dimension: int) -> "Moments":
        """The moments of the inputs' coordinates on their leading principal directions.

        When autoencoding the targets are restricted as the inputs are, so it remains an
        autoencoding problem. `restrict(rank())` makes a singular `xx` regular.

        **Raises:** a `ValueError` if `dimension` is more than the rank of `xx`, where
        that rank is known (not under `jit`).
        """
        if isinstance(dimension, bool) or not isinstance(dimension, int | np.integer):
            raise ValueError(f"dimension must be a whole number, got {dimension!r}")
        if dimension < 1:
            raise ValueError(f"dimension={dimension} must be at least 1")
        if dimension > len(self.xx):
            raise ValueError(
                f"dimension={dimension} is larger than the {len(self.xx)} columns of x"
            )
        if not isinstance(self.xx, Tracer) and dimension > self.rank():
            raise ValueError(
                f"dimension={dimension} is larger than the rank {self.rank()} of xx"
            )
        values, vectors = self.principal()
        xx = jnp.diag(values[:dimension])
        if self.autoencoding:
            return Moments(xx, xx, xx, self.count, autoencoding=True)
        return Moments(xx, vectors[:, :dimension].T @ self.xy, self.yy, self.count)

    def _eigenvalues(self) -> np.ndarray:
        return np.linalg.eigvalsh(np.asarray(self.xx, np.float64))


# Entries of x and y taken into float64 at once: 32 MiB.
_BLOCK = 2**22


@dataclasses.dataclass
class _Sums:
    """Sums over the samples seen so far, on the host in float64.

    With `center`, the sum of squares about the mean is kept and blocks are merged by
    their own means; sums about a far origin would cancel.

    *Reference*: Chan, Golub and LeVeque 1983, Algorithms for computing the sample
    variance.
    """

    center: bool
    count: int = 0
    columns: tuple[int, int] = (0, 0)
    products: Any = 0.0  # of all columns, those of x first
    origin: Any = None  # the first row: a constant column is then exactly zero
    mean: Any = 0.0
    largest: Any = 0.0

    def add(self, x: np.ndarray, y: np.ndarray | None, where: str) -> None:
        columns = (x.shape[1], 0 if y is None else y.shape[1])
        for name, now, before in zip("xy", columns, self.columns, strict=True):
            if self.count > 0 and now != before:
                raise ValueError(
                    f"the number of columns of {name}{where} is {now} and was {before} "
                    "before: every batch needs the same columns"
                )
        self.columns = columns
        size = max(1, _BLOCK // sum(columns))
        start = self.count
        for at in range(0, len(x), size):
            rows = np.empty((min(size, len(x) - at), sum(columns)))
            rows[:, : columns[0]] = x[at : at + size]
            if y is not None:
                rows[:, columns[0] :] = y[at : at + size]
            if not np.isfinite(rows).all():
                _check_finite(f"x{where}", x, start)
                if y is not None:
                    _check_finite(f"y{where}", y, start)
            self._add_block(rows)

    def _add_block(self, rows: np.ndarray) -> None:
        self.largest = np.maximum(self.largest, np.abs(rows).max(axis=0))
        total = self.count + len(rows)
        # What overflows is reported by `moments`, with the size of the data.
        with np.errstate(over="ignore", invalid="ignore"):
            if self.center:
                self.origin = rows[0].copy() if self.origin is None else self.origin
                rows -= self.origin
                mean = rows.mean(axis=0)
                rows -= mean
                step = mean - self.mean
                weight = self.count * len(rows) / total
                self.products = self.products + weight * np.outer(step, step)
                self.mean = self.mean + step * (len(rows) / total)
            self.products = self.products + rows.T @ rows
        self.count = total

    def moments(self) -> tuple[Array, Array, Array, int]:
        """xx, xy, yy in the current default precision, and the number of samples."""
        dtype = np.dtype(jax.dtypes.canonicalize_dtype(np.float64))
        with np.errstate(over="ignore", under="ignore"):
            joint = (self.products / self.count).astype(dtype)
        x, y = slice(None, self.columns[0]), slice(self.columns[0], None)
        self._check("x", x, joint)
        xx = jnp.asarray(joint[x, x])
        if self.columns[1] == 0:
            return xx, xx, xx, self.count
        self._check("y", y, joint)
        return xx, jnp.asarray(joint[x, y]), jnp.asarray(joint[y, y]), self.count

    def _check(self, name: str, columns: slice, joint: np.ndarray) -> None:
        largest = self.largest[columns].max()
        meaning = {
            "x": "every point is critical",
            "y": "the zero map is optimal and there is nothing to learn",
        }[name]
        if largest == 0:
            raise ValueError(f"{name} is all zero: {meaning}")
        if not np.isfinite(joint[columns, columns]).all():
            raise ValueError(
                f"{name} is as large as {largest:.3g}: its squares overflow "
                f"{joint.dtype}, so rescale it"
            )
        if self.center and not np.diag(self.products)[columns].any():
            raise ValueError(
                f"{name} is constant and center=True leaves nothing of it: {meaning}"
            )
        if not np.diag(joint)[columns].any():
            raise ValueError(
                f"{name} is at most {largest:.3g}: its squares vanish in "
                f"{joint.dtype}, so rescale it"
            )


def _rows(x: Any, y: Any, where: str) -> tuple[np.ndarray, np.ndarray | None]:
    x = _matrix(f"x{where}", x)
    if y is None:
        return x, None
    y = _matrix(f"y{where}", y)
    if len(x) != len(y):
        raise ValueError(
            f"x{where} is {x.shape} and y is {y.shape}: both need the same number of "
            "rows (samples)"
        )
    return x, y


def _matrix(name: str, data: Any) -> np.ndarray:
    if isinstance(data, Tracer):
        raise ValueError(
            f"{name} is traced by a jax transformation: moments of data are taken on "
            "the host, so call this outside jit and vmap"
        )
    if isinstance(data, np.ma.MaskedArray):
        raise ValueError(
            f"{name} is a masked array, whose mask would be lost: drop the masked rows "
            "or fill them in"
        )
    try:
        array = np.asarray(data)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} is a {type(data).__name__} that isn't an array of numbers: give "
            "one row of numbers per sample, all of the same length"
        ) from None
    # jax knows bfloat16 for a floating type; numpy doesn't.
    real = jnp.issubdtype(array.dtype, jnp.floating)
    if not real and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name} has dtype {array.dtype}: give real numbers, floating or integer"
        )
    if array.ndim != 2:
        per = "x.reshape(-1, 1)" if array.ndim == 1 else "x.reshape(len(x), -1)"
        raise ValueError(
            f"{name} is {array.ndim}-dimensional, of shape {array.shape}: give one row "
            f"per sample, for example {per.replace('x', name[0])}"
        )
    if 0 in array.shape:
        raise ValueError(
            f"{name} has shape {array.shape}: it needs at least one row (sample) and "
            "one column"
        )
    return array


def _check_values(name: str, moment: np.ndarray) -> None:
    _check_finite(name, moment, 0)
    if name == "xy":
        return
    # sqrt(eps) forgives any order of summation, not a wrong matrix.
    slack = np.sqrt(np.finfo(moment.dtype).eps) * np.abs(moment).max()
    asymmetry = np.abs(moment - moment.T)
    if asymmetry.max() > slack:
        row, column = np.unravel_index(np.argmax(asymmetry), moment.shape)
        raise ValueError(
            f"{name} isn't symmetric: [{row}, {column}] is {moment[row, column]} and "
            f"[{column}, {row}] is {moment[column, row]}"
        )


def _check_finite(name: str, rows: np.ndarray, first: int) -> None:
    # Counts them all, a row at a time: `rows` may be a file larger than memory.
    number, place = 0, ""
    for index, row in enumerate(rows):
        bad = ~np.isfinite(row)
        if number == 0 and bad.any():
            place = f"[{first + index}, {np.argmax(bad)}]"
        number += int(bad.sum())
    if number > 0:
        values = "value" if number == 1 else "values"
        raise ValueError(
            f"{name} has {number} non-finite {values}, first at {place}: "
            "drop those rows or fill them in"
        )
