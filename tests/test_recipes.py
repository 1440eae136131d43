"""records/recipes/*.env: plain lines that `set -a; . recipe` and this script read alike."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

import train_gpt as pg

FOLDER = ROOT / "records" / "recipes"
RECIPES = sorted(FOLDER.glob("*.env"))


def values(path: Path) -> dict[str, str]:
    lines = path.read_text("utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def header(path: Path) -> str:
    lines = path.read_text("utf-8").splitlines()
    count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:count])


def test_the_promised_recipes_are_there():
    assert {"cpu_demo.env", "cpu_mini.env", "pr401.env", "pr714.env"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_comments_and_plain_settings(path):
    lines = path.read_text("utf-8").splitlines()
    odd = [line for line in lines if not re.fullmatch(r"|#.*|[A-Z][A-Z0-9_]*=[\w.,/-]+", line)]
    assert odd == []
    names = [line.split("=")[0] for line in lines if line and not line.startswith("#")]
    assert len(names) == len(set(names))
    assert len(header(path)) > 40, "a recipe starts with a comment that says what it is"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_loads_and_names_only_settings(path):
    hp = pg.Hyperparameters.from_env(values(path))
    known = {name.upper() for name in hp.section("run", "model", "training", "averaging", "quantization", "evaluation")}
    assert set(values(path)) <= known | set(pg.PUBLIC_NAMES) | set(pg.NOT_HERE)


@pytest.mark.parametrize("path", [p for p in RECIPES if p.name.startswith("cpu_")], ids=lambda path: path.name)
def test_a_cpu_recipe_does_not_depend_on_time(path):
    assert pg.Hyperparameters.from_env(values(path)).max_wallclock_seconds == 0


@pytest.mark.parametrize("name, figure", [("pr714.env", "1.11869"), ("pr401.env", "1.1248")])
def test_a_published_recipe_names_its_figure_as_published_and_not_ours(name, figure):
    text = header(FOLDER / name)
    assert re.search(rf"{re.escape(figure)}(?!\d)", text)
    assert "published" in text.lower() and "not ours" in text.lower()


def test_cpu_frontier_has_cpu_mini_s_text_and_width_and_half_its_bytes():
    frontier, mini = (pg.Hyperparameters.from_env(values(FOLDER / f"cpu_{name}.env")) for name in ("frontier", "mini"))
    same = "train_seq_len eval_seq_len eval_stride model_dim num_layers"
    assert all(getattr(frontier, name) == getattr(mini, name) for name in same.split())
    # The training text is 7,655,744 tokens with 1,024 pieces and 5,384,077 with 4,096 in CaseOps (records/RESULTS.md).
    passes = [hp.iterations * hp.train_batch_tokens / n for hp, n in ((frontier, 5_384_077), (mini, 7_655_744))]
    assert 0.999 * passes[1] < passes[0] <= passes[1]
    room = frontier.artifact_cap_bytes - (ROOT / "train_gpt.py").stat().st_size
    assert 950_000 <= room <= 960_000, "ARTIFACT_CAP_BYTES of cpu_frontier.env is code and artifact: set it anew"


def test_cpu_mini_is_the_fixed_yardstick():
    assert values(FOLDER / "cpu_mini.env") == dict(
        NUM_LAYERS="11",
        MODEL_DIM="128",
        NUM_HEADS="4",
        NUM_KV_HEADS="2",
        TRAIN_SEQ_LEN="256",
        EVAL_SEQ_LEN="256",
        TRAIN_BATCH_TOKENS="8192",
        ITERATIONS="1500",
        WARMDOWN_ITERS="700",
        MAX_WALLCLOCK_SECONDS="0",
        MUON_MOMENTUM_WARMUP_STEPS="300",
        EVAL_STRIDE="64",
        EVAL_MAX_SECONDS="0",
        VOCAB_SIZE="1024",
        EMA_DECAY="0.99",
        SWA_EVERY="10",
        WARMUP_STEPS="1",
    )
