rule findings:
    """What the study found, in sentences computed from its tables."""
    input:
        runs=paths.study / "runs.parquet",
        fits=study.fit_files(".parquet"),
        inference=study.inference_files,
        evaluation=study.evaluation_files,
        provenance=study.provenance,
        code=study.code("report") + study.code("planning"),
    output:
        html=report(
            paths.study / "findings.html",
            caption="../report/findings.rst",
            category="Overview",
            labels={"figure": "Findings"},
        ),
        optimal=report(
            paths.study / "optimal.csv",
            caption="../report/optimal.rst",
            category="Tables",
            labels={"table": "Optimal size, tokens and compute"},
        ),
        optimal_parquet=paths.study / "optimal.parquet",
        text=paths.study / "findings.md",
        table=paths.study / "findings.csv",
        parquet=paths.study / "findings.parquet",
    log:
        LOGS / paths.study.name / "findings.log",
    benchmark:
        LOGS / paths.study.name / "findings.tsv"
    localrule: True
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
        "xlstm-scaling findings {resources.arguments} > {log} 2>&1"


rule report:
    """Everything on one page that needs no network: the answer, claims, figures, tables, what failed, provenance."""
    input:
        rules.figures.output,
        rules.findings.output,
        study.claims_files,
        study.comparison_files,
        runs=paths.study / "runs.parquet",
        fits=study.fit_files(".parquet"),
        inference=study.inference_files,
        evaluation=study.evaluation_files,
        explorer=rules.explorer.output if hasattr(rules, "explorer") else [],
        captions=study.captions,
        code=study.code("report/page", "*.*"),
    output:
        html=paths.study / "report.html",
    log:
        LOGS / paths.study.name / "report.log",
    benchmark:
        LOGS / paths.study.name / "report.tsv"
    localrule: True
    conda:
        "../envs/xlstm-scaling.yaml"
    resources:
        # words of the command line; as params they would rerun rules that they do not concern
        arguments=study.arguments,
        mem_mb=1000,
        runtime=10,
    params:
        title=study.config.study.title,
    shell:
        "xlstm-scaling report {resources.arguments} > {log} 2>&1"


rule workflow_report:
    """Snakemake's self-contained report of the figures and tables: a read-only call of this workflow on itself."""
    input:
        rules.figures.output,
        rules.findings.output,
        study.claims_files,
        study.comparison_files,
        captions=study.captions,
    output:
        html=paths.study / "workflow-report.html",
    log:
        LOGS / paths.study.name / "workflow_report.log",
    benchmark:
        LOGS / paths.study.name / "workflow_report.tsv"
    localrule: True
    conda:
        "../envs/xlstm-scaling.yaml"
    resources:
        config_words=study.workflow_config_arguments,
        snakefile=workflow.main_snakefile,
        targets=study.report_targets,
        mem_mb=1000,
        runtime=10,
    params:
        partial=paths.study / "workflow-report.partial.html",
    shell:
        "snakemake --snakefile {resources.snakefile} --cores 1 --nolock --report {params.partial} --config {resources.config_words} -- {resources.targets} > {log} 2>&1"
        " && mv {params.partial} {output.html}"
