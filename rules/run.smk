# What people look at, results/<run>/: a run's model and pages, its guard, its upload.


report: "captions/workflow.rst"


with told_in_one_sentence():
    for run in RUNS if workflow.is_main_process else ():
        requests.ask_for_run(PLACE, run, shown_stages(run), DIGESTS)


rule link_run:
    input:
        unpack(finished),
    output:
        [shown_in_report(page) for page in run_folder.PAGES],
        model=f"{RESULTS}/{{run}}/merged_model/config.json",
    log:
        f"{RESULTS}/logs/link/{{run}}.log",
    localrule: True
    conda:
        "../envs/adder.yaml"
    params:
        stages=lambda wildcards: folders_of(shown_stages(wildcards.run)),
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
    localrule: True
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
    localrule: True
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
