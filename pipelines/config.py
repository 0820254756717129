"""A YAML file and `key=value` overrides -> a checked experiment, or one sentence that says what is wrong.

Notable choices
- Unknown keys are found by walking the file against the schema, so the message has the whole path and the nearest right key.
- No interpolation and no environment: what the file says is what runs.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from foveal.pipelines.errors import UserError
from foveal.pipelines.schema import DTYPES, Experiment, RunConfig, StudiesConfig, StudyConfig


class ConfigError(UserError):
    """A config that cannot be run, in one sentence with the path of the key."""


def load(source: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read a config file. `source` is a path, or the name of one that comes with foveal ("demo", "presets/flux-4096")."""
    path = find(source)
    try:
        data = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as err:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(err).split())}.") from err
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}; a config is a mapping of keys to values.")
    return build({str(key): value for key, value in data.items()}, overrides, str(source))


def build(data: dict[str, Any], overrides: Sequence[str] = (), source: str = "config") -> Experiment:
    """A checked experiment from plain data."""
    data = apply_overrides(data, overrides)
    schema = StudiesConfig if "studies" in data else RunConfig
    check_keys(data, schema, "")
    check_interpolation(data, "")
    merged = typed(data, schema)
    studies = tuple(merged.studies) if isinstance(merged, StudiesConfig) else (as_study(merged),)
    for i, study in enumerate(studies):
        check_study(study, f"studies[{i}]." if isinstance(merged, StudiesConfig) else "")
    names = [study.id for study in studies]
    if len(set(names)) != len(names) or not all(re.fullmatch(r"[A-Za-z0-9][\w.-]*", n) for n in names):
        raise ConfigError(f"study ids must be different plain names (letters, digits, '-', '_', '.'); got {names}.")
    if not studies:
        raise ConfigError("studies is empty; give at least one study.")
    resolved = plain(merged)
    single = isinstance(merged, RunConfig)
    return Experiment(studies, merged.output, single, resolved, source, tuple(overrides))


def find(source: str | Path) -> Path:
    """The file behind a path or the name of a shipped config."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    shipped = {p.stem: p for p in sorted(shipped_folder().glob("*.yaml"))}
    shipped |= {f"presets/{p.stem}": p for p in sorted((shipped_folder() / "presets").glob("*.yaml"))}
    if str(source).removesuffix(".yaml") in shipped:
        return shipped[str(source).removesuffix(".yaml")]
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give a YAML file.")
    near = difflib.get_close_matches(str(source).removesuffix(".yaml"), shipped, n=1)
    near = near or difflib.get_close_matches(path.stem, shipped, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    top = ", ".join(name for name in shipped if "/" not in name)
    raise ConfigError(
        f"no config file at {path}, and no shipped config has that name ({top}; `foveal methods --presets` lists presets/NAME).{hint}"
    )


def shipped_folder() -> Path:
    """Where the configs that come with foveal lie."""
    import foveal

    return Path(next(iter(foveal.__path__))) / "configs"


# ---- overrides
def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`a.b=value` and `list.0.a=value` on top of the file; values are YAML."""
    config = OmegaConf.create(data)
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"override {text!r} is not of the form key=value, for example sampler.steps=4.")
        try:
            OmegaConf.update(config, key.strip(), yaml.safe_load(value), merge=False)
        except yaml.YAMLError as err:
            raise ConfigError(f"override {text!r}: the value is not valid YAML.") from err
        except (OmegaConfBaseException, IndexError, ValueError, TypeError, AssertionError) as err:
            raise ConfigError(f"override {text!r}: there is no place {key.strip()!r} in this config.") from err
    return OmegaConf.to_container(config, resolve=False)  # type: ignore[return-value]


# ---- keys
def check_keys(value: Any, schema: type, path: str) -> None:
    """Raise for a key the schema does not have, or one it needs and the file lacks."""
    if not isinstance(value, dict):
        return
    fields = {f.name: f for f in dataclasses.fields(schema)}
    kinds = typing.get_type_hints(schema)
    for key, item in value.items():
        if key not in fields:
            raise ConfigError(f"unknown key {path + str(key)!r}{nearest(str(key), schema, path)}.")
        inner, is_list = nested(kinds[key])
        if inner and is_list and isinstance(item, list):
            for i, entry in enumerate(item):
                check_keys(entry, inner, f"{path}{key}[{i}].")
        elif inner and not is_list:
            check_keys(item, inner, f"{path}{key}.")
    for field in fields.values():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and value.get(field.name) is None:
            raise ConfigError(f"{path}{field.name} is missing; {required_hint(field.name)}.")


def required_hint(name: str) -> str:
    return {
        "model": "name a shipped model (world-nano, world-video), a diffusers folder, or owner/name",
        "methods": "list what to compare, for example [{name: grat, knobs: {group: [1, 16, 16]}}]",
        "prompts": "list at least one prompt",
        "name": "name a method, as `foveal methods` lists them",
    }.get(name, "this key has no default")


def nested(kind: Any) -> tuple[type | None, bool]:
    """(dataclass inside an annotation or None, whether it is a list of them)."""
    arguments = typing.get_args(kind)
    is_list = typing.get_origin(kind) is list
    for candidate in (kind, *arguments):
        if dataclasses.is_dataclass(candidate) and isinstance(candidate, type):
            return candidate, is_list
    return None, is_list


def nearest(key: str, schema: type, path: str) -> str:
    """'; did you mean ...?' from the keys beside it, then from the same word anywhere in the schema."""
    beside = [f.name for f in dataclasses.fields(schema)]
    elsewhere = list(dict.fromkeys([*all_paths(schema), *all_paths(RunConfig)]))
    near = [p for p in elsewhere if p.rsplit(".", 1)[-1] == key]
    near = near or [path + name for name in difflib.get_close_matches(key, beside, n=1, cutoff=0.6)]
    near = near or difflib.get_close_matches(key, elsewhere, n=1)
    return f" (did you mean {near[0]!r}?)" if near else f"; the keys here are {', '.join(beside)}"


def all_paths(schema: type, path: str = "") -> Iterator[str]:
    """Every dotted path of a schema."""
    kinds = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield path + field.name
        inner, is_list = nested(kinds[field.name])
        if inner:
            yield from all_paths(inner, f"{path}{field.name}{'[0]' if is_list else ''}.")


def check_interpolation(value: Any, path: str) -> None:
    """Raise for `${...}` anywhere: a config says what it means."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_interpolation(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            check_interpolation(item, f"{path}[{i}]")
    elif isinstance(value, str) and "${" in value:
        raise ConfigError(f"{path} is {value!r}; configs take plain values only, no ${{...}}.")


# ---- values
def typed(data: dict[str, Any], schema: type) -> Any:
    """The schema's dataclass filled from `data`; types are OmegaConf's, the message is ours."""
    base = OmegaConf.structured(schema)
    OmegaConf.set_readonly(base, False)
    try:
        return OmegaConf.to_object(OmegaConf.merge(base, OmegaConf.create(data)))
    except OmegaConfBaseException as err:
        path = getattr(err, "full_key", None) or "config"
        reason = str(err).splitlines()[0].rstrip(".")
        raise ConfigError(f"{path} has the wrong type: {reason}; {expected(schema, str(path))}.") from err


def expected(schema: type, path: str) -> str:
    """'it takes int' for a path like studies[0].sampler.steps."""
    kind: Any = schema
    for part in re.sub(r"\[\d+\]", "[]", path).replace("[]", ".[]").split("."):
        if part == "[]":
            kind = typing.get_args(kind)[0] if typing.get_args(kind) else kind
            continue
        inner, _ = nested(kind)
        hints = typing.get_type_hints(inner) if inner else {}
        if part not in hints:
            return "see the schema in the documentation"
        kind = hints[part]
    inner, _ = nested(kind)
    if inner:
        return f"it takes a mapping with the keys {', '.join(f.name for f in dataclasses.fields(inner))}"
    text = str(kind).replace("typing.", "").replace("Optional", "optional ") if typing.get_args(kind) else kind.__name__
    return f"it takes {text}"


def check_study(study: StudyConfig, path: str) -> None:
    """Raise for values that have the right type and still cannot be run."""
    rules = [
        ("methods", bool(study.methods), "list at least one method"),
        (
            "prompts",
            bool(study.prompts) and all(p.strip() for p in study.prompts),
            "give at least one prompt, none empty",
        ),
        (
            "seeds",
            bool(study.seeds) and len(set(study.seeds)) == len(study.seeds),
            "give different seeds, at least one",
        ),
        ("seeds", all(0 <= s < 2**63 for s in study.seeds), "seeds lie in 0 .. 2^63 - 1"),
        ("densities", all(0 < d <= 1 for d in study.densities), "densities are shares of all pairs, in (0, 1]"),
        ("sampler.steps", study.sampler.steps is None or study.sampler.steps >= 1, "at least 1 step"),
        ("sampler.guidance", study.sampler.guidance is None or study.sampler.guidance >= 0, "guidance is not negative"),
        ("dtype", study.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
        (
            "device",
            bool(re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", study.device)),
            "one of auto, cpu, cuda, cuda:N, mps",
        ),
        ("on_missing", study.on_missing in ("error", "skip"), "one of error, skip"),
        ("batch", study.batch >= 1, "at least 1"),
    ]
    rules += [
        (name, getattr(study, name) >= 0, "not negative")
        for name in ("rounds", "operator_rounds", "step_samples", "noise_floor_samples")
    ]
    rules += [
        (name, getattr(study, name) is None or getattr(study, name) >= 1, "at least 1")
        for name in ("frames", "height", "width")
    ]
    for name, fine, need in rules:
        if not fine:
            raise ConfigError(f"{path}{name} is {shown(study, name)}; needed: {need}.")


def shown(study: StudyConfig, name: str) -> str:
    value: Any = study
    for part in name.split("."):
        value = getattr(value, part)
    return repr(value)


def as_study(config: RunConfig) -> StudyConfig:
    """The study inside a one-study config."""
    return StudyConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(StudyConfig)})


def plain(config: Any) -> dict[str, Any]:
    """The resolved config as plain data, as `config.yaml` holds it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def fingerprint(resolved: dict[str, Any]) -> str:
    """Hash of everything that defines a run except where it is written."""
    content = {k: v for k, v in resolved.items() if k != "output"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def dump(resolved: dict[str, Any]) -> str:
    """The resolved config as YAML; `foveal run` takes it back."""
    return yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True, width=120)
