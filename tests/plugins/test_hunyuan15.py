"""HunyuanVideo 1.5: padding is cut off instead of masked pair by pair, and nothing that is read changes.

Letters: B batch, N visual tokens, L text tokens. Text is image tokens, glyphs, prompt; valid ones first, in this order.
"""

import copy
import weakref

import diffusers as D
import pytest
import torch
from fakes import Masked, Spy
from tiny import noise, run
from torch.utils._python_dispatch import TorchDispatchMode

from foveal.plugins.accelerate import accelerate
from foveal.plugins.diffusers_host.hunyuan15_processor import HunyuanVideo15Processor
from foveal.plugins.running import NOTHING_LEFT_OUT

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
GRID = (3, 4, 6)
N, PROMPT, GLYPHS, IMAGE = 72, 6, 4, 3
TEXT = PROMPT + GLYPHS + IMAGE
PADDINGS = {  # (prompt, glyphs) valid per sample
    "all-valid": [(6, 4)],
    "padded": [(4, 2)],
    "no-glyphs": [(3, 0)],
    "nothing-valid": [(0, 0)],
    "two-alike": [(5, 1), (4, 2)],
    "two-differ": [(2, 0), (6, 3)],
    "one-of-two-empty": [(0, 0), (3, 1)],
}
GRAT = {"group": (1, 2, 2), "b": (1, 1, 0)}
NEIGHBORHOOD = {"window": (1, 3, 3), "tile": (1, 2, 2)}


def model_of(seed=0, **changes):
    torch.manual_seed(seed)
    settings = {
        "in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
        "num_refiner_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 16, "text_embed_2_dim": 8, "image_embed_dim": 12,
        "rope_axes_dim": (4, 6, 6), "target_size": 16, "task_type": "t2v",
    }  # fmt: skip
    return D.HunyuanVideo15Transformer3DModel(**{**settings, **changes}).eval()


def inputs_of(valid=((4, 2),), image=False, grid=GRID):
    b, masks = len(valid), (torch.zeros(len(valid), PROMPT), torch.zeros(len(valid), GLYPHS))
    for sample, counts in enumerate(valid):
        for mask, count in zip(masks, counts, strict=True):
            mask[sample, :count] = 1
    return {
        "hidden_states": noise(b, 9, *grid), "timestep": torch.full((b,), 500.0),
        "encoder_hidden_states": noise(b, PROMPT, 16, seed=2), "encoder_hidden_states_2": noise(b, GLYPHS, 8, seed=3),
        "encoder_attention_mask": masks[0], "encoder_attention_mask_2": masks[1],
        "image_embeds": noise(b, IMAGE, 12, seed=4) if image else torch.zeros(b, IMAGE, 12),
    }  # fmt: skip


def lengths_of(valid, image):
    return [sum(counts) + IMAGE * image for counts in valid]


@pytest.fixture(params=list(PADDINGS.values()), ids=list(PADDINGS))
def valid(request):
    return request.param


# ---- equal to the original
@pytest.mark.parametrize("image", [False, True], ids=["text-to-video", "image-to-video"])
def test_dense_equals_the_plain_model(valid, image):
    model, inputs = model_of(), inputs_of(valid, image)
    plain, spy = run(model, inputs), Spy()
    accelerate(model, spy)
    torch.testing.assert_close(run(model, inputs), plain, **TOLERANCE)
    lengths = lengths_of(valid, image)
    for site, v in spy.seen:
        assert site.tokens == v.shape[2] == N + max(lengths)
        assert (site.text.size if site.text else 0) == max(lengths)
        assert site.valid_text is None if len(set(lengths)) == 1 else site.valid_text.tolist() == lengths


def test_valid_rows_of_one_layer_equal_the_original(valid):
    model, inputs = model_of(), inputs_of(valid)
    with catch_block_outputs(model) as original:
        run(model, inputs)
    accelerate(model, Spy())
    with catch_block_outputs(model) as ours:
        run(model, inputs)
    for (visual, text), (our_visual, our_text) in zip(original, ours, strict=True):
        torch.testing.assert_close(our_visual, visual, **TOLERANCE)
        assert our_text.shape == text.shape
        for sample, length in enumerate(lengths_of(valid, image=False)):
            torch.testing.assert_close(our_text[sample, :length], text[sample, :length], **TOLERANCE)


class catch_block_outputs:
    """(visual, text) of every block's attention."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def __enter__(self):
        keep = lambda module, args, out: self.seen.append(tuple(x.clone() for x in out))  # noqa: E731
        self.hooks = [block.attn.register_forward_hook(keep) for block in self.model.transformer_blocks]
        return self.seen

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("method", [Spy(), Masked()], ids=["dense", "sparse"])
def test_nothing_reads_padded_text(method):
    model, inputs = model_of(), inputs_of([(2, 0), (6, 3)])
    accelerate(model, method)
    before = run(model, inputs)
    poison = lambda module, args, out: (out[0], spoiled(out[1]))  # noqa: E731

    def spoiled(text):
        text = text.clone()
        for sample, length in enumerate((2, 9)):
            text[sample, length:] = 1e3
        return text

    for block in model.transformer_blocks:
        block.register_forward_hook(poison)
    assert torch.equal(run(model, inputs), before)


def test_remove_restores_processors_and_bits():
    model, inputs = model_of(), inputs_of()
    plain, before = run(model, inputs), dict(model.attn_processors)
    handle = accelerate(model, "grat", **GRAT)
    bound = [m.processor for name, m in model.named_modules() if name in handle.still_bound()]
    assert [type(p.inner) for p in bound] == [HunyuanVideo15Processor] * 2
    assert not torch.equal(run(model, inputs), plain)
    assert not any("refiner" in name for name in handle.still_bound())
    handle.remove()
    assert all(model.attn_processors[name] is processor for name, processor in before.items())
    assert torch.equal(run(model, inputs), plain)


def test_a_processor_of_ones_own_is_left_in_charge():
    model, inputs = model_of(), inputs_of()
    kind = type(model.transformer_blocks[0].attn.processor)
    own = type("Own", (kind,), {})
    for block in model.transformer_blocks:
        block.attn.processor = own()
    plain = run(model, inputs)
    handle = accelerate(model, Masked())
    assert torch.equal(run(model, inputs), plain)
    assert {item["reason"] for item in handle.record.ran_dense_why()} == {"the sequence does not fit the token grid"}


# ---- sparse
@pytest.mark.parametrize("knobs", [("grat", GRAT), ("neighborhood", NEIGHBORHOOD)], ids=["grat", "neighborhood"])
def test_sparse_samples_of_one_batch_equal_those_alone(knobs, valid):
    (name, settings), model = knobs, model_of()
    inputs = inputs_of(valid)
    plain = run(model, inputs)
    handle = accelerate(model, name, **settings)
    together = run(model, inputs)
    assert handle.record.density() < 0.6
    assert not handle.record.ran_dense_why()
    assert (together - plain).abs().max() > 1e-3
    for sample in range(len(valid)):
        alone = {k: v[sample : sample + 1] for k, v in inputs.items()}
        torch.testing.assert_close(run(model, alone)[0], together[sample], **TOLERANCE)


def test_all_groups_seen_equals_the_plain_model(valid):
    model, inputs = model_of(), inputs_of(valid)
    plain = run(model, inputs)
    handle = accelerate(model, "grat", group=(1, 2, 2), b=-1)
    torch.testing.assert_close(run(model, inputs), plain, **TOLERANCE)
    assert {row["reason"] for row in handle.record.ran_dense_why()} <= {NOTHING_LEFT_OUT}


def test_method_masks_the_same_pairs_as_an_oracle():
    model, inputs = model_of(), inputs_of([(2, 0), (6, 3)])
    accelerate(model, Masked(reach=99))
    torch.testing.assert_close(run(model, inputs), run(model_of(), inputs), **TOLERANCE)


@pytest.mark.parametrize("method", [Masked(shuffle=True), Spy(shuffle=True)], ids=["masked", "dense"])
def test_order_hook_on_and_off_give_the_same(method):
    model, inputs = model_of(), inputs_of([(2, 0), (6, 3)])
    handle = accelerate(model, method)
    on = run(model, inputs)
    handle.order_hook = False
    torch.testing.assert_close(run(model, inputs), on, **TOLERANCE)


def test_order_hook_permutes_once():
    model, inputs = model_of(), inputs_of()
    spy = Spy(shuffle=True)
    accelerate(model, spy)
    run(model, inputs)
    assert all(site.ordered for site, _ in spy.seen)


def test_new_masks_and_steps_are_seen_at_every_call():
    model, inputs = model_of(), inputs_of([(4, 2)])
    spy = Spy()
    accelerate(model, spy)
    run(model, inputs)
    inputs["encoder_attention_mask"][:, 1:] = 0
    run(model, inputs)
    assert [site.text.size for site, _ in spy.seen] == [6, 6, 3, 3]


# ---- memory
class Largest(TorchDispatchMode):
    """The most elements any operator's output has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def largest(model, inputs):
    """Elements of the largest tensor that attention makes (the glyph projection has a weight of 2048 x 2048)."""
    watch, hooks = Largest(), []
    for block in model.transformer_blocks:
        hooks.append(block.attn.register_forward_pre_hook(lambda *_: watch.__enter__() and None))
        hooks.append(block.attn.register_forward_hook(lambda *_: watch.__exit__(None, None, None)))
    run(model, inputs)
    for hook in hooks:
        hook.remove()
    return watch.elements


@pytest.mark.parametrize("valid", [[(4, 2)], [(2, 0), (6, 3)]], ids=["one", "two"])
@pytest.mark.parametrize("method", ["dense", "grat", "neighborhood"])
def test_no_tensor_over_all_pairs_is_made(valid, method):
    grid = (3, 16, 20)  # 960 tokens: more than any width of this model
    settings = {"grat": {"group": (1, 8, 10), "b": (1, 0, 0)}, "neighborhood": {"window": (1, 5, 5), "tile": (1, 4, 4)}}
    model, inputs = model_of(), inputs_of(valid, grid=grid)
    run(model, inputs)
    pairs = 960 * 960
    assert largest(model, inputs) >= pairs, "the original makes one, or this test watches the wrong thing"
    accelerate(model, method, **settings.get(method, {}))
    assert largest(model, inputs) < pairs / 4


# ---- with the rest of diffusers
def test_chosen_layers_stand_beside_original_ones():
    model, inputs = model_of(), inputs_of([(2, 0), (6, 3)])
    plain = run(model, inputs)
    accelerate(model, Spy(), layers=[0])
    torch.testing.assert_close(run(model, inputs), plain, **TOLERANCE)


def test_deep_copies_are_plain_and_blocks_outside_a_call_see_all_text():
    model, inputs = model_of(), inputs_of()
    plain = run(model, inputs)
    accelerate(model, Masked())
    run(model, inputs)
    assert torch.equal(run(copy.deepcopy(model), inputs), plain)
    block, mask = model.transformer_blocks[0], torch.ones(1, 8)
    args = (noise(1, 10, 32), noise(1, 8, 32, seed=5), noise(1, 32, seed=6), mask, None)
    with torch.no_grad():
        torch.testing.assert_close(block(*args)[1], model_of().transformer_blocks[0](*args)[1], **TOLERANCE)


def test_states_and_models_are_let_go():
    model, inputs = model_of(), inputs_of()
    accelerate(model, "grat", **GRAT)
    run(model, inputs)
    gone = weakref.ref(model)
    del model
    import gc

    gc.collect()
    assert gone() is None
