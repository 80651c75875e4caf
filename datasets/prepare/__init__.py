"""From raw downloads to a checked benchmark: lists, semantic masks, checks, summary pages, a miniature benchmark."""
