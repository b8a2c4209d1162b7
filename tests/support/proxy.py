"""A TCP proxy before a real server, for tests that look at what passes, or answer in the server's place."""

import asyncio
import contextlib
import threading


class Proxy:
    """Passes everything on, one request a connection, but for what `answer` answers itself."""

    def __init__(self, url: str) -> None:
        self._host, port = url.removeprefix("http://").split(":")
        self._port = int(port)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def answer(self, path: str, request: bytes) -> bytes | None:
        """What goes back in place of the server's answer; None: the server's.

        request: with its body, unless that comes in chunks.
        """
        return None

    async def ask(self, request: bytes) -> bytes:
        """The server's whole answer."""
        upstream, out = await asyncio.open_connection(self._host, self._port)
        out.write(request)
        answer = await upstream.read()
        out.close()
        return answer

    def close(self) -> None:
        """From now on connections are refused."""
        self._loop.call_soon_threadsafe(self._server.close)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # a side that is gone: the other one's connection ends, too
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
        # a trainer that is killed takes its connections with it
        ways = [asyncio.create_task(_copy(reader, out)), asyncio.create_task(_copy(upstream, writer))]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        out.close()


async def _read(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """The path of a request, and what is to be passed on of it before the chunks of its body."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = [line for line in head[:-4].split(b"\r\n") if not line.lower().startswith(b"connection:")]
    lengths = [line for line in lines if line.lower().startswith(b"content-length:")]
    body = await reader.readexactly(int(lengths[0].split(b":")[1])) if lengths else b""
    return lines[0].split()[1].decode(), b"\r\n".join([*lines, b"Connection: close", b"", body])


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while part := await reader.read(1 << 16):
        writer.write(part)
        await writer.drain()
