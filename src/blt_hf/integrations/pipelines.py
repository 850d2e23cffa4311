"""The pipeline "token-classification": the bytes of one character belong to one word.

Changes, reasons, failures without them, and the test in tests/integrations/test_still_needed.py that fails when
transformers no longer needs it. Both changes concern a `BltTokenizer` only:

- `TokenClassificationPipeline.gather_pre_entities` takes a token for the beginning of a word if it follows a space or
  begins the text. All bytes of a character have the place of that character, so each of them would begin a word.
  `aggregation_strategy="first"`, "average" and "max" then cut "Émile" into two bytes and "mile".
  Test: `pipelines_cut_letters`.
- `TokenClassificationPipeline.aggregate` decodes words twice. The second time, a word of one letter ("é") is read as the
  name of a byte, and comes out as "\\ufffd". The word is the text between `start` and `end` instead.
  Test: `pipelines_decode_words_twice`.
"""

import functools

from transformers.pipelines.token_classification import TokenClassificationPipeline

from ..tokenizer.tokenization import BltTokenizer


_SENTENCE = "blt_sentence"


def _joining_characters(gather_pre_entities):
    @functools.wraps(gather_pre_entities)
    def wrapper(self, sentence, *args, **kwargs):
        entities = gather_pre_entities(self, sentence, *args, **kwargs)
        if isinstance(self.tokenizer, BltTokenizer) and entities and entities[0]["start"] is not None:
            entities[0][_SENTENCE] = sentence
            for previous, entity in zip(entities, entities[1:]):
                if previous["start"] == entity["start"] < entity["end"]:
                    entity["is_subword"] = True
        return entities

    return wrapper


def _cutting_words(aggregate):
    @functools.wraps(aggregate)
    def wrapper(self, pre_entities, *args, **kwargs):
        sentence = pre_entities[0].pop(_SENTENCE, None) if pre_entities else None
        entities = aggregate(self, pre_entities, *args, **kwargs)
        for entity in entities if sentence is not None else ():
            if "entity_group" in entity:
                entity["word"] = sentence[entity["start"] : entity["end"]]
        return entities

    return wrapper


def keep_characters_whole() -> None:
    """Teaches the pipeline that several tokens can be one character."""
    pipeline = TokenClassificationPipeline
    if not hasattr(pipeline.aggregate, "__wrapped__"):
        pipeline.gather_pre_entities = _joining_characters(pipeline.gather_pre_entities)
        pipeline.aggregate = _cutting_words(pipeline.aggregate)


__all__ = ["keep_characters_whole"]
