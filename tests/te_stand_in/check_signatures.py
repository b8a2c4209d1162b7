"""Compares the stand-in with Transformer Engine. Run it after an update of that or of megatron-core.

python tests/te_stand_in/check_signatures.py [DIRECTORY of a transformer_engine package]

Without DIRECTORY, the installed one. Only reads sources, because an import of Transformer Engine needs CUDA.
Prints what differs, and ends with status 1 if anything does:

- a class or function of the stand-in that Transformer Engine lacks, or whose parameters differ: their names,
  order, kinds, or defaults, where both are literals
- a name that megatron-core imports and only one of the two has, unless it is in LEFT_OUT: megatron-core then
  takes another path with the stand-in than with Transformer Engine
"""

import ast
import functools
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

STAND_IN = Path(__file__).parent / "transformer_engine"
Definition: TypeAlias = ast.ClassDef | ast.FunctionDef
LEFT_OUT = {
    "quantised layers and weights": {
        "common.recipe": {"NVFP4BlockScaling"},
        "pytorch": {"fp8_model_init", "quantized_model_init"},
        "pytorch.cpp_extensions": {"cast_to_fp8", "general_gemm"},
        "pytorch.constants": {"TE_DType"},
        "pytorch.tensor.float8_blockwise_tensor": {"Float8BlockwiseQTensor"},
        "pytorch.tensor.float8_tensor": {"Float8Tensor"},
        "pytorch.tensor.mxfp8_tensor": {"MXFP8Tensor"},
        "pytorch.tensor.nvfp4_tensor": {"NVFP4Tensor"},
        "pytorch.tensor.utils": {
            "cast_master_weights_to_fp8",
            "post_all_gather_processing",
            "replace_raw_data",
        },
    },
    "fusions that are off": {
        "pytorch.attention.rope": {"apply_fused_qkv_rotary_pos_emb", "apply_rotary_pos_emb"},
        "pytorch.cross_entropy": {"parallel_cross_entropy"},
        "pytorch.module.base": {"get_dummy_wgrad"},
        "pytorch.permutation": {
            "moe_permute",
            "moe_permute_with_probs",
            "moe_sort_chunks_by_index",
            "moe_sort_chunks_by_index_with_probs",
            "moe_unpermute",
        },
    },
    "CUDA graphs and inference": {
        "pytorch.distributed": {
            "get_all_rng_states",
            "gather_along_first_dim",
            "reduce_scatter_along_first_dim",
        },
        "pytorch.graph": {
            "make_graphed_callables",
            "restore_fp8_tensors",
            "save_fp8_tensors",
            "set_capture_end",
            "set_capture_start",
        },
        "pytorch.utils": {"make_weak_ref"},
    },
}
"""Names that megatron-core imports and the stand-in lacks, by what they are for and their module"""


class Package:
    """The sources of a transformer_engine package."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @functools.cache  # noqa: B019 a package lives as long as the program
    def module(self, dotted: str) -> ast.Module | None:
        """Returns a module by its name within the package, such as pytorch.fp8; None if it has no file."""
        path = self.root.joinpath(*filter(None, dotted.split(".")))
        for file in (path / "__init__.py", path.with_name(path.name + ".py")):
            if file.is_file():
                return ast.parse(file.read_text())
        return None

    def find(self, dotted: str, name: str) -> ast.AST | None:
        """Returns the definition of a module's name, wherever it is imported from; None if there is none.

        Of a module, a variable, or a name from outside the package: the node that binds it.
        """
        tree = self.module(dotted)
        for node in [] if tree is None else ast.walk(tree):
            if isinstance(node, Definition) and node.name == name and node in tree.body:
                return node
            if isinstance(node, ast.Assign) and name in {
                t.id for t in node.targets if isinstance(t, ast.Name)
            }:
                return node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if alias.name == "*" and (found := self._follow(node, dotted, name)):
                        return found
                    if name == (alias.asname or alias.name):
                        return self._follow(node, dotted, alias.name) or node
        below = f"{dotted}.{name}".strip(".")
        return self.module(below)

    def _follow(self, node: ast.ImportFrom, dotted: str, name: str) -> ast.AST | None:
        source = node.module or ""
        if node.level:
            is_package = self.root.joinpath(*filter(None, dotted.split(".")), "__init__.py").is_file()
            parts = [part for part in dotted.split(".") if part]
            kept = len(parts) - node.level + is_package
            source = ".".join([*parts[:kept], *filter(None, [source])])
        elif source.split(".")[0] == self.root.name:
            source = source.partition(".")[2]
        else:
            return None
        return None if source == dotted else self.find(source, name)

    def definitions(self) -> Iterator[tuple[str, Definition]]:
        """Yields (module, definition) of the public classes and functions of all public modules."""
        for file in sorted(f for f in self.root.rglob("*.py") if not re.match("_[^_]", f.name)):
            dotted = ".".join(file.relative_to(self.root).with_suffix("").parts).removesuffix("__init__")
            dotted = dotted.strip(".")
            for node in self.module(dotted).body:
                if isinstance(node, Definition) and not node.name.startswith("_"):
                    yield dotted, node


def parameters(node: ast.FunctionDef) -> list[tuple[str, str, str | None]]:
    """Returns (name, kind, default) of each; the default is its source, None, or ... if it is no literal."""
    a = node.args
    positional = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults
    found = [(p.arg, "positional", _literal(d)) for p, d in zip(positional, defaults, strict=True)]
    found += [(p.arg, "keyword", _literal(d)) for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    found += [(p.arg, kind, None) for p, kind in ((a.vararg, "*"), (a.kwarg, "**")) if p]
    return found


def _literal(default: ast.expr | None) -> str | None:
    if default is None:
        return None
    try:
        return repr(ast.literal_eval(default))
    except ValueError:
        return "..."


def _same(ours: list[tuple[str, str, str | None]], theirs: list[tuple[str, str, str | None]]) -> bool:
    if [p[:2] for p in ours] != [p[:2] for p in theirs]:
        return False
    pairs = [(a[2], b[2]) for a, b in zip(ours, theirs, strict=True)]
    return all(a == b or (None not in (a, b) and "..." in (a, b)) for a, b in pairs)


def _callables(node: Definition) -> dict[str, ast.FunctionDef]:
    """Returns a function, or a class's own constructor, forward pass and optimizer step, by name."""
    if isinstance(node, ast.FunctionDef):
        return {node.name: node}
    methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
    return {f"{node.name}.{m}": methods[m] for m in ("__init__", "forward", "step") if m in methods}


def signature_differences(stand_in: Package, other: Package) -> Iterator[str]:
    """Yields a line for each definition of the stand-in that is missing or differs."""
    for dotted, node in stand_in.definitions():
        found = other.find(dotted, node.name)
        place = f"{dotted}.{node.name}"
        if found is None:
            yield f"{place} is not in Transformer Engine"
        elif isinstance(found, Definition):
            theirs = _callables(found)
            for name, function in _callables(node).items():
                if name in theirs and not _same(parameters(function), parameters(theirs[name])):
                    ours, own = parameters(function), parameters(theirs[name])
                    missing = [p for p in own if p not in ours]
                    extra = [p for p in ours if p not in own]
                    yield f"{dotted}.{name}: lacks {missing}, has instead {extra}"


def imported_names(core: Path) -> set[tuple[str, str]]:
    """Returns (module within transformer_engine, name) of everything that megatron-core imports from it."""
    found = set()
    for text in (file.read_text() for file in core.rglob("*.py")):
        for node in ast.walk(ast.parse(text)) if "transformer_engine" in text else ():
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformer_engine":
                found |= {(node.module.partition(".")[2], alias.name) for alias in node.names}
    return found


def import_differences(stand_in: Package, other: Package, names: set[tuple[str, str]]) -> Iterator[str]:
    """Yields a line for each name that megatron-core finds in one of the two only."""
    left_out = {(m, n) for modules in LEFT_OUT.values() for m, ns in modules.items() for n in ns}
    for dotted, name in sorted(names - left_out):
        ours, theirs = (package.find(dotted, name) is not None for package in (stand_in, other))
        if ours != theirs:
            yield f"megatron-core imports {dotted}.{name}: {'only' if ours else 'not'} in the stand-in"
    for dotted, name in sorted(left_out):
        if stand_in.find(dotted, name) is not None or (dotted, name) not in names:
            yield f"LEFT_OUT lists {dotted}.{name}, which the stand-in has or megatron-core does not import"


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    if arguments:
        root = Path(arguments[0])
    elif spec := find_spec("transformer_engine"):
        root = Path(spec.origin).parent
    else:
        print("Transformer Engine is not installed: name the directory of its package", file=sys.stderr)
        return 2
    core = Path(find_spec("megatron.core").origin).parent
    ours, other = Package(STAND_IN), Package(root)
    lines = [*signature_differences(ours, other), *import_differences(ours, other, imported_names(core))]
    print("\n".join(lines) or f"{STAND_IN.name}: as {root}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
