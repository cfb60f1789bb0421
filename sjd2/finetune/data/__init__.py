"""Training data of the fine-tunings: captions with images or tokens, rendered, generated or read."""
