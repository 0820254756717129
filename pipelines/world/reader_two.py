"""Two objects on a backdrop, explained by synthesis, also where one hides the other.

Notable choices
- Objects have different colours, so pixels are divided by colour first: a pixel is a mixture of backdrop and one
  colour, and the colour with the smallest rest gets it. The two colours with the most pixels are the two objects.
- Frames where an object is partly hidden take their first position from the line through the others.
- Then each object in turn is explained with the other one as given: what it can explain is linear in its mask, so
  ten hypotheses of shape and size and every Gauss-Newton step of the positions (one per frame) cost one mask each,
  and that only in a window around the object, which holds all of it.
- Which object lies in front is whichever order explains the clip better; where they never overlap there is no front.
- Positions are drawn very weakly towards their line, so that a hidden object's stay defined; frames count by how much
  they show.

B clips, T frames, S height = width, two objects (axis 1 of [B, 2, ...])
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveal.pipelines.world.reader_parts import centroids, fit_line, mask_at
from foveal.pipelines.world.render import palette
from foveal.pipelines.world.vocabulary import SHAPES, SIZES

SEEN = 0.8  # share of its largest visible area above which an object counts as not hidden
TRUST = 0.3  # share of its largest information above which a frame counts for jitter and velocity
PULL = 2e-3  # towards the line, relative to the information of the clearest frame
STRIDE = 2.0  # pixels, longest Gauss-Newton step
ROUNDS = 3  # choices of shape and size, each followed by moves
PASSES, STEPS = 2, 2  # of each round: times that each object is moved, Gauss-Newton steps each time
REACH = 1.15  # half a window, in radii of the large kind, plus three pixels


@dataclass(frozen=True, slots=True)
class TwoObjects:
    """An explanation of B clips by two objects each."""

    colour: Tensor  # [B, 2]
    shape: Tensor  # [B, 2]
    size: Tensor  # [B, 2]
    centroid: Tensor  # [B, 2, T, 2]
    trust: Tensor  # [B, 2, T] how much each frame says about the position, at most 1
    front: Tensor  # [B] the object drawn last, 0 or 1
    error: Tensor  # [B] mean squared error
    error_without: Tensor  # [B] smallest error with one of the two left out
    colour_drift: Tensor  # [B]
    area_drift: Tensor  # [B]


def colour_masses(frames: Tensor, back: Tensor, threshold: float) -> Tensor:
    """How much of the frame, on average over (at most eight) frames, is nearest to each colour.  -> [B, 8]"""
    frames = frames[:, :: max(1, frames.shape[1] // 8)]
    rest, share = _mixtures(frames, back, threshold, palette(frames.device).colour.expand(len(frames), -1, -1))
    label = rest.argmin(1)
    return torch.stack([(share[:, k] * (label == k)).mean((1, 2, 3)) for k in range(share.shape[1])], 1)


def explain_two(frames: Tensor, back: Tensor, colour: Tensor, threshold: float) -> TwoObjects:
    """frames [B, T, 3, S, S] in [0, 1], back [B, 1, 3, S, S], colour [B, 2] the two colours to explain with."""
    world = palette(frames.device)
    rest, share = _mixtures(frames, back, threshold, world.colour[colour])
    nearest = rest.argmin(1)
    seen = torch.stack([share[:, k] * (nearest == k) for k in (0, 1)], 1)  # [B, 2, T, S, S]
    start = _first_guess(seen)
    fit = _Fit(frames, back, world.colour[colour], world.radius[1], colour, seen)
    state = _State(torch.zeros_like(colour), torch.zeros_like(colour), start, torch.ones_like(start[..., 0]))
    masks, front = [seen[:, 0], seen[:, 1]], None
    for _ in range(ROUNDS):
        for k in (0, 1):
            state, masks[k] = fit.choose(state, k, masks[1 - k], front)
        front = fit.front(masks)
        for _ in range(PASSES):
            for k in (0, 1):
                state, masks[k] = fit.move(state, k, masks[1 - k], front)
    front = fit.front(masks)
    return fit.result(state, masks, front)


def _mixtures(frames: Tensor, back: Tensor, threshold: float, colour: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels as mixtures of the backdrop and one of K colours.  colour [B, K, 3]

    -> rest [B, K, T, S, S] (squared distance from the mixture), share of the colour [B, K, T, S, S] in [0, 1], zero where
    the pixel is backdrop
    """
    deviation = frames - back
    is_object = deviation.abs().amax(2) > threshold
    rests, shares = [], []
    for k in range(colour.shape[1]):
        axis = colour[:, k].view(-1, 1, 3, 1, 1) - back  # [B, 1, 3, S, S]
        share = ((deviation * axis).sum(2) / (axis * axis).sum(2)).clamp(0, 1)
        rests.append((deviation - share[:, :, None] * axis).square().sum(2))
        shares.append(share * is_object)
    return torch.stack(rests, 1), torch.stack(shares, 1)


def _first_guess(seen: Tensor) -> Tensor:
    """Positions from the visible parts; where an object is partly hidden, from the line through the other frames."""
    batch, _, frames = seen.shape[:3]
    flat = seen.flatten(0, 1)
    found, area = centroids(flat), flat.sum((2, 3))
    whole = area > SEEN * area.amax(1, keepdim=True)
    _, _, line = fit_line(found, whole + 1e-3 * area / area.amax(1, keepdim=True).clamp(min=1e-6))
    return torch.where(whole[..., None], found, line).clamp(0, 1).view(batch, 2, frames, 2)


@dataclass(frozen=True, slots=True)
class _State:
    shape: Tensor  # [B, 2]
    size: Tensor  # [B, 2]
    centroid: Tensor  # [B, 2, T, 2]
    trust: Tensor  # [B, 2, T]

    def with_object(self, k: int, **values: Tensor) -> _State:
        """A copy in which object k has other values."""
        changed = {}
        for name, value in values.items():
            old = getattr(self, name)
            changed[name] = torch.stack([value, old[:, 1]] if k == 0 else [old[:, 0], value], 1)
        return replace(self, **changed)


@dataclass(frozen=True, slots=True)
class _Fit:
    frames: Tensor  # [B, T, 3, S, S]
    back: Tensor  # [B, 1, 3, S, S]
    paint: Tensor  # [B, 2, 3] the objects' colours
    radius: Tensor  # [2] by size
    colour: Tensor  # [B, 2]
    seen: Tensor  # [B, 2, T, S, S]

    @property
    def window(self) -> int:
        """Edge of a window in pixels."""
        pixels = self.frames.shape[-1]
        return min(pixels, 2 * math.ceil(REACH * float(self.radius.max()) * pixels) + 6)

    def choose(self, state: _State, k: int, other: Tensor, front: Tensor | None) -> tuple[_State, Tensor]:
        """The shape and size of object k that explain most. Without `front` the other's pixels are left out."""
        view = _View(state.centroid[:, k], self.frames.shape[-1], self.window)
        gain, cost = self._linear(k, other, front, view)
        best = torch.full_like(self.paint[:, 0, 0], torch.inf)
        found = torch.zeros(2, len(best), dtype=torch.long, device=best.device)
        for shape in range(len(SHAPES)):
            for size in range(len(SIZES)):
                mask = self._mask(shape, size, state.centroid[:, k], view)
                error = (mask * (mask * cost - 2 * gain)).sum((1, 2, 3))
                better = error < best
                best = torch.where(better, error, best)
                found = torch.where(better, torch.tensor([[shape], [size]], device=best.device), found)
        state = state.with_object(k, shape=found[0], size=found[1])
        return state, view.put(self._mask(found[0], found[1], state.centroid[:, k], view))

    def move(self, state: _State, k: int, other: Tensor, front: Tensor) -> tuple[_State, Tensor]:
        """A few Gauss-Newton steps of the positions of object k, all frames at once."""
        view = _View(state.centroid[:, k], self.frames.shape[-1], self.window)
        gain, cost = self._linear(k, other, front, view)
        shape, size, position = state.shape[:, k], state.size[:, k], state.centroid[:, k]
        mask = self._mask(shape, size, position, view)
        for _ in range(STEPS):
            step, trust = _newton(mask, gain, cost, position, self.frames.shape[-1])
            position = (position + step).clamp(-0.5, 1.5)
            mask = self._mask(shape, size, position, view)
        return state.with_object(k, centroid=position, trust=trust), view.put(mask)

    def front(self, masks: list[Tensor]) -> Tensor:
        """Which object drawn last explains the clip better.  -> [B]"""
        errors = [self._error(masks, torch.full_like(self.colour[:, 0], last)) for last in (0, 1)]
        return (errors[1] <= errors[0]).long()

    def result(self, state: _State, masks: list[Tensor], front: Tensor) -> TwoObjects:
        """The explanation with its error and drifts."""
        alone = [self._error([masks[0] * (k == 0), masks[1] * (k == 1)], front) for k in (0, 1)]
        colour, off, area = [], [], []
        for k in (0, 1):
            target, visible, beneath = self._around(k, self.frames, self.back, masks[1 - k], front)
            weight = visible * masks[k][:, :, None]
            target = target + weight * beneath
            total = (weight * weight).sum((3, 4)).clamp(min=1e-3)  # [B, T, 1]
            fit = (target * weight).sum((3, 4)) / total
            share = total / total.amax(1, keepdim=True)
            colours = palette(self.frames.device).colour
            mean = (fit * total).sum(1) / total.sum(1)
            colour.append(torch.cdist(mean, colours).argmin(1))
            off.append(_spread((fit - colours[colour[-1]][:, None]).norm(dim=2), share[..., 0]))
            area.append(_spread(self.seen[:, k].sum((2, 3)) / weight.sum((2, 3, 4)).clamp(min=1e-1), share[..., 0]))
        found = torch.stack(colour, 1)
        clear = (found[:, :1] != found[:, 1:]).expand(-1, 2)
        return TwoObjects(
            colour=torch.where(clear, found, self.colour),
            shape=state.shape,
            size=state.size,
            centroid=state.centroid,
            trust=torch.where(state.trust > TRUST, 1.0, 0.0),
            front=front,
            error=self._error(masks, front),
            error_without=torch.minimum(*alone),
            colour_drift=torch.stack(off, 1).mean(1),
            area_drift=torch.stack(area, 1).mean(1),
        )

    def _linear(self, k: int, other: Tensor, front: Tensor | None, view: _View) -> tuple[Tensor, Tensor]:
        """What object k can explain: error(mask) = const + sum mask (mask cost - 2 gain).  -> gain, cost [B, T, W, W]"""
        frames, back = view.cut(self.frames), view.cut(self.back.expand_as(self.frames))
        cover = view.cut(other[:, :, None])[:, :, 0]
        target, visible, beneath = self._around(k, frames, back, cover, front)
        axis = self.paint[:, k].view(-1, 1, 3, 1, 1) - beneath
        return (visible * target * axis).sum(2), (visible * axis).square().sum(2)

    def _around(
        self, k: int, frames: Tensor, back: Tensor, other: Tensor, front: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is left to explain once the other object is painted, how visible k is, and what lies beneath it."""
        cover = other[:, :, None]
        if front is None:  # leave the other's pixels out
            return (frames - back) * (1 - cover), 1 - cover, back
        ahead = (front == k).view(-1, 1, 1, 1, 1)
        under = back * (1 - cover) + self.paint[:, 1 - k].view(-1, 1, 3, 1, 1) * cover
        visible = torch.where(ahead, torch.ones_like(cover), 1 - cover)
        return frames - under, visible, torch.where(ahead, under, back)

    def _error(self, masks: list[Tensor], front: Tensor) -> Tensor:
        last = (front == 1).view(-1, 1, 1, 1)
        low, high = torch.where(last, masks[0], masks[1]), torch.where(last, masks[1], masks[0])
        order = (front == 1).view(-1, 1)
        first = torch.where(order, self.paint[:, 0], self.paint[:, 1]).view(-1, 1, 3, 1, 1)
        second = torch.where(order, self.paint[:, 1], self.paint[:, 0]).view(-1, 1, 3, 1, 1)
        low, high = low[:, :, None], high[:, :, None]
        picture = (self.back * (1 - low) + first * low) * (1 - high) + second * high
        return (picture - self.frames).square().mean((1, 2, 3, 4))

    def _mask(self, shape: int | Tensor, size: int | Tensor, centroid: Tensor, view: _View) -> Tensor:
        radius = self.radius[size].expand(len(centroid))
        return mask_at(shape, radius, centroid - view.origin, self.frames.shape[-1], view.window)


class _View:
    """A square window around a position in every frame."""

    def __init__(self, centroid: Tensor, pixels: int, window: int) -> None:
        self.pixels, self.window = pixels, window
        first = (centroid * pixels - window / 2).round().long().clamp(0, pixels - window)  # [B, T, 2]
        self.origin = first / pixels
        steps = torch.arange(window, device=centroid.device)
        rows, columns = first[..., 1, None] + steps, first[..., 0, None] + steps
        self.index = (rows[..., :, None] * pixels + columns[..., None, :]).flatten(2)  # [B, T, W W]

    def cut(self, picture: Tensor) -> Tensor:
        """[B, T, C, S, S] -> [B, T, C, W, W]"""
        index = self.index[:, :, None].expand(-1, -1, picture.shape[2], -1)
        return picture.flatten(3).gather(3, index).unflatten(3, (self.window, self.window))

    def put(self, mask: Tensor) -> Tensor:
        """[B, T, W, W] -> [B, T, S, S], zero outside the window"""
        whole = mask.new_zeros(*mask.shape[:2], self.pixels**2)
        return whole.scatter(2, self.index, mask.flatten(2)).unflatten(2, (self.pixels, self.pixels))


def _newton(mask: Tensor, gain: Tensor, cost: Tensor, position: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """One Gauss-Newton step of the positions [B, T, 2], and how much each frame says about its own, at most 1 [B, T]."""
    slope_x, slope_y = (-0.5 * pixels * _difference(mask, axis) for axis in (3, 2))
    rest = gain - mask * cost
    pull = torch.stack([(slope_x * rest).sum((2, 3)), (slope_y * rest).sum((2, 3))], -1)
    along_x, along_y = slope_x * cost, slope_y * cost
    xx, yy, xy = (a.sum((2, 3)) for a in (along_x * slope_x, along_y * slope_y, along_x * slope_y))
    most = (xx + yy).amax(1, keepdim=True).clamp(min=1e-9)
    trust = (xx + yy) / most
    _, _, line = fit_line(position, trust + 1e-6)
    pull = pull - (PULL * most)[..., None] * (position - line)
    xx, yy = xx + PULL * most, yy + PULL * most
    determinant = (xx * yy - xy * xy).clamp(min=1e-12)
    step = torch.stack([yy * pull[..., 0] - xy * pull[..., 1], xx * pull[..., 1] - xy * pull[..., 0]], -1)
    step = step / determinant[..., None]
    return step * (STRIDE / pixels / step.norm(dim=-1, keepdim=True).clamp(min=1e-9)).clamp(max=1), trust


def _difference(mask: Tensor, axis: int) -> Tensor:
    """Central differences along an axis of pictures that are zero at their edges."""
    return torch.roll(mask, -1, axis) - torch.roll(mask, 1, axis)


def _spread(value: Tensor, weight: Tensor) -> Tensor:
    """Weighted standard deviation over frames.  [B, T] -> [B]"""
    weight = weight / weight.sum(1, keepdim=True)
    mean = (weight * value).sum(1, keepdim=True)
    return (weight * (value - mean) ** 2).sum(1).sqrt()
