"""Rows of different lengths side by side in one sequence, each behind a beginning that several may share.

What works token by token (projections, feed-forwards, experts, norms) sees no padding; attention alone takes the rows
apart, pads them, and puts them together again.

Letters: T tokens of all rows together, R rows, S tokens of the longest, F beginnings, P tokens of the longest, H query
heads, G key-value heads, C channels of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modules.functional.attention import attend


class PackedRows:
    """Stands in for a key-value cache in `Transformer.forward`, whose tokens are then those of all rows [1, T].

    Args:
        lengths: tokens of each row, in order.
        device: where the network runs.
        beginnings: the pass that has computed what rows begin with, each of its rows a beginning; it keeps its keys and
            values.
        beginning_of_row: which of them each row continues.
        keep: keep keys and values of all layers, to be a beginning for others.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        beginnings: "PackedRows | None" = None,
        beginning_of_row: Sequence[int] = (),
        keep: bool = False,
    ) -> None:
        self.length = 0
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._keeps = keep
        self._beginnings = beginnings
        self.lengths_R = torch.tensor(lengths, device=device)
        start_R = self.lengths_R.cumsum(0) - self.lengths_R
        column_S = torch.arange(max(lengths), device=device)
        self._is_real_RS = column_S < self.lengths_R[:, None]
        self._token_RS = (start_R[:, None] + column_S).masked_fill(~self._is_real_RS, 0)
        self._origin_R = torch.tensor(beginning_of_row, device=device, dtype=torch.long)
        before_R = torch.zeros_like(self.lengths_R) if beginnings is None else beginnings.lengths_R[self._origin_R]
        self._positions_1T = (before_R[:, None] + column_S)[self._is_real_RS][None]
        own = (column_S[None, :] <= column_S[:, None]).expand(
            len(lengths), -1, -1
        )  # a row sees itself, not what follows
        if beginnings is None:
            self._seen = own[:, None]
        else:
            key_P = torch.arange(int(beginnings.lengths_R.max()), device=device)
            lent_RSP = (key_P < before_R[:, None])[:, None].expand(-1, len(column_S), -1)
            self._seen = torch.cat((lent_RSP, own), dim=2)[:, None]

    def positions_and_mask(self, num_new: int) -> tuple[Tensor, None]:
        """Positions [1, T], counted in each row from its beginning's first token; who sees what is known here."""
        return self._positions_1T, None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of each row over its beginning and itself, from [1, H, T, C] and [1, G, T, C] to [1, H, T, C]."""
        query, key, value = (self._apart(heads) for heads in (query, key, value))
        if self._keeps:
            self.kept[layer] = key, value
        if self._beginnings is not None:
            lent_key, lent_value = self._beginnings.kept[layer]
            key = torch.cat((lent_key[self._origin_R], key), dim=2)
            value = torch.cat((lent_value[self._origin_R], value), dim=2)
        mixed = attend(query, key, value, self._seen)
        return mixed.transpose(1, 2)[self._is_real_RS].transpose(0, 1)[None]

    def _apart(self, heads: Tensor) -> Tensor:
        """Rows [R, H, S, C]; places without a token repeat the first one, and are seen by none that counts."""
        return heads[0].transpose(0, 1)[self._token_RS].transpose(1, 2)
