# Downloads are local rules: compute nodes need no network.


localrules:
    download_model,
    download_data,


rule download_model:
    input:
        code=code_of("adder.data.fetch"),
    output:
        record=record_of("model"),
    log:
        log_of("model"),
    benchmark:
        benchmark_of("model")
    conda:
        "../envs/adder.yaml"
    threads: ALL_CORES
    resources:
        runtime=60,
        mem_mb=8000,
    params:
        stage=settings_of("model"),
    message:
        "Fetching the base model"
    script:
        "../workflow_scripts/download_model.py"


rule download_data:
    input:
        code=code_of("adder.data.fetch"),
    output:
        record=record_of("data"),
    log:
        log_of("data"),
    benchmark:
        benchmark_of("data")
    conda:
        "../envs/adder.yaml"
    threads: 1
    resources:
        runtime=60,
        mem_mb=2000,
    params:
        stage=settings_of("data"),
    message:
        "Fetching the rows"
    script:
        "../workflow_scripts/download_data.py"
