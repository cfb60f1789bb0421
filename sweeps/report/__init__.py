"""One self-contained HTML page of a set of runs, and the race of their traces: `python run.py stage=report`."""
