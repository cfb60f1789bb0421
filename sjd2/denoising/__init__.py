"""SJD2's noise: levels and path (schedule), normalised embeddings (space), the drafter that denoises a window (drafter)."""
