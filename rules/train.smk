rule train_adapter:
    input:
        unpack(parents("train")),
        code=code_of("adder.training.run"),
    output:
        record=record_of("train"),
    log:
        log_of("train"),
    benchmark:
        benchmark_of("train")
    conda:
        "../envs/adder.yaml"
    threads: ALL_CORES
    resources:
        runtime=1440,
        mem_mb=24000,
    params:
        stage=settings_of("train"),
    message:
        "Training"
    script:
        "../workflow_scripts/train_adapter.py"
