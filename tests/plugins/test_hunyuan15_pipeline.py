"""HunyuanVideo 1.5 as a whole: pipeline with a two-pass guider, offloading, training, adapters, compilation."""

import diffusers as D
import pytest
import torch
from fakes import Spy
from test_hunyuan15 import GRAT, NEIGHBORHOOD, TOLERANCE, inputs_of, model_of
from tiny import run, t5_text, t5_tokenizer
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import ByT5Tokenizer, Qwen2_5_VLTextModel, T5Config, T5EncoderModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

from foveal import GRATAttnProcessor
from foveal.plugins.accelerate import accelerate, handle_of

PROMPT = 'a cat riding a wave "wave"'


# ---- a tiny pipeline with both of its text encoders
def chat_tokenizer():
    tokenizer = t5_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return tokenizer


def qwen_text():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 37, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0]}
    config = Qwen2_5_VLTextConfig(
        **sizes, num_hidden_layers=4, vocab_size=64, rope_scaling=rope, pad_token_id=0, bos_token_id=0, eos_token_id=1
    )
    return Qwen2_5_VLTextModel(config).eval()


def glyph_text():
    return t5_text(T5EncoderModel, lambda **sizes: T5Config(**{**sizes, "vocab_size": 384, "d_model": 8}))


def pipe_of():
    torch.manual_seed(0)
    vae = D.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1, downsample_match_channel=False,
        upsample_match_channel=False,
    ).eval()  # fmt: skip
    pipe = D.HunyuanVideo15Pipeline(
        text_encoder=qwen_text(), tokenizer=chat_tokenizer(), text_encoder_2=glyph_text(), tokenizer_2=ByT5Tokenizer(),
        transformer=model_of(), vae=vae, scheduler=D.FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=D.ClassifierFreeGuidance(guidance_scale=4.0),
    )  # fmt: skip
    pipe.system_message, pipe.prompt_template_encode_start_idx = "a", 1
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = 12, 20, 5
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, prompt=PROMPT, output_type="latent", **options):
    generator, size = torch.Generator().manual_seed(0), {"height": 64, "width": 96, "num_frames": 9}
    settings = {**size, "negative_prompt": "red", "num_inference_steps": 2, **options}
    with torch.no_grad():
        return pipe(prompt, generator=generator, output_type=output_type, **settings).frames


def test_dense_pipeline_equals_the_plain_one_up_to_the_video():
    pipe = pipe_of()
    plain, video = call(pipe), call(pipe, output_type="pt")
    handle = accelerate(pipe, "dense")
    torch.testing.assert_close(call(pipe), plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(call(pipe, output_type="pt"), video, atol=1e-4, rtol=1e-4)
    handle.remove()
    assert torch.equal(call(pipe), plain)


@pytest.mark.parametrize("knobs", [("grat", GRAT), ("neighborhood", NEIGHBORHOOD)], ids=["grat", "neighborhood"])
def test_both_passes_of_the_guider_run_sparse_in_branches_of_their_own(knobs):
    (name, settings), pipe = knobs, pipe_of()
    plain = call(pipe)
    handle = accelerate(pipe, name, **settings)
    first = call(pipe)
    assert torch.equal(call(pipe), first)
    assert first.isfinite().all() and not torch.equal(first, plain)
    assert not handle.record.ran_dense_why()
    assert [row.calls for row in handle.record.layers] == [2 * 2 * 2] * 2  # runs, steps, passes


def test_dense_first_steps_see_both_branches():
    spy, pipe = Spy(dense_steps=1), pipe_of()
    accelerate(pipe, spy)
    call(pipe)
    branches = [(site.branch, site.step, site.text.size) for site, _ in spy.seen]
    assert [(b, s) for b, s, _ in branches] == [("pred_cond", 1)] * 2 + [("pred_uncond", 1)] * 2
    assert branches[0][2] > branches[2][2], "the negative prompt is shorter, and no longer padded to the other's length"


def test_two_prompts_of_different_length_share_a_batch():
    pipe = pipe_of()
    accelerate(pipe, "grat", **GRAT)
    latents, prompts = torch.zeros(2, 4, 3, 4, 6), ["a cat", PROMPT]
    both = call(pipe, prompts, latents=latents, negative_prompt=["red", "a dog"])
    for i, (prompt, negative) in enumerate(zip(prompts, ("red", "a dog"), strict=True)):
        alone = call(pipe, prompt, latents=latents[:1], negative_prompt=negative)
        torch.testing.assert_close(alone[0], both[i], atol=2e-5, rtol=1e-4)


def test_set_attn_processor_accelerates_and_gives_back():
    pipe = pipe_of()
    plain, before = call(pipe), dict(pipe.transformer.attn_processors)
    pipe.transformer.set_attn_processor(GRATAttnProcessor(**GRAT))
    assert not torch.equal(call(pipe), plain)
    handle_of(pipe.transformer).remove()
    assert all(pipe.transformer.attn_processors[n] is p for n, p in before.items())
    assert torch.equal(call(pipe), plain)


def test_offloaded_pipeline_gives_the_same():
    from accelerate import cpu_offload

    pipe = pipe_of()
    accelerate(pipe, "grat", **GRAT)
    here = run(pipe.transformer, inputs_of())
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    assert torch.equal(run(pipe.transformer, inputs_of()), here)


# ---- training and adapters
def test_gradients_equal_the_plain_model_also_recomputed():
    inputs, grads = inputs_of([(2, 0), (6, 3)]), []
    for accelerated, checkpointing in ((False, False), (True, False), (True, True)):
        model = model_of()
        if accelerated:
            accelerate(model, Spy())
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        loss = model(**inputs, return_dict=False)[0].square().sum()
        run(model, inputs_of([(1, 0)]))  # another call in between changes nothing
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[1], grads[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(grads[2], grads[1], atol=1e-4, rtol=1e-4)


def test_lora_reaches_every_projection():
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"]
    model, inputs = model_of(), inputs_of([(2, 0), (6, 3)])
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    plain = run(model, inputs)
    accelerate(model, Spy())
    torch.testing.assert_close(run(model, inputs), plain, **TOLERANCE)
    model.disable_adapters()
    assert (run(model, inputs) - plain).abs().max() > 1e-3


# ---- compilation
def test_regional_compilation_serves_all_layers_and_prompt_lengths(fresh_compiler):
    model, cases = model_of(), [inputs_of([(n, 2)]) for n in (4, 5, 2, 6, 3)]
    plain = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(fullgraph=True, backend=plain)
    run(model, cases[0])
    torch.compiler.reset()
    model = model_of()
    handle = accelerate(model, "grat", **GRAT)
    eager = [run(model, case) for case in cases]
    handle.reset()
    ours = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(fullgraph=True, backend=ours)
    counts = []
    for case, out in zip(cases, eager, strict=True):
        torch.testing.assert_close(run(model, case), out, **TOLERANCE)
        counts.append(ours.frame_count)
    assert counts[0] <= plain.frame_count + 1  # the permutation behind the patch embedding is a graph of its own
    assert counts[1] <= counts[0] + 1 and counts[-1] == counts[1], "the second length makes the length dynamic"
    assert all(row.calls == len(cases) and row.dense_calls == 0 for row in handle.record.layers)
