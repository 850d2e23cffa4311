"""Adapters of PEFT on a BLT."""

import torch
from peft import get_peft_model

from helpers.models import make_model
from helpers.texts import encode


CAUSAL = {"task_type": "CAUSAL_LM"}


def ids(num_bytes: int = 30) -> torch.Tensor:
    text = "Small layers next to large ones: that is all there is to it."
    return torch.tensor([encode(text)[:num_bytes]])


def adapt(config, model=None):
    """The adapted model in training mode, its adapters moved off their start, where most of them do nothing."""
    torch.manual_seed(0)
    model = get_peft_model(make_model() if model is None else model, config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))
    return model


def check_patcher_untouched(model, reference=None):
    """No trained weight and no module of PEFT's in the entropy model; its weights are all there, as they were."""
    reference = make_model() if reference is None else reference
    expected = {n.split("patcher.")[1]: w for n, w in reference.named_parameters() if "patcher" in n}
    found = {n.split("patcher.")[1]: w for n, w in model.named_parameters() if "patcher" in n}
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert not weight.requires_grad and torch.equal(weight, expected[name]), name
    for name, module in model.named_modules():
        assert "patcher" not in name or not type(module).__module__.startswith("peft."), name
