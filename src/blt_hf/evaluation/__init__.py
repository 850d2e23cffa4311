"""Bits per byte: as an `evaluate` metric, in `Trainer`, and of a model on texts; model cards that tell them."""

from pathlib import Path

from .card import make_model_card, write_model_card
from .measuring import Measurement, measure_bits_per_byte
from .trainer import TrainerBitsPerByte


def load_bits_per_byte(**kwargs):
    """The metric module, as `evaluate.load` gives it; `kwargs` go there (`experiment_id`, ...)."""
    import evaluate

    return evaluate.load(str(Path(__file__).parent / "bits_per_byte"), **kwargs)


__all__ = [
    "Measurement",
    "TrainerBitsPerByte",
    "load_bits_per_byte",
    "make_model_card",
    "measure_bits_per_byte",
    "write_model_card",
]
