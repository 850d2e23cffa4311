"""Decoding byte by byte: small chunks in the slots of the cache, and the loop that `generate` runs on them."""

import copy
from dataclasses import replace

import peft
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers import CompileConfig, GenerationMixin, StoppingCriteria

from blt_hf.cuda_graphs import ModuleState
from blt_hf.model import cache_blt
from blt_hf.model.cache_blt import BltCache
from blt_hf.model.forward_blt import ForwardSettings
from blt_hf.model.step_blt import hooks_of, is_own_code
from helpers.checks import Received, alone, assert_same
from helpers.models import RULES, make_model, model_for, step_logits, tiny_config
from helpers.texts import encode, pad, rows_of


@torch.no_grad()
@pytest.mark.parametrize("rule", sorted(RULES))
def test_steps_of_padded_rows_equal_rows_alone(rule):
    """Bytes, short and long chunks, for rows of different lengths."""
    model = model_for(rule)
    rows = rows_of(rule, 100)
    prompts = [rows[0][:9], rows[1][:2], rows[2][:14]]
    ids, mask = pad(prompts, "left")
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    at = [len(prompt) for prompt in prompts]
    for size in [1] * 12 + [5] + [1] * 8 + [17, 2, 30, 1, 1]:
        new = torch.tensor([row[i : i + size] for row, i in zip(rows, at)])
        logits = model(new, past_key_values=cache).logits
        at = [i + size for i in at]
        for row, stop, row_logits in zip(rows, at, logits):
            assert_same(row_logits, alone(model, row[:stop])[-size:])


@torch.no_grad()
@pytest.mark.parametrize("rule", ["entropy", "full_windows", "space_max", "wide_cross"])
def test_slots_grow_and_wrap(rule, monkeypatch):
    """Longer than windows, slots, patch columns and the room for the open patch were at first."""
    monkeypatch.setattr(cache_blt, "_BLOCK", 4)
    monkeypatch.setattr(cache_blt, "_PATCHES", 4)
    model = model_for(rule)
    row = rows_of(rule, 150)[0]
    expected = alone(model, row)
    cache = BltCache(model.config, slack=3)
    model(torch.tensor([row[:3]]), past_key_values=cache)
    for index in range(3, len(row)):
        logits = model(torch.tensor([row[index : index + 1]]), past_key_values=cache).logits
        assert_same(logits[0, 0], expected[index])
    assert cache.row_patches[0] > 8


@torch.no_grad()
@pytest.mark.parametrize("rule", ["entropy", "space", "wide_cross"])
def test_patches_longer_than_all_room(rule):
    """A patch that does not end for 200 bytes, and then does."""
    config = tiny_config(**{**RULES[rule], "patching_mode": "space", "encoder_hash_byte_group_size": [3]})
    model = make_model(config, seed=4)
    row = encode(b"ab " + b"c" * 200 + b" d" + b"e" * 70 + b" f g")
    expected = alone(model, row)
    for sizes in ([1], [40, 1, 7]):
        cache, start, seen = None, 0, []
        while start < len(row):
            size = sizes[len(seen) % len(sizes)]
            out = model(torch.tensor([row[start : start + size]]), past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, start + size
            seen.append(out.logits[0])
        assert_same(torch.cat(seen), expected)


@torch.no_grad()
def test_lengths_leave_rows_alone(rule="entropy"):
    model, rows = model_for(rule), rows_of(rule, 60)
    cache = model(torch.tensor([row[:10] for row in rows]), use_cache=True).past_key_values
    at = [10, 10, 10]
    for step in range(12):
        lengths = [step % 4, 3, (step + 2) % 4]
        new = torch.tensor([row[i : i + 3] for row, i in zip(rows, at)])
        logits = step_logits(model, new, cache, lengths)
        for row, i, count, row_logits in zip(rows, at, lengths, logits):
            if count:
                assert_same(row_logits[:count], alone(model, row[: i + count])[i:])
        at = [i + count for i, count in zip(at, lengths)]
        assert cache.row_bytes == cache.num_bytes.tolist() == at


@torch.no_grad()
def test_an_interrupted_step_leaves_the_cache_usable():
    """Counters go on at the end of a forward alone, so what was written before is written again."""
    model, row = model_for("entropy"), rows_of("entropy", 60)[0]
    cache = model(torch.tensor([row[:20]]), use_cache=True).past_key_values
    hook = model.model.local_decoder.layers[1].register_forward_hook(
        lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            model(torch.tensor([row[30:34]]), past_key_values=cache)
    hook.remove()
    for index in range(20, 60):
        logits = model(torch.tensor([row[index : index + 1]]), past_key_values=cache).logits
        assert_same(logits[0, 0], alone(model, row[: index + 1])[-1])


# The loop of `generate` against transformers' own.


class After(StoppingCriteria):
    """Stops each row at a length of its own."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= length for length in self.lengths])


def transformers_loop(model):
    """The same model, decoded by transformers' `_sample`."""
    other = copy.copy(model)
    object.__setattr__(other, "_sample", GenerationMixin._sample.__get__(other))
    return other


LOOPS = {
    "greedy": {},
    "eos": {"eos_token_id": None},
    "sample": {"do_sample": True, "temperature": 0.8, "top_k": 20, "num_return_sequences": 2},
    "processors": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 9},
    "criteria": {"stopping_criteria": [After([24, 30, 19])]},
    "bad_words": {"bad_words_ids": [[40], [41, 42]], "forced_eos_token_id": 2},
}


@pytest.mark.parametrize("case", LOOPS)
def test_the_loop_is_that_of_transformers(case):
    model = model_for("entropy")
    ids, mask = pad([row[:length] for row, length in zip(rows_of("entropy", 20), (14, 9, 11))], "left")
    settings = {
        "attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True,
        "output_scores": True, "output_logits": True, "eos_token_id": None, **LOOPS[case],
    }  # fmt: skip
    if case == "eos":
        free = model.generate(ids, **settings).sequences
        settings["eos_token_id"] = [int(free[0, 20]), int(free[1, 25])]
    results = []
    for one in (transformers_loop(model), model):
        torch.manual_seed(3)
        streamer = Received()
        results.append((one.generate(ids, streamer=streamer, **copy.deepcopy(settings)), streamer))
    (expected, their_stream), (actual, our_stream) = results
    assert actual.sequences.equal(expected.sequences)
    assert our_stream.ended and their_stream.ended
    assert our_stream.ids[1:] == their_stream.ids[1:]
    for name in ("scores", "logits"):
        theirs, ours = getattr(expected, name), getattr(actual, name)
        assert len(ours) == len(theirs)
        assert_same(torch.stack(ours), torch.stack(theirs))
    assert actual.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


# Steps that are compiled.


@pytest.mark.parametrize("rule", ["documents", "all_layers"])
def test_static_decoding_gives_the_same_text(rule):
    model = model_for(rule)
    ids, mask = pad([row[:12] for row in rows_of(rule, 12)], "left")
    settings = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, **settings)
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    static = {"cache_implementation": "static", "compile_config": config}
    assert model.generate(ids, **settings, **static).equal(expected)
    assert model.generate(ids, **settings, **static, disable_compile=True).equal(expected)


def test_few_graphs_serve_all_lengths_and_batches():
    """Read, close, predict: compiled once for a row, and not at all for more, whatever the lengths."""
    model = make_model(tiny_config(patching_mode="space", patch_in_forward=False), seed=3)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    settings = {
        "do_sample": False, "eos_token_id": None, "cache_implementation": "static",
        "compile_config": CompileConfig(backend=backend, mode=None),
    }  # fmt: skip
    rows, graphs = rows_of("space", 30), []
    for count, length, new in ((1, 9, 12), (1, 25, 60), (2, 9, 12), (3, 20, 50), (1, 7, 9), (2, 20, 30)):
        ids = torch.tensor([row[:length] for row in rows[:count]])
        text = model.generate(ids, max_new_tokens=new, **settings)
        assert text.equal(model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None))
        graphs.append(len(compiled))
    assert graphs == [3] * 6, graphs
    ids = torch.tensor([rows[0][:9]])
    for window, new in ((4, 30), (6, 40), (3, 20)):  # a graph to draft, and three to verify, of 8 bytes each
        text = model.generate(ids, max_new_tokens=new, self_speculation_window=window, **settings)
        assert text.equal(model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None))
    assert len(compiled) == 3 + 1 + 3, len(compiled)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CompileConfig(), {"cpp_wrapper": True, "triton.cudagraphs": False}),
        (CompileConfig(mode=None, options={"cpp_wrapper": False}), {"cpp_wrapper": False, "triton.cudagraphs": False}),
        (CompileConfig(mode=None, backend="eager"), None),
    ],
)
def test_options_of_the_compiler(config, expected, monkeypatch):
    """C++ starts the kernels of compiled steps on a CPU, unless the caller says otherwise."""
    model = make_model(tiny_config(patching_mode="space", patch_in_forward=False), seed=3)
    seen = []

    def compile_nothing(function, **settings):
        seen.append(settings["options"])
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    ids = torch.tensor([rows_of("space", 12)[0]])
    settings = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "compile_config": config}
    assert model.generate(ids, **settings).equal(model.generate(ids, max_new_tokens=4, do_sample=False))
    assert seen
    assert all(options == expected if expected is None else expected.items() <= options.items() for options in seen)


@pytest.mark.parametrize("part", [None, "adapter", "hook", "quantized weight", "registered rule"])
def test_python_starts_the_kernels_of_others(part):
    """torch's C++ lacks some operations; that our own need none of these is known."""
    model = make_model(tiny_config(patching_mode="space", patch_in_forward=False))
    settings = ForwardSettings.of(model.config)
    if part == "adapter":
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"])).base_model.model
    elif part == "hook":
        model.model.local_encoder.register_forward_hook(lambda module, inputs, output: None)
    elif part == "quantized weight":
        subclass = type("Weight", (torch.nn.Parameter,), {})
        model.lm_head.weight = subclass(model.lm_head.weight.detach())
    elif part == "registered rule":
        settings = replace(settings, rule=replace(settings.rule, mode="of somebody else"))
    roots = model.model, model.lm_head
    assert is_own_code(settings, hooks_of(*roots), *roots) == (part is None)


def test_compiled_code_belongs_to_the_model():
    model = make_model(tiny_config(patching_mode="space", patch_in_forward=False), seed=3)
    config = CompileConfig(backend="eager", mode=None)
    ids = torch.tensor([rows_of("space", 12)[0]])
    settings = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "compile_config": config}
    model.generate(ids, **settings)
    other = copy.deepcopy(model)
    assert model.model.compiled_steps and not other.model.compiled_steps
    other.generate(ids, **settings)
    ours, theirs = (set(map(id, m.model.compiled_steps.values())) for m in (model, other))
    assert len(ours) == len(theirs) and not ours & theirs


def _double(module, inputs, output):
    return output * 2


def _change_weights(model):
    model.model.local_decoder.layers[0].mlp.up_proj.weight.data.mul_(-1.5)


def _change_a_tensor(model):
    layer = model.model.global_transformer.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * -1.5)


def _change_a_module(model):
    attention = model.model.local_encoder.layers[0].self_attn
    attention.v_proj, attention.k_proj = attention.k_proj, attention.v_proj


def _add_a_hook(model):
    model.model.local_decoder.layers[0].self_attn.o_proj.register_forward_hook(_double)


def _change_precision(model):
    model.model.local_decoder.to(torch.float64)
    model.model.local_encoder.to(torch.float64)
    model.model.global_transformer.to(torch.float64)
    model.model.encoder_hash_tok_embedding.to(torch.float64)
    model.lm_head.to(torch.float64)


def _change_the_head(model):
    model.lm_head.register_forward_hook(_double)


def _change_the_threshold(model):
    model.config.patching_threshold = model.config.patching_threshold / 2


def _change_the_attention(model):
    model.set_attn_implementation("eager")


_CHANGES = [
    _change_weights, _change_a_tensor, _change_a_module, _add_a_hook, _change_precision, _change_the_head,
    _change_the_threshold, _change_the_attention,
]  # fmt: skip


@pytest.mark.parametrize(
    "change, window",
    [(_add_a_hook, None), (_change_the_head, None)]
    + [
        pytest.param(change, window, marks=pytest.mark.slow)
        for change in _CHANGES
        for window in (None, 4)
        if window is not None or change not in (_add_a_hook, _change_the_head)
    ],
)
def test_compiled_steps_notice_changes(change, window):
    """torch asks little about the modules at each byte, and yet nothing decodes with a model of the past."""
    model = make_model(tiny_config(patching_mode="entropy"), seed=3)
    ids = torch.tensor([rows_of("space", 12)[0]])
    settings = {
        "max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "self_speculation_window": window,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    static = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager", mode=None)}
    before = model.generate(ids, **settings, **static)
    change(model)
    after, plain = model.generate(ids, **settings, **static), model.generate(ids, **settings)
    for logits, expected in zip(after.logits, plain.logits):
        assert_same(logits, expected)
    is_same = all(a.equal(b) for a, b in zip(before.logits, after.logits))
    assert not is_same or change in (_change_the_threshold, _change_the_attention)


def test_what_compiled_code_takes_for_granted():
    model = make_model(tiny_config(patching_mode="entropy"), seed=3)
    for change in (_change_a_tensor, _change_a_module, _add_a_hook, _change_precision, _change_the_head):
        state = ModuleState(model)
        assert state.is_whole and state.holds()
        change(model)
        assert not state.holds(), change
    state = ModuleState(model)
    _change_weights(model)
    assert state.holds(), "weights that change where they are need no new code"
    hook = register_module_forward_hook(_double)
    assert not state.holds()
    hook.remove()
    assert state.holds()
    model.train()
    assert not state.holds()
    adapted = peft.get_peft_model(model, peft.LoraConfig())
    assert not ModuleState(adapted.base_model.model).is_whole, (
        "adapters have settings of their own, which torch sees to"
    )


@pytest.mark.slow
def test_compiled_steps_notice_adapters():
    model = make_model(tiny_config(patching_mode="entropy"), seed=3)
    ids = torch.tensor([rows_of("space", 12)[0]])
    settings = {
        "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    static = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager", mode=None)}

    def check():
        both = model.generate(ids, **settings, **static), model.generate(ids, **settings)
        for logits, expected in zip(both[0].logits, both[1].logits):
            assert_same(logits, expected)
        return both[0].logits[0]

    base = check()
    model = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False)).eval()
    adapted = check()
    assert not adapted.allclose(base, atol=1e-3)
    with model.disable_adapter():
        assert_same(check(), base)
    model.merge_adapter()
    assert_same(check(), adapted)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["entropy", "documents", "lexicon", "wide_cross"])
def test_inductor_gives_the_same_text(rule):
    model = model_for(rule)
    ids = torch.tensor([rows_of(rule, 12)[0]])
    settings = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    static = model.generate(ids, **settings, cache_implementation="static")
    assert static.equal(model.generate(ids, **settings))
    drafted = model.generate(ids, **settings, cache_implementation="static", self_speculation_window=4)
    assert drafted.equal(static)
