"""Device functions that all kernels over keys share: hashing, the index's entries, initial values.

An index is `entries` [capacity, 2] int64, 16 bytes an entry: the key, and what it stands for:

    0                            empty
    ERASED                       was erased; a probe goes on beyond it, an insertion may take it
    (table + 1) << 40 | payload  of a key: the slot of its row, or any other number below 2^40
    the same | CLAIMED           inserted by the call at hand; payload: the key's place in the call

Eight entries are a bucket, 128 bytes; the number of buckets is a prime. A key's probe begins at the
bucket that its hash names and goes on by steps that its hash gives too, until a bucket has an
empty entry: full buckets side by side are not gone through one by one, so that probes stay short
at a load of 0.9.
"""

from __future__ import annotations

import triton
import triton.language as tl

ERASED = tl.constexpr(1)
CLAIMED = tl.constexpr(1 << 62)
PAYLOAD = tl.constexpr((1 << 40) - 1)
PAYLOAD_BITS = tl.constexpr(40)
TABLE_BITS = tl.constexpr(0x3FFFFF)
BUCKET = tl.constexpr(8)
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)


@triton.jit
def mix64(x):
    """csrc/index/hashing.h: finalizer of MurmurHash3 of uint64."""
    x = x ^ (x >> 33)
    x = x * 0xFF51AFD7ED558CCD
    x = x ^ (x >> 33)
    x = x * 0xC4CEB9FE1A85EC53
    return x ^ (x >> 33)


@triton.jit
def probe_start(key, table, salt, num_buckets):
    """[B] int64 bucket at which the probe of (key, table) begins; [B] int64 step, 1 to 2^16.

    Each table has a random-looking mask of its own, so that keys of one pattern in many tables do
    not meet; the salt is the index's own.
    """
    tag = table.to(tl.uint64) * 2 + 1
    mask = tag * (tag * 0 + salt.to(tl.uint64, bitcast=True))
    hashed = mix64(key.to(tl.uint64, bitcast=True) ^ mask)
    bucket = tl.umulhi(hashed, hashed * 0 + num_buckets.to(tl.uint64)).to(tl.int64)
    most = tl.minimum(num_buckets.to(tl.int64) - 1, 65536)
    return bucket, 1 + (((hashed & 0xFFFF).to(tl.int64) * most) >> 16)


@triton.jit
def next_bucket(bucket, step, num_buckets):
    """Where a probe goes on; in as many steps as there are buckets it sees them all."""
    following = bucket + step
    return tl.where(following >= num_buckets, following - num_buckets, following)


@triton.jit
def find_entry(entries, num_buckets, salt, key, table, active, BLOCK: tl.constexpr):
    """Finds keys in an index that nobody changes meanwhile.

    Args:
      entries: of the index.
      num_buckets: int64.
      salt: int64.
      key: [BLOCK] int64.
      table: [BLOCK] integers.
      active: [BLOCK] bool; others count as absent.
      BLOCK: number of keys.

    Returns:
      [BLOCK] int64 payload, -1 where absent; [BLOCK] int64 number of the entry.
    """
    lane = tl.arange(0, 8)
    tag = table.to(tl.int64) + 1
    bucket, step = probe_start(key, table, salt, num_buckets)
    payload = tl.full((BLOCK,), -1, tl.int64)
    entry = tl.zeros((BLOCK,), tl.int64)
    left = active
    while tl.max(left.to(tl.int32), 0) > 0:
        place = bucket[:, None] * BUCKET + lane[None, :]
        their_key = tl.load(entries + place * 2, mask=left[:, None], other=0)
        meta = tl.load(entries + place * 2 + 1, mask=left[:, None], other=0)
        is_it = (their_key == key[:, None]) & ((meta >> PAYLOAD_BITS) == tag[:, None])
        # At most one entry of the bucket is it.
        found = tl.max(tl.where(is_it, meta & PAYLOAD, -1), 1)
        entry = tl.where(found >= 0, tl.max(tl.where(is_it, place, 0), 1), entry)
        payload = tl.where(left, found, payload)
        is_end = tl.max((meta == 0).to(tl.int32), 1) > 0
        left = left & (found < 0) & (is_end == 0)
        bucket = next_bucket(bucket, step, num_buckets)
    return payload, entry


@triton.jit
def table_of(position, offsets, batch_size, tables, num_features):
    """[B] int32: the table of each key of a packed batch; -1: not of this store.

    Args:
      position: [B] int64 places of the keys, below their number.
      offsets: [num_features * batch_size + 1] int64 of the packed batch.
      batch_size: int64.
      tables: [num_features] int32, by packed feature.
      num_features: int32, at least 1.
    """
    low = (position * 0).to(tl.int32)
    high = low + num_features
    # The last feature that begins at or before the position.
    while tl.max(high - low, 0) > 1:
        middle = (low + high) // 2
        begin = tl.load(offsets + middle.to(tl.int64) * batch_size)
        is_above = begin <= position
        low = tl.where(is_above & (high - low > 1), middle, low)
        high = tl.where(is_above | (high - low <= 1), high, middle)
    return tl.load(tables + low)


@triton.jit
def row_seed(key, table_seed):
    """csrc/index/hashing.h: uint64 seed of a row, from int64 key and int64 seed of its table."""
    return mix64(key.to(tl.uint64, bitcast=True) ^ table_seed.to(tl.uint64, bitcast=True))


@triton.jit
def initial_values(seed, column, kind, scale):
    """csrc/index/hashing.h: float32 first value of columns of rows.

    Args:
      seed: uint64 from `row_seed`, of a shape that goes with `column`.
      column: integers.
      kind: 0 uniform, 1 normal, 2 constant (`initializer.KINDS`); int32.
      scale: bound, standard deviation or value; float32.
    """
    column = column.to(tl.uint64)
    bits = mix64(seed + (column + 1) * GOLDEN) >> 40
    # 24 bits, centred: exact in float32, so that one rounding is left.
    uniform = (bits.to(tl.int32) - 8388608).to(tl.float32) * (scale * 1.1920928955078125e-07)
    total = (bits * 0).to(tl.int32) - 393210
    if tl.max((kind == 1).to(tl.int32)) > 0:
        for draw in tl.static_range(1, 4):
            more = mix64(seed + (column * 3 + draw) * GOLDEN)
            total += ((more & 0xFFFF) + ((more >> 16) & 0xFFFF)).to(tl.int32)
            total += (((more >> 32) & 0xFFFF) + (more >> 48)).to(tl.int32)
    normal = total.to(tl.float32) * (scale * 1.52587890625e-05)
    return tl.where(kind == 0, uniform, tl.where(kind == 1, normal, scale + 0.0 * uniform))


@triton.jit
def narrowed(value, dtype: tl.constexpr):
    """Finite float32 rounded to the nearest even number of a type."""
    if dtype == tl.bfloat16:
        # Triton's interpreter cuts off.
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)
