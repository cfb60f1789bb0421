"""Many runs: multiruns, tables with plots and published numbers, pairwise comparison, tuning, the HTML report."""
