"""RobustBench-format results and reports."""

from at_extensions.publishing.model_info import Paper, check_model_info, eps_fraction, model_info, write_model_info
from at_extensions.publishing.report import write_report

__all__ = ["Paper", "check_model_info", "eps_fraction", "model_info", "write_model_info", "write_report"]
