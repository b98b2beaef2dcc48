rule tokens:
    input:
        text=study.text_files,
    output:
        meta=paths.tokens / "meta.json",
    log:
        LOGS / "tokens" / f"{paths.tokens_id}.log",
    benchmark:
        LOGS / "tokens" / f"{paths.tokens_id}.tsv"
    conda:
        "../envs/xlstm-scaling.yaml"
    threads: 2
    resources:
        mem_mb=1000,
        runtime=30,
    params:
        spec=paths.tokens_id,
        arguments=study.arguments,
    shell:
        "xlstm-scaling tokens {params.arguments} 2> {log}"
