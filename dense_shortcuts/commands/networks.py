"""`dsnet models`: which networks there are."""

from dataclasses import dataclass

from .arguments import Positional


@dataclass(frozen=True)
class Models:
    """List the DSNets."""

    pattern: Positional[str] = ""
    """A wildcard such as 'ds2*'."""

    def run(self, line: str) -> None:
        from ..models import list_models

        print("\n".join(list_models(self.pattern)))
