"""From raw downloads to a checked benchmark: lists, semantic masks, checks, a page to look at, the miniature."""
