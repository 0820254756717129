"""`foveal doctor --matrix` and docs/composition.md tell the host's own data, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from foveal import cli
from foveal.pipelines import matrix
from foveal.plugins.diffusers_host.composition import CONDITIONS, NAMES, ORDERS, cells, verdict

ROOT = Path(__file__).resolve().parents[2]


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return ended.value.code, capsys.readouterr().out


def test_the_page_is_current():
    text = (ROOT / "docs" / "composition.md").read_text(encoding="utf-8")
    assert text == matrix.page(), "write it anew: python -m foveal.pipelines.matrix"


def test_the_command_writes_the_page(tmp_path):
    target = tmp_path / "page.md"
    subprocess.run([sys.executable, "-m", "foveal.pipelines.matrix", str(target)], check=True, capture_output=True)
    assert target.read_text(encoding="utf-8") == matrix.page()


def test_json_gives_every_cell(capsys):
    code, out = call(capsys, "doctor", "--matrix", "--json")
    rows = json.loads(out)
    assert code == 0 and len(rows) == len(CONDITIONS) * len(NAMES) * len(ORDERS)
    for row in rows:
        found = verdict(row["host"], row["condition"], row["order"])
        assert (row["outcome"], row["reason"]) == (found.outcome, found.reason)


def test_every_condition_is_a_line_and_every_reason_a_sentence_of_the_table(capsys):
    code, out = call(capsys, "doctor", "--matrix")
    assert code == 0
    for condition in CONDITIONS:
        assert f"| {condition.name} " in out
    told = " ".join(out.split())
    for reason in {found.reason for *_, found in cells() if found.reason}:
        assert f"] {reason}" in told


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda c: c.name)
def test_the_lists_of_a_line_name_every_cell_once(condition):
    seen = []
    for outcomes in matrix.columns():
        text = matrix.told(condition, outcomes, matrix.Reasons())
        for part in filter(None, text.split("; ")):
            orders = [order for order in ORDERS if f"({order})" in part] or ORDERS
            names = part.split(" (")[0].split(" [")[0]
            hosts = names_of(names)
            seen += [(host, order) for host in hosts for order in orders]
            assert all(verdict(host, condition.name, order).outcome in outcomes for host in hosts for order in orders)
    assert sorted(seen) == sorted((host, order) for host in NAMES for order in ORDERS)


def names_of(text):
    """Hosts of "all", "all but a, b" or "a, b"."""
    listed = text.removeprefix("all but ").split(", ")
    if text == "all":
        return list(NAMES)
    return [name for name in NAMES if name not in listed] if text.startswith("all but ") else listed


def test_the_matrix_is_told_without_diffusers():
    code = "import sys; sys.modules['diffusers'] = None; from foveal.pipelines.matrix import page; page()"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
