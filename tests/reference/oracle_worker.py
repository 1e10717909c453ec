"""Child process of the tests: loads the oracle named on the command line and answers requests from its stdin.

A request is a pickled (method of the Oracle, operation, tensors, settings). The reply to `bind` holds the
translated outputs, upstream's raw result, and the tensors after the call; that to `quantities` the quantities, that
to `era` the era.
"""

import os
import pickle
import sys

from reference import OracleError, OracleSpec, load


def answer(oracle, method, operation, tensors, settings):
    if method == "quantities":
        return oracle.quantities(operation, tensors, settings)
    if method == "era":
        return oracle.era(operation)
    bound = oracle.bind(operation, tensors, settings)
    raw = bound()
    return {"outputs": bound.translate(raw), "raw": raw, "tensors": tensors}


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
