"""A run's records (`run.jsonl`, TensorBoard) and the page that is drawn from them. Knows no rank and no engine."""

from effx_dist.report.page import write_report
from effx_dist.report.run_log import Event, Record, RunLog, RunNotFoundError, RunRecords, read_run
