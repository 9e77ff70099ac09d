"""Model cards, publishing on the Hub, and Spaces."""
