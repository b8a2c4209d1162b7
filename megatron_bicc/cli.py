"""The command line: a YAML file and `section.name=value` overrides become a Config."""

import argparse
import difflib
import functools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Literal, NoReturn, get_args, get_origin

import docstring_parser
import jsonargparse
import yaml

from megatron_bicc import launcher
from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config
from megatron_bicc.errors import UserError
from megatron_bicc.validation import validate

__all__ = ["abort", "parse_config", "settings", "speak_once", "validate"]

PROGRAM = "python -m megatron_bicc.train"
FLAGS = ("-h", "--help", "--print-config")
DRY_RUN = ("--dry-run", "--dry_run")
COMMAND_LINE = "command line"
TURN_S = 2.0
"""Seconds in which torchrun kills the other ranks"""
CUTS = ("top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
"""Settings of other systems that there are none of here."""


@dataclass(frozen=True)
class Setting:
    """One leaf of Config."""

    type: Any
    default: Any
    help: str

    @property
    def choices(self) -> list[str]:
        """Every value that the type spells out; empty for a number or text."""
        parts = [self.type] if get_origin(self.type) in (None, Literal) else get_args(self.type)
        spelled = {bool: ["true", "false"], type(None): ["null"]}
        return [choice for part in parts for choice in spelled.get(part, get_args(part))]

    @property
    def expected(self) -> str:
        """What the setting takes, in words."""
        words = {int: "a whole number", float: "a number", str: "text"}
        return " or ".join([*(words[kind] for kind in self._free_types), *self.choices])

    @property
    def metavar(self) -> str:
        """What the setting takes, for --help."""
        return "|".join([*(kind.__name__ for kind in self._free_types), *self.choices])

    @property
    def _free_types(self) -> list[type]:
        return [kind for kind in (int, float, str) if kind in (self.type, *get_args(self.type))]


@dataclass(frozen=True)
class Assignment:
    """The text of a setting's value, and where it stands."""

    name: str
    text: str
    origin: str

    @property
    def option(self) -> str:
        return f"--{self.name}={self.text}"


def parse_config(argv: list[str], program: str = PROGRAM) -> Config:
    """The settings of a run: defaults, then each `--config FILE`, then the overrides.

    An override is `section.name=value`, `--section.name=value` or `--section.name value`; `--dry-run` is
    short for `dry_run=true`. `--help` and `--print-config` (the YAML that would run, presets filled in) exit
    with status 0. A mistake is one line on stderr and exit status 2. Values are checked for their type only;
    `validate` does the rest.
    """
    try:
        flags, overrides = _read_arguments(argv)
        files = [a.text for a in overrides if a.name == "config"]
        assignments = [a for file in files for a in _read_yaml(file)]
        assignments += [a for a in overrides if a.name != "config"]
        config = _build(Config, _convert(flags, assignments))
        if "--print-config" in flags:
            resolved = asdict(resolve(config))
            speak_once(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), sys.stdout)
            raise SystemExit(0)
        return config
    except UserError as error:
        abort(str(error), program)


def abort(message: str, program: str = PROGRAM) -> NoReturn:
    """Ends the process with one line on stderr and exit status 2.

    The first rank that has the error prints it: rank 0 at once. The others wait for their turn, in which
    torchrun kills them if another rank has exited; who is still alive then has an error of its own.
    """
    where = ""
    if launcher.rank() > 0:
        time.sleep(TURN_S + 0.25 * launcher.local_rank())
        where = f"{launcher.place()}: "
    print(f"{program}: error: {where}{' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def speak_once(text: str, stream: Any) -> None:
    """Prints on rank 0; the other ranks wait, because torchrun kills all processes once one has exited."""
    if launcher.rank() == 0:
        print(text, end="", file=stream, flush=True)
    else:
        time.sleep(TURN_S)


@functools.cache
def settings() -> dict[str, Setting]:
    """Every setting of Config by its dotted name."""
    return dict(_walk(Config, ""))


def _walk(cls: type, prefix: str) -> Iterator[tuple[str, Setting]]:
    helps = {param.arg_name: param.description for param in docstring_parser.parse_from_object(cls).params}
    for field in fields(cls):
        if is_dataclass(field.type):
            yield from _walk(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, Setting(field.type, field.default, helps[field.name])


def _build(cls: type, values: jsonargparse.Namespace) -> Any:
    nested = {f.name: _build(f.type, values[f.name]) for f in fields(cls) if is_dataclass(f.type)}
    return cls(**{f.name: values[f.name] for f in fields(cls)} | nested)


def _parser() -> jsonargparse.ArgumentParser:
    formatter = functools.partial(argparse.HelpFormatter, max_help_position=30, width=110)
    parser = jsonargparse.ArgumentParser(
        prog=PROGRAM,
        usage="%(prog)s --config FILE [section.name=value ...]",
        formatter_class=formatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; overrides win over it")
    parser.add_argument("--print-config", action="store_true", help="print the YAML that would run, and exit")
    sections = [f for f in fields(Config) if is_dataclass(f.type)]
    groups = {f.name: parser.add_argument_group(f.name, f.type.__doc__) for f in sections}
    for name, setting in settings().items():
        groups.get(name.partition(".")[0], parser).add_argument(
            f"--{name}",
            type=setting.type,
            default=setting.default,
            metavar=setting.metavar,
            help=f"{setting.help} [{json.dumps(setting.default)}]".replace("%", "%%"),
        )
    return parser


def _convert(flags: list[str], assignments: list[Assignment]) -> jsonargparse.Namespace:
    """The typed values; raises ValueError for the first assignment that does not fit its setting."""
    parser = _parser()
    try:
        return parser.parse_args([*flags, *(a.option for a in assignments)])
    except argparse.ArgumentError:
        wrong = next(a for a in assignments if not _fits(parser, a))
        expected = settings()[wrong.name].expected
        raise UserError(f"{wrong.origin}: {wrong.name} is {wrong.text!r}; it must be {expected}") from None


def _fits(parser: jsonargparse.ArgumentParser, assignment: Assignment) -> bool:
    try:
        parser.parse_args([assignment.option])
    except argparse.ArgumentError:
        return False
    return True


def _read_arguments(argv: list[str]) -> tuple[list[str], list[Assignment]]:
    """The flags, and everything that has a value."""
    flags: list[str] = []
    assignments: list[Assignment] = []
    tokens = iter(_with_dry_run(argv))
    for token in tokens:
        if token in FLAGS:
            flags.append(token)
            continue
        name, equals, value = token.removeprefix("--").partition("=")
        if name != "config":
            _check_name(name, COMMAND_LINE)
        if not equals:
            value = next(tokens, "--") if token.startswith("--") else "--"
            if value.startswith("--"):
                raise UserError(f"{COMMAND_LINE}: {name} has no value; write {name}=value")
        assignments.append(Assignment(name, value, COMMAND_LINE))
    return flags, assignments


def _with_dry_run(argv: list[str]) -> list[str]:
    """With the value that --dry-run alone stands for."""
    return [
        "--dry_run=true" if token in DRY_RUN and value not in ("true", "false") else token
        for token, value in zip(argv, [*argv[1:], ""], strict=False)
    ]


def _read_yaml(path: str) -> list[Assignment]:
    """The settings in a file; raises ValueError that names the file and, where there is one, the line."""
    try:
        with open(path, encoding="utf-8") as stream:
            root = yaml.compose(stream, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"--config {path}: cannot read it: {reason}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be settings") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: holds no settings; write 'section:' and 'name: value' lines")
    return list(_leaves(root, "", path))


def _leaves(mapping: yaml.MappingNode, prefix: str, path: str) -> Iterator[Assignment]:
    seen: set[str] = set()
    for key, value in mapping.value:
        name, origin = f"{prefix}{key.value}", f"{path} line {key.start_mark.line + 1}"
        if name in seen:
            raise UserError(f"{origin}: {name} is given twice; remove one")
        seen.add(name)
        if isinstance(value, yaml.MappingNode) and name not in settings():
            yield from _leaves(value, f"{name}.", path)
        elif not (_is_null(value) and _is_section(name)):
            yield Assignment(name, _scalar(name, value, origin), origin)


def _scalar(name: str, node: yaml.Node, origin: str) -> str:
    _check_name(name, origin)
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{origin}: {name} takes one value: {settings()[name].expected}")
    if not _is_null(node):
        return node.value
    if "null" not in settings()[name].choices:
        raise UserError(f"{origin}: {name} is empty; it must be {settings()[name].expected}")
    return "null"


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _is_section(name: str) -> bool:
    return any(known.startswith(f"{name}.") for known in settings())


def _check_name(name: str, origin: str) -> None:
    """Raises UserError, with the nearest name, unless name is a setting."""
    if name in settings():
        return
    if _is_section(name):
        raise UserError(f"{origin}: {name} is a section; set {name}.<name>, see --help")
    if name.split(".")[-1] in CUTS:
        raise UserError(
            f"{origin}: there is no setting {name}: the policy gradient needs samples of the whole "
            "distribution, of which log-probs are taken; rollout.temperature is all that shapes it"
        )
    in_other_sections = [known for known in settings() if known.split(".")[-1] == name.split(".")[-1]]
    nearest = difflib.get_close_matches(name, in_other_sections or settings(), n=1, cutoff=0.0)[0]
    raise UserError(f"{origin}: unknown setting {name}; the nearest is {nearest}")
