"""Small models, engines in this process, and what `generate` writes: what the tests of the plugin build on."""

import os


# Before vLLM is imported. In one process, so that a test sees the model and starts in seconds.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # ngram drafts run on numba, which sets the threads of torch as well

import contextlib
import gc
import sys
from pathlib import Path

import pytest
import torch

import blt_hf
from blt_hf import BltConfig, BltForCausalLM
from blt_hf.training.byteify import spell_lexicon


torch.set_num_threads(1)
PRETRAINED = Path(__file__).parents[3] / "pretrained" / "blt-5m"
TEXTS = (
    "Hi",
    "The quick brown fox jumps over the lazy dog, and then it sleeps. ",
    "a b c d e f " * 9 + "and so on; x = 1",
)
MODES = ("byte", "space", "static", "entropy")
SHAPES = {
    "heads": {
        "encoder_config": {
            "num_hidden_layers": 2,
            "cross_attn_all_layers": True,
            "cross_attn_k": 4,
            "hidden_size_global": 256,
        },
        "decoder_config": {
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "num_cross_attention_heads": 4,
            "cross_attn_k": 4,
            "hidden_size_global": 256,
        },
        "global_config": {"num_key_value_heads": 2, "hidden_size": 256},
        "cross_attn_k": 4,
        "encoder_hash_byte_group_nb_functions": 2,
        "max_patch_length": 5,
    },
    "no_windows": {"local_attention_window_len": None, "patcher_config": {"sliding_window": None}},
    "monotonicity": {"monotonicity": True, "patching_threshold": 0.02, "max_patch_length": 9},
    "lexicon": {
        "decoder_config": {"lexicon_size": 400, "lexicon_top_k": 32, "lexicon_length": 12, "lexicon_reads": True}
    },
}
"""Options of models that differ from [`make_model`]'s in what the plugin has to know."""


def encode(text: str | bytes) -> list[int]:
    """Ids of a text, after a BOS."""
    return [1, *(byte + 4 for byte in (text.encode() if isinstance(text, str) else text))]


def make_model(mode: str, **options) -> BltForCausalLM:
    """A random model with short windows, whose texts depend on everything: patches, hashes, places."""
    part = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
    values = {
        "patching_mode": mode,
        "patch_size": 4,
        "patching_threshold": 5.0,
        "patch_in_forward": mode == "entropy",
        "encoder_hash_byte_group_size": [3, 4, 5],
        "encoder_hash_byte_group_vocab": 64,
        "local_attention_window_len": 24,
        "patcher_config": {**part, "num_hidden_layers": 2, "sliding_window": 16},
        "encoder_config": {**part, "num_hidden_layers": 1, "hidden_size_global": 128},
        "decoder_config": {**part, "num_hidden_layers": 3, "hidden_size_global": 128},
        "global_config": {
            "hidden_size": 128,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
        },
    }
    for name, value in options.items():
        values[name] = {**values[name], **value} if isinstance(values.get(name), dict) else value
    torch.manual_seed(0)
    model = BltForCausalLM(BltConfig(**values)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.12)
        if (lexicon := model.model.local_decoder.lexicon) is not None:
            spellings, letters = lexicon.spellings.long(), torch.tensor(encode(TEXTS[1])[1:])
            spellings[:] = letters[torch.randint(len(letters), spellings.shape)]
            ends = torch.randint(1, 6, (len(spellings), 1))
            spell_lexicon(lexicon, spellings.masked_fill(torch.arange(spellings.shape[1]) >= ends, -1))
            lexicon.key_scales.weight.uniform_(-0.5, 0.5)
    return model


def save(model, folder) -> None:
    model.save_pretrained(folder)
    blt_hf.BltTokenizer().save_pretrained(folder)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """`saved(mode, **options)` -> a model and its folder, made once."""
    made = {}

    def get(mode: str, **options):
        key = repr((mode, sorted(options.items(), key=str)))
        if key not in made:
            model, folder = make_model(mode, **options), tmp_path_factory.mktemp(mode)
            save(model, folder)
            made[key] = model, str(folder)
        return made[key]

    return get


@contextlib.contextmanager
def engine(folder: str, **options):
    """A `vllm.LLM` in this process, and nothing of it afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    values = {"dtype": "float32", "max_model_len": 512, "kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}
    # Drafts bring numba, and vLLM 0.32 stumbles over a module of its when it builds another engine in the process.
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("llvmlite")}
    llm = LLM(model=str(folder), **{**values, **options})
    sys.modules.update(hidden)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def write(
    llm, prompts: list[list[int]], num_bytes: int | list[int], **sampling
) -> list[tuple[list[int], list[float]]]:
    """Ids and their log-probabilities that an engine writes, greedily unless `sampling` says otherwise."""
    from vllm import SamplingParams

    counts = [num_bytes] * len(prompts) if isinstance(num_bytes, int) else num_bytes
    values = {"temperature": 0, "ignore_eos": True, "detokenize": False, "logprobs": 0, **sampling}
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [SamplingParams(max_tokens=count, **values) for count in counts],
        use_tqdm=False,
    )
    found = []
    for output in outputs:
        ids = list(output.outputs[0].token_ids)
        found.append((ids, [step[i].logprob for step, i in zip(output.outputs[0].logprobs, ids)]))
    return found


def expected(model, prompt: list[int], num_bytes: int) -> tuple[list[int], list[float]]:
    """The same by `generate`."""
    return expected_texts(model, [(prompt, num_bytes)])[0]


@torch.no_grad()
def expected_texts(
    model, requests: list[tuple[list[int], int]], rows: int = 16
) -> list[tuple[list[int], list[float]]]:
    """The same for prompts and how many bytes each gets, `rows` of them at once."""
    found = [([], [])] * len(requests)
    order = sorted((n for n, (_, count) in enumerate(requests) if count), key=lambda n: requests[n][1])
    for batch in (order[start : start + rows] for start in range(0, len(order), rows)):
        width, most = max(len(requests[n][0]) for n in batch), max(requests[n][1] for n in batch)
        ids = torch.tensor([[0] * (width - len(requests[n][0])) + requests[n][0] for n in batch])
        lengths = torch.tensor([len(requests[n][0]) for n in batch])
        output = model.generate(
            ids, attention_mask=(torch.arange(width) >= width - lengths[:, None]).long(), max_new_tokens=most,
            do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        logprobs = torch.stack(output.logits, dim=1).float().log_softmax(-1)
        texts = output.sequences[:, width:]
        logprobs = logprobs.gather(-1, texts[..., None])[..., 0]
        for n, text, values in zip(batch, texts.tolist(), logprobs.tolist()):
            found[n] = text[: requests[n][1]], values[: requests[n][1]]
    return found


def check_equal(model, prompts: list[list[int]], found: list, tolerance: float = 2e-5) -> None:
    """Texts are the same, and so are log-probabilities: a wrong page can give a plausible text."""
    for prompt, (ids, logprobs) in zip(prompts, found):
        right, right_logprobs = expected(model, prompt, len(ids))
        assert ids == right
        assert max(abs(a - b) for a, b in zip(logprobs, right_logprobs)) < tolerance


def metric(llm, name: str) -> int:
    return sum(found.value for found in llm.get_metrics() if found.name == name)


def ragged_of(llm):
    return model_of(llm).ragged


def plan_of(llm):
    return model_of(llm).state.plan


def model_of(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
