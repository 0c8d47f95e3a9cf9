"""Cascaded multi-token prediction modules: each is a decoder layer that reads a hidden state and the token after it (VITA-Audio)."""

from __future__ import annotations

import copy
import json
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accelpass.decoding.interfaces import DecodingError

_FORMAT = "accelpass mtp heads 1"


class _Level(nn.Module):
    """``layer(proj([norm(embedding), norm(hidden)]))``; the layer and its norms begin as the model's last ones."""

    def __init__(self, layer: nn.Module, norm: nn.Module, number: int, width: int) -> None:
        super().__init__()
        self.norm_token, self.norm_hidden, self.norm = (copy.deepcopy(norm) for _ in range(3))
        self.proj = nn.Linear(2 * width, width, bias=False)
        self.layer = copy.deepcopy(layer)
        module: Any
        for module in self.layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
        with torch.no_grad():  # both halves, in equal parts
            self.proj.weight.copy_(torch.eye(width).repeat(1, 2) / 2**0.5)


class MTPHeads(nn.Module):
    """Modules 0 to ``depth - 1`` of a causal model of transformers; they share its embedding and its output head.

    Module i reads, at row n, the hidden state that module i - 1 made there (module 0: the model's last one) and token n + i + 1, and
    predicts token n + i + 2. Each has keys and values of its own. As in VITA-Audio (arXiv 2505.03739, its released code) and DeepSeek-V3; that
    a module's state passes through a norm before the output head, as the model's does, and how the weights begin, is inferred.

    Args:
        model: decoder layers with rotary positions; not owned, and not among the parameters.
        depth: how many modules; VITA-Audio has 10.

    Raises:
        DecodingError: the model is built in another way.
    """

    def __init__(self, model: Any, depth: int = 3) -> None:
        super().__init__()
        base: Any = getattr(model, "model", None)
        missing = [name for name in ("layers", "norm", "rotary_emb") if not hasattr(base, name)]
        if missing:
            raise DecodingError(
                f"{type(model).__name__} has no model.{missing[0]}: these modules are made for decoders like Llama, Qwen and Mixtral, "
                "with layers, a last norm and rotary positions"
            )
        if depth < 1:
            raise DecodingError(f"depth={depth}: at least one module; VITA-Audio has 10")
        object.__setattr__(self, "_model", weakref.ref(model))
        self.depth, self.width = depth, int(model.config.hidden_size)
        self.levels = nn.ModuleList(_Level(base.layers[-1], base.norm, i, self.width) for i in range(depth))
        self.to(model.device, model.dtype)

    @property
    def trunk(self) -> Any:
        model = self._model()  # type: ignore[operator]
        if model is None:
            raise DecodingError(
                "the model that these modules were made for is gone; make them anew, or load them for another"
            )
        return model

    def check(self, model: Any) -> None:
        """
        Raises:
            DecodingError: the modules are of another model, or in training mode.
        """
        trunk = self.trunk
        if model is not trunk:
            raise DecodingError(
                f"these modules read the hidden states of another {type(trunk).__name__} (width {self.width}); "
                "load them for this one: MTPHeads.load(folder, model)"
            )
        if self.training:
            raise DecodingError("the modules are in training mode; call heads.eval()")

    def rows(
        self, number: int, tokens: Tensor, hidden: Tensor, start: int = 0, cache: Any = None, mask: Tensor | None = None
    ) -> Tensor:
        """What module ``number`` makes of some rows: hidden states ``(batch, rows, width)``.

        Args:
            tokens: token n + number + 1 of each row n, ``(batch, rows)``.
            hidden: states of module ``number - 1``, or the model's, ``(batch, rows, width)``.
            start: the number of the first row; ``cache`` holds the rows before it.
            mask: 0 for rows that are padding, ``(batch, at least start + rows)``.
        """
        level: Any = self.levels[number]
        trunk = self.trunk
        given = torch.cat([level.norm_token(trunk.get_input_embeddings()(tokens)), level.norm_hidden(hidden)], -1)
        states = level.proj(given)
        count, total = tokens.shape[1], start + tokens.shape[1]
        at = torch.arange(start, total, device=tokens.device)
        seen = (torch.arange(total, device=tokens.device) <= at[:, None])[None, None]
        if mask is not None:
            # A row of padding sees itself, so that its softmax is a number; nothing reads it.
            itself = torch.arange(total, device=tokens.device) == at[:, None]
            seen = seen & mask[:, None, None, :total].bool() | itself
        bias = torch.zeros(seen.shape, dtype=states.dtype, device=states.device)
        bias = bias.masked_fill(~seen, torch.finfo(states.dtype).min).expand(len(tokens), 1, count, total)
        positions = (at + number + 1)[None]
        made: Any = level.layer(
            states, attention_mask=bias, position_ids=positions, past_key_values=cache, use_cache=cache is not None,
            position_embeddings=trunk.model.rotary_emb(states, position_ids=positions),
        )  # fmt: skip
        states = made[0] if isinstance(made, tuple) else made
        assert isinstance(states, Tensor)
        return states

    def logits(self, number: int, states: Tensor) -> Tensor:
        """The output head's, float32 ``(batch, rows, vocabulary)``."""
        level: Any = self.levels[number]
        logits: Tensor = self.trunk.get_output_embeddings()(level.norm(states))
        return logits.float()

    def save(self, folder: str | Path) -> None:
        """Write ``mtp_heads.json`` and ``mtp_heads.safetensors``."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        vocabulary = self.trunk.get_input_embeddings().weight.shape[0]
        said = {"format": _FORMAT, "depth": self.depth, "width": self.width, "vocabulary": vocabulary}
        (folder / "mtp_heads.json").write_text(json.dumps(said, indent=2) + "\n")
        save_file(
            {name: t.cpu().contiguous() for name, t in self.state_dict().items()}, folder / "mtp_heads.safetensors"
        )

    @staticmethod
    def load(folder: str | Path, model: Any) -> MTPHeads:
        """What :meth:`save` wrote, for ``model``, in eval mode.

        Raises:
            DecodingError: the folder holds none, of another format, or of another model.
        """
        from safetensors.torch import load_file

        try:
            said = json.loads((Path(folder) / "mtp_heads.json").read_text())
            weights = load_file(Path(folder) / "mtp_heads.safetensors")
        except (OSError, ValueError) as cause:
            raise DecodingError(f"{folder} holds no saved modules ({cause}); MTPHeads.save writes them") from cause
        if said.get("format") != _FORMAT:
            raise DecodingError(f"{folder} is of format {said.get('format')!r}; this version reads {_FORMAT!r}")
        found = int(model.config.hidden_size), model.get_input_embeddings().weight.shape[0]
        if found != (said["width"], said["vocabulary"]):
            raise DecodingError(
                f"{folder} is of a model of width {said['width']} with {said['vocabulary']} tokens, and this one has {found[0]} and {found[1]}"
            )
        heads = MTPHeads(model, said["depth"])
        heads.load_state_dict(weights)
        return heads.eval()
