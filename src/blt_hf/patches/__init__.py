"""Patches of a text as data, in a terminal, in a notebook, as a picture."""
