"""`bench kernels`: attention kernels with lists given, what surrounds them, and linear attention, beside everybody who can do the same.

Cases come in groups: "sparse", "window", "linear", "plain", "order", "selection", "host"; ``--cases`` takes groups or names of cases.
What is measured and how is said in sparse.py, linear.py, plain_linear.py and around.py. A case that cannot be set up at all is a row that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foveal.pipelines.bench import around, cases, linear, plain_linear, sparse
from foveal.pipelines.bench.rounds import How, Rounds, reason
from foveal.pipelines.bench.rows import SHORT, Rows, row

SHOWN = {
    "rel_l2": "err", "tb_per_s": "TB/s", "host_us": "host us", "share_of_attention": "share", "against_equal": "x equal counts",
    "against_flash4": "x flash4", "against_flash4_sparse": "x flash4-sparse", "against_fla": "x fla", "against_one": "x one direction's time", "against_compiled": "x compiled",
    "useful_tb_per_s": "TB/s",
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One measurement: its group, its name, and what gives its rows."""

    group: str
    name: str
    run: Callable[[Any, How], Rows]
    case: Any

    def rows(self, how: How) -> Rows:
        try:
            return self.run(self.case, how)
        except Exception as error:
            failed = Rounds({}, {"none": reason(error)})
            return [row(self.name, self.group, "none", failed, None, shape={}, dtype=SHORT[how.dtype])]


def jobs(tiny: bool) -> list[Job]:
    """Everything there is to measure, in the order it is."""
    small = (
        cases.TINY_SPARSE,
        cases.TINY_WINDOWS,
        cases.TINY_LINEAR,
        cases.TINY_PLAIN,
        cases.TINY_AROUND,
        cases.TINY_HOST,
    )
    real = cases.SPARSE, cases.WINDOWS, cases.LINEAR, cases.PLAIN, cases.AROUND, cases.HOST
    blocks, windows, gated, plain, surroundings, call = small if tiny else real
    return [
        Job("host", "host time", around.host_rows, call),
        *(Job("order", "token order", around.order_rows, case) for case in surroundings),
        *(Job("sparse", case.name, sparse.sparse_rows, case) for case in blocks),
        *(Job("window", case.name, sparse.window_rows, case) for case in windows),
        *(Job("selection", "selection", around.selection_rows, case) for case in surroundings),
        *(Job("linear", case.name, linear.linear_rows, case) for case in gated),
        *(Job("plain", case.name, plain_linear.plain_rows, case) for case in plain),
    ]


def chosen(tiny: bool, wanted: Sequence[str] | None) -> list[Job]:
    """The jobs of these groups and names, or all. ValueError for a name that is neither."""
    known = jobs(tiny)
    names = list(dict.fromkeys([job.group for job in known] + [job.name for job in known]))
    for name in wanted or ():
        if name not in names:
            raise ValueError(f"there is no case {name!r}; choose from {', '.join(names)}.")
    return [job for job in known if not wanted or job.group in wanted or job.name in wanted]


def measure(
    device: torch.device, seconds: float, tiny: bool = False, cases: Sequence[str] | None = None, rounds: int | None = None
) -> Iterator[Rows]:  # fmt: skip
    """The rows of every case, case by case. seconds: of measuring per case."""
    how = How.on(device, seconds, rounds)
    for job in chosen(tiny, cases):
        yield job.rows(how)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def line(r: dict[str, Any]) -> str:
    """One row as a line of text."""
    if r.get("failed"):
        return f"{r['case']:36} {r['impl']:22} failed: {r['failed']}"
    extra = "".join(f"  {label} {r[name]:.3g}" for name, label in SHOWN.items() if r.get(name) is not None)
    ratio = "" if r["speedup"] is None else f"  x{r['speedup']:.2f}  eff {r['eff']:.3f}"
    return f"{r['case']:36} {r['impl']:22} density {r['density']:.3f}  {r['ms']:9.3f} ms{ratio}{extra}"
