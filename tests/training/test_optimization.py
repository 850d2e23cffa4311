"""The optimizer for hash tables: sparse gradients, a number a row, untouched rows untouched."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from blt_hf.training.data import BltDataCollator
from blt_hf.training.optimization import BltAdamW, split_parameters
from helpers.models import make_model, tiny_config


@pytest.fixture
def model():
    return make_model(tiny_config(), seed=5).train()


def rows(count: int = 16) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": [1, *torch.randint(60, 90, (40,), generator=generator).tolist()]} for _ in range(count)]


def step(model, optimizer, batch) -> float:
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def test_rows_follow_row_wise_adagrad(model):
    """Two steps against the formula on dense gradients."""
    table, dense_model = model.model.encoder_hash_tok_embedding, make_model(tiny_config(), seed=5).train()
    expected, total = table.weight.detach().clone(), torch.zeros(table.weight.shape[0])
    batches = [BltDataCollator()(rows()[start : start + 4]) for start in (0, 4)]
    lr, eps = 0.05, 1e-8
    groups = split_parameters(model)
    for group in groups:
        group["lr"] = lr if group.get("row_wise") else 0.0  # only the tables move
    optimizer = BltAdamW(groups, eps=eps, weight_decay=0.0)
    for batch in batches:
        dense_model.load_state_dict(model.state_dict())
        dense_model.zero_grad()
        dense_model(**batch, use_cache=False).loss.backward()
        dense = dense_model.model.encoder_hash_tok_embedding.weight.grad
        total += dense.square().mean(dim=1)
        expected -= lr * dense / (total.sqrt() + eps)[:, None]
        step(model, optimizer, batch)
        assert table.weight.grad is None  # nothing dense, and nothing that the next step would see again
        optimizer.zero_grad()
        torch.testing.assert_close(table.weight.detach(), expected, rtol=0, atol=1e-6)
    touched = total > 0
    assert 0 < touched.sum() < len(touched)
    assert optimizer.state[table.weight]["sum"].shape == (len(touched),)
    assert optimizer.state[table.weight]["sum"][~touched].eq(0).all()


def test_other_parameters_follow_adamw(model):
    reference = make_model(tiny_config(), seed=5).train()
    table = reference.model.encoder_hash_tok_embedding.weight.requires_grad_(False)
    groups = [group for group in split_parameters(reference) if not group.get("row_wise")]
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    model.model.encoder_hash_tok_embedding.weight.data.copy_(table)
    groups = split_parameters(model)
    groups[-1]["lr"] = 0.0
    ours = BltAdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for start in (0, 4, 8):
        batch = BltDataCollator()(rows()[start : start + 4])
        assert step(model, ours, batch) == pytest.approx(step(reference, plain, batch), abs=1e-5)
        ours.zero_grad()
        plain.zero_grad()


def test_trainer_takes_it_saves_and_resumes(model, tmp_path):
    def run(trained, max_steps, resume=None):
        optimizer = BltAdamW(split_parameters(trained), lr=1e-2)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=max_steps, per_device_train_batch_size=2, save_steps=2, logging_steps=1,
            gradient_accumulation_steps=2, report_to="none", use_cpu=True, lr_scheduler_type="constant", seed=3,
        )  # fmt: skip
        trainer = Trainer(
            trained, arguments, train_dataset=rows(), data_collator=BltDataCollator(), optimizers=(optimizer, None)
        )
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = run(model, 4)
    assert whole[-1] < whole[0]
    resumed = run(make_model(tiny_config(), seed=5).train(), 4, resume=str(tmp_path / "checkpoint-2"))
    assert resumed == whole


def test_what_cannot_be_done_is_said(model):
    with pytest.raises(ValueError, match="row_wise"):
        BltAdamW([{"params": [torch.nn.Parameter(torch.zeros(3))], "row_wise": True}])
    optimizer = BltAdamW(split_parameters(model))
    model.model.encoder_hash_tok_embedding.sparse = False
    with pytest.raises(ValueError, match="sparse=True"):
        step(model, optimizer, BltDataCollator()(rows(2)))


def test_frozen_tables_are_left_out(model):
    model.model.encoder_hash_tok_embedding.requires_grad_(False)
    assert not any(group.get("row_wise") for group in split_parameters(model))
