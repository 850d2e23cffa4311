"""Model cards: a README.md with metadata for the Hub, and answers to the first questions about a BLT."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from ..conversion.files import write_whole
from ..model.modeling_base_blt import MODEL_TAGS
from ..model.names_blt import AUTO_CLASSES, architecture_name
from ..model.patching_blt import PatchingRule
from ..rules import describe_rule
from .measuring import Measurement


_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,4})?|code|multilingual")
_PARTS = {
    "patcher": "entropy model",
    "encoder_hash_tok_embedding": "hash embeddings",
    "local_encoder": "local encoder",
    "global_transformer": "global transformer",
    "local_decoder": "local decoder",
}


def make_model_card(
    model,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    language: str | Sequence[str] | None = None,
    datasets: str | Sequence[str] | None = None,
    base_model: str | Sequence[str] | None = None,
    tags: str | Sequence[str] | None = None,
    bits_per_byte: Mapping[str, Measurement | float] | None = None,
    description: str | None = None,
) -> ModelCard:
    """Makes the card of a BLT, of an entropy model, or of an adapter to one.

    Args:
        model: a model in memory (also one of PEFT), or the folder or Hub id of one, whose configuration is read.
        repo_id: `"user/name"` of the model on the Hub; None: the folder's or the class's name.
        license: the Hub's id of it, such as `"apache-2.0"`; `"other"` needs `license_name`.
        license_name, license_link: of a licence that has no id.
        language: ISO 639 codes such as `"en"`; also `"code"` and `"multilingual"`.
        datasets: Hub ids of the data that the model was trained on.
        base_model: Hub ids of the model that it was made from; None: of an adapter, the id in its configuration.
        tags: beside `"blt"`, `"byte-level"` and `"tokenizer-free"`.
        bits_per_byte: results of [`measure_bits_per_byte`], or numbers, by the name of the text or the Hub id of the
            data set. In the metadata these are evaluation results of the metric `bits_per_byte`.
        description: a paragraph under the title; None: a sentence that defines a BLT.
    Returns:
        a `huggingface_hub.ModelCard`: `.data` is the metadata, `.text` the text below it, `str(card)` the file.
    Raises:
        ValueError: an argument that the Hub would refuse, or a model of another kind.
    """
    subject = _Subject(model)
    results = _eval_results(bits_per_byte)
    name = repo_id or subject.name
    _check_ids("repo_id", repo_id)
    data = ModelCardData(
        license=_checked_license(license, license_name),
        license_name=license_name,
        license_link=license_link,
        language=_checked("language", language, _LANGUAGE, 'ISO 639 codes such as "en", or "code" or "multilingual"'),
        library_name=subject.library,
        pipeline_tag=subject.pipeline_tag,
        base_model=_check_ids("base_model", base_model) or subject.base_model,
        datasets=_as_list(_check_ids("datasets", datasets)) or None,
        tags=[*MODEL_TAGS, *subject.tags, *_as_list(tags)],
        eval_results=results or None,
        model_name=name.split("/")[-1] if results else None,
    )
    sections = [f"# {name.split('/')[-1]}", description or subject.sentence, subject.usage(name), subject.shape()]
    if bits_per_byte:
        sections.append(_table_of_bits(bits_per_byte))
    sections.append("The architecture is that of [Byte Latent Transformer](https://arxiv.org/abs/2412.09871).")
    text = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def write_model_card(model, path: str | os.PathLike | None = None, *, overwrite: bool = False, **kwargs) -> Path:
    """Writes [`make_model_card`] as the README.md of a folder, beside the files of `save_pretrained`.

    An existing README.md keeps its text. In its metadata, given arguments replace fields, tags are added, and evaluation
    results of the same text are replaced; all other fields stay.

    Args:
        model: as in [`make_model_card`].
        path: folder that gets the README.md, or a file; None: `model`, if that is a folder.
        overwrite: write an existing README.md anew, text and all.
        kwargs: the keyword arguments of [`make_model_card`].
    Returns:
        path of the file, which is replaced whole or not at all.
    Raises:
        ValueError: as [`make_model_card`], or there is no folder to write to.
    """
    if path is None:
        if not isinstance(model, (str, os.PathLike)) or not os.path.isdir(model):
            raise ValueError("`path` is needed: the folder (or file) to write to, as `model` is not a folder.")
        path = model
    path = Path(path)
    file = path / "README.md" if path.is_dir() or path.suffix != ".md" else path
    if not file.parent.is_dir():
        raise ValueError(f"`path` must be a folder that exists, or a file in one; got {str(path)!r}.")
    card = make_model_card(model, **kwargs)
    if file.exists() and not overwrite:
        card = _merge(ModelCard.load(file), card, given={name for name, value in kwargs.items() if value is not None})
    write_whole(file, lambda partial: partial.write_text(str(card), encoding="utf-8"))
    return file


def _merge(old: ModelCard, new: ModelCard, given: set[str]) -> ModelCard:
    """Returns `old` with the metadata of `new`: given arguments replace its fields, the others fill gaps."""
    results = {_key(result): result for result in [*(old.data.eval_results or []), *(new.data.eval_results or [])]}
    for name, value in new.data.__dict__.items():
        if name in ("tags", "eval_results", "model_name"):
            continue
        if value is not None and (name in given or old.data.get(name) is None):
            old.data[name] = value
    tags = [*_as_list(old.data.get("tags")), *new.data.tags]
    old.data.tags = list(dict.fromkeys(tags))
    old.data.eval_results = list(results.values()) or None
    if results:
        old.data.model_name = old.data.get("model_name") or new.data.model_name
    return old


def _key(result: EvalResult) -> tuple:
    return (*result.unique_identifier, result.dataset_name, result.metric_type)


def _as_list(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _checked(name: str, value, pattern: re.Pattern, accepted: str) -> str | list[str] | None:
    for part in _as_list(value):
        if not isinstance(part, str) or not pattern.fullmatch(part):
            raise ValueError(f"`{name}` must be {accepted}; got {part!r}.")
    return None if value is None else value if isinstance(value, str) else list(value)


def _check_ids(name: str, value) -> str | list[str] | None:
    return _checked(name, value, _HUB_ID, 'a Hub id such as "user/name"')


def _checked_license(license: str | None, license_name: str | None) -> str | None:
    _checked("license", license, _LICENSE, 'the Hub\'s id of one, such as "apache-2.0"')
    if license == "other" and not license_name:
        raise ValueError('`license_name` is needed with `license="other"`.')
    return license


def _eval_results(bits_per_byte: Mapping[str, Measurement | float] | None) -> list[EvalResult]:
    results = []
    for name, measured in (bits_per_byte or {}).items():
        value = measured.bits_per_byte if isinstance(measured, Measurement) else measured
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"`bits_per_byte` must have names of texts as keys; got {name!r}.")
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise ValueError(
                f"`bits_per_byte[{name!r}]` must be a Measurement or a finite number, at least 0; got {value!r}."
            )
        common = {
            "task_type": "text-generation",
            "task_name": "Text generation",
            "dataset_type": name if _HUB_ID.fullmatch(name) else _slug(name),
            "dataset_name": name,
        }
        metrics = [("bits_per_byte", "Bits per byte", round(float(value), 4))]
        if isinstance(measured, Measurement) and measured.bytes_per_patch is not None:
            metrics.append(("bytes_per_patch", "Bytes a patch", round(measured.bytes_per_patch, 3)))
        results += [EvalResult(**common, metric_type=t, metric_name=n, metric_value=v) for t, n, v in metrics]
    return results


def _slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name.lower()).strip("-") or "text"


def _table_of_bits(bits_per_byte: Mapping[str, Measurement | float]) -> str:
    rows = ["## Bits per byte", "", "| text | bits per byte | bytes a patch | bytes measured |", "|---|---|---|---|"]
    for name, measured in bits_per_byte.items():
        if isinstance(measured, Measurement):
            patch = "" if measured.bytes_per_patch is None else f"{measured.bytes_per_patch:.2f}"
            rows.append(f"| {name} | {measured.bits_per_byte:.3f} | {patch} | {measured.num_bytes:,} |")
        else:
            rows.append(f"| {name} | {measured:.3f} | | |")
    return "\n".join(rows)


class _Subject:
    """Describes a model for its card: configuration, weights by part, adapter."""

    PIPELINES = {
        "BltForSequenceClassification": "text-classification",
        "BltForTokenClassification": "token-classification",
        "BltModel": "feature-extraction",
    }

    def __init__(self, model):
        import blt_hf  # noqa: F401 (registers the classes)

        self.adapter, self.base_model, folder = None, None, None
        if isinstance(model, (str, os.PathLike)):
            folder, model = model, self._from_folder(model)
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            self._read_adapter(next(iter(model.peft_config.values())))
            model = model.get_base_model()
        self.config = getattr(model, "config", None)
        if getattr(self.config, "model_type", None) not in ("blt", "blt_patcher"):
            raise ValueError(
                f"`model` must be a BLT, an entropy model, or the folder or Hub id of one; got {type(model).__name__}."
            )
        self.model: nn.Module = model
        self.class_name = type(model).__name__.removeprefix("FSDP")
        self.name = self.class_name if folder is None else Path(folder).resolve().name
        self.pipeline_tag = self.PIPELINES.get(self.class_name, "text-generation")
        self.library = "transformers" if self.adapter is None else "peft"
        self.tags = [] if self.adapter is None else [self.adapter_type.lower()]
        self.is_patcher = self.config.model_type == "blt_patcher"

    def _from_folder(self, folder):
        """Builds a model without weights, of the class and shape that the folder's configuration says."""
        import transformers
        from transformers import AutoConfig
        from transformers.utils import find_adapter_config_file

        if find_adapter_config_file(folder) is not None:
            from peft import PeftConfig

            self._read_adapter(PeftConfig.from_pretrained(folder))
            folder = self.adapter.base_model_name_or_path
        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"`model`: {folder} has no configuration of a BLT: {str(error).strip()}") from error
        if config.model_type not in ("blt", "blt_patcher"):
            raise ValueError(f"`model` must be a BLT or an entropy model; {folder} is of type {config.model_type!r}.")
        named = {*(config.architectures or ())}
        auto_names = (auto for name, auto in AUTO_CLASSES.items() if {name, architecture_name(name)} & named)
        with torch.device("meta"):
            return getattr(transformers, next(auto_names, "AutoModelForCausalLM")).from_config(config)

    def _read_adapter(self, config) -> None:
        self.adapter = config
        self.adapter_type = str(getattr(config.peft_type, "value", config.peft_type))
        base = config.base_model_name_or_path
        self.base_model = base if base and _HUB_ID.fullmatch(base) and not os.path.exists(base) else None

    @property
    def sentence(self) -> str:
        size = _millions(sum(weight.numel() for weight in self.model.parameters()))
        if self.adapter is not None:
            base = f" of {self.base_model}" if self.base_model else ""
            return f"An adapter ({self.adapter_type}){base}, a Byte Latent Transformer (BLT)."
        if self.is_patcher:
            return f"A language model of bytes with {size} parameters, whose entropies cut text into a BLT's patches."
        return (
            f"A Byte Latent Transformer (BLT) of {size} parameters: it reads and writes bytes, without a vocabulary of "
            "tokens, and its largest part runs once a patch of bytes."
        )

    def usage(self, name: str) -> str:
        if self.adapter is not None:
            auto_class = AUTO_CLASSES.get(self.class_name, "AutoModelForCausalLM").replace("Auto", "AutoPeft")
            if self.class_name == "BltModel":  # the one that PEFT names otherwise
                auto_class = "AutoPeftModelForFeatureExtraction"
            lines = [f"from peft import {auto_class}", "", f'model = {auto_class}.from_pretrained("{name}")']
        elif self.is_patcher:
            auto_class = "AutoModelForCausalLM"
            lines = [f"from transformers import {auto_class}", "", f'patcher = {auto_class}.from_pretrained("{name}")']
        else:
            argument = '"The "' + (", max_new_tokens=100" if self.pipeline_tag == "text-generation" else "")
            lines = [
                "from transformers import pipeline",
                "",
                f'pipe = pipeline("{self.pipeline_tag}", model="{name}")',
                f"print(pipe({argument}))",
            ]
        code = "\n".join(["import blt_hf", *lines])
        note = "Without `blt_hf`, pass `trust_remote_code=True` where the model is loaded."
        return f"## Use\n\n```python\n{code}\n```\n\n{note}"

    def shape(self) -> str:
        config = self.config
        if self.is_patcher:
            stacks = {"layers": config}
        else:
            stacks = {
                "local encoder": config.encoder_config,
                "global transformer": config.global_config,
                "local decoder": config.decoder_config,
            }
            if config.uses_patcher:
                stacks = {"entropy model": config.patcher_config, **stacks}
        parameters = self._parameters_by_part()
        rows = ["## Shape", "", "| part | layers | width | parameters |", "|---|---|---|---|"]
        for part, stack in stacks.items():
            count = parameters.pop(part, 0) if not self.is_patcher else sum(parameters.values())
            rows.append(f"| {part} | {stack.num_hidden_layers} | {stack.hidden_size} | {_millions(count)} |")
        if not self.is_patcher:
            rows += [f"| {part} | | | {_millions(count)} |" for part, count in parameters.items() if count]
            rows += ["", f"A patch starts {describe_rule(PatchingRule.from_config(self.config))}."]
        return "\n".join(rows)

    def _parameters_by_part(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for name, weight in self.model.named_parameters():
            found = next((label for part, label in _PARTS.items() if part in name.split(".")), "heads and the rest")
            counts[found] = counts.get(found, 0) + weight.numel()
        return counts


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"


__all__ = ["make_model_card", "write_model_card"]
