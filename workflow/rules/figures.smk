rule figures:
    """All figures, from tables alone."""
    input:
        runs=paths.study / "runs.parquet",
        curves=paths.study / "curves.parquet",
        fits=study.fit_files(".parquet"),
        inference=study.inference_files,
        evaluation=study.evaluation_files,
        code=study.code("figures") + study.code("planning"),
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
    log:
        LOGS / paths.study.name / "figures.log",
    benchmark:
        LOGS / paths.study.name / "figures.tsv"
    conda:
        "../envs/xlstm-scaling.yaml"
    resources:
        # words of the command line; as params they would rerun rules that they do not concern
        arguments=study.arguments,
        mem_mb=2000,
        runtime=10,
    params:
        config_digest=study.digest("figures"),
    shell:
        "xlstm-scaling figures {resources.arguments} 2> {log}"
