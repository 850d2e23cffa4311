"""Bits per byte, as a metric module of `evaluate`. Does not need `blt_hf`."""

import math

import datasets
import evaluate


_DESCRIPTION = """
Bits per byte: how many bits a language model needs on average for a byte of a text. It does not depend on how the model
cuts text into tokens, so byte models, patch models and token models can be compared.

    bits per byte = (sum of the cross-entropies in nats) / (ln 2 * number of bytes)
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of float): for each text, the cross-entropies of all its tokens (or bytes), summed, in nats.
    references (list of str or list of int): the texts, or how many bytes they have. A text counts as UTF-8.
Returns:
    bits_per_byte (float), num_bytes (int), nats (float).
Examples:
    >>> metric = evaluate.load("path/to/bits_per_byte")
    >>> metric.compute(predictions=[2.772588722239781], references=["é"])["bits_per_byte"]
    2.0
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class BitsPerByte(evaluate.Metric):
    """`evaluate.load("path/to/bits_per_byte")`."""

    def _info(self):
        value = datasets.Value
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=[
                datasets.Features({"predictions": value("float64"), "references": value("string")}),
                datasets.Features({"predictions": value("float64"), "references": value("int64")}),
            ],
        )

    def _compute(self, predictions, references):
        sizes = [len(text.encode("utf-8")) if isinstance(text, str) else text for text in references]
        num_bytes, nats = sum(sizes), math.fsum(predictions)
        if num_bytes <= 0:
            raise ValueError("`references` hold no byte.")
        if any(size < 0 for size in sizes) or any(value < 0 for value in predictions):
            raise ValueError("`predictions` (nats) and `references` (bytes) must not be negative.")
        return {"bits_per_byte": nats / (math.log(2) * num_bytes), "num_bytes": num_bytes, "nats": nats}
