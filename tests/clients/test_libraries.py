"""Libraries that build on transformers, used as their own pages show, with no line for a BLT but the import."""

import json

import pytest
import sentence_transformers
import torch
from transformers import AutoModel, AutoTokenizer

from blt_hf import BltForCausalLM, BltForSequenceClassification, BltModel, BltTokenizer
from helpers.clients import ANSWERS, chatter_folder
from helpers.models import make_model, tiny_config


PROMPT = "user: {question}\n\nassistant: "


# LangChain.


@pytest.fixture(scope="module")
def langchain_pipeline():
    from langchain_huggingface import HuggingFacePipeline

    return HuggingFacePipeline.from_model_id(
        model_id=chatter_folder(),
        task="text-generation",
        pipeline_kwargs={"max_new_tokens": 60, "do_sample": False, "return_full_text": False},
    )


def test_langchain_chain(langchain_pipeline):
    from langchain_core.prompts import PromptTemplate

    assert isinstance(langchain_pipeline.pipeline.model, BltForCausalLM)
    chain = PromptTemplate.from_template(PROMPT) | langchain_pipeline
    assert chain.invoke({"question": "greet"}) == ANSWERS["greet"]
    assert chain.batch([{"question": question} for question in ANSWERS]) == list(ANSWERS.values())
    pieces = list(chain.stream({"question": "greet"}))
    assert "".join(pieces) == ANSWERS["greet"] and len(pieces) > 2


def test_langchain_chat(langchain_pipeline):
    """The messages go through the tokenizer's chat template."""
    from langchain_core.messages import HumanMessage
    from langchain_huggingface import ChatHuggingFace

    chat = ChatHuggingFace(llm=langchain_pipeline)
    assert chat.invoke([HumanMessage("count")]).content == ANSWERS["count"]


# sentence-transformers.

SENTENCES = ["Some text.", "A much longer sentence, with naïve words: 速い and Zażółć gęślą jaźń.", "x"]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    make_model(tiny_config(patching_mode="entropy"), BltModel).save_pretrained(folder)
    BltTokenizer().save_pretrained(folder)
    return str(folder)


def means(folder: str, texts: list[str], is_chat: bool) -> torch.Tensor:
    """The mean of the states of each text alone, as it is or as a user's message."""
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if is_chat:
        texts = [tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False) for text in texts]
    with torch.no_grad():
        batches = [tokenizer(text, add_special_tokens=not is_chat, return_tensors="pt") for text in texts]
        return torch.stack([model(**batch).last_hidden_state[0].mean(0) for batch in batches])


def test_sentence_transformers(base_folder, tmp_path):
    """A folder that is no sentence model yet gets mean pooling; sentences of a batch do not see one another."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(base_folder, device="cpu")
    vectors = encoder.encode(SENTENCES, convert_to_tensor=True, batch_size=3)
    assert type(encoder[0].auto_model) is BltModel
    # Since its version 6 it puts sentences into the chat template of every tokenizer that has one.
    is_chat = int(sentence_transformers.__version__.partition(".")[0]) >= 6
    torch.testing.assert_close(vectors, means(base_folder, SENTENCES, is_chat), atol=1e-5, rtol=1e-5)
    encoder.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(again.encode(SENTENCES, convert_to_tensor=True), vectors, atol=1e-5, rtol=1e-5)


def test_sentence_transformers_on_plain_text(base_folder):
    """The way around the chat template that docs/clients.md shows."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    plain = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    states = Transformer(base_folder, modality_config=plain, module_output_name="token_embeddings")
    encoder = SentenceTransformer(modules=[states, Pooling(16, "mean")], device="cpu")
    vectors = encoder.encode(SENTENCES, convert_to_tensor=True, batch_size=3)
    torch.testing.assert_close(vectors, means(base_folder, SENTENCES, is_chat=False), atol=1e-5, rtol=1e-5)


def test_sentence_transformers_trains(base_folder, tmp_path):
    """A step of its trainer moves the encoder and leaves the entropy model alone."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    encoder = SentenceTransformer(base_folder, device="cpu")
    before = {name: weight.clone() for name, weight in encoder[0].auto_model.named_parameters()}
    trainer = SentenceTransformerTrainer(
        model=encoder,
        args=SentenceTransformerTrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=3, report_to=[], use_cpu=True, save_strategy="no",
            learning_rate=1e-2, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"anchor": SENTENCES, "positive": [text.upper() for text in SENTENCES]}),
        loss=MultipleNegativesRankingLoss(encoder),
    )  # fmt: skip
    with torch.enable_grad():
        trainer.train()
    moved = {
        name for name, weight in encoder[0].auto_model.named_parameters() if not torch.equal(weight, before[name])
    }
    assert "local_encoder.embed_tokens.weight" in moved
    assert not [name for name in moved if name.startswith("patcher.")]


# evaluate's evaluators. The metrics of the Hub are scripts that are fetched from there; here is one of our own.

METRIC = """
import datasets
import evaluate


class Share(evaluate.EvaluationModule):
    def _info(self):
        features = {features}
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, {arguments}):
        return {{"share": {result}}}
"""


def local_metric(folder, features: str, arguments: str, result: str):
    import evaluate

    path = folder / "share" / "share.py"
    path.parent.mkdir()
    path.write_text(METRIC.format(features=features, arguments=arguments, result=result))
    return evaluate.load(str(path))


def test_evaluator_of_text_generation(tmp_path):
    """What the evaluator's metric is given is what the pipeline writes."""
    import evaluate
    from datasets import Dataset

    metric = local_metric(
        tmp_path,
        '{"data": datasets.Value("string")}',
        "data",
        f"sum(text.endswith({ANSWERS['count']!r}) for text in data)",
    )
    model = BltForCausalLM.from_pretrained(chatter_folder())
    model.generation_config.max_new_tokens = 60
    found = evaluate.evaluator("text-generation").compute(
        model_or_pipeline=model,
        tokenizer=BltTokenizer(),
        data=Dataset.from_dict({"text": [PROMPT.format(question="count"), PROMPT.format(question="greet")]}),
        metric=metric,
    )
    assert found["share"] == 1


def test_evaluator_of_text_classification(tmp_path):
    """Labels come back through the model's `label2id`, and the share of right ones is the one counted by hand."""
    import evaluate
    from datasets import Dataset

    torch.manual_seed(0)
    config = tiny_config(
        patching_mode="space", num_labels=2, id2label={0: "short", 1: "long"}, label2id={"short": 0, "long": 1}
    )
    model, tokenizer = BltForSequenceClassification(config).eval(), BltTokenizer()
    texts = [*SENTENCES, "Other words", "and more of them, to the end of a line"]
    with torch.no_grad():
        labels = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    labels[0] = 1 - labels[0]
    integers = '{"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}'
    equal = "sum(int(a == b) for a, b in zip(predictions, references)) / len(references)"
    found = evaluate.evaluator("text-classification").compute(
        model_or_pipeline=model,
        tokenizer=tokenizer,
        data=Dataset.from_dict({"text": texts, "label": labels}),
        metric=local_metric(tmp_path, integers, "predictions, references", equal),
        label_mapping=config.label2id,
    )
    assert found["share"] == pytest.approx(0.8)
    json.dumps(found)  # what a report stores
