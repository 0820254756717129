"""The finding of a study in a few plain sentences, computed from its numbers and never rosier than they are.

* Closest to dense is judged by the first fidelity metric that the run has; fastest by end-to-end speed-up.
* A speed-up counts only above 1, and where there is an interval only if its low end is above 1.
* Overlapping intervals are said to overlap; single samples are said to be single.
"""

from __future__ import annotations

from foveal.pipelines.report.glossary import term
from foveal.pipelines.report.shares import share_and_bound
from foveal.pipelines.report.source import Method, Metric, Study, finite, mapping, sequence
from foveal.pipelines.report.words import listed, percent, plural, ratio

FIDELITY = ("psnr", "step_rel_l1", "ssim", "psnr_pooled", "mse", "latent_rel_l2")
QUALITY = ("acc_all", "world_psnr", "emoji_psnr")
FEW_ROUNDS = 5
LIKE = 1.15  # densities within this factor count as equal budgets


def finding(study: Study) -> list[str]:
    """The finding, then what must be known with it; plain text."""
    if not study.sparse:
        return ["Only dense attention ran, so there is nothing to compare."]
    parts = [
        _with_speed(study) if study.has_speed else _without_speed(study),
        _single(study),
        _quality(study),
        _budgets(study),
        _timing(study),
        _samples(study),
    ]
    return [p for p in parts if p]


def fidelity_metric(study: Study) -> str | None:
    return next((i for i in FIDELITY if any(m.value(i) is not None for m in study.sparse)), None)


def closest(study: Study, name: str) -> list[Method]:
    """Sparse methods that have the metric, closest to dense first."""
    found = [m for m in study.sparse if m.value(name) is not None]
    sign = -1.0 if _up(study, name) else 1.0
    return sorted(found, key=lambda m: (sign * (m.value(name) or 0.0), m.index))


def _up(study: Study, name: str) -> bool:
    return term(name, getattr(study.sample_metric(name), "higher_is_better", None)).up is not False


def _said(study: Study, m: Method, name: str) -> str:
    """'PSNR 24.1 dB [22.0, 26.3]'."""
    t, metric = term(name), m.metric(name)
    if metric is None:
        return f"{t.head} not computed"
    v = metric.value
    span = f" [{t.write(v.low)}, {t.write(v.high)}]" if v.has_interval else ""
    return f"{t.head} {t.write(v.value)}{' ' + t.unit if t.unit else ''}{span}"


def gains(m: Method) -> bool:
    """Faster than dense end to end, beyond the interval where there is one."""
    up = m.speedup("end_to_end")
    edge = up.low if up.low is not None else up.value
    return edge is not None and edge > 1.0


def _with_speed(study: Study) -> str:
    timed = [m for m in study.sparse if m.speedup("end_to_end").value is not None]
    fast = max(timed, key=lambda m: (m.speedup("end_to_end").value or 0.0, -m.index))
    name, (_, bound) = fidelity_metric(study), share_and_bound(study)
    limit = f" (attention alone could give at most {ratio(bound)})" if bound is not None else ""
    near = closest(study, name)[0] if name else None
    if not any(gains(m) for m in timed):
        text = f"No method was faster than dense end to end: the best, {fast.label}, reached {_speed(fast)}{limit}."
        return text + (f" Closest to dense was {near.label}, {_said(study, near, name)}." if near and name else "")
    if near is None or name is None:
        return f"Fastest was {fast.label} at {_speed(fast)} end to end{limit}; closeness to dense was not computed."
    if near is fast:
        return (
            f"{near.label} was both the closest to dense ({_said(study, near, name)}) and the fastest: "
            f"{_speed(near)} end to end at {_dense(near)}{limit}."
        )
    return (
        f"Closest to dense was {near.label} ({_said(study, near, name)}) at {_speed(near)} end to end "
        f"and {_dense(near)}; fastest was {fast.label}: {_speed(fast)}{limit}, {_said(study, fast, name)}."
    )


def _speed(m: Method) -> str:
    up = m.speedup("end_to_end")
    if up.value is None:
        return "an unmeasured speed"
    return ratio(up.value) + (f" [{ratio(up.low)}, {ratio(up.high)}]" if up.has_interval else "")


def _dense(m: Method) -> str:
    return f"{percent(m.density)} density" if m.density is not None else "unknown density"


def _without_speed(study: Study) -> str:
    name = fidelity_metric(study)
    if name is None:
        return "Neither speed nor closeness to dense was measured."
    order = closest(study, name)
    first = order[0]
    text = (
        f"No speed is claimed here. Closest to dense was {first.label}: {_said(study, first, name)} at {_dense(first)}"
    )
    if len(order) == 1:
        return text + "."
    other = order[1]
    a, b = first.metric(name), other.metric(name)
    if a is None or b is None or not (a.value.has_interval and b.value.has_interval):
        return f"{text}, before {other.label} ({_said(study, other, name)})."
    clear = (a.value.low or 0) > (b.value.high or 0) if _up(study, name) else (a.value.high or 0) < (b.value.low or 0)
    if clear:
        return f"{text}, clear of {other.label} ({_said(study, other, name)})."
    rival = f"{other.label} ({_said(study, other, name)})"
    return f"{text}; its interval overlaps that of {rival}, so their order is not settled."


def _counts(metric: Metric | None) -> bool:
    return metric is not None and metric.value.value is not None and not metric.single_share


def _single(study: Study) -> str:
    """With one sample, accuracy is a plain yes or no."""
    rated = [(m, found) for m in study.methods if (found := m.metric("acc_all")) and found.single_share]
    right = [m.label for m, found in rated if found.value.value == 1]
    wrong = [m.label for m, found in rated if found.value.value == 0]
    if not right and not wrong:
        return ""
    if not wrong:
        return f"Every attribute of the prompt came out right with {listed(right)}."
    if not right:
        return f"No method got every attribute of the prompt right: not {listed(wrong)}."
    return f"Every attribute of the prompt came out right with {listed(right)}, but not with {listed(wrong)}."


def _quality(study: Study) -> str:
    """What became of the no-reference quality, worst first."""
    dense = study.dense
    name = next(
        (
            i
            for i in QUALITY
            if dense and _counts(dense.metric(i)) and any(m.value(i) is not None for m in study.sparse)
        ),
        None,
    )
    if name is None or dense is None:
        return ""
    rated = sorted(
        (m for m in study.sparse if m.value(name) is not None), key=lambda m: (m.value(name) or 0.0, m.index)
    )
    low, high, t = rated[0], rated[-1], term(name)
    what = "Samples with every attribute right" if name == "acc_all" else f"{t.head[0].upper()}{t.head[1:]} ({t.unit})"
    head = f"{what}: {t.write(dense.value(name))} with dense"
    if low is high or low.value(name) == high.value(name):
        return f"{head}, {t.write(low.value(name))} with {low.label if low is high else 'every sparse method'}."
    span = f"from {t.write(low.value(name))} ({low.label}) to {t.write(high.value(name))} ({high.label})"
    return f"{head}, {span} with sparse methods."


def _budgets(study: Study) -> str:
    found = [m.density for m in study.sparse if m.density]
    if len(found) > 1 and max(found) / min(found) > LIKE:
        span = f"{percent(min(found))} to {percent(max(found))}"
        return f"Densities differ ({span}): compare along the plot, not row by row."
    return ""


def _timing(study: Study) -> str:
    """How firm the times are."""
    if not study.has_speed:
        return ""
    rounds = [
        n for m in study.methods if (n := finite(mapping(mapping(m.raw.get("speed")).get("end_to_end")).get("n")))
    ]
    text = ""
    if rounds and min(rounds) < FEW_ROUNDS:
        text = f"Times are from {plural(int(min(rounds)), 'round')} only: a few per cent of difference mean nothing."
    if (finite(study.design.get("sittings")) or 1) > 1:
        text += " They were not taken in one sitting, so the machine may have changed between methods."
    return text.strip()


def _samples(study: Study) -> str:
    prompts, seeds = len(sequence(study.design.get("prompts"))), len(sequence(study.design.get("seeds")))
    return "One prompt and one seed: a single observation, no interval." if prompts == seeds == 1 else ""
