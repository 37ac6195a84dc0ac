"""`penstock savepoint create`, `savepoint restore` and `suspend`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penstock.report.terminal import say


def create(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run folder, also while it trains, or a checkpoint."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The savepoint; new, or empty.")],
) -> None:
    """Keeps what a run has come to: tables, model, optimizer, and its place in the data.

    Of the newest checkpoint, whose every byte is compared with its checksum. A savepoint is a run
    folder: `inspect`, `evaluate`, `predict` and `data audit` take it as one. No run removes it.

    **Examples**

        penstock savepoint create runs/clicks --out saved/monday
        penstock savepoint create runs/clicks/checkpoints/step-000010000 --out saved/10k
    """
    say(f"savepoint {out}, of {_copied(run, out)}")


def restore(
    savepoint: Annotated[
        Path, typer.Argument(metavar="SAVEPOINT", help="A savepoint, or any run folder.")
    ],
    out: Annotated[Path, typer.Option(metavar="RUN", help="The new run folder; new, or empty.")],
) -> None:
    """Begins a run folder where a savepoint is; the savepoint stays.

    The run goes on with its own job or another one that may go on from it: with other data behind
    what was read, another learning rate, more ranks. For what a job may change, see
    docs/checkpoint_format.md; for other tables or another model, training.init_from.

    **Examples**

        penstock savepoint restore saved/monday --out runs/again
        penstock train other.yaml --out runs/again --resume
    """
    _copied(savepoint, out)
    job = out / "job.yaml"
    say(f"run folder {out}; go on with\n  penstock train {job if job.is_file() else 'JOB'} "
        f"--out {out} --resume")  # fmt: skip


def suspend(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that trains.")],
    patience: Annotated[
        float, typer.Option(metavar="S", min=0, help="Seconds to wait until it has stopped.")
    ] = 600.0,
) -> None:
    """Stops a run that trains on this machine, after its step, with a checkpoint.

    As Ctrl-C at its terminal does, also where it waits for data; of several ranks all stop. It goes
    on with `penstock train JOB --out RUN --resume`, with the bits of a run that never stopped.

    **Example**

        penstock suspend runs/clicks && penstock savepoint create runs/clicks --out saved/monday
    """
    from penstock.report.folder import stop_run
    from penstock.training.trained import newest_of_run

    stop_run(run, patience)
    say(f"stopped; newest checkpoint: {newest_of_run(run)}")


def _copied(run: Path, to: Path) -> Path:
    from penstock.training.checkpoint.savepoint import copy_run
    from penstock.training.trained import read_newest

    def copy(checkpoint: Path) -> Path:
        of_run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
        copy_run(checkpoint, of_run, to)
        return checkpoint

    return read_newest(run, copy)
