"""What a typed program does with the public names; mypy reads it (`tests/test_typing.py`), nothing runs it."""

import torch

from blt_hf import (
    BltCache,
    BltConfig,
    BltForCausalLM,
    BltForSequenceClassification,
    BltForTokenClassification,
    BltModel,
    BltPatcher,
    BltPatcherConfig,
    BltTokenizer,
)
from blt_hf.conversion import convert_meta_checkpoint, export_meta_checkpoint
from blt_hf.evaluation import Measurement, measure_bits_per_byte
from blt_hf.training.calibration import calibrate_threshold


config: BltConfig = BltConfig(patching_mode="static", patch_size=4, patcher_config={"hidden_size": 32})
patcher_config: BltPatcherConfig = BltPatcherConfig(hidden_size=32, num_hidden_layers=2)
tokenizer: BltTokenizer = BltTokenizer(errors="ignore", add_eos_token=True)
data: bytes | list[bytes] = tokenizer.decode_bytes([101, 102])
text: str | list[str] = tokenizer.decode([101, 102], skip_special_tokens=True, errors="strict")
errors: str = tokenizer.errors

model: BltForCausalLM = BltForCausalLM(config)
cache: BltCache = BltCache(config)
cache.crop(-1)
length: int = cache.get_seq_length()
output = model(torch.tensor([[1, 101]]), past_key_values=cache, use_cache=True, output_patches=True)
others = [BltModel(config), BltForSequenceClassification(config), BltForTokenClassification(config)]
patcher: BltPatcher = BltPatcher(patcher_config)

threshold: float = calibrate_threshold(patcher, ["some text", b"bytes"], target_patch_size=4.5).threshold
measured: Measurement = measure_bits_per_byte(model, ["some text"], tokenizer)
quality: float = measured.bits_per_byte

convert_meta_checkpoint("from", "to", overwrite=True)
export_meta_checkpoint("from", "to", overwrite=True)
