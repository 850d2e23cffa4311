"""What a step costs, in operations and calls of functions: numbers that are the same on every machine."""

import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from helpers.models import make_model, tiny_config


sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # last: the `tokenize.py` there is not Python's own
from operations import count, count_draft


LAYERS = {"patcher_config": 4, "encoder_config": 1, "decoder_config": 4, "global_config": 8}  # of the mid shape


def costs(threshold: float, rows: int, width: int) -> list[float]:
    """Operations, those that are no views, and calls of functions: of a byte in `generate`, or of a step of several."""
    model = make_model(tiny_config(**{part: {"num_hidden_layers": layers} for part, layers in LAYERS.items()}))
    model.config.patching_threshold = threshold
    ids = torch.randint(4, 260, (rows, 40 + width), generator=torch.Generator().manual_seed(0))
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def write(number):
        model.generate(ids[:, :40], max_new_tokens=number, **settings)

    def verify(number):
        for _ in range(number):
            runner.step(ids[:, 40:])
            cache.crop_rows([width] * rows)

    if width == 1:
        run = write
    else:
        run = verify
        with torch.no_grad():
            cache = model(ids[:, :40], use_cache=True).past_key_values
            runner = model.make_runner(cache)
    run(20)  # what is made once
    less, more = (count(lambda n=number: run(n)) for number in (12, 20))
    return list(asdict((more - less) / 8).values())


# Thresholds by which no byte ends its patch, and by which each does. A byte of 4.5-byte patches costs the first and a
# fifth of the difference. Limits are what was reached with torch 2.13; other versions may take a tenth more.
# `benchmarks/operations.py` says the same of real shapes.
@pytest.mark.parametrize(
    ("threshold", "rows", "width", "limits"),
    [
        pytest.param(1e9, 1, 1, (295, 220, 645), id="a byte that ends no patch"),
        pytest.param(-1.0, 1, 1, (650, 440, 1250), id="a byte that ends its patch"),
        pytest.param(-1.0, 1, 8, (660, 455, 1280), id="a verification of 8 bytes"),
        pytest.param(1e9, 16, 1, (340, 235, 735), id="a byte of 16 rows that end no patch"),
        pytest.param(-1.0, 16, 1, (670, 465, 1310), id="a byte of 16 rows that end their patches"),
    ],
)
def test_a_step_costs_no_more(threshold, rows, width, limits):
    found = costs(threshold, rows, width)
    if Version(torch.__version__).release[:2] != (2, 13):
        limits = [1.1 * limit for limit in limits]
    assert all(cost <= limit for cost, limit in zip(found, limits)), found


def test_a_draft_costs_no_more():
    """What hangs on positions alone is made once for all drafts of a window, and the cache counts none of them."""
    model = make_model(tiny_config(**{part: {"num_hidden_layers": layers} for part, layers in LAYERS.items()}))
    ids = torch.randint(4, 260, (1, 40), generator=torch.Generator().manual_seed(0))
    found = list(asdict(count_draft(model, ids)).values())
    scale = 1.0 if Version(torch.__version__).release[:2] == (2, 13) else 1.1
    assert all(cost <= scale * limit for cost, limit in zip(found, (150, 117, 308))), found
