"""RobustBench-format results, reports, submissions that RobustBench can load, and a leaderboard."""

from at_extensions.publishing.criticality import read_criticality, write_criticality
from at_extensions.publishing.leaderboard import leaderboard
from at_extensions.publishing.model_info import Paper, check_model_info, eps_fraction, model_info, write_model_info
from at_extensions.publishing.report import write_report
from at_extensions.publishing.run_info import write_run_info
from at_extensions.publishing.submission import publish
from at_extensions.publishing.verification import Check, Verification, verify
from at_extensions.publishing.zoo import Published, register

__all__ = [
    "Check",
    "Paper",
    "Published",
    "Verification",
    "check_model_info",
    "eps_fraction",
    "leaderboard",
    "model_info",
    "publish",
    "read_criticality",
    "register",
    "verify",
    "write_criticality",
    "write_model_info",
    "write_report",
    "write_run_info",
]
