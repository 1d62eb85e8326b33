"""What a family says of its arithmetic: the parts of its network, from which `planning.flops` counts a step.

A family's `parts(config, row)` gives them for a packed row of a batch, in the order in which data pass: what trains in one makes
every later one pass gradients back. A row is a `Size`; without patches, the vision tower does not run. Padding, and what segments
hide from each other, are computed, so they count.
"""

from typing import NamedTuple


class Attention(NamedTuple):
    """Attention in some layers of a part.

    Attributes:
      layers: how many.
      queries, keys: positions of each.
      span: keys that each query is multiplied with.
      heads, key_heads: of queries, and of keys and values.
      head_width: of each.
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


class Part(NamedTuple):
    """A stretch of the network: a linear map, or layers of a stack, one for each that `attention` counts.

    Attributes:
      path: of its parameters in the backbone, or their first names.
      positions: that pass its linear maps.
      width: of a stack, that of the states between its layers.
      attention: of a stack, one for each kind. Between several, which may be of several parts with one path, a conditional in the
        layer chooses; its branches are in this order.
      other_positions: of linear maps, by their names, that not all `positions` pass.
      memory: names of linear maps that read an earlier part instead of the layer before: keys and values of cross-attention.
      last: name of the map at the end of each layer, if nothing but the sum with its input reads it: nothing computes it again.
      gate: path of the parameter, if there is one, that what `last` gives is multiplied with; where it trains, that is read.
      scanned: by `scan_layers`, which may compute layers again in the backward pass.
      has_meta: Meta Tokens are among the positions; as they train, gradients pass back.
    """

    path: str
    positions: float
    width: int = 0
    attention: tuple[Attention, ...] = ()
    other_positions: dict[str, float] = {}
    memory: tuple[str, ...] = ()
    last: str = ""
    gate: str = ""
    scanned: bool = True
    has_meta: bool = False

    @property
    def layers(self) -> int:
        """Of the stack, that are meant; 0 where it is none."""
        return sum(one.layers for one in self.attention)
