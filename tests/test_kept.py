"""Studies whose draws are kept: resumed, in parts, verified, on the command line."""

import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jobs import chunks, count_of_chunks, job_of, ROOT

from gradflow import (
    classify,
    GaussianInit,
    GradientFlow,
    Integrator,
    KIND,
    merge,
    names_of,
    Report,
    RESULTS,
    run_studies,
    run_study,
    Solution,
    Store,
    Study,
    to_xarray,
    verify_studies,
)
from gradflow.cli import main
from gradflow.datasets import gaussian
from gradflow.experiments import escape
from gradflow.models import SquaredLoss
from gradflow.store.arrays import arrays_of, outcome_from
from gradflow.store.export import export_netcdf
from gradflow.study import fill_studies
from gradflow.theory import LinearTheory


class _Found(eqx.Module):
    """A finding with a verdict, as `CriticalPoint` is one."""

    kind: Any
    precision_limited: Any


def _halve(point, rate=0.5):
    """Halves a number until it is below 1e-3, or gives up."""
    steps = jnp.ceil(jnp.log(1e-3 / jnp.abs(point)) / math.log(rate)).astype(int)
    steps = jnp.clip(steps, 0, 12)
    end = point * rate ** steps.astype(point.dtype)
    done = jnp.abs(end) < 1e-3
    result: Any = RESULTS.where(done, RESULTS.rule_met, RESULTS.max_steps_reached)  # pyright: ignore[reportArgumentType]
    return Solution(
        point=end,
        energy=end**2,
        speed=jnp.abs(end),
        time=steps.astype(end.dtype),
        distance=jnp.abs(point - end),
        times=None,
        history=None,
        result=result,
        stats={"steps": steps, "rejected": jnp.zeros_like(steps)},
    )


def _judge(solution):
    done = jnp.abs(solution.point) < 1e-3
    kind = KIND.where(done, KIND.global_minimum, KIND.unresolved)
    return _Found(kind, ~done)


def _loop(draws=20, batch=4, scale=10.0, rate=0.5):
    start = eqx.Partial(lambda scale, key: scale * jr.normal(key), jnp.asarray(scale))
    descend = eqx.Partial(_halve, rate=rate)
    return Study(start, descend, _judge, draws=draws, batch=batch)


def _network(draws, batch=8):
    theory = LinearTheory(SquaredLoss(gaussian(jr.key(7), 3, 9)), 1)
    flow = GradientFlow(theory.energy)
    descend = Integrator(flow, stop=theory.certificate, tolerance=1e-3)
    start = GaussianInit((3, 1, 3), jnp.asarray(0.3))
    return Study(start, descend, eqx.Partial(classify, flow, theory), draws, batch)


def _assert_same(one, other):
    a, b = jax.tree.flatten(one)[0], jax.tree.flatten(other)[0]
    assert jax.tree.structure((one.solution, one.finding)) == jax.tree.structure(
        (other.solution, other.finding)
    )
    for x, y in zip(a, b, strict=True):
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


class _Stop(Exception):
    pass


def _stopped_after(store, chunks):
    """A store whose process ends after so many chunks."""
    write, left = store.write, iter(range(chunks))

    def limited(*arguments):
        if next(left, None) is None:
            raise _Stop
        write(*arguments)

    store.write = limited
    return store


# ---- in Python


def test_kept_draws_are_those_of_a_run_in_memory(tmp_path):
    plain = run_study(_loop(), jr.key(3))
    kept = plain
    for _ in range(2):
        with Store(tmp_path / "a", chunk=6) as store:
            kept = run_study(_loop(), jr.key(3), store=store)
        _assert_same(kept, plain)
    assert kept.seconds == {"first batches": 0.0, "other batches": 0.0}


def test_enumerations_are_stored_by_name(tmp_path):
    outcome = run_study(_loop(), jr.key(3))
    arrays = arrays_of(outcome.solution, outcome.finding)
    assert {"solution.stats.steps", "finding.kind", "solution.result"} <= arrays.keys()
    assert set(arrays["finding.kind"]) == {b"global_minimum", b"unresolved"}
    like = (outcome.solution, outcome.finding)
    again = outcome_from(like, arrays)
    assert np.array_equal(again[1].kind._value, outcome.finding.kind._value)
    arrays["finding.kind"][3] = b"what"
    with pytest.raises(ValueError, match="finding.kind=what, which this gradflow does"):
        outcome_from(like, arrays)
    del arrays["solution.time"]
    with pytest.raises(ValueError, match="have no solution.time"):
        outcome_from(like, arrays)


def test_stopped_three_times_and_in_two_shards(tmp_path):
    """The same bytes for the same size of chunk, whatever happened in between."""
    key = jr.key(3)
    with Store(tmp_path / "clean", chunk=4) as store:
        clean = run_study(_loop(), key, store=store)
    for more in (1, 2, 1):
        with Store(tmp_path / "thrice", chunk=4) as store, pytest.raises(_Stop):
            run_study(_loop(), key, store=_stopped_after(store, more))
    with Store(tmp_path / "thrice") as store:
        _assert_same(run_study(_loop(), key, store=store), clean)
    shards = [tmp_path / "1", tmp_path / "2"]
    for number, folder in enumerate(shards, 1):
        with Store(folder, chunk=4, shard=(number, 2)) as store:
            with pytest.raises(ValueError, match="are those of others"):
                run_study(_loop(), key, store=store)
    merge(shards, tmp_path / "merged")
    with Store(tmp_path / "merged") as store:
        _assert_same(run_study(_loop(), key, store=store), clean)
    files = chunks(tmp_path / "clean")
    assert len(files) == 5
    assert files == chunks(tmp_path / "thrice") == chunks(tmp_path / "merged")
    # Draws raised from one that is no multiple of the chunk.
    for draws in (3, 13, 20):
        with Store(tmp_path / "raised", chunk=4) as store:
            raised = run_study(_loop(draws), key, store=store)
        assert len(raised.solution.time) == draws
    assert files == chunks(tmp_path / "raised")


def test_a_disk_that_fills_while_the_next_draws_are_computed(tmp_path, monkeypatch):
    """Whichever chunk it is, those before it are safe; the last one has no next."""
    with Store(tmp_path / "clean", chunk=4) as store:
        run_study(_loop(), jr.key(3), store=store)
    for last in range(5):
        folder = tmp_path / str(last)
        with Store(folder, chunk=4) as store, monkeypatch.context() as patch:
            write = store.write

            def full(*arguments, last=last, patch=patch, write=write):
                if arguments[1] == last:
                    patch.setattr(os, "fsync", _no_space)
                write(*arguments)

            patch.setattr(store, "write", full)
            with pytest.raises(RuntimeError) as error:
                run_study(_loop(), jr.key(3), store=store)
        said = f"could not write chunk {last} of study to {folder} (no space left on"
        assert said in str(error.value)
        assert f"{last} chunks ({4 * last} draws) are safe" in str(error.value)
        assert len(chunks(folder)) == last
        with Store(folder, chunk=4) as store:
            run_study(_loop(), jr.key(3), store=store)
        assert chunks(folder) == chunks(tmp_path / "clean")


def _no_space(_):
    raise OSError(errno.ENOSPC, "x")


def test_another_study_is_refused(tmp_path):
    def run(study, key, **options):
        with Store(tmp_path / "a", chunk=4) as store:
            return run_study(study, key, store=store, **options)

    run(_loop(), jr.key(3))
    before = chunks(tmp_path)
    for study, key, options, said in (
        (_loop(), jr.key(4), {}, "key: saved [0, 3], asked [0, 4]"),
        (_loop(scale=9.0), jr.key(3), {}, "scale"),
        (_loop(rate=0.4), jr.key(3), {}, "rate: saved 0.5, asked 0.4"),
        (_loop(batch=5), jr.key(3), {}, "batch: saved 4, asked 5"),
        (_loop(draws=19), jr.key(3), {}, "draws: saved 20, asked 19"),
        (_loop(), jr.key(3), {"dtype": "float32"}, "dtype: saved float64, asked float"),
        (_network(20), jr.key(3), {}, "saved"),
    ):
        with pytest.raises(ValueError) as error:
            run(study, key, **options)
        assert "was started with different settings" in str(error.value)
        if said != "scale":
            assert said in str(error.value)
        assert chunks(tmp_path) == before


@pytest.mark.slow
def test_a_network_by_chunks_of_64_and_256(tmp_path):
    """One study in memory, by chunks of two sizes, in parts, resumed: one verdict for
    each draw; and the same bits for the same chunks."""
    key, draws = jr.key(5), 300
    with Store(tmp_path / "256", chunk=256) as store:
        large = run_study(_network(draws), key, store=store)
    for number in (2, 1):
        with Store(tmp_path / f"part{number}", chunk=64, shard=(number, 2)) as store:
            fill_studies({"study": (_network(draws), key)}, store)
    merge([tmp_path / "part1", tmp_path / "part2"], tmp_path / "64")
    with Store(tmp_path / "64") as store:
        small = run_study(_network(draws), key, store=store)
    plain = run_study(_network(draws), key)
    for outcome in (small, plain):
        for field in ("kind", "rule"):
            a, b = (getattr(x.finding, field)._value for x in (large, outcome))
            np.testing.assert_array_equal(a, b)
        time, other = large.solution.time, outcome.solution.time
        np.testing.assert_allclose(time, other, rtol=1e-6)
    assert np.all(names_of(KIND, large.finding.kind) == "global_minimum")
    with Store(tmp_path / "again", chunk=64) as store:
        run_study(_network(draws), key, store=store)
    assert chunks(tmp_path / "again") == chunks(tmp_path / "64")
    checked = verify_studies({"study": (_network(draws), key)}, tmp_path / "64")
    assert checked.sound and checked.summary.endswith("again: the same bits")


def test_verify_finds_what_differs(tmp_path):
    studies = {"a": (_loop(), jr.key(3)), "b/b": (_loop(9), jr.key(4))}
    with Store(tmp_path / "a", chunk=4) as store:
        run_studies(studies, store=store)
    checked = verify_studies(studies, tmp_path / "a", chunks=99)
    assert checked.sound
    assert checked.summary == "8 of 8 chunks computed again: the same bits"

    def changed(name, value, **made):
        with Store(tmp_path / "a") as store:
            fields = json.loads((tmp_path / "a/draws/a/cell.json").read_text())
            versions = fields.pop("versions")
            name_, draws = fields.pop("name"), fields.pop("draws")
            cell = store.cell(name_, draws, fields, versions)
            arrays, old = cell.read(1)
            arrays[name][2] = value
            cell.write(1, arrays, old | made)

    changed("solution.energy", 0.5)
    checked = verify_studies(studies, tmp_path / "a", chunks=99)
    assert not checked.sound and "with the same versions" in checked.summary
    changed("solution.energy", 0.5, jax="0.0.1")
    checked = verify_studies(studies, tmp_path / "a", chunks=99)
    assert checked.sound and "it was made with jax 0.0.1" in checked.summary
    changed("finding.kind", b"diverged", jax="0.0.1")
    changed("finding.precision_limited", False)
    checked = verify_studies(studies, tmp_path / "a", chunks=99)
    assert not checked.sound
    assert "1 draws differ in finding.kind, first draw 6" in checked.summary
    with pytest.raises(ValueError, match="has draws of b/b, which is not asked"):
        verify_studies({"a": studies["a"]}, tmp_path / "a")
    with pytest.raises(ValueError, match="chunks must be"):
        verify_studies(studies, tmp_path / "a", chunks=0)


def test_progress_says_what_the_verdicts_were(tmp_path, capsys):
    with Store(tmp_path / "a", chunk=4) as store, pytest.raises(_Stop):
        run_study(_loop(), jr.key(3), store=_stopped_after(store, 2))
    with Store(tmp_path / "a") as store:
        run_study(_loop(), jr.key(3), store=store, progress=True)
    said = capsys.readouterr().err
    assert "20/20" in said and "8/20" in said
    assert "global_minimum 0." in said and "unresolved 0." in said


def test_compilations_do_not_grow_with_chunks(tmp_path):
    traces = []

    def counted(key):
        traces.append(key)
        return 10.0 * jr.normal(key)

    study = Study(counted, _halve, _judge, draws=50, batch=4)
    with Store(tmp_path / "a", chunk=8) as store:
        run_study(study, jr.key(0), store=store)
    assert len(traces) <= 2


def test_draws_with_labels(tmp_path):
    import xarray

    with Store(tmp_path / "a", chunk=4) as store:
        outcome = run_study(_loop(), jr.key(3), store=store)
    data = to_xarray(tmp_path / "a")["study"]
    assert isinstance(data, xarray.Dataset) and data.sizes["draws"] == 20
    np.testing.assert_array_equal(data["solution.time"], outcome.solution.time)
    kinds = names_of(KIND, outcome.finding.kind)
    assert list(data["finding.kind"].values) == list(kinds)
    # And what other programs read is the same.
    export_netcdf(tmp_path / "a", tmp_path / "draws.nc")
    read = xarray.open_dataset(
        tmp_path / "draws.nc", group="study", engine="h5netcdf"
    ).load()
    np.testing.assert_array_equal(read["solution.time"], outcome.solution.time)
    assert list(read["finding.kind"].values) == list(kinds)
    read.close()


def test_without_xarray_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(ValueError, match=r"pip install 'gradflow\[io\]'"):
        to_xarray(tmp_path)


# ---- on the command line


TINY = (
    "run convergence --data gaussian --dimension 3 --rank 1 --depths 2 --scales 0.3 "
    "0.1 --batch 8 --chunk 16 --curves 0 --quiet"
).split()


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def call(*tokens):
        with pytest.raises(SystemExit) as exit:
            main([str(token) for token in tokens])
        output = capfd.readouterr()
        return exit.value.code, output.out, output.err

    return call


def _rows(folder):
    return json.loads((Path(folder) / "report.json").read_text())["rows"]


def test_run_resume_raise_shard_merge_verify_export(call, monkeypatch):
    assert call(*TINY, "--draws", 40, "--out", "whole") == (0, "", "")
    # Stopped, taken up again, and more draws.
    with monkeypatch.context() as patch:
        write, left = Store.write, iter(range(3))

        def limited(*arguments):
            if next(left, None) is None:
                raise KeyboardInterrupt
            write(*arguments)

        patch.setattr(Store, "write", limited)
        stopped = call(*TINY, "--draws", 24, "--out", "raised")
    assert stopped == (130, "", "stopped; 3 of 4 chunks saved; run again to go on\n")
    assert call(*TINY, "--draws", 24, "--out", "raised") == (0, "", "")
    loud = [token for token in TINY if token != "--quiet"]
    code, out, err = call(*loud, "--draws", 40, "--out", "raised")
    assert code == 0 and "resuming raised: 2 of 6 chunks done" in err
    assert "wrote report.json" in out
    assert chunks("raised") == chunks("whole") and _rows("raised") == _rows("whole")
    # In parts.
    for part in ("1/3", "2/3", "3/3"):
        shard = call(*TINY, "--draws", 40, "--shard", part, "--out", "parts")
        assert shard == (0, "", "")
    folders = [f"parts/shard-{i}-of-3" for i in (1, 2, 3)]
    code, out, _ = call("merge", *folders[:2], "--out", "some")
    assert code == 0 and "some, 2 chunks are missing" in out
    assert call("merge", *folders, "--out", "all", "--quiet") == (0, "", "")
    assert chunks("all") == chunks("whole") and _rows("all") == _rows("whole")
    code, out, err = call("verify", "all", "--chunks", 2, "--quiet")
    assert (code, out) == (0, "2 of 6 chunks computed again: the same bits\n")
    # With other settings, and in a folder of one part.
    code, _, err = call(*TINY, "--draws", 40, "--seed", 1, "--out", "whole")
    assert code == 2 and "seed was 0, now 1" in err
    os.remove("whole/report.json")
    code, _, err = call(*TINY, "--draws", 40, "--seed", 1, "--out", "whole")
    assert code == 2 and "seed: saved 0, asked 1. Use a new folder" in err
    code, _, err = call(*TINY, "--draws", 40, "--out", folders[0])
    assert code == 2 and "shard: saved [1, 3], asked [1, 1]" in err


def test_verify_of_an_experiment_without_draws(call, monkeypatch):
    rows = [{"time": 0.5, "slope": float("nan")}]
    config = dataclasses.asdict(escape.Config())

    def report(rows):
        environment = {"dtype": "float64", "device": "cpu"}
        return Report("escape", "", config, environment, rows, [], {"panels": []}, {})

    asked = []

    def run(config, progress):
        asked.append(config)
        return report(rows)

    report(rows).write(Path("e"))
    monkeypatch.setattr(escape, "run", run)
    assert call("verify", "e") == (0, "1 rows computed again: the same\n", "")
    assert asked == [escape.Config()]
    rows[0]["time"] = 0.6
    code, out, _ = call("verify", "e")
    assert code == 1 and out.splitlines()[-1].startswith("1 of 1 rows computed again")
    code, _, err = call("verify", "nowhere")
    assert code == 2 and "nowhere has no report.json" in err


@pytest.mark.slow
def test_killed_on_the_command_line(call, tmp_path):
    """Real processes with jax in them, killed at random, and one that comes through."""
    assert call(*TINY, "--draws", 400, "--out", "clean")[0] == 0
    code = "from gradflow.cli import main; main()"
    command = [sys.executable, "-c", code, *TINY]
    command += ["--draws", "400", "--out", "killed"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    kills, generator = 0, np.random.default_rng(0)
    for _ in range(4):
        wanted = count_of_chunks("killed") + int(generator.integers(1, 6))
        process = subprocess.Popen(command, env=environment)
        while count_of_chunks("killed") < wanted and process.poll() is None:
            time.sleep(float(generator.uniform(0, 5e-3)))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True)
    print(f"{kills} processes killed")
    assert kills > 0
    assert chunks("killed") == chunks("clean") and _rows("killed") == _rows("clean")


@pytest.mark.slow
def test_a_job_of_two_processes(call, tmp_path):
    """One study in two processes of a jax.distributed job: the same files as of one
    process. One of them killed: what was done stays, and the same command goes on."""
    assert call(*TINY, "--draws", 400, "--out", "clean")[0] == 0
    tokens = [*TINY, "--draws", 400, "--out", tmp_path / "job", "--distributed"]
    job = job_of(2, tokens)
    while not list(tmp_path.glob("job/shard-2-of-2/draws/*/chunk-*.npz")):
        assert job[1].poll() is None
        time.sleep(0.01)
    job[1].kill()
    for process in job:
        process.communicate(timeout=300)
        assert process.returncode != 0
    done = chunks("job")
    assert 0 < len(done) < len(chunks("clean"))
    for process in job_of(2, tokens):
        said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    assert done.items() <= chunks("job").items()
    merged = {k: v for k, v in chunks("job").items() if not k.startswith("shard")}
    assert merged == chunks("clean") and _rows("job") == _rows("clean")


def test_no_job_to_join(call):
    code, _, err = call(*TINY, "--distributed", "--out", "a")
    assert code == 1 and "could not join a job" in err and "--shard i/n" in err
    code, _, err = call(*TINY, "--distributed", "--shard", "1/2", "--out", "a")
    assert code == 2 and "both given: choose one" in err
