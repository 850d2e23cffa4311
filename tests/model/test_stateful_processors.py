"""Logits processors that keep a state see each byte of a text once and in order, with drafts too, or are refused."""

import pytest
import torch
from transformers import LogitsProcessor

from blt_hf.speculation import may_keep_state
from helpers.diffusion import diffusion_model
from helpers.models import make_model
from helpers.texts import encode


IDS = torch.tensor([encode("The quick brown fox, jumps")])
SETTINGS = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
DRAFTS = {
    "window of 1": {"self_speculation_window": 1},
    "window of 5": {"self_speculation_window": 5},
    "heuristic": {"self_speculation_window": 4, "self_speculation_schedule": "heuristic"},
    "verified blocks": {"diffusion_block_size": 5, "verify": True},
}


@pytest.fixture(scope="module")
def model():
    return diffusion_model(seed=1)


class Counts(LogitsProcessor):
    """Prefers the byte that it has seen least, and insists on seeing each byte of one text."""

    def __init__(self, strength: float = 1.0):
        self.seen, self.counts, self.strength = None, torch.zeros(261), strength

    def __call__(self, input_ids, scores):
        text = input_ids.tolist()
        if self.seen is not None:
            assert [row[:-1] for row in text] == self.seen, "a byte was left out, or seen twice"
            for row in text:
                self.counts[row[-1]] += 1
        self.seen = text
        return scores - self.strength * self.counts[: scores.shape[-1]]


@pytest.mark.parametrize("way", DRAFTS)
def test_the_text_is_that_without_drafts(model, way):
    expected = model.generate(IDS, logits_processor=[Counts()], **SETTINGS)
    processor = Counts()
    out = model.generate(IDS, logits_processor=[processor], **DRAFTS[way], **SETTINGS)
    assert out.tolist() == expected.tolist()
    assert out[:, :-1].tolist() == processor.seen or out.tolist() == processor.seen
    plain = model.generate(IDS, **SETTINGS)
    assert plain.tolist() != expected.tolist()


@pytest.mark.parametrize("way", DRAFTS)
def test_guidance_with_drafts(model, way):
    expected = model.generate(IDS, guidance_scale=1.5, **SETTINGS)
    assert model.generate(IDS, guidance_scale=1.5, **DRAFTS[way], **SETTINGS).tolist() == expected.tolist()


@pytest.mark.parametrize("way", DRAFTS)
def test_the_text_ends_where_it_ends_without_drafts(model, way):
    free = model.generate(IDS, logits_processor=[Counts()], **SETTINGS)[0, IDS.shape[1] :].tolist()
    settings = {**SETTINGS, "eos_token_id": free[10]}
    expected = model.generate(IDS, logits_processor=[Counts()], **settings)
    out = model.generate(IDS, logits_processor=[Counts()], **DRAFTS[way], **settings)
    assert out.tolist() == expected.tolist()


@pytest.mark.slow
def test_sampling_keeps_its_distribution():
    """The second byte after a prompt, of 400 texts each way, with a processor that changes it by what it has seen."""
    model = make_model()
    settings = {"max_new_tokens": 3, "do_sample": True, "top_k": 4, "eos_token_id": None}

    def drawn(**arguments) -> torch.Tensor:
        counts = torch.zeros(260)
        for seed in range(400):
            torch.manual_seed(seed)
            text = model.generate(IDS, logits_processor=[Counts(2.0)], **arguments, **settings)
            counts[text[0, -2]] += 1
        return counts / 400

    assert float((drawn() - drawn(self_speculation_window=2)).abs().sum()) / 2 < 0.12


@pytest.mark.parametrize("way", DRAFTS)
def test_more_rows_are_refused(model, way):
    rows = IDS.repeat(2, 1)
    with pytest.raises(ValueError, match=r"`logits_processor` asks for a Counts, which may keep a state.*got 2 rows"):
        model.generate(rows, logits_processor=[Counts()], **DRAFTS[way], **SETTINGS)
    with pytest.raises(ValueError, match=r"`guidance_scale` asks for .*2 rows"):
        model.generate(rows, guidance_scale=1.5, **DRAFTS[way], **SETTINGS)
    model.generate(rows, logits_processor=[Counts()], **SETTINGS)  # byte by byte, each is seen once


def test_blocks_that_nobody_verifies_are_refused(model):
    with pytest.raises(ValueError, match=r"`logits_processor`.*`diffusion_block_size=4`.*no `verify`"):
        model.generate(IDS, logits_processor=[Counts()], diffusion_block_size=4, **SETTINGS)


def test_what_may_keep_a_state():
    class Constant(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores

    class Says(Counts):
        keeps_state = False

    assert may_keep_state(lambda input_ids, scores: scores)  # which may look at a matcher outside, say
    assert may_keep_state(Counts()) and not may_keep_state(Constant()) and not may_keep_state(Says())
