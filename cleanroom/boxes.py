"""Boxes under one name: anchor points, the codecs between boxes and distances, and overlaps with gradient."""

from cleanroom.anchors import make_anchors
from cleanroom.box_iou import bbox_iou
from cleanroom.codecs import bbox2dist, dist2bbox
from cleanroom.dfl_decode import dfl_decode
from cleanroom.probiou import batch_probiou, probiou

__all__ = ["batch_probiou", "bbox2dist", "bbox_iou", "dfl_decode", "dist2bbox", "make_anchors", "probiou"]
