"""Distilling byteification: a BLT around frozen layers of a token model learns from that model, in three stages.

`EncoderStage`: patches are to enter the layers as tokens do. `DecoderStage`: bytes are to be spelled from states that the
token model itself left at the ends of patches. `JointStage`: both, through all layers. The layers stay as they are, or get
LoRA adapters in the last stage (`learned.add_lora`). Each stage runs alone, on what the one before it left.
"""

import copy
import json
import math
import os
import re
import signal
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..model.attention_blt import AttentionSpan
from ..model.chunk_blt import ClosingInputs, HostPatchCounts, make_chunk
from ..model.forward_blt import BytesRead, ForwardSettings, predict_bytes, read_bytes
from ..model.layers_blt import OutputCollector, make_rotation, run_layers
from ..model.modeling_blt import BltForCausalLM
from ..model.patching_blt import BYTE_OFFSET, IGNORED_LABEL
from . import learned
from .byteify import _base_model
from .teacher_data import TeacherData, collate_teacher_rows, teacher_states
from .token_models import TokenHead


LEARNED_FILE = "learned.safetensors"
NOISES = ("drop", "upper", "case")
_MARKS = torch.tensor([byte + BYTE_OFFSET for byte in range(128) if not chr(byte).isalnum() and byte != 0x20])


class Stage(nn.Module):
    """A BLT with the loss of one stage. What does not learn in it is frozen when the stage is made.

    Attributes:
        model: the BLT.
        name: of the stage.
        trained: beginnings of the names of parameters that learn.
    """

    name = ""
    trained: tuple[str, ...] = ()

    def __init__(self, model: BltForCausalLM):
        super().__init__()
        self.model = model
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for name, parameter in model.named_parameters():
            learns = name.startswith(self.trained) and not learned.is_of_token_model(name)
            parameter.requires_grad_(learns or ".lora_" in name and "lora" in self.trained)

    def whiten(self, rows, is_new: bool) -> None:
        """Lets the decoder's projection of patch states learn on whitened states; the weight stays one of plain states.

        A few channels of a language model's states are a hundred times larger than the others, and nearly constant. An
        optimizer that changes all weights by like steps would hear of nothing else.

        Args:
            rows: `TeacherData`.
            is_new: the projection has not learned yet, and begins with all directions of the states of like size.
        """
        projection = self.model.model.local_decoder.patch_embedding_projection
        whitening = _Whitening(rows.some_states())
        weight = projection.weight.detach().clone()
        parametrize.register_parametrization(projection, "weight", whitening)
        with torch.no_grad():
            projection.weight = whitening(weight) if is_new else weight
        projection.parametrizations.weight.original.requires_grad_(DecoderStage.trained[0] in self.trained)

    def note(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Adds to the mean of a figure that is logged."""
        entry = self.sums[name]
        entry[0] += float(total)
        entry[1] += float(count)

    def take_figures(self) -> dict[str, float]:
        """Returns means since the last call."""
        figures = {name: total / max(count, 1e-9) for name, (total, count) in self.sums.items()}
        self.sums.clear()
        return figures

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> BytesRead:
        """Runs the encoder over bytes `(B, S)`, padded on the right."""
        base, settings = self.model.model, ForwardSettings.of(self.model.config)
        shape, device = tuple(input_ids.shape), input_ids.device
        chunk = make_chunk(input_ids, attention_mask, None, None, shape, device, settings.documents)
        return read_bytes(base, settings, chunk, None)

    def patch_inputs(self, read: BytesRead) -> Tensor:
        """Computes the input of the layers of the global transformer, `(B, P, W)`."""
        base = self.model.model
        states, segment = base.local_encoder.patch_bytes(read.chunk, read.patches, read.byte_states, None)
        latents = base.local_encoder.make_latents(states, segment, HostPatchCounts.of(read.patches).max_new)
        return latents.flatten(2)

    def read_words(self, read: BytesRead, num_patches: int) -> tuple[Tensor, Tensor] | None:
        """Reads the patches through the lexicon, if there is one that reads."""
        decoder = self.model.model.local_decoder
        return decoder.read_words(read.chunk, read.patches, num_patches) if decoder.config.lexicon_reads else None

    def make_states(self, read: BytesRead, inputs: Tensor, collector: OutputCollector | None = None) -> Tensor:
        """Runs the global transformer on the `inputs` of its layers; states `(B, P, W)` of patches."""
        new = torch.arange(inputs.shape[1], device=inputs.device)
        closing = ClosingInputs(new, new[:0], words=self.read_words(read, len(new)))
        return self.model.model.global_transformer(inputs, read.chunk, read.patches, closing, None, collector)

    def predict(self, read: BytesRead, states: Tensor) -> Tensor:
        """Computes logits `(B, S, V)` from the states `(B, P, W)` of patches."""
        base = self.model.model
        latents = base.local_decoder.project_latents(states)
        return predict_bytes(base, ForwardSettings.of(self.model.config), None, read, latents, self.model.lm_head)

    def byte_loss(
        self,
        logits: Tensor,
        labels: Tensor,
        target_ids: Tensor | None,
        target_probs: Tensor | None,
        byte_share: float = 0.0,
    ) -> Tensor:
        """Computes cross entropy with the teacher's distribution of the next byte, or the byte itself; notes its bits.

        `byte_share`: of the byte itself, where there are both.
        """
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        right = labels[:, 1:]
        is_known = right != IGNORED_LABEL
        hard = -log_probs[:, :-1].gather(-1, right.clamp_min(0)[..., None])[..., 0][is_known]
        self.note("bits_per_byte", hard.sum() / math.log(2), hard.numel())
        if target_ids is None:
            return hard.mean()
        soft = -(log_probs.gather(-1, target_ids) * target_probs).sum(dim=-1)
        soft = soft.sum() / target_probs.sum().clamp_min(1e-9)
        return soft + byte_share * (hard.mean() - soft) if byte_share else soft


class _Whitening(nn.Module):
    """A weight as one of whitened states: `A` to `A @ M`, where `M` makes the second moments of states equal."""

    def __init__(self, states: Tensor):
        super().__init__()
        moments = states.double().T @ states.double() / states.shape[0]
        values, vectors = torch.linalg.eigh(moments)
        values = values + values.median().clamp_min(1e-12)  # the smallest directions are not blown up
        self.register_buffer("matrix", (vectors / values.sqrt() @ vectors.T).float(), persistent=False)
        self.register_buffer("inverse", (vectors * values.sqrt() @ vectors.T).float(), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight @ self.matrix.to(weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight @ self.inverse.to(weight)


def normalised_error(states: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the squared error over the energy, channel by channel, so that a few large channels do not hide the others.

    Args:
        states, targets: `(B, P, W)`. weights: `(B, P)`.
    Returns:
        the loss, and the share of the targets' variance that is lost, for the log.
    """
    count = weights.sum().clamp_min(1)
    weights = weights[..., None] / count
    mean = (targets * weights).sum(dim=(0, 1))
    variance = ((targets - mean).square() * weights).sum(dim=(0, 1))
    error = ((states - targets).square() * weights).sum(dim=(0, 1))
    # The fewer the states, the less their variance says.
    energy = (targets.square() * weights).sum(dim=(0, 1)).median()
    floor = variance.median() * 0.05 + energy / count + 1e-12
    return (error / (variance + floor)).mean(), (error.sum() / (variance + energy / count + 1e-12).sum()).detach()


def words_before_marks(read: BytesRead, patch_tokens: Tensor) -> Tensor:
    """Finds patches of a word and a mark, a token each, such as `France?`; bool `(B, P)`.

    The mark's state says little of the word, which later patches must find there.
    """
    number = read.patches.closes.cumsum(dim=1).sub(1).clamp(0, patch_tokens.shape[1] - 1)
    ends_with_mark = read.patches.closes & torch.isin(read.chunk.input_ids, _MARKS.to(number.device))
    counts = torch.zeros(patch_tokens.shape[:2], dtype=torch.long, device=number.device)
    return (counts.scatter_add(1, number, ends_with_mark.long()) > 0) & (patch_tokens[..., 1] == 2)


def embedding_error(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the squared error of inputs `(B, P, W)` of the layers, and the energy of their targets, `(B, P)` each."""
    return (inputs - targets.to(inputs.dtype)).square().sum(dim=-1), targets.square().sum(dim=-1)


def _share(wrong: Tensor, energy: Tensor, weights: Tensor) -> Tensor:
    return (wrong * weights).sum() / (energy * weights).sum().clamp_min(1e-9)


class EncoderStage(Stage):
    """The encoder learns to make the vectors that the layers of the token model are used to.

    A patch in which one token ends is to be that token's embedding; one of several tokens begins with the first one's.
    With `layers`, the first layers run as well, and each patch is to leave them as its last token left them.

    Args:
        model: a byteified model.
        embeddings: `(V, W)`, of the token model.
        layers: how many layers run; 0: none, so that rows need no states of the teacher.
        embedding_weight: of the error against embeddings, beside the one behind the layers.
        token_model: its first layers run on the tokens of rows that bring no `early_states`.
    """

    name = "encoder"
    trained = (
        "model.local_encoder.", "model.encoder_hash_tok_embedding.", "model.global_transformer.token_embedding",
        "model.local_decoder.lexicon.key_scales.",
    )  # fmt: skip

    def __init__(
        self,
        model: BltForCausalLM,
        embeddings: Tensor,
        layers: int = 0,
        embedding_weight: float = 1.0,
        token_model: nn.Module | None = None,
    ):
        super().__init__(model)
        count = len(model.model.global_transformer.layers)
        if not 0 <= layers < count:
            raise ValueError(f"`layers` must be from 0 to {count - 1}; got {layers}.")
        self.layers, self.embedding_weight = layers, embedding_weight
        self.register_buffer("embeddings", embeddings.detach().clone(), persistent=False)
        self.teacher = None if token_model is None or not layers else _first_layers(token_model, layers)

    def forward(
        self, input_ids, attention_mask, patch_tokens, early_states=None, tokens=None, patch_last=None, **unused
    ) -> dict[str, Tensor]:
        if self.layers and early_states is None and self.teacher is not None:
            states, _ = teacher_states(self.teacher, tokens)
            index = patch_last[..., None].expand(-1, -1, states.shape[-1])
            early_states = states.float().gather(1, index)
        return {"loss": self.encoder_loss(self.read(input_ids, attention_mask), patch_tokens, early_states)}

    def encoder_loss(self, read: BytesRead, patch_tokens: Tensor, early_states: Tensor | None) -> Tensor:
        """Computes the error of patches that the encoder made, `patch_tokens` `(B, P, 2)`; notes its parts."""
        inputs = self.patch_inputs(read)
        words = self.read_words(read, inputs.shape[1])
        inputs = self.model.model.global_transformer.embed_patches(inputs, words)
        num_patches = min(inputs.shape[1], patch_tokens.shape[1])
        inputs, first = inputs[:, :num_patches], patch_tokens[:, :num_patches, 0]
        counts = patch_tokens[:, :num_patches, 1]
        keep_word = words_before_marks(read, patch_tokens)[:, :num_patches]
        several = 1.0 if self.layers == 0 else 0.1  # the layers say better what a word of several tokens is
        weights = ((counts == 1) | keep_word).float() + several * ((counts > 1) & ~keep_word)
        if words is not None:  # of words that are read, the encoder has nothing to say
            weights = weights * ~words[1][:, :num_patches, 0]
        wrong, energy = embedding_error(inputs, self.embeddings[first.clamp_min(0)])
        loss, is_one = _share(wrong, energy, weights), counts == 1
        self.note("embedding_error", (wrong * is_one).detach().sum(), (energy * is_one).sum())
        if self.layers:
            if early_states is None:
                raise ValueError(
                    "`layers` needs rows with `early_states` (written with `early_layer`), or `token_model`."
                )
            early_states = early_states[:, :num_patches]
            is_known = early_states[..., 0].isfinite()  # rows with other words have no such states
            weights = ((counts > 0).float() - 0.5 * keep_word) * is_known
            behind, error = self._error_behind_layers(inputs, early_states.nan_to_num(), weights)
            has_known = float(is_known.any())
            self.note("state_error", error * has_known, has_known)
            loss = behind + self.embedding_weight * loss
        return loss

    def _error_behind_layers(self, inputs: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        stack = self.model.model.global_transformer
        positions = torch.arange(inputs.shape[1], device=inputs.device)[None]
        span = AttentionSpan(0, inputs.shape[1], None, None, stack.config._attn_implementation)
        rotation = make_rotation(*stack.rotary_emb(inputs, positions))
        states = run_layers(stack.layers[: self.layers], inputs, rotation, span, None)
        weights[:, 0] = 0  # the first patch draws attention to itself in ways that no other does
        return normalised_error(states.float(), targets, weights)


def _first_layers(token_model: nn.Module, layers: int) -> nn.Module:
    """Copies the first layers of a token model, frozen, in the dtype of the weights that a stage keeps frozen."""
    base = _base_model(token_model)
    every = base.layers
    try:
        base.layers = every[:layers]
        first = copy.deepcopy(base)
    finally:
        base.layers = every
    return first.requires_grad_(False).eval()


class DecoderStage(Stage):
    """The decoder learns to spell what states of the token model say; no layer runs.

    Args:
        model: a byteified model.
        byte_share: of the byte that came in the loss; the rest is the token model's distribution of it.
        own_states: it learns from states of this model, which other stages have taught; layers run, without gradients.
    """

    name = "decoder"
    trained = ("model.local_decoder.", "lm_head.", "mask_embedding.")

    def __init__(self, model: BltForCausalLM, byte_share: float = 0.0, own_states: bool = False):
        super().__init__(model)
        self.byte_share, self.own_states = byte_share, own_states

    def forward(
        self, input_ids, attention_mask, labels, states=None, target_ids=None, target_probs=None, **unused
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            read = self.read(input_ids, attention_mask)
            if self.own_states:
                states = self.make_states(read, self.patch_inputs(read))
        logits = self.predict(read, states)
        return {"loss": self.byte_loss(logits, labels, target_ids, target_probs, self.byte_share)}


class EncoderDecoderStage(EncoderStage):
    """Encoder and decoder learn at once, and no state passes from one to the other: the decoder reads the token model's.

    The bytes that the decoder reads come from the encoder, whose n-grams can hold how words are spelled.

    Args:
        model, embeddings, layers: see `EncoderStage`.
        encoder_weight: of the encoder's loss, beside the decoder's.
        byte_share: of the byte that came in the loss; the rest is the token model's distribution of it.
    """

    name = "decoder"
    trained = (*EncoderStage.trained, *DecoderStage.trained)

    def __init__(
        self,
        model: BltForCausalLM,
        embeddings: Tensor,
        layers: int = 0,
        encoder_weight: float = 0.5,
        byte_share: float = 0.0,
    ):
        super().__init__(model, embeddings, layers)
        self.encoder_weight, self.byte_share = encoder_weight, byte_share

    def forward(
        self, input_ids, attention_mask, labels, states, patch_tokens, early_states=None, target_ids=None,
        target_probs=None, **unused,
    ) -> dict[str, Tensor]:  # fmt: skip
        read = self.read(input_ids, attention_mask)
        loss = self.byte_loss(self.predict(read, states), labels, target_ids, target_probs, self.byte_share)
        return {"loss": loss + self.encoder_weight * self.encoder_loss(read, patch_tokens, early_states)}


class JointStage(Stage):
    """Everything but the layers learns, and their adapters if there are any; bytes go in, and bytes come out.

    Args:
        model: a byteified model.
        byte_share: of the byte that came in the loss; the rest is the token model's distribution of it.
        state_weight: of the error of patch states behind the last layer, against the token model's.
        early_layer: the layer behind which rows hold `early_states`; their error has the same weight. None: unused.
        token_model: whose norm and head read both states, with `token_weight`.
        token_weight: of the divergence between what they say: of the next token, a patch.
        word_weight: of the error of patches that are a word and a mark, against the word's embedding. Needs `token_model`.
    """

    name = "joint"
    trained = (*EncoderStage.trained, *DecoderStage.trained, "lora")

    def __init__(
        self,
        model: BltForCausalLM,
        state_weight: float = 0.1,
        early_layer: int | None = None,
        byte_share: float = 0.5,
        token_model: nn.Module | None = None,
        token_weight: float = 0.0,
        word_weight: float = 0.0,
    ):
        super().__init__(model)
        self.state_weight, self.early_layer, self.byte_share = state_weight, early_layer, byte_share
        self.token_weight = token_weight if token_model is not None else 0.0
        if self.token_weight:
            layers = model.model.global_transformer.layers
            self.token_head = TokenHead(token_model, next(layers.parameters()).dtype)
        self.word_weight = word_weight if token_model is not None else 0.0
        if self.word_weight:
            self.register_buffer("embeddings", embeddings_of(token_model).detach().clone(), persistent=False)

    def forward(
        self, input_ids, attention_mask, labels, states=None, early_states=None, target_ids=None, target_probs=None,
        patch_tokens=None, **unused,
    ) -> dict[str, Tensor]:  # fmt: skip
        read = self.read(input_ids, attention_mask)
        inputs = self.patch_inputs(read)
        collector = OutputCollector(True, False)
        made = self.make_states(read, inputs, collector)
        loss = self.byte_loss(self.predict(read, made), labels, target_ids, target_probs, self.byte_share)
        pairs = [("state_error", made, states)]
        if self.early_layer is not None:
            pairs.append(("early_state_error", collector.hidden_states[self.early_layer], early_states))
        for name, state, target in pairs:
            if target is None or not self.state_weight:
                continue
            weights = (patch_tokens[..., 1] > 0).float()
            weights[:, 0] = 0
            if target is early_states:  # behind few layers a mark has not heard of the word before it
                weights = weights * ~words_before_marks(read, patch_tokens)
            error, share = normalised_error(state.float(), target, weights)
            self.note(name, share, 1)
            loss = loss + self.state_weight * error
        if self.token_weight and states is not None:
            loss = loss + self.token_weight * self._token_divergence(made, states, patch_tokens[..., 1] > 0)
        if self.word_weight and patch_tokens is not None:
            entered = collector.hidden_states[0]
            targets = self.embeddings[patch_tokens[..., 0].clamp_min(0)]
            before_marks = words_before_marks(read, patch_tokens)
            loss = loss + self.word_weight * _share(*embedding_error(entered, targets), before_marks)
        return {"loss": loss}

    def _token_divergence(self, states: Tensor, targets: Tensor, is_known: Tensor) -> Tensor:
        """Computes the Kullback-Leibler divergence of the next token, in nats a patch, after the token model's head."""
        with torch.no_grad():
            expected = torch.log_softmax(self.token_head(targets[is_known]), dim=-1)
        found = torch.log_softmax(self.token_head(states[is_known]), dim=-1)
        loss = nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean")
        self.note("token_divergence", loss.detach(), 1)
        return loss


class NoisyRows:
    """A collator for the encoder's stage: words of the text are misspelled, and still mean what they meant.

    Letters of a word alone change, so each patch stays what it is under the rule `space`.

    Args:
        collate: makes a batch of rows.
        share: of words that are changed.
        kinds: which changes: `drop` (a letter), `upper` (all letters), `case` (each letter's at random).
        seed: of the changes.
    """

    _WORD = re.compile(rb"[A-Za-z]{3,}")

    def __init__(self, collate, share: float, kinds: tuple[str, ...] = NOISES, seed: int = 0):
        if unknown := set(kinds) - set(NOISES):
            raise ValueError(f"`kinds` must be among {NOISES}; got {sorted(unknown)}.")
        self.collate, self.share, self.kinds = collate, share, kinds
        self._random = torch.Generator().manual_seed(seed)

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        changed = [{**row, "input_ids": self._change(torch.as_tensor(row["input_ids"]))} for row in rows]
        return self.collate(changed)

    def _change(self, ids: Tensor) -> Tensor:
        # Special ids become a byte that is no letter.
        data = bytes(index - BYTE_OFFSET if 0 <= index - BYTE_OFFSET < 256 else 0 for index in ids.tolist())
        parts, position = [], 0
        for match in self._WORD.finditer(data):
            if float(torch.rand((), generator=self._random)) >= self.share:
                continue
            parts += [ids[position : match.start()], self._change_word(match[0]).to(ids.dtype) + BYTE_OFFSET]
            position = match.end()
        return torch.cat([*parts, ids[position:]])

    def _change_word(self, word: bytes) -> Tensor:
        kind = self.kinds[int(torch.randint(len(self.kinds), (), generator=self._random))]
        letters = torch.tensor([*word])
        if kind == "drop":
            gone = int(torch.randint(len(word), (), generator=self._random))
            return torch.cat([letters[:gone], letters[gone + 1 :]])
        if kind == "upper":
            return letters & ~0x20
        swaps = torch.rand(len(word), generator=self._random) < 0.5
        return torch.where(swaps, letters ^ 0x20, letters)


class _StageTrainer(Trainer):
    """Saves what is learned alone, and logs the figures of the stage."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the rows of a process

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if not any(name.startswith("eval_") for name in logs):  # an evaluation has figures of its own
            logs.update({name: round(value, 4) for name, value in self.model.take_figures().items()})
        if self.state.is_world_process_zero:
            with open(Path(self.args.output_dir) / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": self.state.global_step, **logs}) + "\n")
        super().log(logs, *args, **kwargs)

    def get_eval_dataloader(self, *args, **kwargs):
        kept, self.data_collator = self.data_collator, collate_teacher_rows  # nothing is changed in held-out rows
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = kept

    def evaluation_loop(self, *args, **kwargs):
        kept, self.model.sums = self.model.sums, defaultdict(lambda: [0.0, 0.0])
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics.update({f"eval_{name}": round(value, 4) for name, value in self.model.take_figures().items()})
        self.model.sums = kept
        return output

    def _save(self, output_dir=None, state_dict=None):
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"stage": self.model.name, "steps": str(self.state.global_step)}
        learned.save(self.model.model, folder / LEARNED_FILE, metadata, dtype=torch.float32)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        learned.load(self.model.model, Path(resume_from_checkpoint) / LEARNED_FILE)


class _StopWhenAsked(TrainerCallback):
    """Saves and stops at a signal to terminate, at the end of a step."""

    def __init__(self):
        self.asked = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._before = signal.signal(signal.SIGTERM, self._ask)

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *unused):
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked:
            control.should_save = control.should_training_stop = True


def freeze_layers(model: BltForCausalLM, dtype: torch.dtype) -> None:
    """Freezes the layers of the global transformer, and keeps their weights in `dtype`, which saves time and memory."""
    model.model.global_transformer.layers.requires_grad_(False).to(dtype)


def run_stage(stage: Stage, rows, collate, output: str | os.PathLike, eval_rows=None, **arguments) -> dict[str, float]:
    """Trains a stage with `Trainer`, from its last checkpoint in `output` if there is one.

    AdamW (0.9, 0.95), cosine to a tenth of the rate. SIGTERM saves and stops. `output` gets `learned.safetensors` at
    the end, and `log.jsonl` as it goes: loss, bits per byte, errors.

    Args:
        stage: what is learned.
        rows: a data set of rows. collate: makes a batch of them; rows for evaluation are only padded.
        eval_rows: rows for evaluation, at each save and at the end.
        arguments: of `TrainingArguments`. Defaults that differ from its own: two rows a batch, a rate of 2e-3, 50 steps
            of warmup, products in bf16, a save every 100 steps.
    Returns:
        the figures of the last evaluation, or of the last log.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    settings = {
        "per_device_train_batch_size": 2, "learning_rate": 2e-3, "warmup_steps": 50, "max_grad_norm": 1.0, "bf16": True,
        "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "report_to": [],
        "logging_steps": 20, "save_steps": 100, "save_total_limit": 1, "prediction_loss_only": True,
        "eval_strategy": "no" if eval_rows is None else "steps", "remove_unused_columns": False,
        # Little padding. Rows of texts are made when they are asked for, so their lengths cost too much.
        "train_sampling_strategy": "group_by_length" if isinstance(rows, TeacherData) else "random", **arguments,
    }  # fmt: skip
    settings = {
        "eval_steps": settings["save_steps"], "per_device_eval_batch_size": settings["per_device_train_batch_size"],
        **settings,
    }  # fmt: skip
    settings = TrainingArguments(str(output), **settings)
    parameters = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = (
        torch.optim.AdamW,
        {"params": groups, "lr": settings.learning_rate, "betas": (0.9, 0.95), "fused": True},
    )
    stop = _StopWhenAsked()
    trainer = _StageTrainer(
        stage, settings, collate, train_dataset=rows, eval_dataset=eval_rows, callbacks=[stop],
        optimizer_cls_and_kwargs=optimizer,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=_last_checkpoint(output))
    figures = trainer.evaluate() if eval_rows is not None and not stop.asked else {}
    if trainer.is_world_process_zero():
        trainer._save(output)
    return figures or dict(trainer.state.log_history[-1])


def _last_checkpoint(output: Path) -> str | None:
    found = [path for path in output.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    return str(max(found, key=lambda path: int(path.name.split("-")[1]))) if found else None


def embeddings_of(token_model: nn.Module) -> Tensor:
    """Returns token embeddings `(V, W)` of a token model."""
    return _base_model(token_model).embed_tokens.weight


__all__ = [
    "DecoderStage",
    "EncoderDecoderStage",
    "EncoderStage",
    "JointStage",
    "LEARNED_FILE",
    "NOISES",
    "NoisyRows",
    "Stage",
    "embedding_error",
    "embeddings_of",
    "freeze_layers",
    "normalised_error",
    "run_stage",
    "words_before_marks",
]
