"""EM and its relatives never raise the energy; updates as printed elsewhere do."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from latents import (
    covariance_of,
    energy_of,
    largest,
    MODELS,
    planted_covariance,
    point_of,
)

from gradflow.em import (
    AbstractIteration,
    AlternatingMaximization,
    ExpandedMaximization,
    ExpectationMaximization,
    Squarem,
)
from gradflow.iterate import iterate, Iterator
from gradflow.models import (
    AbstractEnergy,
    battery_pattern,
    Block,
    Diagonal,
    Full,
    Isotropic,
    LatentGaussian,
    NegativeLogLikelihood,
)
from gradflow.noise import Residual
from gradflow.solution import RESULTS


ITERATIONS = {
    "em": ExpectationMaximization,
    "expanded": ExpandedMaximization,
    "alternating": AlternatingMaximization,
    "squarem": lambda energy: Squarem(ExpectationMaximization(energy)),
}
# Every scheme for every model that it is for.
DEFAULT = {*((model, "em") for model in MODELS), ("ibfa", "alternating")}
PAIRS = [
    pytest.param(
        model, name, marks=() if (model, name) in DEFAULT else (pytest.mark.slow,)
    )
    for model in MODELS
    for name in ITERATIONS
    if name != "alternating" or model == "ibfa"
]


def _size(model):
    return sum(MODELS[model][0])


@eqx.filter_jit
def _worst_increase(model, name, keys, samples, steps):
    """Over random problems: the largest increase of the energy in a step."""

    def one(key, samples):
        data, start = jr.split(key)
        energy = energy_of(model, covariance_of(data, _size(model), samples))
        iteration = ITERATIONS[name](energy)

        def step(carry, _):
            point, before = carry
            point = iteration.step(point)
            after = energy(point)
            return (point, after), after - before

        point = point_of(model, start)
        (_, last), increases = jax.lax.scan(
            step, (point, energy(point)), None, length=steps
        )
        return jnp.max(increases), last

    return jax.vmap(one)(keys, samples)


@pytest.mark.parametrize(
    ("model", "name", "problems", "steps"),
    [("fa", "em", 60, 20), ("pcca", "em", 60, 20), ("ibfa", "alternating", 60, 20)]
    + [pytest.param(*pair.values, 1000, 100, marks=pytest.mark.slow) for pair in PAIRS],
)
def test_no_step_lowers_the_likelihood(model, name, problems, steps):
    """1000 random problems of each model, a third of them with fewer samples than
    variables: no average log-likelihood falls by more than 1e-10."""
    samples = jnp.where(jnp.arange(problems) % 3 == 0, 4, 30)
    keys = jr.split(jr.key(1), problems)
    worst, last = _worst_increase(model, name, keys, samples, steps)
    assert worst.shape == (problems,) and np.all(np.isfinite(last))
    print(
        f"{model} by {name}: worst increase {np.max(worst):.1e} in {problems} problems"
    )
    assert np.max(worst) <= 1e-10


@pytest.mark.parametrize(("model", "name"), PAIRS)
def test_fixed_points_are_critical_points(getkey, model, name):
    energy = energy_of(model, covariance_of(getkey(), _size(model), 60))
    start = point_of(model, getkey())
    end = iterate(
        ITERATIONS[name](energy), start, tolerance=1e-11, max_steps=50_000, throw=False
    )
    assert end.result == RESULTS.successful
    assert largest(energy.differential(end.point)) < 1e-7
    assert not end.stats["heywood"].any()


@pytest.mark.slow
def test_three_views(getkey):
    """Nothing is special about two."""
    sizes = (2, 3, 2)
    covariance = planted_covariance(getkey(), 7, 1)
    full = Block(tuple(Full.of(np.eye(size)) for size in sizes))
    pattern = battery_pattern(sizes, 1, (1, 1, 0))
    isotropic = Block(tuple(Isotropic.of(1.0, size) for size in sizes))
    for noise, held, kinds in (
        (full, None, ("em", "expanded")),
        (isotropic, pattern, ("em", "expanded", "alternating")),
    ):
        like = energy_of("fa", covariance)
        energy = NegativeLogLikelihood(like.moments, held)
        loadings = jr.normal(getkey(), (7, 3 if held is not None else 1))
        point = energy.held(LatentGaussian(loadings, noise))
        ends = [
            iterate(ITERATIONS[name](energy), point, tolerance=1e-9, max_steps=10**5)
            for name in kinds
        ]
        for end in ends:
            assert end.stats["increase"] <= 1e-12
            np.testing.assert_allclose(end.energy, ends[0].energy, atol=1e-8)


def test_squarem_falls_back_where_extrapolation_fails():
    """A map that converges at once in one direction and runs away in the other is
    extrapolated out of where its energy is finite; the plain step is taken."""

    class Energy(AbstractEnergy):
        def __call__(self, point):
            x = point.loadings[0, 0]
            return jnp.where(x < 3, x**2, jnp.nan)

    energy = Energy()

    class Slow(AbstractIteration):
        energy: Energy

        def step(self, point: Any) -> Any:
            grow = lambda x: 0.999999 * x
            return eqx.tree_at(lambda p: p.loadings, point, grow(point.loadings))

    point = LatentGaussian(jnp.full((6, 1), 1.0), Diagonal(jnp.zeros(6)))
    plain = Slow(energy)
    step = Squarem(plain).step(point)
    assert energy(step) <= energy(plain.step(plain.step(point)))
    assert Squarem(plain).updates == 3 and Squarem(Squarem(plain)).updates == 9


@pytest.mark.slow
def test_acceleration_takes_fewer_updates_to_the_same_place(getkey):
    energy = energy_of("fa", covariance_of(getkey(), 6, 200))
    start = point_of("fa", getkey())
    ends = {
        name: iterate(make(energy), start, max_steps=10**5)
        for name, make in ITERATIONS.items()
        if name != "alternating"
    }
    for end in ends.values():
        np.testing.assert_allclose(end.energy, ends["em"].energy, atol=1e-9)
    updates = {name: int(end.stats["velocities"]) for name, end in ends.items()}
    assert updates["squarem"] < 0.5 * updates["em"]
    assert updates["expanded"] < updates["em"]
    assert ends["squarem"].stats["steps"] * 3 == updates["squarem"]


# Updates as printed by G. Gundersen, wrong; kept here only. Equation numbers are his.


class PrintedPPCA(ExpectationMaximization):
    """(21): the noise is divided by the number of latent variables."""

    energy: NegativeLogLikelihood

    def step(self, point: Any) -> Any:
        after: Any = self.energy.m_step(point, self.energy.e_step(point))
        rows, latents = point.loadings.shape
        wrong = after.noise.log_variance + jnp.log(rows / latents)
        return LatentGaussian(after.loadings, Isotropic(wrong, rows))


class PrintedPCCA(ExpectationMaximization):
    """(29): the noise of a view without what the other view says of it."""

    energy: NegativeLogLikelihood

    def step(self, point: Any) -> Any:
        statistics = self.energy.e_step(point)
        after = self.energy.m_step(point, statistics)
        mean_map, spread = point.posterior_map()
        blocks = []
        for block, start, stop in point.noise.views():
            own = self.energy.covariance[start:stop, start:stop]
            seen = own @ block.solve(point.loadings[start:stop]) @ spread
            wrong = own - seen @ after.loadings[start:stop].T
            blocks.append(Full.of(0.5 * (wrong + wrong.T)))
        del mean_map
        return LatentGaussian(after.loadings, Block(tuple(blocks)))


class PrintedPrivate(AlternatingMaximization):
    """(40): private loadings by a factor analysis of each view, as if they were
    independent."""

    def step(self, point: Any) -> Any:
        pattern = np.asarray(self.energy.pattern)
        loadings, covariance = point.loadings, self.energy.covariance
        private = np.flatnonzero(~pattern.all(axis=0))
        for block, start, stop in point.noise.views():
            own = loadings[start:stop]
            mine = np.array([k for k in private if pattern[start, k]])
            shared = own[:, pattern.all(axis=0)]
            noise = Full.of(block.matrix() + shared @ shared.T)
            mean_map, spread = LatentGaussian(own[:, mine], noise).posterior_map()
            seen = mean_map @ covariance[start:stop, start:stop]
            second = spread + seen @ mean_map.T
            found = jnp.linalg.solve(second, seen).T
            loadings = loadings.at[np.ix_(np.arange(start, stop), mine)].set(found)
        return LatentGaussian(loadings, point.noise)


class PrintedNoise(AlternatingMaximization):
    """(41): noise that makes traces agree, in place of a maximum."""

    def step(self, point: Any) -> Any:
        pattern = np.asarray(self.energy.pattern)
        covariance, blocks = self.energy.covariance, []
        private = np.flatnonzero(~pattern.all(axis=0))
        for block, start, stop in point.noise.views():
            own = point.loadings[start:stop]
            mine = own[:, [k for k in private if pattern[start, k]]]
            shared = own[:, pattern.all(axis=0)]
            noise = Full.of(block.matrix() + shared @ shared.T)
            mean_map, _ = LatentGaussian(mine, noise).posterior_map()
            view = covariance[start:stop, start:stop]
            left = view - view @ mean_map.T @ mine.T - shared @ shared.T
            blocks.append(Isotropic(jnp.log(jnp.trace(left) / len(view)), len(view)))
        return LatentGaussian(point.loadings, Block(tuple(blocks)))


PRINTED = [
    ("ppca", PrintedPPCA),
    pytest.param("pcca", PrintedPCCA, marks=pytest.mark.slow),
    pytest.param("ibfa", PrintedPrivate, marks=pytest.mark.slow),
    pytest.param("ibfa", PrintedNoise, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("model", "printed"), PRINTED)
def test_printed_updates_are_caught(model, printed):
    """Near the optimum of the right scheme, if not before, each of them raises the
    energy; the run ends before that step and says by how much."""

    def one(key):
        data, start = jr.split(key)
        energy = energy_of(model, covariance_of(data, _size(model), 40))
        # From halfway: 30 right steps.
        right = ExpectationMaximization(energy)
        point = jax.lax.fori_loop(
            0, 30, lambda _, p: right.step(p), point_of(model, start)
        )
        end = Iterator(printed(energy), max_steps=300)(point)
        return end, energy(point)

    ends, before = eqx.filter_jit(jax.vmap(one))(jr.split(jr.key(5), 20))
    caught = ends.result == RESULTS.energy_increased
    assert np.mean(caught) > 0.9
    assert np.all(ends.energy <= before + 1e-9)
    assert np.all(ends.stats["increase"][caught] > 1e-10)


def test_the_alternating_scheme_needs_private_latents():
    with pytest.raises(ValueError, match="no pattern, so there are no private latent"):
        AlternatingMaximization(energy_of("fa", jnp.eye(6)))


@pytest.mark.slow
def test_an_alternating_step_by_its_definition(getkey):
    """Each part is the best for what it sees: no small move lowers the expected
    energy."""
    energy = energy_of("ibfa", covariance_of(getkey(), 7, 60))
    point = point_of("ibfa", getkey())
    after: Any = AlternatingMaximization(energy).step(point)
    halfway = LatentGaussian(after.loadings, point.noise)
    statistics = energy.e_step(halfway)
    residual = Residual(
        energy.covariance, statistics.cross, statistics.second, after.loadings
    )
    sizes = MODELS["ibfa"][0]
    traces = np.split(np.asarray(residual.diagonal()), [sizes[0]])
    for block, expected in zip(after.noise.blocks, traces, strict=True):
        np.testing.assert_allclose(jnp.exp(block.log_variance), expected.mean())
    assert energy(after) < energy(halfway) < energy(point)
