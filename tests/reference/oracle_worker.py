"""Child process of the tests: loads the oracle named on the command line and answers requests from its stdin.

A request is a pickled (method of the Oracle, operation, tensors, settings, further arguments). The reply to `bind`
holds the translated outputs, upstream's raw result, the tensors after the call, and for tensors that require gradient
the gradients of the sum of all outputs; that to `elsewhere` the outputs on a device that is not the CPU; that to any
other method what it answers.
"""

import os
import pickle
import sys

import torch

from reference import OracleError, OracleSpec, load
from tests.cleanroom.elsewhere import Device, fetched


def answer(oracle, method, operation, *given):
    if method == "era":
        return oracle.era(operation)
    if method == "elsewhere":
        tensors, settings = given
        with Device() as device:
            bound = oracle.bind(operation, {name: device.put(tensor) for name, tensor in tensors.items()}, settings)
            return {name: fetched(value) for name, value in bound.translate(bound()).items()}
    if method != "bind":
        return getattr(oracle, method)(operation, *given)
    tensors = given[0]
    bound = oracle.bind(operation, *given)
    raw = bound()
    outputs = bound.translate(raw)
    leaves = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    used = [output.sum() for output in outputs.values() if output.requires_grad]
    found = torch.autograd.grad(used, list(leaves.values())) if leaves else ()
    gradients = dict(zip(leaves, found, strict=True))
    return {"outputs": outputs, "raw": raw, "tensors": tensors, "gradients": gradients}


def main():
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what upstream prints must not mix with the replies

    def reply(*message):
        pickle.dump(message, replies)
        replies.flush()

    try:
        oracle = load(OracleSpec.parse(sys.argv[1]))
    except OracleError as error:
        return reply("error", str(error))
    reply("ready", (oracle.name, oracle.version, oracle.source, oracle.operations))
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return None
        try:
            reply("answer", answer(oracle, *request))
        except Exception as error:  # whatever upstream raises is the test's to judge
            reply("error", f"{type(error).__name__}: {error}")


main()
