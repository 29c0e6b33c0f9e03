"""`where="duration > 4 and label != 'x'"`: a condition on index columns in Python's syntax, evaluated by Arrow.

Names are the columns of the index, those of the manifest included, and `duration`: frames / fps in seconds, unless the
index has a column of that name. Allowed are

    and or not    < <= > >= == != (chained too)    in, not in with a list    'part' in text
    is None, is not None    + - * /    parentheses    numbers, 'text', True, False, None

Properties that hold:
- nothing is executed: the text is parsed, and the error names the part that is not allowed;
- kinds are checked before anything is read: a number is never compared with a text;
- a missing value is Python's None. With it `==`, `in`, `<` and `>` are false, `!=` and `not in` are true; so a clip
  without x satisfies `not x < 3`. What is computed from it is missing as well, and so is a division by zero.
"""

from __future__ import annotations

import ast
import difflib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reelmae.pipeline.errors import ConfigError

DURATION = "duration"
MAX_LENGTH, MAX_DEPTH = 10_000, 60

Value = Any  # a pyarrow Array or Scalar
NUMBER, TEXT, TRUTH, NOTHING, OTHER = "a number", "a text", "a truth value", "nothing", "of another kind"
_ORDERS = {ast.Lt: pc.less, ast.LtE: pc.less_equal, ast.Gt: pc.greater, ast.GtE: pc.greater_equal}
_SUMS = {ast.Add: pc.add_checked, ast.Sub: pc.subtract_checked, ast.Mult: pc.multiply_checked}
_NODE_NAMES: dict[type[ast.AST], str] = {
    ast.Call: "a function call",
    ast.Attribute: "an attribute",
    ast.Subscript: "a subscript",
    ast.Lambda: "a function",
    ast.IfExp: "an if",
    ast.JoinedStr: "a text made of values",
    ast.NamedExpr: "an assignment",
    **dict.fromkeys((ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp), "a loop"),
    ast.Starred: "a star",
    ast.Dict: "a dictionary",
    ast.Set: "a set",
    ast.List: "a list",
    ast.Tuple: "a tuple",
    **dict.fromkeys((ast.BinOp, ast.UnaryOp), "an operator"),
}


@dataclass(frozen=True)
class _Term:
    """Part of a condition: the kind of its values, in words, and the function that computes them."""

    kind: str
    of: Callable[[pa.RecordBatch], Value]


class Where:
    """A checked condition. `columns` are the columns that it needs.

    Raises ConfigError, naming the part that is not allowed, not known, or of the wrong kind.
    """

    def __init__(self, text: str, schema: pa.Schema) -> None:
        self.columns: set[str] = set()
        self._text, self._schema = text.strip(), schema
        self._root = self._truth(self._parse(), 0)

    def mask(self, rows: pa.RecordBatch) -> np.ndarray:
        """bool [N]: whether it is true of each row."""
        try:
            found = self._root(rows)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
            # a number that does not fit the column, a type that cannot be compared: one line, with Arrow's words
            raise self._error(" ".join(str(e).split())) from e
        if isinstance(found, pa.Scalar):
            return np.full(len(rows), found.as_py())
        return found.to_numpy(zero_copy_only=False)

    def _error(self, words: str) -> ConfigError:
        text = self._text if len(self._text) <= 80 else f"{self._text[:77]}..."
        return ConfigError(f"where={text!r}: {words}")

    def _words(self, node: ast.AST) -> str:
        text = " ".join((ast.get_source_segment(self._text, node) or type(node).__name__).split())
        return repr(text if len(text) <= 40 else f"{text[:37]}...")

    def _refusal(self, node: ast.AST) -> ConfigError:
        return self._error(
            f"{self._words(node)} is {_NODE_NAMES.get(type(node), 'something')} that cannot be used here; allowed are "
            "columns, numbers, texts, comparisons, in, is None, and, or, not, + - * /"
        )

    def _parse(self) -> ast.expr:
        if len(self._text) > MAX_LENGTH:
            raise self._error(f"{len(self._text)} characters, at most {MAX_LENGTH} are read; use a list of keys")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # an unknown escape, `1or`: refused, not guessed
                return ast.parse(self._text, mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError, Warning) as e:
            reason = e.msg if isinstance(e, SyntaxError) else str(e) or "nested too deeply"
            raise self._error(f"cannot be read ({reason}); write it like \"duration > 4 and label != 'x'\"") from e

    # ---- conditions: functions to a truth value that is never missing

    def _truth(self, node: ast.expr, depth: int) -> Callable[[pa.RecordBatch], Value]:
        if depth > MAX_DEPTH:
            raise self._error(f"nested more than {MAX_DEPTH} deep")
        if isinstance(node, ast.BoolOp):
            join = pc.and_ if isinstance(node.op, ast.And) else pc.or_
            parts = [self._truth(value, depth + 1) for value in node.values]
            return lambda rows: reduce(join, (part(rows) for part in parts))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self._truth(node.operand, depth + 1)
            return lambda rows: pc.invert(inner(rows))
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            pairs = [
                self._compare(a, op, b, depth + 1) for a, op, b in zip(sides[:-1], node.ops, sides[1:], strict=True)
            ]
            return lambda rows: reduce(pc.and_, (pair(rows) for pair in pairs))
        term = self._term(node, depth)
        if term.kind != TRUTH:
            raise self._error(f"{self._words(node)} is {term.kind}, no condition; compare it with something")
        return lambda rows: pc.fill_null(term.of(rows), False)

    def _compare(self, a: ast.expr, op: ast.cmpop, b: ast.expr, depth: int) -> Callable[[pa.RecordBatch], Value]:
        if isinstance(op, ast.In | ast.NotIn):
            return _negate_if(isinstance(op, ast.NotIn), self._membership(a, b, depth))
        left, right = self._term(a, depth), self._term(b, depth)
        if isinstance(op, ast.Is | ast.IsNot | ast.Eq | ast.NotEq) and NOTHING in (left.kind, right.kind):
            other = left if right.kind == NOTHING else right
            return _negate_if(isinstance(op, ast.IsNot | ast.NotEq), lambda rows: pc.is_null(other.of(rows)))
        if isinstance(op, ast.Is | ast.IsNot):
            raise self._error(f"{self._words(b)}: `is` is only for None; compare with == or !=")
        self._same_kind(a, left, b, right)
        if isinstance(op, ast.Eq | ast.NotEq):
            return _negate_if(isinstance(op, ast.NotEq), lambda rows: _equal(left.of(rows), right.of(rows)))
        if left.kind not in (NUMBER, TEXT):
            raise self._error(f"{self._words(a)} is {left.kind}, which has no order; compare with == or !=")
        compared = _ORDERS[type(op)]
        return lambda rows: pc.fill_null(compared(*_alike(left.of(rows), right.of(rows))), False)

    def _membership(self, a: ast.expr, b: ast.expr, depth: int) -> Callable[[pa.RecordBatch], Value]:
        """`x in [1, 2]` and `'part' in text`."""
        wanted = self._term(a, depth)
        if not isinstance(b, ast.List | ast.Tuple):
            text = self._term(b, depth)
            if not (isinstance(a, ast.Constant) and wanted.kind == text.kind == TEXT):
                raise self._error(f"{self._words(b)}: after `in` comes a list, or a text column after a text")
            return lambda rows: pc.fill_null(pc.match_substring(text.of(rows), a.value), False)
        if not b.elts:
            raise self._error("`in []`: the list is empty")
        # each element is a constant, or a constant with a sign
        if odd := [e for e in b.elts if not isinstance(e.operand if isinstance(e, ast.UnaryOp) else e, ast.Constant)]:
            raise self._error(f"{self._words(odd[0])}: a list after `in` holds values only")
        terms = [self._term(element, depth) for element in b.elts]
        for element, term in zip(b.elts, terms, strict=True):
            if term.kind != NOTHING:
                self._same_kind(a, wanted, element, term)
        values = [term.of(None) for term in terms if term.kind != NOTHING]
        with_none = len(values) < len(terms)

        def is_member(rows: pa.RecordBatch) -> Value:
            value = wanted.of(rows)
            found = pc.is_null(value) if with_none else pa.scalar(False)
            if wanted.kind == TEXT:  # all values at once, since such lists may be long
                return pc.or_(found, pc.is_in(value, value_set=pa.array([v.as_py() for v in values], pa.string())))
            return reduce(pc.or_, (_equal(value, v) for v in values), found)

        return is_member

    def _same_kind(self, a: ast.expr, left: _Term, b: ast.expr, right: _Term) -> None:
        for node, term in ((a, left), (b, right)):
            if term.kind in (NOTHING, OTHER):
                raise self._error(f"{self._words(node)}: only `is None` and `is not None` can be asked of it")
        if left.kind != right.kind:
            raise self._error(
                f"{self._words(a)} is {left.kind} and {self._words(b)} is {right.kind}: they cannot be compared"
            )

    # ---- values

    def _term(self, node: ast.expr, depth: int) -> _Term:
        if depth > MAX_DEPTH:
            raise self._error(f"nested more than {MAX_DEPTH} deep")
        if isinstance(node, ast.Name):
            return self._column(node.id)
        if isinstance(node, ast.Constant):
            return self._constant(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            inner = self._number(node.operand, depth + 1)
            return _Term(
                NUMBER,
                inner if isinstance(node.op, ast.UAdd) else lambda rows: pc.negate_checked(inner(rows)),
            )
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div):
            left, right = self._number(node.left, depth + 1), self._number(node.right, depth + 1)
            if isinstance(node.op, ast.Div):
                return _Term(NUMBER, lambda rows: _divide(left(rows), right(rows)))
            joined = _SUMS[type(node.op)]
            return _Term(NUMBER, lambda rows: joined(*_alike(left(rows), right(rows))))
        if isinstance(node, ast.Compare | ast.BoolOp) or (
            isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
        ):
            return _Term(TRUTH, self._truth(node, depth))
        raise self._refusal(node)

    def _number(self, node: ast.expr, depth: int) -> Callable[[pa.RecordBatch], Value]:
        term = self._term(node, depth)
        if term.kind != NUMBER:
            raise self._error(f"{self._words(node)} is {term.kind}: it cannot be computed with")
        return term.of

    def _constant(self, node: ast.Constant) -> _Term:
        value = node.value
        if value is None:
            return _Term(NOTHING, lambda rows: pa.scalar(None))
        # bool first: True is an int too
        kind = TRUTH if isinstance(value, bool) else NUMBER if isinstance(value, int | float) else TEXT
        if not isinstance(value, bool | int | float | str):
            raise self._error(f"{self._words(node)} is neither number nor text")
        try:
            scalar = pa.scalar(value)
        except (OverflowError, pa.ArrowInvalid, UnicodeEncodeError) as e:
            raise self._error(f"{_short(value)} is not a value that a column can have") from e
        if kind == NUMBER and not np.isfinite(value):
            raise self._error("a number is too large")
        return _Term(kind, lambda rows: scalar)

    def _column(self, name: str) -> _Term:
        if name not in self._schema.names:
            if name == DURATION:
                frames, fps = self._column("frames"), self._column("fps")
                return _Term(NUMBER, lambda rows: _divide(frames.of(rows), fps.of(rows)))
            known = [*self._schema.names, DURATION]
            near = difflib.get_close_matches(name, known, n=3) or known
            raise self._error(f"the index has no column {name!r}; did you mean {', '.join(near)}?")
        self.columns.add(name)
        kind = _kind(self._schema.field(name).type)
        if kind == TEXT:  # a dictionary column becomes plain text
            return _Term(kind, lambda rows: rows[name].cast(pa.string()))
        if pa.types.is_integer(self._schema.field(name).type):  # so that products do not overflow
            return _Term(kind, lambda rows: rows[name].cast(pa.int64()))
        return _Term(kind, lambda rows: rows[name])


def _kind(of: pa.DataType) -> str:
    if pa.types.is_dictionary(of):
        of = of.value_type
    if pa.types.is_integer(of) or pa.types.is_floating(of):
        return NUMBER
    if pa.types.is_string(of) or pa.types.is_large_string(of):
        return TEXT
    return TRUTH if pa.types.is_boolean(of) else OTHER


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of many digits"
    return text if len(text) <= 50 else f"{text[:47]}..."


def _negate_if(negate: bool, truth: Callable[[pa.RecordBatch], Value]) -> Callable[[pa.RecordBatch], Value]:
    return (lambda rows: pc.invert(truth(rows))) if negate else truth


def _equal(a: Value, b: Value) -> Value:
    """Equality, where two missing values are equal, and a missing value equals no other."""
    return pc.or_(pc.fill_null(pc.equal(*_alike(a, b)), False), pc.and_(pc.is_null(a), pc.is_null(b)))


def _alike(a: Value, b: Value) -> tuple[Value, Value]:
    """Turn an integer beside a float into a float, rounded above 2**53, which Arrow by itself refuses."""
    if pa.types.is_floating(a.type) and pa.types.is_integer(b.type):
        return a, b.cast(pa.float64(), safe=False)
    if pa.types.is_integer(a.type) and pa.types.is_floating(b.type):
        return a.cast(pa.float64(), safe=False), b
    return a, b


def _divide(a: Value, b: Value) -> Value:
    """In floating point; missing where b is 0."""
    a, b = a.cast(pa.float64(), safe=False), b.cast(pa.float64(), safe=False)
    return pc.divide(a, pc.if_else(pc.equal(b, 0.0), pa.scalar(None, pa.float64()), b))
