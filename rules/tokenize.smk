rule tokenize_data:
    input:
        unpack(parents("tokenize")),
        code=code_of("adder.tokenization.run"),
    output:
        record=record_of("tokenize"),
    log:
        log_of("tokenize"),
    benchmark:
        benchmark_of("tokenize")
    conda:
        "../envs/adder.yaml"
    threads: ALL_CORES
    resources:
        runtime=60,
        mem_mb=4000,
    params:
        stage=settings_of("tokenize"),
    message:
        "Tokenizing, and marking what carries loss"
    script:
        "../workflow_scripts/tokenize_data.py"
