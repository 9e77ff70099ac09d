"""The page that shows the features of an SAE."""
