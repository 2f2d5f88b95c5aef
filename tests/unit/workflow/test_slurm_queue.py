"""What is read of Slurm's queue and told of it. Slurm's commands are stood in for; tests/slurm asks the real ones."""

import asyncio
from pathlib import Path

import pytest

from adder.core.errors import UserError
from adder.workflow import slurm_queue
from adder.workflow.slurm_queue import QueuedJob, Wanted, Watch

WANTED = Wanted(rule="train_adapter", account="lab", partition="gpu", cpus=8, gpus=1, mb=None, minutes=60)
TRAIN = "rule_train_adapter_wildcards_0123456789ab"


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """Slurm's commands, each saying what it is told to; what they were asked is in `asked`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def let(command: str, text: str = "", status: int = 0, error: str = "") -> None:
        file = folder / command
        said = f"cat << 'END'\n{text}\nEND\n" if text else ""
        told = f"echo '{error}' >&2\n" if error else ""
        file.write_text(f'#!/bin/sh\necho "{command} $*" >> {tmp_path}/asked\n{said}{told}exit {status}\n')
        file.chmod(0o755)

    let.asked = lambda: (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    for command in ("squeue", "scancel", "sbatch", "sacct"):
        let(command)
    let("sinfo", "infinite")
    return let


def test_what_slurm_refuses_is_one_sentence(slurm):
    slurm("sbatch", status=1, error="sbatch: error: Batch job submission failed: Invalid qos specification")
    with pytest.raises(UserError) as told:
        slurm_queue.refuse_impossible("sbatch -p gpu --mem <TBD>", WANTED)
    assert str(told.value) == (
        "Slurm can't take train_adapter (account lab, partition gpu, 8 CPUs, 1 GPU, 60 minutes): Batch job submission "
        "failed: Invalid qos specification; set what your cluster has in the profile, or for this rule by "
        "--set-resources train_adapter:…"
    )
    assert slurm.asked().startswith("sbatch -p gpu --test-only --wrap=true")


def test_what_passes_by_itself_is_waited_for(slurm):
    slurm("sbatch", status=1, error="allocation failure: Required node not available (down, drained or reserved)")
    slurm_queue.refuse_impossible("sbatch", WANTED)


@pytest.mark.parametrize(("limit", "taken"), [("59:00", False), ("1:00:00", True), ("59:00\ninfinite", True)])
def test_more_time_than_a_partition_gives_is_refused(slurm, limit, taken):
    slurm("sinfo", limit)
    if taken:
        slurm_queue.refuse_impossible("sbatch", WANTED)
        return
    with pytest.raises(UserError, match="the partition gives a job 59 minutes at most"):
        slurm_queue.refuse_impossible("sbatch", WANTED)


def row(number: int, name: str, state: str, reason: str = "None", node: str = "", comment: str = TRAIN) -> str:
    return f"{number}|{name}|{state}|{reason}|{node}|{comment}"


def test_running_jobs_of_an_earlier_start_are_found_and_waiting_ones_cancelled(slurm):
    rows = [row(1, "adder-a-b", "RUNNING", node="n1"), row(2, "adder-a-b", "PENDING", "Priority", comment="rule_x")]
    rows += [row(3, "adder-a-b", "COMPLETED"), row(4, "adder-z-b", "RUNNING"), row(5, "other", "PENDING")]
    slurm("squeue", "\n".join(rows))
    found = slurm_queue.left_behind("adder-a-b", "adder-a-")
    assert {comment: job.id for comment, job in found.items()} == {TRAIN: "1"}
    assert "scancel 2\n" in slurm.asked()


def test_a_running_job_of_other_code_is_named(slurm):
    slurm("squeue", row(7, "adder-a-old", "RUNNING", node="n1"))
    with pytest.raises(UserError, match=r"Slurm job 7 \(train_adapter 0123456789ab, runs on n1\): .* by `scancel 7`"):
        slurm_queue.left_behind("adder-a-new", "adder-a-")


def test_a_queue_that_cant_be_asked_is_said(slurm):
    slurm("squeue", status=1, error="slurm_load_jobs error: Unable to contact slurm controller")
    with pytest.raises(UserError, match="squeue: slurm_load_jobs error: Unable to contact slurm controller"):
        slurm_queue.my_jobs()


def test_the_name_is_of_the_results_and_the_code(tmp_path):
    code = tmp_path / "code.py"
    code.write_text("1")
    name, prefix = slurm_queue.run_name(tmp_path / "results", [code])
    assert slurm_queue.run_name(tmp_path / "results", [code, code]) == (name, prefix) and name.startswith(prefix)
    assert slurm_queue.run_name(tmp_path / "other", [code])[1] != prefix
    code.write_text("2")
    changed, same = slurm_queue.run_name(tmp_path / "results", [code])
    assert changed != name and same == prefix


def test_all_jobs_of_a_name_are_cancelled_and_no_others(slurm):
    slurm("squeue", "\n".join([row(1, "mine", "RUNNING"), row(2, "mine", "FAILED"), row(3, "mine2", "RUNNING")]))
    slurm_queue.cancel_all("mine")
    assert slurm.asked().splitlines()[-1] == "scancel 1"


def test_people_see_state_reason_node_log_and_what_a_stage_says(slurm, tmp_path):
    told: list[str] = []

    def log(job: QueuedJob) -> Path:
        return tmp_path / f"{job.id}.log"

    watch = Watch("mine", log, ("train: ",), told.append, 1.0)
    slurm("squeue", row(5, "mine", "PENDING", "Resources"))
    watch.look()
    watch.look()  # nothing new
    slurm("squeue", row(5, "mine", "RUNNING", node="node1"))
    log(QueuedJob("5", "", "", "", "", "")).write_text("Building DAG\ntrain: step 1\ntrain: ste")
    watch.look()
    log(QueuedJob("5", "", "", "", "", "")).write_text("Building DAG\ntrain: step 1\ntrain: step 2\n")
    watch.look()
    # Put back into the queue, it begins its log anew; the plugin removes that as soon as all has gone well.
    log(QueuedJob("5", "", "", "", "", "")).write_text("train: step 3\n")
    watch.look()
    with log(QueuedJob("5", "", "", "", "", "")).open("a") as file:
        file.write("train: done\n")
    log(QueuedJob("5", "", "", "", "", "")).unlink()
    slurm("squeue", row(5, "mine", "COMPLETED", node="node1"))
    watch.look()
    watch.look()
    assert told == [
        "Slurm job 5 (train_adapter 0123456789ab, pending: Resources)",
        f"Slurm job 5 (train_adapter 0123456789ab, runs on node1); log: {tmp_path}/5.log",
        "train: step 1",
        "train: step 2",
        "train: step 3",
        "Slurm job 5 (train_adapter 0123456789ab, completed)",
        "train: done",
    ]


def test_a_job_that_would_wait_for_ever_is_cancelled(slurm, tmp_path):
    told: list[str] = []
    watch = Watch("mine", lambda job: tmp_path / "none", (), told.append, 1.0)
    slurm(
        "squeue",
        row(5, "mine", "PENDING", "PartitionConfig") + "\n" + row(6, "mine", "PENDING", "QOSMaxJobsPerUserLimit"),
    )
    watch.look()
    assert told[1] == "Slurm job 5 would wait for ever (PartitionConfig): cancelled" and len(told) == 3
    assert "scancel 5\n" in slurm.asked() and "scancel 6" not in slurm.asked()


def test_a_pause_ends_when_it_is_no_longer_wanted():
    asked: list[int] = []
    asyncio.run(slurm_queue.pause(60.0, lambda: asked.append(1) or len(asked) < 3))
    assert len(asked) == 3
    asyncio.run(slurm_queue.pause(0.0, lambda: True))


def test_what_is_no_node_is_not_excluded():
    nodes = slurm_queue.NodeNames({"node1"})
    for name in ("None assigned", "node[2-4],gpu-7.example", "", "Unknown reason"):
        nodes.add(name)
    assert nodes == {"node1", "node[2-4],gpu-7.example"}
