"""dcgan-eval: measure a generator, analyze it, and report on a run."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.common.command_line import command_group, run_command
from pipeline.evaluation import analysis_commands, metric_commands

app = command_group(help="Measure a generator, analyze it, and report on a run.")
app.add_typer(metric_commands.commands)
app.add_typer(analysis_commands.commands)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The page to write; RUN/report.html by default.")] = None,
    results: Annotated[Path | None, typer.Option(help="Folder of results; RUN/evaluation by default.")] = None,
    bench: Annotated[list[Path] | None, typer.Option(help="JSON of dcgan-export bench, shown as a table.")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page; the run's name by default.")] = None,
) -> None:
    """Write one self-contained page about a run: its settings, curves, samples, metrics and analyses."""
    from pipeline.evaluation.report.report import write_report

    page = write_report(run, out or run / "report.html", results=results, bench=bench or [], title=title)
    typer.echo(f"written: {page} ({page.stat().st_size / 1e6:.2f} MB)")


def main() -> None:
    """Entry point of dcgan-eval."""
    run_command(app)


if __name__ == "__main__":
    main()
