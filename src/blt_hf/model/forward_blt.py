"""The forward of a BLT, in three stages that every way of running it shares: a prompt, a byte, a draft, a verification.

    read     entropy model, patching rule, hashes, encoder; the history of the bytes    -> which patches close
    close    pooling, global transformer, keys and values of the patches that closed    (none close: skipped)
    predict  decoder, head

Between read and close the host learns one thing: how many patches each row closed. A *small* chunk (a few bytes behind
those of a cache) writes to the slots of the cache first and then reads them, in shapes that do not change, so that its
stages can be compiled once for any length of text, or captured as CUDA graphs. A large chunk reads the cache once, in
order, and writes its last entries to the slots at its end.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention_blt import AttentionSpan
from .cache_blt import BltCache, SlotIndex, round_up_patches
from .chunk_blt import ByteChunk, ClosingInputs, DocumentRules, HostPatchCounts, PatchAssignment, assign_patches
from .layers_blt import LatentIndex, OutputCollector, ngram_hashes, wants_weights
from .names_blt import kept_arange, take_rows
from .patching_blt import PatchingRule, find_patch_ends


STEP_PATCHES = 4  # patches that a compiled or captured step closes, unless more end
_HELD = 16  # bytes of open patches are read in multiples of this, so that few shapes occur


@dataclass(frozen=True)
class ForwardSettings:
    """Holds the configuration's settings of a forward, read once for all steps of a call of `generate`.

    Attributes:
        local_window: bytes that a byte sees in encoder and decoder; None: no limit.
        encoder_window, decoder_window: patches that a cross attention reads.
        attention: name in transformers' attention interface.
        hash_sizes, hash_functions, hash_rows: of the n-gram embeddings; no functions: there are none.
    """

    rule: PatchingRule
    documents: DocumentRules
    local_window: int | None
    encoder_window: int
    decoder_window: int
    attention: str
    hash_sizes: tuple[int, ...]
    hash_functions: int
    hash_rows: int

    @classmethod
    def of(cls, config) -> "ForwardSettings":
        """Reads the settings of a [`BltConfig`]."""
        return cls(
            PatchingRule.from_config(config),
            DocumentRules.of(config),
            config.local_attention_window_len,
            config.encoder_config.cross_attention_window,
            config.decoder_config.cross_attention_window,
            config._attn_implementation,
            tuple(config.encoder_hash_byte_group_size),
            config.encoder_hash_byte_group_nb_functions,
            config.encoder_hash_byte_group_vocab,
        )


@dataclass
class ForwardInputs:
    """Holds the arguments of a forward beside its bytes.

    Attributes:
        embeds: `(B, S, W)`, in the place of byte embeddings.
        byte_embeds: `(B, S, W)`, in the place of the sum of byte and hash embeddings.
        given_ends: bool `(B, S)`, patch ends in the place of the rule's.
        collectors: of hidden states and attention weights: encoder, global transformer, decoder.
        block_noise: adds corrupted blocks to the bytes that the decoder reads, for the masked loss of BLT-D.
        patches: for a draft only, the assignment of its first byte: no patch closes, and the cache's counters stay.
        span: the draft's precomputed span; None: [`read_bytes`] makes one.
    """

    embeds: Tensor | None = None
    byte_embeds: Tensor | None = None
    given_ends: Tensor | None = None
    collectors: tuple[OutputCollector | None, OutputCollector | None, OutputCollector | None] = (None, None, None)
    block_noise: Any = None
    patches: PatchAssignment | None = None
    span: AttentionSpan | None = None


PLAIN = ForwardInputs()


@dataclass
class BytesRead:
    """Holds the results of reading bytes for later stages.

    Attributes:
        byte_states: `(B, S, W)`, of the encoder, for each cross attention.
        span: keys that each byte sees.
        entropies: fp32 `(B, S)`, nats; None: the entropy model did not run.
        blocks: corrupted blocks that the decoder reads beside the bytes; None: there are none.
    """

    chunk: ByteChunk
    patches: PatchAssignment
    byte_states: list[Tensor]
    span: AttentionSpan
    entropies: Tensor | None
    blocks: Any = None


# The stages.


def read_bytes(
    model: nn.Module, settings: ForwardSettings, chunk: ByteChunk, cache: BltCache | None, inputs: ForwardInputs = PLAIN
) -> BytesRead:  # fmt: skip
    """Runs entropy model, rule and encoder on a chunk. A small one that is no draft is written to the history, too."""
    entropies, patches = None, inputs.patches
    if patches is None:
        entropies, ends = find_patches(model, settings.rule, chunk, cache, inputs.given_ends)
        patches = assign_patches(chunk, ends, settings.documents)
    collector = inputs.collectors[0]
    span = inputs.span
    if span is None:
        span = chunk.span(cache, settings.local_window, settings.attention, collector)
    embeds = embed_bytes(model, settings, chunk, inputs.embeds) if inputs.byte_embeds is None else inputs.byte_embeds
    if collector is not None:
        collector.add(embeds)
    byte_states = model.local_encoder(embeds, chunk, span, cache, collector)
    if chunk.is_small and inputs.patches is None:
        keep_bytes(chunk, patches, byte_states, entropies, cache)
    return BytesRead(chunk, patches, byte_states, span, entropies)


def close_patches(
    model: nn.Module, cache: BltCache | None, read: BytesRead, inputs: ClosingInputs,
    collector: OutputCollector | None = None,
) -> Tensor | None:  # fmt: skip
    """Runs encoder cross attention and global transformer for the patches that a chunk closed.

    Returns:
        keys and values `(B, P, L, 2, F)` of the patches of a large chunk; None: those of a small one are in the cache.
    """
    chunk, rows = read.chunk, inputs.rows
    if chunk.is_small:
        states, segment = model.local_encoder.held_bytes(cache, chunk, inputs.byte_offsets, rows)
    else:
        states, segment = model.local_encoder.patch_bytes(chunk, read.patches, read.byte_states, cache)
    latents = model.local_encoder.make_latents(states, segment, inputs.new_patches.shape[0])
    if model.config.decoder_config.lexicon_reads:
        words = model.local_decoder.read_words(chunk, read.patches, inputs.new_patches.shape[0], rows)
        inputs = inputs._replace(words=words)
    states = model.global_transformer(latents.flatten(2), chunk, read.patches, inputs, cache, collector)
    latents = model.local_decoder.project_latents(states, chunk.packed)
    if not chunk.is_small:
        return latents
    patches = take_rows(chunk.previous.num_patches, rows)[:, None] + inputs.new_patches
    index = cache.latent_slots.find(patches, rows).flatten()
    cache.latents.write(latents, SlotIndex(index=index).on(latents.device), len(cache.row_bytes))
    return None


def predict_bytes(
    model: nn.Module, settings: ForwardSettings, cache: BltCache | None, read: BytesRead, latents: Tensor | None,
    head: nn.Module | None, inputs: ForwardInputs = PLAIN,
) -> Tensor:  # fmt: skip
    """Runs the decoder; gives its states `(B, S, W)`, or with a `head` fp32 logits. The cache counts the bytes then.

    `latents`: `(B, P, L, 2, F)`, of the patches that a large chunk closed.
    """
    chunk = read.chunk
    latents, latent_index = find_latents(settings, chunk, read.patches, cache, latents)
    states, span, positions = read.byte_states[-1], read.span, None
    if model.local_decoder.lexicon is not None:
        is_draft = inputs.patches is not None
        next_ids = model.local_decoder.read_lexicon(chunk, read.patches, latents, latent_index, is_draft)
        states = states + next_ids.to(states)
        latents = latents[:, :, :-1]
    collector = inputs.collectors[2]
    if read.blocks is not None:
        states, positions, latent_index, span = read.blocks.join(
            model, chunk, states, latent_index, wants_weights(collector)
        )
    hidden_states = model.local_decoder(states, latents, chunk, latent_index, span, cache, collector, positions)
    if head is not None:
        hidden_states = head(hidden_states).float()
    if cache is not None and inputs.patches is None:
        # Last, so that an interrupted step leaves a cache that has not read its bytes
        cache.history.advance_on_device(chunk, read.patches, read.entropies)
    return hidden_states


# Parts of the stages.


def embed_bytes(model, settings: ForwardSettings, chunk: ByteChunk, embeds: Tensor | None = None) -> Tensor:
    """Sums byte embeddings (`embeds`, if given) and hash embeddings, `(B, S, W)`."""
    embeds = model.local_encoder.embed_tokens(chunk.input_ids) if embeds is None else embeds
    if not settings.hash_functions:
        return embeds
    # The history holds zeros before the text, so only a text that begins in the chunk hides more of it.
    positions = None if chunk.is_small and chunk.text_starts is None else chunk.text_positions
    hashes = ngram_hashes(
        chunk.input_ids, chunk.history, positions, settings.hash_sizes, settings.hash_functions, settings.hash_rows
    )
    return embeds + model.encoder_hash_tok_embedding(hashes).to(embeds.device)


def find_patches(
    model: nn.Module, rule: PatchingRule, chunk: ByteChunk, cache: BltCache | None, given_ends: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Finds patch ends; returns entropies `(B, S)` (None: the entropy model did not run), and the ends `(B, S)`."""
    uses_patcher = rule.uses_entropies and model.patcher is not None
    entropies, hides_ids = None, chunk.input_ids is None
    if given_ends is None and hides_ids and (rule.uses_ids or uses_patcher):
        raise ValueError(
            f"`inputs_embeds` hide the bytes that `patching_mode={rule.mode!r}` reads; pass `patch_lengths`."
        )
    # With given patches the entropy model only runs to leave its state in the cache.
    if uses_patcher and not hides_ids and (given_ends is None or cache is not None):
        knows_all = model.config.vocab_size <= model.patcher.config.vocab_size
        ids = chunk.input_ids if knows_all else model.patcher.known_ids(chunk.input_ids)
        with torch.no_grad():
            entropies = model.patcher.entropies(ids, chunk, cache)
    if given_ends is not None:
        return entropies, given_ends
    if rule.uses_entropies and entropies is None:
        raise ValueError(
            f"`patching_mode={rule.mode!r}` needs an entropy model, and this model was built with "
            "`patch_in_forward=False`: pass `patch_lengths`, or give it one with `set_patcher`."
        )
    ends = find_patch_ends(
        rule, chunk.input_ids, entropies, chunk.text_positions, chunk.history, chunk.past_entropies,
        chunk.previous.open_bytes,
    )  # fmt: skip
    return entropies, ends


def keep_bytes(
    chunk: ByteChunk, patches: PatchAssignment, byte_states: list[Tensor], entropies: Tensor | None, cache: BltCache
) -> None:
    """Writes the history of the bytes, and their states for the patches that are open."""
    slot_index = chunk.slot_index(cache.recent_slots, 0)
    cache.history.write(patches.entries, entropies, slot_index)
    for kept, new in zip(cache.byte_states, byte_states):
        kept.write(new, slot_index.on(new.device))


def find_latents(
    settings: ForwardSettings, chunk: ByteChunk, patches: PatchAssignment, cache: BltCache | None, new: Tensor | None
) -> tuple[Tensor | None, LatentIndex]:
    """Finds keys and values of patches for the decoder, and which of them each byte reads.

    A small chunk reads the cache's slots. A large one reads `[slots | new]`, and writes `new` `(B, P, L, 2, F)` to them.
    """
    entries, hidden = LatentIndex.find(patches.read_patch, settings.decoder_window)
    if chunk.is_small:
        return cache.latents.values, LatentIndex(entries % cache.latent_slots.size, hidden)
    before = chunk.previous.num_patches
    if chunk.cached_bytes is None:
        entries, latents = entries.clamp_min(0), new
    else:
        size, latents = cache.latent_slots.size, cache.latents.values
        if new is None:
            return latents, LatentIndex(entries % size, hidden)
        # New patches stand behind the slots, in their order.
        is_new = entries >= before[:, None, None]
        entries = torch.where(is_new, size + entries - before[:, None, None], entries % size)
        latents = torch.cat([latents.to(new.dtype), new], dim=1)
    if cache is not None and new is not None:
        source = cache.latent_slots.held(before + patches.num_new) - before[:, None]
        cache.latents.write(new, SlotIndex(source=source).on(new.device))
    return latents, LatentIndex(entries, hidden)


def counts_rows(model: nn.Module) -> bool:
    """Tells whether a forward pre-hook may choose an adapter by row, as PEFT's do: then no row may be left out."""
    return any(module._forward_pre_hooks for module in model.modules())


# All stages in order.


def run_chunk(
    model: nn.Module, settings: ForwardSettings, chunk: ByteChunk, cache: BltCache | None, inputs: ForwardInputs
) -> tuple[Tensor, BytesRead]:
    """Runs the three stages on a chunk of any kind; gives decoder states `(B, S, W)` and the [`BytesRead`]."""
    if cache is not None:
        cache.begin(len(chunk.row_bytes), chunk.num_columns, chunk.is_small, chunk.device)
    read = read_bytes(model, settings, chunk, cache, inputs)
    counts = HostPatchCounts.symbolic(read.patches) if chunk.is_symbolic else HostPatchCounts.of(read.patches)
    latents = None
    if counts.max_new:
        all_rows = not chunk.is_small or 0 not in counts.new or counts_rows(model)
        closing = closing_inputs(cache, read, counts, all_rows)
        latents = close_patches(model, cache, read, closing, inputs.collectors[1])
    if cache is not None and not chunk.is_small:
        # Only now: `close_patches` read the patches that were open before from slots that are overwritten here.
        cache.reserve_open(counts.max_open_bytes, chunk.num_columns)
        keep_bytes(chunk, read.patches, read.byte_states, read.entropies, cache)
    if inputs.block_noise is not None:
        read.blocks = inputs.block_noise.corrupt(chunk, read.patches.ends)
    hidden_states = predict_bytes(model, settings, cache, read, latents, None, inputs)
    if read.blocks is not None:
        hidden_states, read.blocks.states = read.blocks.split_states(hidden_states, chunk.num_columns)
    if cache is not None:
        cache.advance_chunk_on_host(chunk, counts)
    return hidden_states, read


def closing_inputs(
    cache: BltCache | None, read: BytesRead, counts: HostPatchCounts, all_rows: bool,
    sizes: tuple[int, int] | None = None,
) -> ClosingInputs:  # fmt: skip
    """Makes the inputs of [`close_patches`], and room for its patches.

    Args:
        all_rows: run also rows that close none.
        sizes: how many patches a compiled or captured step closes, and how many slots it reads; see [`reserve_closing`].
    """
    device, num_columns, max_new = read.chunk.device, read.chunk.num_columns, counts.max_new
    if cache is not None and sizes is None:
        cache.reserve_patches(max_new)
    if not read.chunk.is_small:
        seen = 0 if read.chunk.cached_bytes is None else counts.seen
        return ClosingInputs(torch.arange(max_new, device=device), torch.arange(seen, device=device))
    sees_all = sizes is None and len(counts.new) == 1 and max_new == 1
    if sizes is None:
        seen = max(counts.old) + max_new
        seen_slots = kept_arange(0, seen if sees_all else round_up_patches(seen), device)
    else:  # marked as dynamic, which must not be done to a tensor that others share
        max_new, seen_slots = sizes[0], torch.arange(sizes[1], device=device)
    size, needed = cache.recent_slots.size, cache.needed_states(cache.max_open_bytes) + num_columns
    first = num_columns - (min(-(-needed // _HELD) * _HELD, size) if sizes is None else size)
    rows = None
    # Leaving rows out saves work on a CPU; a GPU had better see the same shapes again.
    if not all_rows and device.type == "cpu" and 0 in counts.new:
        rows = torch.tensor([row for row, count in enumerate(counts.new) if count])
    byte_offsets = kept_arange(first, num_columns, device)
    return ClosingInputs(kept_arange(0, max_new, device), seen_slots, byte_offsets, rows, sees_all)


def reserve_closing(cache: BltCache, num_columns: int, counts: HostPatchCounts) -> tuple[int, int]:
    """Makes room for the patches of a compiled or captured step.

    Returns:
        how many it closes, and how many slots it reads. Of both, few numbers occur.
    """
    max_new = STEP_PATCHES if num_columns > 1 else counts.max_new
    cache.reserve_patches(max_new)
    needed = round_up_patches(max(counts.old) + max_new)
    block = 1 << max(needed.bit_length() - 4, 0)
    return max_new, min(-(-needed // block) * block, cache.patch_slots.size)
