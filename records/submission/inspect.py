"""`inspect ARTIFACT`: where an artifact's bytes go, as a table and a picture."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import train_gpt as pg
from records.submission.command import Unusable, command


class Share(NamedTuple):
    """A part of an artifact: its name, tensors, weights, the entropy of its codes (bits per weight) and bytes."""

    part: str
    tensors: int
    weights: int
    entropy: float | None
    bytes: float


def shares_of(blob: bytes, header: dict, tensors: Mapping[str, pg.Stored]) -> list[Share]:
    """Where a file's bytes go, the largest part first. They are shared out by what each part needs when compressed by
    itself; the sum is the file's length."""
    compressor, groups = pg.COMPRESSORS[blob[6]], {}
    for name, t in tensors.items():
        groups.setdefault((pg.label_of(name), t.storage), {})[name] = t

    def alone(data: bytes) -> int:
        return len(pg.compress(data, "lzma" if compressor == "ans" else compressor))

    parts = []
    for (label, storage), members in groups.items():
        weights, entropy, coded = sum(t.data.numel() for t in members.values()), None, pg.levels(storage)
        data = pg.byte_planes([t.data.numpy() for t in members.values()], pg.STREAMS["codes" if coded else storage])
        size = alone(data)
        if coded:
            codes = np.frombuffer(data, dtype=np.int8).astype(np.int64)
            entropy = pg.entropy_bits(np.bincount(codes + 128)) / len(codes)
        if coded and compressor == "ans":
            models, words = pg.encode_codes(members)
            size = alone(models) + len(words)
        parts.append(Share(f"{label} {storage}", len(members), weights, entropy, size))
    scales = [t.scale.numpy() for t in tensors.values() if t.scale is not None]
    size = alone(pg.byte_planes(scales, pg.STREAMS["fp16"]))
    parts.append(Share("row scales fp16", len(scales), sum(map(len, scales)), None, size))
    if columns := [t.columns.numpy() for t in tensors.values() if t.columns is not None]:
        size = alone(pg.byte_planes(columns, pg.STREAMS["columns"]))
        parts.append(Share("column scales int8", len(columns), sum(map(len, columns)), None, size))
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    parts.append(Share("header", 0, 0, None, alone(text) + pg.PREFIX_BYTES))
    factor = len(blob) / sum(part.bytes for part in parts)
    shared = [part._replace(bytes=part.bytes * factor) for part in parts]
    return sorted(shared, key=lambda part: -part.bytes)


def table(blob: bytes, tensors: Mapping[str, pg.Stored], parts: Sequence[Share]) -> str:
    """The parts in Markdown, and a last row of the whole file."""
    lines = ["| part | tensors | weights | bits per weight | entropy | bytes | share |", "|---" * 7 + "|"]
    for part, count, weights, entropy, size in parts:
        cells = [part, count or "", f"{weights:,}" if weights else "", f"{8 * size / weights:.3f}" if weights else ""]
        cells += [f"{entropy:.3f}" if entropy is not None else "", f"{size:,.0f}", f"{100 * size / len(blob):.2f} %"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    weights = sum(t.data.numel() for t in tensors.values())
    bits = f"{8 * len(blob) / weights:.3f}"
    lines.append(f"| {pg.COMPRESSORS[blob[6]]}, all | {len(tensors)} | {weights:,} | {bits} | | {len(blob):,} | |")
    return "\n".join(lines)


def draw(parts: Sequence[Share], path: Path) -> None:
    """Bars of the parts' bytes as a PNG. Raises Unusable where matplotlib is missing or the file cannot be written."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Unusable("--png needs matplotlib: pip install -r requirements-records.txt") from None
    figure = Figure(figsize=(8, 0.4 * len(parts) + 1), dpi=120, layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([part.part for part in parts], [part.bytes / 1000 for part in parts], color="#4269d0")
    axes.bar_label(bars, [f"{part.bytes / 1000:,.1f}" for part in parts], padding=3)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("kB")
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise Unusable(f"cannot write {path}: {error.strerror}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", metavar="ARTIFACT", help="runs/ID/artifact.pgolf of a run")
    parser.add_argument("--png", action="store_true", help="also draw it, beside the artifact")


@command
def run(args: argparse.Namespace) -> int:
    """Exit code: 0, or 2 where the file is no artifact or cannot be drawn."""
    try:
        blob, header, tensors = pg.read_artifact_file(args.artifact, "artifact")
    except pg.UserError as error:
        raise Unusable(str(error)) from None
    path = Path(args.artifact).with_suffix(".png")
    if args.png and path == Path(args.artifact):
        raise Unusable(f"the picture would overwrite {path}; give the artifact another name")
    parts = shares_of(blob, header, tensors)
    print(table(blob, tensors, parts), flush=True)
    if args.png:
        draw(parts, path)
        print(f"drawn: {path}")
    return 0
