"""The composition matrix, a selection of it: every condition on several hosts, every host under several conditions, both orders.

The complete product is in test_matrix_complete.py.
"""

import pytest
from cells import observe
from compiling import quiet_compiler
from conditions import CONDITIONS
from tiny_pipes import METHODS, PIPES

from foveal.plugins.diffusers_host import composition
from foveal.plugins.diffusers_host.composition import NAMES, ORDERS, cells, verdict

pytestmark = pytest.mark.filterwarnings("ignore")
SPARSE = ("grat", "neighborhood")
NOT_TRIED = ("needs a GPU", "not tried")
EVERY = 5  # one cell of so many
COSTLY = ("compile-blocks", "compile-whole")  # seconds a cell: chosen by hand


def tried():
    """Cells that a CPU can run."""
    return [(host, condition, order) for host, condition, order, v in cells() if v.outcome not in NOT_TRIED]


def selection():
    """Along every diagonal: all hosts and all conditions come up evenly, and the order changes from one to the next."""
    chosen = [
        (host, condition, ORDERS[(at + number) % 2])
        for number, condition in enumerate(CONDITIONS)
        for at, host in enumerate(NAMES)
        if condition not in COSTLY and (at + 3 * number) % EVERY == 0
    ]
    return [cell for cell in chosen + BY_HAND if cell in set(tried())]


# Compilers, and cells that stand for a sentence the user reads.
BY_HAND = [
    ("flux", "compile-blocks", "before"), ("wan", "compile-blocks", "after"), ("sd3", "compile-blocks", "after"),
    ("ltx", "compile-whole", "before"), ("cogvideox", "compile-whole", "before"), ("pixart", "compile-whole", "before"),
    ("wan", "compile-whole", "after"),
    ("wan", "pyramid-attention-broadcast", "before"), ("wan", "faster-cache", "after"), ("sd3", "fuse-qkv", "after"),
    ("cogvideox", "fuse-qkv", "after"), ("sd15", "ip-adapter", "after"), ("sd3", "ip-adapter", "before"),
    ("sd3", "ip-adapter", "after"), ("flux", "ip-adapter", "before"), ("flux", "context-parallel", "after"),
    ("wan", "context-parallel", "before"), ("ltx2", "lora", "before"),
    ("zimage", "batched", "before"), ("zimage", "lora", "after"), ("zimage", "layerwise-casting", "after"),
    ("mochi", "batched", "after"), ("mochi", "faster-cache", "before"), ("flux2", "faster-cache", "after"),
    ("sd15", "controlnet", "before"), ("sdxl", "controlnet", "after"), ("animatediff", "controlnet", "after"),
    ("sd3", "controlnet", "before"), ("skyreels", "two-pass", "before"), ("wan-i2v", "torchao", "before"),
    ("wan-i2v", "gradient-checkpointing", "after"),
]  # fmt: skip
SELECTED = list(dict.fromkeys(selection()))


def check(host, condition, order, method):
    """What is seen is what the data say, in the same words."""
    with quiet_compiler():
        seen, expected = observe(host, condition, order, method), verdict(host, condition, order)
    assert seen.outcome == expected.outcome, f"seen: {seen.outcome}: {seen.reason}; the data: {expected}"
    if expected.outcome == "refuses" and expected.reason != composition.REPLACES:
        key = composition.OWN_WEIGHTS if composition.OWN_WEIGHTS in expected.reason else expected.reason
        assert key in seen.reason


@pytest.mark.parametrize(("host", "condition", "order"), SELECTED, ids=["-".join(cell) for cell in SELECTED])
def test_the_cell_is_what_the_data_say(host, condition, order):
    sparse = SPARSE[len(host + condition) % 2]
    for method in (sparse,) if condition in COSTLY else ("dense", sparse):
        check(host, condition, order, method)


# ---- the data
def test_every_host_and_condition_of_the_data_can_be_run():
    assert set(PIPES) == set(NAMES)
    assert set(CONDITIONS) == {condition.name for condition in composition.CONDITIONS}
    assert set(METHODS) == set(composition.METHODS)


def test_the_selection_leaves_out_no_host_and_no_condition():
    """Three hosts for every condition and three conditions for every host, cells that are not applicable not counted."""
    counted = [cell for cell in SELECTED if verdict(*cell).outcome in ("works", "refuses")]
    for name in {condition for _, condition, _ in tried()}:
        assert len({host for host, condition, _ in counted if condition == name}) >= 3, name
    for name in NAMES:
        assert len({condition for host, condition, _ in counted if host == name}) >= 3, name


def test_refusals_and_gaps_give_a_reason():
    for host, condition, order, found in cells():
        assert bool(found.reason) == (found.outcome != "works"), (host, condition, order)
        assert "{" not in found.reason


def test_an_unknown_host_is_named():
    with pytest.raises(KeyError, match="there is no host 'sora'"):
        verdict("sora", "lora", "before")
