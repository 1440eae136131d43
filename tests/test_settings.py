"""Settings: read once, checked before any work, all of them alive."""

import ast
import dataclasses
import functools
import re
import resource
import subprocess
import sys
import types
from collections.abc import Mapping

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention
from conftest import ROOT, clean_environ, run_here
from helpers import TINY, build_model, make_run, quantize, random_tokens, single_rank, tiny_hp, weights_of

import train_gpt as pg

FIELDS = {f.name: f for f in dataclasses.fields(pg.Hyperparameters)}
TREE = ast.parse((ROOT / "train_gpt.py").read_text("utf-8"))
CLASSES = {node.name: node for node in TREE.body if isinstance(node, ast.ClassDef)}


def from_env(**environ) -> pg.Hyperparameters:
    return pg.Hyperparameters.from_env({name: str(value) for name, value in environ.items()})


def refusal(**environ) -> str:
    with pytest.raises(pg.UserError) as caught:
        from_env(**environ)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def attribute_loads(tree: ast.AST) -> list[ast.Attribute]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)]


# -----------------------------------------------------------------------------
# VALUES
# -----------------------------------------------------------------------------

BOUNDS = [(f, side) for f in FIELDS.values() for side in ("lo", "hi") if f.metadata[side] is not None]


@pytest.mark.parametrize("f, side", BOUNDS, ids=[f"{f.name}-{side}" for f, side in BOUNDS])
def test_a_value_beyond_a_bound_is_refused_by_name(f, side):
    bound, kind = f.metadata[side], type(f.default)
    outside = bound + (1 if kind is int else 0.001) * (1 if side == "hi" else -1)
    message, side = refusal(**{f.name.upper(): kind(outside)}), "most" if side == "hi" else "least"
    assert message == f"{f.name.upper()}={kind(outside)} must be at {side} {pg.limit_text(bound)}"
    pg.check_value(f, kind(bound))  # bounds are inclusive


def test_every_number_has_bounds():
    numbers = [f for f in FIELDS.values() if type(f.default) in (int, float)]
    assert [f.name for f in numbers if None in (f.metadata["lo"], f.metadata["hi"])] == []
    assert np.isfinite(np.float32(pg.LARGEST[float] ** 3))  # the product of three settings
    torch.Generator().manual_seed(FIELDS["seed"].metadata["hi"])


CHOICES = [f for f in FIELDS.values() if f.metadata["choices"]]


@pytest.mark.parametrize("f", CHOICES, ids=lambda f: f.name)
def test_choices_are_enforced(f):
    message = refusal(**{f.name.upper(): "else"})
    assert message == f"{f.name.upper()}=else must be one of {', '.join(f.metadata['choices'])}"
    assert f.default in f.metadata["choices"]
    for choice in f.metadata["choices"]:
        assert getattr(from_env(**{f.name.upper(): choice}), f.name) == choice


@pytest.mark.parametrize("f", FIELDS.values(), ids=lambda f: f.name)
def test_values_have_the_type_of_their_default(f):
    name, wrong = f.name.upper(), {int: "1.5", float: "fast", bool: "yes"}.get(type(f.default))
    assert f.type is type(f.default)
    if wrong:
        message = refusal(**{name: wrong})
        assert message.startswith(f"{name}={wrong} must be ")
    with pytest.raises(pg.UserError, match=rf"^{name}="):
        pg.Hyperparameters(**{f.name: None})


@pytest.mark.parametrize("text, value", [("1", True), ("0", False), ("true", True), ("False", False), (" TRUE ", True)])
def test_spellings_of_truth(text, value):
    assert from_env(LN_SCALE=text).ln_scale is value


@pytest.mark.parametrize("text", ["", "yes", "no", "2", "on", "None"])
def test_other_spellings_of_truth_are_refused(text):
    assert "LN_SCALE=" in refusal(LN_SCALE=text)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("f", [f for f in FIELDS.values() if type(f.default) is float], ids=lambda f: f.name)
def test_non_finite_numbers_are_refused(f, text):
    assert "must be" in refusal(**{f.name.upper(): text})


NASTY = [
    "",
    " ",
    "0",
    "-1",
    "1",
    " 5 ",
    "1_000",
    "0x10",
    "１",
    "1e-320",
    "1e39",
    "1e308",
    "-1e308",
    "nan",
    "inf",
    "1,2",
    "None",
]
NASTY += [str(1 << n) for n in (31, 40, 63, 64)] + ["1" + "0" * n for n in (300, 4000, 5000)]
NASTY += [
    "5\n6",
    "5\r6",
    "\x1b[2J",
    "\u2028",
    "/tmp/\udcff",
    "ü",
    "💥",
    "x" * 300,
    "x/" * 3000,
    "%s{}",
    "../..",
    "auto",
]


@pytest.mark.parametrize("f", FIELDS.values(), ids=lambda f: f.name)
def test_any_text_is_a_valid_value_or_one_short_line(f):
    for text in NASTY:
        try:
            value = getattr(from_env(**{f.name.upper(): text}), f.name)
        except pg.UserError as error:
            line = str(error)
            assert f.name.upper() in line and len(line) < 400 and line.isprintable(), line
        else:
            assert type(value) is type(f.default) and str(value).isprintable()
            str(value).encode()  # the log takes it


# -----------------------------------------------------------------------------
# COMBINATIONS
# -----------------------------------------------------------------------------

ILLEGAL = [
    (dict(NUM_HEADS=7), "NUM_HEADS=7 must divide MODEL_DIM=512"),
    (dict(NUM_KV_HEADS=3), "NUM_KV_HEADS=3 must divide NUM_HEADS=8"),
    (dict(MODEL_DIM=24, ROPE_DIMS=0), "MODEL_DIM/NUM_HEADS=3 must be even and at least 4"),
    (dict(MODEL_DIM=16, ROPE_DIMS=0), "MODEL_DIM/NUM_HEADS=2 must be even and at least 4"),
    (dict(ROPE_DIMS=2), "ROPE_DIMS=2 must be 0 or an even number from 4 to the head width 64"),
    (dict(ROPE_DIMS=15), "ROPE_DIMS=15 must be 0 or an even number from 4 to the head width 64"),
    (dict(ROPE_DIMS=66), "ROPE_DIMS=66 must be 0 or an even number from 4 to the head width 64"),
    (dict(BIGRAM_VOCAB_SIZE=1), "BIGRAM_VOCAB_SIZE=1 leaves no row"),
    (dict(PARALLEL_START_LAYER=4), "PARALLEL_START_LAYER=4 must be 0 (none) or a layer of the second half"),
    (dict(PARALLEL_START_LAYER=11), "behind all loops: 5 to 10"),
    (dict(PARALLEL_START_LAYER=7, NUM_LOOPS=1, LOOP_END=7), "behind all loops: 8 to 10"),
    (dict(SPARSE_ATTN_GATE_ENABLED=1, GATE_WINDOW=513), "GATE_WINDOW=513 exceeds MODEL_DIM=512"),
    (dict(SMEAR_GATE_KIND="token", GATE_WINDOW=513), "GATE_WINDOW=513 exceeds MODEL_DIM=512"),
    (dict(SKIP_GATES_ENABLED=1, UNET_SKIPS=0), "SKIP_GATES_ENABLED=1 needs skips to gate: UNET_SKIPS=1"),
    (dict(XSA_LAST_N=12), "XSA_LAST_N=12 exceeds NUM_LAYERS=11"),
    (dict(NUM_LOOPS=1, LOOP_START=5, LOOP_END=4), "LOOP_START=5 and LOOP_END=4 must be layers in order"),
    (dict(NUM_LOOPS=1, LOOP_END=11), "LOOP_START=3 and LOOP_END=11 must be layers in order, the last at most 10"),
    (dict(NUM_LOOPS=9, MODEL_DIM=8, NUM_HEADS=1, NUM_KV_HEADS=1, ROPE_DIMS=0), "NUM_LOOPS=9 exceeds MODEL_DIM=8"),
    (dict(VE_LAYERS="9;10"), "VE_LAYERS='9;10' must be layer numbers"),
    (dict(VE_LAYERS=""), "VE_LAYERS='' must be layer numbers"),
    (dict(VE_LAYERS="9,-1"), "VE_LAYERS='9,-1' must be layer numbers"),
    (dict(VE_LAYERS="9,11"), "VE_LAYERS=9,11 names a layer beyond the last, 10 (NUM_LAYERS=11)"),
    (dict(EMA_ENABLED=0, SWA_ENABLED=1, SWA_SOURCE="ema"), "SWA_SOURCE=ema needs EMA_ENABLED=1"),
    (dict(EMBED_BITS=9), "EMBED_BITS=9 must be from 5 to 8, or 16"),
    (dict(PROJECTION_BITS=9), "PROJECTION_BITS=9 must be from 5 to 8, or 16"),
    (dict(CONTROL_BITS=24), "CONTROL_BITS=24 must be 16 or 32"),
    (dict(GPTQ_HEAD_ENABLED=1), "GPTQ_HEAD_ENABLED=1 needs GPTQ_ENABLED=1"),
    (dict(TRELLIS_ENABLED=1, QUANT="rd"), "TRELLIS_ENABLED=1 needs COMPRESSOR=ans and QUANT=rd or sdclip"),
    (dict(TRELLIS_ENABLED=1, COMPRESSOR="ans"), "not COMPRESSOR=ans and QUANT=clip_search"),
    (dict(GPTQ_HEAD_ENABLED=1, GPTQ_ENABLED=1, EMBED_BITS=16), "EMBED_BITS of 8 or less, not 16"),
    (dict(GPTQ_ENABLED=1, GPTQ_RESERVE_SECONDS=600), "GPTQ_RESERVE_SECONDS=600 leaves nothing of MAX_WALLCLOCK_SEC"),
    (dict(GPTQ_ENABLED=1, GPTQ_CALIBRATION_TOKENS=2047), "GPTQ_CALIBRATION_TOKENS=2047 is less than one sequence"),
    (dict(TTT_ENABLED=0, TTT_PARAMS="lora"), "belong to test-time training: TTT_ENABLED=1"),
    (dict(TTT_ENABLED=0, TTT_TEMPERATURE=1), "belong to test-time training: TTT_ENABLED=1"),
    (dict(TTT_ENABLED=0, HEDGE_ENABLED=1), "belong to test-time training: TTT_ENABLED=1"),
    (dict(TTT_PARAMS="lora", TTT_SAM_RHO=0.1), "TTT_PARAMS=lora takes one plain step per piece"),
    (dict(TTT_PARAMS="lora", TTT_FREEZE_BLOCKS=1), "TTT_MAX_CHUNKS and TTT_FREEZE_BLOCKS"),
    (dict(TTT_PARAMS="lora", HEDGE_ENABLED=1), "TTT_PARAMS=lora scores documents side by side"),
    (dict(TTT_PARAMS="lora", TTT_LORA_CHUNK=2049), "TTT_LORA_CHUNK=2049 exceeds EVAL_SEQ_LEN=2048"),
    (dict(TTT_LORA="q,w"), "TTT_LORA=q,w must be some of q,k,v,o,mlp,head"),
    (dict(TTT_WARM_START_A=1, TTT_LORA_RESET=0), "leave out TTT_WARM_START_A"),
    (dict(PHASED_TTT_NUM_PHASES=1), "PHASED_TTT_NUM_PHASES needs TTT_PARAMS=lora with TTT_LORA_RESET=1"),
    (dict(TTT_WEIGHT_DECAY=0.5), "TTT_WEIGHT_DECAY needs TTT_OPTIMIZER=adamw"),
    (dict(EVAL_STRIDE=2049), "EVAL_STRIDE=2049 exceeds EVAL_SEQ_LEN=2048"),
    (dict(EVAL_STRIDE=0), "TTT_ENABLED=1 needs sliding windows"),
    (dict(TTT_FREEZE_BLOCKS=12), "TTT_FREEZE_BLOCKS=12 exceeds NUM_LAYERS=11"),
    (dict(EVAL_ONLY=1, EXPORT_ONLY=1), "EVAL_ONLY=1 and EXPORT_ONLY=1 exclude each other"),
    (dict(EVAL_ONLY=1), "EVAL_ONLY=1 needs ARTIFACT_PATH"),
    (dict(EXPORT_ONLY=1), "EXPORT_ONLY=1 needs WEIGHTS_PATH"),
    (dict(EVAL_ONLY=1, ARTIFACT_PATH="a", RESUME="auto", RUN_ID="r"), "RESUME goes on with training"),
    (dict(RESUME="auto"), "RESUME=auto needs the RUN_ID"),
    (dict(ARTIFACT_PATH="a"), "ARTIFACT_PATH is read only with EVAL_ONLY=1"),
    (dict(WEIGHTS_PATH="a"), "WEIGHTS_PATH is read only with EXPORT_ONLY=1"),
    (dict(RUN_ID="a/b"), "RUN_ID='a/b' must be a file name"),
    (dict(RUN_ID=".."), "RUN_ID='..' must be a file name"),
    (dict(RUN_ID="a" * 129), "must be a file name"),
]


@pytest.mark.parametrize("environ, message", ILLEGAL, ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_illegal_combinations_are_refused(environ, message):
    assert message in refusal(**environ)


UNEVEN = [
    (dict(TRAIN_BATCH_TOKENS=2047), "TRAIN_BATCH_TOKENS=2047 must be a multiple of WORLD_SIZE=1 x TRAIN_SEQ_LEN=2048"),
    (dict(MICRO_BATCH_TOKENS=2049), "MICRO_BATCH_TOKENS=2049 must be a multiple of TRAIN_SEQ_LEN=2048"),
]


@pytest.mark.parametrize("environ, message", UNEVEN)
def test_a_batch_that_does_not_split_is_refused_when_training(environ, message, capsys):
    assert pg.main([], {name: str(value) for name, value in environ.items()}) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_every_illegal_combination_has_a_test():
    rules = [node for node in ast.walk(CLASSES["Hyperparameters"]) if isinstance(node, ast.Yield)]
    reached = set()
    for environ, _ in ILLEGAL:
        hp = dataclasses.replace(pg.Hyperparameters())
        for name, value in environ.items():
            f = FIELDS[name.lower()]
            object.__setattr__(hp, f.name, pg.parse_value(f, str(value)))
        reached.add(next(i for i, (broken, _) in enumerate(hp.illegal_combinations()) if broken))
    assert reached == set(range(len(rules)))


LEGAL = [
    dict(PARALLEL_START_LAYER=8, NUM_LOOPS=2),
    dict(GATE_WINDOW=513),
    dict(VE_ENABLED=0, VE_LAYERS="nonsense"),
    dict(EVAL_STRIDE=0, TTT_ENABLED=0),
    dict(EMA_ENABLED=0, SWA_ENABLED=1, SWA_SOURCE="raw"),
    dict(EMA_ENABLED=0, SWA_ENABLED=0, SWA_SOURCE="ema"),
    dict(EMA_ENABLED=0, SWA_ENABLED=0),
    dict(ROPE_DIMS=0),
    dict(ROPE_DIMS=64, NUM_KV_HEADS=8),
    dict(BIGRAM_VOCAB_SIZE=0),
    dict(TTT_FREEZE_BLOCKS=11, XSA_LAST_N=11),
    dict(EVAL_STRIDE=2048),
    dict(RUN_ID="a.b-c_2"),
    dict(GPTQ_ENABLED=1, GPTQ_RESERVE_SECONDS=600, MAX_WALLCLOCK_SECONDS=0),
    dict(GPTQ_ENABLED=1, EMBED_BITS=16, GPTQ_RESERVE_SECONDS=599),
    dict(TTT_PARAMS="lora", TTT_LORA_CHUNK=2048),
    dict(TTT_PARAMS="lora", TTT_LORA_CHUNK=48, TTT_LORA="head"),
    dict(TTT_PARAMS="scales", TTT_TEMPERATURE=1, HEDGE_ENABLED=1),
    dict(NUM_LAYERS=3, VE_LAYERS="1", XSA_LAST_N=1),  # the loop of no loops may lie anywhere
    dict(NUM_LOOPS=16, LOOP_START=0, LOOP_END=10),
]


@pytest.mark.parametrize("environ", LEGAL, ids=lambda x: "-".join(x))
def test_legal_neighbours_are_accepted(environ):
    from_env(**environ)


def test_the_batch_must_split_over_the_ranks():
    hp = pg.Hyperparameters(train_seq_len=32, train_batch_tokens=256)
    assert hp.micro_batch(1) == 256 and hp.micro_batch(8) == 32
    with pytest.raises(pg.UserError, match=r"^TRAIN_BATCH_TOKENS=256 must be a multiple of WORLD_SIZE=3 x"):
        hp.micro_batch(3)
    hp = dataclasses.replace(hp, micro_batch_tokens=96)
    with pytest.raises(pg.UserError, match=r"^MICRO_BATCH_TOKENS=96 must divide a rank's 256 tokens"):
        hp.micro_batch(1)


def test_automatic_micro_batches_are_the_largest_that_fit_and_divide():
    assert pg.Hyperparameters().micro_batch(8) == 98_304
    assert pg.Hyperparameters().micro_batch(1) == 98_304
    assert pg.Hyperparameters(train_batch_tokens=2048 * 49).micro_batch(1) == 2048 * 7  # 48 would fit
    assert pg.Hyperparameters(train_seq_len=131_072, train_batch_tokens=262_144).micro_batch(1) == 131_072


# -----------------------------------------------------------------------------
# NAMES
# -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, meant",
    [
        ("MODEL_DIMS", "MODEL_DIM"),
        ("MODELDIM", "MODEL_DIM"),
        ("NUM_LAYER", "NUM_LAYERS"),
        ("MATRIX_RL", "MATRIX_LR"),
        ("TTT_CHUNK_TOKEN", "TTT_CHUNK_TOKENS"),
        ("ITERATION", "ITERATIONS"),
        ("EMA_ENABLE", "EMA_ENABLED"),
        ("MUON_WEIGHT_DECA", "MUON_WEIGHT_DECAY"),
        ("QAT_TRESHOLD", "QAT_THRESHOLD"),
        ("TRAIN_SEQ_LENS", "TRAIN_SEQ_LEN"),
        ("SEEDS", "SEED"),
        ("DEVICES", "DEVICE"),
        ("RESUM", "RESUME"),
        ("DTYPES", "DTYPE"),
        ("SAVE_SCORE", "SAVE_SCORES"),
        ("BETA3", "BETA1"),
        ("RUNID", "RUN_ID"),
        ("OUTDIR", "OUT_DIR"),
        ("TTTLR", "TTT_LR"),
        ("model_dims", "MODEL_DIM"),
        ("seeds", "SEED"),
        ("min_lr", "MIN_LR"),
        ("TRAIN_SEQ_LENGTH", "TRAIN_SEQ_LEN"),
        ("MODEL_DIMENSION", "MODEL_DIM"),
        ("Qat_Threshold", "QAT_THRESHOLD"),
        ("MODEL_DIM\n", "MODEL_DIM"),
    ],
)
def test_near_misses_name_the_right_setting(name, meant):
    assert refusal(**{name: "1"}) == f"unknown setting {pg.shown(name)}; did you mean {meant}?"


LONG_NAMES = [f.upper() for f in FIELDS if len(f) >= 8]


@pytest.mark.parametrize("name", LONG_NAMES)
def test_one_or_two_slips_in_any_long_name_are_caught(name):
    for slip in (name[:-1], name + "Q", name[:2] + "Q" + name[3:], name[:3] + "QQ" + name[3:], name[:-2] + "QQ"):
        assert pg.near_miss(slip)


@pytest.mark.parametrize("name", FIELDS)
def test_another_mixture_of_cases_is_an_error(name):
    for spelling in (name, name.title(), name[0].upper() + name[1:]):
        assert refusal(**{spelling: "1"}) == f"unknown setting {spelling}; did you mean {name.upper()}?"


@pytest.mark.parametrize("name", [f.upper() for f in FIELDS if len(f) < 8])
def test_one_slip_in_a_short_name_is_caught(name):
    for slip in (name[:-1], name + "Q", name[:2] + "Q" + name[3:], name[:2] + name[3:]):
        if len(slip) >= 4 and slip not in pg.FOREIGN_WORDS:
            assert pg.near_miss(slip)


def test_what_is_far_from_every_setting_is_no_error():
    from_env(MODEL_DIQQQ="1", SED="1", SDEES="1", OUTQQ_DIR="1", model_width="1", TRAIN_SEQ_LENGTH_MAX="1")


def test_other_variables_that_share_a_word_with_a_setting_are_named_in_one_note():
    ours = dict(MUON_LR="1", TRAIN_DEPTH="1", BATCH_SIZE="8", EMA="1", TTT_NEW_THING="x", BETA="1")
    others = dict(MODEL_DIR="m", SEED="1", MIN_LR="0", USE_GPTQ="1", muon_lr="1", MAX_JOBS="4", WANDB_SEED="1")
    assert pg.unused_names(ours | others) == [f"warning: no such settings, so not read: {', '.join(sorted(ours))}"]
    assert pg.unused_names(others) == []


REALISTIC = """
PATH HOME USER LOGNAME SHELL PWD OLDPWD SHLVL TERM LANG LC_ALL LC_CTYPE HOSTNAME EDITOR PAGER MAIL TMPDIR COLUMNS LINES
DISPLAY DEBIAN_FRONTEND VIRTUAL_ENV VIRTUAL_ENV_PROMPT CONDA_PREFIX CONDA_DEFAULT_ENV PYTHONPATH PYTHONUNBUFFERED PS1
MASTER_ADDR MASTER_PORT LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK ROLE_NAME GROUP_WORLD_SIZE ROLE_WORLD_SIZE NODE_RANK
TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_USE_AGENT_STORE
TORCHELASTIC_ERROR_FILE TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_LOGS TORCH_COMPILE_DEBUG TORCHINDUCTOR_CACHE_DIR CUDA_HOME
CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_VERSION CUDA_LAUNCH_BLOCKING NVIDIA_VISIBLE_DEVICES
NVIDIA_DRIVER_CAPABILITIES NCCL_DEBUG NCCL_IB_DISABLE NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME OMP_NUM_THREADS
OMP_WAIT_POLICY GOMP_SPINCOUNT OMP_PROC_BIND MKL_NUM_THREADS
KMP_AFFINITY GOMP_CPU_AFFINITY OPENBLAS_NUM_THREADS NUMEXPR_MAX_THREADS
TOKENIZERS_PARALLELISM HF_HOME HF_TOKEN WANDB_API_KEY WANDB_PROJECT WANDB_MODE TRITON_CACHE_DIR LD_LIBRARY_PATH
LD_PRELOAD RUNPOD_POD_ID RUNPOD_GPU_COUNT PUBLIC_KEY JUPYTER_TOKEN SSH_CLIENT SSH_CONNECTION SSH_TTY SSH_AUTH_SOCK
XDG_RUNTIME_DIR XDG_SESSION_ID XDG_DATA_DIRS DBUS_SESSION_BUS_ADDRESS MOTD_SHOWN LS_COLORS LESSOPEN LESSCLOSE
SLURM_JOB_ID SLURM_NTASKS SLURM_PROCID SLURM_LOCALID SLURM_NODEID SLURM_NNODES KUBERNETES_SERVICE_HOST KUBERNETES_PORT
CI CI_COMMIT_SHA CI_JOB_ID CI_PIPELINE_ID CI_PROJECT_DIR GITHUB_ACTIONS GITHUB_RUN_ID GITHUB_SHA GITHUB_WORKSPACE
GITHUB_REF GITHUB_JOB GITHUB_TOKEN GITLAB_CI GIT_AUTHOR_NAME RUNNER_OS RUNNER_TEMP RUNNER_ARCH BUILD_ID BUILD_NUMBER
JOB_NAME WORKSPACE JENKINS_URL PYTEST_CURRENT_TEST PYTEST_VERSION MAKEFLAGS MAKELEVEL MFLAGS http_proxy https_proxy
HTTP_PROXY HTTPS_PROXY NO_PROXY PIP_INDEX_URL PIP_CACHE_DIR REQUESTS_CA_BUNDLE SSL_CERT_FILE RANK LOCAL_RANK WORLD_SIZE
REAL_TEXT_DIR MATCHED_FINEWEB_REPO_ID MATCHED_FINEWEB_REMOTE_ROOT_PREFIX _ TMP_DIR SRC_DIR DST_DIR OPT_DIR ROOT_DIR
LOG_DIR BUILD_DIR CACHE_DIR MODEL_DIR MODEL_ID MODEL_NAME MODEL_PATH JAVA_HOME JAVA_PATH COMPILER COMPILER_PATH SED TYPE
SPEED AUDIO NEED FEED DEBUG VERBOSE LOG_LEVEL LOG_FORMAT STAGE PORT HOST URL DB_HOST DB_PASS DATABASE_URL API_KEY
OPENAI_API_KEY TOKEN HF_MODEL_ID NODE_VERSION YARN_VERSION NPM_CONFIG_AUDIT npm_config_audit CMAKE_BUILD_PARALLEL_LEVEL
MAX_JOBS USE_CUDA USE_EXPERIMENTAL_CUDNN_V8_API FLASH_ATTENTION_FORCE_BUILD MODEL_SERVER_SERVICE_HOST
MODEL_SERVER_PORT_80_TCP TRAIN_JOB_SERVICE_PORT_HTTP TRAIN_JOB_PORT TRAIN_SEED_PORT_80_TCP_ADDR POD_NAME NODE_NAME
CONTAINER_ID SM_MODEL_DIR SM_HP_EPOCHS SM_CHANNEL_TRAIN AZUREML_RUN_ID AIP_CHECKPOINT_DIR AZ_BATCH_NODE_LIST
AWS_BATCH_JOB_ID DET_TRIAL_SEED WANDB_RESUME WANDB_LOG_MODEL MLFLOW_RUN_ID PL_GLOBAL_SEED RAY_ADDRESS
VLLM_ATTENTION_BACKEND NVTE_FLASH_ATTN NVTE_FUSED_ATTN NV_LIBNCCL_PACKAGE TENSORBOARD_PORT TORCH_COMPILE_DEBUG
TORCHINDUCTOR_COMPILE_THREADS PYTORCH_CUDA_ALLOC_CONF XLA_PYTHON_CLIENT_MEM_FRACTION TF_CPP_MIN_LOG_LEVEL
ACCELERATE_GRADIENT_ACCUMULATION_STEPS OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE PMI_RANK PMIX_RANK MPI_LOCALRANKID
I_MPI_ROOT UCX_NET_DEVICES FI_PROVIDER FI_EFA_USE_DEVICE_RDMA ONEAPI_DEVICE_SELECTOR GPU_DEVICE_ORDINAL
ROCR_VISIBLE_DEVICES SLURM_STEP_ID SRUN_DEBUG PBS_JOBID LSB_BATCH_JID SGE_TASK_ID MODULEPATH LOADEDMODULES LMOD_DIR
SPACK_ROOT PARALLEL PARALLEL_SEQ PARALLEL_JOBSLOT ACTIONS_STEP_DEBUG GITHUB_HEAD_REF RUN_DISPLAY_URL
BUILDKITE_PARALLEL_JOB DRONE_STEP_NAME CODEBUILD_SOURCE_VERSION GDK_SCALE QT_SCALE_FACTOR XCURSOR_SIZE WINDOWID SECONDS
RANDOM HISTSIZE SOURCE_DATE_EPOCH KV_REST_API_URL AIDER_MODEL INVOCATION_ID SYSTEMD_EXEC_PID VSCODE_IPC_HOOK_CLI
NIX_STORE out src name system outputs phases
""".split()


def test_a_realistic_environment_changes_nothing():
    environ = {name: "x" for name in REALISTIC}
    assert pg.Hyperparameters.from_env(environ) == pg.Hyperparameters()
    assert pg.unused_names(environ) == []


@pytest.mark.parametrize("prefix", ["TORCH", "CUDA", "NCCL", "GLOO", "OMP_", "PYTHON", "PYTEST", "HF_", "CI_"])
def test_other_programs_prefixes_are_never_taken_for_ours(prefix, monkeypatch):
    monkeypatch.setitem(pg.SETTINGS, (prefix + "_X")[:10], None)
    assert pg.near_miss((prefix + "_XY")[:11]) is None


@pytest.mark.parametrize(
    "public, ours, text",
    [
        ("QAT_THRESHOLD", "late_qat_threshold", "0.25"),
        ("SMEAR_GATE", "smear_gate_enabled", "0"),
        ("MUON_WEIGHT_DECAY", "muon_wd", "0.5"),
        ("USE_GPTQ", "gptq_enabled", "1"),
        ("VAL_BATCH_TOKENS", "val_batch_size", "2"),
    ],
)
def test_public_names_set_our_settings(public, ours, text):
    assert getattr(from_env(**{public: text}), ours) == pg.parse_value(FIELDS[ours], text) != FIELDS[ours].default
    with pytest.raises(pg.UserError, match="contradicts another spelling of"):
        from_env(**{public: text, ours.upper(): "0" if text == "1" else "1"})
    from_env(**{public: text, ours.upper(): text})


def test_every_public_name_leads_to_a_setting_and_is_no_setting_itself():
    assert {ours.lower() for ours in pg.PUBLIC_NAMES.values()} <= set(FIELDS)
    assert not {name.lower() for name in (*pg.PUBLIC_NAMES, *pg.NOT_HERE)} & set(FIELDS)


@pytest.mark.parametrize("name", pg.NOT_HERE)
def test_techniques_that_are_not_here_may_be_off_but_not_on(name):
    accepted, advice = pg.NOT_HERE[name]
    for text in accepted:
        assert from_env(**{name: text}) == pg.Hyperparameters()
        if text.replace(".", "").isdecimal():
            assert from_env(**{name: f" {float(text)} "}) == pg.Hyperparameters()
    if "0" in accepted:
        assert from_env(**{name: "False"}) == pg.Hyperparameters()
    for text in ("7", "on", ""):
        instead = "leave it out" + (f" or set {accepted[0]}" if accepted else "")
        assert refusal(**{name: text}) == f"{name}={text} is not offered here: {advice}; {instead}"


def test_advice_names_settings_that_exist():
    for advice in {advice for _, advice in pg.NOT_HERE.values()}:
        assert {*re.findall(r"[A-Z]+(?:_[A-Z]+)+", advice)} <= {name.upper() for name in FIELDS}


def test_all_that_is_not_here_is_said_at_once():
    message = refusal(ROPE_YARN=1, TRIGRAM=1, DTG_ENABLED=1, LQER_ENABLED=0)
    assert message == (
        "DTG_ENABLED=1 is not offered here: there is no dynamic token gate; leave it out or set 0. "
        "Nor are ROPE_YARN, TRIGRAM"
    )


# Names that public scripts read, or that their published commands set.
PUBLISHED = """
ADAM_EPS ADAM_WD ARTIFACT_DIR ATTN_CLIP_SIGMAS ATTN_OUT_GATE_ENABLED ATTN_OUT_GATE_SRC BETA1 BETA2 BIGRAM_DIM
BIGRAM_VOCAB_SIZE CASEOPS_ENABLED COMPRESSOR CONTROL_TENSOR_NAME_PATTERNS DATASETS_DIR DATA_DIR DATA_PATH DTG_ENABLED
EMA_DECAY EMA_ENABLED EMBEDDING_DIM EMBED_BITS EMBED_CLIP_SIGMAS EMBED_LR EMBED_WD ENABLE_LOOPING_AT EVAL_BATCH_SEQS
EVAL_SEQ_LEN EVAL_STRIDE FORCE_STOP_STEP FUSED_CE_ENABLED GATED_ATTENTION GATED_ATTN_ENABLED GATED_ATTN_INIT_STD
GATED_ATTN_QUANT_GATE GATE_WINDOW GLOBAL_TTT_BATCH_SEQS GLOBAL_TTT_CHUNK_TOKENS GLOBAL_TTT_EPOCHS GLOBAL_TTT_GRAD_CLIP
GLOBAL_TTT_LR GLOBAL_TTT_MOMENTUM GLOBAL_TTT_RESPECT_DOC_BOUNDARIES GLOBAL_TTT_WARMUP_CHUNKS GLOBAL_TTT_WARMUP_START_LR
GPTQ_BLOCK_SIZE GPTQ_CALIBRATION_BATCHES GPTQ_CALIB_BATCHES GPTQ_RESERVE_SECONDS GRAD_ACCUM_STEPS GRAD_CLIP_NORM HEAD_LR
INT8_KEEP_FLOAT_FP32_NAME_PATTERNS ITERATIONS LATE_QAT LATE_QAT_THRESHOLD LAWA_ENABLED LAWA_FREQ LAWA_K LN_SCALE
LOGIT_SOFTCAP LOOP_END LOOP_START LQER_ASYM_ENABLED LQER_ASYM_GROUP LQER_ENABLED LQER_FACTOR_BITS LQER_RANK LQER_TOP_K
MATRIX_BITS MATRIX_CLIP_SIGMAS MATRIX_LR MAX_WALLCLOCK_SECONDS MIN_LR MLP_CLIP_SIGMAS MLP_MULT MODEL_DIM MTP_LOSS_WEIGHT
MTP_NUM_HEADS MUON_BACKEND_STEPS MUON_BETA2 MUON_MOMENTUM MUON_MOMENTUM_WARMUP_START MUON_MOMENTUM_WARMUP_STEPS
MUON_ROW_NORMALIZE MUON_WD MUON_WEIGHT_DECAY NGRAM_ENABLED NGRAM_TWO_PASS NUM_HEADS NUM_KV_HEADS NUM_LAYERS NUM_LOOPS
PARALLEL_FINAL_LANE PARALLEL_RESIDUAL PARALLEL_RESIDUAL_START PARALLEL_START_LAYER PHASED_TTT_ENABLED
PHASED_TTT_NUM_PHASES PHASED_TTT_PREFIX_DOCS PREQUANT_ONLY QAT_ENABLED QAT_THRESHOLD QK_GAIN QK_GAIN_INIT RECUR_LAYERS
RECUR_START_STEP ROPE_BASE ROPE_DIMS ROPE_TRAIN_SEQ_LEN ROPE_YARN RUN_ID SCALAR_LR SEED SHARE_LOOPS SHARE_START
SKIP_GATES_ENABLED SLOT_ENABLED SMEAR_GATE SMEAR_GATE_ENABLED SPARSE_ATTN_GATE_ENABLED SPARSE_ATTN_GATE_INIT_STD
SPARSE_ATTN_GATE_SCALE SWA_ENABLED SWA_EVERY SWA_START_FRAC TARGET_MB TIED_EMBED_INIT_STD TIED_EMBED_LR TIE_EMBEDDINGS
TOKENIZER_PATH TRAIN_BATCH_TOKENS TRAIN_LOG_EVERY TRAIN_SEQ_LEN TRIGRAM TRIGRAM_ENABLED TTT_BATCH_SEQS TTT_BATCH_SIZE
TTT_BETA1 TTT_BETA2 TTT_CHUNK_SIZE TTT_CHUNK_TOKENS TTT_DEBUG_BYPASS TTT_ENABLED TTT_EPOCHS TTT_EVAL_BATCHES
TTT_EVAL_ONLY TTT_EVAL_SEQ_LEN TTT_FREEZE_BLOCKS TTT_GRAD_CLIP TTT_GRAD_STEPS TTT_K_LORA TTT_LORA_ALPHA TTT_LORA_LR
TTT_LORA_RANK TTT_LR TTT_MLP_LORA TTT_MOMENTUM TTT_OPTIMIZER TTT_O_LORA TTT_WARM_START_A TTT_WD TTT_WEIGHT_DECAY
TWO_PASS_ENABLED USE_GPTQ VALUE_RESIDUAL VAL_BATCH_SIZE VAL_BATCH_TOKENS VAL_DOC_FRACTION VAL_LOSS_EVERY VE_DIM
VE_ENABLED VE_LAYERS VOCAB_SIZE WARMDOWN_FRAC WARMDOWN_ITERS WARMUP_STEPS XSA_LAST_N
""".split()


def test_no_published_name_is_ignored():
    others = {*pg.PUBLIC_NAMES, *pg.NOT_HERE} - {"AUDIT", "AUDIT_TOKENS"}  # which were ours
    assert others <= set(PUBLISHED) <= others | {name.upper() for name in FIELDS}


# -----------------------------------------------------------------------------
# PUBLISHED COMMANDS
# -----------------------------------------------------------------------------

PR_414 = """
NUM_LAYERS=11 BIGRAM_VOCAB_SIZE=1536 XSA_LAST_N=4 EMA_ENABLED=1 EMA_DECAY=0.997 SWA_ENABLED=1 SWA_EVERY=50 ROPE_DIMS=16
LN_SCALE=1 LATE_QAT=1 LATE_QAT_THRESHOLD=0.15 VE_ENABLED=1 VE_DIM=128 VE_LAYERS=9,10 TTT_ENABLED=1 TTT_LR=0.002
TTT_EPOCHS=3 TTT_CHUNK_TOKENS=32768 TTT_FREEZE_BLOCKS=0 TTT_MOMENTUM=0.9 TTT_BATCH_SEQS=32 TTT_GRAD_CLIP=1.0
MUON_WD=0.04 ADAM_WD=0.04 MATRIX_LR=0.025 SCALAR_LR=0.025 TIED_EMBED_LR=0.035 MUON_MOMENTUM=0.99
MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500 WARMDOWN_ITERS=3500 ITERATIONS=9000
MAX_WALLCLOCK_SECONDS=600 EVAL_STRIDE=64 SEED=1337
"""
APRIL = """
VOCAB_SIZE=8192 CASEOPS_ENABLED=1 ITERATIONS=20000 MAX_WALLCLOCK_SECONDS=600 WARMUP_STEPS=20 TRAIN_BATCH_TOKENS=786432
TRAIN_SEQ_LEN=2048 EVAL_SEQ_LEN=2048 VAL_LOSS_EVERY=0 NUM_LAYERS=11 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4
MLP_MULT=4.0 TIE_EMBEDDINGS=1 LOGIT_SOFTCAP=30 ROPE_DIMS=16 ROPE_BASE=10000 ROPE_YARN=0 LN_SCALE=1 QK_GAIN_INIT=5.0
XSA_LAST_N=11 SKIP_GATES_ENABLED=1 NUM_LOOPS=2 LOOP_START=3 LOOP_END=5 ENABLE_LOOPING_AT=0.35 PARALLEL_START_LAYER=8
PARALLEL_FINAL_LANE=mean SMEAR_GATE_ENABLED=1 GATE_WINDOW=12 SPARSE_ATTN_GATE_ENABLED=1 SPARSE_ATTN_GATE_INIT_STD=0
SPARSE_ATTN_GATE_SCALE=0.5 GATED_ATTN_ENABLED=0 GATED_ATTN_QUANT_GATE=1 ATTN_OUT_GATE_ENABLED=0 MATRIX_LR=0.026
MUON_MOMENTUM=0.97 MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500 MUON_BACKEND_STEPS=5
MUON_ROW_NORMALIZE=1 MUON_WD=0.095 TIED_EMBED_LR=0.03 TIED_EMBED_INIT_STD=0.005 EMBED_WD=0.085 SCALAR_LR=0.02
ADAM_WD=0.02 BETA1=0.9 BETA2=0.99 ADAM_EPS=1e-8 GRAD_CLIP_NORM=0.3 WARMDOWN_FRAC=0.85 MIN_LR=0.1 EMA_DECAY=0.9965
FUSED_CE_ENABLED=1 MATRIX_BITS=6 EMBED_BITS=7 ATTN_CLIP_SIGMAS=13.0 MLP_CLIP_SIGMAS=11.5 EMBED_CLIP_SIGMAS=14.0
MATRIX_CLIP_SIGMAS=12.85 GPTQ_CALIBRATION_BATCHES=16 GPTQ_RESERVE_SECONDS=0.5 LQER_ENABLED=1 LQER_RANK=4 LQER_TOP_K=3
LQER_FACTOR_BITS=4 LQER_ASYM_ENABLED=1 LQER_ASYM_GROUP=64 COMPRESSOR=pergroup TTT_ENABLED=1 TTT_LORA_RANK=80
TTT_LORA_ALPHA=144 TTT_WARM_START_A=1 TTT_LORA_LR=0.0001 TTT_BETA1=0 TTT_BETA2=0.99 TTT_WEIGHT_DECAY=0.5
TTT_CHUNK_SIZE=48 TTT_EVAL_SEQ_LEN=2048 TTT_BATCH_SIZE=64 TTT_GRAD_STEPS=1 TTT_K_LORA=1 TTT_MLP_LORA=1 TTT_O_LORA=1
PHASED_TTT_ENABLED=1 PHASED_TTT_NUM_PHASES=3 PHASED_TTT_PREFIX_DOCS=2500 GLOBAL_TTT_LR=0.001 GLOBAL_TTT_MOMENTUM=0.9
GLOBAL_TTT_EPOCHS=1 GLOBAL_TTT_CHUNK_TOKENS=32768 GLOBAL_TTT_BATCH_SEQS=16 GLOBAL_TTT_GRAD_CLIP=1.0
GLOBAL_TTT_RESPECT_DOC_BOUNDARIES=1
"""
OTHER = "BIGRAM_VOCAB_SIZE=2048 QAT_THRESHOLD=0.15 WARMDOWN_ITERS=3000 TTT_ENABLED=0 MTP_NUM_HEADS=0 "
OTHER += "MTP_LOSS_WEIGHT=0.2 LAWA_ENABLED=0 DTG_ENABLED=0"


def words(command: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in command.split())


def test_the_first_published_command_is_accepted():
    changed = pg.Hyperparameters.from_env(words(PR_414)).changed()
    assert changed == {"BIGRAM_VOCAB_SIZE": 1536, "LATE_QAT_THRESHOLD": 0.15, "SWA_ENABLED": True}


def test_the_second_published_command_is_accepted():
    changed = pg.Hyperparameters.from_env(words(PR_414) | words(OTHER)).changed()
    same = {"LATE_QAT_THRESHOLD": 0.15, "SWA_ENABLED": True}
    assert changed == same | {"BIGRAM_VOCAB_SIZE": 2048, "WARMDOWN_ITERS": 3000, "TTT_ENABLED": False}


def test_the_last_record_s_command_is_ours_but_for_what_is_refused_with_its_replacement():
    """Every name is a setting, another name of one, or refused by a line that says what to use; none is ignored."""
    command = words(APRIL)
    message = refusal(**command)
    assert message.startswith("FUSED_CE_ENABLED=1 is not offered here: COMPILE fuses what can be; leave it out")
    lacking = ["FUSED_CE_ENABLED", *message.partition("Nor are ")[2].split(", ")]
    assert {"LQER_ENABLED", "GLOBAL_TTT_BATCH_SEQS", "TTT_LORA_LR", "TTT_K_LORA"} <= {*lacking}
    for name in lacking:
        assert re.search(r"is not offered here: .+; leave it out", refusal(**{name: command[name]})), name
    rest = {name: text for name, text in command.items() if name not in lacking}
    # SMEAR_GATE_ENABLED=1 is March's gate in older commands: the wrong one would run without a word.
    assert refusal(**rest).endswith("set SMEAR_GATE_KIND=token, or SMEAR_GATE_KIND=channel for March's")
    rest["SMEAR_GATE_KIND"] = "token"
    assert "COMPRESSOR=pergroup must be" in refusal(**rest)
    rest["COMPRESSOR"] = "ans"
    assert refusal(**rest) == "PHASED_TTT_NUM_PHASES needs TTT_PARAMS=lora with TTT_LORA_RESET=1"
    rest["TTT_PARAMS"] = "lora"
    assert refusal(**rest) == "TTT_WEIGHT_DECAY needs TTT_OPTIMIZER=adamw"
    hp = pg.Hyperparameters.from_env(rest | {"TTT_OPTIMIZER": "adamw"})
    known = {name: text for name, text in rest.items() if name.lower() in FIELDS and name != "COMPRESSOR"}
    assert len(known) > 50
    for name, text in known.items():
        assert getattr(hp, name.lower()) == pg.parse_value(FIELDS[name.lower()], text), name


def test_the_defaults_are_those_of_the_first_recipe():
    lines = (ROOT / "records" / "recipes" / "pr714.env").read_text("utf-8").splitlines()
    environ = words(" ".join(line for line in lines if line and not line.startswith("#")))
    assert len(environ) > 10
    # Not by default: the small models of first steps are far below the cap, and would be stored as finely as can be.
    assert pg.Hyperparameters.from_env(environ).changed() == {"FIT_TO_CAP": True}


# -----------------------------------------------------------------------------
# BEFORE ANY WORK
# -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, environ, message",
    [
        ([], dict(NUM_HEADS=7), "error: NUM_HEADS=7 must divide MODEL_DIM=512"),
        ([], dict(OUT_DIR="sub/\udcff"), "error: OUT_DIR=sub/\\udcff must be UTF-8 text without control characters"),
        (["--help"], {}, "error: unknown argument --help; settings are environment variables"),
    ],
)
def test_a_bad_start_is_one_line_exit_code_2_and_no_file(tmp_path, arguments, environ, message):
    command = [sys.executable, ROOT / "train_gpt.py", *arguments]
    ran = subprocess.run(command, cwd=tmp_path, env=clean_environ(**environ), capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(message) and ran.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_variable_that_looks_like_a_setting_is_named_in_the_log(tiny_data, tmp_path):
    ran = run_here(tmp_path, tiny_data, ITERATIONS=1, WARMDOWN_ITERS=1, TTT_ENABLED=0, EVAL_STRIDE=0, MUON_LR="1")
    assert ran.code == 0 and "\nwarning: no such settings, so not read: MUON_LR\n" in ran.log.read_text("utf-8")


def test_a_model_beyond_the_memory_is_refused_before_any_work(tiny_data, tmp_path):
    ran = run_here(tmp_path / "out", tiny_data, MODEL_DIM=16384, MLP_MULT=64)
    assert ran.code == 2 and not (tmp_path / "out").exists()
    assert re.fullmatch(r"error: [\d,]+ weights take \d+ GiB at least and cpu has \d+; lower MODEL_DIM, .*\n", ran.err)


def test_memory_that_runs_out_is_one_line(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(pg, "accumulate_gradients", lambda *_: torch.empty(1 << 58))
    ran = run_here(tmp_path, tiny_data)
    assert ran.code == 2 and ran.err.startswith("error: out of memory; lower MICRO_BATCH_TOKENS (training), VAL_BATCH")
    assert ran.err.count("\n") == 1 and ran.log.read_text("utf-8").endswith(ran.err)


def test_settings_are_refused_before_the_process_group_is_made(monkeypatch, capsys):
    monkeypatch.setattr(pg.dist, "init_process_group", lambda *_: pytest.fail("group made"))
    environ = dict(RANK="0", WORLD_SIZE="3", LOCAL_RANK="0", TRAIN_SEQ_LEN="32", TRAIN_BATCH_TOKENS="64")
    assert pg.main([], environ) == 2
    assert capsys.readouterr().err.startswith("error: TRAIN_BATCH_TOKENS=64 must be a multiple of WORLD_SIZE=3")
    assert pg.main([], environ | {"RANK": "1"}) == 2
    assert capsys.readouterr().err == ""  # the main rank alone says it


def test_a_missing_compressor_is_an_error_before_any_work(monkeypatch, tmp_path, tiny_data):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    ran = run_here(tmp_path / "out", tiny_data, COMPRESSOR="zstd")
    assert ran.code == 2 and ran.err.startswith("error: COMPRESSOR=zstd needs `pip install zstandard`")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [0, 2])
def test_too_many_processes_on_a_host_is_said_once_by_someone(rank, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    world = dict(WORLD_SIZE="3", LOCAL_WORLD_SIZE="3")
    assert pg.main([], dict(DEVICE="cuda", RANK=str(rank), LOCAL_RANK=str(rank), **world)) == 2
    said = capsys.readouterr().err
    assert ("3 processes on a host with 2 GPUs; lower --nproc_per_node" in said) if rank == 0 else said == ""


# -----------------------------------------------------------------------------
# IMPORT
# -----------------------------------------------------------------------------

BARE_IMPORT = """
import sys
for name in "sentencepiece zstandard flash_attn flash_attn_interface tqdm triton".split():
    sys.modules[name] = None
import torch
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.current_device = lambda *_: 1 / 0
sys.path.insert(0, {root!r})
import train_gpt
h = train_gpt.Hyperparameters
assert (h.model_dim, h.num_layers, h.vocab_size) == (512, 11, 1024)
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
"""


def test_a_bare_import_needs_and_does_nothing(tmp_path):
    command = [sys.executable, "-B", "-c", BARE_IMPORT.format(root=str(ROOT))]
    environ = clean_environ(NUM_HEADS=7, MODEL_DIMS=1)  # settings are read by main, not by the import
    ran = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_the_import_costs_little_more_than_torch(tmp_path):
    def seconds(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean_environ(), check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    ours, torchs = [], []
    for _ in range(4):  # processor time, and the least of a few: the machine may be busy, and the first run compiles
        torchs.append(seconds("import numpy, torch, torch.distributed"))
        ours.append(seconds("import train_gpt"))
        if min(ours) <= min(torchs) + 1.0:
            break
    assert min(ours) <= min(torchs) + 1.0


# -----------------------------------------------------------------------------
# HASH AND TABLE
# -----------------------------------------------------------------------------


def test_the_settings_hash_is_that_of_the_configuration():
    base = pg.Hyperparameters().settings_hash()
    same = dict(SEED=7, RUN_ID="other", OUT_DIR="else", DATA_PATH="there", TOKENIZER_PATH="t.model")
    assert from_env(**same).settings_hash() == base
    assert (
        from_env(EVAL_ONLY=1, ARTIFACT_PATH="a").settings_hash()
        == from_env(EVAL_ONLY=1, ARTIFACT_PATH="b").settings_hash()
    )
    others = dict(MATRIX_LR=0.03, NUM_LAYERS=12, EMA_DECAY=0.99, LATE_QAT=0, EVAL_STRIDE=32, DTYPE="fp32")
    assert len({base} | {from_env(**{k: v}).settings_hash() for k, v in others.items()}) == 1 + len(others)


def test_the_page_of_settings_holds_the_table(capsys):
    assert pg.main(["--settings"], {}) == 0
    printed, page = capsys.readouterr().out.strip(), (ROOT / "SETTINGS.md").read_text("utf-8")
    (found,) = re.findall(r"<!-- settings:begin -->\n(.*?)<!-- settings:end -->", page, re.DOTALL)
    assert found.strip() == printed, "put the output of `python train_gpt.py --settings` between the markers"


def test_the_settings_table_names_every_setting_once():
    rows = re.findall(r"^\| `([A-Z0-9_]+)` \|", pg.settings_table(), re.MULTILINE)
    assert rows == [name.upper() for name in FIELDS]


# -----------------------------------------------------------------------------
# EVERY SETTING IS ALIVE
# -----------------------------------------------------------------------------


def test_every_setting_is_read():
    read = {node.attr for node in attribute_loads(TREE)}
    # Within the declaration, a check is no use: what only illegal_combinations reads does nothing.
    rules = next(n for n in CLASSES["Hyperparameters"].body if getattr(n, "name", "") == "illegal_combinations")
    in_rules = [node.attr for node in attribute_loads(rules)]
    everywhere = [node.attr for node in attribute_loads(TREE)]
    dead = [name for name in FIELDS if everywhere.count(name) - in_rules.count(name) < 1]
    assert dead == [] and set(FIELDS) <= read


@pytest.mark.parametrize("name", ["GPT", "Block", "Attention", "MLP", "Rotary", "BigramHash", "SmearGate",
                                  "ProjectedTable", "CastedLinear"])  # fmt: skip
def test_the_model_reads_model_settings_only(name):
    derived = {"head_dim", "mlp_dim", "ve_layer_ids"}
    model = {n for n, f in FIELDS.items() if f.metadata["section"] == "model"}
    read = {n.attr for n in attribute_loads(CLASSES[name]) if isinstance(n.value, ast.Name) and n.value.id == "hp"}
    assert read <= model | derived
    assert not read & {"seed", "iterations"} and "environ" not in ast.dump(CLASSES[name])
    properties = [n for n in CLASSES["Hyperparameters"].body if getattr(n, "name", "") in derived]
    assert {n.attr for p in properties for n in attribute_loads(p) if getattr(n.value, "id", "") == "self"} <= model


STREAM = random_tokens(3000, seed=1)


class Memory:
    """Tokens where the trainer expects shards."""

    def read(self, start: int, count: int) -> np.ndarray:
        return np.take(STREAM, np.arange(start, start + count), mode="wrap")

    def __len__(self) -> int:
        return len(STREAM)


def train(**changes) -> pg.Trainer:
    hp = tiny_hp(**{"val_loss_every": 0, "swa_every": 1, "iterations": 8} | changes)
    trainer = pg.Trainer(make_run(hp, Memory()))
    trainer.warm_up()
    trainer.train()
    return trainer


@functools.cache
def trained(shared: tuple) -> pg.Trainer:
    """The run that others are compared with."""
    return train(**dict(shared))


def differs(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    if {n: w.shape for n, w in a.items()} != {n: w.shape for n, w in b.items()}:
        return True
    return max(float((a[n] - b[n]).abs().max()) for n in a) > 1e-6


# Setting -> (changed value, what else both runs share). The raw trained weights must differ.
UNTIED = dict(tie_embeddings=False)
LOOPED = dict(num_loops=2, loop_start=1, loop_end=1)
TRAINED = dict(
    seed=(7, {}),
    dtype=("bf16", {}),
    vocab_size=(64, {}),
    num_layers=(4, {}),
    model_dim=(32, {}),
    num_heads=(2, {}),
    num_kv_heads=(4, {}),
    mlp_mult=(1.0, {}),
    mlp_kind=("swiglu", {}),
    leaky_relu_slope=(0.0, {}),
    value_residual=(True, {}),
    gated_attention=(True, {}),
    num_loops=(2, dict(loop_start=1, loop_end=1)),
    loop_vectors=(False, LOOPED),
    loop_start=(0, LOOPED),
    loop_end=(2, LOOPED),
    enable_looping_at=(0.0, LOOPED),
    tie_embeddings=(False, {}),
    rope_base=(100.0, {}),
    rope_dims=(0, {}),
    logit_softcap=(2.0, {}),
    qk_gain_init=(1.0, {}),
    ln_scale=(False, {}),
    unet_skips=(False, {}),
    skip_gates_enabled=(True, {}),
    parallel_start_layer=(2, {}),
    sparse_attn_gate_enabled=(True, {}),
    sparse_attn_gate_scale=(0.5, dict(sparse_attn_gate_enabled=True)),
    gate_window=(5, dict(sparse_attn_gate_enabled=True)),
    xsa_last_n=(0, {}),
    smear_gate_enabled=(False, {}),
    smear_gate_kind=("token", {}),
    bigram_vocab_size=(0, {}),
    bigram_dim=(4, {}),
    ve_enabled=(False, {}),
    ve_dim=(4, {}),
    ve_layers=("1", {}),
    document_mask=(True, {}),
    train_seq_len=(32, {}),
    iterations=(7, dict(warmdown_iters=0)),
    warmdown_iters=(0, {}),
    warmdown_frac=(1.0, {}),
    min_lr=(0.5, {}),
    train_batch_tokens=(128, {}),
    shuffle_sequences=(True, {}),
    embed_lr=(0.1, UNTIED),
    head_lr=(0.1, UNTIED),
    tied_embed_lr=(0.1, {}),
    tied_embed_init_std=(0.05, {}),
    matrix_lr=(0.1, {}),
    decoder_lr_mult=(2.0, {}),
    scalar_lr=(0.1, {}),
    muon_momentum=(0.5, dict(muon_momentum_warmup_steps=2)),
    muon_momentum_warmup_start=(0.5, {}),
    muon_momentum_warmup_steps=(2, {}),
    muon_backend_steps=(2, {}),
    muon_row_normalize=(True, {}),
    muon_wd=(0.9, {}),
    adam_wd=(0.9, {}),
    embed_wd=(0.9, {}),
    beta1=(0.5, {}),
    beta2=(0.5, {}),
    adam_eps=(1e-2, {}),
    grad_clip_norm=(1e-6, {}),
    qat_enabled=(True, dict(late_qat=False)),
    late_qat=(False, {}),
    late_qat_threshold=(0.9, {}),
    crown_q=(1e4, {}),
)


@pytest.mark.parametrize("name", TRAINED)
def test_a_setting_changes_the_trained_weights(name):
    value, shared = TRAINED[name]
    assert value != getattr(tiny_hp(**shared), name)
    with_it, without = train(**shared | {name: value}), trained(tuple(shared.items()))
    assert differs(weights_of(with_it.model), weights_of(without.model))


EXPORTED = dict(
    ema_enabled=(False, dict(swa_enabled=False)),
    ema_decay=(0.2, dict(swa_enabled=False)),
    swa_enabled=(False, dict(warmdown_iters=40)),
    swa_every=(2, dict(warmdown_iters=40)),
    swa_source=("ema", dict(warmdown_iters=40)),
)


STORED = dict(
    attn_bits=(8, {}),
    attn_out_bits=(8, {}),
    mlp_bits=(5, {}),
    embed_bits=(16, {}),
    projection_bits=(8, {}),
    control_bits=(16, {}),
    quant=("sdclip", {}),
    attn_clip_sigmas=(6.0, dict(quant="sdclip")),
    mlp_clip_sigmas=(6.0, dict(quant="sdclip")),
    embed_clip_sigmas=(6.0, dict(quant="sdclip")),
    fit_to_cap=(True, dict(artifact_cap_bytes=30_000)),
    trellis_enabled=(True, dict(quant="sdclip", compressor="ans")),
    gptq_enabled=(True, {}),
    gptq_calibration_tokens=(64, dict(gptq_enabled=True)),
    gptq_percdamp=(5.0, dict(gptq_enabled=True)),
    gptq_head_enabled=(True, dict(gptq_enabled=True)),
    gptq_block_size=(1, dict(gptq_enabled=True)),
)


@pytest.mark.parametrize("name", STORED)
def test_a_quantization_setting_changes_the_artifact(name, tmp_path):
    value, shared = STORED[name]

    def exported(**changes) -> dict[str, pg.Stored]:
        run = make_run(tiny_hp(**{"gptq_calibration_tokens": 320, **changes}), Memory())._replace(folder=tmp_path)
        weights = weights_of(build_model(run.hp))
        return pg.unpack_artifact(pg.export(run, weights)[1])[1]

    with_it, without = exported(**shared | {name: value}), exported(**shared)
    if name == "gptq_block_size":  # a matter of speed: the same codes but for ties
        same = torch.cat([(t.data == without[n].data).flatten() for n, t in with_it.items()]).float().mean()
        assert same > 0.999
    else:
        assert any(not torch.equal(t.dequantize(), without[n].dequantize()) for n, t in with_it.items())


def test_the_reserve_of_gptq_is_kept_free_of_training():
    def reserve(**changes) -> float:
        trainer = pg.Trainer(make_run(tiny_hp(max_wallclock_seconds=1000.0, **changes), Memory()))
        trainer.warm_up()
        return trainer.clock.reserve_ms

    assert reserve(gptq_enabled=True, gptq_reserve_seconds=77.0) >= 77_000
    assert 0 < reserve() < reserve(gptq_enabled=True, gptq_calibration_tokens=4096) < 77_000


@pytest.mark.parametrize("name", EXPORTED)
def test_an_averaging_setting_changes_what_is_exported_and_not_the_training(name):
    value, shared = EXPORTED[name]
    with_it, without = train(**shared, **{name: value}), trained(tuple(shared.items()))
    assert not differs(weights_of(with_it.model), weights_of(without.model))
    assert differs(with_it.exported_weights()[1], without.exported_weights()[1])


@pytest.fixture(scope="module")
def stored() -> dict[str, pg.Stored]:
    return quantize(train().exported_weights()[1], tiny_hp())


def evaluate(stored: dict[str, pg.Stored], **changes) -> dict[str, pg.Score]:
    return pg.Evaluation(make_run(tiny_hp(**changes)), stored).score_all()


HEDGE, LORA = dict(hedge_enabled=True), dict(ttt_params="lora", ttt_lora_chunk=4)
PHASES = LORA | dict(phased_ttt_num_phases=2)
SCORED = dict(
    eval_seq_len=(8, "final_int6_roundtrip"),
    eval_stride=(8, "final_int6_sliding_window"),
    ttt_lr=(0.5, "legal_ttt"),
    ttt_epochs=(1, "legal_ttt"),
    ttt_chunk_tokens=(48, "legal_ttt"),
    ttt_freeze_blocks=(3, "legal_ttt"),
    ttt_momentum=(0.0, "legal_ttt"),
    ttt_batch_seqs=(1, "legal_ttt"),
    ttt_grad_clip=(0.01, "legal_ttt"),
    ttt_params=("scales", "legal_ttt"),
    ttt_optimizer=("adamw", "legal_ttt"),
    ttt_warmup_chunks=(2, "legal_ttt"),
    ttt_max_chunks=(1, "legal_ttt"),
    ttt_sam_rho=(0.5, "legal_ttt"),
    ttt_temperature=(True, "legal_ttt"),
    hedge_enabled=(True, "legal_ttt"),
    hedge_eta=(0.01, "legal_ttt", HEDGE),
    hedge_alpha=(50.0, "legal_ttt", HEDGE),
    hedge_temperature=(3.0, "legal_ttt", HEDGE),
    ttt_lora_rank=(2, "legal_ttt", LORA),
    ttt_lora_alpha=(80.0, "legal_ttt", LORA),
    ttt_lora_chunk=(8, "legal_ttt", LORA),
    ttt_lora_reset=(False, "legal_ttt", LORA),
    ttt_lora=("o,mlp", "legal_ttt", LORA),
    ttt_warm_start_a=(True, "legal_ttt", PHASES | dict(val_batch_size=128, ttt_lr=1.0)),
    ttt_order=("stream", "legal_ttt", PHASES),
    phased_ttt_num_phases=(1, "legal_ttt", LORA),
    global_ttt_lr=(0.1, "legal_ttt", PHASES),
    global_ttt_momentum=(0.5, "legal_ttt", PHASES),
    ttt_weight_decay=(0.5, "legal_ttt", dict(ttt_optimizer="adamw")),
)


@pytest.mark.parametrize("name", SCORED)
def test_an_evaluation_setting_changes_the_score(name, stored):
    value, label, shared = *SCORED[name], *[{}][len(SCORED[name]) - 2 :]
    with_it = evaluate(stored, **shared | {name: value})
    without = evaluate(stored, **shared)
    assert abs(with_it[label].loss - without[label].loss) > 1e-6
    if label == "legal_ttt":
        assert with_it["final_int6_sliding_window"] == without["final_int6_sliding_window"]


def test_passes_can_be_left_out(stored):
    assert list(evaluate(stored, ttt_enabled=False))[-1] == "final_int6_sliding_window"
    assert list(evaluate(stored, ttt_enabled=False, eval_stride=0)) == ["final_int6_roundtrip"]


def test_warmup_steps_run_and_are_undone():
    warm, cold = train(warmup_steps=2), train(warmup_steps=0)
    assert [line for line in warm.run.log if line.startswith("warmup")] == ["warmup_step:1/2", "warmup_step:2/2"]
    assert not [line for line in cold.run.log if line.startswith("warmup")]
    a, b = weights_of(warm.model), weights_of(cold.model)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_micro_batches_are_the_accumulated_parts():
    # Fake quantization would turn a rounding difference into a step of the grid.
    split, whole = train(micro_batch_tokens=16, late_qat=False), train(late_qat=False)
    assert "world_size:1 grad_accum_steps:4" in split.run.log and "world_size:1 grad_accum_steps:1" in whole.run.log
    a, b = weights_of(split.model), weights_of(whole.model)
    assert all(torch.allclose(a[n], b[n], atol=1e-5) for n in a)


def test_val_batch_size_bounds_a_scoring_forward():
    counts = [pg.score_batch_windows(tiny_hp(val_batch_size=n), single_rank(), 16) for n in (1, 64, 128, 1 << 30)]
    assert counts == [1, 4, 8, pg.SCORE_TOKENS["cpu"] // 16]


def test_the_wallclock_cap_shortens_the_schedule_and_the_run():
    capped, free = tiny_hp(max_wallclock_seconds=1.0, iterations=1000), tiny_hp(iterations=1000)
    assert pg.lr_scale(0, capped, 800.0, 100.0) == pytest.approx(0.5) and pg.lr_scale(0, free, 800.0, 100.0) == 1.0
    trainer = train(max_wallclock_seconds=0.2, iterations=10_000)
    assert 0 < trainer.step < 10_000 and trainer.run.log[-2].startswith("stopping_early: wallclock_cap")


def test_training_lines_come_as_often_as_asked():
    def counted(pattern: str, **settings) -> int:
        return sum(pattern in line for line in train(iterations=14, **settings).run.log)

    assert [counted("train_loss", train_log_every=n) for n in (0, 2, 500)] == [0, 12, 10]
    assert [counted("val_loss", val_loss_every=n) for n in (0, 5, 7)] == [0, 2, 1]


def test_compile_asks_torch_to_compile(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: (calls.append(f), f)[1])
    train(compile="0")
    assert calls == []
    train(compile="1")
    assert len(calls) == 2  # the model and Newton-Schulz


def test_attention_kernels_are_chosen_by_name_or_refused():
    cpu = torch.device("cpu")
    chosen = {kind: pg.choose_attention(tiny_hp(attention=kind), cpu, torch.float32) for kind in ("sdpa", "matmul")}
    assert chosen == {"sdpa": ("sdpa", pg.sdpa), "matmul": ("matmul", pg.matmul_attention)}
    assert pg.choose_attention(tiny_hp(attention="auto"), cpu, torch.float32) == ("sdpa", pg.sdpa)
    for kind in ("fa2", "fa3"):
        with pytest.raises(pg.UserError, match=f"ATTENTION={kind} needs CUDA; use ATTENTION=auto or sdpa"):
            pg.choose_attention(tiny_hp(attention=kind), cpu, torch.float32)


def test_documents_are_kept_apart_by_the_kernels_that_can(monkeypatch):
    """Flash kernels cannot, flex needs a compiler; auto says what it fell back from, a name is refused."""
    cpu, hopper = torch.device("cpu"), types.SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)  # no backward on CPUs
    tried = pg.attention_fails
    monkeypatch.setattr(pg, "attention_fails", lambda attend, hp, _, dtype: tried(attend, hp, cpu, dtype))
    hp = tiny_hp(attention="auto", document_mask=True, compile="auto", model_dim=32)
    assert pg.choose_attention(hp, hopper, torch.bfloat16) == ("flex", pg.flex)
    assert pg.choose_attention(hp, cpu, torch.bfloat16)[1] is pg.short_attention
    uncompiled = dataclasses.replace(hp, compile="0")
    assert pg.choose_attention(uncompiled, hopper, torch.bfloat16) == ("sdpa (flex needs COMPILE=1)", pg.sdpa)
    for masked, kind, says in ((True, "fa3", "needs DOCUMENT_MASK=0"), (False, "flex", "needs DOCUMENT_MASK=1")):
        with pytest.raises(pg.UserError, match=f"^ATTENTION={kind} {says}; use ATTENTION=auto or sdpa$"):
            hp = tiny_hp(attention=kind, document_mask=masked, model_dim=32)
            pg.choose_attention(hp, hopper, torch.bfloat16)


def test_a_kernel_is_tried_before_it_is_chosen(monkeypatch):
    """As where a wheel is built for another GPU: auto takes the next kernel and says why, a name is refused."""
    cpu, hp = torch.device("cpu"), tiny_hp(attention="auto", model_dim=32)
    assert pg.attention_fails(pg.sdpa, hp, cpu, torch.bfloat16) is None

    def broken(q, *_):
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    def broken_backward(q, *_):
        class Fails(torch.autograd.Function):
            forward = staticmethod(lambda ctx, x: x)
            backward = staticmethod(broken)

        return Fails.apply(q)

    for attend in (broken, broken_backward):
        said = pg.attention_fails(attend, hp, cpu, torch.bfloat16)
        assert said == "does not run here (CUDA error: no kernel image is available)"

    hopper = types.SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(pg, "load_flash", lambda kind: broken if kind == "fa3" else pg.sdpa)
    tried = pg.attention_fails
    monkeypatch.setattr(pg, "attention_fails", lambda attend, hp, _, dtype: tried(attend, hp, cpu, dtype))
    assert pg.choose_attention(hp, hopper, torch.bfloat16) == ("fa2", pg.sdpa)
    with pytest.raises(pg.UserError, match="^ATTENTION=fa3 does not run here .*; use ATTENTION=auto or sdpa$"):
        pg.choose_attention(tiny_hp(attention="fa3", model_dim=32), hopper, torch.bfloat16)


def test_a_device_that_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pg.Ranks(tiny_hp(device="auto"), {}).device == torch.device("cpu")
    with pytest.raises(pg.UserError, match="DEVICE=cuda, but torch sees no CUDA device"):
        pg.Ranks(tiny_hp(device="cuda"), {})


def test_every_setting_has_a_liveness_test():
    here = {"warmup_steps", "micro_batch_tokens", "val_batch_size", "max_wallclock_seconds", "train_log_every"}
    here |= {"val_loss_every", "compile", "attention", "device", "ttt_enabled"}
    chain = {"eval_only", "artifact_path", "save_weights", "export_only", "weights_path", "run_id", "out_dir"}
    chain |= {"compressor", "artifact_cap_bytes", "data_path", "tokenizer_path"}  # in test_chain.py and test_data.py
    chain |= {"checkpoint_every", "resume"}  # in test_resume.py
    chain |= {"caseops_enabled"}  # in test_caseops.py
    chain |= {"save_scores"}  # in test_saved_scores.py
    chain |= {"eval_max_seconds"}  # in test_evaluation.py
    here |= {"gptq_reserve_seconds"}
    tables = [*TRAINED, *EXPORTED, *STORED, *SCORED, *here, *chain]
    assert sorted(tables) == sorted(FIELDS)
    assert TINY.keys() <= FIELDS.keys()
