"""The zero-shot test: features, codebooks, matching, metrics and the report, each usable alone."""
