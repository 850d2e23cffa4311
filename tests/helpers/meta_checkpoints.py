"""Tiny checkpoints in Meta's layout."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


ARGS = {
    "vocab_size": 260, "max_seqlen": 64, "max_encoder_seq_length": 128, "dim_global": 16, "dim_local_encoder": 8,
    "dim_local_decoder": 8, "n_layers_global": 1, "n_layers_local_encoder": 1, "n_layers_local_decoder": 2,
    "n_heads_global": 2, "n_heads_local_encoder": 2, "n_heads_local_decoder": 2, "multiple_of": 8,
    "rope_theta": 500000.0, "local_attention_window_len": 16, "use_local_encoder_transformer": True,
    "cross_attn_encoder": True, "cross_attn_decoder": True, "cross_attn_k": 2, "cross_attn_nheads": 2,
    "cross_attn_all_layers_decoder": True, "cross_attn_init_by_pooling": True, "downsampling_by_pooling": "max",
    "encoder_hash_byte_group_size": [3, 4], "encoder_hash_byte_group_vocab": 29,
    "encoder_hash_byte_group_nb_functions": 1, "attn_bias_type": "block_causal", "attn_impl": "xformers",
    "patch_size": 4.5, "patching_mode": "entropy", "patching_threshold": 3.0, "dump_dir": None,
}  # fmt: skip


PATCHER_ARGS = {"patching_mode": "entropy", "threshold": 3.0, "patch_size": 4.5}


ENTROPY_ARGS = {"dim": 8, "n_layers": 1, "n_heads": 2, "vocab_size": 260, "max_seqlen": 64, "ffn_dim_multiplier": 1.0}


def meta_tensors(args: dict, entropy: bool = False, seed: int = 0, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Random tensors under Meta's names, spelled out here once more."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}

    def add(name, *shape):
        tensors[f"{name}.weight"] = torch.randn(*shape, generator=generator).to(dtype)

    def add_layers(stem, dim, count, multiple_of, kv_heads, heads):
        inner = -(-int(8 * dim / 3) // multiple_of) * multiple_of
        for layer in range(count):
            prefix = f"{stem}layers.{layer}."
            for name, rows in (
                ("wq", dim),
                ("wk", dim * kv_heads // heads),
                ("wv", dim * kv_heads // heads),
                ("wo", dim),
            ):
                add(f"{prefix}attention.{name}", rows, dim)
            add(f"{prefix}feed_forward.w1", inner, dim)
            add(f"{prefix}feed_forward.w2", dim, inner)
            add(f"{prefix}feed_forward.w3", inner, dim)
            add(f"{prefix}attention_norm", dim)
            add(f"{prefix}ffn_norm", dim)

    if entropy:
        add("tok_embeddings", 260, args["dim"])
        add_layers("", args["dim"], args["n_layers"], args.get("multiple_of", 256), 1, 1)
        add("norm", args["dim"])
        add("output", 260, args["dim"])
        return tensors
    for table in range(len(args["encoder_hash_byte_group_size"] or []) * args["encoder_hash_byte_group_nb_functions"]):
        add(f"encoder_hash_tok_embedding.{table}", args["encoder_hash_byte_group_vocab"], args["dim_local_encoder"])
    pooled = args["dim_local_encoder"] * args["cross_attn_k"]
    for part in ("global_transformer", "local_encoder", "local_decoder"):
        key = part.removesuffix("_transformer")
        heads = args[f"n_heads_{key}"]
        kv_heads = args.get("n_kv_heads_global" if key == "global" else "n_kv_heads") or heads
        add_layers(f"{part}.", args[f"dim_{key}"], args[f"n_layers_{key}"], args["multiple_of"], kv_heads, heads)
        if key != "global":
            count = args[f"n_layers_{key}"] if args.get(f"cross_attn_all_layers_{key.split('_')[1]}") else 1
            for layer in range(count):
                for name in ("wq", "wk", "wv", "wo"):
                    add(f"{part}.cross_attn_layers.{layer}.{name}", args[f"dim_{key}"], args[f"dim_{key}"])
                for name in ("cross_attn_norm_q", "cross_attn_norm_kv"):
                    add(f"{part}.cross_attn_layers.{layer}.{name}", args[f"dim_{key}"])
    if pooled != args["dim_global"]:
        add("global_transformer.token_embedding_projection", args["dim_global"], pooled)
    add("local_encoder.tok_embeddings", 260, args["dim_local_encoder"])
    add("local_encoder.patch_embedding_projection", pooled, args["dim_local_encoder"])
    add("local_decoder.patch_embedding_projection", pooled, args["dim_global"])
    add("local_decoder.norm", args["dim_local_decoder"])
    add("local_decoder.output", 260, args["dim_local_decoder"])
    return tensors


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def read_json(path: Path):
    return json.loads(path.read_text())


def write_meta(folder: Path, entropy: bool = True, dtype=torch.float32, **overrides) -> Path:
    """A tiny checkpoint in Meta's layout."""
    args = {**ARGS, **overrides}
    data = {"patcher_args": PATCHER_ARGS, "tokenizer_args": {"name": "blt", "init_kwargs": None}}
    write_json(folder / "config.json", {"args": args})
    write_json(folder / "train_args.json", {"name": "run", "steps": 7, "data": data, "model": args})
    save_file(meta_tensors(args, dtype=dtype), folder / "model.safetensors")
    if entropy:
        write_json(folder / "entropy_model" / "params.json", {"data": data, "entropy_model": ENTROPY_ARGS})
        state = {"model": meta_tensors(ENTROPY_ARGS, entropy=True, seed=1, dtype=dtype)}
        torch.save(state, folder / "entropy_model" / "consolidated.pth")
    return folder
