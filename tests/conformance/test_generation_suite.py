"""What Hugging Face's generation suite asks of a model that generates.

The suite itself (`GenerationTesterMixin`) is not in transformers' source distribution, so `test_transformers_suites.py`
cannot run it. These tests are ours, in its place: written from what transformers documents of `generate`, of its outputs
and of its caches, for both classes here that generate. What `tests/model/test_generation_blt.py` asks already is not
asked again: prompts of unequal length, drafts by another model, streams, stopping, chat turns, chunks of a prompt.
"""

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput, WatermarkingConfig

import blt_hf
from blt_hf import BltForCausalLM, BltPatcher
from blt_hf.model.names_blt import CACHE_NAME
from helpers.models import make_model, tiny_config


NEW = 8  # bytes
FREE = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW}
GREEDY = {**FREE, "do_sample": False}
STRATEGIES = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "beam sample": {"do_sample": True, "num_beams": 2},
}


@pytest.fixture(scope="module")
def models():
    """Both classes that generate, with attention whose weights can be returned."""
    made = {
        "model": make_model(seed=11),
        "patcher": make_model(tiny_config().patcher_config, BltPatcher, seed=11),
    }
    for model in made.values():
        model.set_attn_implementation("eager")
    return made


@pytest.fixture(params=["model", "patcher"])
def model(request, models):
    return models[request.param]


@pytest.fixture
def ids(byte_ids) -> torch.Tensor:
    return byte_ids[:, :20]


def with_ids_only(rule: str = "static", **overrides) -> BltForCausalLM:
    """A model in which nothing but the byte embedding reads ids, so that embeddings say all."""
    config = tiny_config(patching_mode=rule, patch_size=3, encoder_hash_byte_group_nb_functions=0, **overrides)
    return make_model(config, seed=11)


# ---- What is returned ----


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_outputs(model, ids, strategy, use_cache):
    arguments = {**FREE, **STRATEGIES[strategy], "use_cache": use_cache}
    beams, returned = arguments.get("num_beams", 1), arguments.get("num_return_sequences", 1)
    torch.manual_seed(3)
    plain = model.generate(ids, **arguments)
    torch.manual_seed(3)
    out = model.generate(
        ids,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
        **arguments,
    )
    rows, prompt = ids.shape[0], ids.shape[1]
    wide = rows * beams
    assert isinstance(out, GenerateDecoderOnlyOutput if beams == 1 else GenerateBeamDecoderOnlyOutput)
    assert torch.equal(out.sequences, plain)
    assert out.sequences.shape == (rows * returned, prompt + NEW)
    assert torch.equal(out.sequences[:, :prompt], ids.repeat_interleave(returned, dim=0))
    for steps in (out.scores, out.logits):
        assert [tuple(step.shape) for step in steps] == [(wide, 260)] * NEW
        assert all(step.dtype == torch.float32 for step in steps)

    config = getattr(model.config, "decoder_config", model.config)
    window = getattr(model.config, "local_attention_window_len", None) or model.config.sliding_window
    read = [prompt] + [1] * (NEW - 1) if use_cache else [prompt + step for step in range(NEW)]
    # What later bytes cannot see is not kept, so that the weights of a step are over a window
    keys = [prompt] + [min(prompt + step, window) for step in range(1, NEW)] if use_cache else read
    assert len(out.hidden_states) == len(out.attentions) == NEW
    for step in range(NEW):
        shapes = [tuple(states.shape) for states in out.hidden_states[step]]
        assert shapes == [(wide, read[step], config.hidden_size)] * (config.num_hidden_layers + 1)
        shapes = [tuple(weights.shape) for weights in out.attentions[step]]
        assert shapes == [(wide, config.num_attention_heads, read[step], keys[step])] * config.num_hidden_layers
    if use_cache:
        cache = out[CACHE_NAME]
        assert isinstance(cache, Cache)
        assert cache.get_seq_length() == out.sequences.shape[1] - 1 and cache.batch_size == wide
    else:
        assert out.get(CACHE_NAME) is None


@pytest.mark.parametrize("strategy", ["beams", "beam sample"])
def test_scores_of_beams_are_their_transitions(model, ids, strategy):
    """As transformers documents it: the transition scores of a text sum up to its score."""
    arguments = {**FREE, **STRATEGIES[strategy], "length_penalty": 0.7}
    torch.manual_seed(3)
    out = model.generate(ids, return_dict_in_generate=True, output_scores=True, **arguments)
    assert out.beam_indices.shape[0] == len(out.sequences) == len(out.sequences_scores)
    if arguments["do_sample"]:
        return  # a drawn beam's score is not that of the processed distribution
    scores = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices, normalize_logits=False)
    torch.testing.assert_close(scores.sum(dim=1) / NEW**0.7, out.sequences_scores, atol=1e-4, rtol=1e-4)
    by_row = out.sequences_scores.view(ids.shape[0], -1)
    assert torch.equal(by_row, by_row.sort(dim=1, descending=True).values)


def test_who_generates():
    for name in blt_hf.__all__:
        thing = getattr(blt_hf, name)
        if isinstance(thing, type) and issubclass(thing, torch.nn.Module) and hasattr(thing, "can_generate"):
            does = thing in (BltForCausalLM, BltPatcher)
            assert thing.can_generate() == issubclass(thing, GenerationMixin) == does, name


# ---- What is given ----


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(model, ids):
    """The next byte's logits with and without padding, with positions that are given and that are not."""
    expected = model(ids).logits[:, -1]
    padded = torch.cat([torch.zeros(2, 7, dtype=torch.int64), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 7, dtype=torch.int64), torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    for arguments in ({}, {"position_ids": positions}):
        logits = model(padded, attention_mask=mask, **arguments).logits[:, -1]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    text = model.generate(padded, attention_mask=mask, **GREEDY)
    assert torch.equal(text[:, 7:], model.generate(ids, **GREEDY))


def test_positions_may_be_given(model, ids):
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    assert torch.equal(model.generate(ids, position_ids=positions, **GREEDY), model.generate(ids, **GREEDY))


@pytest.mark.parametrize("strategy", ["greedy", "beams"])
def test_logits_to_keep(model, ids, strategy):
    """`generate` asks for the last logits alone; who asks for all gets the same text."""
    arguments = {**FREE, **STRATEGIES[strategy]}
    assert torch.equal(model.generate(ids, logits_to_keep=0, **arguments), model.generate(ids, **arguments))


def test_nothing_but_a_length(model):
    """Without ids a text begins with the beginning of a text."""
    text = model.generate(**GREEDY)
    assert text.shape == (1, 1 + NEW) and text[0, 0] == 1
    assert torch.equal(text, model.generate(torch.tensor([[1]]), **GREEDY))


def test_settings_of_an_object_and_of_arguments(model, ids):
    """Arguments win over the object, and neither is changed."""
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=None)
    before = settings.to_dict()
    assert model.generate(ids, generation_config=settings).shape[1] == ids.shape[1] + 3
    assert model.generate(ids, generation_config=settings, max_new_tokens=5).shape[1] == ids.shape[1] + 5
    assert settings.to_dict() == before


@pytest.mark.parametrize(
    "arguments",
    [
        {"repetition_penalty": 1.4},
        {"bad_words_ids": [[101], [102, 103]]},
        {"sequence_bias": [[[104], 5.0]]},
        {"suppress_tokens": list(range(4, 60)), "begin_suppress_tokens": [104]},
        {"forced_eos_token_id": 2, "max_new_tokens": 5},
        {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 2},
        {"min_new_tokens": 4, "eos_token_id": [2, 100, 101]},
        {"renormalize_logits": True, "typical_p": 0.8, "do_sample": True},
        {"epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3, "min_p": 0.01, "do_sample": True},
        {"watermarking_config": WatermarkingConfig(bias=2.5, seeding_scheme="selfhash")},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_changes_scores_needs_no_cache(model, ids, arguments):
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        texts.append(model.generate(ids, use_cache=use_cache, **{**GREEDY, **arguments}))
    assert torch.equal(*texts)
    if "bad_words_ids" in arguments:
        assert 101 not in texts[0][:, ids.shape[1] :]
    if "forced_eos_token_id" in arguments:
        assert (texts[0][:, -1] == 2).all()


# ---- Embeddings in the place of ids ----


@pytest.mark.parametrize("strategy", ["greedy", "beams"])
@pytest.mark.parametrize("kind", ["static", "byte", "patcher"])
def test_generation_from_embeddings(models, ids, kind, strategy):
    """The text is that of the ids, and only what is new is returned, unless the ids are given too."""
    model = models["patcher"] if kind == "patcher" else with_ids_only(kind)
    arguments = {**FREE, **STRATEGIES[strategy]}
    expected = model.generate(ids, **arguments)
    embeds = model.get_input_embeddings()(ids).detach()
    assert torch.equal(model.generate(inputs_embeds=embeds, **arguments), expected[:, ids.shape[1] :])
    assert torch.equal(model.generate(ids, inputs_embeds=embeds, **arguments), expected)
    other = model.generate(ids, inputs_embeds=torch.randn_like(embeds), **arguments)
    assert torch.equal(other[:, : ids.shape[1]], expected[:, : ids.shape[1]])
    assert not torch.equal(other, expected), "the embeddings were not read"


def test_generation_from_embeddings_without_a_growing_cache(ids):
    model = with_ids_only()
    embeds = model.get_input_embeddings()(ids).detach()
    static = {"cache_implementation": "static", "disable_compile": True}
    expected = model.generate(inputs_embeds=embeds, **GREEDY)
    assert torch.equal(model.generate(inputs_embeds=embeds, **static, **GREEDY), expected)


def test_embeddings_where_something_reads_ids(models, ids):
    """The entropy model and the hashes read ids: an error that says so, never a text from half of the input."""
    for model in (models["model"], make_model(tiny_config(patching_mode="static"), seed=11)):
        embeds = model.get_input_embeddings()(ids).detach()
        with pytest.raises(ValueError, match="`inputs_embeds` are byte embeddings.*got no `input_ids`"):
            model.generate(inputs_embeds=embeds, **GREEDY)
        expected = model.generate(ids, **GREEDY)
        assert torch.equal(model.generate(ids, inputs_embeds=embeds, **GREEDY), expected)


# ---- Caches ----


def test_format_of_the_cache(model, ids):
    """A layer of keys and values for each attention layer, `(B, H, T, D)`, as clients of caches read them."""
    cache = model.generate(ids, return_dict_in_generate=True, **GREEDY)[CACHE_NAME]
    config, length = model.config, ids.shape[1] + NEW - 1
    parts = [config]
    if isinstance(model, BltForCausalLM):
        parts = [config.patcher_config, config.encoder_config, config.global_config, config.decoder_config]
    shapes = sorted(tuple(layer.keys.shape) for layer in cache.layers)
    assert len(cache) == len(cache.layers) == sum(part.num_hidden_layers for part in parts)
    assert shapes == sorted(tuple(layer.values.shape) for layer in cache.layers)
    expected = []
    for part in parts:
        name = type(part).__name__
        window = config.sliding_window if part is config else config.local_attention_window_len
        window = part.sliding_window if name == "BltPatcherConfig" else window
        count = max(cache.row_patches) if name == "BltGlobalTransformerConfig" else min(length, window - 1)
        expected += [(2, part.num_key_value_heads, count, part.head_dim)] * part.num_hidden_layers
    assert shapes == sorted(expected)
    assert cache.get_seq_length() == length


@pytest.mark.parametrize("strategy", ["greedy", "beams"])
def test_going_on_from_a_returned_cache(model, ids, strategy):
    """Three bytes and then five are eight; the cache at the end is the same too."""
    arguments = {**STRATEGIES[strategy], "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    if strategy == "beams":  # a beam that was given up cannot be gone on from: one text, a cache of its prompt
        with torch.no_grad():
            cache = model(ids.repeat_interleave(3, dim=0)[:, :-1], use_cache=True)[CACHE_NAME]
        once = model.generate(ids, max_new_tokens=NEW, **arguments)
        assert torch.equal(
            model.generate(ids, max_new_tokens=NEW, past_key_values=cache, **arguments).sequences, once.sequences
        )
        return
    once = model.generate(ids, max_new_tokens=NEW, **arguments)
    first = model.generate(ids, max_new_tokens=3, **arguments)
    mask = torch.ones_like(first.sequences)
    second = model.generate(
        first.sequences,
        attention_mask=mask,
        past_key_values=first[CACHE_NAME],
        max_new_tokens=NEW - 3,
        **arguments,
    )
    assert torch.equal(second.sequences, once.sequences)
    for one, other in zip(second[CACHE_NAME].layers, once[CACHE_NAME].layers):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.values, other.values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_cache_of_fixed_size(model, ids, strategy):
    texts = []
    for arguments in ({}, {"cache_implementation": "static", "disable_compile": True}):
        torch.manual_seed(5)
        texts.append(model.generate(ids, **FREE, **STRATEGIES[strategy], **arguments))
    assert torch.equal(*texts)


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_attention_implementations_write_the_same_text(model, ids, implementation):
    expected = model.generate(ids, **GREEDY)
    model.set_attn_implementation(implementation)
    try:
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(model.generate(ids, **GREEDY), expected)
    finally:
        model.set_attn_implementation("eager")


# ---- Drafts ----


@pytest.mark.parametrize("arguments", [{"prompt_lookup_num_tokens": 4}, {"assistant": True}])
def test_drafts_leave_the_text_alone(model, ids, arguments):
    """By looking up the prompt, and by an assistant; with scores of each byte."""
    ids = ids[:1]
    wanted = {"return_dict_in_generate": True, "output_scores": True, **GREEDY}
    expected = model.generate(ids, **wanted)
    if "assistant" in arguments:
        arguments = {"assistant_model": make_model(tiny_config().patcher_config, BltPatcher, seed=11)}
    out = model.generate(ids, **wanted, **arguments)
    assert torch.equal(out.sequences, expected.sequences)
    assert len(out.scores) == NEW
    for one, other in zip(out.scores, expected.scores):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_looked_up_draft_stops_at_the_end_of_a_text(model, ids):
    """An end that stands in a draft ends the text, as one that was decoded."""
    ids = ids[:1]
    free = model.generate(ids, **GREEDY)
    end = int(free[0, ids.shape[1] + 4])
    settings = {**GREEDY, "eos_token_id": end}
    longer = torch.cat([free, ids], dim=1)  # so that what follows can be looked up
    expected = model.generate(longer, **settings)
    assert torch.equal(model.generate(longer, prompt_lookup_num_tokens=6, **settings), expected)


def test_an_early_exit_is_refused(model, ids):
    """It drafts with the first layers of a stack, and takes it for granted that there is one."""
    with pytest.raises(ValueError, match="`assistant_early_exit` .* got 1. Use `self_speculation_window`"):
        model.generate(ids[:1], assistant_early_exit=1, **GREEDY)
