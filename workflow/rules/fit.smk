rule fit:
    """Every law, with its intervals."""
    input:
        runs=paths.study / "runs.parquet",
        curves=paths.study / "curves.parquet",
        code=study.code("fitting"),
    output:
        study.fit_files(".parquet"),
        [
            report(
                path,
                caption="../report/fits.rst",
                category="Tables",
                labels={"table": f"Fit: {path.stem}"},
            )
            for path in study.fit_files(".csv")
        ],
    log:
        LOGS / paths.study.name / "fit.log",
    benchmark:
        LOGS / paths.study.name / "fit.tsv"
    conda:
        "../envs/xlstm-scaling.yaml"
    resources:
        # words of the command line; as params they would rerun rules that they do not concern
        arguments=study.arguments,
        mem_mb=2000,
        runtime=30,
    params:
        config_digest=study.digest("fitting"),
    shell:
        "OMP_NUM_THREADS=1 xlstm-scaling fit {resources.arguments} 2> {log}"
