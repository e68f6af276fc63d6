#!/usr/bin/env python3
"""Writes a checkpoint with DeepSeek-V3's dimensions, cut to a dense layer and a layer of experts, with random weights.

usage: gpu_weights.py CONFIG FOLDER [EXPERTS]

CONFIG is bench/src/engine/v3.json. With its 256 experts it is 16 GB; where FOLDER lies in memory (/dev/shm), loading it shows what
reading, staging and copying take without a disk.
"""

import json, os, struct, sys

config_path, folder = sys.argv[1], sys.argv[2]
config = json.load(open(config_path))
config["num_hidden_layers"] = 2
config["num_nextn_predict_layers"] = 0
config["n_routed_experts"] = int(sys.argv[3]) if len(sys.argv) > 3 else config["n_routed_experts"]
os.makedirs(folder, exist_ok=True)
json.dump(config, open(f"{folder}/config.json", "w"))
hidden, heads, latent, rope = (config[k] for k in ("hidden_size", "num_attention_heads", "kv_lora_rank", "qk_rope_head_dim"))
nope, value, query = config["qk_nope_head_dim"], config["v_head_dim"], config["q_lora_rank"]
tensors = []


def plain(name, *shape):
    tensors.append((name, "BF16", shape))


def matrix(name, rows, columns):
    tensors.append((name, "F8_E4M3", (rows, columns)))
    tensors.append((f"{name}_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))))


def mlp(prefix, width):
    matrix(f"{prefix}gate_proj.weight", width, hidden)
    matrix(f"{prefix}up_proj.weight", width, hidden)
    matrix(f"{prefix}down_proj.weight", hidden, width)


plain("model.embed_tokens.weight", config["vocab_size"], hidden)
plain("model.norm.weight", hidden)
plain("lm_head.weight", config["vocab_size"], hidden)
for layer in range(2):
    prefix = f"model.layers.{layer}."
    plain(f"{prefix}input_layernorm.weight", hidden)
    plain(f"{prefix}post_attention_layernorm.weight", hidden)
    attention = f"{prefix}self_attn."
    matrix(f"{attention}q_a_proj.weight", query, hidden)
    plain(f"{attention}q_a_layernorm.weight", query)
    matrix(f"{attention}q_b_proj.weight", heads * (nope + rope), query)
    matrix(f"{attention}kv_a_proj_with_mqa.weight", latent + rope, hidden)
    plain(f"{attention}kv_a_layernorm.weight", latent)
    matrix(f"{attention}kv_b_proj.weight", heads * (nope + value), latent)
    matrix(f"{attention}o_proj.weight", hidden, heads * value)
    if layer == 0:
        mlp(f"{prefix}mlp.", config["intermediate_size"])
        continue
    plain(f"{prefix}mlp.gate.weight", config["n_routed_experts"], hidden)
    tensors.append((f"{prefix}mlp.gate.e_score_correction_bias", "F32", (config["n_routed_experts"],)))
    mlp(f"{prefix}mlp.shared_experts.", config["moe_intermediate_size"] * config["n_shared_experts"])
    for expert in range(config["n_routed_experts"]):
        mlp(f"{prefix}mlp.experts.{expert}.", config["moe_intermediate_size"])

# Codes without NaN, bf16 values of moderate size, small scales: anything finite will do.
noise = os.urandom(64 << 20)
pieces = {
    "F8_E4M3": noise.translate(bytes(i & 0xBF for i in range(256))),
    "BF16": b"".join(struct.pack("<H", 0x3C00 | noise[i]) for i in range(1 << 16)) * 256,
    "F32": struct.pack("<f", 0.01) * (1 << 20),
}
width = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
header, offset = {}, 0
for name, kind, shape in tensors:
    size = width[kind]
    for extent in shape:
        size *= extent
    header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, offset + size]}
    offset += size
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
with open(f"{folder}/model.safetensors", "wb", buffering=0) as out:
    out.write(struct.pack("<Q", len(text)) + text)
    for name, kind, _ in tensors:
        begin, end = header[name]["data_offsets"]
        piece = memoryview(pieces[kind])
        while begin < end:
            begin += out.write(piece[: min(len(piece), end - begin)])
print(f"{offset / 1e9:.1f} GB in {folder}")
