"""THE STORY: what a run does, from the job to the summary.

`train` is the main path; `evaluate` and `predict` use what it left behind. How a step works is in
`training/steps/step.py`, what a checkpoint holds in `training/checkpoint/checkpoint.py`, how
batches come about in `data/dataset.py`, where rows live in `embedding/collection/collection.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from penstock.config import Job, lasts_to_the_end
from penstock.data.dataset import Dataset
from penstock.data.output import whole_file
from penstock.errors import (
    BatchError,
    CheckpointError,
    DataError,
    FailedElsewhere,
    Interrupted,
    MalformedRowError,
    NonFiniteError,
    PenstockError,
)
from penstock.interruption import Interruption, interruption
from penstock.job_file import override
from penstock.position import Position
from penstock.ranks.group import ALONE, Group, refuse_ranks_left_out
from penstock.ranks.share import Share
from penstock.ranks.table_totals import over_ranks
from penstock.ranks.together import from_first, summed, together
from penstock.ranks.watch import Watch
from penstock.report.display import say, stages
from penstock.report.environment import peak_memory_bytes
from penstock.report.folder import RunFolder, files_of_run
from penstock.report.rank_report import held, report_of
from penstock.report.run_report import Report
from penstock.training.beginning import beginning_of, newest_of_all
from penstock.training.checkpoint.best import OF_CHECKPOINTS, OF_STOPPING, best_values
from penstock.training.checkpoint.checkpoint import Checkpoints
from penstock.training.evaluation import Evaluator, scored
from penstock.training.planned import planned_samples, planned_steps
from penstock.training.prediction import write_scores
from penstock.training.pretrained import load_pretrained
from penstock.training.setup import Untrained, build
from penstock.training.steps.feed import Fed, Feed, origin_of, steps_of
from penstock.training.steps.finite import Flag
from penstock.training.steps.forward_state import ForwardState
from penstock.training.steps.profile import Profile
from penstock.training.steps.progress import Progress
from penstock.training.steps.step import Clock, Training, steps_s, train_step
from penstock.training.trained import begin_from, open_trained


def train(
    job: Job,
    out: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    stop: Interruption | None = None,
    group: Group = ALONE,
    profile: int | None = None,
) -> dict[str, Any]:
    """Trains a job to its end, evaluates it, and leaves checkpoint and summary in `out`.

    Over several ranks each of them calls it, with the same job and folder; the first one writes the
    folder and the terminal.

    SIGINT, SIGTERM or SIGHUP stops after the current step, or while waiting for data or evaluating,
    with a complete checkpoint; a second one leaves at once.

    Args:
      job: what to run.
      out: the run folder; new or empty, unless `resume`.
      resume: go on from the newest checkpoint in `out`. The result has the same bits as that of a
        run that was never stopped.
      console: where to print; None: the standard output, as far as it takes words.
      stop: what signals do; None: they are handled while this runs.
      group: the ranks that train it together.
      profile: how many steps are traced, see `Profile`; of the first rank.

    Returns:
      The content of summary.json, on every rank.

    Raises:
      ConfigError, DataError: the job, the folder or the data is wrong.
      CheckpointError: there is no checkpoint to resume from, or it is damaged or of another job.
      NonFiniteError: the loss became NaN or infinite; checkpoints written before stay good.
      BatchError: the model raised; unless an update was half done, there is a checkpoint of the
        state before that batch.
      Interrupted: a signal stopped the run.
      FailedElsewhere: another rank failed, and says why.
      GroupError: another rank is gone.
    """
    with (
        nullcontext(stop) if stop is not None else interruption() as stop,
        open_run(job, out, resume=resume, console=console, stop=stop, group=group) as run,
    ):
        run.begin(resume)
        with stop.deferred(), run.kept():
            _train_to_the_end(run, job, stop, profile)
        return run.finish()


def _train_to_the_end(run: Run, job: Job, stop: Interruption, profile: int | None) -> None:
    if run.state.step and run.is_due(job.evaluation.every_steps):
        run.evaluate()  # which a signal cut short; otherwise it is there
    with run.remaining_batches() as batches:
        fed = run.clock.waiting_for(batches, stop, lambda: batches.idle_s)
        steps = islice(steps_of(fed, job.training.accumulate_batches), run.steps_left())
        for group in run.profiled(run.watch.in_step(steps, stop), profile):
            if run.begins_epoch(group) and job.evaluates_epochs:
                run.evaluate()
            if run.is_stopped_early():
                break
            run.step(group)
            if run.is_due(job.report.every_steps):
                run.log()
            if run.is_due(job.evaluation.every_steps):
                run.evaluate()
            if run.is_due(job.checkpoint.every_steps):
                run.save()
            if run.group.size == 1:
                stop.check()  # or else all ranks hear of it at the next step
        else:
            run.reach(batches.end)
    run.log()
    run.save()
    run.evaluate()
    run.save()  # what the evaluation changed of what is kept


def evaluate(path: Path, data: str | None = None, sets: Sequence[str] = ()) -> dict[str, Any]:
    """Measures the newest checkpoint of a run.

    Args:
      path: a run folder, or one of its checkpoints.
      data: files to measure on, all rows; None: the job's held-out part.
      sets: overrides of the job, as of `load_job`: what is measured, and on what.

    Returns:
      Metrics by name, see `training.evaluation.evaluate_batches`; `quarantined_rows` where rows
      were left out.

    Raises:
      CheckpointError: there is no checkpoint, or it is damaged.
      ConfigError: nothing is held out and no data is given, or `sets` changes what was trained.
      DataError: the data does not fit the job.
    """
    trained = open_trained(path, data, change=lambda fields: override(fields, sets))
    with trained.batches() as batches:
        metrics = trained.evaluator.measure(batches)
    if trained.dataset.quarantined_rows:
        metrics["quarantined_rows"] = trained.dataset.quarantined_rows
    return metrics


def predict(
    path: Path, data: str, out: Path, *, has_label: bool = True, overwrite: bool = False
) -> int:
    """Scores every row of `data` with the newest checkpoint of a run, into a Parquet file.

    Args:
      path: a run folder, or one of its checkpoints.
      data: files to score; the label column may be missing.
      out: the file to write, see `write_scores`; it appears when it is complete.
      has_label: False: text without a header lacks the label column.
      overwrite: whether `out` may exist.

    Returns:
      Number of rows written.

    Raises:
      CheckpointError, ConfigError, DataError: as `evaluate`; or `out` is read, exists or cannot
        be written.
    """
    with whole_file(out, reads=[data, *files_of_run(path)], overwrite=overwrite) as part:
        trained = open_trained(path, data, labels="optional" if has_label else "absent")
        with trained.batches() as batches:
            found = scored(batches, trained.model, trained.collection)
            try:
                return write_scores(found, trained.objective, trained.dataset.labels, part)
            except MalformedRowError as error:
                raise DataError(
                    f"{error.what}; mend the file or leave the row out of it: in a prediction each "
                    "row has its score"
                ) from None


@contextmanager
def open_run(
    job: Job,
    out: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    stop: Interruption | None = None,
    group: Group = ALONE,
) -> Iterator[Run]:
    """Builds everything that a training run needs; closes it on the way out.

    The folder is this run's alone meanwhile. Nothing is written to it before data, model and
    checkpoint were found to fit the job.
    """
    refuse_ranks_left_out(group)
    folder = RunFolder(out)
    with held(folder, job, group, partial(folder.refuse_unless_fit, job, resume=resume)):
        begun = beginning_of(job, folder.path, group, partial(say, console), resume=resume)
        with together(group, "open the data"), stages() as begin:
            kept_in, leads = folder.quarantine_file, group.rank == 0
            dataset = Dataset.open(
                job, quarantine=kept_in, writes_quarantine=leads, stages=begin, **begun._asdict()
            )
            steps = planned_steps(job, dataset, begin) if lasts_to_the_end(job) else None
        planned = partial(planned_samples, job, dataset)
        with closing(report_of(group, folder, job, planned, console)) as report:
            lanes = None if begun.after is None else len(begun.after.lanes)
            stop = stop or Interruption()
            made = build(job, dataset, steps, group=group, lanes=lanes)
            yield Run(job, dataset, folder, report, stop, made, group)


class Run:
    """A training run while it is open: what is trained, and what the loop can do with it."""

    def __init__(
        self,
        job: Job,
        dataset: Dataset,
        folder: RunFolder,
        report: Report,
        stop: Interruption,
        made: Untrained,
        group: Group,
    ) -> None:
        self.job = job
        self.dataset = dataset
        self.folder = folder
        self.report = report
        self.group = group
        self.state, self.trainer, self.objective, self.division = made
        model, tables = self.state.model, self.state.collection
        self.evaluator = Evaluator(
            dataset, model, self.objective, tables, job.evaluation, self.division
        )
        # What tells the ranks' readers of each other: of training, and of an evaluation.
        self._readers, self._evaluators = group.beside(), group.beside()
        self.checkpoints = Checkpoints(
            folder.checkpoints,
            job.checkpoint.keep_last,
            job,
            numeric=dataset.numeric,
            numeric_widths=dataset.numeric_widths,
            group=group,
        )
        self.clock = Clock()
        parts = model, self.objective, tables, self.trainer, self.division, self.clock
        self._training = Training(*parts, Flag(tables.device))
        self.progress = Progress(self.state, self._training)
        self._stop = stop
        self._forward = ForwardState(model, tables)
        self._is_whole = True
        """Whether the state is one between two steps."""
        self._began_s = time.monotonic()
        self._began_at = self.state.position
        self._is_saved = False
        self._share = Share(group, job.data.source.extents)
        self.watch = Watch(group, origin_of)

    def begin(self, resume: bool) -> None:
        """Starts at step 0 or, with `resume`, where the newest checkpoint ends."""
        config = self.job.training.init_from
        unmatched = [] if config is None or resume else begin_from(config, self.state)
        vectors = () if resume else self.job.training.pretrained
        loaded = load_pretrained(vectors, self.state.collection, self.dataset.transforms_of)
        if resume:
            self.checkpoints.restore(newest_of_all(self.folder.path, self.group), self.state)
            self.dataset.take_up_quarantine(self.state.position)
            self._is_saved = True
        self._began_at = self.state.position
        self.division.begin_run(self.state.step)
        self.report.start(self.state.step, self.state.position, self.progress.window_is_open)
        for line in unmatched:
            self.report.warn(f"training.init_from: {line}: begins with initial values")
        for one in loaded:
            self.report.tell("pretrained", self.state.step, one._asdict())

    def remaining_batches(self) -> Feed:
        """The batches from the current position to the end of the last epoch."""
        training = self.job.training
        self.dataset.keep_ledger(self.folder.ledger_file)
        loader = self.dataset.batches(
            "train",
            batch_size=training.batch_size,
            seed=training.seed,
            epochs=training.epochs,
            start=self.state.position,
            ranks=self._readers,
        )
        self.watch.is_waiting = lambda: loader.is_waiting
        self.dataset.tell_of_waits(
            lambda text: self.report.tell("waiting", self.state.step, {"text": text})
        )
        self.dataset.tell_of_left_out(self.report.warn)
        return Feed(loader, self.state.collection)

    def profiled(self, steps: Iterator[list[Fed]], number: int | None) -> Iterator[list[Fed]]:
        """The same steps, so many of which are traced on the first rank; None: none is."""
        if number is None or self.group.rank:
            return steps
        tell = partial(self.report.tell, "profile")
        profile = Profile(number, self.folder.path, self.clock, self.report.warn)
        return profile.of(steps, self.state, tell)

    def steps_left(self) -> int | None:
        """Steps until `max_steps`; None where the data alone ends the run."""
        most = self.job.training.max_steps
        return None if most is None else max(0, most - self.state.step)

    def is_due(self, every_steps: int | None) -> bool:
        """Whether something that happens every so many steps happens after this one."""
        return every_steps is not None and self.state.step % every_steps == 0

    def begins_epoch(self, group: Sequence[Fed]) -> bool:
        """Whether batches are the first of another epoch than that of the steps before."""
        return self.state.step > 0 and group[0].batch.end.epoch != self.state.position.epoch

    def is_stopped_early(self) -> bool:
        """Whether evaluations have not become better for so long that training ends; tells so."""
        why = self._no_better()
        if why is not None:
            self.report.tell("stopped_early", self.state.step, {"text": why})
        return why is not None

    def _no_better(self) -> str | None:
        stopping, best = self.job.training.early_stopping, self.state.best.get(OF_STOPPING)
        return None if stopping is None or best is None else best.no_better(stopping.patience)

    def step(self, group: Sequence[Fed]) -> None:
        """Trains on the batches of one step and moves on; a GPU may still be at it."""
        before, self._is_whole = self.progress.place(), False
        self._forward.keep()
        try:
            result = train_step(self._training, [fed.there for fed in group], before.step)
        except (BatchError, FailedElsewhere) as error:
            if error.is_whole and self._forward.is_complete:
                self._forward.put_back()
                self._is_whole = True
            raise
        for fed in group:
            self._share.add(fed.batch.batch_size)
        self.progress.begun(before, group, result)
        self._is_saved = False
        self.progress.settle(all_steps=False)
        self._is_whole = True
        self.report.advance(self.state.step, self.state.position.samples)

    def reach(self, end: Position | None) -> None:
        """Moves on to the end of the data: behind the last batch all rows may be left out."""
        if end is not None and end != self.state.position:
            self.state.position = end
            self._is_saved = False

    def log(self) -> None:
        """Records the metrics of the steps since the last log: each batch before its update."""
        self.progress.settle()
        state, window = self.state, self.progress.window()
        if window is None:
            return
        self._is_saved = False
        values = {
            **window,
            "samples": state.position.samples,
            "learning_rate": self.trainer.learning_rate(state.step - 1),
            **self._state_values(),
        }
        self.report.tell("train", state.step, values)
        if (words := self._share.warning()) is not None:
            self.report.warn(words)

    def evaluate(self) -> None:
        """Measures the held-out part, unless there is none or it was measured at this step."""
        if not self.dataset.has_evaluation:
            return
        self.progress.settle()
        before = from_first(self.group, lambda: self.report.measured(self.state.step))
        if before is not None:
            self._compare(before)
            return
        with (
            self.clock.measure("evaluation", "evaluation"),
            self._stop.at_once() if self.group.size == 1 else nullcontext(),
            self.evaluator.held_out(self._evaluators) as batches,
        ):
            measured = self.evaluator.measure(self.watch.in_step(batches, self._stop))
        metrics = from_first(self.group, lambda: measured)
        self.report.tell("evaluation", self.state.step, metrics)
        self._compare(metrics)

    def _compare(self, metrics: Mapping[str, Any]) -> None:
        """Compares an evaluation with the best so far; the best one gets a checkpoint."""
        step = self.state.step
        new = {name: one for name, one in self.state.best.items() if one.measured != step}
        if new:
            is_best = {name: one.take(step, metrics) for name, one in new.items()}
            self._is_saved = False
            if is_best.get(OF_CHECKPOINTS):
                self.save()

    def save(self) -> None:
        """Writes a checkpoint, unless the newest one holds all this."""
        if not self._is_saved:
            self.progress.settle()
            with self.clock.measure("checkpoint", "checkpoint"):
                self.dataset.sync_quarantine()
                path = self.checkpoints.save(self.state)
            self._is_saved = True
            self.report.tell("checkpoint", self.state.step, {"path": str(path)})

    def finish(self) -> dict[str, Any]:
        """Ends a run that came to its end; one that finds nothing to do leaves it as it is."""
        summary, has_moved = self.summary(), self.state.position != self._began_at
        why_done = self.job.training.max_steps, self._no_better()
        return from_first(self.group, lambda: self.report.ended(summary, has_moved, *why_done))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Leaves a checkpoint also where a signal or an error ends the block.

        Unless a step is half done, what was trained is diverging, there is no time, or an error
        came before the first step: what is wrong may be in the job, which a checkpoint would fix.
        """
        try:
            yield
        except (Interrupted, PenstockError) as last:
            error = self._first_of(last)
            self.report.failed(self.state.step, error)
            if error is not last:
                raise error from None
            if isinstance(error, NonFiniteError | CheckpointError):
                raise
            if isinstance(error, Interrupted) and error.is_repeated:
                raise
            can_save = self._is_whole and self._all_are_here(error)
            if can_save and (self.state.step or isinstance(error, Interrupted)):
                self.save()
            if self.checkpoints.latest() is not None:
                self.report.stopped(self.state.step, is_whole=can_save)
            else:
                self.report.not_begun(self.state.step)
            raise

    def _first_of(self, error: Interrupted | PenstockError) -> Interrupted | PenstockError:
        """What ended the run: the error, or what a step that was still in flight had come to."""
        is_repeated = isinstance(error, Interrupted) and error.is_repeated
        if self._is_whole and not is_repeated and self._all_are_here(error):
            try:
                self.progress.settle()
            except NonFiniteError as earlier:
                return earlier
        return error

    def _all_are_here(self, error: Interrupted | PenstockError) -> bool:
        """Whether all ranks heard of an error at the same place; of signals they do."""
        return isinstance(error, Interrupted) or self.group.size == 1 or error.is_known_to_all

    def summary(self) -> dict[str, Any]:
        """What the run amounts to; `RunReport.finished` adds versions and hardware."""
        return {
            "steps": self.state.step,
            "samples": self.state.position.samples,
            **from_first(self.group, lambda: self.report.final_metrics(self.state.step)),
            "samples_per_s": self.progress.samples / max(steps_s(self.clock.seconds), 1e-9),
            "seconds": self.clock.seconds,
            "wall_s": time.monotonic() - self._began_s,
            **self._state_values(),
            "quarantined_rows": self.dataset.quarantined_rows,
            "peak_memory_bytes": summed(self.group, peak_memory_bytes()),
            "checkpoint": str(self.checkpoints.latest()),
            **best_values(self.state.best),
        }

    def _state_values(self) -> dict[str, Any]:
        """Sizes of the tables, and what became of the rows that were read."""
        return {
            "tables": over_ranks(self.group, self.state.collection.table_stats()),
            "counts": self.state.position.counts._asdict(),
            "rows_ahead_of_time": self.state.collection.row_clock.rows_ahead,
        }
