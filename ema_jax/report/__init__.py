"""Reports: results in, one self-contained HTML page and its figures out."""

from ema_jax.report.html import write_replication_report, write_report, write_sweep_report

__all__ = ["write_replication_report", "write_report", "write_sweep_report"]
