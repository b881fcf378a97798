"""Data sets: folders of crops, folders of point clouds, what is done to them on their way to a model."""

from .clouds import CloudDataset, CloudSplit, open_clouds
from .crops import ImageDataset, ImageSplit, open_crops
from .datasets import open_dataset, validate_protocol
from .image_transforms import ImageEvalTransform, ImageTrainTransform
from .images import read_image
from .layouts import ImageRecord, Listing, list_images
from .samplers import BalancedSampler, ClassSampler, PKSampler, ShuffleSampler
from .transforms import EvalTransform, TrainTransform

__all__ = [
    "BalancedSampler",
    "ClassSampler",
    "CloudDataset",
    "CloudSplit",
    "EvalTransform",
    "ImageDataset",
    "ImageEvalTransform",
    "ImageRecord",
    "ImageSplit",
    "ImageTrainTransform",
    "Listing",
    "PKSampler",
    "ShuffleSampler",
    "TrainTransform",
    "list_images",
    "open_clouds",
    "open_crops",
    "open_dataset",
    "read_image",
    "validate_protocol",
]
