"""`generate` in training mode, as online methods call it: with gradient checkpointing, dropout, any gradient mode."""

import copy
import warnings

import pytest
import torch
from transformers import GenerationConfig

from blt_hf import BltPatcher, BltPatcherConfig
from helpers.diffusion import diffusion_model
from helpers.models import make_model, tiny_config
from helpers.texts import encode, pad


IDS = torch.tensor([encode("some words, and")])
ROWS, MASK = pad([encode("some words, and"), encode("é"), encode("a longer text than that")], "left")
SETTINGS = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
WAYS = {
    "plain": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 2},
    "sampling": {"do_sample": True},
    "self-speculation": {"self_speculation_window": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "prefill in chunks": {"prefill_chunk_size": 4},
    "guidance": {"guidance_scale": 1.5},
}
CHECKPOINTING = {"none": None, "reentrant": {"use_reentrant": True}, "not reentrant": {"use_reentrant": False}}


def written(model, ids=IDS, **arguments) -> list:
    torch.manual_seed(0)
    return model.generate(ids, **{**SETTINGS, **arguments}).tolist()


def start_training(model, kind: str):
    model.train()
    if CHECKPOINTING[kind] is not None:
        model.gradient_checkpointing_enable(CHECKPOINTING[kind])
    return model


def modes(model) -> list:
    layers = [getattr(module, "gradient_checkpointing", None) for module in model.modules()]
    return [[module.training for module in model.modules()], layers, model.config.use_cache]


@pytest.fixture(autouse=True)
def no_warnings_of_checkpointing():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*None of the inputs have requires_grad")
        yield


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_the_text_is_that_of_eval_mode(kind, way):
    model = make_model()
    expected = written(model, **WAYS[way])
    before = modes(start_training(model, kind))
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert written(model, **WAYS[way]) == expected
    assert modes(model) == before


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_batches_the_entropy_model_and_blocks(kind):
    for model, arguments in (
        (make_model(), {"ids": ROWS, "attention_mask": MASK}),
        (make_model(BltPatcherConfig(**tiny_config().patcher_config.to_dict()), BltPatcher), {}),
        (diffusion_model(), {"diffusion_block_size": 4}),
    ):
        expected = written(model, **arguments)
        assert written(start_training(model, kind), **arguments) == expected


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_gradients_are_those_of_a_step_alone(kind):
    """The checkpoints of a training step work as before, and a cache that is asked for there is still refused."""

    def gradients(model) -> list[torch.Tensor]:
        model(IDS, labels=IDS).loss.backward()
        return [weight.grad for weight in model.parameters() if weight.grad is not None]

    model = make_model()
    expected = gradients(copy.deepcopy(model).train())
    written(start_training(model, kind))
    for actual, wanted in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    assert model(IDS, use_cache=True).past_key_values is None
    with torch.no_grad():
        cache = model(IDS[:, :-1], use_cache=True).past_key_values
        last = model(IDS[:, -1:], past_key_values=cache).logits
        torch.testing.assert_close(last, model(IDS).logits[:, -1:])


@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize("way", [*WAYS, pytest.param("compiled", marks=pytest.mark.slow)])
def test_dropout_runs_in_training_mode(kind, way):
    config = tiny_config(
        global_config={"dropout": 0.4}, encoder_config={"dropout": 0.4}, decoder_config={"dropout": 0.4}
    )
    model = make_model(config)
    arguments = {"cache_implementation": "static"} if way == "compiled" else WAYS[way]
    without = written(model, **arguments)
    start_training(model, kind)
    texts = [model.generate(IDS, **{**SETTINGS, **arguments, "max_new_tokens": 30}).tolist() for _ in range(2)]
    assert texts[0] != texts[1]
    assert written(model.eval(), **arguments) == without


def test_continuous_batching_is_in_eval_mode_as_that_of_transformers():
    model = make_model()
    config = GenerationConfig(**SETTINGS, pad_token_id=0)
    expected = [output.generated_tokens for output in model.generate_batch(IDS.tolist(), config).values()]
    start_training(model, "not reentrant")
    assert [output.generated_tokens for output in model.generate_batch(IDS.tolist(), config).values()] == expected
    assert not model.training
