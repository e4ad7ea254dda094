"""Random problems of linear VAEs of every kind, and their least loss the hard way.

A problem is an energy, a point of the right shape, and what its theory is told. Those
of one shape share one compiled program, so that hundreds are cheap.
"""

import contextlib
import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.optimize import minimize

from gradflow import collapse
from gradflow.critical import KIND
from gradflow.models import (
    ConditionalELBO,
    HierarchicalELBO,
    LinearCVAE,
    LinearHVAE,
    LinearVAE,
    NegativeELBO,
)
from gradflow.moments import Moments
from gradflow.statistics import fraction
from gradflow.theory import CVAETheory, HVAETheory, VAETheory
from gradflow.types import names_of


# Distances of the closed form from strong minimization, of all problems so far.
GAPS: list[float] = []
WITHIN = 1e-9
LEARNED = ("full", "diagonal", "root")
FIXED = ("isotropic", "diagonal fixed", "general")


@dataclasses.dataclass
class Problem:
    energy: Any
    like: Any
    theory: Any


def second_moment(rng, variances, size):
    """With these eigenvalues, and zeros, in random directions."""
    q, _ = np.linalg.qr(rng.normal(size=(size, size)))
    values = np.zeros(size)
    values[: len(variances)] = variances
    matrix = (q * values) @ q.T
    return jnp.asarray((matrix + matrix.T) / 2)


def autoencoding(xx):
    return Moments(xx, xx, xx, count=1, autoencoding=True)


def covariance(rng, kind, size):
    """A fixed covariance: isotropic, diagonal or neither."""
    if kind == "isotropic":
        return jnp.asarray(rng.uniform(0.3, 1.2) ** 2 * np.eye(size))
    values = rng.uniform(0.3, 1.2, size) ** 2
    if kind == "diagonal":
        return jnp.diag(jnp.asarray(values))
    return second_moment(rng, values, size)


def numbers(rng) -> Any:
    return dict(
        decoder_std=float(rng.uniform(0.6, 1.1)), prior_std=float(rng.uniform(0.7, 1.4))
    )


def vae(rng, x, latent, kind="full", *, rank_x=None, learn_decoder=False, hidden=None):
    """`kind`: of a learned covariance (full, diagonal, root) or of a fixed one."""
    variances = np.sort(rng.uniform(0.05, 3.0, rank_x or x))[::-1]
    fixed = kind in ("isotropic", "diagonal fixed", "general")
    energy = NegativeELBO(
        autoencoding(second_moment(rng, variances, x)),
        beta=float(rng.uniform(0.4, 1.6)),
        covariance=covariance(rng, kind.removesuffix(" fixed"), latent)
        if fixed
        else None,
        **(numbers(rng) | ({"decoder_std": None} if learn_decoder else {})),
    )
    hidden = hidden or ((), ())
    rank = min((latent, *hidden[0], *hidden[1]))
    return Problem(
        energy,
        LinearVAE.zeros(
            x,
            latent,
            covariance=None if fixed else kind,
            learn_decoder=learn_decoder,
            hidden=hidden,
        ),
        lambda energy: VAETheory(
            energy, latent, rank=rank, diagonal=kind == "diagonal"
        ),
    )


def joint_moments(rng, x, y, *, rank_x=None, noise=1.0):
    """Of x, singular where rank_x < x, and y, partly a linear map of it."""
    x_data = rng.normal(size=(40, rank_x or x)) @ rng.normal(size=(rank_x or x, x))
    y_data = x_data @ rng.normal(size=(x, y)) * 0.5
    y_data = y_data + noise * rng.normal(size=(40, y)) @ rng.normal(size=(y, y))
    return Moments.from_data(x_data, y_data)


def cvae(
    rng, x, y, latent, kind="full", *, rank_x=None, learn_decoder=False, hidden=None
):
    fixed = kind in ("isotropic", "diagonal fixed", "general")
    energy = ConditionalELBO(
        joint_moments(rng, x, y, rank_x=rank_x),
        beta=float(rng.uniform(0.4, 1.6)),
        covariance=covariance(rng, kind.removesuffix(" fixed"), latent)
        if fixed
        else None,
        **(numbers(rng) | ({"decoder_std": None} if learn_decoder else {})),
    )
    deep = hidden is not None
    hidden = hidden or ((), (), (), ())
    rank = min((latent, *hidden[0], *hidden[1], *hidden[2]))
    return Problem(
        energy,
        LinearCVAE.zeros(
            x,
            y,
            latent,
            covariance=None if fixed else kind,
            learn_decoder=learn_decoder,
            hidden=hidden,
        ),
        lambda energy: CVAETheory(
            energy, latent, rank=rank, diagonal=kind == "diagonal", deep=deep
        ),
    )


def hvae(rng, x, latents, kinds, *, rank_x=None, betas=None, hidden=None):
    """`kinds`: of the two covariances, as for `vae`."""
    variances = np.sort(rng.uniform(0.1, 2.2, rank_x or x) ** 2)[::-1]
    fixed = [kind in ("isotropic", "diagonal fixed", "general") for kind in kinds]
    sigmas = [
        covariance(rng, kind.removesuffix(" fixed"), size) if still else None
        for kind, size, still in zip(kinds, latents, fixed, strict=True)
    ]
    betas = rng.uniform(0.5, 2.0, 2) if betas is None else betas
    energy = HierarchicalELBO(
        autoencoding(second_moment(rng, variances, x)),
        beta_1=float(betas[0]),
        beta_2=float(betas[1]),
        covariance_1=sigmas[0],
        covariance_2=sigmas[1],
        **numbers(rng),
    )
    hidden = hidden or ((), (), (), ())
    return Problem(
        energy,
        LinearHVAE.zeros(
            x,
            *latents,
            covariance_1=None if fixed[0] else kinds[0],
            covariance_2=None if fixed[1] else kinds[1],
            hidden=hidden,
        ),
        lambda energy: HVAETheory(
            energy,
            *latents,
            rank_1=min((latents[0], *hidden[0], *hidden[2])),
            rank_2=min((*latents, *hidden[1], *hidden[3])),
        ),
    )


@eqx.filter_jit
def _value_and_gradient(energy, flat, like):
    rebuild = ravel_pytree(like)[1]
    return jax.value_and_grad(lambda v: energy(rebuild(v)))(flat)


def minimized(problem, rng, starts=6, scale=0.7):
    """The best end of L-BFGS from random starts, and the worst, and the best point."""
    flat, rebuild = ravel_pytree(problem.like)

    def evaluate(v):
        value, gradient = _value_and_gradient(
            problem.energy, jnp.asarray(v), problem.like
        )
        return float(value), np.asarray(gradient)

    ends = []
    for _ in range(starts):
        start = np.asarray(flat) + scale * rng.normal(size=flat.size)
        options = {"ftol": 0.0, "gtol": 1e-11, "maxiter": 20000, "maxfun": 40000}
        end: Any = None
        for _ in range(3):  # Its line search gives up early: begin anew.
            options["maxcor"] = 30
            end = minimize(
                evaluate, start, jac=True, method="L-BFGS-B", options=options
            )
            start = end.x
        ends.append((end.fun, end.x))
    ends.sort(key=lambda end: end[0])
    return ends[0][0], ends[-1][0], rebuild(jnp.asarray(ends[0][1]))


def largest(tree):
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.size > 0]
    return max(float(jnp.max(jnp.abs(leaf))) for leaf in leaves)


@contextlib.contextmanager
def counted():
    """Prints how many problems agreed, and the totals of this process, for `-rP`."""
    first = len(GAPS)
    yield
    for what, gaps in (("", GAPS[first:]), (" so far", GAPS)):
        right = sum(gap <= WITHIN for gap in gaps)
        worst = max(gaps, default=0.0)
        print(f"{right} of {len(gaps)} problems{what}, worst gap {worst:.2g}")


def compared(best, least):
    GAPS.append(abs(best - least))
    assert GAPS[-1] <= WITHIN


def all_global(outcome):
    """Every draw is certified to end at a global minimum; prints how many."""
    kinds = names_of(KIND, outcome.finding.kind)
    print(f"certified at the least value: {fraction(kinds == 'global_minimum')}")
    assert (kinds == "global_minimum").all()


def agrees(problem, rng, starts=6):
    """The closed form against strong minimization; returns whether it was possible."""
    known = problem.theory(problem.energy)
    best, _, point = minimized(problem, rng, starts=starts)
    least = float(known.optimal_energy())
    compared(best, least)
    optimum = known.optimum()
    assert abs(float(problem.energy(optimum)) - least) <= 1e-9
    # Stationary, whatever size the terms have.
    size = 1 + abs(least) + float(jnp.trace(problem.energy.moments.yy))
    assert largest(problem.energy.differential(optimum)) < 1e-10 * size
    return known, point


def spectra_agree(problem, known, point):
    for name, wanted in known.spectra().items():
        if name == "covariance" and known.modes.stds is not None:
            continue  # It is given.
        found = collapse.spectra(problem.energy, point)[name]
        close = np.abs(np.sort(found) - np.sort(wanted))
        # Near its threshold a mode's loss is quartic, and 1e-15 of it 1e-4 of omega.
        assert close.max() <= 1e-6 or float(known.gap) < 1e-3, (name, close)
