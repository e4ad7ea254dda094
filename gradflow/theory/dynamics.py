r"""Exact trajectories of the gradient flow, where there is a closed form.

| on paper | in code |
|---|---|
| $C = XX^\top$, $M = YX^\top$ | `moments.xx`, `moments.xy.T` |
| $W_1, \dots, W_N$ and $W$ | `DeepLinear.weights`, `matrix()` |
| $u, m, \lambda$ of one mode | `u0`, `m`, `lam` |

All moments are divided by $n$, so $t$ is the time of the flow of
$\frac{1}{2n}\|Y - WX\|_F^2$; the source has no $1/n$ and its time is ours divided by
$n$. Each function states the starts and data it holds for, and refuses all others.

*Reference:* Bah, Rauhut, Terstiege, Westdickenberg, *Learning deep linear neural
networks: Riemannian gradient flows and convergence to global minimizers* (2020).
"""

import math
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Array, Float

from ..arguments import checked_arguments
from ..models.linear import DeepLinear
from ..moments import Moments
from ..types import Scalar
from .riccati import checked_time, refuse, riccati


# Data and starts may miss a hypothesis by this much: rounding of a few operations.
SLACK = 1e-12
# Within this distance of its limit a mode is followed by a series in the distance:
# scipy's hyp2f1 loses all digits where its argument tends to 1.
NEAR = 0.1


class TwoLayerProduct(eqx.Module):
    r"""$W = W_2 W_1$ (`matrix`), $W_1^\top W_1$ (`input_gram`) and $W_2 W_2^\top$
    (`output_gram`), which determine the two factors up to one rotation of the hidden
    layer."""

    matrix: Float[Array, "y x"]
    input_gram: Float[Array, "x x"]
    output_gram: Float[Array, "y y"]


@checked_arguments
def whitened_two_layer(
    moments: Moments, network: DeepLinear, t: float | Scalar
) -> TwoLayerProduct:
    r"""The flow of depth 2 from a balanced start with whitened inputs, after time `t`.

    With $C = 1$, $F = \begin{pmatrix} 0 & M^\top \\ M & 0 \end{pmatrix}$ and
    $Q = \begin{pmatrix} W_1^\top \\ W_2 \end{pmatrix}$ the flow is
    $\dot Q = FQ - \frac12 Q Q^\top Q$, hence $P = QQ^\top$ solves the Riccati equation
    $\dot P = FP + PF - P^2$, whose solution is

    $$P(t) = e^{Ft} Q_0 \bigl[1 + Q_0^\top \Phi(t) Q_0\bigr]^{-1} Q_0^\top e^{Ft},
    \qquad \Phi(t) = \int_0^t e^{2Fs}\,\mathrm{d}s.$$

    $W(t)$ is its lower left block. All widths and ranks are allowed. Times may be long:
    short steps are composed (the cost grows like $\sigma_1 t$), and directions that the
    start lacks to rounding are never grown: rank is kept, and a start whose exact flow
    ends at a saddle, as by the wrong sign of $\det W$, ends there.

    **Arguments:**

    - `t`: time for moments divided by $n$; may be traced.

    **Raises:** `ValueError` if the depth is not 2, the widths are not those of the
    data, xx is not the identity, the start is not balanced or not finite, or `t` is
    negative or not finite.

    *Reference:* the flow is that of Bah et al. 2020, section 2; its Riccati equation
    is solved as in Fukumizu, *Effect of batch learning in multilayer neural networks*
    (1998).
    """
    _check_two_layers(network, moments)
    x_dim, y_dim = moments.xy.shape
    first, second = network.weights
    time = checked_time(t, first.dtype)
    distance = jnp.linalg.norm(moments.xx - jnp.eye(x_dim, dtype=moments.xx.dtype))
    time = refuse(
        time,
        ~(distance <= SLACK * x_dim),
        "the closed form needs whitened inputs, but xx is not the identity",
    )
    size = jnp.sum(first**2) + jnp.sum(second**2)
    time = refuse(
        time,
        ~(network.imbalance() <= SLACK * size) | ~jnp.isfinite(size),
        "the closed form needs a finite and balanced start, "
        "W_2^T W_2 = W_1 W_1^T, such as BalancedInit gives",
    )

    # The eigenvectors (v, u), (v, -u) of F from the singular vectors of M, rates
    # descending. For any orthogonal u and v the wrong sign of det W is a missing
    # direction, so that errors of theirs, large at close rates, do no harm.
    left, values, right = jnp.linalg.svd(moments.xy.T)
    count = min(x_dim, y_dim)
    below, above = right.T[:, :count], left[:, :count]
    idle = jax.scipy.linalg.block_diag(right.T[:, count:], left[:, count:])
    up = jnp.concatenate([below, above]) / math.sqrt(2)
    down = jnp.concatenate([below, -above])[:, ::-1] / math.sqrt(2)
    modes = jnp.concatenate([up, idle, down], axis=1)
    zeros = jnp.zeros(abs(x_dim - y_dim), values.dtype)
    rates = jnp.concatenate([values, zeros, -values[::-1]])
    start = modes.T @ jnp.concatenate([first.T, second])
    q = modes @ riccati(rates, jnp.ones_like(rates), start, time)
    below, above = q[:x_dim], q[x_dim:]
    return TwoLayerProduct(above @ below.T, below @ below.T, above @ above.T)


@checked_arguments
def decoupled_mode(
    u0: float, m: float, lam: float, depth: int, t: float | np.ndarray
) -> np.ndarray:
    r"""One mode of a balanced flow whose modes do not mix, after times `t`.

    If $C = V \Lambda V^\top$, $M = U\,\mathrm{diag}(m)\,V^\top$ and $W(0) = U\,
    \mathrm{diag}(u_0)\,V^\top$ with balanced factors, then $W(t)$ keeps this form and
    each $u$ solves $\dot u = N |u|^{2 - 2/N} (m - \lambda u)$. With $p = 2 - 2/N$:

    - $N = 1$: $u = \frac{m}{\lambda} + (u_0 - \frac{m}{\lambda}) e^{-\lambda t}$;
    - $N = 2$: $u = \frac{m}{\lambda} \big/ \bigl(1 + (\frac{m}{\lambda u_0} - 1)
      e^{-2mt}\bigr)$;
    - $N \ge 3$: $N t = H(u) - H(u_0)$ with $H(v) = \frac{v^{1-p}}{m(1-p)}\,
      {}_2F_1(1, 1-p; 2-p; \lambda v / m)$, solved for $u$.

    For $N \ge 2$ a mode never changes sign: with $u_0 m < 0$ it decays to 0, and counts
    as 0 below 1e-260 of $|m| / \lambda$.

    **Arguments:**

    - `u0`: the mode's singular value at the start, with sign.
    - `m`, `lam`: its entries of $M$ and $C$, both divided by $n$.
    - `t`: times, an array of any shape. Computed on the host, in float64.

    **Raises:** `ValueError` for depth < 1, `lam` <= 0, negative times, or anything not
    finite.

    *Reference:* Bah et al. 2020, section 2, in the singular vectors of $W$; solved by
    Saxe, McClelland, Ganguli, *Exact solutions to the nonlinear dynamics of learning
    in deep linear neural networks* (2014) for $N = 2$.
    """
    _check_mode(u0, m, lam, depth)
    return np.asarray(_mode(u0, m, lam, depth, _checked_times(t)))


def _mode(u0, m, lam, depth, times):
    if depth == 1:
        return u0 * np.exp(-lam * times) - m * np.expm1(-lam * times) / lam
    if u0 == 0:
        return np.zeros_like(times)
    # A negative mode is the positive mode of the opposite target.
    sign = math.copysign(1.0, u0)
    size, drive = abs(float(u0)), sign * float(m)
    if drive == 0:
        power = 2 - 2 / depth
        return (
            sign
            * size
            * (1 + power * depth * lam * size**power * times) ** (-1 / power)
        )
    if depth == 2:
        # In the form without overflow or cancellation for either sign of the drive.
        decay = np.exp(-2 * abs(drive) * times)
        spent = -np.expm1(-2 * abs(drive) * times) * lam * size / abs(drive)
        if drive > 0:
            return sign * size / (decay + spent)
        return sign * size * decay / (1 + spent)
    scale = abs(drive) / lam
    rate = depth * abs(drive) * scale ** (1 - 2 / depth)
    solve = np.vectorize(
        lambda s: _solve_clock(size / scale, drive > 0, 1 - 2 / depth, s),
        otypes=[np.float64],
    )
    return sign * scale * solve(rate * times)


@checked_arguments
def decoupled_escape_time(
    u0: float, m: float, lam: float, depth: int, share: float = 0.5
) -> float:
    r"""The time at which `decoupled_mode` has learned `share` of its limit
    $m / \lambda$; infinite if it never does ($u_0 m \le 0$ and $N \ge 2$).

    From $u_0 = \varepsilon \to 0$ it grows like $\ln(1/\varepsilon) / (2m)$ for
    $N = 2$ and like $\varepsilon^{-(1 - 2/N)} / ((N - 2) m)$ for $N \ge 3$.

    **Raises:** `ValueError` as `decoupled_mode`, if `share` is not strictly between 0
    and 1, if `m` is 0 (there is nothing to learn), or if the start is beyond `share`.

    *Reference:* as `decoupled_mode`.
    """
    _check_mode(u0, m, lam, depth)
    if not 0 < share < 1:
        raise ValueError(f"share must be strictly between 0 and 1, got {share}")
    if m == 0:
        raise ValueError("m must not be 0: the mode has nothing to learn")
    begun = u0 * lam / m
    if begun > share:
        raise ValueError(f"u0={u0} is already beyond share={share} of the limit")
    if depth == 1:
        return math.log((1 - begun) / (1 - share)) / lam
    if begun <= 0:
        return math.inf
    if depth == 2:
        logit = lambda x: math.log(x) - math.log1p(-x)
        return (logit(share) - logit(begun)) / (2 * abs(m))
    exponent = 1 - 2 / depth
    rate = depth * abs(m) * abs(m / lam) ** exponent
    clock = lambda x: _rising(x, 1 - x, math.log1p(-x), exponent)
    return (clock(share) - clock(begun)) / rate


@checked_arguments
def remark42(eigenvalue: float, t: float | np.ndarray) -> np.ndarray:
    r"""$\alpha_1(t) = (2 e^{2 \lambda_1 t} - 1)^{-1/2}$, a start that never escapes.

    For the autoencoder of depth 2 and rank 1 from $W_1(0) = u_1^\top$, $W_2(0) =
    -u_1$, with $u_1$ the eigenvector of $C$ of eigenvalue $\lambda_1$, the flow is
    $W_1 = \alpha_1 u_1^\top$, $W_2 = \beta_1 u_1$, $\beta_1 = -\alpha_1$: it ends at
    the saddle at 0, from a start as large as the optimum.

    **Arguments:**

    - `eigenvalue`: $\lambda_1$ of $C$ divided by $n$.

    **Raises:** `ValueError` unless the eigenvalue is > 0 and the times are >= 0, all
    finite.

    *Reference:* Bah et al. 2020, Remark 42, (38) and (39).
    """
    if not (math.isfinite(eigenvalue) and eigenvalue > 0):
        raise ValueError(f"eigenvalue must be finite and > 0, got {eigenvalue}")
    decay = np.exp(-eigenvalue * _checked_times(t))
    return np.asarray(decay / np.sqrt(2 - decay**2))


@checked_arguments
def stacked_velocity(moments: Moments, network: DeepLinear) -> DeepLinear:
    r"""The velocity of an autoencoder of depth 2 in stacked form, from any start.

    With $V = \begin{pmatrix} W_1^\top \\ W_2 \end{pmatrix}$,

    $$\dot V = \Bigl(1 + \begin{pmatrix} -C & 0 \\ 0 & 0 \end{pmatrix} V V^\top
    \begin{pmatrix} 0 & 0 \\ C^{-1} & 0 \end{pmatrix} + \begin{pmatrix} 0 & 0 \\ 0 & -1
    \end{pmatrix} V V^\top \begin{pmatrix} 0 & 1 \\ 0 & 0 \end{pmatrix}\Bigr)
    \begin{pmatrix} 0 & C \\ C & 0 \end{pmatrix} V.$$

    A road to the velocity that shares nothing with the loss: for checks, not for use.

    **Raises:** `ValueError` if the data are not an autoencoder's ($Y = X$), xx is
    singular, the depth is not 2, or the widths are not those of the data.

    *Reference:* Bah et al. 2020, (53); balancedness is not needed.
    """
    if not moments.autoencoding:
        raise ValueError("the stacked form needs an autoencoder, where Y = X")
    _check_two_layers(network, moments)
    values = jnp.linalg.eigvalsh(moments.xx)
    xx = refuse(
        moments.xx,
        ~(values[0] > SLACK * values[-1]),
        "the stacked form needs C^-1, but xx is singular",
    )
    dim = len(xx)
    zero, one = jnp.zeros_like(xx), jnp.eye(dim, dtype=xx.dtype)
    stacked = jnp.concatenate([network.weights[0].T, network.weights[1]])
    gram = stacked @ stacked.T
    on_first = jnp.block([[-xx, zero], [zero, zero]]) @ gram
    on_first = on_first @ jnp.block([[zero, zero], [jnp.linalg.inv(xx), zero]])
    on_second = jnp.block([[zero, zero], [zero, -one]]) @ gram
    on_second = on_second @ jnp.block([[zero, one], [zero, zero]])
    whole = jnp.eye(2 * dim, dtype=xx.dtype) + on_first + on_second
    velocity = whole @ (jnp.block([[zero, xx], [xx, zero]]) @ stacked)
    return DeepLinear((velocity[:dim].T, velocity[dim:]))


# A mode of depth N >= 3 in units of its limit, x = lam u / |m|, and of the time
# 1 / (N |m| (|m| / lam)^a) with a = 1 - 2/N, solves x' = x^(1+a) (1 - x) if driven and
# x' = -x^(1+a) (1 + x) if not. The antiderivatives below are its clocks.


def _rising(x: float, gap: float, log_gap: float, a: float) -> float:
    """The integral of dx / (x^(1+a) (1 - x)) up to x < 1, where gap = 1 - x."""
    if gap < NEAR:
        near = _rising(1 - NEAR, NEAR, math.log(NEAR), a)
        return near + _near_one(gap, log_gap, -1 - a)
    return -(x**-a) / a * float(scipy.special.hyp2f1(1, -a, 1 - a, x))


def _falling(w: float, gap: float, log_gap: float, a: float) -> float:
    """The integral of dx / (x^(1+a) (x - 1)) from x = 1 / w > 1 on, gap = 1 - w."""
    if gap < NEAR:
        near = _falling(1 - NEAR, NEAR, math.log(NEAR), a)
        return near + _near_one(gap, log_gap, a)
    return _beyond_one(w, a, 1.0)


def _fading(x: float, a: float) -> float:
    """The integral of dx / (x^(1+a) (1 + x)) from x on."""
    if x >= 1:
        return _beyond_one(1 / x, a, -1.0)
    below = lambda v: v**-a / a * float(scipy.special.hyp2f1(1, -a, 1 - a, -v))
    return _beyond_one(1.0, a, -1.0) + (below(x) - below(1.0))


def _beyond_one(w: float, a: float, sign: float) -> float:
    """The integral of dv v^a / (1 - sign v) from 0 to w <= 1."""
    series = scipy.special.hyp2f1(1, 1 + a, 2 + a, sign * w)
    return w ** (1 + a) / (1 + a) * float(series)


def _near_one(gap: float, log_gap: float, power: float) -> float:
    """The integral of dg (1 - g)^power / g from `gap` to `NEAR`."""
    orders = np.arange(1, 25)
    terms = (-1.0) ** orders * scipy.special.binom(power, orders) / orders
    rest = float(np.sum(terms * (NEAR**orders - gap**orders)))
    return math.log(NEAR) - log_gap + rest


def _solve_clock(x0: float, driven: bool, a: float, elapsed: float) -> float:
    """Where a mode that starts at `x0` is after `elapsed`."""
    if elapsed == 0 or (driven and x0 == 1):
        return x0
    # In a variable y that resolves both ends, in which the clock is monotone and the
    # solution lies between y0 and `far`.
    if driven and x0 < 1:
        place = lambda y: float(scipy.special.expit(y))
        y0, way = math.log(x0) - math.log1p(-x0), 1
        far = y0 + elapsed  # y' = x^a <= 1
        log_gap = lambda y: float(scipy.special.log_expit(-y))
        clock = lambda y: _rising(place(y), place(-y), log_gap(y), a)
    elif driven:
        place = lambda y: 1 + math.exp(y)
        y0, way = math.log(x0 - 1), -1
        far = min(y0, 0.0) - 2 ** (1 + a) * elapsed  # y' = -x^(1+a); x <= 2 at y <= 0
        expit, log_gap = scipy.special.expit, scipy.special.log_expit
        clock = lambda y: _falling(float(expit(-y)), float(expit(y)), log_gap(y), a)
    else:
        place = lambda y: math.exp(y)
        y0, way = math.log(x0), -1
        # x' >= -2 x^(1+a) from x = 1 on.
        far = -math.log(min(x0, 1.0) ** -a + 2 * a * elapsed) / a
        if far < -600:
            return 0.0  # below 1e-260, where the powers in the clock overflow
        clock = lambda y: _fading(place(y), a)
    # Rounding of the clock must not exclude the solution.
    far += way * 1e-9 * (1 + abs(far))
    start = clock(y0)
    y = scipy.optimize.brentq(
        lambda y: clock(y) - start - elapsed, y0, far, xtol=1e-14, maxiter=1000
    )
    return place(cast(float, y))


def _check_two_layers(network, moments):
    if network.depth != 2:
        raise ValueError(f"the closed form needs depth 2, got depth {network.depth}")
    ends = (network.widths[0], network.widths[-1])
    if ends != moments.xy.shape:
        raise ValueError(
            f"the network maps {ends[0]} inputs to {ends[1]} outputs but the data have "
            f"{moments.xy.shape[0]} and {moments.xy.shape[1]}"
        )


def _check_mode(u0, m, lam, depth):
    whole = isinstance(depth, (int, np.integer)) and not isinstance(depth, bool)
    if not whole or depth < 1:
        raise ValueError(f"depth must be a whole number >= 1, got {depth!r}")
    for name, value in (("u0", u0), ("m", m), ("lam", lam)):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    if not lam > 0:
        raise ValueError(f"lam must be > 0, got {lam}")


def _checked_times(t):
    times = np.asarray(t, np.float64)
    if not np.all(np.isfinite(times) & (times >= 0)):
        raise ValueError(f"t must be finite and >= 0, got {t}")
    return times
