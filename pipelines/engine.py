"""From a checked experiment to a finished run folder: samples, measurements, result.json, report.html.

Notable choices
- The folder is claimed before anything is loaded; a folder of another config is left as it is.
- A study that cannot run says so and does not stop the others; the run then fails at its end, with everything else kept.
- Ctrl-C keeps whatever is finished and says which command goes on from there.
"""

from __future__ import annotations

import datetime
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from foveal.pipelines.config import dump, fingerprint
from foveal.pipelines.errors import Interrupted, UserError
from foveal.pipelines.host_info import host_info, package_version
from foveal.pipelines.probes import measure_noise_floor, measure_operator, measure_steps
from foveal.pipelines.progress import Quiet, Voice
from foveal.pipelines.result import SCHEMA, study_result, write_result
from foveal.pipelines.samples import open_folder
from foveal.pipelines.schema import Experiment, StudyConfig
from foveal.pipelines.study import check_study, generate, open_study


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: its folder, the document in result.json, the report, and studies that could not run."""

    folder: Path
    document: dict[str, Any]
    report: Path | None
    failures: dict[str, str] = field(default_factory=dict)


def execute(
    experiment: Experiment,
    *,
    verb: str = "run",
    voice: Voice | None = None,
    command: str | None = None,
    only: tuple[str, ...] = (),
) -> Outcome:
    """Run every study of an experiment (or those named in `only`) into its output folder, and build the report.

    verb: "run", "compare" (sweeps densities) or "demo"; command: what the user typed, for the record and for messages.
    Raises UserError before anything is generated, Interrupted on Ctrl-C.
    """
    listener: Voice = voice or Quiet()
    command = command or command_of(experiment, verb)
    folder = Path(experiment.output).expanduser()
    studies = [study for study in experiment.studies if not only or study.id in only]
    for study in studies:
        check_study(study, sweep=verb == "compare")
    open_folder(folder, dump(experiment.resolved), lambda text: difference(text, experiment.resolved))
    results, failures = [], {}
    try:
        for study in studies:
            try:
                results.append(run_study(study, folder, listener, sweep=verb == "compare", single=experiment.single))
            except UserError as err:
                if experiment.single:
                    raise
                listener.say(f"study {study.id!r} cannot run: {err}")
                failures[study.id] = str(err)
    except KeyboardInterrupt as err:
        raise Interrupted(kept(folder, command)) from err
    if not results:
        raise UserError(next(iter(failures.values())))
    document = assemble(results, failures, command)
    write_result(folder, document)
    return Outcome(folder, document, report_of(folder, listener), failures)


def run_study(config: StudyConfig, folder: Path, voice: Voice, *, sweep: bool, single: bool) -> dict[str, Any]:
    """One study into its folder -> its entry of result.json."""
    if config.title:
        voice.say(config.title)
    where = folder if single else folder / config.id
    study = open_study(config, where, voice, now(), sweep=sweep)
    measure_operator(study)
    generate(study)
    measure_steps(study)
    floors = measure_noise_floor(study)
    return study_result(study, floors, folder="" if single else config.id)


def assemble(results: list[dict[str, Any]], failures: dict[str, str], command: str) -> dict[str, Any]:
    """The whole of result.json."""
    return {
        "schema": SCHEMA, "foveal": package_version("foveal"), "command": command, "date": now(), "host": host_info(),
        "studies": results, "failed": [{"id": name, "reason": reason} for name, reason in failures.items()],
    }  # fmt: skip


def report_of(folder: Path, voice: Voice) -> Path | None:
    """Build report.html; a report that cannot be built does not undo the run."""
    try:
        from foveal.pipelines.report import build_report

        return build_report(folder)
    except (ImportError, ValueError, OSError) as err:
        voice.say(f"the report could not be built ({err}); the results are in {folder / 'result.json'}.")
        return None


# ---- folders and words
def difference(existing: str, resolved: dict[str, Any]) -> str | None:
    """How an existing config.yaml differs from this config, in words, or None."""
    try:
        old = yaml.safe_load(existing)
    except yaml.YAMLError:
        return "its config.yaml is not readable"
    if not isinstance(old, dict):
        return "its config.yaml is not a config"
    if fingerprint(old) == fingerprint(resolved):
        return None
    keys = sorted(k for k in {*old, *resolved} - {"output"} if old.get(k) != resolved.get(k))
    return f"they differ in {', '.join(keys)}"


def kept(folder: Path, command: str) -> str:
    """What an interrupted run says."""
    n = sum(1 for _ in folder.rglob("media/*/*.safetensors"))
    return f"interrupted; {n} finished sample{'s' if n != 1 else ''} are kept in {folder}; go on with: {command}"


def command_of(experiment: Experiment, verb: str) -> str:
    """The command line that repeats a run."""
    return shlex.join(["foveal", verb, *([] if verb == "demo" else [experiment.source]), *experiment.overrides])


def now() -> str:
    """The time in UTC, as result.json writes it."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
