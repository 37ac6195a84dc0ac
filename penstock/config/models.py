"""Models: which one, and its widths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from penstock.config.base import Config, PositiveFloat, PositiveInt, Probability, Repeats, Width


class Regularized(Config):
    """Fields of all models but those of the user's own."""

    dropout: Probability = 0.0
    """In training, this share of the outputs of each hidden layer of the model's MLPs is 0, and the
    others are larger by as much.
    """
    batch_norm: bool = False
    """Whether hidden layers of the model's MLPs are normalized over the batch, before their
    activation. A batch of one sample is normalized as in evaluation, by what was seen before.
    """


class DLRMConfig(Regularized):
    """DLRM (arXiv:1906.00091).

    Bottom MLP on numbers, pairwise dot products with the embeddings, top MLP.
    """

    kind: Literal["dlrm"] = "dlrm"
    bottom: tuple[Width, ...] = (64, 32)
    """Hidden widths of the bottom MLP; its output has the embedding dim."""
    top: tuple[Width, ...] = (128, 64)
    """Hidden widths of the top MLP; its output is one logit."""


class DCNConfig(Regularized):
    """DCN-v2: cross layers beside a deep MLP (arXiv:2008.13535)."""

    kind: Literal["dcn_v2"] = "dcn_v2"
    cross_layers: Repeats = 3
    low_rank: Width | None = None
    """Rank of the cross matrices; null: full."""
    deep: tuple[Width, ...] = (128, 64)
    """Widths of the deep MLP."""
    structure: Literal["parallel", "stacked"] = "parallel"
    """`parallel`: cross layers and deep MLP side by side; `stacked`: the MLP reads the cross
    layers' output.
    """


class DeepFMConfig(Regularized):
    """DeepFM (arXiv:1703.04247).

    A factorization machine and a deep MLP over the same vectors. All features have one dim D: the
    last column is the first-order weight of a key, the D - 1 before are its vector.
    """

    kind: Literal["deepfm"] = "deepfm"
    deep: tuple[Width, ...] = (128, 64)
    """Hidden widths of the deep MLP; its output is one logit."""
    numeric_dim: Width = 8
    """Width of the vectors of numeric columns where there is no feature; else it is D - 1."""


class WideDeepConfig(Regularized):
    """Wide & Deep (arXiv:1606.07792): a linear model beside a deep MLP.

    The last column of a wide feature is its weight in the linear model, and the columns before are
    its embedding. A wide feature of dim 1 is wide alone; for crossed columns that is the rule.
    """

    kind: Literal["wide_deep"] = "wide_deep"
    deep: tuple[Width, ...] = (128, 64)
    """Hidden widths of the deep MLP; its output is one logit."""
    wide: tuple[str, ...] = ("*",)
    """Names or globs of the features that are wide."""


class AutoIntConfig(Regularized):
    """AutoInt (arXiv:1810.11921): layers of attention among the fields.

    A field is a feature or a numeric column.
    """

    kind: Literal["autoint"] = "autoint"
    layers: Repeats = 3
    heads: Repeats = 2
    """Must divide `attention`."""
    attention: Width = 64
    """Width of a field behind each layer, of all heads together."""
    deep: tuple[Width, ...] = ()
    """Hidden widths of an MLP beside the attention (AutoInt+); empty: none."""
    numeric_dim: Width = 16
    """Width of the vectors of numeric columns where there is no feature; else it is theirs."""

    @model_validator(mode="after")
    def _heads_divide(self) -> AutoIntConfig:
        if self.attention % self.heads:
            raise ValueError(f"heads {self.heads} does not divide attention {self.attention}")
        return self


class XDeepFMConfig(Regularized):
    """xDeepFM (arXiv:1803.05170).

    A compressed interaction network, a deep MLP and a linear term of the same fields. All features
    have one dim D: the last column is the weight of a key in the linear term, the D - 1 before are
    its vector.
    """

    kind: Literal["xdeepfm"] = "xdeepfm"
    interactions: Annotated[tuple[Width, ...], Field(min_length=1)] = (64, 64)
    """Vectors that each layer of the interaction network comes to."""
    deep: tuple[Width, ...] = (128, 64)
    """Hidden widths of the deep MLP; its output is one logit."""
    numeric_dim: Width = 8
    """Width of the vectors of numeric columns where there is no feature; else it is D - 1."""


class FinalMLPConfig(Regularized):
    """FinalMLP (arXiv:2304.00902): two MLPs of gated inputs, joined by a bilinear form."""

    kind: Literal["final_mlp"] = "final_mlp"
    first: Annotated[tuple[Width, ...], Field(min_length=1)] = (128, 64)
    """Widths of one MLP."""
    second: Annotated[tuple[Width, ...], Field(min_length=1)] = (128, 64)
    """Widths of the other."""
    heads: Repeats = 4
    """Parts of both outputs between which the bilinear form works; must divide their widths."""
    gate: tuple[Width, ...] | None = (64,)
    """Hidden widths of the MLPs that weigh the inputs of each stream; null: no weighing."""
    first_context: tuple[str, ...] = ()
    """Names or globs of the features that the first gate reads; empty: a learnt vector."""
    second_context: tuple[str, ...] = ()
    """Of the second gate."""

    @model_validator(mode="after")
    def _heads_divide(self) -> FinalMLPConfig:
        for name, width in (("first", self.first[-1]), ("second", self.second[-1])):
            if width % self.heads:
                raise ValueError(
                    f"heads {self.heads} does not divide {width}, the last width of {name}"
                )
        if self.gate is None and (self.first_context or self.second_context):
            raise ValueError("first_context and second_context are read by gates, and gate is null")
        return self


class MaskNetConfig(Regularized):
    """MaskNet (arXiv:2102.07619): blocks that multiply what they read by a mask of all inputs."""

    kind: Literal["masknet"] = "masknet"
    structure: Literal["parallel", "serial"] = "parallel"
    """`parallel`: every block reads the normalized fields; `serial`: the block before."""
    blocks: Annotated[tuple[Width, ...], Field(min_length=1)] = (64, 64)
    """Outputs of each block."""
    reduction: Annotated[float, Field(gt=0, le=64, allow_inf_nan=False)] = 2.0
    """Hidden width of the MLP of a mask, over its output."""
    deep: tuple[Width, ...] = (64,)
    """Hidden widths of the MLP on the blocks (the paper's serial model has none: `[]`)."""
    numeric_dim: Annotated[Width, Field(ge=2)] = 8
    """Width of the vectors of numeric columns where there is no feature; else it is theirs."""


class MultiTask(Regularized):
    """Fields of the models that predict several labels (`data.label` is a list)."""

    task_weights: Mapping[str, PositiveFloat] = {}
    """By name of the label: factor of its loss in the sum; 1 where it is not named."""


class SharedBottomConfig(MultiTask):
    """Shared bottom: one MLP of all inputs, and on it a tower for each label."""

    kind: Literal["shared_bottom"] = "shared_bottom"
    bottom: tuple[Width, ...] = (128, 64)
    """Widths of the shared MLP."""
    towers: tuple[Width, ...] = (32,)
    """Hidden widths of each tower; its output is one number."""


class MMoEConfig(MultiTask):
    """Multi-gate mixture of experts (doi:10.1145/3219819.3220007).

    Several MLPs of all inputs; each label has a gate that mixes them, and a tower on the mix.
    """

    kind: Literal["mmoe"] = "mmoe"
    experts: Repeats = 4
    expert: Annotated[tuple[Width, ...], Field(min_length=1)] = (64, 32)
    """Widths of each expert."""
    towers: tuple[Width, ...] = (32,)
    """Hidden widths of each tower; its output is one number."""


class PLEConfig(MultiTask):
    """Progressive layered extraction (doi:10.1145/3383313.3412236).

    Layers of experts, some of each label and some of all; a gate of each label mixes its own and
    the shared ones, a tower of each label reads what comes out.
    """

    kind: Literal["ple"] = "ple"
    layers: Repeats = 2
    """1: the paper's CGC, customized gate control."""
    shared_experts: Repeats = 2
    task_experts: Repeats = 2
    """Of each label, in each layer."""
    expert: Annotated[tuple[Width, ...], Field(min_length=1)] = (64, 32)
    """Widths of each expert."""
    towers: tuple[Width, ...] = (32,)
    """Hidden widths of each tower; its output is one number."""


class ESMMConfig(MultiTask):
    """ESMM, entire space multi-task model (arXiv:1804.07931).

    Labels in the order in which they happen, for instance a click and then a purchase: each is 1
    only where the one before is. An MLP for each gives its probability where the one before
    happened; what is learnt and scored is their product, on all rows.
    """

    kind: Literal["esmm"] = "esmm"
    towers: tuple[Width, ...] = (128, 64)
    """Hidden widths of the MLP of each label."""


class DINConfig(Regularized):
    """DIN, deep interest network (arXiv:1706.06978).

    A small MLP compares the candidate with each key of a sequence, what the user has had before,
    and so weighs their sum; a deep MLP reads it beside all other inputs.
    """

    kind: Literal["din"] = "din"
    candidate: str
    """The feature whose vector is compared, for instance the item; one key a row."""
    sequence: str
    """A feature of pooling `sequence`, of the candidate's table."""
    attention: tuple[Width, ...] = (32,)
    """Hidden widths of the MLP that weighs a key."""
    activation: Literal["dice", "prelu"] = "dice"
    deep: tuple[Width, ...] = (200, 80)
    """Hidden widths of the deep MLP; its output is one logit."""


class HSTUConfig(Regularized):
    """HSTU, hierarchical sequential transducer (arXiv:2402.17152).

    Layers of attention without softmax over a sequence, with the candidate as its last position; a
    deep MLP reads what comes out there beside all other inputs.
    """

    kind: Literal["hstu"] = "hstu"
    candidate: str
    """The feature that is the last position, for instance the item; one key a row."""
    sequence: str
    """A feature of pooling `sequence`, oldest key first, of the candidate's table."""
    layers: Repeats = 2
    heads: Repeats = 1
    """Must divide the embedding dim."""
    deep: tuple[Width, ...] = (64,)
    """Hidden widths of the deep MLP; its output is one logit."""


class TwoTowerConfig(Regularized):
    """Two towers, for retrieval: one MLP of the user, one of the item, and their similarity.

    Learns by a softmax over the items of the batch, corrected for how often each item comes
    (doi:10.1145/3298689.3346996): for each row of label 1, its item against those of the other
    rows. Of a log of positives alone, give neither `label` nor `negatives`.
    """

    kind: Literal["two_tower"] = "two_tower"
    items: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names or globs of the item's features; all others, and numbers, are the user's."""
    user: tuple[Width, ...] = (64,)
    """Hidden widths of the user's tower."""
    item: tuple[Width, ...] = (64,)
    """Hidden widths of the item's tower."""
    dim: Width = 32
    """Width of the vectors that are compared."""
    similarity: Literal["cosine", "dot"] = "cosine"
    temperature: PositiveFloat = 0.1
    """Similarities are divided by it."""
    frequency_memory: PositiveInt = 1000
    """Steps after which a count of an item has faded to 1/e."""
    frequency_buckets: PositiveInt = 1 << 18
    """Counters of items, twice; 8 bytes each. More than there are items, for exact counts."""


class CustomModel(Config):
    """A module of the user's.

    `factory(num_numeric=..., feature_dims=(...), **arguments)` returns it. Its
    `forward(dense [B, num_numeric], embeddings [B, sum of feature_dims])` returns logits [B].

    A job with features of pooling `sequence` also gives it `sequences={name: (length, dim)}`, and
    `forward` a third argument, lengths [B, number of sequences]. A job of L labels, L > 1, also
    gives it `num_tasks=L`, and expects [B, L].
    """

    kind: Literal["custom"] = "custom"
    factory: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")]
    """`module:name` of a class or function on the Python path."""
    arguments: Mapping[str, Any] = {}
    task_weights: Mapping[str, PositiveFloat] = {}
    """By name of the label: factor of its loss in the sum; 1 where it is not named."""


Model = Annotated[
    DLRMConfig
    | DCNConfig
    | DeepFMConfig
    | WideDeepConfig
    | AutoIntConfig
    | XDeepFMConfig
    | FinalMLPConfig
    | MaskNetConfig
    | SharedBottomConfig
    | MMoEConfig
    | PLEConfig
    | ESMMConfig
    | DINConfig
    | HSTUConfig
    | TwoTowerConfig
    | CustomModel,
    Field(discriminator="kind"),
]
