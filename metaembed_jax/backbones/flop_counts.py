"""The arithmetic of a family's network, as `flops` reads it to count the FLOPs of a step.

`Family.flop_counts` lists it for a packed row of a batch, in the order in which data pass: what trains in one entry makes every
later one pass gradients back. Padding is computed, and so is what segments hide from each other, so both count.
"""

from typing import NamedTuple


class AttentionCount(NamedTuple):
    """Attention in some layers of a stack.

    Attributes:
      layers: number of layers.
      queries, keys: positions of each.
      span: keys that each query is multiplied with.
      heads, key_heads: heads of queries, and of keys and values.
      head_width: width of a head.
      rotates: queries and keys pass `layers.rotate`.
    """

    layers: int
    queries: int
    keys: int
    span: int
    heads: int
    key_heads: int
    head_width: int
    rotates: bool = True


class FlopCount(NamedTuple):
    """A linear map, or those layers of a stack that `attention` counts.

    Attributes:
      path: of its parameters in the backbone, or their first names.
      positions: positions that pass its linear maps.
      width: width of the states between the layers of a stack.
      attention: one entry for each kind of attention in a stack. Between several, which may be in several counts of one path, a
        conditional in the layer chooses; its branches are in this order.
      other_positions: positions of linear maps, by their names, that not all `positions` pass.
      memory: names of linear maps that read an earlier entry instead of the layer before: keys and values of cross-attention.
      last: name of the map at the end of each layer, if nothing but the sum with its input reads it: it is not computed again.
      gate: path of the parameter that the output of `last` is multiplied with; where it trains, that output is read.
      scanned: run by `scan_layers`, which may compute layers again in the backward pass.
      has_meta: Meta Tokens are among the positions; as they train, gradients pass back.
    """

    path: str
    positions: float
    width: int = 0
    attention: tuple[AttentionCount, ...] = ()
    other_positions: dict[str, float] = {}
    memory: tuple[str, ...] = ()
    last: str = ""
    gate: str = ""
    scanned: bool = True
    has_meta: bool = False

    @property
    def layers(self) -> int:
        """Number of layers; 0 for a linear map."""
        return sum(attention.layers for attention in self.attention)
