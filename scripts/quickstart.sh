#!/usr/bin/env bash
# From a fresh clone to a fine-tuned model that answers: environment, base model, training, export, questions.
# Safe to run again: nothing is downloaded twice, and the run takes the next free name.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
python scripts/download.py --config examples/quickstart/lora.yaml
run=$(python scripts/name_run.py runs/quickstart)
tune run recipes/lora_finetune.py --config examples/quickstart/lora.yaml output_dir="$run"
python scripts/export.py "$run"
python scripts/show_quickstart.py "$run"
