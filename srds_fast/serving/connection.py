"""What a server does with a connection: reads a bounded body, notices that the client has left, and sends events.

A client that has gone wants nothing more. So while the images are made, the connection is watched, and once it is
closed the work is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from . import openai_answer
from .contract import Refused

logger = logging.getLogger("srds_fast")
T = TypeVar("T")

# of an answer that nobody reads: nginx logs clients that have left by this number
CLIENT_LEFT = 499
FAILED = Refused(500, "The server failed. Its log has the reason. Tell who runs it.", code="server_failed")


class ClientLeft(Exception):
    """The client has closed its connection."""


async def body_of(request: Request, most: int) -> bytes:
    """The body of a request.

    Raises:
        Refused: it has more than `most` bytes, or is not said to be JSON.
        ClientLeft: the connection was closed before its end.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # a page of another site cannot send this type without asking first, which nobody answers
        raise Refused(415, "The Content-Type is not application/json. Send JSON, and say so.", code="not_json")
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        body += message.get("body", b"")
        if len(body) > most:
            raise Refused(413, f"The body has more than {most:,} bytes. Shorten the prompt.", code="body_too_large")
        if not message.get("more_body", False):
            return bytes(body)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work, which is cancelled once the client has left.

    Raises:
        ClientLeft: it has.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def refusal(refused: Refused) -> Response:
    """The answer that tells of it."""
    body, headers = openai_answer.as_json(openai_answer.error(refused)), openai_answer.error_headers(refused)
    return Response(body, refused.status, headers, media_type="application/json")


class EventStream(Response):
    """Server-sent events. What is refused before the first of them is answered with its status.

    Args:
        events: closed at the end, also if the client has left.
        until: time of the event loop at which the stream ends with `late`.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], until: float, late: Refused) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._until, self._late = events, until, late
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send_all(scope, receive, send))
        except ClientLeft:
            self.status_code = CLIENT_LEFT
        finally:
            await self._events.aclose()

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout_at(self._until):
                async for event in self._events:
                    await self._send(send, event)
        except TimeoutError:
            refused = self._late
        except Refused as error:
            refused = error
        except Exception as error:
            logger.error("A stream failed.", exc_info=error)
            refused = FAILED
        else:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        if not self._begun:
            self.status_code = refused.status
            await refusal(refused)(scope, receive, send)
            return
        await self._send(send, openai_answer.error_event(refused))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, event: bytes) -> None:
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": event, "more_body": True})
