"""Decoding in steps: the cache rests while bytes come one at a time, and is whole again for whoever asks."""

import copy

import pytest
import torch
from test_exactness import RULES, alone, assert_same, model_for, pad
from transformers import CompileConfig

from blt_hf.model import step_blt
from blt_hf.model.cache_blt import BltCache
from conftest import make_model, tiny_config


STEPPING = sorted(set(RULES) - {"wide_cross"})  # patches that reach back over others are decoded without steps
ROWS = ["héllo, a b\nc 速2 d ab", "ab", "2, c\n\nbé ab cd, ab c"]


@pytest.fixture
def states(monkeypatch) -> list:
    """Every `BltStepState` that is made."""
    made = []

    class Recorded(step_blt.BltStepState):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(step_blt, "BltStepState", Recorded)
    return made


def rows_of(rule: str, length: int) -> list[list[int]]:
    rows = []
    for text in ROWS:
        ids = [1] + [byte + 4 for byte in (text * 20).encode()][: length - 1]
        if rule == "documents":
            ids[5::9] = [2] * len(ids[5::9])
        rows.append(ids)
    return rows


@torch.no_grad()
@pytest.mark.parametrize("rule", STEPPING)
def test_steps_of_padded_rows_equal_rows_alone(rule, states):
    """Steps, then a chunk, then steps again, for rows of different lengths."""
    model = model_for(rule)
    rows = rows_of(rule, 60)
    prompts = [rows[0][:9], rows[1][:2], rows[2][:14]]
    ids, mask = pad(prompts, "left")
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    at = [len(prompt) for prompt in prompts]
    for size in [1] * 12 + [5] + [1] * 8 + [2] + [1] * 3:
        new = torch.tensor([row[i : i + size] for row, i in zip(rows, at)])
        logits = model(new, past_key_values=cache).logits
        at = [i + size for i in at]
        for row, stop, row_logits in zip(rows, at, logits):
            assert_same(row_logits, alone(model, row[:stop])[-size:])
    assert len(states) == 3


@torch.no_grad()
@pytest.mark.parametrize("rule", ["entropy", "full_windows", "space_max"])
def test_buffers_grow_and_wrap(rule, states, monkeypatch):
    """Longer than windows, free slots, patch columns and the ring of open patches were at first."""
    monkeypatch.setattr(step_blt, "_GROWTH", 8)
    monkeypatch.setattr(step_blt, "_BLOCK", 4)
    monkeypatch.setattr(step_blt, "_OPEN_BYTES", 2)
    model = model_for(rule)
    row = rows_of(rule, 150)[0]
    expected = alone(model, row)
    cache = model(torch.tensor([row[:3]]), use_cache=True).past_key_values
    for index in range(3, len(row)):
        logits = model(torch.tensor([row[index : index + 1]]), past_key_values=cache).logits
        assert_same(logits[0, 0], expected[index])
    assert len(states) > 1 and max(states[-1].patch_counts) > 8


@torch.no_grad()
def test_generation_makes_one_state_and_never_returns_it(states, monkeypatch):
    model, ids = model_for("entropy"), torch.tensor([rows_of("entropy", 20)[0]])
    monkeypatch.setattr(step_blt.BltStepState, "return_to", lambda *args: pytest.fail("the cache was asked for"))
    model.generate(ids, max_new_tokens=30, min_new_tokens=30, do_sample=False)
    assert len(states) == 1 and states[0].steps > 20


@torch.no_grad()
def test_a_resting_cache_can_be_asked_copied_and_reordered(states):
    model, rows = model_for("entropy"), rows_of("entropy", 40)
    cache = model(torch.tensor([row[:10] for row in rows]), use_cache=True).past_key_values
    for index in range(10, 20):
        model(torch.tensor([[row[index]] for row in rows]), past_key_values=cache)
    assert cache.steps is states[0]
    copied = copy.deepcopy(cache)
    assert cache.get_seq_length() == 20 and cache.steps is states[0]  # counts are known without waking it
    assert cache.layers[0].keys.shape[-2] == min(20, cache.layers[0].window - 1) and cache.steps is None
    copied.select_rows(torch.tensor([2, 0]))
    chosen = [rows[2], rows[0]]
    for index in range(20, 30):
        logits = model(torch.tensor([[row[index]] for row in chosen]), past_key_values=copied).logits
        for row, row_logits in zip(chosen, logits):
            assert_same(row_logits[0], alone(model, row[: index + 1])[-1])


def test_steps_are_not_taken_where_they_cannot_be_undone_or_learned_from(states):
    model, row = model_for("entropy"), rows_of("entropy", 30)[0]
    recording = BltCache(model.config)
    recording.activate_past_recording()
    caches = [recording, BltCache(model.config)]
    for cache, grad in zip(caches, (False, True)):
        with torch.set_grad_enabled(grad):
            model(torch.tensor([row[:10]]), past_key_values=cache)
            for index in range(10, 20):
                model(torch.tensor([row[index : index + 1]]), past_key_values=cache)
    with torch.no_grad():  # whoever asks for states or patches gets them
        cache = model(torch.tensor([row[:10]]), use_cache=True).past_key_values
        for index in range(10, 20):
            new = torch.tensor([row[index : index + 1]])
            assert model(new, past_key_values=cache, output_patches=True).patch_lengths is not None
    wide = model_for("wide_cross")
    wide.generate(torch.tensor([row]), max_new_tokens=10, do_sample=False)
    assert not states


@pytest.mark.parametrize("rule", ["entropy", "documents", "all_layers"])
def test_static_decoding_is_one_graph_and_gives_the_same_text(rule):
    """`fullgraph=True` raises at any graph break; the backend `eager` runs what was captured."""
    model = model_for(rule)
    ids, mask = pad([row[:12] for row in rows_of(rule, 12)], "left")
    settings = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, **settings)
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    static = {"cache_implementation": "static", "compile_config": config, "return_dict_in_generate": True}
    given = model.generate(ids, **settings, **static)
    assert given.sequences.equal(expected)
    assert given.past_key_values.compile_config is config
    plain = model.generate(ids, **settings, **static, disable_compile=True)
    assert plain.sequences.equal(expected) and plain.past_key_values.compile_config is None


def test_compiled_steps_are_compiled_once():
    """Text, patches and windows grow without new shapes."""
    model = make_model(tiny_config(patching_mode="space", patch_in_forward=False), seed=3)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    config = CompileConfig(backend=backend, mode=None)
    torch.compiler.reset()
    with torch.no_grad():
        row = rows_of("space", 400)[0]
        for length in (400, 350):
            text = torch.tensor([row[:length]])
            cache = BltCache(model.config)
            cache.compile_steps(config, max_length=400)
            model(text[:, :10], past_key_values=cache)
            for index in range(10, length):
                model(text[:, index : index + 1], past_key_values=cache)
    assert len(compiled) == 3  # read a byte, close a patch, predict a byte


@pytest.mark.slow
def test_inductor_gives_the_same_text():
    model = model_for("entropy")
    ids = torch.tensor([rows_of("entropy", 12)[0]])
    settings = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    static = model.generate(ids, **settings, cache_implementation="static")
    assert static.equal(model.generate(ids, **settings))
