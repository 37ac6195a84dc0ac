"""Root class and number types of all configuration."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from penstock.config.explain import explain

PositiveInt = Annotated[int, Field(gt=0, le=2**63 - 1)]
Threads = Annotated[int, Field(gt=0, le=1024)]
Width = Annotated[int, Field(gt=0, le=1 << 16)]
"""Outputs of a layer."""
Repeats = Annotated[int, Field(gt=0, le=256)]
"""Of a part of a model."""
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
MAY_CHANGE = Field(json_schema_extra={"may_change_on_resume": True})
"""Mark of a field that a resumed run may change, with all that is in it. What is not marked must
stay: it gives a row, a weight or a position in the input its meaning.
"""


class Config(BaseModel):
    """Base of all configuration: frozen, no unknown keys, errors as `ConfigError`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise explain(error, type(self), fields) from None

    @model_validator(mode="before")
    @classmethod
    def _flags_are_no_numbers(cls, given: Any) -> Any:
        # To Python true is 1.
        for name, field in cls.model_fields.items() if isinstance(given, Mapping) else ():
            value = given.get(name)
            if isinstance(value, bool) and _takes_numbers(field.annotation):
                raise ValueError(f"{name}: expected a number, got {str(value).lower()}")
        return given

    # Without this mark pydantic would call __init__ for nested fields, and their errors would lose
    # their path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def changeable_fields(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Globs of the dotted paths of all fields marked `MAY_CHANGE`, of members of unions too."""
    found = []
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        marks = field.json_schema_extra
        if isinstance(marks, dict) and marks.get("may_change_on_resume"):
            found += [path, f"{path}.*"]
            continue
        for inner, is_item in _models_of(field.annotation):
            found += changeable_fields(inner, f"{path}.*." if is_item else f"{path}.")
    return list(dict.fromkeys(found))


def _takes_numbers(annotation: Any) -> bool:
    """Whether an annotation has numbers; none of these takes true and false besides."""
    return bool({int, float} & {annotation, *_parts(annotation)})


def _parts(annotation: Any) -> Iterator[Any]:
    """What an annotation is made of, outside of lists."""
    for part in get_args(annotation) if get_origin(annotation) is not tuple else ():
        if isinstance(part, Hashable):
            yield part
        yield from _parts(part)


def _models_of(annotation: Any, is_item: bool = False) -> list[tuple[type[BaseModel], bool]]:
    """Configuration classes in an annotation, and whether they lie in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, is_item)]
    in_list = is_item or get_origin(annotation) is tuple
    return [pair for part in get_args(annotation) for pair in _models_of(part, in_list)]
