"""Root class and number types of all configuration."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from penstock.config.explain import explain

PositiveInt = Annotated[int, Field(gt=0, le=2**63 - 1)]
Threads = Annotated[int, Field(gt=0, le=1024)]
Width = Annotated[int, Field(gt=0, le=1 << 16)]
"""Outputs of a layer."""
Repeats = Annotated[int, Field(gt=0, le=256)]
"""Of a part of a model."""
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class Config(BaseModel):
    """Base of all configuration: frozen, no unknown keys, errors as `ConfigError`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise explain(error, type(self), fields) from None

    # Without this mark pydantic would call __init__ for nested fields, and their errors would lose
    # their path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]
