"""Videos of a run as small sprites: one picture with all frames of a clip, and one with its difference to dense.

Letters: T frames, H height, W width.

* Frames are uint8 [T, H, W, 3]. Sprites hold them in rows, ``columns(T)`` to a row.
* Lossless WebP as long as a picture fits its share of the page's budget; then lossy, then smaller. What was done stands
  in `Sprite.note` and is shown, because a compressed picture must not be mistaken for the output.
* Differences are taken from the raw frames before any encoding: mean over RGB of |method - dense|, times a stated gain.
"""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open

from foveal.pipelines.report.source import Method, Study, finite, sequence, string

Frames = NDArray[np.uint8]
MAX_SAMPLES, MAX_FRAMES, MAX_SIDE = 4, 48, 256
QUALITIES = (90, 75, 55)
GAINS = (2, 4, 8, 16)


@dataclass(frozen=True)
class Sample:
    prompt_index: int
    seed: int
    prompt: str

    @property
    def key(self) -> str:
        return f"{self.prompt_index}-{self.seed}"


@dataclass(frozen=True)
class Sprite:
    """uri: data URI; the clip has ``frames`` frames of width x height, ``columns`` to a row."""

    uri: str
    frames: int
    width: int
    height: int
    columns: int
    note: str


@dataclass(frozen=True)
class Clip:
    """What one method made of one sample. difference and psnr (one a frame) are None for dense and without dense."""

    method: Method
    sprite: Sprite
    difference: Sprite | None
    psnr: tuple[float, ...] | None


@dataclass(frozen=True)
class Reel:
    """All clips of one sample. gain: factor of its difference pictures."""

    sample: Sample
    clips: tuple[Clip, ...]
    gain: int


def columns(frames: int) -> int:
    return max(1, math.ceil(math.sqrt(frames)))


# ---- reading
def samples(study: Study) -> list[Sample]:
    """Samples that have media, by prompt and seed; every prompt once before any prompt twice."""
    prompts = [string(p) for p in sequence(study.design.get("prompts"))]
    seen: set[tuple[int, int]] = set()
    for m in study.methods:
        folder = study.file("media", m.id)
        for path in sorted(folder.glob("*.safetensors")) if folder else []:
            if found := re.fullmatch(r"(\d+)-(\d+)", path.stem):
                seen.add((int(found[1]), int(found[2])))
    rank: dict[int, int] = {}
    order = []
    for p, s in sorted(seen):
        rank[p] = rank.get(p, -1) + 1
        order.append((rank[p], p, s))
    return [Sample(p, s, prompts[p] if p < len(prompts) else "") for _, p, s in sorted(order)]


def read_video(path: Path) -> Frames | None:
    """uint8 [T, H, W, 3], or None if the file cannot be read as that."""
    try:
        with safe_open(path, framework="numpy") as file:
            video = file.get_tensor("video")
    except Exception:  # a damaged picture must not cost the report its numbers; the page says that it is missing
        return None
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or 0 in video.shape:
        return None
    return video


def reels(study: Study, budget: int, most: int = MAX_SAMPLES) -> list[Reel]:
    """Clips of the first samples, in at most about ``budget`` bytes of base64."""
    chosen = samples(study)[:most]
    share = int(budget * 3 / 4) // max(1, len(chosen) * 2 * len(study.methods))
    return [reel for s in chosen if (reel := _reel(study, s, share)).clips]


def _reel(study: Study, sample: Sample, share: int) -> Reel:
    videos = {}
    for m in study.methods:
        path = study.file("media", m.id, f"{sample.key}.safetensors")
        video = read_video(path) if path else None
        if video is not None:
            videos[m.id] = video
    base = videos.get(study.dense.id) if study.dense else None
    away = {
        m.id: difference(videos[m.id], base)
        for m in study.sparse
        if m.id in videos and base is not None and videos[m.id].shape == base.shape
    }
    gain = choose_gain(list(away.values()))
    clips = []
    for m in study.methods:
        if m.id not in videos:
            continue
        shown = shrunk(videos[m.id], share)
        if m.id not in away or base is None:
            clips.append(Clip(m, shown, None, None))
            continue
        picture = shrunk(paint(away[m.id], gain), share)
        clips.append(Clip(m, shown, picture, frame_psnr(thin(videos[m.id]), thin(base))))
    return Reel(sample, tuple(clips), gain)


# ---- differences
def difference(video: Frames, base: Frames) -> NDArray[np.float32]:
    """Mean over RGB of the absolute difference, [T, H, W] in 0..255."""
    return np.abs(video.astype(np.int16) - base.astype(np.int16)).astype(np.float32).mean(-1)


def choose_gain(differences: list[NDArray[np.float32]]) -> int:
    """The largest gain of 2, 4, 8, 16 that leaves 95 % of the pixels of every method unclipped; 2 if none does."""
    if not differences:
        return 1
    high = max(float(np.percentile(d, 95)) for d in differences)
    return max((g for g in GAINS if g * high <= 255), default=GAINS[0])


def paint(away: NDArray[np.float32], gain: int) -> Frames:
    """Black - red - orange - pale yellow: brightness grows steadily, so it reads in grey too."""
    x = np.clip(away * gain / 255, 0, 1)[..., None]
    stops = np.array([[8, 8, 14], [120, 28, 60], [226, 92, 34], [250, 180, 60], [255, 250, 214]], np.float32)
    at = x[..., 0] * (len(stops) - 1)
    low = np.clip(at.astype(int), 0, len(stops) - 2)
    part = (at - low)[..., None]
    return (stops[low] * (1 - part) + stops[low + 1] * part + 0.5).astype(np.uint8)


def frame_psnr(video: Frames, base: Frames) -> tuple[float, ...]:
    """PSNR of each frame in dB, from 8-bit values, at most 100."""
    mse = ((video.astype(np.float64) - base) ** 2).mean((1, 2, 3)) / 255**2
    return tuple(float(min(100.0, -10 * np.log10(max(m, 1e-10)))) for m in mse)


# ---- encoding
def shrunk(video: Frames, share: int) -> Sprite:
    """A sprite of the video, thinned and reduced where it is long or large; the note says so."""
    small = sprite(shrink(thin(video)), share)
    note = small.note
    if (small.height, small.width) != video.shape[1:3]:
        note += f", reduced from {video.shape[2]} × {video.shape[1]} pixels"
    if small.frames != len(video):
        note += f", {small.frames} of {len(video)} frames"
    return replace(small, note=note)


def thin(video: Frames) -> Frames:
    """At most MAX_FRAMES frames, evenly."""
    return video if len(video) <= MAX_FRAMES else video[np.linspace(0, len(video) - 1, MAX_FRAMES).round().astype(int)]


def shrink(video: Frames) -> Frames:
    """At most MAX_SIDE on the longer side, by averaging."""
    side = max(video.shape[1:3])
    if side <= MAX_SIDE:
        return video
    size = tuple(max(1, round(n * MAX_SIDE / side)) for n in (video.shape[2], video.shape[1]))
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BOX)) for f in video])


def sheet(video: Frames) -> Image.Image:
    """All frames in one picture, row by row."""
    t, h, w, _ = video.shape
    cols = columns(t)
    out = np.zeros((math.ceil(t / cols) * h, cols * w, 3), np.uint8)
    for i, frame in enumerate(video):
        y, x = divmod(i, cols)
        out[y * h : (y + 1) * h, x * w : (x + 1) * w] = frame
    return Image.fromarray(out)


def sprite(video: Frames, share: int) -> Sprite:
    """The best encoding that fits ``share`` bytes; the smallest one if none does."""
    t, h, w, _ = video.shape
    data, note = _webp(sheet(video), None), "without loss"
    for quality in QUALITIES:
        if len(data) <= share:
            break
        data, note = _webp(sheet(video), quality), f"as WebP of quality {quality}"
    if len(data) > share and max(h, w) > 96:
        half = np.stack([np.asarray(Image.fromarray(f).resize((w // 2, h // 2), Image.Resampling.BOX)) for f in video])
        return sprite(half, share)
    return Sprite("data:image/webp;base64," + base64.b64encode(data).decode(), t, w, h, columns(t), note)


def _webp(picture: Image.Image, quality: int | None) -> bytes:
    out = io.BytesIO()
    if quality is None:
        picture.save(out, "WEBP", lossless=True, quality=90, method=4)
    else:
        picture.save(out, "WEBP", quality=quality, method=4)
    return out.getvalue()


def sample_count(study: Study) -> int:
    """Samples that the run made, from its design."""
    return max(1, len(sequence(study.design.get("prompts")))) * max(1, len(sequence(study.design.get("seeds"))))


def frame_rate(study: Study) -> float:
    return finite(study.model.get("fps")) or 8.0
