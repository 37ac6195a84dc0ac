"""Click logs in files, and made ones, as batches: `Dataset.open(job).batches("train", ...)`."""

from penstock.data.dataset import Dataset
from penstock.data.loader import Loader
from penstock.data.parts import Part
from penstock.data.synthetic import write_synthetic

__all__ = ["Dataset", "Loader", "Part", "write_synthetic"]
