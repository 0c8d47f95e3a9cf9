"""Trains the model of canvases: ``python -m accelpass.models_zoo.canvases.train``; about half an hour on one core.

The tower learns first which digit a cell shows and which digits a canvas holds, by its class token; then it is frozen, and projector and
language model learn to answer. All questions about a canvas share one text and do not see each other. In the second half of the steps a
random share of each tile's patches is shown: a model that has read images of one size alone counts on where in the text a patch is. The
weights beside this were made in two runs: 1,000 steps of the tower and 1,500 with all patches, then 800 with a share of them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from accelpass.models_zoo.canvases import questions
from accelpass.models_zoo.canvases.model import FILE, TOWER, llava

_BATCH = 32


@contextmanager
def _steps(title: str, steps: int, optimizer: torch.optim.Optimizer, rate: float) -> Iterator[Any]:
    """Numbers of steps, with a cosine learning rate and a bar; what is sent is shown."""
    with Progress() as progress:
        bar = progress.add_task(title, total=steps)

        def count() -> Iterator[Any]:
            for step in range(steps):
                share = step / steps
                for group in optimizer.param_groups:
                    group["lr"] = (
                        rate * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)
                    )
                yield step, lambda text: progress.update(bar, description=f"{title}: {text}")
                progress.advance(bar)

        yield count()


def train_tower(model: Any, steps: int, generator: torch.Generator) -> float:
    """Returns which share of cells it tells, of specimens that it did not see."""
    tower, heads = model.model.vision_tower, nn.Linear(TOWER["hidden_size"], 20)
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], 1e-3, weight_decay=0.05)
    with _steps("tower", steps, optimizer, 1.5e-3) as counted:
        for step, show in counted:
            tile, labels, held = _shown(questions.canvases(_BATCH, False, generator))
            said = heads(tower(tile + 0.1 * torch.randn_like(tile)).pooler_output).view(_BATCH, questions.TILES, 20)
            loss = F.cross_entropy(said[:, 1:, :10].flatten(0, 1), labels.flatten(), label_smoothing=0.05)
            loss = loss + F.binary_cross_entropy_with_logits(said[:, 0, 10:], held)
            _step(optimizer, loss)
            if step % 20 == 0:
                show(f"loss {loss.item():.3f}")
    tower.eval()
    with torch.no_grad():
        tile, labels, _ = _shown(questions.canvases(256, True, generator))
        said = heads(tower(tile).pooler_output).view(256, questions.TILES, 20)[:, 1:, :10].argmax(-1)
    return (said == labels).float().mean().item()


def _shown(asked: questions.Asked) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles, the digit of each cell, and which digits each canvas holds."""
    labels = torch.tensor(
        [[questions.ids_of(a)[0] - questions.ids_of("zero")[0] for a in row[:4]] for row in asked.answers]
    )
    return questions.tiles(asked.canvases), labels, F.one_hot(labels, 10).amax(1).float()


@dataclass(frozen=True)
class Task:
    """What a model learns to answer.

    Attributes:
        draw: so many canvases (or videos) of specimens that are held out or not, and questions.
        pixels: what the tower reads of them, all images in one batch.
        prompt: the text before the answer, of a question and how many patches of an image are shown.
        ids_of: the words of a text as numbers.
        kinds: which of the questions of a canvas are of one kind, by its name.
    """

    draw: Callable[[int, bool, torch.Generator], questions.Asked]
    pixels: Callable[[Tensor], Tensor]
    prompt: Callable[[str, int], list[int]]
    ids_of: Callable[[str], list[int]]
    kinds: Mapping[str, slice]


CANVASES = Task(
    questions.canvases,
    questions.tiles,
    questions.prompt,
    questions.ids_of,
    {"where": slice(4), "how many": slice(4, None)},
)


def texts(
    asked: questions.Asked, patches: int = questions.PATCHES, task: Task = CANVASES
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One text for each canvas with all of its questions: ids, positions, what sees what (additive), and labels."""
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    blocks: list[list[int]] = []
    places: list[list[int]] = []
    shared = len(task.prompt("", patches))
    for asking, answers in zip(asked.questions, asked.answers, strict=True):
        row = task.prompt("", patches)
        label, block, place = [-100] * shared, [0] * shared, list(range(shared))
        for number, (question, answer) in enumerate(zip(asking, answers, strict=True)):
            more = [*task.ids_of(question), *task.ids_of(answer), questions.END]
            row += more
            label += [-100] * (len(more) - 2) + more[-2:]
            block += [number + 1] * len(more)
            place += range(shared, shared + len(more))
        ids.append(row)
        labels.append(label)
        blocks.append(block)
        places.append(place)
    of = torch.tensor(blocks)
    same = (of[:, :, None] == of[:, None]) | (of[:, None] == 0)
    seen = same & torch.ones_like(same[0]).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min).unsqueeze(1)
    return torch.tensor(ids), torch.tensor(places), mask, torch.tensor(labels)


def train_text(
    model: Any, steps: int, generator: torch.Generator, out: Path, task: Task = CANVASES, rate: float = 2e-3
) -> None:
    """Let projector and language model learn; saves and prints what is answered every 200 steps."""
    tower = model.model.vision_tower.requires_grad_(False).eval()
    learns = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learns, 1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    model.train()
    tower.eval()
    with _steps("text", steps, optimizer, rate) as counted:
        for step, show in counted:
            asked = task.draw(_BATCH, False, generator)
            shown = 9 + int(torch.randint(28, (), generator=generator)) if 2 * step >= steps else questions.PATCHES
            ids, places, mask, labels = texts(asked, shown, task)
            with torch.no_grad():
                seen = tower(task.pixels(asked.canvases), output_hidden_states=True).hidden_states[-2][:, 1:]
                some = torch.rand(seen.shape[:2], generator=generator).topk(shown).indices.sort().values
            features = model.model.multi_modal_projector(
                seen.gather(1, some.unsqueeze(-1).expand(-1, -1, seen.shape[-1]))
            )
            words = model.get_input_embeddings()(ids)
            embeds = words.masked_scatter((ids == questions.IMAGE).unsqueeze(-1), features)
            made = model(inputs_embeds=embeds, position_ids=places, attention_mask=mask, use_cache=False)
            loss = F.cross_entropy(made.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            _step(optimizer, loss, learns)
            if step % 20 == 0:
                show(f"loss {loss.item():.3f}")
            if step % 200 == 199:
                save(model, out)
                print(f"step {step + 1}: {accuracy(model, 64, generator, task)}", flush=True)
                model.train()
                tower.eval()


@torch.no_grad()
def accuracy(model: Any, count: int, generator: torch.Generator, task: Task = CANVASES) -> dict[str, float]:
    """Of questions on canvases of specimens that were held out: right answers, by kind."""
    model.eval()
    asked = task.draw(count, True, generator)
    ids, places, mask, labels = texts(asked, task=task)
    given = {"position_ids": places, "attention_mask": mask, "pixel_values": task.pixels(asked.canvases)}
    said = model(input_ids=ids, **given, use_cache=False).logits[:, :-1].argmax(-1)
    wanted = labels[:, 1:]
    is_answer = (wanted > questions.END).view(count, -1)
    right = (said == wanted)[is_answer].view(count, -1).float()
    return {kind: right[:, some].mean().item() for kind, some in task.kinds.items()} | {"all": right.mean().item()}


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, parameters: list[Tensor] | None = None) -> None:
    optimizer.zero_grad()
    loss.backward()
    if parameters:
        nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def save(model: Any, out: Path) -> None:
    """Write the weights in half precision."""
    save_file({name: t.detach().half().contiguous() for name, t in model.state_dict().items()}, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tower", type=int, default=1000, help="steps of the tower; 0 goes on with the model that is there"
    )
    parser.add_argument("--text", type=int, default=1500, help="steps of projector and language model")
    parser.add_argument("--out", type=Path, default=FILE)
    given = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = llava(trained=False).train()
    if given.tower:
        print(f"tower: {train_tower(model, given.tower, generator):.1%} of unseen cells", flush=True)
    else:
        model = llava()
    train_text(model, given.text, generator, given.out)
    save(model, given.out)
    print(accuracy(model, 512, generator))


if __name__ == "__main__":
    main()
