"""From a run folder to files that serve: merge, quantize, GGUF, Modelfile."""
