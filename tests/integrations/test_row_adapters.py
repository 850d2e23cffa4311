"""Each row of a batch with an adapter of its own, as PEFT offers it by `adapter_names`."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers.models import make_model
from helpers.texts import encode


SETTINGS = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_rows_of_a_batch_use_their_own_adapters(targets):
    model = make_model(seed=3)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)
    peft_model = get_peft_model(model, config)
    peft_model.add_adapter("other", config)
    peft_model.eval()
    rows = [encode("some text, and more"), encode("12 é\nab")]
    ids, mask = torch.zeros(2, len(rows[0]), dtype=torch.int64), torch.zeros(2, len(rows[0]), dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, ids.shape[1] - len(row) :], mask[index, ids.shape[1] - len(row) :] = torch.tensor(row), 1
    names = ["default", "other"]
    together = peft_model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **SETTINGS)
    texts = []
    for index, (row, name) in enumerate(zip(rows, names)):
        peft_model.set_adapter(name)
        alone = peft_model.generate(input_ids=torch.tensor([row]), **SETTINGS)[0, len(row) :].tolist()
        assert together[index, ids.shape[1] :].tolist() == alone
        texts.append(alone)
    peft_model.set_adapter("default")
    swapped = peft_model.generate(input_ids=torch.tensor([rows[1]]), **SETTINGS)[0, len(rows[1]) :].tolist()
    assert swapped != texts[1], "the adapters differ, or this would prove nothing"
