"""Text to tokens to language-model activations to shuffled batches; knows nothing of the SAE."""
