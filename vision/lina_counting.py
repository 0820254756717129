"""Parameters and multiply-accumulates of LINA, in closed form.

Letters: N tokens, n of them image tokens, D width, d = D / heads. One MAC is one multiplication with its addition.

Notable choices
- Counted as the paper's module: projections, sums over tokens, convolution; norms, gates and activations are left out.
- A whole image counts every part as often as it runs: the head, per token and flow step, is what shortens least.
"""

from __future__ import annotations

from foveal.vision.lina import LinaModel
from foveal.vision.lina_attention import KERNEL
from foveal.vision.lina_config import LinaConfig
from foveal.vision.lina_generate import counts_of_steps
from foveal.vision.lina_parts import FREQUENCIES

PARTS = {
    "connector": ("connector",),
    "trunk": ("embed", "encoder", "decoder", "norm"),
    "head": ("head",),
    "condition": ("condition", "mask_token"),
}


def parameters(config: LinaConfig) -> dict[str, int]:
    """Parameters by part, and "total". The queries' token and time embedding count with the condition, as in the paper."""
    model = LinaModel(config, device="meta")
    beside = ("connector.query", "connector.time")
    out = dict.fromkeys(PARTS, 0)
    for name, value in model.named_parameters():
        part = next(part for part, heads in PARTS.items() if name.split(".")[0] in heads)
        out["condition" if name.startswith(beside) else part] += value.numel()
    return {**out, "total": sum(out.values())}


def attention_macs(tokens: int, dim: int, heads: int, *, image_tokens: int = 0, softmax: bool = False) -> int:
    """One attention module. image_tokens: those that pass the convolution; softmax: the quadratic attention it replaces."""
    projections = 4 * tokens * dim**2
    if softmax:
        return projections + 2 * tokens**2 * dim
    return projections + 2 * tokens * dim * (dim // heads) + tokens * dim + KERNEL**2 * image_tokens * dim


def block_macs(config: LinaConfig, tokens: int, *, decoder: bool = False, softmax: bool = False) -> int:
    """One block: attention and MLP."""
    image = config.tokens if decoder and config.conv else 0
    attention = attention_macs(tokens, config.dim, config.heads, image_tokens=image, softmax=softmax)
    return attention + 8 * tokens * config.dim**2


def head_macs(config: LinaConfig) -> tuple[int, int]:
    """(once a token, once a token and flow step)"""
    d, w = config.dim, config.token_width
    return 2 * d**2, d * (FREQUENCIES + d) + 2 * d * w + config.head_depth * 5 * d**2 + 2 * d**2


def image_macs(
    config: LinaConfig, steps: int, flow_steps: int, *, guidance: bool = False, softmax: bool = False
) -> dict[str, int]:
    """A whole image by part: connector once, encoder and decoder once a step, head once a token and flow step."""
    m, n, both = config.queries, config.tokens, 1 + guidance
    condition = config.text_tokens if config.num_classes is None else 1
    out = {
        "connector": config.connector_depth * block_macs(config, condition + m, softmax=softmax),
        "encoder": 0,
        "decoder": 0,
    }
    seen = 0
    for count in counts_of_steps(n, steps):
        out["encoder"] += n * config.token_width * config.dim + config.encoder_depth * block_macs(
            config, m + seen, softmax=softmax
        )
        out["decoder"] += config.decoder_depth * block_macs(config, m + n, decoder=True, softmax=softmax)
        seen += count
    once, each = head_macs(config)
    out["head"] = n * (once + flow_steps * each)
    return {part: both * macs for part, macs in out.items()}
