"""What comes after a launch: python -m ablation_sweeps status results/<sweep>"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from ablation_sweeps import store
from ablation_sweeps.watching import overview

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """What comes after a launch."""


@app.command()
def status(sweep: Annotated[Path, typer.Argument(help="the folder of a sweep: results/<sweep>")]) -> None:
    """How far each job of a sweep is, from its files alone."""
    from rich.console import Console

    runs = sorted(path.parent for path in sweep.glob("*/status.json"))
    if not runs:
        raise SystemExit(f"error: {sweep}: no job was ever started there; name the folder of a sweep: results/<sweep>")
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(overview(runs))
    counts = Counter(store.status(run)["state"] for run in runs)
    console.print(", ".join(f"{n} {state}" for state, n in sorted(counts.items())), highlight=False)
