"""Many descents at once that do not wait for the slowest.

A vmapped loop runs until its last lane ends; on plateaus most lanes are done long
before. Here a fixed number of lanes is kept busy: once enough lanes have ended, their
ends are stored and they begin anew with the next draws of the queue, all inside one
compiled loop. Every draw is begun in a group of the same size and stepped among the
same number of lanes, so it comes out the same to the last bit, whatever the others do.
"""

import itertools
import queue
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .descent import AbstractDescent, Descent, End, handed_over, State
from .iterate import Iterator
from .lanes.base import Lanes
from .lanes.chebyshev import chebyshev_lanes
from .lanes.explicit import explicit_lanes
from .layout import AUTO, layout_of
from .solution import Solution
from .solve import Integrator
from .solvers.step_control import root_mean_square
from .types import Key, P


# Draws per lane whose ends stay on the device until they are fetched together: while
# the last of them end the other lanes idle, so a longer queue wastes less. Shorter
# where the states of its draws, `STATE` times as large as their points, would take
# more than `MEMORY` bytes.
QUEUE = 128
MEMORY = 2**28
STATE = 8
# One lane in so many must have ended before the ended ones begin anew: the fewer must,
# the fewer idle, but to begin has a price of its own.
SHARE = 32


def descend(
    integrator: Integrator[P] | Iterator[P],
    initialize: Callable[[Key], P],
    key: Key,
    draws: Sequence[range],
    lanes: int,
    devices: Sequence[Any] = (),
    *,
    whole: int | None = None,
    most: int | None = None,
) -> Generator[tuple[Solution[P], dict[str, int]], None, None]:
    """The solutions of `draws` in blocks as they are done, as numpy arrays with a
    leading axis of draws; and the work that the lanes did, `used` and `all`: in
    velocities, or in trial steps where these are not counted.

    Draw i starts at `initialize(fold_in(key, i))`. Given several `devices`, each takes
    the next block when it is done with its last one.

    **Arguments:**

    - `draws`: parts of a study. A draw comes out the same to the last bit whatever
      other parts are in the same call.
    - `whole`: the draws of a part that is not cut short, which number the lanes. By
      default of the longest.
    - `most`: the draws of the longest call there will be, for which is compiled. By
      default of this one.
    """
    count = sum(map(len, draws))
    share = lambda draws: -(-draws // max(1, len(devices)))
    whole = max(map(len, draws)) if whole is None else whole
    lanes = min(lanes, share(whole))
    # One size of block, a multiple of the lanes: nothing is compiled twice.
    like = eqx.filter_eval_shape(initialize, key)
    point = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
    room = max(1, MEMORY // (STATE * point * lanes))
    rows = lambda draws: lanes * min(room, QUEUE, -(-share(draws) // lanes))
    size = max(rows(whole), rows(most or count))
    # Those handed over are taken on among those of their unit: part of a part, which
    # does not depend on the call.
    unit = rows(whole)
    units = [part[i : i + unit] for part in draws for i in range(0, len(part), unit)]
    blocks = _packed(units, min(size, max(unit, lanes * -(-share(count) // lanes))))
    run = lambda block: _block(integrator, initialize, key, block, size, lanes)
    if len(devices) < 2:
        yield from map(run, blocks)
        return
    idle = queue.SimpleQueue()
    for device in devices:
        idle.put(device)
    wide = jnp.result_type(float) == jnp.float64

    def run_somewhere(block):
        device = idle.get()
        try:
            # What a `with` sets holds for one thread only.
            with jax.enable_x64(wide), jax.default_device(device):
                return run(block)
        finally:
            idle.put(device)

    with ThreadPoolExecutor(len(devices)) as pool:
        try:
            yield from pool.map(run_somewhere, blocks)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _packed(units: list[range], size: int) -> list[list[range]]:
    """Blocks of units in their order, each of at most `size` draws."""
    blocks, draws = [], size
    for unit in units:
        if draws + len(unit) > size:
            blocks.append([])
            draws = 0
        blocks[-1].append(unit)
        draws += len(unit)
    return blocks


def _block(integrator, initialize, key, units, size, lanes):
    like = eqx.filter_eval_shape(initialize, key)
    dtype = jnp.result_type(*jax.tree.leaves(like))
    # The descents look at the kind of the point only, never at its numbers.
    descents, end = integrator.descents(like), integrator.end(dtype)
    layout = integrator.layout if isinstance(integrator, Integrator) else AUTO
    kept = lanes_of(descents[0], like, layout)
    numbers = np.concatenate([np.asarray(unit) for unit in units])
    count = numbers.size
    # Padded by draws that never begin.
    padded = jnp.asarray(np.resize(numbers, size))
    starts, states = _begin(kept, initialize, key, padded, jnp.asarray(count), lanes)
    ends, rounds = _pass(kept, states, end, jnp.asarray(count), lanes)
    steps = {"used": 0, "all": 0}
    _account(steps, kept, ends, count, rounds, lanes)
    for descent in descents[1:]:
        kept = lanes_of(descent, like, layout)
        over = np.asarray(handed_over(ends.result))[:count]
        # A lane of columns that idles costs next to nothing: there it is one size, and
        # so a draw comes out the same whatever else is in the block.
        for left in [np.flatnonzero(over)] if kept.axis else _by_unit(over, units):
            if left.size == 0:
                continue
            # Few sizes, so that few are compiled.
            room = 2 ** int(left.size - 1).bit_length()
            few = lanes if kept.axis else min(lanes, room)
            room = few * -(-room // few)
            which = jnp.asarray(np.resize(left, room))
            states = _take_over(kept, ends, which, few)
            later, rounds = _pass(kept, states, end, jnp.asarray(left.size), few)
            _account(steps, kept, later, left.size, rounds, few)
            ends = _merged(ends, later, which, jnp.asarray(left.size))
    if any(isinstance(other, Descent) and not other.tells for other in descents):
        # All or none, whether or not a draw came to that descent.
        ends = eqx.tree_at(lambda e: e.velocities, ends, None, is_leaf=_is_none)
    found = _solutions(descents[0], starts, ends, jnp.asarray(count), lanes)
    solution = jax.device_get(found)
    return jax.tree.map(lambda leaf: np.array(leaf[:count]), solution), steps


def _by_unit(over, units):
    """The places of those handed over in each unit."""
    firsts = np.cumsum([0, *map(len, units)])
    return [
        first + np.flatnonzero(over[first:end])
        for first, end in itertools.pairwise(firsts)
    ]


def _is_none(leaf):
    return leaf is None


def lanes_of(descent: AbstractDescent, like: Any, asked: str = AUTO) -> Lanes:
    """The fastest lanes there are for this descent of points like `like`, in the
    layout that was asked for."""
    if not isinstance(descent, Descent):
        return Lanes(descent)
    layout = layout_of(descent, like, asked)
    if descent.audit is not None:
        return Lanes(descent)
    return (
        chebyshev_lanes(descent, layout)
        or explicit_lanes(descent, layout)
        or Lanes(descent)
    )


def _account(steps, kept, ends, count, rounds, lanes):
    """Adds up the work of a pass: in velocities where these are counted, or else in
    trial steps."""
    if kept.turns is None:
        used, turns = ends.steps + ends.rejected, 1
    else:
        # Two were for the first step size, before the rounds.
        used, turns = ends.velocities - 2, kept.turns
    steps["used"] += int(np.sum(np.asarray(used)[:count]))
    steps["all"] += int(rounds) * turns * lanes


@eqx.filter_jit
def _begin(kept: Lanes, initialize, key, draws, count, lanes: int):
    """The starts of a block and the states of their runs."""
    # As many at once as there are lanes: a matrix that is factored alone comes out
    # otherwise, in the last bit, than in company.
    begin = jax.vmap(lambda draw: initialize(jax.random.fold_in(key, draw)))
    starts = _joined(_chunked(begin, draws, count, lanes))
    times = jnp.zeros(draws.shape, jnp.result_type(*jax.tree.leaves(starts)))
    states = _chunked(lambda chunk: kept.begin(*chunk), (starts, times), count, lanes)
    return starts, _joined(states, kept.axis)


@eqx.filter_jit
def _take_over(kept: Lanes, ends, which, lanes: int):
    rows = jax.tree.map(lambda leaf: leaf[which], ends)
    return _joined(_chunked(kept.take_over, rows, which.size, lanes), kept.axis)


def _chunked(function, rows, count, lanes):
    """`function` of as many rows at a time as there are lanes, up to `count` rows; what
    is beyond is 0."""
    chunks = jax.tree.map(lambda leaf: leaf.reshape(-1, lanes, *leaf.shape[1:]), rows)
    number = len(jax.tree.leaves(chunks)[0])
    one = lambda i: function(jax.tree.map(lambda leaf: leaf[i], chunks))
    made = jax.tree.map(
        lambda leaf: jnp.zeros((number, *leaf.shape), leaf.dtype),
        jax.eval_shape(one, 0),
    )
    put = lambda i, made: jax.tree.map(
        lambda leaf, new: leaf.at[i].set(new), made, one(i)
    )
    return jax.lax.fori_loop(0, -(-count // lanes), put, made)


def _joined(chunks, axis: int = 0):
    """Chunks side by side."""
    if axis == 0:
        joined = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])
    else:
        joined = lambda leaf: jnp.moveaxis(leaf, 0, -2).reshape(*leaf.shape[1:-1], -1)
    return jax.tree.map(joined, chunks)


@eqx.filter_jit
def _pass(kept: Lanes, begun: State, horizon, count, lanes: int):
    """The ends of draws 0 to `count` of those begun, and the rounds it took."""
    group = max(1, lanes // SHARE)
    axis, size = kept.axis, begun.time.size
    begun, static = eqx.partition(begun, eqx.is_array)
    taken = lambda tree, places: jax.tree.map(
        lambda leaf: jnp.take(leaf, places, axis=axis, mode="clip"), tree
    )

    def put(tree, places, rows):
        where = (
            (lambda leaf: leaf.at[places])
            if axis == 0
            else (lambda leaf: leaf.at[..., places])
        )
        return jax.tree.map(
            lambda leaf, new: where(leaf).set(new, mode="drop"), tree, rows
        )

    places = jnp.arange(lanes)
    states = taken(begun, places)
    states = eqx.tree_at(
        lambda s: s.finished, states, states.finished | (places >= count)
    )
    draws = jnp.where(places < count, places, size)
    ends = jax.tree.map(jnp.zeros_like, _kept(begun))

    def refill(carry):
        states, draws, ends, following, rounds = carry
        # Lanes with an end to store, then idle ones, then those at work.
        rank = jnp.where(states.finished, jnp.where(draws < size, 0, 1), 2)
        chosen = jnp.argsort(rank, stable=True)[:group]
        free = rank[chosen] < 2
        old = taken(states, chosen)
        ends = put(ends, jnp.where(free, draws[chosen], size), _kept(old))
        new = following + jnp.cumsum(free) - 1
        begins = free & (new < count)
        states = put(states, jnp.where(begins, chosen, lanes), taken(begun, new))
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
        states = kept.step(eqx.combine(states, static), horizon)
        states = eqx.filter(states, eqx.is_array)
        return states, draws, ends, following, rounds + 1

    def unfinished(carry):
        _, draws, _, following, _ = carry
        return (following < count) | jnp.any(draws < size)

    carry = (states, draws, ends, jnp.minimum(lanes, count), jnp.zeros((), dtype=int))
    carry = jax.lax.while_loop(
        unfinished,
        lambda carry: refill(jax.lax.while_loop(working, step, carry)),
        carry,
    )
    whole = _kept(eqx.combine(begun, static))
    ends = eqx.combine(carry[2], whole)
    points = kept.points(ends.point, lanes)
    return eqx.tree_at(lambda end: end.point, ends, points), carry[4]


def _kept(state: State) -> End:
    return End(
        state.point,
        state.time,
        state.steps,
        state.rejected,
        state.velocities,
        state.result,
        state.broken,
        state.start,
        state.record,
    )


@eqx.filter_jit
def _merged(ends, later, which, count):
    """The ends of a later descent in the places of those that it took over."""
    places = jnp.where(jnp.arange(which.size) < count, which, ends.time.size)
    before = jax.tree.map(lambda leaf: leaf[which], ends)
    velocities = None
    if before.velocities is not None and later.velocities is not None:
        velocities = before.velocities + later.velocities
    else:
        ends = eqx.tree_at(lambda end: end.velocities, ends, None)
    later = eqx.tree_at(
        lambda end: (end.steps, end.rejected, end.velocities),
        later,
        (before.steps + later.steps, before.rejected + later.rejected, velocities),
        is_leaf=_is_none,
    )
    return jax.tree.map(
        lambda to, leaf: to.at[places].set(leaf, mode="drop"), ends, later
    )


@eqx.filter_jit
def _solutions(descent, starts, ends, count, lanes: int):
    def one(start, end):
        solution = descent.solution(end)
        moved = jax.tree.map(jnp.subtract, end.point, start)
        size = root_mean_square(end.point)
        distance = root_mean_square(moved) / jnp.where(size > 0, size, 1)
        return eqx.tree_at(lambda s: s.distance, solution, distance)

    # As many at once as there are lanes, so that sums are rounded alike.
    several = lambda rows: jax.vmap(one)(*rows)
    return _joined(_chunked(several, (starts, ends), count, lanes))
