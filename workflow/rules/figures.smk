rule figures:
    """All figures, from tables alone."""
    input:
        runs=paths.study / "runs.parquet",
        curves=paths.study / "curves.parquet",
        fits=multiext(str(paths.fits) + "/", *(f"{name}.parquet" for name in study.fit_tables)),
        inference=rules.inference.output,
        code=study.code("figures"),
    output:
        [
            report(
                path,
                caption=f"../report/{path.stem}.rst",
                category=study.figure_specs[path.stem].category,
                labels={"figure": study.figure_specs[path.stem].title},
            )
            for path in study.figures
            if path.suffix == ".svg"
        ],
        [path for path in study.figures if path.suffix != ".svg"],
    params:
        config_digest=study.digest("figures"),
        arguments=study.arguments,
    log:
        LOGS / study.config.study.name / "figures.log",
    benchmark:
        LOGS / study.config.study.name / "figures.tsv"
    resources:
        mem_mb=1000,
        runtime=10,
    shell:
        "xlstm-scaling figures {params.arguments} 2> {log}"
