"""Errors as one line."""

from megatron_bicc.errors import first_line


def test_first_line() -> None:
    assert first_line(ValueError("\n  what went wrong \n  a page of traceback")) == "what went wrong"
    assert first_line(ValueError(" \n")) == "ValueError"
    assert len(first_line(ValueError("x" * 1000))) == 300
