"""Command line: turns YAML files and `section.name=value` overrides into a Config.

jsonargparse parses the values, with the types of config.py. This module adds the file and line of a mistake
and the nearest name. It reads YAML as nodes, since jsonargparse's own reader drops the line numbers and
turns text such as 2025-01-31 or `on` into a date or a boolean before the setting's type is known.
"""

import argparse
import functools
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from difflib import get_close_matches
from typing import Any

import jsonargparse
import yaml

from megatron_bicc.algorithms.presets import parse_algorithm, resolve
from megatron_bicc.config import RENAMED, Config, did_you_mean, in_mapping, setting_of, settings
from megatron_bicc.errors import PROGRAM, UserError, abort, print_rank0, shortened

FLAGS = ("-h", "--help", "--print-config")
COMMAND_LINE = "command line"
TRUNCATED_SAMPLING = (
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
)
"""Settings of other systems that are left out on purpose."""


@dataclass(frozen=True)
class Assignment:
    """A setting's value as text, and where it was given."""

    name: str
    text: str
    origin: str


def parse_config(argv: list[str], program: str = PROGRAM) -> Config:
    """Returns a run's settings: defaults, then each `--config FILE` in order, then the overrides.

    An override is `section.name=value`, `--section.name=value` or `--section.name value`; `--dry-run` is
    short for `dry_run=true`. `--help` and `--print-config` (the YAML that would run, presets filled in) exit
    with status 0. A mistake is one line on stderr and exit status 2. Each value is checked by its own field;
    startup.validate checks what involves several settings, files or processes.
    """
    try:
        flags, overrides = _read_arguments(argv)
        given = [leaf for a in overrides if a.name == "config" for leaf in _read_yaml(a.text)]
        given += [a for a in overrides if a.name != "config"]
        config = _build(Config, _parse(flags, given))
        if "--print-config" in flags:
            resolved = asdict(resolve(config))
            print_rank0(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), sys.stdout)
            raise SystemExit(0)
        return config
    except UserError as error:
        abort(str(error), program)


def _build(cls: type, values: dict[str, Any], prefix: str = "") -> Any:
    nested = {
        f.name: _build(f.type, values, f"{prefix}{f.name}.") for f in fields(cls) if is_dataclass(f.type)
    }
    own = {f.name: values[prefix + f.name] for f in fields(cls) if prefix + f.name in values}
    return cls(**own | nested)


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog=PROGRAM,
        usage="%(prog)s --config FILE [section.name=value ...]",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=30, width=110),
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; overrides take precedence")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved settings as YAML and exit"
    )
    sections = [f for f in fields(Config) if is_dataclass(f.type)]
    groups = {f.name: parser.add_argument_group(f.name, f.type.__doc__) for f in sections}
    for name, setting in settings().items():
        groups.get(name.partition(".")[0], parser).add_argument(
            f"--{name}.NAME" if setting.is_mapping else f"--{name}",
            type=setting.type,
            default=setting.default,
            metavar="VALUE" if setting.is_mapping else setting.metavar,
            help=setting.usage.replace("%", "%%"),
        )
    return parser


def _parse(flags: list[str], given: list[Assignment]) -> dict[str, Any]:
    """Returns the given values by setting. Raises UserError for the first that its field does not accept."""
    parser = _parser()
    parser.parse_args(flags)
    values: dict[str, Any] = {}
    for name, text, origin in ((a.name, a.text, a.origin) for a in given):
        setting = setting_of(name)
        if setting.is_mapping:
            in_mapping = values.setdefault(setting.name, {})
            in_mapping[name.removeprefix(f"{setting.name}.")] = _field_value(name, text, origin)
            continue
        try:
            values[name] = parser.parse_args([f"--{name}={text}"], defaults=False)[name]
            setting.check(values[name])
            if name == "algorithm":
                parse_algorithm(text)
        except (argparse.ArgumentError, RecursionError) as error:  # the value has another type
            hint = did_you_mean(text, setting.choices)
            shown = shortened(repr(text))
            raise UserError(f"{origin}: {name} is {shown}; it must be {setting.expected}{hint}") from error
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error
    return values


def _field_value(name: str, text: str, origin: str) -> Any:
    """Returns the value of a megatron-core field as YAML reads it. Raises UserError if it is refused."""
    # Imported late: it loads torch and megatron-core, which know the field's type.
    from megatron_bicc.model.megatron_settings import check_field

    try:
        _check_cycles(yaml.compose(text, Loader=yaml.SafeLoader))
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2025-13-45
        shown = shortened(repr(text))
        raise UserError(f"{origin}: {shortened(name)} is {shown}; it must be a YAML value") from error
    try:
        check_field(name, value)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    return value


def _read_arguments(argv: list[str]) -> tuple[list[str], list[Assignment]]:
    """Returns (flags, assignments) of a command line."""
    flags: list[str] = []
    given: list[Assignment] = []
    tokens = list(reversed(argv))
    while tokens:
        token = tokens.pop()
        name, equals, text = token.removeprefix("--").partition("=")
        if token in FLAGS:
            flags.append(token)
            continue
        if name == "dry-run" or token == "--dry_run":
            name, text = "dry_run", text or (tokens.pop() if tokens[-1:] in (["true"], ["false"]) else "true")
        elif name != "config":
            _check_name(name, COMMAND_LINE)
        if not equals and name != "dry_run":
            text = tokens.pop() if token.startswith("--") and tokens else "--"
            if text.startswith("--"):
                shown = shortened(name)
                raise UserError(f"{COMMAND_LINE}: {shown} has no value; write {shown}=value")
        given.append(Assignment(name, text, COMMAND_LINE))
    return flags, given


def _read_yaml(path: str) -> list[Assignment]:
    """Returns the settings in a file. Raises UserError that names the file and, if it can, the line."""
    try:
        with open(path, encoding="utf-8") as stream:
            root = yaml.compose(stream, Loader=yaml.SafeLoader)
            _check_cycles(root)
    except OSError as error:
        raise UserError(f"--config {path}: cannot read it: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: cannot read it: it is not UTF-8 text") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply to be settings") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: contains no settings; write 'section:' and 'name: value' lines")
    return list(_leaves(root, "", path))


def _check_cycles(root: yaml.Node | None) -> None:
    """Raises yaml.MarkedYAMLError if a node of YAML contains itself, by an alias."""
    above: set[yaml.Node] = set()
    finished: set[yaml.Node] = set()

    def visit(node: yaml.Node) -> None:
        if node in above:
            raise yaml.MarkedYAMLError(problem="a value contains itself", problem_mark=node.start_mark)
        if isinstance(node, yaml.CollectionNode) and node not in finished:
            above.add(node)
            for item in node.value:
                for inner in item if isinstance(item, tuple) else (item,):
                    visit(inner)
            above.remove(node)
            finished.add(node)

    if root is not None:
        visit(root)


def _leaves(mapping: yaml.MappingNode, prefix: str, path: str) -> Iterator[Assignment]:
    seen: set[str] = set()
    for key, node in mapping.value:
        origin = f"{path} line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{origin}: a list or a mapping is no name of a setting")
        name = f"{prefix}{key.value}"
        if name in seen:
            raise UserError(f"{origin}: {shortened(name)} is given twice; remove one")
        seen.add(name)
        is_null = node.tag == "tag:yaml.org,2002:null"
        if isinstance(node, yaml.MappingNode) and not _is_setting(name):
            yield from _leaves(node, f"{name}.", path)
        elif not (is_null and _is_section(name)):
            _check_name(name, origin)
            if name not in settings():
                # the document's end, which follows a plain scalar, is no part of the value
                yield Assignment(name, yaml.serialize(node).removesuffix("\n...\n"), origin)
                continue
            expected = settings()[name].expected
            if not isinstance(node, yaml.ScalarNode):
                raise UserError(f"{origin}: {name} takes one value: {expected}")
            if is_null and "null" not in settings()[name].choices:
                raise UserError(f"{origin}: {name} is empty; it must be {expected}")
            yield Assignment(name, "null" if is_null else node.value, origin)


def _is_section(name: str) -> bool:
    """Returns whether names of settings, or the names in a mapping, follow this one."""
    own = settings().get(name)
    return any(known.startswith(f"{name}.") for known in settings()) or (own is not None and own.is_mapping)


def _is_setting(name: str) -> bool:
    """Returns whether a value can be given to this name: a setting's, or one in a mapping."""
    return in_mapping(name) or (name in settings() and not settings()[name].is_mapping)


def _check_name(name: str, origin: str) -> None:
    """Raises UserError, with the nearest name, unless name is a setting."""
    if _is_setting(name):
        return
    if name in RENAMED:
        raise UserError(f"{origin}: {name} is now called {RENAMED[name]}; rename it")
    if _is_section(name):
        raise UserError(f"{origin}: {name} is a section; set {name}.<name>, see --help")
    last = name.split(".")[-1]
    if last in TRUNCATED_SAMPLING:
        raise UserError(
            f"{origin}: there is no setting {shortened(name)}: log-probs are of the whole distribution, and "
            "the policy gradient needs samples of the same; only rollout.temperature changes both"
        )
    in_other_sections = [known for known in settings() if known.split(".")[-1] == last]
    mappings = [known for known, setting in settings().items() if setting.is_mapping]
    mapping = get_close_matches(name.rpartition(".")[0], mappings, n=1, cutoff=0.85)
    in_mappings = [f"{known}.{shortened(last)}" for known in mapping]
    hint = did_you_mean(name, in_other_sections or in_mappings or settings(), cutoff=0.0)
    raise UserError(f"{origin}: unknown setting {shortened(name)}{hint}")
