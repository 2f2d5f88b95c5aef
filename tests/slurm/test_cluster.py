"""The workflow on a real Slurm, with the shipped profile. One run is disturbed in every way that a cluster has.

docs/cluster.md names these tests beside what it promises.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from adder.core.files import read_json
from adder.core.stage_spec import CLUSTER_CORES, Runtime
from adder.workflow import slurm_job
from adder.workflow.stages import SPECS
from slurm_cluster import ACCOUNT, NODES, was_sent
from slurm_project import SlurmProject, Started, until

# The first of them waits for a whole run.
pytestmark = pytest.mark.timeout(1800)
# Some 320 steps, with a checkpoint at each: far from its end when the first is seen.
LONG = {"train": {"epochs": 80, "learning_rate": 2e-3}}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"account": "nobody"}, r"account nobody, .*nobody appears to be invalid. Available accounts: .*lab"),
        ({"partition": "short"}, r".*partition short, .*the partition gives a job 20 minutes at most"),
    ],
)
def test_what_slurm_cant_take_is_one_sentence_before_downloads(project, wrong, told):
    project.write_profile(**wrong)
    try:
        shown = project.start().ends(1).strip()
    finally:
        project.write_profile()
    assert re.match(rf"adder: Slurm can't take \w+ \({told}", shown.splitlines()[-1]), shown
    assert "Traceback" not in shown and not list((project.folder / "results").glob("stages/*/*"))
    assert not project.cluster.jobs()


CONTENDER = """
import os, sys, time
from pathlib import Path
from adder.core import file_lock
out, lets_go = Path(sys.argv[1]), Path(sys.argv[2])
file_lock.BEAT = 0.2
if len(sys.argv) > 3:
    file_lock.STALE, file_lock.WATCHED = 3.0, 1.5
def tell(text):
    with out.open("a") as file:
        file.write(f"{os.environ['SLURMD_NODENAME']} {text}\\n")
with file_lock.held(Path(f"{out}.lock"), lambda who: tell(f"waits for {who}")) as waited:
    tell("has it")
    while not lets_go.exists():
        time.sleep(0.1)
    tell("lets go")
"""


def _contend(project: SlurmProject, node: str, out: Path, *soon_stale: str) -> str:
    """Submit a job that holds out.lock until out.end exists; its number."""
    script = project.folder / "contender.py"
    script.write_text(CONTENDER)
    command = f"{sys.executable} {script} {out} {out}.end {' '.join(soon_stale)}"
    asked = ["sbatch", "--parsable", "-A", ACCOUNT, "-p", "cpu", "-w", node, "--no-requeue", "-o", f"{out}.{node}.log"]
    environment = project.environment
    done = subprocess.run([*asked, "--wrap", command], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _lines(out: Path) -> list[str]:
    return out.read_text().splitlines() if out.exists() else []


def test_of_two_nodes_one_works_on_a_stage_and_the_other_waits_for_it(project, tmp_path):
    """No lock of the kernel is in it, so it is the same where these don't reach from host to host."""
    out = tmp_path / "said"
    job = _contend(project, "node1", out)
    until(lambda: _lines(out), lambda: "holder")
    _contend(project, "node2", out)
    until(lambda: len(_lines(out)) == 2, lambda: "one who waits")
    Path(f"{out}.end").touch()
    until(lambda: len(_lines(out)) == 5, lambda: f"end of it: {_lines(out)}")
    said = _lines(out)
    assert said[0] == "node1 has it" and said[2:] == ["node1 lets go", "node2 has it", "node2 lets go"]
    assert re.fullmatch(rf"node2 waits for another process \(process \d+ on node1, Slurm job {job}\)", said[1])
    until(lambda: not list(tmp_path.glob("*.lock*")), lambda: "end of the lock")


def test_the_lease_of_a_lost_node_is_taken_over(project, tmp_path):
    out = tmp_path / "said"
    _contend(project, "node1", out, "soon stale")
    until(lambda: _lines(out), lambda: "holder")
    _contend(project, "node2", out, "soon stale")
    until(lambda: len(_lines(out)) == 2, lambda: "one who waits")
    try:
        project.cluster.lose_node("node1")
        Path(f"{out}.end").touch()
        until(lambda: len(_lines(out)) == 4, lambda: f"take-over: {_lines(out)}")
    finally:
        project.cluster.bring_node_back("node1")
    assert _lines(out)[2:] == ["node2 has it", "node2 lets go"]
    until(lambda: not list(tmp_path.glob("*.lock*")), lambda: "end of the lock")


PROGRESS = re.compile(r"^train: step \d+", re.MULTILINE)
WAITS = re.compile(r"^Slurm job (\d+) \(train_adapter \w+, pending: \w+\)$", re.MULTILINE)
PUT_BACK = "train: the job's time limit is near: it went back into the queue"


class Story(NamedTuple):
    """What became of one run to the report: what was shown, first by a Snakemake that was killed in its training."""

    killed: str
    shown: str
    jobs: list[str]  # Slurm's number of the training's job: at first, adopted, on the other node, after its limit
    nodes: list[str]
    seconds_left: float  # of its limit, when it had been told of it
    resumed: list[str]


@pytest.fixture(scope="module")
def story(project) -> Story:
    cluster = project.cluster
    first = project.start(config=LONG)
    first.until(lambda: project.checkpoints() and PROGRESS.search(first.shown), "a checkpoint, and its progress")
    begun = project.job("train_adapter")
    # What waits or stands still does so until it was looked at: nothing here is to be caught at the right moment.
    with cluster.closed("gpu"):
        with cluster.paused(begun["id"]):
            first.kill()
            second = project.start(config=LONG)
            second.until(lambda: "of an earlier start goes on" in second.shown, "the job was adopted")
            adopted = project.job("train_adapter")
            cluster.lose_node(adopted["node"])
        second.until(lambda: WAITS.search(second.shown), "it was told that it waits, and why")
    # A real cluster needs minutes to find a node lost. By then the lease of the process that was there is long old.
    for lease in (project.folder / "results").glob("stages/train/.*.lock*"):
        os.utime(lease, (0, 0))
    newest = _steps(project)
    second.until(lambda: _steps(project) > newest, "it went on on the other node")
    elsewhere = project.job("train_adapter")
    with cluster.closed("gpu"):
        with cluster.paused(elsewhere["id"]) as stages:
            limit = _give_three_minutes(project, elsewhere["id"])
            # Slurm looks for jobs that are near their limits every 30 seconds.
            second.until(lambda: any(was_sent(signal.SIGTERM, stage) for stage in stages), "it was told of its limit")
            left = limit - time.monotonic()
        second.until(lambda: PUT_BACK in second.shown, "it said that it went back into the queue")
        second.until(lambda: project.job("train_adapter").get("state") == "PENDING", "it was in the queue again")
        again = project.job("train_adapter")
        cluster.command("scontrol", "update", f"jobid={again['id']}", "timelimit=60")
    shown = second.ends(0)
    cluster.bring_node_back(adopted["node"])
    return Story(
        killed=first.shown,
        shown=shown,
        jobs=[job["id"] for job in (begun, adopted, elsewhere, again)],
        nodes=[job["node"] for job in (begun, adopted, elsewhere)],
        seconds_left=left,
        resumed=re.findall(r"^train: continuing from the checkpoint at step (\d+)", shown, flags=re.MULTILINE),
    )


def _steps(project: SlurmProject) -> int:
    return max((int(path.parent.name.partition("-")[2]) for path in project.checkpoints()), default=0)


def _give_three_minutes(project: SlurmProject, job: str) -> float:
    """Let a job's time limit be two to three minutes away; when that is, by time.monotonic()."""
    used = slurm_job.seconds(project.cluster.command("squeue", "-h", "-j", job, "-o", "%M"))
    assert used is not None
    minutes = int(used // 60) + 3
    project.cluster.command("scontrol", "update", f"jobid={job}", f"timelimit={minutes}")
    return time.monotonic() + minutes * 60 - used


def test_the_shipped_profile_with_account_and_partitions_runs_to_the_report(project, story):
    assert (project.folder / "results" / "default" / "report.html").exists()
    assert (project.folder / "results" / "default" / "merged_model" / "config.json").exists()
    until(lambda: not project.cluster.jobs(), lambda: "end of the jobs")


def test_each_stage_asks_for_what_it_declares(project, story):
    declared = {"format_data", "train_adapter", "merge_adapter", "evaluate_model", "write_report"}
    # Slurm's controller passes on to its accounting what has ended when it comes to it.
    until(lambda: declared <= project.asked().keys(), lambda: "account of every job")
    asked = project.asked()
    parameters = read_json(next((project.folder / "results").glob("stages/model/*/source.json")))["parameters"]
    specs = {spec.rule: spec for spec in SPECS.values() if not spec.local and spec.rule in asked}
    assert declared <= specs.keys()
    for rule, spec in specs.items():
        job, cores = asked[rule], spec.threads or CLUSTER_CORES
        assert (job["ReqCPUS"], job["cpu"]) == (str(cores), str(cores)), rule
        assert job["mem"] == f"{spec.megabytes(Runtime(), parameters)}M", rule
        assert job.get("gres/gpu") == ("1" if spec.gpu else None), rule
        assert job["Partition"] == ("gpu" if spec.gpu else "cpu") and job["Account"] == ACCOUNT
        if spec.name != "train":  # whose limit was changed here
            assert _minutes(job["Timelimit"]) == spec.minutes, rule


def _minutes(text: str) -> int:
    days, _, clock = text.rpartition("-")
    hours, minutes, _ = clock.split(":")
    return (int(days or 0) * 24 + int(hours)) * 60 + int(minutes)


def test_gpus_and_cpus_are_those_of_runtime(project, story):
    """More than a node here has, which is said at once."""
    config = {**LONG, "runtime": {"gpus": 4, "threads": 6}}
    shown = project.start("--forcerun", "train_adapter", config=config).ends(1)
    told = (
        r"can't take train_adapter \(.* 6 CPUs, 4 GPUs, 800\d MB, 1440 minutes\): Requested node configuration is not"
    )
    assert re.search(told, shown), shown


def test_a_rerun_adopts_the_running_job_of_a_killed_snakemake(story):
    assert story.jobs[0] == story.jobs[1]
    assert re.search(
        rf"Slurm job {story.jobs[0]} \(train_adapter \w+, runs on node\d\) of an earlier start goes on", story.shown
    )
    assert "train_adapter" not in "".join(re.findall(r"has been submitted with SLURM jobid .*", story.shown))


def test_the_job_of_a_lost_node_goes_on_on_another_from_its_checkpoint(story):
    assert story.jobs[2] == story.jobs[0] and {*story.nodes[1:]} == {*NODES}
    assert len(story.resumed) == 2 and int(story.resumed[0]) > 0


def test_at_its_time_limit_a_training_goes_back_into_the_queue_and_on_until_it_is_done(project, story):
    # More than KillWait, which every job is given.
    assert story.seconds_left > 30 and story.jobs[3] == story.jobs[0]
    assert PUT_BACK in story.shown
    assert int(story.resumed[1]) > int(story.resumed[0])
    assert project.train_record()["attempts"] == 3


def test_people_see_job_node_state_reason_log_and_progress(story):
    number = story.jobs[0]
    assert re.search(
        rf"^Slurm job {number} \(train_adapter \w{{12}}, runs on node\d\); log: /\S+/{number}\.log$", story.killed, re.M
    )
    assert number in WAITS.findall(story.shown)
    assert PROGRESS.search(story.killed) and re.search(r"^evaluate: done in ", story.shown, re.M)


def _training(project: SlurmProject) -> Started:
    """A start whose training is at work."""
    before = _steps(project)
    started = project.start("--forcerun", "train_adapter", config={"train": {**LONG["train"], "seed": 7}})
    started.until(lambda: _steps(project) > before, "a checkpoint")
    return started


def test_scancel_ends_the_run_with_a_checkpoint_and_no_new_job(project, story):
    started = _training(project)
    job = project.job("train_adapter")["id"]
    project.cluster.command("scancel", job)
    shown = started.ends(1)
    assert f"SLURM-job '{job}' failed, SLURM status is: 'CANCELLED" in shown and "back into the queue" not in shown
    until(lambda: not project.cluster.jobs(), lambda: "end of the job")
    assert project.checkpoints()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_snakemake_and_its_jobs(project, story, number):
    started = _training(project)
    os.kill(started.process.pid, number)
    shown = started.ends(1)
    assert "Traceback" not in shown
    until(lambda: not project.cluster.jobs(), lambda: "end of the job")
    assert not (project.folder / "results" / ".lock").exists() and project.checkpoints()
