"""Weights of LINA: names of the released files, our own names, and loading either into a model.

Letters: E encoder blocks, D width, p patch, C channels, N tokens of the decoder.

Notable choices
- The released trunk is one list of blocks; its first E are our encoder. Its convolutions over whole patches are our linear layers.
- Two normalisations were released with two layouts: ``qkv``, or ``q`` and ``kv``.
- Gates for another number of tokens are refused unless resizing is asked for: they change what the model says.
"""

from __future__ import annotations

import re
import warnings

import torch
from torch import Tensor

from foveal.vision.lina import LinaModel
from foveal.vision.lina_attention import resized_gates
from foveal.vision.lina_config import LinaConfig

Weights = dict[str, Tensor]
# (our name, released name); the blocks of the trunk are numbered apart.
NAMES = (
    (r"connector\.patch_embed\.", "video_encoder.patch_embed.proj."),
    (r"connector\.(blocks|norm)\.", r"video_encoder.\1."),
    (r"connector\.query", "mask_embed.bos_token"),
    (r"mask_token", "mask_embed.mask_token"),
    (r"connector\.time\.fc1\.", "video_pos_embed.time_proj.0."),
    (r"connector\.time\.fc2\.", "video_pos_embed.time_proj.2."),
    (r"connector\.time_norm\.", "video_pos_embed.norm."),
    (r"embed\.", "image_encoder.patch_embed.proj."),
    (r"norm\.", "image_encoder.norm."),
    (r"head\.embed\.", "image_decoder.patch_embed.proj."),
    (r"head\.time\.(fc\d)\.", r"image_decoder.time_cond_embed.timestep_proj.\1."),
    (r"head\.(fc\d)\.", r"image_decoder.time_cond_embed.condition_proj.\1."),
    (r"head\.blocks\.(\d+)\.modulation\.", r"image_decoder.blocks.\1.norm1.proj."),
    (r"head\.blocks\.(\d+)\.(fc\d)\.", r"image_decoder.blocks.\1.proj.\2."),
    (r"head\.blocks\.(\d+)\.norm\.", r"image_decoder.blocks.\1.norm2."),
    (r"head\.modulation\.", "image_decoder.norm.proj."),
    (r"head\.out\.", "image_decoder.head."),
)
GATES = ("key_scale", "value_scale")


def released_name(name: str, config: LinaConfig) -> str:
    """Our name of a parameter -> its name in a released file."""
    if found := re.match(r"(encoder|decoder)\.(\d+)\.(.+)", name):
        number = int(found[2]) + (config.encoder_depth if found[1] == "decoder" else 0)
        return f"image_encoder.blocks.{number}.{found[3]}"
    if name.startswith("condition."):
        kind = "label_embed" if config.num_classes is not None else "text_embed"
        return f"{kind}.{name.removeprefix('condition.')}"
    for ours, theirs in NAMES:
        if re.match(ours, name):
            return re.sub(f"^{ours}", theirs, name)
    raise ValueError(f"{name} is no parameter of LINA.")


def released_weights(model: LinaModel) -> Weights:
    """A model's weights under the released names and in their shapes: what ``load_weights`` takes back."""
    config, out = model.config, {}
    for name, value in model.state_dict().items():
        if name in ("embed.weight", "head.embed.weight"):
            value = value.unflatten(1, (config.channels, config.patch, config.patch))
        out[released_name(name, config)] = value
    return out


def load_weights(model: LinaModel, weights: Weights, *, resize_gates: bool = False) -> None:
    """Fill a model with weights under our names or the released ones; all of them must be there.

    resize_gates    take gates of another grid, bilinearly (fine-tune afterwards); otherwise they are a ValueError
    Raises ValueError in one sentence for names or shapes that do not fit, and for key gates of 0 and below in a model that keeps
    them positive; warns where the model takes them.
    """
    given = _unwrapped(weights)
    if any(name.startswith("image_encoder.") for name in given):
        names = {released_name(name, model.config): name for name in model.state_dict()}
        given = {names.get(name, name): value for name, value in given.items()}
        positive = model.config.kv_gate == "exp"
        given = {
            name: _logarithm(name, value) if positive and name.endswith(GATES[0]) else value
            for name, value in given.items()
        }
    own = model.state_dict()
    given = {name: _fitted(name, value, own, model, resize_gates) for name, value in given.items()}
    _check_names(own, given)
    if model.config.kv_gate == "raw":
        for name in (n for n in given if n.endswith(GATES[0]) and bool((given[n] <= 0).any())):
            warnings.warn(
                f"{name.removesuffix('.' + GATES[0])} has key gates down to {float(given[name].min()):.3g}; at 0 and below the "
                "sum that divides can vanish and the output explode.", stacklevel=2,
            )  # fmt: skip
    model.load_state_dict(given, strict=True)


def _unwrapped(weights: Weights) -> Weights:
    """Without prefixes of wrappers, and with q and kv joined."""
    given = {re.sub(r"^(module|transformer|_orig_mod)\.", "", name): value for name, value in weights.items()}
    for name in [n for n in given if re.search(r"\.attn\.q\.(weight|bias)$", n)]:
        q = given.pop(name)
        given[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([q, given.pop(name.replace(".attn.q.", ".attn.kv."))])
    return given


def _logarithm(name: str, gates: Tensor) -> Tensor:
    if bool((gates <= 0).any()):
        raise ValueError(
            f"{name} has key gates down to {float(gates.min()):.3g}, which exp cannot give; load them with kv_gate='raw'."
        )
    return gates.log()


def _fitted(name: str, value: Tensor, own: Weights, model: LinaModel, resize: bool) -> Tensor:
    target = own.get(name)
    if target is None or value.shape == target.shape:
        return value
    if name.endswith(GATES) and value.ndim == 4 and value.shape[1] == target.shape[1]:
        if not resize:
            raise ValueError(
                f"{name} holds gates for {value.shape[2]} tokens and the model has {target.shape[2]}; give resize_gates=True to "
                "resize them, and fine-tune afterwards."
            )
        return resized_gates(value, model.config.grid)
    if value.numel() == target.numel() and value.squeeze().shape[:1] == target.squeeze().shape[:1]:
        return value.reshape(target.shape)  # a convolution over a whole patch, a token with or without batch dimensions
    raise ValueError(
        f"{name} is {tuple(value.shape)} and the model needs {tuple(target.shape)}; choose the preset it was made for."
    )


def _check_names(own: Weights, given: Weights) -> None:
    lacking, foreign = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    if lacking or foreign:
        shown = "; ".join(
            f"{what}: {', '.join(names[:4])}" for what, names in (("missing", lacking), ("unknown", foreign)) if names
        )
        raise ValueError(f"the weights do not fit the model ({shown}); choose the preset they were made for.")
