import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gradflow import cli, Report
from gradflow.cli import main
from gradflow.compiling import (
    compile_fast,
    enough_threads,
    keep_compiled,
    plain_loops,
)
from gradflow.experiments import convergence, NAMES, saddle_avoidance


GRADFLOW = str(Path(sys.executable).with_name("gradflow"))
TINY = (
    "run convergence --data gaussian --dimension 3 --rank 1 --draws 8 --depths 2 "
    "--scales 0.3"
).split()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(capsys):
    def call(*tokens):
        with pytest.raises(SystemExit) as exit:
            main([str(token) for token in tokens])
        output = capsys.readouterr()
        return exit.value.code, output.out, output.err

    return call


def _refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def _report(folder):
    text = (Path(folder) / "report.json").read_text()
    return json.loads(text, parse_constant=_refuse_constant)


def _snapshot(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


# What a run of many draws leaves beside them, in `draws`.
FILES = {"report.json", "report.md", "convergence.png", "convergence.pdf"}


# ---- help and lists


def test_help_is_quick():
    def seconds():
        # Processor time: what else runs on the machine is not counted.
        before = os.times()
        run = subprocess.run(
            [GRADFLOW, "--help"], capture_output=True, text=True, check=True
        )
        after = os.times()
        assert "Usage: gradflow" in run.stdout and run.stderr == ""
        return (
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system
        )

    seconds()
    assert sorted(seconds() for _ in range(3))[1] <= 0.5


@pytest.mark.parametrize("tokens", [["--help"], ["--version"], ["rnu"], []])
def test_jax_is_not_loaded_without_need(tokens):
    code = (
        "import sys\n"
        "from gradflow.cli import main\n"
        "try:\n"
        f"    main({tokens})\n"
        "except SystemExit:\n"
        "    print('loaded', {'jax', 'numpy', 'matplotlib'} & sys.modules.keys())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "loaded set()"


def test_list(call):
    code, out, err = call("list")
    assert (code, err) == (0, "")
    for name in NAMES:
        assert f"{name}\n    " in out
    assert convergence.CLAIM in out and convergence.COST in out


def test_flags_are_the_settings(call):
    code, out, err = call("run", "convergence", "--help")
    assert (code, err) == (0, "")
    for field in dataclasses.fields(convergence.Config):
        assert f"--{field.name.replace('_', '-')} " in out
    assert "--out" in out and "--config" in out and "--empty" not in out


# ---- runs


def test_run_writes_a_report_and_a_figure(call, folder):
    code, out, err = call(*TINY, "--out", "new/a")
    assert (code, err) == (0, "")
    assert {path.name for path in (folder / "new" / "a").iterdir()} == FILES | {"draws"}
    report = _report("new/a")
    assert report["experiment"] == "convergence"
    assert report["config"]["data"] == "gaussian" and report["config"]["draws"] == 8
    assert report["config"]["horizon"] == "inf"
    assert report["config"].keys() == {
        field.name for field in dataclasses.fields(convergence.Config)
    }
    assert len(report["rows"]) == 1 and report["rows"][0]["draws"] == 8
    # What is printed is what is written.
    markdown = (folder / "new" / "a" / "report.md").read_text()
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 3 and all(line in markdown.splitlines() for line in table)
    assert out.startswith(convergence.CLAIM) and "float64 on cpu" in out
    assert out.splitlines()[-1] == (
        "wrote report.json, report.md, convergence.png, convergence.pdf to new/a"
    )


@pytest.mark.slow
def test_same_seed_same_rows(call, folder):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert call(*TINY, "--quiet", "--seed", seed, "--out", name)[0] == 0
    a, b, c = (_report(name) for name in "abc")
    for part in ("rows", "notes", "figure", "config", "environment"):
        assert a[part] == b[part]
    assert a["rows"] != c["rows"]
    # In a process of its own, whose jax has no flags set.
    subprocess.run([GRADFLOW, *TINY, "--quiet", "--out", "d"], check=True)
    d = _report("d")
    assert d["rows"] == a["rows"] and d["figure"] == a["figure"]


def test_quiet_prints_nothing(call):
    assert call(*TINY, "--quiet", "--out", "a") == (0, "", "")


def test_several_values(call):
    tokens = [token for token in TINY if token != "0.3"]
    tokens = [*tokens, "0.3", "0.2", "--scales", "0.1", "--quiet", "--out", "a"]
    assert call(*tokens)[0] == 0
    assert [row["scale"] for row in _report("a")["rows"]] == [0.3, 0.2, 0.1]


def test_settings_from_a_file(call, folder):
    (folder / "tiny.toml").write_text(
        'data = "gaussian"\ndimension = 3\nrank = 1\ndraws = 8\ndepths = [2]\n'
        "scales = [0.3]\nseed = 5\nhorizon = inf\n"
    )
    call("run", "convergence", "--config", "tiny.toml", "--quiet", "--out", "a")
    call(
        *("run", "convergence", "--seed", 6, "--config=tiny.toml", "--quiet"),
        *("--out", "b"),
    )
    a, b = _report("a")["config"], _report("b")["config"]
    assert (a["seed"], a["dimension"], a["depths"]) == (5, 3, [2])
    assert b == a | {"seed": 6}
    # The next call knows nothing of the file.
    code, _, err = call("run", "convergence", "--rank", 17)
    assert code == 2 and "min(widths)=16" in err


def test_same_settings_may_run_again(call, folder):
    call(*TINY, "--quiet", "--out", "a")
    first = _report("a")
    assert call(*TINY, "--quiet", "--out", "a")[0] == 0
    assert _report("a")["rows"] == first["rows"]
    assert {path.name for path in (folder / "a").iterdir()} == FILES | {"draws"}


def test_other_settings_overwrite_nothing(call, folder, monkeypatch):
    call(*TINY, "--quiet", "--out", "a")
    before = _snapshot(folder)
    # And this is said before anything is computed.
    monkeypatch.setattr(convergence, "run", None)
    code, out, err = call(*TINY, "--seed", 1, "--out", "a")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "a holds a report of convergence with other settings" in err
    assert "seed was 0, now 1" in err and "--out" in err
    assert _snapshot(folder) == before


def test_plot_draws_again(call, folder):
    call(*TINY, "--quiet", "--out", "a")
    for kind in ("png", "pdf"):
        (folder / "a" / f"convergence.{kind}").unlink()
    code, out, err = call("plot", "a")
    assert (code, err) == (0, "")
    assert out.splitlines() == ["a/convergence.png", "a/convergence.pdf"]
    assert {path.name for path in (folder / "a").iterdir()} == FILES | {"draws"}


def test_undecided_draws_are_an_error_only_when_strict(call):
    code, out, err = call(*TINY, "--max-steps", 5, "--out", "a")
    assert (code, err) == (0, "")
    row = _report("a")["rows"][0]
    assert 0 < row["undecided"] < 8
    assert row["global minimum"] + row["undecided"] == 8
    notes = _report("a")["notes"]
    assert len(notes) == row["undecided"]
    for note in notes:
        assert "max_steps_reached" in note and note in out
    code, _, err = call(*TINY, "--max-steps", 5, "--strict", "--out", "b")
    assert (code, err) == (3, "")
    assert _report("b")["rows"] == _report("a")["rows"]
    assert call(*TINY, "--strict", "--quiet", "--out", "c")[0] == 0


def test_demo(call, folder, monkeypatch):
    asked = []
    row = dict.fromkeys(("depth", "scale", "draws", "global minimum"), 1)
    row |= dict.fromkeys(("saddle", "undecided", "diverged"), 0)
    row |= {"95 % low": 0.025, "95 % high": 1.0, "outer low": 0.025, "outer high": 1.0}

    def run(config, progress):
        asked.append((config, progress))
        panel = {"title": "", "times": [], "energies": [], "lines": []}
        return Report(
            *("convergence", "claim", dataclasses.asdict(config)),
            *({"dtype": "float64", "device": "cpu"}, [row], []),
            *({"panels": [panel]}, {}),
        )

    second = []

    def beside(config):
        sign = {"statement": "", "rank": 3, "starts with": "", "factors: global": 1}
        return Report(
            *("saddle_avoidance", "no minimum", dataclasses.asdict(config)),
            *({"dtype": "float64", "device": "cpu"}, [{**row, **sign}], []),
            *({"panels": []}, {}),
        )

    class Beside:
        """In this process, where it is not the experiment that runs."""

        def __init__(self, name, settings):
            second.append((name, settings))

        def result(self):
            return beside(saddle_avoidance.Config(**second[-1][1]))

    monkeypatch.setattr(convergence, "run", run)
    monkeypatch.setattr("gradflow.cli._Beside", Beside)
    code, out, err = call("demo")
    assert (code, err) == (0, "") and out.startswith("claim\n")
    assert "\nno minimum\n" in out
    written = {path.name for path in (folder / "gradflow-demo").iterdir()}
    assert written == FILES | {"saddle_avoidance"}
    assert (folder / "gradflow-demo/saddle_avoidance/report.json").is_file()
    assert call("demo", "--quiet", "--out", "b") == (0, "", "")
    config = convergence.Config(method="tsit5")
    assert asked == [(config, None), (config, False)]
    assert [name for name, _ in second] == ["saddle_avoidance"] * 2
    assert second[0][1]["starts"] == ("balanced",)


def test_beside():
    """In a process of its own; what it raises comes back, and that it was killed."""
    beside = cli._Beside("saddle_avoidance", {"draws": -1})
    with pytest.raises(ValueError, match="draws must be >= 1, got -1"):
        beside.result()
    killed = cli._Beside("saddle_avoidance", {})
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(RuntimeError, match="that ran saddle_avoidance was ended"):
        killed.result()


# ---- errors


@pytest.mark.parametrize(
    "error, code, text",
    [
        (ValueError("rank is\ntoo high"), 2, "rank is too high\n"),
        (RuntimeError("steps used up"), 1, "steps used up\n"),
        (OSError(28, "No space left"), 1, "[Errno 28] No space left\n"),
        (MemoryError(), 1, "MemoryError: ; --debug shows where it comes from\n"),
        (KeyError("x"), 1, "KeyError: 'x'; --debug shows where it comes from\n"),
        (KeyboardInterrupt(), 130, "stopped; nothing of this run was written\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_are_one_line(call, folder, monkeypatch, error, code, text):
    def run(config, progress, store=None):
        raise error

    monkeypatch.setattr(convergence, "run", run)
    assert call(*TINY, "--out", "a") == (code, "", text)
    assert list(folder.iterdir()) == []
    if isinstance(error, Exception):
        with pytest.raises(type(error)):
            main([*TINY, "--out", "a", "--debug"])


def test_interrupt_outside_of_a_run(call, folder, monkeypatch):
    def stop(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("gradflow.report.read_report", stop)
    assert call("plot", "a") == (130, "", "stopped\n")


def test_debug_shows_the_traceback():
    command = [GRADFLOW, "plot", "nowhere"]
    plain = subprocess.run(command, capture_output=True, text=True, check=False)
    assert plain.returncode == 2
    assert plain.stderr.count("\n") == 1 and "Traceback" not in plain.stderr
    command = [*command, "--debug"]
    debug = subprocess.run(command, capture_output=True, text=True, check=False)
    assert debug.returncode != 0
    assert debug.stderr.startswith("Traceback")
    assert plain.stderr.strip() in debug.stderr


def test_interrupt(folder):
    # A run of hours that says when it is under way.
    code = (
        "import signal, sys, gradflow.study\n"
        # A shell's background jobs ignore it, and their children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Bar(gradflow.study.tqdm):\n"
        "    told = False\n"
        "    def update(self, n=1):\n"
        "        if not Bar.told: print('under way', flush=True)\n"
        "        Bar.told = True\n"
        "gradflow.study.tqdm = Bar\n"
        "from gradflow.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    tokens = [token if token != "8" else "500000" for token in TINY]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *tokens, "--out", "a"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "under way\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
        assert process.returncode == 130
    finally:
        process.kill()
        process.communicate()
    kept = list(folder.rglob("chunk-*.npz"))
    if kept:  # it may have been done with the first chunk
        assert (
            error == f"stopped; {len(kept)} of 489 chunks saved; run again to go on\n"
        )
    else:
        assert error == "stopped; nothing of this run was written\n"
        assert list(folder.iterdir()) == []


# ---- compilation


@pytest.mark.slow
def test_half_a_compiled_program_is_compiled_again(folder):
    code = (
        "from gradflow.runs import experiment\n"
        "experiment('convergence')\n"
        "import jax\n"
        "print(jax.jit(lambda x: x / 8)(1.0))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (done.stdout, done.stderr) == ("0.125\n", "")
        programs = list(folder.rglob("*-cache"))
        assert programs
        for program in programs:
            program.write_bytes(program.read_bytes()[:-10])


def test_compiled_programs_are_kept(folder, monkeypatch):
    """By the names of settings that jax itself reads."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    settings = keep_compiled()
    program = "import jax; jax.jit(lambda x: x + 1)(1.0)"
    environment = {**os.environ, **settings}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    kept = Path(settings["JAX_COMPILATION_CACHE_DIR"])
    assert kept.is_relative_to(folder) and list(kept.iterdir())


def test_no_folder_to_keep_them_in_is_no_error(folder, monkeypatch):
    (folder / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "file"))
    assert keep_compiled() == {}


@pytest.mark.parametrize("version", ["0.9.2", "0.12.0.1"])
def test_no_flag_that_another_jax_would_not_know(version, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    assert compile_fast() == {}


def test_flags_of_the_user_stay(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.10.2")
    monkeypatch.setenv("XLA_FLAGS", "--mine=1")
    flags = compile_fast()["XLA_FLAGS"].split()
    assert flags[0] == "--mine=1"
    assert "--xla_cpu_use_fusion_emitters=false" in flags
    first, second = plain_loops()["XLA_FLAGS"].split()
    assert first == "--mine=1"
    monkeypatch.setenv("XLA_FLAGS", second)
    assert plain_loops() == {}


def test_the_compiler_accepts_plain_loops():
    program = "import jax; print(jax.jit(lambda x: x + 1)(1.0))"
    command, environment = [sys.executable, "-c", program], os.environ | plain_loops()
    done = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout == "2.0\n" and done.stderr == ""


@pytest.mark.slow
def test_two_batched_solves_at_once_end():
    """With as many threads as the command line gives jax; on two cores they hang."""
    program = """
import jax, jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
def body(_, pair):
    solve = lambda m: solve_triangular(jnp.eye(31) + 1e-3 * m, m, lower=True)
    return tuple(jax.vmap(solve)(x) for x in pair)
x = jnp.ones((64, 31, 31))
run = jax.jit(lambda pair: jax.lax.fori_loop(0, 300, body, pair))
jax.block_until_ready(run((x, x)))
"""
    environment = {**os.environ, **enough_threads()}
    command = [sys.executable, "-c", program]
    subprocess.run(command, env=environment, check=True, timeout=120)
