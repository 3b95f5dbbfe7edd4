"""A Hugging Face Hub on loopback, for tests: the real `huggingface_hub` client talks to it."""

from .server import FakeHub, Fault

__all__ = ["FakeHub", "Fault"]
