"""EM, its relatives and their acceleration: maps that never raise an energy."""

import abc
from typing import Any, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .arguments import checked_arguments, checked_fields
from .models.base import AbstractEnergy, AbstractLatentEnergy
from .models.factor import LatentGaussian, NegativeLogLikelihood, Statistics
from .noise import Block, Full
from .triangles import cholesky
from .types import P, Scalar


class AbstractIteration(eqx.Module, Generic[P]):
    """A map $x \\mapsto F(x)$ that never raises `energy`.

    To implement your own: subclass and define `step`. `iterate` checks each step.
    """

    energy: eqx.AbstractVar[AbstractEnergy[P]]

    @abc.abstractmethod
    def step(self, point: P) -> P:
        """$F(x)$."""

    @property
    def updates(self) -> int:
        """How many times a step computes the map that it is made of."""
        return 1

    def speed(self, point: P) -> Scalar:
        r"""$\|F(x) - x\|$, the length of a step."""
        return distance(self.step(point), point)


@checked_fields
class ExpectationMaximization(AbstractIteration[P]):
    """EM: an E-step and the M-step that belongs to it.

    *Reference:* Dempster, Laird, Rubin (1977).
    """

    energy: AbstractLatentEnergy[P, Any]

    def step(self, point: P) -> P:
        return self.energy.m_step(point, self.energy.e_step(point))


@checked_fields
class ExpandedMaximization(AbstractIteration[LatentGaussian]):
    r"""EM in a larger model, whose latent variables may have any covariance within each
    group that has one pattern of loadings. Its M-step estimates it as
    $S_{zz}$; $W S_{zz}^{1/2}$ takes the result back. As monotone as EM and never
    slower near an optimum.

    *Reference:* Liu, Rubin, Wu (1998), *Parameter expansion to accelerate EM: the PX-EM
    algorithm*.
    """

    energy: NegativeLogLikelihood

    def step(self, point: LatentGaussian) -> LatentGaussian:
        statistics = self.energy.e_step(point)
        found = self.energy.m_step(point, statistics)
        loadings = found.loadings
        for group in self.energy.groups(loadings.shape[1]):
            root = cholesky(statistics.second[np.ix_(group, group)])
            loadings = loadings.at[:, group].set(loadings[:, group] @ root)
        return LatentGaussian(loadings, found.noise)


@checked_fields
class AlternatingMaximization(AbstractIteration[LatentGaussian]):
    r"""The alternating scheme for inter-battery factor analysis: in each of three parts
    another set of variables is taken for latent, and another part of the point moves.

    1. The shared loadings, with private latent variables integrated out: their part of
       the covariance is noise.
    2. The private loadings, beside the shared ones.
    3. The noise, beside all loadings.

    Each part has its own E-step and raises its own expected likelihood, and so the
    likelihood itself.

    **Raises:** `ValueError` if the energy has no pattern, or noise is not a `Block`
    whose views are those of the private latent variables.

    *Reference:* Klami, Kaski (2006). *Erratum:* as printed by Gundersen, parts 2 and 3
    take the views for independent and match traces; they do lower the likelihood.
    """

    energy: NegativeLogLikelihood

    def __check_init__(self):
        if self.energy.pattern is None:
            raise ValueError(
                "the energy has no pattern, so there are no private latent variables: "
                "use ExpectationMaximization, or pattern=battery_pattern(...)"
            )

    def step(self, point: LatentGaussian) -> LatentGaussian:
        energy = self.energy
        pattern = np.asarray(energy.pattern)
        shared = np.flatnonzero(pattern.all(axis=0))
        private = np.flatnonzero(~pattern.all(axis=0))
        loadings = energy.held(point).loadings
        if shared.size:
            found = self._shared(point, loadings, shared, private)
            loadings = loadings.at[:, shared].set(found)
        if private.size:
            point = LatentGaussian(loadings, point.noise)
            found = self._private(point, shared, private)
            loadings = loadings.at[:, private].set(found)
        point = LatentGaussian(loadings, point.noise)
        statistics = energy.e_step(point)
        return LatentGaussian(loadings, energy.fit_noise(point, statistics, loadings))

    def _shared(self, point, loadings, shared, private):
        """Part 1: EM for the shared loadings, other latent variables as noise."""
        noise = point.noise
        views = noise.views() if isinstance(noise, Block) else [(noise, 0, noise.size)]
        blocks = []
        for block, start, stop in views:
            own = loadings[start:stop][:, private]
            blocks.append(Full.of(block.matrix() + own @ own.T))
        whole = NegativeLogLikelihood(self.energy.moments, None, self.energy.floor)
        kept = LatentGaussian(loadings[:, shared], Block(tuple(blocks)))
        return whole.regress(whole.e_step(kept))

    def _private(self, point, shared, private):
        """Part 2: the regression of what the shared loadings leave."""
        statistics = self.energy.e_step(point)
        cross, second = statistics.cross, statistics.second
        left = cross[:, private] - (
            point.loadings[:, shared] @ second[np.ix_(shared, private)]
        )
        pattern = np.asarray(self.energy.pattern)[:, private]
        rest = NegativeLogLikelihood(self.energy.moments, pattern, self.energy.floor)
        return rest.regress(Statistics(left, second[np.ix_(private, private)]))


class Squarem(AbstractIteration[P]):
    r"""Another iteration, extrapolated: from $x$, $x_1 = F(x)$ and $x_2 = F(x_1)$ on to
    $F(x - 2\alpha r + \alpha^2 v)$ with $r = x_1 - x$, $v = x_2 - x_1 - r$ and
    $\alpha = -\|r\| / \|v\|$; where the energy there is above that of $x_2$ (or no
    number) to $x_2$. So it is monotone if the iteration is.

    *Reference:* Varadhan, Roland (2008), scheme S3, with a test of the energy.
    """

    iteration: AbstractIteration[P]
    energy: AbstractEnergy[P]

    @checked_arguments
    def __init__(self, iteration: AbstractIteration[P]):
        self.iteration, self.energy = iteration, iteration.energy

    @property
    def updates(self) -> int:
        return 3 * self.iteration.updates

    def step(self, point: P) -> P:
        first = self.iteration.step(point)
        second = self.iteration.step(first)
        change = jax.tree.map(jnp.subtract, first, point)
        bend = jax.tree.map(lambda a, b, r: a - b - r, second, first, change)
        curved = size(bend)
        reach = size(change) / jnp.where(curved > 0, curved, 1)
        reach = jnp.where(curved > 0, jnp.maximum(reach, 1), 1)
        ahead = jax.tree.map(
            lambda x, r, v: x + 2 * reach * r + reach**2 * v, point, change, bend
        )
        ahead = self.iteration.step(ahead)
        better = self.energy(ahead) <= self.energy(second)
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), ahead, second)

    def speed(self, point: P) -> Scalar:
        return self.iteration.speed(point)


def size(tree: Any) -> Scalar:
    """The Euclidean norm of all entries."""
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


def distance(one: Any, other: Any) -> Scalar:
    """The Euclidean distance of all entries."""
    return size(jax.tree.map(jnp.subtract, one, other))
