"""Weights that lie elsewhere: offloaded, dispatched, on `meta`, stored in fewer bits. The numbers stay."""

import copy

import accelerate
import pytest
import torch
from accelerate import (
    Accelerator,
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from accelerate.big_modeling import attach_layerwise_casting_hooks
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from accelerate.state import AcceleratorState
from accelerate.utils import compute_module_sizes
from packaging.version import Version
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from helpers.recipes import (
    BOTH,
    CAUSAL,
    TEXTS,
    assert_other,
    assert_same,
    encode,
    logits_of,
    make,
    on,
    tokenizer,
    write,
)


IDS = tokenizer(TEXTS[1], return_tensors="pt").input_ids
CPU = torch.device("cpu")
OLD_ACCELERATE = Version(accelerate.__version__) < Version("1.15")


@pytest.fixture(autouse=True)
def own_state():
    """accelerate keeps the settings of the first `Accelerator` of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def assert_answers_alike(found, expected) -> None:
    """Whole texts twice, steps from a cache, a batch, and generated text."""
    for _ in range(2):
        assert_same(logits_of(found), logits_of(expected))
    batch = encode()
    with torch.no_grad():
        first = found(IDS[:, :20], use_cache=True)
        rest = found(IDS[:, 20:], past_key_values=first.past_key_values, use_cache=True).logits
        assert_same(rest, logits_of(expected)[:, 20:])
        assert_same(found(**batch).logits, expected(**batch).logits)
    assert write(found, num_bytes=8) == write(expected, num_bytes=8)


def offloaded(model) -> set[str]:
    """Modules whose weights are on `meta` until they are called."""
    return {
        name
        for name, module in model.named_modules()
        if any(weight.device.type == "meta" for weight in module._parameters.values() if weight is not None)
    }


@on(*CAUSAL)
def test_weights_that_wait_on_the_cpu(kind):
    """`cpu_offload`: each module has its weights while it is called, and none before and after."""
    model = cpu_offload(make(kind), CPU)
    assert len(offloaded(model)) > 10
    assert_answers_alike(model, make(kind))


@on(*CAUSAL)
def test_weights_that_wait_on_a_disk(kind, tmp_path):
    model = disk_offload(make(kind), tmp_path, CPU)
    assert len(offloaded(model)) > 10 and len(list(tmp_path.iterdir())) > 10
    assert_answers_alike(model, make(kind))


@on(*CAUSAL)
def test_a_model_too_large_for_memory_is_loaded(kind, tmp_path):
    """`device_map="auto"` with less memory than the model takes: the rest goes to a folder."""
    model = make(kind)
    model.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    size = compute_module_sizes(model)[""]
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": int(size * 0.6)}, offload_folder=tmp_path / "rest"
    )
    assert "disk" in loaded.hf_device_map.values() and offloaded(loaded)
    assert_answers_alike(loaded, model)


@on(*BOTH)
@pytest.mark.parametrize("task", ["sequence", "token"])
def test_an_offloaded_classifier(kind, task, tmp_path):
    if OLD_ACCELERATE and kind == "llama":
        pytest.skip("accelerate 1.10 puts all of a small Llama on the disk, which it then refuses")
    model = make(kind, task, num_labels=3)
    model.save_pretrained(tmp_path / "model")
    auto = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}[task]
    size = compute_module_sizes(model)[""]
    loaded = auto.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": int(size * 0.6)}, offload_folder=tmp_path / "rest"
    )
    assert offloaded(loaded)
    assert_same(logits_of(loaded), logits_of(model))


@on(*CAUSAL)
@pytest.mark.parametrize(
    "device_map", ["auto", "sequential", "balanced", "balanced_low_0", "cpu", {"": "cpu"}], ids=str
)
def test_a_device_map_of_every_kind(kind, device_map, tmp_path):
    model = make(kind)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert {weight.device.type for weight in loaded.parameters()} == {"cpu"}
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert write(loaded, num_bytes=5) == write(model, num_bytes=5)


@on(*CAUSAL)
def test_a_map_written_by_hand_is_followed(kind, tmp_path):
    """Every second child on the disk, as `dispatch_model` is told."""
    model = make(kind)
    inner = model if kind == "patcher" else model.model
    prefix = "" if inner is model else "model."
    names = [prefix + name for name, _ in inner.named_children()] + ([] if inner is model else ["lm_head"])
    names += [prefix + name for name, _ in inner.named_parameters(recurse=False)]
    device_map = {name: "disk" if index % 2 else "cpu" for index, name in enumerate(names)}
    placed = dispatch_model(copy.deepcopy(model), device_map, main_device="cpu", offload_dir=tmp_path)
    assert offloaded(placed)
    assert_answers_alike(placed, model)


@on(*CAUSAL)
def test_an_inferred_map_covers_every_weight_and_splits_no_block(kind):
    model = make(kind)
    size = compute_module_sizes(model)[""]
    if OLD_ACCELERATE:
        pytest.skip("accelerate 1.10 splits the blocks of a Llama as well")
    device_map = infer_auto_device_map(
        model, {"cpu": int(size * 0.9), "disk": 10 * size}, no_split_module_classes=model._no_split_modules
    )
    for name, _ in model.named_parameters():
        assert sum(name == place or name.startswith(f"{place}.") or not place for place in device_map) == 1, name
    for name, module in model.named_modules():
        if type(module).__name__ in model._no_split_modules:
            inside = {device for place, device in device_map.items() if place.startswith(f"{name}.")}
            assert not inside, name
    assert set(device_map.values()) == {"cpu", "disk"}


@on(*CAUSAL)
def test_an_empty_model_is_filled_from_a_checkpoint(kind, tmp_path):
    model = make(kind)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config)
    assert {weight.device.type for weight in empty.parameters()} == {"meta"}
    # Nothing was computed for the buffers of `init_empty_weights`, whose default leaves them where they are.
    filled = load_checkpoint_and_dispatch(empty, tmp_path, device_map={"": "cpu"}).eval()
    assert_answers_alike(filled, model)


@on(*CAUSAL)
def test_an_empty_model_says_how_large_it_is(kind):
    """Sizes and names of a model that has no memory are those of one that has."""
    model = make(kind)
    with init_empty_weights(include_buffers=True):
        empty = type(model)(model.config)
    assert compute_module_sizes(empty) == compute_module_sizes(model)
    assert {n: w.shape for n, w in empty.named_parameters()} == {n: w.shape for n, w in model.named_parameters()}


@on(*CAUSAL)
def test_a_model_that_moves_back_when_the_next_one_is_called(kind):
    first, hook = cpu_offload_with_hook(make(kind), CPU)
    second, other = cpu_offload_with_hook(make(kind, seed=1), CPU, prev_module_hook=hook)
    assert_answers_alike(first, make(kind))
    assert_answers_alike(second, make(kind, seed=1))
    hook.offload()
    assert_answers_alike(first, make(kind))


@on(*CAUSAL)
def test_hooks_that_are_removed_leave_the_model(kind):
    """Offloaded, used, and brought back: weights are there and train."""
    model = cpu_offload(make(kind), CPU)
    expected = logits_of(make(kind))
    write(model, num_bytes=3)
    remove_hook_from_submodules(model)
    assert not offloaded(model)
    assert_same(logits_of(model), expected)
    model(IDS, labels=IDS).loss.backward()
    assert any(weight.grad is not None for weight in model.parameters())


@on(*CAUSAL)
def test_a_hook_sees_each_call_of_each_projection(kind):
    """In a forward and in steps of `generate`: what a hook of accelerate changes is in the text."""

    class Halve(ModelHook):
        def __init__(self):
            self.calls = 0

        def post_forward(self, module, output):
            self.calls += 1
            return output / 2

    model, halved, hooks = make(kind), make(kind), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "o_proj" in name and "patcher." not in name:
            hooks.append(Halve())
            add_hook_to_module(module, hooks[-1])
            halved.get_submodule(name).weight.data.div_(2)
    assert_same(logits_of(model), logits_of(halved))
    before = [hook.calls for hook in hooks]
    assert write(model, num_bytes=6) == write(halved, num_bytes=6)
    assert all(hook.calls > count for hook, count in zip(hooks, before))
    assert_other(logits_of(model), logits_of(make(kind)))


@on(*CAUSAL)
def test_layers_that_are_stored_in_half_precision(kind):
    """`attach_layerwise_casting_hooks`: numbers of rounded weights, computed in fp32."""
    model, rounded = make(kind), make(kind)
    skipped = ("norm", "embed", "patcher") if kind == "blt" else ("norm", "embed")
    attach_layerwise_casting_hooks(
        model, torch.bfloat16, torch.float32, skip_modules_pattern=skipped, non_blocking=False
    )
    stored = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight.dtype == torch.bfloat16]
    assert len(stored) > 10
    for name in stored:
        weight = rounded.get_submodule(name).weight
        weight.data.copy_(weight.data.bfloat16())
    assert_same(logits_of(model), logits_of(rounded))
    assert write(model, num_bytes=6) == write(rounded, num_bytes=6)
    assert_other(logits_of(model), logits_of(make(kind)), 1e-6)


@on(*CAUSAL)
def test_an_accelerator_trains_as_a_plain_loop(kind, tmp_path):
    """`prepare`, `accumulate`, `clip_grad_norm_`, `gather_for_metrics`."""
    losses, weights = [], []
    for accelerated in (True, False):
        model = make(kind).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rows = DataLoader([IDS[0, :20], IDS[0, 10:30], IDS[0, 5:25], IDS[0, :20]], batch_size=2)
        if accelerated:
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
            model, optimizer, rows = accelerator.prepare(model, optimizer, rows)
        seen = []
        for step, batch in enumerate(rows):
            if accelerated:
                with accelerator.accumulate(model):
                    loss = model(batch, labels=batch).loss
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
                seen.append(accelerator.gather_for_metrics(loss.detach()).item())
            else:
                loss = model(batch, labels=batch).loss
                (loss / 2).backward()
                if step % 2:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
                seen.append(loss.item())
        losses.append(seen)
        weights.append(model.lm_head.weight.detach())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert_same(*weights)
    assert_other(weights[0], make(kind).lm_head.weight.detach(), 1e-4)


@on(*CAUSAL)
def test_a_saved_state_goes_on(kind, tmp_path):
    """`save_state` and `load_state`: the second step after loading is the second step."""

    def step(model, optimizer, accelerator):
        loss = model(IDS, labels=IDS).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    accelerator = Accelerator(cpu=True)
    model, optimizer = make(kind), None
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=1e-2))
    step(model, optimizer, accelerator)
    accelerator.save_state(str(tmp_path))
    expected = [step(model, optimizer, accelerator) for _ in range(2)]
    accelerator.load_state(str(tmp_path))
    assert [step(model, optimizer, accelerator) for _ in range(2)] == pytest.approx(expected, abs=1e-6)
    assert expected[0] != pytest.approx(expected[1], abs=1e-4)


@on(*CAUSAL)
def test_a_model_saved_by_the_accelerator_loads(kind, tmp_path):
    """`save_model` in shards, and `unwrap_model` with `save_pretrained`."""
    accelerator = Accelerator(cpu=True)
    model = make(kind)
    prepared = accelerator.prepare(model)
    accelerator.save_model(prepared, tmp_path / "shards", max_shard_size="20KB")
    other = make(kind, seed=1)
    if kind == "blt":
        other.config.patching_threshold = model.config.patching_threshold
    accelerate.load_checkpoint_in_model(other, tmp_path / "shards")
    assert torch.equal(logits_of(other), logits_of(model))
    accelerator.unwrap_model(prepared).save_pretrained(
        tmp_path / "model", state_dict=accelerator.get_state_dict(prepared), save_function=accelerator.save
    )
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits_of(model))


@on(*CAUSAL)
def test_mixed_precision_is_the_models_own_affair_afterwards(kind):
    """`prepare` under bf16 wraps `forward`; what comes out is fp32, and unwrapping gives the model back."""
    model = make(kind)
    expected = logits_of(model)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    logits = prepared(IDS, use_cache=False).logits
    assert logits.dtype == torch.float32
    assert (logits - expected)[:, :4].abs().max() < 0.2
    assert_other(logits[:, :4], expected[:, :4], 1e-6)
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(logits_of(model), expected)


@on(*CAUSAL)
def test_an_offloaded_model_is_saved_whole(kind, tmp_path):
    """`save_pretrained` brings every weight back from where it lies."""
    model = make(kind)
    model.save_pretrained(tmp_path / "model")
    if OLD_ACCELERATE:
        pytest.skip("accelerate 1.10 finds room for no layer in 50 kB, of a Llama neither")
    away = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": "50KB"}, offload_folder=tmp_path / "rest"
    )
    assert offloaded(away)
    away.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits_of(model))


@on(*CAUSAL)
def test_drafts_and_beams_of_an_offloaded_model(kind):
    """Everything that `generate` does in its own way goes by the modules."""
    model, expected = cpu_offload(make(kind), CPU), make(kind)
    ways = [
        {"num_beams": 2},
        {"guidance_scale": 1.5},
        {"do_sample": True, "top_k": 1},
        {"cache_implementation": "static", "disable_compile": True},
    ]
    if kind == "blt":
        ways.append({"self_speculation_window": 3})
    for way in ways:
        assert write(model, num_bytes=5, **way) == write(expected, num_bytes=5, **way)


@on(*CAUSAL)
def test_an_adapter_on_an_offloaded_model(kind):
    """Loaded, used, and unloaded again."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    plain, away = make(kind), make(kind)
    torch.manual_seed(0)
    plain = get_peft_model(plain, config).eval()
    torch.manual_seed(0)
    away = get_peft_model(away, config).eval()
    assert_other(logits_of(plain), logits_of(make(kind)))
    cpu_offload(away, CPU)
    assert_answers_alike(away, plain)
