"""The zero-shot test: features, codebooks, matching, metrics and the report; each module can be used from Python."""
