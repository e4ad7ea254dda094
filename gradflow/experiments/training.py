"""Networks trained from samples with Adam, which go on after being stopped.

Each network is one draw of a `Store`, and while it is trained its weights and Adam's
moments are kept every so many steps. Step k of a draw depends on the seed, the draw and
k only, so what is resumed ends at the same bits.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from cyclopts import Parameter
from tqdm import tqdm

from ..environment import environment, versions
from ..precision import find_device
from ..store.checkpoint import Checkpoint
from ..store.folder import Store
from ..types import Key
from .base import LARGEST_COUNT, LARGEST_SEED, one_of, positive, whole_number


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How networks are trained. Units stand beside each field.

    **Raises:** `ValueError` for any value out of range.
    """

    images: str | None = None
    "Folder of the published MNIST files; else Gaussian samples with its moments."
    draws: int = 3
    "Networks per row of the table, from different initial weights."
    seed: int = 0
    "A network depends on the seed, its row and its number only."
    latents: int = 16
    "Size of each latent space."
    width: int = 256
    "Units of a hidden layer."
    depth: int = 2
    "Hidden layers of each map."
    steps: int = 1500
    "Of Adam."
    rate: float = 1e-3
    "Adam's step size at first; it falls to 0 linearly."
    batch: int = 128
    "Samples per step, drawn with replacement."
    every: int = 250
    "Steps after which a network under way is kept; changes no network."
    decoder_std: float = 1.0
    "Standard deviation of pixels given the latents."
    prior_std: float = 1.0
    "Standard deviation of the last latents."
    epsilon: float = 0.1
    "Nats below which a latent of a sample counts as collapsed in the table."
    delta: float = 0.05
    "Share of samples that may be above."
    dtype: Literal["float64", "float32"] = "float32"
    "Arithmetic."
    device: Literal["cpu", "gpu", "tpu"] | None = None
    "Where to run; by default jax's own choice."

    def __post_init__(self):
        counts = ("draws", "latents", "width", "depth", "steps", "batch", "every")
        for name in counts:
            whole_number(self, name, least=1, most=LARGEST_COUNT)
        whole_number(self, "seed", least=0, most=LARGEST_SEED)
        for name in ("rate", "decoder_std", "prior_std", "epsilon"):
            positive(self, name)
        if not isinstance(self.delta, float) or not 0 <= self.delta < 1:
            raise ValueError(f"delta must be at least 0 and below 1, got {self.delta}")
        one_of(self, "dtype", ("float64", "float32"))
        if self.device is not None:
            one_of(self, "device", ("cpu", "gpu", "tpu"))


class Network(eqx.Module):
    """What is trained: `start` makes a point from a `key`, `loss` takes a point and one
    sample (of the first `count` rows of each of `data`) with a key, and `measure` says
    of a trained point, as arrays, what is to be kept of it."""

    start: Callable[..., Any]
    loss: Callable[..., Any]
    data: tuple[Any, ...]
    count: Any
    measure: Callable[[Any, Key], dict[str, np.ndarray]]


def train(
    networks: dict[str, Network],
    config: TrainingConfig,
    *,
    data: str,
    progress: bool | None = None,
    store: Store | None = None,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, float]]:
    """Of each network what was measured, with a leading axis of draws, and the seconds.

    `data`: what the samples are; a store of others is refused. To be called within
    `precision`.

    **Raises:** `RuntimeError` if the store can't be written.
    """
    cells = {}
    if store is not None:
        for name in networks:
            fields = {"data": data, "key": config.seed}
            cells[name] = store.cell(name, config.draws, fields, versions())
    total = len(networks) * config.draws * config.steps
    found, began = {}, time.perf_counter()
    hide = None if progress is None else not progress
    with tqdm(total=total, unit=" steps", disable=hide) as bar:
        for name, network in networks.items():
            bar.set_description(name, refresh=False)
            parts = []
            for draw in range(config.draws):
                parts.append(_draw(network, config, draw, store, cells.get(name), bar))
            found[name] = {
                key: np.stack([part[key] for part in parts]) for key in parts[0]
            }
    return found, {"all": time.perf_counter() - began}


def _draw(network, config, draw, store, cell, bar) -> dict[str, np.ndarray]:
    if store is None:
        return _trained(network, config, draw, None, bar)
    if draw in cell.done:
        bar.update(config.steps)
        return {key: array[0] for key, array in cell.read(draw)[0].items()}
    checkpoint = Checkpoint(cell, draw)
    try:
        arrays = _trained(network, config, draw, checkpoint, bar)
        rows = {key: array[None] for key, array in arrays.items()}
        made = environment(config.dtype, find_device(config.device))
        cell.write(draw, rows, made)
    except OSError as error:
        raise store.full(cell, draw, error) from error
    checkpoint.remove()
    return arrays


def _trained(network, config, draw, checkpoint, bar) -> dict[str, np.ndarray]:
    begin, run, last = jr.split(jr.fold_in(jr.key(config.seed), draw), 3)
    point = network.start(key=begin)
    weights, rest = eqx.partition(point, eqx.is_inexact_array)
    state = weights, optax.scale_by_adam().init(weights)
    step = 0
    if checkpoint is not None:
        step, state = _resumed(checkpoint, state)
    bar.update(step)
    scale = jnp.asarray(config.rate), jnp.asarray(config.steps)
    while step < config.steps:
        until = min(config.steps, step + config.every)
        bounds = jnp.asarray(step), jnp.asarray(until)
        state = _advanced(
            network.loss, network.data, network.count, rest, state, run, scale, bounds,
            batch=config.batch,
        )  # fmt: skip
        if checkpoint is not None and until < config.steps:
            checkpoint.write(until, _named(state))
        bar.update(until - step)
        step = until
    return network.measure(eqx.combine(state[0], rest), last)


@eqx.filter_jit
def _advanced(loss, data, count, rest, state, key, scale, bounds, *, batch: int):
    """The state after some more steps. Their numbers are traced: one program does for
    any piece of the way."""
    optimizer, (rate, steps) = optax.scale_by_adam(), scale

    def step(number, state):
        weights, memory = state
        chosen, drawn = jr.split(jr.fold_in(key, number))
        rows = jr.randint(chosen, (batch,), 0, count)
        keys = jr.split(drawn, batch)
        samples = [array[rows] for array in data]

        def mean(weights):
            point = eqx.combine(weights, rest)
            one = lambda key, *sample: loss(point, *sample, key=key)
            return jnp.mean(jax.vmap(one)(keys, *samples))

        # Adam raises a float to the power of a count, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            change, memory = optimizer.update(jax.grad(mean)(weights), memory)
        now = -rate * ((steps - number) / steps).astype(rate.dtype)
        change = jax.tree.map(lambda leaf: now * leaf, change)
        return optax.apply_updates(weights, change), memory

    return jax.lax.fori_loop(bounds[0], bounds[1], step, state)


def _named(state) -> dict[str, np.ndarray]:
    leaves = jax.tree.leaves(state)
    return {f"leaf-{i:03d}": np.asarray(leaf) for i, leaf in enumerate(leaves)}


def _resumed(checkpoint: Checkpoint, state) -> tuple[int, Any]:
    """Where a draw was stopped, or its beginning."""
    saved = checkpoint.read()
    if saved is None:
        return 0, state
    step, arrays = saved
    shapes = lambda named: {key: (a.shape, a.dtype) for key, a in named.items()}
    if shapes(arrays) != shapes(_named(state)):  # of other versions
        return 0, state
    leaves = [jnp.asarray(arrays[name]) for name in sorted(arrays)]
    return step, jax.tree.unflatten(jax.tree.structure(state), leaves)
