"""Compiling in tests without the compiler's trace log."""

import logging
from contextlib import contextmanager


@contextmanager
def quiet_compiler():
    """pytest would capture the trace log, which makes compiling four times as slow."""
    trace = logging.getLogger("torch.__trace")
    before, trace.disabled = trace.disabled, True
    try:
        yield
    finally:
        trace.disabled = before
