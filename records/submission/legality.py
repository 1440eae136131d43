"""Static legality of a training script: named rules over its syntax tree, which point at a line and say why.

Nothing is executed. Values are followed by name, statement by statement and through calls of functions of the same
file, in two grades: validation *tokens*, and what a model made of them. Code that the file's own defaults or the run's
logged settings switch off, and functions that nothing live refers to, give notes only. A finding is FAIL where the
pattern is unmistakable and warn where a reader has to decide.

The rules, after the four conditions that reviewers name (causal, normalised, score before update, one pass):

- train_before_score: a gradient from validation tokens that are scored afterwards
- several_passes: score-then-train repeated over the same tokens, where only the first scores would count
- scored_region: a delta optimised on the very windows that are scored with it
- target_in_key: a hash of the target id looked up in a table
- best_of_passes: the smaller of two scores of a token or of a run
- unnormalised_mix: probabilities of the realised token alone are blended
- network: downloads, package managers and sockets
- training_data_in_eval: evaluation that reads training shards
- calibration_on_validation: quantization statistics from validation tokens
"""

import ast
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from records.submission.unpack import Function, blocks, name_of, read_tree, text_of


class Finding(NamedTuple):
    """What a rule saw; `level` is FAIL, warn or note."""

    rule: str
    level: str
    line: int
    text: str


MAX_FOLLOWED = 1_000_000  # nodes visited while values are followed; this project's script takes 200,000
MAX_WARM_UP = 100  # statements of a block that a warm-up may take
UNKNOWN, Nothing = object(), object()  # no value that is known; the value None

VALIDATION = re.compile(
    r"(?:^|_)val(?:id|idation)?_(?:tok(?:en)?s?|toks|data|ids|loader|stream|batch|x|y|inputs?|targets?|np|text|docs?|files|pattern|shards?)$"
    r"|^(?:x|y|tokens|toks|data)_val(?:id|idation)?$|^val(?:id|idation)?_?set$"
)
VALIDATION_PATH = re.compile(r"(?:^|\.)_?val(?:id|idation)?\.(?:tokens?|data|ids|text)$")
TARGET = re.compile(
    r"^(?:y|ys|y_batch|tgt|tgts|targets?|labels?|gold|next_tok(?:en)?s?|true_tok(?:en)?s?"
    r"|(?:tgt|target)_(?:np|ids?|tok(?:en)?s?|batch|flat))$"
)
SCORE = re.compile(
    r"(?:^|_)(?:nlls?|nats|bpb|bpbs|ptl|xent|token_loss(?:es)?|val_loss(?:es)?|per_tok(?:en)?_loss)(?:_|\d|$)"
)
# Names of what adds up to a score.
KEPT = re.compile(r"loss|nll|nats|bits|bpb|xent|ptl|scor|entropy|(?:^|_)(?:ce|tot|total)(?:_|$)")
EARLIER = re.compile(r"(?:^|_)(?:prev|previous|past|scored|seen|already|history)(?:_|$)")
REPEAT = re.compile(r"epoch|pass(?:es)?\b|repeat|rounds?\b|n_times")
EVALUATION = re.compile(r"(?:^|_)(?:eval|evaluate|ttt|slot|score|sliding)(?:_|$)")
CALIBRATION = re.compile(r"calib|hessian|gptq_collect|collect_gptq|gptq_quant|activation_stats")
TRAINING_DATA = re.compile(r"(?:^|_)train_(?:files?|shards?|tokens?|loader|stream|data|pattern)$")

# What keeps tokens tokens: everything else that takes them makes a result of them.
CONVERSIONS = set(
    "to long int float double bfloat16 half cuda cpu numpy reshape view contiguous clone astype from_numpy tensor array"
    " as_tensor asarray stack cat concatenate split chunk unsqueeze squeeze flatten pin_memory detach tolist list tuple"
    " enumerate zip iter next unfold narrow expand repeat pad where sum mean roll shift copy ascontiguousarray sorted"
    " reversed unbind T glob Path open fromfile frombuffer memmap read load_data_shard".split()
)
# What tells about tokens without carrying them.
CLEAN = set(
    "len numel size dim shape dtype device ndim nbytes isinstance range zeros ones empty full zeros_like ones_like"
    " empty_like full_like rand randn randint randint_like rand_like randn_like arange print log log0 type hasattr id"
    " any all is_contiguous min_len perf_counter time".split()
)
TOKENS, RESULT = 1, 2


def examine(source: str, settings: Mapping[str, Any] | None = None) -> list[Finding]:
    """Every finding in a script, live ones first. `settings` are values that the run itself logged.

    Raises SyntaxError where the source cannot be read.
    """
    try:
        tree = read_tree(source)[0]
        live_tree = reachable(prune(read_tree(source)[0], settings or {}))
        live, everything = inspect(live_tree), inspect(tree)
    except RecursionError:
        raise SyntaxError("nested too deeply to be examined") from None
    seen = {(finding.rule, finding.line) for finding in live}
    dead = [
        finding._replace(level="note", text=f"in code that is switched off or never called: {finding.text}")
        for finding in everything
        if (finding.rule, finding.line) not in seen
    ]
    return live + dead


def inspect(tree: ast.Module) -> list[Finding]:
    """All rules on one tree: a finding per rule and line, the worst of them."""
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    scopes = [(getattr(scope, "name", ""), list(own_nodes(scope))) for scope in (tree, *functions)]
    found: dict[tuple[str, int], Finding] = {}
    for finding in chain(order_of_events(tree), *(rule(*scope) for rule in RULES for scope in scopes)):
        known = found.get((finding.rule, finding.line))
        if known is None or (known.level, finding.level) == ("warn", "FAIL"):
            found[finding.rule, finding.line] = finding
    return sorted(found.values(), key=lambda finding: finding.line)


# ----------------------------------------------------------------------------------------------------------------------
# Small helpers on nodes
# ----------------------------------------------------------------------------------------------------------------------


def dotted(node: ast.AST) -> str:
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else name_of(node)


def own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Every node of a function but those of functions and classes inside it."""
    waiting = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (*Function, ast.ClassDef)):
            waiting.extend(ast.iter_child_nodes(node))


def calls_of(node: ast.AST) -> Iterator[ast.Call]:
    return (part for part in ast.walk(node) if isinstance(part, ast.Call))


def names_in(node: ast.AST) -> set[str]:
    return {name_of(part) for part in ast.walk(node) if isinstance(part, (ast.Name, ast.Attribute))}


def constants_in(node: ast.AST) -> list[str]:
    return [str(part.value) for part in ast.walk(node) if isinstance(part, ast.Constant)]


def arguments_of(node: ast.Call) -> list[ast.expr]:
    return [*node.args, *(keyword.value for keyword in node.keywords)]


def argument(node: ast.Call, place: int, name: str) -> ast.expr | None:
    """What a call gives for a parameter, by its place or its name."""
    return node.args[place] if len(node.args) > place else keyword(node, name)


def keyword(node: ast.Call, name: str) -> ast.expr | None:
    return next((part.value for part in node.keywords if part.arg == name), None)


def is_open(node: ast.Call) -> bool:
    """Whether a call has arguments that only its run shows: `*values`, `**settings`."""
    return any(isinstance(part, ast.Starred) for part in node.args) or any(k.arg is None for k in node.keywords)


def targets_of(node: ast.Assign | ast.AugAssign | ast.AnnAssign | ast.NamedExpr) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target]


# ----------------------------------------------------------------------------------------------------------------------
# Reachability: settings that are off, then names that nothing live mentions
# ----------------------------------------------------------------------------------------------------------------------


OFF, ON = {"", "0", "false", "no", "off", "none"}, {"1", "true", "yes", "on"}
CHANGES = {"replace", "_replace", "update", "Namespace", "SimpleNamespace"}
CASTS = {"bool": bool, "int": int, "float": float, "str": str}
OPERATORS = {
    **dict.fromkeys((ast.Eq, ast.Is), operator.eq),
    **dict.fromkeys((ast.NotEq, ast.IsNot), operator.ne),
    **{ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge},
    ast.In: lambda left, right: left in right,
    ast.NotIn: lambda left, right: left not in right,
}
Scope = tuple[ast.AST, ...]  # the functions around a node, outermost first


class Settings:
    """Values that a run could have had only so: logged ones, else what all bindings of a name in the file agree on.

    Names are taken without their owner: `args.slot`, `h["slot"]` and `getattr(h, "slot")` are one. A parameter has the
    value that all calls of its function give it.
    """

    def __init__(self, tree: ast.Module, logged: Mapping[str, Any]):
        self.logged = {name.lower(): value for name, value in logged.items()}
        self.bindings: dict[str, list[tuple[Any, Scope]]] = {}  # name -> (expression or UNKNOWN, scope)
        self.fallbacks: dict[str, list[tuple[Any, Scope]]] = {}  # the same of what nothing else binds
        self.calls: dict[str, list[tuple[ast.Call, Scope]]] = {}
        self.handed: set[str] = set()  # functions that are not only called
        self.functions: dict[str, ast.AST] = {}
        self.memo: dict[tuple[int, str], Any] = {}  # (id of the function whose parameter it is, name) -> value
        self.classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        self.bound: set[int] = set()  # targets whose value is known, and functions that are called
        self.collect(tree, ())

    def bind(self, name: str, value: Any, scope: Scope) -> None:
        if name:
            # What can be changed in place has no value of its own.
            changing = isinstance(value, (ast.List, ast.Dict, ast.Set, ast.ListComp))
            self.bindings.setdefault(name, []).append((UNKNOWN if changing else value, scope))

    def collect(self, node: ast.AST, scope: Scope) -> None:
        if isinstance(node, Function):
            self.functions[node.name] = node
        if isinstance(node, (*Function, ast.Lambda)):
            scope = (*scope, node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
            for target in targets_of(node):
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=False))
                for part, value in pairs:
                    key = key_of(part)
                    again = same_name(key, value) if isinstance(part, ast.Name) else None
                    if again is not None:
                        self.fallbacks.setdefault(key, []).extend((default, scope) for default in again)
                    elif value is not None:  # not a mere annotation
                        self.bind(key, value, scope)
                    if key or value is None:
                        self.bound.add(id(part))
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if text_of(key) is not None:
                    self.bind(f"[{text_of(key)}]", value, scope)
        elif isinstance(node, ast.Call):
            name, texts = name_of(node.func), [text_of(part) for part in node.args]
            self.calls.setdefault(name, []).append((node, scope))
            self.bound.add(id(node.func))
            if name == "add_argument" and texts and texts[-1] is not None:
                switch = text_of(keyword(node, "action")) == "store_true"
                default = keyword(node, "default") or (ast.Constant(False) if switch else UNKNOWN)
                self.bind(texts[-1].lstrip("-").replace("-", "_"), default, scope)
            elif name == "setattr" and len(texts) == 3 and texts[1] is not None:
                self.bind(texts[1], UNKNOWN, scope)
            elif name in {"setdefault", "putenv"} and texts and texts[0] is not None:
                self.bind(f"[{texts[0]}]", UNKNOWN, scope)
            # A field that is given where its object is made or changed.
            fields = name in self.classes | CHANGES
            for part in node.keywords if fields or name == "dict" else ():
                self.bind(f"{part.arg}" if fields else f"[{part.arg}]", part.value, scope)
        for part in ast.iter_child_nodes(node):
            if id(part) not in self.bound:
                if isinstance(getattr(part, "ctx", None), (ast.Store, ast.Del)):
                    self.bind(key_of(part), UNKNOWN, scope)
                elif isinstance(part, (ast.Name, ast.Attribute)):
                    self.handed.add(name_of(part))
            self.collect(part, scope)

    def named(self, name: str, scope: Scope) -> Any:
        """The value of a name, or UNKNOWN."""
        function = next((function for function in reversed(scope) if name in parameters(function)), None)
        key = (id(function), name)
        if key not in self.memo:
            self.memo[key] = UNKNOWN  # while it is asked for: a name that is bound to itself has no value
            if function is not None:
                self.memo[key] = self.parameter(function, name)
            else:
                agreed = self.agreed(self.bindings.get(name) or self.fallbacks.get(name, ()))
                self.memo[key] = self.logged.get(name.lower(), agreed)
        return self.memo[key]

    def keyed(self, key: str) -> Any:
        """The value that a dictionary has by a key, or an object by a name."""
        of_dictionary = f"[{key}]" in self.bindings and key.lower() not in self.logged
        return self.named(f"[{key}]" if of_dictionary else key, ())

    def agreed(self, expressions: Iterable[tuple[Any, Scope]]) -> Any:
        """The one value of several expressions."""
        values = [self.value(part, scope) for part, scope in expressions]
        if not values or UNKNOWN in values or any(value != values[0] for value in values):
            return UNKNOWN
        return values[0]

    def parameter(self, function: ast.AST, name: str) -> Any:
        """What every call of a function gives for a parameter."""
        called = getattr(function, "name", "")  # a lambda has none
        calls = self.calls.get(called, [])
        if not calls or called in self.handed or self.functions.get(called) is not function:
            return UNKNOWN
        if any(is_open(call) for call, _ in calls):
            return UNKNOWN
        arguments, given = function.args, []
        if name in {argument.arg for argument in (arguments.vararg, arguments.kwarg) if argument}:
            return UNKNOWN
        names = [argument.arg for argument in arguments.posonlyargs + arguments.args]
        defaults = dict(zip(reversed(names), reversed(arguments.defaults), strict=False))
        defaults |= {arg.arg: d for arg, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d}
        for call, scope in calls:
            method = isinstance(call.func, ast.Attribute) and names[:1] in (["self"], ["cls"])
            values = dict(zip(names[method:], call.args, strict=False)) | {k.arg: k.value for k in call.keywords}
            given.append((values.get(name, defaults.get(name, UNKNOWN)), scope))
        return self.agreed(given)

    def environment(self, node: ast.Call) -> Any:
        """What a call reads of the environment, directly or through a function of the file; None if it does not."""
        name = name_of(node.func)
        helper = self.functions.get(name) if isinstance(node.func, ast.Name) else None
        reads = name == "getenv" or (name in {"get", "pop"} and "environ" in dotted(node.func))
        if helper is not None:
            inner = [call for call in calls_of(helper) if name_of(call.func) in {"get", "getenv"} and call.args]
            inner = [call for call in inner if name_of(call.args[0]) in parameters(helper)[:1]]
            reads = bool(inner)
        variable = text_of(node.args[0]) if node.args else None
        if not reads or variable is None:
            return None
        default = argument(node, 1, "default")
        if default is None and helper is not None and len(inner[0].args) > 1:
            default = inner[0].args[1]
        if f"[{variable}]" in self.bindings:
            return UNKNOWN  # the file sets it itself
        found = self.logged.get(variable.lower(), getattr(default, "value", UNKNOWN if default is not None else None))
        if found is UNKNOWN or found is None:
            return UNKNOWN if found is UNKNOWN or helper else Nothing
        text = str(int(found) if isinstance(found, bool) else found)
        if helper is None:
            return text
        return False if text.lower() in OFF else True if text.lower() in ON else text

    def value(self, node: Any, scope: Scope) -> Any:
        """What an expression over settings is, or UNKNOWN. Knows a short list of forms and evaluates nothing else."""

        def value(part: ast.AST) -> Any:
            return self.value(part, scope)

        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self.named(node.id, scope)
        if isinstance(node, ast.Attribute):
            return self.named(node.attr, ())
        if isinstance(node, ast.Subscript) and (key := text_of(node.slice)) is not None:
            return self.keyed(key)
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            parts = [value(part) for part in node.elts]
            return UNKNOWN if UNKNOWN in parts else parts
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = value(node.operand)
            return UNKNOWN if inner is UNKNOWN else not inner
        if isinstance(node, ast.BoolOp):
            parts, stops = [value(part) for part in node.values], isinstance(node.op, ast.Or)
            if any(part is not UNKNOWN and bool(part) == stops for part in parts):
                return stops
            return UNKNOWN if UNKNOWN in parts else not stops
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = value(node.left), node.comparators[0]
            if isinstance(node.ops[0], (ast.In, ast.NotIn)) and dotted(right) == "os.environ" and isinstance(left, str):
                return (left.lower() in self.logged) == isinstance(node.ops[0], ast.In)
            right = value(right)
            if left is UNKNOWN or right is UNKNOWN:
                return UNKNOWN
            try:
                return OPERATORS[type(node.ops[0])](left, right)
            except TypeError:
                return UNKNOWN
        return self.called(node, value) if isinstance(node, ast.Call) else UNKNOWN

    def called(self, node: ast.Call, value: Callable[[ast.AST], Any]) -> Any:
        """The value of a call: of the environment, a declaration, getattr, get, a cast or a method of a text."""
        name, arguments = name_of(node.func), node.args
        if (found := self.environment(node)) is not None:
            return None if found is Nothing else found
        if name in {"opt", "field", "Field"}:
            return value(keyword(node, "default") or argument(node, 1 if name == "opt" else 0, ""))
        if name in {"getattr", "get"} and len(arguments) > (name == "getattr"):
            key = text_of(arguments[name == "getattr"])
            default = arguments[1 + (name == "getattr") :]
            if key is None:
                return UNKNOWN
            known = {key, f"[{key}]"} & self.bindings.keys() or key.lower() in self.logged
            return self.keyed(key) if known else value(default[0]) if default else UNKNOWN
        if isinstance(node.func, ast.Name) and name in CASTS and len(arguments) == 1:
            inner = value(arguments[0])
        elif isinstance(node.func, ast.Attribute) and name in {"lower", "upper", "strip"} and not arguments:
            inner = value(node.func.value)
        else:
            return UNKNOWN
        try:
            if inner is UNKNOWN or inner is None:
                return UNKNOWN
            return CASTS[name](inner) if name in CASTS else getattr(str(inner), name)()
        except (ValueError, TypeError, OverflowError):
            return UNKNOWN


def same_name(name: str, value: ast.AST) -> list[ast.AST] | None:
    """The default in `slot = bool(getattr(args, "slot", default))`; [] in `slot = args.slot`, which says nothing new;
    None in any other binding."""
    if isinstance(value, ast.Call) and name_of(value.func) in CASTS and len(value.args) == 1:
        value = value.args[0]
    if isinstance(value, ast.Call) and name_of(value.func) == "getattr" and len(value.args) > 1:
        return value.args[2:3] if text_of(value.args[1]) == name else None
    return [] if isinstance(value, ast.Attribute) and value.attr == name else None


def key_of(node: ast.AST) -> str:
    """The name that a target binds: of a variable, an attribute or a key."""
    if isinstance(node, ast.Subscript):
        key = text_of(node.slice)
        of_object = isinstance(node.value, ast.Call) or name_of(node.value) == "__dict__"  # vars(args)["slot"]
        return "" if key is None else key if of_object else f"[{key}]"
    return name_of(node)


def parameters(function: ast.AST) -> list[str]:
    arguments = function.args
    every = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
    return [argument.arg for argument in every + [a for a in (arguments.vararg, arguments.kwarg) if a]]


class Pruner(ast.NodeTransformer):
    """Takes out branches that the settings switch off, and what follows a return."""

    def __init__(self, settings: Settings):
        self.settings, self.scope = settings, ()

    def truth(self, node: ast.AST) -> bool | None:
        value = self.settings.value(node, self.scope)
        return None if value is UNKNOWN else bool(value)

    def block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        kept = []
        for statement in statements:
            new = self.visit(statement)
            kept += new if isinstance(new, list) else [new]
            if kept and isinstance(kept[-1], (ast.Return, ast.Raise, ast.Continue, ast.Break)):
                break
        return kept

    def generic_visit(self, node):
        outside = self.scope
        if isinstance(node, (*Function, ast.Lambda)):
            self.scope = (*outside, node)
        for field, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                setattr(node, field, self.block(value) or ([ast.Pass()] if field == "body" else []))
            elif isinstance(value, list):
                setattr(node, field, [self.visit(part) if isinstance(part, ast.AST) else part for part in value])
            elif isinstance(value, ast.AST):
                setattr(node, field, self.visit(value))
        self.scope = outside
        return node

    def visit_If(self, node):
        truth = self.truth(node.test)
        return self.generic_visit(node) if truth is None else self.block(node.body if truth else node.orelse)

    def visit_While(self, node):
        return self.block(node.orelse) if self.truth(node.test) is False else self.generic_visit(node)

    def visit_IfExp(self, node):
        truth = self.truth(node.test)
        return self.generic_visit(node) if truth is None else self.visit(node.body if truth else node.orelse)

    def visit_BoolOp(self, node):
        truth = self.truth(node)
        return self.generic_visit(node) if truth is None else ast.copy_location(ast.Constant(truth), node)


def prune(tree: ast.Module, logged: Mapping[str, Any]) -> ast.Module:
    """The tree without what the settings switch off (changes it)."""
    settings = Settings(tree, logged)
    tree = Pruner(settings).generic_visit(tree)
    keep_rows(tree, settings)
    return tree


def keep_rows(tree: ast.Module, settings: Settings) -> None:
    """A module's tables of functions or classes that are only read by known settings keep the rows that these name."""
    nodes = list(ast.walk(tree))
    for table in (node for node in tree.body if isinstance(node, (ast.Assign, ast.AnnAssign))):
        rows, names = table.value, {name_of(target) for target in targets_of(table)} - {""}
        if not (isinstance(rows, ast.Call) and name_of(rows.func) == "dict" and not rows.args and not is_open(rows)):
            continue
        uses = {id(node) for node in nodes if name_of(node) in names and isinstance(node.ctx, ast.Load)}
        reads = [node for node in nodes if isinstance(node, ast.Subscript) and id(node.value) in uses]
        keys = [settings.value(node.slice, ()) for node in reads]
        if reads and len(reads) == len(uses) and all(isinstance(key, str) for key in keys):
            rows.keywords = [row for row in rows.keywords if row.arg in keys]


def reachable(tree: ast.Module) -> ast.Module:
    """The tree without functions that no live code mentions, by name: names, attributes and strings count (changes it).

    A class that is mentioned brings its special methods and forward/backward with it; one that is not has no object
    whose methods could be called, whoever mentions their names.
    """
    definitions: dict[str | int, list[ast.AST]] = {}  # by what brings them: their name, or the id of their class
    owner: dict[int, int] = {}  # of a method: its class
    for node in ast.walk(tree):
        if isinstance(node, (*Function, ast.ClassDef)):
            definitions.setdefault(node.name, []).append(node)
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(method, Function):
                owner[id(method)] = id(node)
                if method.name.startswith("__") or method.name in {"forward", "backward"}:
                    definitions.setdefault(id(node), []).append(method)
    live: set[int] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        current = waiting.pop()
        mentioned = [text_of(node) or name_of(node) for node in own_nodes_and_headers(current)]
        for name in (id(current), *mentioned):
            for definition in definitions.pop(name, ()):
                home = owner.get(id(definition))
                if home is not None and home not in live:
                    definitions.setdefault(home, []).append(definition)
                elif id(definition) not in live:
                    live.add(id(definition))
                    waiting.append(definition)
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [
                part for part in node.body if not isinstance(part, (*Function, ast.ClassDef)) or id(part) in live
            ] or [ast.Pass()]
    return tree


def own_nodes_and_headers(node: ast.AST) -> Iterator[ast.AST]:
    """own_nodes, with decorators and defaults of what is defined inside, and the statements of classes."""
    for part in own_nodes(node):
        yield part
        headers = []
        if isinstance(part, Function):
            headers = [*part.decorator_list, *part.args.defaults, *filter(None, part.args.kw_defaults)]
        elif isinstance(part, ast.ClassDef) and not isinstance(node, ast.ClassDef):
            fields = [statement for statement in part.body if not isinstance(statement, (*Function, ast.ClassDef))]
            headers = [*part.bases, *part.decorator_list, *fields]
        for header in headers:
            yield from ast.walk(header)


# ----------------------------------------------------------------------------------------------------------------------
# Order of events: scores of validation tokens and gradients from them
# ----------------------------------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """kind: score, score? (a sum kept outside no_grad), train, late (a train with a score after it in its loop), pair
    (a train with a score before it in its loop), warm (a train of what is thrown away), repeat and repeat? (such a
    pair, repeated). `mark` is the rule that a train would break, with a `?` where a reader has to decide."""

    kind: str
    line: int
    mark: str = ""


class Flow:
    """Follows validation tokens through a tree and gives the order of scores and gradients."""

    def __init__(self, tree: ast.Module):
        self.tree, self.settings = tree, Settings(tree, {})
        self.by_name: dict[str, list[ast.FunctionDef]] = {}
        self.methods: set[int] = set()
        self.thrown: set[int] = set()
        for node in ast.walk(tree):
            for _, block in blocks(node):
                self.thrown.update(thrown_away(block, isinstance(node, Function)))
            if isinstance(node, Function):
                self.by_name.setdefault(node.name, []).append(node)
            if isinstance(node, ast.ClassDef):
                self.methods |= {id(part) for part in node.body if isinstance(part, Function)}
        self.memo: dict[tuple, tuple[list[Event], int]] = {}
        self.active: set[tuple] = set()
        self.called: set[int] = set()
        self.followed = 0

    def visit(self) -> None:
        """Count a node that is followed: hostile code has exponentially many ways through it."""
        self.followed += 1
        if self.followed > MAX_FOLLOWED:
            raise SyntaxError("too entangled to be examined")

    def roots(self) -> Iterator[list[Event]]:
        """Events of the module and of every function that no followed call reaches, in order."""
        yield self.block(self.tree.body, State())
        for function in chain.from_iterable(self.by_name.values()):
            if id(function) not in self.called:
                yield self.summary(function, {}, False)[0]

    def summary(self, function: ast.FunctionDef, levels: Mapping[str, int], quiet: bool) -> tuple[list[Event], int]:
        """(events, level of what is returned) of a function whose arguments have these levels."""
        key = (id(function), frozenset(levels.items()), quiet)
        if key in self.memo:
            return self.memo[key]
        if key in self.active or len(self.active) > 40:
            return [], 0
        self.active.add(key)
        quiet = quiet or any(without_gradient(decorator) for decorator in function.decorator_list)
        fresh = makes_parameter(function, self.settings)
        state = State(dict(levels), quiet, "scored_region" if fresh else "train_before_score")
        events = self.block(function.body, state)
        self.active.discard(key)
        self.memo[key] = events, state.returned
        return self.memo[key]

    # -- statements ----------------------------------------------------------------------------------------------------

    def block(self, statements: Iterable[ast.stmt], state: "State") -> list[Event]:
        return shorten([event for statement in statements for event in self.statement(statement, state)])

    def statement(self, node: ast.stmt, state: "State") -> list[Event]:
        if isinstance(node, (*Function, ast.ClassDef)):
            return []
        if isinstance(node, (ast.For, ast.AsyncFor, ast.While)):
            return self.loop(node, state)
        if isinstance(node, ast.If):
            events, other = self.expression(node.test, state), state.copy()
            events += self.block(node.body, state) + self.block(node.orelse, other)
            state.join(other)
            return events
        if isinstance(node, (ast.With, ast.AsyncWith)):
            events = [event for item in node.items for event in self.expression(item.context_expr, state)]
            quiet = state.quiet
            for item in node.items:
                enabled = "enable_grad" in dotted(getattr(item.context_expr, "func", item))
                state.quiet = not enabled and (state.quiet or without_gradient(item.context_expr))
            events += self.block(node.body, state)
            state.quiet = quiet
            return events
        if isinstance(node, ast.Try) or type(node).__name__ == "TryStar":
            parts = [node.body, *(handler.body for handler in node.handlers), node.orelse, node.finalbody]
            return [event for block in parts for event in self.block(block, state)]
        if isinstance(node, ast.Match):
            return [event for case in node.cases for event in self.block(case.body, state)]
        events = [event for part in ast.iter_child_nodes(node) for event in self.expression(part, state)]
        return events + self.effect(node, state)

    def effect(self, node: ast.stmt, state: "State") -> list[Event]:
        """What an assignment or return does to the names, and the score that it may keep."""
        value = getattr(node, "value", None)
        level = 0 if value is None else self.level(value, state)
        told = level == RESULT and any(map(KEPT.search, names_in(node)))
        score, kept = [self.kept(node, state)] if told else [], False
        if isinstance(node, ast.Assign):
            kept = isinstance(value, (ast.ListComp, ast.GeneratorExp)) and state.quiet
            for target in node.targets:
                state.bind(target, level)
                # total = total + loss accumulates as well
                again = isinstance(value, ast.BinOp) and name_of(target) in names_in(value) - {""}
                kept = kept or again or isinstance(target, ast.Subscript)
        elif isinstance(node, ast.AnnAssign):
            state.bind(node.target, level)
        elif isinstance(node, ast.AugAssign):
            state.levels[name_of(node.target)] = max(level, state.levels.get(name_of(node.target), 0))
            kept = True
        elif isinstance(node, ast.Return):
            state.returned = max(state.returned, level)
            kept = state.quiet
        return score if kept else []

    def loop(self, node: ast.For | ast.AsyncFor | ast.While, state: "State") -> list[Event]:
        events = self.expression(node.test if isinstance(node, ast.While) else node.iter, state)
        before = state.copy()
        for _ in range(3):  # until what the loop carries is known
            entered = dict(state.levels)
            if not isinstance(node, ast.While):
                state.bind(node.target, self.level(node.iter, state))
            body = self.block(node.body, state)
            state.join(before)
            if state.levels == entered:
                break
        return shorten(events + self.collapse(body, node)) + self.block(node.orelse, state)

    def collapse(self, body: list[Event], node: ast.stmt) -> list[Event]:
        """Events of one turn -> of the loop: a gradient with a score before it in the same turn is a pair."""
        seen, result, again = "", [], repeats(node)
        restored = again and names_in(node) & {"load_state_dict", "reset", "deepcopy", "copy_", "restore"}
        last_score = max((i for i, event in enumerate(body) if event.kind == "score"), default=-1)
        for i, event in enumerate(body):
            if event.kind.startswith("score"):
                seen = event.kind if seen != "score" else seen
            elif event.kind in {"train", "late"} and seen == "score":
                event = event._replace(kind="pair")
            elif event.kind == "train":
                if last_score > i:
                    event = event._replace(kind="late")
                if seen:
                    event = event._replace(mark=event.mark.rstrip("?") + "?")
            if again and event.kind == "pair":
                event = event._replace(kind="repeat?" if restored else "repeat")
            result.append(event)
        return result

    # -- expressions ---------------------------------------------------------------------------------------------------

    def expression(self, node: ast.AST, state: "State") -> list[Event]:
        """Events of the calls in an expression, innermost first."""
        self.visit()
        if not isinstance(node, ast.expr):
            return []
        events: list[Event] = []
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.comprehension):
                events += self.expression(part.iter, state)
                state.bind(part.target, self.level(part.iter, state))
            events += self.expression(part.value if isinstance(part, ast.keyword) else part, state)
        if isinstance(node, ast.NamedExpr):
            state.bind(node.target, self.level(node.value, state))
        if isinstance(node, ast.Call):
            events += self.call(node, state)
        return events

    def call(self, node: ast.Call, state: "State") -> list[Event]:
        name = name_of(node.func)
        arguments = arguments_of(node)
        if name in {"backward", "grad"} and not state.quiet:
            owner = [node.func.value] if isinstance(node.func, ast.Attribute) and name == "backward" else []
            followed = [*owner, *arguments] if name == "backward" or "autograd" in dotted(node.func) else []
            if any(self.level(part, state) for part in followed):
                return [Event("warm" if id(node) in self.thrown else "train", node.lineno, state.reason())]
        if name in {"append", "add_", "extend", "index_add_", "copy_"} and isinstance(node.func, ast.Attribute):
            kept = any(map(KEPT.search, names_in(node)))
            if kept and any(self.level(part, state) == RESULT for part in arguments):
                return [self.kept(node, state)]
        meant = []
        for function, levels in self.targets(node, state):
            self.called.add(id(function))
            meant.append(self.summary(function, levels, state.quiet))
        events = [event for found, _ in meant for event in found]
        # Several may be meant: where one of them makes its result without a certain score, none is for certain.
        if any(level == RESULT and all(event.kind != "score" for event in found) for found, level in meant):
            events = [event._replace(kind="score?") if event.kind == "score" else event for event in events]
        for part in arguments:  # a function that is handed over is taken as called here: closures, callbacks
            for function in self.by_name.get(part.id, ()) if isinstance(part, ast.Name) else ():
                if id(function) not in self.methods and name not in {"compile", "checkpoint", "print"}:
                    self.called.add(id(function))
                    events += self.summary(function, dict(state.levels), state.quiet)[0]
        return events

    def kept(self, node: ast.stmt | ast.expr, state: "State") -> Event:
        """The event of a result that is kept: a score for certain where no gradient is taken, or where a function that
        was handed over as `score` gave it."""
        scorers = [call for call in calls_of(node) if re.fullmatch(r"_?(?:score|eval)\w*", name_of(call.func))]
        handed = any(not list(self.targets(call, state)) for call in scorers)
        return Event("score" if state.quiet or handed else "score?", node.lineno)

    def targets(self, node: ast.Call, state: "State") -> Iterator[tuple[ast.FunctionDef, dict[str, int]]]:
        """Functions of this file that a call may mean, with the levels of their arguments."""
        attribute = isinstance(node.func, ast.Attribute)
        if not attribute and not isinstance(node.func, ast.Name):
            return
        for function in self.by_name.get(name_of(node.func), ()):
            if (id(function) in self.methods) != attribute:
                continue
            names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
            names = names[1:] if attribute and names[:1] in (["self"], ["cls"]) else names
            if len(names) - len(function.args.defaults) > len(arguments_of(node)) and not is_open(node):
                continue  # another function of that name
            nested = function.col_offset > 0 and not attribute  # it sees the names around it
            levels = dict(state.levels) if nested else {}
            for parameter, part in zip(names, node.args, strict=False):
                levels[parameter] = self.level(part, state)
            for keyword in node.keywords:
                levels[keyword.arg or ""] = self.level(keyword.value, state)
            yield function, {key: level for key, level in levels.items() if level}

    def level(self, node: ast.AST, state: "State") -> int:
        """0, TOKENS or RESULT: what an expression carries of the validation tokens."""
        self.visit()
        if isinstance(node, ast.Name):
            return state.levels.get(node.id, TOKENS if VALIDATION.search(node.id) else 0)
        if isinstance(node, ast.Attribute):
            if node.attr in CLEAN:
                return 0
            own = VALIDATION.search(node.attr) or VALIDATION_PATH.search(dotted(node))
            return TOKENS if own else self.level(node.value, state)
        if isinstance(node, (ast.Constant, ast.Compare, ast.JoinedStr, ast.Lambda)):
            return 0
        if isinstance(node, ast.Call):
            name = name_of(node.func)
            if name in CLEAN:
                return 0
            owner = [node.func.value] if isinstance(node.func, ast.Attribute) else []
            carried = max((self.level(part, state) for part in arguments_of(node) + owner), default=0)
            targets = [] if name in CONVERSIONS else list(self.targets(node, state))
            if targets:
                return max(self.summary(function, levels, state.quiet)[1] for function, levels in targets)
            if "load_val" in name:
                return TOKENS
            return carried if carried == 0 or name in CONVERSIONS else RESULT
        parts = ast.iter_child_nodes(node)
        children = [part.iter if isinstance(part, ast.comprehension) else part for part in parts]
        return max((self.level(part, state) for part in children if isinstance(part, ast.expr)), default=0)


class State:
    """What is known while a block is walked: level of each name, whether gradients are off, the rule in question."""

    def __init__(self, levels: dict[str, int] | None = None, quiet: bool = False, rule: str = "train_before_score"):
        self.levels, self.quiet, self.rule, self.returned = levels or {}, quiet, rule, 0

    def copy(self) -> "State":
        return State(dict(self.levels), self.quiet, self.rule)

    def join(self, other: "State") -> None:
        for name, level in other.levels.items():
            self.levels[name] = max(level, self.levels.get(name, 0))
        self.returned = max(self.returned, other.returned)

    def bind(self, target: ast.AST, level: int) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            for part in target.elts:
                self.bind(part, level)
        elif isinstance(target, ast.Starred):
            self.bind(target.value, level)
        elif isinstance(target, ast.Name):
            self.levels[target.id] = level
        elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
            self.levels[target.value.id] = max(level, self.levels.get(target.value.id, 0))

    def reason(self) -> str:
        """The rule, with a `?` where a name says that the text was scored in an earlier turn."""
        earlier = any(level and EARLIER.search(name) for name, level in self.levels.items())
        return self.rule + "?" * earlier


def shorten(events: list[Event]) -> list[Event]:
    """First and last of equal events: enough for what comes before what, and bounded."""
    first = {event: i for i, event in reversed(list(enumerate(events)))}
    last = {event: i for i, event in enumerate(events)}
    return [event for i, event in enumerate(events) if i in (first[event], last[event])]


def without_gradient(node: ast.AST) -> bool:
    return any(name in dotted(getattr(node, "func", node)) for name in ("no_grad", "inference_mode"))


def thrown_away(block: list[ast.stmt], whole: bool) -> Iterator[int]:
    """Ids of the gradients that only move an adapter which is made in this block and gone before anything is scored
    with it: deleted, made anew, reset, or left behind with the function whose `whole` body this is."""
    for i, made in enumerate(block):
        target = made.targets[0] if isinstance(made, ast.Assign) else None
        if not (isinstance(target, ast.Name) and isinstance(made.value, ast.Call)):
            continue
        name = target.id
        end = next((j for j in range(i + 1, min(i + MAX_WARM_UP, len(block))) if gives_up(block[j], name)), None)
        if end is None and not (whole and len(block) - i < MAX_WARM_UP):
            continue
        within = block[i + 1 : end]
        last = max((k for k, part in enumerate(within) if "backward" in names_in(part)), default=-1)
        if any(name in names_in(part) for part in within[last + 1 :]):
            continue  # it is used again
        region = [node for statement in within for node in ast.walk(statement)]
        assigned = [node for node in region if isinstance(node, ast.Assign)]
        calls = [node for node in region if isinstance(node, ast.Call)]
        escapes = any(name in names_in(node) for node in region if isinstance(node, (ast.Return, ast.Yield)))
        added = [name_of(node.target) for node in region if isinstance(node, ast.AugAssign)]
        gathered = [word for call in calls if name_of(call.func) in {"append", "extend"} for word in names_in(call)]
        kept = any(map(KEPT.search, added + gathered))
        made_of = [node for node in assigned if {name, "parameters"} <= names_in(node.value)]
        optimizers = {name_of(part) for node in made_of for part in node.targets}
        steps = [call.func for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "step"]
        stepped = {name_of(step.value) for step in steps}
        if stepped and stepped <= optimizers and not escapes and not kept:
            yield from (id(call) for call in calls if name_of(call.func) in {"backward", "grad"})


def gives_up(statement: ast.stmt, name: str) -> bool:
    """Whether a statement deletes what has a name, makes it anew or resets it."""
    if isinstance(statement, ast.Delete):
        return name in names_in(statement)
    if isinstance(statement, ast.Assign):
        return any(name_of(part) == name for part in statement.targets)
    call = statement.value.func if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call) else None
    return call is not None and re.match(rf"{name}\.(?:\w*reset\w*|load_state_dict)$", dotted(call)) is not None


def makes_parameter(function: ast.FunctionDef, settings: Settings) -> bool:
    """Whether a function optimises a fresh tensor: requires_grad=True or nn.Parameter in its own code."""
    for node in own_nodes(function):
        if isinstance(node, ast.Call):
            required = keyword(node, "requires_grad")
            required = required is not None and settings.value(required, (function,)) in (True, 1)
            fresh = name_of(node.func) == "requires_grad_" and isinstance(getattr(node.func, "value", None), ast.Call)
            if required or fresh or name_of(node.func) == "Parameter":
                return True
    return False


def repeats(node: ast.stmt) -> bool:
    """Whether a loop goes over the same text again: it says so, or nothing in it depends on the turn."""
    if not isinstance(node, ast.For):
        return False
    targets = names_in(node.target)
    words = f"{ast.unparse(node.target)} {ast.unparse(node.iter)}".lower()
    used = {name for statement in node.body for name in names_in(statement)}
    counted = isinstance(node.iter, ast.Call) and name_of(node.iter.func) == "range"
    return counted and (bool(REPEAT.search(words)) or not targets & used)


def order_of_events(tree: ast.Module) -> Iterator[Finding]:
    texts = {
        "train_before_score": "a gradient from validation tokens ({line}) before they are scored",
        "scored_region": "a fresh tensor is optimised on validation windows ({line}) that are scored with it",
    }
    for events in Flow(tree).roots():
        scores = [i for i, event in enumerate(events) if event.kind == "score"]
        kept = 0  # line of a result that may be a score, of a forward with gradients
        for i, event in enumerate(events):
            kept = event.line if event.kind == "score?" else kept
            rule, doubt = event.mark.rstrip("?"), event.mark.endswith("?")
            where = f"line {event.line}"
            if event.kind in {"train", "late"}:
                later = event.kind == "late" or (scores and scores[-1] > i)
                text = texts[rule].format(line=where)
                if not later and scores and not (doubt and kept):
                    continue  # after every score: it can change none
                if kept and (doubt or not later):
                    # One forward can give the score and, before any step, the gradient. But a loss that is logged looks
                    # the same, so a reader decides.
                    text += (
                        f", unless the result kept in line {kept} is their score and no step came before its forward"
                    )
                elif not later:
                    text += ", if they are scored after it: no score was found"
                elif doubt:
                    text += ", unless an earlier turn scored them"
                elif event.kind == "train" and scores[0] < i:
                    text = f"validation tokens are scored again after learning from them ({where})"
                yield Finding(rule, "FAIL" if later and not doubt else "warn", event.line, text)
            elif event.kind == "warm":
                text = f"an adapter that is thrown away is warmed up on validation tokens ({where}): others would do"
                yield Finding("train_before_score", "warn", event.line, text)
            elif event.kind.startswith("repeat"):
                level = "warn" if event.kind == "repeat?" or doubt else "FAIL"
                yield Finding("several_passes", level, event.line, "scores and learns from the same tokens repeatedly")


# ----------------------------------------------------------------------------------------------------------------------
# The other rules
# ----------------------------------------------------------------------------------------------------------------------


def is_hash(node: ast.AST) -> bool:
    """An expression that mixes numbers as hash functions do: xor, or a product cut by a modulus or mask."""
    parts = [part for part in ast.walk(node) if isinstance(part, ast.BinOp)]
    # A product with a number or name that hash functions use: masks and weights are multiplied as well.
    operators = {type(part.op) for part in parts if not isinstance(part.op, ast.Mult) or is_multiplier(part)}
    called = {name_of(call.func) for call in calls_of(node)}
    mixes = called & {"hash", "bitwise_xor", "crc32", "adler32", "blake2b", "md5", "xxhash"}
    return ast.BitXor in operators or bool(mixes) or (ast.Mult in operators and bool({ast.Mod, ast.BitAnd} & operators))


def is_multiplier(node: ast.BinOp) -> bool:
    for part in (node.left, node.right):
        if isinstance(part, ast.Constant) and isinstance(part.value, int) and part.value >= 31:
            return True
        if re.search(r"prime|mult|hash|magic|salt|vocab", " ".join(names_in(part)), re.I):
            return True
    return False


def derived(nodes: list[ast.AST], start: set[str], stop: set[str]) -> set[str]:
    """Names that get a value from `start` in these nodes, through assignments, but not through calls in `stop`."""
    names = set(start)
    assigned = [node for node in nodes if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) and node.value]
    for _ in range(4):
        for node in assigned:
            if (names_in(node.value) & names) and not {name_of(c.func) for c in calls_of(node.value)} & stop:
                parts = [part for target in targets_of(node) for part in ast.walk(target) if isinstance(part, ast.Name)]
                names |= {part.id for part in parts if isinstance(part.ctx, ast.Store)}
    return names


LOSSES = {"cross_entropy", "nll_loss", "log_softmax", "gather", "numel", "len", "model", "size"}
LOOKUPS = {"get", "take", "gather", "index_select", "lookup", "query"}


def target_keys(nodes: list[ast.AST]) -> tuple[set[str], set[str]]:
    """(names with a target id in them, names of hash keys made from one) in one scope."""
    own = {name_of(node) for node in nodes if isinstance(node, ast.Name) and TARGET.match(node.id)}
    targets = derived(nodes, own, LOSSES) if own else set()
    keys = set()
    for node in nodes:
        if isinstance(node, (ast.Assign, ast.AugAssign)) and is_hash(node.value) and names_in(node.value) & targets:
            for target in targets_of(node):
                keys |= {name_of(part) for part in ast.walk(target) if isinstance(part, ast.Name)}
    return targets, derived(nodes, keys, LOOKUPS | LOSSES) if keys else set()


def lookups(nodes: Iterable[ast.AST]) -> Iterator[tuple[ast.AST, ast.AST, ast.AST]]:
    """(node, table, key) of every read of a table."""
    for node in nodes:
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            yield node, node.value, node.slice
        elif isinstance(node, ast.Call) and name_of(node.func) in LOOKUPS and isinstance(node.func, ast.Attribute):
            for part in node.args:
                yield node, node.func.value, part


def target_in_key(scope: str, nodes: list[ast.AST]) -> Iterator[Finding]:
    """A table that is read with a hash of the target id."""
    targets, keys = target_keys(nodes)
    counting = written_tables(nodes) if targets else set()
    for node, table, key in lookups(nodes) if targets else ():
        if id(node) in counting:
            continue
        used = names_in(key)
        direct = is_hash(key) and used & targets
        if (direct or used & keys) and not names_in(table) & keys:
            yield Finding("target_in_key", "FAIL", node.lineno, "a table is read with a hash of the target id")
        elif used & targets and isinstance(key, ast.Tuple) and re.search(r"cache|gram|count|tabl", dotted(table)):
            text = "a table is read with the target id in its key: is it one distribution over all tokens?"
            yield Finding("target_in_key", "warn", node.lineno, text)


def written_tables(nodes: list[ast.AST]) -> set[int]:
    """Reads that are the left side of an update: np.add.at(table[key], …), table[key] += 1, bincount."""
    written: set[int] = set()
    for node in nodes:
        if isinstance(node, ast.Call) and re.search(r"add\.at$|scatter_add|index_add|bincount|put", dotted(node.func)):
            written |= {id(part) for part in ast.walk(node)}
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            target = ast.dump(node.targets[0].slice)  # t[k] = t.get(k, 0) + 1 and t[k] = t[k] + 1
            for part in ast.walk(node.value):
                same = isinstance(part, ast.Subscript) and ast.dump(part.slice) == target
                got = isinstance(part, ast.Call) and part.args and ast.dump(part.args[0]) == target
                if same or got:
                    written.add(id(part))
    return written


def unnormalised_mix(scope: str, nodes: list[ast.AST]) -> Iterator[Finding]:
    """exp(-nll) of the realised token, blended with another probability and logged again."""
    own, looked_up = set(), set()
    _, keys = target_keys(nodes)
    for node in nodes:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and (name := name_of(node.targets[0])):
            calls = {name_of(call.func) for call in calls_of(node.value)}
            if "exp" in calls and any(map(SCORE.search, names_in(node.value))):
                own.add(name)
            if any(names_in(key) & keys for _, _, key in lookups(ast.walk(node.value))):
                looked_up.add(name)
    tables = derived(nodes, looked_up, {"log"}) if own and looked_up else set()
    for node in nodes:
        match node:
            case ast.BinOp(ast.BinOp(op=ast.Mult()), ast.Add(), ast.BinOp(op=ast.Mult())) if names_in(node) & own:
                level = "FAIL" if names_in(node) & tables else "warn"
                text = "blends the realised token's probability alone: does the mixture sum to 1 over all tokens?"
                yield Finding("unnormalised_mix", level, node.lineno, text)


def scores_in(node: ast.Call) -> int:
    """How many arguments have the name of a score."""
    return sum(any(SCORE.search(word) for word in names_in(part)) for part in node.args)


def over_passes(node: ast.Call) -> bool:
    """Whether a minimum runs over several passes: over what is stacked, or along an axis of them."""
    axis = any(keyword.arg in {"dim", "axis"} for keyword in node.keywords)
    gathered = {"stack", "vstack", "array", "cat"} & {name_of(call.func) for call in calls_of(node)}
    passes = axis and any(re.search(r"all|pass|runs|stack", word) for word in names_in(node))
    return any(SCORE.search(word) for word in names_in(node)) and bool(gathered or passes)


NETWORK_COMMANDS = re.compile(
    r"\b(?:pip3? install|curl |wget |git clone|apt(?:-get)? install|conda install|hf download)"
)
TRAIN_WORDS = re.compile(rf"{TRAINING_DATA.pattern}|fineweb_train")


class CallRule(NamedTuple):
    """A call that breaks a rule: its dotted name, what else has to hold of it, and the function around it."""

    rule: str
    call: str
    text: str
    holds: Callable[[ast.Call], Any] = lambda node: True
    inside: str = ""


CALL_RULES = (
    CallRule(
        "best_of_passes",
        r"(?:^|\.)(?:minimum|fmin|min)$",
        "keeps the smaller of two scores ({call})",
        lambda node: scores_in(node) >= 2 and not any("best" in word for word in names_in(node)),
    ),
    CallRule(
        "best_of_passes",
        r"(?:^|\.)where$",
        "chooses between two scores by comparing them",
        lambda node: len(node.args) == 3 == scores_in(node),
    ),
    CallRule("best_of_passes", r"(?:^|\.)a?min$", "keeps the smallest score over several passes", over_passes),
    CallRule(
        "network",
        r"(?:^|\.)(?:urlopen|urlretrieve|hf_hub_download|snapshot_download|load_dataset|create_connection"
        r"|HTTPS?Connection)$|^(?:requests|httpx|aiohttp)\.(?:get|post|put|head|request|Session|Client|ClientSession)$"
        r"|^wget\.download$|^boto3\.(?:client|resource)$",
        "{call}() uses the network at run time",
    ),
    CallRule(
        "network",
        r"(?:^|\.)(?:system|run|call|check_call|check_output|Popen)$",
        "{call}() fetches something at run time",
        lambda node: NETWORK_COMMANDS.search(" ".join(constants_in(node)) + " "),
    ),
    CallRule(
        "training_data_in_eval",
        r"(?i)load|loader|read|open|glob|next_batch|shard|prefill|update|stream|memmap|fromfile",
        "{scope}() reads training data",
        lambda node: any(map(TRAIN_WORDS.search, names_in(node).union(constants_in(node)))),
        inside=rf"^(?!.*train).*{EVALUATION.pattern}",
    ),
    CallRule(
        "calibration_on_validation",
        rf"(?:{CALIBRATION.pattern})[^.]*$",
        "{call}() gets validation tokens",
        lambda node: any(map(is_validation, arguments_of(node))) and not EVALUATION.search(name_of(node.func)),
    ),
)


def forbidden_calls(scope: str, nodes: list[ast.AST]) -> Iterator[Finding]:
    """What CALL_RULES name."""
    for node in nodes:
        for rule in CALL_RULES if isinstance(node, ast.Call) else ():
            call = dotted(node.func)
            if re.search(rule.call, call) and re.search(rule.inside, scope) and rule.holds(node):
                yield Finding(rule.rule, "FAIL", node.lineno, rule.text.format(call=call, scope=scope))


def forbidden_uses(scope: str, nodes: list[ast.AST]) -> Iterator[Finding]:
    """Validation tokens inside a calibration, and a best validation score that decides."""
    calibrates = CALIBRATION.search(scope) and not EVALUATION.search(scope)
    for node in nodes:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Compare) and isinstance(node.test.ops[0], ast.Lt):
            left, right = name_of(node.test.left), name_of(node.test.comparators[0])
            if re.search(r"val_(?:loss|bpb)|^bpb|_bpb$", left) and "best" in right:
                text = "keeps what has the best validation score: choosing after seeing validation outcomes"
                yield Finding("best_of_passes", "warn", node.lineno, text)
        elif calibrates and isinstance(getattr(node, "ctx", None), ast.Load) and is_validation(node):
            yield Finding("calibration_on_validation", "FAIL", node.lineno, f"{scope}() uses validation tokens")


def is_validation(node: ast.AST) -> bool:
    """Validation tokens themselves or a slice or conversion of them."""
    while isinstance(node, (ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
        if isinstance(node, ast.Attribute) and node.attr in CONVERSIONS:
            node = node.value
    return bool(VALIDATION.search(name_of(node)) or VALIDATION_PATH.search(dotted(node)))


# Each looks at the own nodes of one scope: the module, whose name is empty, or a function.
RULES = (target_in_key, unnormalised_mix, forbidden_calls, forbidden_uses)
