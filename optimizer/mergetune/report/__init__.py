"""The report of a run directory: gathered first (`data`), drawn second (`charts`, `page`)."""

from mergetune.report.data import ReportData, gather
from mergetune.report.page import write_report

__all__ = ["ReportData", "gather", "write_report"]
