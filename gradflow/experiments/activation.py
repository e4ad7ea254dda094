r"""In which order the latents of a VAE come up from small starts.

At the collapsed point, $\Sigma = e^2$ and maps of 0, a mode of variance t has the
Hessian $2 [[e^2/\eta^2, -t/\eta^2], [-t/\eta^2, \beta t/e^2]]$ in an entry of the
decoder and one of the encoder. So it grows at the rate of minus the smaller eigenvalue,
which is positive exactly where $t > \beta\eta^2$, where the minimum has learned it.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from ..collapse import kl, turned
from ..flow import GradientFlow
from ..initial import GaussianLike
from ..models.vae import LinearVAE, NegativeELBO
from ..solve import integrate
from ..theory.vae import VAETheory
from ..types import Key
from .phases import moments_of


CURVE_POINTS = 400


def growth_rates(energy: NegativeELBO, variances: np.ndarray) -> np.ndarray:
    """How fast modes of these variances leave the collapsed point (see the module)."""
    assert energy.decoder_std is not None
    noise, prior = float(energy.decoder_std) ** 2, float(energy.prior_std) ** 2
    own = 2 * prior / noise, 2 * float(energy.beta) * variances / prior
    across = 2 * variances / noise
    return np.sqrt((own[0] - own[1]) ** 2 / 4 + across**2) - (own[0] + own[1]) / 2


def activation(
    variances: tuple[float, ...], beta: float, small: float, starts: int, key: Key
) -> tuple[np.ndarray, dict[str, Any]]:
    """Which starts activate modes in the order of their rates; and the curves of the
    first: the nats of each latent, where they end, and when each mode is predicted.

    A mode is active from when half of what the minimum explains of it is explained.
    """
    energy = NegativeELBO(moments_of(variances), beta=beta)
    size = len(variances)
    theory, flow = VAETheory(energy, size), GradientFlow(energy)
    own = np.asarray(theory.spectrum())
    rates = growth_rates(energy, own)
    active = np.flatnonzero(rates > 0)
    predicted = np.log(1 / small) / rates[active]
    times = np.geomspace(0.1, 4 * np.max(predicted, initial=1.0), CURVE_POINTS)
    start = GaussianLike(LinearVAE.zeros(size, size), jnp.asarray(small))
    history = _followed(flow, theory, start, key, starts, times)
    goals = 1 - beta / own[active]
    past = np.asarray(history["share"])[:, :, active] > goals / 2
    came = past.max(axis=1)
    first = np.where(came, past.argmax(axis=1), len(times))
    # Strictly one after the other, the fastest first.
    order = np.argsort(-rates[active])
    right = (np.diff(first[:, order], axis=1) > 0).min(axis=1, initial=True)
    curves = {
        "times": times,
        "nats": np.asarray(history["nats"])[0].T,
        "ends": 0.5 * np.log(np.maximum(own / beta, 1)),
        "predicted": predicted,
    }
    return right & came.min(axis=1, initial=True), curves


@eqx.filter_jit
def _followed(flow, theory, start, key, count: int, times):
    """What each mode of the data has explained, and the nats of each latent in
    coordinates where the decoder's columns are orthogonal."""
    observe = {
        "share": lambda point: jnp.diagonal(
            theory.vectors.T @ theory.explained(point) @ theory.vectors
        ),
        "nats": lambda point: kl(*turned(flow.energy, point)),
    }

    def one(draw):
        solution = integrate(
            flow,
            start(jr.fold_in(key, draw)),
            times=times,
            observe=observe,
            method="auto",
            throw=False,
        )
        assert solution.history is not None  # because times are given
        return solution.history

    return jax.vmap(one)(jnp.arange(count))
