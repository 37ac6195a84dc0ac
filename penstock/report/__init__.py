"""What a run leaves behind and shows: the sinks of its events, and what reads them again."""
