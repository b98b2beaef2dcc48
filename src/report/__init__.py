"""What a study found, in sentences computed from its tables."""

from xlstm_scaling.report.findings import findings, write_findings

__all__ = ["findings", "write_findings"]
