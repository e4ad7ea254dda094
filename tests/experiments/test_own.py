"""A study from a module of the user's: run, resumed, in parts, verified, refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from jobs import job_of

from gradflow.cli import main
from gradflow.experiments import own
from gradflow.statistics import clopper_pearson


# Halving steps of |x|^2: ends are known, and compile fast.
MODULE = """
import jax, jax.numpy as jnp, jax.random as jr
import gradflow as gf


def study(dimension=3, draws=40, result=gf.RESULTS.successful):
    def descend(point):
        end = jax.lax.fori_loop(0, 4, lambda _, x: 0.5 * x, point)
        return gf.Solution(
            point=end, energy=jnp.sum(end**2), speed=jnp.sum(end**2),
            time=jnp.ones(()), distance=jnp.ones(()), times=None, history=None,
            result=result, stats={"steps": jnp.full((), 4)},
        )

    return gf.Study(
        lambda key: jr.normal(key, (dimension,)),
        descend,
        lambda end: {
            "positive": jnp.all(end.point > 0), "energy": end.energy,
            "point": end.point, "kind": gf.KIND.unresolved,
        },
        draws=draws, batch=8,
    )


def several(dimensions=(1, 2), **options):
    return {f"dimension {d}": study(d, **options) for d in dimensions}


def unlike():
    return {"a": study(draws=3), "b": study(draws=5)}


def opened():
    return study(result=gf.RESULTS.max_steps_reached)


def none(): return {}
def words(): return "a study"
def leaves(): raise SystemExit(3)
def fails(): raise KeyError("which\\none")
def misfit(): return gf.Study(lambda key: key, lambda p: p, lambda s: s, 3)
number = 3
"""
FILES = {
    "mine.py": MODULE,
    "typo.py": "def study(:\n    pass\n",
    "needy.py": "import no_such_package",
    "quits.py": "raise SystemExit(2)",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def call(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    # So that the path is as it was when the test is done.
    monkeypatch.syspath_prepend(folder)

    def call(*tokens):
        with pytest.raises(SystemExit) as exit:
            main([str(token) for token in tokens])
        output = capfd.readouterr()
        return exit.value.code, output.out, output.err

    return call


def _report(folder):
    return json.loads((Path(folder) / "report.json").read_text())


def _files(folder):
    found = sorted(Path(folder).rglob("chunk-*"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize(
    ("function", "dimensions"),
    [
        ("study", {"study": 3}),
        pytest.param(
            "several", {"dimension 1": 1, "dimension 2": 2}, marks=pytest.mark.slow
        ),
    ],
)
def test_run_raise_shard_merge_verify(call, monkeypatch, function, dimensions):
    def run(out, *tokens):
        tokens = ("--study", f"mine:{function}", "--chunk", 16, "--out", out, *tokens)
        return call("run", "own", *tokens)

    if function == "study":  # figures take longer than such a study
        monkeypatch.setattr("gradflow.runs.draw", lambda report, folder: [])
    whole, raised, merged = (f"{function}/{name}" for name in ("a", "b", "c"))
    code, out, err = run(whole)
    assert (code, err) == (0, "")
    assert f"mine:{function}()" in out
    assert ("own.png" in out) == (function == "several")
    report = _report(whole)
    # What the study says stands in the settings.
    assert report["config"]["draws"] == 40 and report["config"]["batch"] == 8
    rows = {(row["study"], row["finding"]): row for row in report["rows"]}
    assert len(rows) == 4 * len(dimensions) and len(report["notes"]) == len(dimensions)
    for name, dimension in dimensions.items():
        row = rows[name, "positive"]
        assert (row["draws"], row["undecided"]) == (40, 0)
        # Independent signs.
        low, high = clopper_pearson(row["count"], 40, 0.999)
        assert low <= 2.0**-dimension <= high
        assert rows[name, "runs ended: successful"]["count"] == 40
        assert rows[name, "kind: unresolved"]["count"] == 40
        energy = rows[name, "energy"]
        assert 0 < energy["least"] < energy["median"] < energy["greatest"]
    # The same in two steps, and in parts.
    monkeypatch.setattr("gradflow.runs.draw", lambda report, folder: [])
    assert run(raised, "--draws", 20, "--quiet") == (0, "", "")
    assert run(raised, "--quiet") == (0, "", "")
    for part in ("1/2", "2/2"):
        assert run(f"{function}/d", "--shard", part, "--quiet") == (0, "", "")
    folders = [f"{function}/d/shard-{part}-of-2" for part in (1, 2)]
    assert call("merge", *folders, "--out", merged, "--quiet") == (0, "", "")
    files = _files(whole)
    assert len(files) == 3 * len(dimensions)
    assert files == _files(raised) == _files(merged)
    assert report["rows"] == _report(raised)["rows"] == _report(merged)["rows"]
    count = len(files)
    said = call("verify", merged, "--chunks", 9, "--quiet")
    assert said == (0, f"{count} of {count} chunks computed again: the same bits\n", "")
    # Other arguments are another study.
    code, _, err = run(whole, "--arguments", "draws=40")
    assert code == 2 and "arguments was [], now ['draws=40']" in err


@pytest.mark.slow
def test_in_a_job_of_two_processes(call, tmp_path):
    """The same files and the same report as of one process, twice."""
    tokens = ["run", "own", "--study", "mine:several", "--chunk", 4, "--quiet"]
    assert call(*tokens, "--out", tmp_path / "one") == (0, "", "")
    for _ in range(2):
        for process in job_of(2, [*tokens, "--out", tmp_path / "job", "--distributed"]):
            said = process.communicate(timeout=300)
            assert (process.returncode, said) == (0, ("", ""))
    parts = [_files(tmp_path / "job" / f"shard-{i}-of-2") for i in (1, 2)]
    assert [len(part) for part in parts] == [10, 10]
    job = {k: v for k, v in _files(tmp_path / "job").items() if "shard" not in k}
    assert job == _files(tmp_path / "one") == parts[0] | parts[1]
    assert _report(tmp_path / "job")["rows"] == _report(tmp_path / "one")["rows"]
    # What is wrong with the module each process says by itself, and none waits.
    tokens = ["run", "own", "--study", "mine:unlike", "--distributed"]
    for process in job_of(2, [*tokens, "--out", tmp_path / "wrong"]):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 2
        assert "the studies of mine:unlike have 3 to 5 draws" in err
        assert "Traceback" not in err


def test_settings_from_a_file(call, folder, monkeypatch):
    monkeypatch.setattr("gradflow.runs.draw", lambda report, folder: [])
    (folder / "own.toml").write_text(
        'study = "mine:study"\narguments = ["dimension=1", "draws=12"]\nseed = 3\n'
    )
    code, out, err = call("run", "own", "--config", "own.toml", "--out", "toml")
    assert (code, err) == (0, "") and "mine:study(dimension=1, draws=12)" in out
    config = _report("toml")["config"]
    assert (config["draws"], config["seed"]) == (12, 3)
    share = next(r for r in _report("toml")["rows"] if r["finding"] == "positive")
    assert share["draws"] == 12


def test_what_was_found_of_runs_that_did_not_end_is_undecided():
    names = np.array(["x", "y", "x", "unresolved"])
    rows = own._counted("a", "w", names, np.array([True, True, False, True]))
    assert [(r["finding"], r["count"], r["undecided"]) for r in rows] == [
        ("w: x", 1, 3),
        ("w: unresolved", 1, 2),
        ("w: y", 0, 3),
    ]


@pytest.mark.slow
def test_open_ends_are_undecided(call):
    tokens = ("run", "own", "--study", "mine:opened", "--out", "opened")
    assert call(*tokens, "--strict")[0] == 3
    rows = {row["finding"]: row for row in _report("opened")["rows"]}
    assert (rows["positive"]["count"], rows["positive"]["undecided"]) == (0, 40)
    assert rows["positive"]["outer high"] == 1.0
    assert rows["runs ended: max_steps_reached"]["count"] == 40


STUDIES = {
    "": "study='' must be module:function",
    "mine": "study='mine' must be module:function",
    ":study": "must be module:function",
    "nomine:study": "there is no module nomine",
    "mine.py:study": "write mine:study",
    "folder/mine.py:study": "write folder.mine:study",
    "mine:nothing": "mine has no function nothing",
    "mine:number": "mine has no function number",
    "mine:none": "gives an empty dict",
    "mine:words": "gives str: give a gradflow.Study",
    "mine:leaves": "mine:leaves raised SystemExit: 3",
    "mine:fails": "mine:fails raised KeyError: 'which\\none'",
    "mine:misfit": "mine:misfit: descend",
    "mine:unlike": "have 3 to 5 draws: give one number for all with --draws",
    "typo:study": "importing typo raised SyntaxError",
    "needy:study": "needy needs no_such_package, which is not installed",
    "quits:study": "importing quits raised SystemExit",
}
ARGUMENTS = {
    "dimension": "'dimension' must be name=value",
    "3=4": "'3=4' must be name=value",
    "dimension=1 dimension=2": "each name once",
    "width=3": "unexpected keyword argument 'width'",
    "dimension=x": "initialize raised TypeError",
    "draws=0": "mine:study raised ValueError: draws must be >= 1, got 0",
}


@pytest.mark.parametrize("study", STUDIES)
def test_studies_that_are_none(call, folder, study):
    code, out, err = call("run", "own", "--study", study, "--out", "new")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert STUDIES[study] in err
    assert not (folder / "new").exists()


@pytest.mark.parametrize("line", ARGUMENTS)
def test_arguments_that_are_none(call, folder, line):
    tokens = ("--arguments", *line.split(), "--out", "new")
    code, out, err = call("run", "own", "--study", "mine:study", *tokens)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert ARGUMENTS[line] in err
    assert not (folder / "new").exists()


@pytest.mark.slow
def test_the_example_of_the_readme(call, folder):
    """Each coordinate falls to the minimum of its own sign."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    code = re.search(r"```python\n(# wells.py\n.*?)```", readme, re.DOTALL)
    line = re.search(r"`gradflow (run own --study wells:[^`]+)`", readme)
    assert code is not None and line is not None
    assert len(code[1].splitlines()) < 20
    (folder / "wells.py").write_text(code[1])
    assert call(*line[1].split(), "--out", "wells")[0] == 0
    rows = {row["finding"]: row for row in _report("wells")["rows"]}
    found = rows["all positive"]
    low, high = found["95 % low"], found["95 % high"]
    said = f"counts {found['count']} of 1000 draws with all coordinates positive, 95 % "
    assert f"{said}interval [{low:.4f}, {high:.4f}]" in readme
    assert low <= 1 / 8 <= high
    for name in ("least", "greatest"):
        assert rows["energy"][name] == pytest.approx(-3 / 4, abs=1e-9)
