"""fedistill: hospitals send a lesson, not their images."""

__version__ = "0.1.0"
