"""What every column means, in one line each, and how its numbers are written.

* A metric that is not listed here is still shown: under its own id, with three digits, the direction that the run gives and
  the summary of the metric registry.
"""

from __future__ import annotations

from dataclasses import dataclass

from foveal.pipelines.metrics import metrics
from foveal.pipelines.report.words import esc, number, percent, significant


@dataclass(frozen=True)
class Term:
    """head: column header; up: True if higher is better, False if lower, None if neither.

    style: how numbers are written: "%" a share as per cent, ".2" decimals, "3" digits.
    """

    id: str
    head: str
    meaning: str
    up: bool | None = None
    style: str = "3"
    unit: str = ""

    def write(self, value: float | None) -> str:
        if self.style == "%":
            return percent(value, 1)
        if self.style.startswith("."):
            return number(value, int(self.style[1:]))
        return significant(value, int(self.style))

    @property
    def direction(self) -> str:
        return {True: "higher is better", False: "lower is better", None: "neither direction is better by itself"}[
            self.up
        ]


WORK = (
    Term("density", "density", "query-key pairs attended after every mask, divided by all pairs. 100 % is dense attention."),
    Term("visited", "visited", "pairs inside the tiles that a kernel executes, divided by all pairs; never below the density."),
    Term("end_to_end", "end to end", "time of the whole generation with dense attention divided by the time with this method.", True),
    Term("bound", "bound", "Amdahl's bound: the most that faster attention can give end to end, given attention's share of the time."),
    Term("at_density", "at density", "the same bound if attention took time in proportion to the density: what a perfect sparse kernel would reach."),
    Term("transformer", "transformer", "the same ratio for the transformer alone.", True),
    Term("operator", "operator", "the same ratio for one attention operator, with ordering, planning, kernel and undoing the order.", True),
    Term("efficiency", "eff", "operator ratio times density. 1 means that every pair left out was also time saved.", True),
    Term("noise_floor", "noise floor", "the metric between two dense runs with different exact kernels: values beyond it carry no meaning."),
    Term("ran_dense", "ran dense", "calls in which the method stood aside for dense attention, with the reason."),
    Term("ci95", "[low, high]", "95 % interval over prompts (bootstrap), or for accuracies over samples (Wilson). None is shown for single samples."),
    Term("stand_in", "†", "a stand-in: computed without the official network, so not comparable with published values."),
)  # fmt: skip

METRICS = (
    Term("psnr", "PSNR", "peak signal-to-noise ratio to the dense frames of the same prompt and seed, mean over frames; at most 100 dB.", True, ".1", "dB"),
    Term("psnr_pooled", "PSNR pooled", "PSNR of the mean squared error over all frames together.", True, ".1", "dB"),
    Term("ssim", "SSIM", "structural similarity to the dense frames; 1 is identical.", True, ".3"),
    Term("ms_ssim_3", "MS-SSIM (3)", "structural similarity over three scales; 1 is identical.", True, ".3"),
    Term("step_rel_l1", "step error", "relative L1 error of the predicted velocity on the dense trajectory, so that early differences do not pile up.", False, "3"),
    Term("step_cos", "step cosine", "cosine between sparse and dense predicted velocity on the dense trajectory; 1 is identical.", True, ".4"),
    Term("tdiff_psnr", "motion PSNR", "PSNR between the frame-to-frame differences of both videos: sees flicker that PSNR hides.", True, ".1", "dB"),
    Term("gmsd", "GMSD", "gradient magnitude similarity deviation to the dense frames; 0 is identical.", False, "3"),
    Term("latent_rel_l2", "latent error", "relative L2 error of the final latents.", False, "3"),
    Term("flow_epe", "flow error", "mean end-point error between the optical flows of both videos, as a part of the frame diagonal.", False, "3"),
    Term("perc_effnet", "perceptual", "distance in features of a small network (a stand-in for LPIPS).", False, "3"),
    Term("tile_seam", "tile seam", "excess of edges along tile borders.", False, "3"),
    Term("world_psnr", "world PSNR", "how well any valid video of the synthetic world explains the sample; needs no reference.", True, ".1", "dB"),
    Term("emoji_psnr", "emoji PSNR", "how well any valid scene of the emoji world explains the sample; needs no reference.", True, ".1", "dB"),
    Term("jitter", "jitter", "mean distance of the object's centres from a smooth path, in frame widths.", False, "3"),
    Term("angle_error", "angle error", "degrees between the motion seen and the motion asked for, moving objects.", False, ".1", "°"),
    Term("drift", "drift", "change of the object's colour and area over time.", False, "3"),
    Term("identity_drift", "drift", "change of the object's colour and area over time.", False, "3"),
    Term("acc_all", "all correct", "share of samples in which every attribute asked for is right.", True, "%"),
    Term("acc_both", "both objects", "all correct, over the prompts that name two objects.", True, "%"),
    Term("acc_objects", "objects", "share of samples with as many objects as asked for, each right in all four attributes.", True, "%"),
    Term("acc_count", "count", "share of samples with as many objects as asked for.", True, "%"),
    Term("acc_colour", "colour", "share of samples in which every object asked for has its colour.", True, "%"),
    Term("acc_shape", "shape", "share of samples in which every object asked for has its shape.", True, "%"),
    Term("acc_size", "size", "share of samples in which every object asked for has its size.", True, "%"),
    Term("acc_motion", "motion", "share of samples in which every object asked for moves as asked.", True, "%"),
    Term("acc_object", "pictures", "share of samples that show the pictures asked for and no other.", True, "%"),
    Term("acc_pair", "both pictures", "the same, over the prompts that name two pictures.", True, "%"),
    Term("acc_relation", "relation", "share of samples with both pictures in the relation asked for, over the prompts that name two.", True, "%"),
    Term("acc_scale", "scale", "share of samples with the pictures asked for at the scales asked for.", True, "%"),
    Term("acc_scene", "scene", "share of samples with the background asked for.", True, "%"),
    Term("acc_class", "class", "share of samples that the judge shipped with the model takes for the class asked for; the judge is ours.", True, "%"),
    Term("warp_error", "warp error", "error of each frame warped onto the next, outside occlusions.", False, "3"),
    Term("vbench.temporal_flickering", "steadiness", "VBench temporal flickering: one minus the mean change from frame to frame; 1 is a still picture.", True, ".4"),
    Term("midframe_smoothness", "smoothness", "how well each middle frame follows from its neighbours.", True, ".4"),
    Term("motion_speed", "speed", "normal optical flow in pixels a frame; compare with dense.", None, "3"),
    Term("sharpness", "sharpness", "variance of the Laplacian of luma; compare with dense.", None, "3"),
)  # fmt: skip

_BY_ID = {t.id: t for t in METRICS}


def term(metric_id: str, higher_is_better: bool | None = None) -> Term:
    """The entry of a metric; one without an entry here gets its id as header and the registry's summary, if it has one."""
    if metric_id in _BY_ID:
        return _BY_ID[metric_id]
    found = metrics().get(metric_id)
    meaning = found.summary if found else "no description on file; see the run's own documentation."
    up = higher_is_better if higher_is_better is not None or found is None else found.higher_is_better
    return Term(metric_id, metric_id.rpartition(".")[2].replace("_", " "), meaning, up)


def glossary_html(metric_ids: list[str]) -> str:
    """A definition list of the general columns and of the metrics that occur."""
    entries = [*WORK, *(term(i) for i in metric_ids)]
    rows = []
    for t in entries:
        code = f" <code>{esc(t.id)}</code>" if t not in WORK and t.id != t.head else ""
        better = (
            f' <span class="dir">{esc(t.direction[0].upper() + t.direction[1:])}.</span>' if t.up is not None else ""
        )
        meaning = t.meaning[:1].upper() + t.meaning[1:].rstrip(".") + "."
        rows.append(f"<div><dt>{esc(t.head)}{code}</dt><dd>{esc(meaning)}{better}</dd></div>")
    return f'<dl class="glossary">{"".join(rows)}</dl>'
