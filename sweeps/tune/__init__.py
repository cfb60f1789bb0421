"""Searching a decoder's settings: the space, the study, trials and finals."""
