"""A user's own patching rule: one answer however a text arrives, trained, saved by its name, refused if it cheats."""

import json
import os
import sys

import pytest
import torch

from blt_hf import BltConfig, BltForCausalLM, register_patching_rule
from blt_hf.conversion.arguments import meta_args_from_config
from blt_hf.model.patching_blt import PatchingRule, find_rule
from blt_hf.patches.lengths import compute_patch_lengths
from blt_hf.training.calibration import calibrate_threshold
from blt_hf.training.data import PrecomputePatches
from helpers.models import make_model, tiny_config
from helpers.processes import run
from helpers.texts import encode
from helpers.training import make_trainer, step_losses


SPACE, NEWLINE = ord(" ") + 4, ord("\n") + 4


@register_patching_rule("test-lines", uses_entropies=False)
def lines(ids, entropies, positions, rule):
    """Patches end with a line, or after `patch_size` bytes of a text's beginning."""
    assert entropies is None
    return (ids[..., -1] == NEWLINE) | (positions == rule.patch_size)


@register_patching_rule("test-words", window=2)
def words(ids, entropies, positions, rule):
    """After a space, and where a surprise follows a smaller one."""
    rises = (entropies[..., -1] > entropies[..., -2]) & (entropies[..., -1] > rule.threshold)
    return (ids[..., -1] == SPACE) | rises


@register_patching_rule("test-far", window=11)
def far(ids, entropies, positions, rule):
    """Reads further back than the hashes do: a byte seen before, or a mean of entropies."""
    seen_before = (ids[..., :-1] == ids[..., -1:]).any(dim=-1)
    return seen_before & (entropies.mean(dim=-1) > 0.8 * rule.threshold)


RULES = ("test-lines", "test-words", "test-far")


def custom_model(rule: str, **overrides) -> BltForCausalLM:
    model = make_model(tiny_config(**overrides))
    model.config.patching_mode = rule
    model.config.validate_patching()
    return model


@torch.no_grad()
def test_a_cache_that_remembers_too_little_is_refused():
    """The rule of the model reads further back than the one for which the cache was made."""
    near, far = custom_model("entropy"), custom_model("test-far")
    ids = text_ids(20)
    for model in (far, near):
        cache = near(ids, use_cache=True).past_key_values
        near.config.patching_mode = "test-far"  # of the same model, whose rule is another now
        with pytest.raises(ValueError, match="made by another model: .*`patching_mode`"):
            model(ids, past_key_values=cache)
        near.config.patching_mode = "entropy"
        near(ids, past_key_values=cache)


def text_ids(num_bytes: int = 60) -> torch.Tensor:
    text = "To be, or not to be:\nthat is the question 速い, \n\nwhether it is nobler in the mind to suffer"
    return torch.tensor([encode(text)[:num_bytes]])


@torch.no_grad()
def patches_and_logits(model, ids, **arguments):
    output = model(ids, output_patches=True, **arguments)
    return output.patch_lengths, output.logits


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_one_answer(rule):
    """Whole, in chunks, byte by byte, padded on either side, packed, with the longest patch limited or not."""
    for limit in (None, 3):
        model, ids = custom_model(rule, max_patch_length=limit), text_ids()
        lengths, logits = patches_and_logits(model, ids)
        assert (lengths > 1).any() and lengths.shape[1] > 4
        for size in (1, 7, 40):
            parts, cache = [], None
            for part in ids.split(size, dim=1):
                output = model(part, past_key_values=cache, use_cache=True)
                parts.append(output.logits)
                cache = output.past_key_values
            torch.testing.assert_close(torch.cat(parts, dim=1), logits, msg=f"chunks of {size}, limit {limit}")

        short = text_ids(23)
        for side in ("left", "right"):
            pad = (37, 0) if side == "left" else (0, 37)
            both = torch.cat([ids, torch.nn.functional.pad(short, pad)])
            mask = torch.cat([torch.ones_like(ids), torch.nn.functional.pad(torch.ones_like(short), pad)])
            padded_lengths, padded = patches_and_logits(model, both, attention_mask=mask)
            assert padded_lengths[0, : lengths.shape[1]].tolist() == lengths[0].tolist()
            torch.testing.assert_close(padded[:1], logits)
            columns = slice(-23, None) if side == "left" else slice(0, 23)
            torch.testing.assert_close(padded[1:, columns], patches_and_logits(model, short)[1])

        packed = torch.cat([short, ids], dim=1)
        positions = torch.cat([torch.arange(23), torch.arange(60)])[None]
        _, of_packed = patches_and_logits(model, packed, position_ids=positions)
        torch.testing.assert_close(of_packed[:, 23:], logits)


@pytest.mark.parametrize("rule", RULES)
def test_patches_are_what_the_function_says(rule):
    """Against the function asked for one byte at a time, in plain Python."""
    model, ids = custom_model(rule), text_ids()
    with torch.no_grad():
        output = model(ids, output_patches=True)
    registered = find_rule(rule)
    entropies = output.entropies if registered.uses_entropies else torch.zeros(ids.shape)
    past = torch.zeros(registered.window - 1)
    ends = []
    for position in range(ids.shape[1]):
        window = [
            torch.cat([past.to(v.dtype), v[0]])[position : position + registered.window] for v in (ids, entropies)
        ]
        end = registered.function(
            window[0][None, None],
            window[1][None, None] if registered.uses_entropies else None,
            torch.tensor([[position]]),
            PatchingRule.from_config(model.config),
        )
        ends.append(position == 0 or bool(end))
    starts = [0] + [i + 1 for i, end in enumerate(ends) if end]
    expected = [stop - start for start, stop in zip(starts, [*starts[1:], len(ends) + 1]) if stop > start]
    assert [n for n in output.patch_lengths[0].tolist() if n] == expected
    lengths = compute_patch_lengths(
        PatchingRule.from_config(model.config), ids, output.entropies if registered.uses_entropies else None
    )
    assert lengths.tolist() == output.patch_lengths.tolist()


@pytest.mark.parametrize("rule", RULES)
def test_generates_with_the_cache(rule):
    model = custom_model(rule)
    arguments = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    cached = model.generate(text_ids(20), **arguments)
    assert cached.shape == (1, 44)
    assert torch.equal(cached, model.generate(text_ids(20), use_cache=False, **arguments))
    beams = model.generate(text_ids(20), num_beams=3, **arguments)
    assert torch.equal(beams, model.generate(text_ids(20), num_beams=3, use_cache=False, **arguments))


@pytest.mark.parametrize("rule", RULES)
def test_trains(rule, tmp_path):
    """With `Trainer`, and with patches that were computed before: the same losses."""
    torch.manual_seed(0)
    trainer = make_trainer(custom_model(rule), tmp_path, max_steps=6)
    trainer.train()
    losses = step_losses(trainer)
    assert losses[-1] < losses[0] - 0.5

    model, ids = custom_model(rule), text_ids()
    row = PrecomputePatches(model)({"input_ids": ids[0].tolist()})
    given = model(ids, labels=ids, patch_lengths=torch.tensor([row["patch_lengths"]])).loss
    torch.testing.assert_close(given, model(ids, labels=ids).loss)


def test_needs_no_entropy_model(tmp_path):
    config = tiny_config(patching_mode="test-lines", patch_in_forward=False)
    model = make_model(config)
    assert model.model.patcher is None and not config.uses_patcher
    model(text_ids())
    with pytest.raises(ValueError, match="`inputs_embeds` hide the bytes that `patching_mode='test-lines'` reads"):
        model(byte_embeds=torch.zeros(1, 8, 16))
    with pytest.raises(ValueError, match="`patching_mode='test-words'` needs an entropy model"):
        make_model(tiny_config(patching_mode="test-words", patch_in_forward=False))(text_ids())


LOADS = """
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM

folder, remote = sys.argv[1], sys.argv[2] == "remote"
if not remote:
    import blt_hf
try:
    AutoConfig.from_pretrained(folder, trust_remote_code=remote)
except ValueError as error:
    print(error)
assert not remote or "blt_hf" not in sys.modules
from blt_hf import register_patching_rule

@register_patching_rule("test-words", window=2)
def words(ids, entropies, positions, rule):
    rises = (entropies[..., -1] > entropies[..., -2]) & (entropies[..., -1] > rule.threshold)
    return (ids[..., -1] == 36) | rises

loader = AutoModelForCausalLM
if remote:  # code that was loaded before the package, which the Auto classes now prefer
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    loader = get_class_from_dynamic_module("modeling_blt.BltForCausalLM", folder)
model = loader.from_pretrained(folder)
print(type(model).__module__.split(".")[0])
with torch.no_grad():
    torch.save(model(torch.tensor([[1, *range(60, 90), 14, 70, 80, 36, 90]])).logits, f"{folder}/logits.pt")
"""


@pytest.mark.parametrize("code", ["installed", "remote"])
def test_saved_by_its_name(code, tmp_path):
    """A process that does not know the rule is told; one that registers it loads the model, downloaded code or not.

    Registering is the package's: downloaded code asks it, and alone refuses the rule.
    """
    model = custom_model("test-words")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["patching_mode"] == "test-words"
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = run(
        [sys.executable, "-c", LOADS, str(tmp_path), code],
        capture_output=True, text=True, timeout=200, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    unknown, loaded = done.stdout.splitlines()
    assert "`patching_mode` must be one of" in unknown and "'test-words'" in unknown
    assert "`register_patching_rule`" in unknown and "Run the code that registers" in unknown
    assert loaded == ("blt_hf" if code == "installed" else "transformers_modules")
    with torch.no_grad():
        expected = model(torch.tensor([[1, *range(60, 90), 14, 70, 80, 36, 90]])).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


def ends_where(condition):
    """A rule of one line."""
    return lambda ids, entropies, positions, rule: condition(ids, entropies, positions, rule)


CHEATS = {
    "the next byte": (ends_where(lambda ids, *_: ids[..., -1].roll(-1, 1) == SPACE), "looks ahead: .*of byte"),
    "the next entropy": (ends_where(lambda _, e, *__: e[..., -1].roll(-1, 1) > 2), "looks ahead"),
    "the mean of the text": (ends_where(lambda _, e, *__: e[..., -1] > e.mean(1)), "looks ahead"),
    "how long the text is": (
        ends_where(lambda ids, e, positions, rule: positions == positions.shape[1] - 2), "looks ahead",
    ),
    "all bytes so far": (
        ends_where(lambda ids, *_: (ids[..., -1] == SPACE).cumsum(1) % 2 == 1), "remembers more than its `window` of 1",
    ),
    "the byte before, without a window": (
        ends_where(lambda ids, *_: ids[..., -1] == torch.nn.functional.pad(ids[:, :-1, -1], (1, 0))),
        "remembers more than its `window` of 1",
    ),
    "other rows": (ends_where(lambda _, e, *__: e[..., -1] > e[..., -1].mean(0)), "reads other rows"),
    "chance": (ends_where(lambda ids, *_: torch.rand(ids.shape[:2]) > 0.5), "gives two answers for the same text"),
    "numbers": (ends_where(lambda _, e, *__: e[..., -1]), r"must return a tensor of torch.bool \(4, 4\d\).*torch.float32"),
    "the whole window": (ends_where(lambda ids, *_: ids == SPACE), r"must return a tensor of torch.bool .*, 1\)"),
    "a list": (ends_where(lambda *_: [True]), "must return a tensor of torch.bool .*got list"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CHEATS))
def test_rules_that_cannot_generate_are_refused(case):
    function, words_of_error = CHEATS[case]
    with pytest.raises(ValueError, match=f"patching rule 'test-cheat' .*{words_of_error}"):
        register_patching_rule("test-cheat", function)
    with pytest.raises(ValueError, match="'test-cheat'"):
        find_rule("test-cheat")


WRONG = {
    "a built-in name": ({"name": "space"}, "`name` must be .*got 'space'"),
    "no name": ({"name": ""}, "`name` must be .*got ''"),
    "a taken name": ({"name": "test-lines"}, "`name` 'test-lines' belongs to test_custom_rules.lines already"),
    "no window": ({"window": 0}, "`window` must be at least 1 byte; got 0"),
    "half a window": ({"window": 1.5}, "`window` must be at least 1 byte; got 1.5"),
    "no function": ({"function": "lines"}, "`function` must be callable; got str"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_arguments_are_named(case):
    values, words_of_error = WRONG[case]
    arguments = {"name": "test-wrong", "function": words, "window": 2, **values}
    with pytest.raises(ValueError, match=words_of_error):
        register_patching_rule(**arguments)


def test_registered_again():
    """A cell of a notebook that runs twice."""
    assert register_patching_rule("test-words", words, window=2) is words
    assert find_rule("test-words").function is words


def test_fields_of_other_rules():
    with pytest.raises(ValueError, match="`monotonicity` belongs to .*'test-words'"):
        BltConfig(patching_mode="test-words", monotonicity=True)
    with pytest.raises(ValueError, match="`patching_newline_reset` belongs to .*'test-lines'"):
        BltConfig(patching_mode="test-lines", patching_newline_reset=True)
    assert BltConfig(patching_mode="test-words", patching_newline_reset=True).uses_patcher
    with pytest.raises(ValueError, match="`patching_mode` 'test-words' is a rule of your own; Meta's format"):
        meta_args_from_config(BltConfig(patching_mode="test-words"))
    with pytest.raises(ValueError, match="'test-words' has no threshold to search for"):
        calibrate_threshold(custom_model("test-words"), ["some text"])
