"""A TCP proxy before a real server that spoils some of its answers."""

import asyncio
import threading
from typing import Literal

Fault = Literal["500", "half of the JSON", "connection cut"]
ANSWERS: dict[Fault, bytes] = {
    "500": b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\n\r\noops",
    "half of the JSON": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    b'Content-Length: 17\r\n\r\n[{"output_ids": [',
    "connection cut": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9000\r\n\r\n[{",
}


class FaultyProxy:
    """Passes everything on but the next `count` requests to generate, which get the fault for an answer."""

    def __init__(self, url: str) -> None:
        self._host, port = url.removeprefix("http://").split(":")
        self._port = int(port)
        self._fault: Fault = "500"
        self._count = 0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def spoil(self, fault: Fault, count: int) -> None:
        """From now on, until `count` requests were spoiled."""
        self._fault, self._count = fault, count

    def close(self) -> None:
        """From now on connections are refused."""
        self._loop.call_soon_threadsafe(self._server.close)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request a connection."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return writer.close()
        lines = [line for line in head[:-4].split(b"\r\n") if not line.lower().startswith(b"connection:")]
        if self._count and b"/generate" in lines[0]:
            self._count -= 1
            length = next(line for line in lines if line.lower().startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))
            writer.write(ANSWERS[self._fault])
        else:
            upstream, out = await asyncio.open_connection(self._host, self._port)
            out.write(b"\r\n".join([*lines, b"Connection: close", b"", b""]))
            rest = asyncio.create_task(_pass_on(reader, out))
            await _pass_on(upstream, writer)
            rest.cancel()
            out.close()
        writer.close()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while part := await reader.read(1 << 16):
        writer.write(part)
        await writer.drain()
