"""Text that an artifact's model writes after a prompt.

    python records/sample.py runs/ID/artifact.pgolf --prompt "The first thing" --tokens 200 --seed 1

The model reads BOS, the prompt and what it has written, of these the last EVAL_SEQ_LEN tokens, and draws the next one.
The text ends after --tokens, or where the model begins another document. The same artifact, arguments and device give
the same text.
"""

import argparse
import hashlib
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
try:
    import prepare
    import torch
    from sentencepiece import SentencePieceProcessor

    import train_gpt as pg
except ModuleNotFoundError as error:
    print(f"error: sample.py needs {error.name}: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)
import caseops  # noqa: E402

from records.submission.command import Unusable, command  # noqa: E402
from records.submit import Parser, entry  # noqa: E402


def find_tokenizer(sha256: str, named: Path | None) -> SentencePieceProcessor:
    """The tokenizer that an artifact was made with: the named file, or the one under data/ with this SHA-256."""
    for path in [named] if named else sorted(filter(Path.is_file, (ROOT / "data").rglob("*.model"))):
        serialized = path.read_bytes()
        if hashlib.sha256(serialized).hexdigest() == sha256:
            return SentencePieceProcessor(model_proto=serialized)
    if named:
        raise Unusable(f"{named} is not the tokenizer that this artifact was made with (SHA-256 {sha256})")
    raise Unusable(f"no tokenizer under {ROOT / 'data'} has the SHA-256 {sha256}; name it with --tokenizer FILE")


@torch.inference_mode()
def next_tokens(
    model: pg.GPT,
    tokens: Sequence[int],
    context: int,
    never: Sequence[int] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> Iterator[int]:
    """What the model writes after the tokens, until it begins another document; it sees the last `context` of all.

    Temperature 0 takes the likeliest token, top_k 0 leaves all of them, `never` are ids that no text has.
    """
    tokens, generator, place = list(tokens), torch.Generator().manual_seed(seed), next(model.parameters()).device
    while True:
        seen = torch.tensor([tokens[-context:]], device=place)
        logits = model.logits(seen)[0, -1].double().cpu()
        logits[list(never)] = -torch.inf
        if top_k:
            logits[logits.argsort(descending=True, stable=True)[top_k:]] = -torch.inf
        if temperature:
            p = ((logits - logits.max()) / temperature).softmax(-1)
            token = int(torch.multinomial(p, 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token == pg.BOS_ID:
            return
        tokens.append(token)
        yield token


def pieces(
    tokenizer: SentencePieceProcessor, prompt: Sequence[int], new_tokens: Iterator[int], cased: bool = False
) -> Iterator[str]:
    """The text of the prompt and of each new token; a character of several byte tokens comes when it is whole, and
    with `cased` a word behind an operator of CaseOps when it has ended."""
    tokens, written, text_of = list(prompt), 0, caseops.restore if cased else str
    open_word = re.compile(f"[{caseops.OPERATORS}]+ ?[A-Za-z]*$" if cased else "\ufffd+$")
    for token in new_tokens:
        text = text_of(open_word.sub("", tokenizer.decode(tokens).rstrip("\ufffd")))
        yield text[written:]
        written = len(text)
        tokens.append(token)
    yield text_of(tokenizer.decode(tokens))[written:]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", metavar="ARTIFACT", help="runs/ID/artifact.pgolf of a run")
    parser.add_argument("--prompt", default="", help="how the text begins; default: with nothing")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="to write, at most (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: the likeliest (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest; 0: from all")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: the artifact's own, if it is in data/")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    args = parser.parse_args(argv)
    if not 0 <= args.temperature < float("inf"):
        parser.error("--temperature must be a number from 0")
    for name, value in (("tokens", args.tokens), ("top-k", args.top_k), ("seed", args.seed)):
        if not 0 <= value < 1 << 63:
            parser.error(f"--{name} must be a whole number from 0")
    return args


@command
def sample(args: argparse.Namespace) -> int:
    """Exit code: 0, or 2 for a file, device or prompt that cannot be used."""
    try:
        model, hp, header = pg.load_model(args.artifact, args.device)
    except pg.UserError as error:
        raise Unusable(str(error)) from None
    tokenizer = find_tokenizer(header["tokenizer_sha256"], args.tokenizer)
    try:
        args.prompt.encode()  # a command line may hold other bytes
    except UnicodeEncodeError:
        raise Unusable("--prompt is no UTF-8 text") from None
    place = header.get("transform", "").removeprefix("caseops_") or None
    prompt = [pg.BOS_ID, *prepare.tokenized(args.prompt, tokenizer, place)]
    kinds = (tokenizer.is_control, tokenizer.is_unknown, tokenizer.is_unused)
    never = [i for i in range(hp.vocab_size) if i != pg.BOS_ID and any(is_kind(i) for is_kind in kinds)]
    drawn = next_tokens(model, prompt, hp.eval_seq_len, never, args.temperature, args.top_k, args.seed)
    for piece in pieces(tokenizer, prompt, itertools.islice(drawn, args.tokens), cased=place is not None):
        print(piece, end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a console without UTF-8 ends no text
    sys.exit(entry(lambda argv: sample(parse(argv))))
