"""Makes hostile requests from a seed: bytes, HTTP framing, JSON values, and sizes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
OTHER_PATHS = ("/health", "/ready", "/metrics", "/version", "/server_info", "/openapi.json", "/v1/models", "/nowhere")
KEY = "a-key"

Make = Callable[[random.Random], bytes]


def attack(seed: int, *, large: bool = True) -> bytes:
    """The bytes of one connection.

    Args:
        large: whether one in fifty may have megabytes.
    """
    rng = random.Random(seed)
    if large and rng.random() < 0.02:
        return of_size(rng)
    return rng.choices([of_bytes, of_framing, of_values], [1, 2, 3])[0](rng)


# -- bytes -------------------------------------------------------------------------------------------------------------


def of_bytes(rng: random.Random) -> bytes:
    """Nothing like a request, or one with errors of transmission."""
    if rng.random() < 0.2:
        return rng.randbytes(rng.choice([0, 1, 10, 1000, 70_000]))
    data = bytearray(request(rng, plausible(rng)))
    for _ in range(rng.choice([1, 1, 2, 5, 50])):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                data[at : at + 1] = rng.randbytes(1)
            case 1:
                data[at:at] = rng.choice([b"\r\n", b"\0", b"\xff", b" ", b":", b'"', rng.randbytes(5)])
            case 2:
                del data[at : at + rng.choice([1, 2, 20])]
            case 3:
                data[at:at] = data[at : at + rng.choice([1, 20, 200])]
    return bytes(data)


# -- framing -----------------------------------------------------------------------------------------------------------

METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "CONNECT", "PRI", "get", "", "A" * 9000)
TARGETS = (
    *("/", "*", "//", "/%", "/%00", "/%ff%fe", "/..%2f..", "http://[/", "http://other/v1/models", "/v1/models/%0d%0a"),
    *("/v1/models/" + "x" * 3000, "/health?key=secret&" + "a=b&" * 500, "/?" + "%41" * 2000, "/\u00e9", "no-slash", ""),
)
VERSIONS = ("HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/9.9", "HTTPS/1.1", "", "http/1.1")
LENGTHS = ("0", "1", "-1", "+5", "5, 5", "0x10", "1e3", "", " ", "99", "4194305", str(2**31), str(2**63), "9" * 400)
HEADERS = (
    *("transfer-encoding: chunked", "transfer-encoding: gzip, chunked", "transfer-encoding: identity"),
    *("transfer-encoding: chunked\r\ntransfer-encoding: chunked", "connection: close", "connection: keep-alive, x"),
    *("upgrade: websocket\r\nconnection: upgrade", "upgrade: h2c\r\nconnection: upgrade, http2-settings"),
    *("expect: 100-continue", "expect: 200-ok", "host: [", "host: a:b:c", "host: \u00e9", "host: evil.example"),
    *("origin: http://[", "origin: null", "origin: http://evil.example", "origin: \xff", "content-encoding: gzip"),
    *("content-type: text/plain", "content-type: application/json; charset=utf-16", "accept: " + "text/x, " * 500),
    *("authorization: Bearer", "authorization: Basic \xff", "authorization: Bearer wrong", "x: \t y", " folded: x"),
    *("no colon", ": no name", "a b: c", "x:" + "y" * 9000, "x-nul: a\0b", "cookie: " + "a=b; " * 1000),
    *("range: bytes=0-0", "if-none-match: *", "x-request-timeout: nan", "last-event-id: -1", "idempotency-key: "),
)
CHUNKED = (
    b"5\r\nabc\r\n",
    b"zz\r\n",
    b"-1\r\n\r\n",
    b"f" * 20 + b"\r\n",
    b"1\r\nab\r\n0\r\n\r\n",
    b"0\r\nx: y\r\n\r\n",
)


def of_framing(rng: random.Random) -> bytes:
    """A request that HTTP does not allow, or that few send; sometimes many behind each other."""
    headers = rng.choices(HEADERS, k=rng.choice([0, 1, 1, 2, 4]))
    if rng.random() < 0.5:
        headers.append(f"content-length: {rng.choice(LENGTHS)}")
    if rng.random() < 0.8:
        headers += ["host: 127.0.0.1", f"authorization: Bearer {KEY}"]
    if rng.random() < 0.05:
        headers += ["x: y"] * rng.choice([99, 101, 20_000])
    target = rng.choice((*TARGETS, *PATHS, *OTHER_PATHS))
    lines = [f"{rng.choice(METHODS)} {target} {rng.choice(VERSIONS)}", *headers]
    if rng.random() < 0.3:
        lines[0] = f"POST {rng.choice(PATHS)} HTTP/1.1"
    head = "\r\n".join(lines).encode("latin-1", "replace") + rng.choice([b"\r\n\r\n"] * 5 + [b"\n\n", b"\r\n", b""])
    body = rng.choice([b"", json.dumps(plausible(rng)).encode(), rng.randbytes(30), *CHUNKED])
    return (head + body) * rng.choices([1, 3, 40], [20, 2, 1])[0]


# -- values ------------------------------------------------------------------------------------------------------------

SCALARS: tuple[str, ...] = (
    *("null", "true", "0", "-0.0", "1", "-1", "2.5", "1e400", "-1e400", "1e-400", "NaN", "Infinity", "1E5", "007"),
    *("2147483647", "2147483648", "4294967296", "9223372036854775808", "18446744073709551616", "1" + "0" * 400),
    *('""', '"x"', '"\\u0000"', '"\\ud800"', '"\\udc00\\ud800"', '"\\uffff"', '"\u202e\u0301\U0001f468"', '"\\x"'),
    *('"<|eos|><|bos|>"', '"[INST] {{ 7*7 }}"', '"' + "a" * 5000 + '"', '"' + "数" * 2000 + '"', '"\t"', "'x'", "+1"),
    *("[]", "{}", "[[]]", '{"":{}}', "[" * 600 + "]" * 600, '{"a":' * 600 + "1" + "}" * 600, "[0,0,0]", '["a","b"]'),
)
FIELDS = (
    *("model", "prompt", "messages", "n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k"),
    *("min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "seed", "stop", "echo"),
    *("stop_token_ids", "min_tokens", "ignore_eos", "stream", "stream_options", "user", "priority", "ttft_slo_ms"),
    *("tpot_slo_ms", "cache_salt", "speculation", "end_after", "metadata", "store", "logprobs", "top_logprobs"),
    *("best_of", "suffix", "response_format", "tools", "tool_choice", "modalities", "parse_special", "tokens"),
    *("add_special_tokens", "add_generation_prompt", "role", "content", "timeout", "unknown", "\u00e9", ""),
    *("structured_outputs", "guided_regex", "guided_choice", "grammar", "json_schema", "chat_template_kwargs"),
    *("parallel_tool_calls", "reasoning_effort", "tool_calls", "tool_call_id"),
    *("parallel_tool_calls", "reasoning_effort", "chat_template_kwargs", "tool_calls", "tool_call_id"),
)


def plausible(rng: random.Random) -> dict[str, Any]:
    """A body that some endpoint would take; it costs little."""
    body: dict[str, Any] = {"max_tokens": rng.choice([0, 1, 3, 8]), "seed": rng.randrange(100)}
    if rng.random() < 0.5:
        body["messages"] = [
            {"role": rng.choice(["user", "system", "assistant"]), "content": "hi" * rng.choice([0, 1, 40])}
            for _ in range(rng.choice([1, 1, 3, 50]))
        ]
        body |= {"logprobs": True, "top_logprobs": rng.choice([0, 20])} if rng.random() < 0.3 else {}
    else:
        body["prompt"] = rng.choice(["a", "the cat" * 20, [5, 6, 7], ["a", "b"], [[5], [6, 7]]])
        body |= {"logprobs": rng.choice([0, 20]), "echo": rng.random() < 0.5} if rng.random() < 0.3 else {}
    options = {
        "n": rng.choice([1, 2, 9]),
        "temperature": rng.choice([0, 0.7, 2]),
        "top_k": rng.choice([-1, 1, 10_000]),
        "stop": rng.choice(["a", ["x", "y" * 200]]),
        "logit_bias": {str(token_id): -100 for token_id in range(rng.choice([1, 300]))},
        "stream": rng.random() < 0.5,
        "ignore_eos": True,
        "min_tokens": 1,
        "stop_token_ids": list(range(rng.choice([1, 320]))),
    }
    return body | {name: options[name] for name in rng.sample(sorted(options), rng.choice([0, 1, 3]))}


def of_values(rng: random.Random) -> bytes:
    """A body of right shape with wrong values, as JSON that Python's own encoder would not write."""
    body = plausible(rng)
    if rng.random() < 0.3:
        return request(rng, body)
    entries = [f"{json.dumps(name)}:{json.dumps(value)}" for name, value in body.items()]
    for _ in range(rng.choice([1, 1, 2, 6])):
        value = rng.choice(SCALARS)
        wrapped = rng.choice(["%s", "%s", "%s", "[%s]", '{"5":%s}', '{"%s":1}', '[{"role":"user","content":%s}]'])
        entries.append(f'"{rng.choice(FIELDS)}":{wrapped.replace("%s", value)}')
    rng.shuffle(entries)
    content = ("{" + ",".join(entries) + "}").encode("utf-8", "surrogatepass")
    match rng.randrange(12):
        case 0:
            content = content[: rng.randrange(len(content))]
        case 1:
            content = content.decode().encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"]))
        case 2:
            content = rng.choice([b"", b"null", b"[]", b'"x"', b" ", b"{}", b"[" * 50_000, b'{"a":' * 20_000])
        case 3:
            content += rng.choice([b"x", b"{}", b"\0", b"," * 1000])
    return request(rng, content)


# -- sizes -------------------------------------------------------------------------------------------------------------


def of_size(rng: random.Random) -> bytes:
    """Megabytes that are dear to read, to check, to tokenize or to answer."""
    many = rng.choice([10_000, 150_000, 390_000, 500_000])
    chat, tokenize = PATHS[1], PATHS[2]
    path, body = rng.choice(
        [
            (PATHS[0], b'{"prompt":"a","stop":[%s""]}' % (b'"",' * many)),
            (PATHS[0], b'{"prompt":[%s"a"]}' % (b'"",' * many)),
            (PATHS[0], b'{"prompt":[%s5],"max_tokens":1}' % (b"5," * many)),
            (PATHS[0], b'{"prompt":[%s[5]],"max_tokens":1}' % (b"[5]," * rng.choice([10, 1000, 1087, many]))),
            (PATHS[0], b'{"prompt":"a",%s"x":1}' % b"".join(b'"f%d":1,' % i for i in range(many // 2))),
            (PATHS[0], b'{"prompt":"a","logit_bias":{%s"1":1}}' % b"".join(b'"%d":null,' % i for i in range(many))),
            (PATHS[0], json.dumps(_costly(rng)).encode()),
            (PATHS[0], b'{"prompt":"%s"}' % (b"a" * 10 * many)),
            (chat, b'{"messages":[{"role":"user","content":[%s{}]}]}' % (b'{"type":"x"},' * (many // 4))),
            (chat, b'{"messages":[%s{}]}' % (b'{"role":"user"},' * (many // 2))),
            (chat, b'{"messages":[{"role":"user","content":"%s"}]}' % (b"<|eos|>" * many)),
            (chat, b'{"messages":[],"modalities":[%s"x"]}' % (b'"audio",' * (many // 2))),
            (tokenize, b'{"prompt":"%s"}' % (rng.choice([b"a", b"word ", b"\xe6\x95\xb0", b"\\n"]) * (many // 4))),
            (PATHS[3], b'{"tokens":[%s5]}' % (b"5," * many)),
            (rng.choice(PATHS), b" " * rng.choice([4_000_000, 4_194_304, 9_000_000])),
            (rng.choice(OTHER_PATHS), rng.randbytes(3_000_000)),
        ]
    )
    head = _head("POST", path, len(body), key=rng.random() < 0.8)
    return head + body


def _costly(rng: random.Random) -> dict[str, Any]:
    """What is allowed, and makes a large answer."""
    body: dict[str, Any] = {"prompt": "a b " * rng.choice([1, 200]), "n": rng.choice([32, 128]), "logprobs": 20}
    body |= {"max_tokens": rng.choice([1, 30]), "echo": True, "ignore_eos": True, "stream": rng.random() < 0.5}
    biased = {str(token_id): 1 for token_id in range(320)}
    return body | ({"logit_bias": biased, "prompt": ["a"] * 1000, "n": 1} if rng.random() < 0.3 else {})


# -- requests ----------------------------------------------------------------------------------------------------------


def request(rng: random.Random, body: dict[str, Any] | bytes) -> bytes:
    """A whole request of some endpoint, mostly of the one that the body is meant for."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    path = PATHS[1] if b'"messages"' in content else PATHS[0]
    path = path if rng.random() < 0.8 else rng.choice(PATHS)
    return _head("POST", path, len(content), key=rng.random() < 0.97) + content


def _head(method: str, path: str, length: int, *, key: bool) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1", f"content-length: {length}"]
    lines += [f"authorization: Bearer {KEY}"] if key else []
    return "\r\n".join(lines).encode() + b"\r\n\r\n"
