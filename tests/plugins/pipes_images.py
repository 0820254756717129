"""Tiny picture pipelines (and AnimateDiff) without text encoders: prompts come as embeddings, results leave as latents."""

import diffusers as D
import torch
import zoo
from pipes_video import embeds, flow, run, two_prompts
from tiny import flux_transformer, noise


def picture_vae(latent=4, size=8, **options):
    """An autoencoder for the pipelines that must encode a picture: ``size`` pixels a latent."""
    torch.manual_seed(0)
    blocks = size.bit_length()
    return D.AutoencoderKL(
        block_out_channels=(4,) * blocks, down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks, layers_per_block=1, latent_channels=latent, norm_num_groups=2,
        sample_size=32, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5, **options,
    ).eval()  # fmt: skip


# ---- Flux
FLUX = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}


def flux_prompt(two_passes=False):
    prompt = {"prompt_embeds": embeds(1, 5, 32), "pooled_prompt_embeds": embeds(1, 32, seed=3)}
    if two_passes:
        negative = {
            "negative_prompt_embeds": embeds(1, 5, 32, seed=5),
            "negative_pooled_prompt_embeds": embeds(1, 32, seed=6),
        }
        prompt |= {**negative, "true_cfg_scale": 3.0}
    return prompt


def flux():
    return D.FluxPipeline(scheduler=flow(), vae=None, transformer=flux_transformer(), **FLUX)


def flux_call(pipe, steps=2, two_passes=False, **options):
    return run(pipe, steps, **{"height": 64, "width": 96, **flux_prompt(two_passes), **options})


def kontext():
    return D.FluxKontextPipeline(scheduler=flow(), vae=picture_vae(), transformer=flux_transformer(), **FLUX)


def kontext_call(pipe, steps=2, two_passes=False, **options):
    size = {
        "height": 64,
        "width": 96,
        "max_area": 64 * 96,
        "_auto_resize": False,
        "image": noise(1, 3, 32, 48).sigmoid(),
    }
    return run(pipe, steps, **{**size, **flux_prompt(two_passes), **options})


def flux2():
    return D.Flux2Pipeline(
        scheduler=flow(), vae=None, text_encoder=None, tokenizer=None, transformer=zoo.build("flux2")[0]
    )


def flux2_call(pipe, steps=2, **options):
    return run(pipe, steps, **{"height": 64, "width": 96, "prompt_embeds": embeds(1, 6, 32), **options})


# ---- other transformers
def sd3():
    nothing = dict.fromkeys([f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")])
    return D.StableDiffusion3Pipeline(scheduler=flow(), vae=None, transformer=zoo.build("sd3")[0], **nothing)


def sd3_call(pipe, steps=2, **options):
    pooled = {"pooled_prompt_embeds": embeds(1, 64, seed=4), "negative_pooled_prompt_embeds": embeds(1, 64, seed=5)}
    size = {"height": 48, "width": 64}
    return run(pipe, steps, **{**size, **two_prompts(6, 32), **pooled, "guidance_scale": 5.0, **options})


def qwen():
    return D.QwenImagePipeline(
        scheduler=flow(), vae=None, text_encoder=None, tokenizer=None, transformer=zoo.build("qwen")[0]
    )


def qwen_call(pipe, steps=2, **options):
    masks = {
        "prompt_embeds_mask": (torch.arange(8)[None] < 6).long(),
        "negative_prompt_embeds_mask": (torch.arange(8)[None] < 3).long(),
    }
    return run(
        pipe, steps, **{"height": 64, "width": 96, **two_prompts(8, 16), **masks, "true_cfg_scale": 4.0, **options}
    )


def zimage():
    return D.ZImagePipeline(
        scheduler=flow(), vae=None, text_encoder=None, tokenizer=None, transformer=zoo.build("zimage")[0]
    )


def zimage_call(pipe, steps=2, **options):
    prompts = {"prompt_embeds": [embeds(10, 16)], "negative_prompt_embeds": [embeds(7, 16, seed=3)]}
    return run(pipe, steps, **{"height": 64, "width": 128, **prompts, "guidance_scale": 5.0, **options})


def pixart():
    return D.PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=D.DDIMScheduler(), transformer=zoo.build("pixart")[0]
    )


def pixart_call(pipe, steps=2, **options):
    masks = {"prompt_attention_mask": torch.ones(1, 6), "negative_prompt_attention_mask": torch.ones(1, 6)}
    size = {"height": 64, "width": 96, "use_resolution_binning": False, "negative_prompt": None}
    return run(pipe, steps, **{**size, **two_prompts(6, 8), **masks, "guidance_scale": 4.5, **options})


# ---- UNets
def sd15():
    return D.StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=zoo.build("sd_unet")[0], scheduler=D.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sd15_call(pipe, steps=2, **options):
    return run(pipe, steps, **{"height": 128, "width": 192, **two_prompts(6, 32), "guidance_scale": 5.0, **options})


def sdxl():
    return D.StableDiffusionXLPipeline(
        vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=zoo.build("sdxl_unet")[0],
        scheduler=D.EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip


def sdxl_call(pipe, steps=2, **options):
    pooled = {"pooled_prompt_embeds": embeds(1, 32, seed=4), "negative_pooled_prompt_embeds": embeds(1, 32, seed=5)}
    size = {"height": 128, "width": 192}
    return run(pipe, steps, **{**size, **two_prompts(6, 64), **pooled, "guidance_scale": 5.0, **options})


def animatediff():
    unet = zoo.build("motion_unet")[0]
    scheduler = D.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False)
    return D.AnimateDiffPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet, motion_adapter=None, scheduler=scheduler
    )


def animatediff_call(pipe, steps=2, **options):
    size = {"height": 64, "width": 96, "num_frames": 4}
    return run(pipe, steps, **{**size, **two_prompts(6, 32), "guidance_scale": 7.5, **options})
