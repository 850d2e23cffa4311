"""Bits per byte: by hand, in windows, by the `evaluate` module, in `Trainer`, for byte models and token models."""

import math
import os
import sys

import evaluate
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from blt_hf.evaluation import TrainerBitsPerByte, load_bits_per_byte, measure_bits_per_byte
from blt_hf.evaluation import __file__ as metrics_file
from blt_hf.evaluation.measuring import _windows
from blt_hf.training.data import BltDataCollator, byte_ids
from helpers.models import make_model, tiny_config
from helpers.processes import run


TEXTS = ["A byte is a small number.", "naïve café </s> 速い狐", "x", "def f(x):\n    return x + 1\n" * 3]
NUM_BYTES = sum(len(text.encode()) for text in TEXTS)


def nats_by_hand(model, ids: list[int]) -> float:
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)
    return -sum(float(log_probs[i - 1, ids[i]]) for i in range(1, len(ids)))


@pytest.fixture(scope="module")
def token_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


@pytest.fixture(scope="module")
def token_model(token_tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(token_tokenizer), max_position_embeddings=64, **size)).eval()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_short_texts_are_scored_whole(batch_size):
    model = make_model()
    measured = measure_bits_per_byte(model, TEXTS, batch_size=batch_size)
    nats = sum(nats_by_hand(model, [1, *byte_ids(text)]) for text in TEXTS)
    assert measured.nats == pytest.approx(nats, rel=1e-5)
    assert measured.bits_per_byte == pytest.approx(nats / math.log(2) / NUM_BYTES, rel=1e-5)
    assert measured.num_bytes == measured.num_tokens == NUM_BYTES and measured.num_texts == len(TEXTS)
    lengths = [
        model(torch.tensor([[1, *byte_ids(text)]]), output_patches=True).patch_lengths[0].tolist() for text in TEXTS
    ]
    patches = sum(len(row) - 1 - (row[-1] == 1) for row in lengths)  # neither the BOS nor the byte after the text
    assert measured.bytes_per_patch == pytest.approx(NUM_BYTES / patches)
    assert measured.bytes_per_second == pytest.approx(NUM_BYTES / measured.seconds)


@pytest.mark.parametrize(("max_length", "stride"), [(16, 5), (16, 15), (9, 1), (2, 1), (200, None)])
def test_windows_score_each_byte_once(max_length, stride):
    model = make_model(model_class=lambda config: make_model().model.patcher)
    text = TEXTS[3]
    ids = byte_ids(text)
    measured = measure_bits_per_byte(model, [text], max_length=max_length, stride=stride, batch_size=4)
    nats, scored = 0.0, 0
    while scored < len(ids):  # the same, written another way: one window at a time, its context left out of the sum
        end = len(ids[: max_length - 1]) if not scored else min(scored + stride, len(ids))
        row = [1, *ids[:end][-(max_length - 1) :]]
        new = end - scored
        nats += nats_by_hand(model, row) - (nats_by_hand(model, row[:-new]) if len(row) > new + 1 else 0)
        scored = end
    assert measured.nats == pytest.approx(nats, rel=1e-4)
    assert measured.num_bytes == measured.num_tokens == len(ids)
    assert measured.bytes_per_patch is None


@pytest.mark.parametrize("num_ids", [1, 7, 8, 9, 30])
def test_windows(num_ids):
    ids = list(range(100, 100 + num_ids))
    windows = list(_windows(1, ids, max_length=9, stride=3))
    assert [i for window in windows for i in window.ids[1 + window.context :]] == ids
    assert all(len(window.ids) <= 9 and window.ids[0] == 1 for window in windows)
    assert all(window.context >= 5 for window in windows[1:])


def test_windows_are_patches_too():
    """Bytes a patch count the patches of scored bytes only, whatever context stands before them."""
    model = make_model(tiny_config(patching_mode="static", patch_size=4, patcher_config={"sliding_window": 512}))
    measured = measure_bits_per_byte(model, ["x" * 400], max_length=81, stride=40)
    assert measured.bytes_per_patch == pytest.approx(4)


def test_token_models_have_the_same_number(token_model, token_tokenizer):
    measured = measure_bits_per_byte(token_model, TEXTS, token_tokenizer)
    ids = [token_tokenizer(text).input_ids for text in TEXTS]
    nats = sum(nats_by_hand(token_model, [token_tokenizer.eos_token_id, *row]) for row in ids)
    assert measured.bits_per_byte == pytest.approx(nats / math.log(2) / NUM_BYTES, rel=1e-5)
    assert measured.num_bytes == NUM_BYTES and measured.num_tokens == sum(map(len, ids)) < NUM_BYTES
    assert measured.bytes_per_token == NUM_BYTES / measured.num_tokens
    # The limit of the config holds: 64 positions.
    long = measure_bits_per_byte(token_model, [TEXTS[0] * 20], token_tokenizer)
    assert long.num_bytes == 20 * len(TEXTS[0])


def test_uniform_models_need_eight_bits(token_model, token_tokenizer):
    """A byte model that knows nothing needs log2(260) bits; a token model log2(vocabulary) a token."""
    model = make_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert measure_bits_per_byte(model, TEXTS).bits_per_byte == pytest.approx(math.log2(260), rel=1e-6)
    import copy

    blank = copy.deepcopy(token_model)
    torch.nn.init.zeros_(blank.lm_head.weight)
    measured = measure_bits_per_byte(blank, TEXTS, token_tokenizer)
    bits = math.log2(len(token_tokenizer)) * measured.num_tokens / NUM_BYTES
    assert measured.bits_per_byte == pytest.approx(bits, rel=1e-6)


def test_lossy_tokenizers_are_told(token_model, token_tokenizer):
    import copy

    lossy = copy.deepcopy(token_tokenizer)
    from tokenizers import normalizers

    lossy.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.warns(UserWarning, match="too low"):
        measure_bits_per_byte(token_model, TEXTS, lossy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": []}, "no byte"),
        ({"texts": [""]}, "no byte"),
        ({"max_length": 1}, "at least 2"),
        ({"max_length": 8, "stride": 8}, r"less than `max_length` \(8\); got 8"),
        ({"stride": 0}, "at least 1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        measure_bits_per_byte(make_model(), **{"texts": TEXTS, **options})


def test_token_models_need_their_tokenizer_and_utf8(token_model, token_tokenizer):
    with pytest.raises(ValueError, match="LlamaForCausalLM reads tokens"):
        measure_bits_per_byte(token_model, TEXTS)
    with pytest.raises(ValueError, match="not UTF-8"):
        measure_bits_per_byte(token_model, [b"\xff"], token_tokenizer)
    assert measure_bits_per_byte(make_model(), [b"\xff"]).num_bytes == 1


def test_metric_module_by_path_and_by_package():
    by_path = evaluate.load(os.path.join(os.path.dirname(metrics_file), "bits_per_byte"))
    for metric in (by_path, load_bits_per_byte()):
        result = metric.compute(predictions=[4 * math.log(2), 2 * math.log(2)], references=["é", "a"])
        assert result == {"bits_per_byte": pytest.approx(2), "num_bytes": 3, "nats": pytest.approx(6 * math.log(2))}
        assert metric.compute(predictions=[math.log(2)], references=[4])["bits_per_byte"] == pytest.approx(0.25)
        metric.add_batch(predictions=[1.0], references=["ab"])
        metric.add(prediction=1.0, reference="cd")
        assert metric.compute()["bits_per_byte"] == pytest.approx(0.5 / math.log(2))
    with pytest.raises(ValueError, match="no byte"):
        by_path.compute(predictions=[1.0], references=[""])
    with pytest.raises(ValueError, match="must not be negative"):
        by_path.compute(predictions=[-1.0], references=["a"])


def test_metric_module_needs_nothing_of_this_package():
    folder = os.path.join(os.path.dirname(metrics_file), "bits_per_byte")
    program = (
        f"import sys, evaluate; metric = evaluate.load({folder!r})\n"
        "print(metric.compute(predictions=[0.0], references=['a'])['num_bytes'], 'blt_hf' in sys.modules)"
    )
    done = run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]


def evaluate_with_trainer(model, data, collator, metric, folder) -> dict:
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, per_device_eval_batch_size=3
    )
    trainer = Trainer(
        model,
        arguments,
        eval_dataset=data,
        data_collator=collator,
        compute_metrics=metric,
        preprocess_logits_for_metrics=metric.preprocess_logits,
    )
    return trainer.evaluate()


def test_trainer_reports_bits_per_byte(tmp_path):
    model = make_model()
    data = Dataset.from_dict({"input_ids": [[1, *byte_ids(text), 2] for text in TEXTS]})
    found = evaluate_with_trainer(model, data, BltDataCollator(), TrainerBitsPerByte(), tmp_path)
    assert found["eval_bits_per_byte"] == pytest.approx(measure_bits_per_byte(model, TEXTS).bits_per_byte, rel=1e-5)


def test_trainer_reports_bits_per_byte_of_token_models(tmp_path, token_model, token_tokenizer):
    end = token_tokenizer.eos_token_id
    data = Dataset.from_dict({"input_ids": [[end, *token_tokenizer(text).input_ids, end] for text in TEXTS[:2]]})
    found = evaluate_with_trainer(
        token_model, data, BltDataCollator(), TrainerBitsPerByte(token_tokenizer), tmp_path
    )  # fmt: skip
    expected = measure_bits_per_byte(token_model, TEXTS[:2], token_tokenizer)
    assert found["eval_bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-5)


def test_trainer_metric_says_what_is_missing():
    prediction = type("Prediction", (), {"predictions": torch.zeros(2, 3, 260), "label_ids": None})
    with pytest.raises(ValueError, match="preprocess_logits_for_metrics"):
        TrainerBitsPerByte()(prediction)
