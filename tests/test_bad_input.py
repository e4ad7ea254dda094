"""Bad input of every kind, through Python and through the command line.

The Python cases run as a script, in one process without the run-time type checker that
the other tests run under: this is what a user sees. The file is long because it is
tables: a new check is a line in one of them.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from gradflow import (
    BalancedInit,
    classify,
    datasets,
    fraction,
    GaussianInit,
    GradientFlow,
    integrate,
    Moments,
    NearPoint,
    OrthogonalInit,
    OrthonormalBalancedInit,
    precision,
    read_report,
    Report,
    run_study,
    Study,
)
from gradflow.cli import main
from gradflow.experiments.base import RunConfig
from gradflow.experiments.convergence import Config
from gradflow.initial import section7_widths
from gradflow.models import (
    ConditionalELBO,
    DeepLinear,
    HierarchicalELBO,
    NegativeELBO,
    SquaredLoss,
)
from gradflow.theory import CVAETheory, HVAETheory, LinearTheory, VAETheory


# pyright: basic, reportArgumentType=false, reportCallIssue=false

NAN, INF = float("nan"), float("inf")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 3))


def _with(value, array=X):
    """A copy with three bad values, the first at [2, 1]."""
    array = array.copy()
    array[2, 1] = array[4, 0] = array[4, 2] = value
    return array


def _moments(x=X, y=None):
    return Moments.from_data(x, y)


def _loss(moments=None):
    return SquaredLoss(moments or _moments())


def _network(*widths):
    return DeepLinear(
        tuple(
            jnp.ones((out, into))
            for into, out in zip(widths[:-1], widths[1:], strict=True)
        )
    )


def _elbo(levels=1):
    return (NegativeELBO if levels == 1 else HierarchicalELBO)(_moments())


def _conditional():
    return ConditionalELBO(_moments(X, X[:, :2]))


def _integrate(**options):
    return integrate(GradientFlow(_loss()), _network(3, 2, 3), **options)


def _run(dtype="float64", key=None, **changes):
    theory = LinearTheory(_loss(), 1)
    flow = GradientFlow(theory.energy)
    fields = {
        "initialize": GaussianInit((3, 1, 3), 0.3),
        "descend": eqx.Partial(integrate, flow, throw=False),
        "inspect": eqx.Partial(classify, flow, theory),
        "draws": 4,
    }
    study = Study(**fields | changes)
    return run_study(study, jr.key(0) if key is None else key, dtype=dtype)


def _report(**changes):
    fields = {"experiment": "convergence", "claim": "", "config": {"seed": 0}}
    fields |= {"environment": {}, "rows": [], "notes": [], "figure": {}, "seconds": {}}
    return Report(**fields | changes)


def _folder(content=None):
    folder = Path(tempfile.mkdtemp())
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / "report.json").write_bytes(data)
    return folder


def _file():
    path = _folder() / "file"
    path.write_text("text")
    return path


def _written(report, changed):
    folder = _folder()
    report.write(folder)
    changed.write(folder)


# Numbers that no option takes, and what is said of them.
NUMBERS = {"-1": -1, "0": 0, "nan": NAN, "inf": INF, "x": "x"}


def _options(label, call, allowed=()):
    """One case per bad number for one option, which is the last word of the label."""
    name = label.split()[-1]
    return {
        f"{label}={text}": (lambda value=value: call(**{name: value}), name)
        for text, value in NUMBERS.items()
        if text not in allowed
    }


# What is done, and a piece of the message: the name of the argument, mostly.
PYTHON = {
    # data: shapes and types
    "rows differ": (lambda: _moments(X, X[:5]), "x is (20, 3) and y is (5, 3)"),
    "vector": (lambda: _moments(X[0]), "x is 1-dimensional"),
    "cube": (lambda: _moments(X, np.ones((20, 2, 2))), "y is 3-dimensional"),
    "no rows": (lambda: _moments(X[:0]), "x has shape (0, 3)"),
    "no columns": (lambda: _moments(X[:, :0]), "x has shape (20, 0)"),
    "complex": (lambda: _moments(X + 1j), "x has dtype complex128"),
    "object": (lambda: _moments(X.astype(object)), "x has dtype object"),
    "text": (lambda: _moments([["a", "b"]]), "x has dtype <U1"),
    "truth values": (lambda: _moments(X > 0), "x has dtype bool"),
    "ragged": (lambda: _moments([[1.0], [1.0, 2.0]]), "x is a list"),
    "nothing": (lambda: _moments(None), "x"),
    "masked": (lambda: _moments(np.ma.masked_array(X)), "x is a masked array"),
    "no batch": (lambda: Moments.from_batches([]), "batches is empty"),
    "batch of three": (lambda: Moments.from_batches([(X, X, X)]), "batch 0"),
    "batches differ": (lambda: Moments.from_batches([X, X[:, :2]]), "in batch 1"),
    "batch without y": (lambda: Moments.from_batches([(X, X), X]), "batch 1"),
    "no batches": (lambda: Moments.from_batches(3), "batches is a int"),
    # data: values
    **{
        f"{value} in {name}": (
            lambda args=args: _moments(*args),
            f"{name} has 3 non-finite values, first at [2, 1]",
        )
        for value in (NAN, INF, -INF)
        for name, args in {"x": (_with(value),), "y": (X, _with(value))}.items()
    },
    "nan in a batch": (
        lambda: Moments.from_batches([X, _with(NAN)]),
        "x in batch 1 has 3 non-finite values, first at [22, 1]",
    ),
    "zero x": (lambda: _moments(0 * X), "x is all zero"),
    "zero y": (lambda: _moments(X, 0 * X), "y is all zero"),
    "constant": (lambda: Moments.from_data(0 * X + 3, center=True), "x is constant"),
    "one sample centered": (lambda: Moments.from_data(X[:1], center=True), "x"),
    "overflow": (lambda: _moments(1e200 * X), "x is as large as"),
    "underflow": (lambda: _moments(1e-200 * X), "x is at most"),
    # moments
    "dimension 0": (lambda: _moments().restrict(0), "dimension=0"),
    "dimension -1": (lambda: _moments().restrict(-1), "dimension=-1"),
    "dimension 4 of 3": (lambda: _moments().restrict(4), "dimension=4"),
    "dimension nan": (lambda: _moments().restrict(NAN), "dimension"),
    "dimension 1.5": (lambda: _moments().restrict(1.5), "dimension"),
    "dimension x": (lambda: _moments().restrict("x"), "dimension"),
    "dimension beyond the rank": (
        lambda: _moments(X[:2]).restrict(3),
        "dimension=3 is larger than the rank 2",
    ),
    "count 0": (lambda: Moments(np.eye(2), np.eye(2), np.eye(2), 0), "count"),
    "nan in xy": (lambda: Moments(np.eye(2), NAN * np.eye(2), np.eye(2), 1), "xy"),
    "xx not symmetric": (
        lambda: Moments(np.triu(np.ones((2, 2))), np.eye(2), np.eye(2), 1),
        "xx isn't symmetric",
    ),
    "xy of other shape": (lambda: Moments(np.eye(2), np.eye(3), np.eye(2), 1), "xy"),
    "xx of integers": (lambda: Moments(*[np.eye(2, dtype=int)] * 3, 1), "xx has dtype"),
    # datasets
    **_options("mnist digit", datasets.mnist, allowed=("0",)),
    "digit 10": (lambda: datasets.mnist(10), "digit"),
    "task": (lambda: datasets.mnist(task="half"), "task"),
    "split": (lambda: datasets.mnist_images(".", split="half"), "split"),
    "no images": (lambda: datasets.mnist_images(_folder()), "has no file"),
    **_options(
        "gaussian dimension",
        lambda dimension: datasets.gaussian(jr.key(0), dimension, 9),
    ),
    **_options(
        "gaussian samples", lambda samples: datasets.gaussian(jr.key(0), 3, samples)
    ),
    **_options("teacher rank", lambda rank: datasets.teacher(jr.key(0), 3, 3, rank, 9)),
    **_options(
        "teacher noise",
        lambda noise: datasets.teacher(jr.key(0), 3, 3, 1, 9, noise=noise),
        allowed=("0",),
    ),
    "rank of a teacher": (lambda: datasets.teacher(jr.key(0), 3, 4, 4, 9), "rank=4"),
    **_options(
        "prescribed condition_number",
        lambda condition_number: datasets.prescribed(
            [1.0], x_dim=3, y_dim=3, condition_number=condition_number, key=jr.key(0)
        ),
    ),
    "singular values": (
        lambda: datasets.prescribed([1.0, -1.0], x_dim=3, y_dim=3, key=jr.key(0)),
        "singular_values",
    ),
    "too many singular values": (
        lambda: datasets.prescribed([1.0] * 4, x_dim=3, y_dim=3, key=jr.key(0)),
        "singular_values has 4 entries",
    ),
    # networks and losses
    "no factor": (lambda: DeepLinear(()), "weights is empty"),
    "factors differ": (
        lambda: DeepLinear((jnp.ones((2, 3)), jnp.ones((3, 3)))),
        "weights[1] takes 3 inputs but weights[0] gives 2",
    ),
    "width 0": (lambda: DeepLinear((jnp.ones((0, 3)),)), "weights[0] has shape (0, 3)"),
    "vector for a factor": (lambda: DeepLinear((jnp.ones(3),)), "weights[0]"),
    "other inputs": (lambda: _loss()(_network(4, 2, 3)), "maps 4 inputs to 3 outputs"),
    "other outputs": (lambda: _loss()(_network(3, 2, 4)), "data have 3 and 3"),
    # starts
    **{
        case: (call, piece)
        for start in (GaussianInit, OrthogonalInit)
        for name in [start.__name__]
        for case, (call, piece) in {
            **_options(f"{name} scale", lambda scale, s=start: s((3, 1, 3), scale)),
            f"{name} one width": (lambda s=start: s((3,), 1.0), "widths=(3,)"),
            f"{name} no width": (lambda s=start: s((), 1.0), "widths=()"),
            f"{name} width 0": (lambda s=start: s((3, 0, 3), 1.0), "widths=(3, 0, 3)"),
            f"{name} width -1": (lambda s=start: s((3, -1), 1.0), "widths=(3, -1)"),
            f"{name} width 1.5": (
                lambda s=start: s((3, 1.5), 1.0),
                "widths[1] must be a whole number, got 1.5",
            ),
            f"{name} width x": (
                lambda s=start: s((3, "x"), 1.0),
                "widths[1] must be a whole number, got 'x'",
            ),
        }.items()
    },
    "balanced, other shape": (
        lambda: BalancedInit((3, 2, 4), jnp.ones((3, 3))),
        "product has shape (3, 3)",
    ),
    "balanced, rank": (
        lambda: BalancedInit((3, 2, 3), jnp.eye(3)),
        "rank=3, which is larger than min(widths)=2",
    ),
    "balanced, nan": (
        lambda: BalancedInit((3, 2, 3), NAN * jnp.ones((3, 3))),
        "product",
    ),
    "orthonormal, not narrowest first": (
        lambda: OrthonormalBalancedInit((4, 3, 2, 4)),
        "widths=(4, 3, 2, 4)",
    ),
    **_options(
        "NearPoint distance",
        lambda distance: NearPoint(_network(3, 3), distance),
        ["0"],
    ),
    **_options("section7_widths depth", lambda depth: section7_widths(4, depth)),
    **_options(
        "section7_widths dimension", lambda dimension: section7_widths(dimension, 2)
    ),
    **_options("section7_widths rank", lambda rank: section7_widths(4, 3, rank)),
    "rank 5 of 4": (lambda: section7_widths(4, 3, 5), "rank=5"),
    # theory
    **_options("LinearTheory rank", lambda rank: LinearTheory(_loss(), rank)),
    **_options(
        "NegativeELBO beta",
        lambda beta: NegativeELBO(_moments(), beta=beta),
    ),
    **_options(
        "NegativeELBO decoder_std",
        lambda decoder_std: NegativeELBO(_moments(), decoder_std=decoder_std),
    ),
    **_options(
        "NegativeELBO prior_std",
        lambda prior_std: NegativeELBO(_moments(), prior_std=prior_std),
    ),
    **_options(
        "NegativeELBO covariance",
        lambda covariance: NegativeELBO(_moments(), covariance=covariance),
    ),
    **_options(
        "ConditionalELBO beta",
        lambda beta: ConditionalELBO(_moments(), beta=beta),
    ),
    **_options(
        "ConditionalELBO decoder_std",
        lambda decoder_std: ConditionalELBO(_moments(), decoder_std=decoder_std),
    ),
    **_options(
        "ConditionalELBO prior_std",
        lambda prior_std: ConditionalELBO(_moments(), prior_std=prior_std),
    ),
    **_options(
        "ConditionalELBO covariance",
        lambda covariance: ConditionalELBO(_moments(), covariance=covariance),
    ),
    **_options(
        "HierarchicalELBO beta_1",
        lambda beta_1: HierarchicalELBO(_moments(), beta_1=beta_1),
    ),
    **_options(
        "HierarchicalELBO beta_2",
        lambda beta_2: HierarchicalELBO(_moments(), beta_2=beta_2),
    ),
    **_options(
        "HierarchicalELBO decoder_std",
        lambda decoder_std: HierarchicalELBO(_moments(), decoder_std=decoder_std),
    ),
    **_options(
        "HierarchicalELBO prior_std",
        lambda prior_std: HierarchicalELBO(_moments(), prior_std=prior_std),
    ),
    **_options(
        "HierarchicalELBO covariance_1",
        lambda covariance_1: HierarchicalELBO(_moments(), covariance_1=covariance_1),
    ),
    **_options(
        "HierarchicalELBO covariance_2",
        lambda covariance_2: HierarchicalELBO(_moments(), covariance_2=covariance_2),
    ),
    **_options("VAETheory latent", lambda latent: VAETheory(_elbo(), latent)),
    **_options("VAETheory rank", lambda rank: VAETheory(_elbo(), 2, rank=rank)),
    **_options(
        "HVAETheory latent_1", lambda latent_1: HVAETheory(_elbo(2), latent_1, 2)
    ),
    **_options(
        "HVAETheory rank_2", lambda rank_2: HVAETheory(_elbo(2), 2, 2, rank_2=rank_2)
    ),
    **_options("CVAETheory latent", lambda latent: CVAETheory(_conditional(), latent)),
    **_options(
        "CVAETheory skip_rank",
        lambda skip_rank: CVAETheory(_conditional(), 2, skip_rank=skip_rank),
    ),
    "rank 4 of 3": (
        lambda: LinearTheory(_loss(), 4),
        "rank=4 is larger than min(widths)=3",
    ),
    "repeated columns": (
        lambda: LinearTheory(_loss(_moments(X[:, [0, 1, 1]])), 1),
        "xx has rank 2 of 3",
    ),
    "repeated rows": (
        lambda: LinearTheory(_loss(_moments(X[[0, 1, 0, 1]])), 1),
        "xx has rank 2 of 3",
    ),
    "fewer samples than dimensions": (
        lambda: LinearTheory(_loss(_moments(X[:2])), 1),
        "moments.restrict(2)",
    ),
    "ill-conditioned": (
        lambda: LinearTheory(_loss(_moments(X * [1, 1, 1e-8])), 1),
        "xx has rank 2 of 3",
    ),
    "constant pixels": (
        lambda: LinearTheory(SquaredLoss(datasets.mnist()), 1),
        "xx has rank 712 of 784",
    ),
    # flows
    **_options("integrate horizon", _integrate, allowed=("inf",)),
    **_options("integrate tolerance", _integrate),
    **_options("integrate rtol", _integrate),
    **_options("integrate max_steps", _integrate),
    "tolerance like rtol": (
        lambda: _integrate(tolerance=1e-9, rtol=1e-9),
        "tolerance=1e-09 can't be reached with solver tolerance 1e-09",
    ),
    "tolerance below float64": (lambda: _integrate(tolerance=1e-14), "rtol=1e-17"),
    "method": (lambda: _integrate(method="Tsit5"), "method='Tsit5'"),
    "method class": (lambda: _integrate(method=[3]), "method must be a Solver"),
    "observe without times": (lambda: _integrate(observe={}), "observe"),
    "no times": (lambda: _integrate(times=jnp.ones(0)), "times"),
    "times fall": (lambda: _integrate(times=jnp.asarray([2.0, 1.0])), "times"),
    "times nan": (lambda: _integrate(times=jnp.asarray([NAN])), "times"),
    "integer point": (
        lambda: integrate(GradientFlow(_loss()), DeepLinear((jnp.eye(3, dtype=int),))),
        "weights[0] must be an array of real numbers",
    ),
    # studies
    **_options("Study draws", _run),
    **_options("Study batch", _run),
    "draws 2.5": (lambda: _run(draws=2.5), "draws"),
    "draws true": (lambda: _run(draws=True), "draws"),
    "initialize": (lambda: _run(initialize=3), "initialize"),
    "descend": (lambda: _run(descend=3), "descend"),
    "no descend": (lambda: _run(descend=()), "descend"),
    "descend in a list": (lambda: _run(descend=[len]), "descend"),
    "inspect": (lambda: _run(inspect=None), "inspect"),
    "seed for a key": (lambda: _run(key=0), "key must be"),
    "many keys": (lambda: _run(key=jr.split(jr.key(0), 3)), "key must be"),
    "float16": (lambda: _run(dtype="float16"), "dtype='float16'"),
    "dtype of numpy": (lambda: precision(np.float64).__enter__(), "dtype="),
    "device": (
        lambda: run_study(Study(len, len, len, 1), jr.key(0), device="tpu"),
        "install jax[tpu] or use --device",
    ),
    "device of no name": (
        lambda: run_study(Study(len, len, len, 1), jr.key(0), device="abacus"),
        "device=abacus asked, but JAX sees only",
    ),
    # fractions
    "no draws": (lambda: fraction(np.zeros(0, bool)), "flags"),
    "numbers": (lambda: fraction([1.0, 0.0]), "flags"),
    "ragged flags": (lambda: fraction([[True], [True, False]]), "flags"),
    "flags of two axes": (lambda: fraction(np.zeros((2, 2), bool)), "flags"),
    "other draws": (lambda: fraction([True], [True, False]), "undecided"),
    "both": (lambda: fraction([True], [True]), "undecided"),
    # reports
    "no folder": (lambda: read_report(Path("nowhere")), "nowhere has no report.json"),
    "no report": (lambda: read_report(_folder()), "has no report.json"),
    "report of nothing": (lambda: read_report(_folder("")), "is damaged"),
    "half a report": (lambda: read_report(_folder('{"rows": [')), "is damaged"),
    "report without rows": (lambda: read_report(_folder('{"rows": []}')), "is damaged"),
    "a list for a report": (lambda: read_report(_folder("[]")), "is damaged"),
    "bytes": (lambda: read_report(_folder(b"\xff\xfe")), "is damaged"),
    "deep report": (lambda: read_report(_folder("[" * 100_000)), "is damaged"),
    "rows no list": (
        lambda: read_report(
            _folder(_report().to_json().replace('"rows": []', '"rows": {}'))
        ),
        "rows is no list",
    ),
    "other settings": (
        lambda: _written(_report(), _report(config={"seed": 1})),
        "(seed was 0, now 1): give a new folder with --out",
    ),
    "other experiment": (
        lambda: _written(_report(), _report(experiment="other")),
        "(experiment was convergence, now other)",
    ),
    "file for a folder": (lambda: _report().write(_file()), "is no folder"),
    "rows of objects": (lambda: _report(rows=[{"a": object()}]).to_json(), "stored"),
    "rows of sets": (lambda: _report(rows=[{"a": {1}}]).to_json(), "stored"),
    "no figure": (
        lambda: __import__("gradflow").plot.save(_report(experiment="x"), _folder()),
        "x has no figure",
    ),
    # settings of experiments
    **_options("RunConfig draws", RunConfig),
    **_options("RunConfig batch", RunConfig),
    **_options("RunConfig seed", RunConfig, allowed=("0",)),
    **_options("RunConfig tolerance", RunConfig),
    **_options("RunConfig rtol", RunConfig),
    **_options("RunConfig horizon", RunConfig, allowed=("inf",)),
    **_options("RunConfig max_steps", RunConfig),
    **_options("Config digit", Config, allowed=("0",)),
    **_options("Config dimension", Config),
    **_options("Config rank", Config),
    **_options("Config curves", Config, allowed=("0",)),
    **{
        f"Config {name}=({text},)": (
            lambda name=name, value=value: Config(**{name: (2, value)}),
            name,
        )
        for name in ("depths", "scales")
        for text, value in NUMBERS.items()
    },
    "no depths": (lambda: Config(depths=()), "depths is empty"),
    "no scales": (lambda: Config(scales=[]), "scales is empty"),
    "one depth": (lambda: Config(depths=2), "depths must be a list of values, got 2"),
    "two ranks": (lambda: Config(rank=(1, 2)), "rank must be one value"),
    "half a draw": (lambda: Config(draws=2.5), "draws must be a whole number"),
    "true draws": (lambda: Config(draws=True), "draws must be a whole number"),
    "complex scale": (lambda: Config(scales=(1j,)), "scales must be a number"),
    "large seed": (lambda: Config(seed=2**32), "seed must be <= 4294967295"),
    "large draws": (lambda: Config(draws=2**31), "draws must be <= 2147483647"),
    "data of no name": (lambda: Config(data="x"), "data='x' must be one of mnist,"),
    "start of no name": (lambda: Config(start="x"), "start='x' must be one of"),
    "dtype of no name": (lambda: Config(dtype="float16"), "dtype='float16'"),
    "dtype of no text": (lambda: Config(dtype=["float64"]), "dtype"),
    "device of no kind": (lambda: Config(device="x"), "device='x'"),
    "digit of no MNIST": (lambda: Config(digit=3, data="teacher"), "digit=3"),
    "rank above dimension": (
        lambda: Config(rank=5, dimension=4),
        "rank=5 is larger than min(widths)=4",
    ),
    "depth without a rank": (lambda: Config(depths=(2, 1)), "depths has 1"),
    "tolerance of the solver": (
        lambda: Config(tolerance=1e-9, rtol=1e-9),
        "tolerance=1e-09 can't be reached with solver tolerance 1e-09",
    ),
    "tolerance of float32": (
        lambda: Config(dtype="float32", tolerance=1e-4),
        "tolerance >=",
    ),
}


def _what_python_says():
    said = {}
    for case, (call, _) in PYTHON.items():
        try:
            call()
            said[case] = ("nothing", "")
        except Exception as error:
            said[case] = (type(error).__name__, str(error))
    return said


@pytest.fixture(scope="module")
def said():
    script = [sys.executable, "-W", "error", __file__]
    run = subprocess.run(script, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("case", PYTHON)
def test_python(said, case):
    kind, text = said[case]
    assert kind == "ValueError", text
    assert PYTHON[case][1] in text
    assert "\n" not in text and 0 < len(text) < 300


# ---- the command line

WHOLE = {"draws": (), "batch": (), "seed": ("0",), "max-steps": (), "digit": ("0",)}
WHOLE |= {"dimension": (), "rank": (), "depths": (), "curves": ("0",)}
REAL = {"tolerance": (), "rtol": (), "horizon": ("inf",), "scales": ()}

# The arguments after `gradflow run convergence`, and a piece of the message.
RUN = {
    **{
        f"--{name} {text}": name.replace("-", "_") if text in ("-1", "0") else name
        for name, allowed in (WHOLE | REAL).items()
        for text in NUMBERS
        if text not in allowed
    },
    **{f"--{name} 2.5": "must be a whole number, got 2.5" for name in WHOLE},
    "--draws 1.e999": "draws must be a whole number",
    "--draws 1e3": "--draws",
    f"--draws {2**40}": "draws must be <=",
    f"--seed {2**70}": "seed must be <=",
    "--depths": "depths is empty",
    "--scales": "scales is empty",
    "--depths 2 0": "depths must be >= 1, got 0",
    "--depths 2,3": "--depths",
    "--depths 1": "depths has 1",
    "--empty-depths": "--depths",
    "--rank 17": "rank=17 is larger than min(widths)=16",
    "--digit 10": "digit must be <= 9",
    "--digit 1 --data gaussian": "digit=1",
    "--tolerance 1e-9 --rtol 1e-9": "can't be reached with solver tolerance 1e-09",
    "--dtype float32 --tolerance 1e-4": "below what float32 can reach",
    "--dtype float16": '"float64", "float32", "mixed"',
    "--device x": '"cpu", "gpu", "tpu"',
    "--device tpu": "device=tpu asked, but JAX sees only",
    "--data mnits": 'Did you mean "mnist"?',
    "--start x": '"gaussian", "orthogonal"',
    "--drwas 5": "Did you mean --draws?",
    "--draws": "--draws",
    "--draws 3 --draws 4": "--draws",
    "5": "5",
    "--quiet=3": "--quiet",
    "--dimension 713": "dimension=713 is larger than the rank 712",
    "--dimension 785": "dimension=785 is larger than the 784 columns",
    "--out": "--out",
    "--out file": "file is no folder",
    "--out file/below": "file is no folder",
    "--out other": "other holds a report of convergence with other settings",
    "--out damaged": "report.json is damaged",
    "--config": "--config",
    "--config=": "--config",
    "--config nowhere.toml": "--config nowhere.toml: there is no such file",
    "--config other": "--config other: there is no such file",
    "--config file": "--config file is not valid TOML",
    "--config good.toml --draws 0": "draws must be >= 1, got 0",
}
# These are known only when the run begins.
LATE = {"--device tpu", "--dimension 713", "--dimension 785"}

TOML = {
    "[run]\ndraws = 8": "has the table [run]: write settings without one",
    "draws = ": "is not valid TOML",
    "draws = 5\ndraws = 6": "is not valid TOML",
    "drawz = 3": "drawz",
    "draws = 0": "draws must be >= 1, got 0",
    "draws = 2.5": "draws must be a whole number, got 2.5",
    "draws = 'many'": "draws",
    "draws = true": "draws",
    "draws = [1, 2]": "draws",
    "[draws]\nnumber = 1": "draws",
    "[convergence]\ndraws = 3": "convergence",
    "depths = []": "depths is empty",
    "depths = 0": "depths must be >= 1, got 0",
    "depths = [2, 2.5]": "depths must be a whole number, got 2.5",
    "scales = ['x']": "scales",
    "tolerance = true": "tolerance",
    "horizon = nan": "horizon must be a number > 0, got nan",
    "rank = [1]": "rank",
    "dtype = 'float16'": "dtype",
    "device = 1": "device",
    "quiet = 3": "quiet",
    "seed = 2026-01-01": "seed",
    "tolerance = 1e-9\nrtol = 1e-9": "can't be reached",
}

OTHER = {
    "rnu": 'Did you mean "run"?',
    "--drwas": "--drwas",
    "run convergense": 'Did you mean "convergence"?',
    "list all": "all",
    "plot": "FOLDER",
    "plot nowhere": "nowhere has no report.json",
    "plot file": "file has no report.json",
    "plot damaged": "damaged/report.json is damaged",
    "plot strange": "strange has no figure",
    "plot a b": "b",
    "demo --draws 3": "--draws",
    "demo --out file": "file is no folder",
    "demo --out other": "other holds a report",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("neither TOML nor a folder")
    (tmp_path / "good.toml").write_text("draws = 4")
    _report().write(tmp_path / "other")
    _report(experiment="strange").write(tmp_path / "strange")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "report.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _snapshot(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def _refused(tokens, piece, folder, capsys):
    before = _snapshot(folder)
    with pytest.raises(SystemExit) as exit:
        main(tokens)
    output = capsys.readouterr()
    assert exit.value.code == 2, output.err
    assert output.out == ""
    assert output.err.count("\n") == 1 and output.err.endswith("\n")
    assert piece in output.err and "Traceback" not in output.err
    assert _snapshot(folder) == before


@pytest.fixture
def nothing_runs(monkeypatch):
    def run(config, progress, store=None):
        raise AssertionError(f"computed with {config}")

    monkeypatch.setattr("gradflow.experiments.convergence.run", run)


@pytest.mark.parametrize("line", sorted(RUN.keys() - LATE))
def test_run_refuses_before_computing(line, folder, capsys, nothing_runs):
    _refused(["run", "convergence", *line.split()], RUN[line], folder, capsys)


@pytest.mark.parametrize("line", sorted(LATE))
def test_run_refuses(line, folder, capsys):
    _refused(["run", "convergence", *line.split()], RUN[line], folder, capsys)


@pytest.mark.parametrize("text", TOML)
def test_config_file(text, folder, capsys, nothing_runs):
    (folder / "bad.toml").write_text(text)
    tokens = ["run", "convergence", "--config", "bad.toml"]
    _refused(tokens, TOML[text], folder, capsys)


def test_config_file_that_is_no_text(folder, capsys, nothing_runs):
    (folder / "bad.toml").write_bytes(b"\xff\xfe")
    tokens = ["run", "convergence", "--config=bad.toml"]
    _refused(tokens, "--config bad.toml is not valid TOML", folder, capsys)


@pytest.mark.parametrize("line", OTHER)
def test_other_commands(line, folder, capsys, nothing_runs):
    _refused(line.split(), OTHER[line], folder, capsys)


def test_folder_that_takes_no_files(folder, capsys, nothing_runs, monkeypatch):
    # Root may write everywhere, so the mode alone would not do.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    tokens = ["run", "convergence", "--out", "new"]
    _refused(tokens, "is not writable", folder, capsys)


@pytest.mark.parametrize(
    "line, piece",
    [
        ("rnu", 'Did you mean "run"?'),
        ("run convergence --draws -1", "draws must be >= 1, got -1"),
        ("run convergence --config bad.toml", "drawz"),
    ],
)
def test_whole_process(line, piece, folder):
    (folder / "bad.toml").write_text("drawz = 3")
    before = _snapshot(folder)
    command = [str(Path(sys.executable).with_name("gradflow")), *line.split()]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and piece in run.stderr
    assert _snapshot(folder) == before


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    print(json.dumps(_what_python_says()))
