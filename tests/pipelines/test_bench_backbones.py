"""`bench backbones` and `bench vision`: figures follow from each other, counts are complete, and a model that fails is a named row."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from foveal.kernels.gated_linear.counting import multiply_adds as gated
from foveal.pipelines.bench import backbones, image_models, lina_module, vision
from foveal.pipelines.bench.__main__ import run
from foveal.pipelines.bench.image_models import Contestant, Entrant, image_rows
from foveal.pipelines.bench.multiply_adds import multiply_adds
from foveal.pipelines.bench.rounds import How
from foveal.pipelines.bench.rows import FIELDS
from foveal.vision import vig_mixer
from foveal.vision.creating import attention_layers, create

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import bench_page

CPU = torch.device("cpu")
ONCE = How.on(CPU, rounds=1)
PLAIN, TRAINED, MODULE = vision.TINY


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    paths = {
        what: run(what, out=folder / f"{what}.json", device="cpu", rounds=2, tiny=True)
        for what in ("backbones", "vision")
    }
    return {what: json.loads(path.read_text()) for what, path in paths.items()}  # fmt: skip


# ---- rows
@pytest.mark.parametrize("what", ["backbones", "vision"])
def test_the_record_has_the_schema(records, what):
    record = records[what]
    assert record["bench"] == what and "timm" in record["versions"] and record["rounds"] == 2
    assert all(set(FIELDS) <= set(r) and not r.get("failed") for r in record["rows"])
    assert {r["op"] for r in record["rows"]} >= {"inference", "training_step"}


@pytest.mark.parametrize("what", ["backbones", "vision"])
def test_figures_follow_from_the_time(records, what):
    rows = [r for r in records[what]["rows"] if "image" in r["shape"]]
    times = {(r["case"], r["impl"]): r["ms"] for r in rows}
    for r in rows:
        assert r["images_per_s"] == pytest.approx(1e3 * r["shape"]["batch"] / r["ms"])
        assert r["baseline"] == "deit_tiny_patch16_224"
        assert r["speedup"] == pytest.approx(times[r["case"], r["baseline"]] / r["ms"])
        assert r["parameters"] > 0 and r["peak_bytes"] is None  # the allocator of a CPU does not say


def test_every_attention_layer_has_a_row_and_is_counted(records):
    rows = {r["impl"]: r for r in records["backbones"]["rows"] if r["case"] == "very small layers"}
    assert {"linear", "gated"} <= set(attention_layers())
    assert {f"{name} attention" for name in attention_layers()} <= set(rows)
    assert all(r["multiply_adds"] > 0 and "not_counted" not in r for r in rows.values())


def test_both_modules_of_lina_share_projections_and_the_linear_one_is_right(records):
    softmax, linear = lina_module.modules_of(MODULE)
    assert softmax.qkv is linear.qkv and softmax.proj is linear.proj
    rows = {r["impl"]: r for r in records["vision"]["rows"] if r["op"] == "attention_module"}
    assert set(rows) == {"softmax", "linear"} and rows["linear"]["rel_l2"] < 1e-5
    real = next(case for case in vision.CASES if case.group == "module")
    assert (real.tokens, real.dim, real.heads) == (5120, 1536, 16)


def test_the_faster_softmax_is_the_baseline():
    slow, fast = ([{"impl": "softmax", "ms": ms, "of": ms}] for ms in (2.0, 1.0))
    assert lina_module._better(slow, fast) == fast and lina_module._better(fast, slow) == fast


def test_graphs_are_held_against_the_faster_softmax_in_a_graph():
    def rows(called, replayed):
        return [
            {"impl": n, "ms": ms, "of": called}
            for n, ms in (("softmax", called), ("softmax, graph", replayed), ("linear, graph", 1.0))
        ]

    found = lina_module._better(rows(2.0, 1.0), rows(1.0, 2.0))
    assert [r["of"] for r in found] == [1.0, 2.0, 2.0]


# ---- contestants
def test_own_memory_counts_weights_optimiser_and_images():
    contestant = Contestant(TRAINED.entrants[0], TRAINED, ONCE)
    weights = sum(4 * p.numel() for p in contestant.model.parameters())
    assert contestant.own_bytes() == weights + contestant.images.numel() * 4 + contestant.labels.numel() * 8
    contestant()
    steps = sum(1 for _ in contestant.model.parameters())
    assert (
        contestant.own_bytes()
        == 3 * weights + 4 * steps + contestant.images.numel() * 4 + contestant.labels.numel() * 8
    )


def test_a_training_step_moves_weights_and_inference_none():
    for case in (TRAINED, PLAIN):
        contestant = Contestant(case.entrants[1], case, ONCE)
        before = [p.detach().clone() for p in contestant.model.parameters()]
        contestant()
        moved = [not torch.equal(a, b) for a, b in zip(before, contestant.model.parameters(), strict=True)]
        assert sum(moved) > 0.9 * len(moved) if case.training else not any(moved)


@pytest.mark.parametrize(
    ("name", "knobs", "blocks"),
    [
        ("deit_tiny_patch16_224", {"embed_dim": 32, "depth": 3, "num_heads": 2}, 3),
        ("vig_h_tiny", {"embed_dim": 32, "depths": (1, 2), "num_heads": (1, 2)}, 3),
    ],
    ids=["plain", "hierarchical"],
)
def test_every_block_is_compiled_and_nothing_else(name, knobs, blocks):
    model = create(name, **knobs)
    assert image_models.compile_blocks(model) == blocks
    compiled = [n for n, m in model.named_modules() if m._compiled_call_impl is not None]
    assert len(compiled) == blocks and all(n.split(".")[-2] == "blocks" for n in compiled)


def test_a_model_without_blocks_is_not_compiled():
    with pytest.raises(ValueError, match="no module called blocks"):
        image_models.compile_blocks(torch.nn.Linear(2, 2))


def test_a_model_that_cannot_be_built_is_a_row_and_the_others_are_measured():
    case = replace(PLAIN, entrants=(*PLAIN.entrants, Entrant(model="vig_colossal"), Entrant(model="deit_tiny_patch16_224", layer="absent", label="absent")))  # fmt: skip
    rows = {r["impl"]: r for r in image_rows(case, ONCE)}
    assert "vig_colossal" in rows["vig_colossal"]["failed"] and rows["absent"]["failed"].startswith("KeyError")
    assert rows["vig_colossal"]["ms"] is None and rows["vig_tiny_patch16_224"]["ms"] > 0


# ---- counts
def counted_by_pytorch(build, size):
    """Where every matrix product is visible."""
    with torch.device("meta"):
        model, image = build().eval(), torch.zeros(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("size", [224, 512])
def test_softmax_counted_by_formula_is_what_pytorch_counts(size):
    build = partial(create, "deit_tiny_patch16_224", img_size=size)
    count = multiply_adds(build, size)
    n = (size // 16) ** 2 + 1
    assert count.total == counted_by_pytorch(build, size) and count.mixing == 12 * 2 * n * n * 192


def test_gated_linear_attention_is_counted_by_its_formula_in_every_block():
    count = multiply_adds(partial(create, "vig_tiny_patch16_224"), 224)
    assert count.mixing == 12 * gated(1, 3, 196, 32, 64, directions=2)
    assert multiply_adds(partial(create, "vig_tiny_patch16_224"), 448).mixing == 4 * count.mixing


def test_vigs_published_count_leaves_out_the_scan_and_the_down_projection():
    count = multiply_adds(partial(create, "vig_tiny_patch16_224"), 224)
    down = 12 * 196 * 512 * 192
    assert (count.total - count.mixing - down) / 1e9 == pytest.approx(0.88, abs=0.005)
    assert count.total / 1e9 == pytest.approx(1.22, abs=0.01)


@pytest.mark.parametrize("letter", ["tiny", "small"])
def test_biformers_count_is_the_published_one(letter):
    count = multiply_adds(partial(create, f"biformer_{letter}"), 224)
    assert round(count.total / 1e9, 1) == backbones.CLAIMED[f"biformer_{letter}"] / 1e9


def test_counting_needs_values_only_where_regions_are_uneven():
    build = partial(create, "biformer_tiny", depths=(1, 1, 1, 1))
    even, uneven = multiply_adds(build, 224), multiply_adds(build, 96)
    assert 0 < uneven.mixing < even.mixing and uneven.total < even.total


def test_counting_leaves_operators_as_they_were():
    before = vig_mixer.bidirectional_gated_linear_attention
    with pytest.raises(RuntimeError, match="broken"):
        multiply_adds(lambda: Broken(), 32)
    assert vig_mixer.bidirectional_gated_linear_attention is before


class Broken(torch.nn.Module):
    def forward(self, x):
        raise RuntimeError("broken")


# ---- the choice of cases
@pytest.mark.parametrize("known", [vision.CASES, backbones.real_cases()], ids=["vision", "backbones"])
def test_names_of_cases_are_unique_and_groups_select(known):
    names = [case.name for case in known]
    assert len(names) == len(set(names))
    for group in {case.group for case in known}:
        assert {case.group for case in vision.chosen(False, [group], known)} == {group}


def test_an_unknown_case_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no case 'eagre'; choose from eager, training, module, .*tiny, 2048 pixels"):
        list(vision.measure(CPU, 0.1, cases=["eagre"]))


@pytest.mark.parametrize("what", ["backbones", "vision"])
def test_full_sizes_are_refused_on_a_cpu(what):
    with pytest.raises(ValueError, match="needs a GPU; give --tiny"):
        run(what, device="cpu")


# ---- the page
def test_records_are_drawn(records, tmp_path):
    for what, record in records.items():
        (tmp_path / f"{what}.json").write_text(json.dumps(record))
    lost = {**records["vision"]["rows"][0], "failed": "out of memory", "images_per_s": None}
    record = {**records["vision"], "rows": [*records["vision"]["rows"], lost]}
    (tmp_path / "vision.json").write_text(json.dumps(record))
    page = bench_page.page(tmp_path)
    assert "## Backbones" in page and "## ViG beside DeiT" in page and "### Attention modules" in page
    assert "| 1.5x to 2.2x |" in page and "failed: out of memory" in page
