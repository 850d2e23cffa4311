"""Training: texts and patches for `Trainer`, thresholds, byteifying a token model, optimizers for hash tables."""
