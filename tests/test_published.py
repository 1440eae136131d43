"""The published systems, tiny: every recipe's techniques through a whole run that proves its own scores."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_ENV, Ran, jobs_in_world, run_here
from helpers import build_model, make_run, random_tokens, single_rank, tiny_hp, weights_of
from test_audit import audit_here

import train_gpt as pg

RECIPES = sorted((ROOT / "records" / "recipes").glob("pr*.env"))
# What a recipe says about sizes and clocks has to give way; what it says about techniques stays.
SMALL = dict(
    TINY_ENV,
    MLP_MULT="2.0",
    SWA_EVERY="1",
    LATE_QAT_THRESHOLD="0.6",
    ENABLE_LOOPING_AT="0.3",
    LOOP_START="1",
    LOOP_END="1",
    TTT_LORA_CHUNK="8",
    GPTQ_CALIBRATION_TOKENS="1024",
    EVAL_MAX_SECONDS="0",
    TTT_LR="0.01",
    FIT_TO_CAP="0",  # so small, any model takes the finest steps
)
SMALL.pop("SWA_ENABLED")


def techniques(path: Path) -> dict[str, str]:
    lines = path.read_text("utf-8").splitlines()
    values = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return values | {name: SMALL[name] for name in values if name in SMALL}


@pytest.fixture(scope="module", params=RECIPES, ids=lambda path: path.stem)
def ran(request, tiny_data, tmp_path_factory) -> tuple[str, Ran]:
    settings = SMALL | techniques(request.param) | dict(SAVE_WEIGHTS=1)
    return request.param.stem, run_here(tmp_path_factory.mktemp("run"), tiny_data, tiny=False, **settings)


def test_there_are_all_published_systems():
    assert [path.stem for path in RECIPES] == ["pr1127", "pr401", "pr401_shared_depth", "pr490", "pr714"]


def test_each_system_runs_to_its_end(ran):
    _, run = ran
    assert (run.code, run.err) == (0, "")
    scores = [score["val_bpb"] for name, score in run.result["scores"].items()]
    assert all(0 < score < 10 for score in scores)


@pytest.mark.slow
def test_the_scores_of_each_system_are_legal(ran, warm_reader):
    audited = audit_here(ran[1].folder / "artifact.pgolf", "--tokens", 600)
    assert audited.code == 0 and audited.failed == {}, audited.err


SAYS = dict(
    pr714=["late_qat:enabled", "legal_ttt ", "Serialized model int6+lzma"],
    pr401=["late_qat:enabled", "swa:start", "Serialized model int6+zstd"],
    pr401_shared_depth=["looping:enabled step:", "gptq:matrices:21 ", "swa:start", "Serialized model int6+zstd"],
    pr1127=["ttt:start documents:", "legal_ttt "],
    pr490=["gptq:matrices:18 ", "legal_ttt ", "ttt:start chunks:"],
)


def test_each_system_does_what_its_recipe_names(ran):
    name, run = ran
    for said in SAYS[name]:
        assert said in run.out, said


def test_its_artifact_gives_the_same_scores_again(ran, tiny_data, tmp_path):
    _, run = ran
    again = run_here(
        tmp_path, tiny_data, tiny=False, DEVICE="cpu", EVAL_ONLY=1, ARTIFACT_PATH=run.folder / "artifact.pgolf"
    )
    assert again.code == 0
    scores = {name: score for name, score in run.result["scores"].items() if not name.startswith("float_")}
    assert again.result["scores"] == scores


def test_its_saved_weights_give_the_same_artifact_again(ran, tiny_data, tmp_path):
    name, run = ran
    settings = SMALL | techniques(ROOT / "records" / "recipes" / f"{name}.env")
    again = run_here(
        tmp_path, tiny_data, tiny=False, EXPORT_ONLY=1, WEIGHTS_PATH=run.folder / "weights.pgolf", **settings
    )
    assert again.code == 0 and again.result["artifact_sha256"] == run.result["artifact_sha256"]
    if settings.get("GPTQ_ENABLED"):
        assert again.result["train_fingerprint"] == run.result["train_fingerprint"]
        assert run.result["train_seconds"] > run.result["phase_seconds"]["calibrate"] > 0


# -----------------------------------------------------------------------------
# TWO RANKS, AND A RUN THAT GOES ON
# -----------------------------------------------------------------------------

EVERYTHING = dict(VALUE_RESIDUAL=1, GATED_ATTENTION=1, MLP_KIND="swiglu", NUM_LOOPS=2, LOOP_START=1, LOOP_END=1,
                  ENABLE_LOOPING_AT=0.4, DECODER_LR_MULT=2, CROWN_Q=1000, ATTN_OUT_BITS=8, SKIP_GATES_ENABLED=1,
                  SPARSE_ATTN_GATE_ENABLED=1, SMEAR_GATE_KIND="token", PARALLEL_START_LAYER=2, MUON_ROW_NORMALIZE=1,
                  EMBED_WD=0.085, MIN_LR=0.05)  # fmt: skip


@pytest.fixture(scope="module")
def worlds(tiny_data, tmp_path_factory) -> dict[str, dict]:
    """Results of one and two ranks, trained without QAT and scored from one artifact in several ways."""
    folder = tmp_path_factory.mktemp("worlds")
    # As for the core: fake quantization and Adam's first steps amplify rounding.
    settings = dict(EVERYTHING, ITERATIONS=5, WARMDOWN_ITERS=4, LATE_QAT=0, ADAM_EPS=1e-4, SAVE_WEIGHTS=1, CROWN_Q=0,
                    VAL_LOSS_EVERY=0)  # fmt: skip
    alone = run_here(folder / "alone", tiny_data, "train", **settings)

    def job(name: str, **changes) -> dict[str, str]:
        return {k: str(v) for k, v in {**TINY_ENV, "DATA_PATH": tiny_data, "RUN_ID": name, **changes}.items()}

    jobs = [job("train", **settings)]
    passes = dict(lora=dict(TTT_PARAMS="lora", TTT_LORA_CHUNK="8", TTT_LR="0.05"),
                  carried=dict(TTT_PARAMS="lora", TTT_LORA_CHUNK="16", TTT_LORA_RESET="0", TTT_LR="0.001"),
                  phased=dict(TTT_PARAMS="lora", TTT_LORA_CHUNK="8", TTT_LR="0.05", PHASED_TTT_NUM_PHASES="2",
                              TTT_WARM_START_A="1", GLOBAL_TTT_LR="0.02", VAL_BATCH_SIZE="2048"),
                  hedge=dict(HEDGE_ENABLED="1", TTT_TEMPERATURE="1"),
                  sam=dict(TTT_SAM_RHO="0.05", TTT_OPTIMIZER="adamw", TTT_LR="0.0001", TTT_MAX_CHUNKS="2"))  # fmt: skip
    gptq = dict(EXPORT_ONLY="1", WEIGHTS_PATH=str(alone.folder / "weights.pgolf"), GPTQ_ENABLED="1", TTT_ENABLED="0")
    evaluation = dict(EVAL_ONLY="1", ARTIFACT_PATH=str(alone.folder / "artifact.pgolf"))
    named = {name: evaluation | changes for name, changes in passes.items()}
    named["gptq"] = gptq | dict(GPTQ_CALIBRATION_TOKENS="2048")
    named["rd"] = named["gptq"] | dict(QUANT="rd", FIT_TO_CAP="1", COMPRESSOR="ans", GPTQ_HEAD_ENABLED="1")
    ones = {name: run_here(folder / "alone", tiny_data, name, **changes) for name, changes in named.items()}
    jobs += [job(name, **changes) for name, changes in named.items()]
    _, codes = jobs_in_world(2, folder, jobs, timeout=300)  # of a machine that does other work, too
    assert codes == [[0] * len(jobs)] * 2
    two = {name: json.loads((folder / "runs" / name / "result.json").read_text()) for name in ("train", *named)}
    weights = [
        {name: t.data for name, t in pg.unpack_artifact((path / "weights.pgolf").read_bytes())[1].items()}
        for path in (alone.folder, folder / "runs" / "train")
    ]
    return dict(weights=weights, one={n: r.result for n, r in ones.items()} | dict(train=alone.result), two=two)


def test_two_ranks_train_the_same_weights(worlds):
    one, two = worlds["weights"]
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 2e-5


@pytest.mark.parametrize("name", ["lora", "carried", "phased", "hedge", "sam", "gptq", "rd"])
def test_two_ranks_give_the_same_scores(name, worlds):
    one, two = worlds["one"][name]["scores"], worlds["two"][name]["scores"]
    assert one.keys() == two.keys() and worlds["two"][name]["world_size"] == 2
    # Calibration sums in another order: a weight at the edge of a cell may fall to the other side.
    tolerance = 2e-4 if name in ("gptq", "rd") else 2e-6
    for label, score in one.items():
        assert two[label]["val_bpb"] == pytest.approx(score["val_bpb"], abs=tolerance)


def test_each_pass_is_another_one(worlds):
    scores = {name: result["scores"].get("legal_ttt", {}).get("val_bpb") for name, result in worlds["one"].items()}
    assert len({*scores.values()} - {None}) == 6


@pytest.mark.parametrize("step", [3, 9], ids=["before_the_loops", "with_loops"])
def test_a_run_with_every_technique_resumes_to_the_same_artifact(step, tiny_data, tmp_path, monkeypatch):
    settings = dict(EVERYTHING, VAL_LOSS_EVERY=0, TTT_ENABLED=0, EVAL_STRIDE=0, CHECKPOINT_EVERY=1e-6)
    whole = run_here(tmp_path / "whole", tiny_data, **settings)
    switched = int(re.search(r"looping:enabled step:(\d+)", whole.out)[1])
    assert 3 <= switched < 9
    save, stop = pg.Trainer.save, pg.Interrupted

    def interrupted(self):
        save(self)
        if self.step == step:
            raise stop(15)

    monkeypatch.setattr(pg.Trainer, "save", interrupted)
    first = run_here(tmp_path / "parts", tiny_data, "run", **settings)
    assert first.code == 143
    monkeypatch.setattr(pg.Trainer, "save", save)
    then = run_here(tmp_path / "parts", tiny_data, "run", **settings, RESUME="auto")
    assert then.code == 0 and f"resume:step:{step} " in then.out
    assert then.result["artifact_sha256"] == whole.result["artifact_sha256"]


@pytest.mark.slow
def test_gates_lanes_and_loops_pass_the_audit(tiny_data, tmp_path, warm_reader):
    ran = run_here(tmp_path, tiny_data, **EVERYTHING, LOOP_VECTORS=0, VAL_LOSS_EVERY=0)
    audited = audit_here(ran.folder / "artifact.pgolf", "--tokens", 600)
    assert audited.code == 0 and audited.failed == {}, audited.err


# -----------------------------------------------------------------------------
# SWITCHES
# -----------------------------------------------------------------------------


def test_loops_switch_on_once_at_their_share_of_the_steps(tiny_data, tmp_path):
    looped = dict(NUM_LOOPS=2, LOOP_START=1, LOOP_END=1, VAL_LOSS_EVERY=0, TTT_ENABLED=0, EVAL_STRIDE=0, WARMUP_STEPS=1)
    for share, step in ((0.5, 6), (0.34, 5), (0.0, 0)):
        run = run_here(tmp_path / str(share), tiny_data, **looped, ENABLE_LOOPING_AT=share)
        said = re.findall(r"looping:enabled step:(\d+) passes:5", run.out)
        assert said == [str(step)]


def test_the_reserve_is_no_time_to_switch_loops_on_in():
    """With half the clock kept for calibration, the loop ends at half of it."""
    looped = dict(num_loops=2, loop_start=1, loop_end=1, enable_looping_at=0.9, max_wallclock_seconds=10.0)
    trainer = pg.Trainer(make_run(tiny_hp(**looped, iterations=1000)))
    trainer.clock.reserve_ms, trainer.clock.elapsed_ms = 5000.0, 4600.0
    assert trainer.progress() == pytest.approx(0.92)


def test_the_vectors_of_loops_that_are_off_do_not_decay(tiny_data, tmp_path):
    class Text:
        tokens = random_tokens(2000)

        def read(self, start: int, count: int):
            return self.tokens[start % 1000 :][:count]

        def __len__(self) -> int:
            return 1000

    hp = tiny_hp(num_loops=2, loop_start=1, loop_end=1, enable_looping_at=0.5, adam_wd=0.9, val_loss_every=0)
    trainer = pg.Trainer(make_run(hp, Text()))
    before = trainer.model.loop_vectors.detach().clone()
    assert torch.allclose(before @ before.T, torch.eye(2), atol=1e-5)
    loader = pg.BatchLoader(Text(), hp, trainer.run.ranks, trainer.run.log)
    for _ in range(4):
        trainer.train_step(*loader.next())
    assert torch.equal(trainer.model.loop_vectors, before) and not trainer.model.looping
    trainer.train_step(*loader.next())
    assert trainer.model.looping and not torch.equal(trainer.model.loop_vectors, before)


def test_the_decoder_multiplier_scales_the_steps_and_the_decay_of_the_second_half(tiny_data):
    def steps(mult: float) -> dict[str, torch.Tensor]:
        hp = tiny_hp(num_layers=4, decoder_lr_mult=mult, muon_wd=0.5)
        model = build_model(hp)
        before, optimizers = weights_of(model), pg.Optimizers(model, hp, single_rank(hp), torch.float32, False)
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        optimizers.step(1.0, 0.9)
        return {name: w - before[name] for name, w in weights_of(model).items()}

    one, three = steps(1.0), steps(3.0)
    for name, step in one.items():
        decoder = pg.row_of(name).storage.reconstructed and int(name.split(".")[1]) >= 2
        torch.testing.assert_close(three[name], step * (3 if decoder else 1), rtol=1e-4, atol=1e-6)


def test_crown_q_adds_the_gradient_of_its_penalty():
    hp = tiny_hp()
    model = build_model(hp)
    qat = pg.QAT(model, hp)
    qat.refresh()
    penalty = sum((layer.weight.square() * layer.row_scale.square() / 12).mean() for layer in qat.layers.values())
    penalty.mul(7.0).backward()
    wanted = [layer.weight.grad.clone() for layer in qat.layers.values()]
    for layer in qat.layers.values():
        layer.weight.grad.fill_(1.0)
    qat.penalize(7.0)
    for layer, gradient in zip(qat.layers.values(), wanted, strict=True):
        torch.testing.assert_close(layer.weight.grad, 1 + gradient)
