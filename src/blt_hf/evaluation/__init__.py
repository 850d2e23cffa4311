"""Bits per byte: as an `evaluate` metric, in `Trainer`, and of a model on texts."""

from pathlib import Path

from .measuring import Measurement, measure_bits_per_byte
from .trainer import TrainerBitsPerByte


def load_bits_per_byte(**kwargs):
    """The metric module, as `evaluate.load` gives it; `kwargs` go there (`experiment_id`, ...)."""
    import evaluate

    return evaluate.load(str(Path(__file__).parent / "bits_per_byte"), **kwargs)


__all__ = ["Measurement", "TrainerBitsPerByte", "load_bits_per_byte", "measure_bits_per_byte"]
