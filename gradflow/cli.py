"""The command line: demo, list, run, plot.

Experiments are imported only when one is needed: `--help` must not wait for jax.
Exit codes: 0 done, 1 the run failed, 2 bad input, 3 undecided draws under `--strict`,
130 interrupted.
"""

import dataclasses
import importlib
import importlib.metadata
import os
import platform
import sys
import threading
import tomllib
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Toml

from .experiments import NAMES


app = App(
    name="gradflow",
    help=(
        "Where does gradient flow go? Certified verdicts on many runs. Errors are one "
        "line; --debug shows where they come from."
    ),
    # `main` has a message for it.
    suppress_keyboard_interrupt=False,
    # `--depths 2 3`, and no flag for an empty list: none may be empty.
    default_parameter=Parameter(consume_multiple=True, negative_iterable=()),
)
run_app = App(name="run", help="Run an experiment; its settings are its flags.")
app.command(run_app)

Out = Annotated[Path, Parameter(help="Folder for the report and the figure.")]
Quiet = Annotated[
    bool, Parameter(negative="", help="Print no table and show no progress.")
]
Strict = Annotated[
    bool, Parameter(negative="", help="Exit with code 3 if any draw is undecided.")
]


@app.command
def demo(*, out: Out = Path("gradflow-demo"), quiet: Quiet = False) -> int:
    """Deep linear autoencoders on MNIST: where do a thousand runs end? And what no
    usual integrator sees: half of all square balanced starts end at a saddle."""
    # Nothing is compiled before the first experiment is loaded.
    os.environ |= compile_fast()
    second = _experiment("saddle_avoidance")
    square = second.Config(
        draws=256, batch=256, ranks=(3,), depths=(2,), starts=("balanced",), curves=0
    )
    folder = out / "saddle_avoidance"
    _check_folder(folder, "saddle_avoidance", square)
    # Most of both is compilation, so the second goes on beside the first.
    beside = _Beside(lambda: second.run(square, progress=False))
    config = _experiment("convergence").Config()
    code = _run("convergence", config, out, quiet, strict=False)
    report = beside.result()
    return max(code, _finish(report, folder, quiet, strict=False))


@app.command(name="list")
def list_experiments() -> int:
    """List the experiments: what each one claims, and what it costs."""
    for name in NAMES:
        experiment = _experiment(name)
        print(f"{name}\n    {experiment.CLAIM}\n    Cost: {experiment.COST}.")
    return 0


@app.command
def plot(folder: Path, /) -> int:
    """Draw the figure of a report again.

    Parameters
    ----------
    folder
        A folder written by `gradflow run` or `gradflow demo`.
    """
    from .report import read_report

    for path in _draw(read_report(folder), folder):
        print(path)
    return 0


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits; every error is one line on stderr.

    `--debug` lets errors through with their traceback.
    """
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in tokens
    tokens = [token for token in tokens if token != "--debug"]
    try:
        code = _dispatch(tokens)
    except KeyboardInterrupt:
        code = _complain("stopped", 130)
    except CycloptsError as error:
        code = _complain(str(error), 2)
    except Exception as error:
        if debug:
            raise
        code = _complain(*_explained(error))
    sys.exit(code)


def _explained(error: Exception) -> tuple[str, int]:
    """What the user is told of an error, and the exit code."""
    if isinstance(error, ValueError):
        return str(error), 2
    if isinstance(error, (RuntimeError, OSError)) and str(error):
        return str(error), 1
    return f"{type(error).__name__}: {error}; --debug shows where it comes from", 1


def _dispatch(tokens: list[str]) -> int:
    if tokens[:1] == ["run"]:
        for name in NAMES:
            if name not in run_app:
                _register(name)
        tokens, file = _without_config(tokens)
        # cyclopts checks the file's keys as it checks flags.
        settings = Toml(file or "", use_commands_as_keys=False, allow_unknown=False)
        run_app.config = (_check_whole,) if file is None else (settings, _check_whole)
    result = app(
        tokens, exit_on_error=False, print_error=False, result_action="return_value"
    )
    return result if isinstance(result, int) else 0


def _register(name: str) -> None:
    """Adds `gradflow run NAME`, with the fields of its `Config` as flags."""
    experiment = _experiment(name)

    def command(
        *,
        settings: Any = None,
        out: Out = Path(f"gradflow-{name}"),
        quiet: Quiet = False,
        strict: Strict = False,
    ) -> int:
        chosen = experiment.Config() if settings is None else settings
        return _run(name, chosen, out, quiet, strict)

    command.__annotations__["settings"] = experiment.Config | None
    help_text = f"{experiment.CLAIM} Settings can be read from a TOML file: --config."
    run_app.command(command, name=name, help=help_text)


def _without_config(tokens: list[str]) -> tuple[list[str], Path | None]:
    """Takes `--config FILE` out of the tokens."""
    rest, file = [], None
    remaining = iter(tokens)
    for token in remaining:
        if token == "--config" or token.startswith("--config="):
            _, equals, value = token.partition("=")
            value = value if equals else next(remaining, "")
            if not value:
                raise ValueError("--config needs the name of a TOML file")
            file = Path(value)
            _check_toml(file)
        else:
            rest.append(token)
    return rest, file


def _check_whole(app: App, commands: tuple[str, ...], arguments: Any) -> None:
    """Refuses `--draws 2.5`, which cyclopts would round."""
    del app, commands
    for argument in arguments:
        if int in (argument.hint, *get_args(argument.hint)):
            for token in argument.tokens:
                if "." in token.value:
                    name = argument.name.lstrip("-")
                    raise ValueError(
                        f"{name} must be a whole number, got {token.value}"
                    )


def _check_toml(file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"--config {file}: there is no such file")
    try:
        tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--config {file} is not valid TOML: {error}") from None


def compile_fast() -> dict[str, str]:
    """Environment variables with which jax compiles in two thirds of the time, for
    runs of seconds: the code it makes is up to twice as slow.

    It is the former code generator of XLA, which releases after 0.10 no longer have;
    they end the process at a flag that they don't know.
    """
    if not importlib.metadata.version("jax").startswith("0.10."):
        return {}
    given = os.environ.get("XLA_FLAGS", "")
    return {"XLA_FLAGS": f"{given} --xla_cpu_use_fusion_emitters=false".strip()}


def keep_compiled() -> dict[str, str]:
    """Environment variables with which jax keeps what it compiles for later processes,
    in the user's folder for such files. To be set before jax is imported."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    # A home that several machines share: compiled code is for one kind of processor.
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    flags = next((line for line in lines if line.startswith("flags")), "")
    kind = f"{platform.machine()}-{zlib.crc32(flags.encode()):08x}"
    folder = Path(root, "gradflow", "compiled", kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a machine without a home for it is no error
        return {}
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


class _Beside:
    """A task in a thread of its own, which an interrupt does not wait for."""

    def __init__(self, task: Callable[[], Any]):
        self._outcome: list[Any] = []
        self._error: list[Exception] = []
        self._thread = threading.Thread(target=self._work, args=(task,), daemon=True)
        self._thread.start()

    def _work(self, task: Callable[[], Any]) -> None:
        try:
            self._outcome.append(task())
        except Exception as error:
            self._error.append(error)

    def result(self) -> Any:
        self._thread.join()
        if self._error:
            raise self._error[0]
        return self._outcome[0]


def _check_folder(out: Path, name: str, config: Any) -> None:
    from .report import check_folder

    # Before hours of computing, not after.
    check_folder(out, name, dataclasses.asdict(config))


def _run(name: str, config: Any, out: Path, quiet: bool, strict: bool) -> int:
    _check_folder(out, name, config)
    try:
        report = _experiment(name).run(config, progress=False if quiet else None)
    except KeyboardInterrupt:
        return _complain("stopped; nothing of this run was written", 130)
    return _finish(report, out, quiet, strict)


def _finish(report: Any, out: Path, quiet: bool, strict: bool) -> int:
    """Writes a report, draws it, prints it."""
    report.write(out)
    figures = _draw(report, out)
    if not quiet:
        print(f"{report.claim}\n\n{report.table()}\n")
        for note in report.notes:
            print(f"  {note}")
        times = ", ".join(f"{k} {v:.1f} s" for k, v in report.seconds.items())
        made = report.environment
        print(f"{made['dtype']} on {made['device']}; {times}")
        if "runs" in made:
            print(f"runs {made['runs']}")
        names = ["report.json", "report.md", *(path.name for path in figures)]
        print(f"wrote {', '.join(names)} to {out}")
    undecided = sum(row["undecided"] for row in report.rows)
    return 3 if strict and undecided else 0


def _draw(report: Any, folder: Path) -> list[Path]:
    import matplotlib

    # No window, wherever this runs.
    matplotlib.use("agg")
    from .plot import save

    return save(report, folder)


def _experiment(name: str) -> Any:
    if "jax" not in sys.modules:
        for variable, value in keep_compiled().items():
            os.environ.setdefault(variable, value)
        # jax says so of the half of a file that another process is writing, or was
        # when it was killed; it compiles again.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
    return importlib.import_module(f"gradflow.experiments.{name}")


def _complain(message: str, code: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return code
