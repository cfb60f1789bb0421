"""Speed of passes and of whole runs, as ratios within one run: python run.py stage=bench."""
