"""A BLT loaded in 4 or 8 bits, and LoRA on top of it: the entropy model stays whole, so patches stay what they were."""

from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from blt_hf import BltForCausalLM, BltForSequenceClassification, BltForTokenClassification, BltTokenizer
from blt_hf.model.layers_blt import BltHashEmbedding
from helpers.adapters import CAUSAL, check_patcher_untouched, ids
from helpers.models import make_model, tiny_config
from helpers.training import ARGUMENTS, CONVERSATIONS, assert_same_losses, make_trainer, step_losses


BITSANDBYTES = ("nf4", "int8")
QUANTO = ("quanto8", "quanto4")
# quanto compiles its code for 4 bits when that is first used, for a minute; the default run has its 8 bits.
KINDS = (*BITSANDBYTES, "torchao", "quanto8", pytest.param("quanto4", marks=pytest.mark.slow))
SAVED = (*BITSANDBYTES, "torchao")  # transformers does not write what quanto has quantized
LOSES = {"nf4": 0.3, "quanto4": 0.5}  # error of logits relative to their spread, at most; 8 bits: 0.05


def quantization(kind: str, skip: list[str] | None = None):
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=skip
        )
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    if kind in QUANTO:
        return QuantoConfig(weights=f"int{kind[-1]}", modules_to_not_convert=skip)
    return TorchAoConfig(Int8WeightOnlyConfig(version=2), modules_to_not_convert=skip)


def quantized_modules(model: nn.Module) -> list[str]:
    kinds = ("Linear4bit", "Linear8bitLt", "QLinear")
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in kinds
        or isinstance(module, nn.Linear)
        and type(module.weight.data).__module__.startswith("torchao")
    ]


def full_model():
    """Widths are multiples of 64, the block of 4-bit weights, but for those of the entropy model."""
    wide = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    config = tiny_config(
        encoder_config=wide,
        decoder_config={**wide, "hidden_size_global": 128},
        global_config={**wide, "hidden_size": 128},
    )
    return make_model(config)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    full_model().save_pretrained(folder)
    return folder


def load(folder, kind: str, skip: list[str] | None = None, auto_class=AutoModelForCausalLM):
    return auto_class.from_pretrained(folder, quantization_config=quantization(kind, skip), device_map="cpu")


def lora(**arguments) -> LoraConfig:
    return LoraConfig(**CAUSAL, target_modules="all-linear", **arguments)


@pytest.mark.parametrize("model_class", [BltForCausalLM, BltForSequenceClassification, BltForTokenClassification])
def test_every_projection_is_a_plain_linear(model_class):
    """Quantizers and adapters ask `type(module) is nn.Linear`, and pass over a subclass without a word."""
    config = tiny_config(encoder_config={"num_hidden_layers": 2, "cross_attn_all_layers": True})
    model = model_class(config)
    # Whatever holds a matrix is a plain Linear or an embedding.
    matrices = [module for module in model.modules() if getattr(getattr(module, "weight", None), "ndim", 0) == 2]
    kinds = {type(module) for module in matrices}
    assert kinds == {nn.Linear, nn.Embedding, BltHashEmbedding}
    assert not [
        module for module in model.modules() if isinstance(module, nn.Linear) and type(module) is not nn.Linear
    ]
    # ... and no weight that is multiplied with lies outside of them.
    inside = {id(weight) for module in matrices for weight in module.parameters(recurse=False)}
    assert not [name for name, weight in model.named_parameters() if weight.ndim > 1 and id(weight) not in inside]


@pytest.mark.parametrize("kind", KINDS)
def test_patches_are_those_of_the_whole_model(kind, model_folder):
    """Every linear layer is quantized but the head and the entropy model's."""
    reference = full_model()
    model = load(model_folder, kind).eval()
    names = {name for name, module in reference.named_modules() if isinstance(module, nn.Linear)}
    assert set(quantized_modules(model)) == {n for n in names if "patcher" not in n and n != "lm_head"}
    with torch.no_grad():
        expected, output = (m(ids(), output_patches=True) for m in (reference, model))
    assert torch.equal(output.entropies, expected.entropies)
    assert torch.equal(output.patch_lengths, expected.patch_lengths)
    error = (output.logits - expected.logits).std() / expected.logits.std()
    assert 0 < error < LOSES.get(kind, 0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_patcher_is_spared_whatever_else_is_named(kind, model_folder):
    model = load(model_folder, kind, skip=["lm_head", "model.local_decoder"])
    names = quantized_modules(model)
    assert names and not [name for name in names if "patcher" in name or "decoder" in name or "lm_head" in name]
    headless = load(model_folder, kind, auto_class=AutoModel)
    assert quantized_modules(headless) and not [n for n in quantized_modules(headless) if "patcher" in n]


@pytest.mark.parametrize("kind", KINDS)
def test_lora_trains_saves_and_generates(kind, model_folder, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(load(model_folder, kind), lora())
    trainer = make_trainer(model, tmp_path, max_steps=6)
    trainer.train()
    losses = step_losses(trainer)
    assert losses[-1] < losses[0] - 0.5
    check_patcher_untouched(model, full_model())

    model.eval()
    arguments = {"input_ids": ids(20), "max_new_tokens": 12, "do_sample": False}
    with torch.no_grad():
        cached, uncached = model.generate(**arguments), model.generate(**arguments, use_cache=False)
        assert torch.equal(cached, uncached)
        expected = model(input_ids=ids()).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(model_folder, kind), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids()).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_prepared_for_training(kind, model_folder, tmp_path):
    """PEFT's `prepare_model_for_kbit_training` turns checkpointing on; the losses are those without."""
    losses = []
    for prepare in (False, True):
        torch.manual_seed(0)
        model = load(model_folder, kind)
        if prepare:
            model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
        trainer = make_trainer(get_peft_model(model, lora()), tmp_path, max_steps=3, learning_rate=1e-3)
        trainer.train()
        losses.append(step_losses(trainer))
    assert_same_losses(losses[1], losses[0], 1e-3)


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_dora_on_quantized_weights(kind, model_folder):
    model = get_peft_model(load(model_folder, kind), lora(use_dora=True)).train()
    model(input_ids=ids(), labels=ids()).loss.backward()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert trained and all(weight.grad is not None for weight in trained)
    check_patcher_untouched(model, full_model())


@pytest.mark.parametrize("kind", SAVED)
def test_quantized_model_saves_and_loads(kind, model_folder, tmp_path):
    model = load(model_folder, kind).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu").eval()
    assert quantized_modules(loaded) == quantized_modules(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids()).logits, model(ids()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "torchao"])
def test_less_memory_still(kind, model_folder, tmp_path):
    """Weights in bf16, autocast and checkpointing, as on a GPU; the entropy model keeps the dtype that was asked for."""
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, quantization_config=quantization(kind), device_map="cpu", dtype=torch.bfloat16
    )
    assert {weight.dtype for weight in model.model.patcher.parameters()} == {torch.bfloat16}
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    trainer = make_trainer(get_peft_model(model, lora()), tmp_path, bf16=True, max_steps=4, **options)
    trainer.train()
    losses = step_losses(trainer)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("kind", ["nf4", "quanto8"])
def test_sft(kind, model_folder, tmp_path):
    trainer = trl.SFTTrainer(
        load(model_folder, kind),
        trl.SFTConfig(str(tmp_path), **ARGUMENTS, assistant_only_loss=True),
        train_dataset=Dataset.from_list(CONVERSATIONS),
        processing_class=BltTokenizer(),
        peft_config=lora(),
    )
    trainer.train()
    losses = step_losses(trainer)
    assert losses[-1] < losses[0] - 0.5
    check_patcher_untouched(trainer.model, full_model())
