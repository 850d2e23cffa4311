"""Conversion of Meta's files: every refusal, every layout, and nothing half-written.

That the numbers are right is shown in `tests/conformance/test_meta_reference.py`.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.models.blt import modeling_blt as in_tree_blt
from typer.testing import CliRunner

from blt_hf import BltConfig, BltForCausalLM
from blt_hf.cli import app
from blt_hf.conversion import arguments as convert_arguments
from blt_hf.conversion import checkpoints as convert
from blt_hf.conversion import (
    convert_meta_checkpoint,
    export_meta_checkpoint,
)
from blt_hf.conversion import files as convert_files
from helpers.hub_server import HubServer
from helpers.meta_checkpoints import ARGS, ENTROPY_ARGS, PATCHER_ARGS, meta_tensors, read_json, write_json, write_meta
from helpers.models import make_model, tiny_config
from helpers.processes import run
from helpers.texts import encode


@pytest.fixture
def source(tmp_path) -> Path:
    return write_meta(tmp_path / "meta")


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def logits_of(folder: Path) -> torch.Tensor:
    ids = torch.tensor([encode("some bytes, then more")])
    with torch.no_grad():
        return BltForCausalLM.from_pretrained(folder).eval()(ids).logits


# ---- Arguments ----


# ---- Files ----


def test_checkpoint_is_complete(source, tmp_path):
    out = convert_meta_checkpoint(source, tmp_path / "out")
    for name in ("config.json", "generation_config.json", "model.safetensors", "README.md", "meta_args.json"):
        assert (out / name).is_file()
    model, report = BltForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    assert model.generation_config.eos_token_id == 2 and model.generation_config.pad_token_id == 0
    assert AutoTokenizer.from_pretrained(out)("hi").input_ids == [1, 108, 109]
    config = read_json(out / "config.json")
    assert config["architectures"] == ["BltHfForCausalLM"] and config["mask_documents"] is True
    assert isinstance(config["patch_size"], int)  # the in-tree config takes nothing else
    for module in config["auto_map"].values():
        assert (out / f"{module.split('.')[0]}.py").is_file()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_pieces_smaller_than_a_tensor_change_nothing(source, tmp_path, monkeypatch):
    whole = all_tensors(convert_meta_checkpoint(source, tmp_path / "whole"))
    monkeypatch.setattr(convert_files, "_CHUNK_BYTES", 100)
    pieces = all_tensors(convert_meta_checkpoint(source, tmp_path / "pieces"))
    back = load_file(export_meta_checkpoint(tmp_path / "pieces", tmp_path / "back") / "model.safetensors")
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    assert all(torch.equal(tensor, back[name]) for name, tensor in load_file(source / "model.safetensors").items())


def test_shards(source, tmp_path):
    single = convert_meta_checkpoint(source, tmp_path / "single")
    sharded = convert_meta_checkpoint(source, tmp_path / "sharded", max_shard_size="10KB")
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    index = read_json(sharded / "model.safetensors.index.json")
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    for name, file in index["weight_map"].items():
        with safe_open(sharded / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118 (not a dict)
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in all_tensors(single).values())
    assert torch.equal(logits_of(sharded), logits_of(single))
    back = export_meta_checkpoint(sharded, tmp_path / "back")
    assert all(torch.equal(a, load_file(source / "model.safetensors")[n]) for n, a in all_tensors(back).items())


def test_dtypes(tmp_path):
    source = write_meta(tmp_path / "meta")
    tensors = load_file(source / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, source / "model.safetensors")

    kept = convert_meta_checkpoint(source, tmp_path / "kept")
    dtypes = {name: tensor.dtype for name, tensor in all_tensors(kept).items()}
    assert all(dtype == (torch.float32 if "patcher" in name else torch.bfloat16) for name, dtype in dtypes.items())
    assert read_json(kept / "config.json")["dtype"] == "bfloat16"

    for name in ("float32", "bfloat16", "float16"):
        out = convert_meta_checkpoint(source, tmp_path / name, dtype=name)
        assert {tensor.dtype for tensor in all_tensors(out).values()} == {getattr(torch, name)}
        assert read_json(out / "config.json")["dtype"] == name
    exact = all_tensors(tmp_path / "float32")["lm_head.weight"]
    assert torch.equal(exact, tensors["local_decoder.output.weight"].bfloat16().float())

    back = export_meta_checkpoint(kept, tmp_path / "back", dtype=torch.float32)
    assert {tensor.dtype for tensor in all_tensors(back).values()} == {torch.float32}


def test_a_dtype_that_cannot_hold_the_values_is_refused(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    tensors["local_decoder.norm.weight"][3] = 1e6
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"`model.local_decoder.norm.weight` holds values that torch.float16 cannot"):
        convert_meta_checkpoint(source, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "`dtype` = 'int8'.*auto, float32"),
        ({"max_shard_size": "big"}, "`max_shard_size` = 'big'"),
        ({"patching": "luck"}, "`patching` = 'luck'.*train_args, entropy_model, args"),
        ({"entropy_model": "/no/such/folder"}, "neither a folder nor a Hub id"),
    ],
)
def test_wrong_options(source, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        convert_meta_checkpoint(source, tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", r"config\.json is missing"),
        ("model.safetensors", "has no weights: expected model.safetensors"),
        ("entropy_model/params.json", r"entropy_model/config\.json is missing"),
        ("entropy_model/consolidated.pth", "entropy_model has no weights"),
    ],
)
def test_a_missing_file_is_named(source, tmp_path, file, message):
    (source / file).unlink()
    with pytest.raises(ValueError, match=message):
        convert_meta_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_kinds_of_source(source, tmp_path):
    with pytest.raises(ValueError, match="no_such_folder is neither a folder nor a Hub id"):
        convert_meta_checkpoint(tmp_path / "no_such_folder", tmp_path / "out")
    with pytest.raises(ValueError, match="no/such is not a folder, and cannot be downloaded from the Hub"):
        convert_meta_checkpoint("no/such", tmp_path / "out")
    converted = convert_meta_checkpoint(source, tmp_path / "converted")
    with pytest.raises(ValueError, match="no `args`.*it is a transformers checkpoint of type 'blt'"):
        convert_meta_checkpoint(converted, tmp_path / "out")
    with pytest.raises(ValueError, match="is of type None; expected 'blt'"):
        export_meta_checkpoint(source, tmp_path / "out")
    write_json(tmp_path / "entropy" / "config.json", {"args": ENTROPY_ARGS})
    with pytest.raises(ValueError, match="an entropy model belongs to --entropy-model"):
        convert_meta_checkpoint(tmp_path / "entropy", tmp_path / "out")
    with pytest.raises(ValueError, match="params.json has no `model`"):
        convert_meta_checkpoint(source / "entropy_model", tmp_path / "out")
    (source / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        convert_meta_checkpoint(source, tmp_path / "out")
    (source / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object; got list"):
        convert_meta_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize("tokenizer_args", [{"name": "tiktoken"}, {"name": "blt", "init_kwargs": {"bpe_delim": True}}])
def test_another_tokenizer_is_refused(source, tmp_path, tokenizer_args):
    train_args = read_json(source / "train_args.json")
    train_args["data"]["tokenizer_args"] = tokenizer_args
    write_json(source / "train_args.json", train_args)
    with pytest.raises(ValueError, match="`data.tokenizer_args`"):
        convert_meta_checkpoint(source, tmp_path / "out")


def test_wrong_tensors_are_named(source, tmp_path):
    path = source / "model.safetensors"
    tensors = load_file(path)

    def check(change: dict, message: str) -> None:
        changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            convert_meta_checkpoint(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    name = "local_decoder.norm.weight"
    check({name: None}, f"missing: `{name}`")
    check({"local_decoder.norm.bias": torch.zeros(8)}, "unexpected: `local_decoder.norm.bias`")
    check({name: torch.zeros(9)}, rf"`{name}` has shape \[9\]; its arguments say \[8\]")
    table = "encoder_hash_tok_embedding.1.weight"
    check({table: torch.zeros(30, 8)}, rf"`{table}` has shape \[30, 8\]; its arguments say \[29, 8\]")
    check({name: torch.zeros(8, dtype=torch.int64)}, f"`{name}` is I64; supported: F64, F32, F16, BF16")
    check({f"local_decoder.layers.{i}.extra": torch.zeros(1) for i in range(9)}, "and 4 more")


def test_damaged_files(source, tmp_path):
    path = source / "model.safetensors"
    whole = path.read_bytes()
    for part in (whole[:-4], whole[:100], b""):
        path.write_bytes(part)
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            convert_meta_checkpoint(source, tmp_path / "out")
    path.write_bytes(whole)
    path.write_bytes(whole.replace(b'"shape":[8]', b'"shape":[7]', 1))
    with pytest.raises(ValueError, match="does not lie inside"):
        convert_meta_checkpoint(source, tmp_path / "out")
    path.write_bytes(whole)
    pth = source / "entropy_model" / "consolidated.pth"
    torch.save({"model": {"norm.weight": torch.zeros(8, dtype=torch.int64)}}, pth)
    with pytest.raises(ValueError, match="`norm.weight` is torch.int64; supported: torch.float64"):
        convert_meta_checkpoint(source, tmp_path / "out")
    pth.write_bytes(pth.read_bytes()[:-300])
    with pytest.raises(ValueError, match="consolidated.pth cannot be read as a file of tensors"):
        convert_meta_checkpoint(source, tmp_path / "out")


class _Surprise:
    def __reduce__(self):
        return os.system, ("touch surprise",)


def test_a_pickle_that_is_more_than_tensors_is_not_run(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": _Surprise()}, source / "entropy_model" / "consolidated.pth")
    with pytest.raises(ValueError, match="weights_only"):
        convert_meta_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "surprise").exists()


def test_old_pth_files(source, tmp_path):
    """Torch's format before zip files, and the rotary tables that old code saved."""
    pth = source / "entropy_model" / "consolidated.pth"
    state = torch.load(pth)["model"] | {"rope_embeddings.freqs_cis": torch.zeros(4, 2, 2, 2)}
    expected = all_tensors(convert_meta_checkpoint(source, tmp_path / "new"))
    torch.save({"model": state}, pth, _use_new_zipfile_serialization=False)
    found = all_tensors(convert_meta_checkpoint(source, tmp_path / "old"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# ---- Whole or nothing ----


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("before", ["nothing", "something"])
def test_a_failure_in_the_middle_leaves_things_as_they_were(source, tmp_path, monkeypatch, error, before):
    out = tmp_path / "folder" / "out"
    if before == "something":
        write_json(out / "mine.json", {})

    def fail(*args, **kwargs):
        assert any(out.parent.glob(".out.*.partial/*.safetensors"))
        raise error

    monkeypatch.setattr(convert, "_write_card", fail)
    with pytest.raises(error):
        convert_meta_checkpoint(source, out, overwrite=True)
    assert [path.name for path in out.parent.iterdir()] == (["out"] if before == "something" else [])
    if before == "something":
        assert [path.name for path in out.iterdir()] == ["mine.json"]


def test_existing_folders(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    convert_meta_checkpoint(source, out)  # an empty folder is as good as none
    (out / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty; choose another folder or pass --overwrite"):
        convert_meta_checkpoint(source, out)
    convert_meta_checkpoint(source, out, overwrite=True)
    assert not (out / "mine.txt").exists() and (out / "config.json").exists()
    for target in (source, source.parent):
        with pytest.raises(ValueError, match="would replace the source"):
            convert_meta_checkpoint(source, target, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        convert_meta_checkpoint(source, out / "config.json", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"meta", "out"}


def test_a_full_disk_is_told_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_files.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(ValueError, match="GB are needed"):
        convert_meta_checkpoint(source, tmp_path / "out")


# ---- Layouts ----


@pytest.mark.parametrize("layout", ["params", "hub"])
def test_entropy_model_in_its_own_folder(source, tmp_path, layout):
    expected = logits_of(convert_meta_checkpoint(source, tmp_path / "expected"))
    entropy = (source / "entropy_model").rename(tmp_path / "entropy")
    with pytest.raises(ValueError, match="needs an entropy model"):
        convert_meta_checkpoint(source, tmp_path / "out")
    if layout == "hub":  # as facebook/blt-entropy: the loaded model's arguments
        state = torch.load(entropy / "consolidated.pth")["model"]
        args = read_json(entropy / "params.json")["entropy_model"] | {"sliding_window": 512, "init_dtype": "bf16"}
        entropy = tmp_path / "hub"
        write_json(entropy / "config.json", {"args": args})
        save_file(state, entropy / "model.safetensors")
    out = convert_meta_checkpoint(source, tmp_path / "out", entropy_model=entropy)
    assert torch.equal(logits_of(out), expected)

    back = export_meta_checkpoint(out, tmp_path / "back")
    assert read_json(back / "config.json") == read_json(source / "config.json")
    name = "config.json" if layout == "hub" else "params.json"
    assert read_json(back / "entropy_model" / name) == read_json(entropy / name)
    assert torch.equal(logits_of(convert_meta_checkpoint(back, tmp_path / "again")), expected)


def test_hub_layout_of_the_entropy_model_is_honoured_in_full(source, tmp_path):
    args = ENTROPY_ARGS | {"multiple_of": 8, "rope_theta": 500000.0, "norm_eps": 1e-6, "sliding_window": 9}
    entropy = tmp_path / "entropy"
    write_json(entropy / "config.json", {"args": args})
    save_file(meta_tensors(args, entropy=True), entropy / "model.safetensors")
    out = convert_meta_checkpoint(source, tmp_path / "out", entropy_model=entropy)
    patcher = BltConfig.from_pretrained(out).patcher_config
    assert (patcher.intermediate_size, patcher.rms_norm_eps, patcher.sliding_window) == (24, 1e-6, 9)
    assert patcher.rope_parameters["rope_theta"] == 500000.0
    with pytest.warns(UserWarning, match="LMTransformer.from_pretrained"):
        back = export_meta_checkpoint(out, tmp_path / "back")
    assert read_json(back / "entropy_model" / "config.json") == {"args": args}
    write_json(entropy / "config.json", {"args": args | {"attn_bias_type": "causal"}})
    with pytest.raises(ValueError, match="`entropy_model.attn_bias_type` = 'causal'"):
        convert_meta_checkpoint(source, tmp_path / "out2", entropy_model=entropy)


def test_a_model_that_needs_no_entropy_model(tmp_path):
    source = write_meta(tmp_path / "meta", entropy=False)
    train_args = read_json(source / "train_args.json")
    train_args["data"]["patcher_args"]["patching_mode"] = "space"
    write_json(source / "train_args.json", train_args)
    out = convert_meta_checkpoint(source, tmp_path / "out")
    assert BltConfig.from_pretrained(out).patch_in_forward is False
    assert logits_of(out).isfinite().all()
    back = export_meta_checkpoint(out, tmp_path / "back")
    assert not (back / "entropy_model").exists()
    assert read_json(back / "train_args.json") == train_args


def test_a_model_without_hash_embeddings(tmp_path):
    source = write_meta(tmp_path / "meta", encoder_hash_byte_group_size=None)
    out = convert_meta_checkpoint(source, tmp_path / "out")
    assert all_tensors(out)["model.encoder_hash_tok_embedding.weight"].shape == (0, 8)
    assert logits_of(out).isfinite().all()
    back = export_meta_checkpoint(out, tmp_path / "back")
    assert read_json(back / "config.json") == read_json(source / "config.json")
    assert all_tensors(back).keys() == load_file(source / "model.safetensors").keys()


def test_a_consolidated_run_of_metas_trainer(source, tmp_path):
    expected = logits_of(convert_meta_checkpoint(source, tmp_path / "expected"))
    torch.save({"model": load_file(source / "model.safetensors")}, source / "consolidated.pth")
    (source / "train_args.json").rename(source / "params.json")
    for name in ("config.json", "model.safetensors"):
        (source / name).unlink()
    out = convert_meta_checkpoint(source, tmp_path / "out")
    assert torch.equal(logits_of(out), expected)


def test_sharded_weights_of_metas(source, tmp_path):
    expected = logits_of(convert_meta_checkpoint(source, tmp_path / "expected"))
    tensors = list(load_file(source / "model.safetensors").items())
    (source / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((tensors[::2], tensors[1::2])):
        save_file(dict(part), source / f"model-{number}.safetensors")
        weight_map |= {name: f"model-{number}.safetensors" for name, _ in part}
    write_json(source / "model.safetensors.index.json", {"weight_map": weight_map})
    assert torch.equal(logits_of(convert_meta_checkpoint(source, tmp_path / "out")), expected)
    (source / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-1.safetensors is missing; model.safetensors.index.json names it"):
        convert_meta_checkpoint(source, tmp_path / "out2")


def test_files_that_disagree_about_patching(source, tmp_path):
    params = read_json(source / "entropy_model" / "params.json")
    params["data"]["patcher_args"]["threshold"] = 1.5
    write_json(source / "entropy_model" / "params.json", params)
    with pytest.warns(UserWarning, match="train_args says .*3.0.*used.*entropy_model says .*1.5.*--patching"):
        out = convert_meta_checkpoint(source, tmp_path / "auto")
    assert BltConfig.from_pretrained(out).patching_threshold == 3.0
    assert "Patching settings disagree" in (out / "README.md").read_text()
    with pytest.warns(UserWarning, match="entropy_model says .*1.5.*used"):
        out = convert_meta_checkpoint(source, tmp_path / "entropy", patching="entropy_model")
    assert BltConfig.from_pretrained(out).patching_threshold == 1.5
    back = export_meta_checkpoint(out, tmp_path / "back")
    for file in ("config.json", "train_args.json", "entropy_model/params.json"):
        assert read_json(back / file) == read_json(source / file)


def test_patch_in_forward_is_noted(source, tmp_path):
    args = read_json(source / "config.json")["args"] | {"patch_in_forward": True}
    write_json(source / "config.json", {"args": args})
    with pytest.warns(UserWarning, match="Meta's model patches with its default threshold, 1.335442066192627"):
        out = convert_meta_checkpoint(source, tmp_path / "out")
    assert BltConfig.from_pretrained(out).patching_threshold == 3.0


# ---- To Meta ----


def make_native(tmp_path, **overrides) -> Path:
    """A model made here, with an entropy model that Meta's loader can build."""
    overrides = {
        "patcher_config": {"intermediate_size": 256, "sliding_window": 512},
        "mask_documents": True,
    } | overrides
    model = make_model(tiny_config(**overrides))
    model.save_pretrained(tmp_path / "native")
    return tmp_path / "native"


def test_a_model_made_here_goes_to_meta_and_back(tmp_path):
    native = make_native(tmp_path)
    meta = export_meta_checkpoint(native, tmp_path / "meta")
    args = read_json(meta / "config.json")["args"]
    assert set(args) == set(convert_arguments._MODEL_DEFAULTS)
    assert args["attn_bias_type"] == "block_causal" and args["cross_attn_encoder"] is True
    assert read_json(meta / "train_args.json")["model"] == args
    back = convert_meta_checkpoint(meta, tmp_path / "back")
    assert torch.equal(logits_of(back), logits_of(native))
    before, after = all_tensors(native), all_tensors(back)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_checkpoint_of_the_in_tree_class_goes_to_meta(tmp_path):
    config = tiny_config(patcher_config={"intermediate_size": 256}, local_attention_window_len=16).to_dict()
    in_tree = {name: config[name] for name in in_tree_blt.BltConfig().to_dict() if name in config}
    torch.manual_seed(0)
    model = in_tree_blt.BltForCausalLM(in_tree_blt.BltConfig(**in_tree)).eval()
    model.config.encoder_config.sliding_window = 16
    model.save_pretrained(tmp_path / "in_tree")
    with pytest.warns(UserWarning):
        meta = export_meta_checkpoint(tmp_path / "in_tree", tmp_path / "meta")
    back = convert_meta_checkpoint(meta, tmp_path / "back")
    tensors = all_tensors(back)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())


def test_fine_tuned_weights_and_settings_go_back_with_the_kept_arguments(source, tmp_path):
    converted = convert_meta_checkpoint(source, tmp_path / "converted")
    model = BltForCausalLM.from_pretrained(converted)
    model.config.patching_threshold = 2.25
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path / "tuned")
    kept = converted / "meta_args.json"
    back = export_meta_checkpoint(tmp_path / "tuned", tmp_path / "back", meta_args=kept)
    for file in ("train_args.json", "entropy_model/params.json"):
        assert read_json(back / file)["data"]["patcher_args"] == PATCHER_ARGS | {"threshold": 2.25}
    assert read_json(back / "config.json")["args"] == ARGS | {"patching_threshold": 2.25}
    assert read_json(back / "train_args.json")["steps"] == 7
    name = "local_decoder.output.weight"
    assert torch.equal(all_tensors(back)[name], 2 * load_file(source / "model.safetensors")[name])


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"patching_newline_reset": True}, "patching_newline_reset"),
        ({"local_attention_window_len": None}, "local_attention_window_len"),
        ({"decoder_config": {"rms_norm_eps": 1e-6}}, "decoder_config.rms_norm_eps"),
        ({"decoder_config": {"num_cross_attention_heads": 4}}, "decoder_config.cross_attention_heads"),
        ({"encoder_config": {"num_key_value_heads": 1}}, "encoder_config.cross_attention_heads"),
        ({"global_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}}, "global_config.rope"),
        ({"global_config": {"hidden_act": "gelu"}}, "global_config.hidden_act"),
        ({"encoder_config": {"intermediate_size": 1000}}, "intermediate_size"),
        ({"patcher_config": {"intermediate_size": 256, "sliding_window": None}}, "patcher_config.sliding_window"),
    ],
)
def test_what_metas_format_cannot_express_is_named(tmp_path, overrides, field):
    native = make_native(tmp_path, **overrides)
    with pytest.raises(ValueError, match=field):
        export_meta_checkpoint(native, tmp_path / "meta")
    assert not (tmp_path / "meta").exists()


def test_export_tells_what_metas_code_will_not_honour(tmp_path):
    native = make_native(
        tmp_path, mask_documents=False, patcher_config={"intermediate_size": 256, "sliding_window": 12}
    )
    with pytest.warns(UserWarning) as told:
        export_meta_checkpoint(native, tmp_path / "meta")
    messages = [str(warning.message) for warning in told]
    assert any("`mask_documents` is False" in message for message in messages)
    assert any("`patcher_config.sliding_window` is 12" in message for message in messages)


# ---- The card ----


def test_the_card_names_the_source_and_its_licence(source, tmp_path):
    card = (convert_meta_checkpoint(source, tmp_path / "a") / "README.md").read_text()
    assert "`meta`" in card and "states no licence" in card and "\nlicense" not in card
    assert "`mask_documents` is true" in card and "threshold 3.0" in card
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: my-terms\nlicense_link: https://x.org\n---\n"
    )
    (source / "LICENSE").write_text("Be kind.")
    out = convert_meta_checkpoint(source, tmp_path / "b")
    card = (out / "README.md").read_text()
    assert "license_name: my-terms" in card and "`my-terms` (https://x.org)" in card
    assert (out / "LICENSE").read_text() == "Be kind."


def test_the_card_of_metas_own_weights():
    opened = convert._Source("facebook/blt-7b", Path("/nowhere"), {}, {})
    metadata, sentence = convert._licence(opened)
    assert metadata["license"] == "other" and "blt-7b/blob/main/LICENSE" in metadata["license_link"]
    assert "FAIR Noncommercial Research License" in sentence


# ---- The command ----


def test_command(source, tmp_path):
    def run(*arguments) -> str:
        result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
        return f"{result.exit_code} {result.output} {result.stderr}"

    assert run(source, tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "20KB").startswith("0 ")
    assert all(tensor.dtype == torch.bfloat16 for tensor in all_tensors(tmp_path / "out").values())
    assert run(tmp_path / "out", tmp_path / "back", "--to", "meta", "--quiet").startswith("0 ")
    assert read_json(tmp_path / "back" / "config.json") == read_json(source / "config.json")

    refused = run(source, tmp_path / "out")
    assert refused.startswith("1 ") and "error: OUT" in refused and "Traceback" not in refused
    assert run(source, tmp_path / "out", "--overwrite").startswith("0 ")
    for options, message in (
        (["--to", "meta", "--entropy-model", "x/y"], "--entropy-model has no meaning with --to meta"),
        (["--to", "meta", "--max-shard-size", "1GB"], "--max-shard-size has no meaning"),
        (["--to", "meta", "--patching", "args"], "--patching has no meaning"),
        (["--meta-args", "x.json"], "--meta-args has a meaning with --to meta only"),
    ):
        assert message in run(source, tmp_path / "new", *options)
    assert run(source, tmp_path / "new", "--dtype", "int8").startswith("2 ")


def test_a_hub_id_through_the_command(source, tmp_path):
    """Against a local server, in a process of its own, since huggingface_hub reads its settings when imported."""
    (source / "vectors.bin").write_bytes(b"not needed")
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    files = {str(path.relative_to(source)): path.read_bytes() for path in source.rglob("*") if path.is_file()}
    with HubServer() as hub:
        hub.add("tiny/blt", files)
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-m", "blt_hf.cli", "convert"]
        command += ["tiny/blt", str(tmp_path / "out"), "--revision", "main"]
        result = run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    downloaded = {path.name for path in (tmp_path / "home").rglob("*")}
    assert "model.safetensors" in downloaded and "vectors.bin" not in downloaded
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: tiny/blt" in card and "license: mit" in card
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(convert_meta_checkpoint(source, tmp_path / "local")))


# ---- The page ----


def test_the_pages_commands_run(tmp_path, monkeypatch):
    """Blocks from "Try it without a download" on: Python as it stands, `bash` line by line."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "converting.md").read_text()
    blocks = [block.split("\n", 1) for block in page.split("## Try it without a download")[1].split("```")[1::2]]
    assert [language for language, _ in blocks] == ["python", "bash", "python", "console"]
    for language, content in blocks:
        if language == "python":
            exec(content, {})
        for line in content.splitlines() if language == "bash" else []:
            result = CliRunner().invoke(app, line.removeprefix("blt-hf ").split())
            assert result.exit_code == 0, f"{line}: {result.stderr}"
    assert len(list((tmp_path / "small-again").glob("model-*.safetensors"))) > 2
    assert all_tensors(tmp_path / "small-bf16")["lm_head.weight"].dtype == torch.bfloat16
