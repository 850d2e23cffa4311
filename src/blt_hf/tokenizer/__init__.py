"""The tokenizer: texts to ids and back. Its files need no code on the Hub."""
