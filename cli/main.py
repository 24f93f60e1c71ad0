"""The `dpoeng` command: finds the subcommand, and turns exceptions into messages."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, NoReturn, TextIO

import click
from click.shell_completion import CompletionItem

from dpoeng.cache.errors import UserError

# name -> (module:attribute, what it does). A module is imported only when its command runs or its help is shown, so
# that `dpoeng --help` answers at once.
COMMANDS = {
    "plan": ("dpoeng.cli.plan:plan", "Calculate memory, hours and cost of a run, before you rent a card."),
    "precompute-ref": ("dpoeng.cli.precompute:precompute_ref", "Phase one: score the frozen reference once."),
    "train": ("dpoeng.cli.train:train", "Phase two: train a policy against the cached log-probs."),
    "sweep": ("dpoeng.cli.sweep:sweep", "Train every combination of some settings on one cache, and rank the runs."),
    "eval": ("dpoeng.cli.evaluate:evaluate", "Evaluate a trained adapter on cached pairs."),
    "compare": ("dpoeng.cli.compare:compare", "Show answers before and after training, side by side."),
    "judge": ("dpoeng.cli.rounds.judge:judge", "Let a judge compare answers before and after training."),
    "round": ("dpoeng.cli.rounds.round:round_", "Sample answers, have them judged, and train on best against worst."),
    "check": ("dpoeng.cli.check:check", "Check preference pairs for anything that could spoil a run."),
    "select": ("dpoeng.cli.select:select", "Select pairs by their reference log-probs, as a new view."),
    "report": ("dpoeng.cli.runs.report:report", "Write a run as one HTML page: curves, tables, configuration."),
    "watch": ("dpoeng.cli.runs.watch:watch", "Show a run in the terminal while it trains, from any shell."),
    "doctor": ("dpoeng.cli.doctor:doctor", "Check that this machine is ready: versions, GPU, disk, folders."),
    "merge": ("dpoeng.cli.merge:merge", "Merge a run's adapters into the full-precision base."),
    "push": ("dpoeng.cli.push:push", "Upload an adapter or a checkpoint to the Hugging Face hub."),
    "export": (
        "dpoeng.cli.runs.export:export",
        "Write what was trained for llama.cpp, vLLM or transformers, and check it.",
    ),
    "quantize": ("dpoeng.cli.quantize:quantize", "Store a model in 8 or 4 bits for faster loading."),
    "init": ("dpoeng.cli.init:init", "Write a commented dpoeng.yaml for your model, pairs and GPU."),
    "migrate": (
        "dpoeng.cli.migrate:migrate",
        "Turn a TRL script, or an Axolotl or LLaMA-Factory configuration, into a dpoeng.yaml.",
    ),
    "config": ("dpoeng.cli.config:config", "Print every setting and its origin; a schema for editors."),
    "cache": ("dpoeng.cli.cache.commands:cache", "Inspect a reference cache: info, verify, export and more."),
    "demo": ("dpoeng.cli.demo:demo", "Run both phases on a small real model and 80 pairs, in minutes."),
    "bench": ("dpoeng.cli.bench.commands:bench", "Measure throughput and memory on this machine."),
}

EPILOG = """\b
Examples:
  dpoeng check pairs.jsonl --model sft-model
  dpoeng precompute-ref pairs.jsonl --model sft-model --cache refcache
  dpoeng train --cache refcache --output-dir out
  dpoeng cache info refcache
"""


class LazyGroup(click.Group):
    """A group whose `table` lists its commands: name -> (module:attribute, what it does). `--help` is then fast."""

    def __init__(self, *arguments: Any, table: Mapping[str, tuple[str, str]], **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the table."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the command."""
        if cmd_name not in self.table:
            return None
        module, attribute = self.table[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As in click, but suggests the nearest name for an unknown one."""
        if args and args[0] not in self.table and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.table, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(self.table)}"
            ctx.fail(f"No such command {args[0]!r}{hint}")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names of commands and the group's options, without importing the commands; see click."""
        found = [
            CompletionItem(name, help=told) for name, (_, told) in self.table.items() if name.startswith(incomplete)
        ]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.table.items()])


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import version

        click.echo(f"dpoeng {version('dpoeng')}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    table=COMMANDS,
    epilog=EPILOG,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--debug", is_flag=True, help="Also show the traceback of an error; works anywhere on the line.")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
@click.pass_context
def dpoeng(ctx: click.Context, debug: bool) -> None:
    """DPO with an offline reference.

    DPO needs the reference model only as numbers. `precompute-ref` runs the frozen SFT model once and stores them;
    `train` loads only the policy. One GPU then has to fit only one model instead of two.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
    del debug  # declared only so that --help shows it: `main` removes it from the arguments


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point of the console script. Exit statuses are listed in docs/errors.md."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _terminate)
    _choose_allocator(os.environ)
    if not sys.warnoptions:
        # Deprecations inside libraries concern their maintainers; python -W default shows them.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        # bitsandbytes suggests an optional package of CPU kernels at import, even in runs without quantisation.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        if hasattr(stream, "reconfigure"):  # an unusual terminal encoding must not turn a message into a crash
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments  # anywhere in the line: users add it at the end of a long command
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        status: Any = dpoeng.main(args=arguments, prog_name="dpoeng", standalone_mode=False)
    except click.exceptions.Exit as stop:
        status = stop.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("\nStopped. Finished work is kept; run the same command again to continue.", err=True)
        status = 130
    except _Terminated as stop:
        name = signal.Signals(stop.number).name
        click.echo(f"\nStopped by {name}. Run the same command again to continue.", err=True)
        status = 128 + stop.number
    except BrokenPipeError:
        status = _unread(streams)
    except SystemExit as stop:
        # On a closed pipe rich and click exit with status 1; click replaces stdout first.
        unread = isinstance(stop.__context__, BrokenPipeError) or sys.stdout is not streams[0]
        status = _unread(streams) if unread else stop.code
    except Exception as error:
        reported = as_user_error(error)
        if debug:
            traceback.print_exc()
        _print_error(reported.text())
        status = reported.exit_status
    sys.exit(status if isinstance(status, int) else 0)


def _choose_allocator(environment: MutableMapping[str, str]) -> None:
    """Lets PyTorch's CUDA memory grow in place, unless the user chose otherwise: steps have different numbers of
    tokens.

    Fixed blocks would be left over from each size, and memory would run out while much of it is free. PyTorch reads
    this setting once, before its first allocation on a GPU, so it must be set before torch is imported. CPUs do not use
    it.
    """
    if not any(name in environment for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")):
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # torch warns of the older name


def _unread(streams: Iterable[TextIO]) -> int:
    """The exit status of a process that SIGPIPE ends: the reader of the output (`| head`) is gone."""
    for stream in streams:
        try:
            stream.flush()
        except BrokenPipeError:  # otherwise Python complains again when it flushes at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return 128 + signal.SIGPIPE


def _print_error(message: str) -> None:
    """Prints in colour if rich's tables are coloured: NO_COLOR, FORCE_COLOR and TERM decide."""
    from rich.console import Console

    from dpoeng.cli.tables import Marked, to_text

    Console(stderr=True).print(to_text(Marked("error: ", "bold red"), message), soft_wrap=True)


def as_user_error(error: Exception) -> UserError:
    """Converts any exception to a report: a mistake of the user, a problem of the machine, or a bug."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "dpoeng"
        return UserError(
            error.format_message().rstrip("."),
            code="usage",
            where=command,
            remedy=f"{command} --help lists its options",
            exit_status=error.exit_code,
        )
    if isinstance(error, MemoryError):
        return UserError(
            "not enough memory",
            code="memory-full",
            found=str(error) or None,
            remedy="end other programs, or use smaller batches (--batch-tokens, --per-device-train-batch-size)",
            exit_status=5,
        )
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(
            "a file operation failed",
            code="system-error",
            where=str(error.filename) if error.filename is not None else None,
            found=error.strerror or str(error),
            remedy="check that the disk has room and the folder is writable, then run the same command again",
            exit_status=5,
        )
    if isinstance(error, Warning):  # a library's warning, which PYTHONWARNINGS=error or -W turned into an error
        return UserError(
            "your environment turned a library's warning into an error",
            code="system-warning",
            where="PYTHONWARNINGS or python -W",
            found=f"{type(error).__name__}: {str(error)[:300]}",
            remedy="unset PYTHONWARNINGS, or limit it to the warnings you want",
            exit_status=5,
        )
    frames = traceback.extract_tb(error.__traceback__)
    return UserError(
        "internal error, a bug in dpoeng",
        code="internal-error",
        where=f"{Path(frames[-1].filename).name}:{frames[-1].lineno}, in {frames[-1].name}" if frames else None,
        found=f"{type(error).__name__}: {error}",
        remedy="please report it with the output of the same command with --debug, and of dpoeng doctor --json",
        exit_status=1,
    )


class _Terminated(BaseException):
    """SIGTERM or SIGUSR1 as an exception, so that open files are closed and temporary ones removed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _terminate(number: int, _: object) -> NoReturn:
    raise _Terminated(number)
