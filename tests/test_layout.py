"""Where tests stand: a test file is named as the module that it holds, and what several need is in `helpers`."""

import ast
from pathlib import Path

import pytest

from helpers.transformers_suites import leave_out


TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src"
PACKAGES = {path.name for path in (SOURCE / "blt_hf").iterdir() if path.is_dir()}
FOLDERS = PACKAGES | {"smollm2"}  # an example, from its questions to the folder that comes out

# What test files in the folders of packages hold beside, or instead of, the module whose name they have.
HOLDS = {
    "conversion/test_checkpoints.py": ["conversion/files", "cli/convert"],
    "evaluation/test_measuring.py": ["evaluation/bits_per_byte", "evaluation/trainer"],
    "evaluation/test_patches.py": ["patches/pictures"],
    "integrations/test_imports.py": ["integrations/auto", "model/names_blt"],
    "integrations/test_tables_of_names.py": ["integrations/names"],
    "model/test_bad_input.py": ["unknown_fields"],
    "model/test_cache_blt.py": ["cache_memory"],
    "model/test_continuous_blt.py": ["serving/continuous"],
    "model/test_custom_rules.py": ["rules"],
    "model/test_diffusion_blt.py": ["fast_blt/masked"],
    "model/test_exactness.py": ["model/chunk_blt", "model/forward_blt", "model/stacks_blt"],
    "model/test_cuda_graphs.py": ["cuda_graphs"],
    "model/test_patches_blt.py": ["patches/data", "patches/display"],
    "model/test_patching_blt.py": ["patches/lengths"],
    "model/test_products.py": ["products"],
    "model/test_speculation.py": ["speculation"],
    "model/test_unmasking_blt.py": ["fast_blt/blocks"],
    "serving/test_ragged.py": ["serving/row_layers"],
    "smollm2/test_assemble.py": ["conversion/smollm2", "cli/get"],
    "test_cli.py": ["cli/calibrate", "cli/common", "cli/evaluate", "cli/flops", "cli/patches"],
    "test_cli_models.py": ["cli/card", "cli/generate", "cli/info", "cli/train"],
    "tokenizer/test_tokenization.py": ["integrations/tokenizer_files"],
    "training/test_distillation.py": [
        "cli/byteify",
        "training/learned",
        "training/teacher_data",
        "training/teacher_texts",
        "training/token_models",
    ],
}
# Files about a subject that crosses modules.
SUBJECTS = {
    "integrations/test_hub.py",
    "integrations/test_peft_pipeline.py",
    "integrations/test_relied_on.py",
    "integrations/test_remote_code.py",
    "integrations/test_row_adapters.py",
    "integrations/test_saved_folders.py",
    "integrations/test_still_needed.py",
    "integrations/test_trl.py",
    "model/test_awkward_inputs.py",
    "model/test_cache_name_blt.py",
    "model/test_decoding.py",
    "model/test_embeddings.py",
    "model/test_export.py",
    "model/test_generation_in_training.py",
    "model/test_lexicon.py",
    "model/test_long_text.py",
    "model/test_patcher.py",
    "model/test_precision.py",
    "model/test_stateful_processors.py",
    "model/test_training_mode.py",
    "serving/test_benchmark_serve.py",
    "smollm2/test_chat.py",
    "smollm2/test_measure.py",
    "smollm2/test_questions.py",
    "smollm2/test_recipe.py",
    "training/test_distributed.py",
    "training/test_group_by_patches.py",
    "training/test_quantized_training.py",
    "training/test_training.py",
}


def modules() -> set[str]:
    """`folder/name` of each module of the package, and of the commands as `cli/name`."""
    files = [path.relative_to(SOURCE / "blt_hf") for path in (SOURCE / "blt_hf").rglob("*.py")]
    files += [Path("cli") / path.name for path in (SOURCE / "blt_hf_cli").glob("*.py")]
    found = {path for path in files if not path.name.startswith("__")}
    return {str(path.parent if path.parent.name == path.stem else path.with_suffix("")) for path in found}


def test_files_are_named_as_the_modules_that_they_hold():
    files = {path.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    files = {path for path in files if path.parts[0] in FOLDERS or path.stem.startswith("test_cli")}
    name_of = {str(path): str(path.with_name(path.stem.removeprefix("test_"))) for path in files}
    named = set(name_of.values()) & modules()
    held = [module for modules_of_file in HOLDS.values() for module in modules_of_file]
    problems = {
        "the tables name files that are gone": ({*HOLDS} | SUBJECTS) - set(name_of),
        "the tables name modules that are gone": set(held) - modules(),
        "no module has the name of these files, and the tables do not name them": {
            file for file, name in name_of.items() if name not in modules() and file not in {*HOLDS} | SUBJECTS
        },
        "no test file holds these modules": modules() - named - set(held),
        "these modules have a test file of their name": set(held) & named,
    }
    assert not {problem: found for problem, found in problems.items() if found}


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def test_no_test_file_imports_another():
    names = {path.stem for path in TESTS.rglob("*.py") if "helpers" not in path.relative_to(TESTS).parts}
    wrong = {path.name: imported_modules(path) & names for path in TESTS.rglob("*.py")}
    assert not {name: modules for name, modules in wrong.items() if modules}


def test_suites_that_cannot_be_fetched_fail_in_ci(monkeypatch):
    """What others wrote is the strongest of the tests; where it is missing, somebody has to see it."""
    monkeypatch.setenv("CI", "true")
    with pytest.raises(RuntimeError, match="pip found nothing"):
        leave_out("pip found nothing")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="pip found nothing"):
        leave_out("pip found nothing")
