"""``expander-sae reproduce``: a command for each experiment of the registry, made when one is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
import typer.main
from rich.markup import escape

from expander_sae.cli.app import app
from expander_sae.cli.options import SCALE, Scale


class _Experiments(typer.core.TyperGroup):
    """Finds its commands late: the experiments import torch, which ``expander-sae --help`` must not wait for."""

    def _fill(self) -> None:
        if not self.commands:
            from expander_sae.experiments.registry import discover

            self.commands = {name: _command(experiment) for name, experiment in discover().items()}

    def list_commands(self, ctx: Any) -> list[str]:
        self._fill()
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        self._fill()
        return super().get_command(ctx, cmd_name)


reproduce = typer.Typer(
    cls=_Experiments,
    name="reproduce",
    help="The experiments of the paper and beyond it. Interrupted, the same command continues.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(reproduce, epilog="Example: [bold]expander-sae reproduce omp --scale smoke[/bold]")


@reproduce.callback(invoke_without_command=True)
def _list(
    list_: Annotated[bool, typer.Option("--list", help="Name the experiments and what they answer.")] = False,
) -> None:
    if list_:
        from expander_sae.experiments.registry import LIST_COLUMNS, listed
        from expander_sae.report.table import print_table

        print_table(listed(), LIST_COLUMNS)
        raise typer.Exit


_OUT = typer.Option(help="Folder for tables, picture and what is needed to continue. Default runs/NAME.")
_SEEDS = typer.Option(min=1, help="Runs of everything; more can be added to a finished folder.")
_SET = typer.Option("--set", help="Any setting named above, as name=value; repeatable.")


def _command(experiment: Any) -> Any:
    """The command of one :class:`~expander_sae.experiments.registry.Experiment`."""
    from expander_sae.experiments.registry import setting_rows

    def run(
        scale: Annotated[Scale, SCALE] = Scale.laptop,
        out: Annotated[Path | None, _OUT] = None,
        set_: Annotated[list[str] | None, _SET] = None,
        seeds: Annotated[int | None, _SEEDS] = None,
    ) -> None:
        from expander_sae.experiments.registry import perform
        from expander_sae.training.recipe import parse_settings

        settings = experiment.settings(scale, seeds, parse_settings(set_ or []))
        perform(experiment, settings, out, scale=scale)

    def run_once(
        scale: Annotated[Scale, SCALE] = Scale.laptop,
        out: Annotated[Path | None, _OUT] = None,
        set_: Annotated[list[str] | None, _SET] = None,
    ) -> None:
        run(scale, out, set_, None)

    lines = [
        f"[bold]{row['name']}[/bold] = {escape(row['laptop'])}: {escape(row['meaning'])}"
        for row in setting_rows(experiment)
    ]
    alone = typer.Typer(rich_markup_mode="rich", add_completion=False)
    alone.command(
        experiment.name,
        help=f"{experiment.question}\n\nSettings, as they are at scale laptop:\n\n" + "\n\n".join(lines),
        short_help=experiment.question,
        epilog=f"Example: [bold]expander-sae reproduce {experiment.name} --scale smoke[/bold]",
    )(run if experiment.has_seeds else run_once)
    return typer.main.get_command(alone)
