"""Captured steps write what steps that run as they are write; a CPU plays the GPU that captures them."""

import copy
import threading

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import ContinuousBatchingConfig, LogitsProcessor, StoppingCriteria

from blt_hf import BltCache, register_patching_rule
from blt_hf.cuda_graphs import CudaGraphs, ModuleState
from blt_hf.model import step_blt
from blt_hf.model.step_blt import StepRunner
from helpers.checks import assert_same
from helpers.diffusion import diffusion_model
from helpers.models import RULES, draft_logits, greedy, make_model, model_for, step_logits, tiny_config
from helpers.tape import Tape, record_on_tapes
from helpers.texts import TEXTS, encode, pad, rows_of, text_ids


@pytest.fixture(autouse=True)
def tapes() -> list[Tape]:
    """What was captured."""
    with record_on_tapes() as made:
        yield made


STATIC = {"cache_implementation": "static", "disable_compile": True}
SETTINGS = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def replays(tapes: list[Tape]) -> int:
    return sum(tape.replays for tape in tapes)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_captured_steps_write_the_same_text(rule, rows, tapes):
    model = model_for(rule)
    ids, mask = pad([row[: 12 - 2 * i] for i, row in enumerate(rows_of(rule, 12)[:rows])], "left")
    expected = model.generate(ids, attention_mask=mask, **SETTINGS)
    assert not tapes
    assert torch.equal(model.generate(ids, attention_mask=mask, **SETTINGS, **STATIC), expected)
    assert replays(tapes) > 24  # one graph for each byte but the first three and the last


def test_logits_are_kept_and_equal(tapes):
    """What the caller holds is not written over by the next byte."""
    model, ids = model_for("entropy"), torch.tensor([rows_of("entropy", 12)[0]])
    more = {**SETTINGS, "return_dict_in_generate": True, "output_logits": True}
    plain, recorded = model.generate(ids, **more), model.generate(ids, **more, **STATIC)
    assert_same(torch.stack(recorded.logits), torch.stack(plain.logits))
    assert replays(tapes) > 24


@pytest.mark.parametrize(
    "settings",
    [
        {"self_speculation_window": 4},
        {"self_speculation_window": 5, "self_speculation_schedule": "heuristic"},
        {"diffusion_block_size": 4, "verify": True},
        {"diffusion_block_size": 4},
        {"eos_token_id": [4, 30, 99, 130], "min_new_tokens": 9},
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 2])
def test_drafts_blocks_and_rows_that_end(settings, rows, tapes):
    model = diffusion_model(seed=1)
    ids, mask = pad([encode("some text, and more")[: 18 - 5 * row] for row in range(rows)], "left")
    settings = {"attention_mask": mask, **SETTINGS, **settings}
    assert torch.equal(model.generate(ids, **settings, **STATIC), model.generate(ids, **settings))
    assert replays(tapes) > 2


def test_rows_that_join_and_leave(tapes):
    """Continuous batching with a static cache."""
    model, outputs = make_model(), []
    for static in ({}, STATIC):
        found = model.generate_batch(
            [encode(text) for text in TEXTS],
            generation_config=greedy(max_new_tokens=9, eos_token_id=-1, **static),
            continuous_batching_config=ContinuousBatchingConfig(max_requests_per_batch=3),
        )
        assert all(output.error is None for output in found.values())
        outputs.append([output.generated_tokens for output in found.values()])
    assert outputs[0] == outputs[1]
    assert replays(tapes) > 10


@torch.no_grad()
@pytest.mark.parametrize("rule", ["entropy", "documents", "wide_cross", "full_windows"])
def test_tensors_that_move(rule, tapes):
    """Rows that grow beyond all room, are taken back, change places; a cache that is copied, or emptied."""
    model, row = model_for(rule), text_ids(rule, "some text, with 2 lines\nand words of many lengths " * 4)
    ids = torch.tensor([row, [1, *row[:0:-1]]])
    caches = [BltCache(model.config), BltCache(model.config)]
    caches[0].fix_steps()  # no room at first

    def read(start: int, stop: int):
        before = replays(tapes)
        for index in range(start, stop):
            one, two = (runner.step(ids[:, index : index + 1]) for runner in runners)
            assert_same(one, two)
        assert replays(tapes) > before

    def make_runners():
        found = [model.make_runner(cache) for cache in caches]
        assert found[0].graphs is not None and found[1].graphs is None
        return found

    for cache in caches:
        model(ids[:, :1], past_key_values=cache)
    runners = make_runners()
    read(1, 40)
    for change in (
        lambda cache: cache.crop(-4),
        lambda cache: cache.select_rows(torch.tensor([1, 0])),
        lambda cache: cache.crop_rows([2, 0]),
        lambda cache: cache.reset_rows([1]),
        lambda cache: cache.activate_past_recording(),
        lambda cache: (cache.reset(), model(ids[:, 38:40], past_key_values=cache)),
    ):
        for cache in caches:
            change(cache)
        read(40, 52)
        runners[0].close()
        caches = [copy.deepcopy(cache) for cache in caches]
        runners = make_runners()
    assert replays(tapes) > 150


@torch.no_grad()
def test_what_is_not_recorded_in_between(tapes):
    """Whole forwards on the cache of captured steps, which run as they are."""
    model, row = model_for("entropy"), text_ids("entropy", "some text, with 2 lines\nand words " * 2)
    caches = [BltCache(model.config), BltCache(model.config)]
    caches[0].fix_steps(None, 100)
    for cache in caches:
        model(torch.tensor([row[:2]]), past_key_values=cache)
    runners = [model.make_runner(cache) for cache in caches]
    for index, byte in enumerate(torch.tensor(row)[2:, None, None]):
        found = []
        for cache, runner in zip(caches, runners):
            if index % 3:
                found.append(runner.step(byte))
            elif index % 2:
                found.append(step_logits(model, byte, cache))
            else:
                found.append(model(byte, past_key_values=cache).logits)
            drafts = [draft_logits(r, byte) for r in (runner, StepRunner(model.model, cache, model.lm_head))]
            found[-1] = torch.cat([found[-1].flatten(), *(draft.flatten() for draft in drafts)])
        assert_same(found[0], found[1])
    assert replays(tapes) > 150


class Constant(LogitsProcessor):
    """Changes the model while it writes."""

    def __init__(self, change):
        self.change, self.count = change, 0

    def __call__(self, input_ids, scores):
        self.count += 1
        if self.count == 15:
            self.change()
        return scores


@pytest.mark.parametrize("change", ["weights", "threshold", "hook", "precision", "attention"])
def test_changes_are_noticed(change, tapes):
    def text(static: dict):
        model = make_model(seed=5)

        def do():
            if change == "weights":
                model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0))
            elif change == "threshold":
                model.config.patching_threshold = 0.0
            elif change == "hook":
                model.model.local_decoder.register_forward_hook(lambda m, args, output: output * 2)
            elif change == "precision":
                model.model.local_decoder.double()
                model.lm_head.double()
            else:
                model.set_attn_implementation("eager")

        ids = torch.tensor([rows_of("entropy", 12)[0]])
        return model.generate(ids, **SETTINGS, **static, logits_processor=[Constant(do)])

    try:
        expected = text({})
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=str(error)[:20]):
            text(STATIC)
    else:
        assert torch.equal(text(STATIC), expected)
    assert tapes


@register_patching_rule("test-asks", uses_entropies=False)
def asks(ids, entropies, positions, rule):
    """Looks at a value, for which a device has to be waited for."""
    starts = ids[..., -1] == ord(" ") + 4
    return starts if bool(starts.any()) else torch.zeros_like(starts)


def test_what_asks_for_values_runs_as_it_is(tapes):
    model = make_model(tiny_config(patching_mode="test-asks"))
    ids = torch.tensor([rows_of("entropy", 12)[0]])
    expected = model.generate(ids, **SETTINGS)
    with pytest.warns(UserWarning, match="cannot be captured"):
        assert torch.equal(model.generate(ids, **SETTINGS, **STATIC), expected)
    assert not replays(tapes)


# The default.


@pytest.fixture
def by_default(monkeypatch):
    monkeypatch.setattr(step_blt, "CAPTURES_BY_DEFAULT", True)


NEW = {"max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 0}
GREEDY, DRAWN = {**NEW, "do_sample": False}, {**NEW, "do_sample": True}
DYNAMIC = {"cache_implementation": "dynamic"}
PROMPT = encode("some text, and more of it")
IDS = torch.tensor([PROMPT])


def written(model, ids=IDS, **settings):
    """A text, and what the next random number is."""
    torch.manual_seed(3)
    text = model.generate(ids, **settings)
    return text, torch.rand(1)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        GREEDY,
        DRAWN,
        {**DRAWN, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
        {**DRAWN, "repetition_penalty": 1.3, "typical_p": 0.9},
        {**GREEDY, "repetition_penalty": 1.5, "suppress_tokens": [99, 100]},
        {**DRAWN, "self_speculation_window": 4},
        {**GREEDY, "self_speculation_window": 3, "repetition_penalty": 1.2},
        {**DRAWN, "eos_token_id": list(range(4, 60)), "min_new_tokens": 9},
        {**DRAWN, "eos_token_id": list(range(4, 16))},
    ],
    ids=str,
)
def test_one_seed_gives_one_text(settings, rows, tapes, by_default):
    """Recorded or not; and as many random numbers are drawn."""
    model = make_model(seed=4)
    ids, mask = pad([PROMPT[: len(PROMPT) - 3 * row] for row in range(rows)], "left")
    settings = {"attention_mask": mask, **settings}
    (plain, after), made = written(model, ids, **settings, **DYNAMIC), len(tapes)
    text, after_recorded = written(model, ids, **settings)
    assert made == 0 and torch.equal(text, plain) and torch.equal(after_recorded, after)
    assert plain.shape[1] < ids.shape[1] + 8 or replays(tapes) > 3


def test_one_graph_holds_predicting_choosing_and_reading(tapes, by_default):
    model = make_model()
    model.config.patching_threshold = 1e9  # no patch ends
    written(model, **{**DRAWN, "max_new_tokens": 20}, top_k=30)
    assert len(tapes) == 1 and tapes[0].replays == 17  # but for the first of all, the last, and one to warm up
    names = [str(step[0]) for step in tapes[0].steps]
    last = len(names) - 1 - names[::-1].index("aten.argmax.default")  # the choice
    assert sum("embedding" in name for name in names[last:]) > 1 and sum("mm" in name for name in names[:last]) > 10
    assert not any("exponential" in name or "multinomial" in name for name in names)


def test_patches_are_closed_by_a_second_graph(tapes, by_default):
    written(make_model(tiny_config(patching_mode="byte")), **GREEDY)
    assert len(tapes) == 2 and min(tape.replays for tape in tapes) > 20


def test_drafts_of_a_window_are_one_graph(tapes, by_default):
    model = make_model(seed=2)
    counts = []
    for window in (2, 8):
        written(model, **{**GREEDY, "max_new_tokens": 60}, self_speculation_window=window)
        counts.append(max(sum("softmax" in str(s[0]) or "scaled_dot" in str(s[0]) for s in t.steps) for t in tapes))
        tapes.clear()
    assert counts[1] > 2 * counts[0]


class SometimesStops(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] % 16 == 3) & (input_ids.shape[1] > len(PROMPT) + 12)


class Keeps(LogitsProcessor):
    """Remembers the text, and changes scores by it."""

    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        return scores.scatter(1, input_ids[:, -2:], -1e4)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", ["criterion", "processor", "ngrams", "streamer", "scores"])
def test_what_the_host_does_runs_between_two_graphs(kind, rows, tapes, by_default):
    model, ids = make_model(seed=5), torch.tensor([PROMPT, PROMPT[::-1]])[:rows]
    found = []
    for more in (DYNAMIC, {}):
        streamer, keeps = Received(), Keeps()
        settings = {
            "criterion": {"stopping_criteria": [SometimesStops()], "eos_token_id": 9},
            "processor": {"logits_processor": [keeps]},
            "ngrams": {"no_repeat_ngram_size": 2},
            "streamer": {"streamer": streamer},
            "scores": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
        }[kind]
        text, after = written(model, ids, **{**DRAWN, **settings, **more})
        if kind == "scores":
            text = torch.cat([text.sequences.flatten(), *(s.flatten() for s in (*text.scores, *text.logits))])
        found.append((text, after, streamer.ids, keeps.lengths))
    (one, *rest), (other, *others) = found
    assert_same(one.float(), other.float())
    assert rest == others
    assert replays(tapes) > 10


class Received:
    def __init__(self):
        self.ids = []

    def put(self, value):
        self.ids.append(value.tolist())

    def end(self):
        self.ids.append(None)


def double(module, args, output):
    return output * 2


def go_on(model, **settings):
    """Two turns on one cache; what was captured in the first of them is of no use to the second."""
    first = model.generate(IDS, **GREEDY, **settings, return_dict_in_generate=True)
    return model.generate(first.sequences, **GREEDY, past_key_values=first.past_key_values)


NEVER = {
    "dynamic": lambda model: model.generate(IDS, **GREEDY, **DYNAMIC),
    "a short text": lambda model: model.generate(IDS, **{**GREEDY, "max_new_tokens": 12}),
    "the cache of the caller": lambda model: model.generate(IDS, **GREEDY, past_key_values=BltCache(model.config)),
    "the cache of an earlier call": lambda model: go_on(model, **DYNAMIC),
    "states": lambda model: model.generate(IDS, **GREEDY, output_hidden_states=True, return_dict_in_generate=True),
    "synced_gpus": lambda model: model.generate(IDS, **GREEDY, synced_gpus=True),
    "assisted": lambda model: model.generate(IDS, **GREEDY, assistant_model=make_model(seed=7)),
    "training": lambda model: model.train().generate(IDS, **GREEDY),
    "no cache": lambda model: model.generate(IDS, **GREEDY, use_cache=False),
    "beams": lambda model: model.generate(IDS, **GREEDY, num_beams=2),
    "a hook": lambda model: model.model.local_decoder.register_forward_hook(double) and model.generate(IDS, **GREEDY),
    "autocast": lambda model: torch.autocast("cpu", torch.bfloat16)(model.generate)(IDS, **GREEDY),
    "forward": lambda model: [
        model(IDS[:, :5], past_key_values=c) for c in [BltCache(model.config)] for _ in range(9)
    ],
}


@pytest.mark.parametrize("case", NEVER)
def test_what_is_never_captured(case, tapes, by_default):
    model = make_model(seed=4)
    model._has_unfinished_sequences = lambda is_finished, *args, **kwargs: not is_finished  # asks other processes
    NEVER[case](model)
    assert not tapes


def test_the_cache_of_a_recorded_call_is_the_callers(tapes, by_default):
    model = make_model(seed=4)
    model.generate(IDS, **GREEDY)
    made = len(tapes)
    assert torch.equal(go_on(model), model.generate(IDS, **{**GREEDY, "max_new_tokens": 60}, **DYNAMIC))
    assert len(tapes) == 2 * made


def test_autograd_is_never_captured(tapes, by_default):
    model = make_model()
    cache = model(IDS, use_cache=True).past_key_values
    assert model.make_runner(cache).graphs is None


def test_another_thread_runs_plain(tapes, by_default):
    model = make_model(seed=4)
    expected, inner = model.generate(IDS, **GREEDY, **DYNAMIC), []

    class Other(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if not inner:
                before = len(tapes)
                thread = threading.Thread(target=lambda: inner.append(model.generate(IDS, **GREEDY)))
                thread.start()
                thread.join()
                assert len(tapes) == before
            return scores

    assert torch.equal(model.generate(IDS, **GREEDY, logits_processor=[Other()]), expected)
    assert torch.equal(inner[0], expected)
    made = len(tapes)
    assert torch.equal(model.generate(IDS, **GREEDY), expected) and len(tapes) > made  # its turn again


def test_graphs_go_with_their_call(tapes, by_default):
    """Also with one that fails; what weights say is seen by the next."""

    class Fails(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > len(PROMPT) + 20:
                raise KeyError("a fault")
            return scores

    model = make_model(seed=4)
    with pytest.raises(KeyError, match="a fault"):
        model.generate(IDS, **GREEDY, logits_processor=[Fails()])
    for change in (lambda w: w.mul_(-1), lambda w: w.copy_(w.roll(1, 0))):
        with torch.no_grad():
            change(model.lm_head.weight)
            change(model.model.local_decoder.layers[0].self_attn.q_proj.weight)
        made = len(tapes)
        assert torch.equal(model.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY, **DYNAMIC))
        assert len(tapes) > made
    assert not CudaGraphs._lock.locked()


def test_the_default_takes_no_memory_for_texts_that_are_not_written(tapes, by_default):
    model, sizes = make_model(seed=4), []
    for longest in (40, 4000):
        settings = {**GREEDY, "max_new_tokens": longest, "return_dict_in_generate": True}
        found = model.generate(IDS, **settings, stopping_criteria=[lambda ids, scores: ids.shape[1:] == (60,)])
        cache = found.past_key_values
        sizes.append(sum(tensor.values.nbytes for slots in cache.kinds for tensor in slots.tensors))
    assert sizes[0] == sizes[1] and tapes


def test_the_model_is_not_looked_at_for_each_byte(tapes, by_default, monkeypatch):
    """Unless code of a user, which may change it, runs between the bytes."""
    looks = []
    monkeypatch.setattr(ModuleState, "holds", lambda self: looks.append(1) or True)
    model = make_model(seed=4)
    model.generate(IDS, **DRAWN, no_repeat_ngram_size=2)
    assert not looks
    model.generate(IDS, **DRAWN, logits_processor=[Keeps()])
    assert len(looks) > 20


@torch.no_grad()
def test_graphs_of_a_batch_outlive_its_requests_but_not_the_weights(tapes):
    """As continuous batching asks when a request joins."""
    model = make_model(seed=4)
    weight = model.model.global_transformer.layers[0].self_attn.q_proj.weight
    changes = (
        lambda: weight.mul_(2),
        lambda: setattr(weight, "data", weight.data.clone()),
        lambda: model.model.local_decoder.register_forward_hook(double),
    )
    for change in changes:
        cache = BltCache(model.config)
        cache.fix_steps()
        model(IDS, past_key_values=cache)
        runner = model.make_runner(cache)
        runner.step(IDS[:, :1])
        assert runner.graphs.is_current
        change()
        assert not runner.graphs.is_current
        runner.close()
    assert model.make_runner(cache).graphs is None  # hooked


class Transfers(TorchFunctionMode):
    """Counts what makes the host wait for a device."""

    NAMES = {"tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"}

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in self.NAMES or (name == "to" and "cpu" in args):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("static", [{}, STATIC], ids=["plain", "captured"])
@pytest.mark.parametrize(
    "settings", [GREEDY, {**DRAWN, "top_k": 20, "top_p": 0.9}, {**DRAWN, "repetition_penalty": 1.2, "eos_token_id": 2}]
)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_byte_is_one_transfer(rows, settings, static, tapes):
    """Of the bytes and of the patches that they closed; that is all the host is told."""
    model, counts = make_model(seed=4), []
    for number in (30, 50):
        torch.manual_seed(2)
        with Transfers() as seen:
            model.generate(IDS.repeat(rows, 1), **{**settings, "max_new_tokens": number}, **static)
        counts.append(seen.names)
    assert [len(counts[1]) - len(counts[0]), set(counts[1][-15:])] == [20, {"tolist"}], counts[1][-30:]
