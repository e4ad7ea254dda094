r"""Oja's flow: exact projectors, their limit and its rate.

| on paper | in code |
|---|---|
| $C = XX^\top$, $\lambda_1 \ge \lambda_2 \ge \dots$, $v_1, v_2, \dots$ | `moments.xx` |
| $V$, $d$ by $r$ | `TiedAutoencoder.frame` |
| $P = VV^\top$ | the projector; `TiedAutoencoder.matrix()` |

Oja's flow is $\dot V = (1 - VV^\top) C V$. Where $V^\top V = 1$, which it keeps, it is
the gradient flow of $E(V) = \frac{1}{2n}\|X - VV^\top X\|_F^2$ and its Riemannian
gradient flow on `manifolds.Stiefel`; elsewhere it is neither. Nor is it the flow of two
factors from $W_1 = V^\top$, $W_2 = V$, which does not keep $W_1 = W_2^\top$.

All moments are divided by $n$; the source has no $1/n$ and its time is ours divided by
$n$. A start determines $V(t)$ only up to a rotation that depends on time and on how it
is computed: compare $P$, which is determined.

*Reference:* E. Oja, *A simplified neuron model as a principal component analyzer*
(1982); W.-Y. Yan, U. Helmke, J. B. Moore, *Global analysis of Oja's flow for neural
networks* (1994); Bah, Rauhut, Terstiege, Westdickenberg 2020, (26). *Erratum:* (26),
the gradient flow of $E$, is Oja's flow only where $V^\top V = 1$.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..arguments import checked_arguments
from ..models.linear import TiedAutoencoder
from ..moments import Moments
from ..spectrum import eigh_descending
from ..types import Scalar
from .riccati import checked_time, echelon, noise, refuse, riccati, steps


# Data and starts may miss a hypothesis by this much: rounding of a few operations.
SLACK = 1e-12


@checked_arguments
def projector(
    moments: Moments, network: TiedAutoencoder, t: float | Scalar
) -> Float[Array, "x x"]:
    r"""$P(t)$ from any start, orthonormal or not, of any rank, for any $C$:

    $$P(t) = e^{Ct} V_0 \bigl[1 + V_0^\top (e^{2Ct} - 1) V_0\bigr]^{-1} V_0^\top
    e^{Ct},$$

    the solution of $\dot P = CP + PC - 2PCP$. Times may be long: short steps are
    composed (the cost grows like $\lambda_1 t$), and directions that the start lacks to
    rounding, some 1e-14 of its size, are never grown.

    **Arguments:**

    - `t`: time for moments divided by $n$; may be traced.

    **Raises:** `ValueError` if the data are not an autoencoder's ($Y = X$) or not of
    the frame's height, xx is not positive semidefinite, the start is not finite, or
    `t` is negative or not finite.

    *Reference:* as the module; the equation is solved as in `riccati`.
    """
    rates, modes, start = _in_eigenvectors(moments, network)
    time = _require_finite(checked_time(t, start.dtype), start)
    found = modes @ riccati(rates, 2 * rates, start, time)
    return found @ found.T


@checked_arguments
def stiefel_projector(
    moments: Moments, network: TiedAutoencoder, t: float | Scalar
) -> Float[Array, "x x"]:
    r"""$P(t) = Y (Y^\top Y)^{-1} Y^\top$ with $Y = e^{Ct} V_0$, where
    $V_0^\top V_0 = 1$.

    $C$ may be shifted by any multiple of 1, so that only differences of its eigenvalues
    matter: short steps with $C - \lambda_1$ are composed, each from orthonormal columns
    (the cost grows like $(\lambda_1 - \lambda_d) t$).

    **Arguments:**

    - `t`: as `projector`.

    **Raises:** `ValueError` as `projector`, or if the start is not orthonormal.

    *Reference:* as the module.
    """
    rates, modes, start = _in_eigenvectors(moments, network)
    time = _require_finite(checked_time(t, start.dtype), start)
    gram = start.T @ start
    distance = jnp.linalg.norm(gram - jnp.eye(len(gram), dtype=gram.dtype))
    time = refuse(
        time,
        ~(distance <= SLACK * len(gram)),
        "this closed form needs an orthonormal start, V^T V = 1: use `projector`",
    )
    shifted = rates - rates[0]
    count = steps(-shifted[-1] * time)
    growth = jnp.exp(shifted * (time / count))

    def advance(_, frame):
        moved = growth[:, None] * frame
        # Cholesky's triangle keeps zeros and relative accuracy, where Householder's
        # reflections add rounding to every entry.
        lower = jnp.linalg.cholesky(moved.T @ moved)
        return jax.scipy.linalg.solve_triangular(lower, moved.T, lower=True).T

    found = modes @ jax.lax.fori_loop(0, count.astype(int), advance, echelon(start))
    return found @ found.T


@checked_arguments
def limit(moments: Moments, network: TiedAutoencoder) -> Float[Array, "x x"]:
    r"""$\lim_{t \to \infty} P(t) = \sum_{i \le r} v_i v_i^\top$, an optimum of $E$.

    This holds if and only if $V_0^\top [v_1 \dots v_r]$ is nonsingular, given a gap
    $\lambda_r > \lambda_{r+1}$ (with $\lambda_{d+1} = 0$); the start need not be
    orthonormal.

    **Raises:** `ValueError` as `projector`, without the gap, or for a start that lacks
    a combination of the leading eigenvectors.

    *Reference:* as the module.
    """
    rates, modes, start = _in_eigenvectors(moments, network)
    rank = start.shape[1]
    if rank > len(rates):
        raise ValueError(
            f"rank={rank} is larger than the data's dimension {len(rates)}: there are "
            "not as many leading eigenvectors"
        )
    leading = modes[:, :rank]
    least = jnp.linalg.svd(start[:rank], compute_uv=False)[-1]
    leading = _require_finite(leading, start)
    leading = _require_gap(leading, rates, rank)
    leading = refuse(
        leading,
        ~(least > noise(start)),
        "V_0^T [v_1 ... v_r] is singular: the start lacks a combination of the leading "
        "eigenvectors, and its limit lacks it too",
    )
    return leading @ leading.T


@checked_arguments
def rate(moments: Moments, rank: int) -> Scalar:
    r"""$\lambda_r - \lambda_{r+1}$: for almost every start $\|P(t) - P(\infty)\|$ falls
    like $e^{-(\lambda_r - \lambda_{r+1}) t}$, and $E$ like its square.

    **Raises:** `ValueError` if the data are not an autoencoder's, the gap is 0, or
    `rank` is not between 1 and $d - 1$ (at $r = d$ every orthonormal start is optimal).

    *Reference:* as the module.
    """
    rates, _ = _spectrum(moments)
    whole = isinstance(rank, (int, np.integer)) and not isinstance(rank, bool)
    if not whole or not 1 <= rank < len(rates):
        raise ValueError(
            f"rank must be a whole number from 1 to {len(rates) - 1}, got {rank!r}"
        )
    return _require_gap(rates[rank - 1] - rates[rank], rates, rank)


def _spectrum(moments):
    if not moments.autoencoding:
        raise ValueError("Oja's flow needs an autoencoder, where Y = X")
    rates, modes = eigh_descending(moments.xx)
    rates = refuse(
        rates,
        ~(rates[-1] >= -SLACK * jnp.abs(rates[0])),
        "xx has a negative eigenvalue, as no second moment has",
    )
    return jnp.maximum(rates, 0.0), modes


def _in_eigenvectors(moments, network):
    dim, height = len(moments.xx), len(network.frame)
    if dim != height:
        raise ValueError(f"the frame has height {height} but the data have {dim}")
    rates, modes = _spectrum(moments)
    return rates, modes, modes.T @ network.frame


def _require_finite(value, start):
    wrong = ~jnp.all(jnp.isfinite(start))
    return refuse(value, wrong, "the closed form needs a finite start")


def _require_gap(value, rates, rank):
    following = rates[rank] if rank < len(rates) else jnp.zeros_like(rates[0])
    return refuse(
        value,
        ~(rates[rank - 1] - following > SLACK * rates[0]),
        f"there is no gap between eigenvalues {rank} and {rank + 1} of xx: the leading "
        "eigenvectors are not determined",
    )
