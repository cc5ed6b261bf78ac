"""The features of a domain's items inside a model: tables, what is missing, and a projection of each."""

import logging

import torch
from torch import Tensor, nn

from recbole_mmdiff.data.modalities import item_modalities, item_modality_names
from recbole_mmdiff.data.new_items import NewItems
from recbole_mmdiff.errors import ConfigError


class ItemFeatures(nn.Module):
    """Features of all items, and a linear projection of each modality.

    Projected are the rows that are asked for, not the whole table. A trained table (``trainable``) has
    a gradient buffer that lives as long as the module: backward writes the rows of a batch into it and
    clears those of the batch before, so that no step allocates or clears a whole table.

    Args:
        dataset: the training part of one domain.
        names: the modalities; None takes all of items that the data set's folder holds.
        policy: of items without a row: ``zero``, ``mean``, ``error``, or ``drop_item``, which treats
            the modality as missing there.
        size: length of the projections.
        trainable: whether the tables are parameters.

    Attributes:
        names: the modalities in order.
        present: (n_items, modalities) bool: what an item has; [PAD] has nothing.

    Raises:
        ConfigError: there is no modality.
        FeatureError, DataError: as ``item_modalities``.
    """

    def __init__(self, dataset, names: list[str] | None, policy: str, size: int, trainable: bool = False):
        super().__init__()
        self.names = modality_names(dataset, names)
        found = item_modalities(dataset, self.names, policy)
        known = torch.stack([~missing if policy == "drop_item" else torch.ones_like(missing)
                             for _, missing in found.values()], 1)
        known[0] = False
        self.register_buffer("present", known, persistent=False)
        self.trainable = trainable
        for number, (values, _) in enumerate(found.values()):
            if trainable:
                self.register_parameter(f"table_{number}", nn.Parameter(values))
            else:
                self.register_buffer(f"table_{number}", values, persistent=False)
        self.gradients = [RowGradient() for _ in self.names]
        self.projections = nn.ModuleList(
            nn.Linear(values.shape[1], size) for values, _ in found.values())
        for layer in self.projections:
            nn.init.xavier_normal_(layer.weight)

    def table(self, number: int) -> Tensor:
        """(n_items, dim): all rows of a modality; rows of items without it are zero."""
        return getattr(self, f"table_{number}")

    def rows(self, number: int, items: Tensor) -> Tensor:
        """(b, dim): the rows of distinct items (b,)."""
        if not self.trainable:
            return self.table(number)[items]
        return _Rows.apply(self.table(number), items, self.gradients[number])

    def project(self, items: Tensor) -> Tensor:
        """h^m = e^m W_m + b_m of distinct items (b,): (b, modalities, size), zero where one is missing."""
        return self._projected([self.rows(number, items) for number in range(len(self.names))],
                               self.present[items])

    def project_all(self) -> Tensor:
        """(n_items, modalities, size): ``project`` of all items."""
        if self.trainable:
            return self.project(torch.arange(len(self.present), device=self.present.device))
        return self._projected([self.table(number) for number in range(len(self.names))], self.present)

    def present_of(self, items: NewItems) -> Tensor:
        """(m, modalities) bool: what new items have."""
        return torch.stack([items.present(items.features[name][1]) for name in self.names], 1)

    def project_new(self, items: NewItems) -> Tensor:
        """(m, modalities, size): ``project`` of new items."""
        return self._projected([items.features[name][0] for name in self.names], self.present_of(items))

    def _projected(self, rows: list[Tensor], present: Tensor) -> Tensor:
        projected = [layer(part) for layer, part in zip(self.projections, rows, strict=True)]
        return torch.stack(projected, 1) * present[:, :, None]


def modality_names(dataset, names: list[str] | None) -> list[str]:
    """``names``, or where it is None all modalities of items that the data set's folder holds.

    Raises:
        ConfigError: there is none.
    """
    if names is None:
        names = item_modality_names(dataset)
        logging.getLogger().info("modalities: %s", names or "none")
    elif not names:
        raise ConfigError("modalities: [] names none, but this model needs some; leave the key out to "
                          "have all that there are")
    if not names:
        raise ConfigError(f"modalities: {dataset.dataset_name} has no features of items, but this model "
                          f"needs some; put <dataset>.<modality>.npy, .tokens and .json beside the .inter "
                          f"file (recbole-mmdiff prepare encode makes them)")
    return list(names)


class RowGradient:
    """The gradient of a table of which a step reads few rows: one buffer for all steps."""

    def __init__(self):
        self.buffer: Tensor | None = None
        self.touched: list[Tensor] = []

    def add(self, table: nn.Parameter, rows: Tensor, gradient: Tensor) -> None:
        """Add ``gradient`` (b, dim) to the table's gradient at distinct ``rows`` (b,)."""
        if self.buffer is None or self.buffer.device != table.device or self.buffer.dtype != table.dtype:
            self.buffer, self.touched = torch.zeros_like(table), []
        if table.grad is self.buffer:       # The same step asked for other rows, too.
            self.buffer.index_add_(0, rows, gradient.to(table.dtype))
        elif table.grad is not None:
            raise RuntimeError("the table of features has another gradient than its rows'")
        else:
            if self.buffer[0, 0] != 0:
                # Nobody asks for [PAD]: only a clipping by NaN writes there, and everywhere.
                self.buffer.zero_()
            for before in self.touched:
                self.buffer.index_fill_(0, before, 0)
            self.touched, table.grad = [], self.buffer
            self.buffer.index_copy_(0, rows, gradient.to(table.dtype))
        self.touched.append(rows)
        if len(self.touched) > 16:      # Somebody adds up the gradients of many steps.
            self.touched = [torch.unique(torch.cat(self.touched))]


class _Rows(torch.autograd.Function):
    """Rows of a table; their gradient goes into a ``RowGradient``, not through autograd, which would
    make a whole table of each."""

    @staticmethod
    def forward(ctx, table, rows, store):
        ctx.table, ctx.store = table, store
        ctx.save_for_backward(rows)
        return table[rows]

    @staticmethod
    def backward(ctx, gradient):
        ctx.store.add(ctx.table, *ctx.saved_tensors, gradient)
        return None, None, None
