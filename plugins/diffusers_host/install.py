"""``set_attn_processor`` for our processors, on models and on pipelines; ``uninstall`` takes it back.

* Models: diffusers' own method, wrapped. Only our templates are treated differently.
* Models that diffusers gave no such method (Mochi, Z-Image, Cosmos): it is added, for our templates only.
* Pipelines have no such method, and it is the line users try: it is added to ``DiffusionPipeline`` and reaches transformer,
  transformer_2 and unet.
"""

from __future__ import annotations

import functools
from typing import Any

from foveal.plugins.accelerate import AccelerateError, accelerate
from foveal.plugins.diffusers_host import private

METHOD = "set_attn_processor"
MARK = "_foveal_original"


def install() -> None:
    """Teach diffusers our processors. May be called again."""
    mixin, pipeline = private.attention_mixin(), private.pipeline_class()
    original = getattr(mixin, METHOD)
    if not hasattr(original, MARK):
        setattr(mixin, METHOD, _on_model(original))
    for kind in (pipeline, *private.models_without_processors()):
        if not hasattr(kind, METHOD):
            setattr(kind, METHOD, _on_pipeline if kind is pipeline else _on_bare_model)


def uninstall() -> None:
    """Give diffusers its own methods back. Accelerated models stay accelerated."""
    mixin, pipeline = private.attention_mixin(), private.pipeline_class()
    setattr(mixin, METHOD, getattr(getattr(mixin, METHOD), MARK, getattr(mixin, METHOD)))
    for kind in (pipeline, *private.models_without_processors()):
        if kind.__dict__.get(METHOD) in (_on_pipeline, _on_bare_model):
            delattr(kind, METHOD)


def _on_model(original: Any) -> Any:
    @functools.wraps(original)
    def set_attn_processor(self: Any, processor: Any) -> None:
        if _is_template(processor):
            _apply(self, processor)
        else:
            _refuse_mixture(processor)
            original(self, processor)

    setattr(set_attn_processor, MARK, original)
    return set_attn_processor


def _on_bare_model(self: Any, processor: Any) -> None:
    """Set the attention processor of a model that has no such method of its own: foveal's processors only."""
    if not _is_template(processor):
        raise AccelerateError(
            f"{type(self).__name__} has no {METHOD} of its own and takes foveal's processors only; for another one, set "
            "the processor of its layers."
        )
    _apply(self, processor)


def _on_pipeline(self: Any, processor: Any) -> None:
    """Set the attention processor of every denoiser of this pipeline: transformer, transformer_2 and unet."""
    from foveal.plugins.diffusers_host.handle import parts

    if _is_template(processor):
        _apply(self, processor)
        return
    for component, model in parts(self):
        if not isinstance(model, private.attention_mixin()):
            raise AccelerateError(
                f"{component} ({type(model).__name__}) has no {METHOD}; set the processors of its layers."
            )
        getattr(model, METHOD)(dict(processor) if isinstance(processor, dict) else processor)


def _apply(target: Any, template: Any) -> None:
    accelerate(target, template.method, layers=template.layers, roles=template.roles)


def _is_template(processor: Any) -> bool:
    from foveal.plugins.diffusers_host.processors import AttnProcessor

    return isinstance(processor, AttnProcessor)


def _refuse_mixture(processor: Any) -> None:
    if isinstance(processor, dict) and any(_is_template(p) for p in processor.values()):
        raise AccelerateError(
            "a dict of processors holds a foveal template; give one processor and choose layers with its layers=."
        )
