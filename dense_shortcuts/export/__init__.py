"""Export to other runtimes: graphs that are verified before they are kept, int8, and the Hugging Face hub."""

from .hub import from_pretrained, push_to_hub, save_for_hub
from .proof import Check, proven
from .run import export

__all__ = ["Check", "export", "from_pretrained", "proven", "push_to_hub", "save_for_hub"]
