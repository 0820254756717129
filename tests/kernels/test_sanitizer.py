"""What the sanitizer's reports are taken for."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def role_reports(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "sanitize", raising=False)
    from sanitize import role_reports

    return role_reports


def report(read: int, *writes: int) -> str:
    text = f"========= Error: Race reported between Read access at block_sparse_hopper+0xf0 in hopper.py:{read}\n"
    return text + "".join(
        f"=========     and Write access at block_sparse_hopper+0x90b0 in hopper.py:{x} [15 hazards]\n" for x in writes
    )


def test_only_reports_about_the_handing_out_of_roles_are_set_apart(role_reports):
    lines = (ROOT / "kernels/block_sparse/hopper.py").read_text().splitlines()
    first, roles = (
        next(i for i, x in enumerate(lines, 1) if mark in x)
        for mark in ("def block_sparse_hopper(", "gl.warp_specialize(")
    )
    harmless, real = report(first, first, roles), report(first, first, roles - 50)
    assert role_reports(harmless) == 1 and role_reports(real) == 0
    assert role_reports(harmless + "========= \n" + real + "========= \n" + harmless) == 2
    assert (
        role_reports(report(roles, first) + "=========     and Write access at other+0x10 in other.py:3 [1 hazards]\n")
        == 0
    )
