"""A TCP proxy of a real server, for tests that record the traffic or answer instead of the server."""

import asyncio
import contextlib
import threading


class Proxy:
    """Forwards every request for which `answer` returns None; one request per connection."""

    def __init__(self, url: str) -> None:
        self._host, port = url.removeprefix("http://").split(":")
        self._port = int(port)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def answer(self, path: str, request: bytes) -> bytes | None:
        """Returns an answer to send instead of the server's; None: forward the request.

        request: HTTP with its body, unless that comes in chunks.
        """
        return None

    async def ask(self, request: bytes) -> bytes:
        """Returns the server's whole answer to a request."""
        upstream, out = await asyncio.open_connection(self._host, self._port)
        out.write(request)
        answer = await upstream.read()
        out.close()
        return answer

    def close(self) -> None:
        """Refuses connections from now on."""
        self._loop.call_soon_threadsafe(self._server.close)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # if one side is gone, the other side's connection is closed too
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            path, request = await _read(reader)
            answer = await self.answer(path, request)
            if answer is None:
                await self._pass_on(request, reader, writer)
            else:
                writer.write(answer)
        writer.close()

    async def _pass_on(
        self, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        upstream, out = await asyncio.open_connection(self._host, self._port)
        out.write(request)
        # when a trainer is killed, the server must see its connection close
        ways = [asyncio.create_task(_copy(reader, out)), asyncio.create_task(_copy(upstream, writer))]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        out.close()


async def _read(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """Returns a request's path, and its bytes to forward, without a chunked body."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = [line for line in head[:-4].split(b"\r\n") if not line.lower().startswith(b"connection:")]
    lengths = [line for line in lines if line.lower().startswith(b"content-length:")]
    body = await reader.readexactly(int(lengths[0].split(b":")[1])) if lengths else b""
    return lines[0].split()[1].decode(), b"\r\n".join([*lines, b"Connection: close", b"", body])


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while part := await reader.read(1 << 16):
        writer.write(part)
        await writer.drain()
