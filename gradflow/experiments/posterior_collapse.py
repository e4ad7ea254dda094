r"""Which latents of linear VAEs collapse, over grids of hyperparameters, and when.

In each cell of a grid, runs from random starts are compared with the closed form: the
number of active latents, or the case of each mode (see `phases.py`). From small starts
modes come up one after the other, in the order of the rates at which they leave the
collapsed point (see `activation.py`).

*Claims under test:* Dang, Tran, Nguyen, Ho 2023, Theorems 1, 2 and 4 and Remark 1, as
corrected in `theory/`.
"""

import dataclasses
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from cyclopts import Parameter

from ..critical import KIND
from ..flow import GradientFlow
from ..initial import GaussianLike
from ..report import environment, Report, TRAJECTORIES
from ..solve import Integrator
from ..statistics import fraction
from ..study import find_device, Outcome, precision, run_studies, Study
from ..types import Key, names_of
from .activation import activation
from .base import LARGEST_COUNT, positive, RunConfig, whole_number
from .phases import (
    AbstractGrid,
    CASES,
    cases,
    check_correlations,
    check_range,
    ConditionalGrid,
    HierarchicalGrid,
    inspect,
    PlainGrid,
    spaced,
)
from .verdicts import seconds_of


CLAIM = (
    "At the end of gradient flow as many latents of linear VAEs, conditional VAEs and "
    "hierarchical VAEs are active as the closed form says, on both sides of every "
    "boundary of the phase diagram; from small starts modes become active in the order "
    "of the rates at which they leave the collapsed point."
)
SOURCE = "Dang et al. 2023, Theorems 1, 2 and 4, Remark 1"
COST = "about 3 minutes on one core for the default settings, most of it compilation"
GRIDS = ("vae", "cvae", "hvae", "sigma_1", "dynamics")
# A latent is active above this many nats. Below a boundary they grow from 0, in
# proportion to the distance from it: a coarser cut takes what is near for collapsed.
CUT = 1e-3
COARSE = 1e-2
# Of a boundary in the figure.
LINE_POINTS = 40


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings: one row of the table for each grid, and one for the dynamics."""

    grids: tuple[Literal["vae", "cvae", "hvae", "sigma_1", "dynamics"], ...] = GRIDS
    "Any of vae, cvae, hvae, sigma_1 (HVAE by sigma_1), and dynamics."
    draws: int = 4
    "Random starts per cell."
    batch: int = 4
    "Draws run at once: bounds memory, changes no draw."
    tolerance: float = 1e-6
    "Stopping speed: latents near a boundary come and go slowly."
    max_steps: int = 100_000
    "Steps per solver before the next one takes over."
    scale: float = 0.5
    "Standard deviation of the entries of a start's maps."
    points: int = 10
    "Values of each hyperparameter, evenly in logarithm."
    variances: tuple[float, ...] = (3.0, 1.5, 0.75, 0.375)
    "Of the VAE's data, all different; of the CVAE's y, the first three."
    beta_low: float = 0.2
    "The least beta, beta_1 and beta_2."
    beta_high: float = 6.0
    "The largest."
    latents: tuple[int, ...] = (1, 2, 4)
    "Sizes of the VAE's latent space."
    correlations: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7, 0.9)
    "Of x and y of the CVAE."
    pair: tuple[float, ...] = (4.0, 0.5)
    "Variances of the HVAE's data; it has as many latents on each level."
    sigma_low: float = 0.4
    "The least sigma_1."
    sigma_high: float = 2.5
    "The largest."
    starts: int = 32
    "Small starts whose dynamics are followed."
    small: float = 1e-3
    "Standard deviation of the entries of a small start's maps."

    def __post_init__(self):
        super().__post_init__()
        for name in ("scale", "variances", "pair", "small"):
            positive(self, name)
        for name, least in (("points", 2), ("latents", 1), ("starts", 1)):
            whole_number(self, name, least=least, most=LARGEST_COUNT)
        check_range(self, "beta_low", "beta_high")
        check_range(self, "sigma_low", "sigma_high")
        check_correlations(self)
        if not self.grids or not set(self.grids) <= set(GRIDS):
            raise ValueError(f"grids={self.grids} must be some of {', '.join(GRIDS)}")
        for name in ("variances", "pair"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(
                    f"{name}={values} has equal entries: which mode is active is then "
                    "no question; make them different"
                )


def run(config: Config, *, progress: bool | None = None) -> Report:
    """Runs the grids and reports one row for each."""
    device = find_device(config.device)
    with precision(config.dtype), jax.default_device(device):
        rows, panels, notes, outcomes = [], [], [], []
        for number, grid in enumerate(_grids(config)):
            diagram = _Diagram(config, grid, jr.fold_in(jr.key(config.seed), number))
            diagram.outcomes = run_studies(
                diagram.studies,
                dtype=config.dtype,
                device=config.device,
                progress=progress,
            )
            rows.append(diagram.row())
            notes += diagram.notes()
            panels += diagram.panels()
            outcomes += diagram.outcomes.values()
        curves: dict[str, Any] = {}
        if "dynamics" in config.grids:
            key = jr.fold_in(jr.key(config.seed), 100)
            right, curves = activation(
                config.variances, config.beta_low, config.small, config.starts, key
            )
            rows.append(_order(right))
        return Report(
            "posterior_collapse",
            CLAIM,
            dataclasses.asdict(config),
            environment(config.dtype, device, TRAJECTORIES),
            rows,
            notes,
            {"panels": panels, "dynamics": curves},
            seconds_of(outcomes),
        )


def _grids(config: Config) -> list[AbstractGrid]:
    betas = spaced(config.beta_low, config.beta_high, config.points)
    sigmas = spaced(config.sigma_low, config.sigma_high, config.points)
    grids = (
        PlainGrid(config.variances, betas, config.latents),
        ConditionalGrid(config.variances[:3], betas, config.correlations),
        HierarchicalGrid(config.pair, betas, betas, by="beta_1"),
        HierarchicalGrid(config.pair, betas, sigmas, by="sigma_1"),
    )
    return [grid for grid in grids if grid.name in config.grids]


class _Diagram:
    """One grid: its studies, and what their outcomes come to."""

    def __init__(self, config: Config, grid: AbstractGrid, key: Key):
        self.config, self.grid = config, grid
        self.studies: dict[str, tuple[Study, Key]] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.theory: dict[str, Any] = {}
        # The case of each mode, at [y, x, mode]; fewer latents have fewer modes.
        self.cells = [
            (row, column, f"{grid.name} {y:.6g} {x:.6g}", x, y)
            for row, y in enumerate(grid.y)
            for column, x in enumerate(grid.x)
        ]
        for row, column, name, x, y in self.cells:
            energy, like, theory = grid.posed(x, y)
            flow = GradientFlow(energy)
            self.theory[name] = theory
            study = Study(
                GaussianLike(like, jnp.asarray(config.scale)),
                Integrator(
                    flow,
                    horizon=config.horizon,
                    tolerance=config.tolerance,
                    rtol=config.rtol,
                    max_steps=config.max_steps,
                ),
                eqx.Partial(inspect, flow, theory),
                draws=config.draws,
                batch=config.batch,
            )
            cell = jr.fold_in(key, row * len(grid.x) + column)
            self.studies[name] = (study, cell)

    def row(self) -> dict[str, Any]:
        found = [self._cell(name, CUT) for _, _, name, _, _ in self.cells]
        right = np.concatenate([same for same, _, _ in found])
        certified = np.concatenate([known for _, known, _ in found])
        share = fraction(right, ~certified)
        wanted = np.concatenate([self._wanted(c[2]) for c in self.cells])
        return {
            "grid": self.grid.name,
            "of": f"{self.grid.model}, {self.grid.xlabel} by {self.grid.ylabel}",
            "cells": len(self.cells),
            "cells right": int(sum(same.all() for same, _, _ in found)),
            "draws": share.draws,
            "certified": int(certified.sum()),
            "undecided": share.undecided,
            "right": share.count,
            "95 % low": share.low,
            "95 % high": share.high,
            "cells off at boundaries": self._off(),
            **{
                f"case {name}": int((wanted == i).sum()) for i, name in enumerate(CASES)
            },
        }

    def notes(self) -> list[str]:
        coarse = [self._cell(name, COARSE)[0] for _, _, name, _, _ in self.cells]
        lost = int((~np.concatenate(coarse)).sum())
        lines = [
            f"{self.grid.name}: active means more than {CUT:g} nats; with {COARSE:g} "
            f"{lost} of {self.config.draws * len(self.cells)} draws would be counted "
            "wrong"
        ]
        for _, _, name, x, y in self.cells:
            same, certified, kinds = self._cell(name, CUT)
            for draw in np.flatnonzero(~(same & certified))[:3]:
                said = "right" if same[draw] else "wrong"
                lines.append(
                    f"{self.grid.name} at {self.grid.xlabel}={x:.4g}, "
                    f"{self.grid.ylabel}={y:.4g}, draw {draw}: {said}, {kinds[draw]}"
                )
        return lines

    def panels(self) -> list[dict[str, Any]]:
        """For VAEs how many latents are active; for HVAEs the case of each mode."""
        grid, modes = self.grid, range(self._modes())
        title = f"{grid.model}, {grid.xlabel} by {grid.ylabel}"
        panel = {
            "title": title, "x": grid.x, "y": grid.y, "yscale": grid.yscale,
            "xlabel": grid.xlabel, "ylabel": grid.ylabel,
        }  # fmt: skip
        lines = [self._line(mode) for mode in modes]
        if not isinstance(grid, HierarchicalGrid):
            names = [str(count) for count in range(self._modes() + 1)]
            cells = (self._found() < 2).sum(axis=2)
            counted = {"what": "active", "names": names, "lines": lines}
            return [{**panel, **counted, "cells": cells}]
        return [
            {
                **panel,
                "title": f"{title}: mode {mode + 1}",
                "what": "case",
                "names": list(CASES),
                "lines": [lines[mode], self._code_line(mode)],
                "cells": self._found()[:, :, mode],
            }
            for mode in modes
        ]

    def _modes(self) -> int:
        return max(len(self._wanted(name)) for _, _, name, _, _ in self.cells)

    def _wanted(self, name: str) -> np.ndarray:
        return self.grid.predicted(self.theory[name])

    def _seen(self, name: str, cut: float) -> np.ndarray:
        """The case of each draw's modes."""
        finding = self.outcomes[name].finding
        return cases(finding.code > cut, finding.prior > cut)

    def _cell(self, name: str, cut: float):
        """Which draws have all modes right, which are certified, and their verdicts."""
        kinds = names_of(KIND, self.outcomes[name].finding.verdict.kind)
        same = (self._seen(name, cut) == self._wanted(name)).all(axis=1)
        return same, kinds == "global_minimum", kinds

    def _found(self) -> np.ndarray:
        """The case of each cell and mode, by the median draw."""
        grid = np.full((len(self.grid.y), len(self.grid.x), self._modes()), 2)
        for row, column, name, _, _ in self.cells:
            seen = np.sort(self._seen(name, CUT), axis=0)[self.config.draws // 2]
            grid[row, column, : len(seen)] = seen
        return grid

    def _off(self) -> int:
        """How many cells the last active one of a mode is from where its threshold is,
        at worst over rows and modes."""
        found, worst, x = self._found(), 0, np.asarray(self.grid.x)
        for row, y in enumerate(self.grid.y):
            for mode, threshold in enumerate(self.grid.thresholds(y)):
                seen = int((found[row, :, mode] < 2).sum())
                worst = max(worst, abs(seen - int((x < threshold).sum())))
        return worst

    def _line(self, mode: int) -> dict[str, Any]:
        """The threshold of a mode's last layer against y."""
        y = np.asarray(self.grid.y, dtype=float)
        if self.grid.yscale == "log":
            y = np.geomspace(y[0], y[-1], LINE_POINTS)
        at = [self.grid.thresholds(value) for value in y]
        x = [found[mode] if mode < len(found) else np.nan for found in at]
        return {"x": x, "y": y}

    def _code_line(self, mode: int) -> dict[str, Any]:
        """Where the code of x collapses but the last layer does not, a from b: at
        beta_2 = theta^2 / eta^2."""
        assert isinstance(self.grid, HierarchicalGrid)
        own = float(np.diagonal(self.grid.moments.xx)[mode])
        y = np.geomspace(self.grid.y[0], self.grid.y[-1], LINE_POINTS)
        last = np.array([self.grid.thresholds(value)[mode] for value in y])
        return {"x": np.where(last > own, own, np.nan), "y": y}


def _order(right: np.ndarray) -> dict[str, Any]:
    """The row of the dynamics."""
    share = fraction(right)
    return {
        "grid": "dynamics",
        "of": "VAE from small starts: order of activation",
        "cells": 1,
        "cells right": int(right.all()),
        "draws": share.draws,
        "certified": "-",
        "undecided": 0,
        "right": share.count,
        "95 % low": share.low,
        "95 % high": share.high,
        "cells off at boundaries": "-",
        **{f"case {name}": "-" for name in CASES},
    }
