"""The demo's part of docs/benchmarks.md: one table a study, speed and fidelity side by side."""

from __future__ import annotations

from records import Record, source, table, times

from foveal.pipelines.report.glossary import term

METRICS = ("psnr", "ssim", "step_rel_l1", "world_psnr", "acc_all", "acc_motion")
NOTE = (
    "Shipped toy models, trained on a synthetic world: these figures show how methods differ here and do not transfer to large models. "
    '"speed-up" is that of a whole generation; "bound" is the speed-up were attention free, "bound at this density" were it exactly as '
    "fast per pair as dense. Brackets hold 95 % intervals."
)


def demo(record: Record) -> str:
    """Every study of the demo, and the seconds of the whole command."""
    whole, *rows = record["rows"]
    studies = list(dict.fromkeys(r["case"] for r in rows))
    parts = [study([r for r in rows if r["case"] == name]) for name in studies]
    said = f"The whole command took {whole['ms'] / 1e3:.0f} s, from its start to the report."
    return "\n\n".join([f"## Demo\n\n{source(record)}.\n\n{said} {NOTE}", *parts])


def study(rows: list[Record]) -> str:
    """One study as a table; columns that no row fills are left out."""
    shown = [name for name in METRICS if any(name in r["metrics"] for r in rows)]
    timed = rows[0]["ms"] is not None  # rounds are a whole study's
    speed = ["time", "speed-up", "bound at this density", "bound"] if timed else []
    cells = [
        [
            r["setting"], f"{r['density']:.3f}", *(speed_cells(r) if timed else []), *(metric(r, name) for name in shown),
        ]
        for r in rows
    ]  # fmt: skip
    first = rows[0]
    title = f"### {first['title']} ({first['case']}, {first['shape']['tokens']:,} tokens, samples: {first['samples']})"
    return f"{title}\n\n{table(('method', 'density', *speed, *map(head, shown)), cells)}"


def speed_cells(r: Record) -> list[str]:
    dense = r["method"] is None
    bounds = [times(None if dense else r[name]) for name in ("bound_at_density", "bound")]
    return [f"{r['ms'] / 1e3:.2f} s", times(r["speedup"]), *bounds]


def head(name: str) -> str:
    known = term(name)
    return f"{known.head} {known.unit}".strip()


def metric(r: Record, name: str) -> str:
    """A value with its interval; a dash where the row has none."""
    found = r["metrics"].get(name)
    if found is None:
        return "-"
    write = term(name).write
    spread = f" [{', '.join(map(write, found['ci95']))}]" if found["ci95"] else ""
    return write(found["value"]) + spread
