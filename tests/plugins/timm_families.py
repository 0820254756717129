"""Tiny vision transformers, one per family, with weights large enough that attention matters.

Letters: N tokens of a sequence.
"""

import warnings

import timm
import torch

PATCH = 8
GRIDS = {"13x17": (13, 17), "31x45": (31, 45), "8x8": (8, 8)}
# family -> (timm's name, tokens before the patches)
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", 1),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", 2),
    "dinov2-registers": ("vit_small_patch14_reg4_dinov2", 5),
    "dinov3": ("vit_small_patch16_dinov3", 5),
    "eva02": ("eva02_tiny_patch14_224", 1),
    "rope-mixed": ("vit_small_patch16_rope_mixed_224", 1),
    "pe-core": ("vit_pe_core_tiny_patch16_384", 1),
    "siglip": ("vit_base_patch16_siglip_224", 0),
    "naflex": ("naflexvit_base_patch16_gap", 4),
    "parallel-attention": ("vit_small_patch16_18x2_224", 1),
}


def build(family="vit", grid=(13, 17), seed=0, dtype=torch.float64, depth=2, **options):
    """A model of a family for pictures of grid patches, in eval mode."""
    options = {"embed_dim": 32, "depth": depth, "num_heads": 2, "num_classes": 5, **options}
    options |= {"patch_size": PATCH, "img_size": (grid[0] * PATCH, grid[1] * PATCH)}
    if family not in ("naflex",):
        options.setdefault("dynamic_img_size", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(FAMILIES[family][0], **options)
    return seeded(model, seed).to(dtype).eval()


def seeded(model, seed=0):
    """Random weights of a size at which tokens differ and softmax chooses."""
    make = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in model.parameters():
            weights.copy_(torch.randn(weights.shape, generator=make) * 0.3)
    return model


def picture(grid=(13, 17), batch=2, seed=0, dtype=torch.float64):
    make = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, grid[0] * PATCH, grid[1] * PATCH, generator=make).to(dtype)


def fingerprint(model):
    """Everything that acceleration might leave behind: attributes, hooks, state."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    return [
        (name, type(module), sorted(module.__dict__), [len(getattr(module, kind)) for kind in hooks])
        for name, module in model.named_modules()
    ]
