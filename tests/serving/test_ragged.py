"""The forward over ragged rows gives the logits of the model's own, whatever an engine does with its rows."""

import copy
import random

import pytest
import torch

from blt_hf import BltConfig, register_patching_rule
from blt_hf.serving.ragged import RaggedBlt, RaggedRows, StateLayout, bytes_per_patch, largest_patch
from blt_hf.serving.row_layers import RowKernels
from helpers.models import RULES, make_model, tiny_config
from helpers.texts import encode


SERVED = sorted(set(RULES) - {"documents", "newline_reset", "wide_cross"})
SENTENCES = (
    "Zażółć gęślą jaźń. " * 3,
    "a b c d e f, and so on; x = 1\n\n" * 2,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "def f(x):\n    return x + 1 # 速い狐",
    "?",
)


class DenseEngine:
    """Keeps keys and values of each page in lists, and attends with torch: what an engine does, as plainly as can be."""

    def __init__(self, ragged: RaggedBlt, num_pages: int, tells_longest: bool = True):
        self.ragged, self.tells_longest = ragged, tells_longest
        layout = ragged.layout
        self.state = [
            torch.full((num_pages, *shape), 77).to(dtype) for shape, dtype in zip(layout.shapes, layout.dtypes)
        ]
        self.kept: dict[tuple, tuple] = {}

    def step(self, chunks: dict[int, tuple[int, list[int]]]) -> dict[int, torch.Tensor]:
        """States of the bytes of each page: `{page: (position of the first byte, ids)}`."""
        self.lengths = [len(ids) for _, ids in chunks.values()]
        self.pages = list(chunks)
        self.first = [first for first, _ in chunks.values()]
        starts = torch.tensor([0, *self.lengths]).cumsum(0)
        rows = RaggedRows(
            torch.tensor([i for _, ids in chunks.values() for i in ids]),
            torch.cat([torch.arange(first, first + len(ids)) for first, ids in chunks.values()]),
            starts,
            torch.tensor(self.pages),
            max(self.lengths) if self.tells_longest else None,
        )
        return dict(zip(chunks, self.ragged(rows, self.state, self).split(self.lengths)))

    def attend_bytes(self, stack, layer, query, key, value):
        return self._attend(stack, layer, query, key, value, self.pages, self.first, self.lengths)

    def start_patches(self, patches):
        rows, self.patch_before, self.patch_counts = (
            t.tolist() for t in (patches.rows, patches.before, patches.counts)
        )
        self.patch_pages = [self.pages[row] for row in rows]
        assert patches.counts_on_host == self.patch_counts and len(patches.positions) == sum(self.patch_counts)
        for row in range(len(rows)):
            own = patches.positions[patches.row == row].tolist()
            assert own == list(range(self.patch_before[row], self.patch_before[row] + self.patch_counts[row]))

    def attend_patches(self, layer, query, key, value):
        return self._attend("global", layer, query, key, value, self.patch_pages, self.patch_before, self.patch_counts)

    def _attend(self, stack, layer, query, key, value, pages, first, lengths):
        outputs = []
        window = self.ragged.stacks[stack].window
        for page, start, q, k, v in zip(pages, first, query.split(lengths), key.split(lengths), value.split(lengths)):
            kept = self.kept.get((stack, layer, page), (k[:0], v[:0]))
            assert len(kept[0]) >= start  # no text has a hole
            k, v = (torch.cat([old[:start], new]) for old, new in zip(kept, (k, v)))
            self.kept[stack, layer, page] = k, v
            at, keys = torch.arange(start, start + len(q))[:, None], torch.arange(len(k))
            seen = (keys <= at) & (keys > at - (window or len(k)))
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            output = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs)


def model_for(**options):
    """A small model, with patches of a few bytes: the threshold lies in the middle of the widest gap where it can."""
    model = make_model(tiny_config(**options), seed=1)
    if model.config.patching_mode == "entropy":
        entropies = [model(torch.tensor([encode(text)]), output_patches=True).entropies[0] for text in SENTENCES]
        values = torch.cat([e.diff() if model.config.monotonicity else e for e in entropies]).sort().values
        values = values[int(len(values) * 0.6) : int(len(values) * 0.85)]
        gap = values.diff().argmax()
        model.config.patching_threshold = float(values[gap : gap + 2].mean())
    return model


@torch.no_grad()
def run(model, texts: list[list[int]], generator: random.Random, drafts: int = 0, **options):
    """Logits of each text from an engine that joins, chunks and takes back at random; 3 pages for all texts."""
    ragged = RaggedBlt(model.model, max_drafts=drafts, **options)
    engine = DenseEngine(ragged, 3, tells_longest=not drafts)
    waiting, running, logits = list(range(len(texts))), {}, {}
    while waiting or running:
        free = [page for page in range(3) if page not in running]
        if waiting and free and (not running or generator.random() < 0.5):
            running[generator.choice(free)] = waiting.pop(0)
        chunks, wrong = {}, {}
        for page, number in running.items():
            if len(running) > 1 and generator.random() < 0.2:
                continue
            known = len(logits.get(number, ()))
            size = generator.choice([1, 1, 2, 7, 64])
            ids = texts[number][known : known + size]
            wrong[page] = generator.randrange(drafts + 1) if size == 1 else 0  # drafts that are not accepted
            chunks[page] = known, ids + [generator.randrange(4, 260) for _ in range(wrong[page])]
        if not chunks:
            continue
        for page, states in engine.step(chunks).items():
            number, found = running[page], model.lm_head(states[: len(states) - wrong[page]])
            logits[number] = torch.cat([logits[number], found]) if number in logits else found
            if len(logits[number]) == len(texts[number]):
                del running[page]
    return ragged, [logits[number] for number in range(len(texts))]


@pytest.mark.parametrize("rule", SERVED)
@pytest.mark.parametrize("drafts", [0, 3])
def test_logits_are_those_of_the_model(rule, drafts):
    model = model_for(**RULES[rule])
    texts = [encode(text) for text in SENTENCES]
    ragged, found = run(model, texts, random.Random(drafts), drafts, max_patch=100)
    assert ragged.num_merged == ragged.num_split == 0
    for ids, logits in zip(texts, found):
        torch.testing.assert_close(logits, model(torch.tensor([ids])).logits[0], atol=2e-5, rtol=1e-4)


def test_an_engine_may_bring_its_operations():
    """And lay joined weights out as it likes: the model's own are not needed once products are made."""
    model, released = model_for(**RULES["entropy"]), model_for(**RULES["entropy"])
    joined, normed = [], []

    class Kernels(RowKernels):
        def make_product(self, weights):
            weight = torch.cat([weight.detach() for weight in weights]).t().contiguous()
            joined.append(len(weights))
            for own in weights:
                own.data = torch.empty(0)
            return lambda states: states @ weight

        def norm(self, states, weight, eps):
            normed.append(len(states))
            return super().norm(states, weight, eps)

    texts = [encode(text) for text in SENTENCES]
    _, found = run(released, texts, random.Random(0), 3, max_patch=100, kernels=Kernels())
    for ids, logits in zip(texts, found):
        torch.testing.assert_close(logits, model(torch.tensor([ids])).logits[0], atol=2e-5, rtol=1e-4)
    config = model.config
    stacks = config.encoder_config, config.global_config, config.decoder_config, config.patcher_config
    num_layers = sum(stack.num_hidden_layers for stack in stacks)
    num_cross = sum(len(part.cross_attn_layers) for part in (model.model.local_encoder, model.model.local_decoder))
    alone = 3  # pools to queries, patches to latents, the entropy model's head
    alone += isinstance(model.model.global_transformer.token_embedding_projection, torch.nn.Linear)
    assert [joined.count(number) for number in (3, 2, 1)] == [
        num_layers,
        num_layers + num_cross,
        2 * num_layers + 2 * num_cross + alone,
    ]
    assert len(normed) > 2 * num_layers


def test_rotations_of_all_positions_may_be_computed_once():
    model = model_for(**RULES["entropy"])
    texts = [encode(text) for text in SENTENCES]
    ragged, found = run(model, texts, random.Random(0), 3, max_patch=100, longest_text=200)
    assert ragged._row_stacks.over_bytes["encoder"]._rotations.shape[0] == 200
    for ids, logits in zip(texts, found):
        torch.testing.assert_close(logits, model(torch.tensor([ids])).logits[0], atol=2e-5, rtol=1e-4)


def test_a_model_in_float64():
    model = model_for(**RULES["entropy"]).double()
    texts = [encode(text) for text in SENTENCES]
    for ids, logits in zip(texts, run(model, texts, random.Random(0), max_patch=100)[1]):
        torch.testing.assert_close(logits.float(), model(torch.tensor([ids])).logits[0], atol=1e-6, rtol=1e-5)


def test_modules_that_do_more_than_their_weights_say_are_refused():
    model = model_for(**RULES["entropy"])
    for name, change in (
        ("local_decoder.layers.1", lambda layer: layer.mlp.down_proj.register_forward_hook(lambda *given: None)),
        ("local_decoder.layers.1", lambda layer: layer.train()),
        (
            "local_decoder.layers.1",
            lambda layer: setattr(layer.self_attn, "q_proj", torch.nn.Sequential(layer.self_attn.q_proj)),
        ),
        ("local_encoder.cross_attn_layers.0", lambda cross: cross.register_forward_hook(lambda *given: None)),
        ("local_encoder.patch_embedding_projection", lambda linear: linear.train()),
        ("local_decoder.patch_embedding_projection", lambda linear: linear.train()),
        ("patcher.lm_head", lambda linear: linear.register_forward_hook(lambda *given: None)),
    ):
        changed = copy.deepcopy(model)
        module = changed.model.get_submodule(name)
        change(module)
        with pytest.raises(ValueError, match=f"{type(module).__name__} of it has an adapter.*merge_and_unload"):
            run(changed, [encode("abc")], random.Random(0))


def test_a_registered_rule_reads_ids_and_entropies_before_a_byte():
    @register_patching_rule("ragged_rise", window=3)
    def ragged_rise(ids, entropies, positions, rule):
        return (entropies[..., -1] > entropies[..., 0] + 1e-3) | (ids[..., -3] == ord(" ") + 4)

    model = model_for(patching_mode="ragged_rise")
    texts = [encode(text) for text in SENTENCES]
    for ids, logits in zip(texts, run(model, texts, random.Random(0), max_patch=100)[1]):
        torch.testing.assert_close(logits, model(torch.tensor([ids])).logits[0], atol=2e-5, rtol=1e-4)


def test_longer_patches_are_split_as_max_patch_length_would():
    model = model_for(patching_mode="entropy", local_attention_window_len=6)
    model.config.patching_threshold = 100.0
    texts = [encode(text) for text in SENTENCES]
    ragged, found = run(model, texts, random.Random(0), 2)
    assert ragged.num_split > 10
    model.config.max_patch_length = 6
    for ids, logits in zip(texts, found):
        torch.testing.assert_close(logits, model(torch.tensor([ids])).logits[0], atol=2e-5, rtol=1e-4)
    assert run(model, texts, random.Random(0), 2)[0].num_split == 0  # the model's own rule


@pytest.mark.parametrize(("rule", "ratio"), [("static", 3), ("space", 2)])
def test_fewer_slots_change_nothing_where_the_rule_bounds_patches(rule, ratio):
    model = model_for(**RULES[rule])
    assert bytes_per_patch(model.config) == ratio
    texts = [encode(text) for text in SENTENCES]
    ragged, found = run(model, texts, random.Random(0), bytes_per_slot=ratio, slots_per_page=4, max_patch=100)
    assert ragged.num_merged == 0
    for ids, logits in zip(texts, found):
        torch.testing.assert_close(logits, model(torch.tensor([ids])).logits[0], atol=2e-5, rtol=1e-4)


def test_patches_never_outgrow_the_slots_of_their_pages():
    """And a text is that of the model until slots run out, whatever the chunks."""
    model = model_for(patching_mode="byte")
    ids = encode(SENTENCES[0])
    logits = model(torch.tensor([ids])).logits[0]
    results = []
    for seed in (0, 1):
        ragged = RaggedBlt(model.model, bytes_per_slot=2, slots_per_page=8, max_patch=100)
        engine, generator, first, states = DenseEngine(ragged, 1), random.Random(seed), 0, []
        while first < len(ids):
            size = generator.choice([1, 2, 9])
            states.append(engine.step({0: (first, ids[first : first + size])})[0])
            first = min(first + size, len(ids))
            patches = int(engine.state[0][0, (first - 1) % ragged.layout.num_bytes, 1])
            assert patches <= ((first - 1) // 16 + 1) * 8
        assert ragged.num_merged > 0
        results.append(model.lm_head(torch.cat(states)))
    torch.testing.assert_close(results[0][:8], logits[:8], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(results[0], logits, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "patch", "ratio"),
    [
        ({}, 512, 1),
        ({"local_attention_window_len": 24}, 24, 1),
        ({"max_patch_length": 5}, 5, 1),
        ({"patching_mode": "byte"}, 1, 1),
        ({"patching_mode": "static", "patch_size": 6}, 6, 6),
        ({"patching_mode": "static", "patch_size": 6, "max_patch_length": 4}, 4, 1),
        ({"patching_mode": "space"}, 512, 2),
        ({"patching_mode": "space", "max_patch_length": 1}, 1, 1),
    ],
)
def test_bounds_of_patches(options, patch, ratio):
    config = BltConfig(**options)
    assert largest_patch(config) == patch
    assert bytes_per_patch(config) == ratio
    layout = StateLayout.of(config, torch.bfloat16, max_drafts=4)
    assert layout.num_bytes >= max(patch, layout.history) + 4
    assert layout.page_size == sum(torch.zeros(s, dtype=d).nbytes for s, d in zip(layout.shapes, layout.dtypes))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mask_documents": True}, "mask_documents"),
        ({"patching_newline_reset": True}, "patching_newline_reset"),
        ({"encoder_config": {"cross_attn_window": 2}}, "encoder_config.cross_attn_window"),
        ({"decoder_config": {"cross_attn_window": 3}}, "decoder_config.cross_attn_window"),
        ({"patch_in_forward": False}, "set_patcher"),
    ],
)
def test_models_that_it_cannot_run_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        RaggedBlt(make_model(tiny_config(**options)).model)


def test_a_ratio_needs_a_page():
    with pytest.raises(ValueError, match="slots_per_page"):
        RaggedBlt(make_model(tiny_config()).model, bytes_per_slot=2)
