"""Every malformed request of tests/gateway/malformed_requests.jsonl, and broken HTTP itself, against `antiphon up`:
the documented status and an error that names the field; afterwards the cluster answers as before."""
import json
import socket
import sys

from cluster import Cluster, ROOT

GOOD = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}


def expect_error(name, status, data, want_status, want_param, want_code):
    assert status == want_status, f"{name}: {status}, not {want_status}: {data[:300]}"
    error = json.loads(data)["error"]
    assert error["message"] and error["type"], f"{name}: {error}"
    assert error.get("param") == want_param, f"{name}: param {error.get('param')}, not {want_param}"
    assert error.get("code") == want_code, f"{name}: code {error.get('code')}, not {want_code}"


def corpus(cluster):
    count = 0
    for line in (ROOT / "tests/gateway/malformed_requests.jsonl").read_text().splitlines():
        case = json.loads(line)
        if "body_hex" in case:
            body = bytes.fromhex(case["body_hex"])
        else:
            body = case["body"].encode() if isinstance(case["body"], str) else json.dumps(case["body"]).encode()
        status, headers, data = cluster.request("POST", case["path"], body)
        expect_error(case["name"], status, data, case["status"], case["param"], case["code"])
        assert headers.get("x-request-id"), case["name"]
        count += 1
    return count


def raw(cluster, data, shut=True, timeout=20):
    """The first line of what the gateway answers to these bytes; "" when it only closes."""
    host, port = cluster.netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=timeout) as s:
        s.sendall(data)
        if shut:
            s.shutdown(socket.SHUT_WR)
        got = b""
        while b"\r\n" not in got:
            piece = s.recv(4096)
            if not piece:
                break
            got += piece
    return got.split(b"\r\n")[0].decode(errors="replace")


def broken_http(cluster):
    host = b"Host: x\r\n"
    json_type = b"Content-Type: application/json\r\n"
    post = b"POST /v1/completions HTTP/1.1\r\n" + host + json_type
    cases = {
        "not HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03hello\r\n\r\n", "400"),
        "no version": (b"GET /\r\n\r\n", "400"),
        "HTTP/3.7": (b"GET / HTTP/3.7\r\n\r\n", "505"),
        "two lengths": (post + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", "400"),
        "length and chunked": (post + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400"),
        "negative length": (post + b"Content-Length: -3\r\n\r\n", "400"),
        "length beyond all bounds": (post + b"Content-Length: 99999999999999\r\n\r\n", "413"),
        "a chunk of no size": (post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n", "400"),
        "endless header": (b"GET / HTTP/1.1\r\n" + host + b"X: " + b"a" * 200_000 + b"\r\n\r\n", "431"),
        "thousands of headers": (b"GET / HTTP/1.1\r\n" + host + b"".join(b"X-%d: 1\r\n" % i for i in range(20_000)) + b"\r\n", "431"),
        "space in a header's name": (b"GET / HTTP/1.1\r\n" + host + b"A B: c\r\n\r\n", "400"),
        "NUL in a header": (b"GET / HTTP/1.1\r\n" + host + b"A: b\x00c\r\n\r\n", "400"),
        "unknown path": (b"GET /nothing HTTP/1.1\r\n" + host + b"\r\n", "404"),
        "path out of the tree": (b"GET /../../etc/passwd HTTP/1.1\r\n" + host + b"\r\n", "404"),
        "wrong method": (b"DELETE /v1/models HTTP/1.1\r\n" + host + b"\r\n", "405"),
        "GET for a POST": (b"GET /v1/chat/completions HTTP/1.1\r\n" + host + b"\r\n", "405"),
        "a form": (b"POST /v1/completions HTTP/1.1\r\n" + host + b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 3\r\n\r\na=b", "415"),
        "unserved endpoint": (b"POST /v1/embeddings HTTP/1.1\r\n" + host + json_type + b"Content-Length: 2\r\n\r\n{}", "501"),
    }
    for name, (data, status) in cases.items():
        line = raw(cluster, data)
        assert line.startswith("HTTP/1.1 " + status), f"{name}: {line!r}, not {status}"
    # Half a request and then nothing: the connection ends, nobody waits for ever for the rest.
    for name, data in {"half a line": b"GET / HT", "half a body": post + b"Content-Length: 100\r\n\r\n{"}.items():
        line = raw(cluster, data)
        assert line == "" or line.startswith("HTTP/1.1 400") or line.startswith("HTTP/1.1 408"), f"{name}: {line!r}"
    return len(cases) + 2


def main():
    with Cluster() as cluster:
        reference = cluster.post("/v1/completions", GOOD)["choices"][0]["text"]
        assert "Paris" in reference, reference
        count = corpus(cluster)
        assert cluster.post("/v1/completions", GOOD)["choices"][0]["text"] == reference
        count += broken_http(cluster)
        assert cluster.post("/v1/completions", GOOD)["choices"][0]["text"] == reference
        status, headers, _ = cluster.request("POST", "/v1/completions", {**GOOD, "surprise": 1})
        assert status == 200 and headers.get("x-antiphon-ignored-fields") == "surprise", headers
        assert cluster.metric("antiphon_requests_inflight") == 0
        assert "restart" not in cluster.log_text().lower(), cluster.log_text()
    print(f"ok: {count} malformed requests")
    return 0


if __name__ == "__main__":
    sys.exit(main())
