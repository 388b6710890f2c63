"""What a run will need in memory, whether this machine has it, and what to change where it has not."""

from tune2gguf.machine.devices import Device, get_device, list_devices, measure_peak
from tune2gguf.machine.fit import announce, describe_estimate, describe_fit, explain_out_of_memory, find_warning
from tune2gguf.machine.memory import Estimate, RunSpec, estimate_memory

__all__ = [
    "Device",
    "Estimate",
    "RunSpec",
    "announce",
    "describe_estimate",
    "describe_fit",
    "estimate_memory",
    "explain_out_of_memory",
    "find_warning",
    "get_device",
    "list_devices",
    "measure_peak",
]
