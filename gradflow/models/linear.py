r"""Linear networks and the squared loss.

| on paper | in code |
|---|---|
| $X, Y$ with $n$ columns | data, as `Moments` divided by $n$ |
| $W_1, \dots, W_N$ | `DeepLinear.weights`, first applied first, each `"out in"` |
| $d_0, \dots, d_N$ and $N$ | `DeepLinear.widths`, `DeepLinear.depth` |
| $W = W_N \cdots W_1$ | `matrix()` |
| $V$, $d$ by $r$, with $W_1 = V^\top$, $W_2 = V$ | `TiedAutoencoder.frame` |
| $L^N$, $L^1$ | `SquaredLoss` on `DeepLinear`, on `LinearMap` |

*Reference:* Bah, Rauhut, Terstiege, Westdickenberg, *Learning deep linear neural
networks: Riemannian gradient flows and convergence to global minimizers* (2020).
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..arguments import check_sides, checked_arguments, checked_fields
from ..moments import Moments
from ..types import Scalar
from .base import AbstractEnergy


class AbstractLinearNetwork(eqx.Module):
    """A parametrization of one matrix.

    To implement your own: define `factors`, the matrices whose product it is.
    """

    @abc.abstractmethod
    def factors(self) -> tuple[Float[Array, "_ _"], ...]:
        """The matrices $W_1, \\dots, W_N$, first applied first."""

    def matrix(self) -> Float[Array, "y x"]:
        """The end-to-end matrix $W_N \\cdots W_1$."""
        product, *rest = self.factors()
        for weight in rest:
            product = weight @ product
        return product


@checked_fields
class LinearMap(AbstractLinearNetwork):
    """One matrix $W$: the network of depth 1."""

    weight: Float[Array, "y x"]

    def __check_init__(self):
        check_sides("weight", self.weight)

    def factors(self) -> tuple[Float[Array, "_ _"], ...]:
        return (self.weight,)


@checked_fields
class DeepLinear(AbstractLinearNetwork):
    """The factors $W_1, \\dots, W_N$ of a deep linear network, first applied first.

    **Raises:** `ValueError` when there is no factor, a width is zero, or two
    neighboring factors do not fit.
    """

    weights: tuple[Float[Array, "_ _"], ...]

    def __check_init__(self):
        if len(self.weights) == 0:
            raise ValueError(
                "weights is empty: a network needs depth >= 1, so give at least one "
                "matrix"
            )
        shapes = [jnp.shape(weight) for weight in self.weights]
        for j, shape in enumerate(shapes):
            if len(shape) != 2 or 0 in shape:
                raise ValueError(
                    f"weights[{j}] has shape {shape}: each must be a matrix (out, in) "
                    "without zero sides"
                )
        for j, (lower, upper) in enumerate(zip(shapes[:-1], shapes[1:], strict=True)):
            if upper[1] != lower[0]:
                raise ValueError(
                    f"weights[{j + 1}] takes {upper[1]} inputs but weights[{j}] gives "
                    f"{lower[0]}: neighboring widths must agree"
                )

    def factors(self) -> tuple[Float[Array, "_ _"], ...]:
        return self.weights

    @property
    def depth(self) -> int:
        """$N$."""
        return len(self.weights)

    @property
    def widths(self) -> tuple[int, ...]:
        """$(d_0, \\dots, d_N)$."""
        return (self.weights[0].shape[1], *(w.shape[0] for w in self.weights))

    def imbalance(self) -> Scalar:
        r"""$\max_j \|W_{j+1}^\top W_{j+1} - W_j W_j^\top\|_F$, 0 for depth 1.

        Each of these matrices is conserved by the gradient flow of any loss of the
        product; **balanced** means that all are 0.

        *Reference:* Bah et al. 2020, section 2.
        """
        gaps = [
            jnp.linalg.norm(upper.T @ upper - lower @ lower.T)
            for lower, upper in zip(self.weights[:-1], self.weights[1:], strict=True)
        ]
        return jnp.max(jnp.stack([*gaps, jnp.zeros_like(self.weights[0][0, 0])]))


@checked_fields
class TiedAutoencoder(AbstractLinearNetwork):
    r"""$W = V V^\top$: an encoder $V^\top$ whose decoder $V$ is its transpose.

    The squared loss of an autoencoder is then $E(V) = \frac{1}{2n}\|X - VV^\top
    X\|_F^2$, with $\nabla E = -(1 - VV^\top) C V - C (1 - VV^\top) V$. The flow of two
    factors does not keep them tied: it is another flow.

    **Raises:** `ValueError` when the frame is not a matrix, or has a zero side.

    *Reference:* Bah et al. 2020, (26).
    """

    frame: Float[Array, "x rank"]

    def __check_init__(self):
        shape = jnp.shape(self.frame)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(
                f"frame has shape {shape}: it must be a matrix (x, rank) without zero "
                "sides"
            )

    def factors(self) -> tuple[Float[Array, "_ _"], ...]:
        return (self.frame.T, self.frame)


@checked_arguments
def invariants(network: DeepLinear) -> tuple[Float[Array, "_ _"], ...]:
    r"""The conserved matrices $W_{j+1}^\top W_{j+1} - W_j W_j^\top$, $j = 1..N-1$."""
    return tuple(
        upper.T @ upper - lower @ lower.T
        for lower, upper in zip(network.weights[:-1], network.weights[1:], strict=True)
    )


@checked_fields
class SquaredLoss(AbstractEnergy[AbstractLinearNetwork]):
    r"""$E(W) = \frac{1}{2n}\|Y - WX\|_F^2$ of a network's end-to-end matrix.

    The source has no $1/n$: its loss is $n$ times ours, and its time is ours divided
    by $n$.

    **Raises:** `ValueError` when the network's first and last widths are not those of
    the data.
    """

    moments: Moments

    def __call__(self, point: AbstractLinearNetwork) -> Scalar:
        lower, upper = _halves(self._checked(point.factors()))
        xx, xy, yy = self.moments.xx, self.moments.xy, self.moments.yy
        gram = lower.T @ xx @ lower
        return (
            0.5 * jnp.sum((upper.T @ upper) * gram)
            - jnp.sum(upper * (xy.T @ lower))
            + 0.5 * jnp.trace(yy)
        )

    def differential(self, point: AbstractLinearNetwork) -> AbstractLinearNetwork:
        r"""$\nabla_{W_j} E = A_j^\top (W\,xx - yx) B_j^\top$ with $A_j = W_N \cdots
        W_{j+1}$, $B_j = W_{j-1} \cdots W_1$.

        Everything passes through the narrowest layer, so that no product of two wide
        sides is formed: with narrowest width $r$ and all other widths at most $d$ this
        is $O(N d^2 r)$.
        """
        factors, pull = jax.vjp(lambda network: network.factors(), point)
        return pull(_factor_gradients(self._checked(factors), self.moments))[0]

    def _checked(self, factors):
        x_dim, y_dim = self.moments.xy.shape
        if (factors[0].shape[1], factors[-1].shape[0]) != (x_dim, y_dim):
            raise ValueError(
                f"the network maps {factors[0].shape[1]} inputs to "
                f"{factors[-1].shape[0]} outputs but the data have {x_dim} and "
                f"{y_dim}: the first and last widths must be those of x and y"
            )
        return factors


def _narrowest(factors) -> int:
    widths = [factors[0].shape[1], *(factor.shape[0] for factor in factors)]
    return widths.index(min(widths))


def _halves(factors):
    """$B^\\top$ and $A$ with $W = AB$, cut at the narrowest layer."""
    cut = _narrowest(factors)
    below, above = _partial_products(factors, cut)
    return below[0].T, above[-1]


def _partial_products(factors, cut):
    """`below[j]` $= W_c \\cdots W_{j+1}$ for $j = 0..c$ and `above[j - c]`
    $= W_j \\cdots W_{c+1}$ for $j = c..N$, where $c$ is the narrowest layer."""
    width = factors[0].shape[1] if cut == 0 else factors[cut - 1].shape[0]
    identity = jnp.eye(width, dtype=factors[0].dtype)
    below = [identity]
    for weight in reversed(factors[:cut]):
        below.insert(0, weight if len(below) == 1 else below[0] @ weight)
    above = [identity]
    for weight in factors[cut:]:
        above.append(weight if len(above) == 1 else weight @ above[-1])
    return below, above


def _factor_gradients(factors, moments):
    cut = _narrowest(factors)
    below, above = _partial_products(factors, cut)
    lower, upper = below[0], above[-1]
    if moments.autoencoding:
        # yx is xx, and one pass over it is enough.
        both = jnp.concatenate([lower, upper.T]) @ moments.xx
        gram, pulled = jnp.split(both, 2)
        driven = gram
    else:
        gram, driven = lower @ moments.xx, lower @ moments.xy
        pulled = (moments.xy @ upper).T
    gradients = []
    # Layers up to the cut: carry A^T (W xx - yx) (narrow by x) upward.
    residual = (upper.T @ upper) @ gram - pulled
    for weight, product in zip(factors[:cut], below[1:], strict=True):
        gradients.append(product.T @ residual)
        residual = residual @ weight.T
    # Layers above it: carry (W xx - yx) B^T (y by narrow) downward.
    residual = upper @ (gram @ lower.T) - driven.T
    gradients_above = []
    for weight, product in zip(
        reversed(factors[cut:]), reversed(above[:-1]), strict=True
    ):
        gradients_above.append(residual @ product.T)
        residual = weight.T @ residual
    return (*gradients, *reversed(gradients_above))
