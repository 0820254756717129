"""Tiny video pipelines without text encoders: prompts come as embeddings, results leave as latents. Grids have T, H, W all different."""

from types import SimpleNamespace

import diffusers as D
import torch
import zoo
from tiny import noise, wan_transformer, wan_vae
from transformers import BatchFeature

SIZE = {
    "height": 64,
    "width": 96,
    "num_frames": 9,
}  # 8 x 8 pixels and 4 frames a latent, 2 x 2 latents a token: grid (3, 4, 6)


def embeds(*shape, seed=2):
    return noise(*shape, seed=seed)


def flow(**options):
    return D.FlowMatchEulerDiscreteScheduler(**options)


def run(pipe, steps=2, seed=0, **options):
    """Latents of one seeded run, or whatever the pipeline gives first."""
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(seed)  # some pipelines encode pictures with the global generator
    generator = torch.Generator().manual_seed(seed)
    return pipe(num_inference_steps=steps, generator=generator, output_type="latent", return_dict=False, **options)[0]


def two_prompts(text, width):
    return {"prompt_embeds": embeds(1, text, width), "negative_prompt_embeds": embeds(1, text, width, seed=3)}


# ---- Wan
def _wan(kind, transformer, second=None, **options):
    return kind(
        tokenizer=None, text_encoder=None, vae=options.pop("vae", None), scheduler=flow(shift=7.0), transformer=transformer,
        **({} if second is None else {"transformer_2": second}), **options,
    )  # fmt: skip


def wan():
    return _wan(D.WanPipeline, wan_transformer())


def wan_call(pipe, steps=2, **options):
    return run(pipe, steps, **{**SIZE, **two_prompts(12, 32), "guidance_scale": 5.0, **options})


def wan22():
    """Two experts: the first takes the first half of the steps."""
    second = wan_transformer()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.25)
    return _wan(D.WanPipeline, wan_transformer(), second, boundary_ratio=0.95)


class Standin(torch.nn.Module):
    """A module in the place of a real one. It has a weight, because offloading looks for one."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))


class Seen(Standin):
    """Stands for Wan's image encoder and its preprocessor: a picture becomes five tokens of width 4."""

    def forward(self, images, **options):
        if options.get("return_tensors"):
            return BatchFeature({"images": images})
        return SimpleNamespace(hidden_states=[noise(1, 5, 4), None])


def wan_i2v():
    model = wan_transformer(in_channels=36, image_dim=4, added_kv_proj_dim=32)
    return _wan(D.WanImageToVideoPipeline, model, vae=wan_vae(), image_encoder=Seen(), image_processor=Seen())


def wan_i2v_call(pipe, steps=2, **options):
    more = {"image": noise(1, 3, 64, 96).sigmoid(), **two_prompts(512, 32), "guidance_scale": 5.0}
    return run(pipe, steps, **{**SIZE, **more, **options})


def wan_vace():
    torch.manual_seed(0)
    model = D.WanVACETransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32,
        freq_dim=256, ffn_dim=32, num_layers=4, cross_attn_norm=True, rope_max_seq_len=128, vace_layers=[0, 2],
        vace_in_channels=96,
    )  # fmt: skip
    return _wan(D.WanVACEPipeline, model.eval(), vae=wan_vae())


def wan_vace_call(pipe, steps=2, **options):
    return run(pipe, steps, **{**SIZE, **two_prompts(12, 32), "guidance_scale": 5.0, **options})


def skyreels():
    scheduler = D.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    return D.SkyReelsV2Pipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=zoo.build("skyreels")[0]
    )


def skyreels_call(pipe, steps=2, **options):
    return run(pipe, steps, **{**SIZE, **two_prompts(12, 16), "guidance_scale": 5.0, **options})


# ---- joint text
def hunyuan():
    return D.HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, vae=None, scheduler=flow(shift=7.0),
        transformer=zoo.build("hunyuan")[0],
    )  # fmt: skip


def hunyuan_call(pipe, steps=2, two_passes=False, **options):
    def prompt(name, valid, seed):
        mask = (torch.arange(8)[None] < valid).long()
        texts = {f"{name}_embeds": embeds(1, 8, 16, seed=seed), f"{name}_attention_mask": mask}
        return {
            **texts,
            f"{'negative_' if 'negative' in name else ''}pooled_prompt_embeds": embeds(1, 8, seed=seed + 1),
        }

    more = {**prompt("prompt", 5, 2), "guidance_scale": 4.5}
    if two_passes:
        more |= {**prompt("negative_prompt", 3, 5), "true_cfg_scale": 3.0}
    return run(pipe, steps, **{**SIZE, **more, **options})


def cogvideox():
    return D.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=D.CogVideoXDDIMScheduler(),
        transformer=zoo.build("cogvideox")[0],
    )


def cogvideox_call(pipe, steps=2, **options):
    return run(pipe, steps, **{**SIZE, **two_prompts(16, 32), "guidance_scale": 6.0, **options})


def mochi():
    return D.MochiPipeline(
        scheduler=flow(), vae=None, text_encoder=None, tokenizer=None, transformer=zoo.build("mochi")[0]
    )


def mochi_call(pipe, steps=2, **options):
    masks = {
        "prompt_attention_mask": torch.ones(1, 16).bool(), "negative_prompt_attention_mask": (torch.arange(16)[None] < 5)
    }  # fmt: skip
    size = {**SIZE, "num_frames": 13}
    return run(pipe, steps, **{**size, **two_prompts(16, 16), **masks, "guidance_scale": 4.5, **options})


# ---- text across
def ltx():
    return D.LTXPipeline(scheduler=flow(), vae=None, text_encoder=None, tokenizer=None, transformer=zoo.build("ltx")[0])


def ltx_call(pipe, steps=2, **options):
    masks = {"prompt_attention_mask": torch.ones(1, 6), "negative_prompt_attention_mask": torch.ones(1, 6)}
    size = {"height": 128, "width": 192, "num_frames": 17}
    return run(pipe, steps, **{**size, **two_prompts(6, 32), **masks, "guidance_scale": 3.0, **options})


class Facts(Standin):
    """Stands for an autoencoder that is only asked for numbers."""

    def __init__(self, latents, **facts):
        super().__init__()
        self.config = SimpleNamespace(**facts)
        self.latents_mean, self.latents_std = torch.zeros(latents), torch.ones(latents)
        for name, fact in facts.items():
            setattr(self, name, fact)


class Connectors(Standin):
    """Stands for LTX-2's text connectors: passes the text on to both streams."""

    def forward(self, prompt, mask, padding_side="left"):
        return prompt, prompt, mask


def ltx2():
    video = Facts(4, spatial_compression_ratio=32, temporal_compression_ratio=8, scaling_factor=1.0)
    sizes = {"mel_compression_ratio": 4, "temporal_compression_ratio": 4, "sample_rate": 16000, "mel_hop_length": 160}
    audio = Facts(4, **sizes, mel_bins=4, latent_channels=4)
    return D.LTX2Pipeline(
        scheduler=flow(), vae=video, audio_vae=audio, text_encoder=None, tokenizer=None, connectors=Connectors(), vocoder=None,
        transformer=zoo.build("ltx2")[0],
    )  # fmt: skip


def ltx2_call(pipe, steps=2, **options):
    masks = {"prompt_attention_mask": torch.ones(1, 6), "negative_prompt_attention_mask": torch.ones(1, 6)}
    one_pass = {"stg_scale": 0.0, "modality_scale": 1.0, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0}
    size = {"height": 128, "width": 192, "num_frames": 17}
    return run(pipe, steps, **{**size, **two_prompts(6, 16), **masks, **one_pass, "guidance_scale": 3.0, **options})


class Guard:
    """Stands for Cosmos' safety checker, which looks at words and pixels; there are neither."""

    def to(self, device):
        return self

    def check_text_safety(self, prompt):
        return True


def cosmos():
    return D.CosmosTextToWorldPipeline(
        text_encoder=None, tokenizer=None, transformer=zoo.build("cosmos")[0], vae=None, scheduler=D.EDMEulerScheduler(),
        safety_checker=Guard(),
    )  # fmt: skip


def cosmos_call(pipe, steps=2, **options):
    size = {"height": 64, "width": 96, "num_frames": 17}
    return run(pipe, steps, **{**size, **two_prompts(6, 16), "guidance_scale": 7.0, **options})
