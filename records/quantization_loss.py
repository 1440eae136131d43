"""bpb lost to quantizing the block matrices, without the luck of one draw.

    python records/quantization_loss.py runs/ID/weights.pgolf --data $DATA_PATH --bits 6 5 4

A rounding error d moves the loss by g·d + ½ d·H·d + …. The first term has no sign of its own: on a fixed text it may
hide what is lost, or feign a gain. The loss at w + d and at w - d has it with opposite signs, so their mean is the
second term, which is what a better quantizer lowers. All in fp32: bf16 activations move a score as much as int6 does.
"""

import argparse
import dataclasses
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
        hp = dataclasses.replace(hp, dtype="fp32", device="cpu", data_path=data, gptq_enabled=True)
        self.hp = hp = dataclasses.replace(hp, gptq_calibration_tokens=calibration_tokens)
        self.weights = {name: t.dequantize() for name, t in tensors.items()}
        self.names = [name for name in self.weights if pg.tensor_class(name) in pg.MATRICES]
        self.ranks, self.val = pg.Ranks(hp, {}), pg.load_validation(hp)
        stream = pg.TokenStream(pg.find_shards(hp, "train"), hp.vocab_size)
        attend = pg.sdpa
        self.run = pg.Run(
            hp, self.ranks, pg.Log(None), pg.Phases(self.ranks.device), torch.float32, attend, False, self.val, stream,
            Path(), b"", pg.Signals(), None,
        )  # fmt: skip
        self.model = self.run.build(hp.eval_seq_len)
        self.windows = pg.plan_windows(self.val.targets, hp.eval_seq_len, hp.eval_seq_len)

    def bpb(self, changed: Mapping[str, Tensor]) -> float:
        """Of the float weights with these in place of theirs."""
        self.model.load_state_dict(self.weights | changed)
        batch = pg.score_batch_windows(self.hp, self.ranks, self.hp.eval_seq_len)
        nats = pg.score(self.model, self.val.tokens, self.windows, self.hp.eval_seq_len, batch, self.ranks)
        return pg.total(nats, self.val.bytes).bpb

    def hessians(self) -> dict[str, Tensor]:
        return pg.calibrate(self.run, self.weights, pg.calibration_texts(self.run))

    def quantized(self, kind: str, hessians: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The block matrices on that grid."""
        gptq = {name: pg.GPTQ(hessians[name], self.hp) for name in self.names} if hessians is not None else {}
        return {n: pg.store(n, self.weights[n], kind, gptq.get(n)).dequantize() for n in self.names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="what SAVE_WEIGHTS=1 wrote")
    parser.add_argument("--data", required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[6], choices=range(3, 9))
    parser.add_argument("--calibration-tokens", type=int, default=262_144)
    arguments = parser.parse_args()
    try:
        bench = Bench(arguments.weights, arguments.data, arguments.calibration_tokens)
    except pg.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    base, hessians = bench.bpb({}), bench.hessians()
    print(f"float {base:.6f} bpb; the columns are thousandths of a bpb lost")
    print("| bits | quantizer | at w + d | at w - d | mean | less |\n|---|---|---|---|---|---|")
    for bits in arguments.bits:
        plain = None
        for quantizer, given in (("GPTQ-lite", None), ("full GPTQ", hessians)):
            there = bench.quantized(f"int{bits}", given)
            mirrored = {name: 2 * bench.weights[name] - w for name, w in there.items()}
            lost = [1000 * (bench.bpb(weights) - base) for weights in (there, mirrored)]
            mean = sum(lost) / 2
            less = f"{100 * (1 - mean / plain):.0f} %" if plain else ""
            plain = plain or mean
            print(f"| {bits} | {quantizer} | {lost[0]:.3f} | {lost[1]:.3f} | {mean:.3f} | {less} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
