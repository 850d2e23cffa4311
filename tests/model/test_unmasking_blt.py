"""Fast BLT, the decoding side: blocks that nobody verifies (BLT-D) against a slow loop, and verified ones (BLT-DV)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CompileConfig, GenerationConfig, LogitsProcessor

from blt_hf.fast_blt.blocks import Unmasking, read_block, read_last
from blt_hf.model.forward_blt import ForwardSettings
from helpers.checks import Received, assert_samples_follow_the_model, cases
from helpers.diffusion import diffusion_model, slow_decoder
from helpers.models import RULES, make_model
from helpers.texts import encode, text_ids, texts


PROMPT = "some text, and a bit more of it than a window holds"
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 24}
_models = {}


def model_with_blocks(rule: str = "entropy"):
    if rule not in _models:
        _models[rule] = diffusion_model(seed=1, **RULES[rule])
    return _models[rule]


@torch.no_grad()
def slow_block_logits(model, text: list[int], block: list[int | None]) -> torch.Tensor:
    """Logits `(K, V)` of a block behind `text`, without a cache; None is a mask. Those of its first byte are unused."""
    ids, length, total = torch.tensor([[*text, block[0]]]), len(text), len(text) + len(block)
    out = model.model(ids, use_cache=False, output_hidden_states=True, output_patches=True)
    lengths = [n for n in out.patch_lengths[0].tolist() if n]
    # The patch that the block's first byte may end is not known yet.
    starts = [start for i in range(1, len(lengths)) if (start := sum(lengths[:i])) <= length]
    latents = model.model.local_decoder.split_latents(out.global_hidden_states[-1])[0, : len(starts)]
    known = model.model.local_encoder.embed_tokens(torch.tensor([b or 0 for b in block[1:]]))
    embeds = [model.mask_embedding.weight[0] if b is None else known[i] for i, b in enumerate(block[1:])]
    states = torch.cat([out.encoder_hidden_states[-1][0], *(e[None] for e in embeds)])
    read = torch.tensor([sum(s <= p + 1 for s in starts) - 1 for p in range(length)] + [len(starts) - 1] * len(block))
    positions, window = torch.arange(total), model.config.local_attention_window_len or total
    is_mask = positions > length
    visible = (positions > positions[:, None] - window) & ((positions <= positions[:, None]) | is_mask[:, None])
    visible = visible & (is_mask[:, None] | ~is_mask)
    logits = model.lm_head(slow_decoder(model, states, latents, read, positions, visible)[length:])
    return torch.cat([logits[:1] * 0, logits[:-1]])


@torch.no_grad()
def slow_text(model, text: list[int], num_new: int, size: int, keeps) -> list[int]:
    """Greedy BLT-D; `keeps(probabilities of the masked positions) -> positions`."""
    text, goal = list(text), len(text) + num_new
    while len(text) < goal:
        text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        block = [text[-1]] + [None] * (size - 1)
        while None in block[: goal - len(text) + 1]:
            probs = slow_block_logits(model, text[:-1], block).softmax(dim=-1)
            for position in keeps({i: probs[i] for i, b in enumerate(block) if b is None}):
                block[position] = int(probs[position].argmax())
        text += [b for b in block[1:] if b is not None]
    return text[:goal]


def one_at_a_time(probs):
    return [max(probs, key=lambda i: float(probs[i].max()))]


def confident(threshold):
    def keeps(probs):
        return [i for i in probs if probs[i].max() >= threshold] or one_at_a_time(probs)

    return keeps


def within_budget(budget):
    def keeps(probs):
        entropies = {i: float(-(p * p.log()).sum()) for i, p in probs.items()}
        order = sorted(probs, key=entropies.get)
        count = sum(sum(entropies[i] for i in order[: n + 1]) <= budget for n in range(len(order)))
        return order[: max(count, 1)]

    return keeps


@pytest.mark.parametrize("rule", ["entropy", "static", "all_layers", "wide_cross", "full_windows"])
def test_one_byte_at_a_time_is_the_slow_loop(rule):
    model, ids = model_with_blocks(rule), encode(PROMPT)
    out = model.generate(torch.tensor([ids]), diffusion_block_size=5, confidence_threshold=1.5, **GREEDY)
    assert out[0].tolist() == slow_text(model, ids, 24, 5, one_at_a_time)


@pytest.mark.parametrize(
    ("options", "keeps"),
    [
        ({"confidence_threshold": 0.05}, confident(0.05)),
        ({"unmasking": "entropy", "entropy_budget": 12.0}, within_budget(12.0)),
        ({"unmasking": "entropy", "entropy_budget": -1.0}, within_budget(-1.0)),
    ],
)
def test_thresholds_decide_what_is_kept(options, keeps):
    model, ids = model_with_blocks(), encode(PROMPT)
    for size, num_new in ((4, 21), (5, 18)):
        out = model.generate(
            torch.tensor([ids]), diffusion_block_size=size, **options, **{**GREEDY, "max_new_tokens": num_new}
        )
        assert out[0].tolist() == slow_text(model, ids, num_new, size, keeps)


def test_unmasking_rules_on_a_few_bytes():
    probs = torch.tensor([[[0.7, 0.2, 0.1], [0.4, 0.3, 0.3], [0.62, 0.3, 0.08], [0.98, 0.01, 0.01]]])
    masked = torch.tensor([[True, True, True, False]])

    def kept(**options):
        return Unmasking(**options).choose(probs.log(), masked)[0].tolist()

    assert kept(confidence_threshold=0.6) == [True, False, True, False]
    assert kept(confidence_threshold=0.65) == [True, False, False, False]
    assert kept(confidence_threshold=1.5) == [True, False, False, False]
    # Entropies are 0.80, 1.09 and 0.86 nats.
    assert kept(rule="entropy", entropy_budget=0.5) == [True, False, False, False]
    assert kept(rule="entropy", entropy_budget=1.7) == [True, False, True, False]
    assert kept(rule="entropy", entropy_budget=3.0) == [True, True, True, False]


@cases(8)
@given(
    rule=st.sampled_from(sorted(set(RULES) - {"documents", "lexicon"})),
    text=texts,
    size=st.integers(2, 9),
)
def test_verified_greedy_text_is_that_of_normal_decoding(rule, text, size):
    model, ids = model_with_blocks(rule), torch.tensor([text_ids(rule, text)])
    plain = model.generate(ids, **GREEDY)
    assert torch.equal(plain, model.generate(ids, diffusion_block_size=size, verify=True, **GREEDY))


def padded_batch(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@pytest.mark.parametrize(
    "options",
    [
        {"verify": True},
        {"confidence_threshold": 0.05},
        {"unmasking": "entropy", "entropy_budget": 12.0},
    ],
)
def test_rows_of_a_batch_are_those_of_their_own(options):
    model = model_with_blocks()
    rows = [encode(text) for text in (PROMPT, "ab", "another text")]
    ids, mask = padded_batch(rows)
    out = model.generate(ids, attention_mask=mask, diffusion_block_size=5, **options, **GREEDY)
    for row, together in zip(rows, out[:, ids.shape[1] :]):
        alone = model.generate(torch.tensor([row]), diffusion_block_size=5, **options, **GREEDY)
        assert together.tolist() == alone[0, len(row) :].tolist()


@pytest.mark.parametrize("window", [150, None])
def test_blocks_of_a_text_that_does_not_fill_its_slots(window):
    """A short text leaves slots out until rows are as long as there are slots; blocks read as many as bytes do."""
    model = diffusion_model(seed=1, local_attention_window_len=window)
    ids = torch.tensor([encode(PROMPT)])
    plain = model.generate(ids, **{**GREEDY, "max_new_tokens": 150})
    verified = model.generate(ids, diffusion_block_size=8, verify=True, **{**GREEDY, "max_new_tokens": 150})
    assert torch.equal(verified, plain)


@pytest.mark.parametrize("verify", [True, False])
def test_eos_inside_a_block_ends_the_text(verify):
    model, ids = model_with_blocks(), torch.tensor([encode(PROMPT)])
    options = {"diffusion_block_size": 6, "verify": verify, "confidence_threshold": 0.05}
    free = model.generate(ids, **options, **GREEDY)[0, ids.shape[1] :].tolist()
    # The byte at index 1 is the first behind the whole model's own, so it stands inside a block.
    for index in (0, 1, 3, 6):
        eos, at = free[index], free.index(free[index])
        streamer = Received()
        out = model.generate(ids, **options, **{**GREEDY, "eos_token_id": eos}, streamer=streamer, pad_token_id=0)
        assert out[0, ids.shape[1] :].tolist() == free[: at + 1]
        assert sum((call if isinstance(call, list) else [call] for call in streamer.ids[1:]), []) == free[: at + 1]
        assert streamer.ended


@pytest.mark.parametrize("verify", [True, False])
def test_rows_that_end_early_are_padded_and_leave_the_others_alone(verify):
    model = model_with_blocks()
    rows = [encode(PROMPT), encode("ab")]
    ids, mask = padded_batch(rows)
    options = {"diffusion_block_size": 5, "verify": verify, "confidence_threshold": 0.05}
    free = model.generate(ids, attention_mask=mask, **options, **GREEDY)[:, ids.shape[1] :].tolist()
    eos = next(b for b in free[0] if b not in free[1][:20])
    out = model.generate(ids, attention_mask=mask, **options, **{**GREEDY, "eos_token_id": eos}, pad_token_id=0)[
        :, ids.shape[1] :
    ].tolist()
    end = free[0].index(eos) + 1
    other = free[1].index(eos) + 1 if eos in free[1] else len(free[1])
    assert out[0][:end] == free[0][:end] and not any(out[0][end:])
    assert out[1][:other] == free[1][:other]


@pytest.mark.parametrize("verify", [True, False])
def test_stop_strings_inside_a_block(verify):
    from blt_hf import BltTokenizer

    model, tokenizer, ids = model_with_blocks(), BltTokenizer(), torch.tensor([encode(PROMPT)])

    class Letters(LogitsProcessor):
        def __call__(self, input_ids, scores):
            allowed = torch.full_like(scores, float("-inf"))
            allowed[:, 101:127] = scores[:, 101:127]
            return allowed

    options = {
        "diffusion_block_size": 6,
        "verify": verify,
        "confidence_threshold": 0.05,
        "logits_processor": [Letters()],
    }
    free = tokenizer.decode(model.generate(ids, **options, **GREEDY)[0, ids.shape[1] :])
    stop = free[8:11]
    out = model.generate(ids, stop_strings=[stop], tokenizer=tokenizer, **options, **GREEDY)
    assert tokenizer.decode(out[0, ids.shape[1] :]) == free[: free.index(stop) + 3]


def test_blocks_are_streamed_as_they_are_finished():
    model, ids, streamer = model_with_blocks(), torch.tensor([encode(PROMPT)]), Received()
    out = model.generate(ids, diffusion_block_size=5, streamer=streamer, **GREEDY)
    streamed = sum((call if isinstance(call, list) else [call] for call in streamer.ids[1:]), [])
    assert streamed == out[0, ids.shape[1] :].tolist()


def test_one_pass_of_the_whole_model_reads_a_block():
    """24 bytes in blocks of 6: the prompt's pass gives the first byte, and each pass a block's 5 others and the next."""
    model, ids, sizes = diffusion_model(seed=1), torch.tensor([encode(PROMPT)]), []
    # The entropy model reads what the whole model reads.
    model.model.patcher.embed_tokens.register_forward_hook(
        lambda module, inputs, output: sizes.append(inputs[0].shape[1])
    )
    model.generate(ids, diffusion_block_size=6, confidence_threshold=0.0, **GREEDY)
    assert sizes == [ids.shape[1]] + [6] * 4


def test_the_cache_goes_on_from_there():
    """A second turn on the returned cache is that of the whole text."""
    model, ids = model_with_blocks(), torch.tensor([encode(PROMPT)])
    first = model.generate(
        ids,
        diffusion_block_size=5,
        confidence_threshold=0.05,
        return_dict_in_generate=True,
        output_scores=True,
        **GREEDY,
    )
    assert len(first.scores) == 24
    assert torch.equal(torch.stack(first.scores, dim=1).argmax(dim=-1), first.sequences[:, ids.shape[1] :])
    cache = first["past_key_values" if "past_key_values" in first else "cache"]
    second = model.generate(first.sequences, past_key_values=cache, **GREEDY)
    assert torch.equal(second, model.generate(first.sequences, **GREEDY))


@pytest.mark.parametrize("rule", ["entropy", "wide_cross"])
@torch.no_grad()
def test_a_row_without_a_byte_gives_numbers(rule):
    """It waits beside another, has no patch to read, and probabilities are drawn for all rows together."""
    model = model_with_blocks(rule)
    cache = model(torch.tensor([encode(PROMPT)] * 2), use_cache=True).past_key_values
    cache.reset_rows([1])
    last = torch.tensor([[100], [100]])
    settings = ForwardSettings.of(model.config)
    state = read_last(model, settings, cache, last)
    ids, is_masked = last.expand(2, 4), torch.tensor([False, True, True, True]).expand(2, 4)
    assert read_block(model, settings, cache, state, ids, is_masked).isfinite().all()


def test_sampling_from_one_candidate_is_greedy_decoding():
    model, ids = model_with_blocks(), torch.tensor([encode(PROMPT)])
    for options in ({"verify": True}, {"unmasking": "entropy", "entropy_budget": 12.0}):
        greedy = model.generate(ids, diffusion_block_size=5, **options, **GREEDY)
        sampled = model.generate(ids, diffusion_block_size=5, **options, **{**GREEDY, "do_sample": True, "top_k": 1})
        # A temperature, or `top_k`, changes confidences, so only the verified text must be the same.
        assert torch.equal(greedy, sampled) or "verify" not in options
        assert sampled.shape == greedy.shape


def test_verified_sampling_keeps_the_distribution():
    ids = torch.tensor([encode("some text")])
    assert_samples_follow_the_model(diffusion_model(), ids, 1000, 50, diffusion_block_size=3, verify=True)


@pytest.mark.slow
def test_compiled_blocks_write_the_same_text():
    model, ids = diffusion_model(seed=1), torch.tensor([encode(PROMPT)])
    compiled = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager", mode=None)}
    for options in ({"verify": True}, {"confidence_threshold": 0.05}):
        plain = model.generate(ids, diffusion_block_size=5, **options, **GREEDY)
        assert torch.equal(plain, model.generate(ids, diffusion_block_size=5, **options, **compiled, **GREEDY))


def test_the_fields_are_read_from_a_generation_config(tmp_path):
    model, ids = diffusion_model(seed=1), torch.tensor([encode(PROMPT)])
    options = {"diffusion_block_size": 4, "unmasking": "entropy", "entropy_budget": 12.0}
    expected = model.generate(ids, **options, **GREEDY)
    assert not torch.equal(expected, model.generate(ids, **GREEDY))
    assert torch.equal(expected, model.generate(ids, generation_config=GenerationConfig(**options, **GREEDY)))
    for name, value in options.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(expected, reloaded.generate(ids, **GREEDY))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"diffusion_block_size": 1}, "at least 2 bytes.*got 1"),
        ({"diffusion_block_size": 11}, "at most the local attention window; got 11 and a window of 10"),
        ({"diffusion_block_size": 4, "unmasking": "luck"}, "one of .*'entropy'.*got 'luck'"),
        ({"diffusion_block_size": 4, "confidence_threshold": "high"}, "`confidence_threshold` must be a number"),
        ({"diffusion_block_size": 4, "num_beams": 2}, "`diffusion_block_size` .*beam"),
        ({"diffusion_block_size": 4, "use_cache": False}, "`diffusion_block_size` needs `use_cache=True`"),
        ({"diffusion_block_size": 4, "self_speculation_window": 2}, "two ways to draft"),
        (
            {"diffusion_block_size": 4, "output_hidden_states": True, "return_dict_in_generate": True},
            "without hidden states",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        model_with_blocks().generate(torch.tensor([encode("a")]), **{**GREEDY, **arguments})


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="needs a model that was trained with blocks"):
        make_model().generate(torch.tensor([encode("a")]), diffusion_block_size=4, **GREEDY)
