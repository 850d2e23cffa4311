"""A byteified model's global transformer is the token model's, and learns at the rate that it is given."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from blt_hf.model.chunk_blt import ClosingInputs
from blt_hf.training.byteify import (
    byteify,
    byteify_config,
    byteify_optimizer,
    byteify_parameter_groups,
    interleave_rotary_rows,
)
from blt_hf.training.data import BltDataCollator, byte_ids
from blt_hf.training.token_models import TokenAlphabet
from helpers.models import make_model, tiny_config
from helpers.processes import run_example


SIZE = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TOKEN_CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZE),
    "grouped heads": lambda: LlamaConfig(num_key_value_heads=2, rms_norm_eps=1e-3, **SIZE),
    "one head": lambda: LlamaConfig(num_key_value_heads=1, hidden_act="gelu", **SIZE),
    "rope scaling": lambda: LlamaConfig(rope_parameters=LLAMA3_ROPE, **SIZE),
    "mistral": lambda: MistralConfig(sliding_window=None, num_key_value_heads=2, **SIZE),
}


def make_token_model(config, seed: int = 0):
    torch.manual_seed(seed)
    model_class = {
        "llama": LlamaForCausalLM, "mistral": MistralForCausalLM, "qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM,
        "gemma": GemmaForCausalLM,
    }[config.model_type]  # fmt: skip
    model = model_class(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + ("norm" in name))
    return model


def global_states(model, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """What the layers of the global transformer make of some patches."""
    count = inputs_embeds.shape[1]
    # The first patches of one row, all in one document.
    previous = SimpleNamespace(num_patches=torch.zeros(1, dtype=torch.int64))
    chunk = SimpleNamespace(previous=previous, document_start=None, packed=None)
    global_transformer = model.model.global_transformer
    global_transformer.token_embedding_projection = nn.Identity()
    with torch.no_grad():
        return global_transformer(inputs_embeds, chunk, None, ClosingInputs(torch.arange(count), torch.arange(0)))


def token_states(token_model, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """The same of the token model, before its final norm."""
    base = copy.deepcopy(token_model.base_model)
    base.norm = nn.Identity()
    with torch.no_grad():
        return base(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state


@pytest.mark.parametrize("make_config", TOKEN_CONFIGS.values(), ids=TOKEN_CONFIGS)
def test_layers_compute_what_the_token_model_computes(make_config):
    token_model = make_token_model(make_config())
    model = byteify(token_model, patching_mode="space").eval()
    inputs = torch.randn(1, 37, 32)
    expected = token_states(token_model, inputs)
    assert (global_states(model, inputs) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_rotation_is_what_makes_the_difference():
    """The comparison above fails for weights that are copied without reordering."""
    token_model = make_token_model(LlamaConfig(**SIZE))
    model = byteify(token_model, patching_mode="space").eval()
    inputs = torch.randn(1, 37, 32)
    expected = token_states(token_model, inputs)
    plain = token_model.model.layers.state_dict()
    model.model.global_transformer.layers.load_state_dict(plain)
    assert (global_states(model, inputs) - expected).abs().max() > 1e-2 * expected.abs().max()


def test_rows_are_interleaved_in_each_head():
    rows = torch.arange(8.0)[:, None]
    assert interleave_rotary_rows(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleave_rotary_rows(rows, 1).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_final_norm_of_the_token_model_is_kept_in_the_projection():
    """Logits are those of a BLT whose decoder reads normed states with its own projection."""
    token_model = make_token_model(LlamaConfig(**SIZE))
    torch.manual_seed(1)
    model = byteify(token_model, patching_mode="space").eval()
    ids = torch.tensor([[1, *byte_ids("some words to look at")]])
    with torch.no_grad():
        folded = model(ids).logits
        norm = copy.deepcopy(token_model.model.norm)
        model.model.local_decoder.patch_embedding_projection.weight.div_(norm.weight)
        unfolded = model(ids).logits
        model.model.global_transformer.register_forward_hook(lambda module, args, states: norm(states))
        normed = model(ids).logits
    torch.testing.assert_close(folded, normed, atol=1e-4, rtol=1e-4)
    assert (folded - unfolded).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {
            "cross_attn_k": 2,
            "encoder_config": {"hidden_size": 16, "num_attention_heads": 2},
            "decoder_config": {"hidden_size": 16, "num_attention_heads": 2},
        },
        {"encoder_config": {"num_hidden_layers": 2, "cross_attn_all_layers": True}},
    ],
    ids=["projection", "no projection", "all layers"],
)
@pytest.mark.parametrize("make_config", [TOKEN_CONFIGS["llama"], TOKEN_CONFIGS["mistral"]], ids=["llama", "mistral"])
def test_patches_start_at_the_scale_of_token_embeddings(make_config, overrides, dtype):
    """Whatever the shape, and however small the embeddings are; also on another text than the one that was measured."""
    token_model = make_token_model(make_config()).to(dtype)
    with torch.no_grad():
        token_model.get_input_embeddings().weight.mul_(0.037)
    model = byteify(token_model, patching_mode="space", patch_in_forward=False, **overrides).eval()
    ids = torch.tensor([[1, *byte_ids("Other words, and more: an encyclopedia of three volumes, printed in 1911.")]])
    with torch.no_grad():
        states = model.model(ids, output_hidden_states=True, use_cache=False).global_hidden_states[0]
    scale = token_model.get_input_embeddings().weight.float().square().mean().sqrt()
    assert float(states.float().square().mean().sqrt() / scale) == pytest.approx(1, abs=0.2)
    assert byteify(token_model, patching_mode="space", patch_in_forward=False).training


def test_with_an_entropy_model(tmp_path):
    patcher = make_model().model.patcher
    token_model = make_token_model(LlamaConfig(**SIZE))
    model = byteify(token_model, patcher=patcher, patching_threshold=5.0, encoder_hash_byte_group_vocab=101)
    assert model.config.uses_patcher and model.config.patcher_config.hidden_size == 16
    assert not any(parameter.requires_grad for parameter in model.model.patcher.parameters())
    torch.testing.assert_close(model.model.patcher.lm_head.weight, patcher.lm_head.weight)
    assert model.model.patcher is not patcher
    ids = torch.tensor([[1, *byte_ids("some words")]])
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_config_of_your_own():
    token_model = make_token_model(LlamaConfig(num_key_value_heads=2, **SIZE))
    config = byteify_config(
        token_model.config, patching_mode="static", patch_size=4, encoder_config={"num_hidden_layers": 2}
    )
    assert config.encoder_config.num_hidden_layers == 2
    model = byteify(token_model, config)
    assert model.config.patch_size == 4
    model.config.global_config.num_hidden_layers = 1
    assert config.global_config.num_hidden_layers == 3  # the caller's config is not the model's
    wrong = tiny_config(patching_mode="space")
    with pytest.raises(ValueError, match=r"`num_key_value_heads` 4 \(token model: 2\).*`num_hidden_layers` 2 "):
        byteify(token_model, wrong)
    with pytest.raises(ValueError, match="`rope_parameters`"):
        theta = {**config.global_config.rope_parameters, "rope_theta": 1.0}
        fields = {**config.global_config.to_dict(), "rope_parameters": theta}
        byteify(token_model, byteify_config(token_model.config, patching_mode="space", global_config=fields))
    with pytest.raises(ValueError, match="got both, with patch_size"):
        byteify(token_model, config, patch_size=2)


def test_dtype_follows_the_token_model():
    token_model = make_token_model(LlamaConfig(**SIZE)).to(torch.bfloat16)
    model = byteify(token_model, patching_mode="space")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LlamaConfig(attention_bias=True, **SIZE), "biases .*layers.0.self_attn.q_proj.bias"),
        (LlamaConfig(mlp_bias=True, **SIZE), "biases .*mlp"),
        (Qwen2Config(**SIZE), "biases .*q_proj.bias"),
        (Qwen3Config(head_dim=8, **SIZE), "norms of queries and keys"),
        (MistralConfig(sliding_window=16, **SIZE), "sliding window of 16 tokens"),
        (LlamaConfig(head_dim=16, **SIZE), "heads of size 16, which is not its width, 32"),
        (GemmaConfig(head_dim=8, **SIZE), "of type 'gemma'; accepted are llama, mistral"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_a_blt_cannot_hold_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        byteify(make_token_model(config), patching_mode="space")


def test_entropy_patching_needs_its_model():
    with pytest.raises(ValueError, match="pass `patcher`, or another mode"):
        byteify(make_token_model(LlamaConfig(**SIZE)))
    with pytest.raises(ValueError, match="Llama-style model; got Linear"):
        byteify(nn.Linear(1, 1))


def byteified(**overrides):
    patcher = make_model().model.patcher
    fields = {"patcher": patcher, "patching_threshold": 5.0, "encoder_hash_byte_group_vocab": 101, **overrides}
    return byteify(make_token_model(LlamaConfig(**SIZE)), **fields)


def test_parameter_groups():
    model = byteified()
    groups = {group["name"]: group for group in byteify_parameter_groups(model, 1e-3, weight_decay=0.2)}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "local": (1e-3, 0.2),
        "local, no decay": (1e-3, 0.0),
        "global": (pytest.approx(1e-4), 0.2),
        "global, no decay": (pytest.approx(1e-4), 0.0),
    }
    grouped = [id(parameter) for group in groups.values() for parameter in group["params"]]
    trained = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trained)
    assert not {id(parameter) for parameter in model.model.patcher.parameters()} & set(grouped)
    layers = {id(parameter) for parameter in model.model.global_transformer.layers.parameters()}
    assert layers == {id(p) for name in ("global", "global, no decay") for p in groups[name]["params"]}
    assert all(parameter.dim() == 1 for parameter in groups["local, no decay"]["params"])
    model.model.global_transformer.requires_grad_(False)
    with pytest.raises(ValueError, match="no global transformer that trains"):
        byteify_parameter_groups(model, 1e-3)


def test_trainer_takes_the_optimizer(tmp_path):
    model = byteified()
    before = copy.deepcopy(model.state_dict())
    rows = [{"input_ids": [1, *byte_ids(text)]} for text in ("one text", "another text", "and a third")]
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", max_steps=4,
        per_device_train_batch_size=3, lr_scheduler_type="linear", learning_rate=1e-3,
    )  # fmt: skip
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=BltDataCollator(),
        optimizer_cls_and_kwargs=byteify_optimizer(model, 1e-3),
    )
    trainer.train()
    rates = {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates["global"] == pytest.approx(1e-4) and rates["local"] == 1e-3
    # Adam moves each weight by about its rate in a step, so the ratio shows in how far the weights went.
    moved = {}
    for part in ("global_transformer.layers", "local_decoder.layers"):
        name = f"model.{part}.0.mlp.up_proj.weight"
        moved[part] = (model.state_dict()[name] - before[name]).abs().mean().item()
    assert moved["global_transformer.layers"] / moved["local_decoder.layers"] == pytest.approx(0.1, rel=0.3)
    patcher = "model.patcher.embed_tokens.weight"
    assert torch.equal(model.state_dict()[patcher], before[patcher])


@pytest.mark.parametrize("with_entropy_model", [pytest.param(False, marks=pytest.mark.slow), True])
def test_example(tmp_path, with_entropy_model):
    options = []
    if with_entropy_model:
        make_model().model.patcher.save_pretrained(tmp_path / "entropy")
        options = ["--entropy-model", tmp_path / "entropy", "--threshold", 5]
    printed = run_example("byteify_llama.py", "--small", "--output-dir", tmp_path / "out", *options)
    assert "global: learning rate 0.0001, weight decay 0.1" in printed
    before, after = re.search(r"held-out text: ([0-9.]+), then ([0-9.]+)", printed).groups()
    assert float(after) < float(before)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.patching_mode == ("entropy" if with_entropy_model else "space")


# The lexicon.

WORDS = ["", " ab", " abc", " b", "c", " abcdefgh", "\n", ",", " ac", "b"]
ALPHABET = TokenAlphabet([(2,), *(tuple(ord(letter) + 4 for letter in word) for word in WORDS[1:])], 0)


def byteify_with_lexicon(
    lexicon_size: int = len(WORDS), alphabet: TokenAlphabet | None = ALPHABET, reads: bool = True
):
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=reads,
        )  # fmt: skip
    )
    llama.model.norm.weight.data.uniform_(0.5, 1.5)
    decoder = {
        "lexicon_size": lexicon_size,
        "lexicon_top_k": 6,
        "lexicon_length": 4,
        "lexicon_reads": reads and lexicon_size > 0,
    }
    options = {"patching_mode": "space", "encoder_hash_byte_group_vocab": 20, "decoder_config": decoder}
    return llama, byteify(llama, alphabet=alphabet, **options).eval()


def test_entries_are_ranked_as_the_token_model_ranks_tokens():
    llama, model = byteify_with_lexicon()
    states = torch.randn(1, 3, 32)
    log_probs = llama.lm_head(llama.model.norm(states)).log_softmax(dim=-1)
    low, middle, high, found = model.model.local_decoder.lexicon.rank(states).chunk(4, dim=-1)
    expected = log_probs.topk(6, dim=-1)
    assert torch.equal((low + 256 * middle + 65536 * high).long(), expected.indices)
    torch.testing.assert_close(found, expected.values)


def test_spellings_are_those_of_tokens():
    _, model = byteify_with_lexicon()
    spellings = model.model.local_decoder.lexicon.spellings
    assert spellings[1].tolist() == [36, 101, 102, -1] and spellings[5].tolist() == [36, 101, 102, 103]  # cut


@pytest.mark.parametrize(
    ("size", "alphabet", "message"),
    [
        (11, ALPHABET, "`lexicon_size` must be 0 or the number of tokens of `token_model`, 10; got 11"),
        (10, TokenAlphabet(ALPHABET.ids[:-1], 0), "the number of tokens of `alphabet`, 9; got 10"),
        (10, None, "`lexicon_size` needs `alphabet`"),
    ],
)
def test_a_lexicon_that_does_not_fit_is_refused(size, alphabet, message):
    with pytest.raises(ValueError, match=message):
        byteify_with_lexicon(size, alphabet)


@torch.no_grad()
def test_patches_that_are_tokens_enter_the_layers_as_tokens_do():
    """`space` ends patches behind spaces, with which tokens begin. A token longer than `lexicon_length` is not read."""
    llama, model = byteify_with_lexicon()
    seen = []
    for layer in (llama.model.layers[0], model.model.global_transformer.layers[0]):
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    llama(torch.tensor([[9, 1, 2, 8, 1]]))
    text = "b ab abc ac abcdefgh ab "
    model(torch.tensor([[1, *(ord(letter) + 4 for letter in text)]]))
    tokens, patches = seen
    assert torch.equal(patches[[1, 2, 3, 4, 6]], tokens[[0, 1, 2, 3, 4]])
    assert not torch.isclose(patches[5], llama.get_input_embeddings().weight[5]).any()


def test_embeddings_apart_from_the_head_read_no_patches():
    llama, model = byteify_with_lexicon(reads=False)
    assert not hasattr(model.model.local_decoder.lexicon, "index")
    decoder = {"lexicon_size": len(WORDS), "lexicon_top_k": 6, "lexicon_reads": True}
    with pytest.raises(ValueError, match="`lexicon_reads` must be False for a `token_model` whose head does not hold"):
        byteify(llama, alphabet=ALPHABET, patching_mode="space", decoder_config=decoder)


def test_without_a_lexicon_no_alphabet_is_needed():
    _, model = byteify_with_lexicon(0, None)
    assert model.model.local_decoder.lexicon is None
