"""The only file that names diffusers' private parts, with the contract they must keep.

* ``check_contract()`` says in sentences what a newer diffusers changed: the one place to look, and the one place to mend.
* Names are looked up when used, never at import, so that a broken contract is a sentence and not an ImportError.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from foveal.plugins.accelerate import AccelerateError

SUPPORTED = ((0, 42), (0, 43))  # first supported version, first unsupported version
BACKEND = "foveal"
BARE_MODELS = ("MochiTransformer3DModel", "ZImageTransformer2DModel", "CosmosTransformer3DModel")


class Private(NamedTuple):
    """One thing we rely on: where it is, what it must offer, what we use it for."""

    module: str
    name: str  # dotted path inside the module
    parameters: tuple[str, ...] = ()  # a callable must accept these
    members: tuple[str, ...] = ()  # an object must have these
    use: str = ""


DISPATCH = "diffusers.models.attention_dispatch"
HOOKS = "diffusers.hooks.hooks"
CACHE = "diffusers.models.cache_utils"
MODELS = "diffusers.models.transformers"
ENUM_MEMBERS = ("_value2member_map_", "_member_map_", "_member_names_", "NATIVE")
REGISTRY_MEMBERS = ("_backends", "_active_backend", "_supported_arg_names", "register", "get_active_backend")
SDPA_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
PROCESSOR = ("attn", "hidden_states", "encoder_hidden_states", "attention_mask")

CONTRACT = (
    Private(DISPATCH, "AttentionBackendName", members=ENUM_MEMBERS, use="name our attention backend"),
    Private(DISPATCH, "_AttentionBackendRegistry", members=REGISTRY_MEMBERS, use="register our attention backend"),
    Private(DISPATCH, "_AttentionBackendRegistry.register", ("backend",), use="register our attention backend"),
    Private(DISPATCH, "dispatch_attention_fn", (*SDPA_PARAMETERS, "backend", "parallel_config"), use="run dense calls"),
    Private(DISPATCH, "_native_attention", (*SDPA_PARAMETERS, "_parallel_config"), use="run unbound calls"),
    Private(CACHE, "CacheMixin.cache_context", ("name", "kwargs"), use="hear of steps and guidance branches"),
    Private(CACHE, "CacheMixin._reset_stateful_cache", ("recurse",), use="hear of the end of a run"),
    Private(HOOKS, "CacheContext", ("name", "step_index", "num_inference_steps"), use="hear of steps and guidance branches"),
    Private("diffusers.hooks._helpers", "AttentionProcessorRegistry", members=("get", "register"), use="keep layer skip working"),
    Private("diffusers.models.attention", "AttentionMixin.set_attn_processor", ("processor",), use="set_attn_processor"),
    Private("diffusers.models.attention", "AttentionModuleMixin.set_processor", ("processor",), use="bind processors"),
    Private("diffusers.models.attention_processor", "Attention.set_processor", ("processor",), use="bind processors"),
    Private("diffusers.models.attention_processor", "MochiAttention", use="find attention modules"),
    Private(f"{MODELS}.transformer_wan", "WanAttnProcessor", members=("_attention_backend",), use="catch Wan's attention"),
    Private(f"{MODELS}.transformer_flux", "FluxAttnProcessor", members=("_attention_backend",), use="catch Flux's attention"),
    Private(f"{MODELS}.transformer_hunyuan_video", "HunyuanVideoAttnProcessor2_0", members=("_attention_backend",),
            use="catch HunyuanVideo's attention"),
    Private(f"{MODELS}.transformer_wan", "WanTransformer3DModel.forward", ("hidden_states", "timestep"), use="find Wan's grid"),
    Private(f"{MODELS}.transformer_flux", "FluxTransformer2DModel.forward",
            ("hidden_states", "encoder_hidden_states", "img_ids", "txt_ids", "joint_attention_kwargs", "controlnet_block_samples"),
            use="find Flux's grid"),
    Private(f"{MODELS}.transformer_hunyuan_video", "HunyuanVideoTransformer3DModel.forward",
            ("hidden_states", "encoder_hidden_states", "encoder_attention_mask"), use="find HunyuanVideo's grid"),
    Private(f"{MODELS}.transformer_hunyuan_video15", "HunyuanVideo15AttnProcessor2_0.__call__",
            ("attn", "hidden_states", "encoder_hidden_states", "attention_mask", "image_rotary_emb"),
            use="restate HunyuanVideo 1.5's attention"),
    Private(f"{MODELS}.transformer_hunyuan_video15", "HunyuanVideo15Transformer3DModel.forward",
            ("hidden_states", "encoder_attention_mask", "encoder_attention_mask_2", "image_embeds"),
            use="find HunyuanVideo 1.5's valid text"),
    Private("diffusers.models.embeddings", "apply_rotary_emb", ("x", "freqs_cis", "sequence_dim"),
            use="restate HunyuanVideo 1.5's attention"),
    *(Private(f"{MODELS}.{module}", f"{name}.__call__", (*PROCESSOR, rope), use="restate attention with fused norms")
      for module, name, rope in (
          ("transformer_wan", "WanAttnProcessor", "rotary_emb"),
          ("transformer_flux", "FluxAttnProcessor", "image_rotary_emb"),
          ("transformer_hunyuan_video", "HunyuanVideoAttnProcessor2_0", "image_rotary_emb"))),
    *(Private(f"{MODELS}.{module}", "_get_qkv_projections", PROCESSOR[:3], use="restate attention with fused norms")
      for module in ("transformer_wan", "transformer_flux")),
    Private("diffusers.models.normalization", "RMSNorm", ("dim", "eps", "bias"), use="restate attention with fused norms"),
)  # fmt: skip


# ---- the contract
def check_contract() -> list[str]:
    """Sentences that name what an installed diffusers breaks; empty when all is well."""
    try:
        version = importlib.import_module("diffusers").__version__
    except ImportError:
        return ["diffusers is not installed; install foveal[diffusers]."]
    wrong = [] if _supported(version) else [_version_sentence(version)]
    return wrong + [sentence for item in CONTRACT if (sentence := _breakage(item, version))]


def require_contract() -> None:
    """Raise ``AccelerateError`` unless the installed diffusers is one we know."""
    wrong = check_contract()
    if wrong:
        raise AccelerateError(" ".join(wrong))


def _supported(version: str) -> bool:
    parts = version.split(".")[:2]
    return all(p.isdigit() for p in parts) and SUPPORTED[0] <= tuple(int(p) for p in parts) < SUPPORTED[1]


def _version_sentence(version: str) -> str:
    low, high = (".".join(map(str, v)) for v in SUPPORTED)
    return f"diffusers {version} is installed, and foveal supports >={low},<{high}; install a version in that range."


def _breakage(item: Private, version: str) -> str | None:
    where, need = f"{item.module}.{item.name}", f"(needed to {item.use})"
    try:
        found = lookup(item.module, item.name)
    except (ImportError, AttributeError):
        return f"diffusers {version} has no {where} {need}."
    missing = [m for m in item.members if not hasattr(found, m)]
    if missing:
        return f"{where} of diffusers {version} has no {', '.join(missing)} {need}."
    if not item.parameters:
        return None
    if not callable(found):
        return f"{where} of diffusers {version} is no longer callable {need}."
    known = inspect.signature(found).parameters
    missing = [p for p in item.parameters if p not in known]
    return f"{where} of diffusers {version} no longer takes {', '.join(missing)} {need}." if missing else None


def lookup(module: str, name: str) -> Any:
    """``module.name`` for a dotted name. Raises ImportError or AttributeError."""
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


# ---- what the other files use
def is_pipeline(target: Any) -> bool:
    return isinstance(target, lookup("diffusers", "DiffusionPipeline"))


def is_model(target: Any) -> bool:
    """A diffusers model, or any module that holds diffusers attention."""
    if isinstance(target, lookup("diffusers", "ModelMixin")):
        return True
    classes = attention_classes()
    return isinstance(target, nn.Module) and any(isinstance(m, classes) for m in target.modules())


def attention_classes() -> tuple[type, ...]:
    """The classes by which diffusers itself recognises attention modules."""
    old = "diffusers.models.attention_processor"
    return (
        lookup(old, "Attention"),
        lookup(old, "MochiAttention"),
        lookup("diffusers.models.attention", "AttentionModuleMixin"),
    )


def attention_mixin() -> type:
    return lookup("diffusers.models.attention", "AttentionMixin")


def pipeline_class() -> type:
    return lookup("diffusers", "DiffusionPipeline")


def models_without_processors() -> tuple[type, ...]:
    """Model classes with attention processors, but without ``set_attn_processor``."""
    mixin = attention_mixin()
    found = [lookup("diffusers", name) for name in BARE_MODELS]
    return tuple(kind for kind in found if not issubclass(kind, mixin))


def dispatcher() -> Callable[..., Any]:
    """diffusers' attention dispatcher: q, k, v [B, N, H, D]; ``backend=None`` is the process-wide backend."""
    return lookup(DISPATCH, "dispatch_attention_fn")


def rotary() -> Callable[..., Any]:
    """RoPE of x [B, N, H, D] by (cos, sin) [N, D] with ``sequence_dim=1``."""
    return lookup("diffusers.models.embeddings", "apply_rotary_emb")


def rms_norm() -> type:
    """diffusers' own RMS norm, which rounds before its weight too."""
    return lookup("diffusers.models.normalization", "RMSNorm")


def wan_projections() -> Callable[..., Any]:
    """(attn, hidden_states, encoder_hidden_states) -> q, k, v [B, N, H * D], fused projections too."""
    return lookup(f"{MODELS}.transformer_wan", "_get_qkv_projections")


def flux_projections() -> Callable[..., Any]:
    """(attn, hidden_states, encoder_hidden_states) -> q, k, v and those of the text, fused projections too."""
    return lookup(f"{MODELS}.transformer_flux", "_get_qkv_projections")


def native_attention() -> Callable[..., Any]:
    return lookup(DISPATCH, "_native_attention")


def active_backend() -> str:
    """Name of the process-wide attention backend."""
    return str(lookup(DISPATCH, "_AttentionBackendRegistry")._active_backend.value)


def ensure_backend(function: Callable[..., Any]) -> Any:
    """The member of diffusers' backend enum that leads to ``function``; added on first use.

    diffusers has no public registration, and every public path converts to that enum, so the name must be a member of it.
    """
    names, registry = lookup(DISPATCH, "AttentionBackendName"), lookup(DISPATCH, "_AttentionBackendRegistry")
    if BACKEND not in names._value2member_map_:
        member = str.__new__(names, BACKEND)
        member._name_, member._value_ = BACKEND.upper(), BACKEND
        names._member_map_[member._name_] = member
        names._value2member_map_[BACKEND] = member
        names._member_names_.append(member._name_)
        registry.register(member)(function)
    return names._value2member_map_[BACKEND]


def register_processor_class(bound: type, original: type) -> None:
    """Give a bound class the metadata of the class it wraps, so that diffusers' layer skip finds it."""
    registry = lookup("diffusers.hooks._helpers", "AttentionProcessorRegistry")
    try:
        registry.register(bound, registry.get(original))
    except ValueError:  # diffusers does not know the original either
        return


def context_parallel(owner: Any) -> bool:
    """Does a model or processor run under diffusers' context parallelism?"""
    config = getattr(owner, "_parallel_config", None)
    return config is not None and getattr(config, "context_parallel_config", config) is not None


def splits_tokens(config: Any) -> bool:
    """Does a configuration for ``enable_parallelism`` split tokens over devices? Splitting weights does not."""
    if isinstance(config, lookup("diffusers", "ContextParallelConfig")):
        return True
    return getattr(config, "context_parallel_config", None) is not None
