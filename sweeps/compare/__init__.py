"""Are two runs, or a group of runs, equal in distribution, quality and speed?"""
