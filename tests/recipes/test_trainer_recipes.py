"""Arguments of `Trainer`: each gives the loss, the weights or the numbers of a plain loop that does the same."""

import copy
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from helpers.recipes import BOTH, CAUSAL, assert_other, assert_same, logits_of, make, on, tokenizer, write
from helpers.training import TEXTS


def rows(repeat: int = 1) -> Dataset:
    return Dataset.from_dict({"input_ids": [tokenizer(text).input_ids for text in TEXTS] * repeat})


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Padded on the right, and padding learned by nobody."""
    batch = tokenizer.pad(
        [{"input_ids": row["input_ids"]} for row in examples], padding_side="right", return_tensors="pt"
    )
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def trainer_of(model, folder, data=None, **kwargs) -> Trainer:
    """Plain SGD, one order of rows, nothing saved and nothing shown, unless `kwargs` say so."""
    taken = ("eval_dataset", "data_collator", "compute_metrics", "callbacks", "preprocess_logits_for_metrics")
    own = {name: kwargs.pop(name) for name in [*kwargs] if name in (*taken, "model_init")}
    values = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "seed": 0,
    }
    arguments = TrainingArguments(str(folder), **{**values, **kwargs})
    own.setdefault("data_collator", collate)
    return Trainer(model, arguments, train_dataset=rows() if data is None else data, **own)


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(model, folder, **kwargs) -> list[float]:
    trainer = trainer_of(model, folder, **kwargs)
    trainer.train()
    return losses_of(trainer)


def plain_loop(model, batches, rate: float = 0.1) -> list[float]:
    """The loop that everybody writes."""
    losses = []
    model.train()
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for weight in model.parameters():
                if weight.grad is not None:
                    weight -= rate * weight.grad
                    weight.grad = None
    model.eval()
    return losses


def batches(size: int = 4, count: int = 2, data=None) -> list[dict]:
    data = list(rows() if data is None else data)
    return [collate(data[start : start + size]) for start in range(0, size * count, size)]


def assert_same_weights(found, expected, tolerance: float = 2e-5) -> None:
    expected = dict(expected.named_parameters())
    for name, weight in found.named_parameters():
        assert_same(weight.detach(), expected[name].detach(), tolerance)


def assert_moved(model, start) -> None:
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters()) if a.requires_grad]
    assert sum(moved) > 0.8 * len(moved)


@on(*CAUSAL)
def test_training_is_a_plain_loop(kind, tmp_path):
    model, other = make(kind), make(kind)
    found = trained(model, tmp_path)
    assert found == pytest.approx(plain_loop(other, batches()), abs=1e-4)
    assert_same_weights(model, other)
    assert_moved(model, make(kind))


@on(*CAUSAL)
def test_accumulated_steps_are_one_large_step(kind, tmp_path):
    """Although the parts of a batch hold different numbers of bytes."""
    model, other = make(kind), make(kind)
    settings = {"max_steps": 1, "data": rows()}
    found = trained(model, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    assert found == pytest.approx(trained(other, tmp_path, per_device_train_batch_size=8, **settings), abs=1e-4)
    assert_same_weights(model, other)


@on(*CAUSAL)
@pytest.mark.parametrize("adapted", [False, True])
def test_label_smoothing_is_that_of_the_next_byte(kind, adapted, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make(kind), LoraConfig(task_type="CAUSAL_LM")) if adapted else make(kind)
    batch = batches(8, 1)[0]
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.1)
    found = trained(model, tmp_path, label_smoothing_factor=0.1, max_steps=1, per_device_train_batch_size=8)
    assert found == pytest.approx([float(expected)], abs=1e-3)


@on(*BOTH)
@pytest.mark.parametrize("task", ["sequence", "token"])
def test_label_smoothing_of_classes_is_not_shifted(kind, task, tmp_path):
    """`Trainer` tells the classifiers from the language models."""
    model = make(kind, task, num_labels=3)
    data, collator = labelled(task)
    batch = collator([dict(row) for row in data])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    expected = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=0.2)
    settings = {"data": data, "data_collator": collator, "max_steps": 1, "per_device_train_batch_size": 8}
    found = trained(model, tmp_path, label_smoothing_factor=0.2, **settings)
    assert found == pytest.approx([float(expected)], abs=1e-3)


def labelled(task: str):
    data = rows()
    if task == "sequence":
        labels = [index % 3 for index in range(len(data))]
        return data.add_column("labels", labels), DataCollatorWithPadding(tokenizer)
    labels = [[index % 3 for index in range(len(row))] for row in data["input_ids"]]
    return data.add_column("labels", labels), DataCollatorForTokenClassification(tokenizer)


@on(*BOTH)
@pytest.mark.parametrize("task", ["sequence", "token"])
def test_a_classifier_trains_as_a_plain_loop_does(kind, task, tmp_path):
    data, collator = labelled(task)
    model, other = make(kind, task, num_labels=3), make(kind, task, num_labels=3)
    found = trained(model, tmp_path, data=data, data_collator=collator, per_device_train_batch_size=8, max_steps=1)
    batch = collator([dict(row) for row in data])
    assert found == pytest.approx(plain_loop(other, [batch]), abs=1e-4)
    assert_same_weights(model, other)


@on(*CAUSAL)
def test_neftune_adds_noise_in_training_and_is_gone_after(kind, tmp_path):
    """The first loss is that of a loop with the same noise on the embeddings of bytes."""
    model, noisy = make(kind), make(kind)

    def add_noise(module, inputs, output):
        if module.training:
            bound = 5.0 / math.sqrt(output.shape[1] * output.shape[2])
            return output + torch.zeros_like(output).uniform_(-bound, bound)
        return output

    class Seed(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            torch.manual_seed(7)

    settings = {"callbacks": [Seed()], "max_steps": 1}
    found = trained(model, tmp_path, neftune_noise_alpha=5.0, **settings)
    noisy.get_input_embeddings().register_forward_hook(add_noise)
    expected = trained(noisy, tmp_path, **settings)
    assert found == pytest.approx(expected, abs=1e-4)
    assert found != pytest.approx(trained(make(kind), tmp_path, **settings), abs=1e-3)
    assert not model.get_input_embeddings()._forward_hooks
    assert_same_weights(model, noisy)


@on(*CAUSAL)
def test_rows_grouped_by_length_are_all_there(kind, tmp_path):
    """Less padding, the longest row first, and the losses of a plain loop over the same batches."""
    data, seen, padding = rows(4), [], {}

    def recording(examples):
        seen.append(collate(examples))
        return seen[-1]

    model, other = make(kind), make(kind)
    settings = {"data": data, "max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 2}
    for strategy in ("sequential", "group_by_length"):
        seen.clear()
        trainer = trainer_of(
            copy.deepcopy(model), tmp_path, data_collator=recording, train_sampling_strategy=strategy, **settings
        )
        trainer.train()
        padding[strategy] = sum(int((batch["attention_mask"] == 0).sum()) for batch in seen)
    assert padding["group_by_length"] < 0.5 * padding["sequential"]
    lengths = sum((batch["attention_mask"].sum(dim=1).tolist() for batch in seen), [])
    assert sorted(lengths) == sorted(map(len, data["input_ids"]))
    assert max(lengths[:2]) == max(lengths)
    assert losses_of(trainer) == pytest.approx(plain_loop(other, seen), abs=1e-3)


@on(*CAUSAL)
def test_a_batch_size_is_found_where_memory_ends(kind, tmp_path):
    """A batch that does not fit is made smaller, and what was trained is what the smaller batch alone trains."""
    model, other = make(kind), make(kind)
    forward, tried = model.forward, []

    def small_memory(*args, **kwargs):
        tried.append(kwargs["input_ids"].shape[0])
        if tried[-1] > 6:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return forward(*args, **kwargs)

    small_memory.__wrapped__ = forward
    model.forward = small_memory
    settings = {"data": rows(), "max_steps": 2}
    found = trained(model, tmp_path, auto_find_batch_size=True, per_device_train_batch_size=8, **settings)
    size = next(rows for rows in tried if rows <= 6)
    assert tried[0] > 6
    assert found == pytest.approx(trained(other, tmp_path, per_device_train_batch_size=size, **settings), abs=1e-4)
    assert_same_weights(model, other)


@on(*CAUSAL)
def test_a_resumed_run_is_the_whole_run(kind, tmp_path):
    settings = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "cosine"}
    settings |= {"train_sampling_strategy": "random", "save_strategy": "steps", "save_steps": 2}
    whole, first = make(kind), make(kind)
    expected = trained(whole, tmp_path / "whole", **settings)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer_of(first, tmp_path / "parts", callbacks=[Stop()], **settings).train()
    assert_other(logits_of(first), logits_of(whole))
    resumed = trainer_of(make(kind, seed=1), tmp_path / "parts", **settings)
    if kind == "blt":  # what the checkpoint says of patches is in its configuration
        resumed.model.config.patching_threshold = whole.config.patching_threshold
    resumed.train(resume_from_checkpoint=True)
    assert losses_of(resumed) == pytest.approx(expected, abs=1e-4)
    assert_same_weights(resumed.model, whole)


@on(*CAUSAL)
def test_the_best_model_is_what_is_left(kind, tmp_path):
    """Learning at a rate that makes things worse, so that the best checkpoint is not the last one."""

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    model.lm_head.weight.mul_(5)

    trainer = trainer_of(
        make(kind), tmp_path, eval_dataset=rows(), eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="loss", max_steps=4, callbacks=[Spoil()],
        learning_rate=0.05,
    )  # fmt: skip
    trainer.train()
    measured = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert min(measured, key=measured.get) == 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(measured[2], abs=1e-5)
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert_same(logits_of(trainer.model), logits_of(best))


@on(*CAUSAL)
def test_early_stopping_ends_a_run_that_gets_worse(kind, tmp_path):
    trainer = trainer_of(
        make(kind), tmp_path, eval_dataset=rows(), eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, max_steps=8, learning_rate=50.0, save_only_model=True,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step < 8


@on(*CAUSAL)
def test_accumulated_predictions_are_the_predictions(kind, tmp_path):
    """`eval_accumulation_steps` moves them in pieces; rows come back as each alone, padded with -100."""
    model, data = make(kind), rows()
    settings = {"eval_dataset": data, "per_device_eval_batch_size": 3}
    expected = trainer_of(model, tmp_path, **settings).predict(data)
    found = trainer_of(model, tmp_path, eval_accumulation_steps=1, **settings).predict(data)
    logits = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
    others = expected.predictions[0] if isinstance(expected.predictions, tuple) else expected.predictions
    assert np.array_equal(logits, others)
    for row, text in enumerate(TEXTS):
        alone = logits_of(model, text)[0]
        assert_same(torch.tensor(logits[row, : len(alone)]), alone)
    assert logits.shape[0] == len(TEXTS)


@on(*CAUSAL)
def test_evaluation_is_a_mean_of_the_rows_alone(kind, tmp_path):
    """`eval_loss` in batches of one row: the mean of each row's own loss."""
    model = make(kind)
    found = trainer_of(model, tmp_path, eval_dataset=rows(), per_device_eval_batch_size=1).evaluate()["eval_loss"]
    with torch.no_grad():
        alone = [model(**collate([row])).loss.item() for row in rows()]
    assert found == pytest.approx(sum(alone) / len(alone), abs=1e-4)


@on(*CAUSAL)
def test_metrics_see_the_next_byte(kind, tmp_path):
    """Accuracy by `compute_metrics` from choices that `preprocess_logits_for_metrics` has made of logits."""
    model = make(kind)

    def accuracy(prediction):
        choices, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        is_text = labels != -100
        return {"right": float((choices == labels)[is_text].sum()), "of": float(is_text.sum())}

    def choose(logits, labels):
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)

    trainer = trainer_of(
        model, tmp_path, eval_dataset=rows(), compute_metrics=accuracy, preprocess_logits_for_metrics=choose
    )
    found = trainer.evaluate()
    texts = [tokenizer(text, return_tensors="pt").input_ids for text in TEXTS]
    right = sum((logits_of(model, text)[0, :-1].argmax(-1) == ids[0, 1:]).sum() for text, ids in zip(TEXTS, texts))
    assert (found["eval_right"], found["eval_of"]) == (float(right), sum(ids.shape[1] - 1 for ids in texts))


@on(*CAUSAL)
def test_gradient_checkpointing_trains_the_same_weights(kind, tmp_path):
    model, other = make(kind), make(kind)
    found = trained(model, tmp_path, gradient_checkpointing=True)
    assert found == pytest.approx(trained(other, tmp_path), abs=1e-4)
    assert_same_weights(model, other)


@on(*CAUSAL)
def test_generate_between_steps_of_a_checkpointed_run(kind, tmp_path):
    """As online methods do: texts from the model in training mode, the run as if nobody had asked."""
    model, other, written = make(kind), make(kind), []

    class Write(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            was_training, checkpointing = model.training, model.is_gradient_checkpointing
            with torch.no_grad():
                written.append((write(model, num_bytes=4), write(copy.deepcopy(model).eval(), num_bytes=4)))
            assert (model.training, model.is_gradient_checkpointing) == (was_training, checkpointing)

    settings = {"gradient_checkpointing": True}
    found = trained(model, tmp_path, callbacks=[Write()], **settings)
    assert found == pytest.approx(trained(other, tmp_path, **settings), abs=1e-5)
    assert_same_weights(model, other)
    assert written[0][0] == write(make(kind), num_bytes=4)
    if kind != "llama":  # which reads the last token alone there, as checkpointing switches its cache off
        assert written[1][0] == written[1][1]


@on(*CAUSAL)
def test_workers_that_load_data_change_nothing(kind, tmp_path):
    model, other = make(kind), make(kind)
    found = trained(model, tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
    assert found == trained(other, tmp_path)
    assert_same_weights(model, other)


@on(*CAUSAL)
def test_columns_that_no_forward_takes_are_dropped(kind, tmp_path):
    """`remove_unused_columns` reads the signature of `forward`; of an adapted model too."""
    data = rows().add_column("source", ["file"] * 8).add_column("score", [0.5] * 8)
    trainer = trainer_of(make(kind), tmp_path, data=data)
    assert trainer._remove_unused_columns(data).column_names == ["input_ids"]
    trainer.train()
    assert losses_of(trainer) == pytest.approx(trained(make(kind), tmp_path), abs=1e-6)


@on(*CAUSAL)
def test_clipped_gradients_have_the_norm_that_was_asked_for(kind, tmp_path):
    model, start = make(kind), make(kind)
    trained(model, tmp_path, max_grad_norm=0.01, max_steps=1, learning_rate=1.0)
    moved = [(a - b).flatten() for a, b in zip(model.parameters(), start.parameters())]
    assert torch.cat(moved).norm().item() == pytest.approx(0.01, rel=1e-2)


@on(*CAUSAL)
def test_optimizers_by_name_are_those_of_torch(kind, tmp_path):
    model, other = make(kind), make(kind)
    trained(model, tmp_path, optim="adamw_torch_fused", weight_decay=0.1, learning_rate=1e-2, max_steps=1)
    decayed = Trainer.get_decay_parameter_names(None, other)
    groups = [
        {"params": [w for n, w in other.named_parameters() if n in decayed], "weight_decay": 0.1},
        {"params": [w for n, w in other.named_parameters() if n not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    other.train()(**batches(4, 1)[0]).loss.backward()
    optimizer.step()
    assert_same_weights(model, other)
    assert_moved(model, make(kind))


@on(*CAUSAL)
def test_model_init_begins_each_run_anew(kind, tmp_path):
    trainer = trainer_of(None, tmp_path, model_init=lambda: make(kind))
    trainer.train()
    first = losses_of(trainer)
    trainer.train()
    assert losses_of(trainer) == first
    assert first == pytest.approx(trained(make(kind), tmp_path), abs=1e-6)


@on(*CAUSAL)
def test_bytes_that_were_seen_are_counted(kind, tmp_path):
    trainer = trainer_of(make(kind), tmp_path, include_num_input_tokens_seen="non_padding")
    trainer.train()
    assert trainer.state.num_input_tokens_seen == sum(int(batch["attention_mask"].sum()) for batch in batches())


@on(*CAUSAL)
def test_the_default_collator_of_language_models(kind, tmp_path):
    """`DataCollatorForLanguageModeling` pads and masks labels of padding, as the collator written by hand."""
    settings = {"max_steps": 1, "per_device_train_batch_size": 4}
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    found = trained(make(kind), tmp_path, data_collator=collator, **settings)
    batch = collator([{"input_ids": row["input_ids"]} for row in rows()][:4])
    assert bool((batch["labels"] == -100).any())
    expected = make(kind)(**batch).loss.item()
    assert found == pytest.approx([expected], abs=1e-4)


@on(*CAUSAL)
def test_a_loss_of_ones_own(kind, tmp_path):
    """`compute_loss_func` gets outputs and labels; the model is not asked for a loss as well."""

    def twice(outputs, labels, num_items_in_batch=None):
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return 2 * F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch

    model, settings = make(kind), {"max_steps": 1}
    trainer = trainer_of(model, tmp_path, **settings)
    trainer.compute_loss_func = twice
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(2 * trained(make(kind), tmp_path, **settings)[0], abs=1e-3)


@on(*CAUSAL)
def test_frozen_parts_stay_as_they_were(kind, tmp_path):
    """`requires_grad_(False)` on all but the head, which alone moves."""
    model, start = make(kind), make(kind)
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    trained(model, tmp_path)
    moved = {n for (n, a), b in zip(model.named_parameters(), start.parameters()) if not torch.equal(a, b)}
    assert moved == {"lm_head.weight"}


@pytest.mark.slow
@on(*CAUSAL)
def test_a_compiled_run_is_the_eager_run(kind, tmp_path):
    model, other = make(kind), make(kind)
    data = Dataset.from_dict({"input_ids": [row[:20] for row in rows()["input_ids"] if len(row) >= 20] * 4})
    settings = {"data": data, "max_steps": 2}
    found = trained(model, tmp_path, torch_compile=True, torch_compile_backend="inductor", **settings)
    assert found == pytest.approx(trained(other, tmp_path, **settings), abs=1e-3)
    assert_same_weights(model, other, 1e-4)


@on(*CAUSAL)
def test_predictions_in_half_precision_are_near(kind, tmp_path):
    """`bf16_full_eval` casts the model for the evaluation."""
    model = make(kind)
    settings = {"eval_dataset": rows(), "per_device_eval_batch_size": 1}
    expected = trainer_of(copy.deepcopy(model), tmp_path, **settings).evaluate()["eval_loss"]
    found = trainer_of(model, tmp_path, bf16_full_eval=True, **settings).evaluate()["eval_loss"]
    assert found != expected and found == pytest.approx(expected, abs=0.2)
