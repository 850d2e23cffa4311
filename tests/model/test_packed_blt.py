"""Steps on packed weights write what the modules write, whatever was done to the model before, and leave nothing."""

import copy
import gc
import io
import pickle
import threading
import weakref

import peft
import pytest
import torch
from safetensors import safe_open

from blt_hf import BltConfig, BltForCausalLM, speculation
from blt_hf.model import packed_blt, step_blt
from blt_hf.model.layers_blt import BltMLP, BltRMSNorm, BltSelfAttention
from blt_hf.model.packed_blt import PackedStacks
from blt_hf.model.step_blt import StepRunner
from helpers.checks import assert_same
from helpers.models import RULES, draft_logits, make_model, model_for, tiny_config
from helpers.texts import encode, pad, rows_of


IDS = torch.tensor([encode("some text, with 2 lines\nand words")])
SETTINGS = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
STACKS = ("patcher", "encoder", "decoder", "global_transformer")


def logits_of(model, ids=IDS, **more) -> torch.Tensor:
    output = model.generate(ids, output_logits=True, return_dict_in_generate=True, **{**SETTINGS, **more})
    return torch.stack(output.logits)


def by_modules(model) -> BltForCausalLM:
    """A copy whose modules run: a hook that does nothing might do something."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: None)
    return model


def packed_stacks(model) -> list[str]:
    """Stacks that a call of `generate` would pack."""
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        packed = PackedStacks(model.model, cache)
    return [name for name in STACKS if getattr(packed, name) is not None]


@torch.no_grad()
@pytest.mark.parametrize("rule", sorted(RULES))
def test_packed_steps_equal_the_modules(rule):
    """One byte of each row, several, rows that get different numbers, drafts."""
    model = model_for(rule)
    ids, mask = pad([row[: 60 - 9 * i] for i, row in enumerate(rows_of(rule, 60))], "left")
    caches = [model(ids[:, :20], attention_mask=mask[:, :20], use_cache=True).past_key_values for _ in range(2)]
    packed = PackedStacks(model.model, caches[0])
    assert packed.decoder is not None and packed.global_transformer is not None
    runners = [StepRunner(model.model, cache, model.lm_head, p) for cache, p in zip(caches, (packed, None))]
    start = 20
    for width, lengths in ((1, None), (1, None), (5, None), (4, [4, 1, 3]), (1, [1, 0, 1]), (7, None)) * 2:
        step = [runner.step(ids[:, start : start + width], lengths) for runner in runners]
        counts = [width] * 3 if lengths is None else lengths
        for row, count in enumerate(counts):
            assert_same(step[0][row, :count], step[1][row, :count])
        assert_same(*(draft_logits(runner, ids[:, start : start + 2]) for runner in runners))
        start += width
    assert caches[0].num_patches.equal(caches[1].num_patches)


@torch.no_grad()
@pytest.mark.parametrize("rule", sorted(RULES))
def test_bytes_that_read_the_same_patch(rule):
    """Drafts, and the bytes of `generate`, multiply weights by the latents once a patch."""
    model = model_for(rule)
    ids = torch.tensor([rows_of(rule, 60)[0]])
    caches = [model(ids[:, :20], use_cache=True).past_key_values for _ in range(2)]
    packed = PackedStacks(model.model, caches[0])
    runners = [StepRunner(model.model, cache, model.lm_head, p) for cache, p in zip(caches, (packed, None))]
    held = []

    def draft(logits, step):
        held.append(bool(packed.decoder.held_patch.pairs))
        return logits.argmax(dim=-1), logits

    for start in range(20, 50, 3):
        drafts, expected = (speculation.draft(runner, ids[:, start : start + 1], 4, draft) for runner in runners)
        for (found, logits), (of_modules, logits_of_modules) in zip(drafts, expected):
            assert found.equal(of_modules)
            assert_same(logits, logits_of_modules)
        assert_same(*(runner.step(ids[:, start : start + 1]) for runner in runners))
        assert_same(*(runner.step(ids[:, start + 1 : start + 3]) for runner in runners))

    class Given:
        """Chooses the bytes of the text."""

        is_on_device, position = False, 50

        def prepare(self):
            self.position += 1

        def __call__(self, logits):
            return ids[:, self.position, None], logits

    for runner in runners:
        runner.start(ids[:, 50:51])
    choices = [Given(), Given()]
    for _ in range(9):
        (values, logits, _), (expected, logits_of_modules, _) = (r.next(c) for r, c in zip(runners, choices))
        assert values == expected
        assert_same(logits, logits_of_modules)
        held.append(bool(packed.decoder.held_patch.pairs))
    # Without a window of one patch, some patches do not exist, and each byte says which.
    assert any(held) == (
        packed.decoder.held_patch is not None and (model.config.decoder_config.cross_attn_window or 1) == 1
    )


@torch.no_grad()
def test_results_are_not_in_the_memory_that_layers_share():
    """Memory for products is made once for each shape, and what a step returns is not overwritten by the next."""
    model = model_for("space")
    cache = model(IDS[:, :10], use_cache=True).past_key_values
    packed = PackedStacks(model.model, cache)
    for head in (model.lm_head, None):  # logits, states
        runner, results, stop = StepRunner(model.model, cache, head, packed), [], 10
        for number, width in enumerate((1, 3, 1, 3)):
            with torch.inference_mode(number < 2):
                results.append(runner.step(IDS[:, stop : stop + width]))
            results.append(results[-1].clone())
            stop += width
        cache.crop_rows([stop - 10])
        assert all(result.equal(as_it_was) for result, as_it_was in zip(results[::2], results[1::2]))
    assert sorted(shape[:2] for shape in packed.decoder._memory) == [(1, 1), (1, 3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype):
    model = make_model(tiny_config(patching_mode="space", patch_in_forward=False)).to(dtype)
    assert packed_stacks(model) == ["encoder", "decoder", "global_transformer"]
    tolerance = {"atol": 1e-4 if dtype == torch.float64 else 0.1, "rtol": 0.05}
    torch.testing.assert_close(logits_of(model)[0], logits_of(by_modules(model))[0], **tolerance)


def test_an_entropy_model_in_another_precision_and_an_equal_window():
    """Stacks of equal windows share a mask, each in its own precision."""
    model = make_model(tiny_config(local_attention_window_len=12))
    model = model.to(torch.bfloat16)
    model.model.patcher.float()
    assert packed_stacks(model) == list(STACKS)
    torch.testing.assert_close(logits_of(model)[0], logits_of(by_modules(model))[0], atol=0.1, rtol=0.05)


def _optimizer_step(model):
    model.train()
    model(IDS, labels=IDS).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    model.eval()


def _load(model, assign: bool):
    state = {name: tensor * 1.3 for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)


def _data_in_place(model):
    for layer in (model.model.local_decoder.layers[0], model.model.patcher.layers[0]):
        layer.self_attn.q_proj.weight.data.mul_(-1.5)
        layer.input_layernorm.weight.data.add_(0.5)


def _data_assigned(model):
    for layer in (model.model.local_encoder.layers[0], model.model.global_transformer.layers[0]):
        layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data * -1.5


def _other_parameter(model):
    attention = model.model.local_decoder.layers[1].self_attn
    attention.k_proj, attention.q_proj = attention.q_proj, attention.k_proj
    cross = model.model.local_decoder.cross_attn_layers[0]
    cross.v_proj.weight = torch.nn.Parameter(-cross.v_proj.weight.detach())


def _tied_layers(model):
    model.model.local_decoder.layers[1] = model.model.local_decoder.layers[0]


CHANGES = [
    _optimizer_step,
    lambda model: _load(model, False),
    lambda model: _load(model, True),
    _data_in_place,
    _data_assigned,
    _other_parameter,
    _tied_layers,
    lambda model: model.to(torch.float64),
]


@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
def test_changed_weights_are_seen_by_the_next_call(change):
    model = make_model(seed=2)
    before = logits_of(model)
    change(model)
    after = logits_of(model)
    assert packed_stacks(model) == list(STACKS)
    is_changed = not torch.allclose(after[0].float(), before[0], atol=1e-3)
    assert is_changed or next(model.parameters()).dtype == torch.float64
    assert_same(after[0], logits_of(by_modules(model))[0])


def test_adapters_merged_and_unmerged():
    model = make_model(seed=2)
    plain = logits_of(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False)).eval()
    assert packed_stacks(model) == ["patcher"], "layers with adapters run as they are"
    with_adapter = logits_of(adapted)
    assert not torch.allclose(with_adapter[0], plain[0], atol=1e-3)
    adapted.merge_adapter()
    assert_same(logits_of(adapted)[0], with_adapter[0])
    adapted.unmerge_adapter()
    assert_same(logits_of(adapted)[0], with_adapter[0])
    merged = adapted.merge_and_unload()
    assert packed_stacks(merged) == list(STACKS)
    assert_same(logits_of(merged)[0], with_adapter[0])


@pytest.mark.parametrize("name", ["local_decoder.layers.0.self_attn.q_proj", "global_transformer.layers.1.mlp"])
@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward", "class", "training"])
def test_what_does_more_than_its_weights_say_is_not_packed(name, how):
    model = make_model(seed=2)
    module, stack = model.model.get_submodule(name), name.split(".")[0].removeprefix("local_")
    if how == "hook":
        module.register_forward_hook(lambda module, inputs, output: output * 2)
    elif how == "pre-hook":
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    elif how == "forward":
        forward = module.forward
        module.forward = lambda states: forward(states) * 2
    elif how == "class":
        base = type(module)
        module.__class__ = type("Twice", (base,), {"forward": lambda self, states: base.forward(self, states) * 2})
    else:
        module.train()
    assert packed_stacks(model) == [kept for kept in STACKS if kept != stack]
    with torch.no_grad():
        text = model.generate(IDS, **SETTINGS)
        expected = model(text[:, :-1], use_cache=False).logits[:, IDS.shape[1] - 1 :].argmax(dim=-1)
    assert text[:, IDS.shape[1] :].equal(expected)


@pytest.mark.parametrize("cls", [BltMLP, BltRMSNorm, BltSelfAttention, torch.nn.Linear])
def test_a_class_whose_forward_was_replaced_is_not_packed(cls, monkeypatch):
    model, forward = make_model(seed=2), cls.forward

    def twice(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2

    monkeypatch.setattr(cls, "forward", twice)
    assert packed_stacks(model) == []
    assert_same(logits_of(model)[0], logits_of(by_modules(model))[0])


def test_parts_of_other_classes_are_not_packed():
    model = make_model(seed=2)
    model.model.local_decoder.layers[0].input_layernorm = torch.nn.Tanh()
    model.model.patcher.layers[1].mlp = torch.nn.Identity()
    model.model.local_encoder.layers[0].mlp.act_fn = torch.nn.Tanh()
    model.eval()
    assert packed_stacks(model) == ["encoder", "global_transformer"]
    assert_same(logits_of(model)[0], logits_of(by_modules(model))[0])


def test_autocast_and_other_attention_run_the_modules():
    model = make_model(seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed_stacks(model) == []
    model.set_attn_implementation("eager")
    assert packed_stacks(model) == []


def test_nothing_is_left_behind(monkeypatch, tmp_path):
    model, made = make_model(seed=2), []

    class Seen(PackedStacks):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    monkeypatch.setattr(step_blt, "PackedStacks", Seen)
    before = len(pickle.dumps(model))
    model.generate(IDS, **SETTINGS)
    gc.collect()
    assert len(made) == 1 and made[0]() is None
    assert len(pickle.dumps(model)) == before
    file = io.BytesIO()
    torch.save(model, file)
    assert file.tell() < 2 * before
    copied = copy.deepcopy(model)
    assert copied.generate(IDS, **SETTINGS).equal(model.generate(IDS, **SETTINGS))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        assert set(saved.keys()) == set(model.state_dict())


def test_a_call_of_a_few_bytes_packs_nothing(monkeypatch):
    def fail(*arguments):
        raise AssertionError("packing costs as much as a byte")

    monkeypatch.setattr(step_blt, "PackedStacks", fail)
    model = make_model()
    assert model.generate(IDS, **{**SETTINGS, "max_new_tokens": 3}).shape[1] == IDS.shape[1] + 3


def test_two_threads():
    model = make_model(seed=2)
    expected, found = model.generate(IDS, **SETTINGS), []

    def run():
        for _ in range(5):
            found.append(model.generate(IDS, **SETTINGS))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15 and all(text.equal(expected) for text in found)


def _released_config(encoder, global_, decoder, k: int) -> BltConfig:
    def stack(width, layers, heads, feed_forward, **more):
        return {
            "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
            "intermediate_size": feed_forward, **more,
        }  # fmt: skip

    return BltConfig(
        patcher_config=stack(768, 14, 12, 2048),
        encoder_config=stack(*encoder, cross_attn_k=k),
        global_config=stack(*global_),
        decoder_config=stack(*decoder, cross_attn_k=k, hidden_size_global=global_[0]),
        cross_attn_k=k,
        encoder_hash_byte_group_vocab=500_002,
    )


@pytest.mark.parametrize(
    "shape",
    [
        ((1024, 1, 16, 2816), (2048, 25, 16, 5632), (1024, 9, 16, 2816), 2),
        ((1280, 1, 20, 3584), (4096, 32, 32, 11008), (1280, 6, 20, 3584), 4),
    ],
    ids=["1B", "7B"],
)
def test_copies_are_small_beside_the_released_models(shape):
    with torch.device("meta"):
        model = BltForCausalLM(_released_config(*shape)).model
    stacks = (model.patcher, model.local_encoder, model.local_decoder)
    copied_names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")  # and smaller models' `down_proj`
    weights = [
        w
        for s in stacks
        for layer in s.layers
        for n, w in layer.named_parameters()
        if n.split(".")[-2] in copied_names
    ]
    assert all(layer.mlp.down_proj.weight.numel() >= packed_blt._LARGE for s in stacks for layer in s.layers)
    weights += [
        w for n, w in model.local_decoder.cross_attn_layers.named_parameters() if n.split(".")[-2] in copied_names
    ]
    copied = sum(weight.numel() for weight in weights)
    assert copied < 0.05 * sum(weight.numel() for weight in model.parameters())


@torch.no_grad()
def test_what_is_copied_is_what_is_joined():
    """The weights that the test above counts, and no others, lie in memory of their own."""
    model = make_model()
    packed = PackedStacks(model.model, model(IDS, use_cache=True).past_key_values)
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    stacks = (packed.patcher, packed.encoder, packed.decoder, packed.global_transformer)
    made = [stack.weights[2] for stack in stacks]  # keys and values of latents
    for stack in stacks:
        layers, cross_layers, _ = stack.weights
        for layer in (*layers, *cross_layers):
            for weight in layer:
                made += weight if isinstance(weight, tuple) else [weight]
    copies = [w for w in made if w is not None and w.dim() == 2 and w.untyped_storage().data_ptr() not in own]
    copied_names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    local = (model.model.patcher.layers, model.model.local_encoder.layers, model.model.local_decoder.layers)
    expected = [w for s in (*local, model.model.local_decoder.cross_attn_layers) for n, w in s.named_parameters()
                if n.split(".")[-2] in copied_names]  # fmt: skip
    assert sum(w.numel() for w in copies) == sum(w.numel() for w in expected)
