"""Embedding tables: optimizers, initial values, tables, features."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ByteSize, Field, model_validator

from penstock.config.base import (
    MAY_CHANGE,
    Config,
    FiniteFloat,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Probability,
)
from penstock.config.schedule import Schedule

LearningRate = Annotated[PositiveFloat, MAY_CHANGE]


class Rule(Config):
    """Fields of every embedding optimizer. lr is the learning rate times the schedule's factor."""

    weight_decay: Annotated[NonNegativeFloat, MAY_CHANGE] = 0.0
    """L2 penalty of the rows that a batch touches, once a row: weight_decay * w is added to the
    gradient (that of weight_decay / 2 times the sum of squares).
    """
    clip_norm: Annotated[PositiveFloat | None, MAY_CHANGE] = None
    """Largest L2 norm of the gradient of one row and batch; null: any."""
    weight_bound: Annotated[float | None, Field(ge=2**-14, allow_inf_nan=False), MAY_CHANGE] = None
    """Values of a row are kept within [-bound, bound] by every update of it; null: any. In a table
    of two bytes it is the largest such number up to this.
    """
    schedule: Annotated[Schedule, MAY_CHANGE] = Schedule()


class SGD(Rule):
    """w -= lr * g."""

    kind: Literal["sgd"] = "sgd"
    learning_rate: LearningRate = 0.05


class MomentumSGD(Rule):
    """m = momentum * m + g; w -= lr * m, as torch.optim.SGD; only touched rows move."""

    kind: Literal["momentum_sgd"] = "momentum_sgd"
    learning_rate: LearningRate = 0.05
    momentum: Probability = 0.9


class Adagrad(Rule):
    """s += g * g; w -= lr * g / (sqrt(s) + eps), as torch.optim.Adagrad."""

    kind: Literal["adagrad"] = "adagrad"
    learning_rate: LearningRate = 0.02
    eps: PositiveFloat = 1e-8
    initial_accumulator: NonNegativeFloat = 0.0


class RowWiseAdagrad(Rule):
    """One accumulator a row: s += mean(g * g); w -= lr * g / (sqrt(s) + eps)."""

    kind: Literal["row_wise_adagrad"] = "row_wise_adagrad"
    learning_rate: LearningRate = 0.02
    eps: PositiveFloat = 1e-8
    initial_accumulator: NonNegativeFloat = 0.0


class Adam(Rule):
    """Lazy Adam, as torch.optim.SparseAdam.

    Only touched rows decay; bias correction is by the table's step.
    """

    kind: Literal["adam"] = "adam"
    learning_rate: LearningRate = 1e-3
    beta1: Probability = 0.9
    beta2: Probability = 0.999
    eps: PositiveFloat = 1e-8


class AdamW(Rule):
    """Lazy Adam with decoupled weight decay: w -= lr * weight_decay * w beside Adam's step.

    As torch.optim.AdamW (arXiv:1711.05101), but only the rows that a batch touches decay and move:
    a row decays as often as it is trained, whatever else is.
    """

    kind: Literal["adamw"] = "adamw"
    learning_rate: LearningRate = 1e-3
    beta1: Probability = 0.9
    beta2: Probability = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[NonNegativeFloat, MAY_CHANGE] = 0.01
    """No part of the gradient: what it takes off a row does not depend on its moments."""


class RowWiseAdam(Rule):
    """Lazy Adam with one variance a row, of mean(g * g): half the state."""

    kind: Literal["row_wise_adam"] = "row_wise_adam"
    learning_rate: LearningRate = 1e-3
    beta1: Probability = 0.9
    beta2: Probability = 0.999
    eps: PositiveFloat = 1e-8


class FTRL(Rule):
    """FTRL-Proximal (McMahan et al., KDD 2013, algorithm 1).

    `weight_decay` is its L2; a row begins with its initial value, and from its first update on is
    what the accumulated gradients say.
    """

    kind: Literal["ftrl"] = "ftrl"
    learning_rate: LearningRate = 0.05
    beta: PositiveFloat = 1.0
    l1: NonNegativeFloat = 0.0
    """Columns whose accumulated gradient stays below this are exactly 0."""


class LAMB(Rule):
    """Adam's step, scaled by norm of the row over norm of the step (arXiv:1904.00962).

    `weight_decay` is part of the step, not of the gradient. Only touched rows move.
    """

    kind: Literal["lamb"] = "lamb"
    learning_rate: LearningRate = 1e-2
    beta1: Probability = 0.9
    beta2: Probability = 0.999
    eps: PositiveFloat = 1e-6


Optimizer = Annotated[
    SGD | MomentumSGD | Adagrad | RowWiseAdagrad | Adam | AdamW | RowWiseAdam | FTRL | LAMB,
    Field(discriminator="kind"),
]


class Uniform(Config):
    """Uniform in [-bound, bound)."""

    kind: Literal["uniform"] = "uniform"
    bound: PositiveFloat = 0.05


class Normal(Config):
    """Bell-shaped with mean 0: a sum of twelve uniform numbers, so within 6 std."""

    kind: Literal["normal"] = "normal"
    std: PositiveFloat = 0.01


class Constant(Config):
    """The same value in every column."""

    kind: Literal["constant"] = "constant"
    value: FiniteFloat = 0.0


Initializer = Annotated[Uniform | Normal | Constant, Field(discriminator="kind")]

EmbeddingDim = Annotated[int, Field(ge=1, le=4096)]

ValueType = Literal["float32", "bfloat16", "float16"]
"""Of the values of rows; optimizer states are float32. Two bytes halve what values take: an update
is computed in float32 and rounded stochastically, so that small steps are not lost. float16 is
finer and ends at 65504, beyond which lies infinity.
"""


class AdmitAtRandom(Config):
    """A new key gets a row with this probability at each step in which it occurs.

    The draw is a pure function of (seed, table, key, step).
    """

    kind: Literal["probability"] = "probability"
    probability: Fraction


class AdmitFrequent(Config):
    """A new key gets a row once it has occurred so often in training, this batch included.

    Counts are exact; a key that is counted takes 24 bytes.
    """

    kind: Literal["min_count"] = "min_count"
    min_count: Annotated[int, Field(ge=2, le=65_535)]
    half_life_steps: PositiveInt | None = None
    """Counts are halved every so many steps, and keys whose count becomes 0 are forgotten; null:
    only when they fill the eighth of `max_bytes` that is theirs.
    """


Admission = Annotated[AdmitAtRandom | AdmitFrequent, Field(discriminator="kind")]


class Eviction(Config):
    """Which rows leave a table. A row is used when a training step updates it.

    When new rows find no room in `max_bytes`, those that come first in `order` leave: as many as
    needed, and a 32nd of the table more. Rows of the batch at hand stay. Ties go by a hash of the
    key.
    """

    order: Literal["lru", "lfu", "score"] = "lru"
    """lru: the row that was not used for longest; lfu: the least often used one, of equals the one
    not used for longest; score: the row of the lowest score, of equals likewise. Scores are the
    user's (`EmbeddingCollection.set_scores`), 0 of rows that were given none.
    """
    unit: Literal["steps", "seconds"] = "steps"
    """Of `ttl` and `half_life`. Seconds are those of the rows' event time where the job names its
    column, else of the clock.
    """
    ttl: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """Rows not used for longer than this leave, within a 16th of it; null: never."""
    half_life: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """lfu: numbers of uses are halved every so often; null: never."""

    @property
    def has_uses(self) -> bool:
        """Whether rows have a number beside the time of their last use: uses, or a score."""
        return self.order != "lru"

    @model_validator(mode="after")
    def _half_life_is_of_lfu(self) -> Eviction:
        if self.half_life is not None and self.order != "lfu":
            raise ValueError("half_life ages the numbers of uses: set order to lfu, or remove it")
        return self


class HashStack(Config):
    """A key's vector as the sum of `rounds` rows, each chosen among `size` by a hash of its own.

    For vocabularies too large for a row a key: two keys share all of their rows hardly ever.
    """

    rounds: Annotated[int, Field(ge=1, le=16)] = 2
    size: Annotated[int, Field(ge=1, le=2**40)]
    """Rows of each round; the table has at most rounds * size."""


Placement = Literal["spread", "whole"]


class TableConfig(Config):
    """One embedding table: rows by 64-bit key, unbounded. Many features may share it."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9_.\-]+$")]
    dim: EmbeddingDim = 16
    """Columns of the value, without optimizer state."""
    dtype: ValueType = "float32"
    """Of the stored values; the vectors that a model sees are float32."""
    optimizer: Optimizer = Field(default_factory=RowWiseAdagrad)
    initializer: Initializer = Field(default_factory=Uniform)
    """First value of a row: a pure function of (seed, table, key, column)."""
    hash_stack: HashStack | None = None
    """null: every key has a row of its own. Poolings are sum, mean and sqrt_n; rows are then known
    by number, not by key.
    """
    admission: Admission | None = None
    """Which new keys get a row; null: all. Those refused read the table's default row, which is
    trained on their behalf.
    """
    max_bytes: ByteSize | None = None
    """Most bytes of the table: row values, optimizer state, marks of use, and 24 bytes of index a
    key. `2GiB` is 2^31. Without `eviction`, new keys are refused once it is full. null: unbounded.
    Over several ranks each holds an equal share of it, whole rows, so that what is refused or
    leaves depends on their number; but for `placement: whole`.
    """
    eviction: Eviction | None = None
    trainable: Annotated[bool, MAY_CHANGE] = True
    """False freezes the table: look-ups read it, and training changes, makes and evicts no row."""
    placement: Annotated[Placement, MAY_CHANGE] = "spread"
    """Over several ranks: `spread` divides the rows among them; `whole` keeps the table on one,
    which is chosen so that tables are dealt evenly. A bag of it is then a sum from one rank
    instead of one from each.
    """

    @model_validator(mode="after")
    def _eviction_has_a_reason(self) -> TableConfig:
        if self.eviction is not None and self.max_bytes is None:
            if self.eviction.ttl is None:
                raise ValueError("eviction needs `max_bytes` or a `ttl`; else no row ever leaves")
            if self.eviction.order != "lru":
                raise ValueError(
                    f"order {self.eviction.order} says which rows leave a full table: set "
                    "`max_bytes`"
                )
        return self


Pooling = Literal["sum", "mean", "sqrt_n", "max", "sequence"]
"""How a bag of n rows becomes one vector: their sum, divided by 1, n, or the square root of n.

With weights w: sum(w x), divided by 1, sum(w), or the square root of sum(w * w); a divisor of 0
gives zeros. `max` is the largest w x of each column. `sequence` keeps the vectors apart, one after
the other, then zeros.
"""


class FeatureConfig(Config):
    """One categorical input: which table it reads and how a sample's keys become one vector."""

    name: Annotated[str, Field(min_length=1)]
    table: str
    pooling: Pooling | Literal["none"] = "sum"
    """An empty bag pools to zeros. `none`, in own loops, gives every key's vector, of bags of any
    length; see `EmbeddingCollection`.
    """
    max_keys: PositiveInt | None = None
    """Positions of a sequence: key n of a bag fills the vector at position n, and the rest are
    zeros. Required for `sequence`, which no bag may exceed; null for the others.
    """
    input: str | None = None
    """Column of the batch whose keys it reads; null: that of its own name. Several features may
    read one column, each in its own table.
    """
    padding_key: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Keys of this value stand for nothing: they are left out of bags, and get no row."""
    holes: Literal["close", "keep"] = "close"
    """What becomes of a `padding_key` in a sequence: `close` lets the keys after it move up, `keep`
    leaves zeros at its position.
    """

    @model_validator(mode="after")
    def _only_sequences_have_holes(self) -> FeatureConfig:
        if self.holes == "keep" and (self.pooling != "sequence" or self.padding_key is None):
            raise ValueError("holes are of pooling 'sequence' with a padding_key")
        return self

    @model_validator(mode="after")
    def _sequences_have_positions(self) -> FeatureConfig:
        if self.pooling == "sequence" and self.max_keys is None:
            raise ValueError("pooling 'sequence' needs max_keys, its number of positions")
        if self.pooling != "sequence" and self.max_keys is not None:
            raise ValueError(
                f"max_keys is for pooling 'sequence'; {self.pooling!r} reads every key of a bag"
            )
        return self
