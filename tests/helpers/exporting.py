"""Models, inputs and programs of the tests of export."""

import torch

from helpers.models import make_model, tiny_config
from helpers.texts import encode


ONE_LAYER = {
    part: {"num_hidden_layers": 1} for part in ("patcher_config", "encoder_config", "global_config", "decoder_config")
}


TEXT = "The quick brown fox, jumps over 13 lazy dogs!\nZażółć gęślą jaźń — naïve café über 速い狐. " * 2


def make_small(**overrides):
    for part, values in ONE_LAYER.items():
        overrides[part] = {**values, **overrides.get(part, {})}
    return make_model(tiny_config(**overrides))


def make_ids(rows: int, length: int) -> torch.Tensor:
    """Other text in each row."""
    stream = torch.tensor(encode(TEXT, bos=False))
    stream[26::40] = 2  # where a document may end
    return torch.stack([torch.cat([torch.tensor([1]), stream.roll(-7 * row)])[:length] for row in range(rows)])


def make_mask(rows: int, length: int) -> torch.Tensor:
    """Text at the left, at the right, and with a gap."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    for row in range(rows):
        padding = (length * (row + 1) // (rows + 2)) % length
        if padding:
            start = (0, length - padding, length // 3)[row % 3]
            mask[row, start : start + padding] = 0
    return mask


def make_positions(mask: torch.Tensor) -> torch.Tensor:
    """Texts of other lengths in each row."""
    periods = torch.arange(len(mask))[:, None] * 5 + 9
    return (mask.cumsum(dim=1) - 1).clamp_min(0) % periods


def given_lengths(model, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """What the model itself finds, as patches that a caller passes."""
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False, output_patches=True).patch_lengths


def make_inputs(model, rows: int, length: int, names) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": make_ids(rows, length)}
    if "attention_mask" in names:
        inputs["attention_mask"] = make_mask(rows, length)
    if "position_ids" in names:
        mask = inputs.get("attention_mask", torch.ones(rows, length, dtype=torch.int64))
        inputs["position_ids"] = make_positions(mask)
    if "patch_lengths" in names:
        inputs["patch_lengths"] = given_lengths(model, inputs["input_ids"], inputs.get("attention_mask"))
    return inputs


def dynamic_shapes(inputs) -> dict[str, dict]:
    batch, length, patches = (torch.export.Dim(name) for name in ("batch", "length", "patches"))
    return {name: {0: batch, 1: patches if name == "patch_lengths" else length} for name in inputs}


def export(model, *names, rows: int = 2, length: int = 45, **options):
    inputs = make_inputs(model, rows, length, names)
    shapes = {**dynamic_shapes(inputs), **dict.fromkeys(options)}
    with torch.no_grad():
        return torch.export.export(model, (), {**inputs, **options}, dynamic_shapes=shapes)
