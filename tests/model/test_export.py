"""`torch.export`, `torch.compile(fullgraph=True)` and ONNX of the whole forward: what they give is what the forward gives.

One program serves all batches and lengths, so each is compared on others than it was made with.
"""

import os
import sys

import pytest
import torch
from torch._dynamo.utils import counters

from blt_hf import (
    BltForSequenceClassification,
    BltForTokenClassification,
    BltPatcher,
    register_patching_rule,
)
from blt_hf.model import layers_blt
from helpers.exporting import dynamic_shapes, export, make_ids, make_inputs, make_small
from helpers.models import RULES, make_model
from helpers.processes import run
from helpers.texts import encode


PATH = os.pathsep.join(path for path in sys.path if path)  # that fresh processes search as this one does


# Rows and bytes: shorter and longer than the windows, whole blocks of attention, one byte, one row.
SHAPES = [(3, 57), (2, 40), (1, 1), (1, 2), (2, 11), (4, 130), (1, 64), (2, 32)]


def compare(model, program, *names, shapes=SHAPES, **options) -> None:
    module = program.module()
    for rows, length in shapes:
        inputs = make_inputs(model, rows, length, names)
        with torch.no_grad():
            expected = model(**inputs, use_cache=False, **options)
            got = module(**inputs, **options)
        torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-5, msg=f"{rows} x {length}")
        if options.get("output_patches"):
            assert torch.equal(got.patch_lengths, expected.patch_lengths)
            torch.testing.assert_close(got.entropies, expected.entropies, rtol=0, atol=1e-5)


MODES = {
    "entropy": {},
    "monotonic": {"monotonicity": True},
    "rise": {"patching_threshold_add": 0.1},
    "space": {"patching_mode": "space"},
    "static": {"patching_mode": "static", "patch_size": 5},
    "byte": {"patching_mode": "byte"},
    "short": {"max_patch_length": 3},
}


# One in the default run; each takes some seconds.
@pytest.mark.parametrize(
    "mode", ["entropy", *(pytest.param(mode, marks=pytest.mark.slow) for mode in list(MODES)[1:])]
)
def test_patches_found_inside(mode):
    model = make_small(**MODES[mode])
    compare(model, export(model))


EVERYTHING = ("attention_mask", "position_ids", "patch_lengths")


@pytest.mark.parametrize(
    "names",
    [
        ("attention_mask",),
        ("patch_lengths",),
        pytest.param(("position_ids",), marks=pytest.mark.slow),
        pytest.param(EVERYTHING[:2], marks=pytest.mark.slow),
    ],
)
def test_masks_texts_and_given_patches(names):
    model = make_small()
    compare(model, export(model, *names), *names)


VARIANTS = {
    "eager attention": {"attn_implementation": "eager"},
    "shared key heads": {"global_config": {"num_key_value_heads": 2}, "decoder_config": {"num_key_value_heads": 1}},
    "no windows": {"local_attention_window_len": None, "patcher_config": {"sliding_window": None}},
    "windows over patches": {
        "encoder_config": {"cross_attn_window": 2},
        "decoder_config": {"cross_attn_window": 3},
    },
    "documents": {"mask_documents": True, "patching_newline_reset": True},
    "mean": {"patch_pooling": "mean"},
    "all layers": {
        "encoder_config": {"num_hidden_layers": 2, "cross_attn_all_layers": True},
        "decoder_config": {"num_hidden_layers": 2},
    },
    "no hashes": {"encoder_hash_byte_group_nb_functions": 0},
    "lexicon": RULES["lexicon"],
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant):
    overrides = dict(VARIANTS[variant])
    implementation = overrides.pop("attn_implementation", "sdpa")
    model = make_small(**overrides)
    model.set_attn_implementation(implementation)
    ids = make_ids(2, 40)
    assert model(ids, use_cache=False).logits.isfinite().all()
    compare(model, export(model, "attention_mask"), "attention_mask")


@pytest.mark.slow
def test_patches_are_returned():
    """`output_patches` is not in the signature of `forward`, so a module of its own names it."""

    class WithPatches(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            out = self.model(input_ids, attention_mask=attention_mask, output_patches=True)
            return out.logits, out.patch_lengths, out.entropies

    model = make_small()
    inputs = make_inputs(model, 2, 45, ("attention_mask",))
    with torch.no_grad():
        program = torch.export.export(WithPatches(model), (), inputs, dynamic_shapes=dynamic_shapes(inputs)).module()
        for rows, length in SHAPES:
            inputs = make_inputs(model, rows, length, ("attention_mask",))
            logits, lengths, entropies = program(**inputs)
            expected = model(**inputs, use_cache=False, output_patches=True)
            torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-5)
            torch.testing.assert_close(entropies, expected.entropies, rtol=0, atol=1e-5)
            patches = expected.patch_lengths.shape[1]
            assert torch.equal(lengths[:, :patches], expected.patch_lengths) and not lengths[:, patches:].any()


@pytest.mark.slow
def test_rules_of_ones_own():
    register_patching_rule("export_test_vowels", vowels, window=2, uses_entropies=False)
    model = make_small(patching_mode="export_test_vowels")
    compare(model, export(model))


def vowels(ids, entropies, positions, rule):
    return torch.isin(ids[..., -1], torch.tensor(encode("aeiou", bos=False), device=ids.device)) & (ids[..., 0] > 50)


@pytest.mark.slow
@pytest.mark.parametrize("model_class", [BltForSequenceClassification, BltForTokenClassification, BltPatcher])
def test_other_heads(model_class):
    config = make_small(patching_mode="space").config
    model = make_model(config.patcher_config if model_class is BltPatcher else config, model_class)
    compare(model, export(model, "attention_mask"), "attention_mask")


@pytest.mark.slow
def test_a_saved_program_needs_no_code(tmp_path):
    """A process that knows nothing of this package gets the same logits."""
    model, ids = make_small(), make_ids(3, 70)
    model.config.return_dict = False
    torch.export.save(export(model), tmp_path / "blt.pt2")
    with torch.no_grad():
        torch.save((ids, *model(ids, use_cache=False)), tmp_path / "expected.pt")
    code = """if True:
        import sys, torch
        folder = sys.argv[1]
        ids, expected = torch.load(folder + "/expected.pt")
        (logits,) = torch.export.load(folder + "/blt.pt2").module()(input_ids=ids)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        assert not {"blt_hf", "transformers"} & sys.modules.keys()
        """
    run([sys.executable, "-c", code, tmp_path], check=True, timeout=240)


def test_the_model_is_left_as_it_was():
    """Nothing that export records stays behind in tables that later forwards read."""
    code = """if True:
        import sys
        import torch
        from helpers.exporting import export, make_ids, make_small
        model, ids = make_small(), make_ids(2, 50)
        program = export(model)
        logits = model(ids).logits
        assert type(logits) is torch.Tensor
        torch.testing.assert_close(logits, program.module()(input_ids=ids).logits, rtol=0, atol=1e-5)
        """
    run([sys.executable, "-c", code], check=True, timeout=240, env={**os.environ, "PYTHONPATH": PATH})


def test_what_cannot_be_exported_says_so():
    model, ids = make_small(), make_ids(2, 40)
    for inputs, message in (
        ({"use_cache": True}, "`use_cache=True` cannot be exported.*`use_cache=False`"),
        ({"attention_mask": torch.ones(3, 40)}, r"`attention_mask` has shape \(3, 40\)"),
        ({"patch_lengths": torch.ones(2, 4)}, "`patch_lengths` has shape .* at least one whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.export.export(model, (), {"input_ids": ids, **inputs})
    with pytest.raises(ValueError, match="`torch.jit.trace` .* `torch.export`"):
        torch.jit.trace(model, ids, strict=False)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="'flex_attention'` cannot be exported; accepted are 'sdpa' and 'eager'"):
        torch.export.export(model, (ids,))
    model = make_small(decoder_config={"cross_attn_window": 2})
    with pytest.raises(ValueError, match="`position_ids` may restart.*one text a row"):
        torch.export.export(model, (), {"input_ids": ids, "position_ids": torch.arange(40)[None]})


# torch.compile

COMPILED = {
    "ids": (),
    "mask": ("attention_mask",),
    "packed": ("position_ids",),
    "given patches": ("patch_lengths",),
}


def losses_and_gradients(model, forward, inputs, **options):
    model.zero_grad()
    torch.manual_seed(5)
    labels = inputs["input_ids"].masked_fill(inputs.get("attention_mask", torch.ones(())) == 0, -100)
    output = forward(**inputs, labels=labels, **options)
    output.loss.backward()
    return output.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare_training(model, names, shapes, backend: str, fullgraph: bool = True, atol: float = 2e-6) -> int:
    """Loss and gradients of the compiled forward, and how many graphs were made.

    Calls of the backend say another number: it may refuse the first graph once, whose floats (the norms' epsilons) are
    symbols under `dynamic=True`, and gets that graph again with numbers in their place.
    """
    torch._dynamo.reset()
    graphs_before = counters["stats"]["unique_graphs"]
    compiled = torch.compile(model, fullgraph=fullgraph, dynamic=True, backend=backend)
    for rows, length in shapes:
        inputs = make_inputs(model.eval(), rows, length, names)
        model.train()
        expected, gradients = losses_and_gradients(model, model, inputs)
        loss, got = losses_and_gradients(model, compiled, inputs)
        torch.testing.assert_close(loss, expected, rtol=0, atol=atol)
        assert got.keys() == gradients.keys() and len(got) > 20
        for name, gradient in gradients.items():
            torch.testing.assert_close(got[name], gradient, rtol=0, atol=atol, msg=f"{name}, {rows} x {length}")
    return counters["stats"]["unique_graphs"] - graphs_before


LONG = [(2, 90), (3, 77), (2, 130), (5, 101)]  # texts of several blocks of attention


@pytest.mark.parametrize(
    "inputs", ["ids", *(pytest.param(name, marks=pytest.mark.slow) for name in list(COMPILED)[1:])]
)
def test_training_compiles_whole(inputs):
    """One graph for all batches and lengths; `fullgraph=True` raises where it would have to be cut in two."""
    assert compare_training(make_small(), COMPILED[inputs], LONG, "eager") == 1


@pytest.mark.parametrize("inputs", ["mask", "packed"])
def test_training_one_row_compiles_whole(inputs):
    """Its patches alone say how many rows a layer multiplies, and no graph may ask how many those are."""
    assert compare_training(make_small(), COMPILED[inputs], [(1, 90), (1, 77)], "eager") == 1


def test_inference_of_one_row_compiles_whole():
    model = make_small().eval()
    inputs = make_inputs(model, 1, 90, ("attention_mask",))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        expected, got = (module(**inputs, use_cache=False).logits for module in (model, compiled))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_trains(backend):
    """Three graphs: of long texts, of short ones (one block of attention), and of one row."""
    graphs = compare_training(make_small(), ("attention_mask",), [*LONG, (2, 31), (1, 90)], backend)
    assert graphs <= 3


@pytest.mark.slow
def test_inference_compiles_whole():
    model = make_small()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for rows, length in LONG:
        ids = make_ids(rows, length)
        with torch.no_grad():
            expected, got = (module(ids, use_cache=False).logits for module in (model, compiled))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_compiles_before_anything_has_run(monkeypatch):
    """The factors of the hashes are made in the graph then."""
    model, ids = make_small().train(), make_ids(2, 50)
    expected = model(ids, labels=ids).loss
    monkeypatch.setattr(layers_blt, "_hash_weights", {})
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(ids, labels=ids).loss, expected, rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("inputs, backend", [("mask", "aot_eager"), ("packed", "eager")])
def test_the_masked_loss_compiles_whole(inputs, backend):
    """Blocks are as many as patches, so their number is a symbol, too."""
    model = make_small(diffusion_block_size=4)
    assert compare_training(model, COMPILED[inputs], LONG, backend) == 1


@pytest.mark.slow
def test_training_compiles_in_pieces():
    """Without `fullgraph`, the graph breaks where the host learns how many patches there are."""
    compare_training(make_small(), ("attention_mask",), LONG[:2], "eager", fullgraph=False)


def test_a_whole_graph_with_a_cache_says_what_to_do():
    compiled = torch.compile(make_small(), fullgraph=True, backend="eager")
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported, match="use_cache=False"):
        compiled(make_ids(2, 40), use_cache=True)


# ONNX


def compare_onnx(model, names, folder) -> None:
    import onnxruntime

    inputs = make_inputs(model, 2, 45, names)
    with torch.no_grad():
        program = torch.onnx.export(
            model, (), kwargs=inputs, dynamic_shapes=dynamic_shapes(inputs), dynamo=True, verbose=False
        )
    program.save(folder / "blt.onnx")
    session = onnxruntime.InferenceSession(folder / "blt.onnx")
    for rows, length in SHAPES:
        inputs = make_inputs(model, rows, length, names)
        with torch.no_grad():
            expected = model(**inputs, use_cache=False).logits
        (logits,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4, msg=f"{rows} x {length}")


@pytest.mark.slow
@pytest.mark.parametrize("names", [("attention_mask",), ("patch_lengths",), ("position_ids",)])
def test_onnx(names, tmp_path):
    compare_onnx(make_small(), names, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["monotonic", "space", "static", "byte", "short"])
def test_onnx_of_every_mode(mode, tmp_path):
    compare_onnx(make_small(**MODES[mode]), (), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["mean", "documents", "windows over patches", "no windows"])
def test_onnx_of_variants(variant, tmp_path):
    compare_onnx(make_small(**VARIANTS[variant]), ("attention_mask",), tmp_path)


def one_row_program(model, *names):
    """As users export it: the batch is 1 and stays so, the length is dynamic."""
    inputs = make_inputs(model, 1, 45, names)
    length, patches = torch.export.Dim("length", min=2, max=200), torch.export.Dim("patches", min=2, max=200)
    shapes = {name: {1: patches if name == "patch_lengths" else length} for name in inputs}
    with torch.no_grad():
        return torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)


# Below and above a block of attention, whole blocks, and the ends of the range.
ONE_ROW = [(1, length) for length in (2, 3, 11, 32, 57, 64, 130, 200)]


@pytest.mark.parametrize(
    "mode", ["entropy", *(pytest.param(mode, marks=pytest.mark.slow) for mode in list(MODES)[1:])]
)
def test_one_row_of_dynamic_length(mode):
    model = make_small(**MODES[mode])
    compare(model, one_row_program(model), shapes=ONE_ROW)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("attention_mask",), marks=pytest.mark.slow),
        pytest.param(("attention_mask", "position_ids"), marks=pytest.mark.slow),
        pytest.param(("patch_lengths",), marks=pytest.mark.slow),
    ],
    ids="+".join,
)
def test_one_row_with_more_arguments(names):
    model = make_small()
    compare(model, one_row_program(model, *names), *names, shapes=ONE_ROW[2:])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_one_row_of_the_entropy_model(implementation):
    model = BltPatcher(make_small().config.patcher_config).eval()
    model.set_attn_implementation(implementation)
    compare(model, one_row_program(model), shapes=ONE_ROW)


@pytest.mark.slow
@pytest.mark.parametrize("model_class", [BltForSequenceClassification, BltForTokenClassification])
def test_one_row_of_a_classifier(model_class):
    torch.manual_seed(0)
    model = model_class(make_small().config).eval()
    compare(model, one_row_program(model), shapes=ONE_ROW)
