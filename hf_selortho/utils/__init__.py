"""Small helpers without opinions: files, memory, plots, the Hub's answers."""
