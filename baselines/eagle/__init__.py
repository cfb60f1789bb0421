"""EAGLE: a small head on the model's own features drafts trees (arXiv 2401.15077, 2406.16858)."""
