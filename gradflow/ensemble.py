"""Many descents at once that do not wait for the slowest.

A vmapped loop runs until its last lane ends; on plateaus most lanes are done long
before. Here a fixed number of lanes is kept busy: once enough lanes have ended, their
ends are stored and they begin anew with the next draws of the queue, all inside one
compiled loop. Every draw is begun in a group of the same size and stepped among the
same number of lanes, so it comes out the same to the last bit, whatever the others do.
"""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from .descent import Descent, End, RESULTS, Solution, State
from .solve import Integrator
from .solvers.step_control import root_mean_square
from .types import Key, P


# Draws per lane whose ends stay on the device until they are fetched together. While
# the last of them end the other lanes idle, so a longer queue wastes less.
QUEUE = 32
# The share of lanes that must have ended before they begin anew: a larger one leaves
# more lanes idle, a smaller one starts so few at once that vectors stay empty.
SHARE = 16


def descend(
    integrator: Integrator[P],
    initialize: Callable[[Key], P],
    key: Key,
    draws: int,
    lanes: int,
) -> Iterator[tuple[Solution[P], dict[str, int]]]:
    """The solutions of draws 0, 1, ... in blocks as they are done, as numpy arrays
    with a leading axis of draws; and the steps that the lanes took: `used` and `all`.

    Draw i starts at `initialize(fold_in(key, i))`.
    """
    lanes = min(lanes, draws)
    # One size of block, a multiple of the lanes: nothing is compiled twice.
    size = lanes * min(QUEUE, -(-draws // lanes))
    for first in range(0, draws, size):
        yield _block(
            integrator, initialize, key, first, min(size, draws - first), size, lanes
        )


def _block(integrator, initialize, key, first, count, size, lanes):
    like = eqx.filter_eval_shape(initialize, key)
    dtype = jnp.result_type(*jax.tree.leaves(like))
    # The descents look at the kind of the point only, never at its numbers.
    descents, end = integrator.descents(like), integrator.end(dtype)
    starts = _Starts(initialize, key, jnp.asarray(first))
    ends, rounds = _pass(descents[0], starts, end, jnp.asarray(count), size, lanes)
    steps = {"used": 0, "all": int(rounds) * lanes}
    for descent in descents[1:]:
        exhausted = np.asarray(ends.result == RESULTS.max_steps_reached)[:count]
        left = np.flatnonzero(exhausted)
        if left.size == 0:
            break
        # Few sizes, so that few are compiled: padded by draws that never begin.
        room = min(size, 2 ** int(left.size - 1).bit_length())
        which = jnp.asarray(np.resize(left, room))
        few = min(lanes, room)
        later, rounds = _pass(
            descent, _Later(ends, which), end, jnp.asarray(left.size), room, few
        )
        steps["all"] += int(rounds) * few
        ends = _merged(ends, later, which, jnp.asarray(left.size))
    steps["used"] = int(jnp.sum((ends.steps + ends.rejected)[:count]))
    solution = jax.device_get(_solutions(descents[0], starts, ends, lanes))
    return jax.tree.map(lambda leaf: np.array(leaf[:count]), solution), steps


class _Starts(eqx.Module):
    """The first descent of a draw begins where the study says."""

    initialize: Callable[[Key], Any]
    key: Key
    first: Int[Array, ""]

    def point(self, draw):
        return self.initialize(jax.random.fold_in(self.key, self.first + draw))

    def __call__(self, descent: Descent, draw, zero) -> State:
        return descent.init(self.point(draw), zero)


class _Later(eqx.Module):
    """A later one goes on where the one before it ran out of steps."""

    ends: End
    which: Int[Array, " draws"]

    def __call__(self, descent: Descent, draw, zero) -> State:
        del zero
        end = jax.tree.map(lambda leaf: leaf[self.which[draw]], self.ends)
        return descent.take_over(end)


@eqx.filter_jit
def _pass(descent, begin, horizon, count, size: int, lanes: int):
    """The ends of draws 0 to `count` (of `size` places), and the rounds it took."""
    group = max(1, lanes // SHARE)
    zero = jnp.zeros_like(horizon)
    start = lambda draw: begin(descent, draw, zero)
    shape = eqx.filter_eval_shape(start, 0)
    arrays, static = eqx.partition(shape, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    filled = lambda rows: jax.tree.map(
        lambda leaf: jnp.zeros((rows, *leaf.shape), leaf.dtype), arrays
    )
    states = eqx.tree_at(
        lambda s: s.finished, filled(lanes), jnp.ones((lanes,), dtype=bool)
    )
    ends = _kept(eqx.combine(filled(size), static))
    nobody = jnp.full((lanes,), size)

    def refill(carry):
        states, draws, ends, following, rounds = carry
        # Lanes with an end to store, then idle ones, then those at work.
        rank = jnp.where(states.finished, jnp.where(draws < size, 0, 1), 2)
        chosen = jnp.argsort(rank, stable=True)[:group]
        free = rank[chosen] < 2
        old = jax.tree.map(lambda leaf: leaf[chosen], states)
        ends = jax.tree.map(
            lambda to, leaf: to.at[jnp.where(free, draws[chosen], size)].set(
                leaf, mode="drop"
            ),
            ends,
            _kept(eqx.combine(old, static)),
        )
        new = following + jnp.cumsum(free) - 1
        begins = free & (new < count)
        begun = jax.vmap(start)(jnp.minimum(new, count - 1))
        begun = eqx.filter(begun, eqx.is_array)
        states = jax.tree.map(
            lambda to, one, other: to.at[chosen].set(_choose(begins, one, other)),
            states,
            begun,
            old,
        )
        draws = draws.at[chosen].set(
            jnp.where(begins, new, jnp.where(free, size, draws[chosen]))
        )
        return states, draws, ends, following + jnp.sum(begins), rounds

    def working(carry):
        states, draws, _, following, _ = carry
        ended = jnp.sum(states.finished & (draws < size))
        idle = (following < count) & jnp.any(draws == size)
        return (ended < group) & jnp.any(~states.finished) & ~idle

    def step(carry):
        states, draws, ends, following, rounds = carry
        whole = eqx.combine(states, static)
        new = jax.vmap(lambda state: descent.step(state, horizon))(whole)
        new = eqx.filter(new, eqx.is_array)
        states = jax.tree.map(
            lambda one, other: _choose(states.finished, one, other), states, new
        )
        return states, draws, ends, following, rounds + 1

    def unfinished(carry):
        _, draws, _, following, _ = carry
        return (following < count) | jnp.any(draws < size)

    carry = (states, nobody, ends, jnp.zeros_like(count), jnp.zeros((), dtype=int))
    carry = jax.lax.while_loop(
        unfinished,
        lambda carry: jax.lax.while_loop(working, step, refill(carry)),
        carry,
    )
    return carry[2], carry[4]


def _kept(state: State) -> End:
    return End(
        state.point,
        state.time,
        state.steps,
        state.rejected,
        state.result,
        state.broken,
        state.start,
    )


def _choose(condition, one, other):
    """`one` for the rows where `condition` holds."""
    rows = condition.reshape(condition.shape + (1,) * (one.ndim - 1))
    return jnp.where(rows, one, other)


@eqx.filter_jit
def _merged(ends, later, which, count):
    """The ends of a later descent in the places of those that it took over."""
    places = jnp.where(jnp.arange(which.size) < count, which, ends.time.size)
    before = jax.tree.map(lambda leaf: leaf[which], ends)
    later = eqx.tree_at(
        lambda end: (end.steps, end.rejected),
        later,
        (before.steps + later.steps, before.rejected + later.rejected),
    )
    return jax.tree.map(
        lambda to, leaf: to.at[places].set(leaf, mode="drop"), ends, later
    )


@eqx.filter_jit
def _solutions(descent, starts, ends, lanes: int):
    def one(draw_and_end):
        draw, end = draw_and_end
        solution = descent.solution(end)
        moved = jax.tree.map(jnp.subtract, end.point, starts.point(draw))
        size = root_mean_square(end.point)
        distance = root_mean_square(moved) / jnp.where(size > 0, size, 1)
        return eqx.tree_at(lambda s: s.distance, solution, distance)

    # As many at once as there are lanes, so that sums are rounded alike.
    places = jnp.arange(ends.time.size)
    return jax.lax.map(one, (places, ends), batch_size=lanes)
