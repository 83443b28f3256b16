#!/usr/bin/env python3
"""Renders the real chat templates of about seventy models with our interpreter and with jinja2 set
up as Hugging Face transformers does, and requires equal texts, or that both refuse.

    templates_vs_jinja2.py --render build/.../antiphon_render --cache build/cache [-v] [TEMPLATE ...]

The templates lie in the pinned source package of llama-cpp-python; the model that $ANTIPHON_MODEL
names adds its own. Two things go beyond Hugging Face on purpose and are compared with a jinja2 that
has them too: methods that change lists and dictionaries, and the filter from_json.
"""
import argparse
import datetime
import functools
import glob
import json
import os
import re
import struct
import subprocess
import sys
import tempfile

from conversations import contexts
from peer_sources import peer_folder

SKIP = 77
try:
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment
except ImportError:
    print("the package jinja2 is not installed: skipped")
    sys.exit(SKIP)

NOW = 1767323045  # 2026-01-02 03:04:05 UTC
FAMILIES_MIN = 20


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, as transformers' AssistantTracker when it doesn't track."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        call = self.call_method("_support")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _support(self, caller):
        return caller()


def environment(kind):
    env = kind(trim_blocks=True, lstrip_blocks=True,
               extensions=[Generation, jinja2.ext.loopcontrols])

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    def strftime_now(form):
        return datetime.datetime.fromtimestamp(NOW).strftime(form)

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    return env


HF = environment(ImmutableSandboxedEnvironment)
RELAXED = environment(SandboxedEnvironment)
RELAXED.filters["from_json"] = json.loads


@functools.lru_cache(maxsize=8)
def compiled(env, source):
    return env.from_string(source)


def render(env, source, context):
    """Text, or the exception."""
    try:
        return compiled(env, source).render(**json.loads(json.dumps(context)))
    except Exception as error:  # pylint: disable=broad-except
        return error


def expected(source, context):
    """What jinja2 makes of it, and whether that takes more than Hugging Face's set-up."""
    out = render(HF, source, context)
    beyond = isinstance(out, jinja2.exceptions.SecurityError) or "filter named 'from_json'" in str(out)
    if isinstance(out, Exception) and beyond:
        return render(RELAXED, source, context), True
    return out, False


def template_of_model(path):
    """The value of tokenizer.chat_template in a GGUF file, or None."""
    with open(path, "rb") as f:
        data = f.read(64 << 20)
    key = b"tokenizer.chat_template"
    at = data.find(key)
    if at < 0:
        return None
    kind, size = struct.unpack_from("<IQ", data, at + len(key))
    start = at + len(key) + 12
    return data[start:start + size].decode("utf-8") if kind == 8 else None


def templates(cache):
    out = {}
    model = os.environ.get("ANTIPHON_MODEL")
    if model and os.path.exists(model):
        source = template_of_model(model)
        if source is not None:
            out["(the shipped model)"] = source
    folder = peer_folder(cache)
    if folder is not None:
        for path in sorted(glob.glob(os.path.join(folder, "models", "templates", "*.jinja"))):
            with open(path, encoding="utf-8", newline="") as f:
                out[os.path.basename(path)[:-len(".jinja")]] = f.read()
    return out


def snippets():
    """Lines of template_snippets.txt, for one language feature each."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "template_snippets.txt")
    with open(path, encoding="utf-8", newline="\n") as f:
        lines = [line for line in f.read().split("\n") if line and not line.startswith("# ")]
    # `\\` stands for one backslash of the template, a single `\n` for a newline.
    lines = [re.sub(r"\\(\\|n)", lambda m: "\\" if m[1] == "\\" else "\n", x) for x in lines]
    return {line: line for line in lines}


SNIPPET_CONTEXT = {
    "ns_like": {"a": 1},
    "d": {"x": 1},
    "m": {"a": 1, "b": [1, "two"], "text": "some text", "c": {"x-y": None}, "float": 0.1,
          "u64": 18446744073709551615, "neg": -5, "list": [], "nested": {"é": [1.5e300, True]}},
}


def run_ours(program, sources, cases):
    with tempfile.NamedTemporaryFile("w", suffix=".json") as jobs:
        json.dump({"templates": sources, "contexts": cases}, jobs)
        jobs.flush()
        done = subprocess.run([program, jobs.name, str(NOW)], check=True, capture_output=True)
    lines = [json.loads(line) for line in done.stdout.decode("utf-8").split("\n") if line]
    return {(line["template"], line["context"]): line for line in lines}


def difference(ours, theirs):
    """None when they agree."""
    if isinstance(theirs, Exception):
        if "error" not in ours:
            return f"jinja2 raises {type(theirs).__name__}: {theirs}\nwe render: {ours['text']!r}"
        # What raise_exception says must reach the client as it is.
        if type(theirs) is jinja2.exceptions.TemplateError and ours["error"] != str(theirs):
            return f"jinja2 raises: {theirs!s}\nwe raise:      {ours['error']}"
        return None
    if "error" in ours:
        return f"jinja2 renders, we raise: {ours['error']}"
    if ours["text"] == theirs:
        return None
    at = next((i for i, (a, b) in enumerate(zip(ours["text"], theirs)) if a != b),
              min(len(ours["text"]), len(theirs)))
    return (f"first difference at character {at}\n"
            f"  jinja2: {theirs[max(0, at - 60):at + 60]!r}\n"
            f"  ours:   {ours['text'][max(0, at - 60):at + 60]!r}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--render", required=True)
    parser.add_argument("--cache", required=True)
    parser.add_argument("-v", action="store_true", dest="verbose")
    parser.add_argument("only", nargs="*")
    args = parser.parse_args()
    sources = templates(args.cache)
    if args.only:
        sources = {k: v for k, v in sources.items() if any(only in k for only in args.only)}
    if len(sources) < FAMILIES_MIN and not args.only:
        print(f"only {len(sources)} templates could be had: skipped")
        return SKIP
    cases = contexts()
    answers = run_ours(args.render, sources, cases)
    equal = refused = beyond = 0
    failures = []
    for name, source in sources.items():
        rendered = 0
        for case, context in cases.items():
            theirs, relaxed = expected(source, context)
            problem = difference(answers[name, case], theirs)
            if problem is not None:
                failures.append(f"{name} / {case}: {problem}")
            elif isinstance(theirs, Exception):
                refused += 1
                if args.verbose:
                    print(f"{name} / {case}: {theirs!r} | {answers[name, case]['error']}")
            else:
                rendered += 1
                beyond += relaxed
        equal += rendered
        if rendered == 0:
            failures.append(f"{name}: no context renders")
    answers = run_ours(args.render, snippets(), {"": SNIPPET_CONTEXT})
    for (source, _), answer in answers.items():
        problem = difference(answer, render(HF, source, SNIPPET_CONTEXT))
        if problem is not None:
            failures.append(f"{source!r}: {problem}")
    print(f"{len(answers)} snippets compared")
    print(f"{len(sources)} templates x {len(cases)} contexts: {equal} texts equal ({beyond} of them "
          f"beyond Hugging Face), {refused} refused by both, {len(failures)} differ")
    for failure in failures[:40]:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
