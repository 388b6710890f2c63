"""The recipes, run by path: `tune run recipes/lora_finetune.py --config …`."""
