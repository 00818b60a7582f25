"""What a run tells about itself: metrics files, the terminal's progress bar, and plain tables of results."""

from pangu_sigma.monitor.metrics_log import MetricsLog, read_metrics
from pangu_sigma.monitor.progress import TrainingProgress, progress
from pangu_sigma.monitor.text_tables import evaluation_line, matrix_table, quality_table, text_table

__all__ = [
    "MetricsLog",
    "TrainingProgress",
    "evaluation_line",
    "matrix_table",
    "progress",
    "quality_table",
    "read_metrics",
    "text_table",
]
