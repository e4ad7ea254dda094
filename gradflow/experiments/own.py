"""A study of your own, from the command line: `gradflow run own --study mine:study`.

`mine.py` lies in the working folder, or is installed; its function `study` returns a
`gradflow.Study`, or a dict of them, one for each setting. What each inspects is counted
(truth values, members of an enumeration such as verdicts) or summarized (numbers).
"""

import ast
import dataclasses
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.random as jr
import numpy as np
from cyclopts import Parameter

from ..critical import CriticalPoint
from ..precision import converted, DTYPES
from ..report import environment, Report, VERDICTS
from ..solution import RESULTS
from ..statistics import Fraction, fraction
from ..store.arrays import arrays_of
from ..store.folder import Store
from ..study import (
    find_device,
    Outcome,
    precision,
    run_studies,
    Study,
    without_points,
)
from ..study_checks import check_fit
from ..types import Key, names_of
from . import verdicts
from .base import LARGEST_COUNT, LARGEST_SEED, one_of, whole_number


CLAIM = "A study of your own: how often, and how large, what it looks at is."
SOURCE = "the function that --study names"
COST = "what your study takes; its draws are kept as they are done"
# Ends of a run after which what was found of it counts.
ENDED = ("successful", "rule_met", "horizon_reached")
# Verdicts that are none.
OPEN = ("unresolved", "not_critical")
# Points of the drawn distribution of a number.
QUANTILES = 201


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class Config:
    """Settings. **Raises:** `ValueError` for any value out of range."""

    study: str = ""
    "module:function, such as mine:study for mine.py in this folder."
    arguments: tuple[str, ...] = ()
    "Arguments of that function, such as rank=2."
    draws: int | None = None
    "Draws per study; by default those that it says."
    batch: int | None = None
    "Draws run at once; by default those that it says."
    seed: int = 0
    "Draw i of a study depends on the seed, the study's place and i only."
    dtype: Literal["float64", "float32", "mixed"] = "float64"
    "Arithmetic; mixed: runs in float32, findings in float64."
    device: Literal["cpu", "gpu", "tpu"] | None = None
    "Where to run; by default jax's own choice."

    def __post_init__(self):
        for name in ("draws", "batch"):
            if getattr(self, name) is not None:
                whole_number(self, name, least=1, most=LARGEST_COUNT)
        whole_number(self, "seed", least=0, most=LARGEST_SEED)
        one_of(self, "dtype", DTYPES)
        if self.device is not None:
            one_of(self, "device", ("cpu", "gpu", "tpu"))
        if not isinstance(self.study, str):
            raise ValueError(f"study must be module:function, got {self.study!r}")
        several = isinstance(self.arguments, (tuple, list))
        if not several or not all(isinstance(text, str) for text in self.arguments):
            raise ValueError(
                f"arguments must be a list such as ['rank=2'], got {self.arguments!r}"
            )


def settled(config: Config) -> Config:
    """With the numbers of draws that the study itself says.

    **Raises:** `ValueError` as `studies`, or if its studies say different numbers.
    """
    for name in ("draws", "batch"):
        if getattr(config, name) is None:
            said = sorted({int(getattr(s, name)) for s in _made(config).values()})
            if len(said) > 1:
                raise ValueError(
                    f"the studies of {config.study} have {said[0]} to {said[-1]} "
                    f"{name}: give one number for all with --{name}"
                )
            config = dataclasses.replace(config, **{name: said[0]})
    return config


def studies(config: Config) -> dict[str, tuple[Study, Key]]:
    """The studies by name, each with its key.

    **Raises:** `ValueError` if there is no such function, if it does not take the
    arguments, raises, or gives something else, or if a study's parts don't fit.
    """
    keyed = {}
    with precision(config.dtype), jax.default_device(find_device(config.device)):
        for number, (name, study) in enumerate(_made(config).items()):
            key = jr.fold_in(jr.key(config.seed), number)
            inspected = "float32" if config.dtype == "float32" else "float64"
            try:
                check_fit(converted(study, inspected), key)
            except ValueError as error:
                raise ValueError(f"{config.study}: {error}") from error
            keyed[name] = (study, key)
    return keyed


def run(
    config: Config, *, progress: bool | None = None, store: Store | None = None
) -> Report:
    """Runs the studies and reports a row per finding."""
    outcomes = run_studies(
        studies(config),
        dtype=config.dtype,
        device=config.device,
        progress=progress,
        store=store,
        keep=without_points,
    )
    rows, notes, panels = [], [], {}
    for name, outcome in outcomes.items():
        rows += _rows(name, outcome, notes, panels)
    return Report(
        "own",
        f"{CLAIM} {config.study}({', '.join(config.arguments)})",
        dataclasses.asdict(config),
        environment(config.dtype, find_device(config.device), VERDICTS),
        rows,
        notes,
        {"panels": list(panels.values())},
        verdicts.seconds_of(outcomes.values()),
    )


# ---- the function and what it gives


def _made(config: Config) -> dict[str, Study]:
    """What the function gives, with the draws that were asked for."""
    with precision(config.dtype), jax.default_device(find_device(config.device)):
        given = _called(_function(config.study), config)
    made = given if isinstance(given, dict) else {"study": given}
    if not made:
        raise ValueError(f"{config.study} gives an empty dict: give a gradflow.Study")
    for name, study in made.items():
        if not isinstance(study, Study) or not isinstance(name, str):
            what = type(study if isinstance(name, str) else name).__name__
            raise ValueError(
                f"{config.study} gives {what}: give a gradflow.Study, or a dict of "
                "them by name"
            )
    asked = {"draws": config.draws, "batch": config.batch}
    sizes = {name: size for name, size in asked.items() if size is not None}
    return {name: dataclasses.replace(s, **sizes) for name, s in made.items()}


def _function(study: str) -> Callable[..., Any]:
    module, _, name = study.partition(":")
    if not (module and name):
        raise ValueError(
            f"study={study!r} must be module:function, such as mine:study for the "
            "function study in mine.py"
        )
    # As `python -m` does; what runs later may import too.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if module != missing and not module.startswith(f"{missing}."):
            raise ValueError(
                f"study={study}: {module} needs {missing}, which is not installed"
            ) from error
        stem = module.removesuffix(".py").replace("/", ".")
        raise ValueError(
            f"study={study}: there is no module {module} in {os.getcwd()} or among "
            f"what is installed" + (f": write {stem}:{name}" if stem != module else "")
        ) from None
    except (Exception, SystemExit) as error:
        raise _raised(f"study={study}: importing {module}", error) from error
    function = getattr(loaded, name, None)
    if not callable(function):
        raise ValueError(f"study={study}: {module} has no function {name}")
    return function


def _called(function: Callable[..., Any], config: Config) -> Any:
    arguments = {}
    for text in config.arguments:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()) or name in arguments:
            raise ValueError(
                f"arguments: {text!r} must be name=value, such as rank=2, each name "
                "once"
            )
        try:
            arguments[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            arguments[name] = value  # text needs no quotes
    try:
        inspect.signature(function).bind(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"arguments of {config.study}: {error}") from None
    try:
        return function(**arguments)
    except (Exception, SystemExit) as error:
        raise _raised(config.study, error) from error


def _raised(what: str, error: BaseException) -> ValueError:
    text = " ".join(str(error).split()) or "no message"
    return ValueError(f"{what} raised {type(error).__name__}: {text[:200]}")


# ---- what was found


def _rows(
    study: str, outcome: Outcome, notes: list[str], panels: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for how runs ended, and for each thing found."""
    results = names_of(RESULTS, outcome.solution.result)
    unknown = ~np.isin(results, ENDED)
    rows = _counted(study, "runs ended", results, np.zeros_like(unknown))
    if isinstance(outcome.finding, CriticalPoint):
        notes += verdicts.notes(study, outcome)
    for path, values in arrays_of(None, outcome.finding).items():
        what = path.removeprefix("finding").removeprefix(".") or "finding"
        if values.ndim > 1:
            notes.append(
                f"{study}: {what} is of shape {values.shape[1:]}, which this table "
                "leaves out; gradflow export writes it to a file"
            )
        elif values.dtype.kind == "b":
            share = fraction(values & ~unknown, unknown)
            rows.append(_row(study, what, share=share))
        elif values.dtype.kind == "S":
            names = values.astype(str)
            # A verdict says itself that it is open.
            open_ended = np.isin(names, OPEN) if what == "kind" else unknown
            rows += _counted(study, what, names, open_ended)
        else:
            rows.append(_row(study, what, values=values.astype(float)))
            _add_panel(panels, study, what, values)
    return rows


def _counted(
    study: str, what: str, names: np.ndarray, unknown: np.ndarray
) -> list[dict[str, Any]]:
    """A row for each name that occurs, most frequent first."""
    different, counts = np.unique(names.astype(str), return_counts=True)
    rows = []
    for name in different[np.argsort(-counts, kind="stable")]:
        flags = names == name
        open_ended = unknown & ~flags if name in OPEN else unknown
        share = fraction(flags & ~open_ended, open_ended)
        rows.append(_row(study, f"{what}: {name}", share=share))
    return rows


def _row(
    study: str,
    what: str,
    *,
    share: Fraction | None = None,
    values: np.ndarray | None = None,
) -> dict[str, Any]:
    """A row of the table: of a share, or of numbers."""
    row: dict[str, Any] = {"study": study, "finding": what}
    shares = ("count", "95 % low", "95 % high", "undecided", "outer low", "outer high")
    numbers = ("least", "median", "greatest", "not finite")
    row |= {"draws": 0, **dict.fromkeys(shares + numbers, "-"), "undecided": 0}
    if share is not None:
        found = (share.count, share.low, share.high)
        outer = (share.undecided, share.outer_low, share.outer_high)
        row |= {"draws": share.draws, **dict(zip(shares, found + outer, strict=True))}
    if values is not None:
        finite = values[np.isfinite(values)]
        row |= {"draws": values.size, "not finite": int(values.size - finite.size)}
        if finite.size:
            middle = float(np.median(finite))
            row |= {"least": float(finite.min()), "median": middle}
            row["greatest"] = float(finite.max())
    return row


def _add_panel(
    panels: dict[str, Any], study: str, what: str, values: np.ndarray
) -> None:
    """The distribution of a number, a line per study."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return
    shares = np.linspace(0, 1, QUANTILES)
    places = np.quantile(finite, shares)
    panel = panels.setdefault(
        what,
        {
            "title": "",
            "sets": [],
            "lines": [],
            "xlabel": what,
            "ylabel": "share of draws up to it",
            "xscale": "log",
            "yscale": "linear",
        },
    )
    panel["sets"].append({"label": study, "x": places, "runs": [shares]})
    if not (places[0] > 0 and places[-1] > 30 * places[0]):
        panel["xscale"] = "linear"
