"""Recorded steps write what steps that run as they are write; a CPU plays the GPU that records them."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import ContinuousBatchingConfig, LogitsProcessor

from blt_hf import BltCache, register_patching_rule
from blt_hf.model import step_blt
from blt_hf.model.step_blt import StepRunner
from helpers.checks import assert_same
from helpers.diffusion import diffusion_model
from helpers.models import RULES, greedy, make_model, model_for, tiny_config
from helpers.texts import TEXTS, encode, pad, rows_of, text_ids


class Tape(TorchDispatchMode):
    """Every operation below it, to be run again in the same memory, as a CUDA graph runs its kernels."""

    def __init__(self):
        super().__init__()
        self.steps, self.made, self.before, self.replays = [], set(), {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("what is recorded asked for a value")
        kwargs = kwargs or {}
        if function._schema.is_mutable:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.made:
                    storage = tensor.untyped_storage()
                    self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = function(*args, **kwargs)
        if not function._schema.is_mutable and not function.is_view:
            self.made |= {t.untyped_storage().data_ptr() for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        self.steps.append((function, args, kwargs, result))
        return result

    def take_back(self):
        """A GPU records and does not run."""
        for storage, values in self.before.values():
            storage.copy_(values)

    def replay(self):
        self.replays += 1
        for function, args, kwargs, result in self.steps:
            new = function(*args, **kwargs)
            for old, value in zip(tree_leaves(result), tree_leaves(new)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != value.data_ptr():
                    old.copy_(value)


@pytest.fixture(autouse=True)
def tapes(monkeypatch) -> list[Tape]:
    """What was recorded."""
    made = []

    def capture(function, device):
        tape = Tape()
        try:
            with tape:
                result = function()
        finally:
            tape.take_back()
        made.append(tape)
        return result, tape.replay

    monkeypatch.setattr(step_blt, "capture", capture)
    monkeypatch.setattr(step_blt, "can_capture", lambda device: True)
    return made


STATIC = {"cache_implementation": "static", "disable_compile": True}
SETTINGS = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def replays(tapes: list[Tape]) -> int:
    return sum(tape.replays for tape in tapes)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_recorded_steps_write_the_same_text(rule, rows, tapes):
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
    assert replays(tapes) > 3


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
    """Whole forwards on the cache of recorded steps, which run as they are."""
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
                found.append(model.step_logits(byte, cache))
            else:
                found.append(model(byte, past_key_values=cache).logits)
            drafts = runner.draft(byte), StepRunner(model.model, cache, model.lm_head).draft(byte)
            cache.crop_rows([2])
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
