"""`generate()` as people call it: every strategy with the cache gives what it gives without one."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

from blt_hf import BltConfig, BltForCausalLM
from blt_hf.model.cache_blt import BltCache
from blt_hf.tokenizer.tokenization import BltTokenizer
from helpers.models import make_model, step_logits, tiny_config
from helpers.texts import encode


GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 30}


@pytest.fixture(scope="module")
def model() -> BltForCausalLM:
    return make_model(seed=11)


@pytest.fixture(scope="module")
def assistant() -> BltForCausalLM:
    """A smaller BLT of its own, with other patches, that agrees now and then."""
    return make_model(tiny_config(decoder_config={"num_hidden_layers": 1}), seed=11)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.tensor([encode("The quick brown fox, über 13 dogs")])


@pytest.fixture
def batch():
    rows = [encode("The quick brown fox"), encode("速い"), encode("a\nb, c. 12")]
    width = max(map(len, rows))
    ids, mask = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :], mask[index, width - len(row) :] = torch.tensor(row), 1
    return rows, ids, mask


@pytest.fixture(scope="module")
def tokenizer() -> BltTokenizer:
    return BltTokenizer()


@torch.no_grad()
def greedy_by_hand(model, ids, num_bytes: int) -> torch.Tensor:
    for _ in range(num_bytes):
        logits = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return ids


def test_no_special_arguments(model, ids):
    """The default: a cache, and a stop at `eos`."""
    model.generation_config.max_length = 45
    try:
        torch.manual_seed(0)
        text = model.generate(ids)
    finally:
        model.generation_config.max_length = None
    assert text.shape[1] == 45 or text[0, -1] == 2
    assert torch.equal(text[:, : ids.shape[1]], ids)


def test_greedy_is_the_argmax_loop(model, ids):
    expected = greedy_by_hand(model, ids, 30)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), expected)
    assert len(set(expected[0, -30:].tolist())) > 5, "a text that repeats one byte would prove little"


def test_a_new_model_knows_its_special_ids(tmp_path):
    """Real files carry no special ids; a BLT's are 0, 1 and 2 all the same."""
    model = BltForCausalLM(tiny_config(patching_mode="space"))
    for known in (model, _reloaded(model, tmp_path)):
        config = known.generation_config
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert model.generate(max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, 4), "from BOS alone"
    kept = BltForCausalLM(tiny_config(eos_token_id=[2, 14], pad_token_id=3, patching_mode="space"))
    assert (kept.generation_config.eos_token_id, kept.generation_config.pad_token_id) == ([2, 14], 3)


def _reloaded(model, path):
    model.save_pretrained(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    return BltForCausalLM.from_pretrained(path)


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": True},
        {"do_sample": True, "top_p": 0.9, "temperature": 0.7, "repetition_penalty": 1.3},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.5, "do_sample": False},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": False, "no_repeat_ngram_size": 2},
        {"do_sample": False, "guidance_scale": 1.5},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_strategies_with_and_without_a_cache(model, batch, arguments):
    _, ids, mask = batch
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(4)
        texts.append(
            model.generate(
                ids, attention_mask=mask, max_new_tokens=20, eos_token_id=None, use_cache=use_cache, **arguments
            )
        )
    assert torch.equal(*texts)
    assert texts[0].shape == (3 * arguments.get("num_return_sequences", 1), ids.shape[1] + 20)


def test_batches_of_unequal_prompts(model, batch):
    rows, ids, mask = batch
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    for index, row in enumerate(rows):
        alone = model.generate(torch.tensor([row]), **GREEDY)
        assert together[index, ids.shape[1] :].tolist() == alone[0, len(row) :].tolist()


def test_the_mask_is_inferred_from_padding(model, batch):
    rows, ids, mask = batch
    inferred = model.generate(ids, pad_token_id=0, **GREEDY)
    assert torch.equal(inferred, model.generate(ids, attention_mask=mask, pad_token_id=0, **GREEDY))


def test_prefill_in_chunks(model, batch):
    _, ids, mask = batch
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    for size in (1, 3, 7, 100):
        assert torch.equal(model.generate(ids, attention_mask=mask, prefill_chunk_size=size, **GREEDY), expected)


class CountForwards:
    """Bytes that each forward of the model is given."""

    def __init__(self, model):
        self.sizes = []
        self.hook = model.model.register_forward_pre_hook(
            lambda module, args, kwargs: self.sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )

    def __enter__(self):
        return self.sizes

    def __exit__(self, *exception):
        self.hook.remove()


def test_each_step_reads_one_byte(model, ids):
    with CountForwards(model) as sizes:
        model.generate(ids, **GREEDY)
    assert sizes == [ids.shape[1]] + [1] * 29


@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
def test_assisted_decoding_is_greedy(model, assistant, ids, schedule):
    expected = model.generate(ids, **GREEDY)
    assistant = copy.deepcopy(assistant)
    assistant.generation_config.num_assistant_tokens_schedule = schedule
    assistant.generation_config.num_assistant_tokens = 4
    with CountForwards(model) as sizes:
        assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), expected)
    assert max(sizes[1:]) > 1, "drafts were verified in one forward"


def test_a_perfect_assistant_saves_forwards(model, ids):
    twin = copy.deepcopy(model)
    twin.generation_config.num_assistant_tokens = 6
    twin.generation_config.num_assistant_tokens_schedule = "constant"
    twin.generation_config.assistant_confidence_threshold = 0.0
    expected = model.generate(ids, **GREEDY)
    with CountForwards(model) as sizes:
        assert torch.equal(model.generate(ids, assistant_model=twin, **GREEDY), expected)
    assert len(sizes) <= 6


def test_assisted_sampling_runs(model, assistant, ids):
    torch.manual_seed(0)
    text = model.generate(ids, assistant_model=assistant, do_sample=True, max_new_tokens=25, eos_token_id=None)
    assert text.shape == (1, ids.shape[1] + 25)


@pytest.mark.parametrize("text", ["abc abc abc abd ab", "one two one two one"])
def test_prompt_lookup_is_greedy(model, text):
    ids = torch.tensor([encode(text)])
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, max_matching_ngram_size=2, **GREEDY), expected)


def test_assisted_decoding_for_every_rule(ids):
    for rule in (
        {"max_patch_length": 3},
        {"monotonicity": True},
        {"patching_mode": "space"},
        {"patching_mode": "byte"},
    ):
        model = make_model(tiny_config(**rule), seed=2)
        draft = make_model(tiny_config(), seed=2)
        assert torch.equal(model.generate(ids, assistant_model=draft, **GREEDY), model.generate(ids, **GREEDY)), rule


def token_model_and_tokenizer(text: str):
    """A tiny Llama over tokens of some bytes each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.mark.parametrize("num_drafts", [4, 25])
def test_a_blt_assists_a_token_model(assistant, tokenizer, num_drafts):
    """Universal assisted decoding: drafts of bytes, read as tokens, of which many are refused and taken back."""
    target, target_tokenizer = token_model_and_tokenizer("The quick brown fox jumps over the lazy dog. " * 3)
    ids = target_tokenizer("The quick brown", return_tensors="pt").input_ids
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    assistant = copy.deepcopy(assistant)
    assistant.generation_config.num_assistant_tokens = num_drafts
    assistant.generation_config.assistant_confidence_threshold = 0.0
    assisted = target.generate(
        ids, assistant_model=assistant, tokenizer=target_tokenizer, assistant_tokenizer=tokenizer, **settings
    )
    assert torch.equal(assisted, target.generate(ids, **settings))


# Stopping and streaming.


def most_likely_bytes(model, ids, count):
    return model.generate(ids, **{**GREEDY, "max_new_tokens": count})[0, ids.shape[1] :].tolist()


def test_eos_stops_and_pads(model, batch):
    rows, ids, mask = batch
    free = model.generate(ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    eos = int(free[0, 7])
    text = model.generate(
        ids, attention_mask=mask, do_sample=False, eos_token_id=eos, pad_token_id=0, max_new_tokens=30
    )
    for row, expected in zip(text[:, ids.shape[1] :].tolist(), free.tolist()):
        stop = expected.index(eos) + 1 if eos in expected else 30
        assert row[:stop] == expected[:stop]
        assert set(row[stop:]) <= {0}


def test_the_default_stop_is_eos(ids):
    model = make_model(seed=11)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every id is as likely; argmax takes the first
        model.lm_head.weight[2] = 0.0
    text = model.generate(ids, do_sample=False, max_new_tokens=5, suppress_tokens=[0, 1])
    assert text[0, ids.shape[1] :].tolist() == [2]


def test_stop_strings(model, ids, tokenizer):
    produced = most_likely_bytes(model, ids, 20)
    for start in range(4, 17):
        stop = tokenizer.decode_bytes(produced[start : start + 2])
        if all(32 < byte < 127 for byte in stop):
            break
    else:
        stop = None
    if stop is None:  # the model's text is not ASCII; stop at what it can say
        model = make_model(seed=11)
        with torch.no_grad():
            model.lm_head.weight[: ord("a") + 4] -= 50 * model.lm_head.weight.abs().max()
        mask = torch.full((260,), -1e4)
        mask[ord("a") + 4 : ord("z") + 5] = 0
        model.lm_head.bias = torch.nn.Parameter(mask)
        produced = most_likely_bytes(model, ids, 20)
        start = 4
        stop = tokenizer.decode_bytes(produced[start : start + 2])
    stop = stop.decode()
    text = model.generate(
        ids, do_sample=False, eos_token_id=None, max_new_tokens=20, stop_strings=[stop], tokenizer=tokenizer
    )
    new = tokenizer.decode(text[0, ids.shape[1] :])
    first = tokenizer.decode(produced).index(stop) + len(stop)
    assert new == tokenizer.decode(produced)[:first]


def test_stopping_criteria(model, ids):
    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= ids.shape[1] + 6)

    text = model.generate(ids, stopping_criteria=[After()], **GREEDY)
    assert text.shape[1] == ids.shape[1] + 6


def test_streamers(model, ids, tokenizer, capsys):
    expected = tokenizer.decode(model.generate(ids, **GREEDY)[0, ids.shape[1] :], skip_special_tokens=True)
    model.generate(ids, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), **GREEDY)
    assert capsys.readouterr().out == expected + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(ids, streamer=streamer, **GREEDY)
    assert "".join(streamer) == expected


# What generate returns, and what may be passed back.


def test_return_dict(model, batch):
    _, ids, mask = batch
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    out = eager.generate(
        ids,
        attention_mask=mask,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
        **GREEDY,
    )
    new = out.sequences[:, ids.shape[1] :]
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == len(out.attentions) == 30
    assert torch.equal(torch.stack([scores.argmax(-1) for scores in out.scores], dim=1), new)
    full_mask = torch.cat([mask, torch.ones_like(new)], dim=1)
    with torch.no_grad():
        full = eager(out.sequences, attention_mask=full_mask, use_cache=False, output_hidden_states=True)
    logits = torch.stack(out.logits, dim=1)
    torch.testing.assert_close(logits, full.logits[:, ids.shape[1] - 1 : -1], atol=1e-4, rtol=1e-4)
    last = torch.cat([step[-1][:, -1:] for step in out.hidden_states], dim=1)
    torch.testing.assert_close(last, full.hidden_states[-1][:, ids.shape[1] - 1 : -1], atol=1e-4, rtol=1e-4)
    assert all(step[-1].shape[-2] == 1 for step in out.attentions[1:])
    assert isinstance(out.past_key_values, BltCache)
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1
    scores = eager.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert scores.shape == new.shape and (scores <= 0).all()


def test_turns_reuse_the_cache(model, ids):
    """What `generate` returns, with the next turn appended, continues without reading the past again."""
    reply = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([reply.sequences, torch.tensor([encode(" and then?")[1:]])], dim=1)
    expected = model.generate(longer, **GREEDY)
    with CountForwards(model) as sizes:
        second = model.generate(longer, past_key_values=reply.past_key_values, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(second.sequences, expected)
    assert sizes[0] == longer.shape[1] - (reply.sequences.shape[1] - 1)
    third_ids = torch.cat([second.sequences, torch.tensor([encode("!")[1:]])], dim=1)
    third = model.generate(third_ids, past_key_values=second.past_key_values, **GREEDY)
    assert torch.equal(third, model.generate(third_ids, **GREEDY))


def test_batches_of_turns_reuse_the_cache(model, batch):
    _, ids, mask = batch
    first = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    turn = torch.tensor([encode(text)[1:] for text in ("abcdefg", "1, 2, 3", "\n\nzyx z")])
    longer = torch.cat([first.sequences, turn], dim=1)
    mask = torch.cat([mask, torch.ones(3, longer.shape[1] - ids.shape[1], dtype=torch.int64)], dim=1)
    mask[1, -3:-1] = 0  # padding between texts
    mask[1, first.sequences.shape[1]] = 0
    second = model.generate(longer, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(second, model.generate(longer, attention_mask=mask, **GREEDY))


def test_a_cache_of_a_forward_is_a_prompt(model, ids):
    """A shared prefix is read once; each continuation takes its copy."""
    with torch.no_grad():
        prefix = model(ids[:, :20], use_cache=True).past_key_values
    for tail in (" one", ", two", "速"):
        longer = torch.cat([ids[:, :20], torch.tensor([encode(tail)[1:]])], dim=1)
        with CountForwards(model) as sizes:
            text = model.generate(longer, past_key_values=copy.deepcopy(prefix), **GREEDY)
        assert sizes[0] == longer.shape[1] - 20
        assert torch.equal(text, model.generate(longer, **GREEDY))


def test_a_cache_made_by_hand(model, ids):
    cache = BltCache(model.config)
    text = model.generate(ids, past_key_values=cache, **GREEDY)
    assert torch.equal(text, model.generate(ids, **GREEDY))
    assert cache.get_seq_length() == text.shape[1] - 1


def test_multi_turn_after_assisted_decoding(model, assistant, ids):
    """Drafts that were refused leave nothing in a cache that is passed back."""
    first = model.generate(ids, assistant_model=assistant, return_dict_in_generate=True, **GREEDY)
    seen = first.past_key_values.get_seq_length()
    assert seen <= first.sequences.shape[1]
    longer = torch.cat([first.sequences, torch.tensor([encode(" more")[1:]])], dim=1)
    text = model.generate(longer, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(text, model.generate(longer, **GREEDY))


@pytest.mark.parametrize("arguments", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_beams_from_a_cache(model, ids, arguments):
    with torch.no_grad():
        cache = model(ids[:, :-1].repeat(arguments["num_beams"], 1), use_cache=True).past_key_values
    values = {**GREEDY, **arguments, "max_new_tokens": 12}
    assert torch.equal(model.generate(ids, past_key_values=cache, **values), model.generate(ids, **values))


# Limits.


@pytest.mark.parametrize("implementation", ["quantized", "offloaded", "sliding_window"])
def test_other_caches_are_refused(model, ids, implementation):
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(ids, cache_implementation=implementation, **GREEDY)


def test_the_dynamic_cache_is_ours(model, ids):
    out = model.generate(ids, cache_implementation="dynamic", return_dict_in_generate=True, **GREEDY)
    assert type(out.past_key_values) is BltCache
    assert torch.equal(out.sequences, model.generate(ids, **GREEDY))


def test_unknown_arguments_are_refused(model, ids):
    with pytest.raises(ValueError, match="patch_length"):
        model.generate(ids, patch_length=torch.ones(1, 3), **GREEDY)


def test_lengths(model, ids):
    assert (
        model.generate(ids, do_sample=False, eos_token_id=None, max_length=ids.shape[1] + 4).shape[1]
        == ids.shape[1] + 4
    )
    config = GenerationConfig(max_new_tokens=3, do_sample=False)
    assert model.generate(ids, generation_config=config, eos_token_id=None).shape[1] == ids.shape[1] + 3
    eos = most_likely_bytes(model, ids, 1)[0]
    text = model.generate(ids, do_sample=False, eos_token_id=eos, min_new_tokens=5, max_new_tokens=9)
    assert text.shape[1] >= ids.shape[1] + 5


def test_training_mode_generates_the_same(model, ids):
    """Callbacks generate in the middle of training; without dropout the mode is no difference."""
    expected = model.generate(ids, **GREEDY)
    model.train()
    try:
        assert torch.equal(model.generate(ids, **GREEDY), expected)
    finally:
        model.eval()


def test_use_cache_off_in_the_config(ids):
    model = make_model(tiny_config(use_cache=False), seed=11)
    assert isinstance(model.config, BltConfig) and not model.config.use_cache
    assert torch.equal(model.generate(ids, **GREEDY), greedy_by_hand(model, ids, 30))


def test_reference_decoding_modes_need_remote_code(model, ids):
    """transformers moved these out of the library; ours says what transformers says, and does not run on."""
    for arguments in (
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    ):
        with pytest.raises(ValueError, match="trust_remote_code"):
            model.generate(ids, max_new_tokens=3, **arguments)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", [{}, {"self_speculation_window": 4}])
def test_generation_with_the_forward_of_mixed_precision(attention, settings, batch):
    """Trainer leaves accelerate's autocast around `forward`, and the text goes on with or without it."""
    _, ids, mask = batch
    model = make_model(seed=11)
    model.set_attn_implementation(attention)
    plain = model.forward

    def forward(*arguments, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(*arguments, **kwargs)

    model.forward = forward
    out = model.generate(ids, attention_mask=mask, **GREEDY, **settings)
    assert out.shape == (3, ids.shape[1] + 30)
    read = model(ids, attention_mask=mask, use_cache=True)
    kept = [tensor.values for slots in read.past_key_values.kinds for tensor in slots.tensors]
    assert {t.dtype for t in kept if t is not None and t.is_floating_point()} == {torch.float32}
    following = step_logits(model, ids[:, -1:], read.past_key_values)
    assert following.shape == (3, 1, 260) and torch.isfinite(following).all()
