# The configuration, checked, and the stages that it needs. What a stage is made of is the package's business
# (workflow_scripts/adder/plan.py); here it only becomes Snakemake's inputs and parameters.

import contextlib
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

SCRIPTS = Path(workflow.basedir) / "workflow_scripts"
sys.path.insert(0, str(SCRIPTS))

from adder.core.errors import UserError
from adder.workflow import config_file
from adder.workflow import lock as adder_lock
from adder.workflow import settings as adder_settings
from adder.workflow import stage_graph as adder_plan
from adder.workflow.code_digest import closure

DEFAULT_CONFIG = "config/config.yaml"


@contextlib.contextmanager
def told_in_one_sentence(origin=""):
    """Let a mistake of the user's end Snakemake with that one sentence, without the lines of the rules around it."""
    try:
        yield
    except UserError as error:
        sys.exit(f"adder: {origin}{error}")


def named(file):
    """A configuration's file as people name it."""
    return Path(file).relative_to(Path.cwd()) if Path(file).is_relative_to(Path.cwd()) else Path(file)


# Snakemake has read these, but takes the last of a key that stands twice without a word.
for file in workflow.overwrite_configfiles:
    with told_in_one_sentence():
        config_file.read(named(file))

# A configuration file given on the command line stands alone; this one is the default, not a layer beneath it.
if not workflow.overwrite_configfiles:
    with told_in_one_sentence():
        config_file.read(DEFAULT_CONFIG)

    configfile: DEFAULT_CONFIG


def runs_of_configuration():
    """Return the settings of the configuration's runs, and {run: {name: stage}}. Raises UserError for mistakes."""
    loaded = adder_settings.load(config)
    results = next(iter(loaded.values())).runtime.results
    digests = adder_plan.Digests(Path(results) / "cache" / "digests.json")
    runs = {}
    for run, settings in loaded.items():
        rows = adder_settings.resolved(settings, config, run)
        runs[run] = adder_plan.stages_of_run(run, settings, rows, Path.cwd(), digests)
        adder_plan.refuse_impossible(run, settings, runs[run], Path(results), Path.cwd())
    return loaded, runs


def origin_of_configuration():
    """The files that the settings come from, as far as Snakemake tells, to lead a sentence on these."""
    names = [str(named(file)) for file in workflow.configfiles]
    return " and ".join(names + ["--config"] * bool(workflow.config_settings.config)) + ": "


with told_in_one_sentence(origin_of_configuration()):
    SETTINGS, RUNS = runs_of_configuration()
RESULTS = next(iter(SETTINGS.values())).runtime.results
STAGES = {
    folder: stage for stages in RUNS.values() for last in stages.values() for folder, stage in last.family().items()
}
# Runs that may be refused in the end, because a task's score fell too far.
GUARDED = [run for run, settings in SETTINGS.items() if any(t.max_drop is not None for t in settings.evaluate.tasks)]
PAGES = ["report.html", "card.md", "metrics.json", "run.yaml"]
# Stages that compute take all cores that they are given, so that two of them never share a GPU or the cores.
ALL_CORES = 1024


wildcard_constraints:
    key="[0-9a-f]{12}",
    run="[^/]+",


def parents(name):
    """Input function: the records of a stage's parents, by the name under which it reads them."""

    def records(wildcards):
        stage = STAGES[f"stages/{name}/{wildcards.key}"]
        return {parent: f"{RESULTS}/{above.folder}/stage.json" for parent, above in stage.parents.items()}

    return records


def settings_of(name):
    """Parameter function: a stage's settings as canonical JSON, in which the order of the YAML's keys has no part."""

    def settings(wildcards):
        stage = STAGES[f"stages/{name}/{wildcards.key}"]
        return adder_plan.canonical({"settings": stage.settings, "identity": stage.identity})

    return settings


def finished(wildcards):
    """Input function: the records of what a run's folder is made of."""
    stages = RUNS[wildcards.run]
    names = [name for name in ("train", "merge", "report", "gguf") if name in stages]
    return {name: f"{RESULTS}/{stages[name].folder}/stage.json" for name in names}


def to_be_pushed(wildcards):
    """Input function: what stands before an upload."""
    folder = f"{RESULTS}/{wildcards.run}"
    return [f"{folder}/merged_model/config.json", *([f"{folder}/guard.json"] if wildcards.run in GUARDED else [])]


def uploads(wildcards):
    """Input function: one record a run that names a repository of the hub."""
    runs = [run for run, settings in SETTINGS.items() if settings.export.hub]
    if not runs:
        raise WorkflowError("push: no run says where to; set export.hub to owner/name")
    return expand(f"{RESULTS}/{{run}}/pushed.json", run=runs)


def record_of(name):
    """A stage's output: its record, written last."""
    return f"{RESULTS}/stages/{name}/{{key}}/stage.json"


def log_of(name):
    return f"{RESULTS}/logs/{name}/{{key}}.log"


def benchmark_of(name):
    return f"{RESULTS}/benchmarks/{name}/{{key}}.tsv"


def code_of(module):
    """The files of the package that a stage is made of: an edit to one of them runs the stage anew."""
    return [str(path) for path in closure(module)]


# Only what writes needs the results for itself: dry runs, --lint, --dag, --summary and the like never start. Held until
# this process ends. The processes of single jobs work for the one that has it.
LOCK = []


onstart:
    if workflow.is_main_process:
        with told_in_one_sentence():
            LOCK.append(adder_lock.take(Path(RESULTS)))
