r"""bpb lost to quantization, without the luck of one draw, and at equal bytes.

    python records/quantization_loss.py runs/ID/weights.pgolf --data $DATA_PATH \
        COMPRESSOR=zstd "COMPRESSOR=ans QUANT=rd"

Each row is named by its settings. The first is stored as its settings have it; all later ones are fitted (FIT_TO_CAP)
to the bytes that the first needs, unless --unfitted. With --bytes N all are fitted to N.

A rounding error d moves the loss by g·d + ½ d·H·d + …. The first term has no sign of its own: on a fixed text it may
hide what is lost, or feign a gain. The loss at w + d and at w - d has it with opposite signs, so their mean is the
second term, which is what a better quantizer lowers. All in fp32: bf16 activations move a score as much as int6 does.

With --landings N nothing is scored: N copies of the weights, each with 2 % of noise, are fitted to 0.7, 0.9 and 1.05 of
the bytes that a row needs unfitted, and the distances below those caps are printed.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt as pg  # noqa: E402


class Bench:
    """Scores of weights on the validation text, windows without overlap, in fp32 on this CPU."""

    def __init__(self, weights: str, data: str, calibration_tokens: int):
        _, header, tensors = pg.read_artifact_file(weights, "weights")
        hp = pg.Hyperparameters(**header["architecture"], **header["evaluation"])
        ours = dict(dtype="fp32", device="cpu", data_path=data, max_wallclock_seconds=0.0)
        self.hp = hp = dataclasses.replace(hp, **ours, gptq_calibration_tokens=calibration_tokens)
        self.weights = {name: t.dequantize() for name, t in tensors.items()}
        ranks, val = pg.Ranks(hp, {}), pg.load_validation(hp)
        stream = pg.TokenStream(pg.find_shards(hp, "train"), hp.vocab_size)
        self.run = pg.Run(
            hp, ranks, pg.Log(None), pg.Phases(ranks.device), torch.float32, pg.sdpa, pg.Compiled(*[False] * 4), val,
            stream, Path(), b"", pg.Signals(), None,
        )  # fmt: skip
        self.model = self.run.build(hp.eval_seq_len)
        self.windows = pg.plan_windows(val.targets, hp.eval_seq_len, hp.eval_seq_len)

    def bpb(self, weights: Mapping[str, Tensor]) -> float:
        self.model.load_state_dict(weights)
        batch = pg.score_batch_windows(self.hp, self.run.ranks, self.hp.eval_seq_len)
        val, context = self.run.val, self.hp.eval_seq_len
        return pg.total(pg.score(self.model, val.tokens, self.windows, context, batch, self.run.ranks), val.bytes).bpb

    @functools.cached_property
    def calibration(self) -> pg.Calibration:
        """With all that any settings need, in one pass."""
        every = dict(gptq_enabled=True, gptq_head_enabled=True, quant="rd", projection_bits=8)
        run = self.run._replace(hp=dataclasses.replace(self.hp, **every))
        return pg.calibrate(run, self.weights, pg.calibration_texts(run))

    def exporter(self, settings: Mapping[str, str]) -> pg.Exporter:
        """With these settings in place of the defaults."""
        hp = pg.Hyperparameters.from_env(settings, dataclasses.asdict(self.hp))
        calibration = self.calibration if hp.calibrates else pg.Calibration()
        if not hp.gptq_head_enabled:
            blocks = {n: h for n, h in calibration.hessians.items() if pg.row_of(n).storage.reconstructed}
            calibration = calibration._replace(hessians=blocks)
        return pg.Exporter(self.run._replace(hp=hp), self.weights, calibration)

    def landings(self, settings: Mapping[str, str], copies: int) -> list[int]:
        """Bytes left below the cap by every fit of perturbed weights; negative above it."""
        generator, left, weights = torch.Generator().manual_seed(0), [], self.weights
        for _ in range(copies):
            noise = {name: 1 + 0.02 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
            self.weights = {name: w * noise[name] for name, w in weights.items()}
            exporter = self.exporter(settings)
            unfitted = len(exporter.pack().blob)
            rooms = [int(share * unfitted) for share in (0.7, 0.9, 1.05)]
            left += [room - len(exporter.fit(room).blob) for room in rooms]
        self.weights = weights
        return left

    def lost(self, packed: pg.Packed, base: float) -> tuple[float, float]:
        """Thousandths of a bpb that the artifact's weights w + d lose, and their mirror images w - d."""
        there = {name: t.dequantize() for name, t in packed.tensors.items()}
        mirrored = {name: 2 * self.weights[name] - w for name, w in there.items()}
        return 1000 * (self.bpb(there) - base), 1000 * (self.bpb(mirrored) - base)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="what SAVE_WEIGHTS=1 wrote")
    parser.add_argument("settings", nargs="+", help="of a row, such as 'QUANT=rd COMPRESSOR=ans'")
    parser.add_argument("--data", required=True)
    parser.add_argument("--unfitted", action="store_true", help="do not fit the later rows to the first one's bytes")
    parser.add_argument("--bytes", type=int, metavar="N", help="fit every row to so many bytes")
    parser.add_argument("--landings", type=int, metavar="N", help="fit N perturbed copies instead of scoring")
    parser.add_argument("--calibration-tokens", type=int, default=262_144)
    arguments = parser.parse_args()
    for word in " ".join(arguments.settings).split():
        if "=" not in word:
            parser.error(f"{word} is no NAME=value")
    try:
        bench = Bench(arguments.weights, arguments.data, arguments.calibration_tokens)
        rows = [(text, dict(word.split("=", 1) for word in text.split())) for text in arguments.settings]
        if arguments.landings:
            for text, settings in rows:
                left = bench.landings(settings, arguments.landings)
                inside = sum(0 <= bytes_left <= pg.FIT_WINDOW for bytes_left in left)
                bounds = f"{min(left)} to {max(left)} bytes left"
                print(f"| `{text}` | {inside} of {len(left)} inside | {bounds} |", flush=True)
            return 0
        base = bench.bpb(bench.weights)
        print(f"float {base:.6f} bpb; lost: thousandths of a bpb")
        print("| settings | factor | bytes | left | lost at w + d | lost at w - d | mean | less |\n|" + 8 * "---|")
        room, first = arguments.bytes, None
        for text, settings in rows:
            exporter = bench.exporter(settings)
            packed = exporter.pack() if room is None or arguments.unfitted else exporter.fit(room)
            size = len(packed.blob)
            room = room or size
            there, mirrored = bench.lost(packed, base)
            mean = (there + mirrored) / 2
            first = first or mean
            print(f"| `{text}` | {packed.factor:.3f} | {size:,} | {room - size:,}", end=" | ")
            print(f"{there:.3f} | {mirrored:.3f} | {mean:.3f} | {100 * (1 - mean / first):.0f} % |", flush=True)
    except (pg.UserError, pg.LimitError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
