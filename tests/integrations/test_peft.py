"""PEFT on a BLT without a BLT-specific line: defaults, names, saving, merging, and never the entropy model."""

import subprocess
import sys

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from blt_hf import BltForSequenceClassification, BltPatcher
from helpers.adapters import CAUSAL, adapt, check_patcher_untouched, ids
from helpers.models import make_model, tiny_config
from helpers.training import make_trainer, step_losses


LORA = {
    "default": {},
    "all-linear": {"target_modules": "all-linear"},
    "list": {"target_modules": ["q_proj", "up_proj"]},
    "regex": {"target_modules": r".*\.layers\..*\.(q|k)_proj"},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "target_modules": ["o_proj"]},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [101, 105]},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "excluded": {"target_modules": "all-linear", "exclude_modules": r".*local_.*"},
}
METHODS = {
    "IA3": {},
    "AdaLora": {"total_step": 10},
    "LoHa": {},
    "LoKr": {},
    "LNTuning": {},
    "Vera": {},
    "OFT": {"oft_block_size": 4, "r": 0},
    "BOFT": {"boft_block_size": 4},
    "HRA": {},
    "Miss": {"r": 4},
    "Road": {"group_size": 4},
    "C3A": {"block_size": 4},
    "VBLoRA": {"vector_length": 4, "num_vectors": 8},
    "RandLora": {"r": 4},
    "FourierFT": {"n_frequency": 10},
    "TrainableTokens": {"token_indices": [101, 105]},
    "Glora": {},
    # One basis for all weights of a name, which must be of one shape.
    "Frod": {"target_modules": r".*global_transformer\.layers\..*\.(q|v)_proj", "progressbar": False},
}
PROMPT_METHODS = {
    "PromptTuning": {"num_virtual_tokens": 3},
    "PrefixTuning": {"num_virtual_tokens": 3, "token_dim": 16},
    "PromptEncoder": {"num_virtual_tokens": 3},
    "CPT": {"cpt_token_ids": [1, 2]},
}


@pytest.mark.parametrize("arguments", LORA.values(), ids=LORA)
def test_lora_spares_the_patcher(arguments):
    model = adapt(LoraConfig(**CAUSAL, **arguments))
    check_patcher_untouched(model)
    model.train()(input_ids=ids(), labels=ids()).loss.backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    for name, weight in trained.items():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name
    assert not any(module.training for name, module in model.named_modules() if "patcher" in name)


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_spare_the_patcher(method):
    if not hasattr(peft, f"{method}Config"):
        pytest.skip(f"this version of PEFT has no {method}")
    arguments = {} if method == "TrainableTokens" else CAUSAL
    model = adapt(getattr(peft, f"{method}Config")(**arguments, **METHODS[method]))
    check_patcher_untouched(model)
    model.train()(input_ids=ids(), labels=ids()).loss.backward()
    assert any(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("method", PROMPT_METHODS)
def test_prompt_methods_are_refused(method):
    config = getattr(peft, f"{method}Config")(**CAUSAL, **PROMPT_METHODS[method])
    with pytest.raises(ValueError, match="stand for no byte"):
        get_peft_model(make_model(tiny_config(patching_mode="static")), config)


def test_defaults_of_the_adapter():
    """Queries and values of every stack, both cross attentions included."""
    model = get_peft_model(make_model(), LoraConfig(**CAUSAL))
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    for stack in ("local_encoder", "global_transformer", "local_decoder"):
        assert any(f"{stack}.layers.0.self_attn.v_proj" in name for name in adapted), stack
    for stack in ("local_encoder", "local_decoder"):
        assert any(f"{stack}.cross_attn_layers.0.q_proj" in name for name in adapted), stack


def test_a_patcher_by_itself_is_adapted():
    """As the language model that it is."""
    patcher = BltPatcher(tiny_config().patcher_config)
    model = get_peft_model(patcher, LoraConfig(**CAUSAL))
    assert any("lora" in name and weight.requires_grad for name, weight in model.named_parameters())


def test_classifier_head_is_trained_and_saved(tmp_path):
    model = BltForSequenceClassification(tiny_config(num_labels=3))
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS"))
    assert any("score" in name and weight.requires_grad for name, weight in adapted.named_parameters())
    assert not any("patcher" in name and weight.requires_grad for name, weight in adapted.named_parameters())
    adapted(input_ids=ids(), labels=torch.tensor([1])).loss.backward()


@pytest.mark.parametrize(
    "config", [LoraConfig(**CAUSAL), LoraConfig(**CAUSAL, use_dora=True), peft.IA3Config(**CAUSAL)]
)
def test_save_load_merge_unload(config, tmp_path):
    base = make_model()
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        plain = base(ids()).logits
    model = adapt(config, base).eval()
    with torch.no_grad():
        expected = model(input_ids=ids()).logits
        assert (expected - plain).abs().max() > 1e-3
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=ids()).logits, plain)
    model.save_pretrained(tmp_path / "adapter")

    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    check_patcher_untouched(loaded)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids()).logits, expected)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(ids()).logits, expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids()).logits
        torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.unload()(ids()).logits, plain)


def test_transformers_own_interface():
    """`model.add_adapter`. transformers 5.24 asks for PEFT 0.22, of any model, which came after it."""
    model = make_model()
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        with pytest.raises(ValueError, match="version of PEFT"):
            model.add_adapter(LoraConfig(**CAUSAL, target_modules=["q_proj"]))
        return
    model.add_adapter(LoraConfig(**CAUSAL, target_modules=["q_proj"]), adapter_name="one")
    model.add_adapter(LoraConfig(**CAUSAL, target_modules="all-linear"), adapter_name="two")
    check_patcher_untouched(model)


def test_tied_tokens_spare_the_patcher():
    """PEFT walks once more over all modules, to tie what it adapts; the entropy model has a head of the same name."""
    config = peft.TrainableTokensConfig(token_indices=[101, 105])
    check_patcher_untouched(
        get_peft_model(make_model(tiny_config(tie_word_embeddings=True)), config),
        make_model(tiny_config(tie_word_embeddings=True)),
    )


def test_a_patcher_that_was_made_trainable_is_frozen_with_the_rest():
    model = make_model()
    model.requires_grad_(True)
    check_patcher_untouched(get_peft_model(model, LoraConfig(**CAUSAL)))
    assert model.model.patcher in set(model.modules()), "hidden for good"


def test_second_adapter():
    adapted = get_peft_model(make_model(), LoraConfig(**CAUSAL))
    adapted.add_adapter("two", LoraConfig(**CAUSAL, target_modules=["gate_proj"], modules_to_save=["embed_tokens"]))
    check_patcher_untouched(adapted)


HASHES = "encoder_hash_tok_embedding"
ON_HASHES = {
    "lora": LoraConfig(**CAUSAL, target_modules=[HASHES]),
    "dora": LoraConfig(**CAUSAL, target_modules=[HASHES, "q_proj"], use_dora=True),
    "oft": peft.OFTConfig(**CAUSAL, target_modules=[HASHES], oft_block_size=4, r=0),
    "parameters": LoraConfig(**CAUSAL, target_modules=[], target_parameters=[f"{HASHES}.weight"]),
    "whole": LoraConfig(**CAUSAL, modules_to_save=[HASHES]),
}


@pytest.mark.parametrize("config", ON_HASHES.values(), ids=ON_HASHES)
def test_adapters_of_the_hash_embedding(config, tmp_path):
    """An adapted table is looked up as a table is: for each byte the sum of a bag of rows, merged or not."""
    base = make_model()
    with torch.no_grad():
        plain = base(ids()).logits
    model = adapt(config, base)
    check_patcher_untouched(model)
    model(input_ids=ids(), labels=ids()).loss.backward()
    trained = [weight for name, weight in model.named_parameters() if HASHES in name and weight.requires_grad]
    assert trained and all(weight.grad.abs().sum() > 0 for weight in trained)
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=ids()).logits
        assert (expected - plain).abs().max() > 1e-3
        arguments = {"input_ids": ids(20), "max_new_tokens": 12, "do_sample": False}
        assert torch.equal(model.generate(**arguments), model.generate(**arguments, use_cache=False))
        loaded = PeftModel.from_pretrained(make_model(), tmp_path).eval()
        torch.testing.assert_close(loaded(input_ids=ids()).logits, expected)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(ids()).logits, expected, atol=1e-4, rtol=1e-4)


def test_adapters_of_single_hash_rows_are_refused():
    with pytest.raises(ValueError, match="`trainable_token_indices` names .*encoder_hash_tok_embedding.*accepted"):
        get_peft_model(make_model(), LoraConfig(**CAUSAL, trainable_token_indices={HASHES: [3]}))
    with pytest.raises(ValueError, match="`target_modules` names .*encoder_hash_tok_embedding.*accepted"):
        get_peft_model(make_model(), peft.TrainableTokensConfig(target_modules=[HASHES], token_indices=[3]))


@pytest.mark.parametrize("rule", [{}, {"patching_mode": "space"}, {"max_patch_length": 3}], ids=str)
def test_generation_is_exact(rule):
    """Cached equals uncached on adapters too, byte by byte."""
    model = adapt(LoraConfig(**CAUSAL, target_modules="all-linear"), make_model(tiny_config(**rule))).eval()
    arguments = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        cached = model.generate(input_ids=ids(20), **arguments)
        uncached = model.generate(input_ids=ids(20), use_cache=False, **arguments)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_training_with_checkpointing(use_reentrant, tmp_path):
    """`gradient_checkpointing` on a frozen base, whose embeddings then need `enable_input_require_grads`."""
    losses = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(make_model(), LoraConfig(**CAUSAL))
        trainer = make_trainer(
            model,
            tmp_path,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant} if checkpointing else None,
            max_steps=8,
        )
        trainer.train()
        losses.append(step_losses(trainer))
        check_patcher_untouched(model)
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), atol=1e-4, rtol=1e-4)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("order", ["import blt_hf, peft", "import peft, blt_hf"])
def test_order_of_imports_does_not_matter(order):
    """And importing the package does not import PEFT."""
    code = f"""
import sys
{order.split(",")[0]}
assert "blt" in "{order.split(",")[0]}" and "peft" not in sys.modules or "peft" in sys.modules
{order}
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("blt", encoder_hash_byte_group_vocab=11,
    patcher_config=dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8),
    encoder_config=dict(hidden_size=8, num_attention_heads=1, intermediate_size=8),
    decoder_config=dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                        hidden_size_global=16),
    global_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
model = peft.get_peft_model(AutoModelForCausalLM.from_config(config), peft.LoraConfig(task_type="CAUSAL_LM"))
names = [name for name, weight in model.named_parameters() if weight.requires_grad]
assert names and not any("patcher" in name for name in names), names
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
