# One rule for base and merged model alike: runs with a common base evaluate it once.


rule evaluate_model:
    input:
        unpack(parents("evaluate")),
        code=code_of("evaluate"),
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
