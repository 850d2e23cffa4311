"""Serving many requests at once."""
