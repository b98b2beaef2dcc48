from xlstm_scaling.kernels.certification.certificate import level_option, source_files, validity


rule certify:
    """The kernels of this hardware against float64; a run whose kernels failed refuses to train."""
    input:
        # where a kernel or its configuration changes, all are certified again, and nothing is trained again
        kernels=source_files(),
    output:
        certificate=paths.certificate(study.config.hardware.name),
    log:
        LOGS / "certificates" / f"{study.config.hardware.name}.log",
    benchmark:
        LOGS / "certificates" / f"{study.config.hardware.name}.tsv"
    conda:
        "../envs/xlstm-scaling.yaml"
    resources:
        **study.resources.one_device,
        mem_mb=2000,
        runtime=30,
    params:
        device=study.config.hardware.device,
        quick=level_option(study.config.hardware.certification),
        # another CPU, or another PyTorch
        validity=validity(study.config.hardware.device),
    shell:
        "xlstm-scaling certify --device {params.device} {params.quick} --report-only --quiet --out {output.certificate} > {log} 2>&1"
