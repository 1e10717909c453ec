"""Child process: a small ultralytics detector with upstream's criterion and with ours in its place; prints JSON.

An upstream release needs a process of its own (`reference.load`). The model is built from a configuration, has random
weights, and sees synthetic images. For every head: the criterion's class, loss vectors and items of a few steps of
training of each side, and the worst difference of a parameter's gradient as a share of that parameter's largest.
"""

import json
import sys
from copy import deepcopy
from types import SimpleNamespace

import torch

from cleanroom.losses.v8_detection import v8DetectionLoss
from cleanroom.losses.v10_detection import E2EDetectLoss, E2ELoss
from reference import OracleSpec, load

CLASSES, SIDE, STEPS = 4, 128, 3
OURS = {criterion.__name__: criterion for criterion in (v8DetectionLoss, E2EDetectLoss, E2ELoss)}
HEADS = {
    "bins": {"reg_max": 16},
    "distances": {"reg_max": 1},
    "end-to-end": {"reg_max": 16, "end2end": True},
    "end-to-end distances": {"reg_max": 1, "end2end": True},
    "bins under autocast": {"reg_max": 16, "autocast": True},
}


def configuration(head):
    """Three levels, a few channels each: rows are (from, repeats, module, arguments)."""
    backbone = [
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [24, 3, 2]],
        [-1, 1, "C2f", [24, True]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "C2f", [32, True]],
        [-1, 1, "Conv", [48, 3, 2]],
        [-1, 1, "SPPF", [48, 5]],
    ]
    top_down = [
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 5], 1, "Concat", [1]],
        [-1, 1, "C2f", [32]],
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 3], 1, "Concat", [1]],
        [-1, 1, "C2f", [24]],
        [[13, 10, 7], 1, "Detect", ["nc"]],
    ]
    return {"nc": CLASSES, "depth_multiple": 1.0, "width_multiple": 1.0, "backbone": backbone, "head": top_down, **head}


def synthetic(images=4):
    """Noise with a bright rectangle an object, the last image without any; labels as the trainer gives them."""
    generator = torch.Generator().manual_seed(1)
    pictures = torch.rand(images, 3, SIDE, SIDE, generator=generator) * 0.3
    index, classes, boxes = [], [], []
    for image in range(images - 1):
        for _ in range(3):
            width, height = torch.rand(2, generator=generator) * 0.4 + 0.1
            x, y = torch.rand(2, generator=generator) * (1 - torch.stack((width, height)))
            cls = int(torch.randint(0, CLASSES, (1,), generator=generator))
            left, top, right, bottom = (torch.stack((x, y, x + width, y + height)) * SIDE).int().tolist()
            pictures[image, cls % 3, top:bottom, left:right] += 0.6
            index.append(image)
            classes.append(cls)
            boxes.append(torch.stack((x + width / 2, y + height / 2, width, height)))
    labels = {
        "batch_idx": torch.tensor(index, dtype=torch.float32),
        "cls": torch.tensor(classes, dtype=torch.float32).view(-1, 1),
        "bboxes": torch.stack(boxes),
    }
    return {"img": pictures, **labels}


def train(model, batch, autocast):
    """Loss vectors, items and first gradients of a few steps."""
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    losses, items, gradients = [], [], {}
    for _ in range(STEPS):
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, of_step = model(batch)
        loss.sum().backward()
        if not gradients:
            gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
        optimiser.step()
        losses.append(loss.tolist())
        items.append({name: value.item() for name, value in of_step.items()})
    return losses, items, gradients


def compare(autocast=False, **head):
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    theirs = DetectionModel(configuration(head), ch=3, nc=CLASSES, verbose=False)
    theirs.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5, epochs=10)
    theirs.train()
    ours = deepcopy(theirs)
    theirs.criterion = theirs.init_criterion()
    kind = type(theirs.criterion).__name__
    ours.criterion = OURS[kind](ours)
    batch = synthetic()
    expected, found = (train(model, dict(batch), autocast) for model in (theirs, ours))
    worst = max(
        ((found[2][name] - value).abs().max() / value.abs().max().clamp(min=1e-12)).item()
        for name, value in expected[2].items()
    )
    return {
        "criterion": kind,
        "parameters": sorted(expected[2]) == sorted(found[2]) and len(expected[2]),
        "worst": worst,
        "theirs": expected[:2],
        "ours": found[:2],
    }


if __name__ == "__main__":
    load(OracleSpec.parse(sys.argv[1]))
    torch.set_num_threads(1)
    print(json.dumps({name: compare(**head) for name, head in HEADS.items()}))
