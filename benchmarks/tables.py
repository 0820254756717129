"""Draw what is drawn from data: the README's tables, docs/benchmarks.md, configs/presets/measured.json and docs/presets.md.

``python benchmarks/tables.py`` rewrites them (of README.md the marked parts); ``--check`` exits 1 where one is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys

import bench_page
import preset_page
from records import ROOT

from foveal.kernels.block_sparse import support_table


def static_methods() -> str:
    """GRAT and neighbourhood attention on a GPU, operator and share of the token order."""
    record = json.loads((ROOT / "benchmarks/results/static_methods.json").read_text())
    versions = record["versions"]
    lines = [
        f"{record['device']}, torch {versions['torch']}, triton {versions['triton']}, {record['date']}, bf16, head dim 128, "
        f"median of at least {record['rounds']} interleaved rounds; `{record['command']}`.",
        "",
        "| case | tokens x heads | method, setting | density | dense (fastest SDPA) | ours | speed-up | of 1 / density | order's share |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    dense = {(r["case"], r["impl"]): r["ms"] for r in record["rows"] if r["op"] == "dense_fwd"}
    for row in record["rows"]:
        if row["method"] is None or "order" not in row["includes"] or row.get("failed"):
            continue
        base = f"{dense[row['case'], row['baseline']]:.2f} ms ({row['baseline']})"
        shape = f"{row['shape']['tokens']:,} x {row['shape']['heads']}"
        share = f"{row['order_share']:.1%}" if row["order_share"] > 0 else "below noise"
        lines.append(
            f"| {row['case']} | {shape} | {row['setting']} | {row['density']:.3f} | {base} | {row['ms']:.2f} ms | "
            f"{row['speedup']:.2f}x | {row['eff']:.2f} | {share} |"
        )
    return "\n".join(lines)


PARTS = {"support": support_table, "static_methods": static_methods}


def readme() -> str:
    """README.md with every marked part drawn anew."""
    text = (ROOT / "README.md").read_text()
    for name, draw in PARTS.items():
        start, stop = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        before, rest = text.split(start)
        after = rest.split(stop)[1]
        text = f"{before}{start}\n{draw()}\n{stop}{after}"
    return text


# In this order: the presets' page reads measured.json.
PAGES = {
    "README.md": readme,
    "docs/benchmarks.md": bench_page.page,
    "configs/presets/measured.json": preset_page.measured,
    "docs/presets.md": preset_page.page,
}


def stale(write: bool) -> list[str]:
    """Files that differ from what the data say; rewritten when ``write`` is set."""
    found = []
    for name, draw in PAGES.items():
        path, new = ROOT / name, draw()
        if not path.is_file() or path.read_text() != new:
            found.append(name)
            if write:
                path.write_text(new)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    found = stale(write=not check)
    if check and found:
        print(f"out of date: {', '.join(found)}; run python benchmarks/tables.py.", file=sys.stderr)
    return int(check and bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
