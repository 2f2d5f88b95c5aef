rule format_data:
    input:
        unpack(parents("format")),
        code=code_of("adder.formatting.run"),
    output:
        record=record_of("format"),
    log:
        log_of("format"),
    benchmark:
        benchmark_of("format")
    conda:
        "../envs/adder.yaml"
    threads: ALL_CORES
    resources:
        runtime=60,
        mem_mb=4000,
    params:
        stage=settings_of("format"),
    message:
        "Turning rows into conversations"
    script:
        "../workflow_scripts/format_data.py"
