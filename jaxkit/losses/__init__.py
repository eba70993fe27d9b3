"""Losses: penalties and objectives, as functions of what a model computes."""

__all__: list[str] = []
