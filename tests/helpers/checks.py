"""What tests compare with, and how closely."""

import os

import torch
from hypothesis import assume, currently_in_test_context, settings


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
