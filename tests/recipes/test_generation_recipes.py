"""Arguments of `generate`: each alone, and in pairs under drafts, blocks, static caches and continuous batching.

What an argument asks for must not depend on how the text is made: with a cache as without one, in a batch as alone, by
drafts as byte by byte. Two hundred pairs are drawn by a seed that is written here.
"""

import functools
import random
from threading import Thread

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    WatermarkingConfig,
)

from helpers.recipes import BOTH, CAUSAL, TEXTS, assert_same, encode, make, on, tokenizer, write


NUM_BYTES = 7
SEED, NUM_PAIRS = 2026, 200
TEXT = TEXTS[0]
HALF = list(range(130, 260))  # so many ids that a random model soon writes one

# Each argument with a value that a random model of bytes can be seen to follow.
ARGUMENTS = {
    "max_length": {"max_length": 31, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 5},
    "min_length": {"min_length": 32, "eos_token_id": HALF},
    "min_new_tokens": {"min_new_tokens": 4, "eos_token_id": HALF},
    "eos_token_id": {"eos_token_id": HALF},
    "pad_token_id": {"pad_token_id": 3, "eos_token_id": HALF},
    "bos_token_id": {"bos_token_id": 1},
    "stop_strings": {"stop_strings": [chr(c) for c in range(32, 127)], "tokenizer": tokenizer},
    "max_time": {"max_time": 600.0},
    "num_beams": {"num_beams": 3},
    "early_stopping": {"num_beams": 2, "early_stopping": True, "eos_token_id": HALF},
    "length_penalty": {"num_beams": 2, "length_penalty": 3.0, "eos_token_id": HALF},
    "num_return_sequences": {"num_beams": 3, "num_return_sequences": 2},
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "dynamic"},
    "do_sample": {"do_sample": True, "top_k": 1, "temperature": 2.0},
    "temperature": {"do_sample": True, "top_k": 1, "temperature": 0.3},
    "top_k": {"do_sample": True, "top_k": 1},
    "top_p": {"do_sample": True, "top_p": 1e-6},
    "min_p": {"do_sample": True, "min_p": 1.0},
    "top_h": {"do_sample": True, "top_h": 0.001, "top_k": 1},
    "typical_p": {"do_sample": True, "top_k": 1, "typical_p": 0.9},
    "epsilon_cutoff": {"do_sample": True, "top_k": 1, "epsilon_cutoff": 0.01},
    "eta_cutoff": {"do_sample": True, "top_k": 1, "eta_cutoff": 0.01},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 4.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[i] for i in range(4, 260, 2)] + [[5, 7]]},
    "renormalize_logits": {"renormalize_logits": True},
    "forced_bos_token_id": {"forced_bos_token_id": 70},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 30.0)},
    "suppress_tokens": {"suppress_tokens": HALF},
    "begin_suppress_tokens": {"begin_suppress_tokens": HALF},
    "sequence_bias": {"sequence_bias": [[[i], -30.0] for i in range(4, 260, 2)] + [[[5, 7], 3.0]]},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=20.0, seeding_scheme="selfhash")},
    "guidance_scale": {"guidance_scale": 1.8},
    "token_healing": {"token_healing": False},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "output_scores": {"return_dict_in_generate": True, "output_scores": True},
    "output_logits": {"return_dict_in_generate": True, "output_logits": True},
    "output_hidden_states": {"return_dict_in_generate": True, "output_hidden_states": True},
    "output_attentions": {"return_dict_in_generate": True, "output_attentions": True},
    "prefill_chunk_size": {"prefill_chunk_size": 5},
    "max_cache_len": {"max_cache_len": 64},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "max_matching_ngram_size": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
    "disable_compile": {"disable_compile": True},
    "low_memory": {"low_memory": False},
    "is_assistant": {"is_assistant": False},
    "decoder_start_token_id": {"decoder_start_token_id": 1},
}
# Whatever the text was, it stays: how it is made changes, or what comes back with it.
SAME_TEXT = {
    "max_time", "use_cache", "cache_implementation", "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h",
    "typical_p", "epsilon_cutoff", "eta_cutoff", "renormalize_logits", "remove_invalid_values", "token_healing",
    "bos_token_id",
    "return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states", "output_attentions",
    "prefill_chunk_size", "max_cache_len", "prompt_lookup_num_tokens", "max_matching_ngram_size", "disable_compile",
    "low_memory", "is_assistant", "decoder_start_token_id", "forced_bos_token_id",
}  # fmt: skip
# Fields that are no argument of a decoder's text, and why.
NOT_ASKED = {
    "assistant_confidence_threshold": "of an assistant model, which has a recipe",
    "assistant_early_exit": "has a recipe: a BLT refuses it",
    "assistant_ensemble_weight": "of an assistant model, which has a recipe",
    "assistant_lookbehind": "of assistants with another tokenizer",
    "cache_config": "of quantized caches, which have a recipe: a BLT refuses them",
    "compile_config": "compiled steps are slow: tests/model asks them",
    "constraints": "transformers keeps constrained beams on the Hub alone",
    "continuous_batching_config": "has recipes of its own below",
    "diversity_penalty": "transformers keeps group beams on the Hub alone",
    "dola_layers": "transformers keeps DoLa on the Hub alone",
    "force_words_ids": "transformers keeps constrained beams on the Hub alone",
    "num_assistant_tokens": "of an assistant model, which has a recipe",
    "num_assistant_tokens_schedule": "of an assistant model, which has a recipe",
    "num_beam_groups": "transformers keeps group beams on the Hub alone",
    "penalty_alpha": "transformers keeps contrastive search on the Hub alone",
    "speculation_type": "which drafts are made, by models that were trained to",
    "target_lookbehind": "of assistants with another tokenizer",
    "use_mtp": "of models that were trained to predict several tokens",
    "transformers_version": "no argument",
}
ONE_ROW = {"prompt_lookup_num_tokens", "max_matching_ngram_size"}
NEEDS_CACHE = ONE_ROW | {"prefill_chunk_size"}


@functools.cache
def model_of(kind: str):
    """Shared: `generate` leaves a model as it was. "blocks" is a BLT that knows masked blocks."""
    if kind == "blocks":
        return make("blt", diffusion_block_size=4)
    return make(kind)


def written(kind: str, inputs=TEXT, **arguments) -> list[list[int]]:
    """What `generate` writes behind a text or a batch: the new ids of each row."""
    inputs = tokenizer(inputs, return_tensors="pt") if isinstance(inputs, str) else inputs
    settings = {"do_sample": False, "max_new_tokens": NUM_BYTES, **arguments}
    settings = {name: value for name, value in settings.items() if value is not None}
    torch.manual_seed(0)
    output = model_of(kind).generate(**inputs, **settings)
    output = output if isinstance(output, torch.Tensor) else output.sequences
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def without_drafts(arguments: dict) -> dict:
    """What drafting and reading in pieces, which need a cache, ask of the text: nothing."""
    names = ("prompt_lookup_num_tokens", "max_matching_ngram_size", "prefill_chunk_size")
    return {name: value for name, value in arguments.items() if name not in names}


def test_every_field_of_a_generation_configuration_is_asked():
    """A new release's field belongs to one of the two tables."""
    fields = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    assert fields - ARGUMENTS.keys() - NOT_ASKED.keys() == set()
    assert not ARGUMENTS.keys() & NOT_ASKED.keys()


@on(*CAUSAL, slow=("llama", "patcher"))
@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_asks_the_same_with_a_cache_and_without(kind, name):
    arguments = ARGUMENTS[name]
    expected = written(kind, **{**without_drafts(arguments), "use_cache": False})
    assert written(kind, **arguments) == expected
    if name in SAME_TEXT:
        assert expected == written(kind)


@on(*BOTH, slow=("llama",))
@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name not in SAME_TEXT])
def test_an_argument_has_an_effect(kind, name):
    """So that the recipes around this one can fail."""
    prompts = (*TEXTS, bytes(range(256)))
    assert any(rows_of(kind, text, ARGUMENTS[name]) != rows_of(kind, text, {}) for text in prompts)


def rows_of(kind: str, text: str | bytes, arguments: dict) -> list[list[int]]:
    return written(kind, tokenizer([text], return_tensors="pt"), **arguments)


PADDED = {
    # What looks at the prompt reads the padding of a shorter row with it, in a Llama too.
    "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "repetition_penalty",
    "max_length", "min_length",  # count columns
}  # fmt: skip


@on(*BOTH, slow=("llama",))
@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name not in ONE_ROW | PADDED])
def test_an_argument_asks_the_same_of_a_row_in_a_batch(kind, name):
    arguments = ARGUMENTS[name]
    found = written(kind, encode(*TEXTS[:2]), **arguments)
    count = arguments.get("num_return_sequences", 1)
    for row, text in enumerate(TEXTS[:2]):
        alone = written(kind, text, **arguments)
        for one, other in zip(found[row * count : (row + 1) * count], alone):
            assert one[: len(other)] == other  # padded behind it for a longer neighbour


# Pairs


class _Refused(Exception):
    """`generate` raised a `ValueError`."""


def _attempt(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        return _Refused(str(error))


def _drafts(arguments: dict) -> list[list[int]]:
    return written("blt", **arguments, self_speculation_window=3)


def _blocks(arguments: dict) -> list[list[int]]:
    return written("blocks", **arguments, diffusion_block_size=4, verify=True, confidence_threshold=0.5)


def _static(arguments: dict) -> list[list[int]]:
    return written("blt", **{**arguments, "cache_implementation": "static", "disable_compile": True})


def _continuous(arguments: dict) -> list[list[int]]:
    arguments = {"do_sample": False, "max_new_tokens": NUM_BYTES, **arguments}
    settings = {name: value for name, value in arguments.items() if name != "tokenizer" and value is not None}
    config = GenerationConfig(**{"pad_token_id": 0, "eos_token_id": 2, **settings})
    prompt = tokenizer(TEXT).input_ids
    torch.manual_seed(0)
    outputs = model_of("blt").generate_batch([prompt], generation_config=config, progress_bar=False)
    found = []
    for output in outputs.values():
        if output.error:
            raise ValueError(output.error)
        found.append(output.generated_tokens)
    return found


MODES = {"drafts": _drafts, "blocks": _blocks, "static": _static, "continuous": _continuous}
# What a way of writing refuses, by the words of its error.
REFUSALS = {
    "drafts": ("self_speculation_window",),
    "blocks": ("diffusion_block_size", "self_speculation_window"),
    "static": ("cache_implementation", "use_cache", "Static cache"),
    "continuous": ("num_beams",),
}


def draw_pairs() -> list[tuple[str, str, str]]:
    """Two arguments that ask nothing contrary, and a way of writing; drawn once for all by `SEED`."""
    draw, drawn = random.Random(SEED), []
    modes = list(MODES)
    while len(drawn) < NUM_PAIRS:
        first, second = draw.sample(list(ARGUMENTS), 2)
        one, other = ARGUMENTS[first], ARGUMENTS[second]
        contrary = any(name in one and one[name] != other[name] for name in other)
        # Its processor keeps a state, which the drafts of a Llama, too, ask out of order.
        contrary = contrary or "guidance_scale" in (first, second) and bool({first, second} & ONE_ROW)
        pair = (*sorted((first, second)), modes[len(drawn) % len(modes)])
        if not contrary and pair not in drawn:
            drawn.append(pair)
    return drawn


PAIRS = draw_pairs()


@pytest.mark.slow
@pytest.mark.parametrize("first, second, mode", PAIRS, ids=lambda value: value)
def test_two_arguments_on_a_llama(first, second, mode):
    """What is then asked of a BLT holds there: the text is the same with a cache and without, or is refused."""
    arguments = {**ARGUMENTS[first], **ARGUMENTS[second]}
    found = _attempt(written, "llama", **arguments)
    expected = _attempt(written, "llama", **{**without_drafts(arguments), "use_cache": False})
    assert str(found) == str(expected) or (isinstance(found, _Refused) and NEEDS_CACHE & {first, second})


@pytest.mark.parametrize("first, second, mode", PAIRS, ids=lambda value: value)
def test_two_arguments_ask_the_same_however_a_text_is_written(first, second, mode):
    arguments = {**ARGUMENTS[first], **ARGUMENTS[second]}
    found = _attempt(MODES[mode], arguments)
    if isinstance(found, _Refused):
        plain = _attempt(written, "blt", **arguments)
        assert isinstance(plain, _Refused) or any(word in str(found) for word in REFUSALS[mode]), str(found)
    else:
        assert found == written("blocks" if mode == "blocks" else "blt", **arguments)


# What comes with a text, and what may be handed in


@on(*CAUSAL)
def test_sampled_text_is_that_of_its_seed(kind):
    """The same draws of the same seed, and other ones of another."""
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 0.95, "max_new_tokens": 12}
    model, inputs = model_of(kind), encode(*TEXTS[:2])
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(model.generate(**inputs, **settings).tolist())
    assert texts[0] == texts[1] != texts[2]


@on(*CAUSAL)
def test_returned_logits_are_those_of_a_forward(kind):
    """`output_logits`, `output_scores` and `output_hidden_states` of each byte, in a padded batch."""
    model, batch = model_of(kind), encode()
    output = model.generate(
        **batch, max_new_tokens=6, do_sample=False, eos_token_id=None, return_dict_in_generate=True,
        output_logits=True, output_scores=True, output_hidden_states=True, temperature=None,
    )  # fmt: skip
    mask = torch.cat([batch.attention_mask, torch.ones(len(TEXTS), 6, dtype=torch.long)], dim=1)
    with torch.no_grad():
        whole = model(output.sequences, attention_mask=mask, use_cache=False, output_hidden_states=True)
    start = batch.input_ids.shape[1] - 1
    assert_same(torch.stack(output.logits, dim=1), whole.logits[:, start:-1], 1e-4)
    assert_same(torch.stack(output.scores, dim=1), whole.logits[:, start:-1], 1e-4)
    last = torch.stack([states[-1][:, -1] for states in output.hidden_states], dim=1)
    assert_same(last, whole.hidden_states[-1][:, start:-1], 1e-4)


@on(*CAUSAL)
def test_transition_scores_are_log_probabilities(kind):
    model, inputs = model_of(kind), tokenizer(TEXT, return_tensors="pt")
    output = model.generate(
        **inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    found = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    with torch.no_grad():
        logits = model(output.sequences, use_cache=False).logits[:, inputs.input_ids.shape[1] - 1 : -1]
    new = output.sequences[:, inputs.input_ids.shape[1] :]
    assert_same(found, logits.log_softmax(-1).gather(2, new[..., None])[..., 0], 1e-4)


@on(*CAUSAL)
def test_a_streamer_gives_the_text_as_it_is_written(kind):
    """From another thread, for a byte-level model as for any."""
    model, inputs = model_of(kind), tokenizer(TEXT, return_tensors="pt")
    settings = {"max_new_tokens": 12, "do_sample": False}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = Thread(target=model.generate, kwargs={**inputs, **settings, "streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == tokenizer.decode(write(model, TEXT, 12)) and streamed


class _After(StoppingCriteria):
    """Stops a row whose last byte is odd."""

    def __init__(self):
        self.asked = []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids.shape[1])
        return input_ids[:, -1] % 2 == 1


@on(*CAUSAL)
def test_a_stopping_criterion_is_asked_after_each_byte(kind):
    criterion = _After()
    written_ids = write(model_of(kind), TEXT, 20, stopping_criteria=StoppingCriteriaList([criterion]))
    start = len(tokenizer(TEXT).input_ids)
    assert criterion.asked == list(range(start + 1, start + 1 + len(written_ids)))
    assert written_ids[-1] % 2 == 1 and not any(i % 2 for i in written_ids[:-1])
    assert written_ids == write(model_of(kind), TEXT, 20)[: len(written_ids)]


class _Counting(LogitsProcessor):
    """Keeps a state: adds to a byte's logit by how often it was asked, and notes what it was shown."""

    def __init__(self):
        self.texts = []

    def __call__(self, input_ids, scores):
        self.texts.append(input_ids[0].tolist())
        return scores + 3 * torch.cos(torch.arange(scores.shape[1]) * len(self.texts))


@on(*CAUSAL)
def test_a_processor_with_a_state_sees_each_byte_once(kind):
    processor = _Counting()
    found = write(model_of(kind), TEXT, 10, logits_processor=LogitsProcessorList([processor]))
    prompt = tokenizer(TEXT).input_ids
    assert processor.texts == [prompt + found[:count] for count in range(len(found))]
    uncached = LogitsProcessorList([_Counting()])
    assert found == write(model_of(kind), TEXT, 10, logits_processor=uncached, use_cache=False)
    assert found != write(model_of(kind), TEXT, 10)


@pytest.mark.parametrize("mode", ["drafts", "blocks"])
def test_a_processor_with_a_state_under_drafts(mode):
    """The same text as without drafts, or a `ValueError` that names what does not go together."""
    kind, arguments = {
        "drafts": ("blt", {"self_speculation_window": 4}),
        "blocks": ("blocks", {"diffusion_block_size": 4, "verify": True}),
    }[mode]
    expected = write(model_of(kind), TEXT, 10, logits_processor=LogitsProcessorList([_Counting()]))
    try:
        found = write(model_of(kind), TEXT, 10, logits_processor=LogitsProcessorList([_Counting()]), **arguments)
    except ValueError as error:
        assert "logits_processor" in str(error)
    else:
        assert found == expected


@on(*CAUSAL)
def test_allowed_bytes_are_all_that_is_written(kind):
    """`prefix_allowed_tokens_fn` is asked for each row with its own text."""
    batch, asked = encode(*TEXTS[:2]), []

    def allowed(row, ids):
        asked.append((row, len(ids)))
        return list(range(100 + 50 * row, 120 + 50 * row))

    output = model_of(kind).generate(
        **batch, max_new_tokens=6, do_sample=False, prefix_allowed_tokens_fn=allowed
    )[:, -6:]  # fmt: skip
    assert ((output[0] >= 100) & (output[0] < 120)).all() and ((output[1] >= 150) & (output[1] < 170)).all()
    start = batch.input_ids.shape[1]
    assert asked == [(row, start + step) for step in range(6) for row in (0, 1)]


@on(*CAUSAL)
def test_a_negative_prompt_guides_away(kind):
    """Logits of both texts, mixed by `guidance_scale`, as written by hand."""
    model, scale = model_of(kind), 2.5
    ids, other = (tokenizer(text, return_tensors="pt").input_ids for text in (TEXT, "a negative prompt"))
    found = model.generate(ids, negative_prompt_ids=other, guidance_scale=scale, max_new_tokens=6, do_sample=False)
    text, negative = ids, other
    for _ in range(6):
        with torch.no_grad():
            plus, minus = (model(t, use_cache=False).logits[:, -1].log_softmax(-1) for t in (text, negative))
        new = (scale * (plus - minus) + minus).argmax(-1, keepdim=True)
        text, negative = torch.cat([text, new], dim=1), torch.cat([negative, new], dim=1)
    assert torch.equal(found, text)


@on(*CAUSAL)
def test_text_without_a_prompt_begins_with_a_bos(kind):
    model = model_of(kind)
    assert torch.equal(
        model.generate(max_new_tokens=5, do_sample=False),
        model.generate(torch.tensor([[1]]), max_new_tokens=5, do_sample=False),
    )


@on(*CAUSAL)
def test_a_configuration_that_is_handed_in_stays_as_it_was(kind):
    model = model_of(kind)
    config = GenerationConfig(
        max_new_tokens=5, do_sample=False, repetition_penalty=2.0, pad_token_id=0, eos_token_id=2
    )
    before, of_model = config.to_dict(), model.generation_config.to_dict()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    found = model.generate(ids, generation_config=config)
    assert config.to_dict() == before and model.generation_config.to_dict() == of_model
    assert torch.equal(found, model.generate(ids, max_new_tokens=5, do_sample=False, repetition_penalty=2.0))


@on(*CAUSAL)
def test_a_saved_generation_configuration_is_honoured(kind, tmp_path):
    model = make(kind)
    model.generation_config.update(max_new_tokens=5, repetition_penalty=2.5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert torch.equal(loaded.generate(ids), model.generate(ids, max_new_tokens=5, repetition_penalty=2.5))
    assert loaded.generate(ids).shape[1] == ids.shape[1] + 5


@on(*CAUSAL)
def test_a_loop_of_ones_own(kind):
    """`custom_generate`: a function that gets the model and what `generate` has prepared."""

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        while not bool(stopping_criteria(input_ids, None).all()):
            logits = model(input_ids, use_cache=False).logits[:, -1]
            input_ids = torch.cat([input_ids, logits_processor(input_ids, logits).argmax(-1, keepdim=True)], dim=1)
        return input_ids

    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    found = model_of(kind).generate(ids, custom_generate=loop, max_new_tokens=5, do_sample=False)
    assert found[0, ids.shape[1] :].tolist() == write(model_of(kind), TEXT, 5)


@on(*CAUSAL)
@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
def test_an_assistant_changes_no_byte(kind, schedule):
    """Another model of the same kind, and the model itself, draft; both schedules of transformers."""
    model = model_of(kind)
    expected = write(model, TEXT, 12)
    for assistant in (make(kind, seed=3), make("patcher")):
        assistant.generation_config.num_assistant_tokens = 4
        assistant.generation_config.num_assistant_tokens_schedule = schedule
        assert write(model, TEXT, 12, assistant_model=assistant) == expected


@on(*BOTH)
def test_drafts_of_the_first_layers(kind):
    """`assistant_early_exit` is for a model of one stack."""
    if kind == "llama":
        assert write(model_of(kind), TEXT, 6, assistant_early_exit=1) == write(model_of(kind), TEXT, 6)
    else:
        with pytest.raises(ValueError, match="assistant_early_exit"):
            write(model_of(kind), TEXT, 6, assistant_early_exit=1)


@on("blt", "patcher")
@pytest.mark.parametrize("implementation", ["offloaded", "quantized", "dynamic_full"])
def test_caches_of_other_kinds(kind, implementation):
    """What holds keys of one stack cannot hold bytes and patches."""
    with pytest.raises(ValueError, match="cache_implementation"):
        write(model_of(kind), cache_implementation=implementation)


@on(*BOTH)
def test_generate_from_embeddings(kind):
    """A Llama writes on from them; a BLT has no hashes and no patches of them, and says so."""
    model = model_of(kind)
    embeds = model.get_input_embeddings()(tokenizer(TEXT, return_tensors="pt").input_ids).detach()
    if kind == "llama":
        assert model.generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False)[0].tolist() == write(
            model, TEXT, 6
        )
    else:
        with pytest.raises(ValueError, match="inputs_embeds"):
            model.generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False)


@on(*CAUSAL)
def test_generate_in_training_mode_writes_the_same(kind):
    """Without dropout, and the mode is as before."""
    model = make(kind).train()
    assert write(model, TEXT, 6) == write(model_of(kind), TEXT, 6)
    assert model.training


@on("blt", "patcher")
def test_generate_with_gradient_checkpointing_on(kind):
    """A Llama runs, and writes another text: it reads the last token alone, and its cache is switched off."""
    model = make(kind).train()
    model.gradient_checkpointing_enable()
    with torch.no_grad():
        found = write(model, TEXT, 6)
    assert found == write(model_of(kind), TEXT, 6)
    assert model.training and model.is_gradient_checkpointing


@pytest.mark.parametrize("kind", [pytest.param("llama", marks=pytest.mark.slow), "blt"])
def test_continuous_requests_are_each_as_alone(kind):
    """Of many lengths, more of them than rows, some that end early."""
    prompts = [tokenizer(text).input_ids for text in (*TEXTS, *TEXTS[:2])]
    config = GenerationConfig(max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=list(range(200, 220)))
    outputs = model_of(kind).generate_batch(
        prompts, generation_config=config, progress_bar=False,
        continuous_batching_config=ContinuousBatchingConfig(max_requests_per_batch=2),
    )  # fmt: skip
    for prompt, output in zip(prompts, outputs.values()):
        alone = model_of(kind).generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
        assert output.generated_tokens == alone


def test_time_ends_a_text():
    """`max_time` is asked between bytes: a text that has no time has one byte."""
    for kind in CAUSAL:
        assert len(write(model_of(kind), TEXT, 20, stopping_criteria=[MaxTimeCriteria(max_time=0.0)])) == 1
