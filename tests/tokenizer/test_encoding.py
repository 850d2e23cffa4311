"""A text is the same bytes for all that take one."""

import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from blt_hf import BltTokenizer
from blt_hf.evaluation import measure_bits_per_byte
from blt_hf.tokenizer.encoding import byte_ids, bytes_of, to_bytes
from blt_hf.training import data
from blt_hf.training.calibration import calibrate_threshold
from helpers.models import make_model


SURROGATES = ["a\udc80", "\ud83dx", "\udcff\udc00é", "é\udce9"]


@pytest.fixture(scope="module")
def model():
    return make_model()


@given(st.text(alphabet=st.characters(), max_size=30))
@example("a\udc80")
def test_every_reader_of_a_text_reads_the_same_bytes(model, text):
    ids = BltTokenizer()(text, split_special_tokens=True).input_ids
    assert ids == [1, *byte_ids(text)] == [1, *data.byte_ids(text)]
    assert ids == model.get_patches(text).input_ids
    assert ids == BltTokenizer()(to_bytes(text)).input_ids
    assert b"".join(patch.bytes for patch in model.get_patches(text)) == to_bytes(text) == bytes_of(ids)


@pytest.mark.parametrize("text", SURROGATES)
def test_files_metrics_and_thresholds_of_a_text_that_is_no_utf8(model, tmp_path, text):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": text}))
    assert data.read_texts([tmp_path]) == [to_bytes(text)]
    found = measure_bits_per_byte(model, [text])
    assert found.num_bytes == len(to_bytes(text)) and math.isclose(
        found.nats, measure_bits_per_byte(model, [to_bytes(text)]).nats
    )
    patcher = model.model.patcher
    assert calibrate_threshold(patcher, [text * 9], 2) == calibrate_threshold(patcher, [to_bytes(text) * 9], 2)


@pytest.mark.parametrize("wrong", [3, None, ["a"]])
def test_what_is_no_text_is_named(wrong):
    with pytest.raises(TypeError, match="`text` must be str or bytes"):
        byte_ids(wrong)
