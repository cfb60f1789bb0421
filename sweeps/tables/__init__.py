"""Tables and plots of runs, also beside the numbers of papers."""
