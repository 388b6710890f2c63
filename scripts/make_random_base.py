"""Write a base folder of a true Llama shape with random weights, to try memory and speed without a download."""

from tune2gguf.cli import run_command

if __name__ == "__main__":
    run_command("make_random_base")
