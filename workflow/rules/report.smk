rule report:
    """Snakemake's self-contained report of the figures and tables: a read-only call of this workflow on itself."""
    input:
        rules.figures.output,
        captions=study.captions,
    output:
        html=paths.study / "report.html",
    log:
        LOGS / study.config.study.name / "report.log",
    benchmark:
        LOGS / study.config.study.name / "report.tsv"
    conda:
        "../envs/xlstm-scaling.yaml"
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        config=study.workflow_config_arguments,
        partial=paths.study / "report.partial.html",
    shell:
        "snakemake --cores 1 --nolock --report {params.partial} --config {params.config} -- figures > {log} 2>&1"
        " && mv {params.partial} {output.html}"
