"""Small random models that behave like trained ones."""

import os
import random

import torch
from hypothesis import strategies as st
from transformers import GenerationConfig

from blt_hf import BltConfig, BltForCausalLM
from blt_hf.model.layers_blt import BltLexicon
from blt_hf.speculation import draft
from blt_hf.training.byteify import spell_lexicon
from helpers.texts import encode


# `make test-gpu`: where the tests' own tensors and random models lie
DEVICE = torch.device(os.environ.get("BLT_TEST_DEVICE", "cpu"))


def tiny_config(**overrides) -> BltConfig:
    """A BLT of a few thousand weights whose windows are shorter than the tests' texts."""
    values = {
        "patcher_config": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "sliding_window": 12,
        },
        "encoder_config": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "cross_attn_k": overrides.get("cross_attn_k", 2),
        },
        "decoder_config": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "hidden_size_global": 32,
            "cross_attn_k": overrides.get("cross_attn_k", 2),
        },
        "global_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
        },
        "encoder_hash_byte_group_vocab": 101,
        "local_attention_window_len": 10,
        "patching_threshold": 5.0,
    }
    for name, value in overrides.items():
        if isinstance(value, dict):
            values[name] = {**values.get(name, {}), **value}
        else:
            values[name] = value
    return BltConfig(**values)


def draft_logits(runner, ids: torch.Tensor) -> torch.Tensor:
    """Logits `(B, S, V)` of drafts of a `StepRunner` after each of given bytes."""

    def choose(logits, step):
        return ids[:, step + 1 : step + 2], logits

    choose.is_on_device = True
    return torch.cat([logits for _, logits in draft(runner, ids[:, :1], ids.shape[1], choose)], dim=1)


def make_model(config: BltConfig | None = None, model_class=BltForCausalLM, seed: int = 0):
    """A model in eval mode whose norms and entropies vary as those of a trained one."""
    torch.manual_seed(seed)
    model = model_class(config or tiny_config()).eval().to(DEVICE)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.25 * torch.randn_like(weight))
            if name.endswith("patcher.lm_head.weight"):
                weight.mul_(2.5)
    spell(model, seed)
    if getattr(model.config, "patching_mode", None) == "entropy":
        _calibrate(model)
    return model


@torch.no_grad()
def spell(model, seed: int = 0) -> None:
    """Writes random words of the letters of the tests' texts into a lexicon, and makes them matter."""
    generator = random.Random(seed)
    for module in model.modules():
        if not isinstance(module, BltLexicon):
            continue
        size, length = module.spellings.shape
        spellings = torch.full((size, length), -1)
        for entry in range(size):
            first, most = generator.choice(["", "", " ", " ", ",", "\n", "é"]), generator.randint(0, length)
            word = first + "".join(generator.choice("aabbcdehiknortuw 2é速") for _ in range(most))
            ids = encode(word, bos=False)[:length]
            spellings[entry, : len(ids)] = torch.tensor(ids)
        spell_lexicon(module, spellings)
        module.embedding.weight.mul_(4)
        module.keys.weight.mul_(3)
        if hasattr(module, "key_scales"):
            module.key_scales.weight.uniform_(-0.5, 0.5)


def _calibrate(model) -> None:
    """Thresholds in the widest gap near a quantile, so that patches hold a few bytes and no start hangs by a hair."""
    config, text = model.config, "some text, with 2 lines\nand words of many lengths; é速 ab\n" * 2
    with torch.no_grad():
        ids = torch.tensor([encode(text)], device=DEVICE)
        entropies = model(ids, output_patches=True).entropies[0]

    def threshold(scores: torch.Tensor, quantile: float) -> float:
        scores = scores.sort().values
        middle = int(len(scores) * quantile)
        near = scores[middle - 5 : middle + 5]
        index = int((near[1:] - near[:-1]).argmax())
        return float(near[index] + near[index + 1]) / 2

    rises = entropies[1:] - entropies[:-1]
    if config.monotonicity:
        config.patching_threshold = threshold(rises, 0.7)
    else:
        config.patching_threshold = threshold(entropies, 0.5 if config.patching_threshold_add is not None else 0.7)
    if config.patching_threshold_add is not None:
        config.patching_threshold_add = threshold(rises, 0.5)


# Configurations in which a rule or a layer differs.
RULES = {
    "entropy": {},
    "monotonicity": {"monotonicity": True},
    "threshold_add": {"patching_threshold_add": 0.0},
    "newline_reset": {"patching_newline_reset": True},
    "max_patch_length": {"max_patch_length": 3},
    "space": {"patching_mode": "space"},
    "space_max": {"patching_mode": "space", "max_patch_length": 2},
    "static": {"patching_mode": "static", "patch_size": 3},
    "byte": {"patching_mode": "byte"},
    "documents": {"mask_documents": True},
    "wide_cross": {
        "encoder_config": {"cross_attn_window": 2},
        "decoder_config": {"cross_attn_window": 3},
    },
    "all_layers": {
        "cross_attn_k": 4,
        "encoder_config": {"num_hidden_layers": 2, "cross_attn_all_layers": True, "num_key_value_heads": 1},
        "decoder_config": {"cross_attn_all_layers": False, "num_cross_attention_heads": 4},
        "global_config": {"num_key_value_heads": 2},
        "encoder_hash_byte_group_nb_functions": 2,
    },
    "full_windows": {"local_attention_window_len": None, "patcher_config": {"sliding_window": None}},
    "mean_pooling": {"encoder_config": {"patch_pooling": "mean"}},
    "lexicon": {
        "patching_mode": "space",
        "decoder_config": {"lexicon_size": 300, "lexicon_top_k": 16, "lexicon_length": 5, "lexicon_reads": True},
    },
}
rules = st.sampled_from(sorted(RULES))


_models: dict[str, torch.nn.Module] = {}


def model_for(rule: str) -> BltForCausalLM:
    """One model a name of `RULES`, made once; tests that change it make their own."""
    if rule not in _models:
        _models[rule] = make_model(tiny_config(**RULES[rule]), seed=1)
    return _models[rule]


def greedy(**settings) -> GenerationConfig:
    return GenerationConfig(**{"do_sample": False, "pad_token_id": 0, "eos_token_id": 2, **settings})


def step_logits(model, input_ids, cache, lengths=None):
    """fp32 logits `(B, S, V)` of a few more bytes of each row, by the modules as they are."""
    return model.make_runner(cache, packs=False, captures=False).step(input_ids, lengths)
