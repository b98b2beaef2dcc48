# several devices a run: a process each, by torchrun (docs/distribution.md)
DEVICES = study.config.hardware.devices_per_run
TRAIN = (
    "xlstm-scaling train"
    if DEVICES == 1
    else f"torchrun --standalone --nproc-per-node {DEVICES} -m -- xlstm_scaling.cli train"
)


rule train:
    """All runs of the study."""
    input:
        study.results,
    localrule: True


if study.trunks:

    rule train_trunk:
        """What runs share that differ in length alone, kept where each branches off."""
        input:
            plan=rules.plan.output.plan,
            certificate=rules.certify.output.certificate,
            tokens=paths.tokens / "meta.json",
        output:
            branches=paths.trunks / "{trunk}" / "trunk.json",
        log:
            LOGS / "trunks" / "{trunk}.log",
        benchmark:
            LOGS / "trunks" / "{trunk}.tsv"
        conda:
            "../envs/xlstm-scaling.yaml"
        threads: study.config.hardware.threads_per_run * DEVICES
        resources:
            command=TRAIN,
            mem_mb=1500,
            runtime=lambda wildcards: max(10, round(3 * study.estimated_time_s(wildcards.trunk) / 60)),
        params:
            results=paths.results,
            # another length is another branch
            steps=lambda wildcards: study.trunks[wildcards.trunk].steps,
        message:
            "training {wildcards.trunk}"
        shell:
            "{resources.command} --results {params.results} --plan {input.plan} --trunk {wildcards.trunk} 2> {log} >&2"


rule train_run:
    """One run; its folder's name carries the digest of all that determines its loss."""
    input:
        # what concerns a run is in its name, and a certificate changes no loss: a run that is there waits for neither of
        # the two. One that is not must: Snakemake leaves out jobs that only wait for ancient files which are made anew
        plan=lambda wildcards: study.for_run(wildcards.run, rules.plan.output.plan, ancient),
        certificate=lambda wildcards: study.for_run(wildcards.run, rules.certify.output.certificate, ancient),
        tokens=paths.tokens / "meta.json",
        trunk=lambda wildcards: study.trunk_of(wildcards.run, ancient),
    output:
        result=paths.runs / "{run}" / "result.json",
    log:
        LOGS / "runs" / "{run}.log",
    benchmark:
        LOGS / "runs" / "{run}.tsv"
    conda:
        "../envs/xlstm-scaling.yaml"
    threads: study.config.hardware.threads_per_run * DEVICES
    resources:
        command=TRAIN,
        mem_mb=1500,
        runtime=lambda wildcards: max(10, round(3 * study.estimated_time_s(wildcards.run) / 60)),
    params:
        results=paths.results,
    message:
        "training {wildcards.run}"
    shell:
        "{resources.command} --results {params.results} --plan {input.plan} --run {wildcards.run} 2> {log} >&2"
