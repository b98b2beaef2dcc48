# The paper's first three experiments by name, each with what it alone needs; outputs in a folder of the study:
#   snakemake --cores 2 isoflop_sweep | latency_profile | context_scaling
from xlstm_scaling.experiments import EXPERIMENTS, table_files

if study.context_runs:

    rule context_plan:
        """The runs that context_scaling compares and the study does not have."""
        input:
            tokens=paths.tokens / "meta.json",
        output:
            plan=study.context_plan,
        log:
            LOGS / paths.study.name / "context_plan.log",
        benchmark:
            LOGS / paths.study.name / "context_plan.tsv"
        conda:
            "../envs/xlstm-scaling.yaml"
        resources:
            # words of the command line; as params they would rerun rules that they do not concern
            arguments=study.arguments,
            mem_mb=500,
            runtime=5,
        params:
            runs=sorted(study.context_runs),
        shell:
            "xlstm-scaling experiment --name context_scaling --part plan {resources.arguments} > {log} 2>&1"


rule isoflop_sweep_tables:
    """Parabolas of runs of equal compute, and the laws of their minima."""
    input:
        runs=lambda wildcards: study.experiment_inputs("isoflop_sweep"),
        code=study.code("fitting", "isoflop.py") + study.code("fitting", "power_law.py"),
    output:
        table_files(paths, "isoflop_sweep"),
    log:
        LOGS / paths.study.name / "isoflop_sweep_tables.log",
    benchmark:
        LOGS / paths.study.name / "isoflop_sweep_tables.tsv"
    conda:
        "../envs/xlstm-scaling.yaml"
    resources:
        arguments=study.arguments,
        mem_mb=1000,
        runtime=15,
    params:
        config_digest=study.digest("fitting"),
    shell:
        "OMP_NUM_THREADS=1 xlstm-scaling experiment --name isoflop_sweep --part tables {resources.arguments} 2> {log}"


rule latency_profile_tables:
    """One size over long prompts; alone, so that nothing disturbs it. Nothing needs to be trained."""
    input:
        measured=study.experiment_inputs("latency_profile"),
        code=[] if study.published else study.code("inference"),
    output:
        table_files(paths, "latency_profile"),
    log:
        LOGS / paths.study.name / "latency_profile_tables.log",
    benchmark:
        LOGS / paths.study.name / "latency_profile_tables.tsv"
    conda:
        "../envs/xlstm-scaling.yaml"
    threads: workflow.cores
    resources:
        **({} if study.published else study.resources.one_device),
        arguments=study.arguments,
        mem_mb=4000,
        runtime=60,
    params:
        config_digest=study.profile_digest,
    shell:
        "xlstm-scaling experiment --name latency_profile --part tables {resources.arguments} 2> {log}"


rule context_scaling_tables:
    """The loss of the same training at two contexts, the same token budget."""
    input:
        runs=lambda wildcards: study.experiment_inputs("context_scaling"),
        code=study.code("study", "context_scaling.py"),
    output:
        table_files(paths, "context_scaling"),
    log:
        LOGS / paths.study.name / "context_scaling_tables.log",
    benchmark:
        LOGS / paths.study.name / "context_scaling_tables.tsv"
    conda:
        "../envs/xlstm-scaling.yaml"
    resources:
        arguments=study.arguments,
        mem_mb=1000,
        runtime=10,
    shell:
        "xlstm-scaling experiment --name context_scaling --part tables {resources.arguments} 2> {log}"


for experiment in EXPERIMENTS:

    rule:
        name:
            experiment
        input:
            tables=table_files(paths, experiment),
            code=study.code("figures"),
        output:
            study.experiment_figures(experiment),
        log:
            LOGS / paths.study.name / f"{experiment}.log",
        benchmark:
            LOGS / paths.study.name / f"{experiment}.tsv"
        conda:
            "../envs/xlstm-scaling.yaml"
        resources:
            arguments=study.arguments,
            mem_mb=1000,
            runtime=10,
        params:
            name=experiment,
            config_digest=study.digest("figures"),
        shell:
            "xlstm-scaling experiment --name {params.name} --part figures {resources.arguments} 2> {log}"
