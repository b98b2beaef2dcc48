rule explorer:
    """The laws as one offline page on which budget, context and limits are dragged; from tables alone."""
    input:
        runs=paths.study / "runs.parquet",
        fits=study.fit_files(".parquet"),
        inference=study.inference_files,
        code=[
            *study.code("explorer"),
            *study.code("explorer", "*.html"),
            *study.code("explorer", "*.css"),
            *study.code("explorer/js", "*.js"),
            *study.code("planning"),
            *study.code("accounting"),
        ],
    output:
        html=paths.study / "explorer.html",
    log:
        LOGS / paths.study.name / "explorer.log",
    benchmark:
        LOGS / paths.study.name / "explorer.tsv"
    conda:
        "../envs/xlstm-scaling.yaml"
    resources:
        # words of the command line; as params they would rerun rules that they do not concern
        arguments=study.arguments,
        mem_mb=1000,
        runtime=5,
    params:
        title=study.config.study.title,
    shell:
        "OMP_NUM_THREADS=1 xlstm-scaling explore {resources.arguments} > {log} 2>&1"
