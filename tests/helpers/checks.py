"""What tests compare with, and how closely."""

import os

import torch
from hypothesis import assume, currently_in_test_context, settings
from transformers.generation import BaseStreamer


def cases(count: int):
    """For a property whose cases take long: so many in the default run, and as many as others have in a longer one."""
    return settings() if "BLT_PROPERTY_CASES" in os.environ else settings(max_examples=count)


MARGIN = 2e-5  # nats; entropies of the same text in another shape differ by a few 1e-6


def margin(config, entropies: torch.Tensor) -> float:
    """How far the nearest comparison of a rule is from a tie, in nats, for the entropies `(S,)` of a text."""
    rises = entropies[1:] - entropies[:-1]
    compared = [(rises if config.monotonicity else entropies) - config.patching_threshold]
    if config.patching_threshold_add is not None:
        compared.append(rises - config.patching_threshold_add)
    return min((float(values.abs().min()) for values in compared if len(values)), default=1.0)


@torch.no_grad()
def alone(model, row: list[int]) -> torch.Tensor:
    """Logits of a text by itself, in one piece. Where a tie would let the last bit decide on a patch, there is no one
    answer, so the property tests leave such a text out."""
    out = model(torch.tensor([row]), use_cache=False, output_patches=True)
    if out.entropies is not None and currently_in_test_context():
        assume(margin(model.config, out.entropies[0]) > MARGIN)
    return out.logits[0]


def assert_same(actual, expected, atol: float = 1e-4):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-4)


def assert_samples_follow_the_model(model, ids: torch.Tensor, num_samples: int, num_rows: int, **options) -> None:
    """Chi-square of the second and third new byte against the exact distribution, on six possible bytes.

    Args:
        ids: int64 `(1, S)`, the prompt.
        num_samples, num_rows: texts in all, and in each call of `generate`.
        options: of `generate`.
    """
    allowed = torch.arange(4, 10)
    with torch.no_grad():  # only these six are ever likely, and the global transformer matters
        model.lm_head.weight[10:] = 0
        model.lm_head.weight[:10] *= 2
        probabilities = torch.zeros(6, 6, 6)
        for first in range(6):
            for second in range(6):
                row = torch.cat([ids[0], allowed[[first, second]]])[None]
                logits = model(row, use_cache=False).logits[0, -3:, allowed].softmax(dim=-1)
                probabilities[first, second] = logits[0, first] * logits[1, second] * logits[2]
    torch.manual_seed(0)
    counts = torch.zeros(6, 6, 6)
    others = [i for i in range(260) if i not in allowed.tolist()]
    for _ in range(num_samples // num_rows):
        out = model.generate(
            ids, do_sample=True, top_k=0, max_new_tokens=4, eos_token_id=None, num_return_sequences=num_rows,
            suppress_tokens=others, **options,
        )  # fmt: skip
        for row in out[:, -4:-1] - 4:
            counts[tuple(row.tolist())] += 1
    for kept in (1, 2):  # the first byte comes from the prompt's pass
        axes = tuple(axis for axis in range(3) if axis != kept)
        expected, observed = probabilities.sum(dim=axes) * num_samples, counts.sum(dim=axes)
        assert float(((observed - expected) ** 2 / expected).sum()) < 20.5  # 5 degrees of freedom, p = 0.001


class Received(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids.append(value.tolist())

    def end(self):
        self.ended = True
