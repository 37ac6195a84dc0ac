"""Windows of event time over files: which files each has, found ahead of need and in order."""
