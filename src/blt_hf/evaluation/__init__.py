"""Bits per byte (as an `evaluate` metric, in `Trainer`, of a model on texts), FLOPs, memory and model cards."""

from pathlib import Path

from .card import make_model_card, write_model_card
from .measuring import Measurement, measure_bits_per_byte
from .trainer import TrainerBitsPerByte


def load_bits_per_byte(**kwargs):
    """Loads the metric with `evaluate.load`, which gets `kwargs` (`experiment_id`, ...)."""
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
