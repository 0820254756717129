"""What composes with an accelerated model, as data: hosts x conditions x order of enabling -> a verdict and its reason.

The host takes its refusals from here, `foveal doctor --matrix` and docs/composition.md print it, and the tests run it.

* The order: a condition is turned on before ``foveal.accelerate``, or after. Verdicts hold for every method.
* "works": dense settings give what the condition alone gives, sparse settings really run sparse, ``remove()`` restores it.
* "refuses": an error of one sentence, or a warning and a line of the summary; never silently dense.
* "not applicable": diffusers itself has no such thing for the model. "needs a GPU": cannot be tried on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["works", "refuses", "not applicable", "needs a GPU", "not tried"]
Order = Literal["before", "after"]
ORDERS: tuple[Order, Order] = ("before", "after")
METHODS = ("dense", "grat", "neighborhood")

# ---- refusals that the host raises or prints
NO_CONTEXT_PARALLEL = (
    "context parallelism splits the tokens over devices, and foveal does not support that yet; remove the handle first."
)
COMPILE_FIRST = "an accelerated model cannot be compiled as a whole graph; compile it first, then call foveal.accelerate on the result."
IP_ADAPTER_FIRST = (
    "loading an IP adapter makes attention processors anew, which those of an accelerated model cannot be; load it first, then "
    "call foveal.accelerate."
)
OWN_WEIGHTS = "the processor has weights of its own (an IP adapter, for instance)"
REPLACES = (
    "it puts other processors into the layers; is_active(), the summary and a warning at the next run say so. Call "
    "foveal.accelerate again afterwards."
)
ONE_OUTPUT = (
    "{cache} keeps one output per layer for all guidance passes, so the second pass of a step would get the first one's; use "
    "FirstBlockCache, or guidance in one batch."
)
ONE_BATCH = (
    "FasterCache takes the two halves of guidance out of one batch, and this call has {batch} sample(s); use FirstBlockCache, or "
    "is_guidance_distilled=True where there is no guidance."
)


@dataclass(frozen=True)
class Verdict:
    """One cell."""

    outcome: Outcome
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.outcome}: {self.reason}" if self.reason else self.outcome


@dataclass(frozen=True)
class Host:
    """One pipeline. models: those of its kind that behave alike."""

    name: str
    pipeline: str
    models: str


@dataclass(frozen=True)
class Except:
    """A verdict that differs for some hosts. order: None for both."""

    hosts: tuple[str, ...]
    verdict: Verdict
    order: Order | None = None


@dataclass(frozen=True)
class Condition:
    """Something that users turn on besides foveal.

    how        the line that turns it on
    group      heading under which it is printed
    verdict    of all hosts that no exception names
    note       what was tried, where that is less than the name says
    """

    name: str
    group: str
    how: str
    verdict: Verdict
    exceptions: tuple[Except, ...] = ()
    note: str = ""


WORKS = Verdict("works")


def _na(reason: str) -> Verdict:
    return Verdict("not applicable", reason)


HOSTS = (
    Host("flux", "FluxPipeline", "FLUX.1 dev, schnell, Krea"),
    Host("flux-kontext", "FluxKontextPipeline", "FLUX.1 Kontext"),
    Host("flux2", "Flux2Pipeline", "FLUX.2"),
    Host("sd3", "StableDiffusion3Pipeline", "Stable Diffusion 3, 3.5"),
    Host("qwen-image", "QwenImagePipeline", "Qwen-Image"),
    Host("zimage", "ZImagePipeline", "Z-Image"),
    Host("pixart", "PixArtAlphaPipeline", "PixArt alpha, sigma"),
    Host("sd15", "StableDiffusionPipeline", "Stable Diffusion 1.5, 2.1"),
    Host("sdxl", "StableDiffusionXLPipeline", "Stable Diffusion XL"),
    Host("animatediff", "AnimateDiffPipeline", "AnimateDiff"),
    Host("wan", "WanPipeline", "Wan 2.1 T2V, Wan 2.2 TI2V"),
    Host("wan2.2", "WanPipeline", "Wan 2.2 A14B (two experts)"),
    Host("wan-i2v", "WanImageToVideoPipeline", "Wan 2.1 I2V"),
    Host("wan-vace", "WanVACEPipeline", "Wan VACE"),
    Host("skyreels", "SkyReelsV2Pipeline", "SkyReels V2"),
    Host("hunyuan", "HunyuanVideoPipeline", "HunyuanVideo"),
    Host("hunyuan1.5", "HunyuanVideo15Pipeline", "HunyuanVideo 1.5"),
    Host("cogvideox", "CogVideoXPipeline", "CogVideoX, 1.5"),
    Host("ltx", "LTXPipeline", "LTX-Video"),
    Host("ltx2", "LTX2Pipeline", "LTX-2"),
    Host("mochi", "MochiPipeline", "Mochi 1"),
    Host("cosmos", "CosmosTextToWorldPipeline", "Cosmos 1.0"),
)
NAMES = tuple(host.name for host in HOSTS)

UNETS = ("sd15", "sdxl", "animatediff")
# Guidance in two calls with a cache context each, by default.
TWO_PASSES = ("wan", "wan2.2", "wan-i2v", "wan-vace", "skyreels", "qwen-image", "hunyuan1.5")
ON_REQUEST = ("flux", "flux-kontext", "hunyuan")  # a second pass with true_cfg_scale
BATCHED = ("sd3", "pixart", "zimage", *UNETS, "cogvideox", "ltx", "ltx2", "mochi")
NO_CACHES = ("sd3", "zimage", "pixart", *UNETS, "cosmos")
PLANNED = ("flux", "flux-kontext", "flux2", "qwen-image", "wan", "wan2.2", "wan-i2v", "ltx", "ltx2")  # for many devices

_NO_ENABLE_CACHE = Except(NO_CACHES, _na("the model has no enable_cache"))
_NO_BLOCKS = Except(("skyreels", "ltx2", "hunyuan1.5"), _na("diffusers' block caches do not know the model's blocks"))
_NO_CONTEXT = Except(("flux-kontext", "flux2"), _na("the pipeline sets no cache context, which the cache needs"))


def _others(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in NAMES if name not in names)


CONDITIONS = (
    # ---- guidance
    Condition("two-pass", "guidance", "one model call for each half of guidance", WORKS, (
        Except(_others((*TWO_PASSES, *ON_REQUEST, "cosmos")), _na("the pipeline's guidance is one call, or built into the model")),),
        note="flux, flux-kontext and hunyuan with true_cfg_scale"),
    Condition("batched", "guidance", "both halves of guidance in one batch", WORKS, (
        Except(_others(BATCHED), _na("the pipeline's guidance is two calls, or built into the model")),)),
    # ---- weights
    Condition("lora", "weights", "pipe.load_lora_weights(...), model.add_adapter(...)", WORKS,
              note="pixart has no add_adapter: peft.inject_adapter_in_model"),
    Condition("torchao", "weights", "torchao.quantization.quantize_(model, Int8WeightOnlyConfig())", WORKS, note="int8, on the CPU"),
    Condition("bitsandbytes", "weights", "bitsandbytes.nn.Linear8bitLt in place of the projections", WORKS, note="8 bit, on the CPU"),
    Condition("fuse-qkv", "weights", "model.fuse_qkv_projections()", WORKS, (
        Except(("zimage", "mochi", "cosmos"), _na("the model has no fuse_qkv_projections")),
        Except(("ltx2",), _na("diffusers cannot fuse attention between sound and video")),
        Except(("sd3", "pixart", *UNETS, "cogvideox"), Verdict("refuses", REPLACES), "after"))),
    # ---- compilers
    Condition("compile-blocks", "torch.compile", "model.compile_repeated_blocks(fullgraph=True)", WORKS,
              note="sd3, pixart, animatediff, cogvideox, mochi and cosmos name no repeated blocks: block.compile() for each"),
    Condition("compile-whole", "torch.compile", "torch.compile(model, fullgraph=True)", WORKS, (
        Except(("hunyuan1.5",), _na("the model branches on its data, which a whole graph cannot"), "before"),
        Except(("zimage",), _na("the model's rotary tables enter a device context, which a whole graph cannot"), "before"),
        Except(NAMES, Verdict("refuses", COMPILE_FIRST), "after")), note="without fullgraph=True the later order works too"),
    # ---- memory
    Condition("model-offload", "memory", "pipe.enable_model_cpu_offload()", WORKS, note="with the CPU as its device: hooks run, nothing moves"),
    Condition("sequential-offload", "memory", "pipe.enable_sequential_cpu_offload()", WORKS,
              note="accelerate.cpu_offload, with the CPU as its device: weights come and go"),
    Condition("group-offload-block", "memory", 'model.enable_group_offload(..., offload_type="block_level")', WORKS,
              note="with the CPU as both devices"),
    Condition("group-offload-leaf", "memory", 'model.enable_group_offload(..., offload_type="leaf_level")', WORKS,
              note="with the CPU as both devices"),
    Condition("group-offload-stream", "memory", "model.enable_group_offload(..., use_stream=True)",
              Verdict("needs a GPU", "streams are the device's")),
    Condition("layerwise-casting", "memory", "model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, ...)", WORKS),
    Condition("gradient-checkpointing", "memory", "model.enable_gradient_checkpointing()", WORKS, note="gradients are compared"),
    # ---- caches
    Condition("first-block-cache", "caches", "model.enable_cache(FirstBlockCacheConfig(...))", WORKS,
              (_NO_ENABLE_CACHE, _NO_BLOCKS, _NO_CONTEXT)),
    Condition("mag-cache", "caches", "model.enable_cache(MagCacheConfig(...))", WORKS, (_NO_ENABLE_CACHE, _NO_BLOCKS),
              note="flux-kontext with true_cfg_scale is refused: it sets no cache context"),
    Condition("taylor-seer", "caches", "model.enable_cache(TaylorSeerCacheConfig(cache_identifiers=..., ...))", WORKS,
              (_NO_ENABLE_CACHE, _NO_CONTEXT), note="the default identifiers match no layer called attn1, so they must be given"),
    Condition("pyramid-attention-broadcast", "caches", "model.enable_cache(PyramidAttentionBroadcastConfig(...))", WORKS, (
        _NO_ENABLE_CACHE, Except(TWO_PASSES, Verdict("refuses", ONE_OUTPUT.format(cache="PyramidAttentionBroadcast")))),
        note="flux, flux-kontext and hunyuan are refused with true_cfg_scale"),
    Condition("faster-cache", "caches", "model.enable_cache(FasterCacheConfig(...))", WORKS, (
        _NO_ENABLE_CACHE, Except(TWO_PASSES, Verdict("refuses", ONE_BATCH.format(batch=1))),
        Except(("ltx", "ltx2"), _na("FasterCache cannot split packed tokens into frequencies"))),
        note="flux, flux-kontext, flux2 and hunyuan with is_guidance_distilled=True"),
    # ---- adapters
    Condition("controlnet", "adapters", "the pipeline's ControlNet variant around the same models", WORKS, (
        Except(("qwen-image", "zimage"), Verdict("not tried", "diffusers has a ControlNet for it that no cell builds")),
        Except(_others(("flux", "sd3", *UNETS, "qwen-image", "zimage")), _na("diffusers has no ControlNet for the pipeline")))),
    Condition("ip-adapter", "adapters", "pipe.load_ip_adapter(...)", WORKS, (
        Except(("sd3",), Verdict("refuses", f"every attention layer is left alone: {OWN_WEIGHTS}"), "before"),
        Except(("sd3",), Verdict("refuses", REPLACES), "after"),
        Except(("flux", "flux-kontext", *UNETS), Verdict("refuses", IP_ADAPTER_FIRST), "after"),
        Except(_others(("flux", "flux-kontext", "sd3", *UNETS)), _na("diffusers has no IP adapter for the pipeline"))),
        note="flux and flux-kontext: double blocks hold the adapter and stay dense, single blocks run sparse"),
    # ---- devices
    Condition("context-parallel", "devices", "model.enable_parallelism(config=ContextParallelConfig(...))",
              Verdict("refuses", NO_CONTEXT_PARALLEL), (
        Except(_others(PLANNED), _na("the model has no plan for context parallelism"), "before"),)),
)  # fmt: skip
BY_NAME = {condition.name: condition for condition in CONDITIONS}


def verdict(host: str, condition: str, order: Order) -> Verdict:
    """One cell. Raises ``KeyError`` for a host or condition that there is not."""
    if host not in NAMES:
        raise KeyError(f"there is no host {host!r}; there are {', '.join(NAMES)}.")
    found = BY_NAME[condition]
    for item in found.exceptions:
        if host in item.hosts and item.order in (None, order):
            return item.verdict
    return found.verdict


def cells() -> list[tuple[str, str, Order, Verdict]]:
    """(host, condition, order, verdict) of the whole matrix."""
    return [(h, c.name, order, verdict(h, c.name, order)) for c in CONDITIONS for h in NAMES for order in ORDERS]
