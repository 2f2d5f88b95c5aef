"""Snakemake finds a logger plugin by the name of its package; what this one does is in adder.workflow.terminal."""

from adder.workflow.terminal.handler import LogHandler, LogHandlerSettings

__all__ = ["LogHandler", "LogHandlerSettings"]
