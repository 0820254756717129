"""What in a model is attention over its token grid: proposed by structure, proven on a few random tokens.

Letters: B batch, N tokens, C width.

* A root is a model (or a part of one) that cuts an image into a grid of patches and runs blocks over them: it has a patch embedding
  that knows the grid, ``blocks``, ``num_prefix_tokens`` and ``forward_features``. No list of names.
* A module is token attention when it has the parts that ``restated`` knows and no others, and when ``restated`` gives what the module
  gives on a probe. So a subclass that does something else is left alone, whatever it is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foveal.plugins.timm_host.restated import dense, finish, project

PARTS = {"qkv", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
PROJECTIONS = {"qkv", "qkv_proj", "q", "kv", "qk", "q_proj", "k_proj", "v_proj", "in_proj", "proj", "out_proj"}
BIASES = {"q_bias", "k_bias", "v_bias"}
ARGUMENTS = {"x", "rope", "attn_mask", "is_causal"}
POSITION = ("rel_pos", "relative", "pos_embed", "pos_proj", "bias_table", "attention_biases", "rpe", "crpe")
PATCHES = 4  # grid tokens of the probe

POOL = "it pools the tokens with queries of its own, which are no tokens of the grid"
BIASED = "it adds a position bias of its own to the scores, which no plan carries"
INLINED = "its attention is written into the block, together with the MLP"
OTHER = "it is not attention of all tokens over all tokens by qkv and proj"
DIFFERENT = "it computes something else than softmax attention over its tokens"
NO_WEIGHTS = "its weights are on the meta device; load them first"


# ---- roots
def is_root(module: nn.Module) -> bool:
    """Does this module run blocks over a grid of patches that it knows?"""
    return (
        embedding(module) is not None
        and isinstance(module._modules.get("blocks"), (nn.Sequential, nn.ModuleList))
        and isinstance(getattr(module, "num_prefix_tokens", None), int)
        and callable(getattr(module, "forward_features", None))
    )


def roots(model: nn.Module) -> dict[str, nn.Module]:
    """Every root in a model by qualified name; the model itself has the empty name. A root inside a root belongs to the outer one."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if is_root(module) and not any(name.startswith(f"{outer}." if outer else "") for outer in found):
            found[name] = module
    return found


def embedding(module: nn.Module) -> Any | None:
    """The module that cuts the image into patches and knows the grid."""
    for name in ("patch_embed", "embeds"):
        part = module._modules.get(name)  # its own: wrappers (PEFT's, for one) lend every attribute of what they wrap
        if part is not None and (hasattr(part, "dynamic_feat_size") or hasattr(part, "grid_size")):
            return part
    return None


# ---- attention
def attention_modules(root: nn.Module) -> dict[str, nn.Module]:
    """The innermost modules that count heads and project onto them, by name inside the root."""
    found = {name: m for name, m in root.named_modules() if name and _counts_heads(m)}
    return {n: m for n, m in found.items() if not any(other.startswith(f"{n}.") for other in found)}


def _counts_heads(module: nn.Module) -> bool:
    heads = [getattr(module, name, None) for name in ("num_heads", "heads", "n_heads")]
    counts = any(isinstance(h, int) and not isinstance(h, bool) for h in heads)
    return counts and any(name in PROJECTIONS for name, _ in module.named_children())


def why_not(module: Any) -> str | None:
    """Why this module cannot be taken over, or None for token attention."""
    own = {name for name, _ in module.named_parameters(recurse=False)}
    own |= {name for name, _ in module.named_buffers(recurse=False)}
    children = {name for name, _ in module.named_children()}
    arguments = forward_arguments(original_class(module))
    if "latent" in own:
        return POOL
    if any(word in name for name in (own | children | set(arguments)) for word in POSITION):
        return BIASED
    if any("mlp" in name for name in children):
        return INLINED
    has_qkv = "qkv" in children or {"q_proj", "k_proj", "v_proj"} <= children
    known = children <= PARTS and own <= BIASES and set(arguments) <= ARGUMENTS and arguments[:1] == ["x"]
    if not (has_qkv and "proj" in children and known and isinstance(getattr(module, "scale", None), float)):
        return OTHER
    return _probe(module)


def original_class(module: nn.Module) -> type:
    """The class of a module without our patch."""
    return getattr(type(module), "_foveal_original", type(module))


def forward_arguments(kind: type) -> list[str]:
    """Names of the arguments of a class's ``forward``, without self."""
    return list(inspect.signature(kind.forward).parameters)[1:]  # type: ignore[attr-defined]


# ---- the probe
def _probe(attn: Any) -> str | None:
    """Both ways on a few random tokens. -> why they differ, or None"""
    weights = [p for p in attn.parameters() if p.is_floating_point()]
    if any(p.is_meta for p in weights):
        return NO_WEIGHTS
    source = attn.qkv if getattr(attn, "qkv", None) is not None else attn.q_proj
    width = getattr(source, "in_features", None)
    if width is None or not weights:
        return OTHER
    with torch.no_grad(), _evaluating(attn):
        x, rope = _probe_tokens(attn, width, weights[0])
        options = {} if rope is None else {"rope": rope}
        try:
            expected = original_class(attn).forward(attn, x, **options)  # type: ignore[attr-defined]
            core = project(attn, x, rope, None, False)
            given = finish(attn, x, dense(core))
        except Exception:  # another layout of tokens, another shape of weights: not ours, whatever it is
            return DIFFERENT
        return None if _same(given, expected) else DIFFERENT


def _probe_tokens(attn: Any, width: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
    noise = torch.Generator().manual_seed(0)
    prefix = getattr(attn, "num_prefix_tokens", 0)
    x = torch.randn(2, prefix + PATCHES, width, generator=noise)
    if "rope" not in forward_arguments(original_class(attn)):
        return x.to(like), None
    angle = torch.rand(PATCHES, 1, generator=noise).expand(-1, attn.head_dim)
    return x.to(like), torch.cat([angle.sin(), angle.cos()], -1).to(like)


def _same(given: Any, expected: Any) -> bool:
    if not isinstance(expected, Tensor) or expected.shape != given.shape:
        return False
    given, expected = given.float(), expected.float()
    return torch.allclose(given, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()), equal_nan=True)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, flag in flags:
            part.training = flag


# ---- order
def mixes_places(root: Any, recognised: set[str]) -> str | None:
    """What in the blocks minds the order of the tokens, besides the attention that was recognised; None: nothing."""
    strange = [n for n in attention_modules(root) if n.startswith("blocks.") and n not in recognised]
    if strange:
        return f"{strange[0]} depends on where its tokens lie"
    for name, part in root.blocks.named_modules():
        if isinstance(part, (nn.modules.conv._ConvNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd)):
            return f"blocks.{name} looks at neighbouring tokens"
    return None
