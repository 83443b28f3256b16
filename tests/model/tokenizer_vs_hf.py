#!/usr/bin/env python3
"""Compares our token ids with those of Hugging Face `tokenizers` for the four pre-tokenizers.

    tokenizer_vs_hf.py --tokenize build/.../antiphon_tokenize --cache build/cache [--strings 1500]

The reference is built from each GGUF's own vocabulary and merges, with the pre-tokenizer that the
family's tokenizer.json has. Vocabularies of gpt-2, llama-bpe and qwen2, with vectors, come from the
pinned source package of llama-cpp-python; smollm's is in the model that $ANTIPHON_MODEL names.
"""
import argparse
import os
import random
import struct
import subprocess
import sys
import unicodedata

from peer_sources import peer_folder

SKIP = 77
try:
    from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                            pre_tokenizers)
except ImportError:
    print("the package tokenizers is not installed: skipped")
    sys.exit(SKIP)

LLAMA = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
         r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN = LLAMA.replace("{1,3}", "")
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
           11: "<q", 12: "<d"}


def read_metadata(path):
    with open(path, "rb") as f:
        data = f.read(64 << 20)
    at = 24

    def take(fmt):
        nonlocal at
        value = struct.unpack_from(fmt, data, at)[0]
        at += struct.calcsize(fmt)
        return value

    def value_of(kind):
        nonlocal at
        if kind == 8:
            size = take("<Q")
            text = data[at:at + size].decode("utf-8")
            at += size
            return text
        if kind == 9:
            of, count = take("<I"), take("<Q")
            return [value_of(of) for _ in range(count)]
        return take(SCALARS[kind])

    keys = {}
    for _ in range(struct.unpack_from("<Q", data, 16)[0]):
        name = value_of(8)
        keys[name] = value_of(take("<I"))
    return keys


def reference(keys):
    pre = keys["tokenizer.ggml.pre"]
    tokens = keys["tokenizer.ggml.tokens"]
    types = keys["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ")) for m in keys["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges,
                                     ignore_merges=pre == "llama-bpe"))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    mapped = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = {
        "gpt-2": plain,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
        "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA), "isolated"),
                                              mapped]),
        "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "isolated"), mapped]),
    }[pre]
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    added = [(t, kind) for t, kind in zip(tokens, types) if kind in (3, 4)]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t, k in added if k == 3])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in added if k == 4])
    for text, _ in added:
        assert tokenizer.token_to_id(text) == tokens.index(text), text
    return tokenizer, [t for t, _ in added]


SCRIPTS = [(0x20, 0x7E), (0xA0, 0x17F), (0x180, 0x24F), (0x300, 0x36F), (0x370, 0x3FF),
           (0x400, 0x52F), (0x530, 0x58F), (0x590, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F),
           (0x980, 0x9FF), (0xB80, 0xBFF), (0xE00, 0xE7F), (0xF00, 0xFFF), (0x1000, 0x109F),
           (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x137F), (0x13A0, 0x13FF),
           (0x1780, 0x17FF), (0x1E00, 0x1EFF), (0x1F00, 0x1FFF), (0x2000, 0x206F),
           (0x2070, 0x20CF), (0x2100, 0x218F), (0x2190, 0x23FF), (0x2460, 0x24FF),
           (0x2600, 0x27BF), (0x3000, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
           (0xAC00, 0xD7A3), (0xF900, 0xFAFF), (0xFB00, 0xFDFF), (0xFE00, 0xFEFF),
           (0xFF00, 0xFFEF), (0x10000, 0x1FFFF), (0x20000, 0x2FFFF), (0xE0000, 0xE01EF),
           (0xE000, 0xF8FF), (0x100000, 0x10FFFF)]
SPACES = ["\t", "\n", "\v", "\f", "\r", " ", "\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u2029",
          "\u202f", "\u205f", "\u3000", "\u200b", "\ufeff", "\u180e", "\r\n"]
EMOJI = ["😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "1️⃣", "❤️", "🧑🏿‍🚀", "☃", "🏴󠁧󠁢󠁥󠁮󠁧󠁿"]
PHRASES = ["I'm sure they'll've said we're DON'T I'LL 'S 'ſ 'T 'rE 'Ve isn't", "x = {'a': 1.5e-10}\n",
           "for (int i = 0; i < n; ++i) {\n\t\tsum += a[i];\r\n}\n", "Ünïcödé ǅ ß ﬁ ŉ İı",
           "Быстрая коричневая лиса", "快速的棕色狐狸跳过了懒狗。", "素早い茶色の狐が、のろまな犬を",
           "빠른 갈색 여우", "الثعلب البني السريع", "השועל החום", "तेज़ भूरी लोमड़ी", "สุนัขจิ้งจอกสีน้ำตาล",
           "e\u0301\u0323 q\u0323\u0307 \u1100\u1161\u11a8 \u212b \u0344", "https://a.b/c?d=e&f=g#h",
           "3.14159 1,000,000 ١٢٣ Ⅳ ½ 𝟘𝟙 ²³ ౸", "<div class=\"x\">&nbsp;</div>", "\\alpha_{i}^{2}$$"]


def random_char(rng):
    low, high = rng.choice(SCRIPTS)
    return chr(rng.randint(low, high))


def random_char_anywhere(rng):
    while True:
        c = rng.randint(0, 0x10FFFF)
        if not 0xD800 <= c < 0xE000:
            return chr(c)


def random_text(rng, added):
    parts = []
    for _ in range(rng.randint(1, 12)):
        kind = rng.randint(0, 11)
        if kind == 0:
            low, high = rng.choice(SCRIPTS)
            parts.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 12))))
        elif kind == 1:
            parts.append("".join(random_char(rng) for _ in range(rng.randint(1, 8))))
        elif kind == 2:
            parts.append("".join(rng.choice(SPACES) for _ in range(rng.randint(1, 6))))
        elif kind == 3:
            parts.append(" " * rng.randint(1, 20))
        elif kind == 4:
            parts.append(rng.choice(EMOJI) * rng.randint(1, 3))
        elif kind == 5:
            parts.append(rng.choice(PHRASES))
        elif kind == 6:
            phrase = rng.choice(PHRASES)
            cut = rng.randint(0, len(phrase))
            parts.append(phrase[cut:] + phrase[:cut])
        elif kind == 7:
            parts.append("".join(chr(rng.randint(0, 0x9F)) for _ in range(rng.randint(1, 10))))
        elif kind == 8:
            token = rng.choice(added)
            parts.append(token if rng.random() < 0.7 else token[:rng.randint(1, len(token))])
        elif kind == 9:
            parts.append(str(rng.randint(0, 10 ** rng.randint(1, 20))))
        elif kind == 10:
            base = random_char(rng)
            marks = "".join(chr(rng.randint(0x300, 0x36F)) for _ in range(rng.randint(1, 6)))
            parts.append(base + marks)
        else:
            parts.append("".join(random_char_anywhere(rng) for _ in range(rng.randint(1, 8))))
    return "".join(parts).replace("\ud800", "")


def long_runs(rng):
    yield "a" * 100_000
    yield " " * 100_000
    yield "\n" * 100_000
    yield "0123456789" * 10_000
    yield "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(100_000))
    yield "漢字仮名交じり文" * 5_000
    yield "e\u0301\u0316" * 15_000
    yield "!?" * 50_000
    yield "👩‍👩‍👧‍👦" * 4_000
    yield " a" * 50_000
    yield "ab\r\n \t" * 20_000


def every_character():
    """Each code point beside letters, digits, spaces, signs and apostrophes."""
    points = [c for c in range(0x30000) if not 0xD800 <= c < 0xE000]
    points += list(range(0xE0000, 0xE0200))
    for start in range(0, len(points), 512):
        yield "".join("a{0}1{0} {0}it'{0} !{0}?\n{0}\n".format(chr(c))
                      for c in points[start:start + 512])


def ours(program, path, texts, plain=False):
    encoded = [t.encode("utf-8") for t in texts]
    stream = b"".join(struct.pack("<I", len(b)) + b for b in encoded)
    command = [program, path] + (["plain"] if plain else [])
    out = subprocess.run(command, input=stream, stdout=subprocess.PIPE, check=True).stdout
    lines = out.decode("utf-8").split("\n")[:-1]
    assert len(lines) == len(texts), (len(lines), len(texts))
    return lines


def as_line(ids):
    return " ".join(map(str, ids))


def first_difference(text, mine, theirs):
    mine, theirs = mine.split(), theirs.split()
    at = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b),
              min(len(mine), len(theirs)))
    return f"{text[:200]!r}: at token {at} ours {mine[at:at + 8]} reference {theirs[at:at + 8]}"


def compare(name, program, path, strings, seed):
    tokenizer, added = reference(read_metadata(path))
    rng = random.Random(f"{seed}/{name}")
    texts = [random_text(rng, added) for _ in range(strings)]
    texts += list(every_character()) + list(long_runs(rng)) + PHRASES + EMOJI + SPACES + [""]
    texts += [a + b + c for a in SPACES for b in SPACES for c in ("x", "", "7", "'s", "?")]
    failures = 0
    for plain in (False, True):
        tokenizer.encode_special_tokens = plain
        for text, mine in zip(texts, ours(program, path, texts, plain)):
            theirs = as_line(tokenizer.encode(text, add_special_tokens=False).ids)
            if mine.strip() != theirs:
                failures += 1
                if failures <= 5:
                    print(f"{name}{' plain' if plain else ''}:", first_difference(text, mine, theirs))
    print(f"{name}: {len(texts)} texts, twice, {failures} differ")
    return failures, len(texts)


def compare_vectors(name, program, path):
    """The peer's own vectors: texts between __ggml_vocab_test__ lines, and a line of ids each."""
    with open(path + ".inp", encoding="utf-8", newline="") as f:
        texts = f.read().split("\n__ggml_vocab_test__\n")
    if texts and texts[-1] == "":
        texts.pop()
    with open(path + ".out", encoding="utf-8") as f:
        wanted = [line.strip() for line in f.read().split("\n")[:len(texts)]]
    failures = 0
    for text, mine, theirs in zip(texts, ours(program, path, texts), wanted):
        if mine.strip() != theirs:
            failures += 1
            print(f"{name} vectors:", first_difference(text, mine, theirs))
    print(f"{name}: {len(texts)} vectors of llama.cpp, {failures} differ")
    return failures


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenize", required=True)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--strings", type=int, default=1500, help="random texts a vocabulary")
    parser.add_argument("--seed", default="antiphon")
    args = parser.parse_args()
    model = os.environ.get("ANTIPHON_MODEL", "")
    if not os.path.exists(model):
        print("$ANTIPHON_MODEL names no file: skipped")
        return SKIP
    folder = peer_folder(args.cache)
    if folder is None:
        print("the pinned source package of llama-cpp-python cannot be downloaded: skipped")
        return SKIP
    print("characters of Python:", unicodedata.unidata_version)
    failures, total = compare("smollm", args.tokenize, model, args.strings, args.seed)
    for name in ("gpt-2", "llama-bpe", "qwen2"):
        path = os.path.join(folder, "models", f"ggml-vocab-{name}.gguf")
        failed, count = compare(name, args.tokenize, path, args.strings, args.seed)
        failures += failed + compare_vectors(name, args.tokenize, path)
        total += count
    print(f"{total} texts in all, {failures} differ")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
