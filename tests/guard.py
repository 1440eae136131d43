#!/usr/bin/env python3
"""Does this train_gpt.py still compute what another commit's does? For changes of structure, which may move no score.

    python tests/guard.py COMMIT [NAME ...]          every recipe shrunk, or those whose names hold one of the words

Each recipe, and settings that no recipe has, run at world sizes 1 and 2, in fp32 and bf16, with the script of COMMIT
and with the one of the working tree: the same data, the same machine, one thread. Their artifacts' tensors, decoded by
the present reader, and all scores must be equal to the bit; whether the files are is told too, as a header may change.
A fitted artifact makes room for a larger header: there, as many packs, a file in the window and about the same scores.
One line a run, exit code 1 where something differs.
"""

import itertools
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from conftest import ROOT, Ran, jobs_in_world, make_tiny_data
from test_published import SMALL, techniques

import train_gpt as pg

ROOM = 40_000  # bytes of a fitted artifact
VARIANTS = dict(
    core={},
    without_ttt=dict(TTT_ENABLED="0"),
    loops=dict(NUM_LOOPS="2", ENABLE_LOOPING_AT="0.3", LOOP_START="1", LOOP_END="1"),
    rd_ans_gptq=dict(QUANT="rd", COMPRESSOR="ans", GPTQ_ENABLED="1", GPTQ_CALIBRATION_TOKENS="1024"),
    sdclip=dict(QUANT="sdclip", CROWN_Q="100000", ATTN_BITS="5", EMBED_BITS="16"),
    untied=dict(TIE_EMBEDDINGS="0", MLP_KIND="swiglu", EMA_ENABLED="0", QAT_ENABLED="1"),
    hedge=dict(HEDGE_ENABLED="1", TTT_TEMPERATURE="1", TTT_PARAMS="scales", TTT_OPTIMIZER="adamw", TTT_SAM_RHO="0.1"),
    lora_carried=dict(TTT_PARAMS="lora", TTT_LORA_RESET="0", TTT_LORA_CHUNK="8"),
    lora_phased=dict(TTT_PARAMS="lora", TTT_LORA_CHUNK="8", PHASED_TTT_NUM_PHASES="2", TTT_WARM_START_A="1"),
    trellis=dict(QUANT="rd", COMPRESSOR="ans", GPTQ_ENABLED="1", GPTQ_HEAD_ENABLED="1", TRELLIS_ENABLED="1"),
    fitted=dict(FIT_TO_CAP="1", COMPRESSOR="ans"),
)


def configurations(words: list[str]) -> dict[str, dict[str, str]]:
    """Settings of every run by its name."""
    recipes = {path.stem: SMALL | techniques(path) for path in sorted((ROOT / "records" / "recipes").glob("*.env"))}
    recipes["frontier"]["PARALLEL_START_LAYER"] = "2"  # of three layers
    every = recipes | {name: SMALL | changes for name, changes in VARIANTS.items()}
    here = dict(DEVICE="cpu", COMPILE="0", CASEOPS_ENABLED="auto", SAVE_WEIGHTS="0", RUN_ID="-")
    named = {
        f"{name} {dtype}": settings | here | dict(DTYPE=dtype)
        for (name, settings), dtype in itertools.product(every.items(), ("fp32", "bf16"))
    }
    return {name: settings for name, settings in named.items() if not words or any(word in name for word in words)}


def run_all(root: Path, size: int, runs: dict[str, dict[str, str]], data: Path, out: Path) -> dict[str, Ran]:
    """Every run with the script in `root`, in one start of torchrun."""
    out.mkdir(parents=True)
    ids = {name: name.replace(" ", "-") for name in runs}
    code = (root / "train_gpt.py").stat().st_size
    jobs = [s | dict(RUN_ID=ids[name], OUT_DIR=str(out), DATA_PATH=str(data)) for name, s in runs.items()]
    for job in jobs:
        if job["FIT_TO_CAP"] == "1":
            job["ARTIFACT_CAP_BYTES"] = str(code + ROOM)  # the same room, whatever the code weighs
    _, codes = jobs_in_world(size, out, jobs, root, timeout=3600)
    return {
        name: Ran(max(code), "", "", out / "runs" / ids[name], out / "logs" / f"{ids[name]}.txt")
        for name, *code in zip(runs, *codes, strict=True)
    }


def differences(then: Ran, now: Ran) -> Iterator[str]:
    """In words; nothing where tensors and scores are equal to the bit."""
    if then.code or now.code:
        yield f"exit codes {then.code} and {now.code}"
        return
    (header, theirs), (our_header, ours) = (pg.unpack_artifact(ran.artifact) for ran in (then, now))
    fits = [fit_of(ran) for ran in (then, now)]
    if (
        all(fits)
        and header["architecture"] | header["evaluation"] != our_header["architecture"] | our_header["evaluation"]
    ):
        yield from fit_differences(then, now, *fits)
        return
    if theirs.keys() != ours.keys():
        yield f"other tensors: {sorted(theirs.keys() ^ ours.keys())}"
    for name in theirs.keys() & ours.keys():
        a, b = theirs[name], ours[name]
        beside = [(a.scale, b.scale), (a.columns, b.columns)]
        scales = all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in beside)
        if (a.storage, a.data.shape) != (b.storage, b.data.shape) or not torch.equal(a.data, b.data) or not scales:
            yield f"{name} differs"
    if then.result["scores"] != now.result["scores"]:
        yield f"scores {then.result['scores']} and {now.result['scores']}"


def fit_of(ran: Ran) -> tuple[int, int] | None:
    """(packs, bytes left below the cap) of a fitted artifact."""
    text = ran.log.read_text("utf-8")
    left = re.search(r"^fit:factor:\S+ left:(-?\d+)$", text, re.MULTILINE)
    return (len(re.findall(r"^fit:\d+ factor:", text, re.MULTILINE)), int(left[1])) if left else None


def fit_differences(then: Ran, now: Ran, old_fit: tuple[int, int], new_fit: tuple[int, int]) -> Iterator[str]:
    """Of two artifacts that were fitted beside headers of different lengths."""
    (old_packs, old_left), (packs, left) = old_fit, new_fit
    if packs > old_packs:
        yield f"{packs} packs to fit, {old_packs} before"
    if (0 <= left <= pg.FIT_WINDOW) != (0 <= old_left <= pg.FIT_WINDOW):
        yield f"{left} bytes left of the cap, {old_left} before"
    old_scores, scores = then.result["scores"], now.result["scores"]
    far = [k for k in old_scores if not math.isclose(old_scores[k]["val_loss"], scores[k]["val_loss"], rel_tol=2e-3)]
    if old_scores.keys() != scores.keys() or far:
        yield f"scores {old_scores} and {scores}"


def main(commit: str, words: list[str]) -> int:
    runs, broken = configurations(words), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        old, new = folder / "old", folder / "new"
        script = subprocess.run(["git", "show", f"{commit}:train_gpt.py"], cwd=ROOT, capture_output=True, check=True)
        for place, source in ((old, script.stdout), (new, (ROOT / "train_gpt.py").read_bytes())):
            place.mkdir()
            (place / "train_gpt.py").write_bytes(source)  # a copy: the working tree may change meanwhile
        data = make_tiny_data(folder / "data")
        for size in (1, 2):
            then = run_all(old, size, runs, data, folder / f"then{size}")
            now = run_all(new, size, runs, data, folder / f"now{size}")
            for name in runs:
                found = list(differences(then[name], now[name]))
                broken += bool(found)
                same = "same" if not found and then[name].artifact == now[name].artifact else "other"
                print(f"guard:{name} world:{size} {'DIFFERS ' + '; '.join(found) if found else f'equal file:{same}'}")
    print(f"guard: {2 * len(runs) - broken} of {2 * len(runs)} runs equal to {commit}")
    return broken > 0


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
