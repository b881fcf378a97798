"""Data sets: folders of crops, folders of point clouds, what is done to a cloud on its way to a model."""

from .clouds import CloudDataset, CloudSplit, open_dataset, validate_protocol
from .images import read_image
from .layouts import ImageRecord, Listing, list_images
from .samplers import BalancedSampler, ClassSampler, PKSampler
from .transforms import EvalTransform, TrainTransform

__all__ = [
    "BalancedSampler",
    "ClassSampler",
    "CloudDataset",
    "CloudSplit",
    "EvalTransform",
    "ImageRecord",
    "Listing",
    "PKSampler",
    "TrainTransform",
    "list_images",
    "open_dataset",
    "read_image",
    "validate_protocol",
]
