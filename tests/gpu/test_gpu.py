"""What only a GPU can show: its numbers are a CPU's, how often the host waits for it, half precision, CUDA graphs, memory.

`make test-gpu` runs these, and the tests of the model with their tensors and models on the GPU.
"""

import copy
import os
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CompileConfig,
    GenerationConfig,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

from blt_hf import BltForCausalLM, BltTokenizer, cuda_graphs
from blt_hf.training.data import BltDataCollator
from helpers import processes
from helpers.diffusion import diffusion_model
from helpers.models import DEVICE, RULES, make_model, model_for, tiny_config
from helpers.texts import encode, pad, text_ids


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cpu", reason="BLT_TEST_DEVICE names no GPU; `make test-gpu` sets it"),
]

TEXT = "some text, with 2 lines\nand words of many lengths; é速 ab"
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 24}


def on_both(rule: str) -> tuple[BltForCausalLM, BltForCausalLM]:
    """A model on a CPU, and the same on the GPU."""
    model = model_for(rule)
    return copy.deepcopy(model).to("cpu"), model


def mid_model(**overrides) -> BltForCausalLM:
    """8 layers of 512 and 9 local ones of 256: enough for a GPU to be busy, with heads that its kernels take."""
    local = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 704}
    config = tiny_config(
        patcher_config={**local, "num_hidden_layers": 4, "sliding_window": 512},
        encoder_config=local,
        decoder_config={**local, "num_hidden_layers": 4, "hidden_size_global": 512},
        global_config={
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "intermediate_size": 1408,
        },
        encoder_hash_byte_group_vocab=5003,
        local_attention_window_len=512,
        **overrides,
    )
    return make_model(config)


@contextmanager
def waits():
    """A list that gets an entry each time the host waits for the GPU."""
    seen = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
            seen += [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]


# ---- One answer ----


@pytest.mark.parametrize("rule", sorted(RULES))
def test_numbers_and_gradients_of_a_cpu(rule):
    rows = [text_ids(rule, TEXT), text_ids(rule, "a short one")]
    ids, mask = pad(rows, "left")
    found = []
    for model in on_both(rule):
        where = model.device
        labels = torch.where(mask == 0, -100, ids).to(where)
        out = model(ids.to(where), attention_mask=mask.to(where), labels=labels, output_patches=True)
        model.zero_grad()
        out.loss.backward()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        text = model.generate(ids.to(where), attention_mask=mask.to(where), **GREEDY)
        found.append((out.logits.detach().cpu()[mask.cpu() > 0], out.patch_lengths.cpu(), gradients, text.cpu()))
    (logits, lengths, gradients, text), (logits2, lengths2, gradients2, text2) = found
    assert torch.equal(lengths, lengths2)
    torch.testing.assert_close(logits2, logits, atol=1e-4, rtol=1e-4)
    assert gradients.keys() == gradients2.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients2[name], gradient, atol=1e-4, rtol=1e-3, msg=name)
    assert torch.equal(text, text2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
    exact = mid_model()
    exact.save_pretrained(tmp_path)
    half = BltForCausalLM.from_pretrained(tmp_path, dtype=dtype).to(DEVICE)
    ids = torch.tensor([encode(TEXT * 30)])
    starts = []
    with torch.no_grad():
        one = exact(ids, output_patches=True)
        lengths = one.patch_lengths
        for model, is_cast in ((half, False), (exact, True)):
            with torch.autocast(DEVICE.type, dtype, enabled=is_cast):
                given = model(ids, patch_lengths=lengths).logits.float()
                starts.append(model(ids, output_patches=True).patch_lengths[0].cumsum(0).tolist())
            error = (given - one.logits).norm() / one.logits.norm()
            assert error < 3e-2, error
    for found in starts:  # few comparisons are so near to the threshold
        expected = set(lengths[0].cumsum(0).tolist())
        assert len(expected & set(found)) > 0.9 * len(expected | set(found))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decodes(dtype):
    """What the cache chose is what the whole text would choose, or nearly."""
    half = mid_model(patching_mode="space").to(dtype)
    ids, mask = pad([encode(TEXT * 30)[:700], encode(TEXT * 10)[:300]], "left")
    text = half.generate(ids, attention_mask=mask, **GREEDY)
    with torch.no_grad():
        logits = half(text[:, :-1], attention_mask=torch.cat([mask, torch.ones_like(mask[:, :23])], 1)).logits[:, 699:]
    chosen = logits.gather(2, text[:, 700:, None])[..., 0]
    assert (logits.max(dim=-1).values - chosen).max() < 0.1


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@pytest.mark.parametrize("length", [300, 1700])
def test_attention_implementations(implementation, length):
    model = mid_model()
    ids, mask = pad([encode(TEXT * 40)[:length], encode(TEXT * 20)[: length // 2]], "right")
    found = []
    for name in ("sdpa", implementation):
        model.set_attn_implementation(name)
        model.zero_grad()
        out = model(ids, attention_mask=mask, labels=torch.where(mask == 0, -100, ids))
        out.loss.backward()
        found.append((out.logits.detach()[mask > 0], model.model.local_encoder.embed_tokens.weight.grad.clone()))
    torch.testing.assert_close(found[1][0], found[0][0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(found[1][1], found[0][1], atol=2e-3, rtol=2e-2)


# ---- How often the host waits ----


def test_waits_of_a_forward_and_of_a_byte():
    """Laws of the house: checks of values cost nothing on a GPU, and the host asks once what the patcher decided."""
    model = mid_model()
    ids, mask = pad([encode(TEXT * 4), encode(TEXT * 3)], "left")
    lengths = model(ids[:1], output_patches=True).patch_lengths
    byte = ids[:1, -1:]
    with torch.no_grad():
        cache = model(ids[:1], use_cache=True).past_key_values
        model(byte, past_key_values=cache)
        for arguments, most in [
            ({"input_ids": ids[:1], "use_cache": False}, 1),
            ({"input_ids": ids[:1], "labels": ids[:1], "use_cache": False}, 1),
            ({"input_ids": ids, "attention_mask": mask, "use_cache": False}, 2),
            ({"input_ids": ids[:1], "patch_lengths": lengths, "use_cache": False}, 2),
            ({"input_ids": byte, "past_key_values": cache}, 1),
        ]:
            torch.cuda.synchronize()
            with waits() as seen:
                model(**arguments)
            assert len(seen) <= most, (list(arguments), seen)


# ---- Decoding ----


STATIC = {"cache_implementation": "static"}
PLAIN = {"cache_implementation": "dynamic"}
DRAWN = {**GREEDY, "do_sample": True, "max_new_tokens": 48}


@pytest.fixture
def captures(monkeypatch) -> list:
    """What was captured; a warning that something cannot be is an error."""
    made, capture = [], cuda_graphs.capture

    def count(*arguments):
        made.append(capture(*arguments))
        return made[-1]

    monkeypatch.setattr(cuda_graphs, "capture", count)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot be captured.*")
        yield made
    made.clear()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("rule", ["entropy", "space", "wide_cross", "full_windows", "documents"])
def test_recorded_steps_write_the_same_text(rule, rows, captures):
    model = make_model(tiny_config(**RULES[rule]))
    ids, mask = pad([encode(TEXT)[: 40 - 7 * row] for row in range(rows)], "left")
    settings = {**GREEDY, "attention_mask": mask, "max_new_tokens": 60}
    expected = model.generate(ids, **settings, **PLAIN)
    assert not captures
    for more in ({}, {}, {**STATIC, "disable_compile": True}):
        assert torch.equal(model.generate(ids, **settings, **more), expected)
    assert len(captures) >= 6


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.3, "typical_p": 0.9, "suppress_tokens": [99, 100]},
        {"eos_token_id": list(range(4, 20)), "min_new_tokens": 9},
        {"self_speculation_window": 4},
        {"self_speculation_window": 4, "top_k": 20, "repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_one_seed_gives_one_text(settings, rows, captures):
    """Recorded or not; and the generator of the GPU has gone as far."""
    model, found = make_model(seed=4), []
    ids, mask = pad([encode(TEXT)[: 40 - 7 * row] for row in range(rows)], "left")
    for more in (PLAIN, {}, {}):
        torch.manual_seed(3)
        text = model.generate(ids, attention_mask=mask, **{**DRAWN, **settings, **more})
        found.append((text.tolist(), torch.cuda.get_rng_state().tolist()))
    assert found[0] == found[1] == found[2]
    assert captures


def test_noise_is_what_multinomial_draws():
    for rows in (1, 3, 16):
        probs = torch.rand(rows, 260).softmax(dim=-1)
        for seed in range(20):
            torch.manual_seed(seed)
            expected, after = torch.multinomial(probs, 1), torch.rand(1)
            torch.manual_seed(seed)
            noise = torch.empty_like(probs).exponential_()
            assert torch.equal(cuda_graphs.draw(probs, noise), expected) and torch.equal(torch.rand(1), after)


def test_other_threads_draw_and_allocate_while_steps_are_captured(captures):
    model = mid_model()
    ids, errors, stop = torch.tensor([encode(TEXT)]), [], threading.Event()
    expected = model.generate(ids, **GREEDY, **PLAIN)

    def work(number: int):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                while not stop.is_set():
                    size = 1000 + 997 * number
                    kept = [torch.rand(size * (1 + i % 7)) + torch.zeros(size * (1 + i % 7)) for i in range(20)]
                    assert float(sum(x.mean() for x in kept)) > 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(12):
            assert torch.equal(model.generate(ids, **GREEDY), expected)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors and len(captures) >= 24


@pytest.mark.parametrize("do_sample", [False, True])
def test_eight_threads(do_sample, captures):
    """One of them captures at a time."""
    model, errors, found = make_model(seed=4), [], {}
    texts = [torch.tensor([encode(TEXT)[: 20 + number]]) for number in range(8)]
    expected = [model.generate(ids, **GREEDY, **PLAIN) for ids in texts]

    def work(number: int):
        try:
            for _ in range(3):
                with torch.cuda.stream(torch.cuda.Stream()):
                    found[number] = model.generate(texts[number], **{**GREEDY, "do_sample": do_sample})
                    torch.cuda.current_stream().synchronize()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(found) == 8 and captures
    if not do_sample:
        assert all(torch.equal(found[number], expected[number]) for number in range(8))


def test_another_stream(captures):
    model, ids = make_model(), torch.tensor([encode(TEXT)])
    expected = model.generate(ids, **GREEDY, **PLAIN)
    torch.cuda.synchronize()
    for _ in range(2):
        with torch.cuda.stream(torch.cuda.Stream()):
            text = model.generate(ids, **GREEDY)
            torch.cuda.current_stream().synchronize()
        assert torch.equal(text, expected)
    assert torch.equal(model.generate(ids, **GREEDY), expected) and captures


def test_a_thousand_calls_take_no_more_memory():
    """What graphs leave in their pool is used again."""
    model, ids = make_model(tiny_config(global_config={"num_hidden_layers": 1})), torch.tensor([encode(TEXT)[:12]])
    sizes = []
    for number in range(1000):
        model.generate(ids, **{**GREEDY, "max_new_tokens": 16 + number % 3})
        if number in (99, 999):
            sizes.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    (allocated, reserved), (allocated_later, reserved_later) = sizes
    assert allocated_later <= allocated + 2**20 and reserved_later <= reserved + 2**22, sizes


def test_weights_that_change_between_calls(captures):
    model, ids = mid_model(), torch.tensor([encode(TEXT)])
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    other = {name: value.roll(1, 0).clone() for name, value in model.lm_head.state_dict().items()}
    layer = model.model.global_transformer.layers[0].self_attn.q_proj

    def train():
        model.train()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.eval()

    def replace():
        layer.weight = torch.nn.Parameter(layer.weight.detach().flip(0).clone())

    def assign():
        layer.weight.data = layer.weight.data.flip(1).clone()

    for change in (train, lambda: model.lm_head.load_state_dict(other, assign=True), replace, assign, model.bfloat16):
        model.generate(ids, **GREEDY)
        change()
        made = len(captures)
        assert torch.equal(model.generate(ids, **GREEDY), model.generate(ids, **GREEDY, **PLAIN)), change
        assert len(captures) > made


def test_rooms_that_grow_and_texts_that_go_on(captures):
    """Slots grow by blocks under the graphs; what `generate` returned is continued."""
    model = mid_model(patching_mode="space")
    ids = torch.tensor([encode(TEXT * 3)])
    settings = {**GREEDY, "max_new_tokens": 700}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, **settings, **PLAIN))
    for more in (PLAIN, {}):
        first = model.generate(ids, **GREEDY, **more, return_dict_in_generate=True)
        again = model.generate(first.sequences, **GREEDY, past_key_values=first.past_key_values)
        assert torch.equal(again, model.generate(ids, **{**GREEDY, "max_new_tokens": 48}, **PLAIN))


REFUSED = """
import torch, warnings
from helpers.models import make_model, tiny_config
from helpers.texts import encode
from blt_hf import register_patching_rule
from blt_hf.model import step_blt

@register_patching_rule("asks", uses_entropies=False)
def asks(ids, entropies, positions, rule):
    starts = ids[..., -1] == ord(" ") + 4
    return starts if bool(starts.any()) else torch.zeros_like(starts)

step_blt.CAPTURES_BY_DEFAULT = True
model = make_model(tiny_config(patching_mode="asks"))
other = make_model()
ids = torch.tensor([encode("some text")], device="cuda")
settings = {"max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    text = model.generate(ids, do_sample=False, **settings)
assert any("cannot be captured" in str(w.message) for w in caught)
assert torch.equal(text, model.generate(ids, do_sample=False, cache_implementation="dynamic", **settings))
for _ in range(2):
    other.generate(ids, do_sample=True, **settings)
torch.rand(3, device="cuda"), torch.cuda.empty_cache()
"""


def test_random_numbers_after_a_capture_that_failed():
    """In a process of its own, as torch may take a failed capture ill."""
    environment = {**os.environ, "PYTHONPATH": processes.python_path()}
    done = subprocess.run([sys.executable, "-c", REFUSED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_waits_of_recorded_steps(captures):
    """A byte is one transfer: the bytes, and the patches that they closed."""
    model, counts = mid_model(), []
    ids = torch.tensor([encode(TEXT)])
    expected = model.generate(ids, **GREEDY, **PLAIN)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    for more in (PLAIN, {}):
        for number in (40, 60):
            with waits() as seen:
                model.generate(ids, **{**DRAWN, "max_new_tokens": number, "top_k": 30}, **more)
            counts.append(len(seen))
    assert counts[3] - counts[2] <= 20 + 4, (counts, seen[-6:])
    assert counts[1] - counts[0] <= 2 * 20 + 4, counts  # torch may ask whether probabilities are sound


@pytest.mark.parametrize("rows", [1, 3])
def test_compiled_and_recorded_steps_write_the_same_text(rows):
    model = make_model(tiny_config())
    ids, mask = pad([encode(TEXT)[: 40 - 7 * row] for row in range(rows)], "left")
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    static = {**STATIC, "compile_config": CompileConfig(mode="reduce-overhead")}
    for _ in range(2):
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY, **static), expected)


def test_continuous_batching_with_recorded_steps(captures):
    model = make_model()
    texts = [encode(TEXT)[:length] for length in (5, 30, 12, 44, 21)]
    expected = [model.generate(torch.tensor([ids]), **GREEDY)[0, len(ids) :].tolist() for ids in texts]
    for more in ({}, {**STATIC, "disable_compile": True}):
        settings = GenerationConfig(**GREEDY, **more)
        settings.eos_token_id = -1
        found = model.generate_batch(texts, generation_config=settings)
        assert [output.generated_tokens for output in found.values()] == expected
    assert len(captures) >= 6


@pytest.mark.parametrize("settings", [{"self_speculation_window": 4}, {"diffusion_block_size": 4, "verify": True}])
def test_drafts_and_blocks(settings):
    model = diffusion_model(seed=1)
    ids, mask = pad([encode(TEXT)[:40], encode(TEXT)[:33]], "left")
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    for static in ({}, {**STATIC, "disable_compile": True}):
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY, **settings, **static), expected)


def test_the_pipeline(tmp_path):
    mid_model().save_pretrained(tmp_path)
    BltTokenizer().save_pretrained(tmp_path)
    pipe = pipeline("text-generation", model=str(tmp_path), device=0, dtype=torch.bfloat16)
    (found,) = pipe(TEXT, max_new_tokens=8, do_sample=False)
    assert found["generated_text"].startswith(TEXT) and pipe.model.dtype == torch.bfloat16


@pytest.mark.parametrize("room", ["8GB", "60MB"])
def test_device_maps(tmp_path, room):
    """Where the GPU has no room for all, some layers wait in the memory of the host."""
    model = mid_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto", max_memory={0: room, "cpu": "8GB"})
    places = getattr(loaded, "hf_device_map", {"": 0})  # some versions have none where all is in one place
    assert ("cpu" in map(str, places.values())) == (room == "60MB"), places
    ids = torch.tensor([encode(TEXT)])
    assert torch.equal(loaded.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


# ---- Training ----


def test_trainer_in_half_precision(tmp_path):
    model = mid_model().train()
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": row} for row in torch.randint(4, 20, (64, 96), generator=generator).tolist()]
    arguments = TrainingArguments(
        tmp_path, max_steps=30, per_device_train_batch_size=8, learning_rate=1e-3, bf16=True, logging_steps=10,
        report_to="none", save_strategy="no", disable_tqdm=True, gradient_checkpointing=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=BltDataCollator())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 3.3 < losses[0]  # nearly the 2.8 nats of 16 kinds of bytes
    assert all(p.grad is None for p in model.model.patcher.parameters())


def test_compiled_training_has_the_same_gradients():
    model = mid_model().train()
    ids = torch.tensor([encode(TEXT * 10)])
    found = []
    for call in (model, torch.compile(model, dynamic=True)):
        model.zero_grad()
        loss = call(ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-4, rtol=1e-4)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-4, rtol=2e-2, msg=name)


# ---- Memory ----


def test_long_texts_need_no_square():
    """A mask of 65,536 x 65,536 alone would take 4 GB, and scores of 4 heads 69 GB in fp32."""
    model = mid_model().to(torch.bfloat16)
    ids = torch.tensor([encode(TEXT * 1200)[:65536]])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        out = model.model(ids, use_cache=False)
    assert out.last_hidden_state.isfinite().all()
    taken = (torch.cuda.max_memory_allocated() - before) / 2**30
    assert taken < 4, taken


def quantization(kind: str):
    if kind == "int8wo":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(version=2))
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", ["int8wo", "int8", "nf4"])
def test_quantized_weights_decode_and_train_an_adapter(tmp_path, kind):
    model = mid_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=DEVICE, quantization_config=quantization(kind))
    ids = torch.tensor([encode(TEXT * 4)])
    with torch.no_grad():
        one, other = model(ids, output_patches=True), loaded(ids, output_patches=True)
    error = (one.logits - other.logits).norm() / one.logits.norm()
    assert 0 < error < (0.5 if kind == "nf4" else 0.1), error
    assert torch.equal(one.patch_lengths, other.patch_lengths)
    assert loaded.generate(ids, **GREEDY).shape == (1, ids.shape[1] + 24)
    adapted = get_peft_model(loaded, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")).train()
    adapted(ids, labels=ids).loss.backward()
    trained = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all(gradient.isfinite().all() for gradient in trained.values())
    assert not [name for name in trained if "patcher" in name]
