"""Whether an artifact's scores keep the rules, judged from outside of the script that made them.

    python records/audit.py runs/ID/artifact.pgolf
    torchrun --standalone --nproc_per_node=8 records/audit.py runs/ID/artifact.pgolf
    python records/audit.py ARTIFACT --script packed.py --log logs/ID.txt --data DATA_PATH

Any copy of the script is run as its user runs it: EVAL_ONLY=1, in a process of its own, on folders that hold copies of
the validation split. Most of them differ from the split behind a chosen point; with SAVE_SCORES=1 the script tells each
pass's nats, the order in which it scored the targets, and log p over the vocabulary at the last one. The four rules are
those that reviewers of the challenge cite (openai/parameter-golf #1017): scores depend on the past alone, come from one
distribution over the whole vocabulary, are fixed before anything learns from them, and count every token once.

From inside is judged only what cannot be seen from outside: that nothing but attention crosses a document's border, and
scores against a reference (float64 from the logits on) that is not shown what follows a target. That needs these names
of the script, imported in a process of its own: `load_model(path, device)`, which gives the model and more, and that
`model.logits((B, T) int)`; `read_artifact_file(path, kind)`; `pack_artifact(header, tensors, compressor)`, of tensors
that are named tuples with `data`, those called *.attn_scale a factor on what attention adds; `data_fingerprint(paths)`.

One `audit:` line a check, and all of it in audit.json beside the artifact. Exit code: 0 all passed, 2 unusable input in
one `error:` line, 3 a check failed.
"""

import argparse
import contextlib
import datetime
import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
try:
    import numpy as np
    from sentencepiece import SentencePieceProcessor
except ModuleNotFoundError as error:
    print(f"error: audit.py needs {error.name}: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)
import caseops  # noqa: E402

from records.submission import runlog  # noqa: E402
from records.submission.command import Unusable, command  # noqa: E402
from records.submission.rules import AUDITS  # noqa: E402
from records.submit import Parser, entry  # noqa: E402

BOS_ID = 1  # every document starts with it
SHARD = (20240520, 1)  # magic and version: the first of a shard's 256 int32; the third is its number of uint16 tokens
# Nats that a score may move where it must not: none on CPU. CUDA adds up some gradients in no fixed order.
MOVED_NATS = {"cpu": 0.0, "cuda": 0.02}
# Nats between a score and what it is told or calculated to be. Compiled graphs round otherwise than eager ones, and a
# CPU with AMX one window otherwise than several. In bf16 a logit of 16 is known to an eighth: a score may be off twice
# that, but what many are off in the mean, with its sign, is not rounding.
REFERENCE_NATS = {"cpu": 1e-3, "cuda": 0.05, "compiled": 0.05}
BF16_NATS, MEAN_NATS = 0.25, 0.01
# Mean nats between a run's own scores and its artifact's, scored again: by other threads, or another GPU.
SAME_NATS = {"cpu": 1e-4, "cuda": 0.02}
UNIT_SUM = 1e-4  # how far a distribution's sum may lie from 1


class Finding(NamedTuple):
    passed: bool
    figure: str


class Broken(Exception):
    """The script did not come to scores of a text, or to such that can be judged."""


# What a `result` or scores of another form than they should have lead to.
MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


# ----------------------------------------------------------------------------------------------------------------------
# Texts
# ----------------------------------------------------------------------------------------------------------------------


def read_split(folder: Path) -> tuple[list[Path], np.ndarray]:
    """(shards, tokens (n+1,) uint16) of a folder's validation split. Raises Unusable."""
    shards = sorted(filter(Path.is_file, folder.glob("fineweb_val_[0-9]*.bin")))  # not the sidecars of bytes
    if not shards:
        raise Unusable(f"no fineweb_val_*.bin in {folder}; --data names the folder that the artifact was scored on")
    parts = []
    for path in shards:
        head = np.fromfile(path, dtype="<i4", count=3)
        if tuple(head[:2]) != SHARD or path.stat().st_size != 1024 + 2 * int(head[2]):
            raise Unusable(f"{path} is no token shard")
        parts.append(np.fromfile(path, dtype="<u2", offset=1024))
    tokens = np.concatenate(parts)
    if len(tokens) < 2 or tokens[0] != BOS_ID:
        raise Unusable(f"the validation split in {folder} does not start with BOS ({BOS_ID}) and a token after it")
    return shards, tokens


def write_split(folder: Path, tokens: np.ndarray) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = *SHARD, len(tokens)
    (folder / "fineweb_val_000000.bin").write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def prepared_documents(folder: Path) -> list[tuple[int, str]] | None:
    """(bytes, SHA-256) of each document's text, as data/prepare.py kept them before there were tokens; None where it
    did not make this split. Raises Unusable."""
    try:
        entry = json.loads((folder / "manifest.json").read_text("utf-8")).get("validation_documents")
        if entry is None:
            return None
        if not (folder / entry["file"]).is_file():
            raise Unusable(f"{folder / 'manifest.json'} names {entry['file']}, which is missing or no plain file")
        data = (folder / entry["file"]).read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise Unusable(f"{folder / entry['file']} is not what the manifest says; build the data set again")
        return [(int(size), digest) for size, digest in (line.split("\t") for line in data.decode().splitlines())]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Unusable(f"{folder / 'manifest.json'} cannot be used: {error!r}") from None


def document_of(tokens: np.ndarray) -> np.ndarray:
    """(n,) int: which document the token before each target belongs to."""
    return np.cumsum(tokens[:-1] == BOS_ID)


def chunk_ends(n: int, context: int, stride: int, size: int) -> list[int]:
    """Where test-time training turns from scoring to learning: the shortest runs of windows with `size` targets."""
    ends, first = [], 0
    for end in [*range(context, n, stride), n]:
        if end - first >= size or end == n:
            ends.append(end)
            first = end
    return ends


# ----------------------------------------------------------------------------------------------------------------------
# The script, as its user runs it
# ----------------------------------------------------------------------------------------------------------------------


class Pass(NamedTuple):
    nats: np.ndarray  # (n,) float32, by target
    order: np.ndarray  # (n,) int64: targets, in the order in which they were scored
    last: np.ndarray  # (V,) float64: log p at the last target


class Copy(NamedTuple):
    """What the script made of a text."""

    tokens: np.ndarray  # (n+1,)
    bytes: np.ndarray  # (n,) int64, of each target
    passes: dict[str, Pass]
    result: dict

    @property
    def headline(self) -> Pass:
        return list(self.passes.values())[-1]


class Job(NamedTuple):
    """One run of the script, the same on every process."""

    name: str
    text: np.ndarray | None  # None: the split where it lies
    artifact: bytes | None  # in place of the one that is judged
    settings: dict[str, str]


def run_python(file: Path, args: Sequence[str], environ: Mapping[str, str], heard: Callable[[str], None]) -> int:
    """Exit code of a Python file in a process of its own; `heard` gets every line that it writes."""
    words = [sys.executable, file, *args]
    merged = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    with subprocess.Popen(words, env=dict(environ), **merged) as process:
        for line in process.stdout:
            heard(line.rstrip())
    return process.returncode


class World:
    """The processes that torchrun has started: all carry out the same jobs, so that the script finds its ranks."""

    def __init__(self, environ: Mapping[str, str]):
        self.rank, self.size = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
        if self.size > 1:
            import torch.distributed as dist

            self.dist, (store, *_) = dist, next(dist.rendezvous("env://", self.rank, self.size))
            group = dict(rank=self.rank, world_size=self.size, timeout=datetime.timedelta(days=1))
            dist.init_process_group("gloo", store=dist.PrefixStore("audit", store), **group)

    def tell(self, x: Any = None) -> Any:
        """What the main process tells, on all of them."""
        if self.size == 1:
            return x
        box = [x]
        self.dist.broadcast_object_list(box, src=0)
        return box[0]


class Script:
    """A script and an artifact, in an environment."""

    def __init__(self, args: argparse.Namespace, folder: Path, world: World, environ: Mapping[str, str], run: Callable):
        self.args, self.folder, self.world, self.environ, self.run = args, folder, world, environ, run
        self.started, self.count, self.lines, self.seconds = time.monotonic(), 0, [], {}

    def heard(self, line: str) -> None:
        self.lines = [*self.lines[-40:], line]
        if line.startswith("progress:"):
            self.say(line.removeprefix("progress:"))

    def say(self, what: str) -> None:
        if self.world.rank == 0:
            print(f"progress:audit {self.count} {what} elapsed:{time.monotonic() - self.started:.0f}s", flush=True)

    def carry_out(self, job: Job) -> tuple[int, Path]:
        """(exit code, where its outputs are), on each process."""
        place, self.count = self.folder / job.name, self.count + 1
        place.mkdir()
        ours = dict(EVAL_ONLY="1", ARTIFACT_PATH=str(self.args.artifact), DATA_PATH=str(self.args.data))
        ours |= dict(TOKENIZER_PATH=str(self.args.tokenizer), OUT_DIR=str(place), RUN_ID="copy")
        if job.text is not None:
            write_split(place, job.text)
            ours["DATA_PATH"] = str(place)
        if job.artifact is not None:
            ours["ARTIFACT_PATH"] = str(place / "artifact.pgolf")
            (place / "artifact.pgolf").write_bytes(job.artifact)
        others = ("EXPORT_ONLY", "WEIGHTS_PATH", "RESUME", "SAVE_SCORES")
        kept = {name: text for name, text in self.environ.items() if name not in others}
        self.lines, start = [], time.monotonic()
        self.say(job.name)
        code = self.run(self.args.script, [], kept | ours | job.settings, self.heard)
        self.seconds[job.name] = round(time.monotonic() - start, 1)
        return code, place / "runs" / "copy"

    def score(self, name: str, text: np.ndarray | None = None, artifact: bytes | None = None, **settings: str) -> dict:
        """The `result` of one run, on the main process. Raises Unusable where the script says that the user can mend
        it, Broken where it ends otherwise."""
        code, outputs = self.carry_out(self.world.tell(Job(name, text, artifact, settings)))
        if code not in (0, 3):
            said = next((line for line in reversed(self.lines) if line.strip()), "nothing")
            if code == 2:
                said = next((line for line in self.lines if line.startswith("error: ")), said)
                raise Unusable(f"{self.args.script} on the text {name!r}: {said.removeprefix('error: ')}")
            raise Broken(f"exit code {code} on the text {name!r}: {said}")
        try:
            return json.loads((outputs / "result.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise Broken(f"no result of the text {name!r}: {error}") from None

    def copy(self, name: str, text: np.ndarray, artifact: bytes | None = None, **settings: str) -> Copy:
        """One run that is asked for its scores. Raises as `score`."""
        result = self.score(name, text, artifact, SAVE_SCORES="1", EVAL_MAX_SECONDS="0", **settings)
        path, n = self.folder / name / "runs" / "copy" / "scores.npz", len(text) - 1
        try:
            with np.load(path) as found:
                arrays = dict(found)
            labels = [label for label in result["scores"] if f"{label}.nats" in arrays]
            passes = {label: Pass(*(arrays[f"{label}.{part}"] for part in Pass._fields)) for label in labels}
            if result["headline"]["label"] not in passes:
                raise Broken(f"no scores of the headline on the text {name!r}; does the script know SAVE_SCORES=1?")
            for label, scored in passes.items():
                if not np.array_equal(np.sort(scored.order), np.arange(n)):
                    raise Broken(f"{label} scored {len(scored.order)} targets, not {n} each once, of the text {name!r}")
            if any(p.nats.shape != (n,) or p.last.ndim != 1 for p in passes.values()) or len(arrays["bytes"]) != n:
                raise Broken(f"other than {n} scores of the text {name!r}")
            return Copy(text, arrays["bytes"], passes, result)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Broken(f"no scores of the text {name!r} ({error}); does the script know SAVE_SCORES=1?") from None
        finally:
            path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# From inside
# ----------------------------------------------------------------------------------------------------------------------


def from_inside(folder: Path) -> None:
    """What needs the script's names, in a process of its own: reads inside.json, writes answer.json and silent.pgolf,
    the artifact without attention (unless its header says that attention, too, stays within a document)."""
    import torch

    job = json.loads((folder / "inside.json").read_text("utf-8"))
    spec = importlib.util.spec_from_file_location("audited", job["script"])
    script = sys.modules["audited"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    _, header, tensors = script.read_artifact_file(job["artifact"], "artifact")
    scales = [name for name in tensors if name.endswith(".attn_scale")]
    masked = header["architecture"].get("document_mask", False)
    silenced = [] if masked else scales
    silent = {name: tensors[name]._replace(data=torch.zeros_like(tensors[name].data)) for name in silenced}
    (folder / "silent.pgolf").write_bytes(script.pack_artifact(header, {**tensors, **silent}, "stored"))
    model, *_ = script.load_model(job["artifact"], job["device"])
    place, nats = next(model.parameters()).device, []
    with torch.no_grad():
        for text, at, target in job["windows"]:
            logits = model.logits(torch.tensor([text], device=place))[0, at]
            nats.append(-logits.double().log_softmax(-1)[target].item())
    fingerprint = script.data_fingerprint([Path(path) for path in job["shards"]])
    answer = dict(nats=nats, silenced=bool(scales), masked=masked, fingerprint=fingerprint)
    (folder / "answer.json").write_text(json.dumps(answer), "utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# The judge
# ----------------------------------------------------------------------------------------------------------------------


class Judge:
    """All checks of one artifact. Texts are drawn by a generator of fixed seed: an audit repeats."""

    def __init__(self, args: argparse.Namespace, script: Script, log: runlog.RunLog | None):
        self.args, self.script, self.log = args, script, log
        self.shards, self.tokens = read_split(args.data)
        self.record = prepared_documents(args.data)
        self.script_bytes, self.blob = args.script.read_bytes(), args.artifact.read_bytes()
        self.tokenizer = SentencePieceProcessor(model_file=str(args.tokenizer))
        kinds = (self.tokenizer.is_control, self.tokenizer.is_unknown, self.tokenizer.is_unused)
        ids = [i for i in range(self.tokenizer.vocab_size()) if i != BOS_ID]
        self.drawn = np.array([i for i in ids if not any(is_kind(i) for is_kind in kinds)])
        self.random = np.random.default_rng(1017)
        self.pool = self.drawn[:0]
        self.copies: dict[str, Copy] = {}  # of the slice, disturbed
        self.learned: Copy | None = None  # the slice without learning
        self.even: Copy | None = None  # the slice, every expert of a mixture as likely as the others
        self.inside: dict | None = None
        self.as_logged: dict[str, str] = {}  # settings of the log's run

    def judge(self) -> Iterator[tuple[str, Finding]]:
        """Findings by name, in the order of rules.AUDITS."""
        first = None  # reason why something could not be carried out
        for step in (self.own_run, self.slices, self.full_length, self.look_inside):
            try:
                step()
            except (Broken, *MALFORMED) as problem:
                first = first or (str(problem) if isinstance(problem, Broken) else repr(problem))
                if step == self.own_run:
                    break
        for name in AUDITS:
            try:
                finding = getattr(self, name)()
            except MALFORMED as error:
                finding = Finding(False, f"could not be carried out: {first or repr(error)}")
            if first is not None and name == "once" and finding.passed:
                finding = Finding(False, first)
            yield name, finding

    # Texts to score

    def own_run(self) -> None:
        """The run that was not asked for its scores: that of the log, or one made here."""
        self.own = self.log.result if self.log else {}
        self.made_here = "blocks" not in self.own or self.own.get("world_size") != self.script.world.size
        if self.log:  # what an artifact's header does not know and rounding depends on
            told = ((name, self.log.settings.get(name)) for name in ("compile", "attention"))
            self.as_logged = {name.upper(): str(value) for name, value in told if value is not None}
        if self.made_here:
            self.own = self.script.score("own", **self.as_logged)
        logged = self.log or runlog.parse(self.script.folder / "own" / "logs" / "copy.txt")
        s = self.settings = argparse.Namespace(**logged.settings)
        self.kind = "cpu" if str(self.own.get("device")).startswith("cpu") else "cuda"
        self.context, self.stride = s.eval_seq_len, s.eval_stride or s.eval_seq_len
        self.by_document = s.ttt_enabled and s.ttt_params == "lora"
        self.piece = s.ttt_lora_chunk if self.by_document else None
        self.phases = getattr(s, "phased_ttt_num_phases", 0) if self.by_document else 0
        self.alone = not (self.phases or (self.by_document and getattr(s, "ttt_warm_start_a", False)))
        self.still = dict(TTT_LR="0") | (dict(GLOBAL_TTT_LR="0") if self.phases else {})
        self.learns = s.ttt_enabled and bool(s.ttt_lr or (self.phases and s.global_ttt_lr))

    def slices(self) -> None:
        """The first tokens of the split, and copies that differ behind a point."""
        s, wanted = self.settings, self.args.tokens or min(65_536, len(self.tokens) // 16)
        wanted = min(max(wanted, 4 * self.context), len(self.tokens) - 1)
        chunk, changed = max(1, wanted // 8), {}
        if not self.by_document:  # a forward is filled up with windows that do not count
            rows = max(4, chunk // self.stride) * self.script.world.size
            changed["VAL_BATCH_SIZE"] = str(min(s.val_batch_size, rows * self.context))
            changed["TTT_CHUNK_TOKENS"] = str(chunk)
        n = self.slice_length(wanted, chunk)
        text = self.tokens[: n + 1]
        self.base = self.copies["slice"] = self.script.copy("slice", text, **changed)
        self.ends = chunk_ends(n, self.context, self.stride, chunk)
        for name, targets in self.points().items():
            self.copies[name] = self.script.copy(name, self.disturbed(text, targets), **changed)
        if s.ttt_enabled and s.hedge_enabled:  # weights that are not on one expert alone
            self.even = self.script.copy("even_weights", text, HEDGE_ETA="0", **changed)
        if self.learns:
            self.learned = self.script.copy("without_learning", text, **self.still, **changed)

    def slice_length(self, wanted: int, chunk: int) -> int:
        """Targets, such that what is learned from before the last one is all before it: a chunk or a piece of its own
        would have been learned from with it, if anything was read too far."""
        tokens, lengths = self.tokens, []
        if self.by_document:
            starts = np.flatnonzero(tokens[: wanted + 1] == BOS_ID)
            ends = np.append(starts[1:], min(len(tokens), wanted + 1))
            pieces = (ends - starts - 2) // self.piece
            lengths = (starts + pieces * self.piece + 1)[pieces > 0]
        else:
            lengths = [end + 1 for end in chunk_ends(wanted, self.context, self.stride, chunk)[:-1]]
        lengths = [int(n) for n in lengths if tokens[n] != BOS_ID]
        fallback = next((n for n in range(wanted, 0, -1) if tokens[n] != BOS_ID), wanted)
        return max(lengths, default=fallback)

    def points(self) -> dict[str, np.ndarray]:
        """Targets to disturb, by the place of the first of them: at and inside windows, chunks, documents."""
        n, tokens = len(self.base.tokens) - 1, self.base.tokens
        learned = min(len(self.ends) - 1, self.settings.ttt_max_chunks or len(self.ends))  # chunks, never the last
        middle = self.ends[max(0, min(len(self.ends) // 2, learned - 1))]
        following = next((end for end in self.ends if end > middle), n)
        borders = np.flatnonzero(tokens[1:n] == BOS_ID) + 1
        text = dict(last=n - 1, window=int(self.random.integers(1, max(2, min(self.context, n)))))
        if len(borders):
            text["document"] = int(borders[len(borders) // 2])
        found = {}
        if (self.base.headline.order == np.arange(n)).all():
            text |= dict(chunk=middle + 1, inside_chunk=(middle + following) // 2 + 1)
        else:
            for name, part in (("piece", 3), ("later_piece", 1.5)):
                found[name] = self.base.headline.order[int(n / part) + int(self.random.integers(0, max(1, n // 9))) :]
        for name, first in text.items():
            while first < n - 1 and tokens[first + 1] == BOS_ID:  # which stays as it is
                first += 1
            if 0 <= first < n:
                found[name] = np.arange(first, n)
        return dict(sorted(found.items()))

    def disturbed(self, text: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """A copy with another token for each of these targets, but for every BOS."""
        copy, places = text.copy(), targets[text[targets + 1] != BOS_ID] + 1
        while len(self.pool) < len(places):  # each token equally often: rare ones come, too
            self.pool = np.append(self.pool, self.random.permutation(self.drawn))
        new, self.pool = np.split(self.pool, [len(places)])
        same = new == copy[places]
        new[same] = self.drawn[(np.searchsorted(self.drawn, new[same]) + 1) % len(self.drawn)]
        copy[places] = new
        return copy

    def full_length(self) -> None:
        """A copy of the split, disturbed in what comes last: of the text or, where documents are scored in another
        order, in the shortest of them, whichever leaves more before it in the slice. If that leaves nothing here, the
        other."""
        order, choices = self.base.headline.order, [last_quarter]
        if (order != np.arange(len(order))).any():
            choices.append(shortest_documents)
        choices.sort(key=lambda choose: before(choose(self.base.tokens), order, self.alone).sum(), reverse=True)
        for choose in choices:
            text = self.disturbed(self.tokens, choose(self.tokens))
            self.full = self.script.copy(choose.__name__, text, **self.as_logged)
            if any(whole_blocks(self.full.headline, changed_targets(self.full.tokens, self.tokens), self.alone)):
                break

    def look_inside(self) -> None:
        """The reference's nats of some targets, and the slice without attention."""
        folder, references = self.script.folder / "inside", self.references()
        folder.mkdir()
        job = dict(script=str(self.args.script), artifact=str(self.args.artifact), device=self.kind)
        job |= dict(shards=[str(path) for path in self.shards], windows=[window for *window, _ in references])
        (folder / "inside.json").write_text(json.dumps(job), "utf-8")
        alone = {k: v for k, v in self.script.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self.script.lines = []
        code = self.script.run(Path(__file__), ["--inside", str(folder)], alone, self.script.heard)
        if code:
            raise Broken(f"from inside: {next((line for line in reversed(self.script.lines) if line), 'nothing said')}")
        self.inside = json.loads((folder / "answer.json").read_text("utf-8"))
        told, known = np.array([nats for *_, nats in references]), np.array(self.inside["nats"])
        self.off_reference, self.off_mean = distance(told, known), float(np.mean(told - known))
        self.listen((folder / "silent.pgolf").read_bytes())

    def references(self) -> list[tuple[list[int], int, int, np.float32]]:
        """Windows: a text that holds other tokens behind a position, the target there, and what the script has scored
        it with."""
        n, tokens, found = len(self.base.tokens) - 1, self.base.tokens, []
        passes, s = list(self.base.passes.values()), self.settings
        length = min(self.context, n)
        unlearned = (self.learned or self.base).headline  # with TTT_LR=0, what the model itself gives
        plans = [(passes[0], self.context, n), *((scored, self.stride, n) for scored in passes[1:2])]
        if s.ttt_enabled and not self.by_document and not s.hedge_enabled:  # a temperature is 1 in the first window
            plans.append((unlearned, self.stride, length if s.ttt_temperature else n))
        windows = []  # (pass, length, start, target)
        for scored, stride, end in plans:
            for target in map(int, self.random.integers(0, end, 12)):
                steps = max(0, -(-(target + 1 - length) // stride))
                windows.append((scored, length, min(length + steps * stride, n) - length, target))
        if self.by_document:
            starts = np.flatnonzero(tokens[:n] == BOS_ID)
            for target in map(int, self.random.integers(0, n, 12)):
                start = int(starts[starts <= target][-1])
                end = ((target - start) // self.piece + 1) * self.piece  # of its piece, from the document's beginning
                windows.append((unlearned, min(end, self.context), start + max(0, end - self.context), target))
        for scored, size, start, target in sorted(windows, key=lambda window: window[1]):
            at, right = target - start, int(tokens[target + 1])
            behind = self.random.choice(self.drawn, size - at - 1)
            if len(behind) and behind[0] == right:
                behind[0] = self.drawn[(np.searchsorted(self.drawn, right) + 1) % len(self.drawn)]
            text = [*tokens[start : target + 1].tolist(), *behind.tolist()]
            found.append((text, at, right, scored.nats[target]))
        return found

    def listen(self, silent: bytes) -> None:
        """Without attention that crosses a border, whole windows of the split twice, the second time with other ends of
        documents."""
        half = max(1, min(len(self.tokens), max(len(self.base.tokens), 16_384)) // self.context) * self.context
        text = np.resize(self.tokens[:half], half)
        ends = np.flatnonzero(text[1:] == BOS_ID)
        self.silent_ends = ends[(ends > 0) & (text[ends] != BOS_ID)]
        twice = np.concatenate([text, self.disturbed(text, self.silent_ends - 1), [BOS_ID]]).astype(np.uint16)
        fixed = dict(TTT_ENABLED="0", EVAL_STRIDE="0", TTT_PARAMS="all", TTT_TEMPERATURE="0", HEDGE_ENABLED="0")
        nats = self.script.copy("without_attention", twice, silent, **fixed).headline.nats
        free = np.ones(half, dtype=bool)
        free[self.silent_ends - 1] = free[self.silent_ends] = False  # the token itself and what follows it
        self.across = distance(nats[half:][free], nats[:half][free])

    # Checks

    def causal(self) -> Finding:
        """C1: what lies behind a point, in the text or in the order of scoring, moves no score before it."""
        moved, changed, points = 0.0, True, 0
        for copy in [copy for name, copy in self.copies.items() if name != "slice"]:
            places = changed_targets(copy.tokens, self.base.tokens)
            for label, ours in self.base.passes.items():
                theirs, kept = copy.passes[label], before(places, ours.order, self.alone)
                moved = larger(moved, distance(theirs.nats[kept], ours.nats[kept]))
                changed &= bool((theirs.nats[~kept] != ours.nats[~kept]).any())
                points += 1
        figure = f"disturbed_at:{points} scores_before_moved:{moved:.2g}" + ("" if changed else " nothing_behind_moved")
        return Finding(moved <= MOVED_NATS[self.kind] and changed, figure)

    def normalised(self) -> Finding:
        """C2: at the end of each copy, the whole vocabulary has one distribution, whatever the token there, and its
        entry is the score; and some scores are the reference's, which does not see what follows."""
        off_one = off_score = own = 0.0
        bf16 = self.base.result.get("dtype") == "bfloat16"
        limits = dict.fromkeys(REFERENCE_NATS, BF16_NATS) if bf16 else REFERENCE_NATS
        passed = self.off_reference <= limits[self.kind] and abs(self.off_mean) <= MEAN_NATS
        for copy in filter(None, [*self.copies.values(), self.full, self.even]):
            compiled = copy is self.full and self.as_logged.get("COMPILE") == "1"
            for scored in copy.passes.values():
                off = abs(float(scored.nats[-1] + scored.last[copy.tokens[-1]]))
                passed &= off <= limits["compiled" if compiled else self.kind]
                off_one, off_score = larger(off_one, abs(float(np.exp(scored.last).sum()) - 1)), larger(off_score, off)
                if not (np.isfinite(scored.nats) & (scored.nats >= -1e-6)).all():
                    return Finding(False, "scores that are not finite, or below 0 nats")
        for label, scored in self.copies["last"].passes.items():
            own = larger(own, distance(scored.last, self.base.passes[label].last))
        passed &= off_one <= UNIT_SUM and own <= MOVED_NATS[self.kind]
        figure = f"distributions:{len(self.copies) + 1} off_one:{off_one:.2g} moved_by_own_target:{own:.2g} "
        figure += f"off_score:{off_score:.2g} off_reference:{self.off_reference:.2g} mean:{self.off_mean:.1g}"
        return Finding(passed, figure)

    def score_first(self) -> Finding:
        """C3: with a learning rate of 0, what is scored before the first update stays, and later scores change."""
        s = self.settings
        if not s.ttt_enabled:
            return Finding(True, "nothing adapts")
        if not self.learns:
            return Finding(True, "TTT_LR=0: nothing is learned")
        n = len(self.base.tokens) - 1
        if self.by_document:
            starts = np.flatnonzero(self.base.tokens[:n] == BOS_ID)
            into = np.arange(n) - starts[document_of(self.base.tokens) - 1]
            first = (into if s.ttt_lora_reset else np.arange(n)) < self.piece
            if self.phases:  # the first begins where this share of the text is scored
                lengths = np.diff(np.append(starts, n))
                turn = np.arange(len(starts)) if s.ttt_order == "stream" else np.argsort(-lengths, kind="stable")
                before_phase = turn[(np.cumsum(lengths[turn]) - lengths[turn]) * (self.phases + 1) < n]
                first &= np.isin(document_of(self.base.tokens) - 1, before_phase)
        else:
            first = np.arange(n) < self.ends[0]
        ours, theirs = self.base.headline.nats, self.learned.headline.nats
        moved, learned = distance(ours[first], theirs[first]), bool((ours != theirs)[~first].any())
        figure = f"scored_before_learning:{int(first.sum())} of:{n} moved:{moved:.2g}"
        return Finding(moved <= MOVED_NATS[self.kind] and learned, figure + ("" if learned else " nothing_learned"))

    def once(self) -> Finding:
        """C4: every target once, in an order that the beginnings of documents decide; totals are those of the split."""
        for name, copy in [*self.copies.items(), ("full_length", self.full)]:
            n, document = len(copy.tokens) - 1, document_of(copy.tokens)
            for label, scored in copy.passes.items():
                told = copy.result["scores"][label]
                by_document = scored.order[np.argsort(document[scored.order], kind="stable")]
                if (np.diff(by_document)[np.diff(np.sort(document)) == 0] < 0).any():
                    return Finding(False, f"{label} scores a document out of order ({name})")
                if n == len(self.base.tokens) - 1 and not np.array_equal(scored.order, self.base.passes[label].order):
                    return Finding(False, f"{label} scores in an order that depends on more than BOS ({name})")
                total = float(scored.nats.sum(dtype=np.float64))
                if told["tokens"] != n or told["val_loss"] is None or abs(told["val_loss"] * n - total) > 1e-6 * total:
                    return Finding(False, f"{label} is over {told['tokens']} tokens of {n}, or other nats ({name})")
                if told["bytes"] != int(copy.bytes.sum()):
                    return Finding(False, f"{label} is over {told['bytes']} bytes, its targets have others ({name})")
                if distance(block_sums(scored), np.array(copy.result["blocks"][label], dtype=float)) > 1e-5:
                    return Finding(False, f"{label} tells other sums of its blocks than its scores have ({name})")
        n = len(self.tokens) - 1
        for label, sums in self.own["blocks"].items():
            told = self.own["scores"][label]
            if told["tokens"] != n or abs(told["val_loss"] * n - sum(sums)) > 1e-3:
                return Finding(False, f"{label} is over {told['tokens']} tokens of {n}, or other nats")
        return Finding(True, f"tokens:{n} texts:{len(self.copies) + 1} passes:{len(self.own['blocks'])}")

    def unwatched(self) -> Finding:
        """The run that was not asked for scores has those that are told of a text that is the same up to a point; where
        it had to be made here, the log's run came to the same."""
        worst = off_log = 0.0
        compared, places = {}, changed_targets(self.full.tokens, self.tokens)
        logged = self.log.result if self.log else self.own
        cut = {run["headline"]["label"] for run in (self.own, logged) if run.get("eval_cut")}
        for label in [label for label in self.own["blocks"] if label not in cut]:  # a cut depends on the machine
            scored, sums = self.full.passes[label], self.own["blocks"][label]
            sums = np.array([math.nan if x is None else x for x in sums])
            whole = np.array(whole_blocks(scored, places, self.alone, len(sums)))
            off = np.abs(block_sums(scored, len(sums)) - sums) / max(1, len(scored.nats) / len(sums))
            worst, compared[label] = larger(worst, *off[whole]), whole.sum()
            off_log = larger(off_log, abs(logged["scores"][label]["val_loss"] - self.own["scores"][label]["val_loss"]))
        limit = MOVED_NATS[self.kind] + 1e-6 if self.made_here else SAME_NATS[self.kind]
        enough = all(compared.values()) or len(self.tokens) <= 64
        passed = worst <= limit and off_log <= SAME_NATS[self.kind] and enough
        counts, whose = "+".join(map(str, compared.values())), "made_here" if self.made_here else "of_the_log"
        figure = f"blocks:{counts} run:{whose} nats_off:{worst:.2g}"
        if self.made_here and self.log is not None:
            figure += f" nats_off_log:{off_log:.2g}"
        return Finding(passed, figure + "".join(f" {label} was cut" for label in cut))

    def documents(self) -> Finding:
        """With attention switched off, the token before a document's BOS reaches no score inside that document.

        Attention may look into the text before, as in the published systems; what mixes neighbours must not. An
        artifact of DOCUMENT_MASK=1 is judged with its attention.
        """
        attention = "on" if self.inside["masked"] else "off"
        figure = f"borders:{len(self.silent_ends)} attention:{attention} scores_across_moved:{self.across:.2g}"
        if not self.inside["masked"] and not self.inside["silenced"]:
            return Finding(False, "the artifact has no *.attn_scale: attention cannot be switched off")
        return Finding(self.across <= max(1e-6, MOVED_NATS[self.kind]), figure)

    def bytes(self) -> Finding:
        """Counted bytes against each document's text.

        The text is the one that prepare.py recorded, as SentencePiece's normaliser gave it before there were any ids;
        for shards without such a record, it is what SentencePiece decodes. Operators of CaseOps are no text.
        """
        pieces = {self.tokenizer.id_to_piece(i) for i in range(self.tokenizer.get_piece_size())}
        text_of = caseops.restore if pieces.issuperset(caseops.OPERATORS) else str
        ends = np.append(np.flatnonzero(self.tokens == BOS_ID), len(self.tokens))
        if self.record is not None and len(self.record) != len(ends) - 1:
            return Finding(False, f"{len(ends) - 1} documents in the split, {len(self.record)} in prepare.py's record")
        total, source = 0, "decoded" if self.record is None else "recorded"
        intact = np.append(True, self.full.tokens[1:] == self.tokens[1:])
        for document, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
            text = text_of(self.tokenizer.decode(self.tokens[start + 1 : end].tolist())).encode()
            theirs, digest = (len(text), None) if self.record is None else self.record[document]
            ours = int(self.full.bytes[max(0, start - 1) : end - 1].sum())  # BOS is a target too
            if intact[start:end].all() and theirs != ours:
                return Finding(False, f"document {document} counts {ours} bytes, its text has {theirs}")
            if digest not in (None, hashlib.sha256(text).hexdigest()):
                return Finding(False, f"document {document} is not the text that was prepared")
            total += theirs
        for label, told in self.own["scores"].items():
            if told["bytes"] != total:
                return Finding(False, f"{label} is over {told['bytes']} bytes, the split has {total}")
        return Finding(True, f"documents:{len(ends) - 1} {source}_bytes:{total}")

    def clocks(self) -> Finding:
        """The run's ledger against both clocks; 0 is no limit."""
        s, training, evaluation = self.settings, self.own["train_seconds"], self.own["eval_seconds"]
        limits = (s.max_wallclock_seconds, s.eval_max_seconds)
        passed = all(spent <= limit or limit == 0 for spent, limit in zip((training, evaluation), limits, strict=True))
        caps = [f"{limit:g}s" if limit else "no_limit" for limit in limits]
        trained = self.own.get("mode") == "train"
        train = f"train:{training:.1f}s of {caps[0]}" if trained else "train:not_in_this_run"
        return Finding(passed, f"{train} evaluation:{evaluation:.1f}s of {caps[1]}")

    def size(self) -> Finding:
        code, artifact, cap = len(self.script_bytes), len(self.blob), self.settings.artifact_cap_bytes
        return Finding(code + artifact <= cap, f"code:{code} artifact:{artifact} total:{code + artifact} cap:{cap}")

    def identity(self) -> Finding:
        """Script, artifact, tokenizer and data are those of the log; without one, there is nothing to compare."""
        if self.log is None:
            return Finding(True, "no log: all that was compared is this script with itself")
        told, ours = self.log.result, self.hashes()
        names = dict(script="code_sha256", artifact="artifact_sha256", tokenizer="tokenizer_sha256")
        other = [name for name, key in names.items() if told.get(key) != ours[name]]
        if self.inside and self.inside["fingerprint"] != told.get("val_fingerprint"):
            other.append("data")
        if other:
            return Finding(False, f"not the log's: {', '.join(other)}")
        return Finding(True, " ".join(f"{name}:{ours[name][:16]}" for name in (*names, "log")))

    def hashes(self) -> dict[str, str | None]:
        data = dict(script=self.script_bytes, artifact=self.blob, tokenizer=self.args.tokenizer.read_bytes())
        digests = {name: hashlib.sha256(part).hexdigest() for name, part in data.items()}
        tokens = hashlib.sha256(self.tokens.astype("<u2").tobytes()).hexdigest()
        return digests | dict(validation_tokens=tokens, log=self.log.sha256 if self.log else None)


def last_quarter(tokens: np.ndarray) -> np.ndarray:
    """The targets that come last in a text."""
    return np.arange(3 * (len(tokens) - 1) // 4, len(tokens) - 1)


def shortest_documents(tokens: np.ndarray) -> np.ndarray:
    """The targets of the shortest documents of a text's second half that together are half of that: late in the text,
    for passes over the stream, and late in the order of lengths."""
    document, n = document_of(tokens), len(tokens) - 1
    lengths = np.bincount(document)[1:]
    first = min(int(document[n // 2]), len(lengths) - 1)  # the one after that of the middle
    shortest = first + np.argsort(lengths[first:], kind="stable")
    chosen = shortest[np.cumsum(lengths[shortest]) <= n / 4]
    return np.flatnonzero(np.isin(document, 1 + (chosen if len(chosen) else shortest[:1])))


def before(changed: np.ndarray, order: np.ndarray, alone: bool) -> np.ndarray:
    """(n,) bool: the targets that a change of these may not reach: scored earlier or, where a document that is scored
    out of turn is alone and heard by no other, earlier in the text."""
    place, kept = np.argsort(order), np.zeros(len(order), dtype=bool)
    kept[: changed.min() if alone else 0] = True
    kept[order[: place[changed].min()]] = True
    return kept


def changed_targets(tokens: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.flatnonzero(tokens[1:] != others[1:])


def whole_blocks(scored: Pass, changed: np.ndarray, alone: bool, blocks: int = 64) -> list[bool]:
    """Whether each block of a pass has targets, of which none may be reached by a change of these."""
    parts = np.array_split(before(changed, scored.order, alone)[scored.order], blocks)
    return [bool(len(part)) and bool(part.all()) for part in parts]


def block_sums(scored: Pass, blocks: int = 64) -> np.ndarray:
    """What a `result` tells of a pass."""
    return np.array([part.sum(dtype=np.float64) for part in np.array_split(scored.nats[scored.order], blocks)])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference of two runs of scores; infinite where one has more of them or one that is not a number."""
    worst = float(np.abs(a - b).max(initial=0.0)) if len(a) == len(b) else math.inf
    return worst if math.isfinite(worst) else math.inf


def larger(*values: float) -> float:
    """The maximum, infinite if any value is not a number: max() alone would forget it."""
    return max(values) if all(map(math.isfinite, values)) else math.inf


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("audit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="runs/ID/artifact.pgolf of a run")
    parser.add_argument("--script", type=Path, default=ROOT / "train_gpt.py", help="the copy that made it")
    parser.add_argument("--log", type=Path, help="of its run; default: the one in logs/ beside runs/, if it is there")
    parser.add_argument("--data", type=Path, help="folder of its validation split; default: the log's, or DATA_PATH")
    parser.add_argument("--tokenizer", type=Path, help="default: the one .model in that folder, or TOKENIZER_PATH")
    parser.add_argument("--tokens", type=int, default=0, metavar="N", help="of a slice; default: 1/16 of the split")
    args = parser.parse_args(argv)
    if args.tokens < 0:
        parser.error("--tokens must be a whole number from 1")
    return args


def find_inputs(args: argparse.Namespace, environ: Mapping[str, str]) -> runlog.RunLog | None:
    """Fills in what was not named; the log of the artifact's run, if there is one. Raises Unusable."""
    for path in (args.artifact, args.script):
        if not path.is_file():
            raise Unusable(f"{path} is no file")
    args.artifact, args.script = args.artifact.resolve(), args.script.resolve()
    folder = args.artifact.parent
    beside = folder.parent.parent / "logs" / f"{folder.name}.txt"
    path = args.log or (beside if beside.is_file() else None)
    log = runlog.parse(path) if path else None
    if log is not None and (log.result is None or log.settings is None):
        raise Unusable(f"{path} has no `result` and `settings`: it is not the log of a whole run of train_gpt.py")
    told = log.settings if log else {}
    if args.data is None:
        named = environ.get("DATA_PATH") or str(told.get("data_path") or "")
        if not Path(named).is_dir() or not named:
            raise Unusable(f"no folder {named!r} of the split that the artifact was scored on; --data names it")
        args.data = Path(named)
    args.data = args.data.resolve()
    if args.tokenizer is None:
        named = environ.get("TOKENIZER_PATH") or str(told.get("tokenizer_path") or "")
        models = sorted(args.data.glob("*.model"))
        if not named and len(models) != 1:
            raise Unusable(f"{len(models)} SentencePiece models in {args.data}; --tokenizer names the artifact's")
        args.tokenizer = Path(named) if named else models[0]
    args.tokenizer = args.tokenizer.resolve()
    if not args.tokenizer.is_file():
        raise Unusable(f"{args.tokenizer} is no file")
    return log


def audit(args: argparse.Namespace, environ: Mapping[str, str] = os.environ, run: Callable = run_python) -> int:
    """Exit code: 0, or 3 where a check failed. `run` starts a Python file, as run_python. Raises Unusable."""
    log, world = find_inputs(args, environ), World(environ)
    with tempfile.TemporaryDirectory(prefix="audit_") as folder:
        script = Script(args, Path(folder), world, environ, run)
        if world.rank:
            while isinstance(job := world.tell(), Job):
                script.carry_out(job)
            return job
        code = 2
        try:
            judge = Judge(args, script, log)
            findings = {}
            for name, finding in judge.judge():
                findings[name] = dict(passed=bool(finding.passed), figure=finding.figure)
                print(f"audit:{name} {'pass' if finding.passed else 'FAIL'} {finding.figure}", flush=True)
            code = 0 if all(finding["passed"] for finding in findings.values()) else 3
        finally:
            world.tell(code)
    written = args.artifact.parent / "audit.json"
    seconds = dict(seconds=round(time.monotonic() - script.started, 1), seconds_by_text=script.seconds)
    whole = dict(passed=code == 0, audit=findings, sha256=judge.hashes(), world_size=world.size, **seconds)
    text = json.dumps(whole | dict(date=datetime.date.today().isoformat()), indent=1)
    partial = written.with_name(f"{written.name}.partial")
    try:
        partial.write_text(text + "\n", "utf-8")
        partial.replace(written)
    finally:
        partial.unlink(missing_ok=True)
    print(f"files: {written}")
    return code


def main(argv: Sequence[str]) -> int:
    if len(argv) == 2 and argv[0] == "--inside":
        from_inside(Path(argv[1]))
        return 0
    args = parse(argv)
    if os.environ.get("RANK", "0") == "0":
        return command(audit)(args)
    with contextlib.suppress(Unusable):  # which the main process says
        return audit(args)
    return 2


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a console without UTF-8 ends no audit
    sys.exit(entry(main))
