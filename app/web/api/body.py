"""Strict JSON in, valid JSON out; it does not know what a document means."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Path, Query, Request
from starlette.responses import Response

from app.freezing.errors import InvalidDocument
from app.service import Service
from app.web.errors import to_json

MAX_DEPTH = 32
MAX_INTEGER = 2**63 - 1

Document = dict[str, Any]


class Answer(Response):
    """A document as JSON; numbers that JSON lacks are named, never nulled."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content).encode()


def parse_json(raw: bytes) -> Any:
    """Read JSON as RFC 8259 has it, without the parts that readers disagree on.

    Raises:
        HTTPException: 400 for what is not UTF-8 or not JSON, for NaN and Infinity, a key given
            twice, half a surrogate pair, an integer beyond 64 bits, or depth over 32.
    """
    try:
        value = json.loads(
            raw.decode("utf-8-sig"),
            object_pairs_hook=_distinct,
            parse_constant=_refuse_constant,
            parse_int=_within_64_bits,
            parse_float=_finite,
        )
        _check_depth_and_text(value)
    except UnicodeEncodeError:
        raise HTTPException(400, "The JSON has half of a surrogate pair in a text.") from None
    except UnicodeDecodeError:
        raise HTTPException(400, "The body is not UTF-8.") from None
    except RecursionError:
        raise HTTPException(400, f"The JSON is nested over {MAX_DEPTH} levels deep.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise HTTPException(400, f"The body is not JSON: {error.msg} ({where}).") from None
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> Document:
    document = dict(pairs)
    if len(document) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise HTTPException(400, f"The JSON gives the key {_shorten(twice)} twice in one object.")
    return document


def _refuse_constant(name: str) -> None:
    raise HTTPException(400, f"{name} is not JSON; leave the member out or send null.")


def _within_64_bits(digits: str) -> int:
    # Counted before it is read: reading a million digits takes seconds.
    if len(digits) > 20 or not -MAX_INTEGER - 1 <= int(digits) <= MAX_INTEGER:
        raise HTTPException(400, f"The integer {_shorten(digits)} does not fit into 64 bits.")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise HTTPException(400, f"The number {_shorten(digits)} is too large.")
    return number


def _check_depth_and_text(value: Any) -> None:
    level, depth = [value], 0
    while level:
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str):
                item.encode()
        depth += any(isinstance(item, dict | list) for item in level)
        if depth > MAX_DEPTH:
            raise RecursionError
        level = below


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


# ------------------------------------------------------------- what routes ask for in their names


async def read_document(request: Request) -> Document:
    """The body, which must be a JSON object."""
    document = parse_json(await request.body())
    if not isinstance(document, dict):
        raise InvalidDocument([("", "The body must be a JSON object: {…}.")])
    return document


async def read_optional_document(request: Request) -> Document:
    """The body, which may be missing: an empty object then."""
    return await read_document(request) if await request.body() else {}


def find_service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Verbs = Annotated[Service, Depends(find_service)]
Body = Annotated[Document, Depends(read_document)]
OptionalBody = Annotated[Document, Depends(read_optional_document)]
Id = Annotated[int, Path(ge=1, le=MAX_INTEGER)]
StepId = Annotated[int, Path(ge=0, le=MAX_INTEGER)]
Limit = Annotated[int, Query(ge=1, le=1000)]
OptionalId = Annotated[int | None, Query(ge=1, le=MAX_INTEGER)]


def takes(**example: Any) -> Document:
    """The OpenAPI words for a body that a route reads by itself."""
    schema = {"type": "object", "example": example}
    return {"requestBody": {"content": {"application/json": {"schema": schema}}}}


def gives(*media_types: str) -> dict[int | str, Document]:
    """The OpenAPI words for an answer that is not JSON alone."""
    content = {
        media_type: {"schema": {} if media_type == "application/json" else {"type": "string"}}
        for media_type in media_types
    }
    return {200: {"description": "The answer, in one of these forms.", "content": content}}
