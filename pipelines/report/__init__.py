"""The report of a run: one self-contained HTML page."""

from foveal.pipelines.report.page import build_report
from foveal.pipelines.report.source import ReportError

__all__ = ["ReportError", "build_report"]
