"""The private parts of diffusers that the host relies on, and what is said when they change."""

import diffusers
import pytest
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models import attention_dispatch
from diffusers.models.transformers import transformer_wan
from tiny import wan_transformer

from foveal.plugins.accelerate import AccelerateError, accelerate
from foveal.plugins.diffusers_host import private


def test_installed_diffusers_keeps_the_contract():
    assert private.check_contract() == []


@pytest.mark.parametrize("item", private.CONTRACT, ids=lambda item: item.name)
def test_every_missing_name_is_named(monkeypatch, item):
    *path, last = item.name.split(".")
    monkeypatch.delattr(private.lookup(item.module, ".".join(path)) if path else _module(item.module), last)
    sentences = private.check_contract()
    assert any(f"{item.module}.{item.name}" in s and item.use in s for s in sentences)


def test_changed_signature_is_named(monkeypatch):
    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", lambda query, key, value: None)
    (sentence,) = private.check_contract()
    assert "dispatch_attention_fn" in sentence
    assert "no longer takes attn_mask" in sentence
    assert "parallel_config" in sentence


def test_missing_member_is_named(monkeypatch):
    monkeypatch.delattr(AttentionProcessorRegistry, "register")
    (sentence,) = private.check_contract()
    assert "AttentionProcessorRegistry" in sentence and "register" in sentence


def test_processor_without_backend_is_named(monkeypatch):
    monkeypatch.delattr(transformer_wan.WanAttnProcessor, "_attention_backend")
    (sentence,) = private.check_contract()
    assert "WanAttnProcessor" in sentence and "_attention_backend" in sentence


@pytest.mark.parametrize("version", ["0.41.0", "0.43.0", "0.43.0.dev0", "1.0", "main"])
def test_other_versions_are_refused_in_one_sentence(monkeypatch, version):
    monkeypatch.setattr(diffusers, "__version__", version)
    with pytest.raises(AccelerateError, match=f"diffusers {version} is installed, and foveal supports >=0.42,<0.43"):
        accelerate(wan_transformer(), "dense")


def test_patch_releases_are_accepted(monkeypatch):
    monkeypatch.setattr(diffusers, "__version__", "0.42.9")
    assert private.check_contract() == []


def _module(name):
    import importlib

    return importlib.import_module(name)
