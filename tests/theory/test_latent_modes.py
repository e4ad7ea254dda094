"""The scalar problem of the VAEs: gaps against brute force over critical points."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from gradflow.theory.latent_modes import LatentModes


def modes(
    variances,
    *,
    stds=None,
    std: float | None = 0.8,
    latent=3,
    rank=None,
    diagonal=False,
):
    array = lambda value: None if value is None else jnp.asarray(value)
    return LatentModes(
        jnp.asarray(variances),
        jnp.asarray(0.7),
        array(std),
        jnp.asarray(1.2),
        array(stds),
        latent,
        latent if rank is None else rank,
        len(variances),
        diagonal,
    )


def assignments(problem, count):
    """Every way to give modes to latents, at most `rank` of them, as variances."""
    values = np.append(np.asarray(problem.variances), 0.0)
    for choice in itertools.product(range(count + 1), repeat=problem.latent):
        real = [i for i in choice if i < count]
        if len(set(real)) == len(real) <= problem.rank:
            yield jnp.asarray(values[list(choice)])


def levels(problem, count):
    found = [
        float(problem._value(taken, problem.stds))
        for taken in assignments(problem, count)
    ]
    return np.unique(np.round(sorted(found), 10))


@pytest.mark.parametrize("stds", [None, (0.6, 0.6), (0.4, 0.9)])
@pytest.mark.parametrize("std", [0.8, None])
def test_gap_is_that_of_all_assignments(stds, std):
    rng = np.random.default_rng(3)
    for rank in (2, 1):
        values = np.sort(rng.uniform(0.1, 3.0, 4))[::-1].copy()
        values[2] = values[1]  # A tie across the edge of what is learned.
        problem = modes(values, stds=stds, std=std, latent=2, rank=rank)
        found = levels(problem, 4)
        assert abs(float(problem.value()) - found[0]) < 1e-9
        assert abs(float(problem.least_gap()) - (found[1] - found[0])) < 1e-8


def test_gap_without_another_critical_value_is_infinite():
    assert np.isinf(modes([0.3, 0.2, 0.1]).least_gap())


def group(problem, chosen, size):
    """The loss of `size` latents of a diagonal covariance that share the modes
    `chosen`, all with columns of equal length, beyond what is constant: q solves
    g (beta eta^2 / s) q^2 - sum(theta) q - (g - p) s = 0."""
    beta, std, prior = 0.7, 0.8, 1.2
    s = beta * std**2 / prior**2
    roots = np.sqrt(np.asarray(problem.variances)[list(chosen)])
    lead = size * prior**2
    total, spare = roots.sum(), (size - len(roots)) * s
    q = (total + np.sqrt(total**2 + 4 * lead * spare)) / (2 * lead)
    if not np.all(roots * q > s):  # A column of no length: another group's point.
        return np.inf
    fit = (s / std**2) * np.sum(roots / q)
    return fit + beta * size * np.log(beta * std**2 / s * q**2)


def partitions(items):
    if not items:
        yield []
        return
    first, *rest = items
    for smaller in partitions(rest):
        yield [[first], *smaller]
        for place in range(len(smaller)):
            yield [*smaller[:place], [first, *smaller[place]], *smaller[place + 1 :]]


@pytest.mark.parametrize(
    "variances", [(3.0, 2.0, 1.2, 0.2), (3.0, 1.1, 0.2, 0.1), (2.0, 1.9, 0.5, 0.46)]
)
def test_gap_of_a_diagonal_covariance_is_that_of_all_groups(variances):
    """Latents of a diagonal covariance may share modes: over all partitions of the
    latents and all modes for each part."""
    problem = modes(variances, diagonal=True)
    beta, std = 0.7, 0.8
    s = beta * std**2 / 1.2**2
    idle = beta * np.log(s)
    values = []
    for parts in partitions(list(range(3))):
        for choice in itertools.product(range(-1, len(parts)), repeat=4):
            learned = [
                [i for i in range(4) if choice[i] == j] for j in range(len(parts))
            ]
            if any(
                len(own) > len(part) for own, part in zip(learned, parts, strict=True)
            ):
                continue
            cost = sum(variances[i] for i in range(4) if choice[i] < 0) / std**2
            for own, part in zip(learned, parts, strict=True):
                cost += group(problem, own, len(part)) if own else idle * len(part)
            values.append(cost)
    found = np.unique(np.round(sorted(v for v in values if np.isfinite(v)), 10))
    assert abs(float(problem.least_gap()) - (found[1] - found[0])) < 1e-8


@pytest.mark.parametrize("stds", [None, (0.4, 0.7, 0.9)])
@pytest.mark.parametrize("std", [0.8, None])
def test_a_mode_collapses_at_its_threshold(stds, std):
    values = (2.5, 1.3, 1.3, 0.4)
    problem = modes(values, stds=stds, std=std)
    for mode in range(3):
        threshold = float(problem.threshold(mode))
        for factor, learned in ((0.999, True), (1.001, False)):
            moved = modes(values, stds=stds, std=std)
            moved = LatentModes(
                moved.variances, jnp.asarray(factor * threshold), *(
                    getattr(moved, name)
                    for name in ("decoder_std", "prior_std", "stds", "latent", "rank",
                                 "dimension", "diagonal")
                )
            )  # fmt: skip
            assert bool(moved.active()[mode]) == learned
    assert float(problem.threshold(3)) == 0
    with pytest.raises(ValueError, match="mode=4 must be from 0 to 3"):
        problem.threshold(4)


def test_learned_decoder_variance_is_stationary():
    """Whatever beta; and it is refused exactly where it would go to 0."""
    for beta in (0.3, 1.0, 1.6, 3.0):
        for stds in (None, (0.4, 0.7)):
            problem = modes((2.5, 1.3, 0.9, 0.4), stds=stds, std=None, latent=2)
            pick = lambda p, b, std: LatentModes(
                p.variances, jnp.asarray(b), std, p.prior_std, p.stds, 2, 2, 4, False
            )
            free = pick(problem, beta, None)
            best = float(jnp.sqrt(free.decoder_variance()))
            around = [
                float(pick(problem, beta, jnp.asarray(best * f)).value())
                + 4 * 2 * np.log(best * f)
                for f in (0.97, 1.0, 1.03)
            ]
            assert around[1] < min(around[0], around[2])
            assert abs(around[1] - float(free.value())) < 1e-12
    zero = modes((2.0, 1.0, 0.0, 0.0), std=None, latent=2)
    assert not bool(zero.bounded())
    assert bool(modes((2.0, 1.0, 0.0, 0.0), std=None, latent=1).bounded())
    assert bool(modes((2.0, 1.0, 0.0), std=None, stds=(0.4, 0.7, 0.9)).bounded())
