"""RKC2 in lanes that differ in their number of stages and don't wait for each other."""

from typing import cast, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..descent import Descent, State
from ..layout import Rows
from ..solvers.chebyshev import (
    DAMPING,
    following,
    KEPT,
    REACH,
    RENEWED,
    RKC2,
    SAFETY,
    scattered,
    slopes,
    UNKNOWN,
)
from ..types import Scalar
from .base import LaidOutLanes, plus


# Velocities that each lane computes between two looks at which steps are done; even,
# and those of one estimate of a spectral radius.
TURNS = 4
# Power iterates that have become so much shorter or longer are not trusted: the radius
# is tried again, so much smaller or larger.
STRAYED = 100.0
RETRIED = 10.0


class Stages(NamedTuple):
    """A step of RKC2 under way. Of points: the velocity at its start; how far the last
    two stages went; the velocity at the last one; a direction of the largest
    eigenvalue. `stage` of `stages` are done. A lane that is `due` estimates the
    spectral radius in this round, with the same arrays. The rest are numbers of the
    recursion (see `RKC2`)."""

    before: PyTree[Array]
    older: PyTree[Array]
    newer: PyTree[Array]
    velocity: PyTree[Array]
    direction: PyTree[Array]
    radius: Float[Array, " lanes"]
    age: Int[Array, " lanes"]  # stages since the radius was estimated
    due: Bool[Array, " lanes"]
    ahead: Float[Array, " lanes"]  # how far velocities are compared
    size: Float[Array, " lanes"]
    landing: Bool[Array, " lanes"]
    stage: Int[Array, " lanes"]
    stages: Int[Array, " lanes"]
    values: tuple[Float[Array, " lanes"], ...]
    rises: tuple[Float[Array, " lanes"], ...]
    b2: Float[Array, " lanes"]
    b1: Float[Array, " lanes"]


class ChebyshevLanes(LaidOutLanes):
    """RKC2, with as many stages in each lane as its own step needs.

    In a round every lane computes `TURNS` velocities; its stages go on from where the
    last round left them, and a step that is done waits for the end of the round only.
    The spectral radius is found in a round of its own, by power iteration with
    differences of velocities. Unlike a diffrax solver these lanes know which steps were
    rejected, and take no step that needs more than the most stages.
    """

    pairs: Int[Array, ""]

    @property
    def turns(self) -> int:
        return TURNS

    def first(self, points, velocity, curvature) -> Stages:
        still = jax.tree.map(jnp.zeros_like, points)
        zero, nothing = jnp.zeros_like(curvature), jnp.zeros(curvature.shape, dtype=int)
        never = jnp.zeros(curvature.shape, dtype=bool)
        three = (zero, zero, zero)
        return Stages(
            velocity,
            still,
            still,
            velocity,
            scattered(points, self.axis),
            radius=curvature,
            age=nothing + KEPT,
            due=never,
            ahead=zero,
            size=zero,
            landing=never,
            # No step is under way: the first round begins one.
            stage=nothing,
            stages=nothing,
            values=three,
            rises=three,
            b2=zero + 1,
            b1=zero + 1,
        )

    def step(self, states: State, horizon: Scalar) -> State:
        stages = self._begun(states, horizon)
        turned = jax.lax.fori_loop(
            0, self.pairs, lambda i, s: self._two_turns(states.point, i, s), stages
        )
        spent = jnp.where(stages.due, TURNS, turned.stage - stages.stage)
        spent = jnp.where(states.finished, 0, spent)
        states = eqx.tree_at(
            lambda s: (s.solver_state, s.velocities),
            states,
            (self._estimated(turned), cast(Array, states.velocities) + spent),
        )
        return self._ended(states, horizon)

    def _begun(self, states: State, horizon: Scalar) -> Stages:
        """Begins a step, or an estimate, in lanes that have none under way."""
        layout, stages = self.layout, states.solver_state
        idle = stages.stage >= stages.stages
        # Not twice without a step.
        due = idle & (stages.age >= KEPT) & ~stages.due
        new = idle & ~due
        # As long as differences of velocities want it.
        length = layout.sizes(states.point)
        noise = float(np.sqrt(float(jnp.finfo(length.dtype).eps)))
        length = jnp.where(due, noise * jnp.where(length > 0, length, 1), 0)
        ahead = layout.sum(
            (length, stages.direction),
            (RENEWED * length, scattered(stages.direction, self.axis)),
        )
        size, landing = self.descent.next_step(states, horizon)
        most = cast(RKC2, self.descent.solver).max_stages
        radius = SAFETY * stages.radius
        longest = REACH * (most**2 - 1) / jnp.where(radius > 0, radius, 1)
        short = (radius > 0) & (size > longest)
        size = jnp.where(short, 0.999 * longest, size)
        count = jnp.ceil(jnp.sqrt(1 + size * radius / REACH))
        count = jnp.clip(count, 2, most).astype(int)
        excess = DAMPING / count.astype(size.dtype) ** 2
        one, zero = jnp.ones_like(excess), jnp.zeros_like(excess)
        b = 1 / (4 * (1 + excess) ** 2)
        fresh = {
            "size": size,
            "landing": landing & ~short,
            "stage": jnp.zeros_like(count),
            "stages": count,
            "values": (1 + excess, one, zero),
            "rises": (excess, one, zero),
            "b2": b,
            "b1": b,
        }
        old = {name: getattr(stages, name) for name in fresh}
        chosen = jax.tree.map(lambda a, b: jnp.where(new, a, b), fresh, old)
        still = jax.tree.map(jnp.zeros_like, stages.older)
        return stages._replace(
            # Its factor is 0 at first, which would not do for what is left of an
            # overflow.
            older=layout.choose(idle, still, stages.older),
            newer=layout.choose(idle, ahead, stages.newer),
            velocity=layout.choose(idle, stages.before, stages.velocity),
            due=due,
            ahead=length,
            **chosen,
        )

    def _two_turns(self, point, pair, stages: Stages) -> Stages:
        """Two, so that the last two stages change places and nothing is copied."""
        first = pair == 0
        for still in (first, jnp.zeros_like(first)):
            factors, stages = self._recursion(stages, still)
            newest = self.layout.sum(
                (factors[0], stages.newer),
                (factors[1], stages.older),
                (factors[2], stages.velocity),
                (factors[3], stages.before),
            )
            velocity = self.layout.velocity(plus(point, newest))
            stages = stages._replace(
                older=stages.newer, newer=newest, velocity=velocity
            )
        return stages

    def _recursion(self, stages: Stages, still):
        """The factors of the next stage: of the last one and of that before it, of the
        velocity there, of the velocity at the start; and the recursion's numbers.

        In lanes that are due, those of the next iterate, unless all stand `still`: the
        velocity ahead is yet to be computed.
        """
        count, due = stages.stages, stages.due & ~still
        most = cast(RKC2, self.descent.solver).max_stages
        at_work = (stages.stage < count) & ~stages.due
        begins, goes_on = at_work & (stages.stage == 0), at_work & (stages.stage > 0)
        excess = DAMPING / jnp.maximum(count, 1).astype(stages.size.dtype) ** 2
        w1 = jnp.asarray(slopes(most), excess.dtype)[count] * stages.size
        values, rises = following((stages.values, stages.rises), excess)
        _, slope, curvature = values
        b0 = curvature / jnp.where(goes_on, slope, 1) ** 2
        ratio = 2 * b0 / stages.b1
        a1 = 1 - stages.b1 * stages.values[0]
        back = 1 / jnp.where(due, stages.radius, 1)
        choose = lambda stage, first, iterate, over: jnp.where(
            goes_on, stage, jnp.where(begins, first, jnp.where(due, iterate, over))
        )
        factors = (
            choose(ratio * (1 + excess), 0.0, 0.0, 1.0),
            choose(-b0 / stages.b2, 0.0, 0.0, 0.0),
            choose(ratio * w1, 0.0, back, 0.0),
            choose(-a1 * ratio * w1, stages.b1 * w1, -back, 0.0),
        )
        old = stages.values, stages.rises, stages.b2, stages.b1
        new = values, rises, stages.b1, b0
        chosen = jax.tree.map(lambda a, b: jnp.where(goes_on, a, b), new, old)
        stage = jnp.where(at_work, stages.stage + 1, stages.stage)
        names = ("values", "rises", "b2", "b1")
        numbers = dict(zip(names, chosen, strict=True))
        return factors, stages._replace(stage=stage, **numbers)

    def _estimated(self, stages: Stages) -> Stages:
        """What lanes that were due know now."""
        layout, due = self.layout, stages.due
        image = jax.tree.map(jnp.subtract, stages.velocity, stages.before)
        trees = (image, stages.newer, stages.older)
        grown, length, shorter = (layout.sizes(tree) for tree in trees)
        last = stages.radius * length / jnp.where(shorter > 0, shorter, 1)
        radius = grown / jnp.where(length > 0, length, 1)
        # A radius that was taken for much too large has shrunk the iterates into
        # rounding, which would make it larger still; for much too small, has blown
        # them up to where the field is another.
        shrunk = length < stages.ahead / STRAYED
        blown = ~(length < STRAYED * stages.ahead) | ~jnp.isfinite(grown)
        lost = shrunk | blown
        tried = jnp.where(shrunk, stages.radius / RETRIED, RETRIED * stages.radius)
        radius = jnp.where(lost, tried, radius)
        usable = due & jnp.isfinite(radius) & (radius > 0)
        unit = layout.sum((1 / jnp.where(usable, grown, 1), image))
        # Unsettled, as at a start: the next step makes another.
        unsettled = ~usable | lost | (jnp.abs(radius - last) > UNKNOWN * radius)
        return stages._replace(
            direction=layout.choose(usable & ~lost, unit, stages.direction),
            radius=jnp.where(usable, radius, stages.radius),
            age=jnp.where(due, jnp.where(unsettled, KEPT, 0), stages.age),
        )

    def _ended(self, states: State, horizon: Scalar) -> State:
        """Keeps or rejects the steps that are done."""
        layout, stages = self.layout, states.solver_state
        done = (stages.stage >= stages.stages) & ~stages.due & ~states.finished
        candidate = plus(states.point, stages.newer)
        both = plus(stages.before, stages.velocity)
        fixed = jnp.full_like(stages.size, -0.8)
        error = layout.sum((fixed, stages.newer), (0.4 * stages.size, both))
        keep, next_size, control_state = self.judged(
            states, stages.size, stages.landing, candidate, error
        )
        keep = done & jnp.asarray(keep)
        point = layout.choose(keep, candidate, states.point)
        before = layout.choose(keep, stages.velocity, stages.before)
        rest = layout.rest(point, before)
        # A rejected step is a sign of a radius that has grown.
        age = jnp.where(keep, stages.age + stages.stages, KEPT)
        stages = stages._replace(before=before, age=jnp.where(done, age, stages.age))
        return self.concluded(
            states,
            horizon,
            (stages.size, stages.landing, keep, next_size, rest, control_state),
            done,
            point,
            stages,
        )


def chebyshev_lanes(descent: Descent, layout: Rows) -> ChebyshevLanes | None:
    """Lanes for this descent, if it is one for them."""
    if type(descent.solver) is not RKC2:
        return None
    # As in `explicit_lanes`.
    return ChebyshevLanes(descent, layout, jnp.asarray(TURNS // 2))
