"""A gRPC client made from proto/antiphon/v1/inference.proto against `antiphon up`: the same tokens as over
HTTP, streamed and not; errors as statuses; cancellation and deadlines; health and reflection."""
import importlib
import pathlib
import socket
import sys
import tempfile

import grpc
from grpc_tools import protoc
import grpc_tools

from cluster import Cluster, ROOT

HEALTH = """syntax = "proto3";
package grpc.health.v1;
message HealthCheckRequest { string service = 1; }
message HealthCheckResponse { int32 status = 1; }
service Health { rpc Check(HealthCheckRequest) returns (HealthCheckResponse); }
"""


def stubs(folder):
    """The modules of our public package and of the standard health service."""
    pathlib.Path(folder, "health.proto").write_text(HEALTH)
    well_known = str(pathlib.Path(grpc_tools.__file__).parent / "_proto")
    for root, name in ((str(ROOT / "proto"), "antiphon/v1/inference.proto"), (folder, "health.proto")):
        assert protoc.main(["", f"-I{root}", f"-I{well_known}", f"--python_out={folder}", f"--grpc_python_out={folder}", name]) == 0
    sys.path.insert(0, folder)
    return [importlib.import_module(m) for m in
            ("antiphon.v1.inference_pb2", "antiphon.v1.inference_pb2_grpc", "health_pb2", "health_pb2_grpc")]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def expect(code, fragment, call):
    try:
        call()
    except grpc.RpcError as e:
        assert e.code() == code, (e.code(), e.details())
        assert fragment in e.details(), e.details()
        return e
    raise AssertionError(f"no error; {code} was due")


def main():
    with tempfile.TemporaryDirectory() as folder:
        pb, services, health_pb, health_services = stubs(folder)
        port = free_port()
        with Cluster(args=["--gateway.grpc.listen", f"127.0.0.1:{port}"]) as cluster, \
                grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            client = services.InferenceStub(channel)
            check(cluster, client, pb)
            health = health_services.HealthStub(channel)
            status = health.Check(health_pb.HealthCheckRequest(service="antiphon.inference.v1.Inference"), timeout=5).status
            assert status == 1, status
    print("ok")
    return 0


def check(cluster, client, pb):
    models = client.ListModels(pb.ListModelsRequest(), timeout=10).models
    assert len(models) == 1 and models[0].max_model_len == 8192, models
    name = models[0].id
    messages = [{"role": "system", "content": "You answer in one short sentence. " * 20},
                {"role": "user", "content": "What is the capital of France?"}]
    over_http = cluster.post("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 24,
                                                      "return_token_ids": True})
    options = pb.GenerationOptions(temperature=0, max_tokens=24)
    chat = pb.ChatRequest(model=name, messages=[pb.ChatMessage(**m) for m in messages], options=options)
    whole = client.Chat(chat, timeout=60)
    http_choice = over_http["choices"][0]
    assert whole.choices[0].message.content == http_choice["message"]["content"], (whole, http_choice)
    assert list(whole.choices[0].token_ids) == http_choice["token_ids"], (whole, http_choice)
    assert whole.choices[0].finish_reason == http_choice["finish_reason"]
    assert whole.usage.prompt_tokens == over_http["usage"]["prompt_tokens"]
    assert whole.usage.completion_tokens == over_http["usage"]["completion_tokens"]
    assert whole.usage.prompt_tokens_details.cached_tokens > 0, whole.usage
    chunks = list(client.ChatStream(chat, timeout=60))
    assert "".join(c.content for c in chunks) == whole.choices[0].message.content
    assert [t for c in chunks for t in c.token_ids] == list(whole.choices[0].token_ids)
    assert [c.finish_reason for c in chunks if c.finish_reason] == [whole.choices[0].finish_reason]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens, chunks[-1]
    second = pb.ChatRequest(messages=[*chat.messages, whole.choices[0].message, pb.ChatMessage(role="user", content="And of Italy?")],
                            options=options)
    answer = client.Chat(second, timeout=60)
    assert answer.usage.prompt_tokens_details.cached_tokens > 0, answer.usage

    complete = pb.CompletionRequest(prompts=[pb.Prompt(text="The capital of France is")],
                                    options=pb.GenerationOptions(temperature=0, max_tokens=12))
    whole = client.Complete(complete, timeout=60)
    over_http = cluster.post("/v1/completions", {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 12})
    assert whole.choices[0].text == over_http["choices"][0]["text"], (whole, over_http)
    assert "".join(c.text for c in client.CompleteStream(complete, timeout=60)) == whole.choices[0].text
    ids = client.Tokenize(pb.TokenizeRequest(prompt="The capital of France is"), timeout=10).tokens
    by_ids = pb.CompletionRequest(prompts=[pb.Prompt(ids=pb.TokenIds(ids=ids))], options=complete.options)
    assert client.Complete(by_ids, timeout=60).choices[0].text == whole.choices[0].text
    assert client.Detokenize(pb.DetokenizeRequest(tokens=ids), timeout=10).prompt == "The capital of France is"

    bad = pb.ChatRequest(model=name, messages=chat.messages, options=pb.GenerationOptions(temperature=9))
    expect(grpc.StatusCode.INVALID_ARGUMENT, "temperature", lambda: client.Chat(bad, timeout=10))
    expect(grpc.StatusCode.INVALID_ARGUMENT, "temperature", lambda: list(client.ChatStream(bad, timeout=10)))
    unknown = pb.ChatRequest(model="gpt-4o", messages=chat.messages)
    expect(grpc.StatusCode.NOT_FOUND, name, lambda: client.Chat(unknown, timeout=10))

    long = pb.CompletionRequest(prompts=complete.prompts, options=pb.GenerationOptions(temperature=0, max_tokens=4000, ignore_eos=True))
    expect(grpc.StatusCode.DEADLINE_EXCEEDED, "", lambda: client.Complete(long, timeout=1))
    stream = client.CompleteStream(long, timeout=60)
    next(stream)
    stream.cancel()
    cluster.wait_metric("antiphon_requests_inflight", lambda v: v == 0)
    assert client.Complete(complete, timeout=60).choices[0].text == whole.choices[0].text


if __name__ == "__main__":
    sys.exit(main())
