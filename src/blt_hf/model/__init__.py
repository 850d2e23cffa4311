"""The model: the files that travel to the Hub with a checkpoint. Flat, relative imports, torch and transformers alone."""
