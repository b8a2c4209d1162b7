"""What a run tells while and after it runs: metrics, progress, report."""

from megatron_bicc.monitoring.progress import ProgressBar
from megatron_bicc.monitoring.report import write_report
from megatron_bicc.monitoring.run_log import RunLog
from megatron_bicc.monitoring.writer import MetricsWriter, write_groups

__all__ = ["MetricsWriter", "ProgressBar", "RunLog", "write_groups", "write_report"]
