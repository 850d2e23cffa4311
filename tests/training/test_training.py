"""`Trainer` on a BLT: the loss it should have, the entropy model left alone, runs that continue where they stopped."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    TrainerCallback,
    default_data_collator,
)

from blt_hf import BltForCausalLM
from blt_hf.model.layers_blt import BltTransformerLayer
from helpers.models import make_model, tiny_config
from helpers.texts import encode
from helpers.training import (
    TEXTS,
    assert_same_losses,
    assert_same_weights,
    make_trainer,
    step_losses,
    text_dataset,
    train,
)


def test_from_scratch_and_continued(tmp_path):
    """The loss falls; a saved model goes on from there; the entropy model stays what it was, bit for bit."""
    model = make_model()
    patcher = copy.deepcopy(model.model.patcher.state_dict())
    losses, model = train(model, tmp_path, max_steps=30)
    assert losses[-1] < losses[0] - 1
    model.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    continued, model = train(model, tmp_path, max_steps=10)
    assert abs(continued[0] - losses[-1]) < 0.6
    assert continued[-1] < continued[0]
    for name, weight in model.model.patcher.state_dict().items():
        assert torch.equal(weight, patcher[name]), name
    assert not any(module.training for module in model.model.patcher.modules())


def test_patcher_is_in_no_optimizer_group(tmp_path):
    trainer = make_trainer(make_model(), tmp_path, weight_decay=0.1)
    trainer.create_optimizer()
    known = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
    for name, weight in trainer.model.named_parameters():
        assert (id(weight) in known) == ("patcher" not in name), name
    decayed = {
        id(weight) for group in trainer.optimizer.param_groups if group["weight_decay"] for weight in group["params"]
    }
    names = {name for name, weight in trainer.model.named_parameters() if id(weight) in decayed}
    assert "model.global_transformer.layers.0.mlp.up_proj.weight" in names
    assert not any("norm" in name for name in names)


def test_every_weight_gets_a_gradient():
    """Else DDP would ask for `find_unused_parameters`."""
    model = make_model().train()
    ids = torch.tensor([encode(TEXTS[1], eos=True)])
    model(ids, labels=ids).loss.backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is None) == ("patcher" in name), name


@pytest.mark.parametrize("batch, steps", [(2, 2), (1, 4)])
def test_gradient_accumulation(tmp_path, batch, steps):
    """Rows of very unequal lengths: the mean is over the bytes of all micro-batches, not over their means."""
    expected, reference = train(make_model(), tmp_path, optim="sgd")
    losses, model = train(
        make_model(), tmp_path, optim="sgd", per_device_train_batch_size=batch, gradient_accumulation_steps=steps
    )
    assert_same_losses(losses, expected)
    assert_same_weights(model, reference)


@pytest.mark.parametrize("flash_arguments", [False, True])
@pytest.mark.parametrize("rule", [{}, {"patching_mode": "space"}, {"max_patch_length": 3}], ids=str)
def test_packing(rule, flash_arguments):
    """Texts flattened into one row have the loss that they have one by one."""
    model = make_model(tiny_config(**rule)).train()
    rows = [{"input_ids": encode(text, eos=True)} for text in TEXTS]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=flash_arguments, return_seq_idx=flash_arguments)
    packed = model(**collator(rows), use_cache=False)
    packed.loss.backward()
    gradient = model.model.local_encoder.embed_tokens.weight.grad.clone()
    model.zero_grad()
    num_predicted = sum(len(row["input_ids"]) - 1 for row in rows)
    total = 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        total = total + model(ids, labels=ids, num_items_in_batch=num_predicted).loss
    total.backward()
    torch.testing.assert_close(packed.loss, total, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.model.local_encoder.embed_tokens.weight.grad, gradient, atol=1e-5, rtol=1e-4)


def test_packing_with_trainer(tmp_path):
    expected, reference = train(make_model(), tmp_path)
    losses, model = train(make_model(), tmp_path, collator=DataCollatorWithFlattening())
    assert_same_losses(losses, expected)
    assert_same_weights(model, reference, 1e-3)


def test_fixed_blocks_with_documents(tmp_path):
    """Blocks cut from a stream of documents; with `mask_documents` nothing crosses an `eos` but hashes and patches."""
    stream = sum((encode(text, eos=True)[1:] for text in TEXTS), [])
    blocks = [stream[start : start + 48] for start in range(0, len(stream) - 47, 48)]
    data = Dataset.from_dict({"input_ids": blocks, "labels": blocks})
    losses, _ = train(
        make_model(tiny_config(mask_documents=True)), tmp_path, data=data, collator=default_data_collator, max_steps=10
    )
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(tmp_path, use_reentrant):
    expected, reference = train(make_model(), tmp_path)
    losses, model = train(
        make_model(),
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    assert_same_losses(losses, expected)
    assert_same_weights(model, reference, 1e-3)


def test_bf16(tmp_path):
    expected, _ = train(make_model(), tmp_path)
    losses, model = train(make_model(), tmp_path, bf16=True)
    assert_same_losses(losses, expected, 0.02)
    assert model.dtype == torch.float32


def test_bf16_weights(tmp_path):
    losses, model = train(make_model().bfloat16(), tmp_path, max_steps=8)
    assert model.dtype == torch.bfloat16 and losses[-1] < losses[0]


def test_group_by_length(tmp_path):
    losses, _ = train(
        make_model(), tmp_path, train_sampling_strategy="group_by_length", length_column_name="length", max_steps=8
    )
    assert losses[-1] < losses[0]


class _StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_resume(tmp_path):
    """A run cut in the middle of an epoch gives the losses of a whole one, dropout and schedule included."""
    model = make_model(tiny_config(global_config={"dropout": 0.1}, decoder_config={"dropout": 0.1}))
    arguments = {"max_steps": 7, "lr_scheduler_type": "cosine", "save_strategy": "steps", "save_steps": 3}
    expected, reference = train(copy.deepcopy(model), tmp_path / "whole", **arguments)
    stopped = make_trainer(copy.deepcopy(model), tmp_path / "cut", **arguments)
    stopped.add_callback(_StopAt(3))
    stopped.train()
    fresh = BltForCausalLM(model.config)
    resumed = make_trainer(fresh, tmp_path / "cut", **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert_same_losses(step_losses(resumed), expected, 1e-6)
    assert_same_weights(resumed.model, reference, 1e-6)


def test_evaluation_and_best_model(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    trainer = make_trainer(
        make_model(), tmp_path, eval_dataset=text_dataset(repeat=1), eval_strategy="steps", eval_steps=2, **arguments
    )
    trainer.train()
    result = trainer.evaluate()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert result["eval_loss"] == pytest.approx(min(losses), abs=1e-5)


def test_precomputed_patches(tmp_path):
    """A `patch_lengths` column takes the entropy model's place: same losses, and it does not run."""
    model = make_model()
    rows = []
    for text in TEXTS:
        ids = encode(text, eos=True)
        with torch.no_grad():
            lengths = model(torch.tensor([ids]), output_patches=True).patch_lengths[0]
        rows.append({"input_ids": ids, "patch_lengths": [n for n in lengths.tolist() if n]})
    data = Dataset.from_list(rows)
    expected, _ = train(make_model(), tmp_path, data=data.remove_columns("patch_lengths"))
    model = make_model()
    model.model.patcher.forward = None
    losses, _ = train(model, tmp_path, data=data)
    assert_same_losses(losses, expected, 1e-5)


def test_layers_compile_whole():
    """`fullgraph=True` raises at a graph break; batches of several shapes make shapes dynamic."""
    model, compiled = (make_model(tiny_config(), seed=3).train() for _ in range(2))
    for module in compiled.modules():
        if isinstance(module, BltTransformerLayer):
            module.compile(backend="eager", fullgraph=True)
    # All layers share their code, and the stacks differ in width and in what they see.
    # torch's own `patch`: what `monkeypatch` restores cannot be read any more.
    with torch._dynamo.config.patch(recompile_limit=64):
        for length in (30, 41, 55):
            ids = torch.randint(4, 260, (2, length), generator=torch.Generator().manual_seed(length))
            losses = [m(ids, labels=ids).loss for m in (model, compiled)]
            torch.testing.assert_close(*losses, rtol=0, atol=1e-6)
            losses[1].backward()
