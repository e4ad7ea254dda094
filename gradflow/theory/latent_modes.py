r"""The scalar problem behind linear VAEs: which modes of the data a latent takes up.

| on paper | in code |
|---|---|
| $\theta_i^2$ of a VAE, $\theta_i$ of a conditional one | `variances` $t_i$ |
| $\beta, \eta, e$; $c = \eta / e$ | `beta`, `decoder_std`, `prior_std` |
| $\sigma'_1 \le \sigma'_2 \le \dots$, where fixed | `stds` |
| $d_1$; $D_0$ | `latent`; `dimension` |
| $\omega_i, \lambda_i, \sigma_i$ | `decoder()`, `encoder()`, `covariance()` |

At a critical point each latent takes up one mode of the data, or none. With a learned
covariance it can take up mode $i$ only if $t_i > \beta\eta^2$; with a fixed one, if
$\sqrt{t_i} > \kappa_i = \sqrt\beta c \sigma'_i$. At a minimum the largest modes are
taken up, by the latents of least $\sigma'$.

*Reference:* Dang et al. 2023, Theorems 1 to 3. *Errata:* the test in Theorem 1 is
$\theta_i \ge \beta\eta^2$, since $\theta_i$ is an eigenvalue of $E$ (printed
$\sqrt\beta\eta$); in the VAE it is $\theta_i^2 \ge \beta\eta^2$ (printed $\eta^2$).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..types import Scalar


# Two values of the energy closer than this times its size are one value: no run tells
# them apart in reasonable time.
TIE = 1e-9


class LatentModes(eqx.Module):
    r"""The minimum of a VAE's loss over all that is not the data's spectrum.

    The decoder's variance, if learned too, is (for a learned covariance) the root of
    $D_0 x - \sum_i t_i + \sum_{i \le p} (t_i - \beta x)_+$, which is convex in $x$; so
    $\eta^2 = S_r / (D_0 - \beta r)$ with $S_r$ the sum of what the $r$ active modes
    leave.
    """

    variances: Float[Array, " modes"]
    beta: Scalar
    decoder_std: Scalar | None
    prior_std: Scalar
    stds: Float[Array, " latent"] | None
    latent: int = eqx.field(static=True)
    rank: int = eqx.field(static=True)
    dimension: int = eqx.field(static=True)
    diagonal: bool = eqx.field(static=True)

    @property
    def taken(self) -> Float[Array, " latent"]:
        """The variance of the mode offered to each latent, 0 where none is left."""
        return self._placed(self.variances[: min(self.rank, self.latent)])

    def decoder_variance(self) -> Scalar:
        r"""$\eta^2$ at the minimum."""
        return self._decoder_variance(self.taken, self.stds)

    def active(self) -> Bool[Array, " latent"]:
        """Which latents have not collapsed at the minimum."""
        return self.gains(self.taken) > 0

    def gains(self, taken: Float[Array, " latent"]) -> Float[Array, " latent"]:
        r"""How far each mode is above its threshold, $t/(\beta\eta^2) - 1$ or
        $(\sqrt t - \kappa)/\eta$, and 0 below it."""
        variance = self._decoder_variance(taken, self.stds)
        if self.stds is None:
            return jnp.maximum(taken / (self.beta * variance) - 1, 0)
        kappa = jnp.sqrt(self.beta * variance) * self.stds / self.prior_std
        return jnp.maximum(jnp.sqrt(taken) - kappa, 0) / jnp.sqrt(variance)

    def decoder(self) -> Float[Array, " latent"]:
        r"""$\omega_i$, the singular values of the decoder: $\omega_i^2 =
        (t_i - \beta\eta^2)_+ / e^2$, or $\sqrt\beta c g_i / \sigma'_i$ with $g_i =
        (\sqrt{t_i} - \kappa_i)_+$."""
        variance, gains = self.decoder_variance(), self.gains(self.taken)
        if self.stds is None:
            return jnp.sqrt(self.beta * variance * gains) / self.prior_std
        scale = jnp.sqrt(self.beta) * variance / (self.prior_std * self.stds)
        return jnp.sqrt(scale * gains)

    def encoder(self) -> Float[Array, " latent"]:
        r"""$\lambda_i$, the singular values of the whitened encoder: $\lambda_i =
        \omega_i \sqrt{t_i} / (\omega_i^2 + \beta c^2)$."""
        decoder = self.decoder()
        penalty = self.beta * self.decoder_variance() / self.prior_std**2
        return decoder * jnp.sqrt(self.taken) / (decoder**2 + penalty)

    def covariance(self) -> Float[Array, " latent"]:
        r"""The eigenvalues of $\Sigma$: $\beta\eta^2 e^2/t_i$ of active latents, $e^2$
        of collapsed ones; or $\sigma_i'^2$."""
        if self.stds is not None:
            return self.stds**2
        return self.prior_std**2 / (1 + self.gains(self.taken))

    def value(self) -> Scalar:
        """The least loss."""
        return self._value(self.taken, self.stds)

    def critical_value(self, modes: Bool[Array, " modes"]) -> Scalar:
        """The loss at a critical point that has taken up these modes (the larger by
        the latents of smaller fixed variance)."""
        chosen = -jnp.sort(-jnp.where(modes, self.variances, 0))
        return self._value(self._placed(chosen[: self.latent]), self.stds)

    def least_gap(self) -> Scalar:
        """From the minimum to the next critical value, infinite if there is none.

        A critical point other than the minima has a mode less, another mode, or modes
        at other latents, and each of these has a neighbor on the way to a minimum that
        differs from it in one exchange. A diagonal covariance has further critical
        points, with latents that share modes: least of all two latents two modes, or
        two latents one mode.
        """
        taken, stds, least = self.taken, self.stds, self.value()
        tie = tie_of(least)
        if self.diagonal and stds is None and self.decoder_std is None:
            return tie  # Two latents of one mode, and what eta does then, is open.
        kept = min(self.rank, self.latent, self.variances.size)
        rest = jnp.append(self.variances[kept:], 0.0)

        def exchanged(place):
            """The least gap over `tie` when this latent takes up another mode: the
            first such, as gaps grow down the list."""
            at = lambda j: self._value(taken.at[place].set(rest[j]), stds) - least

            def halve(_, bounds):
                low, high = bounds
                middle = (low + high) // 2
                found = at(jnp.minimum(middle, rest.size - 1)) > tie
                return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

            steps = int(np.ceil(np.log2(rest.size + 1)))
            bounds = (jnp.asarray(0), jnp.asarray(rest.size))
            first, _ = jax.lax.fori_loop(0, steps, halve, bounds)
            gap = at(jnp.minimum(first, rest.size - 1))
            return jnp.where(first < rest.size, gap, jnp.inf)

        gaps = jax.lax.map(exchanged, jnp.arange(kept))
        if stds is not None and self.latent > 1:
            first, second = (jnp.asarray(i) for i in np.triu_indices(self.latent, 1))

            def swapped(pair):
                i, j = pair
                return self._value(
                    taken.at[i].set(taken[j]).at[j].set(taken[i]), self.stds
                )

            swaps = jax.lax.map(swapped, (first, second))
            gaps = jnp.append(gaps, swaps - least)
        if self.diagonal and stds is None:
            gaps = jnp.append(gaps, self._shared())
        return jnp.min(jnp.where(gaps > tie, gaps, jnp.inf))

    def threshold(self, mode: int) -> Scalar:
        r"""The $\beta$ from which on mode `mode` is not taken up: $t_i / \eta^2$, or
        $t_i e^2 / (\eta^2 \sigma_i'^2)$; 0 for modes that no latent is left for."""
        if not 0 <= mode < self.variances.size:
            raise ValueError(
                f"mode={mode} must be from 0 to {self.variances.size - 1}: modes are "
                "counted from the largest"
            )
        if mode >= min(self.rank, self.latent):
            return jnp.zeros_like(self.beta)
        own, taken = self.variances[mode], self.taken
        safe = jnp.where(own > 0, own, 1.0)
        if self.decoder_std is not None:
            threshold = own / self.decoder_std**2
            if self.stds is not None:
                threshold = threshold * (self.prior_std / self.stds[mode]) ** 2
        elif self.stds is None:
            over = jnp.sum(self.variances) - jnp.sum(jnp.maximum(taken - own, 0))
            threshold = self.dimension * own / over
        else:
            ratio = self.stds[mode] / jnp.sqrt(safe)
            roots = jnp.sqrt(taken)
            over = ratio**2 * jnp.sum(self.variances) - ratio * jnp.sum(
                roots * jnp.maximum(ratio * roots - self.stds, 0)
            )
            threshold = self.prior_std**2 * self.dimension / over
        return jnp.where(own > 0, threshold, 0.0)

    def bounded(self) -> Bool[Array, ""]:
        """Whether there is a least loss: a learned decoder variance goes to 0 where the
        latents can explain all of the data, unless beta forbids that."""
        if self.decoder_std is not None or self.stds is not None:
            return jnp.array(True)
        total, taken = jnp.sum(self.variances), self.taken
        noise = 1e-12 * total
        rest = jnp.sum(self.variances[min(self.rank, self.latent) :])
        price = self.beta * jnp.sum((taken > noise).astype(taken.dtype))
        return (rest > noise) | (price > self.dimension)

    def _placed(self, chosen):
        """Variances of modes at the first latents, and 0 at the others."""
        return jnp.zeros(self.latent, chosen.dtype).at[: chosen.size].set(chosen)

    def _decoder_variance(self, taken, stds):
        if self.decoder_std is not None:
            return self.decoder_std**2
        total = jnp.sum(self.variances)
        safe = jnp.where(taken > 0, taken, 1)
        if stds is None:
            at = safe / self.beta
            above = jnp.maximum(taken[None, :] - taken[:, None], 0)
            slope = self.dimension * at - total + jnp.sum(above, axis=1)
            active = (taken > 0) & (slope > 0)
            rest = total - jnp.sum(jnp.where(active, taken, 0))
            count = jnp.sum(active.astype(taken.dtype))
            return rest / (self.dimension - self.beta * count)
        # In a = 1 / eta: a^2 S_r + a sum over active of theta k = D_0.
        k, roots = jnp.sqrt(self.beta) * stds / self.prior_std, jnp.sqrt(taken)
        at = k / jnp.sqrt(safe)
        over = jnp.maximum(at[:, None] * roots[None, :] - k[None, :], 0)
        spent = at**2 * total - at * jnp.sum(roots[None, :] * over, axis=1)
        active = (taken > 0) & (spent < self.dimension)
        rest = total - jnp.sum(jnp.where(active, taken, 0))
        cost = jnp.sum(jnp.where(active, roots * k, 0))
        root = cost + jnp.sqrt(cost**2 + 4 * rest * self.dimension)
        return (root / (2 * self.dimension)) ** 2

    def _value(self, taken, stds):
        variance, total = self._decoder_variance(taken, stds), jnp.sum(self.variances)
        own = 0.0
        if self.decoder_std is None:
            own = self.dimension * jnp.log(variance)
        if stds is None:
            ratio = jnp.maximum(taken / (self.beta * variance), 1)
            # t / eta^2 is what an active mode no longer costs.
            gain = jnp.sum(ratio - 1 - jnp.log(ratio))
            constant = self.latent * (1 - 2 * jnp.log(self.prior_std))
            return total / variance + self.beta * (constant - gain) + own
        penalty = self.beta * stds**2 / self.prior_std**2
        kappa = jnp.sqrt(variance * penalty)
        gain = jnp.maximum(jnp.sqrt(taken) - kappa, 0) ** 2
        return (
            (total - jnp.sum(gain)) / variance
            + jnp.sum(penalty)
            - 2 * self.beta * jnp.sum(jnp.log(stds))
            + own
        )

    def _shared(self):
        """What it costs if two latents share two active modes, or one mode."""
        taken, active = self.taken, self.active()
        roots = jnp.sqrt(jnp.where(active, taken, 1))
        means = 0.5 * (roots[:-1] + roots[1:])
        pairs = 2 * jnp.log(means) - jnp.log(roots[:-1]) - jnp.log(roots[1:])
        pairs = jnp.where(active[1:], 2 * self.beta * pairs, jnp.inf)
        x = jnp.sqrt(1 + self.gains(taken))
        y = (x + jnp.sqrt(x**2 + 8)) / 4
        spread = self.beta * (x / y + 4 * jnp.log(y) - 1 - 2 * jnp.log(x))
        spare = jnp.sum(active) < self.latent
        return jnp.append(pairs, jnp.where(active & spare, spread, jnp.inf))


def tie_of(value: Scalar) -> Scalar:
    """The least difference from `value` that makes another value."""
    eps = float(jnp.finfo(value.dtype).eps)
    return max(TIE, 2000 * eps) * jnp.maximum(jnp.abs(value), 1)
