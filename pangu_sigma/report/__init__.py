"""A run's metrics as one HTML file."""

from pangu_sigma.report.report_page import write_report

__all__ = ["write_report"]
