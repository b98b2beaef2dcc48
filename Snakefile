# The study as one DAG: text -> tokens -> plan, kernels -> certificate -> runs -> table -> laws, latency -> figures -> report.
#
#   snakemake --cores 2                                   the whole of study=laptop
#   snakemake --cores 2 figures                           one stage and what it needs
#   snakemake --cores 2 isoflop_sweep                     one experiment: or latency_profile, context_scaling (docs/inference.md)
#   snakemake --cores 2 --config study=smoke              another study (conf/study/)
#   snakemake --cores 2 --config overrides="[training.seed=2]"   any Hydra override
#   snakemake --cores 2 --config study=laptop_code compare=laptop   beside another study whose results are there
#   snakemake --cores 2 --config runs=published paper=FOLDER     published runs instead: ingest -> table -> laws -> …
import sys

from snakemake.utils import min_version, validate

min_version("9.0")

from xlstm_scaling.study.workflow import WorkflowStudy

validate(config, "workflow/schemas/config.schema.yaml")
study = WorkflowStudy(config)
paths = study.paths
config["study"] = study.study_name
# the report's captions name the level of the intervals
config["fitting"] = {"confidence": study.config.fitting.confidence}

study.prepare_environment()


report: "workflow/report/workflow.rst"


onerror:
    print(study.explain_failure(), file=sys.stderr)


# where a stage's script logs to, beside what it makes
LOGS = paths.results / "logs"


rule all:
    input:
        paths.study / "report.html",
        paths.study / "explorer.html",
        paths.study / "workflow-report.html",
        study.comparison_files,
    localrule: True


if study.published:

    include: "workflow/rules/published.smk"

else:

    include: "workflow/rules/tokens.smk"
    include: "workflow/rules/plan.smk"
    include: "workflow/rules/certify.smk"
    include: "workflow/rules/train.smk"
    include: "workflow/rules/runs.smk"
    include: "workflow/rules/inference.smk"
    include: "workflow/rules/evaluate.smk"


include: "workflow/rules/fit.smk"
include: "workflow/rules/targets.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/explorer.smk"


if study.compared:

    include: "workflow/rules/compare.smk"


include: "workflow/rules/report.smk"
