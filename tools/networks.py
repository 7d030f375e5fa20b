"""Wrap networks of other packages and compare what is found in them with what is right.

    python tools/networks.py CSV PACKAGE [PACKAGE ...]
    python tools/networks.py --merge FOLDER CSV [CSV ...]

The first form writes a row for each network of the packages, which have to be installed. The
second one writes the rows of several files as one file and as one page. What is right was written
down by hand, after reading the code of each network. No weights are loaded, and no memory is
taken where a network can be made on the meta device."""

import csv
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from egcnn_nb.core import InputError
from egcnn_nb.method.egcnn import EGCNN

CLASSES = 3
THEN = " > "  # between the names of features, fine to deep
OR = "|"  # between names of one map, or of two maps that are both right


@dataclass
class Network:
    "A network, and what is right for it"

    package: str
    name: str
    make: Callable[[], nn.Module]
    image: tuple  # shape of an example, channels first, without the batch
    encoder: str = ""  # names of the features, fine to deep
    entry: str = ""  # name of the first larger map made from the deepest one
    head: str = ""  # name of the output layer; empty: any
    should: str = "right"  # or "told", or "refused"
    more: tuple = ()  # further arguments


@dataclass
class Row:
    "What was found in a network, and whether it is right"

    package: str
    network: str
    axes: int
    verdict: str  # right, told, refused or wrong
    should: str
    encoder: str
    entry: str
    head: str
    right_encoder: str
    right_entry: str
    right_head: str
    message: str  # warnings or the error


# ---- what is right, a function for each package

RESNET = "encoder.relu > encoder.layer1 > encoder.layer2 > encoder.layer3 > encoder.layer4"
FINE = (8, 8, 16, 32, 64, 8)


def monai(dims: int) -> list:
    "MONAI's networks for images or volumes"
    nets = import_module("monai.networks.nets")
    common = {"spatial_dims": dims, "in_channels": 1, "out_channels": CLASSES}
    found = []

    def add(name, cls, options, encoder="", entry="", head="", size=32, **more):
        label = f"{name} {dims}D"
        channels = options.get("in_channels", 1)
        image = (channels, *[size] * dims)

        def make():
            kind = getattr(nets, cls)
            return kind(**options)

        network = Network("monai", label, make, image, encoder, entry, head, **more)
        found.append(network)

    levels = {"channels": (8, 16, 32, 64), "strides": (2, 2, 2)}
    deep = "model.1.submodule.1.submodule"
    add(
        "UNet",
        "UNet",
        {**common, "channels": (8, 16, 32), "strides": (2, 2)},
        "model.0 > model.1.submodule.1",
        "model.1.submodule.2",
        "model.2.conv",
    )
    add(
        "UNet, residual",
        "UNet",
        {**common, **levels, "num_res_units": 2},
        f"model.0 > model.1.submodule.0 > {deep}.1",
        f"{deep}.2.0",
        "model.2.1.conv.unit0.conv",
    )
    add(
        "AttentionUnet",
        "AttentionUnet",
        {**common, **levels},
        f"model.0 > model.1.submodule.0 > {deep}.0 > {deep}.1.submodule",
        f"{deep}.1.upconv",
        "model.2.conv",
    )
    basic = {**common, "features": FINE}
    downs = "conv_0 > down_1 > down_2 > down_3 > down_4"
    add("BasicUNet", "BasicUNet", basic, downs, "upcat_4.upsample", "final_conv")
    for mode, entry in (("nontrainable", "upcat_4.upsample"), ("pixelshuffle", "upcat_4")):
        options = {**basic, "upsample": mode}
        add(f"BasicUNet, {mode}", "BasicUNet", options, downs, entry, "final_conv")
    plus = "conv_0_0 > conv_1_0 > conv_2_0 > conv_3_0 > conv_4_0"
    rise = "upcat_3_1.upsample"
    add("BasicUNetPlusPlus", "BasicUNetPlusPlus", basic, plus, rise, "final_conv_0_4")
    deeply = {**basic, "deep_supervision": True}
    add(
        "BasicUNetPlusPlus, deep supervision",
        "BasicUNetPlusPlus",
        deeply,
        plus,
        rise,
        "final_conv_0_4",
        should="told",
    )
    dyn = {
        **common,
        "kernel_size": [3] * 4,
        "strides": [1, 2, 2, 2],
        "upsample_kernel_size": [2] * 3,
        "filters": [8, 16, 32, 64],
    }
    stages = "input_block > downsamples.0 > downsamples.1 > bottleneck"
    last = "output_block.conv.conv"
    for note, options in (
        ("", {}),
        (", residual", {"res_block": True}),
        (", deep supervision", {"deep_supervision": True, "deep_supr_num": 2}),
    ):
        options = {**dyn, **options}
        add("DynUNet" + note, "DynUNet", options, stages, "upsamples.0.transp_conv", last)
    layers = "down_layers.0 > down_layers.1 > down_layers.2 > down_layers.3"
    final = "conv_final.2.conv"
    for mode in ("nontrainable", "deconv", "pixelshuffle"):
        options = {**common, "upsample_mode": mode}
        add(f"SegResNet, {mode}", "SegResNet", options, layers, "up_samples.0", final)
    options = {**common, "input_image_size": (32,) * dims}
    add("SegResNetVAE", "SegResNetVAE", options, layers, "up_samples.0", final)
    blocks = THEN.join(f"encoder.layers.{i}.blocks" for i in range(4))
    ds = {**common, "init_filters": 8}
    up = "up_layers.0.upsample"
    add("SegResNetDS", "SegResNetDS", ds, blocks, up, "up_layers.2.head")
    options = {**ds, "dsdepth": 3}
    add("SegResNetDS, deep supervision", "SegResNetDS", options, blocks, up, "up_layers.2.head")
    # returns the outputs of two decoders
    add("SegResNetDS2", "SegResNetDS2", ds, blocks, up, "up_layers.2.head", should="told")
    options = {
        **common,
        "img_size": 32,
        "feature_size": 8,
        "hidden_size": 48,
        "mlp_dim": 96,
        "num_heads": 4,
    }
    add(
        "UNETR",
        "UNETR",
        options,
        "encoder1 > encoder2 > encoder3 > encoder4 > vit.patch_embedding.patch_embeddings",
        "decoder5.transp_conv",
        "out.conv.conv",
    )
    swin = {**common, "feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
    fine = "encoder1 > encoder2 > encoder3 > encoder4"
    rise = "decoder5.transp_conv"
    encoder = f"{fine} > swinViT[3] > encoder10"
    add("SwinUNETR", "SwinUNETR", swin, encoder, rise, "out.conv.conv", size=64)
    options = {**swin, "use_v2": True}
    encoder = f"{fine} > swinViT[3]|swinViT.layers4c.0 > encoder10"
    add("SwinUNETR, v2", "SwinUNETR", options, encoder, rise, "out.conv.conv", size=64)
    encoder = "in_tr > down_tr32 > down_tr64 > down_tr128 > down_tr256"
    add("VNet", "VNet", common, encoder, "up_tr256.up_conv", "out_tr.conv2")
    flexible = {"in_channels": 1, "out_channels": CLASSES, "spatial_dims": dims}
    add(
        "FlexibleUNet, EfficientNet",
        "FlexibleUNet",
        {**flexible, "backbone": "efficientnet-b0"},
        THEN.join(f"encoder._blocks.{i}" for i in (0, 1, 2, 4, 6)),
        "decoder.blocks.0.upsample",
        "segmentation_head.0",
        size=64,
    )
    add(
        "FlexibleUNet, ResNet",
        "FlexibleUNet",
        {**flexible, "backbone": "resnet18"},
        RESNET.replace("relu", "act"),
        "decoder.blocks.0.upsample",
        "segmentation_head.0",
        size=64,
    )
    down = THEN.join(f"enc_stages.{i}" for i in range(4))
    for size in "SBML":
        add(
            f"MedNeXt-{size}",
            f"MedNeXt{size}",
            {"spatial_dims": dims, "in_channels": 1, "out_channels": CLASSES},
            f"{down} > bottleneck",
            "up_blocks.0",
            "out_0.conv_out",
        )
    options = {"spatial_dims": dims, "in_channels": 1, "out_channels": CLASSES}
    deeply = {**options, "deep_supervision": True}
    encoder = f"{down} > bottleneck"
    name = "MedNeXt-S, deep supervision"
    add(name, "MedNeXtS", deeply, encoder, "up_blocks.0", "out_0.conv_out")
    add(
        "LocalNet",
        "LocalNet",
        {**_registration(dims), "extract_levels": (0, 1, 2, 3)},
        "encode_convs.0 > encode_convs.1 > encode_convs.2 > bottom_block",
        "decode_deconvs.0",
        "output_block.layers.0.conv",
    )
    # adds what a map is resized to, so that no module of it puts out a larger map
    options = {**_registration(dims), "depth": 3}
    add("RegUNet", "RegUNet", options, "", "", "", should="refused")
    inner = "net.0.1.submodule"
    then = ".1.submodule"
    maps = ["net.0.0", *[f"{inner}{then * i}.0" for i in range(4)]]
    add(
        "VoxelMorphUNet",
        "VoxelMorphUNet",
        {
            "spatial_dims": dims,
            "in_channels": 2,
            "unet_out_channels": CLASSES,
            "channels": (8, 16, 16, 16, 16, 16, 8, 8),
            "final_conv_channels": (8, 8),
        },
        THEN.join(maps),
        f"{inner}{then * 3}",
        "net.1.final_conv_out.conv",
    )
    diffusion = {
        **common,
        "channels": (32, 64, 64),
        "attention_levels": (False, False, True),
        "num_res_blocks": 1,
        "num_head_channels": 32,
    }
    add(
        "DiffusionModelUNet",
        "DiffusionModelUNet",
        diffusion,
        "down_blocks.0.resnets.0 > down_blocks.1.resnets.0 > middle_block",
        "up_blocks.0.upsampler.upsample_non_trainable",
        "out.2.conv",
        more=(torch.zeros(1),),
    )
    add(
        "AutoEncoder",
        "AutoEncoder",
        {**common, "channels": (8, 16, 32), "strides": (2, 2, 2)},
        "encode.encode_0 > encode.encode_1 > encode",
        "decode.decode_0",
        "decode.decode_2.conv.conv",
    )
    # one resolution
    add("HighResNet", "HighResNet", common, should="refused")
    add(
        "ViTAutoEnc",
        "ViTAutoEnc",
        {
            "in_channels": 1,
            "out_channels": CLASSES,
            "img_size": 32,
            "patch_size": 16,
            "hidden_size": 48,
            "mlp_dim": 96,
            "num_heads": 4,
            "spatial_dims": dims,
        },
        should="refused",
    )
    return found


def _registration(dims):
    "Options that MONAI's networks of registration share"
    return {
        "spatial_dims": dims,
        "in_channels": 1,
        "num_channel_initial": 8,
        "out_channels": CLASSES,
    }


def monai_2d() -> list:
    "MONAI's networks for images"
    nets = import_module("monai.networks.nets")
    step = ".1.submodule"
    quick = ["model.0.layers2"]
    quick += [f"model{step * i}.0.layers2" for i in range(1, 4)]
    quick.append(f"model{step * 4}.layers2")
    special = [
        Network(
            "monai",
            "Quicknat 2D",
            lambda: nets.Quicknat(num_classes=CLASSES),
            (1, 32, 32),
            THEN.join(quick),
            f"model{step * 4}[0]",
            "model.3.conv",
        ),
        Network(
            "monai",
            "HoVerNet 2D",
            lambda: nets.HoVerNet("fast", in_channels=3, np_out_channels=2, out_classes=5),
            (3, 256, 256),
            THEN.join(f"res_blocks.d{i}.bna_block" for i in range(4)),
            "upsample",
            "nucleus_prediction.output_features.decoderblock4.conv",
        ),
        Network(
            "monai",
            "DenseNet121 2D",
            lambda: nets.DenseNet121(2, 1, CLASSES),
            (1, 64, 64),
            should="refused",
        ),
    ]
    return [*monai(2), *special, *lattices(2), *anisotropic(2)]


def monai_3d() -> list:
    "MONAI's networks for volumes"
    nets = import_module("monai.networks.nets")
    fpn = "backbone_with_fpn"
    daf = Network(
        "monai",
        "DAF3D 3D",
        lambda: nets.DAF3D(1, CLASSES),
        (1, 64, 64, 64),
        f"{fpn}.body.layer0 > {fpn}.body.layer1 > {fpn}.body.layer4",
        f"{fpn}.fpn[feat1]",
    )
    return [*monai(3), daf, *lattices(3), *anisotropic(3)]


LADDER = (0, 1, 2, 3, 2, 1, 2, 3, 2, 1, 0, 0, 0)  # levels of a way that goes down and up twice


def dints(dims: int, way: tuple = ()) -> nn.Module:
    "MONAI's DiNTS with every path of each block, or with those along a way through its levels"
    nets = import_module("monai.networks.nets.dints")
    blocks = 12
    paths = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (2, 3), (3, 3)]
    codes = torch.ones(blocks, len(paths))
    nodes = torch.ones(blocks + 1, 4)
    if way:
        codes.zero_()
        nodes.zero_()
        for place, level in enumerate(way):
            nodes[place, level] = 1
        for block, path in enumerate(pairwise(way)):
            number = paths.index(path)
            codes[block, number] = 1
    operations = torch.ones_like(codes)
    code = [codes.numpy(), operations.numpy()]
    options = {"num_blocks": blocks, "num_depths": 4, "use_downsample": True}
    space = nets.TopologyInstance(code, 0.25, spatial_dims=dims, **options)
    return nets.DiNTS(space, 1, CLASSES, spatial_dims=dims, node_a=nodes)


def lattices(dims: int) -> list:
    "Networks whose blocks each go up and down between all resolutions, and one that goes twice"
    image = (1, *[64] * dims)
    right = "stem_down.0.mod.3 > " + stages("dints_space[", ("0]", "1]", "2]", "3]"))
    entry, head = "stem_up.3.mod", "stem_finals.1"
    every = f"DiNTS, every path {dims}D"
    twice = f"DiNTS, twice down and up {dims}D"

    def with_every_path():
        return dints(dims)

    def along_a_ladder():
        return dints(dims, LADDER)

    return [
        Network("monai", every, with_every_path, image, right, entry, head),
        Network("monai", twice, along_a_ladder, image, should="told"),
    ]


def anisotropic(dims: int) -> list:
    "A network that halves one axis at a time"
    nets = import_module("monai.networks.nets")
    right = "relu > " + stages("layer", (1, 2, 3, 4))
    image = (1, 128, 128)
    if dims == 3:
        image = (1, 128, 128, 32)

    def make():
        return nets.AHNet(spatial_dims=dims, out_channels=CLASSES)

    name = f"AHNet {dims}D"
    network = Network("monai", name, make, image, right, "up0", "final.up")
    return [network]


def dynamic(dims: int) -> list:
    "nnU-Net's networks for images or volumes"
    unet = import_module("dynamic_network_architectures.architectures.unet")
    conv, norm = {
        2: (nn.Conv2d, nn.InstanceNorm2d),
        3: (nn.Conv3d, nn.InstanceNorm3d),
    }[dims]
    common = {
        "input_channels": 1,
        "n_stages": 4,
        "features_per_stage": [8, 16, 32, 64],
        "conv_op": conv,
        "kernel_sizes": 3,
        "strides": [1, 2, 2, 2],
        "num_classes": CLASSES,
        "n_conv_per_stage_decoder": 1,
        "conv_bias": True,
        "norm_op": norm,
        "norm_op_kwargs": {"affine": True},
        "nonlin": nn.LeakyReLU,
    }
    kinds = {
        "PlainConvUNet": {"n_conv_per_stage": 2},
        "ResidualEncoderUNet": {"n_blocks_per_stage": [1, 3, 4, 4]},
        "ResidualUNet": {"n_blocks_per_stage": 2},
    }
    found = []
    for name, options in kinds.items():
        for deeply in (False, True):
            label = f"{name}, deep supervision {dims}D" if deeply else f"{name} {dims}D"
            options = {**common, **options, "deep_supervision": deeply}

            def make(name=name, options=options):
                kind = getattr(unet, name)
                return kind(**options)

            stages = THEN.join(f"encoder.stages.{i}" for i in range(4))
            entry = "decoder.transpconvs.0"
            head = "decoder.seg_layers.2"
            image = (1, *[32] * dims)
            package = "dynamic-network-architectures"
            found.append(Network(package, label, make, image, stages, entry, head))
    return found


def dynamic_all() -> list:
    "nnU-Net's networks"
    found = dynamic(2)
    found += dynamic(3)
    found += primus_networks()
    return found


def primus_networks() -> list:
    "nnU-Net's transformers: the first has one resolution, the second one a convolutional stem"
    primus = import_module("dynamic_network_architectures.architectures.primus")
    package = "dynamic-network-architectures"
    image = (1, 32, 32, 32)
    patches = ((8, 8, 8), (32, 32, 32))
    down = "down_projection"
    return [
        Network(
            package,
            "PrimusS 3D",
            lambda: primus.PrimusS(1, CLASSES, *patches),
            image,
            should="refused",
        ),
        Network(
            package,
            "PrimusV2S 3D",
            lambda: primus.PrimusV2S(1, CLASSES, *patches),
            image,
            f"{down}.stem > {down}.stages.0 > {down}.stages.1 > {down}",
            "up_projection.decode.0.0",
            "up_projection.decode.2",
        ),
    ]


def stages(prefix: str, numbers: tuple) -> str:
    "Names of stages with these numbers, fine to deep"
    names = [f"{prefix}{n}" for n in numbers]
    return THEN.join(names)


SMP_ENCODERS = {  # encoder -> its features
    "resnet18": RESNET,
    "resnet50": RESNET,
    "resnext50_32x4d": RESNET,
    "timm-skresnet18": RESNET.replace("relu", "act1"),
    "se_resnet50": RESNET.replace("relu", "layer0"),
    "efficientnet-b0": "encoder._swish > " + stages("encoder._blocks.", (2, 4, 8, 15)),
    "timm-efficientnet-b0": "encoder.bn1 > " + stages("encoder.blocks.", (1, 2, 4, 6)),
    "mit_b0": "encoder[2] > encoder[3] > encoder[4] > encoder[5]",
    "mobilenet_v2": stages("encoder.features.", (1, 3, 6, 13, 18)),
    "densenet121": "encoder.features.relu0 > encoder.features.transition1.relu > "
    "encoder.features.transition2.relu > encoder.features.transition3.relu > "
    "encoder.features.norm5",
    "vgg11_bn": stages("encoder.features.", (2, 6, 13, 20, 27, 28)),
    "vgg16": stages("encoder.features.", (3, 8, 15, 22, 29, 30)),
    "inceptionv4": stages("encoder.features.", (2, 4, 8, 14, 21)),
    "inceptionresnetv2": "encoder.conv2d_2b > encoder.conv2d_4a > encoder.repeat > "
    "encoder.repeat_1 > encoder.conv2d_7b",
    "dpn68": "encoder.features.conv1_1.act > encoder[2] > encoder[3] > encoder[4] > "
    "encoder[5]|encoder.features.conv5_bn_ac",
    "xception": "encoder.relu2 > encoder.block1 > encoder.block2 > encoder.block11 > encoder.bn4",
    "mobileone_s0": stages("encoder.stage", (0, 1, 2, 3, 4)),
    "timm-regnety_002": "encoder.model.stem > " + stages("encoder.model.s", (1, 2, 3, 4)),
    "timm-res2net50_26w_4s": "encoder.model.act1 > " + stages("encoder.model.layer", (1, 2, 3, 4)),
    "timm-gernet_s": "encoder.model.stem > "
    + stages("encoder.model.stages_", (0, 1, 2))
    + " > encoder.model.final_conv",
    "timm-mobilenetv3_large_100": stages("encoder.model.blocks.", (0, 1, 2, 4, 6)),
    "tu-convnext_tiny": stages("encoder.model.stages_", (0, 1, 2, 3)),
    "tu-swin_tiny_patch4_window7_224": "encoder[2] > encoder[3] > encoder[4] > encoder[5]",
    "tu-maxvit_tiny_tf_224": "encoder.model.stem > "
    + stages("encoder.model.stages_", (0, 1, 2, 3)),
    "tu-pvt_v2_b0": stages("encoder.model.stages_", (0, 1, 2, 3)),
    "tu-caformer_s18": stages("encoder.model.stages_", (0, 1, 2, 3)),
    "tu-hrnet_w18": "encoder.model.act1 > " + stages("encoder.model.incre_modules.", (0, 1, 2, 3)),
    "tu-dla34": stages("encoder.model.level", (0, 1, 2, 3, 4, 5)),
    "tu-darknet53": "encoder.model.stem_conv1 > "
    + stages("encoder.model.stages_", (0, 1, 2, 3, 4)),
}
HEAD = "segmentation_head.0"
# it takes two maps through 3×3 convolutions of its own
PAN = "encoder.relu > decoder.gau1.conv2 > decoder.gau2.conv2 > encoder.layer4"
# decoder -> features, entry, what should come of it
SMP_DECODERS = {
    "UnetPlusPlus": (RESNET, "decoder.blocks.x_0_0", "right"),
    "MAnet": (RESNET, "decoder.blocks.0", "right"),
    "Linknet": (RESNET, "decoder.blocks.0.block.1", "right"),
    "FPN": (RESNET, "decoder.p4", "right"),
    "UPerNet": (RESNET, "decoder.fpn_lateral_blocks.0", "right"),
    "Segformer": (RESNET, "decoder.fuse_stage.0|decoder", "right"),
    "PAN": (PAN, "decoder.gau2", "right"),
    "DeepLabV3Plus": (RESNET.replace(" > encoder.layer3", ""), "decoder.up", "right"),
    # no decoder: the scores are resized
    "PSPNet": ("encoder.relu > encoder.layer1 > decoder", HEAD, "told"),
    "DeepLabV3": ("encoder.relu > encoder.layer1 > encoder.layer4", HEAD, "told"),
}


def smp() -> list:
    "The decoders of segmentation_models_pytorch, and its U-Net with many encoders"
    package = "segmentation-models-pytorch"
    models = import_module("segmentation_models_pytorch")
    options = {"encoder_weights": None, "in_channels": 3, "classes": CLASSES}
    found = []

    def add(decoder, encoder, right, entry, should="right", **more):
        size = 224 if "224" in encoder else 128

        def make():
            kind = getattr(models, decoder)
            return kind(encoder, **options, **more)

        words = [str(value) for value in more.values()]
        label = ", ".join([decoder, encoder, *words])
        image = (3, size, size)
        network = Network(package, label, make, image, right, entry, HEAD, should)
        found.append(network)

    for encoder, right in SMP_ENCODERS.items():
        add("Unet", encoder, right, "decoder.blocks.0")
    for decoder, (right, entry, should) in SMP_DECODERS.items():
        add(decoder, "resnet18", right, entry, should)
    add("Unet", "resnet18", RESNET, "decoder.blocks.0", decoder_attention_type="scse")
    add("Unet", "resnet18", RESNET, "decoder.blocks.0", "told", activation="softmax2d")
    right = SMP_ENCODERS["efficientnet-b0"]
    for block in (2, 4):  # the next block begins with a module that puts out the same map
        same = f"encoder._blocks.{block + 1}._expand_conv.static_padding"
        right = right.replace(f"_blocks.{block} >", f"_blocks.{block}{OR}{same} >")
    add("UnetPlusPlus", "efficientnet-b0", right, "decoder.blocks.x_0_0")
    add("Segformer", "mit_b0", SMP_ENCODERS["mit_b0"], "decoder.fuse_stage.0|decoder")
    add("FPN", "mit_b0", SMP_ENCODERS["mit_b0"], "decoder.p4|decoder.seg_blocks.0.block.0")
    convnext = SMP_ENCODERS["tu-convnext_tiny"]
    add("UPerNet", "tu-convnext_tiny", convnext, "decoder.fpn_lateral_blocks.0")
    return found


def torchvision() -> list:
    "torchvision.segmentation, none of which has a decoder of several resolutions"
    models = import_module("torchvision.models.segmentation")
    should = {
        "fcn_resnet50": "refused",
        "deeplabv3_resnet50": "refused",
        "deeplabv3_mobilenet_v3_large": "refused",
        "lraspp_mobilenet_v3_large": "told",
    }
    found = []
    for name, verdict in should.items():

        def make(name=name):
            cls = getattr(models, name)
            return cls(weights=None, weights_backbone=None, num_classes=CLASSES)

        network = Network("torchvision", name, make, (3, 128, 128), should=verdict)
        found.append(network)
    return found


def transformers() -> list:
    "Networks of transformers that put out a map of logits, and two that do not"
    models = import_module("transformers")
    labels = {"num_labels": CLASSES}
    maps = ["stage1", "stage2", "stage3", "stage4"]
    found = []

    def add(name, make, encoder="", entry="", head="", should="right", size=128):
        image = (3, size, size)
        network = Network("transformers", name, make, image, encoder, entry, head, should)
        found.append(network)

    def segformer():
        config = models.SegformerConfig(**labels)
        return models.SegformerForSemanticSegmentation(config)

    right = stages("segformer.stages.", (0, 1, 2, 3))
    add("SegFormer", segformer, right, "decode_head.linear_fuse", "decode_head.classifier")

    def upernet(backbone, channels):
        config = models.UperNetConfig(
            backbone_config=backbone, auxiliary_in_channels=channels, **labels
        )
        return models.UperNetForSemanticSegmentation(config)

    right = "backbone.embedder.embedder > " + stages("backbone.encoder.stages.", (0, 1, 2, 3))
    entry = "decode_head.fpn_convs.2|decode_head.fpn_convs.2.conv"
    last = "decode_head.classifier"
    backbone = models.ResNetConfig(out_features=maps)
    add("UperNet, ResNet", lambda: upernet(backbone, 1024), right, entry, last)
    right = stages("backbone[feature_maps][", ("0]", "1]", "2]", "3]"))
    swin = models.SwinConfig(out_features=maps)
    add("UperNet, Swin", lambda: upernet(swin, 384), right, entry, last, size=224)

    def dpt():
        config = models.DPTConfig(
            image_size=128,
            hidden_size=96,
            intermediate_size=192,
            num_attention_heads=4,
            neck_hidden_sizes=[32, 64, 128, 128],
            fusion_hidden_size=64,
            **labels,
        )
        return models.DPTForSemanticSegmentation(config)

    fused = stages("neck.fusion_stage.layers.", ("3", "2", "1"))
    right = fused.replace(THEN, f".residual_layer1{THEN}") + ".residual_layer1"
    right += " > neck.reassemble_stage.layers.3"
    add("DPT", dpt, right, "neck.fusion_stage[0]", "head.head.4")

    def beit():
        config = models.BeitConfig(
            image_size=128,
            hidden_size=96,
            intermediate_size=192,
            num_attention_heads=4,
            num_hidden_layers=4,
            out_indices=[1, 2, 3, 4],
            **labels,
        )
        return models.BeitForSemanticSegmentation(config)

    add("BEiT", beit, "fpn.fpn1 > fpn.fpn2 > fpn.fpn3|fpn[2] > fpn.fpn4", entry, last)
    for name in ("MobileViT", "MobileViTV2", "MobileNetV2"):

        def mobile(name=name):
            config_class = getattr(models, f"{name}Config")
            cls = getattr(models, f"{name}ForSemanticSegmentation")
            config = config_class(**labels)
            return cls(config)

        add(name, mobile, should="refused")

    def mask2former():
        config = models.Mask2FormerConfig(**labels)
        return models.Mask2FormerForUniversalSegmentation(config)

    def maskformer():
        config = models.MaskFormerConfig(**labels)
        return models.MaskFormerForInstanceSegmentation(config)

    # these put out a mask for each query
    add("Mask2Former", mask2former, should="told", size=224)
    add("MaskFormer", maskformer, should="told", size=224)
    return found


def others() -> list:
    "U-Nets of small packages"
    found = []

    def add(package, name, make, image, encoder, entry, head, should="right"):
        network = Network(package, name, make, image, encoder, entry, head, should)
        found.append(network)

    unet3d = import_module("unet3d.unet3d")
    linknet = import_module("unet3d.linknet3d")
    image = (1, 64, 64, 64)
    # the pooled map at the end of its encoder has no layer, so it is no resolution
    right = THEN.join(f"downs.{i}.0" for i in range(4))
    add("unet3d", "UNet3d", unet3d.UNet3d, image, right, "ups.1.up_conv", "out")
    right = "init.2#1 > " + stages("downs.", (0, 1, 2, 3))
    add("unet3d", "LinkNet3d", linknet.LinkNet3d, image, right, "ups.0.1", "out.2")
    model = import_module("unet_pytorch.model")
    image = (1, 64, 64)
    right = "in_conv > down1 > down2 > down3 > down4"
    add("unet-pytorch", "UNet", model.UNet, image, right, "up1.up", "out_conv.conv_op", "told")
    yaunet = import_module("yaunet.unet")
    right = "down.0 > down.1 > down.2 > down.3 > mid"
    add(
        "yaunet", "UNet", lambda: yaunet.UNet(1, CLASSES), image, right, "up.0.upsample", "proj_out"
    )
    return found


PACKAGES = {
    "monai": lambda: [*monai_2d(), *monai_3d()],
    "dynamic-network-architectures": dynamic_all,
    "segmentation-models-pytorch": smp,
    "torchvision": torchvision,
    "transformers": transformers,
    "others": others,
}


# ---- comparing


def matches(found: str, right: str) -> bool:
    "Whether names of maps are the right ones, of which each may be one of several"
    names = found.split(THEN)
    allowed = right.split(THEN)
    if len(names) != len(allowed):
        return False
    for name, choices in zip(names, allowed, strict=True):
        if name not in choices.split(OR):
            return False
    return True


def wrapped(network: Network) -> tuple:
    "The wrapped network, and the sentences of its warnings; on the meta device where that works"
    image = torch.zeros(1, *network.image)
    error = None
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                net = network.make()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model = EGCNN(net, (image, *network.more), verbose=False)
            _expect_a_pass(model, image, network.more)
            return model, _told(caught)
        except InputError:
            raise
        except Exception as e:  # whatever a network may raise on the meta device
            error = e
    raise RuntimeError(f"{network.name} cannot be made or run.") from error


def _expect_a_pass(model, image, more):
    "Raise where the wrapped network does not run, or not to the size of its own logits"
    weight, *_ = model.parameters()
    moved = [value.to(weight.device) for value in (image, *more)]
    model.eval()
    with torch.no_grad():
        out = model(*moved, full=True)
    assert out.logits.shape == out.main.shape


def _told(caught):
    "The sentences of the warnings of EG-CNN"
    found = []
    for warning in caught:
        if warning.filename == __file__:
            sentence = str(warning.message)
            found.append(sentence)
    return found


def look(network: Network) -> Row:
    "What is found in a network, and whether it is right"
    row = Row(
        package=network.package,
        network=network.name,
        axes=len(network.image) - 1,
        verdict="refused",
        should=network.should,
        encoder="",
        entry="",
        head="",
        right_encoder=network.encoder,
        right_entry=network.entry,
        right_head=network.head,
        message="",
    )
    try:
        model, told = wrapped(network)
    except InputError as e:
        row.message = str(e)
        return row
    row.encoder = THEN.join(name for name, _ in model.found["encoder"])
    row.entry, _ = model.found["entry"]
    row.head = model.found["head"][0] or ""
    row.message = " ".join(told)
    row.verdict = verdict(row, told)
    return row


def verdict(row: Row, told: list) -> str:
    "right; told: wrong or doubtful, and a warning says so; or wrong in silence"
    for sentence in told:
        if not sentence.startswith("The edge stream adds"):
            return "told"
    if not matches(row.encoder, row.right_encoder):
        return "wrong"
    if not matches(row.entry, row.right_entry):
        return "wrong"
    if row.right_head and not matches(row.head, row.right_head):
        return "wrong"
    return "right"


# ---- files


def write(path: Path, packages: list) -> None:
    "A row for each network of some packages"
    names = [field.name for field in fields(Row)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for package in packages:
            networks = PACKAGES[package]
            for network in networks():
                row = look(network)
                print(row.verdict, row.package, row.network, flush=True)
                values = asdict(row)
                writer.writerow(values)
                file.flush()


def read(paths: list) -> list:
    "The rows of several files"
    rows = []
    for path in paths:
        with open(path, newline="", encoding="utf-8") as file:
            rows += list(csv.DictReader(file))
    return rows


def counted(rows: list) -> list:
    "Lines of a table: networks of each verdict, by package"
    verdicts = ("right", "told", "refused", "wrong")
    lines = [
        "| package | networks | right | told | refused | wrong |",
        "|---|---|---|---|---|---|",
    ]
    packages = dict.fromkeys(row["package"] for row in rows)
    for package in packages:
        found = [row["verdict"] for row in rows if row["package"] == package]
        total = len(found)
        cells = [package, str(total)]
        for verdict in verdicts:
            count = found.count(verdict)
            cells.append(str(count))
        line = " | ".join(cells)
        lines.append(f"| {line} |")
    return lines


def listed(rows: list) -> list:
    "Lines of a table: what was found in each network"
    lines = [
        "| package | network | verdict | encoder, fine to deep | entry | head | warning or error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        names = [row[key] for key in ("encoder", "entry", "head")]
        cells = [row["package"], row["network"], row["verdict"]]
        cells += [f"`{name}`" if name else "" for name in names]
        message = row["message"]
        cells.append(message.replace("|", "\\|"))
        line = " | ".join(cells)
        lines.append(f"| {line} |")
    return lines


def merge(folder: Path, paths: list) -> None:
    "Write the rows of several files as networks.csv and table.md in a folder"
    rows = read(paths)
    names = list(rows[0])
    data = folder / "networks.csv"
    with open(data, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = [*counted(rows), "", *listed(rows), ""]
    text = "\n".join(lines)
    table = folder / "table.md"
    table.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--merge":
        merge(Path(sys.argv[2]), sys.argv[3:])
    else:
        write(Path(sys.argv[1]), sys.argv[2:])
