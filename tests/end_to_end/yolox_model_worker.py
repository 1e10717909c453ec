"""Child process: a YOLOX-nano of upstream's classes with its own loss and with ours in its place; prints JSON.

An upstream release needs a process of its own (`reference.load`). The model has random weights and sees synthetic
images. For every way of training: losses of a few steps of each side, the second half with L1 as in the last epochs,
and at each the worst difference of a parameter's gradient as a share of that parameter's largest.
"""

import json
import sys
from copy import deepcopy

import torch

from cleanroom.losses.yolox import YOLOXLoss
from reference import OracleSpec, load

CLASSES, SIDE, STEPS = 4, 160, 4
WAYS = {"float32": None, "static": None, "autocast": torch.bfloat16}


def nano():
    """Depth 0.33, width 0.25, depthwise convolutions."""
    from yolox.models.yolo_head import YOLOXHead
    from yolox.models.yolo_pafpn import YOLOPAFPN
    from yolox.models.yolox import YOLOX

    channels = [256, 512, 1024]
    backbone = YOLOPAFPN(0.33, 0.25, in_channels=channels, depthwise=True)
    head = YOLOXHead(CLASSES, 0.25, in_channels=channels, depthwise=True)
    head.initialize_biases(1e-2)
    return YOLOX(backbone, head).train()


def synthetic(images=4, most=5):
    """Noise with a bright rectangle an object, the last image without any; label rows in pixels, padded with zeros."""
    generator = torch.Generator().manual_seed(1)
    pictures, labels = torch.rand(images, 3, SIDE, SIDE, generator=generator) * 80, torch.zeros(images, most, 5)
    for image in range(images - 1):
        for row in range(2 + image):
            width, height = torch.rand(2, generator=generator) * SIDE / 2 + 10
            x, y = torch.rand(2, generator=generator) * (SIDE - torch.stack((width, height)))
            cls = int(torch.randint(0, CLASSES, (1,), generator=generator))
            left, top, right, bottom = torch.stack((x, y, x + width, y + height)).int().tolist()
            pictures[image, cls % 3, top:bottom, left:right] += 150
            labels[image, row] = torch.stack((torch.tensor(float(cls)), x + width / 2, y + height / 2, width, height))
    return pictures, labels


def step(model, batch, autocast):
    """Losses of a step, and the gradients of the parameters."""
    model.zero_grad()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        outputs = model(*batch)
    outputs["total_loss"].backward()
    losses = {name: float(torch.as_tensor(value).detach()) for name, value in outputs.items()}
    return losses, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def compare(way):
    """Both sides take every step from the same weights: a rounding of one step would decide anchors of the next."""
    torch.manual_seed(0)
    theirs, batch = nano(), synthetic()
    optimiser = torch.optim.SGD(theirs.parameters(), lr=1e-3, momentum=0.9)
    found = {"theirs": [], "ours": [], "worst": [], "parameters": []}
    for number in range(STEPS):
        theirs.head.use_l1 = number >= STEPS // 2
        ours = deepcopy(theirs)
        ours.head.get_losses = YOLOXLoss(CLASSES, path="static" if way == "static" else "auto")
        (expected, a), (losses, b) = (step(model, batch, WAYS[way]) for model in (theirs, ours))
        differences = [((b[name] - a[name]).abs().max() / a[name].abs().max().clamp(min=1e-12)).item() for name in a]
        found["theirs"].append(expected)
        found["ours"].append(losses)
        found["worst"].append(max(differences))
        found["parameters"].append(len(a) if set(a) == set(b) else 0)
        optimiser.step()
    return found


if __name__ == "__main__":
    load(OracleSpec.parse(sys.argv[1]))
    torch.set_num_threads(1)
    print(json.dumps({way: compare(way) for way in WAYS}))
