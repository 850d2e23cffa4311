"""Building blocks of all stacks: norm, feed-forward, self-attention and the two cross attentions."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import CacheLayerMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .attention_blt import AttentionSpan, gathered_attention, segment_attention
from .names_blt import import_where_installed, is_compiling, is_exporting, kept_arange, sliding_windows
from .patching_blt import BYTE_OFFSET, is_space_like


_products = import_where_installed("products")


def project(linear: nn.Module, states: Tensor) -> Tensor:
    """Calls a linear layer; where `blt_hf.products` finds its own product equal and faster, that is used instead."""
    if torch.compiler.is_compiling() or _products is None or not _products.can_multiply(states, linear):
        return linear(states)
    return _products.multiply(states, linear.weight)


class BltRMSNorm(nn.RMSNorm):
    """Normalizes as `torch.nn.RMSNorm`, with the weight in the dtype of the states."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        # Under autocast the two may differ, and torch has its fused kernel for one dtype only.
        weight = self.weight.to(hidden_states.dtype)
        return nn.functional.rms_norm(hidden_states, self.normalized_shape, weight, self.eps)


class BltMLP(nn.Module):
    """Computes the gated feed-forward part of a layer, as Llama's MLP does."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        linears = self.gate_proj, self.up_proj, self.down_proj
        if torch.compiler.is_compiling() or _products is None or not _products.can_multiply(hidden_states, *linears):
            return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return _products.multiply_gated(hidden_states, *(linear.weight for linear in linears), self.act_fn)


class BltRotaryEmbedding(LlamaRotaryEmbedding):
    """Computes transformers' rotary embedding, laid out for pairs of neighbouring channels; see [`rotate_pairs`]."""

    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Computes cosines and sines for positions `(B or 1, S)`, `(B or 1, S, 1, D)` each.

        Both are in the dtype of `hidden_states`; the sines carry the sign of the rotation.
        """
        cos, sin = super().forward(hidden_states, position_ids)
        half = cos.shape[-1] // 2
        cos, sin = cos[:, :, None, :half, None], sin[:, :, None, :half, None]
        return torch.cat([cos, cos], dim=-1).flatten(-2), torch.cat([-sin, sin], dim=-1).flatten(-2)


def rotates_complex(states: Tensor) -> bool:
    """Tells whether pairs of channels are rotated as complex numbers: faster, but the compiler does not know them."""
    return states.dtype == torch.float32 and states.device.type in ("cpu", "cuda") and not is_compiling()


def make_rotation(cos: Tensor, sin: Tensor) -> Tensor:
    """Joins cosines and sines of [`BltRotaryEmbedding`]: complex `(B or 1, S, 1, D/2)`, or real `(2, B or 1, S, 1, D)`."""
    return torch.complex(cos[..., ::2], sin[..., 1::2]) if rotates_complex(cos) else torch.stack([cos, sin])


def rotate_pairs(states: Tensor, rotation: Tensor) -> Tensor:
    """Rotates the pairs `(2i, 2i + 1)` of `states` `(B, S, H, D)` (released checkpoints interleave; Llama halves)."""
    pairs = states.unflatten(-1, (-1, 2))
    if rotation.is_complex():  # under autocast the states may be of fewer bits
        return torch.view_as_real(torch.view_as_complex(pairs.float()) * rotation).flatten(-2)
    cos, sin = rotation.unbind()
    return torch.addcmul(states * cos, pairs.flip(-1).flatten(-2), sin)


class BltSelfAttention(nn.Module):
    """Attends causally among bytes or among patches; an [`AttentionSpan`] says which keys each query sees."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.dropout
        self.is_causal = True
        size, kv_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)

    def forward(
        self, hidden_states: Tensor, rotation: Tensor, span: AttentionSpan,
        past_key_values: CacheLayerMixin | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Attends `(B, S, W)` -> `(B, S, W)`, and weights `(B, H, S, T)` where the implementation gives them."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = rotate_pairs(project(self.q_proj, hidden_states).view(shape), rotation).transpose(1, 2)
        key = rotate_pairs(project(self.k_proj, hidden_states).view(shape), rotation).transpose(1, 2)
        value = project(self.v_proj, hidden_states).view(shape).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, span.slot_index)
        dropout = self.dropout if self.training else 0.0
        output, weights = span.attend(self, query, key, value, dropout)
        return project(self.o_proj, output.flatten(2).contiguous()), weights


class BltTransformerLayer(GradientCheckpointingLayer):
    """Runs self-attention and MLP, each behind a norm and with a residual connection.

    Callers pass the cache by position: with gradient checkpointing, transformers drops one that is passed by keyword.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.self_attn = BltSelfAttention(config, layer_idx)
        self.mlp = BltMLP(config)
        self.input_layernorm = BltRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = BltRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_states: Tensor, rotation: Tensor, span: AttentionSpan,
        past_key_values: CacheLayerMixin | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Runs the layer; arguments and results as [`BltSelfAttention.forward`]."""
        attended, weights = self.self_attn(self.input_layernorm(hidden_states), rotation, span, past_key_values)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), weights


class _BltCrossAttention(nn.Module):
    """Holds the projections of a cross attention in either direction.

    The output is `queries + attention`, and callers add it to the queries once more: the released weights need both.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        num_heads, num_kv_heads = config.cross_attention_heads
        self.head_dim = config.hidden_size // num_heads
        self.num_key_value_groups = num_heads // num_kv_heads
        self.scaling = self.head_dim**-0.5
        self.num_latents = config.cross_attn_k
        self.window = config.cross_attention_window
        self.q_proj = nn.Linear(config.hidden_size, num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = BltRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.k_norm = BltRMSNorm(config.hidden_size, config.rms_norm_eps)


class BltPatchCrossAttention(_BltCrossAttention):
    """Attends, in the encoder, from the `K` queries of a patch to its bytes (and those of `window - 1` patches before)."""

    def forward(self, patch_states: Tensor, byte_states: Tensor, segment: Tensor) -> Tensor:
        """Attends to bytes.

        Args:
            patch_states: `(B, P, K, W)`, queries.
            byte_states: `(B, T, W)`.
            segment: int64 `(B, T)`, patch of each byte, among the `P`; out of range: another patch, or no byte.
        Returns:
            `(B, P, K, W)`.
        """
        num_patches, latents = patch_states.shape[1:3]
        # Linear layers get three dimensions: PEFT's OFT takes four for a convolution's.
        query = project(self.q_proj, self.q_norm(patch_states).flatten(1, 2))
        query = query.unflatten(1, (num_patches, latents)).unflatten(-1, (-1, self.head_dim))
        byte_states = self.k_norm(byte_states)
        key, value = (
            project(proj, byte_states).unflatten(-1, (-1, self.head_dim)) for proj in (self.k_proj, self.v_proj)
        )
        if (groups := self.num_key_value_groups) > 1:
            key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
        if self.window > 1:
            segment = torch.cat([segment + ahead for ahead in range(self.window)], dim=1)
            key, value = key.repeat(1, self.window, 1, 1), value.repeat(1, self.window, 1, 1)
        output = segment_attention(query, key, value, segment, self.scaling)
        output = project(self.o_proj, output.flatten(-2).flatten(1, 2)).unflatten(1, (num_patches, latents))
        return output + patch_states


@dataclass
class LatentIndex:
    """Says which patches each byte reads in the decoder's cross attention.

    Attributes:
        index: int64 `(B, S, W)`, their places among the keys.
        hidden: bool `(B, S, W)`, those before the first patch, which do not exist. None: all exist.
    """

    index: Tensor
    hidden: Tensor | None

    @staticmethod
    def find(last: Tensor, window: int) -> tuple[Tensor, Tensor | None]:
        """Finds the patches `(B, S, window)` up to `last` `(B, S)`, the last one first, and which are `hidden`.

        Bytes before a row's first patch still read one (meaningless, unused) latent: a softmax over no keys is NaN.
        """
        if window == 1:
            return last[..., None], None
        back = torch.arange(window, device=last.device)
        patches = last[..., None] - back
        return patches, (patches < 0) & (back > 0)


class BltByteCrossAttention(_BltCrossAttention):
    """Attends, in the decoder, from each byte to the `K` latents of one patch (and of `window - 1` patches before it)."""

    def forward(self, *inputs, latents: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Runs `attend(*inputs)`, or `project_latents(latents)`: FSDP gathers a module's weights when it is called."""
        return self.attend(*inputs) if latents is None else self.project_latents(latents)

    def project_latents(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Projects latents `(B, P, K, W)` of patches to keys and values `(B, P, K*H_kv*D)`."""
        normed = self.k_norm(latents).flatten(1, 2)
        return tuple(project(proj, normed).view(*latents.shape[:2], -1) for proj in (self.k_proj, self.v_proj))

    def attend(self, hidden_states: Tensor, keys: Tensor, values: Tensor, latent_index: LatentIndex) -> Tensor:
        """Attends from bytes `(B, S, W)` to the keys and values of the patches that each byte reads, `(B, S, W)`."""
        query = project(self.q_proj, self.q_norm(hidden_states)).unflatten(-1, (-1, self.head_dim))
        shape = (*keys.shape[:2], self.num_latents, -1, self.head_dim)
        # A model may be spread over devices.
        index, hidden = (None if t is None else t.to(query.device) for t in (latent_index.index, latent_index.hidden))
        output = gathered_attention(query, keys.view(shape), values.view(shape), index, hidden, self.scaling)
        return project(self.o_proj, output.flatten(2)) + hidden_states


_RANKED_PATCHES = 64  # patches ranked at once, as each has a score for each entry
_LIKELY_IDS = 64  # an unknown next id is taken to be one of so many, all equally likely
_SPACE = BYTE_OFFSET + 0x20
NO_SPELLING = 2**63 - 1  # the hash of entries that no patch begins with


def prefix_hashes(ids: Tensor, length: int) -> Tensor:
    """Computes hashes of the first `1 .. length` of ids `(..., length)`, int64 of the same shape."""
    weights = hash_weights((length,), 1, 1, ids.device)[0][:, 0]
    terms = (ids + 1) * weights
    # onnxruntime adds two numbers as torch does, but sums in floats.
    return torch.stack(list(accumulate(terms.unbind(-1))), -1) if is_exporting() else terms.cumsum(dim=-1)


class BltLexiconProjection(nn.Embedding):
    """Multiplies states by the weight `(out, in)`, or looks up its rows; to PEFT and quantizers no linear layer."""

    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states) if states.dtype == torch.int64 else nn.functional.linear(states, self.weight)


class BltLexiconIndex(nn.Module):
    """Finds the longest entry of a lexicon that a patch begins with, by hashes of spellings."""

    def __init__(self, size: int, length: int):
        super().__init__()
        self.length = length
        self.register_buffer("hashes", torch.full((size,), NO_SPELLING))  # of spellings, in rising order
        self.register_buffer("entries", torch.zeros(size, dtype=torch.int64))  # in that order

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Finds the entries, int64 `(B, S)`.

        Non-word bytes before a patch's first word are skipped: the patch `"hot"` is looked up as `hot"`. An entry may
        also begin with the id before the patch or its first word, as a token does that is a space and a word.

        Args:
            ids: int64 `(B, S, 1 + 2 * length)`, the last ids up to the end of each patch. Longer patches begin with none.
            lengths: int64 `(B, S)`, ids of each patch.
        Returns:
            `2 * entry + is_whole` (the entry is the whole patch, or all but the space that ends it); -1: no entry fits.
        """
        device, many = ids.device, ids.shape[-1] - 1
        before, places = many - lengths[..., None], kept_arange(0, self.length + 1, device)
        came = ids.gather(-1, (before + places).clamp(0, many))
        is_word = ~is_space_like(came[..., 1:]) & (places[1:] <= lengths[..., None])
        num_marks = is_word.long().argmax(dim=-1)  # 0 where the patch has no word
        came = ids.gather(-1, (before + num_marks[..., None] + places).clamp(0, many))
        lengths = lengths - num_marks
        # (B, S, 2, length), with the id before first.
        hashes = prefix_hashes(sliding_windows(came, 2, self.length), self.length)
        index = torch.searchsorted(self.hashes, hashes).clamp_max(self.hashes.shape[0] - 1)
        # Rank of a prefix: 2 for each id of the patch in it, 1 more with the id before. The longest wins.
        ranks = kept_arange(1, 2 * self.length + 1, device).view(self.length, 2).T
        fits = (self.hashes[index] == hashes) & (ranks <= ((2 * lengths + 1)[..., None] * (before >= 0))[..., None])
        best, place = (ranks * fits).flatten(-2).max(dim=-1)
        entries = self.entries[index.flatten(-2).gather(-1, place[..., None])[..., 0]]
        missing = lengths - best // 2
        is_whole = (missing == 0) | (missing == 1) & (ids[..., -1] == _SPACE)
        is_whole = is_whole & (num_marks <= best % 2)  # the entry has the only mark
        return torch.where(best > 1, 2 * entries + is_whole, -1)


class BltLexicon(nn.Module):
    """Ranks byte strings (entries) for each patch, and tells at each byte which next ids the best entries have.

    The normed state of a patch is multiplied with the keys of all entries; a softmax over the products says how probable
    each entry is behind the patch. The entries that begin with the bytes that have come since then share the probability
    of the next byte. In a byteified model entries are the tokens of the token model, and keys the rows of its head.

    With `lexicon_reads`, patches are read through it as well: one that is an entry enters the global transformer as the
    entry's key, and to one that begins with an entry a learned share of the key is added, channel by channel.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.top_k, self.vocab_size = config.lexicon_top_k, config.vocab_size
        self.norm = BltRMSNorm(config.hidden_size_global, config.rms_norm_eps)
        self.keys = BltLexiconProjection(config.lexicon_size, config.hidden_size_global)
        shape = config.lexicon_size, config.lexicon_length
        self.register_buffer("spellings", torch.full(shape, -1, dtype=torch.int32))
        self.embedding = BltLexiconProjection(config.hidden_size, config.vocab_size + 2)
        if config.lexicon_reads:
            self.index = BltLexiconIndex(*shape)
            # Factors of an entry's key: for patches that begin with the entry, and for patches that are the entry.
            self.key_scales = nn.Embedding(2, config.hidden_size_global)

    @torch.no_grad()
    def resize(self, vocab_size: int) -> None:
        """Makes the embedding one of so many ids; new ids, which no entry holds, get zeros."""
        of_ids, of_rest = self.embedding.weight.split([self.vocab_size, 2], dim=1)
        of_ids = nn.functional.pad(of_ids, (0, vocab_size - self.vocab_size))
        self.embedding.weight = nn.Parameter(torch.cat([of_ids, of_rest], dim=1), self.embedding.weight.requires_grad)
        self.embedding.embedding_dim, self.vocab_size = vocab_size + 2, vocab_size

    def rank(self, states: Tensor) -> Tensor:
        """Finds the entries that are most probable behind patches, for their states `(B, P, W_global)`.

        Returns:
            `(B, P, 4 * top_k)`: entries as three digits of base 256, exact in all dtypes; their log-probabilities.
        """
        if not is_compiling() and states.shape[1] > _RANKED_PATCHES:
            return torch.cat([self.rank(part) for part in states.split(_RANKED_PATCHES, dim=1)], dim=1)
        states = self.norm(states)
        if is_compiling() or _products is None or not _products.can_multiply_large(states, self.keys):
            scores = self.keys(states).float()
        else:
            scores = _products.multiply(states, self.keys.weight)
        best, index = scores.topk(self.top_k, dim=-1)
        log_probs = best - scores.logsumexp(dim=-1, keepdim=True)
        digits = torch.stack([index, index // 256, index // 65536], dim=-2) % 256
        return torch.cat([digits.flatten(-2).to(states.dtype), log_probs.to(states.dtype)], dim=-1)

    def read(self, found: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the keys of the entries that patches begin with; `found` `(B, P)`: results of the index.

        Returns:
            keys `(B, P, W_global)` times their scales, zeros without an entry; bool `(B, P, 1)`: it is the whole patch.
        """
        is_known, is_whole = (found >= 0)[..., None], (found >= 0) & (found % 2 == 1)
        keys = self.keys(found.clamp_min(0) // 2)
        return keys * self.key_scales(is_whole.long()).to(keys) * is_known.to(keys), is_whole[..., None]

    def forward(self, ranked: Tensor, ids: Tensor, open_bytes: Tensor) -> Tensor:
        """Embeds the next ids of the ranked entries, `(B, S, W)`.

        Args:
            ranked: `(B, S, 4 * top_k)` as `rank` gives it, of the patch that each byte reads.
            ids: int64 `(B, S, 1 + length)`, the last ids up to each byte, the byte itself last.
            open_bytes: int64 `(B, S)`, how many of them came behind the patch.
        """
        low, middle, high, log_probs = ranked.float().chunk(4, dim=-1)
        spellings = self.spellings[low.add(middle, alpha=256).add(high, alpha=65536).long()]  # (B, S, K, length)
        length, open_bytes = spellings.shape[-1], open_bytes[..., None]
        # The id that ended the patch (often a space), then those behind it; -2, which no entry holds, has not come.
        places = (kept_arange(length, 2 * length, ids.device) - open_bytes).clamp(0, length + 1)
        since = nn.functional.pad(ids, (0, 1), value=-2).gather(-1, places)
        # Entries may begin with the id that ended the patch, as a token does that is a space and a word.
        begins_before = spellings[..., 0] == since[..., :1]
        came = torch.where(begins_before[..., None], since[..., None, :-1], since[..., None, 1:])
        count = open_bytes + begins_before  # (B, S, K)
        # The last id of the longest entries is not compared: behind it, such an entry has no next id.
        is_alive = (spellings[..., :-1] == came).sum(dim=-1) == count
        following_ids = spellings.gather(-1, count.clamp_max(length - 1)[..., None])[..., 0].long()
        probs = log_probs.exp() * is_alive
        alive = probs.sum(dim=-1, keepdim=True)
        # Entries outside the top k share the rest; each id since the patch is taken to fit a tenth of them.
        rest = (1 - log_probs.exp().sum(dim=-1, keepdim=True)).clamp_min(1e-3) * 0.1 ** open_bytes.clamp_max(length)
        # Probabilities of each next id; in the last column of an unknown one: the rest, and entries that end here (-1).
        following = nn.functional.pad(rest, (self.vocab_size, 0))
        following = following.scatter_add(-1, following_ids % (self.vocab_size + 1), probs) / (alive + rest)
        unknown = following[..., -1:]
        # log(1 + ratio) of each id to an unknown one, whose probability is `unknown / _LIKELY_IDS`.
        features = torch.cat([following[..., :-1] / unknown.clamp_min(1e-2), unknown, alive], dim=-1)
        features = (features * _LIKELY_IDS).log1p()
        return self.embedding(features.to(ranked.dtype))


def run_layers(
    layers: nn.ModuleList, hidden_states: Tensor, rotation: Tensor, span: AttentionSpan, cache_layers: list | None,
    collector: "OutputCollector | None" = None,
) -> Tensor:  # fmt: skip
    """Runs [`BltTransformerLayer`]s on `(B, S, W)`; a `collector` gets their states and weights."""
    for layer, cache_layer in zip(layers, cache_layers or [None] * len(layers)):
        hidden_states, weights = layer(hidden_states, rotation, span, cache_layer)
        if collector is not None:
            collector.add(hidden_states, weights)
    return hidden_states


class OutputCollector:
    """Collects hidden states and attention weights of one stack, if asked for.

    Args:
        hidden_states: whether to keep them, or the indices of those that are returned (the others are None).
    """

    def __init__(self, hidden_states: bool | list[int], attentions: bool):
        self.hidden_states = () if hidden_states is not False else None
        self.attentions = () if attentions else None
        self._indices = None if isinstance(hidden_states, bool) else hidden_states

    def add(self, hidden_states: Tensor | None, weights: Tensor | None = None) -> None:
        if self.hidden_states is not None and hidden_states is not None:
            self.hidden_states += (hidden_states,)
        if self.attentions is not None and weights is not None:
            self.attentions += (weights,)

    def collected(self, chunk=None, last: Tensor | None = None) -> tuple[tuple | None, tuple | None]:
        """Returns hidden states and attention weights; those that were not asked for are None.

        Args:
            chunk: puts bytes in the caller's columns. None: states are of patches, which have no padding.
            last: replaces the last state, which models report after the norm.
        """
        states, weights = self.hidden_states, self.attentions
        if states is not None:
            states = states if last is None else (*states[:-1], last)
            kept = range(len(states))
            if self._indices is not None:
                kept = {index % len(states) for index in self._indices if -len(states) <= index < len(states)}
            states = [state if index in kept else None for index, state in enumerate(states)]
            states = tuple(s if s is None or chunk is None else chunk.unpack(s) for s in states)
        return states, None if not weights else tuple(w if chunk is None else chunk.unpack_weights(w) for w in weights)


def wants_weights(collector: OutputCollector | None) -> bool:
    """Tells whether attention weights are collected."""
    return collector is not None and collector.attentions is not None


# Multipliers of the hash functions, in the order in which the released checkpoints use them.
HASH_PRIMES = (
    1000000007, 5915587277, 1500450271, 3267000013, 5754853343, 4093082899, 9576890767, 3628273133, 2860486313,
    5463458053, 3367900313,
)  # fmt: skip


# Results of `hash_weights`. A plain dictionary, because torch.compile traces through it and not through functools.cache.
_hash_weights: dict[tuple, tuple[Tensor, Tensor]] = {}


def hash_weights(
    sizes: tuple[int, ...], num_functions: int, num_rows: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Computes factors of ids in hashes, and where the table of each hash begins among all rows; once a process.

    Returns:
        int64 `(L, functions * sizes)`, wrapped, the factor of the id `L - 1 - l` bytes back; int64 `(functions * sizes,)`.
    """
    key = (sizes, num_functions, num_rows, device)
    if key in _hash_weights and not is_exporting():  # an exported program has its own, which nothing else may use
        return _hash_weights[key]
    longest, columns = max(sizes), []
    for function in range(num_functions):
        prime = HASH_PRIMES[function % len(HASH_PRIMES)]
        for size in sizes:
            powers = [(pow(prime, power, 2**64) + 2**63) % 2**64 - 2**63 for power in range(size)]
            columns.append([0] * (longest - size) + powers)
    # Tensors that are made in inference mode could not be used in training later.
    with torch.inference_mode(False):
        made = (
            torch.tensor(columns, device=device).T.contiguous(),
            torch.arange(len(columns), device=device) * num_rows,
        )
    if not is_exporting():
        _hash_weights[key] = made
    return made


def last_ids(input_ids: Tensor, history: Tensor | None, count: int) -> Tensor:
    """Lists the last `count` ids up to each byte, the byte itself last, int64 `(B, S, count)`; 0 before the text.

    `history`: int64 `(B, H)`, the ids before `input_ids` `(B, S)`; None: none.
    """
    ids = input_ids if history is None else torch.cat([history, input_ids], dim=1)
    missing = input_ids.shape[1] + count - 1 - ids.shape[1]
    if missing > 0:
        ids = nn.functional.pad(ids, (missing, 0))
    elif missing < 0:
        ids = ids[:, -missing:]
    return sliding_windows(ids, 1, count)


def ngram_hashes(
    input_ids: Tensor, history: Tensor | None, text_positions: Tensor | None, sizes: list[int], num_functions: int,
    num_rows: int,
) -> Tensor:  # fmt: skip
    """Computes the rows of the fused hash table for the n-grams that end at each byte.

    The hash of ids `x_0 .. x_{n-1}` (oldest first) is `sum x_j * prime^j` in wrapping int64, modulo `num_rows`; ids
    before the text count as 0.

    Args:
        input_ids, history: as [`last_ids`] takes them.
        text_positions: int64 `(B, S)`, index of each byte in its text. None: ids before a text are 0 already.
        sizes: n-gram sizes. Each of `num_functions` hash functions has a table of `num_rows` rows for each size.
    Returns:
        int64 `(B, S, num_functions * len(sizes))`, function-major, with each table's offset added.
    Source: facebookresearch/blt `bytelatent/model/blt.py`, same values from one product of windows and powers.
    """
    longest, device = max(sizes), input_ids.device
    windows = last_ids(input_ids, history, longest)  # (B, S, L)
    if text_positions is not None:
        windows = windows * (text_positions[..., None] >= torch.arange(longest - 1, -1, -1, device=device))
    weights, offsets = hash_weights(tuple(sizes), num_functions, num_rows, device)
    products = windows[..., None] * weights
    # onnxruntime adds two numbers as torch does, but sums in floats.
    hashes = sum(products.unbind(dim=-2)) if is_exporting() else products.sum(dim=-2)
    # The products wrap around like the reference's; the remainder of a negative number is positive in torch.
    return hashes % num_rows + offsets


class BltHashEmbedding(nn.Embedding):
    """Holds all hash tables in one weight `(functions * sizes * rows, D)`; one look-up sums a row of each table."""

    def forward(self, hashes: Tensor) -> Tensor:
        """Sums the rows of the weight that `hashes` `(B, S, G)` name, to `(B, S, D)`."""
        weight = self.weight
        if hasattr(weight, "to_local"):  # under tensor parallelism: every rank sums its columns of the tables
            weight, hashes = weight.to_local(), hashes.to_local()
        # ONNX has a loop for bags, and forward-mode differentiation has no rule for them.
        if is_exporting() or torch.autograd.forward_ad._current_level >= 0:
            return nn.functional.embedding(hashes, weight).sum(dim=2)
        bags, offsets = hashes.flatten(0, 1), None
        if len(bags) == 1:  # torch makes the offsets of several bags
            bags, offsets = bags.flatten(), kept_arange(0, 1, bags.device)
        summed = nn.functional.embedding_bag(bags, weight, offsets, mode="sum", sparse=self.sparse)
        return summed.view(*hashes.shape[:2], -1)
