"""SJD-FC: the drafter with a front of candidates and a trained corrector."""
