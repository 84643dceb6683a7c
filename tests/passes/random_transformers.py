"""Transformers drawn at random: a description, a module that does what it says, inputs for both.

    enter: arguments -> streams, conditioning
    loop:  streams -> [block, block, ...] -> seam -> [block, ...] -> streams
    leave: streams -> prediction

The three are methods of their own, so that a test can work out what reuse must give without a
graph: ``leave(entry + (exit - entry of an earlier call))``.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

BATCH, TEXT, CHANNELS, WIDTH = 2, 3, 4, 8
HEIGHT, BREADTH = 2, 4
IMAGE = HEIGHT * BREADTH

Kind = Literal["single", "text", "dual", "joint", "rejoined"]
"""How streams run through a list of blocks: the image alone; the text alone; both, with weights of
their own; both as one; or both apart between the blocks and as one within each."""

Ending = Literal["image", "both", "whole"]
Layout = Literal["tokens", "sequence first", "channels first", "picture"]
Modulation = Literal["per sample", "per token", "from a table", "none"]
Norm = Literal["before", "before and after", "after the addition"]
Skips = Literal["none", "added", "concatenated"]
Attention = Literal["fused", "matmul", "einsum"]
Rotary = Literal["none", "computed", "given"]
Writes = Literal["never", "within", "after"]

LANES: dict[Kind, tuple[str, ...]] = {
    "single": ("image",),
    "text": ("text",),
    "dual": ("image", "text"),
    "joint": ("joint",),
    "rejoined": ("joint",),
}
"""The streams that blocks have weights of their own for."""

ORDERS: tuple[tuple[Kind, ...], ...] = (
    ("single",),
    ("single", "single"),
    ("dual",),
    ("dual", "single"),
    ("dual", "joint"),
    ("dual", "joint", "joint"),
    ("dual", "rejoined"),
    ("joint",),
    ("joint", "joint"),
    ("rejoined",),
)
LIST_NAMES = ("blocks", "layers", "h", "double_stream", "tail", "trunk.cells", "core.stage_1")
DEPTHS = (1, 1, 1, 2, 2, 3, 4)
LATENTS = ("hidden_states", "latents", "x", "sample")
TIMESTEPS = ("timestep", "t", "sigma", "timesteps")


@dataclass(frozen=True)
class BlockListSketch:
    """A list of blocks: how its streams run, how many there are, where the model keeps them."""

    kind: Kind
    depth: int
    path: str


@dataclass(frozen=True)
class Description:
    """A transformer in words.

    ``ending`` says what is read after the loop: the image, image and text apart, or a joint stream
    as a whole. Between blocks the image lies in ``layout`` and all streams are of ``stream_dtype``;
    within blocks they are (B, S, WIDTH) of ``block_dtype``. ``model_converts`` if the model's own
    code goes from the one to the other, not the blocks'. ``skips`` are U-shaped, within a list.
    """

    lists: tuple[BlockListSketch, ...]
    ending: Ending
    text_first: bool
    layout: Layout
    stream_dtype: torch.dtype
    block_dtype: torch.dtype
    model_converts: bool
    skips: Skips
    modulation: Modulation
    norm: Norm
    attention: Attention
    one_addition: bool
    context: bool
    rotary: Rotary
    mask: bool
    control: bool
    refiner: bool
    writes: Writes
    time_in_a_list: bool
    latents: str
    timestep: str

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(each.kind for each in self.lists)

    @property
    def converts(self) -> bool:
        """Whether streams are anything else between blocks than within them."""
        return self.layout != "tokens" or self.stream_dtype != self.block_dtype

    @property
    def order(self) -> tuple[str, str]:
        """The streams in the order in which they are joined."""
        return ("text", "image") if self.text_first else ("image", "text")

    @property
    def joint_lengths(self) -> list[int]:
        return [{"image": IMAGE, "text": TEXT}[name] for name in self.order]

    @property
    def image_start(self) -> int:
        """Where the image begins in a joint stream."""
        return TEXT if self.text_first else 0

    @property
    def joint_dim(self) -> int:
        return {"tokens": 1, "sequence first": 0, "channels first": 2}[self.layout_of("joint")]

    @property
    def attended(self) -> int:
        """How many tokens attention mixes in the first block."""
        return IMAGE if self.kinds[0] == "single" else IMAGE + TEXT

    @property
    def modulated(self) -> set[str]:
        """The streams, as the weights of blocks know them."""
        return {name for kind in self.kinds for name in LANES[kind]}

    @property
    def read_after(self) -> tuple[str, ...]:
        """The streams that are read after the loop."""
        if self.ending == "whole":
            return ("joint",)
        return ("image", "text") if self.ending == "both" else ("image",)

    def layout_of(self, stream: str) -> Layout:
        """How a stream lies between blocks; only an image can be a picture."""
        return "tokens" if self.layout == "picture" and stream != "image" else self.layout

    @property
    def is_residual(self) -> bool:
        """Whether what leaves the loop is what entered it plus something."""
        return self.norm != "after the addition"


@st.composite
def descriptions(draw: st.DrawFn) -> Description:
    """Every combination of features that makes sense."""

    def one_of(values: Sequence[Any]) -> Any:
        return draw(st.sampled_from(values))

    def choice(literal: Any) -> Any:
        return one_of(get_args(literal))

    norm, skips = choice(Norm), choice(Skips)
    # Two lists are one loop only if residual additions carry the streams through both.
    residual = norm != "after the addition"
    kinds = one_of([order for order in ORDERS if residual or len(order) == 1])
    depths = [one_of(DEPTHS) for _ in kinds]
    paths = draw(st.permutations(LIST_NAMES))
    endings = {
        "single": ("image",),
        "dual": ("image", "both"),
        "joint": get_args(Ending),
        "rejoined": ("image", "both"),
    }
    return Description(
        lists=tuple(map(BlockListSketch, kinds, depths, paths)),
        ending=one_of(endings[kinds[-1]]),
        text_first=draw(st.booleans()),
        layout=choice(Layout),
        stream_dtype=one_of((torch.float32, torch.bfloat16, torch.float64)),
        block_dtype=one_of((torch.float32, torch.bfloat16)),
        model_converts=draw(st.booleans()),
        skips=skips if max(depths) > 1 else "none",
        modulation=choice(Modulation),
        norm=norm,
        attention=choice(Attention),
        one_addition=draw(st.booleans()),
        context=set(kinds) == {"single"} and draw(st.booleans()),
        rotary=choice(Rotary),
        mask=draw(st.booleans()),
        control=draw(st.booleans()),
        refiner=draw(st.booleans()),
        writes=choice(Writes),
        time_in_a_list=draw(st.booleans()),
        latents=one_of(LATENTS),
        timestep=one_of(TIMESTEPS),
    )


Streams = dict[str, Tensor]
"""``image`` and ``text``, or ``joint``; as they lie between blocks."""


@dataclass
class Conditioning:
    """What blocks take besides their streams, for (B, S, WIDTH) of the blocks' dtype.

    ``times`` are (B, 1 or S, WIDTH or 3 WIDTH), by stream; ``rotary`` cos and sin (S, WIDTH);
    ``bias`` (B, 1, S); ``control`` residuals are for the image as it lies between blocks.
    """

    times: dict[str, Tensor]
    context: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None
    control: tuple[Tensor, ...] = ()

    def of_tokens(self, start: int, length: int) -> Conditioning:
        """The same for blocks that attend to a part of the sequence only."""
        stop = start + length
        return dataclasses.replace(
            self,
            rotary=self.rotary and tuple(each[start:stop] for each in self.rotary),
            bias=None if self.bias is None else self.bias[..., start:stop],
        )


class Lane(nn.Module):
    """What a block has for one stream: modulation, attention's weights, MLP.

    Few weights, because Dynamo takes several times as long for a weight as for an operation.
    """

    def __init__(self, described: Description) -> None:
        super().__init__()
        self.described = described
        if described.modulation == "from a table":
            self.table = nn.Parameter(torch.randn(3 * WIDTH))
        elif described.modulation != "none":
            self.modulation = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        if not described.one_addition:
            self.mlp = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False)])

    def read(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor | float]:
        """Query, key and value in one, and the gate of the update."""
        y = self.normed(x)
        if self.described.modulation == "none":
            return self.qkv(y), 0.5
        table = self.described.modulation == "from a table"
        modulation = self.table + time if table else self.modulation(time)
        shift, scale, gate = modulation.chunk(3, dim=-1)
        return self.qkv(y * (1 + scale) + shift), gate

    def write(
        self, x: Tensor, mixed: Tensor, gate: Tensor | float, context: Tensor | None
    ) -> Tensor:
        """Add to the stream what attention made of it, then what context and MLP add."""
        described = self.described
        if described.writes == "within":
            mixed *= gate
        else:
            mixed = gate * mixed
        x = self.updated(x, mixed)
        if context is not None:
            x = self.updated(x, attend(described.attention, self.normed(x), context, context))
        if described.one_addition:
            return x
        y = F.silu(self.mlp[0](self.normed(x)))
        if described.writes == "within" and described.norm == "before":
            x += y
            return x
        return self.updated(x, y)

    def normed(self, x: Tensor) -> Tensor:
        return x if self.described.norm == "after the addition" else normed(x)

    def updated(self, x: Tensor, update: Tensor) -> Tensor:
        match self.described.norm:
            case "before":
                return x + update
            case "before and after":
                return x + normed(update)
            case "after the addition":
                return normed(x + update)


class Block(nn.Module):
    """Streams in, the same streams out, each with what attention over all of them made of it."""

    def __init__(self, described: Description, kind: Kind) -> None:
        super().__init__()
        self.described = described
        self.kind = kind
        self.names = [name for name in (*described.order, "joint") if name in LANES[kind]]
        self.lanes = nn.ModuleDict({name: Lane(described) for name in self.names})

    def forward(self, streams: Streams, conditioning: Conditioning) -> Streams:
        described = self.described
        if not described.model_converts:
            streams = into_block(described, streams)
        if self.kind == "rejoined":
            joint = torch.cat([streams[name] for name in described.order], dim=1)
            joint = self.mixed({"joint": joint}, conditioning)["joint"]
            pieces = joint.split(described.joint_lengths, dim=1)
            streams = dict(zip(described.order, pieces, strict=True))
        else:
            streams = self.mixed(streams, conditioning)
        return streams if described.model_converts else out_of_block(described, streams)

    def mixed(self, streams: Streams, conditioning: Conditioning) -> Streams:
        qkv, gates = [], []
        for name, lane in self.lanes.items():
            projected, gate = lane.read(streams[name], conditioning.times[name])
            qkv.append(projected)
            gates.append(gate)
        joint = qkv[0] if len(qkv) == 1 else torch.cat(qkv, dim=1)
        query, key, value = joint.chunk(3, dim=-1)
        if conditioning.rotary is not None:
            query = rotated(query, *conditioning.rotary)
            key = rotated(key, *conditioning.rotary)
        mixed = attend(self.described.attention, query, key, value, conditioning.bias)
        pieces = [mixed]
        if len(qkv) > 1:
            pieces = mixed.split(self.described.joint_lengths, dim=1)
        written = {}
        for (name, lane), piece, gate in zip(self.lanes.items(), pieces, gates, strict=True):
            written[name] = lane.write(streams[name], piece, gate, conditioning.context)
        return written


class Transformer(nn.Module):
    """What a description says. Takes its arguments by the description's names."""

    def __init__(self, described: Description) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.described = described
        self.embed = nn.Linear(CHANNELS, WIDTH, bias=False)
        self.embed_text = nn.Linear(WIDTH, WIDTH, bias=False)
        self.embed_time = nn.ModuleList(
            nn.Linear(2 * WIDTH, WIDTH, bias=False) for _ in range(1 + described.time_in_a_list)
        )
        if described.modulation == "from a table":
            self.table = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        if described.refiner:
            self.refiner = nn.ModuleList([Block(refining(described), "text")])
        for each in described.lists:
            self.add_list(each)
        self.project = nn.Linear(WIDTH, CHANNELS, bias=False)
        self.eval().requires_grad_(False)

    def add_list(self, sketch: BlockListSketch) -> None:
        described = self.described
        blocks = nn.ModuleList(Block(described, sketch.kind) for _ in range(sketch.depth))
        parent, _, name = sketch.path.rpartition(".")
        if parent and not hasattr(self, parent):
            self.add_module(parent, nn.Module())
        holder = self.get_submodule(parent)
        for weight in blocks.parameters():
            weight.data *= 2  # so that blocks add about as much as they are given
        holder.add_module(name, blocks.to(described.block_dtype))
        if described.skips == "concatenated":
            skip = nn.Linear(2 * WIDTH, WIDTH, dtype=described.block_dtype)
            holder.add_module(f"{name}_skip", skip)

    def forward(self, **given: Any) -> Tensor:
        streams, conditioning = self.enter(**given)
        return self.leave(self.loop(streams, conditioning))

    # --- before the loop ---

    def enter(self, **given: Any) -> tuple[Streams, Conditioning]:
        """The streams as they lie before the first block, and what all blocks take besides."""
        described = self.described
        time = self.time(given[described.timestep])
        image, text = self.embed(given[described.latents]), self.embed_text(given["text"])
        if described.modulation == "none":
            image = time + image
        if described.control:
            image = given["control"][0] + image
        if described.refiner:
            times = {"text": self.times(time, "text")}
            text = self.refiner[0]({"text": text}, Conditioning(times))["text"]
        streams = {"image": image, "text": text}
        resting = {
            name: laid_out(x, described.layout_of(name)).to(described.stream_dtype)
            for name, x in streams.items()
        }
        return resting, self.conditioning(time, text, given)

    def time(self, timestep: Tensor) -> Tensor:
        """(B,) -> (B, 1, WIDTH)."""
        angles = timestep[:, None, None] * torch.arange(WIDTH)
        first, *others = self.embed_time
        time = first(torch.cat([angles.sin(), angles.cos()], dim=-1))
        for layer in others:
            time = layer(F.silu(time).repeat(1, 1, 2))
        return F.silu(time)

    def times(self, time: Tensor, name: str) -> Tensor:
        """What the modulation of a stream takes."""
        match self.described.modulation:
            case "from a table":
                return self.table(time)
            case "per token":
                length = {"image": IMAGE, "text": TEXT, "joint": IMAGE + TEXT}[name]
                return time * torch.linspace(0.5, 1, length)[:, None]
            case _:
                return time

    def conditioning(self, time: Tensor, text: Tensor, given: Mapping[str, Any]) -> Conditioning:
        described = self.described
        dtype = described.block_dtype
        rotary = given.get("rotary")
        if described.rotary == "computed":
            angles = torch.arange(described.attended)[:, None] / (1 + torch.arange(WIDTH))
            rotary = (angles.cos(), angles.sin())
        bias = None
        if described.mask:
            bias = torch.where(given["mask"], 0.0, -1e4)[:, None].to(dtype)
        return Conditioning(
            {name: self.times(time, name).to(dtype) for name in described.modulated},
            text.to(dtype) if described.context else None,
            rotary and tuple(each.to(dtype) for each in rotary),
            bias,
            tuple(
                laid_out(each, described.layout_of("image")).to(described.stream_dtype)
                for each in given.get("control", ())[1:]
            ),
        )

    # --- the loop ---

    def loop(self, streams: Streams, conditioning: Conditioning) -> Streams:
        control = iter(conditioning.control)
        for each in self.described.lists:
            streams = self.seam(streams, each.kind)
            if each.kind == "single" and self.described.attended > IMAGE:
                start = TEXT if self.described.text_first else 0
                conditioning = conditioning.of_tokens(start, IMAGE)
            blocks = operator.attrgetter(each.path)(self)
            skipped: list[Tensor] = []
            for place, block in enumerate(blocks):
                main = "joint" if each.kind == "joint" else "image"
                if skipped and place >= each.depth - each.depth // 2:
                    streams[main] = self.skip(streams[main], skipped.pop(), main, each.path)
                elif self.described.skips != "none" and place < each.depth // 2:
                    skipped.append(streams[main])
                streams = self.run(block, streams, conditioning)
                residual = next(control, None)
                if residual is not None:
                    streams[main] = self.controlled(streams[main], residual, main)
        return streams

    def carried(self, streams: Streams) -> Streams:
        """The streams after the loop if its blocks hand on what they are given."""
        for each in self.described.lists:
            streams = self.seam(streams, each.kind)
        return streams

    def seam(self, streams: Streams, kind: Kind) -> Streams:
        """What enters a list of blocks, from what left the one before."""
        described = self.described
        if kind == "single":
            return {"image": streams["image"]}
        if kind != "joint" or "joint" in streams:
            return dict(streams)
        image = streams["image"]
        if described.layout == "picture":
            image = tokens(image, "picture")
        both = {"image": image, "text": streams["text"]}
        return {"joint": torch.cat([both[name] for name in described.order], described.joint_dim)}

    def run(self, block: nn.Module, streams: Streams, conditioning: Conditioning) -> Streams:
        if not self.described.model_converts:
            return block(streams, conditioning)
        return out_of_block(
            self.described, block(into_block(self.described, streams), conditioning)
        )

    def skip(self, x: Tensor, skipped: Tensor, name: str, path: str) -> Tensor:
        if self.described.skips == "added":
            return x + skipped
        inner = [into_block(self.described, {name: each})[name] for each in (x, skipped)]
        mixed = operator.attrgetter(f"{path}_skip")(self)(torch.cat(inner, dim=-1))
        return out_of_block(self.described, {name: mixed})[name]

    def controlled(self, x: Tensor, residual: Tensor, name: str) -> Tensor:
        """Adds the residual of a control network to the image, or to its part of a joint stream."""
        described = self.described
        if name == "image":
            return x + residual
        if described.layout == "picture":
            residual = tokens(residual, "picture")
        dim = described.joint_dim
        if described.writes != "never":
            image = x.narrow(dim, described.image_start, IMAGE)
            image += residual
            return x
        parts = dict(zip(described.order, x.split(described.joint_lengths, dim=dim), strict=True))
        parts["image"] = parts["image"] + residual
        return torch.cat([parts[name] for name in described.order], dim=dim)

    # --- after the loop ---

    def leave(self, streams: Streams) -> Tensor:
        described = self.described
        if described.ending == "whole":
            joint = tokens(streams["joint"], described.layout_of("joint")).float()
            joint = self.project(normed(joint) * joint.amax(dim=1, keepdim=True))
            return joint.narrow(1, described.image_start, IMAGE)
        if "joint" in streams and described.ending == "image":
            start, dim = described.image_start, described.joint_dim
            image = streams["joint"][(slice(None),) * dim + (slice(start, start + IMAGE),)]
            streams = {"image": tokens(image, described.layout_of("joint"))}
        elif "joint" in streams:
            pieces = streams["joint"].split(described.joint_lengths, dim=described.joint_dim)
            streams = {
                name: tokens(piece, described.layout_of("joint"))
                for name, piece in zip(described.order, pieces, strict=True)
            }
        else:
            streams = {name: tokens(x, described.layout_of(name)) for name, x in streams.items()}
        image = streams["image"]
        if described.writes == "after":
            image.mul_(1.5)
        prediction = self.project(normed(image.float()))
        if described.ending == "both":
            prediction = prediction + self.project(streams["text"].float().mean(1, keepdim=True))
        return prediction


def refining(described: Description) -> Description:
    """A refiner's blocks: the text alone, as it is before it is laid out."""
    return dataclasses.replace(described, model_converts=True, context=False)


def normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,))


def attend(kind: Attention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention with one head over (B, S, WIDTH)."""
    if kind == "fused":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    if kind == "matmul":
        scores = q @ k.transpose(1, 2) * WIDTH**-0.5
    else:
        scores = torch.einsum("bqc,bkc->bqk", q, k) * WIDTH**-0.5
    weights = (scores if bias is None else scores + bias).softmax(dim=-1)
    return weights @ v if kind == "matmul" else torch.einsum("bqk,bkc->bqc", weights, v)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, other = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-other, one], dim=-1) * sin


# --- layouts -------------------------------------------------------------------------------------


def laid_out(x: Tensor, layout: Layout) -> Tensor:
    """(B, S, WIDTH) as it lies between blocks."""
    match layout:
        case "tokens":
            return x
        case "sequence first":
            return x.transpose(0, 1)
        case "channels first":
            return x.permute(0, 2, 1)
        case "picture":
            return x.transpose(1, 2).reshape(x.shape[0], WIDTH, HEIGHT, BREADTH)


def tokens(x: Tensor, layout: Layout) -> Tensor:
    """The other way round."""
    match layout:
        case "tokens":
            return x
        case "sequence first":
            return x.transpose(0, 1)
        case "channels first":
            return x.permute(0, 2, 1)
        case "picture":
            return x.flatten(2).transpose(1, 2)


def into_block(described: Description, streams: Streams) -> Streams:
    """From what lies between blocks to what they work on."""
    if not described.converts:
        return streams
    return {
        name: tokens(x, described.layout_of(name)).to(described.block_dtype)
        for name, x in streams.items()
    }


def out_of_block(described: Description, streams: Streams) -> Streams:
    """The other way round."""
    if not described.converts:
        return streams
    return {
        name: laid_out(x, described.layout_of(name)).to(described.stream_dtype)
        for name, x in streams.items()
    }


# --- inputs --------------------------------------------------------------------------------------


def inputs(described: Description, seed: int = 0) -> dict[str, Any]:
    """What a transformer of that description takes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    given: dict[str, Any] = {
        described.latents: normal(BATCH, IMAGE, CHANNELS),
        described.timestep: torch.rand(BATCH, generator=generator),
        "text": normal(BATCH, TEXT, WIDTH),
    }
    if described.control:
        # One before the first block, then one behind each but the last.
        blocks = sum(each.depth for each in described.lists)
        given["control"] = [normal(BATCH, IMAGE, WIDTH) for _ in range(blocks)]
    if described.mask:
        given["mask"] = torch.rand(BATCH, described.attended, generator=generator) > 0.2
    if described.rotary == "given":
        given["rotary"] = [normal(described.attended, WIDTH) for _ in range(2)]
    return given
