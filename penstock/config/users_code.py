"""A user's own code: found by the name that a job gives, and what it raises when it is wrong."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from penstock.errors import ConfigError

USERS_CODE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What a user's code raises when it is wrong. Interrupts, exits and lack of memory pass through."""


def find_named(field: str, name: str) -> Any:
    """What `module:name` names.

    Args:
      field: of the job, for messages.
      name: of a module on the Python path, and of something in it.

    Raises:
      ConfigError: the module cannot be imported, or has no such thing.

    Effects: imports the module.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except USERS_CODE_ERRORS as error:
        raise ConfigError(
            f"{field} {name!r}: cannot import {module_name!r}: {described(error)}; "
            "is its folder on PYTHONPATH?"
        ) from error
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        raise ConfigError(
            f"{field} {name!r}: module {module_name!r} has no {attribute!r}"
        ) from error


def described(error: BaseException) -> str:
    """An error of a user's code, for messages."""
    return f"{type(error).__name__}: {error}"
