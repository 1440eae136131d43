"""Static legality on small scripts: what breaks a rule is named, what keeps the rules is left alone."""

import ast
import base64
import bz2
import lzma
import re
import textwrap
import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from records.submission import legality, unpack

ROOT = Path(__file__).resolve().parent.parent

HEAD = """
import os
import numpy as np
import torch
import torch.nn.functional as F
class Hyperparameters:
    train_files = os.path.join("data", "fineweb_train_*.bin")
    val_files = os.path.join("data", "fineweb_val_*.bin")
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", "3"))
    slot_enabled = bool(int(os.environ.get("SLOT_ENABLED", "0")))
    ngram_enabled = os.environ.get("NGRAM_ENABLED", "0") == "1"
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 1000))
"""
EVAL = """
def eval_val(args, model, val_tokens, base_bytes_lut):
    val_loss_sum = torch.zeros((), dtype=torch.float64)
    val_token_count, val_byte_count = 0.0, 0.0
    model.eval()
    with torch.inference_mode():
        for start in range(0, val_tokens.numel() - 1, 1024):
            local = val_tokens[start : start + 1025].to(torch.int64)
            x, y = local[:-1].reshape(1, -1), local[1:].reshape(1, -1)
            batch_loss = model(x, y).detach()
            val_loss_sum += batch_loss.to(torch.float64) * y.numel()
            val_token_count += y.numel()
            val_byte_count += base_bytes_lut[y].sum()
    model.train()
    return val_loss_sum / val_token_count
"""
TRAIN = """
def train(args, model, loader, optimizer, val_tokens, lut):
    for step in range(100):
        if step % args.val_loss_every == 0:
            val_loss = eval_val(args, model, val_tokens, lut)
            print(f"val_loss:{val_loss:.4f}")
        x, y = loader.next_batch(524288)
        loss = model(x, y)
        loss.backward()
        optimizer.step()
"""
MAIN = """
def main():
    args, model, loader, lut = Hyperparameters(), build(), Loader(Hyperparameters.train_files), None
    val_tokens = load_validation_tokens(args.val_files)
    optimizer = torch.optim.AdamW(model.parameters())
    train(args, model, loader, optimizer, val_tokens, lut)
    {body}
    print(eval_val(args, model, val_tokens, lut))
if __name__ == "__main__":
    main()
"""


def script(functions: str = "", body: str = "pass") -> str:
    return HEAD + EVAL + TRAIN + textwrap.dedent(functions) + MAIN.format(body=body)


LEGAL_TTT = """
def eval_val_ttt(args, model, val_tokens, chunks, optimizer):
    loss_sum = torch.zeros((), dtype=torch.float64)
    for ci, chunk in enumerate(chunks):
        model.eval()
        with torch.inference_mode():
            for start in chunk:
                x, y = val_tokens[start : start + 1024], val_tokens[start + 1 : start + 1025]
                nll = F.cross_entropy(model.forward_logits(x), y, reduction="none")
                loss_sum += nll.sum()
        if ci < len(chunks) - 1 and args.ttt_epochs > 0:
            model.train()
            for _ep in range(args.ttt_epochs):
                for start in chunk:
                    local = val_tokens[start : start + 1025]
                    loss = model(local[:-1], local[1:])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
    return loss_sum
"""
PRE_QUANT_TTT = """
def ttt_adapt(args, model, val_tokens, optimizer):
    for epoch in range(args.ttt_epochs):
        for start in range(0, val_tokens.numel() - 1, 1024):
            local = val_tokens[start : start + 1025]
            loss = model(local[:-1], local[1:])
            loss.backward()
            optimizer.step()
"""
SLOT = """
def eval_val_slot(args, model, val_tokens, windows):
    loss_sum = 0.0
    for s in windows:
        x, y = val_tokens[s : s + 1024], val_tokens[s + 1 : s + 1025]
        with torch.no_grad():
            hidden = model.forward_hidden(x)
        delta = torch.zeros(1, 1, 512, requires_grad=True)
        opt = torch.optim.AdamW([delta], lr=0.005)
        for _ in range(8):
            opt.zero_grad()
            loss = F.cross_entropy(model.head(hidden + delta), y)
            loss.backward()
            opt.step()
        with torch.no_grad():
            nll = F.cross_entropy(model.head(hidden + delta), y, reduction="none")
            loss_sum += nll.sum().item()
    return loss_sum
"""
NGRAM = """
def eval_val_ngram(args, model, val_tokens, val_np, tables, primes, mask):
    loss_sum = 0.0
    for s in range(0, len(val_np) - 1, 64):
        with torch.no_grad():
            nll = F.cross_entropy(model(val_tokens[s : s + 64]), val_tokens[s + 1 : s + 65], reduction="none").numpy()
        seg_model_p = np.exp(-nll)
        ctx_hash = np.zeros(64, dtype=np.uint64)
        for k in range(3):
            ctx_hash ^= val_np[s - k : s - k + 64] * primes[k]
        ctx_key = ctx_hash & mask
        tgt_np = val_np[s + 1 : s + 65].astype(np.uint64)
        full_key = (ctx_hash ^ (tgt_np * primes[3])) & mask
        full_counts = tables[1][full_key]
        p_ng = full_counts / np.maximum(tables[0][ctx_key], 1)
        mixed = (1.0 - 0.4) * seg_model_p + 0.4 * p_ng
        loss_sum += -np.log(mixed).sum()
        np.add.at(tables[0], ctx_key, 1)
        np.add.at(tables[1], full_key, 1)
    return loss_sum
"""
# name -> (functions, body of main, the rule)
ILLEGAL = {
    "each chunk learned, then scored as a total": (
        """
        def eval_val_ttt(model, val_tokens, optimizer):
            tot = 0.0
            for c in range(10):
                x = val_tokens[c * 100 : (c + 1) * 100]
                model(x[:-1], x[1:]).mean().backward()
                optimizer.step()
                with torch.no_grad():
                    tot += model(x[:-1], x[1:]).sum().item()
            return tot
        """,
        "eval_val_ttt(model, val_tokens, optimizer)",
        "train_before_score",
    ),
    "pre-quant TTT": (PRE_QUANT_TTT, "ttt_adapt(args, model, val_tokens, optimizer)", "train_before_score"),
    "train then score in one loop": (
        """
        def eval_val_ttt(args, model, val_tokens, chunks, optimizer):
            loss_sum = 0.0
            for chunk in chunks:
                x, y = val_tokens[chunk : chunk + 1024], val_tokens[chunk + 1 : chunk + 1025]
                loss = model(x, y)
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    loss_sum += model(x, y).item()
            return loss_sum
        """,
        "eval_val_ttt(args, model, val_tokens, [0], optimizer)",
        "train_before_score",
    ),
    "score, train, score again": (
        """
        def learn(model, val_tokens, optimizer):
            for start in range(0, 10_000, 1024):
                loss = model(val_tokens[start : start + 1024], val_tokens[start + 1 : start + 1025])
                loss.backward()
                optimizer.step()
        """,
        "eval_val(args, model, val_tokens, lut); learn(model, val_tokens, optimizer)",
        "train_before_score",
    ),
    "warm-up on validation tokens": (
        """
        def warm_up(model, val_tokens):
            x, y = val_tokens[:1024], val_tokens[1:1025]
            model(x, y).backward()
        """,
        "warm_up(model, val_tokens)",
        "train_before_score",
    ),
    "through a batch function and a helper": (
        """
        def get_batch(tokens, i):
            return tokens[i : i + 1024], tokens[i + 1 : i + 1025]
        def fit(model, batch, optimizer):
            inputs, labels_ = batch
            total = model(inputs, labels_).mean()
            total.backward()
            optimizer.step()
        """,
        "[fit(model, get_batch(val_tokens, i), optimizer) for i in range(9)]",
        "train_before_score",
    ),
    "tokens read from validation files": (
        """
        def adapt(args, model, optimizer):
            tokens = torch.cat([load_data_shard(Path(f)) for f in sorted(glob.glob(args.val_files))])
            for i in range(9):
                chunk = tokens[i * 1024 : i * 1024 + 1025]
                model(chunk[:-1], chunk[1:]).backward()
                optimizer.step()
        """,
        "adapt(args, model, optimizer)",
        "train_before_score",
    ),
    "autograd.grad": (
        """
        def tune(model, val_tokens):
            out = model(val_tokens[:1024], val_tokens[1:1025])
            for p, g in zip(model.parameters(), torch.autograd.grad(out, list(model.parameters()))):
                p.data -= 0.01 * g
        """,
        "tune(model, val_tokens)",
        "train_before_score",
    ),
    "optimizer closure": (
        """
        def tune(model, val_tokens):
            opt = torch.optim.LBFGS(model.parameters())
            x, y = val_tokens[:1024], val_tokens[1:1025]
            def closure():
                loss = model(x, y)
                loss.backward()
                return loss
            opt.step(closure)
        """,
        "tune(model, val_tokens)",
        "train_before_score",
    ),
    "multi-epoch, last score kept": (
        """
        def eval_val_ttt(args, model, val_tokens, chunks, optimizer):
            for epoch in range(args.ttt_epochs):
                loss_sum = 0.0
                for chunk in chunks:
                    x, y = val_tokens[chunk : chunk + 1024], val_tokens[chunk + 1 : chunk + 1025]
                    with torch.no_grad():
                        loss_sum += model(x, y).item()
                    loss = model(x, y)
                    loss.backward()
                    optimizer.step()
            return loss_sum
        """,
        "eval_val_ttt(args, model, val_tokens, [0], optimizer)",
        "several_passes",
    ),
    "passes counted by a name without use": (
        """
        def eval_twice(model, val_tokens, optimizer):
            for _ in range(2):
                with torch.no_grad():
                    loss_sum = 0.0
                    for i in range(9):
                        loss_sum += model(val_tokens[i], val_tokens[i + 1])
                for i in range(9):
                    model(val_tokens[i], val_tokens[i + 1]).backward()
                optimizer.step()
            return loss_sum
        """,
        "eval_twice(model, val_tokens, optimizer)",
        "several_passes",
    ),
    "SLOT": (SLOT, "eval_val_slot(args, model, val_tokens, [0])", "scored_region"),
    "hashed n-gram with the target in its key": (
        NGRAM,
        "eval_val_ngram(args, model, val_tokens, val_tokens.numpy(), [], [], 7)",
        "target_in_key",
    ),
    "blend of the realised token's probability": (
        NGRAM,
        "eval_val_ngram(args, model, val_tokens, val_tokens.numpy(), [], [], 7)",
        "unnormalised_mix",
    ),
    "a hash() of context and target": (
        "def prob(cache, context, target):\n    return cache.get(hash((context, target)), 0)\n",
        "prob({}, (1, 2), 3)",
        "target_in_key",
    ),
    "minimum of two scores of a token": (
        "def best(nll_a, nll_b):\n    return torch.minimum(nll_a, nll_b).sum()\n",
        "best(1, 2)",
        "best_of_passes",
    ),
    "where on two scores": (
        "def best(nll_nn, nll_cache):\n    return torch.where(nll_nn < nll_cache, nll_nn, nll_cache)\n",
        "best(1, 2)",
        "best_of_passes",
    ),
    "smallest of stacked passes": (
        "def best(all_nll):\n    return torch.stack(all_nll).amin(dim=0)\n",
        "best([])",
        "best_of_passes",
    ),
    "the better of two results": (
        "def final(sliding_bpb, ttt_bpb):\n    return min(sliding_bpb, ttt_bpb)\n",
        "final(1, 2)",
        "best_of_passes",
    ),
    "download": ("import urllib.request\n", "urllib.request.urlopen('http://a.b')", "network"),
    "hub": ("from huggingface_hub import hf_hub_download\n", "hf_hub_download('a', 'b')", "network"),
    "pip": ("import subprocess\n", "subprocess.run(['pip', 'install', 'zstandard'])", "network"),
    "shell": ("", "os.system('curl http://a.b | sh')", "network"),
    "evaluation that reads training shards": (
        """
        def eval_val_cache(args, val_tokens):
            for file in sorted(glob.glob(args.train_files)):
                prefill(load_data_shard(file))
        """,
        "eval_val_cache(args, val_tokens)",
        "training_data_in_eval",
    ),
    "calibration on validation tokens": (
        "def collect_hessians(model, tokens):\n    model(tokens)\n",
        "collect_hessians(model, val_tokens[:65536].to('cuda'))",
        "calibration_on_validation",
    ),
    "calibration that takes them itself": (
        "def gptq_calibrate(model, data):\n    model(data.val_tokens)\n",
        "gptq_calibrate(model, None)",
        "calibration_on_validation",
    ),
}
CLEAN = {
    "plain": script(),
    "score-first TTT": script(LEGAL_TTT, "eval_val_ttt(args, model, val_tokens, [], optimizer)"),
    "score-first by calls": script(
        """
        def score_chunk(model, tokens):
            with torch.no_grad():
                return F.cross_entropy(model(tokens[:-1]), tokens[1:], reduction="sum")
        def learn_chunk(model, tokens, optimizer):
            model(tokens[:-1], tokens[1:]).backward()
            optimizer.step()
        def eval_val_ttt(model, val_tokens, chunks, optimizer):
            nats = 0.0
            for first, last in chunks:
                part = val_tokens[first:last]
                nats += score_chunk(model, part)
                if last < val_tokens.numel():
                    learn_chunk(model, part, optimizer)
            return nats
        """,
        "eval_val_ttt(model, val_tokens, [], optimizer)",
    ),
    "score-first, kept as a total": script(
        """
        def eval_val_ttt(model, val_tokens, optimizer):
            tot = 0.0
            for c in range(10):
                x = val_tokens[c * 100 : (c + 1) * 100]
                with torch.no_grad():
                    tot += model(x[:-1], x[1:]).sum().item()
                model(x[:-1], x[1:]).mean().backward()
                optimizer.step()
            return tot
        """,
        "eval_val_ttt(model, val_tokens, optimizer)",
    ),
    "LoRA per document, score first": script(
        """
        def eval_val_ttt_lora(model, val_tokens, docs, base_bytes_lut):
            loss_sum = torch.zeros(())
            for start, length in docs:
                lora = BatchedTTTLoRA(model)
                opt = torch.optim.Adam(lora.parameters())
                for ci in range(length // 256):
                    chunk = val_tokens[start + ci * 256 : start + ci * 256 + 257]
                    x, y = chunk[:-1], chunk[1:]
                    ptl = model(x, y, lora=lora)
                    with torch.no_grad():
                        loss_sum += ptl.sum()
                    if ci < length // 256 - 1:
                        opt.zero_grad()
                        ptl.mean().backward()
                        opt.step()
            return loss_sum
        """,
        "eval_val_ttt_lora(model, val_tokens, [], None)",
    ),
    "names used again for training and validation": script(
        """
        def loop(model, train_loader, val_loader, optimizer):
            for epoch in range(3):
                total_loss = 0.0
                with torch.no_grad():
                    for x, y in val_loader:
                        loss = model(x, y)
                        total_loss += loss.item()
                for x, y in train_loader:
                    loss = model(x, y)
                    loss.backward()
                    optimizer.step()
        """,
        "loop(model, [], [], optimizer)",
    ),
    "bigram hash of inputs": script(
        """
        def bigram_hash(tokens, size):
            t = tokens.to(torch.int32)
            out = torch.empty_like(t)
            out[..., 1:] = torch.bitwise_xor(36313 * t[..., 1:], 27191 * t[..., :-1]) % size
            return out
        def embed(table, tokens):
            return table[bigram_hash(tokens, 3072)]
        """,
        "embed(None, val_tokens)",
    ),
    "n-gram tables that are only counted up": script(
        """
        def count(table, ctx_hash, tgt_np, mask):
            full_key = (ctx_hash ^ (tgt_np * 17)) & mask
            np.add.at(table, full_key, 1)
            table[full_key] += 1
            table[full_key] = table[full_key] + 1
            table[full_key] = table.get(full_key, 0) + 1
        """,
        "count(None, 1, 2, 3)",
    ),
    "best row scale by error": script(
        """
        def search(w):
            best_err, best = float("inf"), None
            for clip in (0.99, 0.999):
                err = (w - quant(w, clip)).square().sum()
                if err < best_err:
                    best_err, best = min(best_err, err), clip
            return best
        """,
        "search(1)",
    ),
    "calibration on training data": script(
        """
        def collect_hessians(model, train_loader):
            for _ in range(8):
                x, _ = train_loader.next_batch(524288)
                with torch.no_grad():
                    model(x)
        """,
        "collect_hessians(model, loader)",
    ),
    "gather of the target's log-probability": script(
        """
        def nll_of(logits, targets):
            logp = F.log_softmax(logits, -1)
            return -logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        """,
        "nll_of(model(val_tokens), val_tokens)",
    ),
    "a scorer that is decorated": script(
        """
        @torch.inference_mode()
        def add_scores(model, x, y, loss_sum):
            loss_sum += F.cross_entropy(model(x), y, reduction="sum")
        def eval_val_ttt(model, val_tokens, optimizer):
            loss_sum = torch.zeros(())
            for i in range(9):
                x, y = val_tokens[i * 64 : i * 64 + 64], val_tokens[i * 64 + 1 : i * 64 + 65]
                add_scores(model, x, y, loss_sum)
                model(x, y).backward()
                optimizer.step()
            return loss_sum
        """,
        "eval_val_ttt(model, val_tokens, optimizer)",
    ),
    "LoRA, batched, from validation files": script(
        """
        def _accumulate_bpb(ptl, y, b, lut, loss_sum, byte_sum):
            lbl = ptl[b].to(torch.float64)
            loss_sum += lbl.sum()
            byte_sum += (lut[y[b]] & ~lut[y[b] - 1]).sum() * lbl.numel()
        def eval_val_ttt_lora(args, model, lut):
            all_tokens = torch.cat([load_data_shard(Path(f)) for f in sorted(glob.glob(args.val_files))])
            loss_sum, byte_sum = torch.zeros(()), torch.zeros(())
            for bi in range(0, len(all_tokens), 64):
                cur_lora = BatchedTTTLoRA(64, model)
                cur_opt = torch.optim.Adam(cur_lora.parameters(), lr=0.01)
                for ci in range(8):
                    needs_train = ci < 7
                    chunk = all_tokens[bi + ci : bi + ci + 257].to("cuda", torch.int64)
                    x, y = chunk[:-1], chunk[1:]
                    if needs_train:
                        ptl = model(x, y, lora=cur_lora)
                    else:
                        with torch.no_grad():
                            ptl = model(x, y, lora=cur_lora)
                    with torch.no_grad():
                        for b in range(64):
                            _accumulate_bpb(ptl, y, b, lut, loss_sum, byte_sum)
                    if needs_train:
                        per_doc = ptl[:, 0:256].mean(dim=-1)
                        cur_opt.zero_grad()
                        per_doc.sum().backward()
                        cur_opt.step()
            return loss_sum / byte_sum
        """,
        "eval_val_ttt_lora(args, model, None)",
    ),
    "timed passes handed over as functions": script(
        """
        def timed_eval(label, fn, *args, **kwargs):
            val_loss = fn(*args, **kwargs)
            print(f"{label} val_loss:{val_loss:.8f}")
            return val_loss
        def train_model(h, val_data, model, optimizer):
            for step in range(9):
                timed_eval("val", eval_val, h, model, val_data, None)
                x, y = Loader(h.train_files).next_batch()
                loss = model(x, y)
                loss.backward()
                optimizer.step()
        """,
        "train_model(args, val_tokens, model, optimizer); timed_eval('q', eval_val, args, model, val_tokens, lut)",
    ),
    "byte counts of targets": script(
        """
        def count_bytes(prev, tgt, base_lut, space_lut, boundary_lut):
            weight = (space_lut[tgt] & ~boundary_lut[prev]) * 1.0
            return (base_lut[tgt] + weight)[weight > 0].sum()
        """,
        "count_bytes(val_tokens[:-1], val_tokens[1:], 1, 2, 3)",
    ),
    "a list that is called requests": script("", "requests = []; requests.append(1)"),
    "gathering over ranks": script("import socket\n", "print(socket.gethostname())"),
}


def rules(source: str, level: str = "FAIL", **logged) -> set[str]:
    return {finding.rule for finding in legality.examine(source, logged) if finding.level == level}


@pytest.mark.parametrize("name", ILLEGAL)
def test_what_breaks_a_rule_is_named(name):
    functions, body, rule = ILLEGAL[name]
    assert rule in rules(script(functions, body))


@pytest.mark.parametrize("name", CLEAN)
def test_what_keeps_the_rules_is_left_alone(name):
    assert legality.examine(CLEAN[name]) == []


def test_a_method_of_a_class_that_nothing_makes_is_not_called_whoever_shares_its_name():
    functions, body, rule = ILLEGAL["each chunk learned, then scored as a total"]
    method = "class Learner:\n" + textwrap.indent(
        textwrap.dedent(functions).replace("def eval_val_ttt(", "def check(self, "), "    "
    )
    elsewhere = "store.check(val_tokens)"
    assert rule not in rules(script(method, elsewhere)) and rule in rules(script(method, elsewhere), "note")
    assert rule in rules(script(method, "Learner().check(model, val_tokens, optimizer)"))
    assert rule in rules(script(method, elsewhere + "; learner = Learner"))


def test_this_project_s_script_is_left_alone():
    findings = legality.examine((ROOT / "train_gpt.py").read_text("utf-8"))
    assert [finding for finding in findings if finding.level != "note"] == []
    # LoRA TTT takes score and gradient from one forward; a reader has to see that the score is taken first.
    findings = legality.examine((ROOT / "train_gpt.py").read_text("utf-8"), {"TTT_PARAMS": "lora"})
    (warning,) = [finding for finding in findings if finding.level != "note"]
    assert (warning.rule, warning.level) == ("train_before_score", "warn") and "is their score" in warning.text


def test_this_project_s_script_is_understood():
    source = (ROOT / "train_gpt.py").read_text("utf-8")
    kept = "                nats.append(self.score(method, visible, segment))\n"
    learn = re.search(r"( +)if learning and .*\n +self\.learn\(.*\n", source)[0]
    assert kept + learn in source
    findings = legality.examine(source.replace(kept + learn, learn + kept))
    assert ("train_before_score", "FAIL") in {(finding.rule, finding.level) for finding in findings}
    plain = "        return nats.detach()[counted].cpu().numpy()\n"
    assert plain in source
    cheated = source.replace(plain, "        self.learn(tokens, segment)\n" + plain)
    findings = legality.examine(cheated, {"TTT_PARAMS": "lora"})
    assert ("train_before_score", "warn") in {(finding.rule, finding.level) for finding in findings}


def test_a_table_keeps_the_row_that_a_setting_names():
    functions = """
        def first(model, val_tokens, optimizer):
            model(val_tokens[:-1], val_tokens[1:]).backward()
            optimizer.step()
            return eval_val(model, val_tokens)
        def second(model, val_tokens, optimizer):
            return eval_val(model, val_tokens)
        METHODS = dict(first=first, second=second)
        """
    for default, level in (("second", "note"), ("first", "FAIL")):
        source = script(functions, "METHODS[args.method](model, val_tokens, optimizer)").replace(
            "class Hyperparameters:\n", f"class Hyperparameters:\n    method = '{default}'\n"
        )
        assert "train_before_score" in rules(source, level), level
    assert "train_before_score" in rules(source.replace("METHODS[args.method]", "METHODS.get(args.method)"))
    changed = "METHODS['second'] = first\nMETHODS[args.method]"
    assert rules(
        script(functions + "\na, b = dict(a=first, b=second)", "METHODS[args.method](model, val_tokens, optimizer)")
    )
    source = script(functions, f"{changed}(model, val_tokens, optimizer)".replace("\n", "; "))
    source = source.replace("class Hyperparameters:\n", "class Hyperparameters:\n    method = 'second'\n")
    assert "train_before_score" in rules(source, "warn"), "a row that is set later is live"


def test_a_condition_on_the_parameter_of_a_lambda_is_read_beside_calls_without_a_name():
    source = script("TABLE = {}", "TABLE['x'](1); choose = lambda on: eval_val(args, model, val_tokens) if on else 0")
    assert rules(source) == set()


@pytest.mark.parametrize(
    ("signature", "call", "level"),
    [
        ("model, *rest, on=True", "model, 0", "FAIL"),  # a surplus value is no parameter's of a keyword
        ("model, *rest, on=True", "model, 0, on=False", "note"),
        ("model, /, on=False", "model", "note"),
        ("model, *on", "model, 0", "FAIL"),  # (0,) is true
    ],
)
def test_a_value_goes_to_the_parameter_that_python_gives_it_to(signature, call, level):
    run = f"def run({signature}):\n    if on:\n        eval_val_slot(None, model, load_validation_tokens(''), [0])\n"
    assert "scored_region" in rules(script(textwrap.dedent(SLOT) + run, f"run({call})"), level)


def test_a_finding_points_at_its_line():
    source = script(PRE_QUANT_TTT, "ttt_adapt(args, model, val_tokens, optimizer)")
    (finding,) = legality.examine(source)
    lines = source.split("\n")
    assert lines[finding.line - 1].strip() == "loss.backward()"
    assert str(finding.line) in finding.text


# -----------------------------------------------------------------------------
# Reachability
# -----------------------------------------------------------------------------

SWITCHED = {
    "if": "    if args.slot_enabled:\n        eval_val_slot(args, model, val_tokens, [0])",
    "and": "    if args.slot_enabled and step_count() > 3:\n        eval_val_slot(args, model, val_tokens, [0])",
    "conditional expression": "    print(eval_val_slot(args, model, val_tokens, [0]) if args.slot_enabled else 0)",
    "return before it": "if not args.slot_enabled:\n        return\n    eval_val_slot(args, model, val_tokens, [0])",
}


@pytest.mark.parametrize("form", SWITCHED)
def test_code_behind_a_setting_that_is_off_is_a_note(form):
    source = script(SLOT, SWITCHED[form].strip())
    assert rules(source) == set()
    assert "scored_region" in rules(source, "note")
    assert "scored_region" in rules(source, SLOT_ENABLED="1")
    assert "scored_region" in rules(source, slot_enabled=True)
    assert rules(source.replace('"SLOT_ENABLED", "0"', '"SLOT_ENABLED", "1"'), slot_enabled=False) == set()
    assert "scored_region" in rules(source.replace('"SLOT_ENABLED", "0"', '"SLOT_ENABLED", "1"'))


# A switch that is read in a roundabout way, where {0} is its use
ROUNDABOUT = {
    "a local name": ("", "slot = args.slot_enabled\n    if slot:\n        {0}"),
    "a name of a name": ("", "slot = bool(args.slot_enabled)\n    use = slot and True\n    if use:\n        {0}"),
    "getattr": ("", "if getattr(args, 'slot_enabled', False):\n        {0}"),
    "getattr of what is nowhere set": ("", "if getattr(args, 'use_slots', False):\n        {0}"),
    "a local name from getattr": ("", "on = bool(getattr(args, 'slot_enabled', 0))\n    if on:\n        {0}"),
    "a parameter": ("def evaluate(args, on):\n    if on:\n        {0}\n", "evaluate(args, args.slot_enabled)"),
    "a parameter's default": ("def evaluate(args, *, slot=False):\n    if slot:\n        {0}\n", "evaluate(args)"),
    "a field of another object": ("", "cfg.run_slot = args.slot_enabled\n    if cfg.run_slot:\n        {0}"),
    "a dictionary": ("", "cfg = dict_of()\n    cfg = {{'slot': args.slot_enabled}}\n    if cfg['slot']:\n        {0}"),
    "a dictionary's get": ("", "c = {{'slot': args.slot_enabled}}\n    if c.get('slot', True):\n        {0}"),
    "a helper for the environment": (
        "def env_flag(name, default):\n    return os.environ.get(name, default) == '1'\n",
        "if env_flag('SLOT_ENABLED', '0'):\n        {0}",
    ),
    "a local name that is the setting's": (
        "",
        "slot_enabled = bool(args.slot_enabled)\n    if slot_enabled:\n        {0}",
    ),
    "the same, from getattr": ("", "use_slots = getattr(args, 'use_slots', False)\n    if use_slots:\n        {0}"),
    "an argument's default": (
        "import argparse\nP = argparse.ArgumentParser()\nP.add_argument('--slot-enabled', action='store_true')\n",
        "a = P.parse_args()\n    slot_enabled = a.slot_enabled\n    if slot_enabled:\n        {0}",
    ),
    "a helper with a default of its own": (
        "def enabled(name):\n    return bool(int(os.environ.get(name, '0')))\nUSE = enabled('SLOT_ENABLED')\n",
        "if USE:\n        {0}",
    ),
    "its presence in the environment": ("", "if 'SLOT_ENABLED' in os.environ:\n        {0}"),
    "a constant of the module": ("SLOT_ENABLED = False\n", "if SLOT_ENABLED:\n        {0}"),
}


@pytest.mark.parametrize("form", ROUNDABOUT)
def test_a_switch_may_be_read_in_a_roundabout_way(form):
    use = "eval_val_slot(args, model, val_tokens, [0])"
    head, body = (part.format(use.replace("model", "None")) for part in ROUNDABOUT[form])
    if "def evaluate" in head:
        head = head.replace("val_tokens", "load_val_tokens()")
    source = script(SLOT + head, body)
    assert rules(source) == set() and "scored_region" in rules(source, "note")
    name = "use_slots" if "use_slots" in body else "slot" if form == "a parameter's default" else "slot_enabled"
    if form != "a parameter's default":
        assert "scored_region" in rules(source, **{name: True})
    switched = source.replace('"SLOT_ENABLED", "0"', '"SLOT_ENABLED", "1"').replace(
        "'SLOT_ENABLED', '0'", "'SLOT_ENABLED', '1'"
    )
    switched = switched.replace("slot=False", "slot=True").replace("'use_slots', False", "'use_slots', True")
    switched = switched.replace("SLOT_ENABLED = False", "SLOT_ENABLED = True")
    if "in os.environ" not in body and "store_true" not in head and "name, '0'" not in head:
        assert "scored_region" in rules(switched)


@pytest.mark.parametrize(
    "head, body",
    [
        ("", "slot = args.slot_enabled\n    slot = True\n    if slot:\n        {0}"),
        ("", "for slot in (args.slot_enabled, True):\n        if slot:\n            {0}"),
        (
            "def evaluate(args, on):\n    if on:\n        {0}\n",
            "evaluate(args, args.slot_enabled); evaluate(args, True)",
        ),
        ("def evaluate(args, on=False):\n    if on:\n        {0}\n", "list(map(evaluate, [args], [True]))"),
        ("", "setattr(args, 'slot_enabled', True)\n    if getattr(args, 'slot_enabled', False):\n        {0}"),
        ("", "slot = []\n    slot.append(1)\n    if slot:\n        {0}"),
        ("", "vars(args)['slot_enabled'] = True\n    if args.slot_enabled:\n        {0}"),
        ("", "args = dataclasses.replace(args, slot_enabled=True)\n    if args.slot_enabled:\n        {0}"),
        ("class C:\n    slot: bool = False\n", "c = C(slot=True)\n    if c.slot:\n        {0}"),
        ("os.environ['SLOT'] = '1'\n", "if os.environ.get('SLOT', '0') == '1':\n        {0}"),
        ("os.environ.setdefault('SLOT', '1')\n", "if os.environ.get('SLOT', '0') == '1':\n        {0}"),
    ],
)
def test_a_switch_that_has_two_values_is_none(head, body):
    use = "eval_val_slot(args, None, load_val_tokens(), [0])"
    assert "scored_region" in rules(script(SLOT + head.format(use), body.format(use)))


THROWN = {
    "deleted": "del warm, opt",
    "made anew": "warm = BatchedTTTLoRA(model)",
    "reset": "warm.reset()",
}
WARM_UP = """
    warm = BatchedTTTLoRA(model)
    opt = torch.optim.AdamW(warm.parameters(), lr=1e-4)
    for _ in range(2):
        x, y = val_tokens[:256], val_tokens[1:257]
        loss = model(x, y, lora=warm)
        loss.backward()
        opt.step()
        opt.zero_grad()
    """


@pytest.mark.parametrize("form", THROWN)
def test_an_adapter_that_is_warmed_up_and_thrown_away_is_for_a_reader(form):
    warm = WARM_UP.strip() + "\n    " + THROWN[form]
    source = script(LEGAL_TTT, warm + "\n    eval_val_ttt(args, model, val_tokens, [], optimizer)")
    assert rules(source) == set() and rules(source, "warn") == {"train_before_score"}
    (found,) = [f for f in legality.examine(source) if f.level == "warn"]
    assert "thrown away" in found.text
    assert (
        rules(source.replace("val_tokens[:256], val_tokens[1:257]", "torch.randint(9, (256,)), None"), "warn") == set()
    )


def test_an_adapter_that_is_left_behind_with_its_function_is_thrown_away():
    source = script("def warm_up(model, val_tokens):" + WARM_UP, "warm_up(model, val_tokens)")
    assert rules(source) == set() and rules(source, "warn") == {"train_before_score"}


@pytest.mark.parametrize(
    "change",
    [
        ("torch.optim.AdamW(warm.parameters(), lr=1e-4)", "torch.optim.AdamW(model.parameters())"),
        ("opt.zero_grad()", "optimizer.step()"),
        ("del warm, opt", "eval_with(model, warm)"),
        ("        loss.backward()", "        loss.backward()\n            loss_sum += model(x, y, lora=warm).sum()"),
    ],
)
def test_an_adapter_that_stays_or_another_that_moves_is_not_thrown_away(change):
    warm = (WARM_UP.strip() + "\n    del warm, opt").replace(*change)
    assert "train_before_score" in rules(script("", warm.replace("            loss_sum", "        loss_sum")))


def test_a_parameter_may_require_its_gradient_by_a_name():
    for flag in ("GRAD = True\n", "GRAD = 1\n"):
        source = script(
            flag + SLOT.replace("requires_grad=True", "requires_grad=GRAD"), "eval_val_slot(1, 2, val_tokens, [0])"
        )
        assert "scored_region" in rules(source)
    local = SLOT.replace("    loss_sum = 0.0\n", "    loss_sum, learn = 0.0, True\n").replace("d=True", "d=learn")
    assert "scored_region" in rules(script(local, "eval_val_slot(1, 2, val_tokens, [0])"))
    off = LEGAL_TTT.replace(
        "loss_sum = torch.zeros((), dtype=torch.float64)",
        "GRAD = False\n    loss_sum = torch.zeros((), requires_grad=GRAD)",
    )
    assert legality.examine(script(off, "eval_val_ttt(args, model, val_tokens, [], optimizer)")) == []


def test_a_function_that_nothing_calls_is_a_note():
    source = script(SLOT)
    assert rules(source) == set() and "scored_region" in rules(source, "note")


def test_a_switch_that_is_set_elsewhere_is_no_switch():
    source = script(
        SLOT, "args.slot_enabled = True\n    if args.slot_enabled:\n        " + "eval_val_slot(1, 2, val_tokens, [0])"
    )
    assert "scored_region" in rules(source)


def test_own_settings_as_the_run_logged_them():
    source = 'class H:\n    slot: bool = opt("evaluation", False, "doc")\n' + script(
        SLOT, "if hp.slot:\n        eval_val_slot(1, 2, val_tokens, [])"
    )
    assert rules(source) == set() and "scored_region" in rules(source, slot=True)


# -----------------------------------------------------------------------------
# Unwrapping
# -----------------------------------------------------------------------------

INNER = "import torch\nprint('inner')\n"
RAW = [{"id": lzma.FILTER_LZMA2, "preset": 6}]


def text(data: bytes, encode=base64.b85encode) -> str:
    return repr(encode(data).decode())


WRAPPED = {
    "lzma and base85": "import lzma,base64\nexec(lzma.decompress(base64.b85decode("
    f"{text(lzma.compress(INNER.encode()))})))",
    "raw lzma": "import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("
    + text(lzma.compress(INNER.encode(), lzma.FORMAT_RAW, filters=RAW))
    + '),format=L.FORMAT_RAW,filters=[{"id":L.FILTER_LZMA2,"preset":6}]))',
    "zlib and base64, joined from parts": "import zlib\nfrom base64 import b64decode as d\na = "
    + " + ".join(repr(base64.b64encode(zlib.compress(INNER.encode())).decode()[i : i + 9]) for i in range(0, 99, 9))
    + "\nb = zlib.decompress(d(a)).decode()\nexec(compile(b, 'x', 'exec'), globals())",
    "bz2 and ascii85 by __import__": f"exec(__import__('bz2').decompress(__import__('base64').a85decode("
    f"{text(bz2.compress(INNER.encode()), base64.a85encode)})))",
    "a one-line function, reversed, in pieces": "import zlib, base64\ndef f(s):\n    t = s[::-1]\n"
    "    return zlib.decompress("
    f"base64.b85decode(t))\np = ''.join([{text(zlib.compress(INNER.encode()))[::-1]}])\nexec(f(p))",
    "bytes and getattr": "import zlib\nexec(getattr(zlib, 'decompress')(bytes.fromhex("
    f"'{zlib.compress(INNER.encode()).hex()}')))",
}


@pytest.mark.parametrize("form", WRAPPED)
def test_self_extracting_scripts_are_unwrapped_as_data(form, capsys):
    found = unpack.unwrap(WRAPPED[form])
    assert found.layers[-1] == INNER and not found.problems
    assert capsys.readouterr().out == ""


def test_layers_within_layers():
    source = INNER
    for _ in range(4):
        source = f"import zlib,base64\nexec(zlib.decompress(base64.b85decode({text(zlib.compress(source.encode()))})))"
    assert unpack.unwrap(source).layers[-1] == INNER


@given(st.binary(max_size=300), st.sampled_from(["lzma", "zlib", "bz2"]), st.sampled_from(["b85decode", "b64decode"]))
@settings(max_examples=60, deadline=None)
def test_garbage_is_said_not_raised(data, module, decoder):
    encode = base64.b85encode if decoder == "b85decode" else base64.b64encode
    source = f"import {module},base64\nexec({module}.decompress(base64.{decoder}({encode(data).decode()!r})))"
    found = unpack.unwrap(source)
    assert found.layers[0] == source and (found.problems or len(found.layers) > 1)


@given(st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_text_is_read_without_an_exception(source):
    unpack.unwrap(source)
    unpack.new_fstrings(source)
    try:
        legality.examine(source)
    except SyntaxError:
        pass


def test_a_bomb_stops_at_the_limit():
    bomb = zlib.compress(b"\0" * 50_000_000, 9)
    found = unpack.unwrap(f"import zlib,base64\nexec(zlib.decompress(base64.b85decode({text(bomb)})))")
    assert len(found.layers) == 1 and "more than" in found.problems[0].text


HUGE = f"import zlib,base64\na=zlib.decompress(base64.b85decode({text(zlib.compress(b'0' * 7_900_000))}))\n"
GROWING = {
    "slices": HUGE + "".join(f"b{i}=a[{i + 1}:]\n" for i in range(200)) + "exec(b199)",
    "split": HUGE + "exec(a.split(b'0'))",
    "join": HUGE + "exec(a[:2000].join([a, a]))",
    "replace": HUGE + "exec(a.replace(b'0', a[:1000]))",
    "a list that doubles": "a=[1,2,3,4]\n" + "a+=a\n" * 40 + "exec(a)",
    "a list as text": "exec(str([" + "a," * 2000 + "]))\n" + HUGE,
    "an f-string": HUGE + "exec(f'" + "{a}" * 2000 + "')",
    "decompressions": HUGE + "".join(f"b{i}=zlib.decompress(c)\n" for i in range(500)) + "exec(b1)",
}


@pytest.mark.parametrize("form", GROWING)
def test_folding_takes_little_memory_whatever_it_folds(form):
    tracemalloc.start()
    try:
        found = unpack.unwrap(GROWING[form])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found.layers) == 1 and found.problems
    assert peak < 2 * unpack.MAX_FOLDED


@pytest.mark.parametrize(
    "source", ["a = 1\n" * (unpack.MAX_SOURCE // 6 + 1), "x = f'" + "{a}" * (unpack.MAX_FIELDS + 1) + "'"]
)
def test_a_source_that_takes_minutes_to_parse_is_not_parsed(source):
    with pytest.raises(unpack.TooLong):
        legality.examine(source)


def test_code_with_too_many_ways_through_it_is_said():
    nested = "f(" * 60 + "val_tokens" + ")" * 60  # the value of each call is that of its argument, asked twice
    with pytest.raises(SyntaxError, match="too entangled"):
        legality.examine(f"def f(x):\n    return x\n\n\ndef g(val_tokens):\n    y = {nested}\n")


@pytest.mark.parametrize(
    "source, why",
    [
        ("exec(input())", "input"),
        ("import marshal\nexec(marshal.loads(b'abc'))", "marshal.loads"),
        ("import os\nexec(os.environ['CODE'])", "subscript"),
    ],
)
def test_what_cannot_be_unwrapped_is_said(source, why):
    assert why in unpack.unwrap(source).problems[0].text


FILES = {"inner.py": INNER.encode(), "src/code.xz": lzma.compress(INNER.encode())}
RUN = {
    "open": "exec(open('inner.py').read())",
    "beside the script": "import os\nhere = os.path.dirname(os.path.abspath(__file__))\n"
    "exec(open(os.path.join(here, 'inner.py')).read())",
    "pathlib": "from pathlib import Path\nhere = Path(__file__).resolve().parent\n"
    "exec(compile((here / 'inner.py').read_text(), 'x', 'exec'))",
    "with_name": "import pathlib\nexec(pathlib.Path(__file__).with_name('inner.py').read_bytes())",
    "a name": "P = 'inner.py'\nwith open(P) as f:\n    source = f.read()\nexec(source, globals())",
    "in a function": "def main():\n    with open('inner.py', encoding='utf-8') as f:\n        exec(f.read())\nmain()",
    "run_path": "import runpy, os\nhere = os.path.dirname(__file__)\n"
    "runpy.run_path(os.path.join(here, 'inner.py'), run_name='__main__')",
}


@pytest.mark.parametrize("form", RUN)
def test_files_that_are_executed_are_named(form):
    found = unpack.unwrap(RUN[form], FILES.get)
    assert (found.files, found.problems, len(found.layers)) == (["inner.py"], [], 1)
    assert unpack.unwrap(RUN[form]).files == ["inner.py"]  # and so is one that is not there


def test_a_packed_file_that_is_executed_is_followed():
    source = "import lzma\nfrom pathlib import Path\nhere = Path(__file__).parent\n"
    source += "exec(lzma.decompress((here / 'src' / 'code.xz').read_bytes()))"
    found = unpack.unwrap(source, FILES.get)
    assert (found.layers[1:], found.files, found.problems) == ([INNER], ["src/code.xz"], [])


def test_same_program_ignores_comments_docstrings_and_annotations():
    a = 'def f(x: int = 1) -> int:\n    """Doc."""\n    y: int = x  # why\n    return y\n'
    assert unpack.same_program(a, "def f(x=1):\n  y=x\n  return y")
    assert unpack.same_program(a, "def f(x=2):\n  y=x\n  return y") is False
    assert unpack.same_program(a, "def f(") is None


# -----------------------------------------------------------------------------
# F-strings
# -----------------------------------------------------------------------------

OLD = [
    "f'{a}'",
    "f\"{a['b']}\"",
    "f'''{a['b']}'''",
    "f'{a:{b}}' '#'",
    "f'{{}}' '{'",
    "rf'\\d{a}'",
    "f'{a!r:>10}'",
    "f'\\N{DASH} {a}'",
]
OLD += ["'''f'{'x'}''' ", "f'{a:%H:%M}'", "f'{(lambda: 1)()}'", "f'{a}' f\"{b}\"", "# f'{a['b']}'\n1", "f\"{a!s}\" 'b'"]
NEW = ["f'{a['b']}'", 'f"{f"{a}"}"', "f'{\"\\n\".join(a)}'", "f'{a # c\n}'", "f'{\na}'", "f'{x:{y['z']}}'"]


@pytest.mark.parametrize("source", OLD)
def test_f_strings_of_any_version(source):
    assert unpack.new_fstrings(source) == []


@pytest.mark.parametrize("source", NEW)
def test_f_strings_that_need_3_12(source):
    (found,) = unpack.new_fstrings(f"x = 1\n{source}\ny = 2")
    tree, problems = unpack.read_tree(f"x = 1\n{source}\ny = 2")
    assert problems[0].line == 2 and "3.12" in problems[0].text
    assert isinstance(tree.body[-1], ast.Assign) and tree.body[-1].targets[0].id == "y"
    assert tree.body[-1].lineno == 3 + source.count("\n")


def test_this_project_s_sources_are_of_any_version():
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("records/**/*.py")):
        assert unpack.read_tree(path.read_text("utf-8"))[1] == [], path
