"""How long a training step takes, and what the penalties add to it, measured side by side."""
