"""An engine writes what `generate` writes, and with the same log-probabilities."""

import copy

import pytest
import torch
from prometheus_client import REGISTRY
from vllm.platforms import current_platform

from blt_hf_vllm.kernels import VllmKernels
from conftest import MODES, SHAPES, TEXTS, check_equal, encode, engine, metric, model_of, plan_of, ragged_of, write


PROMPTS = [encode(text) for text in TEXTS]


@pytest.mark.parametrize("mode", MODES)
def test_texts_are_those_of_generate(saved, mode):
    """Prompts in pieces, requests that join and leave."""
    model, folder = saved(mode)
    with engine(folder, max_num_batched_tokens=48, max_num_seqs=2) as llm:
        prompts, counts = PROMPTS * 2, [60, 9, 30, 60, 21, 44]
        check_equal(model, prompts, write(llm, prompts, counts))


@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes_and_rules(saved, shape):
    model, folder = saved("entropy", **SHAPES[shape])
    with engine(folder, max_num_batched_tokens=64) as llm:
        check_equal(model, PROMPTS, write(llm, PROMPTS, 40))


@pytest.mark.parametrize(("mode", "memory"), [("static", 2_500_000), ("entropy", 5_000_000)])
def test_preempted_requests_begin_anew(saved, mode, memory):
    model, folder = saved(mode)
    with engine(folder, kv_cache_memory_bytes=memory, disable_log_stats=False, async_scheduling=False) as llm:
        prompts = PROMPTS * 3
        found = write(llm, prompts, 100)
        assert metric(llm, "vllm:num_preemptions") > 0
        check_equal(model, prompts, found)


@pytest.mark.parametrize("mode", ["space", "entropy"])
def test_drafts_that_are_taken_back(saved, mode):
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    model, folder = saved(mode)
    with engine(folder, speculative_config=drafts, disable_log_stats=False, max_num_batched_tokens=64) as llm:
        found = write(llm, PROMPTS, 60)
        accepted = metric(llm, "vllm:spec_decode_num_accepted_tokens")
        assert 0 < accepted < metric(llm, "vllm:spec_decode_num_draft_tokens")
        check_equal(model, PROMPTS, found)


def test_scheduling_ahead(saved):
    model, folder = saved("entropy")
    with engine(folder, async_scheduling=True) as llm:
        check_equal(model, PROMPTS, write(llm, PROMPTS, [50, 3, 20]))
        served = model_of(llm)
    if current_platform.is_cpu():  # whose kernels have copied the weights
        assert served.model.global_transformer.layers[0].mlp.gate_proj.weight.numel() == 0


def test_weights_are_joined_in_place_where_no_kernel_copies_them(saved, monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr("blt_hf_vllm.model.make_kernels", VllmKernels)
    model, folder = saved("entropy")
    with engine(folder) as llm:
        check_equal(model, PROMPTS, write(llm, PROMPTS, 30))
        storages = {
            weight.untyped_storage().data_ptr(): weight.untyped_storage() for weight in model_of(llm).parameters()
        }
    sizes = [weight.nbytes for weight in model.parameters()]
    assert len(storages) < len(sizes) and sum(storage.nbytes() for storage in storages.values()) == sum(sizes)


@pytest.mark.parametrize(("mode", "ratio"), [("static", None), ("space", 2)])
def test_fewer_slots_change_nothing_where_the_rule_bounds_patches(saved, mode, ratio):
    model, folder = saved(mode)
    with engine(folder, additional_config={"blt": {"bytes_per_slot": ratio}}) as llm:
        assert plan_of(llm).bytes_per_slot == (ratio or 4)
        check_equal(model, PROMPTS, write(llm, PROMPTS, [200, 120, 180]))
        assert ragged_of(llm).num_merged == 0


def test_a_budget_of_patches_is_exact_until_it_is_reached(saved):
    """And then patches are merged, the same way in all chunks; nothing is read past a request's pages."""
    model, folder = saved("byte")  # the most patches that a text can have
    options = {"bytes_per_slot": 4, "merge_patches": True}
    found = []
    for chunk in (512, 48):
        with engine(folder, additional_config={"blt": options}, max_num_batched_tokens=chunk) as llm:
            slots = plan_of(llm).slots["global"]
            short, long = PROMPTS[0], encode("x" * (slots + 30))
            check_equal(model, [short], write(llm, [short], slots - len(short)))
            assert ragged_of(llm).num_merged == 0
            counted = REGISTRY.get_sample_value("blt_hf_merged_patches_total")
            found.append(write(llm, [long, long], 40))
            assert ragged_of(llm).num_merged > 0
            assert REGISTRY.get_sample_value("blt_hf_merged_patches_total") == counted + ragged_of(llm).num_merged
    assert [ids for ids, _ in found[0]] == [ids for ids, _ in found[1]]


def test_long_patches_are_split_as_max_patch_length_would(saved):
    model, folder = saved("entropy", patching_threshold=100.0)
    with engine(folder) as llm:
        found = write(llm, PROMPTS, 60)
        assert ragged_of(llm).num_split > 0
    model.config.max_patch_length = 24  # the window
    check_equal(model, PROMPTS, found)


def test_the_entropy_model_stays_in_fp32(saved):
    model, folder = saved("entropy")
    with engine(folder, dtype="bfloat16") as llm:
        served = model_of(llm)
        assert served.lm_head.weight.dtype == torch.bfloat16
        assert {weight.dtype for weight in served.model.patcher.parameters()} == {torch.float32}
        assert served.attentions["patcher"].kv_cache.dtype == torch.float32
        assert served.attentions["bytes"].kv_cache.dtype == torch.bfloat16
        seen = []
        find = served.ragged._find_patches
        served.ragged._find_patches = lambda found, entropies: seen.append(entropies.clone()) or find(found, entropies)
        write(llm, PROMPTS[1:2], 1)
    ids = torch.tensor(PROMPTS[1:2])
    torch.testing.assert_close(seen[0], model(ids, output_patches=True).entropies[0], atol=1e-5, rtol=1e-5)


def fill_pages(llm) -> None:
    """Leaves in every page what is no number in any precision, as a page of another kind may; page 0 is nobody's."""
    for attention in model_of(llm).attentions.values():
        attention.kv_cache[1:].view(torch.int16).fill_(-1)
    for tensor in model_of(llm).state.kv_cache:
        tensor[1:].view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32).fill_(-1)


MANY_LAYERS = {
    "decoder_config": {"num_hidden_layers": 7}
}  # the stack over bytes uses more of a page than the global one


@pytest.mark.parametrize("mode", ["space", "entropy"])
def test_nothing_is_read_of_what_others_have_left_in_pages(saved, mode):
    model, folder = saved(mode, **MANY_LAYERS)
    with engine(folder, max_num_batched_tokens=48) as llm:
        fill_pages(llm)
        check_equal(model, PROMPTS, write(llm, PROMPTS, 60))


def test_bf16_is_as_near_to_fp32_as_generate_is(saved):
    """Two attention kernels round differently, so texts may part; both have to be near to the same model in fp32."""
    model, folder = saved("entropy", **MANY_LAYERS)
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    rounded.model.patcher = model.model.patcher  # as in the engine
    exact = copy.deepcopy(rounded).float()
    errors = {"vllm": [], "generate": []}
    with engine(folder, dtype="bfloat16", max_num_batched_tokens=48, max_num_seqs=2) as llm:
        fill_pages(llm)
        for prompt, (ids, logprobs) in zip(PROMPTS * 2, write(llm, PROMPTS * 2, 60)):
            right = forced(exact, prompt, ids)
            errors["vllm"].append((torch.tensor(logprobs) - right).abs())
            errors["generate"].append((forced(rounded, prompt, ids) - right).abs())
    ours, theirs = (torch.cat(errors[name]) for name in ("vllm", "generate"))
    assert ours.mean() < 1.2 * theirs.mean() and ours.max() < 1.5 * theirs.max()


@torch.no_grad()
def forced(model, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """Log-probabilities of `ids` behind `prompt`."""
    logprobs = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return logprobs[torch.arange(len(ids)), torch.tensor(ids)]
