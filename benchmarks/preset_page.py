"""configs/presets/measured.json from ``benchmarks/results``, and docs/presets.md from that and the presets.

Notable choices
- Attention's share: of the dense block in ``layers.json``.
- Speed per pair: attention as it ran inside the blocks of ``layers.json``, median over methods; a head dim that stands only in
  ``kernels.json`` takes our fastest kernel there; where neither file exists, the operators of ``static_methods.json``.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path

from records import Record, on_gpu, record_of, source, table

from foveal.pipelines.presets import HEAD, cells, preset_rows, share_of

SPARSE = 0.35  # kernels at higher densities do not stand for what presets run
Speeds = dict[int, list[float]]

INTRO = """# Recommended settings

```
foveal run presets/wan-1.3b-480p model=/path/to/Wan2.1-T2V-1.3B-Diffusers
foveal methods --presets
```
```python
foveal.accelerate(pipe, **foveal.preset("wan-1.3b-480p"))
foveal.accelerate(pipe, **foveal.preset("hunyuan-720p", "grat"))  # another method of the preset
```

Every preset visits whole blocks only, on the grid that its file names; the file states density, dense steps and whose choice they are.
Tiles fill the 128-row tiles of the Hopper kernel where the grid has such divisors: 21x3x4 = 252 or 33x3x5 = 495 tokens, say.

## What to expect

With attention's share s of the transformer's time, density d, and a kernel that runs at e of dense attention's speed per pair, a sparse
step gains 1 / (1 - s + s d / e). The whole run counts the preset's dense steps and layers; "free attention" is 1 / (1 - s), which no
method passes. Transformer only: text encoder and VAE come on top. Expected figures, not measurements: [benchmarks](benchmarks.md) has
those, and `rounds: 1` in a run measures your own."""


def measured(results: Path | None = None) -> str:
    """measured.json as text."""
    layers, kernels, operators = (on_gpu(record_of(name, results)) for name in ("layers", "kernels", "static_methods"))
    share = {}
    for row in layers["rows"] if layers else ():
        if row["impl"] == "dense" and row.get("attention_share") is not None:
            share[row["case"]] = {"value": round(row["attention_share"], 4), "source": source(layers)}
    eff: dict[str, dict[str, object]] = {}
    for record, speeds in ((layers, in_blocks), (kernels, in_kernels), (operators, in_operators)):
        for dim, values in sorted(speeds(record).items()) if record else ():
            figure = {
                "value": round(statistics.median(values), 4),
                "source": f"{source(record)}, median of {len(values)} rows",
            }
            eff.setdefault(str(dim), figure)
    return json.dumps({"share": share, "eff": eff}, indent=1) + "\n"


def in_blocks(record: Record) -> Speeds:
    dense = {r["case"]: r.get("attention_ms") for r in record["rows"] if r["impl"] == "dense"}
    found: Speeds = defaultdict(list)
    for r in record["rows"]:
        if r["method"] and r.get("kernel") and dense.get(r["case"]):
            found[r["shape"]["head_dim"]].append(dense[r["case"]] * r["density"] / r["attention_ms"])
    return found


def in_kernels(record: Record) -> Speeds:
    """The fastest of ours per case, 128-token key blocks."""
    best: dict[tuple[int, str], float] = {}
    for r in record["rows"]:
        ours = r["op"] == "block_sparse_fwd" and r["impl"] in ("hopper", "triton") and r["eff"] is not None
        if ours and r["shape"].get("blocks") == [128, 128] and r["density"] <= SPARSE:
            key = (r["shape"]["head_dim"], r["case"])
            best[key] = max(best.get(key, 0.0), r["eff"])
    found: Speeds = defaultdict(list)
    for (dim, _), eff in best.items():
        found[dim].append(eff)
    return found


def in_operators(record: Record) -> Speeds:
    found: Speeds = defaultdict(list)
    for r in record["rows"]:
        if r["method"] and "order" in r["includes"] and not r.get("failed"):
            found[r["shape"]["head_dim"]].append(r["eff"])
    return found


def page() -> str:
    """docs/presets.md."""
    rows = preset_rows()
    listed = table(HEAD, [cells(row) for row in rows])
    return f"{INTRO}\n\n{listed}\n\n{sources(rows)}\n"


def sources(rows: list[Record]) -> str:
    """Where shares and speeds come from, and by how much FLOPs overstate."""
    by_source: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if not row["share_upper"] and row["name"] not in by_source[row["share_source"]]:
            by_source[row["share_source"]].append(row["name"])
    lines = ["Attention's share:", ""]
    lines += [f"- {', '.join(found)}: {text}." for text, found in by_source.items() if found]
    lines += [f"- †: {flop_note()}", "", "Speed per pair beside dense attention:", ""]
    seen = {row["eff_source"]: row["eff"] for row in rows}
    lines += [f"- {eff:.2f}: {text}." for text, eff in seen.items()]
    return "\n".join(lines)


def flop_note() -> str:
    """FLOP shares beside timed ones, where both are known."""
    known = json.loads((Path(__file__).resolve().parents[1] / "configs/presets/cases.json").read_text())["cases"]
    both = [
        f"{name} {case['flop_share']:.2f} for {share_of(name).value:.2f}"
        for name, case in known.items()
        if "flop_share" in case and share_of(name).measured and "measured_as" not in case
    ]
    return (
        "a share of the FLOPs of the blocks (of a whole UNet, by torch.utils.flop_counter). It overstates the share of the time, so "
        f"these gains are upper figures; where both are known: {', '.join(both)}."
    )
