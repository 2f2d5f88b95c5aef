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
        above = {parent: f"{RESULTS}/{above.folder}/stage.json" for parent, above in stage.parents.items()}
        return {**above, "request": f"{RESULTS}/cache/requests/{requests.stage_request(stage)}.json"}

    return records


def parameters(spec):
    """Parameter function: what decides a stage's result, as text in which the order of the YAML's keys has no part."""
    return lambda wildcards: stage_of(spec, wildcards).parameters()


def memory(spec):
    """Resource function: MB of main memory, by the size of the base model once that is known."""

    def megabytes(wildcards):
        run = RUN_OF[f"stages/{spec.name}/{wildcards.key}"]
        return spec.memory.megabytes(stage_graph.parameter_count(RUNS[run], PLACE))

    return megabytes


def code_of(module):
    """The files of the package that a module is made of: an edit to one of them runs the stage anew."""
    return [str(path) for path in closure(module)]


for spec in SPECS.values():

    rule:
        name:
            spec.rule
        input:
            unpack(parents(spec)),
            code=code_of(spec.run),
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
        threads: spec.threads or ALL_CORES
        resources:
            runtime=spec.minutes,
            mem_mb=memory(spec),
        params:
            stage=parameters(spec),
        message:
            spec.message
        script:
            "../workflow_scripts/run_stage.py"
