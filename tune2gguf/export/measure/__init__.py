"""What an export costs: the validation loss of each step, layer by layer."""
