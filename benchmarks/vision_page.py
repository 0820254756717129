"""The part of docs/benchmarks.md on image models: backbones, ViG beside DeiT, LINA's module, linear attention, and trained models."""

from __future__ import annotations

from records import Record, head, ms, source, table, times


def backbones(record: Record) -> str:
    """Every backbone beside the DeiT of its size; our attention layers in DeiT-T."""
    note = (
        'Random weights, images a second of one inference or one step of training; "against DeiT" is throughput beside timm\'s DeiT of the '
        "same letter in the same rounds, which has fused softmax attention. Memory is what a process with this model alone holds at its peak. "
        "Multiply-adds are those of one image forward, token mixing included; papers publish less where their counter does not see a kernel."
    )
    rows = [
        [
            r["case"], r["impl"], batch(r), millions(r.get("parameters")), billions(r.get("multiply_adds")), billions(r.get("claimed")),
            *speed(r),
        ]
        for r in record["rows"]
    ]  # fmt: skip
    columns = (
        "case", "model", "batch", "weights", "multiply-adds", "in the paper", "time", "images a second", "against DeiT", "peak memory",
    )  # fmt: skip
    return f"## Backbones\n\n{head(record)}\n\n{note}\n\n{table(columns, rows)}"


def vision(record: Record) -> str:
    """ViG beside DeiT by size of image, then modules."""
    whole = [r for r in record["rows"] if "image" in r["shape"]]
    modules = [r for r in record["rows"] if r["op"] == "attention_module"]
    note = (
        'Random weights; "against DeiT" is throughput in the same rounds. The goal is what we set out to reach, at least and at best. '
        "Compiled rows have the blocks of both models compiled."
    )
    rows = [[r["case"], r["impl"], batch(r), *speed(r), goal(r)] for r in whole]
    columns = ("case", "model", "batch", "time", "images a second", "against DeiT", "peak memory", "goal")
    parts = [f"## ViG beside DeiT\n\n{head(record)}", *([f"{note}\n\n{table(columns, rows)}"] if rows else [])]
    if modules:
        parts.append(module_table(modules))
    lost = [f"- {r['case']}: failed: {r['failed']}" for r in record["rows"] if r.get("failed") and not r["shape"]]
    return "\n\n".join([*parts, *(["### Not measured\n\n" + "\n".join(lost)] if lost else [])])


def module_table(found: list[Record]) -> str:
    note = (
        'One attention module with its projections; the linear one has its gates and its convolution too. "graph" rows replay a CUDA '
        "graph: the device's time without the host's."
    )
    rows = [
        [
            r["case"], f"{r['shape']['tokens']:,} x {r['shape']['heads']} x {r['shape']['head_dim']}", r["impl"],
            billions(r.get("multiply_adds")), ms(r["ms"]), times(r["speedup"]), peak(r), goal(r), error(r),
        ]
        for r in found
    ]  # fmt: skip
    columns = (
        "case", "tokens x heads x head dim", "module", "multiply-adds", "time", "against softmax", "peak memory", "goal", "relative error",
    )  # fmt: skip
    return f"### Attention modules\n\n{note}\n\n{table(columns, rows)}"


def plain_linear(record: Record) -> list[str]:
    """Linear attention without order; a part of the kernels' section."""
    rows = [
        [
            r["case"], f"{r['shape']['batch']} x {r['shape']['tokens']:,} x {r['shape']['heads']} x {r['shape']['head_dim']}", r["impl"],
            ms(r["ms"]), times(r["speedup"]), times(r.get("against_compiled")),
            "-" if r.get("useful_tb_per_s") is None else f"{r['useful_tb_per_s']:.2f}", error(r),
        ]
        for r in record["rows"]
        if "normalisation" in r
    ]  # fmt: skip
    columns = (
        "case", "batch x tokens x heads x head dim", "implementation", "time", "against softmax", "against compiled PyTorch", "useful TB/s",
        "relative error",
    )  # fmt: skip
    note = '"pytorch" is the rule written as two matrix products. Useful bytes are those of q, k, v and the output, once each.'
    return [f"### Linear attention without order\n\n{note}\n\n{table(columns, rows)}"] if rows else []


def training_proof(record: Record) -> str:
    """Two small classifiers trained alike."""
    first = record["rows"][0]
    note = (
        f"Fashion-MNIST, enlarged; patches of 4 pixels, width {first['shape']['width']}, {first['shape']['depth']} blocks, one seed; constant "
        f"learning rate, averaged weights. Accuracy is of {first['test_pictures']:,} test pictures, after equal seconds of training and after "
        "equal steps; brackets hold 95 % intervals over test pictures, differences are paired by picture, and neither covers other seeds. "
        "The time of a step was taken afterwards in interleaved rounds, data and optimiser included."
    )
    rows = [
        [
            r["case"], r["impl"], f"{r['parameters'] / 1e6:.2f} M", ms(r["ms"]), times(r["speedup"]), peak(r), f"{r['seconds']:.0f} s",
            *(cell for moment in ("equal_time", "equal_steps") for cell in judged(r[moment])),
        ]
        for r in record["rows"]
    ]  # fmt: skip
    columns = (
        "case", "model", "weights", "step", "steps a second, against DeiT", "peak memory", "trained", "steps in equal time", "accuracy", "difference",
        "equal steps", "accuracy", "difference",
    )  # fmt: skip
    said = f"{source(record)}; median of at least {record['rounds']} interleaved rounds."
    return f"## Trained on small pictures\n\n{said}\n\n{note}\n\n{table(columns, rows)}"


# ---- cells
def judged(moment: Record) -> list[str]:
    return [f"{moment['steps']:,}", percent(moment["accuracy"]), percent(moment["difference"], "+")]


def percent(interval: Record | None, sign: str = "") -> str:
    if interval is None:
        return "-"
    return f"{interval['value']:{sign}.2%} [{interval['low']:{sign}.2%}, {interval['high']:{sign}.2%}]"


def speed(r: Record) -> list[str]:
    """Time, images a second, ratio and memory; of a model that failed, why."""
    if r.get("failed"):
        return [f"failed: {r['failed']}", "-", "-", "-"]
    return [ms(r["ms"]), f"{r['images_per_s']:,.0f}", times(r["speedup"]), peak(r)]


def batch(r: Record) -> str:
    return str(r["shape"].get("batch", "-"))


def peak(r: Record) -> str:
    return "-" if r.get("peak_bytes") is None else f"{r['peak_bytes'] / 2**30:.2f} GiB"


def millions(n: float | None) -> str:
    return "-" if n is None else f"{n / 1e6:.1f} M"


def billions(n: float | None) -> str:
    return "-" if n is None else f"{n / 1e9:.2f} G"


def goal(r: Record) -> str:
    least, best = r.get("goal") or (None, None)
    return "-" if least is None else f"{least:g}x" if least == best else f"{least:g}x to {best:g}x"


def error(r: Record) -> str:
    return f"failed: {r['failed']}" if r.get("failed") else "-" if r["rel_l2"] is None else f"{r['rel_l2']:.1e}"
