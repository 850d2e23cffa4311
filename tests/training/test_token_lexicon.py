"""The lexicon of a byteified model: its entries are the tokens of the token model, and it says what that would write."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from blt_hf.training.byteify import byteify
from blt_hf.training.token_lexicon import spell_lexicon
from blt_hf.training.token_models import TokenAlphabet


WORDS = ["", " ab", " abc", " b", "c", " abcdefgh", "\n", ",", " ac", "b"]
ALPHABET = TokenAlphabet([(2,), *(tuple(ord(letter) + 4 for letter in word) for word in WORDS[1:])], 0)


def make_model(lexicon_size: int = len(WORDS), **decoder):
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
        )
    )
    llama.model.norm.weight.data.uniform_(0.5, 1.5)
    decoder = {"lexicon_size": lexicon_size, "lexicon_top_k": 6, "lexicon_length": 4} | decoder
    return llama, byteify(
        llama, patching_mode="space", encoder_hash_byte_group_vocab=20, decoder_config=decoder
    ).eval()


def test_entries_are_ranked_as_the_token_model_ranks_tokens():
    llama, model = make_model()
    states = torch.randn(1, 3, 32)
    log_probs = llama.lm_head(llama.model.norm(states)).log_softmax(dim=-1)
    low, middle, high, found = model.model.local_decoder.lexicon.rank(states).chunk(4, dim=-1)
    expected = log_probs.topk(6, dim=-1)
    assert torch.equal((low + 256 * middle + 65536 * high).long(), expected.indices)
    torch.testing.assert_close(found, expected.values)


def test_spellings_are_those_of_tokens():
    _, model = make_model()
    spell_lexicon(model, ALPHABET)
    spellings = model.model.local_decoder.lexicon.spellings
    assert spellings[1].tolist() == [36, 101, 102, -1] and spellings[5].tolist() == [36, 101, 102, 103]  # cut


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="lexicon_size.*number of tokens, 10; got 11"):
        make_model(11)
    _, model = make_model()
    with pytest.raises(ValueError, match="lexicon_size.*number of tokens, 9; got 10"):
        spell_lexicon(model, TokenAlphabet(ALPHABET.ids[:-1], 0))


def test_a_model_without_a_lexicon_stays_as_it_is():
    _, model = make_model(0)
    spell_lexicon(model, ALPHABET)
    assert model.model.local_decoder.lexicon is None
