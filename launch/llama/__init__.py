"""What the training scripts share: corpus, tokens, blocks, model, settings, metrics."""
