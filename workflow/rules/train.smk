# several devices a run: a process each (docs/distribution.md)
DEVICES = study.config.hardware.devices_per_run
JOBS = study.resources
if "SLURM_JOB_ID" in os.environ and workflow.remote_exec:
    # a job of the profile slurm: it may have several nodes, and goes on in a next job where it is stopped
    TRAIN = f"exec python -m xlstm_scaling.study.launch {JOBS.launch_options(study.config.hardware.nodes_per_run)}"
elif DEVICES == 1:
    TRAIN = "xlstm-scaling train"
else:
    TRAIN = f"exec python -m xlstm_scaling.study.launch {JOBS.launch_options(nodes=1)}"


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
            **JOBS.devices,
            command=TRAIN,
            slurm_extra=JOBS.slurm_options,
            mem_mb=lambda wildcards, attempt: JOBS.memory_mb(wildcards.trunk, attempt),
            runtime=lambda wildcards, attempt: JOBS.minutes(wildcards.trunk, attempt),
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
        # the two. One that is not must
        unpack(lambda wildcards: study.run_inputs(wildcards.run, rules.certify.output.certificate, ancient)),
        tokens=paths.tokens / "meta.json",
    output:
        result=paths.runs / "{run}" / "result.json",
    log:
        LOGS / "runs" / "{run}.log",
    benchmark:
        LOGS / "runs" / "{run}.tsv"
    group:
        # short runs share jobs, where the profile says how many of a kind do (group-components)
        lambda wildcards: JOBS.pack(wildcards.run, workflow.group_settings.group_components)
    conda:
        "../envs/xlstm-scaling.yaml"
    threads: study.config.hardware.threads_per_run * DEVICES
    resources:
        **JOBS.devices,
        command=TRAIN,
        # no parameter: another setting elsewhere does not concern a run
        arguments=study.arguments,
        slurm_extra=JOBS.slurm_options,
        # one after the other in a job that they share
        runs_at_once=1,
        mem_mb=lambda wildcards, attempt: JOBS.memory_mb(wildcards.run, attempt),
        runtime=lambda wildcards, attempt: JOBS.minutes(wildcards.run, attempt),
    params:
        results=paths.results,
    message:
        "training {wildcards.run}"
    shell:
        # a run that was there when the workflow began, and has to be finished again, has no plan as its input
        'if [ -n "{input.plan}" ]; then set -- --results {params.results} --plan {input.plan}; else set -- {resources.arguments}; fi; '
        '{resources.command} "$@" --run {wildcards.run} 2> {log} >&2'
