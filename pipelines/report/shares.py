"""Where the time goes: attention against the rest, and Amdahl's bound in one line.

* Drawn on one scale of seconds, dense first; the dashed line marks where the bar would end if attention cost nothing.
* "Rest" is everything else in the widest span that was measured (end to end, else the transformer).
"""

from __future__ import annotations

from dataclasses import dataclass

from foveal.pipelines.report.source import Method, Study, finite
from foveal.pipelines.report.table import swatch
from foveal.pipelines.report.words import esc, percent, ratio, seconds

LEVELS = ("end_to_end", "transformer")


@dataclass(frozen=True)
class Split:
    """Seconds of one method: attention, the rest of the transformer (None if not told apart), and everything else."""

    method: Method
    attention: float
    transformer: float | None
    rest: float

    @property
    def total(self) -> float:
        return self.attention + (self.transformer or 0.0) + self.rest


def split(m: Method) -> Split | None:
    """None when the run did not measure attention and a span around it, or when the spans do not nest."""
    attention = m.seconds("attention")
    whole = next((s for level in LEVELS if (s := m.seconds(level)) is not None), None)
    if attention is None or whole is None or not 0 <= attention <= whole:
        return None
    transformer = m.seconds("transformer")
    if transformer is None or not attention <= transformer < whole:
        return Split(m, attention, None, whole - attention)
    return Split(m, attention, transformer - attention, whole - transformer)


def share_and_bound(study: Study) -> tuple[float | None, float | None]:
    """Attention's share of dense time and the bound 1 / (1 - share): the run's, else worked out from dense seconds."""
    share, bound = finite(study.amdahl.get("attention_share")), finite(study.amdahl.get("bound"))
    dense = split(study.dense) if study.dense else None
    if share is None and dense is not None and dense.total > 0:
        share = dense.attention / dense.total
    if bound is None and share is not None and share < 1:
        bound = 1 / (1 - share)
    return share, bound


def shares_html(study: Study) -> str:
    """Stacked bars and the sentence on the bound. Empty string without measurements."""
    splits = [s for m in study.methods if (s := split(m)) is not None and s.total > 0]
    share, bound = share_and_bound(study)
    line = _sentence(share, bound)
    if not splits:
        return line
    longest = max(s.total for s in splits)
    dense = next((s for s in splits if s.method.is_dense), None)
    limit = None if dense is None else (dense.total - dense.attention) / longest
    rows = "".join(_bar(s, longest, limit) for s in splits)
    three = any(s.transformer is not None for s in splits)
    keys = [("attention", "attention"), *([("other", "rest of the transformer")] if three else [])]
    keys.append(("rest", "everything else"))
    legend = "".join(f'<span><i class="seg {c}" aria-hidden="true"></i>{t}</span>' for c, t in keys)
    mark = '<span><i class="mark" aria-hidden="true"></i>attention free of cost</span>' if limit is not None else ""
    return f'{line}<p class="legend keys">{legend}{mark}</p><ul class="shares">{rows}</ul>'


def _sentence(share: float | None, bound: float | None) -> str:
    if share is None or bound is None:
        return "<p>Attention's share of the time was not measured, so no bound is stated.</p>"
    return (
        f"<p>Attention takes {percent(share)} of the dense time here. Even attention that cost nothing could not make "
        f"the whole faster than 1 / (1 − {share:.2f}) = <strong>{ratio(bound)}</strong>: that is Amdahl's bound.</p>"
    )


def _bar(s: Split, longest: float, limit: float | None) -> str:
    parts = [("attention", s.attention, "attention"), ("rest", s.rest, "everything else")]
    if s.transformer is not None:
        parts.insert(1, ("other", s.transformer, "rest of the transformer"))
    bars = "".join(
        f'<span class="seg {c}" style="width:{100 * v / longest:.2f}%" data-tip="{esc(name)}: {seconds(v)}"></span>'
        for c, v, name in parts
    )
    words = ", ".join(f"{name} {seconds(v)}" for _, v, name in parts)
    mark = "" if limit is None else f'<i class="mark" style="left:{100 * limit:.2f}%" aria-hidden="true"></i>'
    text = f"{seconds(s.total)}, attention {percent(s.attention / s.total)}"
    return (
        f'<li><span class="who">{swatch(s.method)}{esc(s.method.label)}</span>'
        f'<span class="track" role="img" aria-label="{esc(words)}">{bars}{mark}</span>'
        f'<span class="sum">{esc(text)}</span></li>'
    )
