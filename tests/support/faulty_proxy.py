"""A proxy before a real server that spoils some of its answers."""

from typing import Literal

from support.proxy import Proxy

Fault = Literal["500", "half of the JSON", "connection cut"]
ANSWERS: dict[Fault, bytes] = {
    "500": b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\n\r\noops",
    "half of the JSON": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    b'Content-Length: 17\r\n\r\n[{"output_ids": [',
    "connection cut": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9000\r\n\r\n[{",
}


class FaultyProxy(Proxy):
    """Passes everything on but the next `count` requests to generate, which get the fault for an answer."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._fault: Fault = "500"
        self._count = 0

    def spoil(self, fault: Fault, count: int) -> None:
        """From now on, until `count` requests were spoiled."""
        self._fault, self._count = fault, count

    async def answer(self, path: str, request: bytes) -> bytes | None:
        """The fault, for a request to generate while there are some to spoil."""
        if path != "/generate" or not self._count:
            return None
        self._count -= 1
        return ANSWERS[self._fault]
