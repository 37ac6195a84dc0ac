"""Click logs in files, and made ones, as batches: `Dataset.open(job).batches("train", ...)`."""

from penstock.data.batches.loader import Loader
from penstock.data.dataset import Dataset
from penstock.data.formats.synthetic import write_synthetic
from penstock.data.plan.parts import Part

__all__ = ["Dataset", "Loader", "Part", "write_synthetic"]
