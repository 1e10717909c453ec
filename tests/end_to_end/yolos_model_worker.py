"""Child process: a tiny random YOLOS of transformers with its own loss and with ours in its place; prints JSON.

The package itself is imported, not the parts that the adapters need, so it takes a process of its own. For a few steps
of training: the losses of each side from the same weights, and the worst difference of a parameter's gradient as a
share of that parameter's largest.
"""

import json
import os
import sys
from copy import deepcopy

import torch

from cleanroom.losses.set_criterion import ForObjectDetectionLoss
from reference import OracleSpec, locate
from reference.packages import PACKAGES
from reference.torchvision_stub import stand_in_for_torchvision

CLASSES, QUERIES, SIDES, STEPS = 5, 12, (64, 96), 3


def tiny():
    """Two layers of width 32."""
    from transformers import YolosConfig, YolosForObjectDetection

    config = YolosConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=list(SIDES),
        patch_size=16,
        num_detection_tokens=QUERIES,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return YolosForObjectDetection(config).train()


def synthetic(counts=(3, 0, 5)):
    """Noise, and as many boxes of each image as `counts` says."""
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(len(counts), 3, *SIDES, generator=generator)
    labels = []
    for count in counts:
        sides = 0.1 + 0.4 * torch.rand(count, 2, generator=generator)
        centres = sides / 2 + (1 - sides) * torch.rand(count, 2, generator=generator)
        classes = torch.randint(0, CLASSES, (count,), generator=generator)
        labels.append({"class_labels": classes, "boxes": torch.cat((centres, sides), 1)})
    return images, labels


def step(model, images, labels):
    """Loss and its entries, and the gradients of the parameters."""
    model.zero_grad()
    found = model(images, labels=labels)
    found.loss.backward()
    losses = {"loss": found.loss.item(), **{name: float(value) for name, value in found.loss_dict.items()}}
    return losses, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def main():
    """Train a few steps; both sides take every step from the same weights."""
    torch.manual_seed(0)
    theirs, batch = tiny(), synthetic()
    optimiser = torch.optim.SGD(theirs.parameters(), lr=1e-2)
    found = {"theirs": [], "ours": [], "worst": [], "parameters": []}
    for _ in range(STEPS):
        ours = deepcopy(theirs)
        ours.loss_function = ForObjectDetectionLoss
        (expected, a), (losses, b) = (step(model, *batch) for model in (theirs, ours))
        # The gradient of a key's bias is zero but for rounding: it is held to the model's largest.
        least = max(value.abs().max() for value in a.values()) * 1e-4
        differences = [((b[name] - a[name]).abs().max() / a[name].abs().max().clamp(min=least)).item() for name in a]
        found["theirs"].append(expected)
        found["ours"].append(losses)
        found["worst"].append(max(differences))
        found["parameters"].append(len(a) if set(a) == set(b) else 0)
        optimiser.step()
    print(json.dumps(found))


os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
stand_in_for_torchvision(PACKAGES["transformers"].torchvision)
sys.path.insert(0, str(locate(OracleSpec.parse(sys.argv[1])).root))
main()
