"""`bench backbones`: throughput, memory, weights and multiply-adds of every backbone, and of one ViT with each of our attention layers.

Groups of cases: "inference", "layers", "training"; ``--cases`` takes groups or names of cases.

Notable choices
- Models stand beside the DeiT of their letter (tiny, small, base), which is timm's with fused softmax attention.
- Layers are found, not listed: whatever foveal.vision has put into timm's table of attention layers takes the place of DeiT-T's. One
  that cannot be built or run is a row that failed. They are timed at two lengths, 197 and 1025 tokens.
- Multiply-adds are complete (multiply_adds.py); where a paper publishes its own, they stand beside ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from foveal.pipelines.bench.image_models import Entrant, ImageCase, image_rows, line
from foveal.pipelines.bench.multiply_adds import Count, multiply_adds
from foveal.pipelines.bench.rounds import How, reason
from foveal.pipelines.bench.rows import Rows
from foveal.pipelines.bench.vision import chosen, rows_or_failure

CLAIMED = {  # multiply-adds at 224 pixels in the papers of ViG (read off its figure and abstract) and BiFormer
    "vig_tiny_patch16_224": 0.9e9, "vig_small_patch16_224": 3.5e9, "biformer_tiny": 2.2e9, "biformer_small": 4.5e9, "biformer_base": 9.8e9,
}  # fmt: skip
BATCHES = {"tiny": 256, "small": 256, "base": 128}
LENGTHS = ((224, 256), (512, 64))
SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3}


def _of_letter(letter: str) -> tuple[Entrant, ...]:
    sized = (f"deit_{letter}_patch16_224", f"vig_{letter}_patch16_224")
    names = (*sized, f"vig_h_{letter}", f"biformer_{letter}")
    return tuple(Entrant(model=name, sized=name in sized, claimed=CLAIMED.get(name)) for name in names)


def layer_entrants(names: Sequence[str], model: str = "deit_tiny_patch16_224", **knobs: Any) -> tuple[Entrant, ...]:
    """A ViT as it is, then with each of these layers."""
    changed = [Entrant(model=model, label=f"{name} attention", layer=name, knobs=knobs) for name in names]
    return (Entrant(model=model, knobs=knobs), *changed)


def found_layers() -> list[str]:
    """Names of our attention layers; none where they cannot be imported, and it is said."""
    try:
        from foveal.vision.creating import attention_layers

        return list(attention_layers())
    except Exception as error:
        print(f"attention layers could not be found: {reason(error)}", flush=True)
        return []


def real_cases() -> list[ImageCase]:
    plain = [
        ImageCase(name=f"{letter}, 224 pixels", group="inference", size=224, batch=batch, entrants=_of_letter(letter))
        for letter, batch in BATCHES.items()
    ]
    entrants = layer_entrants(found_layers())
    layers = [
        ImageCase(name=f"layers in DeiT-T, {size} pixels", group="layers", size=size, batch=batch, entrants=entrants)
        for size, batch in LENGTHS
    ]
    trained = [
        ImageCase(
            name=f"{letter}, training, 224 pixels", group="training", size=224, batch=batch // 4, entrants=_of_letter(letter), training=True,
        )
        for letter, batch in BATCHES.items()
    ]  # fmt: skip
    return [*plain, *layers, *trained]


def tiny_cases() -> list[ImageCase]:
    pair = (
        Entrant(model="deit_tiny_patch16_224", knobs=SMALL),
        Entrant(model="vig_tiny_patch16_224", knobs=SMALL),
        Entrant(model="vig_h_tiny", sized=False, knobs={"embed_dim": 32, "depths": (1, 1), "num_heads": (1, 2)}),
    )
    layers = layer_entrants(found_layers(), **SMALL)
    return [
        ImageCase(name="very small", group="inference", size=64, batch=2, entrants=pair),
        ImageCase(name="very small layers", group="layers", size=64, batch=2, entrants=layers),
        ImageCase(name="very small, training", group="training", size=64, batch=2, entrants=pair[:2], training=True),
    ]


Counts = dict[tuple[str, int], Count]


def counted_rows(case: ImageCase, how: How, known: Counts | None = None) -> Rows:
    """Rows of a case with the multiply-adds of one image, forward; null where a model cannot be counted.

    known: counts by name and size, to which those of this case are added.
    """
    rows, known = image_rows(case, how), {} if known is None else known
    for entrant, found in zip(case.entrants, rows, strict=True):
        of = (entrant.name, case.size)
        if not found.get("failed") and of not in known:
            try:
                known[of] = multiply_adds(lambda entrant=entrant: entrant.build(case.size), case.size)  # type: ignore[misc]
            except Exception as error:
                found["not_counted"] = reason(error)
        count = None if found.get("failed") else known.get(of)
        found |= {
            "multiply_adds": count.total if count else None, "mixing_multiply_adds": count.mixing if count else None,
        }  # fmt: skip
    return rows


def measure(
    device: torch.device, seconds: float, tiny: bool = False, cases: Sequence[str] | None = None, rounds: int | None = None
) -> Iterator[Rows]:  # fmt: skip
    """The rows of every case, case by case. seconds: of measuring per case."""
    how, known = How.on(device, seconds, rounds), Counts()
    for case in chosen(tiny, cases, tiny_cases() if tiny else real_cases()):
        yield rows_or_failure(partial(counted_rows, known=known), case, how)
        if device.type == "cuda":
            torch.cuda.empty_cache()


__all__ = ["line", "measure"]
