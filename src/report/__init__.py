"""What a study found: sentences computed from its tables, and the table of optima."""

from xlstm_scaling.report.findings import findings, write_findings
from xlstm_scaling.report.optimal import optimal_table

__all__ = ["findings", "optimal_table", "write_findings"]
