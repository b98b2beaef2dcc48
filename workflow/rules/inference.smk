rule inference:
    """Time to first token and step time on this machine, and the runtime model; alone, so that nothing disturbs it."""
    input:
        plan=ancient(paths.plan / "plan.json"),
        trained=[study.result(run.run_id) for run in study.benchmarked_runs],
        code=study.code("inference") + study.code("fitting", "runtime_*.py"),
    output:
        study.inference_files,
    log:
        LOGS / paths.study.name / "inference.log",
    benchmark:
        LOGS / paths.study.name / "inference.tsv"
    conda:
        "../envs/xlstm-scaling.yaml"
    threads: workflow.cores
    resources:
        **study.resources.one_device,
        # words of the command line; as params they would rerun rules that they do not concern
        arguments=study.arguments,
        mem_mb=4000,
        runtime=60,
    params:
        config_digest=study.inference_digest,
        trained=[run.run_id for run in study.benchmarked_runs],
    shell:
        "xlstm-scaling inference {resources.arguments} 2> {log}"
