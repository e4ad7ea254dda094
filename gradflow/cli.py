"""The command line: demo, list, run, plot.

Experiments are imported only when one is needed: `--help` must not wait for jax.
Exit codes: 0 done, 1 the run failed, 2 bad input, 3 undecided draws under `--strict`,
130 interrupted.
"""

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Toml

from .experiments import NAMES


app = App(
    name="gradflow",
    help="Where does gradient flow go? Certified verdicts on many runs.",
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
    """Deep linear autoencoders on MNIST: where do a thousand runs end?"""
    experiment = _experiment("convergence")
    return _run(experiment, experiment.Config(), out, quiet, strict=False)


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
    from .plot import save
    from .report import read_report

    for path in save(read_report(folder), folder):
        print(path)
    return 0


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits; every error is one line on stderr."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in tokens
    tokens = [token for token in tokens if token != "--debug"]
    try:
        code = _dispatch(tokens)
    except KeyboardInterrupt:
        code = _complain("stopped; nothing of this run was written", 130)
    except CycloptsError as error:
        code = _complain(str(error), 2)
    except ValueError as error:
        if debug:
            raise
        code = _complain(str(error), 2)
    except (RuntimeError, OSError) as error:
        if debug:
            raise
        code = _complain(str(error), 1)
    sys.exit(code)


def _dispatch(tokens: list[str]) -> int:
    if tokens[:1] == ["run"]:
        for name in NAMES:
            _register(name)
        tokens, file = _without_config(tokens)
        if file is not None:
            # cyclopts checks the file's keys as it checks flags.
            run_app.config = Toml(
                file, must_exist=True, use_commands_as_keys=False, allow_unknown=False
            )
    result = app(
        tokens, exit_on_error=False, print_error=False, result_action="return_value"
    )
    return result if isinstance(result, int) else 0


def _register(name: str) -> None:
    """Adds `gradflow run NAME`, with the fields of its `Config` as flags."""
    experiment = _experiment(name)

    def command(
        settings: Any = None,
        *,
        out: Out = Path(f"gradflow-{name}"),
        quiet: Quiet = False,
        strict: Strict = False,
    ) -> int:
        chosen = experiment.Config() if settings is None else settings
        return _run(experiment, chosen, out, quiet, strict)

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
            file = Path(value)
            if not file.is_file():
                raise ValueError(f"--config {value}: there is no such file")
        else:
            rest.append(token)
    return rest, file


def _run(experiment: Any, config: Any, out: Path, quiet: bool, strict: bool) -> int:
    from .plot import save

    report = experiment.run(config, progress=False if quiet else None)
    report.write(out)
    figures = save(report, out)
    if not quiet:
        print(f"{report.claim}\n\n{report.table()}\n")
        for note in report.notes:
            print(f"  {note}")
        times = ", ".join(f"{k} {v:.1f} s" for k, v in report.seconds.items())
        print(
            f"{report.environment['dtype']} on {report.environment['device']}; {times}"
        )
        names = ["report.json", "report.md", *(path.name for path in figures)]
        print(f"wrote {', '.join(names)} to {out}")
    undecided = sum(row["undecided"] for row in report.rows)
    return 3 if strict and undecided else 0


def _experiment(name: str) -> Any:
    return importlib.import_module(f"gradflow.experiments.{name}")


def _complain(message: str, code: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return code
