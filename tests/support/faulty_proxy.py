"""A proxy of a real server that replaces some of its answers by faults."""

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
    """Forwards everything except the next `count` requests to /generate, which it answers with the fault."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._fault: Fault = "500"
        self._count = 0

    def spoil(self, fault: Fault, count: int) -> None:
        """Answers the next `count` requests with the fault."""
        self._fault, self._count = fault, count

    async def answer(self, path: str, request: bytes) -> bytes | None:
        """Returns the fault for a request to /generate while the count lasts; else None."""
        if path != "/generate" or not self._count:
            return None
        self._count -= 1
        return ANSWERS[self._fault]
