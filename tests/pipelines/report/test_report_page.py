"""Laws of the page: one well-formed file, nothing from outside, everything escaped, the same bytes for the same run."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from foveal.pipelines.report import build_report

VOID = {"meta", "br", "img", "input", "hr", "link"}
SVG_LEAVES = {"circle", "rect", "line", "path", "polyline"}


class Page(HTMLParser):
    """Checks nesting while it reads and keeps what tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.errors: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        names = [a for a, _ in attrs]
        if len(names) != len(set(names)):
            self.errors.append(f"attribute twice on {tag}")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in SVG_LEAVES | VOID:
            self.errors.append(f"self-closing {tag}")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}> out of place")

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, fabricated: Callable[..., Any]) -> str:
    folder = tmp_path_factory.mktemp("run")
    fabricated(folder)
    return build_report(folder).read_text(encoding="utf-8")


def test_the_page_is_well_formed(built: str) -> None:
    page = Page(built)
    assert page.errors == []
    assert page.open == []


def test_ids_are_unique_and_links_inside_the_page_arrive(built: str) -> None:
    page = Page(built)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [h[1:] for a in page.all("a") if (h := a.get("href") or "").startswith("#")]
    assert targets and set(targets) <= set(ids)


def test_nothing_is_asked_from_outside(built: str) -> None:
    page = Page(built)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:")), f"{tag} {name}={value[:60]}"
    assert not re.search(r"url\((?![\"']?data:)", built)
    assert "@import" not in built and "fetch(" not in built and "XMLHttpRequest" not in built
    left = built.replace("http://www.w3.org/2000/svg", "")  # a name, not an address: SVG elements made by the script
    assert "http://" not in left and "https://" not in left
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")


def test_pictures_and_graphics_have_words(built: str) -> None:
    page = Page(built)
    assert all(a.get("alt") for a in page.all("img"))
    assert all(a.get("aria-label") for _, a in page.tags if a.get("role") in ("img", "region"))
    assert all(a.get("aria-label") or a.get("aria-hidden") for a in page.all("svg"))


def test_headings_never_skip_a_level(built: str) -> None:
    levels = [int(t[1]) for t, _ in Page(built).tags if re.fullmatch("h[1-6]", t)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))


def test_the_same_run_gives_the_same_bytes(tmp_path: Path, fabricated: Callable[..., Any]) -> None:
    fabricated(tmp_path)
    first = build_report(tmp_path).read_bytes()
    assert build_report(tmp_path).read_bytes() == first


def test_the_demo_stays_under_six_megabytes(built: str) -> None:
    assert len(built) < 6_000_000


def test_toy_numbers_are_never_presented_as_others(built: str) -> None:
    text = Page(built).text()
    assert text.count("Toy model.") == 2
    assert "do not predict, numbers of Wan, Flux or any large model" in text


def test_every_part_is_there(built: str) -> None:
    text = Page(built).text()
    parts = ("See it", "The numbers", "Quality against speed", "Quality against work", "What a query sees")
    for part in (*parts, "Layer by layer, step by step", "Attention and the rest", "Repeat it", "Glossary"):
        assert part in text, part
    assert "1 / (1 − 0.48) = 1.93×" in text
    assert "8 calls dense_layers (layer 0)" in text
    assert "Noise floor" in text and "58.2" in text
    assert "lpips alex not computed: its weights are not on this machine" in text


def test_the_link_holds_result_json_bit_by_bit(tmp_path: Path, fabricated: Callable[..., Any]) -> None:
    fabricated(tmp_path)
    page = Page(build_report(tmp_path).read_text(encoding="utf-8"))
    link = next(a["href"] for a in page.all("a") if a.get("download") == "result.json")
    assert link is not None
    assert base64.b64decode(link.partition("base64,")[2]) == (tmp_path / "result.json").read_bytes()


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&`${1}"


def test_strings_of_a_run_cannot_become_markup(
    tmp_path: Path, fabricated: Callable[..., Any], rewrite: Callable[..., None]
) -> None:
    document = fabricated(tmp_path)
    clean = Page(build_report(tmp_path).read_text(encoding="utf-8"))
    (tmp_path / "config.yaml").write_text(EVIL, encoding="utf-8")
    rewrite(tmp_path, _poisoned(document, {"id", "schema", "family", "folder"}))
    text = build_report(tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert page.errors == []
    assert [t for t, _ in page.tags].count("script") == [t for t, _ in clean.tags].count("script")
    assert not any(name.startswith("on") for _, a in page.tags for name in a)
    assert "alert(2)>" not in text
    assert EVIL in page.text()


def _poisoned(value: Any, keep: set[str]) -> Any:
    """The document with every string made hostile, ids apart."""
    if isinstance(value, dict):
        return {k: v if k in keep else _poisoned(v, keep) for k, v in value.items()}
    if isinstance(value, list):
        return [_poisoned(v, keep) for v in value]
    return value + EVIL if isinstance(value, str) else value


def test_data_in_scripts_is_json(built: str) -> None:
    found = re.findall(r'<script type="application/json" data-for="(\w+)">(.*?)</script>', built, re.S)
    assert [kind for kind, _ in found] == ["player", "plan"] * 2
    for _, text in found:
        json.loads(text)


def test_a_hostile_id_cannot_leave_the_folder(
    tmp_path: Path, fabricated: Callable[..., Any], rewrite: Callable[..., None]
) -> None:
    run = tmp_path / "run"
    document = fabricated(run, media=False, plans=False)
    other = tmp_path / "secret" / "x"
    other.mkdir(parents=True)
    (other / "0-0.safetensors").write_bytes(b"")
    document["studies"][0]["methods"][1]["id"] = "../../../secret/x"
    document["studies"][0]["folder"] = ".."
    rewrite(run, document)
    assert "kept no readable frames" in build_report(run).read_text(encoding="utf-8")
