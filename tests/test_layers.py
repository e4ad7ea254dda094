"""The architecture, held: layers, firewall, twins, file length."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent / "gradflow"
# A module imports only from lower numbers; within a level, only `base`.
LEVELS = {
    "arguments": -1,
    "types": 0,
    "triangles": 0,
    "environment": 0,
    "precision": 1,
    "statistics": 1,
    "store": 5,
    "moments": 1,
    "spectrum": 1,
    "noise": 1,
    "datasets": 1,
    "data": 1,
    "models": 2,
    "manifolds": 2,
    "theory": 3,
    "flow": 3,
    "em": 3,
    "initial": 3,
    "audit": 3,
    "collapse": 3,
    "solvers": 3,
    "solution": 4,
    "descent": 5,
    "layout": 6,
    "lanes": 7,
    "solve": 7,
    "critical": 5,
    "checks": 5,
    "iterate": 8,
    "factor_analysis": 9,
    "ensemble": 9,
    "runner": 10,
    "study": 11,
    "report": 11,
    "verifying": 12,
    "sequential": 12,
    "phase_plot": 0,
    "image_plot": 0,
    "share_plot": 0,
    "plot": 12,
    "study_checks": 12,
    "experiments": 13,
    "compiling": 0,
    "distributed": 0,
    "runs": 14,
    "cli": 15,
}
# Imports within a level that are wanted: data come as moments, moments use spectra;
# theory's families share one second-order criterion; an experiment uses several; the
# geometry of rank-k matrices knows how these are represented.
WITHIN = {
    ("manifolds", "models"),
    ("moments", "spectrum"),
    ("datasets", "moments"),
    ("datasets", "spectrum"),
    ("data", "datasets"),
    ("datasets", "data"),
}
# Within the store, in this order.
STORE = ("files", "difference", "chunk", "arrays", "cell", "checkpoint", "folder")
STORE += ("writing",)
# Files of theory without a twin in models: shared machinery, exact trajectories (of the
# networks of models/linear.py, as is Oja's flow), what the VAEs have in common, the two
# models of factor.py that have a closed form, and where its noise goes to 0.
WITHOUT_TWIN = {
    "base",
    "second_order",
    "dynamics",
    "oja",
    "riccati",
    "rates",
    "modes",
    "ppca",
    "pcca",
    "latent_modes",
    "heywood",
}
# No optimum of perceptrons is known in closed form; theory/README.md says so.
WITHOUT_THEORY = {"nonlinear"}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py")


def module_of(path):
    return path.relative_to(ROOT).with_suffix("").parts


def imported(path):
    """The gradflow modules a file imports, each as its parts below `gradflow`."""
    parts = module_of(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            base = parts[: len(parts) - node.level]
            target = (*base, *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                yield target if node.module else (*target, alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.split(".")[0] == "gradflow":
                yield tuple(node.module.split(".")[1:])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "gradflow":
                    yield tuple(alias.name.split(".")[1:])


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(module_of(path)))
def test_layers(path):
    parts = module_of(path)
    for target in imported(path):
        mine, theirs = LEVELS[parts[0]], LEVELS[target[0]]
        within = parts[0] == target[0] or (parts[0], target[0]) in WITHIN
        assert theirs < mine or within, f"{'/'.join(parts)} imports {target}"


def test_layers_of_the_store():
    for place, name in enumerate(STORE):
        used = {target[1:] for target in imported(ROOT / "store" / f"{name}.py")}
        assert not used & {(later,) for later in (*STORE[place:], "merging", "export")}


def test_firewall():
    """Theory and numerics are two independent roads."""
    numerics = {
        "flow",
        "em",
        "descent",
        "solve",
        "iterate",
        "initial",
        "solvers",
        "study",
    }
    for path in FILES:
        reached = {target[0] for target in imported(path)}
        if module_of(path)[0] == "theory":
            assert not reached & numerics, path
        elif module_of(path)[0] in numerics:
            assert "theory" not in reached, path


def test_twins():
    tests = Path(__file__).parent
    names = lambda folder, start="": (
        {path.stem.removeprefix(start) for path in folder.glob(f"{start}*.py")}
        - {"__init__", "base"}
    )
    families = names(ROOT / "models")
    assert families - WITHOUT_THEORY == names(ROOT / "theory") - WITHOUT_TWIN
    assert families <= names(tests / "models", "test_")
    assert names(ROOT / "theory") <= names(tests / "theory", "test_")


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(module_of(path)))
def test_length(path):
    """One idea per file: past 400 lines it is probably two."""
    assert len(path.read_text().splitlines()) <= 400


def test_no_drawers():
    drawers = {"utils", "misc", "helpers", "common", "core"}
    for path in FILES:
        assert not drawers & set(module_of(path))
