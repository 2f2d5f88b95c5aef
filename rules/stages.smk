# What depends on what: one rule a stage, from its declaration (`stage.py` in the package of its name). A stage's folder
# is results/stages/<stage>/<key>, where the key stands for its settings and those of all stages above it.


def stage_of(spec, wildcards):
    """The stage that a rule is asked for by its key."""
    folder = f"stages/{spec.name}/{wildcards.key}"
    if folder not in STAGES:
        raise WorkflowError(
            f"{RESULTS}/{folder} is of no run of the configuration as it is now: another was asked for, or it was edited "
            "since this workflow began; start it again"
        )
    return STAGES[folder]


def parents(spec):
    """Input function: the records of a stage's parents, by the name under which it reads them, and the request."""

    def records(wildcards):
        stage = stage_of(spec, wildcards)
        return {
            **records_of(stage.parents),
            "request": f"{RESULTS}/cache/requests/{requests.stage_request(stage)}.json",
        }

    return records


def folders(spec):
    """Parameter function: the folders of a stage's parents below the results, by name, as text."""
    return lambda wildcards: folders_of(stage_of(spec, wildcards).parents)


def parameters(spec):
    """Parameter function: what decides a stage's result, as text in which the order of the YAML's keys has no part."""
    return lambda wildcards: stage_of(spec, wildcards).parameters()


def memory(spec):
    """Resource function: MB of main memory, by the size of the base model. Before the model is there, none are known;
    Snakemake asks again when the job can start."""

    def megabytes(wildcards, input):
        run = RUN_OF[f"stages/{spec.name}/{wildcards.key}"]
        count = stage_graph.parameter_count(RUNS[run], PLACE) if spec.memory.bytes_per_parameter else 0
        if count is None:
            raise FileNotFoundError(errno.ENOENT, "the model isn't fetched yet", input[0])
        return spec.megabytes(RUNTIME, count)

    return megabytes


def cores(spec):
    """Threads function: on this machine a stage that computes has all, so that no two share a GPU or the cores."""
    return lambda wildcards: (spec.threads or ALL_CORES) if workflow.local_exec else spec.cores(RUNTIME)


def gpus(spec):
    """The resources of stages that use GPUs."""
    number = spec.gpus(RUNTIME)
    # A training has the GPUs of one node.
    return {"gpu": number, "nodes": 1} if number else {}


for spec in SPECS.values():

    rule:
        name:
            spec.rule
        input:
            unpack(parents(spec)),
        output:
            record=f"{RESULTS}/stages/{spec.name}/{{key}}/stage.json",
        log:
            f"{RESULTS}/logs/{spec.name}/{{key}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/{spec.name}/{{key}}.tsv"
        priority: spec.priority
        localrule: spec.local
        conda:
            "../envs/adder.yaml"
        threads: cores(spec)
        resources:
            **gpus(spec),
            runtime=spec.minutes,
            mem_mb=memory(spec),
        params:
            stage=parameters(spec),
            inputs=folders(spec),
        message:
            spec.message
        script:
            "../workflow_scripts/run_stage.py"
