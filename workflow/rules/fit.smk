rule fit:
    """Every law, with its intervals."""
    input:
        runs=paths.study / "runs.parquet",
        curves=paths.study / "curves.parquet",
        code=study.code("fitting"),
    output:
        multiext(str(paths.fits) + "/", *(f"{name}.parquet" for name in study.fit_tables)),
        [
            report(
                paths.fits / f"{name}.csv",
                caption="../report/fits.rst",
                category="Tables",
                labels={"table": f"Fit: {name}"},
            )
            for name in study.fit_tables
        ],
    params:
        config_digest=study.digest("fitting"),
        arguments=study.arguments,
    log:
        LOGS / study.config.study.name / "fit.log",
    benchmark:
        LOGS / study.config.study.name / "fit.tsv"
    resources:
        mem_mb=2000,
        runtime=30,
    shell:
        "OMP_NUM_THREADS=1 xlstm-scaling fit {params.arguments} 2> {log}"
