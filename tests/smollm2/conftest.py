"""A tiny token model in the place of SmolLM2, and the folder that is put together from it and random learned weights.

The scripts of `examples/smollm2` import each other by name, as they do when they run.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from blt_hf.conversion.smollm2 import CHAT_TOKENS, assemble_smollm2
from blt_hf.training import learned as learned_files
from blt_hf.training.byteify import byteify
from blt_hf.training.token_models import TokenAlphabet


EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"
sys.path.append(str(EXAMPLE))

# As in the tokenizer of SmolLM2-135M-Instruct
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n"
    "' + message['content'] + '<|im_end|>' + '\n"
    "'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
    "' }}{% endif %}"
)
LOCAL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
OVERRIDES = {
    "vocab_size": 263,
    "patching_mode": "space",
    "cross_attn_k": 2,
    "local_attention_window_len": 32,
    "encoder_hash_byte_group_size": [3],
    "encoder_hash_byte_group_vocab": 50,
    "encoder_config": {**LOCAL, "num_hidden_layers": 1},
    "decoder_config": {**LOCAL, "num_hidden_layers": 1},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": [2, 262],
}


def make_token_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens and the template of SmolLM2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(CHAT_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat with the hat of the capital"] * 20, trainer)
    end, start, turn = CHAT_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token=turn,
        pad_token=turn,
        unk_token=end,
        chat_template=SMOLLM2_TEMPLATE,
    )


TOKENIZER = make_token_tokenizer()
ALPHABET = TokenAlphabet.of(TOKENIZER, {CHAT_TOKENS[1]: 261, CHAT_TOKENS[2]: 262}, CHAT_TOKENS[0])
OVERRIDES["decoder_config"] |= {"lexicon_size": len(TOKENIZER), "lexicon_top_k": 8, "lexicon_reads": True}


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "teacher"
    tokenizer = TOKENIZER
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, teacher_folder) -> Path:
    """What `examples/smollm2` holds, of a tiny shape and random."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "config.json").write_text(json.dumps(OVERRIDES))
    (folder / "card.md").write_text((EXAMPLE / "card.md").read_text())
    torch.manual_seed(1)
    model = byteify(LlamaForCausalLM.from_pretrained(teacher_folder), alphabet=ALPHABET, **OVERRIDES)
    learned = {}
    for name, weight in model.state_dict().items():
        if learned_files.is_of_token_model(name):
            continue
        if not name.startswith("model.global_transformer.layers."):
            learned[name] = weight + 0.1 * torch.randn_like(weight)
        elif "norm" not in name:
            base = name.removesuffix(".weight")
            learned[f"{base}.lora_A"] = 0.1 * torch.randn(2, weight.shape[1])
            learned[f"{base}.lora_B"] = 0.1 * torch.randn(weight.shape[0], 2)
    learned = {name: tensor.bfloat16().contiguous() for name, tensor in learned.items()}
    save_file(learned, folder / "learned.safetensors", metadata={"format": "pt", "stage": "random", "steps": "0"})
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory, teacher_folder, recipe) -> Path:
    """The folder that is put together."""
    return assemble_smollm2(tmp_path_factory.mktemp("assembled") / "blt", source=teacher_folder, recipe=recipe)
