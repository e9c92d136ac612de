"""The report of a run directory: gathered first (`data`), drawn second (`page`, `pictures`)."""

from mergetune.report.compare import write_comparison
from mergetune.report.data import ReportData, gather
from mergetune.report.page import write_report, write_slide

__all__ = ["ReportData", "gather", "write_comparison", "write_report", "write_slide"]
