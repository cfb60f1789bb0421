"""Records of a run, and the metrics that read them; nothing here needs the generator model."""
