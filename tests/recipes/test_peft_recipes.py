"""Every method of PEFT, asked what it promises on a Llama: rows, caches, files, merging, and going away again."""

import copy
import functools

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION

from helpers.recipes import (
    BOTH,
    CAUSAL,
    TEXTS,
    assert_other,
    assert_same,
    encode,
    logits_of,
    make,
    on,
    tokenizer,
    write,
)


PEFT_IS_OLDER = Version(peft.__version__) < Version(MIN_PEFT_VERSION)  # than this transformers asks for
IDS = tokenizer(TEXTS[1], return_tensors="pt").input_ids
TARGETS = ["q_proj", "v_proj"]
# With what a method asks for on weights of 16 to 48 rows. One basis serves all targets of FRoD: they are of one shape.
METHODS = {
    "Lora": {},
    "Lora-dora": {"use_dora": True},
    "Lora-rslora": {"use_rslora": True, "r": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 5}},
    "Lora-all-linear": {"target_modules": "all-linear"},
    "Lora-parameters": {"target_modules": [], "target_parameters": ["q_proj.weight", "down_proj.weight"]},
    "Lora-tokens": {"trainable_token_indices": [101, 105]},
    "Lora-embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "Lora-saved-head": {"modules_to_save": ["lm_head"]},
    "AdaLora": {"total_step": 10},
    "Adamss": {},
    "Beft": {"target_modules": ["v_proj"]},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "Deft": {},
    "Delora": {},
    "FourierFT": {"n_frequency": 10},
    "Frod": {"target_modules": r"model\.(global_transformer\.)?layers\.\d+\.self_attn\.q_proj"},
    "Glora": {},
    "Gralora": {"r": 4, "gralora_k": 2, "alpha": 4},
    "Hira": {},
    "HRA": {},
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "Lily": {"r": 4, "stride_A": 1, "num_B": 2},
    "LNTuning": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    "LoHa": {},
    "LoKr": {},
    "Miss": {"r": 4},
    "OFT": {"oft_block_size": 4, "r": 0},
    "OSF": {"effective_rank": 4},
    "Peanut": {},
    "Psoft": {"r": 4},
    "Pvera": {"r": 4},
    "RandLora": {"r": 4},
    "Road": {"group_size": 4},
    "Shira": {"r": 2},
    "Supertuning": {},
    "TinyLora": {},
    "TrainableTokens": {"token_indices": [101, 105, 201], "target_modules": ["embed_tokens"]},
    "UniLora": {"theta_d_length": 64},
    "VBLoRA": {"vector_length": 4, "num_vectors": 8},
    "Vera": {"r": 4},
    "WaveFT": {"n_frequency": 10},
}
# Methods that have a recipe of their own, or are about models of another kind
NOT_ASKED = {
    "AdaptionPrompt": "has a recipe: PEFT knows it for Llamas alone",
    "Cartridge": "puts vectors before the text, as prefix tuning, which has a recipe",
    "CPT": "puts vectors before the text, as prompt tuning, which has a recipe",
    "MultitaskPromptTuning": "puts vectors before the text, as prompt tuning, which has a recipe",
    "Poly": "has a recipe: each row names its task",
    "PrefixTuning": "has a recipe",
    "PromptEncoder": "has a recipe",
    "PromptTuning": "has a recipe",
    "Shadow": "runs a small copy of one stack of decoder layers, in PEFT's own error for a BLT",
    "XLora": "mixes adapters by the columns of ids: tests/integrations/test_peft_positions.py",
}
# Lily chooses its weights by the mean of all positions, so that a Llama's rows and pieces of text differ as well.
NOT_BY_POSITION = {"Lily"}


def has(method: str) -> bool:
    return hasattr(peft, f"{method.partition('-')[0]}Config")


def config_of(method: str):
    arguments = {"task_type": "CAUSAL_LM", "target_modules": TARGETS, **METHODS[method]}
    if method == "TrainableTokens":
        del arguments["task_type"]
    if method == "Frod":
        arguments["progressbar"] = False
    return getattr(peft, f"{method.partition('-')[0]}Config")(**arguments)


def move(model, scale: float = 0.05):
    """Adapters off their start, where most of them do nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(scale * torch.randn_like(weight))
    return model.eval()


@functools.cache
def adapted(kind: str, method: str):
    """Shared by the recipes, none of which changes it."""
    torch.manual_seed(0)
    return move(get_peft_model(make(kind), config_of(method)))


def every_method(test=None, but=()):
    if test is None:
        return functools.partial(every_method, but=but)
    skip = pytest.mark.skip("not in this PEFT")
    methods = [pytest.param(m, marks=() if has(m) else skip) for m in METHODS if m not in but]
    return on(*BOTH, slow=("llama",))(pytest.mark.parametrize("method", methods)(test))


def test_every_method_of_peft_is_asked():
    """A new release's method belongs to one of the two tables."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    methods = {config.__name__.removesuffix("Config") for config in PEFT_TYPE_TO_CONFIG_MAPPING.values()}
    asked = {method.partition("-")[0] for method in METHODS}
    assert methods - asked - NOT_ASKED.keys() == set()
    assert not asked & NOT_ASKED.keys()


@on(*CAUSAL)
def test_each_row_names_its_task(kind):
    """Poly: `task_ids` beside the text, in a batch as alone."""
    torch.manual_seed(0)
    config = peft.PolyConfig(task_type="CAUSAL_LM", target_modules=TARGETS, r=4, n_tasks=2, n_skills=2, n_splits=2)
    model, batch = get_peft_model(make(kind), config), encode(*TEXTS[:2])
    move(model, 0.5)
    tasks = torch.tensor([1, 0])
    with torch.no_grad():
        together = model(**batch, task_ids=tasks, use_cache=False).logits
        for row, text in enumerate(TEXTS[:2]):
            one = tokenizer(text, return_tensors="pt")
            alone, other = (
                model(**one, task_ids=task, use_cache=False).logits[0]
                for task in (tasks[row, None], 1 - tasks[row, None])
            )
            assert_same(together[row][batch.attention_mask[row] == 1], alone)
            assert_other(alone, other)


@on(*CAUSAL)
def test_vectors_inside_of_attention(kind):
    """Adaption prompts are for models that PEFT knows; a BLT is none of them, and PEFT says so."""
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1)
    if kind == "llama":
        model = get_peft_model(make(kind), config)
        assert_same(logits_of(model.eval()), logits_of(make(kind)))  # its gate begins at zero
        assert_other(logits_of(move(model, 0.5)), logits_of(make(kind)), 1e-4)
    else:
        with pytest.raises(ValueError, match="adaption prompt"):
            get_peft_model(make(kind), config)


@every_method(but=NOT_BY_POSITION)
def test_an_adapted_row_in_a_batch_is_the_row_alone(kind, method):
    model, batch = adapted(kind, method), encode()
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    for row, text in enumerate(TEXTS[:2]):
        assert_same(logits[row][batch.attention_mask[row] == 1], logits_of(model, text)[0], 2e-4)


@every_method(but=NOT_BY_POSITION)
def test_an_adapted_model_reads_from_a_cache(kind, method):
    model = adapted(kind, method)
    with torch.no_grad():
        output = model(IDS[:, :20], use_cache=True)
        steps = [output.logits]
        for start in (20, 21, 22):
            output = model(IDS[:, start : start + 1], past_key_values=output.past_key_values, use_cache=True)
            steps.append(output.logits)
        output = model(IDS[:, 23:], past_key_values=output.past_key_values, use_cache=True)
    assert_same(torch.cat([*steps, output.logits], dim=1), logits_of(model), 2e-4)


@every_method(but=NOT_BY_POSITION)
def test_generated_text_knows_the_adapter(kind, method):
    model = adapted(kind, method)
    assert write(model, num_bytes=5) == write(model, num_bytes=5, use_cache=False)


@every_method
def test_without_its_adapter_a_model_is_the_base(kind, method):
    model, base = adapted(kind, method), logits_of(make(kind))
    assert_other(logits_of(model), base, 1e-4)
    with model.disable_adapter():
        if method == "OSF":  # its weights are the parts of a decomposition, with and without
            assert_same(logits_of(model), base, 1e-1)
        else:
            assert_same(logits_of(model), base)


@every_method
def test_a_saved_adapter_comes_back(kind, method, tmp_path):
    model = adapted(kind, method)
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    loaded = PeftModel.from_pretrained(make(kind), tmp_path).eval()
    assert_same(logits_of(loaded), logits_of(model))


@every_method(but={"Lily", "Beft"})  # neither can be merged into a Llama's weights
def test_a_merged_adapter_is_in_the_weights(kind, method):
    if method == "TrainableTokens" and Version(peft.__version__) < Version("0.21"):
        pytest.skip("PEFT 0.19 keeps trained tokens so that no model with them, nor a Llama, can be copied")
    model = adapted(kind, method)
    twin = copy.deepcopy(model)
    merged = twin.merge_and_unload()
    assert_same(logits_of(merged), logits_of(model), 1e-3)
    assert type(merged) is type(make(kind))
    assert not any("peft" in type(module).__module__ for module in merged.modules())


@on(*CAUSAL)
def test_an_unmerged_adapter_leaves_the_base(kind):
    model = move(get_peft_model(make(kind), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")))
    expected, written = logits_of(model), write(model)
    model.merge_adapter()
    assert_same(logits_of(model), expected, 1e-4)
    assert write(model) == written
    model.unmerge_adapter()
    assert_same(logits_of(model), expected, 1e-4)
    assert_same(logits_of(model.unload()), logits_of(make(kind)), 1e-4)


def three_adapters(kind: str, **settings):
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", "r": 4, **settings})
    model = get_peft_model(make(kind), config, adapter_name="a")
    move(model)
    torch.manual_seed(9)
    model.add_adapter("b", LoraConfig(**{**config.to_dict(), "r": 2}))
    model.set_adapter("b")
    move(model, 0.08)
    model.set_adapter("a")
    return model.eval()


@on(*CAUSAL)
def test_each_row_has_an_adapter_of_its_own(kind):
    model, batch = three_adapters(kind), encode()
    names = ["b", "__base__", "a"]
    with torch.no_grad():
        logits = model(**batch, adapter_names=names, use_cache=False).logits
    for row, name in enumerate(names):
        if name == "__base__":
            expected = logits_of(make(kind), TEXTS[row])
        else:
            model.set_adapter(name)
            expected = logits_of(model, TEXTS[row])
        assert_same(logits[row][batch.attention_mask[row] == 1], expected[0])


@on(*CAUSAL)
def test_rows_with_adapters_of_their_own_generate(kind):
    model, batch = three_adapters(kind), encode()
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    found = model.generate(**batch, adapter_names=["b", "__base__", "a"], **settings)[:, -6:].tolist()
    model.set_adapter("b")
    assert found[0] == write(model, TEXTS[0], 6, eos_token_id=None)
    assert found[1] == write(make(kind), TEXTS[1], 6, eos_token_id=None)
    model.set_adapter("a")
    assert found[2] == write(model, TEXTS[2], 6, eos_token_id=None)


@on(*CAUSAL)
def test_an_adapter_is_swapped_in_place(kind, tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    first, second = (get_peft_model(make(kind), config) for _ in range(2))
    move(first)
    move(second, 0.1)
    second.save_pretrained(tmp_path)
    assert_other(logits_of(first), logits_of(second))
    before = write(first)
    hotswap_adapter(first, tmp_path, adapter_name="default", torch_device="cpu")
    assert_same(logits_of(first), logits_of(second))
    assert write(first) == write(second) != before


@on(*CAUSAL)
def test_adapters_are_switched_between_calls(kind):
    """`set_adapter` back and forth: nothing of the one stays with the other, in generated text too."""
    model = three_adapters(kind)
    first, texts = logits_of(model), {"a": write(model)}
    model.set_adapter("b")
    second, texts["b"] = logits_of(model), write(model)
    assert_other(first, second)
    for name, expected in (("a", first), ("b", second), ("a", first)):
        model.set_adapter(name)
        assert torch.equal(logits_of(model), expected)
        assert write(model) == texts[name]


@on(*CAUSAL)
def test_a_weighted_adapter_is_the_sum(kind):
    """Of two adapters merged one after the other into the base weights."""
    model = three_adapters(kind, r=4)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both", combination_type="cat")
    model.set_adapter("both")
    found = logits_of(model)
    other = three_adapters(kind, r=4)
    other.base_model.set_adapter(["a", "b"])
    assert_same(found, logits_of(other), 1e-4)
    assert_other(found, logits_of(make(kind)))


@on(*CAUSAL)
def test_a_module_to_save_is_a_copy_that_trains(kind):
    config = LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    model = get_peft_model(make(kind), config)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.5).step()
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert any("lm_head.modules_to_save" in name for name in changed)
    assert not any("lm_head.original_module" in name for name in changed)
    with model.disable_adapter():
        assert_same(logits_of(model.eval()), logits_of(make(kind)))
    assert_other(logits_of(model), logits_of(make(kind)))


@on(*CAUSAL)
def test_dora_on_everything_starts_as_the_base_and_merges(kind):
    """Embeddings and head too."""
    config = LoraConfig(
        task_type="CAUSAL_LM", use_dora=True, target_modules=r"(?!.*patcher)?.*(_proj|embed_tokens|lm_head)"
    )
    model = get_peft_model(make(kind), config)
    assert_same(logits_of(model.eval()), logits_of(make(kind)), 1e-4)
    move(model)
    expected, written = logits_of(model), write(model)
    assert_other(expected, logits_of(make(kind)))
    merged = model.merge_and_unload()
    assert_same(logits_of(merged), expected, 1e-3)
    assert write(merged) == written


@on(*CAUSAL)
@pytest.mark.parametrize("init", ["gaussian", "olora", "pissa", "pissa_niter_4", "orthogonal", True])
def test_an_initialised_adapter_changes_nothing_yet(kind, init):
    """`init_lora_weights` splits weights into two parts whose sum is the weight, or starts at zero."""
    model = make(kind)
    expected = logits_of(model)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, init_lora_weights=init)
    assert_same(logits_of(get_peft_model(model, config).eval()), expected, 1e-3)


@on(*CAUSAL)
def test_eva_finds_the_directions_of_activations(kind):
    """Of those at the columns of text; a BLT, whose layers have other columns, says how to take all of them."""
    from peft import EvaConfig, initialize_lora_eva_weights

    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=TARGETS, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)
    )
    model = get_peft_model(make(kind), config)
    if kind == "llama":
        batches, kwargs = [{**encode(), "use_cache": False} for _ in range(3)], {}
    else:
        with pytest.raises(ValueError, match="prepare_layer_inputs_fn"):
            initialize_lora_eva_weights(model, [{**encode(), "use_cache": False}])
        batches = [{"input_ids": IDS, "use_cache": False} for _ in range(3)]
        kwargs = {"prepare_layer_inputs_fn": lambda states, inputs, name: states[0].flatten(0, -2)}
    initialize_lora_eva_weights(model, batches, **kwargs)
    found = [weight for name, weight in model.named_parameters() if "lora_A" in name]
    assert len(found) >= 4
    for weight in found:
        assert_same(weight @ weight.T, torch.eye(len(weight)), 1e-3)
    assert_same(logits_of(model.eval()), logits_of(make(kind)), 1e-4)


@on(*CAUSAL)
def test_an_activated_adapter_waits_for_its_invocation(kind):
    """aLoRA: before the bytes that call it, logits are those of the base; behind them they are not."""
    text = "before it <go> and behind it"
    ids = tokenizer(text, return_tensors="pt").input_ids
    invocation = tokenizer("<go>", add_special_tokens=False).input_ids
    start = len(tokenizer("before it ").input_ids)
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", r=4, alora_invocation_tokens=invocation
    )  # fmt: skip
    if kind != "llama":
        with pytest.raises(ValueError, match="alora_invocation_tokens"):
            get_peft_model(make(kind), config)
        return
    base = logits_of(make(kind), text)
    model = move(get_peft_model(make(kind), config), 0.2)
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False).logits
    assert_same(found[:, : start - 1], base[:, : start - 1])
    assert_other(found[:, start + len(invocation) :], base[:, start + len(invocation) :])


@on(*CAUSAL)
def test_a_trained_token_changes_nothing_else(kind):
    """`trainable_token_indices`: texts without those bytes have the base's logits."""
    byte = tokenizer("Q", add_special_tokens=False).input_ids[0]
    model = get_peft_model(make(kind), LoraConfig(task_type="CAUSAL_LM", trainable_token_indices=[byte]))
    for name, weight in model.named_parameters():
        weight.requires_grad_("trainable_tokens_delta" in name)
    move(model, 0.5)
    assert_same(logits_of(model, "no such letter"), logits_of(make(kind), "no such letter"))
    assert_other(logits_of(model, "a Q is one"), logits_of(make(kind), "a Q is one"))


@on(*BOTH)
@pytest.mark.parametrize("task", ["sequence", "token"])
def test_an_adapted_classifier_comes_back_with_its_head(kind, task, tmp_path):
    task_type = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS"}[task]
    model = move(get_peft_model(make(kind, task, num_labels=3), LoraConfig(task_type=task_type)))
    assert_other(logits_of(model), logits_of(make(kind, task, num_labels=3)))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(kind, task, num_labels=3, seed=0), tmp_path).eval()
    assert_same(logits_of(loaded), logits_of(model))


@pytest.mark.skipif(PEFT_IS_OLDER, reason="transformers 5.24 asks for PEFT 0.22, of any model, which came after it")
@on(*CAUSAL)
def test_transformers_own_adapter_methods(kind, tmp_path):
    """`model.add_adapter`, `disable_adapters`, `load_adapter`, without a PeftModel."""
    if kind == "patcher" and Version(peft.__version__) < Version("0.21"):
        pytest.skip("PEFT 0.19 loads an adapter so only into a model whose tensors are named `model.*`")
    model = make(kind)
    base = logits_of(model)
    model.add_adapter(LoraConfig(target_modules=TARGETS), adapter_name="own")
    move(model)
    expected = logits_of(model)
    assert_other(expected, base)
    model.disable_adapters()
    assert_same(logits_of(model), base)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    other = make(kind)
    other.load_adapter(str(tmp_path), adapter_name="again")
    assert_same(logits_of(other.eval()), expected)
    assert write(other) == write(model)


@on(*CAUSAL)
@pytest.mark.parametrize("method", ["PromptTuning", "PromptEncoder", "PrefixTuning"])
def test_vectors_before_the_text(kind, method):
    """A Llama reads on from them, and so does an entropy model. A BLT has no byte for them and says so."""
    config = getattr(peft, f"{method}Config")(task_type="CAUSAL_LM", num_virtual_tokens=3)
    if kind == "blt":
        with pytest.raises(ValueError, match="peft_type"):
            get_peft_model(make(kind), config)
        return
    model = move(get_peft_model(make(kind), config))
    if (kind, method) == ("patcher", "PrefixTuning"):  # which makes keys and values, in a cache of another kind
        with pytest.raises(ValueError, match="past_key_values"):
            logits_of(model)
        return
    with torch.no_grad():
        logits = model(input_ids=IDS).logits[:, -IDS.shape[1] :]
    assert_other(logits, logits_of(make(kind)))
    first = int(logits[0, -1].argmax())
    assert write(model, TEXTS[1], 5)[0] == first
    if PEFT_IS_OLDER:
        return  # transformers 5.24 calls `past_key_values` `cache`, and PEFT 0.21 looks for vectors to add by the old name
    if method != "PrefixTuning":  # PEFT makes the vectors into a cache
        assert write(model, num_bytes=5) == write(model, num_bytes=5, use_cache=False)


@on(*CAUSAL)
def test_layers_that_are_repeated(kind):
    """`layer_replication` makes one stack deeper, with shared weights. A BLT has three, so PEFT finds none to repeat."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, layer_replication=[[0, 2], [1, 2]])
    if kind == "blt":
        with pytest.raises(ValueError, match="layers"):
            get_peft_model(make(kind), config)
        return
    model = get_peft_model(make(kind), config)
    assert model.config.num_hidden_layers == 3
    assert_other(logits_of(model.eval()), logits_of(make(kind)))
    assert write(move(model), num_bytes=5) == write(model, num_bytes=5, use_cache=False)


@on(*CAUSAL)
def test_layers_that_are_chosen_by_their_numbers(kind):
    """`layers_to_transform`: only layers of that number are adapted, in each stack."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, layers_to_transform=[1])
    if kind == "patcher":  # PEFT wants a name before `layers`, which a base model has not
        with pytest.raises(ValueError, match="layers_to_transform"):
            get_peft_model(make(kind), config)
        return
    model = get_peft_model(make(kind), config)
    adapted = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted and all("layers.1." in name for name in adapted)
    assert write(move(model), num_bytes=5) == write(model, num_bytes=5, use_cache=False)


@on(*CAUSAL)
def test_a_stack_of_adapters_trains_the_named_one(kind):
    model = three_adapters(kind)
    model.set_adapter("b")
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    with_gradient = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert with_gradient and all(".b." in name for name in with_gradient)


@on(*CAUSAL)
def test_an_adapted_model_is_copied_and_pickled(kind):
    import pickle

    model = three_adapters(kind)
    expected = logits_of(model), write(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(twin), expected[0])
        assert write(twin) == expected[1]
        twin.set_adapter("b")
    assert torch.equal(logits_of(model), expected[0])


@on(*CAUSAL)
def test_gradient_checkpointing_trains_adapters_alike(kind):
    """With the hook that gives embeddings a gradient, as `Trainer` and TRL set it."""
    found = []
    for checkpointing in (False, True):
        model = three_adapters(kind)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append({name: w.grad for name, w in model.named_parameters() if w.grad is not None and "lora" in name})
    assert found[0].keys() == found[1].keys() and found[0]
    for name, gradient in found[0].items():
        assert_same(found[1][name], gradient)


@on(*CAUSAL)
def test_layer_norms_are_not_adapted_by_accident(kind):
    """`all-linear` adapts linear layers but the head, and nothing of an entropy model that only patches."""
    model = get_peft_model(make(kind), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    wrapped = {name for name, module in model.named_modules() if hasattr(module, "lora_A") and len(module.lora_A)}
    base = make(kind)
    expected = {
        name
        for name, module in base.named_modules()
        if type(module) is nn.Linear and name != "lm_head" and not (kind == "blt" and "patcher." in name)
    }
    assert {name.removeprefix("base_model.model.") for name in wrapped} == expected
