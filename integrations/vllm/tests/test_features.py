"""What vLLM offers its users, on the model that comes with the project: text in and out."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from conftest import PRETRAINED, engine


PROMPTS = ["The import statement ", "Das Paket ", "naïve café — ", "def add(a, b):\n    return "]
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def llm():
    options = {"max_model_len": 1024, "kv_cache_memory_bytes": 256 << 20, "max_num_batched_tokens": 256}
    grammars = {"backend": "xgrammar", "disable_any_whitespace": True}
    with engine(PRETRAINED, structured_outputs_config=grammars, **options) as llm:
        yield llm


def texts(llm, prompts, **sampling) -> list[str]:
    outputs = llm.generate(prompts, SamplingParams(**{"temperature": 0, "max_tokens": 24, **sampling}), use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def test_text_is_that_of_generate(llm):
    tokenizer, model = (kind.from_pretrained(PRETRAINED) for kind in (AutoTokenizer, AutoModelForCausalLM))
    for prompt, text in zip(PROMPTS, texts(llm, PROMPTS)):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        found = model.eval().generate(ids, max_new_tokens=24, do_sample=False)
        assert text == tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


def test_seeds_repeat_samples_and_differ(llm):
    def sampled(seed: int) -> list[str]:
        return texts(llm, PROMPTS[:2], temperature=1.0, top_p=0.9, seed=seed)

    assert sampled(1) == sampled(1) != sampled(2)


def test_several_samples_of_one_prompt(llm):
    outputs = llm.generate(PROMPTS[0], SamplingParams(temperature=1.0, n=3, max_tokens=16, seed=0), use_tqdm=False)
    assert len({found.text for found in outputs[0].outputs}) == 3


def test_stop_strings(llm):
    text = texts(llm, PROMPTS[:1])[0]
    stop = text[7:9]
    assert texts(llm, PROMPTS[:1], stop=[stop])[0] == text[: text.index(stop)]


@torch.no_grad()
def test_log_probabilities_of_prompt_and_text(llm):
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3, prompt_logprobs=0)
    output = llm.generate(PROMPTS[0], params, use_tqdm=False)[0]
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    right = AutoModelForCausalLM.from_pretrained(PRETRAINED)(torch.tensor([ids])).logits[0].log_softmax(-1)
    steps = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    for index, step in enumerate(steps):
        assert step[ids[index + 1]].logprob == pytest.approx(float(right[index, ids[index + 1]]), abs=1e-4)
    assert all(len(step) == 3 for step in output.outputs[0].logprobs)


def test_structured_output_over_bytes(llm):
    """Grammars are compiled for a vocabulary in which a character may be several tokens."""
    numbers = {"enum": [1, 22, 333]}
    schema = {"type": "object", "properties": {"żółw": numbers}, "required": ["żółw"], "additionalProperties": False}

    def constrained(**kind) -> str:
        return texts(llm, PROMPTS[:1], structured_outputs=StructuredOutputsParams(**kind), max_tokens=60)[0]

    assert constrained(choice=["żółw", "wąż"]) in ("żółw", "wąż")
    assert constrained(regex="[0-9]{4}").isdigit()
    assert json.loads(constrained(json=schema))["żółw"] in numbers["enum"]


def test_chat(llm):
    messages = [{"role": "user", "content": "What is a byte?"}]
    params = SamplingParams(temperature=0, max_tokens=16)
    found = llm.chat(messages, params, chat_template=TEMPLATE, use_tqdm=False)[0].outputs[0].text
    assert found == texts(llm, ["user: What is a byte?\nassistant:"], max_tokens=16)[0]
