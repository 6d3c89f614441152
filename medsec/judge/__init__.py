"""Test something of your own. Each test gives a `Report`: a verdict, a table, figures, and what was *not* tested.

`medsec.judge.classifier.audit` attacks a classifier, `medsec.judge.server.judge_server_rule` a server's rule, and
`medsec.judge.gradients.judge_gradient_defence` what a client sends; `medsec.judge.attack.judge_attack` tests an attack.
"""

import base64
import contextlib
import copy
import functools
import html
import inspect
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import optimize, stats
from threadpoolctl import threadpool_limits
from torch import Tensor

from medsec.core.errors import InputError
from medsec.evidence.intervals import wilson_interval
from medsec.federated.aggregators import flatten
from medsec.federated.rounds import State, Update, scale_update
from medsec.show import png

__all__ = ["Report"]

Rule = Callable[[Sequence[Update], int], tuple[State, dict]]
CALM = 5  # rounds before a rule meets odd input
CLAIMED = 10**6  # images that a boasting client says it has
COLUMNS = ("part", "measure", "value", "low", "high", "n", "unit", "note")
DPI = 130
LOOKS = (("#666666", ":", "D"), ("#E69F00", "--", "s"), ("#D55E00", "-", "o"))  # of the curves: colour, line, marker
# One page of A4: the table may be long, so that the type is small; figures stand side by side.
STYLE = """
@page { size: A4; margin: 11mm }
body { font: 9.5pt/1.3 system-ui, sans-serif; max-width: 188mm; margin: 4mm auto; color: #111 }
h1 { font-size: 15pt; margin: 0 0 2mm } h2 { font-size: 10.5pt; margin: 3mm 0 1mm }
p.verdict { border-left: 1.2mm solid #0072B2; padding: 1mm 3mm; margin: 1mm 0; font-size: 11pt; font-weight: 600 }
table { border-collapse: collapse; font-size: 8pt; line-height: 1.15; width: 100% }
th, td { text-align: left; padding: .3mm 1.5mm; border-bottom: .1mm solid #bbb; vertical-align: top }
td.number { text-align: right; white-space: nowrap }
ul { margin: 0; padding-left: 5mm; font-size: 8.5pt }
.figures { display: flex; gap: 4mm; align-items: flex-start } figure { flex: 1; margin: 0; min-width: 0 }
img { max-width: 100%; max-height: 62mm } td, li, p, h1 { overflow-wrap: anywhere }
figcaption { font-size: 8pt }
@media print { body { margin: 0; max-width: none } table { font-size: 7pt } ul { font-size: 7.5pt } }
"""


@dataclass(frozen=True, eq=False)
class Report:
    """The result of a test; ``print`` shows it as Markdown.

    Attributes:
        title: what was tested.
        verdict: one sentence, made from the numbers of the table.
        table: a row a number, columns ``part, measure, value, low, high, n, unit, note``: ``low`` and ``high`` are a 95 %
            interval (NaN: none), ``n`` counts what it was measured on.
        remarks: what helps to read the numbers.
        not_tested: what this report does *not* say.
        figures: (caption, PNG) each.
        examples: in full, a row an image or a run.

    >>> table = pd.DataFrame([row("clean", "accuracy", *share(3, 4))])
    >>> report = Report("<b> & co", "Three of four.", table, not_tested=("everything else",))
    >>> print(report.to_markdown().splitlines()[0], "&lt;b&gt; &amp; co" in report.to_html())
    # \\<b\\> & co True
    """

    title: str
    verdict: str
    table: pd.DataFrame
    remarks: Sequence[str] = ()
    not_tested: Sequence[str] = ()
    figures: Sequence[tuple[str, bytes]] = ()
    examples: pd.DataFrame | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.to_markdown()

    def to_markdown(self) -> str:
        """The report as Markdown, without the figures."""
        lines = [f"# {_plain(self.title)}", "", f"**{_plain(self.verdict)}**", ""]
        header, rows = self._cells()
        lines += [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
        lines += [f"| {' | '.join(_plain(cell) for cell in row)} |" for row in rows]
        for heading, sentences in self._lists():
            lines += ["", f"## {heading}", "", *(f"- {_plain(sentence)}" for sentence in sentences)]
        return "\n".join(lines) + "\n"

    def _repr_markdown_(self) -> str:
        """What a notebook shows: the report, and its figures."""
        drawn = (
            f"![{_plain(text)}](data:image/png;base64,{base64.b64encode(drawing).decode()})"
            for text, drawing in self.figures
        )
        return "\n\n".join([self.to_markdown(), *drawn])

    def to_csv(self) -> str:
        """The table as CSV, numbers in full."""
        return self.table.to_csv(index=False)

    def to_html(self) -> str:
        """One page that stands alone: nothing is loaded from elsewhere, and it prints on A4."""
        header, rows = self._cells()
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join(
            f"<tr>{''.join(_td(name, cell) for name, cell in zip(header, row, strict=True))}</tr>\n" for row in rows
        )
        pictures = "".join(
            f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{base64.b64encode(image).decode()}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>\n"
            for caption, image in self.figures
        )
        lists = "".join(
            f"<h2>{heading}</h2>\n<ul>{''.join(f'<li>{html.escape(sentence)}</li>' for sentence in sentences)}</ul>\n"
            for heading, sentences in self._lists()
        )
        return (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(self.title)}</title>\n'
            f"<style>{STYLE}</style></head>\n<body><h1>{html.escape(self.title)}</h1>\n"
            f'<p class="verdict">{html.escape(self.verdict)}</p>\n<div class="figures">{pictures}</div>\n'
            f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>\n{lists}</body></html>\n"
        )

    def _lists(self) -> list[tuple[str, Sequence[str]]]:
        named = [("Remarks", self.remarks), ("What this report does not say", self.not_tested)]
        return [(heading, sentences) for heading, sentences in named if sentences]

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table as they are read; a part is named once."""
        rows, part = [], None
        for at in self.table.to_dict("records"):
            interval = "" if math.isnan(at["low"]) else f"[{shown(at['low'])}, {shown(at['high'])}]"
            value = "" if math.isnan(at["value"]) else f"{shown(at['value'])} {at['unit']}".strip()
            first = "" if at["part"] == part else at["part"]
            rows.append([first, at["measure"], value, interval, str(at["n"] or ""), at["note"]])
            part = at["part"]
        return ["", "measure", "value", "95 % interval", "n", ""], rows


def _td(name: str, cell: str) -> str:
    kind = ' class="number"' if name in ("value", "95 % interval", "n") else ""
    return f"<td{kind}>{html.escape(cell)}</td>"


def _plain(text: str) -> str:
    """A text that Markdown shows as it is, in one line."""
    line = " ".join(str(text).split())
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>|#" else sign for sign in line)


def row(part: str, measure: str, value: float, low=math.nan, high=math.nan, n: int = 0, unit="", note="") -> dict:
    """One row of a report's table."""
    return dict(zip(COLUMNS, (part, measure, float(value), float(low), float(high), int(n), unit, note), strict=True))


def share(successes: int, n: int) -> tuple[float, float, float, int]:
    """A share with Wilson's interval, which knows how few there are, and n; NaN of nothing."""
    if not n:
        return math.nan, math.nan, math.nan, 0
    return successes / n, *wilson_interval(int(successes), int(n)), int(n)


def balanced(answers: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    """Balanced accuracy; its interval is made of each class's Wilson interval (Zou & Donner 2008, MOVER).

    >>> [round(v, 2) for v in balanced(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0]))]
    [0.83, 0.38, 0.97]
    """
    classes = np.unique(labels)
    hits = [share(int((answers[labels == k] == k).sum()), int((labels == k).sum()))[:3] for k in classes]
    value, low, high = np.array(hits).T
    down, up = (float(np.sqrt(((end - value) ** 2).sum()) / len(classes)) for end in (low, high))
    return float(value.mean()), float(value.mean()) - down, float(value.mean()) + up


def paired(only: int, other: int, n: int) -> tuple[float, float, float]:
    """A difference of two shares of the same n images, (only − other) / n, and its score interval (Tango 1998).

    Where both turn the same images it still has a width: few images prove little.

    >>> [round(v, 3) for v in paired(0, 0, 100)]
    [0.0, -0.037, 0.037]
    """
    found, z, gap = (only - other) / n, float(stats.norm.ppf(0.975)), only - other

    def excess(d: float, sign: int) -> float:
        b = (2 * n - gap) * d - only - other
        likely = (math.sqrt(max(b * b + 8 * n * other * d * (1 - d), 0.0)) - b) / (4 * n)
        return sign * (gap - n * d) - z * math.sqrt(max(n * (2 * likely + d * (1 - d)), 0.0))

    def limit(end: float, sign: int) -> float:
        start = found + 1e-9 * (end - found)  # (at the difference itself both may be 0)
        return float(optimize.brentq(excess, start, end, (sign,))) if excess(end, sign) > 0 else end

    return found, limit(-1.0, 1), limit(1.0, -1)


def median(values: np.ndarray) -> tuple[float, float, float]:
    """The median, and its interval from the order of the values (NaN where there are fewer than six)."""
    ranked, n = np.sort(values), len(values)
    k = int(stats.binom.ppf(0.025, n, 0.5)) - 1
    middle = float(np.quantile(ranked, 0.5, method="lower" if np.isinf(ranked).any() else "linear"))
    return (middle, float(ranked[k]), float(ranked[n - 1 - k])) if k >= 0 else (middle, math.nan, math.nan)


def shown(value: float) -> str:
    """A number as reports print it; 1 and 0 only where they are meant."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    if 0 < value < 0.005 or 0.995 < value < 1:
        return f"{value:.4f}"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def curves(series: Mapping[str, Sequence[tuple[float, float, float, float]]], x: str, y: str) -> bytes:
    """A drawing of shares with intervals, as PNG: name -> points (x, value, low, high)."""
    fig = Figure(figsize=(3.6, 2.6))
    axes = fig.subplots()
    for k, (name, points) in enumerate(series.items()):
        at, value, low, high = np.array(points).T
        beside = at * (1 + 0.03 * (k - len(series) // 2))
        colour, line, marker = LOOKS[k % len(LOOKS)]
        bars = value - low, high - value
        axes.errorbar(beside, value, bars, color=colour, ls=line, marker=marker, ms=4, capsize=2, label=name)
    axes.set(xlabel=x, ylabel=y, ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return picture(fig)


def gallery(pairs: Sequence[tuple[Tensor, Tensor]]) -> bytes:
    """Images (C, H, W) in [0, 1], what became of each, and the difference, stretched, as PNG."""
    fig = Figure(figsize=(3.6, 0.9 * len(pairs)))
    for line, (x, changed) in zip(fig.subplots(len(pairs), 3, squeeze=False), pairs, strict=True):
        change = changed - x
        stretched = 0.5 + 0.5 * change / change.abs().max().clamp_min(1e-12)
        for axes, image in zip(line, (x, changed, stretched), strict=True):
            image = image[0] if len(image) == 1 else image.movedim(0, -1)
            axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.axis("off")
    fig.subplots_adjust(0, 0, 1, 1, 0.03, 0.03)
    return picture(fig)


def picture(fig: Figure) -> bytes:
    """A figure as PNG in few bytes."""
    drawn = io.BytesIO()
    fig.savefig(drawn, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    return png.compact(drawn.getvalue())


def dots(rows: Mapping[str, Mapping[str, tuple[float, float, float]]], x: str) -> bytes:
    """Shares with intervals side by side, as PNG: row -> name -> (value, low, high)."""
    fig = Figure(figsize=(6.4, 0.7 + 0.2 * len(rows)), layout="constrained")
    axes = fig.subplots()
    names = list(next(iter(rows.values())))
    for k, name in enumerate(names):
        value, low, high = np.array([each[name] for each in rows.values()]).T
        colour, _, marker = LOOKS[k % len(LOOKS)]
        at = np.arange(len(rows)) + 0.22 * (k - (len(names) - 1) / 2)
        axes.errorbar(
            value, at, xerr=(value - low, high - value), fmt=marker, color=colour, ms=4, capsize=2, label=name
        )
    axes.set(
        yticks=range(len(rows)), yticklabels=list(rows), xlim=(-0.03, 1.03), ylim=(-0.5, len(rows) - 0.5), xlabel=x
    )
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    return picture(fig)


# The rule, which may do anything ---------------------------------------------------------------------------------------


def fresh(given: Callable, argument: object) -> Callable:
    """What was given, for one run: of a class a new object, made with ``argument`` if it needs one; of an object a copy."""
    made = given.func if isinstance(given, functools.partial) else given
    try:
        if not inspect.isclass(made):
            return copy.deepcopy(given)
        needs = [
            p
            for p in inspect.signature(given).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        return given(copy.deepcopy(argument)) if needs else given()
    except Exception as error:  # whatever their code raises
        raise InputError(f"what you gave cannot be made anew for a run ({said(error)}); mend it") from error


def called(rule: Rule, updates: Sequence[Update], round: int) -> tuple[State, dict, float]:
    """What a rule returns, if a server can use it, and its seconds; it gets copies, so that it can change nothing."""
    like = updates[0].state
    sent = [replace(u, state={k: v.clone() for k, v in u.state.items()}, metrics=dict(u.metrics)) for u in updates]
    begin = time.perf_counter()
    try:
        returned = rule(sent, round)
    except Exception as error:  # whatever their code raises
        raise InputError(
            f"the rule raised {said(error)}, in round {round} with {len(sent)} updates; mend it"
        ) from error
    seconds = time.perf_counter() - begin
    if not isinstance(returned, tuple) or len(returned) != 2:
        kind = f"a {type(returned).__name__}" if not isinstance(returned, tuple) else f"{len(returned)} things"
        raise InputError(f"the rule returned {kind}; need (state, diagnostics), the latter {{}} if there are none")
    state, diagnostics = returned[0], returned[1] or {}
    if not isinstance(state, dict) or not isinstance(diagnostics, dict):
        raise InputError("the rule must return two dictionaries: state, name -> tensor, and diagnostics")
    if odd := sorted(map(str, state.keys() ^ like.keys())):
        raise InputError(
            f"the rule's state has other names than the updates': {', '.join(odd[:3])}; return all, and no more"
        )
    for key, value in state.items():
        want = like[key]
        if not isinstance(value, Tensor) or value.shape != want.shape or value.dtype != want.dtype:
            got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"the rule's {key} is {got}, expected {tuple(want.shape)} {want.dtype}")
        if not torch.isfinite(value).all():
            raise InputError(
                f"the rule's {key} holds NaN or infinite values, in round {round} with {len(sent)} updates"
            )
    weights = diagnostics.get("weights")
    if weights is not None and not (isinstance(weights, dict) and all(math.isfinite(w) for w in weights.values())):
        raise InputError("the rule's diagnostics['weights'] must be client -> share, finite numbers; or leave it out")
    return {key: value.detach().clone() for key, value in state.items()}, diagnostics, seconds


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def odd_input(rule: Rule | type, state: State) -> list[dict]:
    """Rows on what a rule does with few updates, missing losses and boasting; first of all, whether it works."""
    rng = torch.Generator().manual_seed(0)

    def moved(v: Tensor) -> Tensor:
        return v + 0.01 * torch.rand(v.shape, generator=rng) if v.is_floating_point() else v.clone()

    losses = {"loss_g": 1.0, "loss_d": 1.0, "last_loss_g": 1.0}
    sent = [Update(i, {k: moved(v) for k, v in state.items()}, 100, losses) for i in range(4)]

    def late(updates: Sequence[Update]) -> State:
        """The aggregate of these, after rounds in which all was well: many a rule acts only then."""
        made = fresh(rule, state)
        for round in range(CALM):
            called(made, sent, round)
        return called(made, updates, CALM)[0]

    usual = late(sent)  # an error here is the caller's to mend
    boasting = [replace(u, n_samples=CLAIMED if u.client == 0 else 100) for u in sent]
    cases = {
        "one client of four is away": sent[1:],
        "two are away": sent[2:],
        "only one is left": sent[:1],
        "nobody reports a loss": [replace(u, metrics={}) for u in sent],
        "a client sends a huge update": [
            replace(sent[0], state=scale_update(sent[0].state, state, 1e4)),
            *sent[1:],
        ],
    }
    rows = []
    for case, updates in cases.items():
        try:
            late(updates)
            rows.append(row("odd input", case, math.nan, note="goes on"))
        except InputError as error:
            rows.append(row("odd input", case, math.nan, note=f"FAILS: {error}"))
    try:
        gained = flatten(late(boasting)) - flatten(usual)
        way = flatten(sent[0].state) - flatten(usual)
        value = float(gained @ way / max(float(way @ way), 1e-12))
        note = "0: nothing; 1: the aggregate becomes its update"
        rows.append(row("odd input", "a client claims a million images: what it gains", value, note=note))
    except InputError as error:
        rows.append(row("odd input", "a client claims a million images", math.nan, note=f"FAILS: {error}"))
    return rows


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Networks this small are no faster on more threads, on a busy machine much slower, and give other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)
