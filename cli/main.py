"""The `dpoeng` command: finds the subcommand, and turns mistakes into messages."""

from __future__ import annotations

import signal
import sys
import warnings
from typing import Any, NoReturn

import click

from dpoeng.cache.errors import UserError
from dpoeng.cli.lazy import LazyGroup

# name -> (module:attribute, what it does). The modules are imported only when their command is run or asked for help,
# so that `dpoeng --help` answers at once.
COMMANDS = {
    "precompute-ref": ("dpoeng.cli.precompute:precompute_ref", "Phase one: score the frozen reference, once."),
    "train": ("dpoeng.cli.train:train", "Phase two: train a LoRA policy against the cached numbers."),
    "eval": ("dpoeng.cli.evaluate:evaluate", "Evaluate a trained adapter on cached pairs."),
    "compare": ("dpoeng.cli.compare:compare", "Answers before and after training, side by side."),
    "cache": ("dpoeng.cli.cache:cache", "Look into a reference cache: info, verify, export and more."),
    "demo": ("dpoeng.cli.demo:demo", "Both phases on a small real model and 100 pairs, in minutes."),
    "bench": ("dpoeng.cli.bench:bench", "Measure throughput and memory on this machine."),
}

EPILOG = """\b
Examples:
  dpoeng precompute-ref pairs.jsonl --model sft-model --cache refcache
  dpoeng train --cache refcache --output-dir out
  dpoeng cache info refcache
"""


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import version

        click.echo(f"dpoeng {version('dpoeng')}")
        ctx.exit()


@click.group(cls=LazyGroup, table=COMMANDS, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of a reported error too.")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
@click.pass_context
def dpoeng(ctx: click.Context, debug: bool) -> None:
    """DPO with an offline reference.

    DPO needs the reference model only as numbers. `precompute-ref` runs the frozen SFT model once and stores them;
    `train` loads only the policy. So one GPU holds what would else need two models.
    """
    ctx.obj = {"debug": debug}


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, _terminate)
    if not sys.warnoptions:
        # Deprecations inside the libraries are for their maintainers; python -W default shows them.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status: Any = dpoeng.main(args=arguments, prog_name="dpoeng", standalone_mode=False)
    except click.exceptions.Exit as stop:
        status = stop.exit_code
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except UserError as error:
        if "--debug" in arguments:
            raise
        click.echo(click.style("error: ", fg="red", bold=True, reset=True) + str(error), err=True)
        status = error.exit_status
    except (KeyboardInterrupt, click.Abort):
        click.echo(
            "\nStopped. What was committed is kept: run the same command again and it goes on from there.", err=True
        )
        status = 130
    except _Terminated:
        click.echo("\nStopped by SIGTERM. Run the same command again and it goes on from there.", err=True)
        status = 143
    sys.exit(status if isinstance(status, int) else 0)


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that what is open is closed and what is temporary is removed."""


def _terminate(*_: Any) -> NoReturn:
    raise _Terminated
