"""Self-speculation (BLT-S): drafts change nothing but the number of passes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_exactness import encode, model_for, rules, text_ids, texts
from transformers import GenerationConfig

from conftest import make_model, tiny_config


GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 24}


def count_passes(model) -> list[int]:
    """Bytes of each pass of the whole model, from now on."""
    sizes = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return sizes


@given(rule=rules, text=texts, window=st.integers(1, 9), schedule=st.sampled_from(["constant", "heuristic"]))
def test_greedy_text_is_that_of_normal_decoding(rule, text, window, schedule):
    model, ids = model_for(rule), torch.tensor([text_ids(rule, text)])
    plain = model.generate(ids, **GREEDY)
    drafted = model.generate(ids, self_speculation_window=window, self_speculation_schedule=schedule, **GREEDY)
    assert torch.equal(plain, drafted)


def test_accepted_drafts_save_passes():
    """A model whose global transformer says nothing accepts every draft."""
    model = make_model()
    with torch.no_grad():
        for cross in model.model.local_decoder.cross_attn_layers:
            cross.v_proj.weight.zero_()
    ids = torch.tensor([encode("some text")])
    sizes = count_passes(model)
    model.generate(ids, self_speculation_window=4, **{**GREEDY, "max_new_tokens": 26})
    # The prompt gives one byte; then each pass verifies 4 drafts and gives a fifth byte.
    assert sizes == [ids.shape[1]] + [5] * 5


def test_the_window_adapts_when_asked():
    model = make_model()
    ids = torch.tensor([encode("some text")])
    sizes = count_passes(model)
    model.generate(ids, self_speculation_window=4, self_speculation_schedule="heuristic", **GREEDY)
    assert len(set(sizes[1:-1])) > 1


def test_drafting_leaves_no_trace_in_the_cache():
    model = make_model()
    ids = torch.tensor([encode("some text, and more")])
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        state = cache.snapshot()
        for byte in encode("wrong drafts")[1:]:
            model.draft_logits(torch.tensor([[byte]]), cache)
        cache.restore(state)
        rest = torch.tensor([encode(" of the same text")[1:]])
        out = model(rest, past_key_values=cache).logits
        expected = model(torch.cat([ids, rest], dim=1), use_cache=False).logits[:, ids.shape[1] :]
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_drafts_equal_the_whole_model_while_no_patch_ends():
    """Inside an open patch the draft is the model's own prediction."""
    model = make_model(tiny_config(patching_mode="static", patch_size=50))
    ids, more = torch.tensor([encode("ab")]), torch.tensor([encode("cdefgh")[1:]])
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        drafted = model.draft_logits(more, cache)
        expected = model(torch.cat([ids, more], dim=1), use_cache=False).logits[:, -1]
    torch.testing.assert_close(drafted, expected, atol=1e-4, rtol=1e-4)


def test_sampling_keeps_the_distribution():
    """Chi-square of the second and third byte against the exact distribution, on few possible bytes."""
    model = make_model()
    with torch.no_grad():  # only six bytes are ever likely, and the global transformer matters
        model.lm_head.weight[10:] = 0
        model.lm_head.weight[:10] *= 2
    allowed = torch.arange(4, 10)
    ids = torch.tensor([encode("some text")])

    def only_allowed(row, prefix):
        return allowed.tolist()

    with torch.no_grad():
        probabilities = torch.zeros(6, 6, 6)
        for first in range(6):
            for second in range(6):
                row = torch.cat([ids[0], allowed[[first, second]]])[None]
                logits = model(row, use_cache=False).logits[0, -3:, allowed].softmax(dim=-1)
                probabilities[first, second] = logits[0, first] * logits[1, second] * logits[2]
    torch.manual_seed(0)
    samples = 500
    counts = torch.zeros(6, 6, 6)
    for _ in range(samples):
        out = model.generate(
            ids, do_sample=True, top_k=0, max_new_tokens=4, eos_token_id=None, self_speculation_window=2,
            prefix_allowed_tokens_fn=only_allowed,
        )  # fmt: skip
        counts[tuple((out[0, -4:-1] - 4).tolist())] += 1
    for keep in (1, 2):  # marginals of the two drafted or corrected bytes; the first comes from the prompt's pass
        others = tuple(axis for axis in range(3) if axis != keep)
        expected = probabilities.sum(dim=others) * samples
        observed = counts.sum(dim=others)
        chi_square = float(((observed - expected) ** 2 / expected).sum())
        assert chi_square < 20.5  # 5 degrees of freedom, p = 0.001


def test_the_field_is_read_from_a_generation_config(tmp_path):
    model = make_model()
    model.generation_config.self_speculation_window = 3
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path).eval()
    sizes = count_passes(reloaded)
    ids = torch.tensor([encode("some text")])
    out = reloaded.generate(ids, **GREEDY)
    assert max(sizes[1:]) > 1
    model.generation_config.self_speculation_window = None
    assert torch.equal(out, model.generate(ids, **GREEDY))
    config = GenerationConfig(self_speculation_window=2, **GREEDY)
    assert torch.equal(out, model.generate(ids, generation_config=config))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"self_speculation_window": 0}, "at least 1 byte; got 0"),
        ({"self_speculation_window": 2, "self_speculation_schedule": "fast"}, "must be one of .*got 'fast'"),
        ({"self_speculation_window": 2, "num_beams": 2}, "beam"),
        ({"self_speculation_window": 2, "use_cache": False}, "use_cache=True"),
    ],
)
def test_what_cannot_be_honoured_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(torch.tensor([encode("a")]), **{**GREEDY, **arguments})


def test_batches_and_other_models_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="one row at a time.*got 2 rows"):
        model.generate(torch.tensor([encode("a")] * 2), self_speculation_window=2, **GREEDY)
    with pytest.raises(ValueError, match="needs a BltForCausalLM; got BltPatcher"):
        model.model.patcher.generate(torch.tensor([encode("a")]), self_speculation_window=2, **GREEDY)
