"""The benchmarks run, and refuse to time what is wrong."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Imports a file of `benchmarks/` as a script there would."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = [path.stem for path in FOLDER.glob("*.py")]
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def smoke(name, folder):
    """What `bench_NAME.py --smoke` writes and prints."""
    done = subprocess.run(
        [sys.executable, f"{FOLDER}/bench_{name}.py", "--smoke", "--out", str(folder)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((folder / f"{name}.json").read_text())
    assert (folder / f"{name}.png").stat().st_size > 0
    return document, (folder / f"{name}.md").read_text(), done.stdout


@pytest.mark.slow  # continuous integration runs it
def test_velocity_smoke(tmp_path):
    document, table, printed = smoke("velocity", tmp_path)
    assert document["benchmark"] == "velocity"
    setting = document["setting"]
    assert setting["dtype"] == "float64" and setting["repeats"] == 2
    assert {"jax", "diffrax", "scipy", "device", "cores"} <= set(setting)
    rows = document["rows"]
    assert len({row["widths"] for row in rows}) == 2
    for row in rows:
        assert row["us per lane"] > 0 and len(row["samples s"]) == 2
        if row["what"].startswith(("autodiff", "gradflow velocity")):
            assert row["relative error"] <= 1e-12
            assert row["compile s"] > 0
        else:
            # rtol 1e-6 per step, gathered over a run.
            assert 0 < row["relative error"] <= 1e-4
    # Speeds are ratios to the first of each comparison.
    for baseline in ("autodiff of the loss on the data", "scipy RK45 loop"):
        ratios = [row["speed over baseline"] for row in rows if row["what"] == baseline]
        assert ratios == [1.0, 1.0]
    assert table in printed
    assert all(row["what"] in table for row in rows)


def test_wrong_velocities_fail(module, monkeypatch, capsys):
    bench = module("bench_velocity")
    right = bench.moment_velocity

    def wrong(problem):
        candidate = right(problem)
        call = lambda: tuple((1 + 1e-9) * weight for weight in candidate.call())
        return bench.timing.Candidate(call, candidate.compile)

    monkeypatch.setitem(bench.VELOCITIES, "gradflow velocity", wrong)
    monkeypatch.setattr(bench, "SMOKE", bench.SMOKE[:1])
    monkeypatch.setattr(bench, "bench_runs", lambda *arguments: [])
    assert bench.main(["--smoke", "--repeats", "1"]) == 1
    assert "gradflow velocity on 5-2-5 differs by 1e-09" in capsys.readouterr().err


@pytest.mark.slow  # continuous integration runs it
def test_fixed_rank_smoke(tmp_path):
    document, table, printed = smoke("fixed_rank", tmp_path)
    rows = document["rows"]
    velocities = [row for row in rows if row["of"] == "velocity"]
    runs = [row for row in rows if row["of"] == "run"]
    assert len(velocities) == 5 and len(runs) == 3
    for part in (velocities, runs):
        assert part[0]["speed over baseline"] == 1.0
    assert all(row["relative error"] <= 1e-11 for row in velocities[1:])
    assert all(row["relative error"] <= 1e-6 for row in runs[1:])
    assert table in printed


def test_wrong_fixed_rank_rows_fail(module):
    bench = module("bench_fixed_rank")
    row = {"of": "velocity", "what": bench.FACTORED, "workload": "w"}
    assert not bench.failures([{**row, "relative error": 1e-12}])
    (text,) = bench.failures([{**row, "relative error": 1e-10}])
    assert text.endswith("relative error 1e-10 is above 1e-11")
    assert bench.failures([{**row, "relative error": float("nan")}])
    run = {**row, "of": "run"}
    assert bench.failures([{**run, "relative error": 2e-6}])
    assert not bench.failures([{**run, "relative error": 1e-7}])


@pytest.mark.parametrize("flag", ["--lanes", "--repeats"])
def test_counts_are_checked(module, capsys, flag):
    with pytest.raises(SystemExit):
        module("bench_velocity").main([flag, "0"])
    assert f"{flag}: '0' is not a whole number >= 1" in capsys.readouterr().err


def test_samples_are_interleaved(module, monkeypatch):
    timing = module("timing")
    seen = []

    def candidate(name):
        return timing.Candidate(lambda: seen.append(name) or name)

    monkeypatch.setattr(timing, "SHORTEST_SAMPLE", 0.0)  # one call per sample
    timings = timing.interleave({name: candidate(name) for name in "abc"}, repeats=3)
    assert "".join(seen) == "aabbcc" + "abc" + "bca" + "cab"
    for name, found in timings.items():
        assert found.result == name and found.calls == 1
        assert found.median == sorted(found.samples)[1]
        assert found.spread >= 0
    with pytest.raises(ValueError, match="repeats must be >= 1"):
        timing.interleave({}, repeats=0)


@pytest.mark.slow  # continuous integration runs it
def test_ensemble_smoke(tmp_path):
    document, table, printed = smoke("ensemble", tmp_path)
    rows = document["rows"]
    assert len(rows) == 2 * 9 and {row["workload"][0] for row in rows} == {"A", "B"}
    for row in rows:
        assert row["us per lane"] > 0 and 0 <= (row["idle"] or 0) < 1
        assert row["certified"] == row["lanes"] == 8
    assert table in printed


@pytest.mark.slow
def test_store_smoke(tmp_path):
    document, table, printed = smoke("store", tmp_path)
    memory, stored = document["rows"]
    assert memory["overhead"] == 0 and stored["overhead"] > 0
    assert memory["global minimum"] == stored["global minimum"] == 64
    assert table in printed


@pytest.mark.slow
def test_scaling_at_small_sizes(tmp_path):
    document, table, printed = smoke("scaling", tmp_path)
    rows = document["rows"]
    parts = ("draws", "width", "depth", "queue", "devices", "processes")
    assert tuple(dict.fromkeys(row["part"] for row in rows)) == parts
    for row in rows:
        assert row["us per draw"] > 0 and row["certified"] == row["draws"]
    assert {row["value"] for row in rows if row["part"] in parts[4:]} == {1, 2}
    assert table in printed


def test_wrong_scaling_fails(module):
    bench = module("bench_scaling")
    row = {"part": "width", "value": 5, "what": bench.OURS, "draws": 3, "certified": 3}
    assert not bench.failures([row])
    (text,) = bench.failures([{**row, "certified": 2}])
    assert text == "width=5: 2 of 3 draws certified"


def test_wrong_ensembles_fail(module):
    bench = module("bench_ensemble")
    row = {"what": "gradflow, verdicts", "workload": "w", "lanes": 3, "certified": 3}
    assert not bench.failures([{**row, "error of W": 1e-3}])
    assert bench.failures([{**row, "error of W": float("nan")}])
    (text,) = bench.failures([{**row, "error of W": 0.0, "certified": 2}])
    assert text == "gradflow, verdicts on w: 2 of 3 lanes certified"
    accurate = {**row, "what": "gradflow, gradient"}
    assert bench.failures([{**accurate, "error of W": 1e-3}])


@pytest.mark.slow  # continuous integration runs it
def test_compile_smoke(tmp_path):
    document, table, printed = smoke("compile", tmp_path)
    cold, kept, fast = document["rows"]
    assert all(row["certified"] == row["draws"] == 4 for row in (cold, kept, fast))
    # What an earlier process kept is not compiled again.
    assert kept["compile s"] < 0.5 * cold["compile s"]
    assert table in printed


@pytest.mark.slow  # continuous integration runs it
def test_em_smoke(tmp_path):
    pytest.importorskip("sklearn")
    document, table, printed = smoke("em", tmp_path)
    rows = document["rows"]
    assert {row["part"] for row in rows} == {"one fit", "many starts", "CCA"}
    assert all(row["ms per fit"] > 0 for row in rows) and table in printed


def test_fits_that_fall_short_fail(module):
    bench = module("bench_em")
    row = {"part": "p", "what": "gradflow", "starts": 10, "shortfall": 0.5}
    assert not bench.failures([{**row, "at the best": 9}])
    (text,) = bench.failures([{**row, "at the best": 8}])
    assert text == "gradflow, p: 8 of 10 at the best log-likelihood, 0.5 short"
