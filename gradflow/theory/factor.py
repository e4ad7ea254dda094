r"""Gaussian latent variables: where maximum likelihood has a closed form.

Probabilistic PCA (`ppca.py`) and CCA (`pcca.py`) have one. Factor analysis has none,
and inter-battery factor analysis only where it is PCCA.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from ..arguments import checked_arguments
from ..models.factor import LatentGaussian, NegativeLogLikelihood
from ..noise import Block, Full, Isotropic
from ..spectrum import eigh_descending
from .pcca import PCCATheory
from .ppca import PPCATheory


@checked_arguments
def theory_of(
    energy: NegativeLogLikelihood, point: LatentGaussian
) -> PPCATheory | PCCATheory:
    """What is known of this energy on points of this kind.

    **Raises:** `ValueError` where there is no closed form: factor analysis, inter-
    battery factor analysis (but see `battery_optimum`), more than two views."""
    latents, noise = point.loadings.shape[1], point.noise
    if energy.pattern is None and isinstance(noise, Isotropic):
        return PPCATheory(energy, latents)
    if energy.pattern is None and isinstance(noise, Block) and len(noise.blocks) == 2:
        if all(isinstance(block, Full) for block in noise.blocks):
            return PCCATheory(energy, latents, noise.sizes)
    name = "inter-battery factor analysis" if energy.pattern else "factor analysis"
    raise ValueError(
        f"{name} with {type(noise).__name__} noise has no closed form: compare runs "
        "from many starts, or use Isotropic noise (PPCA) or a Block of two Full (PCCA)"
    )


@checked_arguments
def battery_optimum(
    energy: NegativeLogLikelihood, sizes: Sequence[int]
) -> LatentGaussian:
    r"""A global minimizer of inter-battery factor analysis where it is PCCA: with at
    least $P_i - 1$ private latent variables for each of two views, as $B_i B_i^\top +
    \sigma_i^2 I$ is then any positive definite matrix.

    **Raises:** `ValueError` with fewer: there is no closed form."""
    pattern = np.asarray(energy.pattern if energy.pattern else np.zeros((0, 0)))
    sizes = tuple(sizes)
    if any(size < 1 for size in sizes):
        raise ValueError(f"sizes={sizes} must all be >= 1")
    rows = np.repeat(np.arange(len(sizes)), sizes)
    if len(sizes) != 2 or len(rows) != len(pattern):
        raise ValueError(
            f"sizes={sizes} must be two, of the rows of the energy's pattern"
        )
    loaded = [pattern[rows == view].all(axis=0) for view in (0, 1)]
    shared = np.flatnonzero(loaded[0] & loaded[1])
    own = [
        np.flatnonzero(loaded[0] & ~loaded[1]),
        np.flatnonzero(loaded[1] & ~loaded[0]),
    ]
    if any(len(mine) < size - 1 for mine, size in zip(own, sizes, strict=True)):
        raise ValueError(
            f"private latent variables are {len(own[0])} and {len(own[1])}: with fewer "
            f"than {sizes[0] - 1} and {sizes[1] - 1} inter-battery factor analysis has "
            "no closed form"
        )
    free = NegativeLogLikelihood(energy.moments, None, energy.floor)
    found = PCCATheory(free, max(len(shared), 1), sizes).optimum()
    loadings = jnp.zeros(pattern.shape, found.loadings.dtype)
    loadings = loadings.at[:, shared].set(found.loadings[:, : len(shared)])
    blocks = []
    views = found.noise.views() if isinstance(found.noise, Block) else []
    for (block, start, stop), mine in zip(views, own, strict=True):
        values, vectors = eigh_descending(block.matrix())
        private = vectors * jnp.sqrt(jnp.maximum(values - values[-1], 0))[None, :]
        count = stop - start - 1
        loadings = loadings.at[start:stop, mine[:count]].set(private[:, :count])
        blocks.append(Isotropic(jnp.log(values[-1]), stop - start))
    return LatentGaussian(loadings, Block(tuple(blocks)))
