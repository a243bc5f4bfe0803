"""RobustBench-format results and reports."""
