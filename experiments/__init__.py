"""The study: what the penalty does to features, on a language model and on synthetic data whose features are known."""
