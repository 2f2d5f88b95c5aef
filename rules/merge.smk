rule merge_adapter:
    input:
        unpack(parents("merge")),
        code=code_of("adder.merging.run"),
    output:
        record=record_of("merge"),
    log:
        log_of("merge"),
    benchmark:
        benchmark_of("merge")
    conda:
        "../envs/adder.yaml"
    threads: ALL_CORES
    resources:
        runtime=120,
        mem_mb=24000,
    params:
        stage=settings_of("merge"),
    message:
        "Merging, and proving the merge"
    script:
        "../workflow_scripts/merge_adapter.py"
