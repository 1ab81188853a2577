"""Tables of bad input, each by kind: what somebody careless or hostile would send."""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

MARKUP = '"><img src=x onerror=alert(1)>'

# ------------------------------------------------------------------------------ bodies, as raw bytes

BODIES: dict[str, bytes] = {
    "empty": b"",
    "spaces": b"   \n",
    "open brace": b"{",
    "closed twice": b"{}}",
    "two documents": b"{}{}",
    "single quotes": b"{'uri': 1}",
    "comment": b"{/* no */}",
    "trailing comma": b'{"uri": 1,}',
    "bare word": b"uri",
    "list": b"[]",
    "list of objects": b'[{"uri": "demo:digits"}]',
    "number": b"3",
    "text": b'"demo:digits"',
    "null": b"null",
    "true": b"true",
    "NaN": b'{"uri": NaN}',
    "Infinity": b'{"uri": Infinity}',
    "minus Infinity": b'{"uri": -Infinity}',
    "1e400": b'{"uri": 1e400}',
    "2 to the 63": b'{"uri": 9223372036854775808}',
    "minus 2 to the 63, less one": b'{"uri": -9223372036854775809}',
    "a hundred thousand digits": b'{"uri": ' + b"9" * 100_000 + b"}",
    "leading zero": b'{"uri": 012}',
    "hexadecimal": b'{"uri": 0x10}',
    "plus": b'{"uri": +1}',
    "key twice": b'{"uri": 1, "uri": 2}',
    "key twice, escaped": b'{"uri": 1, "u\\u0072i": 2}',
    "lone high surrogate": b'{"uri": "\\ud800"}',
    "lone low surrogate as a key": b'{"\\udfff": 1}',
    "surrogates in the wrong order": b'{"uri": "\\udc00\\ud800"}',
    "not UTF-8": b'{"uri": "\xff"}',
    "overlong UTF-8": b'{"uri": "\xc0\xaf"}',
    "a surrogate in UTF-8": b'{"uri": "\xed\xa0\x80"}',
    "UTF-16": '{"uri": "demo:digits"}'.encode("utf-16"),
    "UTF-32": '{"uri": "demo:digits"}'.encode("utf-32"),
    "a null byte": b'{"uri": "\x00"}',
    "a raw newline in a text": b'{"uri": "a\nb"}',
    "33 lists deep": b"[" * 33 + b"]" * 33,
    "half a million open lists": b"[" * 500_000,
    "two hundred thousand open objects": b'{"a":' * 200_000,
    "33 objects deep": b'{"uri":' * 33 + b"1" + b"}" * 33,
    "a hundred thousand unknown keys": json.dumps({f"k{n}": n for n in range(60_000)}).encode(),
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
    "pickle": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00.",
    "form": b"uri=demo%3Adigits&name=x",
    "multipart without a type": b'--b\r\nContent-Disposition: form-data; name="uri"\r\n\r\nx\r\n--b--',
    "XML with an entity": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>',
    "over the limit": b" " * ((8 << 20) + 1),
}

# ------------------------------------------------------------- values, put into each known member

_DEEP: Any = 0
for _ in range(30):
    _DEEP = [_DEEP]

VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "false": False,
    "zero": 0,
    "minus one": -1,
    "one and a half": 1.5,
    "minus zero": -0.0,
    "tiny": 5e-324,
    "huge": 1.7e308,
    "2 to the 31": 2**31,
    "2 to the 53, plus one": 2**53 + 1,
    "2 to the 63, less one": 2**63 - 1,
    "minus 2 to the 63": -(2**63),
    "the text NaN": "NaN",
    "a number as a text": "1",
    "empty text": "",
    "a space": " ",
    "a line break": "a\nb",
    "a null character": "a\x00b",
    "a bell and an escape": "\x07\x1b[31mred",
    "right to left": "\u202eevil",
    "zero width": "a\u200bb",
    "not a character": "\uffff",
    "composed in another way": "e\u0301",
    "an emoji of many": "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "a long text": "x" * 100_000,
    "a long line of dots": "." * 50_000,
    "markup": MARKUP,
    "a template": "{{ 7 * 7 }}{% raw %}${7*7}",
    "SQL": "'; DROP TABLE job; --",
    "a shell": "$(touch /tmp/frostline-was-here)`id`;|&",
    "a format": "%s%n{0.__class__}",
    "up and away": "../../../../etc/passwd",
    "up, encoded": "..%2f..%2fetc%2fpasswd",
    "an absolute path": "/etc/passwd",
    "a device": "/dev/zero",
    "a process's memory": "/proc/self/mem",
    "a file URL": "file:///etc/passwd",
    "a Windows path": "C:\\Windows\\win.ini",
    "a network path": "\\\\evil\\share",
    "a home": "~root/.ssh/id_rsa",
    "javascript": "javascript:alert(1)",
    "a header": "a\r\nSet-Cookie: x=y",
    "a formula": "=cmd|' /C calc'!A0",
    "empty list": [],
    "a list of null": [None],
    "a list of everything": [1, "a", None, {}, [], True, 1.5],
    "a long list": list(range(20_000)),
    "a list of long texts": ["y" * 10_000] * 20,
    "deep": _DEEP,
    "empty object": {},
    "an object with an empty key": {"": ""},
    "an object with odd keys": {"__proto__": 1, "constructor": {}, "\u0000": 2},
    "an object of markup": {MARKUP: MARKUP},
    "a large object": {f"key{n}": n for n in range(5_000)},
}

# --------------------------------------------------------------------------------- URIs and rules

MODEL_URIS = [
    "", " ", ":", "demo", "demo:", "demo:nothing", "DEMO:digits", "demo:digits ", " demo:digits",
    "demo:../digits", "demo:digits\x00", "nothing:at-all", "http://example.org/model",
    "https://huggingface.co/bert", "file:///etc/passwd", "hf:", "hf:/", "hf:/nowhere",
    "hf:/etc", "hf:/dev/null", "hf:/proc/self/fd/0", "hf:..", "hf:../..", "hf:a/b/c", "hf:a--b",
    "hf:a b", "hf:a/", "hf:/a\nb", "hf:" + "a" * 97, "hf:" + "a/" * 400, "timm:", "timm:../x",
    "timm:no such", "torchvision:", "torchvision:__class__", "torchvision:get_model", "python:",
    "python:os", "python:os:system", "python:os:", "python::f", "python:a.b:c.d", "python:..:f",
    "python:a..b:f", "python:/etc/passwd:f", "python:a/b:f", "python:class:f", "python:a:lambda",
    "python:a:f()", "python:__main__:f", "python:app.main:create_app", "python:a:" + "f" * 2000,
    "python:\u0430:f", "python:a\x00:f", MARKUP, "demo:" + MARKUP,
]  # fmt: skip

DATASET_URIS = [
    "", ":", "demo:nothing", "demo:", "folder:", "folder:nowhere", "folder:/nowhere",
    "folder:/etc/passwd", "folder:/dev", "folder:/proc/self", "folder:..", "folder:/a\x00b",
    "csv:", "csv:/nowhere.csv", "csv:/etc/passwd", "csv:/dev/zero", "csv:/dev/stdin", "csv:/tmp",
    "csv:../x.csv", "csv:http://example.org/x.csv", "csv:~/x.csv", "json:", "json:/dev/urandom",
    "json:/etc/shadow", "parquet:", "parquet:/etc/passwd", "parquet:" + "x" * 2000, "hf:",
    "hf:a b", "hf:/nowhere", "hf:../x", "python:", "python:os:listdir", "python:a:b:c",
    "python:app.cli:main", "xml:/x", "s3://bucket/key", MARKUP, "csv:" + MARKUP,
]  # fmt: skip

RULES: list[Any] = [
    None, 1, "freeze **", [], {}, {"action": "freeze"}, {"match": "**"},
    {"action": "thaw", "match": "**"}, {"action": None, "match": "**"},
    {"action": "freeze", "match": ""}, {"action": "freeze", "match": None},
    {"action": "freeze", "match": 7}, {"action": "freeze", "match": ["**"]},
    {"action": "freeze", "type": ""}, {"action": "freeze", "type": 5},
    {"action": "freeze", "match": "**", "extra": 1}, {"action": "freeze", "match": "{"},
    {"action": "freeze", "match": "}"}, {"action": "freeze", "match": "{a"},
    {"action": "freeze", "match": "{a,{b}"}, {"action": "freeze", "match": "{0..}"},
    {"action": "freeze", "match": "{0..99999999}"}, {"action": "freeze", "match": "{9..0}"},
    {"action": "freeze", "match": "{-1..3}"}, {"action": "freeze", "match": "{1..2..3}"},
    {"action": "freeze", "match": "{a,b}" * 17}, {"action": "freeze", "match": "{" * 2000},
    {"action": "freeze", "match": "{" * 500 + "}" * 500},
    {"action": "freeze", "match": "{0..300}{0..300}{0..300}"},
    {"action": "freeze", "match": "*" * 5000}, {"action": "freeze", "match": "**." * 3000},
    {"action": "freeze", "match": "*a" * 500}, {"action": "freeze", "match": "a..b"},
    {"action": "freeze", "match": "re:"}, {"action": "freeze", "match": "re:("},
    {"action": "freeze", "match": "re:["}, {"action": "freeze", "match": "re:*"},
    {"action": "freeze", "match": "re:(?P<a>"}, {"action": "freeze", "match": "re:\\"},
    {"action": "freeze", "match": "re:(?=a)b"}, {"action": "freeze", "match": "re:(a)\\1"},
    {"action": "freeze", "match": "re:(?<!a)b"}, {"action": "freeze", "match": "re:(a+)+$"},
    {"action": "freeze", "match": "re:(.*a){20}b"}, {"action": "freeze", "match": "re:a{1000}{1000}"},
    {"action": "freeze", "match": "re:" + "(" * 5000}, {"action": "freeze", "match": "re:" + "a?" * 3000},
    {"action": "freeze", "match": "re:(?x) a # \n"}, {"action": "freeze", "match": "re:\\p{Foo}"},
    {"action": "freeze", "match": "re:(((((x*)*)*)*)*)*y"},
    {"action": "freeze", "match": "has:"}, {"action": "freeze", "match": "has:" + "x" * 50_000},
    {"action": "freeze", "match": MARKUP}, {"action": "freeze", "match": "a\x00b"},
    {"action": "freeze", "match": "\u202e**"},
]  # fmt: skip

# ------------------------------------------------------------------------ paths, queries, headers

PATHS = [
    "/api/jobs/0", "/api/jobs/-1", "/api/jobs/x", "/api/jobs/1.5", "/api/jobs/1e3",
    "/api/jobs/0x1", "/api/jobs/%31%00", f"/api/jobs/{2**63}", f"/api/jobs/{'9' * 5000}",
    "/api/jobs/%F0%9D%9F%8F", "/api/jobs/1%2F..%2F2", "/api/jobs/..", "/api/jobs/%2e%2e",
    "/api//jobs", "/api/jobs/", "/api/jobs/1/", "/api/jobs/1/checkpoints/../1/model.safetensors",
    "/api/jobs/1/checkpoints/%2e%2e%2f/model.safetensors", "/api/jobs/1/checkpoints/x/model.safetensors",
    "/api/jobs/1/checkpoints/-1/model.safetensors", f"/api/jobs/1/checkpoints/{2**63}/model.safetensors",
    "/api/jobs/1/checkpoints/1/../../spec.json", "/api/jobs/1/checkpoints/0/manifest.json",
    "/static/../app/main.py", "/static/%2e%2e/app/main.py", "/static/..%2fapp%2fmain.py",
    "/static/%252e%252e/app", "/static//etc/passwd", "/static/C:%5CWindows", "/static/%00",
    "/static/vendor", "/static/", "/static/" + "a" * 5000, "/models/x", "/models/0",
    f"/models/{2**63}", "/models/-1", "/models/1%00", "/jobs/x", "/jobs/0", "/jobs/99999999999999999999",
    "/configs/x", "/configs/0/download", "/compare?jobs=", "/compare?jobs=x", "/compare?jobs=1,1",
    "/compare?jobs=" + ",".join(["1"] * 5000), "/compare?jobs=1,,2", "/compare?jobs=%00",
    f"/compare?jobs={2**63},1", "/login?link=" + "x" * 5000, "/%ff%fe", "/%", "/%zz", "/a%0d%0ab",
    "/?" + "a=b&" * 5000, "/models/1?rules=%7B", "/models/1?config=x", "/models/1?config=" + "9" * 400,
    "/api/tasks/x", "/api/models/x/tree", f"/api/models/{'1' * 30}/plan", "/api/configs/1/download?as=exe",
    "/" + MARKUP, "/models/1/rows?parent=-1", "/models/1/rows?parent=99999999999999999999",
]  # fmt: skip

QUERY_VALUES = [
    "", " ", "x", "-1", "0", "1.5", "1e9", "0x10", "\u0661", str(2**63), str(-(2**63) - 1),
    "9" * 5000, "NaN", "inf", "null", "[]", "1,2", "1;2", "%00", "../..", "re:(a+)+$", "re:(",
    "{0..99999999}", "{" * 200, "x" * 5_000, MARKUP, "'; DROP TABLE job; --", "\u202e",
]  # fmt: skip

# Sent as written: what no client library would let through.
REQUESTS: dict[str, bytes] = {
    "nothing": b"\r\n\r\n",
    "garbage": b"\x00\x01\x02\x03\xff\xfe\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + b"\x00" * 190,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9": b"GET / HTTP/9.9\r\nHost: 127.0.0.1\r\n\r\n",
    "no version": b"GET /\r\n\r\n",
    "no Host": b"GET /api/health HTTP/1.1\r\n\r\n",
    "HTTP/1.0 without a Host": b"GET /api/health HTTP/1.0\r\n\r\n",
    "empty Host": b"GET /api/health HTTP/1.1\r\nHost:\r\n\r\n",
    "two Hosts": b"GET /api/health HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
    "two Hosts, both ours": b"GET /api/health HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: 127.0.0.1\r\n\r\n",
    **{
        f"Host {host!r}": b"GET /api/health HTTP/1.1\r\nHost: " + host.encode() + b"\r\n\r\n"
        for host in (
            "evil.example", "127.0.0.1.evil.example", "evil.example:80", "127.0.0.1@evil.example",
            "evil.example@127.0.0.1", "127.0.0.1 evil.example", "127.0.0.1,evil.example",
            "127.0.0.1/evil", "127.0.0.1#", "127.0.0.1?", "127.0.0.1:80:80", "127.0.0.1:x",
            "127.0.0.1:-1", "localhost.", "localhost.evil.example", "evil-localhost", "127.1",
            "2130706433", "0x7f.1", "0177.0.0.1", "127.0.0.01", "0.0.0.0", "[::]", "::1",
            "[::ffff:127.0.0.1]", "[::1%25lo]", "[::1", "::1]", "*", "loc\u0430lhost", "127.0.0.1\x00",
            "127.0.0.1\\evil", "%31%32%37.0.0.1",
        )
    },
    "folded Host": b"GET /api/health HTTP/1.1\r\nHost: 127.0.0.1\r\n .evil.example\r\n\r\n",
    "space before the colon": b"GET /api/jobs HTTP/1.1\r\nHost : 127.0.0.1\r\n\r\n",
    "bare line feeds, other Host": b"GET /api/jobs HTTP/1.1\nHost: evil.example\n\n",
    "CONNECT": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "TRACE": b"TRACE /api/health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "an unknown method": b"FREEZE /api/health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a lower-case method": b"get /api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "an absolute target": b"GET http://evil.example/api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a target without a slash": b"GET api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a star": b"OPTIONS * HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "two slashes": b"GET //evil.example/api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a space in the target": b"GET /api /jobs HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "bytes in the target": b"GET /\xff\xfe HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a target of 100 kB": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a header of 100 kB": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    "a thousand headers": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
    "a header without a name": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n: y\r\n\r\n",
    "a header with a null": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: a\x00b\r\n\r\n",
    "a cookie of nonsense": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: ;;=;\xff=\xfe\r\n\r\n",
    "a bearer of bytes": b"GET /api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer \xff\r\n\r\n",
    "length and chunks": b"POST /api/models HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /api/jobs HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "two lengths": b"POST /api/models HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2\r\n"
    b"Content-Length: 3\r\n\r\n{}x",
    "a negative length": b"POST /api/models HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
    "a length of letters": b"POST /api/models HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: ten\r\n\r\n",
    "a length beyond 64 bits": b"POST /api/models HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: "
    + b"9" * 30
    + b"\r\n\r\n",
    "a chunk of nonsense": b"POST /api/models HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "an unknown coding": b"POST /api/models HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    b"Transfer-Encoding: gzip\r\n\r\n{}",
    "a WebSocket": b"GET /api/events HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Version: 13\r\n\r\n",
}  # fmt: skip

# ------------------------------------------------------------------------------- safetensors files


def _safetensors(header: object, data: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def _tensor(shape: list[Any], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


WEIGHTS: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\x00" * 7,
    "a header of no length": _safetensors(b""),
    "a header longer than the file": _safetensors(b"{}", size=1 << 20),
    "a header of exabytes": _safetensors(b"{}", size=2**63),
    "a header of all ones": _safetensors(b"{}", size=2**64 - 1),
    "a header that is no JSON": _safetensors(b"{oops"),
    "a header that is a list": _safetensors([]),
    "a header that is not UTF-8": _safetensors(b'{"\xff": 1}'),
    "a deep header": _safetensors(b'{"a":' * 100_000),
    "no tensors": _safetensors({}),
    "a tensor that is no object": _safetensors({"l1.weight": 1}),
    "a tensor without a shape": _safetensors({"l1.weight": {"dtype": "F32"}}),
    "an unknown type": _safetensors({"l1.weight": _tensor([1], 0, 4, "F99")}, b"\x00" * 4),
    "data cut off": _safetensors({"l1.weight": _tensor([4], 0, 16)}, b"\x00" * 8),
    "data too long": _safetensors({"l1.weight": _tensor([1], 0, 4)}, b"\x00" * 400),
    "offsets backwards": _safetensors({"l1.weight": _tensor([1], 4, 0)}, b"\x00" * 4),
    "negative offsets": _safetensors({"l1.weight": _tensor([1], -4, 0)}, b"\x00" * 4),
    "overlapping tensors": _safetensors(
        {"l1.weight": _tensor([1], 0, 4), "l1.bias": _tensor([1], 0, 4)}, b"\x00" * 4
    ),
    "a shape of exabytes": _safetensors({"l1.weight": _tensor([2**40, 2**40], 0, 4)}, b"\x00" * 4),
    "a negative shape": _safetensors({"l1.weight": _tensor([-1], 0, 4)}, b"\x00" * 4),
    "a shape of texts": _safetensors({"l1.weight": _tensor(["1"], 0, 4)}, b"\x00" * 4),
    "a name twice": _safetensors(
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b' "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b"\x00" * 4,
    ),
    "names of another model": _safetensors({MARKUP: _tensor([1], 0, 4)}, b"\x00" * 4),
    "a pickle": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00.",
    "a zip": b"PK\x03\x04" + b"\x00" * 60,
}

# -------------------------------------------------------------------- records of a job's spool


def record(kind: int, payload: object, sequence: int = 5) -> bytes:
    """A record whose length and checksum are right, behind four others."""
    text = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    body = struct.pack("<IQB", 1, sequence, kind) + text
    return struct.pack("<II", len(body), zlib.crc32(body)) + body


START: dict[str, Any] = {"step": 0, "layers": ["l1", "l2"], "total_steps": 9, "warnings": []}
METRICS: dict[str, Any] = {"step": 1, "epoch": 0.1, "values": {"loss": 1.0}, "step_ms": 1.0}
_COUNTS = {"checked": 1, "identical": 1, "changed": []}
PROOF: dict[str, Any] = {
    "verdict": "holds",
    "step": 1,
    "frozen": _COUNTS,
    "trained": {"checked": 1, "moved": 1, "still": []},
    "buffers": _COUNTS,
}
FREEZE: dict[str, Any] = {"step": 1, "seq": 1, "config": {"schedule": []}}

SPOOL_RECORDS: dict[str, bytes] = {
    "of kind 0": record(0, {}),
    "of kind 200": record(200, {}),
    "no JSON": record(3, b"{oops"),
    "not UTF-8": record(3, b'{"\xff": 1}'),
    "a list": record(3, []),
    "a number": record(1, 3),
    "null": record(5, None),
    "deep": record(5, b'{"a":' * 100_000),
    "empty": record(3, b""),
    "a sequence of 2 to the 64": record(3, METRICS, 2**64 - 1),
    "a start without layers": record(1, {"step": 0}),
    "a start with layers of numbers": record(1, {**START, "layers": [1, 2]}),
    "a start that estimates one of two": record(1, {**START, "estimated": [True]}),
    "a start before the first step": record(1, {**START, "step": -1}),
    "a start with a device that is an object": record(1, {**START, "device_name": {}}),
    "a start with one warning that is a text": record(1, {**START, "warnings": "all"}),
    "a start resumed as no loop resumes": record(1, {**START, "resumed": {"kept": 3}}),
    "a state that is a number": record(2, {"state": 1}),
    "a state without one": record(2, {}),
    "metrics without values": record(3, {"step": 1, "epoch": 0.1}),
    "metrics of a text": record(3, {**METRICS, "values": {"loss": "much"}}),
    "metrics of a list": record(3, {**METRICS, "values": {"loss": [1.0]}}),
    "metrics of no object": record(3, {**METRICS, "values": [1.0]}),
    "metrics at a step that is a text": record(3, {**METRICS, "step": "1"}),
    "metrics at half a step": record(3, {**METRICS, "step": 1.5}),
    "metrics at step minus one": record(3, {**METRICS, "step": -1}),
    "metrics at step 2 to the 63": record(3, {**METRICS, "step": 2**63}),
    "metrics in an epoch that is a list": record(3, {**METRICS, "epoch": []}),
    "metrics that took a text": record(3, {**METRICS, "step_ms": "long"}),
    "metrics with a name of megabytes": record(3, {**METRICS, "values": {"x" * 2**21: 1.0}}),
    "layers cut off": record(4, struct.pack("<QI", 1, 2) + b"\x00" * 20),
    "layers without a head": record(4, b"\x00"),
    "four billion layers": record(4, struct.pack("<QI", 1, 2**32 - 1) + b"\x00" * 40),
    "layers at step 2 to the 64": record(
        4, struct.pack("<QI3d", 2**64 - 1, 1, 1, 1, 1) + b"\1\1\1"
    ),
    "layers without marks": record(4, struct.pack("<QI3d", 1, 1, 1, 1, 1)),
    "a proof of another verdict": record(5, {**PROOF, "verdict": MARKUP}),
    "a proof without counts": record(5, {"verdict": "holds", "step": 1}),
    "a proof with a count that is a text": record(
        5, {**PROOF, "frozen": {**_COUNTS, "checked": "1"}}
    ),
    "a proof whose list is a number": record(5, {**PROOF, "frozen": {**_COUNTS, "changed": 3}}),
    "a proof with lists in its list": record(5, {**PROOF, "frozen": {**_COUNTS, "changed": [[]]}}),
    "a freeze without a config": record(8, {"step": 1, "seq": 1}),
    "a freeze of no schedule": record(8, {**FREEZE, "config": {}}),
    "a freeze of a bad schedule": record(8, {**FREEZE, "config": {"schedule": [{"match": 3}]}}),
    "an inspection of uneven lists": record(9, {"step": 1, "unreached": [True], "lost": []}),
    "an inspection of texts": record(9, {"step": 1, "unreached": ["yes"], "lost": ["no"]}),
}

RESULTS: dict[str, bytes] = {
    "no JSON": b"{oops",
    "empty": b"",
    "a list": b"[]",
    "no members": b'{"format": 1}',
    "another outcome": b'{"format": 1, "outcome": "great", "step": 1, "reason": null, "message": null}',
    "another reason": b'{"format": 1, "outcome": "failed", "step": 1, "reason": "x", "message": "y"}',
    "a step that is a text": b'{"format": 1, "outcome": "failed", "step": "1", "reason": null,'
    b' "message": null}',
    "a message that is an object": b'{"format": 1, "outcome": "failed", "step": 1, "reason": null,'
    b' "message": {}}',
    "not UTF-8": b'{"format": 1, "outcome": "\xff"}',
    "deep": b'{"format":' * 100_000,
}  # fmt: skip

# --------------------------------------------------------------- files of a job's checkpoint

MANIFESTS: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{oops",
    "not UTF-8": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "null": b"null",
    "a list": b"[]",
    "a text": b'"manifest"',
    "no members": b"{}",
    "another format": b'{"format": 99, "step": 2, "files": {}}',
    "no files": b'{"format": 1, "step": 2, "files": {}}',
    "files that are a list": b'{"format": 1, "step": 2, "files": [1, 2]}',
    "files that are a number": b'{"format": 1, "step": 2, "files": 3}',
    "a file elsewhere": b'{"format": 1, "step": 2, "files": {"../../../../../etc/passwd":'
    b' {"bytes": 1, "sha256": ""}, "model.safetensors": 1, "trainer.safetensors": 1,'
    b' "trainer.json": 1}}',
    "a file without a digest": b'{"format": 1, "step": 2, "files": {"model.safetensors": {},'
    b' "trainer.safetensors": {}, "trainer.json": {}}}',
}  # fmt: skip

# ------------------------------------------------------------------------------ command lines

COMMANDS: list[list[str]] = [
    ["nothing"], ["plan"], ["plan", ""], ["plan", "demo:nothing"], ["plan", "{"], ["plan", "999"],
    ["plan", "demo:three-layers", "--freeze", "{"], ["plan", "demo:three-layers", "--freeze", "re:("],
    ["plan", "demo:three-layers", "--freeze"], ["plan", "demo:three-layers", "--config", "/nowhere"],
    ["plan", "demo:three-layers", "--config", "/dev/null"], ["plan", "demo:three-layers", "--config", "/etc"],
    ["train"], ["train", "demo:digits"], ["train", "demo:digits", "demo:nothing"],
    ["train", "demo:digits", "demo:digits", "--epochs", "0"],
    ["train", "demo:digits", "demo:digits", "--epochs", "x"],
    ["train", "demo:digits", "demo:digits", "--lr", "nan"],
    ["train", "demo:digits", "demo:digits", "--lr", "inf"],
    ["train", "demo:digits", "demo:digits", "--optimizer", "lion"],
    ["train", "demo:digits", "demo:digits", "--device", "cuda:99"],
    ["train", "demo:digits", "demo:digits", "--no-such-option"],
    ["train", "demo:digits", "demo:digits", "--freeze", "**"],
    ["evaluate", "demo:digits", "csv:/nowhere.csv"], ["verify"], ["verify", "/nowhere", "/nowhere", "--config", "/nowhere"],
    ["verify", "/etc/passwd", "/etc/passwd", "--config", "/etc/passwd"], ["stop"], ["stop", "x"], ["stop", "0"],
    ["stop", "999"], ["pause", "999"], ["pause", "1", "--mode", "nap"], ["resume", "999"],
    ["resume", "-1"], ["delete", "999"], ["delete", str(2**63)], ["export", "999", "-o", "/nowhere/x.csv"],
    ["export", "1"], ["export", "1", "--format", "xls", "-o", "x"], ["link", "extra"],
    ["serve", "--port", "x"], ["serve", "--port", "99999"], ["serve", "--host", "no such host"],
    ["serve", "--host", "0.0.0.0"], ["jobs", "--data-dir", "/proc/nowhere"], ["jobs", "--data-dir", "/dev/null"],
]  # fmt: skip
