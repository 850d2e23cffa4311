"""Broken files, a full disk, an interrupt, many threads: an error that says so, or the right answer."""

import copy
import os
import struct
import threading

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LogitsProcessor, LogitsProcessorList

from blt_hf import BltCache, BltForCausalLM, BltTokenizer
from helpers.fault_workers import Children, convert, save
from helpers.meta_checkpoints import write_meta
from helpers.models import make_model
from helpers.texts import encode


@pytest.fixture(scope="module")
def model() -> BltForCausalLM:
    return make_model()


@pytest.fixture(scope="module")
def children() -> Children:
    return Children()


# ---- A full disk ----


@pytest.mark.parametrize("limit", [100, 40_000, 1_000_000])
def test_a_full_disk_while_saving(children, tmp_path, limit):
    code, _ = children.run(save, tmp_path / "out", 0, limit)
    assert code == 1
    with pytest.raises(Exception, match=r".+"):
        BltForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("limit", [100, 4_000])
def test_a_full_disk_while_converting(children, tmp_path, limit):
    source = write_meta(tmp_path / "meta")
    code, _ = children.run(convert, source, tmp_path / "out", limit)
    assert code == 1
    assert not (tmp_path / "out").exists() and not [*tmp_path.glob(".out*")]


# ---- Broken files ----


def test_truncated_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    for length in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(Exception, match=r"(?i)header|incomplete|small|safetensors|corrupt|large|file"):
            BltForCausalLM.from_pretrained(tmp_path)


def test_truncated_json(model, tmp_path):
    """Half a configuration or tokenizer is an error; transformers takes half a `generation_config.json` for none."""
    model = copy.deepcopy(model)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path)
    BltTokenizer().save_pretrained(tmp_path)
    readers = {
        "config.json": BltForCausalLM,
        "tokenizer.json": BltTokenizer,
        "tokenizer_config.json": BltTokenizer,
    }
    names = {path.name for path in tmp_path.glob("*.json")}
    assert names == {*readers, "generation_config.json"}
    for name in sorted(names):
        data = (tmp_path / name).read_bytes()
        for length in (0, 1, len(data) // 2, len(data) - 2):
            (tmp_path / name).write_bytes(data[:length])
            if name in readers:
                with pytest.raises((OSError, ValueError), match=r"(?i)json|expecting|unterminated"):
                    readers[name].from_pretrained(tmp_path)
            else:
                assert BltForCausalLM.from_pretrained(tmp_path).generation_config.max_new_tokens is None
        (tmp_path / name).write_bytes(data)
    assert BltForCausalLM.from_pretrained(tmp_path).generation_config.max_new_tokens == 7


@pytest.mark.parametrize("count", [24, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_flipped_bits_in_the_description_of_the_weights(model, tmp_path, count):
    """An error, a report of what does not fit, or no change in any weight. (Flips in the numbers cannot be seen.)"""
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    data, expected = path.read_bytes(), model.state_dict()
    (header,) = struct.unpack("<Q", data[:8])
    generator = torch.Generator().manual_seed(0)
    seen = {"error": 0, "report": 0, "same": 0}
    for position in torch.randint(8 * (8 + header), (count,), generator=generator).tolist():
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            loaded, report = BltForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        except Exception:
            seen["error"] += 1
            continue
        if any(report.values()):
            seen["report"] += 1
            continue
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items()), position
        seen["same"] += 1
    assert seen["error"] > 0 and sum(seen.values()) == count


def test_flipped_bits_in_the_weights_are_the_hubs_to_find(model, tmp_path):
    """The format has no checksum: one weight differs and nothing can tell. Downloads are compared by their SHA-256."""
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    before = {name: tensor.clone() for name, tensor in load_file(path).items()}
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    after = load_file(path)
    assert sum(not torch.equal(before[name], after[name]) for name in before) == 1
    BltForCausalLM.from_pretrained(tmp_path)


class _Surprise:
    def __reduce__(self):
        return os.system, ("touch surprise",)


def test_a_pickle_with_code_is_not_run(model, tmp_path, monkeypatch):
    """`tests/conversion/test_checkpoints.py` has the same for Meta's `.pth` files."""
    monkeypatch.chdir(tmp_path)
    model.config.save_pretrained(tmp_path)
    torch.save({**model.state_dict(), "surprise": _Surprise()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights.only"):
        BltForCausalLM.from_pretrained(tmp_path)
    assert not (tmp_path / "surprise").exists()


# ---- An interrupt in the middle of generate ----


class _Interrupt(LogitsProcessor):
    def __init__(self, after: int):
        self.after = after

    def __call__(self, input_ids, scores):
        self.after -= 1
        if self.after == 0:
            raise KeyboardInterrupt
        return scores


IDS = torch.tensor([encode("An interrupt comes at any time, ")])


def check_that_it_goes_on(model, cache: BltCache) -> None:
    """What the cache says it has read, it has read: the next bytes get the logits of the full pass."""
    text = model.generate(IDS, max_new_tokens=24, do_sample=False)
    num_read = cache.get_seq_length()
    assert num_read < text.shape[1]
    with torch.no_grad():
        full = model(text, use_cache=False).logits
        rest = model(text[:, num_read:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(rest, full[:, num_read:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("after", [1, 2, 9])
def test_an_interrupt_between_two_bytes(model, after):
    cache = BltCache(model.config)
    processors = LogitsProcessorList([_Interrupt(after)])
    with pytest.raises(KeyboardInterrupt):
        model.generate(IDS, max_new_tokens=24, do_sample=False, past_key_values=cache, logits_processor=processors)
    assert cache.get_seq_length() == IDS.shape[1] + after - 1
    check_that_it_goes_on(model, cache)


def run_until_call(model, cache: BltCache, last: int) -> int:
    """Generates, and interrupts when modules were called `last` times; the number of calls."""
    calls = 0

    def count(module, args):
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt

    hook = register_module_forward_pre_hook(count)
    try:
        model.generate(IDS, max_new_tokens=24, do_sample=False, past_key_values=cache)
    except KeyboardInterrupt:
        pass
    finally:
        hook.remove()
    return calls


@pytest.mark.parametrize("count", [8, pytest.param(400, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_an_interrupt_in_the_middle_of_a_pass(model, count):
    """In any module of any pass: the cache goes on from the last pass that was whole."""
    num_calls = run_until_call(model, BltCache(model.config), -1)
    assert num_calls > 100
    read = set()
    for step in range(count):
        cache, last = BltCache(model.config), 1 + step * (num_calls - 1) // (count - 1)
        assert run_until_call(model, cache, last) == last
        read.add(cache.get_seq_length())
        check_that_it_goes_on(model, cache)
    assert len(read) > 3


# ---- Threads ----


def test_eight_threads_generate_what_one_does(model):
    prompts = [f"Thread number {number} says " * (1 + number % 3) for number in range(8)]
    rows = [torch.tensor([encode(prompt)]) for prompt in prompts]

    def generate(ids):
        return model.generate(ids, max_new_tokens=16, do_sample=False)

    expected, found = [generate(ids) for ids in rows], [None] * len(rows)

    def work(number: int) -> None:
        found[number] = [generate(rows[number]) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for texts, text in zip(found, expected):
        assert all(torch.equal(other, text) for other in texts)
