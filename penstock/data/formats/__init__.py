"""Formats of files: columns, extents that read alone, and chunks of rows."""
