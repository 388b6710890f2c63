"""The config: read with its overrides, checked before anything slow is loaded, its components built.

Nothing here imports torch by itself; `run_spec` does, which is therefore imported by its own name.
"""

from tune2gguf.config.check import check_config, check_values
from tune2gguf.config.plan import check_plan
from tune2gguf.config.read import build_component, build_metric_logger, build_optimizer, load_config, read_config

__all__ = [
    "build_component",
    "build_metric_logger",
    "build_optimizer",
    "check_config",
    "check_plan",
    "check_values",
    "load_config",
    "read_config",
]
