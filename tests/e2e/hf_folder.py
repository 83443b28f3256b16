"""Makes of a GGUF of the llama architecture the same model twice: a Hugging Face folder, written with Hugging Face's
own `safetensors` and `tokenizers`, and a GGUF with the weights that the folder has (matrices rounded to bf16).
"""
import json
import pathlib
import sys

import gguf
import safetensors

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "model"))
import tokenizer_vs_hf  # noqa: E402

BF16 = gguf.GGMLQuantizationType.BF16
LAYER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
         "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
       "output.weight": "lm_head.weight"}


def hf_name(name):
    if name in TOP:
        return TOP[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER[part]}.{kind}"


def rows_in_halves(weights, heads):
    """Undoes the reordering of GGUF's converters: pairs (2i, 2i + 1) of a head become (i, i + half)."""
    rows, columns = weights.shape
    return weights.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def config_of(field, tensors):
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
            "hidden_size": field("llama.embedding_length"), "intermediate_size": field("llama.feed_forward_length"),
            "num_hidden_layers": field("llama.block_count"), "num_attention_heads": field("llama.attention.head_count"),
            "num_key_value_heads": field("llama.attention.head_count_kv"), "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": field("llama.context_length"), "rope_theta": field("llama.rope.freq_base"), "rope_scaling": None,
            "tie_word_embeddings": "output.weight" not in tensors, "vocab_size": field("llama.vocab_size"), "torch_dtype": "bfloat16",
            "bos_token_id": field("tokenizer.ggml.bos_token_id"), "eos_token_id": field("tokenizer.ggml.eos_token_id")}


def write_tokenizer(path, folder, field):
    tokenizer, _ = tokenizer_vs_hf.reference(tokenizer_vs_hf.read_metadata(path))
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = field("tokenizer.ggml.tokens")
    config = {"bos_token": tokens[field("tokenizer.ggml.bos_token_id")], "eos_token": tokens[field("tokenizer.ggml.eos_token_id")],
              "chat_template": field("tokenizer.chat_template")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def copy_keys(reader, writer):
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        of = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, of)


def write_shards(folder, tensors):
    """`tensors`: (name, dtype, shape, array of the bytes). Two files and their index."""
    half = len(tensors) // 2
    places = {}
    for number, part in enumerate((tensors[:half], tensors[half:]), 1):
        name = f"model-{number:05}-of-00002.safetensors"
        specs = {key: safetensors.TensorSpec(dtype=dtype, shape=shape, data_ptr=data.ctypes.data, data_len=data.nbytes)
                 for key, dtype, shape, data in part}
        safetensors.serialize_file(specs, str(folder / name), {"format": "pt"})
        places.update({key: name for key, *_ in part})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def make(path, folder, out):
    """`path`: the GGUF to begin with; `folder` gets the Hugging Face files, `out` is the other GGUF."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    reader = gguf.GGUFReader(path)
    names = {tensor.name for tensor in reader.tensors}

    def field(name):
        return reader.get_field(name).contents()

    writer = gguf.GGUFWriter(out, "llama")
    copy_keys(reader, writer)
    shards = []
    for tensor in reader.tensors:
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        if weights.ndim == 1:
            writer.add_tensor(tensor.name, weights)
            shards.append((hf_name(tensor.name), "float32", list(weights.shape), weights))
            continue
        writer.add_tensor(tensor.name, gguf.quantize(weights, BF16), raw_dtype=BF16)
        heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}.get(tensor.name.split(".")[-2])
        if heads:
            weights = rows_in_halves(weights, field(heads))
        shards.append((hf_name(tensor.name), "bfloat16", list(weights.shape), gguf.quantize(weights, BF16)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_shards(folder, shards)
    (folder / "config.json").write_text(json.dumps(config_of(field, names)))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [field("tokenizer.ggml.eos_token_id")]}))
    write_tokenizer(path, folder, field)
