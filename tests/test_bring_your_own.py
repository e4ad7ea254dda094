"""What `docs/your_own.md` shows: modules of fewer than 20 lines, certified, run from
Python and from the command line with what theory says."""

import dataclasses
import importlib
import json
import re
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import gradflow as gf
from gradflow.cli import main
from gradflow.statistics import clopper_pearson


TEXT = (Path(__file__).parents[1] / "docs" / "your_own.md").read_text()
BLOCKS = re.findall(r"```(?:python|toml)\n# (\w+\.(?:py|toml))\n(.*?)```", TEXT, re.S)
FILES = dict(BLOCKS)
# What is brought, and the probability that all coordinates end positive.
BROUGHT = {
    "manifold": 1 / 8,
    "descent": 1 / 8,
    "initializer": 4 / 9,
    "inspection": 1 / 8,
}
KEY = jr.key(3)


@pytest.fixture
def load(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    # optax's Adam needs it.
    with jax.numpy_dtype_promotion("standard"):
        yield importlib.import_module
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def _in_the_file(name):
    """The function's arguments and the draws that the TOML file asks for."""
    config = tomllib.loads(FILES[f"{name}.toml"])
    pairs = [text.split("=") for text in config["arguments"]]
    return {key: float(value) for key, value in pairs}, config["draws"]


def test_each_is_shorter_than_20_lines():
    assert FILES.keys() == {"wells.py"} | {
        f"{name}.{kind}" for name in BROUGHT for kind in ("py", "toml")
    }
    for name, text in FILES.items():
        assert len([line for line in text.splitlines() if line.strip()]) < 20, name


def _certificate(name, module, wells, study):
    if name == "manifold":
        manifold = study.descend.flow.manifold
        assert type(manifold) is module.Sphere
        point = study.initialize(KEY)
        return gf.check_manifold(manifold, wells.Wells(), point, KEY)
    if name == "descent":
        return gf.check_descent(study.descend, study.initialize, KEY, wells.Wells())
    if name == "initializer":
        return gf.check_initializer(study.initialize, KEY)
    return gf.check_inspection(study.inspect, study.descend, study.initialize, KEY)


@pytest.mark.parametrize(
    "name",
    ["initializer"]
    + [pytest.param(n, marks=pytest.mark.slow) for n in BROUGHT if n != "initializer"],
)
def test_is_sound(load, name):
    module, wells = load(name), load("wells")
    certificate = _certificate(name, module, wells, module.study())
    assert certificate.sound, str(certificate)


@pytest.mark.slow
def test_the_energy_and_the_studies_are_sound(load):
    energy = load("wells").Wells()
    certificate = gf.check_energy(energy, jnp.array([0.3, 2.0]), KEY)
    assert certificate.sound, str(certificate)
    for name in BROUGHT:
        certificate = gf.check_study(load(name).study(), KEY)
        assert certificate.sound, str(certificate)


@pytest.mark.slow
@pytest.mark.parametrize("name", BROUGHT)
def test_in_python_and_from_the_command_line(load, name, monkeypatch):
    options, draws = _in_the_file(name)
    if "dimension" in options:
        options = {"dimension": int(options["dimension"])}
    study = dataclasses.replace(load(name).study(**options), draws=draws)
    key = jr.fold_in(jr.key(0), 0)  # as `own` numbers its studies
    outcome = gf.run_study(study, key)
    positive = outcome.finding["all positive"]
    low, high = clopper_pearson(int(positive.sum()), draws, 0.999)
    print(f"{name}: {gf.fraction(positive)}, theory {BROUGHT[name]:.4f}")
    assert low <= BROUGHT[name] <= high
    # Each coordinate keeps its sign.
    point, dimension = outcome.solution.point, outcome.solution.point.shape[1]
    starts = np.stack([study.initialize(jr.fold_in(key, draw)) for draw in range(20)])
    np.testing.assert_array_equal(np.sign(point[:20]), np.sign(starts))
    size = dimension**-0.5 if name == "manifold" else 2**-0.5
    np.testing.assert_allclose(np.abs(point), size, rtol=1e-2)
    if name == "inspection":
        np.testing.assert_allclose(outcome.finding["curvature"], 4, rtol=1e-2)
    monkeypatch.setattr("gradflow.runs.draw", lambda report, folder: [])
    with pytest.raises(SystemExit) as exit:
        main(["run", "own", "--config", f"{name}.toml", "--out", "out", "--quiet"])
    assert exit.value.code == 0
    rows = json.loads(Path("out/report.json").read_text())["rows"]
    (row,) = (row for row in rows if row["finding"] == "all positive")
    assert (row["count"], row["draws"]) == (int(positive.sum()), draws)
