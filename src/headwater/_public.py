"""All public names. `headwater` takes them from here when one is asked for."""

from . import analysis
from .compose import AdapterPool
from .errors import HeadwaterError, Problem
from .methods import Heads, MethodConfig, NotMergeable, make_config, methods
from .tuner import AlignSpec, add_task, align, follow_loss, merge_task, merge_with_gates, observe, task_ids

# A method's config is public as soon as its file is there: headwater.RLoraConfig and so on.
_CONFIGS = {m.config.__name__: m.config for m in methods()}
globals().update(_CONFIGS)

__all__ = [
    "AdapterPool",
    "AlignSpec",
    "HeadwaterError",
    "Heads",
    "MethodConfig",
    "NotMergeable",
    "Problem",
    "add_task",
    "align",
    "analysis",
    "follow_loss",
    "make_config",
    "merge_task",
    "merge_with_gates",
    "methods",
    "observe",
    "task_ids",
    *_CONFIGS,
]
