if study.downloads:

    rule download:
        """The paper's files."""
        input:
            study.downloads,
        localrule: True

    rule download_file:
        """One of the paper's files, checked by its published id."""
        output:
            file=paths.downloads / "{name}.pkl",
        log:
            LOGS / "downloads" / "{name}.log",
        benchmark:
            LOGS / "downloads" / "{name}.tsv"
        conda:
            "../envs/xlstm-scaling.yaml"
        resources:
            arguments=study.arguments,
            mem_mb=500,
            runtime=30,
        shell:
            "xlstm-scaling download {resources.arguments} --quiet --only {wildcards.name}.pkl 2> {log}"


rule ingest:
    """The table of published runs; what is missing is named in the provenance and among the findings."""
    input:
        files=study.published_files,
        settings=study.published_settings,
        code=study.code("published"),
    output:
        csv=report(
            paths.study / "runs.csv",
            caption="../report/runs.rst",
            category="Tables",
            labels={"table": "Runs"},
        ),
        parquet=paths.study / "runs.parquet",
        curves=paths.study / "curves.parquet",
        provenance=paths.study / "runs.provenance.json",
    log:
        LOGS / paths.study.name / "ingest.log",
    benchmark:
        LOGS / paths.study.name / "ingest.tsv"
    conda:
        "../envs/xlstm-scaling.yaml"
    resources:
        # the folder's place does not matter, its files do
        folder=study.published_folder,
        mem_mb=2000,
        runtime=10,
    params:
        options=study.ingest_options,
    shell:
        "xlstm-scaling ingest {resources.folder:q} {params.options} --quiet --out {output.parquet} --curves {output.curves} > {log} 2>&1"


rule runs:
    """The one table of runs."""
    input:
        rules.ingest.output,
    localrule: True


if study.published_inference:

    rule inference:
        """Published measurements of time to first token and step time, and the runtime model; nothing is timed here."""
        input:
            measurements=study.published_inference,
            code=[
                *study.code("inference", "counts.py"),
                *study.code("inference", "roofline.py"),
                *study.code("inference", "probe.py"),
                *study.code("fitting", "runtime_*.py"),
            ],
        output:
            study.inference_files,
            published=paths.inference / "published.parquet",
        log:
            LOGS / paths.study.name / "inference.log",
        benchmark:
            LOGS / paths.study.name / "inference.tsv"
        conda:
            "../envs/xlstm-scaling.yaml"
        resources:
            arguments=study.arguments,
            mem_mb=1000,
            runtime=20,
        params:
            config_digest=study.inference_digest,
            settings=study.published_inference_digest,
        shell:
            "OMP_NUM_THREADS=1 xlstm-scaling inference {resources.arguments} 2> {log}"


rule claims:
    """Claim by claim: what the paper reports, what its runs give, and whether it holds."""
    input:
        runs=paths.study / "runs.parquet",
        curves=paths.study / "curves.parquet",
        fits=study.fit_files(".parquet"),
        inference=study.published_measurements,
        claims=study.claims,
        code=study.code("published/claims"),
    output:
        html=report(
            paths.claims / "claims.html",
            caption="../report/claims.rst",
            category="Overview",
            labels={"figure": "Claims"},
        ),
        table=report(
            paths.claims / "claims.csv",
            caption="../report/claims.rst",
            category="Tables",
            labels={"table": "Claims"},
        ),
        parquet=paths.claims / "claims.parquet",
        text=paths.claims / "claims.md",
    log:
        LOGS / paths.study.name / "claims.log",
    benchmark:
        LOGS / paths.study.name / "claims.tsv"
    conda:
        "../envs/xlstm-scaling.yaml"
    resources:
        arguments=study.claims_arguments,
        mem_mb=2000,
        runtime=30,
    params:
        resamples=study.config.fitting.num_resamples,
    shell:
        "OMP_NUM_THREADS=1 xlstm-scaling claims {resources.arguments} --resamples {params.resamples} --quiet > {log} 2>&1"
