"""Pipelines of transformers on bytes: what their users see are characters and words."""

import pytest
import torch
from transformers import pipeline

from blt_hf import BltForTokenClassification, BltTokenizer
from helpers.models import make_model


TEXT = "Émile a vu l'été à Łódź, ó 你好 🎉ok naïve"


@pytest.fixture(scope="module")
def tagger():
    config = make_model().config
    config.id2label = {0: "B-A", 1: "I-A", 2: "B-B", 3: "I-B"}
    torch.manual_seed(1)
    return pipeline("token-classification", BltForTokenClassification(config).eval(), tokenizer=BltTokenizer())


@pytest.mark.parametrize("strategy", ["simple", "first", "average", "max"])
@pytest.mark.parametrize("text", [TEXT, "é", "🎉", "a é"])
def test_entities_are_text(tagger, text, strategy):
    entities = tagger(text, aggregation_strategy=strategy)
    assert [entity["word"] for entity in entities] == [text[e["start"] : e["end"]] for e in entities]
    if strategy != "simple":  # a word is never cut; the blank between two words is one of its own
        ends = {entity[name] for entity in entities for name in ("start", "end")}
        inside = {i for i in range(1, len(text)) if " " not in text[i - 1 : i + 1]}
        assert not ends & inside
        assert "".join(entity["word"] for entity in entities) == text


def test_entities_without_aggregation(tagger):
    tokens = tagger("é!", aggregation_strategy="none")
    assert [(t["start"], t["end"]) for t in tokens] == [(0, 1), (0, 1), (1, 2)]
    assert set(tokens[0]) == {"entity", "score", "index", "word", "start", "end"}
