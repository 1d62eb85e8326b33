"""Descriptions of a network's arithmetic, from which `flops` counts the FLOPs of a step.

`Family.flop_counts` lists them for a packed row, in the order in which data pass: if an entry trains, every later entry passes
gradients back. Padding, and pairs of positions in different segments, are computed, so they count.
"""

from typing import NamedTuple


class AttentionCount(NamedTuple):
    """Attention in some layers of a stack.

    Attributes:
      layers: number of layers.
      queries, keys: numbers of positions.
      span: keys that each query is multiplied by.
      heads, key_heads: heads of queries, and heads of keys and values.
      head_width: width of a head.
      rotates: True if queries and keys pass `layers.rotate`.
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
    """A linear map, or the layers of a stack that `attention` counts.

    Attributes:
      path: path of the parameters in the backbone, or a prefix of it.
      positions: positions that pass the linear maps.
      width: width of the states between the layers of a stack.
      attention: an entry for each kind of attention in a stack. If there are several, in one count or in several of one path, a
        conditional in the layer chooses between them; its branches are in this order.
      other_positions: numbers of positions, by name, for linear maps that do not pass `positions`.
      memory: names of linear maps that read an earlier entry instead of the layer before: keys and values of cross-attention.
      last: name of the map at the end of each layer, if only the residual sum reads its output: then it is not computed again.
      gate: path of the parameter that the output of `last` is multiplied by. If it trains, that output is read.
      scanned: True for layers run by `scan_layers`, which may compute layers again in the backward pass.
      has_meta: True if Meta Tokens are among the positions; they train, so gradients pass back.
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
