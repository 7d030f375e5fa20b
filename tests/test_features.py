"""The features that are found in networks of other people: one small network for each way in
which the order of computation misleads, then MONAI's."""

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from egcnn_nb.core import InputError
from egcnn_nb.method.egcnn import EGCNN
from egcnn_nb.method.features import find_features, listen
from egcnn_nb.method.losses import EGLoss
from egcnn_nb.tensors import seed_everything

pytestmark = pytest.mark.filterwarnings("ignore:The edge stream adds")  # these networks are small

IMAGE = torch.zeros(1, 1, 64, 64)


def block(before, channels, stride=1):
    "Convolution, normalisation, activation"
    conv = nn.Conv2d(before, channels, 3, stride, 1)
    norm = nn.BatchNorm2d(channels)
    activation = nn.ReLU()
    return nn.Sequential(conv, norm, activation)


def joined(*maps):
    "Maps beside each other, along the channels"
    return torch.cat(maps, 1)


def up_conv(before, channels):
    "A transposed convolution that doubles the size"
    return nn.ConvTranspose2d(before, channels, 2, 2)


def resized(deep, like):
    "Up-sampled to the size of another map"
    _, _, *size = like.shape
    return F.interpolate(deep, size, mode="bilinear")


def raised(deep, skip):
    "A deep map up-sampled to the size of a skip, and the skip beside it"
    up = resized(deep, skip)
    return joined(up, skip)


def summed(fine, deep):
    "The sum of a map and a deeper one, up-sampled to its size"
    up = resized(deep, fine)
    return fine + up


def weighted(y, look):
    "A map, weighted by what a module makes of it and up-sampled to its size"
    weights = look(y)
    weights = resized(weights, y)
    return y * weights


class UNet(nn.Module):
    "Three resolutions, strided blocks, transposed convolutions; the others are built on it"

    def __init__(self):
        super().__init__()
        self.a = block(1, 8)
        self.b = block(8, 16, 2)
        self.c = block(16, 32, 2)
        self.up1 = up_conv(32, 16)
        self.d = block(32, 16)
        self.up2 = up_conv(16, 8)
        self.e = block(16, 8)
        self.out = nn.Conv2d(8, 3, 1)

    def encode(self, x):
        a = self.a(x)
        b = self.b(a)
        return a, b, self.c(b)

    def decode(self, a, b, c):
        up = self.up1(c)
        both = joined(up, b)
        d = self.d(both)
        up = self.up2(d)
        both = joined(up, a)
        e = self.e(both)
        return d, e

    def decoded(self, x):
        "The finest map of the decoder"
        maps = self.encode(x)
        _, e = self.decode(*maps)
        return e

    def forward(self, x):
        e = self.decoded(x)
        return self.out(e)


class LateHeads(UNet):
    "Heads of deep supervision that run after the decoder, on every map, and shrink some"

    def __init__(self):
        super().__init__()
        self.head_b = nn.Conv2d(16, 3, 1)
        self.head_c = nn.Conv2d(32, 3, 1)
        self.head_d = nn.Conv2d(16, 3, 3, 2, 1)

    def forward(self, x):
        a, b, c = self.encode(x)
        d, e = self.decode(a, b, c)
        of_e = self.out(e)
        of_b = self.head_b(b)
        of_d = self.head_d(d)
        of_c = self.head_c(c)
        return of_e, of_b, of_d, of_c


class SecondBranch(UNet):
    "A branch that runs after the decoder and goes into the logits; another that goes into nothing"

    def __init__(self):
        super().__init__()
        self.detail = nn.Sequential(block(1, 8), block(8, 8))
        self.out = nn.Conv2d(16, 3, 1)
        self.classify = nn.Sequential(block(8, 8, 2), block(8, 8, 2), block(8, 8, 2))

    def forward(self, x):
        e = self.decoded(x)
        detail = self.detail(x)
        both = joined(e, detail)
        y = self.out(both)
        kind = self.classify(e)
        return y, kind


class PooledAttention(UNet):
    "Each encoder block is weighted by a map that was pooled by eight and up-sampled again"

    def __init__(self):
        super().__init__()
        self.look_a = nn.Sequential(nn.AvgPool2d(8), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.look_b = nn.Sequential(nn.AvgPool2d(8), nn.Conv2d(16, 16, 1), nn.Sigmoid())

    def encode(self, x):
        a = self.a(x)
        a = weighted(a, self.look_a)
        b = self.b(a)
        b = weighted(b, self.look_b)
        c = self.c(b)
        return a, b, c


class DeepAttention(UNet):
    "The deepest map is weighted by one that was pooled, convolved and up-sampled again"

    def __init__(self):
        super().__init__()
        pool = nn.AvgPool2d(4)
        conv = nn.Conv2d(32, 32, 3, padding=1)
        bound = nn.Sigmoid()
        self.look = nn.Sequential(pool, conv, bound)

    def encode(self, x):
        a, b, c = super().encode(x)
        c = weighted(c, self.look)
        return a, b, c


class AddedContext(UNet):
    "A detour in the encoder that is added, and holds convolutions with neighbours"

    def __init__(self):
        super().__init__()
        pool = nn.AvgPool2d(4)
        conv = nn.Conv2d(8, 8, 3, padding=1)
        up = nn.Upsample(scale_factor=4)
        self.context = nn.Sequential(pool, conv, up)

    def encode(self, x):
        a = self.a(x)
        context = self.context(a)
        a = a + context
        b = self.b(a)
        c = self.c(b)
        return a, b, c


class PyramidPooling(UNet):
    "The deepest map is pooled to 1, 2, 3 and 6 places, and all are put beside it"

    def __init__(self):
        super().__init__()
        self.pools = nn.ModuleList()
        for places in (1, 2, 3, 6):
            pool = nn.AdaptiveAvgPool2d(places)
            conv = nn.Conv2d(32, 8, 1)
            layers = nn.Sequential(pool, conv, nn.ReLU())
            self.pools.append(layers)
        self.join = block(64, 32)

    def encode(self, x):
        a, b, c = super().encode(x)
        both = c
        for pool in self.pools:
            pooled = pool(c)
            pooled = resized(pooled, c)
            both = joined(both, pooled)
        c = self.join(both)
        return a, b, c


class Aspp(UNet):
    "Dilated convolutions and the mean of the image, at the deepest resolution"

    def __init__(self):
        super().__init__()
        self.rates = nn.ModuleList()
        for rate in (1, 2, 4):
            conv = nn.Conv2d(32, 8, 3, padding=rate, dilation=rate)
            self.rates.append(conv)
        pool = nn.AdaptiveAvgPool2d(1)
        conv = nn.Conv2d(32, 8, 1)
        self.mean = nn.Sequential(pool, conv)
        self.join = nn.Conv2d(32, 32, 1)

    def encode(self, x):
        a, b, c = super().encode(x)
        mean = self.mean(c)
        mean = resized(mean, c)
        dilated = [conv(c) for conv in self.rates]
        both = joined(*dilated, mean)
        c = self.join(both)
        return a, b, c


class Nested(nn.Module):
    "U-Net++: decoders of shallow maps run before the encoder has reached its depth"

    def __init__(self):
        super().__init__()
        self.x00 = block(1, 8)
        self.x10 = block(8, 16, 2)
        self.x20 = block(16, 32, 2)
        self.u10 = up_conv(16, 8)
        self.u20 = up_conv(32, 16)
        self.u11 = up_conv(16, 8)
        self.x01 = block(16, 8)
        self.x11 = block(32, 16)
        self.x02 = block(24, 8)
        self.head1 = nn.Conv2d(8, 3, 1)
        self.head2 = nn.Conv2d(8, 3, 1)

    def maps(self, x):
        x00 = self.x00(x)
        x10 = self.x10(x00)
        up = self.u10(x10)
        both = joined(x00, up)
        x01 = self.x01(both)
        x20 = self.x20(x10)
        up = self.u20(x20)
        both = joined(x10, up)
        x11 = self.x11(both)
        up = self.u11(x11)
        all_three = joined(x00, x01, up)
        x02 = self.x02(all_three)
        return x01, x02

    def forward(self, x):
        _, x02 = self.maps(x)
        return self.head2(x02)


class WeakFirst(Nested):
    "Returns the outputs of every depth, the weakest first"

    def forward(self, x):
        x01, x02 = self.maps(x)
        weak = self.head1(x01)
        strong = self.head2(x02)
        return [weak, strong]


class TopDown(nn.Module):
    "A feature pyramid: lateral 1×1 convolutions, a path from the top, smoothing after it"

    def __init__(self):
        super().__init__()
        self.c1 = block(1, 8)
        self.c2 = block(8, 16, 2)
        self.c3 = block(16, 32, 2)
        self.l1 = nn.Conv2d(8, 8, 1)
        self.l2 = nn.Conv2d(16, 8, 1)
        self.l3 = nn.Conv2d(32, 8, 1)
        self.s1 = block(8, 8)
        self.s2 = block(8, 8)
        self.s3 = block(8, 8)
        self.out = nn.Conv2d(24, 3, 1)

    def forward(self, x):
        c1 = self.c1(x)
        c2 = self.c2(c1)
        c3 = self.c3(c2)
        p3 = self.l3(c3)
        p2 = self.l2(c2)
        p2 = summed(p2, p3)
        p1 = self.l1(c1)
        p1 = summed(p1, p2)
        s1 = self.s1(p1)
        s2 = self.s2(p2)
        s2 = resized(s2, s1)
        s3 = self.s3(p3)
        s3 = resized(s3, s1)
        fused = joined(s1, s2, s3)
        return self.out(fused)


def pair(before, channels):
    "Two convolutions without padding"
    first = nn.Conv2d(before, channels, 3)
    second = nn.Conv2d(channels, channels, 3)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())


class Unpadded(nn.Module):
    "Convolutions without padding, so that each map is a little smaller, and skips are cropped"

    def __init__(self):
        super().__init__()
        self.a = pair(1, 8)
        self.b = pair(8, 16)
        self.c = pair(16, 32)
        self.pool = nn.MaxPool2d(2)
        self.up1 = up_conv(32, 16)
        self.up2 = up_conv(16, 8)
        self.d = pair(32, 16)
        self.e = pair(16, 8)
        self.out = nn.Conv2d(8, 3, 1)

    def crop(self, skip, axis, size):
        "The middle of a skip along one axis"
        whole = skip.shape[axis]
        start = (whole - size) // 2
        return skip.narrow(axis, start, size)

    def merge(self, up, skip):
        *_, height, width = up.shape
        cropped = self.crop(skip, 2, height)
        cropped = self.crop(cropped, 3, width)
        return joined(up, cropped)

    def forward(self, x):
        a = self.a(x)
        half = self.pool(a)
        b = self.b(half)
        half = self.pool(b)
        c = self.c(half)
        up = self.up1(c)
        both = self.merge(up, b)
        d = self.d(both)
        up = self.up2(d)
        both = self.merge(up, a)
        e = self.e(both)
        return self.out(e)


class Residual(nn.Module):
    "A residual block that widens by 1×1 before its strided convolution"

    def __init__(self, before, channels):
        super().__init__()
        inner = 4 * before
        widen = nn.Conv2d(before, inner, 1)
        self.expand = nn.Sequential(widen, nn.ReLU())
        self.conv = nn.Conv2d(inner, channels, 3, 2, 1)
        self.shorten = nn.Conv2d(before, channels, 1, 2)

    def forward(self, x):
        wide = self.expand(x)
        y = self.conv(wide)
        shortcut = self.shorten(x)
        both = y + shortcut
        return both.relu()


class Strided(UNet):
    "The first layer of a strided block is at the larger resolution, with four times the channels"

    def __init__(self):
        super().__init__()
        self.b = Residual(8, 16)
        self.c = Residual(16, 32)


class SharedUp(UNet):
    "One nn.Upsample for every resolution, one block for two of them"

    def __init__(self):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2)
        self.thin1 = nn.Conv2d(32, 16, 1)
        self.thin2 = nn.Conv2d(16, 8, 1)

    def decode(self, a, b, c):
        thin = self.thin1(c)
        up = self.up(thin)
        both = joined(up, b)
        d = self.d(both)
        thin = self.thin2(d)
        up = self.up(thin)
        both = joined(up, a)
        e = self.e(both)
        return d, e


class SharedBlock(nn.Module):
    "One block with one kernel is the whole encoder, and another the whole decoder"

    def __init__(self):
        super().__init__()
        self.stem = block(1, 8)
        self.block = block(8, 8)
        self.join = block(16, 8)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        stem = self.stem(x)
        a = self.block(stem)
        half = F.max_pool2d(a, 2)
        b = self.block(half)
        half = F.max_pool2d(b, 2)
        c = self.block(half)
        both = raised(c, b)
        d = self.join(both)
        both = raised(d, a)
        e = self.join(both)
        return self.out(e)


class Encoder(nn.Module):
    "Puts out all its maps, in a tuple"

    def __init__(self):
        super().__init__()
        self.layers = nn.ParameterList()
        for before, channels in ((1, 8), (8, 16), (16, 32)):
            weight = torch.randn(channels, before, 3, 3)
            self.layers.append(weight / 8)

    def forward(self, x):
        found = []
        stride = 1
        for weight in self.layers:
            x = F.conv2d(x, weight, stride=stride, padding=1)
            x = torch.relu(x)
            found.append(x)
            stride = 2
        return tuple(found)


class TupleInside(UNet):
    "The encoder is one module without convolutions that are modules"

    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        del self.a, self.b, self.c

    def encode(self, x):
        return self.encoder(x)


class GatedSkips(UNet):
    "Attention U-Net: the decoder weights each skip; the weighted skip is no map of the encoder"

    def __init__(self):
        super().__init__()
        self.of_skip = nn.Conv2d(16, 8, 1)
        self.of_deep = nn.Conv2d(16, 8, 1)
        self.weigh = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 1, 1), nn.Sigmoid())
        self.after = block(16, 16)

    def decode(self, a, b, c):
        up = self.up1(c)
        of_skip = self.of_skip(b)
        of_deep = self.of_deep(up)
        weights = self.weigh(of_skip + of_deep)
        b = self.after(b * weights)
        both = joined(up, b)
        d = self.d(both)
        up = self.up2(d)
        both = joined(up, a)
        e = self.e(both)
        return d, e


class WrittenInPlace(UNet):
    "Skips are written into parts of one block of memory"

    def decode(self, a, b, c):
        cases, _, *size = b.shape
        both = torch.zeros(cases, 32, *size, device=b.device)
        both[:, :16] = self.up1(c)
        both[:, 16:] = b
        d = self.d(both)
        up = self.up2(d)
        both = joined(up, a)
        e = self.e(both)
        return d, e


class Backbone(nn.Module):
    "Puts out the maps of its stages in a list, as most backbones do"

    def __init__(self):
        super().__init__()
        self.a = block(1, 8)
        self.b = block(8, 16, 2)
        self.c = block(16, 32, 2)

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        c = self.c(b)
        return [a, b, c]


class Laterals(nn.Module):
    "A feature pyramid on a backbone: 1×1 convolutions of the maps in a list"

    def __init__(self):
        super().__init__()
        self.encoder = Backbone()
        self.lateral1 = nn.Conv2d(8, 8, 1)
        self.lateral2 = nn.Conv2d(16, 8, 1)
        self.top = nn.Conv2d(32, 8, 1)
        self.smooth = block(8, 8)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        a, b, c = self.encoder(x)
        p3 = self.top(c)
        p2 = self.lateral2(b)
        p2 = summed(p2, p3)
        p2 = self.smooth(p2)
        p1 = self.lateral1(a)
        p1 = summed(p1, p2)
        return self.out(p1)


def as_tokens(y):
    "A map as tokens (B,places,channels)"
    rows = y.flatten(2)
    return rows.transpose(1, 2)


def as_map(tokens, like):
    "Tokens as a map of the size of another"
    _, _, *size = like.shape
    rows = tokens.transpose(1, 2)
    return rows.unflatten(2, size)


class ChannelsLast(UNet):
    "The encoder computes with the channels last, where no convolution ever sees its maps"

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(1, 8, 1)
        self.mix_b = nn.Linear(8 * 4, 16)
        self.mix_c = nn.Linear(16 * 4, 32)
        self.turn = nn.ModuleList([Turn(), Turn(), Turn()])

    def merge(self, y):
        corners = []
        for i in (0, 1):
            rows = y[:, i::2]
            for j in (0, 1):
                corner = rows[:, :, j::2]
                corners.append(corner)
        return torch.cat(corners, -1)

    def encode(self, x):
        a = self.a(x)
        a = a.movedim(1, -1)
        corners = self.merge(a)
        b = self.mix_b(corners)
        corners = self.merge(b)
        c = self.mix_c(corners)
        turn_a, turn_b, turn_c = self.turn
        a = turn_a(a)
        b = turn_b(b)
        c = turn_c(c)
        return a, b, c


class Turn(nn.Module):
    "Channels first, as convolutions want them"

    def forward(self, x):
        return x.movedim(-1, 1).contiguous()


class Attention(nn.Module):
    "Tokens look at a smaller map, and the result is added; by heads, whose matrices look like maps"

    def __init__(self, channels, stride, heads=1):
        super().__init__()
        self.heads = heads
        self.reduce = nn.Conv2d(channels, channels, stride, stride)
        self.queries = nn.Linear(channels, channels)
        self.pairs = nn.Linear(channels, 2 * channels)

    def split(self, tokens):
        of_heads = tokens.unflatten(2, (self.heads, -1))
        return of_heads.transpose(1, 2)

    def forward(self, x):
        tokens = as_tokens(x)
        queries = self.queries(tokens)
        queries = self.split(queries)
        small = self.reduce(x)
        small = as_tokens(small)
        pairs = self.pairs(small)
        keys, values = pairs.chunk(2, 2)
        keys = self.split(keys)
        values = self.split(values)
        products = queries @ keys.mT
        weights = products.softmax(3)
        seen = weights @ values
        together = seen.transpose(1, 2)
        together = together.flatten(2)
        return as_map(tokens + together, x)


class ReducedAttention(UNet):
    "Each stage ends with attention to a map as small as the deepest one"

    def __init__(self):
        super().__init__()
        self.look_a = Attention(8, 4)
        self.look_b = Attention(16, 2)

    def encode(self, x):
        a = self.a(x)
        a = self.look_a(a)
        b = self.b(a)
        b = self.look_b(b)
        c = self.c(b)
        return a, b, c


class Matrices(UNet):
    "16 heads look at 16 places: their matrices have the size of the map above"

    def __init__(self):
        super().__init__()
        self.look = Attention(32, 1, heads=16)
        self.c = block(16, 32, 2)
        self.after = nn.Identity()

    def encode(self, x):
        small = F.avg_pool2d(x, 4)
        a, b, c = super().encode(small)
        c = self.look(c)
        return a, b, c


class OneChannelGate(UNet):
    "The deepest map is weighted by a map of one channel that has been pooled and convolved"

    def __init__(self):
        super().__init__()
        pool = nn.MaxPool2d(2)
        conv = nn.Conv2d(32, 1, 3, padding=1)
        self.look = nn.Sequential(pool, conv)

    def encode(self, x):
        a, b, c = super().encode(x)
        c = weighted(c, self.look)
        return a, b, c


class Merged(nn.Module):
    "Resizes, joins and convolves; the joined map passes through a module that changes nothing"

    def __init__(self, deep, skip, channels):
        super().__init__()
        self.attention = nn.Identity()
        self.conv = block(deep + skip, channels)

    def forward(self, deep, skip):
        both = raised(deep, skip)
        both = self.attention(both)
        return self.conv(both)


class ThinSkips(UNet):
    "The decoder is wider than the skips"

    def __init__(self):
        super().__init__()
        self.d = Merged(32, 16, 24)
        self.e = Merged(24, 8, 16)
        self.out = nn.Conv2d(16, 3, 1)

    def decode(self, a, b, c):
        d = self.d(c, b)
        e = self.e(d, a)
        return d, e


class ResizedScores(UNet):
    "The decoder is wider than the skips, and the scores are resized at the end"

    def __init__(self):
        super().__init__()
        self.up1 = nn.Upsample(scale_factor=2)
        self.d = block(48, 32)
        self.out = nn.Conv2d(32, 3, 1)
        self.resize = nn.Upsample(scale_factor=2)

    def forward(self, x):
        _, b, c = self.encode(x)
        up = self.up1(c)
        both = joined(up, b)
        d = self.d(both)
        scores = self.out(d)
        return self.resize(scores)


class PlainTransformer(nn.Module):
    "One resolution inside; finer maps are made from it, and a smaller one where the decoder begins"

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 4, 4)
        self.mlp = nn.Linear(32, 32)
        self.finer = up_conv(32, 16)
        self.deeper = nn.Conv2d(32, 32, 3, 2, 1)
        self.up1 = up_conv(32, 16)
        self.d = block(48, 16)
        self.up2 = up_conv(16, 16)
        self.e = block(32, 8)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        y = self.patches(x)
        tokens = as_tokens(y)
        tokens = self.mlp(tokens)
        y = as_map(tokens, y)
        fine = self.finer(y)
        deep = self.deeper(y)
        up = self.up1(deep)
        both = joined(up, y)
        d = self.d(both)
        up = self.up2(d)
        both = joined(up, fine)
        e = self.e(both)
        e = resized(e, x)
        return self.out(e)


class LinearHeads(UNet):
    "The decoder thins each map by a linear layer of its tokens, resizes it and joins all"

    def __init__(self):
        super().__init__()
        self.encoder = Backbone()
        del self.a, self.b, self.c
        self.thin = nn.ModuleList([nn.Linear(8, 8), nn.Linear(16, 8), nn.Linear(32, 8)])
        self.fuse = block(24, 8)

    def forward(self, x):
        maps = self.encoder(x)
        finest = maps[0]
        thinned = []
        for linear, y in zip(self.thin, maps, strict=True):
            tokens = as_tokens(y)
            tokens = linear(tokens)
            thin = as_map(tokens, y)
            thin = resized(thin, finest)
            thinned.append(thin)
        both = joined(*thinned)
        fused = self.fuse(both)
        return self.out(fused)


class AsDict(UNet):
    "A dict whose first entry is a feature"

    def forward(self, x):
        maps = self.encode(x)
        d, e = self.decode(*maps)
        y = self.out(e)
        return {"feature": d, "out": y}


class Branches(UNet):
    "Three branches side by side, which exchange their maps at the end of the encoder"

    def __init__(self):
        super().__init__()
        self.branch_a = block(8, 8)
        self.branch_b = block(16, 16)
        self.branch_c = block(32, 32)
        self.raise_b = nn.Conv2d(16, 8, 1)
        self.raise_c = nn.Conv2d(32, 16, 1)
        self.lower_a = nn.Conv2d(8, 16, 3, 2, 1)
        self.lower_b = nn.Conv2d(16, 32, 3, 2, 1)
        self.last_a = nn.ReLU()
        self.last_b = nn.ReLU()
        self.last_c = nn.ReLU()

    def encode(self, x):
        a, b, c = super().encode(x)
        a = self.branch_a(a)
        b = self.branch_b(b)
        c = self.branch_c(c)
        from_b = self.raise_b(b)
        finer = summed(a, from_b)
        from_a = self.lower_a(a)
        from_c = self.raise_c(c)
        same = summed(b + from_a, from_c)
        from_b = self.lower_b(b)
        deeper = c + from_b
        a = self.last_a(finer)
        b = self.last_b(same)
        c = self.last_c(deeper)
        return a, b, c


class Lattice(UNet):
    "The deepest map is raised twice, and convolved in between"

    def __init__(self):
        super().__init__()
        self.raise_1 = nn.Conv2d(32, 16, 1)
        self.go_on = block(32, 32)
        self.raise_2 = nn.Conv2d(32, 16, 1)
        self.between = block(16, 16)

    def forward(self, x):
        a, b, c = self.encode(x)
        deep = self.raise_1(c)
        d = summed(b, deep)
        d = self.between(d)
        c = self.go_on(c)
        deep = self.raise_2(c)
        d = summed(d, deep)
        up = self.up2(d)
        both = joined(up, a)
        e = self.e(both)
        return self.out(e)


class HalfStep(nn.Module):
    "Halves one axis in the middle of a block, and pools the other at its end"

    def __init__(self, before, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, (2, 1), 1)
        self.norm = nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d((1, 2))
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, x):
        y = self.conv1(x)
        y = self.norm(y)
        y = y.relu()
        y = self.pool(y)
        return self.conv2(y)


class HalfSteps(UNet):
    "The encoder halves one axis after the other, and the decoder doubles both at once"

    def __init__(self):
        super().__init__()
        self.b = HalfStep(8, 16)
        self.c = HalfStep(16, 32)


class TwoPaths(nn.Module):
    "A stage that puts out two maps, and takes two"

    def __init__(self, before, channels, stride):
        super().__init__()
        half = channels // 2
        self.left = block(before, half, stride)
        self.right = block(before, half, stride)

    def forward(self, x):
        if isinstance(x, tuple):
            x = joined(*x)
        left = self.left(x)
        right = self.right(x)
        return left, right


class PathsOfTwo(nn.Module):
    "Each stage hands two maps to the next; the decoder takes both joined"

    def __init__(self):
        super().__init__()
        self.a = TwoPaths(1, 8, 1)
        self.b = TwoPaths(8, 16, 2)
        self.c = TwoPaths(16, 32, 2)

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        c = self.c(b)
        return joined(*a), joined(*b), joined(*c)


class JoinedPaths(UNet):
    "The encoder joins two maps of each stage, but its next stage takes both"

    def __init__(self):
        super().__init__()
        self.encoder = PathsOfTwo()
        del self.a, self.b, self.c

    def encode(self, x):
        return self.encoder(x)


class LoosePaths(JoinedPaths):
    "Nothing in the encoder joins its two maps; the decoder does"

    def encode(self, x):
        a = self.encoder.a(x)
        b = self.encoder.b(a)
        c = self.encoder.c(b)
        return joined(*a), joined(*b), joined(*c)


class TwoEncoders(UNet):
    "A second encoder, whose maps are fused with those of the first by 1×1 convolutions"

    def __init__(self):
        super().__init__()
        self.second_a = block(1, 8)
        self.second_b = block(8, 16, 2)
        self.second_c = block(16, 32, 2)
        self.fuse_a = nn.Conv2d(16, 8, 1)
        self.fuse_b = nn.Conv2d(32, 16, 1)
        self.fuse_c = nn.Conv2d(64, 32, 1)

    def encode(self, x):
        a, b, c = super().encode(x)
        a2 = self.second_a(x)
        b2 = self.second_b(a2)
        c2 = self.second_c(b2)
        both_a = joined(a, a2)
        both_b = joined(b, b2)
        both_c = joined(c, c2)
        a = self.fuse_a(both_a)
        b = self.fuse_b(both_b)
        c = self.fuse_c(both_c)
        return a, b, c


SMALL = {  # network -> encoder fine to deep, entry
    UNet: (["a", "b", "c"], "up1"),
    LateHeads: (["a", "b", "c"], "up1"),
    SecondBranch: (["a", "b", "c"], "up1"),
    PooledAttention: (["a", "b", "c"], "up1"),
    AddedContext: (["a", "b", "c"], "up1"),
    GatedSkips: (["a", "b", "c"], "up1"),
    DeepAttention: (["a", "b", "c"], "up1"),
    PyramidPooling: (["a", "b", "join"], "up1"),
    Aspp: (["a", "b", "join"], "up1"),
    Nested: (["x00", "x10", "x20"], "u20"),
    TopDown: (["c1", "c2", "c3"], "s2"),
    Unpadded: (["a", "b", "c"], "up1"),
    Strided: (["a", "b", "c"], "up1"),
    WrittenInPlace: (["a", "b", "c"], "up1"),
    SharedUp: (["a", "b", "c"], "up#1"),
    SharedBlock: (["block#1", "block#2", "block#3"], "join#1"),
    TupleInside: (["encoder[0]", "encoder[1]", "encoder[2]"], "up1"),
    AsDict: (["a", "b", "c"], "up1"),
    Laterals: (["encoder.a", "encoder.b", "encoder.c"], "smooth"),
    ChannelsLast: (["a", "turn.1", "turn.2"], "up1"),
    ReducedAttention: (["look_a", "look_b", "c"], "up1"),
    Matrices: (["a", "b", "look"], "up1"),
    OneChannelGate: (["a", "b", "c"], "up1"),
    ThinSkips: (["a", "b", "c"], "d"),
    ResizedScores: (["a", "b", "c"], "up1"),
    PlainTransformer: (["finer", "patches", "deeper"], "up1"),
    LinearHeads: (["encoder.a", "encoder.b", "encoder.c"], "fuse"),
    Branches: (["last_a", "last_b", "last_c"], "up1"),
    Lattice: (["a", "b", "c"], "between"),
    HalfSteps: (["a", "b", "c"], "up1"),
    JoinedPaths: (["encoder[0]", "encoder[1]", "encoder[2]"], "up1"),
    TwoEncoders: (["fuse_a", "fuse_b", "fuse_c"], "up1"),
}


def names(found):
    "Names of the encoder's features, and of the entry"
    encoder = [name for name, _ in found["encoder"]]
    entry, _ = found["entry"]
    return encoder, entry


def image_for(cls):
    "An image that fits a network"
    if cls is Unpadded:
        return torch.zeros(1, 1, 92, 92)
    return IMAGE


def assert_same_weights(net, before):
    "Assert that weights and buffers are what they were"
    state = net.state_dict()
    for name, value in state.items():
        expected = before[name]
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("cls", SMALL, ids=lambda cls: cls.__name__)
def test_features_follow_the_data(cls):
    found = find_features(cls(), image_for(cls))
    assert names(found) == SMALL[cls]
    assert found["doubts"] == []


@pytest.mark.parametrize("cls", SMALL, ids=lambda cls: cls.__name__)
def test_the_stream_learns_from_what_was_found(cls):
    "The wrapped network is unchanged, and a step reaches every weight of the stream"
    seed_everything(0)
    net = cls()
    x = torch.randn_like(image_for(cls))
    before = copy.deepcopy(net.state_dict())
    model = EGCNN(net, x, verbose=False)
    assert_same_weights(net, before)
    model.train()
    out = model(x)
    assert torch.equal(out.logits, out.main)
    target = torch.zeros_like(out.logits)
    target[:, 0] = 1
    target[:, 0, :8, :8] = 0
    target[:, 1, :8, :8] = 1
    criterion = EGLoss()
    loss = criterion(out, target)
    loss.backward()
    for name, weight in model.edge.named_parameters():
        assert weight.grad is not None, name


def test_the_sizes_are_those_of_the_pass():
    found = find_features(UNet(), IMAGE)
    expected = {"a": (64, 64), "b": (32, 32), "c": (16, 16), "up1": (32, 32)}
    assert found["sizes"] == expected
    assert found["head"] == ("out", 8)
    assert found["out_channels"] == 3
    assert found["dims"] == 2


def test_multiply_adds_are_counted_as_by_torch():
    from torch.utils.flop_counter import FlopCounterMode

    net = UNet().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(IMAGE)
    flops = counter.get_total_flops()
    found = find_features(net, IMAGE)
    assert found["macs"] == flops // 2


class NoMeta(UNet):
    "Looks at a number of the image, which a copy without numbers has not"

    def forward(self, x):
        if x.mean().item() > 1e9:
            x = -x
        return super().forward(x)


class Counting(NoMeta):
    "Counts its calls in a buffer, whatever the mode"

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("cls", [NoMeta, Counting])
def test_a_network_that_needs_numbers_runs_where_it_is(cls):
    net = cls().train()
    before = copy.deepcopy(net.state_dict())
    assert names(find_features(net, IMAGE)) == SMALL[UNet]
    assert net.training
    assert_same_weights(net, before)
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


class Queries(UNet):
    "Multiplies the pixels' features with those of queries, which are made from the image too"

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(32, 5 * 8)

    def forward(self, x):
        a, b, c = self.encode(x)
        _, e = self.decode(a, b, c)
        mean = c.mean((2, 3))
        queries = self.query(mean)
        queries = queries.unflatten(1, (5, 8))
        return torch.einsum("bqc,bchw->bqhw", queries, e)


def test_a_product_of_queries_and_pixels_is_told():
    with pytest.warns(
        UserWarning, match="product of two of its own maps.*a map of logits for each"
    ):
        EGCNN(Queries(), IMAGE, verbose=False)


def test_the_head_is_found_before_the_scores_are_resized():
    model = EGCNN(ResizedScores(), IMAGE, fuse="features", verbose=False)
    assert model.found["head"] == ("out", 32)


class Broken(UNet):
    def forward(self, x):
        raise RuntimeError("the network's own message")


def test_an_error_of_the_network_is_its_own():
    with pytest.raises(RuntimeError, match="own message"):
        find_features(Broken(), IMAGE)


# ---- doubts


class Bounded(UNet):
    "Puts out probabilities"

    def __init__(self, last):
        super().__init__()
        self.last = last

    def forward(self, x):
        logits = super().forward(x)
        return self.last(logits)


def by_sum(x):
    positive = x.exp()
    return positive / positive.sum(1, keepdim=True)


def enlarged_softmax(y):
    prob = y.softmax(1)
    return F.interpolate(prob, scale_factor=2.0)


@pytest.mark.parametrize(
    "last, word",
    [
        (nn.Softmax(1), "softmax"),
        (nn.Sigmoid(), "sigmoid"),
        (F.hardsigmoid, "sigmoid"),
        (enlarged_softmax, "softmax"),
    ],
)
def test_probabilities_are_told(last, word):
    told = (
        f"comes out of a {word}, but EGLoss wants logits. "
        "Pass the network without its last activation"
    )
    with pytest.warns(UserWarning, match=told):
        EGCNN(Bounded(last), IMAGE, verbose=False)


def test_logits_and_their_logarithms_are_not_told():
    for last in (nn.LogSoftmax(1), nn.Identity()):
        net = Bounded(last)
        found = find_features(net, IMAGE)
        assert found["doubts"] == []


def test_the_weakest_of_several_outputs_is_told_and_another_can_be_named():
    seed_everything(0)
    net = WeakFirst().eval()
    x = torch.randn(1, 1, 64, 64)
    with pytest.warns(UserWarning, match="output=1"):
        EGCNN(net, x, verbose=False)
    for output in (1, -1):
        model = EGCNN(net, x, output=output, verbose=False).eval()
        assert names(model.found) == SMALL[Nested]
        assert torch.equal(model(x), net(x)[1])
    with pytest.raises(
        InputError, match=r"output=7 is not in what the network returns. Name one of \[0, 1\]"
    ):
        EGCNN(net, x, output=7)


def test_an_entry_of_a_dict_can_be_named():
    net = AsDict().eval()
    model = EGCNN(net, IMAGE, output="out", verbose=False).eval()
    bare = net(IMAGE)
    logits = model(IMAGE)
    assert torch.equal(logits, bare["out"])
    found = find_features(net, IMAGE, output="feature")
    assert found["out_channels"] == 16


class NoDecoder(nn.Module):
    "Logits are made at the deepest resolution and resized"

    def __init__(self):
        super().__init__()
        self.a = block(1, 8)
        self.b = block(8, 16, 2)
        self.out = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        scores = self.out(b)
        return resized(scores, x)


def test_no_decoder_is_an_error_that_says_what_to_name():
    with pytest.raises(InputError, match="expected a decoder; name the layer: decoder_entry="):
        EGCNN(NoDecoder(), IMAGE)
    model = EGCNN(NoDecoder(), IMAGE, decoder_entry="b", verbose=False)
    assert model.entry == "b"
    assert model.gated == ["a"]


class ThinEntry(nn.Module):
    "The first up-sampled maps are class scores already"

    def __init__(self):
        super().__init__()
        self.a = block(1, 8)
        self.b = block(8, 16, 2)
        self.c = block(16, 32, 2)
        self.score = nn.Conv2d(32, 3, 1)
        self.up1 = up_conv(3, 3)
        self.up2 = up_conv(3, 3)

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        c = self.c(b)
        scores = self.score(c)
        up = self.up1(scores)
        return self.up2(up)


def test_a_feature_with_no_more_channels_than_classes_is_told():
    with pytest.warns(
        UserWarning,
        match=r"up1 has 3 channels, no more than the 3 classes.*features=\[...\], decoder_entry=...",
    ):
        EGCNN(ThinEntry(), IMAGE, verbose=False)


def test_one_of_two_paths_that_the_decoder_takes_is_told():
    found = find_features(LoosePaths(), IMAGE)
    told = "The decoder takes encoder.a.left beside encoder.a.right, which alone is gated. If one"
    assert len(found["doubts"]) == 2
    assert found["doubts"][0].startswith(told)
    named = find_features(LoosePaths(), IMAGE, features=["encoder.a[0]", "encoder.b[0]"])
    assert named["doubts"] == []


class TwoInARow(nn.Module):
    "A U-Net behind a U-Net"

    def __init__(self):
        super().__init__()
        self.first = UNet()
        self.first.add_module("out", nn.Identity())
        self.second = UNet()
        self.second.a = block(8, 8)

    def forward(self, x):
        y = self.first(x)
        return self.second(y)


def test_a_network_that_goes_down_and_up_twice_is_told():
    found = find_features(TwoInARow(), IMAGE)
    (told,) = found["doubts"]
    assert told.startswith("The network goes down and up again more than once, so the maps that")
    assert told.endswith("or name others: features=[...], decoder_entry=...")
    assert names(found) == (["second.a", "second.b", "second.c"], "second.up1")


def test_a_costly_stream_is_told_and_width_bounds_it():
    net = nn.Sequential(
        nn.Conv2d(1, 64, 1),
        nn.Conv2d(64, 64, 2, 2, groups=64),
        nn.ConvTranspose2d(64, 64, 2, 2, groups=64),
        nn.Conv2d(64, 3, 1),
    )
    with pytest.warns(UserWarning, match="more than half of the network's own.*width="):
        wide = EGCNN(net, IMAGE, verbose=False)
    thin = EGCNN(net, IMAGE, width=8, verbose=False)
    assert wide.edge.channels == 64
    assert thin.edge.channels == 8
    assert thin(IMAGE)[0].shape == (1, 3, 64, 64)
    with pytest.raises(InputError, match="width=0"):
        EGCNN(net, IMAGE, width=0)


class WideUp(UNet):
    "The first up-sampled map has all the channels of the deepest"

    def __init__(self):
        super().__init__()
        self.up1 = nn.Upsample(scale_factor=2)
        self.d = block(48, 16)


def test_a_whole_block_is_taken_rather_than_a_wide_layer():
    found = find_features(WideUp(), IMAGE)
    assert found["entry"] == ("d", 16)
    model = EGCNN(WideUp(), IMAGE, decoder_entry="up1", verbose=False)
    assert (
        model.edge.blocks[0].get_submodule("conv1").in_channels == 16
    )  # no more than b, which is gated there


# ---- names


def test_a_wrong_name_lists_close_ones_and_calls():
    with pytest.raises(
        InputError,
        match=r"features='up3': found no module named 'up3' that puts out a map. .*'up1'",
    ):
        EGCNN(UNet(), IMAGE, features=["a", "up3"])
    with pytest.raises(
        InputError,
        match=r"decoder_entry='up': 'up' puts out several maps. Name one of \['up#1', 'up#2'\]",
    ):
        EGCNN(SharedUp(), IMAGE, decoder_entry="up")
    with pytest.raises(InputError, match=r"\['encoder\[0\]', 'encoder\[1\]', 'encoder\[2\]'\]"):
        EGCNN(TupleInside(), IMAGE, features=["encoder"])


def test_calls_and_items_can_be_named():
    model = EGCNN(
        SharedUp(),
        IMAGE,
        features=["a", "b", "c"],
        decoder_entry="up#1",
        head="out",
        fuse="features",
        verbose=False,
    )
    assert model.entry == "up#1"
    assert model(IMAGE).logits.shape == (1, 3, 64, 64)
    features = ["encoder[2]", "encoder[0]", "encoder[1]"]
    model = EGCNN(TupleInside(), IMAGE, features=features, verbose=False)
    assert model.gated == ["encoder[1]", "encoder[0]"]


def test_each_call_is_caught_by_its_number():
    seed_everything(0)
    net = SharedBlock().eval()
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad(), listen(net, ["block#1", "block#3"], ["join#2"]) as seen:
        net(x)
    with torch.no_grad():
        a = net.block(net.stem(x))
        b = net.block(F.max_pool2d(a, 2))
        c = net.block(F.max_pool2d(b, 2))
    assert set(seen) == {"block#1", "block#3", "join#2:input"}
    assert torch.equal(seen["block#1"], a)
    assert torch.equal(seen["block#3"], c)
    assert seen["join#2:input"].shape == (1, 16, 64, 64)


def hooks_in(net):
    "Number of hooks in all modules of a network"
    count = 0
    for module in net.modules():
        count += len(module._forward_hooks)
        count += len(module._forward_pre_hooks)
    return count


def test_hooks_in_a_module_that_came_later_go_with_the_listener():
    net = UNet()
    model = EGCNN(net, IMAGE, fuse="features", verbose=False)
    before = hooks_in(net)
    net.b = block(8, 16, 2)
    net.out = nn.Conv2d(8, 3, 1)
    model(IMAGE)
    model(IMAGE)
    assert hooks_in(net) == before
    del model
    gc.collect()
    assert hooks_in(net) == 0


# ---- arguments and attributes


class TakesMore(UNet):
    "Takes a time and a flag beside the image"

    def forward(self, x, time=None, negate=False):
        assert time is not None
        offset = time.view(-1, 1, 1, 1)
        y = super().forward(x)
        y = y + offset
        if negate:
            return -y
        return y


def test_further_arguments_are_passed_on():
    seed_everything(0)
    net = TakesMore().eval()
    x = torch.randn(2, 1, 64, 64)
    time = torch.tensor([1.0, 2.0])
    model = EGCNN(net, (x, time, {"negate": True}), verbose=False).eval()
    negated = net(x, time, True)
    found = model(x, time, negate=True)
    assert torch.equal(found, negated)
    plain = net(x, time)
    found = model(x, time, full=True)
    assert torch.equal(found.main, plain)
    assert not torch.equal(negated, plain)


def test_attributes_of_the_network_are_reachable():
    net: Any = UNet()
    net.note = "kept"
    model = EGCNN(net, IMAGE, verbose=False)
    assert model.up1 is net.up1
    assert model.note == "kept"
    assert model.edge is not None
    assert not hasattr(model, "nothing")
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.nothing
    with pytest.raises(AttributeError):
        _ = EGCNN.__new__(EGCNN).up1


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    content = pickle.dumps(model)
    return pickle.loads(content)


@pytest.mark.parametrize("duplicate", [copied, pickled])
def test_attributes_of_a_copy_are_its_own(duplicate):
    model = EGCNN(UNet(), IMAGE, verbose=False).eval()
    twin = duplicate(model)
    assert twin.up1 is twin.main.up1
    assert twin.up1 is not model.up1
    found = twin(IMAGE, full=True)
    expected = model(IMAGE, full=True)
    assert torch.equal(found.edge, expected.edge)


@pytest.mark.parametrize("cls", [UNet, TupleInside])
def test_metatensors_work_in_network_and_loss(cls):
    monai = pytest.importorskip("monai.data")
    seed_everything(0)
    x = torch.randn(1, 1, 64, 64)
    y = torch.zeros(1, 3, 64, 64)
    y[:, 0, :32] = 1
    y[:, 1, 32:] = 1
    model = EGCNN(cls(), monai.MetaTensor(x), verbose=False).eval()
    loss = EGLoss().eval()
    plain = model(x, full=True)
    expected = loss(plain, y)
    wrapped = model(monai.MetaTensor(x), full=True)
    target = monai.MetaTensor(y)
    of_masks = loss(wrapped, target)
    assert torch.allclose(of_masks, expected)
    labels = target.argmax(1, keepdim=True)
    of_labels = loss(wrapped, labels, ignore=2)  # no voxel has this class
    assert torch.allclose(of_labels, expected)


def test_metatensors_work_in_three_dimensions_and_slide():
    monai = pytest.importorskip("monai.data")
    from egcnn_nb.method.backbones import SegNet
    from egcnn_nb.run.models import infer

    x = torch.randn(1, 1, 16, 16, 16)
    y = torch.zeros(1, 3, 16, 16, 16)
    y[:, 0, :8] = 1
    y[:, 1, 8:] = 1
    model = EGCNN(SegNet(1, 3, levels=2)).eval()
    image = monai.MetaTensor(x)
    target = monai.MetaTensor(y)
    out = model(image, full=True)
    loss = EGLoss(consistency="both")
    value = loss(out, target)
    value.backward()
    assert torch.isfinite(value)
    patch = (8, 8, 8)
    expected = infer(model, x[0], patch)
    found = infer(model, image[0], patch)
    assert torch.allclose(found, expected, atol=1e-5)


# ---- MONAI's networks

DYN = dict(
    kernel_size=[3] * 4, strides=[1, 2, 2, 2], upsample_kernel_size=[2] * 3, filters=[8, 16, 32, 64]
)
DYN_ANSWER = (
    ["input_block", "downsamples.0", "downsamples.1", "bottleneck"],
    "upsamples.0.transp_conv",
)
BASIC = ["conv_0", "down_1", "down_2", "down_3", "down_4"]
PLUS = [f"conv_{i}_0" for i in range(5)]
SEGRES = ([f"down_layers.{i}" for i in range(4)], "up_samples.0")
SWIN_MAPS = ["encoder1", "encoder2", "encoder3", "encoder4", "swinViT[3]", "encoder10"]
SWIN = (SWIN_MAPS, "decoder5.transp_conv")
VNET = (["in_tr", "down_tr32", "down_tr64", "down_tr128", "down_tr256"], "up_tr256.up_conv")
FINE = (8, 8, 16, 32, 64, 8)
MONAI = {  # label -> (class, axes, arguments, size, answer)
    "UNet": (
        "UNet",
        (2, 3),
        dict(channels=(8, 16, 32), strides=(2, 2), num_res_units=1),
        32,
        (["model.0", "model.1.submodule.1"], "model.1.submodule.2.0"),
    ),
    "BasicUNet": ("BasicUNet", (2, 3), dict(features=FINE), 32, (BASIC, "upcat_4.upsample")),
    "BasicUNetPlusPlus": (
        "BasicUNetPlusPlus",
        (2, 3),
        dict(features=FINE),
        32,
        (PLUS, "upcat_3_1.upsample"),
    ),
    "SegResNet": ("SegResNet", (2, 3), dict(init_filters=8), 32, SEGRES),
    "DynUNet": ("DynUNet", (2, 3), DYN, 32, DYN_ANSWER),
    "DynUNet, deep supervision": (
        "DynUNet",
        (2, 3),
        dict(DYN, deep_supervision=True, deep_supr_num=2, res_block=True),
        32,
        DYN_ANSWER,
    ),
    "VNet": ("VNet", (2, 3), {}, 32, VNET),
    "AttentionUnet": (
        "AttentionUnet",
        (2, 3),
        dict(channels=(8, 16, 32), strides=(2, 2)),
        32,
        (
            ["model.0", "model.1.submodule.0", "model.1.submodule.1.submodule"],
            "model.1.submodule.1.upconv",
        ),
    ),
    "UNETR": (
        "UNETR",
        (2, 3),
        dict(img_size=32, feature_size=8, hidden_size=48, mlp_dim=96, num_heads=4),
        32,
        (
            [
                "encoder1",
                "encoder2",
                "encoder3",
                "encoder4",
                "vit.patch_embedding.patch_embeddings",
            ],
            "decoder5.transp_conv",
        ),
    ),
    "SwinUNETR": (
        "SwinUNETR",
        (2, 3),
        dict(feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)),
        64,
        SWIN,
    ),
}
CASES = [(label, dims) for label, (_, axes, *_) in MONAI.items() for dims in axes]


def made(label, dims):
    "A network of MONAI, and an image for it"
    nets = pytest.importorskip("monai.networks.nets")
    cls, _, options, size, _ = MONAI[label]
    options = {"spatial_dims": dims, "in_channels": 1, "out_channels": 3, **options}
    if cls == "DynUNet":
        options |= {"strides": [1, 2, 2, 2]}
    net = getattr(nets, cls)(**options)
    image = torch.zeros(1, 1, *[size] * dims)
    return net, image


@pytest.mark.parametrize("label, dims", CASES)
def test_the_features_of_monais_networks(label, dims):
    net, image = made(label, dims)
    found = find_features(net, image)
    *_, answer = MONAI[label]
    assert names(found) == answer
    assert found["doubts"] == []


@pytest.mark.parametrize("way", ["trace", "export", "compile"])
def test_a_wrapped_network_is_exported_and_compiled(way, monkeypatch):
    monkeypatch.setattr("egcnn_nb.fast.enabled", False)
    seed_everything(0)
    model = EGCNN(SharedUp(), IMAGE, verbose=False).eval()
    nn.init.normal_(model.fusion.weight)
    x = torch.randn(1, 1, 64, 64)
    ways = {
        "trace": lambda: torch.jit.trace(model, x),
        "export": lambda: torch.export.export(model, (x,)).module(),
        "compile": lambda: torch.compile(model, fullgraph=True, backend="eager"),
    }
    with torch.no_grad():
        expected = model(x)
        found = ways[way]()(x)
    assert torch.allclose(found, expected, atol=1e-4)
