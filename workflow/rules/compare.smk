rule compare:
    """This study beside others whose fits are there: which exponents and rankings carry over (--config compare=laptop)."""
    input:
        fits=study.fit_files(".parquet"),
        others=study.compared_files,
        code=study.code("report", "comparison.py") + study.code("figures", "comparison.py"),
    output:
        report(
            paths.study / "comparison" / "comparison.svg",
            caption="../report/comparison.rst",
            category="Overview",
            labels={"figure": "Other studies"},
        ),
        paths.study / "comparison" / "comparison.png",
        paths.study / "comparison" / "comparison.csv",
        paths.study / "comparison" / "comparison.md",
        table=paths.study / "comparison" / "comparison.parquet",
    log:
        LOGS / paths.study.name / "compare.log",
    benchmark:
        LOGS / paths.study.name / "compare.tsv"
    conda:
        "../envs/xlstm-scaling.yaml"
    resources:
        mem_mb=1000,
        runtime=5,
    params:
        studies=[*study.compared, paths.study],
        out=paths.study / "comparison",
    shell:
        "xlstm-scaling compare {params.studies} --out {params.out} > {log} 2>&1"
