"""Hugging Face's own common tokenizer suites on `BltTokenizer`: as a prompt needs it, as training needs it, from others.

A skip that a suite asks for is accepted only with a reason that `SKIPS` gives in terms of BLT; any other fails.
"""

import inspect
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import pytest
from tokenizers import models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from blt_hf.tokenizer.tokenization import BltTokenizer
from helpers import transformers_suites as suites


try:
    common = suites.load("test_tokenization_common")
    backend = suites.load("test_tokenizers_backend_mixin")
except suites.SuitesUnavailable as error:
    suites.leave_out(f"transformers' source distribution cannot be fetched: {error}")

_folder = tempfile.TemporaryDirectory(prefix="blt-tokenizers-")
FOLDER = Path(_folder.name)

# The suite reads a text that the distribution lacks.
common.get_tests_dir = lambda: str(FOLDER)
(FOLDER / "fixtures").mkdir()
(FOLDER / "fixtures" / "sample_text.txt").write_text("Zażółć gęślą jaźń.\n\n速い狐", encoding="utf-8")

BltTokenizer().save_pretrained(FOLDER / "prompt")
BltTokenizer(padding_side="right", add_eos_token=True).save_pretrained(FOLDER / "training")
PreTrainedTokenizerFast(
    tokenizer_file=str(FOLDER / "training" / "tokenizer.json"),
    bos_token="<s>",
    eos_token="</s>",
    pad_token="<pad>",
    unk_token="<unk>",
    model_max_length=1024,
    add_bos_token=True,
    add_eos_token=True,
).save_pretrained(FOLDER / "foreign")

# Beginnings of test names, and why the property that they test is no property of a BLT.
SKIPS = {
    "test_chat_template_save_loading": "a BLT reads text only: no processor shares the template with its tokenizer",
    "test_pretokenized_inputs": "a BLT puts no space, which is a byte, before or between words; "
    "tests/tokenizer/test_tokenization.py covers lists of words",
    "test_rust_tokenizer_add_prefix_space_0": "a BLT reads the bytes that are there: adding a space is refused",
    "test_training_new_tokenizer": "a BLT's vocabulary is the 256 bytes: training another is refused",
}


@pytest.fixture(scope="module", autouse=True)
def summary(request):
    request.config.pluginmanager.register(suites.Summary(__file__, subject="`BltTokenizer`"))


def expected_ids(text: str) -> list[int]:
    """The ids of a text in which `<s>` is the only special token."""
    first, *others = ([byte + 4 for byte in piece.encode()] for piece in text.split("<s>"))
    return first + [index for piece in others for index in (1, *piece)]


class PromptSuite(common.TokenizerTesterMixin, backend.TokenizersBackendTesterMixin, unittest.TestCase):
    """Our defaults: padding on the left, BOS, no EOS."""

    tokenizer_class = BltTokenizer
    from_pretrained_id = str(FOLDER / "prompt")
    padded = [[0, 1, 101], [1, 102, 103]]  # the rows of "a" and "bc"

    integration_expected_decoded_text = common.TokenizerTesterMixin.integration_test_input_string
    integration_expected_token_ids = expected_ids(integration_expected_decoded_text)
    integration_expected_tokens = [
        "<s>" if index == 1 else bytes_to_unicode()[index - 4] for index in integration_expected_token_ids
    ]

    # With this vocabulary it is not slow.
    test_conversion_reversible = inspect.unwrap(common.TokenizerTesterMixin.test_conversion_reversible)

    def skipTest(self, reason):
        for name, why in SKIPS.items():
            if self._testMethodName.startswith(name):
                super().skipTest(why)
        self.fail(f"the suite skips this, and `SKIPS` gives no reason in terms of BLT: {reason}")

    def test_tokenizer_is_what_the_suite_is_about(self):
        self.assertEqual(self.get_tokenizer()(["a", "bc"], padding=True).input_ids, self.padded)

    def test_no_test_is_skipped_by_its_decorator(self):
        skipped = [name for name in dir(self) if getattr(getattr(self, name), "__unittest_skip__", False)]
        self.assertEqual(skipped, [])

    def test_integration_from_extractor(self):
        # The suite takes scores for the vocabulary of a class that does not say so.
        with mock.patch.object(BltTokenizer, "model", models.BPE):
            super().test_integration_from_extractor()

    def test_pretokenized_inputs(self):
        super().test_pretokenized_inputs()
        self.skipTest("the suite lets tokenizers off that do not add a space")

    def test_rust_tokenizer_add_prefix_space_0(self):
        with self.assertRaisesRegex(ValueError, "add_prefix_space"):
            super().test_rust_tokenizer_add_prefix_space_0()
        self.skipTest("refused")

    def test_training_new_tokenizer(self):
        with self.assertRaisesRegex(NotImplementedError, "nothing to train"):
            super().test_training_new_tokenizer()
        self.skipTest("refused")

    def test_training_new_tokenizer_with_special_tokens_change(self):
        with self.assertRaisesRegex(NotImplementedError, "nothing to train"):
            super().test_training_new_tokenizer_with_special_tokens_change()
        self.skipTest("refused")


class TrainingSuite(PromptSuite):
    """Padding on the right, BOS and EOS."""

    from_pretrained_id = str(FOLDER / "training")
    padded = [[1, 101, 2, 0], [1, 102, 103, 2]]


class ForeignSuite(PromptSuite):
    """Files that our class did not write: they ask for EOS and name tokens beyond the 260, and get neither."""

    from_pretrained_id = str(FOLDER / "foreign")
