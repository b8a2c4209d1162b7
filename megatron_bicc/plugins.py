"""Loads functions and classes by import path: package.module:name, or path/to/file.py:name."""

import hashlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_bicc.errors import UserError

logger = logging.getLogger(__name__)


def is_import_path(text: str) -> bool:
    """Returns whether a setting is an import path; the names of built-ins contain no colon."""
    return ":" in text


def load(setting: str, path: str) -> Callable[..., Any]:
    """Imports the function or class that a setting names.

    setting: dotted name of the setting, for the messages. path: `package.module:name` or `file.py:name`.
    Raises UserError if there is no such file, module or name, or it cannot be called. An exception that the
    imported code raises keeps its traceback, as the cause of the UserError.
    """
    place, _, name = path.rpartition(":")
    if not place or not name.isidentifier():
        raise UserError(f"{setting} is {path!r}; write package.module:name or path/to/file.py:name")
    module = _load_file(setting, Path(place)) if place.endswith(".py") else _import(setting, place)
    found = getattr(module, name, None)
    if not callable(found):
        names = ", ".join(sorted(key for key, value in vars(module).items() if _is_own(value, module))[:10])
        raise UserError(f"{setting} is {path!r}; {place} has no function or class {name!r}; it has: {names}")
    return found


def _load_file(setting: str, file: Path) -> Any:
    if not file.is_file():
        raise UserError(f"{setting} names {str(file)!r}; there is no such file under {Path.cwd()}")
    # one module per file, keyed by its path: two settings may name the same file
    name = f"megatron_bicc_plugin_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look it up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's code may raise anything, and must not end the run
        del sys.modules[name]
        raise _fails(setting, str(file), error) from error
    return module


def _import(setting: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"{setting}: no module {error.name!r}; install it or extend PYTHONPATH") from error
    except (Exception, SystemExit) as error:
        raise _fails(setting, name, error) from error


def _fails(setting: str, place: str, error: BaseException) -> UserError:
    # the command prints the UserError alone: the user's own traceback goes to the log
    logger.error("%s: %s fails on import", setting, place, exc_info=error)
    return UserError(f"{setting}: {place} fails on import: {type(error).__name__}: {error}")


def _is_own(value: Any, module: Any) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__
