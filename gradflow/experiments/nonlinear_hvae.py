r"""Which level of a hierarchical VAE of perceptrons collapses, by beta_1 and beta_2.

For each pair of betas a network learns to draw all digits through two levels of
latents. What each level carries, its active units and the (epsilon, delta)-collapse of
$z_2$ stand beside what the linear one has at its optimum; the figure shows what the
networks draw: the mean of x given the mean of $z_1$ given an image, and given a $z_1$
drawn from a $z_2$ that is drawn from the prior.

What $z_1$ carries, $\mathbb{E}[\log q(z_1 \mid x) - \log p(z_1 \mid z_2)]$, is a
divergence only where $z_2$ does not depend on $z_1$; it is negative where $z_2$ knows
the noise of $z_1$.

The standard deviation of $q(z_1 \mid x)$ is fixed: where it is learned the loss has no
least value for beta_2 < beta_1, for perceptrons no more than for linear maps.

*Claim under test:* Dang, Tran, Nguyen, Ho 2023, section 5 with figure 4. Widths, steps
and the grid are ours.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from cyclopts import Parameter

from .. import collapse
from ..environment import environment
from ..models.hvae import HierarchicalELBO
from ..models.nonlinear import NonlinearHVAE, SampledHierarchicalELBO
from ..precision import find_device, precision
from ..report import Report
from ..store.folder import Store
from ..theory.hvae import HVAETheory
from .base import positive
from .samples import centered_moments, mnist_samples
from .training import Network, train, TrainingConfig


CLAIM = (
    "In hierarchical VAEs of perceptrons, as in linear ones, the last latents collapse "
    "as beta_2 grows, and the larger beta_1 the later; the first ones take over what "
    "the last ones leave."
)
SOURCE = "Dang et al. 2023, section 5 and figure 4"
COST = "about 5 minutes on one core for the default settings"
# Of the rows, for what is measured; and images shown of each network.
MEASURED, SHOWN = 10_000, 8


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """Settings: one row of the table for each pair of betas."""

    draws: int = 1
    "Networks per pair, from different initial weights."
    beta_1: tuple[float, ...] = (0.25, 1.0, 4.0)
    "Weights of the first level's divergence."
    beta_2: tuple[float, ...] = (0.5, 2.0, 5.0)
    "Weights of the second level's."
    decoder_std: float = 0.5
    "Standard deviation of pixels given z_1, and of z_1 given z_2."
    sigma_1: float = 0.5
    "Standard deviation of z_1 given an image."

    def __post_init__(self):
        super().__post_init__()
        for name in ("beta_1", "beta_2", "sigma_1"):
            positive(self, name)
        for name in ("beta_1", "beta_2"):
            values = getattr(self, name)
            if list(values) != sorted(set(values)):
                raise ValueError(f"{name}={values} must rise: give each value once")


def run(
    config: Config, *, progress: bool | None = None, store: Store | None = None
) -> Report:
    """Trains the networks and reports one row per pair of betas."""
    device = find_device(config.device)
    name, rows = mnist_samples(config.images, None, config.seed)
    pairs = [(one, two) for one in config.beta_1 for two in config.beta_2]
    with precision("float64"), jax.default_device(device):
        moments = centered_moments(rows)
        linear = {pair: _linear(config, moments, *pair) for pair in pairs}
    with precision(config.dtype), jax.default_device(device):
        data = jnp.asarray(rows, float)
        networks = {_name(*pair): _network(config, data, *pair) for pair in pairs}
        trained, seconds = train(
            networks, config, data=name, progress=progress, store=store
        )
    found = {pair: trained[_name(*pair)] for pair in pairs}
    return Report(
        "nonlinear_hvae",
        CLAIM,
        dataclasses.asdict(config),
        environment(config.dtype, device),
        [_row(config, pair, linear[pair], found[pair]) for pair in pairs],
        [f"trained on {name}", *_falls(config, found)],
        {
            "title": f"Hierarchical VAEs of perceptrons, {name}: images, the same "
            "through the mean of z_1, drawn from the prior",
            "cells": [_cell(pair, found[pair]) for pair in pairs],
            "columns": len(config.beta_2),
            "panels": [_panel(config, level, linear, found) for level in (1, 2)],
        },
        seconds,
    )


def _name(beta_1: float, beta_2: float) -> str:
    return f"beta_1 {beta_1:g} beta_2 {beta_2:g}"


def _linear(config: Config, moments, beta_1: float, beta_2: float) -> dict[str, Any]:
    """What theory has to say of linear maps on the same data."""
    energy = HierarchicalELBO(
        moments,
        beta_1=beta_1,
        beta_2=beta_2,
        decoder_std=config.decoder_std,
        prior_std=config.prior_std,
        covariance_1=config.sigma_1**2 * jnp.eye(config.latents),
    )
    theory = HVAETheory(energy, config.latents, config.latents)
    one, two = collapse.kl_hierarchical(energy, theory.optimum())
    return {
        "collapsed": int(theory.collapsed()),
        "nats_1": float(one.sum()),
        "nats_2": float(two.sum()),
    }


def _network(config: Config, data, beta_1: float, beta_2: float) -> Network:
    energy = SampledHierarchicalELBO(
        beta_1, beta_2, config.decoder_std, config.prior_std, config.sigma_1
    )
    start = eqx.Partial(
        NonlinearHVAE.random, data.shape[1], config.latents, config.latents,
        width=config.width, depth=config.depth,
    )  # fmt: skip
    return Network(
        start,
        eqx.Partial(_loss, energy),
        (data,),
        jnp.asarray(len(data)),
        eqx.Partial(_measure, energy, data[:MEASURED], config.delta),
    )


def _loss(energy, point, x, *, key):
    return -energy.elbo(point, x, key=key)


def _measure(energy, data, delta, point, key) -> dict[str, np.ndarray]:
    one, two = jr.split(key)
    nats_1, nats_2, code_1, code_2, elbo = _seen(energy, point, data, one)
    shown = [np.asarray(rows) for rows in _shown(energy, point, data[:SHOWN], two)]
    return {
        "level": np.asarray(collapse.collapse_level(nats_2, delta)),
        "nats_1": np.asarray(nats_1.mean(axis=0)),
        "nats_2": np.asarray(nats_2.mean(axis=0)),
        "spread_1": np.asarray(code_1.var(axis=0)),
        "spread_2": np.asarray(code_2.var(axis=0)),
        "elbo": np.asarray(elbo.mean()),
        # Images, through z_1, from the prior.
        "images": (np.clip(np.stack(shown), 0, 1) * 255).round().astype(np.uint8),
    }


@eqx.filter_jit
def _seen(energy, point, data, key):
    """Of each sample the divergences and means of both levels, and the ELBO."""

    def one(key, x):
        nats_1, nats_2 = energy.kl(point, x, key=key)
        means_1, _ = energy.code_1(point, x)
        means_2, _ = energy.code_2(point, means_1)
        return nats_1, nats_2, means_1, means_2, energy.elbo(point, x, key=key)

    return jax.vmap(one)(jr.split(key, len(data)), data)


@eqx.filter_jit
def _shown(energy, point, data, key):
    def one(key, x):
        means_1, _ = energy.code_1(point, x)
        last, first = jr.split(key)
        size = point.decoder_2.in_size
        z_2 = energy.prior_std * jr.normal(last, (size,), x.dtype)
        z_1 = point.decoder_2(z_2)
        z_1 = z_1 + energy.decoder_std * jr.normal(first, z_1.shape, x.dtype)
        return x, point.decoder_1(means_1), point.decoder_1(z_1)

    return jax.vmap(one)(jr.split(key, len(data)), data)


def _middle(found, level: int) -> float:
    """The nats of a level, of the median network."""
    return float(np.median(found[f"nats_{level}"].sum(axis=1)))


def _row(config: Config, pair, linear, found) -> dict[str, Any]:
    collapsed = (found["level"] < config.epsilon).sum(axis=1)
    active = {
        level: int(np.median((found[f"spread_{level}"] > collapse.ACTIVE).sum(axis=1)))
        for level in (1, 2)
    }
    return {
        "beta_1": pair[0],
        "beta_2": pair[1],
        "latents": config.latents,
        "linear: z_2 collapsed": linear["collapsed"],
        "linear: nats of z_1": linear["nats_1"],
        "linear: nats of z_2": linear["nats_2"],
        "networks": len(collapsed),
        "z_2 collapsed": int(np.median(collapsed)),
        "fewest": int(collapsed.min()),
        "most": int(collapsed.max()),
        "nats of z_1": _middle(found, 1),
        "nats of z_2": _middle(found, 2),
        "active z_1": active[1],
        "active z_2": active[2],
        "ELBO": float(np.median(found["elbo"])),
    }


def _falls(config: Config, found) -> list[str]:
    """In how many neighboring pairs what a level carries changes as is claimed."""
    nats = lambda level: np.array(
        [
            [found[one, two][f"nats_{level}"].sum(axis=1) for two in config.beta_2]
            for one in config.beta_1
        ]
    )
    first, last = nats(1), nats(2)
    changes = {
        "z_2 carries less for the next larger beta_2": np.diff(last, axis=1) < 0,
        "z_2 carries more for the next larger beta_1": np.diff(last, axis=0) > 0,
        "z_1 carries more for the next larger beta_2": np.diff(first, axis=1) > 0,
        "z_1 carries less for the next larger beta_1": np.diff(first, axis=0) < 0,
    }
    return [
        f"{what}: {seen.sum()} of {seen.size} neighboring networks"
        for what, seen in changes.items()
    ]


def _cell(pair, found) -> dict[str, Any]:
    """The first network's images, as hexadecimal numbers row by row."""
    one, two = (int((found[f"spread_{n}"][0] > collapse.ACTIVE).sum()) for n in (1, 2))
    nats = [float(found[f"nats_{level}"][0].sum()) for level in (1, 2)]
    return {
        "title": rf"$\beta_1$ = {pair[0]:g}, $\beta_2$ = {pair[1]:g}: {nats[0]:.1f} "
        f"and {nats[1]:.1f} nats,\n{one} and {two} active units",
        "images": [
            [image.tobytes().hex() for image in band] for band in found["images"][0]
        ],
    }


def _panel(config: Config, level: int, linear, found) -> dict[str, Any]:
    """What a level carries against beta_2, for each beta_1."""
    along = lambda one: [(one, two) for two in config.beta_2]
    return {
        "title": f"nats of z_{level}",
        "sets": [
            {
                "label": rf"$\beta_1$ = {one:g}",
                "x": config.beta_2,
                "runs": np.stack(
                    [found[pair][f"nats_{level}"].sum(axis=1) for pair in along(one)],
                    axis=1,
                ),
            }
            for one in config.beta_1
        ],
        "lines": [
            {
                "x": config.beta_2,
                "y": [linear[pair][f"nats_{level}"] for pair in along(one)],
            }
            for one in config.beta_1
        ],
        "line": "linear, at its optimum",
        "xlabel": r"$\beta_2$",
        "ylabel": "nats",
        "xscale": "linear",
        "yscale": "linear",
    }
