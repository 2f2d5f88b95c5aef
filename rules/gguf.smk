rule write_gguf:
    input:
        unpack(parents("gguf")),
        code=code_of("adder.export.gguf"),
    output:
        record=record_of("gguf"),
    log:
        log_of("gguf"),
    benchmark:
        benchmark_of("gguf")
    conda:
        "../envs/adder.yaml"
    threads: ALL_CORES
    resources:
        runtime=60,
        mem_mb=8000,
    params:
        stage=settings_of("gguf"),
    message:
        "Writing the GGUF file"
    script:
        "../workflow_scripts/write_gguf.py"
