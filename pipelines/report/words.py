"""Numbers and strings as a reader sees them: escaped, rounded, with units; absent values are a dash.

* Everything that comes from a run passes through `esc` before it stands in HTML, and through `script_json` before it
  stands in a script element. There is no third way in.
* `finite` is the one gate for numbers: None, NaN, infinities, booleans and non-numbers all become None.
"""

from __future__ import annotations

import html
import json
import math
from typing import Any

DASH = "–"
NBSP = "\u00a0"


def esc(text: Any) -> str:
    """Text for HTML content and quoted attributes."""
    return html.escape(str(text), quote=True)


def script_json(value: Any) -> str:
    """JSON that cannot leave its script element: no ``<``, ``>`` or ``&`` survives, NaN and infinities become null."""
    text = json.dumps(_plain(value), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def finite(value: Any) -> float | None:
    """A finite float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: float | None, decimals: int = 2) -> str:
    """``1234.5 -> '1,234.50'``; None -> a dash; a minus is a minus sign."""
    if value is None:
        return DASH
    text = f"{value:,.{decimals}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-")
    return text.replace("-", "\u2212")


def significant(value: float | None, digits: int = 3) -> str:
    """Rounded to so many digits: 0.001234 -> '0.00123', 1234.5 -> '1,230' (never an exponent between 1e-6 and 1e9)."""
    if value is None:
        return DASH
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if not -6 <= size <= 9:
        return f"{value:.{digits - 1}e}"
    rounded = round(value, digits - 1 - size)
    return number(rounded, max(0, digits - 1 - size))


def ratio(value: float | None, decimals: int = 2) -> str:
    return DASH if value is None else f"{number(value, decimals)}×"


def percent(value: float | None, decimals: int = 0) -> str:
    """A share in [0, 1] as per cent; below 10 % one decimal more."""
    if value is None:
        return DASH
    return f"{number(100 * value, decimals + (0 < value < 0.0995))}{NBSP}%"


def seconds(value: float | None) -> str:
    """1.36 -> '1.36 s', 0.0123 -> '12.3 ms', 0.0000042 -> '4.20 µs'."""
    if value is None:
        return DASH
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= scale or unit == "µs":
            return f"{significant(value / scale)}{NBSP}{unit}"
    return DASH


def listed(words: list[str]) -> str:
    """['a', 'b', 'c'] -> 'a, b and c'."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""


def plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"
