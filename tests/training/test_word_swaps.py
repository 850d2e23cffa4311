"""Words are exchanged in texts and in rows of states: what is new fits together, and all else stays."""

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from blt_hf.model.patching_blt import BYTE_OFFSET, PatchingRule, find_patch_ends
from blt_hf.tokenizer.encoding import byte_ids
from blt_hf.training.byteify import byteify
from blt_hf.training.distillation import EncoderDecoderStage, embeddings_of
from blt_hf.training.teacher_data import TeacherData, TeacherWriter, TextRows, collate_teacher_rows
from blt_hf.training.token_models import TokenAlphabet
from blt_hf.training.word_swaps import SwappedStates, WordTokens
from helpers.token_models import CHAT, make_texts, make_tokenizer


RULE = PatchingRule("space")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def alphabet(tokenizer):
    return TokenAlphabet.of(tokenizer, {CHAT: 260})


@pytest.fixture(scope="module")
def token_model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def rows(tmp_path_factory, token_model, tokenizer, alphabet):
    folder = tmp_path_factory.mktemp("states")
    writer = TeacherWriter(token_model, tokenizer, alphabet, RULE, folder, row_bytes=200)
    list(writer.write(text + ". So, they sang <1> " for text in make_texts(12, 2)))
    return TeacherData([folder])


def make_collator(token_model, alphabet, rows, share: float) -> SwappedStates:
    words = WordTokens(alphabet, seed=1)
    return SwappedStates(collate_teacher_rows, token_model, words, RULE, rows.some_states(), alphabet, share)


def patches_of(row) -> list[list[int]]:
    ids = row["input_ids"].long()
    ends = find_patch_ends(RULE, ids[None], None, torch.arange(len(ids))[None])[0].nonzero().flatten().tolist()
    return [ids[start + 1 : end + 1].tolist() for start, end in zip([-1, *ends], ends)]


def test_words_of_a_text_are_exchanged_and_its_marks_stay(alphabet, tokenizer):
    words = WordTokens(alphabet, seed=0)
    text = "It seems that they sang, and sang.\nThen x<1> (we) "
    changed = words.swap_in_text(text, 1.0)
    assert words.swap_in_text(text, 0.0) == text
    pattern = re.escape(re.sub(r" [a-z]{2,}(?=[ ,.])", " @", text)).replace("@", "([a-z]{2,})")
    found = re.fullmatch(pattern, changed)
    drawn = {
        bytes(index - BYTE_OFFSET for index in alphabet.ids[token][1:]).decode() for token in words.tokens.tolist()
    }
    assert found and drawn.issuperset(found.groups()) and len(found.groups()) == 6
    row = TextRows([text], tokenizer, alphabet, RULE, change=lambda _: " the cat")[0]
    assert row["input_ids"].tolist()[1:9] == byte_ids(" the cat")


def test_rare_words_come_and_common_ones_come_more(alphabet):
    drawn = torch.tensor(WordTokens(alphabet, seed=0).draw(4000)).bincount(minlength=len(alphabet.ids))
    tokens = WordTokens(alphabet).tokens
    assert drawn.sum() == drawn[tokens].sum() and drawn[tokens].min() > 50
    assert drawn[tokens[0]] > 2 * drawn[tokens[-1]]


def test_a_changed_row_fits_together(token_model, alphabet, rows):
    """The bytes say the new words, the head reads them off the moved states, and targets stand where the bytes are."""
    collator = make_collator(token_model, alphabet, rows, 0.5)
    changes = 0
    for index in range(len(rows)):
        before = rows[index]
        after = collator._change(before)
        old, new = patches_of(before), patches_of(after)
        assert len(old) == len(new) and after["patch_tokens"][:, 1].equal(before["patch_tokens"][:, 1])
        is_moved = (after["states"] != before["states"]).any(dim=1).tolist()
        length = len(after["input_ids"])
        assert len(after["target_ids"]) == len(after["target_probs"]) == length
        position = old_position = 0
        for number, (was, now) in enumerate(zip(old, new)):
            if not (number and is_moved[number - 1]):
                assert was == now and after["patch_tokens"][number].equal(before["patch_tokens"][number])
                same = slice(position, position + len(now) - 1), slice(old_position, old_position + len(was) - 1)
                for name in ("target_ids", "target_probs"):
                    assert after[name][same[0]].equal(before[name][same[1]])
            else:
                changes += 1
                assert was[-1] == now[-1]  # the byte behind the word
                token = alphabet.ids.index(tuple(byte_ids(" ")) + tuple(now[:-1]))
                assert after["patch_tokens"][number, 0] == token
                logits = token_model.lm_head(token_model.model.norm(after["states"][number - 1].float()))
                # Other words may gain as much, when states are so few; the new one gains more than any before.
                old_logits = token_model.lm_head(token_model.model.norm(before["states"][number - 1].float()))
                assert logits.softmax(0)[token] > old_logits.softmax(0)[token]
                for offset, letter in enumerate(now[:-1]):
                    targets = after["target_ids"][position - 1 + offset].tolist()
                    assert after["target_probs"][position - 1 + offset].sum() == pytest.approx(1, abs=0.01)
                    assert letter in targets
            last, old_last = position + len(now) - 1, old_position + len(was) - 1
            if number + 1 < len(old) and not is_moved[number]:
                assert after["target_ids"][last].equal(before["target_ids"][old_last])
            position, old_position = position + len(now), old_position + len(was)
    assert changes > 20


def test_marks_and_special_ids_stay(token_model, alphabet, rows):
    after = make_collator(token_model, alphabet, rows, 1.0)._change(rows[0])
    text = bytes(index - BYTE_OFFSET for index in after["input_ids"].tolist() if 0 <= index - BYTE_OFFSET < 256)
    assert b"<1>" in text and b"sang" in text  # `sang` is several tokens
    row = rows[0]
    assert make_collator(token_model, alphabet, rows, 0.0)._change(row) is row


def test_an_encoder_learns_with_it_from_rows_that_stayed(tmp_path, token_model, tokenizer, alphabet):
    """States behind the first layers are of the old words: rows with new ones say nothing of them."""
    writer = TeacherWriter(token_model, tokenizer, alphabet, RULE, tmp_path, early_layer=1, row_bytes=200)
    list(writer.write(make_texts(12, 2)))
    rows = TeacherData([tmp_path])
    torch.manual_seed(0)
    model = byteify(
        token_model, patching_mode="space", patch_in_forward=False, encoder_hash_byte_group_vocab=50, vocab_size=261
    )
    stage = EncoderDecoderStage(model, embeddings_of(token_model), layers=1)
    words = WordTokens(alphabet, seed=1)

    def collator(row_share):
        states = rows.some_states()
        return SwappedStates(collate_teacher_rows, token_model, words, RULE, states, alphabet, 1.0, row_share)

    batch = collator(0.5)([rows[index] for index in range(8)])
    is_swapped = batch["early_states"][:, 0, 0].isnan()
    assert 0 < is_swapped.sum() < 8
    stage(**batch)["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in stage.parameters())
    stage.take_figures()
    stays = {name: value[~is_swapped] for name, value in batch.items()}
    read = stage.read(stays["input_ids"], stays["attention_mask"])
    stage.encoder_loss(read, stays["patch_tokens"], stays["early_states"])
    alone = stage.take_figures()["state_error"]
    read = stage.read(batch["input_ids"], batch["attention_mask"])
    stage.encoder_loss(read, batch["patch_tokens"], batch["early_states"])
    assert stage.take_figures()["state_error"] == pytest.approx(alone, rel=1e-4)
    assert all(row["early_states"].isfinite().all() for row in map(collator(0.0)._change, rows))


def test_no_words_are_refused(alphabet):
    with pytest.raises(ValueError, match="alphabet"):
        WordTokens(TokenAlphabet([(index,) for index in range(4)], 0))
