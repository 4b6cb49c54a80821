"""Rules for the source of kernels that the interpreter cannot check: it counts in Python, one thread at a time.

A kernel is any function with `triton.jit`, in whatever file, so that a new one is covered without being named here.
"""

import ast
from collections.abc import Iterator
from functools import cache

import attrs

NARROW = ("int32", "int16", "int8", "uint32", "uint16", "uint8")
WIDE = ("int64", "uint64")
TABLES = ("STARTS", "ADDRESSES", "OFFSETS")  # what the names of parameters with offsets and addresses end in


@attrs.frozen(eq=False)
class Kernel:
    """A function that Triton compiles."""

    module: str
    node: ast.FunctionDef

    @property
    def name(self) -> str:
        return f"{self.module}.{self.node.name}"

    @property
    def parameters(self) -> list[str]:
        return [argument.arg for argument in self.node.args.args]


@cache
def kernels_of(module: str, source: str) -> list[Kernel]:
    """All kernels of a file, also those that are made within functions."""
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return [Kernel(module, one) for one in functions if any("jit" in ast.dump(by) for by in one.decorator_list)]


def called(node: ast.AST, *names: str) -> bool:
    """Whether this is a call of `tl.NAME`."""
    ours = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names
    return ours and isinstance(node.func.value, ast.Name) and node.func.value.id == "tl"


# -- offsets of 64 bits ------------------------------------------------------------------------------------------------


def narrow_offsets(kernel: Kernel) -> Iterator[str]:
    """Places where what says which segment this is may be counted in 32 bits: times the size of one it overflows."""
    parents = {child: node for node in ast.walk(kernel.node) for child in ast.iter_child_nodes(node)}
    wide = _wide_names(kernel)
    for node in ast.walk(kernel.node):
        if called(node, "program_id", "num_programs") and node.args[0].value == 0 and not _harmless(node, parents):
            yield f"{kernel.name}:{node.lineno}: {ast.unparse(node)} is not made an int64"
        kept = cast_of(node, NARROW)
        if kept is not None and is_wide(kept, wide) and not _remainder(kept):
            yield f"{kernel.name}:{node.lineno}: {ast.unparse(node)} narrows an offset"


def cast_of(node: ast.AST, types: tuple[str, ...]) -> ast.expr | None:
    """What a cast to one of these types of `tl` is applied to."""
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Attribute) and node.func.attr == "to" and node.args:
        given, to = node.func.value, node.args[0]
    elif called(node, "cast") and len(node.args) > 1:
        given, to = node.args[:2]
    else:
        return None
    return given if isinstance(to, ast.Attribute) and to.attr in types else None


def _harmless(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether the number of a program is cast, compared, reduced to a remainder, or no more than an index."""
    above = parents[node]
    if isinstance(above, ast.Attribute) and cast_of(parents[above], WIDE) is node:
        return True
    if isinstance(above, ast.Call) and cast_of(above, WIDE) is node:
        return True
    if isinstance(above, ast.Compare):
        return True
    if isinstance(above, ast.BinOp) and isinstance(above.op, ast.Mod):
        return above.left is node
    pointer = isinstance(above, ast.BinOp) and isinstance(above.op, ast.Add)
    return pointer and called(parents[above], "load", "store") and parents[above].args[0] is above


def _wide_names(kernel: Kernel) -> set[str]:
    """Names that are given something of 64 bits, and parameters that say so."""
    wide = {"segment"} & set(kernel.parameters)
    for _ in range(3):  # what is assigned from a name that is found to be wide later in the text
        for node in ast.walk(kernel.node):
            if isinstance(node, ast.Assign):
                wide.update(_given(node.targets[0], node.value, wide))
    return wide


def _given(target: ast.expr, value: ast.expr, wide: set[str]) -> Iterator[str]:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for one, its in zip(target.elts, value.elts, strict=True):
            yield from _given(one, its, wide)
    elif isinstance(target, ast.Name) and is_wide(value, wide):
        yield target.id


def is_wide(node: ast.expr, wide: set[str]) -> bool:
    """Whether an expression has 64 bits because it is cast, comes from a table of offsets, or is computed from such."""
    if isinstance(node, ast.Name):
        return node.id in wide
    if cast_of(node, WIDE) is not None:
        return True
    if called(node, "load"):
        return any(isinstance(one, ast.Name) and one.id.endswith(TABLES) for one in ast.walk(node.args[0]))
    if isinstance(node, ast.BinOp):
        return is_wide(node.left, wide) or (not isinstance(node.op, ast.Mod) and is_wide(node.right, wide))
    if isinstance(node, ast.Subscript):
        return is_wide(node.value, wide)
    return False


def _remainder(node: ast.expr) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod)


def narrow_tables(module: str, source: str) -> Iterator[str]:
    """Types of builds in which a table of offsets or addresses does not have 64 bits."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Dict):
            continue
        for key, value in zip(node.keys, node.values, strict=True):
            named = isinstance(key, ast.Constant) and isinstance(key.value, str) and key.value.endswith(TABLES)
            types = [
                one.value for one in ast.walk(value) if isinstance(one, ast.Constant) and isinstance(one.value, str)
            ]
            if named and any(one.startswith("*") and one != "*i64" for one in types):
                yield f"{module}:{node.lineno}: {key.value} is {types}"


# -- barriers ----------------------------------------------------------------------------------------------------------


@attrs.frozen
class Effects:
    """What a kernel does to the memory behind what it is given."""

    loads: frozenset[str]
    stores: frozenset[str]  # without a barrier before them


class Barriers:
    """Finds stores to memory that the same program has read, with no barrier in between."""

    def __init__(self, kernels: list[Kernel]) -> None:
        self.by_name = {(one.module, one.node.name): one for one in kernels}
        self.known: dict[str, Effects] = {}

    def missing(self, kernel: Kernel) -> list[str]:
        """Stores of this kernel to what it has read, which other threads may still be about to read."""
        loads = set(self._loads(kernel, kernel.node))
        return [
            f"{kernel.name}:{line}: writes {root}, which it has read, without a barrier"
            for line, root, place in self._stores(kernel, kernel.node.body, guarded=False)
            if any(name == root and read != place for name, read in loads)
        ]

    def effects(self, kernel: Kernel) -> Effects:
        """Of a call."""
        if kernel.name not in self.known:
            loads = frozenset(root for root, _ in self._loads(kernel, kernel.node))
            stores = frozenset(root for _, root, _ in self._stores(kernel, kernel.node.body, guarded=False))
            self.known[kernel.name] = Effects(loads, stores)
        return self.known[kernel.name]

    def _stores(self, kernel: Kernel, body: list[ast.stmt], *, guarded: bool) -> Iterator[tuple[int, str, str]]:
        """Line, name and place of stores that no barrier precedes; a loop that reads, too, needs one of its own."""
        for statement in body:
            if isinstance(statement, ast.Expr) and called(statement.value, "debug_barrier"):
                guarded = True
            if isinstance(statement, (ast.For, ast.While)):
                read = {root for root, _ in self._loads(kernel, statement)}
                found = self._stores(kernel, statement.body, guarded=False)
                yield from (one for one in found if not guarded or one[1] in read)
            elif isinstance(statement, ast.If):
                for part in (statement.body, statement.orelse):
                    yield from self._stores(kernel, part, guarded=guarded)
            elif not guarded:
                yield from self._written(kernel, statement)

    def _written(self, kernel: Kernel, statement: ast.stmt) -> Iterator[tuple[int, str, str]]:
        for node in ast.walk(statement):
            if called(node, "store"):
                root = self._root(kernel, node.args[0])
                if root:
                    yield node.lineno, root, ast.dump(node.args[0])
            for root, effects, name in self._passed(kernel, node):
                if name in effects.stores:
                    yield node.lineno, root, "called"

    def _loads(self, kernel: Kernel, within: ast.AST) -> Iterator[tuple[str, str]]:
        """Names that are read, and at which place."""
        for node in ast.walk(within):
            if called(node, "load"):
                root = self._root(kernel, node.args[0])
                if root:
                    yield root, ast.dump(node.args[0])
            passed = self._passed(kernel, node)
            yield from ((root, "in a call") for root, effects, name in passed if name in effects.loads)

    def _passed(self, kernel: Kernel, node: ast.AST) -> Iterator[tuple[str, Effects, str]]:
        """The names given to another kernel, what that does, and what they are called there."""
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            return
        callee = self._callee(kernel, node.func.id)
        if callee is None or callee.node is kernel.node:
            return
        effects = self.effects(callee)
        for argument, name in zip(node.args, callee.parameters, strict=False):
            root = self._root(kernel, argument)
            if root:
                yield root, effects, name

    def _callee(self, kernel: Kernel, name: str) -> Kernel | None:
        own = self.by_name.get((kernel.module, name))
        others = [one for (_, theirs), one in self.by_name.items() if theirs == name]
        return own or (others[0] if len(others) == 1 else None)

    def _root(self, kernel: Kernel, pointer: ast.expr) -> str | None:
        """The name that a pointer starts from: through sums, what makes pointers, and names for such sums."""
        if isinstance(pointer, ast.Name):
            return _aliases(kernel).get(pointer.id, pointer.id)
        if isinstance(pointer, ast.BinOp) and isinstance(pointer.op, ast.Add):
            return self._root(kernel, pointer.left)
        if isinstance(pointer, ast.Call) and isinstance(pointer.func, ast.Name) and pointer.args:
            return self._root(kernel, pointer.args[0])
        return None


@cache
def _aliases(kernel: Kernel) -> dict[str, str]:
    """Names for a parameter plus an offset."""
    found: dict[str, str] = {}
    for node in ast.walk(kernel.node):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.BinOp):
            start = node.value.left
            if isinstance(start, ast.Name) and isinstance(node.value.op, ast.Add) and start.id in kernel.parameters:
                found[node.targets[0].id] = start.id
    return found
