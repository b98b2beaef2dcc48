rule plan:
    """The grid as a plan of runs, each with its size, tokens, recipe and identity."""
    input:
        tokens=paths.tokens / "meta.json",
    output:
        plan=paths.plan / "plan.json",
        table=report(
            paths.plan / "plan.csv",
            caption="../report/plan.rst",
            category="Tables",
            labels={"table": "Plan of runs"},
        ),
        parquet=paths.plan / "plan.parquet",
        config=paths.plan / "config.yaml",
    log:
        LOGS / paths.study.name / "plan.log",
    benchmark:
        LOGS / paths.study.name / "plan.tsv"
    localrule: True
    conda:
        "../envs/xlstm-scaling.yaml"
    resources:
        # words of the command line; as params they would rerun rules that they do not concern
        arguments=study.arguments,
        mem_mb=500,
        runtime=5,
    params:
        config_digest=study.digest("study", "training", "hardware", "corpus", "tokenizer"),
    shell:
        "xlstm-scaling plan {resources.arguments} > {log} 2>&1"
