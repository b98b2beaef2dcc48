rule train:
    """All runs of the study."""
    input:
        study.results,
    localrule: True


rule train_run:
    """One run; its folder's name carries the digest of all that determines its loss."""
    input:
        # the plan is rewritten with any change of the grid; what concerns this run is in its name
        plan=ancient(paths.plan / "plan.json"),
        tokens=paths.tokens / "meta.json",
        # asked for before the first step; a new one changes no loss
        certificate=ancient(rules.certify.output.certificate),
    output:
        result=paths.runs / "{run}" / "result.json",
    log:
        LOGS / "runs" / "{run}.log",
    benchmark:
        LOGS / "runs" / "{run}.tsv"
    conda:
        "../envs/xlstm-scaling.yaml"
    threads: study.config.hardware.threads_per_run
    resources:
        mem_mb=1500,
        runtime=lambda wildcards: max(10, round(3 * study.estimated_time_s(wildcards.run) / 60)),
    params:
        results=paths.results,
    message:
        "training {wildcards.run}"
    shell:
        "xlstm-scaling train --results {params.results} --plan {input.plan} --run {wildcards.run} 2> {log} >&2"
