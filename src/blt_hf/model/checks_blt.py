"""Checks of a forward's input. Each raises a `ValueError` that names the argument, its value and the accepted ones.

Types, shapes and dtypes are always checked. Values are looked at only where that costs nothing: on a CPU, outside of
`torch.compile`, `torch.export` and tracing. On a GPU it would stop the program until the device is done.
"""

import torch
from torch import Tensor

from .configuration_blt import BltConfig, BltPatcherConfig
from .patching_blt import IGNORED_LABEL, PATCHING_MODES, PatchingRule


_ID_DTYPES = (torch.int64, torch.int32)


def has_free_values(tensor: Tensor) -> bool:
    """Tells whether reading a value of `tensor` neither waits for a device nor breaks a graph."""
    # Subclasses are fake tensors (tracing) or hold their values elsewhere (tensor parallelism).
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def check_tensor(name: str, value: object, accepted: str) -> None:
    """Checks that `value` is a tensor; `accepted` describes it."""
    if not isinstance(value, Tensor):
        hint = "; a tokenizer with `return_tensors='pt'` makes one of texts" if name == "input_ids" else ""
        raise ValueError(f"`{name}` must be a tensor, {accepted}; got {type(value).__name__}{hint}.")


def check_byte_inputs(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, byte_embeds: Tensor | None, vocab_size: int,
    hidden_size: int, adds_hashes: bool = False,
) -> tuple[tuple[int, int], torch.device]:  # fmt: skip
    """Checks the bytes of a forward, whose ids may come with embeddings.

    Args:
        input_ids: int64 or int32 `(B, S)`, ids in `[0, vocab_size)`.
        inputs_embeds: floats `(B, S, hidden_size)`, byte embeddings.
        byte_embeds: floats `(B, S, hidden_size)`, sums of byte and hash embeddings.
        adds_hashes: hashes of ids are added to byte embeddings.
    Returns:
        the shape `(B, S)` and the device of the input.
    Raises:
        ValueError: type, shape, dtype or (on a CPU) an id is not as above; there is nothing, there are two embeddings, or
            no ids for hashes.
    """
    if input_ids is None and inputs_embeds is None and byte_embeds is None:
        raise ValueError("`input_ids` (or `inputs_embeds`, or `byte_embeds`) is needed; got none of them.")
    if inputs_embeds is not None and byte_embeds is not None:
        raise ValueError("`inputs_embeds` and `byte_embeds` cannot be given together; got both.")
    shape = device = None
    for name, embeds in (("inputs_embeds", inputs_embeds), ("byte_embeds", byte_embeds)):
        if embeds is not None:
            shape, device = _check_embeds(name, embeds, hidden_size)
            got = tuple(getattr(input_ids, "shape", ()))
            if input_ids is not None and got != shape:
                raise ValueError(f"`{name}` and `input_ids` must hold the same bytes; got {shape} and {got}.")
    if input_ids is not None:
        check_tensor("input_ids", input_ids, "int64 (rows, bytes)")
        if input_ids.dtype not in _ID_DTYPES:
            raise ValueError(f"`input_ids` must hold int64 or int32; got {input_ids.dtype}.")
        shape = _check_shape("input_ids", input_ids, 2, "two-dimensional (rows, bytes)")
        if input_ids.is_meta:
            raise ValueError(
                "`input_ids` on the device `meta` have no values, and patches are found from values; got meta."
            )
        _check_range("input_ids", input_ids, vocab_size, "the vocabulary has")
        return shape, input_ids.device
    if inputs_embeds is not None and adds_hashes:
        raise ValueError(
            "`inputs_embeds` are byte embeddings, and this model adds embeddings of hashed `input_ids` to them; got no "
            "`input_ids`. Pass both, or the sum that `embed_bytes(input_ids)` gives as `byte_embeds`."
        )
    return shape, device


def _check_embeds(name: str, embeds: Tensor, hidden_size: int) -> tuple[tuple[int, int], torch.device]:
    check_tensor(name, embeds, f"floats (rows, bytes, {hidden_size})")
    if not embeds.is_floating_point():
        raise ValueError(f"`{name}` must hold floats; got {embeds.dtype}.")
    shape = _check_shape(name, embeds, 3, f"of shape (rows, bytes, {hidden_size})")
    if shape[2] != hidden_size:
        raise ValueError(f"`{name}` must be {hidden_size} wide; got shape {shape}.")
    return shape[:2], embeds.device


def _check_shape(name: str, given: Tensor, num_dims: int, dims: str) -> tuple[int, ...]:
    shape = tuple(given.shape)
    if len(shape) != num_dims:
        raise ValueError(f"`{name}` must be {dims}; got shape {shape}.")
    if shape[0] == 0:
        raise ValueError(f"`{name}` has no rows; at least one is needed, got shape {shape}.")
    if shape[1] == 0:
        raise ValueError(f"`{name}` has no columns; at least one byte a row is needed (a BOS for empty text).")
    return shape


def _check_range(name: str, ids: Tensor, size: int, owner: str, ignored: int | None = None) -> None:
    if not has_free_values(ids) or ids.numel() == 0:
        return
    if ignored is not None:
        ids = ids.masked_fill(ids == ignored, 0)
    smallest, largest = (int(value) for value in torch.aminmax(ids))
    if smallest < 0 or largest >= size:
        wrong = smallest if smallest < 0 else largest
        also = "" if ignored is None else f" (and {ignored}, which is not counted)"
        raise ValueError(f"`{name}` holds {wrong}; {owner} ids from 0 to {size - 1}{also}.")


def check_attention_mask(attention_mask: Tensor, rows: int, columns: int, past: int) -> Tensor:
    """Checks a mask, which may begin with the `past` columns of the cache; returns those of the new bytes, `(B, S)`."""
    check_tensor("attention_mask", attention_mask, "1 for text and 0 for padding")
    accepted = (columns, past + columns) if past else (columns,)
    if attention_mask.dim() != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] not in accepted:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}; a two-dimensional mask with {rows} rows and "
            f"{' or '.join(map(str, accepted))} columns is accepted (1 for text, 0 for padding)."
        )
    return attention_mask[:, -columns:] if past else attention_mask


def check_position_ids(position_ids: Tensor, rows: int, columns: int) -> Tensor:
    """Checks all but the values; returns `position_ids` for all rows, `(B, S)`."""
    check_tensor("position_ids", position_ids, "int64 (rows or 1, bytes)")  # formatting a symbolic size would fix it
    # Rows are compared one by one, because torch.compile finds no symbol in a tuple.
    fits = position_ids.dim() == 2 and position_ids.shape[1] == columns
    if not fits or (position_ids.shape[0] != rows and position_ids.shape[0] != 1):
        raise ValueError(
            f"`position_ids` has shape {tuple(position_ids.shape)}; accepted is ({rows} or 1, {columns}): one "
            "position for each column of this call."
        )
    if position_ids.dtype not in _ID_DTYPES:
        raise ValueError(f"`position_ids` must hold int64 or int32; got {position_ids.dtype}.")
    return position_ids.expand(rows, -1)


def check_patch_lengths(patch_lengths: Tensor, num_bytes: Tensor, is_symbolic: bool) -> None:
    """Checks the patches of whole texts.

    Args:
        patch_lengths: int `(B, P)`, zeros on the right.
        num_bytes: int64 `(B,)`, bytes of each text.
        is_symbolic: values are unknown.
    """
    rows, is_whole = num_bytes.shape[0], not patch_lengths.dtype.is_floating_point
    if patch_lengths.dim() != 2 or patch_lengths.shape[0] != rows or patch_lengths.shape[1] == 0 or not is_whole:
        raise ValueError(
            f"`patch_lengths` has shape {tuple(patch_lengths.shape)} and dtype {patch_lengths.dtype}; for each of the "
            f"{rows} rows of the input, at least one whole number is accepted."
        )
    if is_symbolic:
        return
    excess = patch_lengths.sum(dim=1) - num_bytes
    wrong = ((excess != 0) & (excess != 1)) | (patch_lengths < 0).any(dim=1) | (patch_lengths[:, 0] > 1)
    wrong = wrong | ((patch_lengths[:, 1:] > 0) & (patch_lengths[:, :-1] == 0)).any(dim=1)
    wrong = wrong & (num_bytes > 0)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"row {row} of `patch_lengths` is {patch_lengths[row].tolist()}, for {int(num_bytes[row])} bytes: "
            "lengths must not be negative, begin with a patch of 1 byte, have zeros on the right alone, and sum to "
            "the bytes of the text, or to one more (the next byte)."
        )


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Checks the classes of positions, int64 `(B, S)`, in `[0, C)` or -100, for logits `(B, S, C)`."""
    shape, num_classes = tuple(logits.shape[:-1]), logits.shape[-1]
    check_tensor("labels", labels, f"int64 {shape}")
    if tuple(labels.shape) != shape:
        raise ValueError(
            f"`labels` has shape {tuple(labels.shape)}; one label for each position that gets logits is accepted: {shape}."
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"`labels` must hold int64; got {labels.dtype}.")
    _check_range("labels", labels, num_classes, "accepted are", IGNORED_LABEL)


def check_row_labels(labels: Tensor, logits: Tensor, problem_type: str | None) -> None:
    """Checks the labels of rows with logits `(B, C)`.

    Args:
        labels: int64 `(B,)` (classes), or floats `(B,)` or `(B, C)` (regression, several labels).
        problem_type: of the configuration; None: as transformers guesses it.
    """
    rows, num_classes = logits.shape
    check_tensor("labels", labels, "one row of labels for each row of the input")
    if problem_type is None:
        by_dtype = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        problem_type = "regression" if num_classes == 1 else by_dtype
    is_classes = problem_type == "single_label_classification"
    accepted = {(rows,), (rows, 1)} if is_classes or num_classes == 1 else {(rows, num_classes)}
    dtype_fits = labels.dtype == torch.int64 if is_classes else labels.is_floating_point()
    if tuple(labels.shape) not in accepted or not dtype_fits:
        raise ValueError(
            f"`labels` has shape {tuple(labels.shape)} and dtype {labels.dtype}; for `problem_type={problem_type!r}` "
            f"with {num_classes} labels, {'int64' if is_classes else 'floats'} of shape "
            f"{' or '.join(map(str, sorted(accepted)))} are accepted."
        )
    if is_classes:
        _check_range("labels", labels, num_classes, "accepted are", IGNORED_LABEL)


def history_sizes(config: BltConfig | BltPatcherConfig) -> tuple[int, int]:
    """Counts the ids and the entropies before a byte that hashes, patching rule and lexicon may read."""
    if config.model_type == "blt_patcher":
        return 0, 1
    rule = PatchingRule(config.patching_mode)  # a registered one may look further back than the hashes
    longest = max(*config.encoder_hash_byte_group_size, rule.window, 1 + config.decoder_config.lexicon_history)
    is_registered = rule.mode not in PATCHING_MODES
    return longest - 1, max(rule.window - 1, 1) if is_registered and rule.uses_entropies else 1


def cache_shapes(config: BltConfig | BltPatcherConfig) -> dict[str, object]:
    """Lists for each part the settings that a cache depends on: shapes of keys and values, windows, the entropy model."""
    fields = ("num_hidden_layers", "num_key_value_heads", "head_dim")
    cross = ("hidden_size", "cross_attention_heads", "cross_attn_k", "cross_attn_all_layers", "cross_attn_window")
    lexicon = ("lexicon_size", "lexicon_top_k", "lexicon_length", "lexicon_reads")
    if config.model_type == "blt_patcher":
        shapes = tuple(getattr(config, name) for name in (*fields, "sliding_window"))
        return {"model type": "blt_patcher", "`patcher_config`": shapes}
    return {
        "model type": "blt",
        "`patcher_config`": cache_shapes(config.patcher_config)["`patcher_config`"] if config.has_patcher else None,
        "`encoder_config`": tuple(getattr(config.encoder_config, name) for name in (*fields, *cross)),
        "`decoder_config`": tuple(getattr(config.decoder_config, name) for name in (*fields, *cross, *lexicon)),
        "`global_config`": tuple(getattr(config.global_config, name) for name in fields),
        "`local_attention_window_len`": config.local_attention_window_len,
        "`encoder_hash_byte_group_size` and what `patching_mode` reads": history_sizes(config),
    }


def check_cache(made_for: dict[str, object], config: BltConfig | BltPatcherConfig) -> None:
    """Checks that a cache made for one configuration (its `cache_shapes`) serves a model with another."""
    shapes = cache_shapes(config)
    if shapes != made_for:
        wrong = [name for name in shapes | made_for if shapes.get(name) != made_for.get(name)]
        raise ValueError(
            f"`past_key_values` was made by another model: {', '.join(wrong)} differ. Pass the cache that this model "
            "returned, or None."
        )
