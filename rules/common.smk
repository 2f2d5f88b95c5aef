# The configuration, checked, and the stages that it needs. What a stage is made of is the package's business
# (adder/workflow/stage_graph.py); here it only becomes Snakemake's inputs and parameters.

import contextlib
import errno
import gc
import os
import signal
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.settings.types import SharedFSUsage

# What parsing and Snakemake's graph make stays: of a thousand runs a fifth of the time went into looking through it.
gc.set_threshold(200_000, 50, 50)

HERE = Path(str(workflow.current_basedir)).parent
try:
    import adder
except ImportError:
    sys.exit(f"adder: its Python package is not installed here: pip install -e {HERE}")
if (HERE / "workflow_scripts").is_dir() and not Path(adder.__file__).is_relative_to(HERE.resolve()):
    found = Path(adder.__file__).parents[2]
    sys.exit(f"adder: this Snakefile is of {HERE}, the package that is installed of {found}: pip install -e {HERE}")

from adder.core import file_lock
from adder.core.errors import UserError, system_errors_told
from adder.core.file_digests import FileDigests, canonical
from adder.core.files import read_json
from adder.core.display.text import printable
from adder.workflow import config_file, library_versions, requests, run_folder, slurm_job, slurm_queue, stage_graph
from adder.workflow import snakemake_options, unfinished_runs
from adder.workflow import settings as adder_settings
from adder.workflow.code_digest import closure
from adder.workflow.stages import SPECS
from adder.workflow.terminal import closing as terminal_closing
from adder.workflow.terminal import plan as terminal_plan

DEFAULT_CONFIG = "config/config.yaml"
# Whether another workflow has imported this one, with a configuration of its own (`module adder: … config: …`).
CONFIGURED = workflow.modifier.skip_configfile


@contextlib.contextmanager
def told_in_one_sentence(origin=""):
    """Let a mistake of the user's, and what the system refuses, end Snakemake with that one sentence, without the lines
    of the rules around it.
    """
    try:
        with system_errors_told():
            yield
    except UserError as error:
        sys.exit(printable(f"adder: {origin}{error}"))


def named(file):
    """A configuration's file as people name it."""
    return Path(file).relative_to(Path.cwd()) if Path(file).is_relative_to(Path.cwd()) else Path(file)


# Snakemake has read these, but takes the last of a key that stands twice without a word.
for file in [] if CONFIGURED else workflow.overwrite_configfiles:
    with told_in_one_sentence():
        config_file.read(named(file))

# A configuration file given on the command line stands alone; this one is the default, not a layer beneath it.
if not CONFIGURED and not workflow.overwrite_configfiles:
    with told_in_one_sentence():
        config_file.read(DEFAULT_CONFIG)

    configfile: DEFAULT_CONFIG


def tell(text):
    """Say something before the first job; the processes of single jobs parse this as well, and are silent."""
    if workflow.is_main_process:
        print(printable(f"adder: {text}"), file=sys.stderr)


def origin_of_configuration():
    """The files that the settings come from, as far as Snakemake tells, to lead a sentence on these."""
    if CONFIGURED:
        return "the module's config: "
    names = [str(named(file)) for file in workflow.configfiles]
    return " and ".join(names + ["--config"] * bool(workflow.config_settings.config)) + ": "


with told_in_one_sentence(origin_of_configuration()):
    GRAPHS = stage_graph.runs_of(config, tell)
SETTINGS = {run: graph.settings for run, graph in GRAPHS.items()}
RUNS = {run: graph.stages for run, graph in GRAPHS.items()}
RUNTIME = next(iter(SETTINGS.values())).runtime
RESULTS = RUNTIME.results
# Where that is, under the prefix that an importing workflow may give; Snakemake puts it before inputs and outputs only.
PLACE = Path(str(workflow.modifier.modify_path(f"{RESULTS}/.lock"))).parent
if workflow.is_main_process:
    with told_in_one_sentence():
        shared = workflow.storage_settings
        snakemake_options.refuse(
            sys.argv[1:],
            shared.default_storage_provider,
            SharedFSUsage.INPUT_OUTPUT in shared.shared_fs_usage,
            Path(RESULTS),
        )
# Each stage once, by its folder, however many runs share it; and a run that it is of.
STAGES = {stage.folder: stage for stages in RUNS.values() for stage in stages.values()}
terminal_plan.announce(RUNS, PLACE)
# Beside what Snakemake remembers: what isn't as it was made, or is of other things than the configuration's.
if workflow.is_main_process:
    with told_in_one_sentence():
        DIGESTS = FileDigests.of_results(PLACE, tell)
        for sentence in requests.ask_for_stages(PLACE, STAGES.values(), DIGESTS):
            tell(sentence)
RUN_OF = {stage.folder: run for run, stages in RUNS.items() for stage in stages.values()}
# Runs that may be refused in the end, because a task's score fell too far.
GUARDED = [run for run, settings in SETTINGS.items() if any(t.max_drop is not None for t in settings.evaluate.tasks)]
# More than any machine has: Snakemake scales it down to the cores that it is given.
ALL_CORES = 1024


def records_of(stages):
    """The records of stages by name. Of a stage and what it is made from the last one will do: a graph of a thousand
    runs is half as large."""
    return {name: f"{RESULTS}/{stage.folder}/stage.json" for name, stage in stage_graph.nearest(stages).items()}


def folders_of(stages):
    """The folders of stages below the results by name, as text that is equal for equal stages."""
    return canonical({name: stage.folder for name, stage in stages.items()})


wildcard_constraints:
    key="[0-9a-f]{12}",
    run="[^/]+",


def prepare():
    """Before the first job: have the results for this process alone, and say what other libraries have made.

    Dry runs, --lint, --dag, --summary and the like never get here. The lock is held until this process ends; the
    processes of single jobs work for the one that has it.
    """
    if not workflow.is_main_process:
        return
    on_slurm = workflow.executor_plugin.name == "slurm"
    try:
        with told_in_one_sentence():
            LOCK.append(file_lock.take(PLACE, "another Snakemake"))
        if on_slurm:
            prepare_slurm()
    except SystemExit:
        if on_slurm:
            workflow.scheduler._executor.shutdown()  # whose threads would complain, after the sentence
        raise
    at_once = 1 if workflow.local_exec else workflow.nodes
    terminal_plan.begin([path for job in workflow.dag.needrun_jobs() for path in job.output], at_once)
    if RUNTIME.upgrades == "say":
        records = [(stage.spec, PLACE / folder / "stage.json") for folder, stage in STAGES.items()]
        for sentence in library_versions.other_versions(records):
            print(f"adder: {sentence} (runtime.upgrades: rerun would run it anew)", file=sys.stderr)


LOCK = []


def on_start(action):
    """Call `action` when execution starts, also where another workflow has imported this one: Snakemake then heeds only
    the importing workflow's onstart, which may be defined before or after this."""

    def with_action(handler):
        return lambda log: (action(), handler(log))

    define = workflow.onstart
    workflow._onstart = with_action(workflow._onstart)
    workflow.onstart = lambda handler: define(with_action(handler))


on_start(prepare)
