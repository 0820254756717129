"""ControlNets and IP adapters for the tiny picture pipelines: filled with noise, because fresh ones add nothing.

``controlled(name, pipe)`` gives the pipeline class with a ControlNet around the models of ``pipe``; ``load_ip_adapter(name, pipe)``
loads an adapter into it. Both give the options that the call then needs.
"""

import diffusers as D
import torch
from pipes_images import picture_vae
from tiny import noise


def _noisy(model, scale=0.05):
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape))
    return model.eval()


# ---- ControlNet
def _flux_net(model):
    config = {k: model.config[k] for k in ("in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim",
                                           "pooled_projection_dim", "axes_dims_rope")}  # fmt: skip
    return D.FluxControlNetModel(patch_size=1, num_layers=1, num_single_layers=1, **config)


def _sd3_net(model):
    names = ("sample_size", "patch_size", "in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim",
             "caption_projection_dim", "pooled_projection_dim", "out_channels")  # fmt: skip
    return D.SD3ControlNetModel(num_layers=1, **{name: model.config[name] for name in names})


def _unet_net(model):
    return D.ControlNetModel.from_unet(
        model, conditioning_embedding_out_channels=(4, 4, 4, 8), load_weights_from_unet=False
    )


def _motion_net(model):
    return D.ControlNetModel(
        block_out_channels=(8, 8), layers_per_block=1, in_channels=4, norm_num_groups=2, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=model.config.cross_attention_dim,
        conditioning_embedding_out_channels=(4, 4, 4, 8),
    )  # fmt: skip


# host: (pipeline class, its ControlNet, options of the call)
CONTROLLED = {
    "flux": (D.FluxControlNetPipeline, _flux_net, lambda: {"control_image": noise(1, 3, 64, 96).sigmoid()}),
    "sd3": (D.StableDiffusion3ControlNetPipeline, _sd3_net, lambda: {"control_image": noise(1, 3, 48, 64).sigmoid()}),
    "sd15": (D.StableDiffusionControlNetPipeline, _unet_net, lambda: {"image": noise(1, 3, 128, 192).sigmoid()}),
    "sdxl": (D.StableDiffusionXLControlNetPipeline, _unet_net, lambda: {"image": noise(1, 3, 128, 192).sigmoid()}),
    "animatediff": (
        D.AnimateDiffControlNetPipeline,
        _motion_net,
        lambda: {"conditioning_frames": [noise(3, 64, 96, seed=i).sigmoid() for i in range(4)]},
    ),
}


def controlled(name, pipe):
    """-> (pipeline with a ControlNet around the same models and scheduler, options of its call)"""
    kind, make, options = CONTROLLED[name]
    parts = {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
    if name in ("flux", "sd3"):
        parts["vae"] = picture_vae(latent=4)
    torch.manual_seed(0)
    model = getattr(pipe, "transformer", None) or pipe.unet
    if name == "sd15":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if name == "sdxl":
        parts |= {"add_watermarker": False}
    return kind(**parts, controlnet=_noisy(make(getattr(model, "_orig_mod", model)))), options()


# ---- IP adapter
def _image_projection(width, cross):
    """Weights that turn a picture's embedding of ``width`` into four tokens of ``cross``."""
    return {
        "proj.weight": 0.1 * noise(4 * cross, width, seed=3), "proj.bias": torch.zeros(4 * cross),
        "norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross),
    }  # fmt: skip


def _unet_adapter(model):
    cross, weights, key = model.config.cross_attention_dim, {}, 1
    for name in model.attn_processors:
        if name.endswith("attn1.processor") or "motion_modules" in name:
            continue
        inner = model.get_submodule(name.removesuffix(".processor")).inner_dim
        for part in ("to_k_ip", "to_v_ip"):
            weights[f"{key}.{part}.weight"] = 0.2 * noise(inner, cross, seed=key)
        key += 2
    return {"image_proj": _image_projection(16, cross), "ip_adapter": weights}


def _flux_adapter(model):
    cross, inner, weights = model.config.joint_attention_dim, model.inner_dim, {}
    for key in range(model.config.num_layers):
        for part in ("to_k_ip", "to_v_ip"):
            weights |= {
                f"{key}.{part}.weight": 0.2 * noise(inner, cross, seed=key),
                f"{key}.{part}.bias": torch.zeros(inner),
            }
    return {"image_proj": _image_projection(16, cross), "ip_adapter": weights}


def _sd3_adapter(model):
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
    from diffusers.models.embeddings import IPAdapterTimeImageProjection

    width, dim = model.inner_dim, model.config.attention_head_dim
    weights = {}
    for layer in range(len(model.attn_processors)):
        part = _noisy(SD3IPAdapterJointAttnProcessor2_0(width, width, dim, timesteps_emb_dim=32))
        weights |= {f"{layer}.{k}": v.clone() for k, v in part.state_dict().items()}
    projection = IPAdapterTimeImageProjection(
        embed_dim=16, output_dim=width, hidden_dim=32, dim_head=64, heads=1, num_queries=4, timestep_in_dim=320
    )
    return {"image_proj": _noisy(projection).state_dict(), "ip_adapter": weights}


def load_ip_adapter(name, pipe):
    """Load an adapter into a pipeline as its user would, from weights. -> options of its call"""
    if name.startswith("flux"):
        weights = _flux_adapter(pipe.transformer)
        pipe.load_ip_adapter(weights, weight_name="", image_encoder_pretrained_model_name_or_path=None)
        return {
            "ip_adapter_image_embeds": [noise(1, 1, 16)],
            "negative_ip_adapter_image_embeds": [noise(1, 1, 16, seed=2)],
        }
    if name == "sd3":
        weights = _sd3_adapter(pipe.transformer)
        pipe.load_ip_adapter(weights, weight_name="", image_encoder_folder=None)
        return {"ip_adapter_image_embeds": noise(2, 1, 16)}
    pipe.load_ip_adapter(_unet_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    return {"ip_adapter_image_embeds": [noise(2, 1, 16)]}
