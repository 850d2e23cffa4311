"""What a token model says of texts, kept on disk: its states at the ends of patches, and the next byte after each byte.

Each piece of text runs through the token model once. What the stages of `distillation` learn from is written in shards,
so that the work can be interrupted and taken up again, and read many times.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

from ..model.patching_blt import BOS_TOKEN_ID, IGNORED_LABEL, PatchingRule, find_patch_ends
from .data import check_texts, pad_rows
from .token_models import AlignedRow, TokenAlphabet, TokenHead, align, base_of, cut_texts


KEPT_TARGETS = 8  # ids of the next byte that are kept at each position; the rest has next to no probability
KEPT_TOKENS = 64
_LONGEST_TOKEN = 24  # ids of a token that are compared; what is behind them is taken as it stands in the text


def next_byte_targets(
    probabilities: Tensor, tokens: Tensor, next_tokens: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    """Turns probabilities of the next token into probabilities of the next id, at each id of the token that came.

    After the first `k` ids of the token that came, the tokens that begin with these and go on share the probability.
    (That this token did not end there is known to whoever knows how the text was split.)

    Args:
        probabilities: `(T, C)`, of the candidates at each position.
        tokens: int64 `(T, C)`, the candidates.
        next_tokens: int64 `(T,)`, the token that came.
        table: int16 `(V, L)`, ids of each token, padded with -1.
    Returns:
        ids int16 `(N, 8)` and probabilities `(N, 8)`, which sum to 1, for the `N` ids of all tokens that came, in their
        order.
    """
    came = table[next_tokens]  # (T, L)
    lengths = (came >= 0).sum(dim=1)
    starts = lengths.cumsum(0) - lengths
    vocabulary = int(table.max()) + 1
    ids = torch.zeros(int(lengths.sum()), KEPT_TARGETS, dtype=torch.int16)
    kept = torch.zeros(ids.shape[0], KEPT_TARGETS)
    rows = torch.arange(tokens.shape[0])
    # The candidate that came counts, even where it is not among the most probable.
    tokens = torch.cat([tokens, next_tokens[:, None]], dim=1)
    weights = torch.cat([probabilities, torch.zeros_like(probabilities[:, :1])], dim=1)
    is_missing = ~(tokens[:, :-1] == next_tokens[:, None]).any(dim=1)
    weights[:, -1] = is_missing * probabilities.min(dim=1).values.clamp_min(1e-6)
    for index in range(table.shape[1]):
        alive = lengths[rows] > index
        if not bool(alive.any()):
            break
        rows, tokens, weights = rows[alive], tokens[alive], weights[alive]
        candidate = table[tokens, index].long()  # (R, C + 1)
        weights = weights * (candidate >= 0)
        sums = weights.new_zeros(rows.shape[0], vocabulary).scatter_add_(1, candidate.clamp_min(0), weights)
        sums, best = (sums / sums.sum(dim=1, keepdim=True)).topk(min(KEPT_TARGETS, vocabulary), dim=1)
        position = starts[rows] + index
        ids[position, : best.shape[1]] = best.to(torch.int16)
        kept[position, : best.shape[1]] = (sums / sums.sum(dim=1, keepdim=True)).to(kept.dtype)
        weights = weights * (candidate == came[rows, index].long()[:, None])
    return ids, kept


def token_of_patches(ends: Tensor, token_ends: Tensor) -> Tensor:
    """Finds the last token that has ended where each patch ends, an index int64 `(P,)`.

    Args:
        ends: bool `(N,)`, whether each id ends its patch.
        token_ends: int64 `(T,)`, position of the last id of each token.
    """
    return torch.searchsorted(token_ends, ends.nonzero().flatten(), right=True) - 1


def tokens_of_patches(last: Tensor, tokens: Tensor) -> Tensor:
    """Finds the first token that ends in each patch (-1: none does), and how many do; int32 `(P, 2)`.

    Args:
        last: int64 `(P,)` as [`token_of_patches`] gives it.
        tokens: int64 `(T,)`, of the row.
    """
    before = torch.cat([last.new_full((1,), -1), last[:-1]])
    counts = last - before
    first = torch.where(counts > 0, tokens[(before + 1).clamp_max(tokens.shape[0] - 1)], -1)
    return torch.stack([first, counts], dim=1).to(torch.int32)


class TeacherWriter:
    """Runs a token model over texts and writes shards to a folder.

    Args:
        token_model: a causal token model of type llama or mistral.
        tokenizer: its tokenizer.
        alphabet: what its tokens are in the ids of the BLT.
        rule: where patches end; one that reads no entropies.
        folder: of the shards.
        early_layer: also keep the states behind so many layers; None: only those behind the last.
        row_bytes: length of a row, in bytes.
        batch_size: rows that run at once, in the dtype of the token model.
        shard_rows: rows of a shard.
    Raises:
        ValueError: the rule reads entropies, or the layer does not exist.
    """

    def __init__(
        self,
        token_model: nn.Module,
        tokenizer,
        alphabet: TokenAlphabet,
        rule: PatchingRule,
        folder: str | os.PathLike,
        early_layer: int | None = None,
        row_bytes: int = 1024,
        batch_size: int = 4,
        shard_rows: int = 128,
    ):
        layers = len(base_of(token_model).layers)
        if rule.uses_entropies:
            raise ValueError(f"`rule` must not read entropies; got {rule.mode!r}.")
        if early_layer is not None and not 0 < early_layer < layers:
            raise ValueError(f"`early_layer` must be None or from 1 to {layers - 1}; got {early_layer}.")
        self.token_model, self.tokenizer, self.alphabet, self.rule = token_model, tokenizer, alphabet, rule
        self.folder, self.early_layer = Path(folder), early_layer
        self.row_bytes, self.batch_size, self.shard_rows = row_bytes, batch_size, shard_rows
        self.token_head = TokenHead(token_model)
        self.table = alphabet.table(min(_LONGEST_TOKEN, max(map(len, alphabet.ids))))

    def estimate(self, num_bytes: int) -> dict[str, float]:
        """Counts bytes on disk and operations for `num_bytes` bytes of text, with patches of 5 bytes and tokens of 4."""
        config = self.token_model.config
        states = config.hidden_size * 2 * (1 if self.early_layer is None else 2) / 5
        weights = sum(parameter.numel() for parameter in self.token_model.parameters())
        return {"disk": num_bytes * (states + 4 * KEPT_TARGETS + 2), "operations": num_bytes / 4 * 2 * weights}

    def write(self, texts: Iterable[str | bytes]) -> Iterator[dict]:
        """Writes shards, and yields what each holds; shards that are there already are only counted.

        The texts must come in the same order each time.
        """
        check_texts(texts)
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = iter(cut_texts(texts, self.row_bytes - 2))
        for number in range(10**6):
            pieces = list(islice(rows, self.shard_rows))
            if not pieces:
                return
            path = self.folder / f"shard-{number:05d}.safetensors"
            done = path.with_suffix(".json")
            if not done.exists():
                tensors = self._run([self._align(*piece) for piece in pieces])
                facts = {
                    "rows": len(pieces),
                    "bytes": tensors["input_ids"].shape[0] - len(pieces),
                    "patches": tensors["states"].shape[0],
                    "nats": round(float(tensors.pop("nats").sum()), 1),
                }
                save_file(tensors, path)
                done.write_text(json.dumps(facts))
            yield json.loads(done.read_text())

    def _align(self, text: str, is_whole: bool) -> AlignedRow:
        return align(self.alphabet, self.tokenizer, text, is_whole)

    def _run(self, rows: list[AlignedRow]) -> dict[str, Tensor]:
        """Reads all tensors of a shard."""
        parts: list[dict[str, Tensor]] = []
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].tokens))
        for start in range(0, len(order), self.batch_size):
            parts += self._run_batch([rows[index] for index in order[start : start + self.batch_size]])
        parts = [parts[order.index(index)] for index in range(len(rows))]
        shard = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        shard["row_ids"] = torch.tensor([part["input_ids"].shape[0] for part in parts])
        shard["row_patches"] = torch.tensor([part["states"].shape[0] for part in parts])
        return shard

    @torch.no_grad()
    def _run_batch(self, rows: list[AlignedRow]) -> list[dict[str, Tensor]]:
        tokens = pad_rows([row.tokens for row in rows], self.alphabet.end_token)
        device = self.token_model.device
        states, early = teacher_states(self.token_model, tokens.to(device), self.early_layer)
        results = []
        for index, row in enumerate(rows):
            length = len(row.tokens)
            log_probs = torch.log_softmax(self.token_head(states[index, : length - 1]), dim=-1)
            next_tokens = tokens[index, 1:length]
            top, candidates = (part.cpu() for part in log_probs.topk(min(KEPT_TOKENS, log_probs.shape[1]), dim=-1))
            target_ids, target_probs = next_byte_targets(top.exp(), candidates, next_tokens, self.table)
            ids = torch.tensor(row.input_ids)
            target_ids, target_probs = self._fit(target_ids, target_probs, row)
            ends = find_patch_ends(self.rule, ids[None], None, torch.arange(len(ids))[None])[0]
            of_patch = token_of_patches(ends, torch.tensor(row.ends))
            result = {
                "input_ids": ids.to(torch.int16),
                "target_ids": target_ids,
                "target_probs": target_probs.to(torch.float16),
                "patch_tokens": tokens_of_patches(of_patch, tokens[index]),
                "states": states[index, of_patch.to(device)].to("cpu", torch.bfloat16),
                "nats": -log_probs.gather(1, next_tokens[:, None].to(device)).sum()[None].cpu(),
            }
            if early is not None:
                result["early_states"] = early[index, of_patch.to(device)].to("cpu", torch.bfloat16)
            results.append(result)
        return results

    def _fit(self, ids: Tensor, probs: Tensor, row: AlignedRow) -> tuple[Tensor, Tensor]:
        """Returns targets `(N, 8)` of the ids after each of the `N` ids of a row; the last has none (probabilities 0)."""
        lengths = [len(self.alphabet.ids[token]) for token in row.tokens[1:]]
        missing = torch.zeros(1, KEPT_TARGETS)
        if max(lengths, default=0) <= self.table.shape[1]:
            return torch.cat([ids, missing.to(ids.dtype)]), torch.cat([probs, missing])
        full = torch.zeros(len(row.input_ids), KEPT_TARGETS, dtype=ids.dtype)
        full_probs = torch.zeros(len(row.input_ids), KEPT_TARGETS)
        full[:-1, 0] = torch.tensor(row.input_ids[1:], dtype=ids.dtype)  # what lies behind the ids compared
        full_probs[:-1, 0] = 1.0
        start = position = 0
        for length in lengths:
            known = min(length, self.table.shape[1])
            full[position : position + known] = ids[start : start + known]
            full_probs[position : position + known] = probs[start : start + known]
            start, position = start + known, position + length
        return full, full_probs


@torch.no_grad()
def teacher_states(
    token_model: nn.Module, tokens: Tensor, early_layer: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Computes states `(B, T, W)` behind the last layer, before the norm, and those behind `early_layer` layers.

    `tokens`: int64 `(B, T)`, padded on the right.
    """
    base, found = base_of(token_model), {}

    def keep(name):
        def hook(module, inputs, output):
            found[name] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [base.layers[-1].register_forward_hook(keep("last"))]
    if early_layer is not None:
        handles.append(base.layers[early_layer - 1].register_forward_hook(keep("early")))
    try:
        base(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found["last"], found.get("early")


class TextRows(Dataset):
    """Rows for the encoder's stage from texts alone; nothing runs and nothing is kept on disk.

    Args:
        texts, tokenizer, alphabet, rule, row_bytes: as in [`TeacherWriter`].
        change: makes another text of the text of a row, each time that it is read; None: rows stay as they are.
    """

    def __init__(
        self,
        texts: Iterable[str | bytes],
        tokenizer,
        alphabet: TokenAlphabet,
        rule: PatchingRule,
        row_bytes: int = 1024,
        change: Callable[[str], str] | None = None,
    ):
        check_texts(texts)
        self.tokenizer, self.alphabet, self.rule, self.change = tokenizer, alphabet, rule, change
        self._pieces = list(cut_texts(texts, row_bytes - 2))
        if not self._pieces:
            raise ValueError("`texts` holds no text.")

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows."""
        return sum(len(text.encode()) for text, _ in self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        text, is_whole = self._pieces[index]
        row = align(self.alphabet, self.tokenizer, self.change(text) if self.change else text, is_whole)
        ids, tokens = torch.tensor(row.input_ids), torch.tensor(row.tokens)
        ends = find_patch_ends(self.rule, ids[None], None, torch.arange(len(ids))[None])[0]
        last = token_of_patches(ends, torch.tensor(row.ends))
        return {
            "input_ids": ids,
            "patch_tokens": tokens_of_patches(last, tokens),
            "patch_last": last,
            "tokens": tokens,
        }


class TeacherData(Dataset):
    """The rows of the shards of some folders: ids, patch states and targets of each.

    Args:
        folders: written by [`TeacherWriter`].
    """

    def __init__(self, folders: Iterable[str | os.PathLike]):
        self._shards: list[dict[str, Tensor]] = []
        self._rows: list[tuple[int, int, int, int, int]] = []
        for folder in folders:
            for path in sorted(Path(folder).glob("shard-*.json")):
                self._add(load_file(path.with_suffix(".safetensors")))
        if not self._rows:
            raise ValueError(f"there are no shards in {', '.join(map(str, folders))}.")

    def _add(self, shard: dict[str, Tensor]) -> None:
        number, first_id, first_patch = len(self._shards), 0, 0
        for num_ids, num_patches in zip(shard["row_ids"].tolist(), shard["row_patches"].tolist()):
            self._rows.append((number, first_id, num_ids, first_patch, num_patches))
            first_id, first_patch = first_id + num_ids, first_patch + num_patches
        self._shards.append(shard)

    @property
    def num_bytes(self) -> int:
        """Ids of all rows."""
        return sum(row[2] for row in self._rows)

    def some_states(self, num_rows: int = 32) -> Tensor:
        """Returns states `(N, W)` of the first rows, fp32."""
        return torch.cat([self[index]["states"].float() for index in range(min(num_rows, len(self)))])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number, first_id, num_ids, first_patch, num_patches = self._rows[index]
        shard = self._shards[number]
        ids, patches = slice(first_id, first_id + num_ids), slice(first_patch, first_patch + num_patches)
        return {
            name: tensor[patches if name.endswith("states") or name.startswith("patch_") else ids]
            for name, tensor in shard.items()
            if not name.startswith("row_")
        }


class PromptRows(Dataset):
    """Rows of prompts and their completions, whose bytes are the only targets. They hold no states.

    Args:
        entries: prompts and completions. As many as fit stand in a row, one behind the other.
        tokenizer, alphabet, row_bytes: as in [`TeacherWriter`].
    """

    def __init__(self, entries: Iterable[tuple[str, str]], tokenizer, alphabet: TokenAlphabet, row_bytes: int = 1024):
        self._rows: list[tuple[list[int], list[bool]]] = []
        for prompt, completion in entries:
            parts = [align(alphabet, tokenizer, part, is_whole=False).input_ids[1:] for part in (prompt, completion)]
            size = sum(map(len, parts))
            if not self._rows or len(self._rows[-1][0]) + size > row_bytes:
                self._rows.append(([BOS_TOKEN_ID], [False]))
            for ids, is_target in zip(parts, (False, True)):
                self._rows[-1][0].extend(ids)
                self._rows[-1][1].extend([is_target] * len(ids))
        if not self._rows:
            raise ValueError("`entries` holds no prompt.")

    @property
    def num_bytes(self) -> int:
        """Ids of all rows."""
        return sum(len(ids) for ids, _ in self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, is_target = (torch.tensor(values) for values in self._rows[index])
        target_ids = torch.zeros(len(ids), KEPT_TARGETS, dtype=torch.int16)
        target_probs = torch.zeros(len(ids), KEPT_TARGETS)
        target_ids[:-1, 0], target_probs[:-1, 0] = ids[1:], is_target[1:].float()
        labels = ids.masked_fill(~is_target, IGNORED_LABEL)
        return {"input_ids": ids, "labels": labels, "target_ids": target_ids, "target_probs": target_probs}


class JoinedRows(ConcatDataset):
    """Rows of [`TeacherData`] and after them others; the states of the first are those of all."""

    @property
    def num_bytes(self) -> int:
        """Ids of all rows."""
        return sum(rows.num_bytes for rows in self.datasets)

    def some_states(self, num_rows: int = 32) -> Tensor:
        """Returns states `(N, W)` of the first rows, fp32."""
        return self.datasets[0].some_states(num_rows)


def collate_teacher_rows(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pads rows of [`TeacherData`] on the right. Of different kinds of rows, fields that all have are left.

    Returns:
        `input_ids`, `labels` (-100 at padding) int64 `(B, S)`, `attention_mask`; `target_ids` int64 and `target_probs`
        fp32 `(B, S, 8)`; `states` and `early_states` fp32 `(B, P, W)`; `patch_tokens` int64 `(B, P, 2)`.
    """
    ids = [row["input_ids"].long() for row in rows]
    batch = {
        "input_ids": pad_rows(ids, 0),
        "labels": pad_rows([row.get("labels", row["input_ids"]).long() for row in rows], IGNORED_LABEL),
        "attention_mask": pad_rows([torch.ones_like(row) for row in ids], 0),
    }
    for name in set.intersection(*map(set, rows)) - {"input_ids", "labels"}:
        dtype = torch.float32 if rows[0][name].is_floating_point() else torch.int64
        batch[name] = nn.utils.rnn.pad_sequence([row[name].to(dtype) for row in rows], batch_first=True)
    return batch


__all__ = [
    "JoinedRows",
    "PromptRows",
    "TeacherData",
    "TeacherWriter",
    "TextRows",
    "collate_teacher_rows",
    "next_byte_targets",
    "teacher_states",
    "token_of_patches",
    "tokens_of_patches",
]
