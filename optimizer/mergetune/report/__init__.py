"""The report of a run directory: gathered first (`data`), drawn second (`charts`, `page`)."""

from optimizer.report.data import ReportData, gather
from optimizer.report.page import write_report

__all__ = ["ReportData", "gather", "write_report"]
