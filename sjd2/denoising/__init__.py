"""SJD2's noise: levels and path (schedule), normalised embeddings (embedding_space), the drafter (denoise), the decoder."""
