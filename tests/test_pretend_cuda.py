"""Whole runs on a pretended GPU: nothing is left on the host that belongs on the device, or the other way round."""

import pytest
import torch
from conftest import run_here
from pretend_cuda import OnGPU, pretended
from test_audit import audit_here, audit_hp, split, write_artifact

import train_gpt as pg

LORA = dict(TTT_PARAMS="lora", TTT_OPTIMIZER="adamw", TTT_MOMENTUM=0, TTT_LORA_CHUNK=32)
RUNS = {
    "frontier": LORA
    | dict(TTT_LORA="q,k,v,o,mlp,head", TTT_WARM_START_A=1, PHASED_TTT_NUM_PHASES=2, DOCUMENT_MASK=1, TTT_MAX_CHUNKS=0)
    | dict(QUANT="rd", GPTQ_ENABLED=1, GPTQ_HEAD_ENABLED=1, GPTQ_CALIBRATION_TOKENS=1024, TRELLIS_ENABLED=1)
    | dict(COMPRESSOR="ans", PROJECTION_BITS=8, CONTROL_BITS=16, SHUFFLE_SEQUENCES=1, SWA_ENABLED=0)
    | dict(NUM_LOOPS=1, LOOP_START=0, LOOP_END=0, ENABLE_LOOPING_AT=0.5, NUM_LAYERS=4, PARALLEL_START_LAYER=3)
    | dict(SKIP_GATES_ENABLED=1, SPARSE_ATTN_GATE_ENABLED=1, SMEAR_GATE_KIND="token", GATE_WINDOW=4),
    "stream": dict(HEDGE_ENABLED=1, TTT_TEMPERATURE=1, TTT_SAM_RHO=0.01, GPTQ_ENABLED=1, GPTQ_CALIBRATION_TOKENS=1024)
    | dict(MLP_KIND="swiglu", VALUE_RESIDUAL=1, GATED_ATTENTION=1, CHECKPOINT_EVERY=1e-6),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_scores_on_a_gpu_as_on_the_cpu(name, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(pg, "remove", lambda paths, log: None)  # checkpoints stay when their run is done
    settings, ran = RUNS[name] | dict(ATTENTION="sdpa", COMPILE=0, TRAIN_LOG_EVERY=1), {}
    ran["cpu"] = run_here(tmp_path, tiny_data, "cpu", **settings)
    with pretended():
        ran["cuda"] = run_here(tmp_path, tiny_data, "cuda", **settings, DEVICE="auto")
        for checkpoint in pg.find_checkpoints(tmp_path / "runs/cuda")[:1]:
            ran["again"] = run_here(tmp_path, tiny_data, "again", **settings, DEVICE="auto", RESUME=checkpoint)
    assert ("again" in ran) == ("CHECKPOINT_EVERY" in settings)
    assert all(each.code == 0 for each in ran.values()), [each.err for each in ran.values()]
    assert ran["cuda"].result["device"] == "Pretended GPU"
    assert "again" not in ran or 0 < ran["again"].result["resumed_at"][0] < 12
    for place, each in ran.items():
        found, wanted = ([score["val_loss"] for score in r.result["scores"].values()] for r in (each, ran["cpu"]))
        assert found == pytest.approx(wanted, abs=2e-3), place


def test_a_short_evaluation_on_a_gpu_is_not_compiled_and_the_log_says_so(tiny_data, tmp_path, monkeypatch):
    """torch.compile replaced by what it makes faster: it is asked for the training's model and for none that scores."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: (asked.append(f), f)[1])
    with pretended():
        ran = run_here(tmp_path, tiny_data, "auto", ATTENTION="sdpa", COMPILE="auto", DEVICE="auto")
    assert ran.code == 0 and sum(isinstance(f, torch.nn.Module) for f in asked) == 1
    assert "\ncompile:auto training:1 whole:0 sliding:0 learning:0\n" in ran.out


def test_the_auditor_passes_on_a_gpu(tiny_data, tmp_path):
    data = split(tmp_path / "data", tiny_data)
    hp = audit_hp(ttt_params="lora", ttt_optimizer="adamw", ttt_momentum=0.0, ttt_lora_chunk=8)
    path = write_artifact(tmp_path / "runs/a/artifact.pgolf", hp, next(data.glob("*.model")))
    with pretended():
        ran = audit_here(path, "--data", data, "--tokens", 130, environ=dict(DEVICE="cuda", COMPILE="0"))
    assert ran.failed == {} and ran.code == 0, ran.err


def test_what_lies_on_the_host_does_not_meet_what_lies_on_the_gpu():
    with pretended():
        w, host = torch.ones(2, 3, device="cuda", requires_grad=True), torch.ones(3)
        for mixed in (lambda: w + host, lambda: torch.cat([w[0], host]), lambda: host[w[0].long()], w.detach().numpy):
            with pytest.raises((RuntimeError, TypeError), match="cuda:0"):
                mixed()
        y = (w * host.to(w.device) + 1).sum() * torch.tensor(2.0)
        y.backward()
        module = torch.nn.Linear(3, 3).to("cuda")
        for x in (w, y, w.grad, w[torch.tensor([0])], torch.empty_like(w), module.weight, module(w)):
            assert isinstance(x, OnGPU) and x.device.type == "cuda"
        assert w.cpu().device.type == "cpu" and w.detach().cpu().numpy().sum() == 6
        assert torch.equal(w.grad.cpu(), torch.full((2, 3), 2.0)) and w.grad[0, 0].item() == 2
    assert torch.ones(1).device.type == "cpu" and not torch.cuda.is_available()


def test_a_tensor_left_on_the_host_fails_the_run(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(pg, "gather", lambda *args, gather=pg.gather: gather(*args[:-1], torch.device("cpu")))
    with pretended(), pytest.raises(RuntimeError, match="on cuda:0 and cpu"):
        run_here(tmp_path, tiny_data, DEVICE="cuda", ITERATIONS=1, WARMDOWN_ITERS=0, COMPILE=0)


def test_a_batch_that_cannot_be_pinned_ends_the_run(tiny_data, tmp_path, monkeypatch):
    def fail(_):
        raise RuntimeError("CUDA error: no memory to lock")

    with pretended():
        monkeypatch.setattr(torch.Tensor, "pin_memory", fail)
        ran = run_here(tmp_path, tiny_data, DEVICE="cuda", COMPILE=0, WARMUP_STEPS=0)
    assert ran.code == 2 and "no memory to lock" in ran.err and len(ran.err.splitlines()) == 1
