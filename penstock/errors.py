"""Every error that Penstock raises on purpose.

A message names the thing, the value and the remedy. `ConfigError`, `DataError` and
`CheckpointError` are the user's to
mend; `CapacityError`, `BatchError` and `NonFiniteError` come up while training.
"""

import signal


class PenstockError(Exception):
    """Base of all of them; the command line prints its text and exits with 2."""

    is_known_to_all = False
    """Over ranks: whether every one has heard of it, at the same place, and can still take part in
    what all of them do together.
    """


class CoreError(PenstockError, ImportError):
    """The C++ core is not built, or is not that of the package's sources."""


class ConfigError(PenstockError, ValueError):
    """A job or a constructor argument is wrong."""


class DataError(PenstockError, ValueError):
    """An input file, column or value is wrong."""


class CheckpointError(PenstockError, RuntimeError):
    """A checkpoint is missing, damaged, of another job, or could not be written."""


class CapacityError(PenstockError, MemoryError):
    """A store cannot hold another row, or there is no memory for what a call needs on its way."""


class PartialUpdateError(CapacityError):
    """Memory ran out when a part of the rows had taken the step already; the message says which."""


class ListingError(DataError):
    """A folder cannot be listed; it may be another time."""


class MalformedRowError(DataError):
    """A row that cannot be read, where such rows are not left out."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; mend the file or set data.source.on_malformed_row: quarantine")
        self.what = what
        """Without the remedy."""


class TooManyMalformedError(DataError):
    """More malformed rows were left out than `data.most_malformed` allows."""

    # Positions count the rows of all ranks, so that all stop before the same batch.
    is_known_to_all = True


class EventError(PenstockError, ValueError):
    """An event, or a quantity of one, that the registry of events does not know."""


class GroupError(PenstockError, RuntimeError):
    """Ranks of a process group are at different calls, or one is gone; the message says which."""


class FailedElsewhere(GroupError):
    """Another rank could not do its part, and says why. Nothing was updated."""

    is_known_to_all = True
    is_whole = True


class CheckpointFailedElsewhere(FailedElsewhere, CheckpointError):
    """Another rank could not do its part of a checkpoint, and says why."""


class StaleExportError(PenstockError, RuntimeError):
    """Rows or counts changed while they were exported."""


class BatchError(PenstockError, RuntimeError):
    """Something raised while a batch was computed; the message names the batch and the place."""

    def __init__(self, message: str, *, is_whole: bool = True) -> None:
        super().__init__(message)
        self.is_whole = is_whole
        """Whether nothing was updated yet, so that training can go on from where it is."""


class NonFiniteError(PenstockError, ArithmeticError):
    """A loss or gradient is NaN or infinite; the message names the batch's position."""


class DivergedElsewhere(FailedElsewhere, NonFiniteError):
    """A loss or gradient of another rank is not finite, which says of which rows."""


class JobNote(UserWarning):
    """What the author of a job should know though it is no error: a field that has moved, say."""


class Interrupted(BaseException):
    """A signal asks to stop. No `Exception`, so that nobody takes it for a fault."""

    def __init__(self, number: int, *, is_repeated: bool = False) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_status = 128 + number
        """As shells count."""
        self.is_repeated = is_repeated
        """Whether another one had come before, so that there is no time to save anything."""
