"""What a comparator may ask upstream for, in tests without upstream."""

from harness.verdict import Inquiry


def asking(quantities=None, era=None):
    """An inquiry that knows `quantities(tensors)` and `era`, and fails the test where more is asked."""

    def nothing(*_):
        raise AssertionError("upstream was asked again")

    known = (lambda name, tensors, settings: quantities(tensors)) if quantities else nothing
    return Inquiry(nothing, known, nothing, lambda name: era or {})
