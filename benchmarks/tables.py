"""Draw the README's tables: kernel support from the kernels' needs, measurements from ``benchmarks/results``.

``python benchmarks/tables.py`` rewrites the marked parts of README.md; ``--check`` exits 1 where they are out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from foveal.kernels.block_sparse import support_table

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


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
        if row["method"] is None or "order" not in row["includes"]:
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


def drawn(text: str) -> str:
    """The page with every marked part drawn anew."""
    for name, draw in PARTS.items():
        start, stop = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        before, rest = text.split(start)
        after = rest.split(stop)[1]
        text = f"{before}{start}\n{draw()}\n{stop}{after}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    text = README.read_text()
    new = drawn(text)
    if check and new != text:
        print("README.md is out of date: run python benchmarks/tables.py.", file=sys.stderr)
        return 1
    README.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
