"""Do gradient flows avoid saddles? What the sources prove and conjecture, audited.

*Claims under test:* for almost every start of the factors the flow ends at a global
minimum (depth 2: Theorem 39), of the loss on matrices of some rank (deeper: Theorem
40). For autoencoders, Conjecture 41: (a) that rank is the largest; (b) balanced starts
with $u_i^\\top W(0) u_i > 0$ and rank $W(0) U_r = r$ end at $U_r U_r^\\top$; (c) the
balanced flow on matrices of rank k has limits of lower rank for almost no start.
*Erratum:* (b) and (c) are false where the flow keeps the sign of a determinant: for
square W of full rank half of all starts have the wrong one and end at a saddle.
*Reference:* Bah, Rauhut, Terstiege, Westdickenberg 2020, Theorems 39 and 40,
Conjecture 41.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from cyclopts import Parameter

from ..audit import Audit
from ..critical import classify, KIND
from ..flow import GradientFlow
from ..initial import GaussianInit, LowRankInit
from ..manifolds.fixed_rank import FixedRank
from ..models.linear import SquaredLoss
from ..models.low_rank import LowRank
from ..moments import Moments
from ..report import environment, Report, VERDICTS
from ..solve import integrate, Integrator
from ..solvers.stiff import stiff
from ..store.folder import Store
from ..study import find_device, Outcome, precision, run_studies, Study, without_points
from ..theory.linear import LinearTheory
from ..theory.low_rank import LowRankTheory
from ..types import Key, names_of
from .base import LARGEST_COUNT, positive, RunConfig, whole_number
from .verdicts import notes, seconds_of, tally


CLAIM = (
    "Balanced flows of square matrices keep the sign of the determinant: starts of the "
    "wrong sign end at a saddle, against Conjecture 41 (b) and (c) of Bah et al. 2020; "
    "integrators of the factors escape from it by their own errors."
)
SOURCE = "Bah et al. 2020, Theorems 39 and 40, Conjecture 41"
COST = "about 3 minutes on two cores for the default settings, most of it compilation"
STARTS = ("factors", "balanced", "counterexample")
# The start that refutes Conjecture 41 (b) below full rank, for spectrum 3, 2, 1.
COUNTEREXAMPLE = ((1.0, 3.0, 0.0), (3.0, 1.0, 0.0), (0.0, 0.0, 0.0))
# Steps after which the implicit method takes over where escapes are slow.
QUICK_STEPS = 400
CURVE_POINTS = 150


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings: rows for each depth, rank and kind of start."""

    draws: int = 1000
    "Draws per depth, rank and kind of start."
    batch: int = 250
    "Draws run at once: bounds memory, changes no draw."
    spectrum: tuple[float, ...] = (3.0, 2.0, 1.0)
    "Eigenvalues of xx of the autoencoder, all different."
    ranks: tuple[int, ...] = (3, 2)
    "Ranks of W(0); the largest possible one is where signs are kept."
    depths: tuple[int, ...] = (2, 3)
    "Numbers of factors."
    scale: float = 1.0
    "Standard deviation of the entries of W(0), before it is cut to its rank."
    starts: tuple[Literal["factors", "balanced", "counterexample"], ...] = STARTS
    "Gaussian factors, balanced starts, or the counterexample to Conjecture 41 (b)."
    curves: int = 1
    "Runs per row of wrong signs whose least singular value is drawn."

    def __post_init__(self):
        super().__post_init__()
        positive(self, "spectrum")
        positive(self, "scale")
        for name, least in (("ranks", 1), ("depths", 2), ("curves", 0)):
            whole_number(self, name, least=least, most=LARGEST_COUNT)
        if len(set(self.spectrum)) < len(self.spectrum):
            raise ValueError(
                f"spectrum={self.spectrum} has equal eigenvalues: which modes are "
                "learned is then no question; make them different"
            )
        if max(self.ranks) > len(self.spectrum):
            raise ValueError(
                f"ranks={self.ranks} has one above {len(self.spectrum)}, the number "
                "of eigenvalues in spectrum"
            )
        if not self.starts or not set(self.starts) <= set(STARTS):
            raise ValueError(
                f"starts={self.starts} must be some of {', '.join(STARTS)}"
            )


def studies(config: Config) -> dict[str, tuple[Study, Key]]:
    """The studies behind the rows, with their keys."""
    with precision(config.dtype), jax.default_device(find_device(config.device)):
        return _Job(config).studies


def run(
    config: Config, *, progress: bool | None = None, store: Store | None = None
) -> Report:
    """Runs the studies and reports one row per statement and condition."""
    device = find_device(config.device)
    with precision(config.dtype), jax.default_device(device):
        job = _Job(config)
        job.outcomes = run_studies(
            job.studies,
            dtype=config.dtype,
            device=config.device,
            progress=progress,
            store=store,
            keep=without_points,
        )
        for report in job.reports:
            report()
        return Report(
            "saddle_avoidance",
            CLAIM,
            dataclasses.asdict(config),
            environment(config.dtype, device, VERDICTS),
            job.rows,
            job.notes,
            {"panels": job.panels},
            seconds_of(job.outcomes.values()),
        )


class _Job:
    """The studies of one report, and what makes its rows, notes and panels of their
    outcomes."""

    def __init__(self, config: Config):
        values = jnp.diag(jnp.asarray(sorted(config.spectrum, reverse=True)))
        self.energy = SquaredLoss(Moments(values, values, values, 1, autoencoding=True))
        self.config = config
        self.studies: dict[str, tuple[Study, Key]] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.reports: list[Callable[[], None]] = []
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.panels: list[dict[str, Any]] = []
        for depth, rank in itertools.product(config.depths, config.ranks):
            if "factors" in config.starts:
                self.factors(depth, rank)
            if "balanced" in config.starts:
                self.balanced(depth, rank)
        if "counterexample" in config.starts and config.spectrum == (3.0, 2.0, 1.0):
            for depth in config.depths:
                self.counterexample(depth)

    def factors(self, depth: int, rank: int) -> None:
        """Theorems 39 and 40 and Conjecture 41 (a): Gaussian factors, not balanced."""
        size = len(self.config.spectrum)
        widths = (size, *((rank,) * (depth - 1)), size)
        theory = LinearTheory(self.energy, rank)
        study = self._add(
            f"factors, depth {depth}, rank {rank}",
            GaussianInit(widths, jnp.asarray(self.config.scale)),
            GradientFlow(self.energy),
            theory,
            key=2 * rank,
            audit=Audit,
        )
        self.reports.append(partial(self._factors_rows, depth, rank, study))

    def _factors_rows(self, depth: int, rank: int, study: str) -> None:
        outcome = self.outcomes[study]
        statement = "Thm. 39, Conj. 41 (a)" if depth == 2 else "Thm. 40, Conj. 41 (a)"
        kinds = names_of(KIND, outcome.finding.kind)
        limited = outcome.finding.precision_limited
        row = {"statement": statement, "depth": depth, "rank": rank}
        row["starts with"] = "any Gaussian factors"
        self.rows.append({**row, **tally(kinds), **_tsit5(kinds, limited)})
        self.notes += notes(f"{statement}, depth {depth}, rank {rank}", outcome)

    def balanced(self, depth: int, rank: int) -> None:
        """Conjecture 41 (b) and (c): the flow on matrices of rank k, stratified by
        what holds at the start; beside it the factors of the same starts, which are
        those of every depth."""
        size = len(self.config.spectrum)
        start = LowRankInit((size, size), rank, jnp.asarray(self.config.scale))
        theory = LowRankTheory(self.energy, rank, depth)
        flow = GradientFlow(self.energy, FixedRank(rank, depth))
        where = f"depth {depth}, rank {rank}"
        exact = self._add(f"balanced, {where}", start, flow, theory, key=2 * rank + 1)
        factors = self._add(
            f"their factors, {where}",
            _Factors(start, depth),
            GradientFlow(self.energy),
            theory.linear,
            key=2 * rank + 1,
            audit=Audit,
            slow=depth > 2,
        )
        self.reports.append(
            partial(self._balanced_rows, start, flow, theory, exact, factors)
        )

    def _balanced_rows(
        self, start: LowRankInit, flow: GradientFlow, theory: LowRankTheory, *names: str
    ) -> None:
        exact, factors = (self.outcomes[name] for name in names)
        size, rank, depth = len(self.config.spectrum), theory.rank, theory.depth
        kinds = names_of(KIND, exact.finding.kind)
        claimed = names_of(KIND, factors.finding.kind)
        limited = factors.finding.precision_limited
        holds = self._hypotheses(start, theory, 2 * rank + 1)
        asked = holds["positive"] & holds["spans"]
        strata = {"Conj. 41 (c)": {"any W(0) of this rank": np.full_like(asked, True)}}
        strata["Conj. 41 (b)"] = {"the hypothesis of (b)": asked}
        if rank == size:
            strata["Conj. 41 (c)"] |= {
                "det W(0) > 0": holds["sign"],
                "det W(0) < 0": ~holds["sign"],
            }
            strata["Conj. 41 (b)"] |= {"that and det W(0) > 0": asked & holds["sign"]}
        for statement, conditions in strata.items():
            for condition, of in conditions.items():
                if not of.any():
                    continue
                row = {"statement": statement, "depth": depth, "rank": rank}
                row["starts with"] = condition
                measured = tally(kinds[of])
                beside = _tsit5(claimed[of], limited[of])
                self.rows.append({**row, **measured, **beside})
        where = f"depth {depth}, rank {rank}"
        self.notes += notes(f"balanced flow, {where}", exact)
        points = _draws(start, self._key(2 * rank + 1), self.config.draws)
        for draw in np.flatnonzero(~holds["sign"])[: self.config.curves]:
            point = jax.tree.map(lambda leaf: leaf[draw], points)  # noqa: B023
            title = f"{where}, draw {draw}, det W(0) < 0"
            self.panels.append(self._panel(flow, point, depth, title))

    def counterexample(self, depth: int) -> None:
        """A start with all that Conjecture 41 (b) asks for that ends at rank 1."""
        point = LowRank.of(jnp.asarray(COUNTEREXAMPLE), 2)
        theory = LowRankTheory(self.energy, 2, depth)
        flow = GradientFlow(self.energy, FixedRank(2, depth))
        exact = self._add(
            f"counterexample, depth {depth}",
            _Always(point),
            flow,
            theory,
            key=0,
            draws=1,
        )
        factors = self._add(
            f"its factors, depth {depth}",
            _Always(point.balanced(depth)),
            GradientFlow(self.energy),
            theory.linear,
            key=0,
            draws=1,
            audit=Audit,
            slow=depth > 2,
        )
        row = partial(self._counterexample_row, flow, point, depth, exact, factors)
        self.reports.append(row)

    def _counterexample_row(
        self, flow: GradientFlow, point: LowRank, depth: int, *names: str
    ) -> None:
        exact, factors = (self.outcomes[name] for name in names)
        kinds = names_of(KIND, exact.finding.kind)
        claimed = names_of(KIND, factors.finding.kind)
        row = {"statement": "Conj. 41 (b)", "depth": depth, "rank": 2}
        row["starts with"] = "the counterexample"
        beside = _tsit5(claimed, factors.finding.precision_limited)
        self.rows.append({**row, **tally(kinds), **beside})
        if self.config.curves:
            title = f"depth {depth}, rank 2, the counterexample"
            self.panels.append(self._panel(flow, point, depth, title))

    def _add(
        self, name, initialize, flow, theory, *, key, draws=None, audit=None, slow=False
    ) -> str:
        """Adds a study and returns its name. `slow`: escapes may take longer than an
        explicit method lasts."""
        config = self.config
        tsit5 = diffrax.Tsit5()
        integrator = Integrator(
            flow,
            horizon=config.horizon,
            tolerance=config.tolerance,
            rtol=config.rtol,
            stop=theory.decided,
            method=(tsit5, stiff()) if slow else (tsit5,),
            max_steps=min(QUICK_STEPS, config.max_steps) if slow else config.max_steps,
            audit=audit,
        )
        study = Study(
            initialize,
            integrator,
            eqx.Partial(classify, flow, theory),
            draws=config.draws if draws is None else draws,
            batch=config.batch,
        )
        # Ranks and depths may be given twice.
        name = f"{len(self.studies)} {name}"
        self.studies[name] = (study, self._key(key))
        return name

    def _key(self, row: int):
        return jr.fold_in(jr.key(self.config.seed), row)

    def _hypotheses(self, start, theory, key) -> dict[str, np.ndarray]:
        points = _draws(start, self._key(key), self.config.draws)
        holds = eqx.filter_jit(jax.vmap(theory.hypotheses))(points)
        return {name: np.asarray(flags) for name, flags in holds.items()}

    def _panel(self, flow, point: LowRank, depth: int, title: str) -> dict[str, Any]:
        """The least singular value of one run: the exact flow, and the factors."""
        latest = min(15.0 if depth == 2 else 300.0, self.config.horizon)
        times = np.linspace(0, latest, CURVE_POINTS + 1)[1:]
        roads = [
            (flow, point, _least),
            (GradientFlow(self.energy), point.balanced(depth), _log),
        ]
        curves = []
        for road, start, observed in roads:
            solution = integrate(
                road,
                start,
                times=jnp.asarray(times),
                observe={"log": observed},
                tolerance=self.config.tolerance,
                rtol=self.config.rtol,
                max_steps=jnp.asarray(10**5),
                throw=False,
            )
            assert solution.history is not None  # because times are given
            curves.append(np.asarray(solution.history["log"]) / math.log(10))
        return {
            "title": title,
            "times": times,
            "exact": curves[0],
            "factors": curves[1],
        }


class _Factors(eqx.Module):
    """The balanced factors of a start."""

    start: LowRankInit
    depth: int = eqx.field(static=True)

    def __call__(self, key):
        return self.start(key).balanced(self.depth)


class _Always(eqx.Module):
    """One start, whatever the key."""

    point: Any

    def __call__(self, key):
        del key
        return self.point


def _least(point: LowRank):
    return point.log_values[-1]


def _log(network):
    """The logarithm of the singular value that the rank of W(0) makes the last."""
    rank = min(network.widths)
    return jnp.log(jnp.linalg.svd(network.matrix(), compute_uv=False)[rank - 1])


@eqx.filter_jit
def _draws(start, key, draws: int):
    keys = jax.vmap(lambda draw: jr.fold_in(key, draw))(jnp.arange(draws))
    return jax.vmap(start)(keys)


def _tsit5(kinds: np.ndarray, limited: np.ndarray) -> dict[str, int]:
    """What integrating the factors claims, and what its audit says of that."""
    best = kinds == "global_minimum"
    return {
        "factors: global": int(best.sum()),
        "of these precision limited": int((best & limited).sum()),
        "others limited": int((~best & limited).sum()),
    }
