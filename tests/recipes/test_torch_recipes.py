"""What people do to any `nn.Module`: copy, pickle, compile, hook, replace, cast, differentiate."""

import copy
import io
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModel, AutoModelForCausalLM

from helpers.processes import run
from helpers.recipes import (
    BOTH,
    CAUSAL,
    TEXTS,
    assert_generates_as_it_reads,
    assert_other,
    assert_same,
    encode,
    logits_of,
    make,
    on,
    tokenizer,
    write,
)


IDS = tokenizer(TEXTS[1], return_tensors="pt").input_ids
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


def loss_of(model, ids=IDS):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients_of(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def same_thresholds(model, like):
    """The threshold lies in the configuration, and goes with the weights that it was found for."""
    if hasattr(like.config, "patching_threshold"):
        model.config.patching_threshold = like.config.patching_threshold
    return model


def linears(model) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in PROJECTIONS
    }


# Copies and files


@on(*CAUSAL)
def test_a_deep_copy_is_a_model_of_its_own(kind):
    model = make(kind)
    expected = logits_of(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.mul_(1.5)
    assert_other(logits_of(twin), expected)
    assert torch.equal(logits_of(model), expected)


@on(*CAUSAL)
def test_a_pickle_writes_what_the_model_wrote(kind):
    """After a first `generate`, so that what generating leaves behind is pickled too."""
    model = make(kind)
    expected = write(model), logits_of(model)
    twin = pickle.loads(pickle.dumps(model))
    assert write(twin) == expected[0]
    assert torch.equal(logits_of(twin), expected[1])


@on(*CAUSAL)
def test_a_used_model_pickles_to_the_same_bytes(kind):
    """Hashes of pickles (`datasets`, joblib) know a model again after it was used."""
    model = make(kind)
    logits_of(model)
    before = pickle.dumps(model)
    logits_of(model)
    write(model)
    assert pickle.dumps(model) == before


@on(*CAUSAL)
def test_torch_save_keeps_the_whole_model(kind):
    model, file = make(kind), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits_of(torch.load(file, weights_only=False)), logits_of(model))


@on(*CAUSAL)
def test_a_state_dict_is_assigned_to_a_model_on_meta(kind):
    model = make(kind)
    with torch.device("meta"):
        empty = type(model)(model.config)
    empty.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():  # what is not in the state is computed: rotary frequencies
        parent, _, last = name.rpartition(".")
        empty.get_submodule(parent)._buffers[last] = buffer
    assert torch.equal(logits_of(empty.eval()), logits_of(model))


@on(*CAUSAL)
def test_shards_are_put_together(kind, tmp_path):
    model = make(kind)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(model))


def test_another_process_gives_the_same_logits(tmp_path):
    """One process for the three of them, as starting one takes seconds."""
    program = (
        "import sys, torch, blt_hf; from transformers import AutoModelForCausalLM as M; torch.set_num_threads(1); "
        "folder, *kinds = sys.argv[1:]; ids = torch.load(folder + '/ids.pt'); "
        "out = {kind: M.from_pretrained(f'{folder}/{kind}')(ids, use_cache=False).logits.detach() for kind in kinds}; "
        "torch.save(out, folder + '/out.pt')"
    )
    models = {kind: make(kind) for kind in CAUSAL}
    for kind, model in models.items():
        model.save_pretrained(tmp_path / kind)
    torch.save(IDS, tmp_path / "ids.pt")
    run([sys.executable, "-c", program, tmp_path, *CAUSAL], check=True)
    for kind, logits in torch.load(tmp_path / "out.pt").items():
        assert_same(logits, logits_of(models[kind]))


@on(*BOTH)
def test_a_base_model_loads_from_the_whole_one(kind, tmp_path):
    model = make(kind)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        states = AutoModel.from_pretrained(tmp_path)(IDS).last_hidden_state
        assert_same(model.lm_head(states), logits_of(model))


# Threads, modes and types


@on(*CAUSAL)
def test_threads_share_a_model(kind):
    model = make(kind)
    expected = [write(model, text) for text in TEXTS]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda text: write(model, text), TEXTS * 2))
    assert found == expected * 2


@on(*CAUSAL)
def test_inference_mode_changes_nothing_and_leaves_nothing(kind):
    """A model that was used under `inference_mode` first trains afterwards as one that was not."""
    model, fresh = make(kind), make(kind)
    with torch.inference_mode():
        logits = model(IDS, use_cache=True).logits.clone()
        written = write(model)
    assert_same(logits, logits_of(fresh))
    assert written == write(fresh)
    found, expected = gradients_of(model), gradients_of(fresh)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@on(*CAUSAL)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "auto"])
def test_dtype_strings_load_what_they_say(kind, dtype, tmp_path):
    """The weights of the file in that type, and logits near those of fp32. (A BLT's entropy model stays in fp32.)"""
    model = make(kind)
    expected = logits_of(model)
    model.bfloat16().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    wanted = torch.float16 if dtype == "float16" else torch.bfloat16
    assert loaded.dtype == wanted
    others = {name: w.dtype for name, w in loaded.named_parameters() if w.dtype != wanted}
    assert all("patcher" in name for name in others)
    found = logits_of(loaded).float()
    # Where an entropy near the threshold falls on the other side, patches differ from there on.
    assert (found - expected).abs()[:, :4].max() < 0.2
    assert write(loaded, num_bytes=6) == write(loaded, num_bytes=6, use_cache=False)


@on(*CAUSAL)
def test_double_precision_is_nearer_to_itself(kind):
    """In fp64 the cached and the uncached pass agree to more digits than fp32 has."""
    model = make(kind).double()
    with torch.no_grad():
        first = model(IDS[:, :20], use_cache=True)
        rest = model(IDS[:, 20:], past_key_values=first.past_key_values, use_cache=True).logits
    assert_same(rest.double(), logits_of(model)[:, 20:].double(), 1e-6)


@on(*CAUSAL)
def test_autocast_is_near_and_goes_away(kind):
    model = make(kind)
    expected = logits_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = logits_of(model).float()
    assert_other(cast[:, :4], expected[:, :4], 1e-6)
    assert (cast - expected)[:, :4].abs().max() < 0.2
    assert torch.equal(logits_of(model), expected)


@on(*CAUSAL)
def test_the_default_dtype_is_that_of_new_models_alone(kind):
    model = make(kind)
    expected = logits_of(model)
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(logits_of(model).float(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@on(*CAUSAL)
def test_weights_that_change_between_two_calls_are_the_new_ones(kind):
    """In place, by loading, and by their data: what generating keeps of weights is not of the old ones."""
    model, other, third = (same_thresholds(make(kind, seed=seed), make(kind)) for seed in range(3))
    first = write(model)
    with torch.no_grad():
        for weight, new in zip(model.parameters(), other.parameters()):
            weight.copy_(new)
    second = write(model)
    assert second == write(other) != first
    model.load_state_dict(third.state_dict(), assign=True)
    assert write(model) == write(third) != second
    for weight, new in zip(model.parameters(), other.parameters()):
        weight.data = new.data
    assert write(model) == second


# Gradients


@on(*CAUSAL)
def test_functional_call_uses_the_weights_that_it_is_given(kind):
    model, other = make(kind), same_thresholds(make(kind, seed=1), make(kind))
    weights = dict(other.named_parameters())
    with torch.no_grad():
        found = torch.func.functional_call(model, weights, (), {"input_ids": IDS, "use_cache": False}).logits
    assert_other(found, logits_of(model))
    assert_same(found, logits_of(other))


@on(*CAUSAL)
def test_func_grad_is_backward(kind):
    model = make(kind)
    expected = gradients_of(model)
    weights = {name: weight.detach() for name, weight in model.named_parameters() if name in expected}

    def loss(weights):
        return torch.func.functional_call(
            model, weights, (), {"input_ids": IDS, "labels": IDS, "use_cache": False}
        ).loss

    found = torch.func.grad(loss)(weights)
    for name, gradient in expected.items():
        assert_same(found[name], gradient)


@on(*CAUSAL)
def test_forward_mode_agrees_with_backward(kind):
    """The derivative along a direction is the sum of gradients times that direction."""
    model = make(kind)
    model.set_attn_implementation("eager")
    gradients = gradients_of(model)
    torch.manual_seed(0)
    weights = {name: weight.detach() for name, weight in model.named_parameters() if name in gradients}
    direction = {name: torch.randn_like(weight) for name, weight in weights.items()}

    def loss(weights):
        return torch.func.functional_call(
            model, weights, (), {"input_ids": IDS, "labels": IDS, "use_cache": False}
        ).loss

    _, found = torch.func.jvp(loss, (weights,), (direction,))
    expected = sum((gradients[name] * direction[name]).sum() for name in gradients)
    assert_same(found, expected, 1e-3)
    assert expected.abs() > 1e-3


@on(*CAUSAL)
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    model = make(kind).train()
    expected = gradients_of(model)
    model.gradient_checkpointing_enable()
    found = gradients_of(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_same(found[name], gradient)


@on(*CAUSAL)
def test_gradients_add_up_over_a_split_batch(kind):
    """Half a batch twice, divided by the bytes of the whole, is the whole."""
    model, batch = make(kind), encode()
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    count = (labels[:, 1:] != -100).sum()
    model(**batch, labels=labels, use_cache=False).loss.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    for row in range(len(labels)):
        part = {name: values[row : row + 1] for name, values in batch.items()}
        model(**part, labels=labels[row : row + 1], num_items_in_batch=count, use_cache=False).loss.backward()
    for name, weight in model.named_parameters():
        if name in expected:
            assert_same(weight.grad, expected[name])


@on(*CAUSAL)
def test_no_byte_has_a_gradient_to_a_later_one(kind):
    """Attribution by gradients: what is written at a byte does not depend on embeddings behind it."""
    model = make(kind)
    kept = {}
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: kept.setdefault("states", output.requires_grad_().retain_grad() or output)
    )
    logits = model(IDS, use_cache=False).logits
    handle.remove()
    logits[0, 20].pow(2).sum().backward()
    gradient = kept["states"].grad[0].abs().sum(-1)
    assert gradient[21:].sum() == 0
    assert gradient[20] > 0


@on(*CAUSAL)
def test_full_backward_hooks_see_every_layer(kind):
    model, seen = make(kind), []
    layers = {n: m for n, m in model.named_modules() if n.rpartition(".")[2].isdigit() and "layers" in n}
    trained = {name for name, layer in layers.items() if any(w.requires_grad for w in layer.parameters())}
    for name in trained:
        layers[name].register_full_backward_hook(lambda module, inputs, outputs, name=name: seen.append(name))
    expected = gradients_of(make(kind))
    found = gradients_of(model)
    assert set(seen) == trained and trained
    for name, gradient in expected.items():
        assert_same(found[name], gradient)


# Compiling


@pytest.mark.slow
@on(*CAUSAL)
def test_a_compiled_graph_is_the_eager_forward(kind):
    """Captured by dynamo and run as it is (`aot_eager`), for two lengths, without a cache."""
    model = make(kind)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for text in TEXTS[:2]:
            inputs = tokenizer(text, return_tensors="pt")
            assert_same(compiled(**inputs, use_cache=False).logits, logits_of(model, text))


@pytest.mark.slow
@on(*CAUSAL)
def test_inductor_trains_as_eager_does(kind):
    model = make(kind).train()
    expected = gradients_of(model)
    model.zero_grad()
    compiled = torch.compile(model)
    compiled(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for name, weight in model.named_parameters():
        if name in expected:
            assert_same(weight.grad, expected[name], 1e-4)


@pytest.mark.slow
@on(*CAUSAL)
def test_a_compiled_forward_in_place_generates_the_same(kind):
    """`model.forward = torch.compile(model.forward)`, as the documentation of transformers writes it."""
    model = make(kind)
    expected = write(model)
    model.forward = torch.compile(model.forward)
    assert write(model) == expected


class Logits(nn.Module):
    """What people export: ids in, logits out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


@pytest.mark.slow
@on(*CAUSAL)
def test_one_row_is_exported_for_any_length(kind):
    """`torch.export` of a batch of one row, whose length is a dimension with bounds."""
    model = make(kind)
    shapes = {"ids": {1: torch.export.Dim("length", min=2, max=512)}}
    with torch.no_grad():
        program = torch.export.export(Logits(model), (IDS,), dynamic_shapes=shapes, strict=False).module()
        for text in TEXTS:
            assert_same(program(tokenizer(text, return_tensors="pt").input_ids), logits_of(model, text))


# Hooks and replaced forwards


@on(*CAUSAL)
def test_every_projection_is_called(kind):
    """A user's own `forward` on each projection counts calls in a forward and in each step of `generate`."""
    model, called = make(kind), set()
    for name, linear in linears(model).items():

        def forward(states, name=name, linear=linear):
            called.add(name)
            return nn.functional.linear(states, linear.weight, linear.bias)

        linear.forward = forward
    expected = make(kind)
    assert_same(logits_of(model), logits_of(expected))
    assert called == linears(model).keys()
    called.clear()
    assert write(model) == write(expected)
    assert called == linears(model).keys()


@on(*CAUSAL)
def test_a_replaced_forward_is_honoured_in_every_pass(kind):
    """One projection after the other made to give zero: whole texts, steps and drafts all see it."""
    model, zeroed, seen = make(kind), make(kind), []
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    before = logits_of(model, TEXTS[0])
    names = [name for name in linears(model) if ".1." not in name]  # of each stack the first layer
    for name in names:
        linear, weight = model.get_submodule(name), zeroed.get_submodule(name).weight
        kept = weight.detach().clone()
        linear.forward = lambda states, linear=linear: states.new_zeros(*states.shape[:-1], linear.out_features)
        nn.init.zeros_(weight)
        expected = logits_of(zeroed, TEXTS[0])
        assert_same(logits_of(model, TEXTS[0]), expected)
        with torch.no_grad():
            output = model(ids[:, :6], use_cache=True)
            steps = [output.logits]
            for column in range(6, 9):
                output = model(ids[:, column : column + 1], past_key_values=output.past_key_values, use_cache=True)
                steps.append(output.logits)
        assert_same(torch.cat(steps, dim=1), expected[:, :9])
        assert write(model, num_bytes=3) == write(zeroed, num_bytes=3), name
        del linear.forward
        weight.data = kept
        if not torch.allclose(before, expected, atol=1e-4):
            seen.append(name)
    assert len(seen) >= 0.8 * len(names)  # an entropy model's projections may move no patch


def scaled(output):
    """What a module gives, a fifth larger."""
    if isinstance(output, tuple):
        return (scaled(output[0]), *output[1:])
    return 1.2 * output if isinstance(output, torch.Tensor) and output.is_floating_point() else output


def hook(module):
    return module.register_forward_hook(lambda module, inputs, output: scaled(output)).remove


def replace(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: scaled(forward(*args, **kwargs))
    return lambda: vars(module).pop("forward")


@on(*CAUSAL)
@pytest.mark.parametrize("change", [hook, pytest.param(replace, marks=pytest.mark.slow)])
def test_what_is_done_to_any_module_is_in_every_pass(kind, change):
    """Norms, embeddings, attentions, MLPs, layers, stacks: whole texts, steps and generated text see it alike."""
    model, without_effect = make(kind), []
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    before = logits_of(model, TEXTS[0])
    leave_out = (nn.ModuleList, nn.Linear)  # every `Linear` has a recipe above
    names = [n for n, m in model.named_modules() if n and ".1" not in n and not isinstance(m, leave_out)]
    for name in names:
        undo = change(model.get_submodule(name))
        expected = logits_of(model, TEXTS[0])
        with torch.no_grad():
            output = model(ids[:, :6], use_cache=True)
            steps = [output.logits]
            for column in (6, 7):
                output = model(ids[:, column : column + 1], past_key_values=output.past_key_values, use_cache=True)
                steps.append(output.logits)
        assert_same(torch.cat(steps, dim=1), expected[:, :8], 1e-4)
        assert_generates_as_it_reads(model, num_bytes=3)
        undo()
        if torch.allclose(before, expected, atol=1e-4):
            without_effect.append(name)
    assert torch.equal(logits_of(model, TEXTS[0]), before)
    # An entropy model may move no patch, and what is normalised afterwards keeps no scale.
    assert len(without_effect) <= 0.5 * len(names), without_effect


@on(*CAUSAL)
@pytest.mark.parametrize("what", ["mlp", "input_layernorm", "self_attn", "q_proj"])
def test_a_class_whose_forward_is_replaced(kind, what, monkeypatch):
    """As kernels of other libraries are put in the place of those of a model: for all modules of the class."""
    model = make(kind)
    before = logits_of(model, TEXTS[0]), write(model, TEXTS[0], 6)
    module = next(m for n, m in model.named_modules() if n.rpartition(".")[2] == what and "patcher." not in n)
    forward = type(module).forward
    monkeypatch.setattr(type(module), "forward", lambda *args, **kwargs: scaled(forward(*args, **kwargs)))
    assert_other(logits_of(model, TEXTS[0]), before[0])
    assert_generates_as_it_reads(model)
    monkeypatch.undo()
    assert write(model, TEXTS[0], 6) == before[1]


@on(*CAUSAL)
@pytest.mark.parametrize("what", ["act_fn", "input_layernorm", "post_attention_layernorm", "mlp"])
def test_a_part_that_is_swapped_for_another(kind, what):
    """An activation, a norm or an MLP of one's own, without weights: generated text is that of whole passes."""
    model = make(kind)
    before = logits_of(model, TEXTS[0])
    write(model, TEXTS[0], 3)  # so that what the first call has packed is there
    swapped = [n for n, _ in model.named_modules() if n.rpartition(".")[2] == what and "patcher." not in n]
    for name in swapped:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Tanh())
    assert_other(logits_of(model, TEXTS[0]), before)
    assert_generates_as_it_reads(model)


@on(*CAUSAL)
def test_a_forward_hook_that_changes_a_layer_changes_generated_text(kind):
    """Steering: a vector is added to what a layer gives, in `generate` as in a forward."""
    model = make(kind)
    layers = [m for n, m in model.named_modules() if n.endswith("layers.1") and "patcher" not in n]
    expected = logits_of(model), write(model, num_bytes=16)
    torch.manual_seed(0)

    def steer(module, inputs, output):
        states = output[0] if isinstance(output, tuple) else output
        states = states + 2 * torch.arange(states.shape[-1]).cos()
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = layers[-1].register_forward_hook(steer)
    assert_other(logits_of(model), expected[0])
    steered = write(model, num_bytes=16)
    assert steered == write(model, num_bytes=16, use_cache=False) != expected[1]
    handle.remove()
    assert write(model, num_bytes=16) == expected[1]


@on(*CAUSAL)
def test_a_hook_of_the_model_sees_each_step_of_generate(kind):
    """Between the first byte and the last, as a progress bar or a probe of hidden states does."""
    model, columns = make(kind), []
    model.register_forward_hook(lambda module, inputs, output: columns.append(output.logits.shape[1]))
    written = write(model)
    assert len(columns) == len(written)


@on(*CAUSAL)
def test_a_parametrized_weight_is_used_in_every_pass(kind):
    """`torch.nn.utils.parametrize`: the weight is computed when it is asked for."""

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model, doubled = make(kind), make(kind)
    names = [name for name in linears(model) if "patcher" not in name and "mlp" in name]
    for name in names:
        parametrize.register_parametrization(model.get_submodule(name), "weight", Doubled())
        doubled.get_submodule(name).weight.data.mul_(2)
    assert_same(logits_of(model), logits_of(doubled))
    assert write(model) == write(doubled) != write(make(kind))


@on(*CAUSAL)
def test_a_projection_replaced_by_a_module_of_ones_own(kind):
    """As hand-written LoRA and quantizers do: a module with `forward` and no `weight`."""

    class Opaque(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.hidden = [linear]

        def forward(self, states):
            return self.hidden[0](states)

    model = make(kind)
    for name, linear in list(linears(model).items()):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Opaque(linear))
    assert_same(logits_of(model), logits_of(make(kind)))
    assert write(model) == write(make(kind))


@on(*CAUSAL)
def test_pruned_weights_are_those_that_run(kind):
    from torch.nn.utils import prune

    model, zeroed = make(kind), make(kind)
    for name, linear in linears(model).items():
        if "down_proj" in name and "patcher" not in name:
            prune.l1_unstructured(linear, "weight", amount=0.5)
            zeroed.get_submodule(name).weight.data.copy_(linear.weight)
    assert_same(logits_of(model), logits_of(zeroed))
    assert write(model) == write(zeroed)
    assert_other(logits_of(model), logits_of(make(kind)))


@on(*CAUSAL)
def test_dynamic_quantization_runs_cached_as_uncached(kind):
    model = torch.ao.quantization.quantize_dynamic(make(kind), {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for name, module in model.named_modules() if "patcher" not in name)
    ids = IDS[:, :12]
    with torch.no_grad():
        # A scale is taken of all rows that a product reads, so rows are near each other and not equal.
        whole = model(ids, use_cache=False).logits
    assert_other(whole, logits_of(make(kind))[:, :12], 1e-6)
    # Weights of 8 bits may move the end of a patch, and with it the bytes behind.
    assert (whole - logits_of(make(kind))[:, :12]).abs().median() < 0.2


# Inputs of other kinds


@on(*BOTH)
@pytest.mark.parametrize("with_patches", [False, True])
def test_byte_embeddings_in_the_place_of_ids(kind, with_patches):
    """A Llama takes the embeddings alone. A BLT reads hashes of ids beside them, and patches unless they are given: the
    same logits, or a `ValueError` by name; never others."""
    model = make(kind)
    embeds = model.get_input_embeddings()(IDS)
    if kind == "llama":
        assert_same(model(inputs_embeds=embeds).logits, logits_of(model))
        return
    given = {"patch_lengths": model(IDS, output_patches=True).patch_lengths} if with_patches else {}
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(inputs_embeds=embeds, **given)


@on(*BOTH)
def test_attribution_by_gradients_of_embeddings(kind):
    """What a byte's embedding does to a logit: by `inputs_embeds`, as by a hook on the embedding."""
    model, kept = make(kind), {}
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: kept.setdefault("states", output.requires_grad_().retain_grad() or output)
    )
    model(IDS, use_cache=False).logits[0, -1, 100].backward()
    handle.remove()
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    beside = {} if kind == "llama" else {"input_ids": IDS}
    logits = model(inputs_embeds=embeds, use_cache=False, **beside).logits
    assert_same(logits, logits_of(model))
    logits[0, -1, 100].backward()
    assert_same(embeds.grad, kept["states"].grad)
    assert embeds.grad.abs().sum() > 0


@on(*CAUSAL)
def test_a_mask_of_four_dimensions(kind):
    """A Llama takes one of its own; patches have none, so a BLT refuses it by name."""
    model = make(kind)
    mask = torch.ones(1, 1, IDS.shape[1], IDS.shape[1], dtype=torch.bool).tril()
    if kind == "llama":
        assert_same(model(IDS, attention_mask=mask).logits, logits_of(model))
    else:
        with pytest.raises(ValueError, match="attention_mask"):
            model(IDS, attention_mask=mask)
