"""What a run tells: events of registered kinds, in one stream that any number of sinks take in."""
