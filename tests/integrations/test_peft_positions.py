"""Methods of PEFT that count positions are refused with the argument that asks for it; others know their rows."""

import pytest
import torch
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

from blt_hf import BltForSequenceClassification, BltPatcher, BltPatcherConfig
from helpers.models import make_model, tiny_config
from helpers.texts import encode


peft = pytest.importorskip("peft")
from peft.tuners.lora.eva import get_eva_state_dict, initialize_lora_eva_weights  # noqa: E402


INVOCATION = encode("INV", bos=False)
IDS = torch.tensor([encode("a text of some bytes INV and more")])


def make_patcher():
    return make_model(BltPatcherConfig(**tiny_config().patcher_config.to_dict()), BltPatcher)


@pytest.mark.parametrize("make", [make_model, make_patcher, lambda: BltForSequenceClassification(tiny_config())])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_invocation_tokens_are_refused(make, targets):
    config = peft.LoraConfig(target_modules=targets, alora_invocation_tokens=INVOCATION)
    with pytest.raises(ValueError, match="`alora_invocation_tokens=.*leave it None"):
        peft.get_peft_model(make(), config)
    if Version(peft.__version__) >= Version(MIN_PEFT_VERSION):  # transformers 5.24 asks for a PEFT that came after it
        with pytest.raises(ValueError, match="`alora_invocation_tokens="):
            make().add_adapter(config)
    model = peft.get_peft_model(make(), peft.LoraConfig(target_modules=targets))
    with pytest.raises(ValueError, match="`alora_invocation_tokens="):
        model.add_adapter("other", config)


def test_saved_invocations_are_refused(tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"])
    peft.get_peft_model(make_model(), config).save_pretrained(tmp_path)
    config.alora_invocation_tokens = INVOCATION
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`alora_invocation_tokens="):
        peft.PeftModel.from_pretrained(make_model(), tmp_path)


def batches() -> list[dict]:
    return [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]


@pytest.mark.parametrize("make", [make_model, make_patcher])
def test_eva_needs_a_function_that_knows_the_positions(make):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights="eva")
    model = peft.get_peft_model(make(), config)
    for function in (initialize_lora_eva_weights, peft.initialize_lora_eva_weights, get_eva_state_dict):
        with pytest.raises(ValueError, match="`prepare_layer_inputs_fn`.*all positions"):
            function(model, batches())
    with pytest.raises(ValueError, match="`prepare_layer_inputs_fn`"):
        get_eva_state_dict(make(), batches(), peft_config=config)

    def all_positions(states, inputs, name):
        return states[0].flatten(0, -2)

    initialize_lora_eva_weights(model, batches(), prepare_layer_inputs_fn=all_positions, show_progress_bar=False)
    weights = [weight for name, weight in model.named_parameters() if "lora_A" in name]
    assert weights
    for weight in weights:  # principal directions of what a layer reads
        torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight)), atol=1e-3, rtol=0)


def test_mixtures_by_position_are_refused(tmp_path):
    model = make_model()
    peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters={"0": str(tmp_path)})
    with pytest.raises(ValueError, match="`peft_type='XLORA'`"):
        peft.get_peft_model(model, config)


def test_mixtures_by_row_know_their_rows():
    """Poly chooses for each row, which is a row in every layer; also of a step in which one row closes a patch."""
    torch.manual_seed(0)
    config = peft.PolyConfig(target_modules=["q_proj", "v_proj"], n_tasks=3, r=2, n_skills=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model(), config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "poly_" in name:
                weight.normal_()
    rows = [encode("a text of words"), encode("12, 34, 56, 789")]
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    together = model.generate(input_ids=torch.tensor(rows), task_ids=torch.tensor([0, 2]), **settings)
    for row, task, output in zip(rows, (0, 2), together):
        alone = model.generate(input_ids=torch.tensor([row]), task_ids=torch.tensor([task]), **settings)
        assert output.tolist() == alone[0].tolist()


def test_other_models_are_left_alone():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=300
    )
    adapter = peft.LoraConfig(
        r=2,
        target_modules="all-linear",
        alora_invocation_tokens=INVOCATION,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(LlamaForCausalLM(config), adapter).eval()
    start = IDS[0].tolist().index(INVOCATION[0])
    with torch.no_grad(), model.disable_adapter():
        base = model(IDS).logits
    with torch.no_grad():
        changed = (model(IDS).logits - base).abs().amax(-1)[0]
    assert changed[:start].max() == 0 and changed[start:].min() > 0
    model = peft.get_peft_model(
        LlamaForCausalLM(config), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="eva")
    )
    initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
