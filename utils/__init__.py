"""Command lines, files, processes, safe pickles. Imports none of the other packages."""
