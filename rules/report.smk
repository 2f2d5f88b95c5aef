localrules:
    link_run,


rule write_report:
    input:
        unpack(parents("report")),
        code=code_of("report"),
    output:
        record=record_of("report"),
    log:
        log_of("report"),
    benchmark:
        benchmark_of("report")
    conda:
        "../envs/adder.yaml"
    threads: 1
    resources:
        runtime=10,
        mem_mb=1000,
    params:
        stage=settings_of("report"),
    message:
        "Writing the report"
    script:
        "../workflow_scripts/write_report.py"


rule link_run:
    input:
        merge=lambda wildcards: f"{RESULTS}/{RUNS[wildcards.run]['merge'].folder}/stage.json",
        report=lambda wildcards: f"{RESULTS}/{RUNS[wildcards.run]['report'].folder}/stage.json",
    output:
        [f"{RESULTS}/{{run}}/{page}" for page in PAGES],
        model=f"{RESULTS}/{{run}}/merged_model/config.json",
    log:
        f"{RESULTS}/logs/link/{{run}}.log",
    conda:
        "../envs/adder.yaml"
    params:
        # A changed key is what makes this rule run.
        stages=lambda wildcards: [RUNS[wildcards.run][name].key for name in ("merge", "report")],
    message:
        "Putting the results of run '{wildcards.run}' into their place"
    script:
        "../workflow_scripts/link_run.py"
