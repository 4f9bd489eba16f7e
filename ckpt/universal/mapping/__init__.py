"""Mapping files: how one party's names and shapes become another's, declared, checked, and invertible.

    map.toml ─▶ language: rules ─▶ resolve: rules x names of a checkpoint ─▶ operations ─▶ nodes: regions on demand
                                                                                      Mapped: a View of the result

    expression  arithmetic over $variables      pattern  names with {placeholders}

A rule holds for every state of a parameter, so moments follow their weights. Nothing here evaluates code.
"""

from __future__ import annotations

from .language import Layout, load_layout, parse_layout
from .mapped import Mapped

__all__ = ["Layout", "Mapped", "load_layout", "parse_layout"]
