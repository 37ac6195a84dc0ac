"""The command line: parse, call, print.

Commands import what they need when they run, so that help and `schema` answer without torch.
"""

from __future__ import annotations

import enum
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import penstock
from penstock.cli_data import ForceOption, add_history, grouped, inspect_data
from penstock.errors import ConfigError, Interrupted, JobNote, PenstockError
from penstock.interruption import Interruption, interruption
from penstock.report.terminal import (
    YELLOW,
    NobodyReads,
    Stream,
    complain,
    ignored,
    say,
    standard_streams,
)

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Trains click, ranking and retrieval models on files of any size, with embedding tables "
        "that grow with the ids they meet.\n\n"
        "A **job** (YAML, or a Python function) says what is read and what is trained; a "
        "**run folder** keeps what came of it: job.yaml, metrics, checkpoints, summary.json."
        "\n\n**First steps**\n\n"
        "    penstock train jobs/synthetic.yaml --out runs/first\n"
        "    penstock inspect runs/first\n"
        "    penstock evaluate runs/first\n\n"
        "**Exit status.** 0: done. 2: what is wrong is said on the standard error. 130, 143, 129: "
        "stopped by Ctrl-C, SIGTERM, SIGHUP; training leaves a checkpoint and says how to go on, "
        "other commands leave no half file. 141: nobody reads the output any more."
    ),
)
data_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Look at data; make data."
)
app.add_typer(data_app, name="data")
data_app.command("inspect")(inspect_data)
data_app.command("history")(add_history)


def _say_version(is_asked: bool) -> None:
    if is_asked:
        print(f"penstock {penstock.__version__}", flush=True)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_say_version),
    ] = False,
) -> None:
    """Options of `penstock` itself; the help is that of the application."""


class FileFormat(enum.StrEnum):
    """Formats that `data synth` writes."""

    parquet = "parquet"
    csv = "csv"
    tsv = "tsv"

    @classmethod
    def of(cls, path: Path) -> FileFormat:
        """The format that a file's name ends with."""
        ending = path.suffix.removeprefix(".")
        if ending not in cls.__members__:
            raise ConfigError(
                f"{path}: no format is known by {path.suffix!r}; end the name with .parquet, .csv "
                "or .tsv, or give --format"
            )
        return cls(ending)


JobArgument = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="A YAML file (jobs/criteo.yaml) or module:function returning a Job."
    ),
]
RunArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="A run folder, one of its checkpoints, or RUN/best (checkpoint.keep_best).",
    ),
]


@dataclass(frozen=True)
class Process:
    """What all commands share."""

    output: Stream
    """The standard output."""
    stop: Interruption


@app.command()
def train(
    context: typer.Context,
    job: JobArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run folder. Default: runs/NAME-TIME, by the job's name.", show_default=False
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="A.B=VALUE", help="Sets one field of the job, in YAML; repeatable."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")
    ] = False,
) -> None:
    """Trains a job, evaluates it on the held-out part, and keeps a checkpoint.

    Ctrl-C (or SIGTERM, or a closed terminal) finishes the step, writes a checkpoint, says how to
    go on and exits with 130 (143, 129); a second one leaves at once. A run that is resumed ends
    with the same bits as one that was never stopped. Where the standard output is closed or full,
    training goes on and RUN/run.log says so. Exit status 2: an error, after which the checkpoint
    is complete too unless the message says otherwise.

    **Examples**

        penstock train jobs/synthetic.yaml
        penstock train jobs/criteo.yaml --set data.source.path=train.parquet --out runs/criteo
        penstock train jobs/synthetic.yaml --set training.epochs=2 --set features.0.pooling=mean
        penstock train runs/criteo/job.yaml --out runs/criteo --resume
    """
    from penstock import run
    from penstock.job_file import load_job
    from penstock.report.folder import RunFolder, default_folder

    loaded = load_job(job, sets or ())
    if resume and out is None:
        raise typer.BadParameter("name the run folder to go on with: --out FOLDER --resume")
    folder = out or default_folder(loaded)
    process: Process = context.obj
    process.output.failed = RunFolder(folder).note_lost_display
    run.train(loaded, folder, resume=resume, stop=process.stop)


@app.command()
def evaluate(
    run_path: RunArgument,
    data: Annotated[
        str | None,
        typer.Option(
            help="Files to evaluate on, as a path or glob. Default: the job's held-out part.",
            show_default=False,
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="A.B=VALUE",
            help="Sets one field of the job, in YAML: what is measured; repeatable.",
        ),
    ] = None,
) -> None:
    """Evaluates the newest checkpoint of a run; changes nothing in it.

    `evaluation.metrics` of the job says what is measured besides AUC, log loss, normalized entropy
    and calibration: AUC by group (GAUC), all metrics by slice, recall of two towers. With several
    labels, each has metrics of its own.

    **Examples**

        penstock evaluate runs/criteo
        penstock evaluate runs/criteo --data 'day_23/*.parquet'
        penstock evaluate runs/criteo --set evaluation.metrics.grouped_auc=[user_id]
    """
    from penstock import run
    from penstock.report.display import metrics_table, show, slices_tables

    metrics = run.evaluate(run_path, data, sets or ())
    for table in slices_tables(metrics):
        show(table)
    show(metrics_table(metrics))


@app.command()
def predict(
    context: typer.Context,
    run_path: RunArgument,
    data: Annotated[str, typer.Option(help="Files to score, as a path or glob.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    no_label: Annotated[
        bool,
        typer.Option("--no-label", help="Text files without a header lack the label column."),
    ] = False,
    force: ForceOption = False,
) -> None:
    """Scores every row of files with the newest checkpoint of a run.

    Writes a Parquet file with the columns row (int64, from 0, in order of reading), score
    (float32: a probability; of task regression the number; of two towers their similarity) and,
    where the data has it, label. Of a job of several labels: score_NAME and label_NAME of each.
    Label columns may be missing. A malformed row is an error, since each row gets a score.

    **Examples**

        penstock predict runs/criteo --data tomorrow.parquet --out scores.parquet
        penstock predict runs/criteo --data 'test/*.gz' --no-label --out scores.parquet
    """
    from penstock import run

    context.obj.output.failed = ignored
    rows = run.predict(run_path, data, out, has_label=not no_label, overwrite=force)
    say(f"{rows:,} rows scored: {out}")


@app.command()
def inspect(
    run_path: RunArgument,
    plots: Annotated[
        bool, typer.Option("--plots/--no-plots", help="Draw PNG files into RUN/plots.")
    ] = True,
) -> None:
    """Shows what a run or checkpoint holds, verifies its checksums, and draws its curves.

    Of a run folder: the curves of loss, normalized entropy and AUC; predicted against observed
    rate on the held-out part; rows of each table over the samples; and how the accesses of each
    table are spread over its keys, counted on up to 262,144 rows of the job's data, if that is
    still there. Small in the terminal, and as training.png, calibration.png, tables.png and
    skew.png in RUN/plots, which needs matplotlib (`pip install 'penstock[plots]'`). Works while
    the run is still training, too, once it has a checkpoint.

    **Examples**

        penstock inspect runs/criteo
        penstock inspect runs/criteo --no-plots
        penstock inspect runs/criteo/checkpoints/step-000000010000
    """
    from penstock.report.display import show
    from penstock.report.inspection import inspect_path

    for part in inspect_path(run_path, draw=plots):
        show(part)


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN...", help="Two or more run folders.")
    ],
    out: Annotated[Path, typer.Option(help="PNG file of the curves.")] = Path("compare.png"),
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw the PNG file.")] = True,
    force: ForceOption = False,
) -> None:
    """Shows runs side by side: their metrics, what differs in their jobs, and their curves.

    The best value of each metric is bold. Fields that are the same in all jobs are left out. The
    curves of all runs are drawn over each other into one PNG file, which needs matplotlib
    (`pip install 'penstock[plots]'`).

    **Examples**

        penstock compare runs/dlrm runs/deepfm
        penstock compare runs/lr-* --out learning_rates.png
    """
    from penstock.report.comparison import compare_runs
    from penstock.report.display import show

    for part in compare_runs(runs, out if plots else None, overwrite=force):
        show(part)


@dataclass(frozen=True)
class SyntheticColumns:
    """Columns of a synthetic log."""

    num_categorical: Annotated[int, typer.Option(min=1, help="Columns c0, c1, ...")] = 8
    num_numeric: Annotated[int, typer.Option(min=0, help="Columns n0, n1, ...")] = 4
    keys_per_feature: Annotated[
        int, typer.Option(min=1, help="Different ids of each categorical column.")
    ] = 100_000


@data_app.command("synth")
@grouped
def synthesize(
    context: typer.Context,
    *,
    out: Annotated[Path, typer.Option(help="File to write.")],
    rows: Annotated[int, typer.Option(min=1, help="Number of samples.")] = 400_000,
    seed: Annotated[int, typer.Option(help="Another seed, another teacher and other rows.")] = 0,
    columns: SyntheticColumns,
    file_format: Annotated[
        FileFormat | None,
        typer.Option("--format", help="Default: by the file's name.", show_default=False),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Writes a synthetic click log whose teacher is known.

    Columns: click, event_time (ms), n0.., c0.., and teacher, the true click probability.

    **Examples**

        penstock data synth --out clicks.parquet --rows 1000000
        penstock data synth --out clicks.tsv --rows 10000 --seed 7
    """
    from penstock.config import SyntheticSource
    from penstock.data.formats.synthetic import write_synthetic

    context.obj.output.failed = ignored
    chosen = file_format or FileFormat.of(out)
    config = SyntheticSource(rows=rows, seed=seed, **asdict(columns))
    write_synthetic(config, out, chosen.value, overwrite=force)
    say(f"{rows:,} rows: {out}")


@app.command()
def schema() -> None:
    """Prints the JSON schema of a job, for editors that check YAML as you type.

    **Example**

        penstock schema > job.schema.json

    and as the first line of a job: # yaml-language-server: $schema=job.schema.json
    """
    from penstock.config import Job

    print(json.dumps(Job.model_json_schema(), indent=2), flush=True)


def _show_note(otherwise: Callable[..., None]) -> Callable[..., None]:
    """Shows notes about a job as lines of their own; other warnings as Python does."""

    def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, JobNote):
            complain(f"note: {message}", YELLOW)
        else:
            otherwise(message, category, *rest)

    return show


def main() -> None:
    """Runs the command line and exits, see the help for with what.

    A `PenstockError` is printed without a traceback.
    """
    if sys.getfilesystemencoding() == "ascii" and not sys.flags.utf8_mode:
        # Names of files are UTF-8 to pyarrow and in jobs; Python would refuse their letters.
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)
    # Jobs and models named `module:function` are found in the folder one stands in, as with
    # `python -m`; an entry point alone would look only in its own folder.
    with suppress(FileNotFoundError):  # that folder is gone
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
    # Idle threads of torch's operators sleep instead of spinning: readers and the store want the
    # cores too, and on a busy machine spinning costs ten times the work. Must precede torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.simplefilter("always", JobNote)
    warnings.showwarning = _show_note(warnings.showwarning)
    is_stopped = False
    with standard_streams() as output:
        try:
            with interruption(_end) as stop:
                status = _call(Process(output, stop))
        except Interrupted as stopped:
            complain(str(stopped))
            is_stopped, status = True, stopped.exit_status
    if is_stopped or any(one.name.startswith("penstock-") for one in threading.enumerate()):
        # All is written. Python would take seconds to take torch apart, and for ever to wait for
        # a thread that is within a read that does not end.
        os._exit(status)
    sys.exit(status)


def _call(process: Process) -> int:
    """Runs the command that the arguments name; returns the exit status."""
    try:
        _refuse_bytes(sys.argv[1:])
        from penstock import _core  # which may be of other sources

        _core.keep_freed_memory()
        app(obj=process)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0
    except NobodyReads:
        return 128 + signal.SIGPIPE
    except PenstockError as error:
        complain(f"error: {error}")
        return 2
    return 0


def _refuse_bytes(arguments: list[str]) -> None:
    """Raises `ConfigError` for an argument that is no text: names of files in jobs are."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{argument!r}: this argument is no UTF-8; rename the file, or go by a link to it"
            ) from None


def _end(number: int) -> None:
    """Leaves, whatever the main thread is at."""
    os.write(2, f"{Interrupted(number)}; left at once\n".encode())
    os._exit(Interrupted(number).exit_status)
