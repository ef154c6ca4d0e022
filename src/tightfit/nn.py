"""Modules that are of use by themselves."""

from tightfit.methods.token_turing_machine.stream import TokenTuringStream

__all__ = ["TokenTuringStream"]
