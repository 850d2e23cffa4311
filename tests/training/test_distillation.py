"""A BLT learns from the token model whose layers it has: each stage alone, and what it leaves on disk."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from blt_hf.cli import app as cli
from blt_hf.model.patching_blt import BOS_TOKEN_ID, BYTE_OFFSET, EOS_TOKEN_ID, PatchingRule, find_patch_ends
from blt_hf.tokenizer.encoding import byte_ids
from blt_hf.training import learned
from blt_hf.training.byteify import byteify
from blt_hf.training.distillation import (
    LEARNED_FILE,
    DecoderStage,
    EncoderDecoderStage,
    EncoderStage,
    JointStage,
    NoisyRows,
    embeddings_of,
    freeze_layers,
    normalised_error,
    run_stage,
    words_before_marks,
)
from blt_hf.training.teacher_data import (
    JoinedRows,
    PromptRows,
    TeacherData,
    TeacherWriter,
    TextRows,
    collate_teacher_rows,
    next_byte_targets,
    token_of_patches,
    tokens_of_patches,
)
from blt_hf.training.teacher_texts import strip_end, write_texts
from blt_hf.training.token_models import TokenAlphabet, TokenHead, align, cut_texts, load_token_model
from helpers.token_models import CHAT, END, make_texts, make_tokenizer


PLAIN = {"bf16": False, "disable_tqdm": True, "use_cpu": True}
SHORT = {"save_steps": 1000, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 5, **PLAIN}
LOCAL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
BLT = {
    "vocab_size": 261, "patching_mode": "space", "cross_attn_k": 2, "local_attention_window_len": 32,
    "encoder_hash_byte_group_size": [3, 4], "encoder_hash_byte_group_vocab": 97,
    "encoder_config": {**LOCAL, "num_hidden_layers": 1}, "decoder_config": {**LOCAL, "num_hidden_layers": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def token_model(tokenizer):
    """A tiny Llama that has learned to look three words back."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    alphabet = TokenAlphabet.of(tokenizer, {CHAT: 260})
    ids = torch.tensor([align(alphabet, tokenizer, text).tokens for text in make_texts(320, 1)])
    for step in range(160):
        batch = ids[step % 10 * 32 :][:32]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, token_model, tokenizer):
    """Shards of the teacher for 64 texts."""
    path = tmp_path_factory.mktemp("states")
    list(make_writer(token_model, tokenizer, path).write(make_texts(64, 2)))
    return path


def make_writer(token_model, tokenizer, path, **options):
    alphabet = TokenAlphabet.of(tokenizer, {CHAT: 260})
    return TeacherWriter(
        token_model,
        tokenizer,
        alphabet,
        PatchingRule("space"),
        path,
        early_layer=1,
        row_bytes=96,
        shard_rows=16,
        **options,
    )


def make_blt(token_model, seed: int = 0, **overrides):
    torch.manual_seed(seed)
    return byteify(token_model, **{**BLT, **overrides})


def test_tokens_spell_the_text(tokenizer):
    alphabet = TokenAlphabet.of(tokenizer, {CHAT: 260})
    text = " the cat über<|im|> sat"
    row = align(alphabet, tokenizer, text)
    before, after = text.split(CHAT)
    assert row.input_ids == [BOS_TOKEN_ID, *byte_ids(before), 260, *byte_ids(after), EOS_TOKEN_ID]
    assert row.ends[-1] == len(row.input_ids) - 1
    assert [row.input_ids[start + 1 : end + 1] for start, end in zip(row.ends, row.ends[1:])] == [
        [*alphabet.ids[token]] for token in row.tokens[1:]
    ]


def test_sentencepiece_tokens_are_read():
    vocab = {"<unk>": 0, "</s>": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}, "▁the": 258}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    alphabet = TokenAlphabet.of(tokenizer)
    assert alphabet.ids[258] == tuple(byte_ids(" the")) and alphabet.ids[2 + 0x41] == tuple(byte_ids("A"))
    assert alphabet.end_token == 1 and alphabet.ids[1] == (EOS_TOKEN_ID,)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"special_ids": {"<|none|>": 260}}, "special_ids"),
        ({"end_token": "<|none|>"}, "end_token"),
    ],
)
def test_tokens_that_are_not_there_are_refused(tokenizer, options, says):
    with pytest.raises(ValueError, match=says):
        TokenAlphabet.of(tokenizer, **options)


def test_pieces_of_texts_are_the_texts():
    texts = ["one two three four", "ü" * 30, "short"]
    pieces = list(cut_texts(texts, 8))
    assert "".join(piece for piece, _ in pieces) == "".join(texts)
    assert all(len(piece.encode()) <= 8 for piece, _ in pieces)
    assert sum(is_end for _, is_end in pieces) == len(texts)


def test_next_byte_targets_are_shared_by_tokens_that_begin_alike():
    table = torch.tensor([[10, -1, -1], [10, 11, -1], [10, 11, 12], [20, 11, -1], [10, 13, -1]], dtype=torch.int16)
    probs = torch.tensor([[0.1, 0.2, 0.3, 0.3, 0.1]])
    ids, found = next_byte_targets(probs, torch.arange(5)[None], torch.tensor([2]), table)
    rows = [{int(i): float(p) for i, p in zip(row, probs) if p > 0} for row, probs in zip(ids, found)]
    assert rows[0] == pytest.approx({10: 0.7, 20: 0.3})
    # Behind 10, token 0 has ended and is out; what came is one of 1, 2 and 4.
    assert rows[1] == pytest.approx({11: 0.5 / 0.6, 13: 0.1 / 0.6})
    assert rows[2] == pytest.approx({12: 1.0})


def test_a_token_that_came_counts_where_it_is_not_among_the_candidates():
    table = torch.tensor([[10, -1], [20, 21]], dtype=torch.int16)
    ids, probs = next_byte_targets(torch.tensor([[0.9]]), torch.tensor([[0]]), torch.tensor([1]), table)
    assert probs.sum(dim=1).tolist() == pytest.approx([1, 1])
    assert (ids[1, 0].item(), probs[1, 0].item()) == (21, 1.0)


def test_patches_know_the_last_token_that_ended_in_them(tokenizer):
    alphabet = TokenAlphabet.of(tokenizer, {CHAT: 260})
    row = align(alphabet, tokenizer, " the cat, x")
    ids = torch.tensor(row.input_ids)[None]
    ends = find_patch_ends(PatchingRule("space"), ids, None, torch.arange(ids.shape[1])[None])[0]
    of_patch = token_of_patches(ends, torch.tensor(row.ends))
    first, counts = tokens_of_patches(of_patch, torch.tensor(row.tokens)).T.tolist()
    spelled = [bytes(i - 4 for i in alphabet.ids[row.tokens[t]]).decode() for t in of_patch.tolist()[1:3]]
    assert spelled == [" the", ","]  # patches: `<s>`, ` the `, `cat,`, ` x</s>`
    assert counts[:3] == [1, 1, 2]
    assert first[2] == tokenizer(" cat").input_ids[0]


def test_the_writer_goes_on_where_it_stopped(token_model, tokenizer, tmp_path, folder):
    texts = make_texts(64, 2)
    first = make_writer(token_model, tokenizer, tmp_path).write(texts)
    next(first)
    kept = (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns
    facts = list(make_writer(token_model, tokenizer, tmp_path).write(texts))
    assert (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == kept
    assert len(facts) == len(list(folder.glob("*.json")))
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            torch.testing.assert_close(load_file(tmp_path / path.name)[name], tensor)


@torch.no_grad()
def test_a_token_head_reads_states_as_its_model_does(token_model):
    states = torch.randn(2, 5, token_model.config.hidden_size)
    expected = token_model.lm_head(token_model.model.norm(states))
    torch.testing.assert_close(TokenHead(token_model)(states), expected)
    halved = TokenHead(token_model, torch.bfloat16)(states)
    assert halved.dtype == torch.float32
    torch.testing.assert_close(halved, expected, atol=0.1, rtol=0.05)


def test_kept_states_are_those_of_the_token_model(token_model, tokenizer, folder):
    alphabet = TokenAlphabet.of(tokenizer, {CHAT: 260})
    piece = next(iter(cut_texts(make_texts(64, 2), 94)))
    row, kept = align(alphabet, tokenizer, *piece), TeacherData([folder])[0]
    assert kept["input_ids"].tolist() == row.input_ids
    with torch.no_grad():
        out = token_model(torch.tensor([row.tokens]), output_hidden_states=True)
    ends = find_patch_ends(
        PatchingRule("space"), kept["input_ids"].long()[None], None, torch.arange(len(row.input_ids))[None]
    )
    of_patch = token_of_patches(ends[0], torch.tensor(row.ends))
    torch.testing.assert_close(kept["early_states"].float(), out.hidden_states[1][0, of_patch], atol=0.02, rtol=0.02)
    logits = token_model.lm_head(token_model.model.norm(kept["states"].float()))
    torch.testing.assert_close(logits, out.logits[0, of_patch], atol=0.2, rtol=0.05)
    # The first byte behind a patch: the tokens that begin with it share the probability.
    probs = out.logits[0, 0].softmax(-1)
    spaces = sum(probs[token] for token in range(len(tokenizer)) if alphabet.ids[token][:1] == (ord(" ") + 4,))
    kept_probs = kept["target_probs"][0][kept["target_ids"][0] == ord(" ") + 4]
    assert float(kept_probs[0]) == pytest.approx(float(spaces), abs=0.03)


def stages(token_model, folder, tmp_path, steps=60):
    """Runs the three stages, each from the file of the one before."""
    rows = TeacherData([folder])
    makers = {
        "encoder": lambda model: EncoderStage(model, embeddings_of(token_model), layers=1),
        "decoder": DecoderStage,
        "joint": lambda model: JointStage(model, early_layer=1, token_model=token_model, token_weight=0.3),
    }
    start, figures = None, {}
    for name, make in makers.items():
        model = make_blt(token_model)
        freeze_layers(model, torch.float32)
        if name == "joint":
            learned.add_lora(model, 2)
        if start:
            learned.load(model, start)
        stage = make(model)
        if name != "encoder":
            stage.whiten(rows, is_new=name == "decoder")
        figures[name] = run_stage(stage, rows, collate_teacher_rows, tmp_path / name, rows, max_steps=steps, **SHORT)
        start = tmp_path / name / LEARNED_FILE
        with safe_open(start, "pt") as file:
            assert file.metadata() == {"format": "pt", "stage": name, "steps": str(steps)}
    return model, start, figures


def test_each_stage_learns_and_merged_adapters_give_the_same_logits(token_model, folder, tmp_path):
    model, path, figures = stages(token_model, folder, tmp_path)
    assert figures["encoder"]["eval_embedding_error"] < 0.5
    assert figures["decoder"]["eval_bits_per_byte"] < 3
    assert figures["joint"]["eval_bits_per_byte"] < 2
    log = [json.loads(line) for line in (tmp_path / "joint" / "log.jsonl").read_text().splitlines()]
    assert {"bits_per_byte", "state_error", "early_state_error", "token_divergence", "loss"} <= log[0].keys()
    assert log[-1]["eval_token_divergence"] < log[0]["token_divergence"]

    merged = make_blt(token_model, seed=1)
    learned.save(model, path, {"stage": "joint"}, dtype=torch.float32)
    assert learned.load(merged, path)["stage"] == "joint"
    ids = torch.tensor([[BOS_TOKEN_ID, *byte_ids(" the cat sat on")]])
    with torch.no_grad():
        expected, found = (m.eval()(ids, use_cache=False).logits for m in (model, merged))
    assert any(".lora_B" in name and tensor.abs().max() > 1e-3 for name, tensor in load_file(path).items())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    layers = model.model.global_transformer.layers
    original = byteify(token_model, **BLT).model.global_transformer.layers
    assert torch.equal(layers[0].mlp.up_proj.base_layer.weight, original[0].mlp.up_proj.weight)


def test_the_byte_that_came_and_the_distribution_share_the_loss(token_model, folder):
    batch = collate_teacher_rows([TeacherData([folder])[0]])
    losses = {}
    for share in (0.0, 0.25, 1.0):
        stage = JointStage(make_blt(token_model), state_weight=0.0, byte_share=share)
        losses[share] = float(stage(**batch)["loss"])
        bits = stage.take_figures()["bits_per_byte"]
    assert losses[1.0] == pytest.approx(bits * math.log(2), rel=1e-4)
    assert losses[0.25] == pytest.approx(0.75 * losses[0.0] + 0.25 * losses[1.0], rel=1e-4)


def test_a_decoder_that_learns_from_own_states_is_the_joint_stage_without_gradients_of_states(token_model, folder):
    batch, model = collate_teacher_rows([TeacherData([folder])[0]]), make_blt(token_model)
    expected = float(JointStage(model, state_weight=0.0, byte_share=0.25)(**batch)["loss"])
    stage = DecoderStage(model, byte_share=0.25, own_states=True)
    loss = stage(**batch)["loss"]
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(loss) != pytest.approx(float(DecoderStage(model, 0.25)(**batch)["loss"]), rel=1e-3)
    loss.backward()
    learns = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert learns and all(name.startswith(DecoderStage.trained) for name in learns)


def test_of_prompts_the_completions_alone_are_learned(token_model, tokenizer, folder):
    alphabet = TokenAlphabet.of(tokenizer, {CHAT: 260})
    entries = [(f"{CHAT} the cat", " tac\n"), (" a dog = ", f"god{CHAT}"), (" big", " mat")]
    rows = PromptRows(entries, tokenizer, alphabet, row_bytes=30)
    assert len(rows) == 2 and rows.num_bytes == sum(len(rows[index]["input_ids"]) for index in range(2))
    first, joined = rows[0], JoinedRows([TeacherData([folder]), rows])
    assert first["input_ids"].tolist() == [BOS_TOKEN_ID, 260, *byte_ids(" the cat tac\n a dog = god"), 260]
    targets = {position + 1: first["target_ids"][position, 0].item() for position in range(len(first["input_ids"]))}
    learned_at = [position for position, label in enumerate(first["labels"].tolist()) if label >= 0]
    assert [targets[position] for position in learned_at] == [*byte_ids(" tac\ngod"), 260]
    probs = first["target_probs"]
    assert (probs.sum(dim=1).nonzero()[:, 0] + 1).tolist() == learned_at and probs.max() == 1
    # Beside rows of the token model's, whose states are not needed.
    batch = collate_teacher_rows([joined[0], joined[len(joined) - 2]])
    assert set(batch) == {"input_ids", "labels", "attention_mask", "target_ids", "target_probs"}
    assert joined.some_states().equal(TeacherData([folder]).some_states())
    losses = {}
    for share in (0.0, 1.0):
        stage = DecoderStage(make_blt(token_model), byte_share=share, own_states=True)
        losses[share] = float(stage(**collate_teacher_rows([first]))["loss"])
    assert losses[0.0] == pytest.approx(losses[1.0], rel=1e-5)


def test_what_the_lexicon_reads_the_encoder_need_not_learn(token_model, tokenizer, folder):
    """Patches that are tokens enter the layers as tokens do, so they have no error and give the encoder no gradient."""
    alphabet = TokenAlphabet.of(tokenizer, {CHAT: 260})
    config = {**BLT, "decoder_config": {**BLT["decoder_config"], "lexicon_size": len(tokenizer), "lexicon_top_k": 4}}
    config["decoder_config"]["lexicon_reads"] = True
    model, embeddings = byteify(token_model, alphabet=alphabet, **config), embeddings_of(token_model)
    for text, is_read in ((" the cat the dog a mat ", True), (" the cat zz. the dog ", False)):
        batch = collate_teacher_rows([TextRows([text], tokenizer, alphabet, PatchingRule("space"))[0]])
        batch["input_ids"], batch["attention_mask"] = batch["input_ids"][:, :-1], batch["attention_mask"][:, :-1]
        model.zero_grad()
        stage = EncoderStage(model, embeddings)
        read = stage.read(batch["input_ids"], batch["attention_mask"])
        inputs = stage.patch_inputs(read)
        entered = model.model.global_transformer.embed_patches(inputs, stage.read_words(read, inputs.shape[1]))
        one = batch["patch_tokens"][0, : inputs.shape[1], 1] == 1
        one[0] = False  # `<s>`
        assert one.sum() >= 2
        torch.testing.assert_close(entered[0][one], embeddings[batch["patch_tokens"][0, : len(one), 0][one]])
        loss = stage.encoder_loss(read, batch["patch_tokens"][:, : inputs.shape[1]], None)
        loss.backward()
        gradients = [p.grad.abs().max() for p in model.model.local_encoder.parameters() if p.grad is not None]
        assert stage.take_figures()["embedding_error"] >= 0 and max(gradients) > 0  # of `<s>`, which is no entry
        assert (model.model.local_decoder.lexicon.key_scales.weight.grad[0].abs().max() > 0) is not is_read


def test_encoder_and_decoder_learn_at_once_as_they_do_apart(token_model, folder):
    """The loss is the sum of both stages' losses, and n-grams of the encoder learn from the decoder's."""
    batch = collate_teacher_rows([TeacherData([folder])[index] for index in range(3)])
    model, embeddings = make_blt(token_model), embeddings_of(token_model)
    apart = float(EncoderStage(model, embeddings, layers=1)(**batch)["loss"])
    spelled = float(DecoderStage(model)(**batch)["loss"])
    stage = EncoderDecoderStage(model, embeddings, layers=1, encoder_weight=0.25)
    assert float(stage(**batch)["loss"]) == pytest.approx(spelled + 0.25 * apart, rel=1e-5)
    gradients = {}
    for weight in (0.0, 1.0):
        model.zero_grad()
        EncoderDecoderStage(model, embeddings, layers=1, encoder_weight=weight)(**batch)["loss"].backward()
        hashes = [p.grad for name, p in model.named_parameters() if "encoder_hash_tok_embedding" in name]
        gradients[weight] = torch.cat([gradient.flatten() for gradient in hashes])
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    assert not torch.allclose(gradients[0.0], gradients[1.0])


def test_a_word_before_a_mark_stays_a_word(token_model, tokenizer):
    """`cat?` is two tokens in one patch. Later patches must find the word there, so its embedding is asked for."""
    alphabet = TokenAlphabet.of(tokenizer, {CHAT: 260})
    texts = [" the cat? the dog, big", " a dog ran", f" a mat!?{CHAT} a zz. dog"]
    rows = TextRows(texts, tokenizer, alphabet, PatchingRule("space"))
    batch = collate_teacher_rows([rows[index] for index in range(len(rows))])
    model, embeddings = make_blt(token_model), embeddings_of(token_model)
    stage = JointStage(model, state_weight=0.0, token_model=token_model, word_weight=1.0)
    read = stage.read(batch["input_ids"], batch["attention_mask"])
    found = words_before_marks(read, batch["patch_tokens"])
    words = [tokenizer.decode([token]) for token in batch["patch_tokens"][..., 0][found].tolist()]
    assert words == [" cat", " dog", " mat"]  # not `?`, `zz.` or a special token

    plain = JointStage(model, state_weight=0.0)
    losses = [float(some(**batch)["loss"]) for some in (stage, plain)]
    entered = model.model.global_transformer.token_embedding_projection(stage.patch_inputs(read))[found]
    wanted = embeddings[batch["patch_tokens"][..., 0][found]]
    error = (entered - wanted).square().sum() / wanted.square().sum()
    assert losses[0] - losses[1] == pytest.approx(float(error), rel=1e-4)

    encoder = EncoderStage(model, embeddings, layers=1)
    early = torch.zeros(*batch["patch_tokens"].shape[:2], embeddings.shape[1])
    spoiled = early.clone()
    spoiled[found] += 100.0
    half, whole = (float(encoder(**batch, early_states=states)["loss"]) for states in (early, spoiled))
    assert half != whole  # the state of the mark still counts there, for half


def test_the_divergence_is_of_what_the_head_of_the_token_model_says(token_model, folder):
    stage = JointStage(make_blt(token_model), token_model=token_model, token_weight=1.0)
    states = TeacherData([folder])[0]["states"].float()
    other = states.flip(0)
    is_known = torch.arange(len(states)) % 2 == 0
    with torch.no_grad():
        expected, found = (token_model.lm_head(token_model.model.norm(some)).softmax(-1) for some in (states, other))
        divergence = (expected * (expected.log() - found.log())).sum(-1)[is_known].mean()
        torch.testing.assert_close(stage._token_divergence(other[None], states[None], is_known[None]), divergence)
        assert float(stage._token_divergence(states[None], states[None], is_known[None])) == pytest.approx(0, abs=1e-5)


def test_a_byteified_model_learns_faster_than_one_with_random_layers(token_model, folder, tmp_path):
    rows, bits = TeacherData([folder]), {}
    for name in ("pretrained", "random"):
        source = token_model
        if name == "random":
            torch.manual_seed(3)
            source = LlamaForCausalLM(token_model.config)
        model = make_blt(source, local_attention_window_len=4)  # what came before a word, the layers alone know
        freeze_layers(model, torch.float32)
        stage = JointStage(model, state_weight=0.0)
        figures = run_stage(stage, rows, collate_teacher_rows, tmp_path / name, rows, max_steps=150, **SHORT)
        bits[name] = figures["eval_bits_per_byte"]
    assert bits["pretrained"] < bits["random"] - 0.05, bits


def test_a_stage_goes_on_from_its_checkpoint(token_model, folder, tmp_path):
    rows, weights = TeacherData([folder]), {}

    def run(output, steps):
        model = make_blt(token_model)
        freeze_layers(model, torch.float32)
        stage = EncoderStage(model, embeddings_of(token_model))
        # A rate that does not depend on the number of steps, so that both runs are the same one.
        run_stage(
            stage, rows, collate_teacher_rows, output, max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3,
            warmup_steps=0, save_steps=3, ignore_data_skip=False, lr_scheduler_type="constant", lr_scheduler_kwargs={},
            **PLAIN,
        )  # fmt: skip
        return load_file(output / LEARNED_FILE)

    weights["whole"] = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    weights["parts"] = run(tmp_path / "parts", 6)
    for name, tensor in weights["whole"].items():
        torch.testing.assert_close(weights["parts"][name], tensor)


def test_rows_of_a_batch_have_like_lengths(token_model, tokenizer, tmp_path):
    """Rows of kept states differ in length, as chats and pieces of texts do. Grouped, they need less padding."""
    texts = [text[: 20 if index % 2 else 90] for index, text in enumerate(make_texts(64, 5))]
    list(make_writer(token_model, tokenizer, tmp_path / "states").write(texts))
    rows, padding = TeacherData([tmp_path / "states"]), []

    def collate(some):
        batch = collate_teacher_rows(some)
        padding.append(1 - float(batch["attention_mask"].float().mean()))
        return batch

    stage = DecoderStage(make_blt(token_model))
    options = {"max_steps": 16, "per_device_train_batch_size": 4, **PLAIN}
    for strategy in ({}, {"train_sampling_strategy": "random"}):
        run_stage(stage, rows, collate, tmp_path / str(len(padding)), **options, **strategy)
    assert sum(padding[:16]) < sum(padding[16:]) / 3


def test_figures_of_an_evaluation_are_of_its_rows(token_model, folder, tmp_path):
    """Also where an evaluation comes between two logs of training, whose rows are changed when a batch is made."""
    rows = TeacherData([folder])

    def collate(some):
        batch = collate_teacher_rows(some)
        batch["input_ids"][:, 1:] = BYTE_OFFSET + ord("x")
        return batch

    stage = DecoderStage(make_blt(token_model))
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 2, "save_steps": 3, **PLAIN}
    run_stage(stage, rows, collate, tmp_path, [rows[0]], **options)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    with torch.no_grad():
        stage.eval()(**collate_teacher_rows([rows[0]]))
    found = next(entry for entry in log if "eval_bits_per_byte" in entry)
    assert found["step"] == 3
    assert found["eval_bits_per_byte"] == pytest.approx(stage.take_figures()["bits_per_byte"], abs=1e-3)


def test_stages_train_their_part_alone(token_model):
    parts = {
        "EncoderStage": ("model.local_encoder.", "model.encoder_hash_tok_embedding."),
        "DecoderStage": ("model.local_decoder.", "lm_head."),
    }
    parts["EncoderDecoderStage"] = (*parts["EncoderStage"], *parts["DecoderStage"])

    def ends(model):
        return EncoderDecoderStage(model, embeddings_of(token_model))

    for make in (lambda model: EncoderStage(model, embeddings_of(token_model)), DecoderStage, ends, JointStage):
        stage = make(learned.add_lora(make_blt(token_model), 2))
        trained = {name for name, parameter in stage.model.named_parameters() if parameter.requires_grad}
        if (begins := parts.get(type(stage).__name__)) is not None:
            assert trained and all(name.startswith(begins) for name in trained)
        else:
            assert any(".lora_A." in name for name in trained) and not any("base_layer" in name for name in trained)


def test_whitened_states_change_how_the_projection_learns_and_nothing_else(token_model, folder, tmp_path):
    rows, name = TeacherData([folder]), "model.local_decoder.patch_embedding_projection.weight"
    model, plain = make_blt(token_model), make_blt(token_model)
    expected = learned.collect(plain)
    DecoderStage(model).whiten(rows, is_new=False)
    found = learned.collect(model)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-3)
    changed = {**expected, name: expected[name] + 1}
    save_file(changed, tmp_path / "changed.safetensors")
    learned.load(model, tmp_path / "changed.safetensors")
    torch.testing.assert_close(learned.collect(model)[name], changed[name], atol=1e-3, rtol=1e-3)
    DecoderStage(plain).whiten(rows, is_new=True)  # a new projection reads all directions of the states alike
    states = torch.cat([rows[index]["states"].float() for index in range(32)])
    sizes = [torch.linalg.svdvals(states @ weight.T) for weight in (expected[name], learned.collect(plain)[name])]
    assert sizes[1][0] / sizes[1][8] < sizes[0][0] / sizes[0][8]
    decoder = plain.model.local_decoder.patch_embedding_projection
    assert [n for n, p in decoder.named_parameters() if p.requires_grad] == ["parametrizations.weight.original"]


def test_a_file_of_another_model_is_refused(token_model, tmp_path):
    path = tmp_path / "learned.safetensors"
    learned.save(make_blt(token_model), path)
    assert load_file(path)["lm_head.weight"].dtype == torch.bfloat16
    other = byteify(token_model, **{**BLT, "encoder_hash_byte_group_vocab": 96})
    with pytest.raises(ValueError, match=r"encoder_hash_tok_embedding.weight is \(194, 16\)"):
        learned.load(other, path)


def test_noise_changes_letters_and_no_patches(tokenizer):
    rows = [{"input_ids": torch.tensor([BOS_TOKEN_ID, *byte_ids("The quick brown fox, 12 dogs<3 jumped"), 260])}]
    noisy = NoisyRows(lambda rows: rows, 1.0)(rows)[0]["input_ids"]
    assert not torch.equal(noisy, rows[0]["input_ids"])
    count = [
        int(find_patch_ends(PatchingRule("space"), ids[None], None, torch.arange(len(ids))[None]).sum())
        for ids in (noisy, rows[0]["input_ids"])
    ]
    assert count[0] == count[1] and noisy[-1] == 260
    assert torch.equal(NoisyRows(lambda rows: rows, 0.0)(rows)[0]["input_ids"], rows[0]["input_ids"])
    with pytest.raises(ValueError, match="antspeak"):
        NoisyRows(None, 0.1, ("antspeak",))


def test_normalised_error_is_zero_for_the_targets_and_one_for_their_mean():
    targets = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0] * 7 + [100])
    weights = torch.ones(2, 50)
    assert normalised_error(targets, targets, weights)[0].item() == 0
    loss, share = normalised_error(targets.mean(dim=(0, 1), keepdim=True).expand_as(targets), targets, weights)
    assert share.item() == pytest.approx(1, abs=0.1) and loss.item() == pytest.approx(1, abs=0.1)
    few = normalised_error(torch.zeros(1, 1, 4), torch.ones(1, 1, 4), torch.ones(1, 1))  # one state has no variance
    assert few[0].item() == pytest.approx(1) and math.isfinite(few[1])


def test_a_token_model_writes_texts_and_goes_on(token_model, tokenizer, tmp_path):
    prompts, path = [" the", " big red cat", " a"], tmp_path / "texts.jsonl"
    writing = write_texts(token_model, tokenizer, prompts, path, 6, batch_size=2, chat=True)
    next(writing)
    assert len(path.read_text().splitlines()) == 2
    assert [done for done, _ in write_texts(token_model, tokenizer, prompts, path, 6, batch_size=2, chat=True)] == [3]
    found = {entry["prompt"]: entry["text"] for entry in map(json.loads, path.read_text().splitlines())}
    assert found.keys() == {0, 1, 2} and found[1].startswith("<|im|>user:  big red cat<|im|>assistant:")
    assert [*strip_end(["a<|end|>", "b"], END)] == ["a", "b"]
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=END)
    with pytest.raises(ValueError, match="chat template"):
        next(write_texts(token_model, plain, prompts, path, chat=True))


def test_a_saved_token_model_is_loaded_with_its_tokenizer(token_model, tokenizer, tmp_path):
    token_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, loaded = load_token_model(tmp_path)
    assert not model.training and loaded.get_vocab() == tokenizer.get_vocab()
    assert math.isclose(float(embeddings_of(model).sum()), float(embeddings_of(token_model).sum()), rel_tol=1e-5)


def test_the_commands_make_a_blt_of_a_token_model(token_model, tokenizer, tmp_path):
    """Each command once, from a folder with a token model to one that the Auto classes load."""
    token_model.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    (tmp_path / "config.json").write_text(json.dumps(BLT))
    (tmp_path / "prompts.txt").write_text("\n".join(make_texts(4, 3)))

    def run(*arguments):
        result = CliRunner().invoke(cli, ["byteify", *map(str, arguments)])
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    llama, special = tmp_path / "llama", ("--special", f"{CHAT}=260")
    shape = ("--config", tmp_path / "config.json")
    stage = ("--steps", 2, "--cpu", "--fp32", "--quiet", *shape)
    texts = tmp_path / "texts.jsonl"
    run("write", llama, tmp_path / "prompts.txt", "-o", texts, "--max-new-tokens", 4, "--fp32", "--quiet")
    said = run("states", llama, texts, "-o", tmp_path / "states", "--early-layer", 1, "--fp32", *shape, *special)
    assert "on disk" in said and "bits per byte of the token model" in said
    states = tmp_path / "states"
    run("encoder", llama, texts, "-o", tmp_path / "a", "--layers", 1, "--noise", 0.1, "--swap", 0.5, *stage, *special)
    run("encoder", llama, states, "-o", tmp_path / "b", "--layers", 1, "--start", tmp_path / "a", *stage)
    run("decoder", llama, states, "-o", tmp_path / "c", "--start", tmp_path / "b", "--swap", 0.5, *stage, *special)
    run(
        "joint",
        llama,
        states,
        "-o",
        tmp_path / "d",
        "--start",
        tmp_path / "c",
        "--lora",
        2,
        "--held-out",
        states,
        *stage,
    )
    run("save", llama, tmp_path / "d", "-o", tmp_path / "blt", *shape)
    blt = AutoModelForCausalLM.from_pretrained(tmp_path / "blt")
    expected = make_blt(token_model)
    learned.load(expected, tmp_path / "d" / LEARNED_FILE)
    ids = torch.tensor([[BOS_TOKEN_ID, *byte_ids(" the cat")]])
    with torch.no_grad():
        torch.testing.assert_close(blt(ids).logits, expected.eval()(ids).logits)
    run("decoder", llama, states, "-o", tmp_path / "f", "--start", tmp_path / "d", "--own-states", *stage)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": " the cat", "completion": " tac"}\n' * 40)
    run(
        "decoder", llama, states, "-o", tmp_path / "h", "--start", tmp_path / "d", "--own-states", "--prompts", prompts,
        *stage,
    )  # fmt: skip
    both = ("--encoder-weight", 0.3, "--layers", 1, "--swap", 0.5, "--swap-rows", 0.5, "--byte-share", 0.5)
    run("decoder", llama, states, "-o", tmp_path / "g", *both, *stage, *special)
    last, later = (load_file(tmp_path / name / LEARNED_FILE) for name in "df")
    assert learned.rank_of(tmp_path / "f" / LEARNED_FILE) == 2 and learned.rank_of(tmp_path / "c" / LEARNED_FILE) == 0
    assert all(later[name].equal(tensor) for name, tensor in last.items() if ".lora_" in name)
    wrong = [*map(str, ["byteify", "encoder", llama, states, "-o", tmp_path / "e", "--swap", 0.5, *stage])]
    assert "needs texts" in CliRunner().invoke(cli, wrong).output
    wrong = [*map(str, ["byteify", "decoder", llama, states, "-o", tmp_path / "e", "--swap", 0.5, *stage])]
    assert "--own-states goes with neither" in CliRunner().invoke(cli, [*wrong, "--own-states"]).output
    plain = [*map(str, ["byteify", "decoder", llama, states, "-o", tmp_path / "e", *stage, "--prompts", prompts])]
    assert "--prompts needs --own-states" in CliRunner().invoke(cli, plain).output
    prompts.write_text('{"prompt": " the cat", "completion": ""}\n')
    options = ["--start", str(tmp_path / "d"), "--own-states", "--prompts", str(prompts), *map(str, stage)]
    wrong_prompts = ["byteify", "decoder", str(llama), str(states), "-o", str(tmp_path / "i"), *options]
    assert CliRunner().invoke(cli, wrong_prompts).exit_code == 1
    assert "needs --encoder-weight" in CliRunner().invoke(cli, [*wrong, "--layers", "1"]).output
    wrong = CliRunner().invoke(cli, ["byteify", "joint", str(llama), str(tmp_path), "-o", "x", *map(str, stage)])
    assert wrong.exit_code == 1 and "no shards" in wrong.output
