"""Bits per weight of an artifact's codes: their entropy, our ANS coder, and general compressors on the same bytes.

    python records/code_bytes.py runs/ID/artifact.pgolf
    python records/code_bytes.py --synthetic 36             codes of so many million trained-like weights, and the time

Entropy is of each matrix by itself, zeroth order, without the cost of telling its table; ans has tables and classes in
it, compressed as in the file. A compressor that is not installed is left out.
"""

import argparse
import lzma
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt as pg  # noqa: E402


def ans(tensors: Mapping[str, pg.Stored]) -> int:
    models, words = pg.encode_codes(tensors)
    return len(pg.compress(models, "lzma")) + len(words)


def general() -> dict[str, Callable[[bytes], bytes]]:
    """The compressors that are here, by name."""
    found = {"lzma-9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)}
    try:
        import zstandard

        found["zstd-22"] = zstandard.ZstdCompressor(level=22).compress
    except ImportError:
        print("zstd: not installed", file=sys.stderr)
    try:
        import brotli

        found["brotli-11"] = brotli.compress
    except ImportError:
        print("brotli: not installed", file=sys.stderr)
    return found


def table(tensors: Mapping[str, pg.Stored]) -> Iterable[str]:
    """Lines of Markdown: a row for each class of codes, and all of them."""
    compressors = general()
    yield f"| codes | weights | entropy | ans | {' | '.join(compressors)} |"
    yield "|---" * (4 + len(compressors)) + "|"
    sums, weights = np.zeros(2 + len(compressors)), 0
    for (label, storage), names in pg.code_groups({name: t.storage for name, t in tensors.items()}).items():
        members = {name: tensors[name] for name in names}
        codes = b"".join(t.data.contiguous().numpy().tobytes() for t in members.values())
        entropy = sum(t.size() for t in members.values())
        sizes = [entropy, ans(members), *(len(squeeze(codes)) for squeeze in compressors.values())]
        sums, weights = sums + sizes, weights + len(codes)
        yield f"| {label} {storage} | {len(codes):,} | {' | '.join(f'{8 * size / len(codes):.4f}' for size in sizes)} |"
    yield f"| all | {weights:,} | {' | '.join(f'{8 * size / weights:.4f}' for size in sums)} |"
    yield f"| beside their entropy | | | {' | '.join(f'{100 * (s / sums[0] - 1):+.2f} %' for s in sums[1:])} |"


def synthetic(million: int) -> dict[str, pg.Stored]:
    """int6 codes of Student-t weights (8 degrees), steps of 12.85/31 sigma, in matrices of 1536 x 512."""
    tensors, shape = {}, (1536, 512)
    for i in range(max(1, round(million * 1e6 / (shape[0] * shape[1])))):
        x = np.random.default_rng(i).standard_t(8, shape) / (8 / 6) ** 0.5 * 31 / 12.85
        codes = torch.from_numpy(np.clip(np.round(x), -31, 31).astype(np.int8))
        tensors[f"blocks.{i}.mlp.up.weight"] = pg.Stored("int6", codes, torch.ones(shape[0], 1, dtype=torch.float16))
    return tensors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?")
    parser.add_argument("--synthetic", type=int, metavar="MILLION", help="weights, instead of an artifact's")
    arguments = parser.parse_args()
    if (arguments.artifact is None) == (arguments.synthetic is None):
        parser.error("give an artifact or --synthetic")
    try:
        if arguments.artifact is not None:
            tensors = pg.read_artifact_file(arguments.artifact, "artifact")[2]
        else:
            tensors = synthetic(arguments.synthetic)
            start = time.perf_counter()
            models, words = pg.encode_codes(tensors)
            encoded = time.perf_counter()
            listed = [[name, list(t.data.shape), t.storage] for name, t in tensors.items()]
            codes = pg.decode_codes(listed, memoryview(models), words)
            print(f"encoded in {encoded - start:.1f} s, decoded in {time.perf_counter() - encoded:.1f} s")
            assert all(np.array_equal(codes[name], t.data.numpy()) for name, t in tensors.items())
        for line in table(tensors):
            print(line, flush=True)
    except pg.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
