"""Weights in the body of an HTTP request."""

import base64
import json
import pickle

from megatron_bicc.weight_sync.buckets import Bucket

PATH = "/update_weights_from_tensor"


def encode(bucket: Bucket) -> list[bytes]:
    """Base64, in parts, of what the server unpickles: a list of (name, tensor on the CPU).

    Holds 4/3 of the bucket's bytes beside it.
    """
    text = _Base64Writer()
    tensors = [(name, tensor.cpu()) for name, tensor in bucket.tensors]
    pickle.Pickler(text, protocol=4).dump(tensors)
    text.finish()
    return text.parts


def request_body(text: list[bytes], tensor_parallel: int) -> list[bytes]:
    """The parts of the request's JSON, `encode`'s text in it once a TP rank, nothing of it copied."""
    rest = json.dumps({"flush_cache": False}).encode()
    body = [b'{"serialized_named_tensors":[']
    for rank in range(tensor_parallel):
        body += [b',"' if rank else b'"', *text, b'"']
    return [*body, b"],", rest[1:]]


class _Base64Writer:
    """A file that keeps the base64 text of what is written to it."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self._rest = b""

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        if self._rest:
            missing = -len(self._rest) % 3
            self._rest, view = self._rest + bytes(view[:missing]), view[missing:]
            if len(self._rest) < 3:
                return len(data)
            self.parts.append(base64.b64encode(self._rest))
        whole = len(view) // 3 * 3
        self.parts.append(base64.b64encode(view[:whole]))
        self._rest = bytes(view[whole:])
        return len(data)

    def finish(self) -> None:
        """Writes out the last bytes, padded."""
        self.parts.append(base64.b64encode(self._rest))
