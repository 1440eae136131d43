"""`pack FILE`: a self-extracting copy of a script, the code bytes that count against the cap.

Comments, docstrings and annotations go, names stay; what is left is compressed (lzma, or zlib where that is smaller)
and written as base85 into a stub of four lines. The same FILE gives the same bytes (with the same liblzma and zlib).

The stub runs the text in the module's own namespace: `__file__`, `__name__` and the `__module__` of classes are those
of the packed file, `Path(__file__).read_bytes()` is what is submitted, and importing it is importing the original. The
text is entered in `linecache` under that file, so tracebacks, `inspect`, Triton and torch.compile find its lines.

`--prove` runs both on a tiny CPU configuration and compares their `result` lines.
"""

import argparse
import ast
import base64
import bisect
import hashlib
import importlib.util
import io
import json
import logging
import lzma
import os
import re
import subprocess
import sys
import tempfile
import tokenize
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from records.submission.command import Unusable, command
from records.submission.rules import CAP_BYTES
from records.submission.unpack import Function, blocks, name_of, text_of

ROOT = Path(__file__).resolve().parent.parent.parent

STUB = """import base64,linecache,{codec}
_source={codec}.decompress(base64.b85decode("{payload}")).decode()
linecache.cache[__file__]=0,None,_source.splitlines(True),__file__
exec(compile(_source,__file__,"exec"))
"""
DECOMPRESS = {"lzma": lzma.decompress, "zlib": zlib.decompress}


class PackError(Unusable):
    """A file that cannot be packed, or a proof that cannot be run. One line for the user."""


# ----------------------------------------------------------------------------------------------------------------------
# Stripping: what goes is decided on the syntax tree and cut out of the text, whose other tokens stay as they are
# (ast.unparse would spell f-strings anew, on Python 3.12 in a way that 3.10 cannot read).
# ----------------------------------------------------------------------------------------------------------------------

# A script that names one of these may read its own annotations: then all of them stay.
READS_ANNOTATIONS = frozenset(
    "__annotations__ get_annotations get_type_hints signature getfullargspec singledispatch singledispatchmethod "
    "script infer_schema custom_op triton_op tyro typer pydantic jsonargparse".split()
)
# Decorators that do not look at annotations. Under any other (triton.jit, a dispatcher's register …) they stay.
PLAIN_DECORATORS = frozenset(
    "property setter getter deleter cached_property staticmethod classmethod abstractmethod contextmanager wraps cache "
    "lru_cache no_grad inference_mode enable_grad compile disable".split()
)
READS_DOCSTRINGS = frozenset(("__doc__", "getdoc"))

Position = tuple[int, int]  # row from 1, column from 0 in characters: as tokens have it


class Cut(NamedTuple):
    """A span of the text to leave out, and what stands there instead."""

    start: Position
    end: Position
    instead: str = ""


def tokens_of(text: str) -> Iterator[tokenize.TokenInfo]:
    """The tokens of a source text; an f-string is one of them, as before Python 3.12 splits it."""
    lines, depth, begin = text.split("\n"), 0, (0, 0)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        if name in ("FSTRING_START", "TSTRING_START"):
            begin = begin if depth else token.start
            depth += 1
        elif name in ("FSTRING_END", "TSTRING_END"):
            depth -= 1
            if depth == 0:
                (row, column), (last, end) = begin, token.end
                parts = [lines[row - 1][column:], *lines[row : last - 1], lines[last - 1][:end]]
                whole = "\n".join(parts) if last > row else lines[row - 1][column:end]
                yield tokenize.TokenInfo(tokenize.STRING, whole, begin, token.end, token.line)
        elif depth == 0:
            yield token


class Strip(ast.NodeTransformer):
    """Takes docstrings and annotations out of a tree and notes in `cuts` where they stand in the text."""

    def __init__(self, text: str, tree: ast.Module, tokens: Sequence[tokenize.TokenInfo]):
        self.lines, self.tokens, self.cuts = text.split("\n"), tokens, []
        self.token_starts = [token.start for token in tokens]
        named = set(names_of(tree))
        self.keeps_annotations = bool(named & READS_ANNOTATIONS)
        self.keeps_docstrings = bool(named & READS_DOCSTRINGS)
        self.in_class = False

    def position(self, row: int, offset: int) -> Position:
        """A place of the tree, whose offsets count UTF-8 bytes, as a place of the tokens."""
        return row, len(self.lines[row - 1].encode()[:offset].decode())

    def start(self, node: ast.AST) -> Position:
        return self.position(node.lineno, node.col_offset)

    def end(self, node: ast.AST) -> Position:
        return self.position(node.end_lineno, node.end_col_offset)

    def token_from(self, place: Position, *strings: str) -> tokenize.TokenInfo:
        """The first of these tokens at or after a place; "" is the end of a line."""
        i = bisect.bisect_left(self.token_starts, place)
        return next(t for t in self.tokens[i:] if t.string in strings or ("" in strings and t.type == tokenize.NEWLINE))

    def visit(self, node: ast.AST) -> Any:
        for field, statements in blocks(node):
            if statements:
                setattr(node, field, self.without_strings(node, statements))
        return super().visit(node)

    def without_strings(self, owner: ast.AST, statements: list[ast.stmt]) -> list[ast.stmt]:
        """A block without the statements that are only a string; `pass` where nothing else is in it."""
        gone = [s for s in statements if isinstance(s, ast.Expr) and text_of(s.value) is not None]
        if self.keeps_docstrings and isinstance(owner, (ast.Module, ast.ClassDef, *Function)):
            gone = [s for s in gone if s is not statements[0]]
        kept = [s for s in statements if s not in gone]
        if not kept:
            statement, *gone = gone
            self.cuts.append(Cut(self.start(statement), self.end(statement), "pass"))
            kept = [ast.Pass()]
        for statement in gone:
            self.cuts.append(Cut(self.start(statement), self.token_from(self.end(statement), ";", "").end))
        return kept

    def generic_visit(self, node: ast.AST) -> ast.AST:
        outside = self.in_class
        if isinstance(node, (ast.ClassDef, *Function)):
            self.in_class = isinstance(node, ast.ClassDef)
        super().generic_visit(node)
        self.in_class = outside
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        if not self.keeps_annotations and all(last_name(d) in PLAIN_DECORATORS for d in node.decorator_list):
            a = node.args
            for arg in filter(None, (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg)):
                if arg.annotation is not None:
                    self.cuts.append(Cut(self.token_from(self.start(arg), ":").start, self.end(arg)))
                    arg.annotation = None
            if node.returns is not None:
                i = bisect.bisect_left(self.token_starts, self.start(node.returns))
                arrow = next(token for token in reversed(self.tokens[:i]) if token.string == "->")
                self.cuts.append(Cut(arrow.start, self.token_from(self.end(node.returns), ":").start))
                node.returns = None
        return self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """`x: int = 1` to `x = 1`. Fields of classes stay: dataclasses and named tuples are made of them.

        Without a value the statement stays, with a 0 for the type, since it makes x a local name of its function.
        """
        if self.in_class or self.keeps_annotations:
            return node
        colon = self.token_from(self.end(node.target), ":")
        if node.value is None:
            self.cuts.append(Cut(colon.end, self.end(node), "0"))
            node.annotation = ast.Constant(0)
            return node
        self.cuts.append(Cut(colon.start, self.token_from(self.end(node.annotation), "=").start))
        return ast.Assign([node.target], node.value)


def last_name(decorator: ast.expr) -> str:
    """`no_grad` of `@torch.no_grad()`."""
    return name_of(decorator.func if isinstance(decorator, ast.Call) else decorator)


def names_of(tree: ast.AST) -> Iterator[str]:
    """Every name, attribute, import and string of a tree (getattr may be given any of them)."""
    for node in ast.walk(tree):
        for value in (getattr(node, field, None) for field in ("id", "attr", "name", "module", "value")):
            if isinstance(value, str):
                yield from value.split(".")


def squeeze(tokens: Iterable[tokenize.TokenInfo], cuts: Sequence[Cut]) -> str:
    """The tokens outside the cuts with as little space as keeps them apart; one space indents a level."""
    out, level, previous, waiting = [], 0, "", sorted(cuts, reverse=True)
    for token in tokens:
        string = token.string
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            level += 1 if token.type == tokenize.INDENT else -1
            continue
        if token.type == tokenize.NEWLINE:
            out.append("\n" if previous else "")
            previous = ""
            continue
        while waiting and waiting[-1].end <= token.start:
            waiting.pop()
        if waiting and waiting[-1].start <= token.start:
            string = waiting[-1].instead
            waiting[-1] = waiting[-1]._replace(instead="")
            if not string:
                continue
        elif token.type in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            continue
        out += [" " * (level if not previous else must_stand_apart(previous, string)), string]
        previous = string
    return "".join(out)


def must_stand_apart(a: str, b: str) -> bool:
    """Whether two tokens would be read as others if nothing were between them."""
    number = re.match(r"\.?\d", a) is not None
    words = re.fullmatch(r"\w\w", a[-1] + b[0]) is not None
    return words or (number and re.match(r"[\w.]", b) is not None) or (a[-1] in "\"'" and b[0] in "\"'")


def strip(source: bytes, name: str = "the script") -> str:
    """A script's text without comments, docstrings and annotations. Raises PackError if it is not Python."""
    try:
        text = importlib.util.decode_source(source)
        tree, tokens = ast.parse(text), list(tokens_of(text))
    except (SyntaxError, ValueError, RecursionError, tokenize.TokenError) as error:
        raise PackError(f"{name} is no source of Python {sys.version_info[0]}.{sys.version_info[1]}: {error}") from None
    stripper = Strip(text, tree, tokens)
    wanted = ast.dump(stripper.visit(tree))
    stripped = squeeze(tokens, stripper.cuts)
    try:
        same = ast.dump(ast.parse(stripped)) == wanted  # the tree says what should be left; the text must say the same
    except SyntaxError:
        same = False
    if not same:
        raise PackError(f"{name} cannot be stripped without changing what it does; please report this script")
    return stripped


# ----------------------------------------------------------------------------------------------------------------------
# Packing
# ----------------------------------------------------------------------------------------------------------------------


def pack(source: bytes, name: str = "the script") -> bytes:
    """The self-extracting form of a script. Raises PackError."""
    return wrap(strip(source, name))


def worth(source_bytes: int, packed_bytes: int) -> str:
    """What running the packed file instead of the source leaves for weights, in one line."""
    saved = source_bytes - packed_bytes
    if saved <= 0:
        return f"worth: nothing, packed it is {-saved:,} bytes larger; run the source"
    share, weights = f"{100 * saved / CAP_BYTES:.2g} % of the {CAP_BYTES:,} bytes", saved * 8 // 6
    weights = round(weights, 2 - len(str(weights)))  # two digits: how well int6 codes compress, nobody knows better
    return (
        f"worth: the file that runs counts: {source_bytes:,} bytes raw, {packed_bytes:,} packed; "
        f"the difference of {saved:,} is {share}, or about {weights:,} more int6 weights"
    )


def wrap(text: str) -> bytes:
    """The stub around a text, compressed the smallest of a few ways."""
    body = text.encode()
    packed = [("zlib", zlib.compress(body, 9))]
    for lc in range(5):  # bits of the byte before that choose the model of the next one: what text likes depends on it
        filters = [dict(id=lzma.FILTER_LZMA1, preset=9 | lzma.PRESET_EXTREME, lc=lc, lp=0, pb=0)]
        packed.append(("lzma", lzma.compress(body, lzma.FORMAT_ALONE, filters=filters)))
    codec, payload = min(packed, key=lambda pair: len(pair[1]))
    return STUB.format(codec=codec, payload=base64.b85encode(payload).decode()).encode()


def unpack(packed: bytes) -> bytes | None:
    """The stripped text inside a script that `pack` made, read as data; None for any other file."""
    for codec, decompress in DECOMPRESS.items():
        head, tail = STUB.format(codec=codec, payload="\0").encode().split(b"\0")
        if packed.startswith(head) and packed.endswith(tail):
            try:
                return decompress(base64.b85decode(packed[len(head) : -len(tail)]))
            except (ValueError, EOFError, lzma.LZMAError, zlib.error):
                return None
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Proof: both scripts make the same run
# ----------------------------------------------------------------------------------------------------------------------

# A model of a few thousand parameters that uses every part of the run: averages, late QAT, sliding windows, TTT.
TINY_SETTINGS = """
DEVICE=cpu DTYPE=fp32 VOCAB_SIZE=512 NUM_LAYERS=3 MODEL_DIM=32 NUM_HEADS=4 NUM_KV_HEADS=2 ROPE_DIMS=4
XSA_LAST_N=1 BIGRAM_VOCAB_SIZE=64 BIGRAM_DIM=8 VE_DIM=8 VE_LAYERS=1,2 TRAIN_SEQ_LEN=32 EVAL_SEQ_LEN=32
TRAIN_BATCH_TOKENS=384 ITERATIONS=12 WARMDOWN_ITERS=11 WARMUP_STEPS=1 MAX_WALLCLOCK_SECONDS=0
EVAL_MAX_SECONDS=0 VAL_LOSS_EVERY=6 SWA_ENABLED=1 SWA_EVERY=1 VAL_BATCH_SIZE=4096 EVAL_STRIDE=16
TTT_CHUNK_TOKENS=2048 TTT_EPOCHS=1 TTT_BATCH_SEQS=16
"""
TINY = dict(setting.split("=") for setting in TINY_SETTINGS.split())
PROOF_SECONDS = 1800
# What two runs of one script may differ in, and what belongs to the file. All else in the result has to be the same.
OF_THE_RUN = {"run_id", "train_seconds", "eval_seconds", "phase_seconds", "peak_memory_mib"}
OF_THE_FILE = {"code_sha256", "bytes_code", "bytes_total"}


def clean_environ(**settings: str) -> dict[str, str]:
    """This process's environment without settings of the script, and one thread: more would add up in another order."""
    kept = ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR", "LANG", "SYSTEMROOT")
    environ = {name: os.environ[name] for name in kept if name in os.environ}
    return environ | dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE") | settings


def make_tiny_data(folder: Path) -> Path:
    """Shards of a few ten thousand tokens and a tokenizer of 512 pieces, from docstrings of the standard library."""
    members = [value for module in (argparse, json, logging, subprocess) for value in vars(module).values()]
    members += [value for member in members if isinstance(member, type) for value in vars(member).values()]
    texts = sorted({text for member in members if len(text := str(getattr(member, "__doc__", None) or "")) > 80})
    documents, out = folder / "documents.jsonl", folder / "shards"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    words = [sys.executable, ROOT / "data" / "prepare.py", "text", documents, "--val-docs", "30", "--out", out]
    words += ["--vocab-size", "512", "--shard-tokens", "20000", "--workers", "1"]
    done = subprocess.run(words, env=clean_environ(), capture_output=True, text=True)
    if done.returncode:
        raise PackError(f"cannot make data for the proof: {last_line(done.stderr)}")
    return out


def vocab_size(data: Path) -> str:
    """The pieces of the one tokenizer in a folder of shards."""
    from sentencepiece import SentencePieceProcessor

    models = sorted(data.glob("*.model"))
    if len(models) != 1:
        raise PackError(f"{data} holds {len(models)} tokenizers (*.model); the proof needs one, beside the shards")
    return str(SentencePieceProcessor(model_file=str(models[0])).vocab_size())


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def tiny_runs(scripts: dict[str, bytes], data: Path, folder: Path) -> dict[str, dict]:
    """The `result` of a tiny run of each script, side by side in their own folders. Raises PackError."""
    settings = TINY | dict(VOCAB_SIZE=vocab_size(data), DATA_PATH=str(data.resolve()), RUN_ID="proof")
    running, results = {}, {}
    try:
        for name, source in scripts.items():
            place = folder / name
            place.mkdir()
            (place / "train_gpt.py").write_bytes(source)
            with (place / "out").open("wb") as out, (place / "err").open("wb") as err:
                words, environ = [sys.executable, "-B", "train_gpt.py"], clean_environ(**settings)
                running[name] = subprocess.Popen(words, cwd=place, env=environ, stdout=out, stderr=err)
        for name, process in running.items():
            code = process.wait(PROOF_SECONDS)
            out, err = (last_line((folder / name / stream).read_text("utf-8", "replace")) for stream in ("out", "err"))
            if code:
                raise PackError(f"the {name} script ended with exit code {code}: {err}")
            if not out.startswith("result {"):
                raise PackError(f"the {name} script does not end with a `result` line: nothing to compare")
            results[name] = json.loads(out.removeprefix("result "))
    except subprocess.TimeoutExpired:
        raise PackError(f"the proof took more than {PROOF_SECONDS} s; give smaller --data") from None
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return results


def differences(original: dict, packed: dict, script: bytes) -> list[str]:
    """What speaks against the packed script, in words; empty is a proof."""
    found = [
        f"{name} is {original.get(name)} and packed {packed.get(name)}"
        for name in dict.fromkeys((*original, *packed))
        if name not in OF_THE_RUN | OF_THE_FILE and original.get(name) != packed.get(name)
    ]
    own = dict(code_sha256=hashlib.sha256(script).hexdigest(), bytes_code=len(script))
    found += [f"packed states {k} {packed.get(k)}, its file has {v}" for k, v in own.items() if packed.get(k) != v]
    return found


def prove(source: bytes, packed: bytes, data: Path | None) -> int:
    """Run both and say what came out; 0 where they agree, else 1. Raises PackError where they cannot be compared."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        results = tiny_runs(dict(original=source, packed=packed), data or make_tiny_data(folder), folder)
    found = differences(results["original"], results["packed"], packed)
    for difference in found:
        print(f"prove FAIL {difference}")
    if not found:
        result = results["packed"]
        headline = result["headline"]
        print(
            f"prove pass artifact_sha256:{result['artifact_sha256']} steps:{result['steps']} "
            f"{headline['label']} val_bpb:{headline['val_bpb']:.8f}, from both; "
            f"differing as they should: {', '.join(sorted(OF_THE_RUN | OF_THE_FILE))}"
        )
    return 1 if found else 0


# ----------------------------------------------------------------------------------------------------------------------
# Command
# ----------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="the script to pack")
    parser.add_argument("-o", "--out", type=Path, help="where to; default: FILE's name with _packed, beside it")
    parser.add_argument("--prove", action="store_true", help="first run both on a tiny CPU configuration and compare")
    parser.add_argument("--data", type=Path, help="shards and tokenizer for the proof; default: tiny ones made for it")


@command
def run(args: argparse.Namespace) -> int:
    """Pack, prove if wanted, and only then write."""
    out = args.out or args.file.with_name(f"{args.file.stem}_packed{args.file.suffix}")
    source = args.file.read_bytes()
    if unpack(source) is not None:
        raise PackError(f"{args.file} is packed already")
    if out.exists() and unpack(out.read_bytes()) is None:
        raise PackError(f"{out} exists and is no packed script; give another name with -o")
    stripped = strip(source, str(args.file))
    packed = wrap(stripped)
    if args.prove and (code := prove(source, packed, args.data)):
        return code
    out.write_bytes(packed)
    print(f"source_bytes:{len(source)} stripped_bytes:{len(stripped.encode())} packed_bytes:{len(packed)}")
    print(worth(len(source), len(packed)))
    print(f"{out} sha256:{hashlib.sha256(packed).hexdigest()}")
    return 0
