"""Tiny random models and pipelines that need no network (CPU, float32, head_dim 16). Grids have T, H, W all different.

Each ``*_pipe`` builds a complete pipeline, each ``*_call`` runs it; ``MODELS`` holds the three required transformers with their
inputs as functions of batch size and grid.
"""

import diffusers as D
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = [
    "a",
    "an",
    "the",
    "of",
    "on",
    "in",
    "and",
    "cat",
    "dog",
    "surfer",
    "riding",
    "wave",
    "photo",
    "video",
    "red",
    "blue",
]
GRID = (3, 4, 6)


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(model, inputs):
    """First output tensor of one forward."""
    with torch.no_grad():
        out = model(**inputs, return_dict=False)[0]
    return out[0] if isinstance(out, (list, tuple)) else out


# ---- text
def _tokenizer(special, template, max_length, **tokens):
    vocab = {word: i for i, word in enumerate(special)}
    for word in WORDS:
        vocab.setdefault(word, len(vocab))
    inner = Tokenizer(models.WordLevel(vocab, unk_token=tokens["unk_token"]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    pairs = [(word, vocab[word]) for word in special if word in template]
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=max_length, **tokens)


def clip_tokenizer():
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokens = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    return _tokenizer((start, end), f"{start} $A {end}", 77, **tokens)


def t5_tokenizer():
    tokens = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return _tokenizer(("<pad>", "</s>", "<unk>"), "$A </s>", 512, **tokens)


def clip_text(hidden=32, heads=4):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        bos_token_id=0, eos_token_id=1, pad_token_id=1, vocab_size=64, hidden_size=hidden, intermediate_size=37,
        num_attention_heads=heads, num_hidden_layers=2, hidden_act="gelu", projection_dim=32, max_position_embeddings=77,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


def t5_text(model=T5EncoderModel, config=T5Config):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
    return model(config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0)).eval()


def llama_text():
    torch.manual_seed(0)
    config = LlamaConfig(
        bos_token_id=0, eos_token_id=1, pad_token_id=0, hidden_size=16, intermediate_size=37, num_attention_heads=4,
        num_hidden_layers=4, vocab_size=64,
    )  # fmt: skip
    return LlamaModel(config).eval()


# ---- transformers
def flux_transformer(**changes):
    torch.manual_seed(0)
    settings = {
        "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8],
    }  # fmt: skip
    return D.FluxTransformer2DModel(**{**settings, **changes}).eval()


def wan_transformer(**changes):
    torch.manual_seed(0)
    settings = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 16, "out_channels": 16,
        "text_dim": 32, "freq_dim": 256, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 64,
    }  # fmt: skip
    return D.WanTransformer3DModel(**{**settings, **changes}).eval()


def hunyuan_transformer(**changes):
    torch.manual_seed(0)
    settings = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
        "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True,
        "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6),
    }  # fmt: skip
    return D.HunyuanVideoTransformer3DModel(**{**settings, **changes}).eval()


# ---- their inputs
def wan_inputs(batch=1, grid=GRID, text=12):
    t, h, w = grid
    return {
        "hidden_states": noise(batch, 16, t, 2 * h, 2 * w), "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": noise(batch, text, 32, seed=2),
    }  # fmt: skip


def image_ids(h, w, image=0):
    return torch.cartesian_prod(torch.tensor([image]), torch.arange(h), torch.arange(w)).float()


def flux_inputs(batch=1, grid=(1, 4, 6), text=5):
    _, h, w = grid
    return {
        "hidden_states": noise(batch, h * w, 16), "encoder_hidden_states": noise(batch, text, 32, seed=2),
        "pooled_projections": noise(batch, 32, seed=3), "timestep": torch.full((batch,), 0.5), "img_ids": image_ids(h, w),
        "txt_ids": torch.zeros(text, 3),
    }  # fmt: skip


def hunyuan_inputs(batch=1, grid=GRID, text=8, valid=(5, 7, 8)):
    t, h, w = grid
    mask = torch.zeros(batch, text)
    for sample in range(batch):
        mask[sample, : valid[sample % len(valid)]] = 1
    return {
        "hidden_states": noise(batch, 4, t, 2 * h, 2 * w), "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": noise(batch, text, 16, seed=2), "encoder_attention_mask": mask,
        "pooled_projections": noise(batch, 8, seed=3), "guidance": torch.full((batch,), 6000.0),
    }  # fmt: skip


MODELS = {
    "wan": (wan_transformer, wan_inputs),
    "flux": (flux_transformer, flux_inputs),
    "hunyuan": (hunyuan_transformer, hunyuan_inputs),
}


# ---- pipelines
def flux_pipe():
    torch.manual_seed(0)
    vae = D.AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=32,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035,
    ).eval()  # fmt: skip
    return D.FluxPipeline(
        scheduler=D.FlowMatchEulerDiscreteScheduler(), text_encoder=clip_text(), tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text(), tokenizer_2=t5_tokenizer(), transformer=flux_transformer(), vae=vae,
    )  # fmt: skip


def flux_call(pipe, steps=2, **options):
    size = {"height": 32, "width": 48, "max_sequence_length": 8}
    return _call(pipe, "a cat riding a wave", steps, **size, **options).images


def wan_vae():
    torch.manual_seed(0)
    return D.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def wan_pipe():
    return D.WanPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5_text(UMT5EncoderModel, UMT5Config), transformer=wan_transformer(),
        vae=wan_vae(), scheduler=D.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip


def wan_call(pipe, steps=2, **options):
    size = {"height": 48, "width": 64, "num_frames": 9, "max_sequence_length": 16}
    settings = {**size, "negative_prompt": "red", "guidance_scale": 5.0, **options}
    return _call(pipe, "a cat riding a wave", steps, **settings).frames


def hunyuan_pipe():
    torch.manual_seed(0)
    vae = D.AutoencoderKLHunyuanVideo(
        in_channels=3, out_channels=3, latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, act_fn="silu",
        norm_num_groups=4, scaling_factor=0.476986, spatial_compression_ratio=8, temporal_compression_ratio=4,
        mid_block_add_attention=True,
    ).eval()  # fmt: skip
    return D.HunyuanVideoPipeline(
        text_encoder=llama_text(), tokenizer=t5_tokenizer(), transformer=hunyuan_transformer(), vae=vae,
        scheduler=D.FlowMatchEulerDiscreteScheduler(shift=7.0), text_encoder_2=clip_text(8), tokenizer_2=clip_tokenizer(),
    )  # fmt: skip


def hunyuan_call(pipe, prompt="a cat riding a wave", steps=2, **options):
    size = {"height": 48, "width": 64, "num_frames": 9, "max_sequence_length": 16}
    template = {"template": "{}", "crop_start": 0}
    return _call(pipe, prompt, steps, prompt_template=template, guidance_scale=4.5, **size, **options).frames


def _call(pipe, prompt, steps, seed=0, **options):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, num_inference_steps=steps, generator=generator, output_type="pt", **options)


PIPES = {
    "wan": (wan_pipe, wan_call),
    "flux": (flux_pipe, flux_call),
    "hunyuan": (hunyuan_pipe, hunyuan_call),
}
