"""The mixins: on the model for labels and the loop over segments, on the module that takes the memory."""

from __future__ import annotations

from typing import Any

from tightfit.core import hfmodel
from tightfit.core.calls import named_call
from tightfit.core.tight import state_of
from tightfit.methods.recurrent_memory.reading import read
from tightfit.methods.recurrent_memory.recurrence import Recurrence


class MemoryModel:
    """A model with a head: its rows go through it segment by segment."""

    def forward(self, *args, **kwargs):
        own: Recurrence = state_of(self, MemoryModel)["recurrence"]  # type: ignore[arg-type]
        call = named_call(self, args, kwargs)
        reader = hfmodel.stock_module(self, own.facts.reader)  # type: ignore[arg-type]
        if own.decoding is not None:
            return own.decoding.forward(self, reader, super().forward, call)  # type: ignore[misc]
        return own.run(self, reader, super().forward, call, own.facts.head)  # type: ignore[misc, arg-type]


class MemoryReader:
    """The backbone: puts the memory around a segment, and takes the new one out; called by itself, it cuts its rows."""

    def forward(self, *args, **kwargs):
        own: Recurrence = state_of(self, MemoryReader)["recurrence"]  # type: ignore[arg-type]
        call = named_call(self, args, kwargs)
        stock: Any = super().forward  # type: ignore[misc]
        if own.request is None:
            return own.run(self, self, self._segment(stock, own), call, "hidden")  # type: ignore[arg-type]
        return self._segment(stock, own)(**call)

    def _segment(self, stock: Any, own: Recurrence) -> Any:
        def segment(**call: Any) -> Any:
            request, own.request = own.request, None
            if request is None:
                return stock(**call)
            return read(self, stock, call, request, own.facts, both_ways=own.settings.both_ways)

        return segment
