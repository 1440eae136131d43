"""All that a run compiles: no break in a graph, the eager numbers, and nothing compiled after the warm-up.

By dynamo and autograd with fullgraph=True, as on CUDA; the last stage, which makes kernels, is in the slow tests. That
every branch of the model compiles, forward and backward, is tests/test_gpu_battery.py's.
"""

import functools
import itertools

import numpy as np
import pytest
import torch
from helpers import build_model, make_run, random_tokens, tiny_hp, weights_of
from test_model import FRONTIER, NOTHING
from torch._dynamo.utils import counters

import train_gpt as pg


@pytest.fixture(autouse=True)
def ending(backend, monkeypatch):
    """In this backend torch.compile ends; no graph of another test counts."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def cases(quick: dict, **slow: dict):
    """The first in every test run; with kernels that one alone."""
    listed = [pytest.param("aot_eager", quick, id="quick")]
    listed += [pytest.param("aot_eager", case, id=name, marks=pytest.mark.slow) for name, case in slow.items()]
    listed += [pytest.param("inductor", quick, id="inductor", marks=pytest.mark.slow)]
    return pytest.mark.parametrize("backend, changes", listed)


def graphs() -> int:
    """Compiled so far in this test."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


SMALL = dict(NOTHING, num_layers=1, num_kv_heads=4, muon_backend_steps=2)


def trained(hp: pg.Hyperparameters) -> tuple[pg.Trainer, int, dict[tuple[bool, ...], float]]:
    """A trainer after two steps and a validation at each combination of its switches; the graphs of its warm-up; the
    loss of each validation."""
    trainer = pg.Trainer(make_run(hp))
    trainer.warm_up()
    warmed, losses = graphs(), {}
    tokens = torch.from_numpy(random_tokens(hp.train_batch_tokens + 1).astype(np.int64))
    batch = [part.view(-1, hp.train_seq_len) for part in (tokens[:-1], tokens[1:])]
    trainer.clock.resume()
    for switches in itertools.product(*(switch.states for switch in trainer.switches)):
        trainer.qat.refresh()
        trainer.set_switches(switches)
        for _ in range(2):
            trainer.train_step(*batch)
        losses[switches] = trainer.validate_raw().loss
    trainer.clock.pause()
    return trainer, warmed, losses


@cases(
    dict(SMALL, num_loops=1, loop_start=0, loop_end=0),
    frontier=dict(FRONTIER, num_layers=5, parallel_start_layer=3, micro_batch_tokens=16),
    untied=dict(num_layers=2, tie_embeddings=False, mlp_kind="swiglu", gated_attention=True, ve_layers="1"),
    qat=dict(value_residual=True, mlp_kind="star_relu", late_qat=False, qat_enabled=True),
)
def test_a_training_compiles_all_of_it_in_its_warm_up(changes):
    """To the weights of an eager one; each switch has graphs of its own."""
    settings = dict(warmup_steps=1, train_batch_tokens=32, matrix_lr=1e-3, adam_eps=1e-4) | changes
    eager, none, wanted = trained(tiny_hp(**settings))
    trainer, warmed, found = trained(tiny_hp(**settings, compile="1"))
    assert (none, graphs()) == (0, warmed)
    states = {switch.name: len(switch.states) for switch in trainer.switches}
    trains, scores = len(wanted), states.get("looping", 1)
    assert warmed == trains + scores + len(trainer.optimizers.banks)
    assert found == pytest.approx(wanted, abs=1e-5, rel=0)
    assert len({f"{loss:.4f}" for loss in wanted.values()}) == trains
    for (name, ours), theirs in zip(trainer.model.named_parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, msg=name)


@cases(
    dict(SMALL, num_layers=2, ttt_freeze_blocks=1, ttt_temperature=True),
    hedge=dict(FRONTIER, hedge_enabled=True, ttt_epochs=1),
    phases=dict(ttt_params="lora", ttt_lora_chunk=4, phased_ttt_num_phases=2, ttt_epochs=1),
)
def test_an_evaluation_compiles_all_of_it_in_its_warm_up(changes):
    """Wide and narrow windows, several temperatures, training with frozen weights: to the eager scores."""
    stored = {n: pg.Stored("fp32", w, None) for n, w in weights_of(build_model(tiny_hp(**changes))).items()}
    tokens, evaluations = random_tokens(150, seed=1), []
    for compile in ("0", "1"):
        run = make_run(tiny_hp(**changes, compile=compile, save_scores=True), tokens=tokens)
        evaluation = pg.Evaluation(run, stored)
        evaluation.warm_up()
        evaluations.append((evaluation, graphs(), evaluation.score_all()))
    (eager, none, wanted), (evaluation, warmed, found) = evaluations
    assert none == 0 < warmed == graphs()
    assert list(found) == list(wanted) == list(evaluation.passes) and len(found) == 3
    for name, nats in eager.saved.items():
        np.testing.assert_allclose(evaluation.saved[name], nats, atol=1e-4, rtol=0)
    losses = [score.loss for score in wanted.values()]
    assert min(abs(a - b) for a, b in itertools.combinations(losses, 2)) > 1e-3  # what another pass would score


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor"])
def test_a_compiled_gradient_of_a_table_repeats_on_a_cpu(backend, four_threads):
    """Threads that add to the same row as they come make another sum each time."""
    hp = tiny_hp(**SMALL, train_seq_len=512)
    model = build_model(hp)
    tokens = torch.from_numpy(random_tokens(64 * 512 + 1) % 16)
    inputs, targets = (part.view(64, 512).long() for part in (tokens[:-1], tokens[1:]))
    forward = pg.compiled(model, True)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        forward(inputs, targets).sum().backward()
        return model.tok_emb.weight.grad.clone()

    first = gradient()
    assert all(torch.equal(first, gradient()) for _ in range(4))
