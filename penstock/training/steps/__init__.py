"""One step: batches to the device, divided, forward, backward, updates."""
