"""What every recipe shares: a tiny Llama, a BLT, an entropy model and classifiers that read the same ids.

The Llama has the vocabulary of a BLT, so one tokenizer serves all, and a recipe is the same lines for each of them.
What the Llama promises is then asked of the BLT.
"""

import gc

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedModel,
)

from blt_hf import BltForCausalLM, BltForSequenceClassification, BltForTokenClassification, BltPatcher, BltTokenizer
from helpers.models import make_model, tiny_config


CAUSAL = ("llama", "blt", "patcher")
BOTH = ("llama", "blt")
TEXTS = ("A recipe is asked of both.", "naïve café — 速い狐, and words of many lengths", "x = 3")
PATCHER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "sliding_window": 12,
}
_CLASSES = {
    "causal": (LlamaForCausalLM, BltForCausalLM),
    "sequence": (LlamaForSequenceClassification, BltForSequenceClassification),
    "token": (LlamaForTokenClassification, BltForTokenClassification),
}

tokenizer = BltTokenizer()

# `Trainer` and accelerate collect garbage at each turn. What has been imported by now, half a second of looking, is none.
gc.collect()
gc.freeze()


def on(*kinds: str, broken: dict[str, str] | None = None, slow: tuple[str, ...] = ()):
    """Runs a recipe on these kinds of model.

    Args:
        kinds: "llama" first, of which it is known to hold.
        broken: kinds for which it does not hold yet, and why.
        slow: kinds that the default run leaves out.
    """
    broken = broken or {}
    marks = {kind: [pytest.mark.xfail(strict=True, reason=broken[kind])] if kind in broken else [] for kind in kinds}
    for kind in slow:
        marks[kind].append(pytest.mark.slow)
    return pytest.mark.parametrize("kind", [pytest.param(kind, marks=marks[kind]) for kind in kinds])


def llama_config(**overrides) -> LlamaConfig:
    values = {
        "vocab_size": 260,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,  # far from a uniform guess, as a trained model is
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "classifier_dropout": 0.0,  # where nothing is said, a Llama's is 0.1 and a BLT's 0
    }
    return LlamaConfig(**{**values, **overrides})


def make(kind: str, task: str = "causal", seed: int = 0, **overrides) -> PreTrainedModel:
    """A random model in eval mode.

    Args:
        kind: "llama", "blt" or "patcher" (an entropy model, which is a causal LM only).
        task: "causal", "sequence" (classes of a row) or "token" (classes of a byte).
        seed: of the weights.
        **overrides: fields of the configuration.
    """
    llama_class, blt_class = _CLASSES[task]
    if kind == "llama":
        torch.manual_seed(seed)
        return llama_class(llama_config(**overrides)).eval()
    if kind == "patcher":
        model = make_model(tiny_config(patcher_config={**PATCHER, **overrides}).patcher_config, BltPatcher, seed)
        return model
    model = make_model(tiny_config(**overrides), seed=seed)
    if task == "causal":
        return model
    classifier = blt_class(model.config).eval()
    classifier.model.load_state_dict(model.model.state_dict())
    return classifier


def encode(*texts: str, **kwargs):
    """Ids and mask of these texts (None: three of many lengths), padded on the left unless `padding_side` says so."""
    return tokenizer(list(texts or TEXTS), padding=True, return_tensors="pt", **kwargs)


@torch.no_grad()
def logits_of(model, text: str = TEXTS[1], **kwargs) -> torch.Tensor:
    """Logits of one text alone, without a cache: what every other way of asking is compared with."""
    return model(**tokenizer(text, return_tensors="pt"), use_cache=False, **kwargs).logits


def write(model, text: str = TEXTS[0], num_bytes: int = 12, **kwargs) -> list[int]:
    """Greedy continuation of one text, as `generate` writes it."""
    inputs = tokenizer(text, return_tensors="pt")
    settings = {"do_sample": False, "max_new_tokens": num_bytes, **kwargs}
    return model.generate(**inputs, **settings)[0, inputs.input_ids.shape[1] :].tolist()


def assert_generates_as_it_reads(model, text: str = TEXTS[0], num_bytes: int = 4, tolerance: float = 1e-4) -> None:
    """The logits by which `generate` chooses each byte are those of one pass over the whole text, without a cache."""
    inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(
        **inputs, max_new_tokens=num_bytes, do_sample=False, eos_token_id=None, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    with torch.no_grad():
        whole = model(output.sequences, use_cache=False).logits[:, inputs.input_ids.shape[1] - 1 : -1]
    assert_same(torch.stack(output.logits, dim=1), whole, tolerance)


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Equal up to what another order of the same sums makes of fp32 numbers."""
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def assert_other(found: torch.Tensor, other: torch.Tensor, least: float = 1e-3) -> None:
    """Farther apart than rounding: what a recipe changes has had an effect, so that its check can fail."""
    assert (found - other).abs().max() > least
