"""Constrained decoding: a byte vocabulary is the simplest that a grammar can meet, as long as the library asks for bytes.

The models that write here know nothing of the grammars: what comes out right is right because of the constraint.
"""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.clients import chatter_folder


PROMPT = "user: greet\n\nassistant: "
SCHEMA = {
    "type": "object",
    "properties": {
        "word": {"enum": ["速い", "naïve", "Grüße"]},
        "number": {"type": "integer", "minimum": 10, "maximum": 99},
    },
    "required": ["word", "number"],
    "additionalProperties": False,
}


def check(text: str) -> None:
    answer = json.loads(text)
    assert answer["word"] in SCHEMA["properties"]["word"]["enum"]
    assert 10 <= answer["number"] <= 99 and set(answer) == {"word", "number"}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(chatter_folder()).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(chatter_folder())


@pytest.fixture(autouse=True)
def no_compilation():
    """llguidance compiles the application of its mask, which takes half a minute here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def answers(model, tokenizer, prompts: list[str], **kwargs) -> list[str]:
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    ids = model.generate(**inputs, max_new_tokens=80, do_sample=False, **kwargs)
    return tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_without_a_constraint(model, tokenizer):
    with pytest.raises(json.JSONDecodeError):
        check(answers(model, tokenizer, [PROMPT])[0])


@pytest.mark.parametrize("prompts", [[PROMPT], [PROMPT, "user: count\n\nassistant: ", "{"]], ids=["one", "batch"])
def test_xgrammar(model, tokenizer, prompts):
    import xgrammar

    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=model.config.vocab_size)
    grammar = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(SCHEMA), any_whitespace=False)
    for text in answers(model, tokenizer, prompts, logits_processor=[xgrammar.contrib.hf.LogitsProcessor(grammar)]):
        check(text)


def test_xgrammar_with_drafts(model, tokenizer):
    """Its matcher takes each byte once."""
    import xgrammar

    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=model.config.vocab_size)
    grammar = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(SCHEMA), any_whitespace=False)
    make = lambda: [xgrammar.contrib.hf.LogitsProcessor(grammar)]
    (plain,) = answers(model, tokenizer, [PROMPT], logits_processor=make())
    assert answers(model, tokenizer, [PROMPT], logits_processor=make(), self_speculation_window=5) == [plain]
    with pytest.raises(ValueError, match="`logits_processor`.*2 rows"):
        answers(model, tokenizer, [PROMPT] * 2, logits_processor=make(), self_speculation_window=5)


def test_llguidance(model, tokenizer):
    """The engine of guidance."""
    import llguidance.hf
    from llguidance import LLMatcher
    from llguidance.torch import allocate_token_bitmask, apply_token_bitmask_inplace, fill_next_token_bitmask

    vocabulary = llguidance.hf.from_tokenizer(tokenizer, n_vocab=model.config.vocab_size)
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA), overrides={"whitespace_flexible": False})
    matcher, mask = LLMatcher(vocabulary, grammar), allocate_token_bitmask(1, vocabulary.vocab_size)
    length = tokenizer(PROMPT, return_tensors="pt").input_ids.shape[1]

    def constrain(input_ids, scores):
        if input_ids.shape[1] > length:
            assert matcher.consume_token(int(input_ids[0, -1]))
        fill_next_token_bitmask(matcher, mask, 0)
        apply_token_bitmask_inplace(scores, mask)
        return scores

    check(answers(model, tokenizer, [PROMPT], logits_processor=[constrain])[0])


class TestOutlines:
    def write(self, model, tokenizer, output_type, backend: str | None = None) -> str:
        import outlines

        generator = outlines.Generator(outlines.from_transformers(model, tokenizer), output_type, backend=backend)
        return generator("greet", max_new_tokens=80, do_sample=False)

    @pytest.mark.parametrize("backend", ["llguidance", "xgrammar"])
    def test_characters_of_several_bytes(self, model, tokenizer, backend):
        from outlines.types import Regex

        assert self.write(model, tokenizer, Regex("(速い|naïve) [0-9]{3}"), backend).partition(" ")[0] in (
            "速い",
            "naïve",
        )

    def test_own_backend_writes_ascii(self, model, tokenizer):
        """outlines' own backend asks for the text of each token, which a byte of `é` does not have by itself."""
        from outlines.types import Regex

        assert self.write(model, tokenizer, Regex("(fast|slow) [0-9]{3}"))[:5] in ("fast ", "slow ")
        with pytest.raises(ValueError, match="vocabulary"):
            self.write(model, tokenizer, Regex("速い"))


def test_lm_format_enforcer(model, tokenizer, monkeypatch):
    """It asks for a module that transformers 5 no longer has (one line gives it back) and for characters: ASCII only."""
    from transformers import tokenization_utils_base

    monkeypatch.setitem(sys.modules, "transformers.tokenization_utils", tokenization_utils_base)
    from lmformatenforcer import RegexParser
    from lmformatenforcer.integrations.transformers import build_transformers_prefix_allowed_tokens_fn

    parser = RegexParser(r'\{"word": "(fast|slow)", "number": [1-9][0-9]\}')
    allowed = build_transformers_prefix_allowed_tokens_fn(tokenizer, parser)
    text = answers(model, tokenizer, [PROMPT], prefix_allowed_tokens_fn=allowed)[0]
    assert json.loads(text)["word"] in ("fast", "slow")
