"""Hugging Face's own common suites on our classes: the patcher on, entropy patching, patches of several bytes.

A skip that a suite asks for is accepted only with a reason that `SKIPS` gives in terms of BLT; any other fails.
"""

import functools
import inspect
import itertools
import os
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from transformers import pipeline, set_seed
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.blt import modeling_blt as in_tree

import blt_hf
from blt_hf.tokenizer.tokenization import BltTokenizer
from helpers import transformers_suites as suites
from helpers.models import tiny_config


_folder = tempfile.TemporaryDirectory(prefix="blt-tiny-models-")
TINY_MODELS = Path(_folder.name)
os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(TINY_MODELS)

MODEL_CLASSES = (
    blt_hf.BltModel,
    blt_hf.BltForCausalLM,
    blt_hf.BltForSequenceClassification,
    blt_hf.BltForTokenClassification,
)


def write_tiny_models() -> None:
    """The models that the pipeline suite loads, and its list of them."""
    for model_class in MODEL_CLASSES:
        set_seed(0)
        folder = TINY_MODELS / "blt" / model_class.__name__
        model_class(BltTester().get_config()).save_pretrained(folder)
        BltTokenizer().save_pretrained(folder)
    suites.write_tiny_model_summary(TINY_MODELS, {c.__name__: "BltTokenizer" for c in MODEL_CLASSES})


class GenerationTesterMixin:
    """Stands in for the generation suite, which the distribution lacks; `test_generation_suite.py` asks what it asks."""


class _PipelineTests:
    """Stands in for the tests of one pipeline: how it is made, and what its results look like."""

    task: str
    arguments = {}
    examples = ("A first example.", "Ein zweites Beispiel, mit Ümläuten — ok?")

    def get_test_pipeline(self, model, tokenizer=None, dtype="float32", **processors):
        pipe = pipeline(self.task, model=model, tokenizer=tokenizer, dtype=dtype, **self.arguments)
        return pipe, list(self.examples)

    def run_pipeline_test(self, pipe, examples):
        raise NotImplementedError


class TextGenerationPipelineTests(_PipelineTests):
    task = "text-generation"
    arguments = {"max_new_tokens": 8}

    def run_pipeline_test(self, pipe, examples):
        for text in examples:
            (full,) = pipe(text, do_sample=False)
            (new,) = pipe(text, do_sample=False, return_full_text=False)
            assert full["generated_text"] == text + new["generated_text"]
            (ids,) = pipe(text, do_sample=False, return_tensors=True)
            assert len(ids["generated_token_ids"]) == 1 + len(text.encode()) + 8
        assert [len(row) for row in pipe(examples, do_sample=True, num_return_sequences=2)] == [2, 2]
        chat = [{"role": "user", "content": examples[0]}]
        (answer,) = pipe(chat, do_sample=False)
        assert answer["generated_text"][:-1] == chat
        assert answer["generated_text"][-1]["role"] == "assistant"
        with pytest.raises(ValueError):
            pipe(examples[0], return_full_text=True, return_tensors=True)


class FeatureExtractionPipelineTests(_PipelineTests):
    task = "feature-extraction"

    def run_pipeline_test(self, pipe, examples):
        for text, row in zip(examples, pipe(examples)):
            assert torch.tensor(row).shape == (1, 1 + len(text.encode()), BltTester.hidden_size)
        assert pipe(examples[0], return_tensors=True).shape[0] == 1


class TextClassificationPipelineTests(_PipelineTests):
    task = "text-classification"

    def run_pipeline_test(self, pipe, examples):
        labels = set(pipe.model.config.id2label.values())
        for text in examples:
            (best,) = pipe(text)
            assert best["label"] in labels
            scores = pipe(text, top_k=None)
            assert {score["label"] for score in scores} == labels
            assert abs(sum(score["score"] for score in scores) - 1) < 1e-2
        assert len(pipe(examples)) == len(examples)
        assert pipe({"text": examples[0], "text_pair": examples[1]})["label"] in labels


class TokenClassificationPipelineTests(_PipelineTests):
    task = "token-classification"

    def run_pipeline_test(self, pipe, examples):
        labels = set(pipe.model.config.id2label.values())
        for text, entities in zip(examples, pipe(examples)):
            assert entities
            assert all(entity["entity"] in labels for entity in entities)
            assert all(text[entity["start"] : entity["end"]] for entity in entities)
        groups = pipe(examples[0], aggregation_strategy="simple")
        assert all(group["entity_group"] in {label.rpartition("-")[2] for label in labels} for group in groups)


class ZeroShotClassificationPipelineTests(_PipelineTests):
    task = "zero-shot-classification"
    arguments = {"candidate_labels": ["politics", "health"]}

    def run_pipeline_test(self, pipe, examples):
        for multi_label in (False, True):
            result = pipe(examples[0], multi_label=multi_label)
            assert result["sequence"] == examples[0]
            assert sorted(result["labels"]) == sorted(self.arguments["candidate_labels"])


suites.STUBS.update(
    {
        "generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
        "utils.test_configuration_utils": {
            # Values that differ from the defaults, for the fields that every configuration has.
            "config_common_kwargs": {
                "return_dict": False,
                "output_hidden_states": True,
                "output_attentions": True,
                "dtype": "float16",
                "chunk_size_feed_forward": 5,
                "architectures": ["BertModel"],
                "id2label": {0: "first"},
                "label2id": {"first": 0},
                "problem_type": "regression",
            }
        },
        "pipelines.test_pipelines_text_generation": {"TextGenerationPipelineTests": TextGenerationPipelineTests},
        "pipelines.test_pipelines_feature_extraction": {
            "FeatureExtractionPipelineTests": FeatureExtractionPipelineTests
        },
        "pipelines.test_pipelines_text_classification": {
            "TextClassificationPipelineTests": TextClassificationPipelineTests
        },
        "pipelines.test_pipelines_token_classification": {
            "TokenClassificationPipelineTests": TokenClassificationPipelineTests
        },
        "pipelines.test_pipelines_zero_shot": {
            "ZeroShotClassificationPipelineTests": ZeroShotClassificationPipelineTests
        },
    }
)


class BltTester:
    """What the suites ask for a model: a configuration and inputs."""

    batch_size, seq_length, hidden_size = 4, 24, 16
    num_hidden_layers, num_attention_heads, vocab_size = 2, 2, 260
    is_training = True
    causal_lm_class = blt_hf.BltForCausalLM
    # nats; patches of two to three bytes for freshly initialised weights, and for the same with norms that
    # `set_model_for_less_flaky_test` has flattened
    threshold, flat_threshold = 5.13, 5.532

    def __init__(self, **overrides):
        self.overrides = overrides
        self.is_padded = True
        self.has_patch_lengths = False

    def get_config(self):
        config = tiny_config(**{"patching_threshold": self.threshold, "max_position_embeddings": 64, **self.overrides})
        for name in config.sub_configs:
            getattr(config, name).max_position_embeddings = 64
        return config

    def prepare_config_and_inputs_for_common(self):
        rows, columns = self.batch_size, self.seq_length
        lengths = torch.arange(columns, 0, -3)[:rows] if self.is_padded else torch.full((rows,), columns)
        inputs = {
            "input_ids": common.ids_tensor((rows, columns), self.vocab_size),
            "attention_mask": (torch.arange(columns) < lengths[:, None]).long(),
        }
        if self.has_patch_lengths:
            inputs["patch_lengths"] = torch.stack([torch.tensor([1, 1, 4, 3, n - 8]) for n in lengths.tolist()])
        return self.get_config(), inputs


def with_given_patches(forward):
    """`BltModel.forward` with lengths of patches that differ from row to row, for whole texts that come without."""
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        if given.arguments.get("patch_lengths") is None:
            mask = given.arguments.get("attention_mask")
            counts = torch.ones_like(given.arguments["input_ids"]) if mask is None else mask
            given.arguments["patch_lengths"] = torch.tensor(
                [[1, 1, 2 + row % 4, 3, count - 6 - row % 4] for row, count in enumerate(counts.sum(1).tolist())]
            )
        return forward(*given.args, **given.kwargs)

    return wrapper


class PatcherTester(BltTester):
    causal_lm_class = blt_hf.BltPatcher

    def get_config(self):
        return super().get_config().patcher_config


try:
    common = suites.load("test_modeling_common")
    write_tiny_models()
    pipelines = suites.load("test_pipeline_mixin")
    training = suites.load("test_training_mixin")
    ConfigTester = suites.load("test_configuration_common").ConfigTester
except suites.SuitesUnavailable as error:
    suites.leave_out(f"transformers' source distribution cannot be fetched: {error}")

# The suites look up by name what kind of model a class is; they know the in-tree classes only.
for mapping, names in {
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": {"blt": "BltForSequenceClassification"},
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": {"blt": "BltForTokenClassification"},
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": {"blt_patcher": "BltPatcher"},
}.items():
    setattr(common, mapping, {**getattr(common, mapping), **names})
pipelines.transformers_module = SimpleNamespace(BltTokenizer=BltTokenizer)
for entry in pipelines.pipeline_test_mapping.values():
    if isinstance(entry["test"], str):
        entry["test"] = entry["test"].replace("tests.", f"{suites.PACKAGE}.", 1)


def flatten_norms(model, flatten=common.set_model_for_less_flaky_test):
    """Flat norms mean flat logits and higher entropies: with the same threshold each byte would be a patch."""
    flatten(model)
    if hasattr(model.config, "patching_threshold"):
        model.config.patching_threshold = BltTester.flat_threshold


common.set_model_for_less_flaky_test = flatten_norms

# Beginnings of test names, and why the property that they test is no property of a BLT.
SKIPS = {
    "test_bc_cache_name_forward": "a BLT has a cache of its own: `tests/model/test_cache_name_blt.py` asks for both names",
    "test_can_load_from_already_mapped_keys": "a BLT's tensors are stored under their own names: nothing is converted",
    "test_reverse_loading_mapping": "a BLT's tensors are stored under their own names: nothing is converted",
    "test_capture_outputs_decorator": "a BLT has three stacks, whose states it returns itself, without hooks",
    "test_eager_matches_batched_and_grouped_inference": "a BLT has no experts",
    "test_moe_models_record_router_logits": "a BLT has no experts",
    "test_output_router_logits_from_config": "a BLT has no experts",
    "test_encoder_decoder_loss_no_double_shift": "a BLT's encoder and decoder read the same bytes: it is a causal LM",
    "test_keep_in_fp32_modules_strict": "no weight of a BLT is fp32 where a user asks for bf16",
    "test_model_rope_with_partial_rotation": "a BLT rotates whole heads; its checkpoints have no other form",
    "test_vision_axial_rope": "a BLT reads bytes, no images",
    "test_resize_position_vector_embeddings": "a BLT has rotary positions, no table of them",
    "test_sdpa_can_dispatch_composite_models": "a BLT has no vision or audio tower",
    "test_pipeline_any_to_any": "a BLT reads and writes bytes of text only",
    "test_pipeline_audio_classification": "a BLT reads no audio",
    "test_pipeline_automatic_speech_recognition": "a BLT reads no audio",
    "test_pipeline_fill_mask": "a BLT is causal and has no mask token",
    "test_pipeline_image": "a BLT reads no images",
    "test_pipeline_table_question_answering": "a BLT has no embedding of rows and columns",
    "test_pipeline_text_to_audio": "a BLT writes no audio",
    "test_pipeline_zero_shot_audio_classification": "a BLT reads no audio",
    "test_pipeline_zero_shot_image_classification": "a BLT reads no images",
    "test_pipeline_zero_shot_object_detection": "a BLT reads no images",
}
WHOLE_SKIPS = {
    "test_sdpa_can_dispatch_non_composite_models": "a BLT is composite: the tests of composite models run",
}
PATCHER_SKIPS = {
    "test_attn_implementation_composite_models": "the patcher is one stack, with one configuration",
    "test_can_set_attention_dynamically_composite_model": "the patcher is one stack, with one configuration",
    "test_internal_model_config_and_subconfig_are_same": "the patcher is one stack, with one configuration",
    "test_model_base_model_prefix": "the patcher is its own base model: its tensors have no prefix in any checkpoint",
    "test_keep_in_fp32_modules": "the patcher by itself is an ordinary language model: nothing in it keeps fp32 weights",
}


@pytest.fixture(scope="module", autouse=True)
def summary(request):
    request.config.pluginmanager.register(suites.Summary(__file__))


class _OurRules:
    """What our runs of the suites share."""

    skips = SKIPS

    def skipTest(self, reason):
        for name, why in self.skips.items():
            if self._testMethodName.startswith(name):
                super().skipTest(why)
        self.fail(f"the suite skips this, and `SKIPS` gives no reason in terms of BLT: {reason}")

    def setUp(self):
        self.model_tester = self.model_tester_class()
        self.config_tester = ConfigTester(self, config_class=type(self.model_tester.get_config()))
        common.global_rng.seed(0)  # inputs do not depend on which tests ran before

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_can_init_all_missing_weights(self):
        # The suite takes the year of a model from the copyright line of its file, and lets old models off.
        def getfile(thing, getfile=inspect.getfile):
            return in_tree.__file__ if thing is self.config_tester.config_class else getfile(thing)

        with mock.patch.object(inspect, "getfile", getfile):
            super().test_can_init_all_missing_weights()

    def test_can_capture_specific_layers_hidden_states(self):
        test = super().test_can_capture_specific_layers_hidden_states
        if "assertIsNone" not in inspect.getsource(test):
            raise unittest.SkipTest(
                "indices leave the embeddings out in this transformers; with a BLT, as in later releases, they count "
                "the states that `output_hidden_states=True` returns"
            )
        test()

    def test_retain_grad_hidden_states_attentions(self):
        # States of padded rows are returned in the caller's columns, and computed in others.
        self.model_tester.is_padded = False
        super().test_retain_grad_hidden_states_attentions()

    def check_windows(self, make_config, weights_of):
        """What the suite asks of a `sliding_window` of 3 bytes and the switch beside it.

        Args:
            make_config: a configuration from a window; None: no window.
            weights_of: the self-attention weights over bytes, `(B, H, S, S)` each, in the output of a model.
        """
        _, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        inputs = {"input_ids": inputs["input_ids"]}
        index = torch.arange(inputs["input_ids"].shape[1])
        is_inside = (index <= index[:, None]) & (index > index[:, None] - 3)
        is_before = index <= index[:, None] - 3
        for window, model_class in itertools.product((3, None), self.all_model_classes):
            with self.subTest(f"{model_class.__name__}, {window}"):
                model = model_class._from_config(make_config(window), attn_implementation="eager").eval()
                all_weights = weights_of(model(**inputs, output_attentions=True))
                self.assertGreater(len(all_weights), 0)
                for weights in all_weights:
                    self.assertTrue((weights[..., is_inside] > 0).all())
                    self.assertEqual((weights[..., is_before] == 0).all(), window is not None)


class BltSuite(
    _OurRules,
    common.ModelTesterMixin,
    GenerationTesterMixin,
    pipelines.PipelineTesterMixin,
    training.TrainingTesterMixin,
    unittest.TestCase,
):
    model_tester = None
    model_tester_class = BltTester
    all_model_classes = MODEL_CLASSES
    skips = {**SKIPS, **WHOLE_SKIPS}
    pipeline_model_mapping = {
        "feature-extraction": blt_hf.BltModel,
        "text-generation": blt_hf.BltForCausalLM,
        "text-classification": blt_hf.BltForSequenceClassification,
        "token-classification": blt_hf.BltForTokenClassification,
        "zero-shot": blt_hf.BltForSequenceClassification,
    }
    _is_composite = True
    # Older suites unfreeze the patcher and then expect gradients from it.
    test_all_params_have_gradient = "frozen" in inspect.getsource(
        common.ModelTesterMixin.check_training_gradient_checkpointing
    )

    def setUp(self):
        super().setUp()
        if "_fp16_" in self._testMethodName or "_bf16_" in self._testMethodName:
            # In half precision, kernels differ by more than some entropy differs from the threshold: they are compared
            # on patches that are given. (`PatcherSuite` compares them in the entropy model.)
            given = mock.patch.object(blt_hf.BltModel, "forward", with_given_patches(blt_hf.BltModel.forward))
            given.start()
            self.addCleanup(given.stop)

    @pytest.mark.slow  # it loads every class in every type; the default run asks it of the patcher, by the same code
    def test_bc_torch_dtype(self):
        super().test_bc_torch_dtype()

    def test_sliding_window_mask(self):
        # The encoder's and the decoder's window is one field, which means "no window" where it is None.
        self.check_windows(
            lambda window: BltTester(local_attention_window_len=window).get_config(),
            lambda out: (*out.attentions, *(out.get("encoder_attentions") or ())),
        )

    def test_attention_outputs(self):
        # The model and the language model return the states of three stacks, the classifiers those of the last one.
        for num_types, self.all_model_classes in ((3, MODEL_CLASSES[:2]), (1, MODEL_CLASSES[2:])):
            self.model_tester.num_hidden_states_types = num_types
            super().test_attention_outputs()

    def test_inputs_embeds(self):
        # The patcher reads ids, so embeddings come with lengths of patches; hashes of ids would be added.
        self.model_tester = BltTester(encoder_hash_byte_group_nb_functions=0)
        self.model_tester.has_patch_lengths = True
        super().test_inputs_embeds()

    def test_inputs_embeds_matches_input_ids(self):
        # Byte embeddings are all that there is of a byte only where no hashes are added to them.
        self.model_tester = BltTester(encoder_hash_byte_group_nb_functions=0)
        self.model_tester.has_patch_lengths = True
        super().test_inputs_embeds_matches_input_ids()


class PatcherStates(blt_hf.BltPatcher):
    """The entropy model as a base model."""

    def forward(self, input_ids=None, **kwargs):
        out = super().forward(input_ids, output_hidden_states=True, **kwargs)
        return BaseModelOutput(last_hidden_state=out.hidden_states[-1])


class PatcherSuite(
    _OurRules,
    common.ModelTesterMixin,
    GenerationTesterMixin,
    training.TrainingTesterMixin,
    unittest.TestCase,
):
    model_tester = None
    model_tester_class = PatcherTester
    all_model_classes = (blt_hf.BltPatcher,)
    skips = {**SKIPS, **PATCHER_SKIPS}

    def test_sliding_window_mask(self):
        self.check_windows(
            lambda window: PatcherTester(patcher_config={"sliding_window": window}).get_config(),
            lambda out: out.attentions,
        )

    def _check_rope_scaling(self, test):
        # The suite knows base models by their names in a list, and looks at their last states.
        names = {**common.MODEL_MAPPING_NAMES, "blt_patcher": PatcherStates.__name__}
        self.all_model_classes = (PatcherStates,)
        with mock.patch.object(common, "MODEL_MAPPING_NAMES", names):
            test()

    def test_torch_save_load(self):
        with mock.patch.object(common, "MODEL_MAPPING", {blt_hf.BltPatcherConfig: blt_hf.BltPatcher}):
            super().test_torch_save_load()

    def test_model_base_model_prefix(self):
        self.skipTest("`base_model` is the model itself")


def _of_base_model(name):
    test = getattr(PatcherSuite, name)

    @functools.wraps(test)
    def wrapper(self):
        self._check_rope_scaling(lambda: test(self))

    return wrapper


for _name in [name for name in dir(PatcherSuite) if name.startswith("test_model_rope_scaling")]:
    if getattr(PatcherSuite, _name) is not None:  # the name of several tests that were made from one
        setattr(PatcherSuite, _name, _of_base_model(_name))
