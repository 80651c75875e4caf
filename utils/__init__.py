"""What is neither data nor model: command lines, files, processes. Imports nothing of the other packages."""
