"""The code blocks of a Markdown page, with what the comment in front of one says about running it.

A comment ``<!-- test: KEY: VALUE -->`` right before a block is for the tests and not shown to readers:

    not run: REASON      the block is not run
    with: SETUP          run a setup of :data:`SETUPS` first, for what a reader has already (a model, inputs)
    file: PATH           the block is the content of a file, which is written where the page's other blocks run
    needs: MODULE        the block is left out where the module does not exist
"""

from __future__ import annotations

import importlib.util
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
KEYS = ("not run", "with", "file", "needs")
_BLOCK = re.compile(
    r"(?P<comments>(?:^[ ]*<!--.*?-->\s*\n)*)^(?P<indent>[ ]*)```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.M | re.S,
)
_COMMENT = re.compile(r"<!--\s*test:\s*([\w ]+?)\s*:\s*(.*?)\s*-->")


@dataclass(frozen=True)
class Block:
    """One fenced block. ``line`` is that of its fence, ``said`` what comments before it say, by key."""

    page: str
    line: int
    language: str
    code: str
    said: dict[str, str]

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether it is to be run, and can be here."""
        return "not run" not in self.said and exists(self.said.get("needs", __name__))


def exists(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def pages() -> list[Path]:
    """The README, what it points to beside, and all pages of docs/ that people write."""
    written = [p for p in sorted((ROOT / "docs").rglob("*.md")) if p.parent.name != "passes"]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(p for p in written if p.name != "command-line.md")]


def blocks(page: Path) -> list[Block]:
    """All fenced blocks in order."""
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("indent")) + 1
        said = dict(_COMMENT.findall(match["comments"]))
        code = textwrap.dedent(match["code"])
        found.append(Block(str(page.relative_to(ROOT)), line, match["language"], code, said))
    return found


def script(page: Path) -> str:
    """The page's Python as one program; a reader goes on where the block before ended. Files are written first."""
    parts = ["import sys", "sys.path.insert(0, '.')"]
    for block in blocks(page):
        if "file" in block.said:
            parts.append(
                f"from pathlib import Path as _P; _P({block.said['file']!r}).parent.mkdir(parents=True, exist_ok=True)"
            )
            parts.append(f"_P({block.said['file']!r}).write_text({block.code!r})")
        elif block.language == "python" and block.runs:
            if "with" in block.said:
                parts.append(SETUPS[block.said["with"]])
            # Errors then name the page's line.
            parts.append(f"exec(compile({chr(10) * block.line + block.code!r}, {block.page!r}, 'exec'))")
    return "\n".join(parts)


_LLAMA = """
import torch, accelpass
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
torch._dynamo.reset()
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128,
    max_position_embeddings=8192, eos_token_id=None)).eval()
_words = Tokenizer(models.WordLevel({"<unk>": 0, **{chr(c): c for c in range(32, 127)}}, unk_token="<unk>"))
_words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=_words, unk_token="<unk>")
inputs = {"input_ids": torch.randint(33, 127, (1, 1100)), "max_new_tokens": 4, "do_sample": False}
inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
batches = [torch.randint(33, 127, (1, 64)) for _ in range(3)]
"""
SETUPS = {
    "a causal model, its inputs, and batches of ids": _LLAMA,
    "a causal model and long batches": _LLAMA
    + "batches = [torch.randint(33, 127, (1, n)) for n in (1024, 2048)] * 2\n",
}
"""What a reader of a page has before the first line: kept out of the page, which is about the lines after."""
