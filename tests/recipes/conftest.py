"""What holds for every recipe."""

import pytest


@pytest.fixture(autouse=True)
def packed_from_the_first_byte(monkeypatch):
    """Texts are short here. `generate` packs weights for longer ones, and the recipes are to ask that way too."""
    monkeypatch.setattr("blt_hf.model.generation_blt._LEAST_PACKED", 0)
