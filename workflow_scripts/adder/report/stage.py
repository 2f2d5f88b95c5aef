"""The stage "report": one page a run, the cards of data and model, the same figures as JSON."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from adder.core.section import Section
from adder.core.stage_spec import Memory, StageSpec
from adder.evaluation.metrics import smallest_differences

if TYPE_CHECKING:
    Compared = str
else:
    Compared = Literal[tuple(smallest_differences())]  # pydantic refuses any other name, and the schema lists them


class Report(Section):
    """The report."""

    title: str | None = None
    """Title of the report; the run's name without it."""
    price_per_hour: float | None = Field(default=None, ge=0)
    """What an hour of this machine costs; the report then states the run's price."""
    currency: str = "EUR"
    """Currency of all prices."""
    price_per_kwh: float | None = Field(default=None, ge=0)
    """What a kWh costs; where the machine tells the run's energy, the report then states its price."""
    co2_per_kwh: float | None = Field(default=None, ge=0)
    """Grams of CO₂ that a kWh stands for where you are; the report then states the run's, likewise."""
    smallest_difference: dict[Compared, Annotated[float, Field(ge=0)]] = Field(default_factory=smallest_differences)
    """The smallest difference between two models that matters, by score (shares from 0 to 1, `loss` in nats a token;
    `task`: of shares in tasks); a smaller one is neither better nor worse. Scores that aren't named keep 0.01."""

    @field_validator("smallest_difference")
    @classmethod
    def _of_all_scores(cls, given: dict[str, float]) -> dict[str, float]:
        return smallest_differences() | given


class TaskLimit(Section):
    """A task of the run, and how far its score may fall."""

    task: str
    max_drop: float | None


class ResolvedSetting(Section):
    """A setting that a run has use for: path, value, and whether that is the default, the file's or the run's own."""

    key: str
    value: Any
    origin: str


class ReportSettings(Report):
    """What the report is told of the run, beside what its stages left."""

    run: str
    """The run's name."""
    tasks: list[TaskLimit]
    """The tasks of `evaluate.tasks`, in order."""
    resolved: list[ResolvedSetting]
    """Every setting, but those of the machine."""
    stages: dict[str, str]
    """The keys of the run's stages, by the name under which the report knows them."""
    shows: dict[str, dict[str, str]]
    """What each of these stages shows: the files by name, as its declaration has them."""


def spoken(verdict: Mapping[str, Any]) -> str:
    """The verdict's word for a line of the terminal, with what stands against a good one."""
    care = ", to be read with care" if verdict["verdict"] == "better" and verdict.get("doubts") else ""
    return f"{verdict['verdict']}{care}"


REPORT = StageSpec(
    name="report",
    rule="write_report",
    run="adder.report.run",
    settings=ReportSettings,
    message="Writing the report",
    result=lambda found: f"the verdict: {spoken(found)}",
    reads={},  # everything of every stage of the run: see stage_graph
    minutes=10,
    memory=Memory(base_mb=1000),
)
