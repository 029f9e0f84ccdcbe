"""What a run shows: progress, plots, the report."""
