"""docs/benchmarks.md: a table per record in ``benchmarks/results``; a bench that was not run has none."""

from __future__ import annotations

from pathlib import Path

from demo_page import demo
from records import Record, head, ms, record_of, shape, source, table, times
from vision_page import backbones, plain_linear, training_proof, vision

ATTENTION = ("dense_fwd", "block_sparse_fwd")
INTRO = """# Benchmarks

Drawn by `python benchmarks/tables.py` from `benchmarks/results/*.json`. "speed-up" is against the fastest dense SDPA of PyTorch on the
same card in the same rounds; "of 1 / density" is speed-up x density, where 1 is a sparse kernel as fast per pair as dense.
"""


def layers(record: Record) -> str:
    """Transformer blocks, with what Amdahl allows."""
    rows = [block(r) for r in record["rows"]]
    note = (
        "One block of a diffusers model with random weights, everything counted: host, plan, token order, kernel, the rest of the block. "
        '"bound" is the speed-up were attention free; "bound at this density" were it exactly as fast per pair as dense. '
        "The whole model adds what is paid once per call. Overheads are those of skipping nothing, quartiles in brackets. Dense attention "
        "runs on the model's own length: an unmodified block cannot pad it to where cuDNN is faster; operators can, and their tables do."
    )
    columns = (
        "case", "tokens x heads x head dim", "what", "density", "block", "attention", "speed-up", "bound at this density", "bound",
        "whole model", "peak memory",
    )  # fmt: skip
    return f"## Transformer blocks\n\n{head(record)}\n\n{note}\n\n{table(columns, rows)}"


def block(r: Record) -> list[str]:
    if r.get("failed"):
        return [r["case"], shape(r), f"{r['impl']}: failed: {r['failed']}", *["-"] * 8]
    whole = f"{times(r['model_speedup'])} of {r['depth']} blocks"
    bounds = [times(r.get("bound_at_density")), times(r.get("bound"))]
    return [
        r["case"], shape(r), what(r), f"{r['density']:.3f}", ms(r["ms"]), ms(r["attention_ms"]), times(r["speedup"]), *bounds, whole,
        peak(r.get("peak_bytes")),
    ]  # fmt: skip


def peak(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f} GiB"


def what(r: Record) -> str:
    """Who ran in a block."""
    if r.get("ran_dense"):
        return f"{r['impl']}, which ran dense ({r['ran_dense']})"
    text = f"{r['setting']} ({r['kernel']})" if r["method"] else r["impl"]
    if r["impl"] == "dense":
        share = "" if r["attention_share"] is None else f", attention {r['attention_share']:.0%} of the block"
        text = f"dense ({r['sdpa'].removesuffix('_ATTENTION').lower()}){share}"
    if "overhead" in r:
        quartiles = r.get("overhead_quartiles")
        spread = f" [{quartiles[0]:+.1%}, {quartiles[1]:+.1%}]" if quartiles else ""
        text += f", nothing skipped: {r['overhead']:+.1%}{spread}"
    return text


def kernels(record: Record) -> str:
    """Attention alone, then the kernels around it."""
    timed = [r for r in record["rows"] if r["op"] in ATTENTION and not any(key in r for key in ("host_us", "gate"))]
    rows = [
        [
            r["case"], shape(r), r["impl"], f"{r['density']:.3f}", ms(r["ms"]), times(r["speedup"]),
            "-" if r["eff"] is None else f"{r['eff']:.2f}", times(r.get("against_flash4")), times(r.get("against_flash4_sparse")),
            f"failed: {r['failed']}" if r.get("failed") else "-" if r["rel_l2"] is None else f"{r['rel_l2']:.1e}",
        ]
        for r in timed
    ]  # fmt: skip
    columns = (
        "case", "tokens x heads x head dim", "implementation", "density", "time", "speed-up", "of 1 / density", "against flash-attn-4, dense",
        "on the same lists", "relative error",
    )  # fmt: skip
    note = "Lists given, tokens in order. Errors are those of sampled rows against float64."
    parts = [f"## Attention kernels\n\n{head(record)}\n\n{note}\n\n{table(columns, rows)}"]
    return "\n\n".join([*parts, *around(record), *linear(record), *plain_linear(record), *not_set_up(record)])


def around(record: Record) -> list[str]:
    """Token order, selection, and the host's time of a call."""
    kinds = (
        ("tb_per_s", "Token order, one tensor", "TB/s", "{:.2f}"),
        ("share_of_attention", "Selection of blocks beside the attention it serves", "share of attention", "{:.1%}"),
        ("host_us", "Host time of one call", "microseconds", "{:.0f}"),
        ("against_equal", "Rows that visit unequal numbers of blocks", "speed per pair beside equal numbers", "{:.2f}"),
    )
    found = []
    for key, title, unit, form in kinds:
        rows = [
            [r["case"], shape(r), r["impl"], ms(r["ms"]), form.format(r[key])]
            for r in record["rows"]
            if r.get(key) is not None
        ]
        if rows:
            columns = ("case", "tokens x heads x head dim", "implementation", "time", unit)
            found.append(f"### {title}\n\n{table(columns, rows)}")
    return found


def linear(record: Record) -> list[str]:
    """Gated linear attention beside softmax and fla."""
    rows = [
        [
            r["case"], f"{r['shape']['batch']} x {shape(r)}", r["impl"], ms(r["ms"]), times(r["speedup"]), times(r.get("against_fla")),
            f"failed: {r['failed']}" if r.get("failed") else "-" if r["rel_l2"] is None else f"{r['rel_l2']:.1e}", times(r.get("against_one")),
        ]
        for r in record["rows"]
        if r.get("gate") is not None
    ]  # fmt: skip
    columns = (
        "case",
        "batch x tokens x heads x head dim",
        "implementation",
        "time",
        "against softmax",
        "against fla",
        "relative error",
        "both directions, in times of one",
    )
    note = "\"graph\" rows replay a CUDA graph: the device's time without the host's. Errors are those of one head against the recurrence in float64, in training the worst of its gradients."
    return [f"### Gated linear attention\n\n{note}\n\n{table(columns, rows)}"] if rows else []


def not_set_up(record: Record) -> list[str]:
    """Cases of which nothing ran."""
    lost = [f"- {r['case']}: failed: {r['failed']}" for r in record["rows"] if r.get("failed") and not r["shape"]]
    return ["### Not measured\n\n" + "\n".join(lost)] if lost else []


def static_methods(record: Record) -> str:
    """Static methods as an operator."""
    dense = {(r["case"], r["impl"]): r["ms"] for r in record["rows"] if r["op"] == "dense_fwd"}
    rows = [
        [
            r["case"], shape(r), r["setting"], r["impl"], f"{r['density']:.3f}", f"{ms(dense[r['case'], r['baseline']])} ({r['baseline']})",
            ms(r["ms"]), times(r["speedup"]), f"{r['eff']:.2f}", f"{r['order_share']:.1%}" if r.get("order_share", 0) > 0 else "below noise",
        ]
        for r in record["rows"]
        if r["method"] is not None and "order" in r["includes"] and not r.get("failed")
    ]  # fmt: skip
    columns = (
        "case", "tokens x heads x head dim", "setting", "kernel", "density", "dense", "ours", "speed-up", "of 1 / density", "order's share",
    )  # fmt: skip
    note = "The operator alone, everything counted: plan lookup, token order of q, k and v, kernel, inverse order."
    return f"## Static methods\n\n{head(record)}\n\n{note}\n\n{table(columns, rows)}"


def peak_memory(record: Record) -> str:
    """Memory beside dense."""
    rows = []
    for r in record["rows"]:
        known = r["peak_bytes"] is not None
        extra = "-" if r["extra_bytes"] is None else f"{r['extra_bytes'] / 2**20:+,.0f} MiB"
        copies = "-" if r["extra_copies"] is None else f"{r['extra_copies']:+.2f}"
        peak = f"{r['peak_bytes'] / 2**20:,.0f} MiB" if known else f"failed: {r['failed']}"
        rows.append(
            [r["case"], shape(r), r["op"], r["method"] or "model alone", f"{r['density']:.3f}", peak, extra, copies]
        )
    columns = (
        "case", "tokens x heads x head dim", "what", "method", "density", "peak", "beyond the model alone", "in copies of q, k and v",
    )  # fmt: skip
    note = "Highest level of memory during two forwards above weights and inputs; random weights."
    return f"## Peak memory\n\n{head(record)}\n\n{note}\n\n{table(columns, rows)}"


def sanitizer(record: Record) -> str:
    """What compute-sanitizer found."""
    rows = [
        [
            r["tool"], ", ".join(r["groups"]), str(r["cases"]), "unknown" if r["errors"] is None else str(r["errors"]),
            "-" if r.get("roles") is None else str(r["roles"]), ", ".join(r["failed"]) or "none",
        ]
        for r in record["rows"]
    ]  # fmt: skip
    columns = ("tool", "kernels", "calls", "errors", "reports about roles", "calls that failed")
    note = (
        "Small random calls of every kernel. racecheck sees the shared memory that threads read and write, not what the copy engine and the tensor cores "
        "do there; its reports about the byte through which Triton hands out the roles of warps, ordered by a barrier that it does not follow, are counted apart."
    )
    found = f" {record['note']}" if "note" in record else ""
    return f"## Memory and races\n\n{source(record)}.\n\n{note}{found}\n\n{table(columns, rows)}"


TABLES = {
    "layers": layers,
    "kernels": kernels,
    "static_methods": static_methods,
    "peak_memory": peak_memory,
    "sanitizer": sanitizer,
    "backbones": backbones,
    "vision": vision,
    "training_proof": training_proof,
    "demo": demo,
}


def page(results: Path | None = None) -> str:
    """The whole page."""
    records = {name: record_of(name, results) for name in TABLES}
    parts = [TABLES[name](record) for name, record in records.items() if record is not None]
    return "\n\n".join([INTRO.strip(), *parts]) + "\n"
