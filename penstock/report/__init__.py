"""What a run leaves behind and what it shows: the run folder, the live bar, the final table."""
