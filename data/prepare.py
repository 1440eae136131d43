"""Prepares the shards and the tokenizer that train_gpt.py reads.

    python data/prepare.py offline                                       # text of this Python installation, no network
    python data/prepare.py text docs.jsonl.gz --val-docs 500 --out DIR   # your own documents
    python data/prepare.py fineweb --variant sp1024 --train-shards 10    # the challenge's published shards

A shard is 256 little-endian int32 (20240520, 1, number of tokens, 0 ...) followed by that many uint16 tokens; every
document starts with BOS (id 1). Problems the user can fix end in one line `error: ...` on stderr and exit code 2.
"""

import argparse
import contextlib
import functools
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import sys
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece as spm
from tqdm import tqdm

# -----------------------------------------------------------------------------
# CONSTANTS, ERRORS, PROGRESS
# -----------------------------------------------------------------------------

PREPARE_VERSION = 1  # goes into the manifest; raise it when the same inputs would give other bytes
DATA_DIR = Path(__file__).resolve().parent

SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
BOS_ID = 1
MAX_VOCAB_SIZE = 1 << 16  # tokens are uint16

CHUNK_BYTES = 1 << 20  # text handed to a worker at a time: large against its start-up cost, small against a bar's step
COUNT_TOKENS = 1 << 22  # tokens the byte counter sees at a time, so that a large shard is not held in memory as int64
READ_BYTES = 1 << 20
TRANSFER_TRIES = 5  # connections in a row that may bring nothing before a download gives up
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
    if importlib.util.find_spec("torch") is None:
        raise UserError("torch is not installed, and checking shards needs it: pip install -r requirements.txt")
    if str(DATA_DIR.parent) not in sys.path:
        sys.path.insert(0, str(DATA_DIR.parent))
    import train_gpt

    try:
        yield train_gpt
    except train_gpt.UserError as err:
        raise UserError(str(err)) from None


class Progress:
    """A tqdm bar on a terminal, a plain line every PLAIN_LINE_SECONDS otherwise."""

    def __init__(self, what: str, total: int | None, unit: str):
        """`total` in `unit`s ("B" for bytes, "doc" for documents); None where it is not known."""
        self.what, self.total, self.unit = what, total, unit
        self.done, self.next_line = 0, time.monotonic() + PLAIN_LINE_SECONDS
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=what, unit=unit, unit_scale=True, file=sys.stderr) if terminal else None

    def update(self, n: int = 1) -> None:
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        elif time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + PLAIN_LINE_SECONDS
            share = f" ({self.done / self.total:.0%})" if self.total else ""
            print(f"{self.what}: {self.done:,} {self.unit}{share}", flush=True)

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


def input_files(inputs: list[str]) -> list[Path]:
    """Every input file in order; a folder stands for the files below it that can be read, sorted by path.

    Raises UserError where an input is missing, is of an unknown kind, or is a folder without documents.
    """
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.name.endswith(INPUT_SUFFIXES) and p.is_file())
            if not found:
                raise UserError(f"no {', '.join(INPUT_SUFFIXES)} file in the folder {path}")
            files += found
        elif not path.is_file():
            raise UserError(f"input {path} does not exist")
        elif not path.name.endswith(INPUT_SUFFIXES):
            raise UserError(f"cannot read {path}: inputs are {', '.join(INPUT_SUFFIXES)} files or folders of them")
        else:
            files.append(path)
    if any(p.suffix == ".parquet" for p in files) and importlib.util.find_spec("pyarrow") is None:
        raise UserError(".parquet inputs need pyarrow: pip install pyarrow")
    return files


def read_documents(files: list[Path], text_field: str) -> Iterator[str]:
    """The text of every document, in order. Raises UserError with file and line (or row) where one cannot be read."""
    for path in files:
        try:
            if path.suffix == ".parquet":
                yield from parquet_documents(path, text_field)
            elif path.suffix == ".txt":
                yield path.read_text(encoding="utf-8")
            else:
                yield from jsonl_documents(path, text_field)
        except UnicodeDecodeError as err:
            raise UserError(f"{path} is not UTF-8: {err}") from None
        except (OSError, EOFError, zlib.error) as err:
            raise UserError(f"cannot read {path}: {err}") from None


def jsonl_documents(path: Path, text_field: str) -> Iterator[str]:
    """One document per line of a .jsonl(.gz/.zst) file; blank lines are nothing."""
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
                record = json.loads(line)
            except ValueError as err:  # also bytes that are not UTF-8
                raise UserError(f"{path}:{number}: not a line of JSON ({err})") from None
            yield checked_text(record, text_field, f"{path}:{number}")


def checked_text(record: object, text_field: str, where: str) -> str:
    """record[text_field]; raises UserError naming `where` unless the record is an object with such a string."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON object with a {text_field!r} field was expected")
    if text_field not in record:
        has = ", ".join(map(repr, record)) or "none"
        raise UserError(f"{where}: no text field {text_field!r} (fields: {has}); name it with --text-field")
    if not isinstance(record[text_field], str):
        raise UserError(f"{where}: the field {text_field!r} is not a string; name another with --text-field")
    return record[text_field]


def zst_lines(path: Path) -> Iterator[bytes]:
    """Lines of a .zst file of one or more frames. Raises OSError where it is damaged or ends inside a frame.

    zstandard's own stream reader takes a truncated file for a complete one; its decompression object knows better.
    """
    import zstandard

    rest, frame = b"", None
    with path.open("rb") as source:
        while data := source.read(READ_BYTES):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    rest += frame.decompress(data)
                except zstandard.ZstdError as err:
                    raise OSError(str(err)) from None
                data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
            *lines, rest = rest.split(b"\n")
            yield from lines
    if frame is not None:
        raise OSError("the file ends in the middle of its compressed data")
    yield rest


def parquet_documents(path: Path, text_field: str) -> Iterator[str]:
    """One document per row, a row group's batch at a time."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
        if text_field not in table.schema_arrow.names:
            has = ", ".join(map(repr, table.schema_arrow.names))
            raise UserError(f"{path}: no text field {text_field!r} (columns: {has}); name it with --text-field")
        row = 0
        for batch in table.iter_batches(columns=[text_field]):
            for record in batch.to_pylist():
                row += 1
                yield checked_text(record, text_field, f"{path}: row {row}")
    except pyarrow.ArrowInvalid as err:
        raise UserError(f"cannot read {path}: {err}") from None


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


def split_documents(train: Spool, val: Spool, texts: Iterator[str], val_texts: Iterator[str] | None, val_docs: int,
                    normalize: Callable[[str], str]) -> dict[str, int]:  # fmt: skip
    """Spools every document into its split and returns how many were dropped, and why.

    With `val_texts` those are the validation split, all of them; otherwise the first `val_docs` of `texts` are. A
    document of `texts` that was seen before, in either split, is dropped: no document is in both.
    Raises UserError where a split would be empty.
    """
    seen: set[bytes] = set()
    dropped = {"duplicates": 0, "empty": 0}
    with Progress("read", None, "doc") as progress:
        for is_val, text in itertools.chain(((True, t) for t in val_texts or ()), ((False, t) for t in texts)):
            progress.update()
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


def train_tokenizer(spool: Spool, vocab_size: int, model_path: Path) -> None:
    """Trains the challenge's SentencePiece BPE on the spooled documents and writes the model.

    Raises UserError where the vocabulary cannot hold the byte pieces and the characters of the text.
    """
    started, size = time.monotonic(), 0
    texts = []
    for text in spooled_texts(spool.path, 0, spool.documents):
        # A whole document is one sentence: cut at newlines, the words after them would be counted without the `▁`
        # that they have once the normaliser has folded newlines into spaces.
        texts.append(text)
        size += len(text)
        if size >= TOKENIZER_TEXT_BYTES:
            break
    print(f"tokenizer: training on {len(texts):,} documents, {size:,} characters", flush=True)
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, split_digits=True, character_coverage=0.999, normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False, hard_vocab_limit=False, pad_id=0, bos_id=BOS_ID, eos_id=2, unk_id=3,
            max_sentence_length=1 << 30,  # the default leaves out every document above 4,192 bytes
            num_threads=1, minloglevel=2,
        )  # fmt: skip
    except (RuntimeError, OSError) as err:
        reason = str(err).strip().splitlines()[-1]
        raise UserError(f"SentencePiece cannot train {vocab_size} pieces on this text: {reason}") from None
    model_path.write_bytes(model.getvalue())
    got = load_tokenizer(model_path).vocab_size()
    print(f"tokenizer: {got} pieces in {time.monotonic() - started:.1f} s", flush=True)
    if got != vocab_size:
        print(f"tokenizer: the text gives {got} pieces instead of {vocab_size}; train with VOCAB_SIZE={got}")


@functools.lru_cache(maxsize=1)
def load_tokenizer(path: Path) -> spm.SentencePieceProcessor:
    """The tokenizer, loaded once per process. Raises UserError where the file is none."""
    try:
        return spm.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, TypeError):
        raise UserError(f"{path} is not a SentencePiece model") from None


def check_tokenizer(path: Path) -> None:
    """Raises UserError unless shards written with this tokenizer can be trained on and their bytes counted."""
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size() > MAX_VOCAB_SIZE:
        raise UserError(f"{path} has {tokenizer.vocab_size()} pieces; a shard's uint16 tokens hold {MAX_VOCAB_SIZE}")
    if tokenizer.bos_id() != BOS_ID:
        raise UserError(f"{path} has BOS id {tokenizer.bos_id()}; documents start with id {BOS_ID}")
    with trainer() as t:
        t.TokenBytes(path, tokenizer.vocab_size())


# -----------------------------------------------------------------------------
# TOKENIZING AND WRITING SHARDS
# -----------------------------------------------------------------------------


class ShardWriter:
    """Writes a split's token stream as shards of exactly `shard_tokens` tokens (the last one may be shorter)."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.paths: list[Path] = []
        self.file: io.BufferedWriter | None = None
        self.in_shard = 0

    def write(self, tokens: np.ndarray) -> None:
        """Appends uint16 tokens of shape (T,)."""
        while len(tokens):
            if self.file is None:
                self.paths.append(self.folder / f"fineweb_{self.split}_{len(self.paths):06d}.bin")
                self.file = self.paths[-1].open("wb")
                self.file.write(bytes(4 * HEADER_INTS))  # the number of tokens is known when the shard is finished
                self.in_shard = 0
            part, tokens = np.split(tokens, [self.shard_tokens - self.in_shard])
            self.file.write(part.astype("<u2").tobytes())
            self.in_shard += len(part)
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


def encode_chunk(tokenizer_path: Path, spool_path: Path, offset: int, documents: int) -> np.ndarray:
    """The tokens of a spool's chunk, BOS before each document: (T,) uint16. Runs in a worker."""
    tokenizer = load_tokenizer(tokenizer_path)
    ids: list[int] = []
    for text in spooled_texts(spool_path, offset, documents):
        ids.append(BOS_ID)
        ids += tokenizer.encode(text)
    return np.array(ids, dtype=np.uint16)


def worker_signals() -> None:
    """Ctrl-C reaches the whole process group; only the parent answers it, so that one process cleans up and speaks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def write_shards(spool: Spool, split: str, tokenizer_path: Path, shard_tokens: int, workers: int) -> list[Path]:
    """Tokenizes a spool in parallel, in order, and returns the paths of its shards."""
    writer = ShardWriter(spool.path.parent, split, shard_tokens)
    workers = min(workers, len(spool.chunks))
    encode = functools.partial(encode_chunk, tokenizer_path, spool.path)
    offsets, counts = zip(*spool.chunks, strict=True)
    with contextlib.ExitStack() as stack:
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
    return writer.paths


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
            total += int(token_bytes.count(part).sum())
            last = part[-1:]
    return total


def decoded_bytes(shards: list[np.ndarray], tokenizer: spm.SentencePieceProcessor) -> int:
    """Bytes of a split's text as SentencePiece itself decodes it, document by document."""
    tokens = np.concatenate(shards)
    documents = np.split(tokens, np.flatnonzero(tokens == BOS_ID))
    return sum(len(tokenizer.decode(document[1:].tolist()).encode("utf-8")) for document in documents)


def describe_split(t, spool: Spool, paths: list[Path], token_bytes) -> dict:
    """A split's entry in the manifest, from its shards as train_gpt reads them back.

    Raises UserError where they do not hold what was to be written: a disk that lies, or a defect here.
    """
    shards = [t.read_shard(path) for path in paths]
    documents = sum(int(np.count_nonzero(shard == BOS_ID)) for shard in shards)
    if documents != spool.documents:
        raise UserError(f"{paths[0].parent} holds {documents} documents instead of {spool.documents}; check the disk")
    files = [
        {"name": p.name, "tokens": len(s), "bytes": p.stat().st_size, "sha256": sha256_file(p)}
        for p, s in zip(paths, shards, strict=True)
    ]
    return {
        "documents": documents,
        "tokens": sum(len(shard) for shard in shards),
        "raw_bytes": spool.raw_bytes,
        "normalised_bytes": count_bytes(shards, token_bytes),
        "fingerprint": t.data_fingerprint(paths),
        "files": files,
    }


def describe(tokenizer_path: Path, train: Spool, val: Spool, paths: dict[str, list[Path]]) -> dict:
    """The manifest's part about what was written. Raises UserError where the byte counter and the text disagree."""
    tokenizer = load_tokenizer(tokenizer_path)
    with trainer() as t:
        token_bytes = t.TokenBytes(tokenizer_path, tokenizer.vocab_size())
        splits = {
            "train": describe_split(t, train, paths["train"], token_bytes),
            "val": describe_split(t, val, paths["val"], token_bytes),
        }
        decoded = decoded_bytes([t.read_shard(path) for path in paths["val"]], tokenizer)
    if decoded != splits["val"]["normalised_bytes"]:
        raise UserError(
            f"{tokenizer_path.name}: the validation text decodes to {decoded} bytes and its tokens count "
            f"{splits['val']['normalised_bytes']}, so bits per byte would be wrong; use another tokenizer"
        )
    return {
        "tokenizer": {
            "file": tokenizer_path.name,
            "sha256": sha256_file(tokenizer_path),
            "vocab_size": tokenizer.vocab_size(),
        },
        "splits": splits,
    }


# -----------------------------------------------------------------------------
# BUILDING A DATA SET
# -----------------------------------------------------------------------------


@contextlib.contextmanager
def building(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends well and vanishes when it does not."""
    if os.path.lexists(out):
        raise UserError(f"{out} exists already and is not overwritten; remove it or name another --out")
    folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        folder.mkdir(parents=True)
    except OSError as err:
        raise UserError(f"cannot write {out}: {err.strerror}") from None
    try:
        yield folder
        for path in folder.iterdir():
            fsync(path)
        fsync(folder)
        try:
            folder.rename(out)
        except OSError as err:
            raise UserError(f"cannot write {out}: {err.strerror}") from None
        fsync(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone already where the block ended well


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
    texts: Callable[[], Iterator[str]]
    val_texts: Callable[[], Iterator[str]] | None
    val_docs: int  # 0 with val_texts
    vocab_size: int
    tokenizer: Path | None  # trained on the training split where None
    shard_tokens: int
    workers: int
    record: dict  # command and options, for the manifest


def build(plan: Build) -> dict:
    """Builds the folder `plan.out` and returns its manifest. Raises UserError; then nothing is left behind."""
    with building(plan.out) as folder:
        if plan.tokenizer is not None:
            check_tokenizer(plan.tokenizer)
            normalize = load_tokenizer(plan.tokenizer).normalize
        else:
            normalize = spm.SentencePieceNormalizer(rule_name="nmt_nfkc").normalize
        train, val = Spool(folder / "train.spool"), Spool(folder / "val.spool")
        val_texts = plan.val_texts() if plan.val_texts is not None else None
        dropped = split_documents(train, val, plan.texts(), val_texts, plan.val_docs, normalize)
        if plan.tokenizer is not None:
            model_path = folder / f"{plan.tokenizer.stem}.model"  # the ending by which train_gpt.py finds it
            shutil.copyfile(plan.tokenizer, model_path)
        else:
            model_path = folder / f"bpe_{plan.vocab_size}.model"
            train_tokenizer(train, plan.vocab_size, model_path)
            check_tokenizer(model_path)
        paths = {
            split: write_shards(spool, split, model_path, plan.shard_tokens, plan.workers)
            for split, spool in (("train", train), ("val", val))
        }
        manifest = {
            "prepare_version": PREPARE_VERSION,
            "sentencepiece": spm.__version__,
            **plan.record,
            "dropped": dropped,
            **describe(model_path, train, val, paths),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")
        train.path.unlink()
        val.path.unlink()
    return manifest


def print_summary(out: Path, manifest: dict) -> None:
    """What the data set holds, and the command that trains on it."""
    for split, entry in manifest["splits"].items():
        print(
            f"{split}: {entry['documents']:,} documents, {entry['tokens']:,} tokens in {len(entry['files'])} shards, "
            f"{entry['raw_bytes']:,} raw bytes, {entry['normalised_bytes']:,} normalised bytes, "
            f"fingerprint {entry['fingerprint'][:16]}"
        )
    print(f"dropped: {manifest['dropped']['duplicates']} duplicates, {manifest['dropped']['empty']} empty documents")
    print(f"tokenizer: {manifest['tokenizer']['file']} with {manifest['tokenizer']['vocab_size']} pieces")
    print_train_command(out, None, manifest["tokenizer"]["vocab_size"])


def print_train_command(data: Path, tokenizer: Path | None, vocab_size: int) -> None:
    """`tokenizer` is None where it lies beside the shards, where train_gpt.py finds it alone."""
    words = [f"DATA_PATH={shlex.quote(shown(data))}"]
    words += [f"TOKENIZER_PATH={shlex.quote(shown(tokenizer))}"] if tokenizer is not None else []
    print(f"train with:\n  {' '.join(words)} VOCAB_SIZE={vocab_size} python train_gpt.py")


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
    options = {
        "text_field": args.text_field,
        "vocab_size": None if args.tokenizer else args.vocab_size,
        "val_docs": args.val_docs,
        "shard_tokens": args.shard_tokens,
        "inputs": [{"name": p.name, "bytes": p.stat().st_size} for p in files],
        "val_inputs": [{"name": p.name, "bytes": p.stat().st_size} for p in val_files or []],
    }
    plan = Build(
        out=args.out,
        texts=lambda: read_documents(files, args.text_field),
        val_texts=(lambda: read_documents(val_files, args.text_field)) if val_files else None,
        val_docs=args.val_docs or 0,
        vocab_size=args.vocab_size,
        tokenizer=args.tokenizer,
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
        print(f"{args.out} is already there and intact")
    else:
        manifest = build(
            Build(
                out=args.out,
                texts=lambda: iter(offline_documents(args.max_bytes)),
                val_texts=None,
                val_docs=args.val_docs,
                vocab_size=args.vocab_size,
                tokenizer=None,
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
        manifest = json.loads((out / "manifest.json").read_text("utf-8"))
        files = [(f["name"], f["sha256"]) for split in manifest["splits"].values() for f in split["files"]]
        files.append((manifest["tokenizer"]["file"], manifest["tokenizer"]["sha256"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{out} exists without a manifest of a data set; {advice}") from None
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
        # Imported here: it reads HF_ENDPOINT and the like when it is imported, and the other commands need none of it.
        from huggingface_hub import constants, errors, file_download, utils

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
        except (errors.HTTPError, errors.HFValidationError, OSError) as err:
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
        try:
            with partial.open("ab") as sink:
                self.transfer(file, sink, progress)
                sink.flush()
                os.fsync(sink.fileno())
        except (self.errors.HTTPError, OSError) as err:
            raise UserError(f"{file.path}: {one_line(err)}; run the command again to go on from here") from None
        if not matches(file, partial):
            partial.unlink()
            raise UserError(f"{file.path} arrived with the wrong size or hash and was deleted; run the command again")
        partial.replace(file.target)
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


def one_line(err: Exception) -> str:
    return " ".join(str(err).split()) or type(err).__name__


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
    """The first `train_shards` training shards and all validation shards. Raises UserError where one is missing."""
    stats = published_entry(manifest, "datasets", dataset).get("stats")
    stats = stats if isinstance(stats, dict) else {}
    published = stats.get("files_train")
    if isinstance(published, int) and train_shards > published:
        raise UserError(f"{dataset} has {published} training shards; --train-shards {train_shards} asks for more")

    def shard(split: str, i: int) -> tuple[str, Path]:
        name = f"fineweb_{split}_{i:06d}.bin"
        return f"datasets/{dataset}/{name}", folder / name

    files = [hub.need(*shard("val", 0))]
    if isinstance(stats.get("files_val"), int):
        files += [hub.need(*shard("val", i)) for i in range(1, stats["files_val"])]
    else:  # without a number, the validation split goes on until a shard is missing
        files += itertools.takewhile(bool, (hub.find(*shard("val", i)) for i in itertools.count(1)))
    return files + [hub.need(*shard("train", i)) for i in range(train_shards)]


def command_fineweb(args: argparse.Namespace) -> None:
    """The challenge's published shards."""
    dataset = f"fineweb10B_{args.variant}"
    if Path(dataset).name != dataset:
        raise UserError(f"--variant {args.variant} is not a name")
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
        with contextlib.suppress(ValueError):  # a manifest that is not JSON helps as little as none
            manifest = json.loads(manifest_file.target.read_bytes())
    tokenizer = find_tokenizer(hub, manifest, dataset, args.variant, tokenizer_folder)
    files = [tokenizer, *find_shards(hub, manifest, dataset, args.train_shards, folder)]
    total = sum(file.size for file in files)
    print(f"{args.repo_id} at {hub.revision}: {len(files)} files, {total:,} bytes", flush=True)
    with Progress(f"fetch {args.variant}", total, "B") as progress:
        for file in files:
            hub.fetch(file, progress)
    vocab_size = load_tokenizer(tokenizer.target).vocab_size()
    with trainer() as t:
        for split in ("train", "val"):
            paths = [file.target for file in files if file.target.name.startswith(f"fineweb_{split}_")]
            tokens = sum(len(t.read_shard(path)) for path in paths)
            print(f"{split}: {tokens:,} tokens in {len(paths)} shards, fingerprint {t.data_fingerprint(paths)[:16]}")
    print_train_command(folder, tokenizer.target, vocab_size)


# -----------------------------------------------------------------------------
# MAIN
# -----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """A wrong command line is one line too, without the usage text around it."""
        raise UserError(f"{message}; see {self.prog} --help")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; raises UserError where it is wrong."""
    parser = Parser(prog="data/prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    text = commands.add_parser("text", help="your own documents", allow_abbrev=False)
    text.add_argument("inputs", nargs="+", metavar="INPUT", help=f"{', '.join(INPUT_SUFFIXES)} or a folder of them")
    split = text.add_mutually_exclusive_group(required=True)
    split.add_argument("--val-docs", type=positive, metavar="N", help="the first N documents are validation")
    split.add_argument("--val", nargs="+", metavar="INPUT", help="validation documents from files of their own")
    vocabulary = text.add_mutually_exclusive_group()
    vocabulary.add_argument("--vocab-size", type=positive, default=1024, help="pieces to train (%(default)s)")
    vocabulary.add_argument("--tokenizer", type=Path, metavar="FILE", help="a SentencePiece .model to use instead")
    text.add_argument("--text-field", default="text", help="field of a record that holds its text (%(default)s)")
    text.add_argument("--out", type=Path, required=True, help="folder to create")

    offline = commands.add_parser("offline", help="text of this Python installation", allow_abbrev=False)
    offline.add_argument("--out", type=Path, default=DATA_DIR / "datasets" / "offline", help="folder (%(default)s)")
    offline.add_argument("--vocab-size", type=positive, default=1024, help="pieces to train (%(default)s)")
    offline.add_argument("--val-docs", type=positive, default=OFFLINE_VAL_DOCS, help="validation (%(default)s)")
    offline.add_argument("--max-bytes", type=positive, default=OFFLINE_BYTES, help="text to use (%(default)s)")
    for command in (text, offline):
        command.add_argument("--shard-tokens", type=positive, default=100_000_000, help="tokens a shard (%(default)s)")
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
        print(f"error: {err}", file=sys.stderr)
        return 2
    except OSError as err:  # a full disk, a file that went away: nothing a traceback would explain better
        print(f"error: {one_line(err)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was left under a final name", file=sys.stderr)
        return 130
    return 0


def interrupt(*_) -> None:
    """A termination request takes the way of Ctrl-C, so that it cleans up as well."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    sys.exit(main())
