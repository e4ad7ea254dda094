"""Every public function called with bad values, one argument at a time.

A script of `test_bad_arguments.py`, which runs without the run-time type checker that
the tests run under: this is what a user sees. `CALLS` has a good call of each, from
which bad ones are made by what the good value is.
"""

import enum
import inspect
import json
import re
import signal
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import gradflow as gf
from gradflow import collapse, datasets, manifolds, models, plot, solvers, theory


# pyright: basic, reportArgumentType=false, reportCallIssue=false

jax.config.update("jax_enable_x64", True)

MODULES = (gf, models, manifolds, solvers, theory, datasets, collapse)
MODULES += (theory.dynamics, theory.oja, theory.rates, plot)
# What functions return, and what only subclasses are made of.
RESULTS = {"Certificate", "CriticalPoint", "Fraction", "Outcome", "Paired", "Solution"}
RESULTS |= {"Limit", "Match", "TwoLayerProduct"}
# Figures take what `read_report` gives; `plot.save` checks it for all of them.
DRAWINGS = {name for name in vars(plot) if name.islower()} - {"save"}


def public() -> dict[str, Any]:
    """All that a user can call with arguments, by name."""
    found = {}
    for module in MODULES:
        names = getattr(module, "__all__", None) or vars(module)
        short = module.__name__.removeprefix("gradflow").lstrip(".")
        for name in names:
            item = getattr(module, name)
            home = getattr(item, "__module__", "")
            if name.startswith("_") or not callable(item) or name in RESULTS:
                continue
            if isinstance(item, types.ModuleType) or not home.startswith("gradflow"):
                continue
            # What a module only uses is public where it is from.
            if len(short.split(".")) > 1 or module in (datasets, collapse, plot):
                if home != module.__name__:
                    continue
            if module is plot and name in DRAWINGS:
                continue
            if inspect.isabstract(item) or isinstance(item, enum.EnumMeta):
                continue
            if isinstance(item, type) and issubclass(item, eqx.Enumeration):
                continue
            if inspect.isclass(item) and name.startswith("Abstract"):
                continue
            if not inspect.signature(item).parameters:
                continue
            found[f"{short}.{name}" if short else name] = item
    return found


# ---- good values

RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 3))
KEY = jr.key(0)
MOMENTS = gf.Moments.from_data(X)
PAIR = gf.Moments.from_data(X, X[:, :2])
LOSS = models.SquaredLoss(MOMENTS)
NET = models.DeepLinear((jnp.ones((2, 3)), jnp.ones((3, 2))))
MAP = models.LinearMap(jnp.ones((2, 3)))
BACK = models.LinearMap(jnp.ones((3, 2)))
FLOW = gf.GradientFlow(LOSS)
LINEAR = theory.LinearTheory(LOSS, 2)
LIKELIHOOD = models.NegativeLogLikelihood(MOMENTS)
GAUSSIAN = models.LatentGaussian(jnp.eye(3)[:, :1], models.Isotropic(jnp.zeros(()), 3))
EM = gf.ExpectationMaximization(LIKELIHOOD)
ELBO = models.NegativeELBO(MOMENTS)
CONDITIONAL = models.ConditionalELBO(PAIR)
HIERARCHICAL = models.HierarchicalELBO(MOMENTS)
CVAE_NET = models.NonlinearCVAE.random(3, 2, 2, width=3, depth=1, key=KEY)
HVAE_NET = models.NonlinearHVAE.random(3, 2, 2, width=3, depth=1, key=KEY)
COVARIANCE = models.DiagonalCovariance(jnp.zeros(2))
VAE = models.LinearVAE(MAP, BACK, COVARIANCE)
HVAE = models.LinearHVAE(
    *(MAP, models.LinearMap(jnp.eye(2)), BACK, models.LinearMap(jnp.eye(2))),
    *(COVARIANCE, COVARIANCE),
)
FRAME = models.TiedAutoencoder(jnp.eye(3)[:, :2])
SOLVER = diffrax.Tsit5()
FLAGS = np.array([True, False, True])


def _start(key):
    return jr.normal(key, (3,))


STUDY = gf.Study(_start, lambda p: p, lambda s: s, draws=3)
REPORT = gf.Report("convergence", "", {}, {}, [], [], {}, {})
EMPTY = Path(tempfile.mkdtemp())
ONE, TWO = jnp.ones(()), jnp.eye(2)

# The arguments of a good call of each.
CALLS: dict[str, dict[str, Any]] = {
    "AlternatingMaximization": {"energy": LIKELIHOOD},
    "Audit": {"start": NET},
    "BalancedInit": {"widths": (3, 2, 3), "product": jnp.ones((3, 3))},
    "Decided": {"probability": 0.1},
    "Descent": {
        "flow": FLOW, "solver": SOLVER, "control": solvers.NormwiseStepSize(1e-3),
        "tolerance": ONE, "stop": None, "max_steps": jnp.array(5),
        "audit": gf.Audit, "patience": 9,
    },
    "ExpandedMaximization": {"energy": LIKELIHOOD},
    "ExpectationMaximization": {"energy": LIKELIHOOD},
    "FactorAnalysis": {
        "n_components": 2, "noise": "diagonal", "rotation": "varimax", "tol": 1e-9,
        "max_iter": 10, "floor": 1e-6, "noise_variance_init": np.ones(3),
    },
    "GaussianInit": {"widths": (3, 2, 3), "scale": 0.1},
    "GaussianLike": {"point": NET, "scale": 0.1, "spread": 0.1},
    "GradientFlow": {"energy": LOSS, "manifold": manifolds.Euclidean()},
    "Integrator": {
        "flow": FLOW, "horizon": 1.0, "tolerance": 1e-3, "rtol": 1e-6,
        "stop": _start, "method": SOLVER, "max_steps": 9, "audit": gf.Audit,
        "layout": "auto",
    },
    "Iterator": {
        "iteration": EM, "tolerance": 1e-3, "stop": _start, "max_steps": 9,
        "slack": 1e-9, "gain": 1e-9,
    },
    "LowRankInit": {"shape": (3, 3), "rank": 1, "scale": 0.1},
    "Moments": {"xx": TWO, "xy": TWO, "yy": TWO, "count": 3, "autoencoding": True},
    "Narrower": {"width": 0.1},
    "NearPoint": {"point": NET, "distance": 0.1, "direction": NET},
    "OrthogonalInit": {"widths": (3, 2, 3), "scale": 0.1},
    "OrthonormalBalancedInit": {"widths": (2, 3, 3)},
    "Report": {
        "experiment": "a", "claim": "b", "config": {}, "environment": {}, "rows": [],
        "notes": [], "figure": {}, "seconds": {},
    },
    "Squarem": {"iteration": EM},
    "Store": {
        "folder": EMPTY / "new", "settings": {}, "experiment": "a", "chunk": 3,
        "shard": (1, 2),
    },
    "Study": {
        "initialize": _start, "descend": _start, "inspect": _start, "draws": 3,
        "batch": 2,
    },
    "check_descent": {
        "descend": _start, "initialize": _start, "key": KEY, "energy": LOSS,
    },
    "check_energy": {"energy": LOSS, "point": NET, "key": KEY},
    "check_initializer": {"initialize": _start, "key": KEY},
    "check_inspection": {
        "inspect": _start, "descend": _start, "initialize": _start, "key": KEY,
    },
    "check_manifold": {
        "manifold": manifolds.Euclidean(), "energy": LOSS, "point": NET, "key": KEY,
    },
    "check_study": {"study": STUDY, "key": KEY},
    "classify": {
        "flow": FLOW, "theory": LINEAR, "at": NET, "speed_tol": 1e-5,
        "curvature_tol": 1e-8,
    },
    "describe": {"finding": None},
    "fraction": {"flags": FLAGS, "undecided": ~FLAGS, "sequential": False},
    "integrate": {
        "flow": FLOW, "point0": NET, "horizon": 1.0, "tolerance": 1e-3, "rtol": 1e-6,
        "stop": _start, "times": jnp.ones(1), "observe": {"a": _start},
        "method": SOLVER, "max_steps": 9, "audit": gf.Audit, "throw": True,
    },
    "iterate": {
        "iteration": EM, "point0": GAUSSIAN, "tolerance": 1e-3, "stop": _start,
        "times": jnp.ones(1), "observe": {"a": _start}, "max_steps": 9,
        "slack": 1e-9, "gain": 1e-9, "throw": True,
    },
    "merge": {"folders": [EMPTY], "out": EMPTY / "new"},
    "names_of": {"enumeration": gf.KIND, "items": gf.KIND.unresolved},
    "paired": {
        "first": FLAGS, "second": FLAGS, "undecided_first": ~FLAGS,
        "undecided_second": ~FLAGS,
    },
    "precision": {"dtype": "float64"},
    "read_report": {"folder": EMPTY},
    "run_studies": {
        "studies": {"a": (STUDY, KEY)}, "dtype": "float64", "device": "cpu",
        "progress": False, "store": None, "keep": gf.without_points,
    },
    "run_study": {
        "study": STUDY, "key": KEY, "dtype": "float64", "device": "cpu",
        "progress": False, "store": None, "keep": gf.without_points,
    },
    "run_until": {
        "study": STUDY, "key": KEY, "flag": _start, "until": gf.Narrower(0.1),
        "every": 3, "dtype": "float64", "device": "cpu", "progress": False,
        "store": None,
    },
    "section7_widths": {"dimension": 4, "depth": 2, "rank": 2},
    "strata": {"labels": [1, 2, 1], "flags": FLAGS, "undecided": ~FLAGS},
    "to_xarray": {"folder": EMPTY},
    "verify_studies": {
        "studies": {"a": (STUDY, KEY)}, "folder": EMPTY, "chunks": 3,
        "dtype": "float64", "device": "cpu", "progress": False,
    },
    "without_points": {"solution": None, "finding": ...},
    "models.Block": {"blocks": (GAUSSIAN.noise,)},
    "models.CholeskyCovariance": {
        "log_diagonal": jnp.ones(2), "below": jnp.ones(1),
    },
    "models.ConditionalELBO": {
        "moments": PAIR, "beta": 1.0, "decoder_std": 1.0, "prior_std": 1.0,
        "covariance": TWO,
    },
    "models.DeepLinear": {"weights": NET.weights},
    "models.Diagonal": {"log_variances": jnp.ones(2)},
    "models.DiagonalCovariance": {"log_variances": jnp.ones(2)},
    "models.Full": {"entries": jnp.ones(3)},
    "models.HierarchicalELBO": {
        "moments": MOMENTS, "beta_1": 1.0, "beta_2": 1.0, "decoder_std": 1.0,
        "prior_std": 1.0, "covariance_1": TWO, "covariance_2": TWO,
    },
    "models.Isotropic": {"log_variance": ONE, "variables": 2},
    "models.LatentGaussian": {"loadings": jnp.ones((3, 1)), "noise": GAUSSIAN.noise},
    "models.LinearCVAE": {
        "encoder_x": MAP, "encoder_y": MAP, "decoder": BACK, "skip": MAP,
        "covariance": COVARIANCE, "log_decoder_variance": ONE,
    },
    "models.LinearHVAE": {
        "encoder_1": MAP, "encoder_2": MAP, "decoder_1": BACK, "decoder_2": BACK,
        "covariance_1": COVARIANCE, "covariance_2": COVARIANCE,
    },
    "models.LinearMap": {"weight": TWO},
    "models.LinearVAE": {
        "encoder": MAP, "decoder": BACK, "covariance": COVARIANCE,
        "log_decoder_variance": ONE,
    },
    "models.LowRank": {"left": TWO, "log_values": jnp.ones(2), "right": TWO},
    "models.NegativeELBO": {
        "moments": MOMENTS, "beta": 1.0, "decoder_std": 1.0, "prior_std": 1.0,
        "covariance": TWO,
    },
    "models.NegativeLogLikelihood": {
        "moments": MOMENTS, "pattern": np.ones((3, 1), bool), "floor": 1e-6,
    },
    "models.NonlinearCVAE": {
        "encoder": CVAE_NET.encoder, "decoder": CVAE_NET.decoder,
    },
    "models.NonlinearHVAE": {
        "encoder_1": HVAE_NET.encoder_1, "encoder_2": HVAE_NET.encoder_2,
        "decoder_1": HVAE_NET.decoder_1, "decoder_2": HVAE_NET.decoder_2,
    },
    "models.SampledConditionalELBO": {
        "beta": 1.0, "decoder_std": 1.0, "prior_std": 1.0,
    },
    "models.SampledHierarchicalELBO": {
        "beta_1": 1.0, "beta_2": 1.0, "decoder_std": 1.0, "prior_std": 1.0,
        "encoder_std": 1.0,
    },
    "models.RootCovariance": {"factor": TWO},
    "models.SquaredLoss": {"moments": MOMENTS},
    "models.TiedAutoencoder": {"frame": TWO},
    "models.battery_pattern": {"sizes": (3, 3), "shared": 1, "private": (1, 1)},
    "models.invariants": {"network": NET},
    "manifolds.FixedRank": {"rank": 2, "depth": 2},
    "manifolds.balanced_inverse": {"weight": TWO, "z": TWO, "depth": 2, "rank": 1},
    "manifolds.balanced_inverse_factored": {
        "log_values": jnp.ones(2), "core": TWO, "left_part": TWO, "right_part": TWO,
        "depth": 2,
    },
    "manifolds.balanced_operator": {"weight": TWO, "z": TWO, "depth": 2, "rank": 1},
    "manifolds.balanced_operator_factored": {
        "log_values": jnp.ones(2), "left": TWO, "right": TWO, "z_right": TWO,
        "z_left": TWO, "depth": 2,
    },
    "manifolds.tangent_projection": {"weight": TWO, "z": TWO, "rank": 1},
    "solvers.NormwiseStepSize": {
        "rtol": 1e-3, "atol": 1e-3, "pcoeff": 0.3, "icoeff": 0.3, "norm": jnp.max,
    },
    "solvers.RKC2": {"max_stages": 20},
    "solvers.RankPreserving": {"solver": SOLVER},
    "theory.CVAETheory": {
        "energy": CONDITIONAL, "latent": 2, "rank": 2, "skip_rank": 2,
        "diagonal": False, "deep": False,
    },
    "theory.HVAETheory": {
        "energy": HIERARCHICAL, "latent_1": 2, "latent_2": 2, "rank_1": 2, "rank_2": 2,
    },
    "theory.LinearTheory": {"energy": LOSS, "rank": 2},
    "theory.LowRankTheory": {"energy": LOSS, "rank": 2, "depth": 2},
    "theory.PCCATheory": {"energy": LIKELIHOOD, "latents": 1, "sizes": (1, 2)},
    "theory.PPCATheory": {"energy": LIKELIHOOD, "latents": 1},
    "theory.VAETheory": {"energy": ELBO, "latent": 2, "rank": 2, "diagonal": False},
    "theory.battery_optimum": {"energy": LIKELIHOOD, "sizes": (1, 2)},
    "theory.theory_of": {"energy": LIKELIHOOD, "point": GAUSSIAN},
    "theory.dynamics.decoupled_escape_time": {
        "u0": 0.1, "m": 1.0, "lam": 1.0, "depth": 2, "share": 0.5,
    },
    "theory.dynamics.decoupled_mode": {
        "u0": 0.1, "m": 1.0, "lam": 1.0, "depth": 2, "t": 1.0,
    },
    "theory.dynamics.remark42": {"eigenvalue": 1.0, "t": 1.0},
    "theory.dynamics.stacked_velocity": {"moments": MOMENTS, "network": NET},
    "theory.dynamics.whitened_two_layer": {
        "moments": MOMENTS, "network": NET, "t": 1.0,
    },
    "theory.oja.limit": {"moments": MOMENTS, "network": FRAME},
    "theory.oja.projector": {"moments": MOMENTS, "network": FRAME, "t": 1.0},
    "theory.oja.rate": {"moments": MOMENTS, "rank": 2},
    "theory.oja.stiefel_projector": {"moments": MOMENTS, "network": FRAME, "t": 1.0},
    "theory.rates.autoencoder_rate": {
        "eigenvalues": [3.0, 2.0, 1.0], "rank": 2, "depth": 2,
    },
    "theory.rates.balanced_rates": {"theory": LINEAR, "depth": 2},
    "theory.rates.rates": {"theory": LINEAR, "network": NET},
    "datasets.gaussian": {"key": KEY, "dimension": 3, "samples": 9},
    "datasets.mnist": {"digit": 3, "task": "autoencode"},
    "datasets.mnist_images": {"path": EMPTY, "split": "train"},
    "datasets.prescribed": {
        "singular_values": [2.0, 1.0], "x_dim": 3, "y_dim": 3,
        "condition_number": 2.0, "key": KEY,
    },
    "datasets.teacher": {
        "key": KEY, "x_dim": 3, "y_dim": 3, "rank": 1, "samples": 9, "noise": 0.1,
    },
    "collapse.active_units": {"energy": ELBO, "point": VAE, "threshold": 0.1},
    "collapse.code": {"energy": ELBO, "point": VAE},
    "collapse.is_collapsed": {
        "divergences": jnp.ones((3, 2)), "epsilon": 0.1, "delta": 0.1,
    },
    "collapse.collapse_level": {"divergences": jnp.ones((3, 2)), "delta": 0.1},
    "collapse.kl": {"energy": ELBO, "point": VAE},
    "collapse.kl_hierarchical": {"energy": HIERARCHICAL, "point": HVAE},
    "collapse.kl_samples": {"energy": ELBO, "point": VAE, "data": X},
    "collapse.spectra": {"energy": ELBO, "point": VAE},
    "collapse.spectral_distance": {"one": jnp.ones(2), "other": jnp.ones(2)},
    "collapse.turned": {"energy": ELBO, "point": VAE},
    "plot.save": {"report": REPORT, "folder": EMPTY},
}  # fmt: skip

# Where arguments are looked at later than they are given.
INSTEAD = {
    # As in scikit-learn.
    "FactorAnalysis": lambda **given: gf.FactorAnalysis(**given).fit(X),
    "precision": lambda **given: gf.precision(**given).__enter__(),
}

# ---- bad values

NAN, INF = float("nan"), float("inf")
NOTHING = object()
# Good after all: an argument, or an argument of one function, and the bad value.
FINE = {
    ("horizon", "inf"), ("t", "inf"), ("t", "0"), ("digit", "0"), ("gain", "0"),
    ("slack", "0"), ("noise", "0"), ("spread", "0"), ("NearPoint.distance", "0"),
    ("atol", "0"), ("pcoeff", "0"), ("shared", "0"), ("t", "array"), ("threshold", "0"),
    ("delta", "0"), ("epsilon", "0"), ("threshold", "inf"), ("epsilon", "inf"),
    ("u0", "0"), ("u0", "-1"), ("folder", "text"), ("path", "text"),
    ("out", "text"), ("experiment", "unknown"), ("claim", "unknown"),
    ("Report.experiment", "unknown"), ("private", "(0,)"),
    ("claim", "empty"), ("experiment", "empty"), ("rotation", "None"),
    # Any arrays are a point; whether it is one of this energy is what is asked.
    ("GaussianLike.point", "array"), ("NearPoint.point", "array"),
    ("check_energy.point", "array"), ("check_manifold.point", "array"),
    # A target of no strength, and a data set of none.
    ("m", "0"), ("m", "-1"), ("singular_values", "(0,)"), ("singular_values", "empty"),
    # The whole of the tangent space at 0.
    ("manifolds.balanced_inverse.rank", "0"),
    ("manifolds.balanced_operator.rank", "0"),
    ("manifolds.tangent_projection.rank", "0"),
}  # fmt: skip


def bad_values(value: Any) -> dict[str, Any]:
    """Values that an argument can't take whose good value is this, by name."""
    if isinstance(value, (bool, np.bool_)):
        return {"text": "x", "3": 3, "nan": NAN}
    if isinstance(value, int):
        numbers = {"0": 0, "-1": -1, "2.5": 2.5, "nan": NAN, "inf": INF, "1j": 1j}
        return {**numbers, "text": "x", "true": True, "list": [1]}
    if isinstance(value, float):
        numbers = {"0": 0.0, "-1": -1.0, "nan": NAN, "inf": INF, "1j": 1j}
        return {**numbers, "text": "x", "array": np.ones((2, 2))}
    if isinstance(value, str):
        return {"unknown": "x", "3": 3, "list": ["x"], "empty": ""}
    if isinstance(value, Path):
        return {"3": 3, "list": [3], "object": NOTHING}
    if isinstance(value, (jax.Array, np.ndarray)):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return {"3": 3, "text": "x", "two": jr.split(KEY), "float": ONE}
        bad = {"text": "x", "object": NOTHING, "words": np.array(["x"])}
        bad |= {"axes": np.asarray(value)[None, None]}
        if value.dtype.kind == "f":
            bad |= {"1j": np.asarray(value) * 1j, "dict": {}}
            bad |= {"empty": np.zeros((0,) * max(1, value.ndim))}
        return bad
    several = isinstance(value, (list, tuple))
    if several and value and isinstance(value[0], (int, float)):
        wrong = {"(0,)": (0,), "(-1,)": (-1, -1), "(nan,)": (NAN, NAN)}
        return {**wrong, "3": 3, "text": "x", "empty": (), "words": ("x", "y")}
    if several:
        return {"3": 3, "text": "x", "objects": (NOTHING,)}
    if isinstance(value, dict):
        return {"3": 3, "text": "x", "list": [3]}
    if isinstance(value, eqx.Module) or value is None:
        return {"3": 3, "text": "x", "object": NOTHING, "array": np.ones((2, 2))}
    return {"3": 3, "text": "x", "object": NOTHING, "list": [3]}


def table() -> dict[tuple[str, str, str], Any]:
    """Calls by function, argument and bad value."""
    calls, items = {}, public() | INSTEAD
    for name, arguments in CALLS.items():
        for argument, good in arguments.items():
            for text, bad in bad_values(good).items():
                known = {(argument, text), (f"{name}.{argument}", text)}
                if known & FINE or good is ...:
                    continue
                changed = {**arguments, argument: bad}
                places = [changed.pop("data")] if "data" in changed else []
                if places:
                    places = [*changed.values(), *places]
                    changed = {}
                calls[name, argument, text] = (items[name], places, changed)
    return calls


def _too_long(*_: object) -> None:
    raise TimeoutError("it took more than 10 s")


def judged(call) -> str:
    """What is wrong with what is said of a bad call: nothing, if it is as it should."""
    function, places, arguments = call
    signal.alarm(10)
    try:
        function(*places, **arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return "nothing"


def sound(argument: str, said: str) -> bool:
    kind, _, text = said.partition(": ")
    named = re.search(rf"(?<![A-Za-z]){re.escape(argument)}(?![A-Za-z])", text)
    return kind == "ValueError" and bool(named) and "\n" not in text and len(text) < 300


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, _too_long)
    calls = table()
    if sys.argv[1:] == ["first"]:
        firsts = {key[:2]: key for key in reversed(calls)}.values()
        calls = {key: calls[key] for key in reversed(firsts)}
    print(json.dumps([[*key, judged(call)] for key, call in calls.items()]))
