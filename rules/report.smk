include: "snakemake_report.smk"


localrules:
    link_run,
    check_guard,
    push_run,


rule write_report:
    input:
        unpack(parents("report")),
        code=code_of("adder.report.run"),
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
        unpack(finished),
    output:
        [shown_in_report(page) for page in PAGES],
        model=f"{RESULTS}/{{run}}/merged_model/config.json",
    log:
        f"{RESULTS}/logs/link/{{run}}.log",
    conda:
        "../envs/adder.yaml"
    params:
        # A changed key is what makes this rule run.
        stages=lambda wildcards, input: sorted(input),
    message:
        "Putting the results of run '{wildcards.run}' into their place"
    script:
        "../workflow_scripts/link_run.py"


rule check_guard:
    input:
        f"{RESULTS}/{{run}}/metrics.json",
    output:
        f"{RESULTS}/{{run}}/guard.json",
    log:
        f"{RESULTS}/logs/guard/{{run}}.log",
    conda:
        "../envs/adder.yaml"
    message:
        "Comparing run '{wildcards.run}' with what it may lose elsewhere"
    script:
        "../workflow_scripts/check_guard.py"


rule push_run:
    input:
        to_be_pushed,
    output:
        f"{RESULTS}/{{run}}/pushed.json",
    log:
        f"{RESULTS}/logs/push/{{run}}.log",
    conda:
        "../envs/adder.yaml"
    params:
        hub=lambda wildcards: SETTINGS[wildcards.run].export.hub,
        private=lambda wildcards: SETTINGS[wildcards.run].export.private,
        stages=lambda wildcards: [RUNS[wildcards.run][name].key for name in ("merge", "report")],
    message:
        "Uploading run '{wildcards.run}'"
    script:
        "../workflow_scripts/push_model.py"
