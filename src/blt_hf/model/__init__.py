"""The model: what travels to the Hub with a checkpoint. Flat, relative imports, torch and transformers alone."""
