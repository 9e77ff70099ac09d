"""What a published SAE needs around its weights: the model card and, built on it, publishing."""
