"""Search a config: a run for each combination of values, ranked by validation loss; killed, it goes on where it was.

python scripts/sweep.py --config examples/quickstart/lora.yaml learning_rate=5e-4,1e-3,2e-3 lora_alpha=16,32 epochs=2
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    from tune2gguf.sweep import (
        SAMPLERS,
        Sweep,
        SweepStopped,
        add_guide_space,
        describe_best,
        parse_overrides,
        run_sweep,
    )

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), metavar="DIR", help="the sweep's folder")
    parser.add_argument("--guide", action="store_true", help="search the guide's rates, ratios, dropouts and decays")
    parser.add_argument("--sampler", choices=SAMPLERS, default="grid", help="grid: all combinations in order")
    parser.add_argument("--trials", type=int, metavar="N", help="at most so many; default: all combinations")
    parser.add_argument("--no-pruning", action="store_true", help="let every trial come to its end")
    parser.add_argument("overrides", nargs="*", metavar="key=value[,value…]", help="several values are searched")
    arguments = parser.parse_intermixed_args()
    try:
        fixed, space = parse_overrides(arguments.overrides)
        if arguments.guide:
            space = add_guide_space(arguments.config, fixed, space)
        sweep = Sweep(
            folder=arguments.out,
            config_path=arguments.config,
            fixed=fixed,
            space=space,
            sampler=arguments.sampler,
            num_trials=arguments.trials,
            is_pruning=not arguments.no_pruning,
        )
        print("\n".join(describe_best(run_sweep(sweep))))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except SweepStopped as stop:
        print("stopped; the trial at work has saved itself. The same command goes on from there", file=sys.stderr)
        sys.exit(128 + stop.signum)


if __name__ == "__main__":
    main()
