"""Laws of the metrics: exact values where a formula gives one, orderings where it does not."""

import math

import pytest
import torch
from torch import nn

from foveal.pipelines.errors import UserError
from foveal.pipelines.metrics import Meta, MetricWeightsMissing, WeightSpec, choose, metric, metrics
from foveal.pipelines.metrics.fidelity import psnr, psnr_pooled, tdiff_psnr
from foveal.pipelines.metrics.seam import tile_seam
from foveal.pipelines.metrics.ssim import ssim, window
from foveal.pipelines.metrics.teacher_forced import follow_trajectory, record_trajectory
from foveal.pipelines.metrics.temporal import midframe_smoothness, motion_speed, temporal_flickering


def video(b=2, t=4, h=24, w=20, seed=0):
    return torch.rand(b, t, 3, h, w, generator=torch.Generator().manual_seed(seed))


def wave(t=5, size=48, speed=0.5):
    """A smooth grating moving right at `speed` pixels a frame."""
    x = torch.arange(size, dtype=torch.float64)
    frames = [0.5 + 0.4 * torch.sin((x - speed * i) * 2 * math.pi / 16) for i in range(t)]
    return torch.stack(frames)[None, :, None, None, :].expand(1, t, 3, size, size).float()


# ---- fidelity
def test_psnr_of_a_constant_offset_is_exact():
    clip = video() * 0.5
    assert torch.allclose(psnr(clip + 0.1, clip), torch.full((2,), 20.0).double(), atol=1e-4)
    assert torch.allclose(psnr_pooled(clip + 0.1, clip), torch.full((2,), 20.0).double(), atol=1e-4)


def test_identical_videos_reach_the_cap():
    clip = video()
    for function in (psnr, psnr_pooled, tdiff_psnr):
        assert torch.equal(function(clip, clip), torch.full((2,), 100.0).double())


def test_pooled_psnr_never_exceeds_the_frame_mean():
    assert (psnr_pooled(video(seed=1), video()) <= psnr(video(seed=1), video()) + 1e-9).all()


def test_frame_differences_ignore_a_constant_offset_and_see_flicker():
    clip = video(t=6) * 0.5
    flicker = clip + 0.1 * torch.tensor([0.0, 1, 0, 1, 0, 1]).view(1, 6, 1, 1, 1)
    assert (tdiff_psnr(clip + 0.1, clip) > 90).all()
    assert (tdiff_psnr(flicker, clip) < psnr(flicker, clip)).all()


def test_an_image_has_no_frame_differences():
    assert tdiff_psnr(video(t=1), video(t=1, seed=1)).isnan().all()
    assert temporal_flickering(video(t=1)).isnan().all()


def test_latent_distance_is_relative():
    z = torch.randn(2, 3, 4)
    got = metric("latent_rel_l2").per_sample(video(), video(), Meta(latents=z * 1.1, ref_latents=z))
    assert torch.allclose(got, torch.full((2,), 0.1).double(), atol=1e-6)


# ---- ssim
def slow_ssim(x, y):
    """The definition, window by window: one plane pair [H, W]."""
    weight = torch.outer(window(), window())
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11].double(), y[i : i + 11, j : j + 11].double()
            ma, mb = (weight * a).sum(), (weight * b).sum()
            va, vb = (weight * (a - ma) ** 2).sum(), (weight * (b - mb) ** 2).sum()
            cov = (weight * (a - ma) * (b - mb)).sum()
            values.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    return torch.stack(values).mean()


def test_ssim_equals_the_slow_definition():
    x, y = video(1, 2, 15, 14), video(1, 2, 15, 14, seed=3)
    slow = torch.stack([slow_ssim(x[0, t, c], y[0, t, c]) for t in range(2) for c in range(3)]).mean()
    assert torch.allclose(ssim(x, y)[0], slow, atol=1e-9)


def test_ssim_of_itself_is_one_and_symmetric():
    x, y = video(), video(seed=1)
    assert torch.equal(ssim(x, x), torch.ones(2).double())
    assert torch.allclose(ssim(x, y), ssim(y, x), atol=1e-12)


def test_ssim_refuses_frames_smaller_than_its_window():
    with pytest.raises(UserError, match="11 x 11"):
        ssim(video(h=8), video(h=8))


# ---- seams
def test_seams_are_zero_on_identical_and_positive_after_tile_offsets():
    clip = torch.nn.functional.avg_pool2d(video(2, 3, 34, 34).flatten(0, 1), 3, 1).view(2, 3, 3, 32, 32)
    offset = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) * 0.1
    tiles = offset.repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert torch.equal(tile_seam(clip, clip, (1, 8, 8)), torch.zeros(2).double())
    assert (tile_seam(clip + tiles, clip, (1, 8, 8)) > 0.05).all()


def test_a_tile_that_covers_the_frame_has_no_seams_to_measure():
    clip = video()
    assert tile_seam(clip, clip, (1, 24, 20)).isnan().all()
    assert tile_seam(clip, clip, None).isnan().all()


# ---- time
def test_flickering_of_a_frozen_video_is_one_and_of_alternating_black_and_white_zero():
    frozen = video(t=1).expand(2, 5, 3, 24, 20)
    alternating = torch.tensor([0.0, 1, 0, 1]).view(1, 4, 1, 1, 1).expand(1, 4, 3, 8, 8)
    assert torch.equal(temporal_flickering(frozen), torch.ones(2).double())
    assert torch.equal(temporal_flickering(alternating), torch.zeros(1).double())


@pytest.mark.parametrize("speed", [0.25, 0.5, 1.0])
def test_motion_speed_reads_a_translation(speed):
    assert float(motion_speed(wave(speed=speed))) == pytest.approx(speed, rel=0.05)


def test_motion_speed_of_a_frozen_video_is_zero():
    assert float(motion_speed(wave(speed=0.0))) == 0


def test_shuffled_frames_are_less_smooth():
    clip = wave(t=7)
    shuffled = clip[:, [3, 0, 5, 1, 6, 2, 4]]
    assert float(midframe_smoothness(shuffled)) < float(midframe_smoothness(clip)) <= 1


# ---- teacher forcing
class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = 1.0

    def forward(self, x):
        return (self.gain * torch.tanh(x), "extra")


def sample(network, x, steps=4):
    for _ in range(steps):
        x = x - 0.25 * network(x)[0]
    return x


def test_teacher_forcing_keeps_the_dense_trajectory_and_measures_the_step_error():
    network, x = Network(), torch.randn(2, 5)
    with record_trajectory(network) as dense:
        end = sample(network, x)
    network.gain = 1.2
    with follow_trajectory(dense, network) as errors:
        forced = sample(network, x)
    steps = errors.by_step(batch=2, steps=4, sigmas=[1.0, 0.8, 0.5, 0.2, 0.0])
    assert torch.equal(forced, end)
    assert torch.allclose(steps["rel_l1"], torch.full((2, 4), 0.2).double(), atol=1e-5)
    assert torch.allclose(steps["weight"][0], torch.tensor([0.2, 0.3, 0.3, 0.2]).double())
    got = metric("step_rel_l1").per_sample(video(), meta=Meta(steps=steps))
    assert torch.allclose(got, torch.full((2,), 0.2).double(), atol=1e-5)
    assert torch.allclose(metric("step_cos").per_sample(video(), meta=Meta(steps=steps)), torch.ones(2).double())


def test_no_hook_is_left_behind_after_teacher_forcing():
    network, x = Network(), torch.randn(2, 5)
    before = sample(network, x)
    with record_trajectory(network) as dense:
        sample(network, x)
    with pytest.raises(UserError, match="steps and guidance"), follow_trajectory(dense, network):
        sample(network, x, steps=5)
    assert not network._forward_hooks and torch.equal(sample(network, x), before)


def test_guidance_calls_of_a_step_are_averaged():
    network, x = Network(), torch.randn(1, 5)
    with record_trajectory(network) as dense:
        network(x), network(-x)
    network.gain = 1.1
    with follow_trajectory(dense, network) as errors:
        network(x), network(-x)
    assert errors.by_step(batch=1, steps=1)["rel_l1"].shape == (1, 1)


# ---- registry
def test_every_metric_declares_itself():
    for name, one in metrics().items():
        assert one.id == name and one.summary
        assert one.family in ("fidelity", "video") and isinstance(one.higher_is_better, bool)


def test_an_unknown_metric_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'psnr'"):
        metric("psrn")


def test_world_metrics_are_skipped_with_a_reason_on_other_models():
    chosen, skipped = choose(["psnr", "acc_all"], world_model=False)
    assert [m.id for m in chosen] == ["psnr"]
    assert skipped[0]["id"] == "acc_all" and "world" in skipped[0]["reason"]


@pytest.mark.parametrize(
    "bad", [torch.rand(2, 3, 4, 5), torch.rand(1, 2, 4, 8, 8), torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8)]
)
def test_a_video_of_another_shape_is_refused(bad):
    with pytest.raises(UserError, match=r"\[B, T, 3, H, W\]"):
        metric("vbench.temporal_flickering").per_sample(bad)


def test_fidelity_needs_a_reference_of_the_same_shape():
    with pytest.raises(UserError, match="dense"):
        metric("psnr").per_sample(video())
    with pytest.raises(UserError, match="agree"):
        metric("psnr").per_sample(video(), video(t=3))


def test_missing_weights_name_the_file_the_key_and_the_variable():
    spec = WeightSpec("alexnet", "local", "alexnet.pth", "AlexNet, torchvision")
    text = str(MetricWeightsMissing("lpips_alex", spec, ("/a",), stand_in="perc_effnet"))
    for part in ("lpips_alex", "alexnet.pth", "/a", "weights.alexnet", "FOVEAL_WEIGHTS_DIR", "perc_effnet"):
        assert part in text
