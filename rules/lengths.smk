rule choose_lengths:
    input:
        unpack(parents("lengths")),
        code=code_of("adder.packing.run"),
    output:
        record=record_of("lengths"),
    log:
        log_of("lengths"),
    benchmark:
        benchmark_of("lengths")
    conda:
        "../envs/adder.yaml"
    threads: 1
    resources:
        runtime=30,
        mem_mb=4000,
    params:
        stage=settings_of("lengths"),
    message:
        "Choosing the sequence length and packing"
    script:
        "../workflow_scripts/choose_lengths.py"
