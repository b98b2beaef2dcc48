rule evaluate:
    """The loss of trained models by position, out to several training contexts, on long held-out documents."""
    input:
        tokens=paths.tokens / "meta.json",
        trained=[study.result(run.run_id) for run in study.evaluated_runs],
        code=study.code("evaluation"),
    output:
        study.evaluation_files,
        paths.evaluation / "length.csv",
    log:
        LOGS / paths.study.name / "evaluate.log",
    benchmark:
        LOGS / paths.study.name / "evaluate.tsv"
    conda:
        "../envs/xlstm-scaling.yaml"
    threads: study.config.hardware.threads_per_run
    resources:
        **study.resources.one_device,
        # words of the command line; as params they would rerun rules that they do not concern
        arguments=study.arguments,
        mem_mb=2000,
        runtime=30,
    params:
        config_digest=study.digest("evaluation"),
        trained=[run.run_id for run in study.evaluated_runs],
    shell:
        "xlstm-scaling evaluate {resources.arguments} 2> {log}"
