"""The command line: parse, call, print.

Commands import what they need when they run, so that help and `schema` answer without torch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import penstock
from penstock import cli_savepoint
from penstock.cli_data import (
    ForceOption,
    add_history,
    audit_data,
    inspect_data,
    plan_data,
    synthesize,
)
from penstock.errors import (
    ConfigError,
    FailedElsewhere,
    GroupError,
    Interrupted,
    JobNote,
    PenstockError,
)
from penstock.interruption import Interruption, interruption
from penstock.ranks.environment import (
    LOST,
    end_with_launcher,
    is_started_by_us,
    leave_words,
)
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
        "**Exit status.** 0: done. 2: what is wrong is said on the standard error. 3: a rank ends "
        "because of another one, which says why. 130, 143, 129: "
        "stopped by Ctrl-C, SIGTERM, SIGHUP; training leaves a checkpoint and says how to go on, "
        "other commands leave no half file. 141: nobody reads the output any more."
    ),
)
data_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Look at data; make data."
)
app.add_typer(data_app, name="data")
data_app.command("inspect")(inspect_data)
data_app.command("plan")(plan_data)
data_app.command("audit")(audit_data)
data_app.command("history")(add_history)
data_app.command("synth")(synthesize)
savepoint_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Keep where a run is; go on from there."
)
app.add_typer(savepoint_app, name="savepoint")
savepoint_app.command("create")(cli_savepoint.create)
savepoint_app.command("restore")(cli_savepoint.restore)
app.command("suspend")(cli_savepoint.suspend)


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
ProfileOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Trace N steps behind the first 20, for ui.perfetto.dev, and print which stage holds "
        "the run back.",
        show_default=False,
    ),
]


@dataclass
class Process:
    """What all commands share."""

    output: Stream
    """The standard output."""
    stop: Interruption
    is_in_group: bool = False
    """Whether it is a rank among several: then what torch keeps of the group may wait for others
    that are gone, so that the process ends without it.
    """


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
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Train over N processes of this machine: tables spread, samples divided. Of GPUs "
            "(run.device: cuda) each takes one.",
            show_default=False,
        ),
    ] = None,
    profile: ProfileOption = None,
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

    **Over processes.** `--nproc 4` starts four ranks here; `torchrun penstock train JOB`, or
    any launcher that sets its variables, starts them anywhere (docs/ranks.md). Either is resumed on
    any number of ranks. One that fails ends all: the error says which it was.

        penstock train jobs/criteo.yaml --nproc 4 --out runs/criteo
        penstock train runs/criteo/job.yaml --nproc 2 --out runs/criteo --resume
    """
    from penstock.config import LANES, check_lanes
    from penstock.job_file import load_job

    loaded = load_job(job, sets or ())
    if resume and out is None:
        raise typer.BadParameter("name the run folder to go on with: --out FOLDER --resume")
    process: Process = context.obj
    if nproc is not None and nproc > 1 and not is_started_by_us(os.environ):
        # Before any rank starts: a thousand of them would stop the machine.
        check_lanes(nproc, loaded.data.lanes or LANES)
        _launch(nproc, process)
        return
    from penstock import run
    from penstock.ranks.join import joined
    from penstock.ranks.together import from_first
    from penstock.report.folder import RunFolder, default_folder

    process.is_in_group = "WORLD_SIZE" in os.environ
    with joined(loaded.run.device) as group:
        folder = out or Path(from_first(group, lambda: str(default_folder(loaded))))
        process.output.failed = RunFolder(folder).note_lost_display
        run.train(loaded, folder, resume=resume, stop=process.stop, group=group, profile=profile)


def _launch(size: int, process: Process) -> None:
    """Runs this very command as ranks; exits with the status of the first that failed."""
    from penstock.ranks.launch import launch

    if "WORLD_SIZE" in os.environ:
        raise ConfigError(
            f"--nproc {size}, and WORLD_SIZE is {os.environ['WORLD_SIZE']!r}: another launcher "
            "has started this process as one of its ranks; leave --nproc out, or unset WORLD_SIZE"
        )
    ended = launch([sys.executable, *sys.orig_argv[1:]], size, process.stop)
    if ended.words is not None:
        complain(ended.words)
    if ended.status:
        raise SystemExit(ended.status)


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
            if not _is_told_by_another():
                complain(f"note: {message}", YELLOW)
        else:
            otherwise(message, category, *rest)

    return show


def _is_told_by_another() -> bool:
    """Whether another process of the same run says what is true of all: its launcher, or rank 0."""
    return is_started_by_us(os.environ) or os.environ.get("RANK", "0") != "0"


def main() -> None:
    """Runs the command line and exits, see the help for with what.

    A `PenstockError` is printed without a traceback.
    """
    if is_started_by_us(os.environ):
        end_with_launcher()
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
        process = Process(output, Interruption())
        try:
            with interruption(_end) as process.stop:
                status = _call(process)
        except Interrupted as stopped:
            _say_why(str(stopped))
            is_stopped, status = True, stopped.exit_status
    is_stopped |= status != 0 and process.is_in_group
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
    except FailedElsewhere:
        return LOST
    except PenstockError as error:
        _say_why(str(error), "error: ")
        return LOST if _is_of_others(error) else 2
    return 0


def _is_of_others(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that other ranks are gone."""
    while error is not None and not isinstance(error, GroupError):
        error = error.__cause__
    return error is not None


def _say_why(words: str, prefix: str = "") -> None:
    """Says why this process ends. Of ranks that we started the launcher says it, of the first."""
    if not leave_words(words):
        complain(f"{prefix}{words}")


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
    words = f"{Interrupted(number)}; left at once"
    if not leave_words(words):
        os.write(2, f"{words}\n".encode())
    os._exit(Interrupted(number).exit_status)
