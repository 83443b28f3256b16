"""The llama architecture in float64 on a GGUF file's dequantised weights, and what a comparison with it
needs; run by accuracy.

    reference.py widths MODEL                   prints whether all rows are multiples of 256; ends with 1 and a
                                                line where the reference does not know MODEL
    reference.py pad MODEL TOKENS OUT           an F32 file of the same function whose rows are multiples of 256
    reference.py compare MODEL TOKENS LOGITS... prints {"types": the matrices', "tokens": for each file of float32
                                                logits [tokens][vocabulary], {"kl": of each token, "missed": whether
                                                its best next token is another}}

kl is KL(reference || file) in nats, in float64. TOKENS is a file of ids, one a line.
"""
import json
import pathlib
import sys

import gguf
import numpy as np

ROWS = 64  # logits handled at a time
CHECKED = 64  # tokens that a padded model is compared on
# KL of a padded model: its norms' weights are rounded to float32 once more, 2e-13 in SmolLM2-135M. Without the
# padded eps it is above.
EQUAL = 1e-11
UNKNOWN = ("attn_q_norm", "attn_k_norm", "ffn_gate_exps", "rope_freqs", "bias")


class Model:
    def __init__(self, path):
        self.reader = gguf.GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        architecture = self.field("general.architecture")
        odd = [name for name in self.tensors if any(part in name for part in UNKNOWN)]
        scaled = self.field("llama.rope.scaling.type", "none") != "none"
        if architecture != "llama" or odd or scaled:
            what = odd[0] if odd else "scaled rope" if scaled else architecture
            sys.exit(f"{path}: the reference knows the plain llama architecture only, this has {what}")
        self.layers = self.field("llama.block_count")
        self.hidden = self.field("llama.embedding_length")
        self.heads = self.field("llama.attention.head_count")
        self.kv_heads = self.field("llama.attention.head_count_kv", self.heads)
        self.head_dim = self.field("llama.attention.key_length", self.hidden // self.heads)
        self.feed_forward = self.field("llama.feed_forward_length")
        self.rope_dims = self.field("llama.rope.dimension_count", self.head_dim)
        self.rope_base = self.field("llama.rope.freq_base", 10000.0)
        self.eps = self.field("llama.attention.layer_norm_rms_epsilon")

    def field(self, name, otherwise=None):
        field = self.reader.get_field(name)
        if field is None and otherwise is None:
            sys.exit(f"GGUF key {name} is missing")
        return otherwise if field is None else field.contents()

    def weight(self, name, dtype=np.float64):
        tensor = self.tensors[name]
        return gguf.dequantize(tensor.data, tensor.tensor_type).astype(dtype)

    def logits(self, tokens):
        """[tokens][vocabulary]"""
        embedding = self.weight("token_embd.weight")
        output = self.weight("output.weight") if "output.weight" in self.tensors else embedding
        cos, sin = self.angles(len(tokens))
        x = embedding[tokens]
        for layer in range(self.layers):
            def w(name):
                return self.weight(f"blk.{layer}.{name}.weight")
            h = self.norm(x, w("attn_norm"))
            q, k, v = (self.split(h @ w(f"attn_{name}").T) for name in "qkv")
            x = x + self.attend(rotate(q, cos, sin), rotate(k, cos, sin), v) @ w("attn_output").T
            h = self.norm(x, w("ffn_norm"))
            gate = h @ w("ffn_gate").T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w("ffn_up").T)) @ w("ffn_down").T
        return self.norm(x, self.weight("output_norm.weight")) @ output.T

    def norm(self, x, weight):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.eps) * weight

    def split(self, x):
        """[heads][tokens][head_dim]"""
        return x.reshape(len(x), -1, self.head_dim).transpose(1, 0, 2)

    def angles(self, tokens):
        frequencies = self.rope_base ** (-np.arange(0, self.rope_dims, 2) / self.rope_dims)
        angles = np.outer(np.arange(tokens), frequencies)
        return np.cos(angles), np.sin(angles)

    def attend(self, q, k, v):
        tokens = q.shape[1]
        later = np.triu(np.full((tokens, tokens), -np.inf), 1)
        out = np.empty_like(q)
        for head in range(self.heads):
            kv = head // (self.heads // self.kv_heads)
            scores = q[head] @ k[kv].T / np.sqrt(self.head_dim) + later
            p = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[head] = p / p.sum(axis=-1, keepdims=True) @ v[kv]
        return out.transpose(1, 0, 2).reshape(tokens, -1)


def rotate(x, cos, sin):
    """Pairs of neighbours, as the llama architecture's files have them."""
    out = x.copy()
    even, odd = x[..., 0:2 * cos.shape[1]:2], x[..., 1:2 * cos.shape[1]:2]
    out[..., 0:2 * cos.shape[1]:2] = even * cos - odd * sin
    out[..., 1:2 * cos.shape[1]:2] = even * sin + odd * cos
    return out


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def divergences(reference, logits):
    """KL of each row, and whether the best token is the same."""
    kls, same = [], []
    for at in range(0, len(reference), ROWS):
        p, q = (log_softmax(x[at:at + ROWS].astype(np.float64)) for x in (reference, logits))
        kls.append((np.exp(p) * (p - q)).sum(axis=-1))
        same.append(p.argmax(axis=-1) == q.argmax(axis=-1))
    return np.concatenate(kls), np.concatenate(same)


def read_tokens(path):
    return [int(line) for line in pathlib.Path(path).read_text().split()]


def compare(path, tokens_path, files):
    tokens = read_tokens(tokens_path)
    model = Model(path)
    reference = model.logits(tokens)
    answers = []
    for file in files:
        logits = np.memmap(file, np.float32, "r")
        if logits.size != reference.size:
            sys.exit(f"{file} has {logits.size} logits, the reference {reference.size}")
        kls, same = divergences(reference, logits.reshape(reference.shape))
        answers.append({"kl": kls.tolist(), "missed": (~same).tolist()})
    types = {tensor.tensor_type.name for tensor in model.tensors.values() if len(tensor.shape) > 1}
    print(json.dumps({"types": sorted(types), "tokens": answers}))


def round_up(value, multiple):
    return -(-value // multiple) * multiple


def widths(path):
    model = Model(path)
    sizes = (model.hidden, model.heads * model.head_dim, model.feed_forward)
    print(json.dumps(all(size % 256 == 0 for size in sizes)))


def pad(path, tokens_path, out):
    """Zeros in all that is new: dimensions of the residual stream, heads with their kv heads, columns of the
    feed-forward. The mean square of a norm shrinks as its width grows, so its weight and eps do as well."""
    model = Model(path)
    group = model.heads // model.kv_heads
    kv_heads = model.kv_heads
    while kv_heads * group * model.head_dim % 256 != 0:
        kv_heads += 1
    heads, hidden = kv_heads * group, round_up(model.hidden, 256)
    if "llama.attention.key_length" not in model.reader.fields and hidden != heads * model.head_dim:
        sys.exit(f"{path}: a head's size would not be hidden / heads any more")
    feed_forward = round_up(model.feed_forward, 256)
    shrink = model.hidden / hidden
    new = {"llama.embedding_length": hidden, "llama.attention.head_count": heads,
           "llama.attention.head_count_kv": kv_heads, "llama.feed_forward_length": feed_forward,
           "llama.attention.layer_norm_rms_epsilon": model.eps * shrink}
    q_rows, kv_rows = heads * model.head_dim, kv_heads * model.head_dim
    shapes = {"attn_q": (q_rows, hidden), "attn_k": (kv_rows, hidden), "attn_v": (kv_rows, hidden),
              "attn_output": (hidden, q_rows), "ffn_gate": (feed_forward, hidden), "ffn_up": (feed_forward, hidden),
              "ffn_down": (hidden, feed_forward), "attn_norm": (hidden,), "ffn_norm": (hidden,),
              "output_norm": (hidden,)}
    writer = gguf.GGUFWriter(out, "llama")
    for field in model.reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, new.get(field.name, field.contents()), field.types[0], sub_type=inner)
    for name in model.tensors:
        values = model.weight(name, np.float32)
        kind = name.removesuffix(".weight").split(".")[-1]
        if kind.endswith("norm"):
            values = (values.astype(np.float64) * np.sqrt(shrink)).astype(np.float32)
        shape = shapes.get(kind, (len(values), hidden))
        writer.add_tensor(name, np.pad(values, [(0, to - size) for size, to in zip(values.shape, shape)]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokens = read_tokens(tokens_path)[:CHECKED]
    a, b = model.logits(tokens), Model(out).logits(tokens)
    kl = divergences(a, b)[0].max()
    print(f"padded: KL at most {kl:.1e}, logits at most {np.abs(a - b).max():.1e} apart on {len(tokens)} tokens")
    if not kl < EQUAL:
        sys.exit(f"{path} is another function when padded: KL {kl:.1e}")


def main():
    what, *rest = sys.argv[1:]
    if what == "compare":
        compare(rest[0], rest[1], rest[2:])
    else:
        {"widths": widths, "pad": pad}[what](*rest)


if __name__ == "__main__":
    main()
