"""The pipeline's scheduler, followed: a run starts when it sets its timesteps.

* Its ``set_timesteps`` is wrapped on the object, so other pipelines that share the class see nothing.
* Pipelines copy schedulers (LTX-2 takes a copy for the sound): a copy gets its own plain method back, not a way to the original.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveal.plugins.diffusers_host.attach import Attachment

METHOD = "set_timesteps"


class SchedulerFollower:
    """Tells the attachments of a pipeline when a run starts and how many steps it has."""

    def __init__(self, pipe: Any, attachments: list[Attachment]) -> None:
        self.pipe, self.attachments = pipe, attachments
        self.scheduler: Any = None
        self._wrapper: _SetTimesteps | None = None
        self.current()

    def current(self) -> Any:
        """The scheduler that the pipeline holds now, followed from now on if it is a new one."""
        scheduler = getattr(self.pipe, "scheduler", None)
        if scheduler is not self.scheduler:
            self.remove()
            if hasattr(scheduler, METHOD):
                self.scheduler, self._wrapper = scheduler, _SetTimesteps(getattr(scheduler, METHOD), self.started)
                setattr(scheduler, METHOD, self._wrapper)
        return scheduler

    def started(self, wrapper: _SetTimesteps) -> None:
        if wrapper is not self._wrapper:  # of a scheduler that the pipeline no longer holds
            return
        for attachment in self.attachments:
            attachment.new_run()
            attachment.tracker.run_steps = len(self.scheduler.timesteps)

    def remove(self) -> None:
        if self.scheduler is not None and self.scheduler.__dict__.get(METHOD) is self._wrapper:
            delattr(self.scheduler, METHOD)
        self.scheduler = self._wrapper = None


class _SetTimesteps:
    """Stands for ``set_timesteps`` of one scheduler. Pipelines inspect its signature, which is the original's."""

    def __init__(self, original: Callable[..., Any], started: Callable[[_SetTimesteps], None]) -> None:
        functools.update_wrapper(self, original)
        self.original, self.started = original, started

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.original(*args, **kwargs)
        self.started(self)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)
