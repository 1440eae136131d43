"""Reads Python that nobody has vouched for: self-extracting scripts are unwrapped as data, and nothing is executed.

`unwrap` folds the constants around `exec` (decoders, decompressors, joined strings, one-line helper functions) with an
interpreter that knows a short list of pure functions and bounds every output. Files that a layer opens are those of
its own folder, which the caller reads. What it cannot fold it says. `read_tree`
gives a tree even where the text needs Python 3.12, and names what an older one would refuse.
"""

import ast
import base64
import binascii
import bz2
import codecs
import dataclasses
import functools
import io
import lzma
import posixpath
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

MAX_SOURCE = 500_000  # characters that are parsed; the largest public script has 160,000
MAX_FIELDS = 20_000  # braces in them: Python before 3.12 takes quadratic time for the fields of an f-string
MAX_DOTTED = 300  # parts of a name: they take quadratic time as well
MAX_BYTES = 8_000_000  # of one unwrapped layer
MAX_LAYERS = 8
MAX_DICTIONARY = 1 << 26  # of a raw LZMA stream, which names its own memory need
MAX_FOLDS = 20_000  # nodes folded per layer
MAX_FOLDED = 64_000_000  # bytes made on the way, per layer
Function = (ast.FunctionDef, ast.AsyncFunctionDef)


class Problem(NamedTuple):
    """Something that stayed unread, or that a version of Python would refuse."""

    line: int
    text: str


@dataclasses.dataclass
class Unwrapped:
    """Every readable layer, outermost first; `files` are those that a layer reads to execute them, by name."""

    layers: list[str]
    problems: list[Problem]
    files: list[str]


class Unfoldable(Exception):
    """An expression that is not a constant as far as this module can tell; the text says why."""


# ----------------------------------------------------------------------------------------------------------------------
# Parsing
# ----------------------------------------------------------------------------------------------------------------------


def parse(source: str, feature_version: tuple[int, int] | None = None) -> ast.Module:
    """The tree of a source that may be hostile, if not long. Raises SyntaxError whatever is wrong with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they would quote foreign text
            return ast.parse(source, feature_version=feature_version)
    except (ValueError, RecursionError, MemoryError, OverflowError) as error:
        raise SyntaxError(f"cannot be parsed ({type(error).__name__})") from None


class TooLong(SyntaxError):
    """A source that nobody says is wrong, but that would take minutes or gigabytes to parse."""


def check_length(source: str) -> None:
    if len(source) > MAX_SOURCE:
        raise TooLong(f"longer than {MAX_SOURCE:,} characters")
    if source.count("{") > MAX_FIELDS:
        raise TooLong(f"more than {MAX_FIELDS:,} braces")
    if re.search(rf"(?:\.\w{{1,99}}){{{MAX_DOTTED}}}", source):
        raise TooLong(f"a name of more than {MAX_DOTTED} parts")


def read_tree(source: str, version: tuple[int, int] = (3, 10)) -> tuple[ast.Module, list[Problem]]:
    """(tree, what a version of Python would refuse). Raises SyntaxError where this interpreter cannot read it.

    F-strings that only 3.12 reads are blanked out for the tree, so that the rest is examined on any version.
    """
    check_length(source)
    problems = []
    for start, end, reason in reversed(new_fstrings(source)):
        problems.insert(0, Problem(source.count("\n", 0, start) + 1, f"{reason}: an f-string that needs Python 3.12"))
        source = source[:start] + "'''" + "\n" * source.count("\n", start, end) + "'''" + source[end:]
    problems = problems if version < (3, 12) else []
    try:
        return parse(source, version), problems
    except SyntaxError as error:
        problems.append(Problem(error.lineno or 0, error.msg or "invalid syntax"))
    return parse(source), problems


def decode(data: bytes) -> str:
    """Foreign text with `\\n` newlines, whatever is wrong with it."""
    return data.decode("utf-8", "replace").replace("\r\n", "\n")


def decode_source(data: bytes) -> str:
    """Text of a script with `\\n` newlines. Raises SyntaxError where it is not UTF-8."""
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise SyntaxError(f"not UTF-8 at byte {error.start}") from None


# ----------------------------------------------------------------------------------------------------------------------
# F-strings: Python 3.12 gave them a grammar; before, a field could not hold the string's own quote, a backslash, a
# comment, or a line break within single quotes. Older interpreters cannot even tokenize such text, hence a scanner.
# ----------------------------------------------------------------------------------------------------------------------

# A comment, the beginning of a string, a word, or any other character.
LEXEME = re.compile(
    r"""\#.* | (?P<prefix>[rR]?[fFbBuU]|[fFbB][rR]|[rR]|)(?P<quote>'{3}|"{3}|['"])
    | [A-Za-z0-9_\x80-\U0010ffff]+ | (?s:.)""",
    re.VERBOSE,
)


class FStrings:
    """Scanner over one source. Its methods take where something begins, and the quotes of the f-strings around it; they
    return where it ends."""

    def __init__(self, source: str):
        self.source, self.reason = source, ""

    def refuse(self, reason: str) -> None:
        self.reason = self.reason or reason

    def scan(self) -> Iterator[tuple[int, int, str]]:
        """(start, end, reason) of the outermost f-strings that 3.10 would refuse."""
        i, n = 0, len(self.source)
        while i < n:
            start, self.reason = i, ""
            i = self.token(i, [])
            if self.reason:
                yield start, min(i, n), self.reason

    def token(self, i: int, quotes: list[str]) -> int:
        lexeme = LEXEME.match(self.source, i)
        quote = lexeme["quote"]
        return lexeme.end() if quote is None else self.string(lexeme.end(), quote, lexeme["prefix"].lower(), quotes)

    def string(self, i: int, quote: str, prefix: str, quotes: list[str]) -> int:
        s = self.source
        if any(quote.startswith(outer) or (len(outer) == 1 and outer in quote) for outer in quotes):
            self.refuse("the same quotes inside")
        while i < len(s) and not s.startswith(quote, i):
            if s[i] == "\\":
                if quotes:
                    self.refuse("a backslash inside")
                i += 2
                if "r" not in prefix and s.startswith("N{", i - 1):
                    i = max(i, s.find("}", i))
            elif "f" in prefix and s.startswith("{{", i):
                i += 2
            elif "f" in prefix and s[i] == "{":
                if len(quotes) > 50:
                    return len(s)
                i = self.field(i + 1, [*quotes, quote])
            elif s[i] == "\n" and len(quote) == 1:
                return i  # unterminated: the parser will say so
            else:
                i += 1
        return i + len(quote)

    def field(self, i: int, quotes: list[str]) -> int:
        """Behind the `}` of the replacement field that begins at i."""
        s, depth = self.source, 0
        while i < len(s):
            c = s[i]
            if c == "}" and depth == 0:
                return i + 1
            if c == ":" and depth == 0:
                return self.spec(i + 1, quotes)
            if c in "#\\" or (c == "\n" and len(quotes[-1]) == 1):
                self.refuse({"#": "a comment inside", "\\": "a backslash inside"}.get(c, "a line break inside"))
            depth += (c in "([{") - (c in ")]}")
            i = self.token(i, quotes)
        return i

    def spec(self, i: int, quotes: list[str]) -> int:
        """Behind the `}` that ends a format specification, which may have fields of its own."""
        while i < len(self.source) and self.source[i] != "}":
            if self.source.startswith(quotes[-1], i):
                return i  # unterminated field
            i = self.field(i + 1, quotes) if self.source[i] == "{" else i + 1
        return i + 1


@functools.lru_cache(16)
def new_fstrings(source: str) -> list[tuple[int, int, str]]:
    """(start, end, reason) of f-strings that Python before 3.12 refuses."""
    try:
        return list(FStrings(source).scan())
    except RecursionError:
        return []


# ----------------------------------------------------------------------------------------------------------------------
# Bounded decompressors
# ----------------------------------------------------------------------------------------------------------------------


def bounded(data: bytes) -> bytes:
    if len(data) > MAX_BYTES:
        raise Unfoldable(f"unpacks to more than {MAX_BYTES} bytes")
    return data


def inflate(decompressor: Any, data: bytes) -> bytes:
    """All that a decompressor object gives for the data, if it is not too much and the data has its end."""
    found = bounded(decompressor.decompress(data, MAX_BYTES + 1))
    if not decompressor.eof:
        raise Unfoldable("its compressed data does not end")
    return found


def lzma_decompress(data: bytes, format: int = lzma.FORMAT_AUTO, memlimit: Any = None, filters: Any = None) -> bytes:
    if filters is not None and any(int(f.get("dict_size", 0)) > MAX_DICTIONARY for f in filters):
        raise Unfoldable("its LZMA dictionary is too large")
    limit = None if format == lzma.FORMAT_RAW else 2 * MAX_DICTIONARY
    return inflate(lzma.LZMADecompressor(format, limit, filters), data)


def zlib_decompress(data: bytes, wbits: int = zlib.MAX_WBITS, bufsize: int = 0) -> bytes:
    return inflate(zlib.decompressobj(wbits), data)


def brotli_decompress(data: bytes) -> bytes:
    try:
        import brotli

        return bounded(brotli.Decompressor().process(data, output_buffer_limit=MAX_BYTES + 1))
    except (ImportError, TypeError):  # older releases cannot bound their output
        raise Unfoldable("brotli 1.2 or newer is not installed here") from None


def zstd_decompress(data: bytes, max_output_size: int = 0) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise Unfoldable("zstandard is not installed here") from None
    reader = zstandard.ZstdDecompressor(max_window_size=MAX_DICTIONARY).stream_reader(io.BytesIO(data))
    return bounded(reader.read(MAX_BYTES + 1))


def codecs_decode(data: Any, encoding: str = "utf-8", errors: str = "strict") -> Any:
    if encoding.lower().replace("-", "_") not in {"utf_8", "utf8", "ascii", "latin_1", "latin1", "rot13", "rot_13"}:
        raise Unfoldable(f"codec {encoding!r} is not followed")
    return codecs.decode(data, encoding, errors)


class Located(str):
    """A path, relative to the script's folder as far as that is known."""


class Opened(NamedTuple):
    """A file that a script opens."""

    name: str
    binary: bool


class Ref(NamedTuple):
    """A module or function by its dotted name."""

    name: str


def as_bytes(value: Any = b"", *encoding: str) -> bytes:
    if isinstance(value, int):
        raise Unfoldable("bytes of a number")
    return bytes(value, *encoding)


def as_text(value: Any = "", *encoding: str) -> str:
    if isinstance(value, (list, tuple, dict)):
        raise Unfoldable("text of a list")
    return str(value, *encoding)


FUNCTIONS: Mapping[str, Callable] = {
    "lzma.decompress": lzma_decompress,
    "zlib.decompress": zlib_decompress,
    "bz2.decompress": lambda data: inflate(bz2.BZ2Decompressor(), data),
    "gzip.decompress": lambda data: zlib_decompress(data, 31),
    "brotli.decompress": brotli_decompress,
    "zstandard.decompress": zstd_decompress,
    "zstd.decompress": zstd_decompress,
    "zstandard.ZstdDecompressor.decompress": zstd_decompress,
    **{f"base64.{name}": getattr(base64, name) for name in ("b85decode", "a85decode", "b64decode", "b32decode")},
    **{f"base64.{name}": getattr(base64, name) for name in ("b16decode", "standard_b64decode", "urlsafe_b64decode")},
    **{f"binascii.{name}": getattr(binascii, name) for name in ("unhexlify", "a2b_hex", "a2b_base64")},
    "codecs.decode": codecs_decode,
    "bytes.fromhex": bytes.fromhex,
    "compile": lambda source: source,
    **dict.fromkeys(("os.path.join", "pathlib.Path"), lambda *parts: Located(posixpath.join(*parts))),
    "os.path.dirname": lambda path: Located(posixpath.dirname(path)),
    **{f"os.path.{name}": lambda path: path for name in ("abspath", "realpath", "expanduser")},
    **dict.fromkeys(("open", "io.open"), lambda path, mode="r", *_, **__: Opened(str(path), "b" in mode)),
    **{function.__name__: function for function in (chr, ord, len)},
    "reversed": lambda value: value[::-1],
    **dict.fromkeys(("bytes", "bytearray"), as_bytes),
    "str": as_text,
}
METHODS = {"decode", "encode", "join", "replace", "strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "split"}
METHODS |= {"splitlines", "translate", "lower", "upper"}
PATH_METHODS = {"read", "read_text", "read_bytes", "open", "joinpath", "with_name", "resolve", "absolute"}


def size(value: Any) -> int:
    """Bytes that a folded value takes, roughly; what a list holds has been counted when it was made."""
    return len(value) * (1 if isinstance(value, (str, bytes, bytearray)) else 64) if hasattr(value, "__len__") else 0


def size_to_come(method: str, owner: Any, arguments: list) -> int:
    """At most this many characters come out of a text's method: known before they take memory."""
    if method == "join":
        parts = list(arguments[0])
        return sum(map(len, parts)) + len(owner) * len(parts)
    if method == "replace":
        return len(owner) + owner.count(arguments[0]) * len(arguments[1])
    if method == "translate":
        table = arguments[0].values() if isinstance(arguments[0], dict) else ()
        return len(owner) * max((len(value) for value in table if isinstance(value, str)), default=1)
    return 64 * owner.count(arguments[0]) if method == "split" and arguments else len(owner)


class Folding:
    """Constant folding over one layer: names of the module that hold constants, modules or one-line functions. `read`
    gives the bytes of a file by its name, or None; what was asked for is in `files`."""

    def __init__(self, tree: ast.Module, read: Callable[[str], bytes | None], inside: bool = False):
        self.names: dict[str, Any] = {name: Ref(name) for name in FUNCTIONS if "." not in name}
        self.names |= {name: Ref(name) for name in ("__import__", "getattr", "builtins", "__builtins__")}
        self.names["__file__"] = Located("script.py")
        self.folds, self.bytes, self.depth = 0, 0, 0
        self.read, self.files = read, {}
        for node in statements(tree, inside):
            self.note(node)

    def note(self, node: ast.stmt) -> None:
        """Learn what a statement binds."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                self.names[alias.asname or top] = Ref(alias.name if alias.asname else top)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                self.names[alias.asname or alias.name] = Ref(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.FunctionDef):
            self.names[node.name] = node
        elif isinstance(node, ast.With):
            for item in node.items:
                if item.optional_vars is not None:
                    self.bind(item.optional_vars, item.context_expr)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                self.bind(target, node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self.bind(node.target, node.value)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            left = ast.copy_location(ast.Name(node.target.id, ast.Load()), node)
            self.bind(node.target, ast.copy_location(ast.BinOp(left, node.op, node.value), node))

    def bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for part, of in zip(target.elts, value.elts, strict=True):
                self.bind(part, of)
        elif isinstance(target, ast.Name):
            try:
                self.names[target.id] = value if isinstance(value, ast.Lambda) else self.fold(value)
            except Unfoldable as error:
                self.names[target.id] = Unfoldable(str(error))  # without the traceback, which holds values

    def fold(self, node: ast.AST) -> Any:
        """The constant that an expression is. Raises Unfoldable."""
        self.folds += 1
        self.spend(0)
        try:
            value = self.value(node)
        except Unfoldable:
            raise
        except RecursionError:
            raise Unfoldable("nested too deeply") from None
        except Exception as error:  # a decoder may raise anything on foreign bytes
            raise Unfoldable(f"{type(error).__name__} at line {getattr(node, 'lineno', 0)}") from None
        if size(value) > MAX_BYTES:
            raise Unfoldable(f"makes more than {MAX_BYTES} bytes")
        if not isinstance(node, (ast.Name, ast.Constant)):
            self.spend(size(value))
        return value

    def spend(self, bytes: int) -> None:
        self.bytes += bytes
        if self.folds > MAX_FOLDS or self.bytes > MAX_FOLDED:
            raise Unfoldable("too much to fold")

    def value(self, node: ast.AST) -> Any:
        """What fold gives, without its bounds."""
        match node:
            case ast.Constant(value):
                return value
            case ast.Name(name):
                value = self.names.get(name)
                if isinstance(value, Unfoldable):
                    raise value
                if value is None:
                    raise Unfoldable(f"{name} is not known at line {node.lineno}")
                return value
            case ast.NamedExpr(ast.Name(name), inner):
                value = self.names[name] = self.fold(inner)
                return value
            case ast.Tuple(parts):
                return tuple(self.fold(part) for part in parts)
            case ast.List(parts):
                return [self.fold(part) for part in parts]
            case ast.Dict(keys, values):
                return {self.fold(key): self.fold(value) for key, value in zip(keys, values, strict=True)}
            case ast.JoinedStr(parts):
                texts = [as_text(self.fold(part)) for part in parts]
                self.spend(size_to_come("join", "", [texts]))
                return "".join(texts)
            case ast.FormattedValue(inner):
                return self.fold(inner)
            case ast.UnaryOp(ast.USub(), operand):
                return -self.fold(operand)
            case ast.UnaryOp():
                raise Unfoldable("an operator that is not followed")
            case ast.BinOp(left, operator, right):
                return self.operation(self.fold(left), operator, self.fold(right), node.lineno)
            case ast.Subscript():
                return self.part(self.fold(node.value), node)
            case ast.Attribute():
                return self.attribute(self.fold(node.value), node)
            case ast.Call():
                return self.call(node)
        raise Unfoldable(f"{type(node).__name__} at line {getattr(node, 'lineno', 0)} is not a constant")

    @staticmethod
    def operation(left: Any, operator: ast.operator, right: Any, line: int) -> Any:
        if isinstance(operator, ast.Add) and type(left) is type(right) and isinstance(left, (str, bytes, list, int)):
            return left + right
        if isinstance(operator, (ast.Sub, ast.BitOr)) and isinstance(left, int) and isinstance(right, int):
            return left - right if isinstance(operator, ast.Sub) else left | right
        if isinstance(operator, ast.Div) and isinstance(left, str) and isinstance(right, str):
            return Located(posixpath.join(left, right))
        raise Unfoldable(f"an operator at line {line} that is not followed")

    def part(self, value: Any, node: ast.Subscript) -> Any:
        if isinstance(value, Ref) or not isinstance(value, (str, bytes, list, tuple, dict)):
            raise Unfoldable(f"a subscript at line {node.lineno}")
        if isinstance(node.slice, ast.Slice):
            parts = (node.slice.lower, node.slice.upper, node.slice.step)
            return value[slice(*(None if part is None else self.fold(part) for part in parts))]
        return value[self.fold(node.slice)]

    @staticmethod
    def attribute(value: Any, node: ast.Attribute) -> Any:
        if isinstance(value, Ref):
            if value.name == "lzma" and isinstance(getattr(lzma, node.attr, None), int):
                return int(getattr(lzma, node.attr))
            return Ref(f"{value.name}.{node.attr}".removeprefix("builtins.").removeprefix("__builtins__."))
        if isinstance(value, Located) and node.attr == "parent":
            return Located(posixpath.dirname(value))
        raise Unfoldable(f"attribute {node.attr} at line {node.lineno}")

    def content(self, name: str, binary: bool) -> str | bytes:
        """What a file of the folder holds."""
        name = posixpath.normpath(name)
        if name not in self.files:
            self.files[name] = self.read(name)
        if self.files[name] is None:
            raise Unfoldable(f"the folder lacks {name}")
        return self.files[name] if binary else decode_source(self.files[name])

    def call(self, node: ast.Call) -> Any:
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS | PATH_METHODS:
            owner = self.fold(node.func.value)
            if isinstance(owner, (Opened, Located)) and node.func.attr in PATH_METHODS:
                return self.of_path(owner, node)
            if isinstance(owner, (str, bytes)):
                arguments = [self.fold(part) for part in node.args]
                self.spend(size_to_come(node.func.attr, owner, arguments))
                return getattr(owner, node.func.attr)(*arguments, **self.keywords(node))
        function = node.func if isinstance(node.func, ast.Lambda) else self.fold(node.func)
        if isinstance(function, (ast.Lambda, ast.FunctionDef)):
            return self.inline(function, node)
        if not isinstance(function, Ref):
            raise Unfoldable(f"a call at line {node.lineno}")
        counted = node.args[:1] if function.name == "compile" else node.args  # compile(text, __file__, "exec")
        arguments = [self.fold(part) for part in counted]
        if function.name == "__import__" and arguments:
            return Ref(str(arguments[0]))
        if function.name == "getattr" and len(arguments) == 2 and isinstance(arguments[0], Ref):
            return Ref(f"{arguments[0].name}.{arguments[1]}")
        if function.name == "zstandard.ZstdDecompressor":
            return function
        if function.name not in FUNCTIONS:
            raise Unfoldable(f"{function.name}() at line {node.lineno} is not followed")
        if function.name.endswith("decompress"):
            self.spend(MAX_BYTES // 8)  # of work, whatever comes out
        return FUNCTIONS[function.name](*arguments, **self.keywords(node))

    def of_path(self, owner: Opened | Located, node: ast.Call) -> Any:
        """What a method of a path or of an open file gives."""
        method = node.func.attr
        if isinstance(owner, Opened):
            return self.content(owner.name, owner.binary)
        if method in ("read_text", "read_bytes"):
            return self.content(owner, method == "read_bytes")
        arguments = [self.fold(part) for part in node.args]
        if method == "open":
            return Opened(owner, "b" in "".join(arguments[:1]))
        if method in ("joinpath", "with_name"):
            return Located(posixpath.join(owner if method == "joinpath" else posixpath.dirname(owner), *arguments))
        return owner  # resolve, absolute

    def keywords(self, node: ast.Call) -> dict:
        return {keyword.arg or "": self.fold(keyword.value) for keyword in node.keywords}

    def inline(self, function: ast.Lambda | ast.FunctionDef, call: ast.Call) -> Any:
        """The result of a function that only assigns and returns."""
        names = [argument.arg for argument in function.args.args]
        values = [self.fold(part) for part in call.args]
        if len(names) != len(values) or call.keywords or self.depth > 10:
            raise Unfoldable(f"the call at line {call.lineno} is not followed")
        outside, self.names, self.depth = self.names, self.names | dict(zip(names, values, strict=True)), self.depth + 1
        try:
            if isinstance(function, ast.Lambda):
                return self.fold(function.body)
            for statement in function.body:
                if isinstance(statement, ast.Return) and statement.value is not None:
                    return self.fold(statement.value)
                self.note(statement)
            raise Unfoldable(f"{function.name}() returns nothing")
        finally:
            self.names, self.depth = outside, self.depth - 1


def blocks(node: ast.AST) -> Iterator[tuple[str, list[ast.stmt]]]:
    """(field, statements) of every block of a node; handlers and cases are nodes themselves."""
    for field in ("body", "orelse", "finalbody"):
        if isinstance(block := getattr(node, field, None), list):
            yield field, block


def statements(tree: ast.AST, inside: bool = False) -> Iterator[ast.stmt]:
    """Every statement that runs with the module, in order; those of functions only if `inside` is asked for."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.stmt, ast.ExceptHandler)):
            yield node
            if inside or not isinstance(node, (*Function, ast.ClassDef)):
                yield from statements(node, inside)


def name_of(node: ast.AST) -> str:
    """The last name of a dotted expression; empty where there is none."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def text_of(node: ast.AST | None) -> str | None:
    """The text that a constant is; None for any other node."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def executions(tree: ast.Module) -> list[ast.Call]:
    """Calls of exec, eval and of functions that run a file, wherever they stand."""
    names = {ast.Name: {"exec", "eval", "run_path"}, ast.Attribute: {"exec", "run_path"}}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if name_of(call.func) in names.get(type(call.func), ())]


def unwrap(source: str, read: Callable[[str], bytes | None] = lambda name: None) -> Unwrapped:
    """Every layer of a script that unpacks itself, as text. Never executes, never raises on foreign text."""
    found = Unwrapped([], [], [])
    waiting = [source]
    while waiting:
        layer = waiting.pop(0)
        if len(found.layers) == MAX_LAYERS:
            found.problems.append(Problem(0, f"more than {MAX_LAYERS} layers"))
            break
        found.layers.append(layer)
        try:
            tree = read_tree(layer)[0]
            # Names of the module alone, then those that functions bind as well.
            foldings = [Folding(tree, read, inside) for inside in (False, True)] if executions(tree) else []
            for call in executions(tree):
                if call.args:
                    waiting += executed(call, foldings, found)
        except (SyntaxError, RecursionError):
            continue  # the syntax check names it
    return found


def executed(call: ast.Call, foldings: list["Folding"], found: Unwrapped) -> list[str]:
    """The text that a call executes, if it is no file's as it stands: those are named in `found.files`."""
    name = name_of(call.func)
    for folding in foldings:
        try:
            inner = folding.fold(call.args[0])
            if name == "run_path":
                inner = folding.content(inner, binary=False)
            inner = decode_source(inner) if isinstance(inner, bytes) else inner
            if not isinstance(inner, str):
                raise Unfoldable("what it runs is not text")
        except (Unfoldable, SyntaxError, TypeError, ValueError) as error:
            problem = f"{name} at line {call.lineno} cannot be unwrapped: {error}"
            continue
        text = inner.replace("\r\n", "\n")
        whole = [file for file, data in folding.files.items() if data and decode(data).strip() == text.strip()]
        found.files += whole or folding.files
        return [] if whole or not text.strip() else [text]
    lacking = [file for file, data in foldings[-1].files.items() if data is None]
    found.files += lacking
    if not lacking:
        found.problems.append(Problem(call.lineno, problem))
    return []


# ----------------------------------------------------------------------------------------------------------------------
# Comparing a packed script with its readable companion
# ----------------------------------------------------------------------------------------------------------------------


def is_bare(node: ast.stmt) -> bool:
    """Whether a statement does nothing."""
    value = getattr(node, "value", None)
    constant = isinstance(node, ast.Expr) and isinstance(value, ast.Constant)
    return isinstance(node, ast.Pass) or constant or (isinstance(node, ast.AnnAssign) and value is None)


class Bare(ast.NodeTransformer):
    """Drops what a packer may drop: docstrings and other bare constants, annotations, lone `pass`."""

    def visit(self, node):
        node = super().generic_visit(node)
        for field, block in blocks(node):
            setattr(node, field, [statement for statement in block if not is_bare(statement)])
        if isinstance(node, Function):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            return ast.copy_location(ast.Assign([node.target], node.value), node)
        return node


def same_program(a: str, b: str) -> bool | None:
    """Whether two sources are one program but for comments, docstrings and annotations; None if unreadable."""
    try:
        return ast.dump(Bare().visit(read_tree(a)[0])) == ast.dump(Bare().visit(read_tree(b)[0]))
    except (SyntaxError, RecursionError):
        return None
