"""What `import blt_hf` changes in other libraries is still needed: each test fails when a change can go.

The reasons stand at the top of the modules in src/blt_hf/integrations/. All facts are found in one process that does not
have this package.
"""

import pytest
import torch

from blt_hf import BltTokenizer
from helpers.models import make_model
from helpers.processes import run_elsewhere


pytestmark = pytest.mark.timeout(900)  # a new process that imports everything, for machines that are busy
FACTS = """
import transformers
first = transformers
facts = {}

import transformers.processing_utils
facts["processing_utils_runs_transformers_again"] = sys.modules["transformers"] is not first

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.blt.configuration_blt import BltConfig
from transformers.models.blt.modeling_blt import BltForCausalLM

def decoded(model):
    # Logits of the last byte with a cache, the way `generate` asks for them.
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    return model(ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]

model = BltForCausalLM.from_pretrained(folder).eval()
with torch.no_grad():
    whole = model(ids, use_cache=False).logits[:, -1]
    try:
        facts["in_tree_blt_cannot_decode"] = bool((decoded(model) - whole).abs().max() > 1e-3)
    except AttributeError:
        facts["in_tree_blt_cannot_decode"] = True

class OurTokenizer(PreTrainedTokenizerFast):
    pass

AutoTokenizer.register(BltConfig, fast_tokenizer_class=OurTokenizer, exist_ok=True)
facts["auto_tokenizer_believes_the_files"] = type(AutoTokenizer.from_pretrained(folder)) is not OurTokenizer

from transformers.models.auto import modeling_auto
facts["tables_of_tasks_have_only_the_causal_model"] = not any(
    name in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values()
    for task, name in (
        ("CAUSAL_LM", "BltPatcher"),
        ("SEQUENCE_CLASSIFICATION", "BltForSequenceClassification"),
        ("TOKEN_CLASSIFICATION", "BltForTokenClassification"),
    )
)

from transformers.pipelines import TokenClassificationPipeline
tagger = object.__new__(TokenClassificationPipeline)  # a word of one letter of two bytes, without a model
tagger.tokenizer = AutoTokenizer.from_pretrained(folder)
batch = tagger.tokenizer("é", return_offsets_mapping=True, return_special_tokens_mask=True)
columns = batch["offset_mapping"], batch["special_tokens_mask"]
_, second = tagger.gather_pre_entities("é", batch["input_ids"], [[1.0]] * 3, *columns, "simple")
facts["pipelines_cut_letters"] = not second["is_subword"]
word = tagger.tokenizer.convert_tokens_to_string(tagger.tokenizer.tokenize("é"))
facts["pipelines_decode_words_twice"] = tagger.group_sub_entities(
    [{"word": word, "entity": "I-A", "score": 1.0, "start": 0, "end": 1}]
)["word"] != "é"

before = set(sys.modules)
import peft
facts["importing_peft_is_slow"] = len(set(sys.modules) - before) > 100  # modules, as a measure that does not vary

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
facts["peft_has_no_defaults"] = "blt" not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

class Bags(torch.nn.Embedding):
    def forward(self, rows):
        return super().forward(rows).sum(dim=-2)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bags = Bags(10, 4)

    def forward(self, rows):
        return self.bags(rows)

rows = torch.tensor([[[1, 2, 3], [4, 5, 6]]])
def looks_up_bags(config):
    adapted = peft.get_peft_model(Model(), config)
    try:
        return adapted(rows).shape == (1, 2, 4)
    except RuntimeError:
        return False

facts["peft_looks_up_single_rows"] = not any(
    looks_up_bags(config)
    for config in (
        peft.LoraConfig(target_modules=["bags"]),
        peft.TrainableTokensConfig(target_modules=["bags"], token_indices=[3]),
    )
)

class Stack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.patcher = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)})

adapted = peft.get_peft_model(Stack(), peft.LoraConfig(target_modules=["q_proj"]))
facts["peft_adapts_by_name"] = any("patcher.q_proj.lora_A" in name for name, _ in adapted.named_modules())

def fails(function, error):
    try:
        function()
    except error:
        return True
    return False

from peft.tuners.lora.eva import prepare_layer_inputs_fn_language_modeling as take_columns
from peft.tuners.lora.variants import calculate_alora_offsets
from peft.tuners.xlora.layer import XLoraLayer
bytes_, patches = torch.ones(1, 5, dtype=torch.bool).nonzero(), torch.zeros(1, 3, 4)
alora = {"default": peft.LoraConfig(alora_invocation_tokens=[7, 8])}
facts["peft_counts_positions"] = [
    calculate_alora_offsets(alora, "default", torch.tensor([[5, 7, 8, 9]])) == [3],  # whatever a layer reads
    fails(lambda: take_columns(patches, bytes_, ""), IndexError),
    fails(lambda: XLoraLayer.apply_scalings_to_x(patches, torch.ones(1, 5, 2), 0), RuntimeError),
] == [True] * 3

sizes = {"token_dim": 16, "num_layers": 1, "num_attention_heads": 2}
config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **sizes)
try:
    peft.get_peft_model(BltForCausalLM(model.config), config)
    facts["peft_accepts_prompts"] = True
except ValueError:
    facts["peft_accepts_prompts"] = False
print(json.dumps(facts))
"""
NAMES = [
    "auto_tokenizer_believes_the_files",
    "importing_peft_is_slow",
    "in_tree_blt_cannot_decode",
    "peft_accepts_prompts",
    "peft_adapts_by_name",
    "peft_counts_positions",
    "peft_has_no_defaults",
    "peft_looks_up_single_rows",
    "pipelines_cut_letters",
    "pipelines_decode_words_twice",
    "processing_utils_runs_transformers_again",
    "tables_of_tasks_have_only_the_causal_model",
]


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("needed")
    make_model().save_pretrained(folder)
    tokenizer = BltTokenizer()
    tokenizer.save_pretrained(folder)
    ids = tokenizer("Is it still needed?", return_tensors="pt").input_ids
    torch.save({"source": "", "ids": ids}, folder / "expected.pt")
    return run_elsewhere(FACTS, folder)


@pytest.mark.parametrize("name", NAMES)
def test_still_needed(facts, name):
    assert set(facts) == set(NAMES)
    assert facts[name], "no longer so: what src/blt_hf/integrations/ changes for it can go"
