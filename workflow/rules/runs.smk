rule runs:
    """The one table of runs."""
    input:
        plan=paths.plan / "plan.json",
        results=study.results,
    output:
        csv=report(
            paths.study / "runs.csv",
            caption="../report/runs.rst",
            category="Tables",
            labels={"table": "Runs"},
        ),
        parquet=paths.study / "runs.parquet",
        curves=paths.study / "curves.parquet",
    log:
        LOGS / paths.study.name / "runs.log",
    benchmark:
        LOGS / paths.study.name / "runs.tsv"
    localrule: True
    conda:
        "../envs/xlstm-scaling.yaml"
    resources:
        # words of the command line; as params they would rerun rules that they do not concern
        arguments=study.arguments,
        mem_mb=1000,
        runtime=10,
    shell:
        "xlstm-scaling runs {resources.arguments} 2> {log}"
