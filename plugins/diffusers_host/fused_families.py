"""The processors of Wan, Flux and HunyuanVideo, restated in three parts: their arguments, raw queries and keys, their output.

Letters: B batch, C channels, T text tokens, N tokens of a stream, M tokens of the joint sequence, H heads, D head dim.

* What lies between the parts (norm, rotation, joining, attention) is where models spend passes over q and k; see fused.py.
* Projections and outputs are the layer's own modules: LoRA, quantised and fused projections keep working.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveal.kernels.query_key import Rotation
from foveal.plugins.diffusers_host import private


class Call(NamedTuple):
    """A processor's arguments. hidden [B, N, C], text [B, T, C] or None; mask as attention takes it; rope (cos, sin)."""

    hidden: Tensor
    text: Tensor | None
    mask: Tensor | None
    rope: tuple[Tensor, Tensor] | None

    @property
    def tokens(self) -> int:
        return self.hidden.shape[1] + (0 if self.text is None else self.text.shape[1])


class Stream(NamedTuple):
    """A run of tokens of the joint sequence: raw q, k [B, N, H, D], their norm modules, their rotation."""

    q: Tensor
    k: Tensor
    norms: tuple[nn.Module | None, nn.Module | None]
    rotation: Rotation | None


Streams = tuple[list[Stream], Tensor]  # streams in the order of the joint sequence, and v [B, M, H, D]


class Family(NamedTuple):
    """One processor class, restated. across: its norm goes over all heads of a token."""

    read: Callable[..., Call | str]
    project: Callable[[Any, Call], Streams]
    output: Callable[[Any, Tensor, Call], Any]
    across: bool = False


# ---- Wan
def _read_wan(
    attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None, rotary_emb: Any = None
) -> Call | str:  # fmt: skip
    if encoder_hidden_states is not None or attn.add_k_proj is not None:
        return "it attends to other tokens too"
    return Call(hidden_states, None, attention_mask, rotary_emb)


def _project_wan(attn: Any, call: Call) -> Streams:
    q, k, v = (_heads(x, attn.heads) for x in private.wan_projections()(attn, call.hidden, call.hidden))
    rope = None if call.rope is None else (call.rope[0][0, :, 0], call.rope[1][0, :, 0])
    return [Stream(q, k, (attn.norm_q, attn.norm_k), _rotation(rope, shared=True))], v


def _output_wan(attn: Any, out: Tensor, call: Call) -> Tensor:
    return attn.to_out[1](attn.to_out[0](out.flatten(2, 3)))


# ---- Flux: text first, rotated like the rest
def _read_flux(
    attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None, image_rotary_emb: Any = None
) -> Call | str:  # fmt: skip
    if (encoder_hidden_states is None) != (attn.added_kv_proj_dim is None):
        return "text comes without projections of its own"
    return Call(hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


def _project_flux(attn: Any, call: Call) -> Streams:
    raw = private.flux_projections()(attn, call.hidden, call.text)
    q, k, v = (x.unflatten(-1, (-1, attn.head_dim)) for x in raw[:3])
    norms = (attn.norm_q, attn.norm_k)
    if call.text is None:
        return [Stream(q, k, norms, _rotation(call.rope))], v
    text_q, text_k, text_v = (x.unflatten(-1, (-1, attn.head_dim)) for x in raw[3:])
    text = call.text.shape[1]
    lead, rest = _rotation(call.rope, stop=text), _rotation(call.rope, start=text)
    added = (attn.norm_added_q, attn.norm_added_k)
    return [Stream(text_q, text_k, added, lead), Stream(q, k, norms, rest)], torch.cat((text_v, v), dim=1)


def _output_flux(attn: Any, out: Tensor, call: Call) -> Any:
    out = out.flatten(2, 3)
    if call.text is None:
        return out
    text, visual = out.split_with_sizes([call.text.shape[1], call.hidden.shape[1]], dim=1)
    visual = attn.to_out[1](attn.to_out[0](visual.contiguous()))
    return visual, attn.to_add_out(text.contiguous())


# ---- HunyuanVideo: text last, not rotated
def _read_hunyuan(
    attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None, image_rotary_emb: Any = None
) -> Call | str:  # fmt: skip
    if encoder_hidden_states is None or image_rotary_emb is None:
        return "it comes without text or rotation"
    return Call(hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


def _project_hunyuan(attn: Any, call: Call) -> Streams:
    assert call.text is not None
    visual, norms, rotation = call.hidden.shape[1], (attn.norm_q, attn.norm_k), _rotation(call.rope)
    if attn.add_q_proj is None:  # a single block: one projection for both
        joint = torch.cat((call.hidden, call.text), dim=1)
        q, k, v = (_heads(to(joint), attn.heads) for to in (attn.to_q, attn.to_k, attn.to_v))
        return [
            Stream(q[:, :visual], k[:, :visual], norms, rotation),
            Stream(q[:, visual:], k[:, visual:], norms, None),
        ], v
    q, k, v = (_heads(to(call.hidden), attn.heads) for to in (attn.to_q, attn.to_k, attn.to_v))
    added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    text_q, text_k, text_v = (_heads(to(call.text), attn.heads) for to in added)
    text = Stream(text_q, text_k, (attn.norm_added_q, attn.norm_added_k), None)
    return [Stream(q, k, norms, rotation), text], torch.cat((v, text_v), dim=1)


def _output_hunyuan(attn: Any, out: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    visual, text = out.flatten(2, 3).split_with_sizes([call.hidden.shape[1], call.tokens - call.hidden.shape[1]], dim=1)
    if getattr(attn, "to_out", None) is not None:
        visual = attn.to_out[1](attn.to_out[0](visual))
    if getattr(attn, "to_add_out", None) is not None:
        text = attn.to_add_out(text)
    return visual, text


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1))


def _rotation(
    rope: tuple[Tensor, Tensor] | None, start: int = 0, stop: int | None = None, shared: bool = False
) -> Rotation | None:
    return None if rope is None else Rotation(rope[0][start:stop], rope[1][start:stop], shared)


FAMILIES = {
    "WanAttnProcessor": Family(_read_wan, _project_wan, _output_wan, across=True),
    "FluxAttnProcessor": Family(_read_flux, _project_flux, _output_flux),
    "HunyuanVideoAttnProcessor2_0": Family(_read_hunyuan, _project_hunyuan, _output_hunyuan),
}
