"""What a run shows: plain tables and a self-contained report.html. Pure functions of its results."""
