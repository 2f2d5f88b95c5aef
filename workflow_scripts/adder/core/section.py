"""What every part of the settings is made of. Light to import: the workflow is parsed with it."""

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, model_validator

Auto = Literal["auto"]


class Section(BaseModel):
    """A part of the settings; unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

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
