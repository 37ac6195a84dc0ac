"""`penstock data inspect`, `data plan`, `data history` and `data synth`: parse, call, print."""

from __future__ import annotations

import enum
import inspect
import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args, get_type_hints

import typer

from penstock.errors import ConfigError, DataError
from penstock.report.terminal import ignored, say

if TYPE_CHECKING:
    from penstock.config import AnyFileSource
    from penstock.survey.survey import Survey

_RATE, _SKEW = "label_rate.png", "skew.png"


FilesArgument = Annotated[
    list[str],
    typer.Argument(metavar="FILE...", help="Files, directories or globs of one format."),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help="parquet, csv, ... as in a job. Default: by the files' names.",
        show_default=False,
    ),
]
ColumnsOption = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,...",
        help="Columns of csv or tsv without a header; I{1..13} stands for I1, I2, ... I13.",
        show_default=False,
    ),
]
PartitionsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--partition",
        metavar="NAME=TYPE",
        help="A column that folders name (region=01/), as string, int64, uint64, float64, date or "
        "timestamp; repeatable.",
        show_default=False,
    ),
]
RowsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Look at no more rows than this, spread over the files. Default: at all.",
        show_default=False,
    ),
]
LabelOption = Annotated[
    str | None,
    typer.Option(help="The label's column. Default: by its name.", show_default=False),
]
ItemOption = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,...",
        help="Every row is a positive: its negatives take these columns from other rows.",
        show_default=False,
    ),
]
EventTimeOption = Annotated[
    str | None,
    typer.Option(help="The column of times. Default: by values and name.", show_default=False),
]
OutOption = Annotated[
    Path | None, typer.Option(help="Folder for label_rate.png and skew.png.", show_default=False)
]
JobOption = Annotated[
    Path | None,
    typer.Option(help="Writes a job for this data, ready to train.", show_default=False),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Overwrite files that are there; never those that are read.")
]


@dataclass(frozen=True)
class FilesGiven:
    """Files to read, and as what."""

    files: FilesArgument
    file_format: FormatOption = None
    columns: ColumnsOption = None
    partitions: PartitionsOption = None


@dataclass(frozen=True)
class RolesGiven:
    """Columns whose role is not to be guessed."""

    label: LabelOption = None
    item: ItemOption = None
    event_time: EventTimeOption = None


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command for Typer whose parameters that are dataclasses are given field by field."""
    groups, parameters = {}, []
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        if not is_dataclass(hints[name]):
            parameters.append(_option(name, hints[name], parameter.default))
            continue
        groups[name] = cast("type[Any]", hints[name])
        of_fields = get_type_hints(hints[name], include_extras=True)
        for field in fields(groups[name]):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.append(_option(field.name, of_fields[field.name], default))

    def spread(**given: Any) -> None:
        for name, group in groups.items():
            of_group = {field.name: given.pop(field.name) for field in fields(group)}
            given[name] = group(**of_group)
        command(**given)

    spread.__name__, spread.__doc__ = command.__name__, command.__doc__
    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = {each.name: each.annotation for each in parameters}
    return spread


def _option(name: str, annotation: Any, default: Any) -> inspect.Parameter:  # noqa: ANN401 (a type)
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, annotation=annotation, default=default)


@grouped
def inspect_data(
    *,
    given: FilesGiven,
    rows: RowsOption = None,
    roles: RolesGiven,
    out: OutOption = None,
    job: JobOption = None,
    force: ForceOption = False,
) -> None:
    """Says what is in files: columns, missing values, skew, label rate, and what to make of them.

    Each column gets a role (label, event time, numeric, categorical, sequence, id) and the reason
    for it; `--job` writes them down as a job, with comments. Reads the files once, and labels and
    times once more, in about 1 GiB of memory at most, whatever their size. Figures are exact up to
    262,144 different values of a column (fewer where there are over 50 columns); beyond,
    they are estimates, marked ~ and with their error.

    Pictures need matplotlib (`pip install 'penstock[plots]'`).

    **Examples**

        penstock data inspect clicks.parquet
        penstock data inspect 'day_*.gz' --format tsv --columns 'label,I{1..13},C{1..26}'
        penstock data inspect clicks.parquet --job clicks.yaml --out pictures
        penstock data inspect clicks.parquet --job clicks.yaml --item article_id,category_id
        penstock train clicks.yaml
    """
    from penstock.data.output import free_path, whole_file
    from penstock.report.data_survey import survey_tables
    from penstock.report.display import show, stages
    from penstock.survey.survey import survey_data

    files, source = given.files, _source(given)
    written = []
    with ExitStack() as outputs:
        if job is not None:
            part = outputs.enter_context(whole_file(job, reads=files, overwrite=force))
        for picture in () if out is None else (out / _RATE, out / _SKEW):
            free_path(picture, reads=files, overwrite=force)
        with stages() as progress:
            survey = survey_data(
                source,
                max_rows=rows,
                label=roles.label,
                items=_names(roles.item) or (),
                event_time=roles.event_time,
                progress=progress,
            )
        if out is not None:
            written += _draw(survey, out)
        if job is not None:
            part.write_text(_job_text(survey, job, files), encoding="utf-8")
            written.append(f"job {job}; next: penstock train {shlex.quote(str(job))}")
    # After the files: nobody may be reading any more.
    for shown in (*survey_tables(survey), *written):
        show(shown)


def plan_data(
    job: Annotated[
        str,
        typer.Argument(metavar="JOB", help="A YAML file, or module:function.", show_default=False),
    ],
    *,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Changes a field of the job; repeatable."),
    ] = None,
) -> None:
    """Says what a job will read: windows, files, bytes, extents and rows, in the order of reading.

    Lists the files, and reads what they say of themselves, but no row: rows of text are unknown
    ("?") until they are read. A window without a file is shown, too.

    **Examples**

        penstock data plan job.yaml
        penstock data plan job.yaml --set data.source.streams.0.end=2026-02-01
    """
    from penstock.data.columns.schema import default_text_types
    from penstock.data.opening import open_source
    from penstock.data.windows.planned import planned
    from penstock.job_file import load_job
    from penstock.report.data_survey import plan_table
    from penstock.report.display import show, stages

    read = load_job(job, changes or ())
    with stages() as begin:
        advance = begin("what files say of themselves")
        plan = list(planned(open_source(read.data.source, default_text_types(read)), advance))
    show(plan_table(plan))


def audit_data(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run folder, or a checkpoint.", show_default=False),
    ],
    *,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="PATH=VALUE", help="Where the data is by now: data.source.path=..."
        ),
    ] = None,
) -> None:
    """Says what became of every row that a run has read, and counts them anew in its files.

    Read = applied + filtered + quarantined, and the files, as far as the newest checkpoint has
    come, must have as many rows. Files are compared with what they were when they were read; rows
    of text are counted by reading them. Of streams that grow, the windows at hand are counted, and
    those behind are not looked for. An error where something was lost, or read twice.

    **Examples**

        penstock data audit runs/first
        penstock data audit runs/first --set data.source.path=/mnt/logs
    """
    from penstock.job_file import override
    from penstock.report.data_survey import audit_table
    from penstock.report.display import show, stages
    from penstock.training.trained import audit_run

    with stages() as begin:
        found = audit_run(run, begin, lambda fields: override(fields, changes or ()))
    show(audit_table(found))
    if not found.is_right:
        raise DataError(
            f"{run}: rows were lost or read twice: the files have {found.in_files:,} up to the "
            f"position, which says {found.said:,}"
        )


def _source(given: FilesGiven) -> AnyFileSource:
    """The configuration of the source that the arguments describe."""
    from penstock.config import FILE_FORMATS, FILE_SOURCES, format_of_path

    files, file_format, columns = given.files, given.file_format, given.columns
    known = ", ".join(FILE_FORMATS)
    if file_format is not None and file_format not in FILE_FORMATS:
        raise ConfigError(f"--format {file_format!r}: no format of files; give one of {known}")
    found = {path: format_of_path(path) for path in files}
    if file_format is None:
        unknown = next((path for path, one in found.items() if one is None), None)
        if unknown is not None:
            raise ConfigError(f"{unknown}: no format is known by this name; give --format {known}")
        if len(set(found.values())) > 1:
            raise ConfigError(
                f"files of several formats ({', '.join(sorted(map(str, set(found.values()))))}): "
                "inspect those of one format at a time"
            )
    chosen = file_format or found[files[0]]
    kind = next(kind for kind in FILE_SOURCES if chosen in kind.endings.values())
    fields: dict[str, Any] = {
        "format": chosen,
        "path": files[0] if len(files) == 1 else tuple(files),
        "partitions": _partitions(given.partitions),
    }
    if columns is not None:
        if "columns" not in kind.model_fields:
            message = f"--columns: {chosen} files name their columns themselves; leave it out"
            raise ConfigError(message)
        fields["columns"] = _names(columns)
    return cast("AnyFileSource", kind.model_validate(fields))


def _partitions(given: Sequence[str] | None) -> dict[str, str]:
    """Types by name, as a job has them."""
    from penstock.config import PartitionType

    types: dict[str, str] = {}
    for one in given or ():
        name, _, kind = one.partition("=")
        if not name or "/" in name or kind not in get_args(PartitionType) or name in types:
            raise ConfigError(
                f"--partition {one!r}: write NAME=TYPE once for each name, as in region=string; "
                f"types are {', '.join(get_args(PartitionType))}"
            )
        types[name] = kind
    return types


def _names(given: str | None) -> tuple[str, ...] | None:
    return None if given is None else tuple(name.strip() for name in given.split(","))


def _draw(survey: Survey, folder: Path) -> list[str]:
    from penstock.report.plots import MISSING, can_draw
    from penstock.report.skew_plots import draw_label_rate, draw_skew

    if not can_draw():
        return [MISSING]
    written = []
    if survey.rate is not None:
        name = str(survey.roles.label)
        written.append(draw_label_rate(survey.rate, name, folder / _RATE))
    keys = survey.roles.named("categorical", "sequence", "id")
    if keys:
        values = {name: survey.profile[name].values for name in keys}
        written.append(draw_skew(values, folder / _SKEW, "accesses"))
    return [f"picture {file}" for file in written]


def _job_text(survey: Survey, path: Path, files: Sequence[str]) -> str:
    from penstock.config import parse_job
    from penstock.job_file import parse_yaml
    from penstock.survey.job_draft import draft_job

    text = draft_job(survey, shlex.join(["penstock", "data", "inspect", *files]), path)
    parse_job(parse_yaml(text, str(path)), str(path))
    return text


@dataclass(frozen=True)
class HistoryFile:
    """What is written."""

    out: Annotated[Path, typer.Option(help="Parquet file to write.")]
    force: ForceOption = False


@grouped
def add_history(
    context: typer.Context,
    *,
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Files, directories or globs.")
    ],
    by: Annotated[str, typer.Option(help="Column that says whose history it is (user_id).")],
    of: Annotated[
        list[str], typer.Option(help="Column whose values are gathered (item_id); repeatable.")
    ],
    order: Annotated[str, typer.Option(help="Column of the time: integers, timestamps or dates.")],
    target: HistoryFile,
    last: Annotated[int, typer.Option(min=1, max=10_000, help="Longest history.")] = 50,
    partitions: PartitionsOption = None,
) -> None:
    """Adds to each row of a log what its user did before, as a column of lists.

    Writes all columns and, for each --of, NAME_history: its values in the last rows of the same
    --by before this one, oldest first; never the row's own. Rows are written in order of time;
    rows of one time count in the order of the files. A row without a --by value has an empty
    history and is in no other.

    Memory: the columns named here and about 45 bytes a row; all columns where the rows are not in
    order of time.

    **Examples**

        penstock data history clicks.parquet --by user --of item --order time --out seq.parquet
        penstock data history day.orc --by user --of item --of shop --order time --out seq.parquet
    """
    from penstock.data.history import HistoryColumns, write_history
    from penstock.report.display import stages

    context.obj.output.failed = ignored
    columns = HistoryColumns(by=by, of=tuple(of), order=order, last=last)
    with stages() as begin:
        advance = begin("the log twice")
        rows = write_history(
            files,
            columns,
            target.out,
            partitions=_partitions(partitions),
            overwrite=target.force,
            progress=lambda done, total: advance(done, done / total),
        )
    say(f"{rows:,} rows: {target.out}")


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


@dataclass(frozen=True)
class SyntheticColumns:
    """Columns of a synthetic log."""

    num_categorical: Annotated[int, typer.Option(min=1, help="Columns c0, c1, ...")] = 8
    num_numeric: Annotated[int, typer.Option(min=0, help="Columns n0, n1, ...")] = 4
    keys_per_feature: Annotated[
        int, typer.Option(min=1, help="Different ids of each categorical column.")
    ] = 100_000


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
