# One rule for base and merged model alike: runs with a common base evaluate it once.


rule evaluate_model:
    input:
        unpack(parents("evaluate")),
        code=code_of("adder.evaluation.run"),
    output:
        record=record_of("evaluate"),
    log:
        log_of("evaluate"),
    benchmark:
        benchmark_of("evaluate")
    conda:
        "../envs/adder.yaml"
    threads: ALL_CORES
    resources:
        runtime=240,
        mem_mb=24000,
    params:
        stage=settings_of("evaluate"),
    message:
        "Evaluating on the held-out rows"
    script:
        "../workflow_scripts/evaluate_model.py"


rule evaluate_task:
    input:
        unpack(parents("task")),
        code=code_of("adder.evaluation.tasks.run"),
    output:
        record=record_of("task"),
    log:
        log_of("task"),
    benchmark:
        benchmark_of("task")
    conda:
        "../envs/adder.yaml"
    threads: ALL_CORES
    resources:
        runtime=480,
        mem_mb=24000,
    params:
        stage=settings_of("task"),
    message:
        "Evaluating on a task"
    script:
        "../workflow_scripts/evaluate_task.py"


# The judge is elsewhere: compute nodes need no network.
localrules:
    judge_replies,


rule judge_replies:
    input:
        unpack(parents("judge")),
        code=code_of("adder.evaluation.judge"),
    output:
        record=record_of("judge"),
    log:
        log_of("judge"),
    benchmark:
        benchmark_of("judge")
    conda:
        "../envs/adder.yaml"
    threads: 1
    resources:
        runtime=120,
        mem_mb=2000,
    params:
        stage=settings_of("judge"),
    message:
        "Letting a model judge the replies"
    script:
        "../workflow_scripts/judge_replies.py"
