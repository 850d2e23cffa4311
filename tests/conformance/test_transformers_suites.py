"""Hugging Face's own common suites on our classes: the patcher on, entropy patching, patches of several bytes.

A skip that a suite asks for is accepted only with a reason that `SKIPS` gives in terms of BLT; any other fails.
"""

import tempfile
import unittest
from pathlib import Path

import pytest
import torch
import transformers_suites as suites
from conftest import tiny_config

import blt_hf


try:
    suites.fetch()
except suites.SuitesUnavailable as error:
    pytest.skip(f"transformers' source distribution cannot be fetched: {error}", allow_module_level=True)


TINY_MODELS = Path(tempfile.mkdtemp(prefix="blt-tiny-models-"))
suites.write_tiny_model_summary(TINY_MODELS, {})


class ExportTesterMixin:
    """Stands in for the tests of torch.export, onnx and executorch, which the distribution lacks."""


class GenerationTesterMixin:
    """Stands in for the generation suite, which the distribution lacks."""


STUBS = {
    "exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
    "generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    "utils.test_configuration_utils": {"config_common_kwargs": {"return_dict": False, "output_hidden_states": True}},
}
common = suites.load("test_modeling_common", STUBS)
ConfigTester = suites.load("test_configuration_common", STUBS).ConfigTester
training = suites.load("test_training_mixin", STUBS)


class BltTester:
    """What the suites ask for a model: a configuration and inputs."""

    batch_size, seq_length, hidden_size = 4, 24, 16
    num_hidden_layers, num_attention_heads, vocab_size = 2, 2, 260
    is_training = True
    causal_lm_class = blt_hf.BltForCausalLM
    sequence_classification_class = blt_hf.BltForSequenceClassification

    def get_config(self):
        return tiny_config(patching_threshold=5.13)

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.seq_length)
        lengths = torch.arange(self.seq_length, 0, -3)[: self.batch_size]
        attention_mask = (torch.arange(self.seq_length) < lengths[:, None]).long()
        return self.get_config(), {
            "input_ids": common.ids_tensor(shape, self.vocab_size),
            "attention_mask": attention_mask,
        }


class BltModelTest(common.ModelTesterMixin, GenerationTesterMixin, training.TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (
        blt_hf.BltModel,
        blt_hf.BltForCausalLM,
        blt_hf.BltForSequenceClassification,
        blt_hf.BltForTokenClassification,
    )
    _is_composite = True
    test_all_params_have_gradient = False

    def setUp(self):
        self.model_tester = BltTester()
        self.config_tester = ConfigTester(self, config_class=blt_hf.BltConfig)

    def test_config(self):
        self.config_tester.run_common_tests()
