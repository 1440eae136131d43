"""Muon over banks, AdamW, schedules and weight averages against plain references."""

import contextlib
import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers import build_model, make_run, random_tokens, single_rank, tiny_hp, weights_of

import train_gpt as pg


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def optimizers_for(model, hp) -> pg.Optimizers:
    return pg.Optimizers(model, hp, single_rank(hp), torch.float32, False)


def give_gradients(model, seed: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gradients = {}
    for name, p in model.named_parameters():
        gradients[name] = size * torch.randn(p.shape, generator=generator)
        p.grad = gradients[name].clone()
    return gradients


def is_muon(name: str) -> bool:
    return name.startswith("blocks.") and name.endswith(".weight")


# Newton-Schulz


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48), (8, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_is_nearly_orthogonal(shape, dtype):
    u, _, v = torch.linalg.svd(normal(4, *shape), full_matrices=False)
    spectrum = torch.linspace(0.05, 1.0, min(shape)) * 7.0
    x = (u * spectrum) @ v
    out = pg.newton_schulz(x.to(dtype), 5)
    assert out.dtype == dtype and out.shape == x.shape
    values = torch.linalg.svdvals(out.float())
    assert values.min() > 0.6 and values.max() < 1.3
    # It is the factor of x itself: the same singular vectors, hence a large inner product with U V.
    cosine = (out.float() * (u @ v)).sum((1, 2)) / (out.float().norm(dim=(1, 2)) * math.sqrt(min(shape)))
    assert cosine.min() > 0.95


def test_newton_schulz_of_a_batch_equals_one_by_one():
    x = normal(5, 12, 20)
    together = pg.newton_schulz(x, 5)
    for i in range(5):
        torch.testing.assert_close(together[i], pg.newton_schulz(x[i : i + 1], 5)[0], atol=1e-5, rtol=1e-5)


def test_newton_schulz_of_zeros_is_zeros():
    x = torch.zeros(2, 6, 4)
    x[1] = normal(6, 4)
    out = pg.newton_schulz(x, 5)
    assert not out[0].any() and out.isfinite().all() and out[1].any()


# Banks


def views_hold(optimizers: pg.Optimizers) -> bool:
    """Every bank parameter is, by data pointer, its slice of the bank."""
    return all(
        p.data_ptr() == bank.weight[i].data_ptr() and p.dtype == bank.weight.dtype and p.shape == bank.weight[i].shape
        for bank in optimizers.banks
        for i, p in enumerate(bank.parameters)
    )


def test_banks_take_over_the_weights_unchanged_and_move_them():
    model = build_model()
    before = weights_of(model)
    optimizers = optimizers_for(model, tiny_hp())
    assert views_hold(optimizers)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert len({tuple(bank.weight.shape[1:]) for bank in optimizers.banks}) == len(optimizers.banks)
    for bank in optimizers.banks:
        bank.weight.add_(1.0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] + 1.0 if is_muon(name) else before[name])


def test_views_survive_loading_swapping_and_steps():
    hp = tiny_hp()
    model = build_model(hp)
    optimizers, averages = optimizers_for(model, hp), pg.Averages(model, hp)
    model.load_state_dict(weights_of(build_model(hp, seed=9)))
    assert views_hold(optimizers)
    with averages.swapped_in([torch.zeros_like(p) for p in model.parameters()]):
        assert views_hold(optimizers) and not optimizers.banks[0].weight.any()
    assert optimizers.banks[0].weight.any()
    give_gradients(model, 0)
    optimizers.step(1.0, 0.9)
    assert views_hold(optimizers)


def test_the_pointer_check_sees_views_that_a_later_move_broke():
    model = build_model()
    optimizers = optimizers_for(model, tiny_hp())
    model.to(torch.float64).to(torch.float32)
    assert not views_hold(optimizers)


def test_the_trainers_banks_averages_and_model_are_one_memory():
    trainer = pg.Trainer(make_run(tiny_hp()))
    live = [w.data_ptr() for w in trainer.averages.live]
    assert views_hold(trainer.optimizers) and live == [p.data_ptr() for p in trainer.model.parameters()]


# One step


def reference_polar(u: torch.Tensor) -> torch.Tensor:
    x = u / (u.norm() + 1e-7)
    if u.size(0) > u.size(1):
        x = x.T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x.T if u.size(0) > u.size(1) else x


@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "rows"])
@pytest.mark.parametrize("size", [1.0, 1e-4], ids=["clipped", "unclipped"])
def test_muon_steps_follow_the_formulas_matrix_by_matrix(size, normalized):
    hp = tiny_hp(matrix_lr=0.1, muon_wd=0.3, grad_clip_norm=0.3, muon_row_normalize=normalized)
    model = build_model(hp)
    optimizers, weights = optimizers_for(model, hp), weights_of(model)
    momenta = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step, (scale, mu) in enumerate([(1.0, 0.8), (0.5, 0.9), (0.25, 0.95)]):
        gradients = give_gradients(model, step, size)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        clip = min(1.0, 0.3 / norm)
        assert (clip < 1) == (size == 1.0)
        optimizers.step(scale, mu)
        for name, p in model.named_parameters():
            if not is_muon(name):
                continue
            g = clip * gradients[name]
            momenta[name] = mu * momenta[name] + g
            u = g + mu * momenta[name]
            x = reference_polar(u / u.norm(dim=1, keepdim=True) if normalized else u)
            lr = 0.1 * scale
            rows, cols = g.shape
            weights[name] = (1 - lr * 0.3) * weights[name] - lr * math.sqrt(max(1, rows / cols)) * x
            torch.testing.assert_close(
                p.detach(), weights[name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n} {m}"
            )


ROWS = [
    (("tok_emb.weight", "bigram.table.weight", "value_embedding.table.weight"), "tied_embed_lr", "embed_lr"),
    (("lm_head.weight",), "head_lr", "head_lr"),
]


@pytest.mark.parametrize("tied, table_wd", [(True, -1.0), (False, -1.0), (True, 0.3)])
def test_everything_else_follows_torchs_adamw_on_clipped_gradients(tied, table_wd):
    rates = dict(tied_embed_lr=0.01, embed_lr=0.02, head_lr=0.03, scalar_lr=0.04)
    hp = tiny_hp(
        tie_embeddings=tied,
        adam_wd=0.1,
        beta1=0.8,
        beta2=0.9,
        adam_eps=1e-6,
        grad_clip_norm=0.3,
        embed_wd=table_wd,
        **rates,
    )
    model, twin = build_model(hp), build_model(hp)
    optimizers = optimizers_for(model, hp)
    groups = []
    for name, p in twin.named_parameters():
        if is_muon(name):
            continue
        named = [tied_lr if tied else untied_lr for names, tied_lr, untied_lr in ROWS if name in names]
        own_decay = dict(weight_decay=table_wd) if name in ROWS[0][0] and table_wd >= 0 else {}
        groups.append(dict(params=[p], base=rates[named[0] if named else "scalar_lr"], **own_decay))
    adam = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    for step, scale in enumerate((1.0, 0.7, 0.1)):
        gradients = give_gradients(model, step, 0.1)
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        for name, p in twin.named_parameters():
            p.grad = gradients[name] * min(1.0, 0.3 / norm.item())
        for group in adam.param_groups:
            group["lr"] = group["base"] * scale
        adam.step()
        optimizers.step(scale, 0.9)
        for name, p in model.named_parameters():
            if not is_muon(name):
                torch.testing.assert_close(
                    p, twin.get_parameter(name), atol=1e-6, rtol=1e-5, msg=lambda m, n=name: n + m
                )


def test_the_clip_norm_counts_every_parameter_once():
    for size in (1.0, 1e-5):
        hp = tiny_hp()
        model = build_model(hp)
        optimizers = optimizers_for(model, hp)
        norm = torch.cat([g.flatten() for g in give_gradients(model, 0, size).values()]).norm().item()
        for bank in optimizers.banks:
            bank.reduce_gradient().wait()
        measured = optimizers.gradient_norm(torch.cat([p.grad.flatten() for p in optimizers.small])).item()
        assert measured == pytest.approx(norm, rel=1e-4)


def test_a_step_drops_the_gradients():
    model = build_model()
    optimizers = optimizers_for(model, tiny_hp())
    give_gradients(model, 0)
    optimizers.step(1.0, 0.9)
    assert all(p.grad is None for p in model.parameters())


def test_a_zero_gradient_matrix_only_decays():
    hp = tiny_hp(matrix_lr=0.1, muon_wd=0.5)
    model = build_model(hp)
    optimizers, before = optimizers_for(model, hp), weights_of(model)
    gradients = give_gradients(model, 0)
    model.blocks[0].attn.q.weight.grad.zero_()
    optimizers.step(1.0, 0.9)
    name = "blocks.0.attn.q.weight"
    torch.testing.assert_close(model.get_parameter(name).detach(), before[name] * (1 - 0.05))
    assert len(gradients) == len(before)


def test_reset_gives_a_fresh_optimizer():
    hp = tiny_hp()
    used, fresh = build_model(hp), build_model(hp)
    dirty, clean = optimizers_for(used, hp), optimizers_for(fresh, hp)
    start = weights_of(fresh)
    for seed in range(3):
        give_gradients(used, 100 + seed)
        dirty.step(0.7, 0.9)
    used.load_state_dict(start)
    dirty.reset()
    for seed in range(2):
        for model, optimizers in ((used, dirty), (fresh, clean)):
            give_gradients(model, seed)
            optimizers.step(0.5, 0.9)
        assert all(torch.equal(p, fresh.get_parameter(name)) for name, p in used.named_parameters())
    assert any(not torch.equal(start[name], p) for name, p in used.named_parameters())


# The trainer's warm-up and its loop


def step_batch(hp, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.from_numpy(random_tokens(hp.train_batch_tokens + 1, seed=seed).astype(np.int64))
    return tokens[:-1].view(-1, hp.train_seq_len), tokens[1:].view(-1, hp.train_seq_len)


@pytest.mark.parametrize("qat", [dict(), dict(late_qat=False), dict(qat_enabled=True)])
def test_warm_up_leaves_no_trace(qat):
    hp = tiny_hp(warmup_steps=2, **qat)
    warm, cold = pg.Trainer(make_run(hp)), pg.Trainer(make_run(hp))
    steps = []
    step = warm.optimizers.step
    warm.optimizers.step = lambda *args: (steps.append(args), step(*args))[1]
    warm.warm_up()
    assert len(steps) == 2 * (1 + hp.late_qat - hp.qat_enabled * hp.late_qat)
    assert all(torch.equal(p, cold.model.get_parameter(name)) for name, p in warm.model.named_parameters())
    assert not any(bank.momentum.any() for bank in warm.optimizers.banks) and not warm.optimizers.adam.state
    assert views_hold(warm.optimizers) and all(p.grad is None for p in warm.model.parameters())
    for seed in range(2):
        losses = [trainer.train_step(*step_batch(hp, seed)) for trainer in (warm, cold)]
        assert torch.equal(*losses)
    assert all(torch.equal(p, cold.model.get_parameter(name)) for name, p in warm.model.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(warm.averages.ema, cold.averages.ema, strict=True))


def test_micro_batches_do_not_change_a_training_step():
    weights = []
    for micro in (16, 32, 64):
        hp = tiny_hp(micro_batch_tokens=micro, grad_clip_norm=0.0)
        trainer = pg.Trainer(make_run(hp))
        losses = [trainer.train_step(*step_batch(hp, seed)).item() for seed in range(2)]
        weights.append((losses, trainer.model.tok_emb.weight.detach().clone()))
    for losses, table in weights[1:]:
        assert losses == pytest.approx(weights[0][0], rel=1e-5)
        torch.testing.assert_close(table, weights[0][1], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("source", ["ema", "raw"])
def test_what_is_exported_is_the_mean_of_the_snapshots(source):
    hp = tiny_hp(iterations=16, warmdown_iters=16, swa_every=1, swa_source=source, late_qat_threshold=0.5)
    trainer, snapshots, fake = pg.Trainer(make_run(hp)), [], []
    for step in range(16):
        trainer.train_step(*step_batch(hp, step))
        fake.append(trainer.qat.on)
        if (16 - step) / 16 < 0.2:
            chosen = trainer.averages.ema if source == "ema" else [p.detach() for p in trainer.model.parameters()]
            snapshots.append([w.clone() for w in chosen])
    assert len(snapshots) == 3 and trainer.averages.swa_samples == 3
    assert fake == [(16 - step) / 16 < 0.5 for step in range(16)]
    label, exported = trainer.exported_weights()
    assert label == "swa" and list(exported) == [name for name, _ in trainer.model.named_parameters()]
    for *samples, mean in zip(*snapshots, exported.values(), strict=True):
        torch.testing.assert_close(mean, torch.stack(samples).mean(0), atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(w, trainer.model.get_parameter(name)) for name, w in exported.items())


def test_scales_of_fake_quantization_are_searched_again_on_schedule():
    hp = tiny_hp(qat_enabled=True, iterations=64, warmdown_iters=0, matrix_lr=0.1)
    trainer, scales = pg.Trainer(make_run(hp)), []
    for step in range(pg.QAT_REFRESH_STEPS + 2):
        trainer.train_step(*step_batch(hp, step))
        scales.append(next(iter(trainer.qat.layers.values())).row_scale.clone())
    changed = [i for i in range(1, len(scales)) if not torch.equal(scales[i], scales[i - 1])]
    assert changed == [pg.QAT_REFRESH_STEPS]


# Schedule


def test_learning_rate_falls_linearly_to_the_last_step():
    hp = tiny_hp(iterations=100, warmdown_iters=40)
    expected = [min(1.0, (100 - i) / 40) for i in range(100)]
    assert [pg.lr_scale(i, hp, 0.0, None) for i in range(100)] == pytest.approx(expected)
    assert expected[60] == 1 and expected[61] < 1
    assert [pg.lr_scale(i, hp, 1e9, 5.0) for i in range(100)] == pytest.approx(expected), "there is no clock here"
    assert pg.lr_scale(99, tiny_hp(iterations=100, warmdown_iters=0), 0.0, None) == 1.0


def test_the_clock_brings_the_warmdown_forward():
    hp = tiny_hp(iterations=1000, warmdown_iters=40, max_wallclock_seconds=10.0)
    assert pg.lr_scale(0, hp, 9_999.0, None) == 1.0, "no step time is known yet"
    # 40 steps of 50 ms take 2 s: the warmdown begins 2 s before the end.
    assert pg.lr_scale(5, hp, 7_900.0, 50.0) == 1.0
    assert pg.lr_scale(5, hp, 9_000.0, 50.0) == pytest.approx(0.5)
    assert pg.lr_scale(5, hp, 9_500.0, 50.0) == pytest.approx(0.25)
    assert pg.lr_scale(5, hp, 10_500.0, 50.0) == 0.0
    assert pg.lr_scale(990, hp, 0.0, 50.0) == pytest.approx(0.25), "whichever end comes first"
    assert pg.lr_scale(990, hp, 9_900.0, 50.0) == pytest.approx(0.05)


def test_a_warmdown_of_a_share_follows_steps_and_clock_and_a_floor_ends_it():
    hp = tiny_hp(iterations=100, warmdown_iters=40, warmdown_frac=0.8, min_lr=0.1)
    expected = [max(0.1, min(1.0, (1 - i / 100) / 0.8)) for i in range(101)]
    assert [pg.lr_scale(i, hp, 0.0, None) for i in range(101)] == pytest.approx(expected)
    assert expected[20] == 1 and expected[21] < 1 and expected[92] == expected[100] == 0.1
    timed = dataclasses.replace(hp, iterations=100_000, max_wallclock_seconds=10.0)
    assert pg.lr_scale(7, timed, 6_000.0, None) == pytest.approx(0.5, abs=1e-3), (
        "a share of the clock needs no step time"
    )
    assert pg.lr_scale(7, timed, 1_900.0, 50.0) == 1.0 and pg.lr_scale(7, timed, 11_000.0, 50.0) == 0.1
    assert pg.lr_scale(90_000, timed, 100.0, 50.0) == pytest.approx(0.125), "whichever end comes first"
    falling = dataclasses.replace(hp, warmdown_frac=0.0)
    assert pg.lr_scale(98, falling, 0.0, None) == 0.1 and pg.lr_scale(80, falling, 0.0, None) == pytest.approx(0.5)


def test_step_time_is_the_median_of_the_last_twenty():
    clock = pg.Clock(single_rank(), pg.Signals())
    assert clock.step_ms is None
    clock.durations.extend([5000.0] + [10.0] * 8 + [12.0])
    assert clock.step_ms == 10.0
    clock.durations.extend([20.0] * 20)
    assert clock.step_ms == 20.0


def test_muon_momentum_ramps_linearly_and_stays():
    hp = tiny_hp(muon_momentum_warmup_start=0.85, muon_momentum=0.95, muon_momentum_warmup_steps=100)
    for step, expected in ((0, 0.85), (50, 0.9), (100, 0.95), (5000, 0.95)):
        assert pg.muon_momentum(step, hp) == pytest.approx(expected)
    assert pg.muon_momentum(0, tiny_hp(muon_momentum_warmup_steps=0, muon_momentum=0.9)) == pytest.approx(0.9)


# Averages


def walk(model, averages, scales):
    """Random weights at each step; returns the copies of them, and where the first SWA snapshot was announced."""
    history, announced = [], []
    for step, scale in enumerate(scales):
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(normal(*p.shape, seed=1000 * step + i))
        if averages.update(step, scale):
            announced.append(step)
        history.append([p.detach().clone() for p in model.parameters()])
    return history, announced


def test_ema_follows_its_ramp():
    hp = tiny_hp(ema_decay=0.3, swa_enabled=False)
    model = build_model(hp)
    expected = [p.detach().clone() for p in model.parameters()]
    averages = pg.Averages(model, hp)
    history, _ = walk(model, averages, [1.0] * 8)
    decays = [min(0.3, (1 + t) / (10 + t)) for t in range(8)]
    assert decays[0] == 0.1 and decays[2] == 0.25 and decays[3] == 0.3
    for decay, weights in zip(decays, history, strict=True):
        expected = [decay * e + (1 - decay) * w for e, w in zip(expected, weights, strict=True)]
    label, exported = averages.exported()
    assert label == "ema"
    for ours, theirs in zip(exported, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_swa_collects_every_so_often_and_only_below_a_fifth():
    hp = tiny_hp(swa_source="raw", ema_enabled=False, swa_every=3)
    model = build_model(hp)
    averages = pg.Averages(model, hp)
    scales = [1.0, 0.2, 0.2, 0.2, 0.19, 0.19, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    history, announced = walk(model, averages, scales)
    assert announced == [6] and averages.swa_samples == 3
    label, exported = averages.exported()
    assert label == "swa"
    for i, ours in enumerate(exported):
        mean = torch.stack([history[t][i] for t in (6, 9, 12)]).mean(0)
        torch.testing.assert_close(ours, mean, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, snapshots, label",
    [
        (dict(), 2, "swa"),
        (dict(), 1, "ema"),
        (dict(), 0, "ema"),
        (dict(ema_enabled=False, swa_source="raw"), 2, "swa"),
        (dict(ema_enabled=False, swa_source="raw"), 1, "raw"),
        (dict(ema_enabled=False, swa_enabled=False), 2, "raw"),
        (dict(swa_enabled=False), 2, "ema"),
    ],
)
def test_exported_order(changes, snapshots, label):
    hp = tiny_hp(swa_every=1, **changes)
    model = build_model(hp)
    averages = pg.Averages(model, hp)
    walk(model, averages, [1.0] + [0.1] * snapshots)
    got, weights = averages.exported()
    assert got == label
    expected = {"swa": averages.swa, "ema": averages.ema, "raw": [p.detach() for p in model.parameters()]}[label]
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_swapped_in_weights_are_swapped_out_again_even_after_an_error():
    model = build_model()
    averages, before = pg.Averages(model, tiny_hp()), weights_of(model)
    other = [torch.full_like(p, 2.0) for p in model.parameters()]
    with contextlib.suppress(KeyError), averages.swapped_in(other):
        assert all((p == 2.0).all() for p in model.parameters())
        raise KeyError
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all((w == 2.0).all() for w in other)


def test_averages_stay_fp32_and_apart_from_the_live_weights():
    model = build_model()
    averages = pg.Averages(model, tiny_hp())
    averages.update(0, 0.1)
    live = {p.data_ptr() for p in model.parameters()}
    for w in (*averages.ema, *averages.swa):
        assert w.dtype == torch.float32 and w.data_ptr() not in live
