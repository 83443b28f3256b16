"""The official openai client against `antiphon up`: chat and completions, streamed and not, usage and
cached tokens, errors, cancellation; and the counters that must add up to the usage the client saw."""
import asyncio
import re
import sys
import time

import openai

from cluster import Cluster

SYSTEM = ("You are a helpful assistant that answers every question in one short sentence. "
          "You know the capitals of all countries, the rivers that run through them, and the languages that are "
          "spoken there, and you never invent a fact that you do not know.")


class Books:
    """Sums of what the client was told, to compare with the gateway's counters."""

    def __init__(self):
        self.prompt = self.cached = self.output = 0

    def add(self, usage):
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage
        cached = usage.prompt_tokens_details.cached_tokens
        assert 0 <= cached < usage.prompt_tokens, usage
        self.prompt += usage.prompt_tokens
        self.cached += cached
        self.output += usage.completion_tokens
        return cached


def counters(page, name):
    """{label value or "": number} of a counter with at most one label besides daemon and model."""
    found = {}
    for labels, value in re.findall(rf"^{name}\{{(.*?)\}} ([0-9.e+]+)$", page, re.M):
        source = re.search(r'source="([a-z]+)"', labels)
        found[source.group(1) if source else ""] = float(value)
    return found


def chat(client, books, messages, **options):
    answer = client.chat.completions.create(model="SmolLM2-135M-Instruct.Q4_1", messages=messages, temperature=0,
                                            max_tokens=24, **options)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-"), answer
    assert abs(answer.created - time.time()) < 60, answer.created
    choice = answer.choices[0]
    assert choice.index == 0 and choice.message.role == "assistant" and choice.finish_reason in ("stop", "length"), choice
    return choice.message.content, books.add(answer.usage), answer


def chat_stream(client, books, messages, **options):
    text, usage, roles, reasons = "", None, [], []
    for chunk in client.chat.completions.create(model="SmolLM2-135M-Instruct.Q4_1", messages=messages, temperature=0,
                                                max_tokens=24, stream=True, stream_options={"include_usage": True},
                                                **options):
        assert chunk.object == "chat.completion.chunk", chunk
        if chunk.usage is not None:
            assert chunk.choices == [], chunk
            usage = chunk.usage
            continue
        assert usage is None, "a chunk after usage"
        for choice in chunk.choices:
            text += choice.delta.content or ""
            if choice.delta.role:
                roles.append(choice.delta.role)
            if choice.finish_reason:
                reasons.append(choice.finish_reason)
    assert roles == ["assistant"] and len(reasons) == 1, (roles, reasons)
    return text, books.add(usage)


def check_chat(client, books):
    first = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "What is the capital of France?"}]
    whole, _, answer = chat(client, books, first)
    assert whole.strip(), answer
    streamed, cached = chat_stream(client, books, first)
    assert streamed == whole, (streamed, whole)
    assert cached > 0, "the same prompt again reused nothing"
    second = first + [{"role": "assistant", "content": whole}, {"role": "user", "content": "And of Italy?"}]
    text, cached, answer = chat(client, books, second)
    assert text.strip() and cached > 0, answer.usage
    parts = [{"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello."}]}]
    text, _, _ = chat(client, books, parts)
    assert text.strip()
    print(f"chat: {whole!r}; second turn cached {cached} of {answer.usage.prompt_tokens}", flush=True)


def check_completions(client, books):
    options = dict(model="SmolLM2-135M-Instruct.Q4_1", prompt="The capital of France is", max_tokens=12, temperature=0)
    whole = client.completions.create(**options)
    books.add(whole.usage)
    assert whole.object == "text_completion" and whole.id.startswith("cmpl-"), whole
    assert "Paris" in whole.choices[0].text, whole.choices[0].text
    text = ""
    for chunk in client.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        if chunk.usage is not None:
            books.add(chunk.usage)
        text += "".join(c.text for c in chunk.choices)
    assert text == whole.choices[0].text, (text, whole.choices[0].text)
    # Several prompts and several choices, in order.
    many = client.completions.create(**{**options, "prompt": ["The capital of France is", "One, two, three,"]}, n=2)
    books.add(many.usage)
    assert [c.index for c in many.choices] == [0, 1, 2, 3], many
    assert many.choices[0].text == many.choices[1].text == text, many
    assert many.choices[2].text == many.choices[3].text != text, many
    stop = client.completions.create(**{**options, "prompt": "One, two, three,"}, stop=[" five"])
    books.add(stop.usage)
    assert stop.choices[0].finish_reason == "stop" and " five" not in stop.choices[0].text, stop
    length = client.completions.create(**{**options, "max_tokens": 1})
    books.add(length.usage)
    assert length.choices[0].finish_reason == "length" and length.usage.completion_tokens == 1, length


def check_sampling(client, books):
    options = dict(model="SmolLM2-135M-Instruct.Q4_1", prompt="Once upon a time", max_tokens=16, temperature=1.0)
    a, b, c = (client.completions.create(**options, seed=seed) for seed in (7, 7, 8))
    for answer in (a, b, c):
        books.add(answer.usage)
    assert a.choices[0].text == b.choices[0].text != c.choices[0].text, (a, b, c)
    answer = client.chat.completions.create(model="SmolLM2-135M-Instruct.Q4_1", temperature=0, max_tokens=5, logprobs=True,
                                            top_logprobs=3, messages=[{"role": "user", "content": "Hello"}])
    books.add(answer.usage)
    entries = answer.choices[0].logprobs.content
    assert entries and all(len(e.top_logprobs) == 3 for e in entries), answer
    for e in entries:
        assert e.logprob <= 0 and e.logprob == max(t.logprob for t in e.top_logprobs), e
        assert bytes(e.bytes).decode(errors="replace") == e.token or "\ufffd" in e.token, e
    banned = client.completions.create(**{**options, "temperature": 0, "prompt": "The capital of France is"}, logit_bias={
        str(client_ids(client, " Paris")[0]): -100})
    books.add(banned.usage)
    assert not banned.choices[0].text.startswith(" Paris"), banned


def client_ids(client, text):
    answer = client.post("/tokenize", body={"prompt": text, "add_special_tokens": False}, cast_to=object)
    return answer["tokens"]


def check_tokens(client):
    text = "Grüße, 世界! 👩‍👩‍👧 \t x = 1;\n"
    ids = client_ids(client, text)
    back = client.post("/detokenize", body={"tokens": ids}, cast_to=object)
    assert back["prompt"] == text, (back, text)


def check_models(client):
    models = client.models.list().data
    assert [m.id for m in models] == ["SmolLM2-135M-Instruct.Q4_1"], models
    model = client.models.retrieve(models[0].id)
    assert model.object == "model" and model.created > 1_500_000_000, model
    try:
        client.models.retrieve("nothing")
        raise AssertionError("an unknown model was found")
    except openai.NotFoundError as e:
        assert models[0].id in e.body["message"], e.body


def check_errors(client):
    def fails(kind, fragment, **options):
        try:
            client.chat.completions.create(**{"model": "SmolLM2-135M-Instruct.Q4_1", "messages": [{"role": "user", "content": "x"}], **options})
        except kind as e:
            assert fragment in str(e), (fragment, str(e))
            assert e.response.headers["x-request-id"], e.response.headers
            return e
        raise AssertionError(f"{options} was accepted")

    assert fails(openai.BadRequestError, "temperature", temperature=9).param == "temperature"
    fails(openai.BadRequestError, "messages", messages=[])
    fails(openai.BadRequestError, "tools", tools=[{"type": "function", "function": {"name": "f"}}])
    fails(openai.BadRequestError, "response_format", response_format={"type": "json_object"})
    fails(openai.NotFoundError, "SmolLM2-135M-Instruct.Q4_1", model="gpt-4o")
    fails(openai.BadRequestError, "8192", messages=[{"role": "user", "content": "word " * 9000}])


async def check_concurrent(base_url, books):
    """Many at once get what each gets alone."""
    client = openai.AsyncOpenAI(base_url=base_url + "/v1", api_key="none", max_retries=0, timeout=120)
    prompts = [f"Number {i}: the story of the sea and the" for i in range(8)]

    async def one(prompt):
        return await client.completions.create(model="SmolLM2-135M-Instruct.Q4_1", prompt=prompt, max_tokens=12, temperature=0)

    together = await asyncio.gather(*(one(p) for p in prompts))
    alone = [await one(p) for p in prompts]
    for a, b in zip(together, alone):
        books.add(a.usage)
        books.add(b.usage)
        assert a.choices[0].text == b.choices[0].text, (a, b)
    await client.close()


def check_disconnect(cluster, client):
    """A client that goes away ends its request everywhere."""
    assert cluster.metric("antiphon_requests_inflight") == 0
    stream = client.completions.create(model="SmolLM2-135M-Instruct.Q4_1", prompt="Tell me a very long story:", max_tokens=2000,
                                       temperature=0, stream=True, extra_body={"ignore_eos": True})
    for i, _ in enumerate(stream):
        if i == 5:
            stream.close()
            break
    cluster.wait_metric("antiphon_requests_inflight", lambda v: v == 0)
    page = cluster.get("/metrics")
    gone = re.search(r'^antiphon_disconnects_total\{.*stream.*\} (\S+)$', page, re.M)
    assert gone and float(gone.group(1)) >= 1, page


def main():
    books = Books()
    with Cluster() as cluster:
        client = openai.OpenAI(base_url=cluster.base_url + "/v1", api_key="none", max_retries=0, timeout=60)
        check_models(client)
        check_chat(client, books)
        check_completions(client, books)
        check_sampling(client, books)
        check_tokens(client)
        check_errors(client)
        asyncio.run(check_concurrent(cluster.base_url, books))
        page = cluster.get("/metrics")
        sources = counters(page, "antiphon_prompt_tokens_total")
        assert sum(sources.values()) == books.prompt, (sources, books.prompt)
        assert sum(sources.values()) - sources["computed"] == books.cached > 0, (sources, books.cached)
        assert sum(counters(page, "antiphon_output_tokens_total").values()) == books.output, books.output
        check_disconnect(cluster, client)
    print(f"ok: {books.prompt} prompt tokens, {books.cached} cached, {books.output} generated")
    return 0


if __name__ == "__main__":
    sys.exit(main())
