"""Show what a run changed: validation loss and llama.cpp's answers to validation questions, before and after."""

from tune2gguf.cli import run_command

if __name__ == "__main__":
    run_command("show_result")
