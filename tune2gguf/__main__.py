"""`python -m tune2gguf COMMAND …`, if the program tune2gguf is not on the path."""

from tune2gguf.cli import main

if __name__ == "__main__":
    main()
