"""Tokenizer files that `BltTokenizer` did not write, such as those of transformers' converter for BLT.

Nothing of transformers is changed. [`BltTokenizer`] asks these functions when it loads a folder:

- The files ask for EOS after every text, and a prompt that ends with EOS is a finished document. So `add_eos_token` counts
  only if the caller passes it.
- They name a `pad_token` and an `unk_token` beyond the 260 rows of the embedding. These are dropped ([`drop_tokens`]).
- Some have no name for an id below 4 ([`name_special_ids`]), or say in the template of `tokenizer.json` alone which tokens
  stand around a text ([`flags_of_template`]).

The tests are those of legacy files in tests/tokenizer/test_tokenization.py.
"""

from collections.abc import Iterable

from ..model.patching_blt import BYTE_OFFSET, VOCAB_SIZE


def is_foreign(config: dict) -> bool:
    """Tells whether another class wrote a `tokenizer_config.json` of this content: only ours writes `errors`."""
    return "errors" not in config


def flags_of_template(spec: dict) -> dict[str, bool]:
    """Returns `add_bos_token` and `add_eos_token` as the template of a `tokenizer.json` has them; `{}` without one."""
    template = (spec.get("post_processor") or {}).get("single")
    if template is None:
        return {}
    is_text = ["Sequence" in piece for piece in template]
    return {"add_bos_token": not is_text[0], "add_eos_token": not is_text[-1]}


def name_special_ids(spec: dict, names: dict[int, str]) -> dict[int, str]:
    """Returns the names of ids 0 to 3; those that the vocabulary of `spec` lacks are taken from `names`, and added."""
    vocab = spec["model"]["vocab"]
    names = names | {index: name for name, index in vocab.items() if index < BYTE_OFFSET}
    vocab.update({name: index for index, name in names.items()})
    return names


def drop_tokens(spec: dict | None, names: dict[int, str], droppable: Iterable[str], arguments: dict) -> dict:
    """Returns `arguments` without the droppable tokens that have no row of the 260; they leave `spec` too.

    A dropped `pad_token` becomes id 0, since padding is told by the mask. Nothing is dropped if other tokens follow:
    their ids have rows in an embedding that was resized for them.

    Args:
        spec: content of `tokenizer.json`, changed in place; None: there is no such file.
        names: names of ids 0 to 3.
        droppable: names of arguments.
        arguments: those that `from_pretrained` passes to the tokenizer.
    """
    tokens = {key: str(arguments[key]) for key in droppable if arguments.get(key)}
    tokens = {key: name for key, name in tokens.items() if name not in names.values()}
    dropped, added = {*tokens.values()}, [] if spec is None else spec["added_tokens"]
    if not {token["content"] for token in added if token["id"] >= VOCAB_SIZE} <= dropped:
        return arguments
    added[:] = [token for token in added if token["content"] not in dropped]
    decoder = arguments.get("added_tokens_decoder") or {}
    kept = {index: token for index, token in decoder.items() if str(token) not in dropped}
    replaced = {key: names[0] if key == "pad_token" else None for key in tokens}
    return arguments | replaced | {"added_tokens_decoder": kept}


__all__ = ["drop_tokens", "flags_of_template", "is_foreign", "name_special_ids"]
