"""Reads the source of a pipeline's denoising loop and decides whether the loop can be driven.

A driven loop (see `lockstep.loop`) turns once per wave. The loop index is then the number of the wave, the timestep is
always the first one, and the sample holds the rows of many time points. A loop that uses these three in any unusual way
gives a wrong image without an error. So this module lists what a plain loop may contain, and names the first thing in
the source that is not on the list.

A `callback_on_step_end` block of the usual form is skipped: `lockstep.callbacks` handles it. Code that runs only with
the older `callback` or only with a single step is not checked, nor are other methods of the pipeline that its
`__call__` calls outside the loop. The caller must handle these.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

DENOISERS = ("self.unet", "self.transformer")
TIME_TAKERS = (*DENOISERS, "self.scheduler.scale_model_input", "self.scheduler.step")

# functions that treat all entries of the batch alike and keep no state between turns
FUNCTIONS = {
    "hasattr", "isinstance", "maybe_adjust_dtype_for_device", "progress_bar.update", "rescale_noise_cfg",
    "torch.backends.mps.is_available", "torch.cat", "torch.is_tensor", "xm.mark_step", *TIME_TAKERS,
}  # fmt: skip
METHODS = {"chunk", "clamp", "float", "size", "to"}
# functions that shape the denoiser's timestep argument. Its shape does not matter: each row gets its own timestep
TIME_FUNCTIONS = {"torch.cat", "torch.tensor"}
TIME_METHODS = {"expand", "float", "repeat", "to", "unsqueeze", "view"}
TYPE = {"device", "dtype", "ndim"}

STATEMENTS = (ast.Assert, ast.Assign, ast.Expr, ast.If, ast.Pass, ast.With)
EXPRESSIONS = (
    ast.Attribute, ast.BinOp, ast.BoolOp, ast.Call, ast.Compare, ast.Constant, ast.Dict, ast.IfExp, ast.List, ast.Name,
    ast.Slice, ast.Subscript, ast.Tuple, ast.UnaryOp,
)  # fmt: skip

# code around the loop that would not work with proxies, and what it does
OUTSIDE = {
    r"(isinstance|type)\(self\.(scheduler|unet|transformer)\b(?!\.).*": "asks for the class of a component",
    r"self\.(scheduler|unet|transformer)\b[\w.]* .?=.*": "changes or renames a component",
    r".*= self\.(scheduler|unet|transformer)": "changes or renames a component",
    r"(callback|callback_on_step_end) .?=(?!.*kwargs\.pop).*": "has a callback of its own",
}


class _Unknown(Exception):
    """The source contains something that is not on the list; the message is the reason."""


@functools.cache
def unknown_in_loop(call: Callable[..., Any]) -> str | None:
    """Why the loop in a pipeline's `__call__`, with its decorators, cannot be driven; None if it can be driven."""
    if (reason := replaced(call)) is not None:
        return reason
    try:
        lines, first_line = inspect.getsourcelines(inspect.unwrap(call))
    except (OSError, TypeError):
        return "the source of its __call__ is not available"
    return unknown_in_source("".join(lines), first_line)


def replaced(call: Callable[..., Any]) -> str | None:
    """A clause that names foreign code in a pipeline's `__call__`; None if it is all from diffusers or torch."""
    function: Any = call
    while function is not None:
        # functools.wraps copies __module__, so only the globals show where the code comes from
        module = str(getattr(function, "__globals__", {}).get("__name__", type(function).__module__))
        if module.partition(".")[0] not in ("diffusers", "torch"):
            return f"its __call__ was replaced by code of {module}"
        function = getattr(function, "__wrapped__", None)
    return None


def unknown_in_source(source: str, first_line: int = 1) -> str | None:
    """As `unknown_in_loop`, for the source of a `__call__` that begins at `first_line` of its file."""
    call = ast.parse(textwrap.dedent(source)).body[0]
    ast.increment_lineno(call, first_line - 1)
    try:
        _Loop(call).check()
    except _Unknown as reason:
        return str(reason)
    return None


def _refuse(what: str, node: ast.AST) -> NoReturn:
    text = textwrap.shorten(_text(node), 80, placeholder="...")
    raise _Unknown(f"its loop {what} at line {getattr(node, 'lineno', 0)} (`{text}`)")


def _text(node: ast.AST | None) -> str:
    return "" if node is None else ast.unparse(node)


def _is_step(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "step"


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    """A node and its descendants in evaluation order: the value of an assignment comes before its targets."""
    yield node
    for child in [node.value, *node.targets] if isinstance(node, ast.Assign) else ast.iter_child_nodes(node):
        yield from _in_order(child)


def _the_loop(call: ast.AST) -> ast.For:
    """The one loop that contains scheduler.step; it must not be inside another loop or an inner function."""
    steps = {node for node in ast.walk(call) if _is_step(node)}
    repeated = (ast.AsyncFor, ast.For, ast.FunctionDef, ast.Lambda, ast.While)
    around = [node for node in ast.walk(call) if isinstance(node, repeated) and steps & {*ast.walk(node)}]
    loops = [node for node in around if node is not call]
    if not loops:
        raise _Unknown("its __call__ has no loop around scheduler.step")
    if len(loops) > 1 or not isinstance(loops[0], ast.For) or not steps <= {*ast.walk(loops[0])}:
        raise _Unknown("its __call__ is not one plain loop around scheduler.step")
    return loops[0]


def _header(loop: ast.For) -> tuple[str | None, str, str]:
    """The names in `for i, t in enumerate(timesteps)` or `for t in timesteps`, with or without a progress bar."""
    names, iterated = [_text(loop.target)], loop.iter
    while isinstance(iterated, ast.Call) and iterated.args:
        if _text(iterated.func) == "enumerate" and isinstance(loop.target, ast.Tuple):
            names = [_text(name) for name in loop.target.elts]
        elif _text(iterated.func) != "self.progress_bar":
            break
        iterated = iterated.args[0]
    timesteps = _text(iterated)
    is_known = re.fullmatch(r"(self\.scheduler\.)?timesteps|timesteps_tensor", timesteps)
    if not is_known or len(names) > 2 or not all(map(str.isidentifier, names)) or loop.orelse:
        raise _Unknown(f"its loop at line {loop.lineno} is not `for i, t in enumerate(timesteps)`")
    return (names[0] if len(names) == 2 else None), names[-1], timesteps


class _Harmless(ast.NodeTransformer):
    """Removes code that is safe to skip: progress bar, interrupt, single-step code, callbacks."""

    def __init__(self, index: str | None, time: str) -> None:
        self.returned: set[str] = set()  # names to which callback_on_step_end may give a new value
        self._callback = re.compile(
            r"callback_kwargs = \{\}"
            r"|for k in callback_on_step_end_tensor_inputs:\n    callback_kwargs\[k\] = locals\(\)\[k\]"
            rf"|callback_outputs = callback_on_step_end\(self, {index}, {time}, callback_kwargs\)"
            r"|(?P<name>\w+) = callback_outputs\.pop\('(?P=name)', (?P=name)\)"
        )

    def visit_If(self, node: ast.If) -> Any:
        test, body = _text(node.test), [_text(statement) for statement in node.body]
        if test == "callback_on_step_end is not None":
            matches = [self._callback.fullmatch(text) for text in body]
            self.returned |= {match["name"] for match in matches if match and match["name"]}
            return node.orelse if all(matches) else node
        if re.fullmatch(r"callback is not None( and .*)?|num_inference_steps == 1", test) or (
            test == "self.interrupt" and body == ["continue"]
        ):
            return node.orelse
        self.generic_visit(node)
        body = [_text(statement) for statement in node.body]
        return None if set(body) <= {"progress_bar.update()"} and not node.orelse else node


class _Loop:
    """The loop of a `__call__`, `for index, time in enumerate(timesteps)`, and the meaning of its names."""

    def __init__(self, call: ast.AST) -> None:
        self.call, self.loop = call, _the_loop(call)
        self.index, self.time, self.timesteps = _header(self.loop)
        harmless = _Harmless(self.index, self.time)
        harmless.generic_visit(self.loop)
        self.returned = harmless.returned
        # without the harmless parts, in evaluation order
        self.nodes = [node for statement in self.loop.body for node in _in_order(statement)]
        self.names = [node for node in self.nodes if isinstance(node, ast.Name)]
        self.assigned = {name.id for name in self.names if isinstance(name.ctx, ast.Store)}
        self.parents = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}
        self.sample = ""  # the variable that scheduler.step updates
        self.shaping: set[ast.AST] = set()  # nodes that only change the type and shape of the timestep

    def check(self) -> None:
        """Raise _Unknown at the first thing that is not understood; the most useful reasons are checked first."""
        for name in self.names:
            if name.id == self.index:
                _refuse(f"uses the step number {name.id}", self._around(name))
        times = [self.time]
        for time in times:  # grows
            loads = [name for name in self.names if name.id == time and isinstance(name.ctx, ast.Load)]
            times += {new for name in loads if (new := self._time_goes_to(name))}.difference(times)
        self._check_sample()
        for call in (node for node in self.nodes if isinstance(node, ast.Call)):
            self._check_call(call)
        for node in self.nodes:
            self._check_node(node)
        self._check_memory()
        self._check_outside()

    def _around(self, node: ast.AST) -> ast.AST:
        parent = self.parents.get(node)
        return parent if isinstance(parent, ast.expr | ast.keyword) else node

    def _statement(self, node: ast.AST) -> ast.stmt:
        while not isinstance(node, ast.stmt):
            node = self.parents[node]
        return node

    def _time_goes_to(self, name: ast.AST) -> str | None:
        """Follow one use of the timestep: None if it ends in an allowed place, or the name it is assigned to."""
        node = name
        while True:
            parent = self.parents[node]
            match parent:
                case ast.Attribute(attr=attr) if attr in {"shape", *TYPE}:
                    return None
                case ast.Assign(targets=[ast.Attribute(attr="_current_timestep")]):
                    return None
                case ast.Call(func=func, args=args) if _text(func) in ("isinstance", "torch.is_tensor") or (
                    args[1:2] == [node] and _text(func) in TIME_TAKERS
                ):
                    return None
                case ast.keyword(arg="timestep") if _text(getattr(self.parents[parent], "func", None)) in TIME_TAKERS:
                    return None
                case ast.Assign(targets=[ast.Name(id=new)]):
                    return new
                case ast.Attribute(attr=attr) if attr in TIME_METHODS:
                    pass
                case ast.List() | ast.Subscript(slice=ast.Constant(value=None)):
                    pass
                case ast.Call(func=func) if func is node or _text(func) in TIME_FUNCTIONS:
                    pass
                case ast.BinOp(left=left, op=ast.Mult() | ast.Div(), right=factor) if left is node and (
                    isinstance(left, ast.List) or re.fullmatch(r"[\d.]+|self\.\w+\.config\.\w+", _text(factor))
                ):
                    pass
                case ast.IfExp(test=test) if test is not node:
                    pass
                case _:
                    _refuse("uses the timestep", self._around(node))
            node = parent
            self.shaping.update(ast.walk(node))

    def _check_sample(self) -> None:
        """Check that one variable is stepped and takes the result, and that no other code changes or later reads it."""
        steps = [node for node in self.nodes if _is_step(node)]
        step: Any = steps[0]
        stepped = self._statement(step)
        given = [*step.args[2:3], *(keyword.value for keyword in step.keywords if keyword.arg == "sample")]
        self.sample = _text(given[0]) if given else ""
        form = re.escape(f"{self.sample} = {_text(step)}") + r"(\[0\]|\.prev_sample)(\.to\([\w., ]*\))?"
        is_plain = self.sample.isidentifier() and _text(step.func) == "self.scheduler.step" and len(steps) == 1
        if not is_plain or not re.fullmatch(form, _text(stepped)):
            _refuse("does not just step one sample", stepped)
        if self.returned and not {self.sample, "latents"} <= self.returned:
            _refuse("shows its callback other names than it steps", stepped)
        cast = rf"{self.sample} = {self.sample}\.(float|to)\([\w., =]*\)"
        for name in self.names:
            parent, statement = self.parents[name], self._statement(name)
            is_type = isinstance(parent, ast.Attribute) and parent.attr in TYPE
            if name.id != self.sample or statement is stepped or is_type or re.fullmatch(cast, _text(statement)):
                continue
            if isinstance(name.ctx, ast.Store):
                _refuse(f"changes {self.sample}", statement)
            if name.lineno > stepped.lineno:
                _refuse(f"reads {self.sample} after the step", statement)

    def _check_call(self, call: ast.Call) -> None:
        name, options = _text(call.func), [_text(keyword) for keyword in call.keywords]
        owner, _, method = name.rpartition(".")
        if not (
            name in FUNCTIONS
            or (method in METHODS and not re.fullmatch(r"(self|torch)[\w.]*", owner))
            or (call in self.shaping and (method in TIME_METHODS or name in TIME_FUNCTIONS))
            or (method == "cache_context" and owner in DENOISERS)
            or (name == "len" and re.fullmatch(rf"{re.escape(self.timesteps)}|.*\.shape", _text(call.args[0])))
            # these two stay within one entry of the batch
            or (method == "split" and "dim=1" in options)
            or (name == "torch.norm" and "dim=-1" in options)
        ):
            _refuse(f"calls {name}", call)

    def _check_node(self, node: ast.AST) -> None:
        """Refuse unlisted statements and expressions, use of the schedule, and different handling of batch entries."""
        parent = self.parents.get(node)
        match node:
            case ast.stmt() if not isinstance(node, STATEMENTS):
                _refuse("has a statement that is not understood", node)
            case ast.expr() if not isinstance(node, EXPRESSIONS):
                _refuse("has an expression that is not understood", node)
            case ast.BinOp(op=ast.MatMult()):
                _refuse("has a matrix product", node)
            case ast.Assign(targets=targets) if not all(self._is_plain_target(each, node.value) for each in targets):
                _refuse("stores something", node)
            case ast.Name(id=self.timesteps) if _text(parent) != f"len({self.timesteps})":
                _refuse("looks at the timesteps", self._around(node))
            case ast.Attribute(attr="_current_timestep" | "current_timestep", ctx=ast.Load()):
                _refuse("looks at the timestep", self._around(node))
            case ast.Attribute() if _text(node) == "self.scheduler" and not re.match(
                r"self\.scheduler\.(config|order|scale_model_input|step)\b|hasattr\(", _text(parent)
            ):
                _refuse("looks at the scheduler", self._around(node))
            case ast.expr() if node not in self.shaping and self._tells_entries_apart(node):
                _refuse("tells the entries of the batch apart", self._around(node))

    def _is_plain_target(self, target: ast.AST, value: ast.AST) -> bool:
        """Whether the target is a name, the attribute that callbacks read, or a dict entry that never changes."""
        if isinstance(target, ast.Tuple):
            return all(isinstance(each, ast.Name) for each in target.elts)
        if isinstance(target, ast.Subscript) and isinstance(value, ast.Name):
            return isinstance(target.slice, ast.Constant) and value.id not in self.assigned
        return isinstance(target, ast.Name) or _text(target) == "self._current_timestep"

    def _tells_entries_apart(self, node: ast.expr) -> bool:
        """Whether an expression selects or counts entries of the batch, which are rows in a driven loop."""
        match node:
            case ast.Name(id=name):
                return re.search("batch|bsz|_per_prompt|num_samples", name) is not None
            case ast.Attribute(attr="shape"):
                return not re.fullmatch(r"len\(.*\)|.*\.shape\[([1-9]|-1|-2)\]", _text(self.parents[node]))
            case ast.Call(func=ast.Attribute(attr="size"), args=args):
                return not re.fullmatch("[1-9]|-1|-2", ", ".join(map(_text, args)))
            case ast.Subscript(value=ast.Call(func=func), slice=index):  # one of several outputs
                outputs = re.search(r"\.(chunk|split|step|transformer|unet)$", _text(func))
                return outputs is None or not _text(index).isdigit()
            case ast.Subscript(value=value, slice=index) if not _text(value).endswith(".shape"):
                return not re.match(r"\(?(:,|\.\.\.,|')", _text(index))
        return False

    def _check_memory(self) -> None:
        """Refuse variables, other than the sample, that keep a value between turns or after the loop."""
        after = [node for node in _in_order(self.call) if getattr(node, "lineno", 0) > (self.loop.end_lineno or 0)]
        for nodes, new, when in ((self.nodes, self.time, "the next turn"), (after, None, "after the loop")):
            kept = {*self.assigned, self.time, self.index} - {self.sample, new}
            for node in nodes:
                if isinstance(node, ast.Name) and node.id in kept:
                    if isinstance(node.ctx, ast.Load):
                        _refuse(f"keeps {node.id} for {when}, read", node)
                    kept.discard(node.id)

    def _check_outside(self) -> None:
        """Check that the loop calls one denoiser, and that no code around it would fail with proxies."""
        called = {_text(node.func) for node in self.nodes if isinstance(node, ast.Call)}.intersection(DENOISERS)
        if len(called) != 1:
            raise _Unknown(f"its loop calls {' and '.join(sorted(called)) or 'neither self.unet nor self.transformer'}")
        for node in ast.walk(self.call):
            if isinstance(node, ast.Assign | ast.AugAssign | ast.Call):
                for pattern, what in OUTSIDE.items():
                    if re.fullmatch(pattern, text := _text(node), re.DOTALL):
                        raise _Unknown(f"its __call__ {what} (`{text}`)")
