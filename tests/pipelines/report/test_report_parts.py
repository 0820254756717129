"""Laws of the parts: words, findings, Pareto fronts, labels, shares, tables."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from foveal.pipelines.report.finding import finding
from foveal.pipelines.report.glossary import term
from foveal.pipelines.report.heat import grid_of, heat_html
from foveal.pipelines.report.labels import Rect, place
from foveal.pipelines.report.scatter import SIZES, axis, points, scatter_html
from foveal.pipelines.report.shares import share_and_bound, split
from foveal.pipelines.report.source import Study, read_run
from foveal.pipelines.report.table import _ranges, summary_table
from foveal.pipelines.report.words import finite, listed, number, percent, script_json, seconds, significant

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def study(
    tmp_path: Path, fabricated: Callable[..., Any], rewrite: Callable[..., None]
) -> Callable[[int, Change | None], Study]:
    """Study 0 (speed) or 1 (quality), changed by a function."""
    document = fabricated(tmp_path, media=False, plans=False)

    def made(index: int, change: Change | None = None) -> Study:
        changed = copy.deepcopy(document)
        if change:
            change(changed["studies"][index])
        rewrite(tmp_path, changed)
        return read_run(tmp_path).studies[index]

    return made


# ---- words
def test_numbers_are_written_for_people() -> None:
    assert (
        number(1234.5) == "1,234.50"
        and number(-0.001, 1) == "0.0"
        and number(-1.5, 1) == "−1.5"
        and number(None) == "–"
    )
    assert significant(0.001234) == "0.00123" and significant(1234.5) == "1,230" and significant(0.99996) == "1.000"
    assert percent(0.25) == "25\u00a0%" and percent(0.041) == "4.1\u00a0%"
    assert seconds(1.36) == "1.36\u00a0s" and seconds(0.0123) == "12.3\u00a0ms" and seconds(0) == "0\u00a0µs"
    assert listed(["a"]) == "a" and listed(["a", "b", "c"]) == "a, b and c" and listed([]) == ""
    assert _ranges(["0", "1", "2", "5"]) == "0–2 and 5"


@pytest.mark.parametrize("value", [None, math.nan, math.inf, True, "1", [1]])
def test_only_finite_numbers_are_numbers(value: Any) -> None:
    assert finite(value) is None


def test_json_in_a_script_cannot_end_it() -> None:
    text = script_json({"a": "</script><!--&", "b": [math.nan, 1.0]})
    assert "<" not in text and ">" not in text and "&" not in text and "null" in text


def test_an_unknown_metric_is_still_described() -> None:
    assert term("never_heard_of", False).direction == "lower is better"
    assert term("vbench.temporal_flickering").up is True


# ---- findings
def test_the_finding_names_the_closest_and_the_fastest(study: Callable[..., Study]) -> None:
    first = finding(study(0))[0]
    assert first.startswith("Closest to dense was neighbourhood 5x16x16 (PSNR 24.9 dB) at 1.22×")
    assert "fastest was GRAT-B b=1: 1.42× (attention alone could give at most 1.93×)" in first


def _slow(s: dict[str, Any]) -> None:
    for m in s["methods"][1:]:
        m["speed"]["speedup"]["end_to_end"] *= 0.6


def _unsure(s: dict[str, Any]) -> None:
    for m in s["methods"][1:]:
        m["speed"]["speedup"]["end_to_end"] = {"value": 1.1, "ci95": [0.9, 1.3]}


@pytest.mark.parametrize("change", [_slow, _unsure], ids=["slower", "interval-below-one"])
def test_no_gain_is_said_first(study: Callable[..., Study], change: Change) -> None:
    assert finding(study(0, change))[0].startswith("No method was faster than dense end to end")


def test_overlapping_intervals_are_not_settled(study: Callable[..., Study]) -> None:
    assert "overlaps that of GRAT-B b=2" in finding(study(1))[0]


def _apart(s: dict[str, Any]) -> None:
    best = s["methods"][4]["metrics"][0]
    best["value"], best["ci95"] = 40.0, [39.0, 41.0]


def test_clear_intervals_are_clear(study: Callable[..., Study]) -> None:
    assert "clear of GRAT-B b=2" in finding(study(1, _apart))[0]


def test_single_samples_and_few_rounds_are_said(study: Callable[..., Study]) -> None:
    said = " ".join(finding(study(0)))
    assert "single observation" in said and "3 rounds only" in said and "Densities differ" in said


def test_one_sample_is_right_or_wrong(study: Callable[..., Study]) -> None:
    def change(s: dict[str, Any]) -> None:
        for i, m in enumerate(s["methods"]):
            next(x for x in m["metrics"] if x["id"] == "acc_all")["value"] = float(i in (0, 4))

    said = "came out right with dense and neighbourhood 5x16x16, but not with GRAT-B b=1, GRAT-B b=2 and neighbourhood"
    assert said in " ".join(finding(study(0, change)))


def test_a_share_of_one_sample_is_no_share(study: Callable[..., Study]) -> None:
    single = study(0)
    assert "every attribute right" not in " ".join(finding(single))
    assert "all correct" not in scatter_html(single)
    assert "every attribute right: 94.0" in " ".join(finding(study(1)))


# ---- plots
def test_the_front_holds_what_nobody_beats(study: Callable[..., Study]) -> None:
    for name, sign in (("psnr", 1), ("step_rel_l1", -1)):
        found = points(study(0), name, speed=True)
        for p in found:
            beaten = any(
                q is not p
                and q.x.value >= p.x.value
                and sign * q.y.value >= sign * p.y.value
                and (q.x.value > p.x.value or q.y.value != p.y.value)
                for q in found
            )
            assert p.front == (not beaten)


def test_dense_is_no_point_of_its_own_fidelity(study: Callable[..., Study]) -> None:
    assert not any(p.method.is_dense for p in points(study(0), "psnr", speed=True))
    assert any(p.method.is_dense for p in points(study(0), "world_psnr", speed=True))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("spread", [60, 25], ids=["wide", "crowded"])
def test_labels_do_not_cover_each_other(size: tuple[int, int], spread: int) -> None:
    area = Rect(54, 14, size[0] - 16, size[1] - 46)
    x, y = size[0] / 2, size[1] / 2
    crowd = [(x + spread * dx, y + spread * dy / 2, f"method {dx} {dy}") for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
    labels = place(crowd, area)
    assert all(a.box.overlap(b.box) == 0 for a, b in combinations(labels, 2))
    assert all(label.box.outside(area) < 1e-6 for label in labels)


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [20.1, 20.2], [-3.0, 1e4], [1e-7, 2e-7]])
def test_axes_hold_their_values_and_some_ticks(values: list[float]) -> None:
    a = axis(values)
    assert a.low < min(values) and max(values) < a.high and 2 <= len(a.ticks) <= 12


def test_ragged_maps_are_filled_with_nothing() -> None:
    assert grid_of([[1, 2], [3]]) == [[1.0, 2.0], [3.0, None]]
    assert grid_of("x") == [] and grid_of([]) == [] and grid_of([[]]) == []


def test_equal_cells_share_a_rectangle(study: Callable[..., Study]) -> None:
    html = heat_html(study(0))
    first = html[html.index('<figure class="heat"') :].split("</svg>")[0]
    assert first.count("<rect") == 8
    assert "18.0\u00a0% everywhere" in html


# ---- shares and tables
def test_the_bound_follows_from_the_share(study: Callable[..., Study]) -> None:
    found = study(0, lambda s: s.pop("amdahl"))
    share, bound = share_and_bound(found)
    assert share == pytest.approx(5.4 / 11.2) and bound == pytest.approx(1 / (1 - 5.4 / 11.2))
    parts = split(found.methods[1])
    assert parts is not None and parts.total == pytest.approx(11.2 / 1.42)


def _upside_down(s: dict[str, Any]) -> None:
    s["methods"][1]["speed"]["attention"]["median_s"] = 99


def test_spans_that_do_not_nest_are_not_drawn(study: Callable[..., Study]) -> None:
    assert split(study(0, _upside_down).methods[1]) is None


def test_fidelity_and_quality_are_separate_groups(study: Callable[..., Study]) -> None:
    html = summary_table(study(0))
    groups = [html.index(f">{g}<") for g in ("Work", "Speed-up over dense", "Fidelity to dense", "Quality", "Record")]
    assert groups == sorted(groups)
    assert html.index(">PSNR\u00a0↑<") < html.index(">motion PSNR\u00a0↑<") < html.index(">world PSNR\u00a0↑<")
    assert "bound\u00a01.93×" in html and "at density\u00a01.65×" in html and "eff 0.74" in html


def test_stand_ins_carry_a_mark(study: Callable[..., Study]) -> None:
    assert "smoothness†" in summary_table(study(0))


def test_rows_sort_by_plain_numbers(study: Callable[..., Study]) -> None:
    assert 'data-v="21.3"' in summary_table(study(0))
