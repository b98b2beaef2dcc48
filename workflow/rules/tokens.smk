rule tokens:
    """Text as a tokenizer and token shards, shared by all studies that read it."""
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
        # words of the command line; as params they would rerun rules that they do not concern
        arguments=study.arguments,
        mem_mb=lambda wildcards, threads: 500 + 500 * threads,
        runtime=30,
    params:
        spec=paths.tokens_id,
    shell:
        "xlstm-scaling tokens --workers {threads} {resources.arguments} 2> {log}"
