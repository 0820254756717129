"""Without a GPU, Triton's kernels run in Triton's interpreter; the switch must be set before they are defined."""

import os
from collections import Counter
from pathlib import Path

import torch

# Seconds that each room's tests may take on two idle cores; all of CI stays under 25 minutes. Printed beside what they took.
BUDGETS = {"kernels": 300, "plugins": 420, "pipelines": 360, "vision": 120, "foveal": 180}

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_terminal_summary(terminalreporter):
    """What each room took, against its budget."""
    took = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            parts = Path(getattr(report, "nodeid", "").split("::")[0]).parts
            if len(parts) > 1 and hasattr(report, "duration"):
                took[parts[1]] += report.duration
    for room, seconds in sorted(took.items()):
        budget = BUDGETS.get(room)
        over = " OVER BUDGET" if budget and seconds > budget else ""
        terminalreporter.write_line(f"{room}: {seconds:.0f} s of {budget} s{over}")
