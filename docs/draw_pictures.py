"""Draws the pictures of docs/compiler.md as SVG files that follow the reader's light or dark scheme and need no font.

python -m docs.draw_pictures
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

IMAGES = Path(__file__).parent / "images"
STYLE = """
  .page { fill: #ffffff; stroke: #dfe3ea; }
  .box { fill: #f3f5fa; stroke: #c5cddb; }
  .main { fill: #e4ecff; stroke: #7b9df0; }
  .ours { fill: #e3f5ea; stroke: #6fbf8b; }
  .warm { fill: #fdf0dc; stroke: #dda75a; }
  .title { fill: #1a1f2b; font-weight: 600; font-size: 14px; }
  .text { fill: #4c5667; font-size: 12px; }
  .code { fill: #4c5667; font-size: 11.5px; font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
  .head { fill: #1a1f2b; font-weight: 600; font-size: 16px; }
  .line { stroke: #78849a; fill: none; stroke-width: 1.6; }
  .tip { fill: #78849a; }
  text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #161b24; stroke: #2a3140; }
    .box { fill: #1f2632; stroke: #3b465a; }
    .main { fill: #1d2c52; stroke: #5578cf; }
    .ours { fill: #17352a; stroke: #3f8f62; }
    .warm { fill: #3a2c16; stroke: #a87a35; }
    .title, .head { fill: #e6e9ef; }
    .text, .code { fill: #aab3c3; }
    .line { stroke: #8591a6; }
    .tip { fill: #8591a6; }
  }
"""


@dataclass
class Picture:
    """Boxes with text, and arrows between them; sizes in pixels."""

    name: str
    about: str
    width: int
    height: int
    parts: list[str] = field(default_factory=list)

    def box(self, x: int, y: int, w: int, h: int, title: str, lines: Sequence[str] = (), kind: str = "box") -> None:
        """A line that starts with a backquote is code."""
        self.parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{w}" height="{h}" rx="9"/>')
        block = 18 + 17 * len(lines)
        top = y + (h - block) / 2 + 14
        self.text(x + w // 2, top, title, "title", "middle")
        for number, line in enumerate(lines, 1):
            self.text(
                x + w // 2, top + 17 * number + 1, line.lstrip("`"), "code" if line[:1] == "`" else "text", "middle"
            )

    def text(self, x: float, y: float, what: str, kind: str = "text", anchor: str = "start") -> None:
        self.parts.append(f'<text class="{kind}" x="{x}" y="{y:.0f}" text-anchor="{anchor}">{escape(what)}</text>')

    def arrow(self, *points: tuple[int, int], both: bool = False) -> None:
        path = " ".join(f"{'M' if n == 0 else 'L'}{x},{y}" for n, (x, y) in enumerate(points))
        start = ' marker-start="url(#tip)"' if both else ""
        self.parts.append(f'<path class="line" d="{path}" marker-end="url(#tip)"{start}/>')

    def write(self) -> None:
        marker = (
            '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path class="tip" d="M0,0 L10,5 L0,10 z"/></marker></defs>'
        )
        frame = f'<rect class="page" x="1" y="1" width="{self.width - 2}" height="{self.height - 2}" rx="14"/>'
        body = "\n".join(self.parts)
        (IMAGES / f"{self.name}.svg").write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(self.about)}">\n<style>{STYLE}</style>\n{marker}\n{frame}\n{body}\n</svg>\n'
        )


def journey() -> Picture:
    p = Picture("compiler-journey", "A model's way: capture, analyses, passes, verify, lower", 1080, 430)
    p.text(28, 38, "From a model to code", "head")
    p.box(28, 70, 172, 74, "torch.compile", ["Dynamo's graph", '`backend="accelpass"'])
    p.box(28, 190, 172, 74, "torch.export", ["an exported program", "for ONNX"])
    p.box(
        244,
        118,
        150,
        98,
        "capture",
        ["a copy of the graph as", "pre-dispatch ATen, with", "paths of its weights"],
        "main",
    )
    p.arrow((200, 107), (222, 107), (222, 152), (242, 152))
    p.arrow((200, 227), (222, 227), (222, 182), (242, 182))
    p.box(438, 70, 188, 74, "semantic operators", ["an attention is one node", "with a spec"], "main")
    p.arrow((394, 152), (416, 152), (416, 107), (436, 107))
    p.box(438, 190, 188, 74, "analyses", ["records over nodes, cached", "until the graph changes"], "main")
    p.arrow((532, 144), (532, 188), both=True)
    p.box(676, 118, 164, 98, "passes", ["by phase; each site is", "taken, or skipped with", "a reason"], "ours")
    p.arrow((626, 107), (650, 107), (650, 150), (674, 150))
    p.arrow((674, 184), (650, 184), (650, 227), (628, 227), both=True)
    p.box(676, 268, 164, 74, "verify", ["after each pass: shapes,", "outputs, writes stay"], "warm")
    p.arrow((758, 216), (758, 266), both=True)
    p.box(676, 24, 164, 58, "plan", ["settings and tensors"], "warm")
    p.arrow((758, 82), (758, 116))
    p.box(884, 56, 168, 62, "Inductor", ["CPU code, Triton kernels"])
    p.box(884, 136, 168, 62, "eager reference", ["the meaning; debug mode"])
    p.box(884, 216, 168, 62, "ONNX", ["the same rewrites"])
    for y in (87, 167, 247):
        p.arrow((840, 167), (860, 167), (860, y), (882, y))
    p.text(884, 302, "lowering: an operator becomes")
    p.text(884, 319, "a kernel, or ATen that")
    p.text(884, 336, "Inductor vectorises")
    p.box(
        244,
        300,
        382,
        98,
        "accelpass.explain",
        [
            "what was taken, what was not and why, per pass and site;",
            "FLOPs, bytes of weights and state, before and after",
        ],
        "ours",
    )
    p.arrow((676, 322), (650, 322), (650, 349), (628, 349))
    return p


def site() -> Picture:
    p = Picture("compiler-site", "What a pass does at each site", 1080, 250)
    p.text(28, 38, "A pass at one site", "head")
    p.box(28, 88, 170, 92, "analysis", ["`Linear(path, weight, x)", "a record, not a pattern", "of operators"], "main")
    p.box(248, 88, 170, 92, "wanted?", ["`include, exclude", "`skip_sites"], "box")
    p.box(
        468, 88, 170, 92, "check", ["what the method needs:", "group size, dtype, mask,", "other passes' edits"], "warm"
    )
    p.box(688, 56, 170, 74, "rewrite", ["new nodes with values", "`call(graph, like, op)"], "ours")
    p.box(688, 150, 170, 62, "skip", ["with a sentence that a", "user can act on"], "warm")
    for x in (198, 418):
        p.arrow((x, 134), (x + 48, 134))
    p.arrow((638, 122), (662, 122), (662, 93), (686, 93))
    p.arrow((638, 146), (662, 146), (662, 181), (686, 181))
    p.arrow((333, 180), (333, 226), (662, 226), (662, 196), (686, 196))
    p.box(908, 88, 144, 92, "Record", ["`took[site]", "`skipped[site]", "shown by explain"], "main")
    p.arrow((858, 93), (882, 93), (882, 122), (906, 122))
    p.arrow((858, 181), (882, 181), (882, 146), (906, 146))
    return p


def attention() -> Picture:
    p = Picture("compiler-attention", "Passes edit the spec of one attention node", 1080, 330)
    p.text(28, 38, "One attention, three passes", "head")
    for y, line in zip(
        (74, 126, 178, 230),
        ("repeat_kv, sdpa", "matmul, softmax", "fused qkv, enable_gqa", "ALiBi, sinks, soft cap"),
        strict=True,
    ):
        p.box(28, y, 190, 40, line)
        p.arrow((218, y + 20), (248, y + 20), (248, 172), (280, 172))
    p.text(28, 296, "however a model writes it")
    p.box(284, 62, 380, 220, "", (), "main")
    p.text(474, 90, "accelpass::attention(q, k, v, extras, spec)", "title", "middle")
    rows = (
        ("the model's own", "scale, causality, bias, softmax", "box"),
        ("store", "slots under a budget: what is kept", "ours"),
        ("format", "4 bits, a scale per group: how it is written", "ours"),
        ("select", "blocks of keys: what is read", "ours"),
    )
    for n, (name, what, kind) in enumerate(rows):
        y = 104 + 42 * n
        p.box(300, y, 348, 36, "", (), kind)
        p.text(312, y + 22, name, "title")
        p.text(636, y + 22, what, "text", "end")
    for n, name in enumerate(("kv_window", "kv_quant", "pbs_attn")):
        y = 146 + 42 * n
        p.box(720, y, 110, 36, name, (), "ours")
        p.arrow((720, y + 18), (666, y + 18))
    p.box(
        884,
        106,
        168,
        150,
        "lowering",
        ["a fused kernel for the", "combination, or parts:", "dequantize, gather,", "attend, merge"],
        "main",
    )
    p.arrow((664, 90), (968, 90), (968, 104))
    p.text(1052, 300, "A second store for one attention is refused, naming both passes.", "text", "end")
    return p


def state() -> Picture:
    p = Picture("compiler-state", "Derived tensors and state are found at each call", 1080, 300)
    p.text(28, 38, "Whose weights? Whose state?", "head")
    p.box(28, 72, 180, 70, "model A", ["`layers.0.q_proj.weight"], "box")
    p.box(28, 176, 180, 70, "model B", ["same class, other weights"], "box")
    p.box(
        300,
        96,
        250,
        126,
        "one compiled graph",
        ["Dynamo shares it among all", "instances of the class; nothing", "that comes of a weight is", "baked into it"],
        "main",
    )
    p.arrow((208, 107), (254, 107), (254, 140), (298, 140))
    p.arrow((208, 211), (254, 211), (254, 178), (298, 178))
    p.box(640, 60, 190, 76, "derived", ["`int8(A), scale(A)", "by the weight's identity"], "ours")
    p.box(640, 150, 190, 76, "derived", ["`int8(B), scale(B)", "made at B's first call"], "ours")
    p.arrow((640, 98), (596, 98), (596, 144), (552, 144))
    p.arrow((640, 188), (596, 188), (596, 174), (552, 174))
    p.box(
        884,
        60,
        168,
        166,
        "state",
        [
            "kept rows, scores,",
            "outputs of earlier steps;",
            "lives with a cache layer,",
            "a sampling run or",
            "a parameter",
            "`accelpass.state(fast)",
        ],
        "warm",
    )
    p.arrow((968, 226), (968, 250), (425, 250), (425, 224))
    p.text(640, 268, "inputs that the graph writes to")
    return p


def main() -> None:
    for picture in (journey(), site(), attention(), state()):
        picture.write()
        print(IMAGES / f"{picture.name}.svg")


if __name__ == "__main__":
    main()
