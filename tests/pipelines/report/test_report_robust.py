"""Laws of missing and broken input: every field may be absent, and what is wrong is said in one sentence."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foveal.pipelines.report import ReportError, build_report

Fabricate = Callable[..., dict[str, Any]]
Rewrite = Callable[..., None]


def read(folder: Path) -> str:
    return build_report(folder).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No readable result.json"),
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1]", "holds a list"),
        ('{"schema": 2, "methods": [{}]}', "has schema 2"),
        ("{}", "lists no studies and no methods"),
        ('{"studies": [{"title": "x"}]}', "studies without methods"),
        ("\xff", "not valid JSON"),
    ],
)
def test_a_broken_result_is_one_clear_sentence(tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "result.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ReportError, match=says) as caught:
        build_report(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_is_not_there_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="give the folder of a finished run"):
        build_report(tmp_path / "nothing")


def test_the_smallest_result_still_gives_a_page(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"schema": 1, "methods": [{"id": "dense"}]}', encoding="utf-8")
    text = read(tmp_path)
    assert "Only dense attention ran" in text and "did not record its command" in text


def test_every_field_may_be_missing(tmp_path: Path, fabricated: Fabricate, rewrite: Rewrite) -> None:
    document = fabricated(tmp_path, media=False, plans=False)
    document["studies"] = document["studies"][:1]
    for path in _paths(document["studies"][0]):
        if path == ["methods"]:
            continue  # that is no study
        changed = copy.deepcopy(document)
        _remove(changed["studies"][0], path)
        rewrite(tmp_path, changed)
        assert "<h1>" in read(tmp_path), path


@pytest.mark.parametrize("wrong", ["text", 3.5, [[]], {"value": {}}], ids=["string", "number", "list", "object"])
def test_every_field_may_be_of_a_wrong_type(
    tmp_path: Path, fabricated: Fabricate, rewrite: Rewrite, wrong: Any
) -> None:
    document = fabricated(tmp_path, media=False, plans=False)
    document["studies"] = document["studies"][:1]
    for path in _paths(document["studies"][0]):
        if path == ["methods"]:
            continue  # that is no study
        changed = copy.deepcopy(document)
        _put(changed["studies"][0], path, wrong)
        rewrite(tmp_path, changed)
        assert "<h1>" in read(tmp_path), path


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_become_dashes(
    tmp_path: Path, fabricated: Fabricate, rewrite: Rewrite, bad: float
) -> None:
    document = fabricated(tmp_path, media=False, plans=False)
    rewrite(tmp_path, _all_numbers(document, bad))
    text = read(tmp_path).lower()
    for word in (">nan", ">inf", "nan db", "infinity×", ">-inf", "nan×"):
        assert word not in text


def test_one_method_alone_is_reported(tmp_path: Path, fabricated: Fabricate, rewrite: Rewrite) -> None:
    document = fabricated(tmp_path)
    for study in document["studies"]:
        study["methods"] = study["methods"][1:2]
    rewrite(tmp_path, document)
    assert "GRAT-B b=1" in read(tmp_path)


def test_damaged_media_and_plans_cost_only_themselves(tmp_path: Path, fabricated: Fabricate) -> None:
    fabricated(tmp_path)
    home = tmp_path / "world-video"
    (home / "media" / "dense" / "0-0.safetensors").write_bytes(b"broken")
    (home / "plans" / "na-3.safetensors").write_bytes(b"broken")
    text = read(tmp_path)
    assert "No plan drawn for neighbourhood 3x16x16: its file could not be read (PlanFileError)." in text


def test_a_run_without_media_or_plans_says_so(tmp_path: Path, fabricated: Fabricate) -> None:
    fabricated(tmp_path, media=False, plans=False)
    text = read(tmp_path)
    assert "kept no readable frames" in text and "the run kept no plan" in text


def test_a_study_without_speed_makes_no_speed_claim(tmp_path: Path, fabricated: Fabricate, rewrite: Rewrite) -> None:
    document = fabricated(tmp_path, media=False, plans=False)
    document["studies"] = document["studies"][1:]
    rewrite(tmp_path, document)
    text = read(tmp_path)
    assert "No speed is claimed here." in text
    assert "Speed-up over dense" not in text and "Attention and the rest" not in text


def test_a_result_without_studies_is_one_study(tmp_path: Path, fabricated: Fabricate, rewrite: Rewrite) -> None:
    document = fabricated(tmp_path)
    flat = {**{k: v for k, v in document.items() if k != "studies"}, **document["studies"][0]}
    rewrite(tmp_path, flat)
    assert read(tmp_path).count('<article class="study"') == 1


# ---- walking the document
def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[list[Any]]:
    """Every path in a study; of lists only the last entry."""
    last = [(len(value) - 1, value[-1])] if isinstance(value, list) and value else []
    items = value.items() if isinstance(value, dict) else last
    out = []
    for key, inner in items:
        out.append([*at, key])
        out += _paths(inner, (*at, key)) if len(at) < 5 else []
    return out


def _remove(value: Any, path: list[Any]) -> None:
    for key in path[:-1]:
        value = value[key]
    del value[path[-1]]


def _put(value: Any, path: list[Any], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def _all_numbers(value: Any, new: float) -> Any:
    if isinstance(value, dict):
        return {k: v if k == "schema" else _all_numbers(v, new) for k, v in value.items()}
    if isinstance(value, list):
        return [_all_numbers(v, new) for v in value]
    return new if isinstance(value, (int, float)) and not isinstance(value, bool) else json.loads(json.dumps(value))
