# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own energy
#
# Everything in gradflow but the closed forms works for an energy of your own: write
# `__call__`, and its flow can be certified, integrated and studied. This notebook does
# that for two problems that have no closed form here:
#
# 1. matrix completion, where the size of the start decides what is found,
# 2. factoring a symmetric tensor, where some runs end at local minima.
#
# With the environment variable `GRADFLOW_SMOKE=1` it runs at small sizes, to test
# that it runs.

# %%
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np

import gradflow as gf
from gradflow.models import AbstractEnergy


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

SMOKE = os.environ.get("GRADFLOW_SMOKE") == "1"
DRAWS = 16 if SMOKE else 256

plt.rcParams.update(gf.plot.STYLE)

# %% [markdown]
# ## 1. Matrix completion
#
# Some entries of a matrix of rank 2 are known. A network $W_2 W_1$ of full width fits
# them in infinitely many ways. From small starts the flow is known to prefer low rank
# (Gunasekar et al. 2017); does it find the entries it was not shown?


# %%
class Completion(AbstractEnergy):
    """Half the mean squared error on the entries that are known."""

    target: jax.Array
    known: jax.Array

    def __call__(self, network):
        error = jnp.where(self.known, network.matrix() - self.target, 0)
        return 0.5 * jnp.sum(error**2) / jnp.sum(self.known)


rows, columns, mask = jr.split(jr.key(0), 3)
target = jr.normal(rows, (8, 2)) @ jr.normal(columns, (2, 8))
target = target / jnp.std(target)
energy = Completion(target, jr.bernoulli(mask, 0.8, (8, 8)))
print(f"{int(energy.known.sum())} of {energy.known.size} entries are known")

# %% [markdown]
# Before anything else: is the energy what a flow takes it for? Each line is an
# identity, with how far it is from holding.

# %%
small, large = (gf.GaussianInit((8, 8, 8), scale) for scale in (1e-3, 0.3))
print(gf.check_energy(energy, large(jr.key(1)), jr.key(2)))

# %% [markdown]
# A study is three functions: how to start, how to descend, what to look at. Here: is
# the energy 0 to within $10^{-8}$, the least that it can be, and how wrong are the
# entries that were never seen? Runs stop at that energy: a small speed would stop the
# small starts at once, on the plateau where they begin.

# %%
flow = gf.GradientFlow(energy)


def look(solution):
    error = jnp.where(energy.known, 0, solution.point.matrix() - target)
    unseen = jnp.sqrt(jnp.sum(error**2) / jnp.sum(~energy.known))
    return solution.energy <= 1e-8, unseen


def fits(network):
    return energy(network) <= 1e-8


def study(start):
    descend = gf.Integrator(flow, stop=fits, horizon=1e5, tolerance=1e-3)
    return gf.Study(start, descend, look, draws=DRAWS)


found = {
    name: gf.run_study(study(start), jr.key(3)).finding
    for name, start in (("small", small), ("large", large))
}
for name, (fitted, unseen) in found.items():
    print(f"{name} starts: fitted   {gf.fraction(fitted)}")
    print(f"{name} starts: median error of unseen entries {np.median(unseen):.2g}")
    print(f"{name} starts: unseen entries right to 5 %: {gf.fraction(unseen <= 0.05)}")

# %% [markdown]
# Both fit what they were shown; what they were not shown only the small starts find.
# Draw $i$ of both studies has the same key, so the two can be compared in pairs.

# %%
print(gf.paired(found["small"][1] <= 0.05, found["large"][1] <= 0.05))
figure, axes = plt.subplots(figsize=(4.6, 2.6), layout="constrained")
bins = np.geomspace(1e-6, 10, 57)
for (name, (_, unseen)), color in zip(found.items(), ("C0", "C3"), strict=True):
    axes.hist(unseen, bins, color=color, alpha=0.8, label=f"{name} starts")
axes.axvline(0.05, color="black", lw=0.6)
axes.set_xscale("log")
axes.set_xlabel("error of the entries not shown")
axes.set_ylabel(f"runs of {DRAWS}")
axes.legend()
plt.show()

# %% [markdown]
# ## 2. A symmetric tensor
#
# $T = \sum_i a_i \otimes a_i \otimes a_i$ with orthonormal $a_i$; unknown are as many
# vectors $x_i$. The energy is at least 0, so a run whose energy falls to 0 is at a
# global minimum. Others may stop at a critical point: its Hessian says of which kind.


# %%
class Tensor(AbstractEnergy):
    """A half of the squared distance of the sum of cubes from the tensor."""

    target: jax.Array

    def __call__(self, vectors):
        cubes = jnp.einsum("ia,ib,ic->abc", vectors, vectors, vectors)
        return 0.5 * jnp.sum((cubes - self.target) ** 2)


TERMS, SIZE = 3, 5
frame = jnp.linalg.qr(jr.normal(jr.key(4), (SIZE, SIZE)))[0][:TERMS]
tensor = Tensor(jnp.einsum("ia,ib,ic->abc", frame, frame, frame))


class Vectors(eqx.Module):
    """Independent Gaussian entries."""

    scale: float

    def __call__(self, key):
        return self.scale * jr.normal(key, (TERMS, SIZE))


print(gf.check_initializer(Vectors(0.5), jr.key(5)))
cubes = gf.GradientFlow(tensor)


def kind(solution):
    """Is it at 0, the least energy? How steep is it; the Hessian's least eigenvalue?"""
    flat = solution.point.ravel()
    hessian = jax.hessian(lambda x: tensor(x.reshape(TERMS, SIZE)))(flat)
    curvature = jnp.linalg.eigvalsh(hessian)[0]
    return solution.energy <= 1e-8, solution.speed, curvature


ends = gf.Study(Vectors(0.5), gf.Integrator(cubes, tolerance=1e-7), kind, draws=DRAWS)
outcome = gf.run_study(ends, jr.key(6))
best, speed, curvature = outcome.finding
energies = outcome.solution.energy
still = speed <= 1e-6
print("global minimum:              ", gf.fraction(best, ~best & ~still))
for level in np.unique(np.round(energies[~best & still], 6)):
    here = ~best & (np.abs(energies - level) < 1e-6)
    low, high = curvature[here].min(), curvature[here].max()
    print(f"energy {level:.6f}: {gf.fraction(here)}")
    print(f"    least eigenvalue of the Hessian from {low:.1e} to {high:.1e}")
print(f"neither: {int(np.sum(~best & ~still))}")

# %% [markdown]
# At energy 1/2 one term is missing, at 1 two: several vectors point along the same term
# and share it, their cubes add up to it. In that valley the energy is flat, so the
# Hessian can't tell whether a way down leads out of it, and no rule calls these runs
# anything.

# %%
lost = np.flatnonzero(~best & (energies < 0.75))[0]
print(np.round(outcome.solution.point[lost] @ frame.T, 3))
