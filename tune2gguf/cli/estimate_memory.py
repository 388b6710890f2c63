"""Estimate a run's memory, part by part: where it fits, and what would make it fit. No model is loaded."""

import argparse
from dataclasses import replace

from tune2gguf.commands import find_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, type=find_config, help="a YAML of configs/ or examples/")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="processes that train together; default 1")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for the recipe")
    arguments = parser.parse_intermixed_args()
    if arguments.devices < 1:
        parser.error(f"--devices must be at least 1, got {arguments.devices}")

    from tune2gguf.config import check_values, read_config

    config = read_config(arguments.config, arguments.overrides)
    check_values(config)

    from tune2gguf.config.run_spec import get_run_spec
    from tune2gguf.machine.devices import list_devices
    from tune2gguf.machine.fit import describe_estimate, describe_fit
    from tune2gguf.machine.memory import estimate_memory
    from tune2gguf.machine.passes import choose_passes
    from tune2gguf.model.lengths import count_lengths

    spec = get_run_spec(config, longest_row=config.max_seq_len, num_devices=arguments.devices, parallel=config.parallel)
    # A run counts the lengths of its own rows, which are not known here.
    spec = replace(spec, num_lengths=count_lengths(spec.tokens_per_pass))
    devices = "one device" if spec.num_devices == 1 else f"each of {spec.num_devices} devices"
    kept = "recomputed" if spec.enable_activation_checkpointing else "kept"
    print(f"rows of up to {spec.longest_row} tokens, on {devices} ({spec.device_type}),")
    print(f"with the least that a run may choose: {spec.tokens_per_pass} tokens per pass, activations {kept}:")
    print("\n".join(describe_estimate(estimate_memory(spec))))
    print("on this machine, with the layout that a run would choose:")
    for device in list_devices():
        chosen = choose_passes(
            replace(spec, device_type=device.kind),
            device.free,
            tokens_per_pass=config.tokens_per_pass,
            checkpointing=config.enable_activation_checkpointing,
            tokens_per_step=config.batch_size * config.gradient_accumulation_steps * spec.longest_row,
        )
        print(f"  {describe_fit(chosen, device)}")
