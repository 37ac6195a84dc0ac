"""Every error that Penstock raises on purpose.

A message names the thing, the value and the remedy. `ConfigError`, `DataError` and
`CheckpointError` are the user's to
mend; `CapacityError` and `NonFiniteError` come up while training.
"""


class PenstockError(Exception):
    """Base of all of them; the command line prints its text and exits with 2."""


class ConfigError(PenstockError, ValueError):
    """A job or a constructor argument is wrong."""


class DataError(PenstockError, ValueError):
    """An input file, column or value is wrong."""


class CheckpointError(PenstockError, RuntimeError):
    """A checkpoint is missing, damaged, of another job, or could not be written."""


class CapacityError(PenstockError, MemoryError):
    """A store cannot hold another row."""


class NonFiniteError(PenstockError, ArithmeticError):
    """A loss or gradient is NaN or infinite; the message names the batch's position."""


class JobNote(UserWarning):
    """What the author of a job should know though it is no error: a field that has moved, say."""
