# What Snakemake's executor for Slurm doesn't do by itself. It is told before the first job, on the submit host only.


def prepare_slurm():
    """Before the first job: ask Slurm whether it can take every kind of job, take over those of a killed Snakemake, tell
    what becomes of the jobs, and end at once when told to."""
    executor = workflow.scheduler._executor
    settings = workflow.executor_settings
    name, prefix = slurm_queue.run_name(PLACE, (file for spec in SPECS.values() for file in closure(spec.run)))
    end_at_once(executor, settings.init_seconds_before_status_checks)
    with told_in_one_sentence():
        refuse_impossible_jobs(executor)
        running = slurm_queue.left_behind(name, prefix)
    executor.run_uuid = name
    executor._failed_nodes = slurm_queue.NodeNames(executor._failed_nodes)
    # sbatch passes it on to jobs: without it only KillWait's 30 seconds are left to write a checkpoint.
    os.environ.setdefault("SBATCH_SIGNAL", f"TERM@{slurm_job.WARNING}")
    # What sacct says of a job that somebody ended, "CANCELLED by 0", the executor takes for one that runs.
    settings.status_command = "squeue"
    take_over(executor, running)
    watch = slurm_queue.Watch(
        name=name,
        logs=lambda job: slurm_log(executor, job.comment, job.id),
        speakers=tuple(f"{spec.name}: " for spec in SPECS.values()),
        tell=lambda text: print(text, file=sys.stderr, flush=True),
        interval=settings.init_seconds_before_status_checks,
    )
    watch.start()


def refuse_impossible_jobs(executor):
    """End with a sentence where Slurm can't take a job, before anything is downloaded."""
    from snakemake_executor_plugin_slurm import get_submit_command, set_gres_string

    jobs = [job for job in workflow.dag.needrun_jobs() if not job.is_local]
    for job in {(job.rule.name, job.threads, str(job.resources.get("mem_mb"))): job for job in jobs}.values():
        wanted = slurm_queue.Wanted.of(job.rule.name, job.threads, job.resources)
        told = {"run_uuid": "adder", "slurm_logfile": os.devnull, "comment_str": wanted.rule, "workdir": None}
        try:
            told |= {"account": next(executor.get_account_arg(job)), "partition": executor.get_partition_arg(job)}
            call = get_submit_command(job, told, settings=workflow.executor_settings) + set_gres_string(job)
        except WorkflowError as error:
            raise UserError(f"Slurm can't take {wanted}: {' '.join(str(error).split())}") from None
        slurm_queue.refuse_impossible(call, wanted)


def slurm_log(executor, comment, number):
    """The file that Slurm writes of a job, as the executor names it."""
    name, _, key = comment.partition("_wildcards_")
    return executor.slurm_logdir / name / key / f"{number}.log"


def take_over(executor, running):
    """Let the jobs `running` of an earlier Snakemake stand for those that would be submitted. running: by comment."""
    from snakemake_executor_plugin_slurm.utils import get_job_wildcards
    from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo

    submit = executor.run_job

    def run_job(job):
        wildcards = get_job_wildcards(job)
        comment = f"rule_{job.name}" + (f"_wildcards_{wildcards}" if wildcards else "")
        found = running.pop(comment, None)
        if found is None:
            submit(job)
            return
        tell(f"{found} of an earlier start goes on, and is waited for")
        log = slurm_log(executor, comment, found.id)
        executor._report_job_submission_threadsafe(
            SubmittedJobInfo(job, external_jobid=found.id, aux={"slurm_logfile": log})
        )

    executor.run_job = run_job


def end_at_once(executor, interval):
    """On SIGTERM as on Ctrl-C: cancel the jobs and end. By itself Snakemake waits for them, for hours in a queue, and
    the executor for the end of its pause between two looks."""

    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    executor.cancel_jobs = lambda active: slurm_queue.cancel_all(executor.run_uuid)

    executor.sleep = lambda: slurm_queue.pause(
        min(executor.next_seconds_between_status_checks, 3 * interval), lambda: executor.wait
    )
