"""The command line: `foveal demo | run | compare | methods | inspect | doctor | bench`.

Notable choices
- Results go to stdout, progress and warnings to stderr; with --json stdout is one JSON document and nothing else.
- Exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted. A mistake of the user is one sentence; --debug shows
  the traceback instead.
- Heavy imports happen inside the commands, so that --help is quick.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from foveal.pipelines.engine import Outcome
    from foveal.pipelines.progress import Voice

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
BENCHES = ("kernels", "layers", "backbones", "vision")

app = typer.Typer(
    name="foveal",
    help="Sparse attention for diffusion models: run methods, compare them with dense attention, look at their plans.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout and nothing else.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value on top of the config, e.g. sampler.steps=4")]
Config = Annotated[str, typer.Argument(help="A YAML file, or the name of a config that comes with foveal, e.g. demo")]


def version_line(value: bool) -> None:
    if value:
        import foveal

        typer.echo(f"foveal {foveal.__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks instead of one sentence.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=version_line, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that stand before the command."""


@app.command()
def demo(
    overrides: Overrides = None,
    fast: Annotated[bool, typer.Option("--fast", help="Only the quality study on the smallest model.")] = False,
    as_json: Json = False,
) -> None:
    """Compare methods with dense attention on the shipped toy models: offline, on a CPU, in under two minutes."""
    from foveal.pipelines.demo import demo as run_demo

    finish(run_demo(overrides or (), fast=fast, voice=voice(as_json)), as_json)


@app.command()
def run(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Generate with the methods of a config; dense runs beside them where a metric needs it."""
    from foveal.pipelines.run import run as run_config

    finish(run_config(config, overrides or (), voice=voice(as_json)), as_json)


@app.command()
def compare(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Methods x densities x seeds: quality against speed, paired with dense."""
    from foveal.pipelines.compare import compare as run_comparison

    finish(run_comparison(config, overrides or (), voice=voice(as_json)), as_json)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Only this method, with what its knobs do.")] = None,
    metrics: Annotated[bool, typer.Option("--metrics", help="List the metrics instead.")] = False,
    presets: Annotated[bool, typer.Option("--presets", help="List recommended settings by model instead.")] = False,
    as_json: Json = False,
) -> None:
    """List the registered methods with their knobs and defaults, those of other packages included."""
    if presets:
        return list_presets(as_json)
    from foveal.pipelines.catalogue import method_rows, metric_rows, print_methods, print_metrics

    rows = metric_rows() if metrics else method_rows(name)
    if as_json:
        write_json(rows)
    else:
        (print_metrics if metrics else print_methods)(rows, stdout())


@app.command()
def inspect(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")] = Path("runs/inspect"),
    as_json: Json = False,
) -> None:
    """Draw the plan of every method of a config on its token grid and tell what each layer does."""
    from foveal.pipelines.inspection import inspect_config, print_inspection

    found = inspect_config(config, overrides or (), out, voice(as_json))
    write_json(found) if as_json else print_inspection(found, stdout())


@app.command()
def doctor(
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Only what composes with an accelerated diffusers model.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check versions, devices, kernels and shipped files on this machine. Exit code 1 when something is broken."""
    if matrix:
        from foveal.pipelines.matrix import matrix_rows, print_matrix

        return write_json(matrix_rows()) if as_json else print_matrix(stdout())
    from foveal.pipelines.doctor import diagnose, print_diagnosis

    found = diagnose()
    write_json(found) if as_json else print_diagnosis(found, stdout())
    if not found["healthy"]:
        raise typer.Exit(FAILED)


@app.command()
def bench(
    what: Annotated[
        str,
        typer.Argument(
            help="kernels (attention alone), layers (transformer blocks), backbones or vision (image models)"
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write. Default benchmarks/results/WHAT.json.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="Default: cuda if there is one.")] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="Of measuring per case.")] = 2.0,
    rounds: Annotated[int | None, typer.Option("--rounds", help="Exactly so many, instead of --seconds.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Small sizes, for trying it on a CPU.")] = False,
    cases: Annotated[
        list[str] | None, typer.Option("--cases", help="Only these; may be repeated. A wrong name lists them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure kernels, transformer blocks or image models on this machine against the fastest dense attention."""
    options = {"out": out, "device": device, "seconds": seconds, "tiny": tiny, "cases": cases or None, "rounds": rounds}
    with contextlib.redirect_stdout(sys.stderr):  # a line per row is progress
        path = run_bench(what, **options)
    write_json(json.loads(path.read_text())) if as_json else typer.echo(str(path))


# ---- output
def list_presets(as_json: bool) -> None:
    from foveal.pipelines.presets import preset_rows, print_presets

    rows = preset_rows()
    write_json(rows) if as_json else print_presets(rows, stdout())


def run_bench(what: str, **options: Any) -> Path:
    """`bench` with what it refuses told as the user's mistake."""
    from foveal.pipelines.errors import UserError

    if what not in BENCHES:
        raise UserError(f"there is no bench {what!r}; it is one of {', '.join(BENCHES)}.")
    from foveal.pipelines.bench.__main__ import run

    try:
        return run(what, **options)
    except (ValueError, ImportError) as err:
        raise UserError(str(err)) from err


def stdout() -> Console:
    """A console for results, so wide that tables stay whole when they are pasted; text wraps in the terminal."""
    from rich.console import Console

    from foveal.pipelines.summary import WIDTH

    return Console(highlight=False, width=WIDTH)


def voice(as_json: bool) -> Voice:
    """Progress on stderr, in both modes; --json only keeps stdout clean."""
    from foveal.pipelines.progress import Quiet, Rich

    return Quiet() if as_json else Rich()


def write_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=1, default=str, allow_nan=False)
    sys.stdout.write("\n")


def finish(outcome: Outcome, as_json: bool) -> None:
    """Print a finished run; a run in which a study failed ends with 1."""
    report = str(outcome.report) if outcome.report else None
    if as_json:
        write_json({**outcome.document, "folder": str(outcome.folder), "report": report})
    else:
        from foveal.pipelines.summary import lines, print_outcome

        console = stdout()
        print_outcome(outcome.document, console)
        lines(console, "", f"results: {outcome.folder / 'result.json'}", *([f"report:  {report}"] if report else []))
    if outcome.failures:
        raise typer.Exit(FAILED)


# ---- the way in
def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if debug:
        arguments = ["--debug", *(a for a in arguments if a != "--debug")]
    sys.exit(outcome_code(arguments, debug))


def outcome_code(arguments: list[str], debug: bool) -> int:
    """Run a command -> exit code; whatever goes wrong is one sentence on stderr (and JSON on stdout with --json)."""
    try:
        code = app(args=arguments, prog_name="foveal", standalone_mode=False)
        return code if isinstance(code, int) else OK
    except typer.Exit as err:
        return err.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return complain("interrupted", INTERRUPTED, arguments)
    except Exception as err:
        if hasattr(err, "format_message"):  # typer's usage errors, whose class has moved between its versions
            return complain(err.format_message(), BAD_INPUT, arguments)
        if debug:
            raise
        return complain(*explained(err), arguments)


def explained(err: Exception) -> tuple[str, int]:
    """(sentence, exit code) of an exception."""
    from foveal.pipelines.errors import Interrupted, UserError

    sentence = " ".join(str(err).split()) or type(err).__name__
    if isinstance(err, Interrupted):
        return sentence, INTERRUPTED
    from foveal.plugins.method import MethodError

    if isinstance(err, (UserError, MethodError)):
        return sentence, BAD_INPUT
    return f"the run failed: {type(err).__name__}: {sentence} (--debug shows where)", FAILED


def complain(sentence: str, code: int, arguments: list[str]) -> int:
    """Say what is wrong and return the code."""
    print(f"foveal: {sentence}", file=sys.stderr)
    if "--json" in arguments:
        write_json({"error": sentence, "exit_code": code})
    return code


if __name__ == "__main__":
    main()
