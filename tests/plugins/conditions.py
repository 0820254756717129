"""What the composition matrix adds to a tiny pipeline: each condition as a function that turns it on as a user would.

A condition gets a ``Case`` and changes it in place, before foveal attaches or after. What diffusers does not have for a pipeline
raises, as it does for its user.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers as D
import torch
from pipes_adapters import controlled, load_ip_adapter
from tiny_pipes import PIPES

CPU = torch.device("cpu")
COMPONENTS = ("transformer", "transformer_2", "unet")


@dataclass
class Case:
    """One pipeline at work. options: of its call. training: the arguments of a model call whose gradients are the result."""

    name: str
    pipe: Any
    call: Callable
    steps: int = 2
    options: dict = field(default_factory=dict)
    training: tuple | None = None
    device: torch.device = CPU

    @classmethod
    def of(cls, name):
        make, call = PIPES[name]
        return cls(name, make(), call)

    def run(self):
        """Latents of a run, or the gradients of a training step."""
        if self.training is not None:
            return gradients(self.models[0], *self.training)
        return self.call(self.pipe, steps=self.steps, **self.options)

    def parts(self):
        """(component, model) of the denoisers, compiled wrappers taken off."""
        found = [(name, getattr(self.pipe, name, None)) for name in COMPONENTS]
        return [(name, getattr(model, "_orig_mod", model)) for name, model in found if model is not None]

    @property
    def models(self):
        return [model for _, model in self.parts()]


def model_calls(case):
    """Arguments of all model calls of a run, in order."""
    seen = []

    def keep(model, args, kwargs):
        seen.append((model, args, kwargs))

    hooks = [model.register_forward_pre_hook(keep, with_kwargs=True) for model in case.models]
    case.run()
    for hook in hooks:
        hook.remove()
    return seen


def gradients(model, args, kwargs):
    """All gradients of one model call, in one tensor."""
    model.zero_grad()
    with torch.enable_grad():
        out = model(*args, **{**kwargs, "return_dict": False})[0]
        out = out[0] if isinstance(out, (list, tuple)) else out
        out.square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# ---- guidance
def two_pass(case):
    if case.name in ("flux", "flux-kontext", "hunyuan"):
        case.options["two_passes"] = True
    calls = [batch for batch, _ in _batches(case)]
    if len(calls) != 2 * case.steps:
        raise ValueError(f"the pipeline makes {len(calls)} model calls in {case.steps} steps")


def batched(case):
    calls = [batch for batch, _ in _batches(case)]
    if calls != [2] * case.steps:
        raise ValueError(
            f"the pipeline makes {len(calls)} model calls in {case.steps} steps, of {sorted(set(calls))} samples"
        )


def _batches(case):
    """(samples, model) of all model calls of a run. Run on a pipeline of its own, so that ``case`` stays as it was made."""
    twin = Case.of(case.name)
    twin.options |= case.options
    visual = ("hidden_states", "sample", "x")
    for model, args, kwargs in model_calls(twin):
        x = args[0] if args else next(kwargs[name] for name in visual if name in kwargs)
        yield len(x), model


# ---- adapters and weights
LINEARS = ["to_q", "to_k", "to_v"]


def lora(case):
    import peft

    for model in case.models:
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=LINEARS)
        model.add_adapter(config) if hasattr(model, "add_adapter") else peft.inject_adapter_in_model(config, model)


def controlnet(case):
    case.pipe, options = controlled(case.name, case.pipe)
    case.options |= options


def ip_adapter(case):
    case.options |= load_ip_adapter(case.name, case.pipe)


def fuse_qkv(case):
    for model in case.models:
        model.fuse_qkv_projections()


def torchao(case):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for model in case.models:
        quantize_(model, Int8WeightOnlyConfig(), filter_fn=_projects)


def bitsandbytes(case):
    """Every linear layer of the attention as a bitsandbytes 8-bit layer."""
    import bitsandbytes as bnb

    for model in case.models:
        for name, module in list(model.named_modules()):
            for part, child in list(module.named_children()):
                if not _projects(child, f"{name}.{part}"):
                    continue
                new = bnb.nn.Linear8bitLt(
                    child.in_features, child.out_features, bias=child.bias is not None, has_fp16_weights=False
                )
                new.load_state_dict(child.state_dict())
                setattr(module, part, new.to(case.device).eval())


def _projects(module, name):
    return isinstance(module, torch.nn.Linear) and name.rsplit(".", 1)[-1] in LINEARS


# ---- memory
def model_offload(case):
    case.pipe.enable_model_cpu_offload(device=case.device)


def sequential_offload(case):
    """On a GPU as users do; on a CPU what that does, because diffusers adds an index that a CPU does not have."""
    if case.device != CPU:
        case.pipe.enable_sequential_cpu_offload(device=case.device)
        return
    from accelerate import cpu_offload

    for model in case.pipe.components.values():
        if isinstance(model, torch.nn.Module):
            cpu_offload(model, execution_device=CPU)


def _group_offload(case, **options):
    for model in case.models:
        model.enable_group_offload(onload_device=case.device, offload_device=CPU, **options)


def group_offload_block(case):
    _group_offload(case, offload_type="block_level", num_blocks_per_group=1)


def group_offload_leaf(case):
    _group_offload(case, offload_type="leaf_level")


def group_offload_stream(case):
    _group_offload(case, offload_type="leaf_level", use_stream=True)


def layerwise_casting(case):
    for model in case.models:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def gradient_checkpointing(case):
    if case.training is None:
        _, args, kwargs = model_calls(case)[0]
        case.training = (args, kwargs)
    case.models[0].enable_gradient_checkpointing()
    case.models[0].train()


# ---- compilers
BLOCKS = ("BasicTransformerBlock", "JointTransformerBlock", "CogVideoXBlock", "MochiTransformerBlock",
          "CosmosTransformerBlock")  # fmt: skip


def compile_blocks(case):
    for model in case.models:
        if model._repeated_blocks:
            model.compile_repeated_blocks(fullgraph=True, backend="eager")
            continue
        for block in [m for m in model.modules() if type(m).__name__ in BLOCKS]:
            block.compile(fullgraph=True, backend="eager")


def compile_whole(case):
    for name, model in case.parts():
        setattr(case.pipe, name, torch.compile(model, fullgraph=True, backend="eager"))


# ---- caches of diffusers
CACHE_STEPS = 4


def _timestep(case):
    """The present timestep: the pipeline's property where it has one, else 500."""
    return lambda: getattr(case.pipe, "current_timestep", 500)


def _cache(case, config):
    case.steps = CACHE_STEPS
    for model in case.models:
        model.enable_cache(config)


def first_block_cache(case):
    _cache(case, D.FirstBlockCacheConfig(threshold=1e6))


def pyramid_attention_broadcast(case):
    config = D.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 2000),
        current_timestep_callback=_timestep(case),
    )  # fmt: skip
    _cache(case, config)


def taylor_seer(case):
    config = D.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32,
        cache_identifiers=[r".*blocks\.\d+\.attn1?"],
    )  # fmt: skip
    _cache(case, config)


def mag_cache(case):
    config = D.MagCacheConfig(
        mag_ratios=torch.ones(CACHE_STEPS), num_inference_steps=CACHE_STEPS, retention_ratio=0.25, threshold=1.0
    )
    _cache(case, config)


def faster_cache(case):
    layout = "BFCHW" if case.name == "cogvideox" else "BCFHW"
    distilled = case.name in ("flux", "flux2", "flux-kontext", "hunyuan")
    config = D.FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 900), unconditional_batch_timestep_skip_range=(-1, 900),
        unconditional_batch_skip_range=2, tensor_format=layout, is_guidance_distilled=distilled,
        current_timestep_callback=_timestep(case),
    )  # fmt: skip
    _cache(case, config)


# ---- devices
def context_parallel(case):
    """On an accelerated model the user's own call; else what that call leaves, because one process has no group to join."""
    for model in case.models:
        config = D.ContextParallelConfig(ulysses_degree=2)
        if "enable_parallelism" in model.__dict__:
            model.enable_parallelism(config=config)
        if model._cp_plan is None:
            raise ValueError("no plan for context parallelism")
        model._parallel_config = D.ParallelConfig(context_parallel_config=config)


CONDITIONS = {
    condition.__name__.replace("_", "-"): condition
    for condition in (
        two_pass, batched, lora, torchao, bitsandbytes, fuse_qkv, compile_blocks, compile_whole, model_offload,
        sequential_offload, group_offload_block, group_offload_leaf, group_offload_stream, layerwise_casting,
        gradient_checkpointing, first_block_cache, mag_cache, taylor_seer, pyramid_attention_broadcast, faster_cache,
        controlnet, ip_adapter, context_parallel,
    )
}  # fmt: skip
