"""What every part of the settings is made of. Light to import: the workflow is parsed with it."""

from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator

Auto = Literal["auto"]


class Section(BaseModel):
    """A part of the settings; unknown keys are mistakes, true and false are no numbers, and numbers are finite."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _off(cls, values: Any) -> Any:
        """YAML reads a bare `off` as false: where "off" is among a setting's values, that is what is meant."""
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        return {
            key: "off" if value is False and key in fields and "off" in get_args(fields[key].annotation) else value
            for key, value in values.items()
        }

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would read true as 1 where a number is expected."""
        found = next((one for one in (value if isinstance(value, list) else [value]) if isinstance(one, bool)), None)
        if found is not None and info.field_name is not None:
            types = _plain_types(cls.model_fields[info.field_name].annotation)
            if types & {int, float} and not types & {bool, Any}:
                raise ValueError(f"should be a number, not {str(found).lower()}")
        return value


def _plain_types(annotation: Any) -> set[Any]:
    """The types that an annotation such as `list[int] | None` is made of; the values of a Literal are none."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _plain_types(inner[0])
    if origin is None:
        return {annotation}
    return set() if origin is Literal else set[Any]().union(*map(_plain_types, inner))
