"""Small transformers that exist nowhere else, one for each way in which streams run through blocks.

All take latents (B, IMAGE, CHANNELS), a timestep (B,) and most a text (B, TEXT, WIDTH). Streams are
WIDTH wide. Each class says in `loop` how the streams run through its blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE, TEXT, CHANNELS, WIDTH, HEADS = 6, 4, 3, 8, 2


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention over (B, S, WIDTH), with as many heads as HEADS."""
    heads = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(attend(*self.qkv(x).chunk(3, dim=-1)))


class Block(nn.Module):
    """Modulated norm, attention, gate, add; norm, MLP, add."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(time)[:, None].chunk(3, dim=-1)
        x = x + gate * self.attn(self.norm1(x) * (1 + scale) + shift)
        return x + self.mlp(self.norm2(x))


class DualBlock(nn.Module):
    """Image and text, each with weights of its own, attend to both."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.image_qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.text_qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.image_out = nn.Linear(WIDTH, WIDTH)
        self.text_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self.modulation(time)[:, None].chunk(2, dim=-1)
        image = self.image_qkv(self.norm(x) * (1 + scale) + shift)
        both = torch.cat([self.text_qkv(self.norm(text)), image], dim=1)
        mixed = attend(*both.chunk(3, dim=-1))
        mixed_text, mixed_image = mixed.split([text.shape[1], x.shape[1]], dim=1)
        return x + self.image_out(mixed_image), text + self.text_out(mixed_text)


class Model(nn.Module):
    """Embed, loop over blocks, norm, project. The plainest: one stream."""

    block: type[nn.Module] = Block

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(CHANNELS, WIDTH)
        self.embed_time = nn.Linear(2 * WIDTH, WIDTH)
        self.embed_text = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([self.block() for _ in range(depth)])
        self.norm = nn.LayerNorm(WIDTH)
        self.project = nn.Linear(WIDTH, CHANNELS)
        self.eval().requires_grad_(False)

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, **extra: Any) -> Tensor:
        angles = timestep[:, None] * torch.arange(WIDTH)
        time = self.embed_time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        x = self.loop(self.embed(latents), time, self.embed_text(text), **extra)
        return self.project(self.norm(x))

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, time)
        return x


class DualStream(Model):
    """Two streams; nobody reads the text after the last block."""

    block = DualBlock

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x, text = block(x, text, time)
        return x


class TwoOutputs(DualStream):
    """Two streams, both read after the last block."""

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x, text = block(x, text, time)
        return x + text.mean(dim=1, keepdim=True)


class JointTail(DualStream):
    """Two streams in `blocks`, then one joint stream in `singles`, of which the image is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.singles = nn.ModuleList([Block() for _ in range(2)]).eval().requires_grad_(False)

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        length = text.shape[1]
        for block in self.blocks:
            x, text = block(x, text, time)
        x = torch.cat([text, x], dim=1)
        for block in self.singles:
            x = block(x, time)
        return x[:, length:]


class SplitTail(JointTail):
    """The joint stream is split into both, and both are read."""

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        lengths = [text.shape[1], x.shape[1]]
        for block in self.blocks:
            x, text = block(x, text, time)
        x = torch.cat([text, x], dim=1)
        for block in self.singles:
            x = block(x, time)
        text, x = x.split(lengths, dim=1)
        return x + text.mean(dim=1, keepdim=True)


class WholeJointStream(JointTail):
    """The joint stream is read as a whole, so that its partner is no region input as it is."""

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        length = text.shape[1]
        for block in self.blocks:
            x, text = block(x, text, time)
        x = torch.cat([text, x], dim=1)
        for block in self.singles:
            x = block(x, time)
        return (x * x.amax(dim=1, keepdim=True))[:, length:]


class SeamBlock(Block):
    """Takes and returns (B, WIDTH, 2, IMAGE / 2), and works on (B, IMAGE, WIDTH)."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return super().forward(tokens, time).transpose(1, 2).unflatten(2, x.shape[2:])


class ViewsAtTheSeams(Model):
    block = SeamBlock

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        x = x.transpose(1, 2).reshape(x.shape[0], WIDTH, 2, IMAGE // 2)
        for block in self.blocks:
            x = block(x, time)
        return x.permute(0, 2, 3, 1).flatten(1, 2)


class CastsBetweenBlocks(Model):
    """The stream is wide between the blocks and narrow within them, and clipped."""

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x.float(), time).clip(-1e4, 1e4).double()
        return x.to(torch.float32)


class WideningBlock(Block):
    """Adds in float64 to a stream that may be narrower."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        narrow = x.float()
        return x + (super().forward(narrow, time) - narrow).double()


class WidenedByBlocks(Model):
    """The stream enters in float32 and leaves in float64."""

    block = WideningBlock

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return super().loop(x, time, text).float()


class NarrowingBlock(Block):
    """Works in float32, and returns it, on a stream that may be wider."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return super().forward(x.float(), time)


class NarrowedByBlocks(Model):
    """The stream enters in float64 and leaves in float32."""

    block = NarrowingBlock

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return super().loop(x.double(), time, text)


class RefinedText(DualStream):
    """The text runs through blocks of its own before the block loop."""

    def __init__(self) -> None:
        super().__init__()
        self.refiner = nn.ModuleList([Block() for _ in range(2)]).eval().requires_grad_(False)

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        for block in self.refiner:
            text = block(text, time)
        return super().loop(x, time, text)


class Controlled(Model):
    """Adds a residual of a control network after each block, the first before any block."""

    def loop(self, x: Tensor, time: Tensor, text: Tensor, control: list[Tensor]) -> Tensor:
        x = control[-1] + x
        for block, residual in zip(self.blocks, control, strict=False):
            x = block(x, time) + residual
        return x


class PerTokenModulation(Model):
    """Every token has a time of its own, so shift and scale have the shape of the stream."""

    class block(Block):  # noqa: N801
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            shift, scale, gate = self.modulation(time).chunk(3, dim=-1)
            x = x + gate * self.attn(shift + self.norm1(x) * (1 + scale))
            return x + self.mlp(self.norm2(x))

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return super().loop(x, time[:, None].expand_as(x) * x.new_ones(IMAGE, 1), text)


class PositionInFirstBlock(Model):
    """A learned position embedding is added in the first block, in front of the stream."""

    class block(Block):  # noqa: N801
        def forward(self, x: Tensor, time: Tensor, position: Tensor | None = None) -> Tensor:
            return super().forward(x if position is None else position + x, time)

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, IMAGE, WIDTH), requires_grad=False)

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        position = (self.position * 2).expand(x.shape[0], -1, -1)
        for index, block in enumerate(self.blocks):
            x = block(x, time, position if index == 0 else None)
        return x


class PostNorm(Model):
    """Normalises the stream after every addition: nothing of the input is left in the output."""

    class block(Block):  # noqa: N801
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return self.norm2(x + self.attn(x) * time[:, None])


class TextPostNorm(DualStream):
    """Normalises the text after its additions, and the image never; both are read afterwards."""

    class block(DualBlock):  # noqa: N801
        def forward(self, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
            x, text = super().forward(x, text, time)
            return x, self.norm(text)

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x, text = block(x, text, time)
        return self.join(x, text)

    def join(self, x: Tensor, text: Tensor) -> Tensor:
        return x + text.mean(dim=1, keepdim=True)


class TextPostNormWrittenOver(TextPostNorm):
    """Goes on to write into the text that the last block returned."""

    def join(self, x: Tensor, text: Tensor) -> Tensor:
        return super().join(x, text.add_(1))


class Untimed(Model):
    """Time is added to the hidden states before the blocks, which know nothing of it."""

    class block(Block):  # noqa: N801
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return x + self.attn(self.norm2(x))

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return super().loop(x + time[:, None], time, text)


class InPlaceAcrossTheCut(Model):
    """Each block adds to the tensor that it was given."""

    class block(Block):  # noqa: N801
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            x += self.attn(x) * time[:, None]
            return x


class InPlaceSeenOutside(InPlaceAcrossTheCut):
    """What they write into is read again behind them."""

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return super().loop(x, time, text).sin() + x


class InPlaceWithin(Model):
    """Writes in place, in many ways, into tensors that the blocks made."""

    class block(Block):  # noqa: N801
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            y = self.attn(x * time[:, None])
            y += 1
            y.mul_(2)
            y[:, 0] = 0
            torch.add(y, x, out=y)
            return F.silu(y, inplace=True) + x


class InPlaceAfter(Model):
    """Writes into what the blocks made, after them, and into what they read."""

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        y = super().loop(x, time, text)
        x.mul_(2)
        return y.add_(x)


class NoTimestep(Model):
    """Knows nothing of time."""

    class block(Block):  # noqa: N801
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    def forward(self, latents: Tensor) -> Tensor:
        return self.project(self.loop(self.embed(latents), latents, latents))


class NoAttention(Model):
    class block(nn.Module):  # noqa: N801
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return x + self.linear(x) * time[:, None]


class SizesFromABlock(Model):
    """The first block works out a number of elements that is also needed after the last."""

    class block(Block):  # noqa: N801
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            y = x.reshape(-1).reshape(x.shape[0], x.shape[1] * WIDTH)
            return super().forward(y.view(x.shape), time)

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        elements = x.shape[1] * WIDTH
        shape = x.shape
        x = super().loop(x, time, text)
        return x.reshape(x.shape[0], elements).sub(elements).view(shape)


class PiecesAcrossTheCut(Model):
    """One tuple is made before the blocks and read within, one is made within and read after."""

    class block(nn.Module):  # noqa: N801
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()

        def forward(self, x: Tensor, pieces: Any) -> Any:
            scale, shift = pieces[:2]
            x = x + self.attn(x * scale + shift)
            return x.split([2, IMAGE - 2], dim=1)

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        pieces = time[:, None].repeat(1, 1, 3).tensor_split(3, dim=-1)
        for block in self.blocks:
            few, most = block(x, pieces)
            x = torch.cat([few, most], dim=1)
        return torch.cat([most, few * pieces[2]], dim=1)


def inputs(batch: int = 2) -> dict[str, Tensor]:
    """What `Model.forward` takes."""
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(batch, IMAGE, CHANNELS, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "text": torch.randn(batch, TEXT, WIDTH, generator=generator),
    }


def control() -> list[Tensor]:
    """Residuals of a control network."""
    return [torch.full((2, IMAGE, WIDTH), 0.1 * number) for number in range(3)]


class LongSkips(Model):
    """U-shaped: later blocks mix in what earlier ones were given, beside the stream itself."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__(depth)
        self.skips = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(depth // 2)
        )
        self.eval().requires_grad_(False)

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        given: list[Tensor] = []
        half = len(self.blocks) // 2
        for place, block in enumerate(self.blocks):
            if place < half:
                given.append(x)
            else:
                x = self.skips[place - half](torch.cat([x, given.pop()], dim=-1))
            x = block(x, time)
        return x


class TimeFromABlock(Model):
    """The first block's modulation is used once more, behind the blocks."""

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        x = super().loop(x, time, text)
        return x * self.blocks[0].modulation(time)[:, None, :WIDTH]


class Masked(Model):
    """Tokens that are padding are set to zero after every addition."""

    class block(Block):  # noqa: N801
        def forward(self, x: Tensor, time: Tensor, keep: Tensor) -> Tensor:
            shift, scale, gate = self.modulation(time)[:, None].chunk(3, dim=-1)
            x = (x + gate * self.attn(self.norm1(x) * (1 + scale) + shift)) * keep
            return (x + self.mlp(self.norm2(x))) * keep

    def loop(self, x: Tensor, time: Tensor, text: Tensor, keep: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, time, keep)
        return x


class TakingTurns(Model):
    """Two lists of blocks that take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.others = nn.ModuleList([Block() for _ in range(2)]).eval().requires_grad_(False)

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        for block, other in zip(self.blocks, self.others, strict=True):
            x = other(block(x, time), time)
        return x


class VmappedMask(Model):
    """Each block makes its mask with vmap, which enters and leaves a mode in the graph."""

    class block(Block):  # noqa: N801
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            places = torch.arange(IMAGE)
            mask = torch.vmap(lambda row: (places >= row - 2).to(x.dtype))(places)
            return super().forward(x + mask.mean(), time)


class InjectedPerBlock(DualStream):
    """Half of the text's channels are given anew to every block, in both lists."""

    def __init__(self) -> None:
        super().__init__(depth=3)
        self.given = nn.ModuleList([nn.Linear(WIDTH, WIDTH // 2) for _ in range(6)])
        self.singles = nn.ModuleList([Block() for _ in range(3)])
        self.eval().requires_grad_(False)

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        length, words = text.shape[1], [each(text) for each in self.given]
        for block in self.blocks:
            x, text = block(x, torch.cat([text[..., : WIDTH // 2], words.pop()], dim=-1), time)
        for block in self.singles:
            text = torch.cat([text[..., : WIDTH // 2], words.pop()], dim=-1)
            x = block(torch.cat([text, x], dim=1), time)
            text, x = x[:, :length], x[:, length:]
        return x


def keep() -> Tensor:
    """Which tokens are no padding, one for all channels."""
    return torch.ones(2, IMAGE, 1).index_fill(1, torch.tensor([IMAGE - 1]), 0)
