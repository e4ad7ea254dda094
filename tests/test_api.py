"""What a user sees: the exported names, and an import without side effects."""

import ast
import subprocess
import sys
from pathlib import Path

import gradflow


STUB = Path(gradflow.__file__).with_suffix(".pyi")
# Changed only on purpose, with a line in CHANGELOG.md.
NAMES = {
    "AbstractFlow",
    "AbstractIteration",
    "AlternatingMaximization",
    "Audit",
    "BalancedInit",
    "Certificate",
    "CriticalPoint",
    "Decided",
    "Descent",
    "ExpandedMaximization",
    "ExpectationMaximization",
    "FactorAnalysis",
    "Fraction",
    "GaussianInit",
    "GaussianLike",
    "GradientFlow",
    "Integrator",
    "Iterator",
    "KIND",
    "LowRankInit",
    "Moments",
    "Narrower",
    "NearPoint",
    "OrthogonalInit",
    "OrthonormalBalancedInit",
    "Outcome",
    "Paired",
    "RESULTS",
    "RULE",
    "Report",
    "Solution",
    "Squarem",
    "Store",
    "Study",
    "check_descent",
    "check_energy",
    "check_initializer",
    "check_inspection",
    "check_manifold",
    "check_study",
    "classify",
    "collapse",
    "datasets",
    "describe",
    "experiments",
    "fraction",
    "integrate",
    "iterate",
    "manifolds",
    "merge",
    "models",
    "names_of",
    "paired",
    "plot",
    "precision",
    "read_report",
    "run_studies",
    "run_study",
    "run_until",
    "section7_widths",
    "solvers",
    "strata",
    "theory",
    "to_xarray",
    "verify_studies",
    "without_points",
}


def test_exported_names():
    assert set(dir(gradflow)) == NAMES
    for name in NAMES:
        assert getattr(gradflow, name) is not None


def test_a_module_never_hides_what_has_its_name():
    code = """
import gradflow
gradflow.run_study, gradflow.run_until
assert callable(gradflow.precision) and callable(gradflow.iterate)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_exports_are_written_as_themselves():
    """`X as X` is what makes a name public to type checkers."""
    for node in ast.walk(ast.parse(STUB.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.asname == alias.name for alias in node.names)


def test_import_has_no_side_effects():
    code = """
import sys
import jax
before = dict(jax.config.values)
import gradflow
for name in gradflow.__all__:
    getattr(gradflow, name)
import gradflow.cli
assert dict(jax.config.values) == before, "jax config changed"
assert "matplotlib" not in sys.modules, "matplotlib imported"
assert "sklearn" not in sys.modules, "scikit-learn imported"
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_bare_import_does_not_load_jax():
    code = "import sys, gradflow, gradflow.cli; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
