"""Prepares the shards and the tokenizer that train_gpt.py reads.

    python data/prepare.py offline                                       # text of this Python installation, no network
    python data/prepare.py text docs.jsonl.gz --val-docs 500 --out DIR   # your own documents
    python data/prepare.py fineweb --variant sp1024 --train-shards 10    # the challenge's published shards

A shard is 256 little-endian int32 (20240520, 1, number of tokens, 0 ...) followed by that many uint16 tokens; every
document starts with BOS (id 1). Problems the user can fix end in one line `error: ...` on stderr and exit code 2.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are loaded: the end, without a traceback

import argparse
import contextlib
import errno
import fcntl
import functools
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import sysconfig
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

try:
    import numpy as np
    import sentencepiece as spm
    from tqdm import tqdm
except ModuleNotFoundError as err:
    if __name__ != "__main__":
        raise
    print(f"error: {err.name} is not installed: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)
import caseops

# -----------------------------------------------------------------------------
# CONSTANTS, ERRORS, PROGRESS
# -----------------------------------------------------------------------------

PREPARE_VERSION = 1  # goes into the manifest; raise it when the same inputs would give other bytes
DATA_DIR = Path(__file__).resolve().parent

SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
BOS_ID = 1
MAX_VOCAB_SIZE = 1 << 16  # tokens are uint16
MAX_SHARD_TOKENS = (1 << 31) - 1  # the header's number of tokens is int32
VAL_DOCUMENTS_FILE = "fineweb_val_documents.tsv"  # bytes and sha256 of each validation document's normalised text

MAX_UNREADABLE = 0.01  # up to this share of rows without a text is left out; more, and something is wrong
HOPELESS_ROWS = 1000  # so many rows, none of them with a text, and the rest is not read

CHUNK_BYTES = 1 << 20  # text handed to a worker at a time: large against its start-up cost, small against a bar's step
COUNT_TOKENS = 1 << 22  # tokens the byte counter sees at a time, so that a large shard is not held in memory as int64
READ_BYTES = 1 << 20
TRANSFER_TRIES = 5  # connections in a row that may bring nothing before a download gives up
LOCK_SECONDS = 3.0  # how long to wait for a lock: the workers of a run that was killed take a moment to notice
PLAIN_LINE_SECONDS = 10.0  # without a terminal, progress is one line per this many seconds
TOKENIZER_TEXT_BYTES = 200_000_000  # SentencePiece holds its training text in memory

OFFLINE_BYTES, OFFLINE_DOC_BYTES, OFFLINE_VAL_DOCS = 12_000_000, 4_000, 40  # 40 documents are about 140 kB of text
# Test data, bundled packages, generated tables: not text anybody wrote to be read.
OFFLINE_SKIP_DIRS = frozenset(
    "test tests idlelib idle_test turtledemo lib2to3 encodings ensurepip site-packages dist-packages pydoc_data "
    "lib-dynload __pycache__ __phello__".split()
)


class UserError(Exception):
    """Something the user can fix: `main` prints it as one `error:` line and exits with 2."""


@contextlib.contextmanager
def trainer() -> Iterator:
    """The module train_gpt: the project's only shard reader, fingerprint and byte counter. Its UserError becomes ours.

    Imported here and not above because it pulls in torch, which workers and the downloader have no use for.
    """
    require("torch", "checking shards")
    if str(DATA_DIR.parent) not in sys.path:
        sys.path.insert(0, str(DATA_DIR.parent))
    try:
        import train_gpt
    except ImportError as err:
        raise UserError(f"train_gpt.py, which checks the shards, cannot be imported: {one_line(err)}") from None

    try:
        yield train_gpt
    except train_gpt.UserError as err:
        raise UserError(str(err)) from None


def require(module: str, what: str, advice: str = "pip install -r requirements.txt") -> None:
    """Raises UserError where a module that `what` needs is not installed."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{what} needs {module}, which is not installed: {advice}")


def one_line(err: BaseException) -> str:
    return " ".join(str(err).split()) or type(err).__name__


def say(line: str) -> None:
    """Prints a line at once. Where nobody reads it any more (`| head`, a full disk), the line is lost, not the work."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


INTERRUPTED = threading.Event()


def interrupt(*_) -> None:
    """Ctrl-C, a termination request and a closed terminal all clean up."""
    INTERRUPTED.set()
    raise KeyboardInterrupt


def check_interrupt() -> None:
    """Raises an interrupt again: Python drops the first one where it meets a destructor or a callback."""
    if INTERRUPTED.is_set():
        raise KeyboardInterrupt


class Progress:
    """A tqdm bar on a terminal, a plain line every PLAIN_LINE_SECONDS otherwise."""

    def __init__(self, what: str, total: int | None, unit: str):
        """`total` in `unit`s ("B" for bytes, "doc" for documents); None where it is not known."""
        self.what, self.total, self.unit = what, total, unit
        self.done, self.next_line = 0, time.monotonic() + PLAIN_LINE_SECONDS
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=what, unit=unit, unit_scale=True, file=sys.stderr) if terminal else None

    def update(self, n: int = 1) -> None:
        check_interrupt()
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        elif time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + PLAIN_LINE_SECONDS
            share = f" ({self.done / self.total:.0%})" if self.total else ""
            say(f"{self.what}: {self.done:,} {self.unit}{share}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc) -> None:
        if self.bar is not None:
            self.bar.close()


# -----------------------------------------------------------------------------
# READING DOCUMENTS
# -----------------------------------------------------------------------------

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
INPUT_SUFFIXES = (*JSONL_SUFFIXES, ".txt", ".parquet")


class NoText(NamedTuple):
    """A row (a line of JSON, a row of a table, a .txt file) without a text."""

    reason: str  # with file and line


def input_files(inputs: list[str]) -> list[Path]:
    """Every input file in order; a folder stands for the files below it that can be read, sorted by path.

    Raises UserError where an input is missing, unreadable, of an unknown kind, or a folder without documents.
    """
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files += folder_files(path)
        elif not path.is_file():
            raise UserError(f"input {path} is no regular file" if path.exists() else f"input {path} does not exist")
        elif not path.name.endswith(INPUT_SUFFIXES):
            raise UserError(f"cannot read {path}: inputs are {', '.join(INPUT_SUFFIXES)} files or folders of them")
        else:
            files.append(path)
    for path in files:
        if not os.access(path, os.R_OK):
            raise UserError(f"cannot read {path}: permission denied")
    if any(p.suffix == ".parquet" for p in files):
        require("pyarrow", "a .parquet input", "pip install pyarrow")
    if any(p.suffix == ".zst" for p in files):
        require("zstandard", "a .zst input")
    return files


def folder_files(folder: Path) -> list[Path]:
    """The input files below a folder, sorted by path. Links are followed; what is hidden is left out, with a line.

    Raises UserError for a broken link or a folder that may not be read: documents would be missing without a word.
    """
    files, hidden, visited = [], [], set()

    def refuse(err: OSError):
        raise UserError(f"cannot read {err.filename}: {err.strerror}")

    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:  # a link to a folder above
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        hidden += [name for name in folders + names if name.startswith(".")]
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            if not path.exists():
                raise UserError(f"{path} is a link to nothing; mend or remove it")
            if path.name.endswith(INPUT_SUFFIXES) and path.is_file():
                files.append(path)
    if hidden:
        say(f"{folder}: left out {len(hidden)} hidden files or folders, such as {min(hidden)}")
    if not files:
        raise UserError(f"no {', '.join(INPUT_SUFFIXES)} file in the folder {folder}")
    return sorted(files)


def read_documents(files: list[Path], text_field: str, strict: bool) -> Iterator[str | None]:
    """The text of every document, in order; None for a row without one.

    Raises UserError where a file cannot be read, and for rows without a text: at the first if `strict`, otherwise where
    they are more than MAX_UNREADABLE of all.
    """
    rows, without, first = 0, 0, ""
    for row in itertools.chain.from_iterable(file_rows(path, text_field) for path in files):
        rows += 1
        if isinstance(row, str):
            yield row
            continue
        without, first = without + 1, first or row.reason
        if strict:
            raise UserError(first)
        if without == rows == HOPELESS_ROWS:
            raise UserError(f"none of the first {rows:,} rows holds a text; the first: {first}")
        yield None
    if without > MAX_UNREADABLE * rows:
        limit = f"more than the {MAX_UNREADABLE:.0%} that may be left out"
        raise UserError(f"{without:,} of {rows:,} rows hold no text, {limit}; the first: {first}")
    if without:
        say(f"left out: {without:,} of {rows:,} rows, which hold no text; the first: {first}")


def file_rows(path: Path, text_field: str) -> Iterator[str | NoText]:
    """The rows of one input file. Raises UserError where the file cannot be read to its end."""
    try:
        if path.suffix == ".parquet":
            yield from parquet_rows(path, text_field)
        elif path.suffix == ".txt":
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError as err:
                yield NoText(f"{path} is not UTF-8 ({err})")
        else:
            yield from jsonl_rows(path, text_field)
    except (OSError, EOFError, zlib.error) as err:
        raise UserError(f"cannot read {path}: {one_line(err)}") from None


def jsonl_rows(path: Path, text_field: str) -> Iterator[str | NoText]:
    """One row per line of a .jsonl(.gz/.zst) file; blank lines are nothing."""
    with contextlib.ExitStack() as stack:
        lines: Iterable[bytes]
        if path.suffix == ".zst":
            lines = zst_lines(path)
        else:
            lines = stack.enter_context(gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb"))
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                # Decoded here: json.loads would guess UTF-16 and UTF-32, whose lines do not end at every newline byte.
                record = json.loads(line.decode("utf-8-sig", "surrogatepass"))
            except ValueError as err:  # also bytes that are not UTF-8
                yield NoText(f"{path}:{number}: not a line of JSON ({err})")
            except RecursionError:
                yield NoText(f"{path}:{number}: JSON that is nested too deep")
            else:
                yield record_text(record, text_field, f"{path}:{number}")


def record_text(record: object, text_field: str, where: str) -> str | NoText:
    """record[text_field], or what is wrong with it."""
    if not isinstance(record, dict):
        return NoText(f"{where}: a JSON object with a {text_field!r} field was expected")
    if text_field not in record:
        return NoText(f"{where}: {no_field(text_field, 'fields', list(record))}")
    text = record[text_field]
    if isinstance(text, str):
        return text
    kind = "null" if text is None else type(text).__name__
    return NoText(f"{where}: the field {text_field!r} is not a string but {kind}")


def no_field(text_field: str, kind: str, names: list[str]) -> str:
    has = ", ".join(repr(name)[:40] for name in names[:10]) + ", ..." * (len(names) > 10)
    return f"no text field {text_field!r} ({kind}: {has or 'none'}); name it with --text-field"


def zst_lines(path: Path) -> Iterator[bytes]:
    """Lines of a .zst file of one or more frames. Raises OSError where it is damaged or ends inside a frame.

    zstandard's own stream reader takes a truncated file for a complete one; its decompression object knows better.
    """
    import zstandard

    parts, frame = [], None  # of a line that is not complete yet: joined once, as a line may be long
    with path.open("rb") as source:
        while data := source.read(READ_BYTES):
            while data:
                # The default refuses the wide windows of `zstd --long`.
                frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                try:
                    first, *lines = frame.decompress(data).split(b"\n")
                except zstandard.ZstdError as err:
                    raise OSError(str(err)) from None
                parts.append(first)
                for line in lines:
                    yield b"".join(parts)
                    parts = [line]
                data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise OSError("the file ends in the middle of its compressed data")
    yield b"".join(parts)


def parquet_rows(path: Path, text_field: str) -> Iterator[str | NoText]:
    """One row per row of the table, a row group's batch at a time."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if text_field not in names:
            raise UserError(f"{path}: {no_field(text_field, 'columns', names)}")
        number = 0
        for batch in table.iter_batches(columns=[text_field]):
            for value in batch.column(text_field):
                number += 1
                where = f"{path}: row {number}"
                try:
                    yield record_text({text_field: value.as_py()}, text_field, where)
                except UnicodeDecodeError as err:
                    yield NoText(f"{where} is not UTF-8 ({err})")
    except (pyarrow.ArrowException, KeyError) as err:
        raise UserError(f"cannot read {path}: {one_line(err)}") from None


# -----------------------------------------------------------------------------
# SPLITTING INTO TRAINING AND VALIDATION
# -----------------------------------------------------------------------------


@dataclass
class Spool:
    """The kept documents of one split on disk: the text is read once, and workers fetch their chunk by offset.

    Layout: per document its length in bytes (little-endian uint64), then its UTF-8 text.
    """

    path: Path
    documents: int = 0
    raw_bytes: int = 0
    chunks: list[list[int]] = field(default_factory=list)  # [offset, documents] of about CHUNK_BYTES each
    chunk_bytes: int = 0

    def __post_init__(self):
        self.file = self.path.open("wb")

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *exc) -> None:
        self.file.close()

    def append(self, text: bytes) -> None:
        if not self.chunks or self.chunk_bytes >= CHUNK_BYTES:
            self.chunks.append([self.file.tell(), 0])
            self.chunk_bytes = 0
        self.file.write(len(text).to_bytes(8, "little"))
        self.file.write(text)
        self.chunks[-1][1] += 1
        self.chunk_bytes += len(text)
        self.documents += 1
        self.raw_bytes += len(text)


def spooled_texts(path: Path, offset: int, documents: int) -> Iterator[str]:
    """`documents` texts of a spool from byte `offset` on."""
    with path.open("rb") as source:
        source.seek(offset)
        for _ in range(documents):
            yield source.read(int.from_bytes(source.read(8), "little")).decode("utf-8")


def utf8(text: str) -> bytes:
    """The text in UTF-8. Lone surrogates, which JSON can carry and UTF-8 cannot, become U+FFFD; pairs are joined."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")


def document_key(text: bytes, normalize: Callable[[str], str]) -> bytes:
    """What makes two documents the same: equal text after normalising, which is all that the model would see.

    Empty for a document without text. 16 bytes each, so ten million documents take well under 2 GB of memory.
    """
    words = normalize(text.decode("utf-8")).replace("\u2581", " ").split()
    return hashlib.blake2b(" ".join(words).encode("utf-8"), digest_size=16).digest() if words else b""


def split_documents(train: Spool, val: Spool, texts: Iterator[str | None], val_texts: Iterator[str | None] | None,
                    val_docs: int, normalize: Callable[[str], str]) -> dict[str, int]:  # fmt: skip
    """Spools every document into its split and returns how many were dropped, and why; None is a row without a text.

    With `val_texts` those are the validation split, all of them; otherwise the first `val_docs` of `texts` are. A
    document of `texts` that was seen before, in either split, is dropped: no document is in both.
    Raises UserError where a split would be empty.
    """
    seen: set[bytes] = set()
    dropped = {"duplicates": 0, "empty": 0, "unreadable": 0}
    with Progress("read", None, "doc") as progress:
        for is_val, text in itertools.chain(((True, t) for t in val_texts or ()), ((False, t) for t in texts)):
            progress.update()
            if text is None:
                dropped["unreadable"] += 1
                continue
            encoded = utf8(text)
            key = document_key(encoded, normalize)
            if not key:
                dropped["empty"] += 1
            elif key in seen and not is_val:
                dropped["duplicates"] += 1
            else:
                seen.add(key)
                (val if is_val or val.documents < val_docs else train).append(encoded)
    train.file.close()
    val.file.close()
    kept = val.documents + train.documents
    found = f"the inputs hold {kept} documents, {dropped['duplicates']} duplicates and {dropped['empty']} empty ones"
    if val_texts is None and not train.documents:
        raise UserError(f"too few documents for --val-docs {val_docs}: {found}, and some must train")
    if not val.documents or not train.documents:
        raise UserError(f"no {'training' if val.documents else 'validation'} documents: {found}")
    return dropped


# -----------------------------------------------------------------------------
# TOKENIZER
# -----------------------------------------------------------------------------


def train_tokenizer(spool: Spool, vocab_size: int, place: str | None, model_path: Path) -> None:
    """Trains the challenge's SentencePiece BPE on the spooled documents, in CaseOps with operators at `place` unless
    it is None, and writes the model.

    Raises UserError where the vocabulary cannot hold the byte pieces and the characters of the text.
    """
    started = time.monotonic()
    model_path.write_bytes(in_child(trained_model, spool.path, spool.documents, vocab_size, place))
    got = load_tokenizer(model_path).vocab_size()
    say(f"tokenizer: {got} pieces in {time.monotonic() - started:.1f} s")
    if got != vocab_size:
        say(f"tokenizer: the text gives {got} pieces instead of {vocab_size}; train with VOCAB_SIZE={got}")


def trained_model(spool_path: Path, documents: int, vocab_size: int, place: str | None = None) -> bytes:
    """A SentencePiece model of the first `documents` texts of a spool. Raises UserError."""
    texts, size = [], 0
    for text in spooled_texts(spool_path, 0, documents):
        # A whole document is one sentence: cut at newlines, the words after them would be counted without the `▁`
        # that they have once the normaliser has folded newlines into spaces.
        texts.append(text if place is None else caseops.transform(folded(text), place))
        size += len(text)
        if size >= TOKENIZER_TEXT_BYTES:
            break
    say(f"tokenizer: training on {len(texts):,} documents, {size:,} characters")
    model, symbols = io.BytesIO(), {} if place is None else caseops.symbols(place)
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, split_digits=True, character_coverage=0.999, normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False, hard_vocab_limit=False, pad_id=0, bos_id=BOS_ID, eos_id=2, unk_id=3,
            max_sentence_length=1 << 30,  # the default leaves out every document above 4,192 bytes
            num_threads=1, minloglevel=2, **symbols,
        )  # fmt: skip
    except (RuntimeError, OSError) as err:
        reason = str(err).strip().splitlines()[-1]
        raise UserError(f"SentencePiece cannot train {vocab_size} pieces on this text: {reason}") from None
    return model.getvalue()


def in_child(function: Callable[..., bytes], *args) -> bytes:
    """function(*args) in a process of its own: SentencePiece trains for minutes, and Python hears no signal meanwhile.

    Raises its UserError, or one that says that it died.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.Process(target=answer, args=(sender, function, args), daemon=True)
    child.start()
    sender.close()  # ours: the child's end is the only one, so that its death is the end of the pipe
    try:
        result = receiver.recv()
    except EOFError:
        raise UserError("the process that trains the tokenizer died, perhaps for lack of memory") from None
    finally:
        child.kill()
        child.join()
        receiver.close()
    if isinstance(result, UserError):
        raise result
    return result


def answer(sender, function: Callable[..., bytes], args: tuple) -> None:
    """The child's part: sends the result or the UserError."""
    worker_signals()
    try:
        result = function(*args)
    except UserError as err:
        result = err
    except MemoryError:
        return
    sender.send(result)


@functools.lru_cache(maxsize=1)
def load_tokenizer(path: Path) -> spm.SentencePieceProcessor:
    """The tokenizer, loaded once per process. Raises UserError where the file is none."""
    try:
        return spm.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, TypeError):
        raise UserError(f"{path} is not a SentencePiece model") from None


def check_tokenizer(path: Path) -> str | None:
    """Where the tokenizer's text has the operators of CaseOps, one of caseops.PLACES, or None for plain text.

    Raises UserError unless shards written with it can be trained on and their bytes counted.
    """
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size() > MAX_VOCAB_SIZE:
        raise UserError(f"{path} has {tokenizer.vocab_size()} pieces; a shard's uint16 tokens hold {MAX_VOCAB_SIZE}")
    if tokenizer.bos_id() != BOS_ID:
        raise UserError(f"{path} has BOS id {tokenizer.bos_id()}; documents start with id {BOS_ID}")
    with trainer() as t:
        transform = t.TokenBytes(path, tokenizer.vocab_size()).transform
    return transform.removeprefix("caseops_") or None


# -----------------------------------------------------------------------------
# WHETHER TOKENS SPELL THE TEXT
# -----------------------------------------------------------------------------


def normalised(text: str, tokenizer: spm.SentencePieceProcessor) -> str:
    """The text after the tokenizer's normaliser, spaces as spaces, without the space that it may put before a text."""
    dummy_prefix = tokenizer.normalize("x").startswith("\u2581")
    return tokenizer.normalize(text)[dummy_prefix:].replace("\u2581", " ")


def tokenized(text: str, tokenizer: spm.SentencePieceProcessor, place: str | None) -> list[int]:
    """The text's tokens, those of its CaseOps transform unless `place` is None.

    Operators are put into normalised text and the tokenizer normalises once more. The rare text that this would change
    is left as it was given, with its capitals: its tokens too spell what a plain tokenizer's would.
    """
    if place is not None:
        cased = caseops.transform(normalised(text, tokenizer), place)
        text = cased if normalised(cased, tokenizer) == cased else caseops.escape(text)
    return tokenizer.encode(text)


@functools.lru_cache(maxsize=1)
def reference_normalizers() -> tuple[Callable[[str], str], ...]:
    return tuple(spm.SentencePieceNormalizer(rule_name=name).normalize for name in ("nmt_nfkc", "nfkc"))


def content(text: str) -> str:
    """What no normaliser may change: the text folded as far as the challenge's own folds it, one space between words.

    nfkc after nmt_nfkc folds what the latter leaves or joins: a full-width tilde, a full-width A and an accent.
    """
    for normalize in reference_normalizers():
        text = normalize(text)
    return " ".join(text.replace("\u2581", " ").split())


def folded(text: str) -> str:
    """The text as the challenge's normaliser folds it, spaces as spaces."""
    return reference_normalizers()[0](text).replace("\u2581", " ")


def checked_text(what: str, text: str, tokens: np.ndarray, tokenizer: spm.SentencePieceProcessor, token_bytes) -> bytes:
    """The normalised text of a document in UTF-8. Raises UserError, which names `what`, unless its tokens (T,), BOS
    first, spell exactly that text and count exactly its bytes, and the normaliser keeps the content."""
    clean = normalised(text, tokenizer)
    encoded, advice = clean.encode("utf-8"), "so bits per byte would be wrong; use another tokenizer"
    if (was := content(text)) != (now := content(clean)):
        at = next((i for i, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now)))
        raise UserError(
            f"{what}: the tokenizer's normaliser changes the text (`{was[at : at + 12]}` to `{now[at : at + 12]}`) and "
            "with it the number of bytes; use a tokenizer with the normaliser nmt_nfkc, nfkc or identity"
        )
    decoded = tokenizer.decode(tokens[1:].tolist())
    if (caseops.restore(decoded) if token_bytes.transform else decoded) != clean:
        raise UserError(f"{what}: its tokens decode to another text than the tokenizer's normaliser gives, {advice}")
    if (counted := int(token_bytes.count(tokens).sum())) != len(encoded):
        raise UserError(f"{what}: the text has {len(encoded)} bytes and its tokens count {counted}, {advice}")
    return encoded


# -----------------------------------------------------------------------------
# TOKENIZING AND WRITING SHARDS
# -----------------------------------------------------------------------------


class ShardWriter:
    """Writes a split's token stream as shards of exactly `shard_tokens` tokens (the last one may be shorter)."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.paths: list[Path] = []
        self.documents: list[int] = []  # of each shard
        self.file: io.BufferedWriter | None = None
        self.in_shard = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exc) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, tokens: np.ndarray) -> None:
        """Appends uint16 tokens of shape (T,)."""
        while len(tokens):
            if self.file is None:
                self.paths.append(self.folder / f"fineweb_{self.split}_{len(self.paths):06d}.bin")
                self.file = self.paths[-1].open("wb")
                self.file.write(bytes(4 * HEADER_INTS))  # the number of tokens is known when the shard is finished
                self.in_shard = 0
                self.documents.append(0)
            part, tokens = np.split(tokens, [self.shard_tokens - self.in_shard])
            self.file.write(part.astype("<u2").tobytes())
            self.in_shard += len(part)
            self.documents[-1] += int(np.count_nonzero(part == BOS_ID))
            if self.in_shard == self.shard_tokens:
                self.finish()

    def finish(self) -> None:
        """Completes the shard that is open, if any, and puts it on the disk."""
        if self.file is None:
            return
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:3] = SHARD_MAGIC, SHARD_VERSION, self.in_shard
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.file = None


def encode_chunk(tokenizer_path: Path, place: str | None, spool_path: Path, offset: int, documents: int) -> np.ndarray:
    """The tokens of a spool's chunk, BOS before each document: (T,) uint16. Runs in a worker."""
    tokenizer = load_tokenizer(tokenizer_path)
    ids: list[int] = []
    for text in spooled_texts(spool_path, offset, documents):
        ids.append(BOS_ID)
        ids += tokenized(text, tokenizer, place)
    return np.array(ids, dtype=np.uint16)


def worker_signals() -> None:
    """Ctrl-C reaches the whole process group; only the parent answers it, so that one process cleans up and speaks.

    A parent that is killed cannot end its workers, which would wait for work for ever: they end with it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def follow(parent) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, args=(multiprocessing.parent_process(),), daemon=True).start()


def write_shards(
    spool: Spool, split: str, tokenizer_path: Path, place: str | None, shard_tokens: int, workers: int
) -> dict[Path, int]:
    """Tokenizes a spool in parallel, in order, and returns its shards with the number of documents that begin in each.

    `place` is of CaseOps' operators, None for plain text.
    """
    workers = min(workers, len(spool.chunks))
    encode = functools.partial(encode_chunk, tokenizer_path, place, spool.path)
    offsets, counts = zip(*spool.chunks, strict=True)
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(ShardWriter(spool.path.parent, split, shard_tokens))
        progress = stack.enter_context(Progress(f"tokenize {split}", spool.documents, "doc"))
        run = map
        if workers > 1:
            run = stack.enter_context(ProcessPoolExecutor(workers, initializer=worker_signals)).map
        try:
            for tokens, documents in zip(run(encode, offsets, counts), counts, strict=True):
                writer.write(tokens)
                progress.update(documents)
        except BrokenProcessPool:
            raise UserError("a tokenizing process died, perhaps for lack of memory; try fewer --workers") from None
        writer.finish()
        return dict(zip(writer.paths, writer.documents, strict=True))


# -----------------------------------------------------------------------------
# CHECKING WHAT WAS WRITTEN
# -----------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    with path.open("rb") as source:
        digest = hashlib.sha256()
        while data := source.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def count_bytes(shards: list[np.ndarray], token_bytes) -> int:
    """Bytes of a split's decoded text by train_gpt's counter, which counts tokens given their predecessors.

    The stream is one across shards. Its first token is a BOS, 0 bytes, and so misses nothing as the first predecessor.
    """
    total, last = 0, np.zeros(0, dtype=np.uint16)
    for shard in shards:
        for start in range(0, len(shard), COUNT_TOKENS):
            part = np.concatenate([last, shard[start : start + COUNT_TOKENS]])
            total += int(token_bytes.count(part)[max(0, len(last) - 1) :].sum())
            escapes = part[::-1] == token_bytes.escape_id  # a row of them is counted from its beginning
            last = part[-1 - (int(escapes.argmin()) if not escapes.all() else len(part)) :]
    return total


def write_validation_documents(spool: Spool, tokens: np.ndarray, tokenizer, token_bytes, path: Path) -> dict:
    """Writes a line `bytes<TAB>sha256` for the normalised text of each validation document; `tokens` are all of them.

    Returns the manifest's entry. An auditor counts bytes by this file, so it comes from the text and not from the
    tokens. Raises UserError where the two disagree.
    """
    documents = np.split(tokens, np.flatnonzero(tokens == BOS_ID)[1:])
    total = 0
    with path.open("wb") as sink, Progress("check val", len(documents), "doc") as progress:
        texts = spooled_texts(spool.path, 0, spool.documents)
        for number, (text, document) in enumerate(zip(texts, documents, strict=True), start=1):
            what = f"validation document {number} ({' '.join(text[:200].split())[:40]!r})"
            encoded = checked_text(what, text, document, tokenizer, token_bytes)
            sink.write(b"%d\t%s\n" % (len(encoded), hashlib.sha256(encoded).hexdigest().encode()))
            total += len(encoded)
            progress.update()
    return {"file": path.name, "sha256": sha256_file(path), "documents": spool.documents, "bytes": total}


def describe_split(t, spool: Spool, written: dict[Path, int], token_bytes) -> dict:
    """A split's entry in the manifest, from its shards as train_gpt reads them back.

    Raises UserError where they do not hold what was to be written: a disk that lies, or a defect here.
    """
    paths = list(written)
    shards = [t.read_shard(path) for path in paths]
    for (path, wrote), shard in zip(written.items(), shards, strict=True):
        if (begun := int(np.count_nonzero(shard == BOS_ID))) != wrote:
            raise UserError(f"{path} holds {begun} documents instead of {wrote}; check the disk")
    if (documents := sum(written.values())) != spool.documents:
        raise UserError(f"{paths[0].parent} holds {documents} documents instead of {spool.documents}; check the disk")
    files = [
        {"name": p.name, "tokens": len(s), "documents": n, "bytes": p.stat().st_size, "sha256": sha256_file(p)}
        for (p, n), s in zip(written.items(), shards, strict=True)
    ]
    return {
        "documents": documents,
        "tokens": sum(len(shard) for shard in shards),
        "raw_bytes": spool.raw_bytes,
        "normalised_bytes": count_bytes(shards, token_bytes),
        "fingerprint": t.data_fingerprint(paths),
        "files": files,
    }


def describe(tokenizer_path: Path, train: Spool, val: Spool, written: dict[str, dict[Path, int]]) -> dict:
    """The manifest's part about what was written, and the file of validation documents beside it.

    Raises UserError where the byte counter and the text disagree.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    with trainer() as t:
        token_bytes = t.TokenBytes(tokenizer_path, tokenizer.vocab_size())
        splits = {
            "train": describe_split(t, train, written["train"], token_bytes),
            "val": describe_split(t, val, written["val"], token_bytes),
        }
        tokens = np.concatenate([t.read_shard(path) for path in written["val"]])
    documents = write_validation_documents(
        val, tokens, tokenizer, token_bytes, tokenizer_path.with_name(VAL_DOCUMENTS_FILE)
    )
    if documents["bytes"] != splits["val"]["normalised_bytes"]:
        raise UserError(
            f"the validation documents have {documents['bytes']} bytes and their tokens count "
            f"{splits['val']['normalised_bytes']}, so bits per byte would be wrong; use another tokenizer"
        )
    return {
        "tokenizer": {
            "file": tokenizer_path.name,
            "sha256": sha256_file(tokenizer_path),
            "vocab_size": tokenizer.vocab_size(),
            "transform": token_bytes.transform,
        },
        "splits": splits,
        "validation_documents": documents,
    }


# -----------------------------------------------------------------------------
# BUILDING A DATA SET
# -----------------------------------------------------------------------------


def claim(path: Path, opened: Callable[[], int], what: str) -> tuple[int, bool]:
    """A descriptor of `path` as `opened` gives it, locked until it is closed or this process dies, however it dies.

    The second value is False on a file system without locks. Raises UserError where another process holds the lock.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        descriptor, locked = opened(), True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise UserError(f"another run is {what} at this moment; wait for it or end it") from None
            time.sleep(0.1)
            continue
        except OSError:
            locked = False
        with contextlib.suppress(FileNotFoundError):  # its last holder may just have removed or renamed it
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor, locked
        os.close(descriptor)


@contextlib.contextmanager
def building(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends well and vanishes when it does not.

    There is one such folder per `out`, locked by the run that fills it: what lies in it unlocked is of a run that was
    killed, and removed.
    """

    def absent() -> None:
        if os.path.lexists(out):
            raise UserError(f"{out} exists already and is not overwritten; remove it or name another --out")

    def opened() -> int:
        absent()  # again, as the run that held the lock may have ended well
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder, os.O_RDONLY)

    absent()
    folder = out.with_name(f".{out.name}.preparing")
    try:
        lock, locked = claim(folder, opened, f"preparing {out}")
        left = list(folder.iterdir())
        if left and not locked:
            raise UserError(f"{folder} is of another run, live or killed; remove it if none is preparing {out} now")
        for path in left:
            path.unlink()
    except OSError as err:
        raise UserError(f"cannot write {out}: {err.strerror}") from None
    if left:
        say(f"removed {len(left)} files of a run that was killed from {folder}")
    try:
        yield folder
        for path in folder.iterdir():
            fsync(path)
        fsync(folder)
        check_interrupt()
        try:
            folder.rename(out)
        except OSError as err:
            raise UserError(f"cannot write {out}: {err.strerror}") from None
        fsync(out.parent)
    except OSError as err:
        if err.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(f"no room to write {out}: {err.strerror}; nothing of it was kept") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone already where the block ended well
        os.close(lock)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Build:
    """What a data set is made of; the same values give the same bytes, whatever the number of workers."""

    out: Path
    texts: Callable[[], Iterator[str | None]]  # None is a row without a text
    val_texts: Callable[[], Iterator[str | None]] | None
    val_docs: int  # 0 with val_texts
    vocab_size: int
    tokenizer: Path | None  # trained on the training split where None
    caseops: str | None  # where such a tokenizer has its operators; None for plain text
    shard_tokens: int
    workers: int
    record: dict  # command and options, for the manifest


def build(plan: Build) -> dict:
    """Builds the folder `plan.out` and returns its manifest. Raises UserError; then nothing is left behind."""
    require("torch", "checking shards")
    for path in filter(None, (plan.out, plan.tokenizer)):
        if not encodable(str(path)):
            raise UserError(f"SentencePiece opens UTF-8 paths only, and {path} is none; rename it or try PYTHONUTF8=1")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(building(plan.out))
        if plan.tokenizer is not None:
            place = check_tokenizer(plan.tokenizer)
            normalize = load_tokenizer(plan.tokenizer).normalize
        else:
            normalize = spm.SentencePieceNormalizer(rule_name="nmt_nfkc").normalize
        train, val = (stack.enter_context(Spool(folder / f"{split}.spool")) for split in ("train", "val"))
        val_texts = plan.val_texts() if plan.val_texts is not None else None
        dropped = split_documents(train, val, plan.texts(), val_texts, plan.val_docs, normalize)
        if plan.tokenizer is not None:
            model_path = folder / f"{plan.tokenizer.stem}.model"  # the ending by which train_gpt.py finds it
            shutil.copyfile(plan.tokenizer, model_path)
        else:
            model_path = folder / f"bpe_{plan.vocab_size}.model"
            train_tokenizer(train, plan.vocab_size, plan.caseops, model_path)
            place = check_tokenizer(model_path)
        written = {
            split: write_shards(spool, split, model_path, place, plan.shard_tokens, plan.workers)
            for split, spool in (("train", train), ("val", val))
        }
        manifest = {
            "prepare_version": PREPARE_VERSION,
            "sentencepiece": spm.__version__,
            **plan.record,
            "dropped": dropped,
            **describe(model_path, train, val, written),
        }
        # A name that is not UTF-8 has lone surrogates; the backslash makes them JSON's own escapes.
        lines = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (folder / "manifest.json").write_text(lines, "utf-8", errors="backslashreplace")
        train.path.unlink()
        val.path.unlink()
    return manifest


def encodable(text: str) -> bool:
    """Whether a path is UTF-8, or what this locale takes for it: other bytes are lone surrogates in Python."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def print_summary(out: Path, manifest: dict) -> None:
    """What the data set holds, and the command that trains on it."""
    for split, entry in manifest["splits"].items():
        say(
            f"{split}: {entry['documents']:,} documents, {entry['tokens']:,} tokens in {len(entry['files'])} shards, "
            f"{entry['raw_bytes']:,} raw bytes, {entry['normalised_bytes']:,} normalised bytes, "
            f"fingerprint {entry['fingerprint'][:16]}"
        )
    dropped = manifest["dropped"]
    say(
        f"dropped: {dropped['duplicates']} duplicates, {dropped['empty']} empty documents, "
        f"{dropped['unreadable']} rows without a text"
    )
    of = f", text in {transform}" if (transform := manifest["tokenizer"].get("transform")) else ""
    say(f"tokenizer: {manifest['tokenizer']['file']} with {manifest['tokenizer']['vocab_size']} pieces{of}")
    print_train_command(out, None, manifest["tokenizer"]["vocab_size"])


def print_train_command(data: Path, tokenizer: Path | None, vocab_size: int) -> None:
    """`tokenizer` is None where it lies beside the shards, where train_gpt.py finds it alone."""
    words = [f"DATA_PATH={shlex.quote(shown(data))}"]
    words += [f"TOKENIZER_PATH={shlex.quote(shown(tokenizer))}"] if tokenizer is not None else []
    say(f"train with:\n  {' '.join(words)} VOCAB_SIZE={vocab_size} python train_gpt.py")


def shown(path: Path) -> str:
    """The path as the user would type it: relative where it lies below the current folder."""
    path, here = path.absolute(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


# -----------------------------------------------------------------------------
# COMMAND text
# -----------------------------------------------------------------------------


def command_text(args: argparse.Namespace) -> None:
    """Your own documents."""
    files = input_files(args.inputs)
    val_files = input_files(args.val) if args.val else None
    if args.tokenizer is not None and not args.tokenizer.is_file():
        raise UserError(f"tokenizer {args.tokenizer} does not exist")
    if args.tokenizer is not None and args.caseops:
        raise UserError("--caseops is for a tokenizer to train; one that exists says by its pieces what its text is in")
    options = {
        "text_field": args.text_field,
        "vocab_size": None if args.tokenizer else args.vocab_size,
        **({"caseops": args.caseops} if args.caseops else {}),
        "val_docs": args.val_docs,
        "shard_tokens": args.shard_tokens,
        "inputs": [{"name": p.name, "bytes": p.stat().st_size} for p in files],
        "val_inputs": [{"name": p.name, "bytes": p.stat().st_size} for p in val_files or []],
    }
    plan = Build(
        out=args.out,
        texts=lambda: read_documents(files, args.text_field, args.strict),
        val_texts=(lambda: read_documents(val_files, args.text_field, args.strict)) if val_files else None,
        val_docs=args.val_docs or 0,
        vocab_size=args.vocab_size,
        tokenizer=args.tokenizer,
        caseops=args.caseops,
        shard_tokens=args.shard_tokens,
        workers=args.workers,
        record={"command": "text", "options": options},
    )
    print_summary(args.out, build(plan))


# -----------------------------------------------------------------------------
# COMMAND offline
# -----------------------------------------------------------------------------


def library_sources() -> Iterator[str]:
    """The text of every module of the standard library that people wrote to be read, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        # config-* and _sysconfigdata* describe how this interpreter was built: paths and flags, not text.
        if OFFLINE_SKIP_DIRS.isdisjoint(parts) and not parts[0].startswith(("config-", "_sysconfigdata")):
            with contextlib.suppress(UnicodeDecodeError):
                yield path.read_text(encoding="utf-8")


def offline_documents(limit: int) -> list[str]:
    """Documents of about OFFLINE_DOC_BYTES from the standard library's sources and help topics, `limit` bytes at most.

    Modules are cut at blank lines, so that a document is a run of whole paragraphs. Sorting by hash is the shuffle: it
    interleaves modules, repeats on every run, and makes any first documents, validation among them, the same mix.
    """
    from pydoc_data.topics import topics

    documents = []
    for text in itertools.chain(library_sources(), (topics[name] for name in sorted(topics))):
        paragraphs: list[str] = []
        for paragraph in re.split(r"\n\s*\n(?=.)", text.strip()):
            paragraphs.append(paragraph)
            if sum(map(len, paragraphs)) >= OFFLINE_DOC_BYTES:
                documents.append("\n\n".join(paragraphs))
                paragraphs = []
        documents.append("\n\n".join(paragraphs))
    documents.sort(key=lambda text: hashlib.sha256(utf8(text)).digest())
    ends = itertools.accumulate(len(utf8(text)) for text in documents)
    return [text for text, end in zip(documents, ends, strict=True) if end <= limit]


def command_offline(args: argparse.Namespace) -> None:
    """The text this Python installation carries."""
    record = {"command": "offline", "options": {"max_bytes": args.max_bytes, "val_docs": args.val_docs,
                                                "vocab_size": args.vocab_size}}  # fmt: skip
    if os.path.lexists(args.out):
        manifest = intact_manifest(args.out, record)
        say(f"{args.out} is already there and intact")
    else:
        manifest = build(
            Build(
                out=args.out,
                texts=lambda: iter(offline_documents(args.max_bytes)),
                val_texts=None,
                val_docs=args.val_docs,
                vocab_size=args.vocab_size,
                tokenizer=None,
                caseops=None,
                shard_tokens=args.shard_tokens,
                workers=args.workers,
                record=record,
            )
        )
    print_summary(args.out, manifest)


def intact_manifest(out: Path, record: dict) -> dict:
    """The manifest of an earlier run with the same options; raises UserError unless every file is as it says."""
    advice = f"remove {out} or name another --out"
    try:
        if (out / "manifest.json").is_fifo():
            raise OSError  # to open it is to wait
        manifest = json.loads((out / "manifest.json").read_text("utf-8"))
        files = [(f["name"], f["sha256"]) for split in manifest["splits"].values() for f in split["files"]]
        files.append((manifest["tokenizer"]["file"], manifest["tokenizer"]["sha256"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{out} exists without a manifest of a data set; {advice}") from None
    documents = manifest.get("validation_documents")
    if not isinstance(documents, dict) or not {"file", "sha256"} <= documents.keys():
        raise UserError(f"{out} was prepared by an earlier version, without {VAL_DOCUMENTS_FILE}; {advice}")
    files.append((documents["file"], documents["sha256"]))
    if any(manifest.get(key) != value for key, value in record.items()):
        raise UserError(f"{out} was prepared by another command or with other options; {advice}")
    for name, sha256 in files:
        path = out / name
        if not path.is_file() or sha256_file(path) != sha256:
            raise UserError(f"{path} is missing or damaged; {advice}")
    return manifest


# -----------------------------------------------------------------------------
# COMMAND fineweb
# -----------------------------------------------------------------------------


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository with what the hub says about it."""

    path: str  # in the repository
    url: str
    size: int  # bytes
    digest: str  # sha256 of an LFS file (64 hex digits) or git's sha1 of a small one (40)
    target: Path

    def hasher(self):
        """Git hashes a file together with its kind and size; LFS hashes the bytes alone."""
        if len(self.digest) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


class Hub:
    """The dataset repository at one commit. Uses nothing but the files' own addresses, which every mirror serves."""

    def __init__(self, repo_id: str, prefix: str, revision: str):
        require("huggingface_hub", "fineweb")
        # Imported here: it reads HF_ENDPOINT and the like when it is imported, and the other commands need none of it.
        try:
            from huggingface_hub import constants, errors, file_download, utils
        except ValueError as err:
            raise UserError(f"a setting of the hub (HF_...) is wrong: {one_line(err)}") from None

        # Its warnings about each retry would surround the one line that says what finally went wrong.
        utils.logging.set_verbosity_error()
        self.endpoint, self.timeout = constants.ENDPOINT, constants.HF_HUB_DOWNLOAD_TIMEOUT
        self.errors, self.files, self.utils = errors, file_download, utils
        self.repo_id, self.prefix, self.revision, self.reached = repo_id, prefix.strip("/"), revision, False

    def path(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def find(self, name: str, target: Path) -> RemoteFile | None:
        """The file `name` below the prefix, or None where the repository has no such file.

        Raises UserError where the repository cannot be reached or does not say the file's size and hash.
        """
        path, errors = self.path(name), self.errors
        try:
            url = self.files.hf_hub_url(self.repo_id, path, repo_type="dataset", revision=self.revision)
            # The first request fails at once without a network; later ones wait out a hiccup.
            meta = self.files.get_hf_file_metadata(url, retry_on_errors=self.reached)
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            raise UserError(
                f"no dataset repository {self.repo_id} (revision {self.revision}) that you may read at "
                f"{self.endpoint}; check --repo-id, or HF_TOKEN if it is private"
            ) from None
        except errors.HfHubHTTPError as err:
            if err.response.status_code == 404:
                return None
            raise UserError(f"{path}: {one_line(err)}") from None
        except (errors.HTTPError, ValueError, OSError) as err:  # ValueError: a wrong name, endpoint, proxy or token
            raise UserError(f"cannot reach {self.repo_id} at {self.endpoint}: {one_line(err)}") from None
        self.reached = True
        # All files come from the commit that the first one came from, even if somebody pushes meanwhile.
        self.revision = meta.commit_hash or self.revision
        if meta.size is None or not re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", meta.etag or ""):
            raise UserError(f"{url} comes without size and hash, so a download could not be checked")
        return RemoteFile(path, url, meta.size, meta.etag, target)

    def need(self, name: str, target: Path) -> RemoteFile:
        """As `find`; a file that is not there raises UserError."""
        file = self.find(name, target)
        if file is None:
            raise UserError(f"{self.repo_id} has no {self.path(name)} (revision {self.revision})")
        return file

    def fetch(self, file: RemoteFile, progress: Progress) -> None:
        """Puts the file under its final name, complete and checked. One that is there already is checked, not trusted.

        huggingface_hub's own download deletes the partial file when it fails. This one keeps it beside the final name,
        and the next run asks for the rest with a Range request. Raises UserError.
        """
        if file.target.is_file() and matches(file, file.target):
            progress.update(file.size)
            return
        partial = file.target.with_name(f".{file.target.name}.{file.digest[:16]}.partial")
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        try:
            descriptor, _ = claim(partial, lambda: os.open(partial, flags, 0o666), f"fetching {file.target}")
            with os.fdopen(descriptor, "ab") as sink:
                self.transfer(file, sink, progress)
                sink.flush()
                os.fsync(sink.fileno())
                if not matches(file, partial):
                    partial.unlink()
                    wrong = "arrived with the wrong size or hash and was deleted; run the command again"
                    raise UserError(f"{file.path} {wrong}")
                partial.replace(file.target)
        except (self.errors.HTTPError, OSError) as err:
            raise UserError(f"{file.path}: {one_line(err)}; run the command again to go on from here") from None
        for stale in file.target.parent.glob(f".{file.target.name}.*.partial"):  # of a version published before
            stale.unlink()

    def transfer(self, file: RemoteFile, sink: io.BufferedWriter, progress: Progress) -> None:
        """Appends what `sink` lacks of the file, over as many connections as it takes while they bring something."""
        have = sink.tell()
        progress.update(have)
        failures = 0
        while have < file.size:
            before = have
            try:
                for data in self.stream(file, have):
                    sink.write(data)
                    have += len(data)
                    progress.update(len(data))
                return
            except self.errors.HTTPError as err:
                refused = isinstance(err, self.errors.HfHubHTTPError) and err.response.status_code < 500
                failures = 1 if have > before else failures + 1
                if refused or failures == TRANSFER_TRIES:
                    raise
                time.sleep(1)

    def stream(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        """The file from byte `start` on, in the pieces that the network delivers: none is lost if it breaks."""
        headers = {**self.utils.build_hf_headers(), "Accept-Encoding": "identity"}  # ranges are of the file itself
        if start:
            headers["Range"] = f"bytes={start}-"
        # No retries in there: what goes wrong while the body is read is for `transfer` to take up again.
        with self.utils.http_stream_backoff(
            "GET", file.url, headers=headers, timeout=self.timeout, retry_on_exceptions=(), retry_on_status_codes=429
        ) as response:
            self.utils.hf_raise_for_status(response)
            skip = start if response.status_code == 200 else 0  # the server sends all of it, range or not
            for data in response.iter_bytes():
                yield data[skip:]
                skip = max(0, skip - len(data))


def matches(file: RemoteFile, path: Path) -> bool:
    """Whether the file on disk has the size and the hash that the hub states."""
    if path.stat().st_size != file.size:
        return False
    digest = file.hasher()
    with path.open("rb") as source:
        while data := source.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest() == file.digest


def published_entry(manifest: object, section: str, name: str | None) -> dict:
    """The entry `name` of a section of the repository's manifest, or {}: publishers write lists, maps, or nothing."""
    entries = manifest.get(section) if isinstance(manifest, dict) else None
    if isinstance(entries, dict):
        entries = [{"name": key, **value} for key, value in entries.items() if isinstance(value, dict)]
    if not isinstance(entries, list) or name is None:
        return {}
    return next((e for e in entries if isinstance(e, dict) and e.get("name") == name), {})


def find_tokenizer(hub: Hub, manifest: object, dataset: str, variant: str, folder: Path) -> RemoteFile:
    """The variant's tokenizer: the one that the manifest names, or else the one whose name follows from the variant's.

    sp1024 -> fineweb_1024_bpe.model, sp8192_caps -> fineweb_8192_bpe_caps.model. Raises UserError with what was tried.
    """
    named = published_entry(manifest, "datasets", dataset).get("tokenizer_name")
    entry = published_entry(manifest, "tokenizers", named)
    names = [entry[key] for key in ("model_path", "path") if str(entry.get(key, "")).endswith(".model")]
    if parts := re.fullmatch(r"[a-z]*(\d+)(_\w+)?", variant):
        names += [f"tokenizers/fineweb_{parts[1]}_bpe{suffix}.model" for suffix in (parts[2] or "", "")]
    for name in dict.fromkeys(names):
        if file := hub.find(name, folder / Path(name).name):
            return file
    tried = ", ".join(map(hub.path, dict.fromkeys(names))) or "a name in the manifest or a size in the variant's"
    raise UserError(f"{hub.repo_id} has no tokenizer for the variant {variant}; looked for {tried}")


def find_shards(hub: Hub, manifest: object, dataset: str, train_shards: int, folder: Path) -> list[RemoteFile]:
    """The first `train_shards` training shards, all validation shards and the sidecars of their bytes, if any.

    Raises UserError where a shard is missing.
    """
    stats = published_entry(manifest, "datasets", dataset).get("stats")
    stats = stats if isinstance(stats, dict) else {}
    published = stats.get("files_train")
    if isinstance(published, int) and train_shards > published:
        raise UserError(f"{dataset} has {published} training shards; --train-shards {train_shards} asks for more")

    def shard(split: str, i: int) -> tuple[str, Path]:
        name = f"fineweb_{split}_{i:06d}.bin"
        return f"datasets/{dataset}/{name}", folder / name

    def all_there(split: str, start: int) -> Iterator[RemoteFile]:
        return itertools.takewhile(bool, (hub.find(*shard(split, i)) for i in itertools.count(start)))

    files = [hub.need(*shard("val", 0))]
    if isinstance(stats.get("files_val"), int):
        files += [hub.need(*shard("val", i)) for i in range(1, stats["files_val"])]
    else:  # without a number, the validation split goes on until a shard is missing
        files += all_there("val", 1)
    files += all_there("val_bytes", 0)  # variants in CaseOps: the bytes of each token
    return files + [hub.need(*shard("train", i)) for i in range(train_shards)]


# Variants of text that cannot be had back, and so neither its bytes.
FOLDED_VARIANT = re.compile("casefold", re.IGNORECASE)


def command_fineweb(args: argparse.Namespace) -> None:
    """The challenge's published shards."""
    dataset = f"fineweb10B_{args.variant}"
    if Path(dataset).name != dataset:
        raise UserError(f"--variant {args.variant} is not a name")
    if FOLDED_VARIANT.search(args.variant):
        lost = "whose capitals are lost, so its bytes cannot be counted"
        raise UserError(f"the variant {args.variant} is of folded text, {lost}; take another, such as sp1024")
    require("torch", "checking shards")
    folder, tokenizer_folder = args.out / "datasets" / dataset, args.out / "tokenizers"
    for path in (folder, tokenizer_folder):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise UserError(f"cannot write {path}: {err.strerror}") from None
    hub = Hub(args.repo_id, args.remote_prefix, args.revision)
    manifest = None
    if manifest_file := hub.find("manifest.json", folder / "manifest.json"):
        with Progress("manifest", manifest_file.size, "B") as progress:
            hub.fetch(manifest_file, progress)
        with contextlib.suppress(ValueError, RecursionError):  # a manifest that is not JSON helps as little as none
            manifest = json.loads(manifest_file.target.read_bytes())
    tokenizer = find_tokenizer(hub, manifest, dataset, args.variant, tokenizer_folder)
    with Progress("tokenizer", tokenizer.size, "B") as progress:
        hub.fetch(tokenizer, progress)
    check_tokenizer(tokenizer.target)
    files = find_shards(hub, manifest, dataset, args.train_shards, folder)
    total = sum(file.size for file in files)
    say(f"{args.repo_id} at {hub.revision}: {len(files)} shards, {total:,} bytes")
    with Progress(f"fetch {args.variant}", total, "B") as progress:
        for file in files:
            hub.fetch(file, progress)
    vocab_size = load_tokenizer(tokenizer.target).vocab_size()
    with trainer() as t:
        hp = t.Hyperparameters(data_path=str(folder), tokenizer_path=str(tokenizer.target), vocab_size=vocab_size)
        for split in ("train", "val"):
            here = {path.name for path in t.find_shards(hp, split)}
            paths = [file.target for file in files if file.target.name in here]
            tokens = sum(len(t.read_shard(path)) for path in paths)
            say(f"{split}: {tokens:,} tokens in {len(paths)} shards, fingerprint {t.data_fingerprint(paths)[:16]}")
        val = t.load_validation(hp)  # every id, and the bytes of each document where a sidecar counts them too
        say(f"val: {int(val.bytes.sum()):,} bytes of text" + (f" before {val.transform}" if val.transform else ""))
    print_train_command(folder, tokenizer.target, vocab_size)


# -----------------------------------------------------------------------------
# MAIN
# -----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """A wrong command line is one line too, without the usage text around it."""
        raise UserError(f"{message}; see {self.prog} --help")


def positive(text: str, limit: int | None = None) -> int:
    if not text.isdecimal() or len(text) > 18 or int(text) < 1:  # at thousands of digits, int() raises
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number above 0 of at most 18 digits")
    if limit is not None and int(text) > limit:
        raise argparse.ArgumentTypeError(f"{text} is above {limit:,}")
    return int(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; raises UserError where it is wrong."""
    parser = Parser(prog="data/prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    vocab = functools.partial(positive, limit=MAX_VOCAB_SIZE)
    shard = functools.partial(positive, limit=MAX_SHARD_TOKENS)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    text = commands.add_parser("text", help="your own documents", allow_abbrev=False)
    text.add_argument("inputs", nargs="+", metavar="INPUT", help=f"{', '.join(INPUT_SUFFIXES)} or a folder of them")
    split = text.add_mutually_exclusive_group(required=True)
    split.add_argument("--val-docs", type=positive, metavar="N", help="the first N documents are validation")
    split.add_argument("--val", nargs="+", metavar="INPUT", help="validation documents from files of their own")
    vocabulary = text.add_mutually_exclusive_group()
    vocabulary.add_argument("--vocab-size", type=vocab, default=1024, help="pieces to train (%(default)s)")
    vocabulary.add_argument("--tokenizer", type=Path, metavar="FILE", help="a SentencePiece .model to use instead")
    text.add_argument("--caseops", choices=caseops.PLACES, help="capitals as operators after, before or one piece with "
                      "the space (default: plain text)")  # fmt: skip
    text.add_argument("--strict", action="store_true", help="end at the first row without a text, leave none out")
    text.add_argument("--text-field", default="text", help="field of a record that holds its text (%(default)s)")
    text.add_argument("--out", type=Path, required=True, help="folder to create")

    offline = commands.add_parser("offline", help="text of this Python installation", allow_abbrev=False)
    offline.add_argument("--out", type=Path, default=DATA_DIR / "datasets" / "offline", help="folder (%(default)s)")
    offline.add_argument("--vocab-size", type=vocab, default=1024, help="pieces to train (%(default)s)")
    offline.add_argument("--val-docs", type=positive, default=OFFLINE_VAL_DOCS, help="validation (%(default)s)")
    offline.add_argument("--max-bytes", type=positive, default=OFFLINE_BYTES, help="text to use (%(default)s)")
    for command in (text, offline):
        command.add_argument("--shard-tokens", type=shard, default=100_000_000, help="tokens a shard (%(default)s)")
        command.add_argument("--workers", type=positive, default=cpus, help="processes that tokenize (%(default)s)")

    fineweb = commands.add_parser("fineweb", help="the challenge's published shards", allow_abbrev=False)
    env = os.environ.get
    fineweb.add_argument("--variant", default="sp1024", help="shards in datasets/fineweb10B_<variant> (%(default)s)")
    fineweb.add_argument("--train-shards", type=positive, default=80, help="how many to fetch (%(default)s)")
    fineweb.add_argument("--out", type=Path, default=DATA_DIR, help="gets datasets/ and tokenizers/ (%(default)s)")
    fineweb.add_argument("--repo-id", default=env("MATCHED_FINEWEB_REPO_ID") or "willdepueoai/parameter-golf",
                         help="dataset repository; MATCHED_FINEWEB_REPO_ID (%(default)s)")  # fmt: skip
    fineweb.add_argument("--remote-prefix", default=env("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets"),
                         help="its folder; MATCHED_FINEWEB_REMOTE_ROOT_PREFIX (%(default)s)")  # fmt: skip
    fineweb.add_argument("--revision", default="main", help="branch, tag or commit (%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns the exit code."""
    commands = {"text": command_text, "offline": command_offline, "fineweb": command_fineweb}
    try:
        args = parse(argv)
        commands[args.command](args)
    except UserError as err:
        return leave(2, f"error: {err}")
    except OSError as err:  # a file that went away, a lost disk: nothing a traceback would explain better
        return leave(2, f"error: {one_line(err)}")
    except MemoryError:
        return leave(2, "error: not enough memory for this input; is one of its lines or files very large?")
    except KeyboardInterrupt:
        return leave(130, "interrupted: nothing incomplete is under a final name")
    return 0


def leave(code: int, message: str) -> int:
    """The exit code, after its one line: a path may hold a newline."""
    with contextlib.suppress(OSError):
        print(re.sub(r"[\x00-\x1f\x7f]", lambda found: ascii(found[0])[1:-1], message), file=sys.stderr, flush=True)
    return code


def prepare_streams() -> None:
    """Makes stdin, stdout and stderr usable whatever the caller did to them.

    A closed one leaves its number to the next file that is opened, which would get what is printed. A path that the
    console's encoding lacks is shown with backslashes.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout, sys.stderr = sys.stdout or open(1, "w"), sys.stderr or open(2, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    prepare_streams()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # by nohup, or a shell's &
            signal.signal(number, interrupt)
    sys.unraisablehook = lambda lost: None if INTERRUPTED.is_set() else sys.__unraisablehook__(lost)
    sys.exit(main())
