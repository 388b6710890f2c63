"""Write a base folder with a Llama architecture and random weights, to test memory and speed without a download."""

from tune2gguf.cli import run_command

if __name__ == "__main__":
    run_command("make_random_base")
