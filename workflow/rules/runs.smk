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
    params:
        arguments=study.arguments,
    log:
        LOGS / study.config.study.name / "runs.log",
    benchmark:
        LOGS / study.config.study.name / "runs.tsv"
    resources:
        mem_mb=1000,
        runtime=10,
    shell:
        "xlstm-scaling runs {params.arguments} 2> {log}"
