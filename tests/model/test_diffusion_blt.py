"""Fast BLT, the training side: two streams in the decoder, and the masked loss, against the definition written slowly."""

import json

import pytest
import torch
from transformers import Trainer, TrainingArguments, set_seed
from transformers.models.blt import modeling_blt as in_tree

from blt_hf import BltForCausalLM
from blt_hf.fast_blt.masked import MIN_MASK_PROBABILITY, BlockNoise, TwoStreamSpan
from helpers.diffusion import SIZE, diffusion_model, seen_keys, slow_decoder
from helpers.models import make_model, tiny_config
from helpers.texts import encode


TEXT = "Some text, with 2 lines\nand words; é速 naïve — café. And then some more of it, and no end."


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow_blocks(model, ids, labels, document):
    """One row without padding: `(start, ids of the block, logits (K, V) as a function of what is masked)` a block.

    `document`: of each position; `None` for a row of one text.
    """
    config = model.config
    row = torch.tensor([ids])
    breaks = [i for i in range(1, len(ids)) if document is not None and document[i] != document[i - 1]]
    packed = {}
    if breaks and not config.mask_documents:
        packed["position_ids"] = torch.cat([torch.arange(b - a) for a, b in zip([0, *breaks], [*breaks, len(ids)])])[
            None
        ]
    out = model.model(row, use_cache=False, output_hidden_states=True, output_patches=True, **packed)
    byte_states = out.encoder_hidden_states[-1][0]
    latents = model.model.local_decoder.split_latents(out.global_hidden_states[-1])[0]
    lengths = [n for n in out.patch_lengths[0].tolist() if n]
    starts = [sum(lengths[:i]) for i in range(1, len(lengths))]
    first_of_text = set() if config.mask_documents else set(breaks)
    # A text that another follows closes its last patch, if only for itself.
    closed = sorted(set(starts) | first_of_text)
    window = config.local_attention_window_len or len(ids)
    found = []
    for start in starts:
        block = [p for p in range(start, start + SIZE) if p < len(ids)]
        if document is not None:
            block = [p for p in block if document[p] == document[start]]
        if start >= len(ids) or start in first_of_text or all(labels[p] == -100 for p in block):
            continue

        def logits(is_masked, start=start, block=block):
            embeds = model.model.local_encoder.embed_tokens(torch.tensor([ids[p] for p in block]))
            embeds = torch.where(is_masked[: len(block), None], model.mask_embedding.weight, embeds)
            positions = torch.tensor([*range(start), *block])
            read = torch.tensor([closed.index(max(s for s in closed if s <= p + 1)) for p in range(start)])
            read = torch.cat([read, read[-1:].expand(len(block))])
            query, key, in_block = positions[:, None], positions, torch.arange(len(positions)) >= start
            visible = (key > query - window) & ((key <= query) | in_block[:, None]) & (in_block[:, None] | ~in_block)
            visible = visible | (in_block[:, None] & in_block)
            if document is not None:
                number = torch.tensor(document)[positions]
                visible = visible & (number[:, None] == number)
            states = torch.cat([byte_states[:start], embeds])
            return model.lm_head(slow_decoder(model, states, latents, read, positions, visible)[start - 1 : -1])

        found.append((start, block, logits))
    return found


def slow_masked_loss(model, rows, labels, generator, num_items, documents=None):
    """Sum over blocks of (1/t) x cross-entropy of the masked bytes, / `num_items`; rows without their padding."""
    blocks = [slow_blocks(model, *row) for row in zip(rows, labels, documents or [None] * len(rows))]
    width = max(map(len, blocks))
    probability = torch.rand(len(rows), width, generator=generator).clamp_min(MIN_MASK_PROBABILITY)
    level = torch.rand(len(rows), width, SIZE, generator=generator)
    total = torch.zeros(())
    for row, found in enumerate(blocks):
        for number, (_, block, logits) in enumerate(found):
            is_masked = level[row, number] < probability[row, number]
            log_probs = logits(is_masked).log_softmax(dim=-1)
            for index, position in enumerate(block):
                if is_masked[index] and labels[row][position] != -100:
                    total = total - log_probs[index, labels[row][position]] / probability[row, number]
    return total / num_items


CASES = {
    "entropy": {},
    "static": {"patching_mode": "static", "patch_size": 3},
    "byte": {"patching_mode": "byte"},
    "wide_cross": {"decoder_config": {"cross_attn_window": 3}},
    "grouped_heads": {"decoder_config": {"num_key_value_heads": 1, "cross_attn_all_layers": False}},
    "full_windows": {"local_attention_window_len": None},
    "window_of_a_block": {"local_attention_window_len": SIZE},
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_the_masked_loss_is_what_the_definition_says(case):
    model = diffusion_model(**CASES[case])
    ids = torch.tensor([encode(TEXT)])
    with torch.no_grad():
        out = model(ids, labels=ids, noise_generator=seeded())
        expected = slow_masked_loss(model, ids.tolist(), ids.tolist(), seeded(), ids.shape[1] - 1)
        plain = model(ids, labels=ids)
    torch.testing.assert_close(out.masked_loss, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.loss, plain.loss + expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.logits, plain.logits, atol=1e-5, rtol=1e-5)
    assert expected > 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_ignored_labels(side):
    model = diffusion_model()
    rows = [encode(TEXT), encode(TEXT[20:60])]
    targets = [list(row) for row in rows]
    targets[0][:30] = [-100] * 30  # a prompt
    targets[1][20:24] = [-100] * 4

    def padded(row, value):
        filling = [value] * (len(rows[0]) - len(row))
        return filling + row if side == "left" else row + filling

    ids, mask, labels = (
        torch.tensor([padded(row, value) for row in of])
        for of, value in ((rows, 0), ([[1] * len(r) for r in rows], 0), (targets, -100))
    )
    with torch.no_grad():
        out = model(ids, attention_mask=mask, labels=labels, noise_generator=seeded(), num_items_in_batch=77)
        expected = slow_masked_loss(model, rows, targets, seeded(), 77)
    torch.testing.assert_close(out.masked_loss, expected, atol=1e-4, rtol=1e-4)


def test_texts_packed_by_their_positions_stay_apart():
    model = diffusion_model()
    texts = [encode(TEXT[:23]), encode(TEXT[23:50]), encode(TEXT[50:])]
    row = sum(texts, [])
    document = [number for number, text in enumerate(texts) for _ in text]
    positions = torch.tensor([[i for text in texts for i in range(len(text))]])
    ids = torch.tensor([row])
    with torch.no_grad():
        out = model(ids, position_ids=positions, labels=ids, noise_generator=seeded(), num_items_in_batch=50)
        expected = slow_masked_loss(model, [row], [row], seeded(), 50, [document])
    torch.testing.assert_close(out.masked_loss, expected, atol=1e-4, rtol=1e-4)


def test_documents_at_eos_stay_apart():
    model = diffusion_model(mask_documents=True)
    row = encode(TEXT)
    for index in (25, 50, 51):
        row[index] = 2
    document, number = [], 0
    for token in row:
        document.append(number)
        number += token == 2
    ids = torch.tensor([row])
    with torch.no_grad():
        out = model(ids, labels=ids, noise_generator=seeded(), num_items_in_batch=50)
        expected = slow_masked_loss(model, [row], [row], seeded(), 50, [document])
    torch.testing.assert_close(out.masked_loss, expected, atol=1e-4, rtol=1e-4)


def test_every_attention_implementation_sees_the_same_keys():
    model = diffusion_model()
    ids = torch.tensor([encode(TEXT)])
    with torch.no_grad():
        expected = model(ids, labels=ids, noise_generator=seeded()).masked_loss
        model.set_attn_implementation("eager")
        found = model(ids, labels=ids, noise_generator=seeded()).masked_loss
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    span = TwoStreamSpan(read_blocks(model, ids), None, ids.shape[1], 10, "flex_attention")
    mask, visible = span._build_two_stream_mask(ids.device), span._visible_keys()
    rows, queries, keys = (torch.arange(size) for size in visible.shape)
    seen = mask.mask_mod(rows[:, None, None], torch.tensor(0), queries[:, None], keys)
    assert torch.equal(seen, visible)
    assert mask.shape == (visible.shape[0], 1, *visible.shape[1:])


def double_precision(model, monkeypatch):
    """The model computes a few softmaxes in fp32 whatever its dtype; here everything is fp64."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double())
    monkeypatch.setattr(torch, "float", torch.float64)  # what transformers' rotations ask `Tensor.to` for
    return model.double()


def test_gradients_are_those_of_the_loss(monkeypatch):
    """Directional derivatives of the whole loss in fp64, for each parameter and for all together."""
    model = double_precision(diffusion_model(), monkeypatch)
    ids = torch.tensor([encode(TEXT)])

    def loss():
        return model(ids, labels=ids, noise_generator=seeded()).loss

    loss().backward()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in parameters.values())
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}
    step = 1e-6

    @torch.no_grad()
    def check(names):
        expected = sum(float((parameters[name].grad * directions[name]).sum()) for name in names)
        values = []
        for sign in (1, -2):
            for name in names:
                parameters[name].add_(sign * step * directions[name])
            values.append(float(loss()))
        for name in names:
            parameters[name].add_(step * directions[name])
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=1e-4, abs=1e-7)

    check(list(parameters))
    for name in ("mask_embedding.weight", "model.local_encoder.embed_tokens.weight", "lm_head.weight"):
        check([name])
    for name in parameters:
        if "local_decoder.layers.0" in name or "cross_attn_layers.1" in name:
            check([name])


def test_gradcheck_of_the_masked_loss(monkeypatch):
    model = double_precision(diffusion_model(patching_mode="static", patch_size=4), monkeypatch)
    ids = torch.tensor([encode(TEXT[:30])])

    def loss(weight, norm):
        replaced = {"mask_embedding.weight": weight, "model.local_decoder.cross_attn_layers.1.q_norm.weight": norm}
        inputs = {"input_ids": ids, "labels": ids, "noise_generator": seeded()}
        return torch.func.functional_call(model, replaced, kwargs=inputs).masked_loss

    weights = model.mask_embedding.weight, model.model.local_decoder.cross_attn_layers[1].q_norm.weight
    assert torch.autograd.gradcheck(loss, tuple(w.detach().clone().requires_grad_() for w in weights))


def read_blocks(model, ids, seed=0, **inputs):
    noise = BlockNoise(ids, SIZE, model.mask_embedding.weight[0], seeded(seed))
    with torch.no_grad():
        return model.model(ids, use_cache=False, block_noise=noise, **inputs).blocks


def blocks_of_a_text():
    """A model, a text, its patches, and its blocks."""
    model, ids = diffusion_model(), torch.tensor([encode(TEXT)])
    with torch.no_grad():
        lengths = model(ids, output_patches=True).patch_lengths
    return model, ids, lengths, read_blocks(model, ids, patch_lengths=lengths)


def test_a_block_knows_nothing_of_what_it_has_to_predict():
    """Other bytes in the place of the masked ones, and of all bytes behind the block, change none of its states."""
    model, ids, lengths, blocks = blocks_of_a_text()
    changed_any = False
    for number in range(0, blocks.ids.shape[1], 3):
        start = int(blocks.starts[0, number])
        kept = torch.zeros(ids.shape[1], dtype=torch.bool)
        kept[:start] = True
        unmasked = blocks.exists[0, number] & ~blocks.is_masked[0, number]
        kept[blocks.positions[0, number][unmasked]] = True
        other = torch.where(kept, ids[0], (ids[0] + 7) % 200 + 4)[None]
        found = read_blocks(model, other, patch_lengths=lengths)
        exists = blocks.exists[0, number]
        torch.testing.assert_close(
            found.states[0, number][exists], blocks.states[0, number][exists], atol=1e-5, rtol=1e-5
        )
        changed_any |= not torch.allclose(found.states, blocks.states, atol=1e-2)
    assert changed_any


def test_blocks_see_what_is_before_them_in_both_directions_of_themselves():
    """The other way round: a byte before the block, and an unmasked one at its end, reach all of its bytes."""
    model, ids, lengths, blocks = blocks_of_a_text()
    full = blocks.exists[0].all(dim=1) & ~blocks.is_masked[0, :, -1] & (blocks.is_masked[0].sum(dim=1) > 1)
    number = int(full.nonzero()[-1, 0])
    start = int(blocks.starts[0, number])
    for position in (start - 1, start + SIZE - 1):
        other = ids.clone()
        other[0, position] = 60 if ids[0, position] != 60 else 61
        found = read_blocks(model, other, patch_lengths=lengths).states[0, number]
        changed = (found - blocks.states[0, number]).abs().amax(dim=-1) > 1e-4
        assert changed[1:].all() and changed[0] == (position < start)  # the first is predicted by the text


@pytest.mark.parametrize("case", ["entropy", "full_windows", "window_of_a_block", "byte"])
def test_attention_sees_the_keys_described(case):
    model = diffusion_model(**CASES[case])
    ids = torch.tensor([encode(TEXT)])
    blocks = read_blocks(model, ids)
    length, window = ids.shape[1], model.config.local_attention_window_len
    span = TwoStreamSpan(blocks, None, length, window, "sdpa")
    window = window or length + SIZE
    seen = seen_keys(model, span)
    text, number = torch.arange(length), torch.arange(blocks.ids.shape[1]).repeat_interleave(SIZE)
    position = torch.cat([text, blocks.positions[0].flatten()])
    owner = torch.cat([text * 0 - 1, number])
    exists = torch.cat([text >= 0, blocks.exists[0].flatten()])
    start = torch.cat([text + 1, blocks.starts[0].repeat_interleave(SIZE)])  # a clean byte sees itself, a block not
    is_clean = owner == -1
    sees_text = is_clean & (position < start[:, None]) & (position > position[:, None] - window) & exists[:, None]
    sees_own = ~is_clean & (owner == owner[:, None]) & exists & exists[:, None]
    assert torch.equal(seen[exists], (sees_text | sees_own)[exists])


@pytest.mark.parametrize("case", ["entropy", "byte"])
def test_the_masks_grow_linearly_with_the_text(case):
    """What the two streams' attention looks at, in scores; windows and patches bound it for each byte."""
    model = diffusion_model(**CASES[case])
    sizes = []
    for repeat in (8, 16):
        ids = torch.tensor([encode(TEXT * repeat)])
        span = TwoStreamSpan(read_blocks(model, ids), None, ids.shape[1], 10, "sdpa")
        sizes.append(span._build_two_stream_mask(ids.device).numel())
    assert sizes[1] < 2.2 * sizes[0]


def test_noise_has_the_distribution_of_the_definition():
    noise = BlockNoise(None, 8, None, seeded())
    probability, level = noise.draw(4, 5000, torch.device("cpu"))
    is_masked = (level < probability[..., None]).float()
    assert probability.mean() == pytest.approx(0.5, abs=0.01) and probability.var() == pytest.approx(1 / 12, abs=2e-3)
    # Given t, each byte is masked with probability t.
    for low in (0.0, 0.3, 0.8):
        chosen = (probability >= low) & (probability < low + 0.2)
        assert is_masked[chosen].mean() == pytest.approx(float(probability[chosen].mean()), abs=0.02)


def test_the_noise_is_reproducible():
    model = diffusion_model()
    ids = torch.tensor([encode(TEXT)])
    with torch.no_grad():
        first, again, other = (model(ids, labels=ids, noise_generator=seeded(seed)).masked_loss for seed in (3, 3, 4))
        model.train()
        set_seed(5)
        torch_first = model(ids, labels=ids).masked_loss
        set_seed(5)
        torch_again = model(ids, labels=ids).masked_loss
    assert first == again != other
    assert torch_first == torch_again != first


def test_an_evaluation_measures_the_text_alone():
    model = diffusion_model()
    ids = torch.tensor([encode(TEXT)])
    with torch.no_grad():
        evaluated = model(ids, labels=ids)
        model.config.diffusion_loss_weight = 0.0
        model.train()
        off = model(ids, labels=ids)
    assert evaluated.masked_loss is None and off.masked_loss is None
    torch.testing.assert_close(evaluated.loss, off.loss)
    logits = evaluated.logits[0, :-1].log_softmax(dim=-1)
    torch.testing.assert_close(evaluated.loss, -logits.gather(1, ids[0, 1:, None]).mean())


def test_gradient_checkpointing_and_accumulation_change_nothing(monkeypatch):
    """Checkpointed layers read the same noise again; micro-batches with `num_items_in_batch` add up to the batch."""
    ids = torch.tensor([encode(TEXT)[:70], encode(TEXT[::-1])[:70]])

    def fixed(self, num_rows, num_blocks, device):
        level = torch.arange(self.block_size, device=device).expand(num_rows, num_blocks, -1) % 3 / 3
        return torch.full((num_rows, num_blocks), 0.5, device=device), level

    monkeypatch.setattr(BlockNoise, "draw", fixed)
    gradients = []
    for way in ("plain", "checkpointing", "accumulation"):
        model = diffusion_model().train()
        if way == "checkpointing":
            model.gradient_checkpointing_enable()
        for part in ids.split(1) if way == "accumulation" else [ids]:
            labels = part.clone()
            labels[:, :10] = -100
            out = model(part, labels=labels, use_cache=None if way == "plain" else False, num_items_in_batch=180)
            out.loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-5, rtol=1e-3)


def test_every_parameter_has_a_gradient_even_where_there_is_no_block():
    for ids, weight in ((torch.tensor([[1]]), 1.0), (torch.tensor([encode(TEXT)]), 0.0)):
        model = diffusion_model(diffusion_loss_weight=weight).train()
        model(ids, labels=ids).loss.backward()
        assert model.mask_embedding.weight.grad is not None


class Repeated(torch.utils.data.Dataset):
    """The same text at every place, from different beginnings."""

    ids = torch.tensor(encode(TEXT * 3))

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {"input_ids": self.ids[index : index + 64], "labels": self.ids[index : index + 64]}


def test_a_plain_blt_becomes_one_with_blocks_by_fine_tuning(tmp_path):
    plain = make_model()
    plain.save_pretrained(tmp_path / "plain")
    ids = torch.tensor([encode(TEXT)])
    losses = []
    for run in range(2):
        set_seed(run // 2)
        model = BltForCausalLM.from_pretrained(tmp_path / "plain", diffusion_block_size=SIZE)
        # The model has blocks, and `generate` uses none until it is asked to.
        assert getattr(model.generation_config, "diffusion_block_size", None) is None
        assert torch.equal(
            *(m.generate(ids[:, :40], max_new_tokens=12, do_sample=False) for m in (model.eval(), plain))
        )
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(ids).logits, plain(ids).logits)
            before = model(ids, labels=ids, noise_generator=seeded()).masked_loss
        arguments = TrainingArguments(
            str(tmp_path / f"run{run}"), max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=2e-2, report_to="none", save_strategy="no", use_cpu=True, seed=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=Repeated())
        trainer.train()
        with torch.no_grad():
            after = model.eval()(ids, labels=ids, noise_generator=seeded()).masked_loss
        assert after < 0.9 * before
        losses.append(float(after))
    assert losses[0] == losses[1]  # noise and all


def test_a_checkpoint_stays_an_ordinary_blt(tmp_path, caplog):
    model = diffusion_model(local_attention_window_len=None, patcher_config={"sliding_window": None})
    ids = torch.tensor([encode(TEXT)])
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path)
    theirs, report = in_tree.BltForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["unexpected_keys"]) == {"mask_embedding.weight"} and not report["missing_keys"]
    ours = BltForCausalLM.from_pretrained(tmp_path)
    without = BltForCausalLM.from_pretrained(tmp_path, diffusion_block_size=None)
    assert ours.config.diffusion_block_size == SIZE and without.mask_embedding is None
    torch.testing.assert_close(ours.mask_embedding.weight, model.mask_embedding.weight)
    with torch.no_grad():
        for other in (theirs.eval(), ours.eval(), without.eval()):
            torch.testing.assert_close(other(ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_model_without_blocks_is_what_it_was(tmp_path):
    model = make_model()
    assert model.mask_embedding is None and not any("mask" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["diffusion_block_size"] is None
    ids = torch.tensor([encode(TEXT)])
    assert model.train()(ids, labels=ids).masked_loss is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"diffusion_block_size": 0}, "at least 1 byte.*got 0"),
        ({"diffusion_block_size": 11}, "at most `local_attention_window_len`; got 11 and a window of 10"),
        ({"diffusion_loss_weight": -1.0}, "must be 0 or more; got -1.0"),
    ],
)
def test_configurations_that_cannot_be_built(values, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**values)


def test_what_cannot_be_honoured_is_refused():
    model, ids = diffusion_model().train(), torch.tensor([encode("some text")])
    embeds = torch.zeros(1, 10, 16)
    lengths = torch.tensor([[1, 9]])
    with pytest.raises(ValueError, match="input_ids=None.*`inputs_embeds` hide"):
        model(byte_embeds=embeds, labels=ids, patch_lengths=lengths)
    with pytest.raises(ValueError, match="use_cache=True.*leave it False"):
        model(ids, labels=ids, use_cache=True)
    with torch.no_grad():
        cache = model.eval()(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`past_key_values=a cache`.*whole texts"):
        model.train()(ids, labels=ids, past_key_values=cache)
    with pytest.raises(ValueError, match="`noise_generator` .* needs `labels`; got None"):
        model(ids, noise_generator=seeded())
    with pytest.raises(ValueError, match="`diffusion_block_size` is set; got None"):
        make_model()(ids, labels=ids, noise_generator=seeded())
