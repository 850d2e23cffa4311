"""Imports libraries in a given order in a new process, then loads a BLT in every way that clients have.

Run by test_imports.py: `python import_orders.py FOLDERS.json ORDER`, where an order is `blt_hf,transformers,trl,peft`.
An order without `blt_hf` is one of code from the Hub: the package cannot be imported, and `trust_remote_code=True` is
passed. Prints one JSON line: `{"order": ..., "error": ... or null, "loaded": {...}}`.
"""

import contextlib
import importlib
import json
import os
import sys
import traceback


class Absent:
    """Makes `import blt_hf` fail, as where it is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "blt_hf":
            raise ImportError("blt_hf is not installed here")


def describe(model) -> str:
    return f"{type(model).__module__}.{type(model).__name__}"


def ways(transformers_objects, folder: str, trust: bool) -> dict:
    """What each way to a model gives, by name."""
    import peft
    import transformers
    import trl
    from transformers.cli.serving.model_manager import ModelManager
    from trl.trainer.utils import create_model_from_path

    loaded = {}
    arguments = {"trust_remote_code": True} if trust else {}
    for name in ("AutoModelForCausalLM", "AutoModel"):
        loaded[name] = describe(getattr(transformers, name).from_pretrained(folder, **arguments))
    config = transformers.AutoConfig.from_pretrained(folder, **arguments)
    for index, module in enumerate(transformers_objects):
        model = getattr(module, config.architectures[0]).from_pretrained(folder, **arguments)
        loaded[f"getattr(transformers, architectures[0]) {index}"] = describe(model)
    loaded["pipeline"] = describe(transformers.pipeline("text-generation", folder, **arguments).model)
    loaded["serve"] = describe(ModelManager(device="cpu", trust_remote_code=trust)._load_model(f"{folder}@main"))
    loaded["trl.create_model_from_path"] = describe(create_model_from_path(folder, device_map=None, **arguments))
    from datasets import Dataset

    trainer = trl.SFTTrainer(
        folder,
        trl.SFTConfig(
            f"{folder}-sft",
            model_init_kwargs=arguments or None,
            use_cpu=True,
            bf16=False,
            report_to=[],
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"text": "a few bytes"}]),
        # Without the package PEFT meets the entropy model; see `check_patcher` in names_blt.py.
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", exclude_modules=r".*patcher.*" if trust else None),
    )
    adapted = trainer.model
    loaded["SFTTrainer"] = describe(adapted.get_base_model())
    names = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert names, "nothing is trained"
    assert not any("patcher" in name for name in names), names
    assert not any("patcher" in name and "lora" in name for name, _ in adapted.named_modules())
    return loaded


def check_order(order: list[str], folders: dict) -> dict:
    """Imports, then loads; every check that needs no comparison is made here."""
    remote = "blt_hf" not in order
    if remote:
        sys.meta_path.insert(0, Absent())
    objects = []
    for name in order:
        importlib.import_module(name)
        # What a script that imported transformers at this moment holds.
        current = sys.modules.get("transformers")
        if current is not None and all(current is not other for other in objects):
            globals()[f"transformers_{len(objects)}"] = current  # its code looks for them where scripts keep them
            objects.append(current)
    import transformers
    from transformers.models.blt import modeling_blt as in_tree

    loaded = {
        kind: ways(objects, folder, remote) for kind, folder in folders.items() if not (remote and kind == "plain")
    }
    for module in [*objects, transformers]:
        if remote:
            assert module.BltForCausalLM is in_tree.BltForCausalLM, "code from the Hub changed an in-tree name"
            continue
        import blt_hf

        for name in (*in_tree.__all__, *transformers.models.blt.configuration_blt.__all__):
            assert getattr(module, name).__module__.startswith("blt_hf."), name
        assert isinstance(blt_hf.BltForCausalLM.from_pretrained(folders["code"]), module.BltForCausalLM)
        assert issubclass(type("Subclass", (module.BltForCausalLM,), {}), blt_hf.BltForCausalLM)
    return loaded


def main() -> None:
    with open(sys.argv[1]) as file:
        folders = json.load(file)
    order = sys.argv[2]
    result = {"order": order, "error": None, "loaded": {}}
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            result["loaded"] = check_order(order.split(","), folders)
    except Exception:
        result["error"] = traceback.format_exc()[-4000:]
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
