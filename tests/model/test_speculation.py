"""Self-speculation (BLT-S): drafts change nothing but the number of passes."""

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation import BaseStreamer

from blt_hf import speculation
from blt_hf.model.step_blt import StepRunner
from blt_hf.speculation import AutoSpeculation, Drafts, DraftSource, SelfSpeculation, accept
from blt_hf.tokenizer.tokenization import BltTokenizer
from helpers.checks import assert_samples_follow_the_model, cases
from helpers.models import draft_logits, make_model, model_for, rules, tiny_config
from helpers.texts import encode, pad, text_ids, texts


GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 24}


def count_passes(model) -> list[int]:
    """Bytes of each pass of the whole model, from now on."""
    sizes = []
    # The entropy model reads every byte once, and no draft.
    model.model.patcher.embed_tokens.register_forward_hook(
        lambda module, inputs, output: sizes.append(inputs[0].shape[1])
    )
    return sizes


@cases(15)
@given(rule=rules, text=texts, window=st.integers(1, 9), schedule=st.sampled_from(["constant", "heuristic"]))
def test_greedy_text_is_that_of_normal_decoding(rule, text, window, schedule):
    model, ids = model_for(rule), torch.tensor([text_ids(rule, text)])
    plain = model.generate(ids, **GREEDY)
    drafted = model.generate(ids, self_speculation_window=window, self_speculation_schedule=schedule, **GREEDY)
    assert torch.equal(plain, drafted)


@cases(8)
@given(
    rule=rules,
    rows=st.lists(texts, min_size=2, max_size=4),
    window=st.integers(1, 9),
    schedule=st.sampled_from(["constant", "heuristic"]),
    ends=st.booleans(),
)
def test_rows_of_a_batch_equal_rows_alone(rule, rows, window, schedule, ends):
    """Rows accept differently many drafts, and some end before others."""
    model, rows = model_for(rule), [text_ids(rule, row) for row in rows]
    ids, mask = pad(rows, "left")
    settings = {**GREEDY, "pad_token_id": 0}
    plain = model.generate(ids, attention_mask=mask, **settings)
    if ends:
        settings["eos_token_id"] = sorted({int(plain[0, -15]), int(plain[-1, -9])})
        plain = model.generate(ids, attention_mask=mask, **settings)
    drafted = model.generate(
        ids, attention_mask=mask, self_speculation_window=window, self_speculation_schedule=schedule, **settings
    )
    assert torch.equal(plain, drafted)
    for row, text in zip(rows, drafted[:, ids.shape[1] :].tolist()):
        alone = model.generate(torch.tensor([row]), self_speculation_window=window, **settings)[0, len(row) :].tolist()
        assert text[: len(alone)] == alone


class Stop(StoppingCriteria):
    """Stops a row after two bytes above 150."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids > 150).sum(dim=1) >= 3


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 11, "eos_token_id": [30, 99, 130]},
        {"stopping_criteria": [Stop()]},
        {"stopping_criteria": [Stop()], "eos_token_id": [30, 99, 130]},
        {"suppress_tokens": [44, 45], "forced_eos_token_id": 2},
        {"prefix_allowed_tokens_fn": lambda row, text: [4 + (len(text) * 7 + row * 11 + i) % 250 for i in range(3)]},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_what_generate_promises_of_each_row(settings):
    """Processors and criteria see each row with its own text, of its own length."""
    model = make_model(seed=5)
    ids, mask = pad([encode("some text"), encode("and é"), encode("x, y. z")], "left")
    settings = {**GREEDY, "attention_mask": mask, "return_dict_in_generate": True, "output_scores": True, **settings}
    plain = model.generate(ids, **settings)
    drafted = model.generate(ids, self_speculation_window=4, **settings)
    assert torch.equal(plain.sequences, drafted.sequences)
    pad_id = model.generation_config.pad_token_id
    for index, (ours, theirs) in enumerate(zip(drafted.scores, plain.scores)):
        written = plain.sequences[:, ids.shape[1] + index] != pad_id
        torch.testing.assert_close(ours[written], theirs[written], atol=1e-4, rtol=1e-4)


def test_stop_strings_of_each_row():
    model, tokenizer = make_model(seed=5), BltTokenizer()
    ids, mask = pad([encode("some text"), encode("and é")], "left")
    allowed = [ord(c) + 4 for c in "abcdefgh"]
    settings = {**GREEDY, "attention_mask": mask, "prefix_allowed_tokens_fn": lambda row, text: allowed}
    free = model.generate(ids, **settings)[:, ids.shape[1] :]
    stops = [tokenizer.decode(row[6:8]) for row in free]
    settings.update(stop_strings=stops, tokenizer=tokenizer)
    plain = model.generate(ids, **settings)
    assert plain.shape[1] < ids.shape[1] + 24
    assert torch.equal(model.generate(ids, self_speculation_window=5, **settings), plain)


def test_turns_go_on_from_rows_that_ended_differently():
    model = make_model(seed=5)
    rows = [encode("some text"), encode("and é"), encode("x, y. z")]
    ids, mask = pad(rows, "left")
    free = model.generate(ids, attention_mask=mask, **GREEDY)
    # No text holds the id of padding, by which the mask of the next turn is found.
    settings = {**GREEDY, "pad_token_id": 0, "suppress_tokens": [0]}
    settings["eos_token_id"] = [int(free[0, -15]), int(free[1, -9])]
    first = model.generate(
        ids, attention_mask=mask, self_speculation_window=4, return_dict_in_generate=True, **settings
    )
    turn = torch.tensor([encode(text)[1:] for text in ("abc", "1, ", "\n\nz")])
    new_mask = (first.sequences[:, ids.shape[1] :] != 0).long()
    whole_mask = torch.cat([mask, new_mask, torch.ones_like(turn)], dim=1)
    longer = torch.cat([first.sequences, turn], dim=1)
    settings["eos_token_id"] = None
    second = model.generate(
        longer, attention_mask=whole_mask, past_key_values=first.past_key_values, self_speculation_window=4, **settings
    )
    assert torch.equal(second, model.generate(longer, attention_mask=whole_mask, **settings))


def test_streams_are_those_of_normal_decoding():
    class Received(BaseStreamer):
        def __init__(self):
            self.ids = []

        def put(self, value):
            self.ids.append(value.tolist())

        def end(self):
            self.ids.append("end")

    model = make_model(seed=5)
    ids, mask = pad([encode("some text"), encode("and é")], "left")
    streamers = [Received(), Received()]
    for streamer, more in zip(streamers, ({}, {"self_speculation_window": 5})):
        model.generate(ids, attention_mask=mask, streamer=streamer, **GREEDY, **more)
    assert streamers[0].ids == streamers[1].ids


def agreeing_model():
    """A model whose global transformer says nothing, so that it accepts every draft."""
    model = make_model()
    with torch.no_grad():
        for cross in model.model.local_decoder.cross_attn_layers:
            cross.v_proj.weight.zero_()
    return model


def test_accepted_drafts_save_passes():
    model = agreeing_model()
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


@pytest.mark.parametrize(
    "settings", [{}, {"do_sample": True}, {"logits_processor": [], "repetition_penalty": 1.3}], ids=str
)
@pytest.mark.parametrize("rows", [1, 3])
def test_automatic_windows(rows, settings):
    """Greedy text does not depend on them, however the rounds are timed."""
    model = make_model(seed=3)
    ids = torch.tensor([encode("some text")] * rows)
    settings = {**GREEDY, "max_new_tokens": 60, **settings}
    text = model.generate(ids, self_speculation_window="auto", **settings)
    assert text.shape == (rows, ids.shape[1] + 60)
    if not settings["do_sample"]:
        assert text.equal(model.generate(ids, **settings))


@pytest.mark.parametrize(
    ("costs", "rate", "window"),
    [
        ({0: 10.0, 3: 22.0, 7: 30.0, 15: 46.0}, 0.95, 15),
        ({0: 10.0, 3: 22.0, 7: 30.0, 15: 46.0}, 0.8, 7),
        ({0: 10.0, 3: 22.0, 7: 30.0, 15: 46.0}, 0.2, 0),
        ({0: 10.0, 3: 50.0, 7: 90.0, 15: 170.0}, 0.99, 0),
    ],
)
def test_the_window_that_pays_is_taken(costs, rate, window):
    model = make_model()
    with torch.no_grad():
        cache = model(torch.tensor([encode("some text")]), use_cache=True).past_key_values
    source = AutoSpeculation(model.make_runner(cache), 1, do_sample=False)
    source.costs.update(costs)
    source.accepted, source.tried = rate, 1.0
    assert source.best_window() == window


def test_costs_are_measured_once_and_go_with_the_model():
    model = make_model()
    ids, settings = (
        torch.tensor([encode("some text")]),
        {**GREEDY, "max_new_tokens": 80, "self_speculation_window": "auto"},
    )
    model.generate(ids, **settings)
    (costs,) = AutoSpeculation._costs[model.model].values()
    assert set(costs) == {0, 3, 7, 15}
    before = dict(costs)
    model.generate(ids, **settings)
    assert costs == before
    count = len(AutoSpeculation._costs)
    del model
    gc.collect()
    assert len(AutoSpeculation._costs) < count


def test_windows_adapt_by_row():
    source = SelfSpeculation(None, 3, 4, is_adaptive=True, do_sample=False)
    source.update([4, 4, 0], [4, 1, 0])
    assert source.windows == [6, 3, 4]


def test_drafting_leaves_no_trace_in_the_cache():
    model = make_model()
    ids = torch.tensor([encode("some text, and more")])
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        draft_logits(StepRunner(model.model, cache, model.lm_head), torch.tensor([encode("wrong drafts")[1:]]))
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
        drafted = draft_logits(StepRunner(model.model, cache, model.lm_head), more)[:, -1]
        expected = model(torch.cat([ids, more], dim=1), use_cache=False).logits[:, -1]
    torch.testing.assert_close(drafted, expected, atol=1e-4, rtol=1e-4)


def test_another_source_of_drafts(monkeypatch):
    """Sources are asked for drafts and told what became of them; the text is the model's."""

    class Copy(DraftSource):
        """Drafts what stands at the beginning of each row."""

        def __init__(self):
            self.accepted = []

        def propose(self, text, cache, limits):
            lengths = [min(limit, 3 - row) for row, limit in enumerate(limits)]
            return Drafts(text.sequences[:, :3].clone(), lengths)

        def update(self, drafted, accepted):
            assert all(a <= d <= 3 - row for row, (d, a) in enumerate(zip(drafted, accepted)))
            self.accepted += accepted

    model, source = make_model(seed=5), Copy()
    monkeypatch.setattr(speculation, "make_source", lambda *args: source)
    ids, mask = pad([encode("some text"), encode("and é")], "left")
    drafted = model.generate(ids, attention_mask=mask, self_speculation_window=3, **GREEDY)
    assert torch.equal(drafted, model.generate(ids, attention_mask=mask, **GREEDY))
    assert source.accepted


@pytest.mark.parametrize("drawn", [True, False])
def test_choosing_keeps_the_distribution(drawn):
    """Chi-square of what one verification gives, in every place, for drafts that were drawn and that were not."""
    generator = torch.Generator().manual_seed(0)
    samples, size = 20000, 5
    scores = torch.randn(1, 3, size, generator=generator).expand(samples, -1, -1)
    probs = (torch.randn(1, 2, size, generator=generator)).softmax(dim=-1).expand(samples, -1, -1)
    torch.manual_seed(0)
    if drawn:
        ids = torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(samples, 2)
        drafts = Drafts(ids, [2] * samples, probs)
    else:
        drafts = Drafts(torch.tensor([[1, 2]]).expand(samples, -1), [2] * samples)
    ids, accepted = accept(scores, drafts, do_sample=True)
    for place in range(3):
        reached = ids[accepted >= place, place]
        expected = scores[0, place].softmax(dim=-1) * len(reached)
        chi_square = float(((torch.bincount(reached, minlength=size) - expected) ** 2 / expected).sum())
        assert len(reached) > 300 and chi_square < 18.5  # 4 degrees of freedom, p = 0.001


def test_sampling_keeps_the_distribution():
    ids = torch.tensor([encode("some text")])
    assert_samples_follow_the_model(make_model(), ids, 2000, 100, self_speculation_window=2)


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
        ({"self_speculation_window": 0}, "None, .auto., or at least 1 byte; got 0"),
        ({"self_speculation_window": 2, "self_speculation_schedule": "fast"}, "must be one of .*got 'fast'"),
        ({"diffusion_block_size": 4, "self_speculation_schedule": "fast"}, "must be one of .*got 'fast'"),
        ({"self_speculation_window": 2, "num_beams": 2}, "beam"),
        ({"self_speculation_window": 2, "use_cache": False}, "use_cache=True"),
    ],
)
def test_what_cannot_be_honoured_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(torch.tensor([encode("a")]), **{**GREEDY, **arguments})


def test_other_models_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="needs a BltForCausalLM; got BltPatcher"):
        model.model.patcher.generate(torch.tensor([encode("a")]), self_speculation_window=2, **GREEDY)
